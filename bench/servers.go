package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// stores are those that the servers use: a new database, and an empty Redis.
type stores struct {
	database, redis string // URLs
	db              *pgxpool.Pool
	cache           *redis.Client
	postmaster      int // its pid, 0 if it isn't on this machine
}

func newStores(ctx context.Context) (*stores, error) {
	config, err := pgx.ParseConfig(os.Getenv("TEST_DATABASE_URL"))
	if err != nil {
		return nil, err
	}
	admin, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	defer admin.Close(ctx)
	name := fmt.Sprintf("bench_%d", time.Now().UnixNano())
	if _, err := admin.Exec(ctx, `create database `+name); err != nil {
		return nil, err
	}
	u, err := url.Parse(os.Getenv("TEST_DATABASE_URL"))
	if err != nil {
		return nil, err
	}
	u.Path = "/" + name
	s := &stores{database: u.String(), redis: os.Getenv("TEST_REDIS_URL")}
	if s.db, err = pgxpool.New(ctx, s.database); err != nil {
		return nil, err
	}
	options, err := redis.ParseURL(s.redis)
	if err != nil {
		return nil, err
	}
	s.cache = redis.NewClient(options)
	if err := s.cache.FlushDB(ctx).Err(); err != nil {
		return nil, err
	}
	var backend int
	if err := s.db.QueryRow(ctx, `select pg_backend_pid()`).Scan(&backend); err != nil {
		return nil, err
	}
	if stat := readStat(backend); len(stat) > 1 && strings.HasPrefix(command(backend), "postgres") {
		s.postmaster, _ = strconv.Atoi(stat[1])
	}
	return s, nil
}

func (s *stores) close(ctx context.Context) {
	name := s.db.Config().ConnConfig.Database
	s.db.Close()
	s.cache.Close()
	if admin, err := pgx.Connect(ctx, os.Getenv("TEST_DATABASE_URL")); err == nil {
		admin.Exec(ctx, `drop database `+name+` with (force)`)
		admin.Close(ctx)
	}
}

// readStat returns the fields of /proc/PID/stat after the name of the command,
// the state first.
func readStat(pid int) []string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // it may be gone
	_, after, _ := strings.Cut(string(stat), ") ")
	return strings.Fields(after)
}

func command(pid int) string {
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return string(name)
}

// ticks is the CPU time of a process, of those of its children that are gone
// too where these are counted, in hundredths of a second.
func ticks(stat []string, children bool) (sum int) {
	if len(stat) < 15 {
		return 0
	}
	last := 13 // utime, stime
	if children {
		last = 15
	}
	for _, field := range stat[11:last] {
		n, _ := strconv.Atoi(field)
		sum += n
	}
	return sum
}

const tick = 10 * time.Millisecond // of Linux, for user space

// postgresCPU is that of all of PostgreSQL's processes until now.
func (s *stores) postgresCPU() time.Duration {
	if s.postmaster == 0 {
		return 0
	}
	sum := ticks(readStat(s.postmaster), true)
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, folder := range all {
		pid, _ := strconv.Atoi(filepath.Base(folder))
		if stat := readStat(pid); len(stat) > 1 && stat[1] == strconv.Itoa(s.postmaster) {
			sum += ticks(stat, false)
		}
	}
	return time.Duration(sum) * tick
}

// redisCPU is that of Redis until now, as it says itself.
func (s *stores) redisCPU(ctx context.Context) (sum time.Duration) {
	info, _ := s.cache.Info(ctx, "cpu").Result()
	for _, m := range regexp.MustCompile(`used_cpu_(?:sys|user):([0-9.]+)`).FindAllStringSubmatch(info, -1) {
		seconds, _ := strconv.ParseFloat(m[1], 64)
		sum += time.Duration(seconds * float64(time.Second))
	}
	return sum
}

// A server is a copy of the service, or any other that listens.
type server struct {
	cmd        *exec.Cmd
	address    string
	ready      time.Duration // from its start until it says that it serves
	key        string        // that it signs with
	id, secret string        // of the first agent
	token      string        // of that
}

// program builds the service, once.
var program string

// env is what a copy of the service is given.
func (s *stores) env(key string) []string {
	return append(os.Environ(), "DATABASE_URL="+s.database, "REDIS_URL="+s.redis, "JWT_PRIVATE_KEY="+key, "PORT=0", "HOST=127.0.0.1",
		"METRICS_ADDR=", "DRAIN_TIME=0", "ISSUER=http://bench.example", "RATE_LIMIT_PER_MINUTE=1000000", "MONTHLY_TOKEN_LIMIT=1000000000", "MAX_AGENTS=0")
}

// run runs a command of the service and returns what it prints.
func (s *stores) run(key string, args ...string) (string, error) {
	cmd := exec.Command(program, args...)
	cmd.Env, cmd.Stderr = s.env(key), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	return string(out), err
}

var addressPattern = regexp.MustCompile(`"msg":"serving".*"address":"([^"]+)"`)

// start starts a program and waits until it serves. Its log goes to a file, as
// a supervisor would have it.
func start(cmd *exec.Cmd, ready *regexp.Regexp) (*server, error) {
	log, err := os.CreateTemp("", "bench-log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	defer os.Remove(log.Name())
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	sv := &server{cmd: cmd}
	for time.Since(begun) < 2*time.Minute {
		text, err := os.ReadFile(log.Name())
		if err != nil {
			return nil, err
		}
		if m := ready.FindSubmatch(text); m != nil {
			sv.address, sv.ready = string(m[1]), time.Since(begun)
			return sv, nil
		}
		time.Sleep(time.Millisecond)
	}
	text, _ := os.ReadFile(log.Name())
	sv.stop()
	return nil, fmt.Errorf("%s does not serve: %s", cmd.Path, text)
}

// newServer starts a copy of the service. The first one registers the agent
// that the others use too.
func (s *stores) newServer(key string, first *server, more ...string) (*server, error) {
	var id, secret string
	if first != nil {
		id, secret = first.id, first.secret
	} else {
		out, err := s.run(key, "bootstrap", "bench@example.com")
		if err != nil {
			return nil, err
		}
		if _, err := fmt.Sscanf(out, "client_id: %s\nclient_secret: %s\n", &id, &secret); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command(program)
	cmd.Env = append(s.env(key), more...)
	sv, err := start(cmd, addressPattern)
	if err != nil {
		return nil, err
	}
	sv.key, sv.id, sv.secret = key, id, secret
	sv.token, err = sv.ask("POST", "/api/v1/token", basic(id, secret), grant, "access_token")
	return sv, err
}

func (sv *server) stop() {
	end := syscall.SIGTERM
	if *profile != "" {
		end = syscall.SIGUSR1 // it writes its profile first; of others this is the end, too
	}
	sv.cmd.Process.Signal(end)
	sv.cmd.Wait()
}

// cpu is its CPU time until now.
func (sv *server) cpu() time.Duration {
	return time.Duration(ticks(readStat(sv.cmd.Process.Pid), false)) * tick
}

// memory is a process's resident memory in bytes, 0 when it has ended.
func memory(pid int) float64 {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		return 0
	}
	kb, _ := strconv.ParseFloat(string(m[1]), 64)
	return kb * 1024
}

func (sv *server) memory() float64 { return memory(sv.cmd.Process.Pid) }

// ask sends a request and returns a member of the JSON answer.
func (sv *server) ask(method, path, auth, form, member string, header ...string) (string, error) {
	q, err := http.NewRequest(method, "http://"+sv.address+path, strings.NewReader(form))
	if err != nil {
		return "", err
	}
	q.Header.Set("Authorization", auth)
	q.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for i := 0; i < len(header); i += 2 {
		q.Header.Set(header[i], header[i+1])
	}
	answer, err := http.DefaultClient.Do(q)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	members := map[string]any{}
	err = json.NewDecoder(answer.Body).Decode(&members)
	text, ok := members[member].(string)
	if err != nil || !ok {
		return "", fmt.Errorf("%s %s has no %s: %v %w", method, path, member, members, err)
	}
	return text, nil
}

// request is a request in bytes. Auth is a header; form may be empty.
func request(method, path, auth, form string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: bench.example\r\nUser-Agent: bench\r\n", method, path)
	if auth != "" {
		fmt.Fprintf(&b, "Authorization: %s\r\n", auth)
	}
	if form != "" {
		fmt.Fprintf(&b, "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n", len(form))
	}
	fmt.Fprintf(&b, "\r\n%s", form)
	return b.Bytes()
}

func basic(id, secret string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(id+":"+secret))
}

func (sv *server) bearer() string { return "Bearer " + sv.token }

const grant = "grant_type=client_credentials"

func (sv *server) tokenRequest() []byte {
	return request("POST", "/api/v1/token", basic(sv.id, sv.secret), grant)
}

// peak waits until a process has ended, and returns the most memory that it had,
// in bytes.
func peak(pid int) (most float64) {
	for {
		now := memory(pid)
		if now == 0 {
			return most
		}
		most = max(most, now)
		time.Sleep(20 * time.Millisecond)
	}
}
