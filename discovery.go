package main

import _ "embed"

// showKeys is RFC 7517. A key has to be published for as long as this answer
// may be cached before it signs.
func (s *server) showKeys(r *request) (any, error) {
	r.out.Set("Cache-Control", "public, max-age=300")
	return map[string]any{"keys": s.keys.Load().jwks()}, nil
}

// showMetadata is RFC 8414. Response types, challenge methods and the
// authorization endpoint, which refuses, are there for client libraries that
// don't accept a server without; subject types and the algorithms of ID tokens,
// of which there are none, for those that expect OpenID Connect.
func (s *server) showMetadata(r *request) (any, error) {
	r.out.Set("Cache-Control", "public, max-age=300")
	issuer, methods := s.cfg.issuer, []string{"client_secret_basic", "client_secret_post", "private_key_jwt"}
	grants := []string{"client_credentials", exchangeGrant}
	if len(*s.issuers.Load()) > 0 {
		grants = append(grants, jwtBearerGrant)
	}
	metadata := map[string]any{
		"issuer":                                issuer,
		"authorization_endpoint":                issuer + "/api/v1/authorize",
		"token_endpoint":                        issuer + "/api/v1/token",
		"introspection_endpoint":                issuer + "/api/v1/token/introspect",
		"revocation_endpoint":                   issuer + "/api/v1/token/revoke",
		"jwks_uri":                              issuer + "/.well-known/jwks.json",
		"grant_types_supported":                 grants,
		"response_types_supported":              []string{"none"},
		"code_challenge_methods_supported":      []string{"S256"},
		"scopes_supported":                      ourScopes,
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": s.keys.Load().each("alg"),
		"dpop_signing_alg_values_supported":     assertionAlgs,
	}
	for _, endpoint := range []string{"token", "introspection", "revocation"} {
		metadata[endpoint+"_endpoint_auth_methods_supported"] = methods
		metadata[endpoint+"_endpoint_auth_signing_alg_values_supported"] = assertionAlgs
	}
	return metadata, nil
}

// showResource describes our own API as one that takes our tokens (RFC 9728,
// section 2).
func (s *server) showResource(r *request) (any, error) {
	r.out.Set("Cache-Control", "public, max-age=300")
	return map[string]any{
		"resource": s.cfg.issuer, "authorization_servers": []string{s.cfg.issuer}, "jwks_uri": s.cfg.issuer + "/.well-known/jwks.json",
		"scopes_supported": ourScopes, "bearer_methods_supported": []string{"header"},
		"dpop_signing_alg_values_supported": assertionAlgs,
	}, nil
}

//go:embed openapi.yaml
var openAPI []byte

// showOpenAPI describes all routes to programs, in the form of RFC 9512.
func showOpenAPI(r *request) (any, error) {
	r.out.Set("Content-Type", "application/yaml")
	r.out.Set("Cache-Control", "public, max-age=300")
	return openAPI, nil
}

// showLife says that the process runs, whatever the stores do.
func showLife(*request) (any, error) {
	return map[string]string{"status": "ok", "version": version()}, nil
}

// showHealth tells what requests and the keeper have found within the last
// second, so that asking costs nothing.
func (s *server) showHealth(r *request) (any, error) {
	word := map[bool]string{true: "up", false: "down"}
	h := map[string]any{"version": version(), "services": map[string]string{
		"postgres": word[s.postgres.well()], "redis": word[s.redis.well()],
	}}
	switch {
	case s.draining.Load():
		return nil, errStopping.with(h)
	case !s.postgres.well():
		return nil, errUnavailable.with(h)
	case s.clockDistance().Abs() > clockTrust:
		return nil, errClock.with(h)
	}
	h["status"] = map[bool]string{true: "ok", false: "degraded"}[s.redis.well()]
	return h, nil
}
