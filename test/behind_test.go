package test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// What a cut-off agent is given: nothing that the log has behind the cut, and
// nothing that is answered long after it.

// While the chain is held, a cut waits for it, and behind that a token and an
// introspection of copies that have let them in before.
func TestNothingIsGivenOutBehindACut(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	q := p.another()
	for _, c := range cuts {
		a, asker := p.newActor(), p.newActor()
		q.grant(a.id, a.secret, "") // so that nobody waits for bcrypt
		q.grant(asker.id, asker.secret, "")
		before := p.count(`select max(seq) from audit_events`)
		tx := p.lockChain()
		cut, token, known, own := make(chan answer, 1), make(chan answer, 1), make(chan answer, 1), make(chan answer, 1)
		go func() { cut <- c.do(p, p.bearer, a) }()
		p.eventually("the cut waits for the chain", func() bool { return p.waiting() == 1 })
		go func() { token <- q.form(a.id, a.secret, "", "grant_type=client_credentials") }()
		go func() { known <- q.form(asker.id, asker.secret, "/introspect", "token="+a.bearer) }()
		go func() { own <- q.bearerForm(a.bearer, "/introspect", "token="+asker.bearer) }()
		p.eventually("what it lets in waits behind it", func() bool { return p.waiting() == 2 })
		time.Sleep(200 * time.Millisecond) // and the rest is in the queue
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := <-cut; !got.done() {
			t.Fatalf("%s is answered %v", c.name, got)
		}
		if got := <-token; (got.status == 200) != (c.name == tokenAlone) {
			t.Errorf("%s, and behind it a token is answered %v", c.name, got)
		}
		if got := <-known; got.status != 200 || got.body["active"] != false {
			t.Errorf("%s, and behind it an introspection is answered %v, want inactive", c.name, got)
		}
		if got := <-own; got.status != 401 {
			t.Errorf("%s, and behind it one by its token is answered %v, want 401", c.name, got)
		}
		if n := p.count(`select count(*) from audit_events where seq > $1 and outcome = 'success' and agent_id = $2
			and (action = 'token.issued' and $3 or action = 'token.introspected' and metadata->>'active' = 'true')`, before, a.id, c.name != tokenAlone); n != 0 {
			t.Errorf("%s: %d events say that it was given something behind that", c.name, n)
		}
	}
}

// The same without a hand that holds anything: whatever the order is, the log
// has it.
func TestLogHasNoSuccessBehindACut(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	copies := []*program{p, p.another()}
	for range rounds(8, 60) {
		a := p.newActor()
		for _, v := range copies {
			v.grant(a.id, a.secret, "")
		}
		var group sync.WaitGroup
		for i := range 12 {
			v := copies[i%2]
			group.Go(func() {
				for range 10 {
					if i%3 == 0 {
						v.form(p.id, p.secret, "/introspect", "token="+a.bearer)
					} else {
						v.form(a.id, a.secret, "", "grant_type=client_credentials")
					}
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
		if got := cuts[0].do(copies[rand.IntN(2)], p.bearer, a); !got.done() {
			t.Fatalf("suspending = %v", got)
		}
		group.Wait()
		if n := p.count(`select count(*) from audit_events e where agent_id = $1 and outcome = 'success'
			and (action = 'token.issued' or action = 'token.introspected' and metadata->>'active' = 'true')
			and seq > (select seq from audit_events where agent_id = $1 and action = 'agent.suspended')`, a.id); n != 0 {
			t.Errorf("%d events behind a suspension say that the agent was given something", n)
		}
	}
}

// A secret that ends while its request waits is no longer right.
func TestSecretThatExpiresWhileItWaitsGivesNothing(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	a := p.newActor()
	p.grant(a.id, a.secret, "")
	tx := p.lockChain()
	token := make(chan answer, 1)
	go func() { token <- p.form(a.id, a.secret, "", "grant_type=client_credentials") }()
	p.eventually("it waits for the chain", func() bool { return p.waiting() == 1 })
	p.setExpiry(a.credentialID, time.Now())
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := <-token; got.status != 401 {
		t.Errorf("a secret that has expired meanwhile is answered %v, want 401", got)
	}
}

// A reading that waits for a connection is answered only to who is alive then.
func TestReadingThatWaitedIsOfNobodyWhoIsCutOff(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	database := p.env["DATABASE_URL"] + "&pool_max_conns=1"
	if strings.Contains(database, "pool_max_conns=20") {
		database = strings.Replace(p.env["DATABASE_URL"], "pool_max_conns=20", "pool_max_conns=1", 1)
	}
	narrow := p.another("DATABASE_URL", database)
	for _, c := range cuts {
		a, other, holder := p.newActor(), p.newActor(), p.newActor()
		row, err := p.db.Begin(t.Context())
		if err == nil {
			_, err = row.Exec(t.Context(), `select from agents where agent_id = $1 for update`, other.id)
		}
		if err != nil {
			t.Fatal(err)
		}
		held, read := make(chan answer, 1), make(chan answer, 1)
		go func() { held <- narrow.api(holder.bearer, "PATCH", "/agents/"+other.id, `{"owner":"x"}`) }()
		p.eventually("its one connection waits", func() bool {
			return p.count(`select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query like '%for no key update%'`) == 1
		})
		go func() { read <- narrow.api(a.bearer, "GET", "/agents/"+a.id, "") }()
		time.Sleep(300 * time.Millisecond) // it was found alive, and waits
		if got := c.do(p, p.bearer, a); !got.done() {
			t.Fatalf("%s is answered %v", c.name, got)
		}
		if err := row.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := <-held; got.status != 200 {
			t.Fatalf("%s: the change is answered %v", c.name, got)
		}
		if got := <-read; got.status != 401 {
			t.Errorf("%s, and a reading from before is answered %v, want 401", c.name, got)
		}
	}
}

// Who may change others spends nothing of what an agent needs for itself.
func TestThiefWhoMayChangeOthersLeavesTheAgentItself(t *testing.T) {
	t.Parallel()
	p := newCutter(t, "RATE_LIMIT_PER_MINUTE", "20")
	p.withinAMinute(func(int64, time.Duration) {
		p.forget()
		a := p.newActor()
		stolen := p.bearerFor(a, agentsWrite)
		got := atOnce(60, func(int) answer { return p.api(stolen, "DELETE", "/agents/"+newID(), "") })
		if got[429] == 0 {
			t.Errorf("60 changes by a stolen token are answered %v, want some 429", got)
		}
		if b := p.api(a.bearer, "POST", "/agents/"+a.id+"/credentials/"+a.credentialID+"/rotate", "{}"); b.status != 200 {
			t.Errorf("then rotating is answered %v, want 200", b)
		}
		if b := p.api(stolen, "DELETE", "/agents/"+newID(), ""); b.status != 401 {
			t.Errorf("and what was stolen is answered %v, want 401", b)
		}
	})
}

// What a client may is what its agent may when it is done.
func TestRightThatIsTakenAwayMeanwhileRevokesNothing(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	a, other := p.newActor(), p.newActor()
	p.grant(a.id, a.secret, "")
	tx := p.lockChain()
	taken, revoked := make(chan answer, 1), make(chan answer, 1)
	go func() { taken <- p.api(p.bearer, "PATCH", "/agents/"+a.id, `{"capabilities":["resumes:read"]}`) }()
	p.eventually("it is taken away", func() bool { return p.waiting() == 1 })
	go func() { revoked <- p.form(a.id, a.secret, "/revoke", "token="+url.QueryEscape(other.bearer)) }()
	p.eventually("the revocation waits for the agent's row", func() bool {
		return p.count(`select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query like '%for no key update%'`) == 1
	})
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := <-taken; got.status != 200 {
		t.Fatalf("taking it away is answered %v", got)
	}
	if got := <-revoked; got.status != 400 || got.code() != "invalid_request" {
		t.Errorf("revoking another's token then is answered %v, want 400 invalid_request", got)
	}
	if !p.active(other.bearer) {
		t.Error("the other's token is revoked")
	}
}

// A database that can't keep every text is refused at the start.
func TestStartRefusesADatabaseThatIsNotInUTF8(t *testing.T) {
	t.Parallel()
	postgres := newPostgres(t)
	for _, encoding := range []string{"LATIN1", "SQL_ASCII"} {
		name := strings.ToLower(encoding)
		postgres.query(`create database ` + name + ` encoding '` + encoding + `' template template0 locale 'C'`)
		env := programEnv("postgres:///"+name+"?host="+postgres.folder+"&port=5432&user=agentidp", newRedis(t))
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if _, err := command(ctx, env, testLog, "migrate"); err == nil || !strings.Contains(err.Error(), "UTF8") {
			t.Errorf("on a database in %s migrate ends with %v, want an error that says UTF8", encoding, err)
		}
	}
}

// A token whose ids are none is no token of ours, whoever signed it.
func TestClaimsThatAreNoIDsAreNobodys(t *testing.T) {
	t.Parallel()
	v := newService(t)
	good := readPart(t, v.bearer, 1)
	key, header := privateKey(t, v.env["JWT_PRIVATE_KEY"]), readPart(t, v.bearer, 0)
	var asked atomic.Int64
	var group sync.WaitGroup
	for _, claim := range []string{"sub", "jti", "credential_id", "secret_id"} {
		for _, id := range []string{"x", "", strings.ToUpper(readClaims(t, v.bearer).ID), "{" + newID() + "}", strings.ReplaceAll(newID(), "-", "")} {
			bad := forge(t, key, header, withClaim(t, good, claim, fmt.Sprintf("%q", id)))
			group.Go(func() {
				if a := v.api(bad, "GET", "/agents", ""); a.status != 401 {
					t.Errorf("a token whose %s is %q is answered %v, want 401", claim, id, a)
				}
				if v.isActive(bad) {
					t.Errorf("a token whose %s is %q is active", claim, id)
				}
			})
			group.Go(func() { // beside it
				if a := v.api(v.bearer, "GET", "/agents/"+v.id, ""); a.status == 200 {
					asked.Add(1)
				}
			})
		}
	}
	group.Wait()
	if asked.Load() != 20 {
		t.Errorf("of 20 good requests beside them %d are served", asked.Load())
	}
}

// What an agent may is taken away, and behind that in the log nothing says that it may: who
// was found to be right before is told to come again.
func TestNothingIsGivenOutByWhatWasTakenAway(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	for name, change := range map[string]string{
		"a capability": `{"capabilities":["a:b"]}`, "a resource": `{"resources":["` + store + `"]}`, "time": `{"tokenTtl":60}`, "introspection": `{"capabilities":["a:b","a:c"]}`,
		"a delegate": `{"delegates":[]}`, "a delegate's subject's resource": `{"resources":["` + store + `"]}`, "the worker's capability": `{"capabilities":["a:c"]}`,
	} {
		a, b := v.newParty("a:b", "a:c", tokensRead), v.newParty("a:b", "a:c")
		v.delegate(a, b)
		token, whose := v.tokenFor(a, ""), a
		w.grant(a.id, a.secret, "") // so that nobody waits for bcrypt
		w.grant(b.id, b.secret, "")
		ask := func() answer { return w.grant(a.id, a.secret, "resource="+work) }
		switch name {
		case "introspection":
			ask = func() answer { return w.form(a.id, a.secret, "/introspect", "token="+token) }
		case "the worker's capability":
			whose = b
			fallthrough
		case "a delegate", "a delegate's subject's resource":
			ask = func() answer { return w.exchanges(b, token, "resource", work, "scope", "a:b") }
		}
		v.want(ask(), 200, "")
		before := v.count(`select max(seq) from audit_events`)
		tx := v.lockChain()
		changed, made := make(chan answer, 1), make(chan answer, 1)
		go func() { changed <- v.api(v.bearer, "PATCH", "/agents/"+whose.id, change) }()
		v.eventually("the change waits for the chain", func() bool { return v.waiting() == 1 })
		go func() { made <- ask() }()
		v.eventually("what it lets in waits behind it", func() bool { return v.waiting() == 2 })
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := <-changed; got.status != 200 {
			t.Fatalf("%s: the change is answered %v", name, got)
		}
		if got := <-made; got.status != 503 || got.code() != "temporarily_unavailable" || got.header.Get("Retry-After") != "1" || !strings.Contains(got.raw, "changed meanwhile") {
			t.Errorf("%s is taken away, and behind it answered %v, want 503", name, got)
		}
		if n := v.count(`select count(*) from audit_events where seq > $1 and action like 'token.%'`, before); n != 0 {
			t.Errorf("%s is taken away, and behind it the log has %d events", name, n)
		}
		if got := ask(); got.status == 503 || (got.status == 200) != (name == "time" || name == "a capability") || strings.Contains(got.text("scope"), "a:c") && name != "time" {
			t.Errorf("%s is taken away: a while later answered %v", name, got)
		}
	}
}
