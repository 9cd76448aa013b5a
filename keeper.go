package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	keepEvery = wellFor / 4
	clockTold = 2 * time.Second // what PostgreSQL's clock and ours may be apart without a word; clockTrust at all
)

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
	if err != nil { // else each connection that is dead unseen would cost a time-out, one after another
		s.postgres.beat(err)
		s.db.Reset()
		s.inner.Reset()
		return err
	}
	if time.Since(s.swept) > time.Second && s.clockDistance().Abs() < clockTrust {
		s.swept = time.Now() // few at a time, since a long stop may have left many; and one copy at a time, or they would wait for each other
		err = execSQL(ctx, s.inner, "deleting expired revocations", `
			with turn as materialized (select pg_try_advisory_xact_lock($1) as mine)
			delete from token_revocations
			where jti = any(array(select jti from token_revocations where expires_at < now() and (select mine from turn) limit 10000))`, sweepLock) // in might read all of them
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
			_, err = appendEvents(ctx, attempt, []entry{{event: event{Action: authFailed, Outcome: "failure", Metadata: rawJSON("{}")}}}, false)
			if err = errors.Join(err, attempt.Rollback(ctx)); err != nil {
				return err
			}
		}
		return execSQL(ctx, tx, "asking PostgreSQL to write", `
			select 1 / (current_setting('transaction_read_only') = 'off')::int, pg_advisory_xact_lock($1),
				pg_logical_emit_message(true, 'agentidp', '')`, chainLock)
	})
}

// keepRedis finds out whether Redis can count, as it does for requests: in a window
// and for a quota.
func (s *server) keepRedis(ctx context.Context) error {
	begun := time.Now()
	err := admitScript.Run(ctx, s.redis, []string{"monthly:keeper"}, "keeper", math.MaxInt32, math.MaxInt32, 0, begun.Add(time.Hour).UnixMilli(), "", 0).Err()
	s.meter.asked(`store="redis"`, begun, err)
	if err != nil { // it is lost once it has not counted for a second: one slow answer must not switch the limits off
		return fmt.Errorf("counting in Redis: %w", errors.Join(s.redis.denied(ctx), err))
	}
	s.redis.beat(nil)
	return nil
}

func (s *server) checkClock(context.Context) error {
	if d := s.clockDistance(); d.Abs() > clockTold {
		return fmt.Errorf("PostgreSQL's clock is %v ahead of this machine's: which of them is right?", d.Round(time.Millisecond))
	}
	return nil
}
