package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// A token may be bound to a key, so that only its holder can use it (DPoP, RFC 9449):
// with each request comes a proof, which that key has signed for this request alone.

const proofPast = 60 * time.Second // that a proof is good after its iat; before it clockSkew

// openProof returns the proof of a request, which shows this token that is bound to this key,
// or asks for one and both are "" (RFC 9449, section 4.3). It fails with a flaw. Its htu is
// compared with the URL that ISSUER makes, since the client writes the Host.
func (s *server) openProof(r *request, token, bound string) (p shownProof, err error) {
	values := r.Header.Values("DPoP")
	if len(values) == 0 {
		return p, nil
	}
	a, err := readAssertion(strings.Join(values, ", ")) // of which two are none
	if err != nil {
		return p, err
	}
	ath := sha256.Sum256([]byte(token))
	iat, hasIat := a.claims["iat"].(float64)
	now := float64(s.now().UnixMilli()) / 1000
	switch {
	case !strings.EqualFold(a.typ, "dpop+jwt"):
		return p, flaw("must have the typ dpop+jwt")
	case a.claims["htm"] != r.Method:
		return p, flaw("must have the htm " + clip(r.Method) + ", the method of the request")
	case !isURL(a.claims["htu"], s.cfg.issuer+r.URL.Path):
		return p, flaw("must have the htu " + s.cfg.issuer + r.URL.Path + ", the URL of the request")
	case !hasIat || iat < now-proofPast.Seconds() || iat > now+clockSkew:
		return p, flaw(fmt.Sprintf("must have as its iat the time at which it was made, in seconds since 1970, no longer than %v ago; it is %.0f here", proofPast, now))
	case a.id == "":
		return p, flaw("must have a jti, a text of at most 512 bytes")
	case token != "" && a.claims["ath"] != b64.EncodeToString(ath[:]):
		return p, flaw("must have as its ath the SHA-256 of the token, in base64url")
	}
	members, _ := a.header["jwk"].(map[string]any)
	key, err := readJWK(members)
	if members["alg"] == nil && key.Kty == "RSA" && a.alg == "PS256" { // a key that doesn't say is for both
		key.Alg = a.alg
	}
	if len(key.N) > 683 { // in base64url; anybody has us verify by such a key, before any limit
		err = errors.New("must have an n of at most 4096 bits")
	}
	switch {
	case err != nil:
		return p, flaw("must have in its header the jwk of the key that has signed it, which " + err.Error())
	case bound != "" && key.thumbprint() != bound: // as if there were none
		return p, nil
	case !key.verifies(a):
		return p, flaw("must be signed by the key of its jwk, by one of " + strings.Join(assertionAlgs, ", "))
	}
	return shownProof{key.thumbprint(), a.id, time.Unix(int64(iat), 0).Add(proofPast), nil, false}, nil
}

// isURL tells whether these are one URL, but for a query and a fragment (RFC 9449, section
// 4.3; RFC 3986, sections 6.2.2.1 and 6.2.3).
func isURL(htu any, want string) bool {
	plain := func(v any) string {
		u, err := url.Parse(fmt.Sprint(v))
		if err != nil || u.User != nil {
			return ""
		}
		scheme, host := strings.ToLower(u.Scheme), strings.ToLower(u.Host)
		host = strings.TrimSuffix(host, map[string]string{"https": ":443", "http": ":80"}[scheme])
		return scheme + "://" + host + u.EscapedPath()
	}
	return plain(htu) == plain(want)
}

// storeProof has PostgreSQL remember a proof where Redis can't be asked. What only one of them
// knows may be used once more, until it is too old.
func (s *server) storeProof(ctx context.Context, p shownProof) (state string, err error) {
	sum := p.digest()
	stored, err := s.db.Exec(ctx, `
		insert into token_revocations (jti, expires_at)
		values ($1, $2)
		on conflict (jti) do nothing`, uuid([16]byte(sum[:16]), 8), p.end.Add(clockTrust+time.Minute))
	if err != nil {
		return "", fmt.Errorf("storing a proof: %w", err)
	}
	if stored.RowsAffected() == 0 {
		return "used", nil
	}
	return "unlimited", nil
}

// prove refuses a bound token without a proof by its key, and another one behind DPoP.
func (s *server) prove(r *request, token string, c claims) (p shownProof, err error) {
	key := c.boundTo()
	switch {
	case key == "" && r.presents("DPoP"):
		return p, errInvalidToken.because("This is a token that is bound to no key; it goes behind Bearer.")
	case key == "":
		return p, nil
	case !r.presents("DPoP"):
		return p, errUnproved.because("This is a token that is bound to a key; it goes behind DPoP, with a proof beside it.")
	}
	if p, err = s.openProof(r, token, key); err == nil && p.thumbprint != key {
		err = flaw("must be there, in the header DPoP, and by the key that the token is bound to")
	}
	p.again = sayOfProof(errWrongProof, replayed)
	return p, sayOfProof(errWrongProof, err)
}

// sayOfProof says what is wrong with one.
func sayOfProof(as *problem, err error) error {
	if fault, ok := errors.AsType[flaw](err); ok {
		return as.because("The DPoP proof " + string(fault) + ".")
	}
	return err
}
