package test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Agents that another issuer vouches for, and that have neither a secret nor a key of their own here.

const jwtBearer = "urn:ietf:params:oauth:grant-type:jwt-bearer"

// cluster is an issuer of workloads whose keys the operator has written down.
const cluster = "https://kubernetes.default.svc"

// trusting is WORKLOAD_ISSUERS for issuers with these keys.
func trusting(issuers map[string]holder, more members) string {
	all := members{}
	for issuer, h := range issuers {
		all[issuer] = members{"jwks": members{"keys": []any{h.jwk.with(members{"kid": "first"})}}}.with(more)
	}
	return all.String()
}

func (v *service) workloadClaims(issuer, subject string) members {
	now := time.Now().Unix()
	return members{"iss": issuer, "sub": subject, "aud": []string{v.env["ISSUER"]}, "jti": newID(), "iat": now, "nbf": now, "exp": now + 3600}
}

// vouch signs an assertion of an issuer as Kubernetes does: with a kid, and no typ.
func (h holder) vouch(claims members) string {
	return h.sign(members{"alg": h.alg, "kid": "first"}, claims)
}

// byGrant trades an assertion for a token.
func (v *service) byGrant(assertion string, more ...string) answer {
	v.t.Helper()
	form := url.Values{"grant_type": {jwtBearer}, "assertion": {assertion}}
	for i := 0; i < len(more); i += 2 {
		form.Set(more[i], more[i+1])
	}
	return v.do("POST", "/api/v1/token", form.Encode(), "Content-Type", "application/x-www-form-urlencoded")
}

// bind gives an agent a credential that names a workload.
func (v *service) bind(agentID, issuer, subject string, claims members) answer {
	v.t.Helper()
	w := members{"issuer": issuer, "subject": subject}
	if claims != nil {
		w["claims"] = claims
	}
	return v.api(v.bearer, "POST", "/agents/"+agentID+"/credentials", members{"workload": w}.String())
}

func TestWorkloadsAreAsGoodAsSecrets(t *testing.T) {
	t.Parallel()
	for _, alg := range []string{"RS256", "ES256"} {
		h := newHolder(t, alg)
		v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
		id := v.newAgent(tokensRead, "a:b")
		made := v.want(v.bind(id, cluster, screener, nil), 201, "")
		assertion := h.vouch(v.workloadClaims(cluster, screener))
		for range 2 { // one file for an hour
			token := v.want(v.byGrant(assertion, "scope", "a:b"), 200, "").text("access_token")
			v.want(v.byAssertion("", assertion), 200, "")
			c := v.want(v.byAssertion("/introspect", assertion, "token", token), 200, "")
			if c.text("credential_id") != made.text("credentialId") || c.text("sub") != id {
				t.Errorf("the token is of another credential: %v", c)
			}
			v.want(v.byAssertion("/revoke", assertion, "token", token), 200, "")
			if v.active(token) {
				t.Error("the revoked token is active")
			}
		}
		token := v.want(v.byGrant(assertion), 200, "").text("access_token")
		v.want(v.api(v.bearer, "DELETE", "/credentials?workloadIssuer="+url.QueryEscape(cluster), ""), 204, "")
		if v.active(token) {
			t.Error("a token of an issuer that was cut off is active")
		}
		v.want(v.byGrant(assertion), 400, "invalid_grant")
		v.want(v.byAssertion("", assertion), 401, "invalid_client")
		v.want(v.api(v.bearer, "DELETE", "/credentials?workloadIssuer="+url.QueryEscape(cluster), ""), 404, "CREDENTIAL_NOT_FOUND")
	}
}

// keysOf is a set of keys as an issuer publishes it.
func keysOf(holders ...holder) members {
	list := []any{}
	for _, h := range holders {
		list = append(list, h.jwk.with(members{"kid": "first"}))
	}
	return members{"keys": list}
}

// wantBoth trades an assertion as a grant, and uses it as client authentication; it
// is to be good for both, or for neither.
func (v *service) wantBoth(name, assertion string, good bool, more ...string) {
	v.t.Helper()
	for way, a := range map[string]answer{"invalid_grant": v.byGrant(assertion, more...), "invalid_client": v.byAssertion("", assertion, more...)} {
		status := map[string]int{"invalid_grant": 400, "invalid_client": 401}[way]
		if good && a.status != 200 || !good && (a.status != status || a.code() != way) {
			v.t.Errorf("%s: answered %v, want good: %v, else %d %s", name, a, good, status, way)
		}
	}
}

const screener = "system:serviceaccount:hiring:screener"

// Nothing but equality makes a workload an agent, and nothing but the key of its
// issuer a token of it.
func TestWorkloadsAreNobodyElse(t *testing.T) {
	t.Parallel()
	h, h2, domain := newHolder(t, "ES256"), newHolder(t, "ES256"), newHolder(t, "ES256")
	other := newService(t, "ISSUER", "http://other.test")
	theirs := other.want(other.do("GET", "/.well-known/jwks.json", ""), 200, "").body
	v := newService(t, "ISSUER", "http://idp.test", "WORKLOAD_ISSUERS", members{
		cluster: members{"jwks": keysOf(h)}, "https://second.example": members{"jwks": keysOf(h2)}, other.env["ISSUER"]: members{"jwks": theirs},
		"spiffe://a.example": members{"jwks": keysOf(domain)},
	}.String())
	id := v.newAgent("a:b")
	v.want(v.bind(id, cluster, screener, members{"env": "prod"}), 201, "")
	base := v.workloadClaims(cluster, screener).with(members{"env": "prod"})
	now := time.Now().Unix()
	header := members{"alg": "ES256", "kid": "first"}
	for name, row := range map[string]struct {
		claims members
		good   bool
	}{
		"as it is":             {base, true},
		"more claims":          {base.with(members{"env2": "dev", "groups": []string{"a"}}), true},
		"aud as text":          {base.with(members{"aud": "http://idp.test"}), true},
		"aud with a slash":     {base.with(members{"aud": "http://idp.test/"}), true},
		"no jti":               {base.without("jti"), true},
		"cnf null":             {base.with(members{"cnf": nil}), true},
		"act null":             {base.with(members{"act": nil}), true},
		"of an actor":          {base.with(members{"act": members{"sub": "another"}}), false},
		"of an empty actor":    {base.with(members{"act": members{}}), false},
		"bound to a key":       {base.with(members{"cnf": members{"jkt": thumbprint(h.jwk)}}), false},
		"no iat and nbf":       {base.without("iat").without("nbf"), true},
		"exp in 24 hours":      {base.with(members{"exp": now + 24*3600}), true},
		"issuer with a slash":  {base.with(members{"iss": cluster + "/"}), false},
		"issuer in upper case": {base.with(members{"iss": "https://Kubernetes.default.svc"}), false},
		"issuer without https": {base.with(members{"iss": "kubernetes.default.svc"}), false},
		"no issuer":            {base.without("iss"), false},
		"our own issuer":       {base.with(members{"iss": "http://idp.test"}), false},
		"another issuer's key": {base.with(members{"iss": "https://second.example"}), false},
		"issuer a list":        {base.with(members{"iss": []string{cluster}}), false},
		"issuer is the agent":  {base.with(members{"iss": id, "sub": id}), false},
		"subject's prefix":     {base.with(members{"sub": screener[:len(screener)-1]}), false},
		"subject and more":     {base.with(members{"sub": screener + "2"}), false},
		"subject with a space": {base.with(members{"sub": screener + " "}), false},
		"subject with NUL":     {base.with(members{"sub": screener + "\x00"}), false},
		"jti with NUL":         {base.with(members{"jti": "\x00"}), false},
		"subject a glob":       {base.with(members{"sub": "system:serviceaccount:hiring:*"}), false},
		"subject a pattern":    {base.with(members{"sub": "%"}), false},
		"subject upper case":   {base.with(members{"sub": strings.ToUpper(screener)}), false},
		"subject the agent":    {base.with(members{"sub": id}), false},
		"no subject":           {base.without("sub"), false},
		"claim missing":        {base.without("env"), false},
		"claim another":        {base.with(members{"env": "dev"}), false},
		"claim upper case":     {base.with(members{"env": "PROD"}), false},
		"claim's name's case":  {base.without("env").with(members{"Env": "prod"}), false},
		"claim empty":          {base.with(members{"env": ""}), false},
		"claim null":           {base.with(members{"env": nil}), false},
		"claim a number":       {base.with(members{"env": 1}), false},
		"claim a list":         {base.with(members{"env": []string{"prod"}}), false},
		"claim nested":         {base.with(members{"env": members{"env": "prod"}}), false},
		"aud of two":           {base.with(members{"aud": []string{"http://idp.test", "https://b.example"}}), false},
		"aud twice the same":   {base.with(members{"aud": []string{"http://idp.test", "http://idp.test"}}), false},
		"aud another":          {base.with(members{"aud": "https://kubernetes.default.svc"}), false},
		"aud of a person":      {base.with(members{"aud": "client-of-people", "nonce": "n"}), false},
		"aud none":             {base.without("aud"), false},
		"aud empty":            {base.with(members{"aud": []string{}}), false},
		"aud upper case":       {base.with(members{"aud": "http://IDP.test"}), false},
		"aud introspection":    {base.with(members{"aud": "http://idp.test/api/v1/token/introspect"}), false},
		"expired":              {base.with(members{"exp": now - 1}), false},
		"exp in 25 hours":      {base.with(members{"exp": now + 25*3600}), false},
		"exp in a year":        {base.with(members{"exp": now + 365*24*3600}), false},
		"exp as text":          {base.with(members{"exp": fmt.Sprint(now + 60)}), false},
		"no exp":               {base.without("exp"), false},
		"nbf to come":          {base.with(members{"nbf": now + 60}), false},
		"iat to come":          {base.with(members{"iat": now + 60}), false},
	} {
		v.wantBoth(name, h.sign(header, row.claims), row.good)
	}
	none := encode(members{"alg": "none"}.String()) + "." + encode(base.String()) + "."
	for name, assertion := range map[string]string{
		"another's key":           h2.sign(header, base),
		"another's key in it":     h2.sign(header.with(members{"jwk": h2.jwk}), base),
		"another's key by URL":    h2.sign(header.with(members{"jku": "https://second.example/keys", "x5u": "https://second.example/x"}), base),
		"no algorithm":            none,
		"alg HS256":               h.sign(header.with(members{"alg": "HS256"}), base),
		"alg RS256":               h.sign(header.with(members{"alg": "RS256"}), base),
		"alg another case":        h.sign(header.with(members{"alg": "es256"}), base),
		"no alg":                  h.sign(header.without("alg"), base),
		"another kid":             h.sign(header.with(members{"kid": "second"}), base),
		"kid a path":              h.sign(header.with(members{"kid": "../first"}), base),
		"typ dpop+jwt":            h.sign(header.with(members{"typ": "dpop+jwt"}), base),
		"typ logout+jwt":          h.sign(header.with(members{"typ": "logout+jwt"}), base),
		"crit":                    h.sign(header.with(members{"crit": []string{"exp"}}), base),
		"signature zero":          h.sign(header, base)[:strings.LastIndex(h.sign(header, base), ".")+1] + encode(strings.Repeat("\x00", 64)),
		"our own access token":    v.bearer,
		"our own checkpoint":      v.checkpoint(),
		"theirs for them":         other.bearer,
		"theirs that isn't bound": other.want(other.form(other.id, other.secret, "", "grant_type=client_credentials&resource=http://idp.test"), 200, "").text("access_token"),
		"no JWT":                  "x",
	} {
		v.wantBoth(name, assertion, false)
	}
	for name, h := range map[string]string{"JWT": h.sign(header.with(members{"typ": "JWT"}), base), "at+jwt": h.sign(header.with(members{"typ": "at+jwt"}), base), "no kid": h.sign(header.without("kid"), base)} {
		v.wantBoth(name, h, true)
	}
	endpoint := h.vouch(base.with(members{"aud": "http://idp.test/api/v1/token"}))
	v.want(v.byGrant(endpoint), 200, "")
	if a := v.want(v.byAssertion("", endpoint), 401, "invalid_client"); !strings.Contains(a.raw, "must have the aud http://idp.test,") {
		t.Errorf("of the wrong aud it says %s, want which is right", a.raw)
	}

	// Another AgentIdP says who it is by an access token for us.
	v.want(v.bind(id, other.env["ISSUER"], other.id, members{"client_id": other.id}), 201, "")
	v.wantBoth("theirs", other.want(other.form(other.id, other.secret, "", "grant_type=client_credentials&resource=http://idp.test"), 200, "").text("access_token"), true)
	v.wantBoth("theirs for two", other.want(other.form(other.id, other.secret, "", "grant_type=client_credentials&resource=http://idp.test&resource=https://b.example"), 200, "").text("access_token"), false)
	delegate := other.newParty("a:b") // which acts for who is bound here, and is somebody else
	subject := other.newParty("a:b")
	v.want(v.bind(id, other.env["ISSUER"], subject.id, nil), 201, "")
	other.delegate(subject, delegate)
	v.wantBoth("theirs by exchange", other.exchanged(delegate, other.tokenFor(subject, ""), "resource", "http://idp.test"), false)
	v.wantBoth("theirs without exchange", other.tokenFor(subject, "resource=http://idp.test"), true)

	// A JWT-SVID has no issuer, but a trust domain.
	const svid = "spiffe://a.example/ns/hiring/sa/screener"
	v.want(v.bind(id, "spiffe://a.example", svid, nil), 201, "")
	of := func(sub string) string {
		return domain.vouch(members{"sub": sub, "aud": []string{"http://idp.test"}, "exp": now + 300})
	}
	v.wantBoth("an SVID", of(svid), true)
	v.want(v.byAssertion("", of(svid), "client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"), 200, "")
	own, _, key := v.newKeyClient("ES256", "a:b") // a client's own assertion is none of SPIFFE
	v.want(v.byAssertion("", v.assertion(key, own), "client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"), 401, "invalid_client")
	v.want(v.byAssertion("", v.assertion(key, own)), 200, "")
	v.want(v.byAssertion("", of(svid), "client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:saml2-bearer"), 400, "invalid_request")
	for _, sub := range []string{
		"spiffe://a.example@b/ns/hiring/sa/screener", "spiffe://a.example:443/ns/hiring/sa/screener", "spiffe://A.example/ns/hiring/sa/screener",
		"spiffe://a%2eexample/ns/hiring/sa/screener", "SPIFFE://a.example/ns/hiring/sa/screener", "spiffe://a.example/ns/hiring/sa/Screener", "spiffe://a.example",
		"spiffe://a.example/", svid + "/", svid + "?x", "spiffe://a.example//ns/hiring/sa/screener", "spiffe://a.example/x/../ns/hiring/sa/screener",
		"spiffe://a.example.b/ns/hiring/sa/screener", "spiffe:///ns/hiring/sa/screener", "a.example/ns/hiring/sa/screener", "spiffe://a.example?/ns/hiring/sa/screener",
	} {
		v.wantBoth(sub, of(sub), false)
	}
	v.wantBoth("an SVID of another key", h.vouch(members{"sub": svid, "aud": "http://idp.test", "exp": now + 300}), false)
}

// metadata is that of the newest event of an agent and an action.
func (v *service) metadata(agentID, action string) members {
	v.t.Helper()
	var m members
	if err := json.Unmarshal(v.audit("limit=1&agentId=" + agentID + "&action=" + action).Data[0].Metadata, &m); err != nil {
		v.t.Fatal(err)
	}
	return m
}

// Whoever sends a token that says no key has few tried, as many as of a client's own.
func TestWorkloadsWithoutKidHaveFewKeysTried(t *testing.T) {
	t.Parallel()
	var few, many []holder
	for range 6 {
		many = append(many, newHolder(t, "ES256"))
	}
	few = many[:5]
	set := keysOf(many...)
	set["keys"].([]any)[5].(members)["kid"] = "sixth"
	v := newService(t, "WORKLOAD_ISSUERS", members{cluster: members{"jwks": keysOf(few...)}, "https://second.example": members{"jwks": set}}.String())
	id := v.newAgent("a:b")
	for _, issuer := range []string{cluster, "https://second.example"} {
		v.want(v.bind(id, issuer, screener, nil), 201, "")
		for n, h := range few {
			v.wantBoth(fmt.Sprintf("key %d of %s", n, issuer), h.vouch(v.workloadClaims(issuer, screener)), true)
			v.wantBoth(fmt.Sprintf("key %d of %s without its kid", n, issuer), h.sign(members{"alg": h.alg}, v.workloadClaims(issuer, screener)), issuer == cluster)
		}
	}
	a := v.want(v.byGrant(few[0].sign(members{"alg": "ES256"}, v.workloadClaims("https://second.example", screener))), 400, "invalid_grant")
	if !strings.Contains(a.text("error_description"), "must say by its kid") {
		t.Errorf("answered %v", a)
	}
}

// What is refused of a workload that its issuer vouches for says in the log which it is; of
// one for which nobody does, nothing that it claims.
func TestRefusedWorkloadsAreRecorded(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	suspended := v.newAgent("a:b")
	v.want(v.bind(suspended, cluster, "suspended", nil), 201, "")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+suspended, `{"status":"suspended"}`), 200, "")
	for _, row := range []struct {
		subject, agent string
		by             holder
	}{{"unbound", "", h}, {"suspended", suspended, h}, {"suspended", "", newHolder(t, "ES256")}} {
		claims := v.workloadClaims(cluster, row.subject)
		v.byGrant(row.by.vouch(claims))
		e := v.audit("limit=1&action=" + authFailed).Data[0]
		var m struct{ Workload members }
		if err := json.Unmarshal(e.Metadata, &m); err != nil {
			t.Fatal(err)
		}
		want := members{"issuer": cluster, "subject": row.subject, "jti": claims["jti"]}
		if row.by.jwk["x"] != h.jwk["x"] {
			want = nil
		}
		if idText(e.AgentID) != row.agent || !reflect.DeepEqual(m.Workload, want) {
			t.Errorf("%s is recorded as %s of %q, want %v of %q", row.subject, e.Metadata, idText(e.AgentID), want, row.agent)
		}
	}
}

// Whoever is cut off while a request of theirs waits gets nothing: its issuer's place in the file too, and whatever the grant is
// told has the form of one. Each is in the log, with whom it was about.
func TestWorkloadThatIsCutOffWhileItWaitsGetsNothing(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	file := filepath.Join(t.TempDir(), "issuers.json")
	write := func(text string) {
		if err := errors.Join(os.WriteFile(file+".new", []byte(text), 0o600), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	trusted := members{cluster: members{"jwks": keysOf(h)}, "https://second.example": members{"jwks": keysOf(h)}}
	write(trusted.String())
	p := newCutter(t, newKeyFiles(t, testKey(), "").env("WORKLOAD_ISSUERS_FILE", file)...)
	q, third := p.another(), p.another()
	for name, row := range map[string]struct {
		cut  func(id string)
		good bool
	}{
		"taken out": {func(string) { write(trusted.without(cluster).String()) }, false},
		"other keys": {func(string) {
			write(trusted.with(members{cluster: members{"jwks": keysOf(newHolder(t, "ES256"))}}).String())
		}, false},
		"single use": {func(string) {
			write(trusted.with(members{cluster: members{"jwks": keysOf(h), "singleUse": true}}).String())
		}, false},
		"as it was":      {func(string) { write(trusted.String() + " ") }, true},
		"another is out": {func(string) { write(trusted.without("https://second.example").String()) }, true},
		"suspended":      {func(id string) { p.want(p.api(p.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "") }, false},
	} {
		write(trusted.String())
		for _, copy := range []*program{p, q, third} {
			copy.hangup()
		}
		id := p.newAgent(tokensRead)
		p.want(p.bind(id, cluster, name, nil), 201, "")
		claims := p.workloadClaims(cluster, name)
		assertion := h.vouch(claims)
		tx := p.lockChain()
		cut, token, known := make(chan bool, 1), make(chan answer, 1), make(chan answer, 1)
		if name == "suspended" {
			go func() { row.cut(id); cut <- true }()
			p.eventually("the cut waits for the chain", func() bool { return p.waiting() == 1 })
		}
		before := p.waiting()
		go func() { token <- q.byGrant(assertion) }()
		p.eventually("the request waits behind it", func() bool { return p.waiting() == before+1 })
		go func() { known <- third.byAssertion("/introspect", assertion, "token", p.bearer) }()
		p.eventually("so does another", func() bool { return p.waiting() == before+2 })
		if name != "suspended" {
			row.cut(id)
			q.hangup()
			third.hangup()
			cut <- true
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-cut
		if a := <-token; (a.status == 200) != row.good || !row.good && (a.status != 400 || a.code() != "invalid_grant") {
			t.Errorf("%s meanwhile: the grant is answered %v, want it good: %v, else 400 invalid_grant", name, a, row.good)
		}
		if a := <-known; (a.status == 200) != row.good || !row.good && (a.status != 401 || a.code() != "invalid_client") {
			t.Errorf("%s meanwhile: the introspection is answered %v, want it good: %v, else 401 invalid_client", name, a, row.good)
		}
		want := map[string]any{"token.issued success": row.good, "token.issued failure": !row.good,
			"token.introspected success": row.good, "token.introspected failure": !row.good}
		for _, e := range p.audit("limit=100&actorId=" + id).Data {
			var m members
			if err := json.Unmarshal(e.Metadata, &m); err != nil {
				t.Fatal(err)
			}
			if what := e.Action + " " + e.Outcome; want[what] != true || !reflect.DeepEqual(m["workload"], map[string]any{"issuer": cluster, "subject": name, "jti": claims["jti"]}) {
				t.Errorf("%s meanwhile: recorded is %s %s", name, what, e.Metadata)
			} else {
				want[what] = false
			}
		}
		for what, missing := range want {
			if missing == true {
				t.Errorf("%s meanwhile: there is no %s", name, what)
			}
		}
	}
}

// Where more credentials name a workload than are looked at, nobody is chosen by which those are.
func TestWorkloadThatIsTooManyIsRefused(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	one, two := v.newAgent("a:b"), v.newAgent("a:b")
	v.want(v.bind(one, cluster, screener, nil), 201, "")
	for n := range 63 {
		v.want(v.bind(two, cluster, screener, members{"pod": fmt.Sprint(n)}), 201, "")
	}
	claims := v.workloadClaims(cluster, screener)
	if a := v.want(v.byGrant(h.vouch(claims)), 200, ""); a.text("access_token") == "" {
		t.Error("the one of 64 that fits gets no token")
	}
	v.want(v.byGrant(h.vouch(claims.with(members{"pod": "62"}))), 400, "invalid_request") // is both
	// With these the last hide the first.
	for range 3 {
		v.want(v.bind(two, cluster, screener, nil), 201, "")
	}
	for _, text := range []string{h.vouch(claims), h.vouch(claims.with(members{"pod": "0"}))} {
		if a := v.want(v.byGrant(text), 400, "invalid_request"); !strings.Contains(a.text("error_description"), "client_id") {
			t.Errorf("of 67 answered %v, want what to do", a)
		}
		v.want(v.byGrant(text, "client_id", one), 200, "")
		v.want(v.byGrant(text, "client_id", two), 400, "invalid_request") // which alone has 66
	}
}

// How a workload's credential begins, is chosen, and ends.
func TestWorkloadsHaveCredentials(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "ISSUER", "http://idp.test", "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	id := v.newAgent("a:b", tokensRead)
	made := v.want(v.bind(id, cluster, screener, nil), 201, "")
	if made.text("kind") != "workload" || made.body["clientSecret"] != nil || made.body["secretPrefix"] != nil || made.body["keyThumbprint"] != nil {
		t.Errorf("the credential is %v, want a workload without a secret", made)
	}
	if got, _ := json.Marshal(v.metadata(id, "credential.generated")["workload"]); string(got) != `{"issuer":"`+cluster+`","subject":"`+screener+`"}` {
		t.Errorf("its event has the workload %s", got)
	}
	claims := v.workloadClaims(cluster, screener)
	assertion := h.vouch(claims)
	token := v.want(v.byGrant(assertion), 200, "").text("access_token")
	if got := v.metadata(id, "token.issued")["workload"].(map[string]any); got["issuer"] != cluster || got["subject"] != screener || got["jti"] != claims["jti"] || len(got) != 3 {
		t.Errorf("the token's event has the workload %v", got)
	}

	for name, w := range map[string]string{
		"no object": `"x"`, "null": `null`, "nothing": `{}`, "no issuer": `{"subject":"a"}`, "no subject": `{"issuer":"` + cluster + `"}`,
		"an issuer that isn't trusted": `{"issuer":"https://evil.example","subject":"a"}`, "with a slash": `{"issuer":"` + cluster + `/","subject":"a"}`,
		"our own": `{"issuer":"http://idp.test","subject":"a"}`, "subject a number": `{"issuer":"` + cluster + `","subject":1}`,
		"subject empty": `{"issuer":"` + cluster + `","subject":""}`, "subject with NUL": `{"issuer":"` + cluster + `","subject":"a\u0000"}`,
		"subject too long": `{"issuer":"` + cluster + `","subject":"` + strings.Repeat("a", 513) + `"}`, "more members": `{"issuer":"` + cluster + `","subject":"a","x":1}`,
		"claims a list": `{"issuer":"` + cluster + `","subject":"a","claims":[]}`, "claims null": `{"issuer":"` + cluster + `","subject":"a","claims":null}`,
		"a claim a number": `{"issuer":"` + cluster + `","subject":"a","claims":{"x":1}}`, "a claim nested": `{"issuer":"` + cluster + `","subject":"a","claims":{"x":{"y":"z"}}}`,
		"a claim empty": `{"issuer":"` + cluster + `","subject":"a","claims":{"x":""}}`, "a claim with NUL": `{"issuer":"` + cluster + `","subject":"a","claims":{"x":"\u0000"}}`,
		"a claim's name with NUL": `{"issuer":"` + cluster + `","subject":"a","claims":{"\u0000":"x"}}`,
		"a broken subject":        `{"issuer":"` + cluster + `","subject":"a\ud800"}`, "a subject that stands for broken ones": `{"issuer":"` + cluster + `","subject":"a\ufffd"}`,
		"a broken claim": `{"issuer":"` + cluster + `","subject":"a","claims":{"x":"\udfff"}}`, "a claim's broken name": `{"issuer":"` + cluster + `","subject":"a","claims":{"\udfff":"x"}}`,
		"17 claims": `{"issuer":"` + cluster + `","subject":"a","claims":{` + seventeen + `}}`,
	} {
		if a := v.api(v.bearer, "POST", "/agents/"+id+"/credentials", `{"workload":`+w+`}`); a.status != 400 || a.code() != "VALIDATION_ERROR" {
			t.Errorf("a workload with %s is answered %v, want 400", name, a)
		}
	}
	v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials", members{"workload": members{"issuer": cluster, "subject": "a"}, "publicKey": h.jwk}.String()), 400, "VALIDATION_ERROR")

	// It is authenticated once.
	for _, more := range [][]string{
		{"client_secret", v.secret}, {"client_assertion", assertion, "client_assertion_type", assertionType}, {"client_assertion_type", assertionType},
	} {
		v.want(v.byGrant(assertion, more...), 400, "invalid_request")
	}
	form := url.Values{"grant_type": {jwtBearer}, "assertion": {assertion}}.Encode()
	v.want(v.form(v.id, v.secret, "", form), 400, "invalid_request")
	v.want(v.do("POST", "/api/v1/token", form, "Content-Type", formType, "Authorization", "Bearer "+token), 400, "invalid_request")
	v.want(v.byGrant(""), 400, "invalid_request")
	for _, path := range []string{"/introspect", "/revoke"} {
		v.want(v.form("", "", path, form+"&token="+token), 401, "invalid_client")
	}
	if !v.active(token) {
		t.Error("a grant has revoked a token")
	}

	// Several credentials of one agent, and several agents of one workload.
	v.want(v.byGrant(assertion, "client_id", id), 200, "")
	for _, wrong := range []string{v.id, newID(), "x", strings.ToUpper(id), "\x00"} {
		v.wantBoth("client_id "+wrong, assertion, false, "client_id", wrong)
	}
	v.want(v.bind(id, cluster, screener, members{"env": "prod"}), 201, "")
	v.want(v.bind(id, cluster, screener, members{"env": "dev", "zone": "a"}), 201, "")
	v.wantBoth("the first of several credentials", assertion, true)
	second := v.newAgent("c:d")
	v.want(v.bind(second, cluster, screener, members{"env": "prod"}), 201, "")
	v.wantBoth("one agent's credential still", assertion, true)
	both := h.vouch(claims.with(members{"env": "prod"}))
	for _, a := range []answer{v.byGrant(both), v.byAssertion("", both)} {
		if v.want(a, 400, "invalid_request"); !strings.Contains(a.raw, "client_id") {
			t.Errorf("of several agents it says %s, want client_id", a.raw)
		}
	}
	for _, id := range []string{id, second} {
		if a := v.want(v.byGrant(both, "client_id", id), 200, ""); (a.text("scope") == "c:d") != (id == second) {
			t.Errorf("client_id %s gets %v", id, a)
		}
	}

	// Agents and credentials that end.
	v.want(v.api(v.bearer, "PATCH", "/agents/"+second, `{"status":"suspended"}`), 200, "")
	v.want(v.byGrant(both, "client_id", second), 403, "unauthorized_client")
	v.want(v.byAssertion("", both, "client_id", second), 403, "unauthorized_client")
	v.want(v.api(v.bearer, "DELETE", "/agents/"+second, ""), 204, "")
	v.wantBoth("decommissioned", both, false, "client_id", second)

	third := v.newAgent("e:f")
	made = v.want(v.bind(third, cluster, "third", nil), 201, "")
	assertion = h.vouch(v.workloadClaims(cluster, "third"))
	token = v.want(v.byGrant(assertion), 200, "").text("access_token")
	path := "/agents/" + third + "/credentials/" + made.text("credentialId")
	for _, body := range []string{`{}`, members{"publicKey": h.jwk}.String()} {
		v.want(v.api(v.bearer, "POST", path+"/rotate", body), 400, "VALIDATION_ERROR")
	}
	v.want(v.api(v.bearer, "POST", path+"/rotate", members{"workload": members{"issuer": cluster, "subject": "fourth"}}.String()), 200, "")
	v.wantBoth("rotated", assertion, false)
	if v.active(token) {
		t.Error("a token of before a rotation is active")
	}
	fourth := h.vouch(v.workloadClaims(cluster, "fourth"))
	token = v.want(v.byGrant(fourth), 200, "").text("access_token")
	v.setExpiry(made.text("credentialId"), time.Now().Add(-time.Second))
	v.wantBoth("expired", fourth, false)
	if v.active(token) {
		t.Error("a token of a credential that has expired is active")
	}
	v.setExpiry(made.text("credentialId"), time.Now().Add(time.Hour))
	v.wantBoth("not expired", fourth, true)
	v.want(v.api(v.bearer, "DELETE", path, ""), 204, "")
	v.wantBoth("revoked", fourth, false)

	// Failures are counted for the address, and stop nobody who is right.
	limited := v.another("RATE_LIMIT_PER_MINUTE", "3")
	right := h.vouch(v.workloadClaims(cluster, screener))
	for range 3 {
		limited.want(limited.byGrant(fourth), 400, "invalid_grant")
	}
	limited.want(limited.byGrant(fourth), 429, "temporarily_unavailable")
	limited.want(limited.byAssertion("", fourth), 429, "temporarily_unavailable")
	limited.want(limited.byGrant(right), 200, "")
	failed := 0
	for _, e := range v.chain() {
		if e.Action == "auth.failed" && strings.Contains(string(e.Metadata), "invalid_grant") {
			failed++
		}
	}
	if failed == 0 {
		t.Error("no failure of a grant is in the audit log")
	}
}

var seventeen = func() string {
	list := make([]string, 17)
	for n := range list {
		list[n] = fmt.Sprintf(`"c%d":"x"`, n)
	}
	return strings.Join(list, ",")
}()

// What a workload has bound to its issuer while that is cut off is not left behind the
// event of the cut.
func TestWorkloadBoundDuringTheCutIsNotLeft(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	one, two := v.newAgent("a:b"), v.newAgent("a:b")
	binderID, binderSecret := v.quickClient(agentsWrite)
	binder := v.token(binderID, binderSecret, "") // two by one agent would wait for each other
	v.want(v.bind(one, cluster, "one", nil), 201, "")
	tx := v.begun(`select from agents where agent_id = '` + one + `' for update`)
	path := "/credentials?workloadIssuer=" + url.QueryEscape(cluster)
	cut := make(chan answer, 1)
	go func() { cut <- v.api(v.bearer, "DELETE", path, "") }()
	v.eventually("the cut knows whom it concerns", func() bool {
		return v.count(`select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`) == 1
	})
	v.want(v.api(binder, "POST", "/agents/"+two+"/credentials", members{"workload": members{"issuer": cluster, "subject": "two"}}.String()), 201, "")
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.want(<-cut, 204, "")
	if n := v.count(`select count(*) from credentials where workload is not null and status = 'active'`); n != 0 {
		t.Errorf("the cut leaves %d workloads", n)
	}
}

// However many there are, they end, a transaction for each 1,000 agents; or none does, where
// one of them is too much for who asks, or nobody would be left to manage agents.
func TestLargeIssuerIsCutOff(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil), "MAX_AGENTS", "0")
	const n = 2500
	v.exec(`insert into agents (agent_id, email, agent_type, version, capabilities, owner, deployment_env)
		select gen_random_uuid(), 'many' || n || '@example.com', 'custom', '1.0.0', '{a:b}', 'o', 'staging' from generate_series(1, 2500) as n`)
	v.exec(`insert into credentials (credential_id, client_id, kind, secret_prefix, secret_hash, secret_id, workload)
		select gen_random_uuid(), agent_id, 'workload', substr(md5(email), 1, 16), '', gen_random_uuid(), json_build_object('issuer', '` + cluster + `', 'subject', email)
		from agents where email like 'many%'`)
	left := func() int {
		return v.count(`select count(*) from credentials where kind = 'workload' and status = 'active'`)
	}
	path := "/credentials?workloadIssuer=" + url.QueryEscape(cluster)
	token := v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, "many7@example.com"))), 200, "").text("access_token")

	v.exec(`update agents set capabilities = '{audit:read}' where email = 'many2000@example.com'`)
	weak := v.token(v.id, v.secret, agentsWrite)
	v.want(v.api(weak, "DELETE", path, ""), 403, "FORBIDDEN")
	v.exec(`update agents set capabilities = '{agents:write}' where email = 'many2000@example.com'`)
	if left() != n {
		t.Errorf("a refused cut has ended %d", n-left())
	}
	v.want(v.api(weak, "DELETE", path, ""), 204, "")
	if left() != 0 || v.active(token) {
		t.Errorf("the cut has left %d", left())
	}
	if events := v.count(`select count(*) from audit_events where action = 'credential.revoked' and outcome = 'success' and actor_id = '` + v.id + `'`); events != n {
		t.Errorf("%d credentials have ended, with %d events", n, events)
	}
	if of := v.count(`select count(distinct xmin::text) from audit_events where action = 'credential.revoked' and outcome = 'success'`); of != 3 {
		t.Errorf("they have ended in %d transactions, want 3", of)
	}
	v.checkChain()
}

// Who doesn't say as which of several agents it comes is refused, and that is counted for its
// address, and recorded.
func TestWorkloadThatIsSeveralAgentsIsCounted(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil), "RATE_LIMIT_PER_MINUTE", "20")
	for range 2 {
		v.want(v.bind(v.newAgent("a:b"), cluster, screener, nil), 201, "")
	}
	v.withinAMinute(func(int64, time.Duration) {
		v.forget()
		assertion := h.vouch(v.workloadClaims(cluster, screener))
		for range 20 {
			v.want(v.byGrant(assertion), 400, "invalid_request")
		}
		v.want(v.byGrant(assertion), 429, "temporarily_unavailable")
	})
	e := v.audit("limit=1&action=" + authFailed).Data[0]
	if e.fact("reason") != "invalid_request" || !strings.Contains(string(e.Metadata), screener) {
		t.Errorf("it is recorded as %s", e.Metadata)
	}
}

// Where each is good once, it is that on all copies.
func TestWorkloadsOfSingleUse(t *testing.T) {
	t.Parallel()
	h, a, b := newHolder(t, "ES256"), newHolder(t, "ES256"), newHolder(t, "ES256")
	once := members{"singleUse": true}
	v := newService(t, "ISSUER", "http://idp.test", "WORKLOAD_ISSUERS", members{
		cluster: members{"jwks": keysOf(h)}.with(once), "spiffe://a.example": members{"jwks": keysOf(a)}.with(once), "spiffe://b.example": members{"jwks": keysOf(b)}.with(once),
	}.String())
	copies := []*service{v, v.another()}
	id := v.newAgent("a:b")
	v.want(v.bind(id, cluster, screener, nil), 201, "")
	for range 10 {
		assertion, codes := h.vouch(v.workloadClaims(cluster, screener)), make([]int, 6)
		var all sync.WaitGroup
		for n := range codes {
			all.Go(func() {
				if n%3 == 0 {
					codes[n] = copies[n%2].byAssertion("", assertion).status
				} else {
					codes[n] = copies[n%2].byGrant(assertion).status
				}
			})
		}
		all.Wait()
		if slices.Sort(codes); codes[0] != 200 || codes[1] == 200 || codes[5] != 401 {
			t.Errorf("used at the same time on two copies it is answered %v, want 200 once, else 400 and 401", codes)
		}
	}
	v.wantBoth("without a jti", h.vouch(v.workloadClaims(cluster, screener).without("jti")), false)
	// What is refused for something else is not used up.
	unbound := v.workloadClaims(cluster, "later")
	v.wantBoth("not bound", h.vouch(unbound), false)
	v.want(v.bind(id, cluster, "later", nil), 201, "")
	v.rdb.FlushDB(context.Background())
	v.want(v.byGrant(h.vouch(unbound)), 200, "")
	v.rdb.FlushDB(context.Background())
	v.wantBoth("used before Redis was lost", h.vouch(unbound), false)
	// A jti is its issuer's.
	for domain, h := range map[string]holder{"spiffe://a.example": a, "spiffe://b.example": b} {
		v.want(v.bind(id, domain, domain+"/x", nil), 201, "")
		claims := members{"sub": domain + "/x", "aud": "http://idp.test", "exp": time.Now().Unix() + 60, "jti": unbound["jti"]}
		v.want(v.byGrant(h.vouch(claims)), 200, "")
		v.wantBoth("used before", h.vouch(claims), false)
	}
}

// An issuer that was broken into is cut off by one request.
func TestIssuersAreCutOff(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "ISSUER", "http://idp.test", "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h, "https://second.example": h}, nil))
	w := v.another("WORKLOAD_ISSUERS", "") // where it has been taken out, it can still be cut off
	path := func(issuer string) string { return "/credentials?workloadIssuer=" + url.QueryEscape(issuer) }
	for _, query := range []string{"", "?workloadIssuer=", "?workloadIssuer=a&workloadIssuer=b", "?workloadIssuer=a&x=1", "?issuer=a", "?workloadIssuer=%zz", "?workloadIssuer=%00", "?workloadIssuer=%ff", "?workloadIssuer=" + strings.Repeat("a", 513)} {
		if a := v.api(v.bearer, "DELETE", "/credentials"+query, ""); a.status != 400 || a.code() != "VALIDATION_ERROR" {
			t.Errorf("DELETE /credentials%s = %v, want 400", query, a)
		}
	}
	for _, issuer := range []string{"https://nobody.example", cluster + "/", "%", cluster[:len(cluster)-1]} {
		v.want(v.api(v.bearer, "DELETE", path(issuer), ""), 404, "CREDENTIAL_NOT_FOUND")
	}
	v.want(v.do("DELETE", "/api/v1"+path(cluster), ""), 401, "UNAUTHORIZED")

	var tokens []string
	var bound []string // the credentials
	newBound := func(subject string, capabilities ...string) (id string) {
		id = v.newAgent(capabilities...)
		bound = append(bound, v.want(v.bind(id, cluster, subject, nil), 201, "").text("credentialId"))
		tokens = append(tokens, v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, subject))), 200, "").text("access_token"))
		return id
	}
	one := newBound("one", "a:b")
	newBound("two", auditRead)
	bound = append(bound, v.want(v.bind(one, cluster, "one again", nil), 201, "").text("credentialId"))
	v.want(v.bind(one, "https://second.example", "one", nil), 201, "")
	_, secret := v.quickCredential(one)
	others := []string{v.token(one, secret, ""), v.want(v.byGrant(h.vouch(v.workloadClaims("https://second.example", "one"))), 200, "").text("access_token")}

	weakID, weakSecret := v.quickClient(agentsWrite)
	weak := v.token(weakID, weakSecret, "")
	v.want(v.api(weak, "DELETE", path(cluster), ""), 403, "FORBIDDEN")
	reader := v.token(v.id, v.secret, agentsRead)
	v.want(v.api(reader, "DELETE", path(cluster), ""), 403, "FORBIDDEN")
	for _, token := range tokens {
		if !v.active(token) {
			t.Error("a refused request has ended a token")
		}
	}
	v.want(w.api(v.bearer, "DELETE", path(cluster), ""), 204, "")
	for _, token := range tokens {
		if v.active(token) {
			t.Error("a token of an issuer that was cut off is active")
		}
	}
	for _, token := range others {
		if !v.active(token) {
			t.Error("a token that is not of the issuer has ended with it")
		}
	}
	var ended []string
	for _, e := range v.chain() {
		if e.Action == "credential.revoked" && e.Outcome == "success" {
			var m members
			json.Unmarshal(e.Metadata, &m)
			if ended = append(ended, m["credentialId"].(string)); m["workloadIssuer"] != cluster || idText(e.ActorID) != v.id || e.AgentID == nil {
				t.Errorf("the event %s of %s says %v", e.EventID, idText(e.ActorID), m)
			}
		}
	}
	if slices.Sort(ended); !slices.Equal(ended, slices.Sorted(slices.Values(bound))) {
		t.Errorf("events have the credentials %q, want %q", ended, bound)
	}
	v.checkChain()

	// While tokens are being issued on another copy.
	for round := range rounds(3, 30) {
		name := fmt.Sprintf("racer%d", round)
		id := v.newAgent("a:b")
		v.want(v.bind(id, cluster, name, nil), 201, "")
		assertion := h.vouch(v.workloadClaims(cluster, name))
		var mu sync.Mutex
		var got []string
		var done atomic.Bool
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for !done.Load() {
					if a := v.byGrant(assertion); a.status == 200 {
						mu.Lock()
						got = append(got, a.text("access_token"))
						mu.Unlock()
					} else if done.Store(true); a.code() != "invalid_grant" && a.code() != "invalid_client" {
						t.Errorf("in a race it is answered %v", a)
					}
				}
			})
		}
		v.eventually("there are tokens", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) > 3 })
		v.want(w.api(v.bearer, "DELETE", path(cluster), ""), 204, "")
		all.Wait()
		for _, token := range got {
			if v.active(token) {
				t.Error("a token of a race is active after its issuer was cut off")
			}
		}
	}

	// The last who can manage agents, and one who cuts itself off.
	manager := v.newAgent(agentsRead, agentsWrite, tokensRead, auditRead, credentialsWrite)
	v.want(v.bind(manager, cluster, "manager", nil), 201, "")
	bearer := v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, "manager"))), 200, "").text("access_token")
	other := v.newAgent(agentsRead, agentsWrite, tokensRead, auditRead, credentialsWrite)
	v.want(v.api(bearer, "DELETE", "/agents/"+weakID, ""), 204, "")
	v.want(v.api(bearer, "DELETE", "/agents/"+v.id, ""), 204, "")
	v.want(v.api(bearer, "DELETE", path(cluster), ""), 409, "AGENT_IS_LAST_MANAGER")
	// It can't give itself what the cut would leave.
	v.want(v.api(bearer, "POST", "/agents/"+manager+"/credentials", "{}"), 403, "FORBIDDEN")
	v.want(v.api(bearer, "POST", "/agents/"+manager+"/credentials", members{"publicKey": h.jwk}.String()), 403, "FORBIDDEN")
	v.want(v.api(bearer, "POST", "/agents/"+other+"/credentials", "{}"), 201, "")
	v.want(v.api(bearer, "DELETE", path(cluster), ""), 204, "")
	v.want(v.api(bearer, "GET", "/agents", ""), 401, "UNAUTHORIZED")
}

func TestNobodyIsAWorkloadWithoutIssuers(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "ISSUER", "http://idp.test")
	assertion := h.vouch(v.workloadClaims(cluster, screener))
	form := url.Values{"grant_type": {jwtBearer}, "assertion": {assertion}}.Encode()
	v.want(v.form(v.id, v.secret, "", form), 400, "unsupported_grant_type")
	v.want(v.byGrant(assertion), 401, "invalid_client")
	v.want(v.byAssertion("", assertion), 401, "invalid_client")
	v.want(v.bind(v.id, cluster, screener, nil), 400, "VALIDATION_ERROR")
	if a := v.do("GET", "/.well-known/oauth-authorization-server", ""); strings.Contains(a.raw, jwtBearer) {
		t.Errorf("the metadata are %s, want no grant of assertions", a.raw)
	}
	// Our own issuer is nobody's.
	env := (&program{service: v}).build()
	env.Env = append(env.Env, "PORT=0", "WORKLOAD_ISSUERS="+members{"http://idp.test": members{"jwks": keysOf(h)}}.String())
	if out, err := env.CombinedOutput(); err == nil || !strings.Contains(string(out), "WORKLOAD_ISSUERS") {
		t.Errorf("with its own issuer it says %s, %v", out, err)
	}
}

// An issuerServer serves the keys of an issuer over https on loopback.
type issuerServer struct {
	*httptest.Server
	set         atomic.Pointer[members]
	asked       atomic.Int64
	down        atomic.Bool
	connections atomic.Int64
	certificate string // a file
}

func newIssuerServer(t testing.TB, holders ...holder) *issuerServer {
	t.Helper()
	i := &issuerServer{}
	i.publish(holders...)
	i.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.asked.Add(1)
		if i.down.Load() {
			w.WriteHeader(http.StatusInternalServerError)
		}
		io.WriteString(w, i.set.Load().String())
	}))
	i.Config.ErrorLog = nil
	i.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			i.connections.Add(1)
		}
	}
	i.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	i.StartTLS()
	t.Cleanup(i.Close)
	i.certificate = filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw})
	if err := os.WriteFile(i.certificate, block, 0o600); err != nil {
		t.Fatal(err)
	}
	return i
}

func (i *issuerServer) publish(holders ...holder) {
	set := keysOf(holders...)
	i.set.Store(&set)
}

// Keys that an issuer serves, and the operator's list of issuers while it runs.
func TestIssuersServeTheirKeys(t *testing.T) {
	t.Parallel()
	h, next := newHolder(t, "ES256"), newHolder(t, "ES256")
	server, hidden := newIssuerServer(t, h), newIssuerServer(t, h)
	_, port, _ := net.SplitHostPort(hidden.Listener.Addr().String())
	issuers := members{cluster: members{"jwksUri": server.URL, "allowPrivate": true}}
	hosts := []string{"127.0.0.1", "[::ffff:127.0.0.1]", "localhost", "0.0.0.0", "2130706433", "0x7f.1", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"}
	for n, host := range hosts {
		issuers[fmt.Sprintf("https://hidden%d.example", n)] = members{"jwksUri": "https://" + host + ":" + port + "/keys"}
	}
	file := filepath.Join(t.TempDir(), "issuers.json")
	write := func(text string) {
		if err := errors.Join(os.WriteFile(file+".new", []byte(text), 0o600), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	write(issuers.String())
	keys := newKeyFiles(t, testKey(), "")
	p := newProgram(t, newDatabase(t), newRedis(t), keys.env("WORKLOAD_ISSUERS_FILE", file, "SSL_CERT_FILE", server.certificate,
		"HTTPS_PROXY", hidden.URL, "HTTP_PROXY", hidden.URL)...)
	id := p.newAgent("a:b")
	p.want(p.bind(id, cluster, screener, nil), 201, "")
	assertion := h.vouch(p.workloadClaims(cluster, screener))
	p.wantBoth("keys of a server", assertion, true)
	if n := server.asked.Load(); n != 1 {
		t.Errorf("keys were asked for %d times, want once", n)
	}
	for n := range hosts {
		issuer := fmt.Sprintf("https://hidden%d.example", n)
		p.want(p.bind(id, issuer, screener, nil), 201, "")
		p.want(p.byGrant(h.vouch(p.workloadClaims(issuer, screener))), 503, "temporarily_unavailable")
	}
	if n := hidden.connections.Load(); n != 0 {
		t.Errorf("%d connections reached a private address", n)
	}
	for n := range 50 {
		unknown := h.sign(members{"alg": "ES256", "kid": fmt.Sprintf("none%d", n)}, p.workloadClaims(cluster, screener))
		p.wantBoth("a kid that nobody knows", unknown, false)
	}
	if n := server.asked.Load(); n > 2 { // the harness may be slow, but not by half a minute
		t.Errorf("for kids that nobody knows, keys were asked for %d times", n)
	}

	// Other signing keys leave what is known of the issuer's.
	asked := server.asked.Load()
	server.down.Store(true)
	keys.set(ellipticKey(), publicPEM(t, testKey()))
	if line := p.hangup(); !strings.Contains(line, `"msg":"keys read"`) || !strings.Contains(line, fmt.Sprintf(`"workloadIssuers":%d`, len(issuers))) {
		t.Errorf("with another signing key it logs %s", line)
	}
	p.wantBoth("after other signing keys", assertion, true)
	if n := server.asked.Load(); n != asked {
		t.Errorf("after other signing keys, the issuer was asked again")
	}
	server.down.Store(false)

	// What is wrong leaves the old.
	for name, text := range map[string]string{"no JSON": "canary", "nothing": "", "a new line": "\n", "a key that is none": members{cluster: members{"jwks": members{"keys": []any{"canary"}}}}.String(),
		"our own": members{p.env["ISSUER"]: members{"jwks": keysOf(h)}}.String()} {
		write(text)
		if line := p.hangup(); !strings.Contains(line, `"msg":"keys not read, the old ones stay"`) || !strings.Contains(line, "WORKLOAD_ISSUERS is") && !strings.Contains(line, "WORKLOAD_ISSUERS ") {
			t.Errorf("with %s it logs %s", name, line)
		}
		p.wantBoth("with "+name, assertion, true)
	}
	// One that is taken out, or has other keys, gets no new token; by itself, too.
	token := p.want(p.byGrant(assertion), 200, "").text("access_token")
	write(members{"https://other.example": members{"jwks": keysOf(h)}}.String())
	p.hangup()
	p.wantBoth("taken out", assertion, false)
	if !p.active(token) {
		t.Error("a token has ended with its issuer's place in the file")
	}
	p.want(p.bind(id, cluster, "another", nil), 400, "VALIDATION_ERROR")
	write(members{cluster: members{"jwks": keysOf(next)}}.String())
	p.eventually("the file is read by itself", func() bool { return p.byGrant(next.vouch(p.workloadClaims(cluster, screener))).status == 200 })
	p.wantBoth("the old key", assertion, false)
	write("{}")
	p.hangup()
	p.want(p.byGrant(assertion), 401, "invalid_client") // nobody is a workload then
	server.publish(next)
	write(issuers.String())
	p.hangup()
	p.wantBoth("rotated", next.vouch(p.workloadClaims(cluster, screener)), true)
	p.wantBoth("the key before", assertion, false)

	// One that is taken out is out, also while another is asked for its keys in vain.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	read := func() int { return strings.Count(p.log.String(), `"msg":"keys read"`) }
	before := read()
	write(members{"https://silent.example": members{"jwksUri": "https://" + silent.Addr().String(), "allowPrivate": true}}.String())
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	p.eventually("it is not trusted", func() bool { return p.byGrant(next.vouch(p.workloadClaims(cluster, screener))).status != 200 })
	if read() != before {
		t.Error("it was trusted until another was asked for its keys")
	}
}

// Who manages only its own credentials can't bind itself to whom another agent is, nor
// does an agent that isn't active stand in the way.
func TestNobodyTakesAWorkloadFromAnother(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	id, intruder := v.newAgent("a:b"), v.newAgent("a:b", credentialsWrite)
	v.want(v.bind(id, cluster, "screener", nil), 201, "")
	body := members{"workload": members{"issuer": cluster, "subject": "screener"}}.String()
	own := v.bearerOf(intruder, credentialsWrite)
	v.want(v.api(own, "POST", "/agents/"+intruder+"/credentials", body), 403, "FORBIDDEN")
	mine := v.want(v.bind(intruder, cluster, "another", nil), 201, "").text("credentialId")
	v.want(v.api(own, "POST", "/agents/"+intruder+"/credentials/"+mine+"/rotate", body), 403, "FORBIDDEN")
	v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, "screener"))), 200, "")

	v.want(v.bind(intruder, cluster, "screener", nil), 201, "")
	v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, "screener"))), 400, "invalid_request")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+intruder, `{"status":"suspended"}`), 200, "")
	token := v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, "screener"))), 200, "").text("access_token")
	if sub := readClaims(t, token).Subject; sub != id {
		t.Errorf("the token is of %s, want the active agent's", sub)
	}
	v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, "screener")), "client_id", intruder), 403, "unauthorized_client")
}

// The program before knows secrets alone: its rotation of a key or a workload fails, and
// doesn't say that it has ended what it hasn't.
func TestProgramBeforeRotatesNoKeyAndNoWorkload(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	id := v.newAgent("a:b")
	key := v.want(v.register(id, h.jwk), 201, "").text("credentialId")
	workload := v.want(v.bind(id, cluster, "screener", nil), 201, "").text("credentialId")
	_, _ = v.newCredential(id)
	for _, credentialID := range []string{key, workload} {
		_, err := v.db.Exec(t.Context(), `
			insert into credentials (credential_id, client_id, secret_prefix, secret_hash, secret_id, expires_at)
			values ($1, $2, '0123456789abcdef', '$2a$10$x', $3, null)
			on conflict (credential_id) do update
			set secret_prefix = excluded.secret_prefix, secret_hash = excluded.secret_hash, secret_id = excluded.secret_id`, credentialID, id, newID())
		if err == nil || !strings.Contains(err.Error(), "credentials_secret_check") {
			t.Errorf("a rotation by the program before: %v", err)
		}
	}
}
