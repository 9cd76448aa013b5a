package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// An agent that hands work on exchanges its token for one of the worker (RFC 8693), which
// says for ever on whose behalf it acts, reaches no farther than both, and is dead once
// anything that it came from is.

const (
	exchangeGrant = "urn:ietf:params:oauth:grant-type:token-exchange"
	maxDepth      = 3 // who may act for a subject, one behind the other
)

// grantToken is POST /api/v1/token.
func (s *server) grantToken(r *request) (any, error) {
	if r.form.Get("grant_type") != exchangeGrant {
		return s.issueToken(r)
	}
	subject, needs, bad := s.checkParties(r)
	if bad != nil {
		return s.issue(r, grant{}, bad)
	}
	g := grant{subject: subject.Subject, actor: &actor{r.caller.AgentID, subject.Actor}, chain: withToken(needs), needs: needs, end: subject.Expires}
	from, err := loadAgent(r.Context(), s.db, subject.Subject)
	switch {
	case err != nil && !errors.Is(err, errNoAgent):
		return nil, err
	case !slices.Contains(from.Delegates, r.caller.AgentID):
		bad = errClientInactive.because("The agent " + subject.Subject + " has no delegate " + r.caller.AgentID + "; an operator adds it to its delegates.")
	}
	if bad == nil {
		g.scope, bad = exchangeScope(r.form.Get("scope"), strings.Fields(subject.Scope), r.caller.scopes)
	}
	if bad == nil {
		g.audience, bad = exchangeAudience(r.form["resource"], subject.Audience, s.cfg.issuer, from.Resources, r.caller.Resources)
	}
	return s.issue(r, g, bad)
}

// checkParties returns the token of the subject. The caller is the worker, or becomes it
// by the token that it brings along of that: then it must be whom the subject's token
// was issued to. Needs are what must be alive beside the caller.
func (s *server) checkParties(r *request) (subject claims, needs []origin, err error) {
	form := r.form
	for name, want := range map[string]string{"subject_token_type": accessTokenType, "requested_token_type": accessTokenType, "actor_token_type": accessTokenType} {
		given, needed := form.Get(name), name != "requested_token_type" && form.Get(strings.TrimSuffix(name, "_type")) != ""
		if given != "" && given != want || needed && given == "" {
			return subject, nil, errForm.because("The " + name + " must be " + want + ".")
		}
	}
	if form.Get("actor_token_type") != "" && form.Get("actor_token") == "" {
		return subject, nil, errForm.because("There is an actor_token_type, and no actor_token.")
	}
	for _, name := range []string{"audience", "aud", "resources", "scopes"} {
		if form.Get(name) != "" {
			return subject, nil, errForm.because("There is no parameter " + name + " here; take resource and scope.")
		}
	}
	if subject, err = s.readParty(form.Get("subject_token"), "subject_token"); err != nil {
		return subject, nil, err
	}
	needs = subject.origins()
	if text := form.Get("actor_token"); text != "" {
		worker, err := s.readParty(text, "actor_token")
		if err == nil && r.caller.AgentID != subject.ClientID {
			err = errForm.because("An actor_token is brought by the client of the subject_token, and this is another.")
		}
		if err == nil && (worker.Chain != nil || !slices.Contains(worker.Audience, s.cfg.issuer)) {
			err = errForm.because("The actor_token must be one that its client got for " + s.cfg.issuer + ", by no exchange.")
		}
		if err != nil {
			return subject, nil, err
		}
		needs = append(needs, origin{TokenID: worker.ID}, r.caller.origin) // its credential is that of the new token
		subject.Expires = min(subject.Expires, worker.Expires)
		if err := s.become(r, worker); err != nil {
			return subject, nil, err
		}
	}
	involved := []string{subject.Subject}
	depth := 1
	for a := subject.Actor; a != nil; a = a.Before {
		involved, depth = append(involved, a.Subject), depth+1
	}
	if slices.Contains(involved, r.caller.AgentID) {
		return subject, nil, errForm.because("The agent " + r.caller.AgentID + " would act for itself, or for whom it has handed on to.")
	}
	if depth > maxDepth {
		return subject, nil, errForm.because("The subject_token has been handed on three times, which is the most.")
	}
	return subject, needs, nil
}

// readParty reads a token of ours that is valid now. Whether it is alive shows when the
// new one is stored.
func (s *server) readParty(text, name string) (claims, error) {
	if text == "" {
		return claims{}, errForm.because("The body lacks " + name + "=TOKEN.")
	}
	c, err := s.keys.Load().verify(text, s.cfg.issuer)
	if err == nil {
		err = c.validAt(s.now())
	}
	if err != nil {
		return claims{}, errForm.because("The " + name + " is " + err.Error() + ".")
	}
	return c, nil
}

// become makes the caller the client of a token, with all that a client has.
func (s *server) become(r *request, c claims) error {
	var o client
	err := s.db.QueryRow(r.Context(), `
		select `+clientColumns+`
		from credentials c
		join agents a on a.agent_id = c.client_id
		where c.credential_id = $1 and c.secret_id = $2`, c.CredentialID, c.SecretID).Scan(o.columns()...)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && o.refusal() != nil {
		return errForm.because("The actor_token has ended.")
	}
	if err != nil {
		return fmt.Errorf("loading a worker: %w", err)
	}
	o.use = r.caller.use
	r.caller = o.caller
	return nil
}

// withToken are those that are tokens.
func withToken(list []origin) []origin {
	return slices.DeleteFunc(slices.Clone(list), func(o origin) bool { return o.TokenID == "" })
}

// exchangeScope is what was asked for, or all that both have, without our own scopes,
// which nobody can hand on. To ask for more than that is refused.
func exchangeScope(asked string, subject, worker []string) (string, error) {
	mayNot := func(scope string) bool {
		return !covers(subject, scope) || !covers(worker, scope) || slices.Contains(ourScopes, scope)
	}
	granted := slices.DeleteFunc(slices.Concat(subject, worker), mayNot)
	if asked != "" {
		granted = strings.Split(asked, " ")
	}
	if slices.ContainsFunc(granted, mayNot) { // and what is no name
		return "", errScope.because("The scope must be names separated by single spaces, each of the subject_token's and of the worker's capabilities, and none of AgentIdP's own; it was '" + clip(asked) + "'.")
	}
	if len(granted) == 0 {
		return "", errScope.because("The subject_token and the worker's capabilities have nothing in common that can be handed on.")
	}
	slices.Sort(granted)
	scope := strings.Join(slices.Compact(granted), " ")
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
