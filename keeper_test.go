package main

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
)

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
