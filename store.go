package main

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Advisory locks of PostgreSQL, each for one purpose.
const (
	schemaLock = 0x4167_656e_7401 + iota
	chainLock
	agentLock
)

//go:embed schema.sql
var schema string

// schemaVersion is raised with every change of schema.sql, which from version 2
// on only adds. So a version of the program does with a later schema.
const schemaVersion = 2

// settings are what our connections need of PostgreSQL, whatever the role, the
// database or the URL says. A commit has to be durable before it is
// acknowledged; a temporary table must not pass for one of ours; and a time or
// bytes in text must have the form that pgx reads. Each statement of a transaction
// has to see what was committed before it: else the head of the audit chain would
// be that of before its lock, and the chain would fork. A copy that stops for good
// in the middle of a transaction gives back its locks. The old time-out holds
// until the first of them has ended, so that is sent by itself.
const settings = `
	set synchronous_commit = on;
	set search_path = public, pg_temp;
	set default_transaction_isolation = 'read committed';
	set idle_in_transaction_session_timeout = '5s';
	set idle_session_timeout = 0;
	set lock_timeout = 0;
	set client_encoding = 'UTF8';
	set standard_conforming_strings = on;
	set datestyle = 'ISO, YMD';
	set timezone = 'UTC';
	set bytea_output = 'hex';`

// openPools makes the pool for requests, and one that requests must not hold
// up. What the latter asks is always the same, so it is planned once.
func openPools(ctx context.Context, cfg *pgxpool.Config, tracer pgx.QueryTracer) (db, inner *pgxpool.Pool, err error) {
	cfg.ConnConfig.Tracer = tracer
	cfg.ConnConfig.ConnectTimeout = storeTimeout
	cfg.PingTimeout = time.Second
	own := cfg.Copy()
	own.MaxConns = 4 // for the recorder, both lookups and the keeper
	for cfg, text := range map[*pgxpool.Config]string{cfg: settings, own: settings + " set plan_cache_mode = force_generic_plan"} {
		cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			return errors.Join(conn.PgConn().Exec(ctx, `set statement_timeout = 0`).Close(), conn.PgConn().Exec(ctx, text).Close())
		}
	}
	if db, err = pgxpool.NewWithConfig(ctx, cfg); err == nil {
		inner, err = pgxpool.NewWithConfig(ctx, own)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("opening the database: %w", err)
	}
	return db, inner, nil
}

var errPooled = errors.New("DATABASE_URL leads to a pooler that changes sessions between transactions, so that settings of others would reach in; let it have pool_mode = session")

// checkSessions fails with errPooled where one of two connections doesn't find
// the mark that it has left, as behind a pooler whose unit is the transaction.
// Against the order in which they were left, so that neither one that gives out
// what was used last, nor one that gives out all in turns, gets through.
func checkSessions(ctx context.Context, pools ...*pgxpool.Pool) error {
	var conns []*pgxpool.Conn
	for _, pool := range pools {
		conn, err := pool.Acquire(ctx)
		if err != nil {
			return err
		}
		defer conn.Release()
		conns = append(conns, conn)
	}
	for range 3 {
		marks := []string{rand.Text(), rand.Text()}
		for i, conn := range conns {
			if _, err := conn.Exec(ctx, `select set_config('agentidp.mark', $1, false)`, pgx.QueryExecModeSimpleProtocol, marks[i]); err != nil {
				return err
			}
		}
		for i, conn := range slices.Backward(conns) {
			var mark string
			err := conn.QueryRow(ctx, `select coalesce(current_setting('agentidp.mark', true), '')`, pgx.QueryExecModeSimpleProtocol).Scan(&mark)
			if err == nil && mark != marks[i] {
				err = errPooled
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

var errNotMigrated = errors.New("the tables are another role's, and their schema is of an earlier version; let that role run migrate of this version")

// applySchema applies the schema, one copy at a time, and leaves its version as
// a comment. A later one is left as it is. Where others own the tables it must
// be there, unless always is set, which then fails. An index of a large table
// may take its time.
func (s *server) applySchema(ctx context.Context, always bool) error {
	waiting, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := checkSessions(waiting, s.inner, s.db); err != nil {
		return err
	}
	tx, err := s.inner.Begin(waiting)
	if err != nil {
		return err
	}
	defer tx.Rollback(ctx) // after a commit, nothing
	if _, err := tx.Exec(waiting, `select pg_advisory_xact_lock($1)`, schemaLock); err != nil {
		return err
	}
	applied, others := 0, false
	err = tx.QueryRow(waiting, `
		select coalesce(substring(obj_description(oid, 'pg_class') from '^schema ([0-9]+)$')::int, 1), not pg_has_role(relowner, 'usage')
		from pg_class
		where oid = to_regclass('audit_events')`).Scan(&applied, &others)
	switch {
	case err != nil && !errors.Is(err, pgx.ErrNoRows):
		return err
	case others && !always && applied < schemaVersion:
		return errNotMigrated
	case others && !always, applied > schemaVersion:
		return nil
	}
	if _, err = tx.Exec(ctx, schema+`comment on table audit_events is 'schema `+strconv.Itoa(schemaVersion)+`'`); err != nil {
		return err
	}
	return tx.Commit(ctx)
}

// A querier is what a pool and a transaction share.
type querier interface {
	Exec(context.Context, string, ...any) (pgconn.CommandTag, error)
	Query(context.Context, string, ...any) (pgx.Rows, error)
	QueryRow(context.Context, string, ...any) pgx.Row
	SendBatch(context.Context, *pgx.Batch) pgx.BatchResults
}

// one returns the row of a query. Where there is none it fails with none.
func one[T any](ctx context.Context, db querier, none error, doing, sql string, args ...any) (T, error) {
	rows, _ := db.Query(ctx, sql, args...) // its error comes back from Collect
	v, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[T])
	if errors.Is(err, pgx.ErrNoRows) {
		return v, none
	}
	if err != nil {
		return v, fmt.Errorf("%s: %w", doing, err)
	}
	return v, nil
}

// execSQL runs a statement whose result doesn't matter.
func execSQL(ctx context.Context, db querier, doing, sql string, args ...any) error {
	if _, err := db.Exec(ctx, sql, args...); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}

// A queue serves what is asked at the same time in one trip to a store: while
// some are served, the next gather. Who finds nobody waiting is served at once.
type queue[Q, A any] struct {
	waiting chan *question[Q, A]
	done    chan struct{}
}

type question[Q, A any] struct {
	asked    Q
	answer   A
	err      error
	wanted   context.Context // until its request has given up
	answered chan struct{}
}

const (
	queueSize = 1024 // questions that may wait; more are refused
	batchSize = 256
)

// newQueue takes what answers several questions at once, in their order, or
// fails for all of them.
func newQueue[Q, A any](serve func(context.Context, []Q) ([]A, error)) *queue[Q, A] {
	q := &queue[Q, A]{make(chan *question[Q, A], queueSize), make(chan struct{})}
	go q.run(serve)
	return q
}

func (q *queue[Q, A]) run(serve func(context.Context, []Q) ([]A, error)) {
	defer close(q.done)
	for first := range q.waiting {
		runtime.Gosched() // who is about to ask does so first
		batch := []*question[Q, A]{first}
		for len(batch) < batchSize && len(q.waiting) > 0 {
			batch = append(batch, <-q.waiting)
		}
		batch = slices.DeleteFunc(batch, func(x *question[Q, A]) bool { return x.wanted.Err() != nil })
		if len(batch) == 0 {
			continue
		}
		asked := make([]Q, len(batch))
		for i, x := range batch {
			asked[i] = x.asked
		}
		ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
		answers, err := serve(ctx, asked)
		cancel()
		for i, x := range batch {
			if x.err = err; err == nil {
				x.answer = answers[i]
			}
			close(x.answered)
		}
	}
}

// close serves what is queued. The caller must have stopped all that asks.
func (q *queue[Q, A]) close() {
	close(q.waiting)
	<-q.done
}

func (q *queue[Q, A]) put(ctx context.Context, asked Q) *question[Q, A] {
	x := &question[Q, A]{asked: asked, wanted: ctx, answered: make(chan struct{})}
	select {
	case q.waiting <- x:
	default:
		x.err = errors.New("the queue is full")
		close(x.answered)
	}
	return x
}

func (x *question[Q, A]) wait() (answer A, err error) {
	select {
	case <-x.answered:
		return x.answer, x.err
	case <-x.wanted.Done():
		return answer, fmt.Errorf("waiting in a queue: %w", x.wanted.Err())
	}
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

// change does something and records it in one transaction. An event without an
// action is none.
//
// It locks first who acts and whom it concerns, and then looks whether who acts
// is alive. What cuts an agent off is a change that concerns it. So a change
// either commits before the cut, or sees it, however long ago it was let in.
func (s *server) change(r *request, concerned string, do func(context.Context, pgx.Tx) (event, error)) error {
	ctx, head := r.Context(), int64(0)
	err := pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) error {
		if err := r.caller.enter(ctx, tx, concerned); err != nil {
			return err
		}
		e, err := do(ctx, tx)
		if err == nil && e.Action != "" {
			head, err = appendEvents(ctx, tx, []event{e.by(r)}, false)
		}
		return err
	})
	if err == nil {
		s.meter.head.Store(max(head, s.meter.head.Load()))
	}
	return err
}

// enter locks in the order of ids, so that two agents which change each other
// don't wait for each other. An operator, who has no id, is always alive.
func (c caller) enter(ctx context.Context, tx pgx.Tx, concerned string) error {
	ids := slices.DeleteFunc([]string{c.AgentID, concerned}, func(id string) bool { return !isID(id) })
	err := execSQL(ctx, tx, "locking agents", `
		select from agents
		where agent_id = any($1)
		order by agent_id
		for no key update`, ids)
	if err != nil || c.AgentID == "" {
		return err
	}
	alive, err := areAlive(ctx, tx, []origin{c.origin}) // a statement of its own, which sees what was committed before the lock
	switch {
	case err != nil:
		return err
	case !alive[0] && c.TokenID != "":
		return errInvalidToken
	case !alive[0]:
		return errBadClient
	}
	return nil
}

const (
	wellFor    = time.Second
	keepEvery  = wellFor / 4
	clockTold  = 2 * time.Second // what PostgreSQL's clock and ours may be apart without a word
	clockTrust = 5 * time.Minute // and at all
)

// A pulse is when a store last did what requests need of it, or nil after a
// failure. It is well if that is a moment ago.
type pulse struct{ atomic.Pointer[time.Time] }

func (p *pulse) beat(err error) {
	if now := time.Now(); err == nil {
		p.Store(&now)
	} else {
		p.Store(nil)
	}
}

func (p *pulse) within(age time.Duration) bool {
	last := p.Load()
	return last != nil && time.Since(*last) < age
}

func (p *pulse) well() bool { return p.within(wellFor) }

// startKeeper starts what watches over both stores and the clock, and returns
// what stops it. Whatever is wrong is logged when it begins, and tried again.
func (s *server) startKeeper() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var loops sync.WaitGroup
	for name, look := range map[string]func(context.Context) error{"postgres": s.keepPostgres, "redis": s.keepRedis, "clock": s.checkClock} {
		loops.Go(func() {
			for troubled := false; ctx.Err() == nil; {
				err := look(ctx)
				if (err != nil) != troubled && ctx.Err() == nil {
					troubled = err != nil
					slog.Warn("keeper", "of", name, "well", !troubled, "error", err)
				}
				select {
				case <-ctx.Done():
				case <-time.After(keepEvery):
				}
			}
		})
	}
	return func() { cancel(); loops.Wait() }
}

// keepPostgres reads the clock, and where no event was committed just now finds
// out whether one could be.
func (s *server) keepPostgres(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	err := s.readClock(ctx)
	if err == nil && !s.postgres.within(keepEvery) {
		err = s.probe(ctx)
		s.postgres.beat(err)
	}
	if err == nil && time.Since(s.swept) > 10*time.Second && s.clockDistance().Abs() < clockTrust {
		s.swept = time.Now() // few at a time, since a long stop may have left many
		err = execSQL(ctx, s.inner, "deleting expired revocations", `
			delete from token_revocations
			where jti in (select jti from token_revocations where expires_at < now() limit 10000)`)
	}
	if err != nil { // else each connection that is dead unseen would cost a time-out, one after another
		s.postgres.beat(err)
		s.db.Reset()
		s.inner.Reset()
	}
	return err
}

// probe commits durably, as requests need it, and first tries to append an event
// where that went wrong the last time. A read-only PostgreSQL is of no use.
func (s *server) probe(ctx context.Context) error {
	return pgx.BeginFunc(ctx, s.inner, func(tx pgx.Tx) error {
		if !s.postgres.well() {
			attempt, err := tx.Begin(ctx) // a savepoint
			if err != nil {
				return err
			}
			_, err = appendEvents(ctx, attempt, []event{{Action: authFailed, Outcome: "failure", Metadata: rawJSON("{}")}}, false)
			if err = errors.Join(err, attempt.Rollback(ctx)); err != nil {
				return err
			}
		}
		return execSQL(ctx, tx, "asking PostgreSQL to write", `
			select 1 / (current_setting('transaction_read_only') = 'off')::int, pg_advisory_xact_lock($1),
				pg_logical_emit_message(true, 'agentidp', '')`, chainLock)
	})
}

// keepRedis finds out whether Redis can count, as it does for requests.
func (s *server) keepRedis(ctx context.Context) error {
	begun := time.Now()
	err := admitScript.Run(ctx, s.redis, []string{""}, "keeper", math.MaxInt32, 0, 0, 0).Err()
	s.meter.asked(`store="redis"`, begun, err)
	s.redis.beat(err)
	if err != nil {
		return fmt.Errorf("counting in Redis: %w", err)
	}
	return nil
}

// A reading is what PostgreSQL's clock said, and when that was here.
type reading struct{ there, here time.Time }

// readClock asks for the time, which is that in the middle of the question. A
// slow answer says too little.
func (s *server) readClock(ctx context.Context) error {
	var there time.Time
	begun := time.Now()
	if err := s.inner.QueryRow(ctx, `select clock_timestamp()`).Scan(&there); err != nil {
		return fmt.Errorf("reading PostgreSQL's clock: %w", err)
	}
	if took := time.Since(begun); took < time.Second {
		s.clock.Store(&reading{there, begun.Add(took / 2)})
	}
	return nil
}

// now is the time by PostgreSQL's clock, the one that all copies share. Between
// readings it goes on as ours does, whatever that is set to.
func (s *server) now() time.Time {
	r := s.clock.Load()
	return r.there.Add(time.Since(r.here))
}

// clockDistance is how far PostgreSQL's clock is ahead of this machine's.
func (s *server) clockDistance() time.Duration {
	r := s.clock.Load()
	return r.there.Sub(r.here.Round(0)) // without the monotonic part
}

func (s *server) checkClock(context.Context) error {
	if d := s.clockDistance(); d.Abs() > clockTold {
		return fmt.Errorf("PostgreSQL's clock is %v ahead of this machine's: which of them is right?", d.Round(time.Millisecond))
	}
	return nil
}
