package main

import (
	"bufio"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"agentidp/verify"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// How long the steps of a rotation take here. An operator waits five minutes
// before the next key signs, since the keys may be cached so long; jose, as it
// is by default, needs half a minute. keyfunc refreshes more often than the wait
// is long, as docs/developers/examples.md has it: by itself it fetches a key that it doesn't know
// once in five minutes, and if two tokens ask for that at once refuses the second.
const (
	untilSigning   = 32 * time.Second
	keyfuncRefresh = 25 * time.Second
	rotationTTL    = 15 * time.Second
)

// rotateUnderLoad rotates the key by the steps of docs/devops/security.md, restarting two
// copies one at a time, while tokens are issued and verified all the time, by
// clients that are started once.
func rotateUnderLoad(ctx context.Context, w *world, c client) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	firstFile, first, err := w.newKey("first")
	nextFile, next, nextErr := w.newKey("next")
	who, agentErr := w.agent(ctx, "resumes:read")
	service, serviceErr := w.agent(ctx, "tokens:read")
	if err := errors.Join(err, nextErr, agentErr, serviceErr); err != nil {
		c.checked("has two keys and an agent", err)
		return
	}
	p := &pair{w: w}
	front, err := listen(p.front())
	if err != nil {
		c.checked("has a proxy", err)
		return
	}
	p.base = front
	go p.watch(ctx)
	defer p.stop()
	if !c.checked("runs two copies behind a proxy", p.restart(ctx, firstFile, nil)) {
		return
	}

	u := &users{base: front, seen: map[string]int{}}
	if err := u.start(ctx, w); err != nil {
		c.checked("starts clients that verify", err)
		return
	}
	var load sync.WaitGroup
	loading, unload := context.WithCancel(ctx)
	defer unload()
	for range 2 {
		load.Go(func() { u.load(loading, who) })
	}
	step := func(what string, keyFile string, publish []*rsa.PublicKey, wait time.Duration) {
		err := p.restart(ctx, keyFile, publish)
		if err == nil {
			select {
			case <-ctx.Done():
				err = ctx.Err()
			case <-time.After(wait):
			}
		}
		c.checked(what, errors.Join(err, u.failure()))
	}
	step("publishes the next key, and nobody fails", firstFile, []*rsa.PublicKey{&next.PublicKey}, untilSigning)
	step("signs with the next key, and nobody fails", nextFile, []*rsa.PublicKey{&first.PublicKey}, rotationTTL+2*time.Second)
	step("retires the last key, and nobody fails", nextFile, nil, 2*time.Second)
	unload()
	load.Wait()
	err = u.finish()
	c.checked("nobody has failed at the end", errors.Join(err, u.failure()))
	err = nil
	if len(u.kids) != 2 || u.issued.Load() < 100 {
		err = fmt.Errorf("%d tokens were issued with the keys %q, want many with two", u.issued.Load(), u.kids)
	}
	for _, name := range []string{"go-oidc", "keyfunc", "verify", "jose"} {
		if int64(u.seen[name]) < 2*u.issued.Load() {
			err = fmt.Errorf("%s has accepted %d of %d tokens, shown twice", name, u.seen[name], u.issued.Load())
		}
	}
	c.checked("every client has verified tokens of both keys", err)
	if err == nil {
		fmt.Printf("      %-27s %d tokens, each verified twice by go-oidc, keyfunc, verify and jose\n", c.name, u.issued.Load())
	}

	// What the last key has signed is refused from now on.
	t := u.last.Load().(string)
	var old string
	if err := forge(&old, t, first, map[string]any{"kid": u.kids[0]}, nil); err != nil {
		c.checked("has a token of the last key", err)
		return
	}
	verify := oidc.NewVerifier(front, oidc.NewRemoteKeySet(ctx, front+"/.well-known/jwks.json"), &oidc.Config{ClientID: resource})
	_, err = verify.Verify(ctx, t)
	c.checked("a new client accepts the next key", err)
	_, err = verify.Verify(ctx, old)
	c.refuses("the last key, in a new client", err, saying("failed to verify signature"))
	var is struct{ Active *bool }
	err = call(ctx, "POST", front+"/api/v1/token/introspect", service.ID+":"+service.Secret,
		"application/x-www-form-urlencoded", url.Values{"token": {old}}.Encode(), &is)
	if err == nil && (is.Active == nil || *is.Active) {
		err = errors.New("introspection calls it active")
	}
	c.checked("the service calls what the last key signed inactive", err)
}

// A pair is two copies of the service behind a proxy, which is what clients
// see. The proxy sends nothing to a copy whose /readyz isn't 200.
type pair struct {
	w      *world
	base   string
	copies [2]struct {
		process *process
		port    string
	}
	target [2]atomic.Pointer[url.URL] // nil: not ready
}

func (p *pair) front() http.Handler {
	turn := atomic.Uint32{}
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			n := turn.Add(1)
			for i := range uint32(2) {
				if to := p.target[(n+i)%2].Load(); to != nil {
					r.SetURL(to)
					return
				}
			}
		},
		Transport: &http.Transport{MaxIdleConnsPerHost: 16},
	}
}

// watch asks both copies for their health, as a proxy does.
func (p *pair) watch(ctx context.Context) {
	asking := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for ctx.Err() == nil {
		for i := range p.target {
			if to := p.target[i].Load(); to != nil {
				answer, err := asking.Get(to.String() + "/readyz")
				if err == nil {
					answer.Body.Close()
				}
				if err != nil || answer.StatusCode != http.StatusOK {
					p.target[i].Store(nil)
				}
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// restart restarts the copies one at a time with these keys.
func (p *pair) restart(ctx context.Context, keyFile string, publish []*rsa.PublicKey) error {
	var public strings.Builder
	for _, key := range publish {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return err
		}
		pem.Encode(&public, &pem.Block{Type: "PUBLIC KEY", Bytes: der})
	}
	for i := range p.copies {
		at := &p.copies[i]
		if at.process != nil {
			at.process.stop()
		}
		port, err := freePort()
		if err != nil {
			return err
		}
		command := exec.Command(p.w.program)
		command.Env = p.w.environment("PORT="+port, "ISSUER="+p.base, "JWT_PRIVATE_KEY_FILE="+keyFile, "JWT_PUBLIC_KEY="+public.String(),
			"TOKEN_TTL="+rotationTTL.String(), "RATE_LIMIT_PER_MINUTE=0", "MONTHLY_TOKEN_LIMIT=0")
		if at.process, err = p.w.start(fmt.Sprintf("copy-%d", i), command); err != nil {
			return err
		}
		if err = at.process.ready(ctx, "http://127.0.0.1:"+port+"/readyz", http.StatusOK); err != nil {
			return err
		}
		p.target[i].Store(&url.URL{Scheme: "http", Host: "127.0.0.1:" + port})
	}
	return nil
}

func (p *pair) stop() {
	for _, at := range p.copies {
		if at.process != nil {
			at.process.stop()
		}
	}
}

// Users get tokens and verify them.
type users struct {
	base   string
	issued atomic.Int64
	last   atomic.Value // the last token

	verifiers map[string]func(string) error
	jose      *exec.Cmd
	joseIn    io.Writer
	joseDone  chan struct{}
	closeJose func() error
	late      sync.WaitGroup // tokens that are to be verified again

	mu       sync.Mutex
	seen     map[string]int // tokens verified, by client
	kids     []string       // in the order in which they signed first
	failures []string
}

func (u *users) start(ctx context.Context, w *world) error {
	keys := u.base + "/.well-known/jwks.json"
	checks := oidc.NewVerifier(u.base, oidc.NewRemoteKeySet(ctx, keys), &oidc.Config{ClientID: resource})
	set, err := keyfunc.NewDefaultOverrideCtx(ctx, []string{keys}, keyfunc.Override{RefreshInterval: keyfuncRefresh})
	if err != nil {
		return err
	}
	ours, err := verify.New(u.base, resource)
	if err != nil {
		return err
	}
	u.verifiers = map[string]func(string) error{
		"verify":  func(token string) error { _, err := ours.Verify(ctx, token); return err },
		"go-oidc": func(token string) error { _, err := checks.Verify(ctx, token); return err },
		"keyfunc": func(token string) error {
			_, err := jwt.Parse(token, set.Keyfunc, jwt.WithIssuer(u.base), jwt.WithAudience(resource), jwt.WithValidMethods([]string{"RS256"}))
			return err
		},
	}
	u.jose = exec.CommandContext(ctx, "node", "verifier.mjs", u.base, resource)
	u.jose.Dir, u.jose.Stderr = w.root+"/acceptance/node", os.Stderr
	in, inErr := u.jose.StdinPipe()
	out, outErr := u.jose.StdoutPipe()
	if err := errors.Join(inErr, outErr, u.jose.Start()); err != nil {
		return err
	}
	u.joseIn, u.closeJose, u.joseDone = in, in.Close, make(chan struct{})
	go func() {
		defer close(u.joseDone)
		for lines := bufio.NewScanner(out); lines.Scan(); { // one for each token
			var err error
			if lines.Text() != "ok" {
				err = errors.New(lines.Text())
			}
			u.verified("jose", err)
		}
	}()
	return nil
}

// load gets tokens, and verifies each at once and shortly before it expires.
func (u *users) load(ctx context.Context, who identity) {
	cfg := clientcredentials.Config{
		ClientID: who.ID, ClientSecret: who.Secret, TokenURL: u.base + "/api/v1/token", AuthStyle: oauth2.AuthStyleInHeader,
		EndpointParams: url.Values{"resource": {resource}},
	}
	for ctx.Err() == nil {
		t, err := cfg.Token(context.WithoutCancel(ctx))
		if err != nil {
			u.verified("x/oauth2", err)
		} else {
			u.issued.Add(1)
			u.last.Store(t.AccessToken)
			u.verify(t.AccessToken)
			u.late.Add(1)
			time.AfterFunc(rotationTTL-5*time.Second, func() {
				defer u.late.Done()
				u.verify(t.AccessToken)
			})
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (u *users) verify(token string) {
	for name, verify := range u.verifiers {
		u.verified(name, verify(token))
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if parsed, _, err := jwt.NewParser().ParseUnverified(token, jwt.MapClaims{}); err == nil {
		if kid, _ := parsed.Header["kid"].(string); !slices.Contains(u.kids, kid) {
			u.kids = append(u.kids, kid)
		}
	}
	io.WriteString(u.joseIn, token+"\n")
}

// verified counts what a client has verified, or keeps why it hasn't.
func (u *users) verified(name string, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err != nil {
		u.failures = append(u.failures, name+": "+err.Error())
		return
	}
	u.seen[name]++
}

// failure tells what has failed since it was asked last.
func (u *users) failure() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.failures) == 0 {
		return nil
	}
	err := fmt.Errorf("%d failures, the first: %s", len(u.failures), u.failures[0])
	u.failures = nil
	return err
}

// finish waits for what is still to be verified.
func (u *users) finish() error {
	u.late.Wait()
	u.closeJose()
	<-u.joseDone
	return u.jose.Wait()
}
