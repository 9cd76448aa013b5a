package test

import (
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// basicAuth is the header of HTTP Basic, with the halves sent as they are.
func basicAuth(id, secret string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(id+":"+secret))
}

// quickCredential stores a credential that is like one made over HTTP, but
// hashed at the least cost: the real one takes a tenth of a second.
func (v *service) quickCredential(agentID string) (credentialID, secret string) {
	v.t.Helper()
	plain := newSecret()
	hash, err := bcrypt.GenerateFromPassword([]byte(plain), bcrypt.MinCost)
	if err != nil {
		v.t.Fatal(err)
	}
	credentialID = newID()
	_, err = v.db.Exec(context.Background(), `
		insert into credentials (credential_id, client_id, secret_prefix, secret_hash, secret_id)
		values ($1, $2, $3, $4, $5)`, credentialID, agentID, plain[8:24], string(hash), newID())
	if err != nil {
		v.t.Fatal(err)
	}
	return credentialID, plain
}

// quickClient registers an agent with such a credential.
func (v *service) quickClient(capabilities ...string) (id, secret string) {
	v.t.Helper()
	id = v.newAgent(capabilities...)
	_, secret = v.quickCredential(id)
	return id, secret
}

// setExpiry sets when a credential ends.
func (v *service) setExpiry(credentialID string, at time.Time) {
	v.t.Helper()
	_, err := v.db.Exec(context.Background(), `update credentials set expires_at = $2 where credential_id = $1`, credentialID, at)
	if err != nil {
		v.t.Fatal(err)
	}
}

// Credentials from the cradle to the grave.
func TestCredentialLifecycle(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("resumes:read")
	path := "/agents/" + id + "/credentials"
	names := func(a answer) string { return fmt.Sprint(slices.Sorted(maps.Keys(a.body))) }
	const fields = "clientId createdAt credentialId expiresAt keyThumbprint kind revokedAt secretPrefix status workload"
	isMoment := func(text string) bool {
		at, err := time.Parse("2006-01-02T15:04:05.000Z", text)
		return err == nil && time.Since(at).Abs() < time.Hour
	}

	made := v.want(v.api(v.bearer, "POST", path, "{}"), 201, "")
	credentialID, first := made.text("credentialId"), made.text("clientSecret")
	if got := names(made); got != "[clientId clientSecret createdAt credentialId expiresAt keyThumbprint kind revokedAt secretPrefix status workload]" {
		t.Errorf("a new credential has %s", got)
	}
	if !isID(credentialID) || made.text("clientId") != id || made.text("status") != "active" || !isMoment(made.text("createdAt")) ||
		made.body["expiresAt"] != nil || made.body["revokedAt"] != nil || made.text("kind") != "secret" || made.body["keyThumbprint"] != nil {
		t.Errorf("a new credential is %v", made)
	}
	if !regexp.MustCompile(`^sk_live_[0-9a-f]{64}$`).MatchString(first) || made.text("secretPrefix") != first[8:24] {
		t.Errorf("the secret of a new credential is not of its form, or its prefix is not %q", made.text("secretPrefix"))
	}
	v.token(id, first, "")

	// The secret is shown where it is made, and nowhere else.
	end := time.Now().Add(time.Hour).In(time.FixedZone("", 3600)).Format("2006-01-02T15:04:05.000000Z07:00")
	inUTC, _ := time.Parse(time.RFC3339, end)
	turned := v.want(v.api(v.bearer, "POST", path+"/"+credentialID+"/rotate", `{"expiresAt":"`+end+`"}`), 200, "")
	second := turned.text("clientSecret")
	if names(turned) != names(made) || turned.text("credentialId") != credentialID || turned.text("createdAt") != made.text("createdAt") ||
		second == first || turned.text("secretPrefix") != second[8:24] || turned.text("expiresAt") != inUTC.UTC().Format("2006-01-02T15:04:05.000Z") {
		t.Errorf("a rotated credential is %v, it was %v", turned, made)
	}
	v.want(v.grant(id, first, ""), 401, "invalid_client")
	v.token(id, second, "")
	otherID, _ := v.quickCredential(id) // a later one: listed first
	v.want(v.api(v.bearer, "DELETE", path+"/"+credentialID, ""), 204, "")
	v.want(v.grant(id, second, ""), 401, "invalid_client")

	list := v.want(v.api(v.bearer, "GET", path, ""), 200, "")
	if names(list) != "[data limit page total]" || list.body["total"] != 2.0 || list.body["page"] != 1.0 || list.body["limit"] != 20.0 {
		t.Errorf("the list of credentials is %v", list)
	}
	var entries []map[string]any
	for _, entry := range list.body["data"].([]any) {
		entries = append(entries, entry.(map[string]any))
	}
	if len(entries) != 2 || entries[0]["credentialId"] != otherID || entries[1]["credentialId"] != credentialID {
		t.Fatalf("the list of credentials is %v, want the newest first", list)
	}
	for _, entry := range entries {
		if got := strings.Join(slices.Sorted(maps.Keys(entry)), " "); got != fields {
			t.Errorf("a listed credential has %q, want %q", got, fields)
		}
	}
	if entries[1]["status"] != "revoked" || !isMoment(fmt.Sprint(entries[1]["revokedAt"])) || entries[1]["secretPrefix"] != second[8:24] || entries[0]["status"] != "active" {
		t.Errorf("a revoked credential is listed as %v", entries[1])
	}
	page := v.want(v.api(v.bearer, "GET", path+"?page=2&limit=1", ""), 200, "")
	if data := page.body["data"].([]any); len(data) != 1 || data[0].(map[string]any)["credentialId"] != credentialID || page.body["total"] != 2.0 {
		t.Errorf("the second page of one is %v", page)
	}

	var hash string
	if err := v.db.QueryRow(t.Context(), `select secret_hash from credentials where credential_id = $1`, credentialID).Scan(&hash); err != nil {
		t.Fatal(err)
	}
	events := v.want(v.api(v.bearer, "GET", "/audit?limit=100&agentId="+id, ""), 200, "")
	for action, count := range map[string]int{"credential.generated": 1, "credential.rotated": 1, "credential.revoked": 1} {
		if got := strings.Count(events.raw, `"action":"`+action+`"`); got != count {
			t.Errorf("%d events of %s, want %d", got, action, count)
		}
	}
	v.want(v.api(v.bearer, "GET", "/agents/"+id, ""), 200, "")
	for name, raw := range map[string]string{
		"the list": list.raw, "the audit log": events.raw, "the agent": v.api(v.bearer, "GET", "/agents/"+id, "").raw,
	} {
		for what, text := range map[string]string{"first secret": first[24:], "second secret": second[24:], "hash": hash, "scheme of secrets": "sk_live", "scheme of bcrypt": "$2a$"} {
			if strings.Contains(raw, text) {
				t.Errorf("%s shows the %s", name, what)
			}
		}
	}
	// Nor is it stored: only bcrypt of it, at cost 10, and the prefix.
	if !strings.HasPrefix(hash, "$2a$10$") {
		t.Errorf("stored is %.7s, want bcrypt of cost 10", hash)
	}
}

// Who may manage credentials, and what else is refused, with the agent's
// credential left as it was.
func TestCredentialRefusals(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("resumes:read", "tokens:read")
	credentialID, secret := v.quickCredential(id)
	revokedID, _ := v.quickCredential(id)
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+revokedID, ""), 204, "")
	suspended, gone := v.newAgent("resumes:read"), v.newAgent("resumes:read")
	suspendedCredential, _ := v.quickCredential(suspended)
	goneCredential, _ := v.quickCredential(gone)
	v.want(v.api(v.bearer, "PATCH", "/agents/"+suspended, `{"status":"suspended"}`), 200, "")
	v.want(v.api(v.bearer, "DELETE", "/agents/"+gone, ""), 204, "")

	plain := v.token(id, secret, "")                         // the agent itself, without a scope for it
	selfID, selfSecret := v.quickClient("credentials:write") // may manage its own
	self := v.token(selfID, selfSecret, "")
	selfCredential, _ := v.quickCredential(selfID)
	writerID, writerSecret := v.quickClient("agents:write") // lacks tokens:read, which the agent holds
	writer := v.token(writerID, writerSecret, "")
	strongID, strongSecret := v.quickClient("agents:write", "tokens:read")
	strongNarrow := v.token(strongID, strongSecret, "agents:write") // lacks what its agent holds
	strongCredential, _ := v.quickCredential(strongID)
	reader := v.token(v.id, v.secret, "agents:read audit:read tokens:read")

	list := "/agents/" + id + "/credentials"
	one := list + "/" + credentialID
	for _, row := range []struct {
		name, bearer, method, path, body string
		status                           int
		code                             string
	}{
		{"no token", "", "POST", list, "{}", 401, "UNAUTHORIZED"},
		{"garbage", "garbage", "POST", list, "{}", 401, "UNAUTHORIZED"},
		{"create without a scope", plain, "POST", list, "{}", 403, "FORBIDDEN"},
		{"list without a scope", plain, "GET", list, "", 403, "FORBIDDEN"},
		{"rotate without a scope", plain, "POST", one + "/rotate", "{}", 403, "FORBIDDEN"},
		{"revoke without a scope", plain, "DELETE", one, "", 403, "FORBIDDEN"},
		{"create with other scopes", reader, "POST", list, "{}", 403, "FORBIDDEN"},
		{"agents:write on itself, which can do more", strongNarrow, "DELETE", "/agents/" + strongID + "/credentials/" + strongCredential, "", 403, "FORBIDDEN"},
		{"credentials:write on another, create", self, "POST", list, "{}", 403, "FORBIDDEN"},
		{"credentials:write on another, list", self, "GET", list, "", 403, "FORBIDDEN"},
		{"credentials:write on another, rotate", self, "POST", one + "/rotate", "{}", 403, "FORBIDDEN"},
		{"credentials:write on another, revoke", self, "DELETE", one, "", 403, "FORBIDDEN"},
		{"credentials:write, another's credential by the own path", self, "DELETE", "/agents/" + selfID + "/credentials/" + credentialID, "", 404, "CREDENTIAL_NOT_FOUND"},
		// Nobody can mint authority that they don't hold.
		{"rotate for one that can do more", writer, "POST", one + "/rotate", "{}", 403, "FORBIDDEN"},
		{"revoke for one that can do more", writer, "DELETE", one, "", 403, "FORBIDDEN"},

		{"create for nobody", v.bearer, "POST", "/agents/" + newID() + "/credentials", "{}", 404, "AGENT_NOT_FOUND"},
		{"list of nobody", v.bearer, "GET", "/agents/" + newID() + "/credentials", "", 404, "AGENT_NOT_FOUND"},
		{"revoke for nobody", v.bearer, "DELETE", "/agents/" + newID() + "/credentials/" + credentialID, "", 404, "AGENT_NOT_FOUND"},
		{"create for no id", v.bearer, "POST", "/agents/x/credentials", "{}", 404, "AGENT_NOT_FOUND"},
		{"list of no id", v.bearer, "GET", "/agents/x/credentials", "", 404, "AGENT_NOT_FOUND"},
		{"agent in upper case", v.bearer, "GET", "/agents/" + strings.ToUpper(id) + "/credentials", "", 404, "AGENT_NOT_FOUND"},
		{"revoke unknown", v.bearer, "DELETE", list + "/" + newID(), "", 404, "CREDENTIAL_NOT_FOUND"},
		{"rotate what is no id", v.bearer, "POST", list + "/x/rotate", "{}", 404, "CREDENTIAL_NOT_FOUND"},
		{"revoke what is no id", v.bearer, "DELETE", list + "/x", "", 404, "CREDENTIAL_NOT_FOUND"},
		{"rotate an id in upper case", v.bearer, "POST", list + "/" + strings.ToUpper(credentialID) + "/rotate", "{}", 404, "CREDENTIAL_NOT_FOUND"},
		{"revoke an id in upper case", v.bearer, "DELETE", list + "/" + strings.ToUpper(credentialID), "", 404, "CREDENTIAL_NOT_FOUND"},
		{"revoke an id without hyphens", v.bearer, "DELETE", list + "/" + strings.ReplaceAll(credentialID, "-", ""), "", 404, "CREDENTIAL_NOT_FOUND"},
		{"revoke by an escaped path", v.bearer, "DELETE", list + "/%41", "", 404, "NOT_FOUND"},
		{"rotate by an escaped path", v.bearer, "POST", list + "/%41/rotate", "{}", 404, "NOT_FOUND"},
		{"rotate another agent's", v.bearer, "POST", list + "/" + selfCredential + "/rotate", "{}", 404, "CREDENTIAL_NOT_FOUND"},
		{"revoke another agent's", v.bearer, "DELETE", list + "/" + selfCredential, "", 404, "CREDENTIAL_NOT_FOUND"},

		{"rotate revoked", v.bearer, "POST", list + "/" + revokedID + "/rotate", "{}", 409, "CREDENTIAL_ALREADY_REVOKED"},
		{"revoke revoked", v.bearer, "DELETE", list + "/" + revokedID, "", 409, "CREDENTIAL_ALREADY_REVOKED"},
		{"create for suspended", v.bearer, "POST", "/agents/" + suspended + "/credentials", "{}", 403, "AGENT_NOT_ACTIVE"},
		{"rotate for suspended", v.bearer, "POST", "/agents/" + suspended + "/credentials/" + suspendedCredential + "/rotate", "{}", 403, "AGENT_NOT_ACTIVE"},
		{"rotate for decommissioned", v.bearer, "POST", "/agents/" + gone + "/credentials/" + goneCredential + "/rotate", "{}", 403, "AGENT_NOT_ACTIVE"},
		{"revoke of decommissioned", v.bearer, "DELETE", "/agents/" + gone + "/credentials/" + goneCredential, "", 409, "CREDENTIAL_ALREADY_REVOKED"},

		{"create without a body", v.bearer, "POST", list, "", 415, "UNSUPPORTED_MEDIA_TYPE"},
		{"body is an array", v.bearer, "POST", list, "[]", 400, "VALIDATION_ERROR"},
		{"body is null", v.bearer, "POST", list, "null", 400, "VALIDATION_ERROR"},
		{"body is no JSON", v.bearer, "POST", list, "{", 400, "VALIDATION_ERROR"},
		{"two bodies", v.bearer, "POST", list, "{}{}", 400, "VALIDATION_ERROR"},
		{"unknown field", v.bearer, "POST", list, `{"status":"active"}`, 400, "VALIDATION_ERROR"},
		{"a secret of one's own", v.bearer, "POST", list, `{"clientSecret":"x"}`, 400, "VALIDATION_ERROR"},
		{"field of another case", v.bearer, "POST", list, `{"ExpiresAt":"2999-01-01T00:00:00Z"}`, 400, "VALIDATION_ERROR"},
		{"field twice", v.bearer, "POST", list, `{"expiresAt":"2999-01-01T00:00:00Z","expiresAt":"2999-01-01T00:00:00Z"}`, 400, "VALIDATION_ERROR"},
		{"expiresAt null", v.bearer, "POST", list, `{"expiresAt":null}`, 400, "VALIDATION_ERROR"},
		{"expiresAt in the past", v.bearer, "POST", list, `{"expiresAt":"2020-01-01T00:00:00Z"}`, 400, "VALIDATION_ERROR"},
		{"expiresAt now", v.bearer, "POST", list, `{"expiresAt":"` + time.Now().UTC().Format(time.RFC3339Nano) + `"}`, 400, "VALIDATION_ERROR"},
		{"expiresAt without a zone", v.bearer, "POST", list, `{"expiresAt":"2999-01-01T00:00:00"}`, 400, "VALIDATION_ERROR"},
		{"expiresAt as a day", v.bearer, "POST", list, `{"expiresAt":"2999-01-01"}`, 400, "VALIDATION_ERROR"},
		{"expiresAt as a number", v.bearer, "POST", list, `{"expiresAt":32503680000}`, 400, "VALIDATION_ERROR"},
		{"expiresAt empty", v.bearer, "POST", list, `{"expiresAt":""}`, 400, "VALIDATION_ERROR"},
		{"expiresAt with NUL", v.bearer, "POST", list, `{"expiresAt":"2999-01-01T00:00:00Z\u0000"}`, 400, "VALIDATION_ERROR"},
		{"rotate with expiresAt in the past", v.bearer, "POST", one + "/rotate", `{"expiresAt":"2020-01-01T00:00:00Z"}`, 400, "VALIDATION_ERROR"},
		{"page 0", v.bearer, "GET", list + "?page=0", "", 400, "VALIDATION_ERROR"},
		{"page -1", v.bearer, "GET", list + "?page=-1", "", 400, "VALIDATION_ERROR"},
		{"page 2^63", v.bearer, "GET", list + "?page=9223372036854775808", "", 400, "VALIDATION_ERROR"},
		{"page as text", v.bearer, "GET", list + "?page=x", "", 400, "VALIDATION_ERROR"},
		{"limit 101", v.bearer, "GET", list + "?limit=101", "", 400, "VALIDATION_ERROR"},
		{"limit twice", v.bearer, "GET", list + "?limit=1&limit=1", "", 400, "VALIDATION_ERROR"},
		{"unknown parameter", v.bearer, "GET", list + "?status=active", "", 400, "VALIDATION_ERROR"},
		{"token in the query", "", "GET", list + "?access_token=" + v.bearer, "", 401, "UNAUTHORIZED"},
		{"one credential is no route", v.bearer, "GET", one, "", 405, "METHOD_NOT_ALLOWED"},
	} {
		a := v.api(row.bearer, row.method, row.path, row.body)
		if row.bearer == "" {
			a = v.do(row.method, "/api/v1"+row.path, row.body)
		}
		if a.status != row.status || a.code() != row.code || a.text("message") == "" {
			t.Errorf("%s: answered %v, want %d %s", row.name, a, row.status, row.code)
		}
	}
	v.want(v.do("POST", "/api/v1"+list, "{}", "Authorization", "Bearer "+v.bearer, "Content-Type", "text/plain"), 415, "UNSUPPORTED_MEDIA_TYPE")
	v.want(v.do("POST", "/api/v1"+list, "expiresAt=", "Authorization", "Bearer "+v.bearer, "Content-Type", "application/x-www-form-urlencoded"), 415, "UNSUPPORTED_MEDIA_TYPE")
	if total := v.api(v.bearer, "GET", list, "").body["total"]; total != 2.0 {
		t.Errorf("after all these refusals the agent has %v credentials, want 2", total)
	}
	v.token(id, secret, "")

	// And what is allowed: an agent manages its own; a suspended agent's can
	// be revoked; a decommissioned one's be listed.
	v.want(v.api(self, "GET", "/agents/"+selfID+"/credentials", ""), 200, "")
	v.want(v.api(self, "DELETE", "/agents/"+selfID+"/credentials/"+selfCredential, ""), 204, "")
	v.want(v.api(v.bearer, "DELETE", "/agents/"+suspended+"/credentials/"+suspendedCredential, ""), 204, "")
	v.want(v.api(v.bearer, "GET", "/agents/"+gone+"/credentials", ""), 200, "")
}

// Whatever is wrong with a client, it learns nothing but that.
func TestInvalidClientIsOneAnswer(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "100000")
	id := v.newAgent("tokens:read", "resumes:read")
	_, secret := v.quickCredential(id)
	_, other := v.quickClient("tokens:read")
	revokedID, revoked := v.quickCredential(id)
	v.token(id, revoked, "") // the copy remembers this one
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+revokedID, ""), 204, "")
	unseenID, unseen := v.quickCredential(id) // and not that one
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+unseenID, ""), 204, "")
	expiredID, expired := v.quickCredential(id)
	v.setExpiry(expiredID, time.Now().Add(-time.Second))
	v.token(id, secret, "")

	last := byte('0')
	if secret[71] == last {
		last = '1'
	}
	type pair struct{ name, id, secret string }
	wrong := []pair{
		{"unknown client", newID(), secret},
		{"another client's secret", id, other},
		{"wrong secret", id, newSecret()},
		{"wrong secret with a right prefix", id, secret[:71] + string(last)},
		// Bcrypt reads no more than 72 bytes, and a secret has just as many.
		{"secret with a byte more", id, secret + "0"},
		{"secret with three bytes more", id, secret + "abc"},
		{"secret with a newline", id, secret + "\n"},
		{"secret with NUL", id, secret + "\x00"},
		{"secret cut short", id, secret[:71]},
		{"secret of its prefix", id, secret[:24]},
		{"secret in upper case", id, strings.ToUpper(secret)},
		{"secret without its scheme", id, secret[8:]},
		{"secret of another scheme", id, "sk_test_" + secret[8:]},
		{"space before the secret", id, " " + secret},
		{"a word", id, "password"},
		{"SQL", id, "' or 1=1 --"},
		{"very long", id, strings.Repeat("x", 2000)},
		{"revoked", id, revoked},
		{"revoked and never seen", id, unseen},
		{"expired", id, expired},
		// PostgreSQL would take each of these for the client's id.
		{"client in upper case", strings.ToUpper(id), secret},
		{"client in braces", "{" + id + "}", secret},
		{"client without hyphens", strings.ReplaceAll(id, "-", ""), secret},
		{"client with a space", id + " ", secret},
		{"client of NUL", "\x00", secret},
		{"client of invalid UTF-8", "\xff", secret},
		{"client that is no id", "x", secret},
		{"client that is SQL", "' or 1=1 --", secret},
	}
	comparable := func(a answer) string {
		h := a.header.Clone()
		h.Del("X-Request-Id")
		h.Del("Date")
		return fmt.Sprint(a.status, h, a.raw)
	}
	for _, way := range []struct {
		name, path, more string
	}{{"token", "", "grant_type=client_credentials"}, {"introspect", "/introspect", "token=x"}, {"revoke", "/revoke", "token=x"}} {
		basic, body := "", ""
		for _, p := range wrong {
			// Escaped, since these are form-encoded before they are Basic.
			a := v.do("POST", "/api/v1/token"+way.path, way.more, "Content-Type", "application/x-www-form-urlencoded",
				"Authorization", basicAuth(url.QueryEscape(p.id), url.QueryEscape(p.secret)))
			b := v.form("", "", way.path, way.more+"&"+url.Values{"client_id": {p.id}, "client_secret": {p.secret}}.Encode())
			if basic == "" {
				basic, body = comparable(a), comparable(b)
				v.want(a, 401, "invalid_client")
			}
			if got := comparable(a); got != basic {
				t.Errorf("%s, %s by Basic: answered %s, want %s", way.name, p.name, got, basic)
			}
			if got := comparable(b); got != body {
				t.Errorf("%s, %s in the form: answered %s, want %s", way.name, p.name, got, body)
			}
		}
		// A client that reads the challenge doesn't read the body (RFC 6749,
		// section 5.2).
		if !strings.Contains(basic, `Www-Authenticate:[Basic realm="agentidp", error="invalid_client", error_description="`) || body != basic {
			t.Errorf("%s: Basic answers %s, the form %s", way.name, basic, body)
		}
	}

	// The log says so, too, for the client it was tried on; and one client has
	// one key, however it is spelled.
	events := v.want(v.api(v.bearer, "GET", "/audit?limit=1&action=auth.failed&outcome=failure&agentId="+id, ""), 200, "")
	if total, _ := events.body["total"].(float64); total < 50 || strings.Contains(events.raw, secret[24:]) {
		t.Errorf("the log has %v failures of the client, and shows %s", events.body["total"], events.raw)
	}
	for keys := v.rdb.Scan(t.Context(), 0, "*", 1000).Iterator(); keys.Next(t.Context()); {
		if strings.Contains(keys.Val(), strings.ToUpper(id)) || strings.Contains(keys.Val(), "{") {
			t.Errorf("Redis has a key %q", keys.Val())
		}
	}
}

func TestClientAuthenticationForms(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read")
	otherID, other := v.quickClient("resumes:read")
	var escaped strings.Builder // each letter of the secret, as the RFC allows
	for _, c := range []byte(secret) {
		fmt.Fprintf(&escaped, "%%%02X", c)
	}
	encoded := base64.StdEncoding.EncodeToString([]byte(id + ":" + secret))
	const (
		none    = "none"
		bare    = `Basic realm="agentidp"`
		refused = `Basic realm="agentidp", error="invalid_client", error_description="`
	)
	inForm := "&client_id=" + id + "&client_secret=" + secret
	for _, row := range []struct {
		name      string
		headers   []string // each an Authorization
		form      string
		status    int
		code      string
		challenge string // how WWW-Authenticate begins
	}{
		{"Basic", []string{basicAuth(id, secret)}, "", 200, "", none},
		{"form", nil, inForm, 200, "", none},
		{"form with an empty header", []string{""}, inForm, 200, "", none},
		{"form-encoded halves", []string{basicAuth(strings.ReplaceAll(id, "-", "%2D"), escaped.String())}, "", 200, "", none},
		{"scheme in lower case", []string{"basic " + encoded}, "", 200, "", none},
		{"scheme in upper case", []string{"BASIC " + encoded}, "", 200, "", none},
		{"two spaces after the scheme", []string{"Basic  " + encoded}, "", 200, "", none},
		// requests-oauthlib sends both.
		{"the same client_id in the form", []string{basicAuth(id, secret)}, "&client_id=" + id, 200, "", none},
		{"empty parameters in the form", []string{basicAuth(id, secret)}, "&client_id=&client_secret=", 200, "", none},

		{"another client_id in the form", []string{basicAuth(id, secret)}, "&client_id=" + otherID, 400, "invalid_request", none},
		{"client_id in upper case in the form", []string{basicAuth(id, secret)}, "&client_id=" + strings.ToUpper(id), 400, "invalid_request", none},
		{"both ways, both right", []string{basicAuth(id, secret)}, inForm, 400, "invalid_request", none},
		{"both ways, the header wrong", []string{basicAuth(id, other)}, inForm, 400, "invalid_request", none},
		{"both ways, the form wrong", []string{basicAuth(id, secret)}, "&client_secret=x", 400, "invalid_request", none},
		{"both ways, two clients", []string{basicAuth(otherID, other)}, inForm, 400, "invalid_request", none},
		{"two right headers", []string{basicAuth(id, secret), basicAuth(id, secret)}, "", 400, "invalid_request", none},
		{"two headers, one wrong", []string{basicAuth(id, secret), "Basic x"}, "", 400, "invalid_request", none},
		{"two headers, one Bearer", []string{basicAuth(id, secret), "Bearer " + v.bearer}, "", 400, "invalid_request", none},

		{"nothing", nil, "", 401, "invalid_client", bare},
		{"client_id alone", nil, "&client_id=" + id, 401, "invalid_client", bare},
		{"empty secret in the form", nil, "&client_id=" + id + "&client_secret=", 401, "invalid_client", bare},
		{"secret alone", nil, "&client_secret=" + secret, 401, "invalid_client", refused},
		{"wrong secret in the form", nil, "&client_id=" + id + "&client_secret=x", 401, "invalid_client", refused},
		{"wrong secret by Basic", []string{basicAuth(id, "x")}, "", 401, "invalid_client", refused},
		{"Basic alone", []string{"Basic"}, "", 401, "invalid_client", refused},
		{"Basic and a space", []string{"Basic "}, "", 401, "invalid_client", refused},
		{"bad base64", []string{"Basic !!!"}, "", 401, "invalid_client", refused},
		{"base64 cut short", []string{"Basic " + encoded[:len(encoded)-3]}, "", 401, "invalid_client", refused},
		{"base64 without the scheme", []string{encoded}, "", 401, "invalid_client", refused},
		{"something behind the base64", []string{"Basic " + encoded + " x"}, "", 401, "invalid_client", refused},
		{"no base64", []string{"Basic " + id + ":" + secret}, "", 401, "invalid_client", refused},
		{"no colon", []string{"Basic " + base64.StdEncoding.EncodeToString([]byte(id))}, "", 401, "invalid_client", refused},
		{"a colon alone", []string{basicAuth("", "")}, "", 401, "invalid_client", refused},
		{"empty secret", []string{basicAuth(id, "")}, "", 401, "invalid_client", refused},
		{"empty client", []string{basicAuth("", secret)}, "", 401, "invalid_client", refused},
		{"a colon more", []string{basicAuth(id, secret+":")}, "", 401, "invalid_client", refused},
		{"halves in the wrong order", []string{basicAuth(secret, id)}, "", 401, "invalid_client", refused},
		{"bad escape in the secret", []string{basicAuth(id, "%zz")}, "", 401, "invalid_client", refused},
		{"bad escape in the client", []string{basicAuth("%", secret)}, "", 401, "invalid_client", refused},
		{"escaped twice", []string{basicAuth(id, url.QueryEscape(escaped.String()))}, "", 401, "invalid_client", refused},
		{"NUL", []string{basicAuth("\x00", "\x00")}, "", 401, "invalid_client", refused},
		{"invalid UTF-8", []string{basicAuth("\xff\xfe", "\xff")}, "", 401, "invalid_client", refused},
		{"Digest", []string{`Digest username="` + id + `"`}, "", 401, "invalid_client", refused},
		// A token gets no token: nothing here may live for ever.
		{"Bearer", []string{"Bearer " + v.bearer}, "", 401, "invalid_client", "Basic "},
	} {
		header := []string{"Content-Type", "application/x-www-form-urlencoded"}
		for _, value := range row.headers {
			header = append(header, "Authorization", value)
		}
		a := v.do("POST", "/api/v1/token", "grant_type=client_credentials"+row.form, header...)
		if a.status != row.status || a.code() != row.code {
			t.Errorf("%s: answered %v, want %d %s", row.name, a, row.status, row.code)
		}
		challenge := a.header.Get("WWW-Authenticate")
		switch row.challenge {
		case none:
			if challenge != "" {
				t.Errorf("%s: WWW-Authenticate is %q, want none", row.name, challenge)
			}
		case bare:
			if challenge != bare {
				t.Errorf("%s: WWW-Authenticate is %q, want %q", row.name, challenge, bare)
			}
		default:
			if !strings.HasPrefix(challenge, row.challenge) {
				t.Errorf("%s: WWW-Authenticate is %q, want %q", row.name, challenge, row.challenge)
			}
		}
		if len(a.header.Values("WWW-Authenticate")) > 1 {
			t.Errorf("%s: two challenges: %q", row.name, a.header.Values("WWW-Authenticate"))
		}
	}
}

// Several secrets live side by side, so that one replaces another with no gap;
// the list says when each expires.
func TestSecretsAreReplacedWithoutAGap(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("resumes:read")
	path := "/agents/" + id + "/credentials"
	at := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(millis) }
	listed := func() map[string]string { // credentialId to status and expiry
		list := map[string]string{}
		for _, entry := range v.want(v.api(v.bearer, "GET", path, ""), 200, "").body["data"].([]any) {
			c := entry.(map[string]any)
			list[c["credentialId"].(string)] = fmt.Sprint(c["status"], " ", c["expiresAt"])
		}
		return list
	}
	oldID, old := v.newCredential(id)
	ofOld := v.token(id, old, "")
	ends := at(time.Hour)
	made := v.want(v.api(v.bearer, "POST", path, `{"expiresAt":"`+ends+`"}`), 201, "")
	nextID, next := made.text("credentialId"), made.text("clientSecret")
	if got, want := listed(), (map[string]string{oldID: "active <nil>", nextID: "active " + ends}); !maps.Equal(got, want) {
		t.Errorf("listed are %v, want %v", got, want)
	}
	ofNext := v.token(id, next, "")
	v.token(id, old, "") // while clients are given the next one
	v.want(v.api(v.bearer, "DELETE", path+"/"+oldID, ""), 204, "")
	v.want(v.grant(id, old, ""), 401, "invalid_client")
	if v.active(ofOld) || !v.active(ofNext) {
		t.Error("the old secret's token lives, or the next one's doesn't")
	}
	// An expired one is refused, and listed with when that was; a rotation sets it anew.
	expired := at(-time.Second)
	when, _ := time.Parse(millis, expired)
	v.setExpiry(nextID, when)
	v.want(v.grant(id, next, ""), 401, "invalid_client")
	if got := listed()[nextID]; got != "active "+expired {
		t.Errorf("an expired credential is listed as %s, want active and %s", got, expired)
	}
	turned := v.want(v.api(v.bearer, "POST", path+"/"+nextID+"/rotate", "{}"), 200, "")
	v.token(id, turned.text("clientSecret"), "")
	if got := listed()[nextID]; got != "active <nil>" {
		t.Errorf("rotated without an expiry, it is listed as %s", got)
	}
}

// Of concurrent changes of one credential exactly one is the last.
func TestCredentialRacesHaveOneWinner(t *testing.T) {
	t.Parallel()
	v := newService(t)
	two := v.another()
	id := v.newAgent("resumes:read")
	path := "/agents/" + id + "/credentials/"
	race := func(n int, do func(v *service) answer) []answer {
		answers := make([]answer, n)
		var wait sync.WaitGroup
		for i := range n {
			wait.Go(func() { answers[i] = do([]*service{v, two}[i%2]) })
		}
		wait.Wait()
		return answers
	}

	for range 5 {
		credentialID, secret := v.quickCredential(id)
		statuses := map[int]int{}
		for _, a := range race(6, func(v *service) answer { return v.api(v.bearer, "DELETE", path+credentialID, "") }) {
			statuses[a.status]++
			if a.status == 409 && a.code() != "CREDENTIAL_ALREADY_REVOKED" {
				t.Errorf("a late revocation answered %v", a)
			}
		}
		if fmt.Sprint(statuses) != "map[204:1 409:5]" {
			t.Errorf("six concurrent revocations answered %v, want one 204 and five 409", statuses)
		}
		v.want(v.grant(id, secret, ""), 401, "invalid_client")
		events := v.want(v.api(v.bearer, "GET", "/audit?limit=100&outcome=success&action=credential.revoked&agentId="+id, ""), 200, "")
		if got := strings.Count(events.raw, credentialID); got != 1 {
			t.Errorf("%d events say that the credential was revoked, want 1", got)
		}
	}

	credentialID, secret := v.quickCredential(id)
	secrets := []string{secret}
	for _, a := range race(4, func(v *service) (a answer) {
		for a.status = 503; a.status == 503; { // waited in vain for bcrypt, and changed nothing
			a = v.api(v.bearer, "POST", path+credentialID+"/rotate", "{}")
		}
		return a
	}) {
		v.want(a, 200, "")
		secrets = append(secrets, a.text("clientSecret"))
	}
	stored := v.api(v.bearer, "GET", "/agents/"+id+"/credentials?limit=1", "").body["data"].([]any)[0].(map[string]any)
	working := 0
	for _, secret := range secrets {
		a := v.grant(id, secret, "")
		if a.status == 200 {
			working++
		}
		if (a.status == 200) != (secret[8:24] == stored["secretPrefix"]) {
			t.Errorf("the listed prefix is %v, and %s answered %d", stored["secretPrefix"], secret[8:24], a.status)
		}
	}
	if working != 1 {
		t.Errorf("after four concurrent rotations %d secrets work, want 1", working)
	}

	// A rotation beside a revocation: whoever comes first, it is revoked.
	var rotated answer
	for _, a := range race(2, func(w *service) answer {
		if w == v {
			rotated = v.api(v.bearer, "POST", path+credentialID+"/rotate", "{}")
			return rotated
		}
		return w.api(w.bearer, "DELETE", path+credentialID, "")
	}) {
		if a.status != 200 && a.status != 204 && a.status != 409 && a.status != 503 {
			t.Errorf("a rotation beside a revocation answered %v", a)
		}
	}
	v.want(v.api(v.bearer, "DELETE", path+credentialID, ""), 409, "CREDENTIAL_ALREADY_REVOKED")
	if rotated.status == 200 {
		v.want(v.grant(id, rotated.text("clientSecret"), ""), 401, "invalid_client")
	}
}

// What a copy has found right once is refused from the rotation on.
func TestRotatedSecretIsNotRemembered(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("resumes:read")
	credentialID, first := v.quickCredential(id)
	for range 3 {
		v.token(id, first, "")
	}
	a := v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials/"+credentialID+"/rotate", "{}"), 200, "")
	v.want(v.grant(id, first, ""), 401, "invalid_client")
	v.token(id, a.text("clientSecret"), "")
	v.want(v.grant(id, first, ""), 401, "invalid_client")
}

// Wrong secrets wait for a slot of bcrypt; those who are known don't.
func TestWrongSecretsStarveNobody(t *testing.T) {
	const attempts = 200
	v := newService(t)
	_, secret, _ := strings.Cut(v.secret, "sk_live_")
	wrong := "sk_live_" + secret[:16] + strings.Repeat("0", 48) // right prefix: it gets as far as bcrypt
	var left atomic.Int32
	left.Store(attempts)
	statuses := make([]int, attempts)
	var wait sync.WaitGroup
	for i := range attempts {
		wait.Go(func() {
			defer left.Add(-1)
			statuses[i] = v.grant(v.id, wrong, "").status
		})
	}
	rounds := 0
	for left.Load() > 0 {
		v.want(v.do("GET", "/health", ""), 200, "")
		v.want(v.do("GET", "/.well-known/jwks.json", ""), 200, "")
		v.want(v.introspect(v.bearer), 200, "")
		v.want(v.form(v.id, v.secret, "/introspect", "token="+v.bearer), 200, "")
		v.want(v.grant(v.id, v.secret, ""), 200, "")
		rounds++
	}
	wait.Wait()
	for _, status := range statuses {
		if status != 401 && status != 503 { // right answers, and those that waited in vain
			t.Errorf("a wrong secret answered %d, want 401 or 503", status)
		}
	}
	if rounds < 10 {
		t.Errorf("while %d wrong secrets were refused, others were served %d times, want many", attempts, rounds)
	}
}
