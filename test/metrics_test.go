package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A family of metrics, as Prometheus would read it.
type family struct {
	kind, help string
	samples    map[string]float64 // by name and labels, as they are written
	labels     map[string][]string
}

var (
	metricName  = regexp.MustCompile(`^(agentidp|go|process)(_[a-z0-9]+)+$`)
	metricLine  = regexp.MustCompile(`^([a-z0-9_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*"(?:,|\}))+))? (\S+)$`)
	metricLabel = regexp.MustCompile(`([a-z]+)="((?:[^"\\]|\\.)*)"`)
)

// readMetrics reads the text form of Prometheus, version 0.0.4, and is stricter
// than that: it wants HELP, TYPE and samples of each family together in this
// order, no series twice, names as is the custom, and whole histograms.
func readMetrics(text string) (map[string]*family, error) {
	all := map[string]*family{}
	if !strings.HasSuffix(text, "\n") {
		return nil, errors.New("the last line has no end")
	}
	name, of := "", (*family)(nil)
	var buckets []float64 // of the histogram that is being read, and its bounds
	var bounds []float64
	group := "" // its labels
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		bad := func(why string) error { return fmt.Errorf("%s: %q", why, line) }
		if help, ok := strings.CutPrefix(line, "# HELP "); ok {
			if of != nil && of.kind == "" {
				return nil, bad("no TYPE before this")
			}
			if buckets != nil {
				return nil, bad("a histogram is not whole before this")
			}
			name, help, _ = strings.Cut(help, " ")
			if all[name] != nil || !metricName.MatchString(name) || len(help) < 5 || !strings.HasSuffix(help, ".") || strings.Contains(help, `\`) {
				return nil, bad("a family twice, a name, or a help that isn't one")
			}
			of = &family{help: help, samples: map[string]float64{}, labels: map[string][]string{}}
			all[name] = of
			continue
		}
		if kind, ok := strings.CutPrefix(line, "# TYPE "); ok {
			if of == nil || of.kind != "" || !strings.HasPrefix(kind, name+" ") {
				return nil, bad("a TYPE without its HELP")
			}
			of.kind = strings.TrimPrefix(kind, name+" ")
			if !slices.Contains([]string{"counter", "gauge", "histogram"}, of.kind) ||
				(of.kind == "counter") != strings.HasSuffix(name, "_total") {
				return nil, bad("a type, or a counter without _total, or another with it")
			}
			continue
		}
		m := metricLine.FindStringSubmatch(line)
		if m == nil || m[2] != "" && (!strings.HasSuffix(m[2], "}") || strings.Count(metricLabel.ReplaceAllString(m[2], ""), "}") != 1) {
			return nil, bad("no sample")
		}
		value, err := strconv.ParseFloat(m[3], 64)
		if of == nil || of.kind == "" || err != nil || math.IsNaN(value) || of.kind != "gauge" && value < 0 {
			return nil, bad("a sample without its family, or a value")
		}
		suffix, ok := strings.CutPrefix(m[1], name)
		if !ok || of.kind != "histogram" && suffix != "" {
			return nil, bad("a sample of another family")
		}
		key := strings.TrimSuffix(line, " "+m[3])
		if _, again := of.samples[key]; again {
			return nil, bad("a series twice")
		}
		of.samples[key] = value
		labels, le := "", ""
		for _, pair := range metricLabel.FindAllStringSubmatch(m[2], -1) {
			if pair[1] == "le" && of.kind == "histogram" && suffix == "_bucket" {
				le = pair[2]
				continue
			}
			labels += pair[0] + ","
			if !slices.Contains(of.labels[pair[1]], pair[2]) {
				of.labels[pair[1]] = append(of.labels[pair[1]], pair[2])
			}
		}
		if of.kind != "histogram" {
			continue
		}
		if buckets != nil && labels != group {
			return nil, bad("a histogram is not whole before this")
		}
		group = labels
		ends := len(bounds) > 0 && math.IsInf(bounds[len(bounds)-1], 1)
		switch suffix {
		case "_bucket":
			bound, err := strconv.ParseFloat(le, 64)
			if err != nil || ends || len(bounds) > 0 && (bound <= bounds[len(bounds)-1] || value < buckets[len(buckets)-1]) {
				return nil, bad("a bucket")
			}
			bounds, buckets = append(bounds, bound), append(buckets, value)
		case "_sum":
			if !ends {
				return nil, bad("a sum before +Inf")
			}
		case "_count":
			if !ends || value != buckets[len(buckets)-1] || value > 0 != (of.samples[strings.Replace(key, "_count", "_sum", 1)] > 0) {
				return nil, bad("a count that isn't that of +Inf, or has no sum")
			}
			bounds, buckets = nil, nil
		default:
			return nil, bad("a sample of another family")
		}
	}
	if of == nil || of.kind == "" || buckets != nil {
		return nil, errors.New("it ends too early")
	}
	return all, nil
}

// The reader is what the other tests rely on.
func TestMetricsReaderIsStrict(t *testing.T) {
	const good = "# HELP go_a_total Things counted.\n# TYPE go_a_total counter\ngo_a_total{x=\"1\"} 5\ngo_a_total{x=\"a\\\"b\"} 5\n" +
		"# HELP go_h Things of a size.\n# TYPE go_h histogram\ngo_h_bucket{x=\"1\",le=\"0.5\"} 1\ngo_h_bucket{x=\"1\",le=\"+Inf\"} 3\ngo_h_sum{x=\"1\"} 7\ngo_h_count{x=\"1\"} 3\n"
	if all, err := readMetrics(good); err != nil || all["go_a_total"].samples[`go_a_total{x="1"}`] != 5 || all["go_h"].samples[`go_h_count{x="1"}`] != 3 {
		t.Fatalf("readMetrics = %v, %v", all, err)
	}
	for _, change := range [][2]string{
		{"# HELP go_a_total Things counted.\n", ""}, {"# TYPE go_a_total counter\n", ""}, {"Things counted.", ""}, {"counter", "number"},
		{"counter", "gauge"}, {"go_a_total", "go_a"}, {"go_h", "go_h_total"}, {"go_a_total", "other_a_total"}, {"{x=\"1\"} 5", "{x=1} 5"}, {"} 5", "}5"}, {"} 5", "} five"}, {"} 5", "} -5"},
		{"} 5", "} NaN"}, {`a\"b`, `a"b`}, {`a\"b`, `a\tb`}, {`x="a\"b"`, `x="1"`}, {"go_h_bucket{x=\"1\",le=\"+Inf\"} 3\n", ""},
		{`le="0.5"} 1`, `le="0.5"} 4`}, {`le="0.5"`, `le="x"`}, {"go_h_sum{x=\"1\"} 7\n", ""}, {"go_h_count{x=\"1\"} 3\n", ""}, {"_count{x=\"1\"} 3", "_count{x=\"1\"} 2"},
		{"_sum{x=\"1\"}", "_sum{x=\"2\"}"}, {"go_h_sum", "go_i_sum"}, {"go_h_count{x=\"1\"} 3\n", "go_h_count{x=\"1\"} 3"},
		{"# HELP go_h ", "# HELP go_a_total "}, {"go_a_total{x=\"1\"} 5\n", "\ngo_a_total{x=\"1\"} 5\n"}, {"go_a_total{x=\"1\"} 5\n", "go_a_total{x=\"1\",} 5\n"},
	} {
		text := strings.ReplaceAll(good, change[0], change[1])
		if text == good {
			t.Fatalf("%q is not there", change[0])
		}
		if _, err := readMetrics(text); err == nil {
			t.Errorf("readMetrics takes %q in place of %q", change[1], change[0])
		}
	}
}

// metricsText is what Prometheus gets from a program whose METRICS_ADDR is
// metricsOn.
func (p *program) metricsText() string {
	p.t.Helper()
	answer, err := testClient.Get("http://" + p.log.metrics() + "/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if kind := answer.Header.Get("Content-Type"); err != nil || answer.StatusCode != 200 || kind != "text/plain; version=0.0.4; charset=utf-8" {
		p.t.Fatalf("GET /metrics = %d %v as %q", answer.StatusCode, err, kind)
	}
	return string(text)
}

func (p *program) scrape() map[string]*family {
	p.t.Helper()
	text := p.metricsText()
	all, err := readMetrics(text)
	if err != nil {
		p.t.Fatalf("GET /metrics: %v\n%s", err, text)
	}
	return all
}

const metricsOn = "127.0.0.1:0" // each copy has a port of its own

// metric is the value of one series; 0 where there is none.
func (p *program) metric(series string) float64 {
	p.t.Helper()
	for _, f := range p.scrape() {
		if v, ok := f.samples[series]; ok {
			return v
		}
	}
	return 0
}

// moves does something, and wants these series to have changed by so much.
func (p *program) moves(what string, do func(), want map[string]float64) {
	p.t.Helper()
	before := map[string]float64{}
	for series := range want {
		before[series] = p.metric(series)
	}
	do()
	for series, by := range want { // a request is counted after its answer
		var got float64
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if got = p.metric(series) - before[series]; got >= by {
				break
			}
		}
		if got != by {
			p.t.Errorf("%s: %s rises by %v, want %v", what, series, got, by)
		}
	}
}

const (
	tokens200 = `agentidp_http_requests_total{route="POST /api/v1/token",status="200"}`
	tokens401 = `agentidp_http_requests_total{route="POST /api/v1/token",status="401"}`
	tokenTime = `agentidp_http_request_duration_seconds_count{route="POST /api/v1/token"}`
	issued    = `agentidp_tokens_issued_total`
	warm      = `agentidp_secret_comparisons_total{kind="warm"}`
	cold      = `agentidp_secret_comparisons_total{kind="cold"}`
)

func rejected(limit string) string { return `agentidp_limit_rejections_total{limit="` + limit + `"}` }
func refusal(reason string) string { return `agentidp_refusals_total{reason="` + reason + `"}` }
func storeErrors(of string) string { return `agentidp_store_errors_total{store="` + of + `"}` }
func storeCalls(of string) string {
	return `agentidp_store_call_duration_seconds_count{store="` + of + `"}`
}
func requests(r, status string) string {
	return `agentidp_http_requests_total{route="` + r + `",status="` + status + `"}`
}

// Every number moves by its cause, and by nothing else.
func TestMetricsFollowWhatHappens(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t), "METRICS_ADDR", metricsOn, "CORS_ORIGIN", "https://console.example.com")
	id, secret := p.newClient("resumes:read")
	wrong := "sk_live_" + strings.Repeat("0", 64)
	p.moves("the first token of a secret", func() { p.token(id, secret, "") }, map[string]float64{
		tokens200: 1, tokenTime: 1, issued: 1, cold: 1, warm: 0, "agentidp_audit_batch_events_sum": 1,
		"agentidp_audit_batch_events_count": 1, "agentidp_audit_commit_duration_seconds_count": 1, "agentidp_audit_head_seq": 1,
		refusal("invalid_client"): 0, rejected("client"): 0, rejected("address"): 0, rejected("quota"): 0,
	})
	p.moves("the second", func() { p.token(id, secret, "") }, map[string]float64{tokens200: 1, issued: 1, cold: 0, warm: 1})
	p.moves("a wrong secret", func() { p.want(p.form(id, wrong, "", "grant_type=client_credentials"), 401, "invalid_client") },
		map[string]float64{tokens401: 1, tokens200: 0, tokenTime: 1, issued: 0, cold: 0, warm: 0, refusal("invalid_client"): 1, "agentidp_audit_head_seq": 1})
	p.moves("a wrong secret with a right beginning", func() {
		p.want(p.form(id, secret[:len(secret)-4]+"0000", "", "grant_type=client_credentials"), 401, "invalid_client")
	}, map[string]float64{tokens401: 1, cold: 1, warm: 0})
	p.moves("a scope that isn't there", func() {
		p.want(p.form(id, secret, "", "grant_type=client_credentials&scope=x:y"), 400, "invalid_scope")
	},
		map[string]float64{refusal("invalid_scope"): 1, issued: 0, requests("POST /api/v1/token", "400"): 1})
	p.moves("a bearer token that is none", func() { p.want(p.api("x", "GET", "/agents", ""), 401, "UNAUTHORIZED") },
		map[string]float64{refusal("UNAUTHORIZED"): 1, requests("GET /api/v1/agents", "401"): 1})
	p.moves("a change with an event of its own", func() { p.newAgent("resumes:read") }, map[string]float64{
		requests("POST /api/v1/agents", "201"): 1, "agentidp_audit_head_seq": 1, "agentidp_audit_batch_events_sum": 0,
	})
	agent := agentJSON("taken@example.com", "resumes:read")
	p.want(p.api(p.bearer, "POST", "/agents", agent), 201, "")
	p.moves("an email that is taken, which is no fault of the store", func() { p.want(p.api(p.bearer, "POST", "/agents", agent), 409, "AGENT_ALREADY_EXISTS") },
		map[string]float64{refusal("AGENT_ALREADY_EXISTS"): 1, storeErrors("postgres"): 0})
	p.moves("no such path", func() { p.want(p.do("GET", "/nowhere", ""), 404, "NOT_FOUND") }, map[string]float64{requests("none", "404"): 1})
	p.moves("a method that isn't there", func() { p.want(p.do("PUT", "/health", ""), 405, "METHOD_NOT_ALLOWED") }, map[string]float64{requests("none", "405"): 1})
	p.moves("a preflight", func() {
		p.want(p.do("OPTIONS", "/api/v1/token", "", "Origin", "https://console.example.com", "Access-Control-Request-Method", "POST"), 204, "")
	}, map[string]float64{requests("preflight", "204"): 1})

	var head float64
	if err := p.db.QueryRow(t.Context(), `select max(seq) from audit_events`).Scan(&head); err != nil {
		t.Fatal(err)
	}
	if got := p.metric("agentidp_audit_head_seq"); got != head {
		t.Errorf("the head is %v, want %v, the last seq in PostgreSQL", got, head)
	}
	for _, store := range []string{"postgres", "redis"} {
		before := p.metric(storeCalls(store))
		p.eventually("the keeper has called "+store, func() bool { return p.metric(storeCalls(store)) > before })
	}

	p.eventually("redis is up", func() bool { return p.metric("agentidp_redis_up") == 1 })
	all := p.scrape()
	for series, want := range map[string]float64{
		"agentidp_http_requests_in_flight": 0, "agentidp_audit_queue_events": 0, "agentidp_audit_queue_capacity_events": queueSize,
		"agentidp_postgres_up": 1,
	} {
		if got := all[series].samples[series]; got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}
	build := all["agentidp_build_info"]
	if len(build.samples) != 1 || !strings.HasPrefix(build.labels["version"][0], release(t)) || !strings.HasPrefix(build.labels["goversion"][0], "go1.") {
		t.Errorf("the build is %v", build.labels)
	}
	stat, err := os.Stat(fmt.Sprintf("/proc/%d", p.cmd.Process.Pid)) // whose time is when it started
	if err != nil {
		t.Fatal(err)
	}
	if got := all["process_start_time_seconds"].samples["process_start_time_seconds"]; math.Abs(got-float64(stat.ModTime().Unix())) > 60 {
		t.Errorf("it started at %v, want about %v", got, stat.ModTime().Unix())
	}
	for series, least := range map[string]float64{"go_goroutines": 5, "go_memstats_heap_alloc_bytes": 100_000, "go_gc_cycles_total": 0, "go_gc_pause_cpu_seconds_total": 0} {
		if got, there := all[series].samples[series]; !there || got < least {
			t.Errorf("%s is %v, want at least %v", series, got, least)
		}
	}
	p.eventually("garbage was collected", func() bool { // each scrape leaves some
		return p.metric("go_gc_cycles_total") > 0 && p.metric("go_gc_pause_cpu_seconds_total") > 0
	})
	if name := os.Getenv("METRICS"); name != "" { // for make promtool
		if err := os.WriteFile(name, []byte(p.metricsText()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMetricsCountWhatLimitsRefuse(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t))
	id, secret := p.newClient("resumes:read", "tokens:read")
	limited := p.another("METRICS_ADDR", metricsOn, "RATE_LIMIT_PER_MINUTE", "3")
	const form = "grant_type=client_credentials"
	until429 := func(do func() answer) func() {
		return func() {
			for range 20 { // the window may have moved on
				if do().status == 429 {
					return
				}
			}
			t.Error("no 429 comes")
		}
	}
	limited.moves("a client that asks too often", until429(func() answer { return limited.form(id, secret, "", form) }),
		map[string]float64{rejected("client"): 1, rejected("address"): 0, rejected("quota"): 0, refusal("temporarily_unavailable"): 1})
	bearer := p.token(id, secret, "")
	limited.moves("a bearer that asks too often", until429(func() answer { return limited.api(bearer, "GET", "/agents/"+id, "") }),
		map[string]float64{rejected("client"): 1, refusal("RATE_LIMIT_EXCEEDED"): 1})
	limited.moves("an address that fails too often", until429(func() answer { return limited.form(id, "x", "", form) }),
		map[string]float64{rejected("client"): 0, rejected("address"): 1, rejected("quota"): 0})

	frugal := p.another("METRICS_ADDR", metricsOn, "MONTHLY_TOKEN_LIMIT", "3")
	id, secret = p.newClient("resumes:read")
	frugal.moves("three tokens of three", func() {
		for range 3 {
			frugal.token(id, secret, "")
		}
	}, map[string]float64{rejected("quota"): 0, issued: 3})
	frugal.moves("a fourth", func() { frugal.want(frugal.form(id, secret, "", form), 403, "unauthorized_client") },
		map[string]float64{rejected("quota"): 1, rejected("client"): 0, issued: 0, refusal("unauthorized_client"): 1})
}

func TestMetricsTellHowTheStoresAre(t *testing.T) {
	t.Parallel()
	postgres, cache := newPostgres(t), newRedisServer(t)
	p := newProgram(t, postgres.url(), cache.url(), "METRICS_ADDR", metricsOn)
	is := func(series string, want float64) {
		t.Helper()
		p.eventually(fmt.Sprintf("%s is %v", series, want), func() bool { return p.metric(series) == want })
	}
	rises := func(series string) {
		t.Helper()
		before := p.metric(series)
		p.eventually(series+" rises", func() bool { return p.metric(series) > before })
	}
	is("agentidp_redis_up", 1)
	none := p.metric(storeErrors("postgres"))

	cache.kill()
	is("agentidp_redis_up", 0)
	rises(storeErrors("redis"))
	if n := p.metric(storeErrors("postgres")); n != none || p.metric("agentidp_postgres_up") != 1 {
		t.Errorf("without Redis, PostgreSQL has failed %v times, want %v", n, none)
	}
	cache.start()
	is("agentidp_redis_up", 1)
	cache.set("maxmemory", "1")
	is("agentidp_redis_up", 0) // it can't count
	cache.set("maxmemory", "0")
	is("agentidp_redis_up", 1)

	postgres.hang()
	is("agentidp_postgres_up", 0)
	rises(storeErrors("postgres"))
	is("agentidp_redis_up", 1) // each store is judged by its own answers
	cache.hang()
	is("agentidp_redis_up", 0)
	cache.resume()
	is("agentidp_redis_up", 1)
	p.moves("a request that PostgreSQL doesn't answer", func() {
		p.want(p.form(p.id, p.secret, "", "grant_type=client_credentials"), 503, "temporarily_unavailable")
	}, map[string]float64{requests("POST /api/v1/token", "503"): 1, issued: 0, refusal("temporarily_unavailable"): 1,
		`agentidp_http_request_duration_seconds_bucket{route="POST /api/v1/token",le="1"}`: 0, tokenTime: 1}) // it waits for longer than that
	postgres.resume()
	is("agentidp_postgres_up", 1)

	postgres.kill()
	is("agentidp_postgres_up", 0)
	rises(storeErrors("postgres")) // also where there is nothing to connect to
	postgres.start()
	is("agentidp_postgres_up", 1)
}

// While the chain is locked by another, events of concurrent requests wait and
// are then stored together.
func TestMetricsShowTheAuditQueue(t *testing.T) {
	const n = 20
	p := newProgram(t, newDatabase(t), newRedis(t), "METRICS_ADDR", metricsOn)
	conn, err := p.db.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	lock := func(function string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), `select `+function+`($1)`, chainLock); err != nil {
			t.Fatal(err)
		}
	}
	for try := range 5 { // the lock may be held for 3 s, which is short on a machine that is busy
		before := p.scrape()
		lock("pg_advisory_lock")
		var group sync.WaitGroup
		var mu sync.Mutex
		good := 0
		for range n {
			group.Go(func() {
				q, err := http.NewRequest("POST", p.url+"/api/v1/token", strings.NewReader("grant_type=client_credentials"))
				if err != nil {
					return
				}
				q.Header.Set("Content-Type", "application/x-www-form-urlencoded")
				q.SetBasicAuth(p.id, p.secret)
				answer, err := testClient.Do(q)
				if err != nil {
					return
				}
				answer.Body.Close()
				mu.Lock()
				defer mu.Unlock()
				if answer.StatusCode == 200 {
					good++
				}
			})
		}
		waiting, inFlight := 0.0, 0.0
		for end := time.Now().Add(2 * time.Second); time.Now().Before(end) && (waiting == 0 || waiting+1 < inFlight || inFlight < n); time.Sleep(time.Millisecond) {
			all := p.scrape()
			waiting = all["agentidp_audit_queue_events"].samples["agentidp_audit_queue_events"]
			inFlight = all["agentidp_http_requests_in_flight"].samples["agentidp_http_requests_in_flight"]
		}
		lock("pg_advisory_unlock")
		group.Wait()
		if good < n || inFlight < n {
			t.Logf("try %d: %d of %d tokens, %v in flight", try, good, n, inFlight)
			continue
		}
		if waiting < 1 || waiting > n-1 {
			t.Errorf("%v events wait, want 1 to %d", waiting, n-1)
		}
		after := p.scrape()
		change := func(family, series string) float64 {
			return after[family].samples[series] - before[family].samples[series]
		}
		if sum, count := change("agentidp_audit_batch_events", "agentidp_audit_batch_events_sum"), change("agentidp_audit_batch_events", "agentidp_audit_batch_events_count"); sum != n || count < 2 || count >= n {
			t.Errorf("%v events were stored in %v batches, want %d in fewer than that", sum, count, n)
		}
		if ones := change("agentidp_audit_batch_events", `agentidp_audit_batch_events_bucket{le="1"}`); ones == change("agentidp_audit_batch_events", `agentidp_audit_batch_events_bucket{le="+Inf"}`) {
			t.Errorf("all %v batches have one event, want a larger one", ones)
		}
		if got := after["agentidp_http_requests_in_flight"].samples["agentidp_http_requests_in_flight"]; got != 0 {
			t.Errorf("%v requests are in flight when all are answered, want 0", got)
		}
		return
	}
	t.Error("the machine is too busy for this")
}

// No label has a value from a request, so nobody can fill the memory of the
// service or of Prometheus, or write there what others read.
func TestNoLabelOfMetricsIsFromARequest(t *testing.T) {
	p := newProgram(t, newDatabase(t), newRedis(t), "METRICS_ADDR", metricsOn, "CORS_ORIGIN", hostileOrigin)
	series := func(all map[string]*family) (list []string) {
		for _, f := range all {
			list = append(list, slices.Collect(maps.Keys(f.samples))...)
		}
		slices.Sort(list)
		return list
	}
	hostile := func(round int) {
		x := fmt.Sprintf("x7canvas%d", round)
		for _, path := range []string{"/" + x, "/api/v1/agents/" + x, "/api/v1/" + x + "/token", "/%22%7d%0a" + x, "/health?" + x, "/metrics", "/api/v1/token/" + x} {
			for _, method := range []string{"GET", "POST", "PUT", "OPTIONS", "HEAD", strings.ToUpper(x)} {
				q, err := http.NewRequest(method, p.url+path, strings.NewReader("grant_type="+x+"&scope="+x+"&client_id="+x+"&client_secret="+x))
				if err != nil {
					t.Fatal(err)
				}
				for _, name := range []string{"X-Request-Id", "User-Agent", "X-Forwarded-For", "Access-Control-Request-Method", "Authorization"} {
					q.Header.Set(name, x)
				}
				q.Header.Set("Content-Type", "application/x-www-form-urlencoded")
				q.Header.Set("Origin", hostileOrigin)
				q.Host = x
				answer, err := testClient.Do(q)
				if err != nil {
					t.Fatal(err)
				}
				answer.Body.Close()
			}
		}
		id, secret := p.newClient(x + ":read")
		p.token(id, secret, x+":read")
		p.want(p.form(id, secret, "", "grant_type="+x), 400, "unsupported_grant_type")
		p.want(p.form(id, "sk_live_"+x, "", "grant_type=client_credentials"), 401, "invalid_client")
		p.want(p.form(p.id, p.secret, "/introspect", "token="+x), 200, "")
	}
	hostile(0)
	p.eventually("the last is counted", func() bool { // which is after its answer
		return p.metric(`agentidp_http_requests_total{route="POST /api/v1/token/introspect",status="200"}`) == 1
	})
	before := series(p.scrape())
	for round := 1; round < 4; round++ {
		hostile(round)
	}
	all := p.scrape()
	if after := series(all); !slices.Equal(before, after) {
		t.Errorf("there are %d series after more of the same, want the %d from before: %q", len(after), len(before), after)
	}
	patterns := []string{"none", "preflight"}
	for _, rt := range routes(t) {
		patterns = append(patterns, rt.pattern)
	}
	reason := regexp.MustCompile(`^[A-Z_]{5,40}$|^[a-z_]{5,40}$`)
	status := regexp.MustCompile(`^[2-5][0-9][0-9]$`)
	seen := 0
	for name, f := range all {
		for label, values := range f.labels {
			for _, value := range values {
				seen++
				ok := false
				switch label {
				case "route":
					ok = slices.Contains(patterns, value)
				case "status":
					ok = status.MatchString(value)
				case "reason":
					ok = reason.MatchString(value)
				case "limit":
					ok = slices.Contains([]string{"client", "address", "quota"}, value)
				case "store":
					ok = value == "postgres" || value == "redis"
				case "kind":
					ok = value == "cold" || value == "warm"
				case "version", "goversion":
					ok = name == "agentidp_build_info"
				}
				if !ok || strings.Contains(strings.ToLower(value), "x7canvas") {
					t.Errorf("%s has the label %s=%q", name, label, value)
				}
			}
		}
	}
	if seen < 20 {
		t.Errorf("only %d labels were looked at", seen)
	}
}

func TestMetricsAreServedOnTheirOwnAddressAlone(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t), "METRICS_ADDR", metricsOn)
	p.want(p.do("GET", "/metrics", ""), 404, "NOT_FOUND")
	there := p.log.metrics()
	if host, _, err := net.SplitHostPort(there); err != nil || host != "127.0.0.1" {
		t.Fatalf("the log has %q as the address of /metrics, want one of loopback", there)
	}
	for request, want := range map[string]int{
		"GET /metrics": 200, "HEAD /metrics": 200, "POST /metrics": 405, "DELETE /metrics": 405, "GET /": 404, "GET /metrics/": 404,
		"GET /health": 404, "GET /api/v1/agents": 404, "POST /api/v1/token": 404, "GET /debug/pprof/": 404,
	} {
		method, path, _ := strings.Cut(request, " ")
		q, err := http.NewRequest(method, "http://"+there+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		q.SetBasicAuth(p.id, p.secret)
		answer, err := testClient.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != want {
			t.Errorf("%s at METRICS_ADDR = %d, want %d", request, answer.StatusCode, want)
		}
	}

	// One that sends half a request is let go of, as on the public port.
	idle, err := net.Dial("tcp", there)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	fmt.Fprint(idle, "GET /metrics HTTP/1.1\r\n")
	idle.SetReadDeadline(time.Now().Add(25 * time.Second))
	if _, err := io.ReadAll(idle); err != nil {
		t.Errorf("half a request: %v, want that the connection is closed", err)
	}

	taken := p.build()
	taken.Env = append(taken.Env, "METRICS_ADDR="+there, "PORT=0")
	out, err := taken.CombinedOutput()
	if failed, ok := errors.AsType[*exec.ExitError](err); !ok || failed.ExitCode() != 1 || !strings.Contains(string(out), "METRICS_ADDR") || strings.Contains(string(out), `"msg":"serving`) {
		t.Errorf("the start with an address that is taken = %v: %s, want an error that names METRICS_ADDR", err, out)
	}

	if err := p.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("the program ends with %v", err)
	}
	if conn, err := net.Dial("tcp", there); err == nil {
		conn.Close()
		t.Error("/metrics is served after the end")
	}
}

// What alerts and the dashboard ask for is there: names, labels and routes.
func TestAlertsAndDashboardUseMetricsThatExist(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t), "METRICS_ADDR", metricsOn)
	p.want(p.form(p.id, "x", "", "grant_type=client_credentials"), 401, "invalid_client")
	p.want(p.api("x", "GET", "/agents", ""), 401, "UNAUTHORIZED")
	p.eventually("they are counted", func() bool { return p.metric(tokens401) == 1 && p.metric(refusal("UNAUTHORIZED")) == 1 })
	all := p.scrape()

	text, err := os.ReadFile("docs/devops/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	var queries []string
	_, rules, _ := strings.Cut(string(text), "\ngroups:")
	alerts := strings.Split(rules, "- alert: ")[1:]
	if len(alerts) < 8 {
		t.Fatalf("found %d alerts", len(alerts))
	}
	names := map[string]bool{}
	for _, alert := range alerts {
		name, body, _ := strings.Cut(alert, "\n")
		if names[name] || !strings.HasPrefix(name, "AgentIdP") {
			t.Errorf("the alert %q is there twice, or isn't ours by its name", name)
		}
		names[name] = true
		for _, field := range []string{"expr", "for", "severity", "summary", "description"} {
			if !regexp.MustCompile(`(?m)^ +` + field + `: \S`).MatchString(body) {
				t.Errorf("the alert %s has no %s", name, field)
			}
		}
		if !regexp.MustCompile(`severity: (critical|warning)\n`).MatchString(body) {
			t.Errorf("the alert %s has another severity", name)
		}
		_, expr, _ := strings.Cut(body, "expr:")
		expr, _, _ = strings.Cut(expr, "\n        for:")
		queries = append(queries, expr)
		queries = append(queries, regexp.MustCompile(`\bagentidp_[a-z_]+`).FindAllString(body, -1)...) // also in descriptions
		for _, line := range regexp.MustCompile(`log lines? "([^"]+)"`).FindAllStringSubmatch(strings.Join(strings.Fields(body), " "), -1) {
			found := slices.ContainsFunc(goFiles(t, false), func(f sourceFile) bool {
				return regexp.MustCompile(`slog\.[A-Z][a-z]+\("` + regexp.QuoteMeta(line[1]) + `"`).MatchString(f.text)
			})
			if !found {
				t.Errorf("the alert %s names the log line %q, which nothing writes", name, line[1])
			}
		}
	}

	var dashboard struct {
		Panels []struct {
			ID      int
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
	}
	if text, err = os.ReadFile("docs/devops/dashboard.json"); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &dashboard); err != nil || len(dashboard.Panels) < 10 {
		t.Fatalf("the dashboard has %d panels: %v", len(dashboard.Panels), err)
	}
	for i, panel := range dashboard.Panels {
		if len(panel.Targets) == 0 || panel.Title == "" || panel.ID != i+1 {
			t.Errorf("panel %d of the dashboard is %+v", i, panel)
		}
		at := panel.GridPos
		for _, other := range dashboard.Panels[:i] {
			o := other.GridPos
			if at.X < o.X+o.W && o.X < at.X+at.W && at.Y < o.Y+o.H && o.Y < at.Y+at.H || at.X+at.W > 24 {
				t.Errorf("panel %q lies on %q, or beyond the edge", panel.Title, other.Title)
			}
		}
		for _, target := range panel.Targets {
			queries = append(queries, target.Expr)
		}
	}

	used := map[string]bool{}
	for _, q := range queries {
		in := map[string]bool{"instance": true, "job": true}
		metrics := regexp.MustCompile(`\b(?:agentidp|go|process)_[a-z_]+|\bup\b`).FindAllString(q, -1)
		if len(metrics) == 0 {
			t.Errorf("%q asks for nothing", q)
		}
		for _, name := range metrics {
			if name == "up" { // Prometheus's own
				continue
			}
			base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
			f := all[name]
			if f == nil && all[base] != nil && all[base].kind == "histogram" {
				f, in["le"] = all[base], true
			}
			if f == nil || f.kind == "histogram" && name == base {
				t.Errorf("%q asks for %s, which isn't there", q, name)
				continue
			}
			if rate := strings.Contains(q, "rate("+name); rate != (f.kind != "gauge") && strings.Contains(q, "(") && strings.Contains(q, name+"{") && !strings.Contains(q, name+`{status="500"} offset`) {
				t.Errorf("%q takes the rate of a %s", q, f.kind)
			}
			used[base] = true
			for label := range f.labels {
				in[label] = true
			}
		}
		for _, by := range regexp.MustCompile(`(?:by|on|without) \(([^)]*)\)`).FindAllStringSubmatch(q, -1) {
			for _, label := range strings.Split(by[1], ", ") {
				if !in[label] {
					t.Errorf("%q asks for the label %s, which isn't there", q, label)
				}
			}
		}
		for _, m := range regexp.MustCompile(`[{,]([a-z]+)(=~?)"([^"]*)"`).FindAllStringSubmatch(q, -1) {
			if !in[m[1]] {
				t.Errorf("%q asks for the label %s, which isn't there", q, m[1])
			}
			if m[1] == "route" || m[1] == "reason" || m[1] == "store" {
				if !slices.ContainsFunc(slices.Collect(maps.Values(all)), func(f *family) bool { return slices.Contains(f.labels[m[1]], m[3]) }) {
					t.Errorf("%q asks for %s %q, which isn't there", q, m[1], m[3])
				}
			}
		}
	}
	for name := range all { // and all that there is, is shown
		if !used[name] {
			t.Errorf("neither an alert nor the dashboard uses %s", name)
		}
	}
}

func TestMetricsCanBeSwitchedOff(t *testing.T) {
	t.Parallel()
	listening := func(p *program) (n int) { // of its sockets, in state LISTEN of proc(5)
		inodes := map[string]bool{}
		for _, kind := range []string{"tcp", "tcp6"} {
			table, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", p.cmd.Process.Pid, kind))
			for line := range strings.Lines(string(table)) {
				if fields := strings.Fields(line); len(fields) > 9 && fields[3] == "0A" {
					inodes["socket:["+fields[9]+"]"] = true
				}
			}
		}
		folder := fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)
		files, _ := os.ReadDir(folder)
		for _, file := range files {
			if target, _ := os.Readlink(folder + "/" + file.Name()); inodes[target] {
				n++
			}
		}
		return n
	}
	p := newProgram(t, newDatabase(t), newRedis(t)) // for which it is set to nothing
	if n := listening(p); n != 1 || p.log.metrics() != "" {
		t.Errorf("switched off, it listens on %d sockets, and for metrics on %q, want 1", n, p.log.metrics())
	}
	if n := listening(p.another("METRICS_ADDR", metricsOn)); n != 2 {
		t.Errorf("switched on, it listens on %d sockets, want 2", n)
	}
}
