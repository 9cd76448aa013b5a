package test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// A drill runs docs/devops/incident.sh as an operator does, with a curl that
// writes down what its command lines were.
type drill struct {
	*program
	folder string
	runs   int
}

func newDrill(p *program) *drill {
	p.t.Helper()
	curl, err := exec.LookPath("curl")
	if err != nil {
		p.t.Fatalf("incident.sh needs curl: %v", err)
	}
	d := &drill{program: p, folder: p.t.TempDir()}
	wrapper := "#!/bin/sh\nprintf '%s\\n' \"$*\" >>'" + d.folder + "/arguments'\nexec '" + curl + "' \"$@\"\n"
	if err := os.WriteFile(filepath.Join(d.folder, "curl"), []byte(wrapper), 0o700); err != nil {
		p.t.Fatal(err)
	}
	return d
}

// run runs the script, and returns all that it printed and its folder.
func (d *drill) run(mode string, env ...string) (out, evidence string, err error) {
	d.t.Helper()
	d.runs++
	evidence = filepath.Join(d.folder, fmt.Sprint("evidence-", d.runs))
	cmd := exec.Command("sh", "docs/devops/incident.sh", mode)
	cmd.Env = append([]string{"PATH=" + d.folder + ":" + os.Getenv("PATH"), "BASE=" + d.url, "CLIENT_ID=" + d.id, "CLIENT_SECRET=" + d.secret,
		"EVIDENCE=" + evidence}, env...)
	printed, err := cmd.CombinedOutput()
	return string(printed), evidence, err
}

// lines are those of a file of the evidence.
func (d *drill) lines(evidence, name string) []string {
	d.t.Helper()
	text, err := os.ReadFile(filepath.Join(evidence, name))
	if err != nil {
		d.t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

var seqInLine = regexp.MustCompile(`^\{"eventId":"[^"]+","seq":(\d+),.*"hash":"[0-9a-f]{64}"\}$`)

// wantSeqs wants a file to have these events, in whatever order, and perhaps
// others that came later.
func (d *drill) wantSeqs(evidence, name string, events []servedEvent, which func(servedEvent) bool) {
	d.t.Helper()
	have := map[string]bool{}
	for _, line := range d.lines(evidence, name) {
		if match := seqInLine.FindStringSubmatch(line); match != nil {
			have[match[1]] = true
		} else if !checkpointLine.MatchString(line) {
			d.t.Errorf("%s has the line %s, which is no event", name, line)
		}
	}
	wanted := 0
	for _, e := range events {
		if which(e) {
			wanted++
		}
		if which(e) != have[fmt.Sprint(e.Seq)] {
			d.t.Errorf("%s has the event of seq %d: %v, want %v", name, e.Seq, !which(e), which(e))
		}
	}
	if wanted == 0 {
		d.t.Errorf("of %s nothing is wanted", name)
	}
}

// head is the seq of the last event of its log.
func (d *drill) head(evidence string) (seq int64) {
	d.t.Helper()
	lines := d.lines(evidence, "log.jsonl")
	if match := seqInLine.FindStringSubmatch(lines[max(0, len(lines)-2)]); match != nil {
		fmt.Sscan(match[1], &seq)
	}
	return seq
}

// wantChecked wants whoever has the folder alone to find its log to be what was signed, up to its checkpoint.
func (d *drill) wantChecked(evidence string) {
	d.t.Helper()
	checkpoint := d.lines(evidence, "checkpoint.txt")[0]
	out, err := command(d.t.Context(), nil, testLog, "verify-audit", "--file", evidence+"/log.jsonl", "--jwks", evidence+"/jwks.json", checkpoint)
	if err != nil || !strings.Contains(out, fmt.Sprintf("to %d\n", d.head(evidence))) || !strings.Contains(out, fmt.Sprintf("extends the checkpoint at seq %d\n", d.head(evidence))) {
		d.t.Errorf("verify-audit of the evidence = %q, %v", out, err)
	}
	log := d.lines(evidence, "log.jsonl")
	for _, name := range []string{"concerns.jsonl", "did.jsonl", "handed.jsonl"} {
		for _, line := range d.lines(evidence, name) {
			if line != "" && !slices.Contains(log, line) {
				d.t.Errorf("%s has a line that is not in the log: %s", name, line)
			}
		}
	}
}

// wantEvidence wants a folder for nobody else, with the sums of all its files,
// and no secret in any.
func (d *drill) wantEvidence(evidence string, secrets ...string) {
	d.t.Helper()
	sums, found := map[string]string{}, 0
	for _, line := range d.lines(evidence, "SHA256SUMS") {
		sum, name, _ := strings.Cut(line, "  ")
		sums[name] = sum
	}
	entries, err := os.ReadDir(evidence)
	if info, statErr := os.Stat(evidence); err != nil || statErr != nil || info.Mode().Perm() != 0o700 {
		d.t.Fatalf("the folder of the evidence has mode %v, %v, %v, want 0700", info.Mode(), err, statErr)
	}
	for _, entry := range entries {
		info, _ := entry.Info()
		text, err := os.ReadFile(filepath.Join(evidence, entry.Name()))
		if err != nil || info.Mode().Perm() != 0o600 {
			d.t.Errorf("%s has mode %v, %v, want 0600", entry.Name(), info.Mode(), err)
		}
		if entry.Name() != "SHA256SUMS" {
			if found++; sums[entry.Name()] != fmt.Sprintf("%x", sha256.Sum256(text)) {
				d.t.Errorf("the sum of %s is %q, which it is not", entry.Name(), sums[entry.Name()])
			}
		}
		for _, secret := range append(secrets, "sk_live_") {
			if strings.Contains(string(text), secret) {
				d.t.Errorf("%s has a secret or a token", entry.Name())
			}
		}
	}
	if found != len(sums) || found < 7 {
		d.t.Errorf("there are %d files and the sums of %d", found, len(sums))
	}
}

var oneEvent = regexp.MustCompile(`1 of agent.created success from 127.0.0.1\n +the first at \S+Z\n +the last at \S+Z\n`)

func TestIncidentDrill(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newPostgres(t).url(), newRedisServer(t).url(), "RATE_LIMIT_PER_MINUTE", "1000") // or it waits for the next minute
	q, stranger := p.another(), p.another("ISSUER", "http://another.test")
	d := newDrill(p)
	id, secret := p.newClient("agents:read", "credentials:write", "resumes:read")
	token := p.token(id, secret, "")
	made := p.want(p.api(token, "POST", "/agents/"+id+"/credentials", "{}"), 201, "") // by itself
	otherID, otherSecret := p.newClient("resumes:read")
	other := p.token(otherID, otherSecret, "")
	// What it hands out another acts with, also behind a third.
	handOn := func(id, secret, subject string) string {
		return p.want(p.form(id, secret, "", "grant_type=urn:ietf:params:oauth:grant-type:token-exchange&subject_token="+subject+
			"&subject_token_type=urn:ietf:params:oauth:token-type:access_token&resource=https://resumes.example.com"), 200, "").text("access_token")
	}
	thirdID, thirdSecret := p.newClient("resumes:read")
	p.want(p.allow(id, "delegates", `["`+otherID+`"]`), 200, "")
	p.want(p.allow(thirdID, "delegates", `["`+otherID+`","`+id+`"]`), 200, "")
	handed := handOn(otherID, otherSecret, p.token(id, secret, "resumes:read"))
	behind := handOn(otherID, otherSecret, handOn(id, secret, p.token(thirdID, thirdSecret, "")))
	apart := handOn(otherID, otherSecret, p.token(thirdID, thirdSecret, ""))
	for range 130 { // more than a page
		p.token(id, secret, "resumes:read")
	}
	secrets := []string{p.secret, secret, made.text("clientSecret"), token, other, p.bearer, handed, behind, apart}
	the := []string{"AGENT_ID=" + id, "TOKEN=" + token, "BASES=" + p.url + " " + q.url, "AGENT_SECRET=" + secret}
	concerns := func(e servedEvent) bool { return e.AgentID != nil && *e.AgentID == id }
	did := func(e servedEvent) bool { return e.ActorID != nil && *e.ActorID == id }
	gave := func(e servedEvent) bool {
		said := string(e.Metadata)
		return e.Action == tokenIssued && (strings.Contains(said, `"subject":"`+id+`"`) || strings.Contains(said, `"act":{"sub":"`+otherID+`","act":{"sub":"`+id+`"`))
	}
	all := func(servedEvent) bool { return true }
	state := p.stateOf()

	// What is not right is refused before anything happens, and look changes nothing.
	for name, row := range map[string]struct {
		mode, want string
		env        []string
	}{
		"no mode":                {"", "sh incident.sh look", the},
		"a wrong mode":           {"now", "sh incident.sh look", the},
		"no agent":               {"act", "AGENT_ID is missing", nil},
		"oneself":                {"act", "yourself", []string{"AGENT_ID=" + p.id}},
		"a secret with a quote":  {"act", "CLIENT_SECRET has characters", append([]string{`CLIENT_SECRET=x"`}, the...)},
		"a token with two lines": {"act", "TOKEN has characters", append(slices.Clone(the), "TOKEN="+token+"\nurl = \"http://127.0.0.1:1\"")},
		"a wrong secret":         {"act", "the answer is 401", append([]string{"CLIENT_SECRET=" + newSecret()}, the...)},
		"an unknown agent":       {"act", "the answer is 404", []string{"AGENT_ID=" + newID()}},
		"another's token":        {"act", "TOKEN is another agent's", append(slices.Clone(the), "TOKEN="+other)},
		"another's by exchange":  {"act", "TOKEN is another agent's", append(slices.Clone(the), "TOKEN="+apart)},
		"a copy of another":      {"look", "does not know the operator's token", append(slices.Clone(the), "BASES="+p.url+" "+stranger.url)},
		"a copy that is away":    {"look", "no answer", append(slices.Clone(the), "BASES=http://127.0.0.1:1")},
	} {
		out, _, err := d.run(row.mode, row.env...)
		if err == nil || !strings.Contains(out, row.want) {
			t.Errorf("%s %s = %v and prints %s, want an error of %s", row.mode, name, err, out, row.want)
		}
		if found := secretInLog.FindString(out); found != "" {
			t.Errorf("%s %s prints a secret: %s", row.mode, name, out)
		}
	}
	out, evidence, err := d.run("look", the...)
	if err != nil || strings.Count(out, "TOKEN is alive") != 2 || strings.Count(out, " active: ") != 2 || !strings.Contains(out, "TOKEN is a token of this agent, or came of one, and alive") {
		t.Fatalf("look = %v and prints %s, want all alive", err, out)
	}
	events := p.chain()
	d.wantEvidence(evidence, secrets...)
	d.wantChecked(evidence)
	d.wantSeqs(evidence, "log.jsonl", events, func(e servedEvent) bool { return e.Seq <= d.head(evidence) })
	events = events[:d.head(evidence)] // and not what reading that has left
	d.wantSeqs(evidence, "concerns.jsonl", events, concerns)
	d.wantSeqs(evidence, "did.jsonl", events, did)
	if !p.active(token) || !q.active(token) || p.stateOf() != state {
		t.Fatal("look has changed something")
	}

	for _, token := range []string{handed, behind} {
		if out, _, err := d.run("look", "AGENT_ID="+id, "TOKEN="+token); err != nil || !strings.Contains(out, "came of one, and alive") ||
			!strings.Contains(out, "    1 by "+otherID+" in the name of "+id+"\n") || !strings.Contains(out, "    1 by "+otherID+" in the name of "+thirdID+"\n") {
			t.Errorf("look with what came of the agent's token = %v and prints %s", err, out)
		}
	}

	fresh := p.newAgent("resumes:read") // of which there is one event
	if out, _, err := d.run("look", "AGENT_ID="+fresh); err != nil || !oneEvent.MatchString(out) {
		t.Errorf("look at a new agent = %v and prints %s", err, out)
	}

	// With the database, by the program.
	events = p.chain()
	path, err := builtProgram()
	if err != nil {
		t.Fatal(err)
	}
	withDatabase := append(slices.Clone(the), "AGENTIDP="+path)
	for name, value := range maps.All(p.env) {
		withDatabase = append(withDatabase, name+"="+value)
	}
	out, evidence, err = d.run("act", withDatabase...)
	if err != nil || strings.Count(out, "TOKEN is dead\n") != 2 || strings.Count(out, "AGENT_SECRET gets no token") != 2 || strings.Count(out, " revoked ") != 2 {
		t.Fatalf("act = %v and prints %s, want all dead on both copies", err, out)
	}
	d.wantEvidence(evidence, secrets...)
	d.wantSeqs(evidence, "concerns.jsonl", events, concerns)
	d.wantSeqs(evidence, "did.jsonl", events, did)
	d.wantSeqs(evidence, "handed.jsonl", events, gave)
	d.wantSeqs(evidence, "log.jsonl", events, all)
	d.wantChecked(evidence)
	exported := d.lines(evidence, "log.jsonl")
	if again := strings.Split(p.command("audit-export"), "\n"); !slices.Equal(exported[:len(exported)-1], again[:len(exported)-1]) || !checkpointLine.MatchString(exported[len(exported)-1]) {
		t.Error("log.jsonl is not what audit-export prints")
	}
	if report := strings.Join(d.lines(evidence, "report.txt"), "\n"); !strings.HasPrefix(out, report) || !strings.Contains(report, "133 of token.issued success from 127.0.0.1") {
		t.Errorf("the report is %s, and printed is %s", report, out)
	}
	if out := p.command("verify-audit", d.lines(evidence, "checkpoint.txt")[0]); !strings.Contains(out, "extends the checkpoint") {
		t.Errorf("verify-audit with the checkpoint of the evidence prints %s", out)
	}
	for _, v := range []*program{p, q} {
		if v.active(token) || v.active(handed) || v.active(behind) || !v.active(other) || !v.active(apart) {
			t.Error("the agent's token is alive, or what came of it, or another's is dead")
		}
		v.want(v.api(token, "GET", "/agents/"+id, ""), 401, "UNAUTHORIZED")
		for _, secret := range []string{secret, made.text("clientSecret")} {
			v.want(v.form(id, secret, "", "grant_type=client_credentials"), 401, "invalid_client")
		}
		if a := v.api(v.bearer, "GET", "/agents/"+id, ""); a.text("status") != "suspended" {
			t.Errorf("the agent is %v, want it suspended", a)
		}
	}

	// Again, without the database, and of an agent that is decommissioned.
	events = p.chain()
	p.want(p.api(p.bearer, "DELETE", "/agents/"+id, ""), 204, "")
	out, evidence, err = d.run("act", the...)
	if err != nil || !strings.Contains(out, "TOKEN is dead already") || strings.Contains(out, " revoked ") || !strings.Contains(out, "the agent is decommissioned") {
		t.Errorf("act again = %v and prints %s", err, out)
	}
	d.wantEvidence(evidence, secrets...)
	d.wantChecked(evidence)
	if !strings.Contains(out, "log.jsonl is NOT checked") {
		t.Errorf("without the program, act prints %s, want it to say that nothing has checked the log", out)
	}
	d.wantSeqs(evidence, "log.jsonl", events, all)
	d.wantSeqs(evidence, "did.jsonl", events, did)
	for _, since := range []string{"", events[3].Timestamp} { // with the program, and no variable of the service
		out, evidence, err = d.run("look", append(slices.Clone(the), "AGENTIDP="+path, "SINCE="+since)...)
		if err != nil || strings.Contains(out, "NOT checked") || strings.Count(out, "    verified: ") != 2 || !strings.Contains(out, fmt.Sprintf(" to %d\n    issuer: %s\n", d.head(evidence), p.env["ISSUER"])) {
			t.Errorf("look with the program, from %q on, = %v and prints %s", since, err, out)
		}
		d.wantChecked(evidence)
	}
	out, evidence, err = d.run("look", append(slices.Clone(the), "SINCE=2999-01-01")...)
	if err != nil || d.lines(evidence, "log.jsonl")[0] != "" {
		t.Errorf("look from a day to come on = %v and prints %s", err, out)
	}

	// A log that was altered is no evidence, and it says so.
	for _, name := range p.relations() {
		p.exec(`drop trigger if exists append_only on ` + name)
	}
	p.exec(`update audit_events set user_agent = 'x' where seq = 5`)
	for want, env := range map[string][]string{"the log was ALTERED": the, "the export failed": withDatabase} {
		if out, _, err := d.run("look", env...); err == nil || !strings.Contains(out, want) || !strings.Contains(out, "STOPPED") {
			t.Errorf("of an altered log, look = %v and prints %s, want that %s", err, out, want)
		}
	}
	arguments, err := os.ReadFile(filepath.Join(d.folder, "arguments"))
	if err != nil || len(arguments) == 0 || secretInLog.Match(arguments) {
		t.Errorf("%v, or a secret or a token was on a command line of curl: %.2000s", err, arguments)
	}
}

// What was refused for a moment is neither evidence nor a verdict.
func TestIncidentDrillTriesAgain(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t))
	target, err := url.Parse(p.url)
	if err != nil {
		t.Fatal(err)
	}
	forward := httputil.NewSingleHostReverseProxy(target)
	var mu sync.Mutex
	refused := map[string]bool{}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		first := !refused[r.Method+r.URL.Path]
		refused[r.Method+r.URL.Path] = true
		mu.Unlock()
		if first {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(503)
			io.WriteString(w, `{"code":"SERVICE_UNAVAILABLE","message":"Too many requests at once; try again."}`+"\n")
			return
		}
		forward.ServeHTTP(w, r)
	}))
	defer front.Close()
	d := newDrill(p)
	id, secret := p.newClient("resumes:read")
	token := p.token(id, secret, "")
	p.want(p.form(id, secret, "/revoke", "token="+token), 200, "")
	out, evidence, err := d.run("look", "BASE="+front.URL, "AGENT_ID="+id, "TOKEN="+token)
	if err != nil || !strings.Contains(out, "TOKEN is dead") || !strings.Contains(out, "verified: ") || len(refused) < 5 {
		t.Fatalf("look = %v and prints %s, want TOKEN dead and the log verified though %v were refused once", err, out, refused)
	}
	d.wantChecked(evidence)
	for _, name := range []string{"concerns.jsonl", "log.jsonl"} {
		for _, line := range d.lines(evidence, name) {
			if !seqInLine.MatchString(line) && !(name == "log.jsonl" && checkpointLine.MatchString(line)) {
				t.Errorf("%s has the line %s, which is no event", name, line)
			}
		}
	}
}
