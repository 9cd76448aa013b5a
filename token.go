package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	exchangeGrant   = "urn:ietf:params:oauth:grant-type:token-exchange" // RFC 8693, section 2.1
	accessTokenType = "urn:ietf:params:oauth:token-type:access_token"   // section 3
)

// A grant is what a token is to carry, and to whom it is issued.
type grant struct {
	client   caller
	scope    string
	audience audience
	subject  string            // whom it acts for
	rows     map[string]uint32 // of the agents that it was decided by, as they were read
	actor    *actor            // of one that acts for another, as all that follows
	chain    []origin          // the tokens that it comes from
	needs    []origin          // what must be alive beside that and the caller
	end      int64             // seconds since 1970, which it must not outlive; 0 is none

	key           string // the thumbprint of the one that it is bound to; "" is none
	bound         string // that of a token which it comes from
	isBrought     bool   // by a token of its client that another brings along, of which key is
	proofRequired bool   // by the agent that it acts for
}

// issue counts a request for a token, and issues it unless that is bad.
func (s *server) issue(r *request, g grant, bad error) (any, error) {
	now := s.now()
	month := monthKey(g.client.AgentID, now)
	if bad != nil {
		g.client = r.caller
	}
	if bad != nil || s.quotaOf(g.client) == 0 {
		month = "" // spends nothing of the quota
	}
	counted, err := s.spend(r, g.client, byCredential, month)
	if err != nil {
		return nil, err
	}
	if bad != nil {
		return nil, bad
	}
	c := s.claimsOf(g, now)
	f := facts{"jti": c.ID, "credentialId": c.CredentialID, "scope": c.Scope, "exp": c.Expires}
	if c.ClientID != r.caller.AgentID {
		f["requestedBy"] = facts{"agentId": r.caller.AgentID, "credentialId": r.caller.CredentialID}
		if r.caller.proved != nil {
			f["requestedBy"].(facts)["workload"] = r.caller.proved
		}
	}
	if c.Audience[0] != s.cfg.issuer || len(c.Audience) > 1 {
		f["aud"] = c.Audience
	}
	if c.Key != nil {
		f["jkt"] = c.Key.Thumbprint
	}
	if c.Actor != nil {
		f["subject"], f["act"], f["chain"] = c.Subject, c.Actor, c.Chain
	}
	e := newEvent(tokenIssued, c.ClientID, f)
	e.ActorID = e.AgentID
	stored := s.record(r, entry{event: e, needs: slices.Concat([]origin{r.caller.origin}, g.needs, g.chain), rows: g.rows}) // goes on while we sign
	token, err := s.keys.Load().sign(accessToken, c)
	if _, storeErr := stored(); storeErr != nil || err != nil {
		if counted {
			s.redis.giveBack(r.Context(), month)
		}
		return nil, errors.Join(storeErr, err)
	}
	s.meter.add(1, "agentidp_tokens_issued_total", "")
	answer := tokenAnswer{token, "", c.kind(), c.Expires - now.Unix(), c.Scope}
	if c.Actor != nil {
		answer.IssuedType = accessTokenType
	}
	return answer, nil
}

// A tokenAnswer is that of RFC 6749, section 5.1, and RFC 8693, section 2.2.1.
type tokenAnswer struct {
	AccessToken string `json:"access_token"`
	IssuedType  string `json:"issued_token_type,omitempty"` // of one that came by exchange
	TokenType   string `json:"token_type"`
	ExpiresIn   int64  `json:"expires_in"` // seconds
	Scope       string `json:"scope"`
}

// claimsOf are those of a token that is issued now.
func (s *server) claimsOf(g grant, now time.Time) claims {
	c := claims{
		Issuer: s.cfg.issuer, Subject: g.subject, Audience: g.audience, ClientID: g.client.AgentID, Scope: g.scope,
		ID: s.newID(), IssuedAt: now.Unix(), Expires: now.Add(s.cfg.tokenTTL).Unix(),
		CredentialID: g.client.CredentialID, SecretID: g.client.SecretID, Actor: g.actor, Chain: g.chain,
	}
	if own := g.client.TokenTTL; own != nil {
		c.Expires = now.Unix() + int64(*own)
	}
	if end := g.client.expiresAt; end != nil { // no token outlives its credential
		c.Expires = min(c.Expires, end.Unix())
	}
	if g.end != 0 {
		c.Expires = min(c.Expires, g.end)
	}
	if g.key != "" {
		c.Key = &holder{g.key}
	}
	return c
}

// checkGrant decides what a token is to carry by the client credentials grant (RFC 6749,
// section 4.4), or by that of a workload.
func (s *server) checkGrant(r *request) (g grant, err error) {
	switch grant := r.form.Get("grant_type"); {
	case grant == "client_credentials", s.tradesAssertion(r):
	case grant == "":
		return g, errForm.because("The body lacks grant_type=client_credentials.")
	default:
		return g, errGrantType.because("The grant_type must be client_credentials or " + exchangeGrant + "; it was '" + clip(r.form.Get("grant_type")) + "'.")
	}
	if err = checkNames(r.form, "audience", "aud", "resources", "scopes"); err != nil {
		return g, err
	}
	g = grant{client: r.caller, subject: r.caller.AgentID, rows: r.caller.rows()}
	if g.scope, err = grantScope(r.form.Get("scope"), r.caller.scopes); err != nil {
		return g, err
	}
	g.audience, err = grantAudience(r.form["resource"], s.cfg.issuer, r.caller.Resources)
	return g, err
}

// checkNames refuses those that would silently get more than was asked for; others are
// ignored (RFC 6749, section 3.2).
func checkNames(form url.Values, wrong ...string) error {
	for _, name := range wrong {
		right := "resource (RFC 8707)"
		if name == "scopes" {
			right = "scope"
		}
		if form.Get(name) != "" {
			return errForm.because("There is no parameter " + name + "; it is called " + right + ".")
		}
	}
	return nil
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
		if !slices.Contains(granted, scope) && covers(capabilities, scope) {
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

// covers tells whether these capabilities have a scope, or all of its resource.
func covers(capabilities []string, scope string) bool {
	resource, _, _ := strings.Cut(scope, ":")
	return slices.Contains(capabilities, scope) || slices.Contains(capabilities, resource+":*") && capabilityPattern.MatchString(scope)
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
	c, err := s.readToken(r.form.Get("token"))
	f, asks := facts{"active": false}, []origin(nil)
	if err == nil {
		f["active"], f["jti"], asks = true, c.ID, c.origins()
	}
	found, err := s.record(r, entry{event: newEvent(tokenIntrospected, c.ClientID, f), needs: []origin{r.caller.origin}, rows: r.caller.rows(), asks: asks})()
	if err != nil {
		return nil, err
	}
	if asks == nil || !found.active {
		return map[string]bool{"active": false}, nil
	}
	return struct {
		Active    bool   `json:"active"`
		TokenType string `json:"token_type"`
		claims
	}{true, c.kind(), c}, nil
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
	e := newEvent(tokenRevoked, c.ClientID, facts{"jti": c.ID, "exp": c.Expires})
	notYours := errForm.because("This token was issued to another client; to revoke it takes the scope agents:write.")
	err = s.change(r, c.ClientID, func(ctx context.Context, tx pgx.Tx) (event, error) {
		may := r.caller
		if may.TokenID == "" { // a client may what its agent may now
			a, err := loadAgent(ctx, tx, may.AgentID)
			if err != nil {
				return event{}, err
			}
			may.scopes = a.Capabilities
		}
		if c.ClientID != may.AgentID && !may.has(agentsWrite) {
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
	if errors.Is(err, notYours) && r.caller.TokenID == "" { // what one may is in no limit's way, this is
		_, limited := s.spend(r, r.caller, byCredential, "")
		err = cmp.Or(limited, err)
	}
	if errors.Is(err, notYours) {
		err = s.refused(r, e, notYours)
	}
	return struct{}{}, err
}
