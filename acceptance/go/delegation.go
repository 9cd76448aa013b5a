package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const delegationPage = "docs/developers/delegation.md"

// delegation runs the programs of that page together: the orchestrator hands work to the workers in Go and in Node.js, which call
// the service in Node.js of examples.md.
func delegation(ctx context.Context, w *world, c client) {
	p, err := w.parties(ctx)
	if err != nil {
		c.checked("has agents", err)
		return
	}
	inGo, inNode := p.Workers[0], p.Workers[1]
	dir := filepath.Join(w.dir, "delegation")
	err = errors.Join(os.Mkdir(dir, 0o755), os.Symlink(w.root+"/acceptance/node/node_modules", dir+"/node_modules"))
	// program writes one, with another port in place of that of the page, and returns where it then listens.
	program := func(page, name, port string) (file, url string) {
		free, portErr := freePort()
		file, fileErr := w.example(dir, page, name, func(text string) string { return strings.ReplaceAll(text, port, free) })
		err = errors.Join(err, portErr, fileErr)
		return file, "http://localhost:" + free
	}
	serviceFile, serviceURL := program(examplesPage, "service.mjs", "8080")
	goFile, goURL := program(delegationPage, "worker.go", "8081")
	nodeFile, nodeURL := program(delegationPage, "worker.mjs", "8082")
	orchestratorFile, _ := program(delegationPage, "orchestrator.mjs", "no port")
	binary := strings.TrimSuffix(goFile, ".go")
	if err == nil {
		output, buildErr := exec.CommandContext(ctx, "go", "build", "-C", w.root+"/acceptance/go", "-o", binary, goFile).CombinedOutput()
		if buildErr != nil {
			err = fmt.Errorf("%w %s", buildErr, output)
		}
	}
	if !c.checked("is complete", err) {
		return
	}

	to, _ := url.Parse(serviceURL)
	service := &watched{world: w, proxy: httputil.NewSingleHostReverseProxy(to)}
	front, err := listen(service)
	start := func(name string, who identity, url string, unasked int, command *exec.Cmd) *process {
		if err != nil {
			return nil
		}
		var p *process
		command.Env = append(os.Environ(), "BASE="+w.base, "SERVICE="+front, "CLIENT_ID="+who.ID, "CLIENT_SECRET="+who.Secret)
		if p, err = w.start("delegation-"+name, command); err == nil {
			err = p.ready(ctx, url, unasked)
		}
		return p
	}
	serving := start("service.mjs", identity{}, serviceURL, 401, exec.Command("node", serviceFile))
	goWorker := start("worker.go", inGo, goURL+"/work", 405, exec.Command(binary))
	nodeWorker := start("worker.mjs", inNode, nodeURL+"/work", 502, exec.Command("node", nodeFile)) // as it is given no token
	for _, p := range []*process{serving, goWorker, nodeWorker} {
		if p != nil {
			defer p.stop()
		}
	}
	if !c.checked("has a service and two workers", err) {
		return
	}

	orchestrate := func(want string) error {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		command := exec.CommandContext(ctx, "node", orchestratorFile)
		command.Env = append(os.Environ(), "BASE="+w.base, "SERVICE="+front, "CLIENT_ID="+p.Orchestrator.ID, "CLIENT_SECRET="+p.Orchestrator.Secret,
			"WORKERS="+goURL+" "+nodeURL)
		output, err := command.CombinedOutput()
		if err == nil && string(output) != want {
			err = errors.New("want " + want)
		}
		if err != nil {
			err = fmt.Errorf("%w, it printed %s", err, output)
		}
		return err
	}
	done := "200 two resumes for " + p.Orchestrator.ID + "\n"
	const refused = "502 the work is not done\n"
	if !c.checked("orchestrator.mjs has both do their work", orchestrate(done+done)) {
		return
	}
	for name, who := range map[string]identity{"worker.go": inGo, "worker.mjs": inNode} {
		logged := fmt.Sprintf(`{"sub":%q,"client_id":%q,"act":%s,`, p.Orchestrator.ID, who.ID, actedBy(who))
		text, err := os.ReadFile(serving.log)
		if err == nil && !strings.Contains(string(text), logged) {
			err = fmt.Errorf("it logs %s, want %s", text, logged)
		}
		c.checked("service.mjs sees for whom "+name+" acts", err)
		was, want := service.by(who), delegated{true, p.Orchestrator.ID, front, "resumes:read", who.ID, json.RawMessage(actedBy(who))}
		is, err := w.introspect(ctx, was.token)
		if err == nil && (fmt.Sprintf("%+v", was.is) != fmt.Sprintf("%+v", want) || is.Active) {
			err = fmt.Errorf("it was %+v, want %+v, and that it is active now is %v", was.is, want, is.Active)
		}
		c.checked("introspection says so of the token of "+name+", and that it ended with the work", err)
	}

	// refuses wants a worker to say no to what is done, and to log why.
	refuses := func(p *process, what, code string, do func() error) {
		before, err := os.ReadFile(p.log)
		if err == nil {
			err = do()
		}
		after, readErr := os.ReadFile(p.log)
		if err = errors.Join(err, readErr); err == nil && !strings.Contains(string(after[len(before):]), code) {
			err = fmt.Errorf("want %s, it logs %s", code, after[len(before):])
		}
		c.checked(what, err)
	}
	hands := func(want string, to identity) func() error {
		return func() error { return errors.Join(w.delegate(ctx, p.Orchestrator, to), orchestrate(want)) }
	}
	refuses(goWorker, "worker.go does nothing for who hasn't it as a delegate", "unauthorized_client", hands(refused+done, inNode))
	refuses(nodeWorker, "worker.mjs does nothing for who hasn't it as a delegate", "unauthorized_client", hands(done+refused, inGo))

	given, err := w.token(ctx, p.Orchestrator, url.Values{"resource": {front}})
	if err = errors.Join(err, w.delegate(ctx, p.Orchestrator, inGo, inNode)); err != nil {
		c.checked("has a token to give", err)
		return
	}
	work := func(worker, want string) error {
		answer, err := http.PostForm(worker+"/work", url.Values{"token": {given}})
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if got := fmt.Sprintf("%d %s", answer.StatusCode, text); err == nil && got != want {
			err = fmt.Errorf("it answers %s, want %s", got, want)
		}
		return err
	}
	c.checked("worker.go works with a token, as a control", work(goURL, done))
	c.checked("worker.mjs works with it too", work(nodeURL, done))
	if err := w.revoke(ctx, p.Orchestrator, given); err != nil {
		c.checked("has it revoked", err)
		return
	}
	refuses(goWorker, "worker.go does nothing once it is revoked", "invalid_request", func() error { return work(goURL, refused) })
	refuses(nodeWorker, "worker.mjs does nothing once it is revoked", "invalid_request", func() error { return work(nodeURL, refused) })
}

// A watched service keeps the last token that each client showed it, and what introspection then said of that.
type watched struct {
	world *world
	proxy http.Handler
	mu    sync.Mutex
	last  map[string]shown
}

type shown struct {
	token string
	is    delegated
}

func (s *watched) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	_, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	is, err := s.world.introspect(r.Context(), token)
	if err != nil {
		http.Error(out, err.Error(), http.StatusInternalServerError)
		return
	}
	s.mu.Lock()
	if s.last == nil {
		s.last = map[string]shown{}
	}
	s.last[is.ClientID] = shown{token, is}
	s.mu.Unlock()
	s.proxy.ServeHTTP(out, r)
}

func (s *watched) by(who identity) shown {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last[who.ID]
}
