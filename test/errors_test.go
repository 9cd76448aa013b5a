package test

import (
	"net/url"
	"strings"
	"testing"
	"time"
)

// An error says what was got and what is allowed, so that who meets it for the
// first time needs no other page. Each row is a mistake that newcomers make.
func TestErrorsTeach(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read", "scores:*")
	weak := v.token(id, secret, "")
	elsewhere := v.want(v.form(v.id, v.secret, "", "grant_type=client_credentials&resource=https://resumes.example.com"), 200, "").text("access_token")
	revoked := v.token(v.id, v.secret, "")
	v.want(v.form(v.id, v.secret, "/revoke", "token="+revoked), 200, "")
	expired := v.sign(claims{Issuer: v.url, Subject: id, Audience: audience{v.url}, ClientID: id, ID: newID(), CredentialID: newID(), SecretID: newID(), Expires: time.Now().Unix() - 1})
	suspended, unused := v.quickClient("resumes:read")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+suspended, `{"status":"suspended"}`), 200, "")

	basic, bearer := basicAuth(v.id, v.secret), "Bearer "+v.bearer
	agents, token := "POST /api/v1/agents", "POST /api/v1/token"
	for _, row := range []struct {
		name, request, authorization, kind, body string
		status                                   int
		says                                     []string
	}{
		{"JSON for a form", token, basic, "application/json", "{}", 400, []string{"x-www-form-urlencoded", "'application/json'"}},
		{"no Content-Type for a form", token, basic, "", "a=b", 400, []string{"x-www-form-urlencoded", "''"}},
		{"no grant", token, basic, formType, "", 400, []string{"body lacks grant_type=client_credentials"}},
		{"another grant", token, basic, formType, "grant_type=password", 400, []string{"must be client_credentials", "'password'"}},
		{"a form that is none", token, basic, formType, "grant_type=%zz", 400, []string{"name=value", "hex digits"}},
		{"a parameter twice", token, basic, formType, "scope=a&scope=b", 400, []string{"scope is there more than once"}},
		{"a scope with a quote", token, basic, formType, "grant_type=client_credentials&scope=%22a:b%22", 400, []string{"names like agents:read", "''a:b''"}},
		{"scopes that the agent lacks", token, basicAuth(id, secret), formType, "grant_type=client_credentials&scope=payroll:read", 400, []string{"'payroll:read'", "resumes:read scores:*"}},
		{"a resource that is none", token, basic, formType, "grant_type=client_credentials&resource=api.example.com", 400, []string{"absolute URI", "'api.example.com'"}},
		{"no client", token, "", formType, "grant_type=client_credentials", 401, []string{"HTTP Basic", "client_id and client_secret", "client_assertion", "not in the URL"}},
		{"a client by another scheme", token, bearer, formType, "grant_type=client_credentials", 401, []string{"HTTP Basic", "no other scheme"}},
		{"a client without base64", token, "Basic " + v.id + ":" + v.secret, formType, "grant_type=client_credentials", 401, []string{"base64 of client_id:client_secret"}},
		{"a wrong secret", token, basicAuth(v.id, "x"), formType, "grant_type=client_credentials", 401, []string{"agentId", "sk_live_", "revoked or expired"}},
		{"a secret twice", token, basic, formType, "client_secret=x", 400, []string{"authenticated twice", "one Authorization header", "client_id and client_secret", "client_assertion"}},
		{"a suspended client", token, basicAuth(suspended, unused), formType, "grant_type=client_credentials", 403, []string{"suspended", "active"}},
		{"no token to introspect", token + "/introspect", basic, formType, "access_token=x", 400, []string{"body lacks token="}},
		{"introspection without its scope", token + "/introspect", basicAuth(id, secret), formType, "token=x", 403, []string{"scope tokens:read", "resumes:read scores:*"}},
		{"another's token", token + "/revoke", basicAuth(id, secret), formType, "token=" + v.bearer, 400, []string{"another client", "agents:write"}},

		{"no token", "GET /api/v1/agents", "", "", "", 401, []string{"Authorization: Bearer TOKEN", "POST /api/v1/token", "not in the URL"}},
		{"a secret for a token", "GET /api/v1/agents", "Bearer " + v.secret, "", "", 401, []string{"client_secret, and no token", "POST /api/v1/token"}},
		{"a token cut short", "GET /api/v1/agents", bearer[:len(bearer)-9], "", "", 401, []string{"whole"}},
		{"a token for others", "GET /api/v1/agents", "Bearer " + elsewhere, "", "", 401, []string{"for https://resumes.example.com", v.url}},
		{"an expired token", "GET /api/v1/agents", "Bearer " + expired, "", "", 401, []string{"expired at 20"}},
		{"a revoked token", "GET /api/v1/agents", "Bearer " + revoked, "", "", 401, []string{"is revoked"}},
		{"a token without the scope", "GET /api/v1/agents", "Bearer " + weak, "", "", 403, []string{"scope agents:read", "resumes:read scores:*"}},

		{"a form for JSON", agents, bearer, formType, "email=a", 415, []string{"application/json", "'" + formType + "'"}},
		{"no body", agents, bearer, "application/json", "", 400, []string{"one JSON object", "is empty"}},
		{"a comma too many", agents, bearer, "application/json", `{"email":"a",}`, 400, []string{"JSON after byte 13"}},
		{"a name twice", agents, bearer, "application/json", `{"email":"a","email":"b"}`, 400, []string{"has email twice"}},
		{"no end", agents, bearer, "application/json", `{"email":"a"`, 400, []string{"closing }"}},
		{"a field of another name", agents, bearer, "application/json", `{"agent_type":"custom"}`, 400, []string{`"agent_type":"is not known here; there are email, agentType`, `"agentType":"is missing"`}},
		{"values that are wrong", agents, bearer, "application/json", `{"email":null,"agentType":"Custom","version":1,"capabilities":[5],"deploymentEnv":"prod","owner":""}`, 400,
			[]string{"address of at most 255 characters; it was null", "router, monitor, custom; it was 'Custom'", "like 1.2.3", "it was 1\"", "resource:action", "it was [5]", "production; it was 'prod'", "it was ''"}},
		{"a scope that the caller lacks", agents, "Bearer " + v.token(v.id, v.secret, "agents:write"), "application/json", agentJSON("a@example.com", "audit:read"), 403, []string{"lacks audit:read"}},
		{"nothing to change", "PATCH /api/v1/agents/" + id, bearer, "application/json", "{}", 400, []string{"at least one field"}},
		{"a day for a time", "POST /api/v1/agents/" + id + "/credentials", bearer, "application/json", `{"expiresAt":"2030-01-01"}`, 400, []string{"like 2030-01-01T00:00:00Z; it was '2030-01-01'"}},
		{"a secret for who is suspended", "POST /api/v1/agents/" + suspended + "/credentials", bearer, "application/json", "{}", 403, []string{"suspended", "active"}},
		{"an id that is none", "GET /api/v1/agents/first", bearer, "", "", 404, []string{"UUIDs in lower case"}},
		{"too much at once", "GET /api/v1/agents?limit=1000", bearer, "", "", 400, []string{"from 1 to 100; it was '1000'"}},
		{"a plus that is a space", "GET /api/v1/audit?fromDate=2026-03-28T09:00:00+01:00", bearer, "", "", 400, []string{"it was '2026-03-28T09:00:00 01:00'"}},
		{"another method", "PUT /api/v1/agents/" + id, bearer, "application/json", "{}", 405, []string{"DELETE, GET, HEAD, PATCH", "not PUT"}},
		{"another path", "POST /oauth/token", basic, formType, "grant_type=client_credentials", 404, []string{"nothing at this path", "/openapi.yaml"}},
	} {
		method, path, _ := strings.Cut(row.request, " ")
		var header []string
		if row.authorization != "" {
			header = append(header, "Authorization", row.authorization)
		}
		if row.kind != "" {
			header = append(header, "Content-Type", row.kind)
		}
		a := v.do(method, path, row.body, header...)
		if a.status != row.status {
			t.Errorf("%s: answered %v, want %d", row.name, a, row.status)
		}
		for _, piece := range row.says {
			if !strings.Contains(a.raw, piece) && !strings.Contains(a.raw, strings.ReplaceAll(piece, `"`, `\"`)) {
				t.Errorf("%s: answered %v, want it to say %q", row.name, a, piece)
			}
		}
	}
}

// What is repeated of a request is never a secret or a token, wherever somebody
// has put it by mistake.
func TestErrorsRepeatNoSecret(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for _, canary := range []string{v.secret, v.bearer, "Bearer " + v.bearer, `{"secret":"` + v.secret + `"}`} {
		q, inJSON := url.QueryEscape(canary), strings.ReplaceAll(canary, `"`, `\"`)
		for _, a := range []answer{
			v.form(v.id, v.secret, "", "grant_type="+q),
			v.form(v.id, v.secret, "", "grant_type=client_credentials&scope="+q),
			v.form(v.id, v.secret, "", "grant_type=client_credentials&resource="+q),
			v.form(v.id, v.secret, "", q+"=1&"+q+"=2"),
			v.form("", "", "", "grant_type=client_credentials&client_id="+q),
			v.form(canary, canary, "", "grant_type=client_credentials"),
			v.do("POST", "/api/v1/token", "x", "Content-Type", canary, "Authorization", basicAuth(v.id, v.secret)),
			v.do("POST", "/api/v1/token", "grant_type=client_credentials", "Content-Type", formType, "Authorization", canary),
			v.do("POST", "/api/v1/agents", "{}", "Content-Type", canary, "Authorization", "Bearer "+v.bearer),
			v.do("GET", "/api/v1/agents", "", "Authorization", "Token "+canary),
			v.do("GET", "/api/v1/agents", "", "Authorization", "Bearer "+canary+"x"),
			v.api(v.bearer, "POST", "/agents", `{"`+inJSON+`":1}`),
			v.api(v.bearer, "POST", "/agents", `{"`+inJSON+`":1,"`+inJSON+`":2}`),
			v.api(v.bearer, "POST", "/agents", `{"email":"`+inJSON+`","capabilities":["`+inJSON+`"]}`),
			v.api(v.bearer, "GET", "/agents?status="+q, ""),
			v.api(v.bearer, "GET", "/agents?"+q+"=1", ""),
			v.api(v.bearer, "GET", "/agents/"+url.PathEscape(canary)+"/x", ""),
			v.api(v.bearer, "GET", "/audit?cursor="+q, ""),
			v.do("GET", "/"+url.PathEscape(canary), ""),
		} {
			said := a.raw + a.header.Get("WWW-Authenticate")
			if a.status < 400 || a.status >= 500 || strings.Contains(said, v.secret[:24]) || strings.Contains(said, v.bearer[:24]) {
				t.Errorf("%.20q is repeated in %v %s, or is no error", canary, a, a.header)
			}
		}
	}
}
