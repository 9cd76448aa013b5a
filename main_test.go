package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// The tests beside the source are of what only the source can reach: functions
// of their arguments, and a server whose inside a test has to touch. Whatever
// can be asked from outside is in test/.

var (
	testDatabaseURL = os.Getenv("TEST_DATABASE_URL")
	testRedisURL    = os.Getenv("TEST_REDIS_URL")
	testKey         = makeKey("RS256")
	databaseNumber  atomic.Int64
)

func TestMain(m *testing.M) {
	if testDatabaseURL == "" || testRedisURL == "" {
		fmt.Fprintln(os.Stderr, "The tests need a real PostgreSQL and a real Redis: TEST_DATABASE_URL or TEST_REDIS_URL is not set.\nRun them with: make test")
		os.Exit(1)
	}
	slog.SetDefault(slog.New(slog.NewJSONHandler(&testLog, nil)))
	os.Exit(m.Run())
}

// testLog is what all servers log.
var testLog logBuffer

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newID() string { return idOf(time.Now(), [10]byte([]byte(rand.Text()))) }

// lookup is os.LookupEnv of an environment.
func lookup(env map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		value, set := env[name]
		return value, set
	}
}

// newServer opens a server on a database of its own, with its keeper and its
// first agent. Env are pairs of variables that differ from the defaults here,
// which switch limits off.
func newServer(t testing.TB, env ...string) (s *server, id, plain string) {
	t.Helper()
	all := map[string]string{
		"JWT_PRIVATE_KEY": testKey(), "DATABASE_URL": newDatabase(t), "REDIS_URL": testRedisURL,
		"RATE_LIMIT_PER_MINUTE": "0", "MONTHLY_TOKEN_LIMIT": "0", "MAX_AGENTS": "0",
	}
	for i := 0; i < len(env); i += 2 {
		all[env[i]] = env[i+1]
	}
	cfg, err := loadConfig(lookup(all))
	if err != nil {
		t.Fatal(err)
	}
	if s, err = open(t.Context(), cfg, false); err != nil {
		t.Fatal(err)
	}
	stop := s.startKeeper()
	t.Cleanup(func() { stop(); s.close() })
	for end := time.Now().Add(time.Minute); !s.postgres.well() || !s.redis.well(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the stores are not well")
		}
	}
	var out bytes.Buffer
	if err := s.bootstrap(t.Context(), "first@example.com", false, &out); err != nil {
		t.Fatal(err)
	}
	fmt.Sscanf(out.String(), "client_id: %s\nclient_secret: %s\n", &id, &plain)
	return s, id, plain
}

// ask has a server answer a request with these header pairs.
func (s *server) ask(method, path, body string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	if body != "" && r.Header.Get("Content-Type") == "" {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	w := httptest.NewRecorder()
	s.front(s.routes()).ServeHTTP(w, r)
	return w
}

// bearerOf is the header of a token with all that a client may do.
func (s *server) bearerOf(t testing.TB, id, plain string) string {
	t.Helper()
	w := s.ask("POST", "/api/v1/token", "grant_type=client_credentials&client_id="+id+"&client_secret="+plain)
	_, after, _ := strings.Cut(w.Body.String(), `"access_token":"`)
	token, _, _ := strings.Cut(after, `"`)
	if w.Code != http.StatusOK || token == "" {
		t.Fatalf("asking for a token: %d %s", w.Code, w.Body)
	}
	return "Bearer " + token
}

// newDatabase makes an empty database that is dropped when the test ends.
func newDatabase(t testing.TB) string {
	t.Helper()
	ctx := context.Background()
	name := fmt.Sprintf("agentidp_within_%d_%d", os.Getpid(), databaseNumber.Add(1))
	do := func(sql string) {
		conn, err := pgx.Connect(ctx, testDatabaseURL)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(ctx)
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Error(err)
		}
	}
	do("create database " + name)
	t.Cleanup(func() { do("drop database " + name + " with (force)") })
	u, err := url.Parse(testDatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}

// The page that operators have says what the source says; test/ reads that page.
func TestPageHasEveryTimeAndSize(t *testing.T) {
	text, err := os.ReadFile("docs/devops/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Times and sizes\n")
	section, _, _ = strings.Cut(section, "\n## ")
	said := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([A-Za-z]+)` \\| ([^|]+) \\|").FindAllStringSubmatch(section, -1) {
		said[row[1]] = row[2]
	}
	want := map[string]any{
		"requestTimeout": requestTimeout, "storeTimeout": storeTimeout, "redisTimeout": redisTimeout, "idleTime": idleTime, "keysEvery": keysEvery,
		"wellFor": wellFor, "keepEvery": keepEvery, "clockTold": clockTold, "clockTrust": clockTrust,
		"maxBodies": maxBodies, "maxBodiesOf": maxBodiesOf, "bodyTime": bodyTime, "bodyPace": bodyPace,
		"readTime": readTime, "maxInRoom": maxInRoom, "maxWaiting": maxWaiting, "maxBody": maxBody, "maxHeader": maxHeader, "maxInFlight": maxInFlight, "queueSize": queueSize,
		"batchSize": batchSize, "memoSize": memoSize, "maxTokenTTL": maxTokenTTL, "clockSkew": clockSkew, "assertionLife": assertionLife,
		"feedPage": feedPage, "feedRoom": feedRoom, "feedRoomOf": feedRoomOf, "feedWait": feedWait, "feedEvery": feedEvery, "feedBeat": feedBeat, "feedLife": feedLife,
		"proofPast": proofPast, "proofMemory": proofMemory,
		"workloadLife": workloadLife, "keysAgain": keysAgain, "keysFresh": keysFresh, "keysLast": keysLast, "fetchTimeout": fetchTimeout,
	}
	for name, value := range want {
		if length, ok := value.(time.Duration); ok {
			if d, err := time.ParseDuration(said[name]); err != nil || d != length {
				t.Errorf("architecture.md says that %s is %q, want %v", name, said[name], value)
			}
		} else if said[name] != fmt.Sprint(value) {
			t.Errorf("architecture.md says that %s is %q, want %v", name, said[name], value)
		}
	}
	if len(said) != len(want) {
		t.Errorf("architecture.md has %d times and sizes, want %d", len(said), len(want))
	}
}
