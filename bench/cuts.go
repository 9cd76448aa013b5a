package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// benchCuts suspends agents at one copy, and waits until the service that the page shows, which reads from another, refuses their
// tokens; and then has readers wait on the latter, and none on the former.
func benchCuts(ctx context.Context) error {
	s, err := newStores(ctx)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	key, _, err := newKey("ES256")
	if err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	issuer := "ISSUER=http://127.0.0.1:" + port
	first, err := s.newServer(key, nil, issuer)
	if err != nil {
		return err
	}
	defer first.stop()
	second, err := s.newServer(key, first, issuer, "PORT="+port)
	if err != nil {
		return err
	}
	defer second.stop()
	if err := s.benchKills(ctx, first, second); err != nil {
		return err
	}
	for _, streams := range []bool{false, true} {
		if err := s.benchReaders(ctx, first, second, streams); err != nil {
			return err
		}
	}
	return nil
}

// freePort is one that nobody listens on, and that no outgoing connection is given.
func freePort() (string, error) {
	for range 100 {
		port := fmt.Sprint(10000 + mrand.IntN(20000))
		if listener, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			return port, listener.Close()
		}
	}
	return "", errors.New("no port is free")
}

// pageService starts the service in Go of revocations.md, as it is there, and returns its URL.
func pageService(from *server) (sv *server, service string, err error) {
	page, err := os.ReadFile("docs/developers/revocations.md")
	if err != nil {
		return nil, "", err
	}
	port, err := freePort()
	if err != nil {
		return nil, "", err
	}
	binary := filepath.Join(filepath.Dir(program), "service")
	build := exec.Command("go", "build", "-C", "acceptance/go", "-o", binary) // which has the libraries
	for _, block := range regexp.MustCompile("(?s)```go\n// (\\w+\\.go)\n(.*?)```").FindAllSubmatch(page, -1) {
		file := filepath.Join(filepath.Dir(program), string(block[1]))
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(block[2]), "8080", port)), 0o600); err != nil {
			return nil, "", err
		}
		build.Args = append(build.Args, file)
	}
	if out, err := build.CombinedOutput(); err != nil {
		return nil, "", fmt.Errorf("building the page's service: %w %s", err, out)
	}
	service = "http://localhost:" + port
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), "BASE=http://"+from.address, "SERVICE="+service, "CLIENT_ID="+from.id, "CLIENT_SECRET="+from.secret)
	if sv, err = start(cmd, regexp.MustCompile(`()`)); err != nil {
		return nil, "", err
	}
	if _, err = askUntil(service, "", 401); err != nil {
		sv.stop()
	}
	return sv, service, err
}

// askUntil shows a token to a service until that answers as wanted, and returns when it did.
func askUntil(service, token string, want int) (time.Time, error) {
	for begun := time.Now(); ; time.Sleep(3 * time.Millisecond) {
		q, err := http.NewRequest("GET", service+"/resumes", nil)
		if err != nil {
			return begun, err
		}
		q.Header.Set("Authorization", "Bearer "+token)
		answer, err := http.DefaultClient.Do(q)
		if err == nil {
			io.Copy(io.Discard, answer.Body)
			answer.Body.Close()
			if answer.StatusCode == want {
				return time.Now(), nil
			}
		}
		if time.Since(begun) > time.Minute {
			return begun, fmt.Errorf("the service doesn't answer %d", want)
		}
	}
}

// benchKills has several operators, who suspend and reactivate an agent each, at any moment.
func (s *stores) benchKills(ctx context.Context, first, second *server) error {
	sv, service, err := pageService(second)
	if err != nil {
		return err
	}
	defer sv.stop()
	const operators = 3
	var mu sync.Mutex
	var fromRequest, fromAnswer []time.Duration
	var group sync.WaitGroup
	errs := make([]error, operators)
	for i := range operators {
		id, token, err := s.newVictim(ctx, first, fmt.Sprintf("victim-%d@example.com", i), service)
		if err != nil {
			return err
		}
		set := func(status string) error {
			_, err := first.ask("PATCH", "/api/v1/agents/"+id, first.bearer(), `{"status": "`+status+`"}`, "status", "Content-Type", "application/json")
			return err
		}
		group.Go(func() {
			for n := 0; n < *kills/operators && errs[i] == nil; n++ {
				_, errs[i] = askUntil(service, token, 200)
				time.Sleep(mrand.N(time.Second))
				sent := time.Now()
				err := set("suspended")
				answered := time.Now()
				refused, refusedErr := askUntil(service, token, 401)
				errs[i] = errors.Join(errs[i], err, refusedErr, set("active"))
				mu.Lock()
				fromRequest, fromAnswer = append(fromRequest, refused.Sub(sent)), append(fromAnswer, refused.Sub(answered))
				mu.Unlock()
			}
		})
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, f := range []struct {
		name  string
		times []time.Duration
	}{{"request", fromRequest}, {"answer", fromAnswer}} {
		n := len(f.times)
		slices.Sort(f.times)
		ms := func(i int, unit string) value { return value{micros(f.times[i]) / 1000, unit} }
		report("Cuts refused after the "+f.name, n, ms(n/2, "p50-ms"), ms(n*99/100, "p99-ms"), ms(n-1, "max-ms"))
	}
	return nil
}

// newReader is an agent with a token for the copy itself.
func (s *stores) newReader(sv *server, email string) (id, token string, err error) {
	id, secret, err := s.newClient(sv, email)
	if err != nil {
		return "", "", err
	}
	token, err = sv.ask("POST", "/api/v1/token", basic(id, secret), grant, "access_token")
	return id, token, err
}

// newVictim is an agent with a token for a service.
func (s *stores) newVictim(ctx context.Context, sv *server, email, service string) (id, token string, err error) {
	id, secret, err := s.newClient(sv, email)
	if err != nil {
		return "", "", err
	}
	if _, err := s.db.Exec(ctx, `update agents set capabilities = '{resumes:read}' where agent_id = $1`, id); err != nil {
		return "", "", err
	}
	token, err = sv.ask("POST", "/api/v1/token", basic(id, secret), grant+"&resource="+url.QueryEscape(service), "access_token")
	return id, token, err
}

func (s *stores) newClient(sv *server, email string) (id, secret string, err error) {
	out, err := s.run(sv.key, "recover", email)
	if err == nil {
		_, err = fmt.Sscanf(out, "client_id: %s\nclient_secret: %s\n", &id, &secret)
	}
	return id, secret, err
}

// benchReaders measures two copies, of which the second has as many readers as may wait there.
func (s *stores) benchReaders(ctx context.Context, first, second *server, streams bool) error {
	const readers, of = 200, 50 // of which one client may have as many
	var bearers []string
	for i := range readers / of {
		_, token, err := s.newReader(second, fmt.Sprintf("reader-%d-%v@example.com", i, streams))
		if err != nil {
			return err
		}
		bearers = append(bearers, "Bearer "+token)
	}
	next, err := second.ask("GET", "/api/v1/revocations", second.bearer(), "", "next")
	if err != nil {
		return err
	}
	reading, stop := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer stop()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: readers}}
	errs := make(chan error, readers)
	name, address := "by wait=3", "http://"+second.address+"/api/v1/revocations?wait=3&after="
	if streams {
		name, address = "by a stream", "http://"+second.address+"/api/v1/revocations?after="
	}
	for i := range readers {
		group.Go(func() {
			if err := read(reading, client, address, next, bearers[i/of], streams); reading.Err() == nil {
				errs <- err
			}
		})
	}
	time.Sleep(2 * time.Second) // until all wait
	took := time.Duration(4 * *seconds * float64(time.Second))
	before, without, postgres := second.cpu(), first.cpu(), s.postgresCPU()
	select {
	case err := <-errs:
		return fmt.Errorf("a reader stops: %w", err)
	case <-time.After(took):
	}
	each := func(d time.Duration) float64 { return micros(d) / 1000 / took.Seconds() }
	report(fmt.Sprintf("Cuts %d readers wait %s", readers, name), readers, value{each(second.cpu() - before), "server-ms-CPU/s"},
		value{each(first.cpu() - without), "server-without-ms-CPU/s"}, value{each(s.postgresCPU() - postgres), "postgres-ms-CPU/s"})
	return nil
}

// read reads on from a place, until it can't.
func read(ctx context.Context, client *http.Client, address, next, bearer string, streams bool) error {
	for {
		q, err := http.NewRequestWithContext(ctx, "GET", address+next, nil)
		if err != nil {
			return err
		}
		if q.Header.Set("Authorization", bearer); streams {
			q.Header.Set("Accept", "text/event-stream")
		}
		answer, err := client.Do(q)
		if err != nil {
			return err
		}
		var page struct{ Next string }
		if streams {
			_, err = io.Copy(io.Discard, answer.Body)
			err = errors.Join(errors.New("a stream has ended"), err)
		} else if err = json.NewDecoder(answer.Body).Decode(&page); err == nil && page.Next == "" {
			err = errors.New(answer.Status)
		}
		answer.Body.Close()
		if err != nil {
			return err
		}
		next = page.Next
	}
}
