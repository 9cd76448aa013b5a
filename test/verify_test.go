package test

import (
	"go/parser"
	"go/token"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The module for services, verify/, as examples.md uses it, against the program.
// What it makes of other issuers is in its own tests.

func TestVerifyIsSmallAndNeedsNothing(t *testing.T) {
	names, err := filepath.Glob("verify/*.go")
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text := readFile(t, name)
		lines += strings.Count(text, "\n")
		file, err := parser.ParseFile(token.NewFileSet(), name, text, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range file.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value)
			if first, _, _ := strings.Cut(imported, "/"); strings.Contains(first, ".") || first == "agentidp" {
				t.Errorf("%s imports %s, want the standard library alone", name, imported)
			}
		}
	}
	if lines == 0 || lines >= 275 {
		t.Errorf("verify/ has %d lines, want less than 275, which who uses it reads", lines)
	}
	version := regexp.MustCompile(`(?m)^go .*$`).FindString(readFile(t, "go.mod"))
	if got, want := readFile(t, "verify/go.mod"), "module agentidp/verify\n\n"+version+"\n"; got != want {
		t.Errorf("verify/go.mod is %q, want %q", got, want)
	}
}

// An exampleService is the service in Go of examples.md.
type exampleService struct {
	*process
	t    testing.TB
	path string
	url  string
}

// newExampleService builds it as the page says, without anything from elsewhere.
func newExampleService(t testing.TB) *exampleService {
	t.Helper()
	page := readFile(t, "docs/developers/examples.md")
	source := regexp.MustCompile("(?s)\n```go\n(// service.go\n.*?)\n```\n").FindStringSubmatch(page)
	build := regexp.MustCompile(`(?m)^    (go mod init .*)$`).FindStringSubmatch(page)
	if source == nil || build == nil {
		t.Fatal("examples.md has no service in Go, or doesn't say how it is built")
	}
	port, folder := steadyPort(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "service.go"), []byte(strings.Replace(source[1], "8080", port, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	clone, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-euc", build[1]+"\ngo build -o service service.go")
	cmd.Dir, cmd.Env = folder, append(os.Environ(), "CLONE="+clone, "GOPROXY=off", "GOFLAGS=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the service in Go of examples.md: %v: %s", err, out)
	}
	return &exampleService{t: t, path: filepath.Join(folder, "service"), url: "http://localhost:" + port}
}

// start starts one for the tokens of an issuer.
func (e *exampleService) start(t testing.TB, issuer string) *exampleService {
	t.Helper()
	cmd := exec.Command(e.path)
	cmd.Env = []string{"BASE=" + issuer, "SERVICE=" + e.url}
	started := &exampleService{startProcess(t, cmd, syscall.SIGKILL), t, e.path, e.url}
	started.eventually("the service of examples.md serves", func() bool {
		answer, err := http.Get(e.url + "/resumes")
		if err == nil {
			answer.Body.Close()
		}
		return err == nil
	})
	return started
}

// ask shows it a token, "" for none.
func (e *exampleService) ask(token string) (status int, challenge, body string) {
	e.t.Helper()
	q, err := http.NewRequest("GET", e.url+"/resumes", nil)
	if err != nil {
		e.t.Fatal(err)
	}
	if token != "" {
		q.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := testClient.Do(q)
	if err != nil {
		e.t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	return response.StatusCode, response.Header.Get("WWW-Authenticate"), string(text)
}

// want fails the test where it answers another status, or a challenge without these
// words.
func (e *exampleService) want(name, token string, status int, words string) {
	e.t.Helper()
	got, challenge, body := e.ask(token)
	if got != status || !strings.Contains(challenge, words) || (challenge == "") != (words == "") {
		e.t.Errorf("%s: it answers %d, %q, %s; want %d and %q", name, got, challenge, body, status, words)
	}
}

// forService gets a token for these resources.
func (v *service) forService(id, secret, scope string, resources ...string) string {
	v.t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}, "scope": {scope}, "resource": resources}
	return v.want(v.form(id, secret, "", form.Encode()), 200, "").text("access_token")
}

func TestVerifyLetsInWhoMay(t *testing.T) {
	t.Parallel()
	example := newExampleService(t)
	for alg, pair := range keyPairs {
		t.Run(alg, func(t *testing.T) {
			v := newService(t, "JWT_PRIVATE_KEY", pair[0]())
			e := example.start(t, v.url)
			id, secret := v.newClient("resumes:read", "scores:write")
			good := v.forService(id, secret, "resumes:read", e.url)
			if status, _, body := e.ask(good); status != 200 || body != "two resumes for "+id+"\n" {
				t.Errorf("it answers a good token %d %q", status, body)
			}
			all, allSecret := v.newClient("resumes:*")
			e.want("resumes:*", v.forService(all, allSecret, "", e.url), 200, "")
			e.want("several audiences", v.forService(id, secret, "", "https://other.example.com", e.url), 200, "")
			e.want("no token", "", 401, `Bearer realm="`+e.url+`"`)
			const invalid = `error="invalid_token", error_description="The token is for another service`
			e.want("another service", v.forService(id, secret, "", "https://other.example.com"), 401, invalid)
			e.want("the issuer itself", v.token(id, secret, ""), 401, invalid)
			e.want("a token that is bound to a key", v.tokenOfHolder(newHolder(t, "ES256"), id, secret, "resumes:read", e.url), 401,
				`error="invalid_token", error_description="The token is bound to a key, which this service doesn't check`)
			e.want("another scope", v.forService(id, secret, "scores:write", e.url), 403, `error="insufficient_scope", scope="resumes:read"`)
			a := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, "")
			e.want("a checkpoint", a.text("checkpoint"), 401, `error="invalid_token"`)

			// Nothing tells it of a revocation, which its documentation says.
			v.want(v.form(id, secret, "/revoke", "token="+good), 200, "")
			e.want("a revoked token", good, 200, "")
			refuseByVerify(t, v, e, good)
		})
	}
}

// unlikeOurs are tokens that AgentIdP refuses because it never writes them so, and
// that RFC 7515 and RFC 7519 let pass. Only who has its key can sign them; and of
// those without a scope in the right form none is good for any.
var unlikeOurs = []string{
	"alg twice", "an unknown claim", "claims in another order", "deep", "escaped name", "exp 1e10", "exp 9e18", "exp twice",
	"exp with a fraction", "half a surrogate", "header in another order", "invalid UTF-8", "jku", "jwk", "kid twice", "newline after",
	"no credential_id", "no scope", "no secret_id", "scope as array", "scope once more as Scope", "scope twice", "space before",
	"space in header", "x5c", "x5u", "zip",
}

func refuseByVerify(t *testing.T, v *service, e *exampleService, good string) {
	t.Helper()
	tried := 0
	var passed []string
	for _, bad := range badTokens(t, privateKey(t, v.env["JWT_PRIVATE_KEY"]), good, time.Now()) {
		// Neither Go's client nor a server lets control characters into a header.
		if strings.ContainsAny(bad.token, "\r\n\x00") || bad.token == "" || bad.name == "space before the token" {
			continue
		}
		status, challenge, body := e.ask(bad.token)
		if tried++; status == 200 || status == 403 {
			passed = append(passed, bad.name)
		} else if status != 401 || !strings.Contains(challenge, `error="invalid_token"`) {
			t.Errorf("%s: it answers %d, %q, %s", bad.name, status, challenge, body)
		}
	}
	slices.Sort(passed)
	if !slices.Equal(passed, unlikeOurs) || tried < 150 {
		t.Errorf("of %d bad tokens it accepts %q, want %q", tried, passed, unlikeOurs)
	}
}

func TestVerifyFollowsTheKeys(t *testing.T) {
	t.Parallel()
	files := newKeyFiles(t, testKey(), publicPEM(t, secondKey()))
	p := newProgram(t, newDatabase(t), newRedis(t), files.env("ISSUER", "")...)
	e := newExampleService(t).start(t, p.url)
	id, secret := p.newClient("resumes:read")
	turn := func(private, public string, signs string) string {
		t.Helper()
		files.set(private, public)
		p.hangup()
		token := p.forService(id, secret, "", e.url)
		if kid := kidOf(t, token); kid != kidsOf(t, signs)[0] {
			t.Fatalf("the key %s signs, which is another", kid)
		}
		return token
	}
	old := turn(testKey(), publicPEM(t, secondKey()), testKey())
	e.want("the first key", old, 200, "")

	// The next has been published before it signs, so nobody is refused.
	next := turn(secondKey(), publicPEM(t, testKey()), secondKey())
	e.want("the next key", next, 200, "")
	e.want("the last key", old, 200, "")

	// After a break-in the new key signs at once, and the others are dropped. The
	// keys are fetched anew once in 5 s at most.
	urgent := turn(ellipticKey(), "", ellipticKey())
	e.eventually("a key is accepted that was not published before", func() bool { status, _, _ := e.ask(urgent); return status == 200 })
	e.want("a dropped key", next, 401, `error="invalid_token", error_description="The issuer publishes no key`)
	e.want("another dropped key", old, 401, `error="invalid_token"`)

	// Without the program it goes on with the keys that it has.
	p.kill()
	e.want("without the issuer", urgent, 200, "")
	unknown := strings.Replace(urgent, ".", "x.", 1)
	other := sign(t, thirdKey(), accessToken, claims{})
	e.eventually("a key that can't be fetched is no fault of the token", func() bool { status, _, _ := e.ask(other); return status == 503 })
	e.want("without the issuer", urgent, 200, "")
	e.want("a changed header", unknown, 401, `error="invalid_token"`)
	select {
	case <-e.exited:
		t.Errorf("the service has ended: %v", e.err)
	default:
	}
}

func (e *exampleService) eventually(what string, done func() bool) {
	e.t.Helper()
	(&service{t: e.t}).eventually(what, done)
}
