package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Where ANSWERS names a file, each distinct answer that a test of this package
// gets is a line of JSON there, once all tests have passed. acceptance/openapi
// holds them to openapi.yaml.
var answers = &answerLog{name: os.Getenv("ANSWERS"), seen: map[string]bool{}}

type answerLog struct {
	name string
	mu   sync.Mutex
	file *os.File // name with .part behind it
	seen map[string]bool
	err  error
}

// What differs from one answer to the next that is like it.
var (
	varies = regexp.MustCompile(`eyJ[\w-]+\.[\w-]+\.[\w-]+|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{16,64}|[0-9]+`)
	// What any server answers with.
	ofEveryServer = []string{"Connection", "Content-Length", "Content-Type", "Date", "Vary", "X-Content-Type-Options"}
)

func (l *answerLog) record(q *http.Request, a answer) {
	if l.name == "" || strings.Contains(a.raw, `"userAgent":"of another service"`) { // an event as ours are not
		return
	}
	if p := q.URL.Path; strings.Contains(p, "/tenants/") || strings.HasPrefix(p, "/api/api/") { // by an issuer's path, which the document doesn't have
		return
	}
	request, query := "", "" // what was accepted
	if a.status < 300 && q.GetBody != nil {
		body, err := q.GetBody()
		if err != nil {
			panic(err)
		}
		b, _ := io.ReadAll(body)
		request, query = string(b), q.URL.RawQuery
	}
	header := map[string][]string{}
	for name, values := range a.header {
		if !slices.Contains(ofEveryServer, name) && !strings.HasPrefix(name, "Access-Control-") {
			header[name] = values
		}
	}
	line, err := json.Marshal(map[string]any{
		"method": q.Method, "path": q.URL.EscapedPath(), "query": query, "requestType": q.Header.Get("Content-Type"), "request": request,
		"status": a.status, "type": a.header.Get("Content-Type"), "header": header, "body": a.raw,
	})
	key := varies.ReplaceAllString(string(line), "0")
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil && l.err == nil {
		l.file, l.err = os.Create(l.name + ".part")
	}
	if l.err = errors.Join(l.err, err); l.err == nil && !l.seen[key] {
		l.seen[key] = true
		_, l.err = l.file.Write(append(line, '\n'))
	}
}

// close makes the file appear under its name if all is well.
func (l *answerLog) close(good bool) error {
	if l.file == nil {
		return l.err
	}
	if err := errors.Join(l.err, l.file.Close()); err != nil || !good {
		return err
	}
	return os.Rename(l.name+".part", l.name)
}

// A documented is an operation of openapi.yaml.
type documented struct {
	success string // the first of its statuses
	public  bool
}

// operations reads the operations of openapi.yaml by its lines, and refuses
// whatever could be one that is written in another way. That the whole is good
// YAML, and good OpenAPI, acceptance/openapi sees to.
func operations(document string) (map[string]documented, error) {
	found := map[string]documented{}
	var (
		section  = regexp.MustCompile(`^([A-Za-z-]+):(.*)$`)
		pathLine = regexp.MustCompile(`^  (/[A-Za-z0-9/{}._-]*):$`)
		itemLine = regexp.MustCompile(`^    (parameters|get|post|put|patch|delete|head|options|trace):$`)
		status   = regexp.MustCompile(`^        '([0-9]{3})':`)
		within   = ""
		sections = map[string]bool{}
		path, op string
	)
	for i, line := range strings.Split(document, "\n") {
		bad := func() error { return fmt.Errorf("line %d is not as this test can read it: %q", i+1, line) }
		indent := len(line) - len(strings.TrimLeft(line, " "))
		switch text := strings.TrimSpace(line); {
		case text == "" || strings.HasPrefix(text, "#"):
		case strings.ContainsAny(line, "\t\r"):
			return nil, bad()
		case indent == 0:
			m := section.FindStringSubmatch(line)
			if m == nil || sections[m[1]] || m[1] == "paths" && m[2] != "" {
				return nil, bad()
			}
			if within == "paths" && op == "" {
				return nil, bad()
			}
			within = m[1]
			sections[within] = true
		case within != "paths" || indent > 8:
		case indent == 2:
			m := pathLine.FindStringSubmatch(line)
			if m == nil || path != "" && op == "" {
				return nil, bad()
			}
			path, op = m[1], ""
		case indent == 4:
			m := itemLine.FindStringSubmatch(line)
			if m == nil || path == "" {
				return nil, bad()
			}
			if m[1] == "parameters" {
				break
			}
			op = strings.ToUpper(m[1]) + " " + path
			if _, twice := found[op]; twice {
				return nil, bad()
			}
			found[op] = documented{}
		case indent == 6 && strings.HasPrefix(text, "- "): // a parameter of the path
		case indent == 6 && op != "":
			if d := found[op]; strings.HasPrefix(text, "security:") {
				d.public = text == "security: []"
				found[op] = d
			}
		case indent == 8 && op != "":
			if m := status.FindStringSubmatch(line); m != nil && found[op].success == "" {
				d := found[op]
				d.success = m[1]
				found[op] = d
			}
		default:
			return nil, bad()
		}
	}
	if op == "" {
		return nil, errors.New("there are no paths, or the last has no operation")
	}
	return found, nil
}

func TestOpenAPIHasEveryRoute(t *testing.T) {
	ops, err := operations(openAPI(t))
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\t\t\{"([A-Z]+ /[^"]*)", ([0-9]+), (public|s\.[a-z].*?), .*\},`).FindAllStringSubmatch(readFile(t, "main.go"), -1)
	for _, row := range rows {
		pattern, want := row[1], documented{row[2], row[3] == "public"}
		op, ok := ops[pattern]
		delete(ops, pattern)
		if pattern == "GET /api/v1/authorize" { // which never succeeds
			want.success = "400"
		}
		if !ok || op != want || want.public != slices.Contains(publicRoutes, pattern) {
			t.Errorf("openapi.yaml has %s: %v, as %+v, want %+v", pattern, ok, op, want)
		}
	}
	for pattern := range ops {
		t.Errorf("openapi.yaml has %s, which the code hasn't", pattern)
	}
}

// The reading of the document is not fooled by how that is written.
func TestOpenAPIIsReadStrictly(t *testing.T) {
	const good = "openapi: 3.1.1\npaths:\n  /a:\n    get:\n      security: []\n      responses:\n        '200': {}\n"
	if ops, err := operations(good); err != nil || ops["GET /a"] != (documented{"200", true}) || len(ops) != 1 {
		t.Fatalf("operations(%q) = %v, %v", good, ops, err)
	}
	for _, bad := range []string{
		good + "  /b: {get: {}}\n",
		good + "  '/b':\n    get:\n",
		good + "  ? /b\n  : get:\n",
		good + "  ? /b\n",
		good + "  <<: *other\n",
		good + "  /b: &b\n    get:\n",
		good + "  /b:\n",
		good + "    get:\n",
		good + "    post: {}\n",
		good + "    \"post\":\n",
		good + "    $ref: x\n",
		good + "    description: |\n",
		good + "   post:\n",
		good + "\t/b:\n",
		good + "paths:\n  /b:\n    get:\n",
		good + "---\npaths:\n  /b:\n    get:\n",
		good + "'paths':\n  /b:\n    get:\n",
		"openapi: 3.1.1\npaths: {/a: {get: {}}}\n",
		"{paths: {/a: {get: {}}}}\n",
	} {
		if ops, err := operations(bad); err == nil {
			t.Errorf("operations(%q) = %v, want an error", bad, ops)
		}
	}
}

// Every refusal that stands before the handlers is the same on every route. It
// makes sure, too, that each of them is recorded.
func TestEveryRouteRefusesInOneWay(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.quickClient("resumes:read")
	weak := v.mint(id, newID())
	limited := v.another("RATE_LIMIT_PER_MINUTE", "1")
	for _, window := range []string{byToken, toChange, ofOneself, byCredential, introspect + byToken, introspect + byCredential} { // which are full
		limited.rdb.Set(t.Context(), fmt.Sprintf("rate:%s%s:%d", window, limited.id, time.Now().Unix()/60), 100, time.Minute)
		limited.rdb.Set(t.Context(), fmt.Sprintf("rate:%s%s:%d", window, limited.id, time.Now().Unix()/60+1), 100, time.Minute)
	}
	v.want(v.do("POST", "/api/v1/tokens", ""), 404, "NOT_FOUND")
	v.want(v.do("POST", "/api/v1/token/x", ""), 404, "invalid_request")
	big := bytes.Repeat([]byte("x"), 70<<10)
	for _, rt := range routes(t) {
		method, path, _ := strings.Cut(rt.pattern, " ")
		path = strings.NewReplacer("{agentId}", v.id, "{credentialId}", newID(), "{eventId}", newID()).Replace(path)
		kind, body := "application/json", "{}"
		if rt.oauth {
			kind, body = formType, "grant_type=client_credentials&token=x"
		}
		if method == "GET" || method == "DELETE" {
			body = ""
		}
		call := func(v *service, status int, body string, header ...string) {
			t.Helper()
			if a := v.do(method, path, body, header...); a.status != status || a.code() == "" {
				t.Errorf("%s: answered %v, want %d", rt.pattern, a, status)
			}
		}
		bearer := []string{"Authorization", "Bearer " + v.bearer, "Content-Type", kind}
		call(v, 400, body, "Authorization", "Bearer "+v.bearer, "Authorization", "Bearer "+v.bearer, "Content-Type", kind)
		if slices.Contains(publicRoutes, rt.pattern) {
			continue
		}
		call(v, 401, body, "Content-Type", kind)
		if rt.oauth {
			basic := []string{"Content-Type", kind, "Authorization", basicAuth(v.id, v.secret)}
			call(v, 413, string(big), basic...)
			if path == "/api/v1/token/revoke" { // who shows its secret can always revoke
				call(limited, 429, body, bearer...)
			} else {
				call(limited, 429, body, basic...)
			}
			call(v, 400, body, "Authorization", basicAuth(id, secret), "Content-Type", "application/json")
		} else {
			call(v, 403, body, "Authorization", "Bearer "+weak, "Content-Type", kind)
			call(limited, 429, body, bearer...)
		}
		if !rt.oauth && body != "" {
			call(v, 413, string(big), bearer...)
			call(v, 415, body, "Authorization", "Bearer "+v.bearer, "Content-Type", "text/plain")
		}
	}
}

// publicRoutes are those that anybody may call. One more is a decision.
var publicRoutes = []string{
	"GET /api/v1/authorize", // which refuses everything
	"GET /.well-known/jwks.json",
	"GET /.well-known/oauth-authorization-server",
	"GET /.well-known/oauth-protected-resource",
	"GET /.well-known/openid-configuration",
	"GET /health",
	"GET /livez",
	"GET /openapi.yaml",
	"GET /readyz",
}

func TestEveryRouteAsksWhoCalls(t *testing.T) {
	t.Parallel()
	v := newService(t)
	wildcard := regexp.MustCompile(`\{[^}]*\}`)
	var found []string
	for _, rt := range routes(t) {
		method, path, _ := strings.Cut(rt.pattern, " ")
		path = wildcard.ReplaceAllString(path, newID())
		call := func(header ...string) answer {
			t.Helper()
			body := ""
			if method == "POST" && strings.HasPrefix(path, "/api/v1/token") {
				body = "grant_type=client_credentials&token=x"
				header = append(header, "Content-Type", "application/x-www-form-urlencoded")
			} else if method == "POST" || method == "PATCH" {
				body = "{}"
				header = append(header, "Content-Type", "application/json")
			}
			a := v.do(method, path, body, header...)
			if rt.pattern == "GET /openapi.yaml" { // the one that is for no program of ours
				if a.header.Get("Content-Type") != "application/yaml" || a.raw != openAPI(t) {
					t.Errorf("%s answers %v, want the document", rt.pattern, a)
				}
				return a
			}
			if kind := a.header.Get("Content-Type"); kind != "application/json" || a.body == nil {
				t.Errorf("%s answers %v as %q, want JSON", rt.pattern, a, kind)
			}
			return a
		}
		if slices.Contains(publicRoutes, rt.pattern) {
			found = append(found, rt.pattern)
			if a := call(); a.status == 401 {
				t.Errorf("%s answers %v, want it public", rt.pattern, a)
			}
			continue
		}
		for _, header := range [][]string{
			nil,
			{"Authorization", "Bearer x"},
			{"Authorization", "Basic eDp4"}, // x:x
			{"Authorization", "Digest x"},
		} {
			if a := call(header...); a.status != 401 || a.header.Get("WWW-Authenticate") == "" {
				t.Errorf("%s with %q answers %v and the challenge %q, want a 401 with one",
					rt.pattern, header, a, a.header.Get("WWW-Authenticate"))
			}
		}
		call("Authorization", "Bearer "+v.bearer) // is in JSON, too
	}
	if slices.Sort(found); !slices.Equal(found, slices.Sorted(slices.Values(publicRoutes))) {
		t.Errorf("the public routes are %q, want %q", found, publicRoutes)
	}
}
