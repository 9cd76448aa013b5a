package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A front is two copies behind a proxy that has the configuration of
// docs/devops/proxies, as it is but for addresses.
type front struct {
	w      *world
	c      client
	name   string // of the proxy
	dir    string
	base   string    // as clients see it
	ports  [2]string // of the copies
	counts [2]string // ports of their metrics
	env    []string
	copies [2]*process
	relay  *relay
	proxy  *process
	trust  *tls.Config
	drain  time.Duration // the least that the page has
	who    identity      // gets tokens, and introspects them
	editor string        // a token that may change agents
}

func tryBehindHAProxy(ctx context.Context, w *world, c client) { tryBehind(ctx, w, c, "haproxy") }
func tryBehindNginx(ctx context.Context, w *world, c client)   { tryBehind(ctx, w, c, "nginx") }

func tryBehind(ctx context.Context, w *world, c client, name string) {
	f := &front{w: w, c: c, name: name, dir: filepath.Join(w.dir, "behind-"+name)}
	defer f.stop()
	if !c.checked("runs two copies behind it", f.start(ctx)) {
		return
	}
	f.passes(ctx)
	f.outlivesPostgreSQL(ctx)

	all := []string{"token", "introspect", "revoke", "read", "keys", "change"}
	if name == "haproxy" {
		f.rolls(ctx, "", all, func(int, string) error { return nil })
		return
	}
	f.rolls(ctx, "", all[:5], func(int, string) error { return nil })
	// What changes something is sent once by nginx, so a copy is taken out before.
	f.rolls(ctx, ", taken out before", all, func(i int, mark string) error {
		if err := f.configure(fmt.Sprintf("server 127.0.0.1:%s max_fails=0", f.ports[i]), fmt.Sprintf("server 127.0.0.1:%s max_fails=0%s", f.ports[i], mark)); err != nil {
			return err
		}
		return f.proxy.Process.Signal(syscall.SIGHUP)
	})
}

func (f *front) start(ctx context.Context) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	f.base = "https://localhost:" + port
	for i := range f.ports {
		var other error
		f.ports[i], err = freePort()
		if f.counts[i], other = freePort(); err != nil || other != nil {
			return errors.Join(err, other)
		}
	}
	way, database, err := openRelay()
	if err != nil {
		return err
	}
	f.relay = way
	page, err := os.ReadFile(filepath.Join(f.w.root, "docs/devops/proxies.md"))
	if err != nil {
		return err
	}
	row := regexp.MustCompile(`(?mi)^\| ` + f.name + `, as configured \|.*\| (\d+s)\b[^|]* \|$`).FindSubmatch(page)
	if row == nil {
		return errors.New("the page doesn't say how long DRAIN_TIME is to be")
	}
	if f.drain, err = time.ParseDuration(string(row[1])); err != nil {
		return err
	}
	f.env = f.w.environment("DATABASE_URL="+database, "ISSUER="+f.base, "JWT_PRIVATE_KEY_FILE="+f.w.keyFile, "TRUSTED_PROXIES=127.0.0.1/32",
		"RATE_LIMIT_PER_MINUTE=0", "MONTHLY_TOKEN_LIMIT=0", "MAX_AGENTS=0", "LOG_LEVEL=warn", "DRAIN_TIME="+f.drain.String())
	for i := range f.copies {
		if err := f.startCopy(ctx, i); err != nil {
			return err
		}
	}
	if f.trust, err = certify(f.dir); err != nil {
		return err
	}
	if err := f.configure("", ""); err != nil {
		return err
	}
	command := exec.Command(program("haproxy"), "-db", "-f", f.dir+"/haproxy.cfg")
	if f.name == "nginx" {
		command = exec.Command(program("nginx"), "-p", f.dir, "-e", f.dir+"/error.log", "-c", f.dir+"/main.conf")
	}
	if f.proxy, err = f.w.start("behind-"+f.name, command); err != nil {
		return err
	}
	if f.who, err = f.w.agent(ctx, "resumes:read", "tokens:read", "agents:read"); err != nil {
		return err
	}
	for range 100 { // until the proxy knows its copies
		if _, err = f.token(ctx, f.who); err == nil {
			break
		}
		select {
		case <-f.proxy.done:
			return fmt.Errorf("%s ended: %s", f.name, f.proxy.tail())
		case <-time.After(100 * time.Millisecond):
		}
	}
	if err == nil {
		f.editor, err = f.token(ctx, f.w.admin)
	}
	return err
}

func (f *front) stop() {
	if f.proxy != nil {
		f.proxy.stop()
	}
	for _, p := range f.copies {
		if p != nil {
			p.Process.Kill() // it need not drain
			p.stop()
		}
	}
	if f.relay != nil {
		f.relay.cut()
		f.relay.Close()
	}
}

func (f *front) startCopy(ctx context.Context, i int) error {
	command := exec.Command(f.w.program)
	command.Env = append(f.env[:len(f.env):len(f.env)], "PORT="+f.ports[i], "METRICS_ADDR=127.0.0.1:"+f.counts[i])
	p, err := f.w.start(fmt.Sprintf("%s-copy-%d", f.name, i), command)
	if err != nil {
		return err
	}
	f.copies[i] = p
	return p.ready(ctx, "http://127.0.0.1:"+f.ports[i]+"/readyz", http.StatusOK)
}

// used waits until the proxy sends requests to a copy.
func (f *front) used(ctx context.Context, i int) error {
	for range 600 {
		answer, err := http.Get("http://127.0.0.1:" + f.counts[i] + "/metrics")
		if err != nil {
			return err
		}
		text, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || strings.Contains(string(text), `agentidp_http_requests_total{route="POST /api/v1/token",status="200"}`) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return errors.New("the proxy doesn't use a copy that is ready")
}

// configure writes the configuration, with another text in the place of one.
func (f *front) configure(text, other string) error {
	file, places := "haproxy.cfg", []string{
		"bind :443", "bind 127.0.0.1:" + strings.TrimPrefix(f.base, "https://localhost:"),
		"/etc/haproxy/idp.example.com.pem", f.dir + "/both.pem",
	}
	if f.name == "nginx" {
		file, places = "nginx.conf", []string{
			"listen 443", "listen 127.0.0.1:" + strings.TrimPrefix(f.base, "https://localhost:"),
			"/etc/nginx/idp.example.com.crt", f.dir + "/crt.pem", "/etc/nginx/idp.example.com.key", f.dir + "/key.pem",
		}
	}
	shown, err := os.ReadFile(filepath.Join(f.w.root, "docs/devops/proxies", file))
	if err != nil {
		return err
	}
	config := string(shown)
	if os.Getuid() != 0 { // who isn't root can't become another
		config = regexp.MustCompile(`(?m)^\t(user|group|chroot) .*\n`).ReplaceAllString(config, "")
	}
	places = append(places, "10.0.0.11:3000", "127.0.0.1:"+f.ports[0], "10.0.0.12:3000", "127.0.0.1:"+f.ports[1], "idp.example.com", "localhost")
	if text != "" {
		places = append(places, text, other)
	}
	for i := 0; i < len(places); i += 2 {
		if !strings.Contains(config, places[i]) {
			return fmt.Errorf("%s has no %q", file, places[i])
		}
		config = strings.ReplaceAll(config, places[i], places[i+1])
	}
	return writeFiles(f.dir, map[string]string{
		file: config,
		"main.conf": fill(`
daemon off;
worker_processes 2;
pid DIR/pid;
error_log DIR/error.log;
events {}
http {
	access_log off;
	client_body_temp_path DIR/body;
	proxy_temp_path DIR/proxy;
	fastcgi_temp_path DIR/fastcgi;
	uwsgi_temp_path DIR/uwsgi;
	scgi_temp_path DIR/scgi;
	include DIR/nginx.conf;
}
`, "DIR", f.dir),
	})
}

// ask sends a request through the proxy, from an address that is no proxy's, and
// returns the status and the body of the answer.
func (f *front) ask(ctx context.Context, by *http.Client, method, path, auth, kind, body string) (int, http.Header, string, error) {
	r, err := http.NewRequestWithContext(ctx, method, f.base+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, "", err
	}
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	r.Header.Set("X-Forwarded-For", "203.0.113.9") // as somebody who wants to be another
	r.Header.Set("Forwarded", "for=203.0.113.9")
	if id, secret, ok := strings.Cut(auth, ":"); ok {
		r.SetBasicAuth(id, secret)
	} else if auth != "" {
		r.Header.Set("Authorization", "Bearer "+auth)
	}
	answer, err := by.Do(r)
	if err != nil {
		return 0, nil, "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return answer.StatusCode, answer.Header, string(text), err
}

// browser is a client whose address is 127.0.0.2.
func (f *front) browser(keepAlive bool) *http.Client {
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		TLSClientConfig: f.trust, DisableKeepAlives: !keepAlive, MaxIdleConnsPerHost: 4,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			_, port, _ := net.SplitHostPort(address)
			return dialer.DialContext(ctx, "tcp4", "127.0.0.1:"+port)
		},
	}}
}

const formType = "application/x-www-form-urlencoded"

func (f *front) token(ctx context.Context, who identity) (string, error) {
	status, _, text, err := f.ask(ctx, f.browser(false), "POST", "/api/v1/token", who.ID+":"+who.Secret, formType, "grant_type=client_credentials")
	var t struct {
		Token string `json:"access_token"`
	}
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("/token answers %d %s", status, text)
	}
	if err == nil {
		err = json.Unmarshal([]byte(text), &t)
	}
	return t.Token, err
}

// passes looks at what a proxy may get wrong while all is well.
func (f *front) passes(ctx context.Context) {
	by := f.browser(true)
	want := func(what string, wanted int, method, path, auth, kind, body string) string {
		status, header, text, err := f.ask(ctx, by, method, path, auth, kind, body)
		if err == nil && status != wanted {
			err = fmt.Errorf("%s %s answers %d %.200s, want %d", method, path, status, text, wanted)
		}
		if err == nil && header.Get("X-Request-Id") == "" {
			err = errors.New("the answer is the proxy's")
		}
		f.c.checked(what, err)
		return text
	}
	var many []string
	for i := range 64 {
		many = append(many, fmt.Sprintf("%s-%02d:%s", strings.Repeat("s", 28), i, strings.Repeat("t", 31)))
	}
	rich, err := f.w.agent(ctx, many...)
	long := ""
	if err == nil {
		long, err = f.token(ctx, rich)
	}
	if err == nil && len(long) < 6000 {
		err = fmt.Errorf("it has %d bytes", len(long))
	}
	f.c.checked("has a token of as many capabilities as there may be", err)
	want("lets that pass as a header", 200, "GET", "/api/v1/agents/"+rich.ID, long, "", "")

	form := "grant_type=client_credentials&filler="
	want("lets a body of 16 kB pass", 200, "POST", "/api/v1/token", f.who.ID+":"+f.who.Secret, formType, form+strings.Repeat("x", 16384-len(form)))
	want("leaves a path as it is", 404, "GET", "/api/v1/../v1/agents", f.editor, "", "")
	want("leaves an escaped path as it is", 404, "GET", "/api/v1/agents%2F"+f.who.ID, f.editor, "", "")

	var log struct{ Data []struct{ IPAddress string } }
	text := want("serves the log", 200, "GET", "/api/v1/audit?action=token.issued&limit=1&agentId="+f.who.ID, f.editor, "", "")
	if err = json.Unmarshal([]byte(text), &log); err == nil && (len(log.Data) != 1 || log.Data[0].IPAddress != "127.0.0.2") {
		err = fmt.Errorf("the log has %s", text)
	}
	f.c.checked("says whose a request is, whatever that claims", err)
}

// outlivesPostgreSQL wants keys and metadata from a proxy whose copies have lost
// PostgreSQL, and all else to be the 503 of the service.
func (f *front) outlivesPostgreSQL(ctx context.Context) {
	by := f.browser(true)
	f.relay.cut()
	time.Sleep(5 * time.Second) // longer than any proxy here takes to notice
	var faults []error
	for range 20 {
		for _, path := range []string{"/.well-known/jwks.json", "/.well-known/oauth-authorization-server", "/livez"} {
			if status, _, text, err := f.ask(ctx, by, "GET", path, "", "", ""); err != nil || status != http.StatusOK {
				faults = append(faults, fmt.Errorf("%s answers %d %.200s %v", path, status, text, err))
			}
		}
	}
	f.c.checked("serves keys and metadata without PostgreSQL", errors.Join(faults...))
	faults = nil
	for range 4 {
		status, header, text, err := f.ask(ctx, by, "POST", "/api/v1/token", f.who.ID+":"+f.who.Secret, formType, "grant_type=client_credentials")
		if err == nil && (status != 503 || header.Get("Retry-After") == "" || !strings.HasPrefix(header.Get("Content-Type"), "application/json") ||
			!strings.Contains(text, "temporarily_unavailable")) {
			err = fmt.Errorf("/token answers %d %q %.200s", status, header, text)
		}
		faults = append(faults, err)
	}
	f.c.checked("answers 503 as the service does for all else", errors.Join(faults...))
	f.relay.mend()
	var err error
	for range 150 { // both copies may have to wait
		if err = f.both(ctx); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	f.c.checked("is well again by itself", err)
}

// both wants a proxy that uses both copies: ten requests in a row.
func (f *front) both(ctx context.Context) error {
	for range 10 {
		if _, err := f.token(ctx, f.who); err != nil {
			return err
		}
	}
	return nil
}

// rolls replaces one copy after the other under load, of which nothing may fail.
// Around is called with a copy before it stops and after it has started.
func (f *front) rolls(ctx context.Context, how string, kinds []string, around func(copy int, mark string) error) {
	loading, unload := context.WithCancel(ctx)
	defer unload()
	var load sync.WaitGroup
	var asked, failed atomic.Int64
	var first atomic.Value
	counts := map[string]*atomic.Int64{}
	token, err := f.token(ctx, f.who)
	if err != nil {
		f.c.checked("has a token for the load"+how, err)
		return
	}
	for _, kind := range kinds {
		counts[kind] = &atomic.Int64{}
		for _, keepAlive := range []bool{true, false} {
			if keepAlive && how != "" {
				continue // nginx that reads its configuration anew closes what is idle, whatever was just sent
			}
			by := f.browser(keepAlive)
			load.Go(func() {
				for n := 0; loading.Err() == nil; n++ {
					err := f.request(context.WithoutCancel(ctx), by, kind, token)
					asked.Add(1)
					counts[kind].Add(1)
					if err != nil {
						failed.Add(1)
						first.CompareAndSwap(nil, kind+": "+err.Error())
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
	}
	err = func() error {
		for i, old := range f.copies {
			time.Sleep(time.Second)
			if err := around(i, " down"); err != nil {
				return err
			}
			old.Process.Signal(syscall.SIGTERM)
			select {
			case <-old.done:
			case <-time.After(f.drain + 30*time.Second):
				return errors.New("a copy doesn't stop")
			}
			if err := f.startCopy(ctx, i); err != nil {
				return err
			}
			if err := around(i, ""); err != nil {
				return err
			}
			if err := f.used(ctx, i); err != nil {
				return err
			}
		}
		return nil
	}()
	f.c.checked("has both copies replaced"+how, err)
	unload()
	load.Wait()
	if failed.Load() > 0 {
		err = fmt.Errorf("%d of %d requests failed, the first: %v", failed.Load(), asked.Load(), first.Load())
	}
	for kind, n := range counts {
		if err == nil && n.Load() < 20 {
			err = fmt.Errorf("there were only %d requests of the kind %s", n.Load(), kind)
		}
	}
	if f.c.checked("fails no request meanwhile"+how, err) {
		fmt.Printf("      %-27s 0 of %d requests failed%s\n", f.c.name, asked.Load(), how)
	}
}

// request is one of the load.
func (f *front) request(ctx context.Context, by *http.Client, kind, token string) error {
	secret := f.who.ID + ":" + f.who.Secret
	method, path, auth, content, body, want := "POST", "/api/v1/token", secret, formType, "grant_type=client_credentials", http.StatusOK
	switch kind {
	case "introspect":
		path, body = "/api/v1/token/introspect", "token="+token
	case "revoke":
		path, body = "/api/v1/token/revoke", "token=unknown"
	case "read":
		method, path, auth, content, body = "GET", "/api/v1/agents/"+f.who.ID, token, "", ""
	case "keys":
		method, path, auth, content, body = "GET", "/.well-known/jwks.json", "", "", ""
	case "change":
		path, auth, content, want = "/api/v1/agents", f.editor, "application/json", http.StatusCreated
		body = `{"email": "` + strings.ToLower(rand.Text()) + `@example.com", "agentType": "custom", "version": "1.0.0",
			"capabilities": ["resumes:read"], "owner": "acceptance", "deploymentEnv": "development"}`
	}
	status, header, text, err := f.ask(ctx, by, method, path, auth, content, body)
	if err == nil && status != want {
		err = fmt.Errorf("%s answers %d %.200s (%s)", path, status, text, header.Get("Server"))
	}
	return err
}
