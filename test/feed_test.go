package test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// What was cut off, as a service that verifies tokens by itself reads it.

type revocation struct {
	Kind, ID  string
	Lifted    bool
	ExpiresAt string
}

type feedPage struct {
	Entries []revocation
	Next    string
	More    bool
}

func (x revocation) String() string { return fmt.Sprintf("%s %s %v", x.Kind, x.ID, x.Lifted) }

func readFeed(t testing.TB, a answer) (p feedPage) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.raw), &p); a.status != 200 || err != nil {
		t.Fatalf("revocations are answered %v (%v), want 200", a, err)
	}
	return p
}

// feed asks with the token of the first agent.
func (v *service) feed(query string) feedPage {
	v.t.Helper()
	return readFeed(v.t, v.api(v.bearer, "GET", "/revocations"+query, ""))
}

// feedEnd is the place behind all that there is.
func (v *service) feedEnd() string {
	v.t.Helper()
	p := v.feed("?after=" + v.feed("").Next) // behind the event of the first reading, too
	for p.More {
		p = v.feed("?after=" + p.Next)
	}
	return p.Next
}

// inLog is what the log says that a reader has to have.
func (v *service) inLog() (list []revocation) {
	v.t.Helper()
	rows, err := v.db.Query(v.t.Context(), `
		select case when action like 'agent.%' then 'agent' when action = 'token.revoked' then 'token'
				when action = 'credential.revoked' then 'credential' else 'secret' end,
			case when action like 'agent.%' then agent_id::text when action = 'token.revoked' then metadata ->> 'jti'
				when action = 'credential.revoked' then metadata ->> 'credentialId' else metadata ->> 'endedSecretId' end,
			action = 'agent.reactivated',
			to_char((case when action = 'token.revoked' then to_timestamp((metadata ->> 'exp')::bigint) else "timestamp" + '24 h' end + '5 min') at time zone 'UTC',
				'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
		from audit_events
		where outcome = 'success' and (action in ('agent.suspended', 'agent.reactivated', 'agent.decommissioned')
			or action in ('credential.rotated', 'credential.revoked', 'token.revoked'))
		order by seq`)
	if err != nil {
		v.t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var x revocation
		if err := rows.Scan(&x.Kind, &x.ID, &x.Lifted, &x.ExpiresAt); err != nil {
			v.t.Fatal(err)
		}
		list = append(list, x)
	}
	if err := rows.Err(); err != nil {
		v.t.Fatal(err)
	}
	return list
}

// waits asks in the background. An answer that doesn't come is a zero one.
func (v *service) waits(bearer, query string) (got func() answer) {
	v.t.Helper()
	answered := make(chan answer, 1)
	go func() {
		defer close(answered) // also where the asking has failed
		answered <- v.api(bearer, "GET", "/revocations"+query, "")
	}()
	return func() answer { return <-answered }
}

// A feedStream is one that is open. Its pages come one by one; one without entries is a sign of life.
type feedStream struct {
	pages chan feedPage // closed at the end
	close func()
	rest  string // a line that is not of an event; read behind the end alone
}

// stream opens a stream; header are pairs.
func (v *service) stream(bearer string, header ...string) *feedStream {
	v.t.Helper()
	f, err := openStream(v.t.Context(), v.url, bearer, header...)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(f.close)
	return f
}

func openStream(ctx context.Context, base, bearer string, header ...string) (*feedStream, error) {
	ctx, cancel := context.WithCancel(ctx)
	q, err := http.NewRequestWithContext(ctx, "GET", base+"/api/v1/revocations", nil)
	if err != nil {
		panic(err)
	}
	q.Header.Set("Authorization", "Bearer "+bearer)
	q.Header.Set("Accept", "text/event-stream")
	for i := 0; i < len(header); i += 2 {
		q.Header.Set(header[i], header[i+1])
	}
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(q)
	if err == nil && (response.StatusCode != 200 || response.Header.Get("Content-Type") != "text/event-stream") {
		b, _ := io.ReadAll(response.Body)
		response.Body.Close()
		err = fmt.Errorf("a stream is answered %s %s", response.Status, b)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	f := &feedStream{pages: make(chan feedPage, 1000), close: cancel}
	go func() {
		defer response.Body.Close()
		defer close(f.pages)
		lines := bufio.NewScanner(response.Body)
		lines.Buffer(nil, 1<<20)
		id, data := "", ""
		for lines.Scan() {
			name, value, _ := strings.Cut(lines.Text(), ": ")
			switch name {
			case "id":
				id = value
			case "data":
				data = value
			case "":
				var p feedPage
				if json.Unmarshal([]byte(data), &p) != nil || p.Next != id {
					panic("the stream has " + id + " " + data)
				}
				f.pages <- p
			default:
				f.rest = lines.Text()
			}
		}
	}()
	return f, nil
}

// next is the next page with entries, of those that come in time.
func (f *feedStream) next(t testing.TB) feedPage {
	t.Helper()
	end := time.After(time.Minute)
	for {
		select {
		case p, open := <-f.pages:
			if !open {
				t.Fatal("the stream has ended")
			}
			if len(p.Entries) > 0 {
				return p
			}
		case <-end:
			t.Fatal("the stream has nothing")
		}
	}
}

// ended waits for the end, and returns the last place.
func (f *feedStream) ended(t testing.TB, within time.Duration) (last string) {
	t.Helper()
	for end := time.After(within); ; {
		select {
		case p, open := <-f.pages:
			if !open {
				if f.rest != "" {
					t.Errorf("the stream has %q", f.rest)
				}
				return last
			}
			last = p.Next
		case <-end:
			t.Fatalf("the stream goes on after %v", within)
		}
	}
}

func TestFeedHasWhateverEndsTokens(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	after := w.feedEnd()
	stream := w.stream(v.bearer)
	at := after
	id, secret := v.newClient("a:b")
	first := readClaims(t, v.token(id, secret, ""))
	credential := "/agents/" + id + "/credentials/" + first.CredentialID
	patch := func(body string) func() answer {
		return func() answer { return v.api(v.bearer, "PATCH", "/agents/"+id, body) }
	}
	var token string
	for _, x := range []struct {
		do   func() answer
		want string
	}{
		{patch(`{"status":"suspended"}`), "agent " + id + " false"},
		{patch(`{"status":"active","owner":"x"}`), "agent " + id + " true"},
		{func() answer { return v.api(v.bearer, "POST", credential+"/rotate", "{}") }, "secret " + first.SecretID + " false"},
		{func() answer { return v.form(v.id, v.secret, "/revoke", "token="+token) }, ""},
		{func() answer { return v.api(v.bearer, "DELETE", credential, "") }, "credential " + first.CredentialID + " false"},
		{func() answer { return v.api(v.bearer, "DELETE", "/agents/"+id, "") }, "agent " + id + " false"},
	} {
		if x.want == "" {
			token = v.mint(id, first.CredentialID)
			x.want = "token " + jti(t, token) + " false"
		}
		got := w.waits(w.bearer, "?wait=20&after="+at) // begins before it or after it
		if a := x.do(); !a.done() {
			t.Fatalf("%s: answered %v", x.want, a)
		}
		p := readFeed(t, got())
		if len(p.Entries) != 1 || p.Entries[0].String() != x.want {
			t.Fatalf("a reader gets %v, want %s", p.Entries, x.want)
		}
		if q := stream.next(t); len(q.Entries) != 1 || q.Entries[0] != p.Entries[0] {
			t.Errorf("a stream has %v, want %v", q.Entries, p.Entries)
		}
		at = p.Next
	}
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 409, "AGENT_ALREADY_DECOMMISSIONED") // is recorded
	v.want(v.form(w.id, w.secret, "/revoke", "token="+token), 200, "")                        // is not, a second time
	v.want(v.form(v.id, v.secret, "/introspect", "token="+token), 200, "")                    // and moves the head
	if p := v.feed("?after=" + at); len(p.Entries) != 0 || p.Next == at || p.More {
		t.Errorf("behind all of them a reader gets %+v, want nothing and a later place", p)
	}
	log := v.inLog()
	if got := v.feed("?after=" + after).Entries; !slices.Equal(got, log) || len(log) != 6 {
		t.Errorf("a reader gets %v, want %v", got, log)
	}
	if got := v.feed("").Entries; !slices.Equal(got, log) {
		t.Errorf("who begins gets %v, want %v", got, log)
	}
	again := w.stream(v.bearer, "Last-Event-ID", after)
	if got := again.next(t).Entries; !slices.Equal(got, log) {
		t.Errorf("a stream that goes on from %s has %v, want %v", after, got, log)
	}
	if n := v.count(`select count(*) from audit_events where action = 'revocations.read' and agent_id = $1 and actor_id = $1`, v.id); n != 3 {
		t.Errorf("that it was read is recorded %d times, want once for each of the three that began", n)
	}
}

func TestFeedRefusesPlacesOfNoLog(t *testing.T) {
	t.Parallel()
	v := newService(t)
	place := v.feedEnd()
	seq, hash, _ := strings.Cut(place, "-")
	for _, after := range []string{"", "x", "01", seq + "-", "-" + hash, "0-0000000000000000", "0" + place, "+" + place, seq + "-" + strings.ToUpper("abcdef0123456789"),
		place + "0", place + "%0a", seq + "--" + hash, "9" + strings.Repeat("0", 30) + "-" + hash} {
		if a := v.api(v.bearer, "GET", "/revocations?after="+after, ""); a.status != 400 || a.code() != "VALIDATION_ERROR" {
			t.Errorf("after=%s is answered %v, want 400", after, a)
		}
	}
	for _, query := range []string{"wait=0", "wait=31", "wait=1.5", "wait=", "wait=-1", "wait=1s", "since=1", "wait=1&wait=1", "page=1"} {
		if a := v.api(v.bearer, "GET", "/revocations?after="+place+"&"+query, ""); a.status != 400 || a.code() != "VALIDATION_ERROR" {
			t.Errorf("%s is answered %v, want 400", query, a)
		}
	}
	for _, after := range []string{"1-" + hash, seq + "-0000000000000000", "999999-" + hash, "999999999999999999-" + hash} {
		v.want(v.api(v.bearer, "GET", "/revocations?after="+after, ""), 400, "LOG_PLACE_UNKNOWN")
		v.want(v.do("GET", "/api/v1/revocations", "", "Authorization", "Bearer "+v.bearer, "Accept", "text/event-stream", "Last-Event-ID", after), 400, "LOG_PLACE_UNKNOWN")
	}
	if a := v.do("HEAD", "/api/v1/revocations", "", "Authorization", "Bearer "+v.bearer, "Accept", "text/event-stream"); a.status != 200 || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("a HEAD of a stream is answered %v, want the header of an answer", a)
	}
	narrow := v.token(v.id, v.secret, "agents:read agents:write audit:read credentials:write")
	v.want(v.api(narrow, "GET", "/revocations", ""), 403, "FORBIDDEN")
}

// Two services begin with one log, as one does that was restored from a backup of the
// other: what both have is a place of both, and what came then is of its own alone.
func TestReaderLearnsThatTheLogIsAnother(t *testing.T) {
	t.Parallel()
	v, restored := newService(t), newService(t)
	id := v.newAgent("a:b")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
	place := v.feedEnd()
	var shared string
	if err := v.db.QueryRow(t.Context(), `select seq || '-' || left(encode(hash, 'hex'), 16) from audit_events where seq = 1`).Scan(&shared); err != nil {
		t.Fatal(err)
	}
	restored.feed("?after=" + shared)
	ask := func(when string) {
		t.Helper()
		if a := restored.api(restored.bearer, "GET", "/revocations?wait=20&after="+place, ""); a.status != 400 || a.code() != "LOG_PLACE_UNKNOWN" {
			t.Errorf("%s, a place of before is answered %v", when, a)
		}
	}
	ask("while the log is shorter")
	for range 10 {
		restored.newAgent("a:b")
	}
	ask("when it is longer")
	v.feed("?after=" + place)
}

// A follower reads on, whatever happens to those whom it asks, and remembers all.
type follower struct {
	mu   sync.Mutex
	seen []revocation
	log  []servedEvent // of who reads the log
	next string
	lost int // asked in vain
}

func (f *follower) take(p feedPage, log ...servedEvent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen, f.log, f.next = append(f.seen, p.Entries...), append(f.log, log...), p.Next
}

// hasUpTo is the last seq that it has without a gap or a repetition before.
func (f *follower) hasUpTo() (seq int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.log {
		if e.Seq != seq+1 {
			break
		}
		seq = e.Seq
	}
	return seq
}

func (f *follower) has() []revocation {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.seen)
}

// poll asks any of these for revocations, or for the audit log, until ctx ends.
func (f *follower) poll(ctx context.Context, what, bearer string, urls ...string) {
	client := &http.Client{Timeout: 10 * time.Second}
	for ctx.Err() == nil {
		query := url.Values{"wait": {"2"}, "after": {cmp.Or(f.next, "0")}}
		q, err := http.NewRequestWithContext(ctx, "GET", urls[rand.IntN(len(urls))]+"/api/v1/"+what+"?"+query.Encode(), nil)
		if err != nil {
			panic(err)
		}
		q.Header.Set("Authorization", "Bearer "+bearer)
		var p struct {
			feedPage
			Data []servedEvent
		}
		response, err := client.Do(q)
		if err == nil {
			err = json.NewDecoder(response.Body).Decode(&p)
			response.Body.Close()
			if response.StatusCode != 200 {
				err = fmt.Errorf("answered %s", response.Status)
			}
		}
		if err != nil {
			f.lost++
			time.Sleep(10 * time.Millisecond)
			continue
		}
		f.take(p.feedPage, p.Data...)
	}
}

// listen has streams of any of these, one after another.
func (f *follower) listen(ctx context.Context, bearer string, urls ...string) {
	for ctx.Err() == nil {
		var header []string
		if f.next != "" {
			header = []string{"Last-Event-ID", f.next}
		}
		stream, err := openStream(ctx, urls[rand.IntN(len(urls))], bearer, header...)
		if err != nil {
			f.lost++
			time.Sleep(10 * time.Millisecond)
			continue
		}
		for p := range stream.pages {
			f.take(p)
		}
		stream.close()
	}
}

// A cutter cuts off what it can, and remembers what was acknowledged.
type cutter struct {
	agent, credential, secretID string
	acked                       []string
}

func (c *cutter) run(ctx context.Context, v *service, urls ...string) {
	client := &http.Client{Timeout: 10 * time.Second}
	for i := 0; ctx.Err() == nil; i++ {
		token, base := v.tokenOf(c.agent, c.credential, c.secretID, "a:b"), urls[rand.IntN(len(urls))]+"/api/v1"
		method, path, kind, body, what := "POST", "/token/revoke", formType, "token="+token, "token "+readClaims(v.t, token).ID+" false"
		if i%4 == 3 {
			status := []string{"suspended", "active"}[i/4%2]
			method, path, kind, body = "PATCH", "/agents/"+c.agent, "application/json", `{"status":"`+status+`"}`
			what = fmt.Sprintf("agent %s %v", c.agent, status == "active")
		}
		q, err := http.NewRequest(method, base+path, strings.NewReader(body))
		if err != nil {
			panic(err)
		}
		q.Header.Set("Authorization", "Bearer "+v.bearer)
		q.Header.Set("Content-Type", kind)
		response, err := client.Do(q)
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		b, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err == nil && response.StatusCode == 200 && (kind == formType || c.changed(b, what)) {
			c.acked = append(c.acked, what)
		}
	}
}

// changed tells whether the status is another than it was: else, as after an answer that
// was lost, that was no cut.
func (c *cutter) changed(answer []byte, what string) bool {
	for _, before := range slices.Backward(c.acked) {
		if strings.HasPrefix(before, "agent ") {
			return before != what
		}
	}
	return strings.HasSuffix(what, "false")
}

// While two copies cut off as fast as they can, and copies and PostgreSQL are killed, those
// who read on from where they were have in the end what the log has, in its order, and so
// whatever was acknowledged.
func TestFeedStepsOverNothing(t *testing.T) {
	t.Parallel()
	database := newPostgres(t)
	p, q := newPair(t, database.url(), newRedisServer(t).url(), crashLimits...)
	cutting, stop := context.WithCancel(t.Context())
	reading, cancel := context.WithCancel(t.Context())
	defer stop()
	defer cancel()
	var readers, writers sync.WaitGroup
	followers := []*follower{{}, {}, {}, {}}
	all := &follower{}
	readers.Go(func() { all.poll(reading, "audit", p.bearer, p.url, q.url) })
	readers.Go(func() { followers[0].poll(reading, "revocations", p.bearer, p.url, q.url) })
	readers.Go(func() { followers[1].poll(reading, "revocations", p.bearer, p.url) })
	readers.Go(func() { followers[2].listen(reading, p.bearer, p.url, q.url) })
	readers.Go(func() { followers[3].listen(reading, p.bearer, q.url) })
	var cutters []*cutter
	signer := *p.service // for a copy that is started again has another port in its own
	signer.env = maps.Clone(p.env)
	for range 8 {
		c := &cutter{agent: p.newAgent("a:b"), credential: newID()}
		c.secretID = p.secretOf(c.agent, c.credential)
		cutters = append(cutters, c)
		writers.Go(func() { c.run(cutting, &signer, p.url, q.url) })
	}
	for i := range rounds(8, 80) {
		time.Sleep(time.Duration(200+rand.IntN(500)) * time.Millisecond)
		switch i % 4 {
		case 0:
			p.kill()
			p.start()
		case 1:
			q.kill()
			q.start()
		case 2:
			database.kill()
			database.start()
		case 3:
			p.signal(syscall.SIGTERM)
			p.process.wait()
			p.start()
		}
	}
	before := p.count(`select count(*) from audit_events`)
	p.eventually("it goes on", func() bool { return p.count(`select count(*) from audit_events`) > before+1000 })
	stop()
	writers.Wait()
	log := p.inLog()
	for i, f := range followers {
		p.eventually(fmt.Sprintf("reader %d has all", i), func() bool { return len(f.has()) >= len(log) })
	}
	head := int64(p.count(`select max(seq) from audit_events`))
	p.eventually("who reads the log has all of it, each event once", func() bool { return all.hasUpTo() >= head })
	cancel()
	readers.Wait()
	lost := 0
	for i, f := range followers {
		if lost += f.lost; !slices.Equal(f.seen, log) {
			t.Errorf("reader %d has %d entries that are not the %d of the log", i, len(f.seen), len(log))
		}
	}
	has, acked := map[string]int{}, 0
	for _, x := range log {
		has[x.String()]++
	}
	for _, c := range cutters {
		for _, what := range c.acked {
			acked++
			if has[what]--; has[what] < 0 {
				t.Errorf("%s was acknowledged, and is not there as often", what)
			}
		}
	}
	t.Logf("%d entries, %d acknowledged; readers asked %d times in vain", len(log), acked, lost)
	if acked < 1000 || lost == 0 {
		t.Errorf("%d were acknowledged, and readers asked %d times in vain: that tries nothing", acked, lost)
	}
}

func (p *program) gauge(name string) (n int) {
	p.t.Helper()
	response, err := http.Get("http://" + p.log.metrics() + "/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "\n"+name+" ")
	if _, err := fmt.Sscan(after, &n); err != nil {
		p.t.Fatalf("the metric %s: %v", name, err)
	}
	return n
}

func (p *program) reading(n int) func() bool {
	return func() bool { return p.gauge("agentidp_feed_readers") == n }
}

// newFeeder has a pool of 4, and metrics.
func newFeeder(t *testing.T, env ...string) *program {
	t.Helper()
	database, err := url.Parse(newDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	q := database.Query()
	q.Set("pool_max_conns", "4")
	database.RawQuery = q.Encode()
	return newServiceProgram(t, append([]string{"DATABASE_URL", database.String(), "METRICS_ADDR", "127.0.0.1:0"}, env...)...)
}

// 200 readers hold nothing that others need, and learn of it together.
func TestManyReadersWaitForNothingOfOthers(t *testing.T) {
	t.Parallel()
	p := newFeeder(t)
	id := p.newAgent("a:b")
	at := p.feedEnd()
	var answers []func() answer
	var streams []*feedStream
	for i := range 10 { // clients, each with less than half of what one may have, since two may share that
		reader, secret := p.newClient(tokensRead)
		bearer := p.token(reader, secret, "")
		for range 20 {
			if i < 4 {
				answers = append(answers, p.waits(bearer, "?wait=25&after="+at))
			} else {
				streams = append(streams, p.stream(bearer, "Last-Event-ID", at))
			}
		}
	}
	p.eventually("200 wait", p.reading(200))
	if n := p.gauge("agentidp_http_requests_in_flight"); n != 0 {
		t.Errorf("%d of them are among the requests in flight, want none", n)
	}
	if n := p.count(`select count(*) from pg_stat_activity where datname = current_database() and state <> 'idle' and pid <> pg_backend_pid()`); n > 3 {
		t.Errorf("%d connections are busy, want hardly any", n)
	}
	a := p.want(p.api(p.bearer, "GET", "/revocations?wait=1&after="+at, ""), 503, "SERVICE_UNAVAILABLE")
	if a.header.Get("Retry-After") != "1" {
		t.Errorf("the next is answered without Retry-After: %v", a)
	}
	if p.feed("?after=" + at); p.gauge("agentidp_feed_readers") != 200 {
		t.Error("who doesn't wait has ended others, or they are not counted right")
	}
	cpu, begun := p.cpu(t), time.Now()
	for range 20 {
		p.want(p.api(p.bearer, "GET", "/agents/"+id, ""), 200, "")
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("200 readers take %v of %v", p.cpu(t)-cpu, time.Since(begun))
	begun = time.Now()
	p.want(p.api(p.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
	for _, wait := range answers {
		if got := readFeed(t, wait()); len(got.Entries) != 1 || got.Entries[0].ID != id {
			t.Fatalf("a reader gets %+v, want the agent", got)
		}
	}
	for _, stream := range streams {
		if got := stream.next(t); len(got.Entries) != 1 || got.Entries[0].ID != id {
			t.Fatalf("a stream has %+v, want the agent", got)
		}
	}
	t.Logf("200 readers know after %v", time.Since(begun))
	p.eventually("the streams alone go on", p.reading(len(streams)))
	for _, stream := range streams {
		stream.close()
	}
	p.eventually("who has gone is gone", p.reading(0))

	// Also before it would be written to.
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET /api/v1/revocations?wait=30&after=%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", p.feedEnd(), p.bearer)
	p.eventually("it waits", p.reading(1))
	conn.Close()
	begun = time.Now()
	p.eventually("it is gone", p.reading(0))
	if took := time.Since(begun); took > 15*time.Second {
		t.Errorf("who has gone waits for %v, want no longer", took)
	}
}

// What one client has waiting is bounded, and others wait beside it.
func TestReadersOfOneClientLeaveRoom(t *testing.T) {
	t.Parallel()
	p := newFeeder(t)
	at := p.feedEnd()
	reader, secret := p.newClient(tokensRead, auditRead)
	bearer, streams := p.token(reader, secret, ""), []*feedStream{}
	for range 50 {
		streams = append(streams, p.stream(bearer, "Last-Event-ID", at))
	}
	p.want(p.api(bearer, "GET", "/revocations?wait=1&after="+at, ""), 503, "SERVICE_UNAVAILABLE")
	for range 6 { // of which one may share the lane
		other, secret := p.newClient(tokensRead)
		if p.api(p.token(other, secret, ""), "GET", "/revocations?wait=1&after="+at, "").status == 200 {
			streams[0].close()
			p.eventually("it may again", func() bool { return p.api(bearer, "GET", "/revocations?wait=1&after="+at, "").status == 200 })
			return
		}
	}
	t.Error("six others may not wait beside the readers of one client, want that they do")
}

// A reader that takes nothing is left, and costs nothing any more.
func TestReaderThatTakesNothingIsLeft(t *testing.T) {
	t.Parallel()
	p := newFeeder(t)
	const n = 60_000
	tx, err := p.db.Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), `
			insert into audit_events
			select gen_random_uuid(), head + i, now(), gen_random_uuid(), null, 'agent.suspended', 'success', '', '', '{}', sha256(i::text::bytea), sha256((i + 1)::text::bytea)
			from (select max(seq) as head from audit_events) as head, generate_series(1, $1::int) as i`, n)
	}
	if err == nil {
		err = tx.Commit(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	p.exec(`analyze audit_events`) // which PostgreSQL does within a minute; until then it has plans for a small log
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetReadBuffer(4096)
	fmt.Fprintf(conn, "GET /api/v1/revocations HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\nAuthorization: Bearer %s\r\n\r\n", p.bearer)
	p.eventually("it is there", p.reading(1))
	begun := time.Now()
	p.eventually("it is left", p.reading(0))
	if took := time.Since(begun); took < 5*time.Second || took > 40*time.Second {
		t.Errorf("it is left after %v, want about 10 s", took)
	}
	// All of that is read page by page, and by a stream.
	begun = time.Now()
	page, pages, entries := p.feed(""), 1, 0
	for entries = len(page.Entries); page.More; entries += len(page.Entries) {
		page = p.feed("?wait=20&after=" + page.Next)
		pages++
	}
	if entries != n || pages != n/1000+1 {
		t.Errorf("a reader gets %d entries on %d pages, want %d on %d", entries, pages, n, n/1000+1)
	}
	t.Logf("%d pages take %v", pages, time.Since(begun))
	stream := p.stream(p.bearer)
	seen := map[string]bool{}
	for entries = 0; entries < n; {
		for _, e := range stream.next(t).Entries {
			entries++
			seen[e.ID] = true
		}
	}
	if entries != n || len(seen) != n {
		t.Errorf("a stream has %d entries of %d agents, want %d", entries, len(seen), n)
	}

	// They take turns, and nobody waits for that of all others where PostgreSQL hangs.
	env := map[string]string{"DATABASE_URL": p.env["DATABASE_URL"]}
	proxy := proxyDatabase(t, env)
	w := p.another("DATABASE_URL", env["DATABASE_URL"])
	var streams []*feedStream
	for range 8 {
		streams = append(streams, w.stream(p.bearer))
	}
	begun = time.Now()
	proxy.set(swallowing)
	for _, stream := range streams {
		stream.ended(t, time.Minute)
	}
	if took := time.Since(begun); took > 25*time.Second {
		t.Errorf("streams that have much to read end %v after PostgreSQL hangs, want about 15 s at most", took)
	}
}

// A copy that stops ends all who wait at once, with a place from which another goes on.
func TestReadersAreToldWhenACopyStops(t *testing.T) {
	t.Parallel()
	p := newFeeder(t)
	q := p.another()
	at := p.feedEnd()
	got := p.waits(p.bearer, "?wait=25&after="+at)
	stream := p.stream(p.bearer, "Last-Event-ID", at)
	p.eventually("both wait", p.reading(2))
	begun := time.Now()
	p.signal(syscall.SIGTERM)
	page := readFeed(t, got())
	last := stream.ended(t, 20*time.Second)
	if took := time.Since(begun); took > 10*time.Second { // it would be 25 s and more
		t.Errorf("they are told after %v, want at once", took)
	}
	if err := p.wait(); err != nil {
		t.Errorf("the copy ends with %v", err)
	}
	id := q.newAgent("a:b")
	q.want(q.api(q.bearer, "DELETE", "/agents/"+id, ""), 204, "")
	for _, place := range []string{page.Next, last} {
		if got := q.feed("?after=" + place).Entries; len(got) != 1 || got[0].ID != id {
			t.Errorf("from %q another copy goes on with %v, want the agent", place, got)
		}
	}
}

// Without PostgreSQL nobody is told that there is nothing.
func TestReadersAreNotCalmedWithoutPostgreSQL(t *testing.T) {
	t.Parallel()
	v := newService(t)
	env := map[string]string{"DATABASE_URL": v.env["DATABASE_URL"]}
	proxy := proxyDatabase(t, env)
	w := v.another("DATABASE_URL", env["DATABASE_URL"])
	for mode, fault := range map[string][2]func(){
		"it refuses": {func() { proxy.set(refusing) }, func() { proxy.set(passing) }},
		"it hangs":   {func() { proxy.set(swallowing) }, func() { proxy.set(passing) }},
		"the log can't be read": {func() { v.exec(`alter table audit_events rename to elsewhere`) },
			func() { v.exec(`alter table elsewhere rename to audit_events`) }},
	} {
		at := v.feedEnd()
		got := w.waits(w.bearer, "?wait=25&after="+at)
		stream := w.stream(w.bearer, "Last-Event-ID", at)
		time.Sleep(time.Second)
		begun := time.Now()
		fault[0]()
		if a := got(); a.status != 503 {
			t.Errorf("%s: who waits is answered %v, want 503", mode, a)
		}
		stream.ended(t, 20*time.Second)
		if took := time.Since(begun); took > 15*time.Second {
			t.Errorf("%s: they are told after %v", mode, took)
		}
		if a := w.api(w.bearer, "GET", "/revocations?after="+at, ""); a.status != 503 {
			t.Errorf("%s: who comes then is answered %v, want 503", mode, a)
		}
		fault[1]()
		v.eventually("it has healed", func() bool { return w.api(w.bearer, "GET", "/revocations?after="+at, "").status == 200 })
	}
}

// Who is cut off while it waits is told that, and not what was cut off.
func TestReaderThatIsCutOffGetsNothing(t *testing.T) {
	t.Parallel()
	p := newCutter(t, "METRICS_ADDR", "127.0.0.1:0")
	for _, c := range cuts {
		a := p.newActor()
		at := p.feedEnd()
		got := p.waits(a.bearer, "?wait=25&after="+at)
		stream := p.stream(a.bearer, "Last-Event-ID", at)
		p.eventually("both wait", p.reading(2))
		if done := c.do(p, p.bearer, a); !done.done() {
			t.Fatalf("%s is answered %v", c.name, done)
		}
		if b := got(); b.status != 401 || b.header.Get("WWW-Authenticate") == "" {
			t.Errorf("%s: who waits is answered %v, want 401", c.name, b)
		}
		if last := stream.ended(t, 20*time.Second); last != "" && last != at {
			t.Errorf("%s: its stream goes on from %s to %s", c.name, at, last)
		}
	}
	// Also within less than a tenth of a second: it is looked every 300 ms by the clock.
	id, secret := p.newClient(tokensRead)
	bearerOf := p.token(id, secret, "")
	for range 10 {
		at := p.feedEnd()
		time.Sleep(500*time.Millisecond - time.Duration(time.Now().UnixNano())%(300*time.Millisecond))
		got := p.waits(bearerOf, "?wait=25&after="+at)
		p.eventually("it waits", p.reading(1))
		p.want(p.api(p.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
		if b := got(); b.status != 401 {
			t.Errorf("who is cut off just before it is looked is answered %v, want 401", b)
		}
		p.want(p.api(p.bearer, "PATCH", "/agents/"+id, `{"status":"active"}`), 200, "")
	}
	// And who has expired.
	p.want(p.api(p.bearer, "PATCH", "/agents/"+id, `{"tokenTtl":4}`), 200, "")
	at := p.feedEnd()
	bearer := p.token(id, secret, "")
	stream := p.stream(bearer, "Last-Event-ID", at)
	begun := time.Now()
	if got := readFeed(t, p.api(bearer, "GET", "/revocations?wait=25&after="+at, "")); len(got.Entries) != 0 || time.Since(begun) > 15*time.Second {
		t.Errorf("who expires while it waits gets %+v after %s, want nothing, then", got, time.Since(begun))
	}
	stream.ended(t, 30*time.Second)
}

// A token ends with the key that has signed it, and so does what it reads.
func TestReadersEndWithTheKeyOfTheirToken(t *testing.T) {
	t.Parallel()
	p := newFeeder(t)
	at := p.feedEnd()
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(p.env["JWT_PRIVATE_KEY"]), 0o600); err != nil {
		t.Fatal(err)
	}
	q := p.another("METRICS_ADDR", "127.0.0.1:0", "JWT_PRIVATE_KEY", "", "JWT_PRIVATE_KEY_FILE", key)
	got := q.waits(p.bearer, "?wait=25&after="+at)
	stream := q.stream(p.bearer, "Last-Event-ID", at)
	q.eventually("both wait", q.reading(2))
	begun := time.Now()
	if err := os.WriteFile(key, []byte(secondKey()), 0o600); err != nil {
		t.Fatal(err)
	}
	q.signal(syscall.SIGHUP)
	stream.ended(t, 20*time.Second)
	if a := got(); time.Since(begun) > 20*time.Second || a.status != 401 && len(readFeed(t, a).Entries) > 0 {
		t.Errorf("who waits is answered %v after %s, want nothing, then", a, time.Since(begun))
	}
	q.want(q.api(p.bearer, "GET", "/revocations?after="+at, ""), 401, "UNAUTHORIZED")
}

// Waiting outlives the times that other requests have, and a stream says that it is there.
func TestWaitingIsNotCutShort(t *testing.T) {
	t.Parallel()
	v := newService(t)
	at := v.feedEnd()
	stream := v.stream(v.bearer, "Last-Event-ID", at)
	begun := time.Now()
	got := v.feed("?wait=25&after=" + at)
	if took := time.Since(begun); len(got.Entries) != 0 || got.More || took < 25*time.Second {
		t.Errorf("after %v a reader gets %+v, want nothing after 25 s", took, got)
	}
	v.want(v.api(v.bearer, "GET", "/revocations?after="+got.Next, ""), 200, "")
	beats := 0
	for len(stream.pages) > 0 {
		if p, open := <-stream.pages; open && len(p.Entries) == 0 && p.Next != "" {
			beats++
		}
	}
	if beats < 3 { // the first page, and two behind it
		t.Errorf("in that time a stream has said %d times that it is there, want 3", beats)
	}
	id := v.newAgent("a:b")
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 204, "")
	if p := stream.next(t); len(p.Entries) != 1 || p.Entries[0].ID != id {
		t.Errorf("then the stream has %+v, want the agent", p)
	}
}

type logPage struct {
	Data []servedEvent
	Next string
}

func (v *service) readOn(query string) (p logPage) {
	v.t.Helper()
	a := v.want(v.api(v.bearer, "GET", "/audit?after="+query, ""), 200, "")
	if err := json.Unmarshal([]byte(a.raw), &p); err != nil {
		v.t.Fatal(err)
	}
	return p
}

// The log is read on from any place, whole and as it is listed.
func TestLogIsReadOn(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	for range 30 {
		v.newAgent("a:b")
	}
	total := v.count(`select max(seq) from audit_events`)
	var raw []string
	place, pages := "0", 0
	for seq := 1; seq <= total; pages++ {
		a := v.want(v.api(v.bearer, "GET", "/audit?limit=7&after="+place, ""), 200, "")
		var p struct {
			Data []json.RawMessage
			Next string
		}
		if err := json.Unmarshal([]byte(a.raw), &p); err != nil || len(p.Data) != min(7, total-seq+1) {
			t.Fatalf("behind %s are %d events (%v), want 7 or the rest", place, len(p.Data), err)
		}
		for _, e := range p.Data {
			raw = append(raw, string(e))
			if !strings.Contains(string(e), fmt.Sprintf(`"seq":%d,`, seq)) {
				t.Fatalf("behind %s is %s, want seq %d", place, e, seq)
			}
			seq++
		}
		place = p.Next
	}
	out, err := command(t.Context(), v.env, testLog, "audit-export")
	if lines := strings.Split(out, "\n"); err != nil || !slices.Equal(lines[:len(raw)], raw) {
		t.Errorf("read on it is not what is exported (%v)", err)
	}
	if got := v.readOn(fmt.Sprint(total - 1)); len(got.Data) != 1 || got.Next != place {
		t.Errorf("behind a plain seq is %+v, want the last", got)
	}
	if got := v.readOn("0"); len(got.Data) != min(total, 100) {
		t.Errorf("without a limit there are %d, want %d", len(got.Data), min(total, 100))
	}

	// At the end it waits, on another copy too, for whatever comes.
	if got := v.readOn(place); len(got.Data) != 0 || got.Next != place {
		t.Errorf("at the end is %+v, want nothing and the same place", got)
	}
	begun := time.Now()
	if got := v.readOn(place + "&wait=2"); len(got.Data) != 0 || got.Next != place || time.Since(begun) < 2*time.Second {
		t.Errorf("after %s there is %+v, want nothing after 2 s", time.Since(begun), got)
	}
	answered := make(chan answer, 1)
	go func() {
		defer close(answered)
		answered <- w.api(w.bearer, "GET", "/audit?wait=30&after="+place, "")
	}()
	id, secret := v.newClient("a:b")
	v.token(id, secret, "")
	a := <-answered
	var p logPage
	if err := json.Unmarshal([]byte(a.raw), &p); err != nil || len(p.Data) == 0 || p.Data[0].Action != agentCreated || *p.Data[0].AgentID != id {
		t.Errorf("who waits is answered %v, want the new agent", a)
	}
	for seq := p.Data[0].Seq; len(p.Data) > 0; p = v.readOn(p.Next) {
		for _, e := range p.Data {
			if e.Seq != seq {
				t.Errorf("behind it comes %d, want %d", e.Seq, seq)
			}
			seq++
		}
	}

	// Who looks for something has the other way, and none may have what isn't there.
	_, hash, _ := strings.Cut(place, "-")
	for _, query := range []string{"", "x", "-1", "00", "1-", "1-" + hash[1:], place + "&limit=0", place + "&limit=1001", place + "&wait=31", place + "&wait=0",
		place + "&page=1", place + "&agentId=" + id, place + "&cursor=x", place + "&fromDate=2026-01-01", place + "&after=1", place + "&after=" + place} {
		if a := v.api(v.bearer, "GET", "/audit?after="+query, ""); a.status != 400 || a.code() != "VALIDATION_ERROR" {
			t.Errorf("after=%s is answered %v, want 400", query, a)
		}
	}
	v.want(v.api(v.bearer, "GET", "/audit?wait=1", ""), 400, "VALIDATION_ERROR")
	for _, after := range []string{"1-" + hash, "999999", "999999-" + hash} {
		v.want(v.api(v.bearer, "GET", "/audit?wait=1&after="+after, ""), 400, "LOG_PLACE_UNKNOWN")
	}
	narrow := v.token(v.id, v.secret, "agents:read agents:write tokens:read credentials:write")
	v.want(v.api(narrow, "GET", "/audit?after=0", ""), 403, "FORBIDDEN")

	// What is too old to be served is not left out unsaid.
	var history []servedEvent
	for range 10 {
		history = append(history, forgeEvent(history, time.Now().AddDate(0, 0, -100), actions[0]))
	}
	old := newService(t, "DATABASE_URL", newHistory(t, "", history))
	for _, query := range []string{"0", "10"} {
		if got := old.readOn(query); got.Data[0].Seq != 11 {
			t.Errorf("behind %s is %d first, want 11", query, got.Data[0].Seq)
		}
	}
	old.want(old.api(old.bearer, "GET", "/audit?after=9", ""), 400, "RETENTION_WINDOW_EXCEEDED")
}
