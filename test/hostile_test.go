package test

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What a stranger may send. All of it goes to the real program, so that every
// line on its standard error is held to what a log must be.

// answerTime is the longest that an answer may take: what a request is given,
// and as much again for a busy machine.
const answerTime = 2 * requestTimeout

// nastyTexts break things elsewhere. Each has the word canary in it where it
// stays what it is: the log must have it nowhere.
func nastyTexts(id string) []string {
	return []string{
		"", " ", "canary", "\x00", "canary\x00", "%00", "%ff", "%zz", "%", "\xff\xfe", "\xc3\x28", "\xc0\x80", "\xed\xa0\x80", `\u0000`, `\ud800`,
		`\udfff\ud800`, `\\u0000`, "é", "𝒳", "\ufffe", "\ufeff", "\u202ecanary\u202c", "\u2028\u0085", "\u0600\u200f",
		"canary\r\nX-Evil: yes", "canary\r\n\r\n{\"level\":\"ERROR\"}", "\ncanary", "\r", "\t", "\x1b[2J\x1b[31mcanary", "\x1b]0;canary\x07", "\x7f", "\x08",
		"canary'; drop table agents; --", `canary' or '1'='1`, "$1", "%s%n%d", `"`, `\`, `canary","level":"ERROR","msg":"forged`, "'", "`", "{}", "[]",
		"{", "}{", "null", "true", "{{.}}", "${jndi:ldap://canary}", "{{7*7}}", "<script>canary</script>", "<?xml?>", "-1", "0", "01", "+1", "1.5", "1e400",
		"-1e400", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616", "0x10", "1_000", "NaN", "infinity",
		"-infinity", "../..", "/../canary", "..%2f..%2fcanary", "%2e%2e", "%252e", "//canary", "\\\\canary\\share", "%0d%0aX-Evil:%20yes", ";", "&", "=", "a=b&a=c",
		"?", "#", "*", "a,b", strings.ToUpper(id), "{" + id + "}", strings.ReplaceAll(id, "-", ""), "urn:uuid:" + id, id + "\n", " " + id, id + "%00",
		strings.Repeat("canary", 500), strings.Repeat("é", 2000), strings.Repeat("a", 13<<10), strings.Repeat("[", 5000), strings.Repeat(`{"a":`, 3000),
		strings.Repeat("&a", 3000), strings.Repeat(",", 5000), strings.Repeat("1", 5000), strings.Repeat("%41", 3000), strings.Repeat(`"a":1,`, 1000),
		"2026-02-30", "2026-13-01T00:00:00Z", "9999-12-31T23:59:59.999999999Z", "9999-12-31T23:59:59-23:59", "0000-01-01T00:00:00Z", "-0001-01-01",
		"1970-01-01T00:00:00+23:59", "2030-01-01T00:00:60Z", "a@b", "canary@b.c", "1.0.0", "a:b", "a:*", "agents:*", "agents:write", "active", "suspended",
		strings.Repeat("A", 43), "AAAAAAAAAAE", "chunked", "close", "gzip", "100-continue", "application/json", formType, "bytes=0-,0-,0-",
		"::1", "::ffff:203.0.113.9", "fe80::1%canary", "127.0.0.1:80", "203.0.113.7, canary", "[::1]:1",
	}
}

// hostileText is made of what breaks things.
func hostileText(random *rand.Rand) string {
	pieces := []string{
		"\x00", "\xff", "\xc3", "\u202e", "\ud7ff", "😀", "'", `"`, `\`, "%", "%00", "%ff", "%2F", ";", "&", "=", "{", "}",
		"[", "]", ":", ",", " ", "\t", "\r\n", "\n", "\x1b[1m", "$1", "--", "/*", "..", "/", "a", "Z", "0", "9", "-", "null", "é",
		"agents:write", "\\u0000", "\\ud800", "1e999", "@", "+", "~", "\x7f", "\u0085", "\u2028", "<script>", "canary",
	}
	var b strings.Builder
	for range random.IntN(12) {
		b.WriteString(pieces[random.IntN(len(pieces))])
	}
	return b.String()
}

// A message is a request as it is sent, byte for byte.
type message struct {
	method, path, version string
	header                []string // lines
	body                  string
	length                bool // whether Content-Length is sent, as it is
}

func (m message) String() string {
	lines := append([]string{m.method + " " + m.path + " " + m.version}, m.header...)
	if m.length {
		lines = append(lines, fmt.Sprintf("Content-Length: %d", len(m.body)))
	}
	return strings.Join(lines, "\r\n") + "\r\n\r\n" + m.body
}

// set replaces a header, or adds it.
func (m *message) set(name, value string) {
	m.header = slices.DeleteFunc(slices.Clone(m.header), func(line string) bool { return strings.HasPrefix(line, name+":") })
	m.header = append(m.header, name+": "+value)
}

func (m *message) add(name, value string) {
	m.header = append(slices.Clone(m.header), name+": "+value)
}

// A place is where a text can be put into a request.
type place struct {
	name string
	put  func(m *message, text string)
	// ours says that net/http lets the request through whatever the text is,
	// or if it is one that a header may have; else it may refuse it itself.
	ours   string
	secret bool // the text is where a secret belongs: no answer may repeat it
}

// What place.ours can be.
const (
	always  = "always"
	asValue = "as a header's value"
	maybe   = ""
)

// A target is an agent that may be changed, with a credential and an event.
type target struct{ agentID, credentialID, eventID string }

// deepPlace has the names of those whose text may get as far as a store.
var deepPlace = regexp.MustCompile(`^(query|field|form|segment \{)[^ ]* ?[A-Za-z_]*$|^User-Agent$`)

// jsonFields and listParameters are what the routes take.
var (
	jsonFields = map[string][]string{
		"POST /api/v1/agents":                                             {"email", "agentType", "version", "capabilities", "owner", "deploymentEnv", "status", "agentId"},
		"PATCH /api/v1/agents/{agentId}":                                  {"agentType", "version", "capabilities", "owner", "deploymentEnv", "status", "email"},
		"POST /api/v1/agents/{agentId}/credentials":                       {"expiresAt", "clientSecret"},
		"POST /api/v1/agents/{agentId}/credentials/{credentialId}/rotate": {"expiresAt", "clientSecret"},
	}
	formFields     = []string{"grant_type", "scope", "resource", "client_id", "client_secret", "token", "token_type_hint", "access_token"}
	listParameters = map[string][]string{
		"GET /api/v1/agents":                       {"owner", "agentType", "status", "page", "limit"},
		"GET /api/v1/agents/{agentId}/credentials": {"page", "limit"},
		"GET /api/v1/audit":                        {"agentId", "action", "outcome", "fromDate", "toDate", "page", "limit", "cursor"},
		"GET /api/v1/audit/verify":                 {"fromSeq"},
	}
)

// goodMessage is a request of a route that is as it should be. The three ways
// to authenticate are each used.
func (p *program) goodMessage(rt route, at target) message {
	method, path, _ := strings.Cut(rt.pattern, " ")
	path = strings.NewReplacer("{agentId}", at.agentID, "{credentialId}", at.credentialID, "{eventId}", at.eventID).Replace(path)
	m := message{method: method, path: path, version: "HTTP/1.1", header: []string{"Host: x"}, length: method != "GET" && method != "DELETE"}
	if fields := jsonFields[rt.pattern]; fields != nil {
		m.add("Content-Type", "application/json")
		switch m.body = "{}"; {
		case fields[0] == "email":
			m.body = agentWith(nil)
		case fields[0] == "agentType":
			m.body = `{"owner":"team"}`
		}
	}
	if rt.oauth && method == "POST" {
		m.add("Content-Type", formType)
		m.body = "grant_type=client_credentials&token=x"
	}
	switch {
	case path == "/api/v1/token":
		m.body += "&client_id=" + p.id + "&client_secret=" + p.secret
	case path == "/api/v1/token/revoke":
		m.add("Authorization", basicAuth(p.id, p.secret))
	default:
		m.add("Authorization", "Bearer "+p.bearer)
	}
	return m
}

// places are those of a route.
func (p *program) places(rt route) (list []place) {
	at := func(name, ours string, put func(*message, string)) {
		list = append(list, place{name: name, ours: ours, put: put})
	}
	hidden := func(name, ours string, put func(*message, string)) {
		at(name, ours, put)
		list[len(list)-1].secret = true
	}
	quote := func(v any) string { b, _ := json.Marshal(v); return string(b) }
	basic := func(text string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(text)) }

	_, pattern, _ := strings.Cut(rt.pattern, " ")
	for i, segment := range strings.Split(pattern, "/") {
		if segment == "" {
			continue
		}
		put := func(m *message, text string) {
			segments := strings.Split(m.path, "/")
			segments[i] = text
			m.path = strings.Join(segments, "/")
		}
		at("segment "+segment, always, func(m *message, text string) { put(m, url.PathEscape(text)) })
		at("bytes of segment "+segment, maybe, put)
	}
	at("end of path", always, func(m *message, text string) { m.path += "/" + url.PathEscape(text) })
	at("method", maybe, func(m *message, text string) { m.method = strings.ReplaceAll(text, "canary", "") }) // which is logged
	at("version", maybe, func(m *message, text string) { m.version = text })
	at("target", maybe, func(m *message, text string) { m.path = text })
	at("host of the target", maybe, func(m *message, text string) { m.path = "http://" + text + m.path })

	hidden("query access_token", always, func(m *message, text string) { m.path += "?access_token=" + url.QueryEscape(text) })
	at("bytes of query", maybe, func(m *message, text string) { m.path += "?" + text })
	for _, name := range listParameters[rt.pattern] {
		at("query "+name, always, func(m *message, text string) { m.path += "?" + name + "=" + url.QueryEscape(text) })
		at("bytes of query "+name, maybe, func(m *message, text string) { m.path += "?" + name + "=" + text })
		at("query "+name+" twice", always, func(m *message, text string) { m.path += "?" + name + "=1&" + name + "=" + url.QueryEscape(text) })
		at("name in query beside "+name, always, func(m *message, text string) { m.path += "?" + name + "=1&" + url.QueryEscape(text) + "=1" })
	}

	with := func(name string, value any) func(m *message) {
		return func(m *message) {
			var fields map[string]any
			_ = json.Unmarshal([]byte(m.body), &fields)
			fields[name] = value
			m.body = quote(fields)
		}
	}
	for _, name := range jsonFields[rt.pattern] {
		at("field "+name, always, func(m *message, text string) {
			if name == "capabilities" {
				with(name, []string{"a:b", text})(m)
			} else {
				with(name, text)(m)
			}
		})
		mark := "the place"
		within := func(value any) func(*message, string) {
			return func(m *message, text string) {
				with(name, value)(m)
				m.body = strings.Replace(m.body, `"`+mark+`"`, text, 1)
			}
		}
		at("bytes of field "+name, always, func(m *message, text string) { within(mark)(m, `"`+text+`"`) })
		at("value of field "+name, always, within(mark))
		at("value deep in field "+name, always, within(map[string]any{"a": []any{1, mark}}))
		at("field beside "+name, always, func(m *message, text string) { with(text, text)(m) })
		at("field before "+name, always, func(m *message, text string) { m.body = `{"` + text + `":1,` + m.body[1:] })
	}
	if strings.HasPrefix(rt.pattern, "POST /api/v1/token") {
		for _, name := range formFields {
			replace := func(m *message, text string) {
				form, _ := url.ParseQuery(m.body)
				form.Del(name)
				m.body = form.Encode() + "&" + name + "=" + text
			}
			put := at // what is refused may be said
			if name == "client_secret" || name == "client_id" || name == "token" {
				put = hidden
			}
			put("form "+name, always, func(m *message, text string) { replace(m, url.QueryEscape(text)) })
			put("bytes of form "+name, always, replace)
			put("form "+name+" twice", always, func(m *message, text string) { m.body += "&" + name + "=" + url.QueryEscape(text) })
		}
		at("name in form", always, func(m *message, text string) {
			m.body += "&" + url.QueryEscape(text) + "=1&" + url.QueryEscape(text) + "=2"
		})
	}
	at("body", always, func(m *message, text string) { m.body, m.length = text, true })
	at("end of body", always, func(m *message, text string) { m.body, m.length = m.body+text, true })

	for _, scheme := range []string{"", "Bearer ", "bEARER  ", "DPoP ", "Basic ", "Digest ", "Bearer " + p.bearer + ", "} {
		hidden("Authorization: "+strings.Replace(scheme, p.bearer, "token", 1), asValue, func(m *message, text string) { m.set("Authorization", scheme+text) })
	}
	hidden("Authorization: token, cut", asValue, func(m *message, text string) { m.set("Authorization", "Bearer "+p.bearer[:len(p.bearer)-10]+text) })
	hidden("Authorization: Basic of", always, func(m *message, text string) { m.set("Authorization", basic(text)) })
	hidden("Authorization: Basic of id and", always, func(m *message, text string) { m.set("Authorization", basic(p.id+":"+text)) })
	hidden("Authorization: Basic of secret and", always, func(m *message, text string) { m.set("Authorization", basic(text+":"+p.secret)) })
	hidden("Authorization twice", asValue, func(m *message, text string) { m.add("Authorization", text); m.add("Authorization", "Bearer "+text) })
	hidden("Cookie", asValue, func(m *message, text string) { m.set("Cookie", "session="+text) })
	for _, name := range []string{"Content-Type", "X-Forwarded-For", "Origin", "Accept", "Accept-Encoding", "Content-Encoding", "Range",
		"If-None-Match", "Access-Control-Request-Method", "X-Http-Method-Override", "Forwarded", "Referer", "DPoP"} {
		put := hidden
		if name == "Content-Type" {
			put = at
		}
		put(name, asValue, func(m *message, text string) { m.set(name, text) })
		put(name+" twice", asValue, func(m *message, text string) { m.add(name, "x"); m.add(name, text) })
	}
	at("User-Agent", asValue, func(m *message, text string) { m.set("User-Agent", text) })                                       // which the audit log has
	at("X-Request-Id", asValue, func(m *message, text string) { m.set("X-Request-Id", strings.ReplaceAll(text, "canary", "")) }) // which is logged
	at("X-Request-Id twice", asValue, func(m *message, text string) { m.add("X-Request-Id", "x"); m.add("X-Request-Id", text) })
	for _, name := range []string{"Host", "Connection", "Upgrade", "Expect", "Transfer-Encoding", "Trailer", "Content-Length"} {
		hidden(name, maybe, func(m *message, text string) { m.set(name, text); m.length = m.length && name != "Content-Length" })
		hidden(name+" twice", maybe, func(m *message, text string) { m.add(name, "1"); m.add(name, text) })
	}
	at("a preflight's Origin", asValue, func(m *message, text string) {
		m.method = "OPTIONS"
		m.set("Origin", hostileOrigin)
		m.set("Access-Control-Request-Method", text)
	})
	hidden("name of a header", maybe, func(m *message, text string) { m.add(text, "x") })
	hidden("line of the header", maybe, func(m *message, text string) { m.header = append(slices.Clone(m.header), text) })
	return list
}

const hostileOrigin = "https://console.example.com"

// headerValue is what a header may hold (RFC 9110, section 5.5), within what
// all of the header may have.
func headerValue(text string) bool {
	return len(text) < 12<<10 && strings.IndexFunc(text, func(c rune) bool { return c < ' ' && c != '\t' || c == '\x7f' }) < 0
}

// exchange sends bytes, says that there will be no more, and returns all the
// answers.
func (v *service) exchange(text string, within time.Duration) (list []answer, err error) {
	conn, err := net.Dial("tcp", strings.TrimPrefix(v.url, "http://"))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(within))
	go func() {
		io.WriteString(conn, text) // may be answered before it is read to its end
		conn.(*net.TCPConn).CloseWrite()
	}()
	head, _, _ := strings.Cut(text, " ")
	asked := &http.Request{Method: head} // an answer to HEAD has no body
	for in := bufio.NewReader(conn); ; {
		response, err := http.ReadResponse(in, asked)
		if err == nil && response.StatusCode < 200 {
			continue
		}
		var raw []byte
		if err == nil {
			raw, err = io.ReadAll(response.Body)
		}
		// net/http closes on what is no HTTP without reading to its end.
		ended := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF) && response == nil
		if response == nil && ended {
			return list, nil
		}
		if err != nil && !ended {
			return list, err
		}
		a := answer{status: response.StatusCode, header: response.Header, raw: string(raw)}
		_ = json.Unmarshal(raw, &a.body)
		if list = append(list, a); ended {
			return list, nil
		}
	}
}

// ourHeaders are all that an answer may have, whatever was asked.
var ourHeaders = strings.Fields(`Access-Control-Allow-Headers Access-Control-Allow-Methods Access-Control-Allow-Origin Access-Control-Expose-Headers
	Access-Control-Max-Age Allow Cache-Control Connection Content-Length Content-Type Date Location Pragma Retry-After Vary Www-Authenticate
	X-Content-Type-Options X-Ratelimit-Limit X-Ratelimit-Remaining X-Ratelimit-Reset X-Request-Id`)

var describes = regexp.MustCompile(`^[\x20-\x21\x23-\x5b\x5d-\x7e]+$`) // RFC 6749, section 5.2

// isOpenAPI tells of the one answer that is no JSON.
func isOpenAPI(a answer) bool {
	return strings.HasPrefix(a.raw, "openapi: ") && a.header.Get("Content-Type") == "application/yaml"
}

// faultOf says what is wrong with an answer of ours, or "".
func faultOf(a answer, method string) string {
	for name := range a.header {
		if !slices.Contains(ourHeaders, name) {
			return "has the header " + name
		}
	}
	d := json.NewDecoder(strings.NewReader(a.raw))
	var object map[string]any
	err := d.Decode(&object)
	switch {
	case a.status == 200 && isOpenAPI(a): // the one answer that is no JSON
		return ""
	case a.status >= 500:
		return "is a fault of ours"
	case a.status >= 300 && a.status < 400:
		return "is a redirect"
	case a.header.Get("X-Request-Id") == "":
		return "has no X-Request-Id"
	case a.status == 204 || method == "HEAD":
		if a.raw != "" {
			return "has a body"
		}
		return ""
	case a.header.Get("Content-Type") != "application/json" || err != nil || object == nil || !strings.HasSuffix(a.raw, "}\n") || d.More():
		return "is not one JSON object"
	case a.status >= 400 && a.code() == "":
		return "has no code"
	case object["error_description"] != nil && !describes.MatchString(a.text("error_description")):
		return "has a description that the RFC forbids"
	}
	return ""
}

// httpRefusals are what net/http itself answers to what is no HTTP for it, and
// where: "" is everywhere. It knows one Transfer-Encoding (501, RFC 9112,
// section 6.1), one version (505) and one expectation (417).
var httpRefusals = map[int]string{400: "", 431: "", 417: "Expect", 501: "Transfer-Encoding", 505: "version"}

// isHTTPRefusal tells whether net/http has answered, and may do so there.
func isHTTPRefusal(a answer, where string) bool {
	place, known := httpRefusals[a.status]
	return known && strings.Contains(where, place) && a.header.Get("X-Request-Id") == "" && a.header.Get("Content-Type") != "application/json"
}

// mayShow are those that may answer with a secret or something signed.
var mayShow = map[string]string{
	"POST /api/v1/token":                        "eyJhbGciOi",
	"GET /api/v1/audit":                         "eyJhbGciOi",
	"GET /api/v1/audit/verify":                  "eyJhbGciOi",
	"POST /api/v1/agents/{agentId}/credentials": "sk_live_",
	"POST /api/v1/agents/{agentId}/credentials/{credentialId}/rotate": "sk_live_",
}

// leakOf is a secret in an answer that should have none, or "".
func leakOf(rt route, a answer, canary string) string {
	if isOpenAPI(a) { // whose examples have tokens, of which half is left out
		return ""
	}
	text := a.raw + fmt.Sprint(a.header)
	if canary != "" && strings.Contains(text, canary) {
		return canary
	}
	for _, found := range secretInLog.FindAllString(text, -1) {
		shown := mayShow[rt.pattern]
		if !strings.HasPrefix(found, "canary") && (a.status >= 300 || shown == "" || !strings.HasPrefix(found, shown)) {
			return found[:10]
		}
	}
	return ""
}

// stateOf is a digest of all that a request can change, but for the log.
func (v *service) stateOf() (digest string) {
	v.t.Helper()
	err := v.db.QueryRow(v.t.Context(), `
		select count(*) || coalesce(md5(string_agg(row, '' order by row)), '')
		from (select a::text from agents a union all select c::text from credentials c
			union all select r.jti::text from token_revocations r) as x(row)`).Scan(&digest)
	if err != nil {
		v.t.Fatal(err)
	}
	return digest
}

// Whatever is put wherever: it is answered in time, in JSON, never with a 5xx
// and never with what another has sent in confidence; refused, it changes
// nothing; and the log has one line of JSON for each answer, and no secret.
func TestHostileInputIsAnsweredAndHarmsNothing(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t), "TRUSTED_PROXIES", "127.0.0.0/8", "CORS_ORIGIN", hostileOrigin, "LOG_LEVEL", "debug")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	event := p.audit("limit=1").Data[0].EventID
	newTarget := func() target {
		id := p.newAgent("resumes:read")
		credentialID, _ := p.quickCredential(id)
		return target{id, credentialID, event}
	}
	goal := newTarget()
	texts := nastyTexts(goal.agentID)
	for range rounds(16, 100) {
		texts = append(texts, hostileText(random))
	}
	id, secret := p.quickClient("resumes:read")
	secrets := []string{secret, p.token(id, secret, ""), "canary"}
	// Of all texts, each place has one in so many, and more of them where they
	// may get as far as a store.
	share, deepShare := rounds(400, 40), rounds(14, 2)
	state, sent, lines := p.stateOf(), 0, map[string]int{}
	try := func(rt route, place place, text string) {
		sent++
		canary := ""
		if place.secret { // each has its own, which nothing that was stored before has
			canary = fmt.Sprintf("canary%d.", sent)
			text = strings.ReplaceAll(text, "canary", canary)
		}
		m := p.goodMessage(rt, goal)
		place.put(&m, text)
		what := fmt.Sprintf("%s with %.60q as %s", rt.pattern, text, place.name)
		answers, err := p.exchange(m.String(), answerTime)
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		ours := (place.ours == always || place.ours == asValue && headerValue(text)) && len(m.String())-len(m.body) < maxHeader
		if ours && len(answers) != 1 {
			t.Errorf("%s: %d answers, want 1", what, len(answers))
		}
		refused := true
		for _, a := range answers {
			refused = refused && a.status >= 400
			if !ours && isHTTPRefusal(a, place.name) {
				continue
			}
			if fault := faultOf(a, m.method); fault != "" {
				t.Errorf("%s: %.300s %s", what, a, fault)
			}
			if leak := leakOf(rt, a, canary); leak != "" {
				t.Errorf("%s: %.300s has a secret in it: %s", what, a, leak)
			}
			lines[a.header.Get("X-Request-Id")]++
		}
		if m.method == "GET" {
			return
		}
		after := p.stateOf()
		if refused && after != state {
			t.Errorf("%s was refused with %.300v, and has changed the database", what, answers)
		}
		if method, _, _ := strings.Cut(rt.pattern, " "); after != state && (method == "DELETE" || method == "PATCH") {
			goal = newTarget()
			after = p.stateOf()
		}
		state = after
	}
	for _, rt := range routes(t) {
		for _, place := range p.places(rt) {
			n := share
			if deepPlace.MatchString(place.name) {
				n = deepShare
			}
			for _, text := range texts {
				if random.IntN(n) == 0 {
					try(rt, place, text)
				}
			}
			if place.secret && random.IntN(rounds(3, 1)) == 0 {
				try(rt, place, secrets[random.IntN(len(secrets))])
			}
		}
	}
	t.Logf("%d requests", sent)
	p.isWell()
	p.checkChain() // whatever was recorded of it
	p.wantLines(lines)
}

// wantLines wants so many lines in the log of each request id, and none of a
// fault of ours.
func (p *program) wantLines(want map[string]int) {
	p.t.Helper()
	var wrong []string
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		have := map[string]int{}
		for line := range strings.Lines(p.log.String()) {
			var fields struct{ Level, Msg, RequestID string }
			_ = json.Unmarshal([]byte(line), &fields) // check has its own opinion
			if fields.Msg == "request" || fields.Msg == "check" {
				have[fields.RequestID]++
			}
			if fields.Level == "ERROR" {
				p.t.Errorf("the log has %.500s", line)
			}
		}
		wrong = wrong[:0]
		for id, n := range want {
			if have[id] != n {
				wrong = append(wrong, fmt.Sprintf("%d of %q, want %d", have[id], id, n))
			}
		}
		if len(wrong) == 0 || time.Now().After(end) || p.t.Failed() {
			break
		}
	}
	if len(wrong) > 0 {
		p.t.Errorf("the log has not one line for each answer: %q", wrong[:min(len(wrong), 10)])
	}
}

// What isn't HTTP, or is HTTP in a way that two readers may take for different
// requests. Refused by net/http or read in one way: the number of answers says
// which, since each row is followed by one good request on the same connection.
func TestMalformedHTTPIsRefusedAndOthersAreServed(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t))
	const next = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
	post := func(header, body string) string {
		return "POST /api/v1/token/introspect HTTP/1.1\r\nHost: x\r\nContent-Type: " + formType + "\r\nAuthorization: Bearer " + p.bearer +
			"\r\n" + header + "\r\n\r\n" + body
	}
	get := func(header string) string { return "GET /livez HTTP/1.1\r\n" + header + "\r\n" }
	const chunked, form = "Transfer-Encoding: chunked", "token=canary"
	inside := "DELETE /api/v1/agents/" + p.id + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + p.bearer + "\r\n\r\n"
	for _, row := range []struct {
		name, text string
		want       string // the statuses of all answers
	}{
		{"a good one", get("Host: x\r\n"), "200 200"},
		{"nothing", "", "200"},
		{"noise", "\x00\x01canary\xff\xfe\r\n\r\n", "400"},
		{"a TLS greeting", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("\x00", 300) + "\r\n\r\n", "400"},
		{"HTTP/0.9", "GET /livez\r\n", "400"},
		{"HTTP/1.0", "GET /livez HTTP/1.0\r\n\r\n", "200"},
		{"HTTP/9.9", "GET /livez HTTP/9.9\r\nHost: x\r\n\r\n", "505"},
		{"HTTP/1.1 with a space", "GET /livez HTTP/1.1 \r\nHost: x\r\n\r\n", "400"},
		{"HTTP/2 without asking", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "404"},
		{"an upgrade to h2c", get("Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"), "200 200"},
		{"an upgrade to WebSocket", get("Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"), "200 200"},
		{"a space before the method", " GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"two spaces", "GET  /livez HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"a tab", "GET\t/livez HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"a line end in the path", "GET /livez\rcanary HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"a NUL in the path", "GET /livez\x00 HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"a bad method", "G@T /livez HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"bare line feeds", "GET /livez HTTP/1.1\nHost: x\n\n", "200 200"},
		{"bare carriage returns", "GET /livez HTTP/1.1\rHost: x\r\r", "400"},
		{"another host in the target", "GET http://canary.example/livez HTTP/1.1\r\nHost: x\r\n\r\n", "200 200"},
		{"no host", get(""), "400"},
		{"two hosts", get("Host: x\r\nHost: y\r\n"), "400"},
		{"a host that is none", get("Host: a b/<canary>\r\n"), "400"},
		{"a header without a colon", get("Host: x\r\ncanary\r\n"), "400"},
		{"a header without a name", get("Host: x\r\n: canary\r\n"), "400"},
		{"a space in a header's name", get("Host: x\r\nContent Length: 5\r\n"), "400"},
		{"a space behind a header's name", get("Host: x\r\nContent-Length : 5\r\n"), "400"},
		{"a NUL in a header", get("Host: x\r\nX-Request-Id: canary\x00\r\n"), "400"},
		{"a carriage return in a header", get("Host: x\r\nX-Request-Id: a\rX-Evil: canary\r\n"), "400"},
		{"a folded header", get("Host: x\r\nX-Request-Id: a\r\n canary\r\n"), "200 200"},
		{"a folded first header", get(" canary: x\r\nHost: x\r\n"), "400"},
		{"5000 headers", get("Host: x\r\n" + strings.Repeat("A: b\r\n", 5000)), "431"},
		{"one header of 100 kB", get("Host: x\r\nA: " + strings.Repeat("canary", 17000) + "\r\n"), "431"},
		{"a path of 100 kB", "GET /" + strings.Repeat("canary", 17000) + " HTTP/1.1\r\nHost: x\r\n\r\n", "431"},
		{"an unknown expectation", post("Content-Length: 12\r\nExpect: canary", form), "417"},
		{"a body that waits for leave", post("Content-Length: 12\r\nExpect: 100-continue", form), "200 200"},
		{"a body that waits for a refusal", strings.Replace(post("Content-Length: 12\r\nExpect: 100-continue", ""), p.bearer, "canary", 1), "401 400"}, // it was to be 12 bytes

		{"two lengths", post("Content-Length: 12\r\nContent-Length: 13", form), "400"},
		{"two lengths that agree", post("Content-Length: 12\r\nContent-Length: 12", form), "200 200"},
		{"two lengths in one", post("Content-Length: 12, 12", form), "400"},
		{"a negative length", post("Content-Length: -1", form), "400"},
		{"a length with a sign", post("Content-Length: +12", form), "400"},
		{"a length in base 16", post("Content-Length: 0xc", form), "400"},
		{"no number for a length", post("Content-Length: canary", form), "400"},
		{"a length beyond all numbers", post("Content-Length: 18446744073709551628", form), "400"},
		{"a length that is too short", post("Content-Length: 7", "token=xcanary\r\n\r\n"), "200 400"},
		{"no length", post("X: y", ""), "400 200"},
		// A chunked request is the last of its connection (RFC 9112, section 6.1).
		{"chunks", post(chunked, "c\r\n"+form+"\r\n0\r\n\r\n"), "200"},
		{"chunks and a length", post("Content-Length: 5\r\n"+chunked, "c\r\n"+form+"\r\n0\r\n\r\n"), "200"},
		{"a request behind chunks, by the length", post(fmt.Sprintf("Content-Length: %d\r\n", 5+len(inside))+chunked, "0\r\n\r\n"+strings.Replace(inside, p.bearer, "canary", 1)), "400"},
		{"keep-alive of HTTP/1.0", strings.Replace(get("Host: x\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n"), "HTTP/1.1", "HTTP/1.0", 1), "200"},
		{"chunks of HTTP/1.0", strings.Replace(post(chunked, "c\r\n"+form+"\r\n0\r\n\r\n"), "HTTP/1.1", "HTTP/1.0", 1), "400"},
		{"chunks twice", post("Transfer-Encoding: chunked, chunked", "0\r\n\r\n"), "501"},
		{"chunks in two headers", post(chunked+"\r\n"+chunked, "0\r\n\r\n"), "501"},
		{"chunks under another name", post("Transfer-Encoding: xchunked", "0\r\n\r\n"), "501"},
		{"chunks with a tab", post("Transfer-Encoding:\tchunked", "c\r\n"+form+"\r\n0\r\n\r\n"), "200"},
		{"chunks with a vertical tab", post("Transfer-Encoding: \x0bchunked", "0\r\n\r\n"), "400"},
		{"identity", post("Transfer-Encoding: identity\r\nContent-Length: 12", form), "501"},
		{"gzip", post("Transfer-Encoding: gzip, chunked", "0\r\n\r\n"), "501"},
		{"a chunk of a size that is none", post(chunked, "zz\r\n"+form+"\r\n0\r\n\r\n"), "400"},
		{"a chunk of a negative size", post(chunked, "-1\r\n"+form+"\r\n0\r\n\r\n"), "400"},
		{"a chunk of a size beyond all numbers", post(chunked, "ffffffffffffffffff\r\n"+form+"\r\n0\r\n\r\n"), "400"},
		{"a chunk that is too short", post(chunked, "5\r\n"+form+"\r\n0\r\n\r\n"), "400"},
		{"a chunk with a long extension", post(chunked, "c;"+strings.Repeat("canary", 17000)+"\r\n"+form+"\r\n0\r\n\r\n"), "400"},
		{"chunks with bare line feeds", post(chunked, "c\n"+form+"\n0\n\n"), "400"},
		{"many small chunks", post(chunked, strings.Repeat("1\r\na\r\n", 15000)+"0\r\n\r\n"), "400"},
		{"chunks beyond 16 kB", post(chunked, "11000\r\n"+strings.Repeat("a", 0x11000)+"\r\n0\r\n\r\n"), "413"},
		{"a trailer with a token", strings.Replace(post(chunked+"\r\nTrailer: X-A", "0\r\nAuthorization: Bearer "+p.bearer+"\r\n\r\n"), "Bearer "+p.bearer, "canary", 1), "401"},
	} {
		answers, err := p.exchange(row.text+next, answerTime)
		var got []string
		for _, a := range answers {
			got = append(got, fmt.Sprint(a.status))
			if _, known := httpRefusals[a.status]; known && a.body == nil { // net/http's own
				continue
			}
			if fault := faultOf(a, "GET"); fault != "" {
				t.Errorf("%s: %v %s", row.name, a, fault)
			}
		}
		if strings.Join(got, " ") != row.want || err != nil {
			t.Errorf("%s = %q (%v), want %q", row.name, got, err, row.want)
		}
	}
	// Those who go away in the middle are no fault, and cost nobody else.
	whole := post("Content-Length: 12", form)
	for i := range len(whole) {
		conn := p.dial()
		io.WriteString(conn, whole[:i])
		if i%2 == 0 {
			conn.(*net.TCPConn).SetLinger(0) // a reset
		}
		conn.Close()
	}
	many := strings.Repeat(next, 200)
	answers, err := p.exchange(many, answerTime)
	if len(answers) != 200 || err != nil {
		t.Errorf("200 requests in a row = %d answers, %v", len(answers), err)
	}
	p.want(p.form(p.id, p.secret, "/introspect", "token="+p.bearer), 200, "")
	if a := p.api(p.bearer, "GET", "/agents/"+p.id, ""); a.text("status") != "active" {
		t.Errorf("after all that, the agent is %v", a)
	}
	p.wantLines(nil)
}

// Whoever opens connections and then keeps silent is cut, and costs nobody
// else anything meanwhile.
func TestSilentConnectionsHarmNobodyAndAreCut(t *testing.T) {
	t.Parallel()
	const connections = 200
	p := newProgram(t, newDatabase(t), newRedis(t))
	body := "Host: x\r\nContent-Length: 500\r\nContent-Type: "
	for name, begin := range map[string]string{
		"nothing":                     "",
		"half a line":                 "POST /api/v1/to",
		"half a header":               "POST /api/v1/token HTTP/1.1\r\nHost: x\r\nAuthorization: Basic ",
		"half a form":                 "POST /api/v1/token HTTP/1.1\r\n" + body + formType + "\r\n\r\ngrant_type=client_credentials&client_id=" + p.id,
		"half an agent":               "POST /api/v1/agents HTTP/1.1\r\n" + body + "application/json\r\nAuthorization: Bearer " + p.bearer + "\r\n\r\n{\"email\":",
		"no body, where none is read": "GET /livez HTTP/1.1\r\n" + body + "x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := *p.service
			q.t = t
			opened := time.Now()
			var open sync.WaitGroup
			var cut atomic.Int64
			answered := strings.HasPrefix(begin, "GET")
			for range connections {
				conn := q.dial()
				defer conn.Close()
				conn.SetDeadline(opened.Add(time.Minute))
				io.WriteString(conn, begin)
				open.Go(func() {
					text, err := io.ReadAll(conn)
					if cut.Add(1); err != nil && !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("was not cut: %v", err)
					}
					if status, _, _ := strings.Cut(strings.TrimPrefix(string(text), "HTTP/1.1 "), " "); answered && status != "200" || !answered && status != "" && status != "400" {
						t.Errorf("was answered %.200q", text)
					}
				})
			}
			q.serves()
			for cut.Load() == 0 {
				q.serves()
				time.Sleep(200 * time.Millisecond)
			}
			open.Wait()
			// 5 s for a header, 10 s for all, and slack.
			if took := time.Since(opened); took > 25*time.Second {
				t.Errorf("the last was cut after %s", took)
			}
			q.serves()
		})
	}
}

// serves wants everyday requests to be answered as usual.
func (v *service) serves() {
	v.t.Helper()
	for range 5 {
		for what, do := range map[string]func() answer{
			"a token":          func() answer { return v.form(v.id, v.secret, "", "grant_type=client_credentials") },
			"an introspection": func() answer { return v.form(v.id, v.secret, "/introspect", "token="+v.bearer) },
			"the keys":         func() answer { return v.do("GET", "/.well-known/jwks.json", "") },
			"a bearer's agent": func() answer { return v.api(v.bearer, "GET", "/agents/"+v.id, "") },
		} {
			begun := time.Now()
			if a := do(); a.status != 200 || time.Since(begun) > answerTime {
				v.t.Errorf("%s = %v after %s, want 200", what, a, time.Since(begun))
			}
		}
	}
}

// Wrong secrets that get as far as bcrypt take its slot from each other, and
// not the time of those whose secret is known. The multiple is generous: on two
// cores, one of which bcrypt has. Without the slots introspection ends in 503.
func TestWrongSecretsDoNotSlowIntrospection(t *testing.T) {
	const (
		multiple  = 25 // of the quiet time, at the median
		attackers = 200
		asked     = 60
	)
	p := newProgram(t, newDatabase(t), newRedis(t), "RATE_LIMIT_PER_MINUTE", "1000", "TRUSTED_PROXIES", "127.0.0.0/8")
	median := func() time.Duration {
		t.Helper()
		var took []time.Duration
		for range asked {
			begun := time.Now()
			if a := p.form(p.id, p.secret, "/introspect", "token="+p.bearer); a.status != 200 || a.body["active"] != true {
				t.Fatalf("an introspection = %v, want it active", a)
			}
			took = append(took, time.Since(begun))
		}
		slices.Sort(took)
		return took[asked/2]
	}
	quiet := median()
	wrong := p.secret[:24] + strings.Repeat("0", 48) // the prefix is right, so the hash is compared
	stop := make(chan struct{})
	got, before := make(chan map[int]int), p.cpu(t)
	var begun sync.WaitGroup
	begun.Add(attackers)
	go func() {
		var mu sync.Mutex
		statuses := map[int]int{}
		var group sync.WaitGroup
		for i := range attackers {
			group.Go(func() {
				for n := 0; ; n++ {
					q, _ := http.NewRequest("POST", p.url+"/api/v1/token", strings.NewReader("grant_type=client_credentials"))
					q.Header.Set("Content-Type", formType)
					q.Header.Set("X-Forwarded-For", fmt.Sprintf("203.%d.%d.%d", n%250, i/250, i%250))
					q.SetBasicAuth(p.id, wrong)
					if n == 0 {
						begun.Done()
					}
					a := p.send(q)
					mu.Lock()
					statuses[a.status]++
					mu.Unlock()
					select {
					case <-stop:
						return
					default:
					}
				}
			})
		}
		group.Wait()
		got <- statuses
	}()
	begun.Wait()
	p.eventually("wrong secrets are being compared", func() bool { return p.cpu(t)-before > 300*time.Millisecond })
	busy := median()
	close(stop)
	statuses := <-got
	t.Logf("an introspection takes %s, beside %d wrong secrets at once %s; those were answered %v", quiet, attackers, busy, statuses)
	if busy > multiple*quiet {
		t.Errorf("beside %d wrong secrets an introspection takes %s, want at most %d times the %s of before", attackers, busy, multiple, quiet)
	}
	for status := range statuses {
		if status != 401 && status != 503 || statuses[401] == 0 {
			t.Fatalf("wrong secrets were answered %v, want 401, or 503 where they waited in vain", statuses)
		}
	}
	// Or they never got to bcrypt, and nothing is shown: it takes some 40 ms.
	if each := (p.cpu(t) - before) / time.Duration(statuses[401]); each < 20*time.Millisecond {
		t.Errorf("a wrong secret took %s of processor time, want that of bcrypt", each)
	}
}

// Whoever guesses secrets of a client is stopped, however he writes its id and
// wherever he asks, and the client notices nothing of it.
func TestBruteForceIsStoppedAndItsAimUntouched(t *testing.T) {
	t.Parallel()
	const limit = 20
	p := newProgram(t, newDatabase(t), newRedis(t), "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit), "TRUSTED_PROXIES", "127.0.0.0/8")
	id, secret := p.quickClient("tokens:read")
	from := func(address, path, id, secret string, basic bool) answer {
		t.Helper()
		form := "grant_type=client_credentials&token=x"
		if !basic {
			form += "&client_id=" + url.QueryEscape(id) + "&client_secret=" + secret
		}
		q, err := http.NewRequest("POST", p.url+"/api/v1/token"+path, strings.NewReader(form))
		if err != nil {
			t.Fatal(err)
		}
		q.Header.Set("Content-Type", formType)
		q.Header.Set("X-Forwarded-For", address)
		if basic {
			q.SetBasicAuth(id, secret)
		}
		return p.send(q)
	}
	client := func(address string) int64 {
		t.Helper()
		return p.want(from(address, "", id, secret, true), 200, "").number(t, "X-RateLimit-Remaining")
	}
	client("192.0.2.1") // so that this copy knows its secret
	upper, bare := strings.ToUpper(id), strings.ReplaceAll(id, "-", "")
	spellings := []string{id, upper, "{" + id + "}", "{" + upper + "}", bare, strings.ToUpper(bare), "urn:uuid:" + id, "URN:UUID:" + id, " " + id, id + " ",
		id + "\x00", id + "\n", bare[:4] + "-" + bare[4:], "0x" + bare, id[:35] + "%" + fmt.Sprintf("%x", id[35])}
	wrong := secret[:24] + strings.Repeat("0", 48)
	for name, address := range map[string]func(i int) string{
		"one IPv4 address":          func(int) string { return "203.0.113.7" },
		"one IPv4 address, as IPv6": func(i int) string { return []string{"198.51.100.7", "::ffff:198.51.100.7", "::ffff:c633:6407"}[i%3] },
		"a /64 of IPv6":             func(i int) string { return fmt.Sprintf("2001:db8:1:2:%x::%x", i, 7*i) },
		"a /64 of IPv6, as it pleases": func(i int) string {
			return fmt.Sprintf([]string{"2001:DB8:1:3::%x", "2001:0db8:0001:0003::%x%%eth0", "2001:db8:1:3:0:0:0:%x"}[i%3], i)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p.forget()
			before := client("192.0.2.1")
			begun, refused := time.Now(), 0
			refusal := ""
			for i := range 5 * len(spellings) {
				a := from(address(i), []string{"", "/introspect", "/revoke"}[i%3], spellings[i%len(spellings)], wrong, i%2 == 0)
				switch {
				case a.status == 401:
					if refused++; refusal == "" {
						refusal = a.raw
					}
					if a.raw != refusal {
						t.Errorf("as %q, a wrong secret = %s, and otherwise %s", spellings[i%len(spellings)], a, refusal)
					}
				case a.status != 429 || a.number(t, "Retry-After") < 1:
					t.Errorf("as %q, a wrong secret = %v, want 401 or 429 with Retry-After", spellings[i%len(spellings)], a)
				}
			}
			// As time goes on, the window of a minute lets some more through.
			if most := limit + 1 + int(time.Since(begun)/(time.Minute/limit)); refused < limit || refused > most {
				t.Errorf("%d guesses were answered, want %d to %d", refused, limit, most)
			}
			after := client("192.0.2.1")
			if used := before - after; used != 1 && time.Since(begun) < 30*time.Second {
				t.Errorf("its X-RateLimit-Remaining went from %d to %d, want one less", before, after)
			}
			client(address(1))
			if a := from("192.0.2.2", "", id, wrong, true); a.status != 401 {
				t.Errorf("from another address a wrong secret = %v, want 401", a)
			}
			var owners []string
			for _, key := range p.keys("rate:*:*") {
				owner := key[:strings.LastIndex(key, ":")]
				if !slices.Contains(owners, owner) {
					owners = append(owners, owner)
				}
			}
			if len(owners) != 3 { // the client, the guesser, and 192.0.2.2
				t.Errorf("requests are counted for %q, want the client and two addresses", owners)
			}
		})
	}
	p.forget()
	// The right secret under another spelling is no other answer, either.
	refusal := from("192.0.2.3", "", id, wrong, true).raw
	for i, spelling := range spellings[1:] {
		if a := from(fmt.Sprintf("192.0.2.%d", 10+i), "", spelling, secret, true); a.status != 401 || a.raw != refusal {
			if decoded, _ := url.QueryUnescape(spelling); decoded != id { // Basic is form-encoded
				t.Errorf("as %q, the right secret = %v, want %s", spelling, a, refusal)
			}
		}
	}
}
