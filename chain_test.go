package main

import (
	"fmt"
	"testing"
)

// One reading checks only so much of the chain; the rest is another's.
func TestChainIsReadInPieces(t *testing.T) {
	t.Parallel()
	s, id, plain := newServer(t)
	for range 30 {
		s.bearerOf(t, id, plain)
	}
	var head int64
	if err := s.db.QueryRow(t.Context(), `select max(seq) from audit_events`).Scan(&head); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct{ from, limit, begins, events, ends int64 }{
		{1, 10, 1, 10, 10}, {12, 5, 12, 5, 16}, {head - 1, 2, head - 1, 2, head}, {head, 2, head, 1, head}, {0, 10, head - 9, 10, head},
		{0, 1000, 1, head, head}, {head + 1, 10, head + 1, 0, head},
	} {
		seen := row.begins
		report, err := s.verifyChain(t.Context(), row.from, row.limit, nil, func(e *event) error {
			if e.Seq != seen {
				return fmt.Errorf("seq %d, want %d", e.Seq, seen)
			}
			seen++
			return nil
		})
		if err != nil || !report.Verified || report.FromSeq != row.begins || report.Events != row.events || report.HeadSeq != row.ends {
			t.Errorf("verifyChain(%d, %d) = %+v, %v, want %+v", row.from, row.limit, report, err, row)
		}
		if err := s.signCheckpoint(&report, nil); err != nil || (report.Checkpoint != nil) != (row.events > 0) {
			t.Errorf("behind verifyChain(%d, %d) signCheckpoint makes %v, %v", row.from, row.limit, report.Checkpoint, err)
		}
	}
}

// The event before the first that is read counts for its hash alone, and once.
func TestEventBeforeTheFirstStandsThereOnce(t *testing.T) {
	t.Parallel()
	s, id, plain := newServer(t)
	for range 5 {
		s.bearerOf(t, id, plain)
	}
	err := execSQL(t.Context(), s.db, "forging", `
		insert into audit_events
		select event_id, seq, "timestamp" + interval '1 ms', agent_id, actor_id, action, outcome, ip_address, user_agent, metadata, prev_hash, hash
		from audit_events
		where seq = 3`)
	if err != nil {
		t.Fatal(err)
	}
	if report, err := s.verifyChain(t.Context(), 4, 2, nil, nil); err != nil || report.FirstBadSeq != 3 {
		t.Errorf("behind two events of seq 3, verifyChain(4, 2) = %+v, %v, want 3 to be bad", report, err)
	}
}
