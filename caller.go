package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// The scopes that mean something to this service itself. All others are the
// business of the services that agents call.
const (
	agentsRead       = "agents:read"
	agentsWrite      = "agents:write"
	tokensRead       = "tokens:read"
	auditRead        = "audit:read"
	credentialsWrite = "credentials:write"
)

var ourScopes = []string{agentsRead, agentsWrite, tokensRead, auditRead, credentialsWrite}

// A caller is who sent a request, as it has proved.
type caller struct {
	origin
	scopes    []string // of the token, or all of the agent's where it showed a secret
	expiresAt *moment  // of the secret shown
}

// has is true of every caller for "".
func (c caller) has(scope string) bool { return scope == "" || slices.Contains(c.scopes, scope) }

// need refuses a caller that lacks a scope.
func (c caller) need(scope string) error {
	if c.has(scope) {
		return nil
	}
	p := errForbidden.because("This needs the scope " + scope + "; yours are " + clip(strings.Join(c.scopes, " ")) + ".")
	p.scope = scope
	return p
}

// mayGrant refuses to give out those of our scopes that the caller lacks, and
// to change an agent that has them: nobody can mint authority that they don't
// hold.
func (c caller) mayGrant(capabilities []string) error {
	for _, scope := range ourScopes {
		if slices.Contains(capabilities, scope) && !c.has(scope) {
			return errForbidden.because("Your token lacks " + scope + ", so it can neither grant that nor change an agent that has it.")
		}
	}
	return nil
}

// enter locks in the order of ids, so that two agents which change each other
// don't wait for each other. An operator, who has no id, is always alive.
func (c caller) enter(ctx context.Context, tx pgx.Tx, concerned string) error {
	ids := slices.DeleteFunc([]string{c.AgentID, concerned}, func(id string) bool { return !isID(id) })
	err := execSQL(ctx, tx, "locking agents", `
		select from agents
		where agent_id = any($1)
		order by agent_id
		for no key update`, ids)
	if err != nil || c.AgentID == "" {
		return err
	}
	alive, err := areAlive(ctx, tx, []origin{c.origin}) // a statement of its own, which sees what was committed before the lock
	if err == nil && !alive[0] {
		err = c.ended()
	}
	return err
}

// checkAlive refuses who isn't, together with all who ask at the same time.
func (s *server) checkAlive(ctx context.Context, c caller) error {
	alive, err := s.lives.put(ctx, c.origin).wait()
	if err == nil && !alive {
		err = c.ended()
	}
	return err
}

// ended is what who was cut off is told.
func (c caller) ended() error {
	if c.TokenID != "" {
		return errInvalidToken
	}
	return errBadClient
}

// areAlive tells of each origin whether it is: its credential is active, has not
// expired and has that secret, its agent is active, and its jti is not revoked.
func areAlive(ctx context.Context, db querier, of []origin) ([]bool, error) {
	credentials, tokens := idsOf(of)
	rows, _ := db.Query(ctx, aliveQuery, credentials, tokens)
	alive, err := tellAlive(rows, of)
	if err != nil {
		return nil, fmt.Errorf("asking what is alive: %w", err)
	}
	return alive, nil
}

// askAlive puts that question into a batch, which answers it.
func askAlive(b *pgx.Batch, of []origin) []bool {
	alive := make([]bool, len(of))
	if len(of) > 0 {
		credentials, tokens := idsOf(of)
		b.Queue(aliveQuery, credentials, tokens).Query(func(rows pgx.Rows) error {
			found, err := tellAlive(rows, of)
			copy(alive, found)
			return err
		})
	}
	return alive
}

const aliveQuery = `
	select c.client_id::text, c.credential_id::text, c.secret_id::text, ''
	from credentials c
	join agents a on a.agent_id = c.client_id
	where c.credential_id = any($1) and c.status = 'active' and a.status = 'active'
		and (c.expires_at is null or c.expires_at > clock_timestamp())
	union all
	select '', '', '', jti::text
	from token_revocations
	where jti = any($2)`

func idsOf(of []origin) (credentials, tokens []string) {
	credentials, tokens = make([]string, len(of)), make([]string, 0, len(of))
	for i, o := range of {
		if credentials[i] = o.CredentialID; o.TokenID != "" {
			tokens = append(tokens, o.TokenID)
		}
	}
	return credentials, tokens
}

func tellAlive(rows pgx.Rows, of []origin) ([]bool, error) {
	found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[origin])
	there, alive := map[origin]bool{}, make([]bool, len(of))
	for _, o := range found {
		there[o] = true
	}
	for i, o := range of {
		alive[i] = there[origin{o.AgentID, o.CredentialID, o.SecretID, ""}] && !there[origin{TokenID: o.TokenID}]
	}
	return alive, err
}
