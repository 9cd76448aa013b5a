package test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"math/big"
	"net/url"
	"testing"
	"time"
)

// Clients that prove themselves by what they sign with a key of their own, in place of a secret.

const assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

// members are those of a JSON object.
type members map[string]any

func (m members) with(more members) members {
	all := maps.Clone(m)
	maps.Copy(all, more)
	return all
}

func (m members) without(name string) members {
	less := maps.Clone(m)
	delete(less, name)
	return less
}

func (m members) String() string {
	b, err := json.Marshal(map[string]any(m))
	if err != nil {
		panic(err)
	}
	return string(b)
}

// A holder is a client's key with its private half.
type holder struct {
	alg     string
	private crypto.Signer
	jwk     members
}

func newHolder(t testing.TB, alg string) holder {
	t.Helper()
	var private crypto.Signer
	var err error
	switch alg {
	case "RS256", "PS256":
		private, err = rsa.GenerateKey(rand.Reader, 2048)
	case "ES256":
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	default:
		_, private, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	return holder{alg, private, publicJWK(private.Public()).with(members{"alg": alg})}
}

func publicJWK(public crypto.PublicKey) members {
	number := base64.RawURLEncoding.EncodeToString
	switch public := public.(type) {
	case *rsa.PublicKey:
		return members{"kty": "RSA", "n": number(public.N.Bytes()), "e": number(big.NewInt(int64(public.E)).Bytes())}
	case *ecdsa.PublicKey:
		point, _ := public.Bytes()
		half := (len(point) - 1) / 2
		return members{"kty": "EC", "crv": public.Params().Name, "x": number(point[1 : 1+half]), "y": number(point[1+half:])}
	case ed25519.PublicKey:
		return members{"kty": "OKP", "crv": "Ed25519", "x": number(public)}
	}
	return nil
}

// sign signs with the holder's own algorithm, whatever the header says.
func (h holder) sign(header, claims members) string {
	signed := encode(header.String()) + "." + encode(claims.String())
	return signed + "." + base64.RawURLEncoding.EncodeToString(h.signature(signed))
}

func (h holder) signature(signed string) (sig []byte) {
	digest := sha256.Sum256([]byte(signed))
	var err error
	switch key := h.private.(type) {
	case *rsa.PrivateKey:
		if h.alg == "PS256" {
			sig, err = rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			sig, err = rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
		}
	case *ecdsa.PrivateKey:
		r, s, signErr := ecdsa.Sign(rand.Reader, key, digest[:])
		size := (key.Params().BitSize + 7) / 8
		sig, err = append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...), signErr
	case ed25519.PrivateKey:
		sig = ed25519.Sign(key, []byte(signed))
	}
	if err != nil {
		panic(err)
	}
	return sig
}

// header and claims are those of an assertion that is right, for this service.
func (h holder) header() members { return members{"alg": h.alg, "typ": "JWT"} }

func (v *service) assertionClaims(clientID string) members {
	now := time.Now().Unix()
	return members{"iss": clientID, "sub": clientID, "aud": v.env["ISSUER"], "jti": newID(), "iat": now, "exp": now + 60}
}

func (v *service) assertion(h holder, clientID string) string {
	return h.sign(h.header(), v.assertionClaims(clientID))
}

// byAssertion posts a form with an assertion; path is below /api/v1/token.
func (v *service) byAssertion(path, assertion string, more ...string) answer {
	v.t.Helper()
	form := url.Values{"client_assertion_type": {assertionType}, "client_assertion": {assertion}}
	if path == "" {
		form.Set("grant_type", "client_credentials")
	}
	for i := 0; i < len(more); i += 2 {
		form.Set(more[i], more[i+1])
	}
	return v.do("POST", "/api/v1/token"+path, form.Encode(), "Content-Type", "application/x-www-form-urlencoded")
}

// register gives an agent a key as a credential.
func (v *service) register(agentID string, jwk members) answer {
	v.t.Helper()
	return v.api(v.bearer, "POST", "/agents/"+agentID+"/credentials", members{"publicKey": jwk}.String())
}

// newKeyClient is an agent whose one credential is a key.
func (v *service) newKeyClient(alg string, capabilities ...string) (id, credentialID string, h holder) {
	v.t.Helper()
	id, h = v.newAgent(capabilities...), newHolder(v.t, alg)
	return id, v.want(v.register(id, h.jwk), 201, "").text("credentialId"), h
}

func TestKeysAreAsGoodAsSecrets(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for _, alg := range []string{"RS256", "PS256", "ES256", "EdDSA", "Ed25519"} {
		t.Run(alg, func(t *testing.T) {
			id, credentialID, h := v.newKeyClient(alg, tokensRead, "a:b")
			a := v.want(v.byAssertion("", v.assertion(h, id), "scope", "a:b", "client_id", id), 200, "")
			token := a.text("access_token")
			if a.text("scope") != "a:b" || !v.active(token) {
				t.Errorf("the token of %v is not as it should be", a)
			}
			c := v.want(v.byAssertion("/introspect", v.assertion(h, id), "token", token), 200, "")
			if c.text("credential_id") != credentialID || c.text("sub") != id {
				t.Errorf("the token is of another credential: %v", c)
			}
			v.want(v.byAssertion("/revoke", v.assertion(h, id), "token", token), 200, "")
			if v.active(token) {
				t.Error("the revoked token is active")
			}
		})
	}
}
