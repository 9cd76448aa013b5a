package test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"
)

// What agents:write allows an agent beside its capabilities: limits of its own, where
// its tokens may go, who may act for it, and whether its tokens are bound to a key.

// allowances are the fields, with one value of each that is right, and the agent's
// own answer to what it is without.
var allowances = map[string][2]string{
	"rateLimit": {"7", "null"}, "monthlyTokenLimit": {"3", "null"}, "tokenTtl": {"90", "null"}, "resources": {`["https://a.example.com"]`, "[]"},
	"delegates":     {`["01a22c3d-19a8-758e-a419-ee2ad0f8fe2c","01a22c3d-1a58-72fe-b7ad-12fc2670a23d"]`, "[]"},
	"proofRequired": {"true", "false"},
}

func (v *service) allow(id, field, value string) answer {
	v.t.Helper()
	return v.api(v.bearer, "PATCH", "/agents/"+id, fmt.Sprintf(`{"%s": %s}`, field, value))
}

func TestAllowancesAreKeptShownAndRecorded(t *testing.T) {
	t.Parallel()
	v := newService(t)
	shown := func(a answer, field, want string) {
		t.Helper()
		if !strings.Contains(a.raw, fmt.Sprintf(`"%s":%s`, field, want)) {
			t.Errorf("%s is not %s in %v", field, want, a)
		}
	}
	for field, values := range allowances {
		registered := v.want(v.api(v.bearer, "POST", "/agents", fmt.Sprintf(`{"email":"%s@example.com","agentType":"custom","version":"1.0.0",
			"capabilities":["a:b"],"owner":"o","deploymentEnv":"staging","%s":%s}`, strings.ToLower(field), field, values[0])), 201, "")
		shown(registered, field, values[0])
		id := v.newAgent("a:b")
		shown(v.want(v.api(v.bearer, "GET", "/agents/"+id, ""), 200, ""), field, values[1])
		shown(v.want(v.allow(id, field, values[0]), 200, ""), field, values[0])
		for other := range allowances { // changes nothing else
			if other != field {
				shown(v.want(v.allow(id, other, allowances[other][1]), 200, ""), field, values[0])
			}
		}
		shown(v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"owner":"p"}`), 200, ""), field, values[0])
		shown(v.want(v.allow(id, field, values[1]), 200, ""), field, values[1])
		page := v.audit("agentId=" + id + "&action=agent.updated&limit=1")
		if want := fmt.Sprintf(`{"%s":%s}`, field, values[1]); !strings.Contains(string(page.Data[0].Metadata), `"changes":`+want) {
			t.Errorf("the event says %s, want %s", page.Data[0].Metadata, want)
		}
	}
	id := v.newAgent("a:b")
	v.want(v.allow(id, "delegates", `["`+strings.Join(manyIDs(64), `","`)+`"]`), 200, "")
	for field, values := range map[string][]string{
		"rateLimit":         {"-1", "1.5", "1e7", `"5"`, "true", "[]"},
		"monthlyTokenLimit": {"-1", "0.1", "1e10", `"5"`, "{}"},
		"proofRequired":     {"null", `"true"`, "1", "0", "[]", "{}", `""`, "[true]"},
		"tokenTtl":          {"0", "-1", "86401", `"1h"`, "1.5"},
		"resources": {"null", `"https://a.example.com"`, `[1]`, `[null]`, `["a"]`, `["https://a.example.com#b"]`, `["https://a.example.com","https://a.example.com"]`,
			`["https://a.example.com/` + strings.Repeat("x", 2048) + `"]`, `["x:` + strings.Repeat(`","x:`, 16) + `"]`},
		"delegates": {"null", `"` + id + `"`, `[1]`, `[null]`, `[""]`, `["first@example.com"]`, `["*"]`, `["` + strings.ToUpper(id) + `"]`, `["` + id + `","` + id + `"]`,
			`["` + id[:35] + `"]`, `["` + strings.Join(manyIDs(65), `","`) + `"]`},
	} {
		for _, value := range values {
			if a := v.allow(id, field, value); a.status != 400 || !strings.Contains(a.raw, `"`+field+`":"must be`) {
				t.Errorf("%s %s: %v, want 400 that names it", field, value, a)
			}
		}
	}
	v.want(v.allow(id, "delegates", `["`+strings.Join(newIDs(64), `","`)+`"]`), 200, "")
}

func newIDs(n int) (list []string) {
	for range n {
		list = append(list, newID())
	}
	return list
}

func manyIDs(n int) (list []string) {
	for range n {
		list = append(list, newID())
	}
	return list
}

func TestNobodyAllowsItselfMore(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent(agentsWrite, credentialsWrite)
	self := v.bearerOf(id, agentsWrite+" "+credentialsWrite)
	narrow := v.bearerOf(id, credentialsWrite)
	for field, values := range allowances {
		for _, value := range values {
			body := fmt.Sprintf(`{"owner": "o", "%s": %s}`, field, value)
			v.want(v.api(self, "PATCH", "/agents/"+id, body), 403, "FORBIDDEN")
			v.want(v.api(narrow, "PATCH", "/agents/"+id, body), 403, "FORBIDDEN")
		}
	}
	v.want(v.api(self, "PATCH", "/agents/"+id, `{"owner": "another"}`), 200, "") // the rest is its own to change
	if n := v.count(`select count(*) from agents where agent_id = $1 and resources = '{}' and delegates = '{}' and not proof_required and owner = 'another'
		and coalesce(rate_limit, monthly_token_limit, token_ttl) is null`, id); n != 1 {
		t.Error("the agent was changed")
	}
}

// Each of its windows has the agent's own limit, on every copy and from the next
// request on; nobody else's has.
func TestAgentHasItsOwnRateLimit(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "20")
	w := v.another()
	id, secret := v.newClient("a:b", tokensRead)
	other := v.newAgent("a:b")
	token := v.token(id, secret, "")
	calls := map[string]func(v *service) answer{
		"token":                func(v *service) answer { return v.api(token, "GET", "/agents/"+id, "") },
		"secret":               func(v *service) answer { return v.form(id, secret, "", "grant_type=client_credentials") },
		"introspect by token":  func(v *service) answer { return v.bearerForm(token, "/introspect", "token=x") },
		"introspect by secret": func(v *service) answer { return v.form(id, secret, "/introspect", "token=x") },
	}
	calls["secret"](w) // so that none has to compare it again
	for _, own := range []struct {
		limit       string
		made, admit int
		header      string
	}{{"4", 12, 4, "4"}, {"30", 40, 30, "30"}, {"0", 40, 40, ""}, {"null", 40, 20, "20"}} {
		v.want(v.allow(id, "rateLimit", own.limit), 200, "")
		for name, call := range calls {
			v.forget()
			got := atOnce(own.made, func(i int) answer { return call([]*service{v, w}[i%2]) })
			if got[200] != own.admit || got[200]+got[429] != own.made {
				t.Errorf("%s with the limit %s: of %d requests %v, want %d let through", name, own.limit, own.made, got, own.admit)
			}
		}
		v.forget()
		if header := calls["token"](v).header.Get("X-RateLimit-Limit"); header != own.header {
			t.Errorf("the header says %q of the limit %s, want %q", header, own.limit, own.header)
		}
		if header := v.api(v.bearerOf(other, ""), "GET", "/agents/"+other, "").header.Get("X-RateLimit-Limit"); header != "20" {
			t.Errorf("another agent has the limit %q, want the deployment's", header)
		}
	}
}

func TestAgentHasItsOwnQuotaAndLifetime(t *testing.T) {
	t.Parallel()
	v := newService(t, "MONTHLY_TOKEN_LIMIT", "5", "RATE_LIMIT_PER_MINUTE", "0", "TOKEN_TTL", "10m")
	id, secret := v.newClient("a:b")
	issue := func() answer { return v.form(id, secret, "", "grant_type=client_credentials") }
	v.want(v.allow(id, "monthlyTokenLimit", "3"), 200, "")
	if got := atOnce(8, func(int) answer { return issue() }); got[200] != 3 || got[403] != 5 {
		t.Errorf("with a quota of 3: %v", got)
	}
	if a := issue(); !strings.Contains(a.raw, "quota of 3 tokens") {
		t.Errorf("%v doesn't say how many there are", a)
	}
	v.want(v.allow(id, "monthlyTokenLimit", "null"), 200, "") // what was spent counts
	if got := atOnce(6, func(int) answer { return issue() }); got[200] != 2 || got[403] != 4 {
		t.Errorf("with the deployment's quota of 5, of which 3 are spent: %v", got)
	}
	v.want(v.allow(id, "monthlyTokenLimit", "0"), 200, "")
	if got := atOnce(6, func(int) answer { return issue() }); got[200] != 6 {
		t.Errorf("without a quota: %v", got)
	}
	for ttl, want := range map[string]float64{"90": 90, "86400": 86400, "1": 1, "null": 600} {
		v.want(v.allow(id, "tokenTtl", ttl), 200, "")
		a := issue()
		var c claims
		if err := json.Unmarshal([]byte(readPart(t, a.text("access_token"), 1)), &c); err != nil {
			t.Fatal(err)
		}
		if a.body["expires_in"] != want || c.Expires-c.IssuedAt != int64(want) {
			t.Errorf("with tokenTtl %s a token lives %v seconds, and from %d to %d", ttl, a.body["expires_in"], c.IssuedAt, c.Expires)
		}
	}
	// No token outlives its credential, whatever the agent's lifetime is.
	v.want(v.allow(id, "tokenTtl", "86400"), 200, "")
	var credentialID string
	if err := v.db.QueryRow(t.Context(), `select credential_id::text from credentials where client_id = $1`, id).Scan(&credentialID); err != nil {
		t.Fatal(err)
	}
	v.setExpiry(credentialID, time.Now().Add(time.Minute))
	if left := issue().body["expires_in"].(float64); left > 60 {
		t.Errorf("a token lives %v s, longer than its credential", left)
	}
}

func TestTokensGoOnlyWhereTheyMay(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.newClient("a:b", agentsRead)
	const a, b = "https://a.example.com", "https://b.example.com/x"
	us := v.env["ISSUER"]
	ask := func(resources ...string) answer {
		return v.form(id, secret, "", url.Values{"grant_type": {"client_credentials"}, "resource": resources}.Encode())
	}
	for _, row := range []struct {
		allowed, name string
		asked         []string
		ok            bool
	}{
		{`[]`, "any is any", []string{a, b, us}, true},
		{`["` + a + `"]`, "the one", []string{a}, true},
		{`["` + a + `"]`, "us, by asking for nothing", nil, false},
		{`["` + a + `"]`, "us by name", []string{us}, false},
		{`["` + a + `"]`, "another beside it", []string{a, b}, false},
		{`["` + a + `"]`, "with a slash", []string{a + "/"}, false},
		{`["` + a + `"]`, "a part", []string{"https://a.example"}, false},
		{`["` + a + `"]`, "a longer one", []string{a + ".evil.example.com"}, false},
		{`["` + a + `"]`, "in capitals", []string{"https://A.example.com"}, false},
		{`["` + a + `","` + b + `"]`, "both", []string{b, a}, true},
		{`["` + us + `"]`, "us where that is allowed", nil, true},
		{`["` + us + `"]`, "another than us", []string{a}, false},
	} {
		v.want(v.allow(id, "resources", row.allowed), 200, "")
		got := ask(row.asked...)
		if row.ok {
			v.want(got, 200, "")
		} else if got.status != 400 || got.code() != "invalid_target" || !strings.Contains(got.raw, strings.Trim(row.allowed, `[]"`)) {
			t.Errorf("of %s, %s: %v, want 400 invalid_target that names what is allowed", row.allowed, row.name, got)
		}
	}
	n := v.count(`select count(*) from audit_events where action = 'token.issued' and agent_id = $1`, id)
	if n != 4 {
		t.Errorf("%d tokens are in the log, want those 4", n)
	}
}
