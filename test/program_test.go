package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// The second harness: the real program, and a PostgreSQL and a Redis of the
// test's own, all of them processes that the test may kill, stop and restart.
// None outlives the test program, however that ends.

// soak gives the tests that take long their full length: make soak.
var soak = os.Getenv("SOAK") != ""

// rounds are few in make test, and all of them in make soak.
func rounds(few, all int) int {
	if soak {
		return all
	}
	return few
}

// A process and those that it has started.
type process struct {
	name   string
	cmd    *exec.Cmd
	exited chan struct{} // closed when it has, and err is set
	err    error
}

// startProcess starts a command, which gets the signal end when the test or the
// test program is over.
func startProcess(t testing.TB, cmd *exec.Cmd, end syscall.Signal) *process {
	t.Helper()
	p := &process{name: filepath.Base(cmd.Path), cmd: cmd, exited: make(chan struct{})}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = end
	if err := cmd.Start(); err != nil {
		t.Fatalf("a %s of the test's own is needed: %v", p.name, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.resume()
		p.stop(t, end)
	})
	return p
}

// family is the process, and all that it has started.
func (p *process) family() []int {
	pids := []int{p.cmd.Process.Pid}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		stat, _ := os.ReadFile(name) // it may be gone
		_, after, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(after); len(fields) > 1 && fields[1] == strconv.Itoa(p.cmd.Process.Pid) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// signal sends a signal to the process and to all that it has started.
func (p *process) signal(sig syscall.Signal) {
	select {
	case <-p.exited: // its number may be another's by now
		return
	default:
	}
	for _, pid := range p.family() {
		syscall.Kill(pid, sig)
	}
}

// hang makes it neither answer nor go away, until resume.
func (p *process) hang()   { p.signal(syscall.SIGSTOP) }
func (p *process) resume() { p.signal(syscall.SIGCONT) }

// kill is kill -9.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.exited
}

// wait returns how it has ended by itself.
func (p *process) wait() error {
	<-p.exited
	return p.err
}

// stop asks it to stop by a signal, and returns how it has ended.
func (p *process) stop(t testing.TB, sig syscall.Signal) error {
	t.Helper()
	p.cmd.Process.Signal(sig) // fails if it has ended
	select {
	case <-p.exited:
	case <-time.After(time.Minute):
		t.Errorf("%s did not stop within a minute of %s", p.name, sig)
		p.kill()
	}
	return p.err
}

// privateFolder makes a folder with a name that is short, as a socket's must be.
func privateFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp("", "idp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return folder
}

// A postgresServer is a PostgreSQL of the test's own.
type postgresServer struct {
	*process
	t        testing.TB
	folder   string // with its data and its socket
	settings []string
	owner    *syscall.SysProcAttr // whose it is: PostgreSQL refuses root
}

// postgresTemplate is a folder with the data of a new PostgreSQL.
var postgresTemplate = sync.OnceValues(func() (string, error) {
	folder := filepath.Join(testFolder, "postgres")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return "", err
	}
	uid, gid, owner, err := postgresUser()
	if err != nil {
		return "", err
	}
	if err := errors.Join(os.Chmod(testFolder, 0o755), os.Chown(folder, uid, gid)); err != nil {
		return "", err
	}
	cmd := exec.Command("initdb", "-D", folder, "-U", "agentidp", "-E", "UTF8", "--locale=C", "-A", "trust", "--no-sync")
	cmd.Dir, cmd.SysProcAttr = "/", owner
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("initdb: %w: %s", err, out)
	}
	return folder, nil
})

// postgresUser says who is to run PostgreSQL: we, or where we are root another.
func postgresUser() (uid, gid int, owner *syscall.SysProcAttr, err error) {
	if os.Getuid() != 0 {
		return os.Getuid(), os.Getgid(), &syscall.SysProcAttr{}, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return 0, 0, nil, err
	}
	_, err = fmt.Sscan(u.Uid+" "+u.Gid, &uid, &gid)
	return uid, gid, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}, err
}

// newPostgres starts a new PostgreSQL. Settings are like "max_connections=20".
// It does not wait for the disk, which only a lost machine would show.
func newPostgres(t testing.TB, settings ...string) *postgresServer {
	t.Helper()
	template, err := postgresTemplate()
	if err != nil {
		t.Fatalf("a PostgreSQL of the test's own is needed: %v", err)
	}
	p := postgresFolder(t, settings...)
	if out, err := exec.Command("cp", "-a", template, p.data()).CombinedOutput(); err != nil {
		t.Fatalf("copying: %v: %s", err, out)
	}
	p.start()
	return p
}

// postgresFolder is where a PostgreSQL can be put.
func postgresFolder(t testing.TB, settings ...string) *postgresServer {
	t.Helper()
	p := &postgresServer{t: t, folder: privateFolder(t), settings: settings}
	uid, gid, owner, err := postgresUser()
	if err == nil {
		p.owner, err = owner, os.Chown(p.folder, uid, gid)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *postgresServer) data() string { return filepath.Join(p.folder, "data") }

// url is that of its one database.
func (p *postgresServer) url() string {
	return "postgres:///postgres?host=" + p.folder + "&port=5432&user=agentidp"
}

// run starts one of PostgreSQL's programs as its user, with its standard error
// in the log of the server.
func (p *postgresServer) run(name string, args ...string) *process {
	p.t.Helper()
	cmd := exec.Command(name, args...)
	log, err := os.OpenFile(filepath.Join(p.folder, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	owner := *p.owner
	cmd.SysProcAttr = &owner
	return startProcess(p.t, cmd, syscall.SIGQUIT) // which leaves no shared memory behind
}

// start starts it, again if it was stopped or killed, and waits until it serves.
func (p *postgresServer) start() {
	p.t.Helper()
	p.launch()
	p.wait()
}

func (p *postgresServer) launch() {
	p.t.Helper()
	args := []string{"-D", p.data(), "-k", p.folder}
	for _, setting := range append([]string{"listen_addresses=", "port=5432", "fsync=off", "full_page_writes=off",
		"dynamic_shared_memory_type=mmap"}, p.settings...) {
		args = append(args, "-c", setting)
	}
	p.process = p.run("postgres", args...)
}

// kill is kill -9 of all of it, and returns when it is gone: it must not start a
// process meanwhile, and doesn't start again beside one.
func (p *postgresServer) kill() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGSTOP)
	family := p.family()
	p.process.kill()
	(&service{t: p.t}).eventually("all of PostgreSQL is gone", func() bool {
		return !slices.ContainsFunc(family, func(pid int) bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err == nil && !strings.Contains(string(stat), ") Z ")
		})
	})
}

func (p *postgresServer) wait() {
	p.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		conn, err := pgx.Connect(context.Background(), p.url())
		if err == nil {
			conn.Close(context.Background())
			return
		}
		if time.Now().After(end) {
			log, _ := os.ReadFile(filepath.Join(p.folder, "log"))
			p.t.Fatalf("a PostgreSQL of the test's own does not start: %v: %s", err, log)
		}
	}
}

// A redisServer is a Redis of the test's own.
type redisServer struct {
	*process
	t      testing.TB
	folder string
	socket string
	client *redis.Client
}

func newRedisServer(t testing.TB) *redisServer {
	t.Helper()
	folder := privateFolder(t)
	r := &redisServer{t: t, folder: folder, socket: filepath.Join(folder, "s")}
	r.client = redis.NewClient(&redis.Options{Network: "unix", Addr: r.socket, MaxRetries: -1})
	t.Cleanup(func() { r.client.Close() })
	r.start()
	return r
}

func (r *redisServer) url() string { return "unix://" + r.socket }

// start starts it, again if it was killed.
func (r *redisServer) start() {
	r.t.Helper()
	program, err := exec.LookPath("redis-server")
	if err != nil {
		program = "valkey-server"
	}
	os.Remove(r.socket)
	r.process = startProcess(r.t, exec.Command(program, "--port", "0", "--unixsocket", r.socket, "--dir", r.folder, "--save", ""), syscall.SIGKILL)
	for end := time.Now().Add(time.Minute); r.client.Ping(context.Background()).Err() != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatal("a Redis of the test's own does not start")
		}
	}
}

// A program is a service whose process a test stops and starts.
type program struct {
	*service
	*process
	log   *programLog
	ready time.Duration // from its start until it serves
}

var (
	builtProgram   = build("agentidp")
	watchedProgram = build("watched", "-race", unwatched)
)

// unwatched takes from the race detector what it has nothing to see in, and what is
// ten times as slow with it: bcrypt computes with what is its own. The Makefile has
// it, too.
const unwatched = "-gcflags=golang.org/x/crypto/blowfish=-race=false"

func build(name string, flags ...string) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		path := filepath.Join(testFolder, name)
		out, err := exec.Command("go", append(append([]string{"build", "-o", path}, flags...), ".")...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return path, err
	})
}

// programEnv are the variables of a program that has no limits.
func programEnv(database, redis string, env ...string) map[string]string {
	all := map[string]string{
		"DATABASE_URL": database, "REDIS_URL": redis, "JWT_PRIVATE_KEY": testKey(), "HOST": "127.0.0.1", "PORT": "0",
		"ISSUER": "http://idp.test", "RATE_LIMIT_PER_MINUTE": "0", "MONTHLY_TOKEN_LIMIT": "0", "MAX_AGENTS": "0",
		"METRICS_ADDR": "", "DRAIN_TIME": "1s",
	}
	for i := 0; i < len(env); i += 2 {
		all[env[i]] = env[i+1]
	}
	return all
}

// newProgram registers a first agent, starts a copy beside these stores and
// gets a token. Env are pairs of variables beyond those of programEnv.
func newProgram(t testing.TB, database, redisURL string, env ...string) *program {
	t.Helper()
	return (&service{t: t, env: programEnv(database, redisURL, env...)}).launch(database, redisURL)
}

// launch connects the test to the stores, registers the first agent if it isn't
// there, starts the program and gets a token.
func (v *service) launch(database, redisURL string) *program {
	v.t.Helper()
	var err error
	if v.db, err = pgxpool.New(context.Background(), database); err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(v.db.Close)
	options, err := redis.ParseURL(redisURL)
	if err != nil {
		v.t.Fatal(err)
	}
	v.rdb = redis.NewClient(options)
	v.t.Cleanup(func() { v.rdb.Close() })
	p := &program{service: v}
	if v.id == "" {
		out := p.command("bootstrap", "first@example.com")
		if _, err := fmt.Sscanf(out, "client_id: %s\nclient_secret: %s\n", &v.id, &v.secret); err != nil {
			v.t.Fatalf("bootstrap printed %q: %v", out, err)
		}
	}
	p.start()
	v.eventually("there is a token", func() bool { // bcrypt may take long where all is watched
		a := v.form(v.id, v.secret, "", "grant_type=client_credentials")
		v.bearer = a.text("access_token")
		return a.status == 200
	})
	return p
}

// another starts a further copy beside the same stores.
func (p *program) another(env ...string) *program {
	p.t.Helper()
	v := *p.service
	v.env = map[string]string{}
	for name, value := range p.env {
		v.env[name] = value
	}
	v.env["PORT"] = "0"
	for i := 0; i < len(env); i += 2 {
		v.env[env[i]] = env[i+1]
	}
	q := &program{service: &v}
	q.start()
	return q
}

// build returns the program's command with its variables.
func (p *program) build(args ...string) *exec.Cmd {
	p.t.Helper()
	path, err := builtProgram()
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range p.env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

// command runs the program with these arguments, and returns what it printed.
// It has to succeed.
func (p *program) command(args ...string) string {
	p.t.Helper()
	cmd := p.build(args...)
	var log bytes.Buffer
	cmd.Stderr = &log
	out, err := cmd.Output()
	if err != nil {
		p.t.Fatalf("agentidp %s: %v: %s", strings.Join(args, " "), err, log.Bytes())
	}
	return string(out)
}

// start starts it, again on the same port if it was stopped or killed, and
// waits until it serves.
func (p *program) start() {
	p.t.Helper()
	if p.log == nil {
		p.log = &programLog{serving: make(chan string, 1)}
		p.t.Cleanup(func() {
			if err := p.log.check(); err != nil {
				p.t.Errorf("the log: %v", err)
			}
		})
	}
	if p.env["ISSUER"] == "" { // its own address, which it has to know before
		p.env["PORT"] = steadyPort(p.t)
		p.env["ISSUER"] = "http://127.0.0.1:" + p.env["PORT"]
	}
	cmd := p.build()
	if p.watched && os.Getenv("RACE") != "" { // set by make test
		path, err := watchedProgram()
		if err != nil {
			p.t.Fatal(err)
		}
		cmd.Path = path
	}
	if p.watched {
		p.log.also = testLog
	}
	cmd.Stderr = p.log
	begun := time.Now()
	p.process = startProcess(p.t, cmd, syscall.SIGKILL)
	select {
	case address := <-p.log.serving:
		p.ready = time.Since(begun)
		p.url = "http://" + address
	case <-p.exited:
		p.t.Fatalf("the program did not start: %v: %s", p.err, p.log)
	case <-time.After(70 * time.Second):
		p.t.Fatalf("the program did not start: %s", p.log)
	}
	_, p.env["PORT"], _ = net.SplitHostPort(strings.TrimPrefix(p.url, "http://"))
}

// A programLog is what a program writes to its standard error.
type programLog struct {
	logBuffer
	also    io.Writer   // nil is nowhere
	serving chan string // gets the address once the program serves
}

var servingLine = regexp.MustCompile(`"msg":"serving".*"address":"([^"]+)"`)

func (l *programLog) Write(p []byte) (int, error) {
	n, err := l.logBuffer.Write(p)
	if l.also != nil {
		l.also.Write(p)
	}
	if line := servingLine.FindSubmatch(p); line != nil {
		l.serving <- string(line[1])
	}
	return n, err
}

// metrics is the address of its last start, where METRICS_ADDR asks for one.
func (l *programLog) metrics() string {
	found := regexp.MustCompile(`"msg":"serving metrics","address":"([^"]+)"`).FindAllStringSubmatch(l.String(), -1)
	if found == nil {
		return ""
	}
	return found[len(found)-1][1]
}

// cpu returns the time that the process has spent on its processors.
func (p *process) cpu(t testing.TB) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	var user, system int64
	fields := strings.Fields(after)
	fmt.Sscan(fields[11], &user)
	fmt.Sscan(fields[12], &system)
	return time.Duration(user+system) * time.Second / 100 // proc(5): in clock ticks
}

// memory returns the resident memory of the process in MB.
func (p *process) memory(t testing.TB) float64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var kB float64
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	fmt.Sscan(after, &kB)
	return kB / 1000
}
