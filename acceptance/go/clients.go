package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/MicahParks/keyfunc/v3"
	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/golang-jwt/jwt/v5"
	"github.com/lestrrat-go/httprc/v3"
	"github.com/lestrrat-go/jwx/v3/jwk"
	jwxt "github.com/lestrrat-go/jwx/v3/jwt"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

func tryOAuth2(ctx context.Context, w *world, c client) {
	who, err := w.agent(ctx, "resumes:read", "agents:read")
	if err != nil {
		c.checked("has an agent", err)
		return
	}
	// refusedAs wants an error of the token endpoint, read as x/oauth2 does.
	refusedAs := func(status int, code string) func(error) bool {
		return func(err error) bool {
			e, ok := errors.AsType[*oauth2.RetrieveError](err)
			return ok && e.Response.StatusCode == status && e.ErrorCode == code && e.ErrorDescription != ""
		}
	}
	for _, style := range []struct {
		name  string
		style oauth2.AuthStyle
	}{
		{"Basic", oauth2.AuthStyleInHeader},
		{"the form", oauth2.AuthStyleInParams},
		{"auto-detection", oauth2.AuthStyleAutoDetect},
	} {
		cfg := clientcredentials.Config{
			ClientID: who.ID, ClientSecret: who.Secret, TokenURL: w.base + "/api/v1/token", AuthStyle: style.style,
			Scopes: []string{"resumes:read", "resumes:write"}, EndpointParams: url.Values{"resource": {resource}},
		}
		t, err := cfg.Token(ctx)
		if err == nil {
			left := time.Until(t.Expiry)
			if !t.Valid() || t.Type() != "Bearer" || left < 50*time.Minute || left > 61*time.Minute {
				err = fmt.Errorf("got a %q token that is good for %v, want Bearer and an hour", t.Type(), left)
			}
			if scope := t.Extra("scope"); err == nil && scope != "resumes:read" {
				err = fmt.Errorf("got the scope %v, want what of those asked for it may do", scope)
			}
		}
		c.checked("gets a token, by "+style.name, err)
		cfg.ClientSecret = w.admin.Secret
		_, err = cfg.Token(ctx)
		c.refuses("a wrong secret, by "+style.name, err, refusedAs(401, "invalid_client"))
	}

	password := oauth2.Config{ClientID: who.ID, ClientSecret: who.Secret, Endpoint: oauth2.Endpoint{
		TokenURL: w.base + "/api/v1/token", AuthStyle: oauth2.AuthStyleInHeader}}
	_, err = password.PasswordCredentialsToken(ctx, "someone", "secret")
	c.refuses("a grant that isn't there", err, refusedAs(400, "unsupported_grant_type"))

	cfg := clientcredentials.Config{ClientID: who.ID, ClientSecret: who.Secret, TokenURL: w.base + "/api/v1/token"}
	t, err := cfg.Token(ctx)
	if !c.checked("gets a token for the service's own API", err) {
		return
	}
	api := oauth2.NewClient(ctx, oauth2.StaticTokenSource(t))
	get := func(want int) error {
		answer, err := api.Get(w.base + "/api/v1/agents")
		if err == nil {
			answer.Body.Close()
			if answer.StatusCode != want {
				err = fmt.Errorf("the API answers %s, want %d", answer.Status, want)
			}
		}
		return err
	}
	c.checked("calls the API with it", get(http.StatusOK))
	if err = w.revoke(ctx, who, t.AccessToken); err == nil {
		err = get(http.StatusUnauthorized)
	}
	c.checked("is refused by the API once it is revoked", err)
}

func tryGoOIDC(ctx context.Context, w *world, c client) {
	t, err := w.tokensFor(ctx, resource)
	if err != nil {
		c.checked("has tokens", err)
		return
	}
	reasons := map[string]func(error) bool{
		"an expired token": func(err error) bool { _, ok := errors.AsType[*oidc.TokenExpiredError](err); return ok },
		"a wrong issuer":   saying("different provider"),
		"a wrong audience": saying("expected audience"),
		"a wrong key":      saying("failed to verify signature"),
		"an unknown key":   saying("failed to verify signature"),
		"a changed scope":  saying("failed to verify signature"),
	}
	verifier := func(v *oidc.IDTokenVerifier) func(string) error {
		return func(token string) error { _, err := v.Verify(ctx, token); return err }
	}

	keys := oidc.NewRemoteKeySet(ctx, w.base+"/.well-known/jwks.json")
	c.verifies(t, verifier(oidc.NewVerifier(w.base, keys, &oidc.Config{ClientID: resource})), reasons)

	provider, err := oidc.NewProvider(ctx, w.base)
	if c.checked("discovers the service", err) {
		if got := provider.Endpoint().TokenURL; got != w.base+"/api/v1/token" {
			err = fmt.Errorf("the token endpoint is %q", got)
		}
		c.checked("finds the token endpoint", err)
		discovered := client{c.report, c.name + ", discovery"}
		discovered.verifies(t, verifier(provider.Verifier(&oidc.Config{ClientID: resource})), reasons)
	}
	_, err = oidc.NewProvider(ctx, w.base+"/")
	c.refuses("an issuer that differs by a slash", err, saying("did not match the issuer"))
}

func tryKeyfunc(ctx context.Context, w *world, c client) {
	t, err := w.tokensFor(ctx, resource)
	if err != nil {
		c.checked("has tokens", err)
		return
	}
	keys, err := keyfunc.NewDefaultCtx(ctx, []string{w.base + "/.well-known/jwks.json"})
	if !c.checked("reads the keys", err) {
		return
	}
	verify := func(token string) error {
		_, err := jwt.Parse(token, keys.Keyfunc, jwt.WithValidMethods([]string{"RS256"}), jwt.WithIssuer(w.base),
			jwt.WithAudience(resource), jwt.WithExpirationRequired(), jwt.WithIssuedAt())
		return err
	}
	c.checked("passes over cnf, which tokens.md says", verify(t.Bound))
	c.verifies(t, verify, map[string]func(error) bool{
		"an expired token": being(jwt.ErrTokenExpired),
		"a wrong issuer":   being(jwt.ErrTokenInvalidIssuer),
		"a wrong audience": being(jwt.ErrTokenInvalidAudience),
		"a wrong key":      being(jwt.ErrTokenSignatureInvalid),
		"an unknown key":   being(jwt.ErrTokenUnverifiable),
		"a changed scope":  being(jwt.ErrTokenSignatureInvalid),
	})
}

func tryJWX(ctx context.Context, w *world, c client) {
	t, err := w.tokensFor(ctx, resource)
	if err != nil {
		c.checked("has tokens", err)
		return
	}
	cache, err := jwk.NewCache(ctx, httprc.NewClient())
	if err == nil {
		err = cache.Register(ctx, w.base+"/.well-known/jwks.json")
	}
	var keys jwk.Set
	if err == nil {
		keys, err = cache.CachedSet(w.base + "/.well-known/jwks.json")
	}
	if !c.checked("reads the keys", err) {
		return
	}
	key, _ := keys.Key(0)
	use, _ := key.KeyUsage()
	if use != "sig" {
		err = fmt.Errorf("the use of the key is %q", use)
	}
	c.checked("finds a key whose use is to sign", err)
	c.verifies(t, func(token string) error {
		_, err := jwxt.ParseString(token, jwxt.WithKeySet(keys), jwxt.WithIssuer(w.base), jwxt.WithAudience(resource),
			jwxt.WithRequiredClaim("jti"), jwxt.WithRequiredClaim("client_id"))
		return err
	}, map[string]func(error) bool{
		"an expired token": being(jwxt.TokenExpiredError()),
		"a wrong issuer":   being(jwxt.InvalidIssuerError()),
		"a wrong audience": being(jwxt.InvalidAudienceError()),
		"a wrong key":      saying("could not verify message"),
		"an unknown key":   saying("failed to find key", "key provider"),
		"a changed scope":  saying("could not verify message"),
	})
}
