package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// resource is the service that tokens are for, unless a client is one itself.
const resource = "https://resumes.example.com"

// A world is the service under test, and what clients need to try it.
type world struct {
	dir     string // for files; gone at the end
	root    string // the clone
	program string
	base    string // URL and issuer of the service
	issuer  string // "" where it is base
	key     *rsa.PrivateKey
	keyFile string
	admin   identity
	bearer  string // of the admin

	mu        sync.Mutex
	processes []*process
}

// An identity is an agent with a credential.
type identity struct {
	ID     string `json:"id"`
	Secret string `json:"secret"`
}

// newWorld starts the service as 'make run' does: a key of its own, a free port
// of loopback, an issuer that is its URL, and nothing else set but a limit of
// failures that all clients together, who have one address, don't reach.
func newWorld(ctx context.Context, program string) (*world, error) {
	w := &world{program: program}
	var err error
	if w.root, err = os.Getwd(); err != nil {
		return w, err
	}
	if w.dir, err = os.MkdirTemp("", "acceptance"); err != nil {
		return w, err
	}
	if err := os.Chmod(w.dir, 0o711); err != nil { // for servers that give up root
		return w, err
	}
	if w.keyFile, w.key, err = w.newKey("key"); err != nil {
		return w, err
	}
	port, err := freePort()
	if err != nil {
		return w, err
	}
	w.base = "http://localhost:" + port
	env := w.environment("PORT="+port, "ISSUER="+w.base, "JWT_PRIVATE_KEY_FILE="+w.keyFile)
	bootstrap := exec.CommandContext(ctx, program, "bootstrap", "acceptance@example.com")
	bootstrap.Env = env
	bootstrap.Stderr = os.Stderr
	printed, err := bootstrap.Output()
	if err != nil {
		return w, fmt.Errorf("bootstrap: %w", err)
	}
	fmt.Sscanf(string(printed), "client_id: %s\nclient_secret: %s", &w.admin.ID, &w.admin.Secret)
	if err := os.WriteFile(filepath.Join(w.dir, "first-agent"), printed, 0o600); err != nil {
		return w, err
	}
	if err := w.serve(ctx, "service", port, env); err != nil {
		return w, err
	}
	// Agents are registered by another one, whose limit is no client's.
	if w.bearer, err = w.token(ctx, w.admin, url.Values{}); err != nil {
		return w, err
	}
	registrar, err := w.agent(ctx, "agents:read", "agents:write", "tokens:read")
	if err != nil {
		return w, err
	}
	err = call(ctx, "PATCH", w.base+"/api/v1/agents/"+registrar.ID, w.bearer, "application/json", `{"rateLimit": 10000}`, nil)
	if err != nil {
		return w, err
	}
	w.bearer, err = w.token(ctx, registrar, url.Values{})
	return w, err
}

func (w *world) environment(more ...string) []string {
	env := []string{"HOST=127.0.0.1", "METRICS_ADDR=", "DRAIN_TIME=1s", "MAX_AGENTS=0", // several copies run at once
		"RATE_LIMIT_PER_MINUTE=1000"} // and count together, for one address
	for _, name := range []string{"PATH", "DATABASE_URL", "REDIS_URL"} {
		env = append(env, name+"="+os.Getenv(name))
	}
	return append(env, more...)
}

// serve starts a copy of the service and waits until it is ready.
func (w *world) serve(ctx context.Context, name, port string, env []string) error {
	command := exec.Command(w.program)
	command.Env = env
	p, err := w.start(name, command)
	if err != nil {
		return err
	}
	return p.ready(ctx, "http://127.0.0.1:"+port+"/readyz", http.StatusOK)
}

func (w *world) close() {
	w.mu.Lock()
	list := w.processes
	w.mu.Unlock()
	for _, p := range list {
		p.stop()
	}
	if w.dir != "" {
		os.RemoveAll(w.dir)
	}
}

// A process is one that we started. It dies with us.
type process struct {
	*exec.Cmd
	name string
	log  string // a file
	done chan struct{}
}

func (w *world) start(name string, command *exec.Cmd) (*process, error) {
	p := &process{Cmd: command, name: name, log: filepath.Join(w.dir, name+".log"), done: make(chan struct{})}
	output, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	if p.Stdout == nil {
		p.Stdout = output
	}
	p.Stderr = output
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := p.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() { p.Wait(); close(p.done) }()
	w.mu.Lock()
	w.processes = append(w.processes, p)
	w.mu.Unlock()
	return p, nil
}

// ready waits until the process answers a URL with a status.
func (p *process) ready(ctx context.Context, url string, status int) error {
	var err error
	for range 600 {
		answer, getErr := http.Get(url)
		if err = getErr; err == nil {
			answer.Body.Close()
			if answer.StatusCode == status {
				return nil
			}
			err = fmt.Errorf("%s answers %s", url, answer.Status)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.done:
			return fmt.Errorf("%s ended: %s", p.name, p.tail())
		case <-time.After(100 * time.Millisecond):
		}
	}
	return fmt.Errorf("%s isn't ready: %w: %s", p.name, err, p.tail())
}

func (p *process) tail() string {
	text, _ := os.ReadFile(p.log)
	return string(text[max(0, len(text)-2000):])
}

func (p *process) stop() {
	p.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		p.Process.Kill()
		<-p.done
	}
}

var (
	firstPort  = mrand.IntN(20000) // since other runs take theirs from here too
	portNumber atomic.Int64
)

// freePort finds a port of loopback that nobody listens on, that no outgoing
// connection is given, and that was not found before: who asked for that may
// not listen yet, or be about to listen again.
func freePort() (string, error) {
	for range 100 {
		port := fmt.Sprint(10000 + (firstPort+int(portNumber.Add(1)))%20000)
		if listener, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			return port, listener.Close()
		}
	}
	return "", errors.New("no port is free")
}

// listen serves on a free port and returns the URL. It ends with the world.
func listen(handler http.Handler) (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go http.Serve(listener, handler)
	return fmt.Sprintf("http://localhost:%d", listener.Addr().(*net.TCPAddr).Port), nil
}

// newKey has the program make a signing key, as an operator would.
func (w *world) newKey(name string) (string, *rsa.PrivateKey, error) {
	text, err := exec.Command(w.program, "keygen").Output()
	if err != nil {
		return "", nil, fmt.Errorf("keygen: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return "", nil, errors.New("keygen prints no PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return "", nil, err
	}
	file := filepath.Join(w.dir, name+".pem")
	return file, key.(*rsa.PrivateKey), os.WriteFile(file, text, 0o600)
}

// call is a request to the service, for what no client of others is tried with.
func call(ctx context.Context, method, url, bearer, kind, body string, into any) error {
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", kind)
	if id, secret, ok := strings.Cut(bearer, ":"); ok {
		r.SetBasicAuth(id, secret)
	} else if bearer != "" {
		r.Header.Set("Authorization", "Bearer "+bearer)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s answers %s %s", method, url, answer.Status, text)
	}
	if err == nil && into != nil {
		err = json.Unmarshal(text, into)
	}
	return err
}

// agent registers an agent with a credential, so that no two clients share a limit.
func (w *world) agent(ctx context.Context, capabilities ...string) (identity, error) {
	body, _ := json.Marshal(map[string]any{
		"email": strings.ToLower(rand.Text()) + "@example.com", "agentType": "custom", "version": "1.0.0",
		"capabilities": capabilities, "owner": "acceptance", "deploymentEnv": "development",
	})
	var made struct{ AgentID, ClientSecret string }
	err := call(ctx, "POST", w.base+"/api/v1/agents", w.bearer, "application/json", string(body), &made)
	if err == nil {
		err = call(ctx, "POST", w.base+"/api/v1/agents/"+made.AgentID+"/credentials", w.bearer, "application/json", "{}", &made)
	}
	return identity{made.AgentID, made.ClientSecret}, err
}

// token gets a token the plain way, for clients that only verify.
func (w *world) token(ctx context.Context, who identity, form url.Values) (string, error) {
	form.Set("grant_type", "client_credentials")
	var t struct {
		Token string `json:"access_token"`
	}
	err := call(ctx, "POST", w.base+"/api/v1/token", who.ID+":"+who.Secret, "application/x-www-form-urlencoded", form.Encode(), &t)
	return t.Token, err
}

// revoke wants JSON, as clients in other languages do.
func (w *world) revoke(ctx context.Context, who identity, token string) error {
	return call(ctx, "POST", w.base+"/api/v1/token/revoke", who.ID+":"+who.Secret,
		"application/x-www-form-urlencoded", url.Values{"token": {token}}.Encode(), &struct{}{})
}

// Tokens are one good token, and those that differ from it in one thing, which
// has to be refused.
type tokens struct {
	Good          string `json:"good"`
	Forged        string `json:"forged"`        // good too: made by us with the service's key, as all below but WrongAudience
	Expired       string `json:"expired"`       // an hour ago
	WrongIssuer   string `json:"wrongIssuer"`   // with a slash at the end
	WrongAudience string `json:"wrongAudience"` // by the service, for another resource
	WrongKey      string `json:"wrongKey"`      // another key, with the kid of the right one
	UnknownKey    string `json:"unknownKey"`    // another key, with its own kid
	WrongType     string `json:"wrongType"`     // typ JWT, as an ID token has
	Tampered      string `json:"tampered"`      // another scope under the signature of Good
	Revoked       string `json:"revoked"`       // by the service; only who asks it can know
	Unscoped      string `json:"unscoped"`      // by the service, without the scope resumes:read
	Bound         string `json:"bound"`         // by the service, to a key that nobody has any more

	revoke func(token string) error
}

// tokensFor makes tokens for a resource.
func (w *world) tokensFor(ctx context.Context, aud string) (t tokens, err error) {
	who, err := w.agent(ctx, "resumes:read", "scores:write")
	if err != nil {
		return t, err
	}
	for _, get := range []struct {
		into       *string
		scope, aud string
	}{
		{&t.Good, "resumes:read", aud},
		{&t.WrongAudience, "resumes:read", "https://payroll.example.com"},
		{&t.Revoked, "resumes:read", aud},
		{&t.Unscoped, "scores:write", aud},
	} {
		if *get.into, err = w.token(ctx, who, url.Values{"scope": {get.scope}, "resource": {get.aud}}); err != nil {
			return t, err
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return t, err
	}
	if t.Bound, err = w.boundToken(ctx, who, key, url.Values{"scope": {"resumes:read"}, "resource": {aud}}); err != nil {
		return t, err
	}
	t.revoke = func(token string) error { return w.revoke(ctx, who, token) }
	if err := t.revoke(t.Revoked); err != nil {
		return t, err
	}
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return t, err
	}
	now := time.Now().Unix()
	return t, errors.Join(
		forge(&t.Forged, t.Good, w.key, nil, nil),
		forge(&t.Expired, t.Good, w.key, nil, map[string]any{"iat": now - 7200, "exp": now - 3600}),
		forge(&t.WrongIssuer, t.Good, w.key, nil, map[string]any{"iss": w.base + "/"}),
		forge(&t.WrongKey, t.Good, other, nil, nil),
		forge(&t.UnknownKey, t.Good, other, map[string]any{"kid": rand.Text()}, nil),
		forge(&t.WrongType, t.Good, w.key, map[string]any{"typ": "JWT"}, nil),
		tamper(&t.Tampered, t.Good),
	)
}

// forge signs a token anew, with changes. All else is as it was, byte for byte:
// the service takes nothing that it wouldn't have written itself.
func forge(into *string, token string, key *rsa.PrivateKey, header, claims map[string]any) error {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return errors.New("a token of the service isn't a JWT")
	}
	for i, changes := range []map[string]any{header, claims} {
		text, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			return err
		}
		var was map[string]json.RawMessage
		if err := json.Unmarshal(text, &was); err != nil {
			return fmt.Errorf("reading a token of the service: %w", err)
		}
		for name, value := range changes {
			encoded, _ := json.Marshal(value)
			text = bytes.Replace(text, fmt.Appendf(nil, "%q:%s", name, was[name]), fmt.Appendf(nil, "%q:%s", name, encoded), 1)
		}
		parts[i] = base64.RawURLEncoding.EncodeToString(text)
	}
	signature, err := jwt.SigningMethodRS256.Sign(parts[0]+"."+parts[1], key)
	*into = parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(signature)
	return err
}

func tamper(into *string, token string) error {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return errors.New("a token of the service isn't a JWT")
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	parts[1] = base64.RawURLEncoding.EncodeToString(bytes.Replace(claims, []byte("resumes:read"), []byte("resumes:read payroll:read"), 1))
	*into = strings.Join(parts, ".")
	if err == nil && *into == token {
		err = errors.New("a token of the service hasn't the scope that was asked for")
	}
	return err
}

// verifies tries a client that verifies tokens by itself. The reasons are those
// by which it refuses.
func (c client) verifies(t tokens, verify func(token string) error, reasons map[string]func(error) bool) {
	c.checked("accepts a good token", verify(t.Good))
	c.checked("accepts one that only we signed, as a control", verify(t.Forged))
	for _, bad := range []struct{ what, token string }{
		{"an expired token", t.Expired},
		{"a wrong issuer", t.WrongIssuer},
		{"a wrong audience", t.WrongAudience},
		{"a wrong key", t.WrongKey},
		{"an unknown key", t.UnknownKey},
		{"a wrong type", t.WrongType},
		{"a changed scope", t.Tampered},
	} {
		if reason := reasons[bad.what]; reason != nil {
			c.refuses(bad.what, verify(bad.token), reason)
		}
	}
}
