package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"

	"github.com/modelcontextprotocol/go-sdk/oauthex"
	"github.com/zitadel/oidc/v3/pkg/client/rs"
	"github.com/zitadel/oidc/v3/pkg/client/tokenexchange"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"golang.org/x/oauth2"
)

const accessTokenType = "urn:ietf:params:oauth:token-type:access_token"

// Parties are an agent that hands work on, its delegates, and one that is none.
type parties struct {
	Orchestrator identity   `json:"orchestrator"`
	Workers      []identity `json:"workers"`
	Stranger     identity   `json:"stranger"`
}

func (w *world) parties(ctx context.Context) (p parties, err error) {
	p.Workers = make([]identity, 4)
	for _, a := range []struct {
		into         *identity
		capabilities []string
	}{
		{&p.Orchestrator, []string{"resumes:read", "resumes:write", "scores:write"}},
		{&p.Workers[0], []string{"resumes:*"}},
		{&p.Workers[1], []string{"resumes:read"}},
		{&p.Workers[2], []string{"resumes:*"}},
		{&p.Workers[3], []string{"resumes:*"}},
		{&p.Stranger, []string{"resumes:*"}},
	} {
		if *a.into, err = w.agent(ctx, a.capabilities...); err != nil {
			return p, err
		}
	}
	return p, w.delegate(ctx, p.Orchestrator, p.Workers...)
}

// delegate says who may act for an agent.
func (w *world) delegate(ctx context.Context, who identity, to ...identity) error {
	ids := []string{}
	for _, worker := range to {
		ids = append(ids, worker.ID)
	}
	body, _ := json.Marshal(map[string]any{"delegates": ids})
	return call(ctx, "PATCH", w.base+"/api/v1/agents/"+who.ID, w.bearer, "application/json", string(body), nil)
}

// A delegated is what introspection says of a token.
type delegated struct {
	Active          bool
	Sub, Aud, Scope string
	ClientID        string `json:"client_id"`
	Act             json.RawMessage
}

func (w *world) introspect(ctx context.Context, token string) (is delegated, err error) {
	form := url.Values{"token": {token}}.Encode()
	return is, call(ctx, "POST", w.base+"/api/v1/token/introspect", w.bearer, "application/x-www-form-urlencoded", form, &is)
}

// actedBy is the act of a token that these had, the last one first.
func actedBy(who ...identity) string {
	act := fmt.Sprintf(`{"sub":%q}`, who[len(who)-1].ID)
	for i := len(who) - 2; i >= 0; i-- {
		act = fmt.Sprintf(`{"sub":%q,"act":%s}`, who[i].ID, act)
	}
	return act
}

// An exchange is what is asked for: a token of who asks, made of subject.
type exchange struct{ subject, actor, scope, resource string }

// exchanges tries a client by which agents hand work on; refused reads its errors.
func (c client) exchanges(ctx context.Context, w *world, ask func(identity, exchange) (string, error), refused func(status int, code string) func(error) bool) {
	p, err := w.parties(ctx)
	if err != nil {
		c.checked("has agents", err)
		return
	}
	first, second, third := p.Workers[0], p.Workers[1], p.Workers[2]
	chain := func() (list []string, err error) {
		token, err := w.token(ctx, p.Orchestrator, url.Values{}) // for AgentIdP, so that resource has to say where
		for _, who := range []identity{first, second, third} {
			list = append(list, token)
			if err == nil {
				token, err = ask(who, exchange{subject: token, resource: resource})
			}
		}
		return append(list, token), err
	}
	one, err := chain()
	other, otherErr := chain()
	if !c.checked("trades a token, and that, and that", errors.Join(err, otherErr)) {
		return
	}
	for i, want := range []struct{ scope, act string }{
		{"resumes:read resumes:write", actedBy(first)},
		{"resumes:read", actedBy(second, first)},
		{"resumes:read", actedBy(third, second, first)},
	} {
		is, err := w.introspect(ctx, one[i+1])
		if err == nil && (is.Sub != p.Orchestrator.ID || is.ClientID != p.Workers[i].ID || is.Aud != resource || is.Scope != want.scope || string(is.Act) != want.act) {
			err = fmt.Errorf("it is %+v, want %+v for %s by %s", is, want, p.Orchestrator.ID, p.Workers[i].ID)
		}
		c.checked(fmt.Sprintf("has a token that says who acts for whom, %d behind", i+1), err)
	}
	for _, bad := range []struct {
		what   string
		who    identity
		asked  exchange
		status int
		code   string
	}{
		{"who is no delegate", p.Stranger, exchange{subject: one[0], resource: resource}, 403, "unauthorized_client"},
		{"a fourth", p.Workers[3], exchange{subject: one[3], resource: resource}, 400, "invalid_request"},
		{"who has handed on", first, exchange{subject: one[2], resource: resource}, 400, "invalid_request"},
		{"a scope that the worker lacks", first, exchange{subject: one[0], resource: resource, scope: "scores:write"}, 400, "invalid_scope"},
		{"a scope that was narrowed away", third, exchange{subject: one[2], resource: resource, scope: "resumes:write"}, 400, "invalid_scope"},
		{"another service", second, exchange{subject: one[1], resource: "https://payroll.example.com"}, 400, "invalid_target"},
		{"our own API", first, exchange{subject: one[0], resource: w.base}, 400, "invalid_target"},
		{"garbage", first, exchange{subject: "x", resource: resource}, 400, "invalid_request"},
		{"a wrong secret", identity{first.ID, second.Secret}, exchange{subject: one[0], resource: resource}, 401, "invalid_client"},
	} {
		_, err := ask(bad.who, bad.asked)
		c.refuses(bad.what, err, refused(bad.status, bad.code))
	}
	active := func(want string) error {
		got := ""
		for _, token := range slices.Concat(one, other) {
			is, err := w.introspect(ctx, token)
			if err != nil {
				return err
			}
			got += map[bool]string{true: "+", false: "-"}[is.Active]
		}
		if got != want {
			return fmt.Errorf("of two chains %s are active, want %s", got, want)
		}
		return nil
	}
	if err = w.revoke(ctx, p.Orchestrator, one[0]); err == nil {
		err = active("----++++")
	}
	c.checked("has no token left of a chain whose first was revoked", err)
	_, err = ask(second, exchange{subject: one[1], resource: resource})
	c.refuses("one of that chain", err, refused(400, "invalid_request"))
	if err = w.revoke(ctx, second, other[2]); err == nil {
		err = active("----++--")
	}
	c.checked("has those before one that was revoked", err)
}

// tryZitadelExchange sends each parameter that it hasn't got as an empty one.
func tryZitadelExchange(ctx context.Context, w *world, c client) {
	ask := func(who identity, x exchange) (string, error) {
		client, err := tokenexchange.NewTokenExchangerClientCredentials(ctx, w.base, who.ID, who.Secret)
		if err != nil {
			return "", err
		}
		var actorType oidc.TokenType
		if x.actor != "" {
			actorType = oidc.AccessTokenType
		}
		var scopes []string
		if x.scope != "" {
			scopes = []string{x.scope}
		}
		got, err := tokenexchange.ExchangeToken(ctx, client, x.subject, oidc.AccessTokenType, x.actor, actorType, []string{x.resource}, nil, scopes, "")
		if err != nil {
			return "", err
		}
		if got.IssuedTokenType != oidc.AccessTokenType || got.TokenType != "Bearer" || got.ExpiresIn == 0 {
			err = fmt.Errorf("the answer is a %s token of the type %s for %d s", got.TokenType, got.IssuedTokenType, got.ExpiresIn)
		}
		return got.AccessToken, err
	}
	c.exchanges(ctx, w, ask, func(_ int, code string) func(error) bool {
		return func(err error) bool {
			e, ok := errors.AsType[*oidc.Error](err)
			return ok && string(e.ErrorType) == code && e.Description != ""
		}
	})

	// By the orchestrator, with the worker's token. The library reads act.
	p, err := w.parties(ctx)
	service, serviceErr := w.agent(ctx, "tokens:read")
	subject, subjectErr := w.token(ctx, p.Orchestrator, url.Values{"resource": {resource}})
	actor, actorErr := w.token(ctx, p.Workers[0], url.Values{"scope": {"resumes:read"}})
	server, serverErr := rs.NewResourceServerClientCredentials(ctx, w.base, service.ID, service.Secret)
	if err := errors.Join(err, serviceErr, subjectErr, actorErr, serverErr); err != nil {
		c.checked("has agents and tokens", err)
		return
	}
	asked := exchange{subject: subject, actor: actor, resource: resource, scope: "resumes:read"}
	token, err := ask(p.Orchestrator, asked)
	c.checked("trades by actor_token", err)
	is, err := rs.Introspect[*oidc.IntrospectionResponse](ctx, server, token)
	if err == nil && (is.Subject != p.Orchestrator.ID || is.ClientID != p.Workers[0].ID || is.Actor == nil || is.Actor.Subject != p.Workers[0].ID) {
		err = fmt.Errorf("it reads %+v", is)
	}
	c.checked("reads who acts for whom", err)
	_, err = ask(p.Workers[1], asked)
	c.refuses("an actor_token that another brings", err, saying("invalid_request"))
	if err = w.revoke(ctx, p.Workers[0], actor); err == nil {
		is, err = rs.Introspect[*oidc.IntrospectionResponse](ctx, server, token)
	}
	if err == nil && is.Active {
		err = errors.New("it is active")
	}
	c.checked("is told that it has ended with the actor_token", err)
}

// tryMCPExchange is the exchange that the SDK has, which always says an audience beside the resource.
func tryMCPExchange(ctx context.Context, w *world, c client) {
	c.exchanges(ctx, w, func(who identity, x exchange) (string, error) {
		q := &oauthex.TokenExchangeRequest{
			RequestedTokenType: accessTokenType, SubjectToken: x.subject, SubjectTokenType: accessTokenType, Audience: x.resource, Resource: x.resource,
		}
		if x.scope != "" {
			q.Scope = []string{x.scope}
		}
		got, err := oauthex.ExchangeToken(ctx, w.base+"/api/v1/token", q,
			&oauthex.ClientCredentials{ClientID: who.ID, ClientSecretAuth: &oauthex.ClientSecretAuth{ClientSecret: who.Secret}}, http.DefaultClient)
		if err != nil {
			return "", err
		}
		if issued := got.Extra("issued_token_type"); !got.Valid() || got.Type() != "Bearer" || issued != accessTokenType {
			err = fmt.Errorf("the answer is a %s token of the type %v that ends %v", got.Type(), issued, got.Expiry)
		}
		return got.AccessToken, err
	}, func(status int, code string) func(error) bool {
		return func(err error) bool {
			e, ok := errors.AsType[*oauth2.RetrieveError](err)
			return ok && e.Response.StatusCode == status && e.ErrorCode == code && e.ErrorDescription != ""
		}
	})
}
