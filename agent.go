package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
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

var (
	ourScopes    = []string{agentsRead, agentsWrite, tokensRead, auditRead, credentialsWrite}
	agentTypes   = []string{"screener", "classifier", "orchestrator", "extractor", "summarizer", "router", "monitor", "custom"}
	environments = []string{"development", "staging", "production"}
	statuses     = []string{"active", "suspended", "decommissioned"}

	// What HTML calls a valid e-mail address.
	emailPattern = regexp.MustCompile("^[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@" +
		`[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*$`)
	// Semantic Versioning 2.0.0, as semver.org gives it.
	versionPattern = regexp.MustCompile(`^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)` +
		`(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?` +
		`(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?$`)
	capabilityPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_.-]*:([a-z0-9][a-z0-9_.-]*|\*)$`)
)

// An agent as it is stored and shown.
type agent struct {
	AgentID       string   `json:"agentId"`
	Email         string   `json:"email"`
	AgentType     string   `json:"agentType"`
	Version       string   `json:"version"`
	Capabilities  []string `json:"capabilities"`
	Owner         string   `json:"owner"`
	DeploymentEnv string   `json:"deploymentEnv"`
	Status        string   `json:"status"`
	CreatedAt     moment   `json:"createdAt"`
	UpdatedAt     moment   `json:"updatedAt"`
}

const agentColumns = `agent_id, email, agent_type, version, capabilities, owner, deployment_env, status, created_at, updated_at`

type agentRequest struct {
	Email         string   `json:"email"`
	AgentType     string   `json:"agentType"`
	Version       string   `json:"version"`
	Capabilities  []string `json:"capabilities"`
	Owner         string   `json:"owner"`
	DeploymentEnv string   `json:"deploymentEnv"`
}

func (q agentRequest) check(bad faults) {
	if len(q.Email) > 255 || !emailPattern.MatchString(q.Email) {
		bad["email"] = "must be an e-mail address of at most 255 characters"
	}
	agentChange{
		AgentType: &q.AgentType, Version: &q.Version, Capabilities: &q.Capabilities,
		Owner: &q.Owner, DeploymentEnv: &q.DeploymentEnv,
	}.check(bad)
}

// An agentChange changes what is there and leaves the rest.
type agentChange struct {
	AgentType     *string   `json:"agentType"`
	Version       *string   `json:"version"`
	Capabilities  *[]string `json:"capabilities"`
	Owner         *string   `json:"owner"`
	DeploymentEnv *string   `json:"deploymentEnv"`
	Status        *string   `json:"status"`
}

func (q agentChange) check(bad faults) {
	if q == (agentChange{}) {
		bad["body"] = "must have at least one of agentType, version, capabilities, owner, deploymentEnv, status"
	}
	bad.checkOneOf("agentType", q.AgentType, agentTypes)
	bad.checkOneOf("deploymentEnv", q.DeploymentEnv, environments)
	bad.checkOneOf("status", q.Status, statuses)
	if v := q.Version; v != nil && (len(*v) > 64 || !versionPattern.MatchString(*v)) {
		bad["version"] = "must be a semantic version like 1.2.3 of at most 64 characters"
	}
	if q.Owner != nil && !validOwner(*q.Owner) {
		bad["owner"] = "must be 1 to 128 characters, none of them a control character, not all of them spaces"
	}
	if q.Capabilities != nil {
		bad.checkCapabilities(*q.Capabilities)
	}
}

// facts are the changes as the audit log has them.
func (q agentChange) facts() facts {
	f := facts{}
	for name, v := range map[string]*string{
		"agentType": q.AgentType, "version": q.Version, "owner": q.Owner,
		"deploymentEnv": q.DeploymentEnv, "status": q.Status,
	} {
		if v != nil {
			f[name] = *v
		}
	}
	if q.Capabilities != nil {
		f["capabilities"] = *q.Capabilities
	}
	return f
}

func validOwner(s string) bool {
	return strings.TrimSpace(s) != "" && utf8.RuneCountInString(s) <= 128 && strings.IndexFunc(s, unicode.IsControl) < 0
}

func (bad faults) checkCapabilities(list []string) {
	seen := map[string]bool{}
	for _, c := range list {
		switch resource, action, _ := strings.Cut(c, ":"); {
		case len(c) > 100 || !capabilityPattern.MatchString(c):
			bad["capabilities"] = fmt.Sprintf("%q must be resource:action or resource:* in lower case, of at most 100 characters", clip(c))
		case action == "*" && slices.Contains([]string{"agents", "tokens", "audit", "credentials"}, resource):
			bad["capabilities"] = fmt.Sprintf("%q is refused: name each action of agents, tokens, audit and credentials", c)
		case seen[c]:
			bad["capabilities"] = fmt.Sprintf("%q is there twice", c)
		}
		seen[c] = true
	}
	if len(list) < 1 || len(list) > 64 {
		bad["capabilities"] = fmt.Sprintf("must be 1 to 64 entries, not %d", len(list))
	}
}

// A caller is who sent a request, as it has proved.
type caller struct {
	agentID, credentialID, secretID string
	scopes                          []string // of the token, or all of the agent's where it showed a secret
	expiresAt                       *moment  // of the secret shown
}

func (c caller) has(scope string) bool { return slices.Contains(c.scopes, scope) }

// mayGrant refuses to give out those of our scopes that the caller lacks:
// nobody can mint authority that they don't hold.
func (c caller) mayGrant(capabilities []string) error {
	for _, scope := range ourScopes {
		if slices.Contains(capabilities, scope) && !c.has(scope) {
			return errForbidden.because("Your token lacks " + scope + ", so it can't grant it.")
		}
	}
	return nil
}

// mayManage refuses changes of an agent that can do what the caller can't.
func (c caller) mayManage(a agent) error {
	if c.mayGrant(a.Capabilities) != nil {
		return errForbidden.because("This agent holds a scope of this service that your token lacks.")
	}
	return nil
}

func (s *server) createAgent(w http.ResponseWriter, r *request) error {
	q, err := decode[agentRequest](r)
	if err != nil {
		return err
	}
	if err := r.caller.mayGrant(q.Capabilities); err != nil {
		return err
	}
	var a agent
	err = s.change(r, func(ctx context.Context, tx *change) (event, error) {
		if err := s.checkAgentLimit(ctx, tx); err != nil {
			return event{}, err
		}
		a, err = insertAgent(ctx, tx, q)
		return newEvent(agentCreated, a.AgentID, facts{"agent": q}), err
	})
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/api/v1/agents/"+a.AgentID)
	return respond(w, http.StatusCreated, a)
}

func (s *server) listAgents(w http.ResponseWriter, r *request) error {
	q, err := parseQuery(r, "page", "limit", "owner", "agentType", "status")
	if err != nil {
		return err
	}
	bad := faults{}
	bad.checkOneOf("agentType", q.values["agentType"], agentTypes)
	bad.checkOneOf("status", q.values["status"], statuses)
	if owner := q.values["owner"]; owner != nil && !validOwner(*owner) {
		bad["owner"] = "must be 1 to 128 characters"
	}
	if err := bad.problem(); err != nil {
		return err
	}
	const selected = `
		from agents
		where ($1::text is null or owner = $1)
			and ($2::text is null or agent_type = $2)
			and ($3::text is null or status = $3)`
	filter := []any{q.values["owner"], q.values["agentType"], q.values["status"]}
	rows, _ := s.db.Query(r.Context(), `
		select `+agentColumns+selected+`
		order by agent_id desc
		limit $4 offset $5`, plannedOnce(filter, q.limit, q.offset())...)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByName[agent])
	if err != nil {
		return fmt.Errorf("listing agents: %w", err)
	}
	total, err := s.count(r.Context(), selected, filter...)
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, newPage(q, list, total))
}

func (s *server) getAgent(w http.ResponseWriter, r *request) error {
	a, err := loadAgent(r.Context(), s.db, r.PathValue("agentId"))
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, a)
}

func (s *server) updateAgent(w http.ResponseWriter, r *request) error {
	q, err := decode[agentChange](r)
	if err != nil {
		return err
	}
	a, err := s.changeAgent(r, q)
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, a)
}

func (s *server) decommissionAgent(w http.ResponseWriter, r *request) error {
	if _, err := s.changeAgent(r, agentChange{Status: &statuses[2]}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// changeAgent is every change of an agent, its end too.
func (s *server) changeAgent(r *request, q agentChange) (agent, error) {
	id := r.PathValue("agentId")
	var a agent
	err := s.change(r, func(ctx context.Context, tx *change) (event, error) {
		old, err := lockAgent(ctx, tx, id)
		if err != nil {
			return event{}, err
		}
		if err := r.caller.mayManage(old); err != nil {
			return event{}, err
		}
		if q.Capabilities != nil {
			if err := r.caller.mayGrant(*q.Capabilities); err != nil {
				return event{}, err
			}
		}
		if old.Status == "decommissioned" {
			return event{}, errDecommissioned
		}
		if a, err = updateAgent(ctx, tx, id, q); err != nil {
			return event{}, err
		}
		did, err := tx.applyStatus(ctx, old.Status, a)
		return newEvent(did, id, facts{"changes": q.facts()}), err
	})
	return a, err
}

// applyStatus does what a change of status entails, and names it.
func (tx *change) applyStatus(ctx context.Context, old string, a agent) (action, error) {
	if a.Status == old {
		return agentUpdated, nil
	}
	switch a.Status {
	case "active":
		return agentReactivated, tx.lift(ctx, a.AgentID)
	case "suspended":
		_, err := tx.revoke(ctx, "agent", a.AgentID, lastExpiry())
		return agentSuspended, err
	}
	_, err := tx.Exec(ctx, `
		update credentials
		set status = 'revoked', revoked_at = date_trunc('milliseconds', clock_timestamp())
		where client_id = $1 and status = 'active'`, a.AgentID)
	if err != nil {
		return "", fmt.Errorf("revoking an agent's credentials: %w", err)
	}
	_, err = tx.revoke(ctx, "agent", a.AgentID, lastExpiry())
	return agentDecommissioned, err
}

// checkAgentLimit holds a lock until the transaction ends, so that of two
// registrations at the limit only one counts the other.
func (s *server) checkAgentLimit(ctx context.Context, tx pgx.Tx) error {
	if s.cfg.maxAgents == 0 {
		return nil
	}
	if _, err := tx.Exec(ctx, `select pg_advisory_xact_lock($1)`, agentLock); err != nil {
		return fmt.Errorf("locking registration: %w", err)
	}
	var n int
	err := tx.QueryRow(ctx, `
		select count(*)
		from (select 1 from agents where status <> 'decommissioned' limit $1) as counted`, s.cfg.maxAgents).Scan(&n)
	if err != nil {
		return fmt.Errorf("counting agents: %w", err)
	}
	if n >= s.cfg.maxAgents {
		return errAgentLimit.with(map[string]any{"limit": s.cfg.maxAgents})
	}
	return nil
}

func insertAgent(ctx context.Context, db querier, q agentRequest) (agent, error) {
	rows, _ := db.Query(ctx, `
		insert into agents (agent_id, email, agent_type, version, capabilities, owner, deployment_env)
		values ($1, $2, $3, $4, $5, $6, $7)
		returning `+agentColumns,
		newID(), q.Email, q.AgentType, q.Version, q.Capabilities, q.Owner, q.DeploymentEnv)
	a, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[agent])
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok && pgErr.ConstraintName == "agents_email" {
		return a, errAgentExists
	}
	if err != nil {
		return a, fmt.Errorf("registering agent: %w", err)
	}
	return a, nil
}

func loadAgent(ctx context.Context, db querier, id string) (agent, error) {
	return oneAgent(ctx, db, id, `
		select `+agentColumns+`
		from agents
		where agent_id = $1`)
}

// lockAgent loads an agent that nobody else can change until tx ends.
func lockAgent(ctx context.Context, tx pgx.Tx, id string) (agent, error) {
	return oneAgent(ctx, tx, id, `
		select `+agentColumns+`
		from agents
		where agent_id = $1
		for update`)
}

// oneAgent fails with errNoAgent for what is no id at all, too.
func oneAgent(ctx context.Context, db querier, id, sql string) (agent, error) {
	if !isID(id) {
		return agent{}, errNoAgent
	}
	rows, _ := db.Query(ctx, sql, id)
	a, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[agent])
	if errors.Is(err, pgx.ErrNoRows) {
		return a, errNoAgent
	}
	if err != nil {
		return a, fmt.Errorf("loading agent: %w", err)
	}
	return a, nil
}

// updateAgent changes an agent that the caller has locked.
func updateAgent(ctx context.Context, tx pgx.Tx, id string, q agentChange) (agent, error) {
	rows, _ := tx.Query(ctx, `
		update agents
		set agent_type = coalesce($2, agent_type), version = coalesce($3, version),
			capabilities = coalesce($4, capabilities), owner = coalesce($5, owner),
			deployment_env = coalesce($6, deployment_env), status = coalesce($7, status),
			updated_at = date_trunc('milliseconds', clock_timestamp())
		where agent_id = $1
		returning `+agentColumns,
		id, q.AgentType, q.Version, q.Capabilities, q.Owner, q.DeploymentEnv, q.Status)
	a, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[agent])
	if err != nil {
		return a, fmt.Errorf("updating agent: %w", err)
	}
	return a, nil
}

// bootstrap registers the first agent, with all of our scopes, and prints its
// client_id and client_secret.
func (s *server) bootstrap(ctx context.Context, email string, stdout io.Writer) error {
	q := agentRequest{
		Email: email, AgentType: "custom", Version: "1.0.0", Capabilities: ourScopes,
		Owner: "operator", DeploymentEnv: "production",
	}
	bad := faults{}
	q.check(bad)
	if why, wrong := bad["email"]; wrong {
		return fmt.Errorf("the email %s", why)
	}
	plain := newSecret()
	hash, err := s.vault.hash(ctx, plain)
	if err != nil {
		return err
	}
	in, err := http.NewRequestWithContext(ctx, "", "/", nil)
	if err != nil {
		return fmt.Errorf("bootstrapping: %w", err)
	}
	operator := &request{Request: in, id: newID()}
	var a agent
	err = s.change(operator, func(ctx context.Context, tx *change) (event, error) {
		if err := refuseSecondBootstrap(ctx, tx); err != nil {
			return event{}, err
		}
		if a, err = insertAgent(ctx, tx, q); err != nil {
			return event{}, err
		}
		c, err := insertCredential(ctx, tx, secretRow{newID(), a.AgentID, plain.prefix(), hash, newID(), nil})
		return newEvent(agentCreated, a.AgentID, facts{"agent": q, "credentialId": c.CredentialID}), err
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "client_id: %s\nclient_secret: %s\n", a.AgentID, plain.reveal())
	return nil
}

func refuseSecondBootstrap(ctx context.Context, tx pgx.Tx) error {
	if _, err := tx.Exec(ctx, `select pg_advisory_xact_lock($1)`, agentLock); err != nil {
		return fmt.Errorf("locking registration: %w", err)
	}
	var done bool
	err := tx.QueryRow(ctx, `
		select exists (select from agents where status = 'active' and 'agents:write' = any(capabilities))`).Scan(&done)
	if err != nil {
		return fmt.Errorf("looking for agents: %w", err)
	}
	if done {
		return errors.New("an active agent holds agents:write already; let it register others")
	}
	return nil
}
