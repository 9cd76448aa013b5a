package main

import (
	"context"
	"fmt"
	"maps"
	"math"
	"net/http"
	"runtime"
	"runtime/metrics"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// A meter counts what Prometheus is to know of this copy. Words of ours tell
// its series apart, never a request's, so there is an end to them.
type meter struct {
	begun    time.Time
	head     atomic.Int64 // seq of the last event appended
	mu       sync.Mutex
	families map[string]map[string]*histogram // by name, then by labels
}

// A histogram counts values by the least bound that they don't exceed. One
// without bounds is a counter, and its sum is what is shown.
type histogram struct {
	bounds []float64
	counts [16]int64
	sum    float64
}

var bounds = map[string][]float64{ // by the unit at the end of a name
	"_seconds": {.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, math.Inf(1)},
	"_events":  {1, 2, 4, 8, 16, 32, 64, 128, batchSize, math.Inf(1)},
}

func newMeter() *meter {
	return &meter{begun: time.Now(), families: map[string]map[string]*histogram{}}
}

// add adds to a counter, or a value to a histogram.
func (m *meter) add(v float64, name, labels string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.families[name][labels]
	if h == nil {
		h = &histogram{bounds: bounds[name[strings.LastIndexByte(name, '_'):]]}
		if m.families[name] == nil {
			m.families[name] = map[string]*histogram{}
		}
		m.families[name][labels] = h
	}
	h.counts[sort.SearchFloat64s(h.bounds, v)]++
	h.sum += v
}

// asked counts a call to a store.
func (m *meter) asked(store string, begun time.Time, err error) {
	m.add(time.Since(begun).Seconds(), "agentidp_store_call_duration_seconds", store)
	if err != nil {
		m.add(1, "agentidp_store_errors_total", store)
	}
}

// A meter is told by pgx of each query, of each batch, and of who found no
// connection. The time when it began goes along in the context.

type begunKey struct{}

func (m *meter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return context.WithValue(ctx, begunKey{}, time.Now())
}
func (m *meter) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryEndData) {
	m.asked(`store="postgres"`, ctx.Value(begunKey{}).(time.Time), data.Err)
}
func (m *meter) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return context.WithValue(ctx, begunKey{}, time.Now())
}
func (m *meter) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (m *meter) TraceBatchEnd(ctx context.Context, _ *pgx.Conn, data pgx.TraceBatchEndData) {
	m.asked(`store="postgres"`, ctx.Value(begunKey{}).(time.Time), data.Err)
}
func (m *meter) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	return ctx
}
func (m *meter) TraceAcquireEnd(_ context.Context, _ *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	if data.Err != nil {
		m.add(1, "agentidp_store_errors_total", `store="postgres"`)
	}
}

// showMetrics is in the text form of Prometheus, version 0.0.4.
func (s *server) showMetrics(w http.ResponseWriter, _ *http.Request) {
	m, b, is := s.meter, &strings.Builder{}, map[bool]int{true: 1}
	number := func(kind, name, help string, v any) {
		fmt.Fprintf(b, "# HELP %[1]s %[2]s\n# TYPE %[1]s %[3]s\n%[1]s %[4]v\n", name, help, kind, v)
	}
	counted := func(kind, name, help string, zero ...string) { // zero are labels to show from the start
		now := map[string]histogram{}
		for _, labels := range zero {
			now[labels] = histogram{}
		}
		m.mu.Lock()
		for labels, h := range m.families[name] {
			now[labels] = *h
		}
		m.mu.Unlock()
		fmt.Fprintf(b, "# HELP %[1]s %[2]s\n# TYPE %[1]s %[3]s\n", name, help, kind)
		for _, labels := range slices.Sorted(maps.Keys(now)) {
			h, n := now[labels], int64(0)
			for i, bound := range h.bounds {
				n += h.counts[i]
				fmt.Fprintf(b, "%s_bucket{%s,le=\"%v\"} %d\n", name, labels, bound, n)
			}
			if h.bounds == nil {
				fmt.Fprintf(b, "%s{%s} %v\n", name, labels, h.sum)
			} else {
				fmt.Fprintf(b, "%[1]s_sum{%[2]s} %[3]v\n%[1]s_count{%[2]s} %[4]d\n", name, labels, h.sum, n)
			}
		}
	}
	counted("counter", "agentidp_http_requests_total", "Requests answered, by pattern of the route and status.")
	counted("histogram", "agentidp_http_request_duration_seconds", "Time from a request's header to its answer, without what it asked to wait.")
	number("gauge", "agentidp_http_requests_in_flight", "Requests at work that may wait for a store.", s.inFlight.Load())
	number("gauge", "agentidp_feed_readers", "Readers that wait for revocations or events.", s.readers.Load())
	counted("counter", "agentidp_refusals_total", "Answers that were an error, by its code.", `reason="invalid_client"`, `reason="invalid_token"`)
	counted("counter", "agentidp_limit_rejections_total", "Requests that a limit refused.", `limit="address"`, `limit="client"`, `limit="quota"`)
	counted("counter", "agentidp_tokens_issued_total", "Access tokens issued.", "")
	counted("counter", "agentidp_secret_comparisons_total", "Secrets compared by bcrypt (cold), or known from before (warm).", `kind="cold"`, `kind="warm"`)
	counted("histogram", "agentidp_store_call_duration_seconds", "Time of a call: a query, a batch of them, a script.")
	counted("counter", "agentidp_store_errors_total", "Calls that failed, or found no connection.", `store="postgres"`, `store="redis"`)
	number("gauge", "agentidp_postgres_up", "Whether events were committed within the last second, or could have been.", is[s.postgres.well()])
	number("gauge", "agentidp_redis_up", "Whether Redis could count within the last second.", is[s.redis.well()])
	number("gauge", "agentidp_keys_read", "Whether the files of the keys were right when they changed last.", is[!s.keysUnread.Load()])
	number("gauge", "agentidp_clock_distance_seconds", "How far PostgreSQL's clock is ahead of this machine's.", s.clockDistance().Seconds())
	counted("histogram", "agentidp_audit_batch_events", "Events stored together for concurrent requests.")
	counted("histogram", "agentidp_audit_commit_duration_seconds", "Time of the transaction that stores a batch, also where it failed.")
	number("gauge", "agentidp_audit_queue_events", "Events that wait to be stored.", len(s.recorder.waiting))
	number("gauge", "agentidp_audit_queue_capacity_events", "Events that may wait; more are refused.", queueSize)
	number("gauge", "agentidp_audit_head_seq", "Seq of the last event that this copy has appended since its start, 0 before the first.", m.head.Load())
	counted("gauge", "agentidp_build_info", "The version of the service and of Go; always 1.")
	fmt.Fprintf(b, "agentidp_build_info{version=%q,goversion=%q} 1\n", version(), runtime.Version())
	number("gauge", "process_start_time_seconds", "When the process started, in seconds since 1970.", m.begun.Unix())
	values := []metrics.Sample{{Name: "/sched/goroutines:goroutines"}, {Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/cycles/total:gc-cycles"}, {Name: "/cpu/classes/gc/pause:cpu-seconds"}}
	metrics.Read(values)
	number("gauge", "go_goroutines", "Goroutines that exist.", values[0].Value.Uint64())
	number("gauge", "go_memstats_heap_alloc_bytes", "Bytes of heap objects, dead ones too until they are swept.", values[1].Value.Uint64())
	number("counter", "go_gc_cycles_total", "Completed garbage collections.", values[2].Value.Uint64())
	number("counter", "go_gc_pause_cpu_seconds_total", "Time for which garbage collection stopped the program, times GOMAXPROCS.", values[3].Value.Float64())
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	strings.NewReplacer("{,", "{", "{}", "").WriteString(w, b.String()) // of no labels
}
