package test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A servedEvent is an event as HTTP shows it. It is all that a reader needs to
// check the chain.
type servedEvent struct {
	EventID   string          `json:"eventId"`
	Seq       int64           `json:"seq"`
	AgentID   *string         `json:"agentId"`
	ActorID   *string         `json:"actorId"`
	Action    string          `json:"action"`
	Outcome   string          `json:"outcome"`
	IPAddress string          `json:"ipAddress"`
	UserAgent string          `json:"userAgent"`
	Metadata  json.RawMessage `json:"metadata"`
	Timestamp string          `json:"timestamp"`
	PrevHash  string          `json:"prevHash"`
	Hash      string          `json:"hash"`
}

// idText is "" for null.
func idText(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// documentedHash is written from the documentation alone: SHA-256 over the
// fields as netstrings, where null is empty.
func (e servedEvent) documentedHash() string {
	var b strings.Builder
	for _, field := range []string{
		e.PrevHash, fmt.Sprint(e.Seq), e.EventID, e.Timestamp, idText(e.AgentID), idText(e.ActorID),
		e.Action, e.Outcome, e.IPAddress, e.UserAgent, string(e.Metadata),
	} {
		fmt.Fprintf(&b, "%d:%s,", len(field), field)
	}
	sum := sha256.Sum256([]byte(b.String()))
	return hex.EncodeToString(sum[:])
}

// fact is what the metadata say of one thing.
func (e servedEvent) fact(name string) string {
	var facts map[string]any
	if err := json.Unmarshal(e.Metadata, &facts); err != nil || facts[name] == nil {
		return ""
	}
	return fmt.Sprint(facts[name])
}

const firstPrevHash = "0000000000000000000000000000000000000000000000000000000000000000"

const millis = "2006-01-02T15:04:05.000Z"

// forgeEvent makes a good event behind others.
func forgeEvent(chain []servedEvent, at time.Time, action string) servedEvent {
	agentID := newID()
	e := servedEvent{
		Seq: 1, AgentID: &agentID, Action: action, Outcome: "success", IPAddress: "::1", UserAgent: "forged",
		Metadata: json.RawMessage(`{"requestId":"forged"}`), Timestamp: at.UTC().Format(millis), PrevHash: firstPrevHash,
	}
	if n := len(chain); n > 0 {
		e.Seq, e.PrevHash = chain[n-1].Seq+1, chain[n-1].Hash
	}
	e.EventID = eventID(e.Seq, at)
	e.Hash = e.documentedHash()
	return e
}

// insertEvents writes events past the service.
func insertEvents(t *testing.T, db interface {
	CopyFrom(context.Context, pgx.Identifier, []string, pgx.CopyFromSource) (int64, error)
}, events []servedEvent) {
	t.Helper()
	columns := []string{"event_id", "seq", "agent_id", "actor_id", "action", "outcome", "ip_address", "user_agent", "metadata",
		"timestamp", "prev_hash", "hash"}
	_, err := db.CopyFrom(t.Context(), pgx.Identifier{"audit_events"}, columns, pgx.CopyFromSlice(len(events), func(i int) ([]any, error) {
		e := events[i]
		at, err := time.Parse(millis, e.Timestamp)
		prev, prevErr := hex.DecodeString(e.PrevHash)
		hash, hashErr := hex.DecodeString(e.Hash)
		return []any{e.EventID, e.Seq, e.AgentID, e.ActorID, e.Action, e.Outcome, e.IPAddress, e.UserAgent, string(e.Metadata),
			at, prev, hash}, errors.Join(err, prevErr, hashErr)
	}))
	if err != nil {
		t.Fatal(err)
	}
}

// newHistory makes a database whose log begins with these events, for
// newService. Before them, prepare is run.
func newHistory(t *testing.T, prepare string, events []servedEvent) (databaseURL string) {
	t.Helper()
	databaseURL = newDatabase(t)
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, sql := range []string{schema(t), prepare} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	insertEvents(t, conn, events)
	return databaseURL
}

type eventPage struct {
	Data        []servedEvent `json:"data"`
	Total       int           `json:"total"`
	TotalCapped bool          `json:"totalCapped"`
	Page, Limit int
	NextCursor  *string `json:"nextCursor"`
}

// audit gets a page of events.
func (v *service) audit(query string) (page eventPage) {
	v.t.Helper()
	a := v.want(v.api(v.bearer, "GET", "/audit?"+query, ""), 200, "")
	if err := json.Unmarshal([]byte(a.raw), &page); err != nil {
		v.t.Fatal(err)
	}
	return page
}

// chain reads all events, oldest first.
func (v *service) chain() (events []servedEvent) {
	v.t.Helper()
	for query := "limit=100"; ; {
		page := v.audit(query)
		events = append(events, page.Data...)
		if page.NextCursor == nil {
			slices.Reverse(events)
			return events
		}
		query = "limit=100&cursor=" + url.QueryEscape(*page.NextCursor)
	}
}

// checkChain checks what HTTP serves as any reader can: no gap, no fork, each
// event linked to the one before, each hash that of the event.
func (v *service) checkChain() []servedEvent {
	v.t.Helper()
	events := v.chain()
	prev := firstPrevHash
	for i, e := range events {
		if e.Seq != int64(i+1) || e.PrevHash != prev {
			v.t.Fatalf("event %d has seq %d and prevHash %s, want %d and %s", i, e.Seq, e.PrevHash, i+1, prev)
		}
		if got := e.documentedHash(); got != e.Hash {
			v.t.Fatalf("event %d has hash %s, want %s: %+v %s", e.Seq, e.Hash, got, e, e.Metadata)
		}
		prev = e.Hash
	}
	a := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, "")
	if a.body["verified"] != true || a.body["events"] != float64(len(events)) {
		v.t.Fatalf("GET /audit/verify = %v, want %d verified events", a, len(events))
	}
	return events
}

// verifyAudit is the operator's command.
func (v *service) verifyAudit(checkpoint ...string) (stdout string, err error) {
	v.t.Helper()
	return command(v.t.Context(), v.env, testLog, append([]string{"verify-audit"}, checkpoint...)...)
}

// checkpoint is what the service signs of the chain as it is now.
func (v *service) checkpoint() string {
	v.t.Helper()
	return v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, "").text("checkpoint")
}

// exec runs SQL past the service, and again where it is in the way of what that
// does at the same moment.
func (v *service) exec(sql string, args ...any) {
	v.t.Helper()
	_, err := v.db.Exec(v.t.Context(), sql, args...)
	for tries := 0; err != nil && strings.Contains(err.Error(), "40P01") && tries < 20; tries++ {
		_, err = v.db.Exec(v.t.Context(), sql, args...)
	}
	if err != nil {
		v.t.Fatalf("%s: %v", sql, err)
	}
}

func TestEveryActionIsRecorded(t *testing.T) {
	t.Parallel()
	v := newService(t)
	type happened struct {
		a                                 answer
		action, outcome, agentID, actorID string
		facts                             map[string]string
	}
	var all []happened
	add := func(a answer, action, outcome, agentID, actorID string, facts ...string) answer {
		t.Helper()
		h := happened{a, action, outcome, agentID, actorID, map[string]string{}}
		for i := 0; i < len(facts); i += 2 {
			h.facts[facts[i]] = facts[i+1]
		}
		all = append(all, h)
		return a
	}
	patch := func(id, body string) answer { return v.api(v.bearer, "PATCH", "/agents/"+id, body) }

	a := v.want(v.api(v.bearer, "POST", "/agents", agentJSON("events@example.com", "resumes:read")), 201, "")
	id := a.text("agentId")
	add(a, "agent.created", "success", id, v.id,
		"agent", "map[agentType:screener capabilities:[resumes:read] deploymentEnv:production email:events@example.com owner:team version:1.0.0]")
	a = v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials", "{}"), 201, "")
	credentialID, secret := a.text("credentialId"), a.text("clientSecret")
	add(a, "credential.generated", "success", id, v.id, "credentialId", credentialID)
	a = add(v.want(v.form(id, secret, "", "grant_type=client_credentials"), 200, ""), "token.issued", "success", id, id,
		"credentialId", credentialID, "scope", "resumes:read")
	token := a.text("access_token")
	c := readClaims(t, token)
	all[len(all)-1].facts["jti"] = c.ID
	bearer := []string{"Authorization", "Bearer " + v.bearer, "Content-Type", "application/x-www-form-urlencoded"}
	add(v.want(v.do("POST", "/api/v1/token/introspect", "token="+token, bearer...), 200, ""), "token.introspected", "success", id, v.id,
		"jti", c.ID, "active", "true")
	add(v.want(v.form(v.id, v.secret, "/introspect", "token=nonsense"), 200, ""), "token.introspected", "success", "", v.id, "active", "false")
	add(v.want(v.form(id, secret, "/revoke", "token="+token), 200, ""), "token.revoked", "success", id, id, "jti", c.ID)
	add(v.want(v.form(id, secret, "/introspect", "token="+token), 403, "insufficient_scope"), "token.introspected", "failure", id, id,
		"reason", "insufficient_scope")
	add(v.want(v.form(id, secret, "/revoke", "token="+v.bearer), 400, "invalid_request"), "token.revoked", "failure", v.id, id)
	a = v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials/"+credentialID+"/rotate", "{}"), 200, "")
	add(a, "credential.rotated", "success", id, v.id, "credentialId", credentialID)
	add(v.want(v.form(id, secret, "", "grant_type=client_credentials"), 401, "invalid_client"), "auth.failed", "failure", id, "", "reason", "invalid_client")
	add(v.want(v.form("nobody", "nothing", "", "grant_type=client_credentials"), 401, "invalid_client"), "auth.failed", "failure", "", "",
		"reason", "invalid_client")
	secret = a.text("clientSecret")
	add(v.want(patch(id, `{"owner":"new","version":"2.0.0"}`), 200, ""), "agent.updated", "success", id, v.id, "changes", "map[owner:new version:2.0.0]")
	add(v.want(patch(id, `{"status":"active"}`), 200, ""), "agent.updated", "success", id, v.id, "changes", "map[status:active]")
	add(v.want(patch(id, `{"status":"suspended"}`), 200, ""), "agent.suspended", "success", id, v.id, "changes", "map[status:suspended]")
	add(v.want(v.form(id, secret, "", "grant_type=client_credentials"), 403, "unauthorized_client"), "auth.failed", "failure", id, "",
		"reason", "unauthorized_client")
	add(v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials", "{}"), 403, "AGENT_NOT_ACTIVE"), "credential.generated", "failure", id, v.id,
		"reason", "AGENT_NOT_ACTIVE")
	a = add(v.want(v.api(v.bearer, "GET", "/revocations", ""), 200, ""), "revocations.read", "success", v.id, v.id)
	next := a.text("next")
	add(v.want(patch(id, `{"status":"active","owner":"newer"}`), 200, ""), "agent.reactivated", "success", id, v.id,
		"changes", "map[owner:newer status:active]")
	credential := "/agents/" + id + "/credentials/" + credentialID
	add(v.want(v.api(v.bearer, "DELETE", credential, ""), 204, ""), "credential.revoked", "success", id, v.id, "credentialId", credentialID)
	add(v.want(v.api(v.bearer, "DELETE", credential, ""), 409, "CREDENTIAL_ALREADY_REVOKED"), "credential.revoked", "failure", id, v.id,
		"credentialId", credentialID, "reason", "CREDENTIAL_ALREADY_REVOKED")
	add(v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 204, ""), "agent.decommissioned", "success", id, v.id)
	add(v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 409, "AGENT_ALREADY_DECOMMISSIONED"), "agent.decommissioned", "failure", id, v.id,
		"reason", "AGENT_ALREADY_DECOMMISSIONED")
	add(v.want(v.api(v.bearer, "POST", "/agents", agentJSON("EVENTS@example.com", "resumes:read")), 409, "AGENT_ALREADY_EXISTS"),
		"agent.created", "failure", "", v.id, "reason", "AGENT_ALREADY_EXISTS")

	// What is read, or has faults, or changes nothing, is no event.
	quiet := []answer{
		v.want(v.api(v.bearer, "GET", "/agents", ""), 200, ""),
		v.want(v.api(v.bearer, "GET", "/revocations?after="+next, ""), 200, ""),
		v.want(v.api(v.bearer, "GET", "/revocations?after=x", ""), 400, "VALIDATION_ERROR"),
		v.want(v.api(v.bearer, "GET", "/agents/"+newID(), ""), 404, "AGENT_NOT_FOUND"),
		v.want(v.api(v.bearer, "DELETE", "/agents/"+newID(), ""), 404, "AGENT_NOT_FOUND"),
		v.want(patch(id, `{"email":"x"}`), 400, "VALIDATION_ERROR"),
		v.want(v.form(v.id, v.secret, "", "grant_type=password"), 400, "unsupported_grant_type"),
		v.want(v.form(v.id, v.secret, "/revoke", "token="+token), 200, ""),
		v.want(v.api("nonsense", "GET", "/agents", ""), 401, "UNAUTHORIZED"),
	}

	events := v.checkChain()
	with := func(a answer) (found []servedEvent) {
		for _, e := range events {
			if e.fact("requestId") == a.header.Get("X-Request-Id") {
				found = append(found, e)
			}
		}
		return found
	}
	seen := map[string]bool{}
	for _, h := range all {
		seen[h.action] = true
		found := with(h.a)
		if len(found) != 1 {
			t.Errorf("%s: %d events are of its request, want 1", h.action, len(found))
			continue
		}
		e := found[0]
		if e.Action != h.action || e.Outcome != h.outcome || idText(e.AgentID) != h.agentID || idText(e.ActorID) != h.actorID {
			t.Errorf("event %s %s of agent %q by %q, want %s %s of %q by %q", e.Action, e.Outcome, idText(e.AgentID), idText(e.ActorID),
				h.action, h.outcome, h.agentID, h.actorID)
		}
		for name, want := range h.facts {
			if got := e.fact(name); got != want {
				t.Errorf("%s: %s = %q, want %q", h.action, name, got, want)
			}
		}
		if e.IPAddress != "127.0.0.1" || e.UserAgent != "Go-http-client/1.1" {
			t.Errorf("%s: from %q with %q, want this test's", h.action, e.IPAddress, e.UserAgent)
		}
		if at, err := time.Parse(millis, e.Timestamp); err != nil || time.Since(at).Abs() > time.Minute {
			t.Errorf("%s: at %q, want now in UTC with milliseconds", h.action, e.Timestamp)
		}
	}
	for _, a := range quiet {
		if found := with(a); len(found) != 0 {
			t.Errorf("%v is recorded as %+v, want no event", a, found)
		}
	}
	thirteen := []string{"agent.created", "agent.updated", "agent.suspended", "agent.reactivated", "agent.decommissioned", "credential.generated",
		"credential.rotated", "credential.revoked", "token.issued", "token.revoked", "token.introspected", "auth.failed", "revocations.read"}
	for _, action := range thirteen {
		if !seen[action] || v.audit("action="+action).Total == 0 {
			t.Errorf("%s did not happen here or can't be asked for", action)
		}
	}
	if len(actions) != len(thirteen) {
		t.Errorf("there are %d actions, want %d", len(actions), len(thirteen))
	}

	// One event is served as it is in the list.
	a = v.want(v.api(v.bearer, "GET", "/audit/"+events[3].EventID, ""), 200, "")
	if fields := strings.Join(slices.Sorted(maps.Keys(a.body)), " "); fields !=
		"action actorId agentId eventId hash ipAddress metadata outcome prevHash seq timestamp userAgent" {
		t.Errorf("an event has the fields %q", fields)
	}
	if list := v.api(v.bearer, "GET", "/audit?limit=100", ""); !strings.Contains(list.raw, strings.TrimSpace(a.raw)) {
		t.Errorf("GET /audit/%s = %s, which is not so in the list", events[3].EventID, a.raw)
	}
	for _, path := range []string{newID(), strings.ToUpper(events[3].EventID), "1", strings.ReplaceAll(events[3].EventID, "-", "")} {
		v.want(v.api(v.bearer, "GET", "/audit/"+path, ""), 404, "AUDIT_EVENT_NOT_FOUND")
	}
	narrow := v.token(v.id, v.secret, "agents:read agents:write tokens:read credentials:write")
	for _, path := range []string{"", "/" + events[3].EventID, "/verify"} {
		v.want(v.api(narrow, "GET", "/audit"+path, ""), 403, "FORBIDDEN")
	}
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
		v.want(v.api(v.bearer, method, "/audit/"+events[3].EventID, "{}"), 405, "METHOD_NOT_ALLOWED")
	}
}

func TestEventsAreFiltered(t *testing.T) {
	t.Parallel()
	today := time.Now().UTC().Truncate(24 * time.Hour)
	var history []servedEvent
	agents := []string{newID(), newID()}
	for day := -5; day < 0; day++ {
		for _, at := range []time.Duration{0, 12 * time.Hour, 24*time.Hour - time.Millisecond} {
			n := len(history)
			e := forgeEvent(history, today.AddDate(0, 0, day).Add(at), actions[n%4])
			e.AgentID, e.Outcome = &agents[n%2], []string{"success", "success", "failure"}[n%3]
			e.Hash = e.documentedHash()
			history = append(history, e)
		}
	}
	v := newService(t, "DATABASE_URL", newHistory(t, "", history))
	all := v.checkChain()
	slices.Reverse(all) // newest first
	day := func(n int) string { return today.AddDate(0, 0, n).Format(time.DateOnly) }
	start := func(n int) string { return today.AddDate(0, 0, n).Format(millis) }
	for _, row := range []struct {
		name, query string
		want        func(servedEvent) bool
	}{
		{"none", "", func(servedEvent) bool { return true }},
		{"agent", "agentId=" + agents[0], func(e servedEvent) bool { return idText(e.AgentID) == agents[0] }},
		{"unknown agent", "agentId=" + newID(), func(servedEvent) bool { return false }},
		{"action", "action=agent.updated", func(e servedEvent) bool { return e.Action == "agent.updated" }},
		{"everyday action", "action=token.issued", func(e servedEvent) bool { return e.Action == "token.issued" }},
		{"success", "outcome=success", func(e servedEvent) bool { return e.Outcome == "success" }},
		{"failure", "outcome=failure", func(e servedEvent) bool { return e.Outcome == "failure" }},
		{"from a day", "fromDate=" + day(-2), func(e servedEvent) bool { return e.Timestamp >= start(-2) }},
		{"to a day, all of it", "toDate=" + day(-3), func(e servedEvent) bool { return e.Timestamp < start(-2) }},
		{"one day", "fromDate=" + day(-3) + "&toDate=" + day(-3), func(e servedEvent) bool {
			return e.Timestamp >= start(-3) && e.Timestamp < start(-2)
		}},
		{"from a time, with it", "fromDate=" + start(-1), func(e servedEvent) bool { return e.Timestamp >= start(-1) }},
		{"to a time, with it", "toDate=" + start(-1), func(e servedEvent) bool { return e.Timestamp <= start(-1) }},
		{"from a time just after", "fromDate=" + today.AddDate(0, 0, -1).Format("2006-01-02T15:04:05.001Z"), func(e servedEvent) bool {
			return e.Timestamp > start(-1)
		}},
		{"a single time", "fromDate=" + start(-4) + "&toDate=" + start(-4), func(e servedEvent) bool { return e.Timestamp == start(-4) }},
		{"a time elsewhere", "fromDate=" + today.AddDate(0, 0, -1).Format("2006-01-02") + "T02:00:00%2B02:00", func(e servedEvent) bool {
			return e.Timestamp >= start(-1)
		}},
		{"the future", "fromDate=2200-01-01", func(servedEvent) bool { return false }},
		{"agent and action", "agentId=" + agents[1] + "&action=agent.updated", func(e servedEvent) bool {
			return idText(e.AgentID) == agents[1] && e.Action == "agent.updated"
		}},
		{"action that never happened to the agent", "agentId=" + agents[0] + "&action=agent.updated", func(servedEvent) bool { return false }},
		{"all", "agentId=" + agents[0] + "&action=agent.created&outcome=success&limit=100&page=1&fromDate=" + day(-5) + "&toDate=" + day(-2),
			func(e servedEvent) bool {
				return idText(e.AgentID) == agents[0] && e.Action == "agent.created" && e.Outcome == "success" && e.Timestamp < start(-1)
			}},
	} {
		t.Run(row.name, func(t *testing.T) {
			var want []int64
			for _, e := range all {
				if row.want(e) {
					want = append(want, e.Seq)
				}
			}
			page := v.audit(row.query)
			var got []int64
			for _, e := range page.Data {
				got = append(got, e.Seq)
			}
			if !slices.Equal(got, want) || page.Total != len(want) || page.TotalCapped {
				t.Errorf("GET /audit?%s = %v of %d, want %v", row.query, got, page.Total, want)
			}
		})
	}
	if a := v.api(v.bearer, "GET", "/audit?fromDate=2200-01-01", ""); !strings.Contains(a.raw, `"data":[]`) || !strings.Contains(a.raw, `"nextCursor":null`) {
		t.Errorf("an empty page is %v", a)
	}
	cursor := *v.audit("limit=5").NextCursor
	for query, faults := range map[string]string{
		"fromDate=" + day(-1) + "&toDate=" + day(-2):       "toDate",
		"fromDate=" + start(-1) + "&toDate=" + day(-2):     "toDate",
		"fromDate=yesterday":                               "fromDate",
		"fromDate=":                                        "fromDate",
		"fromDate=2026-02-30":                              "fromDate",
		"fromDate=2026-13-01":                              "fromDate",
		"fromDate=" + day(-1) + "T09:00:00":                "fromDate",
		"fromDate=" + day(-1) + "+09:00":                   "fromDate",
		"toDate=" + day(-1) + "T25:00:00Z":                 "toDate",
		"toDate=1774688400":                                "toDate",
		"toDate=9999-12-31T23:59:59-23:59":                 "", // a year later than 9999 in UTC: whatever, but no fault of ours
		"toDate=" + day(-1) + "%00":                        "toDate",
		"toDate=10000-01-01":                               "toDate",
		"action=agent.deleted":                             "action",
		"action=":                                          "action",
		"action=Agent.Created":                             "action",
		"outcome=ok":                                       "outcome",
		"agentId=1":                                        "agentId",
		"agentId=" + strings.ToUpper(agents[0]):            "agentId",
		"agentId=%7B" + agents[0] + "%7D":                  "agentId",
		"agentId=":                                         "agentId",
		"agentId=" + agents[0] + "&agentId=" + agents[1]:   "agentId",
		"action=x&outcome=y&agentId=z&fromDate=a&toDate=b": "action agentId fromDate outcome toDate",
		"limit=0":                                "limit",
		"limit=101":                              "limit",
		"page=0":                                 "page",
		"page=101&limit=100":                     "page",
		"cursor=":                                "cursor",
		"cursor=x":                               "cursor",
		"cursor=" + cursor + "&page=2":           "cursor",
		"cursor=" + cursor + "&cursor=" + cursor: "cursor",
		"cursor=" + cursor[:len(cursor)-1]:       "cursor",
		"cursor=" + cursor + "A":                 "cursor",
		"cursor=" + cursor + "%0A":               "cursor",
		"cursor=" + cursor[1:]:                   "cursor",
		"cursor=" + cursor[:9] + flipped(cursor[9]) + cursor[10:]:                        "cursor",
		"cursor=" + cursor[:40] + flipped(cursor[40]) + cursor[41:]:                      "cursor",
		"cursor=" + base64.RawURLEncoding.EncodeToString([]byte{0, 0, 0, 0, 0, 0, 0, 9}): "cursor",
		"cursor=" + base64.RawURLEncoding.EncodeToString(make([]byte, 40)):               "cursor",
	} {
		a := v.api(v.bearer, "GET", "/audit?"+query, "")
		if faults == "" && a.status < 500 {
			continue
		}
		if a.status != 400 || a.code() != "VALIDATION_ERROR" || detailNames(a) != faults {
			t.Errorf("GET /audit?%s = %v, want 400 with faults in %q", query, a, faults)
		}
	}
	if a := v.api(v.bearer, "GET", "/audit?page=101&limit=100", ""); !strings.Contains(a.raw, "cursor") {
		t.Errorf("beyond the 10,000th row = %v, want it to name the cursor", a)
	}

	// A copy that serves three days serves no more, in lists and by id.
	w := v.another("RETENTION_DAYS", "3")
	old := time.Now().AddDate(0, 0, -3).UTC().Format(millis)
	served := 0
	for _, e := range all {
		if e.Timestamp > old {
			served++
		}
		status, code := 200, ""
		if e.Timestamp < old {
			status, code = 404, "AUDIT_EVENT_NOT_FOUND"
		}
		w.want(w.api(v.bearer, "GET", "/audit/"+e.EventID, ""), status, code)
	}
	page := w.audit("limit=100")
	if page.Total != served || len(page.Data) != served || page.NextCursor != nil || served >= len(all) {
		t.Errorf("%d events of %d are served, want %d of %d", len(page.Data), page.Total, served, len(all))
	}
	if last := w.audit("limit=100&cursor=" + cursor); len(last.Data) != served-5 {
		t.Errorf("by cursor %d more events are served, want %d", len(last.Data), served-5)
	}
	for query, ok := range map[string]bool{
		"fromDate=" + day(-2): true, "toDate=" + day(-2): true, "fromDate=" + day(-2) + "&toDate=" + day(-1): true,
		"fromDate=" + day(-4): false, "toDate=" + day(-4): false, "fromDate=" + day(-4) + "&toDate=" + day(-1): false,
		"fromDate=1970-01-01": false, "fromDate=2000-01-01T00:00:00Z": false, "toDate=2000-01-01": false,
	} {
		a := w.api(v.bearer, "GET", "/audit?"+query, "")
		details, _ := a.body["details"].(map[string]any)
		if ok && a.status != 200 || !ok && (a.status != 400 || a.code() != "RETENTION_WINDOW_EXCEEDED" || details["retentionDays"] != 3.0) {
			t.Errorf("GET /audit?%s with 3 days = %v, want served %v", query, a, ok)
		}
	}
	if a := w.want(w.api(v.bearer, "GET", "/audit/verify", ""), 200, ""); a.body["verified"] != true || a.body["fromSeq"] != 1.0 {
		t.Errorf("GET /audit/verify with 3 days = %v, want the whole chain verified", a)
	}
}

// flipped is another letter of base64.
func flipped(c byte) string {
	if c == 'A' {
		return "B"
	}
	return "A"
}

func TestCursorReadsEveryEventOnceAndTotalsStopAt10000(t *testing.T) {
	t.Parallel()
	var history []servedEvent
	agentID, from := newID(), time.Now().Add(-20*time.Hour)
	for range 10_000 {
		e := forgeEvent(history, from, "token.issued")
		e.AgentID = &agentID
		e.Hash = e.documentedHash()
		history = append(history, e)
		from = from.Add(time.Millisecond)
	}
	v := newService(t, "DATABASE_URL", newHistory(t, "", history))
	w := v.another()
	if page := v.audit("agentId=" + agentID); page.Total != 10_000 || page.TotalCapped {
		t.Errorf("of exactly 10,000: total %d capped %v, want 10000 false", page.Total, page.TotalCapped)
	}
	head := int64(0)
	next, query := int64(0), "limit=100"
	for n := 0; ; n++ {
		page := []*service{v, w}[n%2].audit(query) // a cursor is good on every copy
		if head == 0 {
			head = page.Data[0].Seq
			next = head
			if page.Total != 10_000 || !page.TotalCapped {
				t.Errorf("of more than 10,000: total %d capped %v, want 10000 true", page.Total, page.TotalCapped)
			}
		}
		for _, e := range page.Data {
			if e.Seq != next {
				t.Fatalf("after %d events came seq %d, want %d", head-next, e.Seq, next)
			}
			next--
		}
		if page.NextCursor == nil {
			break
		}
		query = "limit=100&cursor=" + url.QueryEscape(*page.NextCursor)
		if n%10 == 0 {
			v.token(v.id, v.secret, "") // moves every page but not the cursor
		}
	}
	if next != 0 {
		t.Errorf("the cursor ended at seq %d, want 1", next+1)
	}
	// The end of a list that fills its last page has no cursor either.
	if page := v.audit("limit=100&page=100&agentId=" + agentID); len(page.Data) != 100 || page.NextCursor != nil || page.Data[99].Seq != 1 {
		t.Errorf("the last page has %d events and the cursor %v, want 100 and none", len(page.Data), page.NextCursor)
	}
	v.want(v.api(v.bearer, "GET", "/audit?page=501", ""), 400, "VALIDATION_ERROR")

	// Who has the whole log verified on a terminal sees how far that is.
	p := &program{service: v}
	verify := p.build("verify-audit")
	onTerminal := exec.Command("script", "-qec", verify.Path+" verify-audit", "/dev/null")
	onTerminal.Env = verify.Env
	if out, err := onTerminal.CombinedOutput(); err != nil || !strings.Contains(string(out), "read up to seq 10000\rverified: 1") {
		t.Errorf("verify-audit on a terminal = %q, %v, want its progress and that it is verified", out, err)
	}
	if out, err := verify.CombinedOutput(); err != nil || strings.Contains(string(out), "read up") {
		t.Errorf("verify-audit in a script = %q, %v, want no progress", out, err)
	}

	// A part of the chain is verified from any seq, up to its head.
	head = int64(v.count(`select max(seq) from audit_events`))
	for _, row := range []struct {
		query         string
		from, events  int64 // events 0: refused
		keepsTheChain bool
	}{
		{"", 1, head, true},
		{"?fromSeq=1", 1, head, true},
		{"?fromSeq=2", 2, head - 1, true},
		{"?fromSeq=9000", 9000, head - 8999, true},
		{fmt.Sprintf("?fromSeq=%d", head), head, 1, true},
		{fmt.Sprintf("?fromSeq=%d", head+1), 0, 0, false},
		{fmt.Sprintf("?fromSeq=%d", head+1000), 0, 0, false},
		{"?fromSeq=9007199254740992", 0, 0, false},
		{"?fromSeq=9223372036854775807", 0, 0, false},
		{"?fromSeq=9223372036854775808", 0, 0, false},
		{"?fromSeq=0", 0, 0, false}, {"?fromSeq=-1", 0, 0, false}, {"?fromSeq=x", 0, 0, false}, {"?fromSeq=", 0, 0, false},
		{"?fromSeq=1.0", 0, 0, false}, {"?fromSeq=1&fromSeq=2", 0, 0, false},
	} {
		t.Run("verify"+row.query, func(t *testing.T) {
			var a answer
			v.eventually("there is a report", func() bool { // on a machine that is loaded it may not be made in time
				a = v.api(v.bearer, "GET", "/audit/verify"+row.query, "")
				return a.status != 503
			})
			if !row.keepsTheChain {
				if a.status != 400 || a.code() != "VALIDATION_ERROR" || detailNames(a) != "fromSeq" {
					t.Errorf("GET /audit/verify%s = %v, want 400 with a fault in fromSeq", row.query, a)
				}
				return
			}
			if a.status != 200 || a.body["verified"] != true || a.body["fromSeq"] != float64(row.from) || a.body["events"] != float64(row.events) ||
				a.body["headSeq"] != float64(head) || len(a.text("headHash")) != 64 || a.text("checkpoint") == "" || a.body["firstBadSeq"] != nil {
				t.Errorf("GET /audit/verify%s = %v, want %d good events from %d to %d", row.query, a, row.events, row.from, head)
			}
		})
	}
	v.want(v.api(v.bearer, "GET", "/audit/verify?toSeq=2", ""), 400, "VALIDATION_ERROR")
}

// Where the clock of the database was set back, the log is still read whole: as
// it was written, or, between dates, by time.
func TestEventsOfAClockSetBackAreReadOnce(t *testing.T) {
	t.Parallel()
	var history []servedEvent
	begun := time.Now().Add(-48 * time.Hour).Truncate(time.Hour)
	for _, minute := range []int{1, 2, 9, 9, 3, 4, 9, 2, 5, 40, 5, 6} {
		history = append(history, forgeEvent(history, begun.Add(time.Duration(minute)*time.Minute), "token.issued"))
	}
	v := newService(t, "DATABASE_URL", newHistory(t, "", history))
	read := func(query string) (seqs []int64) {
		for more := query + "&limit=2"; ; {
			page := v.audit(more)
			for _, e := range page.Data {
				seqs = append(seqs, e.Seq)
			}
			if page.NextCursor == nil {
				return seqs
			}
			more = query + "&limit=2&cursor=" + url.QueryEscape(*page.NextCursor)
		}
	}
	at := func(minute int) string { return begun.Add(time.Duration(minute) * time.Minute).UTC().Format(millis) }
	if got, want := read("action=token.issued&outcome=success")[1:], []int64{12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1}; !slices.Equal(got, want) {
		t.Errorf("all are %v, want %v", got, want)
	}
	if got, want := read("fromDate="+at(2)+"&toDate="+at(9)), []int64{7, 4, 3, 12, 11, 9, 6, 5, 8, 2}; !slices.Equal(got, want) {
		t.Errorf("between two dates are %v, want %v", got, want)
	}
}

func TestTwoCopiesWriteOneChain(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	id := v.newAgent("resumes:read")
	w.token(v.id, v.secret, "") // so that it knows the secret
	before := len(v.chain())
	const n = 50
	got := tally(n, func(i int) answer {
		x := []*service{v, w}[i%2]
		switch i / 2 % 5 {
		case 0:
			return x.form(v.id, v.secret, "", "grant_type=client_credentials")
		case 1:
			return x.form(v.id, v.secret, "/introspect", "token="+v.bearer)
		case 2:
			return x.api(v.bearer, "POST", "/agents", agentWith(nil))
		case 3:
			return x.api(v.bearer, "PATCH", "/agents/"+id, `{"owner":"team"}`)
		}
		return x.api(v.bearer, "POST", "/agents", agentJSON("first@example.com", "a:b")) // refused
	})
	if got["200"] != n*3/5 || got["201"] != n/5 || got["409 AGENT_ALREADY_EXISTS"] != n/5 {
		t.Errorf("%d requests to two copies at the same time = %v", n, got)
	}
	events := v.checkChain()
	if len(events) != before+n {
		t.Errorf("there are %d events, want %d", len(events), before+n)
	}
	kinds := map[string]int{}
	for _, e := range events[before:] {
		kinds[e.Action+" "+e.Outcome]++
	}
	want := map[string]int{"token.issued success": n / 5, "token.introspected success": n / 5, "agent.created success": n / 5,
		"agent.updated success": n / 5, "agent.created failure": n / 5}
	if !maps.Equal(kinds, want) {
		t.Errorf("the events are %v, want %v", kinds, want)
	}
	for _, x := range []*service{v, w} {
		if out, err := x.verifyAudit(); err != nil || !strings.Contains(out, fmt.Sprintf("verified: %d events, from seq 1 to %d\n", len(events), len(events))) {
			t.Errorf("verify-audit = %q, %v, want all events", out, err)
		}
	}
}

func TestNothingHappensUnrecorded(t *testing.T) {
	t.Parallel()
	v := newService(t, "MONTHLY_TOKEN_LIMIT", "1000")
	id, secret := v.newClient("resumes:read")
	credentialID, secret2 := v.newCredential(id)
	v.token(id, secret2, "")
	token := v.token(id, secret, "")
	suspended := v.newAgent("resumes:read")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+suspended, `{"status":"suspended"}`), 200, "")
	// Everything but what authentication failures count for their address.
	state := func() string {
		var s string
		err := v.db.QueryRow(t.Context(), `select concat(
			(select array_agg(a order by agent_id) from agents a), (select array_agg(c order by credential_id) from credentials c),
			(select count(*) from token_revocations), (select max(seq) from audit_events))`).Scan(&s)
		if err != nil {
			t.Fatal(err)
		}
		for _, client := range []string{id, v.id} {
			used, err := v.rdb.Get(t.Context(), "monthly:"+client+":"+time.Now().UTC().Format("2006:01")).Result()
			if err != nil {
				t.Fatal(err)
			}
			s += " " + used
		}
		return s
	}
	before := state()
	v.exec(`create function refuse_insert() returns trigger language plpgsql as $$ begin raise exception 'no room left'; end $$`)
	v.exec(`create trigger refuse_insert before insert on audit_events for each row execute function refuse_insert()`)
	credentials := "/agents/" + id + "/credentials"
	grant := "grant_type=client_credentials"
	for _, row := range []struct {
		name string
		send func() answer
		code string
	}{
		{"register", func() answer { return v.api(v.bearer, "POST", "/agents", agentWith(nil)) }, "SERVICE_UNAVAILABLE"},
		{"change", func() answer { return v.api(v.bearer, "PATCH", "/agents/"+id, `{"owner":"new"}`) }, "SERVICE_UNAVAILABLE"},
		{"suspend", func() answer { return v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`) }, "SERVICE_UNAVAILABLE"},
		{"reactivate", func() answer { return v.api(v.bearer, "PATCH", "/agents/"+suspended, `{"status":"active"}`) }, "SERVICE_UNAVAILABLE"},
		{"decommission", func() answer { return v.api(v.bearer, "DELETE", "/agents/"+id, "") }, "SERVICE_UNAVAILABLE"},
		{"create a credential", func() answer { return v.api(v.bearer, "POST", credentials, "{}") }, "SERVICE_UNAVAILABLE"},
		{"rotate", func() answer { return v.api(v.bearer, "POST", credentials+"/"+credentialID+"/rotate", "{}") }, "SERVICE_UNAVAILABLE"},
		{"revoke a credential", func() answer { return v.api(v.bearer, "DELETE", credentials+"/"+credentialID, "") }, "SERVICE_UNAVAILABLE"},
		{"issue", func() answer { return v.form(id, secret, "", grant) }, "temporarily_unavailable"},
		{"introspect", func() answer { return v.form(v.id, v.secret, "/introspect", "token="+token) }, "temporarily_unavailable"},
		{"introspect garbage", func() answer { return v.form(v.id, v.secret, "/introspect", "token=x") }, "temporarily_unavailable"},
		{"revoke a token", func() answer { return v.form(id, secret, "/revoke", "token="+token) }, "temporarily_unavailable"},
		{"begin to read what was cut off", func() answer { return v.api(v.bearer, "GET", "/revocations", "") }, "SERVICE_UNAVAILABLE"},
		{"be refused a scope", func() answer { return v.api(token, "DELETE", "/agents/"+id, "") }, "SERVICE_UNAVAILABLE"},
		{"be refused an email", func() answer { return v.api(v.bearer, "POST", "/agents", agentJSON("first@example.com", "a:b")) }, "SERVICE_UNAVAILABLE"},
		{"fail to authenticate", func() answer { return v.form(id, newSecret(), "", grant) }, "temporarily_unavailable"},
	} {
		t.Run(row.name, func(t *testing.T) {
			a := row.send()
			if a.status != 503 || a.code() != row.code || a.header.Get("Retry-After") == "" {
				t.Errorf("answered %v, want 503 %s with Retry-After", a, row.code)
			}
			for _, name := range []string{"access_token", "clientSecret", "active", "agentId"} {
				if a.body[name] != nil {
					t.Errorf("answered %v, want no %s", a, name)
				}
			}
			if after := state(); after != before {
				t.Errorf("after it there is\n%s, want as before\n%s", after, before)
			}
		})
	}
	v.want(v.api(v.bearer, "GET", "/agents/"+id, ""), 200, "") // reading goes on
	v.exec(`drop trigger refuse_insert on audit_events`)
	if !v.active(token) {
		t.Error("a token that was not revoked is not active")
	}
	v.token(id, secret2, "")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"owner":"new"}`), 200, "")
	v.checkChain()
}

// relations are the table and its partitions.
func (v *service) relations() []string {
	v.t.Helper()
	rows, _ := v.db.Query(v.t.Context(), `
		select 'audit_events' union all
		select inhrelid::regclass::text from pg_inherits where inhparent = 'audit_events'::regclass`)
	list, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		v.t.Fatal(err)
	}
	return list
}

func TestLogIsAppendOnly(t *testing.T) {
	t.Parallel()
	v := newService(t)
	month := time.Now().UTC()
	month = time.Date(month.Year(), month.Month(), 1, 0, 0, 0, 0, time.UTC)
	want := []string{"audit_events", "audit_events_default"}
	for i := range 13 {
		want = append(want, month.AddDate(0, i, 0).Format("audit_events_2006_01"))
	}
	relations := v.relations()
	if slices.Sort(relations); !slices.Equal(relations, slices.Sorted(slices.Values(want))) {
		t.Errorf("the log has the tables %v, want %v", relations, want)
	}
	refused := func(sql string, replica bool) {
		t.Helper()
		err := pgx.BeginFunc(t.Context(), v.db, func(tx pgx.Tx) error {
			if replica { // as logical replication and some restoring tools run
				if _, err := tx.Exec(t.Context(), `set local session_replication_role = replica`); err != nil {
					t.Error(err)
				}
			}
			_, err := tx.Exec(t.Context(), sql)
			return err
		})
		if pgErr, ok := errors.AsType[*pgconn.PgError](err); !ok || pgErr.Code != "42501" || !strings.Contains(pgErr.Message, "append-only") {
			t.Errorf("%s (replica %v) = %v, want it refused", sql, replica, err)
		}
	}
	for _, replica := range []bool{false, true} {
		for _, name := range relations {
			refused(`update `+name+` set user_agent = 'x'`, replica)
			refused(`update `+name+` set hash = hash where false`, replica)
			refused(`delete from `+name, replica)
			refused(`truncate `+name, replica)
		}
		refused(`truncate agents, audit_events cascade`, replica)
		refused(`insert into audit_events select * from audit_events on conflict (seq, "timestamp") do update set user_agent = 'x'`, replica)
		refused(`merge into audit_events as old using agents on true when matched then delete`, replica)
	}

	// The schema is applied at every start, and mends a trigger that is gone
	// or switched off.
	events := v.count(`select count(*) from audit_events`)
	name := want[4]
	v.exec(`drop trigger append_only on ` + want[2])
	v.exec(`alter table ` + name + ` disable trigger append_only`)
	v.exec(`alter table ` + want[5] + ` enable trigger append_only`)
	v.another()
	v.another()
	if again := v.relations(); len(again) != len(relations) {
		t.Errorf("after another start the log has %v, want %v", again, relations)
	}
	for _, name := range relations {
		refused(`delete from `+name, true)
	}
	if n := v.count(`select count(*) from audit_events`); n != events {
		t.Errorf("there are %d events, want %d", n, events)
	}
}

// Months are those of UTC, wherever the database thinks that it is.
func TestPartitionsAreMonthsOfUTC(t *testing.T) {
	t.Parallel()
	month := time.Now().UTC()
	month = time.Date(month.Year(), month.Month(), 1, 0, 0, 0, 0, time.UTC)
	for _, zone := range []string{"America/New_York", "Pacific/Kiritimati"} {
		var chain []servedEvent
		for i := range 14 {
			chain = append(chain, forgeEvent(chain, month.AddDate(0, i, 0).Add(-time.Millisecond), "token.issued"))
			chain = append(chain, forgeEvent(chain, month.AddDate(0, i, 0), "token.issued"))
		}
		conn, err := pgx.Connect(t.Context(), newDatabase(t))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		for _, sql := range []string{`set timezone to '` + zone + `'`, schema(t), schema(t)} {
			if _, err := conn.Exec(t.Context(), sql); err != nil {
				t.Fatal(err)
			}
		}
		insertEvents(t, conn, chain)
		rows, _ := conn.Query(t.Context(), `select tableoid::regclass::text from audit_events order by seq`)
		got, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		for i, name := range got {
			at, _ := time.Parse(millis, chain[i].Timestamp)
			want := at.Format("audit_events_2006_01")
			if i == 0 || i == len(got)-1 {
				want = "audit_events_default"
			}
			if name != want {
				t.Errorf("%s: %s is in %s, want %s", zone, chain[i].Timestamp, name, want)
			}
		}
	}
}

func TestServiceStartsWhereTheDefaultPartitionHasEventsOfAMonthToCome(t *testing.T) {
	t.Parallel()
	soon := time.Now().UTC().AddDate(0, 3, 0)
	name := soon.Format("audit_events_2006_01")
	var history []servedEvent
	for i := range 3 { // as after a clock that was wrong
		history = append(history, forgeEvent(history, soon.Add(time.Duration(i)*time.Second), "token.issued"))
	}
	v := newService(t, "DATABASE_URL", newHistory(t, `drop table `+name, history))
	if n := v.count(`select count(*) from audit_events_default`); n != 3 {
		t.Fatalf("the default partition has %d events, want 3", n)
	}
	v.newAgent("resumes:read")
	if slices.Contains(v.relations(), name) {
		t.Errorf("%s is there, which can't be", name)
	}
	if n := len(v.relations()); n != 14 {
		t.Errorf("the log has %d tables, want the others", n)
	}
	v.checkChain()
	if out, err := v.verifyAudit(); err != nil {
		t.Errorf("verify-audit = %q, %v, want it verified", out, err)
	}
}

func TestDroppedPartitionsVerifyUntilYoungerOnesAreMissing(t *testing.T) {
	t.Parallel()
	var history []servedEvent
	var partitions strings.Builder
	now := time.Now().UTC()
	day := func(n int) time.Time { return now.AddDate(0, 0, -n) }
	ranges := [][2]int{{300, 200}, {200, 96}, {96, 40}}
	for i, days := range ranges {
		fmt.Fprintf(&partitions, "create table audit_events_old%d partition of audit_events for values from ('%s') to ('%s');\n",
			i, day(days[0]).Format(millis), day(days[1]).Format(millis))
		for _, n := range []int{days[0] - 2, days[0] - 4, days[1] + 1} {
			history = append(history, forgeEvent(history, day(n), "token.issued"))
		}
	}
	v := newServiceProgram(t, "DATABASE_URL", newHistory(t, partitions.String(), history))
	v.newAgent("resumes:read")
	cp := v.checkpoint()
	verified := func(from int) {
		t.Helper()
		a := v.want(v.api(v.bearer, "GET", "/audit/verify?fromSeq=1", ""), 200, "")
		if a.body["verified"] != true || a.body["fromSeq"] != float64(from) {
			t.Errorf("GET /audit/verify = %v, want it verified from %d", a, from)
		}
		for _, args := range [][]string{nil, {cp}} {
			if out, err := v.verifyAudit(args...); err != nil || !strings.Contains(out, fmt.Sprintf("from seq %d to", from)) {
				t.Errorf("verify-audit %q = %q, %v, want it verified from %d", args, out, err, from)
			}
		}
		// An export begins where it was asked to, or not at all.
		follow := v.follow(t)
		for _, args := range [][]string{nil, {fmt.Sprint(from)}} {
			if lines, err := v.export(args...); err != nil || !strings.Contains(lines[0], fmt.Sprintf(`"seq":%d,`, from)) {
				t.Errorf("audit-export %q = %.100q, %v, want it from %d", args, lines, err, from)
			}
		}
		follow.wantUpTo(v.service, from)
		for before := 1; before < from; before++ {
			want := fmt.Sprintf("the log begins at seq %d: what was before is dropped", from)
			if lines, err := v.export(fmt.Sprint(before)); lines[0] != "" || err == nil || !strings.HasSuffix(err.Error(), want) {
				t.Errorf("audit-export %d = %.100q, %v, want %s", before, lines, err, want)
			}
			v.follow(t, fmt.Sprint(before)).wantEnd(want)
		}
	}
	bad := func(seq int, why string) {
		t.Helper()
		a := v.want(v.api(v.bearer, "GET", "/audit/verify?fromSeq=1", ""), 200, "")
		if a.body["verified"] != false || a.body["firstBadSeq"] != float64(seq) || a.body["checkpoint"] != nil {
			t.Errorf("%s: GET /audit/verify = %v, want %d bad", why, a, seq)
		}
		if out, err := v.verifyAudit(); err == nil || !strings.HasSuffix(err.Error(), fmt.Sprintf("the first bad seq is %d", seq)) {
			t.Errorf("%s: verify-audit = %q, %v, want %d bad", why, out, err, seq)
		}
	}
	verified(1)
	// The partitions that the service did not make refuse too.
	if _, err := v.db.Exec(t.Context(), `delete from audit_events_old0`); err == nil {
		t.Error("an event could be deleted by naming its partition")
	}
	v.exec(`alter table audit_events detach partition audit_events_old1`)
	bad(4, "a partition in the middle is missing")
	v.exec(fmt.Sprintf(`alter table audit_events attach partition audit_events_old1 for values from ('%s') to ('%s')`,
		day(200).Format(millis), day(96).Format(millis)))
	verified(1)
	v.exec(`drop table audit_events_old0`)
	verified(4)
	v.exec(`drop table audit_events_old1`)
	verified(7)
	// The list says nothing of what isn't served any more.
	if page := v.audit("limit=100"); page.Data[len(page.Data)-1].Seq != 9 {
		t.Errorf("the list ends at seq %d, want 9, the first within 90 days", page.Data[len(page.Data)-1].Seq)
	}
	v.want(v.api(v.bearer, "GET", "/audit/"+history[7].EventID, ""), 404, "AUDIT_EVENT_NOT_FOUND")
	v.want(v.api(v.bearer, "GET", "/audit/"+history[8].EventID, ""), 200, "")
	v.exec(`drop table audit_events_old2`)
	bad(9, "a partition within 90 days is missing")
}

func TestTamperingIsNamed(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for len(v.audit("limit=1").Data) == 0 || v.audit("limit=1").Data[0].Seq < 10 {
		v.active(v.bearer)
	}
	chain := v.checkChain()
	if len(chain) != 10 || chain[3].AgentID == nil {
		t.Fatalf("the chain has %d events", len(chain))
	}
	cp := v.checkpoint()
	// replace is what the owner of the database can do.
	replace := func(events []servedEvent) {
		t.Helper()
		err := pgx.BeginFunc(t.Context(), v.db, func(tx pgx.Tx) error {
			var sql strings.Builder
			for _, name := range v.relations() {
				sql.WriteString(`drop trigger if exists append_only on ` + name + `;`)
			}
			if _, err := tx.Exec(t.Context(), sql.String()+`truncate audit_events; alter table audit_events drop constraint if exists audit_events_seq_check`); err != nil {
				return err
			}
			insertEvents(t, tx.Conn(), events)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	rehash := func(events []servedEvent, from int) []servedEvent {
		for i := from; i < len(events); i++ {
			events[i].Seq = int64(i + 1)
			if i > 0 {
				events[i].PrevHash = events[i-1].Hash
			}
			events[i].Hash = events[i].documentedHash()
		}
		return events
	}
	edit := func(change func(*servedEvent)) func([]servedEvent) []servedEvent {
		return func(events []servedEvent) []servedEvent {
			change(&events[3])
			return events
		}
	}
	later := func(e servedEvent, by time.Duration) string {
		at, _ := time.Parse(millis, e.Timestamp)
		return at.Add(by).Format(millis)
	}
	other := newID()
	for _, row := range []struct {
		name   string
		tamper func([]servedEvent) []servedEvent
		bad    int64 // 0: none
		seen   bool  // without a checkpoint, too
	}{
		{"nothing", func(e []servedEvent) []servedEvent { return e }, 0, true},
		{"edit event_id", edit(func(e *servedEvent) { e.EventID = other }), 4, true},
		{"edit agent_id", edit(func(e *servedEvent) { e.AgentID = &other }), 4, true},
		{"edit agent_id to null", edit(func(e *servedEvent) { e.AgentID = nil }), 4, true},
		{"edit actor_id", edit(func(e *servedEvent) { e.ActorID = &other }), 4, true},
		{"edit action", edit(func(e *servedEvent) { e.Action = "token.issued" }), 4, true},
		{"edit outcome", edit(func(e *servedEvent) { e.Outcome = "failure" }), 4, true},
		{"edit ip_address", edit(func(e *servedEvent) { e.IPAddress = "10.0.0.1" }), 4, true},
		{"edit user_agent", edit(func(e *servedEvent) { e.UserAgent = "x" }), 4, true},
		{"move a letter between columns", edit(func(e *servedEvent) {
			e.IPAddress, e.UserAgent = e.IPAddress+e.UserAgent[:1], e.UserAgent[1:]
		}), 4, true},
		{"edit metadata", edit(func(e *servedEvent) { e.Metadata = json.RawMessage(`{}`) }), 4, true},
		{"edit metadata by a space", edit(func(e *servedEvent) { e.Metadata = append(slices.Clone(e.Metadata), ' ') }), 4, true},
		{"edit timestamp", edit(func(e *servedEvent) { e.Timestamp = later(*e, time.Millisecond) }), 4, true},
		{"edit timestamp by a microsecond", func(e []servedEvent) []servedEvent { return e }, 4, true},
		{"edit timestamp into another month", edit(func(e *servedEvent) { e.Timestamp = later(*e, 40*24*time.Hour) }), 4, true},
		{"edit prev_hash", edit(func(e *servedEvent) { e.PrevHash = e.Hash }), 4, true},
		{"edit hash", edit(func(e *servedEvent) { e.Hash = e.PrevHash }), 4, true},
		{"edit seq", edit(func(e *servedEvent) { e.Seq = 11 }), 4, true},
		{"edit and hash anew", edit(func(e *servedEvent) { e.UserAgent = "x"; e.Hash = e.documentedHash() }), 5, true},
		{"edit and hash all that follows anew", func(e []servedEvent) []servedEvent { e[3].UserAgent = "x"; return rehash(e, 3) }, 10, false},
		{"edit the first", func(e []servedEvent) []servedEvent { e[0].UserAgent = "x"; return e }, 1, true},
		{"edit the last", func(e []servedEvent) []servedEvent { e[9].UserAgent = "x"; return e }, 10, true},
		{"edit the last and hash it anew", func(e []servedEvent) []servedEvent { e[9].UserAgent = "x"; return rehash(e, 9) }, 10, false},
		{"delete", func(e []servedEvent) []servedEvent { return slices.Delete(e, 3, 4) }, 4, true},
		{"delete three", func(e []servedEvent) []servedEvent { return slices.Delete(e, 3, 6) }, 4, true},
		{"delete and number anew", func(e []servedEvent) []servedEvent {
			e = slices.Delete(e, 3, 4)
			for i := range e {
				e[i].Seq = int64(i + 1)
			}
			return e
		}, 4, true},
		{"delete and hash all anew", func(e []servedEvent) []servedEvent { return rehash(slices.Delete(e, 3, 4), 3) }, 10, false},
		{"delete the first", func(e []servedEvent) []servedEvent { return e[1:] }, 1, true},
		{"delete the last", func(e []servedEvent) []servedEvent { return e[:9] }, 10, false},
		{"delete all", func([]servedEvent) []servedEvent { return nil }, 1, false},
		{"insert", func(e []servedEvent) []servedEvent {
			forged := forgeEvent(e[:3], time.Now(), "token.issued")
			e = slices.Insert(e, 3, forged)
			for i := range e {
				e[i].Seq = int64(i + 1)
			}
			return e
		}, 5, true},
		{"insert one before the first, to which that is linked", func(e []servedEvent) []servedEvent {
			forged := forgeEvent(nil, time.Now(), "token.issued")
			forged.Seq, forged.Hash = 0, e[0].PrevHash
			return slices.Insert(e, 0, forged)
		}, 1, true},
		{"insert far before the first", func(e []servedEvent) []servedEvent {
			forged := forgeEvent(nil, time.Now(), "token.issued")
			forged.Seq = -5
			return slices.Insert(e, 0, forged)
		}, 1, true},
		{"insert with a hash of nothing", func(e []servedEvent) []servedEvent {
			forged := forgeEvent(e, time.Now(), "token.issued")
			forged.Hash = firstPrevHash
			return append(e, forged)
		}, 11, true},
		{"insert far behind", func(e []servedEvent) []servedEvent {
			forged := forgeEvent(e, time.Now(), "token.issued")
			forged.Seq = 1000
			return append(e, forged)
		}, 11, true},
		{"swap two", func(e []servedEvent) []servedEvent {
			e[3], e[4] = e[4], e[3]
			e[3].Seq, e[4].Seq = 4, 5
			return e
		}, 4, true},
		{"fork, the false one later", func(e []servedEvent) []servedEvent {
			return append(e, forgeEvent(e[:3], time.Now().Add(time.Hour), "token.issued"))
		}, 4, true},
		{"fork, the false one earlier", func(e []servedEvent) []servedEvent {
			return append(e, forgeEvent(e[:3], time.Now().Add(-time.Hour), "token.issued"))
		}, 4, true},
		{"fork at the head", func(e []servedEvent) []servedEvent {
			return append(e, forgeEvent(e[:9], time.Now().Add(time.Hour), "token.issued"))
		}, 10, true},
		{"roll back", func(e []servedEvent) []servedEvent { return e[:6] }, 7, false},
		{"roll back and go on", func(e []servedEvent) []servedEvent {
			for e = e[:6]; len(e) < 12; {
				e = append(e, forgeEvent(e, time.Now(), "token.issued"))
			}
			return e
		}, 10, false},
		{"begin a new chain", func([]servedEvent) []servedEvent {
			var e []servedEvent
			for len(e) < 12 {
				e = append(e, forgeEvent(e, time.Now(), "token.issued"))
			}
			return e
		}, 10, false},
		{"go on", func(e []servedEvent) []servedEvent { return append(e, forgeEvent(e, time.Now(), "token.issued")) }, 0, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			replace(row.tamper(slices.Clone(chain)))
			if row.name == "edit timestamp by a microsecond" { // which is beyond what HTTP shows
				v.exec(`update audit_events set "timestamp" = "timestamp" + interval '1 microsecond' where seq = 4`)
			}
			out, err := v.verifyAudit(cp)
			want := fmt.Sprintf("the first bad seq is %d", row.bad)
			switch {
			case row.bad == 0 && (err != nil || !strings.Contains(out, "extends the checkpoint at seq 10\n")):
				t.Errorf("verify-audit = %q, %v, want it verified", out, err)
			case row.bad != 0 && (err == nil || !strings.HasSuffix(err.Error(), want) || strings.Contains(out, "verified")):
				t.Errorf("verify-audit = %q, %v, want %s", out, err, want)
			}
			a := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, "")
			switch {
			case row.bad == 0 && (a.body["verified"] != true || a.body["firstBadSeq"] != nil):
				t.Errorf("GET /audit/verify = %v, want it verified", a)
			case row.bad != 0 && row.seen && (a.body["verified"] != false || a.body["firstBadSeq"] != float64(row.bad) || a.body["checkpoint"] != nil):
				t.Errorf("GET /audit/verify = %v, want %d bad and no checkpoint", a, row.bad)
			}
			if from, _ := a.body["fromSeq"].(float64); from < 1 {
				t.Errorf("GET /audit/verify = %v, want it from 1 or later", a)
			}
		})
	}
	replace(chain)
	if out, err := v.verifyAudit(cp); err != nil {
		t.Errorf("verify-audit of what was there = %q, %v, want it verified", out, err)
	}
}

func TestCheckpointIsTakenOnlyFromItsIssuer(t *testing.T) {
	t.Parallel()
	v := newService(t)
	early := v.checkpoint()
	v.newAgent("resumes:read")
	report := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, "")
	now := report.text("checkpoint")
	out, err := v.verifyAudit()
	if err != nil {
		t.Fatal(err)
	}
	_, printed, _ := strings.Cut(strings.TrimSpace(out), "\ncheckpoint: ")
	w := *v // the operator's command after the signing key was changed
	w.env = maps.Clone(v.env)
	own, other := v.env["JWT_PRIVATE_KEY"], secondKey()
	w.env["JWT_PRIVATE_KEY"] = other
	good := checkpoint{Issuer: v.env["ISSUER"], Seq: int64(report.body["headSeq"].(float64)), Hash: report.text("headHash"), Time: time.Now().Unix()}
	signed := func(key, typ string, change func(*checkpoint)) string {
		cp := good
		change(&cp)
		return sign(t, key, typ, cp)
	}
	same := func(*checkpoint) {}
	parts := strings.Split(now, ".")
	for _, row := range []struct {
		name, checkpoint, want string // of the error; "" for none
	}{
		{"of now", now, ""},
		{"of before", early, ""},
		{"as the command prints it", printed, ""},
		{"made as documented", signed(own, auditCheckpoint, same), ""},
		{"another key", signed(other, auditCheckpoint, same), "no checkpoint"},
		{"another key, our header", parts[0] + "." + parts[1] + "." + strings.Split(signed(other, auditCheckpoint, same), ".")[2], "no checkpoint"},
		{"another issuer", signed(own, auditCheckpoint, func(cp *checkpoint) { cp.Issuer += "/" }), "no checkpoint"},
		{"a token", v.bearer, "no checkpoint"},
		{"signed as a token", signed(own, accessToken, same), "no checkpoint"},
		{"garbage", "garbage", "no checkpoint"},
		{"cut short", now[:len(now)-1], "no checkpoint"},
		{"with something behind", now + "\n", "no checkpoint"},
		{"with the signature of another", parts[0] + "." + parts[1] + "." + strings.Split(early, ".")[2], "no checkpoint"},
		{"of another hash", signed(own, auditCheckpoint, func(cp *checkpoint) { cp.Hash = firstPrevHash }), fmt.Sprintf("the first bad seq is %d", good.Seq)},
		{"of a later seq", signed(own, auditCheckpoint, func(cp *checkpoint) { cp.Seq++ }), fmt.Sprintf("the first bad seq is %d", good.Seq+1)},
	} {
		t.Run(row.name, func(t *testing.T) {
			out, err := v.verifyAudit(row.checkpoint)
			if row.want == "" && (err != nil || !strings.Contains(out, "extends the checkpoint at seq ")) {
				t.Errorf("verify-audit %q = %q, %v, want it verified", row.checkpoint, out, err)
			}
			if row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want) || out != "") {
				t.Errorf("verify-audit %q = %q, %v, want %q", row.checkpoint, out, err, row.want)
			}
		})
	}
	// Old checkpoints are as good as old tokens: while the key is published.
	if out, err := w.verifyAudit(now); err == nil || !strings.Contains(err.Error(), "no checkpoint") {
		t.Errorf("verify-audit without the key = %q, %v, want it refused", out, err)
	}
	w.env["JWT_PUBLIC_KEY"] = publicPEM(t, own)
	if out, err := w.verifyAudit(now); err != nil {
		t.Errorf("verify-audit with the old key published = %q, %v, want it verified", out, err)
	}
}

func TestConcurrentEventsShareTransactions(t *testing.T) {
	t.Parallel()
	v := newService(t)
	const n = 100
	tx := v.lockChain()
	var sent atomic.Int64
	answered := make(chan map[string]int)
	before := v.count(`select max(seq) from audit_events`)
	go func() {
		answered <- tally(n, func(i int) answer {
			sent.Add(1)
			return v.do("POST", "/api/v1/token/introspect", "token="+v.bearer, "Authorization", "Bearer "+v.bearer,
				"Content-Type", "application/x-www-form-urlencoded", "X-Request-Id", fmt.Sprint("grouped-", i))
		})
	}()
	v.eventually("all are sent and one waits for the chain", func() bool { return sent.Load() == n && v.waiting() > 0 })
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := <-answered; got["200"] != n {
		t.Fatalf("%d introspections = %v, want all answered", n, got)
	}
	if got := v.count(`select count(distinct metadata->>'requestId') from audit_events where seq > $1 and action = 'token.introspected'`, before); got != n {
		t.Errorf("%d introspections have %d events", n, got)
	}
	if got := v.count(`select count(distinct xmin::text) from audit_events where seq > $1`, before); got > n/2 {
		t.Errorf("%d events at the same time took %d transactions, want them shared", n, got)
	}
	v.checkChain()
}

// lockChain takes the lock of the chain as another copy that is stuck would.
func (v *service) lockChain() pgx.Tx {
	v.t.Helper()
	return v.begun(fmt.Sprintf(`select pg_advisory_xact_lock(%d)`, int64(chainLock)))
}

// waiting counts who waits for an advisory lock of this database, but for the
// keepers' probes.
func (v *service) waiting() int {
	v.t.Helper()
	return v.count(`select count(*) from pg_locks join pg_stat_activity using (pid) where locktype = 'advisory' and not granted
		and datname = current_database() and query not like '%pg_logical_emit_message%'`)
}

func TestLockedLogRefusesInTimeAndHeals(t *testing.T) {
	t.Parallel()
	v := newService(t, "MONTHLY_TOKEN_LIMIT", "1000")
	id, secret := v.newClient("resumes:read")
	token := v.token(id, secret, "")
	quota := "monthly:" + id + ":" + time.Now().UTC().Format("2006:01")
	used, _ := v.rdb.Get(t.Context(), quota).Int()
	before, agents := v.count(`select max(seq) from audit_events`), v.count(`select count(*) from agents`)
	tx := v.lockChain()
	first := make(chan answer, 1)
	go func() { first <- v.form(v.id, v.secret, "/introspect", "token=x") }()
	v.eventually("one event waits for the chain, and others for it", func() bool { return v.waiting() > 0 })
	begun := time.Now()
	requests := []func() answer{
		func() answer { return v.form(id, secret, "", "grant_type=client_credentials") },
		func() answer { return v.form(v.id, v.secret, "/introspect", "token="+token) },
		func() answer { return v.form(id, secret, "/revoke", "token="+token) },
		func() answer { return v.api(v.bearer, "POST", "/agents", agentWith(nil)) },
		func() answer { return v.api(token, "DELETE", "/agents/"+id, "") },
	}
	got := tally(len(requests), func(i int) answer {
		a := requests[i]()
		if a.text("access_token") != "" || a.body["active"] != nil {
			t.Errorf("answered %v though it could not be recorded", a)
		}
		if a.status == 503 && a.header.Get("Retry-After") == "" {
			t.Errorf("answered %v without Retry-After", a)
		}
		return a
	})
	if want := map[string]int{"503 temporarily_unavailable": 3, "503 SERVICE_UNAVAILABLE": 2}; !maps.Equal(got, want) {
		t.Errorf("while the chain is locked: %v, want %v", got, want)
	}
	if took := time.Since(begun); took > requestTimeout+3*time.Second {
		t.Errorf("they took %v, want at most %v", took, requestTimeout)
	}
	v.eventually("health says so", func() bool { return v.do("GET", "/health", "").status == 503 })
	v.want(v.api(v.bearer, "GET", "/agents/"+id, ""), 200, "")

	if a := <-first; a.status != 503 {
		t.Errorf("the first answer = %v, want 503", a)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.eventually("it heals", func() bool { return v.form(id, secret, "", "grant_type=client_credentials").status == 200 })
	if n := v.count(`select count(*) from agents`); n != agents {
		t.Errorf("there are %d agents, want %d: what was not acknowledged was done", n, agents)
	}
	if !v.active(token) {
		t.Error("a token whose revocation was not acknowledged is not active")
	}
	if now, _ := v.rdb.Get(t.Context(), quota).Int(); now != used+1 {
		t.Errorf("the quota counts %d tokens after one more than %d", now, used)
	}
	for _, e := range v.checkChain()[before:] {
		if e.Action == "agent.created" || e.Action == "token.revoked" {
			t.Errorf("%s is recorded though it was not done", e.Action)
		}
	}
}

// A report takes long and holds a connection, so a copy makes one at a time.
func TestReportsAreMadeOneAtATime(t *testing.T) {
	t.Parallel()
	v := newService(t)
	tx, err := v.db.Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), `lock table audit_events in access exclusive mode`) // so that the first takes long
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	first := make(chan answer, 1)
	go func() { first <- v.api(v.bearer, "GET", "/audit/verify", "") }()
	v.eventually("the first is being made", func() bool {
		return v.count(`select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query like '%min(seq)%'`) == 1
	})
	a := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 503, "SERVICE_UNAVAILABLE")
	if a.header.Get("Retry-After") == "" {
		t.Errorf("answered %v without Retry-After", a)
	}
	v.want(v.api(v.bearer, "GET", "/audit/verify?fromSeq=0", ""), 400, "VALIDATION_ERROR") // no report
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.want(<-first, 200, "")
	for range 2 { // and each gives its place back
		v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, "")
	}
}

// What an agent did is more than what concerns it.
func TestEventsAreFoundByWhoDidIt(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.newClient(ourScopes...)
	token := v.token(id, secret, "")
	other := v.want(v.api(token, "POST", "/agents", agentJSON("found-by-actor@example.com", "a:b")), 201, "").text("agentId")
	v.want(v.api(token, "PATCH", "/agents/"+other, `{"owner":"x"}`), 200, "")
	v.want(v.form(id, secret, "/introspect", "token="+token), 200, "")
	v.want(v.form(id, secret, "/introspect", "token=x"), 200, "")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+other, `{"owner":"y"}`), 200, "")
	for query, want := range map[string]string{
		"actorId=" + id:                           "token.introspected token.introspected agent.updated agent.created token.issued",
		"actorId=" + id + "&agentId=" + other:     "agent.updated agent.created",
		"actorId=" + id + "&agentId=" + id:        "token.introspected token.issued",
		"actorId=" + id + "&limit=2":              "token.introspected token.introspected",
		"actorId=" + id + "&limit=2&page=2":       "agent.updated agent.created",
		"actorId=" + id + "&action=agent.updated": "agent.updated",
		"actorId=" + other:                        "",
	} {
		var got []string
		for _, e := range v.want(v.api(v.bearer, "GET", "/audit?"+query, ""), 200, "").body["data"].([]any) {
			got = append(got, e.(map[string]any)["action"].(string))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("GET /audit?%s has %q, want %q", query, got, want)
		}
	}
	v.want(v.api(v.bearer, "GET", "/audit?actorId=x", ""), 400, "VALIDATION_ERROR")
}
