package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// issueToken is the client credentials grant (RFC 6749, section 4.4).
func (s *server) issueToken(r *request) (any, error) {
	scope, audience, bad := s.checkGrant(r)
	now := s.now()
	month := monthKey(r.caller.AgentID, now)
	if bad != nil || s.quotaOf(r.caller) == 0 {
		month = "" // spends nothing of the quota
	}
	counted, err := s.spend(r, byCredential, month)
	if err != nil {
		return nil, err
	}
	if bad != nil {
		return nil, bad
	}
	expires := now.Add(s.cfg.tokenTTL).Unix()
	if own := r.caller.TokenTTL; own != nil {
		expires = now.Unix() + int64(*own)
	}
	if end := r.caller.expiresAt; end != nil { // no token outlives its credential
		expires = min(expires, end.Unix())
	}
	c := claims{
		Issuer: s.cfg.issuer, Subject: r.caller.AgentID, Audience: audience, ClientID: r.caller.AgentID, Scope: scope,
		ID: s.newID(), IssuedAt: now.Unix(), Expires: expires,
		CredentialID: r.caller.CredentialID, SecretID: r.caller.SecretID,
	}
	f := facts{"jti": c.ID, "credentialId": c.CredentialID, "scope": scope, "exp": expires}
	if r.caller.proved != nil {
		f["workload"] = r.caller.proved
	}
	if audience[0] != s.cfg.issuer || len(audience) > 1 {
		f["aud"] = audience
	}
	stored := s.record(r, newEvent(tokenIssued, c.Subject, f), r.caller.origin) // goes on while we sign
	token, err := s.keys.Load().sign(accessToken, c)
	if _, storeErr := stored(); storeErr != nil || err != nil {
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
	switch grant := r.form.Get("grant_type"); {
	case grant == "client_credentials", s.tradesAssertion(r):
	case grant == "":
		return "", nil, errForm.because("The body lacks grant_type=client_credentials.")
	default:
		return "", nil, errGrantType.because("The grant_type must be client_credentials; it was '" + clip(r.form.Get("grant_type")) + "'.")
	}
	for name, right := range map[string]string{"audience": "resource (RFC 8707)", "aud": "resource (RFC 8707)", "resources": "resource", "scopes": "scope"} {
		if r.form.Get(name) != "" { // others are ignored (RFC 6749, section 3.2), but these would silently get more than was asked for
			return "", nil, errForm.because("There is no parameter " + name + "; it is called " + right + ".")
		}
	}
	if scope, err = grantScope(r.form.Get("scope"), r.caller.scopes); err != nil {
		return "", nil, err
	}
	aud, err = grantAudience(r.form["resource"], s.cfg.issuer, r.caller.Resources)
	return scope, aud, err
}

// scopePattern is the grammar of RFC 6749, section 3.3.
var scopePattern = regexp.MustCompile(`^[\x21\x23-\x5B\x5D-\x7E]+( [\x21\x23-\x5B\x5D-\x7E]+)*$`)

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
		if size > len(" ")+maxScope {
			return "", errScope.because("The scopes asked for are too long together; ask for fewer, or for resource:*.")
		}
	}
	if granted == nil {
		return "", errScope.because("Of '" + clip(asked) + "' none is among the agent's capabilities: " + clip(strings.Join(capabilities, " ")) + ". Scopes are separated by spaces.")
	}
	return strings.Join(granted, " "), nil
}

// grantAudience is the resources asked for (RFC 8707, section 2), else us; and of
// an agent that has resources no others.
func grantAudience(resources []string, issuer string, allowed []string) (audience, error) {
	var aud audience
	size := 0
	for _, resource := range resources {
		if resource == "" { // as if it were not there (RFC 6749, section 3.2)
			continue
		}
		if !isResource(resource) {
			return nil, errResource.because("A resource must be an absolute URI without a fragment; it was '" + clip(resource) + "'.")
		}
		encoded, _ := json.Marshal(resource)
		if size += len(encoded); size > maxResourceBytes || len(aud) >= maxResources {
			return nil, errResource.because("There may be 16 resources of 2,048 characters together; these are more.")
		}
		if !slices.Contains(aud, resource) {
			aud = append(aud, resource)
		}
	}
	if aud == nil {
		aud = audience{issuer}
	}
	for _, resource := range aud {
		if len(allowed) > 0 && !slices.Contains(allowed, resource) {
			return nil, errResource.because("This agent's tokens may not go to " + clip(resource) + "; ask by resource= for one of: " + clip(strings.Join(allowed, " ")) + ".")
		}
	}
	return aud, nil
}

// introspectToken is RFC 7662. Whatever is wrong with a token, the answer is
// the same.
func (s *server) introspectToken(r *request) (any, error) {
	c, err := s.keys.Load().verify(r.form.Get("token"), s.cfg.issuer)
	f, takes := facts{"active": false}, []origin{r.caller.origin}
	if err == nil && c.validAt(s.now()) == nil {
		f["active"], f["jti"], takes = true, c.ID, append(takes, c.origin())
	}
	lives, err := s.record(r, newEvent(tokenIntrospected, c.Subject, f), takes...)()
	if err != nil {
		return nil, err
	}
	if len(lives) < 2 || !lives[1].alive {
		return map[string]bool{"active": false}, nil
	}
	return struct {
		Active    bool   `json:"active"`
		TokenType string `json:"token_type"`
		claims
	}{true, "Bearer", c}, nil
}

// revokeToken is RFC 7009. What is no token of ours needs nothing. One that isn't
// valid for its time alone is revoked all the same, and that is kept for a day
// more than it is needed: a clock may be wrong, and be set right again.
func (s *server) revokeToken(r *request) (any, error) {
	c, err := s.keys.Load().verify(r.form.Get("token"), s.cfg.issuer)
	if err != nil {
		return struct{}{}, s.useUp(r)
	}
	useless := time.Unix(c.Expires, 0).Add(24 * time.Hour)
	e := newEvent(tokenRevoked, c.Subject, facts{"jti": c.ID})
	notYours := errForm.because("This token was issued to another client; to revoke it takes the scope agents:write.")
	err = s.change(r, c.Subject, func(ctx context.Context, tx pgx.Tx) (event, error) {
		may := r.caller
		if may.TokenID == "" { // a client may what its agent may now
			a, err := loadAgent(ctx, tx, may.AgentID)
			if err != nil {
				return event{}, err
			}
			may.scopes = a.Capabilities
		}
		if c.Subject != may.AgentID && !may.has(agentsWrite) {
			return event{}, notYours
		}
		done, err := tx.Exec(ctx, `
			insert into token_revocations (jti, expires_at)
			values ($1, $2)
			on conflict (jti) do nothing`, c.ID, useless)
		if err != nil {
			return event{}, fmt.Errorf("revoking: %w", err)
		}
		if done.RowsAffected() == 0 { // revoked before: nothing happens that would be an event
			return event{}, nil
		}
		return e, nil
	})
	if errors.Is(err, notYours) {
		err = s.refused(r, e, notYours)
	}
	return struct{}{}, err
}
