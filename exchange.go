package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// An agent that hands work on exchanges its token for one of the worker (RFC 8693), which
// says for ever on whose behalf it acts, reaches no farther than both, and is dead once
// anything that it came from is.

const maxDepth = 3 // who may act for a subject, one behind the other

// issueToken is POST /api/v1/token.
func (s *server) issueToken(r *request) (any, error) {
	check := s.checkGrant
	if r.form.Get("grant_type") == exchangeGrant {
		check = s.checkExchange
	}
	g, err := check(r)
	if err == nil {
		err = sayOfProof(errProof, s.bind(r, &g))
	}
	return s.issue(r, g, err)
}

// checkExchange decides what an exchanged token is to carry. The caller is the worker; or
// it is whom the subject_token was issued to, and brings a token of the worker along, whose
// scopes narrow too.
func (s *server) checkExchange(r *request) (g grant, err error) {
	if err = checkExchangeForm(r.form); err != nil {
		return g, err
	}
	subject, err := s.readParty(r, "subject_token")
	if err != nil {
		return g, err
	}
	r.tells = facts{"subject": subject.Subject, "subjectJti": subject.ID}
	g = grant{client: r.caller, subject: subject.Subject, chain: subject.origins(), end: subject.Expires, bound: subject.boundTo()}
	limits := [][]string{strings.Fields(subject.Scope)}
	if r.form.Get("actor_token") != "" {
		worker, err := s.readParty(r, "actor_token")
		switch {
		case err != nil:
		case r.caller.AgentID != subject.ClientID:
			err = errForm.because("An actor_token is brought by the client of the subject_token, and this is another.")
		case worker.Chain != nil || !slices.Contains(worker.Audience, s.cfg.issuer):
			err = errForm.because("The actor_token must be one that its client got for " + s.cfg.issuer + ", by no exchange.")
		default:
			g.client, err = s.loadClient(r.Context(), worker)
		}
		if err != nil {
			return g, err
		}
		r.tells["actor"], g.isBrought, g.key = worker.ClientID, true, worker.boundTo()
		g.chain, g.needs = append(g.chain, origin{TokenID: worker.ID}), []origin{worker.origin()} // its credential is the new token's
		if !slices.ContainsFunc(g.chain, func(o origin) bool { return o.CredentialID == r.caller.CredentialID }) {
			g.chain = append(g.chain, origin{CredentialID: r.caller.CredentialID, SecretID: r.caller.SecretID})
		}
		if end := r.caller.expiresAt; end != nil {
			g.end = min(g.end, end.Unix())
		}
		g.end, limits = min(g.end, worker.Expires), append(limits, strings.Fields(worker.Scope))
	}
	if g.actor, err = handOn(subject, g.client.AgentID); err != nil {
		return g, err
	}
	from, row := allowance{}, uint32(0)
	err = s.db.QueryRow(r.Context(), `select delegates, resources, proof_required, xmin from agents where agent_id = $1`, subject.Subject).
		Scan(&from.Delegates, &from.Resources, &g.proofRequired, &row)
	switch {
	case err != nil && !errors.Is(err, pgx.ErrNoRows):
		return g, fmt.Errorf("loading a subject: %w", err)
	case !slices.Contains(from.Delegates, g.client.AgentID):
		return g, errClientInactive.because("The agent " + subject.Subject + " has no delegate " + g.client.AgentID + "; an operator adds it to its delegates.")
	}
	g.rows = map[string]uint32{subject.Subject: row, g.client.AgentID: g.client.row}
	g.scope, err = exchangeScope(r.form.Get("scope"), append(limits, g.client.scopes))
	if err == nil {
		asked := slices.Concat(r.form["resource"], r.form["audience"]) // two names for one thing here (RFC 8693, section 2.1)
		g.audience, err = exchangeAudience(asked, subject.Audience, s.cfg.issuer, from.Resources, g.client.Resources)
	}
	return g, err
}

// checkExchangeForm refuses what RFC 8693, section 2.1, has and we don't.
func checkExchangeForm(form url.Values) error {
	for _, token := range []string{"subject_token", "actor_token", "requested_token"} {
		given := form.Get(token + "_type")
		if given != "" && given != accessTokenType || given == "" && form.Get(token) != "" {
			return errForm.because("The " + token + "_type must be " + accessTokenType + ".")
		}
	}
	if form.Get("actor_token_type") != "" && form.Get("actor_token") == "" {
		return errForm.because("There is an actor_token_type, and no actor_token.")
	}
	return checkNames(form, "aud", "resources", "scopes")
}

// bind decides to which key a token is bound: that of the proof; or where a worker's token
// was brought along, that of this one. No binding is dropped by an exchange.
func (s *server) bind(r *request, g *grant) error {
	proof, err := s.openProof(r, "", "")
	if err != nil {
		return err
	}
	shown := proof.thumbprint
	needed := shown != "" || g.bound != "" || g.proofRequired || g.client.ProofRequired
	if !g.isBrought {
		g.key = shown
	}
	switch {
	case g.isBrought && g.bound != "" && shown != g.bound:
		return flaw("must be there, in the header DPoP, and by the key that the subject_token is bound to")
	case g.isBrought && needed && g.key == "":
		return flaw("takes an actor_token that is bound to a key, to which the new token is bound")
	case needed && g.key == "":
		return flaw("must be there, in the header DPoP: an agent has proofRequired, or the subject_token is bound to a key")
	}
	proof.again = sayOfProof(errProof, replayed)
	r.caller.proof = proof
	return nil
}

// readParty reads a token of ours that is valid now. Whether it is alive shows when the
// new one is stored.
func (s *server) readParty(r *request, name string) (claims, error) {
	if r.form.Get(name) == "" {
		return claims{}, errForm.because("The body lacks " + name + "=TOKEN.")
	}
	c, err := s.readToken(r.form.Get(name))
	if err != nil {
		err = errForm.because("The " + name + " is " + err.Error() + ".")
	}
	return c, err
}

// loadClient is the client of a token, with all that a client has.
func (s *server) loadClient(ctx context.Context, c claims) (caller, error) {
	var o client
	err := s.db.QueryRow(ctx, `
		select `+clientColumns+`
		from credentials c
		join agents a on a.agent_id = c.client_id
		where c.credential_id = $1 and c.secret_id = $2`, c.CredentialID, c.SecretID).Scan(o.columns()...)
	switch {
	case errors.Is(err, pgx.ErrNoRows), err == nil && o.refusal() != nil:
		err = errForm.because("The actor_token has ended.")
	case err != nil:
		err = fmt.Errorf("loading a worker: %w", err)
	}
	return o.caller, err
}

// handOn puts an agent before those who acted for the subject so far.
func handOn(subject claims, to string) (*actor, error) {
	depth := 0
	for a := (&actor{subject.Subject, subject.Actor}); a != nil; a = a.Before {
		if depth++; a.Subject == to {
			return nil, errForm.because("The agent " + to + " is in the subject_token already, as sub or in act: it uses the token that it has.")
		}
	}
	if depth > maxDepth {
		return nil, errForm.because("The subject_token has been handed on three times, which is the most.")
	}
	return &actor{to, subject.Actor}, nil
}

// exchangeScope is what was asked for, or all that all of these lists have, without our
// own scopes, which nobody can hand on. To ask for more than that is refused.
func exchangeScope(asked string, lists [][]string) (string, error) {
	mayNot := func(scope string) bool {
		lacks := func(list []string) bool { return !covers(list, scope) }
		return slices.ContainsFunc(lists, lacks) || slices.Contains(ourScopes, scope)
	}
	if len(asked) > maxScope {
		return "", errScope.because("The scopes are too long together; ask for fewer, or for resource:*.")
	}
	granted := strings.Split(asked, " ")
	if asked == "" {
		granted = slices.DeleteFunc(slices.Concat(lists...), mayNot)
	}
	slices.Sort(granted)
	granted = slices.Compact(granted)
	if slices.ContainsFunc(granted, mayNot) { // and what is no name
		return "", errScope.because("The scope must be names separated by single spaces, each of the tokens' and of the worker's capabilities, and none of AgentIdP's own; it was '" + clip(asked) + "'.")
	}
	if len(granted) == 0 {
		return "", errScope.because("The tokens and the worker's capabilities have nothing in common that can be handed on.")
	}
	scope := strings.Join(granted, " ")
	if len(scope) > maxScope {
		return "", errScope.because("The scopes are too long together; ask for fewer, or for resource:*.")
	}
	return scope, nil
}

// exchangeAudience is what was asked for, or where the subject's token may go; but
// never us. Where that could go only to us, it has to be named. Allowed are the
// resources of both agents.
func exchangeAudience(asked []string, subject audience, issuer string, allowed ...[]string) (audience, error) {
	isUs := func(resource string) bool { return resource == issuer }
	bound := slices.DeleteFunc(slices.Clone(subject), isUs)
	aud := bound
	if strings.Join(asked, "") != "" {
		var err error
		if aud, err = grantAudience(asked, issuer, nil); err != nil {
			return nil, err
		}
	}
	if len(aud) == 0 {
		return nil, errResource.because("The subject_token is for AgentIdP alone; name by resource= where the new one is to go.")
	}
	for _, resource := range aud {
		reaches := func(list []string) bool { return len(list) == 0 || slices.Contains(list, resource) }
		if isUs(resource) || !reaches(bound) || !reaches(allowed[0]) || !reaches(allowed[1]) {
			return nil, errResource.because("The new token may not go to " + clip(resource) + ": that must be where the subject_token may go and both agents, and never AgentIdP.")
		}
	}
	return aud, nil
}
