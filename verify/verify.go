// Package verify is for services that agents call: it verifies access tokens of AgentIdP (RFC 9068) by its published keys.
//
//	v, err := verify.New("https://idp.example.com", "https://resumes.example.com")
//	http.Handle("GET /resumes", v.Middleware("resumes:read")(resumes))
//
// By itself it can't see revocations. A token that was revoked, or whose credential or agent was cut off, is accepted until it
// expires: have the operator set a short TOKEN_TTL, ask POST /api/v1/token/introspect about each token, or read what
// was cut off and look for that in Claims.All (docs/developers/revocations.md).
package verify

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxToken  = 15 << 10        // bytes; AgentIdP makes none that is longer
	maxKeys   = 256 << 10       // bytes of the document that has them
	leeway    = 60              // seconds that iat and nbf may be ahead of our clock; exp has none
	fetchTime = 5 * time.Second // from the beginning of one fetch of the keys to that of the next, and until it is given up
	keysFresh = 5 * time.Minute // at most; the next key is published for so long before it signs
	keysLast  = 24 * time.Hour  // beyond that, where no others can be had: no token lives longer
)

// A Verifier verifies tokens of one issuer for one service. Many goroutines may use it at once.
type Verifier struct {
	Client           *http.Client // fetches the keys, and follows no redirect; may be replaced before the first token comes
	Proof            Proof        // nil where the service checks none: tokens that are bound to a key are refused
	issuer, audience string
	address          *http.Request // of the keys

	mu       sync.Mutex
	keys     map[[2]string]key // by alg and kid: the key decides the algorithm (RFC 8725, section 3.1)
	fresh    time.Time         // until then only a token whose key is not there has them fetched
	tried    time.Time         // when the last fetch began
	failed   error             // why that has
	fetching chan struct{}     // closed when the one under way is over; nil where there is none
}

// A Proof fails, with a Refusal where it is bad, if a request has no proof of the key with this thumbprint, and of the token, that
// came for the first time (RFC 9449, section 4.3). It may be set before the first token comes.
type Proof func(r *http.Request, token, thumbprint string) error

// A key tells whether a signature is its own, of what has this digest.
type key func(digest, sig []byte) bool

// New makes a Verifier of an issuer's URL, the operator's ISSUER, and of that of the service, which agents ask for as
// resource (RFC 8707, section 2). Who can change what comes from the issuer can make tokens, so let it be https.
func New(issuer, audience string) (*Verifier, error) {
	q, err := http.NewRequest("GET", issuer+"/.well-known/jwks.json", nil)
	if err != nil || q.URL.Scheme != "https" && q.URL.Scheme != "http" || q.URL.Host == "" || q.URL.User != nil ||
		strings.ContainsAny(issuer, `?#"\ `) || strings.HasSuffix(issuer, "/") || audience == "" {
		return nil, errors.New("verify: New wants URLs, the issuer's without user, query, fragment, and slash at the end")
	}
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Verifier{Client: &http.Client{CheckRedirect: stay}, issuer: issuer, audience: audience, address: q}, nil
}

// Claims are what a token says (RFC 9068, section 2.2).
type Claims struct {
	Subject  string // the agent on whose behalf
	ClientID string // the agent that shows it: another one where it acts for that (RFC 8693)
	ID       string // of the token, as in the audit log
	Scopes   []string
	Expires  time.Time
	Key      string         // thumbprint of the one whose holder alone may show it (RFC 9449, section 6.1), "" if anyone may
	All      map[string]any // as it is in the token, with act and chain
}

// Has tells whether the token has a scope. As AgentIdP has it, scores:* covers scores:write.
func (c Claims) Has(scope string) bool {
	resource, _, two := strings.Cut(scope, ":")
	return slices.Contains(c.Scopes, scope) || two && slices.Contains(c.Scopes, resource+":*")
}

type contextKey struct{}

// FromContext returns the claims of a request that Middleware let through; else zero ones: nobody's, without a scope.
func FromContext(ctx context.Context) Claims {
	claims, _ := ctx.Value(contextKey{}).(Claims)
	return claims
}

// Middleware lets requests through that have a token with all of these scopes in their Authorization header (RFC 6750,
// section 2.1), and Proof of one that is bound to a key. It answers others: 401, or 403 where a scope is missing (section 3),
// and 503 where Verify or Proof can't tell.
func (v *Verifier) Middleware(scopes ...string) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
			token = strings.TrimLeft(token, " ")
			claims, err := v.Verify(r.Context(), token)
			byProof := v.Proof != nil && strings.EqualFold(scheme, "DPoP")
			status, kind, code := http.StatusUnauthorized, "Bearer", "invalid_token"
			if byProof || claims.Key != "" {
				kind = "DPoP"
			}
			if err == nil && byProof != (claims.Key != "") { // RFC 9449, section 7.2
				err = Refusal("A token that is bound to a key comes by DPoP and with a proof, and others by Bearer.")
			} else if err == nil && byProof {
				code, err = "invalid_dpop_proof", v.Proof(r, token, claims.Key)
			}
			refusal, refused := errors.AsType[Refusal](err)
			challenge := fmt.Sprintf("%s realm=%q", kind, v.audience)
			switch {
			case !byProof && !strings.EqualFold(scheme, "Bearer"): // nothing was tried, so nothing is wrong with it
			case refused:
				challenge += fmt.Sprintf(`, error=%q, error_description=%q`, code, refusal)
			case err != nil:
				w.Header().Set("Retry-After", "5")
				http.Error(w, "Tokens can't be verified now; try again.", http.StatusServiceUnavailable)
				return
			case slices.ContainsFunc(scopes, func(s string) bool { return !claims.Has(s) }):
				status = http.StatusForbidden
				challenge += fmt.Sprintf(`, error="insufficient_scope", scope=%q`, strings.Join(scopes, " "))
			default:
				next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), contextKey{}, claims)))
				return
			}
			w.Header().Set("WWW-Authenticate", challenge)
			http.Error(w, challenge, status)
		})
	}
}

// A Refusal is why a token is not accepted. Who has sent the token may read it.
type Refusal string

func (r Refusal) Error() string { return string(r) }

// Verify returns what a token says (RFC 9068, section 4), a Refusal, or for want of keys or of time another error. It sees no
// request: where Proof is set, who calls it must hold Claims.Key to a proof, as Middleware does.
func (v *Verifier) Verify(ctx context.Context, token string) (Claims, error) {
	header64, rest, _ := strings.Cut(token, ".")
	payload64, sig64, _ := strings.Cut(rest, ".")
	var h, c object
	// Extensions that we don't know must be refused (RFC 7515, section 4.1.11).
	if len(token) > maxToken || json.Unmarshal(decode(header64), &h) != nil || h.text("typ") != "at+jwt" || h["crit"] != nil {
		return Claims{}, Refusal("This is no access token.")
	}
	good, err := v.key(ctx, [2]string{h.text("alg"), h.text("kid")})
	if err != nil {
		return Claims{}, err
	}
	if digest := sha256.Sum256([]byte(header64 + "." + payload64)); !good(digest[:], decode(sig64)) {
		return Claims{}, Refusal("The signature of the token is wrong.")
	}
	err = json.Unmarshal(decode(payload64), &c)
	expires, _ := c["exp"].(float64) // seconds since 1970
	issued, ok := c["iat"].(float64)
	begins, limited := c["nbf"].(float64)
	ok = err == nil && ok && (limited || c["nbf"] == nil)
	cnf, _ := c["cnf"].(map[string]any)
	bound := object(cnf).text("jkt")
	several, _ := c["aud"].([]any) // one is a string (RFC 7519, section 4.1.3)
	switch now := float64(time.Now().Unix()); {
	case !ok || c.text("iss") != v.issuer || c.text("sub") == "" || c.text("client_id") == "" || c.text("jti") == "":
		return Claims{}, Refusal("The token is of another issuer, or lacks claims.")
	case c["cnf"] != nil && (bound == "" || len(cnf) != 1 || v.Proof == nil):
		return Claims{}, Refusal("The token is bound to a key, which this service doesn't check; ask for one that isn't.")
	case !slices.Contains(append(several, c["aud"]), any(v.audience)):
		return Claims{}, Refusal("The token is for another service; ask for one with this one's URL as resource.")
	case expires <= now || issued > now+leeway || begins > now+leeway:
		return Claims{}, Refusal("The token has expired, or its time has not come.")
	}
	scopes, end := strings.Fields(c.text("scope")), time.Unix(int64(min(expires, 1<<53)), 0)
	return Claims{Subject: c.text("sub"), ClientID: c.text("client_id"), ID: c.text("jti"), Scopes: scopes, Expires: end, Key: bound, All: c}, nil
}

// An object is one of JSON. It has names as they are, where a struct would take EXP for exp.
type object map[string]any

func (o object) text(name string) string { s, _ := o[name].(string); return s }

// decode returns nil where s isn't the one encoding of something: Go's decoder skips newlines, and spare bits.
func decode(s string) []byte {
	if b, err := base64.RawURLEncoding.DecodeString(s); err == nil && base64.RawURLEncoding.EncodeToString(b) == s {
		return b
	}
	return nil
}

// key finds a key. Only who needs one that isn't there waits for the issuer, and all do after a long pause.
func (v *Verifier) key(ctx context.Context, name [2]string) (key, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	if (v.keys[name] == nil || now.After(v.fresh)) && v.fetching == nil && now.Sub(v.tried) >= fetchTime {
		v.tried, v.fetching = now, make(chan struct{})
		go v.fetch()
	}
	if done := v.fetching; done != nil && (v.keys[name] == nil || now.After(v.fresh.Add(keysLast)) || v.failed == nil && now.After(v.fresh.Add(keysFresh))) {
		v.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
		}
		v.mu.Lock()
	}
	if k := v.keys[name]; k != nil && now.Before(v.fresh.Add(keysLast)) {
		return k, nil
	} else if err := errors.Join(ctx.Err(), v.failed); err != nil {
		return nil, err
	}
	return nil, Refusal("The issuer publishes no key of the token's kid and alg.")
}

// fetch is nobody's request, so that none that is given up takes the keys from others.
func (v *Verifier) fetch() {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTime)
	defer cancel()
	keys, seconds := map[[2]string]key{}, uint32(keysFresh/time.Second)
	answer, err := v.Client.Do(v.address.Clone(ctx))
	if err == nil {
		defer answer.Body.Close()
		var set struct{ Keys []object }
		err = json.NewDecoder(http.MaxBytesReader(nil, answer.Body, maxKeys)).Decode(&set)
		for _, k := range set.Keys {
			if public := k.key(); public != nil { // others are passed over (RFC 7517, section 5)
				keys[[2]string{k.text("alg"), k.text("kid")}] = public
			}
		}
		if err != nil || answer.StatusCode != http.StatusOK || len(keys) == 0 {
			err = fmt.Errorf("%s answered %s with %d keys for RS256 or ES256, %v", v.address.URL, answer.Status, len(keys), err)
		}
		_, age, _ := strings.Cut(answer.Header.Get("Cache-Control"), "max-age=") // RFC 9111, section 5.2.2.1
		fmt.Sscan(age, &seconds)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if (err == nil) != (v.failed == nil) {
		slog.Warn("verify: fetching keys", "well", err == nil, "error", err)
	}
	if v.failed = err; err == nil {
		v.keys, v.fresh = keys, v.tried.Add(min(time.Duration(seconds)*time.Second, keysFresh))
	}
	close(v.fetching)
	v.fetching = nil
}

// key is that of a JWK, nil if it is not for RS256 or ES256 (RFC 7518, sections 3 and 6).
func (o object) key() key {
	n, e := new(big.Int).SetBytes(decode(o.text("n"))), new(big.Int).SetBytes(decode(o.text("e")))
	x, y := decode(o.text("x")), decode(o.text("y"))
	point, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y)) // fails off the curve
	switch kind := o.text("kty") + " " + o.text("crv") + " " + o.text("alg"); {
	case o.text("kid") == "" || o["use"] != nil && o["use"] != "sig":
	case kind == "RSA  RS256" && n.BitLen() >= 2048 && n.BitLen() <= 8192 && e.BitLen() > 16 && e.BitLen() < 32:
		public := &rsa.PublicKey{N: n, E: int(e.Int64())}
		return func(digest, sig []byte) bool { return rsa.VerifyPKCS1v15(public, crypto.SHA256, digest, sig) == nil }
	case kind == "EC P-256 ES256" && len(x) == 32 && err == nil:
		return func(digest, sig []byte) bool {
			half := new(big.Int).Rsh(point.Params().N, 1) // with s, -s is good too; AgentIdP writes the lesser
			return len(sig) == 64 && new(big.Int).SetBytes(sig[32:]).Cmp(half) <= 0 &&
				ecdsa.Verify(point, digest, new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:]))
		}
	}
	return nil
}
