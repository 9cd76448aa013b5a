package test

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Two copies of the real program, beside a PostgreSQL and a Redis that the
// tests kill, stop, restart, flush, fill, slow down and make read-only. No
// fault may become a 200, a 401, active:true or active:false.

// longest is by when everything is answered: the 5 s of a request, and as much
// again for a busy machine.
const longest = 10 * time.Second

// An ordeal is two copies beside stores of their own.
type ordeal struct {
	*program // the first copy
	copies   []*program
	postgres *postgresServer
	store    *redisServer
	calls    []call

	changing chan string // agents that nobody changes just now

	credentialID, secretID string // of the tokens that are revoked

	mu   sync.Mutex
	done acknowledged
}

// What was acknowledged has to be there ever after.
type acknowledged struct {
	requests    []string          // ids of requests that were answered with 2xx and leave an event
	revoked     []string          // tokens
	credentials []string          // their ids
	versions    map[string]string // the last one that each agent was given
}

// A call is one kind of request. Column is where its row has what it answers.
type call struct {
	column, name string
	send         func(p *program) answer
}

// columns are the kinds of requests, in the order of every row of outcomes:
// a status, or of an introspection what active is, or what health says.
var columns = strings.Fields("token bearer revoked active inactive revoke change credential jwks livez health")

// asWritten is an answer as rows have it.
func asWritten(a answer) string {
	if active, ok := a.body["active"].(bool); ok && a.status == 200 {
		return fmt.Sprint(active)
	}
	if a.body["services"] != nil {
		return a.text("status")
	}
	return fmt.Sprint(a.status)
}

func newOrdeal(t *testing.T, env ...string) *ordeal {
	t.Helper()
	o := &ordeal{postgres: newPostgres(t), store: newRedisServer(t)}
	o.done.versions, o.changing = map[string]string{}, make(chan string, 4)
	// One copy counts for limits that are never reached, which a full Redis
	// refuses. The other only reads, and goes on with what it finds.
	o.program = newProgram(t, o.postgres.url(), o.store.url(), append([]string{
		"RATE_LIMIT_PER_MINUTE", "1000000", "MONTHLY_TOKEN_LIMIT", "1000000000", "MAX_AGENTS", "100000"}, env...)...)
	o.copies = []*program{o.program, o.another("RATE_LIMIT_PER_MINUTE", "0", "MONTHLY_TOKEN_LIMIT", "0")}
	o.prepare()
	return o
}

// prepare makes what the calls are about.
func (o *ordeal) prepare() {
	o.t.Helper()
	id, secret := o.newClient("resumes:read")
	token, dead := o.token(id, secret, ""), o.token(id, secret, "")
	o.want(o.form(id, secret, "/revoke", "token="+dead), 200, "")
	o.credentialID = newID()
	o.secretID = o.secretOf(id, o.credentialID)
	credentialID, other := o.newCredential(id)
	ofCredential := o.token(id, other, "")
	o.want(o.api(o.bearer, "DELETE", "/agents/"+id+"/credentials/"+credentialID, ""), 204, "")
	suspended := o.newAgent("resumes:read")
	ofSuspended := o.bearerOf(suspended, "resumes:read")
	o.want(o.api(o.bearer, "PATCH", "/agents/"+suspended, `{"status":"suspended"}`), 200, "")
	for range cap(o.changing) {
		o.changing <- o.newAgent("resumes:read")
	}
	for _, p := range o.copies {
		p.token(id, secret, "") // once with bcrypt
		p.token(o.id, o.secret, "")
	}
	read := func(of, token string) func(*program) answer {
		return func(p *program) answer { return p.api(token, "GET", "/agents/"+of, "") }
	}
	o.calls = []call{
		{"token", "a token", func(p *program) answer {
			return o.note(p.form(id, secret, "", "grant_type=client_credentials"))
		}},
		{"bearer", "a request", read(id, token)},
		{"revoked", "a request with a revoked token", read(id, dead)},
		{"revoked", "a request with the token that was revoked last", func(p *program) answer {
			o.mu.Lock()
			token := append([]string{dead}, o.done.revoked...)[len(o.done.revoked)]
			o.mu.Unlock()
			return p.api(token, "GET", "/agents/"+id, "")
		}},
		{"revoked", "a request with a token of a revoked credential", read(id, ofCredential)},
		{"revoked", "a request with a token of a suspended agent", read(suspended, ofSuspended)},
		{"active", "introspection", func(p *program) answer {
			return o.note(p.form(o.id, o.secret, "/introspect", "token="+token))
		}},
		{"active", "introspection by bearer", func(p *program) answer {
			return o.note(p.bearerForm(o.bearer, "/introspect", "token="+token))
		}},
		{"inactive", "introspection of a revoked token", func(p *program) answer {
			return o.note(p.form(o.id, o.secret, "/introspect", "token="+dead))
		}},
		{"inactive", "introspection by bearer of a suspended agent's token", func(p *program) answer {
			return o.note(p.bearerForm(o.bearer, "/introspect", "token="+ofSuspended))
		}},
		{"revoke", "revocation", func(p *program) answer { return o.revoke(p, id) }},
		{"change", "a change", o.change},
		{"credential", "a new credential", func(p *program) answer {
			a := o.note(p.api(o.bearer, "POST", "/agents/"+id+"/credentials", "{}"))
			if a.status == 201 {
				o.mu.Lock()
				defer o.mu.Unlock()
				o.done.credentials = append(o.done.credentials, a.text("credentialId"))
			}
			return a
		}},
		{"jwks", "the keys", func(p *program) answer { return p.do("GET", "/.well-known/jwks.json", "") }},
		{"livez", "life", func(p *program) answer { return p.do("GET", "/livez", "") }},
		{"health", "health", func(p *program) answer { return p.do("GET", "/health", "") }},
	}
}

// note remembers what was acknowledged.
func (o *ordeal) note(a answer) answer {
	if a.status == 200 || a.status == 201 {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.done.requests = append(o.done.requests, a.header.Get("X-Request-Id"))
	}
	return a
}

// revoke revokes a new token through one copy, and from its answer on every
// copy has to refuse it.
func (o *ordeal) revoke(p *program, id string) answer {
	token := o.tokenOf(id, o.credentialID, o.secretID, "resumes:read")
	a := o.note(p.bearerForm(o.bearer, "/revoke", "token="+token))
	if a.status == 200 {
		for i, q := range o.copies {
			if got := q.api(token, "GET", "/agents/"+id, ""); got.status != 401 && got.status != 503 {
				o.t.Errorf("a token that was just revoked is answered by copy %d with %v, want 401 or 503", i+1, got)
			}
		}
		o.mu.Lock()
		defer o.mu.Unlock()
		o.done.revoked = append(o.done.revoked, token)
	}
	return a
}

// change gives an agent its next version.
func (o *ordeal) change(p *program) answer {
	id := <-o.changing
	defer func() { o.changing <- id }()
	version := fmt.Sprintf("1.0.%d", time.Now().UnixNano())
	a := o.note(p.api(o.bearer, "PATCH", "/agents/"+id, `{"version":"`+version+`"}`))
	if a.status == 200 {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.done.versions[id] = version
	}
	return a
}

// judge sends a call and says what is wrong with the answer.
func (o *ordeal) judge(when string, c call, p *program, allowed ...string) (got string) {
	begun := time.Now()
	a := c.send(p)
	got = asWritten(a)
	if took := time.Since(begun); took > longest {
		o.t.Errorf("%s: %s took %s", when, c.name, took)
	}
	if !slices.Contains(allowed, got) {
		o.t.Errorf("%s: %s = %v, want %v; %s", when, c.name, a, allowed, p.why(a))
	}
	if a.status == 503 && a.header.Get("Retry-After") == "" {
		o.t.Errorf("%s: %s = %v without Retry-After", when, c.name, a)
	}
	return got
}

// why returns what the log says of an answer.
func (p *program) why(a answer) string {
	var text strings.Builder
	for line := range strings.Lines(p.log.String()) {
		if strings.Contains(line, `"requestId":"`+a.header.Get("X-Request-Id")+`"`) {
			text.WriteString(line)
		}
	}
	return text.String()
}

// check sends every call to both copies at once and wants the outcomes of a
// row, and nothing else.
func (o *ordeal) check(when string, row []string, but ...string) {
	o.t.Helper()
	var group sync.WaitGroup
	for i, p := range o.copies {
		for _, c := range o.calls {
			if !slices.Contains(but, c.column) {
				group.Go(func() {
					o.judge(fmt.Sprintf("%s, copy %d", when, i+1), c, p, row[slices.Index(columns, c.column)])
				})
			}
		}
	}
	group.Wait()
}

// storm sends every call to both copies until it is stopped, and wants an
// outcome of one of the rows. It returns how often there was which.
func (o *ordeal) storm(when string, rows ...[]string) (stop func() map[string]int) {
	over := make(chan struct{})
	var group sync.WaitGroup
	var mu sync.Mutex
	seen := map[string]int{}
	for i, p := range o.copies {
		for _, c := range o.calls {
			var allowed []string
			for _, row := range rows {
				allowed = append(allowed, row[slices.Index(columns, c.column)])
			}
			pause := 300 * time.Millisecond // or the storm would be the fault, on a machine that has more to do
			if c.column == "credential" {   // costs bcrypt
				pause = time.Second
			}
			group.Go(func() {
				for {
					got := o.judge(fmt.Sprintf("around %s, copy %d", when, i+1), c, p, allowed...)
					mu.Lock()
					seen[c.name+": "+got]++
					mu.Unlock()
					select {
					case <-over:
						return
					case <-time.After(pause):
					}
				}
			})
		}
	}
	return sync.OnceValue(func() map[string]int {
		close(over)
		group.Wait()
		return seen
	})
}

// steadily waits until something has been so for a while, since what was begun before may still end otherwise.
func (o *ordeal) steadily(what string, is func() bool) {
	o.t.Helper()
	var since time.Time
	o.eventually(what, func() bool {
		if !is() {
			since = time.Time{}
		} else if since.IsZero() {
			since = time.Now()
		}
		return !since.IsZero() && time.Since(since) > 300*time.Millisecond
	})
}

// well wants everything to be well again, within seconds and by itself.
func (o *ordeal) well(when string) {
	o.t.Helper()
	for i, p := range o.copies {
		begun := time.Now()
		o.steadily(fmt.Sprintf("copy %d is well after %s", i+1, when), func() bool {
			return !slices.ContainsFunc(o.calls, func(c call) bool {
				want := allWell[slices.Index(columns, c.column)]
				return (c.column == "bearer" || c.column == "health") && asWritten(c.send(p)) != want
			})
		})
		if took := time.Since(begun); took > longest {
			o.t.Errorf("copy %d was well only %s after %s", i+1, took, when)
		}
		select {
		case <-p.exited:
			o.t.Errorf("copy %d ended: %v", i+1, p.err)
		default:
		}
	}
	o.check("after "+when, allWell, "health") // which was so for a while, and may not be under all of these at once
}

// verify looks for everything that was acknowledged, in PostgreSQL and on both
// copies.
func (o *ordeal) verify(when string) {
	o.t.Helper()
	o.db.Reset() // its connections may be to a PostgreSQL that is no more
	o.mu.Lock()
	defer o.mu.Unlock()
	lost := func(what, sql string, ids []string) {
		o.t.Helper()
		var n int
		if err := o.db.QueryRow(context.Background(), `
			select count(*)
			from unnest($1::text[]) as ids(id)
			where not exists (`+sql+`)`, ids).Scan(&n); err != nil {
			o.t.Error(err)
		}
		if n > 0 {
			o.t.Errorf("%s: %d of %d acknowledged %s are lost", when, n, len(ids), what)
		}
	}
	lost("requests", `select from audit_events where metadata->>'requestId' = id and outcome = 'success'`, o.done.requests)
	lost("credentials", `select from credentials where credential_id = id::uuid and status = 'active'`, o.done.credentials)
	var revoked []string
	for _, token := range o.done.revoked {
		revoked = append(revoked, readClaims(o.t, token).ID)
	}
	lost("revocations", `select from token_revocations r where r.jti = ids.id::uuid`, revoked)
	for id, version := range o.done.versions {
		var got string
		if err := o.db.QueryRow(context.Background(), `select version from agents where agent_id = $1`, id).Scan(&got); err != nil || got < version {
			o.t.Errorf("%s: an agent has version %s, %v, want %s, which was acknowledged, or a later one", when, got, err, version)
		}
	}
	for _, p := range o.copies {
		for _, token := range o.done.revoked {
			if a := p.api(token, "GET", "/agents/"+readClaims(o.t, token).Subject, ""); a.status != 401 {
				o.t.Errorf("%s: what was revoked is answered with %v, want 401", when, a)
			}
		}
	}
	if len(o.done.requests) == 0 || len(revoked) == 0 || len(o.done.credentials) == 0 || len(o.done.versions) == 0 {
		o.t.Errorf("%s: too little was acknowledged to tell: %+v", when, o.done)
	}
	if out := o.command("verify-audit"); !strings.HasPrefix(out, "verified: ") {
		o.t.Errorf("%s: verify-audit printed %q", when, out)
	}
	o.done = acknowledged{versions: map[string]string{}}
}

// freeze stops a process with all that it has started. What it was just
// starting at the first time is there at the second.
func freeze(p *process) {
	p.hang()
	p.hang()
}

// throb makes a process slow: it stops and runs in turns until the end.
func throb(p *process, stopped, running time.Duration) (end func()) {
	over, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			freeze(p)
			time.Sleep(stopped)
			p.resume()
			select {
			case <-over:
				return
			case <-time.After(running):
			}
		}
	}()
	return func() { close(over); <-ended }
}

// crash is kill -9 of a process and of all that it has started, down to the
// last one: PostgreSQL does not start beside what is left of another.
func crash(p *process) {
	freeze(p)
	pids := p.family()
	p.kill()
	for _, pid := range pids {
		for {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil || strings.Contains(string(stat), ") Z ") {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// A fault, and what is answered while it lasts. Where end is nil, it is over at
// once, and all has to be well from then on.
type fault struct {
	name       string
	during     []string // outcomes
	begin, end func()
	around     []string // further outcomes of the time in which it begins and ends
}

// Rows of outcomes, by columns.
var (
	//                        token bearer revoked active inactive revoke change credential jwks livez health
	allWell = strings.Fields("200   200    401     true   false    200    200    201        200  200   ok")
	noRedis = strings.Fields("200   200    401     true   false    200    200    201        200  200   degraded")
	nothing = strings.Fields("503   503    503     503    503      503    503    503        200  200   503")
	noWrite = strings.Fields("503   200    401     503    503      503    503    503        200  200   503")
	unready = strings.Fields("200   200    401     true   false    200    200    201        200  200   503") // for a moment
)

// suffer lets each fault happen under a storm of requests.
func (o *ordeal) suffer(t *testing.T, faults []fault) {
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			for _, p := range o.copies {
				p.t = t
			}
			at := func(column string) string { return f.during[slices.Index(columns, column)] }
			rows := [][]string{allWell, f.during}
			if f.around != nil {
				rows = append(rows, f.around)
			}
			stop := o.storm(f.name, rows...)
			defer stop()
			var once sync.Once // which is done also where it fails the test, as sync.OnceFunc is not
			end := func() {
				if f.end != nil {
					once.Do(f.end)
				}
			}
			defer end()
			f.begin()
			if !slices.Contains(rows[len(rows)-1][:len(columns)-1], "503") { // all but health is right from the first moment on
				o.check("just when "+f.name, f.during, "health", "revoke")
			}
			if f.end != nil {
				for _, p := range o.copies {
					o.steadily("health says "+at("health"), func() bool { return asWritten(p.do("GET", "/health", "")) == at("health") })
				}
				var but []string
				if f.around != nil { // health may change its mind
					but = []string{"health"}
				}
				o.check("while "+f.name, f.during, but...)
				end()
			}
			o.well("when " + f.name)
			seen := stop()
			if at("token") == "503" && seen["a token: 503"] == 0 || seen["a token: 200"] == 0 {
				t.Errorf("the storm saw nothing of it: %v", seen)
			}
			o.verify("after " + f.name)
		})
	}
}

// set changes the configuration of Redis.
func (r *redisServer) set(pairs ...string) {
	r.t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if err := r.client.ConfigSet(context.Background(), pairs[i], pairs[i+1]).Err(); err != nil {
			r.t.Fatal(err)
		}
	}
}

// What is good works and what was revoked is refused, with and without Redis.
func TestWhateverHappensToRedisEveryAnswerIsRight(t *testing.T) {
	t.Parallel()
	o := newOrdeal(t)
	ctx := context.Background()
	r := o.store
	var calm func()
	restart := func() {
		r.kill()
		r.start()
	}
	o.suffer(t, []fault{
		{name: "Redis is killed", during: noRedis, begin: func() { r.kill() }, end: r.start},
		{name: "Redis hangs", during: noRedis, begin: func() { r.hang() }, end: func() { r.resume() }},
		{name: "Redis is flushed", during: allWell, begin: func() { r.client.FlushAll(ctx) }, around: noRedis},
		{name: "Redis is restarted empty", during: allWell, begin: restart, around: noRedis},
		{name: "Redis is restored from an old snapshot", during: allWell, around: noRedis, begin: func() {
			if err := r.client.Save(ctx).Err(); err != nil {
				t.Fatal(err)
			}
			o.check("after the snapshot", allWell) // and more is revoked
			restart()
			os.Remove(filepath.Join(r.folder, "dump.rdb"))
		}},
		{name: "Redis is full", during: noRedis, begin: func() { r.set("maxmemory", "1") }, end: func() { r.set("maxmemory", "0") }},
		{name: "Redis is read-only", during: noRedis, begin: func() { r.client.ReplicaOf(ctx, "127.0.0.1", "1") },
			end: func() { r.client.ReplicaOf(ctx, "no", "one") }},
		{name: "Redis is slow", during: allWell, around: noRedis, begin: func() {
			calm = throb(r.process, 100*time.Millisecond, 50*time.Millisecond)
			time.Sleep(time.Second)
		}, end: func() { calm() }},
		{name: "Redis comes and goes", during: allWell, around: noRedis, begin: func() {
			calm = throb(r.process, 700*time.Millisecond, 500*time.Millisecond)
			time.Sleep(3 * time.Second)
			calm()
		}},
	})
}

// exec is what the owner of the database does.
func (o *ordeal) exec(statements ...string) {
	o.t.Helper()
	o.db.Reset()
	for _, sql := range statements {
		if _, err := o.db.Exec(context.Background(), sql); err != nil {
			o.t.Fatalf("%s: %v", sql, err)
		}
	}
}

// Without PostgreSQL nothing is a yes or a no, and what was acknowledged before
// it went is there when it is back.
func TestWithoutPostgreSQLNothingIsAYesOrANo(t *testing.T) {
	t.Parallel()
	o := newOrdeal(t)
	p := o.postgres
	o.suffer(t, []fault{
		{name: "PostgreSQL is killed", during: nothing, begin: func() { crash(p.process) }, end: p.start},
		{name: "PostgreSQL is stopped", during: nothing, begin: func() { p.stop(t, syscall.SIGINT) }, end: p.start},
		{name: "PostgreSQL hangs", during: nothing, begin: func() { freeze(p.process) }, end: func() { p.resume() }},
		{name: "both are killed", during: nothing, around: noRedis, begin: func() { crash(p.process); o.store.kill() },
			end: func() { p.start(); o.store.start() }},
	})
}

func TestPostgreSQLThatRefusesIsA503(t *testing.T) {
	t.Parallel()
	o := newOrdeal(t)
	p := o.postgres
	const trigger = `create or replace function refuse() returns trigger language plpgsql as $$ begin `
	o.exec(trigger+`return new; end $$`, `create trigger refuse before insert on audit_events for each row execute function refuse()`)
	var calm func()
	restarts := func(stop func()) func() {
		return func() {
			for range rounds(2, 10) {
				stop()
				p.start()
				time.Sleep(300 * time.Millisecond)
			}
		}
	}
	o.suffer(t, []fault{
		{name: "PostgreSQL is killed and restarted", during: allWell, begin: restarts(func() { crash(p.process) }), around: nothing},
		{name: "PostgreSQL is stopped and restarted", during: allWell, begin: restarts(func() { p.stop(t, syscall.SIGINT) }), around: nothing},
		{name: "PostgreSQL is read-only", during: noWrite, begin: func() {
			o.exec(`alter system set default_transaction_read_only = on`, `select pg_reload_conf()`)
		}, end: func() {
			o.exec(`alter system reset default_transaction_read_only`, `select pg_reload_conf()`)
		}},
		{name: "the log refuses events", during: noWrite, begin: func() {
			o.exec(trigger + `raise exception 'refused'; end $$`)
		}, end: func() { o.exec(trigger + `return new; end $$`) }},
		{name: "PostgreSQL is slow", during: allWell, around: unready, begin: func() {
			calm = throb(p.process, 50*time.Millisecond, 50*time.Millisecond)
		}, end: func() { calm() }},
	})
}

// Redis that hangs costs each of the first few requests its time-out, and the
// others nothing. It is used again when it answers again.
func TestHungRedisIsNotWaitedForAgainAndAgain(t *testing.T) {
	t.Parallel()
	o := newOrdeal(t, "METRICS_ADDR", metricsOn)
	counted := func() bool { return o.api(o.bearer, "GET", "/agents/"+o.id, "").header.Get("X-RateLimit-Limit") != "" }
	if !counted() {
		t.Fatal("the limit is not counted in Redis")
	}
	for range rounds(2, 5) {
		logged := func() [2]int {
			text := o.log.String()
			return [2]int{strings.Count(text, redisLost), strings.Count(text, redisBack)}
		}
		earlier := logged()
		o.store.hang()
		const requests = 100
		const calls = `agentidp_store_call_duration_seconds_count{store="redis"}`
		before, begun := o.metric(calls), time.Now()
		for i := range requests {
			if i%2 == 0 {
				o.want(o.api(o.bearer, "GET", "/agents/"+o.id, ""), 200, "")
			} else {
				o.want(o.form(o.id, o.secret, "", "grant_type=client_credentials"), 200, "")
			}
		}
		waited, took := o.metric(calls)-before, time.Since(begun)
		if keeper := 1 + (took / (keepEvery + redisTimeout)); waited < 1 || waited > float64(requests/5+keeper) {
			t.Errorf("beside %d requests Redis was waited for %v times in %s, want by the first few, hardly another, and the keeper", requests, waited, took)
		}
		if counted() {
			t.Error("Redis hangs, and the limit is counted in it")
		}
		if got := logged(); got != [2]int{earlier[0] + 1, earlier[1]} {
			t.Errorf("an outage is logged %d times, and its end %d times before it has come, want once and not yet", got[0]-earlier[0], got[1]-earlier[1])
		}
		o.store.resume()
		o.eventually("Redis is asked again", counted)
		o.eventually("the log says so", func() bool { return logged()[1] > earlier[1] })
		without := 0
		for range requests { // and it stays so, but for an answer that is late
			if !counted() {
				without++
			}
		}
		if without > requests/10 {
			t.Errorf("of %d requests after Redis was back %d did without it", requests, without)
		}
	}
}

// A flood is many requests at once, each on a connection of its own that is
// there before.
type flood []net.Conn

func newFlood(t *testing.T, p *program, n int) flood {
	t.Helper()
	list := make(flood, n)
	for i := range list {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		list[i] = conn
	}
	return list
}

// send sends text(i) on the connection i, and returns how often there was
// which answer: a status, and of an error the message. No answer may take
// longer than longest.
func (list flood) send(t *testing.T, text func(i int) string) map[string]int {
	t.Helper()
	var mu sync.Mutex
	seen := map[string]int{}
	var group sync.WaitGroup
	begun := time.Now()
	for i, conn := range list {
		if _, err := io.WriteString(conn, text(i)); err != nil {
			t.Fatal(err)
		}
		group.Go(func() {
			conn.SetReadDeadline(begun.Add(2 * longest))
			var body struct {
				Message string
				Error   string `json:"error_description"`
			}
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err == nil {
				err = json.NewDecoder(response.Body).Decode(&body)
			}
			if err != nil {
				t.Errorf("no answer: %v", err)
				return
			}
			if took := time.Since(begun); took > longest {
				t.Errorf("%s took %s", response.Status, took)
			}
			if response.StatusCode == 503 && response.Header.Get("Retry-After") == "" {
				t.Error("a 503 has no Retry-After")
			}
			mu.Lock()
			defer mu.Unlock()
			seen[strings.TrimSpace(fmt.Sprint(response.StatusCode, " ", body.Message, body.Error))]++
		})
	}
	group.Wait()
	return seen
}

// plain is a request as it is sent.
func plain(method, path, authorization, kind, body string) string {
	text := method + " /api/v1" + path + " HTTP/1.1\r\nHost: idp.test\r\nAuthorization: " + authorization + "\r\n"
	if body != "" {
		text += "Content-Type: application/" + kind + "\r\nContent-Length: " + fmt.Sprint(len(body)) + "\r\n"
	}
	return text + "\r\n" + body
}

// kinds returns requests of several kinds, in turns.
func (o *ordeal) kinds() func(i int) string {
	const form = "x-www-form-urlencoded"
	bearer, basic := "Bearer "+o.bearer, "Basic "+base64.StdEncoding.EncodeToString([]byte(o.id+":"+o.secret))
	id := o.newAgent("resumes:read")
	return func(i int) string {
		switch i % 4 {
		case 0:
			return plain("POST", "/token", basic, form, "grant_type=client_credentials")
		case 1:
			return plain("GET", "/agents/"+o.id, bearer, "", "")
		case 2:
			return plain("POST", "/token/introspect", bearer, form, "token="+o.bearer)
		default:
			return plain("PATCH", "/agents/"+id, bearer, "json", `{"owner":"somebody"}`)
		}
	}
}

// While a store hangs, a bounded number of requests waits for it. All others
// are refused at once, and what needs no store is answered.
//
// Not parallel: it fills the machine.
func TestMoreRequestsThanMayWaitAreRefusedAtOnce(t *testing.T) {
	o := newOrdeal(t)
	n := rounds(1600, 4000)
	kinds := o.kinds()
	idle := o.memory(t)

	first := newFlood(t, o.program, n)
	freeze(o.postgres.process)
	over, probed := make(chan struct{}), make(chan int)
	most := 0.0
	go func() {
		probes := 0
		for ; ; probes++ {
			begun := time.Now()
			keys, life := o.do("GET", "/.well-known/jwks.json", ""), o.do("GET", "/livez", "")
			if took := time.Since(begun); keys.status != 200 || life.status != 200 || took > longest/4 {
				t.Errorf("during the flood keys and life are %d and %d in %s, want 200 at once", keys.status, life.status, took)
			}
			most = max(most, o.memory(t))
			select {
			case <-over:
				probed <- probes
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	seen := first.send(t, kinds)
	close(over)
	if probes := <-probed; probes < 10 {
		t.Errorf("keys and life were asked for only %d times", probes)
	}
	busy, waited := seen["503 "+busyMessage], seen["503 "+unavailableMessage]
	if busy+waited != n || waited > maxInFlight {
		t.Errorf("of %d requests while PostgreSQL hangs, %v, want %d that waited and the others refused", n, seen, maxInFlight)
	}
	quick := 0
	for line := range strings.Lines(o.log.String()) {
		var l struct {
			Status int
			MS     float64
		}
		if json.Unmarshal([]byte(line), &l); l.Status == 503 && l.MS < longest.Seconds()*1000/4 {
			quick++
		}
	}
	if quick < n-maxInFlight {
		t.Errorf("%d of %d requests were refused at once, want %d", quick, n, n-maxInFlight)
	}
	if most > 250 {
		t.Errorf("the program has grown from %.0f to %.0f MB", idle, most)
	}

	// PostgreSQL comes back slow, and the flood goes on.
	o.postgres.resume()
	calm := throb(o.postgres.process, 100*time.Millisecond, 50*time.Millisecond)
	for got := range newFlood(t, o.program, n).send(t, kinds) {
		if got != "200" && got != "503 "+busyMessage && got != "503 "+unavailableMessage {
			t.Errorf("while PostgreSQL comes back slow: %s, want 200 or 503", got)
		}
	}
	calm()
	o.well("the floods")

	// Nobody's place is lost: nearly as many as may wait are all served.
	read := func(int) string { return plain("GET", "/agents/"+o.id, "Bearer "+o.bearer, "", "") }
	if seen := newFlood(t, o.program, maxInFlight-24).send(t, read); seen["200"] != maxInFlight-24 {
		t.Errorf("after the floods, %d requests at once = %v, want all of them served", maxInFlight-24, seen)
	}
	o.verify("after the floods")

	// Who sends half a form has authenticated as nobody, and takes no place of
	// those who have.
	half := plain("POST", "/token", "Basic eDp4", "x-www-form-urlencoded", "grant_type=client_cred")
	for _, conn := range newFlood(t, o.program, maxInFlight+100) {
		if _, err := io.WriteString(conn, half[:len(half)-4]); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 { // a form that is not there after 10 s is cut
		o.check("while many send half a form", allWell)
	}
}

// Nobody waits for a second connection while holding one: with few of them,
// many requests just take turns.
//
// Not parallel: it fills the machine.
func TestManyRequestsShareFewConnections(t *testing.T) {
	o := &ordeal{postgres: newPostgres(t), store: newRedisServer(t)}
	o.program = newProgram(t, o.postgres.url()+"&pool_max_conns=4", o.store.url(),
		"RATE_LIMIT_PER_MINUTE", "1000000", "MONTHLY_TOKEN_LIMIT", "1000000000", "MAX_AGENTS", "100000")
	const n = 500
	id := o.newAgent("resumes:read")
	victims := make([]string, n)
	for i := range victims {
		victims[i] = o.bearerOf(id, "resumes:read")
	}
	kinds := o.kinds()
	for round := range rounds(2, 20) {
		if round%2 == 1 { // quotas and revocations are asked of PostgreSQL, too
			o.store.client.FlushAll(t.Context())
		}
		got := newFlood(t, o.program, n).send(t, func(i int) string {
			switch i % 6 {
			case 4:
				return plain("POST", "/agents", "Bearer "+o.bearer, "json", agentJSON(newID()+"@example.com", "a:b"))
			case 5:
				return plain("POST", "/token/revoke", "Bearer "+o.bearer, "x-www-form-urlencoded", "token="+victims[i])
			}
			return kinds(i % 6)
		})
		if want := map[string]int{"200": n - n/6, "201": n / 6}; !maps.Equal(got, want) {
			t.Errorf("round %d: %d requests on 4 connections = %v, want %v", round, n, got, want)
		}
	}
	o.isWell()
}
