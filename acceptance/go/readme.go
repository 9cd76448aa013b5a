package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A block is one of a page that is fenced, and what is indented below it.
type block struct{ kind, text, below string }

func (w *world) blocks(page string, headings ...string) (list []block, err error) {
	for _, heading := range headings {
		more, err := w.section(page, heading)
		if err != nil {
			return nil, err
		}
		list = append(list, more...)
	}
	return list, nil
}

func (w *world) section(page, heading string) (list []block, err error) {
	text, err := os.ReadFile(filepath.Join(w.root, page))
	if err != nil {
		return nil, err
	}
	_, section, found := strings.Cut(string(text), "\n## "+heading+"\n")
	if !found {
		return nil, fmt.Errorf("%s has no section %q", page, heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	for i, piece := range strings.Split(section, "\n```") {
		kind, rest, _ := strings.Cut(piece, "\n")
		if i%2 == 1 {
			list = append(list, block{kind: kind, text: rest + "\n"})
			continue
		}
		for line := range strings.Lines(rest) {
			if in, indented := strings.CutPrefix(line, "    "); indented && len(list) > 0 {
				list[len(list)-1].below += strings.TrimSpace(in)
			}
		}
	}
	return list, nil
}

// walkReadme pastes the walk into a shell, block after block, and holds what is
// printed to what README.md shows: the same answers with the same fields.
func walkReadme(ctx context.Context, w *world, c client) {
	list, err := w.blocks("README.md", "A walk")
	if err == nil && len(list) < 5 {
		err = fmt.Errorf("README.md has %d blocks there", len(list))
	}
	dir := filepath.Join(w.dir, "walk")
	printed, readErr := os.ReadFile(filepath.Join(w.dir, "first-agent"))
	if err := errors.Join(err, readErr, writeFiles(dir, map[string]string{".run/first-agent": string(printed)})); err != nil {
		c.checked("is there", err)
		return
	}
	var script strings.Builder
	const mark = "-- next --"
	for _, b := range list {
		script.WriteString(strings.ReplaceAll(b.text, "http://localhost:3000", w.base) + "\necho '" + mark + "'\n")
	}
	shell := exec.CommandContext(ctx, "sh", "-e", "-u")
	shell.Dir, shell.Stdin = dir, strings.NewReader(script.String())
	output, err := shell.CombinedOutput()
	pieces := strings.Split(string(output), mark)
	if err == nil && len(pieces) != len(list)+1 {
		err = fmt.Errorf("it printed %q", output)
	}
	if !c.checked("runs as pasted", err) {
		return
	}
	for i, b := range list {
		want, err := shapes(b.below)
		if err != nil {
			err = fmt.Errorf("what README.md shows: %w", err)
		}
		got, gotErr := shapes(pieces[i])
		if err = errors.Join(err, gotErr); err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("printed\n%q, README.md shows\n%q", got, want)
		}
		c.checked(fmt.Sprintf("prints what it shows, block %d of %d", i+1, len(list)), err)
	}
}

// shapes are the names in each of some JSON values, one after the other.
func shapes(text string) (list []string, err error) {
	for d := json.NewDecoder(strings.NewReader(text)); ; {
		var value any
		if err := d.Decode(&value); err == io.EOF {
			return list, nil
		} else if err != nil {
			return nil, fmt.Errorf("%w in %q", err, text)
		}
		list = append(list, shape(value))
	}
}

func shape(value any) string {
	switch v := value.(type) {
	case map[string]any:
		var parts []string
		for _, name := range slices.Sorted(maps.Keys(v)) {
			parts = append(parts, name+" "+shape(v[name]))
		}
		if active, ok := v["active"].(bool); ok { // the one value that matters
			parts = append(parts, fmt.Sprint(active))
		}
		return "{" + strings.Join(parts, ", ") + "}"
	case []any:
		if len(v) > 0 {
			return "[" + shape(v[0]) + "]"
		}
	}
	return ""
}

const examplesPage = "docs/developers/examples.md"

// example writes the block of a page that starts with a comment which has this name.
func (w *world) example(dir, page, name string, change func(string) string) (file string, err error) {
	list, err := w.blocks(page, map[string][]string{examplesPage: {"Agents", "Services"}, keysPage: {"Make one", "Programs"},
		delegationPage: {"An orchestrator and two workers"}, proofsPage: {"Use it", "Check proofs in a service"},
		revocationsPage: {"In Go", "In Node.js"}}[page]...)
	for _, b := range list {
		if first, _, _ := strings.Cut(b.text, "\n"); strings.HasSuffix(first, " "+name) {
			return filepath.Join(dir, name), writeFiles(dir, map[string]string{name: change(b.text)})
		}
	}
	return "", errors.Join(err, fmt.Errorf("%s has no %s", page, name))
}

func readmeGo(ctx context.Context, w *world, c client) {
	dir := filepath.Join(w.dir, "readme-go")
	build := func(name string, change func(string) string) (*exec.Cmd, error) {
		file, err := w.example(dir, examplesPage, name, change)
		if err != nil {
			return nil, err
		}
		binary := strings.TrimSuffix(file, ".go")
		command := exec.CommandContext(ctx, "go", "build", "-C", w.root+"/acceptance/go", "-o", binary, file)
		if output, err := command.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w %s", err, output)
		}
		return exec.Command(binary), nil
	}
	c.examples(ctx, w, build, "agent.go", "service.go")
}

func readmeNode(ctx context.Context, w *world, c client) {
	dir := filepath.Join(w.dir, "readme-node")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Symlink(w.root+"/acceptance/node/node_modules", dir+"/node_modules")); err != nil {
		c.checked("has its modules", err)
		return
	}
	c.examples(ctx, w, w.script(dir, "node"), "agent.mjs", "service.mjs")
}

func readmePython(ctx context.Context, w *world, c client) {
	python, err := pythonWith("requests")
	if c.checked("has requests", err) {
		c.examples(ctx, w, w.script(filepath.Join(w.dir, "readme-python"), python), "agent.py", "")
	}
}

// pythonWith is a Python that can import a module.
func pythonWith(module string) (string, error) {
	for _, python := range []string{"python3", "/usr/bin/python3"} { // Debian's packages are for the latter
		if exec.Command(python, "-c", "import "+module).Run() == nil {
			return python, nil
		}
	}
	return "", fmt.Errorf("no Python here can import %s", module)
}

// script makes a command of a block for an interpreter.
func (w *world) script(dir, interpreter string) func(string, func(string) string) (*exec.Cmd, error) {
	return func(name string, change func(string) string) (*exec.Cmd, error) {
		file, err := w.example(dir, examplesPage, name, change)
		return exec.Command(interpreter, file), err
	}
}

// examples tries the agent of a language, and its service if it has one.
func (c client) examples(ctx context.Context, w *world, build func(string, func(string) string) (*exec.Cmd, error), agent, service string) {
	who, err := w.agent(ctx, "resumes:read")
	if err != nil {
		c.checked("has an agent", err)
		return
	}
	unchanged := func(text string) string { return text }
	command, err := build(agent, unchanged)
	if !c.checked(agent+" is complete", err) {
		return
	}
	run := func(base, url, secret string) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		again := exec.CommandContext(ctx, command.Path, command.Args[1:]...)
		again.Env = append(os.Environ(), "BASE="+base, "SERVICE="+url, "CLIENT_ID="+who.ID, "CLIENT_SECRET="+secret)
		output, err := again.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, output)
		}
		return string(output), err
	}

	if service != "" {
		port, err := freePort()
		if err != nil {
			c.checked("has a port", err)
			return
		}
		url := "http://localhost:" + port
		serving, err := build(service, func(text string) string { return strings.ReplaceAll(text, "8080", port) })
		var p *process
		if err == nil {
			serving.Env = append(os.Environ(), "BASE="+w.base, "SERVICE="+url)
			p, err = w.start(strings.ReplaceAll(c.name, " ", "-"), serving)
		}
		if err == nil {
			defer p.stop()
			err = p.ready(ctx, url+"/resumes", 401)
		}
		if !c.checked(service+" serves", err) {
			return
		}
		output, err := run(w.base, url, who.Secret)
		if err == nil && output != "two resumes for "+who.ID+"\n" {
			err = fmt.Errorf("it printed %q", output)
		}
		c.checked(agent+" calls "+service, err)
		t, err := w.tokensFor(ctx, url)
		if err != nil {
			c.checked("has tokens", err)
			return
		}
		client{c.report, c.name + ", service"}.guards(t, abilities{types: true}, askWith(ctx, url+"/resumes"))
	}

	// What to do on 401, 429 and 503, with the service behind a proxy that is
	// busy at first, and a service that says each of them once.
	busy := &busyProxy{}
	front, err := listen(busy)
	if err == nil {
		err = busy.open(ctx, w, front)
	}
	moods := &moodyService{}
	moody, moodyErr := listen(moods)
	if err = errors.Join(err, moodyErr); err != nil {
		c.checked("has a service that is busy", err)
		return
	}
	output, err := run(front, moody, who.Secret)
	if err == nil && output != "done\n" {
		err = fmt.Errorf("it printed %q", output)
	}
	c.checked(agent+" gets through 401, 429 and 503", errors.Join(err, moods.wrong(), busy.wrong()))

	_, err = run(w.base, moody, w.admin.Secret)
	c.refuses("a wrong secret, "+agent, err, saying("invalid_client"))
	_, err = run(w.base, moody+"/forbidden", who.Secret)
	c.refuses("to go on after a 403, "+agent, err, saying("403"))
}

// A busyProxy has a copy of the service behind it whose issuer it is. It
// answers 503 to the first request for a token, and 429 to the second.
type busyProxy struct {
	asked atomic.Int32
	proxy atomic.Pointer[httputil.ReverseProxy]
}

func (b *busyProxy) open(ctx context.Context, w *world, front string) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	to := &url.URL{Scheme: "http", Host: "127.0.0.1:" + port}
	b.proxy.Store(httputil.NewSingleHostReverseProxy(to))
	return w.serve(ctx, "busy-"+port, port, w.environment("PORT="+port, "ISSUER="+front, "JWT_PRIVATE_KEY_FILE="+w.keyFile))
}

func (b *busyProxy) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/api/v1/token" {
		if status := map[int32]int{1: 503, 2: 429}[b.asked.Add(1)]; status != 0 {
			out.Header().Set("Content-Type", "application/json")
			out.Header().Set("Retry-After", "1")
			out.WriteHeader(status)
			io.WriteString(out, `{"error":"temporarily_unavailable","error_description":"Try again."}`)
			return
		}
	}
	b.proxy.Load().ServeHTTP(out, r)
}

// Two tokens: one to begin with, and one after the 401.
func (b *busyProxy) wrong() error {
	if n := b.asked.Load(); n != 4 {
		return fmt.Errorf("the token endpoint was asked %d times, want 4: 503, 429 and two tokens", n)
	}
	return nil
}

// A moodyService answers 401, 429, 503 and 200.
type moodyService struct {
	mu     sync.Mutex
	tokens []string
	times  []time.Time
}

func (m *moodyService) ServeHTTP(out http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/forbidden") {
		out.WriteHeader(403)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tokens = append(m.tokens, r.Header.Get("Authorization"))
	m.times = append(m.times, time.Now())
	moods := []int{401, 429, 503, 200}
	mood := moods[min(len(m.tokens), len(moods))-1]
	if mood == 429 || mood == 503 {
		out.Header().Set("Retry-After", "1")
	}
	out.WriteHeader(mood)
	io.WriteString(out, "done\n")
}

func (m *moodyService) wrong() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.tokens) != 4 {
		return fmt.Errorf("the service was asked %d times, want 4", len(m.tokens))
	}
	if m.tokens[0] == m.tokens[1] || m.tokens[1] != m.tokens[2] || m.tokens[2] != m.tokens[3] {
		return errors.New("want another token after the 401, and only then")
	}
	if waited := m.times[3].Sub(m.times[1]); waited < 2*time.Second {
		return fmt.Errorf("waited %v, want as long as Retry-After says: twice a second", waited)
	}
	return nil
}
