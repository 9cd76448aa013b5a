package main

import (
	"bytes"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Each query, each batch and each failure to connect is told of, once.
func TestPgxTellsTheMeter(t *testing.T) {
	ctx := t.Context()
	open := func(url string) (*meter, *pgxpool.Pool) {
		config, err := pgxpool.ParseConfig(url)
		if err != nil {
			t.Fatal(err)
		}
		m := newMeter()
		config.ConnConfig.Tracer = m
		pool, err := pgxpool.NewWithConfig(ctx, config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(pool.Close)
		return m, pool
	}
	calls, errs := 0.0, 0.0
	m, pool := open(newDatabase(t))
	check := func(what string, m *meter, moreCalls, moreErrors float64) {
		t.Helper()
		calls, errs = calls+moreCalls, errs+moreErrors
		var got, failed float64
		if h := m.families["agentidp_store_call_duration_seconds"][`store="postgres"`]; h != nil {
			for _, n := range h.counts {
				got += float64(n)
			}
		}
		if h := m.families["agentidp_store_errors_total"][`store="postgres"`]; h != nil {
			failed = h.sum
		}
		if got != calls || failed != errs {
			t.Errorf("%s: %v calls and %v errors were told of, want %v and %v", what, got, failed, calls, errs)
		}
	}
	batch := func(second string) error {
		b := &pgx.Batch{}
		b.Queue("select 1")
		b.Queue(second)
		return pool.SendBatch(ctx, b).Close()
	}
	if _, err := pool.Exec(ctx, "select 1"); err != nil {
		t.Fatal(err)
	}
	check("a statement", m, 1, 0)
	var n int
	if err := pool.QueryRow(ctx, "select 1 where false").Scan(&n); !errors.Is(err, pgx.ErrNoRows) {
		t.Fatal(err)
	}
	check("a query without a row, which is no error", m, 1, 0)
	if err := pool.QueryRow(ctx, "select 1/0").Scan(&n); err == nil {
		t.Fatal("PostgreSQL divides by 0")
	}
	check("a query that fails", m, 1, 1)
	if err := batch("select 2"); err != nil {
		t.Fatal(err)
	}
	check("a batch of two", m, 1, 0)
	if err := batch("select 1 / (select 0)"); err == nil {
		t.Fatal("PostgreSQL divides by 0")
	}
	check("a batch that fails", m, 1, 1)
	if err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return execSQL(ctx, tx, "asking", "select 1") }); err != nil {
		t.Fatal(err)
	}
	check("a transaction: begin, a statement, commit", m, 3, 0)
	calls, errs = 0, 0
	m, pool = open("postgres://127.0.0.1:1/nobody") // where nothing listens
	if _, err := pool.Exec(ctx, "select 1"); err == nil {
		t.Fatal("something listens on port 1")
	}
	check("a failure to connect", m, 0, 1)
}

// At a bound, a value is within it, as Prometheus has it ("le").
func TestHistogramBounds(t *testing.T) {
	s := &server{meter: newMeter(), recorder: &queue[entry, found]{}, redis: &cache{}}
	s.clock.Store(&reading{time.Now(), time.Now()})
	for _, v := range []float64{.5, .5, .75, 11, 0} {
		s.meter.add(v, "agentidp_audit_commit_duration_seconds", "")
	}
	w := &plainWriter{header: http.Header{}}
	s.showMetrics(w, nil)
	for series, want := range map[string]string{
		`bucket{le="0.0005"}`: "1", `bucket{le="0.25"}`: "1", `bucket{le="0.5"}`: "3", `bucket{le="1"}`: "4", `bucket{le="10"}`: "4", `bucket{le="+Inf"}`: "5",
		"sum": "12.75",
	} {
		if line := "\nagentidp_audit_commit_duration_seconds_" + series + " " + want + "\n"; !strings.Contains(w.String(), line) {
			t.Errorf("the histogram lacks %q:\n%s", line, w)
		}
	}
}

type plainWriter struct {
	bytes.Buffer
	header http.Header
}

func (w *plainWriter) Header() http.Header { return w.header }

func (w *plainWriter) WriteHeader(int) {}

// What is counted for one token: its request, its commit, its comparison, its
// calls of PostgreSQL and Redis.
func BenchmarkMeter(b *testing.B) {
	m, status := newMeter(), 200
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			begun, route := time.Now(), `route="POST /api/v1/token"`
			m.add(1, "agentidp_http_requests_total", route+`,status="`+strconv.Itoa(status)+`"`)
			m.add(.002, "agentidp_http_request_duration_seconds", route)
			m.add(1, "agentidp_secret_comparisons_total", `kind="warm"`)
			m.add(1, "agentidp_tokens_issued_total", "")
			m.asked(`store="redis"`, begun, nil)
			m.asked(`store="postgres"`, begun, nil)
			m.add(1, "agentidp_audit_batch_events", "")
			m.add(.001, "agentidp_audit_commit_duration_seconds", "")
		}
	})
}

// What counting adds to a query, clocks and all.
func BenchmarkMeterOfAQuery(b *testing.B) {
	m := newMeter()
	b.ReportAllocs()
	for b.Loop() {
		ctx := m.TraceQueryStart(b.Context(), nil, pgx.TraceQueryStartData{})
		m.TraceQueryEnd(ctx, nil, pgx.TraceQueryEndData{})
	}
}

// A scrape of a copy all of whose routes were called.
func BenchmarkScrape(b *testing.B) {
	s := &server{meter: newMeter(), recorder: &queue[entry, found]{}, redis: &cache{}}
	s.clock.Store(&reading{time.Now(), time.Now()})
	for _, rt := range s.routes() {
		s.meter.add(.01, "agentidp_http_request_duration_seconds", `route="`+rt.pattern+`"`)
	}
	for b.Loop() {
		s.showMetrics(&plainWriter{header: http.Header{}}, nil)
	}
}
