package test

import (
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The pages on workloads: what they have to paste is pasted, and what they quote is there.

// An operator binds an agent, the agent gets tokens, the operator cuts the issuer off.
func TestWorkloadPagesCanBePasted(t *testing.T) {
	t.Parallel()
	const issuer, subject = "https://kubernetes.default.svc.cluster.local", "system:serviceaccount:hiring:screener"
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{issuer: h}, nil))
	if said := v.want(v.do("GET", "/.well-known/oauth-authorization-server", ""), 200, "").raw; !strings.Contains(said, jwtBearer) {
		t.Errorf("the metadata lacks the grant: %s", said)
	}
	agent := v.newAgent("resumes:read")
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(h.vouch(v.workloadClaims(issuer, subject))+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	operator, developer := runBlocks(t, "workloads.md"), runBlocks(t, "../developers/workloads.md")
	if len(operator) != 2 || len(developer) != 2 {
		t.Fatalf("the pages have %d and %d blocks to run, want 2 each", len(operator), len(developer))
	}
	run := func(b block) string {
		t.Helper()
		cmd := exec.Command("sh", "-eu", "-c", b.text)
		cmd.Env = outsideEnv("BASE="+v.url, "TOKEN="+v.bearer, "AGENT="+agent, "ISSUER_OF_WORKLOADS="+issuer,
			"AGENTIDP_ASSERTION_FILE="+file, "SERVICE=https://resumes.example.com",
			"ASSERTION="+strings.TrimSpace(readFile(t, file)))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("the block at line %d of %s fails: %v: %s", b.line, b.page, err, out)
		}
		return string(out)
	}
	if said := run(operator[0]); !strings.Contains(said, `"kind":"workload"`) {
		t.Fatalf("binding says %s", said)
	}
	var tokens []string
	for _, b := range developer {
		m := regexp.MustCompile(`"access_token":"([^"]*)"`).FindStringSubmatch(run(b))
		if m == nil || !v.active(m[1]) {
			t.Fatalf("the block at line %d of %s gets no token that is active", b.line, b.page)
		}
		tokens = append(tokens, m[1])
	}
	if said := run(operator[1]); said != "" {
		t.Errorf("cutting off says %s", said)
	}
	for _, token := range tokens {
		if v.active(token) {
			t.Error("a token of an issuer that was cut off is active")
		}
	}
	v.want(v.byGrant(strings.TrimSpace(readFile(t, file))), 400, "invalid_grant")
}

// What the page quotes of refusals and of the log is in the source.
func TestWorkloadPageQuotesTheSource(t *testing.T) {
	source := readFile(t, "workload.go") + readFile(t, "assertion.go") + readFile(t, "jwk.go") + readFile(t, "auth.go")
	found := 0
	for key := range pageTables(t, "workloads.md", "### Errors") {
		_, quoted, _ := strings.Cut(key, " has ")
		if quoted == "" {
			_, quoted, _ = strings.Cut(key, "in `error` ")
		}
		if found++; quoted == "" {
			t.Errorf("workloads.md has the row %q, which this test can't read", key)
		}
		if quoted = strings.TrimSuffix(quoted, " 3.."); !strings.Contains(source, quoted) && !strings.Contains(quoted, "certificate signed by") {
			t.Errorf("workloads.md quotes %q, which is not in the source", quoted)
		}
	}
	if found < 11 {
		t.Errorf("workloads.md has only %d rows of errors", found)
	}
}

// An issuer is cut off as a whole or not at all: by who could change each of its
// agents, and not where nobody could manage agents then.
func TestIssuerIsCutOffWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	all := []string{agentsRead, agentsWrite, tokensRead, auditRead, credentialsWrite}
	plain, manager := v.newAgent("a:b"), v.newAgent(all...)
	for id, subject := range map[string]string{plain: "plain", manager: "manager"} {
		v.want(v.bind(id, cluster, subject, nil), 201, "")
	}
	byGrant := func(subject string) string {
		t.Helper()
		return v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, subject))), 200, "").text("access_token")
	}
	token, last := byGrant("plain"), byGrant("manager")
	cut := "/credentials?workloadIssuer=" + url.QueryEscape(cluster)
	id, secret := v.newClient(agentsWrite)
	v.want(v.api(v.token(id, secret, ""), "DELETE", cut, ""), 403, "FORBIDDEN")
	v.want(v.api(v.bearer, "DELETE", "/credentials", ""), 400, "VALIDATION_ERROR")
	v.want(v.api(v.bearer, "DELETE", "/credentials?workloadIssuer="+url.QueryEscape(cluster+"/"), ""), 404, "CREDENTIAL_NOT_FOUND")
	for _, other := range []string{id, v.id} {
		v.want(v.api(last, "DELETE", "/agents/"+other, ""), 204, "")
	}
	v.want(v.api(last, "DELETE", cut, ""), 409, "AGENT_IS_LAST_MANAGER")
	v.bearer = last
	if who := v.want(v.do("POST", "/api/v1/token/introspect", "token="+token, "Content-Type", formType, "Authorization", "Bearer "+last), 200, ""); who.body["active"] != true {
		t.Error("a token is dead though the issuer was not cut off")
	}
}

// The file of issuers is taken by itself when it has changed, and one that is not right
// is not. Who is taken out gets nothing more; what it had lives on, and can be cut off.
func TestIssuersAreTakenWhenTheirFileChanges(t *testing.T) {
	t.Parallel()
	const other = "https://other.example.com"
	h := newHolder(t, "ES256")
	file := filepath.Join(t.TempDir(), "issuers.json")
	set := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set(trusting(map[string]holder{cluster: h}, nil))
	v := newProgram(t, newDatabase(t), newRedis(t), "WORKLOAD_ISSUERS_FILE", file)
	agent := v.newAgent("a:b")
	v.want(v.bind(agent, other, "screener", nil), 400, "VALIDATION_ERROR")
	v.want(v.bind(agent, cluster, "screener", nil), 201, "")
	token := v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, "screener"))), 200, "").text("access_token")

	set(trusting(map[string]holder{other: h}, nil))
	v.eventually("the new issuer is taken", func() bool { return v.bind(agent, other, "screener", nil).status == 201 })
	v.want(v.byGrant(h.vouch(v.workloadClaims(other, "screener"))), 200, "")
	v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, "screener"))), 400, "invalid_grant")
	if !v.active(token) {
		t.Error("the token of an issuer that was taken out is dead")
	}
	v.want(v.api(v.bearer, "DELETE", "/credentials?workloadIssuer="+url.QueryEscape(cluster), ""), 204, "")
	if v.active(token) {
		t.Error("the token of an issuer that was cut off is active")
	}

	set(`{"` + other + `": {"jwks": {"keys": []}}}`)
	if line := v.hangup(); !strings.Contains(line, `"msg":"keys not read, the old ones stay"`) {
		t.Errorf("a file that is not right is logged as %s", line)
	}
	v.want(v.byGrant(h.vouch(v.workloadClaims(other, "screener"))), 200, "")
	set(trusting(map[string]holder{cluster: h, other: h}, nil))
	if line := v.hangup(); !strings.Contains(line, `"msg":"keys read"`) || !strings.Contains(line, `"workloadIssuers":2`) {
		t.Errorf("two issuers are logged as %s", line)
	}
}
