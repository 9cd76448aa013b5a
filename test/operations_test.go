package test

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What operators do to a service that runs.

// keyFiles are those that a copy reads its keys from.
type keyFiles struct {
	t               testing.TB
	private, public string
}

func newKeyFiles(t testing.TB, private, public string) keyFiles {
	t.Helper()
	f := keyFiles{t, filepath.Join(t.TempDir(), "jwt.pem"), filepath.Join(t.TempDir(), "jwt.pub")}
	f.set(private, public)
	return f
}

func (f keyFiles) set(private, public string) {
	f.t.Helper()
	if err := errors.Join(os.WriteFile(f.public, []byte(public), 0o600), os.WriteFile(f.private, []byte(private), 0o600)); err != nil {
		f.t.Fatal(err)
	}
}

// env makes them those of a copy.
func (f keyFiles) env(env ...string) []string {
	return append(env, "JWT_PRIVATE_KEY", "", "JWT_PRIVATE_KEY_FILE", f.private, "JWT_PUBLIC_KEY_FILE", f.public)
}

// hangup sends a SIGHUP, and returns the line that the program logs of it.
func (p *program) hangup() (line string) {
	p.t.Helper()
	before := len(p.log.String())
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.eventually("it has read its keys", func() bool {
		for line = range strings.Lines(p.log.String()[before:]) {
			if strings.Contains(line, `"msg":"keys read"`) || strings.Contains(line, `"msg":"keys not read, `) {
				return true
			}
		}
		return false
	})
	return line
}

// kids are those that a copy publishes.
func (v *service) kids() (list []string) {
	v.t.Helper()
	for _, key := range v.want(v.do("GET", "/.well-known/jwks.json", ""), 200, "").body["keys"].([]any) {
		list = append(list, key.(map[string]any)["kid"].(string))
	}
	return list
}

func kidsOf(t testing.TB, keys ...string) (list []string) {
	for _, key := range keys {
		list = append(list, kidOf(t, sign(t, key, accessToken, claims{})))
	}
	return list
}

func kidOf(t testing.TB, token string) string {
	var header struct{ Kid string }
	if err := json.Unmarshal([]byte(readPart(t, token, 0)), &header); err != nil {
		t.Error(err)
	}
	return header.Kid
}

// A rotation is two copies whose keys are exchanged under load.
type rotation struct {
	t      *testing.T
	copies [2]*program
	rounds atomic.Int64 // of the load
	mu     sync.Mutex
	signed map[string]int // tokens, by kid
	tokens []rotated
}

type rotated struct {
	token string
	exp   time.Time
}

// ask fails the test where the answer is another one than 200.
func (ro *rotation) ask(v *program, method, path, body, authorization string) (a answer) {
	q, err := http.NewRequest(method, v.url+path, strings.NewReader(body))
	if err == nil {
		q.Header.Set("Authorization", authorization)
		if body != "" {
			q.Header.Set("Content-Type", formType)
		}
		var response *http.Response
		if response, err = testClient.Do(q); err == nil {
			var raw []byte
			raw, err = io.ReadAll(response.Body)
			response.Body.Close()
			a = answer{status: response.StatusCode, raw: string(raw)}
			json.Unmarshal(raw, &a.body)
		}
	}
	if err != nil || a.status != 200 {
		ro.t.Errorf("%s %s = %v, %v, want 200", method, path, a, err)
	}
	return a
}

// load gets tokens of one copy and shows them to both, until they expire; and
// reads the log by a cursor of the one on the other.
func (ro *rotation) load(n int, stop chan struct{}) {
	first := ro.copies[0]
	secret := basic(first.id, first.secret)
	for ; ; n++ {
		select {
		case <-stop:
			return
		default:
		}
		here, there := ro.copies[n%2], ro.copies[(n+1)%2]
		begun := time.Now() // the answer may be long on its way
		a := ro.ask(here, "POST", "/api/v1/token", "grant_type=client_credentials", secret)
		k := rotated{a.text("access_token"), begun}
		if life, ok := a.body["expires_in"].(float64); ok {
			k.exp = k.exp.Add(time.Duration(life) * time.Second)
		} else {
			return // it is a failure already
		}
		kid := kidOf(ro.t, k.token)
		for _, v := range ro.copies { // as a service does that hasn't seen this kid
			if keys := ro.ask(v, "GET", "/.well-known/jwks.json", "", ""); !strings.Contains(keys.raw, `"kid":"`+kid+`"`) {
				ro.t.Errorf("a token has the kid %s, which is not published", kid)
			}
		}
		ro.mu.Lock()
		ro.signed[kid]++
		ro.tokens = slices.DeleteFunc(append(ro.tokens, k), func(k rotated) bool { return time.Now().After(k.exp) })
		shown := []rotated{k, ro.tokens[0]}
		ro.mu.Unlock()
		for _, k := range shown {
			for _, v := range []*program{there, here} {
				asked := ro.ask(v, "POST", "/api/v1/token/introspect", "token="+k.token, secret)
				if asked.body["active"] != true && time.Now().Before(k.exp.Add(-time.Second)) { // exp is in whole seconds
					ro.t.Errorf("a token of the kid %s that ends at %s is %v", kidOf(ro.t, k.token), k.exp, asked)
				}
			}
		}
		if time.Now().Before(k.exp.Add(-2 * time.Second)) {
			page := ro.ask(here, "GET", "/api/v1/audit?limit=1", "", "Bearer "+k.token)
			if time.Now().Before(k.exp.Add(-2 * time.Second)) {
				ro.ask(there, "GET", "/api/v1/audit?limit=1&cursor="+url.QueryEscape(page.text("nextCursor")), "", "Bearer "+k.token)
			}
		}
		ro.rounds.Add(1)
	}
}

// settle waits until the load has gone round a few times more.
func (ro *rotation) settle() {
	ro.t.Helper()
	until := ro.rounds.Load() + 6
	ro.copies[0].eventually("the load goes on", func() bool { return ro.t.Failed() || ro.rounds.Load() >= until })
}

func TestKeysRotateByHangupUnderLoad(t *testing.T) {
	t.Parallel()
	for name, keys := range map[string][2]string{"RS256": {testKey(), secondKey()}, "RS256 to ES256": {testKey(), ellipticKey()}} {
		t.Run(name, func(t *testing.T) { rotateByHangup(t, keys[0], keys[1]) })
	}
}

func rotateByHangup(t *testing.T, old, next string) {
	const ttl = 5 * time.Second
	files := [2]keyFiles{newKeyFiles(t, old, ""), newKeyFiles(t, old, "")}
	p := newProgram(t, newPostgres(t).url(), newRedisServer(t).url(), files[0].env("TOKEN_TTL", "5s")...)
	ro := &rotation{t: t, copies: [2]*program{p, p.another(files[1].env()...)}, signed: map[string]int{}}
	pids := [2]int{ro.copies[0].cmd.Process.Pid, ro.copies[1].cmd.Process.Pid}
	kids := kidsOf(t, old, next)
	turn := func(i int, private, public string, want ...string) {
		t.Helper()
		files[i].set(private, public)
		list, _ := json.Marshal(want)
		if line := ro.copies[i].hangup(); !strings.Contains(line, `"keys read","kids":`+string(list)) {
			t.Fatalf("of the hangup it logs %s, want the kids %s", line, list)
		}
		if got := ro.copies[i].kids(); !slices.Equal(got, want) {
			t.Fatalf("published are %q, want %q", got, want)
		}
	}
	// A token of the old key that outlives it.
	now, credentialID := time.Now(), newID()
	anHour := claims{Issuer: "http://idp.test", Subject: p.id, Audience: audience{"http://idp.test"}, ClientID: p.id,
		Scope: agentsRead + " " + auditRead, ID: newID(), IssuedAt: now.Unix(), Expires: now.Add(time.Hour).Unix(),
		CredentialID: credentialID, SecretID: p.secretOf(p.id, credentialID)}
	lasting := sign(t, old, accessToken, anHour)
	counts := func(i int, want bool) {
		t.Helper()
		if got := ro.copies[i].active(lasting); got != want {
			t.Errorf("copy %d calls a token of the old key active: %v, want %v", i, got, want)
		}
		status := map[bool]int{true: 200, false: 401}[want]
		if a := ro.copies[i].api(lasting, "GET", "/agents", ""); a.status != status {
			t.Errorf("copy %d answers a token of the old key %v, want %d", i, a, status)
		}
	}

	stop, group := make(chan struct{}), sync.WaitGroup{}
	for n := range 2 {
		group.Go(func() { ro.load(n, stop) })
	}
	ro.settle()
	turn(0, old, publicPEM(t, next), kids[0], kids[1])
	ro.settle()
	turn(1, old, publicPEM(t, next), kids[0], kids[1])
	ro.settle()
	turn(0, next, publicPEM(t, old), kids[1], kids[0])
	ro.settle() // one signs with the next, one with the old
	counts(0, true)
	counts(1, true)
	turn(1, next, publicPEM(t, old), kids[1], kids[0])
	for end := time.Now().Add(ttl); time.Now().Before(end) && !t.Failed(); {
		ro.settle()
	}
	ro.mu.Lock()
	ofOld := ro.signed[kids[0]]
	ro.mu.Unlock()
	counts(0, true)
	turn(0, next, "", kids[1])
	counts(0, false)
	counts(1, true)
	ro.settle()
	turn(1, next, "", kids[1])
	counts(1, false)
	ro.settle()
	close(stop)
	group.Wait()
	if len(ro.signed) != 2 || ro.signed[kids[0]] < 6 || ro.signed[kids[0]] != ofOld || ro.signed[kids[1]] < 6 {
		t.Errorf("the kids have signed %v (%d the old one when it was retired), want many of %q", ro.signed, ofOld, kids)
	}
	for i, v := range ro.copies {
		if v.cmd.Process.Pid != pids[i] || len(v.exited) > 0 {
			t.Errorf("copy %d was restarted", i)
		}
	}
	p.bearer = sign(t, next, accessToken, anHour) // one of the service might end before the log does
	p.checkChain()
}

func TestHangupWithWrongFilesKeepsTheKeys(t *testing.T) {
	t.Parallel()
	files := newKeyFiles(t, testKey(), "")
	database := filepath.Join(t.TempDir(), "database")
	postgres := newPostgres(t)
	if err := os.WriteFile(database, []byte(postgres.url()), 0o600); err != nil {
		t.Fatal(err)
	}
	p := newProgram(t, postgres.url(), newRedisServer(t).url(), files.env()...)
	p = p.another("DATABASE_URL", "", "DATABASE_URL_FILE", database)
	kids := kidsOf(t, testKey(), ellipticKey())
	other := secondKey()
	for _, row := range []struct {
		name            string
		private, public string // - is no file
		want            string // in the line of the log
	}{
		{"no private key", "-", "", "JWT_PRIVATE_KEY has a file that can't be read"},
		{"an empty one", "", "", "JWT_PRIVATE_KEY has an empty file"},
		{"no key at all", "canary", "", "JWT_PRIVATE_KEY is not right"},
		{"half a key", other[:len(other)/2], "", "JWT_PRIVATE_KEY is not right"},
		{"a public key", publicPEM(t, other), "", "JWT_PRIVATE_KEY is not right"},
		{"two keys", other + ellipticKey(), "", "JWT_PRIVATE_KEY is not right"},
		{"no public key", other, "-", "JWT_PUBLIC_KEY has a file that can't be read"},
		{"no public key at all", other, "canary", "JWT_PUBLIC_KEY is not right"},
		{"a good public key and a bad one", other, publicPEM(t, testKey()) + "canary", "JWT_PUBLIC_KEY is not right"},
	} {
		files.set(row.private, row.public)
		for name, text := range map[string]string{files.private: row.private, files.public: row.public} {
			if text == "-" {
				os.Remove(name)
			}
		}
		line := p.hangup()
		if !strings.Contains(line, `"level":"ERROR","msg":"keys not read, the old ones stay"`) || !strings.Contains(line, row.want) || strings.Contains(line, filepath.Dir(files.private)) {
			t.Errorf("with %s it logs %s, want an error of %q", row.name, line, row.want)
		}
		if got := p.kids(); !slices.Equal(got, kids[:1]) {
			t.Errorf("with %s, published are %q, want %q as before", row.name, got, kids[:1])
		}
		if kid := kidOf(t, p.token(p.id, p.secret, "")); kid != kids[0] || !p.active(p.bearer) {
			t.Errorf("with %s, tokens are signed by %s, and old ones are active: %v", row.name, kid, p.active(p.bearer))
		}
	}
	// Nothing but the keys is read again.
	os.Remove(database)
	files.set(ellipticKey(), publicPEM(t, testKey()))
	if line := p.hangup(); !strings.Contains(line, `"level":"INFO","msg":"keys read"`) {
		t.Errorf("with good keys it logs %s", line)
	}
	if kid := kidOf(t, p.token(p.id, p.secret, "")); kid != kids[1] || !p.active(p.bearer) {
		t.Errorf("with good keys, tokens are signed by %s, want %s", kid, kids[1])
	}
}

// Keys that are given by value are the same again; and a hangup while it starts
// doesn't end it.
func TestHangupIsHarmless(t *testing.T) {
	t.Parallel()
	postgres := newPostgres(t)
	p := newProgram(t, postgres.url(), newRedisServer(t).url())
	for range 3 {
		if line := p.hangup(); !strings.Contains(line, `"keys read","kids":["`+kidsOf(t, testKey())[0]+`"]`) {
			t.Errorf("of a hangup it logs %s, want its key", line)
		}
	}
	if !p.active(p.bearer) {
		t.Error("after a hangup, a token is not active")
	}
	p.stop(t, syscall.SIGTERM)
	postgres.stop(t, syscall.SIGINT)
	begun := len(p.log.String())
	since := func(what string) bool { return strings.Contains(p.log.String()[begun:], what) }
	cmd := p.build()
	cmd.Stderr = p.log
	p.process = startProcess(t, cmd, syscall.SIGKILL)
	p.eventually("it waits for PostgreSQL", func() bool { return since("waiting for PostgreSQL") })
	p.cmd.Process.Signal(syscall.SIGHUP)
	postgres.start()
	p.eventually("it serves, with its keys read again", func() bool { return since(`"msg":"serving"`) && since(`"msg":"keys read"`) })
	<-p.log.serving
	if err := p.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

func TestKeygenPrintsPKCS8(t *testing.T) {
	for args, want := range map[string]string{"keygen": "*rsa.PrivateKey", "keygen RS256": "*rsa.PrivateKey", "keygen ES256": "*ecdsa.PrivateKey"} {
		out, err := command(t.Context(), nil, io.Discard, strings.Fields(args)...)
		if err != nil {
			t.Fatal(err)
		}
		block, rest := pem.Decode([]byte(out))
		if block == nil || block.Type != "PRIVATE KEY" || len(rest) > 0 {
			t.Fatalf("%s printed what is not one PEM block of PKCS#8", args)
		}
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if got := fmt.Sprintf("%T", key); err != nil || got != want {
			t.Errorf("%s printed a %s, %v, want a %s", args, got, err, want)
		}
	}
}

// export is the operator's command; lines are without their ends.
func (v *service) export(args ...string) (lines []string, err error) {
	v.t.Helper()
	out, err := command(v.t.Context(), v.env, testLog, append([]string{"audit-export"}, args...)...)
	if out != "" && !strings.HasSuffix(out, "}\n") {
		v.t.Errorf("audit-export ends with %.100q", out[max(0, len(out)-100):])
	}
	return strings.Split(strings.TrimSuffix(out, "\n"), "\n"), err
}

var checkpointLine = regexp.MustCompile(`^\{"checkpoint":"(eyJ[\w.-]+)"\}$`)

func TestExportIsWhatTheAPIServes(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for _, agent := range []string{"<b>&amp;\u2028", "Ünï \"quoted\" \\", "\xff\xfe", ""} {
		v.do("GET", "/api/v1/audit", "", "Authorization", "Bearer "+v.bearer, "User-Agent", agent)
		v.do("POST", "/api/v1/token", "grant_type=client_credentials", "Authorization", basic(newID(), "x"), "Content-Type", formType, "User-Agent", agent)
	}
	id, secret := v.newClient("resumes:read", "scores:*")
	v.active(v.token(id, secret, ""))
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"owner":"a <b> & \u2028"}`), 200, "")
	chain := v.checkChain()
	if len(chain) < 10 {
		t.Fatalf("the chain has %d events", len(chain))
	}
	all, err := v.export()
	if err != nil || len(all) != len(chain)+1 {
		t.Fatalf("audit-export = %d lines, %v, want %d and a checkpoint", len(all), err, len(chain))
	}
	for i, e := range chain {
		if served := v.want(v.api(v.bearer, "GET", "/audit/"+e.EventID, ""), 200, ""); served.raw != all[i]+"\n" {
			t.Errorf("audit-export prints %s, and served is %s", all[i], served.raw)
		}
	}
	signed := checkpointLine.FindStringSubmatch(all[len(chain)])
	if signed == nil {
		t.Fatalf("the last line is %s, want a checkpoint", all[len(chain)])
	}
	if out, err := v.verifyAudit(signed[1]); err != nil || !strings.Contains(out, fmt.Sprintf("extends the checkpoint at seq %d\n", len(chain))) {
		t.Errorf("verify-audit with that checkpoint = %q, %v", out, err)
	}
	for _, from := range []int{1, 2, 7, len(chain)} {
		some, err := v.export(fmt.Sprint(from))
		if err != nil || !slices.Equal(some[:len(some)-1], all[from-1:len(chain)]) || !checkpointLine.MatchString(some[len(some)-1]) {
			t.Errorf("audit-export %d = %d lines, %v, want the %d from there on and a checkpoint", from, len(some), err, len(chain)-from+1)
		}
	}
	for from, want := range map[string]string{
		fmt.Sprint(len(chain) + 1): "beyond the end", "1000000": "beyond the end",
		"0": "FROM_SEQ", "-1": "-1", "x": "FROM_SEQ", "01": "FROM_SEQ", "": "FROM_SEQ",
	} {
		if lines, err := v.export(from); err == nil || !strings.Contains(err.Error(), want) || lines[0] != "" {
			t.Errorf("audit-export %q = %q, %v, want an error of %s", from, lines, err, want)
		}
	}
	if _, err := v.export("1", "2"); err == nil || !strings.Contains(err.Error(), "-h") {
		t.Errorf("audit-export 1 2 = %v, want an error that tells of -h", err)
	}
}

func TestExportOfAnEmptyLogAndOfAnOldOne(t *testing.T) {
	t.Parallel()
	v := &service{t: t, env: programEnv(newDatabase(t), newRedis(t))}
	if lines, err := v.export(); err != nil || len(lines) != 1 || lines[0] != `{"checkpoint":null}` {
		t.Errorf("audit-export of an empty log = %q, %v, want no checkpoint", lines, err)
	}
	var history []servedEvent
	for days := 100; days >= 98; days-- { // none of them is served
		history = append(history, forgeEvent(history, time.Now().AddDate(0, 0, -days), "token.issued"))
	}
	v.env["DATABASE_URL"] = newHistory(t, "", history)
	if lines, err := v.export(); err != nil || len(lines) != 4 || !strings.Contains(lines[2], `"seq":3,`) || !checkpointLine.MatchString(lines[3]) {
		t.Errorf("audit-export of old events = %q, %v, want all three and a checkpoint", lines, err)
	}
}

func TestExportOfAnAlteredLogNamesTheSeq(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for range 8 {
		v.active(v.bearer)
	}
	chain := v.checkChain()
	alter := func(sql string) { // each command makes the triggers again
		t.Helper()
		for _, name := range v.relations() {
			v.exec(`drop trigger if exists append_only on ` + name)
		}
		v.exec(sql)
	}
	for _, row := range []struct {
		alter string
		from  string
		lines int // that are good
		bad   int // 0: none
	}{
		{`update audit_events set user_agent = 'x' where seq = 5`, "1", 4, 5},
		{`update audit_events set user_agent = 'x' where seq = 5`, "3", 2, 5},
		{`update audit_events set user_agent = 'x' where seq = 5`, "5", 0, 5},
		{`update audit_events set user_agent = 'x' where seq = 5`, "6", len(chain) - 5, 0}, // it is linked to that hash
		{`update audit_events set hash = sha256('x') where seq = 5`, "6", 0, 6},
		{`delete from audit_events where seq = 5`, "1", 4, 5},
		{`update audit_events set user_agent = 'x' where seq = 1`, "1", 0, 1},
		{fmt.Sprintf(`update audit_events set user_agent = 'x' where seq = %d`, len(chain)), "1", len(chain) - 1, len(chain)},
	} {
		alter(row.alter)
		lines, err := v.export(row.from)
		lines = slices.DeleteFunc(lines, func(line string) bool { return line == "" })
		if row.bad != 0 && (err == nil || !strings.HasSuffix(err.Error(), fmt.Sprintf("the first bad seq is %d", row.bad)) || len(lines) != row.lines) {
			t.Errorf("%s: audit-export %s = %d lines, %v, want %d, and %d bad", row.alter, row.from, len(lines), err, row.lines, row.bad)
		}
		if row.bad == 0 && (err != nil || len(lines) != row.lines+1) {
			t.Errorf("%s: audit-export %s = %d lines, %v, want %d and a checkpoint", row.alter, row.from, len(lines), err, row.lines)
		}
		if signed := strings.Contains(strings.Join(lines, "\n"), "checkpoint"); signed != (row.bad == 0) {
			t.Errorf("%s: audit-export %s signs a checkpoint: %v", row.alter, row.from, signed)
		}
		alter(`truncate audit_events`)
		insertEvents(t, v.db, chain)
	}
}

// The real program, with 20,000 events of 2 kB.
func TestExportStreams(t *testing.T) {
	t.Parallel()
	const events = 20_000
	history := make([]servedEvent, 0, events)
	at, metadata := time.Now().Add(-time.Hour), json.RawMessage(`{"note":"`+strings.Repeat("x", 2000)+`"}`)
	for range events {
		e := forgeEvent(history[max(0, len(history)-1):], at, "token.issued")
		e.Seq, e.Metadata = int64(len(history)+1), metadata
		e.Hash = e.documentedHash()
		history = append(history, e)
	}
	p := &program{service: &service{t: t, env: programEnv(newHistory(t, "", history), newRedis(t))}}
	memory := func(from, want int) (most float64) { // MB
		t.Helper()
		cmd := p.build("audit-export", fmt.Sprint(from))
		var log bytes.Buffer
		cmd.Stderr = &log
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		lines, last := 0, ""
		for scanner := bufio.NewScanner(out); scanner.Scan(); lines++ {
			last = scanner.Text()
			if lines%100 == 0 && lines < want-100 { // it waits for us, since a pipe takes 64 kB
				most = max(most, (&process{cmd: cmd}).memory(t))
			}
		}
		if err := cmd.Wait(); err != nil || lines != want+1 || !checkpointLine.MatchString(last) {
			t.Fatalf("audit-export %d printed %d lines: %v: %s", from, lines, err, log.Bytes())
		}
		return most
	}
	few, all := memory(events-199, 200), memory(1, events)
	if few == 0 || all-few > 30 { // they are 49 MB together
		t.Errorf("audit-export takes %.1f MB for 200 events, %.1f for %d", few, all, events)
	}
	t.Logf("audit-export takes %.1f MB for 200 events, %.1f for %d", few, all, events)

	// And so does who checks it, in lines that come one by one.
	w, lines := newWitness(newService(t)), strings.SplitAfter(p.command("audit-export"), "\n")
	checking := func(from int) (most float64) {
		t.Helper()
		cmd := p.build("verify-audit", "-file", "-", "-jwks", w.jwks)
		cmd.Env = nil
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		in, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		for i := from; err == nil && i < len(lines); i++ {
			if _, err = io.WriteString(in, lines[i]); i%100 == 0 && i < events {
				most = max(most, (&process{cmd: cmd}).memory(t))
			}
		}
		if err = errors.Join(err, in.Close(), cmd.Wait()); err != nil || !strings.HasPrefix(out.String(), fmt.Sprintf("verified: %d events", events-from)) {
			t.Fatalf("verify-audit of an export from %d on = %v, %s", from, err, out.Bytes())
		}
		return most
	}
	few, all = checking(events-200), checking(0)
	if few == 0 || all-few > 30 {
		t.Errorf("verify-audit of an export takes %.1f MB for 200 events, %.1f for %d", few, all, events)
	}
	t.Logf("verify-audit of an export takes %.1f MB for 200 events, %.1f for %d", few, all, events)

	cmd := p.build("audit-export")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	io.ReadFull(out, make([]byte, 100))
	out.Close()
	if err := cmd.Wait(); err == nil {
		t.Error("audit-export whose reader has gone ended with 0")
	}
	// An altered log, by its exit status.
	p.env["DATABASE_URL"] = newHistory(t, "", slices.Delete(history[:50], 20, 21))
	bad, err := p.build("audit-export").CombinedOutput()
	exit, ended := errors.AsType[*exec.ExitError](err)
	if !ended || exit.ExitCode() != 1 || !strings.HasSuffix(string(bad), "agentidp: the audit log was altered: the first bad seq is 21\n") {
		t.Errorf("audit-export of an altered log = %v and ends %q, want 1 and the seq 21", err, bad[max(0, len(bad)-200):])
	}
}

// Keys are taken without a signal, but not while they are written; and a file that
// hangs holds up nothing.
func TestKeysAreTakenWhenTheirFilesHaveChanged(t *testing.T) {
	t.Parallel()
	files := newKeyFiles(t, testKey(), publicPEM(t, secondKey()))
	p := newProgram(t, newDatabase(t), newRedis(t), append(files.env(), "METRICS_ADDR", metricsOn)...)
	before := p.kids()
	for i := range rounds(3, 20) { // so far apart that no two looks see two of them, and each long enough for one
		begun := time.Now()
		files.set(testKey(), "")
		time.Sleep(keysEvery * 17 / 20)
		files.set(testKey(), publicPEM(t, secondKey()))
		if time.Since(begun) < keysEvery {
			time.Sleep(5*keysEvery/2 + time.Duration(i)*keysEvery/7)
			if got := p.kids(); !slices.Equal(got, before) || strings.Contains(p.log.String(), `"msg":"keys `) {
				t.Fatalf("while a file was written, the keys %q were taken, of %q", got, before)
			}
		}
	}
	files.set(ellipticKey(), publicPEM(t, testKey()))
	p.eventually("the new keys are taken", func() bool { return slices.Equal(p.kids(), kidsOf(t, ellipticKey(), testKey())) })
	files.set("canary", "")
	p.eventually("bad ones are complained of", func() bool {
		return strings.Contains(p.log.String(), "keys not read, the old ones stay") && p.metric("agentidp_keys_read") == 0
	})
	files.set(ellipticKey(), publicPEM(t, testKey()))
	p.eventually("they are well again", func() bool { return p.metric("agentidp_keys_read") == 1 })
	if err := errors.Join(os.Remove(files.private), syscall.Mkfifo(files.private, 0o600)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * keysEvery)
	if err := p.process.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("with a file that hangs, it stops with %v", err)
	}
}
