package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	revocationsPage = "docs/developers/revocations.md"
	silence         = 15 * time.Second // for which the page lets a token live that was cut off, whatever breaks
)

// A cutting tries the services of the page, in both languages at once. They read from a copy of their own, by https and a
// proxy; all else is done at another copy.
type cutting struct {
	*world                 // of the other copy
	c                      client
	env                    []string // of the copy that they read from
	port                   string
	copy                   *process
	proxy                  *latecomer
	way, postgresql, cache *relay
	services               []*resumes
	control                string // a token that nothing is done to
}

// Resumes is one of the services.
type resumes struct {
	client
	url     string
	reader  identity // its own agent
	process *process
}

func revocations(ctx context.Context, w *world, c client) {
	f := &cutting{c: c}
	defer f.stop()
	if !c.checked("has services that read from another copy", f.open(ctx, w)) {
		return
	}
	t, err := f.tokensFor(ctx, resource)
	if c.checked("has tokens", err) {
		for _, s := range f.services {
			s.guards(t, abilities{types: true}, askWith(ctx, s.url))
		}
	}
	f.cutsOff(ctx)
	f.breaks(ctx)
}

func (f *cutting) open(ctx context.Context, w *world) (err error) {
	dir := filepath.Join(w.dir, "revocations")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Symlink(w.root+"/acceptance/node/node_modules", dir+"/node_modules")); err != nil {
		return err
	}
	other, err := freePort()
	if err != nil {
		return err
	}
	if f.port, err = freePort(); err != nil {
		return err
	}
	to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "127.0.0.1:" + f.port})
	to.ErrorLog = log.New(io.Discard, "", 0) // of the copy that is gone
	f.proxy = &latecomer{to: to, tokens: map[string]string{}}
	if _, err := certify(dir); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go http.ServeTLS(listener, f.proxy, dir+"/crt.pem", dir+"/key.pem") // HTTP/2 for who speaks it
	if f.way, err = newRelay(func() (net.Conn, error) { return net.Dial("tcp", listener.Addr().String()) }); err != nil {
		return err
	}
	issuer := fmt.Sprintf("https://localhost:%d", f.way.Addr().(*net.TCPAddr).Port)
	database, socket := "", strings.TrimSuffix(strings.TrimPrefix(os.Getenv("REDIS_URL"), "unix://"), "?db=0")
	if f.postgresql, database, err = openRelay(); err != nil {
		return err
	}
	if f.cache, err = newRelay(func() (net.Conn, error) { return net.Dial("unix", socket) }); err != nil {
		return err
	}
	env := w.environment("ISSUER="+issuer, "JWT_PRIVATE_KEY_FILE="+w.keyFile, "RATE_LIMIT_PER_MINUTE=0")
	f.env = append(env[:len(env):len(env)], "PORT="+f.port, "DATABASE_URL="+database, "REDIS_URL=redis://"+f.cache.Addr().String()+"/0")
	f.world = &world{dir: dir, root: w.root, program: w.program, base: "http://127.0.0.1:" + other, issuer: issuer, key: w.key}
	if err := errors.Join(f.serve(ctx, "other", other, append(env[:len(env):len(env)], "PORT="+other)), f.startCopy(ctx)); err != nil {
		return err
	}
	if f.bearer, err = f.token(ctx, w.admin, url.Values{}); err != nil {
		return err
	}
	if _, f.control, err = f.victim(ctx); err != nil {
		return err
	}
	return f.begins(ctx)
}

// begins starts the services while the log has more than a page, of which they get no more than the first.
func (f *cutting) begins(ctx context.Context) error {
	who, err := f.agent(ctx, "resumes:read")
	for i := 0; i < 1001 && err == nil; i++ {
		err = f.patch(ctx, who, []string{suspend, reactivate}[i%2])
	}
	if err != nil {
		return err
	}
	f.proxy.begin()
	err = errors.Join(f.run(ctx, "go", "service.go", "cuts.go"), f.run(ctx, "node", "service.mjs", "cuts.mjs"))
	if err == nil {
		close(f.proxy.late.cut)
		err = errors.Join(f.proxy.reached(2), f.proxy.reached(2)) // both ask for the second page
	}
	if f.c.checked("starts", err) {
		f.all(ctx, "takes nothing after a page that is not the last", f.control, 503, time.Time{})
	}
	if err = errors.Join(err, f.proxy.end()); err == nil {
		f.all(ctx, "takes a good token once it has read all", f.control, 200, time.Time{})
	}
	return err
}

func (f *cutting) startCopy(ctx context.Context) (err error) {
	command := exec.Command(f.program)
	command.Env = f.env
	if f.copy, err = f.start("revocations-copy", command); err != nil {
		return err
	}
	return f.copy.ready(ctx, "http://127.0.0.1:"+f.port+"/readyz", 200)
}

// run starts the service of a language as the page has it.
func (f *cutting) run(ctx context.Context, language string, names ...string) error {
	reader, err := f.agent(ctx, "tokens:read")
	if err != nil {
		return err
	}
	port, err := freePort()
	if language == "node" && err == nil {
		err = f.patch(ctx, reader, `{"tokenTtl": 15}`) // it waits for the 401
	}
	if err != nil {
		return err
	}
	var files []string
	for _, name := range names {
		file, err := f.example(f.dir, revocationsPage, name, func(text string) string { return strings.ReplaceAll(text, "8080", port) })
		if err != nil {
			return err
		}
		files = append(files, file)
	}
	command := exec.Command("node", files[0])
	if language == "go" {
		binary := filepath.Join(f.dir, "service")
		args := append([]string{"build", "-C", f.root + "/acceptance/go", "-o", binary}, files...)
		if output, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%w %s", err, output)
		}
		command = exec.Command(binary)
	}
	command.Env = append(os.Environ(), "BASE="+f.issuer, "SERVICE="+resource, "CLIENT_ID="+reader.ID, "CLIENT_SECRET="+reader.Secret,
		"SSL_CERT_FILE="+f.dir+"/crt.pem", "NODE_EXTRA_CA_CERTS="+f.dir+"/crt.pem")
	s := &resumes{client: client{f.c.report, f.c.name + " " + language}, url: "http://localhost:" + port + "/resumes", reader: reader}
	if s.process, err = f.start("revocations-"+language, command); err != nil {
		return err
	}
	f.services = append(f.services, s)
	return s.process.ready(ctx, s.url, map[string]int{"go": 401, "node": 503}[language]) // which is first asked for a token, or for what it knows
}

func (f *cutting) stop() {
	if f.world != nil {
		for _, p := range f.processes {
			p.stop()
		}
	}
	for _, r := range []*relay{f.way, f.postgresql, f.cache} {
		if r != nil {
			r.cut()
			r.Close()
		}
	}
}

// victim is a new agent with a token for the services.
func (f *cutting) victim(ctx context.Context) (who identity, token string, err error) {
	if who, err = f.agent(ctx, "resumes:read"); err == nil {
		token, err = f.token(ctx, who, url.Values{"resource": {resource}})
	}
	return who, token, err
}

// patch changes an agent at the other copy.
func (f *cutting) patch(ctx context.Context, who identity, change string) error {
	return call(ctx, "PATCH", f.base+"/api/v1/agents/"+who.ID, f.bearer, "application/json", change, nil)
}

const (
	suspend    = `{"status": "suspended"}`
	reactivate = `{"status": "active"}`
)

// answers waits until the service answers a token as it should. killed is when that was cut off, zero if it was not: it is
// taken for as long as the page promises, and never again once it was not. However slow the machine is, no good service fails that.
func (s *resumes) answers(ctx context.Context, token string, want int, killed time.Time) (time.Duration, error) {
	ask, begun, was := askWith(ctx, s.url), time.Now(), 0
	for {
		asked := time.Now()
		status, err := ask(token)
		switch {
		case err != nil:
			return 0, err
		case status == 200 && !killed.IsZero() && asked.Sub(killed) > silence:
			return 0, fmt.Errorf("it takes a token %v after that was cut off", asked.Sub(killed))
		case status == 200 && !killed.IsZero() && was > 200:
			return 0, fmt.Errorf("it takes a token that was cut off, after it has refused that with %d", was)
		case status == want:
			return time.Since(begun), nil
		case time.Since(begun) > time.Minute:
			return 0, fmt.Errorf("after a minute it answers %d, want %d: %s", status, want, s.process.tail())
		}
		was = status
		time.Sleep(5 * time.Millisecond)
	}
}

// all wants the answer of both services, and says how long that took.
func (f *cutting) all(ctx context.Context, what, token string, want int, killed time.Time) bool {
	var group sync.WaitGroup
	good := make([]bool, len(f.services))
	for i, s := range f.services {
		group.Go(func() {
			took, err := s.answers(ctx, token, want, killed)
			if good[i] = s.checked(what, err); good[i] {
				fmt.Printf("      %-27s %d after %v\n", s.name, want, took.Round(time.Millisecond))
			}
		})
	}
	group.Wait()
	return good[0] && good[1]
}

// refused cuts a token off and wants both services to refuse it then, and to take another one still.
func (f *cutting) refused(ctx context.Context, what, token string, cut func() error) bool {
	if !f.all(ctx, "takes a token before "+what, token, 200, time.Time{}) {
		return false
	}
	if err := cut(); err != nil {
		return f.c.checked(what, err)
	}
	return f.all(ctx, "refuses it after "+what, token, 401, time.Now()) && f.all(ctx, "takes another still", f.control, 200, time.Time{})
}

// cutsOff ends tokens in each way.
func (f *cutting) cutsOff(ctx context.Context) {
	who, token, err := f.victim(ctx)
	if !f.c.checked("has a token", err) {
		return
	}
	f.refused(ctx, "its agent is suspended", token, func() error { return f.patch(ctx, who, suspend) })
	if f.c.checked("has it made active again", f.patch(ctx, who, reactivate)) {
		f.all(ctx, "takes it again", token, 200, time.Time{})
	}
	credential := func(method, what, body, token string) error {
		claims := jwt.MapClaims{}
		if _, _, err := jwt.NewParser().ParseUnverified(token, claims); err != nil {
			return err
		}
		who, id := claims["client_id"], claims["credential_id"]
		return call(ctx, method, fmt.Sprintf("%s/api/v1/agents/%s/credentials/%s%s", f.base, who, id, what), f.bearer, "application/json", body, nil)
	}
	ways := []struct {
		what string
		cut  func(who identity, token string) error
	}{
		{"its agent is decommissioned", func(who identity, _ string) error {
			return call(ctx, "DELETE", f.base+"/api/v1/agents/"+who.ID, f.bearer, "", "", nil)
		}},
		{"its secret is rotated", func(_ identity, token string) error { return credential("POST", "/rotate", "{}", token) }},
		{"its credential is revoked", func(_ identity, token string) error { return credential("DELETE", "", "", token) }},
		{"it is revoked", func(who identity, token string) error { return f.revoke(ctx, who, token) }},
	}
	for _, way := range ways {
		who, token, err := f.victim(ctx)
		if f.c.checked("has a token", err) {
			f.refused(ctx, way.what, token, func() error { return way.cut(who, token) })
		}
	}
	for i := range 2 { // the first agent of a chain of three, and the one behind it
		for _, way := range ways {
			var agents []identity
			var given []string
			for n := range 3 {
				who, token, err := f.victim(ctx)
				if agents = append(agents, who); err == nil && n > 0 {
					if err = f.delegate(ctx, agents[0], agents...); err == nil {
						token, err = f.trade(ctx, who, given[n-1])
					}
				}
				if given = append(given, token); !f.c.checked("has a token, by exchange", err) {
					return
				}
			}
			f.refused(ctx, fmt.Sprintf("%s: link %d of its chain", way.what, i+1), given[2], func() error { return way.cut(agents[i], given[i]) })
		}
	}
}

// trade gets a token by exchange.
func (w *world) trade(ctx context.Context, who identity, token string) (string, error) {
	var t struct {
		Token string `json:"access_token"`
	}
	form := url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:token-exchange"}, "subject_token": {token}, "subject_token_type": {accessTokenType}}
	err := call(ctx, "POST", w.base+"/api/v1/token", who.ID+":"+who.Secret, formType, form.Encode(), &t)
	return t.Token, err
}

// breaks has parts of the way fail, one after the other.
func (f *cutting) breaks(ctx context.Context) {
	f.proxy.mu.Lock()
	var err error
	for _, token := range f.proxy.tokens {
		err = errors.Join(err, call(ctx, "POST", f.base+"/api/v1/token/revoke", f.bearer, formType, url.Values{"token": {token}}.Encode(), nil))
	}
	f.proxy.begun = map[string]bool{}
	f.proxy.mu.Unlock()
	f.c.checked("has its own token revoked", err)
	f.suspends(ctx, "once its own token is revoked and its place is none of the log")
	f.proxy.mu.Lock()
	if n := len(f.proxy.begun); n != 2 {
		err = fmt.Errorf("only %d do", n)
	}
	f.proxy.mu.Unlock()
	f.c.checked("begins again", err)

	f.cache.cut()
	f.way.mu.Lock()
	f.way.idle = time.Second
	f.way.mu.Unlock()
	f.quiet(ctx, "without Redis, by a way that cuts off who waits for a second")
	f.cache.mend()
	f.way.mu.Lock()
	n := f.way.cuts
	f.way.idle = 0
	f.way.mu.Unlock()
	if err = nil; n < 6 {
		err = fmt.Errorf("nobody was cut off but %d times", n)
	}
	f.c.checked("was cut off who waits", err)

	release := f.way.hang(false)
	f.suspends(ctx, "with connections that hang")
	release()

	f.fails(ctx, "the way hangs", func(func()) { release = f.way.hang(true) }, func() error { release(); return nil })
	f.fails(ctx, "PostgreSQL is gone", func(func()) { f.postgresql.cut() }, func() error { f.postgresql.mend(); return nil })
	f.fails(ctx, "AgentIdP is gone", func(func()) { f.copy.Process.Kill(); <-f.copy.done }, func() error { return f.startCopy(ctx) })
	f.fails(ctx, "answers come late and then none", f.proxy.delay, f.proxy.end)
	var begun time.Time
	f.fails(ctx, "its own agent is suspended", func(func()) {
		begun, err = time.Now(), f.each(func(s *resumes) error { return f.patch(ctx, s.reader, suspend) })
	}, func() error {
		return errors.Join(err, f.each(func(s *resumes) error {
			return errors.Join(f.asksSeldom(ctx, s, begun), f.patch(ctx, s.reader, reactivate))
		}))
	})
}

func (f *cutting) each(do func(*resumes) error) (err error) {
	for _, s := range f.services {
		err = errors.Join(err, do(s))
	}
	return err
}

// asksSeldom wants one refusal in ten seconds, as the page has it, of a service whose agent was suspended.
func (f *cutting) asksSeldom(ctx context.Context, s *resumes, since time.Time) error {
	var refused struct{ Total int }
	err := call(ctx, "GET", f.base+"/api/v1/audit?action=auth.failed&agentId="+s.reader.ID, f.bearer, "", "", &refused)
	if most := 2 + int(time.Since(since)/(10*time.Second)); err == nil && (refused.Total < 1 || refused.Total > most) {
		err = fmt.Errorf("%s was refused a token %d times in %v, want 1 to %d", s.name, refused.Total, time.Since(since), most)
	}
	return err
}

// suspends wants what is cut off to be refused.
func (f *cutting) suspends(ctx context.Context, how string) {
	who, token, err := f.victim(ctx)
	if f.c.checked("has a token "+how, err) {
		f.refused(ctx, "its agent is suspended "+how, token, func() error { return f.patch(ctx, who, suspend) })
	}
}

// quiet cuts off some, and nothing for longer than a service may hear nothing, and then another.
func (f *cutting) quiet(ctx context.Context, how string) {
	for range 3 {
		f.suspends(ctx, how)
	}
	time.Sleep(silence + 3*time.Second)
	f.suspends(ctx, how)
}

// fails wants services that take nothing while something is gone, no token for longer than they may that was cut off then, and
// all that is good once it is back.
func (f *cutting) fails(ctx context.Context, how string, begin func(kill func()), end func() error) {
	who, token, err := f.victim(ctx)
	if !f.c.checked("has a token", err) || !f.all(ctx, "takes it before "+how, token, 200, time.Time{}) {
		return
	}
	var killed time.Time
	var once sync.Once
	kill := func() {
		once.Do(func() { err, killed = f.patch(ctx, who, suspend), time.Now() })
	}
	begin(kill)
	kill()
	if !f.c.checked("has its agent suspended while "+how, err) {
		return
	}
	f.all(ctx, "takes no token that is cut off while "+how, token, 503, killed)
	f.all(ctx, "takes none at all while "+how, f.control, 503, time.Time{})
	if f.c.checked("is well again after "+how, end()) {
		f.all(ctx, "takes a good token after "+how, f.control, 200, time.Time{})
		f.all(ctx, "refuses what was cut off while "+how, token, 401, killed)
	}
}

// A latecomer is a proxy before the copy. While it is late it passes one more answer of the feed to each reader, which it has kept
// back for a while, and then none.
type latecomer struct {
	to     http.Handler
	mu     sync.Mutex
	late   *lateness         // or nil
	tokens map[string]string // the last of each reader
	begun  map[string]bool   // who asks without a place; where it isn't nil, those of the others are none of the log
}

type lateness struct {
	readers map[string]bool
	asked   chan struct{} // one for each answer that is kept back, and for each question that gets none
	cut     chan struct{} // closed once something was cut off, of which the former say nothing
	over    chan struct{}
}

func (p *latecomer) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/api/v1/revocations" {
		p.to.ServeHTTP(out, r)
		return
	}
	reader, _, _ := strings.Cut(r.UserAgent(), "/")
	q := r.URL.Query()
	p.mu.Lock()
	p.tokens[reader] = strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	late, first := p.late, false
	if late != nil {
		first = !late.readers[reader]
		late.readers[reader] = true
		q.Del("wait") // so that the answers of both are there within the time that they ask for
	}
	if p.begun != nil && q.Get("after") == "" {
		p.begun[reader] = true
	} else if p.begun != nil && !p.begun[reader] {
		q.Set("after", "1-0000000000000000")
	}
	p.mu.Unlock()
	r.URL.RawQuery = q.Encode()
	if late == nil {
		p.to.ServeHTTP(out, r)
		return
	}
	if !first {
		late.asked <- struct{}{}
		select {
		case <-late.over:
		case <-r.Context().Done():
		}
		return
	}
	answer := httptest.NewRecorder()
	p.to.ServeHTTP(answer, r)
	late.asked <- struct{}{}
	<-late.cut
	time.Sleep(2500 * time.Millisecond)
	maps.Copy(out.Header(), answer.Header())
	out.WriteHeader(answer.Code)
	out.Write(answer.Body.Bytes())
}

func (p *latecomer) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.late = &lateness{map[string]bool{}, make(chan struct{}, 1000), make(chan struct{}), make(chan struct{})}
}

// reached waits until so many have asked.
func (p *latecomer) reached(n int) error {
	for range n {
		select {
		case <-p.late.asked:
		case <-time.After(time.Minute):
			return errors.New("nobody asks")
		}
	}
	return nil
}

// delay keeps an answer back while something is cut off.
func (p *latecomer) delay(kill func()) {
	p.begin()
	p.reached(2)
	kill()
	close(p.late.cut)
}

func (p *latecomer) end() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.late.over)
	p.late = nil
	return nil
}
