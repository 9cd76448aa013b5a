package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
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
		key, err := newKeyPEM(alg)
		if err != nil {
			panic(err)
		}
		return string(key)
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

// readKeys is what the configuration does with both variables.
func readKeys(private, public string) (*keyset, error) {
	k, err := newKeyset(private)
	if err == nil && public != "" {
		err = k.publish(public)
	}
	return k, err
}

func mustReadKeys(t testing.TB, private, public string) *keyset {
	t.Helper()
	k, err := readKeys(private, public)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// readPart decodes the header (0) or the payload (1) of a token.
func readPart(t testing.TB, token string, i int) string {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[i])
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
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

// goodClaims are valid at now for an hour.
func goodClaims(now time.Time) claims {
	return claims{
		Issuer: testIssuer, Subject: newID(), Audience: audience{testIssuer}, ClientID: newID(), Scope: "resumes:read resumes:score",
		ID: newID(), IssuedAt: now.Unix(), Expires: now.Unix() + 3600, CredentialID: newID(), SecretID: newID(),
	}
}

// An access token lives from iat, minus what another copy's clock may be
// ahead, to just before exp (RFC 7519, section 4.1.4).
func TestVerifyHoldsTheTimes(t *testing.T) {
	t.Parallel()
	keys, issued := mustReadKeys(t, testKey(), ""), time.Unix(1_800_000_000, 0)
	token, err := keys.sign(accessToken, goodClaims(issued))
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		after time.Duration
		good  bool
	}{
		{-time.Hour, false}, {-(clockSkew + 1) * time.Second, false}, {-clockSkew * time.Second, true}, {0, true},
		{time.Hour - time.Second, true}, {time.Hour - time.Nanosecond, true}, {time.Hour, false}, {24 * time.Hour, false},
	} {
		if _, err := keys.verifyAt(token, testIssuer, issued.Add(row.after)); (err == nil) != row.good {
			t.Errorf("verify %v after iat = %v, want good %v", row.after, err, row.good)
		}
	}
}

// An audience of one is a string, of several an array, and each has one form.
// What verify has found once it needn't find again, but only that, and not for
// ever more tokens.
func TestMemoKnowsOnlyTokensThatWereGood(t *testing.T) {
	t.Parallel()
	keys, other, now := mustReadKeys(t, ellipticKey(), ""), mustReadKeys(t, secondEllipticKey(), ""), time.Now()
	want := goodClaims(now)
	good, err := keys.sign(accessToken, want)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.verifyAt(good, testIssuer, now); err == nil || len(other.opened.values) != 0 {
		t.Errorf("another key's token is verified (%v) or remembered", err)
	}
	for range 3 {
		if c, err := keys.verifyAt(good, testIssuer, now); err != nil || fmt.Sprint(c) != fmt.Sprint(want) || len(keys.opened.values) != 1 {
			t.Fatalf("verify = %v, %v, and %d tokens are remembered", c, err, len(keys.opened.values))
		}
	}
	if _, err := keys.verifyAt(good, testIssuer+"/", now); err == nil {
		t.Error("a token that is remembered is good for another issuer")
	}
	if err := keys.open(auditCheckpoint, good, &checkpoint{}); err == nil {
		t.Error("a token that is remembered is a checkpoint")
	}
	var m memo[int]
	for i := range 2 * memoSize {
		m.put(sha256.Sum256(fmt.Append(nil, i)), i)
	}
	if v, ok := m.get(sha256.Sum256(fmt.Append(nil, 2*memoSize-1))); len(m.values) != memoSize || !ok || v != 2*memoSize-1 {
		t.Errorf("of twice as many, %d are remembered and the last as %d, %v", len(m.values), v, ok)
	}
}

func TestAudienceForms(t *testing.T) {
	t.Parallel()
	keys, now := mustReadKeys(t, testKey(), ""), time.Now()
	for _, row := range []struct {
		aud  audience
		wire string
	}{
		{audience{"https://a.example"}, `"aud":"https://a.example"`},
		{audience{"https://a.example", "urn:b"}, `"aud":["https://a.example","urn:b"]`},
		{audience{"https://a.example/?x=<&>"}, `"aud":"https://a.example/?x=\u003c\u0026\u003e"`},
	} {
		c := goodClaims(now)
		c.Audience = row.aud
		token, err := keys.sign(accessToken, c)
		if err != nil {
			t.Fatal(err)
		}
		if payload := readPart(t, token, 1); !strings.Contains(payload, row.wire) {
			t.Errorf("sign(%q) makes %s, want %s", row.aud, payload, row.wire)
		}
		if got, err := keys.verifyAt(token, testIssuer, now); err != nil || !slices.Equal(got.Audience, row.aud) {
			t.Errorf("verify(sign(%q)) = %q, %v", row.aud, got.Audience, err)
		}
	}
	c := goodClaims(now)
	token, _ := keys.sign(accessToken, c)
	alone := withClaim(t, readPart(t, token, 1), "aud", `["`+testIssuer+`"]`)
	signed, err := keys.sign(accessToken, json.RawMessage(alone))
	if _, refusal := keys.verifyAt(signed, testIssuer, now); err != nil || refusal == nil {
		t.Error("an array of one audience is accepted, which we never write")
	}
}

// RFC 8725, section 3.11: what is signed for one purpose is worthless for
// another.
func TestCheckpointIsNoAccessToken(t *testing.T) {
	t.Parallel()
	keys, now := mustReadKeys(t, testKey(), ""), time.Now()
	c := goodClaims(now)
	for typ, other := range map[string]string{accessToken: auditCheckpoint, auditCheckpoint: accessToken} {
		token, err := keys.sign(typ, c)
		if err != nil {
			t.Fatal(err)
		}
		var into claims
		if err := keys.open(typ, token, &into); err != nil || into.ID != c.ID {
			t.Errorf("open(%q) of a %s = %v, want it open", typ, typ, err)
		}
		if err := keys.open(other, token, &into); err != errBadToken {
			t.Errorf("open(%q) of a %s = %v, want errBadToken", other, typ, err)
		}
		if _, err := keys.verifyAt(token, testIssuer, now); (err == nil) != (typ == accessToken) {
			t.Errorf("verify of a %s = %v", typ, err)
		}
	}
}

func TestKeysInEveryForm(t *testing.T) {
	t.Parallel()
	key := privateKey(t, testKey()).(*rsa.PrivateKey)
	pkcs1 := string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	public := pkix(t, &key.PublicKey)
	publicPKCS1 := string(pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(&key.PublicKey)}))
	second, third := publicPEM(t, secondKey()), publicPEM(t, thirdKey())
	sec1, err := x509.MarshalECPrivateKey(privateKey(t, ellipticKey()).(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	sec1PEM := string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}))
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384DER, err := x509.MarshalPKCS8PrivateKey(p384)
	if err != nil {
		t.Fatal(err)
	}
	p384PEM := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: p384DER}))
	_, ed25519Key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ed25519DER, err := x509.MarshalPKCS8PrivateKey(ed25519Key)
	if err != nil {
		t.Fatal(err)
	}
	ed25519PEM := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: ed25519DER}))
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	smallPEM := string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(small)}))
	// A public key of so many bits, which nobody has the private half of.
	sized := func(bits uint, e int) string {
		n := new(big.Int).SetBit(big.NewInt(1), int(bits)-1, 1)
		return pkix(t, &rsa.PublicKey{N: n, E: e})
	}
	escaped := func(text string) string { return strings.ReplaceAll(text, "\n", `\n`) }

	block := func(kind string, headers map[string]string) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Headers: headers, Bytes: []byte("garbage")}))
	}
	parameters := "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n" // prime256v1
	for _, row := range []struct {
		name, private, public string
		keys                  int // 0: refused
		why                   string
	}{
		{"PKCS#8", testKey(), "", 1, ""},
		{"PKCS#1", pkcs1, "", 1, ""},
		{"escaped newlines", escaped(testKey()), escaped(second + third), 3, ""},
		{"escaped newlines in PKCS#1", escaped(pkcs1), "", 1, ""},
		{"escaped CRLF", escaped(strings.ReplaceAll(testKey(), "\n", `\r`+"\n")), "", 1, ""},
		{"CR", strings.ReplaceAll(testKey(), "\n", "\r"), strings.ReplaceAll(second, "\n", "\r"), 2, ""},
		{"EC PARAMETERS before the key", parameters + sec1PEM, "", 1, ""},
		{"CRLF", strings.ReplaceAll(testKey(), "\n", "\r\n"), strings.ReplaceAll(second, "\n", "\r\n"), 2, ""},
		{"space around", "\n" + testKey() + "\n \n", "\n\n" + second + "\n\n" + third + "\n ", 3, ""},
		{"public keys in PKIX and PKCS#1", secondKey(), third + publicPKCS1, 3, ""},
		{"its own public key", testKey(), public, 1, ""},
		{"one public key in two forms", secondKey(), public + publicPKCS1 + public, 2, ""},
		{"P-256 in PKCS#8", ellipticKey(), "", 1, ""},
		{"P-256 in SEC 1", sec1PEM, publicPEM(t, ellipticKey()), 1, ""},
		{"both kinds", ellipticKey(), public + publicPEM(t, secondEllipticKey()), 3, ""},
		{"both kinds, the other way round", testKey(), publicPEM(t, ellipticKey()), 2, ""},
		{"public key of 2048 bits", testKey(), sized(2048, 65537), 2, ""},
		{"public key of 8192 bits", testKey(), sized(8192, 65537), 2, ""},

		{"nothing", "", "", 0, "not PEM"},
		{"garbage", "garbage", "", 0, "not PEM"},
		{"PEM of garbage", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("garbage")})), "", 0, "a PRIVATE KEY that can't be read"},
		{"cut short", testKey()[:len(testKey())/2], "", 0, "not PEM"},
		{"two private blocks", testKey() + secondKey(), "", 0, "more than one key"},
		{"text behind the private key", testKey() + "garbage", "", 0, "not PEM"},
		{"public key as private", public, "", 0, "public key, and the private"},
		{"P-384", p384PEM, "", 0, "curve P-384"},
		{"Ed25519", ed25519PEM, "", 0, "neither an RSA key nor"},
		{"private key of 1024 bits", smallPEM, "", 0, "1024 bits"},
		{"EC PARAMETERS alone", parameters, "", 0, "not PEM"},
		{"encrypted in PKCS#8", block("ENCRYPTED PRIVATE KEY", nil), "", 0, "encrypted"},
		{"encrypted in PKCS#1", block("RSA PRIVATE KEY", map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-256-CBC,00"}), "", 0, "encrypted"},
		{"a certificate", testKey(), block("CERTIFICATE", nil), 0, "a CERTIFICATE, which is no key"},
		{"quotes around", `"` + escaped(testKey()) + `"`, "", 0, "not PEM"},
		{"garbage as public", testKey(), "garbage", 0, "not PEM"},
		{"garbage behind the public key", testKey(), second + "garbage", 0, "not PEM"},
		{"garbage between public keys", testKey(), second + "-----BEGIN PUBLIC KEY-----\ngarbage\n-----END PUBLIC KEY-----\n" + third, 0, "not PEM"},
		{"private key as public", testKey(), secondKey(), 0, "private key where public"},
		{"public key of P-384", testKey(), pkix(t, &p384.PublicKey), 0, "curve P-384"},
		{"public key of Ed25519", testKey(), pkix(t, ed25519Key.Public()), 0, "neither an RSA key nor"},
		{"public key of 1024 bits", testKey(), pkix(t, &small.PublicKey), 0, "1024 bits"},
		{"public key of 2047 bits", testKey(), sized(2047, 65537), 0, "2047 bits"},
		{"public key of 8193 bits", testKey(), sized(8193, 65537), 0, "8193 bits"},
		{"public exponent 3", testKey(), sized(2048, 3), 0, "exponent 3"},
	} {
		k, err := readKeys(row.private, row.public)
		if row.keys == 0 {
			if err == nil {
				t.Errorf("%s: readKeys accepts it", row.name)
			} else if strings.Contains(err.Error(), "MII") || strings.Contains(err.Error(), "garbage") || !strings.Contains(err.Error(), row.why) {
				t.Errorf("%s: the error is %q, want %q and nothing of the key", row.name, err, row.why)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: readKeys = %v, want %d keys", row.name, err, row.keys)
			continue
		}
		if got := len(k.jwks()); got != row.keys {
			t.Errorf("%s: readKeys makes %d keys, want %d", row.name, got, row.keys)
		}
		// Whatever the form of the key, it signs and verifies.
		token, err := k.sign(accessToken, goodClaims(time.Now()))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.verifyAt(token, testIssuer, time.Now()); err != nil {
			t.Errorf("%s: verify(what it signed) = %v", row.name, err)
		}
	}
	if one, two := mustReadKeys(t, testKey(), "").jwks(), mustReadKeys(t, pkcs1, "").jwks(); !maps.Equal(one[0], two[0]) {
		t.Errorf("PKCS#8 and PKCS#1 of one key publish %v and %v", one, two)
	}
}

// The example of RFC 7638, section 3.1.
func TestThumbprintOfTheRFC(t *testing.T) {
	t.Parallel()
	const modulus = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-" +
		"5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08q" +
		"NLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
	n, err := base64.RawURLEncoding.DecodeString(modulus)
	if err != nil {
		t.Fatal(err)
	}
	public := pkix(t, &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537})
	got := mustReadKeys(t, testKey(), public).jwks()[1]
	want := map[string]string{"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs", "n": modulus, "e": "AQAB"}
	if !maps.Equal(got, want) {
		t.Errorf("the RFC's key is published as %v, want %v", got, want)
	}
}

// FuzzVerify puts text in place of any piece of a good token: nothing but that
// token itself is accepted.
func FuzzVerify(f *testing.F) {
	now := time.Now()
	keys, good := map[bool]*keyset{}, map[bool]string{}
	for alg, pair := range keyPairs {
		elliptic := alg == "ES256"
		keys[elliptic] = mustReadKeys(f, pair[0](), "")
		token, err := keys[elliptic].sign(accessToken, goodClaims(now))
		if err != nil {
			f.Fatal(err)
		}
		good[elliptic] = token
		f.Add(elliptic, uint16(0), uint16(0), "")
		f.Add(elliptic, uint16(0), uint16(len(token)), token)
		for _, text := range []string{".", "..", "\n", "=", "AAAA", "eyJhbGciOiJub25lIn0.", token[:40]} {
			f.Add(elliptic, uint16(9), uint16(1), text)
			f.Add(elliptic, uint16(len(token)), uint16(0), text)
		}
	}
	f.Fuzz(func(t *testing.T, elliptic bool, from, length uint16, text string) {
		good := good[elliptic]
		from = from % uint16(len(good)+1)
		end := min(int(from)+int(length), len(good))
		token := good[:from] + text + good[end:]
		c, err := keys[elliptic].verifyAt(token, testIssuer, now)
		if token == good {
			if err != nil {
				t.Errorf("verify(%q) = %v, want it good", token, err)
			}
		} else if err == nil || c.ID != "" {
			t.Errorf("verify(%q) = %v, %v, want an error", token, c, err)
		}
	})
}

// verifyAt is what the service does with a token at a time.
func (k *keyset) verifyAt(token, issuer string, now time.Time) (claims, error) {
	c, err := k.verify(token, issuer)
	if err == nil {
		err = c.validAt(now)
	}
	if err != nil {
		return claims{}, err
	}
	return c, nil
}
