package test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// What was acknowledged stays, whatever is killed.

// A load is several clients that do all that can be done, at once. Each has
// agents of its own and does one thing after another, so it knows what must be.
type load struct {
	t       testing.TB
	p       *program
	urls    []string // of the copies, or of what stands before them
	strict  bool     // nothing may fail
	workers []*worker

	stopping         atomic.Bool
	running          sync.WaitGroup
	answered, unsure atomic.Int64
	turn             atomic.Int64
	seen             sync.Map     // the actions that were acknowledged
	longest          atomic.Int64 // nanoseconds
	checkpoints      []string     // taken on the way
}

type worker struct {
	*load
	conns  map[string]*keptConn
	acked  map[string]wantEvent // by request id
	agents []*subject           // the first is all workers' and is left alone, the last two are worked with
}

// A wantEvent is what the audit log must have of what was acknowledged.
type wantEvent struct{ action, jti string }

// A subject is an agent of a worker.
type subject struct {
	id, email   string
	stored      []string // what may be stored: what was acknowledged last, and what was tried since
	status      string   // "" where that is not known
	given       bool     // up: it may be decommissioned
	credentials []*holding
	tokens      []*holdingToken
}

type holding struct {
	id, secret string   // "" where it is not known
	old        []string // secrets before it
	revoked    bool
}

type fate int

const (
	alive fate = iota
	dead
	unsure
)

type holdingToken struct {
	text       string
	credential *holding
	fate       fate // apart from its agent's status
}

func (s *subject) fate(k *holdingToken) fate {
	switch {
	case k.fate != alive:
		return k.fate
	case s.status == "active":
		return alive
	case s.status == "":
		return unsure
	}
	return dead
}

// startLoad starts clients of these URLs that go on until stop.
func startLoad(p *program, clients int, strict bool, urls ...string) *load {
	l := &load{t: p.service.t, p: p, urls: urls, strict: strict}
	id := p.want(p.api(p.bearer, "POST", "/agents", agentJSON("steady@example.com", "data:read")), 201, "").text("agentId")
	credentialID, clientSecret := p.newCredential(id)
	for range clients {
		steady := &subject{id: id, email: "steady@example.com", stored: []string{"1.0.0 team [data:read]"}, status: "active",
			credentials: []*holding{{id: credentialID, secret: clientSecret}}}
		w := &worker{load: l, conns: map[string]*keptConn{}, acked: map[string]wantEvent{}, agents: []*subject{steady}}
		l.workers = append(l.workers, w)
		l.running.Go(func() {
			for !l.stopping.Load() {
				w.step()
				time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
			}
			for _, k := range w.conns {
				k.close()
			}
		})
	}
	l.t.Cleanup(l.stop)
	for _, action := range actions { // so that there is some of each to be lost
		p.eventually(action+" is acknowledged", func() bool {
			_, seen := l.seen.Load(action)
			return seen || action == authFailed
		})
	}
	return l
}

func (l *load) stop() {
	l.stopping.Store(true)
	l.running.Wait()
}

// A keptConn is a connection that is kept alive for as long as it can be. What
// fails on it is not tried again, as net/http would.
type keptConn struct {
	address string
	conn    net.Conn
	reader  *bufio.Reader
}

func (k *keptConn) close() {
	if k.conn != nil {
		k.conn.Close()
		k.conn = nil
	}
}

func (k *keptConn) do(q *http.Request) (a answer, err error) {
	if k.conn == nil {
		if k.conn, err = net.DialTimeout("tcp", k.address, 10*time.Second); err != nil {
			k.conn = nil
			return a, err
		}
		k.reader = bufio.NewReader(k.conn)
	}
	k.conn.SetDeadline(time.Now().Add(30 * time.Second))
	var response *http.Response
	if err = q.Write(k.conn); err == nil {
		response, err = http.ReadResponse(k.reader, q)
	}
	var raw []byte
	if err == nil {
		raw, err = io.ReadAll(response.Body)
	}
	if err != nil || response.Close {
		k.close()
	}
	if err != nil {
		return a, err
	}
	a = answer{status: response.StatusCode, header: response.Header, raw: string(raw)}
	if len(raw) > 0 {
		err = json.Unmarshal(raw, &a.body)
	}
	return a, err
}

// ask sends a request, to be answered with this status and recorded as action.
// Sure is false where there was no answer or a 503: it may have come about.
func (w *worker) ask(method, path, body, authorization string, status int, action string) (a answer, sure bool) {
	base := w.urls[rand.IntN(len(w.urls))]
	q, err := http.NewRequest(method, base+"/api/v1"+path, strings.NewReader(body))
	if err != nil {
		w.t.Error(err)
		return a, false
	}
	q.Header.Set("Authorization", authorization)
	q.Header.Set("Content-Type", "application/json")
	if strings.HasPrefix(path, "/token") {
		q.Header.Set("Content-Type", formType)
	}
	k := w.conns[base]
	if k == nil {
		k = &keptConn{address: q.URL.Host}
		w.conns[base] = k
	}
	begun := time.Now()
	a, err = k.do(q)
	if took := int64(time.Since(begun)); took > w.longest.Load() {
		w.longest.Store(took)
	}
	switch {
	case err == nil && a.status == status:
		w.answered.Add(1)
		if action != "" {
			w.keep(a, wantEvent{action: action})
		}
		return a, true
	case !w.strict && (err != nil || a.status == 503):
		w.unsure.Add(1)
		time.Sleep(5 * time.Millisecond)
	case err != nil:
		w.t.Errorf("%s %s: %v, want an answer", method, path, err)
	default:
		w.t.Errorf("%s %s answered %v, want %d", method, path, a, status)
	}
	return a, false
}

// keep notes what must be in the log for ever.
func (w *worker) keep(a answer, want wantEvent) {
	w.acked[a.header.Get("X-Request-Id")] = want
	w.seen.Store(want.action, true)
}

func (w *worker) admin() string { return "Bearer " + w.p.bearer }

// step does one thing, by chance.
func (w *worker) step() {
	if len(w.agents) == 1 || rand.IntN(100) < 2 {
		w.register()
		return
	}
	s := w.agents[max(1, len(w.agents)-1-rand.IntN(2))]
	if rand.IntN(2) == 0 {
		s = w.agents[0]
	}
	var c *holding // that can be used
	for _, have := range s.credentials {
		if have.secret != "" && !have.revoked {
			c = have
		}
	}
	var k *holdingToken
	if len(s.tokens) > 0 {
		k = s.tokens[rand.IntN(len(s.tokens))]
	}
	chance := rand.IntN(100)
	switch {
	case s == w.agents[0] && chance < 50 || k == nil && c != nil && chance < 60:
		w.token(s, c)
	case s == w.agents[0] && chance < 65:
		w.revoke(s, k)
	case s == w.agents[0]:
		w.look(s, k)
	case s.given:
		w.register()
	case s.status != "active" && chance < 50:
		w.setStatus(s, "active")
	case s.status != "active":
		w.look(s, k)
	case c == nil:
		w.newCredential(s)
	case chance < 30: // each of these as often
		switch w.turn.Add(1) % 6 {
		case 0:
			w.newCredential(s)
		case 1:
			w.rotate(s, c)
		case 2:
			w.endCredential(s, c)
		case 3:
			w.setStatus(s, "suspended")
		case 4:
			w.patch(s)
		case 5:
			w.decommission(s)
		}
	case chance < 45:
		w.token(s, c)
	case chance < 60:
		w.revoke(s, k)
	default:
		w.look(s, k)
	}
}

var crashNumber atomic.Int64

func (w *worker) register() {
	n := crashNumber.Add(1)
	s := &subject{email: fmt.Sprintf("crash%d@example.com", n), status: "active"}
	capability := fmt.Sprintf("data:read%d", n)
	a, sure := w.ask("POST", "/agents", agentJSON(s.email, capability), w.admin(), 201, agentCreated)
	if sure {
		s.id, s.stored = a.text("agentId"), []string{"1.0.0 team [" + capability + "]"}
		w.agents = append(w.agents, s)
	}
}

// patch names all that it changes, so that the last one counts alone.
func (w *worker) patch(s *subject) {
	n := crashNumber.Add(1)
	body := fmt.Sprintf(`{"version":"1.%d.0","owner":"team %d","capabilities":["data:read%d","data:*"]}`, n, n, n)
	tried := fmt.Sprintf("1.%d.0 team %d [data:read%d data:*]", n, n, n)
	if _, sure := w.ask("PATCH", "/agents/"+s.id, body, w.admin(), 200, agentUpdated); sure {
		s.stored = []string{tried}
	} else {
		s.stored = append(s.stored, tried)
	}
}

func (w *worker) setStatus(s *subject, status string) {
	action := map[string]string{"active": agentReactivated, "suspended": agentSuspended}[status]
	if s.status == "" { // it may have that already, which is an update
		action = ""
	}
	s.status = ""
	if _, sure := w.ask("PATCH", "/agents/"+s.id, `{"status":"`+status+`"}`, w.admin(), 200, action); sure {
		s.status = status
	}
}

func (w *worker) decommission(s *subject) {
	s.given, s.status = true, ""
	if _, sure := w.ask("DELETE", "/agents/"+s.id, "", w.admin(), 204, agentDecommissioned); sure {
		s.status = "decommissioned"
	}
}

func (w *worker) newCredential(s *subject) {
	a, sure := w.ask("POST", "/agents/"+s.id+"/credentials", "{}", w.admin(), 201, credentialGenerated)
	if sure {
		s.credentials = append(s.credentials, &holding{id: a.text("credentialId"), secret: a.text("clientSecret")})
	}
}

func (w *worker) rotate(s *subject, c *holding) {
	a, sure := w.ask("POST", "/agents/"+s.id+"/credentials/"+c.id+"/rotate", "{}", w.admin(), 200, credentialRotated)
	if sure {
		c.old = append(c.old, c.secret)
	}
	c.secret = a.text("clientSecret") // none where it is not sure
	s.end(c, sure)
}

func (w *worker) endCredential(s *subject, c *holding) {
	_, sure := w.ask("DELETE", "/agents/"+s.id+"/credentials/"+c.id, "", w.admin(), 204, credentialRevoked)
	c.revoked = sure
	if !sure {
		c.secret = ""
	}
	s.end(c, sure)
}

// end is the end of the tokens of a credential, or may be.
func (s *subject) end(c *holding, sure bool) {
	for _, k := range s.tokens {
		if k.credential == c && k.fate != dead {
			k.fate = unsure
			if sure {
				k.fate = dead
			}
		}
	}
}

func basic(id, secret string) string {
	q := &http.Request{Header: http.Header{}}
	q.SetBasicAuth(id, secret)
	return q.Header.Get("Authorization")
}

func (w *worker) token(s *subject, c *holding) {
	a, sure := w.ask("POST", "/token", "grant_type=client_credentials", basic(s.id, c.secret), 200, "")
	if !sure {
		return
	}
	k := &holdingToken{text: a.text("access_token"), credential: c}
	s.tokens = append(s.tokens, k)
	w.keep(a, wantEvent{tokenIssued, readClaims(w.t, k.text).ID})
}

func (w *worker) revoke(s *subject, k *holdingToken) {
	if k == nil || k.fate == dead {
		return
	}
	again := k.fate == unsure
	k.fate = unsure
	a, sure := w.ask("POST", "/token/revoke", "token="+k.text, w.admin(), 200, "")
	if !sure {
		return
	}
	k.fate = dead
	if !again { // else it may have been revoked already, which is no event
		w.keep(a, wantEvent{tokenRevoked, readClaims(w.t, k.text).ID})
	}
	w.look(s, k) // at once
}

// look presents a token, which must be good or refused at any time.
func (w *worker) look(s *subject, k *holdingToken) {
	if k == nil {
		return
	}
	want := s.fate(k)
	if rand.IntN(2) == 0 && want != unsure {
		w.ask("GET", "/agents/"+s.id, "", "Bearer "+k.text, map[fate]int{alive: 200, dead: 401}[want], "")
		return
	}
	if rand.IntN(20) == 0 {
		w.ask("GET", "/revocations", "", w.admin(), 200, revocationsRead)
	}
	a, sure := w.ask("POST", "/token/introspect", "token="+k.text, w.admin(), 200, tokenIntrospected)
	if sure && want != unsure && a.body["active"] != (want == alive) {
		w.t.Errorf("under load a token is answered with %v, want active: %v", a, want == alive)
	}
}

// checkpoint asks for one.
func (l *load) checkpoint(v *service) {
	l.t.Helper()
	var report answer
	v.eventually("the chain is reported on", func() bool {
		report = v.api(l.p.bearer, "GET", "/audit/verify", "")
		return report.status == 200
	})
	if report.body["verified"] != true {
		l.t.Errorf("under load the chain is reported on with %v", report)
	}
	if signed := report.text("checkpoint"); signed != "" {
		l.checkpoints = append(l.checkpoints, signed)
	}
}

// check wants all that was acknowledged to be there, and nothing by halves.
// It stops the load first.
func (l *load) check(copies ...*program) {
	l.t.Helper()
	l.stop()
	l.t.Logf("%d requests were answered, %d may have come about; the longest took %s",
		l.answered.Load(), l.unsure.Load(), time.Duration(l.longest.Load()).Round(time.Millisecond))
	for _, v := range copies { // of what was killed last, something may have to be repaired
		v.eventually("both stores are well", func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
	}
	l.checkEvents()
	l.checkRows()
	l.checkTokens(copies)
	l.checkSecrets(copies)
	l.checkChain(copies)
	l.checkKeys()
}

// checkEvents finds each thing that was acknowledged in the audit log, once.
func (l *load) checkEvents() {
	l.t.Helper()
	rows, _ := l.p.db.Query(context.Background(), `
		select coalesce(metadata->>'requestId', ''), action, outcome, coalesce(metadata->>'jti', '')
		from audit_events`)
	found := map[string][]wantEvent{}
	var id, action, outcome, jti string
	_, err := pgx.ForEachRow(rows, []any{&id, &action, &outcome, &jti}, func() error {
		if outcome == "success" {
			found[id] = append(found[id], wantEvent{action, jti})
		}
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
	count := map[string]int{}
	for _, w := range l.workers {
		for id, want := range w.acked {
			got := found[id]
			if len(got) != 1 || got[0].action != want.action || want.jti != "" && got[0].jti != want.jti {
				l.t.Errorf("%s was acknowledged, and its events are %v, want one", want.action, got)
			}
			count[want.action]++
		}
	}
	l.t.Logf("acknowledged: %v", count)
}

// halves are what would have been done without its event, or the other way
// round. Each query lists some.
var halves = map[string]string{
	"agents without an event": `
		select agent_id from agents a where not exists (
			select from audit_events e where e.agent_id = a.agent_id and action = 'agent.created' and outcome = 'success')`,
	"events without an agent": `
		select agent_id from audit_events e where action = 'agent.created' and outcome = 'success'
			and not exists (select from agents a where a.agent_id = e.agent_id)`,
	"versions of an agent without an event": `
		select agent_id from agents a where version <> '1.0.0' and not exists (
			select from audit_events e where e.agent_id = a.agent_id and outcome = 'success'
				and metadata->'changes'->>'version' = a.version)`,
	"credentials without an event": `
		select credential_id from credentials c where not exists (
			select from audit_events e where e.agent_id = c.client_id and outcome = 'success'
				and metadata->>'credentialId' = c.credential_id::text and action in ('credential.generated', 'agent.created'))`,
	"events without a credential": `
		select agent_id from audit_events e where action = 'credential.generated' and outcome = 'success'
			and not exists (select from credentials c where c.credential_id::text = metadata->>'credentialId')`,
	"revoked credentials without an event": `
		select credential_id from credentials c where status = 'revoked' and not exists (
			select from audit_events e where e.agent_id = c.client_id and outcome = 'success'
				and (action = 'credential.revoked' and metadata->>'credentialId' = c.credential_id::text
					or action = 'agent.decommissioned'))`,
	"revocations without an event": `
		select jti from token_revocations r where not exists (
			select from audit_events e where action = 'token.revoked' and outcome = 'success' and metadata->>'jti' = r.jti::text)`,
	"events without a revocation": `
		select agent_id from audit_events e where action = 'token.revoked' and outcome = 'success'
			and not exists (select from token_revocations r where r.jti::text = metadata->>'jti')`,
}

// checkRows wants the tables to be as they were acknowledged to be.
func (l *load) checkRows() {
	l.t.Helper()
	ctx := context.Background()
	for what, sql := range halves {
		rows, _ := l.p.db.Query(ctx, sql)
		if ids, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || len(ids) > 0 {
			l.t.Errorf("%s: %d, %v, %v, want none", what, len(ids), ids[:min(len(ids), 3)], err)
		}
	}
	for _, w := range l.workers {
		for _, s := range w.agents {
			var email, status, stored string
			err := l.p.db.QueryRow(ctx, `
				select email, status, version || ' ' || owner || ' [' || array_to_string(capabilities, ' ') || ']'
				from agents
				where agent_id = $1`, s.id).Scan(&email, &status, &stored)
			if err != nil || email != s.email || s.status != "" && status != s.status || !slices.Contains(s.stored, stored) {
				l.t.Errorf("an agent is stored as %s, %s, %s (%v), want %s, %q, one of %q", email, status, stored, err, s.email, s.status, s.stored)
			}
			for _, c := range s.credentials {
				var status, prefix string
				err := l.p.db.QueryRow(ctx, `
					select status, secret_prefix
					from credentials
					where credential_id = $1 and client_id = $2`, c.id, s.id).Scan(&status, &prefix)
				if err != nil || c.revoked && status != "revoked" || c.secret != "" && prefix != c.secret[8:24] {
					l.t.Errorf("a credential is stored as %s, %s (%v), want revoked: %v", status, prefix, err, c.revoked)
				}
			}
		}
	}
}

// atOnce8 does n things, eight at a time.
func atOnce8(n int, do func(i int)) {
	var next atomic.Int64
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				do(i)
			}
		})
	}
	group.Wait()
}

// answered asks until the answer is no 503: a machine may be so busy that a
// copy's own deadline passes, and that says nothing.
func answered(ask func() answer) (a answer) {
	for end := time.Now().Add(time.Minute); ; {
		if a = ask(); a.status != 503 || time.Now().After(end) {
			return a
		}
	}
}

// checkTokens presents all that were revoked to each copy, and some that were not.
func (l *load) checkTokens(copies []*program) {
	l.t.Helper()
	type presented struct {
		agentID, text string
		want          fate
	}
	var list []presented
	count := map[fate]int{}
	for _, w := range l.workers {
		for _, s := range w.agents {
			for _, k := range s.tokens {
				want := s.fate(k)
				count[want]++
				if want == dead || want == alive && count[alive] <= 100 {
					list = append(list, presented{s.id, k.text, want})
				}
			}
		}
	}
	l.t.Logf("tokens: %d good, %d revoked, %d that may be either", count[alive], count[dead], count[unsure])
	if count[alive] == 0 || count[dead] == 0 {
		l.t.Error("want tokens of both kinds")
	}
	for n, v := range copies {
		atOnce8(len(list), func(i int) {
			k := list[i]
			a := answered(func() answer { return v.bearerForm(l.p.bearer, "/introspect", "token="+k.text) })
			if a.status != 200 || a.body["active"] != (k.want == alive) {
				l.t.Errorf("copy %d introspects a token as %v, want active: %v", n, a, k.want == alive)
			}
			a = answered(func() answer { return v.api(k.text, "GET", "/agents/"+k.agentID, "") })
			if a.status != map[fate]int{alive: 200, dead: 401}[k.want] {
				l.t.Errorf("copy %d answers a token with %v, want it let in: %v", n, a, k.want == alive)
			}
		})
	}
}

// checkSecrets wants the last secret that was handed out to work, and none
// that was rotated away or revoked.
func (l *load) checkSecrets(copies []*program) {
	l.t.Helper()
	type presented struct {
		agentID, secret string
		want            int
	}
	var list []presented
	for _, w := range l.workers {
		for _, s := range w.agents {
			for _, c := range s.credentials {
				for _, old := range c.old {
					list = append(list, presented{s.id, old, 401})
				}
				switch {
				case c.secret == "" || s.status == "":
				case s.status == "decommissioned": // a copy that never saw it doesn't compare it
					list = append(list, presented{s.id, c.secret, 401})
				case c.revoked:
					list = append(list, presented{s.id, c.secret, 401})
				case s.status == "suspended":
					list = append(list, presented{s.id, c.secret, 403})
				default:
					list = append(list, presented{s.id, c.secret, 200})
				}
			}
		}
	}
	atOnce8(len(list), func(i int) {
		k := list[i]
		a := answered(func() answer { return copies[i%len(copies)].grant(k.agentID, k.secret, "") })
		if a.status != k.want && !(k.want == 401 && a.status == 403 && strings.Contains(a.raw, "decommissioned")) {
			l.t.Errorf("a secret is answered with %v, want %d", a, k.want)
		}
	})
}

// checkChain wants one chain without a gap, that extends each checkpoint.
func (l *load) checkChain(copies []*program) {
	l.t.Helper()
	var rows, seqs, last int64
	err := l.p.db.QueryRow(context.Background(), `
		select count(*), count(distinct seq), max(seq) from audit_events`).Scan(&rows, &seqs, &last)
	if err != nil || rows != seqs || rows != last {
		l.t.Errorf("the log has %d events with %d seqs, the last of them %d (%v)", rows, seqs, last, err)
	}
	for _, v := range copies {
		l.checkpoint(v.service)
	}
	for _, checkpoint := range l.checkpoints {
		if out := l.p.command("verify-audit", checkpoint); !strings.HasPrefix(out, "verified: ") || !strings.Contains(out, "extends the checkpoint") {
			l.t.Errorf("verify-audit prints %q", out)
		}
	}
}

// checkKeys wants every count in Redis to end.
func (l *load) checkKeys() {
	l.t.Helper()
	for _, pattern := range []string{"rate:*", "monthly:*"} {
		keys := l.p.keys(pattern)
		if len(keys) == 0 {
			l.t.Errorf("there is no key like %s", pattern)
		}
		for _, key := range keys {
			// -2: it has ended since it was listed.
			if ttl := l.p.rdb.TTL(context.Background(), key).Val(); ttl == -1 {
				l.t.Errorf("%s never expires", key)
			}
		}
	}
}

var (
	firstPort  = rand.IntN(20000) // since other runs take theirs from here too
	portNumber atomic.Int64
)

// steadyPort is one that no outgoing connection takes while nobody listens, and that
// is given only once.
func steadyPort(t testing.TB) string {
	t.Helper()
	for range 100 {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10000+(firstPort+int(portNumber.Add(1)))%20000))
		if err == nil {
			defer listener.Close()
			_, port, _ := net.SplitHostPort(listener.Addr().String())
			return port
		}
	}
	t.Fatal("found no free port")
	return ""
}

// crashLimits are on, and so wide that nobody meets them.
var crashLimits = []string{"RATE_LIMIT_PER_MINUTE", "1000000", "MONTHLY_TOKEN_LIMIT", "1000000", "MAX_AGENTS", "1000000"}

// newPair starts two copies.
func newPair(t testing.TB, database, redis string, env ...string) (p, q *program) {
	t.Helper()
	p = newProgram(t, database, redis, slices.Concat(env, []string{"PORT", steadyPort(t)})...)
	return p, p.another("PORT", steadyPort(t))
}

func TestWhatWasAcknowledgedOutlivesKilledCopies(t *testing.T) {
	t.Parallel()
	p, q := newPair(t, newPostgres(t).url(), newRedisServer(t).url(), crashLimits...)
	l := startLoad(p, 10, false, p.url, q.url)
	for i := range rounds(10, 100) {
		time.Sleep(time.Duration(100+rand.IntN(300)) * time.Millisecond)
		victims := []*program{p, q}
		if i%5 != 4 {
			victims = victims[i%2 : i%2+1]
		}
		for _, victim := range victims {
			victim.kill()
		}
		for _, victim := range victims {
			victim.start()
		}
		if i%10 == 9 {
			l.checkpoint(p.service)
		}
	}
	l.check(p, q)
}

func TestWhatWasAcknowledgedOutlivesKilledStores(t *testing.T) {
	t.Parallel()
	database, store := newPostgres(t), newRedisServer(t)
	p, q := newPair(t, database.url(), store.url(), crashLimits...)
	l := startLoad(p, 8, false, p.url, q.url)
	for i := range rounds(6, 40) {
		time.Sleep(time.Duration(200+rand.IntN(400)) * time.Millisecond)
		if i%3 != 1 {
			database.kill()
		}
		if i%3 != 0 {
			store.kill()
		}
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		if i%3 != 1 {
			database.start()
		}
		if i%3 != 0 {
			store.start()
		}
		begun := l.answered.Load()
		p.eventually("requests are answered again", func() bool { return l.answered.Load() > begun+20 })
	}
	l.check(p, q)
}

// Limits and quotas are neither lost nor locked: what is counted for a client
// is at most what it has sent, and at least what it was given.
func TestKilledCopiesLockNoBudget(t *testing.T) {
	t.Parallel()
	const limit, quota, hands = 400, 200, 4
	p, q := newPair(t, newPostgres(t).url(), newRedisServer(t).url(),
		"RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit), "MONTHLY_TOKEN_LIMIT", fmt.Sprint(quota))
	type client struct {
		id, secret        string
		sent, cut, issued atomic.Int64
		loose             atomic.Int64 // tokens that were issued while Redis did not answer in time
	}
	clients := []*client{{}, {}}
	var stopping atomic.Bool
	var group sync.WaitGroup
	halt := func() { stopping.Store(true); group.Wait() }
	t.Cleanup(halt)
	for _, c := range clients {
		c.id, c.secret = p.newClient("data:read")
	}
	urls := []string{p.url, q.url}
	for _, c := range clients {
		for range hands {
			group.Go(func() {
				k := keptConn{}
				for !stopping.Load() && !t.Failed() && c.issued.Load() < quota*3/4 {
					body := "grant_type=client_credentials"
					request, err := http.NewRequest("POST", urls[rand.IntN(2)]+"/api/v1/token", strings.NewReader(body))
					if err != nil {
						t.Error(err)
						return
					}
					request.SetBasicAuth(c.id, c.secret)
					request.Header.Set("Content-Type", formType)
					k.close()
					k.address = request.URL.Host
					c.sent.Add(1)
					a, err := k.do(request)
					dial, ok := errors.AsType[*net.OpError](err)
					switch {
					case ok && dial.Op == "dial":
						c.sent.Add(-1)
						time.Sleep(20 * time.Millisecond)
					case err != nil:
						c.cut.Add(1)
						time.Sleep(20 * time.Millisecond)
					case a.status != 200:
						t.Errorf("a client within its quota is answered %v", a)
					default:
						c.issued.Add(1)
						if a.header.Get("X-RateLimit-Limit") == "" {
							c.loose.Add(1)
						}
						time.Sleep(20 * time.Millisecond)
					}
				}
			})
		}
	}
	kills := 0
	for ; !t.Failed() && (clients[0].issued.Load() < quota*3/4 || clients[1].issued.Load() < quota*3/4); kills++ {
		time.Sleep(time.Duration(150+rand.IntN(300)) * time.Millisecond)
		victim := []*program{p, q}[kills%2]
		victim.kill()
		victim.start()
	}
	halt()
	t.Logf("%d kills", kills)
	for _, c := range clients {
		var stored int64
		count := func() {
			t.Helper()
			err := p.db.QueryRow(context.Background(), `
				select count(*) from audit_events where agent_id = $1 and action = 'token.issued' and outcome = 'success'`, c.id).Scan(&stored)
			if err != nil {
				t.Fatal(err)
			}
		}
		if count(); stored < c.issued.Load() || stored > c.issued.Load()+c.cut.Load() {
			t.Errorf("%d tokens are in the log, want the %d that came, and at most the %d that were cut", stored, c.issued.Load(), c.cut.Load())
		}
		// The rest of the quota is there, but for what was cut.
		a := q.grant(c.id, c.secret, "")
		for c.sent.Add(1); a.status == 200; c.sent.Add(1) {
			a = q.grant(c.id, c.secret, "")
		}
		if a.status != 403 || a.code() != "unauthorized_client" {
			t.Errorf("a client that has spent its quota is answered %v", a)
		}
		if count(); stored > quota+c.loose.Load() || stored < quota-c.cut.Load() {
			t.Errorf("of a quota of %d with %d requests cut, %d tokens were issued", quota, c.cut.Load(), stored)
		}
		// So is that of the limit, all of it.
		other := func() answer { return p.form(c.id, c.secret, "", "grant_type=password") } // counts, and is refused for that
		a = other()
		left := a.number(t, "X-RateLimit-Remaining")
		if c.sent.Add(1); a.status != 400 || left < limit-c.sent.Load() {
			t.Errorf("of %d requests a minute %d are left after %d (%v)", limit, left, c.sent.Load(), a)
		}
		var refused atomic.Int64
		atOnce8(int(left), func(int) {
			if other().status != 400 {
				refused.Add(1)
			}
		})
		if refused.Load() > 0 {
			t.Errorf("of the %d requests that are left, %d are refused", left, refused.Load())
		}
		t.Logf("sent %d, of which %d were cut; %d tokens of %d; then %d of %d requests left", c.sent.Load(), c.cut.Load(), stored, quota, left, limit)
	}
	(&load{t: t, p: p}).checkKeys()
}

// A balancer sends new connections to those copies that are ready, as a real
// one: it asks each for its health again and again. Connections that there are
// stay where they are, and nothing is tried twice.
type balancer struct {
	listener net.Listener
	targets  []string // addresses
	status   []atomic.Int64
	next     atomic.Int64
	stopping chan struct{}
	late     atomic.Int64 // the longest time between two answers about health, in nanoseconds
}

func newBalancer(t testing.TB, copies ...*program) *balancer {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{listener: listener, status: make([]atomic.Int64, len(copies)), stopping: make(chan struct{})}
	var group sync.WaitGroup
	for _, v := range copies {
		b.targets = append(b.targets, strings.TrimPrefix(v.url, "http://"))
	}
	for i := range copies {
		b.ask(i)
		group.Go(func() {
			for last := time.Now(); ; last = time.Now() {
				select {
				case <-b.stopping:
					return
				case <-time.After(100 * time.Millisecond):
				}
				b.ask(i)
				if gap := int64(time.Since(last)); gap > b.late.Load() {
					b.late.Store(gap)
				}
			}
		})
	}
	group.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			group.Go(func() { b.join(conn) })
		}
	})
	t.Cleanup(func() {
		close(b.stopping)
		listener.Close()
		group.Wait()
	})
	return b
}

// ask asks a copy for its health; 0 is no answer.
func (b *balancer) ask(i int) {
	k := keptConn{address: b.targets[i]}
	defer k.close()
	q, _ := http.NewRequest("GET", "http://"+b.targets[i]+"/readyz", nil)
	a, _ := k.do(q)
	b.status[i].Store(int64(a.status))
}

func (b *balancer) join(client net.Conn) {
	defer client.Close()
	for range b.targets {
		i := int(b.next.Add(1)) % len(b.targets)
		if b.status[i].Load() != 200 {
			continue
		}
		server, err := net.Dial("tcp", b.targets[i])
		if err != nil {
			return
		}
		defer server.Close()
		go func() {
			io.Copy(server, client)
			server.Close()
		}()
		io.Copy(client, server)
		return
	}
}

func TestCopiesAreReplacedWithoutAFailure(t *testing.T) {
	p, q := newPair(t, newPostgres(t).url(), newRedisServer(t).url(), crashLimits...)
	b := newBalancer(t, p, q)
	l := startLoad(p, 4, true, "http://"+b.listener.Addr().String())
	copies := []*program{p, q}
	for i := range 2 * rounds(2, 25) {
		time.Sleep(200 * time.Millisecond)
		v, saw := copies[i%2], map[int64]bool{}
		v.cmd.Process.Signal(syscall.SIGTERM)
		for running := true; running; {
			select {
			case <-v.exited:
				running = false
			case <-time.After(10 * time.Millisecond):
				saw[b.status[i%2].Load()] = true
			}
		}
		if v.err != nil {
			t.Errorf("a copy has ended with %v, want status 0", v.err)
		}
		if !saw[503] {
			t.Errorf("while a copy drains its health is %v, want 503", slices.Collect(maps.Keys(saw)))
		}
		v.start()
		before := l.answered.Load()
		p.eventually("the new copy is found", func() bool { return b.status[i%2].Load() == 200 })
		p.eventually("there are answers", func() bool { return l.answered.Load() > before+20 })
	}
	t.Logf("the longest time between two answers about health: %s", time.Duration(b.late.Load()))
	l.check(p, q)
	if l.unsure.Load() > 0 {
		t.Errorf("%d requests failed", l.unsure.Load())
	}
}

// begin sends a request that has to wait for what another transaction holds,
// and returns when it does. The channel gets the answer, and whether that ended
// the connection.
func (p *program) begin(hold, method, path, body, authorization, requestID string) (let func(), answered chan ending) {
	p.service.t.Helper()
	ctx := context.Background()
	tx, err := p.db.Begin(ctx)
	if err == nil {
		_, err = tx.Exec(ctx, hold)
	}
	if err != nil {
		p.service.t.Fatal(err)
	}
	let = func() { tx.Rollback(ctx) } // fails the second time
	p.service.t.Cleanup(let)
	q, err := http.NewRequest(method, p.url+"/api/v1"+path, strings.NewReader(body))
	if err != nil {
		p.service.t.Fatal(err)
	}
	q.Header.Set("Authorization", authorization)
	q.Header.Set("X-Request-Id", requestID)
	q.Header.Set("Content-Type", "application/json")
	if path == "/token" {
		q.Header.Set("Content-Type", formType)
	}
	answered = make(chan ending, 1)
	go func() {
		k := keptConn{address: q.URL.Host}
		a, err := k.do(q)
		answered <- ending{a, err, k.conn == nil}
		k.close()
	}()
	p.eventually("the request waits", func() bool {
		var waits int
		err := p.db.QueryRow(ctx, `select count(*) from pg_locks where not granted`).Scan(&waits)
		return err == nil && waits > 0
	})
	return let, answered
}

// An ending is how a request ended.
type ending struct {
	answer
	err    error
	closed bool // the connection, by the answer
}

// What has begun when SIGTERM comes is finished, also when the port is closed
// by then. A second SIGTERM stops at once.
func TestWhatHasBegunIsFinished(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newPostgres(t).url(), newRedisServer(t).url(), "PORT", steadyPort(t))
	id, secret := p.newClient("data:read")
	const (
		closed  = iota // the request is held until the port is closed
		drained        // ... until health is 503
		again          // ... until there is a second SIGTERM
	)
	row := `select from agents where agent_id = '` + id + `' for update`
	log := fmt.Sprintf(`select pg_advisory_xact_lock(%d)`, chainLock)
	for _, r := range []struct {
		name, hold, method, path, body, authorization, action string
		until                                                 int
	}{
		{"a change until the port is closed", row, "PATCH", "/agents/" + id, `{"version":"2.0.0"}`, "Bearer " + p.bearer, agentUpdated, closed},
		{"a token until the port is closed", log, "POST", "/token", "grant_type=client_credentials", basic(id, secret), tokenIssued, closed},
		// Else the next request on its connection may be cut when the port is closed.
		{"a change until health is 503", row, "PATCH", "/agents/" + id, `{"version":"3.0.0"}`, "Bearer " + p.bearer, agentUpdated, drained},
		{"a change until a second SIGTERM", row, "PATCH", "/agents/" + id, `{"version":"4.0.0"}`, "Bearer " + p.bearer, agentUpdated, again},
	} {
		t.Run(r.name, func(t *testing.T) {
			p.want(p.grant(id, secret, ""), 200, "") // so that nothing waits for bcrypt
			requestID := newID()
			let, answered := p.begin(r.hold, r.method, r.path, r.body, r.authorization, requestID)
			p.cmd.Process.Signal(syscall.SIGTERM)
			p.eventually("health is 503", func() bool { return p.service.ready() == 503 })
			if r.until == closed {
				p.eventually("the port is closed", func() bool { return p.service.ready() == 0 })
			}
			begun, events := time.Now(), 1
			if r.until == again {
				p.cmd.Process.Signal(syscall.SIGTERM)
				events = 0
			} else {
				let()
			}
			select {
			case <-p.exited:
			case <-time.After(15 * time.Second):
				t.Fatal("the copy has not ended")
			}
			took := time.Since(begun)
			if e := <-answered; r.until != again {
				if e.status != 200 || !e.closed {
					t.Errorf("it is answered %v (%v), and that ends its connection: %v, want 200 and true", e, e.err, e.closed)
				}
				if p.err != nil {
					t.Errorf("the copy has ended with %v, want status 0", p.err)
				}
			} else if p.err == nil || took > requestTimeout*4/5 || e.err == nil { // which the request itself has
				t.Errorf("the copy has ended after %s with %v, and the answer %v, want it cut at once", took, p.err, e)
			}
			let()
			p.start()
			var found int
			err := p.db.QueryRow(context.Background(), `
				select count(*) from audit_events where action = $1 and metadata->>'requestId' = $2`, r.action, requestID).Scan(&found)
			if err != nil || found != events {
				t.Errorf("it has %d events (%v), want %d", found, err, events)
			}
		})
	}
}

// follow makes p, whatever it was, a standby of this primary, whose commits
// wait for it from then on.
func (p *postgresServer) follow(primary *postgresServer) {
	p.t.Helper()
	if err := os.RemoveAll(p.data()); err != nil {
		p.t.Fatal(err)
	}
	backup := p.run("pg_basebackup", "-D", p.data(), "-d", "host="+primary.folder+" port=5432 user=agentidp",
		"-R", "-X", "stream", "-c", "fast", "--no-sync")
	if <-backup.exited; backup.err != nil {
		p.t.Fatalf("pg_basebackup: %v", backup.err)
	}
	p.start()
	// Not on the command line, or it would hold when p is promoted.
	primary.query(`alter system set synchronous_standby_names = '*'`)
	primary.query(`select pg_reload_conf()`)
	(&service{t: p.t}).eventually("the standby is synchronous", func() bool {
		return primary.query(`select coalesce(max(sync_state), '') from pg_stat_replication`) == "sync"
	})
}

// query runs a statement on this very server, and returns its first value.
func (p *postgresServer) query(sql string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, p.url())
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close(ctx)
	rows, err := conn.PgConn().Exec(ctx, sql).ReadAll()
	if err != nil {
		p.t.Fatalf("%s: %v", sql, err)
	}
	if len(rows[0].Rows) == 0 {
		return ""
	}
	return string(rows[0].Rows[0][0])
}

func TestWhatWasAcknowledgedOutlivesAFailOver(t *testing.T) {
	t.Parallel()
	primary := newPostgres(t, "wal_level=replica", "max_wal_senders=10", "hot_standby=on")
	standby := postgresFolder(t, primary.settings...)
	standby.follow(primary)
	hosts := "postgres:///postgres?user=agentidp&port=5432,5432&target_session_attrs=read-write&host=" + primary.folder + "," + standby.folder
	store := newRedisServer(t)
	p, q := newPair(t, hosts, store.url(), crashLimits...)
	l := startLoad(p, 8, false, p.url, q.url)
	for i := range rounds(3, 12) {
		time.Sleep(time.Duration(500+rand.IntN(500)) * time.Millisecond)
		l.checkpoint(p.service)
		if i%3 == 1 { // the standby is away first, and so nothing is acknowledged any more
			standby.kill()
			time.Sleep(300 * time.Millisecond)
		}
		primary.kill()
		if i%3 == 1 {
			standby.start()
		}
		if i%3 == 2 { // only PostgreSQL knows what is revoked
			store.kill()
			store.start()
		}
		time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
		if promoted := standby.query(`select pg_promote()`); promoted != "t" {
			t.Fatalf("pg_promote = %q", promoted)
		}
		begun := time.Now()
		for _, v := range []*program{p, q} {
			p.eventually("a change is acknowledged", func() bool {
				return v.api(p.bearer, "POST", "/agents/"+p.id+"/credentials", "{}").status == 201
			})
		}
		if took := time.Since(begun); took > 10*time.Second {
			t.Errorf("it took %s after the fail-over until both copies were well, want seconds", took)
		} else {
			t.Logf("both copies are well after %s", took)
		}
		primary, standby = standby, primary
		standby.follow(primary)
	}
	l.check(p, q)
}
