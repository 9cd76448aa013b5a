package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"time"
)

// What a token is for is in the typ of its header, so that one can never pass
// for another (RFC 8725, section 3.11).
const (
	accessToken     = "at+jwt" // RFC 9068, section 2.1
	auditCheckpoint = "audit-checkpoint+jwt"
	auditCursor     = "audit-cursor+jwt"
)

const (
	maxMemoBytes  = 2 << 10  // longer ones are opened each time
	maxTokenBytes = 15 << 10 // longer ones are refused unread; a body holds it
	maxTokenTTL   = 24 * time.Hour
	clockSkew     = 10 // seconds that a copy may be behind another in what it knows of PostgreSQL's clock
)

var (
	b64 = base64.RawURLEncoding

	// errBadToken says that a token is not ours. Why it isn't is nobody's
	// business but its issuer's, so there is only one of it.
	errBadToken = errors.New("no token that this service has signed, whole and unchanged; get one from POST /api/v1/token")
)

// claims are those of an access token (RFC 9068, section 2.2). The order here
// is the order on the wire, and nothing else is accepted there.
type claims struct {
	Issuer       string   `json:"iss"`
	Subject      string   `json:"sub"` // the agent that it acts for, mostly itself
	Audience     audience `json:"aud"`
	ClientID     string   `json:"client_id"` // the agent that it was issued to
	Scope        string   `json:"scope"`     // separated by single spaces
	ID           string   `json:"jti"`
	IssuedAt     int64    `json:"iat"` // seconds since 1970
	Expires      int64    `json:"exp"` // seconds since 1970; refused from then on
	CredentialID string   `json:"credential_id"`
	SecretID     string   `json:"secret_id"`       // changes when the credential is rotated
	Actor        *actor   `json:"act,omitempty"`   // of one that came by exchange: its client, and who acted before
	Chain        []origin `json:"chain,omitempty"` // and the tokens that it came from, the newest first
	Key          *holder  `json:"cnf,omitempty"`   // of one that only its holder can use
}

// A holder is who has the key that a token is bound to (RFC 9449, section 6.1).
type holder struct {
	Thumbprint string `json:"jkt"`
}

// An actor is who acts for the subject, and behind it who did before (RFC 8693,
// section 4.1).
type actor struct {
	Subject string `json:"sub"`
	Before  *actor `json:"act,omitempty"`
}

// An origin is what a token came from, or a client that proved itself. A token
// is alive while all of that is: nothing else has to be kept, copied or waited
// for when an agent or a credential is cut off. In a chain, of which sub and act
// name the agents, it has its ids, and no credential where another link has that.
type origin struct {
	AgentID      string `json:"-"`
	CredentialID string `json:"cred,omitempty"`
	SecretID     string `json:"secret,omitempty"` // changes when the credential is rotated
	TokenID      string `json:"jti,omitempty"`    // of a client ""
}

func (c claims) origin() origin { return origin{c.ClientID, c.CredentialID, c.SecretID, c.ID} }

// kind is the token_type, and the scheme behind which it goes.
func (c claims) kind() string {
	if c.Key == nil {
		return "Bearer"
	}
	return "DPoP"
}

// boundTo is the thumbprint of the key that it is bound to, or "".
func (c claims) boundTo() string {
	if c.Key == nil {
		return ""
	}
	return c.Key.Thumbprint
}

// origins are all that it came from, itself first.
func (c claims) origins() []origin { return append([]origin{c.origin()}, c.Chain...) }

// validAt tells the holder why a token isn't valid at this time, or nil.
func (c claims) validAt(now time.Time) error {
	switch {
	case c.Expires <= now.Unix():
		return fmt.Errorf("a token that expired at %s; get a new one", moment{time.Unix(c.Expires, 0)})
	case c.IssuedAt > now.Unix()+clockSkew:
		return fmt.Errorf("a token of a time to come, %s", moment{time.Unix(c.IssuedAt, 0)})
	}
	return nil
}

// An audience of one is a string on the wire, of several an array (RFC 7519,
// section 4.1.3).
type audience []string

func (a audience) MarshalJSON() ([]byte, error) {
	if len(a) == 1 {
		return json.Marshal(a[0])
	}
	return json.Marshal([]string(a))
}

func (a *audience) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		*a = audience{""}
		return json.Unmarshal(b, &(*a)[0])
	}
	return json.Unmarshal(b, (*[]string)(a))
}

// A keyset signs with one key and verifies with that and any number of others.
// The key decides the algorithm.
type keyset struct {
	private crypto.Signer
	public  []publicKey  // the signing key's first
	opened  memo[claims] // of access tokens
}

type publicKey struct {
	key     crypto.PublicKey
	jwk     map[string]string // as it is published; its kid is the thumbprint of the key (RFC 7638)
	headers map[string]string // by typ, the one encoded header that this key's tokens have
}

// sign returns v as a JWT in compact form (RFC 7515, section 3.1).
func (k *keyset) sign(typ string, v any) (string, error) {
	payload, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("encoding claims: %w", err)
	}
	signed := k.public[0].headers[typ] + "." + b64.EncodeToString(payload)
	digest := sha256.Sum256([]byte(signed))
	sig, err := k.private.Sign(nil, digest[:], crypto.SHA256) // PKCS #1 v1.5, or deterministic ECDSA (RFC 6979)
	if _, elliptic := k.private.(*ecdsa.PrivateKey); elliptic && err == nil {
		sig, err = fixedSize(sig)
	}
	if err != nil {
		return "", fmt.Errorf("signing: %w", err)
	}
	return signed + "." + b64.EncodeToString(sig), nil
}

// open reads a token of this type that one of our keys signed into v. It fails
// with errBadToken.
func (k *keyset) open(typ, token string, v any) error {
	if len(token) > maxTokenBytes {
		return errBadToken
	}
	header, rest, _ := strings.Cut(token, ".")
	payload64, sig64, _ := strings.Cut(rest, ".")
	// The header is compared whole, not read: a token can't choose its
	// algorithm or key (RFC 8725, section 3.1).
	i := slices.IndexFunc(k.public, func(p publicKey) bool { return header == p.headers[typ] })
	if i < 0 {
		return errBadToken
	}
	sig, err := decodeSegment(sig64)
	if err != nil {
		return errBadToken
	}
	digest := sha256.Sum256([]byte(header + "." + payload64))
	if !k.public[i].verifies(digest[:], sig) {
		return errBadToken
	}
	payload, err := decodeSegment(payload64)
	if err != nil || json.Unmarshal(payload, v) != nil {
		return errBadToken
	}
	// Repeated, unknown or oddly cased names, null, text for a number: only
	// what we would have written ourselves reads back to the same bytes.
	again, err := json.Marshal(v)
	if err != nil || string(again) != string(payload) {
		return errBadToken
	}
	return nil
}

// decodeSegment decodes base64url. Go's decoder skips newlines and spare bits
// even in strict mode, so insist on the one encoding we would have written.
func decodeSegment(s string) ([]byte, error) {
	b, err := b64.DecodeString(s)
	if err != nil || b64.EncodeToString(b) != s {
		return nil, errBadToken
	}
	return b, nil
}

// verify returns the claims of an access token that issuer signed. Else its
// error tells the holder what the token is. Whether it is valid now, for whom,
// and alive is the caller's.
func (k *keyset) verify(token, issuer string) (claims, error) {
	key := sha256.Sum256([]byte(token))
	c, known := k.opened.get(key)
	if !known {
		err := k.open(accessToken, token, &c)
		if err != nil || !isID(c.Subject) || !isID(c.ClientID) || !isID(c.ID) || !isID(c.CredentialID) || !isID(c.SecretID) {
			return claims{}, errBadToken
		}
		if len(token) <= maxMemoBytes {
			k.opened.put(key, c)
		}
	}
	if c.Issuer != issuer {
		return claims{}, fmt.Errorf("a token of the issuer %s; here it is %s", clip(c.Issuer), issuer)
	}
	return c, nil
}

// verifies tells whether sig is this key's signature of what has this digest.
func (p publicKey) verifies(digest, sig []byte) bool {
	switch key := p.key.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest, sig) == nil
	case *ecdsa.PublicKey:
		if len(sig) != 64 {
			return false
		}
		der, err := asn1.Marshal(ecdsaSignature{new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])})
		if err != nil || !ecdsa.VerifyASN1(key, digest, der) {
			return false
		}
		ours, err := fixedSize(der)
		return err == nil && bytes.Equal(sig, ours)
	}
	return false
}

// An ecdsaSignature is what Go has in ASN.1, and JWTs as two numbers of 32
// bytes (RFC 7518, section 3.4). With (r, s), (r, n-s) is good too. We write the
// one with the lesser s, and accept no other, so that a token has one form.
type ecdsaSignature struct{ R, S *big.Int }

func fixedSize(der []byte) ([]byte, error) {
	var sig ecdsaSignature
	if _, err := asn1.Unmarshal(der, &sig); err != nil {
		return nil, err
	}
	if other := new(big.Int).Sub(elliptic.P256().Params().N, sig.S); other.Cmp(sig.S) < 0 {
		sig.S = other
	}
	return append(sig.R.FillBytes(make([]byte, 32)), sig.S.FillBytes(make([]byte, 32))...), nil
}

// newKeyset takes the key that signs: one PEM block, PKCS#8, PKCS#1 or SEC 1.
func newKeyset(text string) (*keyset, error) {
	keys, err := parsePEM(text)
	if err != nil {
		return nil, err
	}
	private, ok := keys[0].(crypto.Signer)
	if !ok {
		return nil, errors.New("it is a public key, and the private one is needed; or it is one that can't sign")
	}
	if len(keys) != 1 {
		return nil, errors.New("it has more than one key; those of before go to JWT_PUBLIC_KEY, in public form")
	}
	k := &keyset{private: private}
	return k, k.add(private.Public())
}

// publish takes further keys that verify: PEM blocks, PKIX or PKCS#1.
func (k *keyset) publish(text string) error {
	if k == nil { // the key that signs is not right, and is complained of
		k = &keyset{}
	}
	keys, err := parsePEM(text)
	for _, key := range keys {
		if err == nil {
			err = k.add(key)
		}
	}
	return err
}

var errPEM = errors.New("it is not PEM: whole blocks from -----BEGIN to -----END and nothing else, in lines as they came or with \\n for each end of a line")

// parsePEM fails where there is anything but keys, and says why. \n may stand for
// a new line: many tools can't put those in a variable. Lines may end in any way.
func parsePEM(text string) (keys []any, err error) {
	text = strings.NewReplacer(`\r`, "", `\n`, "\n", "\r\n", "\n", "\r", "\n").Replace(text)
	for rest := []byte(text); len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		begun := bytes.Count(rest, []byte("-----BEGIN "))
		if block, rest = pem.Decode(rest); block == nil || bytes.Count(rest, []byte("-----BEGIN ")) != begun-1 {
			return nil, errPEM // Decode skips a block that it can't read
		}
		var key any
		switch block.Type {
		case "EC PARAMETERS": // openssl ecparam puts them before the key, which has them too
			continue
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "PUBLIC KEY":
			key, err = x509.ParsePKIXPublicKey(block.Bytes)
		case "RSA PUBLIC KEY":
			key, err = x509.ParsePKCS1PublicKey(block.Bytes)
		}
		switch {
		case block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "":
			return nil, errors.New("it is encrypted; openssl pkey -in FILE prints it as it is needed")
		case err != nil:
			return nil, errors.New("it has a " + clip(block.Type) + " that can't be read; want RSA of 2048 to 8192 bits, or P-256")
		case key == nil:
			return nil, errors.New("it has a " + clip(block.Type) + ", which is no key that is known here")
		}
		keys = append(keys, key)
	}
	if keys == nil {
		return nil, errPEM
	}
	return keys, nil
}

// add makes a public key verify: RSA of 2048 to 8192 bits, or P-256 (RFC 7518,
// sections 3.3 and 3.4). A key that is there already is not added again, so that
// kids are unique.
func (k *keyset) add(key crypto.PublicKey) error {
	var alg string
	var jwk map[string]string // the members that its thumbprint is made of
	switch key := key.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < 2048 || bits > 8192 || key.E < 65537 {
			return fmt.Errorf("it is an RSA key of %d bits with the exponent %d; want 2048 to 8192 bits, and 65537 or more", bits, key.E)
		}
		alg, jwk = "RS256", map[string]string{
			"kty": "RSA", "n": b64.EncodeToString(key.N.Bytes()), "e": b64.EncodeToString(big.NewInt(int64(key.E)).Bytes()),
		}
	case *ecdsa.PublicKey:
		point, err := key.Bytes() // 4, x and y
		if err != nil || key.Curve != elliptic.P256() {
			return fmt.Errorf("it is a key of the curve %s; want P-256", key.Params().Name)
		}
		alg, jwk = "ES256", map[string]string{
			"kty": "EC", "crv": "P-256", "x": b64.EncodeToString(point[1:33]), "y": b64.EncodeToString(point[33:]),
		}
	case crypto.Signer:
		return errors.New("it has a private key where public ones are published; openssl pkey -in FILE -pubout prints that")
	default:
		return errors.New("it is neither an RSA key nor one of P-256")
	}
	text, err := json.Marshal(jwk) // in the order of RFC 7638, section 3.3
	if err != nil {
		return fmt.Errorf("encoding a key: %w", err)
	}
	sum := sha256.Sum256(text)
	jwk["use"], jwk["alg"], jwk["kid"] = "sig", alg, b64.EncodeToString(sum[:])
	for _, have := range k.public {
		if have.jwk["kid"] == jwk["kid"] {
			return nil
		}
	}
	headers := map[string]string{}
	for _, typ := range []string{accessToken, auditCheckpoint, auditCursor} {
		headers[typ] = b64.EncodeToString([]byte(`{"alg":"` + alg + `","typ":"` + typ + `","kid":"` + jwk["kid"] + `"}`))
	}
	k.public = append(k.public, publicKey{key, jwk, headers})
	return nil
}

// each lists what the keys have as this member, once, the signing key's first.
func (k *keyset) each(member string) (list []string) {
	for _, p := range k.public {
		if !slices.Contains(list, p.jwk[member]) {
			list = append(list, p.jwk[member])
		}
	}
	return list
}

// jwks lists every key that verifies, the signing key's first, as it is
// published (RFC 7517, section 4).
func (k *keyset) jwks() (list []map[string]string) {
	for _, p := range k.public {
		list = append(list, p.jwk)
	}
	return list
}

// A memo remembers what a pure function has returned, for up to memoSize
// arguments. So nothing in it ever has to be invalidated.
type memo[V any] struct {
	mu     sync.Mutex
	values map[[sha256.Size]byte]V // by a digest of the argument
}

const memoSize = 1 << 14

func (m *memo[V]) get(key [sha256.Size]byte) (v V, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok = m.values[key]
	return v, ok
}

func (m *memo[V]) put(key [sha256.Size]byte, v V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.values == nil {
		m.values = map[[sha256.Size]byte]V{}
	}
	for old := range m.values { // Go begins anywhere
		if len(m.values) < memoSize {
			break
		}
		delete(m.values, old)
	}
	m.values[key] = v
}
