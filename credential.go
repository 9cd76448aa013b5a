package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/crypto/bcrypt"
)

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

// A vault compares secrets with their hashes. Bcrypt of a random secret
// protects nothing the second time, so it remembers what it has compared: a
// memo of a pure function, in which nothing has to be invalidated.
type vault struct {
	slots chan struct{} // bcrypt runs in as many goroutines at once
	key   [32]byte      // makes the memo's keys worthless elsewhere

	mu   sync.Mutex
	memo map[[32]byte]struct{} // of at most memoSize
}

const memoSize = 1 << 16

func newVault() *vault {
	v := &vault{slots: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)), memo: map[[32]byte]struct{}{}}
	rand.Read(v.key[:])
	return v
}

func (v *vault) hash(ctx context.Context, s secret) (hash []byte, err error) {
	err = v.slowly(ctx, func() (err error) {
		hash, err = bcrypt.GenerateFromPassword([]byte(s), bcrypt.DefaultCost) // cost 10
		return err
	})
	return hash, err
}

// compare tells whether hash is that of s. An error says that no slot came
// free before the deadline of ctx.
func (v *vault) compare(ctx context.Context, hash string, s secret) (right bool, err error) {
	err = v.slowly(ctx, func() error {
		// Whoever was before us may have found it out.
		right = v.known(hash, s) || bcrypt.CompareHashAndPassword([]byte(hash), []byte(s)) == nil
		return nil
	})
	if right {
		v.remember(v.memoKey(hash, s))
	}
	return right, err
}

// slowly runs what takes bcrypt's time in one of the slots.
func (v *vault) slowly(ctx context.Context, do func() error) error {
	select {
	case v.slots <- struct{}{}:
		defer func() { <-v.slots }()
		return do()
	case <-ctx.Done():
		return fmt.Errorf("waiting to hash a secret: %w", ctx.Err())
	}
}

// known tells whether compare has found before that hash is that of s.
func (v *vault) known(hash string, s secret) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, ok := v.memo[v.memoKey(hash, s)]
	return ok
}

func (v *vault) remember(key [32]byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for old := range v.memo { // Go begins anywhere
		if len(v.memo) < memoSize {
			break
		}
		delete(v.memo, old)
	}
	v.memo[key] = struct{}{}
}

func (v *vault) memoKey(hash string, s secret) (key [32]byte) {
	h := hmac.New(sha256.New, v.key[:])
	h.Write([]byte(hash)) // of fixed length
	h.Write([]byte(s))
	h.Sum(key[:0])
	return key
}

// A credential as it is stored and shown. Its hash is in no wire type.
type credential struct {
	CredentialID string  `json:"credentialId"`
	ClientID     string  `json:"clientId"`
	Status       string  `json:"status"` // active or revoked
	CreatedAt    moment  `json:"createdAt"`
	ExpiresAt    *moment `json:"expiresAt"`
	RevokedAt    *moment `json:"revokedAt"`
	SecretPrefix string  `json:"secretPrefix"`
}

const credentialColumns = `credential_id, client_id, status, created_at, expires_at, revoked_at, secret_prefix`

// A newCredential shows the secret, once.
type newCredential struct {
	credential
	ClientSecret string `json:"clientSecret"`
}

// expiry is the one field of a request for a secret; none: until it is
// revoked.
func (in *inputs) expiry() *time.Time {
	return take(in, "expiresAt", parsed("must be a time in the future, like 2030-01-01T00:00:00Z", func(s string) (time.Time, error) {
		t, err := time.Parse(time.RFC3339, s)
		if !t.After(time.Now()) || t.UTC().Year() > 9999 {
			err = strconv.ErrRange
		}
		return t, err
	}))
}

func (s *server) createCredential(r *request) (any, error) {
	return s.giveSecret(r, newID(), credentialGenerated, insertCredential)
}

func (s *server) rotateCredential(r *request) (any, error) {
	return s.giveSecret(r, r.PathValue("credentialId"), credentialRotated, replaceSecret)
}

// giveSecret stores a new secret with store and answers with it.
func (s *server) giveSecret(r *request, credentialID, did string,
	store func(context.Context, *change, secretRow) (credential, error)) (any, error) {
	expires, err := decode(r, (*inputs).expiry)
	if err != nil {
		return nil, err
	}
	agentID, plain := r.PathValue("agentId"), newSecret()
	hash, err := s.vault.hash(r.Context(), plain)
	if err != nil {
		return nil, err
	}
	var c credential
	err = s.change(r, func(ctx context.Context, tx *change) (event, error) {
		if err := lockManaged(ctx, tx, r, agentID, "active"); err != nil {
			return event{}, err
		}
		c, err = store(ctx, tx, secretRow{credentialID, agentID, plain.prefix(), hash, newID(), expires})
		return newEvent(did, agentID, facts{"credentialId": credentialID, "expiresAt": c.ExpiresAt}), err
	})
	return newCredential{c, plain.reveal()}, err
}

// lockManaged locks an agent for a change of its credentials, and refuses where
// the caller may not, or the agent is in none of these states. An agent may
// change its own by credentials:write. Else it is as for any change of the
// agent, since a credential is all that the agent may do.
func lockManaged(ctx context.Context, tx *change, r *request, agentID string, states ...string) error {
	a, err := loadAgent(ctx, tx, agentID, forUpdate)
	if err != nil {
		return err
	}
	if a.AgentID != r.caller.agentID || !r.caller.has(credentialsWrite) {
		err = r.caller.mayGrant(a.Capabilities)
	}
	if err == nil && !slices.Contains(states, a.Status) {
		err = errNotActive.because("The agent is " + a.Status + ", and only an active one is given a secret.")
	}
	return err
}

func (s *server) listCredentials(r *request) (any, error) {
	in := r.query()
	part := in.span()
	if err := in.problem(); err != nil {
		return nil, err
	}
	a, err := loadAgent(r.Context(), s.db, r.PathValue("agentId"), "")
	if err != nil {
		return nil, err
	}
	p, _, err := list[credential](r.Context(), s.db, part, pgx.NamedArgs{"client": a.AgentID}, credentialColumns, `
		from credentials
		where client_id = @client`, `
		order by credential_id desc`)
	return p, err
}

const revokeCredentials = `
	update credentials
	set status = 'revoked', revoked_at = date_trunc('milliseconds', clock_timestamp())
	where `

func (s *server) revokeCredential(r *request) (any, error) {
	agentID, credentialID := r.PathValue("agentId"), r.PathValue("credentialId")
	return nil, s.change(r, func(ctx context.Context, tx *change) (event, error) {
		err := lockManaged(ctx, tx, r, agentID, statuses...)
		if err == nil {
			_, err = loadSecretID(ctx, tx, agentID, credentialID)
		}
		if err == nil {
			err = execSQL(ctx, tx, "revoking credential", revokeCredentials+`credential_id = $1`, credentialID)
		}
		if err == nil {
			_, err = tx.revoke(ctx, "credential", credentialID, lastExpiry())
		}
		return newEvent(credentialRevoked, agentID, facts{"credentialId": credentialID}), err
	})
}

// A secretRow is what storing a secret takes.
type secretRow struct {
	credentialID, clientID, prefix string
	hash                           []byte
	secretID                       string
	expiresAt                      *time.Time
}

func insertCredential(ctx context.Context, tx *change, row secretRow) (credential, error) {
	return one[credential](ctx, tx, nil, "storing credential", `
		insert into credentials (credential_id, client_id, secret_prefix, secret_hash, secret_id, expires_at)
		values ($1, $2, $3, $4, $5, date_trunc('milliseconds', $6::timestamptz))
		returning `+credentialColumns,
		row.credentialID, row.clientID, row.prefix, string(row.hash), row.secretID, row.expiresAt)
}

// replaceSecret gives a credential a new secret and expiry, and revokes the
// tokens that the old secret was traded for.
func replaceSecret(ctx context.Context, tx *change, row secretRow) (credential, error) {
	old, err := loadSecretID(ctx, tx, row.clientID, row.credentialID)
	if err != nil {
		return credential{}, err
	}
	c, err := one[credential](ctx, tx, errNoCredential, "replacing a secret", `
		update credentials
		set secret_prefix = $2, secret_hash = $3, secret_id = $4, expires_at = date_trunc('milliseconds', $5::timestamptz)
		where credential_id = $1
		returning `+credentialColumns,
		row.credentialID, row.prefix, string(row.hash), row.secretID, row.expiresAt)
	if err == nil {
		_, err = tx.revoke(ctx, "secret", old, lastExpiry())
	}
	return c, err
}

// loadSecretID returns what tokens of an active credential carry. Its agent
// must be locked. Another agent's credential is as unknown as one that never
// was.
func loadSecretID(ctx context.Context, tx pgx.Tx, agentID, credentialID string) (id string, err error) {
	if !isID(credentialID) {
		return "", errNoCredential
	}
	var status string
	err = tx.QueryRow(ctx, `
		select secret_id, status
		from credentials
		where credential_id = $1 and client_id = $2`, credentialID, agentID).Scan(&id, &status)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		err = errNoCredential
	case err != nil:
		err = fmt.Errorf("loading credential: %w", err)
	case status != "active":
		err = errCredentialRevoked
	}
	return id, err
}

// authenticateClient is the only way from a request to the client that sent
// it: by HTTP Basic, or client_id and client_secret in the form (RFC 6749,
// section 2.3.1). A further method is a further case of clientSecret.
//
// A client that is known to be right costs one query. All others are first
// counted as a failure of their address, so that no burst gets through to
// bcrypt or the audit log, and are given that back if they turn out right.
func (s *server) authenticateClient(r *request) error {
	id, plain, err := r.clientSecret()
	if err != nil {
		return err
	}
	var o secretOwner
	if isID(id) && plain.wellFormed() {
		if o, err = loadSecretOwner(r.Context(), s.db, id, plain.prefix()); err != nil {
			return err
		}
	}
	right := o.hash != "" && s.vault.known(o.hash, plain)
	if right {
		s.meter.add(1, "agentidp_secret_comparisons_total", `kind="warm"`)
	}
	if right && o.refusal() == nil {
		r.caller = o.caller
		return nil
	}
	address := addressKey(r.addr)
	v, err := s.admit(r.Context(), address, nil, "", 0)
	if err != nil {
		return err
	}
	if v.state == "limited" {
		v.setHeaders(r.out)
		s.meter.add(1, "agentidp_limit_rejections_total", `limit="address"`)
		return errAddressLimited
	}
	if !right && o.hash != "" {
		s.meter.add(1, "agentidp_secret_comparisons_total", `kind="cold"`)
		right, err = s.vault.compare(r.Context(), o.hash, plain)
	}
	if err != nil || right && o.refusal() == nil {
		if v.state == "admitted" {
			s.redis.giveBack(r.Context(), fmt.Sprintf("rate:%s:%d", address, v.now/60000))
		}
		if err == nil {
			r.caller = o.caller
		}
		return err
	}
	why := errBadClient
	if right {
		why = o.refusal()
	}
	if !isID(id) {
		id = ""
	}
	return s.refused(r, newEvent(authFailed, id, facts{"reason": why.oauth}), why)
}

// A secretOwner is the client that a prefix belongs to.
type secretOwner struct {
	caller
	hash, status, agentStatus string
}

// refusal says why the right secret isn't enough, or nil.
func (o secretOwner) refusal() *problem {
	switch {
	case o.agentStatus == "decommissioned": // which has revoked its credentials
		return errClientInactive.because("This agent is decommissioned, which is final.")
	case o.status != "active", o.expiresAt != nil && !o.expiresAt.After(time.Now()):
		return errBadClient
	case o.agentStatus != "active":
		return errClientInactive.because("This agent is " + o.agentStatus + ", until an operator sets its status to active.")
	}
	return nil
}

// loadSecretOwner returns a zero secretOwner where there is none.
func loadSecretOwner(ctx context.Context, db querier, clientID, prefix string) (secretOwner, error) {
	o := secretOwner{caller: caller{agentID: clientID}}
	err := db.QueryRow(ctx, `
		select c.credential_id, c.secret_id, c.secret_hash, c.status, c.expires_at, a.status, a.capabilities
		from credentials c
		join agents a on a.agent_id = c.client_id
		where c.secret_prefix = $1 and c.client_id = $2`, prefix, clientID).
		Scan(&o.credentialID, &o.secretID, &o.hash, &o.status, &o.expiresAt, &o.agentStatus, &o.scopes)
	if errors.Is(err, pgx.ErrNoRows) {
		return secretOwner{}, nil
	}
	if err != nil {
		return secretOwner{}, fmt.Errorf("loading credential: %w", err)
	}
	return o, nil
}

// clientSecret finds the one client_id and secret in a request.
func (r *request) clientSecret() (id string, plain secret, err error) {
	id, plain = r.form.Get("client_id"), secret(r.form.Get("client_secret"))
	header := r.Header.Get("Authorization")
	if header == "" {
		if plain == "" {
			return "", "", errNoClient
		}
		return id, plain, nil
	}
	scheme, encoded, _ := strings.Cut(header, " ")
	if plain != "" {
		return "", "", errTwoMethods
	}
	if !strings.EqualFold(scheme, "Basic") {
		return "", "", errNoClient
	}
	decoded, err := base64.StdEncoding.DecodeString(strings.TrimLeft(encoded, " "))
	user, password, _ := strings.Cut(string(decoded), ":")
	// Each half is form-encoded (RFC 6749, section 2.3.1). Ids and secrets
	// have no character that clients which forget it would send differently.
	user, userErr := url.QueryUnescape(user)
	password, passwordErr := url.QueryUnescape(password)
	if err != nil || userErr != nil || passwordErr != nil {
		return "", "", errNoClient.because("After Basic there must be base64 of client_id:client_secret, each form-encoded.")
	}
	if id != "" && id != user {
		return "", "", errTwoMethods.because("The client_id in the form is not that of the Authorization header.")
	}
	return user, secret(password), nil
}
