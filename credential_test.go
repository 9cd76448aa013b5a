package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

func TestSecretIsNotPrinted(t *testing.T) {
	t.Parallel()
	s := newSecret()
	shown := regexp.MustCompile(`(?i)` + s.reveal()[8:24] + "|" + fmt.Sprintf("%x", s.reveal()[8:24]) + "|" + base64.StdEncoding.EncodeToString([]byte(s.reveal()))[12:24])
	type wrapper struct{ Secret secret }
	// %p and %w are left out: no method can stop them, and go vet refuses them.
	for _, v := range []any{s, &s, []secret{s}, map[string]secret{"k": s}, wrapper{s}, &wrapper{s}, [1]secret{s}, any(s)} {
		var formats []string // that show it
		for _, verb := range "vsqxXdtTbcoOUeEfFgG" {
			for _, flags := range []string{"", "+", "#", " ", "-80", "0", ".200"} {
				if format := "%" + flags + string(verb); shown.MatchString(fmt.Sprintf(format, v)) {
					formats = append(formats, format)
				}
			}
		}
		if formats != nil {
			t.Errorf("Sprintf shows a %T by %q", v, formats)
		}
		b, err := json.Marshal(v)
		if err != nil || shown.Match(b) || !strings.Contains(string(b), "[secret]") {
			t.Errorf("json.Marshal(%T) = %s, %v, want [secret]", v, b, err)
		}
		var log strings.Builder
		for _, h := range []slog.Handler{slog.NewJSONHandler(&log, nil), slog.NewTextHandler(&log, nil)} {
			slog.New(h).Info(fmt.Sprint(v), "secret", v, slog.Group("group", "secret", v))
		}
		if shown.MatchString(log.String()) {
			t.Errorf("slog of a %T says %s", v, log.String())
		}
	}
	for _, got := range []string{fmt.Sprint(s), fmt.Sprintf("%v", s), fmt.Sprintf("%s", s), fmt.Sprintf("%+v", s), fmt.Sprintf("%#v", s), fmt.Errorf("x: %v", s).Error()[3:]} {
		if got != "[secret]" {
			t.Errorf("a secret prints as %q, want [secret]", got)
		}
	}
	if got := s.reveal(); !regexp.MustCompile(`^sk_live_[0-9a-f]{64}$`).MatchString(got) || got == newSecret().reveal() {
		t.Error("newSecret makes no new secret of its form")
	}
}

// The memo only knows what bcrypt has found, and the row is read each time.
func TestMemoKnowsOnlyWhatBcryptFound(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s, other := newSecret(), newSecret()
	hashOf := func(s secret) string {
		hash, err := bcrypt.GenerateFromPassword([]byte(s), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		return string(hash)
	}
	hash, otherHash := hashOf(s), hashOf(other)
	m := newVault()
	if m.known(hash, s) {
		t.Error("known before it was compared")
	}
	if ok, err := m.compare(ctx, "ip:192.0.2.1", hash, other); ok || err != nil || m.known(hash, other) || m.known(hash, s) {
		t.Errorf("compare(a wrong secret) = %v, %v, or it is known then", ok, err)
	}
	if ok, err := m.compare(ctx, "ip:192.0.2.1", hash, s); !ok || err != nil || !m.known(hash, s) {
		t.Errorf("compare(the right secret) = %v, %v, or it is not known then", ok, err)
	}
	if m.known(hash, other) || m.known(otherHash, s) || m.known(otherHash, other) || m.known(hash, s+"0") || m.known(hashOf(s), s) {
		t.Error("known is what was not compared")
	}
	if one, two := newVault(), newVault(); one.memoKey(hash, s) == two.memoKey(hash, s) {
		t.Error("two processes have one key for their memos")
	}
	// Who waits in vain for a slot is told so, and not that the secret is wrong.
	late, cancel := context.WithCancel(ctx)
	cancel()
	busy := newVault()
	for range 50 {
		if ok, err := busy.compare(late, "ip:192.0.2.1", hash, other); ok || err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("compare(too late) = %v, %v", ok, err)
		}
	}
}

// A copy that has just started knows no secret. Those who show the same right
// one at the same time must not each take bcrypt's time.
func TestOneSecretIsComparedOnceForAllWhoWait(t *testing.T) {
	v, plain := newVault(), newSecret()
	hash, err := v.hash(t.Context(), plain)
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if right, err := newVault().compare(t.Context(), "ip:192.0.2.1", string(hash), plain); !right || err != nil {
		t.Fatalf("compare = %v, %v, want true", right, err)
	}
	one := time.Since(begun)
	const n = 100
	var all sync.WaitGroup
	begun = time.Now()
	for range n {
		all.Go(func() {
			if right, err := v.compare(t.Context(), "ip:192.0.2.1", string(hash), plain); !right || err != nil {
				t.Errorf("compare = %v, %v, want true", right, err)
			}
		})
	}
	all.Wait()
	if took := time.Since(begun); took > n/4*one {
		t.Errorf("%d comparisons of one secret took %v, want little more than the %v of one", n, took, one)
	}
}

// Secrets that wait to be compared leave places to all else: who comes beyond is
// refused at once.
func TestOnlySoManySecretsWait(t *testing.T) {
	t.Parallel()
	v, plain := newVault(), newSecret()
	for range maxWaiting {
		v.waiting <- struct{}{}
	}
	if _, err := v.compare(t.Context(), "ip:192.0.2.1", "", plain); !errors.Is(err, errBusy) {
		t.Errorf("beside %d others compare = %v, want errBusy", maxWaiting, err)
	}
	<-v.waiting
	if right, err := v.compare(t.Context(), "ip:192.0.2.1", "", plain); right || err != nil || len(v.waiting) != maxWaiting-1 {
		t.Errorf("beside one less compare = %v, %v, and %d wait", right, err, len(v.waiting))
	}
}

// Who may not have a secret takes nobody's turn at hashing one.
func TestRefusedSecretIsNotHashed(t *testing.T) {
	t.Parallel()
	s, id, plain := newServer(t)
	bearer := s.bearerOf(t, id, plain)
	s.vault.making <- struct{}{} // somebody's
	a := s.ask("POST", "/api/v1/agents/"+newID()+"/credentials", "{}", "Authorization", bearer, "Content-Type", "application/json")
	if a.Code != 404 {
		t.Errorf("a secret for nobody is answered %d %s, want 404", a.Code, a.Body)
	}
	<-s.vault.making
}
