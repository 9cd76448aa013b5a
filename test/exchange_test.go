package test

import (
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Agents that hand work on: a token becomes one of the worker, which says on whose behalf it acts.

const (
	exchangeGrant   = "urn:ietf:params:oauth:grant-type:token-exchange"
	accessTokenType = "urn:ietf:params:oauth:token-type:access_token"
	work            = "https://work.example.com"
	store           = "https://store.example.com"
)

// A party is an agent with its secret.
type party struct{ id, credentialID, secret string }

// newParty registers an agent with a secret; who may act for it comes later.
func (v *service) newParty(capabilities ...string) (p party) {
	v.t.Helper()
	p.id = v.newAgent(capabilities...)
	p.credentialID, p.secret = v.quickCredential(p.id)
	return p
}

// tokenFor asks for a token of a party with a further piece of form.
func (v *service) tokenFor(p party, more string) string {
	v.t.Helper()
	return v.want(v.grant(p.id, p.secret, more), 200, "").text("access_token")
}

// delegate says who may act for an agent.
func (v *service) delegate(p party, to ...party) {
	v.t.Helper()
	ids := []string{}
	for _, worker := range to {
		ids = append(ids, worker.id)
	}
	v.want(v.api(v.bearer, "PATCH", "/agents/"+p.id, members{"delegates": ids}.String()), 200, "")
}

// exchangeForm trades a token; more are pairs that come beside that or in its place.
func exchangeForm(subject string, more ...string) url.Values {
	form := url.Values{"grant_type": {exchangeGrant}, "subject_token": {subject}, "subject_token_type": {accessTokenType}}
	for i := 0; i < len(more); i += 2 {
		if more[i] == "resource" {
			form.Add(more[i], more[i+1])
		} else {
			form.Set(more[i], more[i+1])
		}
	}
	return form
}

// exchanges has a worker trade a token.
func (v *service) exchanges(worker party, subject string, more ...string) answer {
	v.t.Helper()
	return v.form(worker.id, worker.secret, "", exchangeForm(subject, more...).Encode())
}

// exchanged is the token that comes of it.
func (v *service) exchanged(worker party, subject string, more ...string) string {
	v.t.Helper()
	return v.want(v.exchanges(worker, subject, more...), 200, "").text("access_token")
}

// withActor are the pairs by which a subject brings its worker's token along.
func withActor(token string, more ...string) []string {
	return append([]string{"actor_token", token, "actor_token_type", accessTokenType}, more...)
}

// expire waits until a token has ended.
func expire(t *testing.T, token string) {
	t.Helper()
	for end := readClaims(t, token).Expires; time.Now().Unix() < end; {
		time.Sleep(time.Until(time.Unix(end, 0)))
	}
}

// An exchangedToken has what a token says beside the claims of all.
type exchangedToken struct {
	claims
	Actor *actedFor         `json:"act"`
	Chain []json.RawMessage `json:"chain"`
}

type actedFor struct {
	Subject string    `json:"sub"`
	Before  *actedFor `json:"act"`
}

func TestExchangedTokenSaysOnWhoseBehalf(t *testing.T) {
	t.Parallel()
	v := newService(t)
	a, b, c, d := v.newParty("a:b", "a:c"), v.newParty("a:*"), v.newParty("a:b"), v.newParty("a:b")
	e := v.newParty("a:b")
	v.delegate(a, b, c, d, e)
	token := v.token(a.id, a.secret, "")
	x := v.want(v.exchanges(b, token, "resource", work), 200, "")
	if x.text("issued_token_type") != accessTokenType || x.text("token_type") != "Bearer" || x.text("scope") != "a:b a:c" {
		t.Errorf("the answer is %v", x)
	}
	for n, worker := range []party{c, d} {
		x = v.want(v.exchanges(worker, x.text("access_token")), 200, "")
		if len(x.text("access_token")) > 2048 {
			t.Errorf("a token of depth %d has %d bytes", n+2, len(x.text("access_token")))
		}
	}
	seen := v.want(v.introspect(x.text("access_token")), 200, "")
	if !strings.Contains(seen.raw, `"sub":"`+a.id+`"`) || !strings.Contains(seen.raw, `"client_id":"`+d.id+`"`) || !strings.Contains(seen.raw, `"aud":"`+work+`"`) ||
		!strings.Contains(seen.raw, `"act":{"sub":"`+d.id+`","act":{"sub":"`+c.id+`","act":{"sub":"`+b.id+`"}}}`) || !strings.Contains(seen.raw, `"scope":"a:b"`) {
		t.Errorf("it is introspected as %v", seen)
	}
	v.want(v.exchanges(e, x.text("access_token")), 400, "invalid_request")
	v.want(v.api(x.text("access_token"), "GET", "/agents/"+a.id, ""), 401, "UNAUTHORIZED")
	// By the subject, with the worker's token.
	actor := v.token(b.id, b.secret, "")
	x = v.want(v.exchanges(a, token, withActor(actor, "resource", work)...), 200, "")
	if seen := v.want(v.introspect(x.text("access_token")), 200, ""); seen.text("sub") != a.id || seen.text("client_id") != b.id {
		t.Errorf("it is introspected as %v", seen)
	}
	v.want(v.form(b.id, b.secret, "/revoke", "token="+actor), 200, "")
	if v.active(x.text("access_token")) {
		t.Error("it outlives the actor's token")
	}
}

// What is asked for in vain, with why, and that nothing comes of it.
func TestExchangeRefusals(t *testing.T) {
	t.Parallel()
	v := newService(t)
	us := v.env["ISSUER"]
	ours := append([]string{"a:b", "a:c", "w:*"}, ourScopes...)
	a, b := v.newParty(ours...), v.newParty(append([]string{"a:*", "w:x"}, ourScopes...)...)
	c, d, e := v.newParty("a:b"), v.newParty("a:b"), v.newParty("a:b")
	second, server := v.newParty("a:b"), v.newParty("a:b") // the worker's delegate, and a service that gets its tokens
	bound, boundWorker := v.newParty("a:b"), v.newParty("a:b")
	v.delegate(a, a, b, c, d, e, boundWorker)
	v.delegate(b, second)
	v.delegate(bound, b)
	token := v.tokenFor(a, "")
	x1 := v.exchanged(b, token, "resource", work)
	x2 := v.exchanged(c, x1)
	x3 := v.exchanged(d, x2)
	bothWays := v.tokenFor(a, url.Values{"resource": {us, work}}.Encode())
	own, ownAtWork, ofC := v.tokenFor(b, ""), v.tokenFor(b, "resource="+work), v.tokenFor(c, "")
	toWork := v.tokenFor(bound, "resource="+work)
	v.want(v.allow(bound.id, "resources", `["`+us+`","`+store+`"]`), 200, "")
	v.want(v.allow(boundWorker.id, "resources", `["`+us+`","`+store+`"]`), 200, "")

	// Each has a wildcard where the other has many names.
	many := func(resource string) (list []string) {
		for i := range 24 {
			list = append(list, fmt.Sprintf("%s:%090d", resource, i))
		}
		return list
	}
	wider, wide := v.newParty(append(many("f"), "g:*")...), v.newParty(append(many("g"), "f:*")...)
	v.delegate(wider, wide)
	long := strings.Join(slices.Concat(many("f"), many("g")), " ")

	short := v.newParty("a:b")
	v.delegate(short, b)
	v.want(v.allow(short.id, "tokenTtl", "1"), 200, "")
	expired := v.tokenFor(short, "")
	revoked, revokedOwn := v.tokenFor(a, ""), v.tokenFor(b, "")
	for _, token := range []string{revoked, revokedOwn} {
		v.want(v.form(v.id, v.secret, "/revoke", "token="+token), 200, "")
	}
	foreign := sign(t, secondKey(), accessToken, readClaims(t, token))
	ofOther := v.sign(with(readClaims(t, token), func(c *claims) { c.Issuer = "https://other.example" }))
	toCome := v.sign(with(readClaims(t, token), func(c *claims) { c.IssuedAt += 3600; c.Expires += 3600 }))
	body, signature, _ := cutLast(token, ".")
	otherSignature := body + "." + encode(strings.Repeat("\x01", len(signature)*3/4))
	expire(t, expired)

	type row struct {
		name    string
		by      party
		subject string
		more    []string
		code    string
		says    string
		actor   string // whose token was brought along to an event
	}
	rows := []row{
		{"no token", b, "", nil, "invalid_request", "lacks subject_token", ""},
		{"an expired token", b, expired, []string{"resource", work}, "invalid_request", "subject_token is a token that expired", ""},
		{"a token to come", b, toCome, []string{"resource", work}, "invalid_request", "subject_token is a token of a time to come", ""},
		{"a revoked token", b, revoked, []string{"resource", work}, "invalid_request", "has ended", ""},
		{"a foreign token", b, foreign, nil, "invalid_request", "subject_token is no token", ""},
		{"a token of another issuer", b, ofOther, nil, "invalid_request", "subject_token is a token of the issuer https://other.example", ""},
		{"a truncated token", b, token[:len(token)-1], nil, "invalid_request", "subject_token is no token", ""},
		{"a token without its end", b, body, nil, "invalid_request", "subject_token is no token", ""},
		{"another signature", b, otherSignature, nil, "invalid_request", "subject_token is no token", ""},
		{"a token with a space", b, token + " ", nil, "invalid_request", "subject_token is no token", ""},
		{"its jti", b, readClaims(t, token).ID, nil, "invalid_request", "subject_token is no token", ""},
		{"the agent's id", b, a.id, nil, "invalid_request", "subject_token is no token", ""},
		{"the agent's secret", b, a.secret, nil, "invalid_request", "subject_token is no token", ""},
		{"a checkpoint", b, v.checkpoint(), nil, "invalid_request", "subject_token is no token", ""},

		{"type missing", b, token, []string{"subject_token_type", ""}, "invalid_request", "subject_token_type must be", ""},
		{"type without token", b, "", []string{"actor_token_type", accessTokenType}, "invalid_request", "", ""},
		{"actor's type without token", b, token, []string{"resource", work, "actor_token_type", accessTokenType}, "invalid_request", "actor_token_type, and no actor_token", ""},
		{"actor's token without type", a, token, []string{"resource", work, "actor_token", own}, "invalid_request", "actor_token_type must be", ""},
		{"the worker itself", b, own, []string{"resource", work}, "invalid_request", "already, as sub or in act", ""},
		{"the subject itself", a, token, []string{"resource", work}, "invalid_request", "already, as sub or in act", ""},
		{"the subject as its actor", a, token, withActor(v.tokenFor(a, ""), "resource", work), "invalid_request", "already, as sub or in act", ""},
		{"A to B to A", a, x1, nil, "invalid_request", "already, as sub or in act", ""},
		{"A to B to B", b, x1, nil, "invalid_request", "already, as sub or in act", ""},
		{"A to B to C to B", b, x2, nil, "invalid_request", "already, as sub or in act", ""},
		{"A to B to C to A", a, x2, nil, "invalid_request", "already, as sub or in act", ""},
		{"A to B to B, by actor_token", b, x1, withActor(own), "invalid_request", "already, as sub or in act", ""},
		{"depth 4", e, x3, nil, "invalid_request", "three times", ""},
		{"depth 4, by actor_token", d, x3, withActor(v.tokenFor(e, "")), "invalid_request", "three times", ""},

		{"a scope the subject lacks", b, token, []string{"resource", work, "scope", "a:d"}, "invalid_scope", "", ""},
		{"a scope the worker lacks", b, token, []string{"resource", work, "scope", "w:y"}, "invalid_scope", "", ""},
		{"a scope that both lack", b, token, []string{"resource", work, "scope", "z:z"}, "invalid_scope", "", ""},
		{"one that is wider", b, token, []string{"resource", work, "scope", "a:b a:d"}, "invalid_scope", "", ""},
		{"the worker's wildcard", b, token, []string{"resource", work, "scope", "a:*"}, "invalid_scope", "", ""},
		{"the subject's wildcard", b, token, []string{"resource", work, "scope", "w:*"}, "invalid_scope", "", ""},
		{"all", b, token, []string{"resource", work, "scope", "*"}, "invalid_scope", "", ""},
		{"wider than it was handed on", c, v.exchanged(b, token, "resource", work, "scope", "a:c w:x"), nil, "invalid_scope", "nothing in common", ""},
		{"two spaces", b, token, []string{"resource", work, "scope", "a:b  a:c"}, "invalid_scope", "", ""},
		{"a space before", b, token, []string{"resource", work, "scope", " a:b"}, "invalid_scope", "", ""},
		{"a space behind", b, token, []string{"resource", work, "scope", "a:b "}, "invalid_scope", "", ""},
		{"a tab", b, token, []string{"resource", work, "scope", "a:b\ta:c"}, "invalid_scope", "", ""},
		{"a wildcard's quote", b, token, []string{"resource", work, "scope", `w:x"`}, "invalid_scope", "", ""},
		{"more than a token holds", wide, v.tokenFor(wider, ""), []string{"resource", work, "scope", long}, "invalid_scope", "too long", ""},
		{"more than a token holds, by default", wide, v.tokenFor(wider, ""), []string{"resource", work}, "invalid_scope", "too long", ""},
		{"only ours, by default", b, v.tokenFor(a, "scope="+url.QueryEscape(strings.Join(ourScopes, " "))), []string{"resource", work}, "invalid_scope", "nothing in common", ""},

		{"a token for us alone", b, token, nil, "invalid_target", "for AgentIdP alone", ""},
		{"no name of a resource", b, token, []string{"resource", ""}, "invalid_target", "for AgentIdP alone", ""},
		{"another audience", c, x1, []string{"resource", work, "audience", store}, "invalid_target", "may not go to " + store, ""},
		{"us as the audience", b, token, []string{"resource", work, "audience", us}, "invalid_target", "never AgentIdP", ""},
		{"us", b, token, []string{"resource", us}, "invalid_target", "never AgentIdP", ""},
		{"us beside another", b, token, []string{"resource", work, "resource", us}, "invalid_target", "never AgentIdP", ""},
		{"us, of a token for both", b, bothWays, []string{"resource", us}, "invalid_target", "never AgentIdP", ""},
		{"another, of a token for both", b, bothWays, []string{"resource", store}, "invalid_target", "may not go to " + store, ""},
		{"another", c, x1, []string{"resource", store}, "invalid_target", "may not go to " + store, ""},
		{"another beside its own", c, x1, []string{"resource", work, "resource", store}, "invalid_target", "may not go to " + store, ""},
		{"with a slash", c, x1, []string{"resource", work + "/"}, "invalid_target", "may not go to " + work + "/", ""},
		{"in capitals", c, x1, []string{"resource", strings.ToUpper(work)}, "invalid_target", "may not go to", ""},
		{"us, of an exchanged one", c, x1, []string{"resource", us}, "invalid_target", "never AgentIdP", ""},
		{"no URI", b, token, []string{"resource", "work"}, "invalid_target", "absolute URI", ""},
		{"a fragment", b, token, []string{"resource", work + "#a"}, "invalid_target", "absolute URI", ""},
		{"17 of them", b, token, numbered(17), "invalid_target", "16 resources", ""},
		{"where the subject may not", b, v.tokenFor(bound, "resource="+us), []string{"resource", work}, "invalid_target", "may not go to " + work, ""},
		{"where the subject may no more", b, toWork, nil, "invalid_target", "may not go to " + work, ""},
		{"where the worker may not", boundWorker, token, []string{"resource", work}, "invalid_target", "may not go to " + work, ""},
		{"where the worker may not, by default", boundWorker, bothWays, nil, "invalid_target", "may not go to " + work, ""},
		{"where the actor may not", a, token, withActor(v.tokenFor(boundWorker, ""), "resource", work), "invalid_target", "may not go to " + work, ""},

		{"no delegate", server, token, []string{"resource", work}, "unauthorized_client", "has no delegate", ""},
		{"a resource server", server, x1, nil, "unauthorized_client", "has no delegate", ""},
		{"a resource server, of a token of no exchange", server, bothWays, nil, "unauthorized_client", "has no delegate", ""},
		{"the worker's delegate", second, x1, nil, "unauthorized_client", "The agent " + a.id + " has no delegate " + second.id, ""},
		{"the worker's delegate, by actor_token", b, x1, withActor(v.tokenFor(second, "")), "unauthorized_client", "has no delegate", second.id},
		{"a scope that the actor's token lacks", a, token, withActor(v.tokenFor(b, "scope=a:b"), "resource", work, "scope", "a:c"), "invalid_scope", "", ""},
		{"no scope that the actor's token has", a, token, withActor(v.tokenFor(b, "scope=agents:read"), "resource", work), "invalid_scope", "nothing in common", ""},
		{"an actor that is no delegate", a, token, withActor(v.tokenFor(server, ""), "resource", work), "unauthorized_client", "has no delegate", server.id},

		{"an actor brought by another", c, token, withActor(own, "resource", work), "invalid_request", "brought by the client", ""},
		{"an actor brought by itself", b, token, withActor(own, "resource", work), "invalid_request", "brought by the client", ""},
		{"an actor brought by the first subject", a, x1, withActor(ofC), "invalid_request", "brought by the client", ""},
		{"an actor of an exchange", a, token, withActor(x1, "resource", work), "invalid_request", "by no exchange", ""},
		{"an actor of an exchange, for us", a, token, withActor(v.forUs(x1), "resource", work), "invalid_request", "by no exchange", ""},
		{"an actor's token for a service", a, token, withActor(ownAtWork, "resource", work), "invalid_request", "by no exchange", ""},
		{"a revoked actor", a, token, withActor(revokedOwn, "resource", work), "invalid_request", "has ended", ""},
		{"an expired actor", a, token, withActor(expired, "resource", work), "invalid_request", "actor_token is a token that expired", ""},
		{"a truncated actor", a, token, withActor(own[:len(own)-1], "resource", work), "invalid_request", "actor_token is no token", ""},
		{"a foreign actor", a, token, withActor(foreign, "resource", work), "invalid_request", "actor_token is no token", ""},
		{"an actor's secret", a, token, withActor(b.secret, "resource", work), "invalid_request", "actor_token is no token", ""},
	}
	for _, name := range []string{"subject_token_type", "requested_token_type", "actor_token_type"} {
		for _, kind := range []string{"urn:ietf:params:oauth:token-type:jwt", "urn:ietf:params:oauth:token-type:refresh_token", "urn:ietf:params:oauth:token-type:id_token",
			"access_token", strings.ToUpper(accessTokenType), accessTokenType + " "} {
			more := []string{"resource", work, name, kind}
			if name == "actor_token_type" {
				more = append(more, "actor_token", own)
			}
			rows = append(rows, row{name + " " + kind, map[bool]party{true: a, false: b}[name == "actor_token_type"], token, more, "invalid_request", name + " must be", ""})
		}
	}
	for _, scope := range append([]string{"agents:*", "tokens:*", "audit:*", "credentials:*"}, ourScopes...) {
		rows = append(rows, row{"our " + scope, b, token, []string{"resource", work, "scope", scope}, "invalid_scope", "none of AgentIdP's own", ""},
			row{"our " + scope + " beside another", b, token, []string{"resource", work, "scope", "a:b " + scope}, "invalid_scope", "none of AgentIdP's own", ""})
	}
	for _, name := range []string{"aud", "resources", "scopes"} {
		rows = append(rows, row{"the parameter " + name, b, token, []string{"resource", work, name, work}, "invalid_request", "no parameter " + name, ""})
	}
	refused := func(r row, a answer) {
		t.Helper()
		status := map[string]int{"unauthorized_client": 403, "invalid_client": 401}[r.code]
		if status == 0 {
			status = 400
		}
		if a.status != status || a.code() != r.code || a.text("access_token") != "" || !strings.Contains(a.text("error_description"), r.says) {
			t.Errorf("%s: answered %v, want %d %s that says %q", r.name, a, status, r.code, r.says)
		}
	}
	const all = `select coalesce(max(seq), 0) from audit_events`
	before := v.count(all)
	for _, r := range rows {
		refused(r, v.exchanges(r.by, r.subject, r.more...))
		want := 0
		if r.code == "unauthorized_client" { // as all that is refused with 403 is recorded
			want = v.count(`
				select count(*)
				from audit_events
				where seq > $1 and action = 'token.issued' and outcome = 'failure' and metadata ->> 'reason' = 'unauthorized_client'
					and actor_id = $2 and agent_id = $2 and metadata ->> 'subjectJti' = $3 and coalesce(metadata ->> 'actor', '') = $4`, before, r.by.id, readClaims(t, r.subject).ID, r.actor)
			if want != 1 {
				t.Errorf("%s: %d events of the refusal, want one", r.name, want)
			}
		}
		if now := v.count(all); now != before+want {
			t.Errorf("%s: %d events, want %d", r.name, now-before, want)
		}
		before = v.count(all)
	}
	twice := exchangeForm(token, "resource", work)
	twice.Add("subject_token", token)
	refused(row{name: "two tokens", code: "invalid_request"}, v.form(b.id, b.secret, "", twice.Encode()))
	refused(row{name: "a wrong secret", code: "invalid_client"}, v.form(b.id, newSecret(), "", exchangeForm(token, "resource", work).Encode()))
	refused(row{name: "nobody", code: "invalid_client"}, v.form("", "", "", exchangeForm(token, "resource", work).Encode()))
	refused(row{name: "a token in place of a secret", code: "invalid_client"}, v.bearerForm(own, "", exchangeForm(token, "resource", work).Encode()))
	if n := v.count(`select count(*) from audit_events where action = 'token.issued' and seq > $1`, before); n > 0 {
		t.Errorf("%d tokens were issued", n)
	}

	// The rows are refused for what they name: without that they are good.
	for name, a := range map[string]answer{
		"as it is":                  v.exchanges(b, token, "resource", work),
		"with all types":            v.exchanges(b, token, "resource", work, "requested_token_type", accessTokenType),
		"a scope of both":           v.exchanges(b, token, "resource", work, "scope", "w:x a:b"),
		"an audience":               v.exchanges(b, token, "audience", work),
		"the same audience":         v.exchanges(b, token, "resource", work, "audience", work),
		"two resources":             v.exchanges(b, token, "resource", work, "resource", store),
		"of a token for both":       v.exchanges(b, bothWays),
		"by actor_token":            v.exchanges(a, token, withActor(own, "resource", work)...),
		"on, by actor_token":        v.exchanges(b, x1, withActor(ofC)...),
		"where both may":            v.exchanges(b, v.tokenFor(bound, "resource="+us), "resource", store),
		"where the worker may":      v.exchanges(boundWorker, token, "resource", store),
		"empty actor":               v.exchanges(b, token, "resource", work, "actor_token", "", "actor_token_type", ""),
		"empty resource beside one": v.exchanges(b, token, "resource", "", "resource", work),
	} {
		if v.want(a, 200, ""); a.text("issued_token_type") != accessTokenType {
			t.Errorf("%s: answered %v", name, a)
		}
		c := readClaims(t, a.text("access_token"))
		if slices.Contains(c.Audience, us) || slices.ContainsFunc(ourScopes, func(s string) bool { return slices.Contains(strings.Fields(c.Scope), s) }) {
			t.Errorf("%s: the claims are %+v", name, c)
		}
	}
}

func with(c claims, change func(*claims)) claims {
	change(&c)
	return c
}

// numbered are n pairs of a resource.
func numbered(n int) (pairs []string) {
	for i := range n {
		pairs = append(pairs, "resource", fmt.Sprintf("%s/%d", work, i))
	}
	return pairs
}

// A worker, and a subject that brings its worker's token, are who they prove to be in
// any way.
func TestExchangeByKeysAndWorkloads(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	a, worker := v.newParty("a:b"), v.newParty("a:b")
	keyID, _, key := v.newKeyClient("ES256", "a:b")
	loadID := v.newAgent("a:b")
	v.want(v.bind(loadID, cluster, screener, nil), 201, "")
	v.delegate(a, party{id: keyID}, party{id: loadID}, worker)
	v.delegate(party{id: keyID}, worker)
	token := v.tokenFor(a, "")
	for id, assertion := range map[string]func() string{
		keyID:  func() string { return v.assertion(key, keyID) },
		loadID: func() string { return h.vouch(v.workloadClaims(cluster, screener)) },
	} {
		pairs := []string{"grant_type", exchangeGrant, "subject_token", token, "subject_token_type", accessTokenType}
		v.want(v.byAssertion("", assertion(), pairs...), 400, "invalid_target")
		one := assertion()
		good := v.want(v.byAssertion("", one, append(pairs, "resource", work)...), 200, "")
		if c := readClaims(t, good.text("access_token")); c.Subject != a.id || c.ClientID != id {
			t.Errorf("the claims are %+v", c)
		}
		if id == keyID {
			v.want(v.byAssertion("", one, append(pairs, "resource", work)...), 401, "invalid_client")
		}
	}
	// What is refused behind the look at it is told so, and its assertion is used up.
	ended, one := v.tokenFor(a, ""), v.assertion(key, keyID)
	v.want(v.form(v.id, v.secret, "/revoke", "token="+ended), 200, "")
	gone := []string{"grant_type", exchangeGrant, "subject_token", ended, "subject_token_type", accessTokenType, "resource", work}
	v.want(v.byAssertion("", one, gone...), 400, "invalid_request")
	v.want(v.byAssertion("", one, gone...), 401, "invalid_client")
	byKey := v.want(v.byAssertion("", v.assertion(key, keyID)), 200, "").text("access_token")
	pairs := append([]string{"grant_type", exchangeGrant, "subject_token", byKey, "subject_token_type", accessTokenType, "resource", work}, withActor(v.tokenFor(worker, ""))...)
	one = v.assertion(key, keyID)
	good := v.want(v.byAssertion("", one, pairs...), 200, "").text("access_token")
	if c := readClaims(t, good); c.Subject != keyID || c.ClientID != worker.id {
		t.Errorf("the claims are %+v", c)
	}
	v.want(v.byAssertion("", one, pairs...), 401, "invalid_client")
	if !v.active(good) {
		t.Error("what was exchanged is not active")
	}
}

// By which credential somebody asks that brings its worker's token is a link too, and in the log.
func TestExchangeDiesWithTheCredentialByWhichItWasAsked(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	w := v.another()
	a, b := v.newParty("a:b"), v.newParty("a:b")
	v.delegate(a, b)
	second := party{id: a.id}
	second.credentialID, second.secret = v.quickCredential(a.id)
	bound := v.want(v.bind(a.id, cluster, screener, nil), 201, "").text("credentialId")
	token, own := v.tokenFor(a, ""), v.tokenFor(b, "")
	more := withActor(own, "resource", work)
	same, other := v.exchanged(a, token, more...), v.exchanged(second, token, more...)
	v.setExpiry(second.credentialID, time.Now().Add(time.Minute))
	if c := readClaims(t, v.exchanged(second, token, more...)); c.Expires-c.IssuedAt > 60 {
		t.Errorf("it lives for %d s, longer than the credential by which it was asked for", c.Expires-c.IssuedAt)
	}
	v.exec(`update credentials set expires_at = null where credential_id = $1`, second.credentialID)
	pairs := append([]string{"grant_type", exchangeGrant, "subject_token", token, "subject_token_type", accessTokenType}, more...)
	vouched := v.want(v.byAssertion("", h.vouch(v.workloadClaims(cluster, screener)), pairs...), 200, "").text("access_token")
	for credentialID, said := range map[string]string{second.credentialID: "", bound: `"workload":{"issuer":"` + cluster} {
		if n := v.count(`select count(*) from audit_events where action = 'token.issued' and agent_id = $1 and metadata -> 'requestedBy' ->> 'credentialId' = $2
			and metadata ->> 'credentialId' = $3 and (metadata -> 'requestedBy')::text like '%' || $4 || '%' and metadata -> 'workload' is null`, b.id, credentialID, b.credentialID, said); n != map[bool]int{true: 2, false: 1}[credentialID == second.credentialID] {
			t.Errorf("%d events say that it was asked for by the credential %s", n, credentialID)
		}
	}
	v.want(w.api(v.bearer, "DELETE", "/credentials?workloadIssuer="+url.QueryEscape(cluster), ""), 204, "")
	if v.active(vouched) || !v.active(other) {
		t.Error("a token that was asked for by a workload outlives its issuer, or another one doesn't")
	}
	v.want(w.api(v.bearer, "DELETE", "/agents/"+a.id+"/credentials/"+second.credentialID, ""), 204, "")
	if v.active(other) || w.active(other) || !v.active(same) {
		t.Error("a token outlives the credential by which it was asked for, or another one doesn't")
	}
}

// forUs is an exchanged token as we issue none: for us, with our scopes.
func (v *service) forUs(token string) string {
	v.t.Helper()
	var said map[string]json.RawMessage
	if err := json.Unmarshal([]byte(readPart(v.t, token, 1)), &said); err != nil {
		v.t.Fatal(err)
	}
	c := readClaims(v.t, token)
	c.Audience, c.Scope = audience{v.env["ISSUER"]}, strings.Join(ourScopes, " ")
	return sign(v.t, v.env["JWT_PRIVATE_KEY"], accessToken, struct {
		claims
		Actor json.RawMessage `json:"act"`
		Chain json.RawMessage `json:"chain"`
	}{c, said["act"], said["chain"]})
}

// An exchanged token is for others: none of our routes takes it, whatever it says.
func TestExchangedTokenIsNothingHere(t *testing.T) {
	t.Parallel()
	v := newService(t)
	a, b := v.newParty(append([]string{"a:b"}, ourScopes...)...), v.newParty(append([]string{"a:b"}, ourScopes...)...)
	v.delegate(a, b)
	token := v.tokenFor(a, "")
	x := v.exchanged(b, token, "resource", work)
	forUs := v.forUs(x)
	if !v.active(x) || !v.active(forUs) {
		t.Fatal("they are not active, so this shows nothing")
	}
	tried := 0
	for _, rt := range routes(t) {
		method, path, _ := strings.Cut(rt.pattern, " ")
		if rt.public && path != "/api/v1/token" {
			continue
		}
		path = regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(path, b.id)
		if rt.oauth && path == "/api/v1/authorize" {
			continue
		}
		body, mediaType := agentJSON("exchanged@example.com", "a:b"), "application/json"
		if rt.oauth {
			body, mediaType = "grant_type=client_credentials&token=x", formType
		}
		for name, token := range map[string]string{"for another": x, "for us": forUs} {
			tried++
			if a := v.do(method, path, body, "Authorization", "Bearer "+token, "Content-Type", mediaType); a.status != 401 {
				t.Errorf("%s takes a token %s: %v, want 401", rt.pattern, name, a)
			}
		}
	}
	if tried < 28 {
		t.Errorf("only %d were tried", tried)
	}
	for name, token := range map[string]string{"for another": x, "for us": forUs} {
		for _, id := range []string{a.id, b.id} {
			v.wantEveryAuthentication("a secret that is a token "+name, id, token, 401, "invalid_client")
		}
		for _, path := range []string{"", "/introspect", "/revoke"} {
			v.want(v.byAssertion(path, token, "token", "x"), 401, "invalid_client")
		}
		v.want(v.byGrant(token), 401, "invalid_client")
	}
	v.want(v.api(token, "GET", "/agents/"+b.id, ""), 200, "")
}

// A token dies with all that it came from, at once and on every copy, and with nothing
// else; what comes back with an agent that is active again is what it alone had ended.
func TestExchangedTokenDiesWithAnyLink(t *testing.T) {
	t.Parallel()
	v := newService(t)
	copies := []*service{v, v.another()}
	// The tokens: a's, of which b made ab, and c of that abc and of a's ac; a made with b's
	// own token abBrought, and c of that broughtC. Of each agent another one, which came of nothing else.
	of := map[string][]string{
		"a": {"a", "ab", "abc", "ac", "abBrought", "broughtC"}, "b": {"b", "ab", "abc", "abBrought", "broughtC"}, "c": {"c", "abc", "ac", "broughtC"},
		"token a": {"a", "ab", "abc", "ac", "abBrought", "broughtC"}, "token ab": {"ab", "abc"}, "token abc": {"abc"}, "token ac": {"ac"}, "token b": {"b", "abBrought", "broughtC"}, "token c": {"c"},
		"token abBrought": {"abBrought", "broughtC"}, "token broughtC": {"broughtC"},
	}
	for _, row := range []struct {
		name    string
		whom    []string
		do      func(p party, token string) answer
		revives bool
	}{
		{"suspended", []string{"a", "b", "c"}, func(p party, _ string) answer {
			return copies[1].api(v.bearer, "PATCH", "/agents/"+p.id, `{"status":"suspended"}`)
		}, true},
		{"decommissioned", []string{"a", "b", "c"}, func(p party, _ string) answer { return copies[1].api(v.bearer, "DELETE", "/agents/"+p.id, "") }, false},
		{"rotated", []string{"a", "b", "c"}, func(p party, _ string) answer { copies[1].rotate(p.id, p.credentialID); return answer{status: 200} }, false},
		{"credential revoked", []string{"a", "b", "c"}, func(p party, _ string) answer {
			return copies[1].api(v.bearer, "DELETE", "/agents/"+p.id+"/credentials/"+p.credentialID, "")
		}, false},
		{"revoked", []string{"token a", "token ab", "token abc", "token ac", "token b", "token c", "token abBrought", "token broughtC"}, func(_ party, token string) answer {
			return copies[1].form(v.id, v.secret, "/revoke", "token="+token)
		}, false},
	} {
		for _, whom := range row.whom {
			parties := map[string]party{"a": v.newParty("a:b"), "b": v.newParty("a:b"), "c": v.newParty("a:b")}
			a, b, c := parties["a"], parties["b"], parties["c"]
			v.delegate(a, b, c)
			tokens := map[string]string{"a": v.tokenFor(a, ""), "b": v.tokenFor(b, ""), "c": v.tokenFor(c, "")}
			tokens["ab"] = v.exchanged(b, tokens["a"], "resource", work)
			tokens["abc"] = v.exchanged(c, tokens["ab"])
			tokens["ac"] = v.exchanged(c, tokens["a"], "resource", work)
			tokens["abBrought"] = v.exchanged(a, tokens["a"], withActor(tokens["b"], "resource", work)...)
			tokens["broughtC"] = v.exchanged(c, tokens["abBrought"])
			check := func(when string, dead []string) {
				t.Helper()
				for _, w := range copies {
					for name, token := range tokens {
						if got := w.active(token); got == slices.Contains(dead, name) {
							t.Errorf("%s %s, %s: %s is active: %v, want %v", whom, row.name, when, name, got, !got)
						}
					}
				}
			}
			check("before", nil)
			if a := row.do(parties[whom], tokens[strings.TrimPrefix(whom, "token ")]); !a.done() {
				t.Fatalf("%s %s: %v", whom, row.name, a)
			}
			check("at once", of[whom])
			// Nor is anything made of what is dead.
			for _, token := range []string{"a", "ab"} {
				made := copies[0].exchanges(c, tokens[token], "resource", work)
				if isDead := slices.Contains(of[whom], token) || whom == "c"; isDead && made.status == 200 || !isDead && made.status != 200 {
					t.Errorf("%s %s: an exchange of %s answers %v", whom, row.name, token, made)
				} else if isDead && whom != "c" && (made.status != 400 || made.code() != "invalid_request") {
					t.Errorf("%s %s: an exchange of %s answers %v, want 400 invalid_request", whom, row.name, token, made)
				}
			}
			if row.name == "decommissioned" || strings.HasPrefix(whom, "token ") {
				continue
			}
			id := "/agents/" + parties[whom].id
			v.want(v.api(v.bearer, "PATCH", id, `{"status":"suspended"}`), 200, "")
			v.want(v.form(v.id, v.secret, "/revoke", "token="+tokens["ac"]), 200, "")
			v.want(v.api(v.bearer, "PATCH", id, `{"status":"active"}`), 200, "")
			still := []string{"ac"}
			if !row.revives {
				still = append(still, of[whom]...)
			}
			check("active again", still)
		}
	}
	v.checkChain()
}

// Exchanges on one copy, while on the other a link is cut: whatever comes of them, none
// that works; and in the log none stands behind the cut.
func TestNoExchangeOutlivesACutBesideIt(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	a, b, c := v.newParty("a:b"), v.newParty("a:b"), v.newParty("a:b")
	v.delegate(a, b, c)
	parties := []*party{&a, &b, &c}
	issued, refused := 0, 0
	for round := range rounds(144, 3000) {
		whom := parties[round%3]
		token := v.tokenFor(a, "")
		x := v.exchanged(b, token, "resource", work)
		own := v.tokenFor(c, "")
		path, cut := "/agents/"+whom.id, func() answer { return answer{} }
		switch kind := round / 3 % 8; kind {
		case 0: // a rotation takes the time of bcrypt
			cut = func() answer { return w.api(v.bearer, "POST", path+"/credentials/"+whom.credentialID+"/rotate", "{}") }
		case 1, 2:
			cut = func() answer { return w.api(v.bearer, "DELETE", path+"/credentials/"+whom.credentialID, "") }
		case 3, 4, 5:
			revoked := []string{token, x, own}[round%3]
			cut = func() answer { return w.form(v.id, v.secret, "/revoke", "token="+revoked) }
		default:
			cut = func() answer { return w.api(v.bearer, "PATCH", path, `{"status":"suspended"}`) }
		}
		var group sync.WaitGroup
		var mu sync.Mutex
		var made []string
		for i := range 4 {
			group.Go(func() {
				// Three of them by the worker, of which one at the cut's own copy; one by b, with c's token.
				by, copy, more := c, []*service{v, v, w, v}[i], []string(nil)
				if i == 3 {
					by, more = b, withActor(own)
				}
				answer := copy.exchanges(by, x, more...)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case answer.status == 200 && whoseDies(round, i):
					made = append(made, answer.text("access_token"))
				case answer.status == 200:
				case answer.status == 503 || answer.status > 403:
					t.Errorf("round %d: answered %v", round, answer)
				default:
					refused++
				}
			})
		}
		var done answer
		group.Go(func() { done = cut() })
		group.Wait()
		if !done.done() {
			t.Fatalf("round %d: the cut is answered %v", round, done)
		}
		issued += len(made)
		for _, token := range made {
			if v.active(token) || w.active(token) {
				t.Fatalf("round %d: a token of a dead link is active", round)
			}
			if n := v.count(`
				select count(*)
				from audit_events issued, (
					select max(seq) as seq
					from audit_events
					where action in ('token.revoked', 'credential.revoked', 'credential.rotated', 'agent.suspended')) cut
				where issued.action = 'token.issued' and issued.metadata ->> 'jti' = $1 and issued.seq > cut.seq`, readClaims(t, token).ID); n > 0 {
				t.Fatalf("round %d: a token was issued after a link of it was cut", round)
			}
		}
		if round/3%8 >= 6 {
			v.want(v.api(v.bearer, "PATCH", path, `{"status":"active"}`), 200, "")
		} else if round/3%8 < 3 {
			whom.credentialID, whom.secret = v.quickCredential(whom.id)
		}
	}
	if issued == 0 || refused == 0 {
		t.Errorf("%d were issued and %d refused, so nothing met", issued, refused)
	}
	v.checkChain()
}

// While an exchange waits for the log, of those that it needs each may end; also the
// credential by which a subject asks that brings its worker's token.
func TestExchangeThatWaitsNeedsAllWhomItNeeded(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	for _, row := range []struct {
		name   string
		whose  int // a's, or b's
		ask    int // who asks
		status int // 401 is for who asks alone
	}{{"the subject, by the worker", 0, 1, 400}, {"the worker, by itself", 1, 1, 401}, {"the worker, by the subject", 1, 0, 400}, {"who brings the worker's token", 2, 0, 401}} {
		a, b := v.newParty("a:b"), v.newParty("a:b")
		v.delegate(a, b)
		token, own := v.tokenFor(a, ""), v.tokenFor(b, "")
		second := party{id: a.id}
		second.credentialID, second.secret = v.quickCredential(a.id)
		ends := []party{a, b, second}[row.whose]
		tx := v.lockChain()
		cut, made := make(chan answer, 1), make(chan answer, 1)
		go func() { cut <- v.api(v.bearer, "DELETE", "/agents/"+ends.id+"/credentials/"+ends.credentialID, "") }()
		v.eventually("the cut waits for the chain", func() bool { return v.waiting() == 1 })
		go func() {
			if row.ask == 1 {
				made <- w.exchanges(b, token, "resource", work)
			} else {
				made <- w.exchanges(second, token, withActor(own, "resource", work)...)
			}
		}()
		v.eventually("the exchange waits behind it", func() bool { return v.waiting() == 2 })
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := <-cut; !got.done() {
			t.Fatalf("%s: the cut is answered %v", row.name, got)
		}
		if got := <-made; got.status != row.status || got.text("access_token") != "" {
			t.Errorf("%s ends meanwhile: answered %v, want %d", row.name, got, row.status)
		}
		if n := v.count(`select count(*) from audit_events where action = 'token.issued' and outcome = 'success' and metadata ->> 'subject' = $1`, a.id); n != 0 {
			t.Errorf("%s ends meanwhile: %d tokens are in the log", row.name, n)
		}
	}
}

// whoseDies tells of the exchange of this number whether the cut of the round ends what
// comes of it: the actor's own token is a link of what was brought along alone.
func whoseDies(round, i int) bool {
	revoked := round/3%8 >= 3 && round/3%8 <= 5
	return !revoked || round%3 != 2 || i == 3
}

// Scopes and resources are sets: what is handed on is never more than all had, and
// who asks for what all have gets it.
func TestExchangeHandsOnWhatAllHave(t *testing.T) {
	t.Parallel()
	v := newService(t)
	us := v.env["ISSUER"]
	capabilities := append([]string{"a:b", "a:c", "a:*", "d:e", "d:*", "f:g"}, ourScopes...)
	scopes := append([]string{"a:z", "d:z", "f:*", "f:h", "agents:*", "a:", "a"}, capabilities...)
	resources := []string{work, store, "https://third.example.com", us}
	var parties []party
	for range 4 {
		parties = append(parties, v.newParty("a:b"))
	}
	v.delegate(parties[0], parties[1:]...)
	// reach is all that these say, one by one.
	reach := func(list []string) (all []string) {
		for _, scope := range scopes {
			resource, action, named := strings.Cut(scope, ":")
			if slices.Contains(list, scope) || named && action != "" && slices.Contains(list, resource+":*") {
				all = append(all, scope)
			}
		}
		return all
	}
	both := func(one, other []string) (all []string) {
		for _, x := range one {
			if slices.Contains(other, x) {
				all = append(all, x)
			}
		}
		return all
	}
	anywhere := func(list []string) []string {
		if len(list) == 0 {
			return resources
		}
		return list
	}
	without := func(list []string, less ...string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(x string) bool { return slices.Contains(less, x) })
	}
	seed := uint64(time.Now().UnixNano())
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	some := func(of []string, share float64) (list []string) {
		for _, x := range of {
			if random.Float64() < share {
				list = append(list, x)
			}
		}
		return list
	}
	good, bad := map[int]int{}, 0
	for round := range rounds(120, 3000) {
		type means struct{ capabilities, resources []string }
		of := make([]means, len(parties))
		for i, p := range parties {
			of[i] = means{some(capabilities, 0.7), some(resources, 0.8)}
			if of[i].capabilities == nil {
				of[i].capabilities = []string{"a:*"}
			}
			if random.IntN(2) == 0 || of[i].resources == nil {
				of[i].resources = []string{}
			}
			v.exec(`update agents set capabilities = $2, resources = $3, token_ttl = $4 where agent_id = $1`, p.id, of[i].capabilities, of[i].resources, 60+random.IntN(600))
		}
		form := url.Values{"resource": some(anywhere(of[0].resources), 0.7)}
		if len(form["resource"]) == 0 && len(of[0].resources) > 0 && !slices.Contains(of[0].resources, us) {
			form["resource"] = of[0].resources
		}
		if random.IntN(3) == 0 {
			form.Set("scope", strings.Join(some(of[0].capabilities, 0.8), " "))
		}
		token := v.tokenFor(parties[0], form.Encode())
		for depth := 1; depth < len(parties); depth++ {
			c := readClaims(t, token)
			may := without(both(reach(strings.Fields(c.Scope)), reach(of[depth].capabilities)), ourScopes...)
			bound := without(c.Audience, us)
			to := without(both(both(anywhere(bound), anywhere(of[0].resources)), anywhere(of[depth].resources)), us)

			var asked, where, pairs []string
			switch random.IntN(4) {
			case 0:
				asked = some(scopes, 0.2)
			case 1, 2:
				asked = some(may, 0.6)
			}
			if asked != nil {
				pairs = append(pairs, "scope", strings.Join(asked, " "))
			}
			if random.IntN(4) == 0 {
				where = some(resources, 0.4)
			} else if random.IntN(3) > 0 || len(bound) == 0 {
				where = some(to, 0.7)
			}
			for _, resource := range where {
				pairs = append(pairs, "resource", resource)
			}
			wantTo := where
			if where == nil {
				wantTo = bound
			}
			var codes []string
			if len(may) == 0 || len(both(asked, may)) < len(asked) {
				codes = append(codes, "invalid_scope")
			}
			if len(wantTo) == 0 || len(both(wantTo, to)) < len(wantTo) {
				codes = append(codes, "invalid_target")
			}
			about := fmt.Sprintf("seed %d, round %d, depth %d: %v of a token for %v at %v, by who has %v", seed, round, depth, pairs, c.Scope, c.Audience, of[depth])
			a := v.exchanges(parties[depth], token, pairs...)
			if codes != nil {
				bad++
				if a.status != 400 || !slices.Contains(codes, a.code()) {
					t.Fatalf("%s: answered %v, want 400 %v", about, a, codes)
				}
				break
			}
			if a.status != 200 {
				t.Fatalf("%s: answered %v, want a token", about, a)
			}
			token = a.text("access_token")
			got := readClaims(t, token)
			wantScopes := asked
			if asked == nil {
				wantScopes = may
			}
			gotScopes := reach(strings.Fields(got.Scope))
			if want := reach(wantScopes); !slices.Equal(gotScopes, want) || len(both(gotScopes, may)) < len(gotScopes) {
				t.Fatalf("%s: its scope is %q, want %q", about, got.Scope, wantScopes)
			}
			if !slices.Equal(got.Audience, wantTo) {
				t.Fatalf("%s: it is for %q, want %q", about, got.Audience, wantTo)
			}
			if got.Expires > c.Expires || got.Subject != parties[0].id || got.ClientID != parties[depth].id {
				t.Fatalf("%s: the claims are %+v, from %+v", about, got, c)
			}
			good[depth]++
		}
	}
	t.Logf("%v were good and %d bad", good, bad)
	if good[3] == 0 || bad == 0 {
		t.Errorf("%v were good and %d bad, so this shows little", good, bad)
	}
}

// What is issued is the worker's: its limits, its quota, its lifetime, and one event.
func TestExchangeCountsAndIsRecordedAsTheWorkers(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "1000", "MONTHLY_TOKEN_LIMIT", "1000")
	month := time.Now().UTC().Format("2006:01")
	spent := func(p party) int {
		n, _ := v.rdb.Get(t.Context(), "monthly:"+p.id+":"+month).Int()
		return n
	}
	a, b, c := v.newParty("a:b", "a:c"), v.newParty("a:b", "a:c"), v.newParty("a:b")
	v.delegate(a, b, c)
	token, own := v.tokenFor(a, ""), v.tokenFor(b, "")
	for name, row := range map[string]struct {
		do   func() answer
		code string
	}{
		"by the worker":  {func() answer { return v.exchanges(b, token, "resource", work) }, ""},
		"by the subject": {func() answer { return v.exchanges(a, token, withActor(own, "resource", work)...) }, ""},
		"refused":        {func() answer { return v.exchanges(b, token) }, "invalid_target"},
		"in vain":        {func() answer { return v.exchanges(a, token, withActor(own)...) }, "invalid_target"},
	} {
		ofA, ofB := spent(a), spent(b)
		if got := row.do(); got.code() != row.code {
			t.Errorf("%s: answered %v", name, got)
		}
		want := map[bool]int{true: 1, false: 0}[row.code == ""]
		if spent(a) != ofA || spent(b) != ofB+want {
			t.Errorf("%s: the subject has spent %d, and the worker %d, want 0 and %d", name, spent(a)-ofA, spent(b)-ofB, want)
		}
	}
	v.want(v.allow(b.id, "monthlyTokenLimit", fmt.Sprint(spent(b)+1)), 200, "")
	v.want(v.exchanges(b, token, "resource", work), 200, "")
	v.want(v.exchanges(b, token, "resource", work), 403, "unauthorized_client")
	v.want(v.exchanges(a, token, withActor(own, "resource", work)...), 403, "unauthorized_client")
	v.tokenFor(a, "")
	v.want(v.allow(b.id, "monthlyTokenLimit", "null"), 200, "")
	v.want(v.allow(b.id, "rateLimit", "1"), 200, "")
	v.want(v.exchanges(b, token, "resource", work), 429, "temporarily_unavailable")
	v.want(v.exchanges(a, token, withActor(own, "resource", work)...), 429, "temporarily_unavailable")
	v.tokenFor(a, "")
	v.want(v.allow(b.id, "rateLimit", "null"), 200, "")
	v.want(v.allow(a.id, "rateLimit", "1"), 200, "") // what is refused counts as who asked
	v.want(v.exchanges(a, token, withActor(own)...), 429, "temporarily_unavailable")
	v.want(v.exchanges(a, token, withActor(own, "resource", work)...), 200, "")
	v.want(v.allow(a.id, "rateLimit", "null"), 200, "")

	// It ends with the first of those that it came from, and never later than its client's do.
	for name, row := range map[string]struct{ ofA, ofB, want string }{
		"the subject's": {"60", "600", "60"}, "the worker's": {"600", "60", "60"},
	} {
		v.want(v.allow(a.id, "tokenTtl", row.ofA), 200, "")
		v.want(v.allow(b.id, "tokenTtl", row.ofB), 200, "")
		token := v.tokenFor(a, "")
		x := readClaims(t, v.exchanged(b, token, "resource", work))
		if x.Expires > readClaims(t, token).Expires || fmt.Sprint(x.Expires-x.IssuedAt) > row.want && len(row.want) == len(fmt.Sprint(x.Expires-x.IssuedAt)) {
			t.Errorf("with %s end it lives %d s", name, x.Expires-x.IssuedAt)
		}
	}
	v.want(v.allow(a.id, "tokenTtl", "600"), 200, "")
	v.want(v.allow(b.id, "tokenTtl", "30"), 200, "")
	token, own = v.tokenFor(a, ""), v.tokenFor(b, "")
	v.want(v.allow(b.id, "tokenTtl", "600"), 200, "")
	if x := readClaims(t, v.exchanged(a, token, withActor(own, "resource", work)...)); x.Expires > readClaims(t, own).Expires {
		t.Error("it outlives the actor's token")
	}
	v.setExpiry(b.credentialID, time.Now().Add(20*time.Second))
	if x := readClaims(t, v.exchanged(b, token, "resource", work)); x.Expires-x.IssuedAt > 20 {
		t.Error("it outlives its client's credential")
	}
	v.exec(`update credentials set expires_at = null where credential_id = $1`, b.credentialID)

	// One event, of what it says.
	x1 := v.exchanged(b, token, "resource", work, "scope", "a:b")
	before := v.count(`select max(seq) from audit_events`)
	x2 := readToken(t, v.exchanged(c, x1))
	if n := v.count(`select max(seq) from audit_events`); n != before+1 {
		t.Errorf("there are %d events, want one", n-before)
	}
	e := v.audit("agentId=" + c.id + "&action=token.issued&limit=1").Data[0]
	var f struct {
		ID           string            `json:"jti"`
		CredentialID string            `json:"credentialId"`
		Scope        string            `json:"scope"`
		Audience     audience          `json:"aud"`
		Subject      string            `json:"subject"`
		Actor        *actedFor         `json:"act"`
		Chain        []json.RawMessage `json:"chain"`
	}
	if err := json.Unmarshal(e.Metadata, &f); err != nil {
		t.Fatal(err)
	}
	if e.ActorID == nil || *e.ActorID != c.id || f.ID != x2.ID || f.CredentialID != c.credentialID || f.Scope != "a:b" || !slices.Equal(f.Audience, []string{work}) ||
		f.Subject != a.id || fmt.Sprint(f.Chain) != fmt.Sprint(x2.Chain) || f.Actor == nil || f.Actor.Subject != c.id || f.Actor.Before == nil ||
		f.Actor.Before.Subject != b.id || f.Actor.Before.Before != nil {
		t.Errorf("the event says %s", e.Metadata)
	}
	for i, from := range []string{x1, token} { // the newest first
		if len(x2.Chain) != 2 || !strings.Contains(string(x2.Chain[i]), readClaims(t, from).ID) {
			t.Errorf("the chain is %s, want that of %d at %d", x2.Chain, i, i)
		}
	}
	own = v.tokenFor(b, "")
	v.exchanged(a, token, withActor(own, "resource", work)...)
	v.want(v.exchanges(v.newParty("a:b"), token, "resource", work), 403, "unauthorized_client")
	for query, want := range map[string]int{"": v.count(`select count(*) from audit_events where metadata ->> 'subject' = $1`, a.id), "&outcome=failure": 3, "&actorId=" + c.id: 1, "&agentId=" + a.id: 1} {
		page := v.audit("limit=100&subjectId=" + a.id + query)
		if len(page.Data) != want || page.Total != want {
			t.Errorf("in its name, and %q, there are %d events, and %d in all, want %d", query, len(page.Data), page.Total, want)
		}
	}
	if n := len(v.audit("subjectId=" + b.id).Data); n != 0 {
		t.Errorf("there are %d events in the worker's name", n)
	}
	v.want(v.api(v.bearer, "GET", "/audit?subjectId=x", ""), 400, "VALIDATION_ERROR")
	e = v.audit("agentId=" + b.id + "&action=token.issued&limit=1").Data[0]
	if e.ActorID == nil || *e.ActorID != b.id || !strings.Contains(string(e.Metadata), `"requestedBy":{"agentId":"`+a.id+`","credentialId":"`+a.credentialID+`"}`) || !strings.Contains(string(e.Metadata), readClaims(t, own).ID) || !strings.Contains(string(e.Metadata), readClaims(t, token).ID) {
		t.Errorf("the event of a token that its subject fetched says %s, actor %v", e.Metadata, e.ActorID)
	}

	// A fault leaves nothing.
	used, head := spent(b), v.count(`select max(seq) from audit_events`)
	tx := v.lockChain()
	if got := v.exchanges(b, token, "resource", work); got.status != 503 || got.code() != "temporarily_unavailable" || got.text("access_token") != "" {
		t.Errorf("while the chain is locked: answered %v, want 503", got)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.eventually("nothing waits any more", func() bool { return v.waiting() == 0 })
	if spent(b) != used || v.count(`select max(seq) from audit_events where action = 'token.issued'`) > head {
		t.Errorf("a fault has spent %d of the quota, or has issued a token", spent(b)-used)
	}
	v.want(v.exchanges(b, token, "resource", work), 200, "")
	v.checkChain()
}

// readToken reads an exchanged token as a service does.
func readToken(t testing.TB, token string) (x exchangedToken) {
	t.Helper()
	if err := json.Unmarshal([]byte(readPart(t, token, 1)), &x); err != nil {
		t.Fatal(err)
	}
	return x
}

// A token of the greatest depth, each time with the worker's token brought along, is one
// that a cookie or a header of any proxy holds.
func TestExchangedTokenStaysSmall(t *testing.T) {
	t.Parallel()
	v := newService(t, "ISSUER", "https://idp.example.com")
	var parties []party
	for range 4 {
		parties = append(parties, v.newParty("resumes:read", "resumes:score"))
	}
	v.delegate(parties[0], parties[1:]...)
	h := newHolder(t, "ES256")
	token := v.boundToken(parties[0], h, "")
	for i, p := range parties[1:] { // and each bound to a key
		form := exchangeForm(token, withActor(v.boundToken(p, h, ""), "resource", work)...)
		token = v.wantBound(v.proves(parties[i], form.Encode(), v.proof(h, "POST", tokenPath, "")), h)
	}
	if len(token) > 2048 {
		t.Errorf("a token of depth 3 that is bound to a key has %d bytes, want 2 kB at most", len(token))
	}
	for name, brought := range map[string]bool{"by the workers": false, "by the subjects": true} {
		token := v.tokenFor(parties[0], "")
		for i, p := range parties[1:] {
			more := []string{"resource", work}
			if brought {
				token = v.exchanged(parties[i], token, withActor(v.tokenFor(p, ""), more...)...)
			} else {
				token = v.exchanged(p, token, more...)
			}
			t.Logf("%s, depth %d: %d bytes", name, i+1, len(token))
		}
		if len(token) >= 2000 {
			t.Errorf("fetched %s a token of depth 3 has %d bytes, want less than 2 kB", name, len(token))
		}
	}
}
