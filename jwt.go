package main

import (
	"bytes"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"
)

// What a token is for is in the typ of its header, so that one can never pass
// for another (RFC 8725, section 3.11).
const (
	accessToken     = "at+jwt" // RFC 9068, section 2.1
	auditCheckpoint = "audit-checkpoint+jwt"
)

const (
	maxTokenBytes = 16 << 10 // longer ones are refused unread
	clockSkew     = 10       // seconds that another copy's clock may be ahead of ours
)

var (
	b64 = base64.RawURLEncoding

	// errBadToken says that a token is not one that is valid now. Why it isn't
	// is nobody's business but its issuer's, so there is only one of it.
	errBadToken = errors.New("not a valid token")

	errKey = errors.New("not RSA keys of 2048 to 8192 bits in PEM")
)

// claims are those of an access token (RFC 9068, section 2.2). The order here
// is the order on the wire, and nothing else is accepted there.
type claims struct {
	Issuer       string   `json:"iss"`
	Subject      string   `json:"sub"` // the agent, as client_id
	Audience     audience `json:"aud"`
	ClientID     string   `json:"client_id"`
	Scope        string   `json:"scope"` // separated by single spaces
	ID           string   `json:"jti"`
	IssuedAt     int64    `json:"iat"` // seconds since 1970
	Expires      int64    `json:"exp"` // seconds since 1970; refused from then on
	CredentialID string   `json:"credential_id"`
	SecretID     string   `json:"secret_id"` // changes when the credential is rotated
}

// revocationIDs are the ids by which a token can be revoked.
func (c claims) revocationIDs() []string {
	return []string{c.ID, c.SecretID, c.CredentialID, c.Subject}
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
type keyset struct {
	private *rsa.PrivateKey
	public  []publicKey // the signing key's first
	macKey  []byte
}

type publicKey struct {
	key     *rsa.PublicKey
	kid     string            // the thumbprint of the key (RFC 7638)
	headers map[string]string // by typ, the one encoded header that this key's tokens have
}

// newKeyset takes the key that signs: one PEM block, PKCS#8 or PKCS#1.
func newKeyset(text string) (*keyset, error) {
	keys, err := parsePEM(text)
	if err != nil {
		return nil, err
	}
	private, ok := keys[0].(*rsa.PrivateKey)
	if !ok || len(keys) != 1 {
		return nil, errKey
	}
	mac := sha256.Sum256(append([]byte("agentidp mac key"), private.D.Bytes()...))
	k := &keyset{private: private, macKey: mac[:]}
	return k, k.add(&private.PublicKey)
}

// publish takes further keys that verify: PEM blocks, PKIX or PKCS#1.
func (k *keyset) publish(text string) (any, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	if k == nil { // the key that signs is not right, and is complained of
		k = &keyset{}
	}
	keys, err := parsePEM(text)
	for _, key := range keys {
		if public, ok := key.(*rsa.PublicKey); !ok || k.add(public) != nil {
			return nil, errKey
		}
	}
	return nil, err
}

// parsePEM fails where there is anything but keys. \n may stand for a new
// line: many tools can't put those in a variable.
func parsePEM(text string) (keys []any, err error) {
	for rest := []byte(strings.ReplaceAll(text, `\n`, "\n")); len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		begun := bytes.Count(rest, []byte("-----BEGIN "))
		if block, rest = pem.Decode(rest); block == nil || bytes.Count(rest, []byte("-----BEGIN ")) != begun-1 {
			return nil, errKey // Decode skips a block that it can't read
		}
		var key any
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "PUBLIC KEY":
			key, err = x509.ParsePKIXPublicKey(block.Bytes)
		case "RSA PUBLIC KEY":
			key, err = x509.ParsePKCS1PublicKey(block.Bytes)
		}
		if err != nil || key == nil {
			return nil, errKey
		}
		keys = append(keys, key)
	}
	if keys == nil {
		return nil, errKey
	}
	return keys, nil
}

// add makes a key of 2048 to 8192 bits verify. A key that is there already is not added again, so
// that kids are unique.
func (k *keyset) add(key *rsa.PublicKey) error {
	if bits := key.N.BitLen(); bits < 2048 || bits > 8192 || key.E < 65537 {
		return errKey
	}
	n, e := encodeNumbers(key)
	sum := sha256.Sum256([]byte(`{"e":"` + e + `","kty":"RSA","n":"` + n + `"}`)) // RFC 7638, section 3.3
	kid := b64.EncodeToString(sum[:])
	for _, have := range k.public {
		if have.kid == kid {
			return nil
		}
	}
	headers := map[string]string{}
	for _, typ := range []string{accessToken, auditCheckpoint} {
		headers[typ] = b64.EncodeToString([]byte(`{"alg":"RS256","typ":"` + typ + `","kid":"` + kid + `"}`))
	}
	k.public = append(k.public, publicKey{key: key, kid: kid, headers: headers})
	return nil
}

func encodeNumbers(key *rsa.PublicKey) (n, e string) {
	return b64.EncodeToString(key.N.Bytes()), b64.EncodeToString(big.NewInt(int64(key.E)).Bytes())
}

// sign returns v as a JWT in compact form (RFC 7515, section 3.1), signed with
// RSASSA-PKCS1-v1_5 and SHA-256 (RFC 7518, section 3.3).
func (k *keyset) sign(typ string, v any) (string, error) {
	payload, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("encoding claims: %w", err)
	}
	signed := k.public[0].headers[typ] + "." + b64.EncodeToString(payload)
	digest := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPKCS1v15(nil, k.private, crypto.SHA256, digest[:])
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
	var key *rsa.PublicKey
	for _, p := range k.public {
		if header == p.headers[typ] {
			key = p.key
		}
	}
	if key == nil {
		return errBadToken
	}
	sig, err := decodeSegment(sig64)
	if err != nil {
		return errBadToken
	}
	digest := sha256.Sum256([]byte(header + "." + payload64))
	if rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], sig) != nil {
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

// verify returns the claims of an access token that issuer signed and that is
// valid now; else errBadToken. Audience and revocation are the caller's.
func (k *keyset) verify(token, issuer string, now time.Time) (claims, error) {
	var c claims
	if err := k.open(accessToken, token, &c); err != nil {
		return claims{}, err
	}
	if c.Issuer != issuer || c.Expires <= now.Unix() || c.IssuedAt > now.Unix()+clockSkew {
		return claims{}, errBadToken
	}
	return c, nil
}

// mac authenticates what we hand out and get back. It changes with the signing
// key. Label keeps its uses apart.
func (k *keyset) mac(label, message string) []byte {
	h := hmac.New(sha256.New, k.macKey)
	h.Write([]byte(label + "\x00" + message))
	return h.Sum(nil)
}

// jwks lists every key that verifies, the signing key's first, as it is
// published (RFC 7517, section 4).
func (k *keyset) jwks() []map[string]string {
	var list []map[string]string
	for _, p := range k.public {
		n, e := encodeNumbers(p.key)
		list = append(list, map[string]string{"kty": "RSA", "use": "sig", "alg": "RS256", "kid": p.kid, "n": n, "e": e})
	}
	return list
}

// newKeyPEM makes a signing key of 2048 bits, in PKCS#8.
func newKeyPEM() ([]byte, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
