package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"
)

// A stranger gets an answer of ours for any method, path and header that
// net/http lets through, and nothing but what is public.
func FuzzFront(f *testing.F) {
	const origin = "https://console.example.com"
	s := &server{vault: newVault(), redis: &cache{}, meter: newMeter(), cfg: config{issuer: testIssuer, corsOrigin: origin}}
	s.keys.Store(mustReadKeys(f, testKey(), ""))
	s.issuers.Store(&map[string]*trustedIssuer{})
	s.clock.Store(&reading{time.Now(), time.Now()})
	public := map[string]bool{}
	for _, rt := range s.routes() {
		method, path, _ := strings.Cut(rt.pattern, " ")
		public[path] = rt.who == nil
		f.Add(method, path, "x", "", "")
		f.Add("OPTIONS", path, "Origin", origin, "{}")
	}
	for _, path := range []string{"*", "", "//", "/..", "/api/v1//token", "/api/v1/token/", "/%2e%2e/health", "http://x/health", "http://x//health", "/health?%zz", "/a;b", "/api/v1/token%00"} {
		f.Add("POST", path, "Authorization", "Bearer x", "token=x")
		f.Add("GET", path, "Authorization", "Basic eDp4", "")
	}
	f.Add("POST", "/api/v1/token", "Content-Type", "application/x-www-form-urlencoded", "client_id=x&client_secret=y")
	f.Add("CONNECT", "x:1", "Expect", "100-continue", "")
	front := s.front(s.routes())
	f.Fuzz(func(t *testing.T, method, path, name, value, body string) {
		text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s", method, path, name, value, len(body), body)
		in, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
		if err != nil {
			return
		}
		if in.Method == "POST" && in.Form == nil && strings.EqualFold(name, "Content-Type") {
			in.Header.Set("Authorization", "Digest x") // a client's secret would need the stores
		}
		in.RemoteAddr = "192.0.2.1:1"
		out := httptest.NewRecorder()
		front.ServeHTTP(out, in)
		open := public[in.URL.Path] && (in.Method == "GET" || in.Method == "HEAD")
		var object map[string]any
		switch err := json.Unmarshal(out.Body.Bytes(), &object); {
		case out.Code >= 500 && !(out.Code == 503 && open): // there is no PostgreSQL, and /health says so
			t.Errorf("%q = %d %s, a fault of ours", text, out.Code, out.Body)
		case out.Code >= 300 && out.Code < 400:
			t.Errorf("%q is redirected to %q", text, out.Header().Get("Location"))
		case out.Code < 300 && !open && out.Code != 204:
			t.Errorf("%q = %d %s, want a refusal", text, out.Code, out.Body)
		case in.Method != "HEAD" && out.Code != 204 && err != nil && in.URL.Path != "/openapi.yaml":
			t.Errorf("%q = %q, which is no JSON object", text, out.Body)
		}
	})
}

// quick serves with the server's own time-outs, in less of our time.
func (s *server) quick(t *testing.T) (address string) {
	t.Helper()
	const faster = 20
	web := s.web()
	for name, d := range map[string]*time.Duration{
		"ReadHeaderTimeout": &web.ReadHeaderTimeout, "ReadTimeout": &web.ReadTimeout,
		"WriteTimeout": &web.WriteTimeout,
	} {
		if *d <= 0 || *d > 2*time.Minute {
			t.Errorf("%s = %s, want one of at most two minutes", name, *d)
		}
		*d /= faster
	}
	if web.IdleTimeout < 10*time.Minute || web.IdleTimeout > time.Hour { // longer than balancers keep a connection
		t.Errorf("IdleTimeout = %s, want one of 10 minutes to an hour", web.IdleTimeout)
	}
	web.IdleTimeout = 6 * time.Second
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go web.Serve(listener)
	t.Cleanup(func() { web.Close() })
	return listener.Addr().String()
}

func dial(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// A reader who doesn't read must not hold a connection, or an answer, for ever.
func TestSlowReaderIsCut(t *testing.T) {
	t.Parallel()
	s, id, plain := newServer(t)
	conn := dial(t, s.quick(t))
	conn.(*net.TCPConn).SetReadBuffer(4096)
	var unknown strings.Builder // each is complained of, which makes a long answer
	for i := range 900 {
		fmt.Fprintf(&unknown, "&a%d", i)
	}
	request := "GET /api/v1/audit?" + unknown.String() + " HTTP/1.1\r\nHost: x\r\nAuthorization: " + s.bearerOf(t, id, plain) + "\r\n\r\n"
	begun := time.Now()
	for { // it is asked for more until it takes no more, and then it has to end
		if _, err := io.WriteString(conn, request); err != nil {
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
				t.Errorf("a reader who reads nothing still has its connection after %s", time.Since(begun))
			}
			return
		}
	}
}

// A client that sends a byte now and then must not hold a connection for long.
func TestDribblingRequestIsCut(t *testing.T) {
	t.Parallel()
	s, _, _ := newServer(t)
	address := s.quick(t)
	for name, begin := range map[string]string{
		"nothing": "",
		"header":  "GET /health HTTP/1.1\r\nX-Slow: ",
		"body": "POST /api/v1/token HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 600\r\n" +
			"\r\ngrant_type=client_credentials&scope=",
	} {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, address)
			begun := time.Now()
			io.WriteString(conn, begin)
			done := make(chan string, 1)
			go func() {
				text, _ := io.ReadAll(conn)
				done <- string(text)
			}()
			for tick := time.NewTicker(50 * time.Millisecond); ; {
				select {
				case text := <-done:
					if strings.HasPrefix(text, "HTTP/1.1 2") || strings.HasPrefix(text, "HTTP/1.1 5") {
						t.Errorf("was answered %q, want an end or a 4xx", text)
					}
					if took := time.Since(begun); took > 5*time.Second {
						t.Errorf("was cut after %s", took)
					}
					return
				case <-tick.C:
					if begin != "" {
						io.WriteString(conn, "a")
					}
				}
			}
		})
	}
}

func TestPanicBecomesA500InJSON(t *testing.T) {
	t.Parallel()
	s, _, _ := newServer(t)
	s.keys.Store(nil) // which no route expects
	for path, oauth := range map[string]bool{"/.well-known/jwks.json": false, "/api/v1/token/introspect": true} {
		method, body := "GET", ""
		want := `{"code":"INTERNAL_SERVER_ERROR","message":"Something went wrong here."}`
		if oauth {
			method, body = "POST", "token=x"
			want = `{"error":"server_error","error_description":"Something went wrong here."}`
		}
		id := "panic" + strings.ReplaceAll(path, "/", ".")
		a := s.ask(method, path, body, "X-Request-Id", id, "Authorization", "Bearer x")
		if a.Code != 500 || a.Body.String() != want+"\n" || a.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("a panic is answered with %d %s, want 500 and %s, not cached", a.Code, a.Body, want)
		}
		for _, line := range []string{
			`"msg":"panic","requestId":"` + regexp.QuoteMeta(id) + `".*"stack":`, `"msg":"request".*"status":500.*"requestId":"` + regexp.QuoteMeta(id) + `"`,
		} {
			if !regexp.MustCompile(line).MatchString(testLog.String()) {
				t.Errorf("the log has no line like %s", line)
			}
		}
	}
	if a := s.ask("GET", "/livez", ""); a.Code != 200 {
		t.Errorf("after panics, /livez answers %d", a.Code)
	}
}
