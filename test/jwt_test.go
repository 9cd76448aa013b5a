package test

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
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const testIssuer = "https://id.example.com"

// More keys beside testKey; making one takes seconds under -race.
var (
	secondKey         = makeKey("RS256")
	thirdKey          = makeKey("RS256")
	ellipticKey       = makeKey("ES256")
	secondEllipticKey = makeKey("ES256")
)

func makeKey(alg string) func() string {
	return sync.OnceValue(func() string {
		out, err := command(context.Background(), nil, io.Discard, "keygen", alg)
		if err != nil {
			panic(err)
		}
		return out
	})
}

// keyPairs are a signing key of each kind, and another one.
var keyPairs = map[string][2]func() string{"RS256": {testKey, secondKey}, "ES256": {ellipticKey, secondEllipticKey}}

// privateKey reads the PEM that newKeyPEM makes.
func privateKey(t testing.TB, text string) crypto.Signer {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(crypto.Signer)
}

// publicPEM is the public half of such a PEM, in PKIX.
func publicPEM(t testing.TB, text string) string {
	t.Helper()
	return pkix(t, privateKey(t, text).Public())
}

func pkix(t testing.TB, key any) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// encode is base64url without padding, written again here so that a fault of
// the program's own can't hide.
func encode(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }

// readPart decodes the header (0) or the payload (1) of a token.
func readPart(t testing.TB, token string, i int) string {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[i])
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// sign256 signs what stands before the signature with RS256 or ES256, whatever
// it is.
func sign256(t testing.TB, key crypto.Signer, signed string) string {
	t.Helper()
	digest := sha256.Sum256([]byte(signed))
	sig, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if _, elliptic := key.(*ecdsa.PrivateKey); elliptic {
		r, s := numbersOf(t, sig)
		if high := new(big.Int).Sub(orderP256, s); high.Cmp(s) < 0 {
			s = high
		}
		sig = fixed(r, s)
	}
	return signed + "." + encode(string(sig))
}

var orderP256 = elliptic.P256().Params().N

// numbersOf reads an ECDSA signature in ASN.1.
func numbersOf(t testing.TB, der []byte) (r, s *big.Int) {
	t.Helper()
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &sig); err != nil {
		t.Fatal(err)
	}
	return sig.R, sig.S
}

// fixed is an ECDSA signature as a JWT has it.
func fixed(r, s *big.Int) []byte {
	return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
}

func forge(t testing.TB, key crypto.Signer, header, payload string) string {
	t.Helper()
	return sign256(t, key, encode(header)+"."+encode(payload))
}

// withClaim sets a claim of a payload to some JSON; "" takes it away.
func withClaim(t testing.TB, payload, name, value string) string {
	t.Helper()
	member := regexp.MustCompile(`"` + name + `":("[^"]*"|[0-9]+),?`)
	if !member.MatchString(payload) {
		t.Fatalf("%s has no %s", payload, name)
	}
	replacement := ""
	if value != "" {
		replacement = `"` + name + `":` + value + `,`
	}
	return strings.Replace(member.ReplaceAllLiteralString(payload, replacement), ",}", "}", 1)
}

type badToken struct{ name, token string }

// badTokens are tokens that no verifier may accept, made from a good one: most
// are signed by the right key, so that nothing but the fault can refuse them.
func badTokens(t testing.TB, key crypto.Signer, good string, at time.Time) []badToken {
	t.Helper()
	var bad []badToken
	add := func(name, token string) { bad = append(bad, badToken{name, token}) }
	parts := strings.Split(good, ".")
	header64, payload64, sig64 := parts[0], parts[1], parts[2]
	header, payload := readPart(t, good, 0), readPart(t, good, 1)
	var h struct{ Alg, Typ, Kid string }
	if err := json.Unmarshal([]byte(header), &h); err != nil {
		t.Fatal(err)
	}

	// The algorithm is never the token's choice (RFC 8725, section 3.1).
	withAlg := func(alg string) string { return strings.Replace(header, h.Alg, alg, 1) }
	for _, alg := range []string{"none", "None", "NONE", "nOnE", ""} {
		unsigned := encode(withAlg(alg)) + "." + payload64 + "."
		add("alg "+alg+" without signature", unsigned)
		add("alg "+alg+" with the good signature", unsigned+sig64)
		add("alg "+alg+" signed", forge(t, key, withAlg(alg), payload))
	}
	add("no alg", forge(t, key, fmt.Sprintf(`{"typ":%q,"kid":%q}`, h.Typ, h.Kid), payload))
	add("alg twice", forge(t, key, strings.Replace(header, `"alg"`, `"alg":"none","alg"`, 1), payload))
	add("alg as array", forge(t, key, strings.Replace(header, `"`+h.Alg+`"`, `["`+h.Alg+`"]`, 1), payload))
	add("alg in lower case", forge(t, key, withAlg(strings.ToLower(h.Alg)), payload))
	public := pkix(t, key.Public())
	block, _ := pem.Decode([]byte(public))
	secrets := map[string]string{
		"the public PEM": public, "the PEM without its last newline": strings.TrimSpace(public),
		"the public DER": string(block.Bytes), "nothing": "",
	}
	sig, _ := base64.RawURLEncoding.DecodeString(sig64)
	var jwk, otherJWK, otherThumbprint string
	other := privateKey(t, keyPairs[h.Alg][1]())
	switch key := key.(type) {
	case *rsa.PrivateKey:
		n := func(key crypto.Signer) string { return encode(string(key.Public().(*rsa.PublicKey).N.Bytes())) }
		secrets["the modulus"] = string(key.N.Bytes())
		jwk, otherJWK = `{"kty":"RSA","n":"`+n(key)+`","e":"AQAB"}`, `{"kty":"RSA","n":"`+n(other)+`","e":"AQAB"}`
		otherThumbprint = `{"e":"AQAB","kty":"RSA","n":"` + n(other) + `"}`
		for alg, hash := range map[string]crypto.Hash{"RS384": crypto.SHA384, "RS512": crypto.SHA512} {
			for _, said := range []string{alg, "RS256"} {
				signed := encode(withAlg(said)) + "." + payload64
				digest := sha512.New()
				if hash == crypto.SHA384 {
					digest = sha512.New384()
				}
				digest.Write([]byte(signed))
				sig, err := rsa.SignPKCS1v15(nil, key, hash, digest.Sum(nil))
				if err != nil {
					t.Fatal(err)
				}
				add("signed as "+alg+" with alg "+said, signed+"."+encode(string(sig)))
			}
		}
		for _, said := range []string{"PS256", "RS256"} {
			signed := encode(withAlg(said)) + "." + payload64
			digest := sha256.Sum256([]byte(signed))
			sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil)
			if err != nil {
				t.Fatal(err)
			}
			add("signed as PS256 with alg "+said, signed+"."+encode(string(sig)))
		}
		elliptic256 := privateKey(t, ellipticKey())
		add("ES256", sign256(t, elliptic256, encode(withAlg("ES256"))+"."+payload64))
		add("ES256 with alg RS256", sign256(t, elliptic256, header64+"."+payload64))
		longer := new(big.Int).Add(new(big.Int).SetBytes(sig), key.N)
		add("signature plus modulus", header64+"."+payload64+"."+encode(string(longer.Bytes())))
	case *ecdsa.PrivateKey:
		point := func(key crypto.Signer) (x, y string) {
			b, err := key.Public().(*ecdsa.PublicKey).Bytes()
			if err != nil {
				t.Fatal(err)
			}
			return encode(string(b[1:33])), encode(string(b[33:]))
		}
		x, y := point(key)
		jwk = `{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `"}`
		x, y = point(other)
		otherJWK = `{"kty":"EC","crv":"P-256","x":"` + x + `","y":"` + y + `"}`
		otherThumbprint = `{"crv":"P-256","kty":"EC","x":"` + x + `","y":"` + y + `"}`
		before := header64 + "." + payload64
		r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
		der, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
		if err != nil {
			t.Fatal(err)
		}
		add("signature in ASN.1", before+"."+encode(string(der)))
		add("the other s that fits", before+"."+encode(string(fixed(r, new(big.Int).Sub(orderP256, s)))))
		add("r and s swapped", before+"."+encode(string(fixed(s, r))))
		// Psychic signatures (CVE-2022-21449) and their like.
		for name, pair := range map[string][2]*big.Int{
			"r and s 0": {new(big.Int), new(big.Int)}, "r 0": {new(big.Int), s}, "s 0": {r, new(big.Int)}, "r and s 1": {big.NewInt(1), big.NewInt(1)},
			"r and s the order": {orderP256, orderP256}, "r of the order and s 1": {orderP256, big.NewInt(1)},
		} {
			add(name, before+"."+encode(string(fixed(pair[0], pair[1]))))
		}
		rsaKey := privateKey(t, testKey())
		add("RS256", sign256(t, rsaKey, encode(withAlg("RS256"))+"."+payload64))
		add("RS256 with alg ES256", sign256(t, rsaKey, before))
		add("ES384", forge(t, key, withAlg("ES384"), payload))
	}
	for name, secret := range secrets {
		for _, alg := range []string{"HS256", h.Alg} {
			signed := encode(withAlg(alg)) + "." + payload64
			mac := hmac.New(sha256.New, []byte(secret))
			mac.Write([]byte(signed))
			add("HMAC keyed with "+name+" as "+alg, signed+"."+encode(string(mac.Sum(nil))))
		}
	}

	// The rest of the header.
	more := func(member string) string { return header[:len(header)-1] + "," + member + "}" }
	for name, changed := range map[string]string{
		"crit of exp": more(`"crit":["exp"]`), "empty crit": more(`"crit":[]`), "crit of b64": more(`"crit":["b64"],"b64":false`),
		"no typ":                  fmt.Sprintf(`{"alg":%q,"kid":%q}`, h.Alg, h.Kid),
		"typ JWT":                 strings.Replace(header, h.Typ, "JWT", 1),
		"typ of an ID":            strings.Replace(header, h.Typ, "id+jwt", 1),
		"typ AT+JWT":              strings.Replace(header, h.Typ, "AT+JWT", 1),
		"typ as MIME":             strings.Replace(header, h.Typ, "application/at+jwt", 1),
		"typ of the log":          strings.Replace(header, h.Typ, auditCheckpoint, 1),
		"no kid":                  fmt.Sprintf(`{"alg":%q,"typ":%q}`, h.Alg, h.Typ),
		"kid null":                strings.Replace(header, `"`+h.Kid+`"`, `null`, 1),
		"kid as array":            strings.Replace(header, `"`+h.Kid+`"`, `["`+h.Kid+`"]`, 1),
		"kid as number":           strings.Replace(header, `"`+h.Kid+`"`, `1`, 1),
		"kid as path":             strings.Replace(header, h.Kid, "../../../../dev/null", 1),
		"kid as SQL":              strings.Replace(header, h.Kid, "' union select 'x' --", 1),
		"kid with NUL":            strings.Replace(header, h.Kid, h.Kid+`\u0000`, 1),
		"kid unknown":             strings.Replace(header, h.Kid, strings.Repeat("A", 43), 1),
		"kid twice":               more(`"kid":"` + h.Kid + `"`),
		"jwk":                     more(`"jwk":` + jwk),
		"jku":                     more(`"jku":"https://evil.example.com/jwks.json"`),
		"x5u":                     more(`"x5u":"https://evil.example.com/cert.pem"`),
		"x5c":                     more(`"x5c":["MIIB"]`),
		"zip":                     more(`"zip":"DEF"`),
		"space in header":         strings.Replace(header, ",", ", ", 1),
		"header in another order": fmt.Sprintf(`{"typ":%q,"alg":%q,"kid":%q}`, h.Typ, h.Alg, h.Kid),
		"header is null":          "null", "header is an array": "[" + header + "]", "header is empty": "", "header is no JSON": "RS256",
	} {
		add(name, forge(t, key, changed, payload))
	}
	add("padded header", sign256(t, key, header64+"=."+payload64))

	// Another key, also one that the header carries.
	add("another key under our kid", sign256(t, other, header64+"."+payload64))
	add("another key as jwk", forge(t, other, more(`"jwk":`+otherJWK), payload))
	thumbprint := sha256.Sum256([]byte(otherThumbprint))
	add("another key under its own kid", forge(t, other, strings.Replace(header, h.Kid, encode(string(thumbprint[:])), 1), payload))

	// The payload, signed with the right header by the right key.
	now := at.Unix()
	for _, row := range []struct{ name, claim, value string }{
		{"expired", "exp", fmt.Sprint(now - 1)}, {"expires now", "exp", fmt.Sprint(now)},
		{"exp as string", "exp", fmt.Sprintf(`"%d"`, now+60)}, {"exp null", "exp", "null"}, {"no exp", "exp", ""},
		{"exp 1e400", "exp", "1e400"}, {"exp 1e10", "exp", "1e10"}, {"exp 9e18", "exp", "99999999999999999999"},
		{"exp negative", "exp", "-1"}, {"exp with a fraction", "exp", fmt.Sprintf("%d.5", now+60)}, {"exp true", "exp", "true"},
		{"exp as array", "exp", fmt.Sprintf("[%d]", now+60)},
		{"iat to come", "iat", fmt.Sprint(now + 600)}, {"iat as string", "iat", fmt.Sprintf(`"%d"`, now)}, {"no iat", "iat", ""},
		{"another issuer", "iss", `"https://evil.example.com"`}, {"no issuer", "iss", ""}, {"issuer null", "iss", "null"},
		{"issuer as array", "iss", `["` + testIssuer + `"]`}, {"empty issuer", "iss", `""`},
		{"no sub", "sub", ""}, {"no client_id", "client_id", ""}, {"no jti", "jti", ""}, {"no scope", "scope", ""}, {"no aud", "aud", ""},
		{"no credential_id", "credential_id", ""}, {"no secret_id", "secret_id", ""},
		{"sub null", "sub", "null"}, {"sub as number", "sub", "1"}, {"scope as array", "scope", `["agents:write"]`},
		{"aud with a number", "aud", `["` + testIssuer + `",1]`}, {"aud as object", "aud", `{}`},
	} {
		add(row.name, forge(t, key, header, withClaim(t, payload, row.claim, row.value)))
	}
	var c claims
	if err := json.Unmarshal([]byte(payload), &c); err != nil {
		t.Fatal(err)
	}
	inside := payload[1 : len(payload)-1]
	for name, changed := range map[string]string{
		"issuer with a slash":        strings.Replace(payload, `"iss":"`+c.Issuer, `"iss":"`+c.Issuer+"/", 1),
		"issuer cut short":           strings.Replace(payload, `"iss":"`+c.Issuer, `"iss":"`+c.Issuer[:len(c.Issuer)-1], 1),
		"issuer in upper case":       strings.Replace(payload, `"iss":"http`, `"iss":"HTTP`, 1),
		"nbf to come":                "{" + inside + fmt.Sprintf(`,"nbf":%d}`, now+600),
		"an unknown claim":           "{" + inside + `,"admin":true}`,
		"exp twice":                  fmt.Sprintf(`{"exp":%d,%s}`, now+7200, inside),
		"scope twice":                "{" + inside + `,"scope":"agents:write"}`,
		"scope once more as Scope":   "{" + inside + `,"Scope":"agents:write"}`,
		"EXP in place of exp":        strings.Replace(payload, `"exp"`, `"EXP"`, 1),
		"escaped name":               strings.Replace(payload, `"exp"`, `"\u0065xp"`, 1),
		"claims in another order":    withClaim(t, payload, "exp", "")[:len(withClaim(t, payload, "exp", ""))-1] + fmt.Sprintf(`,"exp":%d}`, c.Expires),
		"invalid UTF-8":              strings.Replace(payload, `"scope":"`, "\"scope\":\"\xff", 1),
		"half a surrogate":           strings.Replace(payload, `"scope":"`, `"scope":"\ud800`, 1),
		"byte order mark":            "\ufeff" + payload,
		"space before":               " " + payload,
		"newline after":              payload + "\n",
		"a second object":            payload + payload,
		"cut short":                  payload[:len(payload)-1],
		"payload is empty":           "",
		"payload is an empty object": "{}",
		"payload is null":            "null",
		"payload is an array":        "[" + payload + "]",
		"payload is a string":        fmt.Sprintf("%q", payload),
		"payload is a number":        "1",
		"deep":                       strings.Replace(payload, `"iss"`, `"x":`+strings.Repeat("[", 5000)+strings.Repeat("]", 5000)+`,"iss"`, 1),
		"oversize":                   strings.Replace(payload, `"scope":"`, `"scope":"`+strings.Repeat("x", 11200), 1),
	} {
		if changed == payload {
			t.Fatalf("%s: nothing is changed", name)
		}
		add(name, forge(t, key, header, changed))
	}

	// The signature and the compact form. Go's base64 skips newlines and spare
	// bits.
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, sig64[len(sig64)-1])
	flipped := slices.Clone(sig)
	flipped[20] ^= 1
	before := header64 + "." + payload64
	for name, token := range map[string]string{
		"spare bits in the signature": good[:len(good)-1] + string(alphabet[last|1]),
		"newline in the signature":    before + "." + sig64[:9] + "\n" + sig64[9:],
		"newline after the signature": good + "\n",
		"CRLF after the signature":    good + "\r\n",
		"newline before":              "\n" + good,
		"newline in the payload":      header64 + "." + payload64[:9] + "\n" + payload64[9:] + "." + sig64,
		"padded signature":            good + "==",
		"padded signature, escaped":   good + "%3D%3D",
		"space before the token":      " " + good,
		"NUL after the token":         good + "\x00",
		"signature missing":           before,
		"signature empty":             before + ".",
		"signature cut short":         good[:len(good)-4],
		"signature too long":          good + "AAAA",
		"signature with zero before":  before + "." + encode("\x00"+string(sig)),
		"signature of zeros":          before + "." + encode(string(make([]byte, len(sig)))),
		"signature of one":            before + "." + encode(string(append(make([]byte, len(sig)-1), 1))),
		"one bit of the signature":    before + "." + encode(string(flipped)),
		"signature in hexadecimal":    before + "." + fmt.Sprintf("%x", sig),
		"standard base64":             before + "." + base64.RawStdEncoding.EncodeToString(append([]byte{0xff, 0xff}, sig[2:]...)),
		"one letter of the payload":   header64 + ".f" + payload64[1:] + "." + sig64,
		"a fourth part":               good + ".AAAA",
		"a fourth part that is empty": good + ".",
		"five parts":                  good + "." + good,
		"a part before":               "." + good,
		"dots alone":                  "..",
		"one dot":                     ".",
		"a word":                      "garbage",
		"the scheme too":              "Bearer " + good,
		"the token in JSON":           `{"payload":"` + payload64 + `","protected":"` + header64 + `","signature":"` + sig64 + `"}`,
		"the token twice":             good + good,
		"the payload's signature":     sign256(t, key, payload64),
		"another token's payload":     header64 + "." + encode(withClaim(t, payload, "scope", `"agents:write"`)) + "." + sig64,
	} {
		add(name, token)
	}
	return bad
}

// introspect asks with the first agent's token, which costs no bcrypt.
func (v *service) introspect(token string) answer {
	v.t.Helper()
	return v.do("POST", "/api/v1/token/introspect", "token="+url.QueryEscape(token),
		"Authorization", "Bearer "+v.bearer, "Content-Type", "application/x-www-form-urlencoded")
}

// isActive is introspect's answer, which must be exactly inactive or have
// claims.
func (v *service) isActive(token string) bool {
	v.t.Helper()
	a := v.want(v.introspect(token), 200, "")
	if a.body["active"] != true && a.raw != "{\"active\":false}\n" {
		v.t.Errorf("introspected as %s, want exactly {\"active\":false}", a.raw)
	}
	return a.body["active"] == true
}

func TestBadTokensAreRefusedOverHTTP(t *testing.T) {
	t.Parallel()
	for alg, pair := range keyPairs {
		t.Run(alg, func(t *testing.T) { refuseBadTokens(t, pair[0]()) })
	}
}

func refuseBadTokens(t *testing.T, signing string) {
	v := newService(t, "JWT_PRIVATE_KEY", signing)
	key, good := privateKey(t, signing), v.bearer
	header, payload := readPart(t, good, 0), readPart(t, good, 1)
	readSelf := func(token string) answer { return v.api(token, "GET", "/agents/"+v.id, "") }
	v.want(readSelf(forge(t, key, header, payload)), 200, "")

	refused := func(name, token string) {
		t.Helper()
		if v.isActive(token) {
			t.Errorf("%s: introspected as active: %q", name, token)
		}
		// Neither Go's client nor a server lets control characters into a
		// header, nor more than 16 kB.
		if strings.ContainsAny(token, "\r\n\x00") || len(token) > 10<<10 {
			return
		}
		a := readSelf(token)
		challenge := a.header.Get("WWW-Authenticate")
		if a.status != 401 || a.code() != "UNAUTHORIZED" || !strings.Contains(challenge, `Bearer `) || !strings.Contains(challenge, `error="invalid_token"`) {
			t.Errorf("%s: GET with %q answered %v, %q, want 401 and invalid_token", name, token, a, challenge)
		}
	}
	for _, bad := range badTokens(t, key, good, time.Now()) {
		if bad.name == "space before the token" { // in a header that is one more space after the scheme
			continue
		}
		refused(bad.name, bad.token)
	}
	refused("of another time's key", forge(t, privateKey(t, thirdKey()), header, payload))

	// The log's own signature opens no door.
	a := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, "")
	refused("checkpoint", a.text("checkpoint"))
	if a.text("checkpoint") == "" {
		t.Error("there is no checkpoint")
	}
}

// Whoever signs with the next key must be understood by copies that still sign
// with the last one, and the other way round.
func TestKeysRotateWithoutRefusals(t *testing.T) {
	t.Parallel()
	for name, keys := range map[string][2]string{
		"RS256": {testKey(), secondKey()}, "RS256 to ES256": {testKey(), ellipticKey()}, "ES256 to RS256": {ellipticKey(), testKey()},
	} {
		t.Run(name, func(t *testing.T) { rotateKeys(t, keys[0], keys[1]) })
	}
}

func rotateKeys(t *testing.T, oldKey, newKey string) {
	before := newService(t, "JWT_PRIVATE_KEY", oldKey, "JWT_PUBLIC_KEY", publicPEM(t, newKey))
	after := before.another("JWT_PRIVATE_KEY", newKey, "JWT_PUBLIC_KEY", publicPEM(t, oldKey)+publicPEM(t, thirdKey()))
	last := before.another("JWT_PRIVATE_KEY", newKey, "JWT_PUBLIC_KEY", "")
	ofOld, ofNew := before.bearer, after.token(before.id, before.secret, "")
	after.bearer, last.bearer = ofNew, ofNew

	kid := func(token string) string {
		var h struct{ Kid string }
		if err := json.Unmarshal([]byte(readPart(t, token, 0)), &h); err != nil {
			t.Fatal(err)
		}
		return h.Kid
	}
	published := func(v *service) (kids []string) {
		for _, k := range v.want(v.do("GET", "/.well-known/jwks.json", ""), 200, "").body["keys"].([]any) {
			kids = append(kids, k.(map[string]any)["kid"].(string))
		}
		return kids
	}
	if kid(ofOld) == kid(ofNew) {
		t.Fatal("the new key does not sign")
	}
	for _, row := range []struct {
		name     string
		v        *service
		keys     int
		old, new bool
	}{
		{"next key published", before, 2, true, true},
		{"next key signs", after, 3, true, true},
		{"last key retired", last, 1, false, true},
	} {
		kids := published(row.v)
		if len(kids) != row.keys || len(slices.Compact(slices.Sorted(slices.Values(kids)))) != row.keys {
			t.Errorf("%s: published are %q, want %d different ones", row.name, kids, row.keys)
		}
		for token, want := range map[string]bool{ofOld: row.old, ofNew: row.new} {
			if slices.Contains(kids, kid(token)) != want {
				t.Errorf("%s: kid %s among %q = %v, want %v", row.name, kid(token), kids, !want, want)
			}
			if got := row.v.isActive(token); got != want {
				t.Errorf("%s: token of kid %s is active = %v, want %v", row.name, kid(token), got, want)
			}
			status := map[bool]int{true: 200, false: 401}[want]
			if a := row.v.api(token, "GET", "/agents/"+before.id, ""); a.status != status {
				t.Errorf("%s: GET with the token of kid %s answered %v, want %d", row.name, kid(token), a, status)
			}
		}
	}
}

// A resource server finds the keys by the metadata and verifies a token with
// nothing but the standard library.
func TestResourceServerVerifiesByPublishedKeys(t *testing.T) {
	t.Parallel()
	for alg, pair := range keyPairs {
		t.Run(alg, func(t *testing.T) { verifyByPublishedKeys(t, alg, pair[0](), publicPEM(t, pair[1]())) })
	}
}

func verifyByPublishedKeys(t *testing.T, alg, private, public string) {
	v := newService(t, "JWT_PRIVATE_KEY", private, "JWT_PUBLIC_KEY", public)
	fetch := func(address string) answer {
		t.Helper()
		path, ours := strings.CutPrefix(address, v.url)
		if !ours {
			t.Fatalf("%q is not below %q", address, v.url)
		}
		a := v.want(v.do("GET", path, ""), 200, "")
		if got := a.header.Get("Content-Type"); got != "application/json" {
			t.Errorf("%s is of type %q, want application/json", path, got)
		}
		if got := a.header.Get("Cache-Control"); got != "public, max-age=300" {
			t.Errorf("%s has Cache-Control %q, want it cacheable", path, got)
		}
		return a
	}
	metadata := fetch(v.url + "/.well-known/oauth-authorization-server")
	token := v.bearer
	var header struct{ Alg, Typ, Kid string }
	var c struct {
		Iss, Sub, Aud, Scope, Jti string
		ClientID                  string `json:"client_id"`
		Iat, Exp                  int64
	}
	if err := json.Unmarshal([]byte(readPart(t, token, 0)), &header); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(readPart(t, token, 1)), &c); err != nil {
		t.Fatal(err)
	}
	if header.Alg != alg || header.Typ != "at+jwt" {
		t.Errorf("the header of a token is %v, want %s and at+jwt", header, alg)
	}
	if c.Iss != metadata.text("issuer") || c.Aud != c.Iss || c.Sub != v.id || c.ClientID != v.id || !isID(c.Jti) || c.Exp-c.Iat != 3600 {
		t.Errorf("the claims of a token are %+v", c)
	}

	verified, kids := 0, map[string]bool{}
	for _, entry := range fetch(metadata.text("jwks_uri")).body["keys"].([]any) {
		k := entry.(map[string]any)
		// Exactly these: every other member of a key is private, or a trap for
		// some client (RFC 7518, sections 6.2.1 and 6.3.1).
		members, kty := "[alg e kid kty n use]", "RSA"
		if alg == "ES256" {
			members, kty = "[alg crv kid kty use x y]", "EC"
		}
		if names := fmt.Sprint(slices.Sorted(maps.Keys(k))); names != members {
			t.Errorf("a published key has %s, want %s", names, members)
		}
		if k["kty"] != kty || k["use"] != "sig" || k["alg"] != alg || kids[k["kid"].(string)] {
			t.Errorf("published is %v", k)
		}
		kids[k["kid"].(string)] = true
		number := func(name string) *big.Int {
			b, err := base64.RawURLEncoding.DecodeString(k[name].(string))
			if err != nil {
				t.Fatal(err)
			}
			return new(big.Int).SetBytes(b)
		}
		text := fmt.Sprintf(`{"e":%q,"kty":"RSA","n":%q}`, k["e"], k["n"])
		if alg == "ES256" {
			text = fmt.Sprintf(`{"crv":"P-256","kty":"EC","x":%q,"y":%q}`, k["x"], k["y"])
		}
		if thumbprint := sha256.Sum256([]byte(text)); k["kid"] != encode(string(thumbprint[:])) {
			t.Errorf("the kid %v is not the thumbprint of its key (RFC 7638)", k["kid"])
		}
		if k["kid"] != header.Kid {
			continue
		}
		signed, sig64, _ := cutLast(token, ".")
		sig, err := base64.RawURLEncoding.DecodeString(sig64)
		if err != nil {
			t.Fatal(err)
		}
		digest := sha256.Sum256([]byte(signed))
		good := false
		if alg == "RS256" {
			public := &rsa.PublicKey{N: number("n"), E: int(number("e").Int64())}
			good = rsa.VerifyPKCS1v15(public, crypto.SHA256, digest[:], sig) == nil
		} else {
			public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, fixed(number("x"), number("y"))...))
			if err != nil {
				t.Fatal(err)
			}
			good = ecdsa.Verify(public, digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:]))
		}
		if !good {
			t.Error("the token does not verify with the published key")
		}
		verified++
	}
	if verified != 1 || len(kids) != 2 {
		t.Errorf("%d of %d published keys verify the token, want 1 of 2", verified, len(kids))
	}
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// What real client libraries insist on in RFC 8414 metadata, and what they
// probe for beside it.
func TestMetadataThatClientsAccept(t *testing.T) {
	t.Parallel()
	v := newService(t)
	a := v.want(v.do("GET", "/.well-known/oauth-authorization-server", ""), 200, "")
	if same := v.want(v.do("GET", "/.well-known/openid-configuration", ""), 200, ""); same.raw != a.raw {
		t.Errorf("there are two documents, %v and %v, want one", a, same)
	}
	methods, algs := "[client_secret_basic client_secret_post private_key_jwt]", "[RS256 PS256 ES256 EdDSA Ed25519]"
	want := map[string]string{
		"issuer":                                        v.url,
		"authorization_endpoint":                        v.url + "/api/v1/authorize",
		"token_endpoint":                                v.url + "/api/v1/token",
		"introspection_endpoint":                        v.url + "/api/v1/token/introspect",
		"revocation_endpoint":                           v.url + "/api/v1/token/revoke",
		"jwks_uri":                                      v.url + "/.well-known/jwks.json",
		"grant_types_supported":                         "[client_credentials urn:ietf:params:oauth:grant-type:token-exchange]",
		"response_types_supported":                      "[none]",
		"code_challenge_methods_supported":              "[S256]",
		"scopes_supported":                              "[agents:read agents:write tokens:read audit:read credentials:write]",
		"subject_types_supported":                       "[public]",
		"id_token_signing_alg_values_supported":         "[RS256]",
		"dpop_signing_alg_values_supported":             algs,
		"token_endpoint_auth_methods_supported":         methods,
		"introspection_endpoint_auth_methods_supported": methods,
		"revocation_endpoint_auth_methods_supported":    methods,

		"token_endpoint_auth_signing_alg_values_supported":         algs,
		"introspection_endpoint_auth_signing_alg_values_supported": algs,
		"revocation_endpoint_auth_signing_alg_values_supported":    algs,
	}
	for name, value := range want {
		if got := fmt.Sprint(a.body[name]); got != value {
			t.Errorf("metadata has %s %s, want %s", name, got, value)
		}
	}
	for name := range a.body {
		if _, expected := want[name]; !expected {
			t.Errorf("metadata has %s, which nothing here serves", name)
		}
	}
	v.want(v.do("GET", "/api/v1/authorize?response_type=code&client_id=x&redirect_uri=https://evil.example.com", ""), 400, "unsupported_response_type")
	// Clients probe this: JSON, whatever the answer. do insists on it.
	v.want(v.do("GET", "/.well-known/oauth-authorization-server/api/v1", ""), 404, "NOT_FOUND")
}

// What who is refused for want of a token learns of where to get one.
func TestProtectedResourceSaysWhoIssuesItsTokens(t *testing.T) {
	t.Parallel()
	v := newService(t)
	a := v.want(v.do("GET", "/api/v1/agents", ""), 401, "UNAUTHORIZED")
	_, where, _ := strings.Cut(a.header.Get("WWW-Authenticate"), `resource_metadata="`+v.url)
	where = strings.TrimSuffix(where, `"`)
	a = v.want(v.do("GET", where, ""), 200, "")
	for name, want := range map[string]string{
		"resource": v.url, "authorization_servers": "[" + v.url + "]", "jwks_uri": v.url + "/.well-known/jwks.json",
		"scopes_supported": fmt.Sprint(ourScopes), "bearer_methods_supported": "[header]",
	} {
		if got := fmt.Sprint(a.body[name]); got != want {
			t.Errorf("the resource has %s %s, want %s", name, got, want)
		}
	}
	// A token for that resource is one for us.
	token := v.want(v.form(v.id, v.secret, "", "grant_type=client_credentials&resource="+a.text("resource")), 200, "").text("access_token")
	v.want(v.api(token, "GET", "/agents", ""), 200, "")
}
