package main

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// What has expired is looked for each second, by a plan that may be from when there was nothing at all: it must not read what
// is there since.
func TestSweepOfExpiredRevocationsReadsNoOthers(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	cfg, err := loadConfig(lookup(map[string]string{"JWT_PRIVATE_KEY": testKey(), "DATABASE_URL": url, "REDIS_URL": testRedisURL}))
	if err != nil {
		t.Fatal(err)
	}
	s, err := open(t.Context(), cfg, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{`vacuum analyze token_revocations`, `
		insert into token_revocations
		select gen_random_uuid(), now() + case when n > 10 then interval '1 hour' else interval '-1 hour' end
		from generate_series(1, 5010) as n`} {
		if _, err := s.db.Exec(t.Context(), sql); err != nil {
			t.Error(err)
		}
		s.swept = time.Time{}
		if err := s.keepPostgres(t.Context()); err != nil {
			t.Error(err)
		}
	}
	s.close()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var others, left, read int
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) { // sessions say at their end what they have read
		err := conn.QueryRow(t.Context(), `
			select (select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()),
				n_tup_ins - n_tup_del, seq_tup_read + idx_tup_fetch
			from pg_stat_user_tables
			where relname = 'token_revocations'`).Scan(&others, &left, &read)
		if err != nil || others == 0 || time.Now().After(end) {
			if err != nil || others > 0 || left != 5000 || read > 100 {
				t.Errorf("%d revocations are left, and %d were read beside %d sessions, %v; want 5000, few and none", left, read, others, err)
			}
			return
		}
	}
}

// Wherever in a probe its connection ends, that is an error and nothing worse:
// the keeper's panic would be the program's.
func TestProbeWhoseConnectionEndsFails(t *testing.T) {
	t.Parallel()
	cfg, err := loadConfig(lookup(map[string]string{
		"JWT_PRIVATE_KEY": testKey(), "DATABASE_URL": newDatabase(t), "REDIS_URL": testRedisURL,
	}))
	if err != nil {
		t.Fatal(err)
	}
	s, err := open(t.Context(), cfg, false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	var left atomic.Int64 // messages to PostgreSQL that are let through
	fragile, err := pgxpool.ParseConfig(cfg.database.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	dial := fragile.ConnConfig.DialFunc
	fragile.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		return &fragileConn{conn, &left}, err
	}
	s.inner.Close()
	if s.inner, err = pgxpool.NewWithConfig(t.Context(), fragile); err != nil {
		t.Fatal(err)
	}
	for n, ended := int64(0), true; ended; n++ { // until it has no more messages
		left.Store(1 << 30)
		s.inner.Reset()
		if err := s.readClock(t.Context()); err != nil { // so that there is a connection
			t.Fatal(err)
		}
		s.postgres.beat(errors.New("not well"))
		left.Store(n)
		func() {
			defer func() {
				if p := recover(); p != nil {
					t.Errorf("a connection that ends before message %d of a probe: panic: %v", n+1, p)
				}
			}()
			err := s.probe(t.Context())
			if ended = left.Load() < 0; (err != nil) != ended {
				t.Errorf("a connection that ends before message %d of a probe (%v) = %v", n+1, ended, err)
			}
		}()
		if n > 20 {
			t.Fatal("a probe has no end")
		}
	}
	left.Store(1 << 30)
}

// A fragileConn ends when so many messages have been written to it.
type fragileConn struct {
	net.Conn
	left *atomic.Int64
}

func (c *fragileConn) Write(b []byte) (int, error) {
	if c.left.Add(-1) < 0 {
		c.Close()
	}
	return c.Conn.Write(b)
}

// A slow answer, which is as exact as it was slow, neither sets the clock back nor
// forth. One that is off by more than that does.
func TestSlowAnswerLeavesTheClock(t *testing.T) {
	t.Parallel()
	s, _, _ := newServer(t)
	ctx, slow := t.Context(), 400*time.Millisecond
	read := func() {
		t.Helper()
		var held []*pgxpool.Conn
		for range s.inner.Config().MaxConns { // so that the question waits, which counts as the way to PostgreSQL
			conn, err := s.inner.Acquire(ctx)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, conn)
		}
		time.AfterFunc(slow, func() {
			for _, conn := range held {
				conn.Release()
			}
		})
		if err := s.readClock(ctx); err != nil {
			t.Fatal(err)
		}
	}
	before := s.clockDistance()
	if read(); (s.clockDistance() - before).Abs() > slow/4 {
		t.Errorf("a slow answer has changed the clock by %s", s.clockDistance()-before)
	}
	for _, by := range []time.Duration{time.Hour, -time.Minute, 2 * time.Second} {
		now := time.Now()
		s.clock.Store(&reading{now.Add(by), now})
		for n := 0; (s.clockDistance() - before).Abs() > slow; n++ {
			if n == 20 {
				t.Fatalf("a clock that was %s ahead is %s ahead after %d slow answers", by, s.clockDistance()-before, n)
			}
			read() // more than once where it is a very slow one
		}
	}
}

// Copies that sweep at the same time don't wait for each other: one does it.
func TestOneCopySweepsAtATime(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	cfg, err := loadConfig(lookup(map[string]string{"JWT_PRIVATE_KEY": testKey(), "DATABASE_URL": newDatabase(t), "REDIS_URL": testRedisURL}))
	if err != nil {
		t.Fatal(err)
	}
	s, err := open(ctx, cfg, false) // without a keeper of its own
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	left := func() (n int) {
		t.Helper()
		if err := s.db.QueryRow(ctx, `select count(*) from token_revocations`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if _, err := s.db.Exec(ctx, `insert into token_revocations select gen_random_uuid(), now() - interval '1 hour' from generate_series(1, 15000)`); err != nil {
		t.Fatal(err)
	}
	another, err := s.db.Begin(ctx)
	if err == nil {
		_, err = another.Exec(ctx, `select pg_advisory_xact_lock($1)`, sweepLock)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name string
		want int
	}{{"while another does", 15000}, {"when it has done so", 5000}, {"again", 0}} {
		if row.want < 15000 && another != nil {
			if err := another.Rollback(ctx); err != nil {
				t.Fatal(err)
			}
			another = nil
		}
		s.swept = time.Time{}
		if err := s.keepPostgres(ctx); err != nil || left() != row.want {
			t.Errorf("%s: it sweeps with %v, and %d are left, want %d", row.name, err, left(), row.want)
		}
	}
}

// What has expired may lie for long, so that it can't be deleted is no reason to refuse requests.
func TestSweepThatFailsIsNoLostStore(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	cfg, err := loadConfig(lookup(map[string]string{"JWT_PRIVATE_KEY": testKey(), "DATABASE_URL": newDatabase(t), "REDIS_URL": testRedisURL}))
	if err != nil {
		t.Fatal(err)
	}
	s, err := open(ctx, cfg, false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for _, sql := range []string{
		`insert into token_revocations values (gen_random_uuid(), now() - interval '1 hour')`,
		`create function refuse() returns trigger language plpgsql as $$ begin raise exception 'refused'; end $$`,
		`create trigger refuse before delete on token_revocations for each row execute function refuse()`,
	} {
		if _, err := s.db.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.keepPostgres(ctx); err == nil || !s.postgres.well() {
		t.Errorf("a sweep that fails: %v, and PostgreSQL is well: %v; want an error, and that it is", err, s.postgres.well())
	}
}
