package main

import (
	"testing"
)

// Who signed is found by indexes, however many agents there are and whichever plan fits any
// question: all credentials are never read.
func TestSignersAreFoundByIndexes(t *testing.T) {
	t.Parallel()
	s, _, _ := newServer(t)
	if _, err := s.db.Exec(t.Context(), `
		insert into agents (agent_id, email, agent_type, version, capabilities, owner, deployment_env)
		select gen_random_uuid(), n || '@example.com', 'custom', '1', '{a:b}', 'o', 'staging' from generate_series(1, 50000) as n;
		insert into credentials (credential_id, client_id, kind, secret_prefix, secret_hash, secret_id, workload)
		select gen_random_uuid(), agent_id, 'workload', substr(md5(email), 1, 16), '', gen_random_uuid(), json_build_object('issuer', 'i', 'subject', email)
		from agents;
		insert into credentials (credential_id, client_id, kind, secret_prefix, secret_hash, secret_id, public_key, key_thumbprint)
		select gen_random_uuid(), agent_id, 'key', substr(md5(agent_id::text), 1, 16), '', gen_random_uuid(), '{"kty": "EC"}', md5(email)
		from agents;
		analyze`); err != nil {
		t.Fatal(err)
	}
	agentID := ""
	if err := s.db.QueryRow(t.Context(), `select agent_id::text from agents where email = '77@example.com'`).Scan(&agentID); err != nil {
		t.Fatal(err)
	}
	tx, err := s.inner.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context())
	use := assertion{id: "x"}.useID()
	found, err := loadSigners(t.Context(), tx, []shown{{issuer: "i", subject: "77@example.com", use: use}, {clientID: agentID, use: use},
		{clientID: agentID, issuer: "i", subject: "77@example.com", use: use}, {clientID: agentID, issuer: "i", subject: "78@example.com", use: use}, {issuer: "j", subject: "77@example.com", use: use}})
	if err != nil {
		t.Fatal(err)
	}
	for n, want := range []int{1, 1, 1, 0, 0} {
		if len(found[n]) != want || want > 0 && found[n][0].AgentID != agentID {
			t.Errorf("of question %d it finds %v, want %d", n, found[n], want)
		}
	}
	scans := 0
	err = tx.QueryRow(t.Context(), `select sum(seq_scan) from pg_stat_xact_user_tables where relname in ('agents', 'credentials')`).Scan(&scans)
	if err != nil || scans != 0 {
		t.Errorf("all agents or credentials were read %d times, %v", scans, err)
	}
}
