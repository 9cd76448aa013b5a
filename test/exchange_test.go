package test

import (
	"net/url"
	"strings"
	"testing"
)

// Agents that hand work on: a token becomes one of the worker, which says on whose behalf it acts.

const (
	exchangeGrant   = "urn:ietf:params:oauth:grant-type:token-exchange"
	accessTokenType = "urn:ietf:params:oauth:token-type:access_token"
	work            = "https://work.example.com"
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

// delegate says who may act for an agent.
func (v *service) delegate(p party, to ...party) {
	v.t.Helper()
	ids := []string{}
	for _, worker := range to {
		ids = append(ids, worker.id)
	}
	v.want(v.allow(p.id, "delegates", members{"x": ids}.String()[5:len(members{"x": ids}.String())-1]), 200, "")
}

// exchange has a worker trade a token.
func (v *service) exchanges(worker party, subject string, more ...string) answer {
	v.t.Helper()
	form := url.Values{"grant_type": {exchangeGrant}, "subject_token": {subject}, "subject_token_type": {accessTokenType}}
	for i := 0; i < len(more); i += 2 {
		form.Set(more[i], more[i+1])
	}
	return v.form(worker.id, worker.secret, "", form.Encode())
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
	x = v.want(v.exchanges(a, token, "resource", work, "actor_token", actor, "actor_token_type", accessTokenType), 200, "")
	if seen := v.want(v.introspect(x.text("access_token")), 200, ""); seen.text("sub") != a.id || seen.text("client_id") != b.id {
		t.Errorf("it is introspected as %v", seen)
	}
	v.want(v.form(b.id, b.secret, "/revoke", "token="+actor), 200, "")
	if v.active(x.text("access_token")) {
		t.Error("it outlives the actor's token")
	}
}
