package test

import (
	"bufio"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// What leaves the house: an export that goes on, one that is checked by whoever has it, and a part of one.

// A tail is an export that goes on, as a SIEM reads it.
type tail struct {
	*process
	t        *testing.T
	out, log logBuffer
}

func (p *program) follow(t *testing.T, from ...string) *tail {
	t.Helper()
	f := &tail{t: t}
	cmd := p.build(append([]string{"audit-export", "-follow"}, from...)...)
	cmd.Stdout, cmd.Stderr = &f.out, &f.log
	f.process = startProcess(t, cmd, syscall.SIGKILL)
	return f
}

// lines are those that are whole.
func (f *tail) lines() []string {
	lines := strings.SplitAfter(f.out.String(), "\n")
	return lines[:len(lines)-1]
}

// wantUpTo waits until it has printed as many events as are in an export from a seq on, and wants the same.
func (f *tail) wantUpTo(v *service, from int) {
	f.t.Helper()
	var want []string
	v.eventually("all is printed", func() bool {
		if len(f.lines()) < len(want) {
			return false
		}
		lines, err := v.export(fmt.Sprint(from))
		want = lines[:len(lines)-1]
		return err == nil && len(f.lines()) >= len(want)
	})
	if got := f.lines(); strings.Join(got, "") != strings.Join(want, "\n")+"\n" {
		f.t.Fatalf("audit-export -follow prints %q, want %q: %s", got, want, f.log.String())
	}
}

// wantEnd waits until it has ended by itself, with this error; "" is none.
func (f *tail) wantEnd(want string) {
	f.t.Helper()
	(&service{t: f.t}).eventually("it ends", func() bool {
		select {
		case <-f.exited:
			return true
		default:
			return false
		}
	})
	exit, failed := errors.AsType[*exec.ExitError](f.err)
	if (want != "") != failed || failed && (exit.ExitCode() != 1 || !strings.HasSuffix(f.log.String(), want+"\n")) {
		f.t.Errorf("audit-export -follow ends with %v and says %s, want %q", f.err, f.log.String(), want)
	}
	if out := f.out.String(); out != "" && !strings.HasSuffix(out, "\"}\n") || strings.Contains(out, `{"checkpoint"`) {
		f.t.Errorf("audit-export -follow ends with %q, want whole events and no checkpoint", out[max(0, len(out)-200):])
	}
}

func (f *tail) waits() int { return strings.Count(f.log.String(), "waiting for PostgreSQL") }

func TestFollowedExportGoesOn(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newDatabase(t), newRedis(t))
	all := p.follow(t)
	all.wantUpTo(p.service, 1)
	p.active(p.bearer)
	all.wantUpTo(p.service, 1)
	head := len(all.lines())
	next, last := p.follow(t, fmt.Sprint(head+1)), p.follow(t, fmt.Sprint(head))
	last.wantUpTo(p.service, head)
	for range 300 { // while they follow
		p.active(p.bearer)
	}
	for from, f := range map[int]*tail{1: all, head: last, head + 1: next} {
		f.wantUpTo(p.service, from)
		if f.stop(t, syscall.SIGTERM); f.waits() != 0 {
			t.Errorf("audit-export -follow says %s", f.log.String())
		}
		f.wantEnd("")
	}
	p.follow(t, fmt.Sprint(head+302)).wantEnd(fmt.Sprintf("seq %d is beyond the end of the log", head+302))
	interrupted := p.follow(t)
	interrupted.wantUpTo(p.service, 1)
	interrupted.stop(t, syscall.SIGINT)
	interrupted.wantEnd("")

	empty := &program{service: &service{t: t, env: programEnv(newDatabase(t), newRedis(t))}}
	f := empty.follow(t)
	empty.command("bootstrap", "first@example.com")
	f.wantUpTo(empty.service, 1)

	// Its reader goes: it ends with the next event.
	cmd := p.build("audit-export", "-follow")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	gone := startProcess(t, cmd, syscall.SIGKILL)
	io.ReadFull(out, make([]byte, 100))
	out.Close()
	p.eventually("it ends", func() bool {
		p.active(p.bearer)
		select {
		case <-gone.exited:
			return true
		default:
			return false
		}
	})
	if gone.err == nil {
		t.Error("audit-export -follow whose reader has gone ended with 0")
	}
}

// PostgreSQL holds nothing for a reader that takes nothing, who gets all of it when it does.
func TestFollowedExportWaitsForItsReaderAlone(t *testing.T) {
	t.Parallel()
	var history []servedEvent
	much := json.RawMessage(`{"requestId":"` + strings.Repeat("x", 8000) + `"}`)
	for range 2500 { // more than sockets hold
		e := forgeEvent(history, time.Now(), "token.issued")
		e.Metadata = much
		e.Hash = e.documentedHash()
		history = append(history, e)
	}
	p := &program{service: &service{t: t, env: programEnv(newHistory(t, "", history), newRedis(t))}}
	cmd := p.build("audit-export", "-follow")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	startProcess(t, cmd, syscall.SIGKILL)
	lines := bufio.NewScanner(out)
	lines.Scan()
	db, err := pgxpool.New(t.Context(), p.env["DATABASE_URL"])
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	p.eventually("PostgreSQL has nothing to do", func() bool {
		busy := 0
		err := db.QueryRow(t.Context(), `select count(*) from pg_stat_activity
			where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'`).Scan(&busy)
		return err == nil && busy == 0
	})
	for seq := 1; seq <= len(history); seq++ {
		if want := fmt.Sprintf(`"seq":%d,`, seq); !strings.Contains(lines.Text(), want) {
			t.Fatalf("audit-export -follow prints %.100q, want %s", lines.Text(), want)
		}
		if seq < len(history) {
			lines.Scan()
		}
	}
}

// Whatever PostgreSQL does, nothing is left out or printed twice. A log that is another
// afterwards ends it.
func TestFollowedExportOutlivesPostgreSQLAndNoOtherLog(t *testing.T) {
	t.Parallel()
	postgres := newPostgres(t)
	p := newProgram(t, postgres.url(), newRedis(t))
	f := p.follow(t)
	f.wantUpTo(p.service, 1)
	begin := func(what string, fault func()) {
		t.Helper()
		before := f.waits()
		fault()
		p.eventually("it says that it waits: "+what, func() bool { return f.waits() > before })
		time.Sleep(time.Second) // in which it looks again
		if f.waits() != before+1 {
			t.Errorf("audit-export -follow says of one fault: %s", f.log.String())
		}
	}
	serves := func() {
		t.Helper()
		p.eventually("it serves", func() bool { return p.active(p.bearer) })
	}
	for range rounds(2, 20) {
		begin("PostgreSQL is killed", postgres.kill)
		postgres.start()
		serves()
		f.wantUpTo(p.service, 1)
		begin("PostgreSQL hangs", postgres.hang)
		postgres.resume()
		serves()
		f.wantUpTo(p.service, 1)
	}

	// As it is now it is kept, and put back later.
	stopped := func() {
		t.Helper()
		postgres.stop(t, syscall.SIGINT)
	}
	cp := func(from, to string) {
		t.Helper()
		if out, err := exec.Command("sh", "-c", `rm -rf "$2" && cp -a "$1" "$2"`, "sh", from, to).CombinedOutput(); err != nil {
			t.Fatalf("copying: %v: %s", err, out)
		}
	}
	backup := filepath.Join(postgres.folder, "backup")
	stopped()
	cp(postgres.data(), backup)
	postgres.start()
	serves()
	f.wantUpTo(p.service, 1)
	kept := len(f.lines())
	for range 5 {
		p.active(p.bearer)
	}
	f.wantUpTo(p.service, 1)
	stopped()
	cp(backup, postgres.data())
	p.process.hang() // it writes nothing
	postgres.start()
	f.wantEnd(fmt.Sprintf("the audit log was altered: the first bad seq is %d", len(f.lines()))) // nothing says how far before that began
	p.process.resume()
	serves()

	// One that has gone on meanwhile is another, too.
	f = p.follow(t, fmt.Sprint(kept))
	f.wantUpTo(p.service, kept)
	printed := kept - 1 + len(f.lines())
	f.hang()
	stopped()
	cp(backup, postgres.data())
	postgres.start()
	p.eventually("the log is longer", func() bool {
		p.active(p.bearer)
		seq := 0
		err := p.db.QueryRow(t.Context(), `select max(seq) from audit_events`).Scan(&seq)
		return err == nil && seq > printed+3
	})
	f.resume()
	f.wantEnd(fmt.Sprintf("the audit log was altered: the first bad seq is %d", printed))
}

func TestEvidenceCommandsRefuseBadArguments(t *testing.T) {
	t.Parallel()
	env := programEnv("postgres:///nowhere?host=/nowhere", "unix:///nowhere") // nothing is looked at before
	for _, row := range []struct {
		want string
		args []string
	}{
		{"-x", []string{"verify-audit", "-x"}},
		{"-x", []string{"audit-export", "--x"}},
		{"-follow", []string{"verify-audit", "-follow"}},
		{"too many", []string{"verify-audit", "x", "y"}},
		{"CHECKPOINT is empty", []string{"verify-audit", ""}},
		{"too many", []string{"audit-export", "1", "2"}},
		{"too many", []string{"audit-export", "1", "-follow"}},
		{"-follow", []string{"audit-export", "-follow=maybe"}},
		{"FROM_SEQ", []string{"audit-export", "--follow", "0"}},
		{"FROM_SEQ", []string{"audit-export", ""}},
		{"-file and -jwks", []string{"verify-audit", "-file", "x"}},
		{"-file and -jwks", []string{"verify-audit", "-jwks", "x"}},
		{"-file and -jwks", []string{"verify-audit", "-file", "", "-jwks", "x"}},
		{"-file and -jwks", []string{"verify-audit", "-file=", "-jwks=", "x"}},
		{"too many", []string{"verify-audit", "-file", "x", "-jwks", "x", "y", "z"}},
		{"CHECKPOINT is empty", []string{"verify-audit", "-file", "x", "-jwks", "x", ""}},
		{"-file", []string{"audit-export", "-file", "x", "-jwks", "x"}},
		{"-file", []string{"verify-audit", "-file"}},
		{"UUID in lower case", []string{"audit-export", "-agent", "x"}},
		{"UUID in lower case", []string{"audit-export", "-agent", ""}},
		{"must be a time like", []string{"audit-export", "-from", "yesterday"}},
		{"must be a time like", []string{"audit-export", "-to", "2026-02-30"}},
		{"-to must not be before -from", []string{"audit-export", "-from", "2026-03-02", "-to", "2026-03-01"}},
		{"without -follow and FROM_SEQ", []string{"audit-export", "-follow", "-from", "2026-03-02"}},
		{"without -follow and FROM_SEQ", []string{"audit-export", "-from", "2026-03-02", "1"}},
		{"-agent", []string{"verify-audit", "-agent", newID()}},
	} {
		_, err := command(t.Context(), env, testLog, row.args...)
		if err == nil || !strings.Contains(err.Error(), row.want) || !regexp.MustCompile(`^`+row.args[0]+`: .*; -h lists all$`).MatchString(err.Error()) {
			t.Errorf("%q = %v, want an error of %s that tells of -h", row.args, err, row.want)
		}
	}
}

// A witness has an export and the keys as they are published, and nothing else.
type witness struct {
	t      *testing.T
	folder string
	jwks   string
	python string
	ended  map[int]int // how often the checker of the page did, by status
}

func newWitness(v *service) *witness {
	v.t.Helper()
	w := &witness{t: v.t.(*testing.T), folder: v.t.TempDir(), ended: map[int]int{}}
	python, err := exec.Command(installed(v.t, "python3", "python3"), "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		v.t.Fatal(err)
	}
	w.python = strings.TrimSpace(string(python)) // what is on PATH may be a script that looks for it
	w.jwks = w.file("jwks", v.want(v.do("GET", "/.well-known/jwks.json", ""), 200, "").raw)
	return w
}

func (w *witness) file(name, text string) string {
	w.t.Helper()
	name = filepath.Join(w.folder, name)
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return name
}

// checks runs verify-audit without a variable of the environment; and where that finds all well, or the chain bad, the
// checker that was written from docs/review.md alone, which has to say the same of what it knows.
func (w *witness) checks(export string, checkpoint ...string) (out string, err error) {
	w.t.Helper()
	file := w.file("export", export)
	out, err = command(w.t.Context(), nil, testLog, append([]string{"verify-audit", "--file", file, "--jwks", w.jwks}, checkpoint...)...)
	ours := err == nil
	if strings.Contains(out, "only a part") || !ours && !strings.Contains(err.Error(), "the first bad seq") {
		return out, err
	}
	independent := exec.Command(w.python, append([]string{"docs/check_export.py", file, w.jwks}, checkpoint...)...)
	says, refusal := independent.CombinedOutput()
	code, want := independent.ProcessState.ExitCode(), 0
	if strings.Contains(string(says), "ES256") { // which it can't tell
		want = 2
	} else if !ours {
		want = 1
	}
	if w.ended[code]++; code != want {
		w.t.Errorf("the checker of the page ends with %d (%v) and %q, and ours with %v", code, refusal, says, err)
	}
	return out, err
}

// hashedAnew are lines in which from a place on the links and hashes are right again.
func hashedAnew(t *testing.T, lines []string, from int) []string {
	t.Helper()
	for i := from; i < len(lines)-1; i++ {
		var e, before servedEvent
		err := json.Unmarshal([]byte(lines[i]), &e)
		if i > from {
			err = errors.Join(err, json.Unmarshal([]byte(lines[i-1]), &before))
			lines[i] = strings.Replace(lines[i], e.PrevHash, before.Hash, 1)
			e.PrevHash = before.Hash
		}
		if err != nil {
			t.Fatal(err)
		}
		lines[i] = strings.Replace(lines[i], e.Hash+`"}`, e.documentedHash()+`"}`, 1)
	}
	return lines
}

func TestExportIsCheckedByWhoeverHasIt(t *testing.T) {
	t.Parallel()
	v := newService(t, "JWT_PUBLIC_KEY", publicPEM(t, ellipticKey()))
	id, secret := v.newClient("resumes:read")
	for _, agent := range []string{"<b>&amp;\u2028", "Ünï \"quoted\" \\", ""} {
		v.do("POST", "/api/v1/token", "grant_type=client_credentials", "Authorization", basic(id, secret), "Content-Type", formType, "User-Agent", agent)
	}
	early := v.checkpoint()
	v.active(v.token(id, secret, ""))
	all, err := v.export()
	if err != nil || len(all) < 9 {
		t.Fatalf("audit-export = %q, %v", all, err)
	}
	w, n := newWitness(v), len(all)-1
	now := checkpointLine.FindStringSubmatch(all[n])[1]
	text := func(lines []string) string { return strings.Join(lines, "\n") + "\n" }
	at := func(seq int) string { // a checkpoint of a seq
		t.Helper()
		var e servedEvent
		if err := json.Unmarshal([]byte(all[seq-1]), &e); err != nil {
			t.Fatal(err)
		}
		return sign(t, v.env["JWT_PRIVATE_KEY"], auditCheckpoint, checkpoint{v.env["ISSUER"], e.Seq, e.Hash, time.Now().Unix()})
	}
	for _, row := range []struct {
		name, export, checkpoint, want string
	}{
		{"whole", text(all), "", ""},
		{"whole, held to its own checkpoint", text(all), now, fmt.Sprintf("extends the checkpoint at seq %d\n", n)},
		{"whole, held to one of before", text(all), early, "extends the checkpoint at seq "},
		{"whole, held to the first", text(all), at(1), "extends the checkpoint at seq 1\n"},
		{"from the third on", text(all[2:]), "", "nothing is said of what was before seq 3\n"},
		{"from the third on, held to that", text(all[2:]), at(3), "extends the checkpoint at seq 3\n"},
		{"from the third on, held to the second", text(all[2:]), at(2), "extends the checkpoint at seq 2\n"},
		{"the last alone", text(all[n-1:]), at(n - 1), fmt.Sprintf("extends the checkpoint at seq %d\n", n-1)},
	} {
		args := strings.Fields(row.checkpoint)
		out, err := w.checks(row.export, args...)
		events := strings.Count(row.export, "\n") - 1
		want := fmt.Sprintf("verified: %d events, from seq %d to %d\nissuer: %s\n", events, n-events+1, n, v.env["ISSUER"])
		if err != nil || !strings.HasPrefix(out, want) || !strings.Contains(out, row.want) || !strings.HasSuffix(out, "\ncheckpoint: "+now+"\n") ||
			strings.Contains(out, "nothing is said") != (events < n) || strings.Contains(out, "extends") != (row.checkpoint != "") {
			t.Errorf("%s: verify-audit = %q, %v, want %q and %q", row.name, out, err, want, row.want)
		}
	}
	// On standard input, and with another key that signs.
	piped := (&program{service: &service{t: t}}).build("verify-audit", "-file=-", "-jwks="+w.jwks)
	piped.Stdin = strings.NewReader(text(all))
	if out, err := piped.CombinedOutput(); err != nil || !strings.HasPrefix(string(out), fmt.Sprintf("verified: %d events", n)) {
		t.Errorf("verify-audit of standard input = %q, %v", out, err)
	}
	u := *v
	u.env = maps.Clone(v.env)
	u.env["JWT_PRIVATE_KEY"], u.env["JWT_PUBLIC_KEY"] = ellipticKey(), publicPEM(t, testKey())
	if lines, err := u.export("2"); err != nil {
		t.Error(err)
	} else if out, err := w.checks(text(lines), now); err != nil {
		t.Errorf("verify-audit of what another key signed = %q, %v", out, err)
	}

	bad := func(seq int) string { return fmt.Sprintf("the first bad seq is %d", seq) }
	line := func(n int) string { return fmt.Sprintf("line %d ", n) }
	edit := func(old, new string) func([]string) []string { // the fifth
		return func(lines []string) []string {
			was := lines[4]
			if lines[4] = regexp.MustCompile(old).ReplaceAllString(was, new); lines[4] == was {
				t.Fatalf("%s is not in %s", old, was)
			}
			return lines
		}
	}
	signed := func(cp checkpoint) string {
		return `{"checkpoint":"` + sign(t, v.env["JWT_PRIVATE_KEY"], auditCheckpoint, cp) + `"}`
	}
	last := func(cp string) func([]string) []string {
		return func(lines []string) []string { lines[n] = cp; return lines }
	}
	good := checkpoint{v.env["ISSUER"], int64(n), regexp.MustCompile(`[0-9a-f]{64}`).FindAllString(all[n-1], 2)[1], 1}
	other, stranger := newService(t, "ISSUER", v.env["ISSUER"]+"/other"), newService(t, "JWT_PRIVATE_KEY", secondKey())
	for len(other.chain()) < n {
		other.active(other.bearer)
	}
	strange, err := stranger.export()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, checkpoint string
		alter            func([]string) []string
		want             string
	}{
		{"eventId", "", edit(`("eventId":"[^"]*)[0-9a-f]"`, `${1}x"`), bad(5)},
		{"seq", "", edit(`"seq":5`, `"seq":6`), bad(5)},
		{"a seq that is no number", "", edit(`"seq":5`, `"seq":"5"`), line(5)},
		{"seq null", "", edit(`"seq":5`, `"seq":null`), line(5)},
		{"agentId", "", edit(`("agentId":)"[^"]*"`, `${1}"`+newID()+`"`), bad(5)},
		{"agentId null", "", edit(`("agentId":)"[^"]*"`, `${1}null`), bad(5)},
		{"agentId empty", "", edit(`("agentId":)"[^"]*"`, `${1}""`), bad(5)},
		{"actorId", "", edit(`("actorId":)"[^"]*"`, `${1}"`+newID()+`"`), bad(5)},
		{"action", "", edit(`"token.issued"`, `"token.revoked"`), bad(5)},
		{"outcome", "", edit(`"success"`, `"failure"`), bad(5)},
		{"ipAddress", "", edit(`"ipAddress":"[^"]*"`, `"ipAddress":"10.0.0.1"`), bad(5)},
		{"userAgent", "", edit(`("userAgent":")`, `${1}x`), bad(5)},
		{"metadata", "", edit(`("requestId":")`, `${1}x`), bad(5)},
		{"metadata with a member more", "", edit(`("metadata":\{)`, `${1}"x":1,`), bad(5)},
		{"metadata with a member twice", "", edit(`("metadata":\{)("credentialId":"[^"]*")`, `${1}${2},${2}`), bad(5)},
		{"timestamp", "", edit(`("timestamp":"[0-9]*)-(..)`, `${1}-01`), bad(5)},
		{"a timestamp in microseconds", "", edit(`("timestamp":"[^"]*)Z"`, `${1}000Z"`), line(5)},
		{"the timestamp in another zone", "", edit(`("timestamp":"[^"]*)Z"`, `${1}+00:00"`), line(5)},
		{"prevHash", "", edit(`("prevHash":")[0-9a-f]{64}`, `${1}`+firstPrevHash), bad(5)},
		{"hash", "", edit(`("hash":")[0-9a-f]{64}`, `${1}`+firstPrevHash), bad(5)},
		{"a short hash", "", edit(`("hash":")[0-9a-f]{64}`, `${1}`), bad(5)},
		{"a hash that is none", "", edit(`("hash":"[0-9a-f]{63})[0-9a-f]`, `${1}x`), line(5)},
		{"one, hashed anew", "", func(l []string) []string {
			l = edit(`("userAgent":")`, `${1}x`)(l)
			return append(hashedAnew(t, slices.Clone(append(slices.Clone(l[:5]), l[n])), 4)[:5], l[5:]...)
		}, bad(6)},
		{"one, and all hashed anew from there on", "", func(l []string) []string { return hashedAnew(t, edit(`("userAgent":")`, `${1}x`)(l), 4) }, bad(n)},
		{"the same, held to one of before", at(4), func(l []string) []string { return hashedAnew(t, edit(`("userAgent":")`, `${1}x`)(l), 4) }, bad(n)},
		{"the same, held to that one", at(5), func(l []string) []string { return hashedAnew(t, edit(`("userAgent":")`, `${1}x`)(l), 4) }, bad(5)},

		{"a member more", "", edit(`"\}$`, `","x":1}`), line(5)},
		{"a member twice", "", edit(`"seq":5`, `"seq":5,"seq":5`), line(5)},
		{"a member twice, in another case", "", edit(`"seq":5`, `"Seq":4,"seq":5`), line(5)},
		{"a member less", "", edit(`"actorId":("[^"]*"|null),`, ``), line(5)},
		{"members in another order", "", edit(`("eventId":"[^"]*"),("seq":5)`, `${2},${1}`), line(5)},
		{"a space", "", edit(`"seq":5`, `"seq": 5`), line(5)},
		{"a space behind metadata", "", edit(`\},"timestamp"`, `} ,"timestamp"`), line(5)},
		{"a space at the end", "", edit(`$`, ` `), line(5)},
		{"the end of a line as elsewhere", "", edit(`$`, "\r"), line(5)},
		{"an escape that isn't needed", "", edit(`"token.issued"`, `"token\u002eissued"`), line(5)},
		{"capitals in a hash", "", edit(`"hash":"[0-9a-f]{64}`, `"hash":"`+strings.Repeat("A", 64)), line(5)},
		{"bytes that are no text", "", edit(`("userAgent":")`, "${1}\xff"), line(5)},
		{"an empty line", "", func(l []string) []string { return slices.Insert(l, 4, "") }, line(5)},
		{"a mark of the order of bytes", "", func(l []string) []string { l[0] = "\ufeff" + l[0]; return l }, line(1)},
		{"a line that never ends", "", edit(`("userAgent":")`, `${1}`+strings.Repeat("x", 2<<20)), line(5)},
		{"an array", "", func(l []string) []string { l[0] = "[" + l[0]; return l }, line(1)},

		{"two that changed places", "", func(l []string) []string { l[4], l[5] = l[5], l[4]; return l }, bad(5)},
		{"one doubled", "", func(l []string) []string { return slices.Insert(l, 4, l[4]) }, bad(5)},
		{"one left out", "", func(l []string) []string { return slices.Delete(l, 4, 5) }, bad(5)},
		{"one left out, and all hashed anew", "", func(l []string) []string { return hashedAnew(t, slices.Delete(l, 4, 5), 4) }, bad(5)},
		{"the first left out, held to the first", at(1), func(l []string) []string { return l[2:] }, "the log begins at seq 3, after the checkpoint at 1"},
		{"the first is of another log, held to the one before", at(2), func(l []string) []string {
			l = l[2:]
			l[0] = regexp.MustCompile(`("prevHash":")[0-9a-f]{64}`).ReplaceAllString(l[0], `${1}`+firstPrevHash)
			return hashedAnew(t, l, 0)
		}, bad(3)},
		{"the last left out", "", func(l []string) []string { return slices.Delete(l, n-1, n) }, bad(n)},
		{"all left out", "", func(l []string) []string { return l[n:] }, bad(1)},
		{"one before the first", "", func(l []string) []string {
			return slices.Insert(l, 0, regexp.MustCompile(`"seq":1,`).ReplaceAllString(l[0], `"seq":0,`))
		}, line(1)},
		{"one of its own before the first", "", func(l []string) []string {
			zero := hashedAnew(t, []string{strings.Replace(l[0], `"seq":1,`, `"seq":0,`, 1), ""}, 0)[0]
			return slices.Insert(l, 0, zero)
		}, line(1)},
		{"one behind the last", "", func(l []string) []string {
			more := append(slices.Clone(l[:n]), regexp.MustCompile(`"seq":\d+`).ReplaceAllString(l[n-1], fmt.Sprint(`"seq":`, n+1)), "")
			return append(hashedAnew(t, more, n-1)[:n+1], l[n])
		}, bad(n + 1)},
		{"only whole lines of it", early, func(l []string) []string {
			return append(l[:2], signed(checkpoint{v.env["ISSUER"], 2, regexp.MustCompile(`[0-9a-f]{64}`).FindAllString(l[1], 2)[1], 1}))
		}, "ends at seq 2, before the checkpoint at"},

		{"no last line", "", func(l []string) []string { return l[:n] }, line(n + 1)},
		{"nothing", "", func(l []string) []string { return nil }, line(1)},
		{"an event behind it", "", func(l []string) []string { return append(l, l[n-1]) }, line(n + 2)},
		{"an empty line behind it", "", func(l []string) []string { return append(l, "") }, line(n + 2)},
		{"a second one behind it", "", func(l []string) []string { return append(l, l[n]) }, line(n + 2)},
		{"one with a space", "", last(`{"checkpoint": "` + now + `"}`), line(n + 1)},
		{"one alone", "", last(now), line(n + 1)},
		{"null", "", last(`{"checkpoint":null}`), line(n + 1)},
		{"one that was changed", "", last(`{"checkpoint":"` + now[:len(now)-2] + `AA"}`), line(n + 1)},
		{"a token", "", last(`{"checkpoint":"` + v.bearer + `"}`), line(n + 1)},
		{"of an earlier event", "", last(`{"checkpoint":"` + early + `"}`), "the first bad seq is "},
		{"of a later event", "", last(signed(checkpoint{good.Issuer, good.Seq + 1, good.Hash, 1})), bad(n + 1)},
		{"of another hash", "", last(signed(checkpoint{good.Issuer, good.Seq, firstPrevHash, 1})), bad(n)},
		{"by another key", "", last(strange[len(strange)-1]), line(n + 1)},
		{"of another log", "", last(`{"checkpoint":"` + other.checkpoint() + `"}`), "the first bad seq is "},

		{"held to another issuer's", other.checkpoint(), last(all[n]), "no checkpoint of this issuer"},
		{"held to another key's", stranger.checkpoint(), last(all[n]), "no checkpoint that a key here signed"},
		{"held to a token", v.bearer, last(all[n]), "no checkpoint that a key here signed"},
		{"held to another log's", sign(t, v.env["JWT_PRIVATE_KEY"], auditCheckpoint, checkpoint{good.Issuer, 5, firstPrevHash, 1}), last(all[n]), bad(5)},
		{"held to a later one's", sign(t, v.env["JWT_PRIVATE_KEY"], auditCheckpoint, checkpoint{good.Issuer, good.Seq + 1, firstPrevHash, 1}), last(all[n]), fmt.Sprintf("ends at seq %d, before the checkpoint at %d", n, n+1)},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := &witness{t, t.TempDir(), w.jwks, w.python, w.ended}
			export := ""
			if lines := row.alter(slices.Clone(all)); lines != nil {
				export = text(lines)
			}
			out, err := w.checks(export, strings.Fields(row.checkpoint)...)
			if err == nil || !strings.Contains(err.Error()+"\n", row.want) || strings.HasPrefix(row.want, "the first") && !strings.Contains(err.Error()+"\n", row.want+"\n") && row.want != "the first bad seq is " || out != "" {
				t.Errorf("verify-audit = %q, %v, want an error of %s", out, err, row.want)
			}
		})
	}

	if w.ended[0] < 8 || w.ended[1] < 25 || w.ended[2] != 1 { // it can't tell of the one by another key
		t.Errorf("the checker of the page ended with each status so often: %v", w.ended)
	}

	// Cut off at any byte it is no export.
	whole := text(all)
	for _, end := range []int{1, len(all[0]), len(all[0]) + 1, len(whole) - 300, len(whole) - 2, len(whole) - 1} {
		if out, err := w.checks(whole[:end]); err == nil || !strings.Contains(err.Error(), "cut off") {
			t.Errorf("verify-audit of %d of %d bytes = %q, %v, want an error", end, len(whole), out, err)
		}
	}
	// What is wrong with the files.
	export := w.file("whole", whole)
	for name, row := range map[string][3]string{
		"no file":           {w.folder + "/none", w.jwks, "none"},
		"a folder":          {w.folder, w.jwks, "reading the export: read " + w.folder + ": is a directory"},
		"no keys":           {export, w.folder + "/none", "reading the keys of -jwks: "},
		"keys in no JSON":   {export, export + "", "reading the keys of -jwks: "},
		"an empty list":     {export, w.file("empty", `{"keys":[]}`), "reading the keys of -jwks: "},
		"a list alone":      {export, w.file("list", `[]`), "reading the keys of -jwks: "},
		"another's keys":    {export, w.file("others", stranger.do("GET", "/.well-known/jwks.json", "").raw), fmt.Sprintf("line %d ", n+1)},
		"keys of that kind": {export, w.file("alien", `{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}`), "reading the keys of -jwks: "},
	} {
		if out, err := command(t.Context(), nil, testLog, "verify-audit", "-file", row[0], "-jwks", row[1]); err == nil || !strings.Contains(err.Error(), row[2]) || out != "" {
			t.Errorf("verify-audit with %s = %q, %v, want an error of %s", name, out, err, row[2])
		}
	}
}

type partClaims struct {
	checkpoint
	Part partOfLog `json:"part"`
}

type partOfLog struct {
	AgentID  *string `json:"agentId"`
	FromDate *string `json:"fromDate"`
	ToDate   *string `json:"toDate"`
	Events   int     `json:"events"`
	Digest   string  `json:"digest"`
}

// digestOf is written from docs/review.md alone.
func digestOf(t *testing.T, lines []string) string {
	t.Helper()
	sum := sha256.New()
	for _, line := range lines {
		var e servedEvent
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		io.WriteString(sum, e.Hash+"\n")
	}
	return hex.EncodeToString(sum.Sum(nil))
}

func TestPartOfAnExportIsWhatWasSigned(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, secret := v.newClient("resumes:read")
	other, _ := v.newClient("resumes:read")
	for range 3 {
		v.token(id, secret, "")
		v.active(v.bearer)
	}
	chain := v.chain()
	for i, metadata := range []string{
		`{"subject":"` + id + `"}`, `{"act":{"sub":"` + other + `","act":{"sub":"` + id + `"}}}`, `{"scope":"` + id + ` "}`, `{}`,
	} {
		e := forgeEvent(chain, time.Now().Add(time.Duration(i)*time.Second), tokenIssued)
		e.Metadata = json.RawMessage(metadata)
		e.UserAgent = `says "` + id + `" itself`
		e.Hash = e.documentedHash()
		chain = append(chain, e)
		insertEvents(t, v.db, chain[len(chain)-1:])
	}
	all, err := v.export()
	if n := len(chain); err != nil || len(all) != n+1 {
		t.Fatalf("audit-export = %d lines, %v, want %d", len(all), err, n+1)
	}
	n, w := len(chain), newWitness(v)
	text := func(lines []string) string { return strings.Join(lines, "\n") + "\n" }
	whole := checkpointLine.FindStringSubmatch(all[n])[1]
	names := func(e servedEvent) bool {
		return idText(e.AgentID) == id || idText(e.ActorID) == id || strings.Contains(string(e.Metadata), `"`+id+`"`)
	}
	from, to := chain[5].Timestamp, chain[n-3].Timestamp
	after := func(e servedEvent) bool { return e.Timestamp >= from }
	before := func(e servedEvent) bool { return e.Timestamp <= to }
	day := time.Now().UTC().Format(time.DateOnly)
	dayBegins, dayEnds := day+"T00:00:00.000Z", day+"T23:59:59.999Z"
	parts := map[string][]string{}
	for _, row := range []struct {
		args []string
		part partOfLog
		has  func(servedEvent) bool
	}{
		{[]string{"-agent", id}, partOfLog{AgentID: &id}, names},
		{[]string{"-from", from}, partOfLog{FromDate: &from}, after},
		{[]string{"--to", to}, partOfLog{ToDate: &to}, before},
		{[]string{"-agent=" + id, "-from=" + from, "-to=" + to}, partOfLog{AgentID: &id, FromDate: &from, ToDate: &to}, func(e servedEvent) bool { return names(e) && after(e) && before(e) }},
		{[]string{"-from", day, "-to", day}, partOfLog{FromDate: &dayBegins, ToDate: &dayEnds}, func(e servedEvent) bool { return e.Timestamp >= dayBegins && e.Timestamp <= dayEnds }},
		{[]string{"-agent", newID()}, partOfLog{}, func(servedEvent) bool { return false }},
	} {
		lines, err := v.export(row.args...)
		var want []string
		for i, e := range chain {
			if row.has(e) {
				want = append(want, all[i])
			}
		}
		if err != nil || !slices.Equal(lines[:len(lines)-1], want) {
			t.Fatalf("audit-export %q = %d lines, %v, want %d", row.args, len(lines), err, len(want)+1)
		}
		signed := checkpointLine.FindStringSubmatch(lines[len(want)])[1]
		var claims partClaims
		payload, err := base64.RawURLEncoding.DecodeString(strings.Split(signed, ".")[1])
		if err = errors.Join(err, json.Unmarshal(payload, &claims)); err != nil {
			t.Fatal(err)
		}
		if row.part.AgentID == nil && row.part.FromDate == nil && row.part.ToDate == nil {
			row.part.AgentID = claims.Part.AgentID
		}
		row.part.Events, row.part.Digest = len(want), digestOf(t, want)
		asked, _ := json.Marshal(row.part)
		if got, _ := json.Marshal(claims.Part); claims.Seq != int64(n) || claims.Hash != chain[n-1].Hash || string(got) != string(asked) {
			t.Errorf("audit-export %q signs %s, want %s of seq %d", row.args, payload, asked, n)
		}
		for _, cp := range []string{"", whole, signed} {
			out, err := w.checks(text(lines), strings.Fields(cp)...)
			says := fmt.Sprintf("verified: %d events, only a part of the log up to seq %d: %s\nthat none of the part is missing is the word of whoever holds the key\nissuer: %s\n", len(want), n, asked, v.env["ISSUER"])
			if err != nil || !strings.HasPrefix(out, says) || strings.Contains(out, "extends") != (cp != "") {
				t.Errorf("verify-audit of the part %q = %q, %v, want %q", row.args, out, err, says)
			}
		}
		if out, err := v.verifyAudit(signed); err != nil || !strings.Contains(out, fmt.Sprintf("extends the checkpoint at seq %d\n", n)) {
			t.Errorf("verify-audit with the checkpoint of the part %q = %q, %v", row.args, out, err)
		}
		if out, err := w.checks(text(all), signed); err != nil || !strings.Contains(out, fmt.Sprintf("extends the checkpoint at seq %d\n", n)) {
			t.Errorf("verify-audit of the whole with the checkpoint of the part %q = %q, %v", row.args, out, err)
		}
		parts[row.args[0]] = lines
	}

	part, err := v.export("-agent", id)
	if err != nil || len(part) < 6 {
		t.Fatalf("audit-export -agent = %q, %v", part, err)
	}
	of, bad := len(part)-1, fmt.Sprintf("these are not the %d events", len(part)-1)
	sign1 := func(change func(*partClaims)) string {
		c := partClaims{checkpoint{v.env["ISSUER"], int64(n), chain[n-1].Hash, 1}, partOfLog{AgentID: &id, Events: of, Digest: digestOf(t, part[:of])}}
		change(&c)
		return `{"checkpoint":"` + sign(t, v.env["JWT_PRIVATE_KEY"], auditCheckpoint, c) + `"}`
	}
	var third servedEvent
	if err := json.Unmarshal([]byte(part[2]), &third); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, checkpoint string
		alter            func([]string) []string
		want             string
	}{
		{"as documented", "", func(l []string) []string { l[of] = sign1(func(*partClaims) {}); return l }, ""},
		{"one left out", "", func(l []string) []string { return slices.Delete(l, 2, 3) }, bad},
		{"the first left out", "", func(l []string) []string { return l[1:] }, bad},
		{"the last left out", "", func(l []string) []string { return slices.Delete(l, of-1, of) }, bad},
		{"all left out", "", func(l []string) []string { return l[of:] }, bad},
		{"one doubled", "", func(l []string) []string { return slices.Insert(l, 2, l[2]) }, fmt.Sprintf("the first bad seq is %d", third.Seq)},
		{"two that changed places", "", func(l []string) []string { l[1], l[2] = l[2], l[1]; return l }, "the first bad seq is "},
		{"one altered", "", func(l []string) []string { l[2] = strings.Replace(l[2], `"success"`, `"failure"`, 1); return l }, fmt.Sprintf("the first bad seq is %d", third.Seq)},
		{"one altered and hashed anew", "", func(l []string) []string {
			l[2] = hashedAnew(t, []string{strings.Replace(l[2], `"success"`, `"failure"`, 1), ""}, 0)[0]
			return l
		}, bad},
		{"a space", "", func(l []string) []string { l[2] += " "; return l }, "line 3 "},
		{"wider by another of the log", "", func(l []string) []string { return append([]string{all[0]}, l...) }, bad},
		{"its last line under the whole", "", func(l []string) []string { return append(slices.Clone(all[:n]), l[of]) }, bad},
		{"the whole's last line under it", "", func(l []string) []string { l[of] = all[n]; return l }, "the first bad seq is "},
		{"another part's last line under it", "", func(l []string) []string { l[of] = parts["-from"][len(parts["-from"])-1]; return l }, "these are not the "},
		{"no last line", "", func(l []string) []string { return l[:of] }, "cut off"},
		{"signed for one more", "", func(l []string) []string { l[of] = sign1(func(c *partClaims) { c.Part.Events++ }); return l }, "these are not the "},
		{"signed before its last event", "", func(l []string) []string { l[of] = sign1(func(c *partClaims) { c.Seq = 2 }); return l }, bad},
		{"held to a checkpoint of before", sign(t, v.env["JWT_PRIVATE_KEY"], auditCheckpoint, checkpoint{v.env["ISSUER"], 5, chain[4].Hash, 1}), func(l []string) []string { return l }, "can't be held to the checkpoint at seq 5"},
		{"held to one of another log", sign(t, v.env["JWT_PRIVATE_KEY"], auditCheckpoint, checkpoint{v.env["ISSUER"], int64(n), firstPrevHash, 1}), func(l []string) []string { return l }, fmt.Sprintf("the first bad seq is %d", n)},
		{"held to another issuer's", sign(t, v.env["JWT_PRIVATE_KEY"], auditCheckpoint, checkpoint{v.env["ISSUER"] + "/", 5, chain[4].Hash, 1}), func(l []string) []string { return l }, "no checkpoint of this issuer"},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := &witness{t, t.TempDir(), w.jwks, w.python, w.ended}
			out, err := w.checks(text(row.alter(slices.Clone(part))), strings.Fields(row.checkpoint)...)
			if row.want == "" && (err != nil || !strings.HasPrefix(out, "verified: ")) || row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want) || out != "") {
				t.Errorf("verify-audit = %q, %v, want %q", out, err, row.want)
			}
		})
	}
	// What isn't printed is checked too.
	for _, name := range v.relations() {
		v.exec(`drop trigger if exists append_only on ` + name)
	}
	v.exec(`update audit_events set user_agent = 'x' where seq = 1`)
	if lines, err := v.export("-agent", id); err == nil || !strings.Contains(err.Error(), "the first bad seq is 1") || strings.Contains(text(lines), "checkpoint") {
		t.Errorf("audit-export -agent of an altered log = %q, %v", lines, err)
	}
}
