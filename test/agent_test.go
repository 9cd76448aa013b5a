package test

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// agentWith is the body of a good registration but for these changes; nil
// leaves a field out.
func agentWith(changes map[string]any) string {
	fields := map[string]any{
		"email": fmt.Sprintf("with%d@example.com", agentNumber.Add(1)), "agentType": "screener", "version": "1.0.0",
		"capabilities": []string{"resumes:read"}, "owner": "team", "deploymentEnv": "staging",
	}
	maps.Copy(fields, changes)
	maps.DeleteFunc(fields, func(_ string, value any) bool { return value == nil })
	b, _ := json.Marshal(fields)
	return string(b)
}

// detailNames are the fields that an error complains about.
func detailNames(a answer) string {
	details, _ := a.body["details"].(map[string]any)
	return strings.Join(slices.Sorted(maps.Keys(details)), " ")
}

// tally sends n requests at the same time and counts the kinds of answers.
func tally(n int, send func(i int) answer) map[string]int {
	var mu sync.Mutex
	var all sync.WaitGroup
	kinds, start := map[string]int{}, make(chan struct{})
	for i := range n {
		all.Go(func() {
			<-start
			a := send(i)
			mu.Lock()
			defer mu.Unlock()
			kinds[strings.TrimSpace(fmt.Sprintf("%d %s", a.status, a.code()))]++
		})
	}
	close(start)
	all.Wait()
	return kinds
}

// bearerOf signs a token of an agent, which saves the time of asking for one.
func (v *service) bearerOf(agentID, scope string) string {
	v.t.Helper()
	credentialID := newID()
	return v.tokenOf(agentID, credentialID, v.secretOf(agentID, credentialID), scope)
}

// tokenOf signs a token as the token endpoint would.
func (v *service) tokenOf(agentID, credentialID, secretID, scope string) string {
	v.t.Helper()
	now := time.Now().Unix()
	return v.sign(claims{
		Issuer: v.env["ISSUER"], Subject: agentID, Audience: audience{v.env["ISSUER"]}, ClientID: agentID, Scope: scope,
		ID: newID(), IssuedAt: now, Expires: now + 3600, CredentialID: credentialID, SecretID: secretID,
	})
}

// count asks the database for a number.
func (v *service) count(sql string, args ...any) (n int) {
	v.t.Helper()
	if err := v.db.QueryRow(v.t.Context(), sql, args...).Scan(&n); err != nil {
		v.t.Fatal(err)
	}
	return n
}

func TestAgentIsServedAsItWasRegistered(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("resumes:read")
	own := v.bearerOf(id, "resumes:read")
	a := v.want(v.api(v.bearer, "POST", "/agents", `{"email":"One.Agent+x@Example.com","agentType":"classifier",
		"version":"1.2.3-rc.1+build.5","capabilities":["resumes:*","mails.in:send_all-1"],"owner":"Équipe 猫",
		"deploymentEnv":"development"}`), 201, "")
	newer := a.text("agentId")
	fields := "agentId agentType capabilities createdAt delegates deploymentEnv email monthlyTokenLimit owner proofRequired rateLimit resources status tokenTtl updatedAt version"
	if got := strings.Join(slices.Sorted(maps.Keys(a.body)), " "); got != fields {
		t.Errorf("an agent has the fields %q, want %q", got, fields)
	}
	for name, want := range map[string]string{
		"email": "One.Agent+x@Example.com", "agentType": "classifier", "version": "1.2.3-rc.1+build.5",
		"capabilities": "[resumes:* mails.in:send_all-1]", "owner": "Équipe 猫", "deploymentEnv": "development",
		"status": "active",
	} {
		if got := fmt.Sprint(a.body[name]); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(newer) {
		t.Errorf("agentId = %q, want a lower-case UUID of version 7", newer)
	}
	for _, name := range []string{"createdAt", "updatedAt"} {
		at, err := time.Parse("2006-01-02T15:04:05.000Z", a.text(name))
		if err != nil || time.Since(at).Abs() > time.Minute {
			t.Errorf("%s = %q, want now in UTC with milliseconds", name, a.text(name))
		}
	}

	for _, row := range []struct {
		name, bearer, path string
		status             int
		code               string
	}{
		{"by agents:read", v.bearer, newer, 200, ""},
		{"itself without agents:read", own, id, 200, ""},
		{"another without agents:read", own, newer, 403, "FORBIDDEN"},
		{"unknown without agents:read", own, newID(), 403, "FORBIDDEN"},
		{"unknown", v.bearer, newID(), 404, "AGENT_NOT_FOUND"},
		{"in upper case", v.bearer, strings.ToUpper(newer), 404, "AGENT_NOT_FOUND"},
		{"itself in upper case", own, strings.ToUpper(id), 403, "FORBIDDEN"},
		{"without hyphens", v.bearer, strings.ReplaceAll(newer, "-", ""), 404, "AGENT_NOT_FOUND"},
		{"no UUID", v.bearer, "1", 404, "AGENT_NOT_FOUND"},
		{"no token", "", newer, 401, "UNAUTHORIZED"},
	} {
		t.Run(row.name, func(t *testing.T) {
			got := v.api(row.bearer, "GET", "/agents/"+row.path, "")
			if got.status != row.status || got.code() != row.code {
				t.Errorf("GET /agents/%s = %v, want %d %s", row.path, got, row.status, row.code)
			}
			if row.path == newer && row.status == 200 && got.raw != a.raw {
				t.Errorf("GET /agents/%s = %s, want %s", row.path, got.raw, a.raw)
			}
			// RFC 6750, section 3.1
			challenge := got.header.Get("WWW-Authenticate")
			if row.status == 403 && (!strings.Contains(challenge, `error="insufficient_scope"`) || !strings.Contains(challenge, `scope="agents:read"`)) {
				t.Errorf("WWW-Authenticate = %q, want it to name the scope that is missing", challenge)
			}
		})
	}
	// What changes agents needs agents:write, whoever it is about.
	for _, row := range []struct{ method, path, body string }{
		{"POST", "", agentWith(nil)}, {"GET", "", ""}, {"PATCH", "/" + id, `{"owner":"me"}`}, {"DELETE", "/" + id, ""},
	} {
		a := v.want(v.api(own, row.method, "/agents"+row.path, row.body), 403, "FORBIDDEN")
		scope := map[bool]string{true: "agents:read", false: "agents:write"}[row.method == "GET"]
		if !strings.Contains(a.header.Get("WWW-Authenticate"), `scope="`+scope+`"`) {
			t.Errorf("%s: WWW-Authenticate = %q, want it to name %s", row.method, a.header.Get("WWW-Authenticate"), scope)
		}
	}
}

func TestBadAgentRequestIsRefusedWithAllItsFaults(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("resumes:read")
	const all = "agentType capabilities deploymentEnv email owner version"
	field := func(name string, value any) string { return agentWith(map[string]any{name: value}) }
	capable := func(list ...any) string { return field("capabilities", list) }
	many := make([]any, 65)
	for i := range many {
		many[i] = fmt.Sprintf("resumes:read%d", i)
	}
	long := strings.Repeat("x", 300)
	type row struct{ name, body, faults string } // faults "": the body is none
	post := []row{
		{"no field", `{}`, all},
		{"every field wrong", `{"email":"x","agentType":"x","version":"x","capabilities":["x"],"owner":"","deploymentEnv":"x"}`, all},
		{"every field of the wrong type", `{"email":1,"agentType":[],"version":{},"capabilities":"x","owner":true,"deploymentEnv":1.5}`, all},
		{"every field null", `{"email":null,"agentType":null,"version":null,"capabilities":null,"owner":null,"deploymentEnv":null}`, all},
		{"known and unknown fields", agentWith(map[string]any{"email": "x", "colour": 1, "a\"b\n": 1}), `a'b? colour email`},

		{"no email", field("email", nil), "email"},
		{"no agentType", field("agentType", nil), "agentType"},
		{"no version", field("version", nil), "version"},
		{"no capabilities", field("capabilities", nil), "capabilities"},
		{"no owner", field("owner", nil), "owner"},
		{"no deploymentEnv", field("deploymentEnv", nil), "deploymentEnv"},

		{"email without @", field("email", "example.com"), "email"},
		{"email without a name", field("email", "@example.com"), "email"},
		{"email without a host", field("email", "a@"), "email"},
		{"email with two @", field("email", "a@b@example.com"), "email"},
		{"email with a space", field("email", "a b@example.com"), "email"},
		{"email with a new line behind", field("email", "a@example.com\n"), "email"},
		{"email with a name of its owner", field("email", "A <a@example.com>"), "email"},
		{"email with two dots", field("email", "a@example..com"), "email"},
		{"email with a hyphen before its host", field("email", "a@-example.com"), "email"},
		{"email beyond ASCII", field("email", "ä@example.com"), "email"},
		{"email with NUL", field("email", "a\x00@example.com"), "email"},
		{"email of 256 characters", field("email", strings.Repeat("x", 244)+"@example.com"), "email"},

		{"agentType in another case", field("agentType", "Screener"), "agentType"},
		{"agentType with a space", field("agentType", "screener "), "agentType"},
		{"deploymentEnv cut short", field("deploymentEnv", "prod"), "deploymentEnv"},

		{"version with a v", field("version", "v1.0.0"), "version"},
		{"version of two numbers", field("version", "1.0"), "version"},
		{"version with a leading zero", field("version", "1.01.0"), "version"},
		{"version with an empty pre-release", field("version", "1.0.0-"), "version"},
		{"version with an empty build", field("version", "1.0.0+"), "version"},
		{"version with a new line behind", field("version", "1.0.0\n"), "version"},
		{"version of 65 characters", field("version", "1.0.0-"+long[:59]), "version"},

		{"empty owner", field("owner", ""), "owner"},
		{"owner of spaces", field("owner", "  "), "owner"},
		{"owner of 129 characters", field("owner", strings.Repeat("é", 129)), "owner"},
		{"owner with a new line", field("owner", "a\nb"), "owner"},
		{"owner with an escape character", field("owner", "\x1b[2J"), "owner"},
		{"owner with NUL", field("owner", "a\x00b"), "owner"},

		{"no capability", capable(), "capabilities"},
		{"65 capabilities", capable(many...), "capabilities"},
		{"capability without an action", capable("resumes"), "capabilities"},
		{"capability with an empty action", capable("resumes:"), "capabilities"},
		{"capability with an empty resource", capable(":read"), "capabilities"},
		{"capability with two colons", capable("resumes:read:all"), "capabilities"},
		{"capability in upper case", capable("Resumes:read"), "capabilities"},
		{"capability of any resource", capable("*:read"), "capabilities"},
		{"capability with more than a star", capable("resumes:re*"), "capabilities"},
		{"capability with a space", capable("resumes:read agents:write"), "capabilities"},
		{"capability with a new line behind", capable("agents:write\n"), "capabilities"},
		{"capability with a dot before", capable(".resumes:read"), "capabilities"},
		{"capability of 101 characters", capable("resumes:" + long[:93]), "capabilities"},
		{"capabilities of 4,097 characters", capable(wide(41, 97)...), "capabilities"},
		{"capability twice", capable("resumes:read", "mails:send", "resumes:read"), "capabilities"},
		{"capability that is a number", capable(1), "capabilities"},
		{"capability that is null", capable("resumes:read", nil), "capabilities"},
		{"any action of agents", capable("agents:*"), "capabilities"},
		{"any action of tokens", capable("tokens:*"), "capabilities"},
		{"any action of audit", capable("resumes:read", "audit:*"), "capabilities"},
		{"any action of credentials", capable("credentials:*"), "capabilities"},

		{"status is not for the caller", field("status", "active"), "status"},
		{"agentId is not for the caller", field("agentId", newID()), "agentId"},
		{"createdAt is not for the caller", field("createdAt", "2026-01-01T00:00:00.000Z"), "createdAt"},
		{"updatedAt is not for the caller", field("updatedAt", "2026-01-01T00:00:00.000Z"), "updatedAt"},
		{"a name in another case", agentWith(map[string]any{"owner": nil, "Owner": "team"}), "Owner owner"},
		{"a name in two cases", agentWith(map[string]any{"OWNER": "team"}), "OWNER"},
		{"a name that holds two", agentWith(map[string]any{`owner":"x","status`: "active"}), `owner':'x','status`},
		{"a name with a space", agentWith(map[string]any{"owner ": "team"}), "owner "},
	}
	patch := []row{
		{"no field", `{}`, "body"},
		{"a name that holds two", `{"owner\":\"x\",\"status":"active"}`, `owner':'x','status`},
		{"a name that holds two beside a good one", `{"owner":"x","owner\":\"x\",\"status":"active"}`, `owner':'x','status`},
		{"email is for ever", `{"email":"new@example.com"}`, "email"},
		{"email is for ever, also beside others", `{"email":"new@example.com","owner":"team"}`, "email"},
		{"agentId is for ever", `{"agentId":"` + newID() + `"}`, "agentId"},
		{"createdAt is for ever", `{"createdAt":"2026-01-01T00:00:00.000Z"}`, "createdAt"},
		{"every field wrong", `{"agentType":"x","version":"1","capabilities":[],"owner":" ","deploymentEnv":"x","status":"gone"}`,
			"agentType capabilities deploymentEnv owner status version"},
		{"every field null", `{"agentType":null,"version":null,"capabilities":null,"owner":null,"deploymentEnv":null,"status":null}`,
			"agentType capabilities deploymentEnv owner status version"},
		{"null beside a good field", `{"owner":"team","status":null}`, "status"},
		{"status in another case", `{"status":"Active"}`, "status"},
		{"any action of agents", `{"capabilities":["agents:*"]}`, "capabilities"},
		{"any action of credentials", `{"capabilities":["resumes:read","credentials:*"]}`, "capabilities"},
		{"capability twice", `{"capabilities":["a:b","a:b"]}`, "capabilities"},
		{"a name in another case", `{"Status":"suspended"}`, "Status"},
	}
	good := agentWith(nil)
	both := []row{
		{"nothing", "", ""},
		{"null", `null`, ""},
		{"array", "[" + good + "]", ""},
		{"text", `"agent"`, ""},
		{"number", `1`, ""},
		{"cut short", good[:len(good)-1], ""},
		{"cut short in text", good[:len(good)-3], ""},
		{"a second object", good + good, ""},
		{"a second value after a space", good + " null", ""},
		{"a bracket too much", good + "}", ""},
		{"a comment", good + "// good", ""},
		{"a byte order mark", "\ufeff" + good, ""},
		{"a name twice", `{"owner":"other",` + good[1:], ""},
		{"a name twice, once escaped", `{"\u006fwner":"other",` + good[1:], ""},
		{"a name twice, both unknown", `{"x":1,"x":1}`, ""},
		{"a name twice, in an object", `{"resources":{"a":1,"a":2},` + good[1:], ""},
		{"a name twice, in an object of a list", `{"resources":[1,{"a":1,"b":[{}],"\u0061":2}],` + good[1:], ""},
		{"a list that has no end", `{"resources":[1,` + good[1:], ""},
		{"no UTF-8 in a value", strings.Replace(good, "team", "te\xffam", 1), ""},
		{"no UTF-8 in a name", `{"own` + "\xc3" + `er":"x"}`, ""},
		{"no UTF-8 that is overlong", strings.Replace(good, "team", "\xc0\x80", 1), ""},
		{"no UTF-8 that is a surrogate", strings.Replace(good, "team", "\xed\xa0\x80", 1), ""},
		{"NUL as it is", strings.Replace(good, "team", "te\x00am", 1), ""},
		{"NUL between names", good[:1] + "\x00" + good[1:], ""},
		{"single quotes", strings.ReplaceAll(good, `"`, `'`), ""},
		{"a comma too much", good[:len(good)-1] + ",}", ""},
		{"nested too deep", `{"owner":` + strings.Repeat("[", 12000) + `}`, ""},
	}
	before, events := v.count(`select count(*) from agents`), v.count(`select count(*) from audit_events`)
	try := func(method, path string, rows []row) {
		for _, row := range rows {
			t.Run(method+" "+row.name, func(t *testing.T) {
				a := v.do(method, "/api/v1"+path, row.body, "Authorization", "Bearer "+v.bearer, "Content-Type", "application/json")
				names := detailNames(a)
				if row.faults != "body" { // which may say beside it that nothing is left
					names = strings.TrimSpace(strings.Replace(" "+names+" ", " body ", " ", 1))
				}
				if a.status != 400 || a.code() != "VALIDATION_ERROR" || names != strings.TrimSpace(row.faults) {
					t.Errorf("%s %q = %v, want 400 with faults in %q", method, row.body, a, row.faults)
				}
			})
		}
	}
	try("POST", "/agents", slices.Concat(post, both))
	try("PATCH", "/agents/"+id, slices.Concat(patch, both))

	padded := func(size int) string { return good + strings.Repeat(" ", size-len(good)) }
	for _, row := range []struct {
		name, contentType, body string
		status                  int
		code                    string
	}{
		{"no type", "", good, 415, "UNSUPPORTED_MEDIA_TYPE"},
		{"text", "text/plain", good, 415, "UNSUPPORTED_MEDIA_TYPE"},
		{"a form", "application/x-www-form-urlencoded", good, 415, "UNSUPPORTED_MEDIA_TYPE"},
		{"almost JSON", "application/jsonl", good, 415, "UNSUPPORTED_MEDIA_TYPE"},
		{"two in one", "text/plain, application/json", good, 415, "UNSUPPORTED_MEDIA_TYPE"},
		{"a bad parameter", "application/json; charset", good, 415, "UNSUPPORTED_MEDIA_TYPE"},
		{"a byte too much", "application/json", padded(16<<10 + 1), 413, "PAYLOAD_TOO_LARGE"},
		{"far too much", "application/json", padded(1 << 20), 413, "PAYLOAD_TOO_LARGE"},
	} {
		t.Run("POST "+row.name, func(t *testing.T) {
			a := v.do("POST", "/api/v1/agents", row.body, "Authorization", "Bearer "+v.bearer, "Content-Type", row.contentType)
			if a.status != row.status || a.code() != row.code {
				t.Errorf("%d bytes of %q = %v, want %d %s", len(row.body), row.contentType, a, row.status, row.code)
			}
		})
	}
	if n := v.count(`select count(*) from agents`); n != before {
		t.Errorf("there are %d agents, want %d: what was refused is there", n, before)
	}
	if n := v.count(`select count(*) from audit_events`); n != events {
		t.Errorf("there are %d events, want %d: a request with faults is no refused change", n, events)
	}

	// The limits themselves are allowed.
	for _, row := range []struct{ name, contentType, body string }{
		{"email of 255 characters", "application/json", field("email", strings.Repeat("x", 243)+"@example.com")},
		{"email with what HTML allows", "application/json", field("email", "o'neil!#$%&*+/=?^_`{|}~-@a")},
		{"version of 64 characters", "application/json", field("version", "1.0.0-"+long[:58])},
		{"owner of 128 characters", "application/json", field("owner", strings.Repeat("é", 128))},
		{"owner of one character", "application/json", field("owner", "x")},
		{"64 capabilities", "application/json", capable(many[:64]...)},
		{"capabilities of 4,096 characters", "application/json", capable(wide(41, 96)...)},
		{"capability of 100 characters", "application/json", capable("resumes:" + long[:92])},
		{"any action of a service", "application/json", capable("resumes:*", "agent:*")},
		{"all five scopes", "application/json", capable("agents:read", "agents:write", "tokens:read", "audit:read", "credentials:write")},
		{"a charset", "Application/JSON ; charset=UTF-8", field("owner", "ünï")},
		{"exactly 16 kB", "application/json", padded(16 << 10)},
	} {
		t.Run("POST "+row.name, func(t *testing.T) {
			a := v.do("POST", "/api/v1/agents", row.body, "Authorization", "Bearer "+v.bearer, "Content-Type", row.contentType)
			if a.status != 201 {
				t.Errorf("%q = %v, want 201", row.body, a)
			}
		})
	}
}

func TestEmailIsRegisteredOnce(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	body := agentWith(map[string]any{"email": "race@example.com"})
	got := tally(10, func(i int) answer { return []*service{v, w}[i%2].api(v.bearer, "POST", "/agents", body) })
	if got["201"] != 1 || got["409 AGENT_ALREADY_EXISTS"] != 9 {
		t.Errorf("10 registrations of one email at the same time = %v, want one 201 and nine 409", got)
	}
	if n := v.count(`select count(*) from audit_events where action = 'agent.created' and outcome = 'failure'`); n != 9 {
		t.Errorf("%d refused registrations are recorded, want 9", n)
	}
	for _, email := range []string{"race@example.com", "RACE@example.com", "race@EXAMPLE.com", "First@Example.Com"} {
		v.want(v.api(v.bearer, "POST", "/agents", agentWith(map[string]any{"email": email})), 409, "AGENT_ALREADY_EXISTS")
	}
	// It isn't free again after the end of its agent.
	id := v.want(v.api(v.bearer, "POST", "/agents", agentJSON("gone@example.com", "a:b")), 201, "").text("agentId")
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 204, "")
	v.want(v.api(v.bearer, "POST", "/agents", agentJSON("GONE@example.com", "a:b")), 409, "AGENT_ALREADY_EXISTS")
}

func TestAgentsAreListed(t *testing.T) {
	t.Parallel()
	v := newService(t)
	type listed struct{ id, owner, agentType, status string }
	all := []listed{{v.id, "operator", "custom", "active"}}
	for _, a := range []listed{
		{"", "red", "screener", "active"}, {"", "red", "router", "suspended"}, {"", "Red", "router", "active"},
		{"", "blue %_'", "screener", "decommissioned"}, {"", "red", "screener", "suspended"},
	} {
		time.Sleep(2 * time.Millisecond) // ids of the same millisecond have no order
		a.id = v.want(v.api(v.bearer, "POST", "/agents", agentWith(map[string]any{"owner": a.owner, "agentType": a.agentType})), 201, "").text("agentId")
		v.want(v.api(v.bearer, "PATCH", "/agents/"+a.id, `{"status":"`+a.status+`"}`), 200, "")
		all = append(all, a)
	}
	slices.Reverse(all) // newest first
	ids := func(a answer) (list []string) {
		data, _ := a.body["data"].([]any)
		for _, x := range data {
			object, _ := x.(map[string]any)
			list = append(list, fmt.Sprint(object["agentId"]))
		}
		return list
	}
	for _, row := range []struct {
		query string
		want  func(listed) bool
	}{
		{"", func(a listed) bool { return true }},
		{"?owner=red", func(a listed) bool { return a.owner == "red" }},
		{"?owner=blue+%25_%27", func(a listed) bool { return a.owner == "blue %_'" }},
		{"?owner=%25", func(a listed) bool { return false }},
		{"?agentType=router", func(a listed) bool { return a.agentType == "router" }},
		{"?agentType=monitor", func(a listed) bool { return false }},
		{"?status=active", func(a listed) bool { return a.status == "active" }},
		{"?status=decommissioned", func(a listed) bool { return a.status == "decommissioned" }},
		{"?owner=red&agentType=screener", func(a listed) bool { return a.owner == "red" && a.agentType == "screener" }},
		{"?owner=red&status=suspended", func(a listed) bool { return a.owner == "red" && a.status == "suspended" }},
		{"?agentType=router&status=active", func(a listed) bool { return a.agentType == "router" && a.status == "active" }},
		{"?owner=red&agentType=router&status=suspended&limit=100&page=1", func(a listed) bool {
			return a == listed{a.id, "red", "router", "suspended"}
		}},
	} {
		t.Run(row.query, func(t *testing.T) {
			var want []string
			for _, a := range all {
				if row.want(a) {
					want = append(want, a.id)
				}
			}
			a := v.api(v.bearer, "GET", "/agents"+row.query, "")
			if got := ids(a); a.status != 200 || !slices.Equal(got, want) || a.body["total"] != float64(len(want)) {
				t.Errorf("GET /agents%s = %v, want %v", row.query, a, want)
			}
			if len(want) == 0 && !strings.Contains(a.raw, `"data":[]`) {
				t.Errorf("GET /agents%s = %v, want an empty array", row.query, a)
			}
		})
	}
	for page, want := range map[int]int{1: 4, 2: 2, 3: 0, 2500: 0} {
		a := v.want(v.api(v.bearer, "GET", fmt.Sprintf("/agents?limit=4&page=%d", page), ""), 200, "")
		got := ids(a)
		if first := min(4*(page-1), 6); len(got) != want || !slices.Equal(got, ids(v.api(v.bearer, "GET", "/agents", ""))[first:first+want]) {
			t.Errorf("page %d has %v, want the next %d", page, got, want)
		}
		if a.body["total"] != 6.0 || a.body["page"] != float64(page) || a.body["limit"] != 4.0 || a.body["totalCapped"] != nil {
			t.Errorf("page %d = %v, want total 6, its number, limit 4", page, a)
		}
	}
	if a := v.api(v.bearer, "GET", "/agents", ""); a.body["page"] != 1.0 || a.body["limit"] != 20.0 {
		t.Errorf("GET /agents = %v, want page 1 and limit 20", a)
	}
	v.want(v.api(v.bearer, "GET", "/agents?page=100&limit=100", ""), 200, "")
	for query, faults := range map[string]string{
		"page=0": "page", "page=-1": "page", "page=x": "page", "page=": "page", "page=1.5": "page", "page=01": "page",
		"page=%2B1": "page", "page=9223372036854775808": "page", "page=1e3": "page", "page=1%00": "page",
		"limit=0": "limit", "limit=101": "limit", "limit=1000000000": "limit", "limit=-1": "limit", "limit=ten": "limit",
		"page=x&limit=y": "limit page", "page=101&limit=100": "page", "page=501": "page", "page=10001&limit=1": "page",
		"colour=red": "colour", "Owner=red": "Owner", "owner=red&owner=red": "owner", "page=1&page=1": "page",
		"owner=": "owner", "owner=%00": "owner", "owner=%ff": "owner", "owner=+": "owner", "owner=" + strings.Repeat("x", 129): "owner",
		"agentType=Router": "agentType", "agentType=": "agentType", "status=gone": "status", "cursor=x": "cursor",
		"agentType=x&status=y&owner=": "agentType owner status", "owner=%zz": "query", "owner=red;status=active": "query",
	} {
		t.Run(query, func(t *testing.T) {
			a := v.api(v.bearer, "GET", "/agents?"+query, "")
			if a.status != 400 || a.code() != "VALIDATION_ERROR" || detailNames(a) != faults {
				t.Errorf("GET /agents?%s = %v, want 400 with faults in %q", query, a, faults)
			}
		})
	}
	if a := v.api(v.bearer, "GET", "/agents?page=501", ""); !strings.Contains(a.raw, "cursor") {
		t.Errorf("beyond the 10,000th row = %v, want it to name the cursor", a)
	}
}

func TestPatchChangesWhatItNamesAndNothingElse(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("resumes:read")
	old := v.want(v.api(v.bearer, "GET", "/agents/"+id, ""), 200, "")
	for _, row := range []struct {
		body, want string
	}{
		{`{"agentType":"router"}`, "agentType=router"},
		{`{"version":"2.0.0-beta"}`, "version=2.0.0-beta"},
		{`{"capabilities":["mails:send","mails:read"]}`, "capabilities=[mails:send mails:read]"},
		{`{"owner":"other team"}`, "owner=other team"},
		{`{"deploymentEnv":"development"}`, "deploymentEnv=development"},
		{`{"status":"suspended"}`, "status=suspended"},
		{`{"status":"suspended"}`, ""},
		{`{"status":"active","owner":"third team"}`, "owner=third team status=active"},
	} {
		t.Run(row.body, func(t *testing.T) {
			time.Sleep(2 * time.Millisecond) // so that updatedAt shows
			a := v.want(v.api(v.bearer, "PATCH", "/agents/"+id, row.body), 200, "")
			var changed []string
			for _, name := range slices.Sorted(maps.Keys(a.body)) {
				if got := fmt.Sprint(a.body[name]); got != fmt.Sprint(old.body[name]) && name != "updatedAt" {
					changed = append(changed, name+"="+got)
				}
			}
			if got := strings.Join(changed, " "); got != row.want {
				t.Errorf("PATCH %s changed %q, want %q", row.body, got, row.want)
			}
			if a.text("updatedAt") <= old.text("updatedAt") {
				t.Errorf("updatedAt = %s, want later than %s", a.text("updatedAt"), old.text("updatedAt"))
			}
			if again := v.api(v.bearer, "GET", "/agents/"+id, ""); again.raw != a.raw {
				t.Errorf("GET = %s, want %s", again.raw, a.raw)
			}
			old = a
		})
	}
	for _, path := range []string{newID(), strings.ToUpper(id), "x"} {
		v.want(v.api(v.bearer, "PATCH", "/agents/"+path, `{"owner":"team"}`), 404, "AGENT_NOT_FOUND")
		v.want(v.api(v.bearer, "DELETE", "/agents/"+path, ""), 404, "AGENT_NOT_FOUND")
	}
}

func TestStatusActsAtOnceAndDecommissioningIsFinal(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another() // sees it all
	id, secret := v.newClient("resumes:read", "credentials:write")
	credentialID, _ := v.newCredential(id)
	token := v.token(id, secret, "")
	grant := "grant_type=client_credentials"
	step := func(name string, alive bool) {
		t.Helper()
		status, code := 403, "unauthorized_client"
		if alive {
			status, code = 200, ""
		}
		w.want(w.form(id, secret, "", grant), status, code)
		if w.active(token) != alive {
			t.Errorf("%s: a token from before is active = %v, want %v", name, !alive, alive)
		}
		if got := w.api(token, "GET", "/agents/"+id, "").status == 200; got != alive {
			t.Errorf("%s: a token from before is let in = %v, want %v", name, got, alive)
		}
	}
	step("active", true)
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
	step("suspended", false)
	v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials", "{}"), 403, "AGENT_NOT_ACTIVE")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"active"}`), 200, "")
	step("reactivated", true)

	got := tally(10, func(i int) answer {
		if i%2 == 0 {
			return w.api(v.bearer, "DELETE", "/agents/"+id, "")
		}
		return v.api(v.bearer, "DELETE", "/agents/"+id, "")
	})
	if got["204"] != 1 || got["409 AGENT_ALREADY_DECOMMISSIONED"] != 9 {
		t.Errorf("10 decommissionings at the same time = %v, want one 204 and nine 409", got)
	}
	if n := v.count(`select count(*) from audit_events where action = 'agent.decommissioned' and agent_id = $1
		and (outcome = 'failure') = (metadata->>'reason' is not null)`, id); n != 10 {
		t.Errorf("%d events of them, want 10", n)
	}
	w.want(w.form(id, secret, "", grant), 403, "unauthorized_client")
	if w.active(token) || w.api(token, "GET", "/agents/"+id, "").status != 401 {
		t.Error("decommissioned: a token from before is let in")
	}
	list := v.want(v.api(v.bearer, "GET", "/agents/"+id+"/credentials", ""), 200, "")
	if n := strings.Count(list.raw, `"status":"revoked"`); n != 2 || strings.Contains(list.raw, `"revokedAt":null`) {
		t.Errorf("its credentials are %s, want both revoked", list.raw)
	}
	for _, row := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"GET", "", "", 200, ""}, // it is still there
		{"PATCH", "", `{"owner":"team"}`, 409, "AGENT_ALREADY_DECOMMISSIONED"},
		{"PATCH", "", `{"status":"active"}`, 409, "AGENT_ALREADY_DECOMMISSIONED"},
		{"PATCH", "", `{"status":"suspended"}`, 409, "AGENT_ALREADY_DECOMMISSIONED"},
		{"PATCH", "", `{"status":"decommissioned"}`, 409, "AGENT_ALREADY_DECOMMISSIONED"},
		{"PATCH", "", `{"email":"x@example.com"}`, 400, "VALIDATION_ERROR"},
		{"DELETE", "", "", 409, "AGENT_ALREADY_DECOMMISSIONED"},
		{"POST", "/credentials/" + credentialID + "/rotate", "{}", 403, "AGENT_NOT_ACTIVE"},
		{"DELETE", "/credentials/" + credentialID, "", 409, "CREDENTIAL_ALREADY_REVOKED"},
	} {
		t.Run(row.method+row.path+row.body, func(t *testing.T) {
			a := v.api(v.bearer, row.method, "/agents/"+id+row.path, row.body)
			if a.status != row.status || a.code() != row.code {
				t.Errorf("%s%s %s = %v, want %d %s", row.method, row.path, row.body, a, row.status, row.code)
			}
			if row.status == 200 && a.text("status") != "decommissioned" {
				t.Errorf("status = %q, want decommissioned", a.text("status"))
			}
		})
	}
	// By PATCH it is just as final.
	other := v.newAgent("resumes:read")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+other, `{"status":"decommissioned","owner":"last"}`), 200, "")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+other, `{"status":"active"}`), 409, "AGENT_ALREADY_DECOMMISSIONED")
}

// Of our five scopes, a token that lacks one can neither give it to an agent
// nor get at an agent that holds it.
func TestNobodyMintsAuthority(t *testing.T) {
	t.Parallel()
	v := newService(t)
	plain, credential := v.newAgent("resumes:read"), ""
	for _, scope := range []string{"agents:read", "agents:write", "tokens:read", "audit:read", "credentials:write"} {
		others := slices.DeleteFunc([]string{"agents:read", "agents:write", "tokens:read", "audit:read", "credentials:write"},
			func(s string) bool { return s == scope })
		agentID := v.newAgent(others...)
		holder := v.newAgent("resumes:read", scope)
		credentialID := newID() // the refusal comes before anybody looks for it
		requests := []struct{ name, method, path, body, action string }{
			{"register", "POST", "", agentJSON("minted-"+strings.Replace(scope, ":", "-", 1)+"@example.com", "resumes:read", scope), "agent.created"},
			{"give", "PATCH", "/" + plain, `{"capabilities":["resumes:read","` + scope + `"]}`, "agent.updated"},
			{"change", "PATCH", "/" + holder, `{"owner":"other"}`, "agent.updated"},
			{"take away", "PATCH", "/" + holder, `{"capabilities":["resumes:read"]}`, "agent.updated"},
			{"suspend", "PATCH", "/" + holder, `{"status":"suspended"}`, "agent.updated"},
			{"reactivate", "PATCH", "/" + holder, `{"status":"active"}`, "agent.updated"},
			{"create a credential", "POST", "/" + holder + "/credentials", "{}", "credential.generated"},
			{"rotate a credential", "POST", "/" + holder + "/credentials/" + credentialID + "/rotate", "{}", "credential.rotated"},
			{"revoke a credential", "DELETE", "/" + holder + "/credentials/" + credentialID, "", "credential.revoked"},
			{"decommission by PATCH", "PATCH", "/" + holder, `{"status":"decommissioned"}`, "agent.updated"},
			{"decommission", "DELETE", "/" + holder, "", "agent.decommissioned"},
		}
		for _, c := range []struct{ name, id, bearer string }{
			{"an agent that lacks it", agentID, v.bearerOf(agentID, strings.Join(others, " "))},
			{"a narrowed token of an agent that holds it", v.id, v.token(v.id, v.secret, strings.Join(others, " "))},
		} {
			before := v.api(v.bearer, "GET", "/agents/"+holder, "").raw
			for _, q := range requests {
				if q.action == "credential.generated" && c.id == v.id || q.action == "credential.rotated" && c.id != v.id {
					continue // one caller each, since secrets take time
				}
				t.Run(scope+" "+c.name+" "+q.name, func(t *testing.T) {
					a := v.api(c.bearer, q.method, "/agents"+q.path, q.body)
					if a.status != 403 || a.code() != "FORBIDDEN" {
						t.Errorf("%s %s = %v, want 403 FORBIDDEN", q.method, q.path, a)
					}
					if n := v.count(`
						select count(*)
						from audit_events
						where metadata->>'requestId' = $1 and metadata->>'reason' = 'FORBIDDEN' and outcome = 'failure'
							and actor_id = $2 and action = $3`, a.header.Get("X-Request-Id"), c.id, q.action); n != 1 {
						t.Errorf("%s %s: %d events say that it was refused, want 1", q.method, q.path, n)
					}
				})
			}
			if after := v.api(v.bearer, "GET", "/agents/"+holder, "").raw; after != before {
				t.Errorf("%s: the agent is %s, want %s", c.name, after, before)
			}
			if a := v.api(v.bearer, "GET", "/agents/"+holder+"/credentials", ""); a.body["total"] != 0.0 {
				t.Errorf("%s: the agent's credentials are %v, want none", c.name, a)
			}
		}
		// With a token that carries it the same requests are fine, or all of this would show nothing.
		enough := v.token(v.id, v.secret, "agents:write "+scope)
		for _, q := range requests {
			if q.name == "take away" || q.name == "decommission by PATCH" || strings.HasPrefix(q.action, "credential.") && scope != "audit:read" {
				continue
			}
			a := v.api(enough, q.method, "/agents"+strings.Replace(q.path, credentialID, credential, 1), q.body)
			if a.status >= 300 {
				t.Errorf("%s with %s: %s = %v, want success", q.name, scope, q.path, a)
			}
			if q.action == "credential.generated" {
				credential = a.text("credentialId")
			}
		}
		v.want(v.api(v.bearer, "PATCH", "/agents/"+plain, `{"capabilities":["resumes:read"]}`), 200, "")
	}
	// To give all of one's own is fine, one more isn't.
	id := v.newAgent("agents:write", "resumes:read")
	own := v.bearerOf(id, "agents:write resumes:read")
	v.want(v.api(own, "PATCH", "/agents/"+id, `{"capabilities":["agents:write","resumes:*","other:thing"]}`), 200, "")
	v.want(v.api(own, "PATCH", "/agents/"+id, `{"capabilities":["agents:write","agents:read"]}`), 403, "FORBIDDEN")
	v.want(v.api(own, "PATCH", "/agents/"+id, `{"capabilities":["agents:write","audit:read"],"owner":"x"}`), 403, "FORBIDDEN")
	a := v.want(v.api(v.bearer, "GET", "/agents/"+id, ""), 200, "")
	if got := fmt.Sprint(a.body["capabilities"], a.body["owner"]); got != "[agents:write resumes:* other:thing]team" {
		t.Errorf("after self-escalation the agent has %q", got)
	}
}

func TestAgentManagesItsOwnCredentialsAndNoOthers(t *testing.T) {
	t.Parallel()
	v := newService(t)
	manager, other := v.newAgent("credentials:write", "resumes:read", "audit:read"), v.newAgent("resumes:read")
	first, _ := v.newCredential(manager)
	theirs, theirSecret := v.newCredential(other)
	narrow, without := v.bearerOf(manager, "credentials:write"), v.bearerOf(manager, "resumes:read audit:read")
	stranger := v.bearerOf(other, "resumes:read")
	for _, row := range []struct {
		name, bearer, method, path, body string
		status                           int
		code                             string
	}{
		{"own, without the scope", without, "POST", manager + "/credentials", "{}", 403, "FORBIDDEN"},
		{"own, without the scope", without, "GET", manager + "/credentials", "", 403, "FORBIDDEN"},
		{"own, without the scope", without, "POST", manager + "/credentials/" + first + "/rotate", "{}", 403, "FORBIDDEN"},
		{"own, without the scope", without, "DELETE", manager + "/credentials/" + first, "", 403, "FORBIDDEN"},
		{"own, of an agent without it", stranger, "POST", other + "/credentials", "{}", 403, "FORBIDDEN"},
		{"another's, with the scope", narrow, "POST", other + "/credentials", "{}", 403, "FORBIDDEN"},
		{"another's, with the scope", narrow, "GET", other + "/credentials", "", 403, "FORBIDDEN"},
		{"another's, with the scope", narrow, "POST", other + "/credentials/" + theirs + "/rotate", "{}", 403, "FORBIDDEN"},
		{"another's, with the scope", narrow, "DELETE", other + "/credentials/" + theirs, "", 403, "FORBIDDEN"},
		{"another's, by one's own path", narrow, "POST", manager + "/credentials/" + theirs + "/rotate", "{}", 404, "CREDENTIAL_NOT_FOUND"},
		{"another's, by one's own path", narrow, "DELETE", manager + "/credentials/" + theirs, "", 404, "CREDENTIAL_NOT_FOUND"},
		{"another's path, with all scopes", v.bearer, "POST", other + "/credentials/" + first + "/rotate", "{}", 404, "CREDENTIAL_NOT_FOUND"},
		{"another's path, with all scopes", v.bearer, "DELETE", other + "/credentials/" + first, "", 404, "CREDENTIAL_NOT_FOUND"},
		{"unknown", narrow, "DELETE", manager + "/credentials/" + newID(), "", 404, "CREDENTIAL_NOT_FOUND"},
		{"own", narrow, "POST", manager + "/credentials", "{}", 201, ""},
		{"own", narrow, "GET", manager + "/credentials", "", 200, ""},
		{"own", narrow, "POST", manager + "/credentials/" + first + "/rotate", "{}", 200, ""},
		{"own", narrow, "DELETE", manager + "/credentials/" + first, "", 204, ""},
		{"own agent", narrow, "PATCH", manager, `{"owner":"me"}`, 403, "FORBIDDEN"},
		{"own agent", narrow, "DELETE", manager, "", 403, "FORBIDDEN"},
	} {
		t.Run(row.name+" "+row.method, func(t *testing.T) {
			a := v.api(row.bearer, row.method, "/agents/"+row.path, row.body)
			if a.status != row.status || a.code() != row.code {
				t.Errorf("%s %s = %v, want %d %s", row.method, row.path, a, row.status, row.code)
			}
		})
	}
	v.token(other, theirSecret, "") // still good
}

func TestMaxAgentsIsExact(t *testing.T) {
	t.Parallel()
	v := newService(t, "MAX_AGENTS", "5")
	w := v.another()
	register := func(i int) answer { return []*service{v, w}[i%2].api(v.bearer, "POST", "/agents", agentWith(nil)) }
	got := tally(20, register)
	if got["201"] != 4 || got["403 FREE_TIER_LIMIT_EXCEEDED"] != 16 {
		t.Errorf("20 registrations where 4 agents are free = %v, want four 201 and sixteen 403", got)
	}
	full := func(why string) {
		t.Helper()
		a := register(0)
		details, _ := a.body["details"].(map[string]any)
		if a.status != 403 || a.code() != "FREE_TIER_LIMIT_EXCEEDED" || details["limit"] != 5.0 {
			t.Errorf("%s: registering = %v, want 403 FREE_TIER_LIMIT_EXCEEDED and the limit", why, a)
		}
	}
	full("at the limit")
	var id string
	if err := v.db.QueryRow(t.Context(), `select agent_id::text from agents where agent_id <> $1 limit 1`, v.id).Scan(&id); err != nil {
		t.Fatal(err)
	}
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
	full("a suspended agent has its place")
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 204, "")
	if got := tally(6, register); got["201"] != 1 {
		t.Errorf("6 registrations after one was decommissioned = %v, want one 201", got)
	}
	if n := v.count(`select count(*) from agents where status <> 'decommissioned'`); n != 5 {
		t.Errorf("there are %d agents, want 5", n)
	}
	if n := v.count(`select count(*) from audit_events where metadata->>'reason' = 'FREE_TIER_LIMIT_EXCEEDED'
		and action = 'agent.created' and outcome = 'failure'`); n != 23 {
		t.Errorf("%d refusals are recorded, want 23", n)
	}
}

// wide makes capabilities: one of this length, and others of 99 characters.
func wide(n, first int) (list []any) {
	for i := range n {
		length := 99
		if i == 0 {
			length = first
		}
		list = append(list, fmt.Sprintf("r%02d:%s", i, strings.Repeat("x", length-4)))
	}
	return list
}

// Somebody must be left who can manage agents, whoever leaves, however, and
// however many at once; and there is a way back for whom that doesn't help.
func TestLastManagerStays(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t))
	p.exec(`update agents set status = 'suspended' where agent_id <> $1`, p.id)
	for _, row := range []struct{ method, body string }{
		{"PATCH", `{"status":"suspended"}`}, {"PATCH", `{"status":"decommissioned"}`}, {"DELETE", ""},
		{"PATCH", `{"capabilities":["agents:read","tokens:read","audit:read","credentials:write"]}`},
	} {
		p.want(p.api(p.bearer, row.method, "/agents/"+p.id, row.body), 409, "AGENT_IS_LAST_MANAGER")
	}
	p.want(p.api(p.bearer, "PATCH", "/agents/"+p.id, `{"owner":"still here"}`), 200, "")
	p.newAgent(agentsWrite) // who has no credential, and so manages nothing
	p.want(p.api(p.bearer, "PATCH", "/agents/"+p.id, `{"status":"suspended"}`), 409, "AGENT_IS_LAST_MANAGER")
	credentials := p.want(p.api(p.bearer, "GET", "/agents/"+p.id+"/credentials", ""), 200, "").body["data"].([]any)
	only := credentials[0].(map[string]any)["credentialId"].(string)
	p.want(p.api(p.bearer, "DELETE", "/agents/"+p.id+"/credentials/"+only, ""), 409, "AGENT_IS_LAST_MANAGER")
	second, _ := p.newCredential(p.id)
	p.want(p.api(p.bearer, "DELETE", "/agents/"+p.id+"/credentials/"+second, ""), 204, "")
	ordinary := p.newAgent("a:b")
	p.want(p.api(p.bearer, "PATCH", "/agents/"+ordinary, `{"status":"suspended"}`), 200, "")

	for round := range rounds(8, 100) {
		ids, tokens := []string{p.id}, []string{p.bearer}
		for range 2 {
			id, secret := p.newClient(ourScopes...)
			ids, tokens = append(ids, id), append(tokens, p.token(id, secret, ""))
		}
		var all sync.WaitGroup
		for i, id := range ids {
			all.Go(func() { // by itself, or by the next
				p.api(tokens[(i+round%2)%len(ids)], "PATCH", "/agents/"+id, `{"status":"suspended"}`)
			})
		}
		all.Wait()
		var left int
		if err := p.db.QueryRow(t.Context(), `select count(*) from agents where status = 'active' and 'agents:write' = any(capabilities)`).Scan(&left); err != nil || left == 0 {
			t.Fatalf("%d managers are left, %v", left, err)
		}
		p.exec(`update agents set status = 'active' where agent_id = $1`, p.id)
		p.exec(`update agents set status = 'suspended' where agent_id = any($1)`, ids[1:])
	}

	// Who manages nothing ends its credentials, however it stands with the others.
	own, ownSecret := p.newClient(credentialsWrite)
	token := p.token(own, ownSecret, "")
	leaked, _ := p.newCredential(own)
	p.exec(`update credentials set expires_at = clock_timestamp() where client_id in (select agent_id from agents where 'agents:write' = any(capabilities))`)
	p.want(p.api(token, "DELETE", "/agents/"+own+"/credentials/"+leaked, ""), 204, "")
	p.exec(`update credentials set expires_at = null where client_id = $1`, p.id)

	cmd := p.build("bootstrap", "another@example.com")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "recover") {
		t.Errorf("bootstrap beside a manager = %v: %s", err, out)
	}
	id, secret := credentialsOf(p.command("recover", "another@example.com"))
	token = p.token(id, secret, "")
	p.want(p.api(token, "DELETE", "/agents/"+p.id, ""), 204, "")
	events := p.want(p.api(token, "GET", "/audit?agentId="+id+"&action=agent.created", ""), 200, "")
	if !strings.Contains(events.raw, `"actorId":null`) || !strings.Contains(events.raw, `"recovers":true`) {
		t.Errorf("recover leaves %s", events.raw)
	}
}

// credentialsOf reads what bootstrap prints.
func credentialsOf(out string) (id, secret string) {
	for line := range strings.Lines(out) {
		id += strings.TrimSpace(strings.TrimPrefix(line, "client_id: ")) + "\n"
	}
	parts := strings.Split(id, "\n")
	return parts[0], strings.TrimPrefix(parts[1], "client_secret: ")
}

// Agents are found by what people know of them.
func TestAgentsAreFoundByEachField(t *testing.T) {
	t.Parallel()
	v := newService(t)
	register := func(email, owner, env string, capabilities ...string) {
		list, _ := json.Marshal(capabilities)
		v.want(v.api(v.bearer, "POST", "/agents", fmt.Sprintf(
			`{"email":%q,"agentType":"custom","version":"1.0.0","capabilities":%s,"owner":%q,"deploymentEnv":%q}`, email, list, owner, env)), 201, "")
	}
	register("Mailer.One@example.com", "Post 100%", "staging", "mails:send", "files:*")
	register("reader@example.com", "post_office", "development", "mails:read")
	for query, want := range map[string]string{
		"email=mailer.one%40EXAMPLE.com": "Mailer.One@example.com", "email=nobody%40example.com": "",
		"deploymentEnv=staging": "Mailer.One@example.com", "capability=mails:read": "reader@example.com", "capability=files:*": "Mailer.One@example.com",
		"capability=files:read": "", "q=ONE%40ex": "Mailer.One@example.com", "q=post": "reader@example.com Mailer.One@example.com",
		"q=100%25": "Mailer.One@example.com", "q=post_o": "reader@example.com", "q=t_office": "reader@example.com",
		"q=post&deploymentEnv=development": "reader@example.com",
	} {
		var got []string
		for _, a := range v.want(v.api(v.bearer, "GET", "/agents?"+query, ""), 200, "").body["data"].([]any) {
			got = append(got, a.(map[string]any)["email"].(string))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("GET /agents?%s finds %q, want %q", query, got, want)
		}
	}
	for _, query := range []string{"email=x", "deploymentEnv=moon", "capability=x", "q=", "q=%00", "text=x"} {
		v.want(v.api(v.bearer, "GET", "/agents?"+query, ""), 400, "VALIDATION_ERROR")
	}
}

// An answer to a common mistake says what is meant.
func TestAnswersTeach(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.newClient("a:b")
	form := []string{"Content-Type", formType}
	bearer := []string{"Authorization", "Bearer " + v.bearer, "Content-Type", "application/json"}
	for _, row := range []struct {
		name, method, path, body string
		header                   []string
		status                   int
		says                     string
	}{
		{"a slash behind", "GET", "/api/v1/agents/", "", bearer, 404, "without the slash at its end"},
		{"a slash behind a token", "POST", "/api/v1/token/", "grant_type=client_credentials", form, 404, "without the slash at its end"},
		{"a slash behind nothing", "GET", "/nothing/", "", bearer, 404, "/openapi.yaml"},
		{"an email for an id", "GET", "/api/v1/agents/a@example.com", "", bearer, 404, "GET /api/v1/agents?email= finds"},
		{"42 for an id", "GET", "/api/v1/agents/42", "", bearer, 404, "ids are UUIDs"},
		{"PATCH of the email", "PATCH", "/api/v1/agents/" + id, `{"email":"new@example.com"}`, bearer, 400, "can't be changed"},
		{"an empty body", "POST", "/api/v1/agents", "", bearer, 400, "is empty"},
		{"all wrong capabilities", "POST", "/api/v1/agents", agentJSON("x@example.com", "A:b", "c", "tokens:*"), bearer, 400, "tokens:*"},
		{"a secret as Bearer", "GET", "/api/v1/agents", "", []string{"Authorization", "Bearer " + secret}, 401, "trade it for one"},
		{"a secret in the URL", "POST", "/api/v1/token?client_id=" + id + "&client_secret=" + secret, "grant_type=client_credentials", form, 401, "rotate it"},
		{"audience", "POST", "/api/v1/token", "grant_type=client_credentials&audience=https://x.example&client_id=" + id + "&client_secret=" + secret, form, 400, "resource (RFC 8707)"},
		{"scopes", "POST", "/api/v1/token", "grant_type=client_credentials&scopes=a:b&client_id=" + id + "&client_secret=" + secret, form, 400, "called scope."},
		{"a path beside the token's", "POST", "/api/v1/tokens", "x", form, 404, `"code":"NOT_FOUND"`},
		{"a path below the token's", "POST", "/api/v1/token/x", "x", form, 404, `"error":"invalid_request"`},
	} {
		a := v.do(row.method, row.path, row.body, row.header...)
		if a.status != row.status || !strings.Contains(a.raw, row.says) || strings.Contains(a.raw, secret) {
			t.Errorf("%s: answered %v, want %d and %q", row.name, a, row.status, row.says)
		}
	}
	if a := v.do("POST", "/api/v1/agents", agentJSON("x@example.com", "A:b", "c", "tokens:*"), bearer...); !strings.Contains(a.raw, "A:b") || !strings.Contains(a.raw, `\"c\"`) {
		t.Errorf("of three wrong capabilities it names %s", a.raw)
	}
	for args, says := range map[string]string{"bootstrap": "bootstrap EMAIL", "keygen es256": "keygen [RS256 | ES256]", "recover a b": "recover EMAIL"} {
		if _, err := command(t.Context(), v.env, io.Discard, strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q says %v, want %q", args, err, says)
		}
	}
}

// One client's lists, of which any may take long, leave the connections to others: they are made one after the other.
func TestListsOfOneClientTakeOneConnection(t *testing.T) {
	t.Parallel()
	v := newService(t)
	v.exec(`insert into agents (agent_id, email, agent_type, version, capabilities, owner, deployment_env)
		select gen_random_uuid(), 'many' || n || '@example.com', 'custom', '1.0.0', '{a:b}', 'o', 'staging' from generate_series(1, 20000) as n`)
	v.exec(`insert into audit_events select gen_random_uuid(), 1000 + n, now(), '` + v.id + `', null, 'agent.updated', 'success', '', '', '{}', sha256(''), sha256('')
		from generate_series(1, 20000) as n`)
	most, answered := 0, make(chan map[string]int)
	go func() {
		answered <- tally(16, func(i int) answer {
			return v.api(v.bearer, "GET", []string{"/agents?q=nobody", "/audit?outcome=failure&actorId=" + v.id}[i%2], "")
		})
	}()
	for {
		select {
		case got := <-answered:
			if got["200"] != 16 || most != 1 {
				t.Errorf("16 lists at once are answered %v, and %d were made at the same time, want 1", got, most)
			}
			return
		default:
			most = max(most, v.count(`select count(*) from pg_stat_activity where datname = current_database() and state = 'active'
				and pid <> pg_backend_pid() and (query like '%from agents%position(%' or query like '%from audit_events%subject%')`))
		}
	}
}
