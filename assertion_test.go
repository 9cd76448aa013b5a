package main

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"
)

// Two copies that are given the same assertions in another order don't wait for each
// other: ids are stored in an order of their own.
func TestUsesAreStoredInOneOrder(t *testing.T) {
	t.Parallel()
	s, _, _ := newServer(t)
	ids := []string{useID("a", "1"), useID("a", "2"), useID("a", "3")}
	slices.Sort(ids)
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 2, 0}} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		var uses []use
		for _, i := range order {
			uses = append(uses, use{ids[i], time.Now().Add(time.Hour)})
		}
		tx, err := s.inner.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if first, err := useOnce(ctx, tx, uses[slices.Index(order, 0):][:1]); err != nil || !first[0] {
			t.Fatal(first, err)
		}
		other := make(chan error, 1)
		var got []bool
		go func() {
			var err error
			got, err = useOnce(ctx, s.inner, uses)
			other <- err
		}()
		for waiting := 0; waiting == 0; time.Sleep(10 * time.Millisecond) {
			if err := s.db.QueryRow(ctx, `select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'
				and query like '%token_revocations%'`).Scan(&waiting); err != nil {
				t.Fatal(err)
			}
		}
		// It waits for the least of them, and holds none that we want.
		rest, err := useOnce(ctx, tx, uses)
		if err == nil {
			err = tx.Commit(ctx)
		}
		if otherErr := <-other; err != nil || otherErr != nil || fmt.Sprint(got) != "[false false false]" {
			t.Errorf("in the order %v: %v, %v, and the other %v, %v", order, rest, err, got, otherErr)
		}
		if err := execSQL(ctx, s.inner, "forgetting", `delete from token_revocations`); err != nil {
			t.Fatal(err)
		}
	}
}
