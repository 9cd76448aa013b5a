package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/crypto/bcrypt"
)

// A credential as it is stored and shown. Its hash is in no wire type.
type credential struct {
	CredentialID  string  `json:"credentialId"`
	ClientID      string  `json:"clientId"`
	Kind          string  `json:"kind"`   // secret, key or workload
	Status        string  `json:"status"` // active or revoked
	CreatedAt     moment  `json:"createdAt"`
	ExpiresAt     *moment `json:"expiresAt"`
	RevokedAt     *moment `json:"revokedAt"`
	SecretPrefix  *string `json:"secretPrefix"`  // of a secret
	KeyThumbprint *string `json:"keyThumbprint"` // of a key (RFC 7638)

	Workload *workload `json:"workload"`
	SecretID string    `json:"-"` // which its tokens carry, until it is rotated
}

const credentialColumns = `credential_id, client_id, kind, status, created_at, expires_at, revoked_at,
	case when kind = 'secret' then secret_prefix end as secret_prefix, key_thumbprint, workload, secret_id`

// A newCredential shows the secret, once, if it is one.
type newCredential struct {
	credential
	ClientSecret string `json:"clientSecret,omitempty"`
}

// A proof is what a request for a credential may have: until when it is good (none:
// until it is revoked), and the key or the workload where it is to be no secret.
type proof struct {
	expiresAt *time.Time
	key       *jwk
	workload  *workload
}

func (p proof) kind() string {
	switch {
	case p.key != nil:
		return "key"
	case p.workload != nil:
		return "workload"
	}
	return "secret"
}

func (s *server) readProof(in *inputs) proof {
	p := proof{
		take(in, "expiresAt", parsed("must be a time in the future, like 2030-01-01T00:00:00Z", func(text string) (time.Time, error) {
			t, err := time.Parse(time.RFC3339, text)
			if !t.After(s.now()) || t.UTC().Year() > 9999 {
				err = strconv.ErrRange
			}
			return t, err
		})),
		take(in, "publicKey", readJWK),
		take(in, "workload", s.readWorkload),
	}
	if p.key != nil && p.workload != nil {
		in.faults["workload"] = "can't be there beside a publicKey; each is a credential of its own"
	}
	return p
}

func (s *server) createCredential(r *request) (any, error) {
	return s.giveProof(r, s.newID(), credentialGenerated)
}

func (s *server) rotateCredential(r *request) (any, error) {
	return s.giveProof(r, r.PathValue("credentialId"), credentialRotated)
}

// giveProof gives a new secret, or takes a key, for a new credential or one that is
// there, and answers with it.
func (s *server) giveProof(r *request, credentialID, did string) (any, error) {
	q, err := decode(r, s.readProof)
	if err != nil {
		return nil, err
	}
	if q.workload != nil { // it names somebody whom others know too
		if err := r.caller.need(agentsWrite); err != nil {
			return nil, err
		}
	}
	agentID, plain := r.PathValue("agentId"), newSecret()
	if r.caller.kind == "workload" && r.caller.AgentID == agentID {
		return nil, errForbidden.because("A workload gives itself no credential, which would be left when its issuer is cut off.")
	}
	if _, err := mayManage(r.Context(), s.db, r.caller, agentID, "active"); err != nil { // who may not gets no turn at hashing
		return nil, err
	}
	row := credentialRow{credentialID, agentID, plain.prefix(), nil, s.newID(), q}
	if q.kind() == "secret" {
		if row.hash, err = s.vault.hash(r.Context(), plain); err != nil {
			return nil, err
		}
	}
	var c, old credential
	err = s.change(r, agentID, func(ctx context.Context, tx pgx.Tx) (event, error) {
		_, err := mayManage(ctx, tx, r.caller, agentID, "active")
		if err == nil && did == credentialRotated {
			old, err = row.checkRotation(ctx, tx)
		}
		if err == nil {
			c, err = storeCredential(ctx, tx, row)
		}
		f := facts{"credentialId": credentialID, "expiresAt": c.ExpiresAt}
		if did == credentialRotated {
			f["endedSecretId"] = old.SecretID
		}
		if c.KeyThumbprint != nil {
			f["keyThumbprint"] = c.KeyThumbprint
		}
		if c.Workload != nil {
			f["workload"] = c.Workload
		}
		return newEvent(did, agentID, f), err
	})
	if q.kind() != "secret" {
		plain = ""
	}
	return newCredential{c, plain.reveal()}, err
}

// mayManage returns an agent, and refuses a change of its credentials where the
// caller may not, or the agent is in none of these states. An agent may change
// its own by credentials:write. Else it is as for any change of the agent, since
// a credential is all that the agent may do.
func mayManage(ctx context.Context, db querier, c caller, agentID string, states ...string) (agent, error) {
	a, err := loadAgent(ctx, db, agentID)
	if err == nil && (a.AgentID != c.AgentID || !c.has(credentialsWrite)) {
		err = c.mayGrant(a.Capabilities)
	}
	if err == nil && !slices.Contains(states, a.Status) {
		err = errNotActive.because("The agent is " + a.Status + ", and only an active one is given a credential.")
	}
	return a, err
}

func (s *server) listCredentials(r *request) (any, error) {
	in := readQuery(r)
	part := in.span()
	if err := in.problem(); err != nil {
		return nil, err
	}
	a, err := loadAgent(r.Context(), s.db, r.PathValue("agentId"))
	if err != nil {
		return nil, err
	}
	p, _, err := list[credential](r.Context(), s.db, part, pgx.NamedArgs{"client": a.AgentID}, credentialColumns, `
		from credentials
		where client_id = @client`, `
		order by credential_id desc`)
	return p, err
}

func (s *server) revokeCredential(r *request) (any, error) {
	agentID, credentialID := r.PathValue("agentId"), r.PathValue("credentialId")
	return nil, s.change(r, agentID, func(ctx context.Context, tx pgx.Tx) (event, error) {
		a, err := mayManage(ctx, tx, r.caller, agentID, statuses...)
		if err == nil {
			_, err = checkCredential(ctx, tx, agentID, credentialID)
		}
		if err == nil {
			err = execSQL(ctx, tx, "revoking credential", revokeCredentials+`credential_id = $1`, credentialID)
		}
		if err == nil && manages(a) {
			err = wantManager(ctx, tx)
		}
		return newEvent(credentialRevoked, agentID, facts{"credentialId": credentialID}), err
	})
}

// A credentialRow is what storing a credential takes.
type credentialRow struct {
	credentialID, clientID string
	prefix                 string
	hash                   []byte // of a secret
	secretID               string
	proof
}

// storeCredential gives a credential its secret or key, and its expiry. The tokens
// that an old one was traded for have another secret_id, and so are dead.
func storeCredential(ctx context.Context, tx pgx.Tx, row credentialRow) (credential, error) {
	var thumbprint *string
	if row.key != nil {
		text := row.key.thumbprint()
		thumbprint = &text
	}
	c, err := one[credential](ctx, tx, nil, "storing credential", `
		insert into credentials (credential_id, client_id, kind, secret_prefix, secret_hash, secret_id, expires_at,
			public_key, key_thumbprint, workload)
		values ($1, $2, $3, $4, $5, $6, date_trunc('milliseconds', $7::timestamptz), $8, $9, $10)
		on conflict (credential_id) do update
		set secret_prefix = excluded.secret_prefix, secret_hash = excluded.secret_hash, secret_id = excluded.secret_id,
			expires_at = excluded.expires_at, public_key = excluded.public_key, key_thumbprint = excluded.key_thumbprint,
			workload = excluded.workload
		returning `+credentialColumns,
		row.credentialID, row.clientID, row.kind(), row.prefix, string(row.hash), row.secretID, row.expiresAt, row.key, thumbprint, row.workload)
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok && refusal.ConstraintName == "credentials_key_thumbprint" {
		err = errKeyTaken
	}
	return c, err
}

// checkRotation refuses to give a credential what is of another kind, or the same key. It
// returns the credential as it was.
func (row credentialRow) checkRotation(ctx context.Context, tx pgx.Tx) (credential, error) {
	old, err := checkCredential(ctx, tx, row.clientID, row.credentialID)
	switch {
	case err != nil:
	case old.Kind != row.kind():
		faults := map[string]any{}
		for field, kind := range map[string]string{"publicKey": "key", "workload": "workload"} {
			if (row.kind() == kind) != (old.Kind == kind) {
				faults[field] = "must be there for a credential that is a " + kind + ", and only then; this is a " + old.Kind
			}
		}
		err = errValidation.with(faults)
	case row.key != nil && old.KeyThumbprint != nil && row.key.thumbprint() == *old.KeyThumbprint:
		err = errKeyTaken
	}
	return old, err
}

// checkCredential returns a credential, and refuses what is no active one of the agent,
// which must be locked. Another agent's is as unknown as one that never was.
func checkCredential(ctx context.Context, tx pgx.Tx, agentID, credentialID string) (credential, error) {
	if !isID(credentialID) {
		return credential{}, errNoCredential
	}
	c, err := one[credential](ctx, tx, errNoCredential, "loading credential", `
		select `+credentialColumns+`
		from credentials
		where credential_id = $1 and client_id = $2`, credentialID, agentID)
	if err == nil && c.Status != "active" {
		err = errCredentialRevoked
	}
	return c, err
}

// bootstrap registers the first agent, with all of our scopes, and prints its
// client_id and client_secret. Where others may manage agents it refuses, unless
// they are said to be lost.
func (s *server) bootstrap(ctx context.Context, address string, othersAreLost bool, stdout io.Writer) error {
	if _, err := email(address); err != nil {
		return fmt.Errorf("the email %w", err)
	}
	kind, release, owner := "custom", "1.0.0", "operator"
	q := registration{&address, agentChange{
		AgentType: &kind, Version: &release, Capabilities: &ourScopes, Owner: &owner, DeploymentEnv: &environments[2],
	}}
	plain := newSecret()
	hash, err := s.vault.hash(ctx, plain)
	if err != nil {
		return err
	}
	operator := &request{Request: (&http.Request{}).WithContext(ctx), id: s.newID()}
	printed := false
	err = s.change(operator, "", func(ctx context.Context, tx pgx.Tx) (event, error) {
		has, err := hasManager(ctx, tx)
		if err == nil && has && !othersAreLost {
			err = errors.New("an active agent may hold agents:write already; let it register others, or use recover if it is lost")
		}
		if err != nil {
			return event{}, err
		}
		a, err := insertAgent(ctx, tx, s.newID(), q)
		if err != nil {
			return event{}, err
		}
		c, err := storeCredential(ctx, tx, credentialRow{s.newID(), a.AgentID, plain.prefix(), hash, s.newID(), proof{}})
		if err == nil { // before it is there: nobody could use one whose secret was not printed
			_, err = fmt.Fprintf(stdout, "client_id: %s\nclient_secret: %s\n", a.AgentID, plain.reveal())
			printed = true
		}
		return newEvent(agentCreated, a.AgentID, facts{"agent": q, "credentialId": c.CredentialID, "recovers": othersAreLost}), err
	})
	if err != nil && printed {
		err = fmt.Errorf("%w; what was printed is of no use", err)
	}
	return err
}

// A secret is a client secret in clear. However it is printed or logged, it
// says "[secret]"; only reveal gives it away.
type secret string

var secretPattern = regexp.MustCompile(`^sk_live_[0-9a-f]{64}$`)

func newSecret() secret {
	var b [32]byte
	rand.Read(b[:])
	return secret("sk_live_" + hex.EncodeToString(b[:]))
}

func (secret) Format(f fmt.State, _ rune)   { io.WriteString(f, "[secret]") }
func (secret) LogValue() slog.Value         { return slog.StringValue("[secret]") }
func (secret) MarshalText() ([]byte, error) { return []byte("[secret]"), nil }

func (s secret) reveal() string { return string(s) }

// prefix is the part that is stored in clear, by which a secret is found and
// people tell secrets apart. 192 random bits remain.
func (s secret) prefix() string { return string(s[8:24]) }

// wellFormed must hold before prefix and compare: bcrypt reads 72 bytes, which
// is exactly such a secret, and would ignore what follows.
func (s secret) wellFormed() bool { return secretPattern.MatchString(string(s)) }

// maxWaiting is how many secrets may wait to be compared: half as many as requests
// may wait for a store, so that wrong ones don't take the places of all others.
const maxWaiting = maxInFlight / 2

// A vault compares secrets with their hashes. Bcrypt of a random secret
// protects nothing the second time, so it remembers what it has compared.
//
// Bcrypt takes long, so each that wants it waits for a place. Comparisons wait
// in the lane of their address first, or whoever has many wrong secrets, and
// knows to whom they would belong, would go before all others; and what is
// hashed doesn't wait for what is compared.
type vault struct {
	making, comparing slots
	waiting           slots // for a place; who comes beyond is refused at once
	lanes             *lanes
	key               [32]byte // makes the memo's keys worthless elsewhere
	right             memo[struct{}]
}

func newVault() *vault {
	v := &vault{making: make(slots, 1), comparing: make(slots, max(1, runtime.GOMAXPROCS(0)/2)), waiting: make(slots, maxWaiting), lanes: newLanes(1)}
	rand.Read(v.key[:])
	return v
}

func (v *vault) hash(ctx context.Context, s secret) (hash []byte, err error) {
	if err = v.making.enter(ctx); err != nil {
		return nil, err
	}
	defer v.making.leave()
	return bcrypt.GenerateFromPassword([]byte(s), bcrypt.DefaultCost) // cost 10
}

// compare tells whether hash is that of s, which address has sent. An error says
// that it wasn't its turn before the deadline of ctx.
func (v *vault) compare(ctx context.Context, address, hash string, s secret) (right bool, err error) {
	select {
	case v.waiting <- struct{}{}:
		defer v.waiting.leave()
	default:
		return false, errBusy
	}
	lane := v.lanes.of(address)
	if err := lane.enter(ctx); err != nil {
		return false, err
	}
	defer lane.leave()
	if err := v.comparing.enter(ctx); err != nil {
		return false, err
	}
	defer v.comparing.leave()
	// Whoever was before us may have found it out.
	right = v.known(hash, s) || bcrypt.CompareHashAndPassword([]byte(hash), []byte(s)) == nil
	if right {
		v.right.put(v.memoKey(hash, s), struct{}{})
	}
	return right, nil
}

// known tells whether compare has found before that hash is that of s.
func (v *vault) known(hash string, s secret) bool {
	_, ok := v.right.get(v.memoKey(hash, s))
	return ok
}

func (v *vault) memoKey(hash string, s secret) (key [32]byte) {
	h := hmac.New(sha256.New, v.key[:])
	h.Write([]byte(hash)) // of fixed length
	h.Write([]byte(s))
	h.Sum(key[:0])
	return key
}
