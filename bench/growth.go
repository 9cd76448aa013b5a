package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// benchGrowth asks the same of a small and of a large registry and log.
func benchGrowth(ctx context.Context) error {
	small, err := benchSize(ctx, 10_000, 10_000)
	if err != nil {
		return err
	}
	large, err := benchSize(ctx, *agents, *events)
	if err != nil {
		return err
	}
	for i, s := range small {
		l := large[i]
		report("Growth "+s.name, 1, value{micros(s.time), "µs-small"}, value{micros(l.time), "µs-large"}, value{l.time.Seconds() / s.time.Seconds(), "x"})
	}
	return nil
}

type timed struct {
	name string
	time time.Duration
}

func benchSize(ctx context.Context, agents, events int) (times []timed, err error) {
	s, err := newStores(ctx)
	if err != nil {
		return nil, err
	}
	defer s.close(ctx)
	key, _, err := newKey("RS256")
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	from := begun.Add(-spread).Truncate(time.Millisecond)
	if err := s.fill(ctx, key, agents, events, from); err != nil {
		return nil, fmt.Errorf("filling: %w", err)
	}
	fmt.Printf("# %d agents and credentials, %d events filled in %s\n", agents, events, time.Since(begun).Round(time.Second))
	if err := s.benchVerify(ctx, key, events); err != nil {
		return nil, err
	}
	sv, err := s.newServer(key, nil)
	if err != nil {
		return nil, err
	}
	defer sv.stop()
	questions, err := sv.questions(agents, events, from)
	if err != nil {
		return nil, err
	}
	for _, q := range questions {
		j := job{Network: "tcp", Address: sv.address, Connections: 1, Seconds: *seconds / 10, Requests: q.requests}
		if _, err := load(j); err != nil {
			return nil, fmt.Errorf("%s: %w", q.name, err)
		}
		j.Seconds = *seconds / 3
		r, err := load(j)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", q.name, err)
		}
		times = append(times, timed{q.name, r.P50})
	}
	if err := s.benchRevocations(ctx, key, sv, agents); err != nil {
		return nil, err
	}
	return times, nil
}

// A question is asked in several ways, one after another.
type asked struct {
	name     string
	requests [][]byte
}

// questions are those whose time must not grow.
func (sv *server) questions(agents, events int, from time.Time) (list []asked, err error) {
	get := func(name string, paths ...string) {
		q := asked{name: name}
		for _, p := range paths {
			q.requests = append(q.requests, request("GET", "/api/v1"+p, sv.bearer(), ""))
		}
		list = append(list, q)
	}
	eventIDs := func(i int) string { return eventID(i+1, at(from, i, events)) }
	some := func(format string, of int, text func(int) string) (paths []string) {
		for i := range 64 {
			paths = append(paths, fmt.Sprintf(format, text(i*(of/64)%of)))
		}
		return paths
	}
	list = append(list, asked{"token", [][]byte{sv.tokenRequest()}},
		asked{"introspection", [][]byte{request("POST", "/api/v1/token/introspect", basic(sv.id, sv.secret), "token="+sv.token)}})
	get("agent", some("/agents/%s", agents, agentID)...)
	get("credentials of an agent", some("/agents/%s/credentials", agents, agentID)...)
	get("event", some("/audit/%s", events, eventIDs)...)
	get("agents", "/agents")
	get("agents, last page", "/agents?page=100&limit=100")
	get("agents of an owner", some("/agents?owner=owner-%s", owners, strconv.Itoa)...)
	get("agents of a type", "/agents?agentType=router")
	for _, status := range []string{"active", "suspended", "decommissioned"} {
		get("agents that are "+status, "/agents?status="+status)
	}
	get("agents of a type and status", "/agents?agentType=router&status=suspended")
	get("agents of an owner, a type and a status", some("/agents?owner=owner-%s&agentType=router&status=suspended", owners, strconv.Itoa)...)
	get("events", "/audit")
	get("events, last page", "/audit?page=100&limit=100")
	get("events of an agent", some("/audit?agentId=%s", agents, agentID)...)
	for _, action := range []string{"token.issued", "token.introspected", "auth.failed", "agent.created"} {
		get("events of "+action, "/audit?action="+action)
	}
	get("events that failed", "/audit?outcome=failure")
	get("events that succeeded", "/audit?outcome=success")
	get("events of an action that failed", "/audit?action=agent.updated&outcome=failure")
	get("events of an agent and an action", some("/audit?action=token.issued&agentId=%s", agents, agentID)...)
	middle := url.QueryEscape(time.Now().Add(-spread / 2).UTC().Format(time.RFC3339))
	recent := url.QueryEscape(time.Now().Add(-spread / 100).UTC().Format(time.RFC3339))
	get("events until a day long ago", "/audit?toDate="+middle)
	get("events from a day on", "/audit?fromDate="+recent)
	get("events of a day", "/audit?fromDate="+middle+"&toDate="+url.QueryEscape(time.Now().Add(-spread/2+24*time.Hour).UTC().Format(time.RFC3339)))
	get("events of an action on a day", "/audit?action=auth.failed&fromDate="+middle+"&toDate="+url.QueryEscape(time.Now().Add(-spread/2+24*time.Hour).UTC().Format(time.RFC3339)))
	cursor, err := sv.ask("GET", "/api/v1/audit?toDate="+middle, sv.bearer(), "", "nextCursor")
	if err != nil {
		return nil, err
	}
	get("events after a cursor deep inside", "/audit?cursor="+cursor)
	return list, nil
}

const (
	owners = 1000
	spread = 80 * 24 * time.Hour // over which the events are spread
)

func agentID(i int) string      { return fmt.Sprintf("019a0000-0000-7000-8000-%012x", i) }
func credentialID(i int) string { return fmt.Sprintf("019a0000-0001-7000-8000-%012x", i) }

// at is when the i-th of so many things happened.
func at(from time.Time, i, of int) time.Time {
	return from.Add(time.Duration(float64(spread) * float64(i) / float64(of))).Truncate(time.Millisecond)
}

// eventID is as the service makes it: of its time, and its seq.
func eventID(seq int, at time.Time) string {
	ms := at.UnixMilli()
	return fmt.Sprintf("%08x-%04x-7000-%04x-%012x", ms>>16, ms&0xffff, 0x8000+seq>>48, seq&(1<<48-1))
}

// fill makes agents with a credential each, and a chain of events that
// verify-audit finds good. Nobody knows the secrets.
func (s *stores) fill(ctx context.Context, key string, agents, events int, from time.Time) error {
	if _, err := s.run(key, "migrate"); err != nil {
		return err
	}
	types := []string{"screener", "classifier", "orchestrator", "extractor", "summarizer", "router", "monitor", "custom"}
	status := func(i int) string {
		switch i % 100 {
		case 5, 45, 66:
			return "suspended"
		case 99:
			return "decommissioned"
		}
		return "active"
	}
	_, err := s.db.CopyFrom(ctx, pgx.Identifier{"agents"},
		[]string{"agent_id", "email", "agent_type", "version", "capabilities", "owner", "deployment_env", "status", "created_at", "updated_at"},
		pgx.CopyFromSlice(agents, func(i int) ([]any, error) {
			return []any{agentID(i), fmt.Sprintf("agent-%d@example.com", i), types[i*7%8], "1.0.0", []string{"resumes:read", "scores:*"},
				fmt.Sprintf("owner-%d", i%owners), "production", status(i), at(from, i, agents), at(from, i, agents)}, nil
		}))
	if err != nil {
		return err
	}
	_, err = s.db.CopyFrom(ctx, pgx.Identifier{"credentials"},
		[]string{"credential_id", "client_id", "secret_prefix", "secret_hash", "secret_id"},
		pgx.CopyFromSlice(agents, func(i int) ([]any, error) {
			return []any{credentialID(i), agentID(i), fmt.Sprintf("%016x", uint64(i)*0x9E3779B97F4A7C15),
				"$2a$10$" + strings.Repeat("x", 53), credentialID(i)}, nil
		}))
	if err != nil {
		return err
	}
	// As after three months of service. The indexes come back by migrate.
	_, err = s.db.Exec(ctx, `
		do $$
		declare
			month timestamptz;
			index text;
		begin
			for i in 1..3 loop
				month := date_trunc('month', now(), 'UTC') - make_interval(months => i);
				execute format('create table %I partition of audit_events for values from (%L) to (%L)',
					'audit_events_' || to_char(month at time zone 'UTC', 'YYYY_MM'), month, (month at time zone 'UTC' + interval '1 month') at time zone 'UTC');
			end loop;
			for index in
				select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid
				where i.indrelid = 'audit_events'::regclass and not i.indisprimary
			loop
				execute format('drop index %I', index);
			end loop;
		end $$`)
	if err != nil {
		return err
	}
	previous := make([]byte, sha256.Size)
	others := []string{"agent.created", "agent.updated", "agent.suspended", "agent.reactivated", "agent.decommissioned",
		"credential.generated", "credential.rotated", "credential.revoked", "token.revoked", "auth.failed"}
	_, err = s.db.CopyFrom(ctx, pgx.Identifier{"audit_events"},
		[]string{"event_id", "seq", "agent_id", "actor_id", "action", "outcome", "ip_address", "user_agent", "metadata", "timestamp", "prev_hash", "hash"},
		pgx.CopyFromSlice(events, func(i int) ([]any, error) {
			action, outcome := "token.issued", "success"
			switch i % 20 {
			case 3, 8, 11, 15, 18:
				action = "token.introspected"
			case 19:
				action = others[i/20%len(others)]
			}
			if action == "auth.failed" || i%2000 == 39 {
				outcome = "failure"
			}
			agent, now := agentID(i*7919%agents), at(from, i, events)
			metadata := fmt.Sprintf(`{"credentialId":"%s","exp":1795471357,"jti":"%s","requestId":"%s","scope":"resumes:read scores:*"}`, agent, credentialID(i), credentialID(i)[15:])
			var b []byte
			for _, field := range []string{
				hex.EncodeToString(previous), strconv.Itoa(i + 1), eventID(i+1, now), now.UTC().Format("2006-01-02T15:04:05.000Z"), agent,
				agent, action, outcome, "192.0.2.7", "python-requests/2.32", metadata,
			} {
				b = strconv.AppendInt(b, int64(len(field)), 10)
				b = append(append(append(b, ':'), field...), ',')
			}
			sum := sha256.Sum256(b)
			row := []any{eventID(i+1, now), i + 1, agent, agent, action, outcome, "192.0.2.7", "python-requests/2.32", metadata, now, previous, sum[:]}
			previous = sum[:]
			return row, nil
		}))
	if err != nil {
		return err
	}
	if _, err := s.run(key, "migrate"); err != nil {
		return err
	}
	_, err = s.db.Exec(ctx, `vacuum analyze`)
	return err
}

// benchVerify reads the chain, beside a reading of it that checks nothing.
func (s *stores) benchVerify(ctx context.Context, key string, events int) error {
	begun, before := time.Now(), ownCPU()
	rows, err := s.db.Query(ctx, `
		select event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata, "timestamp", prev_hash, hash
		from audit_events order by seq`)
	if err != nil {
		return err
	}
	n := 0
	for rows.Next() {
		n += len(rows.RawValues()[11])
	}
	if err := rows.Err(); err != nil {
		return err
	}
	read, readCPU := time.Since(begun), ownCPU()-before
	cmd := exec.Command(program, "verify-audit")
	var out bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env(key), &out, os.Stderr
	begun = time.Now()
	if err := cmd.Start(); err != nil {
		return err
	}
	most := peak(cmd.Process.Pid)
	if err := cmd.Wait(); err != nil {
		return err
	}
	took, cpu := time.Since(begun), cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()
	report(fmt.Sprintf("Verify %d events", events), events, value{float64(events) / took.Seconds(), "events/s"},
		value{float64(events) / read.Seconds(), "events/s-reading"}, value{float64(events) / (cpu - readCPU).Seconds(), "events/s/core-beyond-reading"},
		value{most / 1e6, "MB"})
	return nil
}

// benchRevocations counts how long a start takes with as many revocations as
// there are agents.
func (s *stores) benchRevocations(ctx context.Context, key string, sv *server, n int) error {
	_, err := s.db.Exec(ctx, `
		insert into token_revocations (jti, expires_at)
		select ('019a0000-0003-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, now() + interval '1 hour'
		from generate_series(1, $1) i`, n)
	if err != nil {
		return err
	}
	if _, err := s.db.Exec(ctx, `vacuum analyze token_revocations`); err != nil {
		return err
	}
	sv.stop()
	again, err := s.newServer(key, sv)
	if err != nil {
		return err
	}
	defer again.stop()
	report(fmt.Sprintf("Start with %d revocations", n), 1, value{float64(again.ready.Milliseconds()), "ms-to-serve"},
		value{again.memory() / 1e6, "MB"})
	return nil
}
