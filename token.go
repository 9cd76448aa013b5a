package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"mime"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

const maxTokenTTL = 24 * time.Hour

// scopePattern is the grammar of RFC 6749, section 3.3.
var scopePattern = regexp.MustCompile(`^[\x21\x23-\x5B\x5D-\x7E]+( [\x21\x23-\x5B\x5D-\x7E]+)*$`)

// parseForm reads the form of a token endpoint. Parameters count only in the
// body, once, and an empty one is an absent one (RFC 6749, section 3.2).
func (r *request) parseForm() error {
	types := r.Header.Values("Content-Type")
	if mediaType, _, err := mime.ParseMediaType(strings.Join(types, ",")); err != nil ||
		len(types) != 1 || mediaType != "application/x-www-form-urlencoded" {
		return errForm.because("The Content-Type must be application/x-www-form-urlencoded, once; it was '" + clip(strings.Join(types, ", ")) + "'.")
	}
	body, err := r.readBody()
	if err != nil {
		return err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return errForm.because("The body must be name=value pairs, with % only before two hex digits and no ;.")
	}
	for name, values := range form {
		if len(values) > 1 && name != "resource" {
			return errForm.because("The parameter " + clip(name) + " is there more than once.")
		}
	}
	r.form = form
	return nil
}

// identify finds out who sent a bearer token (RFC 6750, section 2.1), that it
// is for this service, not revoked, and within its client's limit.
func (s *server) identify(r *request) error {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return errNoToken
	}
	c, err := s.keys.Load().verify(strings.TrimLeft(token, " "), s.cfg.issuer, time.Now())
	if err == nil && !slices.Contains(c.Audience, s.cfg.issuer) {
		err = fmt.Errorf("a token for %s; ask for one without resource, or for %s too", clip(strings.Join(c.Audience, " ")), s.cfg.issuer)
	}
	if err != nil {
		return errInvalidToken.because("This is " + err.Error() + ".")
	}
	v, err := s.admit(r.Context(), c.Subject, c.revocationIDs(), "", 0)
	if err != nil {
		return err
	}
	v.setHeaders(r.out)
	switch v.state {
	case "revoked":
		return errInvalidToken
	case "limited":
		s.meter.add(1, "agentidp_limit_rejections_total", `limit="client"`)
		return errRateLimited
	}
	r.caller = caller{
		agentID: c.Subject, credentialID: c.CredentialID, secretID: c.SecretID, scopes: strings.Fields(c.Scope),
	}
	return nil
}

// issueToken is the client credentials grant (RFC 6749, section 4.4).
func (s *server) issueToken(r *request) (any, error) {
	scope, audience, bad := s.checkGrant(r)
	month := monthKey(r.caller.agentID, time.Now())
	if bad != nil || s.cfg.monthlyTokenLimit == 0 {
		month = "" // spends nothing of the quota
	}
	counted, err := s.spend(r, month)
	if err != nil {
		return nil, err
	}
	if bad != nil {
		return nil, bad
	}
	now := time.Now()
	expires := now.Add(s.cfg.tokenTTL).Unix()
	if end := r.caller.expiresAt; end != nil { // no token outlives its credential
		expires = min(expires, end.Unix())
	}
	c := claims{
		Issuer: s.cfg.issuer, Subject: r.caller.agentID, Audience: audience, ClientID: r.caller.agentID, Scope: scope,
		ID: newID(), IssuedAt: now.Unix(), Expires: expires,
		CredentialID: r.caller.credentialID, SecretID: r.caller.secretID,
	}
	f := facts{"jti": c.ID, "credentialId": c.CredentialID, "scope": scope, "exp": expires}
	if audience[0] != s.cfg.issuer || len(audience) > 1 {
		f["aud"] = audience
	}
	stored := s.record(r, newEvent(tokenIssued, c.Subject, f)) // goes on while we sign
	token, err := s.keys.Load().sign(accessToken, c)
	if storeErr := stored(); storeErr != nil || err != nil {
		if counted {
			s.redis.giveBack(r.Context(), month)
		}
		return nil, errors.Join(storeErr, err)
	}
	s.meter.add(1, "agentidp_tokens_issued_total", "")
	return struct {
		AccessToken string `json:"access_token"`
		TokenType   string `json:"token_type"`
		ExpiresIn   int64  `json:"expires_in"` // seconds
		Scope       string `json:"scope"`
	}{token, "Bearer", expires - now.Unix(), scope}, nil
}

// checkGrant decides what the token is to carry.
func (s *server) checkGrant(r *request) (scope string, aud audience, err error) {
	switch r.form.Get("grant_type") {
	case "client_credentials":
	case "":
		return "", nil, errForm.because("The body lacks grant_type=client_credentials.")
	default:
		return "", nil, errGrantType.because("The grant_type must be client_credentials; it was '" + clip(r.form.Get("grant_type")) + "'.")
	}
	if scope, err = grantScope(r.form.Get("scope"), r.caller.scopes); err != nil {
		return "", nil, err
	}
	aud, err = grantAudience(r.form["resource"], s.cfg.issuer)
	return scope, aud, err
}

// grantScope narrows what is asked for to what the capabilities allow (RFC
// 6749, section 3.3); asked for nothing, it is all of them.
func grantScope(asked string, capabilities []string) (string, error) {
	if asked == "" {
		return strings.Join(capabilities, " "), nil
	}
	if !scopePattern.MatchString(asked) {
		return "", errScope.because("The scope must be names like agents:read, separated by single spaces; it was '" + clip(asked) + "'.")
	}
	var granted []string
	size := 0
	for _, scope := range strings.Split(asked, " ") {
		resource, _, _ := strings.Cut(scope, ":")
		if !slices.Contains(granted, scope) && (slices.Contains(capabilities, scope) ||
			slices.Contains(capabilities, resource+":*") && capabilityPattern.MatchString(scope)) {
			granted = append(granted, scope)
			size += len(" ") + len(scope)
		}
		if size > 64*101 { // longer than all capabilities, and a token must not be too long to be read
			return "", errScope.because("The scopes asked for are too long together; ask for fewer, or for resource:*.")
		}
	}
	if granted == nil {
		return "", errScope.because("Of '" + clip(asked) + "' none is among the agent's capabilities: " + clip(strings.Join(capabilities, " ")) + ". Scopes are separated by spaces.")
	}
	return strings.Join(granted, " "), nil
}

// grantAudience is the resources asked for (RFC 8707, section 2), else us.
func grantAudience(resources []string, issuer string) (audience, error) {
	var aud audience
	size := 0
	for _, resource := range resources {
		if resource == "" { // as if it were not there (RFC 6749, section 3.2)
			continue
		}
		u, err := url.Parse(resource)
		if err != nil || !u.IsAbs() || u.Fragment != "" || strings.Contains(resource, "#") ||
			strings.IndexFunc(resource, func(c rune) bool { return c <= ' ' || c > '~' || c == '"' || c == '\\' }) >= 0 {
			return nil, errResource.because("A resource must be an absolute URI without a fragment; it was '" + clip(resource) + "'.")
		}
		encoded, _ := json.Marshal(resource)
		if size += len(encoded); size > 2048 || len(aud) >= 16 {
			return nil, errResource.because("There may be 16 resources of 2,048 characters together; these are more.")
		}
		if !slices.Contains(aud, resource) {
			aud = append(aud, resource)
		}
	}
	if aud == nil {
		aud = audience{issuer}
	}
	return aud, nil
}

// spend counts the request for its client's limit, and where month isn't empty
// for its quota; counted says whether the latter has to be given back if
// nothing comes of it. A quota that Redis has lost is counted anew.
func (s *server) spend(r *request, month string) (counted bool, err error) {
	v, err := s.admit(r.Context(), r.caller.agentID, nil, month, -1)
	if err == nil && v.state == "uncounted" {
		var n int64
		err = s.db.QueryRow(r.Context(), `
			select count(*)
			from audit_events
			where agent_id = $1 and action = 'token.issued' and outcome = 'success'
				and "timestamp" >= date_trunc('month', now(), 'UTC')`, r.caller.agentID).Scan(&n)
		if err == nil {
			v, err = s.admit(r.Context(), r.caller.agentID, nil, month, n)
		}
	}
	if err != nil {
		return false, fmt.Errorf("counting this month's tokens: %w", err)
	}
	v.setHeaders(r.out)
	switch v.state {
	case "limited":
		s.meter.add(1, "agentidp_limit_rejections_total", `limit="client"`)
		return false, errRateLimited
	case "spent":
		s.meter.add(1, "agentidp_limit_rejections_total", `limit="quota"`)
		return false, errQuota.because(fmt.Sprintf("The monthly quota of %d tokens is spent. It resets at %s.",
			s.cfg.monthlyTokenLimit, moment{nextMonth(time.Now())}))
	}
	return v.state == "admitted" && month != "", nil
}

// introspectToken is RFC 7662. Whatever is wrong with a token, the answer is
// the same.
func (s *server) introspectToken(r *request) (any, error) {
	token := r.form.Get("token")
	if token == "" {
		return nil, errForm.because("The body lacks token=TOKEN, the one that this is about.")
	}
	c, err := s.keys.Load().verify(token, s.cfg.issuer, time.Now())
	active := err == nil
	f := facts{}
	if active {
		f["jti"] = c.ID
		v, err := s.admit(r.Context(), "", c.revocationIDs(), "", 0)
		if err != nil {
			return nil, err
		}
		active = v.state != "revoked"
	}
	f["active"] = active
	if err := s.record(r, newEvent(tokenIntrospected, c.Subject, f))(); err != nil {
		return nil, err
	}
	if !active {
		return map[string]bool{"active": false}, nil
	}
	return struct {
		Active    bool   `json:"active"`
		TokenType string `json:"token_type"`
		claims
	}{true, "Bearer", c}, nil
}

// revokeToken is RFC 7009. A token that is not valid any more needs nothing.
func (s *server) revokeToken(r *request) (any, error) {
	token := r.form.Get("token")
	if token == "" {
		return nil, errForm.because("The body lacks token=TOKEN, the one that this is about.")
	}
	c, err := s.keys.Load().verify(token, s.cfg.issuer, time.Now())
	if err != nil {
		return struct{}{}, nil
	}
	e := newEvent(tokenRevoked, c.Subject, facts{"jti": c.ID})
	if c.Subject != r.caller.agentID && !r.caller.has(agentsWrite) {
		return nil, s.refused(r, e, errForm.because("This token was issued to another client; to revoke it takes the scope agents:write."))
	}
	return struct{}{}, s.change(r, func(ctx context.Context, tx *change) (event, error) {
		fresh, err := tx.revoke(ctx, "token", c.ID, time.Unix(c.Expires, 0).Add(time.Hour))
		if !fresh {
			return event{}, err // revoked before: nothing happens that would be an event
		}
		return e, err
	})
}

// Revocation. A revocation is a row in token_revocations, under the id that
// tokens carry; Redis has a copy as revoked:<id>, whose value is the row's
// revision, negative where the revocation was lifted. Absence there counts only
// while warmKey holds the run_id of that very Redis process.
//
// The keeper of any copy sets warmKey after it has copied all rows, and then
// keeps it alive for one lease at a time, counted from before it has last seen
// that PostgreSQL has no row which Redis lacks. So a revocation that does not
// reach Redis is waited out: a lease after its commit nobody trusts a Redis
// that lacks it. Without warmKey, PostgreSQL is asked.
const (
	warmKey = "revoked:warm"
	lease   = 2 * time.Second
)

func revokedKey(id string) string { return "revoked:" + id }

// lastExpiry is when every token issued until now has surely expired.
func lastExpiry() time.Time { return time.Now().Add(maxTokenTTL + time.Hour) }

// A revocation as Redis is to have it.
type revocation struct {
	ID       string
	Revision int64 // negative: lifted
	Lifetime int64 // milliseconds until it is of no use
}

// revoke is part of a change: what bears this id is refused from the answer
// on. Fresh is false where it was revoked already.
func (tx *change) revoke(ctx context.Context, kind, id string, expires time.Time) (fresh bool, err error) {
	tx.revokes = true
	err = tx.QueryRow(ctx, `
		insert into token_revocations as old (id, kind, expires_at)
		values ($1, $2, $3)
		on conflict (id) do update
		set lifted = false, in_redis = false, revision = default,
			revoked_at = date_trunc('milliseconds', clock_timestamp()),
			expires_at = greatest(old.expires_at, excluded.expires_at)
		returning xmax = 0`, id, kind, expires).Scan(&fresh)
	if err != nil {
		return false, fmt.Errorf("revoking: %w", err)
	}
	return fresh, nil
}

// lift is part of a change: what was revoked counts again.
func (tx *change) lift(ctx context.Context, id string) error {
	tx.revokes = true
	return execSQL(ctx, tx, "lifting a revocation", `
		update token_revocations
		set lifted = true, in_redis = false, revision = default
		where id = $1`, id)
}

// isRevoked asks PostgreSQL.
func isRevoked(ctx context.Context, db querier, ids []string) (revoked bool, err error) {
	err = db.QueryRow(ctx, `
		select exists (
			select
			from token_revocations
			where id = any($1) and not lifted and expires_at > now())`, ids).Scan(&revoked)
	if err != nil {
		return false, fmt.Errorf("looking for a revocation: %w", err)
	}
	return revoked, nil
}

// putScript copies revocations: KEYS are theirs, ARGV revision and lifetime of
// each. The later revision wins, in whatever order two copies' writes arrive.
var putScript = redis.NewScript(`
for i, key in ipairs(KEYS) do
	local revision = tonumber(ARGV[2 * i - 1])
	if math.abs(revision) > math.abs(tonumber(redis.call('GET', key) or 0)) then
		redis.call('SET', key, ARGV[2 * i - 1], 'PX', ARGV[2 * i])
	end
end
return {}`)

func (c *cache) put(ctx context.Context, list []revocation) error {
	keys, args := make([]string, len(list)), make([]any, 0, 2*len(list))
	for i, r := range list {
		keys[i] = revokedKey(r.ID)
		args = append(args, r.Revision, r.Lifetime)
	}
	_, err := c.run(ctx, putScript, keys, args...)
	return err
}

// publish makes committed revocations effective on every copy before it
// returns: in Redis, or by waiting until no copy trusts Redis without them.
func (s *server) publish(ctx context.Context) {
	if s.copyRevocations(ctx, s.db, false) != nil {
		time.Sleep(lease)
	}
}

// leaseScript tells Redis's time, whether warmKey is this Redis process's, and
// whether keys may be evicted. Where a warm-up is to begin, it leaves a mark.
var leaseScript = redis.NewScript(`
local time = redis.call('TIME')
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local memory = redis.call('INFO', 'memory')
local evicts = string.match(memory, '\nmaxmemory:(%d+)') ~= '0'
	and string.match(memory, 'maxmemory_policy:(%w+)') ~= 'noeviction'
local warm = redis.call('GET', KEYS[1]) == run
if not warm and ARGV[1] == 'begin' then redis.call('SET', KEYS[2], run, 'PX', 60000) end
return {time[1] * 1000 + math.floor(time[2] / 1000), warm and 1 or 0, evicts and 1 or 0}`)

// vouchScript renews warmKey until ARGV[1]; or sets it anew, if the mark shows
// that nothing was lost since the warm-up began.
var vouchScript = redis.NewScript(`
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
if redis.call('GET', KEYS[1]) == run or redis.call('GET', KEYS[2]) == run then
	redis.call('SET', KEYS[1], run, 'PXAT', ARGV[1])
end
return {}`)

var errEvicts = errors.New("redis may evict keys: set maxmemory-policy to noeviction")

// keepWarm copies to Redis what it lacks of token_revocations, and renews the
// lease on its trust.
func (s *server) keepWarm(ctx context.Context) error {
	keys := []string{warmKey, "revoked:warming:" + newID()}
	state, err := s.redis.run(ctx, leaseScript, keys, "begin")
	if err != nil {
		return err
	}
	cold := state[1] == int64(0)
	if state[2] == int64(1) {
		err = errEvicts
	} else if cold {
		slog.Info("warming redis up")
		err = errors.Join(s.doubtQuotas(ctx), s.copyRevocations(ctx, s.inner, true))
	}
	if err == nil && cold { // from here on, what Redis lacks is not in_redis
		state, err = s.redis.run(ctx, leaseScript, keys, "go on")
	}
	if err == nil {
		err = s.copyRevocations(ctx, s.inner, false)
	}
	if err != nil {
		return err
	}
	now, _ := state[0].(int64)
	_, err = s.redis.run(ctx, vouchScript, keys, now+lease.Milliseconds())
	return err
}

// doubtScript marks a counter as too low, perhaps, or deletes it if it is 0.
var doubtScript = redis.NewScript(`
local used = tonumber(redis.call('GET', KEYS[1]) or 0)
if used > 0 then redis.call('SET', KEYS[1], -used, 'KEEPTTL') elseif used == 0 then redis.call('DEL', KEYS[1]) end
return {}`)

// doubtQuotas makes the monthly counters be counted anew, from the audit log: a
// Redis that isn't warm may have lost some of what they counted. What they have
// is kept as the least, since the log lacks what is being issued meanwhile.
func (s *server) doubtQuotas(ctx context.Context) error {
	keys := s.redis.Scan(ctx, 0, "monthly:*", 1000).Iterator()
	for keys.Next(ctx) {
		if _, err := s.redis.run(ctx, doubtScript, []string{keys.Val()}); err != nil {
			return fmt.Errorf("doubting quotas: %w", err)
		}
	}
	if err := keys.Err(); err != nil {
		return fmt.Errorf("%w: listing quotas: %w", errNoRedis, err)
	}
	return nil
}

// copyRevocations copies to Redis all rows, or those that it may lack.
func (s *server) copyRevocations(ctx context.Context, db querier, all bool) error {
	last, err := int64(0), error(nil)
	for more := true; more && err == nil; {
		last, more, err = s.copyPiece(ctx, db, all, last)
	}
	return err
}

// copyPiece copies the next rows after a revision.
func (s *server) copyPiece(ctx context.Context, db querier, all bool, after int64) (last int64, more bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	rows, _ := db.Query(ctx, `
		select id, case when lifted then -revision else revision end,
			greatest(1, ceil(extract(epoch from expires_at - now()) * 1000))::bigint
		from token_revocations
		where revision > $1 and expires_at > now() and ($2::boolean or not in_redis)
		order by token_revocations.revision
		limit 1000`, pgx.QueryExecModeExec, after, all)
	piece, err := pgx.CollectRows(rows, pgx.RowToStructByPos[revocation])
	if err == nil && len(piece) > 0 {
		err = s.redis.put(ctx, piece)
	}
	if err != nil || len(piece) == 0 {
		return after, false, err
	}
	revisions := make([]int64, len(piece))
	for i, r := range piece {
		revisions[i] = max(r.Revision, -r.Revision)
	}
	return slices.Max(revisions), true, execSQL(ctx, db, "marking what Redis has", `
		update token_revocations
		set in_redis = true
		where not in_redis and revision = any($1)`, revisions)
}

// startKeeper starts what watches over both stores, and returns what stops it.
// Whatever is wrong is logged when it begins, and tried again.
func (s *server) startKeeper() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		troubled := false
		for beat := 0; ctx.Err() == nil; beat++ {
			err := s.keepWell(ctx, beat)
			if (err != nil) != troubled && ctx.Err() == nil {
				troubled = err != nil
				slog.Warn("stores", "well", !troubled, "error", err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(lease / 4):
			}
		}
	}()
	return func() { cancel(); <-stopped }
}

func (s *server) keepWell(ctx context.Context, beat int) error {
	ping, cancel := context.WithTimeout(ctx, storeTimeout)
	// A PostgreSQL that is read-only is of no use: nothing can be recorded.
	err := execSQL(ping, s.inner, "asking PostgreSQL to write", `select nextval('token_revocations_revision')`)
	if err == nil && beat%20 == 0 { // few at a time, since a long stop may have left many
		err = execSQL(ping, s.inner, "deleting expired revocations", `
			delete from token_revocations
			where id in (select id from token_revocations where expires_at < now() - interval '1 minute' limit 10000)`)
	}
	cancel()
	s.postgresUp.Store(err == nil)
	if err != nil { // else each connection that is dead unseen would cost a time-out, one after another
		s.db.Reset()
		s.inner.Reset()
	}
	if err == nil {
		warm, cancel := context.WithTimeout(ctx, time.Minute)
		err = s.keepWarm(warm)
		cancel()
	}
	s.redisUp.Store(!errors.Is(err, errNoRedis) && !errors.Is(err, errEvicts))
	if err == nil {
		s.meter.vouched.Store(time.Now().UnixMilli())
		s.redis.found()
	}
	return err
}
