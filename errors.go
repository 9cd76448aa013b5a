package main

import (
	"strings"
)

// A problem is an error that the caller may read. This list is every one that
// we send. One without an OAuth code must not reach a token endpoint.
type problem struct {
	status  int
	code    string
	oauth   string
	message string // printable ASCII without quotes and backslashes (RFC 6749, section 5.2)
	details map[string]any
	scope   string // that was missing
	bound   bool   // what was shown is good for the holder of a key (RFC 9449, section 7.1)
}

func (p *problem) Error() string { return p.code + ": " + p.message }

func (p problem) because(message string) *problem {
	p.message = message
	return &p
}

func (p problem) with(details map[string]any) *problem {
	p.details = details
	return &p
}

var (
	errValidation = &problem{status: 400, code: "VALIDATION_ERROR", message: "The request has faults, which details names."}
	errTwoMethods = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_request", message: "This is authenticated twice. Send one Authorization header, or client_id and client_secret in the body, or a client_assertion there."}
	errForm       = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_request", message: "The form has faults."}
	errGrantType  = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "unsupported_grant_type", message: "The grant_type must be client_credentials."}
	errScope      = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_scope", message: "The scope has faults."}
	errResource   = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_target", message: "A resource must be an absolute URI without a fragment."}
	errProof      = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_dpop_proof", message: "The DPoP proof is not right."}
	errNoRedirect = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "unsupported_response_type", message: "There is no authorization endpoint here; agents use grant_type=client_credentials at POST /api/v1/token."}
	errRetention  = &problem{status: 400, code: "RETENTION_WINDOW_EXCEEDED", message: "The audit log is not served that far back; details.oldest is the limit."}
	errNoPlace    = &problem{status: 400, code: "LOG_PLACE_UNKNOWN", message: "The log has no such place: nobody was given it, or the log was brought back from a backup. Keep what you have, and begin again."}

	errNoToken        = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "The header Authorization: Bearer TOKEN is needed, or DPoP TOKEN for one that is bound to a key, with a token from POST /api/v1/token; not in the URL, and by no other scheme."}
	errInvalidToken   = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_token", message: "The token is revoked, or its credential is, or its agent is not active."}
	errUnproved       = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_token", message: "The token is bound to a key.", bound: true}
	errWrongProof     = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_dpop_proof", message: "The DPoP proof is not right.", bound: true}
	errNoClient       = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "Client authentication is needed: HTTP Basic, or in the body client_id and client_secret, or a client_assertion; not in the URL, and by no other scheme."}
	errBadClient      = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "The client_id (an agentId) is unknown, or its client_secret (sk_live_ and 64 hex digits) is wrong, revoked or expired."}
	errBadAssertion   = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "No active key of this client has signed the client_assertion."}
	errBadGrant       = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_grant", message: "The assertion is not right."}
	errClientInactive = &problem{status: 403, code: "AGENT_NOT_ACTIVE", oauth: "unauthorized_client", message: "The agent is not active."}
	errQuota          = &problem{status: 403, code: "FREE_TIER_LIMIT_EXCEEDED", oauth: "unauthorized_client", message: "The monthly quota is spent."}
	errForbidden      = &problem{status: 403, code: "FORBIDDEN", oauth: "insufficient_scope", message: "The token does not allow this."}
	errNotActive      = &problem{status: 403, code: "AGENT_NOT_ACTIVE", message: "The agent is not active."}
	errAgentLimit     = &problem{status: 403, code: "FREE_TIER_LIMIT_EXCEEDED", message: "No more agents can be registered; decommission one first."}

	errNotFound     = &problem{status: 404, code: "NOT_FOUND", oauth: "invalid_request", message: "There is nothing at this path; /openapi.yaml lists those that there are."}
	errNoAgent      = &problem{status: 404, code: "AGENT_NOT_FOUND", message: "No agent has this id; ids are UUIDs in lower case."}
	errNoCredential = &problem{status: 404, code: "CREDENTIAL_NOT_FOUND", message: "The agent has no credential of this id; ids are UUIDs in lower case."}
	errNoEvent      = &problem{status: 404, code: "AUDIT_EVENT_NOT_FOUND", message: "No event has this id, a UUID in lower case, or it is older than what is served."}
	errMethod       = &problem{status: 405, code: "METHOD_NOT_ALLOWED", oauth: "invalid_request", message: "The methods of this path are in the Allow header."}

	errAgentExists       = &problem{status: 409, code: "AGENT_ALREADY_EXISTS", message: "An agent with this email is registered, if only as decommissioned: an email is never free again."}
	errLastManager       = &problem{status: 409, code: "AGENT_IS_LAST_MANAGER", message: "Nobody could manage agents then: this is the last active one with agents:write that has a credential. Give both to another agent first; a secret that is out is ended by rotating it."}
	errDecommissioned    = &problem{status: 409, code: "AGENT_ALREADY_DECOMMISSIONED", message: "The agent is decommissioned, which is final."}
	errKeyTaken          = &problem{status: 409, code: "KEY_ALREADY_REGISTERED", message: "This key is that of an active credential already; each credential wants a key of its own."}
	errCredentialRevoked = &problem{status: 409, code: "CREDENTIAL_ALREADY_REVOKED", message: "The credential is revoked, which is final."}

	errTooLarge       = &problem{status: 413, code: "PAYLOAD_TOO_LARGE", oauth: "invalid_request", message: "The body is longer than 16 kB."}
	errMediaType      = &problem{status: 415, code: "UNSUPPORTED_MEDIA_TYPE", message: "The Content-Type must be application/json."}
	errRateLimited    = &problem{status: 429, code: "RATE_LIMIT_EXCEEDED", oauth: "temporarily_unavailable", message: "Too many requests of this client; Retry-After says when to come back."}
	errAddressLimited = &problem{status: 429, code: "RATE_LIMIT_EXCEEDED", oauth: "temporarily_unavailable", message: "Too many failed authentications from this address; Retry-After says when to come back."}

	errInternal    = &problem{status: 500, code: "INTERNAL_SERVER_ERROR", oauth: "server_error", message: "Something went wrong here."}
	errStopping    = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "This copy is stopping; use another."}
	errBusy        = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "Too many requests at once; try again."}
	errClock       = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "The clocks of this copy and of PostgreSQL are too far apart."}
	errUnavailable = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "A store does not answer; nothing was acknowledged. Try again."}
)

// clip makes a piece of a request fit for an error message, which never repeats
// a secret or a token.
func clip(s string) string {
	if strings.Contains(s, "sk_live_") || strings.Contains(s, "eyJ") {
		return "[secret]"
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' || c == '\\' {
			return '?'
		}
		return c
	}, strings.ReplaceAll(s[:min(len(s), 100)], `"`, "'"))
}
