package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/auth/extauth"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/modelcontextprotocol/go-sdk/oauthex"
)

// tryMCP is the Model Context Protocol end to end: a client that knows only the
// URL of a server and has credentials is sent to the service by a 401, finds
// its endpoints, gets a token and calls a tool. The server introspects, as the
// SDK's own example does, so that it sees revocations.
func tryMCP(ctx context.Context, w *world, c client) {
	agent, err := w.agent(ctx, "resumes:read")
	if err != nil {
		c.checked("has an agent", err)
		return
	}
	service, err := w.agent(ctx, "tokens:read")
	if err != nil {
		c.checked("has a client that may introspect", err)
		return
	}
	base, err := mcpServer(w, service)
	if err != nil {
		c.checked("has a server", err)
		return
	}

	call := func(who identity, issuer string) error {
		handler, err := extauth.NewClientCredentialsHandler(&extauth.ClientCredentialsHandlerConfig{
			Credentials: &oauthex.ClientCredentials{
				ClientID: who.ID, ClientSecretAuth: &oauthex.ClientSecretAuth{ClientSecret: who.Secret}, Issuer: issuer,
			},
		})
		if err != nil {
			return err
		}
		session, err := mcp.NewClient(&mcp.Implementation{Name: "acceptance", Version: "1"}, nil).Connect(ctx,
			&mcp.StreamableClientTransport{Endpoint: base + "/mcp", OAuthHandler: handler}, nil)
		if err != nil {
			return err
		}
		defer session.Close()
		result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: "whoami"})
		if err != nil {
			return err
		}
		if text, ok := result.Content[0].(*mcp.TextContent); !ok || text.Text != who.ID {
			return fmt.Errorf("the tool says %v, want the agent's id", result.Content)
		}
		return nil
	}
	c.checked("is sent to the service, gets a token, calls a tool", call(agent, w.base))
	c.refuses("a wrong secret", call(identity{agent.ID, w.admin.Secret}, w.base), saying("invalid_client"))
	c.refuses("another issuer than its credentials are for", call(agent, "https://login.example.com"), saying("does not match"))

	t, err := w.tokensFor(ctx, base+"/mcp")
	if err != nil {
		c.checked("has tokens", err)
		return
	}
	server := client{c.report, c.name + ", server"}
	ask := func(token string) (int, string, error) {
		r, err := http.NewRequestWithContext(ctx, "POST", base+"/mcp", strings.NewReader(
			`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},`+
				`"clientInfo":{"name":"acceptance","version":"1"}}}`))
		if err != nil {
			return 0, "", err
		}
		r.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			return 0, "", err
		}
		answer.Body.Close()
		return answer.StatusCode, answer.Header.Get("WWW-Authenticate"), nil
	}
	server.guards(t, abilities{types: true, revocations: true}, func(token string) (int, error) {
		status, challenge, err := ask(token)
		if err == nil && status == 401 && !strings.Contains(challenge, "resource_metadata=") {
			err = fmt.Errorf("the challenge is %q, want it to name the metadata", challenge)
		}
		return status, err
	})
}

func mcpServer(w *world, service identity) (string, error) {
	mux := http.NewServeMux()
	base, err := listen(mux)
	if err != nil {
		return "", err
	}
	server := mcp.NewServer(&mcp.Implementation{Name: "resumes", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "whoami"}, func(ctx context.Context, r *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: r.Extra.TokenInfo.UserID}}}, nil, nil
	})
	metadata := base + "/.well-known/oauth-protected-resource"
	mux.Handle("/.well-known/oauth-protected-resource", auth.ProtectedResourceMetadataHandler(&oauthex.ProtectedResourceMetadata{
		Resource: base + "/mcp", AuthorizationServers: []string{w.base}, ScopesSupported: []string{"resumes:read"},
	}))
	verify := func(ctx context.Context, token string, _ *http.Request) (*auth.TokenInfo, error) {
		var is struct {
			Active     bool
			Scope, Sub string
			Exp        int64
			Aud, Cnf   any
		}
		err := call(ctx, "POST", w.base+"/api/v1/token/introspect", service.ID+":"+service.Secret,
			"application/x-www-form-urlencoded", url.Values{"token": {token}}.Encode(), &is)
		if err != nil {
			return nil, err
		}
		// The client of this SDK asks for no resource, so its tokens are for the issuer.
		// And it checks no proofs, so it takes no token that is bound to a key.
		if aud, _ := is.Aud.(string); !is.Active || is.Cnf != nil || !slices.Contains([]string{base + "/mcp", w.base}, aud) {
			return nil, auth.ErrInvalidToken
		}
		return &auth.TokenInfo{Scopes: strings.Fields(is.Scope), Expiration: time.Unix(is.Exp, 0), UserID: is.Sub}, nil
	}
	mux.Handle("/mcp", auth.RequireBearerToken(verify, &auth.RequireBearerTokenOptions{
		ResourceMetadataURL: metadata, Scopes: []string{"resumes:read"},
	})(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil)))
	return base, nil
}

// Abilities of a resource server that not all have.
type abilities struct {
	types       bool // looks at the typ of a token
	revocations bool // asks the service about each token
}

// guards tries a resource server.
func (c client) guards(t tokens, can abilities, ask func(token string) (status int, err error)) {
	try := func(what, token string, allowed ...int) {
		status, err := ask(token)
		if err == nil && !slices.Contains(allowed, status) {
			err = fmt.Errorf("it answers %d, want %d", status, allowed)
		}
		c.checked(what, err)
	}
	try("lets a good token in", t.Good, 200)
	try("lets one in that only we signed, as a control", t.Forged, 200)
	try("refuses no token", "", 401)
	try("refuses garbage", "x", 401)
	try("refuses an expired token", t.Expired, 401)
	try("refuses a wrong issuer", t.WrongIssuer, 401, 403)     // Apache looks at claims
	try("refuses a wrong audience", t.WrongAudience, 401, 403) // to authorize
	try("refuses a wrong key", t.WrongKey, 401)
	try("refuses an unknown key", t.UnknownKey, 401)
	try("refuses a changed scope", t.Tampered, 401)
	try("refuses a token without the scope", t.Unscoped, 403)
	try("refuses a bound token by Bearer", t.Bound, 401, 403)
	if can.types {
		try("refuses a wrong type", t.WrongType, 401)
	}
	if can.revocations {
		try("refuses a revoked token", t.Revoked, 401)
		if err := t.revoke(t.Good); err != nil {
			c.checked("has its good token revoked", err)
			return
		}
		try("refuses the good token once it is revoked", t.Good, 401)
	}
}
