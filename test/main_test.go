package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// The harness. Every test has a database and a Redis database of its own, a
// real server on loopback, and speaks HTTP to it.

var (
	testDatabaseURL = os.Getenv("TEST_DATABASE_URL")
	testRedisURL    = os.Getenv("TEST_REDIS_URL")
	testKey         = makeKey("RS256")
	redisDatabases  chan int // those that no test uses
	testLog         = &logBuffer{}
	testFolder      string // what several tests share; removed at the end
)

// TestMain sees to the stores, and holds the log of all tests to what a log
// must be.
func TestMain(m *testing.M) {
	if err := os.Chdir(".."); err != nil { // where the program and its pages are
		panic(err)
	}
	if err := findStores(); err != nil {
		fmt.Fprintf(os.Stderr, "The tests need a real PostgreSQL and a real Redis: %v\n"+
			"Run them with: make test\nor set TEST_DATABASE_URL and TEST_REDIS_URL.\n", err)
		os.Exit(1)
	}
	slog.SetDefault(slog.New(slog.NewJSONHandler(testLog, &slog.HandlerOptions{Level: slog.LevelDebug})))
	var err error
	if testFolder, err = os.MkdirTemp("", "idptest"); err != nil {
		panic(err)
	}
	go showWork()
	code := m.Run()
	os.RemoveAll(testFolder)
	if err := askServer("drop database if exists " + preparedDatabase); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: the prepared database:", err)
		code = 1
	}
	if err := answers.close(code == 0); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: recording answers:", err)
		code = 1
	}
	if err := testLog.check(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL: the log:", err)
		code = 1
	}
	os.Exit(code)
}

// showWork tells who watches that something goes on: go prints nothing of a package
// before it has ended.
func showWork() {
	terminal, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	for begun := time.Now(); ; time.Sleep(time.Second) {
		fmt.Fprintf(terminal, "\rtest/: %d s, %d databases made ", int(time.Since(begun).Seconds()), databaseNumber.Load())
	}
}

func findStores() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if testDatabaseURL == "" || testRedisURL == "" {
		return errors.New("TEST_DATABASE_URL or TEST_REDIS_URL is not set")
	}
	conn, err := pgx.Connect(ctx, testDatabaseURL)
	if err != nil {
		return err
	}
	conn.Close(ctx)
	options, err := redis.ParseURL(testRedisURL)
	if err != nil {
		return err
	}
	rdb := redis.NewClient(options)
	defer rdb.Close()
	n := 16
	if reply, err := rdb.ConfigGet(ctx, "databases").Result(); err == nil {
		fmt.Sscan(reply["databases"], &n)
	}
	redisDatabases = make(chan int, n)
	for i := 1; i < n; i++ {
		redisDatabases <- i
	}
	return rdb.Ping(ctx).Err()
}

// A logBuffer takes whole lines from concurrent writers.
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

var secretInLog = regexp.MustCompile(`sk_live_[0-9a-f]{16,}|eyJhbGciOi|\$2a\$10\$|BEGIN [A-Z ]*PRIVATE|canary`)

// check wants every line to be one JSON object, and no secret in any.
func (l *logBuffer) check() error {
	for line := range strings.Lines(l.String()) {
		d := json.NewDecoder(strings.NewReader(line))
		var object map[string]any
		if err := d.Decode(&object); err != nil || d.More() {
			return fmt.Errorf("not one JSON object: %q", line)
		}
		if found := secretInLog.FindString(line); found != "" {
			return fmt.Errorf("%q is in %q", found, line)
		}
	}
	return nil
}

// A service is a copy of the program, as operators run it, with its first agent,
// which holds all of our scopes. It is spoken to over HTTP alone.
type service struct {
	t          testing.TB
	env        map[string]string
	url        string
	db         *pgxpool.Pool // the test's own way to the database
	rdb        *redis.Client // and to Redis
	id, secret string        // of the first agent
	bearer     string        // a token of it with all of its scopes
	watched    bool          // by the race detector, and its log by TestMain
}

var databaseNumber atomic.Int64

// newService starts a service. Env are pairs of variables that differ from
// those of programEnv; its issuer is its own address, and its log that of all.
func newService(t testing.TB, env ...string) *service {
	t.Helper()
	return newServiceProgram(t, env...).service
}

// newServiceProgram is newService for a test that needs the log of its own, too.
func newServiceProgram(t testing.TB, env ...string) *program {
	t.Helper()
	v := &service{t: t, watched: true, env: programEnv("", "", append([]string{"ISSUER", "", "LOG_LEVEL", "debug"}, env...)...)}
	if v.env["DATABASE_URL"] == "" {
		first, err := prepared()
		if err != nil {
			t.Fatal(err)
		}
		v.id, v.secret, v.env["DATABASE_URL"] = first.id, first.secret, copyDatabase(t, first.database)
	}
	if v.env["REDIS_URL"] == "" {
		v.env["REDIS_URL"] = newRedis(t)
	}
	return v.launch(v.env["DATABASE_URL"], v.env["REDIS_URL"])
}

// another starts a further copy beside the same stores.
func (v *service) another(env ...string) *service {
	v.t.Helper()
	return (&program{service: v}).another(env...).service
}

// newDatabase makes an empty database that is dropped when the test ends.
func newDatabase(t testing.TB) string {
	t.Helper()
	return copyDatabase(t, "template1")
}

// copyDatabase makes a copy of a database, to which nobody may be connected.
func copyDatabase(t testing.TB, of string) string {
	t.Helper()
	name := fmt.Sprintf("agentidp_test_%d_%d", os.Getpid(), databaseNumber.Add(1))
	if err := onServer(func(conn *pgx.Conn) error { return copyTo(conn, name, of) }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := askServer("drop database " + name + " with (force)"); err != nil {
			t.Error(err)
		}
	})
	return databaseURL(name)
}

// copyTo copies by files where it can: through the WAL takes twice the processor's time.
func copyTo(conn *pgx.Conn, name, of string) error {
	sql := "create database " + name + " template " + of
	if conn.PgConn().ParameterStatus("server_version") >= "15" {
		sql += " strategy file_copy"
	}
	_, err := conn.Exec(context.Background(), sql)
	return err
}

func askServer(sql string) error {
	return onServer(func(conn *pgx.Conn) error {
		_, err := conn.Exec(context.Background(), sql)
		return err
	})
}

// A new connection takes as long as a third of a new database, so these are kept.
var serverConns = sync.OnceValues(func() (*pgxpool.Pool, error) { return pgxpool.New(context.Background(), testDatabaseURL) })

func onServer(do func(conn *pgx.Conn) error) error {
	pool, err := serverConns()
	if err != nil {
		return err
	}
	return pool.AcquireFunc(context.Background(), func(conn *pgxpool.Conn) error { return do(conn.Conn()) })
}

func databaseURL(name string) string {
	u, err := url.Parse(testDatabaseURL)
	if err != nil {
		panic(err)
	}
	u.Path = "/" + name
	return u.String()
}

type firstAgent struct{ database, id, secret string }

var preparedDatabase = fmt.Sprintf("agentidp_prepared_%d", os.Getpid())

// prepared makes a database in which a first agent is, once: to apply the schema and
// to hash a secret takes longer than to copy it.
var prepared = sync.OnceValues(func() (firstAgent, error) {
	first := firstAgent{database: preparedDatabase}
	if err := askServer("create database " + first.database); err != nil {
		return first, err
	}
	out, err := command(context.Background(), programEnv(databaseURL(first.database), testRedisURL), io.Discard, "bootstrap", "first@example.com")
	if err == nil {
		_, err = fmt.Sscanf(out, "client_id: %s\nclient_secret: %s\n", &first.id, &first.secret)
	}
	return first, err
})

// newRedis takes an empty Redis database until the test ends.
func newRedis(t testing.TB) string {
	t.Helper()
	n := <-redisDatabases
	t.Cleanup(func() { redisDatabases <- n })
	u, err := url.Parse(testRedisURL)
	if err != nil {
		t.Fatal(err)
	}
	if u.Scheme == "unix" {
		q := u.Query()
		q.Set("db", fmt.Sprint(n))
		u.RawQuery = q.Encode()
	} else {
		u.Path = fmt.Sprintf("/%d", n)
	}
	options, err := redis.ParseURL(u.String())
	if err != nil {
		t.Fatal(err)
	}
	rdb := redis.NewClient(options)
	defer rdb.Close()
	if err := rdb.FlushDB(context.Background()).Err(); err != nil {
		t.Fatal(err)
	}
	return u.String()
}

func (v *service) eventually(what string, done func() bool) {
	v.t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			v.t.Fatalf("waited in vain until %s", what)
		}
	}
}

// isWell waits, since a copy whose PostgreSQL is slow for a moment says that it is down.
func (v *service) isWell() {
	v.t.Helper()
	v.eventually("it is well", func() bool {
		return v.do("GET", "/health", "").status == 200 && v.do("GET", "/readyz", "").status == 200
	})
}

// An answer to a request.
type answer struct {
	status int
	header http.Header
	raw    string
	body   map[string]any // nil where it is no JSON object
}

func (a answer) String() string { return fmt.Sprintf("%d %s", a.status, a.raw) }

// text is a field of the body, "" where there is none.
func (a answer) text(name string) string {
	text, _ := a.body[name].(string)
	return text
}

// code is that of an error, in either form.
func (a answer) code() string { return a.text("code") + a.text("error") }

// do sends a request with header pairs, and an answer in JSON or none.
func (v *service) do(method, path, body string, header ...string) answer {
	v.t.Helper()
	q, err := http.NewRequest(method, v.url+path, strings.NewReader(body))
	if err != nil {
		v.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		q.Header.Add(header[i], header[i+1])
	}
	return v.send(q)
}

var testClient = &http.Client{
	Timeout: 30 * time.Second,
	// A server closes a connection that sends no header for 5 s, also under a
	// request that is just being sent. So those that idle are closed before.
	Transport:     &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: 3 * time.Second},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func (v *service) send(q *http.Request) answer {
	v.t.Helper()
	response, err := testClient.Do(q)
	if err != nil {
		v.t.Fatalf("%s %s: %v", q.Method, q.URL, err)
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(response.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	a := answer{status: response.StatusCode, header: response.Header, raw: string(raw)}
	answers.record(q, a)
	if len(raw) > 0 && a.header.Get("Content-Type") != "application/yaml" && json.Unmarshal(raw, &a.body) != nil {
		v.t.Errorf("%s %s answered %d with what is no JSON object: %q", q.Method, q.URL, a.status, raw)
	}
	return a
}

// api sends JSON (where body isn't empty) with a bearer token to a path below
// /api/v1.
func (v *service) api(bearer, method, path, body string) answer {
	v.t.Helper()
	header := []string{"Authorization", "Bearer " + bearer}
	if body != "" {
		header = append(header, "Content-Type", "application/json")
	}
	return v.do(method, "/api/v1"+path, body, header...)
}

// form posts a form to a path below /api/v1/token, with HTTP Basic where id
// isn't empty.
func (v *service) form(id, secret, path, form string) answer {
	v.t.Helper()
	q, err := http.NewRequest("POST", v.url+"/api/v1/token"+path, strings.NewReader(form))
	if err != nil {
		v.t.Fatal(err)
	}
	q.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if id != "" {
		q.SetBasicAuth(id, secret)
	}
	return v.send(q)
}

// want fails the test where an answer is another one; code "" is none.
func (v *service) want(a answer, status int, code string) answer {
	v.t.Helper()
	if a.status != status || a.code() != code {
		v.t.Fatalf("answered %v, want %d %s", a, status, code)
	}
	return a
}

// token gets a token; scope "" asks for none.
func (v *service) token(id, secret, scope string) string {
	v.t.Helper()
	a := v.want(v.form(id, secret, "", "grant_type=client_credentials&scope="+url.QueryEscape(scope)), 200, "")
	return a.text("access_token")
}

func agentJSON(email string, capabilities ...string) string {
	b, _ := json.Marshal(map[string]any{
		"email": email, "agentType": "screener", "version": "1.0.0", "capabilities": capabilities,
		"owner": "team", "deploymentEnv": "production",
	})
	return string(b)
}

var agentNumber atomic.Int64

// newAgent registers an agent that may do these.
func (v *service) newAgent(capabilities ...string) (id string) {
	v.t.Helper()
	email := fmt.Sprintf("agent%d@example.com", agentNumber.Add(1))
	return v.want(v.api(v.bearer, "POST", "/agents", agentJSON(email, capabilities...)), 201, "").text("agentId")
}

// newCredential gives an agent a credential.
func (v *service) newCredential(agentID string) (credentialID, secret string) {
	v.t.Helper()
	a := v.want(v.api(v.bearer, "POST", "/agents/"+agentID+"/credentials", "{}"), 201, "")
	return a.text("credentialId"), a.text("clientSecret")
}

// newClient registers an agent with a credential.
func (v *service) newClient(capabilities ...string) (id, secret string) {
	v.t.Helper()
	id = v.newAgent(capabilities...)
	_, secret = v.newCredential(id)
	return id, secret
}

// active introspects a token.
func (v *service) active(token string) bool {
	v.t.Helper()
	a := v.want(v.form(v.id, v.secret, "/introspect", "token="+token), 200, "")
	if a.body["active"] == false && a.raw != "{\"active\":false}\n" {
		v.t.Errorf("an inactive token is introspected as %s", a.raw)
	}
	return a.body["active"] == true
}
