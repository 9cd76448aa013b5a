package test

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
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
	for range 300 { // more than one buffer
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

// Whatever PostgreSQL does, nothing is left out or printed twice. A log that is another
// afterwards ends it.
func TestFollowedExportOutlivesPostgreSQLAndNoOtherLog(t *testing.T) {
	t.Parallel()
	postgres := newPostgres(t)
	p := newProgram(t, postgres.url(), newRedis(t))
	f := p.follow(t)
	f.wantUpTo(p.service, 1)
	begin := func(what string, fault func(), faults int) {
		t.Helper()
		fault()
		p.eventually("it says that it waits: "+what, func() bool { return f.waits() == faults })
	}
	serves := func() {
		t.Helper()
		p.eventually("it serves", func() bool { return p.active(p.bearer) })
	}
	for i := range rounds(2, 20) {
		begin("PostgreSQL is killed", postgres.kill, 2*i+1)
		postgres.start()
		serves()
		f.wantUpTo(p.service, 1)
		begin("PostgreSQL hangs", postgres.hang, 2*i+2)
		postgres.resume()
		serves()
		f.wantUpTo(p.service, 1)
	}
	faults := f.waits()

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
	if f.waits() > faults+1 {
		t.Errorf("audit-export -follow says of one fault: %s", f.log.String())
	}
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
	} {
		_, err := command(t.Context(), env, testLog, row.args...)
		if err == nil || !strings.Contains(err.Error(), row.want) || !regexp.MustCompile(`^`+row.args[0]+`: .*; -h lists all$`).MatchString(err.Error()) {
			t.Errorf("%q = %v, want an error of %s that tells of -h", row.args, err, row.want)
		}
	}
}
