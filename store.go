package main

import (
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

const storeTimeout = 3 * time.Second // for one transaction beside requests

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

// planned returns the rows of a query that one plan is good for, whatever is asked: over
// the partitions of the log it takes several times as long to plan as to run.
func planned[T any](ctx context.Context, db querier, sql string, args ...any) (list []T, err error) {
	batch := &pgx.Batch{} // one transaction
	batch.Queue(`select set_config('plan_cache_mode', 'force_generic_plan', true)`)
	batch.Queue(sql, args...).Query(func(rows pgx.Rows) (err error) {
		list, err = pgx.CollectRows(rows, pgx.RowToStructByName[T])
		return err
	})
	return list, db.SendBatch(ctx, batch).Close()
}

// execSQL runs a statement whose result doesn't matter.
func execSQL(ctx context.Context, db querier, doing, sql string, args ...any) error {
	if _, err := db.Exec(ctx, sql, args...); err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}

const countedTo = 10_000 // rows of a list; beyond, counting costs more than it tells

// A span is the part of a list that is asked for.
type span struct{ page, limit int }

// A page of a list.
type page[T any] struct {
	Data   []T  `json:"data"`
	Total  int  `json:"total"`
	Capped bool `json:"totalCapped,omitempty"` // there are more than total
	Page   int  `json:"page"`
	Limit  int  `json:"limit"`
}

// list returns a page of the rows of a query, and whether there are more. Args
// name its arguments. It is planned for just these: a plan for any filters
// would fit none. Tail orders it and is not counted.
func list[T any](ctx context.Context, db querier, part span, args pgx.NamedArgs, columns, from, tail string) (page[T], bool, error) {
	p := page[T]{Page: part.page, Limit: part.limit}
	args["limit"], args["offset"], args["counted"] = part.limit+1, (part.page-1)*part.limit, countedTo+1
	rows, _ := db.Query(ctx, `select `+columns+from+tail+` limit @limit offset @offset`, pgx.QueryExecModeExec, args)
	var err error
	if p.Data, err = pgx.CollectRows(rows, pgx.RowToStructByName[T]); err != nil {
		return p, false, fmt.Errorf("listing: %w", err)
	}
	err = db.QueryRow(ctx, `select count(*) from (select 1 `+from+` limit @counted) as counted`, pgx.QueryExecModeExec, args).Scan(&p.Total)
	if err != nil {
		return p, false, fmt.Errorf("counting: %w", err)
	}
	p.Capped, p.Total = p.Total > countedTo, min(p.Total, countedTo)
	more := len(p.Data) > part.limit
	p.Data = p.Data[:min(len(p.Data), part.limit)]
	return p, more, nil
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

var idPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// isID tells whether s is a UUID in the one form that we write: PostgreSQL
// takes others, and a limit or a lock-out must not have several keys.
func isID(s string) bool { return idPattern.MatchString(s) }

// newID makes a UUID of version 7, which sorts by time (RFC 9562, section 5.7).
func (s *server) newID() string {
	var rest [10]byte
	rand.Read(rest[:])
	return idOf(s.now(), rest)
}

func idOf(t time.Time, rest [10]byte) string {
	return uuid([16]byte(append(binary.BigEndian.AppendUint64(nil, uint64(t.UnixMilli()))[2:], rest[:]...)), 7)
}

// uuid writes bytes as a UUID of a version, which takes the place of 6 bits.
func uuid(b [16]byte, version byte) string {
	b[6] = b[6]&0x0f | version<<4
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// A moment is a time in UTC with milliseconds, as PostgreSQL has it.
type moment struct{ time.Time }

func (m moment) String() string               { return m.UTC().Format("2006-01-02T15:04:05.000Z") }
func (m moment) MarshalJSON() ([]byte, error) { return []byte(`"` + m.String() + `"`), nil }

func (m *moment) ScanTimestamptz(v pgtype.Timestamptz) error {
	m.Time = v.Time
	return nil
}

const wellFor = time.Second

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

const clockTrust = 5 * time.Minute // what PostgreSQL's clock and ours may be apart

// A reading is what PostgreSQL's clock said, and when that was here.
type reading struct{ there, here time.Time }

// at goes on as our clock does, whatever that is set to.
func (r *reading) at(now time.Time) time.Time { return r.there.Add(now.Sub(r.here)) }

// readClock asks for the time, which is that in the middle of the question, give or take
// half of it. What the last reading says within that stands, or ids would not be in order.
func (s *server) readClock(ctx context.Context) error {
	var there time.Time
	begun := time.Now()
	if err := s.inner.QueryRow(ctx, `select clock_timestamp()`).Scan(&there); err != nil {
		return fmt.Errorf("reading PostgreSQL's clock: %w", err)
	}
	half := time.Since(begun) / 2
	if off := there.Sub(s.clock.Load().at(begun.Add(half))); off.Abs() > half && half < time.Second/2 {
		s.clock.Store(&reading{there, begun.Add(half)})
	}
	return nil
}

// now is the time by PostgreSQL's clock, the one that all copies share.
func (s *server) now() time.Time { return s.clock.Load().at(time.Now()) }

// clockDistance is how far PostgreSQL's clock is ahead of this machine's.
func (s *server) clockDistance() time.Duration {
	now := time.Now()
	return s.clock.Load().at(now).Sub(now.Round(0)) // Round takes the monotonic part away
}

// settings are what our connections need of PostgreSQL, whatever the role, the
// database or the URL says. A commit has to be durable before it is
// acknowledged; a temporary table must not pass for one of ours; and a time or
// bytes in text must have the form that pgx reads. Each statement of a transaction
// has to see what was committed before it: else the head of the audit chain would
// be that of before its lock, and the chain would fork. A copy that stops for good
// in the middle of a transaction gives back its locks. Nothing of ours runs for so
// long that compiling it gains; and a plan that was made while a table was empty must
// not read all of it where an index leads there, once it is full. The old time-out holds
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
	set bytea_output = 'hex';
	set array_nulls = on;
	set jit = off;
	set enable_seqscan = off;`

// openPools makes the pool for requests, and one that requests must not hold
// up. What the latter asks is always the same, so it is planned once.
func openPools(ctx context.Context, cfg *pgxpool.Config, tracer pgx.QueryTracer) (db, inner *pgxpool.Pool, err error) {
	cfg.ConnConfig.Tracer = tracer
	cfg.ConnConfig.ConnectTimeout = storeTimeout
	cfg.PingTimeout = time.Second
	own := cfg.Copy()
	own.MaxConns = 6 // for the recorder, four lookups and the keeper
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

// Advisory locks of PostgreSQL, each for one purpose.
const (
	schemaLock = 0x4167_656e_7401 + iota
	chainLock
	agentLock
	sweepLock
)

//go:embed schema.sql
var schema string

// schemaVersion is raised with every change of schema.sql, which from version 2
// on only adds. So a version of the program does with a later schema.
const schemaVersion = 7

var errEncoding = errors.New("the database is not in UTF8, so that it can't keep every text: make another, by createdb -E UTF8 -T template0")

var errNotMigrated = errors.New("the tables are another role's, and their schema is of an earlier version; let that role run migrate of this version")

// applySchema applies the schema, part by part, and leaves its version as a comment.
// A later one is left as it is. Where others own the tables it must be there, unless
// always is set, which then fails.
func (s *server) applySchema(ctx context.Context, always bool) error {
	waiting, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := checkSessions(waiting, s.inner, s.db); err != nil {
		return err
	}
	encoding := ""
	if err := s.inner.QueryRow(waiting, `select current_setting('server_encoding')`).Scan(&encoding); err != nil {
		return err
	}
	if encoding != "UTF8" {
		return errEncoding
	}
	parts := strings.Split(schema, "\n---\n")
	for i, part := range parts {
		if err := s.applyPart(ctx, part, i == len(parts)-1, always); err != nil {
			return err
		}
	}
	return nil
}

// applyPart applies a part of the schema, one copy at a time. Where this version is
// there, only migrate looks at more than the last. An index of a large table may take
// its time; but who waits for a table holds up all who come after, so that is tried
// again after less than a request waits, and more than autovacuum takes to give way.
func (s *server) applyPart(ctx context.Context, part string, last, always bool) error {
	waiting, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
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
	case others && !always, applied > schemaVersion, applied == schemaVersion && !last && !always:
		return nil
	}
	if last && applied < schemaVersion {
		part += `comment on table audit_events is 'schema ` + strconv.Itoa(schemaVersion) + `'`
	}
	if _, err = tx.Exec(ctx, `set local lock_timeout = '2s'; `+part); err != nil {
		return err
	}
	return tx.Commit(ctx)
}
