package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The feed tells services that verify tokens by themselves what was cut off, and a
// collector what was recorded. Both read the audit log on from a place in it. Its seq has
// no gap and is in the order of commits, so who has read up to an event has missed none.

const (
	feedPage   = 1000                   // events that one answer has at most
	feedRoom   = 200                    // readers that may wait on a copy; more are refused
	feedRoomOf = 50                     // of one client
	feedWait   = 30                     // seconds that a reader may ask to wait
	feedEvery  = 300 * time.Millisecond // how often it is looked whether there is something for them
	feedLife   = 5 * time.Minute        // of a stream, since who has vanished is not seen
	feedBeat   = 10 * time.Second       // after which a stream says that it is there; and the time to take what is written
)

// What the feed tells of.
var feedActions = []string{agentSuspended, agentReactivated, agentDecommissioned, credentialRotated, credentialRevoked, tokenRevoked}

// A revocation says of an id that tokens with it are dead, or, lifted, that they are not.
type revocation struct {
	Kind      string `json:"kind"` // where a token has it: agent, credential, secret or token
	ID        string `json:"id"`
	Lifted    bool   `json:"lifted"`
	ExpiresAt moment `json:"expiresAt"` // no such token is valid from then on
}

// revocationOf is what an event says; of a refused one that is nothing, and of a rotation
// by 0.1.0, which did not record what it ended.
func revocationOf(e event) (x revocation, ok bool, err error) {
	var f struct {
		CredentialID  string `json:"credentialId"`
		EndedSecretID string `json:"endedSecretId"`
		TokenID       string `json:"jti"`
		Expires       int64  `json:"exp"` // seconds since 1970; 0 of 0.1.0
	}
	err = json.Unmarshal(e.Metadata, &f)
	end, of := e.Timestamp.Add(maxTokenTTL), map[string][2]string{
		tokenRevoked: {"token", f.TokenID}, credentialRotated: {"secret", f.EndedSecretID}, credentialRevoked: {"credential", f.CredentialID},
	}[e.Action]
	if of[0] == "" && e.AgentID != nil { // with all of its credentials
		of = [2]string{"agent", *e.AgentID}
	}
	if f.Expires != 0 {
		end = time.Unix(f.Expires, 0)
	}
	ok = e.Outcome == "success" && of[1] != "" && slices.Contains(feedActions, e.Action)
	return revocation{of[0], of[1], e.Action == agentReactivated, moment{end.Add(clockTrust)}}, ok, err
}

// A place is up to where the log was read. Of the hash there it has enough to tell this
// log from another, as a backup brings one back; "" is not compared.
type place struct {
	seq  int64
	hash string
}

func placeOf(e event) place { return place{e.Seq, hex.EncodeToString(e.Hash[:8])} }

func (p place) MarshalText() ([]byte, error) { return []byte(p.String()), nil }
func (p place) String() string               { return strings.TrimSuffix(fmt.Sprint(p.seq, "-", p.hash), "-") }

var placePattern = regexp.MustCompile(`^(0|[1-9][0-9]{0,17}(-[0-9a-f]{16})?)$`)

var readPlace = parsed("must be 0, a seq, or the next of an answer", func(text string) (p place, err error) {
	if !placePattern.MatchString(text) {
		return p, strconv.ErrSyntax
	}
	seq, hash, _ := strings.Cut(text, "-")
	p.hash = hash
	p.seq, err = strconv.ParseInt(seq, 10, 64)
	return p, err
})

// Revocations are what is behind a place, up to the head of the log or as far as a page goes.
type revocations struct {
	Entries []revocation `json:"entries"`
	Next    place        `json:"next"` // where to read on
	More    bool         `json:"more"` // at once: these are not yet all

	lost bool // the log has no such place
}

func (p revocations) any() bool { return p.More || len(p.Entries) > 0 }

// loadRevocations reads on for all who ask at the same time, who are mostly in one place.
func loadRevocations(ctx context.Context, db querier, after []place) (list []revocations, err error) {
	read, head := map[place]revocations{}, int64(math.MaxInt64) // to one head, so that from there on they are in one place
	for _, at := range after {
		p, again := read[at]
		if !again {
			if p, err = loadPage(ctx, db, at, head); err != nil {
				return nil, fmt.Errorf("reading on in the log: %w", err)
			}
			if read[at] = p; !p.More && !p.lost {
				head = p.Next.seq
			}
		}
		list = append(list, p)
	}
	return list, nil
}

// loadPage reads the event at a place, those behind it that the feed tells of and whose tokens
// may be valid, and the head, up to a seq. Those that are too old are not looked at: they may be all
// of a month. The clock may have been set back, so it begins with the least seq of a hundred.
func loadPage(ctx context.Context, db querier, at place, upTo int64) (revocations, error) {
	p := revocations{Entries: []revocation{}, Next: at, lost: at.seq > 0}
	events, err := planned[event](ctx, db, `
		select `+eventColumns+`
		from audit_events
		where seq in ($1, (select max(seq) from audit_events where seq <= $4))
		union all
		select events.*
		from unnest($2::text[]) as wanted
		cross join (
			select min(seq) as first
			from (select seq from audit_events where "timestamp" > now() - $3::interval order by "timestamp" limit 100) as young) as young
		cross join lateral (
			select `+eventColumns+`
			from audit_events
			where action = wanted and action <> 'token.issued' and seq > greatest($1, first - 1) -- as the index has it
				and seq <= $4 and outcome = 'success' and "timestamp" > now() - $3::interval
			order by seq
			limit 1000) as events
		order by seq
		limit 1000`, at.seq, feedActions, maxTokenTTL+clockTrust, upTo)
	p.More = len(events) == feedPage
	for _, e := range events {
		x, ok, wrong := revocationOf(e)
		here := placeOf(e)
		if e.Seq < at.seq || e.Seq == at.seq && at.hash != "" && at != here { // a shorter log, or another
			break
		}
		if ok && e.Seq > at.seq && here != p.Next { // the head may be there twice
			p.Entries = append(p.Entries, x)
		}
		p.Next, p.lost, err = here, false, cmp.Or(err, wrong) // where the event is gone for its age, what is behind it isn't
	}
	return p, err
}

// listRevocations serves who has tokens:read. An access is recorded where it begins, and not
// where it goes on from a place that an answer had.
func (s *server) listRevocations(r *request) (any, error) {
	in, streams := readQuery(r), r.Method == http.MethodGet && strings.Contains(r.Header.Get("Accept"), "text/event-stream")
	if id := r.Header.Get("Last-Event-ID"); streams && id != "" { // of who comes again by the same URL
		in.values["after"] = id
	}
	after, wait := take(in, "after", readPlace), take(in, "wait", whole(1, feedWait))
	p, at, err := revocations{}, place{}, in.problem()
	if after != nil {
		at = *after
	}
	if err == nil {
		p, err = s.readOn(r.Context(), at)
	}
	if err == nil && at.hash == "" {
		_, err = s.record(r, entry{event: newEvent(revocationsRead, r.caller.AgentID, facts{}), needs: []origin{r.caller.origin}})()
	}
	if err == nil && streams {
		err = s.wait(r, func() error { return s.stream(r, p) })
	} else if err == nil && wait != nil && !p.any() {
		err = s.wait(r, func() (err error) { p, err = s.await(r, p, *wait, revocations.any); return err })
	}
	return p, err
}

// readEvents serves who has audit:read, and reads all of the log as it grows. Who looks for
// something in it has listEvents.
func (s *server) readEvents(r *request) (any, error) {
	if !r.URL.Query().Has("after") {
		return s.inTurn(s.listEvents)(r)
	}
	in, size := readQuery(r), 100
	after, wait := take(in, "after", readPlace), take(in, "wait", whole(1, feedWait))
	if limit := take(in, "limit", whole(1, feedPage)); limit != nil {
		size = *limit
	}
	if err := in.problem(); err != nil {
		return nil, err
	}
	grown := func(p revocations) bool { return p.Next.seq > after.seq }
	p, err := s.readOn(r.Context(), *after)
	if err == nil && wait != nil && !grown(p) {
		err = s.wait(r, func() (err error) { p, err = s.await(r, p, *wait, grown); return err })
	}
	if err != nil {
		return nil, err
	}
	out, oldest := struct {
		Data []event `json:"data"`
		Next place   `json:"next"`
	}{Next: *after}, s.oldestServed()
	if out.Data, err = planned[event](r.Context(), s.db, `
		select `+eventColumns+`
		from audit_events
		where seq > $1 and seq >= (select seq from audit_events where "timestamp" >= $2 order by "timestamp", seq limit 1)
		order by seq
		limit $3`, after.seq, oldest, size); err != nil {
		return nil, fmt.Errorf("reading on in the log: %w", err)
	}
	if after.seq > 0 && grown(p) && (len(out.Data) == 0 || out.Data[0].Seq != after.seq+1) {
		return nil, errRetention.with(map[string]any{"retentionDays": s.cfg.retentionDays, "oldest": moment{oldest}})
	}
	if !grown(p) {
		out.Next = p.Next // with its hash
	}
	bytes := 0
	for i, e := range out.Data {
		if bytes += len(e.Metadata); bytes > 1<<20 && i > 0 { // or who doesn't read answers would hold much
			out.Data = out.Data[:i]
			break
		}
		out.Next = placeOf(e)
	}
	return encodeEvents(out, out.Data...)
}

// readOn returns what is behind a place.
func (s *server) readOn(ctx context.Context, at place) (revocations, error) {
	list, err := loadRevocations(ctx, s.db, []place{at})
	if err != nil {
		return revocations{}, err
	}
	if list[0].lost {
		err = errNoPlace
	}
	return list[0], err
}

// wait lets a request do what takes long, without its place among those in flight.
func (s *server) wait(r *request, do func() error) error {
	defer s.readers.Add(-1)
	if lane := s.waiting.of(r.caller.AgentID); s.readers.Add(1) <= feedRoom {
		select {
		case lane <- struct{}{}:
			defer lane.leave()
			s.inFlight.Add(-1)
			defer s.inFlight.Add(1)
			defer func(begun time.Time) { r.waited = time.Since(begun) }(time.Now())
			_ = http.NewResponseController(r.writer).SetWriteDeadline(time.Now().Add(feedWait*time.Second + feedBeat))
			return do()
		default:
		}
	}
	return errBusy.because("Too many wait here, or of this client; try another copy, or ask without wait.")
}

// await looks, behind the head that it has read, until it has found something, or most
// seconds or the token are over, or other keys are here, or the reader has gone, or the
// copy stops. All look at the same moments, from nearly the same place, and so ask once
// for many. No fault passes for nothing.
func (s *server) await(r *request, p revocations, most int, found func(revocations) bool) (revocations, error) {
	end, keys := time.Now().Add(min(time.Duration(most)*time.Second, time.Unix(r.caller.until, 0).Sub(s.now()))), s.keys.Load()
	for time.Now().Before(end) && s.keys.Load() == keys && !s.draining.Load() {
		select {
		case <-time.After(feedEvery - time.Duration(time.Now().UnixNano())%feedEvery):
		case <-r.connected.Done():
			return p, nil // to nobody
		}
		r.renew()
		var err error
		if p, err = s.feed.put(r.Context(), p.Next).wait(); err == nil && p.lost {
			err = errNoPlace
		}
		if err != nil || found(p) {
			return p, err
		}
	}
	return revocations{Entries: []revocation{}, Next: p.Next}, nil
}

// readFurther reads the next page for a stream that has much to read. They take turns, and
// whose turn doesn't come within feedBeat ends, as without a store: it comes again.
func (s *server) readFurther(r *request, p revocations) (revocations, error) {
	turn, cancel := context.WithTimeout(r.connected, feedBeat)
	defer cancel()
	if err := s.behind.enter(turn); err != nil {
		return p, errBusy
	}
	defer s.behind.leave()
	r.renew()
	return s.readOn(r.Context(), p.Next)
}

// stream writes what comes as server-sent events (html.spec.whatwg.org, section 9.2), and
// after feedBeat that nothing did, until feedLife or the token is over, or its owner cut off,
// or other keys are here, or the reader has gone or doesn't take what is written in time, or
// something fails.
func (s *server) stream(r *request, p revocations) (err error) {
	conn, end, keys := http.NewResponseController(r.writer), time.Now().Add(feedLife), s.keys.Load()
	for time.Now().Before(end) && s.now().Unix() < r.caller.until && s.keys.Load() == keys {
		if err := s.checkAlive(r.Context(), &r.caller); err != nil {
			return err
		}
		r.out.Set("Content-Type", "text/event-stream")
		r.out.Set("X-Accel-Buffering", "no") // nginx would keep it back until it is much
		r.begun = true
		data, _ := json.Marshal(p)
		_ = conn.SetWriteDeadline(time.Now().Add(feedBeat))
		_, gone := fmt.Fprintf(r.writer, "id: %s\ndata: %s\n\n", p.Next, data)
		if gone != nil || conn.Flush() != nil || r.connected.Err() != nil || s.draining.Load() {
			return nil
		}
		r.renew()
		if p.More {
			p, err = s.readFurther(r, p)
		} else {
			p, err = s.await(r, p, int(feedBeat/time.Second), revocations.any)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
