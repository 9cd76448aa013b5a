package test

import (
	"net"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

// far returns the address of a way to a store that takes a time, there and back.
func far(t *testing.T, network, address string, trip time.Duration) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	carry := func(to, from net.Conn) {
		type parcel struct {
			text []byte
			due  time.Time
		}
		road := make(chan parcel, 1000)
		go func() {
			defer to.Close()
			for p := range road {
				time.Sleep(time.Until(p.due))
				if _, err := to.Write(p.text); err != nil {
					from.Close()
				}
			}
		}()
		defer close(road)
		for b := make([]byte, 32<<10); ; {
			n, err := from.Read(b)
			if err != nil {
				return
			}
			road <- parcel{append([]byte(nil), b[:n]...), time.Now().Add(trip / 2)}
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
			go carry(store, client)
			go carry(client, store)
		}
	}()
	return listener.Addr().String()
}

// Round trips are counted by how long a request takes where each of them takes a
// while: never less than all of them together, and at times less than one more.
func TestRegionsPageHasEveryRoundTrip(t *testing.T) {
	t.Parallel()
	const trip = 40 * time.Millisecond
	table := map[string]map[string]string{}
	for key, row := range pageTables(t, "regions.md", "## Round trips") {
		table[strings.TrimPrefix(key, "request ")] = row
	}
	postgres, store := newPostgres(t), newRedisServer(t)
	socket, err := url.Parse(postgres.url())
	if err != nil {
		t.Fatal(err)
	}
	place := socket.Query()
	database := "postgres://" + place.Get("user") + "@" + far(t, "unix", place.Get("host")+"/.s.PGSQL."+place.Get("port"), trip) + socket.Path + "?sslmode=disable"
	cache, _, _ := strings.Cut(strings.TrimPrefix(store.url(), "unix://"), "?")
	p := newProgram(t, postgres.url(), store.url(), "DATABASE_URL", database, "REDIS_URL", "redis://"+far(t, "unix", cache, trip)+"/0",
		"RATE_LIMIT_PER_MINUTE", "100000")
	id, secret := p.newClient("resumes:read")
	keyID, _, key := p.newKeyClient("ES256", "resumes:read")
	token := p.token(id, secret, "")
	for what, ask := range map[string]func() answer{
		"/token":                  func() answer { return p.form(id, secret, "", "grant_type=client_credentials") },
		"client_assertion":        func() answer { return p.byAssertion("", p.assertion(key, keyID)) },
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
		least := time.Hour
		for n := range 100 { // the first of which teach each connection its statements
			begun := time.Now()
			if a := ask(); a.status != 200 {
				t.Fatalf("%s = %v", what, a)
			}
			if least = min(least, time.Since(begun)); n >= 8 && least < trip*time.Duration(inPostgres+inRedis+1) {
				break
			}
		}
		if got := int(least / trip); got != inPostgres+inRedis {
			t.Errorf("%s takes %d round trips (%v of %v), and regions.md says %d and %d", what, got, least, trip, inPostgres, inRedis)
		}
	}
}
