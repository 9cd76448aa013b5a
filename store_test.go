package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
)

// What is asked while others are served is served together, in order, but not
// without bound, and not for who has given up.
func TestQueueServesTogether(t *testing.T) {
	t.Parallel()
	var batches [][]int
	begun, going := make(chan bool), make(chan bool)
	q := newQueue(func(_ context.Context, asked []int) ([]int, error) {
		batches = append(batches, asked)
		begun <- true
		<-going
		answers := slices.Clone(asked)
		for i := range answers {
			answers[i] *= 2
		}
		return answers, nil
	})
	first := q.put(t.Context(), 1)
	<-begun // and is under way
	gone, giveUp := context.WithCancel(t.Context())
	late := q.put(gone, 2)
	giveUp()
	var more []*question[int, int]
	for i := range queueSize - 1 {
		more = append(more, q.put(t.Context(), i+3))
	}
	if _, err := q.put(t.Context(), 0).wait(); err == nil {
		t.Error("a full queue takes one more")
	}
	if _, err := late.wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("who has given up gets %v, want that it has", err)
	}
	go func() {
		for range begun {
			going <- true
		}
	}()
	going <- true
	q.close() // serves all of them
	close(begun)
	for i, x := range append([]*question[int, int]{first}, more...) {
		if answer, err := x.wait(); answer != 2*x.asked || err != nil {
			t.Errorf("question %d is answered %d, %v", i, answer, err)
		}
	}
	if len(batches) != 1+queueSize/batchSize || len(batches[1]) != batchSize-1 || !slices.IsSorted(slices.Concat(batches...)) {
		t.Errorf("%d batches, the second with %d, want %d with %d, in order", len(batches), len(batches[1]), 1+queueSize/batchSize, batchSize-1)
	}
}

// Who changes schema.sql raises schemaVersion, and writes both here.
func TestSchemaVersionIsRaisedWithTheSchema(t *testing.T) {
	const version, sum = 7, "93c08ee6b30a49f7557f222c78e5c849bbbb10ef56fd96a764e4545bcd7a6a4a"
	if got := fmt.Sprintf("%x", sha256.Sum256([]byte(schema))); schemaVersion != version || got != sum {
		t.Errorf("schema.sql of version %d is %s, want %d and %s: a change of it raises schemaVersion", schemaVersion, got, version, sum)
	}
}

// Where a session of ours has temporary tables of our names all the same, as
// one that a pooler has given to somebody else before, the real ones are meant.
func TestTemporaryTablesDivertNothing(t *testing.T) {
	t.Parallel()
	s, id, plain := newServer(t)
	names := []string{"agents", "credentials", "token_revocations", "audit_events"}
	each := func(held []*pgxpool.Conn, do func(conn *pgxpool.Conn, name string)) {
		for _, conn := range held {
			for _, name := range names {
				do(conn, name)
			}
		}
		for _, conn := range held {
			conn.Release()
		}
	}
	for _, db := range []*pgxpool.Pool{s.db, s.inner} {
		var held []*pgxpool.Conn
		for range db.Config().MaxConns {
			conn, err := db.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, conn)
		}
		each(held, func(conn *pgxpool.Conn, name string) {
			if _, err := conn.Exec(t.Context(), `create temporary table `+name+` (like public.`+name+` including all)`); err != nil {
				t.Fatal(err)
			}
		})
	}
	for range 2 {
		everything(t, s, id, plain)
	}
	still := 0
	for _, db := range []*pgxpool.Pool{s.db, s.inner} {
		each(db.AcquireAllIdle(t.Context()), func(conn *pgxpool.Conn, name string) {
			rows := 0
			err := conn.QueryRow(t.Context(), `select count(*) from pg_temp.`+name).Scan(&rows)
			if rows != 0 || err != nil && !strings.Contains(err.Error(), "does not exist") {
				t.Errorf("a temporary table %s has %d rows, %v, want none", name, rows, err)
			} else if err == nil {
				still++
			}
		})
	}
	if still < 2*len(names) {
		t.Errorf("to the end sessions of ours have %d temporary tables, want those of two at least", still)
	}
}

// everything changes and asks what there is.
func everything(t *testing.T, s *server, id, plain string) {
	t.Helper()
	bearer := s.bearerOf(t, id, plain)
	do := func(method, path, body string, status int) string {
		t.Helper()
		header := []string{"Authorization", bearer}
		if !strings.HasPrefix(path, "/token") && body != "" {
			header = append(header, "Content-Type", "application/json")
		}
		a := s.ask(method, "/api/v1"+path, body, header...)
		if a.Code != status {
			t.Fatalf("%s %s = %d %s, want %d", method, path, a.Code, a.Body, status)
		}
		return a.Body.String()
	}
	field := func(text, name string) string {
		_, after, _ := strings.Cut(text, `"`+name+`":"`)
		value, _, _ := strings.Cut(after, `"`)
		return value
	}
	agent := field(do("POST", "/agents", `{"email":"`+newID()+`@example.com","agentType":"custom","version":"1.0.0","capabilities":["a:b"],"owner":"team","deploymentEnv":"staging"}`, 201), "agentId")
	credential := do("POST", "/agents/"+agent+"/credentials", "{}", 201)
	token := strings.TrimPrefix(s.bearerOf(t, agent, field(credential, "clientSecret")), "Bearer ")
	if !strings.Contains(do("POST", "/token/introspect", "token="+token, 200), `"active":true`) {
		t.Error("a new token is not active")
	}
	do("POST", "/token/revoke", "token="+token, 200)
	if !strings.Contains(do("POST", "/token/introspect", "token="+token, 200), `"active":false`) {
		t.Error("a revoked token is active")
	}
	do("POST", "/agents/"+agent+"/credentials/"+field(credential, "credentialId")+"/rotate", "{}", 200)
	do("PATCH", "/agents/"+agent, `{"status":"suspended"}`, 200)
	do("DELETE", "/agents/"+agent, "", 204)
	for _, list := range []string{"/agents", "/agents/" + agent + "/credentials", "/audit"} {
		if !strings.Contains(do("GET", list, "", 200), agent) {
			t.Errorf("GET %s has nothing of the agent", list)
		}
	}
}
