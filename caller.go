package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

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
	scopes    []string       // of the token, or all of the agent's where it showed a credential
	expiresAt *moment        // of the credential shown
	until     int64          // of a token: seconds since 1970
	use       use            // of the assertion that it showed
	proof     shownProof     // that its token, or the one that it asks for, is its own
	proved    map[string]any // what an event says of that
	kind      string         // of the credential of a token
	row       uint32         // the agent's as it was read, PostgreSQL's xmin; of a token 0
	allowance                // of a token the rate limit alone
}

// A use is that of an assertion, which if it is good once is remembered until it is of
// no use. It is one with what it is for: both are stored, or neither.
type use struct {
	id      string // "" where it may be used again
	end     time.Time
	again   error       // what a second one of this id is told
	over    error       // what one is told that was cut off meanwhile
	trusted func() bool // whether its issuer is as it was read; nil where it is a client's own
	done    bool        // remembered
}

// An allowance is what an agent can't change of itself.
type allowance struct {
	Resources         []string `json:"resources"`         // where its tokens may go; none is anywhere
	Delegates         []string `json:"delegates"`         // who may act for it
	ProofRequired     bool     `json:"proofRequired"`     // its tokens are bound to a key
	RateLimit         *int     `json:"rateLimit"`         // requests a minute; as of all these null is what the deployment has
	MonthlyTokenLimit *int     `json:"monthlyTokenLimit"` // tokens
	TokenTTL          *int     `json:"tokenTtl"`          // seconds
}

// rows are what an event rests on that says what the caller may.
func (c caller) rows() map[string]uint32 {
	if c.row == 0 {
		return nil
	}
	return map[string]uint32{c.AgentID: c.row}
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

// A client is an agent with the credential that it has shown.
type client struct {
	caller
	hash        string            // of its secret
	key         jwk               // in place of that
	claims      map[string]string // that the assertion of a workload must have, in place of both
	used        bool              // that assertion was before
	agentStatus string
	ended       bool // revoked or expired, as all are of a decommissioned agent
}

const clientColumns = `c.client_id, a.xmin, c.credential_id, c.secret_id, c.expires_at, a.status, a.capabilities, a.resources, a.rate_limit,
	a.monthly_token_limit, a.token_ttl, a.proof_required, c.status <> 'active' or coalesce(c.expires_at <= clock_timestamp(), false)`

func (o *client) columns() []any {
	return []any{&o.AgentID, &o.row, &o.CredentialID, &o.SecretID, &o.expiresAt, &o.agentStatus, &o.scopes, &o.Resources, &o.RateLimit,
		&o.MonthlyTokenLimit, &o.TokenTTL, &o.ProofRequired, &o.ended}
}

// refusal says why the right credential isn't enough, or nil.
func (o client) refusal() *problem {
	switch {
	case o.agentStatus == "decommissioned":
		return errClientInactive.because("This agent is decommissioned, which is final.")
	case o.ended:
		return errBadClient
	case o.agentStatus != "active":
		return errClientInactive.because("This agent is " + o.agentStatus + ", until an operator sets its status to active.")
	}
	return nil
}

// quotaOf is how many tokens a month the caller may have; 0 is no limit.
func (s *server) quotaOf(c caller) int { return *cmp.Or(c.MonthlyTokenLimit, &s.cfg.monthlyTokenLimit) }

// enter locks in the order of ids, so that two agents which change each other
// don't wait for each other. An operator, who has no id, is always alive.
func (c caller) enter(ctx context.Context, tx pgx.Tx, concerned []string) error {
	ids := slices.DeleteFunc(append([]string{c.AgentID}, concerned...), func(id string) bool { return !isID(id) })
	err := execSQL(ctx, tx, "locking agents", `
		select from agents
		where agent_id = any($1)
		order by agent_id
		for no key update`, ids)
	if err != nil || c.AgentID == "" {
		return err
	}
	lives, err := areAlive(ctx, tx, []origin{c.origin}) // a statement of its own, which sees what was committed before the lock
	if err == nil && !lives[0].alive {
		err = c.ended()
	}
	return err
}

// checkAlive refuses who isn't, together with all who ask at the same time, and
// learns of the caller's credential and rate limit.
func (s *server) checkAlive(ctx context.Context, c *caller) error {
	life, err := s.lives.put(ctx, c.origin).wait()
	if err == nil && !life.alive {
		err = c.ended()
	}
	c.kind, c.RateLimit = life.kind, life.rateLimit
	return err
}

// A life is whether an origin is alive, of what kind its credential is, and its agent
// with the row as it is now and the rate limit of its own.
type life struct {
	alive     bool
	kind      string
	agentID   string
	row       uint32
	rateLimit *int
}

// ended is what who was cut off is told.
func (c caller) ended() error {
	if c.TokenID != "" {
		return errInvalidToken
	}
	return cmp.Or(c.use.over, error(errBadClient))
}

// areAlive tells of each origin whether it is: its credential is active, has not
// expired and has that secret, its agent is active, and its jti is not revoked.
func areAlive(ctx context.Context, db querier, of []origin) ([]life, error) {
	credentials, tokens := idsOf(of)
	rows, _ := db.Query(ctx, aliveQuery, credentials, tokens)
	lives, err := tellLives(rows, of)
	if err != nil {
		return nil, fmt.Errorf("asking what is alive: %w", err)
	}
	return lives, nil
}

// askAlive puts that question into a batch, which answers it.
func askAlive(b *pgx.Batch, of []origin) []life {
	lives := make([]life, len(of))
	if len(of) > 0 {
		credentials, tokens := idsOf(of)
		b.Queue(aliveQuery, credentials, tokens).Query(func(rows pgx.Rows) error {
			found, err := tellLives(rows, of)
			copy(lives, found)
			return err
		})
	}
	return lives
}

const aliveQuery = `
	select c.credential_id::text, c.secret_id::text, '', c.kind, a.agent_id::text, a.xmin, a.rate_limit
	from credentials c
	join agents a on a.agent_id = c.client_id
	where c.credential_id = any($1) and c.status = 'active' and a.status = 'active'
		and (c.expires_at is null or c.expires_at > clock_timestamp())
	union all
	select '', '', jti::text, '', '', '0'::xid, null
	from token_revocations
	where jti = any($2)`

func idsOf(of []origin) (credentials, tokens []string) {
	credentials, tokens = make([]string, 0, len(of)), make([]string, 0, len(of))
	for _, o := range of {
		if o.CredentialID != "" {
			credentials = append(credentials, o.CredentialID)
		}
		if o.TokenID != "" {
			tokens = append(tokens, o.TokenID)
		}
	}
	return credentials, tokens
}

func tellLives(rows pgx.Rows, of []origin) ([]life, error) {
	var o origin
	found := life{alive: true}
	there, lives := map[origin]life{}, make([]life, len(of))
	_, err := pgx.ForEachRow(rows, []any{&o.CredentialID, &o.SecretID, &o.TokenID, &found.kind, &found.agentID, &found.row, &found.rateLimit}, func() error {
		there[o] = found
		return nil
	})
	for i, o := range of {
		if lives[i] = there[origin{CredentialID: o.CredentialID, SecretID: o.SecretID}]; o.CredentialID == "" && o.TokenID != "" {
			lives[i].alive = true
		}
		if there[origin{TokenID: o.TokenID}].alive {
			lives[i].alive = false
		}
	}
	return lives, err
}

// askFirst puts uses into a batch, which tells of which ids these are the first, on any copy.
// They lie with the ids of revoked tokens: both are good no more until they would have
// expired anyway.
func askFirst(b *pgx.Batch, uses []use) (first map[string]bool) {
	ids, ends := make([]string, len(uses)), make([]time.Time, len(uses))
	for i, u := range uses {
		ids[i], ends[i] = u.id, u.end.Add(clockTrust+time.Minute)
	}
	first = map[string]bool{}
	if len(uses) > 0 {
		b.Queue(`
			insert into token_revocations (jti, expires_at)
			select * from unnest($1::uuid[], $2::timestamptz[])
			on conflict (jti) do nothing
			returning jti::text`, ids, ends).Query(func(rows pgx.Rows) error {
			stored, err := pgx.CollectRows(rows, pgx.RowTo[string])
			for _, id := range stored {
				first[id] = true
			}
			return err
		})
	}
	return first
}
