package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/golang-jwt/jwt/v5"
)

// proof is one of RFC 9449, for a request that may show a token, with changes of its claims.
func proof(key *ecdsa.PrivateKey, method, url, token string, changes map[string]any) (string, error) {
	claims := jwt.MapClaims{"htm": method, "htu": url, "iat": time.Now().Unix(), "jti": rand.Text()}
	if token != "" {
		hash := sha256.Sum256([]byte(token))
		claims["ath"] = base64.RawURLEncoding.EncodeToString(hash[:])
	}
	made := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
	made.Header["typ"], made.Header["jwk"] = "dpop+jwt", jose.JSONWebKey{Key: key.Public()}
	for name, value := range changes {
		if name == "typ" {
			made.Header[name] = value
		} else {
			claims[name] = value
		}
	}
	return made.SignedString(key)
}

// boundToken gets a token that is bound to a key.
func (w *world) boundToken(ctx context.Context, who identity, key *ecdsa.PrivateKey, form url.Values) (string, error) {
	form.Set("grant_type", "client_credentials")
	q, err := http.NewRequestWithContext(ctx, "POST", w.base+"/api/v1/token", strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	made, err := proof(key, "POST", cmp.Or(w.issuer, w.base)+"/api/v1/token", "", nil)
	if err != nil {
		return "", err
	}
	q.SetBasicAuth(who.ID, who.Secret)
	q.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	q.Header.Set("DPoP", made)
	answer, err := http.DefaultClient.Do(q)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	var t struct {
		Token string `json:"access_token"`
		Type  string `json:"token_type"`
	}
	if err := json.NewDecoder(answer.Body).Decode(&t); err != nil || answer.StatusCode != 200 || t.Type != "DPoP" {
		return "", fmt.Errorf("with a proof the answer is %s, with the type %q", answer.Status, t.Type)
	}
	return t.Token, nil
}

const proofsPage = "docs/developers/proofs.md"

func proofsGo(ctx context.Context, w *world, c client) {
	dir := filepath.Join(w.dir, "proofs-go")
	build := func(change func(string) string, names ...string) (*exec.Cmd, error) {
		binary := filepath.Join(dir, strings.TrimSuffix(names[0], ".go"))
		args := []string{"build", "-C", w.root + "/acceptance/go", "-o", binary}
		for _, name := range names {
			file, err := w.example(dir, proofsPage, name, change)
			if err != nil {
				return nil, err
			}
			args = append(args, file)
		}
		if output, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w %s", err, output)
		}
		return exec.Command(binary), nil
	}
	c.proofs(ctx, w, build, []string{"holder.go", "proof.go"}, []string{"service.go", "check.go", "once.go"})
}

func proofsNode(ctx context.Context, w *world, c client) {
	dir := filepath.Join(w.dir, "proofs-node")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Symlink(w.root+"/acceptance/node/node_modules", dir+"/node_modules")); err != nil {
		c.checked("has its modules", err)
		return
	}
	build := func(change func(string) string, names ...string) (*exec.Cmd, error) {
		file, err := w.example(dir, proofsPage, names[0], change)
		return exec.Command("node", file), err
	}
	c.proofs(ctx, w, build, []string{"holder.mjs"}, []string{"service.mjs"})
}

// proofs tries the programs of proofs.md of one language: the agent, and the service with who has no right to a token.
func (c client) proofs(ctx context.Context, w *world, build func(func(string) string, ...string) (*exec.Cmd, error), agent, service []string) {
	who, err := w.agent(ctx, "resumes:read", "scores:write")
	port, portErr := freePort()
	key, keyErr := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	thief, thiefErr := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err = errors.Join(err, portErr, keyErr, thiefErr); err != nil {
		c.checked("has an agent, a port and keys", err)
		return
	}
	address := "http://localhost:" + port
	holding, err := build(func(text string) string { return text }, agent...)
	serving, serveErr := build(func(text string) string { return strings.ReplaceAll(text, "8080", port) }, service...)
	if !c.checked("is complete", errors.Join(err, serveErr)) {
		return
	}
	serving.Env = append(os.Environ(), "BASE="+w.base, "SERVICE="+address)
	p, err := w.start(strings.ReplaceAll(c.name, " ", "-"), serving)
	if err == nil {
		defer p.stop()
		err = p.ready(ctx, address+"/resumes", 401)
	}
	if !c.checked(service[0]+" serves", err) {
		return
	}
	run := func(base string) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		command := exec.CommandContext(ctx, holding.Path, holding.Args[1:]...)
		command.Env = append(os.Environ(), "BASE="+base, "SERVICE="+address, "CLIENT_ID="+who.ID, "CLIENT_SECRET="+who.Secret)
		output, err := command.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, output)
		}
		return string(output), err
	}
	output, err := run(w.base)
	if err == nil && output != "two resumes for "+who.ID+"\n" {
		err = fmt.Errorf("it printed %q", output)
	}
	c.checked(agent[0]+" calls "+service[0], err)
	deaf, err := listen(w.deaf())
	if err == nil {
		_, err = run(deaf)
	}
	c.refuses("a token that isn't bound, "+agent[0], err, saying("not bound"))

	t, err := w.tokensFor(ctx, address)
	if err != nil {
		c.checked("has tokens", err)
		return
	}
	ofService := client{c.report, c.name + ", service"}
	ofService.guards(t, abilities{types: true}, askWith(ctx, address+"/resumes"))
	ofService.proven(ctx, w, who, key, thief, address)
}

// proven tries a service with one who has the key of a token, and with a thief who has not.
func (c client) proven(ctx context.Context, w *world, who identity, key, thief *ecdsa.PrivateKey, address string) {
	get := func(scope string) (string, error) {
		return w.boundToken(ctx, who, key, url.Values{"scope": {scope}, "resource": {address}})
	}
	token, err := get("resumes:read")
	other, otherErr := get("resumes:read")
	narrow, narrowErr := get("scores:write")
	plain, plainErr := w.token(ctx, who, url.Values{"scope": {"resumes:read"}, "resource": {address}})
	if err = errors.Join(err, otherErr, narrowErr, plainErr); err != nil {
		c.checked("has bound tokens", err)
		return
	}
	here, now := address+"/resumes", time.Now().Unix()
	try := func(what string, want int, authorization string, proofs ...string) {
		q, err := http.NewRequestWithContext(ctx, "GET", here+"?page=2", nil)
		if err != nil {
			c.checked(what, err)
			return
		}
		q.Header = http.Header{"Authorization": {authorization}, "X-Forwarded-Host": {"evil.example.com"}}
		if len(proofs) > 0 {
			q.Header["Dpop"] = proofs
		}
		q.Host = "evil.example.com"
		answer, err := http.DefaultClient.Do(q)
		if err == nil {
			answer.Body.Close()
			if challenge := answer.Header.Get("WWW-Authenticate"); answer.StatusCode != want || want != 200 && !strings.HasPrefix(challenge, "DPoP ") {
				err = fmt.Errorf("it answers %d %s, want %d", answer.StatusCode, challenge, want)
			}
		}
		c.checked(what, err)
	}
	made := func(key *ecdsa.PrivateKey, method, url, token string, changes map[string]any) string {
		text, err := proof(key, method, url, token, changes)
		if err != nil {
			c.checked("makes a proof", err)
		}
		return text
	}
	good := func(changes map[string]any) string { return made(key, "GET", here, token, changes) }
	used := good(nil)
	try("lets a proof in", 200, "DPoP "+token, used)
	try("lets one in that is 50 seconds old", 200, "DPoP "+token, good(map[string]any{"iat": now - 50}))
	try("lets a token in that isn't bound, by Bearer", 200, "Bearer "+plain)
	try("refuses a replay", 401, "DPoP "+token, used)
	try("refuses a stolen token by Bearer", 401, "Bearer "+token)
	try("refuses it by Bearer, with a proof", 401, "Bearer "+token, good(nil))
	try("refuses it without a proof", 401, "DPoP "+token)
	try("refuses it with a proof of another key", 401, "DPoP "+token, made(thief, "GET", here, token, nil))
	try("refuses a token that isn't bound, by DPoP", 401, "DPoP "+plain, made(key, "GET", here, plain, nil))
	try("refuses a proof for another token", 401, "DPoP "+token, made(key, "GET", here, other, nil))
	try("refuses one for no token", 401, "DPoP "+token, made(key, "GET", here, "", nil))
	try("refuses one for another method", 401, "DPoP "+token, made(key, "POST", here, token, nil))
	try("refuses one for another path", 401, "DPoP "+token, made(key, "GET", here+"/1", token, nil))
	try("refuses one for the host that the request names", 401, "DPoP "+token, made(key, "GET", "http://evil.example.com/resumes", token, nil))
	try("refuses one of two minutes ago", 401, "DPoP "+token, good(map[string]any{"iat": now - 120}))
	try("refuses one of the future", 401, "DPoP "+token, good(map[string]any{"iat": now + 120}))
	try("refuses one with the typ JWT", 401, "DPoP "+token, good(map[string]any{"typ": "JWT"}))
	try("refuses a changed one", 401, "DPoP "+token, swapped(good(nil), good(nil)))
	try("refuses two", 401, "DPoP "+token, good(nil), good(nil))
	try("refuses one without the scope", 403, "DPoP "+narrow, made(key, "GET", here, narrow, nil))
}

// swapped is the first with the payload of the second.
func swapped(first, second string) string {
	parts := strings.Split(first, ".")
	parts[1] = strings.Split(second, ".")[1]
	return strings.Join(parts, ".")
}

// deaf stands before the service as one would be that knows no proofs: it passes over them, and gives the token all the same.
func (w *world) deaf() http.Handler {
	return http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		q, err := http.NewRequestWithContext(r.Context(), r.Method, w.base+r.URL.Path, r.Body)
		if err != nil {
			http.Error(out, err.Error(), 500)
			return
		}
		q.Header = r.Header.Clone()
		q.Header.Del("DPoP")
		answer, err := http.DefaultClient.Do(q)
		if err != nil {
			http.Error(out, err.Error(), 502)
			return
		}
		defer answer.Body.Close()
		out.Header().Set("Content-Type", "application/json")
		out.WriteHeader(answer.StatusCode)
		if r.URL.Path == "/.well-known/oauth-authorization-server" { // whose issuer is this one
			var metadata map[string]any
			json.NewDecoder(answer.Body).Decode(&metadata)
			here := "http://" + r.Host
			metadata["issuer"], metadata["token_endpoint"] = here, here+"/api/v1/token"
			json.NewEncoder(out).Encode(metadata)
			return
		}
		io.Copy(out, answer.Body)
	})
}
