package test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Tokens that only their holder can use (RFC 9449): who has one but not its key has nothing.

const (
	proofAlgs = "RS256 PS256 ES256 EdDSA Ed25519"
	tokenPath = "/api/v1/token"
	usedProof = "was used before; each needs a jti of its own"
	badProof  = "invalid_dpop_proof"
)

// proofHeader and proofClaims are those of a proof that is right: for a path below the
// issuer, and beside a token, where there is one.
func (h holder) proofHeader() members {
	return members{"typ": "dpop+jwt", "alg": h.alg, "jwk": publicJWK(h.private.Public())}
}

func (v *service) proofClaims(method, path, token string) members {
	claims := members{"htm": method, "htu": v.env["ISSUER"] + path, "iat": time.Now().Unix(), "jti": newID()}
	if token != "" {
		claims["ath"] = tokenHash(token)
	}
	return claims
}

func tokenHash(token string) string {
	sum := sha256.Sum256([]byte(token))
	return encode(string(sum[:]))
}

func (v *service) proof(h holder, method, path, token string) string {
	return h.sign(h.proofHeader(), v.proofClaims(method, path, token))
}

// byProof calls a path below /api/v1 with a token and these proofs.
func (v *service) byProof(scheme, token, method, path, body string, proofs ...string) answer {
	v.t.Helper()
	header := []string{"Authorization", scheme + " " + token}
	for _, proof := range proofs {
		header = append(header, "DPoP", proof)
	}
	if strings.HasPrefix(path, "/token") {
		header = append(header, "Content-Type", formType)
	} else if body != "" {
		header = append(header, "Content-Type", "application/json")
	}
	return v.do(method, "/api/v1"+path, body, header...)
}

// bound calls a path below /api/v1 as the holder of a token's key.
func (v *service) bound(h holder, token, method, path, body string) answer {
	v.t.Helper()
	bare, _, _ := strings.Cut(path, "?")
	return v.byProof("DPoP", token, method, path, body, v.proof(h, method, "/api/v1"+bare, token))
}

// proves asks for a token by a form, with these proofs.
func (v *service) proves(p party, form string, proofs ...string) answer {
	v.t.Helper()
	header := []string{"Authorization", basicAuth(p.id, p.secret), "Content-Type", formType}
	for _, proof := range proofs {
		header = append(header, "DPoP", proof)
	}
	return v.do("POST", tokenPath, form, header...)
}

const plainGrant = "grant_type=client_credentials"

// boundToken gets a token that is bound to a key, with a further piece of form.
func (v *service) boundToken(p party, h holder, more string) string {
	v.t.Helper()
	return v.wantBound(v.proves(p, plainGrant+"&"+more, v.proof(h, "POST", tokenPath, "")), h)
}

// wantBound wants an answer with a token that is bound to this key, and returns that.
func (v *service) wantBound(a answer, h holder) string {
	v.t.Helper()
	token := v.want(a, 200, "").text("access_token")
	if got := keyOf(v.t, token); a.text("token_type") != "DPoP" || got != thumbprint(h.jwk) {
		v.t.Fatalf("a token of type %q is bound to the key %q, want DPoP and %q", a.text("token_type"), got, thumbprint(h.jwk))
	}
	return token
}

// wantUnbound wants an answer with a token for whoever bears it.
func (v *service) wantUnbound(a answer) string {
	v.t.Helper()
	token := v.want(a, 200, "").text("access_token")
	if a.text("token_type") != "Bearer" || strings.Contains(readPart(v.t, token, 1), `"cnf"`) {
		v.t.Fatalf("the token of %v is bound: %s", a, readPart(v.t, token, 1))
	}
	return token
}

// keyOf is the thumbprint of the key that a token is bound to, "" where it is to none.
func keyOf(t testing.TB, token string) string {
	t.Helper()
	var said struct {
		Key *struct {
			Thumbprint string `json:"jkt"`
		} `json:"cnf"`
	}
	if err := json.Unmarshal([]byte(readPart(t, token, 1)), &said); err != nil {
		t.Fatal(err)
	}
	if said.Key == nil {
		return ""
	}
	return said.Key.Thumbprint
}

// dpopChallenge is the whole of WWW-Authenticate where a token came by the scheme DPoP, or
// should have.
func (v *service) dpopChallenge(code string) *regexp.Regexp {
	return regexp.MustCompile(`^DPoP realm="agentidp", resource_metadata="[^"]+/\.well-known/oauth-protected-resource[^"]*", algs="` + proofAlgs +
		`", error="` + code + `", error_description="[^"\\]+"$`)
}

// wantNoToken wants the token endpoint to refuse a proof, and to say this of it.
func (v *service) wantNoToken(name string, a answer, says string) {
	v.t.Helper()
	if a.status != 400 || a.code() != badProof || a.text("access_token") != "" || !strings.HasPrefix(a.text("error_description"), "The DPoP proof ") || !strings.Contains(a.text("error_description"), says) {
		v.t.Errorf("%s: answered %v, want 400 %s that says %q of the DPoP proof", name, a, badProof, says)
	}
}

// wantNoEntry wants our API to refuse a proof, and to say this of it.
func (v *service) wantNoEntry(name string, a answer, says string) {
	v.t.Helper()
	said, challenge := a.text("message")+a.text("error_description"), a.header.Get("WWW-Authenticate")
	if a.status != 401 || a.text("code") != "UNAUTHORIZED" && a.text("error") != badProof || !v.dpopChallenge(badProof).MatchString(challenge) {
		v.t.Errorf("%s: answered %v, %q, want 401 that challenges with %s", name, a, challenge, badProof)
	}
	if !strings.HasPrefix(said, "The DPoP proof ") || !strings.Contains(said, says) || !strings.Contains(challenge, `"`+said+`"`) {
		v.t.Errorf("%s: answered %v, %q, want that both say %q of the DPoP proof", name, a, challenge, says)
	}
}

// A wrongProof is the header DPoP, once or more, of which nothing may come; says is what
// the answer says of it.
type wrongProof struct {
	name   string
	values []string
	says   string
}

// wronglySigned are proofs whose signature isn't what their key makes of them, or whose
// algorithm isn't one of their key's.
func (v *service) wronglySigned(h holder, method, path, token string) (wrong []wrongProof) {
	add := func(name, text string) { wrong = append(wrong, wrongProof{name, []string{text}, "jwk"}) }
	claims := func() members { return v.proofClaims(method, path, token) }
	with := func(alg any) members { return h.proofHeader().with(members{"alg": alg}) }
	body := func(header members) string { return encode(header.String()) + "." + encode(claims().String()) }
	public := publicJWK(h.private.Public())
	for _, alg := range []any{"none", "None", "NONE", "nOnE", "", nil, 1, true, []string{h.alg}, strings.ToLower(h.alg), h.alg + " ", "HS256", "HS512", "RS256", "RS384", "RS512",
		"PS256", "PS384", "ES256", "ES384", "ES512", "ES256K", "EdDSA", "Ed25519", "Ed448"} {
		if alg == any(h.alg) || public["kty"] == "OKP" && (alg == "EdDSA" || alg == "Ed25519") { // which are one
			continue
		}
		add(fmt.Sprintf("alg %q signed by the key", alg), h.sign(with(alg), claims()))
		add(fmt.Sprintf("alg %q without signature", alg), body(with(alg))+".")
	}
	add("no alg", h.sign(h.proofHeader().without("alg"), claims()))

	// What is public is no secret.
	secrets := map[string]string{"the public JWK": public.String(), "the public PEM": pkix(v.t, h.private.Public()), "nothing": "", "the thumbprint": thumbprint(public)}
	for _, name := range []string{"n", "x"} {
		if text, _ := public[name].(string); text != "" {
			b, _ := base64.RawURLEncoding.DecodeString(text)
			secrets["the bytes of "+name], secrets["the text of "+name] = string(b), text
		}
	}
	for name, secret := range secrets {
		for _, alg := range []string{"HS256", h.alg} {
			for kind, key := range map[string]members{"its own jwk": public, "oct as jwk": {"kty": "oct", "k": encode(secret)}} {
				signed := body(with(alg).with(members{"jwk": key}))
				mac := hmac.New(sha256.New, []byte(secret))
				mac.Write([]byte(signed))
				add("HMAC with "+name+" as "+alg+", "+kind, signed+"."+encode(string(mac.Sum(nil))))
			}
		}
	}
	for _, alg := range []string{"RS256", "ES256", "EdDSA"} {
		other := newHolder(v.t, alg)
		add("the jwk of another key, of "+alg, h.sign(h.proofHeader().with(members{"jwk": publicJWK(other.private.Public())}), claims()))
		add("signed by another key, of "+alg, other.sign(h.proofHeader(), claims()))
		add("signed by another key, which its alg says, "+alg, other.sign(with(other.alg), claims()))
	}
	signed := body(h.proofHeader())
	sig := h.signature(signed)
	flipped := slices.Clone(sig)
	flipped[len(flipped)/2] ^= 1
	for name, sig := range map[string][]byte{
		"nothing": nil, "one bit more": flipped, "zeros": make([]byte, len(sig)), "a byte less": sig[:len(sig)-1], "a byte more": append(slices.Clone(sig), 0),
		"a zero before": append([]byte{0}, sig...), "itself twice": append(slices.Clone(sig), sig...), "one": append(make([]byte, len(sig)-1), 1),
		"the payload's": h.signature(strings.Split(signed, ".")[1]), "another proof's": h.signature(body(h.proofHeader())),
	} {
		add("as signature "+name, signed+"."+encode(string(sig)))
	}
	switch key := h.private.(type) {
	case *rsa.PrivateKey:
		digest := sha256.Sum256([]byte(signed))
		for _, salt := range []int{20, 33} {
			sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], &rsa.PSSOptions{SaltLength: salt})
			if err != nil {
				v.t.Fatal(err)
			}
			add(fmt.Sprintf("PSS with a salt of %d", salt), signed+"."+encode(string(sig)))
		}
	case *ecdsa.PrivateKey:
		r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
		der, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
		if err != nil {
			v.t.Fatal(err)
		}
		add("in ASN.1", signed+"."+encode(string(der)))
		zero, one := new(big.Int), big.NewInt(1)
		for name, pair := range map[string][2]*big.Int{
			"r and s 0": {zero, zero}, "r 0": {zero, s}, "s 0": {r, zero}, "r and s 1": {one, one}, "r and s swapped": {s, r}, "r and s the order": {orderP256, orderP256},
		} {
			add(name, signed+"."+encode(string(fixed(pair[0], pair[1]))))
		}
	}
	return wrong
}

// ofBadKeys are proofs of which the jwk is what is wrong; where somebody can sign for
// such a key, that was done.
func (v *service) ofBadKeys(h holder, method, path, token string) (wrong []wrongProof) {
	add := func(name, text string) { wrong = append(wrong, wrongProof{"jwk " + name, []string{text}, "jwk"}) }
	claims := func() members { return v.proofClaims(method, path, token) }
	public := publicJWK(h.private.Public())
	private := func(name string) members { return public.with(members{name: "AQAB"}) }
	beside, _ := base64.RawURLEncoding.DecodeString(public["y"].(string))
	beside[31] ^= 1
	for name, jwk := range map[string]any{
		"null": nil, "a text": "x", "an empty text": "", "a number": 1, "true": true, "an array": []members{public}, "itself as text": public.String(), "nothing in it": members{}, "a set": members{"keys": []members{public}},
		"private": public.with(members{"d": encode(string(secretHalf(v.t, h)))}), "with d null": public.with(members{"d": nil}),
		"with p": private("p"), "with q": private("q"), "with dp": private("dp"), "with dq": private("dq"), "with qi": private("qi"), "with oth": public.with(members{"oth": []any{}}), "with k": private("k"),
		"oct": members{"kty": "oct", "k": "AAAA"}, "without kty": public.without("kty"), "kty in lower case": public.with(members{"kty": "ec"}), "kty RSA": public.with(members{"kty": "RSA"}), "kty OKP": public.with(members{"kty": "OKP"}),
		"without crv": public.without("crv"), "crv P-384": public.with(members{"crv": "P-384"}), "crv secp256k1": public.with(members{"crv": "secp256k1"}), "crv Ed25519": public.with(members{"crv": "Ed25519"}),
		"without x": public.without("x"), "without y": public.without("y"), "x null": public.with(members{"x": nil}), "x a number": public.with(members{"x": 1}), "off the curve": public.with(members{"y": encode(string(beside))}),
		"the point 0": public.with(members{"x": encode(string(make([]byte, 32))), "y": encode(string(make([]byte, 32)))}), "x and y swapped": public.with(members{"x": public["y"], "y": public["x"]}),
		"x padded": public.with(members{"x": public["x"].(string) + "="}), "x with spare bits": public.with(members{"x": spareBits(public["x"].(string))}), "x with a zero before": public.with(members{"x": "AA" + public["x"].(string)}),
		"use enc": public.with(members{"use": "enc"}), "key_ops sign": public.with(members{"key_ops": []string{"sign"}}), "alg RS256": public.with(members{"alg": "RS256"}), "alg HS256": public.with(members{"alg": "HS256"}), "alg none": public.with(members{"alg": "none"}),
		"its thumbprint": thumbprint(public), "a URL": "https://evil.example.com/jwk", "its PEM": pkix(v.t, h.private.Public()),
	} {
		add(name, h.sign(h.proofHeader().with(members{"jwk": jwk}), claims()))
	}
	add("missing", h.sign(h.proofHeader().without("jwk"), claims()))
	add("missing, with a kid", h.sign(h.proofHeader().without("jwk").with(members{"kid": thumbprint(public)}), claims()))
	add("as JWK", h.sign(h.proofHeader().without("jwk").with(members{"JWK": public}), claims()))
	add("among the claims", h.sign(h.proofHeader().without("jwk"), claims().with(members{"jwk": public})))
	add("missing, with a jku", h.sign(h.proofHeader().without("jwk").with(members{"jku": v.url + "/.well-known/jwks.json"}), claims()))

	// Keys of other kinds, which have signed rightly.
	wide, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		v.t.Fatal(err)
	}
	for _, alg := range []string{"ES384", "ES256"} {
		signed := encode(members{"typ": "dpop+jwt", "alg": alg, "jwk": publicJWK(wide.Public())}.String()) + "." + encode(claims().String())
		long, short := sha512.Sum384([]byte(signed)), sha256.Sum256([]byte(signed))
		r, s, err := ecdsa.Sign(rand.Reader, wide, map[string][]byte{"ES384": long[:], "ES256": short[:]}[alg])
		if err != nil {
			v.t.Fatal(err)
		}
		add("of P-384, "+alg, signed+"."+encode(string(r.FillBytes(make([]byte, 48)))+string(s.FillBytes(make([]byte, 48)))))
	}
	one := newHolder(v.t, "RS256")
	public = publicJWK(one.private.Public())
	n := one.private.(*rsa.PrivateKey).N
	for name, jwk := range map[string]members{
		"RSA with e 3": public.with(members{"e": "Aw"}), "RSA with e 1": public.with(members{"e": "AQ"}), "RSA with e and zeros": public.with(members{"e": "AAEAAQ"}), "RSA with n and zeros": public.with(members{"n": encode("\x00" + string(n.Bytes()))}),
		"RSA of 1024 bits": public.with(members{"n": encode(string(n.Bytes()[:128]))}), "RSA of 2040 bits": public.with(members{"n": encode(string(n.Bytes()[1:]))}), "RSA, even": public.with(members{"n": encode(string(new(big.Int).Sub(n, big.NewInt(1)).Bytes()))}),
		"RSA, huge": public.with(members{"n": encode(strings.Repeat("\xff", 1100))}), "RSA without n": public.without("n"), "RSA without e": public.without("e"),
		"private, RSA": public.with(members{"d": encode(string(one.private.(*rsa.PrivateKey).D.Bytes()))}),
	} {
		add(name, one.sign(one.proofHeader().with(members{"jwk": jwk}), claims()))
	}
	wrong = append(wrong, wrongProof{"jwk RSA of 4104 bits", []string{one.sign(one.proofHeader().with(members{"jwk": public.with(members{"n": encode(strings.Repeat("\xff", 513))})}), claims())}, "at most 4096 bits"})
	okp := newHolder(v.t, "EdDSA")
	add("of X25519", okp.sign(okp.proofHeader().with(members{"jwk": publicJWK(okp.private.Public()).with(members{"crv": "X25519"})}), claims()))
	add("private, OKP", okp.sign(okp.proofHeader().with(members{"jwk": publicJWK(okp.private.Public()).with(members{"d": encode(string(okp.private.(ed25519.PrivateKey).Seed()))})}), claims()))
	add("of 31 bytes", okp.sign(okp.proofHeader().with(members{"jwk": members{"kty": "OKP", "crv": "Ed25519", "x": encode(strings.Repeat("x", 31))}}), claims()))

	// For points of small order anybody can sign, and has: R the neutral element, s zero.
	for _, point := range []string{
		"0100000000000000000000000000000000000000000000000000000000000000", "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"0000000000000000000000000000000000000000000000000000000000000000", "0000000000000000000000000000000000000000000000000000000000000080",
		"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05", "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
		"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a", "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
	} {
		key, err := hex.DecodeString(point)
		if err != nil {
			v.t.Fatal(err)
		}
		header := members{"typ": "dpop+jwt", "alg": "EdDSA", "jwk": publicJWK(ed25519.PublicKey(key))}
		sig := append([]byte{1}, make([]byte, 63)...)
		signed := ""
		for tries := 0; signed == "" || !ed25519.Verify(key, []byte(signed), sig); tries++ {
			if tries > 1000 {
				v.t.Fatalf("nobody can sign for %s", point)
			}
			signed = encode(header.String()) + "." + encode(claims().String())
		}
		add("of small order "+point[:8], signed+"."+encode(string(sig)))
	}
	return wrong
}

func secretHalf(t testing.TB, h holder) []byte {
	t.Helper()
	b, err := h.private.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// spareBits is another spelling of the same bytes, where base64 has bits to spare.
func spareBits(text string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return text[:len(text)-1] + string(alphabet[strings.IndexByte(alphabet, text[len(text)-1])+1])
}

// wrongURLs are what htu may not be for a path of ours: what they name is another place,
// or they are no URL of one.
func wrongURLs(issuer, path string) []any {
	u, err := url.Parse(issuer)
	if err != nil {
		panic(err)
	}
	base := u.Scheme + "://" + u.Host
	good := issuer + path
	other := map[string]string{"http": "https", "https": "http"}[u.Scheme]
	list := []any{"", nil, 1, true, []string{good}, members{"htu": good}, path, strings.TrimPrefix(good, base), "//" + u.Host + path, issuer, issuer + "/", base, good + "/", good + "//", good + "/.", good + "/x", good[:len(good)-1],
		issuer + "/" + path, issuer + "/." + path, issuer + "/x/.." + path, issuer + "/.." + path, issuer + strings.ToUpper(path), issuer + strings.Replace(path, "/", "//", 1),
		issuer + "/%61pi" + strings.TrimPrefix(path, "/api"), issuer + strings.Replace(path, "/v1/", "%2Fv1%2F", 1), issuer + strings.Replace(path, "/v1/", "%2fv1/", 1), issuer + "/%2e" + path, issuer + "/%2E%2E" + path, good + "%00", good + "%20", good + ";x=y",
		good + "%3F", good + "%23", issuer + strings.ReplaceAll(path, "/", "\\"), " " + good, good + " ", good + "\n", good + "\x00", "\t" + good, "<" + good + ">",
		other + "://" + u.Host + u.Path + path, "ws://" + u.Host + u.Path + path, "://" + u.Host + u.Path + path, u.Host + u.Path + path, u.Scheme + ":" + u.Host + u.Path + path, u.Scheme + ":/" + u.Host + u.Path + path, u.Scheme + ":///" + u.Host + u.Path + path,
		u.Scheme + "://user@" + u.Host + u.Path + path, u.Scheme + "://user:password@" + u.Host + u.Path + path, u.Scheme + "://@" + u.Host + u.Path + path, u.Scheme + "://" + u.Host + "@evil.example.com" + u.Path + path, u.Scheme + "://evil.example.com@" + u.Host + u.Path + path,
		u.Scheme + "://" + u.Host + ".evil.example.com" + u.Path + path, u.Scheme + "://evil.example.com" + u.Path + path, u.Scheme + "://evil.example.com/" + good, u.Scheme + "://evil.example.com?" + good, u.Scheme + "://evil.example.com#" + good, "https://evil.example.com\\@" + u.Host + u.Path + path,
		u.Scheme + "://x." + u.Host + u.Path + path, u.Scheme + "://" + u.Hostname() + ".:" + strings.TrimPrefix(u.Port(), ":") + u.Path + path, u.Scheme + "://" + u.Hostname() + ":1" + u.Path + path, u.Scheme + "://" + u.Hostname() + ":65536" + u.Path + path, u.Scheme + "://" + u.Hostname() + ":x" + u.Path + path,
		u.Scheme + "://" + u.Hostname() + map[string]string{"http": ":443", "https": ":80"}[u.Scheme] + u.Path + path, u.Scheme + "://localhost" + u.Path + path, u.Scheme + "://" + u.Host + u.Path + tokenPath + "/nothing", good + ", " + good, good + " " + good}
	if u.Port() != "" {
		list = append(list, u.Scheme+"://"+u.Hostname()+u.Path+path, u.Scheme+"://"+u.Hostname()+":"+u.Path+path)
	}
	if u.Path != "" {
		list = append(list, base+path, base+u.Path+u.Path+path, base+strings.ToUpper(u.Path)+path)
	}
	return list
}

// wronglySaid are proofs that the right key has signed, and that say what none may.
func (v *service) wronglySaid(h holder, method, path, token string) (wrong []wrongProof) {
	now := time.Now().Unix()
	claims := func() members { return v.proofClaims(method, path, token) }
	add := func(says, name string, values ...string) { wrong = append(wrong, wrongProof{name, values, says}) }
	header := func(says string, changes ...members) {
		for _, change := range changes {
			add(says, "header with "+change.String(), h.sign(h.proofHeader().with(change), claims()))
		}
	}
	claim := func(name string, values ...any) {
		for _, value := range values {
			add(name, fmt.Sprintf("%s %.80q", name, fmt.Sprint(value)), h.sign(h.proofHeader(), claims().with(members{name: value})))
		}
		less := claims().without(name)
		add(name, "no "+name, h.sign(h.proofHeader(), less))
		add(name, name+" in upper case alone", h.sign(h.proofHeader(), less.with(members{strings.ToUpper(name): claims()[name]})))
		add(name, name+" in the header alone", h.sign(h.proofHeader().with(members{name: claims()[name]}), less))
	}
	header("typ", members{"typ": "JWT"}, members{"typ": "jwt"}, members{"typ": "at+jwt"}, members{"typ": ""}, members{"typ": nil}, members{"typ": 1}, members{"typ": []string{"dpop+jwt"}}, members{"typ": "dpop"}, members{"typ": "dpop+jwt "},
		members{"typ": "dpop jwt"}, members{"typ": "xdpop+jwt"}, members{"typ": "client-authentication+jwt"}, members{"typ": auditCheckpoint})
	add("typ", "no typ", h.sign(h.proofHeader().without("typ"), claims()))
	add("typ", "TYP in place of typ", h.sign(h.proofHeader().without("typ").with(members{"TYP": "dpop+jwt"}), claims()))
	header("crit", members{"crit": []string{"exp"}}, members{"crit": []string{}}, members{"crit": nil}, members{"crit": "htm"}, members{"crit": []string{"b64"}, "b64": false})

	for _, other := range []string{"GET", "POST", "PATCH", "DELETE", "HEAD", "PUT"} {
		if other != method {
			claim("htm", other)
		}
	}
	claim("htm", strings.ToLower(method), strings.ToLower(method[:1])+method[1:], method[:1]+strings.ToLower(method[1:]), method+" ", " "+method, method+"\n", method+"\x00", method[:len(method)-1], method+method, method+", "+method, "*", "", nil, 1, true, []string{method}, members{})
	claim("htu", append(wrongURLs(v.env["ISSUER"], path), v.env["ISSUER"]+"/api/v1/agents/nobody", v.env["ISSUER"]+"/api/v1/token/revoke/")...)
	claim("iat", nil, "", strconv.FormatInt(now, 10), "now", true, []int64{now}, members{}, 0, 1, -1, -now, now-65, now-75, now-600, now-3600, now+45, now+60, now+3600, now*1000, now*1_000_000, 1<<53, json.RawMessage("1e308"), json.RawMessage("-1e308"),
		json.RawMessage(strings.Repeat("9", 300)), json.RawMessage(fmt.Sprintf("%d.5", now-70)), json.RawMessage(fmt.Sprintf("%d.5", now+45)), json.RawMessage("9223372036854775808"), json.RawMessage("-9223372036854775809"), json.RawMessage(fmt.Sprintf("%d", now+1<<32)), json.RawMessage("18446744073709551616"))
	add("", "iat 1e400", h.forge(h.proofHeader().String(), strings.TrimSuffix(claims().without("iat").String(), "}")+`,"iat":1e400}`))
	claim("jti", "", nil, 1, 0, true, []string{"x"}, members{}, strings.Repeat("x", 513), strings.Repeat("x", 4000))

	if token != "" {
		b, _ := base64.RawURLEncoding.DecodeString(tokenHash(token))
		claim("ath", "", nil, 1, true, []string{tokenHash(token)}, members{}, tokenHash(v.bearer), tokenHash("DPoP "+token), tokenHash(token+" "), tokenHash(token[:len(token)-1]), tokenHash(""), tokenHash(token)+"=", tokenHash(token)+"\n", " "+tokenHash(token),
			strings.ToLower(tokenHash(token)), spareBits(tokenHash(token)), tokenHash(token)[:42], hex.EncodeToString(b), base64.StdEncoding.EncodeToString(b), token, thumbprint(h.jwk), encode(hex.EncodeToString(b)), string(b))
		wide := sha512.Sum512([]byte(token))
		claim("ath", encode(string(wide[:])))
		add("ath", "of another token", v.proof(h, method, path, v.bearer))
		add("", "of the token endpoint", v.proof(h, "POST", tokenPath, ""))
		add("", "of the token endpoint, and this token", v.proof(h, "POST", tokenPath, token))
		other := newHolder(v.t, h.alg)
		add("by the key that the token is bound to", "of another key", v.proof(other, method, path, token))
		add("by the key that the token is bound to", "of another kind of key", v.proof(newHolder(v.t, "EdDSA"), method, path, token))
		add("by the key that the token is bound to", "of another key with the right one's name", other.sign(other.proofHeader().with(members{"kid": thumbprint(h.jwk)}), claims()))
		add("by the key that the token is bound to", "no proof")
	} else {
		add("", "of our own API", v.proof(h, "GET", "/api/v1/agents", v.bearer))
	}

	// What is no JWT in compact form, or not the one spelling of it.
	payload := claims().String()
	good := func() string { return v.proof(h, method, path, token) }
	parts := strings.Split(good(), ".")
	loose := func(text string) string { return text + strings.Repeat(" ", (4-len(text)%3)%3) } // which leaves bits to spare
	for name, text := range map[string]string{
		"an empty header": "", "a word": "x", "a dot": ".", "two dots": "..", "three dots": "...", "four parts": good() + "." + parts[2], "an empty fourth part": good() + ".", "a part before": "." + good(), "two parts": parts[0] + "." + parts[1],
		"a truncated one": good()[:len(good())-9], "one cut in the middle": good()[:len(good())/2], "the scheme too": "DPoP " + good(), "in quotes": strconv.Quote(good()), "padding": good() + "==", "a parameter": good() + ";x=y",
		"JSON serialization": members{"protected": parts[0], "payload": parts[1], "signature": parts[2]}.String(), "the signature in hex": parts[0] + "." + parts[1] + "." + hex.EncodeToString([]byte(parts[2])),
		"header null": h.forge("null", payload), "header array": h.forge("["+h.proofHeader().String()+"]", payload), "no header": h.forge("", payload), "payload null": h.forge(h.proofHeader().String(), "null"), "payload array": h.forge(h.proofHeader().String(), "["+payload+"]"),
		"payload text": h.forge(h.proofHeader().String(), strconv.Quote(payload)), "no payload": h.forge(h.proofHeader().String(), ""), "payload and more": h.forge(h.proofHeader().String(), payload+payload), "payload cut short": h.forge(h.proofHeader().String(), payload[:len(payload)-1]),
		"deep": h.forge(h.proofHeader().String(), `{"x":`+strings.Repeat("[", 2000)+payload+strings.Repeat("]", 1999)+"}"), "payload not encoded": signedText(h, encode(h.proofHeader().with(members{"b64": false}).String())+"."+encode(payload)+"="),
		"padded header": signedText(h, encode(h.proofHeader().String())+"=."+encode(payload)), "spare bits in the signature": parts[0] + "." + parts[1] + "." + spareBits(parts[2]),
		"spare bits in the header": signedText(h, spareBits(encode(loose(h.proofHeader().String())))+"."+parts[1]), "spare bits in the payload": signedText(h, parts[0]+"."+spareBits(encode(loose(payload)))),
	} {
		add("", name, text)
	}
	same := good()
	add("", "two headers", good(), good())
	add("", "two headers, the same", same, same)
	add("", "two headers, one empty", good(), "")
	add("", "two headers, the first empty", "", good())
	add("", "two headers, one of no JWT", good(), "x")
	add("", "two in one header", good()+", "+good())
	add("", "itself twice in one header", same+","+same)

	// What else is signed here.
	add("typ", "an access token", v.bearer)
	add("typ", "a checkpoint", v.checkpoint())
	add("typ", "an assertion", h.sign(h.header(), v.assertionClaims(v.id)))
	add("typ", "an assertion that says all that a proof does", h.sign(h.header().with(members{"jwk": publicJWK(h.private.Public())}), v.assertionClaims(v.id).with(claims())))
	if token != "" {
		add("typ", "the token itself", token)
	}
	add("", "a secret", v.secret)
	return wrong
}

func TestWrongProofsGetNoToken(t *testing.T) {
	t.Parallel()
	v := newService(t)
	p := v.newParty("a:b")
	for _, alg := range strings.Fields(proofAlgs) {
		t.Run(alg, func(t *testing.T) {
			h := newHolder(t, alg)
			wrong := v.wronglySigned(h, "POST", tokenPath, "")
			if alg == "ES256" {
				wrong = slices.Concat(wrong, v.ofBadKeys(h, "POST", tokenPath, ""), v.wronglySaid(h, "POST", tokenPath, ""))
			}
			if len(wrong) < 60 {
				t.Fatalf("only %d of them", len(wrong))
			}
			v.wantBound(v.proves(p, plainGrant, v.proof(h, "POST", tokenPath, "")), h)
			before := v.count(`select coalesce(max(seq), 0) from audit_events`)
			for _, row := range wrong {
				v.wantNoToken(row.name, v.proves(p, plainGrant, row.values...), row.says)
			}
			if n := v.count(`select count(*) from audit_events where action = 'token.issued' and outcome = 'success' and seq > $1`, before); n > 0 {
				t.Errorf("%d tokens were issued", n)
			}
			v.wantBound(v.proves(p, plainGrant, v.proof(h, "POST", tokenPath, "")), h)
		})
	}
	// A header that is longer than all may be is none that is read.
	if a := v.raw("POST " + tokenPath + " HTTP/1.1\r\nHost: x\r\nAuthorization: " + basicAuth(p.id, p.secret) + "\r\nContent-Type: " + formType + "\r\nDPoP: " + strings.Repeat("x", 20<<10) +
		fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n%s", len(plainGrant), plainGrant)); a.status != 431 {
		t.Errorf("a proof of 20 kB is answered %v, want 431", a)
	}
	h := newHolder(t, "ES256")
	v.wantNoToken("one of 8 kB", v.proves(p, plainGrant, strings.Repeat("x", 8<<10)), "")
	v.wantNoToken("one of 8 kB that is no proof", v.proves(p, plainGrant, h.sign(h.proofHeader().with(members{"typ": strings.Repeat("x", 4<<10)}), v.proofClaims("POST", tokenPath, ""))), "typ")
	// The client is who it proves to be, whatever else it proves.
	v.want(v.proves(party{p.id, p.credentialID, newSecret()}, plainGrant, v.proof(h, "POST", tokenPath, "")), 401, "invalid_client")
	v.want(v.proves(p, plainGrant+"&scope=c:d", v.proof(h, "POST", tokenPath, "")), 400, "invalid_scope")
	v.wantUnbound(v.proves(p, plainGrant))
}

// An apiCall is one that a token lets in, if it comes with its proof.
type apiCall struct{ method, path, body string }

func (v *service) apiCalls(victim, token string) []apiCall {
	return []apiCall{
		{"GET", "/agents/" + v.id, ""}, {"POST", "/agents", agentJSON("proved@example.com", "a:b")}, {"PATCH", "/agents/" + victim, `{"owner":"proved"}`},
		{"POST", "/token/introspect", "token=" + token}, {"POST", "/token/revoke", "token=" + token}, {"DELETE", "/agents/" + victim, ""},
	}
}

func TestWrongProofsLetNobodyIn(t *testing.T) {
	t.Parallel()
	v := newService(t)
	p := v.newParty(ourScopes...)
	victim := v.newAgent("a:b")
	other := v.token(v.id, v.secret, agentsRead)
	state := func() int {
		return v.count(`select count(*) + (select count(*) from token_revocations) from agents where status = 'active' and owner = 'team'`)
	}
	for _, alg := range []string{"ES256", "RS256", "EdDSA"} {
		h := newHolder(t, alg)
		token := v.boundToken(p, h, "")
		for _, call := range v.apiCalls(victim, other) {
			if alg != "ES256" && call.method != "GET" {
				continue
			}
			t.Run(alg+" "+call.method+" "+call.path, func(t *testing.T) {
				path := "/api/v1" + call.path
				wrong := v.wronglySaid(h, call.method, path, token)
				if call.method == "GET" {
					wrong = v.wronglySigned(h, call.method, path, token)
				}
				if alg == "ES256" && call.method == "GET" {
					wrong = slices.Concat(wrong, v.ofBadKeys(h, call.method, path, token), v.wronglySaid(h, call.method, path, token))
				}
				before, last := state(), v.count(`select max(seq) from audit_events where actor_id = $1`, p.id)
				for _, row := range wrong {
					says := row.says
					if strings.HasPrefix(row.name, "the jwk of another key") { // whose signature is not looked at then
						says = "bound to"
					}
					v.wantNoEntry(row.name, v.byProof("DPoP", token, call.method, call.path, call.body, row.values...), says)
				}
				if n, now := state(), v.count(`select max(seq) from audit_events where actor_id = $1`, p.id); n != before || now != last {
					t.Errorf("something was done: %d, want %d, and the last event is %d, want %d", n, before, now, last)
				}
				if a := v.bound(h, token, call.method, call.path, call.body); !a.done() && a.status != 201 {
					t.Errorf("the right proof is answered %v", a)
				}
			})
			if a := v.raw(call.method + " /api/v1" + call.path + " HTTP/1.1\r\nHost: x\r\nAuthorization: DPoP " + token + "\r\nDPoP: " + strings.Repeat("x", 20<<10) + "\r\n\r\n"); a.status != 431 {
				t.Errorf("a proof of 20 kB is answered %v, want 431", a)
			}
		}
	}
}

// What differs from the plainest proof, and is right all the same.
func TestRightProofsAreTaken(t *testing.T) {
	t.Parallel()
	v := newService(t, "ISSUER", "https://id.example.com")
	p := v.newParty("a:b")
	var asked atomic.Int64 // for a key that a header names
	lure := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer lure.Close()
	const at = "https://id.example.com"
	ago := func(d time.Duration) float64 { return float64(time.Now().Add(-d).UnixMilli()) / 1000 }
	for _, alg := range strings.Fields(proofAlgs) {
		h := newHolder(t, alg)
		public := publicJWK(h.private.Public())
		type row struct {
			name           string
			header, claims members
			urls           []string // what htu is beside that of the path
		}
		whole := func(d time.Duration) func() any { return func() any { return int64(ago(d)) } }
		rows := []row{{"as it is", nil, nil, nil}}
		if alg == "ES256" {
			rows = append(rows, []row{
				{"kid", members{"kid": "unknown"}, nil, nil},
				{"kid of another", members{"kid": thumbprint(newHolder(t, "ES256").jwk)}, nil, nil},
				{"jku, x5u, x5c", members{"jku": lure.URL, "x5u": lure.URL, "x5c": []string{"MIIB"}, "x5t": "x"}, nil, nil},
				{"b64 that isn't critical", members{"b64": true}, nil, nil},
				{"its jwk with more", members{"jwk": public.with(members{"alg": alg, "use": "sig", "key_ops": []string{"verify"}, "kid": "a", "ext": true, "x5u": lure.URL, "iat": 1})}, nil, nil},
				{"iat 40 s ago", nil, members{"iat": whole(40 * time.Second)}, nil},
				{"iat by a clock that is ahead", nil, members{"iat": whole(-4 * time.Second)}, nil},
				{"iat with a fraction", nil, members{"iat": func() any { return ago(500 * time.Millisecond) }}, nil},
				{"iat with an exponent", nil, members{"iat": func() any { return json.RawMessage(fmt.Sprintf("%.0fe-1", 10*ago(0))) }}, nil},
				{"a jti of 1", nil, members{"jti": "x"}, nil},
				{"a jti of 512", nil, members{"jti": strings.Repeat("x", 512)}, nil},
				{"a jti of anything", nil, members{"jti": "\x00\u202e'\"\\ é:" + newID()}, nil},
				{"exp that is past, nbf that is to come", nil, members{"exp": 1, "nbf": 1 << 40}, nil},
				{"a nonce", nil, members{"nonce": "x"}, nil},
				{"claims that nobody knows", nil, members{"scope": "agents:write", "sub": v.id, "client_id": v.id, "iss": "x", "aud": "x"}, nil},
				{"a query", nil, nil, []string{"?", "?a=b", "?a=b&c=/../x", "?https://evil.example.com"}},
				{"a fragment", nil, nil, []string{"#", "#a", "#?a", "?a#b"}},
			}...)
		}
		if alg == "PS256" {
			rows = append(rows, row{"its jwk with alg", members{"jwk": public.with(members{"alg": "PS256"})}, nil, nil})
		}
		if alg == "EdDSA" {
			rows = append(rows, row{"by its other name", members{"alg": "Ed25519"}, nil, nil}, row{"by its other name, in the jwk", members{"jwk": public.with(members{"alg": "Ed25519"})}, nil, nil})
		}
		for _, r := range rows {
			for _, more := range append(r.urls, "")[:max(1, len(r.urls))] {
				said := func(claims members) members {
					claims = claims.with(r.claims)
					if iat, ok := r.claims["iat"].(func() any); ok {
						claims["iat"] = iat()
					}
					return claims
				}
				header, claims := h.proofHeader().with(r.header), said(v.proofClaims("POST", tokenPath, ""))
				a := v.proves(p, plainGrant, h.sign(header, claims.with(members{"htu": at + tokenPath + more})))
				if a.status != 200 {
					t.Errorf("%s, %s%s: answered %v, want a token", alg, r.name, more, a)
					continue
				}
				token := v.wantBound(a, h)
				claims = said(v.proofClaims("GET", "/api/v1/agents/"+p.id, token))
				if jti, ok := r.claims["jti"].(string); ok { // it is good once
					claims["jti"] = "y" + jti[1:]
				}
				claims["htu"] = claims["htu"].(string) + more
				if a := v.byProof("DPoP", token, "GET", "/agents/"+p.id, "", h.sign(header, claims)); a.status != 200 {
					t.Errorf("%s, %s%s: answered %v, want the agent", alg, r.name, more, a)
				}
			}
		}
		// Of an ECDSA signature either s is right.
		if alg == "ES256" {
			for range 8 {
				signed := encode(h.proofHeader().String()) + "." + encode(v.proofClaims("POST", tokenPath, "").String())
				sig := h.signature(signed)
				s := new(big.Int).Sub(orderP256, new(big.Int).SetBytes(sig[32:]))
				v.wantBound(v.proves(p, plainGrant, signed+"."+encode(string(sig[:32])+string(s.FillBytes(make([]byte, 32))))), h)
				v.wantNoToken("the other s of it", v.proves(p, plainGrant, signed+"."+encode(string(sig))), usedProof) // but it is the same proof
			}
		}
	}
	if asked.Load() > 0 {
		t.Error("a key was fetched from where a header says")
	}
}

// A proof is for a URL below the issuer, whatever the request says of where it came to.
func TestProofIsForTheIssuersURL(t *testing.T) {
	t.Parallel()
	v := newService(t)
	h, p := newHolder(t, "ES256"), v.newParty("a:b")
	for issuer, same := range map[string][]string{
		v.env["ISSUER"]:                    {"HTTP" + strings.TrimPrefix(v.env["ISSUER"], "http")},
		"https://id.example.com":           {"HTTPS://ID.EXAMPLE.COM", "https://id.example.com:443", "Https://Id.Example.Com:443"},
		"https://id.example.com:8443":      {"https://ID.example.com:8443"},
		"http://id.example.com":            {"http://id.example.com:80", "http://ID.EXAMPLE.COM"},
		"https://id.example.com/tenants/a": {"HTTPS://ID.example.com/tenants/a", "https://id.example.com:443/tenants/a"},
	} {
		w := v.another("ISSUER", issuer, "TRUSTED_PROXIES", "127.0.0.0/8")
		u, err := url.Parse(issuer)
		if err != nil {
			t.Fatal(err)
		}
		asks := func(prefix string, htu any, more ...string) answer {
			t.Helper()
			proof := h.sign(h.proofHeader(), w.proofClaims("POST", tokenPath, "").with(members{"htu": htu}))
			return w.do("POST", prefix+tokenPath, plainGrant, append([]string{"Authorization", basicAuth(p.id, p.secret), "Content-Type", formType, "DPoP", proof}, more...)...)
		}
		gets := func(prefix, token string, htu any, more ...string) answer {
			t.Helper()
			proof := h.sign(h.proofHeader(), w.proofClaims("GET", "/api/v1/agents/"+p.id, token).with(members{"htu": htu}))
			return w.do("GET", prefix+"/api/v1/agents/"+p.id, "", append([]string{"Authorization", "DPoP " + token, "DPoP", proof}, more...)...)
		}
		prefixes := []string{""}
		if u.Path != "" { // a proxy takes it away, or leaves it
			prefixes = append(prefixes, u.Path)
		}
		agentPath := "/api/v1/agents/" + p.id
		for _, prefix := range prefixes {
			token := ""
			for _, base := range append(same, issuer) {
				token = w.wantBound(asks(prefix, base+tokenPath), h)
				w.want(gets(prefix, token, base+agentPath), 200, "")
			}
			for _, wrong := range wrongURLs(issuer, tokenPath) {
				w.wantNoToken(fmt.Sprintf("issuer %s, htu %q", issuer, wrong), asks(prefix, wrong), "htu")
			}
			for _, wrong := range wrongURLs(issuer, agentPath) {
				w.wantNoEntry(fmt.Sprintf("issuer %s, htu %q", issuer, wrong), gets(prefix, token, wrong), "htu")
			}
			// What the request says of it.
			for _, header := range [][]string{
				{"X-Forwarded-Host", "evil.example.com"}, {"X-Forwarded-Host", "evil.example.com", "X-Forwarded-Proto", "https", "X-Forwarded-Port", "443"}, {"X-Forwarded-Prefix", "/evil"},
				{"Forwarded", "for=127.0.0.1;host=evil.example.com;proto=https"}, {"X-Original-Url", "/evil"}, {"X-Rewrite-Url", "/evil"}, {"X-Http-Method-Override", "DELETE"},
			} {
				w.wantBound(asks(prefix, issuer+tokenPath, header...), h)
				for _, evil := range []string{"https://evil.example.com", "http://evil.example.com", w.url + "/evil", issuer + "/evil"} {
					w.wantNoToken(fmt.Sprintf("%v, htu %s", header, evil), asks(prefix, evil+tokenPath, header...), "htu")
					w.wantNoEntry(fmt.Sprintf("%v, htu %s", header, evil), gets(prefix, token, evil+agentPath, header...), "htu")
				}
				w.want(gets(prefix, token, issuer+agentPath, header...), 200, "")
			}
			for _, target := range []string{prefix + agentPath, "http://evil.example.com" + prefix + agentPath} {
				for htu, status := range map[string]int{issuer + agentPath: 200, "http://evil.example.com" + agentPath: 401, "https://evil.example.com" + prefix + agentPath: 401} {
					proof := h.sign(h.proofHeader(), w.proofClaims("GET", agentPath, token).with(members{"htu": htu}))
					a := w.raw("GET " + target + " HTTP/1.1\r\nHost: evil.example.com\r\nAuthorization: DPoP " + token + "\r\nDPoP: " + proof + "\r\n\r\n")
					if a.status != status {
						t.Errorf("%s of evil.example.com, htu %s: answered %v, want %d", target, htu, a, status)
					}
				}
			}
		}
		// The address that it has here is none that anybody knows it by.
		if issuer != w.url {
			w.wantNoToken("its own address", asks("", w.url+tokenPath), "htu")
		}
	}
}

// A query is no part of what a proof is for, and HEAD is a method of its own.
func TestProofIsForAMethod(t *testing.T) {
	t.Parallel()
	v := newService(t)
	p, h := v.newParty(ourScopes...), newHolder(t, "ES256")
	token := v.boundToken(p, h, "")
	path := "/api/v1/agents"
	for _, query := range []string{"?limit=1", "?limit=2&page=1"} {
		v.want(v.byProof("DPoP", token, "GET", "/agents"+query, "", v.proof(h, "GET", path, token)), 200, "")
		v.want(v.byProof("DPoP", token, "GET", "/agents"+query, "", v.proof(h, "GET", path+"?limit=1", token)), 200, "")
	}
	v.want(v.byProof("DPoP", token, "HEAD", "/agents", "", v.proof(h, "HEAD", path, token)), 200, "")
	for asked, proved := range map[string]string{"HEAD": "GET", "GET": "HEAD"} {
		if a := v.byProof("DPoP", token, asked, "/agents", "", v.proof(h, proved, path, token)); a.status != 401 {
			t.Errorf("%s by a proof for %s is answered %v, want 401", asked, proved, a)
		}
	}
}

// A proof is good once, on all copies, whether anything is limited or not.
func TestProofIsGoodOnce(t *testing.T) {
	t.Parallel()
	for _, limit := range []string{"0", "100000"} {
		v := newService(t, "RATE_LIMIT_PER_MINUTE", limit)
		two := v.another()
		p, h := v.newParty(ourScopes...), newHolder(t, "ES256")
		token := v.boundToken(p, h, "")
		agents := "/api/v1/agents/" + p.id
		copies := []*service{v, two}
		for i, first := range copies {
			proof := v.proof(h, "POST", tokenPath, "")
			v.wantBound(first.proves(p, plainGrant, proof), h)
			for range 2 {
				v.wantNoToken("again", first.proves(p, plainGrant, proof), usedProof)
				v.wantNoToken("at the other copy", copies[1-i].proves(p, plainGrant, proof), usedProof)
			}
			for _, call := range v.apiCalls(v.newAgent("a:b"), "x") {
				body := call.body
				if call.path == "/agents" {
					body = agentJSON(fmt.Sprintf("once%d@example.com", agentNumber.Add(1)), "a:b")
				}
				proof := v.proof(h, call.method, "/api/v1"+call.path, token)
				if a := first.byProof("DPoP", token, call.method, call.path, body, proof); !a.done() && a.status != 201 {
					t.Fatalf("%s %s: answered %v", call.method, call.path, a)
				}
				v.wantNoEntry("again", first.byProof("DPoP", token, call.method, call.path, body, proof), usedProof)
				v.wantNoEntry("at the other copy", copies[1-i].byProof("DPoP", token, call.method, call.path, body, proof), usedProof)
			}
		}
		// What tells proofs apart is the key and the jti, and nothing else.
		claims := v.proofClaims("POST", tokenPath, "")
		first := h.sign(h.proofHeader(), claims)
		v.wantBound(v.proves(p, plainGrant, first), h)
		for name, proof := range map[string]string{
			"another iat":                      h.sign(h.proofHeader(), claims.with(members{"iat": time.Now().Unix() - 5})),
			"another htu":                      h.sign(h.proofHeader(), claims.with(members{"htu": v.env["ISSUER"] + tokenPath + "?x"})),
			"more claims":                      h.sign(h.proofHeader(), claims.with(members{"x": 1})),
			"another header":                   h.sign(h.proofHeader().with(members{"kid": "x"}), claims),
			"another signature":                h.sign(h.proofHeader(), claims),
			"its jwk with more":                h.sign(h.proofHeader().with(members{"jwk": h.jwk}), claims),
			"another spelling of the jti":      h.forge(h.proofHeader().String(), strings.Replace(claims.String(), claims["jti"].(string), fmt.Sprintf(`\u%04x`, claims["jti"].(string)[0])+claims["jti"].(string)[1:], 1)),
			"as it was, with a space":          first + " ",
			"as it was, with another's client": first,
		} {
			by := p
			if strings.HasSuffix(name, "client") {
				by = v.newParty("a:b")
			}
			v.wantNoToken(name, two.proves(by, plainGrant, proof), usedProof)
		}
		onward := v.proofClaims("GET", agents, token).with(members{"jti": claims["jti"]})
		v.wantNoEntry("the same jti at our API", two.byProof("DPoP", token, "GET", "/agents/"+p.id, "", h.sign(h.proofHeader(), onward)), usedProof)
		other := newHolder(t, "ES256")
		v.wantBound(v.proves(p, plainGrant, other.sign(other.proofHeader(), claims)), other)
		v.wantBound(v.proves(p, plainGrant, h.sign(h.proofHeader(), claims.with(members{"jti": strings.ToUpper(claims["jti"].(string)) + "X"}))), h)
	}
}

// What is refused for another reason is not used up: nobody can spend what another has signed.
func TestRefusedProofIsNotUsedUp(t *testing.T) {
	t.Parallel()
	v := newService(t)
	two := v.another()
	p, h := v.newParty(ourScopes...), newHolder(t, "ES256")
	token := v.boundToken(p, h, "")
	suspended := v.newParty("a:b")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+suspended.id, `{"status":"suspended"}`), 200, "")

	claims := v.proofClaims("POST", tokenPath, "")
	proof := h.sign(h.proofHeader(), claims)
	thief := newHolder(t, "ES256")
	for name, a := range map[string]answer{
		"a wrong secret":      v.proves(party{p.id, p.credentialID, newSecret()}, plainGrant, proof),
		"nobody":              v.do("POST", tokenPath, plainGrant, "Content-Type", formType, "DPoP", proof),
		"a suspended client":  v.proves(suspended, plainGrant, proof),
		"cut short":           v.proves(p, plainGrant, proof[:len(proof)-6]),
		"signed by a thief":   v.proves(p, plainGrant, thief.sign(h.proofHeader(), claims)),
		"in two headers":      v.proves(p, plainGrant, proof, v.proof(thief, "POST", tokenPath, "")),
		"of another typ":      v.proves(p, plainGrant, h.sign(h.proofHeader().with(members{"typ": "JWT"}), claims)),
		"for another method":  v.proves(p, plainGrant, h.sign(h.proofHeader(), claims.with(members{"htm": "GET"}))),
		"for another URL":     v.proves(p, plainGrant, h.sign(h.proofHeader(), claims.with(members{"htu": "https://evil.example.com"}))),
		"of another time":     v.proves(p, plainGrant, h.sign(h.proofHeader(), claims.with(members{"iat": 1}))),
		"at our API":          v.byProof("DPoP", token, "GET", "/agents/"+p.id, "", proof),
		"as client assertion": v.byAssertion("", proof),
	} {
		if a.status < 400 || a.status > 403 {
			t.Errorf("%s: answered %v, want a refusal", name, a)
		}
	}
	v.wantBound(two.proves(p, plainGrant, proof), h)
	v.wantNoToken("then", v.proves(p, plainGrant, proof), usedProof)

	path := "/agents/" + p.id
	claims = v.proofClaims("GET", "/api/v1"+path, token)
	proof = h.sign(h.proofHeader(), claims)
	revoked := v.boundToken(p, h, "")
	v.want(v.form(p.id, p.secret, "/revoke", "token="+revoked), 200, "")
	for name, a := range map[string]answer{
		"another token":   v.byProof("DPoP", v.boundToken(p, h, ""), "GET", path, "", proof),
		"another key":     v.byProof("DPoP", v.boundToken(p, thief, ""), "GET", path, "", proof),
		"a dead token":    v.byProof("DPoP", revoked, "GET", path, "", h.sign(h.proofHeader(), claims.with(members{"ath": tokenHash(revoked)}))),
		"by Bearer":       v.byProof("Bearer", token, "GET", path, "", proof),
		"another method":  v.byProof("DPoP", token, "PATCH", path, `{"owner":"x"}`, proof),
		"another path":    v.byProof("DPoP", token, "GET", "/agents", "", proof),
		"a thief's":       v.byProof("DPoP", token, "GET", path, "", thief.sign(h.proofHeader(), claims)),
		"two headers":     v.byProof("DPoP", token, "GET", path, "", proof, proof),
		"no token":        v.do("GET", "/api/v1"+path, "", "DPoP", proof),
		"for a new token": v.proves(p, plainGrant, proof),
	} {
		if a.status != 401 && a.status != 400 {
			t.Errorf("%s: answered %v, want a refusal", name, a)
		}
	}
	v.want(two.byProof("DPoP", token, "GET", path, "", proof), 200, "")
	v.wantNoEntry("then", v.byProof("DPoP", token, "GET", path, "", proof), usedProof)
}

// onceAtOnce sends the same proof six times at the same instant to two copies, many times
// over, for a token and to our API; exactly one is to get through.
func onceAtOnce(t *testing.T, what string, copies []*service, p party, h holder, token string, n int) {
	t.Helper()
	v := copies[0]
	for round := range n {
		proof := v.proof(h, "POST", tokenPath, "")
		if got := tally(6, func(i int) answer { return copies[i%2].proves(p, plainGrant, proof) }); got["200"] != 1 || got["400 "+badProof] != 5 {
			t.Fatalf("%s, round %d: six tokens for one proof are answered %v, want one 200", what, round, got)
		}
		path := "/agents/" + p.id
		proof = v.proof(h, "GET", "/api/v1"+path, token)
		if got := tally(6, func(i int) answer { return copies[i%2].byProof("DPoP", token, "GET", path, "", proof) }); got["200"] != 1 || got["401 UNAUTHORIZED"] != 5 {
			t.Fatalf("%s, round %d: six calls by one proof are answered %v, want one 200", what, round, got)
		}
	}
}

func TestProofIsGoodOnceAtTheSameInstant(t *testing.T) {
	t.Parallel()
	for _, limit := range []string{"0", "100000"} {
		v := newService(t, "RATE_LIMIT_PER_MINUTE", limit)
		p, h := v.newParty("a:b"), newHolder(t, "EdDSA")
		copies := []*service{v, v.another()}
		copies[1].token(p.id, p.secret, "") // so that none has to compare it
		onceAtOnce(t, "limit "+limit, copies, p, h, v.boundToken(p, h, ""), rounds(60, 2000))
	}
}

// Without Redis it is PostgreSQL that remembers.
func TestProofIsGoodOnceWithoutRedis(t *testing.T) {
	t.Parallel()
	for _, mode := range []proxyMode{refusing, swallowing} {
		env := map[string]string{"REDIS_URL": newRedis(t)}
		proxy := proxyRedis(t, env)
		v := newService(t, "REDIS_URL", env["REDIS_URL"], "RATE_LIMIT_PER_MINUTE", "100000")
		p, h := v.newParty(ourScopes...), newHolder(t, "EdDSA")
		copies := []*service{v, v.another()}
		copies[1].token(p.id, p.secret, "")
		token := v.boundToken(p, h, "")
		proxy.set(mode)
		for _, w := range copies {
			v.eventually("Redis is lost", func() bool { return strings.Contains(w.do("GET", "/health", "").raw, `"redis":"down"`) })
		}
		onceAtOnce(t, "without Redis", copies, p, h, token, rounds(30, 1000))

		// What was refused for another reason is not used up here either; and one jti is each key's own.
		proof, thief := v.proof(h, "POST", tokenPath, ""), newHolder(t, "EdDSA")
		v.want(v.proves(party{p.id, p.credentialID, newSecret()}, plainGrant, proof), 401, "invalid_client")
		v.wantNoToken("cut short", v.proves(p, plainGrant, proof[:len(proof)-6]), "")
		v.wantBound(v.proves(p, plainGrant, proof), h)
		v.wantNoToken("then", copies[1].proves(p, plainGrant, proof), usedProof)
		claims := v.proofClaims("POST", tokenPath, "")
		v.wantBound(v.proves(p, plainGrant, h.sign(h.proofHeader(), claims)), h)
		v.wantBound(copies[1].proves(p, plainGrant, thief.sign(thief.proofHeader(), claims)), thief)
		v.wantNoToken("the same jti", copies[1].proves(p, plainGrant, h.sign(h.proofHeader(), claims.with(members{"iat": time.Now().Unix() - 3}))), usedProof)
		v.wantNoEntry("the same jti at our API", v.byProof("DPoP", token, "GET", "/agents/"+p.id, "",
			h.sign(h.proofHeader(), v.proofClaims("GET", "/api/v1/agents/"+p.id, token).with(members{"jti": claims["jti"]}))), usedProof)

		// It does not stay there for ever.
		if n := v.count(`select count(*) from token_revocations where expires_at > now() + interval '15 minutes'`); n > 0 {
			t.Errorf("%d proofs are remembered for longer than they can be used", n)
		}
		// And when Redis is back, what is new is good once.
		proxy.set(passing)
		for _, w := range copies {
			v.eventually("Redis is back", func() bool { return strings.Contains(w.do("GET", "/health", "").raw, `"redis":"up"`) })
		}
		v.eventually("proofs are good once again", func() bool { // a connection that was lost may be found to be so by a request
			proof := v.proof(h, "POST", tokenPath, "")
			got := tally(6, func(i int) answer { return copies[i%2].proves(p, plainGrant, proof) })
			return got["200"] == 1 && got["400 "+badProof] == 5
		})
	}
}

// Redis comes and goes: a proof may then be good once for each of the two that remember, and
// never more often.
func TestProofWhileRedisComesAndGoes(t *testing.T) {
	t.Parallel()
	env := map[string]string{"REDIS_URL": newRedis(t)}
	proxy := proxyRedis(t, env)
	v := newService(t, "REDIS_URL", env["REDIS_URL"], "RATE_LIMIT_PER_MINUTE", "100000")
	p, h := v.newParty("a:b"), newHolder(t, "EdDSA")
	copies := []*service{v, v.another()}
	copies[1].token(p.id, p.secret, "")
	token := v.boundToken(p, h, "")
	path := "/agents/" + p.id
	for round := range rounds(12, 300) {
		proof := v.proof(h, "GET", "/api/v1"+path, token)
		got := map[string]int{}
		for _, mode := range []proxyMode{passing, refusing, passing} {
			proxy.set(mode)
			for kind, n := range tally(8, func(i int) answer { return copies[i%2].byProof("DPoP", token, "GET", path, "", proof) }) {
				got[kind] += n
			}
		}
		if got["200"] < 1 || got["200"] > 2 || got["200"]+got["401 UNAUTHORIZED"]+got["503 SERVICE_UNAVAILABLE"] != 24 {
			t.Fatalf("round %d: 24 calls by one proof are answered %v, want one or two 200", round, got)
		}
	}
}

// Where neither store answers nobody is let in, and afterwards a proof is good once at most.
func TestProofWithoutStores(t *testing.T) {
	t.Parallel()
	env := map[string]string{"DATABASE_URL": newDatabase(t), "REDIS_URL": newRedis(t)}
	database, cache := proxyDatabase(t, env), proxyRedis(t, env)
	v := newService(t, "DATABASE_URL", env["DATABASE_URL"], "REDIS_URL", env["REDIS_URL"])
	p, h := v.newParty("a:b"), newHolder(t, "ES256")
	token := v.boundToken(p, h, "")
	path := "/agents/" + p.id
	for name, lost := range map[string][]*proxy{"both": {database, cache}, "PostgreSQL": {database}} {
		var proofs, calls []string
		for range 4 {
			proofs, calls = append(proofs, v.proof(h, "POST", tokenPath, "")), append(calls, v.proof(h, "GET", "/api/v1"+path, token))
		}
		for _, of := range lost {
			of.set(refusing)
		}
		for i := range proofs {
			a := v.proves(p, plainGrant, proofs[i])
			if a.status != 503 || a.code() != "temporarily_unavailable" || a.text("access_token") != "" || a.header.Get("Retry-After") == "" {
				t.Errorf("without %s, a token is answered %v, want 503", name, a)
			}
			if a := v.byProof("DPoP", token, "GET", path, "", calls[i]); a.status != 503 || a.code() != "SERVICE_UNAVAILABLE" {
				t.Errorf("without %s, a call is answered %v, want 503", name, a)
			}
		}
		for _, of := range lost {
			of.set(passing)
		}
		v.eventually("all is well", func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
		// A connection that was lost may be found to be so by a request; that of Redis is then
		// asked for in vain, so that either store may remember the same proof.
		most := len(lost)
		often := func(ask func() answer, refused string) (got map[string]int) {
			got = map[string]int{}
			v.eventually("no store is missed", func() bool {
				now := tally(4, func(int) answer { return ask() })
				for kind, n := range now {
					if kind[:3] != "503" {
						got[kind] += n
					}
				}
				return now["200"]+now[refused] == 4
			})
			return got
		}
		for i := range proofs {
			if got := often(func() answer { return v.proves(p, plainGrant, proofs[i]) }, "400 "+badProof); got["200"] > most {
				t.Errorf("after %s was lost, tokens for one proof are answered %v, want %d 200 at most", name, got, most)
			}
			if got := often(func() answer { return v.byProof("DPoP", token, "GET", path, "", calls[i]) }, "401 UNAUTHORIZED"); got["200"] > most {
				t.Errorf("after %s was lost, calls by one proof are answered %v, want %d 200 at most", name, got, most)
			}
		}
	}
	// What can't be recorded is no token, and is in no log.
	allow := v.refuseEvents()
	v.want(v.proves(p, plainGrant, v.proof(h, "POST", tokenPath, "")), 503, "temporarily_unavailable")
	allow()
	v.eventually("all is well", func() bool { return v.do("GET", "/health", "").text("status") == "ok" })
	v.boundToken(p, h, "")
}

// A proof is remembered for as long as it is good: one that was signed by a clock which is
// ahead is so for longer.
func TestProofIsRememberedForAsLongAsItIsGood(t *testing.T) {
	t.Parallel()
	env := map[string]string{"REDIS_URL": newRedis(t)}
	proxy := proxyRedis(t, env)
	proxy.set(refusing)
	without := newService(t, "REDIS_URL", env["REDIS_URL"])
	with := newService(t)
	type use struct {
		v     *service
		p     party
		proof string
	}
	var used []use
	begun := time.Now()
	for _, v := range []*service{with, without} {
		p, h := v.newParty("a:b"), newHolder(t, "ES256")
		proof := h.sign(h.proofHeader(), v.proofClaims("POST", tokenPath, "").with(members{"iat": time.Now().Unix() + 8}))
		v.wantBound(v.proves(p, plainGrant, proof), h)
		used = append(used, use{v, p, proof})
	}
	// It is good until 68 s from now.
	keys, err := with.rdb.Keys(t.Context(), "rate:proof:*").Result()
	if err != nil || len(keys) != 1 {
		t.Fatalf("Redis has the proofs %v, %v", keys, err)
	}
	if life, err := with.rdb.PTTL(t.Context(), keys[0]).Result(); err != nil || life < 69*time.Second {
		t.Errorf("Redis remembers it for %v, %v", life, err)
	}
	if n := without.count(`select count(*) from token_revocations where expires_at > now() + interval '69 s'`); n != 1 {
		t.Errorf("PostgreSQL remembers %d proofs for as long as they are good, want one", n)
	}
	waits := []time.Duration{time.Second}
	if soak {
		waits = []time.Duration{30 * time.Second, 59 * time.Second, 62 * time.Second, 66 * time.Second}
	}
	for _, after := range waits {
		time.Sleep(time.Until(begun.Add(after)))
		for _, u := range used {
			u.v.wantNoToken(fmt.Sprintf("after %s", after), u.v.proves(u.p, plainGrant, u.proof), "")
		}
	}
}

// A bound token is none without its proof, nor by another scheme; nor does a proof make a
// bound one of another, at any route.
func TestBoundTokenIsNoBearerToken(t *testing.T) {
	t.Parallel()
	v := newService(t)
	p, h := v.newParty(ourScopes...), newHolder(t, "ES256")
	bound, unbound := v.boundToken(p, h, ""), v.token(p.id, p.secret, "")
	tried := 0
	for _, rt := range routes(t) {
		method, path, _ := strings.Cut(rt.pattern, " ")
		if rt.public || path == tokenPath {
			continue
		}
		path = strings.TrimPrefix(regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(path, p.id), "/api/v1")
		body := agentJSON("downgraded@example.com", "a:b")
		if rt.oauth {
			body = "token=" + v.secret
		} else if method == "GET" {
			body = ""
		}
		proof := func(token string) string { return v.proof(h, method, "/api/v1"+path, token) }
		for _, row := range []struct {
			name, scheme, token string
			proofs              []string
			isDPoP              bool
		}{
			{"bound, as Bearer", "Bearer", bound, nil, true},
			{"bound, as bearer", "bearer", bound, nil, true},
			{"bound, as Bearer with its proof", "Bearer", bound, []string{proof(bound)}, true},
			{"bound, as Bearer with two proofs", "Bearer", bound, []string{proof(bound), proof(bound)}, true},
			{"bound, as Bearer with no JWT", "Bearer", bound, []string{"x"}, true},
			{"bound, as Bearer with an empty proof", "BEARER", bound, []string{""}, true},
			{"unbound, as DPoP", "DPoP", unbound, []string{proof(unbound)}, false},
			{"unbound, as dpop", "dpop", unbound, []string{proof(unbound)}, false},
			{"unbound, as DPoP without proof", "DPoP", unbound, nil, false},
		} {
			tried++
			a := v.byProof(row.scheme, row.token, method, path, body, row.proofs...)
			challenge := a.header.Get("WWW-Authenticate")
			if a.status != 401 || a.code() != "UNAUTHORIZED" && a.code() != "invalid_token" || !strings.Contains(challenge, `error="invalid_token"`) && row.proofs != nil || row.isDPoP && !v.dpopChallenge("invalid_token").MatchString(challenge) {
				t.Errorf("%s: a token that is %s is answered %v, %q, want 401 invalid_token", rt.pattern, row.name, a, challenge)
			}
		}
		for _, scheme := range []string{"Basic", "Digest", "Token", "DPoPx", "MAC", "DPoP,Bearer"} {
			if a := v.byProof(scheme, bound, method, path, body, proof(bound)); a.status != 401 && a.status != 400 {
				t.Errorf("%s: by the scheme %s a token is answered %v, want 401", rt.pattern, scheme, a)
			}
		}
		for name, header := range map[string][]string{
			"both schemes": {"Authorization", "Bearer " + bound, "Authorization", "DPoP " + bound}, "DPoP twice": {"Authorization", "DPoP " + bound, "Authorization", "DPoP " + bound},
			"another's beside it": {"Authorization", "Bearer " + unbound, "Authorization", "DPoP " + bound},
		} {
			kind := "application/json"
			if rt.oauth {
				kind = formType
			}
			if a := v.do(method, "/api/v1"+path, body, append(header, "DPoP", proof(bound), "Content-Type", kind)...); a.status != 400 {
				t.Errorf("%s: %s is answered %v, want 400", rt.pattern, name, a)
			}
		}
		// The right one is let in, whatever comes of it.
		for _, scheme := range []string{"DPoP", "dpop", "DPOP", "dPoP"} {
			if method == "DELETE" || method == "PATCH" {
				continue
			}
			if a := v.byProof(scheme, bound, method, path, body, proof(bound)); a.status == 401 || a.status >= 500 {
				t.Errorf("%s: as %s a token with its proof is answered %v", rt.pattern, scheme, a)
			}
		}
	}
	if tried < 9*14 {
		t.Errorf("only %d were tried", tried)
	}
	v.want(v.bound(h, bound, "PATCH", "/agents/"+p.id, `{"owner":"a"}`), 200, "")
	v.want(v.api(unbound, "PATCH", "/agents/"+p.id, `{"owner":"b"}`), 200, "")
	// It is nobody's secret, assertion or grant either; nor is a proof.
	for name, text := range map[string]string{"a bound token": bound, "a proof": v.proof(h, "POST", tokenPath, ""), "a proof of our API": v.proof(h, "GET", "/api/v1/agents", bound)} {
		v.wantEveryAuthentication("a secret that is "+name, p.id, text, 401, "invalid_client")
		for _, path := range []string{"", "/introspect", "/revoke"} {
			v.want(v.byAssertion(path, text, "token", "x"), 401, "invalid_client")
		}
		v.want(v.byGrant(text), 401, "invalid_client")
		if name == "a bound token" {
			continue
		}
		v.wantRefused(name, text)
		v.want(v.byProof("DPoP", text, "GET", "/agents/"+p.id, "", v.proof(h, "GET", "/api/v1/agents/"+p.id, text)), 401, "UNAUTHORIZED")
		v.want(v.exchanges(p, text, "resource", work), 400, "invalid_request")
		v.want(v.form(p.id, p.secret, "/revoke", "token="+text), 200, "")
	}
	for _, path := range []string{"", "/introspect", "/revoke"} { // as an assertion by the very key that signs assertions
		id, _, key := v.newKeyClient("ES256", tokensRead)
		claims := v.assertionClaims(id).with(v.proofClaims("POST", tokenPath+path, ""))
		v.want(v.byAssertion(path, key.sign(key.proofHeader(), claims), "token", "x"), 401, "invalid_client")
		v.want(v.byAssertion(path, key.sign(key.header(), claims), "token", "x"), 200, "")
	}
	// A token is no client authentication, by whichever scheme.
	if a := v.byProof("DPoP", bound, "POST", "/token", plainGrant, v.proof(h, "POST", tokenPath, bound)); a.status != 401 || a.code() != "invalid_client" {
		t.Errorf("a token for a token is answered %v, want 401 invalid_client", a)
	}
	for _, path := range []string{"/introspect", "/revoke"} { // nor beside one
		a := v.byProof("DPoP", bound, "POST", "/token"+path, url.Values{"token": {"x"}, "client_id": {p.id}, "client_secret": {p.secret}}.Encode(), v.proof(h, "POST", tokenPath+path, bound))
		v.want(a, 400, "invalid_request")
	}
	// Who has the proof but lacks the scope is told so by the scheme that it came by.
	narrow := v.boundToken(v.newParty("a:b"), h, "")
	a := v.want(v.bound(h, narrow, "GET", "/agents", ""), 403, "FORBIDDEN")
	if got := a.header.Get("WWW-Authenticate"); !strings.HasPrefix(got, "DPoP ") || !strings.Contains(got, `error="insufficient_scope"`) || !strings.Contains(got, `scope="agents:read"`) {
		t.Errorf("without the scope it is challenged with %q", got)
	}
}

// A proof binds the token of any grant, however the client proves itself.
func TestEveryGrantBindsItsToken(t *testing.T) {
	t.Parallel()
	theirs := newHolder(t, "ES256")
	v := newService(t, "WORKLOAD_ISSUERS", trusting(map[string]holder{cluster: theirs}, nil))
	p, h := v.newParty("a:b"), newHolder(t, "ES256")
	keyID, _, key := v.newKeyClient("ES256", "a:b")
	loadID := v.newAgent("a:b")
	v.want(v.bind(loadID, cluster, screener, nil), 201, "")
	v.delegate(p, party{id: keyID}, party{id: loadID})
	subject := v.tokenFor(p, "")
	exchange := exchangeForm(subject, "resource", work)
	asAssertion := func(form url.Values, text string) string {
		form.Set("client_assertion_type", assertionType)
		form.Set("client_assertion", text)
		return form.Encode()
	}
	plain := func() url.Values { return url.Values{"grant_type": {"client_credentials"}} }
	for name, row := range map[string]struct {
		by   string
		form func() string
	}{
		"a secret in the form": {p.id, func() string {
			return plainGrant + "&" + url.Values{"client_id": {p.id}, "client_secret": {p.secret}}.Encode()
		}},
		"a key":      {keyID, func() string { return asAssertion(plain(), v.assertion(key, keyID)) }},
		"a workload": {loadID, func() string { return asAssertion(plain(), theirs.vouch(v.workloadClaims(cluster, screener))) }},
		"a workload's grant": {loadID, func() string {
			return url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "assertion": {theirs.vouch(v.workloadClaims(cluster, screener))}}.Encode()
		}},
		"an exchange by who has a key":    {keyID, func() string { return asAssertion(exchange, v.assertion(key, keyID)) }},
		"an exchange by who is another's": {loadID, func() string { return asAssertion(exchange, theirs.vouch(v.workloadClaims(cluster, screener))) }},
	} {
		post := func(proofs ...string) answer {
			header := []string{"Content-Type", formType}
			for _, proof := range proofs {
				header = append(header, "DPoP", proof)
			}
			return v.do("POST", tokenPath, row.form(), header...)
		}
		v.wantUnbound(post())
		for _, of := range []holder{h, key} { // the client's own key is as good as any
			proof := v.proof(of, "POST", tokenPath, "")
			token := v.wantBound(post(proof), of)
			if readClaims(t, token).ClientID != row.by || !v.active(token) {
				t.Errorf("by %s: the claims are %+v", name, readClaims(t, token))
			}
			v.wantNoToken("by "+name+", again", post(proof), usedProof)
			e := v.audit("agentId=" + row.by + "&action=token.issued&limit=1").Data[0]
			if e.fact("jkt") != thumbprint(of.jwk) || e.fact("jti") != readClaims(t, token).ID || e.Outcome != "success" {
				t.Errorf("by %s: the event says %s", name, e.Metadata)
			}
		}
		v.wantNoToken("by "+name+", a proof for GET", post(v.proof(h, "GET", tokenPath, "")), "htm")
		v.wantNoToken("by "+name+", two proofs", post(v.proof(h, "POST", tokenPath, ""), v.proof(h, "POST", tokenPath, "")), "")
		v.wantNoToken("by "+name+", an empty one", post(""), "")
		v.wantUnbound(post())
		if e := v.audit("agentId=" + row.by + "&action=token.issued&limit=1").Data[0]; strings.Contains(string(e.Metadata), "jkt") {
			t.Errorf("by %s: the event of an unbound token says %s", name, e.Metadata)
		}
		v.want(v.allow(row.by, "proofRequired", "true"), 200, "")
		v.wantNoToken("by "+name+", who needs a proof", post(), "")
		v.wantBound(post(v.proof(h, "POST", tokenPath, "")), h)
		v.want(v.allow(row.by, "proofRequired", "false"), 200, "")
		v.wantUnbound(post())
	}
	v.checkChain()
}

func TestIntrospectionShowsWhatATokenIsBoundTo(t *testing.T) {
	t.Parallel()
	v := newService(t)
	p := v.newParty("a:b")
	for _, alg := range strings.Fields(proofAlgs) {
		h := newHolder(t, alg)
		a := v.want(v.introspect(v.boundToken(p, h, "resource="+work)), 200, "")
		cnf, _ := a.body["cnf"].(map[string]any)
		if a.body["active"] != true || a.text("token_type") != "DPoP" || len(cnf) != 1 || cnf["jkt"] != thumbprint(h.jwk) {
			t.Errorf("a token that is bound to a key of %s is introspected as %v", alg, a)
		}
	}
	if a := v.want(v.introspect(v.tokenFor(p, "")), 200, ""); a.text("token_type") != "Bearer" || strings.Contains(a.raw, "cnf") {
		t.Errorf("an unbound token is introspected as %v", a)
	}
}

// Whatever ends a token ends it for who has its key, too, at once and on all copies.
func TestBoundTokenEndsAsAnyDoes(t *testing.T) {
	t.Parallel()
	v := newService(t)
	two := v.another()
	copies := []*service{v, two}
	h := newHolder(t, "ES256")
	for _, row := range []struct {
		name string
		do   func(p party, token string) answer
	}{
		{"suspended", func(p party, _ string) answer {
			return two.api(v.bearer, "PATCH", "/agents/"+p.id, `{"status":"suspended"}`)
		}},
		{"decommissioned", func(p party, _ string) answer { return two.api(v.bearer, "DELETE", "/agents/"+p.id, "") }},
		{"rotated", func(p party, _ string) answer { two.rotate(p.id, p.credentialID); return answer{status: 200} }},
		{"credential revoked", func(p party, _ string) answer {
			return two.api(v.bearer, "DELETE", "/agents/"+p.id+"/credentials/"+p.credentialID, "")
		}},
		{"credential expired", func(p party, _ string) answer { v.setExpiry(p.credentialID, time.Now()); return answer{status: 200} }},
		{"revoked", func(_ party, token string) answer { return two.form(v.id, v.secret, "/revoke", "token="+token) }},
		{"revoked by itself", func(_ party, token string) answer {
			return two.bound(h, token, "POST", "/token/revoke", "token="+token)
		}},
	} {
		p, worker := v.newParty(ourScopes...), v.newParty("a:b")
		v.exec(`update agents set capabilities = array_append(capabilities, 'a:b') where agent_id = $1`, p.id)
		v.delegate(p, worker)
		token := v.boundToken(p, h, "")
		path := "/agents/" + p.id
		exchanged := v.wantBound(v.proves(worker, exchangeForm(token, "resource", work).Encode(), v.proof(h, "POST", tokenPath, "")), h)
		before := v.proof(h, "GET", "/api/v1"+path, token)
		for _, w := range copies {
			w.want(w.bound(h, token, "GET", path, ""), 200, "")
		}
		if !v.active(token) || !v.active(exchanged) {
			t.Fatalf("%s: they are not active before", row.name)
		}
		if a := row.do(p, token); !a.done() {
			t.Fatalf("%s: %v", row.name, a)
		}
		for _, w := range copies {
			for name, a := range map[string]answer{
				"GET": w.bound(h, token, "GET", path, ""), "PATCH": w.bound(h, token, "PATCH", path, `{"owner":"x"}`), "a proof of before": w.byProof("DPoP", token, "GET", path, "", before),
				"introspect": w.bound(h, token, "POST", "/token/introspect", "token=x"), "revoke": w.bound(h, token, "POST", "/token/revoke", "token=x"),
			} {
				if a.status != 401 || a.code() != "UNAUTHORIZED" && a.code() != "invalid_token" || !v.dpopChallenge("invalid_token").MatchString(a.header.Get("WWW-Authenticate")) && name != "a proof of before" {
					t.Errorf("%s: %s is answered %v, %q, want 401 invalid_token", row.name, name, a, a.header.Get("WWW-Authenticate"))
				}
			}
			if w.active(token) || w.active(exchanged) {
				t.Errorf("%s: the token is active, or what was made of it", row.name)
			}
		}
		if row.name == "suspended" {
			v.want(v.api(v.bearer, "PATCH", path, `{"status":"active"}`), 200, "")
			for _, w := range copies {
				w.want(w.bound(h, token, "GET", path, ""), 200, "")
			}
		}
	}
}

// Who stole a bound token without its key spends nothing of what its client may ask.
func TestBoundTokenWithoutItsKeySpendsNothing(t *testing.T) {
	t.Parallel()
	const limit = 20
	v := newService(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit), "MONTHLY_TOKEN_LIMIT", "1000")
	w := v.another()
	p, h, thief := v.newParty(ourScopes...), newHolder(t, "ES256"), newHolder(t, "ES256")
	w.token(p.id, p.secret, "")
	path := "/agents/" + p.id
	v.withinAMinute(func(int64, time.Duration) {
		v.forget()
		token := v.boundToken(p, h, "")
		seen := v.proof(h, "GET", "/api/v1"+path, token)
		v.want(v.byProof("DPoP", token, "GET", path, "", seen), 200, "")
		got := atOnce(64, func(i int) answer { // not so many that Redis keeps one of them waiting, without which a proof may be used twice
			v := []*service{v, w}[i%2]
			switch i / 2 % 8 {
			case 0:
				return v.api(token, "GET", path, "")
			case 1:
				return v.byProof("DPoP", token, "GET", path, "")
			case 2:
				return v.bound(thief, token, "GET", path, "")
			case 3:
				return v.byProof("DPoP", token, "GET", path, "", seen)
			case 4:
				return v.bound(thief, token, "PATCH", path, `{"owner":"x"}`)
			case 5:
				return v.bound(thief, token, "POST", "/token/introspect", "token="+token)
			case 6:
				return v.bound(thief, token, "POST", "/token/revoke", "token="+token)
			}
			return v.byProof("DPoP", token, "PATCH", path, `{"owner":"x"}`, seen)
		})
		if got[401] != 64 {
			t.Errorf("64 uses of a token without its key are answered %v, want 401", got)
		}
		for what, row := range map[string]struct {
			answer
			spent int64 // before, by its client
		}{
			"a GET":                    {v.bound(h, token, "GET", path, ""), 1},
			"a change":                 {v.bound(h, token, "PATCH", path, `{"owner":"x"}`), 0},
			"an introspection":         {v.bound(h, token, "POST", "/token/introspect", "token=x"), 0},
			"a secret's introspection": {v.form(p.id, p.secret, "/introspect", "token=x"), 0},
			"a token":                  {v.proves(p, plainGrant, v.proof(h, "POST", tokenPath, "")), 1},
		} {
			if left := row.number(t, "X-RateLimit-Remaining"); row.status != 200 || left != limit-1-row.spent {
				t.Errorf("then %s is answered %v, and %d requests are left, want %d", what, row.answer, left, limit-1-row.spent)
			}
		}
	})
	// A proof that is wrong or was used costs its client no token of its month.
	spent := func() int {
		n, _ := v.rdb.Get(t.Context(), quotaKey(p.id)).Int()
		return n
	}
	before, used := spent(), v.proof(h, "POST", tokenPath, "")
	v.wantBound(v.proves(p, plainGrant, used), h)
	for _, proofs := range [][]string{{used}, {"x"}, {""}, {v.proof(h, "GET", tokenPath, "")}, {v.proof(h, "POST", tokenPath, ""), v.proof(h, "POST", tokenPath, "")}} {
		v.wantNoToken("spending", v.proves(p, plainGrant, proofs...), "")
	}
	v.want(v.allow(p.id, "proofRequired", "true"), 200, "")
	v.wantNoToken("without a proof", v.proves(p, plainGrant), "")
	if n := spent(); n != before+1 {
		t.Errorf("one token, and six requests that were refused, have spent %d of the quota, want 1", n-before)
	}
}

// What is traded for a bound token is bound, whoever trades, at any depth.
func TestExchangeDropsNoBinding(t *testing.T) {
	t.Parallel()
	v := newService(t)
	us := v.env["ISSUER"]
	a, b, c, d := v.newParty("a:b"), v.newParty("a:b"), v.newParty("a:b"), v.newParty("a:b")
	ha, hb, hc, hd, other := newHolder(t, "ES256"), newHolder(t, "EdDSA"), newHolder(t, "ES256"), newHolder(t, "RS256"), newHolder(t, "ES256")
	v.delegate(a, b, c, d)
	trade := func(by party, proofs []string, subject string, more ...string) answer {
		t.Helper()
		return v.proves(by, exchangeForm(subject, more...).Encode(), proofs...)
	}
	by := func(h holder) []string { return []string{v.proof(h, "POST", tokenPath, "")} }
	unbound, bound := v.tokenFor(a, ""), v.boundToken(a, ha, "")
	ofB, ofBBound := v.tokenFor(b, ""), v.boundToken(b, hb, "")
	ofC, ofCBound := v.tokenFor(c, ""), v.boundToken(c, hc, "")
	to := []string{"resource", work}

	// By the worker.
	v.wantUnbound(trade(b, nil, unbound, to...))
	x := v.want(trade(b, by(hb), unbound, to...), 200, "")
	chosen := v.wantBound(x, hb)
	if x.text("issued_token_type") != accessTokenType {
		t.Errorf("an exchange is answered %v", x)
	}
	v.wantNoToken("a bound one, without proof", trade(b, nil, bound, to...), "")
	v.wantNoToken("a bound one, by an empty proof", trade(b, []string{""}, bound, to...), "")
	v.wantNoToken("a bound one, by two proofs", trade(b, append(by(hb), by(ha)...), bound, to...), "")
	v.wantNoToken("a bound one, by a proof for GET", trade(b, []string{v.proof(hb, "GET", tokenPath, "")}, bound, to...), "htm")
	v.wantNoToken("what the worker bound, without proof", trade(c, nil, chosen), "")
	x1 := v.wantBound(trade(b, by(hb), bound, to...), hb)
	x2 := v.wantBound(trade(c, by(hc), x1), hc)
	v.wantNoToken("depth 2, without proof", trade(c, nil, x1), "")
	v.wantNoToken("depth 3, without proof", trade(d, nil, x2), "")
	x3 := v.wantBound(trade(d, by(hd), x2), hd)
	seen := v.want(v.introspect(x3), 200, "")
	if !strings.Contains(seen.raw, `"act":{"sub":"`+d.id+`","act":{"sub":"`+c.id+`","act":{"sub":"`+b.id+`"}}}`) || seen.text("sub") != a.id || seen.text("token_type") != "DPoP" || strings.Count(seen.raw, "jkt") != 1 {
		t.Errorf("at depth 3 it is introspected as %v", seen)
	}
	if e := v.audit("agentId=" + d.id + "&action=token.issued&limit=1").Data[0]; e.fact("jkt") != thumbprint(hd.jwk) {
		t.Errorf("the event says %s", e.Metadata)
	}
	used := by(hb)
	v.wantBound(trade(b, used, unbound, to...), hb)
	v.wantNoToken("a used proof", trade(b, used, unbound, to...), usedProof)
	v.wantNoToken("a used proof, of a bound one", trade(b, used, bound, to...), usedProof)

	// By the subject, which brings the worker's token.
	with := func(token string) []string { return withActor(token, to...) }
	v.wantUnbound(trade(a, nil, unbound, with(ofB)...))
	v.wantBound(trade(a, nil, unbound, with(ofBBound)...), hb)
	v.wantBound(trade(a, by(ha), unbound, with(ofBBound)...), hb)
	v.wantNoToken("a proof, and an actor that is bound to no key", trade(a, by(ha), unbound, with(ofB)...), "actor_token that is bound")
	brought := v.wantBound(trade(a, by(ha), bound, with(ofBBound)...), hb)
	for name, row := range map[string]struct {
		proofs []string
		actor  string
	}{
		"no proof":                    {nil, ofBBound},
		"no proof, an unbound actor":  {nil, ofB},
		"the right proof for nothing": {by(ha), ofB},
		"the actor's proof":           {by(hb), ofBBound},
		"the actor's, an unbound one": {by(hb), ofB},
		"another's proof":             {by(other), ofBBound},
		"two proofs":                  {append(by(ha), by(hb)...), ofBBound},
		"an empty proof":              {[]string{""}, ofBBound},
	} {
		v.wantNoToken("a bound one, brought with "+name, trade(a, row.proofs, bound, with(row.actor)...), "")
	}
	v.wantNoToken("depth 2, without proof", trade(b, nil, brought, withActor(ofCBound)...), "")
	v.wantNoToken("depth 2, by the first key", trade(b, by(ha), brought, withActor(ofCBound)...), "")
	v.wantNoToken("depth 2, an unbound actor", trade(b, by(hb), brought, withActor(ofC)...), "")
	v.wantBound(trade(b, by(hb), brought, withActor(ofCBound)...), hc)
	v.wantBound(trade(c, by(hc), brought), hc)

	// What asks for more than proofs is refused as without them.
	v.want(trade(b, by(hb), bound, "resource", us), 400, "invalid_target")
	v.want(trade(v.newParty("a:b"), by(hb), bound, to...), 403, "unauthorized_client")
	v.want(trade(b, by(hb), bound, append(to, "scope", "c:d")...), 400, "invalid_scope")

	// Nor is it anything here, with all that is right.
	for _, call := range v.apiCalls(b.id, x1) {
		a := v.bound(hb, x1, call.method, call.path, call.body)
		if a.status != 401 || !strings.Contains(a.header.Get("WWW-Authenticate"), `error="invalid_token"`) {
			t.Errorf("%s %s takes an exchanged token with its proof: %v, %q", call.method, call.path, a, a.header.Get("WWW-Authenticate"))
		}
	}

	// Either's proofRequired is as good as a binding.
	for name, of := range map[string]party{"the subject": a, "the worker": b} {
		v.want(v.allow(of.id, "proofRequired", "true"), 200, "")
		v.wantNoToken(name+" needs a proof", trade(b, nil, unbound, to...), "")
		v.wantBound(trade(b, by(hb), unbound, to...), hb)
		v.wantNoToken(name+" needs a proof, of an unbound actor", trade(a, nil, unbound, with(ofB)...), "")
		v.wantNoToken(name+" needs a proof, of an unbound actor, with one", trade(a, by(ha), unbound, with(ofB)...), "")
		v.wantBound(trade(a, by(ha), unbound, with(ofBBound)...), hb)
		v.want(v.allow(of.id, "proofRequired", "false"), 200, "")
		v.wantUnbound(trade(b, nil, unbound, to...))
	}
	onward := v.wantUnbound(trade(b, nil, unbound, to...))
	v.want(v.allow(a.id, "proofRequired", "true"), 200, "")
	v.wantNoToken("the first subject needs a proof, at depth 2", trade(c, nil, onward), "")
	v.wantNoToken("the first subject needs a proof, at depth 2, of an unbound actor", trade(b, by(hb), onward, withActor(ofC)...), "")
	v.wantBound(trade(c, by(hc), onward), hc)
	v.wantBound(trade(b, by(hb), onward, withActor(ofCBound)...), hc)
	v.checkChain()
}

// Of all ways to hand on, in any order, none makes of a bound token one that isn't, or of
// what has to be proved one that needs no proof.
func TestNoWayOfHandingOnDropsABinding(t *testing.T) {
	t.Parallel()
	v := newService(t)
	type worker struct {
		party
		key            holder
		unbound, bound string // its own tokens
		required       bool
	}
	var list []worker
	for range 4 {
		w := worker{party: v.newParty("a:b"), key: newHolder(t, "EdDSA")}
		w.unbound, w.bound = v.tokenFor(w.party, ""), v.boundToken(w.party, w.key, "")
		list = append(list, w)
	}
	v.delegate(list[0].party, list[1].party, list[2].party, list[3].party)
	stranger := newHolder(t, "EdDSA")
	seed := uint64(time.Now().UnixNano())
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	maybe := func() bool { return random.IntN(2) == 0 }
	good, refused := map[int]int{}, 0
	for round := range rounds(60, 2000) {
		for i := range list {
			if want := random.IntN(4) == 0; want != list[i].required {
				v.want(v.allow(list[i].id, "proofRequired", fmt.Sprint(want)), 200, "")
				list[i].required = want
			}
		}
		subject, key := list[0].unbound, "" // and what that is bound to
		if maybe() {
			subject, key = list[0].bound, thumbprint(list[0].key.jwk)
		}
		for depth := 1; depth < len(list); depth++ {
			from, to := list[depth-1], list[depth]
			mustProve := key != "" || list[0].required || to.required
			var proofs []string
			proved, by, more, wantKey, ok := "", to, []string{"resource", work}, "", true
			prove := func(h holder) {
				proofs, proved = []string{v.proof(h, "POST", tokenPath, "")}, thumbprint(h.jwk)
			}
			if maybe() {
				if maybe() {
					prove(to.key)
				}
				wantKey, ok = proved, !mustProve || proved != ""
			} else {
				by = from
				actor := to.unbound
				if random.IntN(3) > 0 {
					actor, wantKey = to.bound, thumbprint(to.key.jwk)
				}
				switch n := random.IntN(6); {
				case n == 0 && key != "":
				case n == 1 && key != "":
					prove(stranger)
				case n == 2 && key != "":
					prove(to.key)
				case key != "" || from.required || wantKey != "" && maybe():
					prove(from.key)
				}
				more = append(more, withActor(actor)...)
				mustProve = mustProve || proved != "" // who proves a key wants no token for whoever bears it
				ok = (wantKey != "" || !mustProve) && (key == "" || proved == key)
			}
			about := fmt.Sprintf("seed %d, round %d, depth %d: bound to %q, proofs by %q, actor %v, proof required %v", seed, round, depth, key, proved, by.id == from.id, mustProve)
			a := v.proves(by.party, exchangeForm(subject, more...).Encode(), proofs...)
			if !ok {
				refused++
				if a.status != 400 || a.code() != badProof {
					t.Fatalf("%s: answered %v, want 400 %s", about, a, badProof)
				}
				break
			}
			if a.status != 200 || keyOf(t, a.text("access_token")) != wantKey || (a.text("token_type") == "DPoP") != (wantKey != "") || mustProve && wantKey == "" {
				t.Fatalf("%s: answered %v, want a token that is bound to %q", about, a, wantKey)
			}
			subject, key = a.text("access_token"), wantKey
			good[depth]++
		}
	}
	t.Logf("%v were good and %d refused", good, refused)
	if good[3] == 0 || refused == 0 {
		t.Errorf("%v were good and %d refused, so this shows little", good, refused)
	}
}

// While a token without a proof waits for the log, a proof may become required of any whom
// it is of: then none is issued behind that.
func TestProofThatBecomesRequiredMeanwhile(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	for _, row := range []struct {
		name string
		of   int // of whom it is required: the subject, or the worker
		ask  func(a, b party, token, own string) answer
	}{
		{"a plain token", 0, func(a, _ party, _, _ string) answer { return w.proves(a, plainGrant) }},
		{"the subject's, by the worker", 0, func(_, b party, token, _ string) answer { return w.exchanges(b, token, "resource", work) }},
		{"the worker's, by the worker", 1, func(_, b party, token, _ string) answer { return w.exchanges(b, token, "resource", work) }},
		{"the subject's, by the subject", 0, func(a, _ party, token, own string) answer {
			return w.exchanges(a, token, withActor(own, "resource", work)...)
		}},
		{"the worker's, by the subject", 1, func(a, _ party, token, own string) answer {
			return w.exchanges(a, token, withActor(own, "resource", work)...)
		}},
	} {
		a, b := v.newParty("a:b"), v.newParty("a:b")
		v.delegate(a, b)
		token, own := v.tokenFor(a, ""), v.tokenFor(b, "")
		v.want(row.ask(a, b, token, own), 200, "")
		tx := v.lockChain()
		required, asked := make(chan answer, 1), make(chan answer, 1)
		go func() { required <- v.allow([]party{a, b}[row.of].id, "proofRequired", "true") }()
		v.eventually("the change waits for the chain", func() bool { return v.waiting() == 1 })
		go func() { asked <- row.ask(a, b, token, own) }()
		v.eventually("the token waits behind it", func() bool { return v.waiting() == 2 })
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		changed, got := <-required, <-asked
		if !changed.done() {
			t.Fatalf("%s: the change is answered %v", row.name, changed)
		}
		if n := v.count(`
			select count(*)
			from audit_events
			where action = 'token.issued' and outcome = 'success' and seq > (select max(seq) from audit_events where action = 'agent.updated')`); n > 0 || got.status == 200 {
			t.Errorf("%s: %d tokens are issued behind the change, and it is answered %v", row.name, n, got)
		}
		v.wantNoToken(row.name+", then", row.ask(a, b, token, own), "")
	}
}

// Who must prove is said by those who may change others, shown to all who read agents, and
// true of the next token, on all copies.
func TestProofMayBeRequired(t *testing.T) {
	t.Parallel()
	v := newService(t)
	two := v.another()
	h := newHolder(t, "ES256")
	registered := v.want(v.api(v.bearer, "POST", "/agents", agentWith(map[string]any{"proofRequired": true})), 201, "")
	id := registered.text("agentId")
	if e := v.audit("agentId=" + id + "&action=agent.created&limit=1").Data[0]; registered.body["proofRequired"] != true || !strings.Contains(string(e.Metadata), `"proofRequired":true`) {
		t.Errorf("it is registered as %v, with the event %s", registered, e.Metadata)
	}
	born := party{id: id}
	born.credentialID, born.secret = v.quickCredential(id)
	v.wantNoToken("from the first on", v.proves(born, plainGrant), "")
	v.wantBound(v.proves(born, plainGrant, v.proof(h, "POST", tokenPath, "")), h)

	p := v.newParty(agentsRead, agentsWrite, "a:b")
	path := "/agents/" + p.id
	shows := func(want bool) {
		t.Helper()
		if a := v.want(v.api(v.bearer, "GET", path, ""), 200, ""); a.body["proofRequired"] != want {
			t.Errorf("it is shown as %v, want proofRequired %v", a, want)
		}
		if list := v.want(v.api(v.bearer, "GET", "/agents?limit=100", ""), 200, ""); strings.Count(list.raw, fmt.Sprintf(`"proofRequired":%v`, want)) < 1 || strings.Count(list.raw, `"proofRequired"`) != len(list.body["data"].([]any)) {
			t.Errorf("they are listed as %v", list)
		}
	}
	shows(false)
	own, narrow := v.tokenFor(p, ""), v.newParty(agentsRead, "a:b")
	for _, value := range []string{"true", "false"} {
		v.want(v.api(own, "PATCH", path, `{"owner":"o","proofRequired":`+value+`}`), 403, "FORBIDDEN")
		v.want(v.api(v.tokenFor(narrow, ""), "PATCH", path, `{"proofRequired":`+value+`}`), 403, "FORBIDDEN")
	}
	for _, value := range []string{"null", `"true"`, "1", "0", "[]", "{}", `""`, "[true]"} {
		if a := v.api(v.bearer, "POST", "/agents", strings.TrimSuffix(agentWith(nil), "}")+`,"proofRequired":`+value+`}`); a.status != 400 || detailNames(a) != "proofRequired" {
			t.Errorf("registered with proofRequired %s: answered %v, want 400 that names it", value, a)
		}
	}
	shows(false)
	v.want(v.allow(p.id, "proofRequired", "true"), 200, "")
	shows(true)
	if e := v.audit("agentId=" + p.id + "&action=agent.updated&limit=1").Data[0]; !strings.Contains(string(e.Metadata), `"changes":{"proofRequired":true}`) {
		t.Errorf("the event says %s", e.Metadata)
	}
	for _, w := range []*service{v, two} {
		w.wantNoToken("without a proof", w.proves(p, plainGrant), "")
		token := w.wantBound(w.proves(p, plainGrant, w.proof(h, "POST", tokenPath, "")), h)
		w.want(w.bound(h, token, "GET", path, ""), 200, "")
		w.want(w.api(token, "GET", path, ""), 401, "UNAUTHORIZED")
		w.want(w.api(own, "GET", path, ""), 200, "")                  // it was issued before, and is ended as any is
		w.want(w.form(p.id, p.secret, "/revoke", "token=x"), 200, "") // no token comes of it
		for _, value := range []string{"true", "false"} {
			w.want(w.bound(h, token, "PATCH", path, `{"proofRequired":`+value+`}`), 403, "FORBIDDEN")
		}
	}
	if n := v.count(`select count(*) from audit_events where action = 'token.issued' and outcome = 'success' and agent_id = $1 and metadata ->> 'jkt' is null`, p.id); n != 1 {
		t.Errorf("%d tokens were issued without a proof, want the first", n)
	}
	v.want(v.api(v.bearer, "PATCH", path, `{"owner":"p"}`), 200, "") // which leaves it
	v.wantNoToken("as before", two.proves(p, plainGrant), "")
	v.want(v.allow(p.id, "proofRequired", "false"), 200, "")
	shows(false)
	two.wantUnbound(two.proves(p, plainGrant))
	if v.active(own) != true {
		t.Error("an unbound token of before is not active")
	}
}

func TestProofsAreAnnounced(t *testing.T) {
	t.Parallel()
	const origin = "https://console.example.com"
	v := newService(t, "CORS_ORIGIN", origin)
	for _, name := range []string{"oauth-authorization-server", "openid-configuration", "oauth-protected-resource"} {
		a := v.want(v.do("GET", "/.well-known/"+name, ""), 200, "")
		if got := strings.Trim(fmt.Sprint(a.body["dpop_signing_alg_values_supported"]), "[]"); got != proofAlgs {
			t.Errorf("%s has the algorithms %q, want %q", name, got, proofAlgs)
		}
	}
	a := v.do("OPTIONS", tokenPath, "", "Origin", origin, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "authorization,dpop")
	if a.status != 204 || !slices.Contains(strings.Split(a.header.Get("Access-Control-Allow-Headers"), ", "), "DPoP") {
		t.Errorf("a preflight is answered %v, %v, want that it allows DPoP", a, a.header)
	}
	p, h := v.newParty("a:b"), newHolder(t, "ES256")
	refused := v.do("GET", "/api/v1/agents/"+p.id, "", "Origin", origin, "Authorization", "Bearer "+v.boundToken(p, h, ""))
	if refused.status != 401 || !strings.Contains(refused.header.Get("Access-Control-Expose-Headers"), "WWW-Authenticate") {
		t.Errorf("a page can't read why it is refused: %v, %v", refused, refused.header)
	}
}

// No accident makes a proof of what isn't one, nor a fault of ours.
func TestChangedProofGivesNothing(t *testing.T) {
	t.Parallel()
	v := newService(t)
	p, h := v.newParty("a:b"), newHolder(t, "ES256")
	token := v.boundToken(p, h, "")
	path := "/agents/" + p.id
	seed := uint64(time.Now().UnixNano())
	random := mathrand.New(mathrand.NewPCG(seed, 0))
	value := func() any { // that no claim and no header may have
		return []any{nil, "", -1, 1e300, true, []any{}, []any{hostileText(random), 1}, members{}, members{"a": []any{nil}}, -time.Now().Unix()}[random.IntN(10)]
	}
	pick := func(names ...string) string { return names[random.IntN(len(names))] }
	change := func(text string) string { // within what a header may hold
		return changed(random, text, string(rune(33+random.IntN(94))), v.proof(h, "POST", tokenPath, ""))
	}
	for i := range rounds(1200, 30000) {
		method, at, of := "POST", tokenPath, ""
		if i%2 == 1 {
			method, at, of = "GET", "/api/v1"+path, token
		}
		good := v.proof(h, method, at, of)
		sent := good
		if i%4 < 2 {
			for sent == good {
				sent = change(good)
			}
		} else { // signed by the right key
			header, claims := h.proofHeader(), v.proofClaims(method, at, of)
			if maybe := random.IntN(2) == 0; maybe {
				header = header.with(members{pick("alg", "typ", "crit", "jwk"): value()})
			} else {
				claims = claims.with(members{pick("htm", "htu", "iat", "jti"): value()})
			}
			sent = h.sign(header, claims)
		}
		if a := v.proves(p, plainGrant, sent); method == "POST" && (a.status != 400 || a.code() != badProof) {
			t.Fatalf("seed %d, round %d: %q is answered %v, want 400 %s", seed, i, sent, a, badProof)
		}
		if a := v.byProof("DPoP", token, "GET", path, "", sent); a.status != 401 {
			t.Fatalf("seed %d, round %d: %q is answered %v, want 401", seed, i, sent, a)
		}
	}
	v.boundToken(p, h, "")
	v.want(v.bound(h, token, "GET", path, ""), 200, "")
}

// Who is over its limit leaves nothing of its proofs, and can send them again.
func TestProofsBeyondTheLimitAreNotUsed(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "20")
	p, h := v.newParty("a:b", agentsRead), newHolder(t, "ES256")
	token := v.boundToken(p, h, "")
	path := "/api/v1/agents/" + p.id
	refused := ""
	for range 60 {
		proof := v.proof(h, "GET", path, token)
		if a := v.byProof("DPoP", token, "GET", "/agents/"+p.id, "", proof); a.status == 429 {
			refused = proof
		} else {
			v.want(a, 200, "")
		}
	}
	keys, err := v.rdb.Keys(t.Context(), "rate:proof:*").Result()
	if err != nil || len(keys) < 21 || len(keys) > 42 || refused == "" { // of two minutes, if one ended
		t.Errorf("Redis has %d proofs, %v, want those of 20 requests and of the token", len(keys), err)
	}
	v.want(v.allow(p.id, "rateLimit", "0"), 200, "")
	v.want(v.byProof("DPoP", token, "GET", "/agents/"+p.id, "", refused), 200, "")
	v.want(v.byProof("DPoP", token, "GET", "/agents/"+p.id, "", refused), 401, "UNAUTHORIZED")
}

// A fault has used up nothing: the same request is right at another copy.
func TestProofOfARequestThatMetAFaultIsGood(t *testing.T) {
	t.Parallel()
	v := newService(t)
	w := v.another()
	p, h := v.newParty("a:b"), newHolder(t, "ES256")
	proof := v.proof(h, "POST", tokenPath, "")
	tx := v.lockChain()
	v.want(v.proves(p, plainGrant, proof), 503, "temporarily_unavailable")
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.eventually("nothing waits any more", func() bool { return v.waiting() == 0 })
	w.wantBound(w.proves(p, plainGrant, proof), h)
	v.want(v.proves(p, plainGrant, proof), 400, "invalid_dpop_proof")
}

// A proof that was used gives whoever has it nothing: no event, no more than the limit where a
// client shows it, and no other use by a fault.
func TestUsedProofIsGoodForNothing(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "30")
	p, h := v.newParty(append([]string{"a:b"}, ourScopes...)...), newHolder(t, "ES256")
	token := v.boundToken(p, h, "")
	for _, call := range []struct{ method, path, body string }{
		{"POST", "/agents", "{}"}, {"PATCH", "/agents/" + v.id, "{}"}, {"DELETE", "/agents/" + p.id + "/credentials/" + p.id, ""},
		{"POST", "/token/introspect", "token=x"}, {"POST", "/token/revoke", "token=x"},
	} {
		proof := v.proof(h, call.method, "/api/v1"+call.path, token)
		v.byProof("DPoP", token, call.method, call.path, call.body, proof)
		before := v.count(`select max(seq) from audit_events`)
		for range 40 {
			if a := v.byProof("DPoP", token, call.method, call.path, call.body, proof); a.status != 401 {
				t.Fatalf("%s %s: a used proof is answered %v", call.method, call.path, a)
			}
		}
		if n := v.count(`select max(seq) from audit_events`); n != before {
			t.Errorf("%s %s: used proofs leave %d events", call.method, call.path, n-before)
		}
	}
	// That of an introspection stays used, whatever becomes of the next request with it.
	proof := v.proof(h, "POST", "/api/v1/token/introspect", token)
	v.want(v.byProof("DPoP", token, "POST", "/token/introspect", "token=x", proof), 200, "")
	tx := v.lockChain()
	v.want(v.byProof("DPoP", token, "POST", "/token/introspect", "token=x", proof), 401, "invalid_dpop_proof")
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.want(v.byProof("DPoP", token, "POST", "/token/introspect", "token=x", proof), 401, "invalid_dpop_proof")

	// A client's requests count, each with another assertion too.
	id, _, key := v.newKeyClient("ES256", "a:b")
	again := v.proof(h, "POST", tokenPath, "")
	limited := 0
	for range 80 {
		form := url.Values{"grant_type": {"client_credentials"}, "client_assertion_type": {assertionType}, "client_assertion": {v.assertion(key, id)}}
		if a := v.do("POST", tokenPath, form.Encode(), "Content-Type", formType, "DPoP", again); a.status == 429 {
			limited++
		}
	}
	if limited < 10 {
		t.Errorf("of 80 requests with one proof %d were beyond the limit of 30", limited)
	}
}
