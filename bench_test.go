package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The benchmarks drive the real program, as a process of its own, over HTTP on
// loopback from 16 connections. The load runs on the same cores, so each rate
// is to be read beside the rate of signatures in the same run.

const benchConnections = 16

// A program is the service as operators run it.
type program struct {
	url, id, secret string
	process         *os.Process
	ready           time.Duration // from its start until it serves
}

var (
	benchProgram = sync.OnceValues(buildProgram)
	benchFolder  string // TestMain removes it
)

// buildProgram returns the path of the program, built for this run.
func buildProgram() (string, error) {
	var err error
	if benchFolder, err = os.MkdirTemp("", "agentidp-bench"); err != nil {
		return "", err
	}
	path := filepath.Join(benchFolder, "agentidp")
	out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return path, err
}

func startProgram(b *testing.B) *program {
	b.Helper()
	path, err := benchProgram()
	if err != nil {
		b.Fatal(err)
	}
	env := append(os.Environ(), "DATABASE_URL="+newDatabase(b), "REDIS_URL="+newRedis(b), "JWT_PRIVATE_KEY="+testKey(),
		"HOST=127.0.0.1", "PORT=0", "ISSUER=http://bench.test", "RATE_LIMIT_PER_MINUTE=1000000", "MONTHLY_TOKEN_LIMIT=1000000000")
	bootstrap := exec.Command(path, "bootstrap", "first@example.com")
	bootstrap.Env, bootstrap.Stderr = env, os.Stderr
	out, err := bootstrap.Output()
	p := &program{}
	if _, scanErr := fmt.Sscanf(string(out), "client_id: %s\nclient_secret: %s\n", &p.id, &p.secret); err != nil || scanErr != nil {
		b.Fatal(err, scanErr)
	}
	cmd := exec.Command(path)
	cmd.Env = env
	logs, err := cmd.StderrPipe()
	if err != nil {
		b.Fatal(err)
	}
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	p.process = cmd.Process
	b.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	})
	lines := bufio.NewScanner(logs)
	for lines.Scan() {
		var line struct{ Msg, Address string }
		if json.Unmarshal(lines.Bytes(), &line); line.Msg == "serving" {
			p.url, p.ready = "http://"+line.Address, time.Since(begun)
			break
		}
	}
	go io.Copy(io.Discard, logs)
	if p.url == "" {
		b.Fatal("the program did not start")
	}
	return p
}

// cpu returns the time that the program has spent on its processors.
func (p *program) cpu(b *testing.B) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	var user, system int64
	fields := strings.Fields(after)
	fmt.Sscan(fields[11], &user)
	fmt.Sscan(fields[12], &system)
	return time.Duration(user+system) * time.Second / 100 // proc(5): in clock ticks
}

// memory returns the resident memory in MB.
func (p *program) memory(b *testing.B) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	var kB float64
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	fmt.Sscan(after, &kB)
	return kB / 1000
}

// ask sends a request and returns the body, which must come with a 200.
func (p *program) ask(c *http.Client, method, path, bearer, form string) ([]byte, error) {
	q, err := http.NewRequest(method, p.url+path, strings.NewReader(form))
	if err != nil {
		return nil, err
	}
	if form != "" {
		q.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		q.SetBasicAuth(p.id, p.secret)
	} else if bearer != "" {
		q.Header.Set("Authorization", "Bearer "+bearer)
	}
	answer, err := c.Do(q)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	var body bytes.Buffer
	if _, err := body.ReadFrom(answer.Body); err != nil || answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %s: %d %s %w", method, path, answer.StatusCode, body.Bytes(), err)
	}
	return body.Bytes(), nil
}

func (p *program) token(b *testing.B) string {
	b.Helper()
	body, err := p.ask(http.DefaultClient, "POST", "/api/v1/token", "", "grant_type=client_credentials")
	var token struct {
		Text string `json:"access_token"`
	}
	if err != nil || json.Unmarshal(body, &token) != nil {
		b.Fatal(err)
	}
	return token.Text
}

// load sends b.N requests over all connections and reports the rate, beside
// that of signatures, and the program's CPU time for each.
func (p *program) load(b *testing.B, what, method, path, bearer, form string) {
	b.Helper()
	signatures := signatureRate(b)
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: benchConnections}}
	var sent atomic.Int64
	var group sync.WaitGroup
	before := p.cpu(b)
	b.ResetTimer()
	for range benchConnections {
		group.Go(func() {
			for sent.Add(1) <= int64(b.N) {
				if _, err := p.ask(client, method, path, bearer, form); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	b.StopTimer()
	rate := float64(b.N) / b.Elapsed().Seconds()
	b.ReportMetric(rate, what+"/s")
	b.ReportMetric(rate/signatures, "per-signature")
	b.ReportMetric(float64((p.cpu(b)-before).Microseconds())/float64(b.N), "server-µs/op")
	b.ReportMetric(0, "ns/op")
}

// signatureRate returns how many RSA-2048 signatures all cores make a second.
func signatureRate(b *testing.B) float64 {
	b.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		b.Fatal(err)
	}
	var made atomic.Int64
	var group sync.WaitGroup
	begun := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for range benchConnections {
		group.Go(func() {
			for ctx.Err() == nil {
				rsa.SignPKCS1v15(nil, key, crypto.SHA256, make([]byte, 32))
				made.Add(1)
			}
		})
	}
	group.Wait()
	return float64(made.Load()) / time.Since(begun).Seconds()
}

func BenchmarkSignature(b *testing.B) {
	b.ReportMetric(signatureRate(b), "signatures/s")
	b.ReportMetric(0, "ns/op")
}

func BenchmarkToken(b *testing.B) {
	p := startProgram(b)
	p.token(b) // from here on the secret is known
	p.load(b, "tokens", "POST", "/api/v1/token", "", "grant_type=client_credentials")
}

func BenchmarkIntrospection(b *testing.B) {
	p := startProgram(b)
	p.load(b, "introspections", "POST", "/api/v1/token/introspect", "", "token="+p.token(b))
}

func BenchmarkAuthenticatedGet(b *testing.B) {
	p := startProgram(b)
	p.load(b, "gets", "GET", "/api/v1/agents/"+p.id, p.token(b), "")
}

func BenchmarkJWKS(b *testing.B) {
	startProgram(b).load(b, "gets", "GET", "/.well-known/jwks.json", "", "")
}

// BenchmarkStart is the time until the program serves, on a schema that is
// there, and the memory that it then takes.
func BenchmarkStart(b *testing.B) {
	var ready time.Duration
	var memory float64
	for b.Loop() {
		p := startProgram(b)
		time.Sleep(time.Second)
		ready, memory = ready+p.ready, memory+p.memory(b)
	}
	b.ReportMetric(float64(ready.Milliseconds())/float64(b.N), "ms-to-serve")
	b.ReportMetric(memory/float64(b.N), "MB-idle")
	b.ReportMetric(0, "ns/op")
}
