package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// An action is something that the log records.
type action string

const (
	agentCreated        action = "agent.created"
	agentUpdated        action = "agent.updated"
	agentSuspended      action = "agent.suspended"
	agentReactivated    action = "agent.reactivated"
	agentDecommissioned action = "agent.decommissioned"
	credentialGenerated action = "credential.generated"
	credentialRotated   action = "credential.rotated"
	credentialRevoked   action = "credential.revoked"
	tokenIssued         action = "token.issued"
	tokenRevoked        action = "token.revoked"
	tokenIntrospected   action = "token.introspected"
	authFailed          action = "auth.failed"
)

var actions = []string{
	string(agentCreated), string(agentUpdated), string(agentSuspended), string(agentReactivated),
	string(agentDecommissioned), string(credentialGenerated), string(credentialRotated), string(credentialRevoked),
	string(tokenIssued), string(tokenRevoked), string(tokenIntrospected), string(authFailed),
}

// A digest is a SHA-256 sum: bytes in the database, hexadecimal in JSON.
type digest []byte

func (d digest) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(d)), nil }

// An event as it is stored, hashed and shown.
type event struct {
	EventID   string          `json:"eventId"`
	Seq       int64           `json:"seq"`
	AgentID   *string         `json:"agentId"` // whom it concerns
	ActorID   *string         `json:"actorId"` // who did it; null for the operator
	Action    action          `json:"action"`
	Outcome   string          `json:"outcome"` // success or failure
	IPAddress string          `json:"ipAddress"`
	UserAgent string          `json:"userAgent"`
	Metadata  json.RawMessage `json:"metadata"`
	Timestamp moment          `json:"timestamp"`
	PrevHash  digest          `json:"prevHash"`
	Hash      digest          `json:"hash"`

	facts facts // until Metadata is made of them
}

const eventColumns = `event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata, "timestamp", prev_hash, hash`

// facts are what an event says beside its fixed fields. None may be a secret.
type facts map[string]any

// newEvent is a success until failed says otherwise. AgentID may be empty.
func newEvent(did action, agentID string, f facts) event {
	e := event{Action: did, Outcome: "success", facts: f}
	if agentID != "" {
		e.AgentID = &agentID
	}
	return e
}

// by fills in who did it, from where.
func (e event) by(r *request) (event, error) {
	if r.caller.agentID != "" {
		e.ActorID = &r.caller.agentID
	}
	if r.addr.IsValid() {
		e.IPAddress = r.addr.String()
	}
	userAgent := r.UserAgent()
	e.UserAgent = strings.ToValidUTF8(userAgent[:min(len(userAgent), 256)], "?")
	f := facts{"requestId": r.id}
	for name, v := range e.facts {
		f[name] = v
	}
	var err error
	e.Metadata, err = json.Marshal(f)
	return e, err
}

// sum is the hash of an event: SHA-256 over these fields in this order, each
// as a netstring (its length in bytes in decimal, a colon, the bytes, a comma;
// cr.yp.to/proto/netstrings.txt). Hashes are in hexadecimal, the time is as
// in JSON, what is null is empty. The first event's prevHash is 32 zero bytes.
func (e *event) sum() digest {
	b := make([]byte, 0, 1024)
	for _, field := range []string{
		hex.EncodeToString(e.PrevHash), strconv.FormatInt(e.Seq, 10), e.EventID, e.Timestamp.String(),
		orEmpty(e.AgentID), orEmpty(e.ActorID), string(e.Action), e.Outcome, e.IPAddress, e.UserAgent, string(e.Metadata),
	} {
		b = strconv.AppendInt(b, int64(len(field)), 10)
		b = append(b, ':')
		b = append(b, field...)
		b = append(b, ',')
	}
	sum := sha256.Sum256(b)
	return sum[:]
}

func orEmpty(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// appendEvents links events to the end of the chain. It holds the lock of the
// chain until tx ends, so any number of copies write one chain, and it is the
// last that a transaction does: whoever holds the lock waits for nothing.
func appendEvents(ctx context.Context, tx pgx.Tx, events []event) error {
	head, now := event{PrevHash: make(digest, sha256.Size)}, moment{}
	batch := &pgx.Batch{}
	// The time-out is for a copy that stops for good while it holds the lock.
	batch.Queue(`select pg_advisory_xact_lock($1), set_config('idle_in_transaction_session_timeout', '5s', true)`, chainLock)
	batch.Queue(`
		select coalesce(max(seq), 0), date_trunc('milliseconds', clock_timestamp()),
			coalesce((array_agg(hash))[1], $1)
		from (select seq, hash from audit_events order by seq desc limit 1) as head`, head.PrevHash).
		QueryRow(func(row pgx.Row) error { return row.Scan(&head.Seq, &now, &head.Hash) })
	if err := tx.SendBatch(ctx, batch).Close(); err != nil {
		return fmt.Errorf("loading the head of the chain: %w", err)
	}
	n := len(events)
	ids, seqs, agents, actors := make([]string, n), make([]int64, n), make([]*string, n), make([]*string, n)
	actions, outcomes, addresses, userAgents := make([]string, n), make([]string, n), make([]string, n), make([]string, n)
	metadata, before, hashes := make([]string, n), make([][]byte, n), make([][]byte, n)
	for i, e := range events {
		e.EventID, e.Seq, e.Timestamp, e.PrevHash = newID(), head.Seq+1, now, head.Hash
		e.Hash = e.sum()
		head = e
		ids[i], seqs[i], agents[i], actors[i] = e.EventID, e.Seq, e.AgentID, e.ActorID
		actions[i], outcomes[i], addresses[i], userAgents[i] = string(e.Action), e.Outcome, e.IPAddress, e.UserAgent
		metadata[i], before[i], hashes[i] = string(e.Metadata), e.PrevHash, e.Hash
	}
	_, err := tx.Exec(ctx, `
		insert into audit_events (`+eventColumns+`)
		select event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata::json, $10, prev_hash, hash
		from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::text[],
			$8::text[], $9::text[], $11::bytea[], $12::bytea[])
			as new (event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata, prev_hash, hash)`,
		ids, seqs, agents, actors, actions, outcomes, addresses, userAgents, metadata, now.Time, before, hashes)
	if err != nil {
		return fmt.Errorf("appending to the audit log: %w", err)
	}
	return nil
}

// A recorder stores the events of concurrent requests in shared transactions:
// while one commits, the next one fills. An event that finds nobody waiting is
// stored at once.
type recorder struct {
	db    *pgxpool.Pool // not shared with requests, which wait for it
	queue chan entry
	done  chan struct{}
}

type entry struct {
	event  event
	stored chan error
}

const (
	queueSize = 1024 // events that may wait; more are refused
	batchSize = 256
)

func newRecorder(db *pgxpool.Pool) *recorder {
	rec := &recorder{db: db, queue: make(chan entry, queueSize), done: make(chan struct{})}
	go rec.run()
	return rec
}

// close stores what is queued. The caller must have stopped all that records.
func (rec *recorder) close() {
	close(rec.queue)
	<-rec.done
}

func (rec *recorder) run() {
	defer close(rec.done)
	for first := range rec.queue {
		batch := []entry{first}
		for len(batch) < batchSize && len(rec.queue) > 0 {
			batch = append(batch, <-rec.queue)
		}
		err := rec.store(batch)
		for _, e := range batch {
			e.stored <- err
		}
	}
}

func (rec *recorder) store(batch []entry) error {
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	events := make([]event, len(batch))
	for i, e := range batch {
		events[i] = e.event
	}
	return pgx.BeginFunc(ctx, rec.db, func(tx pgx.Tx) error { return appendEvents(ctx, tx, events) })
}

// record hands an event over and returns the function that waits until it is
// stored. What it is about must not be done before that, or be undone where
// that fails.
func (s *server) record(r *request, e event) func() error {
	e, err := e.by(r)
	if err != nil {
		return func() error { return fmt.Errorf("encoding an event: %w", err) }
	}
	stored := make(chan error, 1)
	select {
	case s.recorder.queue <- entry{e, stored}:
		return func() error {
			select {
			case err := <-stored:
				return err
			case <-r.Context().Done():
				return fmt.Errorf("waiting for the audit log: %w", r.Context().Err())
			}
		}
	default:
		return func() error { return errors.New("the queue of the audit log is full") }
	}
}

// refused records what was refused, and returns why it was. A denial is
// recorded outside of the change's transaction, or the rollback takes it back.
func (s *server) refused(r *request, e event, why error) error {
	e.Outcome = "failure"
	if err := s.record(r, e)(); err != nil {
		return err
	}
	return why
}

// An eventFilter is the query of a list of events, checked.
type eventFilter struct {
	query
	before   int64 // events from this seq on are left out
	from, to *time.Time
}

func (s *server) parseEventFilter(r *request) (eventFilter, error) {
	q, err := parseQuery(r, "page", "limit", "agentId", "action", "outcome", "fromDate", "toDate", "cursor")
	f := eventFilter{query: q, before: 1<<63 - 1}
	if err != nil {
		return f, err
	}
	bad := faults{}
	bad.checkOneOf("action", q.values["action"], actions)
	bad.checkOneOf("outcome", q.values["outcome"], []string{"success", "failure"})
	if id := q.values["agentId"]; id != nil && !isID(*id) {
		bad["agentId"] = "must be a UUID in lower case"
	}
	f.from = bad.parseDate("fromDate", q.values["fromDate"], 0)
	f.to = bad.parseDate("toDate", q.values["toDate"], 24*time.Hour-time.Millisecond)
	if f.from != nil && f.to != nil && f.from.After(*f.to) {
		bad["toDate"] = "must not be before fromDate"
	}
	if cursor := q.values["cursor"]; cursor != nil {
		if f.before = s.openCursor(*cursor); f.before == 0 {
			bad["cursor"] = "must be the nextCursor of a page; start again without it"
		}
		if q.page != 1 {
			bad["page"] = "can't be combined with a cursor"
		}
	}
	if err := bad.problem(); err != nil {
		return f, err
	}
	oldest := s.oldestServed()
	if f.from != nil && f.from.Before(oldest) || f.to != nil && f.to.Before(oldest) {
		return f, errRetention.with(map[string]any{
			"retentionDays": s.cfg.retentionDays, "oldest": moment{oldest},
		})
	}
	if f.from == nil {
		f.from = &oldest
	}
	return f, nil
}

func (s *server) oldestServed() time.Time {
	return time.Now().AddDate(0, 0, -s.cfg.retentionDays)
}

// parseDate reads a time (RFC 3339) or a day, to which rest is added.
func (bad faults) parseDate(name string, value *string, rest time.Duration) *time.Time {
	if value == nil {
		return nil
	}
	t, err := time.Parse(time.RFC3339, *value)
	if err != nil {
		t, err = time.Parse(time.DateOnly, *value)
		t = t.Add(rest)
	}
	if err != nil || t.Year() < 1970 || t.Year() > 9999 {
		bad[name] = "must be a time like 2026-03-28T09:00:00Z or a day like 2026-03-28"
		return nil
	}
	return &t
}

func (s *server) listEvents(w http.ResponseWriter, r *request) error {
	f, err := s.parseEventFilter(r)
	if err != nil {
		return err
	}
	const selected = `
		from audit_events
		where ($1::uuid is null or agent_id = $1)
			and ($2::text is null or action = $2)
			and ($3::text is null or outcome = $3)
			and "timestamp" >= $4::timestamptz
			and ($5::timestamptz is null or "timestamp" <= $5)`
	filter := []any{f.values["agentId"], f.values["action"], f.values["outcome"], f.from, f.to}
	rows, _ := s.db.Query(r.Context(), `
		select `+eventColumns+selected+`
			and seq < $6::bigint
		order by seq desc
		limit $7 offset $8`, plannedOnce(filter, f.before, f.limit+1, f.offset())...)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByName[event])
	if err != nil {
		return fmt.Errorf("listing events: %w", err)
	}
	total, err := s.count(r.Context(), selected, filter...)
	if err != nil {
		return err
	}
	var next *string
	if len(list) > f.limit { // one more than asked for: there is a next page
		list = list[:f.limit]
		cursor := s.sealCursor(list[f.limit-1].Seq)
		next = &cursor
	}
	return respond(w, http.StatusOK, struct {
		page[event]
		NextCursor *string `json:"nextCursor"`
	}{newPage(f.query, list, total), next})
}

// sealCursor names the last event of a page. It is authenticated, so that
// nothing but what we have sent gets from there into a query.
func (s *server) sealCursor(seq int64) string {
	b := binary.BigEndian.AppendUint64(nil, uint64(seq))
	return base64.RawURLEncoding.EncodeToString(append(b, s.keys.mac("cursor", string(b))...))
}

// openCursor returns 0 for what sealCursor has not made.
func (s *server) openCursor(cursor string) int64 {
	b, err := decodeSegment(cursor)
	if err != nil || len(b) < 8 || !hmac.Equal(b[8:], s.keys.mac("cursor", string(b[:8]))) {
		return 0
	}
	return int64(binary.BigEndian.Uint64(b))
}

func (s *server) getEvent(w http.ResponseWriter, r *request) error {
	id := r.PathValue("eventId")
	if !isID(id) {
		return errNoEvent
	}
	rows, _ := s.db.Query(r.Context(), `
		select `+eventColumns+`
		from audit_events
		where event_id = $1 and "timestamp" >= $2`, id, s.oldestServed())
	e, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[event])
	if errors.Is(err, pgx.ErrNoRows) {
		return errNoEvent
	}
	if err != nil {
		return fmt.Errorf("loading event: %w", err)
	}
	return respond(w, http.StatusOK, e)
}

// A checkpoint says what the head of the chain was. Signed and kept elsewhere,
// it shows later that the chain still extends it.
type checkpoint struct {
	Issuer string `json:"iss"`
	Seq    int64  `json:"seq"`
	Hash   string `json:"hash"`
	Time   int64  `json:"iat"` // seconds since 1970
}

// A chainReport is what a reading of the chain found.
type chainReport struct {
	Verified    bool    `json:"verified"`
	FromSeq     int64   `json:"fromSeq"`
	Events      int64   `json:"events"` // that are as they should be
	FirstBadSeq int64   `json:"firstBadSeq,omitempty"`
	HeadSeq     int64   `json:"headSeq"` // the last of them
	HeadHash    digest  `json:"headHash"`
	Checkpoint  *string `json:"checkpoint"` // null where the chain is not whole
}

// verifyChain reads the chain from a seq on, up to limit events, and stops at
// the first that isn't what its predecessor, its content or cp (nil: none)
// demand. Events may be missing at the beginning, where partitions were
// dropped, but none after served. An error says that the chain can't be read.
func verifyChain(ctx context.Context, db querier, from, limit int64, served time.Time, cp *checkpoint) (chainReport, error) {
	report := chainReport{HeadHash: make(digest, sha256.Size)}
	var oldest int64
	err := db.QueryRow(ctx, `select coalesce(min(seq), 1) from audit_events`).Scan(&oldest)
	if err != nil {
		return report, fmt.Errorf("loading the beginning of the chain: %w", err)
	}
	report.FromSeq = max(from, oldest)
	report.HeadSeq = report.FromSeq - 1
	rows, _ := db.Query(ctx, `
		select `+eventColumns+`
		from audit_events
		where seq >= $1::bigint - 1
		order by seq, "timestamp"
		limit $2::bigint + 1`, report.FromSeq, limit)
	defer rows.Close()
	for rows.Next() && report.FirstBadSeq == 0 && report.Events < limit {
		var e event
		err := rows.Scan(&e.EventID, &e.Seq, &e.AgentID, &e.ActorID, &e.Action, &e.Outcome,
			&e.IPAddress, &e.UserAgent, &e.Metadata, &e.Timestamp, &e.PrevHash, &e.Hash)
		if err != nil {
			return report, fmt.Errorf("reading an event: %w", err)
		}
		report.extend(e, oldest, served, cp)
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		return report, fmt.Errorf("reading the chain: %w", err)
	}
	if report.FirstBadSeq == 0 && cp != nil {
		if cp.Seq > report.HeadSeq { // truncated, or rolled back
			report.FirstBadSeq = report.HeadSeq + 1
		} else if cp.Seq < report.FromSeq { // nothing links it to what is left
			report.FirstBadSeq = cp.Seq
		}
	}
	report.Verified = report.FirstBadSeq == 0
	return report, nil
}

// extend checks one more event.
func (report *chainReport) extend(e event, oldest int64, served time.Time, cp *checkpoint) {
	want := report.HeadSeq + 1
	if report.Events == 0 && e.Seq == want-1 { // only for its hash
		report.HeadHash = e.Hash
		return
	}
	if report.Events == 0 && e.Seq == oldest && oldest > 1 {
		report.HeadHash = e.PrevHash
		if e.Timestamp.After(served) {
			report.FirstBadSeq = oldest - 1
			return
		}
	}
	switch {
	case e.Seq != want:
		report.FirstBadSeq = min(e.Seq, want)
		return
	case !bytes.Equal(e.PrevHash, report.HeadHash), !bytes.Equal(e.Hash, e.sum()),
		cp != nil && cp.Seq == e.Seq && cp.Hash != hex.EncodeToString(e.Hash):
		report.FirstBadSeq = e.Seq
		return
	}
	report.HeadSeq, report.HeadHash = e.Seq, e.Hash
	report.Events++
}

// seal adds a signed checkpoint to a report that is good up to the head.
func (s *server) seal(report *chainReport) error {
	if !report.Verified || report.Events == 0 {
		return nil
	}
	signed, err := s.keys.sign(auditCheckpoint, checkpoint{
		Issuer: s.cfg.issuer, Seq: report.HeadSeq, Hash: hex.EncodeToString(report.HeadHash), Time: time.Now().Unix(),
	})
	report.Checkpoint = &signed
	return err
}

const verifiedAtOnce = 100_000 // events that one request checks

func (s *server) verifyEvents(w http.ResponseWriter, r *request) error {
	q, err := parseQuery(r, "fromSeq")
	if err != nil {
		return err
	}
	var from int64
	if text := q.values["fromSeq"]; text != nil {
		if from, err = strconv.ParseInt(*text, 10, 64); err != nil || from < 1 || from > 1<<53 {
			return faults{"fromSeq": "must be a whole number from 1"}.problem()
		}
	} else {
		err := s.db.QueryRow(r.Context(), `
			select greatest(1, coalesce(max(seq), 0) - $1::bigint + 1)
			from audit_events`, verifiedAtOnce).Scan(&from)
		if err != nil {
			return fmt.Errorf("loading the head of the chain: %w", err)
		}
	}
	report, err := verifyChain(r.Context(), s.db, from, verifiedAtOnce, s.oldestServed(), nil)
	if err != nil {
		return err
	}
	if report.Verified && report.Events == 0 && from > 1 {
		return faults{"fromSeq": "is beyond the head of the chain"}.problem()
	}
	if err := s.seal(&report); err != nil {
		return err
	}
	return respond(w, http.StatusOK, report)
}

// verifyAudit reads the whole chain and says whether it is as it was written,
// and whether it extends a checkpoint kept elsewhere.
func (s *server) verifyAudit(ctx context.Context, signed string, stdout io.Writer) error {
	var cp *checkpoint
	if signed != "" {
		cp = &checkpoint{}
		if s.keys.open(auditCheckpoint, signed, cp) != nil || cp.Issuer != s.cfg.issuer {
			return errors.New("this is no checkpoint that a key of this issuer signed")
		}
	}
	report, err := verifyChain(ctx, s.db, 1, 1<<60, s.oldestServed(), cp)
	if err != nil {
		return err
	}
	if !report.Verified {
		return fmt.Errorf("the audit log was altered: the first bad seq is %d", report.FirstBadSeq)
	}
	if err := s.seal(&report); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "verified: %d events, from seq %d to %d\n", report.Events, report.FromSeq, report.HeadSeq)
	if cp != nil {
		fmt.Fprintf(stdout, "extends the checkpoint at seq %d\n", cp.Seq)
	}
	if report.Checkpoint != nil {
		fmt.Fprintf(stdout, "checkpoint: %s\n", *report.Checkpoint)
	}
	return nil
}
