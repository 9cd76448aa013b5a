package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// What Basic has is what was put in, and nothing else gets an id and a secret
// out of a header.
func FuzzBasic(f *testing.F) {
	for _, seed := range []string{"", "Basic", "Basic ", "Basic =", "basic  eDp4", "Basic eA==", "Basic Og==", "Basic eDp4\n", "Basic eDp%4", "Bearer eDp4", "Basic\teDp4"} {
		f.Add(seed, "id", newSecret().reveal(), "")
		f.Add(seed, "id:x", "%", "client_id=id&client_secret=x")
		f.Add(seed, "\x00", ":+ é", "client_id=other")
	}
	f.Fuzz(func(t *testing.T, header, id, plain, form string) {
		ask := func(header string, form url.Values) (string, secret, error) {
			r := &request{Request: &http.Request{URL: &url.URL{}, Header: http.Header{"Authorization": {header}}}, form: form}
			gotID, got, err := clientSecret(r)
			if p, ok := errors.AsType[*problem](err); err != nil && (!ok || p.status != 400 && p.status != 401 || p.oauth == "" || gotID+got.reveal() != "") {
				t.Errorf("clientSecret of %q and %q = %v, want a problem of a token endpoint alone", header, form, err)
			}
			return gotID, got, err
		}
		encoded := "Basic " + base64.StdEncoding.EncodeToString([]byte(url.QueryEscape(id)+":"+url.QueryEscape(plain)))
		if gotID, got, err := ask(encoded, nil); err != nil || gotID != id || got.reveal() != plain {
			t.Errorf("clientSecret of %q and %q in Basic = %q, %q, %v", id, plain, gotID, got.reveal(), err)
		}
		values, _ := url.ParseQuery(form)
		gotID, got, err := ask(header, values)
		switch formID, formSecret := values.Get("client_id"), values.Get("client_secret"); {
		case header != "" && formSecret != "" && err == nil:
			t.Errorf("clientSecret of %q beside a secret in the form = %q, want it refused", header, gotID)
		case header != "" && formID != "" && gotID != "" && gotID != formID:
			t.Errorf("clientSecret of %q beside the client_id %q = %q", header, formID, gotID)
		case header == "" && err == nil && (gotID != formID || got.reveal() != formSecret):
			t.Errorf("clientSecret of %q = %q, %q", form, gotID, got.reveal())
		case header != "" && err == nil && got != "" && !strings.EqualFold(header[:min(6, len(header))], "basic "):
			t.Errorf("clientSecret of %q = %q", header, gotID)
		}
		if text := fmt.Sprintf("%v %s %q %x %#v", got, got, got, got, got); strings.Count(text, "[secret]") != 5 {
			t.Errorf("a secret prints as %q", text)
		}
	})
}

// A request that comes to its deadline says nothing about Redis. If it did,
// whoever keeps bcrypt busy could switch the limits off for all.
func TestLateRequestsAreNoOutageOfRedis(t *testing.T) {
	t.Parallel()
	s, id, plain := newServer(t, "RATE_LIMIT_PER_MINUTE", "1000")
	bearer := s.bearerOf(t, id, plain)
	agent, fresh := newID(), newSecret()
	hash, err := s.vault.hash(t.Context(), fresh)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		execSQL(t.Context(), s.db, "registering", `insert into agents (agent_id, email, agent_type, version, capabilities, owner, deployment_env)
			values ($1, $1::uuid::text || '@example.com', 'custom', '1.0.0', '{a:b}', 'team', 'staging')`, agent),
		execSQL(t.Context(), s.db, "giving a secret", `insert into credentials (credential_id, client_id, secret_prefix, secret_hash, secret_id)
			values ($1, $2, $3, $4, $1)`, newID(), agent, fresh.prefix(), string(hash)))
	if err != nil {
		t.Fatal(err)
	}
	form := "grant_type=client_credentials&client_id=" + agent + "&client_secret=" + fresh.reveal()
	for range cap(s.vault.comparing) { // bcrypt is as busy as can be
		s.vault.comparing <- struct{}{}
	}
	var late sync.WaitGroup
	var refused atomic.Int64
	for range 6 {
		late.Go(func() {
			if s.ask("POST", "/api/v1/token", form).Code == 503 {
				refused.Add(1)
			}
		})
	}
	done := make(chan bool)
	go func() { late.Wait(); close(done) }()
	for calls := 0; ; calls++ {
		select {
		case <-done:
			if refused.Load() != 6 {
				t.Errorf("without a chance to compare secrets %d of 6 are a 503", refused.Load())
			}
			for range cap(s.vault.comparing) {
				<-s.vault.comparing
			}
			if a := s.ask("POST", "/api/v1/token", form); a.Code != 200 {
				t.Errorf("then the secret is answered %d %s", a.Code, a.Body)
			}
			return
		case <-time.After(10 * time.Millisecond):
			a := s.ask("GET", "/api/v1/agents/"+id, "", "Authorization", bearer)
			if calls < 900 && (a.Code != 200 || a.Header().Get("X-RateLimit-Limit") == "") {
				t.Fatalf("meanwhile a token = %d with %v, want it within its limit", a.Code, a.Header())
			}
		}
	}
}

// Of an address that is over its limit one assertion at a time is looked at, few wait, and
// the others are refused.
func TestAddressOverItsLimitHasOneAssertionAtATime(t *testing.T) {
	t.Parallel()
	s := &server{rooms: newLanes(maxInRoom), lanes: newLanes(1), meter: newMeter()}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // one that waits where it should be refused ends
	defer cancel()
	enter := func(address string) (func(), http.Header, error) {
		r := &request{Request: (&http.Request{}).WithContext(ctx), addr: netip.MustParseAddr(address), out: http.Header{}}
		leave, err := s.enterLane(r)
		return leave, r.out, err
	}
	for range 2 { // nothing is known of it
		if _, _, err := enter("192.0.2.1"); err != nil {
			t.Error(err)
		}
	}
	v := verdict{state: "limited", limit: 10, current: 10, now: time.Now().UnixMilli()}
	s.limited.put(sha256.Sum256([]byte("ip:192.0.2.1")), refusal{v, time.Now().Add(time.Hour)})
	leave, _, err := enter("192.0.2.1")
	if err != nil {
		t.Fatal("a right one has no chance:", err)
	}
	entered := make(chan func(), maxInRoom)
	for range maxInRoom - 1 {
		go func() {
			next, _, err := enter("192.0.2.1")
			if err != nil {
				t.Error("one that may wait:", err)
			}
			entered <- next
		}()
	}
	for len(s.rooms.of("ip:192.0.2.1")) < maxInRoom {
		time.Sleep(time.Millisecond)
	}
	if len(entered) > 0 {
		t.Error("two of one address are looked at at the same time")
	}
	if _, header, err := enter("192.0.2.1"); err != errAddressLimited || header.Get("Retry-After") == "" {
		t.Errorf("one too many: %v, %v", err, header)
	}
	other := 1 // but one may share the lane
	for s.lanes.of(fmt.Sprintf("ip:198.51.100.%d", other)) == s.lanes.of("ip:192.0.2.1") || s.rooms.of(fmt.Sprintf("ip:198.51.100.%d", other)) == s.rooms.of("ip:192.0.2.1") {
		other++
	}
	s.limited.put(sha256.Sum256(fmt.Appendf(nil, "ip:198.51.100.%d", other)), refusal{v, time.Now().Add(time.Hour)})
	if _, _, err := enter(fmt.Sprintf("198.51.100.%d", other)); err != nil {
		t.Error("one of another address:", err)
	}
	leave()
	for range maxInRoom - 1 {
		(<-entered)()
	}
	s.limited.put(sha256.Sum256([]byte("ip:192.0.2.1")), refusal{v, time.Now().Add(-time.Second)})
	for range 2 * maxInRoom {
		if _, _, err := enter("192.0.2.1"); err != nil {
			t.Error("when its time has passed:", err)
		}
	}
}
