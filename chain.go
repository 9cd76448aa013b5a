package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// An event as it is stored, hashed and shown.
type event struct {
	EventID   string  `json:"eventId"`
	Seq       int64   `json:"seq"`
	AgentID   *string `json:"agentId"` // whom it concerns
	ActorID   *string `json:"actorId"` // who did it; null for the operator
	Action    string  `json:"action"`
	Outcome   string  `json:"outcome"` // success or failure
	IPAddress string  `json:"ipAddress"`
	UserAgent string  `json:"userAgent"`
	Metadata  rawJSON `json:"metadata"`
	Timestamp moment  `json:"timestamp"`
	PrevHash  digest  `json:"prevHash"`
	Hash      digest  `json:"hash"`

	facts facts // until Metadata is made of them
}

const eventColumns = `event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata, "timestamp", prev_hash, hash`

// A digest is a SHA-256 sum: bytes in the database, hexadecimal in JSON.
type digest []byte

func (d digest) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(d)), nil }

func (d *digest) UnmarshalText(text []byte) (err error) {
	*d, err = hex.DecodeString(string(text))
	return err
}

// rawJSON is what a json column holds, byte for byte: pgx would trim spaces. So
// would json.Marshal, for which it is null, until encodeEvents puts it in.
type rawJSON []byte

func (j rawJSON) MarshalJSON() ([]byte, error) { return []byte("null"), nil }

func (j *rawJSON) ScanBytes(b []byte) error {
	*j = bytes.Clone(b)
	return nil
}

func (j *rawJSON) UnmarshalJSON(b []byte) error { return j.ScanBytes(b) }

// encodeEvents returns v, in which these events are, as JSON. Their metadata is
// as it was stored, or a checker outside would find another hash.
func encodeEvents(v any, events ...event) ([]byte, error) {
	rest, err := json.Marshal(v)
	var b []byte
	for _, e := range events {
		before, after, _ := bytes.Cut(rest, []byte(`"metadata":null`)) // which no text can hold: its quotes are escaped
		b = append(append(append(b, before...), `"metadata":`...), e.Metadata...)
		rest = after
	}
	return append(append(b, rest...), '\n'), err
}

// facts are what an event says beside its fixed fields. None may be a secret.
type facts map[string]any

func (f facts) encode() rawJSON {
	b, err := json.Marshal(f)
	if err != nil {
		panic(err) // facts of ours that have no JSON
	}
	return b
}

// newEvent is a success until refused says otherwise. It concerns nobody where
// agentID is none.
func newEvent(did, agentID string, f facts) event {
	e := event{Action: did, Outcome: "success", facts: f}
	if isID(agentID) {
		e.AgentID = &agentID
	}
	return e
}

// by fills in who did it, where nobody is said to, and from where.
func (e event) by(r *request) event {
	if r.caller.AgentID != "" && e.ActorID == nil {
		e.ActorID = &r.caller.AgentID
	}
	if _, forOther := e.facts["requestedBy"]; r.caller.proved != nil && !forOther {
		e.facts["workload"] = r.caller.proved
	}
	if r.addr.IsValid() {
		e.IPAddress = r.addr.String()
	}
	userAgent := r.UserAgent()
	e.UserAgent = strings.ToValidUTF8(userAgent[:min(len(userAgent), 256)], "?")
	e.facts["requestId"] = r.id
	e.Metadata = e.facts.encode()
	return e
}

// sum is the hash of an event: SHA-256 over these fields in this order, each
// as a netstring (its length in bytes in decimal, a colon, the bytes, a comma;
// cr.yp.to/proto/netstrings.txt). Hashes are in hexadecimal, the time is as
// in JSON, what is null is empty. The first event's prevHash is 32 zero bytes.
func (e *event) sum() digest {
	orEmpty := func(s *string) string {
		if s == nil {
			return ""
		}
		return *s
	}
	b := make([]byte, 0, 1024)
	for _, field := range []string{
		hex.EncodeToString(e.PrevHash), strconv.FormatInt(e.Seq, 10), e.EventID, e.Timestamp.String(), orEmpty(e.AgentID),
		orEmpty(e.ActorID), e.Action, e.Outcome, e.IPAddress, e.UserAgent, string(e.Metadata),
	} {
		b = strconv.AppendInt(b, int64(len(field)), 10)
		b = append(append(append(b, ':'), field...), ',')
	}
	sum := sha256.Sum256(b)
	return sum[:]
}

// An entry is an event, which without an action is none, and what is to be found out when it
// is stored. It is left out where one of its needs is dead or of an agent whose row has
// changed, or its assertion was used before, or is of an issuer that is trusted no more.
type entry struct {
	event
	needs []origin          // who asks the first
	rows  map[string]uint32 // of agents, as they were read for what the event says
	asks  []origin          // what the token came from that an introspection is about
	use   use
	found found
}

type found struct {
	replayed, changed bool
	dead              int  // which of what it needs is not alive, counted from 1; 0 is none
	active            bool // whether all is that it asks about
}

func (x entry) leftOut() bool {
	return x.Action == "" || x.found.replayed || x.found.changed || x.found.dead > 0
}

// ask puts into a batch what has to be known of entries, and returns what tells it them.
func ask(b *pgx.Batch, entries []entry) (tell func()) {
	var of []origin
	var uses []use
	for _, x := range entries {
		of = append(append(of, x.needs...), x.asks...)
		if x.use.id != "" {
			uses = append(uses, x.use)
		}
	}
	lives, first := askAlive(b, of), askFirst(b, uses)
	return func() {
		isDead := func(l life) bool { return !l.alive }
		for i := range entries {
			x, n, all := &entries[i], len(entries[i].needs), len(entries[i].needs)+len(entries[i].asks)
			hasChanged := func(l life) bool { row, read := x.rows[l.agentID]; return read && row != l.row }
			x.found = found{x.use.id != "" && !first[x.use.id], slices.ContainsFunc(lives[:n], hasChanged), 1 + slices.IndexFunc(lives[:n], isDead), !slices.ContainsFunc(lives[n:all], isDead)}
			if x.use.trusted != nil && !x.use.trusted() {
				x.found.dead = 1
			}
			lives = lives[all:]
			delete(first, x.use.id) // of two that come together only one is
		}
	}
}

// appendEvents links events to the end of the chain. It holds the lock of the
// chain until tx ends, so any number of copies write one chain, and it is the
// last that a transaction does: whoever holds the lock waits for nothing.
// What cuts somebody off has its event there too. So whoever is alive behind the
// lock is cut off only after what is stored now, in the log and to all who read.
// Whole is for a connection without a transaction: it is one by itself. It
// returns the last seq.
func appendEvents(ctx context.Context, tx querier, entries []entry, whole bool) (int64, error) {
	last, now := event{PrevHash: make(digest, sha256.Size)}, moment{}
	head, tail := &pgx.Batch{}, &pgx.Batch{}
	if whole {
		head.Queue(`begin`)
	}
	head.Queue(`select pg_advisory_xact_lock($1), set_config('plan_cache_mode', 'force_generic_plan', true)`, chainLock) // planning costs more than it gains
	head.Queue(`
		select coalesce(max(seq), 0), date_trunc('milliseconds', clock_timestamp()), coalesce((array_agg(hash))[1], $1)
		from (select seq, hash from audit_events order by seq desc limit 1) as head`, last.PrevHash).
		QueryRow(func(row pgx.Row) error { return row.Scan(&last.Seq, &now, &last.Hash) })
	tell := ask(head, entries)
	if err := tx.SendBatch(ctx, head).Close(); err != nil {
		return 0, fmt.Errorf("loading the head of the chain: %w", err)
	}
	tell()
	var rows eventRows
	for _, x := range entries {
		if x.leftOut() {
			continue
		}
		e := x.event
		if len(x.asks) > 0 && !x.found.active {
			e.facts["active"] = false
			e.Metadata = e.facts.encode()
		}
		e.EventID, e.Seq, e.Timestamp, e.PrevHash = eventID(last.Seq+1, now), last.Seq+1, now, last.Hash
		e.Hash = e.sum()
		rows.add(e)
		last = e
	}
	// It divides by zero where a rule or a trigger has swallowed one, and a transaction in which something failed doesn't commit.
	tail.Queue(`
		with stored as (
			insert into audit_events (`+eventColumns+`)
			select event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata::json, $10, prev_hash, hash
			from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
				$11::bytea[], $12::bytea[]) as event (event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent,
				metadata, prev_hash, hash)
			returning 1)
		select 1 / (count(*) = cardinality($1))::int
		from stored`,
		rows.ids, rows.seqs, rows.agents, rows.actors, rows.actions, rows.outcomes, rows.addresses, rows.userAgents, rows.metadata,
		now.Time, rows.prevHashes, rows.hashes)
	if whole {
		tail.Queue(`commit`)
	}
	err := tx.SendBatch(ctx, tail).Close()
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok && refusal.Code == "22012" {
		err = errors.New("the database took an event and did not store it")
	}
	if err != nil {
		return 0, fmt.Errorf("appending to the audit log: %w", err)
	}
	return last.Seq, nil
}

// eventRows are the columns of events that are stored at once.
type eventRows struct {
	ids, actions, outcomes, addresses, userAgents, metadata []string
	seqs                                                    []int64
	agents, actors                                          []*string
	prevHashes, hashes                                      [][]byte
}

func (rows *eventRows) add(e event) {
	rows.ids, rows.seqs = append(rows.ids, e.EventID), append(rows.seqs, e.Seq)
	rows.agents, rows.actors = append(rows.agents, e.AgentID), append(rows.actors, e.ActorID)
	rows.actions, rows.outcomes = append(rows.actions, e.Action), append(rows.outcomes, e.Outcome)
	rows.addresses, rows.userAgents = append(rows.addresses, e.IPAddress), append(rows.userAgents, e.UserAgent)
	rows.metadata = append(rows.metadata, string(e.Metadata))
	rows.prevHashes, rows.hashes = append(rows.prevHashes, e.PrevHash), append(rows.hashes, e.Hash)
}

// eventID makes the id of an event, which tells where in the log it is: a UUID
// of version 7 with the event's time, and its seq in place of random bits.
func eventID(seq int64, at moment) string {
	return idOf(at.Time, [10]byte(binary.BigEndian.AppendUint64([]byte{0, 0}, uint64(seq))))
}

func (s *server) oldestServed() time.Time { return s.now().AddDate(0, 0, -s.cfg.retentionDays) }

// A checkpoint says what the head of the chain was. Signed and kept elsewhere,
// it shows later that the chain still extends it.
type checkpoint struct {
	Issuer string `json:"iss"`
	Seq    int64  `json:"seq"`
	Hash   string `json:"hash"`
	Time   int64  `json:"iat"` // seconds since 1970
	Part   *part  `json:"part,omitempty"`
}

// A part is what was printed of the log up to a checkpoint, where that isn't all.
type part struct {
	AgentID  *string `json:"agentId"` // whom the events name; null is anybody
	FromDate *moment `json:"fromDate"`
	ToDate   *moment `json:"toDate"`
	Events   int64   `json:"events"`
	Digest   digest  `json:"digest"` // SHA-256 over their hashes, in hexadecimal, each with a line's end
}

// has tells whether an event is of the part. Whom it names it has as a text by itself.
func (p *part) has(e *event) bool {
	line, _ := encodeEvents(e, *e)
	return (p.AgentID == nil || bytes.Contains(line, []byte(`"`+*p.AgentID+`"`))) &&
		(p.FromDate == nil || !e.Timestamp.Before(p.FromDate.Time)) && (p.ToDate == nil || !e.Timestamp.After(p.ToDate.Time))
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

	linked bool  // to the event before the first
	part   *part // nil is all
}

// verifyChain reads the chain from a seq on (0: its last limit events), up to
// limit events, and stops at the first that isn't what its predecessor, its
// content or cp (nil: none) demand. Events may be missing at the beginning,
// where partitions were dropped, but none of those that are served. Each event
// that is as it should be is given to emit (nil: none). An error is that of emit,
// or says that the chain can't be read.
func (s *server) verifyChain(ctx context.Context, from, limit int64, cp *checkpoint, emit func(*event) error) (chainReport, error) {
	report := chainReport{HeadHash: make(digest, sha256.Size)}
	var oldest, newest int64
	err := s.db.QueryRow(ctx, `select coalesce(min(seq), 1), coalesce(max(seq), 0) from audit_events`).Scan(&oldest, &newest)
	if err != nil {
		return report, fmt.Errorf("loading the ends of the chain: %w", err)
	}
	if from == 0 {
		from = newest - limit + 1
	}
	report.FromSeq = max(from, oldest, 1)
	report.HeadSeq = report.FromSeq - 1
	if oldest < 1 { // before the first there is none
		report.FirstBadSeq = 1
		return report, nil
	}
	served := s.oldestServed()
	rows, _ := s.db.Query(ctx, `
		select `+eventColumns+`
		from audit_events
		where seq >= $1::bigint - 1
		order by seq, "timestamp"
		limit $2::bigint + 1`, report.FromSeq, limit)
	defer rows.Close()
	for rows.Next() && report.FirstBadSeq == 0 && report.Events < limit {
		e, err := pgx.RowToStructByPos[event](rows)
		if err != nil {
			return report, fmt.Errorf("reading an event: %w", err)
		}
		good := report.Events
		report.extend(&e, oldest, served, cp)
		if emit != nil && report.Events > good {
			if err := emit(&e); err != nil {
				return report, err
			}
		}
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

// signCheckpoint makes a checkpoint of the last event, if there is one and all are as they
// should be, and says of which part (nil: none) they are.
func (s *server) signCheckpoint(report *chainReport, of *part) error {
	if !report.Verified || report.Events == 0 {
		return nil
	}
	signed, err := s.keys.Load().sign(auditCheckpoint, checkpoint{
		Issuer: s.cfg.issuer, Seq: report.HeadSeq, Hash: hex.EncodeToString(report.HeadHash), Time: s.now().Unix(), Part: of,
	})
	report.Checkpoint = &signed
	return err
}

// extend checks one more event.
func (report *chainReport) extend(e *event, oldest int64, served time.Time, cp *checkpoint) {
	want := report.HeadSeq + 1
	if report.Events == 0 && e.Seq == want-1 && !report.linked { // only for its hash
		report.HeadHash, report.linked = e.Hash, true
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
	case e.Timestamp.Nanosecond()%1e6 != 0, !bytes.Equal(e.PrevHash, report.HeadHash), !bytes.Equal(e.Hash, e.sum()),
		cp != nil && cp.Seq == e.Seq && cp.Hash != hex.EncodeToString(e.Hash):
		report.FirstBadSeq = e.Seq
		return
	}
	report.HeadSeq, report.HeadHash = e.Seq, e.Hash
	report.Events++
}
