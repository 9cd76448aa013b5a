package test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Who is cut off gets nothing done, whatever it has begun; and nobody is kept
// from cutting off: not by limits, not by bcrypt, not by bodies that never end.

// An actor is an agent with all of our scopes but audit:read, and one token.
type actor struct{ id, credentialID, secret, bearer string }

// newCutter is a program whose key the test has, so that it can sign tokens,
// with a connection for each of many requests that wait at once.
func newCutter(t *testing.T, env ...string) *program {
	t.Helper()
	database, err := url.Parse(newDatabase(t))
	if err != nil {
		t.Fatal(err)
	}
	q := database.Query()
	q.Set("pool_max_conns", "20")
	database.RawQuery = q.Encode()
	return newProgram(t, database.String(), newRedis(t), env...)
}

func (p *program) newActor() (a actor) {
	p.t.Helper()
	a.id = p.newAgent(strings.Fields(scopesOfActors)...)
	a.credentialID, a.secret = p.quickCredential(a.id)
	a.bearer = p.bearerFor(a, scopesOfActors)
	return a
}

const scopesOfActors = agentsRead + " " + agentsWrite + " " + tokensRead + " " + credentialsWrite

// bearerFor makes a token as the actor would be given one for its secret.
func (p *program) bearerFor(a actor, scope string) string {
	p.t.Helper()
	now := time.Now().Unix()
	return p.sign(claims{
		Issuer: p.env["ISSUER"], Subject: a.id, Audience: audience{p.env["ISSUER"]}, ClientID: a.id, Scope: scope,
		ID: newID(), IssuedAt: now, Expires: now + 600, CredentialID: a.credentialID, SecretID: p.secretOf(a.id, a.credentialID),
	})
}

// cuts are all ways to end a token. Sql is what each does, for a test that
// commits it when it likes.
var cuts = []struct {
	name string
	do   func(v *program, bearer string, a actor) answer
	sql  string
}{
	{"suspended", func(v *program, bearer string, a actor) answer {
		return v.api(bearer, "PATCH", "/agents/"+a.id, `{"status":"suspended"}`)
	}, `update agents set status = 'suspended' where agent_id = 'AGENT'`},
	{"decommissioned", func(v *program, bearer string, a actor) answer {
		return v.api(bearer, "DELETE", "/agents/"+a.id, "")
	}, `update agents set status = 'decommissioned' where agent_id = 'AGENT';
		update credentials set status = 'revoked', revoked_at = now() where client_id = 'AGENT'`},
	{"credential revoked", func(v *program, bearer string, a actor) answer {
		return v.api(bearer, "DELETE", "/agents/"+a.id+"/credentials/"+a.credentialID, "")
	}, `update credentials set status = 'revoked', revoked_at = now() where credential_id = 'CREDENTIAL'`},
	{"credential rotated", func(v *program, bearer string, a actor) answer {
		return v.api(bearer, "POST", "/agents/"+a.id+"/credentials/"+a.credentialID+"/rotate", "{}")
	}, `update credentials set secret_id = gen_random_uuid(), secret_prefix = '0123456789abcdef' where credential_id = 'CREDENTIAL'`},
	{tokenAlone, func(v *program, bearer string, a actor) answer {
		return v.bearerForm(bearer, "/revoke", "token="+a.bearer)
	}, `insert into token_revocations (jti, expires_at) values ('TOKEN', now() + interval '1 day')`},
}

const tokenAlone = "token revoked" // leaves the secret as good as it was

// done tells whether a cut is acknowledged.
func (a answer) done() bool { return a.status == 200 || a.status == 204 }

// An act is what an actor may do until it is cut off.
type act struct {
	name, method, path, body, authorization string
	status                                  int    // while it may
	action                                  string // in the log
	other                                   bool   // changes another agent
}

func (p *program) acts(a, other actor) []act {
	p.t.Helper()
	self, others, bearer := "/agents/"+a.id, "/agents/"+other.id, "Bearer "+a.bearer
	spare, _ := p.quickCredential(a.id)
	email := fmt.Sprintf("made%d@example.com", agentNumber.Add(1))
	return []act{
		{"itself active", "PATCH", self, `{"status":"active"}`, bearer, 200, agentUpdated, false},
		{"another agent changed", "PATCH", others, `{"owner":"somebody"}`, bearer, 200, agentUpdated, true},
		{"a new agent", "POST", "/agents", agentJSON(email, "resumes:read"), bearer, 201, agentCreated, false},
		{"a secret of its own", "POST", self + "/credentials", `{}`, bearer, 201, credentialGenerated, false},
		{"a secret of another", "POST", others + "/credentials", `{}`, bearer, 201, credentialGenerated, true},
		{"its own rotated", "POST", self + "/credentials/" + spare + "/rotate", `{}`, bearer, 200, credentialRotated, false},
		{"another's rotated", "POST", others + "/credentials/" + other.credentialID + "/rotate", `{}`, bearer, 200, credentialRotated, true},
		{"its own ended", "DELETE", self + "/credentials/" + spare, `{}`, bearer, 204, credentialRevoked, false},
		{"another's ended", "DELETE", others + "/credentials/" + other.credentialID, `{}`, bearer, 204, credentialRevoked, true},
		{"another's token revoked", "POST", "/token/revoke", "token=" + p.bearerFor(other, agentsRead), bearer, 200, tokenRevoked, true},
		{"another's token revoked by the secret", "POST", "/token/revoke", "token=" + p.bearerFor(other, agentsRead), basic(a.id, a.secret), 200, tokenRevoked, true},
		{"its own token revoked by the secret", "POST", "/token/revoke", "token=" + p.bearerFor(a, agentsRead), basic(a.id, a.secret), 200, tokenRevoked, false},
		{"a token", "POST", "/token", "grant_type=client_credentials", basic(a.id, a.secret), 200, tokenIssued, false},
		{"another agent ended", "DELETE", others, `{}`, bearer, 204, agentDecommissioned, true},
	}
}

// padded makes a body long, so that it may take long.
func padded(body string, size int) string {
	if kindOf(body) == "json" {
		return body[:len(body)-1] + strings.Repeat(" ", size-len(body)) + "}"
	}
	return body + "&x=" + strings.Repeat("0", size-len(body)-3)
}

func kindOf(body string) string {
	if strings.HasPrefix(body, "{") {
		return "json"
	}
	return "x-www-form-urlencoded"
}

// A heldRequest is one whose body is being read, but for its last bytes.
type heldRequest struct {
	conn net.Conn
	in   *bufio.Reader
	rest string
}

// hold returns once the copy waits for the rest of the body.
func (v *service) hold(x act, rest int, header ...string) heldRequest {
	v.t.Helper()
	head, body, _ := strings.Cut(plain(x.method, x.path, strings.Join(append([]string{x.authorization, "Expect: 100-continue"}, header...), "\r\n"),
		kindOf(x.body), x.body), "\r\n\r\n")
	conn := v.dial()
	v.t.Cleanup(func() { conn.Close() })
	h := heldRequest{conn, bufio.NewReader(conn), body[len(body)-rest:]}
	io.WriteString(conn, head+"\r\n\r\n")
	if goOn, err := http.ReadResponse(h.in, nil); err != nil || goOn.StatusCode != 100 {
		v.t.Fatalf("%s %s is answered %v, %v, want 100 Continue", x.method, x.path, goOn, err)
	}
	io.WriteString(conn, body[:len(body)-rest])
	return h
}

// answer sends the rest. A connection that was cut has none.
func (h heldRequest) answer() (a answer, err error) {
	io.WriteString(h.conn, h.rest)
	response, err := http.ReadResponse(h.in, nil)
	if err != nil {
		return a, err
	}
	text, err := io.ReadAll(response.Body)
	a = answer{status: response.StatusCode, header: response.Header, raw: string(text)}
	_ = json.Unmarshal(text, &a.body)
	return a, err
}

// wantCutOff wants an answer to be that to somebody who is cut off.
func wantCutOff(t *testing.T, what string, x act, h heldRequest) {
	t.Helper()
	a, err := h.answer()
	late := a.status == 403 && a.code() == "unauthorized_client" && strings.HasPrefix(x.authorization, "Basic") // it is told that it isn't active
	if err != nil || a.status != 401 && !late || secretInLog.MatchString(a.raw) {
		t.Errorf("%s, %s is answered %v (%v), want 401", what, x.name, a, err)
	}
}

// A request whose head was sent before its agent was cut off does nothing once
// its body is there, on any copy.
func TestWhoIsCutOffFinishesNothing(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	copies := []*program{p, p.another()}
	hold := func(acts []act) (list []heldRequest) {
		for i, x := range acts {
			x.body = padded(x.body, 15000)
			list = append(list, copies[i%2].hold(x, 1))
		}
		return list
	}
	acts := p.acts(p.newActor(), p.newActor())
	for i, h := range hold(acts) {
		if a, err := h.answer(); err != nil || a.status != acts[i].status {
			t.Errorf("%s is answered %v (%v), want %d", acts[i].name, a, err, acts[i].status)
		}
	}
	for _, c := range cuts {
		for _, by := range copies {
			a := p.newActor()
			acts := p.acts(a, p.newActor())
			if c.name == tokenAlone {
				acts = slices.DeleteFunc(acts, func(x act) bool { return strings.HasPrefix(x.authorization, "Basic") })
			}
			copies[0].grant(a.id, a.secret, "") // so that the secret is known to one of them
			list := hold(acts)
			if got := c.do(by, p.bearer, a); !got.done() {
				t.Fatalf("%s is answered %v, want 200 or 204", c.name, got)
			}
			before := p.stateOf()
			for i, h := range list {
				wantCutOff(t, c.name, acts[i], h)
			}
			if p.stateOf() != before {
				t.Errorf("%s, and what was held changed something", c.name)
			}
		}
	}
}

// locked counts who waits for a lock in this database.
func (p *program) locked() int {
	p.t.Helper()
	return p.count(`select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`)
}

// begun runs SQL in a transaction that the test ends.
func (v *service) begun(sql string) pgx.Tx {
	v.t.Helper()
	tx, err := v.db.Begin(context.Background())
	if err == nil {
		_, err = tx.Exec(context.Background(), sql)
	}
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { tx.Rollback(context.Background()) })
	return tx
}

// A change that was let in, and then had to wait for a row while its agent was
// cut off, is refused, and recorded as that.
func TestChangeThatWaitedIsRefusedOnceItsAgentIsCutOff(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	q := p.another()
	refuses := func(what string, acts []act, during string, cut func(tx pgx.Tx)) {
		t.Helper()
		tx := p.begun(during)
		var list []heldRequest
		var ids []string
		for i, x := range acts {
			ids = append(ids, newID())
			list = append(list, []*program{p, q}[i%2].hold(x, 0, "X-Request-Id: "+ids[i]))
		}
		p.eventually("all of them wait", func() bool { return p.locked() == len(acts) })
		cut(tx)
		before := p.stateOf()
		tx.Rollback(context.Background()) // if it isn't committed yet
		for i, x := range acts {
			wantCutOff(t, what, x, list[i])
			n := p.count(`select count(*) filter (where action = $2 and outcome = 'failure') + 10 * count(*) filter (where outcome = 'success')
				from audit_events where metadata->>'requestId' = $1`, ids[i], x.action)
			if n != 1 {
				t.Errorf("%s, %s has %d failures and %d successes in the log, want one failure", what, x.name, n%10, n/10)
			}
		}
		if p.stateOf() != before {
			t.Errorf("%s, and what waited changed something", what)
		}
	}
	only := func(acts []act, name string, othersAlone bool) []act {
		return slices.DeleteFunc(acts, func(x act) bool {
			return x.action == tokenIssued || othersAlone && !x.other || name == tokenAlone && strings.HasPrefix(x.authorization, "Basic")
		})
	}
	for _, c := range cuts {
		other := p.newActor() // is first in the order of locks, so that nobody who waits for it holds the actor's row
		a := p.newActor()
		lock := `select from agents where agent_id = 'AGENT' for update;`
		refuses(c.name, only(p.acts(a, other), c.name, true), strings.ReplaceAll(lock, "AGENT", other.id), func(pgx.Tx) {
			if got := c.do(q, p.bearer, a); !got.done() {
				t.Fatalf("%s is answered %v, want 200 or 204", c.name, got)
			}
		})
		a = p.newActor()
		sql := strings.NewReplacer("AGENT", a.id, "CREDENTIAL", a.credentialID, "TOKEN", jti(t, a.bearer)).Replace(lock + c.sql)
		refuses(c.name+" meanwhile", only(p.acts(a, p.newActor()), c.name, false), sql, func(tx pgx.Tx) {
			if err := tx.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
		})
		// In the other order the cut waits for the change.
		a = p.newActor()
		other = p.newActor()
		acts := p.acts(a, other)
		tx := p.begun(strings.ReplaceAll(lock, "AGENT", other.id))
		first := p.hold(acts[1], 0)
		p.eventually("the change waits", func() bool { return p.locked() == 1 })
		second := make(chan answer, 1)
		go func() { second <- c.do(q, p.bearer, a) }()
		p.eventually("the cut waits too, or is done", func() bool { return p.locked() == 2 || len(second) == 1 })
		if len(second) == 1 {
			t.Errorf("%s is answered %v while a change of the agent goes on", c.name, <-second)
		}
		tx.Rollback(context.Background())
		if got, err := first.answer(); err != nil || got.status != 200 {
			t.Errorf("a change that was first is answered %v (%v), want 200", got, err)
		}
		if got := <-second; !got.done() {
			t.Errorf("%s after it is answered %v", c.name, got)
		}
	}
}

// Of two agents that cut each other off at once, on two copies, one does.
func TestOfTwoThatCutEachOtherOffOneDoes(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	q := p.another()
	for _, c := range cuts {
		won := [2]int{}
		for range rounds(10, 100) {
			pair := [2]actor{p.newActor(), p.newActor()}
			var got [2]answer
			var group sync.WaitGroup
			for i, v := range []*program{p, q} {
				group.Go(func() { got[i] = c.do(v, pair[i].bearer, pair[1-i]) })
			}
			group.Wait()
			winner := slices.IndexFunc(got[:], answer.done)
			if winner < 0 || got[1-winner].status != 401 {
				t.Fatalf("two agents, each %s by the other, are answered %v, want one success and one 401", c.name, got)
			}
			won[winner]++
			for i, a := range pair {
				if status := p.api(a.bearer, "GET", "/agents/"+a.id, "").status; (status == 200) != (i == winner) {
					t.Fatalf("%s: then agent %d, of which %d won, is answered %d", c.name, i, winner, status)
				}
			}
		}
		t.Logf("%s: the one on either copy won %v", c.name, won)
	}
}

// An agent can cut itself off, and then not undo it; who else does that brings
// back what has not expired, and nothing that was ended for itself.
func TestWhoCutItselfOffStaysSo(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	active := func(bearer, id string) answer { return p.api(bearer, "PATCH", "/agents/"+id, `{"status":"active"}`) }
	for _, c := range cuts {
		a := p.newActor()
		own, second := "/agents/"+a.id, a
		second.credentialID, second.secret = p.quickCredential(a.id)
		second.bearer = p.bearerFor(second, scopesOfActors)
		rotated, single := a, p.bearerFor(second, scopesOfActors)
		rotated.credentialID, _ = p.quickCredential(a.id)
		rotated.bearer = p.bearerFor(rotated, scopesOfActors)
		p.want(p.api(a.bearer, "PATCH", own, `{"owner":"itself"}`), 200, "")
		p.want(p.api(a.bearer, "POST", own+"/credentials/"+rotated.credentialID+"/rotate", "{}"), 200, "")
		p.want(p.bearerForm(a.bearer, "/revoke", "token="+single), 200, "")
		if got := c.do(p, a.bearer, a); !got.done() {
			t.Errorf("an agent that has itself %s is answered %v", c.name, got)
		}
		p.want(active(a.bearer, a.id), 401, "UNAUTHORIZED")
		if c.name != "suspended" && c.name != "decommissioned" {
			p.want(active(second.bearer, a.id), 200, "")
			continue
		}
		p.want(active(second.bearer, a.id), 401, "UNAUTHORIZED")
		for _, path := range []string{"", "/introspect", "/revoke"} {
			if got := p.form(a.id, second.secret, path, "grant_type=client_credentials&token="+a.bearer); got.status != 401 && got.status != 403 {
				t.Errorf("an agent that is %s gets from /token%s %v", c.name, path, got)
			}
		}
		want := map[bool]int{true: 200, false: 401}
		revived := active(p.bearer, a.id).status == 200
		if revived != (c.name == "suspended") {
			t.Errorf("another brings an agent back that is %s: %v", c.name, revived)
		}
		for what, token := range map[string]struct {
			text string
			good bool
		}{
			"its token": {a.bearer, revived}, "one of another credential": {second.bearer, revived},
			"one of a rotated credential": {rotated.bearer, false}, "a revoked one": {single, false},
		} {
			if got := p.api(token.text, "GET", own, ""); got.status != want[token.good] {
				t.Errorf("%s, then set active, %s is answered %v, want %d", c.name, what, got, want[token.good])
			}
		}
	}
}

// Whatever who has stolen a narrow token asks for, and however often: its client
// can end it, and do all else that it needs for that.
func TestThiefOfANarrowTokenHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	const limit = 20
	p := newCutter(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit))
	q := p.another()
	floods := map[string]func(token, other string) answer{
		"GETs":              func(token, _ string) answer { return q.api(token, "GET", "/agents", "") },
		"forbidden changes": func(token, other string) answer { return q.api(token, "PATCH", "/agents/"+other, `{"owner":"x"}`) },
		"registrations": func(token, _ string) answer {
			return q.api(token, "POST", "/agents", agentJSON("x@example.com", "a:b"))
		},
		"introspections": func(token, _ string) answer { return q.bearerForm(token, "/introspect", "token="+token) },
		"revocations":    func(token, _ string) answer { return q.bearerForm(token, "/revoke", "token=x") },
	}
	for what, flood := range floods {
		p.withinAMinute(func(int64, time.Duration) {
			p.forget()
			client, other := p.newActor(), p.newAgent("resumes:read")
			spare, _ := p.quickCredential(client.id)
			stolen := p.bearerFor(client, agentsRead)
			got := atOnce(3*limit, func(int) answer { return flood(stolen, other) })
			if got[429] != 2*limit {
				t.Errorf("%d %s of one token are answered %v, want all but %d refused", 3*limit, what, got, limit)
			}
			ending := func(does string, a answer, status int) {
				t.Helper()
				if a.status != status {
					t.Errorf("beside %s, %s is answered %v, want %d", what, does, a, status)
				}
			}
			a := p.grant(client.id, client.secret, "")
			ending("a token", a, 200)
			fresh := a.text("access_token")
			ending("an introspection by the secret", p.form(client.id, client.secret, "/introspect", "token="+stolen), 200)
			ending("suspending another", p.api(fresh, "PATCH", "/agents/"+other, `{"status":"suspended"}`), 200)
			ending("rotating a secret", p.api(fresh, "POST", "/agents/"+client.id+"/credentials/"+spare+"/rotate", "{}"), 200)
			ending("ending a credential", p.api(fresh, "DELETE", "/agents/"+client.id+"/credentials/"+spare, ""), 204)
			got = atOnce(2*limit, func(int) answer { return p.form(client.id, client.secret, "/introspect", "token=x") })
			if got[429] == 0 {
				t.Errorf("%d introspections are answered %v, want some refused", 2*limit, got)
			}
			ending("revoking it by the secret, whose window is spent,", p.form(client.id, client.secret, "/revoke", "token="+stolen), 200)
			ending("what was stolen", flood(stolen, other), 401)
		})
	}
}

// A dead token spends nobody's budget.
func TestDeadTokenSpendsNoBudget(t *testing.T) {
	t.Parallel()
	const limit = 20
	p := newCutter(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit))
	q := p.another()
	for _, c := range cuts {
		if c.name == "decommissioned" { // has nothing left that lives
			continue
		}
		p.withinAMinute(func(int64, time.Duration) {
			p.forget()
			a := p.newActor()
			live := a
			live.credentialID, live.secret = p.quickCredential(a.id)
			live.bearer = p.bearerFor(live, scopesOfActors)
			c.do(p, p.bearer, a)
			got := atOnce(300, func(i int) answer {
				v := []*program{p, q}[i%2]
				switch i / 2 % 4 {
				case 0:
					return v.api(a.bearer, "GET", "/agents/"+a.id, "")
				case 1:
					return v.api(a.bearer, "PATCH", "/agents/"+a.id, `{"status":"active"}`)
				case 2:
					return v.bearerForm(a.bearer, "/introspect", "token="+live.bearer)
				}
				return v.bearerForm(a.bearer, "/revoke", "token="+live.bearer)
			})
			if got[401] != 300 {
				t.Errorf("%s: 300 uses of a dead token are answered %v, want 401", c.name, got)
			}
			if c.name == "suspended" {
				p.want(p.api(p.bearer, "PATCH", "/agents/"+a.id, `{"status":"active"}`), 200, "")
			}
			for what, got := range map[string]answer{
				"a GET": p.api(live.bearer, "GET", "/agents/"+a.id, ""), "a change": p.api(live.bearer, "PATCH", "/agents/"+a.id, `{"owner":"x"}`),
				"the secret": p.form(a.id, live.secret, "/introspect", "token=x"),
			} {
				if left := got.number(t, "X-RateLimit-Remaining"); got.status != 200 || left != limit-1 {
					t.Errorf("%s: then %s is answered %v, and %d requests are left, want %d", c.name, what, got, left, limit-1)
				}
			}
		})
	}
}

// What has ended is never compared, and is told from nothing that never was.
func TestSecretsThatHaveEndedAreNotCompared(t *testing.T) {
	t.Parallel()
	p := newCutter(t, "METRICS_ADDR", metricsOn)
	wrongOf := func(secret string) string { return secret[:24] + strings.Repeat("0", 48) }
	shown := func(id, secret string) (list []string) {
		for where, a := range p.everyAuthentication(id, secret) {
			for _, name := range []string{"Date", "X-Request-Id"} {
				a.header.Del(name)
			}
			list = append(list, fmt.Sprint(where, a, a.header))
		}
		slices.Sort(list)
		return list
	}
	unknown := shown(newID(), newSecret())
	live := p.newActor()
	p.moves("a wrong secret of a live credential", func() { p.grant(live.id, wrongOf(live.secret), "") }, map[string]float64{cold: 1})
	for what, end := range map[string]func(a actor){
		"revoked":        func(a actor) { cuts[2].do(p, p.bearer, a) },
		"expired":        func(a actor) { p.setExpiry(a.credentialID, time.Now().Add(-time.Hour)) },
		"decommissioned": func(a actor) { cuts[1].do(p, p.bearer, a) },
	} {
		a := p.newActor()
		end(a)
		p.moves(what, func() {
			for which, secret := range map[string]string{"a wrong secret": wrongOf(a.secret), "the right secret": a.secret} {
				if got := shown(a.id, secret); !slices.Equal(got, unknown) {
					t.Errorf("%s: %s is answered\n%q, want what an unknown client gets:\n%q", what, which, got, unknown)
				}
			}
		}, map[string]float64{cold: 0})
	}
}

// Who has many wrong secrets, and knows to whom they would belong, makes one who
// is right wait for about one of each of his addresses, not for all of them. How
// long one takes is measured beside.
func TestRightSecretIsNotStarvedByWrongOnes(t *testing.T) {
	const addresses, hands = 16, 20
	p := newCutter(t, "RATE_LIMIT_PER_MINUTE", "10000", "TRUSTED_PROXIES", "127.0.0.1/32")
	token := func(id, secret, from string) answer {
		return p.do("POST", "/api/v1/token", "grant_type=client_credentials", "Content-Type", formType,
			"Authorization", basic(id, secret), "X-Forwarded-For", from)
	}
	wrong := p.secret[:24] + strings.Repeat("0", 48) // its hash takes as long as any
	var compared, inVain, others atomic.Int64
	var stopping atomic.Bool
	var group sync.WaitGroup
	halt := func() { stopping.Store(true); group.Wait() }
	t.Cleanup(halt)
	for i := range addresses * hands {
		group.Go(func() {
			for !stopping.Load() {
				switch token(p.id, wrong, fmt.Sprintf("203.0.113.%d", i%addresses)).status {
				case 401:
					compared.Add(1)
				case 503:
					inVain.Add(1)
				default:
					others.Add(1)
				}
			}
		})
	}
	client := p.newActor()
	p.eventually("wrong secrets are compared", func() bool { return compared.Load() > addresses })
	within, one := 0, time.Duration(0)
	for i := range 3 { // an address may share its lane with one of those, if rarely
		begun, making := compared.Load(), time.Now()
		made := p.api(p.bearer, "POST", "/agents/"+client.id+"/credentials", "{}")
		between, asked := compared.Load(), time.Now()
		one = max(one, asked.Sub(making))
		if made.status != 201 || between-begun > addresses/2 {
			t.Errorf("meanwhile a new secret is answered %d after %d comparisons, want 201 after one or two", made.status, between-begun)
			continue
		}
		a := token(client.id, made.text("clientSecret"), fmt.Sprintf("198.51.100.%d", i))
		waited, took := compared.Load()-between, time.Since(asked)
		t.Logf("making a secret took %d comparisons and %s, its first token %d and %s: %d", between-begun, asked.Sub(making), waited, took, a.status)
		if a.status == 200 && waited <= 3*addresses && took < 3*addresses*one {
			within++
		}
	}
	if within < 2 {
		t.Errorf("of 3 right secrets %d were served after at most %d wrong ones, want all", within, 3*addresses)
	}
	p.eventually("somebody has waited in vain", func() bool { return inVain.Load() > 0 })
	halt()
	sum := 0
	for i := range addresses {
		sum += p.counted(fmt.Sprintf("ip:203.0.113.%d", i))
	}
	// Few may miss, where Redis has not answered in time.
	if got := int64(sum); others.Load() > 0 || got < compared.Load()+inVain.Load()*9/10 || got > compared.Load()+inVain.Load() {
		t.Errorf("%d failures are counted, want %d that were wrong and %d that waited in vain (and %d others)",
			sum, compared.Load(), inVain.Load(), others.Load())
	}
}

// Where there are too many unfinished bodies, of one address or in sum, the
// oldest is cut, and all others can be finished.
func TestOldestUnfinishedBodyMakesRoom(t *testing.T) {
	p := newCutter(t, "TRUSTED_PROXIES", "127.0.0.1/32")
	const more = 40
	for what, row := range map[string]struct{ most, addresses int }{"of one address": {maxBodiesOf, 1}, "in sum": {maxBodies, 16}} {
		tries := 0
		for took := time.Hour; took > 3*time.Second; tries++ { // or the first have had their time
			if tries == 5 {
				t.Fatalf("%s: %d bodies can't be begun in less than %s", what, row.most+more, took)
			}
			begun := time.Now()
			var list []heldRequest
			for i := range row.most + more {
				x := act{method: "POST", path: "/agents", body: padded("{}", 16000)}
				list = append(list, p.hold(x, 1, fmt.Sprintf("X-Forwarded-For: 203.0.113.%d", i%row.addresses)))
			}
			if took = time.Since(begun); took > 3*time.Second {
				continue
			}
			cut := 0
			for _, h := range list[:more] {
				h.rest = "" // what it was told can be read before more is sent
				h.conn.SetReadDeadline(begun.Add(4500 * time.Millisecond))
				a, err := h.answer()
				if timeout, ok := errors.AsType[net.Error](err); a.status == 400 || a.status == 0 && !(ok && timeout.Timeout()) {
					cut++
				}
			}
			finished := 0
			for _, h := range list[more:] {
				if a, _ := h.answer(); a.status == 401 {
					finished++
				}
			}
			if cut != more || finished != row.most {
				t.Errorf("%s, of the first %d of %d unfinished bodies %d were cut, and %d others could be finished, want all", what, more, len(list), cut, finished)
			}
			for _, h := range list {
				h.conn.Close()
			}
		}
	}
}

// Unfinished bodies, more than may be, take neither the places of others nor
// their time: not even those of who comes from the same address.
func TestUnfinishedBodiesTakeNobodysPlace(t *testing.T) {
	const multiple = 25 // of the quiet time, at the median
	p := newCutter(t, "TRUSTED_PROXIES", "127.0.0.1/32")
	median := func(what string) time.Duration {
		t.Helper()
		var took []time.Duration
		for range 40 {
			begun := time.Now()
			if a := p.form(p.id, p.secret, "/introspect", "token="+p.bearer); a.status != 200 || a.body["active"] != true {
				t.Errorf("beside %s an introspection is answered %v, want it active", what, a)
			}
			took = append(took, time.Since(begun))
		}
		slices.Sort(took)
		return max(took[len(took)/2], time.Millisecond)
	}
	quiet := median("nothing")
	half := strings.Repeat("x", 4000)
	for kind, x := range map[string]act{
		"JSON of somebody": {method: "POST", path: "/agents", body: `{"email":"` + half + `"}`, authorization: "Bearer " + p.bearer},
		"JSON of nobody":   {method: "POST", path: "/agents", body: `{"email":"` + half + `"}`},
		"forms":            {method: "POST", path: "/token", body: "grant_type=" + half},
	} {
		for from, addresses := range map[string]int{"the same address": 0, "many addresses": 250} {
			text := plain(x.method, x.path, cmp.Or(x.authorization, "Basic")+"\r\nX-Forwarded-For: ADDRESS", kindOf(x.body), x.body)
			var list []net.Conn
			open := func(i int) {
				address := "127.0.0.1"
				if addresses > 0 {
					address = fmt.Sprintf("203.0.113.%d", i%addresses)
				}
				conn := p.dial()
				list = append(list, conn)
				io.WriteString(conn, strings.Replace(text[:len(text)-1000], "ADDRESS", address, 1))
			}
			for i := range 1100 {
				open(i)
			}
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() { // and they go on coming
				defer close(stopped)
				for i := range 5000 {
					select {
					case <-stop:
						return
					case <-time.After(2 * time.Millisecond):
						open(i)
					}
				}
			}()
			what := kind + " from " + from
			if busy := median(what); busy > multiple*quiet {
				t.Errorf("beside %s an introspection takes %s, want at most %d times the %s of before", what, busy, multiple, quiet)
			}
			p.serves()
			close(stop)
			<-stopped
			for _, conn := range list {
				conn.Close()
			}
		}
	}
}

// Half-sent forms, however many, take little memory.
func TestHalfSentFormsTakeLittleMemory(t *testing.T) {
	var files syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files)
	if files.Cur = files.Max; err == nil {
		err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files)
	}
	if err != nil {
		t.Fatal(err)
	}
	forms := min(8000, int(files.Max)-500)
	p := newCutter(t, "TRUSTED_PROXIES", "127.0.0.1/32", "GOGC", "50") // so that it is what lives, and little else
	p.serves()
	before, most := p.memory(t), 0.0
	body := strings.Repeat("x", 16000)
	for i := range forms {
		conn := p.dial()
		defer conn.Close()
		fmt.Fprintf(conn, "POST /api/v1/token HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.%d.%d\r\nContent-Type: %s\r\nContent-Length: 64000\r\n\r\n%s",
			i/250, i%250, formType, body)
		if i%100 == 0 || i == forms-1 {
			most = max(most, p.memory(t))
		}
	}
	p.serves()
	t.Logf("%d half-sent forms: from %.0f MB to %.0f MB", forms, before, max(most, p.memory(t)))
	if most = max(most, p.memory(t)); most > before+200 {
		t.Errorf("with %d half-sent forms the memory rises from %.0f MB to %.0f MB, want at most 200 MB more", forms, before, most)
	}
}

// A body has the time that its size allows, and no longer; what comes in that
// time is answered like any other.
func TestBodyHasTheTimeOfItsSize(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	head := "POST /api/v1/token HTTP/1.1\r\nHost: x\r\nContent-Type: " + formType + "\r\n"
	for _, row := range []struct {
		name, header string
		size         int // that it is taken for
	}{
		{"few bytes", "Content-Length: 200", 200}, {"8 kB", "Content-Length: 8192", 8192}, {"16 kB", "Content-Length: 16384", 16384},
		{"1 GB", "Content-Length: 1000000000", 16384}, {"chunks", "Transfer-Encoding: chunked", 16384},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			allowed := bodyTime + bodyTime*time.Duration(row.size)/bodyPace
			q := *p.service
			q.t = t
			conn := q.dial()
			defer conn.Close()
			io.WriteString(conn, head+row.header+"\r\n\r\n")
			begun, ended := time.Now(), make(chan struct{})
			go func() {
				defer close(ended)
				io.Copy(io.Discard, conn)
			}()
			dribble := "x"
			if row.name == "chunks" {
				dribble = "1\r\nx\r\n"
			}
			for over := false; !over; {
				io.WriteString(conn, dribble) // fails in the end
				select {
				case <-ended:
					over = true
				case <-time.After(100 * time.Millisecond):
				}
			}
			if took := time.Since(begun); took < allowed*9/10 || took > allowed+2*time.Second {
				t.Errorf("a body that dribbles in is cut after %s, want %s", took, allowed)
			}
		})
	}
	t.Run("just in time", func(t *testing.T) {
		t.Parallel()
		q := *p.service
		q.t = t
		allowed := bodyTime + bodyTime*16000/bodyPace
		for last := time.Duration(0); last == 0 || last > allowed; { // again where this machine was late with the rest
			begun := time.Now()
			h := q.hold(act{method: "POST", path: "/token/introspect", body: padded("token=x", 16000), authorization: "Bearer " + p.bearer}, 1)
			time.Sleep(time.Until(begun.Add(allowed * 9 / 10)))
			a, err := h.answer()
			if last = time.Since(begun); last < allowed && (err != nil || a.status != 200) {
				t.Errorf("a body that comes in its time is answered %v (%v), want 200", a, err)
			}
		}
	})
	t.Run("a connection goes on", func(t *testing.T) {
		t.Parallel()
		a, k := p.newActor(), keptConn{address: strings.TrimPrefix(p.url, "http://")}
		defer k.close()
		tx := p.begun(`select from agents where agent_id = '` + a.id + `' for update`)
		let := make(chan struct{})
		time.AfterFunc(bodyTime*3/2, func() { tx.Rollback(context.Background()); close(let) })
		defer func() { <-let }()
		for range 2 { // the first waits longer than its body may take
			q, _ := http.NewRequest("PATCH", p.url+"/api/v1/agents/"+a.id, strings.NewReader(`{"owner":"x"}`))
			q.Header.Set("Authorization", "Bearer "+p.bearer)
			q.Header.Set("Content-Type", "application/json")
			got, err := k.do(q)
			if err != nil || got.status != 200 || k.conn == nil {
				t.Fatalf("a request that waits is answered %v (%v), and its connection goes on: %v, want 200 and true", got, err, k.conn != nil)
			}
		}
	})
}

// A body of 16 kB can be used, and one byte more is too much, in every form.
func TestBodyOfOneByteTooMuchIsRefused(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	for size, want := range map[int]map[string]int{
		maxBody:     {"JSON of somebody": 200, "JSON of nobody": 401, "forms": 200},
		maxBody + 1: {"JSON of somebody": 413, "JSON of nobody": 413, "forms": 413},
	} {
		for kind, x := range map[string]act{
			"JSON of somebody": {method: "PATCH", path: "/agents/" + p.id, body: `{"owner":"x"}`, authorization: "Bearer " + p.bearer},
			"JSON of nobody":   {method: "PATCH", path: "/agents/" + p.id, body: `{"owner":"x"}`},
			"forms":            {method: "POST", path: "/token", body: "grant_type=client_credentials", authorization: basic(p.id, p.secret)},
		} {
			text := plain(x.method, x.path, x.authorization, kindOf(x.body), padded(x.body, size))
			length := fmt.Sprintf("Content-Length: %d\r\n\r\n", size)
			chunked := strings.Replace(text, length, fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n", size), 1) + "\r\n0\r\n\r\n"
			for how, text := range map[string]string{"at once": text, "in a chunk": chunked} {
				if a := p.raw(text); a.status != want[kind] {
					t.Errorf("%s of %d bytes %s is answered %v, want %d", kind, size, how, a, want[kind])
				}
			}
		}
	}
}
