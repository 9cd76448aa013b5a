package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	requestTimeout = 5 * time.Second        // for all that a request does
	readTime       = 100 * time.Millisecond // for a reading; who waits longer is asked again
	maxBody        = 16 << 10               // bytes
	maxInFlight    = 1024                   // requests that may wait for a store; more are refused at once
)

// A request is one that the front has let in.
type request struct {
	*http.Request
	id     string      // for the log, the audit log and the answer
	addr   netip.Addr  // of the client
	out    http.Header // of the answer
	route  route
	body   []byte
	form   url.Values // at the token endpoints
	caller caller
	inUse  string         // an assertion that it has shown, which is good once
	tells  map[string]any // what the event of a refusal says, beside who and why

	connected context.Context     // until the client has gone
	renew     func()              // the time that it has, after a wait
	writer    http.ResponseWriter // for an answer that is written as it comes
	begun     bool                // that this is
	waited    time.Duration       // by its own wish
}

// A route is what can be called, by whom, and how. Who identifies the caller,
// counts the request for its limit, and refuses it where it must. Handle
// returns what to answer, or an error.
type route struct {
	pattern string
	success int // status
	who     func(*request) error
	handle  func(*request) (any, error)
	form    envelope
	records string // the action that a refusal of it is recorded as; "" where it changes nothing
}

// isCheck is true of what balancers ask all the time.
func (rt route) isCheck() bool {
	return slices.Contains([]string{"GET /health", "GET /livez", "GET /readyz"}, rt.pattern)
}

type envelope bool

const (
	rest  envelope = false // {"code", "message", "details"}
	oauth envelope = true  // {"error", "error_description"} (RFC 6749, section 5.2)
)

var public func(*request) error // asks nobody

func noContent(*request) (any, error) { return nil, nil }

func refuse(p *problem) func(*request) (any, error) {
	return func(*request) (any, error) { return nil, p }
}

// presents tells whether the request has credentials of an HTTP scheme.
func (r *request) presents(scheme string) bool {
	have, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(have, scheme)
}

func (r *request) presentsToken() bool { return r.presents("Bearer") || r.presents("DPoP") }

var (
	requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	pathPattern      = regexp.MustCompile(`^[A-Za-z0-9/._-]+$`) // of every route, and of every id
)

// front stands before the mux. Only a clean path reaches that, or it would
// redirect, and a client would send its secret twice. What the mux would say
// itself is said in our form. The path of the issuer may be in front, where no
// proxy takes it away; and behind a well-known one.
func (s *server) front(routes []route) http.Handler {
	mux, prefix := http.NewServeMux(), s.cfg.path()
	for _, rt := range routes {
		mux.HandleFunc(rt.pattern, func(w http.ResponseWriter, r *http.Request) { s.answer(rt, w, r) })
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, refusal := r.URL.EscapedPath(), headerOnly{}
		if prefix != "" && pathPattern.MatchString(p) && (!strings.HasPrefix(p, "/api/v1/") || strings.HasPrefix(p, prefix+"/api/v1/")) {
			if strings.HasPrefix(p, "/.well-known/") {
				p = strings.TrimSuffix(p, prefix)
			} else if rest, ok := strings.CutPrefix(p, prefix+"/"); ok {
				p = "/" + rest
			}
			r.URL.Path, r.URL.RawPath = p, ""
		}
		none := route{pattern: "none", who: public, handle: refuse(errNotFound), form: envelope(p == "/api/v1/token" || strings.HasPrefix(p, "/api/v1/token/"))}
		// Go reads on after a body that a proxy may have measured otherwise (RFC 9112, section 6.1), and
		// of HTTP/1.0 doesn't even say that there was a Transfer-Encoding.
		if r.TransferEncoding != nil || !r.ProtoAtLeast(1, 1) {
			w.Header().Set("Connection", "close")
		}
		if !pathPattern.MatchString(p) {
			none.handle = refuse(errNotFound.because("There is nothing at this path, and ids are UUIDs in lower case; GET /api/v1/agents?email= finds an agent."))
			s.answer(none, w, r)
		} else if cleaned := path.Clean(p); cleaned != p {
			if _, pattern := mux.Handler(&http.Request{Method: r.Method, URL: &url.URL{Path: cleaned}}); pattern != "" && p == cleaned+"/" {
				none.handle = refuse(errNotFound.because("There is nothing at this path; without the slash at its end there is."))
			}
			s.answer(none, w, r)
		} else if s.allowOrigin(w, r) {
			s.answer(route{pattern: "preflight", success: http.StatusNoContent, who: public, handle: noContent}, w, r)
		} else if own, pattern := mux.Handler(r); pattern != "" {
			mux.ServeHTTP(w, r)
		} else {
			if own.ServeHTTP(refusal, r); refusal["Allow"] != nil {
				w.Header()["Allow"] = refusal["Allow"]
				none.handle = refuse(errMethod.because("This path takes " + refusal["Allow"][0] + ", and not " + clip(r.Method) + "."))
			}
			s.answer(none, w, r)
		}
	})
}

// headerOnly takes of an answer what we keep of it.
type headerOnly http.Header

func (h headerOnly) Header() http.Header         { return http.Header(h) }
func (h headerOnly) WriteHeader(int)             {}
func (h headerOnly) Write(b []byte) (int, error) { return len(b), nil }

// allowOrigin tells a browser that pages of CORS_ORIGIN may call, and answers
// its preflight (fetch.spec.whatwg.org, section 3.3).
func (s *server) allowOrigin(w http.ResponseWriter, r *http.Request) (preflight bool) {
	if s.cfg.corsOrigin == "" {
		return false
	}
	h := w.Header()
	h.Add("Vary", "Origin")
	if r.Header.Get("Origin") != s.cfg.corsOrigin {
		return false
	}
	h.Set("Access-Control-Allow-Origin", s.cfg.corsOrigin)
	h.Set("Access-Control-Expose-Headers", "WWW-Authenticate, Location, Retry-After, RateLimit, RateLimit-Policy, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-Request-Id")
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		return false
	}
	h.Set("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE")
	h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, DPoP, Last-Event-ID, MCP-Protocol-Version, X-Request-Id")
	h.Set("Access-Control-Max-Age", "600")
	return true
}

// answer takes a request along its route.
func (s *server) answer(rt route, w http.ResponseWriter, in *http.Request) {
	begun := time.Now()
	r := &request{Request: in, id: in.Header.Get("X-Request-Id"), addr: clientAddress(in, s.cfg.trustedProxies), out: w.Header(), route: rt}
	if !requestIDPattern.MatchString(r.id) {
		r.id = s.newID()[15:] // 74 random bits
	}
	r.out.Set("X-Request-Id", r.id)
	r.out.Set("X-Content-Type-Options", "nosniff")
	r.out.Set("Cache-Control", "no-store")
	if rt.form == oauth {
		r.out.Set("Pragma", "no-cache") // RFC 6749, section 5.1
	}
	body, err := s.handle(w, r)
	status, code := rt.success, ""
	if err != nil {
		status, code, body = s.fail(r, rt, err)
	}
	if s.draining.Load() { // also where the request has begun before
		r.out.Set("Connection", "close")
	}
	if !r.begun {
		respond(w, status, body)
	}
	route := `route="` + rt.pattern + `"`
	s.meter.add(1, "agentidp_http_requests_total", route+`,status="`+strconv.Itoa(status)+`"`)
	s.meter.add((time.Since(begun) - r.waited).Seconds(), "agentidp_http_request_duration_seconds", route)
	if code != "" {
		s.meter.add(1, "agentidp_refusals_total", `reason="`+code+`"`)
	}
	line := []any{"method", clip(in.Method), "route", rt.pattern, "status", status, "code", code,
		"ms", float64(time.Since(begun).Microseconds()) / 1000, "requestId", r.id,
		"clientId", r.caller.AgentID, "ip", r.addr.String()}
	if rt.isCheck() {
		slog.Debug("check", line...)
	} else {
		slog.Info("request", line...)
	}
}

// handle returns the answer of a route, or why there is none. The body is read
// whole before anybody is asked who it is: one that dribbles in takes nobody's
// place, and outlives no check. What has begun then is finished, also when the
// client has gone: it may have been acknowledged to somebody else.
func (s *server) handle(w http.ResponseWriter, r *request) (body any, err error) {
	rt := r.route
	defer func() {
		if p := recover(); p != nil {
			slog.Error("panic", "requestId", r.id, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errInternal
		}
	}()
	if len(r.Header.Values("Authorization")) > 1 {
		return nil, errTwoMethods
	}
	if rt.who == nil {
		return rt.handle(r)
	}
	if err = s.readBody(w, r); err == nil && rt.form == oauth {
		err = r.parseForm()
	}
	if err != nil {
		return nil, err
	}
	cancel := func() {}
	defer func() { cancel() }()
	r.connected, r.writer = r.Context(), w
	r.renew = func() {
		cancel()
		var ctx context.Context
		ctx, cancel = context.WithTimeout(context.WithoutCancel(r.connected), requestTimeout)
		r.Request = r.WithContext(ctx)
	}
	r.renew()
	defer func() { s.inFlight.Add(-1); s.inUse.Delete(r.inUse) }()
	if s.inFlight.Add(1) > maxInFlight {
		return nil, errBusy
	}
	if err = rt.who(r); err == nil {
		begun := time.Now()
		body, err = rt.handle(r)
		if err == nil && !r.begun && rt.records == "" && (r.waited > 0 || time.Since(begun) > readTime) { // who waited may have been cut off meanwhile
			err = s.checkAlive(r.Context(), &r.caller)
		}
	}
	err = s.recordRefusal(r, err)
	p, isProblem := errors.AsType[*problem](err)
	if isFault := err != nil && (!isProblem || p.status == http.StatusServiceUnavailable); isFault && !r.begun && r.caller.proof.kept && (rt.form == oauth || rt.records == "") {
		s.redis.giveBack(r.Context(), r.caller.proof.key()) // it may be sent again as it is
	}
	return body, err
}

// parseForm reads the form of a token endpoint. Parameters count only in the
// body, once, and an empty one is an absent one (RFC 6749, section 3.2).
func (r *request) parseForm() error {
	types := r.Header.Values("Content-Type")
	if mediaType, _, err := mime.ParseMediaType(strings.Join(types, ",")); err != nil ||
		len(types) != 1 || mediaType != "application/x-www-form-urlencoded" {
		return errForm.because("The Content-Type must be application/x-www-form-urlencoded, once; it was '" + clip(strings.Join(types, ", ")) + "'.")
	}
	form, err := url.ParseQuery(string(r.body))
	if err != nil {
		return errForm.because("The body must be name=value pairs, with % only before two hex digits and no ;.")
	}
	for name, values := range form {
		if len(values) > 1 && name != "resource" {
			return errForm.because("The parameter " + clip(name) + " is there more than once.")
		}
	}
	r.form = form
	return nil
}

// fail returns the status, code and body for an error. What is no problem came
// from a store: nothing else can fail here. It is logged and a 503.
func (s *server) fail(r *request, rt route, err error) (status int, code string, body any) {
	p, ok := errors.AsType[*problem](err)
	if !ok {
		slog.Error("request failed", "requestId", r.id, "route", rt.pattern, "error", err)
		p = errUnavailable
	}
	r.out.Set("Cache-Control", "no-store")
	if p.status == http.StatusServiceUnavailable {
		r.out.Set("Retry-After", "1")
	}
	if p.status == http.StatusUnauthorized || p.scope != "" {
		s.challenge(r, rt.form, p)
	}
	if rt.form == oauth {
		return p.status, p.oauth, map[string]string{"error": p.oauth, "error_description": p.message}
	}
	return p.status, p.code, struct {
		Code    string         `json:"code"`
		Message string         `json:"message"`
		Details map[string]any `json:"details,omitempty"`
	}{p.code, p.message, p.details}
}

// challenge says how to authenticate: in the way that was tried (RFC 6749,
// section 5.2), with the reason beside it (RFC 6750, section 3), which isn't
// there where nothing was tried. Who needs a token is told where to read of whom
// to ask for it (RFC 9728, section 5.1).
func (s *server) challenge(r *request, form envelope, p *problem) {
	const realm = ` realm="agentidp"`
	scheme, algs := "Bearer", ""
	if p.bound || r.presents("DPoP") {
		scheme, algs = "DPoP", `, algs="`+strings.Join(assertionAlgs, " ")+`"`
	}
	token := scheme + realm + `, resource_metadata="` + s.cfg.wellKnown("oauth-protected-resource") + `"` + algs
	reason := `, error="` + p.oauth + `", error_description="` + p.message + `"`
	if p.scope != "" {
		reason += `, scope="` + p.scope + `"`
	}
	switch {
	case r.presentsToken() && p.oauth != errNoClient.oauth:
		r.out.Set("WWW-Authenticate", token+reason)
	case form == rest:
		r.out.Set("WWW-Authenticate", token)
	case r.Header.Get("Authorization") != "" || r.form.Get("client_secret") != "" || r.form.Get("client_assertion") != "":
		r.out.Set("WWW-Authenticate", "Basic"+realm+reason)
	default:
		r.out.Set("WWW-Authenticate", "Basic"+realm)
	}
}

// respond encodes before it writes, so that an answer is whole; nil is none.
func respond(w http.ResponseWriter, status int, body any) {
	b, encoded := body.([]byte)
	if body != nil && !encoded {
		var err error
		if b, err = json.Marshal(body); err != nil {
			panic(err) // a type of ours that has no JSON
		}
		b = append(b, '\n')
	}
	if b != nil && w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/json")
	}
	if b != nil {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	}
	w.WriteHeader(status)
	w.Write(b) // an error means that the client has gone
}

// Bodies are those that have not arrived whole, the longest here first. What they
// can hold is bounded, in sum and for one address: where there is no room, the
// one that was longest here is cut off. So a body that comes at an ordinary pace
// gets through, whoever has others dribble in.
type bodies struct {
	mu   sync.Mutex
	open []*unfinished
}

type unfinished struct {
	address string
	conn    *http.ResponseController
}

const (
	maxBodies   = 1024            // of maxBody each
	maxBodiesOf = 128             // of one address
	bodyTime    = 2 * time.Second // for one to arrive, and that again for each bodyPace
	bodyPace    = 8 << 10         // bytes
)

// begin adds one and makes room for it; done takes it away.
func (b *bodies) begin(u *unfinished) {
	b.mu.Lock()
	defer b.mu.Unlock()
	same, oldest := 0, 0 // of this address; of whom there are too many
	for i, other := range slices.Backward(b.open) {
		if other.address == u.address {
			same, oldest = same+1, i
		}
	}
	if same < maxBodiesOf {
		oldest = 0
	}
	if same >= maxBodiesOf || len(b.open) >= maxBodies {
		_ = b.open[oldest].conn.SetReadDeadline(time.Unix(1, 0)) // its reading fails, and so does nothing else
		b.open = slices.Delete(b.open, oldest, oldest+1)
	}
	b.open = append(b.open, u)
}

func (b *bodies) done(u *unfinished) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open = slices.DeleteFunc(b.open, func(other *unfinished) bool { return other == u })
}

// readBody reads up to maxBody bytes, in the time that so many may take.
func (s *server) readBody(w http.ResponseWriter, r *request) (err error) {
	if r.Body == http.NoBody {
		return nil
	}
	length := r.ContentLength
	if length < 0 || length > maxBody {
		length = maxBody
	}
	u := &unfinished{addressKey(r.addr), http.NewResponseController(w)}
	_ = u.conn.SetReadDeadline(time.Now().Add(bodyTime + bodyTime*time.Duration(length)/bodyPace))
	s.bodies.begin(u)
	r.body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	s.bodies.done(u)
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return errTooLarge
	}
	if err != nil {
		return errForm.because("The body did not arrive whole, or not in time.")
	}
	return nil
}
