package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	zitadel "github.com/zitadel/oidc/v3/pkg/client"
	"github.com/zitadel/oidc/v3/pkg/client/rs"
	"github.com/zitadel/oidc/v3/pkg/oidc"
)

// A keyed is an agent whose credential is a key.
type keyed struct {
	ID    string `json:"id"`
	Alg   string `json:"alg"`
	Key   string `json:"key"`   // PEM
	Other string `json:"other"` // of the same kind, which nobody knows
}

// keyAgent registers one, with a JWK that others made of its key.
func (w *world) keyAgent(ctx context.Context, alg string, capabilities ...string) (keyed, error) {
	who, err := w.agent(ctx, capabilities...)
	k := keyed{ID: who.ID, Alg: alg}
	if err != nil {
		return k, err
	}
	public, text, err := newClientKey(alg)
	if err != nil {
		return k, err
	}
	k.Key = text
	if _, k.Other, err = newClientKey(alg); err != nil {
		return k, err
	}
	body, err := json.Marshal(map[string]any{"publicKey": jose.JSONWebKey{Key: public, Algorithm: alg, Use: "sig"}})
	if err != nil {
		return k, err
	}
	return k, call(ctx, "POST", w.base+"/api/v1/agents/"+k.ID+"/credentials", w.bearer, "application/json", string(body), nil)
}

func newClientKey(alg string) (public crypto.PublicKey, text string, err error) {
	var private crypto.Signer
	switch alg {
	case "ES256":
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "EdDSA":
		_, private, err = ed25519.GenerateKey(rand.Reader)
	default:
		private, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		return nil, "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	return private.Public(), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), err
}

// A zitadelClient is what that library wants to know of a client.
type zitadelClient struct {
	*oidc.DiscoveryConfiguration
	id       string
	signer   jose.Signer
	life     time.Duration
	audience string
	repeats  bool // its first assertion
	first    string
}

func (z *zitadelClient) TokenEndpoint() string     { return z.DiscoveryConfiguration.TokenEndpoint }
func (z *zitadelClient) IntrospectionURL() string  { return z.IntrospectionEndpoint }
func (z *zitadelClient) GetRevokeEndpoint() string { return z.RevocationEndpoint }
func (z *zitadelClient) HttpClient() *http.Client  { return http.DefaultClient }
func (z *zitadelClient) AuthFn() (any, error) {
	if z.repeats && z.first != "" {
		return zitadel.ClientAssertionFormAuthorization(z.first), nil
	}
	assertion, err := zitadel.SignedJWTProfileAssertion(z.id, []string{z.audience}, z.life, z.signer)
	z.first = assertion
	return zitadel.ClientAssertionFormAuthorization(assertion), err
}

func (z *zitadelClient) token(ctx context.Context) (string, error) {
	auth, err := z.AuthFn()
	if err != nil {
		return "", err
	}
	t, err := zitadel.CallTokenEndpointWithAuthFn(ctx, &oidc.ClientCredentialsRequest{GrantType: oidc.GrantTypeClientCredentials}, auth, z)
	if err != nil {
		return "", err
	}
	return t.AccessToken, nil
}

func (z *zitadelClient) active(ctx context.Context, token string) (bool, error) {
	is, err := rs.Introspect[*oidc.IntrospectionResponse](ctx, z, token)
	if err != nil {
		return false, err
	}
	return is.Active, nil
}

func tryZitadel(ctx context.Context, w *world, c client) {
	config, err := zitadel.Discover(ctx, w.base, http.DefaultClient)
	if !c.checked("discovers the service", err) {
		return
	}
	for _, alg := range []string{"RS256", "PS256", "ES256", "EdDSA"} {
		who, err := w.keyAgent(ctx, alg, "resumes:read", "tokens:read")
		if err != nil {
			c.checked("has a key for "+alg, err)
			continue
		}
		// The library knows no PS256 by itself, and takes any signer.
		signer := func(key string) (jose.Signer, error) {
			if alg != "PS256" {
				return zitadel.NewSignerFromPrivateKeyByte([]byte(key), "")
			}
			block, _ := pem.Decode([]byte(key))
			private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			return jose.NewSigner(jose.SigningKey{Algorithm: jose.PS256, Key: private}, nil)
		}
		right, err := signer(who.Key)
		other, otherErr := signer(who.Other)
		if err := errors.Join(err, otherErr); err != nil {
			c.checked("has a signer for "+alg, err)
			continue
		}
		me := zitadelClient{DiscoveryConfiguration: config, id: who.ID, signer: right, life: time.Minute, audience: w.base}
		token, err := me.token(ctx)
		c.checked("gets a token by "+alg, err)
		c.checked("introspects by "+alg, me.wants(ctx, token, true))
		auth, err := me.AuthFn()
		if err == nil {
			err = zitadel.CallRevokeEndpoint(ctx, zitadel.RevokeRequest{Token: token}, auth, &me)
		}
		if err == nil {
			err = me.wants(ctx, token, false)
		}
		c.checked("revokes by "+alg, err)
		wrong := me
		wrong.signer = other
		_, err = wrong.token(ctx)
		c.refuses("another key, by "+alg, err, saying("No active key of this client"))
		again := me
		again.repeats, again.first = true, ""
		_, err = again.token(ctx)
		if c.checked("gets another token by "+alg, err) {
			_, err = again.token(ctx)
			c.refuses("a replay, by "+alg, err, saying("was used before"))
		}
		elsewhere := me
		elsewhere.audience = config.TokenEndpoint
		_, err = elsewhere.token(ctx)
		c.refuses("an assertion for the endpoint, by "+alg, err, saying("must have the aud "+w.base+", the issuer"))
	}
	// What it makes for a resource server by itself lives for an hour.
	who, err := w.keyAgent(ctx, "RS256", "tokens:read")
	if err != nil {
		c.checked("has another key", err)
		return
	}
	server, err := rs.NewResourceServerJWTProfile(ctx, w.base, who.ID, "", []byte(who.Key))
	if err == nil {
		_, err = rs.Introspect[*oidc.IntrospectionResponse](ctx, server, "x")
	}
	c.refuses("an assertion of an hour", err, saying("must have an exp within 5m0s"))
}

func (z *zitadelClient) wants(ctx context.Context, token string, active bool) error {
	is, err := z.active(ctx, token)
	if err == nil && is != active {
		err = fmt.Errorf("that the token is active is %v, want %v", is, active)
	}
	return err
}

const keysPage = "docs/developers/keys.md"

// keyPrograms runs the programs of keys.md of one language: what makes a key, if there is one, and what gets a token with it.
func (c client) keyPrograms(ctx context.Context, w *world, dir, keygen string, programs map[string]*exec.Cmd) {
	who, err := w.keyAgent(ctx, "ES256", "resumes:read")
	if err != nil {
		c.checked("has a key", err)
		return
	}
	if err := writeFiles(dir, map[string]string{"right.pem": who.Key, "other.pem": who.Other}); err != nil {
		c.checked("has files", err)
		return
	}
	run := func(command *exec.Cmd, key string) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		again := exec.CommandContext(ctx, command.Path, command.Args[1:]...)
		again.Dir = dir
		again.Env = append(os.Environ(), "BASE="+w.base, "CLIENT_ID="+who.ID, "KEY="+filepath.Join(dir, key), "SERVICE="+resource)
		output, err := again.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, output)
		}
		return strings.TrimSpace(string(output)), err
	}
	keys := []string{"right.pem"}
	if keygen != "" {
		jwk, err := run(exec.Command("node", filepath.Join(dir, keygen)), "")
		if err == nil {
			err = call(ctx, "POST", w.base+"/api/v1/agents/"+who.ID+"/credentials", w.bearer, "application/json", `{"publicKey": `+jwk+`}`, nil)
		}
		if c.checked(keygen+" makes a key that can be registered", err) {
			keys = append(keys, "client.pem")
		}
	}
	for name, command := range programs {
		for _, key := range keys {
			token, err := run(command, key)
			var is struct {
				Active   bool
				Sub, Aud string
			}
			if err == nil {
				err = call(ctx, "POST", w.base+"/api/v1/token/introspect", w.bearer, "application/x-www-form-urlencoded", "token="+token, &is)
			}
			if err == nil && (!is.Active || is.Sub != who.ID || is.Aud != resource) {
				err = fmt.Errorf("its token is %+v", is)
			}
			c.checked(name+" gets a token with "+key, err)
		}
		_, err = run(command, "other.pem")
		c.refuses("another key, "+name, err, saying("No active key of this client", "invalid_client", "401"))
	}
}

func keysGo(ctx context.Context, w *world, c client) {
	dir := filepath.Join(w.dir, "keys-go")
	unchanged := func(text string) string { return text }
	assertion, err := w.example(dir, keysPage, "assertion.go", unchanged)
	programs := map[string]*exec.Cmd{}
	for _, name := range []string{"token.go", "source.go"} {
		file, fileErr := w.example(dir, keysPage, name, unchanged)
		if err = errors.Join(err, fileErr); err != nil {
			break
		}
		binary := strings.TrimSuffix(file, ".go")
		command := exec.CommandContext(ctx, "go", "build", "-C", w.root+"/acceptance/go", "-o", binary, file, assertion)
		if output, buildErr := command.CombinedOutput(); buildErr != nil {
			err = fmt.Errorf("%w %s", buildErr, output)
			break
		}
		programs[name] = exec.Command(binary)
	}
	if c.checked("is complete", err) {
		c.keyPrograms(ctx, w, dir, "", programs)
	}
}

func keysNode(ctx context.Context, w *world, c client) {
	dir := filepath.Join(w.dir, "keys-node")
	err := errors.Join(os.Mkdir(dir, 0o755), os.Symlink(w.root+"/acceptance/node/node_modules", dir+"/node_modules"))
	unchanged := func(text string) string { return text }
	_, keygenErr := w.example(dir, keysPage, "keygen.mjs", unchanged)
	program, programErr := w.example(dir, keysPage, "token.mjs", unchanged)
	if c.checked("is complete", errors.Join(err, keygenErr, programErr)) {
		c.keyPrograms(ctx, w, dir, "keygen.mjs", map[string]*exec.Cmd{"token.mjs": exec.Command("node", program)})
	}
}

func keysPython(ctx context.Context, w *world, c client) {
	dir := filepath.Join(w.dir, "keys-python")
	program, err := w.example(dir, keysPage, "by_key.py", func(text string) string { return text })
	python, pythonErr := pythonWith("authlib.integrations.requests_client")
	if c.checked("is complete", errors.Join(err, pythonErr)) {
		c.keyPrograms(ctx, w, dir, "", map[string]*exec.Cmd{"by_key.py": exec.Command(python, program)})
	}
}
