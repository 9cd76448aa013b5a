package test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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
	return members{"iss": clientID, "sub": clientID, "aud": v.env["ISSUER"], "jti": newID(), "iat": now, "exp": now + 240}
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

// forge signs a header and a payload as they are.
func (h holder) forge(header, payload string) string {
	signed := encode(header) + "." + encode(payload)
	return signed + "." + encode(string(h.signature(signed)))
}

// A badAssertion is one that nobody may be let in by: most are signed by the right
// key, so that nothing but the fault can refuse them. Says is what the answer says of it.
type badAssertion struct{ name, text, says string }

const unsigned = "No active key of this client has signed the client_assertion."

// signedWrong are assertions whose signature isn't what the key's algorithm makes of them.
func signedWrong(t testing.TB, v *service, h holder, id string) (bad []badAssertion) {
	t.Helper()
	add := func(name, text string) { bad = append(bad, badAssertion{name, text, unsigned}) }
	body := func(header members) string {
		return encode(header.String()) + "." + encode(v.assertionClaims(id).String())
	}
	with := func(alg any) members { return h.header().with(members{"alg": alg}) }
	number := base64.RawURLEncoding.EncodeToString

	// The algorithm is never the assertion's choice (RFC 8725, section 3.1).
	algs := []any{"none", "None", "NONE", "nOnE", "", nil, 1, true, []string{h.alg}, members{"alg": h.alg}, strings.ToLower(h.alg), h.alg + " ", h.alg + "\x00",
		"HS256", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "ES256", "ES384", "ES256K", "EdDSA", "Ed25519", "Ed448", "ES256, none"}
	for _, alg := range algs {
		if alg != any(h.alg) && !(h.jwk["kty"] == "OKP" && (alg == "EdDSA" || alg == "Ed25519")) { // which are one
			add(fmt.Sprintf("alg %q signed by the key", alg), h.sign(with(alg), v.assertionClaims(id)))
			add(fmt.Sprintf("alg %q without signature", alg), body(with(alg))+".")
		}
	}
	add("no alg", h.sign(h.header().without("alg"), v.assertionClaims(id)))
	add("ALG in place of alg", h.sign(h.header().without("alg").with(members{"ALG": h.alg}), v.assertionClaims(id)))
	add("alg twice, the other behind", h.forge(`{"alg":"`+h.alg+`","alg":"none"}`, v.assertionClaims(id).String()))

	// The public key is no secret.
	der, err := x509.MarshalPKIXPublicKey(h.private.Public())
	if err != nil {
		t.Fatal(err)
	}
	public := pkix(t, h.private.Public())
	secrets := map[string]string{"the public PEM": public, "the PEM without its last newline": strings.TrimSpace(public), "the public DER": string(der),
		"the public JWK": h.jwk.String(), "nothing": "", "the client's id": id}
	for _, name := range []string{"n", "x"} {
		if text, _ := h.jwk[name].(string); text != "" {
			b, _ := base64.RawURLEncoding.DecodeString(text)
			secrets["the bytes of "+name], secrets["the text of "+name] = string(b), text
		}
	}
	for name, secret := range secrets {
		for _, alg := range []string{"HS256", h.alg} {
			signed := body(with(alg))
			mac := hmac.New(sha256.New, []byte(secret))
			mac.Write([]byte(signed))
			add("HMAC with "+name+" as "+alg, signed+"."+number(mac.Sum(nil)))
		}
	}

	// Another key, of each kind, also one that the header brings along.
	for _, alg := range []string{"RS256", "PS256", "ES256", "EdDSA"} {
		other := newHolder(t, alg)
		add("another key, of "+alg, other.sign(h.header(), v.assertionClaims(id)))
		add("another key, of "+alg+", which says so", other.sign(other.header(), v.assertionClaims(id)))
		add("another key, of "+alg+", as jwk", other.sign(h.header().with(members{"jwk": other.jwk}), v.assertionClaims(id)))
		add("another key, of "+alg+", under the kid of the right one",
			other.sign(h.header().with(members{"kid": thumbprint(h.jwk)}), v.assertionClaims(id)))
	}

	signed := body(h.header())
	digest := sha256.Sum256([]byte(signed))
	sig := h.signature(signed)
	flipped := slices.Clone(sig)
	flipped[len(flipped)/2] ^= 1
	for name, sig := range map[string][]byte{
		"nothing": nil, "one bit more": flipped, "zeros": make([]byte, len(sig)), "a byte less": sig[:len(sig)-1], "a byte more": append(slices.Clone(sig), 0),
		"a zero before": append([]byte{0}, sig...), "itself twice": append(slices.Clone(sig), sig...), "one": append(make([]byte, len(sig)-1), 1),
		"the payload's": h.signature(strings.Split(signed, ".")[1]), "the signature of another": h.signature(body(h.header())),
		"the signature of its digest": h.signature(string(digest[:])),
	} {
		add("as signature "+name, signed+"."+number(sig))
	}
	switch key := h.private.(type) {
	case *rsa.PrivateKey:
		for name, options := range map[string]*rsa.PSSOptions{
			"a salt of 32": {SaltLength: 32}, "no salt": {SaltLength: 0}, "a salt of 20": {SaltLength: 20}, "a salt of 33": {SaltLength: 33}, "the longest salt": {SaltLength: 222},
		} {
			sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], options)
			if options.SaltLength == 0 {
				sig, err = pss(key, digest[:], nil, sha256.New()), nil
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.alg != "PS256" || options.SaltLength != 32 {
				add("PSS with "+name, signed+"."+number(sig))
			}
		}
		salt := make([]byte, 32)
		add("PSS with MGF1 of SHA-1", signed+"."+number(pss(key, digest[:], salt, sha1.New())))
		add("PSS with MGF1 of SHA-512", signed+"."+number(pss(key, digest[:], salt, sha512.New())))
		if h.alg == "PS256" { // and that is all that was wrong with those
			v.want(v.byAssertion("", signed+"."+number(pss(key, digest[:], salt, sha256.New()))), 200, "")
			sig, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
			if err != nil {
				t.Fatal(err)
			}
			add("PKCS #1 v1.5", signed+"."+number(sig))
		}
		for _, hash := range []crypto.Hash{crypto.SHA384, crypto.SHA512, crypto.SHA1, 0} {
			text := []byte(signed)
			if hash != 0 {
				w := hash.New()
				w.Write(text)
				text = w.Sum(nil)
			} else {
				text = digest[:]
			}
			sig, err := rsa.SignPKCS1v15(nil, key, hash, text)
			if err != nil {
				t.Fatal(err)
			}
			add(fmt.Sprintf("PKCS #1 v1.5 with the hash %d", hash), signed+"."+number(sig))
		}
		if longer := new(big.Int).Add(new(big.Int).SetBytes(sig), key.N); longer.BitLen() <= 8*len(sig) {
			add("the signature plus the modulus", signed+"."+number(longer.FillBytes(make([]byte, len(sig)))))
		}
	case *ecdsa.PrivateKey:
		r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
		der, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
		if err != nil {
			t.Fatal(err)
		}
		add("in ASN.1", signed+"."+number(der))
		// Psychic signatures (CVE-2022-21449) and their like.
		zero, one, most := new(big.Int), big.NewInt(1), new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 256), big.NewInt(1))
		p := key.Params().P
		for name, pair := range map[string][2]*big.Int{
			"r and s 0": {zero, zero}, "r 0": {zero, s}, "s 0": {r, zero}, "r and s 1": {one, one}, "r and s swapped": {s, r},
			"r and s the order": {orderP256, orderP256}, "r the order": {orderP256, s}, "s the order": {r, orderP256}, "r the order, s 1": {orderP256, one},
			"r and s the most": {most, most}, "r the prime": {p, s}, "r the prime less the order": {new(big.Int).Sub(p, orderP256), s},
		} {
			add(name, signed+"."+number(fixed(pair[0], pair[1])))
		}
		wide := append(r.FillBytes(make([]byte, 33)), s.FillBytes(make([]byte, 33))...)
		add("r and s of 33 bytes", signed+"."+number(wide))
	case ed25519.PrivateKey:
		// The same s, plus the order of the group, which RFC 8032, section 5.1.7, refuses.
		order, _ := new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)
		little := slices.Clone(sig[32:])
		slices.Reverse(little)
		more := new(big.Int).Add(new(big.Int).SetBytes(little), order).FillBytes(make([]byte, 32))
		slices.Reverse(more)
		add("s plus the order", signed+"."+number(append(slices.Clone(sig[:32]), more...)))
		wide := sha512.Sum512([]byte(signed))
		hashed, err := key.Sign(nil, wide[:], &ed25519.Options{Hash: crypto.SHA512})
		if err != nil {
			t.Fatal(err)
		}
		add("Ed25519ph", signed+"."+number(hashed))
		context, err := key.Sign(nil, []byte(signed), &ed25519.Options{Context: "JWS"})
		if err != nil {
			t.Fatal(err)
		}
		add("Ed25519ctx", signed+"."+number(context))
	}
	return bad
}

// pss is EMSA-PSS of RFC 8017, section 9.1, with SHA-256 and MGF1 of any hash.
func pss(key *rsa.PrivateKey, digest, salt []byte, mgf hash.Hash) []byte {
	size := key.Size()
	sum := sha256.Sum256(slices.Concat(make([]byte, 8), digest, salt))
	block := make([]byte, size-len(sum)-1)
	block[len(block)-len(salt)-1] = 1
	copy(block[len(block)-len(salt):], salt)
	for i, counter := 0, uint32(0); i < len(block); counter++ {
		mgf.Reset()
		mgf.Write(binary.BigEndian.AppendUint32(slices.Clone(sum[:]), counter))
		for _, c := range mgf.Sum(nil) {
			if i < len(block) {
				block[i] ^= c
			}
			i++
		}
	}
	block[0] &= 0x7f
	m := new(big.Int).SetBytes(slices.Concat(block, sum[:], []byte{0xbc}))
	return m.Exp(m, key.D, key.N).FillBytes(make([]byte, size))
}

// thumbprint is that of RFC 7638.
func thumbprint(jwk members) string {
	made := members{}
	for _, name := range map[any][]string{"RSA": {"e", "kty", "n"}, "EC": {"crv", "kty", "x", "y"}, "OKP": {"crv", "kty", "x"}}[jwk["kty"]] {
		made[name] = jwk[name]
	}
	sum := sha256.Sum256([]byte(made.String()))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// saidWrong are assertions that the right key has signed, and that say what none may.
func saidWrong(v *service, h holder, id string) (bad []badAssertion) {
	issuer, now := v.env["ISSUER"], time.Now().Unix()
	header := func(says string, changes ...members) {
		for _, change := range changes {
			bad = append(bad, badAssertion{"header with " + change.String(), h.sign(h.header().with(change), v.assertionClaims(id)), says})
		}
	}
	claim := func(says, name string, values ...any) {
		for _, value := range values {
			bad = append(bad, badAssertion{fmt.Sprintf("%s %.60s", name, fmt.Sprint(value)), h.sign(h.header(), v.assertionClaims(id).with(members{name: value})), says})
		}
	}
	missing := func(name, says string) {
		less := v.assertionClaims(id).without(name)
		bad = append(bad, badAssertion{"no " + name, h.sign(h.header(), less), says},
			badAssertion{name + " in upper case alone", h.sign(h.header(), less.with(members{strings.ToUpper(name): v.assertionClaims(id)[name]})), says})
	}
	header("must have the typ JWT", members{"typ": "at+jwt"}, members{"typ": "AT+JWT"}, members{"typ": "dpop+jwt"}, members{"typ": "application/at+jwt"},
		members{"typ": auditCheckpoint}, members{"typ": "audit-cursor+jwt"}, members{"typ": "id+jwt"}, members{"typ": "logout+jwt"}, members{"typ": "JWS"}, members{"typ": ""}, members{"typ": " JWT"},
		members{"typ": nil}, members{"typ": 1}, members{"typ": []string{"JWT"}})
	header("must not have crit", members{"crit": []string{"exp"}}, members{"crit": []string{}}, members{"crit": nil}, members{"crit": "exp"},
		members{"crit": []string{"b64"}, "b64": false}, members{"crit": []string{"b64"}, "b64": true})
	header("must have a kid of 1 to 200", members{"kid": ""}, members{"kid": nil}, members{"kid": 1}, members{"kid": []string{"a"}}, members{"kid": members{}},
		members{"kid": thumbprint(h.jwk) + "\x00"}, members{"kid": thumbprint(h.jwk) + "\n"}, members{"kid": "\x7f"}, members{"kid": "schlüssel"}, members{"kid": strings.Repeat("a", 201)})
	header(unsigned, members{"kid": "unknown"}, members{"kid": strings.Repeat("A", 43)}, members{"kid": "' or '1'='1"}, members{"kid": "'; drop table credentials; --"},
		members{"kid": "../../../../dev/null"}, members{"kid": "%"}, members{"kid": thumbprint(h.jwk)[:42]}, members{"kid": thumbprint(h.jwk) + " "}, members{"kid": "https://evil.example.com/jwks"})

	for _, name := range []string{"iss", "sub", "jti"} {
		claim("must have "+name+", a text", name, "", nil, 1, true, []string{id}, members{}, strings.Repeat("x", 513))
		missing(name, "must have "+name+", a text")
	}
	claim("must have the client_id as both iss and sub", "iss", newID(), issuer, "https://evil.example.com", strings.ToUpper(id), id+" ", id+"\x00")
	claim("must have the client_id as both iss and sub", "sub", newID(), v.id, strings.ToUpper(id), id+" ")
	for _, other := range []string{newID(), v.id, strings.ToUpper(id), "{" + id + "}", strings.ReplaceAll(id, "-", ""), "urn:uuid:" + id, id + " ", id + "\n", id + "\x00",
		"x", "\x00", "' or 1=1 --", strings.Repeat("0", 512)} {
		bad = append(bad, badAssertion{fmt.Sprintf("of the client %.60q", other), h.sign(h.header(), v.assertionClaims(other)), unsigned})
	}

	claim("must have the aud "+issuer, "aud", "", nil, 1, true, members{}, []string{}, []any{nil}, []any{1}, []any{[]string{issuer}}, []string{issuer, issuer},
		[]string{issuer, "https://evil.example.com"}, []string{"https://evil.example.com", issuer}, []string{issuer, ""}, issuer+"//", issuer+"/api", issuer+"/api/v1/token",
		issuer+"/api/v1/token/introspect", issuer+"/api/v1/token/revoke", []string{issuer + "/api/v1/token"}, issuer[:len(issuer)-1], issuer+"0", strings.ToUpper(issuer), " "+issuer,
		issuer+" ", issuer+"\x00", issuer+"?", issuer+"#", "//"+strings.TrimPrefix(issuer, "http://"), strings.TrimPrefix(issuer, "http://"), "https://evil.example.com", id, issuer+" "+issuer)
	missing("aud", "must have the aud "+issuer)
	bad = append(bad, badAssertion{"aud twice, another's behind", h.forge(h.header().String(), strings.TrimSuffix(v.assertionClaims(id).String(), "}")+`,"aud":"https://evil.example.com"}`), "must have the aud " + issuer})

	claim("must have an exp that is to come", "exp", nil, "", strconv.FormatInt(now+60, 10), true, []int64{now + 60}, members{}, -1, 0, 1, now-1, now, now-3600, json.RawMessage("-1e300"),
		json.RawMessage("1e-400"))
	claim("must have an exp within 5m", "exp", now+1000, now+3600, now+365*86400, 1<<53, json.RawMessage("1e308"), json.RawMessage(strings.Repeat("9", 300)), (now+60)*1000)
	missing("exp", "must have an exp that is to come")
	form := "must be a signed JWT"
	claim("must not have act", "act", members{"sub": id}, members{}, "", 1)
	claim("must not be bound to a key by cnf", "cnf", members{"jkt": thumbprint(h.jwk)}, members{}, "", 1, []string{"x"})
	for _, name := range []string{"exp", "iat", "nbf"} {
		bad = append(bad, badAssertion{name + " 1e400", h.sign(h.header(), v.assertionClaims(id).with(members{name: json.RawMessage("1e400")})), form})
	}
	for _, name := range []string{"iat", "nbf"} {
		for _, value := range []any{now + 1000, now + 3600, strconv.FormatInt(now, 10), "", true, []int64{now}, members{}, json.RawMessage("1e308")} {
			bad = append(bad, badAssertion{fmt.Sprintf("%s %v", name, value), h.sign(h.header(), v.assertionClaims(id).with(members{name: value})), "must have " + name + " in the past"})
		}
	}

	// What is no JWT in compact form, or not the one spelling of it. Go's base64 skips newlines and spare bits.
	payload := v.assertionClaims(id).String()
	good := h.forge(h.header().String(), payload)
	parts := strings.Split(good, ".")
	for name, text := range map[string]string{
		"a word": "x", "a dot": ".", "two dots": "..", "three dots": "...", "four parts": good + "." + parts[2], "an empty fourth part": good + ".",
		"a part before": "." + good, "five parts": good + "..", "the scheme too": "Bearer " + good, "a space before": " " + good, "a newline behind": good + "\n", "NUL behind": good + "\x00",
		"a newline in the header": parts[0][:5] + "\n" + parts[0][5:] + "." + parts[1] + "." + parts[2], "padding": good + "==",
		"a newline in the signature": good[:len(good)-9] + "\n" + good[len(good)-9:], "the signature in hex": parts[0] + "." + parts[1] + ".zz" + fmt.Sprintf("%x", parts[2]) + "==",
		"JSON serialization": members{"protected": parts[0], "payload": parts[1], "signature": parts[2]}.String(),
		"header null":        h.forge("null", payload), "header array": h.forge("[]", payload), "header text": h.forge(`"x"`, payload), "no header": h.forge("", payload),
		"payload null": h.forge(h.header().String(), "null"), "payload array": h.forge(h.header().String(), "["+payload+"]"), "payload text": h.forge(h.header().String(), strconv.Quote(payload)),
		"no payload": h.forge(h.header().String(), ""), "payload and more": h.forge(h.header().String(), payload+payload), "payload cut short": h.forge(h.header().String(), payload[:len(payload)-1]),
		"byte order mark": h.forge(h.header().String(), "\ufeff"+payload), "deep": h.forge(h.header().String(), `{"x":`+strings.Repeat("[", 4000)+payload+strings.Repeat("]", 3999)+"}"),
		"payload not encoded": signedText(h, encode(h.header().with(members{"b64": false}).String())+"."+payload),
		"padded header":       signedText(h, encode(h.header().String())+"=."+encode(payload)), "padded payload": signedText(h, encode(h.header().String())+"."+encode(payload)+"="),
		"standard base64": signedText(h, encode(h.header().String())+"."+base64.RawStdEncoding.EncodeToString([]byte(payload[:len(payload)-1]+`,"x":"???>>>~~~"}`))),
	} {
		bad = append(bad, badAssertion{name, text, form})
	}
	bad = append(bad, badAssertion{"two parts", parts[0] + "." + parts[1], unsigned})
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	spare := func(part string) string { // one more than what it is, where that says nothing
		return part[:len(part)-1] + string(alphabet[strings.IndexByte(alphabet, part[len(part)-1])+1])
	}
	loose := func(text string) string { // a length that leaves bits to spare
		return text + strings.Repeat(" ", (4-len(text)%3)%3)
	}
	bad = append(bad, badAssertion{"spare bits in the signature", parts[0] + "." + parts[1] + "." + spare(parts[2]), form},
		badAssertion{"spare bits in the header", signedText(h, spare(encode(loose(h.header().String())))+"."+parts[1]), form},
		badAssertion{"spare bits in the payload", signedText(h, parts[0]+"."+spare(encode(loose(payload)))), form})

	// What else is signed here.
	cursor := v.audit("limit=1").NextCursor
	bad = append(bad, badAssertion{"an access token of ours", v.bearer, "must have the typ JWT"}, badAssertion{"a checkpoint of ours", v.checkpoint(), "must have the typ JWT"},
		badAssertion{"a cursor of ours", *cursor, "must"}, badAssertion{"a secret", v.secret, form})
	return bad
}

// signedText signs what stands before the signature, whatever it is.
func signedText(h holder, signed string) string {
	return signed + "." + base64.RawURLEncoding.EncodeToString(h.signature(signed))
}

func TestBadAssertionsAreRefused(t *testing.T) {
	t.Parallel()
	v := newService(t)
	for _, alg := range []string{"RS256", "PS256", "ES256", "EdDSA", "Ed25519"} {
		t.Run(alg, func(t *testing.T) {
			id, _, h := v.newKeyClient(alg, "a:b")
			bad := signedWrong(t, v, h, id)
			if alg == "ES256" {
				bad = append(bad, saidWrong(v, h, id)...)
			}
			if len(bad) < 60 {
				t.Fatalf("only %d of them", len(bad))
			}
			for _, row := range bad {
				a := v.byAssertion("", row.text)
				if a.status != 401 || a.code() != "invalid_client" || a.text("access_token") != "" || !strings.Contains(a.text("error_description"), row.says) {
					t.Errorf("%s: answered %v, want 401 invalid_client that says %q", row.name, a, row.says)
				}
			}
			// None of them has taken anything from the client.
			v.want(v.byAssertion("", v.assertion(h, id)), 200, "")
			if n := v.count(`select count(*) from audit_events where action = 'token.issued' and outcome = 'success' and agent_id = $1`, id); n > 2 {
				t.Errorf("%d tokens were issued", n)
			}
		})
	}
}

// What differs from the plainest assertion, and is right all the same.
func TestGoodAssertionsAreTaken(t *testing.T) {
	t.Parallel()
	v := newService(t)
	issuer, now := v.env["ISSUER"], time.Now().Unix()
	var asked atomic.Int64 // for a key that a header names
	lure := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer lure.Close()
	id, h := v.newAgent("a:b"), newHolder(t, "ES256")
	h.jwk["kid"] = "my key, 'quoted' & more"
	v.want(v.register(id, h.jwk), 201, "")
	other := newHolder(t, "ES256")
	same := newID()
	for _, row := range []struct {
		name           string
		header, claims members
	}{
		{"typ jwt", members{"typ": "jwt"}, nil},
		{"typ client-authentication+jwt", members{"typ": "client-authentication+jwt"}, nil},
		{"aud as array of one", nil, members{"aud": []string{issuer}}},
		{"aud with a slash", nil, members{"aud": issuer + "/"}},
		{"aud as array of one with a slash", nil, members{"aud": []string{issuer + "/"}}},
		{"exp in 5 minutes", nil, members{"exp": now + 300}},
		{"exp in 5 minutes, by a clock that is ahead", nil, members{"exp": now + 305}},
		{"exp with a fraction", nil, members{"exp": float64(now) + 60.5}},
		{"exp with an exponent", nil, members{"exp": json.RawMessage(fmt.Sprintf("%de-1", (now+60)*10))}},
		{"iat by a clock that is ahead", nil, members{"iat": now + 5, "nbf": now + 5}},
		{"iat long ago", nil, members{"iat": 1, "nbf": -1}},
		{"iat and nbf null", nil, members{"iat": nil, "nbf": nil}},
		{"kid its thumbprint", members{"kid": thumbprint(h.jwk)}, nil},
		{"kid its own", members{"kid": h.jwk["kid"]}, nil},
		{"another's jwk", members{"jwk": other.jwk}, nil},
		{"jku, x5u, x5c", members{"jku": lure.URL, "x5u": lure.URL, "x5c": []string{"MIIB"}, "x5t": "x"}, nil},
		{"b64 that isn't critical", members{"b64": true}, nil},
		{"a jti of 512", nil, members{"jti": strings.Repeat("x", 512)}},
		{"a jti of anything", nil, members{"jti": "\x00\u202e'\"\\ é" + same}},
		{"claims that nobody knows", nil, members{"scope": "agents:write", "client_id": v.id}},
	} {
		a := v.byAssertion("", h.sign(h.header().with(row.header), v.assertionClaims(id).with(row.claims)))
		if a.status != 200 || readClaims(t, a.text("access_token")).Subject != id || a.text("scope") != "a:b" {
			t.Errorf("%s: answered %v, want a token", row.name, a)
		}
	}
	v.want(v.byAssertion("", h.sign(h.header().without("typ"), v.assertionClaims(id).without("iat"))), 200, "")
	v.want(v.byAssertion("", h.forge(`{"alg":"none","alg":"ES256"}`, v.assertionClaims(id).String())), 200, "") // the last of two is meant (RFC 7515, section 4)
	if asked.Load() > 0 {
		t.Error("a key was fetched from where the header says")
	}

	// Either s of an ECDSA signature is right: unlike of ours, nobody compares these.
	for range 8 {
		signed := encode(h.header().String()) + "." + encode(v.assertionClaims(id).String())
		sig := h.signature(signed)
		s := new(big.Int).Sub(orderP256, new(big.Int).SetBytes(sig[32:]))
		v.want(v.byAssertion("", signed+"."+encode(string(sig[:32])+string(s.FillBytes(make([]byte, 32))))), 200, "")
		v.want(v.byAssertion("", signed+"."+encode(string(sig))), 401, "invalid_client") // but is the same assertion
	}

	// Both names of EdDSA are the same algorithm, whichever the key was registered with.
	for _, alg := range []string{"EdDSA", "Ed25519"} {
		id, _, h := v.newKeyClient(alg, "a:b")
		for _, said := range []string{"EdDSA", "Ed25519"} {
			v.want(v.byAssertion("", h.sign(h.header().with(members{"alg": said}), v.assertionClaims(id))), 200, "")
		}
	}
	// And a jti is the client's own.
	for range 3 {
		id, _, h := v.newKeyClient("EdDSA", "a:b")
		v.want(v.byAssertion("", h.sign(h.header(), v.assertionClaims(id).with(members{"jti": same}))), 200, "")
		v.want(v.byAssertion("", h.sign(h.header(), v.assertionClaims(id).with(members{"jti": same}))), 401, "invalid_client")
	}
}

// Logins by key and by workload hold no connection that requests have, so that changes
// which wait don't hold them up.
func TestAssertionsWaitForNoRequest(t *testing.T) {
	t.Parallel()
	h := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: h}, nil))
	id, _, key := v.newKeyClient("ES256", "a:b")
	v.want(v.bind(id, cluster, screener, nil), 201, "")
	held := v.newAgent("a:b")
	tx := v.begun(`select from agents where agent_id = '` + held + `' for update`)
	var changes sync.WaitGroup
	var done atomic.Bool
	defer done.Store(true)
	for range 40 { // more than there are connections
		changes.Go(func() {
			for !done.Load() {
				v.api(v.bearer, "PATCH", "/agents/"+held, `{"version":"1.0.1"}`)
			}
		})
	}
	v.eventually("all connections wait", func() bool {
		return v.count(`select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`) >= 4
	})
	v.want(v.byAssertion("", v.assertion(key, id)), 200, "")
	v.want(v.byGrant(h.vouch(v.workloadClaims(cluster, screener))), 200, "")
	done.Store(true)
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	changes.Wait()
}

// Whoever is not let in learns nothing of the client, and of its keys.
func TestUnsignedAssertionsHaveOneAnswer(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "100000")
	id, credentialID, h := v.newKeyClient("ES256", tokensRead, "a:b")
	otherID, _, other := v.newKeyClient("ES256", tokensRead)
	secretID := v.newAgent("a:b")
	v.quickCredential(secretID)
	suspendedID, _, _ := v.newKeyClient("ES256", "a:b")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+suspendedID, `{"status":"suspended"}`), 200, "")
	goneID, _, _ := v.newKeyClient("ES256", "a:b")
	v.want(v.api(v.bearer, "DELETE", "/agents/"+goneID, ""), 204, "")

	end := func(do func(path string)) holder { // another key of the same agent, which has ended
		h := newHolder(t, "ES256")
		do("/agents/" + id + "/credentials/" + v.want(v.register(id, h.jwk), 201, "").text("credentialId"))
		return h
	}
	revoked := end(func(path string) { v.want(v.api(v.bearer, "DELETE", path, ""), 204, "") })
	rotated := end(func(path string) {
		v.want(v.api(v.bearer, "POST", path+"/rotate", members{"publicKey": newHolder(t, "ES256").jwk}.String()), 200, "")
	})
	expired := end(func(path string) { v.setExpiry(path[len(path)-36:], time.Now().Add(-time.Second)) })
	never := newHolder(t, "ES256")
	kid := func(kid string) members { return h.header().with(members{"kid": kid}) }

	comparable := func(a answer) string {
		h := a.header.Clone()
		h.Del("X-Request-Id")
		h.Del("Date")
		return fmt.Sprint(a.status, h, a.raw)
	}
	for _, way := range []struct{ path, name, value string }{{"", "scope", "a:b"}, {"/introspect", "token", "x"}, {"/revoke", "token", "x"}} {
		want := ""
		for name, text := range map[string]string{
			"a key that is nobody's":                never.sign(never.header(), v.assertionClaims(id)),
			"another client's key":                  other.sign(other.header(), v.assertionClaims(id)),
			"another client's key, with its kid":    other.sign(kid(thumbprint(other.jwk)), v.assertionClaims(id)),
			"the right key for another client":      h.sign(h.header(), v.assertionClaims(otherID)),
			"the same, with its kid":                h.sign(kid(thumbprint(h.jwk)), v.assertionClaims(otherID)),
			"a revoked key":                         revoked.sign(revoked.header(), v.assertionClaims(id)),
			"a revoked key, with its kid":           revoked.sign(kid(thumbprint(revoked.jwk)), v.assertionClaims(id)),
			"a rotated key":                         rotated.sign(rotated.header(), v.assertionClaims(id)),
			"an expired key":                        expired.sign(expired.header(), v.assertionClaims(id)),
			"an expired key, with its kid":          expired.sign(kid(thumbprint(expired.jwk)), v.assertionClaims(id)),
			"an unknown client":                     h.sign(h.header(), v.assertionClaims(newID())),
			"no client":                             h.sign(h.header(), v.assertionClaims("x")),
			"a client of secrets":                   h.sign(h.header(), v.assertionClaims(secretID)),
			"a suspended client, by another's key":  h.sign(h.header(), v.assertionClaims(suspendedID)),
			"a client that is gone, by another key": h.sign(h.header(), v.assertionClaims(goneID)),
			"an unknown kid":                        h.sign(kid("unknown"), v.assertionClaims(id)),
			"the credential's id as kid":            h.sign(kid(credentialID), v.assertionClaims(id)),
			"another algorithm":                     h.sign(h.header().with(members{"alg": "RS256"}), v.assertionClaims(id)),
		} {
			a := v.byAssertion(way.path, text, way.name, way.value)
			v.want(a, 401, "invalid_client")
			if want == "" {
				want = comparable(a)
			}
			if got := comparable(a); got != want {
				t.Errorf("%s at %q: answered %s, want %s", name, way.path, got, want)
			}
		}
	}
	v.want(v.byAssertion("", h.sign(kid(thumbprint(h.jwk)), v.assertionClaims(id))), 200, "")
}

func TestAssertionIsGoodOnce(t *testing.T) {
	t.Parallel()
	v := newService(t)
	two := v.another()
	id, _, h := v.newKeyClient("EdDSA", tokensRead, "a:b")
	paths := []string{"", "/introspect", "/revoke"}
	for _, first := range paths {
		text := v.assertion(h, id)
		v.want(v.byAssertion(first, text, "token", "x"), 200, "")
		v.rdb.FlushDB(t.Context()) // which is not where it is remembered
		for _, then := range paths {
			for _, w := range []*service{v, two} {
				a := w.byAssertion(then, text, "token", "x")
				if a.status != 401 || a.code() != "invalid_client" || !strings.Contains(a.text("error_description"), "was used before") {
					t.Errorf("used at %q, and then at %q: answered %v", first, then, a)
				}
			}
		}
	}
	// Another assertion of the same jti is the same, also one that another key has signed.
	claims := v.assertionClaims(id)
	v.want(v.byAssertion("", h.sign(h.header(), claims)), 200, "")
	v.want(v.byAssertion("", h.sign(h.header(), claims.with(members{"exp": time.Now().Unix() + 200}))), 401, "invalid_client")
	next := newHolder(t, "ES256")
	v.want(v.register(id, next.jwk), 201, "")
	v.want(v.byAssertion("", next.sign(next.header(), claims)), 401, "invalid_client")
	// A revocation uses it up whether there is something to revoke or not.
	for _, revoked := range []string{v.want(v.byAssertion("", v.assertion(h, id)), 200, "").text("access_token"), "x"} {
		for range 2 {
			text := v.assertion(h, id)
			v.want(v.byAssertion("/revoke", text, "token", revoked), 200, "")
			v.want(v.byAssertion("", text), 401, "invalid_client")
		}
	}
	// So does what is refused for what it asks, or its holder could spend its client's window.
	for path, refused := range map[string][]string{"": {"400", "invalid_scope", "scope", "c:d"}, "/introspect": {"400", "invalid_request", "token", ""}} {
		text := v.assertion(h, id)
		v.want(v.byAssertion(path, text, refused[2:]...), 400, refused[1])
		v.want(v.byAssertion(path, text, refused[2:]...), 401, "invalid_client")
	}
	// One that was sent over a limit is not used up; nor does a client that is over its
	// limit leave anything behind.
	text := v.assertion(h, id)
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"rateLimit": 1}`), 200, "")
	v.want(v.byAssertion("", v.assertion(h, id)), 200, "")
	uses := v.count(`select count(*) from token_revocations`)
	for range 3 {
		v.want(v.byAssertion("", text), 429, "temporarily_unavailable")
		v.want(v.byAssertion("", v.assertion(h, id)), 429, "temporarily_unavailable")
	}
	if n := v.count(`select count(*) from token_revocations`); n != uses {
		t.Errorf("a limited client has left %d uses", n-uses)
	}
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"rateLimit": null}`), 200, "")
	v.want(v.byAssertion("", text), 200, "")
	v.want(v.byAssertion("", text), 401, "invalid_client")
	text = v.assertion(h, id)
	v.want(v.byAssertion("", text, "client_id", newID()), 401, "invalid_client")
	v.want(v.byAssertion("", text, "client_secret", "x"), 400, "invalid_request")
	v.want(v.byAssertion("/introspect", newHolder(t, "EdDSA").sign(h.header(), claims.with(members{"jti": readPart(t, text, 1)[8:30]}))), 401, "invalid_client")
	v.want(v.byAssertion("", text), 200, "")
}

// At the same instant, at two copies, one is the first.
func TestAssertionIsUsedByOneOfMany(t *testing.T) {
	t.Parallel()
	v := newService(t)
	copies := []*service{v, v.another()}
	id, _, h := v.newKeyClient("EdDSA", "a:b")
	want := map[string]int{"200": 1, "401 invalid_client": 5}
	for range rounds(60, 2000) {
		text := v.assertion(h, id)
		if got := tally(6, func(i int) answer { return copies[i%2].byAssertion("", text) }); !maps.Equal(got, want) {
			t.Fatalf("six uses of one assertion at the same time answered %v, want %v", got, want)
		}
	}
	// Several at the same time, in any order, wait for nobody in a circle.
	for range rounds(20, 200) {
		texts := make([]string, 8)
		for i := range texts {
			texts[i] = v.assertion(h, id)
		}
		got := tally(32, func(i int) answer {
			text := texts[i%8]
			if i%2 == 1 {
				text = texts[7-i/4%8]
			}
			return copies[i%2].byAssertion("", text)
		})
		if got["200"] > 8 || got["200"]+got["401 invalid_client"] != 32 {
			t.Fatalf("32 uses of 8 assertions at the same time answered %v, want one 200 of each", got)
		}
	}
	if n := v.count(`select count(*) from audit_events where action = 'token.issued' and outcome = 'success' and agent_id = $1`, id); n > rounds(60, 2000)+8*rounds(20, 200) {
		t.Errorf("%d tokens were issued", n)
	}
}

// An assertion is for client authentication, and nothing else is for that.
func TestAssertionIsNoToken(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, _, h := v.newKeyClient("ES256", agentsRead, tokensRead)
	text := v.assertion(h, id)
	v.want(v.api(text, "GET", "/agents", ""), 401, "UNAUTHORIZED")
	v.want(v.bearerForm(text, "/introspect", "token=x"), 401, "invalid_token")
	v.want(v.bearerForm(text, "/revoke", "token=x"), 401, "invalid_token")
	if v.active(text) {
		t.Error("an assertion is introspected as active")
	}
	v.want(v.form(v.id, v.secret, "/revoke", "token="+text), 200, "")
	v.want(v.form(id, text, "", "grant_type=client_credentials"), 401, "invalid_client") // as a secret
	v.want(v.form("", "", "", "grant_type=client_credentials&client_id="+id+"&client_secret="+text), 401, "invalid_client")
	v.want(v.form("", "", "", "grant_type=urn:ietf:params:oauth:grant-type:jwt-bearer&assertion="+text), 401, "invalid_client")
	for _, a := range []answer{
		v.do("POST", "/api/v1/token?"+url.Values{"client_assertion_type": {assertionType}, "client_assertion": {text}}.Encode(), "grant_type=client_credentials", "Content-Type", formType),
		v.do("POST", "/api/v1/token", "grant_type=client_credentials", "Content-Type", formType, "Authorization", "Assertion "+text),
	} {
		v.want(a, 401, "invalid_client")
	}
	v.want(v.byAssertion("", text), 200, "") // none of that has used it
}

// How a client can't prove itself: twice, by half, or by two ways at once.
func TestAssertionStandsAlone(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, _, h := v.newKeyClient("ES256", tokensRead, "a:b")
	_, secret := v.quickCredential(id)
	bearer := v.bearerOf(id, tokensRead)
	text := v.assertion(h, id)
	for _, way := range []struct{ path, form string }{{"", "grant_type=client_credentials"}, {"/introspect", "token=x"}, {"/revoke", "token=x"}} {
		both := way.form + "&client_assertion_type=" + url.QueryEscape(assertionType) + "&client_assertion=" + text
		for name, row := range map[string]struct{ authorization, form string }{
			"beside Basic":                  {basicAuth(id, secret), both},
			"beside wrong Basic":            {basicAuth(id, newSecret()), both},
			"beside Bearer":                 {"Bearer " + bearer, both},
			"beside an unknown scheme":      {"DPoP " + bearer, both},
			"beside client_secret":          {"", both + "&client_id=" + id + "&client_secret=" + secret},
			"beside a secret that is wrong": {"", both + "&client_secret=x"},
			"without its type":              {"", way.form + "&client_assertion=" + text},
			"with an empty type":            {"", way.form + "&client_assertion=" + text + "&client_assertion_type="},
			"of another type":               {"", way.form + "&client_assertion=" + text + "&client_assertion_type=urn:ietf:params:oauth:client-assertion-type:saml2-bearer"},
			"of its type in upper case":     {"", way.form + "&client_assertion=" + text + "&client_assertion_type=" + strings.ToUpper(assertionType)},
			"type alone":                    {"", way.form + "&client_assertion_type=" + assertionType},
			"type alone, and a secret":      {"", way.form + "&client_assertion_type=" + assertionType + "&client_id=" + id + "&client_secret=" + secret},
			"type alone, and Basic":         {basicAuth(id, secret), way.form + "&client_assertion_type=" + assertionType},
			"type alone, and Bearer":        {"Bearer " + bearer, way.form + "&client_assertion_type=" + assertionType},
			"alone, and Basic":              {basicAuth(id, secret), way.form + "&client_assertion=" + text},
			"empty":                         {"", way.form + "&client_assertion_type=" + assertionType + "&client_assertion="},
			"twice":                         {"", both + "&client_assertion=" + text},
			"twice, once empty":             {"", both + "&client_assertion="},
			"its type twice":                {"", both + "&client_assertion_type=" + assertionType},
			"and client_id twice":           {"", both + "&client_id=" + id + "&client_id=" + id},
		} {
			header := []string{"Content-Type", formType}
			if row.authorization != "" {
				header = append(header, "Authorization", row.authorization)
			}
			if a := v.do("POST", "/api/v1/token"+way.path, row.form, header...); a.status != 400 || a.code() != "invalid_request" {
				t.Errorf("an assertion %s at %q: answered %v, want 400 invalid_request", name, way.path, a)
			}
		}
	}
	a := v.byAssertion("", text, "padding", strings.Repeat("x", 16<<10))
	v.want(a, 413, "invalid_request")
	v.want(v.byAssertion("", text, "client_secret", ""), 200, "") // an empty parameter is an absent one (RFC 6749, section 3.2)
	// A key is no secret, and has none.
	v.want(v.form(id, h.jwk.String(), "", "grant_type=client_credentials"), 401, "invalid_client")
	v.want(v.form(id, "", "", "grant_type=client_credentials"), 401, "invalid_client")
}

// Of a client that doesn't say which, five keys are tried, the newest first.
func TestKidChoosesAmongTheKeysOfAClient(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("a:b")
	var keys []holder
	for i := range 7 {
		h := newHolder(t, []string{"ES256", "EdDSA"}[i%2])
		h.jwk["kid"] = fmt.Sprint("key ", i/2) // two have the same, but for the last
		v.want(v.register(id, h.jwk), 201, "")
		keys = append(keys, h)
	}
	strangerID, _, stranger := v.newKeyClient("ES256", "a:b")
	for i, h := range keys {
		for name, row := range map[string]struct {
			header members
			good   bool
		}{
			"without a kid":               {h.header(), i >= 2},
			"by its thumbprint":           {h.header().with(members{"kid": thumbprint(h.jwk)}), true},
			"by its name":                 {h.header().with(members{"kid": h.jwk["kid"]}), true},
			"by another's thumbprint":     {h.header().with(members{"kid": thumbprint(keys[(i+1)%7].jwk)}), false},
			"by another's name":           {h.header().with(members{"kid": keys[(i+2)%7].jwk["kid"]}), false},
			"by another agent's":          {h.header().with(members{"kid": thumbprint(stranger.jwk)}), false},
			"by its name in another case": {h.header().with(members{"kid": strings.ToUpper(h.jwk["kid"].(string))}), false},
		} {
			a := v.byAssertion("", h.sign(row.header, v.assertionClaims(id)))
			if (a.status == 200) != row.good || a.status != 200 && a.status != 401 {
				t.Errorf("key %d %s: answered %v, want it taken: %v", i, name, a, row.good)
			}
		}
	}
	// Revoked, a key takes no other's place.
	list := v.want(v.api(v.bearer, "GET", "/agents/"+id+"/credentials", ""), 200, "").body["data"].([]any)
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+list[0].(map[string]any)["credentialId"].(string), ""), 204, "")
	v.want(v.byAssertion("", v.assertion(keys[1], id)), 200, "")
	v.want(v.byAssertion("", v.assertion(keys[0], id)), 401, "invalid_client")
	v.want(v.byAssertion("", v.assertion(keys[6], id)), 401, "invalid_client")
	v.want(v.byAssertion("", v.assertion(stranger, strangerID)), 200, "")
	// Nor do many that have ended hide one that is good.
	for _, end := range []string{"revoked", "expired"} {
		if _, err := v.db.Exec(t.Context(), `
			insert into credentials (credential_id, client_id, status, revoked_at, expires_at, kind, public_key, key_thumbprint, secret_prefix, secret_hash, secret_id)
			select ('ffffffff-ffff-7' || to_char(n, 'fm000') || substr(gen_random_uuid()::text, 19))::uuid, client_id,
				case $2 when 'revoked' then 'revoked' else 'active' end, case $2 when 'revoked' then now() end,
				case $2 when 'expired' then now() - interval '1 minute' end, kind, public_key, $2 || n, substr(md5($2 || n), 1, 16), '', gen_random_uuid()
			from credentials, generate_series(1, 100) as n
			where key_thumbprint = $1`, thumbprint(keys[1].jwk), end); err != nil {
			t.Fatal(err)
		}
		v.want(v.byAssertion("", v.assertion(keys[1], id)), 200, "")
	}
}

// What ends a secret ends a key: at once, and with the tokens it was traded for.
func TestKeyEndsAsASecretDoes(t *testing.T) {
	t.Parallel()
	v := newService(t)
	two := v.another()
	for _, row := range []struct {
		name   string
		end    func(id, credentialID string)
		status int
		code   string
		says   string
	}{
		{"revoked", func(id, c string) { v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+c, ""), 204, "") }, 401, "invalid_client", unsigned},
		{"rotated", func(id, c string) {
			v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials/"+c+"/rotate", members{"publicKey": newHolder(t, "ES256").jwk}.String()), 200, "")
		}, 401, "invalid_client", unsigned},
		{"expired", func(_, c string) { v.setExpiry(c, time.Now()) }, 401, "invalid_client", unsigned},
		{"suspended", func(id, _ string) {
			v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
		}, 403, "unauthorized_client", "suspended"},
		{"decommissioned", func(id, _ string) { v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 204, "") }, 403, "unauthorized_client", "decommissioned"},
	} {
		id, credentialID, h := v.newKeyClient("EdDSA", tokensRead)
		token := v.want(two.byAssertion("", v.assertion(h, id)), 200, "").text("access_token")
		before := v.assertion(h, id)
		row.end(id, credentialID)
		for _, w := range []*service{v, two} {
			for _, path := range []string{"", "/introspect", "/revoke"} {
				for _, text := range []string{before, v.assertion(h, id), h.sign(h.header().with(members{"kid": thumbprint(h.jwk)}), v.assertionClaims(id))} {
					a := w.byAssertion(path, text, "token", token)
					if a.status != row.status || a.code() != row.code || !strings.Contains(a.text("error_description"), row.says) {
						t.Errorf("%s, at %q: answered %v, want %d %s", row.name, path, a, row.status, row.code)
					}
				}
			}
			if w.active(token) {
				t.Errorf("%s: the token is active", row.name)
			}
		}
		if row.name == "suspended" { // what was refused was not used
			v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"active"}`), 200, "")
			v.want(v.byAssertion("", before), 200, "")
		}
	}
}

// While a request waits for the log its key may end.
func TestKeyThatEndsWhileItsRequestWaitsGivesNothing(t *testing.T) {
	t.Parallel()
	p := newCutter(t)
	q, third := p.another(), p.another()
	for _, end := range []string{"revoked", "rotated", "suspended"} {
		id, credentialID, h := p.newKeyClient("ES256", tokensRead)
		texts := []string{p.assertion(h, id), p.assertion(h, id)}
		next := members{"publicKey": newHolder(t, "ES256").jwk}.String()
		tx := p.lockChain()
		cut, token, known := make(chan answer, 1), make(chan answer, 1), make(chan answer, 1)
		go func() {
			path := "/agents/" + id
			switch end {
			case "revoked":
				cut <- p.api(p.bearer, "DELETE", path+"/credentials/"+credentialID, "")
			case "rotated":
				cut <- p.api(p.bearer, "POST", path+"/credentials/"+credentialID+"/rotate", next)
			case "suspended":
				cut <- p.api(p.bearer, "PATCH", path, `{"status":"suspended"}`)
			}
		}()
		p.eventually("the cut waits for the chain", func() bool { return p.waiting() == 1 })
		go func() { token <- q.byAssertion("", texts[0]) }()
		p.eventually("the request waits behind it", func() bool { return p.waiting() == 2 })
		go func() { known <- third.byAssertion("/introspect", texts[1], "token", p.bearer) }()
		p.eventually("so does another", func() bool { return p.waiting() == 3 })
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a := <-cut; !a.done() {
			t.Fatalf("%s is answered %v", end, a)
		}
		for _, answered := range []chan answer{token, known} {
			if a := <-answered; a.status != 401 || a.code() != "invalid_client" {
				t.Errorf("%s meanwhile: answered %v, want 401 invalid_client", end, a)
			}
		}
	}
}

// What may not be registered as a key, and what the answer says of it. No private half
// comes back, nor gets into the log, which TestMain searches for canaries.
func TestBadKeysAreRefused(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("a:b")
	_, secret := v.quickCredential(id)
	number := base64.RawURLEncoding.EncodeToString
	ec, okp := newHolder(t, "ES256").jwk.without("alg"), newHolder(t, "EdDSA").jwk.without("alg")
	odd := func(bits int) string { // an odd number of just as many bits
		b := make([]byte, (bits+7)/8)
		rand.Read(b)
		n := new(big.Int).SetBytes(b)
		n.SetBit(n.Rsh(n, uint(8*len(b)-bits)), bits-1, 1)
		return number(n.SetBit(n, 0, 1).Bytes())
	}
	rsaKey := members{"kty": "RSA", "n": odd(2048), "e": "AQAB"}
	bytesOf := func(text any) []byte {
		b, err := base64.RawURLEncoding.DecodeString(text.(string))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	curve := func(c elliptic.Curve) members {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return publicJWK(key.Public())
	}
	beside := bytesOf(ec["y"])
	beside[31] ^= 1
	even := bytesOf(rsaKey["n"])
	even[255] &^= 1
	x := bytesOf(ec["x"])
	const notKey, isPrivate, numbers, kinds = "must be a public key as a JWK", "has the private member ", "must have its numbers in base64url", "must be of RSA, P-256 or Ed25519"
	const rsaSays, point = "must have an odd n of 2048 to 8192 bits", "must have x and y of 32 bytes each, which are a point of P-256"
	type row struct {
		name  string
		key   any
		fault string
	}
	rows := []row{
		{"null", nil, notKey}, {"a text", "canary", notKey}, {"an array", []members{ec}, notKey}, {"a number", 1, notKey}, {"true", true, notKey}, {"a JWK as text", ec.String(), notKey},
		{"a private PEM", "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n", notKey}, {"a private JWK as text", ec.with(members{"d": "canary"}).String(), notKey},
		{"a private JWK in an array", []members{ec.with(members{"d": "canary"})}, notKey}, {"an empty object", members{}, kinds},
		{"a set of keys", members{"keys": []members{ec}}, kinds}, {"a set of private keys", members{"keys": []members{ec.with(members{"d": "canary"})}}, kinds},
		{"oct", members{"kty": "oct", "k": number([]byte("canary"))}, isPrivate + "k"}, {"oct without k", members{"kty": "oct"}, kinds}, {"no kty", ec.without("kty"), kinds},
		{"kty in lower case", ec.with(members{"kty": "ec"}), kinds}, {"kty of another", ec.with(members{"kty": "RSA"}), kinds}, {"OKP of EC", ec.with(members{"kty": "OKP"}), kinds},
		{"crv of another", ec.with(members{"crv": "P-384"}), kinds}, {"Ed25519 of EC", ec.with(members{"crv": "Ed25519"}), kinds}, {"no crv", ec.without("crv"), kinds}, {"crv null", ec.with(members{"crv": nil}), kinds},
		{"RSA with a crv", rsaKey.with(members{"crv": "P-256"}), kinds}, {"kty with a space", members{"kty": "RSA ", "n": rsaKey["n"], "e": "AQAB"}, kinds},
		{"P-224", curve(elliptic.P224()), kinds}, {"P-384", curve(elliptic.P384()), kinds}, {"P-521", curve(elliptic.P521()), kinds}, {"secp256k1", ec.with(members{"crv": "secp256k1"}), kinds},
		{"Ed448", okp.with(members{"crv": "Ed448"}), kinds}, {"X25519", okp.with(members{"crv": "X25519"}), kinds}, {"AKP", members{"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"}, kinds},
		{"kty as number", ec.with(members{"kty": 1}), "must have text as its kty"}, {"x as number", ec.with(members{"x": 1}), "must have text as its x"}, {"kid as number", ec.with(members{"kid": 1}), "must have text as its kid"},
		{"alg as array", ec.with(members{"alg": []string{"ES256"}}), "must have text as its alg"}, {"n as array", rsaKey.with(members{"n": []int{1}}), "must have text as its n"},
		{"use enc", ec.with(members{"use": "enc"}), "its use is another"}, {"use empty", ec.with(members{"use": ""}), "its use is another"}, {"use in upper case", ec.with(members{"use": "SIG"}), "its use is another"},
		{"use as array", ec.with(members{"use": []string{"sig"}}), "its use is another"}, {"key_ops sign", ec.with(members{"key_ops": []string{"sign"}}), "key_ops lack that"}, {"no key_ops", ec.with(members{"key_ops": []string{}}), "key_ops lack that"},
		{"key_ops of encryption", ec.with(members{"key_ops": []string{"encrypt", "wrapKey"}}), "key_ops lack that"}, {"key_ops as text", ec.with(members{"key_ops": "verify"}), "key_ops lack that"},
		{"RS256 for EC", ec.with(members{"alg": "RS256"}), "must have one of ES256"}, {"ES256 for RSA", rsaKey.with(members{"alg": "ES256"}), "must have one of RS256, PS256"},
		{"ES256 for Ed25519", okp.with(members{"alg": "ES256"}), "must have one of EdDSA, Ed25519"}, {"RS512", rsaKey.with(members{"alg": "RS512"}), "must have one of RS256"}, {"RSA-OAEP", rsaKey.with(members{"alg": "RSA-OAEP"}), "must have one of RS256"},
		{"HS256 for RSA", rsaKey.with(members{"alg": "HS256"}), "must have one of RS256"}, {"none", ec.with(members{"alg": "none"}), "must have one of ES256"}, {"alg in lower case", ec.with(members{"alg": "es256"}), "must have one of ES256"},
		{"kid with a control character", ec.with(members{"kid": "a\x1b[2J"}), "must have a kid of"}, {"kid with NUL", ec.with(members{"kid": "a\x00"}), "must have a kid of"}, {"kid with a newline", ec.with(members{"kid": "a\n"}), "must have a kid of"},
		{"kid beyond ASCII", ec.with(members{"kid": "schlüssel"}), "must have a kid of"}, {"kid of 201", ec.with(members{"kid": strings.Repeat("a", 201)}), "must have a kid of"}, {"kid with half a surrogate", ec.with(members{"kid": json.RawMessage(`"\ud800"`)}), "must have a kid of"},

		{"a point off the curve", ec.with(members{"y": number(beside)}), point}, {"x and y swapped", ec.with(members{"x": ec["y"], "y": ec["x"]}), point}, {"the point at infinity", ec.with(members{"x": number(make([]byte, 32)), "y": number(make([]byte, 32))}), point},
		{"x of 31 bytes", ec.with(members{"x": number(x[:31])}), point}, {"x of 33 bytes", ec.with(members{"x": number(append([]byte{0}, x...))}), point}, {"a byte of x in y", ec.with(members{"x": number(x[:31]), "y": number(append(x[31:32:32], bytesOf(ec["y"])...))}), point},
		{"no x", ec.without("x"), point}, {"no y", ec.without("y"), point}, {"x empty", ec.with(members{"x": ""}), point}, {"x beyond the prime", ec.with(members{"x": number(bytes.Repeat([]byte{0xff}, 32))}), point},
		{"x with padding", ec.with(members{"x": ec["x"].(string) + "="}), numbers}, {"x in hex", ec.with(members{"x": fmt.Sprintf("%x+", x)}), numbers}, {"x with a newline", ec.with(members{"x": ec["x"].(string) + "\n"}), numbers},
		{"x with spare bits", ec.with(members{"x": ec["x"].(string)[:42] + "B"}), numbers}, {"standard base64", okp.with(members{"x": "+/" + okp["x"].(string)[2:]}), numbers},
		{"Ed25519 of 31 bytes", okp.with(members{"x": number(x[:31])}), "must have an x of 32 bytes"}, {"Ed25519 of 33 bytes", okp.with(members{"x": number(append([]byte{0}, x...))}), "must have an x of 32 bytes"}, {"Ed25519 without x", okp.without("x"), "must have an x of 32 bytes"},
		{"RSA of 1024 bits", rsaKey.with(members{"n": odd(1024)}), rsaSays}, {"RSA of 2047 bits", rsaKey.with(members{"n": odd(2047)}), rsaSays}, {"RSA of 8193 bits", rsaKey.with(members{"n": odd(8193)}), rsaSays},
		{"RSA of 8200 bits", rsaKey.with(members{"n": odd(8200)}), rsaSays}, {"RSA of 60000 bits", rsaKey.with(members{"n": odd(60000)}), rsaSays}, {"RSA of an even n", rsaKey.with(members{"n": number(even)}), rsaSays},
		{"RSA of a power of two", rsaKey.with(members{"n": number(append([]byte{0x80}, make([]byte, 255)...))}), rsaSays}, {"a zero before n", rsaKey.with(members{"n": number(append([]byte{0}, bytesOf(rsaKey["n"])...))}), rsaSays},
		{"a zero before e", rsaKey.with(members{"e": "AAEAAQ"}), rsaSays}, {"no n", rsaKey.without("n"), rsaSays}, {"no e", rsaKey.without("e"), rsaSays}, {"e 0", rsaKey.with(members{"e": "AA"}), rsaSays}, {"e 1", rsaKey.with(members{"e": "AQ"}), rsaSays},
		{"e 3", rsaKey.with(members{"e": "Aw"}), rsaSays}, {"e 65536", rsaKey.with(members{"e": "AQAA"}), rsaSays}, {"e 65539", rsaKey.with(members{"e": "AQAD"}), rsaSays}, {"e 65538", rsaKey.with(members{"e": "AQAC"}), rsaSays}, {"e of 2^31 and more", rsaKey.with(members{"e": number([]byte{0x80, 0, 0, 1})}), rsaSays},
		{"e of 33 bits", rsaKey.with(members{"e": number([]byte{1, 0, 1, 0, 1})}), rsaSays}, {"e of 2^64 + 65537", rsaKey.with(members{"e": number([]byte{1, 0, 0, 0, 0, 0, 1, 0, 1})}), rsaSays}, {"e as long as n", rsaKey.with(members{"e": rsaKey["n"]}), rsaSays},
		{"e as number", rsaKey.with(members{"e": 65537}), "must have text as its e"},
	}
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} {
		for _, value := range []any{"canary", "", nil, 1, []string{"canary"}} {
			for _, key := range []members{ec, okp, rsaKey} {
				rows = append(rows, row{fmt.Sprintf("%s with %s %v", key["kty"], name, value), key.with(members{name: value}), isPrivate + name})
			}
		}
	}
	list := "/agents/" + id + "/credentials"
	own := v.want(v.register(id, newHolder(t, "ES256").jwk), 201, "").text("credentialId")
	for _, row := range rows {
		for _, path := range []string{list, list + "/" + own + "/rotate"} {
			a := v.api(v.bearer, "POST", path, members{"publicKey": row.key}.String())
			details, _ := a.body["details"].(map[string]any)
			fault, _ := details["publicKey"].(string)
			if a.status != 400 || a.code() != "VALIDATION_ERROR" || len(details) != 1 || !strings.Contains(fault, row.fault) {
				t.Errorf("%s: answered %v, want 400 and that it %q", row.name, a, row.fault)
			}
			if strings.Contains(a.raw, "canary") || strings.Contains(a.raw, number([]byte("canary"))) || strings.Contains(a.raw, "PRIVATE KEY") {
				t.Errorf("%s: the answer repeats it: %s", row.name, a.raw)
			}
		}
	}
	for name, body := range map[string]string{
		"publicKey twice":   `{"publicKey":` + ec.String() + `,"publicKey":` + okp.String() + `}`,
		"another case":      `{"PublicKey":` + ec.String() + `}`,
		"as the whole body": ec.String(),
		"a secret beside":   `{"publicKey":` + ec.String() + `,"clientSecret":"` + secret + `"}`,
		"kind beside":       `{"publicKey":` + ec.String() + `,"kind":"key"}`,
		"a bad expiry":      `{"publicKey":` + ec.String() + `,"expiresAt":"2020-01-01T00:00:00Z"}`,
	} {
		if a := v.api(v.bearer, "POST", list, body); a.status != 400 || a.code() != "VALIDATION_ERROR" || strings.Contains(a.raw, secret) {
			t.Errorf("%s: answered %v, want 400", name, a)
		}
	}
	if n := v.count(`select count(*) from credentials where client_id = $1`, id); n != 2 {
		t.Errorf("the agent has %d credentials, want the 2 that were good", n)
	}
	if n := v.count(`select count(*) from audit_events where metadata::text like '%canary%'`); n != 0 {
		t.Errorf("%d events have a private half", n)
	}
}

// What else a JWK may have is left out, and what is stored is only what is public.
func TestKeyIsShownByItsThumbprint(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id := v.newAgent("a:b")
	expires := time.Now().Add(time.Hour).UTC().Truncate(time.Second).Format("2006-01-02T15:04:05.000Z")
	for _, alg := range []string{"RS256", "PS256", "ES256", "EdDSA", "Ed25519"} {
		h := newHolder(t, alg)
		key := h.jwk.with(members{"use": "sig", "key_ops": []string{"sign", "verify"}, "x5t": "AAAA", "x5c": []string{"AAAA"}, "ext": true, "kid": alg, "priv": "unknown"})
		for _, name := range []string{"n", "e", "x", "y"} { // of keys of other kinds
			if _, has := key[name]; !has {
				key[name] = "unknown"
			}
		}
		if alg == "ES256" { // which needn't say so
			key = key.without("alg").with(members{"kid": nil, "use": nil, "key_ops": nil})
		}
		a := v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials", members{"publicKey": key, "expiresAt": expires}.String()), 201, "")
		_, secret := a.body["clientSecret"]
		prefix, hasPrefix := a.body["secretPrefix"]
		if a.text("kind") != "key" || a.text("keyThumbprint") != thumbprint(h.jwk) || a.text("expiresAt") != expires || a.text("clientId") != id || secret || !hasPrefix || prefix != nil ||
			strings.Contains(a.raw, "sk_live_") || strings.Contains(a.raw, "unknown") {
			t.Errorf("%s: a key is registered as %v", alg, a)
		}
		listed := v.want(v.api(v.bearer, "GET", "/agents/"+id+"/credentials?limit=1", ""), 200, "").body["data"].([]any)[0]
		if !reflect.DeepEqual(listed, any(a.body)) {
			t.Errorf("%s: it is listed as %v, and was %v", alg, listed, a.body)
		}
		e := v.audit("limit=1&action=" + credentialGenerated).Data[0]
		if e.fact("credentialId") != a.text("credentialId") || e.fact("keyThumbprint") != thumbprint(h.jwk) || idText(e.AgentID) != id || idText(e.ActorID) != v.id || e.Outcome != "success" {
			t.Errorf("%s: the event is %+v %s", alg, e, e.Metadata)
		}
		if n := v.count(`select count(*) from credentials where credential_id = $1 and (public_key::text like '%unknown%' or public_key::text like '%x5c%' or secret_hash <> '')`, a.text("credentialId")); n != 0 {
			t.Errorf("%s: more is stored than the key", alg)
		}
		a = v.want(v.byAssertion("", v.assertion(h, id)), 200, "")
		if c := readClaims(t, a.text("access_token")); c.CredentialID != listed.(map[string]any)["credentialId"] || c.Expires > time.Now().Add(time.Hour).Unix() {
			t.Errorf("%s: its token has %+v", alg, c)
		}
		e = v.audit("limit=1&action=" + tokenIssued + "&agentId=" + id).Data[0]
		if e.fact("credentialId") != listed.(map[string]any)["credentialId"] || e.fact("jti") == "" {
			t.Errorf("%s: the token's event is %s", alg, e.Metadata)
		}
	}
	// A secret is as it was.
	credentialID, secret := v.newCredential(id)
	listed := v.want(v.api(v.bearer, "GET", "/agents/"+id+"/credentials?limit=1", ""), 200, "").body["data"].([]any)[0].(map[string]any)
	thumb, has := listed["keyThumbprint"]
	if listed["credentialId"] != credentialID || listed["kind"] != "secret" || !has || thumb != nil || listed["secretPrefix"] != secret[8:24] {
		t.Errorf("a secret is listed as %v", listed)
	}
	if e := v.audit("limit=1&action=" + credentialGenerated).Data[0]; e.fact("keyThumbprint") != "" {
		t.Errorf("the event of a secret is %s", e.Metadata)
	}
}

// A key is that of one living credential.
func TestKeyHasOneCredential(t *testing.T) {
	t.Parallel()
	v := newService(t)
	two := v.another()
	taken := func(what string, a answer) {
		t.Helper()
		if a.status != 409 || a.code() != "KEY_ALREADY_REGISTERED" {
			t.Errorf("%s: answered %v, want 409 KEY_ALREADY_REGISTERED", what, a)
		}
	}
	one, other, h := v.newAgent("a:b"), v.newAgent("a:b"), newHolder(t, "RS256")
	credentialID := v.want(v.register(one, h.jwk), 201, "").text("credentialId")
	path := "/agents/" + one + "/credentials/" + credentialID
	taken("the same key again", v.register(one, h.jwk))
	taken("the same key by another name, for another algorithm", v.register(one, h.jwk.with(members{"kid": "another", "alg": "PS256"})))
	taken("another agent's key", v.register(other, h.jwk))
	taken("another agent's key with what makes none", v.register(other, h.jwk.with(members{"x": "AAAA", "y": "AAAA"})))
	taken("rotated to itself", v.api(v.bearer, "POST", path+"/rotate", members{"publicKey": h.jwk}.String()))
	second := v.want(v.register(one, newHolder(t, "ES256").jwk), 201, "").text("credentialId")
	taken("rotated to the one beside it", v.api(v.bearer, "POST", "/agents/"+one+"/credentials/"+second+"/rotate", members{"publicKey": h.jwk}.String()))
	if e := v.audit("limit=1&action=" + credentialRotated).Data[0]; e.Outcome != "failure" || e.fact("reason") != "KEY_ALREADY_REGISTERED" {
		t.Errorf("the refusal is recorded as %+v %s", e, e.Metadata)
	}
	v.want(v.byAssertion("", v.assertion(h, one)), 200, "")
	v.want(v.byAssertion("", v.assertion(h, other)), 401, "invalid_client")

	// Once revoked, it may be anybody's, who then is the only one.
	v.want(v.api(v.bearer, "DELETE", path, ""), 204, "")
	v.want(v.register(other, h.jwk), 201, "")
	v.want(v.byAssertion("", v.assertion(h, other)), 200, "")
	v.want(v.byAssertion("", v.assertion(h, one)), 401, "invalid_client")
	taken("a key that has another by now", v.register(one, h.jwk))
	v.want(v.api(v.bearer, "DELETE", "/agents/"+other, ""), 204, "")
	v.want(v.register(one, h.jwk), 201, "")

	other = v.newAgent("a:b")
	for range rounds(20, 200) {
		key := newHolder(t, "EdDSA").jwk
		got := tally(4, func(i int) answer {
			return []*service{v, two}[i%2].register([]string{one, other, v.id, one}[i], key)
		})
		if got["201"] != 1 || got["409 KEY_ALREADY_REGISTERED"] != 3 {
			t.Fatalf("a key that is registered four times at the same instant is answered %v, want one 201", got)
		}
	}
}

func TestKeyIsRotatedToAnother(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, credentialID, h := v.newKeyClient("ES256", tokensRead)
	secretID, secret := v.quickCredential(id)
	path := "/agents/" + id + "/credentials/"
	token, bySecret := v.want(v.byAssertion("", v.assertion(h, id)), 200, "").text("access_token"), v.token(id, secret, "")
	next := newHolder(t, "EdDSA")
	body := members{"publicKey": next.jwk}.String()
	for name, a := range map[string]answer{
		"a key to nothing":    v.api(v.bearer, "POST", path+credentialID+"/rotate", "{}"),
		"a key to a secret":   v.api(v.bearer, "POST", path+credentialID+"/rotate", `{"expiresAt":"2999-01-01T00:00:00Z"}`),
		"a secret to a key":   v.api(v.bearer, "POST", path+secretID+"/rotate", body),
		"a key to no key":     v.api(v.bearer, "POST", path+credentialID+"/rotate", `{"publicKey":null}`),
		"a secret to no key":  v.api(v.bearer, "POST", path+secretID+"/rotate", `{"publicKey":null}`),
		"a key to a bad key":  v.api(v.bearer, "POST", path+credentialID+"/rotate", `{"publicKey":{"kty":"EC"}}`),
		"a key to a PEM text": v.api(v.bearer, "POST", path+credentialID+"/rotate", members{"publicKey": pkix(t, next.private.Public())}.String()),
	} {
		if a.status != 400 || detailNames(a) != "publicKey" || strings.Contains(a.raw, "sk_live_") {
			t.Errorf("%s: answered %v, want 400 that names publicKey", name, a)
		}
	}
	if !v.active(token) || !v.active(bySecret) {
		t.Error("a refused rotation ends a token")
	}
	a := v.want(v.api(v.bearer, "POST", path+credentialID+"/rotate", body), 200, "")
	if a.text("credentialId") != credentialID || a.text("keyThumbprint") != thumbprint(next.jwk) || a.text("kind") != "key" || a.body["secretPrefix"] != nil || a.body["clientSecret"] != nil {
		t.Errorf("it is rotated to %v", a)
	}
	if v.active(token) || !v.active(bySecret) {
		t.Error("the old key's token is active, or the one beside it isn't")
	}
	v.want(v.byAssertion("", v.assertion(h, id)), 401, "invalid_client")
	v.want(v.byAssertion("", h.sign(h.header().with(members{"kid": thumbprint(h.jwk)}), v.assertionClaims(id))), 401, "invalid_client")
	v.want(v.byAssertion("", v.assertion(next, id)), 200, "")
	e := v.audit("limit=1&action=" + credentialRotated).Data[0]
	if e.fact("credentialId") != credentialID || e.fact("keyThumbprint") != thumbprint(next.jwk) || e.Outcome != "success" {
		t.Errorf("the event is %s", e.Metadata)
	}
	// The old one is free, and may come back.
	v.want(v.register(v.newAgent("a:b"), h.jwk), 201, "")
	v.want(v.api(v.bearer, "POST", path+secretID+"/rotate", "{}"), 200, "")
	v.want(v.api(v.bearer, "DELETE", path+credentialID, ""), 204, "")
	v.want(v.api(v.bearer, "POST", path+credentialID+"/rotate", members{"publicKey": newHolder(t, "ES256").jwk}.String()), 409, "CREDENTIAL_ALREADY_REVOKED")
}

// A refusal is an event of the agent that was claimed, with the reason.
func TestRefusedAssertionsAreRecorded(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, _, h := v.newKeyClient("ES256", "a:b")
	suspended, _, its := v.newKeyClient("ES256", "a:b")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+suspended, `{"status":"suspended"}`), 200, "")
	used := v.assertion(h, id)
	v.want(v.byAssertion("", used), 200, "")
	for _, row := range []struct{ name, text, agent, reason string }{
		{"another key", newHolder(t, "ES256").sign(h.header(), v.assertionClaims(id)), id, "invalid_client"},
		{"replay", used, id, "invalid_client"},
		{"suspended", v.assertion(its, suspended), suspended, "unauthorized_client"},
		{"no id", h.sign(h.header(), v.assertionClaims("' or 1=1 --")), "", "invalid_client"},
		{"no JWT", "canary", "", "invalid_client"},
		{"for another", h.sign(h.header(), v.assertionClaims(id).with(members{"aud": "https://evil.example.com"})), id, "invalid_client"},
	} {
		before := v.count(`select max(seq) from audit_events`)
		a := v.byAssertion("", row.text)
		events := v.audit("limit=1&action=" + authFailed)
		if len(events.Data) != 1 {
			t.Fatalf("%s: no event", row.name)
		}
		e := events.Data[0]
		if e.Seq <= int64(before) || idText(e.AgentID) != row.agent || e.ActorID != nil || e.fact("reason") != row.reason || e.Outcome != "failure" || a.code() != row.reason {
			t.Errorf("%s: answered %v, and recorded as %+v %s", row.name, a, e, e.Metadata)
		}
	}
}

// Who knows a client, or has seen an assertion on its way, can't lock the client out.
func TestWrongAssertionsCountForTheAddressOnly(t *testing.T) {
	t.Parallel()
	const limit = 6
	v := newService(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit), "TRUSTED_PROXIES", "127.0.0.0/8")
	id, _, h := v.newKeyClient("ES256", "a:b")
	used := v.assertion(h, id)
	v.want(v.byAssertion("", used), 200, "")
	suspended, _, its := v.newKeyClient("ES256", "a:b")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+suspended, `{"status":"suspended"}`), 200, "")
	from := func(address, text string) answer {
		return v.do("POST", "/api/v1/token", url.Values{"grant_type": {"client_credentials"}, "client_assertion_type": {assertionType}, "client_assertion": {text}}.Encode(),
			"Content-Type", formType, "X-Forwarded-For", address)
	}
	for i, row := range []struct {
		name   string
		text   func() string
		status int
	}{
		{"another key", func() string { return newHolder(t, "EdDSA").sign(h.header(), v.assertionClaims(id)) }, 401},
		{"replay", func() string { return used }, 401},
		{"no JWT", func() string { return "x" }, 401},
		{"an unknown client", func() string { return h.sign(h.header(), v.assertionClaims(newID())) }, 401},
		{"expired", func() string { return h.sign(h.header(), v.assertionClaims(id).with(members{"exp": 1})) }, 401},
		{"suspended", func() string { return v.assertion(its, suspended) }, 403},
	} {
		v.withinAMinute(func(int64, time.Duration) {
			v.forget()
			address, other := fmt.Sprintf("203.0.113.%d", 2*i+1), fmt.Sprintf("203.0.113.%d", 2*i+2)
			if got := atOnce(3*limit, func(int) answer { return from(address, row.text()) }); got[row.status] != limit || got[429] != 2*limit {
				t.Errorf("%s: %d at once answered %v, want %d refused and the rest 429", row.name, 3*limit, got, limit)
			}
			if a := from(address, row.text()); a.status != 429 || a.code() != "temporarily_unavailable" || a.number(t, "Retry-After") < 1 {
				t.Errorf("%s: one too many is answered %v", row.name, a)
			}
			if a := from(other, row.text()); a.status != row.status {
				t.Errorf("%s: from another address it is answered %v, want %d", row.name, a, row.status)
			}
			if n := v.counted("client:" + id); n != 0 {
				t.Errorf("%s: they count for the client: %d", row.name, n)
			}
			// The client itself is let in from that very address, as often as it may.
			if got := atOnce(2*limit, func(int) answer { return from(address, v.assertion(h, id)) }); got[200] != limit || got[429] != limit {
				t.Errorf("%s: then the client's own are answered %v, want %d tokens", row.name, got, limit)
			}
		})
	}
}

// Copies of an assertion that come at the same time leave its client what it may ask.
func TestCopiesOfAnAssertionSpendNothing(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "12")
	id, _, h := v.newKeyClient("ES256", "a:b")
	v.withinAMinute(func(int64, time.Duration) {
		v.forget()
		text := v.assertion(h, id)
		got := tally(60, func(int) answer { return v.byAssertion("", text) })
		own := 0
		for range 12 {
			if v.byAssertion("", v.assertion(h, id)).status == 200 {
				own++
			}
		}
		if got["200"] != 1 || own != 11 {
			t.Errorf("60 copies are answered %v, and then its client gets %d tokens, want 1 and 11", got, own)
		}
	})
}

// Without PostgreSQL there is no token, and afterwards at most one.
func TestAssertionWithoutPostgreSQL(t *testing.T) {
	t.Parallel()
	env := map[string]string{"DATABASE_URL": newDatabase(t)}
	proxy := proxyDatabase(t, env)
	v := newService(t, "DATABASE_URL", env["DATABASE_URL"])
	id, _, h := v.newKeyClient("ES256", tokensRead)
	for _, mode := range []proxyMode{refusing, swallowing} {
		var texts []string
		for range 6 {
			texts = append(texts, v.assertion(h, id))
		}
		proxy.set(mode)
		got := tally(6, func(i int) answer {
			a := v.byAssertion([]string{"", "/introspect", "/revoke"}[i%3], texts[i], "token", "x")
			if a.header.Get("Retry-After") == "" || a.text("access_token") != "" {
				t.Errorf("without PostgreSQL: answered %v", a)
			}
			return a
		})
		if got["503 temporarily_unavailable"] != 6 {
			t.Errorf("without PostgreSQL: answered %v, want six 503", got)
		}
		proxy.set(passing)
		v.eventually("all is well", func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
		for _, text := range texts {
			tokens := 0
			v.eventually("no connection of before is left", func() bool {
				got := tally(4, func(int) answer { return v.byAssertion("", text) })
				if tokens += got["200"]; got["200"]+got["401 invalid_client"]+got["503 temporarily_unavailable"] != 4 {
					t.Errorf("afterwards: answered %v, want one token at most", got)
				}
				return got["503 temporarily_unavailable"] == 0
			})
			if tokens > 1 || mode == refusing && tokens != 1 { // where it can't have got there
				t.Errorf("afterwards: an assertion gave %d tokens, want one", tokens)
			}
		}
	}
	// What can't be recorded is no token, and doesn't use the assertion up.
	allow := v.refuseEvents()
	text := v.assertion(h, id)
	for _, path := range []string{"", "/introspect", "/revoke"} {
		v.want(v.byAssertion(path, text, "token", "x"), 503, "temporarily_unavailable")
	}
	allow()
	v.eventually("all is well", func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
	v.want(v.byAssertion("", text), 200, "")
	v.want(v.byAssertion("", text), 401, "invalid_client")
}

// changed is a JWT, or its beginning, by an accident: with junk in it, less, more, or a part of another.
func changed(random *mathrand.Rand, text, junk, another string) string {
	at := random.IntN(len(text))
	to := min(len(text), at+1+random.IntN(4))
	switch random.IntN(6) {
	case 0:
		return text[:at] + junk + text[to:]
	case 1:
		return text[:at] + string(rune(33+random.IntN(94))) + text[at+1:]
	case 2:
		return text[:at]
	case 3:
		return text[:at] + text[to:]
	case 4:
		return text[:to] + text[at:]
	}
	parts, other := strings.Split(text, "."), strings.Split(another, ".")
	parts[random.IntN(len(parts))] = other[random.IntN(3)]
	return strings.Join(parts, ".")
}

// No accident makes a token of what isn't an assertion of the client's, nor a fault of ours.
func TestChangedAssertionGivesNothing(t *testing.T) {
	t.Parallel()
	v := newService(t)
	id, _, h := v.newKeyClient("ES256", "a:b")
	random := mathrand.New(mathrand.NewPCG(1, 2))
	value := func() any { // that no claim and no header may have
		return []any{nil, "", 0, -1, 1e300, true, []any{}, []any{hostileText(random), 1}, members{}, members{"a": []any{nil}}, json.RawMessage("1e999"), -time.Now().Unix()}[random.IntN(12)]
	}
	text := func() any { // that is none where there is but one that is right
		return []any{hostileText(random), newID(), json.RawMessage(`"\ud800"`), strings.Repeat("é", 300), "ES256\x00"}[random.IntN(5)]
	}
	pick := func(names ...string) string { return names[random.IntN(len(names))] }
	change := func(text string) string { return changed(random, text, hostileText(random), v.assertion(h, id)) }
	for i := range rounds(1500, 30000) {
		good := v.assertion(h, id)
		before, sig, _ := cutLast(good, ".")
		sent := good
		switch i % 3 {
		case 0:
			for sent == good {
				sent = change(good)
			}
		case 1:
			for sent == good {
				sent = change(before) + "." + sig
			}
		case 2: // signed by the right key
			header, claims := h.header(), v.assertionClaims(id)
			switch random.IntN(4) {
			case 0:
				header = header.with(members{pick("alg", "typ", "crit", "kid"): value()})
			case 1:
				header = header.with(members{pick("alg", "typ", "crit", "kid"): text()})
			case 2:
				claims = claims.with(members{pick("iss", "sub", "aud", "exp", "jti"): value()})
			case 3:
				claims = claims.with(members{pick("iss", "sub", "aud", "exp"): text()})
			}
			sent = h.sign(header, claims)
		}
		if a := v.byAssertion("", sent); a.status != 401 && (a.status != 400 || sent != "") || a.code() != "invalid_client" && sent != "" {
			t.Fatalf("round %d: %q is answered %v, want 401 invalid_client", i, sent, a)
		}
	}
	v.want(v.byAssertion("", v.assertion(h, id)), 200, "")
}
