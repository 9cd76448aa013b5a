package test

import (
	"math"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
)

// counted returns the address of a way to a store on which round trips are counted:
// each time that the store answers what it was asked on a connection.
func counted(t *testing.T, network, address string, trips *atomic.Int64) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	carry := func(to, from net.Conn, seen func()) {
		defer to.Close()
		for b := make([]byte, 32<<10); ; {
			n, err := from.Read(b)
			if err != nil {
				return
			}
			seen() // before the other side can go on
			if _, err := to.Write(b[:n]); err != nil {
				from.Close()
			}
		}
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			store, err := net.Dial(network, address)
			if err != nil {
				client.Close()
				continue
			}
			var asked atomic.Bool
			go carry(store, client, func() { asked.Store(true) })
			go carry(client, store, func() {
				if asked.Swap(false) {
					trips.Add(1)
				}
			})
		}
	}()
	return listener.Addr().String()
}

// Whatever else goes on, such as the keeper, only adds to what a request is seen to
// take. So the least of many tries is what it takes.
func TestRegionsPageHasEveryRoundTrip(t *testing.T) {
	t.Parallel()
	table := map[string]map[string]string{}
	for key, row := range pageTables(t, "regions.md", "## Round trips") {
		table[strings.TrimPrefix(key, "request ")] = row
	}
	var toPostgres, toRedis atomic.Int64
	postgres, store := newPostgres(t), newRedisServer(t)
	socket, err := url.Parse(postgres.url())
	if err != nil {
		t.Fatal(err)
	}
	place := socket.Query()
	database := "postgres://" + place.Get("user") + "@" + counted(t, "unix", place.Get("host")+"/.s.PGSQL."+place.Get("port"), &toPostgres) + socket.Path + "?sslmode=disable"
	cache, _, _ := strings.Cut(strings.TrimPrefix(store.url(), "unix://"), "?")
	p := newProgram(t, postgres.url(), store.url(), "DATABASE_URL", database, "REDIS_URL", "redis://"+counted(t, "unix", cache, &toRedis)+"/0",
		"RATE_LIMIT_PER_MINUTE", "100000")
	id, secret := p.newClient("resumes:read")
	keyID, _, key := p.newKeyClient("ES256", "resumes:read")
	token := p.token(id, secret, "")
	workerID, workerSecret := p.newClient("resumes:read")
	p.want(p.allow(id, "delegates", `["`+workerID+`"]`), 200, "")
	exchange := "grant_type=urn:ietf:params:oauth:grant-type:token-exchange&subject_token_type=urn:ietf:params:oauth:token-type:access_token&resource=https://a.example.com&subject_token=" + token
	for what, ask := range map[string]func() answer{
		"/token":                  func() answer { return p.form(id, secret, "", "grant_type=client_credentials") },
		"client_assertion":        func() answer { return p.byAssertion("", p.assertion(key, keyID)) },
		"token-exchange":          func() answer { return p.form(workerID, workerSecret, "", exchange) },
		"/token/introspect":       func() answer { return p.form(p.id, p.secret, "/introspect", "token="+token) },
		"GET /agents/{agentId}":   func() answer { return p.api(p.bearer, "GET", "/agents/"+id, "") },
		"GET /agents":             func() answer { return p.api(p.bearer, "GET", "/agents", "") },
		"PATCH /agents/{agentId}": func() answer { return p.api(p.bearer, "PATCH", "/agents/"+id, `{"version": "1.0.0"}`) },
		"/.well-known/jwks.json":  func() answer { return p.do("GET", "/.well-known/jwks.json", "") },
	} {
		row := table[what]
		inPostgres, err := strconv.Atoi(row["PostgreSQL"])
		inRedis, redisErr := strconv.Atoi(row["Redis"])
		if err != nil || redisErr != nil {
			t.Errorf("regions.md says %v of %s", row, what)
			continue
		}
		leastPostgres, leastRedis := math.MaxInt, math.MaxInt
		// The first teach each connection its statements.
		for n := 0; n < 50 || n < 1000 && (leastPostgres > inPostgres || leastRedis > inRedis); n++ {
			beforePostgres, beforeRedis := toPostgres.Load(), toRedis.Load()
			if a := ask(); a.status != 200 {
				t.Fatalf("%s = %v", what, a)
			}
			leastPostgres, leastRedis = min(leastPostgres, int(toPostgres.Load()-beforePostgres)), min(leastRedis, int(toRedis.Load()-beforeRedis))
		}
		if leastPostgres != inPostgres || leastRedis != inRedis {
			t.Errorf("%s takes %d and %d round trips, and regions.md says %d and %d", what, leastPostgres, leastRedis, inPostgres, inRedis)
		}
	}
}
