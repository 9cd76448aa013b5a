package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
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
	allowance
	Status    string `json:"status"`
	CreatedAt moment `json:"createdAt"`
	UpdatedAt moment `json:"updatedAt"`
}

const agentColumns = `agent_id, email, agent_type, version, capabilities, owner, deployment_env,
	resources, delegates, proof_required, rate_limit, monthly_token_limit, token_ttl, status, created_at, updated_at`

// An agentChange changes what is there and leaves the rest.
type agentChange struct {
	AgentType     *string   `json:"agentType,omitempty"`
	Version       *string   `json:"version,omitempty"`
	Capabilities  *[]string `json:"capabilities,omitempty"`
	Owner         *string   `json:"owner,omitempty"`
	DeploymentEnv *string   `json:"deploymentEnv,omitempty"`
	Status        *string   `json:"status,omitempty"`

	Resources         *[]string `json:"resources,omitempty"`
	Delegates         *[]string `json:"delegates,omitempty"`
	ProofRequired     *bool     `json:"proofRequired,omitempty"`
	RateLimit         *ownLimit `json:"rateLimit,omitempty"`
	MonthlyTokenLimit *ownLimit `json:"monthlyTokenLimit,omitempty"`
	TokenTTL          *ownLimit `json:"tokenTtl,omitempty"`
}

// allows tells whether it changes the allowance.
func (q agentChange) allows() bool {
	return q.Resources != nil || q.Delegates != nil || q.ProofRequired != nil || q.RateLimit != nil || q.MonthlyTokenLimit != nil || q.TokenTTL != nil
}

// An ownLimit is what an agent gets in place of the deployment's; notOwn takes it
// away again.
type ownLimit int

const notOwn ownLimit = -1 // null in JSON and in the table

func (l ownLimit) MarshalJSON() ([]byte, error) {
	if l == notOwn {
		return []byte("null"), nil
	}
	return json.Marshal(int(l))
}

func readOwnLimit(least, most int) func(any) (ownLimit, error) {
	return func(value any) (ownLimit, error) {
		n, ok := value.(float64)
		if value == nil {
			return notOwn, nil
		}
		if !ok || n < float64(least) || n > float64(most) || n != math.Trunc(n) {
			return notOwn, fmt.Errorf("must be a whole number from %d to %d, or null for what the deployment has", least, most)
		}
		return ownLimit(n), nil
	}
}

func readAgentChange(in *inputs) agentChange {
	return agentChange{
		AgentType:     take(in, "agentType", oneOf(agentTypes)),
		Version:       take(in, "version", matching("must be a semantic version like 1.2.3 of at most 64 characters", validVersion)),
		Capabilities:  take(in, "capabilities", readCapabilities),
		Owner:         take(in, "owner", owner),
		DeploymentEnv: take(in, "deploymentEnv", oneOf(environments)),

		Resources:         take(in, "resources", readResources),
		Delegates:         take(in, "delegates", readDelegates),
		ProofRequired:     take(in, "proofRequired", readBool),
		RateLimit:         take(in, "rateLimit", readOwnLimit(0, 1e6)),
		MonthlyTokenLimit: take(in, "monthlyTokenLimit", readOwnLimit(0, 1e9)),
		TokenTTL:          take(in, "tokenTtl", readOwnLimit(1, int(maxTokenTTL/time.Second))),
	}
}

var (
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

func validVersion(s string) bool { return len(s) <= 64 && versionPattern.MatchString(s) }

var owner = matching("must be 1 to 128 characters, none of them a control character, not all of them spaces", func(s string) bool {
	return strings.TrimSpace(s) != "" && utf8.ValidString(s) && utf8.RuneCountInString(s) <= 128 && strings.IndexFunc(s, unicode.IsControl) < 0
})

var email = matching("must be an e-mail address of at most 255 characters", func(s string) bool {
	return len(s) <= 255 && emailPattern.MatchString(s)
})

// maxScope is the bytes of a scope, so that a token fits into the 8 kB that proxies
// take as a header.
const maxScope = 4 << 10

// readCapabilities names all that are wrong.
func readCapabilities(value any) (list []string, err error) {
	values, ok := value.([]any)
	if !ok || len(values) < 1 || len(values) > 64 {
		return nil, errors.New("must be a list of 1 to 64 texts")
	}
	var wrong []string
	for _, value := range values {
		c, _ := value.(string)
		switch resource, action, _ := strings.Cut(c, ":"); {
		case len(c) > 100 || !capabilityPattern.MatchString(c):
			wrong = append(wrong, fmt.Sprintf("%q must be resource:action or resource:* in lower case, of at most 100 characters", clip(fmt.Sprint(value))))
		case action == "*" && slices.Contains([]string{"agents", "tokens", "audit", "credentials"}, resource):
			wrong = append(wrong, fmt.Sprintf("%q is refused: name each action of agents, tokens, audit and credentials", clip(c)))
		case slices.Contains(list, c):
			wrong = append(wrong, fmt.Sprintf("%q is there twice", clip(c)))
		}
		list = append(list, c)
	}
	if len(strings.Join(list, " ")) > maxScope {
		wrong = append(wrong, fmt.Sprintf("must have at most %d characters together: a token carries them all, and proxies refuse long headers", maxScope))
	}
	if wrong != nil {
		return nil, errors.New(strings.Join(wrong, "; "))
	}
	return list, nil
}

const (
	maxResources     = 16
	maxResourceBytes = 2048 // together, as JSON has them
	maxDelegates     = 64
)

// isResource tells whether s is an absolute URI without a fragment, in characters
// that need no escape in an error.
func isResource(s string) bool {
	u, err := url.Parse(s)
	return err == nil && u.IsAbs() && !strings.Contains(s, "#") &&
		strings.IndexFunc(s, func(c rune) bool { return c <= ' ' || c > '~' || c == '"' || c == '\\' }) < 0
}

func readResources(value any) (list []string, err error) {
	values, ok := value.([]any)
	for _, value := range values {
		resource, _ := value.(string)
		ok = ok && isResource(resource) && !slices.Contains(list, resource)
		list = append(list, resource)
	}
	if !ok || len(list) > maxResources || len(strings.Join(list, "")) > maxResourceBytes {
		return nil, fmt.Errorf("must be a list of up to %d absolute URIs without a fragment, of %d characters together, each once; none is any", maxResources, maxResourceBytes)
	}
	return append([]string{}, list...), nil
}

func readBool(value any) (is bool, err error) {
	is, ok := value.(bool)
	if !ok {
		err = errors.New("must be true or false")
	}
	return is, err
}

func readDelegates(value any) (list []string, err error) {
	values, ok := value.([]any)
	for _, value := range values {
		id, _ := value.(string)
		ok = ok && isID(id) && !slices.Contains(list, id)
		list = append(list, id)
	}
	if !ok || len(list) > maxDelegates {
		return nil, fmt.Errorf("must be a list of up to %d agentIds, UUIDs in lower case, each once; none is nobody", maxDelegates)
	}
	return append([]string{}, list...), nil
}

// A registration has all that an agent can have, but the status.
type registration struct {
	Email *string `json:"email,omitempty"`
	agentChange
}

func readRegistration(in *inputs) registration {
	for _, name := range []string{"email", "agentType", "version", "capabilities", "owner", "deploymentEnv"} {
		if _, given := in.values[name]; !given {
			in.faults[name] = "is missing"
		}
	}
	return registration{take(in, "email", email), readAgentChange(in)}
}

func (s *server) createAgent(r *request) (any, error) {
	q, err := decode(r, readRegistration)
	if err != nil {
		return nil, err
	}
	if err := r.caller.mayGrant(*q.Capabilities); err != nil {
		return nil, err
	}
	var a agent
	err = s.change(r, "", func(ctx context.Context, tx pgx.Tx) (event, error) {
		if err := s.checkAgentLimit(ctx, tx); err != nil {
			return event{}, err
		}
		a, err = insertAgent(ctx, tx, s.newID(), q)
		return newEvent(agentCreated, a.AgentID, facts{"agent": q}), err
	})
	if err == nil {
		r.out.Set("Location", s.cfg.path()+"/api/v1/agents/"+a.AgentID)
	}
	return a, err
}

func (s *server) listAgents(r *request) (any, error) {
	in := readQuery(r)
	part, args := in.span(), pgx.NamedArgs{
		"owner": take(in, "owner", owner), "type": take(in, "agentType", oneOf(agentTypes)), "status": take(in, "status", oneOf(statuses)),
		"email": take(in, "email", email), "env": take(in, "deploymentEnv", oneOf(environments)),
		"capability": take(in, "capability", matching("must be resource:action or resource:* in lower case", capabilityPattern.MatchString)),
		"q":          take(in, "q", owner), // a text like those that it is looked for in
	}
	if err := in.problem(); err != nil {
		return nil, err
	}
	p, _, err := list[agent](r.Context(), s.db, part, args, agentColumns, `
		from agents
		where (@owner::text is null or owner = @owner)
			and (@type::text is null or agent_type = @type)
			and (@status::text is null or status = @status)
			and (@email::text is null or lower(email) = lower(@email))
			and (@env::text is null or deployment_env = @env)
			and (@capability::text is null or @capability = any(capabilities))
			and (@q::text is null or position(lower(@q) in lower(email)) > 0 or position(lower(@q) in lower(owner)) > 0)`, `
		order by agent_id desc`)
	return p, err
}

func (s *server) getAgent(r *request) (any, error) {
	return loadAgent(r.Context(), s.db, r.PathValue("agentId"))
}

func (s *server) updateAgent(r *request) (any, error) {
	q, err := decode(r, func(in *inputs) agentChange {
		if len(in.values) == 0 {
			in.faults["body"] = "must have at least one field that is to change"
		}
		if _, given := in.values["email"]; given {
			delete(in.values, "email")
			in.faults["email"] = "can't be changed, since it names the agent to people; register another agent"
		}
		q := readAgentChange(in)
		q.Status = take(in, "status", oneOf(statuses))
		return q
	})
	if err != nil {
		return nil, err
	}
	return s.changeAgent(r, q)
}

func (s *server) decommissionAgent(r *request) (any, error) {
	_, err := s.changeAgent(r, agentChange{Status: &statuses[2]})
	return nil, err
}

const revokeCredentials = `
	update credentials
	set status = 'revoked', revoked_at = date_trunc('milliseconds', clock_timestamp())
	where `

// changeAgent is every change of an agent, its end too.
func (s *server) changeAgent(r *request, q agentChange) (a agent, err error) {
	id := r.PathValue("agentId")
	err = s.change(r, id, func(ctx context.Context, tx pgx.Tx) (event, error) {
		old, err := loadAgent(ctx, tx, id)
		if err == nil {
			err = r.caller.mayGrant(old.Capabilities)
		}
		if err == nil && q.Capabilities != nil {
			err = r.caller.mayGrant(*q.Capabilities)
		}
		if err == nil && q.allows() && id == r.caller.AgentID {
			err = errForbidden.because("An agent can't change its own resources, delegates, proofRequired and limits; another with agents:write can.")
		}
		if err == nil && old.Status == "decommissioned" {
			err = errDecommissioned
		}
		if err != nil {
			return event{}, err
		}
		a, err = one[agent](ctx, tx, errNoAgent, "updating agent", `
			update agents
			set agent_type = coalesce($2, agent_type), version = coalesce($3, version),
				capabilities = coalesce($4, capabilities), owner = coalesce($5, owner),
				deployment_env = coalesce($6, deployment_env), status = coalesce($7, status),
				resources = coalesce($8, resources), rate_limit = nullif(coalesce($9, rate_limit), -1),
				monthly_token_limit = nullif(coalesce($10, monthly_token_limit), -1), token_ttl = nullif(coalesce($11, token_ttl), -1),
				delegates = coalesce($12, delegates), proof_required = coalesce($13, proof_required),
				updated_at = date_trunc('milliseconds', clock_timestamp())
			where agent_id = $1
			returning `+agentColumns,
			id, q.AgentType, q.Version, q.Capabilities, q.Owner, q.DeploymentEnv, q.Status,
			q.Resources, q.RateLimit, q.MonthlyTokenLimit, q.TokenTTL, q.Delegates, q.ProofRequired)
		if err != nil {
			return event{}, err
		}
		if manages(old) && !manages(a) {
			if err := wantManager(ctx, tx); err != nil {
				return event{}, err
			}
		}
		did := agentUpdated
		if a.Status != old.Status {
			did = map[string]string{"active": agentReactivated, "suspended": agentSuspended, "decommissioned": agentDecommissioned}[a.Status]
		}
		if did == agentDecommissioned {
			err = execSQL(ctx, tx, "revoking an agent's credentials", revokeCredentials+`client_id = $1 and status = 'active'`, id)
		}
		return newEvent(did, id, facts{"changes": q}), err
	})
	return a, err
}

func manages(a agent) bool {
	return a.Status == "active" && slices.Contains(a.Capabilities, agentsWrite)
}

// hasManager tells whether anybody is left who can manage agents: an active agent
// with a credential. It holds a lock until the transaction ends, so that two don't
// leave because of each other.
func hasManager(ctx context.Context, tx pgx.Tx) (has bool, err error) {
	if err = execSQL(ctx, tx, "locking registration", `select pg_advisory_xact_lock($1)`, agentLock); err == nil {
		err = tx.QueryRow(ctx, `
			select exists (
				select
				from agents a
				join credentials c on c.client_id = a.agent_id
				where a.status = 'active' and 'agents:write' = any(a.capabilities) and c.status = 'active'
					and (c.expires_at is null or c.expires_at > clock_timestamp()))`).Scan(&has)
	}
	return has, err
}

// wantManager refuses a change after which nobody could manage agents.
func wantManager(ctx context.Context, tx pgx.Tx) error {
	has, err := hasManager(ctx, tx)
	if err == nil && !has {
		err = errLastManager
	}
	return err
}

// checkAgentLimit holds a lock until the transaction ends, so that of two
// registrations at the limit only one counts without the other.
func (s *server) checkAgentLimit(ctx context.Context, tx pgx.Tx) error {
	if s.cfg.maxAgents == 0 {
		return nil
	}
	if err := execSQL(ctx, tx, "locking registration", `select pg_advisory_xact_lock($1)`, agentLock); err != nil {
		return err
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

func insertAgent(ctx context.Context, db querier, id string, q registration) (agent, error) {
	return one[agent](ctx, db, errAgentExists, "registering agent", `
		insert into agents (agent_id, email, agent_type, version, capabilities, owner, deployment_env,
			resources, rate_limit, monthly_token_limit, token_ttl, delegates, proof_required)
		values ($1, $2, $3, $4, $5, $6, $7, coalesce($8, '{}'::text[]), nullif($9, -1), nullif($10, -1), nullif($11, -1),
			coalesce($12, '{}'::text[]), coalesce($13, false))
		on conflict (lower(email)) do nothing
		returning `+agentColumns,
		id, q.Email, q.AgentType, q.Version, q.Capabilities, q.Owner, q.DeploymentEnv,
		q.Resources, q.RateLimit, q.MonthlyTokenLimit, q.TokenTTL, q.Delegates, q.ProofRequired)
}

// loadAgent fails with errNoAgent for what is no id at all, too.
func loadAgent(ctx context.Context, db querier, id string) (agent, error) {
	if !isID(id) {
		return agent{}, errNoAgent
	}
	return one[agent](ctx, db, errNoAgent, "loading agent", `
		select `+agentColumns+`
		from agents
		where agent_id = $1`, id)
}
