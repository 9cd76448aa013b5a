package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A servicesRun is a dev/with-services.sh at work, whose temporary folder is the
// test's own.
type servicesRun struct {
	t       *testing.T
	temp    string // where it makes its folder
	keep    string // "" where nothing is kept
	command *process
}

// services starts one and waits until CMD has taken its place, and is ended from outside.
func services(t *testing.T, keep string) *servicesRun {
	t.Helper()
	v := &servicesRun{t: t, temp: openFolder(t), keep: keep}
	v.command = v.start("sh", "-c", "touch $TMPDIR/begun; exec sleep 1000")
	v.until("it did not begin", func() bool {
		begun, _ := filepath.Glob(v.temp + "/*/tmp/begun")
		return begun != nil && len(v.ofAll("with-services.sh")) == 1 && len(v.ofAll("--supervise")) == 1
	})
	return v
}

// openFolder is one that the servers' user may pass through.
func openFolder(t *testing.T) string {
	t.Helper()
	folder := privateFolder(t)
	if err := os.Chmod(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	return folder
}

func (v *servicesRun) start(args ...string) *process {
	v.t.Helper()
	if v.keep != "" {
		args = append([]string{"--keep", v.keep}, args...)
	}
	cmd := exec.Command("./dev/with-services.sh", args...)
	cmd.Env = append(os.Environ(), "DATABASE_URL=", "REDIS_URL=", "TMPDIR="+v.temp)
	return startProcess(v.t, cmd, syscall.SIGKILL)
}

// ofAll lists the processes that have anything open in its folders and this
// in their command line.
func (v *servicesRun) ofAll(word string) (pids []int) {
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	working, _ := filepath.Glob("/proc/[0-9]*/cwd")
	found := map[int]bool{}
	for _, link := range append(links, working...) {
		to, _ := os.Readlink(link)
		if strings.HasPrefix(to, v.temp+"/") || v.keep != "" && strings.HasPrefix(to, v.keep) {
			pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if !found[pid] && strings.Contains(string(line), word) {
				found[pid] = true
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func (v *servicesRun) killAll(word string) {
	for _, pid := range v.ofAll(word) {
		if word != "postgres" && word != "redis-server" || !slices.Contains(v.ofAll("--supervise"), pid) { // whose operands have their paths
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

func (v *servicesRun) until(why string, done func() bool) {
	v.t.Helper()
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) { // it may have to build; to look into all processes takes its time
		if done() {
			return
		}
	}
	v.t.Fatalf("%s: %v", why, v.ofAll(""))
}

func TestNothingStaysOfServicesWhateverIsKilled(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(v *servicesRun){
		"CMD ends":                 func(v *servicesRun) { v.command.signal(syscall.SIGTERM) },
		"CMD is killed":            func(v *servicesRun) { v.command.kill() },
		"the supervisor, then CMD": func(v *servicesRun) { v.killAll("--supervise"); v.command.kill() },
		"CMD, then the supervisor": func(v *servicesRun) { v.command.kill(); v.killAll("--supervise") },
		"Redis, then CMD":          func(v *servicesRun) { v.killAll("redis-server"); v.command.kill() },
		"PostgreSQL, then CMD":     func(v *servicesRun) { v.killAll("postgres"); v.command.kill() },
		"all at once":              func(v *servicesRun) { v.killAll("") },
		"the folder, then CMD":     func(v *servicesRun) { os.RemoveAll(v.temp + "/" + v.folders()[0]); v.command.kill() },
		"CMD, and at once the folder": func(v *servicesRun) {
			folder := v.temp + "/" + v.folders()[0]
			v.command.kill()
			os.RemoveAll(folder)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := services(t, "")
			end(v)
			v.until("these stay", func() bool { return len(v.ofAll("")) == 0 })
			if n := len(v.folders()); n > 0 && !strings.Contains(name, "supervisor") && name != "all at once" {
				t.Errorf("%d folders stay", n)
			}
			if again := v.start("true"); again.wait() != nil { // which removes what a killed supervisor could not
				t.Errorf("the next run fails")
			}
			v.until("a folder stays", func() bool { return len(v.folders()) == 0 })
		})
	}
}

func (v *servicesRun) folders() (names []string) {
	entries, _ := os.ReadDir(v.temp)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// What is kept may be deleted while it is used, or while it is put away.
func TestKeptServicesEndWhenTheirFolderIsDeleted(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(v *servicesRun){
		"before":  func(v *servicesRun) { os.RemoveAll(v.keep); v.command.signal(syscall.SIGTERM) },
		"at once": func(v *servicesRun) { v.command.signal(syscall.SIGTERM); os.RemoveAll(v.keep) },
		"killed":  func(v *servicesRun) { v.command.kill(); os.RemoveAll(v.keep) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := services(t, privateFolder(t)+"/kept")
			if again := v.start("true"); again.wait() == nil {
				t.Error("two runs share what is kept")
			}
			end(v)
			v.until("these stay", func() bool { return len(v.ofAll("")) == 0 && len(v.folders()) == 0 })
		})
	}
}

// The terminal of 'make run' is closed: make leads its session, or a shell does.
func TestRunEndsWithItsTerminal(t *testing.T) {
	t.Parallel()
	for name, command := range map[string]string{"make leads": "make run", "a shell leads": "bash -ic 'make run; true'"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := &servicesRun{t: t, temp: openFolder(t), keep: sourceCopy(t)}
			cmd := exec.Command("script", "-qfc", command, "/dev/null")
			var out logBuffer
			cmd.Dir, cmd.Stdout, cmd.Env = v.keep, &out, outsideEnv("PORT="+steadyPort(t), "METRICS_ADDR=", "TMPDIR="+v.temp)
			terminal := startProcess(t, cmd, syscall.SIGKILL)
			v.until("it did not begin", func() bool { return strings.Contains(out.String(), "\ncurl ") })
			terminal.kill()
			v.until("these stay", func() bool { return len(v.ofAll("")) == 0 && len(v.folders()) == 0 })
		})
	}
}

// What others have left in the place of the folders is let be.
func TestServicesOpenNothingOfOthers(t *testing.T) {
	t.Parallel()
	v := &servicesRun{t: t, temp: openFolder(t)}
	target := v.temp + "/target"
	if err := errors.Join(syscall.Mkfifo(v.temp+"/agentidp-services.fifo", 0o600), os.Mkdir(target, 0o700),
		os.Symlink(target, v.temp+"/agentidp-services.link")); err != nil {
		t.Fatal(err)
	}
	if err := v.start("true").wait(); err != nil {
		t.Errorf("beside a FIFO and a link it ends with %v", err)
	}
	v.until("a folder stays, or the others are gone", func() bool { return len(v.folders()) == 3 })
}
