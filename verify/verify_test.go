package verify

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const (
	issuerURL = "https://idp.example.com"
	service   = "https://resumes.example.com"
)

// An issuer answers for its keys without a network, so that time in a test can be synctest's.
type issuer struct {
	mu     sync.Mutex
	keys   []jwk
	raw    string // in place of the keys, if it isn't empty
	status int    // 0 is 200
	header map[string]string
	down   bool
	slow   time.Duration
	asked  atomic.Int64
}

func (i *issuer) RoundTrip(q *http.Request) (*http.Response, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.asked.Add(1)
	if slow := i.slow; slow > 0 {
		i.mu.Unlock()
		select {
		case <-time.After(slow):
		case <-q.Context().Done():
		}
		i.mu.Lock()
	}
	if err := q.Context().Err(); err != nil || i.down {
		return nil, errors.Join(err, errors.New("no way there"))
	}
	w := httptest.NewRecorder()
	for name, value := range i.header {
		w.Header().Set(name, value)
	}
	if q.URL.String() != issuerURL+"/.well-known/jwks.json" || q.Method != "GET" {
		w.WriteHeader(404)
	} else if i.status != 0 {
		w.WriteHeader(i.status)
	}
	if i.raw != "" {
		w.WriteString(i.raw)
	} else {
		json.NewEncoder(w).Encode(map[string]any{"keys": i.keys})
	}
	return w.Result(), nil
}

func (i *issuer) count() int { return int(i.asked.Load()) }

func (i *issuer) change(to func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	to()
}

// want fails the test where the issuer was asked for its keys another number of times.
func (i *issuer) want(t *testing.T, asked int) {
	t.Helper()
	synctest.Wait()
	if n := i.count(); n != asked {
		t.Fatalf("the issuer was asked for its keys %d times, want %d", n, asked)
	}
}

func newVerifier(t *testing.T, keys ...jwk) (*Verifier, *issuer) {
	t.Helper()
	v, err := New(issuerURL, service)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{keys: keys, header: map[string]string{"Cache-Control": "public, max-age=300"}}
	v.Client.Transport = i
	return v, i
}

// A signer is a key of an issuer.
type signer struct {
	crypto.Signer
	jwk jwk
}

func encode[T string | []byte](s T) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func newSigner(kid string, key crypto.Signer) signer {
	k := jwk{Kid: kid, Use: "sig"}
	switch public := key.Public().(type) {
	case *rsa.PublicKey:
		k.Kty, k.Alg, k.N, k.E = "RSA", "RS256", encode(public.N.Bytes()), encode(big.NewInt(int64(public.E)).Bytes())
	case *ecdsa.PublicKey:
		point, _ := public.Bytes()
		k.Kty, k.Alg, k.Crv, k.X, k.Y = "EC", "ES256", "P-256", encode(point[1:33]), encode(point[33:])
	}
	return signer{key, k}
}

func makeRSA(kid string, bits int) func() signer {
	return sync.OnceValue(func() signer {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			panic(err)
		}
		return newSigner(kid, key)
	})
}

func makeEC(kid string) func() signer {
	return sync.OnceValue(func() signer {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		return newSigner(kid, key)
	})
}

var (
	rsaKey, nextRSA = makeRSA("rsa", 2048), makeRSA("next", 2048)
	ecKey, nextEC   = makeEC("ec"), makeEC("next-ec")
	smallRSA        = makeRSA("small", 1024)
)

// A jwk is a key as it is published.
type jwk struct{ Kty, Use, Alg, Kid, Crv, N, E, X, Y string }

// MarshalJSON leaves out what is empty.
func (k jwk) MarshalJSON() ([]byte, error) {
	all := map[string]string{"kty": k.Kty, "use": k.Use, "alg": k.Alg, "kid": k.Kid, "crv": k.Crv, "n": k.N, "e": k.E, "x": k.X, "y": k.Y}
	maps.DeleteFunc(all, func(_, value string) bool { return value == "" })
	return json.Marshal(all)
}

// numbers signs what has this digest by ECDSA, with the lesser s.
func (s signer) numbers(digest []byte) (r, lesser *big.Int) {
	der, err := s.Sign(rand.Reader, digest, crypto.SHA256)
	var sig struct{ R, S *big.Int }
	if _, asn1Err := asn1.Unmarshal(der, &sig); err != nil || asn1Err != nil {
		panic(errors.Join(err, asn1Err))
	}
	if other := new(big.Int).Sub(elliptic.P256().Params().N, sig.S); other.Cmp(sig.S) < 0 {
		sig.S = other
	}
	return sig.R, sig.S
}

func fixed(r, s *big.Int) []byte {
	return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
}

func (s signer) sign(signed string) string {
	digest := sha256.Sum256([]byte(signed))
	if _, elliptic := s.Signer.(*ecdsa.PrivateKey); elliptic {
		return signed + "." + encode(fixed(s.numbers(digest[:])))
	}
	sig, err := s.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		panic(err)
	}
	return signed + "." + encode(sig)
}

type members map[string]any

// with returns a copy with changes; nil takes away.
func (o members) with(changes members) members {
	o = maps.Clone(o)
	for name, value := range changes {
		if o[name] = value; value == nil {
			delete(o, name)
		}
	}
	return o
}

func (o members) String() string {
	text, err := json.Marshal(map[string]any(o))
	if err != nil {
		panic(err)
	}
	return string(text)
}

func (s signer) header() members { return members{"alg": s.jwk.Alg, "typ": "at+jwt", "kid": s.jwk.Kid} }

func payload() members {
	now := time.Now().Unix()
	return members{"iss": issuerURL, "sub": "agent", "aud": service, "client_id": "agent", "scope": "resumes:read scores:*", "jti": "id",
		"iat": now, "exp": now + 3600, "credential_id": "c", "secret_id": "s"}
}

// token is one with changes of its claims.
func (s signer) token(changes members) string {
	return s.sign(encode(s.header().String()) + "." + encode(payload().with(changes).String()))
}

func accepted(t *testing.T, v *Verifier, token string) Claims {
	t.Helper()
	claims, err := v.Verify(t.Context(), token)
	if err != nil {
		t.Fatalf("a good token is refused: %v", err)
	}
	return claims
}

// refused wants a Refusal that has these words.
func refused(t *testing.T, v *Verifier, name, token, words string) {
	t.Helper()
	claims, err := v.Verify(t.Context(), token)
	if refusal, ok := errors.AsType[Refusal](err); !ok || !strings.Contains(string(refusal), words) {
		t.Errorf("%s: %v, want a Refusal with %q", name, err, words)
	}
	if claims.Subject != "" || claims.Scopes != nil {
		t.Errorf("%s: with the error there are claims, %v", name, claims)
	}
}

// unjudged wants an error that is no Refusal.
func unjudged(t *testing.T, v *Verifier, token string) {
	t.Helper()
	_, err := v.Verify(t.Context(), token)
	if _, refusal := errors.AsType[Refusal](err); err == nil || refusal {
		t.Errorf("the answer is %v, want that it can't tell", err)
	}
}

func TestGoodTokensAreAccepted(t *testing.T) {
	v, _ := newVerifier(t, rsaKey().jwk, ecKey().jwk)
	for _, key := range []signer{rsaKey(), ecKey()} {
		for name, changes := range map[string]members{
			"plain": {}, "nbf": {"nbf": time.Now().Unix() + 30}, "iat": {"iat": time.Now().Unix() + 30},
			"several audiences": {"aud": []string{"https://other.example.com", service}}, "no scope": {"scope": nil}, "scopes as array": {"scope": []string{"resumes:read"}}, "Scope": {"scope": nil, "Scope": "resumes:read"},
			"more": {"more": members{"a": 1}}, "half a second": {"exp": float64(time.Now().Unix()) + 3599.5}, "for ever": {"exp": json.RawMessage("1e30")},
		} {
			got := accepted(t, v, key.token(changes))
			if got.Subject != "agent" || got.ClientID != "agent" || got.ID != "id" || time.Until(got.Expires) < 59*time.Minute ||
				got.Has("resumes:read") == strings.Contains(strings.ToLower(name), "scope") ||
				got.All["jti"] != "id" || name == "more" && fmt.Sprint(got.All["more"]) != "map[a:1]" {
				t.Errorf("%s: the claims are %+v", name, got)
			}
		}
	}
}

func TestScopes(t *testing.T) {
	c := Claims{Scopes: []string{"resumes:read", "scores:*"}}
	for scope, want := range map[string]bool{
		"resumes:read": true, "scores:write": true, "scores:*": true,
		"resumes:write": false, "resumes:*": false, "resumes": false, "resumes:rea": false, "resumes:read:all": false, "": false, "*": false, ":": false,
		"resumes:read scores:write": false, "score:write": false, "Scores:write": false, "scores": false,
	} {
		if got := c.Has(scope); got != want {
			t.Errorf("Has(%q) = %v, want %v", scope, got, want)
		}
	}
	if (Claims{}).Has("") || (Claims{Scopes: []string{"*"}}).Has("a:b") || (Claims{Scopes: []string{"*:*"}}).Has("a:b") {
		t.Error("a scope covers what it doesn't")
	}
}

func TestBadTokensAreRefused(t *testing.T) {
	for _, key := range []signer{rsaKey(), ecKey()} {
		t.Run(key.jwk.Alg, func(t *testing.T) {
			v, _ := newVerifier(t, rsaKey().jwk, ecKey().jwk)
			accepted(t, v, key.token(nil))
			refuseBadTokens(t, v, key)
		})
	}
}

func refuseBadTokens(t *testing.T, v *Verifier, key signer) {
	good, header, claims := key.token(nil), key.header(), payload()
	header64, rest, _ := strings.Cut(good, ".")
	payload64, sig64, _ := strings.Cut(rest, ".")
	before := header64 + "." + payload64
	withHeader := func(changes members) string { return encode(header.with(changes).String()) + "." + payload64 }
	other := map[string]signer{"RS256": nextRSA(), "ES256": nextEC()}[key.jwk.Alg]
	kind := map[string]signer{"RS256": ecKey(), "ES256": rsaKey()}[key.jwk.Alg]

	// The algorithm is the key's (RFC 8725, section 3.1).
	const noKey, noToken, wrong = "publishes no key", "no access token", "signature"
	for _, alg := range []any{"none", "None", "", nil, "HS256", "RS384", "PS256", "ES384", "EdDSA", strings.ToLower(key.jwk.Alg), kind.jwk.Alg} {
		refused(t, v, fmt.Sprint("alg ", alg), key.sign(withHeader(members{"alg": alg})), noKey)
		refused(t, v, fmt.Sprint("unsigned, alg ", alg), withHeader(members{"alg": alg})+".", noKey)
	}
	refused(t, v, "alg as array", key.sign(withHeader(members{"alg": []string{key.jwk.Alg}})), noKey)
	refused(t, v, "signed by the key of another alg", kind.sign(before), wrong)
	refused(t, v, "signed by the key of another alg, which it says", kind.sign(withHeader(members{"alg": kind.jwk.Alg})), noKey)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, secret := range map[string]string{"DER": string(der), "modulus": key.jwk.N + key.jwk.X, "nothing": ""} {
		for alg, says := range map[string]string{"HS256": noKey, key.jwk.Alg: wrong} {
			signed := withHeader(members{"alg": alg})
			mac := hmac.New(sha256.New, []byte(secret))
			mac.Write([]byte(signed))
			refused(t, v, "HMAC keyed by "+name, signed+"."+encode(mac.Sum(nil)), says)
		}
	}
	digest := sha256.Sum256([]byte(before))
	long := sha512.Sum512([]byte(before))
	switch private := key.Signer.(type) {
	case *rsa.PrivateKey:
		pss, err := rsa.SignPSS(rand.Reader, private, crypto.SHA256, digest[:], nil)
		rs512, err512 := rsa.SignPKCS1v15(nil, private, crypto.SHA512, long[:])
		if err := errors.Join(err, err512); err != nil {
			t.Fatal(err)
		}
		refused(t, v, "signed as PS256", before+"."+encode(pss), wrong)
		refused(t, v, "signed as RS512", before+"."+encode(rs512), wrong)
		sig := new(big.Int).SetBytes(decode(sig64))
		refused(t, v, "signature plus modulus", before+"."+encode(sig.Add(sig, private.N).Bytes()), wrong)
	case *ecdsa.PrivateKey:
		r, s := key.numbers(digest[:])
		order := elliptic.P256().Params().N
		asn, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
		if err != nil {
			t.Fatal(err)
		}
		refused(t, v, "signature in ASN.1", before+"."+encode(asn), wrong)
		refused(t, v, "the other s", before+"."+encode(fixed(r, new(big.Int).Sub(order, s))), wrong)
		refused(t, v, "swapped", before+"."+encode(fixed(s, r)), wrong)
		zero, one := new(big.Int), big.NewInt(1)
		for _, pair := range [][2]*big.Int{{zero, zero}, {r, zero}, {zero, s}, {one, one}, {order, one}, {order, order}, {one, order}} {
			refused(t, v, fmt.Sprint("r and s are ", pair), before+"."+encode(fixed(pair[0], pair[1])), wrong)
		}
		refused(t, v, "63 bytes", before+"."+encode(fixed(r, s)[:63]), wrong)
		refused(t, v, "65 bytes", before+"."+encode(append(fixed(r, s), 0)), wrong)
		refused(t, v, "zero between", before+"."+encode(append(append(fixed(r, s)[:32:32], 0), fixed(r, s)[32:]...)), wrong)
		refused(t, v, "none", before+".", wrong)
	}

	// The rest of the header.
	for name, typ := range map[string]any{"JWT": "JWT", "at+JWT": "at+JWT", "a checkpoint": "audit-checkpoint+jwt", "": "", "none": nil, "MIME": "application/at+jwt"} {
		refused(t, v, "typ "+name, key.sign(withHeader(members{"typ": typ})), noToken)
	}
	refused(t, v, "kid missing", key.sign(withHeader(members{"kid": nil})), noKey)
	refused(t, v, "kid empty", key.sign(withHeader(members{"kid": ""})), noKey)
	refused(t, v, "kid as number", key.sign(withHeader(members{"kid": 1})), noKey)
	refused(t, v, "kid unknown", key.sign(withHeader(members{"kid": "../" + key.jwk.Kid})), noKey)
	for name, crit := range map[string]any{"exp": []string{"exp"}, "empty": []string{}, "b64": []string{"b64"}, "text": "exp"} {
		refused(t, v, "crit "+name, key.sign(withHeader(members{"crit": crit, "b64": false})), noToken)
	}
	for name, text := range map[string]string{"null": "null", "array": "[" + header.String() + "]", "empty": "", "text": "RS256", "cut": header.String()[1:]} {
		refused(t, v, "header is "+name, key.sign(encode(text)+"."+payload64), noToken)
	}
	refused(t, v, "another key's, under this kid", other.sign(before), wrong)
	refused(t, v, "another key's, in the header", other.sign(withHeader(members{"jwk": other.jwk, "jku": "https://evil.example.com"})), wrong)
	refused(t, v, "another key's, under its own kid", other.token(nil), noKey)

	// The claims.
	now := time.Now().Unix()
	const lacks, another, over, bound = "lacks claims", "another service", "expired", "bound to a key"
	for _, row := range []struct {
		claim string
		value any
		says  string
	}{
		{"exp", now - 1, over}, {"exp", now, over}, {"exp", nil, over}, {"exp", 0, over}, {"exp", -1, over}, {"exp", fmt.Sprint(now + 60), over},
		{"exp", float64(now) - 0.5, over}, {"exp", json.RawMessage("1e400"), lacks}, {"exp", []int64{now + 60}, over}, {"exp", json.RawMessage("null"), over},
		{"iat", now + leeway + 2, over}, {"iat", nil, lacks}, {"iat", fmt.Sprint(now), lacks}, {"nbf", now + leeway + 2, over}, {"nbf", "now", lacks},
		{"iss", "https://evil.example.com", lacks}, {"iss", issuerURL + "/", lacks}, {"iss", nil, lacks}, {"iss", []string{issuerURL}, lacks},
		{"aud", "https://other.example.com", another}, {"aud", service + "/", another}, {"aud", service[:len(service)-1], another}, {"aud", "", another}, {"aud", nil, another},
		{"aud", []string{}, another}, {"aud", []string{"https://other.example.com"}, another}, {"aud", []any{[]string{service}}, another},
		{"aud", issuerURL, another}, {"aud", members{service: service}, another}, {"aud", 1, another}, {"aud", json.RawMessage("null"), another},
		{"sub", nil, lacks}, {"sub", 1, lacks}, {"sub", "", lacks}, {"client_id", nil, lacks}, {"jti", nil, lacks},
		{"cnf", members{"jkt": "x"}, bound}, {"cnf", members{}, bound}, {"cnf", "x", bound}, {"cnf", []any{members{"jkt": "x"}}, bound}, {"cnf", false, bound},
	} {
		refused(t, v, fmt.Sprintf("%s is %v", row.claim, row.value), key.token(members{row.claim: row.value}), row.says)
	}
	for name, text := range map[string]string{
		"null": "null", "empty": "", "an array": "[" + claims.String() + "]", "two objects": claims.String() + claims.String(), "cut": claims.String()[1:],
	} {
		refused(t, v, "payload is "+name, key.sign(header64+"."+encode(text)), lacks)
	}
	refused(t, v, "EXP for exp", key.token(members{"exp": nil, "EXP": now + 3600}), over)
	refused(t, v, "TYP for typ", key.sign(withHeader(members{"typ": nil, "TYP": "at+jwt"})), noToken)
	refused(t, v, "oversize", key.token(members{"more": strings.Repeat("x", maxToken)}), noToken)

	// The form. Go's base64 skips newlines and spare bits.
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	spare := string(alphabet[strings.IndexByte(alphabet, good[len(good)-1])|1])
	for _, row := range []struct{ name, token, says string }{
		{"spare bits", good[:len(good)-1] + spare, wrong}, {"padding", good + "==", wrong}, {"newline in the signature", before + "." + sig64[:9] + "\n" + sig64[9:], wrong},
		{"newline after", good + "\n", wrong}, {"a fourth part", good + ".AAAA", wrong}, {"an empty fourth part", good + ".", wrong},
		{"newline in the payload", header64 + "." + payload64[:9] + "\n" + payload64[9:] + "." + sig64, wrong},
		{"another payload", header64 + "." + encode(claims.with(members{"scope": "all"}).String()) + "." + sig64, wrong},
		{"signed newline in the payload", key.sign(header64 + "." + payload64[:9] + "\n" + payload64[9:]), lacks},
		{"signed padding of the payload", key.sign(header64 + "." + payload64 + "="), lacks},
		{"no signature", before, wrong}, {"an empty one", before + ".", wrong}, {"cut short", good[:len(good)-4], wrong},
		{"zero before the signature", before + "." + encode("\x00"+string(decode(sig64))), wrong},
		{"space before", " " + good, noToken}, {"the scheme too", "Bearer " + good, noToken}, {"newline in the header", header64[:9] + "\n" + good[9:], noToken},
		{"a part before", "." + good, noToken}, {"nothing", "", noToken}, {"dots", "..", noToken}, {"a word", "token", noToken},
	} {
		refused(t, v, row.name, row.token, row.says)
	}
	if spare == good[len(good)-1:] {
		t.Error("there are no spare bits")
	}
}

// What an issuer publishes that is not for us makes none of its other keys useless.
func TestKeysOfNoUseAreNotUsed(t *testing.T) {
	change := func(s signer, to func(*jwk)) signer { to(&s.jwk); return s }
	even := decode(rsaKey().jwk.N)
	even[len(even)-1] &^= 1
	off := decode(ecKey().jwk.Y)
	off[5] ^= 1
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]signer{
		"RSA of 1024 bits":    smallRSA(),
		"RSA of 8200 bits":    change(rsaKey(), func(k *jwk) { k.N = encode(append(decode(k.N), make([]byte, 1025-256)...)) }),
		"no alg":              change(rsaKey(), func(k *jwk) { k.Alg = "" }),
		"RS512":               change(rsaKey(), func(k *jwk) { k.Alg = "RS512" }),
		"ES256 of an RSA key": change(rsaKey(), func(k *jwk) { k.Alg = "ES256" }),
		"RS256 of an EC key":  change(ecKey(), func(k *jwk) { k.Alg = "RS256" }),
		"to encrypt":          change(rsaKey(), func(k *jwk) { k.Use = "enc" }),
		"no kid":              change(rsaKey(), func(k *jwk) { k.Kid = "" }),
		"no modulus":          change(rsaKey(), func(k *jwk) { k.N = "" }),
		"e of 3":              change(rsaKey(), func(k *jwk) { k.E = encode("\x03") }),
		"e of 0":              change(rsaKey(), func(k *jwk) { k.E = "" }),
		"e beyond 31 bits":    change(rsaKey(), func(k *jwk) { k.E = encode("\x01\x00\x00\x00\x01") }),
		"padded modulus":      change(rsaKey(), func(k *jwk) { k.N += "==" }),
		"standard base64":     change(ecKey(), func(k *jwk) { k.X = base64.StdEncoding.EncodeToString(decode(k.X)) }),
		"off the curve":       change(ecKey(), func(k *jwk) { k.Y = encode(off) }),
		"at infinity":         change(ecKey(), func(k *jwk) { k.X, k.Y = encode(make([]byte, 32)), encode(make([]byte, 32)) }),
		"no y":                change(ecKey(), func(k *jwk) { k.Y = "" }),
		"all of it as x":      change(ecKey(), func(k *jwk) { k.X, k.Y = encode(string(decode(k.X))+string(decode(k.Y))), "" }),
		"another curve":       change(ecKey(), func(k *jwk) { k.Crv = "secp256k1" }),
		"P-384":               change(newSigner("ec", ecKey()), func(k *jwk) { x, _ := other.PublicKey.Bytes(); k.X, k.Y = encode(x[1:49]), encode(x[49:]) }),
		"a secret":            {rsaKey().Signer, jwk{Kty: "oct", Alg: "HS256", Kid: "rsa"}},
		"an even modulus":     change(rsaKey(), func(k *jwk) { k.N = encode(even) }),
	} {
		t.Run(name, func(t *testing.T) {
			v, i := newVerifier(t, key.jwk, nextRSA().jwk)
			accepted(t, v, nextRSA().token(nil))
			says := "publishes no key"
			if name == "an even modulus" { // which Go finds when it verifies
				says = "signature"
			}
			refused(t, v, "a token of it", key.token(nil), says)
			if i.count() != 1 {
				t.Errorf("the issuer was asked %d times", i.count())
			}
			if alone, _ := newVerifier(t, key.jwk); says != "signature" {
				unjudged(t, alone, key.token(nil))
			}
		})
	}
}

func TestAnotherDocumentLeavesTheKeysThatAreThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, i := newVerifier(t, rsaKey().jwk)
		accepted(t, v, rsaKey().token(nil))
		for name, broken := range map[string]*issuer{
			"an error page": {status: 500}, "a redirect": {status: 302, header: map[string]string{"Location": "https://evil.example.com/"}},
			"not found": {status: 404}, "no JSON": {raw: "<html>"}, "no keys": {raw: `{}`}, "an empty list": {raw: `{"keys":[]}`}, "null": {raw: "null"},
			"keys that are none": {raw: `{"keys":[1,"a",null,{}]}`}, "an object for a list": {raw: `{"keys":{}}`},
			"oversize": {raw: `{"more":"` + strings.Repeat("x", maxKeys) + `","keys":[` + string(must(json.Marshal(nextRSA().jwk))) + `]}`},
			"cut":      {raw: `{"keys":[` + string(must(json.Marshal(nextRSA().jwk)))},
		} {
			time.Sleep(2 * keysFresh)
			asked := i.count()
			i.change(func() {
				i.status, i.header, i.raw, i.keys = broken.status, broken.header, broken.raw, []jwk{nextRSA().jwk}
			})
			accepted(t, v, rsaKey().token(nil))
			unjudged(t, v, nextRSA().token(nil))
			if i.count() != asked+1 {
				t.Errorf("%s: the issuer was asked %d times, want once", name, i.count()-asked)
			}
		}
		i.change(func() { i.status, i.header, i.raw = 0, nil, "" })
		time.Sleep(fetchTime)
		accepted(t, v, nextRSA().token(nil))
		refused(t, v, "the last key", rsaKey().token(nil), "publishes no key")
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestKeysAreRotated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, i := newVerifier(t, rsaKey().jwk)
		accepted(t, v, rsaKey().token(nil))
		accepted(t, v, rsaKey().token(nil))
		i.want(t, 1)

		// The next is published and signs; nobody waits for anything but the keys.
		i.change(func() { i.keys = []jwk{rsaKey().jwk, ecKey().jwk} })
		time.Sleep(time.Minute)
		accepted(t, v, ecKey().token(nil))
		accepted(t, v, rsaKey().token(nil))
		i.want(t, 2)

		// The old one is dropped, and refused once the keys are asked for again: with
		// the token after the one that came when they ceased to be fresh.
		i.change(func() { i.keys = []jwk{ecKey().jwk} })
		time.Sleep(keysFresh - time.Second)
		accepted(t, v, rsaKey().token(nil))
		i.want(t, 2)
		time.Sleep(2 * time.Second)
		accepted(t, v, ecKey().token(nil))
		i.want(t, 3)
		refused(t, v, "a dropped key", rsaKey().token(nil), "publishes no key")
		i.want(t, 3)

		// After a long pause with the first token.
		i.change(func() { i.keys = []jwk{nextEC().jwk} })
		time.Sleep(2*keysFresh + time.Second)
		refused(t, v, "a dropped key after a pause", ecKey().token(nil), "publishes no key")
		accepted(t, v, nextEC().token(nil))
		i.want(t, 4)
	})
}

func TestCacheControlIsFollowed(t *testing.T) {
	for header, fresh := range map[string]time.Duration{
		"public, max-age=300": 5 * time.Minute, "max-age=60": time.Minute, "max-age=0": 0, "no-cache, max-age=120, public": 2 * time.Minute,
		"max-age=31536000": keysFresh, "max-age=99999999999999999999": keysFresh, "max-age=-1": keysFresh, "max-age=x": keysFresh, "": keysFresh, "no-store": keysFresh,
	} {
		t.Run(header, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v, i := newVerifier(t, rsaKey().jwk)
				i.header = map[string]string{"Cache-Control": header}
				accepted(t, v, rsaKey().token(nil))
				if fresh > 0 {
					time.Sleep(fresh)
					accepted(t, v, rsaKey().token(nil))
					i.want(t, 1)
				}
				time.Sleep(fetchTime)
				accepted(t, v, rsaKey().token(nil))
				i.want(t, 2)
			})
		})
	}
}

func TestFloodOfUnknownKidsIsNoFloodOfFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, i := newVerifier(t, rsaKey().jwk)
		i.slow = time.Second
		good := rsaKey().token(nil)
		header := func(n int) string { return encode(rsaKey().header().with(members{"kid": fmt.Sprint(n)}).String()) }
		_, rest, _ := strings.Cut(good, ".")
		begun := time.Now()
		var flood sync.WaitGroup
		for n := range 300 {
			flood.Go(func() {
				for round := range 10 {
					refused(t, v, "flood", header(n*10+round)+"."+rest, "publishes no key")
					time.Sleep(time.Second)
				}
			})
		}
		accepted(t, v, good)
		if waited := time.Since(begun); waited != time.Second {
			t.Errorf("the first good token waited %v, want only for the keys", waited)
		}
		for range 20 {
			now := time.Now()
			accepted(t, v, good)
			if waited := time.Since(now); waited != 0 {
				t.Errorf("a good token waited %v, want nothing", waited)
			}
			time.Sleep(100 * time.Millisecond)
		}
		flood.Wait()
		if took := time.Since(begun); i.count() > int(took/fetchTime)+1 || i.count() < 2 {
			t.Errorf("within %v the issuer was asked %d times", took, i.count())
		}
		i.change(func() { i.keys = append(i.keys, nextRSA().jwk) })
		time.Sleep(fetchTime)
		accepted(t, v, nextRSA().token(nil))
	})
}

func TestKnownKeysOutliveTheIssuer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, i := newVerifier(t, rsaKey().jwk)
		i.down = true
		unjudged(t, v, rsaKey().token(nil))
		i.change(func() { i.down = false })
		unjudged(t, v, rsaKey().token(nil)) // it is not asked again at once
		i.want(t, 1)
		time.Sleep(fetchTime)
		accepted(t, v, rsaKey().token(nil))
		i.want(t, 2)

		for _, name := range []string{"it refuses", "it hangs", "it refuses"} { // in either order
			i.change(func() {
				if i.down, i.slow = true, 0; name == "it hangs" {
					i.down, i.slow = false, time.Hour
				}
			})
			time.Sleep(time.Hour)
			accepted(t, v, rsaKey().token(nil)) // the first may wait until the fetch is given up
			asked := i.count()
			for range 60 {
				now := time.Now()
				accepted(t, v, rsaKey().token(nil))
				if waited := time.Since(now); waited != 0 {
					t.Errorf("while %s a token waited %v", name, waited)
				}
				time.Sleep(time.Second)
			}
			if i.count() > asked+60/5+1 || i.count() < asked+5 {
				t.Errorf("while %s it was asked %d times in a minute", name, i.count()-asked)
			}
			now := time.Now()
			unjudged(t, v, nextRSA().token(nil))
			if waited := time.Since(now); waited > fetchTime {
				t.Errorf("while %s a token of an unknown key waited %v", name, waited)
			}
		}
		time.Sleep(keysLast)
		unjudged(t, v, rsaKey().token(nil)) // no token lives that long
		i.change(func() { i.down, i.slow = false, 0 })
		time.Sleep(2 * fetchTime)
		accepted(t, v, rsaKey().token(nil))
		asked := i.count()
		accepted(t, v, rsaKey().token(nil))
		i.want(t, asked)
	})
}

func TestWaitingEndsWithItsContextAndTakesNothingFromOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, i := newVerifier(t, rsaKey().jwk)
		i.slow = 3 * time.Second
		token, begun := rsaKey().token(nil), time.Now()
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var others sync.WaitGroup
		others.Go(func() {
			if _, err := v.Verify(short, token); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) != time.Second {
				t.Errorf("after %v: %v, want a time-out after a second", time.Since(begun), err)
			}
		})
		synctest.Wait()
		for range 20 {
			others.Go(func() { accepted(t, v, token) })
		}
		others.Wait()
		if took := time.Since(begun); took != 3*time.Second {
			t.Errorf("it took %v", took)
		}
		i.want(t, 1)
		i.change(func() { i.slow = time.Hour })
		time.Sleep(time.Minute)
		begun = time.Now()
		unjudged(t, v, ecKey().token(nil))
		if took := time.Since(begun); took != fetchTime {
			t.Errorf("a fetch that hangs is given up after %v, want %v", took, fetchTime)
		}
	})
}

func TestMiddleware(t *testing.T) {
	v, i := newVerifier(t, rsaKey().jwk)
	handler := v.Middleware("resumes:read", "scores:write")(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, FromContext(r.Context()).Subject)
	}))
	const realm = `Bearer realm="` + service + `"`
	expired := rsaKey().token(members{"exp": time.Now().Unix() - 1})
	good := rsaKey().token(nil)
	for _, row := range []struct {
		name, authorization string
		status              int
		challenge           string
	}{
		{"good", "Bearer " + good, 200, ""}, {"in lower case", "bearer " + good, 200, ""}, {"two spaces", "Bearer  " + good, 200, ""},
		{"none", "", 401, realm}, {"another scheme", "Basic YTpi", 401, realm}, {"a token by another scheme", "DPoP " + good, 401, realm},
		{"no scheme", good, 401, realm}, {"tab", "Bearer\t" + good, 401, realm},
		{"no token", "Bearer", 401, realm + `, error="invalid_token", error_description="This is no access token."`},
		{"expired", "Bearer " + expired, 401, realm + `, error="invalid_token", error_description="The token has expired, or its time has not come."`},
		{"two", "Bearer " + good + ", Bearer " + good, 401, realm + `, error="invalid_token", error_description="The signature of the token is wrong."`},
		{"a scope is missing", "Bearer " + rsaKey().token(members{"scope": "resumes:read"}), 403, realm + `, error="insufficient_scope", scope="resumes:read scores:write"`},
		{"all are", "Bearer " + rsaKey().token(members{"scope": nil}), 403, realm + `, error="insufficient_scope", scope="resumes:read scores:write"`},
	} {
		q := httptest.NewRequest("GET", "/?access_token="+good, nil) // never there (RFC 9700, section 4.3.2)
		if row.authorization != "" {
			q.Header.Set("Authorization", row.authorization)
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, q)
		if w.Code != row.status || w.Header().Get("WWW-Authenticate") != row.challenge || (w.Body.String() == "agent") != (row.status == 200) {
			t.Errorf("%s: %d %q %s, want %d %q", row.name, w.Code, w.Header()["Www-Authenticate"], w.Body, row.status, row.challenge)
		}
	}

	fresh, j := newVerifier(t)
	j.down = true
	q := httptest.NewRequest("GET", "/", nil)
	q.Header.Set("Authorization", "Bearer "+good)
	w := httptest.NewRecorder()
	fresh.Middleware()(handler).ServeHTTP(w, q)
	if w.Code != 503 || w.Header().Get("Retry-After") != "5" || w.Header().Get("WWW-Authenticate") != "" || strings.Contains(w.Body.String(), "way") {
		t.Errorf("without keys the answer is %d %v %s, want a bare 503", w.Code, w.Header(), w.Body)
	}

	// Without scopes any good token does; an empty scope is none that a token has.
	for scopes, status := range map[string]int{"": 403, "none": 200} {
		with := v.Middleware(scopes)
		if scopes == "none" {
			with = v.Middleware()
		}
		w := httptest.NewRecorder()
		with(handlerOf(200)).ServeHTTP(w, q)
		if w.Code != status {
			t.Errorf("with the scopes %q the answer is %d, want %d", scopes, w.Code, status)
		}
	}
	if i.count() != 1 {
		t.Errorf("the issuer was asked %d times", i.count())
	}
	if c := FromContext(t.Context()); c.Subject != "" || c.Has("resumes:read") {
		t.Errorf("a request that nobody looked at is of %v", c)
	}
}

// A token that is bound to a key is as good as another only where the service checks proofs, and with one.
func TestBoundTokens(t *testing.T) {
	v, _ := newVerifier(t, rsaKey().jwk)
	handler := v.Middleware("resumes:read")(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, FromContext(r.Context()).Key)
	}))
	plain := rsaKey().token(nil)
	bound, narrow := rsaKey().token(members{"cnf": members{"jkt": "its key"}}), rsaKey().token(members{"cnf": members{"jkt": "its key"}, "scope": "scores:*"})
	const (
		bearer  = `Bearer realm="` + service + `"`
		dpop    = `DPoP realm="` + service + `"`
		invalid = `, error="invalid_token", error_description="`
		other   = invalid + `A token that is bound to a key comes by DPoP and with a proof, and others by Bearer."`
		unseen  = invalid + `The token is bound to a key, which this service doesn't check; ask for one that isn't."`
	)
	asked := 0
	proof := func(answer error) Proof {
		return func(r *http.Request, token, thumbprint string) error {
			if asked++; r.URL.Path != "/resumes" || token != bound && token != narrow || thumbprint != "its key" {
				t.Errorf("the proof is to be of %s, %q and the key %q", r.URL.Path, token, thumbprint)
			}
			return answer
		}
	}
	for _, row := range []struct {
		name, authorization string
		proof               Proof
		status              int
		challenge           string
		asked               int
	}{
		{"no proofs are checked", "Bearer " + bound, nil, 401, bearer + unseen, 0},
		{"no proofs are checked, by DPoP", "DPoP " + bound, nil, 401, bearer, 0},
		{"a proof", "DPoP " + bound, proof(nil), 200, "", 1},
		{"a proof, in lower case and with two spaces", "dpop  " + bound, proof(nil), 200, "", 1},
		{"a bad proof", "DPoP " + bound, proof(Refusal("It is old.")), 401, dpop + `, error="invalid_dpop_proof", error_description="It is old."`, 1},
		{"a proof of which nobody can tell", "DPoP " + bound, proof(errors.New("no way there")), 503, "", 1},
		{"as if it weren't bound", "Bearer " + bound, proof(nil), 401, dpop + other, 0},
		{"as if it were", "DPoP " + plain, proof(nil), 401, dpop + other, 0},
		{"one that isn't", "Bearer " + plain, proof(Refusal("It is old.")), 200, "", 0},
		{"by another scheme", "Basic " + plain, proof(nil), 401, bearer, 0},
		{"no token", "DPoP", proof(nil), 401, dpop + invalid + `This is no access token."`, 0},
		{"bound in another way", "DPoP " + rsaKey().token(members{"cnf": members{"x5t#S256": "x"}}), proof(nil), 401, dpop + unseen, 0},
		{"bound in two ways", "DPoP " + rsaKey().token(members{"cnf": members{"jkt": "its key", "x5t#S256": "x"}}), proof(nil), 401, dpop + unseen, 0},
		{"bound to nothing", "Bearer " + rsaKey().token(members{"cnf": members{"jkt": ""}}), proof(nil), 401, bearer + unseen, 0},
		{"a scope is missing", "DPoP " + narrow, proof(nil), 403, dpop + `, error="insufficient_scope", scope="resumes:read"`, 1},
	} {
		v.Proof, asked = row.proof, 0
		q := httptest.NewRequest("GET", "/resumes", nil)
		q.Header.Set("Authorization", row.authorization)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, q)
		if w.Code != row.status || w.Header().Get("WWW-Authenticate") != row.challenge || asked != row.asked ||
			row.status == 200 && (w.Body.String() == "its key") != (row.asked > 0) {
			t.Errorf("%s: %d %q %s, and %d proofs, want %d %q and %d", row.name, w.Code, w.Header()["Www-Authenticate"], w.Body, asked, row.status, row.challenge, row.asked)
		}
	}
}

func handlerOf(status int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
}

// Over a real connection, with the Client that New makes.
func TestClientFollowsNoRedirect(t *testing.T) {
	evil := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(members{"keys": []jwk{rsaKey().jwk}})
	}))
	defer evil.Close()
	for path, status := range map[string]int{"/good": 200, "/sends": 302} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if status == 302 {
				http.Redirect(w, r, evil.URL, http.StatusFound)
			} else if r.URL.Path == path+"/.well-known/jwks.json" {
				json.NewEncoder(w).Encode(members{"keys": []jwk{rsaKey().jwk}})
			}
		}))
		defer server.Close()
		v, err := New(server.URL+path, service)
		if err != nil {
			t.Fatal(err)
		}
		token := rsaKey().token(members{"iss": server.URL + path})
		if status == 200 {
			accepted(t, v, token)
		} else {
			unjudged(t, v, token)
		}
	}
}

func TestNewRefusesWhatIsNoURL(t *testing.T) {
	for _, bad := range []string{
		"", "idp.example.com", "//idp.example.com", "ftp://idp.example.com", "https://", "https:///x", "https://idp.example.com/", "https://a:b@idp.example.com",
		"https://idp.example.com?x=1", "https://idp.example.com#x", "https://idp.example.com/ x", "https://idp.example.com\n", " https://idp.example.com", `https://idp.example.com\`,
	} {
		if v, err := New(bad, service); err == nil || v != nil {
			t.Errorf("New(%q) = %v, %v, want an error", bad, v, err)
		}
	}
	for _, good := range []string{issuerURL, "http://localhost:3000", "https://idp.example.com/agents", "http://[::1]:3000"} {
		if _, err := New(good, service); err != nil {
			t.Errorf("New(%q): %v", good, err)
		}
	}
	if _, err := New(issuerURL, ""); err == nil {
		t.Error("New takes any audience")
	}
}
