package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The benchmarks drive the real program, as a process of its own, over HTTP on
// loopback from 16 connections. The load runs on the same cores, so each rate
// is to be read beside the rate of signatures in the same run.

const benchConnections = 16

func startProgram(b *testing.B) *program {
	b.Helper()
	return newProgram(b, newDatabase(b), newRedis(b), "RATE_LIMIT_PER_MINUTE", "1000000", "MONTHLY_TOKEN_LIMIT", "1000000000")
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
	p := startProgram(b) // which knows the secret by now
	p.load(b, "tokens", "POST", "/api/v1/token", "", "grant_type=client_credentials")
}

func BenchmarkIntrospection(b *testing.B) {
	p := startProgram(b)
	p.load(b, "introspections", "POST", "/api/v1/token/introspect", "", "token="+p.bearer)
}

func BenchmarkAuthenticatedGet(b *testing.B) {
	p := startProgram(b)
	p.load(b, "gets", "GET", "/api/v1/agents/"+p.id, p.bearer, "")
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
