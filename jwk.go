package main

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Keys of others, and what they sign; and how new ones are made. Ours are in jwt.go.

// A jwk is the public key of a client (RFC 7517), as it is stored: the members
// that make it, the one algorithm that it is for, and by what it is chosen.
type jwk struct {
	Kty string `json:"kty"`
	Crv string `json:"crv,omitempty"`
	N   string `json:"n,omitempty"`
	E   string `json:"e,omitempty"`
	X   string `json:"x,omitempty"`
	Y   string `json:"y,omitempty"`
	Alg string `json:"alg"`
	Kid string `json:"kid,omitempty"`
}

var kidPattern = regexp.MustCompile(`^[ -~]{1,200}$`)

var assertionAlgs = []string{"RS256", "PS256", "ES256", "EdDSA", "Ed25519"}

// readJWK takes what a client registers, and says what is wrong with it. Members
// that it doesn't know are left out, as RFC 7517 wants it in section 4.
func readJWK(value any) (k jwk, err error) {
	members, ok := value.(map[string]any)
	if !ok {
		return k, errors.New("must be a public key as a JWK, like {\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":...,\"y\":...}")
	}
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} { // RFC 7518, section 6
		if _, private := members[name]; private {
			return k, fmt.Errorf("must be a public key, and this has the private member %s: don't use this key any more, it has been shown", name)
		}
	}
	for name, to := range map[string]*string{"kty": &k.Kty, "crv": &k.Crv, "n": &k.N, "e": &k.E, "x": &k.X, "y": &k.Y, "alg": &k.Alg, "kid": &k.Kid} {
		if *to, ok = members[name].(string); !ok && members[name] != nil {
			return k, fmt.Errorf("must have text as its %s", name)
		}
	}
	if use := members["use"]; use != nil && use != "sig" && use != "jwt-svid" { // as a trust domain of SPIFFE has it
		return k, errors.New("must be a key for signatures; its use is another")
	}
	if ops, ok := members["key_ops"].([]any); members["key_ops"] != nil && (!ok || !slices.Contains(ops, any("verify"))) {
		return k, errors.New("must be a key that verifies; its key_ops lack that")
	}
	if k.Kid != "" && !kidPattern.MatchString(k.Kid) {
		return k, errors.New("must have a kid of at most 200 printable characters of ASCII")
	}
	fits := map[string][]string{"RSA ": {"RS256", "PS256"}, "EC P-256": {"ES256"}, "OKP Ed25519": {"EdDSA", "Ed25519"}}[k.Kty+" "+k.Crv]
	if fits == nil {
		return k, errors.New("must be of RSA, P-256 or Ed25519: kty RSA, or EC with crv P-256, or OKP with crv Ed25519")
	}
	if k.Alg == "" {
		k.Alg = fits[0]
	}
	switch k.Kty { // no members of other kinds
	case "RSA":
		k.X, k.Y = "", ""
	case "EC":
		k.N, k.E = "", ""
	case "OKP":
		k.N, k.E, k.Y = "", "", ""
	}
	if !slices.Contains(fits, k.Alg) {
		return k, fmt.Errorf("must have one of %s as its alg, or none", strings.Join(fits, ", "))
	}
	public, err := k.public()
	if key, ok := public.(ed25519.PublicKey); ok && !isEdwards(key) {
		return k, errors.New("must have as its x a point of Ed25519, and none for which anybody can sign")
	}
	return k, err
}

// public is the key itself. It fails where that isn't one, or too small.
func (k jwk) public() (crypto.PublicKey, error) {
	n, nErr := decodeSegment(k.N)
	x, xErr := decodeSegment(k.X)
	y, yErr := decodeSegment(k.Y)
	if errors.Join(nErr, xErr, yErr) != nil {
		return nil, errors.New("must have its numbers in base64url without padding")
	}
	switch k.Kty {
	case "RSA":
		key := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537} // a larger one would cost us more for each that is wrong
		if bits := key.N.BitLen(); bits < 2048 || bits > 8192 || k.E != "AQAB" || key.N.Bit(0) == 0 || n[0] == 0 {
			return nil, errors.New("must have an odd n of 2048 to 8192 bits without zeros in front (RFC 7518, section 6.3.1), and AQAB as its e, which is 65537")
		}
		return key, nil
	case "EC":
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y))
		if len(x) != 32 || err != nil {
			return nil, errors.New("must have x and y of 32 bytes each, which are a point of P-256")
		}
		return key, nil
	}
	if len(x) != ed25519.PublicKeySize {
		return nil, errors.New("must have an x of 32 bytes")
	}
	return ed25519.PublicKey(x), nil
}

var edwardsPrime = new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19))

// isEdwards tells whether there is a point with this y, since x² = (y²-1) / (dy²+1) is a
// square (RFC 8032, section 5.1.3; d is -121665/121666), and one of large order. Of one of
// small order anybody can sign for some texts: y is 0, 1 or -1, or x² = -y², of which the
// double has y = 0.
func isEdwards(point []byte) bool {
	number := slices.Clone(point)
	slices.Reverse(number)
	number[0] &= 0x7f // without the sign of x
	y2 := new(big.Int).Exp(new(big.Int).SetBytes(number), big.NewInt(2), edwardsPrime)
	over := new(big.Int).Sub(y2, big.NewInt(1))
	over.Mul(over, big.NewInt(121666)) // both 121666 times
	under := new(big.Int).Mul(y2, big.NewInt(121665))
	under.Sub(big.NewInt(121666), under)
	eighth := new(big.Int).Mul(y2, under)
	eighth.Add(eighth, over).Mod(eighth, edwardsPrime)
	square := new(big.Int).Mul(over, under)
	return y2.Sign() != 0 && eighth.Sign() != 0 && big.Jacobi(square.Mod(square, edwardsPrime), edwardsPrime) == 1
}

// thumbprint is that of RFC 7638, section 3: of the members that make a key of
// its kind, in the order of their names, and no others. A key has only one.
func (k jwk) thumbprint() string {
	text := map[string]string{
		"RSA": `{"e":"` + k.E + `","kty":"RSA","n":"` + k.N + `"}`,
		"EC":  `{"crv":"P-256","kty":"EC","x":"` + k.X + `","y":"` + k.Y + `"}`,
		"OKP": `{"crv":"Ed25519","kty":"OKP","x":"` + k.X + `"}`,
	}[k.Kty]
	sum := sha256.Sum256([]byte(text))
	return b64.EncodeToString(sum[:])
}

// verifies tells whether the key has signed this. It is for one algorithm, so that
// nobody can choose another (RFC 8725, section 3.1).
func (k jwk) verifies(a assertion) bool {
	if a.alg != k.Alg && (k.Kty != "OKP" || !slices.Contains(assertionAlgs[3:], a.alg)) { // the two names are one algorithm (RFC 9864)
		return false
	}
	public, err := k.public()
	if err != nil {
		return false
	}
	digest := sha256.Sum256([]byte(a.signed))
	switch key := public.(type) {
	case *rsa.PublicKey:
		if k.Alg == "PS256" { // RFC 7518, section 3.5: the salt is as long as the digest
			return rsa.VerifyPSS(key, crypto.SHA256, digest[:], a.sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], a.sig) == nil
	case *ecdsa.PublicKey:
		return len(a.sig) == 64 && ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(a.sig[:32]), new(big.Int).SetBytes(a.sig[32:]))
	case ed25519.PublicKey:
		return ed25519.Verify(key, []byte(a.signed), a.sig)
	}
	return false
}

const assertionLife = 5 * time.Minute // that one of a client may live on, by our clock

// An assertion is what one says. Nothing of it is true before a key verifies it.
// What its header says of keys (jwk, jku, x5u, x5c) is not looked at, but the jwk of a proof (dpop.go).
type assertion struct {
	signed   string // header and payload, as they came
	header   map[string]any
	sig      []byte
	typ, alg string
	kid      string // "" where it doesn't say
	issuer   string // "" too
	sub      string
	id       string // its jti; "" too
	exp      time.Time
	claims   map[string]any
}

// useID is an id of what tells assertions apart: a UUID of version 8 (RFC 9562, section
// 5.8), which no jti of ours is.
func (a assertion) useID() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d:%s%s", len(a.issuer), a.issuer, a.id))
	return uuid([16]byte(sum[:16]), 8)
}

// A flaw is what is wrong with an assertion, which who has sent it may know: it goes
// on behind "The assertion".
type flaw string

func (f flaw) Error() string { return string(f) }

const replayed = flaw("was used before; each needs a jti of its own")

// readAssertion reads what has the right form, and fails with a flaw.
func readAssertion(text string) (a assertion, err error) {
	header64, rest, _ := strings.Cut(text, ".")
	payload64, sig64, _ := strings.Cut(rest, ".")
	header, headerErr := decodeObject(header64)
	claims, claimsErr := decodeObject(payload64)
	sig, sigErr := decodeSegment(sig64)
	if errors.Join(headerErr, claimsErr, sigErr) != nil {
		return a, flaw("must be a signed JWT: three parts of base64url without padding, JSON objects the first two")
	}
	if _, given := header["crit"]; given { // extensions that we don't know (RFC 7515, section 4.1.11)
		return a, flaw("must not have crit in its header")
	}
	a = assertion{signed: text[:len(header64)+1+len(payload64)], header: header, sig: sig, claims: claims}
	a.alg, _ = header["alg"].(string)
	if typ, given := header["typ"]; given {
		a.typ = cmp.Or(fmt.Sprint(typ), "empty")
	}
	a.kid, _ = header["kid"].(string)
	if _, given := header["kid"]; given && !kidPattern.MatchString(a.kid) {
		return a, flaw("must have a kid of 1 to 200 printable characters of ASCII, or none")
	}
	for name, to := range map[string]*string{"iss": &a.issuer, "sub": &a.sub, "jti": &a.id} {
		if *to, _ = claims[name].(string); claims[name] != nil && *to == "" || len(*to) > 512 {
			return a, flaw(fmt.Sprintf("must have %s, a text of at most 512 bytes", name))
		}
	}
	if path, ok := strings.CutPrefix(a.sub, "spiffe://"); ok && a.issuer == "" {
		domain, _, _ := strings.Cut(path, "/")
		a.issuer = "spiffe://" + domain // a JWT-SVID has a trust domain in place of an issuer
	}
	exp, _ := claims["exp"].(float64)
	a.exp = time.Unix(int64(min(max(exp, 0), 1<<40))+1, 0)
	return a, nil
}

// check refuses what is not of one of these types, not for one of these audiences
// alone, lacks one of these claims, or is not valid now and for no longer than life.
func (a assertion) check(now time.Time, life time.Duration, types, audiences []string, needed ...string) error {
	if a.typ != "" && !slices.ContainsFunc(types, func(typ string) bool { return strings.EqualFold(typ, a.typ) }) {
		return flaw("must have the typ " + strings.Join(types, " or ") + ", or none")
	}
	for _, name := range needed {
		if a.claims[name] == nil {
			return flaw(fmt.Sprintf("must have %s, a text of at most 512 bytes", name))
		}
	}
	aud, one := a.claims["aud"].(string)
	if list, _ := a.claims["aud"].([]any); len(list) == 1 {
		aud, one = list[0].(string)
	}
	if !one || !slices.Contains(audiences, strings.TrimSuffix(aud, "/")) {
		return flaw("must have the aud " + audiences[0] + ", the issuer and nothing else")
	}
	exp, hasExp := a.claims["exp"].(float64)
	at := float64(now.Unix())
	switch {
	case !hasExp || exp <= at:
		return flaw("must have an exp that is to come, in seconds since 1970")
	case exp > at+life.Seconds()+clockSkew:
		return flaw(fmt.Sprintf("must have an exp within %v", life))
	}
	if a.claims["cnf"] != nil {
		return flaw("must not be bound to a key by cnf, since that isn't asked for here")
	}
	if a.claims["act"] != nil { // who has it is not its sub (RFC 8693, section 4.1)
		return flaw("must not have act: it is of one that acts for its sub, and is not that")
	}
	for _, name := range []string{"iat", "nbf"} {
		if t, ok := a.claims[name].(float64); a.claims[name] != nil && (!ok || t > at+clockSkew) {
			return flaw(fmt.Sprintf("must have %s in the past, in seconds since 1970, or none", name))
		}
	}
	return nil
}

// decodeObject reads an object of JSON in base64url.
func decodeObject(text string) (object map[string]any, err error) {
	b, err := decodeSegment(text)
	if err == nil {
		err = json.Unmarshal(b, &object)
	}
	if err == nil && object == nil {
		err = errBadToken // null
	}
	return object, err
}

// newKeyPEM makes a signing key for RS256 (of 2048 bits) or ES256, in PKCS#8.
func newKeyPEM(alg string) ([]byte, error) {
	var key any
	var err error
	if alg == "ES256" {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	} else {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
