package test

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"go/ast"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The page on tokens that only their holder can use: its programs in Go, whole, and what it says of refusals.

// buildPage builds the programs in Go of a page that have these names.
func buildPage(t testing.TB, page, binary, port string, names ...string) string {
	t.Helper()
	folder, text := t.TempDir(), readFile(t, "docs/developers/"+page)
	for _, name := range names {
		source := regexp.MustCompile("(?s)\n```go\n(// " + regexp.QuoteMeta(name) + "\n.*?)\n```\n").FindStringSubmatch(text)
		if source == nil {
			t.Fatalf("%s has no %s", page, name)
		}
		if lines := strings.Count(source[1], "\n") + 1; lines > 70 {
			t.Errorf("%s of %s has %d lines, want 70 at most", name, page, lines)
		}
		if err := os.WriteFile(filepath.Join(folder, name), []byte(strings.ReplaceAll(source[1], "8080", port)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	clone, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	build := regexp.MustCompile(`(?m)^    (go mod init .*)$`).FindStringSubmatch(readFile(t, "docs/developers/examples.md"))
	cmd := exec.Command("sh", "-euc", build[1]+"\ngo build -o "+binary+" .")
	cmd.Dir, cmd.Env = folder, append(os.Environ(), "CLONE="+clone, "GOPROXY=off", "GOFLAGS=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s of %s: %v: %s", names, page, err, out)
	}
	return filepath.Join(folder, binary)
}

// proves makes a proof that is right for a request but for these changes of its header and its claims, nil takes away.
func (h holder) proves(method, address, token string, header, claims members) string {
	hash := sha256.Sum256([]byte(token))
	head := members{"typ": "dpop+jwt", "alg": h.alg, "jwk": h.jwk.without("alg")}.with(header)
	says := members{"htm": method, "htu": address, "iat": time.Now().Unix(), "jti": rand.Text(), "ath": encode(string(hash[:]))}.with(claims)
	for _, m := range []members{head, says} {
		maps.DeleteFunc(m, func(_ string, value any) bool { return value == nil })
	}
	return h.sign(head, says)
}

// tokenOfHolder gets a token for a service, bound to a key.
func (v *service) tokenOfHolder(h holder, id, secret, scope, resource string) string {
	v.t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}, "resource": {resource}, "scope": {scope}, "client_id": {id}, "client_secret": {secret}}
	proof := h.proves("POST", v.url+"/api/v1/token", "", nil, members{"ath": nil})
	a := v.want(v.do("POST", "/api/v1/token", form.Encode(), "Content-Type", formType, "DPoP", proof), 200, "")
	if a.text("token_type") != "DPoP" {
		v.t.Fatalf("with a proof the answer is %v", a)
	}
	return a.text("access_token")
}

// The programs of the page: the agent in Go gets a token and uses it, and the service in Go lets nobody else do so.
func TestProofsPagePrograms(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.newClient("resumes:read", "scores:write")
	port := steadyPort(t)
	holderPath := buildPage(t, "proofs.md", "holder", port, "holder.go", "proof.go")
	cmd := exec.Command(buildPage(t, "proofs.md", "service", port, "service.go", "check.go", "once.go"))
	service := "http://localhost:" + port
	cmd.Env = []string{"BASE=" + v.url, "SERVICE=" + service}
	startProcess(t, cmd, syscall.SIGKILL)
	v.eventually("the service of proofs.md serves", func() bool {
		answer, err := http.Get(service + "/resumes")
		if err == nil {
			answer.Body.Close()
		}
		return err == nil
	})
	run := func() (string, error) {
		cmd := exec.Command(holderPath)
		cmd.Env = []string{"BASE=" + v.url, "SERVICE=" + service, "CLIENT_ID=" + id, "CLIENT_SECRET=" + secret}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for range 2 { // each with a key of its own
		if out, err := run(); err != nil || out != "two resumes for "+id+"\n" {
			t.Fatalf("the agent in Go of proofs.md prints %s, %v", out, err)
		}
	}

	h, thief := newHolder(t, "ES256"), newHolder(t, "ES256")
	bind := func(scope string) string { return v.tokenOfHolder(h, id, secret, scope, service) }
	token, other, narrow := bind("resumes:read"), bind("resumes:read"), bind("scores:write")
	plain := v.forService(id, secret, "resumes:read", service)
	here := service + "/resumes"
	ask := func(authorization string, proofs ...string) (int, string) {
		t.Helper()
		q, err := http.NewRequest("GET", here+"?page=2", nil)
		if err != nil {
			t.Fatal(err)
		}
		q.Header = http.Header{"Authorization": {authorization}, "Dpop": proofs, "X-Forwarded-Host": {"evil.example.com"}}
		q.Host = "evil.example.com" // which says nothing, in either way
		answer, err := testClient.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		if answer.StatusCode == 200 && string(body) != "two resumes for "+id+"\n" {
			t.Errorf("it answers 200 %q", body)
		}
		return answer.StatusCode, answer.Header.Get("WWW-Authenticate")
	}
	good := func(header, claims members) string { return h.proves("GET", here, token, header, claims) }
	now := time.Now().Unix()
	used := good(nil, nil)
	if status, challenge := ask("DPoP "+token, used); status != 200 {
		t.Fatalf("a good proof is answered %d %s", status, challenge)
	}
	const bad, invalid = `error="invalid_dpop_proof"`, `error="invalid_token"`
	for name, row := range map[string]struct {
		authorization string
		proofs        []string
		status        int
		challenge     string
	}{
		"another proof":                       {"DPoP " + token, []string{good(nil, nil)}, 200, ""},
		"a proof of an hour less":             {"DPoP " + token, []string{good(nil, members{"exp": now - 3600})}, 200, ""}, // exp is not looked at
		"iat of 50 s ago":                     {"DPoP " + token, []string{good(nil, members{"iat": now - 50})}, 200, ""},
		"a token that isn't bound, by Bearer": {"Bearer " + plain, nil, 200, ""},

		"a stolen token, by Bearer":                {"Bearer " + token, nil, 401, invalid},
		"the same, with a proof":                   {"Bearer " + token, []string{good(nil, nil)}, 401, invalid},
		"a stolen token, without a proof":          {"DPoP " + token, nil, 401, bad},
		"a stolen token, by the thief's key":       {"DPoP " + token, []string{thief.proves("GET", here, token, nil, nil)}, 401, bad},
		"the thief's signature, for the right key": {"DPoP " + token, []string{thief.proves("GET", here, token, members{"jwk": h.jwk.without("alg")}, nil)}, 401, bad},
		"a token that isn't bound, by DPoP":        {"DPoP " + plain, []string{h.proves("GET", here, plain, nil, nil)}, 401, invalid},
		"a replay":                                 {"DPoP " + token, []string{used}, 401, bad},
		"another method":                           {"DPoP " + token, []string{h.proves("POST", here, token, nil, nil)}, 401, bad},
		"another path":                             {"DPoP " + token, []string{h.proves("GET", here+"/1", token, nil, nil)}, 401, bad},
		"another host":                             {"DPoP " + token, []string{h.proves("GET", "http://evil.example.com/resumes", token, nil, nil)}, 401, bad},
		"another token":                            {"DPoP " + token, []string{h.proves("GET", here, other, nil, nil)}, 401, bad},
		"that for /token":                          {"DPoP " + token, []string{h.proves("POST", v.url+"/api/v1/token", "", nil, members{"ath": nil})}, 401, bad},
		"no ath":                                   {"DPoP " + token, []string{good(nil, members{"ath": nil})}, 401, bad},
		"no htm":                                   {"DPoP " + token, []string{good(nil, members{"htm": nil})}, 401, bad},
		"no htu":                                   {"DPoP " + token, []string{good(nil, members{"htu": nil})}, 401, bad},
		"no jti":                                   {"DPoP " + token, []string{good(nil, members{"jti": nil})}, 401, bad},
		"no iat":                                   {"DPoP " + token, []string{good(nil, members{"iat": nil})}, 401, bad},
		"iat as text":                              {"DPoP " + token, []string{good(nil, members{"iat": fmt.Sprint(now)})}, 401, bad},
		"iat of two minutes ago":                   {"DPoP " + token, []string{good(nil, members{"iat": now - 120})}, 401, bad},
		"iat of two minutes ahead":                 {"DPoP " + token, []string{good(nil, members{"iat": now + 120})}, 401, bad},
		"typ JWT":                                  {"DPoP " + token, []string{good(members{"typ": "JWT"}, nil)}, 401, bad},
		"no typ":                                   {"DPoP " + token, []string{good(members{"typ": nil}, nil)}, 401, bad},
		"alg none":                                 {"DPoP " + token, []string{good(members{"alg": "none"}, nil)}, 401, bad},
		"alg HS256":                                {"DPoP " + token, []string{good(members{"alg": "HS256"}, nil)}, 401, bad},
		"crit":                                     {"DPoP " + token, []string{good(members{"crit": []string{"exp"}}, nil)}, 401, bad},
		"no key":                                   {"DPoP " + token, []string{good(members{"jwk": nil}, nil)}, 401, bad},
		"the private key":                          {"DPoP " + token, []string{good(members{"jwk": h.jwk.without("alg").with(members{"d": "AQAB"})}, nil)}, 401, bad},
		"no signature":                             {"DPoP " + token, []string{used[:strings.LastIndex(used, ".")+1]}, 401, bad},
		"another payload":                          {"DPoP " + token, []string{swap(good(nil, nil), good(nil, nil))}, 401, bad},
		"the token as proof":                       {"DPoP " + token, []string{token}, 401, bad},
		"two proofs":                               {"DPoP " + token, []string{good(nil, nil), good(nil, nil)}, 401, bad},
		"two in one header":                        {"DPoP " + token, []string{good(nil, nil) + ", " + good(nil, nil)}, 401, bad},
		"an empty one":                             {"DPoP " + token, []string{""}, 401, bad},
		"a proof, and no token":                    {"DPoP", []string{good(nil, nil)}, 401, invalid},
		"without the scope":                        {"DPoP " + narrow, []string{h.proves("GET", here, narrow, nil, nil)}, 403, `error="insufficient_scope"`},
	} {
		status, challenge := ask(row.authorization, row.proofs...)
		if status != row.status || !strings.Contains(challenge, row.challenge) || row.challenge != "" && !strings.HasPrefix(challenge, "DPoP ") {
			t.Errorf("%s: it answers %d %s, want %d %s", name, status, challenge, row.status, row.challenge)
		}
	}
}

// swap is the first with the payload of the second.
func swap(first, second string) string {
	parts := strings.Split(first, ".")
	parts[1] = strings.Split(second, ".")[1]
	return strings.Join(parts, ".")
}

// What is said of a proof that isn't right stands in proofs.md, and nothing else does.
func TestProofsPageHasEveryRefusal(t *testing.T) {
	_, table, _ := strings.Cut(readFile(t, "docs/developers/proofs.md"), "\n## What is refused\n")
	table, _, _ = strings.Cut(table, "\n## ")
	var said []string
	for _, row := range regexp.MustCompile("(?m)^\\| `(?:… )?(.*?)` \\|").FindAllStringSubmatch(table, -1) {
		said = append(said, row[1])
	}
	verbs := regexp.MustCompile(`%(\\\.)?[0-9]*[a-z]`) // as QuoteMeta has them
	var like func(e ast.Expr) string                   // what the source says, where anything may stand for a variable
	like = func(e ast.Expr) string {
		if sum, ok := e.(*ast.BinaryExpr); ok {
			return like(sum.X) + like(sum.Y)
		}
		if call, ok := e.(*ast.CallExpr); ok && len(call.Args) > 0 && literal(call.Args[0]) != "" { // Sprintf
			return verbs.ReplaceAllString(regexp.QuoteMeta(literal(call.Args[0])), ".+")
		}
		if text := literal(e); text != "" {
			return regexp.QuoteMeta(text)
		}
		return ".+"
	}
	var source []*regexp.Regexp
	for _, file := range goFiles(t, false) {
		for _, declared := range file.Decls {
			f, isFunc := declared.(*ast.FuncDecl)
			if file.name != "dpop.go" && file.name != "exchange.go" && (file.name != "jwk.go" || isFunc && f.Name.Name != "readAssertion") {
				continue
			}
			ast.Inspect(declared, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				of, _ := call.Fun.(*ast.SelectorExpr)
				name, _ := call.Fun.(*ast.Ident)
				if name != nil && name.Name == "flaw" || of != nil && of.Sel.Name == "because" && file.name == "dpop.go" {
					if text := like(call.Args[0]); !strings.Contains(text, "The DPoP proof") { // which a flaw is put behind
						source = append(source, regexp.MustCompile("^"+strings.ReplaceAll(text, ".+.+", ".+")+"$"))
					}
				}
				return true
			})
		}
	}
	wantRefusals(t, "proofs.md", source, said)
}

// A proof is good once on all copies, also where they have no Redis; between the two it is remembered by one alone, as
// proofs.md says. What is refused as wrong is not used up.
func TestProofIsGoodOnceOnAllCopies(t *testing.T) {
	t.Parallel()
	v := newService(t)
	proxy := newProxy(t, v.rdb.Options().Network, v.rdb.Options().Addr)
	proxy.set(refusing)
	without := func() *service {
		return v.another("REDIS_URL", fmt.Sprintf("redis://%s/%d", proxy.listener.Addr(), v.rdb.Options().DB))
	}
	id, secret := v.newClient(agentsRead)
	h, base := newHolder(t, "ES256"), v.env["ISSUER"]+"/api/v1"
	form := url.Values{"grant_type": {"client_credentials"}, "client_id": {id}, "client_secret": {secret}}.Encode()
	ask := func(c *service, proof string) answer {
		return c.do("POST", "/api/v1/token", form, "Content-Type", formType, "DPoP", proof)
	}
	proof := func(claims members) string {
		return h.proves("POST", base+"/token", "", nil, members{"ath": nil}.with(claims))
	}
	token := v.want(ask(v, proof(nil)), 200, "").text("access_token")
	use := func(c *service, proof string) answer {
		return c.do("GET", "/api/v1/agents", "", "Authorization", "DPoP "+token, "DPoP", proof)
	}
	again := func(a answer, status int) {
		t.Helper()
		said := a.text("error_description") + a.header.Get("WWW-Authenticate")
		if a.status != status || !strings.Contains(said, "The DPoP proof was used before; each needs a jti of its own.") {
			t.Errorf("a proof once more is answered %v", a)
		}
	}
	copies := map[string][]*service{"Redis": {v, v.another()}, "no Redis": {without(), without()}}
	for name, of := range copies {
		t.Run(name, func(t *testing.T) {
			for i, first := range of {
				asked, used := proof(nil), h.proves("GET", base+"/agents", token, nil, nil)
				v.want(ask(first, asked), 200, "")
				v.want(use(first, used), 200, "")
				for _, then := range of {
					again(ask(then, asked), 400)
					again(use(then, used), 401)
				}
				jti := fmt.Sprint(name, i)
				v.want(ask(first, proof(members{"jti": jti, "htm": "GET"})), 400, "invalid_dpop_proof")
				v.want(ask(first, proof(members{"jti": jti, "iat": 1})), 400, "invalid_dpop_proof")
				v.want(ask(first, proof(members{"jti": jti})), 200, "")
				again(ask(first, proof(members{"jti": jti})), 400)
				thief := newHolder(t, "ES256") // whose jti is another's
				v.want(ask(first, thief.proves("POST", base+"/token", "", nil, members{"ath": nil, "jti": jti})), 200, "")
			}
		})
	}
	one, other := copies["Redis"][0], copies["no Redis"][0]
	for _, pair := range [][2]*service{{one, other}, {other, one}} {
		asked := proof(nil)
		for _, c := range pair {
			v.want(ask(c, asked), 200, "")
			again(ask(c, asked), 400)
		}
	}
}
