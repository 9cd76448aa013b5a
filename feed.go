package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// The feed tells services that verify tokens by themselves what was cut off. It is read
// from the audit log, whose seq has no gap and is in the order of commits: who has read
// up to an event has missed nothing before it.

const (
	feedPage  = 1000                   // events that one answer looks at
	feedRoom  = 200                    // readers that may wait on a copy; more are refused
	feedWait  = 30                     // seconds that a reader may ask to wait
	feedEvery = 300 * time.Millisecond // how often they look whether there is something
	feedBeat  = 10 * time.Second       // after which a stream says that it is there; and the time to take what is written
)

// What the feed tells of.
var feedActions = []string{agentSuspended, agentReactivated, agentDecommissioned, credentialRotated, credentialRevoked, tokenRevoked}

// A revocation says of an id that tokens with it are dead, or, lifted, that they are not.
type revocation struct {
	Kind      string `json:"kind"` // where a token has it: agent, credential, secret or token
	ID        string `json:"id"`
	Lifted    bool   `json:"lifted"`
	ExpiresAt moment `json:"expiresAt"` // no such token is valid from then on

	seq int64
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
	if err := json.Unmarshal(e.Metadata, &f); err != nil {
		return x, false, fmt.Errorf("reading an event: %w", err)
	}
	end := e.Timestamp.Add(maxTokenTTL)
	switch x.seq = e.Seq; {
	case e.Action == tokenRevoked:
		if x.Kind, x.ID = "token", f.TokenID; f.Expires != 0 {
			end = time.Unix(f.Expires, 0)
		}
	case e.Action == credentialRotated:
		x.Kind, x.ID = "secret", f.EndedSecretID
	case e.Action == credentialRevoked:
		x.Kind, x.ID = "credential", f.CredentialID
	case e.AgentID != nil: // with all of its credentials
		x.Kind, x.ID, x.Lifted = "agent", *e.AgentID, e.Action == agentReactivated
	}
	x.ExpiresAt = moment{end.Add(time.Minute)} // clocks differ
	return x, e.Outcome == "success" && x.ID != "", nil
}

// A place is up to where the log was read. Of the hash there it has enough to tell this
// log from another, as a backup brings one back; "" is not compared.
type place struct {
	seq  int64
	hash string
}

func (p place) MarshalText() ([]byte, error) { return []byte(p.String()), nil }
func (p place) String() string               { return strconv.FormatInt(p.seq, 10) + "-" + p.hash }

var placePattern = regexp.MustCompile(`^[1-9][0-9]{0,17}-[0-9a-f]{16}$`)

func parsePlace(text string) (p place, err error) {
	if !placePattern.MatchString(text) {
		return p, strconv.ErrSyntax
	}
	seq, hash, _ := strings.Cut(text, "-")
	p.hash = hash
	p.seq, err = strconv.ParseInt(seq, 10, 64)
	return p, err
}

// Revocations are what an answer says, and an event of a stream.
type revocations struct {
	Entries []revocation `json:"entries"`
	Next    place        `json:"next"` // where to read on
	More    bool         `json:"more"` // at once: these are not yet all

	lost bool // the log has no such place
}

// loadRevocations reads on behind the places of those who ask at the same time, which are
// mostly one. The head is read first: what a page has is all that is up to there, or up
// to the last of its events.
func loadRevocations(ctx context.Context, db querier, after []place) (list []revocations, err error) {
	seqs, there, head, pages := []int64{}, map[int64]string{}, place{}, map[place]revocations{}
	for _, at := range after {
		seqs = append(seqs, at.seq)
	}
	rows, _ := db.Query(ctx, `
		select seq, left(encode(hash, 'hex'), 16)
		from audit_events
		where seq = any($1 || array(select seq from audit_events order by seq desc limit 1))
		order by seq`, seqs)
	_, err = pgx.ForEachRow(rows, []any{&head.seq, &head.hash}, func() error {
		there[head.seq] = head.hash // in the end that is the head
		return nil
	})
	for _, at := range after {
		p, read := pages[at]
		if err == nil && !read {
			p, err = loadPage(ctx, db, at, head)
			p.lost = at.hash != "" && at.hash != there[at.seq]
			pages[at] = p
		}
		list = append(list, p)
	}
	if err != nil {
		return nil, fmt.Errorf("reading revocations: %w", err)
	}
	return list, nil
}

// loadPage reads on behind a place, to the head or as far as a page goes.
func loadPage(ctx context.Context, db querier, after, head place) (revocations, error) {
	p := revocations{Entries: []revocation{}, Next: head}
	rows, _ := db.Query(ctx, `
		select `+eventColumns+`
		from unnest($2::text[]) as wanted (wanted)
		cross join lateral (
			select `+eventColumns+`
			from audit_events
			where action = wanted and action <> 'token.issued' and seq > $1 -- as the index has it
			order by seq
			limit $3) as events
		order by seq
		limit $3`, after.seq, feedActions, feedPage)
	events, err := pgx.CollectRows(rows, pgx.RowToStructByName[event])
	for _, e := range events {
		x, ok, wrong := revocationOf(e)
		if ok {
			p.Entries = append(p.Entries, x)
		}
		err = cmp.Or(err, wrong)
	}
	p.More = len(events) == feedPage
	if last := len(events) - 1; last >= 0 && (p.More || events[last].Seq > head.seq) {
		p.Next = place{events[last].Seq, hex.EncodeToString(events[last].Hash[:8])}
	}
	return p, err
}

// listRevocations answers at once where there is something behind the place of the
// reader. An access is recorded where it begins, and not each time that it goes on.
func (s *server) listRevocations(r *request) (any, error) {
	in, streams := readQuery(r), strings.Contains(r.Header.Get("Accept"), "text/event-stream")
	if id := r.Header.Get("Last-Event-ID"); streams && id != "" { // of who comes again by the same URL
		in.values["after"] = id
	}
	after, wait := take(in, "after", parsed("must be the next of an answer", parsePlace)), take(in, "wait", whole(1, feedWait))
	err := in.problem()
	if err == nil && after == nil {
		after, err = s.startOfFeed(r)
	}
	if err != nil {
		return nil, err
	}
	p, err := s.readOn(r.Context(), *after)
	if r.Method != http.MethodGet || err != nil || !streams && (wait == nil || p.More || len(p.Entries) > 0) {
		return p, err
	}
	return later(func(w http.ResponseWriter) (any, error) {
		defer s.readers.Add(-1)
		if s.readers.Add(1) > feedRoom {
			return nil, errBusy.because("Too many wait for revocations here; try another copy, or ask without wait.")
		}
		if s.draining.Load() {
			return nil, errStopping
		}
		conn := http.NewResponseController(w)
		if streams {
			return nil, s.streamRevocations(r, w, conn, p)
		}
		p, err := s.awaitRevocations(r, p, time.Duration(*wait)*time.Second)
		_ = conn.SetWriteDeadline(time.Now().Add(feedBeat))
		return p, err
	}), nil
}

// startOfFeed records the access, and is the place from which on the log has all that is live.
func (s *server) startOfFeed(r *request) (*place, error) {
	_, err := s.record(r, entry{event: newEvent(revocationsRead, r.caller.AgentID, facts{}), needs: []origin{r.caller.origin}})()
	if err != nil {
		return nil, err
	}
	at := &place{}
	err = s.db.QueryRow(r.Context(), `
		select seq - 1
		from audit_events
		where "timestamp" >= $1
		order by "timestamp", seq
		limit 1`, s.now().Add(-maxTokenTTL-clockTrust)).Scan(&at.seq)
	if err != nil {
		return nil, fmt.Errorf("looking for what is live: %w", err)
	}
	return at, nil
}

// readOn returns what is behind a place, together with all who ask at the same time.
func (s *server) readOn(ctx context.Context, at place) (revocations, error) {
	p, err := s.feed.put(ctx, at).wait()
	if err == nil && p.lost {
		err = errNoPlace
	}
	return p, err
}

// awaitRevocations returns what comes behind the last page, once it does, or nothing when
// the time is up or the copy stops; to a reader that may have it then. All look at the
// same moments, so that the queue asks once for many. No fault passes for nothing.
func (s *server) awaitRevocations(r *request, last revocations, most time.Duration) (p revocations, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), most+requestTimeout)
	defer cancel()
	p = revocations{Entries: []revocation{}, Next: last.Next}
	for end := time.Now().Add(most); err == nil && len(p.Entries) == 0 && !p.More && time.Now().Before(end) && !s.draining.Load(); last.More = false {
		pause := feedEvery - time.Duration(time.Now().UnixNano())%feedEvery
		if last.More {
			pause = 0
		}
		select {
		case <-time.After(pause):
			p, err = s.readOn(ctx, p.Next)
		case <-r.Context().Done():
			return p, nil // to nobody
		}
	}
	if err == nil && s.now().Unix() >= r.caller.until {
		err = errInvalidToken.because("The token has expired meanwhile; get a new one.")
	}
	if err == nil {
		err = s.checkAlive(ctx, &r.caller)
	}
	return p, err
}

// streamRevocations goes on until the reader has gone, may no more, or doesn't take what
// is written in time, or something fails (html.spec.whatwg.org, section 9.2). It says up to
// where it has come also where nothing has happened.
func (s *server) streamRevocations(r *request, w http.ResponseWriter, conn *http.ResponseController, p revocations) (err error) {
	r.out.Set("Content-Type", "text/event-stream")
	r.out.Set("X-Accel-Buffering", "no") // nginx would keep it back until it is much
	r.begun = true
	for first := true; err == nil; first = false {
		text := ": heartbeat\nid: " + p.Next.String() + "\n\n"
		if first || p.More || len(p.Entries) > 0 {
			data, err := json.Marshal(p)
			if err != nil {
				return err
			}
			text = "id: " + p.Next.String() + "\ndata: " + string(data) + "\n\n"
		}
		_ = conn.SetWriteDeadline(time.Now().Add(feedBeat))
		if _, err := io.WriteString(w, text); err != nil || conn.Flush() != nil || s.draining.Load() || r.Context().Err() != nil {
			return nil
		}
		p, err = s.awaitRevocations(r, p, feedBeat)
	}
	return err
}
