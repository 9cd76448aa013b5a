package main

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// What the log records.
const (
	agentCreated        = "agent.created"
	agentUpdated        = "agent.updated"
	agentSuspended      = "agent.suspended"
	agentReactivated    = "agent.reactivated"
	agentDecommissioned = "agent.decommissioned"
	credentialGenerated = "credential.generated"
	credentialRotated   = "credential.rotated"
	credentialRevoked   = "credential.revoked"
	tokenIssued         = "token.issued"
	tokenRevoked        = "token.revoked"
	tokenIntrospected   = "token.introspected"
	authFailed          = "auth.failed"
	revocationsRead     = "revocations.read"
)

var actions = []string{
	agentCreated, agentUpdated, agentSuspended, agentReactivated, agentDecommissioned, credentialGenerated,
	credentialRotated, credentialRevoked, tokenIssued, tokenRevoked, tokenIntrospected, authFailed, revocationsRead,
}

// change does something and records it in one transaction. An event without an
// action is none.
//
// It locks first who acts and whom it concerns, and then looks whether who acts
// is alive. What cuts an agent off is a change that concerns it. So a change
// either commits before the cut, or sees it, however long ago it was let in.
func (s *server) change(r *request, concerned string, do func(context.Context, pgx.Tx) (event, error)) error {
	whom := func(context.Context, pgx.Tx) ([]string, error) { return []string{concerned}, nil }
	return s.changeAll(r, whom, func(ctx context.Context, tx pgx.Tx, _ []string) ([]event, error) {
		e, err := do(ctx, tx)
		if err != nil || e.Action == "" {
			return nil, err
		}
		return []event{e}, nil
	})
}

// changeAll is a change that concerns several agents, and leaves as many events.
func (s *server) changeAll(r *request, whom func(context.Context, pgx.Tx) ([]string, error), do func(context.Context, pgx.Tx, []string) ([]event, error)) error {
	ctx, head := r.Context(), int64(0)
	err := pgx.BeginFunc(ctx, s.db, func(tx pgx.Tx) error {
		concerned, err := whom(ctx, tx)
		if err == nil {
			err = r.caller.enter(ctx, tx, concerned)
		}
		if err != nil {
			return err
		}
		events, err := do(ctx, tx, concerned)
		entries := []entry{{use: r.caller.use}}
		for _, e := range events {
			entries = append(entries, entry{event: e.by(r)})
		}
		if err == nil && (events != nil || r.caller.use.id != "") {
			head, err = appendEvents(ctx, tx, entries, false)
		}
		if err == nil && entries[0].found.replayed {
			err = r.caller.use.again
		}
		return err
	})
	if err == nil {
		s.meter.head.Store(max(head, s.meter.head.Load()))
	}
	return err
}

// record hands an event over, and returns the function that waits until it is
// stored. What it is about must not be done before that, or be undone where
// that fails. What the entry needs must be alive then, the caller and what else it came
// from, and the rows of agents that it was decided by as they were read, or the event is
// left out and that is the error. With that the assertion that the caller showed is used up.
func (s *server) record(r *request, x entry) func() (found, error) {
	x.event = x.by(r)
	if len(x.needs) > 0 {
		x.use = r.caller.use
	}
	stored := s.recorder.put(r.Context(), x)
	return func() (found, error) {
		f, err := stored.wait()
		r.caller.use.done = err == nil && len(x.needs) > 0
		switch {
		case err != nil:
		case f.replayed:
			err = r.caller.use.again
		case f.dead == 1:
			err = r.caller.ended()
		case f.dead > 1:
			err = errForm.because("The subject_token or the actor_token has ended, or what it came from.")
		case f.changed:
			err = errUnavailable.because("The agent was changed meanwhile; try again.")
		}
		return f, err
	}
}

// useUp has the assertion that the caller showed used up, where there is one and nothing
// comes of it: else who has seen it could ask for that again and again.
func (s *server) useUp(r *request) error {
	if r.caller.use.id == "" || r.caller.use.done {
		return nil
	}
	_, err := s.record(r, entry{event: event{facts: facts{}}, needs: []origin{r.caller.origin}})()
	return err
}

// storeEvents stores the events of concurrent requests in one transaction.
// It tells of each what was found.
func (s *server) storeEvents(ctx context.Context, entries []entry) ([]found, error) {
	begun, head := time.Now(), int64(0)
	conn, err := s.inner.Acquire(ctx)
	if err == nil {
		head, err = appendEvents(ctx, conn, entries, true)
		conn.Release() // closes it where the transaction is open
	}
	s.postgres.beat(err)
	s.meter.head.Store(max(head, s.meter.head.Load()))
	s.meter.add(float64(len(entries)), "agentidp_audit_batch_events", "")
	s.meter.add(time.Since(begun).Seconds(), "agentidp_audit_commit_duration_seconds", "")
	list := make([]found, len(entries))
	for i, x := range entries {
		list[i] = x.found
	}
	return list, err
}

// refused records what was refused, and returns why it was. A denial is
// recorded outside of the change's transaction, or the rollback takes it back.
func (s *server) refused(r *request, e event, why error) error {
	e.Outcome = "failure"
	if _, err := s.record(r, entry{event: e})(); err != nil {
		return err
	}
	return why
}

// recordRefusal records that an authenticated caller was refused a change, as
// one also is that was cut off after it was let in. Whatever it was refused for what
// it asked, the assertion that it showed is used up.
func (s *server) recordRefusal(r *request, err error) error {
	rt := r.route
	p, ok := errors.AsType[*problem](err)
	wasCutOff := ok && errors.Is(err, r.caller.use.over) // of a grant that is a 400
	if ok && !wasCutOff && (p.status == http.StatusBadRequest || p.status == http.StatusForbidden) {
		if err := s.useUp(r); err != nil {
			return err
		}
	}
	if !ok || p.bound || rt.records == "" || r.caller.AgentID == "" || // of bound it isn't proved who asked
		!wasCutOff && !slices.Contains([]int{http.StatusUnauthorized, http.StatusForbidden, http.StatusConflict}, p.status) {
		return err
	}
	concerned, f := r.PathValue("agentId"), facts{"reason": p.code}
	if rt.form == oauth {
		concerned, f["reason"] = r.caller.AgentID, p.oauth
	}
	if id := r.PathValue("credentialId"); isID(id) {
		f["credentialId"] = id
	}
	maps.Copy(f, r.tells)
	return s.refused(r, newEvent(rt.records, concerned, f), p)
}

func (s *server) listEvents(r *request) (any, error) {
	in := readQuery(r)
	part, args := in.span(), pgx.NamedArgs{
		"agent":   take(in, "agentId", matching("must be a UUID in lower case", isID)),
		"actor":   take(in, "actorId", matching("must be a UUID in lower case", isID)),
		"subject": take(in, "subjectId", matching("must be a UUID in lower case", isID)),
		"action":  take(in, "action", oneOf(actions)),
		"outcome": take(in, "outcome", oneOf([]string{"success", "failure"})),
	}
	from, to := take(in, "fromDate", date(0)), take(in, "toDate", date(24*time.Hour-time.Millisecond))
	if from != nil && to != nil && from.After(*to) {
		in.faults["toDate"] = "must not be before fromDate"
	}
	before := take(in, "cursor", parsed("must be the nextCursor of a page", s.openCursor))
	if before != nil && part.page != 1 {
		in.faults["cursor"] = "can't be there beside a page"
	}
	if err := in.problem(); err != nil {
		return nil, err
	}
	order := `
			and (@before::bigint is null or seq < @before)
		order by seq desc`
	if from != nil || to != nil { // so that an index finds it; another order only where a clock was set back
		order = `
			and (@before::bigint is null or ("timestamp", seq) < (@beforeTime::timestamptz, @before))
		order by "timestamp" desc, seq desc`
	}
	oldest := s.oldestServed()
	if from != nil && from.Before(oldest) || to != nil && to.Before(oldest) {
		return nil, errRetention.with(map[string]any{"retentionDays": s.cfg.retentionDays, "oldest": moment{oldest}})
	}
	if from == nil {
		from = &oldest
	}
	args["from"], args["to"], args["before"], args["beforeTime"] = from, to, nil, nil
	if before != nil {
		args["before"], args["beforeTime"] = before.Seq, time.UnixMilli(before.Time)
	}
	p, more, err := list[event](r.Context(), s.db, part, args, eventColumns, `
		from audit_events
		where (@agent::uuid is null or agent_id = @agent)
			and (@actor::uuid is null or actor_id = @actor)
			and (@subject::text is null or metadata ->> 'subject' = @subject)
			and (@action::text is null or action = @action)
			and (@outcome::text is null or outcome = @outcome)
			and "timestamp" >= @from::timestamptz
			and (@to::timestamptz is null or "timestamp" <= @to)`, order)
	if err != nil {
		return nil, err
	}
	return s.encodePage(p, more)
}

// date reads a time (RFC 3339) or a day, to which rest is added.
func date(rest time.Duration) func(any) (time.Time, error) {
	return parsed("must be a time like 2026-03-28T09:00:00Z or a day like 2026-03-28", func(s string) (time.Time, error) {
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t, err = time.Parse(time.DateOnly, s)
			t = t.Add(rest)
		}
		if t.Year() < 1970 || t.Year() > 9999 {
			err = strconv.ErrRange
		}
		return t, err
	})
}

// encodePage adds to a page the cursor from which to read on, if there is more.
func (s *server) encodePage(p page[event], more bool) ([]byte, error) {
	out := struct {
		page[event]
		NextCursor *string `json:"nextCursor"`
	}{page: p}
	if more {
		last := p.Data[len(p.Data)-1]
		signed, err := s.keys.Load().sign(auditCursor, cursor{last.Seq, last.Timestamp.UnixMilli()})
		if err != nil {
			return nil, err
		}
		out.NextCursor = &signed
	}
	return encodeEvents(out, p.Data...)
}

// A cursor names the last event of a page. It is signed, so that nothing but
// what we have sent gets from there into a query, and so that it is good on
// every copy while the keys are rotated.
type cursor struct {
	Seq  int64 `json:"seq"`
	Time int64 `json:"time"` // milliseconds since 1970
}

func (s *server) openCursor(signed string) (c cursor, err error) {
	err = s.keys.Load().open(auditCursor, signed, &c)
	return c, err
}

func (s *server) getEvent(r *request) (any, error) {
	id := r.PathValue("eventId")
	if !isID(id) {
		return nil, errNoEvent
	}
	place, _ := hex.DecodeString(strings.ReplaceAll(id, "-", ""))
	seq := binary.BigEndian.Uint64(place[8:]) & (1<<62 - 1)
	at := time.UnixMilli(int64(binary.BigEndian.Uint64(place) >> 16))
	e, err := one[event](r.Context(), s.db, errNoEvent, "loading event", `
		select `+eventColumns+`
		from audit_events
		where event_id = $1 and seq = $2 and "timestamp" = $3 and "timestamp" >= $4`, id, int64(seq), at, s.oldestServed())
	if err != nil {
		return nil, err
	}
	return encodeEvents(e, e)
}

const verifiedAtOnce = 100_000 // events that one request checks

func (s *server) verifyEvents(r *request) (any, error) {
	in, from := readQuery(r), int64(0)
	if seq := take(in, "fromSeq", whole(1, 1<<53)); seq != nil {
		from = int64(*seq)
	}
	if err := in.problem(); err != nil {
		return nil, err
	}
	if !s.verifying.CompareAndSwap(false, true) { // each holds a connection for long
		return nil, errBusy.because("Another report is being made by this copy; one at a time. Try again.")
	}
	defer s.verifying.Store(false)
	report, err := s.verifyChain(r.Context(), from, verifiedAtOnce, nil, nil)
	if err == nil && report.Verified && report.Events == 0 && from > 1 {
		err = errValidation.with(map[string]any{"fromSeq": "is beyond the head of the chain"})
	}
	if err == nil {
		err = s.signCheckpoint(&report, nil)
	}
	return report, err
}
