package test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"
)

// A proxy stands between a copy of the service and a store, and can be as bad
// as a network.
type proxy struct {
	network, address string // of the store
	listener         net.Listener

	mu    sync.Mutex
	mode  proxyMode
	conns map[net.Conn]bool
	lost  map[net.Conn]bool // what these send goes nowhere, and nobody is told
}

type proxyMode int

const (
	passing    proxyMode = iota
	refusing             // closes what there is, and every new connection
	swallowing           // takes everything and answers nothing, as a hung store does
	startingUp           // says what PostgreSQL says until it is up
)

func newProxy(t *testing.T, network, address string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{network: network, address: address, listener: listener, conns: map[net.Conn]bool{}}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go p.join(conn)
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		p.set(refusing)
	})
	return p
}

// set changes what the proxy does, to connections that it has, too.
func (p *proxy) set(mode proxyMode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mode = mode
	if mode != swallowing { // what was swallowed can't be made up for
		for conn := range p.conns {
			conn.Close()
		}
		clear(p.conns)
	}
}

func (p *proxy) is(mode proxyMode) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mode == mode
}

func (p *proxy) join(client net.Conn) {
	defer client.Close()
	if p.is(startingUp) {
		const fatal = "SFATAL\x00VFATAL\x00C57P03\x00Mthe database system is starting up\x00\x00"
		client.Read(make([]byte, 1024))
		io.WriteString(client, "E\x00\x00\x00"+string(rune(4+len(fatal)))+fatal)
		return
	}
	store, err := net.Dial(p.network, p.address)
	if err != nil {
		return
	}
	defer store.Close()
	p.mu.Lock()
	refused := p.mode == refusing
	if !refused {
		p.conns[client], p.conns[store] = true, true
	}
	p.mu.Unlock()
	if refused {
		return
	}
	go p.copy(client, store)
	p.copy(store, client)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, client)
	delete(p.conns, store)
}

// lose has every connection that there is end unseen, as a machine's that lost
// its power. New ones pass.
func (p *proxy) lose() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lost, p.conns = p.conns, map[net.Conn]bool{}
}

func (p *proxy) swallows(from net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mode == swallowing || p.lost[from]
}

// copy copies until either side ends, and then ends both.
func (p *proxy) copy(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	b := make([]byte, 32<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		if p.swallows(from) {
			continue
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

// proxyDatabase puts a proxy in front of the DATABASE_URL of env.
func proxyDatabase(t *testing.T, env map[string]string) *proxy {
	t.Helper()
	cfg, err := pgx.ParseConfig(env["DATABASE_URL"])
	if err != nil {
		t.Fatal(err)
	}
	network, address := pgconn.NetworkAddress(cfg.Host, cfg.Port)
	p := newProxy(t, network, address)
	u := url.URL{Scheme: "postgres", User: url.UserPassword(cfg.User, cfg.Password), Host: p.listener.Addr().String(),
		Path: "/" + cfg.Database, RawQuery: "sslmode=disable"}
	env["DATABASE_URL"] = u.String()
	return p
}

// proxyRedis puts a proxy in front of the REDIS_URL of env.
func proxyRedis(t *testing.T, env map[string]string) *proxy {
	t.Helper()
	options, err := redis.ParseURL(env["REDIS_URL"])
	if err != nil {
		t.Fatal(err)
	}
	p := newProxy(t, options.Network, options.Addr)
	u := url.URL{Scheme: "redis", Host: p.listener.Addr().String(), Path: fmt.Sprintf("/%d", options.DB)}
	if options.Password != "" {
		u.User = url.UserPassword(options.Username, options.Password)
	}
	env["REDIS_URL"] = u.String()
	return p
}

// A trial holds tokens that must be refused, and others that must not.
type trial struct {
	*service
	dead map[string]string // by what was revoked
	live map[string]string
}

// newTrial revokes in every way that there is.
func newTrial(v *service) *trial {
	v.t.Helper()
	tr := &trial{v, map[string]string{}, map[string]string{}}
	id := v.newAgent("resumes:read")
	tr.dead["a token"], tr.live["another token"] = v.mint(id, newID()), v.mint(id, newID())
	v.want(v.bearerForm(v.bearer, "/revoke", "token="+tr.dead["a token"]), 200, "")

	credentialID, _ := v.newCredential(id)
	tr.dead["a credential"] = v.mint(id, credentialID)
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+credentialID, ""), 204, "")

	credentialID, _ = v.newCredential(id)
	tr.dead["the secret before a rotation"] = v.mint(id, credentialID)
	v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials/"+credentialID+"/rotate", "{}"), 200, "")
	tr.live["the secret after a rotation"] = v.mint(id, credentialID)

	for name, statuses := range map[string][]string{
		"a suspended agent": {"suspended"}, "a decommissioned agent": {"decommissioned"}, "a reactivated agent": {"suspended", "active"},
	} {
		id := v.newAgent("resumes:read")
		token := v.mint(id, newID())
		for _, status := range statuses {
			v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"`+status+`"}`), 200, "")
		}
		if name == "a reactivated agent" {
			tr.live[name] = token
		} else {
			tr.dead[name] = token
		}
	}
	return tr
}

// secretOf is the secret_id of a credential, which it makes if there is none.
func (v *service) secretOf(agentID, credentialID string) (secretID string) {
	v.t.Helper()
	if err := v.db.QueryRow(context.Background(), `
		with made as (
			insert into credentials (credential_id, client_id, secret_prefix, secret_hash, secret_id)
			values ($1, $2, substr(md5(random()::text), 1, 16), 'none', gen_random_uuid())
			on conflict (credential_id) do nothing
			returning secret_id)
		select secret_id from made
		union all
		select secret_id from credentials where credential_id = $1`, credentialID, agentID).Scan(&secretID); err != nil {
		v.t.Fatal(err)
	}
	return secretID
}

// mint signs a token as the token endpoint would, and saves the time of bcrypt.
func (v *service) mint(agentID, credentialID string) string {
	v.t.Helper()
	return v.tokenOf(agentID, credentialID, v.secretOf(agentID, credentialID), "resumes:read")
}

// check presents all of them to a copy of the service.
func (tr *trial) check(when string, v *service) {
	tr.t.Helper()
	for want, tokens := range map[bool]map[string]string{false: tr.dead, true: tr.live} {
		for name, token := range tokens {
			if got := v.use(token); got != want {
				tr.t.Errorf("%s, a token of %s is let through: %v, want %v", when, name, got, want)
			}
			if got := v.active(token); got != want {
				tr.t.Errorf("%s, a token of %s is active: %v, want %v", when, name, got, want)
			}
		}
	}
}

// use tells whether a token gets its agent past authentication.
func (v *service) use(token string) bool {
	v.t.Helper()
	begun := time.Now()
	a := v.api(token, "GET", "/agents", "") // for which these agents lack the scope
	if took := time.Since(begun); took > 2*requestTimeout {
		v.t.Errorf("an answer took %s", took)
	}
	if a.status != 401 && a.status != 403 {
		v.t.Errorf("a token is answered with %v, want 401 or 403", a)
	}
	return a.status == 403
}

// Redis counts and nothing else: what it has or lacks changes no answer.
func TestWhatRedisForgetsStaysRevoked(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	tr := newTrial(v)
	ctx := context.Background()
	for _, key := range v.keys("*") {
		if !strings.HasPrefix(key, "rate:") && !strings.HasPrefix(key, "monthly:") {
			t.Errorf("Redis has %q, and is to count alone", key)
		}
	}
	for name, fault := range map[string]func(){
		"nothing happened":         func() {},
		"Redis was flushed":        func() { v.rdb.FlushDB(ctx) },
		"Redis forgot its scripts": func() { v.rdb.ScriptFlush(ctx) },
	} {
		fault()
		tr.check("after "+name, v)
		tr.check("after "+name, w)
	}
}

// One copy can't reach Redis, the other can, and trusts it. What the first has
// acknowledged, the second refuses from that moment on.
func TestRevocationThatMissesRedisIsRefusedEverywhere(t *testing.T) {
	t.Parallel()
	v := newService(t)
	proxy := newProxy(t, v.rdb.Options().Network, v.rdb.Options().Addr)
	cut := v.another("REDIS_URL", fmt.Sprintf("redis://%s/%d", proxy.listener.Addr(), v.rdb.Options().DB))
	for mode, name := range map[proxyMode]string{refusing: "gone", swallowing: "hung"} {
		proxy.set(mode)
		var group sync.WaitGroup
		for what, revoke := range map[string]func(id, token string) answer{
			"a token": func(_, token string) answer { return cut.bearerForm(cut.bearer, "/revoke", "token="+token) },
			"an agent": func(id, _ string) answer {
				return cut.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`)
			},
			"another agent": func(id, _ string) answer {
				return cut.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"decommissioned"}`)
			},
		} {
			id := v.newAgent("resumes:read")
			token := v.mint(id, newID())
			group.Go(func() {
				if !v.use(token) || !cut.use(token) {
					t.Errorf("Redis %s: a good token is refused", name)
				}
				if a := revoke(id, token); a.status != 200 {
					t.Errorf("Redis %s: revoking %s = %v, want 200", name, what, a)
				}
				for range 20 {
					if v.use(token) || cut.use(token) {
						t.Errorf("Redis %s: a token of %s is let through after that was revoked", name, what)
					}
				}
			})
		}
		group.Wait()
		proxy.set(passing)
		cut.eventually("the copy has Redis again", func() bool { return cut.do("GET", "/health", "").text("status") == "ok" })
	}
}

// What the keeper logs of Redis.
const (
	redisLost = `"of":"redis","well":false`
	redisBack = `"of":"redis","well":true`
)

func TestServiceDoesWithoutRedis(t *testing.T) {
	t.Parallel()
	const limit, quota = 50, 30
	env := map[string]string{"REDIS_URL": newRedis(t)}
	proxy := proxyRedis(t, env)
	p := newServiceProgram(t, "REDIS_URL", env["REDIS_URL"], "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit), "MONTHLY_TOKEN_LIMIT", fmt.Sprint(quota))
	v := p.service
	tr := newTrial(v)
	id, secret := v.newClient("resumes:read")
	token := v.token(id, secret, "")
	lines := func(text string) int { return strings.Count(p.log.String(), text) }
	for mode, name := range map[proxyMode]string{refusing: "gone", swallowing: "hung"} {
		t.Run(name, func(t *testing.T) {
			v.t, tr.t = t, t
			lost, back := lines(redisLost), lines(redisBack)
			proxy.set(mode)
			tr.check("without Redis", v)
			dead := v.mint(id, newID())
			v.want(v.bearerForm(v.bearer, "/revoke", "token="+dead), 200, "")
			if v.use(dead) || v.active(dead) {
				t.Error("what was revoked without Redis is let through")
			}
			got := atOnce(2*limit, func(int) answer { return v.api(token, "GET", "/agents/"+id, "") })
			if got[200] != 2*limit {
				t.Errorf("without Redis, %d requests = %v, want the limit to let them through", 2*limit, got)
			}
			got = atOnce(quota+5, func(int) answer { return v.form(id, secret, "", "grant_type=client_credentials") })
			if got[200] != quota+5 {
				t.Errorf("without Redis, %d requests for tokens = %v, want the quota to let them through", quota+5, got)
			}
			v.eventually("health is degraded", func() bool {
				a := v.do("GET", "/health", "")
				services, _ := a.body["services"].(map[string]any)
				return a.status == 200 && a.text("status") == "degraded" && services["redis"] == "down" && services["postgres"] == "up"
			})
			v.isWell()
			if lines(redisLost) != lost+1 || lines(redisBack) != back {
				t.Errorf("an outage is logged %d times, and its end %d times before it has come, want once and not yet",
					lines(redisLost)-lost, lines(redisBack)-back)
			}

			proxy.set(passing)
			v.eventually("all is well", func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
			tr.check("with Redis again", v)
			if v.use(dead) || v.active(dead) {
				t.Error("what was revoked without Redis is let through with it")
			}
			v.eventually("the limit counts again", func() bool {
				return v.api(token, "GET", "/agents/"+id, "").status == 429
			})
			// What was issued without Redis is counted from the audit log.
			v.rdb.Del(context.Background(), v.keys("rate:*")...)
			v.eventually("the quota counts again", func() bool {
				return v.form(id, secret, "", "grant_type=client_credentials").status == 403
			})
			v.eventually("the log says that it is back", func() bool { return lines(redisBack) > back })
			v.rdb.Del(context.Background(), v.keys("*")...) // as it was
		})
	}
}

func TestOldSnapshotBringsNothingBack(t *testing.T) {
	t.Parallel()
	const quota = 6
	store := newRedisServer(t)
	v := newService(t, "REDIS_URL", store.url(), "MONTHLY_TOKEN_LIMIT", fmt.Sprint(quota))
	ctx := context.Background()
	id, secret := v.newClient("resumes:read")
	before, after, good := v.token(id, secret, ""), v.token(id, secret, ""), v.token(id, secret, "")
	v.want(v.form(id, secret, "/revoke", "token="+before), 200, "")
	if err := store.client.Save(ctx).Err(); err != nil {
		t.Fatal(err)
	}
	v.want(v.form(id, secret, "/revoke", "token="+after), 200, "")
	v.token(id, secret, "")
	v.token(id, secret, "")
	check := func(when string) {
		t.Helper()
		if v.use(before) || v.use(after) || v.active(before) || v.active(after) {
			t.Errorf("%s, a revoked token is let through", when)
		}
		if !v.use(good) || !v.active(good) {
			t.Errorf("%s, a good token is refused", when)
		}
	}
	for _, row := range []struct {
		name string
		left int // of the quota, by what Redis has, or by the audit log
	}{{"an old snapshot", 3}, {"nothing", 0}} {
		name, left := row.name, row.left
		store.kill()
		check("without Redis")
		if name == "nothing" {
			os.Remove(filepath.Join(store.folder, "dump.rdb"))
		}
		store.start()
		if n := len(store.client.Keys(ctx, "monthly:*").Val()); name != "nothing" && n == 0 {
			t.Fatalf("the snapshot holds nothing, so nothing is tried here")
		}
		check("while Redis has " + name)
		v.eventually("Redis counts", func() bool {
			return len(store.client.Keys(ctx, "rate:keeper:*").Val()) > 0 && v.do("GET", "/health", "").text("status") == "ok"
		})
		check("after Redis had " + name)
		got := atOnce(4, func(int) answer { return v.form(id, secret, "", "grant_type=client_credentials") })
		if got[200] != left || got[403] != 4-left {
			t.Errorf("after Redis had %s, with %d tokens left of the quota, 4 requests at once = %v", name, left, got)
		}
		v.eventually("all is well", func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
	}
}

// jti is a token's own id, for the test has the key.
func jti(t *testing.T, token string) string {
	t.Helper()
	_, rest, _ := strings.Cut(token, ".")
	payload, _, _ := strings.Cut(rest, ".")
	text, err := base64.RawURLEncoding.DecodeString(payload)
	var c struct {
		ID string `json:"jti"`
	}
	if err != nil || json.Unmarshal(text, &c) != nil || c.ID == "" {
		t.Fatalf("no jti in %q: %v", text, err)
	}
	return c.ID
}

// Redis answers, but can't count, or may forget.
func TestRedisThatCannotKeepWhatItHasChangesNothing(t *testing.T) {
	t.Parallel()
	store := newRedisServer(t)
	v := newService(t, "REDIS_URL", store.url())
	w := v.another()
	ctx := context.Background()
	tr := newTrial(v)
	for _, row := range []struct {
		name, health string
		fault, undo  func()
	}{
		{"Redis may evict", "ok", func() { store.set("maxmemory-policy", "allkeys-lru", "maxmemory", "100mb") },
			func() { store.set("maxmemory", "0", "maxmemory-policy", "noeviction") }},
		{"Redis is full", "degraded", func() { store.set("maxmemory", "1") }, func() { store.set("maxmemory", "0") }},
		{"Redis is read-only", "degraded", func() { store.client.ReplicaOf(ctx, "127.0.0.1", "1") }, func() { store.client.ReplicaOf(ctx, "no", "one") }},
	} {
		token := v.mint(v.newAgent("resumes:read"), newID())
		row.fault()
		if a := v.bearerForm(v.bearer, "/revoke", "token="+token); a.status != 200 {
			t.Errorf("%s: revoking = %v, want 200", row.name, a)
		}
		if v.use(token) || w.use(token) || w.active(token) {
			t.Errorf("%s: a revoked token is let through", row.name)
		}
		v.eventually(row.name+" and health says so", func() bool { return v.do("GET", "/health", "").text("status") == row.health })
		tr.check(row.name, v)
		tr.check(row.name, w)
		row.undo()
		v.eventually("all is well after "+row.name, func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
		tr.check(row.name+" no more", w)
		if v.use(token) || w.use(token) {
			t.Errorf("%s no more: a revoked token is let through", row.name)
		}
	}
}

// Copies suspend and reactivate an agent at once, and their writes reach Redis
// in any order. In the end the token is worth what the agent is.
func TestSuspendedAndReactivatedAtOnceEndsAsTheAgentIs(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	copies := []*service{v, w}
	id := v.newAgent("resumes:read")
	token := v.mint(id, newID())
	for round := range 10 {
		atOnce(6, func(i int) answer {
			status := []string{"suspended", "active"}[(i+round)%2]
			return copies[i/2%2].api(v.bearer, "PATCH", "/agents/"+id, `{"status":"`+status+`"}`)
		})
		active := v.want(v.api(v.bearer, "GET", "/agents/"+id, ""), 200, "").text("status") == "active"
		for _, c := range copies {
			if c.use(token) != active || c.active(token) != active {
				t.Errorf("round %d: the agent is active: %v, and its token the opposite", round, active)
			}
		}
	}
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
	if v.use(token) || w.use(token) {
		t.Error("a token of a suspended agent is let through")
	}
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"active"}`), 200, "")
	if !v.use(token) || !w.use(token) {
		t.Error("a token of a reactivated agent is refused")
	}
}

func TestRevocationsThatConcernNoTokenAreSwept(t *testing.T) {
	t.Parallel()
	v := newService(t, "TOKEN_TTL", "10m")
	token := v.token(v.id, v.secret, "")
	v.want(v.form(v.id, v.secret, "/revoke", "token="+token), 200, "")
	var left float64
	err := v.db.QueryRow(t.Context(), `select extract(epoch from expires_at - now())::float8 / 3600 from token_revocations where jti = $1`, jti(t, token)).Scan(&left)
	if err != nil || left < 24 || left > 25 {
		t.Errorf("a revoked token's id is kept for %g hours (%v), want until it expires by any clock", left, err)
	}
	old, fresh := newID(), newID()
	_, err = v.db.Exec(t.Context(), `
		insert into token_revocations (jti, expires_at)
		values ($1, now() - interval '1 hour'), ($2, now() + interval '1 hour')`, old, fresh)
	if err != nil {
		t.Fatal(err)
	}
	count := func(id string) (n int) {
		if err := v.db.QueryRow(context.Background(), `select count(*) from token_revocations where jti = $1`, id).Scan(&n); err != nil {
			t.Error(err)
		}
		return n
	}
	v.another() // the first that a keeper does
	v.eventually("what has expired is deleted", func() bool { return count(old) == 0 })
	if count(fresh) != 1 || count(jti(t, token)) != 1 {
		t.Error("revocations that are still needed are deleted")
	}
}

// Where the machine of PostgreSQL is gone without a word and another has its
// address, the dead connections are not found out one after another.
func TestDeadConnectionsAreLeftTogether(t *testing.T) {
	t.Parallel()
	env := map[string]string{"DATABASE_URL": newDatabase(t)}
	proxy := proxyDatabase(t, env)
	const idle = 12
	v := newService(t, "DATABASE_URL", env["DATABASE_URL"]+fmt.Sprintf("&pool_max_conns=%d&pool_min_conns=%d", idle, idle))
	id, secret := v.newClient("resumes:read")
	v.token(id, secret, "")
	v.eventually("the pool has all its connections", func() bool {
		return v.count(`select count(*) from pg_stat_activity where datname = current_database() and state = 'idle'`) >= idle+1
	})
	time.Sleep(1500 * time.Millisecond) // and none was used for so long that it isn't asked whether it lives
	proxy.lose()
	begun, served := time.Now(), 0
	for served < idle && time.Since(begun) < time.Minute {
		a, b := v.form(id, secret, "", "grant_type=client_credentials"), v.api(v.bearer, "GET", "/agents/"+id, "")
		if a.status == 200 && b.status == 200 {
			served++
		}
	}
	if took := time.Since(begun); took > 20*time.Second {
		t.Errorf("after %d dead connections it took %v until %d requests were served, want the time of a few", idle, took, served)
	}
}

// PostgreSQL holds the truth, so without it there is none: not a yes, not a no.
func TestWithoutPostgreSQLEveryAnswerIsA503(t *testing.T) {
	t.Parallel()
	env := map[string]string{"DATABASE_URL": newDatabase(t)}
	direct, err := pgx.Connect(t.Context(), env["DATABASE_URL"])
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close(context.Background())
	proxy := proxyDatabase(t, env)
	v := newService(t, "DATABASE_URL", env["DATABASE_URL"])
	id, secret := v.newClient("resumes:read")
	token := v.token(id, secret, "")
	calls := map[string]func() answer{
		"a token":                         func() answer { return v.form(id, secret, "", "grant_type=client_credentials") },
		"a wrong secret":                  func() answer { return v.form(id, newSecret(), "", "grant_type=client_credentials") },
		"introspection":                   func() answer { return v.form(v.id, v.secret, "/introspect", "token="+token) },
		"introspection by bearer":         func() answer { return v.bearerForm(v.bearer, "/introspect", "token="+token) },
		"introspection of garbage":        func() answer { return v.bearerForm(v.bearer, "/introspect", "token=x") },
		"revocation":                      func() answer { return v.form(id, secret, "/revoke", "token="+token) },
		"revocation by bearer":            func() answer { return v.bearerForm(v.bearer, "/revoke", "token="+token) },
		"agents":                          func() answer { return v.api(v.bearer, "GET", "/agents", "") },
		"an agent":                        func() answer { return v.api(v.bearer, "GET", "/agents/"+id, "") },
		"an unknown agent":                func() answer { return v.api(v.bearer, "GET", "/agents/"+newID(), "") },
		"registration":                    func() answer { return v.api(v.bearer, "POST", "/agents", agentJSON("x@example.com", "a:b")) },
		"suspension":                      func() answer { return v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`) },
		"credentials":                     func() answer { return v.api(v.bearer, "GET", "/agents/"+id+"/credentials", "") },
		"a credential":                    func() answer { return v.api(v.bearer, "POST", "/agents/"+id+"/credentials", "{}") },
		"an event":                        func() answer { return v.api(v.bearer, "GET", "/audit/"+newID(), "") },
		"events":                          func() answer { return v.api(v.bearer, "GET", "/audit", "") },
		"verification":                    func() answer { return v.api(v.bearer, "GET", "/audit/verify", "") },
		"a refusal, which is an event":    func() answer { return v.api(token, "POST", "/agents", agentJSON("x@example.com", "a:b")) },
		"another refusal, which is one":   func() answer { return v.api(token, "DELETE", "/agents/"+v.id, "") },
		"an introspection that is denied": func() answer { return v.form(id, secret, "/introspect", "token="+token) },
	}
	var lock pgx.Tx
	for _, row := range []struct {
		name        string
		fault, undo func()
		health      int
	}{
		{"gone", func() { proxy.set(refusing) }, func() { proxy.set(passing) }, 503},
		{"hung", func() { proxy.set(swallowing) }, func() { proxy.set(passing) }, 503},
		{"locked", func() { // and with that the pool of connections is empty
			if lock, err = direct.Begin(context.Background()); err == nil {
				_, err = lock.Exec(context.Background(), `lock table agents, credentials, audit_events, token_revocations in access exclusive mode`)
			}
		}, func() { err = lock.Rollback(context.Background()) }, 200},
	} {
		t.Run(row.name, func(t *testing.T) {
			v.t = t
			row.fault()
			if err != nil {
				t.Fatal(err)
			}
			if row.name == "gone" { // and Redis with it can't say who is revoked
				v.rdb.FlushDB(context.Background())
			}
			var group sync.WaitGroup
			for name, call := range calls {
				for range 2 {
					group.Go(func() {
						begun := time.Now()
						a := call()
						took := time.Since(begun)
						if a.status != 503 || a.header.Get("Retry-After") == "" || a.code() != "SERVICE_UNAVAILABLE" && a.code() != "temporarily_unavailable" {
							t.Errorf("%s = %v with Retry-After %q, want 503 with one", name, a, a.header.Get("Retry-After"))
						}
						if took > 10*time.Second {
							t.Errorf("%s took %s", name, took)
						}
					})
				}
			}
			begun := time.Now() // what needs no store is quick
			v.want(v.do("GET", "/livez", ""), 200, "")
			v.want(v.do("GET", "/.well-known/jwks.json", ""), 200, "")
			v.do("GET", "/health", "")
			if took := time.Since(begun); took > storeTimeout {
				t.Errorf("health and keys took %s", took)
			}
			v.eventually("health says so", func() bool { return v.do("GET", "/health", "").status == row.health })
			group.Wait()
			row.undo()
			if err != nil {
				t.Fatal(err)
			}
			v.eventually("all is well", func() bool {
				return v.do("GET", "/health", "").text("status") == "ok" && v.api(v.bearer, "GET", "/agents", "").status == 200
			})
			if !v.active(token) || !v.use(token) {
				t.Error("what was never revoked is refused")
			}
			v.want(v.form(id, secret, "", "grant_type=client_credentials"), 200, "")
			a := v.want(v.api(v.bearer, "GET", "/agents?limit=100", ""), 200, "")
			if strings.Contains(a.raw, "x@example.com") {
				t.Error("a registration that was answered with 503 took place")
			}
		})
	}
}

// Where nobody can say whether a token is revoked, the answer is not that it
// isn't, even if all else is well.
func TestTokenOfWhichNobodyKnowsIsNotLetThrough(t *testing.T) {
	t.Parallel()
	v := newService(t)
	token := v.mint(v.newAgent("resumes:read"), newID())
	v.want(v.bearerForm(v.bearer, "/revoke", "token="+token), 200, "")
	ctx := context.Background()
	lock, err := v.db.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock.Exec(ctx, `lock table token_revocations in access exclusive mode`); err != nil {
		t.Fatal(err)
	}
	v.rdb.FlushDB(ctx)
	var group sync.WaitGroup
	for name, call := range map[string]func() answer{
		"a request":               func() answer { return v.api(token, "GET", "/agents", "") },
		"introspection by bearer": func() answer { return v.bearerForm(v.bearer, "/introspect", "token="+token) },
		"introspection":           func() answer { return v.form(v.id, v.secret, "/introspect", "token="+token) },
	} {
		group.Go(func() {
			if a := call(); a.status != 503 {
				t.Errorf("%s = %v, want 503", name, a)
			}
		})
	}
	group.Wait()
	if err := lock.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	v.eventually("all is well", func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
	if v.use(token) || v.active(token) {
		t.Error("a revoked token is let through afterwards")
	}
}
