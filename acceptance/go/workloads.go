package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/golang-jwt/jwt/v5"
	capjwt "github.com/hashicorp/cap/jwt"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

const (
	jwtBearerGrant  = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	jwtAssertion    = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	spiffeAssertion = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
)

// A vouched is a workload that another issuer vouches for, and the copy of the
// service that trusts it.
type vouched struct {
	base    string // of the copy, whose issuer is that of the world
	issuer  string
	agentID string
	token   func() (string, error) // of the workload for the service
	once    bool                   // each is good once
	kinds   []string               // of client assertion that it may be
}

// trusting starts a copy that trusts issuers of workloads, and returns its URL.
func (w *world) trusting(ctx context.Context, name string, issuers any, more ...string) (string, error) {
	port, err := freePort()
	if err != nil {
		return "", err
	}
	text, err := json.Marshal(issuers)
	if err != nil {
		return "", err
	}
	env := append([]string{"PORT=" + port, "ISSUER=" + w.base, "JWT_PRIVATE_KEY_FILE=" + w.keyFile, "WORKLOAD_ISSUERS=" + string(text)}, more...)
	return "http://127.0.0.1:" + port, w.serve(ctx, name, port, w.environment(env...))
}

// workload registers an agent without a secret, which a workload is.
func (w *world) workload(ctx context.Context, base string, names map[string]any) (string, error) {
	body, _ := json.Marshal(map[string]any{
		"email": strings.ToLower(rand.Text()) + "@example.com", "agentType": "custom", "version": "1.0.0",
		"capabilities": []string{"resumes:read"}, "owner": "acceptance", "deploymentEnv": "development",
	})
	var made struct{ AgentID, Kind, ClientSecret string }
	err := call(ctx, "POST", base+"/api/v1/agents", w.bearer, "application/json", string(body), &made)
	if err == nil {
		body, _ = json.Marshal(map[string]any{"workload": names})
		err = call(ctx, "POST", base+"/api/v1/agents/"+made.AgentID+"/credentials", w.bearer, "application/json", string(body), &made)
	}
	if err == nil && (made.Kind != "workload" || made.ClientSecret != "") {
		err = fmt.Errorf("the credential is a %s, and has a secret of %d characters", made.Kind, len(made.ClientSecret))
	}
	return made.AgentID, err
}

// present has x/oauth2 show an assertion: as a grant, or where kind is there as
// client authentication.
func present(ctx context.Context, base, kind, assertion string) (*oauth2.Token, error) {
	form := url.Values{"grant_type": {jwtBearerGrant}, "assertion": {assertion}}
	if kind != "" {
		form = url.Values{"client_assertion_type": {kind}, "client_assertion": {assertion}}
	}
	cfg := clientcredentials.Config{TokenURL: base + "/api/v1/token", AuthStyle: oauth2.AuthStyleInParams, EndpointParams: form}
	return cfg.Token(ctx)
}

// saysOAuth is the reason of a token endpoint, as x/oauth2 reads it.
func saysOAuth(status int, code, words string) func(error) bool {
	return func(err error) bool {
		e, ok := errors.AsType[*oauth2.RetrieveError](err)
		return ok && e.Response.StatusCode == status && e.ErrorCode == code && strings.Contains(e.ErrorDescription, words)
	}
}

// passes has the workload get tokens in each way, and use one; bad are tokens of
// others, by what is wrong with them, with words of the refusal behind a colon.
// At the end one request cuts the issuer off.
func (v vouched) passes(ctx context.Context, w *world, c client, bad map[string]string) {
	var last *oauth2.Token
	for _, kind := range append([]string{""}, v.kinds...) {
		assertion, err := v.token()
		if err == nil {
			last, err = present(ctx, v.base, kind, assertion)
		}
		if err == nil {
			var claims jwt.RegisteredClaims
			if _, _, err = jwt.NewParser().ParseUnverified(last.AccessToken, &claims); err == nil && claims.Subject != v.agentID {
				err = fmt.Errorf("the token is of %s, want %s", claims.Subject, v.agentID)
			}
		}
		how := "as a grant"
		if kind != "" {
			how = "as client authentication, " + kind[strings.LastIndex(kind, ":")+1:]
		}
		if !c.checked("gets a token, "+how, err) {
			return
		}
		_, err = present(ctx, v.base, kind, assertion)
		if v.once {
			c.refuses("the same one again, "+how, err, saying("was used before"))
		} else {
			c.checked("gets another for the same one, "+how, err)
		}
	}
	get := func() error {
		return call(ctx, "GET", v.base+"/api/v1/agents/"+v.agentID, last.AccessToken, "application/json", "", nil)
	}
	c.checked("calls the API", get())
	for name, token := range bad {
		name, words, _ := strings.Cut(name, ": ")
		_, err := present(ctx, v.base, "", token)
		c.refuses(name, err, saysOAuth(400, "invalid_grant", words))
		_, err = present(ctx, v.base, jwtAssertion, token)
		c.refuses(name+", as client authentication", err, saysOAuth(401, "invalid_client", words))
	}
	assertion, err := v.token()
	if err == nil {
		err = call(ctx, "DELETE", v.base+"/api/v1/credentials?workloadIssuer="+url.QueryEscape(v.issuer), w.bearer, "application/json", "", nil)
	}
	if !c.checked("is cut off with its issuer, by one request", err) {
		return
	}
	c.refuses("its token from before", get(), saying("401", "UNAUTHORIZED"))
	_, err = present(ctx, v.base, "", assertion)
	c.refuses("what the issuer says from then on", err, saysOAuth(400, "invalid_grant", "no active credential"))
}

// A mint is an issuer that others wrote go-jose for: a key, and its set.
type mint struct {
	key    jose.SigningKey
	public jose.JSONWebKey
}

func newMint(alg jose.SignatureAlgorithm, kid string) (mint, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return mint{}, err
	}
	return mint{jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, jose.JSONWebKey{Key: key.Public(), KeyID: kid}}, nil
}

func (m mint) sign(claims map[string]any) (string, error) {
	signer, err := jose.NewSigner(m.key, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", err
	}
	text, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	signed, err := signer.Sign(text)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

// but are claims with others in the place of some; nil takes one out.
func but(claims map[string]any, changes map[string]any) map[string]any {
	other := map[string]any{}
	for _, from := range []map[string]any{claims, changes} {
		for name, value := range from {
			if other[name] = value; value == nil {
				delete(other, name)
			}
		}
	}
	return other
}

// bads are tokens that a mint signs, each with something wrong.
func (m mint) bads(claims map[string]any, changes map[string]map[string]any) (map[string]string, error) {
	bad := map[string]string{}
	for name, change := range changes {
		token, err := m.sign(but(claims, change))
		if err != nil {
			return nil, err
		}
		bad[name] = token
	}
	return bad, nil
}

// tryGitHub has the claims of a workflow, as GitHub documents them, with the sub of
// 2026, and its keys by https.
func tryGitHub(ctx context.Context, w *world, c client) {
	const issuer = "https://token.actions.githubusercontent.com"
	m, err := newMint(jose.ES256, "github-1")
	other, otherErr := newMint(jose.ES256, "github-1")
	if err := errors.Join(err, otherErr); err != nil {
		c.checked("has keys", err)
		return
	}
	keys, certificate, err := w.overTLS("github", http.HandlerFunc(func(out http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(out).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{m.public}})
	}))
	if err != nil {
		c.checked("serves keys", err)
		return
	}
	defer keys.Close()
	set := map[string]any{"jwksUri": keys.URL + "/.well-known/jwks", "singleUse": true, "allowPrivate": true}
	base, err := w.trusting(ctx, "github", map[string]any{issuer: set}, "SSL_CERT_FILE="+certificate)
	if err != nil {
		c.checked("is trusted", err)
		return
	}
	const subject = "repo:octocat@123456/my-repo@456789:environment:production"
	id, err := w.workload(ctx, base, map[string]any{"issuer": issuer, "subject": subject,
		"claims": map[string]string{"repository": "octocat/my-repo", "ref": "refs/heads/main"}})
	if !c.checked("has an agent", err) {
		return
	}
	claims := func() map[string]any {
		now := time.Now().Unix()
		return map[string]any{
			"jti": rand.Text(), "sub": subject, "aud": w.base, "iss": issuer, "nbf": now - 600, "exp": now + 300, "iat": now,
			"ref": "refs/heads/main", "ref_protected": "true", "ref_type": "branch", "sha": "example-sha", "repository": "octocat/my-repo",
			"repository_owner": "octocat", "repository_owner_id": "123456", "repository_id": "456789", "repository_visibility": "private",
			"environment": "production", "run_id": "7", "run_number": "10", "run_attempt": "2", "actor": "octocat", "actor_id": "12",
			"workflow": "deploy", "workflow_ref": "octocat/my-repo/.github/workflows/deploy.yml@refs/heads/main", "workflow_sha": "example-sha",
			"job_workflow_ref": "octocat/my-repo/.github/workflows/deploy.yml@refs/heads/main", "job_workflow_sha": "example-sha",
			"event_name": "workflow_dispatch", "head_ref": "", "base_ref": "", "runner_environment": "github-hosted",
		}
	}
	bad, err := m.bads(claims(), map[string]map[string]any{
		"a workflow of another branch: no active credential":            {"ref": "refs/heads/evil", "jti": rand.Text()},
		"a pull request: no active credential":                          {"sub": "repo:octocat@123456/my-repo@456789:pull_request"},
		"another owner of the name: no active credential":               {"sub": "repo:octocat@999/my-repo@456789:environment:production"},
		"the sub of before 2026: no active credential":                  {"sub": "repo:octocat/my-repo:environment:production"},
		"a token for the owner, as GitHub presets it: must have":        {"aud": "https://github.com/octocat"},
		"an expired one: exp":                                           {"iat": time.Now().Unix() - 900, "exp": time.Now().Unix() - 600},
		"one without a jti, of which it isn't known whether again: jti": {"jti": nil},
	})
	if err == nil {
		bad["what another key signed: is not signed by a key of its issuer"], err = other.sign(claims())
	}
	if err != nil {
		c.checked("has tokens to refuse", err)
		return
	}
	token := func() (string, error) { return m.sign(claims()) }
	vouched{base, issuer, id, token, true, []string{jwtAssertion}}.passes(ctx, w, c, bad)
}

// overTLS serves by https on loopback, and returns the file of its certificate.
func (w *world) overTLS(name string, handler http.Handler) (*httptest.Server, string, error) {
	server := httptest.NewTLSServer(handler)
	file := filepath.Join(w.dir, name+"-ca.pem")
	return server, file, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o644)
}

// tryAnother runs another AgentIdP, with a database, a key and an issuer of its
// own, whose agents are workloads here.
func tryAnother(ctx context.Context, w *world, c client) {
	there, issuer, certificate, err := w.another(ctx)
	if !c.checked("runs", err) {
		return
	}
	trust := map[string]any{issuer: map[string]any{"jwksUri": issuer + "/.well-known/jwks.json", "allowPrivate": true}}
	base, err := w.trusting(ctx, "trusting-another", trust, "SSL_CERT_FILE="+certificate)
	guarded, guardedErr := w.trusting(ctx, "guarded", map[string]any{issuer: map[string]any{"jwksUri": issuer + "/.well-known/jwks.json"}}, "SSL_CERT_FILE="+certificate)
	agent, agentErr := there.agent(ctx, "resumes:read")
	other, otherErr := there.agent(ctx, "resumes:read")
	if err = errors.Join(err, guardedErr, agentErr, otherErr); !c.checked("is trusted, and has agents", err) {
		return
	}
	id, err := w.workload(ctx, base, map[string]any{"issuer": issuer, "subject": agent.ID})
	if !c.checked("has an agent here", err) {
		return
	}
	bad := map[string]string{}
	for name, form := range map[string]url.Values{
		"a token for another service: must have":                     {"resource": {resource}},
		"a token for its own issuer: must have":                      {},
		"a token for two: must have":                                 {"resource": {w.base, resource}},
		"a token of another of its agents: no active credential":     {"resource": {w.base}},
		"a token that the key of this service signed: is not signed": {"resource": {w.base}},
	} {
		who := agent
		if strings.Contains(name, "its agents") {
			who = other
		}
		token, err := there.token(ctx, who, form)
		if err == nil && strings.Contains(name, "this service") {
			err = forge(&token, token, w.key, nil, nil)
		}
		if err != nil {
			c.checked("has a token to refuse", err)
			return
		}
		bad[name] = token
	}
	token := func() (string, error) { return there.token(ctx, agent, url.Values{"resource": {w.base}}) }
	shown, err := token()
	if err == nil {
		_, err = present(ctx, guarded, "", shown)
	}
	c.refuses("to ask a private address for keys, unless that is allowed", err, saysOAuth(503, "temporarily_unavailable", "keys"))
	_, err = present(ctx, w.base, "", shown)
	c.refuses("the grant, where no issuer is trusted", err, saysOAuth(401, "invalid_client", ""))
	if err = there.revoke(ctx, agent, shown); err == nil {
		_, err = present(ctx, base, "", shown)
	}
	c.checked("does not hear of revocations there", err) // as docs/devops/workloads.md has it
	vouched{base, issuer, id, token, false, []string{jwtAssertion}}.passes(ctx, w, c, bad)
}

// another starts a second AgentIdP behind TLS, and returns its issuer. The world is
// on this side of that.
func (w *world) another(ctx context.Context) (there *world, issuer, certificate string, err error) {
	made, err := exec.CommandContext(ctx, "psql", "-q", "-d", os.Getenv("DATABASE_URL"), "-c", "create database another").CombinedOutput()
	if err != nil {
		return nil, "", "", fmt.Errorf("psql: %w: %s", err, made)
	}
	database, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil {
		return nil, "", "", errors.New("DATABASE_URL is no URL")
	}
	database.Path = "/another"
	port, err := freePort()
	if err != nil {
		return nil, "", "", err
	}
	front := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "127.0.0.1:" + port})
	server, certificate, err := w.overTLS("another", front)
	if err != nil {
		return nil, "", "", err
	}
	context.AfterFunc(ctx, server.Close)
	there = &world{dir: w.dir, root: w.root, program: w.program, base: "http://127.0.0.1:" + port}
	if there.keyFile, there.key, err = there.newKey("another"); err != nil {
		return nil, "", "", err
	}
	env := w.environment("PORT="+port, "ISSUER="+server.URL, "JWT_PRIVATE_KEY_FILE="+there.keyFile, "DATABASE_URL="+database.String())
	bootstrap := exec.CommandContext(ctx, w.program, "bootstrap", "another@example.com")
	bootstrap.Env = env
	printed, err := bootstrap.Output()
	if err != nil {
		return nil, "", "", fmt.Errorf("bootstrap: %w", err)
	}
	fmt.Sscanf(string(printed), "client_id: %s\nclient_secret: %s", &there.admin.ID, &there.admin.Secret)
	if err := w.serve(ctx, "another", port, env); err != nil {
		return nil, "", "", err
	}
	there.bearer, err = there.token(ctx, there.admin, url.Values{})
	return there, server.URL, certificate, err
}

// tryCap has the library by which Vault and OpenBao look at the tokens of their
// method jwt look at ours.
func tryCap(ctx context.Context, w *world, c client) {
	t, err := w.tokensFor(ctx, resource)
	if err != nil {
		c.checked("has tokens", err)
		return
	}
	who := jwt.RegisteredClaims{}
	if _, _, err := jwt.NewParser().ParseUnverified(t.Good, &who); err != nil {
		c.checked("has a token with a sub", err)
		return
	}
	discovered, err := capjwt.NewOIDCDiscoveryKeySet(ctx, w.base, "")
	if !c.checked("finds the keys by oidc_discovery_url", err) {
		return
	}
	listed, err := capjwt.NewJSONWebKeySet(ctx, w.base+"/.well-known/jwks.json", "")
	if !c.checked("finds the keys by jwks_url", err) {
		return
	}
	for name, keys := range map[string]capjwt.KeySet{"oidc_discovery_url": discovered, "jwks_url": listed} {
		validator, err := capjwt.NewValidator(keys)
		if err != nil {
			c.checked("has a validator", err)
			return
		}
		bound := capjwt.Expected{Issuer: w.base, Subject: who.Subject, Audiences: []string{resource}, SigningAlgorithms: []capjwt.Alg{capjwt.RS256}}
		verify := func(token string) error {
			_, err := validator.Validate(ctx, token, bound)
			return err
		}
		client{c.report, c.name + ", " + name}.verifies(t, verify, map[string]func(error) bool{
			"an expired token": saying("token is expired"),
			"a wrong issuer":   saying("invalid issuer"),
			"a wrong audience": saying("invalid audience"),
			"a wrong key":      saying("verifying token signature"),
			"an unknown key":   saying("verifying token signature"),
			"a changed scope":  saying("verifying token signature"),
		})
		bound.Subject = w.admin.ID
		c.refuses("a token of another agent, by bound_subject and "+name, verify(t.Good), saying("invalid subject"))
	}
}
