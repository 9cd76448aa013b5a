package test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// grant asks for a token with a further piece of form.
func (v *service) grant(id, secret, more string) answer {
	v.t.Helper()
	return v.form(id, secret, "", "grant_type=client_credentials&"+more)
}

// bearerForm posts a form to a path below /api/v1/token with a bearer token.
func (v *service) bearerForm(bearer, path, form string) answer {
	v.t.Helper()
	return v.do("POST", "/api/v1/token"+path, form,
		"Authorization", "Bearer "+bearer, "Content-Type", "application/x-www-form-urlencoded")
}

// isAccepted tells whether a bearer route lets in an agent's token; any token
// of an agent may read that agent.
func (v *service) isAccepted(agentID, token string) bool {
	v.t.Helper()
	a := v.api(token, "GET", "/agents/"+agentID, "")
	if a.status != 200 && (a.status != 401 || a.code() != "UNAUTHORIZED" || !strings.Contains(a.header.Get("WWW-Authenticate"), `error="invalid_token"`)) {
		v.t.Errorf("GET with a token answered %v, %q, want 200 or 401 invalid_token", a, a.header.Get("WWW-Authenticate"))
	}
	return a.status == 200
}

// readClaims reads a token as its client would.
func readClaims(t testing.TB, token string) (c claims) {
	t.Helper()
	if err := json.Unmarshal([]byte(readPart(t, token, 1)), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// refuseEvents makes the audit log refuse events until allow is called.
func (v *service) refuseEvents() (allow func()) {
	v.t.Helper()
	exec := func(sql string) {
		v.t.Helper()
		if _, err := v.db.Exec(context.Background(), sql); err != nil {
			v.t.Fatal(err)
		}
	}
	exec(`create function refuse_event() returns trigger language plpgsql as $$ begin raise exception 'refused'; end $$;
		create trigger refuse_event before insert on audit_events for each statement execute function refuse_event()`)
	return func() { exec(`drop trigger refuse_event on audit_events; drop function refuse_event`) }
}

// RFC 6749, section 5.1.
func TestTokenResponse(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read", "files.v2:*")
	a := v.want(v.grant(id, secret, ""), 200, "")
	if names := fmt.Sprint(slices.Sorted(maps.Keys(a.body))); names != "[access_token expires_in scope token_type]" {
		t.Errorf("a token response has %s", names)
	}
	if a.text("token_type") != "Bearer" || a.body["expires_in"] != 3600.0 || a.text("scope") != "resumes:read files.v2:*" {
		t.Errorf("the token response is %v", a)
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("its Content-Type is %q, want application/json", got)
	}
	c := readClaims(t, a.text("access_token"))
	if c.Issuer != v.url || c.Subject != id || c.ClientID != id || !slices.Equal(c.Audience, audience{v.url}) || c.Scope != a.text("scope") ||
		!isID(c.ID) || c.Expires-c.IssuedAt != 3600 || time.Since(time.Unix(c.IssuedAt, 0)).Abs() > time.Minute {
		t.Errorf("the claims are %+v", c)
	}
	if again := readClaims(t, v.token(id, secret, "")); again.ID == c.ID {
		t.Error("two tokens have one jti")
	}
	// Neither an answer nor an error may be kept (RFC 6749, section 5.1).
	for _, a := range []answer{a, v.grant(id, "wrong", ""), v.form(id, secret, "", ""), v.introspect("x"), v.form(id, secret, "/revoke", "token=x"), v.do("GET", "/api/v1/token", "")} {
		if got := a.header.Get("Cache-Control"); got != "no-store" {
			t.Errorf("%v has Cache-Control %q, want no-store", a, got)
		}
	}

	// The id in a token is in the log, and the token isn't.
	events := v.want(v.api(v.bearer, "GET", "/audit?action=token.issued&agentId="+id, ""), 200, "")
	if !strings.Contains(events.raw, c.ID) || strings.Contains(events.raw, "eyJ") {
		t.Errorf("the events of issuing are %s, want jti %s and no token", events.raw, c.ID)
	}
}

func TestTokenEndpointRefusals(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read", "resumes:score", "files:*")
	const formType = "application/x-www-form-urlencoded"
	const good = "grant_type=client_credentials"
	long := strings.Repeat("x", 16<<10)
	basic := basicAuth(id, secret)
	for _, row := range []struct {
		name   string
		body   string
		types  []string // of the body; nil is a form
		status int
		code   string
	}{
		{"good", good, nil, 200, ""},
		{"no grant_type", "scope=resumes:read", nil, 400, "invalid_request"},
		{"empty body", "", nil, 400, "invalid_request"},
		{"empty grant_type", "grant_type=", nil, 400, "invalid_request"},
		{"another grant", "grant_type=authorization_code&code=x", nil, 400, "unsupported_grant_type"},
		{"refresh", "grant_type=refresh_token&refresh_token=x", nil, 400, "unsupported_grant_type"},
		{"password", "grant_type=password&username=x&password=x", nil, 400, "unsupported_grant_type"},
		{"grant in upper case", "grant_type=CLIENT_CREDENTIALS", nil, 400, "unsupported_grant_type"},
		{"grant with a space", "grant_type=client_credentials+", nil, 400, "unsupported_grant_type"},
		{"name in upper case", "GRANT_TYPE=client_credentials", nil, 400, "invalid_request"},
		{"unknown parameter", good + "&foo=bar&nonce=", nil, 200, ""},
		{"grant_type twice", good + "&" + good, nil, 400, "invalid_request"},
		{"grant_type twice, once empty", good + "&grant_type=", nil, 400, "invalid_request"},
		{"scope twice", good + "&scope=resumes:read&scope=resumes:score", nil, 400, "invalid_request"},
		{"client_id twice", good + "&client_id=" + id + "&client_id=" + id, nil, 400, "invalid_request"},
		{"client_secret twice", good + "&client_secret=x&client_secret=x", nil, 400, "invalid_request"},
		{"resource twice", good + "&resource=https://a.example&resource=https://b.example", nil, 200, ""},

		// Beside a good scope, which alone would be granted.
		{"scope with a quote", good + "&scope=resumes:read+a%22b", nil, 400, "invalid_scope"},
		{"scope with a backslash", good + "&scope=resumes:read+a%5Cb", nil, 400, "invalid_scope"},
		{"scope with a control", good + "&scope=resumes:read+a%01b", nil, 400, "invalid_scope"},
		{"scope with NUL", good + "&scope=resumes:read%00", nil, 400, "invalid_scope"},
		{"scope with DEL", good + "&scope=resumes:read+a%7F", nil, 400, "invalid_scope"},
		{"scope beyond ASCII", good + "&scope=resumes:read+r%C3%A9sumes:read", nil, 400, "invalid_scope"},
		{"scope of invalid UTF-8", good + "&scope=resumes:read+%FF", nil, 400, "invalid_scope"},
		{"scope with a tab", good + "&scope=resumes:read%09resumes:score", nil, 400, "invalid_scope"},
		{"scope with a newline", good + "&scope=resumes:read%0A", nil, 400, "invalid_scope"},
		{"scope with two spaces", good + "&scope=resumes:read++resumes:score", nil, 400, "invalid_scope"},
		{"scope with a space before", good + "&scope=+resumes:read", nil, 400, "invalid_scope"},
		{"scope with a space behind", good + "&scope=resumes:read+", nil, 400, "invalid_scope"},
		{"scope of a space", good + "&scope=+", nil, 400, "invalid_scope"},
		{"empty scope is none", good + "&scope=", nil, 200, ""},

		{"JSON", `{"grant_type":"client_credentials"}`, []string{"application/json"}, 400, "invalid_request"},
		{"form that says JSON", good, []string{"application/json"}, 400, "invalid_request"},
		{"multipart", good, []string{"multipart/form-data; boundary=x"}, 400, "invalid_request"},
		{"text", good, []string{"text/plain"}, 400, "invalid_request"},
		{"no Content-Type", good, []string{}, 400, "invalid_request"},
		{"empty Content-Type", good, []string{""}, 400, "invalid_request"},
		{"two Content-Types", good, []string{formType, formType}, 400, "invalid_request"},
		{"two Content-Types in one", good, []string{formType + ", " + formType}, 400, "invalid_request"},
		{"charset", good, []string{formType + "; charset=UTF-8"}, 200, ""},
		{"type in upper case", good, []string{strings.ToUpper(formType)}, 200, ""},

		{"bad escape", good + "&scope=%zz", nil, 400, "invalid_request"},
		{"half an escape", good + "&scope=%4", nil, 400, "invalid_request"},
		{"semicolon", good + ";scope=resumes:read", nil, 400, "invalid_request"},
		{"body over 16 kB", good + "&x=" + long, nil, 413, "invalid_request"},
	} {
		header := []string{"Authorization", basic}
		if row.types == nil {
			row.types = []string{formType}
		}
		for _, value := range row.types {
			header = append(header, "Content-Type", value)
		}
		a := v.do("POST", "/api/v1/token", row.body, header...)
		if a.status != row.status || a.code() != row.code {
			t.Errorf("%s: answered %v, want %d %s", row.name, a, row.status, row.code)
		}
		if a.status != 200 && (a.text("error_description") == "" || len(a.body) != 2 || strings.ContainsAny(a.text("error_description"), "\"\\")) {
			t.Errorf("%s: the error is %s, want error and error_description (RFC 6749, section 5.2)", row.name, a.raw)
		}
	}

	// Parameters count only in the body; the log is searched for canaries.
	inQuery := "/api/v1/token?" + good + "&client_id=" + id + "&client_secret=canary" + secret
	v.want(v.do("POST", inQuery, "", "Authorization", basic, "Content-Type", formType), 400, "invalid_request")
	v.want(v.do("POST", inQuery, "", "Content-Type", formType), 401, "invalid_client")
	v.want(v.do("POST", "/api/v1/token?grant_type=password&scope=canary", good, "Authorization", basic, "Content-Type", formType), 200, "")
	v.want(v.do("POST", "/api/v1/token/introspect?token="+v.bearer, "", "Authorization", "Bearer "+v.bearer, "Content-Type", formType), 400, "invalid_request")

	for _, path := range []string{"/api/v1/token", "/api/v1/token/introspect", "/api/v1/token/revoke"} {
		for _, method := range []string{"GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"} {
			a := v.do(method, path, "", "Authorization", basic)
			if a.status != 405 || a.header.Get("Allow") != "POST" || a.header.Get("Content-Type") != "application/json" || method != "HEAD" && a.code() != "invalid_request" {
				t.Errorf("%s %s answered %v with Allow %q, want 405 and POST", method, path, a, a.header.Get("Allow"))
			}
		}
	}
}

// A token carries what its agent may and nothing else (RFC 6749, section 3.3).
func TestScopesAreNarrowedToCapabilities(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read", "resumes:score", "files:*", "agents:read")
	for _, row := range []struct{ asked, given string }{
		{"", "resumes:read resumes:score files:* agents:read"},
		{"resumes:read", "resumes:read"},
		{"resumes:score resumes:read", "resumes:score resumes:read"},
		{"resumes:read resumes:delete", "resumes:read"},
		{"resumes:read resumes:read", "resumes:read"},
		{"agents:write agents:read audit:read", "agents:read"},
		{"files:*", "files:*"},
		{"files:read", "files:read"},
		{"files:read files:* files:write", "files:read files:* files:write"},
		{"openid resumes:read", "resumes:read"},
		{"resumes:*", ""}, // what is granted one by one is not all
		{"agents:*", ""},
		{"*", ""}, {"*:*", ""}, {"files", ""}, {"files:", ""}, {"files:a:b", ""}, {"files:READ", ""}, {"files:**", ""},
		{"filesystem:read", ""}, {"file:read", ""}, {"RESUMES:READ", ""}, {"resumes:read,resumes:score", ""},
		{"resumes", ""}, {"resumes:rea", ""}, {"resumes:readall", ""}, {"agents:write", ""}, {"tokens:read", ""}, {"openid", ""},
	} {
		a := v.grant(id, secret, "scope="+url.QueryEscape(row.asked))
		if row.given == "" {
			if a.status != 400 || a.code() != "invalid_scope" {
				t.Errorf("scope %q answered %v, want 400 invalid_scope", row.asked, a)
			}
			continue
		}
		if a.status != 200 || a.text("scope") != row.given || readClaims(t, a.text("access_token")).Scope != row.given {
			t.Errorf("scope %q answered %v, want 200 with %q", row.asked, a, row.given)
		}
	}
	// What a token was narrowed to is all that it can do.
	narrow := v.token(id, secret, "resumes:read")
	a := v.want(v.api(narrow, "GET", "/agents", ""), 403, "FORBIDDEN")
	if challenge := a.header.Get("WWW-Authenticate"); !strings.Contains(challenge, `error="insufficient_scope"`) || !strings.Contains(challenge, `scope="agents:read"`) {
		t.Errorf("a missing scope has WWW-Authenticate %q", challenge)
	}
	v.want(v.api(v.token(id, secret, "agents:read"), "GET", "/agents", ""), 200, "")
}

// Whatever is asked for, what is issued is a token that can be used.
func TestIssuedTokensAreUsable(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("files:*")
	var scopes []string
	for i := range 1000 {
		scopes = append(scopes, fmt.Sprintf("files:a%d", i))
	}
	for name, form := range map[string]string{
		"many scopes":                "scope=" + strings.Join(scopes, "+"),
		"one long scope":             "scope=files:" + strings.Repeat("a", 12<<10),
		"a resource that is escaped": "resource=" + url.QueryEscape("https://a.example/?"+strings.Repeat("&", 2000)),
		"a long resource":            "resource=https://a.example/" + strings.Repeat("a", 2000),
	} {
		a := v.grant(id, secret, form)
		if a.status == 400 {
			continue
		}
		if token := a.text("access_token"); a.status != 200 || len(token) > 16<<10 || !v.isActive(token) {
			t.Errorf("%s: answered %d with a token of %d bytes that nobody accepts, want a good one or 400", name, a.status, len(token))
		}
	}
}

// RFC 8707, section 2; the audience is what keeps a token from being used
// elsewhere, so ours is compared whole.
func TestAudienceIsWhatWasAskedFor(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read")
	many := make([]string, 17)
	for i := range many {
		many[i] = fmt.Sprintf("https://%d.example", i)
	}
	long := "https://a.example/" + strings.Repeat("x", 2100)
	for _, row := range []struct {
		name      string
		resources []string
		aud       []string // nil: refused
		ours      bool     // our own API lets the token in
	}{
		{"none", nil, []string{v.url}, true},
		{"another's", []string{"https://mcp.example.com/v1"}, []string{"https://mcp.example.com/v1"}, false},
		{"ours", []string{v.url}, []string{v.url}, true},
		{"several", []string{"https://a.example", "urn:example:b"}, []string{"https://a.example", "urn:example:b"}, false},
		{"several with ours", []string{"https://a.example", v.url}, []string{"https://a.example", v.url}, true},
		{"twice the same", []string{"https://a.example", "https://a.example"}, []string{"https://a.example"}, false},
		{"with a query", []string{"https://a.example/?tenant=1"}, []string{"https://a.example/?tenant=1"}, false},
		{"ours with a slash", []string{v.url + "/"}, []string{v.url + "/"}, false},
		{"ours with a path", []string{v.url + "/api/v1"}, []string{v.url + "/api/v1"}, false},
		{"ours cut short", []string{v.url[:len(v.url)-1]}, []string{v.url[:len(v.url)-1]}, false},
		{"ours in upper case", []string{strings.ToUpper(v.url)}, []string{strings.ToUpper(v.url)}, false},
		{"ours in another's query", []string{"https://a.example/?x=" + v.url}, []string{"https://a.example/?x=" + v.url}, false},
		{"ours and another's in one, by comma", []string{"https://a.example," + v.url}, []string{"https://a.example," + v.url}, false},
		// A parameter without a value is an absent one (RFC 6749, section 3.2).
		{"empty", []string{""}, []string{v.url}, true},

		{"relative", []string{"/v1"}, nil, false},
		{"a word", []string{"mcp"}, nil, false},
		{"no scheme", []string{"//a.example"}, nil, false},
		{"fragment", []string{"https://a.example/#x"}, nil, false},
		{"empty fragment", []string{"https://a.example/#"}, nil, false},
		{"space", []string{"https://a.example/ https://b.example"}, nil, false},
		{"control", []string{"https://a.example/\x01"}, nil, false},
		{"NUL", []string{"https://a.example/\x00"}, nil, false},
		{"newline", []string{"https://a.example\n"}, nil, false},
		{"quote", []string{`https://a.example/"`}, nil, false},
		{"backslash", []string{`https://a.example/\`}, nil, false},
		{"beyond ASCII", []string{"https://é.example"}, nil, false},
		{"invalid UTF-8", []string{"https://a.example/\xff"}, nil, false},
		{"one good, one bad", []string{"https://a.example", "b"}, nil, false},
		{"too many", many, nil, false},
		{"too long", []string{long}, nil, false},
	} {
		a := v.grant(id, secret, url.Values{"resource": row.resources}.Encode())
		if row.aud == nil {
			if a.status != 400 || a.code() != "invalid_target" {
				t.Errorf("%s: answered %v, want 400 invalid_target", row.name, a)
			}
			continue
		}
		if a.status != 200 {
			t.Errorf("%s: answered %v, want 200", row.name, a)
			continue
		}
		token := a.text("access_token")
		if got := readClaims(t, token).Audience; !slices.Equal(got, row.aud) {
			t.Errorf("%s: aud = %q, want %q", row.name, got, row.aud)
		}
		// Whoever the token is for, we can tell him about it.
		var aud any = row.aud[0]
		if len(row.aud) > 1 {
			aud = row.aud
		}
		if got := v.introspect(token).body["aud"]; fmt.Sprint(got) != fmt.Sprint(aud) {
			t.Errorf("%s: introspected aud = %q, want %q", row.name, got, aud)
		}
		if got := v.isAccepted(id, token); got != row.ours {
			t.Errorf("%s: our API lets the token in = %v, want %v", row.name, got, row.ours)
		}
		if a := v.bearerForm(token, "/revoke", "token=x"); (a.status == 200) != row.ours {
			t.Errorf("%s: revoking with the token answered %v, want it let in = %v", row.name, a, row.ours)
		}
	}
}

func TestTokensEndInTime(t *testing.T) {
	t.Parallel()
	v := newService(t, "TOKEN_TTL", "90")
	short := v.another("TOKEN_TTL", "1s")
	id, secret := v.quickClient("resumes:read")
	a := v.want(v.grant(id, secret, ""), 200, "")
	if c := readClaims(t, a.text("access_token")); a.body["expires_in"] != 90.0 || c.Expires-c.IssuedAt != 90 {
		t.Errorf("with TOKEN_TTL=90, the answer is %v and the claims %+v", a, c)
	}

	// No token outlives its credential.
	end := time.Now().Add(time.Minute)
	credentialID, dated := v.quickCredential(id)
	v.setExpiry(credentialID, end)
	for range 2 { // found by bcrypt, and then remembered
		a = v.want(v.grant(id, dated, ""), 200, "")
		c := readClaims(t, a.text("access_token"))
		if left := a.body["expires_in"].(float64); c.Expires != end.Unix() || left != float64(c.Expires-c.IssuedAt) || left > 60 {
			t.Errorf("a credential ends at %d, its token at %d, expires_in is %v", end.Unix(), c.Expires, left)
		}
	}
	// But one that ends later changes nothing.
	v.setExpiry(credentialID, time.Now().Add(time.Hour))
	if a = v.want(v.grant(id, dated, ""), 200, ""); a.body["expires_in"] != 90.0 {
		t.Errorf("the credential ends in an hour, expires_in is %v, want 90", a.body["expires_in"])
	}

	a = v.want(short.grant(id, secret, ""), 200, "")
	token := a.text("access_token")
	if a.body["expires_in"] != 1.0 {
		t.Errorf("with TOKEN_TTL=1s, expires_in is %v", a.body["expires_in"])
	}
	v.eventually("the token has expired", func() bool { return !v.isActive(token) })
	if c := readClaims(t, token); time.Now().Before(time.Unix(c.Expires, 0)) {
		t.Error("the token has expired before its time")
	}
	if v.isAccepted(id, token) {
		t.Error("an expired token is accepted")
	}
	// RFC 7009, section 2.2: nothing has to be done, so that is a success.
	if a := v.want(v.form(id, secret, "/revoke", "token="+token), 200, ""); a.raw != "{}\n" {
		t.Errorf("revoking an expired token answered %v", a)
	}
}

// Of N requests for the last k tokens of the month exactly k succeed, and what
// the audit log refuses costs none of them.
func TestQuotaIsExactUnderConcurrency(t *testing.T) {
	t.Parallel()
	const k, n = 5, 20
	v := newService(t, "MONTHLY_TOKEN_LIMIT", fmt.Sprint(k))
	id, secret := v.quickClient("resumes:read")

	allow := v.refuseEvents()
	for range 3 {
		a := v.want(v.grant(id, secret, ""), 503, "temporarily_unavailable")
		if a.header.Get("Retry-After") == "" || strings.Contains(a.raw, "eyJ") {
			t.Errorf("without an audit log, a token request answered %v", a)
		}
	}
	v.want(v.introspect(v.bearer), 503, "temporarily_unavailable")
	v.want(v.form(id, secret, "/revoke", "token="+v.bearer), 503, "temporarily_unavailable") // another's: a failure to record
	v.want(v.bearerForm(v.bearer, "/revoke", "token="+v.bearer), 503, "temporarily_unavailable")
	allow()
	if !v.isActive(v.bearer) {
		t.Error("a revocation that was not acknowledged and not recorded is effective")
	}

	answers := make([]answer, n)
	var wait sync.WaitGroup
	for i := range n {
		wait.Go(func() { answers[i] = v.grant(id, secret, "") })
	}
	wait.Wait()
	given := 0
	for _, a := range answers {
		if a.status == 200 {
			given++
		} else if a.status != 403 || a.code() != "unauthorized_client" || !strings.Contains(a.text("error_description"), time.Now().UTC().AddDate(0, 1, 1-time.Now().UTC().Day()).Format("2006-01-02")) {
			t.Errorf("beyond the quota answered %v, want 403 unauthorized_client and when it resets", a)
		}
	}
	if given != k {
		t.Errorf("%d of %d requests got one of the last %d tokens", given, n, k)
	}
	// A request that can't succeed is told why, and costs nothing.
	v.want(v.grant(id, secret, "scope=nothing:mine"), 400, "invalid_scope")
	// Introspection and revocation cost no token.
	v.want(v.form(id, secret, "/revoke", "token=x"), 200, "")
}

// RFC 7662, section 2.
func TestIntrospection(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read")
	readerID, reader := v.quickClient("tokens:read", "resumes:score")
	token := v.token(id, secret, "")
	c := readClaims(t, token)

	a := v.want(v.form(readerID, reader, "/introspect", "token="+token), 200, "")
	for name, want := range map[string]any{
		"active": true, "token_type": "Bearer", "iss": v.url, "sub": id, "aud": v.url, "client_id": id, "scope": "resumes:read",
		"jti": c.ID, "iat": float64(c.IssuedAt), "exp": float64(c.Expires), "credential_id": c.CredentialID, "secret_id": c.SecretID,
	} {
		if a.body[name] != want {
			t.Errorf("introspected %s = %#v, want %#v", name, a.body[name], want)
		}
		delete(a.body, name)
	}
	if len(a.body) > 0 {
		t.Errorf("introspection also answers %v", a.body)
	}
	if a.header.Get("Content-Type") != "application/json" || a.header.Get("Cache-Control") != "no-store" {
		t.Errorf("introspection has %v", a.header)
	}

	withReader := v.token(readerID, reader, "tokens:read")
	withoutReader := v.token(readerID, reader, "resumes:score")
	for _, row := range []struct {
		name, form string
		send       func(form string) answer
		status     int
		code       string
	}{
		{"bearer with tokens:read", "token=" + token, func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 200, ""},
		{"itself", "token=" + withReader, func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 200, ""},
		{"hint", "token_type_hint=access_token&token=" + token, func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 200, ""},
		{"wrong hint", "token_type_hint=refresh_token&token=" + token, func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 200, ""},
		{"unknown hint", "token_type_hint=x&token=" + token, func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 200, ""},
		{"bearer of the same agent without the scope", "token=" + token, func(f string) answer { return v.bearerForm(withoutReader, "/introspect", f) }, 403, "insufficient_scope"},
		{"bearer of another agent without", "token=" + token, func(f string) answer { return v.bearerForm(token, "/introspect", f) }, 403, "insufficient_scope"},
		{"client without tokens:read", "token=" + token, func(f string) answer { return v.form(id, secret, "/introspect", f) }, 403, "insufficient_scope"},
		{"nobody", "token=" + token, func(f string) answer { return v.form("", "", "/introspect", f) }, 401, "invalid_client"},
		{"wrong secret", "token=" + token, func(f string) answer { return v.form(readerID, secret, "/introspect", f) }, 401, "invalid_client"},
		{"bad bearer", "token=" + token, func(f string) answer { return v.bearerForm("garbage", "/introspect", f) }, 401, "invalid_token"},
		{"no token", "", func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 400, "invalid_request"},
		{"empty token", "token=", func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 400, "invalid_request"},
		{"two tokens", "token=" + token + "&token=" + token, func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 400, "invalid_request"},
		{"bearer and secret", "token=" + token + "&client_id=" + readerID + "&client_secret=" + reader, func(f string) answer { return v.bearerForm(withReader, "/introspect", f) }, 400, "invalid_request"},
	} {
		a := row.send(row.form)
		if a.status != row.status || a.code() != row.code || a.status == 200 && a.body["active"] != true {
			t.Errorf("%s: answered %v, want %d %s", row.name, a, row.status, row.code)
		}
		challenge := a.header.Get("WWW-Authenticate")
		if row.code == "insufficient_scope" && !strings.Contains(row.name, "client") && !strings.Contains(challenge, `scope="tokens:read"`) ||
			row.code == "invalid_token" && !strings.HasPrefix(challenge, "Bearer ") {
			t.Errorf("%s: WWW-Authenticate is %q", row.name, challenge)
		}
	}
	// One request, one caller.
	two := v.do("POST", "/api/v1/token/introspect", "token="+token, "Authorization", "Bearer "+withReader,
		"Authorization", basicAuth(readerID, reader), "Content-Type", "application/x-www-form-urlencoded")
	v.want(two, 400, "invalid_request")
	two = v.do("POST", "/api/v1/token/introspect", "token="+token, "Authorization", "Bearer "+withReader,
		"Authorization", "Bearer "+withoutReader, "Content-Type", "application/x-www-form-urlencoded")
	v.want(two, 400, "invalid_request")
}

// RFC 7009, section 2.
func TestRevocation(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read")
	otherID, other := v.quickClient("tokens:read")
	writerID, writer := v.quickClient("agents:write")
	token := v.token(id, secret, "")
	elsewhere := v.grant(id, secret, "resource=https://a.example").text("access_token")
	otherToken := v.token(otherID, other, "")
	flip := func(s string, i int) string {
		c := byte('A')
		if s[i] == c {
			c = 'B'
		}
		return s[:i] + string(c) + s[i+1:]
	}
	for _, row := range []struct {
		name         string
		token, form  string // that is revoked; what else is sent
		id, secret   string // as client, or
		bearer       string
		status       int
		code         string
		stillWorking bool
	}{
		{name: "another client", token: token, id: otherID, secret: other, status: 400, code: "invalid_request", stillWorking: true},
		{name: "another bearer", token: token, bearer: otherToken, status: 400, code: "invalid_request", stillWorking: true},
		{name: "bad signature around a real jti", token: flip(token, len(token)-20), id: id, secret: secret, status: 200, stillWorking: true},
		{name: "no signature around a real jti", token: token[:strings.LastIndex(token, ".")+1], id: id, secret: secret, status: 200, stillWorking: true},
		{name: "the jti alone", token: readClaims(t, token).ID, id: id, secret: secret, status: 200, stillWorking: true},
		{name: "the agent's id", token: id, id: id, secret: secret, status: 200, stillWorking: true},
		{name: "garbage", token: "garbage", id: id, secret: secret, status: 200, stillWorking: true},
		{name: "nobody", token: token, status: 401, code: "invalid_client", stillWorking: true},
		{name: "wrong secret", token: token, id: id, secret: other, status: 401, code: "invalid_client", stillWorking: true},
		{name: "no token", token: "", id: id, secret: secret, status: 400, code: "invalid_request", stillWorking: true},
		{name: "two tokens", token: token, form: "&token=" + token, id: id, secret: secret, status: 400, code: "invalid_request", stillWorking: true},
		{name: "bearer and secret", token: token, form: "&client_id=" + id + "&client_secret=" + secret, bearer: token, status: 400, code: "invalid_request", stillWorking: true},
		{name: "own with a wrong hint", token: token, form: "&token_type_hint=refresh_token", id: id, secret: secret, status: 200},
		{name: "revoked already", token: token, id: id, secret: secret, status: 200},
		{name: "revoked already, another's", token: token, id: otherID, secret: other, status: 400, code: "invalid_request"},
		{name: "own for another audience", token: elsewhere, id: id, secret: secret, status: 200},
		{name: "own as bearer", token: v.token(id, secret, ""), bearer: v.token(id, secret, ""), status: 200},
		{name: "another's with agents:write", token: v.token(id, secret, ""), id: writerID, secret: writer, status: 200},
		{name: "another's with agents:write in the token", token: v.token(id, secret, ""), bearer: v.bearer, status: 200},
		{name: "itself", token: otherToken, bearer: otherToken, status: 200},
		{name: "itself again", token: otherToken, bearer: otherToken, status: 401, code: "invalid_token"},
	} {
		form := "token=" + row.token + row.form
		var a answer
		if row.bearer != "" {
			a = v.bearerForm(row.bearer, "/revoke", form)
		} else {
			a = v.form(row.id, row.secret, "/revoke", form)
		}
		if a.status != row.status || a.code() != row.code {
			t.Errorf("%s: answered %v, want %d %s", row.name, a, row.status, row.code)
		}
		// Empty breaks two clients, 204 another.
		if row.status == 200 && (a.raw != "{}\n" || a.header.Get("Content-Type") != "application/json") {
			t.Errorf("%s: answered %v, want {} in JSON", row.name, a)
		}
		subject := token
		if !row.stillWorking {
			subject = row.token
		}
		if got := v.isActive(subject); got != row.stillWorking {
			t.Errorf("%s: then the token is active = %v, want %v", row.name, got, row.stillWorking)
		}
	}
	// The stores' clocks may be ahead of the one that the token's end is
	// compared with: a revocation must not end before its token.
	var margin time.Duration
	c := readClaims(t, token)
	if err := v.db.QueryRow(t.Context(), `select expires_at - $2::timestamptz from token_revocations where jti = $1`, c.ID, time.Unix(c.Expires, 0)).Scan(&margin); err != nil {
		t.Fatal(err)
	}
	if margin < time.Minute {
		t.Errorf("the revocation ends %v after its token, want a minute at least", margin)
	}
	events := v.want(v.api(v.bearer, "GET", "/audit?action=token.revoked&agentId="+id, ""), 200, "")
	outcomes := map[string]int{}
	for _, e := range events.body["data"].([]any) {
		outcomes[e.(map[string]any)["outcome"].(string)]++
	}
	// Five tokens of this agent were revoked, once each; three attempts of
	// others were refused.
	if fmt.Sprint(outcomes) != "map[failure:3 success:5]" {
		t.Errorf("the events of revoking are %v", outcomes)
	}
}

// Every state of a client against every path that it can take.
func TestEveryStateOnEveryPath(t *testing.T) {
	t.Parallel()
	v := newService(t)
	type client struct{ id, credentialID, secret, token string }
	probe := v.token(v.id, v.secret, "tokens:read") // some live token of another agent
	for _, row := range []struct {
		name    string
		arrange func(c *client)
		status  int // of what is done with the secret
		code    string
		alive   bool // the token
	}{
		{"active", func(*client) {}, 200, "", true},
		{"agent suspended", func(c *client) {
			v.want(v.api(v.bearer, "PATCH", "/agents/"+c.id, `{"status":"suspended"}`), 200, "")
		}, 403, "unauthorized_client", false},
		{"agent suspended and reactivated", func(c *client) {
			v.want(v.api(v.bearer, "PATCH", "/agents/"+c.id, `{"status":"suspended"}`), 200, "")
			v.want(v.api(v.bearer, "PATCH", "/agents/"+c.id, `{"status":"active"}`), 200, "")
		}, 200, "", true},
		{"agent decommissioned", func(c *client) {
			v.want(v.api(v.bearer, "DELETE", "/agents/"+c.id, ""), 204, "")
		}, 403, "unauthorized_client", false},
		{"agent suspended, then decommissioned", func(c *client) {
			v.want(v.api(v.bearer, "PATCH", "/agents/"+c.id, `{"status":"suspended"}`), 200, "")
			v.want(v.api(v.bearer, "PATCH", "/agents/"+c.id, `{"status":"decommissioned"}`), 200, "")
		}, 403, "unauthorized_client", false},
		{"credential revoked", func(c *client) {
			v.want(v.api(v.bearer, "DELETE", "/agents/"+c.id+"/credentials/"+c.credentialID, ""), 204, "")
		}, 401, "invalid_client", false},
		{"credential revoked, then agent suspended", func(c *client) {
			v.want(v.api(v.bearer, "DELETE", "/agents/"+c.id+"/credentials/"+c.credentialID, ""), 204, "")
			v.want(v.api(v.bearer, "PATCH", "/agents/"+c.id, `{"status":"suspended"}`), 200, "")
		}, 401, "invalid_client", false},
		{"credential revoked, agent suspended and reactivated", func(c *client) {
			v.want(v.api(v.bearer, "DELETE", "/agents/"+c.id+"/credentials/"+c.credentialID, ""), 204, "")
			v.want(v.api(v.bearer, "PATCH", "/agents/"+c.id, `{"status":"suspended"}`), 200, "")
			v.want(v.api(v.bearer, "PATCH", "/agents/"+c.id, `{"status":"active"}`), 200, "")
		}, 401, "invalid_client", false},
		{"credential expired", func(c *client) {
			v.setExpiry(c.credentialID, time.Now())
		}, 401, "invalid_client", false},
		{"secret replaced", func(c *client) {
			v.want(v.api(v.bearer, "POST", "/agents/"+c.id+"/credentials/"+c.credentialID+"/rotate", "{}"), 200, "")
		}, 401, "invalid_client", false},
		{"token revoked", func(c *client) {
			v.want(v.form(c.id, c.secret, "/revoke", "token="+c.token), 200, "")
		}, 200, "", false},
	} {
		c := &client{}
		c.id = v.newAgent("tokens:read", "resumes:read")
		c.credentialID, c.secret = v.quickCredential(c.id)
		c.token = v.token(c.id, c.secret, "")
		row.arrange(c)

		bearerStatus, bearerCode := 200, ""
		if !row.alive {
			bearerStatus, bearerCode = 401, "invalid_token"
		}
		for _, path := range []struct {
			name   string
			a      answer
			status int
			code   string
		}{
			{"secret at token", v.grant(c.id, c.secret, ""), row.status, row.code},
			{"secret in the form at token", v.form("", "", "", "grant_type=client_credentials&client_id="+c.id+"&client_secret="+c.secret), row.status, row.code},
			{"secret at introspect", v.form(c.id, c.secret, "/introspect", "token="+probe), row.status, row.code},
			{"secret at revoke", v.form(c.id, c.secret, "/revoke", "token=garbage"), row.status, row.code},
			{"bearer at introspect", v.bearerForm(c.token, "/introspect", "token="+probe), bearerStatus, bearerCode},
			{"bearer at revoke", v.bearerForm(c.token, "/revoke", "token=garbage"), bearerStatus, bearerCode},
		} {
			if path.a.status != path.status || path.a.code() != path.code {
				t.Errorf("%s: %s answered %v, want %d %s", row.name, path.name, path.a, path.status, path.code)
			}
		}
		if got := v.isAccepted(c.id, c.token); got != row.alive {
			t.Errorf("%s: a bearer route accepts the token = %v, want %v", row.name, got, row.alive)
		}
		if got := v.isActive(c.token); got != row.alive {
			t.Errorf("%s: the token is introspected as active = %v, want %v", row.name, got, row.alive)
		}
		// Whatever the state of a token, it can be revoked.
		if a := v.bearerForm(v.bearer, "/revoke", "token="+c.token); a.status != 200 {
			t.Errorf("%s: revoking the token answered %v, want 200", row.name, a)
		}
		if v.isActive(c.token) || v.isAccepted(c.id, c.token) {
			t.Errorf("%s: the token outlives its revocation", row.name)
		}
	}
}

// What one copy has acknowledged, every other copy acts upon with its next
// answer: the copies share nothing but the stores.
func TestRevocationReachesEveryCopy(t *testing.T) {
	t.Parallel()
	one := newService(t)
	two := one.another()
	type client struct{ id, credentialID, secret, token string }
	patch := func(c *client, status string) {
		one.want(one.api(one.bearer, "PATCH", "/agents/"+c.id, `{"status":"`+status+`"}`), 200, "")
	}
	var revoked []client
	for _, row := range []struct {
		name   string
		act    func(c *client)
		alive  bool // the token from before
		status int  // what the old secret gets
	}{
		{"token revoked", func(c *client) { one.want(one.form(c.id, c.secret, "/revoke", "token="+c.token), 200, "") }, false, 200},
		{"secret rotated", func(c *client) {
			a := one.want(one.api(one.bearer, "POST", "/agents/"+c.id+"/credentials/"+c.credentialID+"/rotate", "{}"), 200, "")
			// All of the old secret's tokens end, none of the new one's does.
			fresh := two.token(c.id, a.text("clientSecret"), "")
			for i, v := range []*service{one, two} {
				if !v.isActive(fresh) || !v.isAccepted(c.id, fresh) {
					t.Errorf("copy %d refuses the new secret's token", i+1)
				}
			}
		}, false, 401},
		{"credential revoked", func(c *client) {
			one.want(one.api(one.bearer, "DELETE", "/agents/"+c.id+"/credentials/"+c.credentialID, ""), 204, "")
		}, false, 401},
		{"agent suspended", func(c *client) { patch(c, "suspended") }, false, 403},
		{"agent suspended and reactivated", func(c *client) { patch(c, "suspended"); patch(c, "active") }, true, 200},
		{"agent reactivated and suspended again", func(c *client) { patch(c, "suspended"); patch(c, "active"); patch(c, "suspended") }, false, 403},
		{"agent decommissioned", func(c *client) { one.want(one.api(one.bearer, "DELETE", "/agents/"+c.id, ""), 204, "") }, false, 403},
	} {
		c := client{id: one.newAgent("resumes:read")}
		c.credentialID, c.secret = one.quickCredential(c.id)
		c.token = one.token(c.id, c.secret, "")
		sibling, siblingSecret := one.quickCredential(c.id) // of the same agent
		siblingToken := one.token(c.id, siblingSecret, "")
		if !two.isActive(c.token) || !two.isAccepted(c.id, c.token) || two.grant(c.id, c.secret, "").status != 200 {
			t.Fatalf("%s: the other copy does not know the client", row.name)
		}
		row.act(&c)
		if two.isAccepted(c.id, c.token) != row.alive || two.isActive(c.token) != row.alive {
			t.Errorf("%s: the other copy finds the token alive = %v, want %v", row.name, !row.alive, row.alive)
		}
		if a := two.grant(c.id, c.secret, ""); a.status != row.status {
			t.Errorf("%s: the other copy answered the secret with %v, want %d", row.name, a, row.status)
		}
		// Other credentials of the agent are hit only by what hits the agent.
		agentAlive := !strings.HasPrefix(row.name, "agent") || row.alive
		if two.isActive(siblingToken) != agentAlive {
			t.Errorf("%s: the other credential %s has an active token = %v, want %v", row.name, sibling, !agentAlive, agentAlive)
		}
		if !row.alive {
			revoked = append(revoked, c)
		}
	}
	// PostgreSQL holds the truth: Redis may forget it all.
	if err := one.rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	for i, v := range []*service{one, two} {
		for _, c := range revoked {
			if v.isActive(c.token) || v.isAccepted(c.id, c.token) {
				t.Errorf("copy %d accepts a revoked token after Redis was flushed", i+1)
			}
		}
		if !v.isActive(v.bearer) || !v.isAccepted(v.id, v.bearer) {
			t.Errorf("copy %d refuses a good token after Redis was flushed", i+1)
		}
	}
}

// A token that is being issued while its secret, credential or agent is
// revoked doesn't slip through: once both are answered, it is dead.
func TestNoTokenSlipsThroughARevocation(t *testing.T) {
	t.Parallel()
	v := newService(t)
	two := v.another()
	for _, row := range []struct {
		name string
		act  func(id, credentialID string) answer
	}{
		{"rotate", func(id, credentialID string) answer {
			return v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials/"+credentialID+"/rotate", "{}"), 200, "")
		}},
		{"revoke", func(id, credentialID string) answer {
			return v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+credentialID, ""), 204, "")
		}},
		{"suspend", func(id, credentialID string) answer {
			return v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
		}},
	} {
		id := v.newAgent("resumes:read")
		credentialID, secret := v.quickCredential(id)
		var mu sync.Mutex
		var tokens []string
		var wait sync.WaitGroup
		for _, copy := range []*service{v, two, v, two} {
			wait.Go(func() {
				for { // until the secret is refused
					a := copy.grant(id, secret, "")
					if a.status != 200 {
						return
					}
					mu.Lock()
					tokens = append(tokens, a.text("access_token"))
					mu.Unlock()
				}
			})
		}
		v.eventually("tokens are being issued", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(tokens) > 8
		})
		row.act(id, credentialID)
		wait.Wait()
		for _, token := range tokens[max(0, len(tokens)-40):] {
			if two.isActive(token) {
				t.Errorf("%s: one of %d tokens is still active", row.name, len(tokens))
				break
			}
		}
	}
}

// FuzzForm posts anything to the token endpoint: never a fault of ours, always
// JSON, never a token for nothing.
func FuzzForm(f *testing.F) {
	v := newService(f)
	id, secret := v.quickClient("resumes:read", "files:*")
	credentials := "client_id=" + id + "&client_secret=" + secret
	for _, seed := range []string{
		"", "&", "=", "&&==", ";", "%", "%zz", "%00=%00", "\x00", "\xff=\xfe", "grant_type", "grant_type=&grant_type=",
		"grant_type=client_credentials", "grant_type=client_credentials&scope=%00", "grant_type=client_credentials&scope=files:%2A+x",
		"grant_type=client_credentials&resource=https://a.example/%00", "grant_type=client_credentials&resource=%ff",
		"grant_type=client_credentials&resource=https://a.example&resource=urn:b", "grant_type=%C3%A9",
		"client_id=%00&client_secret=%00", "client_id=%ff&client_secret=" + secret, "client_id={" + id + "}&client_secret=" + secret,
		"scope=files:a+files:b&grant_type=client_credentials", "a[]=b", `{"grant_type":"client_credentials"}`,
	} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	f.Fuzz(func(t *testing.T, form string, known bool) {
		w := *v
		w.t = t // v's may not be used in here
		if known {
			form = credentials + "&" + form
		}
		a := w.do("POST", "/api/v1/token", form, "Content-Type", "application/x-www-form-urlencoded")
		switch {
		case a.status == http.StatusOK:
			if !known || a.text("access_token") == "" {
				t.Errorf("the form %q is worth %v", form, a)
			}
		case a.status < 400 || a.status >= 500 || a.text("error") == "" || a.text("error_description") == "":
			t.Errorf("the form %q answered %v, want a 4xx in JSON", form, a)
		}
		if a.body == nil {
			t.Errorf("the form %q answered no JSON: %v", form, a)
		}
	})
}
