package main

import (
	"testing"
)

// Who begins to read is not told of what is too old, and that is not read either, however much it is; also where the clock was
// set back.
func TestBeginningOfTheFeedIsRecent(t *testing.T) {
	t.Parallel()
	s, _, _ := newServer(t)
	tx, err := s.db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context())
	if _, err := tx.Exec(t.Context(), `
		alter table audit_events disable trigger append_only; -- with what newServer has recorded it would begin at seq 1
		delete from audit_events;
		insert into audit_events (`+eventColumns+`)
		select gen_random_uuid(), n, null, null, 'token.revoked', 'success', '', '', ('{"jti": "' || n || '"}')::json,
			now() - case when n = 20001 or n > 20003 then interval '1 hour' when n = 20002 then interval '23 hours' else interval '3 days' end,
			sha256(''), sha256(n::text::bytea)
		from generate_series(1, 20010) as n`); err != nil {
		t.Fatal(err)
	}
	read := func() (n int) {
		err := tx.QueryRow(t.Context(), `select sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) from pg_stat_xact_user_tables where relname like 'audit_events%'`).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := read()
	list, err := loadRevocations(t.Context(), tx, []place{{}})
	if err != nil || len(list[0].Entries) != 9 || list[0].More || list[0].Next.seq != 20010 {
		t.Errorf("the feed begins with %+v, %v, want nine entries", list, err)
	}
	if n := read() - before; n > 1000 {
		t.Errorf("%d rows were read for it", n)
	}
}

// Who reads on asks often, and to plan for the partitions each time would cost several times the question itself.
func TestReadingOnIsPlannedOnce(t *testing.T) {
	t.Parallel()
	s, id, plain := newServer(t)
	bearer := s.bearerOf(t, id, plain)
	for range 10 {
		for _, path := range []string{"revocations?after=1", "audit?after=0"} {
			if w := s.ask("GET", "/api/v1/"+path, "", "Authorization", bearer); w.Code != 200 {
				t.Fatalf("GET %s = %d %s", path, w.Code, w.Body)
			}
		}
	}
	var once, anew int
	for _, conn := range s.db.AcquireAllIdle(t.Context()) {
		var n, m int
		err := conn.QueryRow(t.Context(), `
			select coalesce(sum(generic_plans), 0), coalesce(sum(custom_plans), 0)
			from pg_prepared_statements
			where statement ~ 'from audit_events\s+where seq '`).Scan(&n, &m)
		if once, anew = once+n, anew+m; err != nil {
			t.Error(err)
		}
		conn.Release()
	}
	if once != 30 || anew != 0 {
		t.Errorf("of 30 questions %d had a plan, and %d were planned anew", once, anew)
	}
}
