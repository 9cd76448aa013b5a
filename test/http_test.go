package test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// raw sends a request as it stands, which Go's client would tidy up, and reads
// the answer to it.
func (v *service) raw(text string) answer {
	v.t.Helper()
	conn := v.dial()
	defer conn.Close()
	go io.WriteString(conn, text) // may be answered before it is read to its end
	return v.readAnswer(conn)
}

func (v *service) dial() net.Conn {
	v.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(v.url, "http://"))
	if err != nil {
		v.t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func (v *service) readAnswer(conn net.Conn) answer {
	v.t.Helper()
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		v.t.Fatalf("no answer: %v", err)
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	a := answer{status: response.StatusCode, header: response.Header, raw: string(text)}
	_ = json.Unmarshal(text, &a.body)
	return a
}

const formType = "application/x-www-form-urlencoded"

// wantForm wants an error in the form of its path: a client reads either code
// and message, or error and error_description (RFC 6749, section 5.2).
func wantForm(t *testing.T, a answer, oauth bool) {
	t.Helper()
	names := []string{"code", "message"}
	if oauth {
		names = []string{"error", "error_description"}
	}
	if a.header.Get("Content-Type") != "application/json" || a.text(names[0]) == "" || a.text(names[1]) == "" {
		t.Errorf("answered %v as %q, want JSON with %v", a, a.header.Get("Content-Type"), names)
	}
}

// Go's mux would send a POST with a secret in it on to a clean path, with a 307.
func TestUncleanPathIsNotFoundAndNeverRedirected(t *testing.T) {
	t.Parallel()
	v := newService(t)
	agent := "/api/v1/agents/" + v.id
	body := "grant_type=client_credentials&client_id=" + v.id + "&client_secret=" + v.secret
	for _, path := range []string{
		"//", "/", "//api/v1/token", "/api//v1/token", "/api/v1//token", "/./api/v1/token", "/api/v1/./token",
		"/api/v1/x/../token", "/../api/v1/token", "/api/v1/token/", "/api/v1/token/.", "/api/v1/token/..",
		"/api/v1/token//introspect", "/api%2Fv1%2Ftoken", "/api/v1%2ftoken", "/api/v1/%2e%2e/v1/token", "/api/v1/%74oken",
		"/api/v1/%2e/token", "/api/v1/token%00", "/api/v1/token%0d%0aX-Evil:%20yes", "/api/v1/token;x=y", "/api/v1/token%3fx",
		"/api/v1/token%20", "/api/v1/TOKEN", "/API/v1/token", "/token", "/api/v2/token", "/api/v1/tokens", "/api/v1/token%ff",
		"/api/v1/t\xc3\xb6ken", "/api/v1/agents/", agent + "/", agent + "%00", agent + "%2Fcredentials", agent + "/../" + v.id,
		"/api/v1/agents/%2e%2e/audit", "/api/v1/agents/..%2faudit", "/api/v1\\token", "/.well-known/", "/.well-known//jwks.json",
		"http://127.0.0.1//api/v1/token", "/" + strings.Repeat("a", 4000),
	} {
		for _, method := range []string{"POST", "GET", "DELETE"} {
			a := v.raw(fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s",
				method, path, v.bearer, formType, len(body), body))
			if a.status != 404 || a.header.Get("Location") != "" || a.header.Get("X-Evil") != "" {
				t.Errorf("%s %.80q = %v, want 404", method, path, a)
			}
			wantForm(t, a, path == "/api/v1/token" || strings.HasPrefix(path, "/api/v1/token/"))
		}
	}
	if a := v.api(v.bearer, "GET", "/agents/"+v.id, ""); a.text("status") != "active" {
		t.Errorf("after all that, the agent is %v", a)
	}
	// What isn't even a URL, net/http answers, and it must not be a redirect.
	for _, path := range []string{"/api/v1/%zz", "/api/v1/a b", "api/v1/token", ""} {
		if a := v.raw("POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"); a.status != 400 {
			t.Errorf("POST %q = %v, want 400", path, a)
		}
	}
}

func TestOtherMethodsAreRefusedWithThoseAllowed(t *testing.T) {
	t.Parallel()
	v := newService(t)
	wildcard := regexp.MustCompile(`\{[^}]*\}`)
	allowed := map[string][]string{}
	for _, rt := range routes(t) {
		method, path, _ := strings.Cut(rt.pattern, " ")
		allowed[path] = append(allowed[path], method)
		if method == "GET" {
			allowed[path] = append(allowed[path], "HEAD")
		}
	}
	for path, methods := range allowed {
		slices.Sort(methods)
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get"} {
			if slices.Contains(methods, method) {
				continue
			}
			a := v.do(method, wildcard.ReplaceAllString(path, v.id), "", "Authorization", "Bearer "+v.bearer)
			got := strings.Split(a.header.Get("Allow"), ", ")
			if slices.Sort(got); a.status != 405 || !slices.Equal(got, methods) {
				t.Errorf("%s %s = %v allowing %q, want 405 allowing %q", method, path, a, got, methods)
			}
			if method != "HEAD" {
				wantForm(t, a, path == "/api/v1/token" || strings.HasPrefix(path, "/api/v1/token/"))
			}
		}
	}
	for _, text := range []string{
		"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
		"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
	} {
		if a := v.raw(text); a.status != 404 && a.status != 405 || a.code() == "" {
			t.Errorf("%q = %v, want 404 or 405 in JSON", text, a)
		}
	}
	// HEAD is GET without a body (RFC 9110, section 9.3.2), so it asks the same.
	for path, want := range map[string]int{"/health": 200, "/api/v1/agents": 401, "/api/v1/audit": 401} {
		if a := v.do("HEAD", path, ""); a.status != want || a.raw != "" {
			t.Errorf("HEAD %s = %v, want %d without a body", path, a, want)
		}
	}
	// What claims to be another method than it is stays what it is.
	id := v.newAgent("resumes:read")
	for _, name := range []string{"X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"} {
		a := v.do("GET", "/api/v1/agents/"+id+"?_method=DELETE", "", "Authorization", "Bearer "+v.bearer, name, "DELETE")
		if a.text("status") != "active" {
			t.Errorf("a GET with %s: DELETE = %v, want the active agent", name, a)
		}
		a = v.do("POST", "/api/v1/agents/"+id, "_method=DELETE", "Authorization", "Bearer "+v.bearer, name, "DELETE",
			"Content-Type", formType)
		v.want(a, 405, "METHOD_NOT_ALLOWED")
	}
	v.want(v.api(v.bearer, "GET", "/agents/"+id, ""), 200, "")
}

func TestOversizeRequestIsRefused(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for bytes, want := range map[int]int{14 << 10: 200, 18 << 10: 431, 1 << 20: 431} {
		a := v.raw("GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("a", bytes) + "\r\n\r\n")
		if a.status != want {
			t.Errorf("a header of %d bytes = %d, want %d", bytes, a.status, want)
		}
	}
	const limit = 16 << 10
	pad := func(prefix, suffix string, size int) string {
		return prefix + strings.Repeat("a", size-len(prefix)-len(suffix)) + suffix
	}
	form := "grant_type=client_credentials&client_id=" + v.id + "&client_secret=" + v.secret + "&token=x&extra="
	for _, row := range []struct {
		path, kind, prefix, suffix string
		fits                       int    // the status of what is just small enough
		code                       string // of what isn't
	}{
		{"/api/v1/agents", "application/json", `{"owner":"`, `"}`, 400, "PAYLOAD_TOO_LARGE"},
		{"/api/v1/agents/" + v.id + "/credentials", "application/json", `{"x":"`, `"}`, 400, "PAYLOAD_TOO_LARGE"},
		{"/api/v1/token", formType, form, "", 200, "invalid_request"},
		{"/api/v1/token/introspect", formType, form, "", 200, "invalid_request"},
		{"/api/v1/token/revoke", formType, form, "", 200, "invalid_request"},
	} {
		send := func(body io.Reader) answer {
			t.Helper()
			q, err := http.NewRequest("POST", v.url+row.path, body)
			if err != nil {
				t.Fatal(err)
			}
			q.Header.Set("Content-Type", row.kind)
			if row.kind != formType {
				q.Header.Set("Authorization", "Bearer "+v.bearer)
			}
			return v.send(q)
		}
		if a := send(strings.NewReader(pad(row.prefix, row.suffix, limit))); a.status != row.fits {
			t.Errorf("%s with 16 kB = %v, want %d", row.path, a, row.fits)
		}
		big := pad(row.prefix, row.suffix, limit+1)
		v.want(send(strings.NewReader(big)), 413, row.code)
		v.want(send(io.MultiReader(strings.NewReader(big))), 413, row.code) // chunked: of no stated length
	}
}

func TestRequestIDIsEchoedAndRecorded(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for sent, echoed := range map[string]bool{
		"abc.DEF_0-9": true, strings.Repeat("a", 64): true, strings.Repeat("a", 65): false, "": false,
		"a b": false, "a\tb": false, `a"b`: false, "a;b": false, "\xc3\xb6": false, "../x": false, "{}": false,
	} {
		a := v.do("POST", "/api/v1/token/introspect", "token=x", "Content-Type", formType,
			"Authorization", "Bearer "+v.bearer, "X-Request-Id", sent)
		v.want(a, 200, "")
		id := a.header.Get("X-Request-Id")
		if echoed && id != sent || !echoed && !regexp.MustCompile(`^[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(id) {
			t.Errorf("X-Request-Id %q came back as %q, want it echoed: %v", sent, id, echoed)
		}
		if line := v.logged(id); line["route"] != "POST /api/v1/token/introspect" || line["status"] != 200.0 ||
			line["clientId"] != v.id || line["ip"] != "127.0.0.1" {
			t.Errorf("the log has of %q %v, want its route, status, client and address", id, line)
		}
		var n int
		if err := v.db.QueryRow(t.Context(), `select count(*) from audit_events where metadata->>'requestId' = $1`, id).Scan(&n); err != nil || n != 1 {
			t.Errorf("the audit log has %d events (%v) of %q, want 1", n, err, id)
		}
	}
	a := v.do("GET", "/nothing", "", "X-Request-Id", "of.an.error")
	if id := a.header.Get("X-Request-Id"); id != "of.an.error" {
		t.Errorf("X-Request-Id of a 404 = %q, want it echoed", id)
	}
}

// logged returns the one line of the log that ends a request.
func (v *service) logged(requestID string) (line map[string]any) {
	v.t.Helper()
	v.eventually("request "+requestID+" is logged", func() bool {
		for text := range strings.Lines(testLog.String()) {
			var fields map[string]any
			if strings.Contains(text, requestID) && json.Unmarshal([]byte(text), &fields) == nil && (fields["msg"] == "request" || fields["msg"] == "check") && fields["requestId"] == requestID {
				line = fields
			}
		}
		return line != nil
	})
	return line
}

// RFC 6750, section 3.
func TestBearerTokenIsAskedForAsTheRFCSays(t *testing.T) {
	t.Parallel()
	v := newService(t)
	weak := v.mint(v.newAgent("resumes:read"), newID())
	none := `Bearer realm="agentidp", resource_metadata="` + v.url + `/.well-known/oauth-protected-resource"`
	for _, row := range []struct {
		name, path  string
		header      []string
		status      int
		code        string
		challenge   string // the whole of WWW-Authenticate, or what it has to hold
		description bool
	}{
		{"no credentials", "/agents", nil, 401, "UNAUTHORIZED", none, false},
		{"in the query", "/agents?access_token=" + v.bearer, nil, 401, "UNAUTHORIZED", none, false},
		{"Basic", "/agents", []string{"Authorization", "Basic eDp4"}, 401, "UNAUTHORIZED", none, false},
		{"no token", "/agents", []string{"Authorization", "Bearer"}, 401, "UNAUTHORIZED", `error="invalid_token"`, true},
		{"no scheme", "/agents", []string{"Authorization", v.bearer}, 401, "UNAUTHORIZED", none, false},
		{"garbage", "/agents", []string{"Authorization", "Bearer x.y.z"}, 401, "UNAUTHORIZED", `error="invalid_token"`, true},
		{"missing scope", "/agents", []string{"Authorization", "Bearer " + weak}, 403, "FORBIDDEN", `error="insufficient_scope"`, true},
		{"which scope", "/audit", []string{"Authorization", "Bearer " + weak}, 403, "FORBIDDEN", `scope="audit:read"`, true},
		{"scheme in any case", "/agents", []string{"Authorization", "bEARER " + v.bearer}, 200, "", "", false},
		{"good", "/agents", []string{"Authorization", "Bearer " + v.bearer}, 200, "", "", false},
		{"two headers, both right", "/agents", []string{"Authorization", "Bearer " + v.bearer, "Authorization", "Bearer " + v.bearer}, 400, "VALIDATION_ERROR", "", false},
		{"two headers, one wrong", "/agents", []string{"Authorization", "Bearer " + v.bearer, "Authorization", "Basic eDp4"}, 400, "VALIDATION_ERROR", "", false},
		{"two in one header", "/agents", []string{"Authorization", "Bearer " + v.bearer + ", Bearer " + v.bearer}, 401, "UNAUTHORIZED", `error="invalid_token"`, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			a := v.do("GET", "/api/v1"+row.path, "", row.header...)
			if a.status != row.status || a.code() != row.code {
				t.Errorf("answered %v, want %d %s", a, row.status, row.code)
			}
			challenge := a.header.Get("WWW-Authenticate")
			if row.challenge == none && challenge != none || !strings.Contains(challenge, row.challenge) || row.challenge == "" && challenge != "" {
				t.Errorf("challenged with %q, want %q", challenge, row.challenge)
			}
			if row.description != strings.Contains(challenge, "error_description=") {
				t.Errorf("challenged with %q, want a description: %v", challenge, row.description)
			}
		})
	}
	// At a token endpoint, errors have the other form, and two headers are no better.
	a := v.do("POST", "/api/v1/token/introspect", "token=x", "Content-Type", formType,
		"Authorization", "Bearer "+v.bearer, "Authorization", "Bearer "+v.bearer)
	v.want(a, 400, "invalid_request")
	a = v.do("POST", "/api/v1/token/introspect", "token=x&access_token="+v.bearer, "Content-Type", formType)
	v.want(a, 401, "invalid_client")
	if a := v.do("POST", "/api/v1/token/introspect", "token=x", "Content-Type", formType, "Authorization", "Bearer "+weak); a.status != 403 ||
		a.code() != "insufficient_scope" || !strings.Contains(a.header.Get("WWW-Authenticate"), `scope="tokens:read"`) {
		t.Errorf("introspection without tokens:read = %v, want 403 that names it", a)
	}
}

func TestBrowsersMayCallOnlyFromTheirOrigin(t *testing.T) {
	t.Parallel()
	const origin = "https://console.example.com"
	off := newService(t)
	on := off.another("CORS_ORIGIN", origin)
	preflight := []string{"Access-Control-Request-Method", "PATCH", "Access-Control-Request-Headers", "authorization"}
	for _, row := range []struct {
		name, method, path, origin string
		v                          *service
		preflight                  bool
		status                     int
		allowed                    string
	}{
		{"off", "GET", "/health", origin, off, false, 200, ""},
		{"off, preflight", "OPTIONS", "/api/v1/agents", origin, off, true, 405, ""},
		{"on", "GET", "/health", origin, on, false, 200, origin},
		{"errors too", "GET", "/api/v1/agents", origin, on, false, 401, origin},
		{"no origin", "GET", "/health", "", on, false, 200, ""},
		{"another origin", "GET", "/health", "https://evil.example.com", on, false, 200, ""},
		{"a longer origin", "GET", "/health", origin + ".evil.example", on, false, 200, ""},
		{"null", "GET", "/health", "null", on, false, 200, ""},
		{"other case", "GET", "/health", "https://CONSOLE.example.com", on, false, 200, ""},
		{"preflight", "OPTIONS", "/api/v1/agents", origin, on, true, 204, origin},
		{"preflight of another origin", "OPTIONS", "/api/v1/agents", "https://evil.example.com", on, true, 405, ""},
		{"OPTIONS that is no preflight", "OPTIONS", "/api/v1/agents", origin, on, false, 405, origin},
	} {
		t.Run(row.name, func(t *testing.T) {
			var header []string
			if row.origin != "" {
				header = append(header, "Origin", row.origin)
			}
			if row.preflight {
				header = append(header, preflight...)
			}
			a := row.v.do(row.method, row.path, "", header...)
			if got := a.header.Get("Access-Control-Allow-Origin"); a.status != row.status || got != row.allowed {
				t.Errorf("answered %v allowing %q, want %d allowing %q", a, got, row.status, row.allowed)
			}
			if got := a.header.Get("Access-Control-Allow-Credentials"); got != "" {
				t.Errorf("allows credentials: %q", got)
			}
			if got := a.header.Get("Access-Control-Expose-Headers"); row.allowed != "" && !strings.HasPrefix(got, "WWW-Authenticate, Location, ") {
				t.Errorf("Access-Control-Expose-Headers = %q", got)
			}
			// A cache must not give one origin's answer to another.
			if vary := a.header.Values("Vary"); row.v == on && !slices.Contains(vary, "Origin") {
				t.Errorf("Vary = %q, want Origin", vary)
			}
			methods := a.header.Get("Access-Control-Allow-Methods")
			if row.status == 204 && (!strings.Contains(methods, "PATCH") || !strings.Contains(methods, "DELETE") ||
				a.header.Get("Access-Control-Allow-Headers") != "Authorization, Content-Type, DPoP, Last-Event-ID, MCP-Protocol-Version, X-Request-Id") {
				t.Errorf("a preflight is answered with %v", a.header)
			}
		})
	}
}

func TestForwardedAddressCountsOnlyFromTrustedProxies(t *testing.T) {
	t.Parallel()
	distrustful := newService(t)
	trusting := distrustful.another("TRUSTED_PROXIES", "127.0.0.0/8, 10.0.0.0/8,2001:db8:ffff::/48")
	for i, row := range []struct {
		name      string
		v         *service
		forwarded []string // X-Forwarded-For
		rfc7239   []string // Forwarded
		want      string
	}{
		{"from anybody", distrustful, []string{"203.0.113.7"}, nil, "127.0.0.1"},
		{"none", trusting, nil, nil, "127.0.0.1"},
		{"one", trusting, []string{"203.0.113.7"}, nil, "203.0.113.7"},
		{"the last, which the client can't forge", trusting, []string{"198.51.100.1, 203.0.113.7"}, nil, "203.0.113.7"},
		{"behind a second proxy", trusting, []string{"198.51.100.1, 203.0.113.7,10.1.2.3"}, nil, "203.0.113.7"},
		{"in several headers", trusting, []string{"198.51.100.1", "203.0.113.7", "10.1.2.3"}, nil, "203.0.113.7"},
		{"all trusted", trusting, []string{"10.0.0.9, 10.1.2.3"}, nil, "10.0.0.9"},
		{"IPv6", trusting, []string{"2001:db8::1"}, nil, "2001:db8::1"},
		{"IPv6 behind IPv6", trusting, []string{"2001:db8::1, 2001:db8:ffff::2"}, nil, "2001:db8::1"},
		{"IPv4 in IPv6", trusting, []string{"::ffff:203.0.113.9"}, nil, "203.0.113.9"},
		{"garbage", trusting, []string{"unknown"}, nil, "127.0.0.1"},
		{"garbage at the end", trusting, []string{"203.0.113.7, <script>"}, nil, "127.0.0.1"},
		{"empty", trusting, []string{""}, nil, "127.0.0.1"},
		{"with a zone", trusting, []string{"fe80::1%eth0"}, nil, "fe80::1"},
		{"with a zone that PostgreSQL refuses", trusting, []string{"fe80::1%\xff"}, nil, "fe80::1"},
		{"with a port", trusting, []string{"198.51.100.1:40000, 203.0.113.7:50000"}, nil, "203.0.113.7"},
		{"IPv6 in brackets", trusting, []string{"[2001:db8::1]"}, nil, "2001:db8::1"},
		{"IPv6 in brackets with a port", trusting, []string{"[2001:db8::1]:443,10.1.2.3:80"}, nil, "2001:db8::1"},
		{"a port alone", trusting, []string{":443"}, nil, "127.0.0.1"},
		{"half a bracket", trusting, []string{"[2001:db8::1"}, nil, "2001:db8::1"},

		{"Forwarded from anybody", distrustful, nil, []string{"for=203.0.113.7"}, "127.0.0.1"},
		{"Forwarded", trusting, nil, []string{"for=198.51.100.1, for=203.0.113.7;proto=https;by=10.0.0.1"}, "203.0.113.7"},
		{"Forwarded with IPv6 and a port", trusting, nil, []string{`proto=https; For="[2001:db8::1]:4711"`}, "2001:db8::1"},
		{"Forwarded with IPv4 and a port", trusting, nil, []string{`for="203.0.113.7:80", for=10.1.2.3`}, "203.0.113.7"},
		{"Forwarded that hides", trusting, nil, []string{"for=203.0.113.7, for=_hidden"}, "127.0.0.1"},
		{"Forwarded without for", trusting, nil, []string{"by=203.0.113.7"}, "127.0.0.1"},
		{"Forwarded with a quoted comma", trusting, nil, []string{`for=203.0.113.7;host="x, for=198.51.100.99"`}, "127.0.0.1"},
		{"Forwarded with a quoted semicolon", trusting, nil, []string{`host="a;for=198.51.100.98";for=203.0.113.7`}, "127.0.0.1"},
		{"Forwarded with half a quote", trusting, nil, []string{`for="203.0.113.7`}, "127.0.0.1"},
		{"both", trusting, []string{"198.51.100.1, 203.0.113.7"}, []string{"for=192.0.2.1"}, "203.0.113.7"},
		{"both, one empty", trusting, []string{"203.0.113.7"}, []string{""}, "203.0.113.7"},
		{"both, the other empty", trusting, []string{""}, []string{"for=203.0.113.7"}, "127.0.0.1"},
	} {
		t.Run(row.name, func(t *testing.T) {
			id := fmt.Sprintf("forwarded-%d", i)
			header := []string{"Content-Type", formType, "Authorization", "Bearer " + row.v.bearer, "X-Request-Id", id}
			for _, value := range row.forwarded {
				header = append(header, "X-Forwarded-For", value)
			}
			for _, value := range row.rfc7239 {
				header = append(header, "Forwarded", value)
			}
			a := row.v.do("POST", "/api/v1/token/introspect", "token=x", append(header, "X-Real-Ip", "192.0.2.1")...)
			if a.status != 200 {
				t.Fatalf("answered %v, want 200", a)
			}
			var got string
			err := row.v.db.QueryRow(t.Context(), `select ip_address from audit_events where metadata->>'requestId' = $1`, id).Scan(&got)
			if err != nil || got != row.want {
				t.Errorf("X-Forwarded-For %q is recorded as %q (%v), want %q", row.forwarded, got, err, row.want)
			}
			if line := row.v.logged(id); line["ip"] != row.want {
				t.Errorf("X-Forwarded-For %q is logged as %q, want %q", row.forwarded, line["ip"], row.want)
			}
		})
	}
}

func TestEveryAnswerHasSecurityHeaders(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for _, row := range []struct {
		name  string
		a     answer
		cache string
	}{
		{"a list", v.api(v.bearer, "GET", "/agents", ""), "no-store"},
		{"a token", v.form(v.id, v.secret, "", "grant_type=client_credentials"), "no-store"},
		{"a token refused", v.form(v.id, newSecret(), "", "grant_type=client_credentials"), "no-store"},
		{"an introspection", v.form(v.id, v.secret, "/introspect", "token="+v.bearer), "no-store"},
		{"a revocation", v.form(v.id, v.secret, "/revoke", "token=x"), "no-store"},
		{"a 401", v.do("GET", "/api/v1/audit", ""), "no-store"},
		{"a 404", v.do("GET", "/nothing", ""), "no-store"},
		{"a 405", v.do("PUT", "/api/v1/token", ""), "no-store"},
		{"health", v.do("GET", "/health", ""), "no-store"},
		{"keys", v.do("GET", "/.well-known/jwks.json", ""), "public, max-age=300"},
		{"metadata", v.do("GET", "/.well-known/oauth-authorization-server", ""), "public, max-age=300"},
	} {
		if got := row.a.header.Get("Cache-Control"); got != row.cache {
			t.Errorf("Cache-Control of %s = %q, want %q", row.name, got, row.cache)
		}
		if got := row.a.header.Get("Pragma"); (got == "no-cache") != slices.Contains([]string{"a token", "a token refused", "an introspection", "a revocation", "a 405"}, row.name) {
			t.Errorf("Pragma of %s = %q", row.name, got)
		}
		if got := row.a.header.Get("X-Content-Type-Options"); got != "nosniff" {
			t.Errorf("X-Content-Type-Options of %s = %q, want nosniff", row.name, got)
		}
		if got := row.a.header.Get("Content-Type"); got != "application/json" {
			t.Errorf("Content-Type of %s = %q, want application/json", row.name, got)
		}
		if row.a.header.Get("X-Request-Id") == "" || row.a.header.Get("Server") != "" {
			t.Errorf("%s has the headers %v, want X-Request-Id and no Server", row.name, row.a.header)
		}
	}
}

// A reader of the log, and a terminal that shows it, must not be fooled.
func TestInputStaysInOneLineOfTheLog(t *testing.T) {
	t.Parallel()
	v := newService(t)
	evil := "\r\n{\"level\":\"ERROR\",\"msg\":\"forged\"}\n\x1b[31m\u2028\u0085"
	escaped := url.QueryEscape(evil)
	before := strings.Count(testLog.String(), "\n")
	requests := 0
	send := func(a answer) {
		t.Helper()
		if requests++; a.status >= 500 {
			t.Errorf("answered %v", a)
		}
	}
	quoted, _ := json.Marshal(evil)
	send(v.do("GET", "/api/v1/agents?owner="+escaped+"&"+escaped+"=1", "", "Authorization", "Bearer "+v.bearer))
	send(v.do("GET", "/"+url.PathEscape(evil), ""))
	send(v.do("GET", "/health", "", "User-Agent", "\u2028\u0085 x", "X-Request-Id", "a\u2028b"))
	send(v.do("GET", "/health", "", "Authorization", "Bearer \u2028"))
	send(v.api(v.bearer, "POST", "/agents", `{"owner":`+string(quoted)+`,`+string(quoted)+`:1}`))
	send(v.api(v.bearer, "GET", "/agents/"+url.PathEscape(evil), ""))
	send(v.form(evil, evil, "", "grant_type="+escaped+"&scope="+escaped+"&"+escaped+"=1&"+escaped+"=2"))
	send(v.form("", "", "", "grant_type=client_credentials&client_id="+escaped+"&client_secret="+escaped))
	send(v.form(v.id, v.secret, "/introspect", "token="+escaped))
	send(v.form(v.id, v.secret, "/revoke", "token="+escaped))
	v.eventually("all is logged", func() bool { return strings.Count(testLog.String(), "\n") >= before+requests })
	if err := testLog.check(); err != nil {
		t.Error(err)
	}
	text := testLog.String()
	if strings.Contains(text, "\x1b") || strings.Contains(text, `"msg":"forged"`) {
		t.Errorf("what was sent got into the log as it was")
	}
	// Header values can't hold these at all (RFC 9110, section 5.5).
	for _, name := range []string{"User-Agent", "X-Request-Id", "Authorization", "X-Forwarded-For", "Origin"} {
		for _, value := range []string{"a\x1b[31m", "a\x00b", "a\rb"} {
			if a := v.raw("GET /health HTTP/1.1\r\nHost: x\r\n" + name + ": " + value + "\r\n\r\n"); a.status != 400 {
				t.Errorf("%s: %q = %v, want 400", name, value, a)
			}
		}
	}
}

func TestJSONMeansOneThingOnly(t *testing.T) {
	t.Parallel()
	v := newService(t)
	path := "/agents/" + v.newAgent("resumes:read")
	for name, body := range map[string]string{
		"a name twice":         `{"owner":"a","owner":"b"}`,
		"a name twice, hidden": `{"owner":"a","\u006fwner":"b"}`,
		"a name in other case": `{"Owner":"a"}`,
		"an unknown name":      `{"owner":"a","admin":true}`,
		"null for a value":     `{"owner":null}`,
		"null for the object":  `null`,
		"an array":             `[{"owner":"a"}]`,
		"a string":             `"owner"`,
		"a second value":       `{"owner":"a"}{"owner":"b"}`,
		"a bracket too many":   `{"owner":"a"}]`,
		"no end":               `{"owner":"a"`,
		"nothing":              ` `,
		"an empty object":      `{}`,
		"NUL":                  `{"owner":"a\u0000b"}`,
		"a raw NUL":            "{\"owner\":\"a\x00b\"}",
		"bad UTF-8":            "{\"owner\":\"a\xffb\"}",
		"a number":             `{"owner":1}`,
		"a comma at the end":   `{"owner":"a",}`,
		"a comment":            `{"owner":"a"/*x*/}`,
		"a byte order mark":    "\xef\xbb\xbf" + `{"owner":"a"}`,
		"deep":                 `{"owner":` + strings.Repeat("[", 7000) + strings.Repeat("]", 7000) + `}`,
		"identity":             `{"agentId":"` + newID() + `"}`,
		"time":                 `{"createdAt":"2020-01-01T00:00:00Z"}`,
	} {
		if a := v.api(v.bearer, "PATCH", path, body); a.status != 400 || a.code() != "VALIDATION_ERROR" {
			t.Errorf("PATCH with %s = %v, want 400", name, a)
		}
	}
	v.want(v.api(v.bearer, "PATCH", path, `{"owner":"\u00e4\ud83d\ude00"}`), 200, "")
	for kind, want := range map[string]int{
		"application/json": 200, "application/json; charset=utf-8": 200, "APPLICATION/JSON": 200,
		"": 415, "text/plain": 415, "application/x-www-form-urlencoded": 415, "application/json, text/plain": 415, "application/jsonp": 415,
	} {
		header := []string{"Authorization", "Bearer " + v.bearer}
		if kind != "" {
			header = append(header, "Content-Type", kind)
		}
		if a := v.do("PATCH", "/api/v1"+path, `{"owner":"a"}`, header...); a.status != want {
			t.Errorf("PATCH as %q = %v, want %d", kind, a, want)
		}
	}
}

func TestListParametersAreChecked(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for _, list := range []string{"/agents", "/agents/" + v.id + "/credentials", "/audit"} {
		for _, query := range []string{
			"page=-1", "page=0", "page=x", "page=", "page=1.0", "page=01", "page=+1", "page=1e2", "page=9223372036854775808", "page=10001",
			"limit=-1", "limit=0", "limit=x", "limit=101", "limit=1000000000", "limit=9223372036854775808", "page=1&page=2",
			"page=101&limit=100", "page=%00", "page=%ff", "unknown=1", "Page=1", "%zz", "page=1;limit=2",
		} {
			if a := v.api(v.bearer, "GET", list+"?"+query, ""); a.status != 400 || a.code() != "VALIDATION_ERROR" {
				t.Errorf("GET %s?%s = %v, want 400", list, query, a)
			}
		}
		v.want(v.api(v.bearer, "GET", list+"?page=100&limit=100", ""), 200, "")
	}
	for _, query := range []string{"owner=%00", "owner=%ff", "owner=", "status=x", "agentType=%00"} {
		if a := v.api(v.bearer, "GET", "/agents?"+query, ""); a.status != 400 {
			t.Errorf("GET /agents?%s = %v, want 400", query, a)
		}
	}
}

// The program as an operator has it.

// command runs the program with an environment.
func command(ctx context.Context, env map[string]string, stderr io.Writer, args ...string) (stdout string, err error) {
	path, err := builtProgram()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Cancel = func() error { // the end of ctx is the operator's SIGTERM
		cmd.Process.Signal(syscall.SIGTERM)
		return os.ErrProcessDone
	}
	said := &errorLine{log: stderr}
	cmd.Stderr = said
	out, err := cmd.Output()
	if err != nil {
		err = errors.New(strings.TrimPrefix(strings.TrimSuffix(said.text, "\n"), "agentidp: "))
	}
	return string(out), err
}

// An errorLine passes on the lines of a log, and keeps what isn't one: with what
// the program gives up.
type errorLine struct {
	log  io.Writer
	text string
}

func (e *errorLine) Write(p []byte) (int, error) {
	if len(p) > 0 && p[0] == '{' && e.text == "" {
		return e.log.Write(p)
	}
	e.text += string(p)
	return len(p), nil
}

func TestEveryFaultOfTheEnvironmentIsReportedAtOnce(t *testing.T) {
	_, err := command(t.Context(), nil, io.Discard)
	if err == nil {
		t.Fatal("the program starts without an environment")
	}
	for _, want := range []string{"DATABASE_URL", "REDIS_URL", "JWT_PRIVATE_KEY", "make run"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("without an environment, run says %q, want %q in it", err, want)
		}
	}
	all := map[string]string{}
	for _, v := range variables(t) {
		all[v.name] = "\x01 canary"
	}
	delete(all, "HOST") // any name of a machine might do
	_, err = command(t.Context(), all, io.Discard)
	if err == nil {
		t.Fatal("the program starts in an environment of garbage")
	}
	for name := range all {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("in an environment of garbage, run doesn't mention %s:\n%v", name, err)
		}
	}
	if strings.Contains(err.Error(), "canary") {
		t.Errorf("run repeats what may be a secret:\n%v", err)
	}
	for name := range all { // in the wrong place
		all[name] = ellipticKey()
	}
	if _, err := command(t.Context(), all, io.Discard); err == nil || regexp.MustCompile(`MIG|BEGIN EC|BEGIN PRIV`).MatchString(err.Error()) {
		t.Errorf("run repeats a key:\n%v", err)
	}
}

func TestCommands(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for _, arg := range []string{"-h", "-help", "--help", "audit-export -h", "bootstrap --help"} {
		out, err := command(t.Context(), nil, io.Discard, strings.Fields(arg)...)
		if err != nil {
			t.Errorf("run(%q) = %v, want nil", arg, err)
		}
		for _, v := range variables(t) {
			if !strings.Contains(out, "  "+v.name+" ") {
				t.Errorf("run(%q) doesn't list %s", arg, v.name)
			}
		}
		for _, name := range []string{"bootstrap EMAIL", "verify-audit", "audit-export", "keygen", "healthcheck", "-version"} {
			if !strings.Contains(out, name) {
				t.Errorf("run(%q) doesn't list %s", arg, name)
			}
		}
	}
	if out, err := command(t.Context(), nil, io.Discard, "-version"); err != nil || !regexp.MustCompile(`^[0-9]+\.[0-9]+\.[0-9]+(\+[0-9a-f]{12})?\n$`).MatchString(out) {
		t.Errorf("run(-version) = %q, %v, want a version", out, err)
	}
	key, err := command(t.Context(), nil, io.Discard, "keygen")
	if err != nil {
		t.Fatal(err)
	}
	v.another("JWT_PRIVATE_KEY", key) // starts with it
	if again, _ := command(t.Context(), nil, io.Discard, "keygen"); again == key {
		t.Error("run(keygen) made the same key twice")
	}
	for _, args := range [][]string{{"sevre"}, {"bootstrap"}, {"bootstrap", "a@example.com", "x"}, {"verify-audit", "x", "y"},
		{"keygen", "x"}, {"healthcheck", "x"}, {"--serve"}, {" "}} {
		if _, err := command(t.Context(), v.env, io.Discard, args...); err == nil || !strings.Contains(err.Error(), "-h") {
			t.Errorf("run(%q) = %v, want an error that tells of -h", args, err)
		}
	}

	// A server as good as it gets, one without a database, and none at all.
	host, port, _ := net.SplitHostPort(strings.TrimPrefix(v.url, "http://"))
	env := map[string]string{"HOST": host, "PORT": port}
	if _, err := command(t.Context(), env, io.Discard, "healthcheck"); err != nil {
		t.Errorf("run(healthcheck) of a good server = %v, want nil", err)
	}
	if _, err := command(t.Context(), map[string]string{"PORT": port, "HOST": "0.0.0.0"}, io.Discard, "healthcheck"); err != nil {
		t.Errorf("run(healthcheck) of a server on all addresses = %v, want nil", err)
	}
	down := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) })}
	listener, err := net.Listen("tcp", "127.0.0.1:"+steadyPort(t))
	if err != nil {
		t.Fatal(err)
	}
	go down.Serve(listener)
	env["HOST"], env["PORT"], _ = net.SplitHostPort(listener.Addr().String())
	if _, err := command(t.Context(), env, io.Discard, "healthcheck"); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("run(healthcheck) of a server that is down = %v, want an error with 503", err)
	}
	down.Close()
	if _, err := command(t.Context(), env, io.Discard, "healthcheck"); err == nil {
		t.Error("run(healthcheck) without a server = nil, want an error")
	}

	taken := map[string]string{"HOST": host, "PORT": port}
	for name, value := range v.env {
		taken[name] = value
	}
	if _, err := command(t.Context(), taken, io.Discard); err == nil || !strings.Contains(err.Error(), "PORT") {
		t.Errorf("run with a port in use = %v, want an error that names PORT", err)
	}
}

// serving runs the program until stop is called, whose error is that of run.
func serving(t *testing.T, env map[string]string) (v *service, stop func() error) {
	t.Helper()
	return logging(t, env, testLog)
}

// logging is serving with a log of the test's own.
func logging(t *testing.T, env map[string]string, log io.Writer) (v *service, stop func() error) {
	t.Helper()
	env["HOST"], env["PORT"] = "127.0.0.1", steadyPort(t)
	if _, set := env["METRICS_ADDR"]; !set {
		env["METRICS_ADDR"] = ""
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := command(ctx, env, log)
		done <- err
	}()
	stopped := false
	stop = func() error {
		stopped = true
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(time.Minute):
			return fmt.Errorf("the program does not stop")
		}
	}
	t.Cleanup(func() {
		if !stopped {
			stop()
		}
	})
	return &service{t: t, env: env, url: "http://" + net.JoinHostPort(env["HOST"], env["PORT"])}, stop
}

// ready asks a server that may not be there yet, or not any more.
func (v *service) ready() int {
	q, _ := http.NewRequest("GET", v.url+"/readyz", nil)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second) // it may listen, and not answer yet
	defer cancel()
	response, err := testClient.Do(q.WithContext(ctx))
	if err != nil {
		return 0
	}
	response.Body.Close()
	return response.StatusCode
}

func TestStoryOfAnOperator(t *testing.T) {
	t.Parallel()
	env := map[string]string{"DATABASE_URL": newDatabase(t), "REDIS_URL": newRedis(t), "LOG_LEVEL": "debug", "DRAIN_TIME": "1s"}
	var err error
	if env["JWT_PRIVATE_KEY"], err = command(t.Context(), env, testLog, "keygen"); err != nil {
		t.Fatal(err)
	}
	var id, secret string
	out, err := command(t.Context(), env, testLog, "bootstrap", "first@example.com")
	if _, scanErr := fmt.Sscanf(out, "client_id: %s\nclient_secret: %s\n", &id, &secret); err != nil || scanErr != nil {
		t.Fatalf("run(bootstrap) = %q, %v", out, err)
	}
	for _, email := range []string{"first@example.com", "second@example.com"} {
		if out, err := command(t.Context(), env, testLog, "bootstrap", email); err == nil || out != "" {
			t.Errorf("the second run(bootstrap) = %q, %v, want an error", out, err)
		}
	}

	v, stop := serving(t, env)
	v.id, v.secret = id, secret
	v.eventually("it serves", func() bool { return v.ready() == 200 })
	v.bearer = v.token(id, secret, "")
	agentID, agentSecret := v.newClient("resumes:read")
	token := v.token(agentID, agentSecret, "")
	if !v.active(token) {
		t.Error("a new token is not active")
	}
	v.want(v.form(agentID, agentSecret, "/revoke", "token="+token), 200, "")
	if v.active(token) {
		t.Error("a revoked token is active")
	}

	out, err = command(t.Context(), env, testLog, "verify-audit")
	found := regexp.MustCompile(`(?m)^checkpoint: (\S+)$`).FindStringSubmatch(out)
	if err != nil || !strings.HasPrefix(out, "verified: ") || found == nil {
		t.Fatalf("run(verify-audit) = %q, %v, want a checkpoint", out, err)
	}
	v.newAgent("resumes:read")
	if out, err := command(t.Context(), env, testLog, "verify-audit", found[1]); err != nil || !strings.Contains(out, "extends the checkpoint") {
		t.Errorf("run(verify-audit) with its checkpoint = %q, %v, want that it extends it", out, err)
	}
	if out, err := command(t.Context(), env, testLog, "verify-audit", token); err == nil {
		t.Errorf("run(verify-audit) with a token for a checkpoint = %q, want an error", out)
	}

	// SIGTERM, with a request on its way.
	conn := v.dial()
	defer conn.Close()
	body := "grant_type=client_credentials&client_id=" + id + "&client_secret=" + secret + "&pad=" + strings.Repeat("x", 15<<10) // which may take six seconds
	fmt.Fprintf(conn, "POST /api/v1/token HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", formType, len(body), body[:20])
	result := make(chan error)
	go func() { result <- stop() }()
	v.eventually("it says that it stops", func() bool { return v.ready() == 503 })
	v.want(v.do("GET", "/livez", ""), 200, "") // it drains, and must not be killed for that
	v.eventually("it takes no more", func() bool { return v.ready() == 0 })
	io.WriteString(conn, body[20:])
	if a := v.readAnswer(conn); a.status != 200 || a.text("access_token") == "" {
		t.Errorf("a request that was on its way = %v, want a token", a)
	}
	if err := <-result; err != nil {
		t.Errorf("run = %v, want nil", err)
	}
	if out, err := command(t.Context(), env, testLog, "verify-audit", found[1]); err != nil {
		t.Errorf("run(verify-audit) after the end = %q, %v", out, err)
	}
}

func TestStartWaitsForPostgreSQL(t *testing.T) {
	t.Parallel()
	env := map[string]string{"DATABASE_URL": newDatabase(t), "REDIS_URL": newRedis(t), "JWT_PRIVATE_KEY": testKey(), "DRAIN_TIME": "0"}
	proxy := proxyDatabase(t, env)
	proxy.set(refusing)
	// Two ways of not being there yet; the second is how PostgreSQL says it itself.
	log := &programLog{also: testLog, serving: make(chan string, 2)}
	waits := func() int { return strings.Count(log.String(), "waiting for PostgreSQL") }
	before := waits()
	v, stop := logging(t, env, log)
	v.eventually("it says that it waits", func() bool { return waits() > before })
	if status := v.ready(); status == 200 {
		t.Errorf("without a database, /readyz = %d", status)
	}
	proxy.set(startingUp)
	before = waits()
	v.eventually("it waits on", func() bool { return waits() > before+1 })
	proxy.set(passing)
	v.eventually("it serves", func() bool { return v.ready() == 200 })
	if err := stop(); err != nil {
		t.Errorf("run = %v, want nil", err)
	}

	proxy.set(refusing) // an operator who gives up is obeyed
	before = waits()
	v, stop = logging(t, env, log)
	v.eventually("it waits again", func() bool { return waits() > before })
	begun := time.Now()
	if err := stop(); err == nil || time.Since(begun) > 5*time.Second {
		t.Errorf("run that was told to stop while it waited = %v after %s, want an error at once", err, time.Since(begun))
	}
}

// What can't be printed has not been done, and the status says so.
func TestOutputThatIsLostIsAFailure(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t))
	empty := p.another("DATABASE_URL", newDatabase(t))
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, args := range [][]string{{"-h"}, {"-version"}, {"keygen"}, {"keygen", "ES256"}, {"verify-audit"}, {"audit-export"}, {"bootstrap", "unseen@example.com"}} {
		cmd := empty.build(args...)
		cmd.Stdout = full
		if failed, ok := errors.AsType[*exec.ExitError](cmd.Run()); !ok || failed.ExitCode() != 1 {
			t.Errorf("%q with a full output ends with %v, want 1", args, failed)
		}
	}
	var n int
	if err := empty.db.QueryRow(t.Context(), `select count(*) from agents where email = 'unseen@example.com'`).Scan(&n); err != nil || n != 0 {
		t.Errorf("a bootstrap whose secret nobody saw leaves %d agents, %v", n, err)
	}
	if out := empty.command("bootstrap", "unseen@example.com"); !strings.Contains(out, "client_secret: ") {
		t.Errorf("bootstrap then prints %q", out)
	}
}

// An issuer has a path where several services share a host. A proxy takes it
// away or leaves it.
func TestIssuerMayHaveAPath(t *testing.T) {
	t.Parallel()
	const issuer = "https://id.example.com/tenants/a"
	v := newService(t, "ISSUER", issuer)
	id, secret := v.newClient(agentsRead, agentsWrite)
	for name, prefix := range map[string]string{"straight": "/tenants/a", "behind a proxy that takes the path away": ""} {
		token := v.want(v.do("POST", prefix+"/api/v1/token", "grant_type=client_credentials", "Content-Type", formType, "Authorization", basic(id, secret)), 200, "").text("access_token")
		created := v.want(v.do("POST", prefix+"/api/v1/agents", agentJSON(fmt.Sprintf("%d@example.com", len(name)), "x:y"),
			"Content-Type", "application/json", "Authorization", "Bearer "+token), 201, "")
		if where := created.header.Get("Location"); where != "/tenants/a/api/v1/agents/"+created.text("agentId") {
			t.Errorf("%s: Location is %q", name, where)
		}
		for _, path := range []string{
			prefix + "/.well-known/jwks.json", prefix + "/health", prefix + "/openapi.yaml", prefix + "/.well-known/openid-configuration",
			"/.well-known/oauth-authorization-server/tenants/a", prefix + "/.well-known/oauth-authorization-server",
			"/.well-known/oauth-protected-resource/tenants/a", prefix + "/.well-known/oauth-protected-resource",
		} {
			v.want(v.do("GET", path, ""), 200, "")
		}
		for _, path := range []string{prefix + "/.well-known/jwks.json/tenants/b", prefix + "/tenants/b/health", prefix + "/nothing", "/tenants/ahealth", "/tenants/b/api/v1/agents"} {
			v.want(v.do("GET", path, ""), 404, "NOT_FOUND")
		}
		v.want(v.do("DELETE", prefix+"/api/v1/token", ""), 405, "invalid_request")
	}
	challenge := v.do("GET", "/api/v1/agents", "").header.Get("WWW-Authenticate")
	if want := `resource_metadata="https://id.example.com/.well-known/oauth-protected-resource/tenants/a"`; !strings.Contains(challenge, want) {
		t.Errorf("the challenge is %q, want %s", challenge, want)
	}
	awkward := v.another("ISSUER", "https://id.example.com/api")
	awkward.want(awkward.do("GET", "/api/v1/agents", ""), 401, "UNAUTHORIZED")
	awkward.want(awkward.do("GET", "/api/api/v1/agents", ""), 401, "UNAUTHORIZED")
}

// A balancer asks all the time, and nobody wants to read that.
func TestChecksAreNoInformation(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for i, path := range []string{"/health", "/livez", "/readyz", "/.well-known/jwks.json"} {
		id := fmt.Sprintf("check-%d", i)
		v.want(v.do("GET", path, "", "X-Request-Id", id), 200, "")
		if line := v.logged(id); line["level"] != map[bool]string{true: "DEBUG", false: "INFO"}[i < 3] {
			t.Errorf("%s is logged as %v", path, line)
		}
	}
}
