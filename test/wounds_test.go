package test

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"hash"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// A wound is a published flaw of a server or a library of this kind, and the
// attack that it let through, made on us over HTTP.
type wound struct {
	name      string
	published string // as what
	attack    func(t *testing.T, v *service)
}

func TestPeersWoundsAreNotOurs(t *testing.T) {
	t.Parallel()
	v := newService(t)
	seen := map[string]bool{}
	for _, w := range slices.Concat(tokenWounds, revocationWounds, authorityWounds, clientWounds, webWounds) {
		if seen[w.name] || w.published == "" {
			t.Errorf("%q is there twice, or nobody has published it", w.name)
		}
		seen[w.name] = true
		t.Run(w.name, func(t *testing.T) {
			t.Cleanup(func() {
				if t.Failed() {
					t.Log("published as: " + w.published)
				}
			})
			own := *v
			own.t = t
			w.attack(t, &own)
		})
	}
}

// wantRefused presents a token wherever one is taken.
func (v *service) wantRefused(what, token string) {
	v.t.Helper()
	if a := v.form(v.id, v.secret, "/introspect", url.Values{"token": {token}}.Encode()); a.status != 200 || a.raw != "{\"active\":false}\n" {
		v.t.Errorf("%s: introspected as %v, want exactly active:false", what, a)
	}
	if strings.ContainsAny(token, "\r\n\x00") || len(token) > 10<<10 { // no header can hold these
		return
	}
	for where, a := range map[string]answer{
		"GET an agent": v.api(token, "GET", "/agents/"+v.id, ""),
		"GET agents":   v.api(token, "GET", "/agents", ""),
		"introspect":   v.bearerForm(token, "/introspect", "token=x"),
		"revoke":       v.bearerForm(token, "/revoke", "token=x"),
	} {
		if a.status != 401 {
			v.t.Errorf("%s: %s answers %v, want 401", what, where, a)
		}
	}
}

// everyAuthentication shows a secret to each endpoint that takes one, in both
// ways.
func (v *service) everyAuthentication(id, secret string) map[string]answer {
	v.t.Helper()
	answers := map[string]answer{}
	for path, more := range map[string]string{"": "grant_type=client_credentials", "/introspect": "token=x", "/revoke": "token=x"} {
		answers["Basic at /token"+path] = v.do("POST", "/api/v1/token"+path, more, "Content-Type", formType,
			"Authorization", basicAuth(url.QueryEscape(id), url.QueryEscape(secret)))
		answers["the form at /token"+path] = v.form("", "", path, more+"&"+url.Values{"client_id": {id}, "client_secret": {secret}}.Encode())
	}
	return answers
}

func (v *service) wantEveryAuthentication(what, id, secret string, status int, code string) {
	v.t.Helper()
	for where, a := range v.everyAuthentication(id, secret) {
		if a.status != status || a.code() != code {
			v.t.Errorf("%s: %s answers %v, want %d %s", what, where, a, status, code)
		}
	}
}

// patiently sends what takes bcrypt's time until it is answered: with the race
// detector, on a busy machine, that can be longer than a request may take.
func (v *service) patiently(bearer, method, path, body string) (a answer) {
	v.t.Helper()
	for range 5 {
		if a = v.api(bearer, method, path, body); a.status != 503 {
			break
		}
	}
	return a
}

// rotate replaces a secret over HTTP, and then the hash of the new one by one
// that is quicker to compare with.
func (v *service) rotate(agentID, credentialID string) (made answer) {
	v.t.Helper()
	made = v.want(v.patiently(v.bearer, "POST", "/agents/"+agentID+"/credentials/"+credentialID+"/rotate", "{}"), 200, "")
	hash, err := bcrypt.GenerateFromPassword([]byte(made.text("clientSecret")), bcrypt.MinCost)
	if err != nil {
		v.t.Fatal(err)
	}
	v.exec(`update credentials set secret_hash = $2 where credential_id = $1`, credentialID, string(hash))
	return made
}

// publishedKey reads the public key as an attacker would.
func (v *service) publishedKey() *rsa.PublicKey {
	v.t.Helper()
	a := v.want(v.do("GET", "/.well-known/jwks.json", ""), 200, "")
	keys, _ := a.body["keys"].([]any)
	key, _ := keys[0].(map[string]any)
	text, _ := key["n"].(string)
	n, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || key["e"] != "AQAB" {
		v.t.Fatalf("the published key is %v", key)
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537}
}

// What a token can be made to say of itself.
var tokenWounds = []wound{
	{"HMAC keyed with the public key", "RFC 8725, section 2.1; CVE-2016-10555 (jwt-simple), CVE-2022-29217 (PyJWT)", func(t *testing.T, v *service) {
		key := v.publishedKey()
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		pkcs1 := x509.MarshalPKCS1PublicKey(key)
		spki := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
		n := encode(string(key.N.Bytes()))
		header, payload := readPart(t, v.bearer, 0), readPart(t, v.bearer, 1)
		for name, secret := range map[string]string{
			"PEM": spki, "PEM without a last newline": strings.TrimSpace(spki), "PEM with CRLF": strings.ReplaceAll(spki, "\n", "\r\n"),
			"PEM of PKCS#1": string(pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: pkcs1})),
			"DER":           string(der), "DER of PKCS#1": string(pkcs1), "base64 of DER": base64.StdEncoding.EncodeToString(der),
			"JWK": `{"kty":"RSA","n":"` + n + `","e":"AQAB"}`, "JWK, sorted": `{"e":"AQAB","kty":"RSA","n":"` + n + `"}`,
			"JWKS":    strings.TrimSpace(v.do("GET", "/.well-known/jwks.json", "").raw),
			"modulus": string(key.N.Bytes()), "modulus in base64": n, "modulus in decimal": key.N.String(),
		} {
			for alg, sum := range map[string]func() hash.Hash{"HS256": sha256.New, "HS512": sha512.New, "RS256": sha256.New} {
				signed := encode(strings.Replace(header, "RS256", alg, 1)) + "." + encode(payload)
				mac := hmac.New(sum, []byte(secret))
				mac.Write([]byte(signed))
				v.wantInactive(name+" as "+alg, signed+"."+encode(string(mac.Sum(nil))))
			}
		}
	}},
	{"alg none in every case", "RFC 8725, section 2.1; CVE-2015-9235 (jsonwebtoken)", func(t *testing.T, v *service) {
		header, payload := readPart(t, v.bearer, 0), readPart(t, v.bearer, 1)
		sig := strings.Split(v.bearer, ".")[2]
		for _, alg := range []string{`"none"`, `"None"`, `"NONE"`, `"nOnE"`, `"none "`, `""`, `null`, `[]`, `["none"]`, `0`} {
			for _, end := range []string{".", "", "." + sig} {
				v.wantInactive("alg "+alg+" and "+end, encode(strings.Replace(header, `"RS256"`, alg, 1))+"."+encode(payload)+end)
			}
		}
		v.wantInactive("no alg", encode(strings.Replace(header, `"alg":"RS256",`, "", 1))+"."+encode(payload)+".")
	}},
	{"no signature, or less of it", "CVE-2020-28042 (ServiceStack); CVE-2026-27840 (ZITADEL: a token cut short is taken)", func(t *testing.T, v *service) {
		before, sig, _ := cutLast(v.bearer, ".")
		v.wantRefused("no signature and no dot", before)
		v.wantRefused("no signature", before+".")
		for cut := 1; cut < len(sig); cut += 17 {
			v.wantInactive(fmt.Sprintf("%d characters fewer", cut), v.bearer[:len(v.bearer)-cut])
		}
		v.wantRefused("80 characters", v.bearer[:80])
	}},
	{"blank signatures", "CVE-2022-21449 (Java: psychic signatures)", func(t *testing.T, v *service) {
		before, _, _ := cutLast(v.bearer, ".")
		key := v.publishedKey()
		less := new(big.Int).Sub(key.N, big.NewInt(1))
		ecdsaHeader := encode(strings.Replace(readPart(t, v.bearer, 0), "RS256", "ES256", 1))
		for name, sig := range map[string][]byte{
			"256 zeros": make([]byte, 256), "64 zeros": make([]byte, 64), "one zero": {0}, "one": append(make([]byte, 255), 1),
			"the modulus": key.N.Bytes(), "the modulus less one": less.Bytes(), "256 ones": slices.Repeat([]byte{0xff}, 256),
		} {
			v.wantRefused(name, before+"."+encode(string(sig)))
			v.wantInactive(name+" as ES256", ecdsaHeader+"."+strings.Split(before, ".")[1]+"."+encode(string(sig)))
		}
	}},
	{"a key that the token brings along", "RFC 8725, section 3.10; CVE-2018-0114 (node-jose)", func(t *testing.T, v *service) {
		var fetched atomic.Int32
		own := privateKey(t, secondKey()).(*rsa.PrivateKey)
		n := encode(string(own.N.Bytes()))
		theirs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fetched.Add(1)
			fmt.Fprintf(w, `{"keys":[{"kty":"RSA","alg":"RS256","kid":"theirs","n":%q,"e":"AQAB"}]}`, n)
		}))
		defer theirs.Close()
		header, payload := readPart(t, v.bearer, 0), readPart(t, v.bearer, 1)
		for name, member := range map[string]string{
			"jwk": `"jwk":{"kty":"RSA","n":"` + n + `","e":"AQAB"}`, "jku": `"jku":"` + theirs.URL + `/jwks.json"`,
			"x5u": `"x5u":"` + theirs.URL + `/cert.pem"`, "x5c": `"x5c":["MIIB"]`,
		} {
			for kid, h := range map[string]string{
				"our kid": header, "no kid": regexp.MustCompile(`,"kid":"[^"]*"`).ReplaceAllString(header, ""),
				"their kid": regexp.MustCompile(`"kid":"[^"]*"`).ReplaceAllString(header, `"kid":"theirs"`),
			} {
				v.wantInactive(name+" with "+kid, forge(t, own, h[:len(h)-1]+","+member+"}", payload))
			}
			// Nor does it do when our own key has signed.
			v.wantRefused(name+" beside our key", forge(t, privateKey(t, testKey()), header[:len(header)-1]+","+member+"}", payload))
		}
		if fetched.Load() != 0 {
			t.Errorf("the service has fetched %d keys, want none", fetched.Load())
		}
	}},
	{"kid injection", "RFC 8725, section 3.10", func(t *testing.T, v *service) {
		header, payload := readPart(t, v.bearer, 0), readPart(t, v.bearer, 1)
		kid := regexp.MustCompile(`"kid":"[^"]*"`)
		for name, value := range map[string]string{
			"path": `"../../../../../../dev/null"`, "file": `"file:///dev/null"`, "URL": `"http://127.0.0.1:1/key"`,
			"SQL": `"x' union select '' --"`, "SQL that is true": `"' or '1'='1"`, "shell": `"|/bin/true"`, "LDAP": `"*)(uid=*"`,
			"array": `["` + strings.Repeat("A", 43) + `"]`, "object": `{"$ne":null}`, "null": `null`, "number": `0`, "true": `true`, "empty": `""`,
			"NUL": `"\u0000"`, "huge": `"` + strings.Repeat("A", 9<<10) + `"`,
		} {
			changed := kid.ReplaceAllLiteralString(header, `"kid":`+value)
			// Our own key signs it, so that nothing but the kid can refuse it; and
			// a key that such a kid would have led to: an empty file's.
			v.wantInactive(name, forge(t, privateKey(t, testKey()), changed, payload))
			signed := encode(strings.Replace(changed, "RS256", "HS256", 1)) + "." + encode(payload)
			v.wantInactive(name+" with an empty key", signed+"."+encode(string(hmac.New(sha256.New, nil).Sum(nil))))
		}
	}},
	{"critical headers ignored", "RFC 7515, section 4.1.11; CVE-2025-59420 (Authlib)", func(t *testing.T, v *service) {
		header, payload := readPart(t, v.bearer, 0), readPart(t, v.bearer, 1)
		for _, more := range []string{
			`"crit":["exp"],"exp":1`, `"crit":["b64"],"b64":false`, `"crit":["x"]`, `"crit":[]`, `"crit":null`, `"crit":["x"],"x":{"cnf":1}`, `"b64":false`,
		} {
			v.wantRefused(more, forge(t, privateKey(t, testKey()), header[:len(header)-1]+","+more+"}", payload))
		}
	}},
	{"a token of another type", "RFC 8725, section 3.11", func(t *testing.T, v *service) {
		checkpoint := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, "").text("checkpoint")
		if checkpoint == "" {
			t.Fatal("there is no checkpoint")
		}
		v.wantRefused("a checkpoint", checkpoint)
		// Of all that a token can be, with the claims of a good one.
		header, payload := readPart(t, v.bearer, 0), readPart(t, v.bearer, 1)
		for _, typ := range []string{"JWT", "id+jwt", "logout+jwt", "dpop+jwt", "secevent+jwt", "token-introspection+jwt", "application/at+jwt", "AT+JWT", auditCheckpoint, ""} {
			v.wantRefused("typ "+typ, forge(t, privateKey(t, testKey()), strings.Replace(header, accessToken, typ, 1), payload))
		}
	}},
	{"a token for another audience", "RFC 8725, section 3.9; CVE-2023-22482 (Argo CD), CVE-2026-55669 (ZITADEL)", func(t *testing.T, v *service) {
		id, secret := v.quickClient(ourScopes...)
		issuer := v.env["ISSUER"]
		for _, resource := range []string{
			"https://resumes.example.com", issuer + "/", "http://127.0.0.1.evil.example", issuer + "/api/v1", issuer[:len(issuer)-1], strings.Replace(issuer, "http:", "https:", 1),
			strings.Replace(issuer, "http:", "HTTP:", 1), "https://evil.example/" + issuer, issuer + "?x=y",
		} {
			a := v.grant(id, secret, "resource="+url.QueryEscape(resource))
			v.want(a, 200, "")
			for path, a := range map[string]answer{
				"/agents":           v.api(a.text("access_token"), "GET", "/agents", ""),
				"/audit":            v.api(a.text("access_token"), "GET", "/audit", ""),
				"/token/introspect": v.bearerForm(a.text("access_token"), "/introspect", "token=x"),
			} {
				if a.status != 401 {
					t.Errorf("a token for %s at %s = %v, want 401", resource, path, a)
				}
			}
		}
	}},
	{"an issuer that is like ours", "CVE-2024-53861 (PyJWT: part of the issuer will do)", func(t *testing.T, v *service) {
		header, payload := readPart(t, v.bearer, 0), readPart(t, v.bearer, 1)
		issuer := v.env["ISSUER"]
		for _, other := range []string{
			"", "h", "http", issuer[:len(issuer)-1], issuer[1:], issuer + "/", issuer + ".evil.example", strings.ToUpper(issuer), " " + issuer,
			"https://evil.example", strings.Replace(issuer, "127.0.0.1", "localhost", 1),
		} {
			v.wantRefused("issuer "+other, forge(t, privateKey(t, testKey()), header, withClaim(t, payload, "iss", `"`+other+`"`)))
		}
	}},
	{"a key that was retired, or is another's", "Storm-0558 (Microsoft 2023: an old key of another system was taken)", func(t *testing.T, v *service) {
		w := v.another("JWT_PRIVATE_KEY", secondKey()) // and testKey no longer in JWT_PUBLIC_KEY
		w.wantRefused("the retired key's", v.bearer)
		theirs := w.token(v.id, v.secret, "")
		v.wantRefused("a key's of which we never heard", theirs)
		if !w.active(theirs) {
			t.Error("the copy refuses its own token")
		}
	}},
	{"private members in the JWKS", "oidc-provider-mock, pull request 240; RFC 7517, section 9.2", func(t *testing.T, v *service) {
		a := v.want(v.do("GET", "/.well-known/jwks.json", ""), 200, "")
		keys, _ := a.body["keys"].([]any)
		for _, key := range keys {
			for name := range key.(map[string]any) {
				if !slices.Contains([]string{"kty", "use", "alg", "kid", "n", "e"}, name) {
					t.Errorf("a published key has %q", name)
				}
			}
		}
		key := privateKey(t, testKey()).(*rsa.PrivateKey)
		for _, path := range []string{"/.well-known/jwks.json", "/.well-known/oauth-authorization-server", "/health"} {
			text := v.do("GET", path, "").raw
			for name, number := range map[string]*big.Int{"d": key.D, "p": key.Primes[0], "q": key.Primes[1]} {
				if strings.Contains(text, encode(string(number.Bytes()))) {
					t.Errorf("%s shows %s of the private key", path, name)
				}
			}
		}
	}},
	{"tokens that take long to read", "CVE-2025-30204 (golang-jwt), CVE-2025-27144 (go-jose), CVE-2024-28180 (go-jose: a bomb in zip)", func(t *testing.T, v *service) {
		header, payload := readPart(t, v.bearer, 0), readPart(t, v.bearer, 1)
		begun := time.Now()
		for name, token := range map[string]string{
			"dots": strings.Repeat(".", 9<<10), "dots in a form": strings.Repeat(".", 14<<10), "one long part": strings.Repeat("A", 14<<10),
			"parts": strings.Repeat("e30.", 3<<10), "brackets in the header": encode(strings.Repeat("[", 7<<10)) + ".e30.AA",
			"brackets in the payload": forge(t, privateKey(t, testKey()), header, strings.Replace(payload, `"iss"`, `"x":`+strings.Repeat("[", 4000)+strings.Repeat("]", 4000)+`,"iss"`, 1)),
			"long, and signed by us":  forge(t, privateKey(t, testKey()), header, withClaim(t, payload, "scope", `"`+strings.Repeat("x", 11200)+`"`)),
			"zip":                     forge(t, privateKey(t, testKey()), header[:len(header)-1]+`,"zip":"DEF"}`, payload),
			"a JWE":                   encode(`{"alg":"RSA-OAEP","enc":"A128GCM","zip":"DEF"}`) + "." + strings.Repeat("A", 342) + ".AAAA.AAAA.AAAA",
			"a password's JWE":        encode(`{"alg":"PBES2-HS256+A128KW","enc":"A128GCM","p2c":2147483647,"p2s":"AAAA"}`) + ".AAAA.AAAA.AAAA.AAAA",
		} {
			v.wantRefused(name, token)
		}
		if took := time.Since(begun); took > 30*time.Second {
			t.Errorf("they took %s", took)
		}
	}},
}

// wantInactive introspects a token, which is the quicker half of wantRefused.
func (v *service) wantInactive(what, token string) {
	v.t.Helper()
	if a := v.bearerForm(v.bearer, "/introspect", url.Values{"token": {token}}.Encode()); a.status != 200 || a.raw != "{\"active\":false}\n" {
		v.t.Errorf("%s: introspected as %v, want exactly active:false", what, a)
	}
}

var revocationWounds = []wound{
	{"revocation answers 200 when the store fails", "CVE-2020-15223 (ORY Fosite); ory/fosite, issue 644", func(t *testing.T, _ *service) {
		env := map[string]string{"DATABASE_URL": newDatabase(t)}
		proxy := proxyDatabase(t, env)
		v := newService(t, "DATABASE_URL", env["DATABASE_URL"])
		token := v.mint(v.newAgent("resumes:read"), newID())
		proxy.set(refusing)
		for who, a := range map[string]answer{
			"a client": v.form(v.id, v.secret, "/revoke", "token="+token), "a token": v.bearerForm(v.bearer, "/revoke", "token="+token),
		} {
			if a.status != 503 || a.code() != "temporarily_unavailable" || a.header.Get("Retry-After") == "" {
				t.Errorf("revocation by %s without a store = %v, want 503", who, a)
			}
		}
		proxy.set(passing)
		v.eventually("the store is back", func() bool { return v.bearerForm(v.bearer, "/revoke", "token="+token).status == 200 })
		v.eventually("it is refused", func() bool {
			return v.bearerForm(v.bearer, "/introspect", "token="+token).raw == "{\"active\":false}\n" && v.api(token, "GET", "/agents", "").status == 401
		})
	}},
	{"introspection answers active:false when the store fails", "ory/hydra-client-go, issue 8; zitadel/oidc, issue 317", func(t *testing.T, _ *service) {
		env := map[string]string{"DATABASE_URL": newDatabase(t)}
		proxy := proxyDatabase(t, env)
		v := newService(t, "DATABASE_URL", env["DATABASE_URL"])
		token := v.mint(v.newAgent("resumes:read"), newID())
		for _, redis := range []string{"warm", "flushed"} {
			proxy.set(refusing)
			if redis == "flushed" { // so that nobody knows anything
				v.rdb.FlushDB(context.Background())
			}
			for who, a := range map[string]answer{
				"a client": v.form(v.id, v.secret, "/introspect", "token="+token), "a token": v.bearerForm(v.bearer, "/introspect", "token="+token),
			} {
				if a.status != 503 || strings.Contains(a.raw, "active") {
					t.Errorf("introspection by %s without PostgreSQL and with Redis %s = %v, want 503", who, redis, a)
				}
			}
			proxy.set(passing)
			v.eventually("the store is back", func() bool { return v.bearerForm(v.bearer, "/introspect", "token="+token).body["active"] == true })
		}
	}},
	{"a token of another client revoked with 200", "RFC 7009, section 2.1; ory/fosite, issue 225; django-oauth-toolkit, issue 727", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read", "tokens:read")
		victim := v.newAgent("resumes:read")
		token := v.mint(victim, newID())
		for who, a := range map[string]answer{
			"Basic":        v.form(id, secret, "/revoke", "token="+token),
			"form":         v.form("", "", "/revoke", "token="+token+"&client_id="+id+"&client_secret="+secret),
			"bearer":       v.bearerForm(v.token(id, secret, ""), "/revoke", "token="+token),
			"a wrong hint": v.form(id, secret, "/revoke", "token_type_hint=refresh_token&token="+token),
		} {
			if a.status != 400 || a.code() != "invalid_request" {
				t.Errorf("revocation of another's by %s = %v, want 400 invalid_request", who, a)
			}
		}
		v.form(id, secret, "/revoke", "token="+token+"&client_id="+victim)
		if !v.active(token) {
			t.Error("another's token was revoked")
		}
	}},
	{"revocation by anyone, of anything", "CVE-2016-6582 (Doorkeeper)", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read")
		token := v.token(id, secret, "")
		v.want(v.form("", "", "/revoke", "token="+token), 401, "invalid_client")
		v.want(v.form("", "", "/revoke", "token="+token+"&client_id="+id), 401, "invalid_client")
		v.want(v.form(id, "", "/revoke", "token="+token), 401, "invalid_client")
		// A token that names it, and that we did not sign.
		forged := forge(t, privateKey(t, secondKey()), readPart(t, token, 0), readPart(t, token, 1))
		v.want(v.form(id, secret, "/revoke", "token="+forged), 200, "")
		v.want(v.form(id, secret, "/revoke", "token="+readClaims(t, token).ID), 200, "")
		if !v.active(token) {
			t.Fatal("it was revoked")
		}
		v.want(v.form(id, secret, "/revoke", "token="+token), 200, "") // and its owner can
		v.wantRefused("its owner's", token)
	}},
	{"one level of revocation overrides another", "CVE-2026-18218 (Keycloak: not-before of the realm and of the client)", func(t *testing.T, _ *service) {
		env := map[string]string{"REDIS_URL": newRedis(t)}
		proxy := proxyRedis(t, env)
		v := newService(t, "REDIS_URL", env["REDIS_URL"])
		id := v.newAgent("resumes:read")
		path := "/agents/" + id
		kept, _ := v.quickCredential(id)
		revoked, secret := v.quickCredential(id)
		rotated, old := v.quickCredential(id)
		dead := map[string]string{
			"a revoked token": v.mint(id, kept), "a revoked credential": v.mint(id, revoked), "a secret before its rotation": v.mint(id, rotated),
		}
		live := v.mint(id, kept)
		v.want(v.bearerForm(v.bearer, "/revoke", "token="+dead["a revoked token"]), 200, "")
		v.want(v.api(v.bearer, "DELETE", path+"/credentials/"+revoked, ""), 204, "")
		v.rotate(id, rotated)
		check := func(when string) {
			for name, token := range dead {
				if v.active(token) || v.isAccepted(id, token) {
					t.Errorf("%s, a token of %s is alive", when, name)
				}
			}
			v.wantEveryAuthentication(when+", a revoked secret", id, secret, 401, "invalid_client")
			v.wantEveryAuthentication(when+", a replaced secret", id, old, 401, "invalid_client")
		}
		status := func(to string) { v.want(v.api(v.bearer, "PATCH", path, `{"status":"`+to+`"}`), 200, "") }
		check("at first")
		status("suspended")
		v.wantRefused("a suspended agent's", live)
		// What is revoked on a lower level while the upper one holds, stays so too.
		v.want(v.patiently(v.bearer, "POST", path+"/credentials/"+rotated+"/rotate", "{}"), 403, "AGENT_NOT_ACTIVE")
		status("active")
		check("after reactivation")
		if !v.active(live) {
			t.Error("after reactivation, a token that was never revoked is dead")
		}
		status("suspended")
		v.want(v.bearerForm(v.bearer, "/revoke", "token="+live), 200, "")
		status("active")
		dead["a token that was revoked during the suspension"] = live
		v.want(v.patiently(v.bearer, "POST", path+"/credentials/"+revoked+"/rotate", "{}"), 409, "CREDENTIAL_ALREADY_REVOKED")
		v.want(v.api(v.bearer, "DELETE", path+"/credentials/"+revoked, ""), 409, "CREDENTIAL_ALREADY_REVOKED")
		v.want(v.api(v.bearer, "PATCH", path, `{"capabilities":["resumes:read","resumes:write"]}`), 200, "")
		check("in the end")
		proxy.set(refusing) // now PostgreSQL answers
		check("without Redis")
		v.want(v.api(v.bearer, "DELETE", path, ""), 204, "")
		for _, to := range []string{"active", "suspended"} {
			v.want(v.api(v.bearer, "PATCH", path, `{"status":"`+to+`"}`), 409, "AGENT_ALREADY_DECOMMISSIONED")
		}
	}},
	{"a revoked token lives again in its last second", "keycloak/keycloak, issue 26113", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read")
		w, token := v.another("TOKEN_TTL", "2s"), ""
		v.eventually("there is a live token", func() bool {
			token = w.token(id, secret, "")
			return v.active(token)
		})
		v.want(v.form(id, secret, "/revoke", "token="+token), 200, "")
		for end := time.Unix(readClaims(t, token).Expires+1, 0); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if left := time.Until(end) - time.Second; v.isAccepted(id, token) || v.active(token) {
				t.Fatalf("it is alive %s before its end", left)
			}
		}
	}},
	{"a revoked token is taken by some endpoints", "keycloak/keycloak, issue 15195 (client registration takes it)", func(t *testing.T, v *service) {
		revoked := v.bearerOf(v.newAgent(ourScopes...), strings.Join(ourScopes, " "))
		v.want(v.api(revoked, "GET", "/agents?limit=1", ""), 200, "")
		v.want(v.bearerForm(revoked, "/revoke", "token="+revoked), 200, "")
		tried := 0
		for _, rt := range routes(t) {
			method, path, _ := strings.Cut(rt.pattern, " ")
			if !strings.HasPrefix(path, "/api/v1/") || strings.HasSuffix(path, "/authorize") {
				continue
			}
			tried++
			path = regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(path, v.id)
			body, mediaType := agentJSON("revoked@example.com", "a:b"), "application/json"
			if rt.oauth {
				body, mediaType = "grant_type=client_credentials&token=x", formType
			}
			if a := v.do(method, path, body, "Authorization", "Bearer "+revoked, "Content-Type", mediaType); a.status != 401 {
				t.Errorf("%s takes a revoked token: %v, want 401", rt.pattern, a)
			}
		}
		if tried < 14 {
			t.Errorf("only %d routes were tried", tried)
		}
	}},
	{"deactivated agents still get tokens", "CVE-2024-47000 (ZITADEL), CVE-2025-64521 (authentik), CVE-2026-1609 (Keycloak)", func(t *testing.T, v *service) {
		id := v.newAgent("tokens:read", "credentials:write")
		_, known := v.quickCredential(id)
		_, unseen := v.quickCredential(id)
		token := v.token(id, known, "")
		for _, status := range []string{"suspended", "decommissioned"} {
			v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"`+status+`"}`), 200, "")
			v.wantEveryAuthentication(status+", a secret that is known here", id, known, 403, "unauthorized_client")
			v.wantEveryAuthentication(status+", a secret that is not", id, unseen, 403, "unauthorized_client")
			v.wantRefused(status, token)
			v.want(v.api(token, "POST", "/agents/"+id+"/credentials", "{}"), 401, "UNAUTHORIZED")
			v.want(v.patiently(v.bearer, "POST", "/agents/"+id+"/credentials", "{}"), 403, "AGENT_NOT_ACTIVE")
			a := v.grant(id, known, "scope=tokens:read&resource=https://resumes.example.com&client_id="+id)
			v.want(a, 403, "unauthorized_client")
			for _, grant := range []string{"refresh_token&refresh_token=" + token, "urn:ietf:params:oauth:grant-type:jwt-bearer&assertion=" + token,
				"urn:ietf:params:oauth:grant-type:token-exchange&subject_token=" + token} {
				if a := v.form("", "", "", "grant_type="+grant); a.status == 200 {
					t.Errorf("%s, grant_type=%.50s gives a token", status, grant)
				}
			}
		}
	}},
	{"an identity that comes back", "CVE-2026-55670 (ZITADEL: recycled identifiers)", func(t *testing.T, v *service) {
		id := v.want(v.api(v.bearer, "POST", "/agents", agentJSON("recycled@example.com", "resumes:read")), 201, "").text("agentId")
		v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 204, "")
		for _, email := range []string{"recycled@example.com", "Recycled@example.com", "RECYCLED@EXAMPLE.COM"} {
			v.want(v.api(v.bearer, "POST", "/agents", agentJSON(email, "resumes:read")), 409, "AGENT_ALREADY_EXISTS")
		}
		a := v.api(v.bearer, "POST", "/agents", agentWith(map[string]any{"agentId": id}))
		v.want(a, 400, "VALIDATION_ERROR")
	}},
	{"a secret outlives its rotation", "keycloak/keycloak, issue 50855", func(t *testing.T, v *service) {
		w := v.another()
		id := v.newAgent("tokens:read")
		credentialID, old := v.quickCredential(id)
		token := v.token(id, old, "")
		w.token(id, old, "") // both copies remember it
		fresh := v.rotate(id, credentialID).text("clientSecret")
		for _, v := range []*service{v, w} {
			v.wantEveryAuthentication("the old secret", id, old, 401, "invalid_client")
			v.wantEveryAuthentication("half of each", id, fresh[:24]+old[24:], 401, "invalid_client")
			v.wantRefused("the old secret's token", token)
		}
		w.token(id, fresh, "")
	}},
	{"an expired credential still works", "spring-authorization-server, issue 778", func(t *testing.T, v *service) {
		id := v.newAgent("tokens:read")
		credentialID, secret := v.quickCredential(id)
		end := time.Now().Add(time.Hour / 2).Truncate(time.Second)
		v.setExpiry(credentialID, end)
		if c := readClaims(t, v.token(id, secret, "")); c.Expires > end.Unix() {
			t.Errorf("a token ends at %d, after its credential at %d", c.Expires, end.Unix())
		}
		v.setExpiry(credentialID, time.Now().Add(-time.Second))
		v.wantEveryAuthentication("expired", id, secret, 401, "invalid_client")
		_, unseen := v.quickCredential(id)
		v.exec(`update credentials set expires_at = now() - interval '1 second' where client_id = $1`, id)
		v.wantEveryAuthentication("expired and unseen", id, unseen, 401, "invalid_client")
	}},
}

// Who may do more than was given.
var authorityWounds = []wound{
	{"scopes widened by asking", "RFC 6749, sections 3.3 and 6; CVE-2024-52287 (authentik)", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read", "scores:*")
		narrow := v.want(v.grant(id, secret, "scope=resumes:read"), 200, "")
		if narrow.text("refresh_token") != "" {
			t.Error("there is a refresh token")
		}
		allowed := regexp.MustCompile(`^(resumes:read|scores:(\*|[a-z0-9][a-z0-9_.-]*))( (resumes:read|scores:(\*|[a-z0-9][a-z0-9_.-]*)))*$`)
		for _, form := range []string{
			"scope=agents:write", "scope=resumes:write", "scope=resumes:*", "scope=*", "scope=*:*", "scope=*:read", "scope=resumes:read+agents:write",
			"scope=scores:*+agents:write", "scope=scores:x%09agents:write", "scope=scores:x%0aagents:write", "scope=scores:x%00agents:write",
			"scope=scores:x%2520agents:write", "scope=scores:x,agents:write", "scope=scores:*:agents:write", "scope=scores:", "scope=scores:**",
			"scope=scores:x++agents:write", "scope=+agents:write", "scope=agents:write+", "scope=RESUMES:READ", "scope=Agents:Write",
			"scope=%C2%A0agents:write", "scope=scores%3A%2A/../agents:write", "scope=resumes:read&scopes=agents:write", "scope=resumes:read&scope[]=agents:write",
			"scope=resumes:read&Scope=agents:write", "scope=resumes:read&scope=agents:write", "scope=", "", "scope=resumes:read&audience=" + v.env["ISSUER"],
			"scope=scores:*+scores:*+scores:a", "scope=scores:A", "scope=scores:%2A%2A", "scope=resumes:read&authorization_details=[]", "scope=agents:*",
		} {
			a := v.grant(id, secret, form)
			if a.status == 400 {
				continue
			}
			v.want(a, 200, "")
			if c := readClaims(t, a.text("access_token")); !allowed.MatchString(c.Scope) || c.Scope != a.text("scope") {
				t.Errorf("%s gives %q, and the answer says %q", form, c.Scope, a.text("scope"))
			}
		}
		// Nor does a narrower token buy a wider one.
		token := narrow.text("access_token")
		for _, grant := range []string{"refresh_token&refresh_token=" + token,
			"urn:ietf:params:oauth:grant-type:jwt-bearer&assertion=" + token, "authorization_code&code=" + token} {
			v.want(v.form(id, secret, "", "scope=scores:x&grant_type="+grant), 400, "unsupported_grant_type")
		}
		v.want(v.form(id, secret, "", "scope=scores:x&grant_type=urn:ietf:params:oauth:grant-type:token-exchange&resource=https://a.example.com&subject_token="+token+
			"&subject_token_type=urn:ietf:params:oauth:token-type:access_token"), 400, "invalid_request")
		if a := v.bearerForm(token, "", "grant_type=client_credentials&scope=scores:x"); a.status != 401 {
			t.Errorf("a token buys a token: %v", a)
		}
	}},
	{"a token grows with its agent", "RFC 6749, section 3.3", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read")
		token := v.token(id, secret, "resumes:read")
		v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"capabilities":["agents:read","audit:read","tokens:read"]}`), 200, "")
		v.want(v.api(token, "GET", "/agents", ""), 403, "FORBIDDEN")
		v.want(v.api(token, "GET", "/audit", ""), 403, "FORBIDDEN")
		v.want(v.bearerForm(token, "/introspect", "token=x"), 403, "insufficient_scope")
		if a := v.form(v.id, v.secret, "/introspect", "token="+token); a.text("scope") != "resumes:read" {
			t.Errorf("the token is introspected with %q", a.text("scope"))
		}
		v.want(v.grant(id, secret, "scope=resumes:read"), 400, "invalid_scope")
		narrow := v.token(id, secret, "tokens:read")
		v.want(v.api(narrow, "GET", "/audit", ""), 403, "FORBIDDEN")
	}},
	{"other grants and other spellings of the grant", "CVE-2026-9792 (Keycloak: a grant that policy forbids)", func(t *testing.T, v *service) {
		for _, grant := range []string{"password", "authorization_code", "refresh_token", "implicit", "urn:ietf:params:oauth:grant-type:device_code",
			"urn:openid:params:grant-type:ciba", "urn:ietf:params:oauth:grant-type:jwt-bearer", "urn:ietf:params:oauth:grant-type:saml2-bearer",
			"urn:ietf:params:oauth:grant-type:token-exchange ", "Client_Credentials", "client_credentials ", "client_credentials\x00", "client_credentials,password"} {
			form := url.Values{"grant_type": {grant}, "username": {v.id}, "password": {v.secret}, "code": {"x"}, "assertion": {v.bearer}, "subject_token": {v.bearer}}
			v.want(v.form(v.id, v.secret, "", form.Encode()), 400, "unsupported_grant_type")
			if a := v.form("", "", "", form.Encode()+"&client_id="+v.id); a.status != 401 {
				t.Errorf("grant_type=%q without a secret = %v, want 401", grant, a)
			}
		}
	}},
	{"more granted to oneself or to another", "OWASP API Security Top 10 2023, API5", func(t *testing.T, v *service) {
		id := v.newAgent(agentsWrite)
		token := v.bearerOf(id, agentsWrite)
		victim := v.newAgent(agentsWrite, auditRead)
		credentialID, _ := v.quickCredential(victim)
		for _, try := range []struct{ method, path, body string }{
			{"PATCH", "/agents/" + id, `{"capabilities":["agents:write","audit:read"]}`},
			{"PATCH", "/agents/" + id, `{"capabilities":["agents:write","credentials:write"],"version":"1.0.1"}`},
			{"POST", "/agents", agentWith(map[string]any{"capabilities": []string{auditRead}})},
			{"POST", "/agents", agentWith(map[string]any{"capabilities": []string{"x:y", agentsWrite, tokensRead}})},
			{"PATCH", "/agents/" + victim, `{"capabilities":["agents:write"]}`}, // to take it over afterwards
			{"PATCH", "/agents/" + victim, `{"status":"suspended"}`},
			{"DELETE", "/agents/" + victim, ""},
			{"POST", "/agents/" + victim + "/credentials/" + credentialID + "/rotate", `{}`},
			{"DELETE", "/agents/" + victim + "/credentials/" + credentialID, ""},
		} {
			if a := v.patiently(token, try.method, try.path, try.body); a.status != 403 || a.code() != "FORBIDDEN" {
				t.Errorf("%s %s %s = %v, want 403", try.method, try.path, try.body, a)
			}
		}
		if a := v.api(v.bearer, "GET", "/agents/"+victim, ""); a.text("status") != "active" || a.text("version") != "1.0.0" {
			t.Errorf("the other agent is now %v", a)
		}
	}},
	{"a privilege spelled otherwise", "CVE-2025-5999 (Vault: ROOT is not root when it is checked, and is when it is used)", func(t *testing.T, v *service) {
		token := v.bearerOf(v.newAgent(agentsWrite), agentsWrite)
		for _, capability := range []string{
			"AUDIT:READ", "Audit:read", "audit:READ", " audit:read", "audit:read ", "audit:read\t", "audit:read\n", "audit:read\x00", "audit:*", "*:read", "*:*", "*",
			"audit:", ":read", "audit:read audit:read", "audit:read,x", "audit::read", "аudit:read", "ａudit:read", "audit：read", "audit%3Aread", "audit\u200b:read", "ſ:read",
			"tokens:*", "agents:*", "credentials:*", "audit:r*",
		} {
			for _, by := range []string{token, v.bearer} {
				a := v.api(by, "POST", "/agents", agentWith(map[string]any{"capabilities": []string{"x:y", capability}}))
				if a.status != 400 || a.code() != "VALIDATION_ERROR" {
					t.Errorf("registration with %q = %v, want 400", capability, a)
				}
			}
		}
	}},
	{"an agent at another's objects", "OWASP API Security Top 10 2023, API1; CVE-2025-27507 (ZITADEL)", func(t *testing.T, v *service) {
		id, victim := v.newAgent(credentialsWrite), v.newAgent("resumes:read")
		token := v.bearerOf(id, credentialsWrite)
		theirs, secret := v.quickCredential(victim)
		own, _ := v.quickCredential(id)
		for _, try := range []struct {
			method, path, body string
			status             int
		}{
			{"GET", "/agents/" + victim, "", 403},
			{"PATCH", "/agents/" + victim, `{"version":"9.9.9"}`, 403},
			{"PATCH", "/agents/" + id, `{"version":"9.9.9"}`, 403},
			{"GET", "/agents/" + victim + "/credentials", "", 403},
			{"POST", "/agents/" + victim + "/credentials", "{}", 403},
			{"DELETE", "/agents/" + victim + "/credentials/" + theirs, "", 403},
			{"DELETE", "/agents/" + victim + "/credentials/" + own, "", 403},
			// Through one's own path.
			{"POST", "/agents/" + id + "/credentials/" + theirs + "/rotate", "{}", 404},
			{"DELETE", "/agents/" + id + "/credentials/" + theirs, "", 404},
			{"DELETE", "/agents/" + strings.ToUpper(id) + "/credentials/" + theirs, "", 403},
			{"GET", "/agents", "", 403},
			{"GET", "/audit?agentId=" + id, "", 403},
		} {
			if a := v.patiently(token, try.method, try.path, try.body); a.status != try.status {
				t.Errorf("%s %s = %v, want %d", try.method, try.path, a, try.status)
			}
		}
		v.token(victim, secret, "")
	}},
	{"fields that are not the caller's to set", "OWASP API Security Top 10 2023, API3; CVE-2019-16097 (Harbor: an administrator by has_admin_role)", func(t *testing.T, v *service) {
		id := v.newAgent("resumes:read")
		credentialID, _ := v.quickCredential(id)
		for field, value := range map[string]any{
			"agentId": newID(), "status": "active", "createdAt": "2020-01-01T00:00:00Z", "updatedAt": "2020-01-01T00:00:00Z", "isAdmin": true, "has_admin_role": true,
			"scopes": []string{agentsWrite}, "scope": agentsWrite, "clientSecret": newSecret(), "id": newID(), "agent_id": newID(), "__proto__": map[string]any{"isAdmin": true},
			"Status": "active", "credentials": []any{},
		} {
			a := v.api(v.bearer, "POST", "/agents", agentWith(map[string]any{field: value}))
			if a.status != 400 || !strings.Contains(detailNames(a), field) {
				t.Errorf("registration with %s = %v, want 400 for it", field, a)
			}
		}
		for _, body := range []string{`{"email":"other@example.com"}`, `{"agentId":"` + newID() + `"}`, `{"createdAt":"2020-01-01T00:00:00Z"}`, `{"owner":"x","isAdmin":true}`} {
			v.want(v.api(v.bearer, "PATCH", "/agents/"+id, body), 400, "VALIDATION_ERROR")
		}
		for _, path := range []string{"", "/" + credentialID + "/rotate"} {
			for _, body := range []string{`{"clientSecret":"x"}`, `{"clientId":"` + v.id + `"}`, `{"credentialId":"` + newID() + `"}`, `{"status":"active"}`, `{"secretPrefix":"0000000000000000"}`, `{"expires_at":"2099-01-01T00:00:00Z"}`} {
				v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials"+path, body), 400, "VALIDATION_ERROR")
			}
		}
	}},
	{"a check that is skipped where its field is left out", "CVE-2026-18570 (Keycloak)", func(t *testing.T, v *service) {
		for _, field := range []string{"email", "agentType", "version", "capabilities", "owner", "deploymentEnv"} {
			if a := v.api(v.bearer, "POST", "/agents", agentWith(map[string]any{field: nil})); a.status != 400 || detailNames(a) != field {
				t.Errorf("registration without %s = %v, want 400 for it", field, a)
			}
		}
		id := v.newAgent("resumes:read")
		for _, capabilities := range []string{`null`, `[]`, `[null]`, `[""]`, `{}`, `"agents:write"`} {
			body := `{"capabilities":` + capabilities + `}`
			v.want(v.api(v.bearer, "PATCH", "/agents/"+id, body), 400, "VALIDATION_ERROR")
			v.want(v.api(v.bearer, "POST", "/agents", strings.Replace(agentWith(nil), `["resumes:read"]`, capabilities, 1)), 400, "VALIDATION_ERROR")
		}
		// And where a change of one field is judged by what the other was.
		token := v.bearerOf(v.newAgent(agentsWrite), agentsWrite)
		v.want(v.api(token, "PATCH", "/agents/"+id, `{"status":"active","capabilities":["resumes:read","audit:read"]}`), 403, "FORBIDDEN")
	}},
	{"a name that is there twice", "CVE-2017-12635 (CouchDB: the last roles are checked, the first are used)", func(t *testing.T, v *service) {
		token := v.bearerOf(v.newAgent(agentsWrite), agentsWrite)
		id := v.newAgent("resumes:read")
		good, bad := `["resumes:read"]`, `["audit:read"]`
		for _, body := range []string{
			`{"capabilities":` + good + `,"capabilities":` + bad + `}`, `{"capabilities":` + bad + `,"capabilities":` + good + `}`,
			`{"capabilities":` + good + `,"Capabilities":` + bad + `}`, `{"Capabilities":` + bad + `}`, `{"capabilitieſ":` + bad + `}`,
			`{"capabilities":` + good + `,"\u0063apabilities":` + bad + `}`, `{"capabilities":` + good + `,"capabilities\u0000":` + bad + `}`,
			`{"capabilities":` + good + `}{"capabilities":` + bad + `}`, `[{"capabilities":` + bad + `}]`, `{"capabilities":` + good + `,"":` + bad + `}`,
			"\ufeff" + `{"capabilities":` + good + `}`, `{"capabilities":` + good + `,"capabilities":null}`, `{"capabilities":` + good + `,}`, `{"capabilities":` + good + `}//`,
		} {
			for _, by := range []string{token, v.bearer} {
				if a := v.api(by, "PATCH", "/agents/"+id, body); a.status != 400 {
					t.Errorf("PATCH %s = %v, want 400", body, a)
				}
			}
		}
		if a := v.api(v.bearer, "GET", "/agents/"+id, ""); strings.Contains(a.raw, auditRead) {
			t.Errorf("the agent is now %v", a)
		}
	}},
	{"one email, several agents", "CVE-2019-19844 (Django: addresses that are one in another case)", func(t *testing.T, v *service) {
		emails := []string{"race-kiss@example.com", "Race-Kiss@example.com", "RACE-KISS@EXAMPLE.COM", "race-kiss@Example.Com"}
		got := atOnce(8, func(i int) answer {
			return v.api(v.bearer, "POST", "/agents", agentJSON(emails[i%len(emails)], "resumes:read"))
		})
		if got[201] != 1 || got[409] != 7 {
			t.Errorf("registrations of one email at once: %v, want one 201 and seven 409", got)
		}
		for _, email := range []string{"race-\u212aiss@example.com", "race-ki\u017f\u017f@example.com", "race-kiss@example.com ", " race-kiss@example.com",
			"race-kiss@example.com\n", "race-kiss@example.com\x00", "race-kiss@ｅxample.com", "race-kiss@example.com\u200b"} {
			v.want(v.api(v.bearer, "POST", "/agents", agentJSON(email, "resumes:read")), 400, "VALIDATION_ERROR")
		}
	}},
	{"introspection by any client", "RFC 7662, section 4; CVE-2026-37979 (Keycloak)", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read", "tokens:write")
		token := v.mint(v.newAgent("resumes:read"), newID())
		for who, a := range map[string]answer{
			"a client":   v.form(id, secret, "/introspect", "token="+token),
			"its form":   v.form("", "", "/introspect", "token="+token+"&client_id="+id+"&client_secret="+secret),
			"its token":  v.bearerForm(v.token(id, secret, ""), "/introspect", "token="+token),
			"the token":  v.bearerForm(token, "/introspect", "token="+token),
			"a narrowed": v.bearerForm(v.token(v.id, v.secret, "agents:read"), "/introspect", "token="+token),
		} {
			if a.status != 403 || a.code() != "insufficient_scope" || strings.Contains(a.raw, "sub") {
				t.Errorf("introspection by %s = %v, want 403 insufficient_scope", who, a)
			}
		}
		v.want(v.form("", "", "/introspect", "token="+token), 401, "invalid_client")
		v.want(v.form("", "", "/introspect", "token="+token+"&client_id="+v.id), 401, "invalid_client")
	}},
	{"an inactive token's claims are told", "RFC 7662, section 2.2; CVE-2026-18208 (Keycloak: in the answer as a JWT)", func(t *testing.T, v *service) {
		token := v.mint(v.newAgent("resumes:read"), newID())
		v.want(v.bearerForm(v.bearer, "/revoke", "token="+token), 200, "")
		for _, accept := range []string{"application/json", "application/jwt", "application/token-introspection+jwt", "text/html"} {
			a := v.do("POST", "/api/v1/token/introspect", "token="+token, "Authorization", "Bearer "+v.bearer, "Content-Type", formType, "Accept", accept)
			if a.status != 200 || a.raw != "{\"active\":false}\n" || a.header.Get("Content-Type") != "application/json" {
				t.Errorf("with Accept: %s answered %v, want exactly active:false", accept, a)
			}
		}
	}},
}

// failures sends wrong secrets to a copy with a limit of 6, and returns the
// statuses. Few more than 6 may pass, if a minute ends meanwhile.
func (v *service) failures(n int, send func(i int) answer) map[int]int {
	v.t.Helper()
	statuses := map[int]int{}
	for i := range n {
		statuses[send(i).status]++
	}
	return statuses
}

const lockOut = "6" // RATE_LIMIT_PER_MINUTE

var clientWounds = []wound{
	{"bcrypt reads 72 bytes", "Okta AD/LDAP advisory of 30 October 2024; CVE-2025-22228 (Spring Security)", func(t *testing.T, v *service) {
		id, secret := v.quickClient("tokens:read")
		v.token(id, secret, "") // it is in memory, too
		_, fresh := v.quickCredential(id)
		for _, secret := range []string{secret, fresh} {
			for name, wrong := range map[string]string{
				"a byte more": secret + "0", "much more": secret + strings.Repeat("a", 500), "NUL": secret + "\x00", "NUL and more": secret + "\x00wrong",
				"newline": secret + "\n", "NUL within": secret[:40] + "\x00" + secret[41:], "cut at NUL": secret[:71] + "\x00", "a byte fewer": secret[:71],
			} {
				v.wantEveryAuthentication(name, id, wrong, 401, "invalid_client")
			}
		}
	}},
	{"unknown clients are told from wrong secrets", "RFC 6749, section 5.2; CVE-2025-6011 (Vault: by the time that bcrypt takes)", func(t *testing.T, v *service) {
		slow := time.Hour
		for range 3 {
			begun := time.Now()
			v.want(v.form(v.id, v.secret[:24]+newSecret()[24:], "", "grant_type=client_credentials"), 401, "invalid_client") // of its prefix
			slow = min(slow, time.Since(begun))
		}
		quickest := func(id string) (best time.Duration, text string) {
			best = time.Hour
			for n := 0; n < 5 || n < 200 && best > slow/2; n++ { // others may make it slow, and nobody makes it quick
				begun := time.Now()
				a := v.form(id, newSecret(), "", "grant_type=client_credentials")
				best = min(best, time.Since(begun))
				text = fmt.Sprint(a, a.header.Get("WWW-Authenticate"), a.header.Get("Content-Length"))
			}
			return best, text
		}
		known, knownText := quickest(v.id)
		unknown, unknownText := quickest(newID())
		if knownText != unknownText {
			t.Errorf("a wrong secret is answered with %s, an unknown client with %s", knownText, unknownText)
		}
		if known > slow/2 || unknown > slow/2 { // neither has run bcrypt
			t.Errorf("a wrong secret takes %s, an unknown client %s, and bcrypt %s", known, unknown, slow)
		}
	}},
	{"spellings of a client_id escape the lock-out", "CVE-2025-6004 (Vault: case and spaces)", func(t *testing.T, v *service) {
		w := v.another("RATE_LIMIT_PER_MINUTE", lockOut, "TRUSTED_PROXIES", "127.0.0.0/8")
		id, secret := v.quickClient("tokens:read")
		spellings := []string{strings.ToUpper(id), "{" + id + "}", "urn:uuid:" + id, strings.ReplaceAll(id, "-", ""), id + " ", " " + id,
			strings.ToUpper(id[:8]) + id[8:], id + "\x00", id + "\n", id[:8] + id[9:], "{" + strings.ToUpper(id) + "}"}
		got := w.failures(33, func(i int) answer {
			return w.do("POST", "/api/v1/token", "grant_type=client_credentials", "Content-Type", formType, "X-Forwarded-For", "203.0.113.38",
				"Authorization", basicAuth(url.QueryEscape(spellings[i%len(spellings)]), newSecret()))
		})
		if got[401] > 12 || got[401]+got[429] != 33 {
			t.Errorf("33 wrong secrets for 11 spellings = %v, want a few 401 and the rest 429", got)
		}
		for _, spelling := range spellings {
			v.wantEveryAuthentication(fmt.Sprintf("the right secret for %q", spelling), spelling, secret, 401, "invalid_client")
			if clean := url.PathEscape(spelling); clean != id {
				v.want(v.api(v.bearer, "GET", "/agents/"+clean, ""), 404, map[bool]string{true: "AGENT_NOT_FOUND", false: "NOT_FOUND"}[pathPattern.MatchString(clean)])
			}
		}
		for _, key := range v.keys("*") {
			if strings.Contains(strings.ToLower(key), id) && !strings.Contains(key, id) || strings.Contains(key, "{") {
				t.Errorf("Redis has a key %q", key)
			}
		}
	}},
	{"a lock-out that one endpoint forgets", "CVE-2026-16103 (Keycloak: checked at one endpoint, omitted at the next)", func(t *testing.T, v *service) {
		w := v.another("RATE_LIMIT_PER_MINUTE", lockOut, "TRUSTED_PROXIES", "127.0.0.0/8")
		id, secret := v.quickClient("tokens:read") // which that copy has not seen
		try := func(path, secret string) answer {
			return w.do("POST", "/api/v1/token"+path, "grant_type=client_credentials&token=x", "Content-Type", formType,
				"X-Forwarded-For", "203.0.113.39", "Authorization", basicAuth(id, secret))
		}
		w.failures(18, func(int) answer { return try("", newSecret()) })
		for _, path := range []string{"", "/introspect", "/revoke"} {
			got := w.failures(6, func(int) answer { return try(path, newSecret()) })
			if got[429] < 4 || got[429]+got[401] != 6 {
				t.Errorf("after 18 failures at /token, /token%s answers %v, want 429", path, got)
			}
			// As long as that lasts, nothing tells a right guess from a wrong one.
			if a := try(path, secret); a.status != 429 && a.status != 200 {
				t.Errorf("a right secret at /token%s = %v", path, a)
			}
		}
	}},
	{"a lock-out that believes what it is told of addresses", "CVE-2023-36456 (authentik: X-Forwarded-For)", func(t *testing.T, v *service) {
		wrong := func(w *service, forwarded func(i int) []string) map[int]int {
			return w.failures(30, func(i int) answer {
				header := append(forwarded(i), "Content-Type", formType, "Authorization", basicAuth(newID(), newSecret()))
				return w.do("POST", "/api/v1/token", "grant_type=client_credentials", header...)
			})
		}
		spoofed := func(i int) string { return fmt.Sprintf("198.51.100.%d", i+1) }
		got := wrong(v.another("RATE_LIMIT_PER_MINUTE", lockOut), func(i int) (header []string) {
			for _, name := range []string{"X-Forwarded-For", "X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP", "X-Originating-IP"} {
				header = append(header, name, spoofed(i))
			}
			return append(header, "Forwarded", "for="+spoofed(i))
		})
		if got[401] > 12 || got[401]+got[429] != 30 {
			t.Errorf("30 wrong secrets that each claim another address = %v, want a few 401 and the rest 429", got)
		}
		// A trusted proxy adds the real one at the end of what it was sent.
		got = wrong(v.another("RATE_LIMIT_PER_MINUTE", lockOut, "TRUSTED_PROXIES", "127.0.0.0/8"), func(i int) []string {
			return []string{"X-Forwarded-For", spoofed(i) + ", 203.0.113.40"}
		})
		if got[401] > 12 || got[401]+got[429] != 30 {
			t.Errorf("30 wrong secrets that each claim another address through a proxy = %v, want a few 401 and the rest 429", got)
		}
		if n := v.count(`select count(*) from audit_events where ip_address like '198.51.100.%'`); n != 0 {
			t.Errorf("%d events are recorded of addresses that were made up", n)
		}
	}},
	{"one client's secret, another's name", "RFC 6749, section 2.3", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read")
		more := "grant_type=client_credentials&token=x"
		for _, path := range []string{"", "/introspect", "/revoke"} {
			for name, a := range map[string]answer{
				"Basic, and another's id":       v.form(id, secret, path, more+"&client_id="+v.id),
				"Basic, and another's secret":   v.form(id, secret, path, more+"&client_id="+v.id+"&client_secret="+v.secret),
				"Basic, and its own secret":     v.form(id, secret, path, more+"&client_id="+id+"&client_secret="+secret),
				"a wrong Basic, a right secret": v.form(id, newSecret(), path, more+"&client_id="+id+"&client_secret="+secret),
				"two Authorization headers": v.do("POST", "/api/v1/token"+path, more, "Content-Type", formType,
					"Authorization", basicAuth(id, secret), "Authorization", basicAuth(v.id, v.secret)),
				"Basic and Bearer": v.do("POST", "/api/v1/token"+path, more, "Content-Type", formType,
					"Authorization", basicAuth(id, secret), "Authorization", "Bearer "+v.bearer),
			} {
				if a.status != 400 || a.code() != "invalid_request" {
					t.Errorf("%s at /token%s = %v, want 400 invalid_request", name, path, a)
				}
			}
			if a := v.do("POST", "/api/v1/token"+path, more+"&client_id="+id+"&client_secret="+secret, "Content-Type", formType,
				"Authorization", "Bearer "+v.bearer); a.status != 400 {
				t.Errorf("Bearer and a secret at /token%s = %v, want 400", path, a)
			}
			v.want(v.form(id, v.secret, path, more), 401, "invalid_client")
			v.want(v.form(v.id, secret, path, more), 401, "invalid_client")
		}
	}},
	{"parameters in the URL", "RFC 6749, section 2.3.1; RFC 6750, section 5.3", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read", "tokens:read")
		mark := "canary" + newID() // which no log may have
		query := url.Values{"grant_type": {"client_credentials"}, "client_id": {id}, "client_secret": {secret}, "state": {mark}}.Encode()
		if a := v.form("", "", "?"+query, ""); a.status == 200 {
			t.Errorf("a secret in the URL gives %v", a)
		}
		v.want(v.form(id, secret, "?grant_type=client_credentials", ""), 400, "invalid_request")
		v.want(v.form("", "", "?client_secret="+secret, "grant_type=client_credentials&client_id="+id), 401, "invalid_client")
		v.want(v.form(id, secret, "?scope=tokens:read&state="+mark, "grant_type=client_credentials&scope=resumes:read"), 200, "")
		v.want(v.form(id, secret, "/introspect?token="+v.bearer, ""), 400, "invalid_request")
		v.want(v.form(id, secret, "/revoke?token="+v.bearer, ""), 400, "invalid_request")
		for _, name := range []string{"access_token", "token", "bearer", "Authorization"} {
			v.want(v.do("GET", "/api/v1/agents?"+name+"="+v.bearer, ""), 401, "UNAUTHORIZED")
		}
		v.want(v.do("POST", "/api/v1/token/introspect", "token=x&access_token="+v.bearer, "Content-Type", formType), 401, "invalid_client")
		for text, name := range map[string]string{mark: "a mark", secret: "a secret", v.bearer: "a token"} {
			if strings.Contains(testLog.String(), text) {
				t.Errorf("%s in a URL is in the log", name)
			}
			if n := v.count(`select count(*) from audit_events where metadata::text like $1 or user_agent like $1`, "%"+text+"%"); n != 0 {
				t.Errorf("%s in a URL is in the audit log", name)
			}
		}
	}},
	{"parameters that are there twice", "RFC 6749, section 3.2", func(t *testing.T, v *service) {
		id, secret := v.quickClient("resumes:read", "tokens:read")
		other, otherSecret := v.quickClient("resumes:read")
		both := "&client_id=" + id + "&client_secret=" + secret
		for _, form := range []string{
			"grant_type=client_credentials&grant_type=client_credentials" + both, "grant_type=client_credentials&grant_type=password" + both,
			"grant_type=client_credentials&scope=resumes:read&scope=tokens:read" + both, "grant_type=client_credentials&client_id=" + other + both,
			"grant_type=client_credentials&client_secret=" + otherSecret + both, "grant_type=client_credentials&client_secret=" + both,
			"grant_type=client_credentials" + both + both, "grant_type=client_credentials&x=1&x=2" + both,
		} {
			v.want(v.form("", "", "", form), 400, "invalid_request")
		}
		token := v.mint(v.newAgent("resumes:read"), newID())
		for _, path := range []string{"/introspect", "/revoke"} {
			v.want(v.form(v.id, v.secret, path, "token=x&token="+token), 400, "invalid_request")
		}
		if !v.active(token) {
			t.Error("the second token was revoked")
		}
	}},
	{"secrets and hashes are listed", "CVE-2020-10187 (Doorkeeper), CVE-2026-17048 (Keycloak)", func(t *testing.T, v *service) {
		id := v.newAgent("resumes:read")
		credentialID, _ := v.quickCredential(id)
		made := v.rotate(id, credentialID)
		secret := made.text("clientSecret")
		if !secretPattern.MatchString(secret) || strings.Contains(made.raw, "$2a$") || made.header.Get("Cache-Control") != "no-store" {
			t.Errorf("a rotation is answered with %v", made)
		}
		v.token(id, secret, "")
		other := secret[:70] + map[bool]string{true: "11", false: "00"}[strings.HasSuffix(secret, "00")]
		v.wantEveryAuthentication("another's", id, other, 401, "invalid_client")
		for _, path := range []string{"/agents/" + id, "/agents/" + id + "/credentials", "/agents?limit=100", "/audit?limit=100&agentId=" + id, "/audit/verify"} {
			a := v.want(v.api(v.bearer, "GET", path, ""), 200, "")
			for _, what := range []string{secret, secret[24:], "$2a$", "$2b$", "ecretHash", "ecret_hash", "clientSecret", "eyJhbGciOi"} {
				if strings.Contains(a.raw, what) && (path != "/audit/verify" || what != "eyJhbGciOi") {
					t.Errorf("GET %s shows %q", path, what)
				}
			}
		}
	}},
}

var (
	evil        = "evil.example"
	evilHeaders = []string{"X-Forwarded-Host", evil, "X-Forwarded-Proto", "gopher", "X-Forwarded-Server", evil, "X-Host", evil, "X-Original-Host", evil,
		"Forwarded", "host=" + evil + ";proto=gopher", "X-Forwarded-Prefix", "/" + evil, "X-Forwarded-Port", "666", "Origin", "https://" + evil, "Referer", "https://" + evil}
)

var webWounds = []wound{
	{"the issuer is what the request says", "RFC 8414, section 3.3; CVE-2025-48936 (ZITADEL: X-Forwarded-Proto)", func(t *testing.T, v *service) {
		check := func(what string, a answer) {
			t.Helper()
			if text := fmt.Sprint(a.raw, a.header); strings.Contains(text, evil) || strings.Contains(text, "gopher") {
				t.Errorf("%s says %s", what, text)
			}
		}
		request := func(method, path, body string, header ...string) answer {
			q, err := http.NewRequest(method, v.url+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			q.Host = evil
			for i := 0; i < len(header); i += 2 {
				q.Header.Add(header[i], header[i+1])
			}
			return v.send(q)
		}
		metadata := request("GET", "/.well-known/oauth-authorization-server", "", evilHeaders...)
		check("the metadata", metadata)
		for name, value := range metadata.body {
			if at, ok := value.(string); ok && !strings.HasPrefix(at, v.env["ISSUER"]) {
				t.Errorf("%s is %q, want it below %q", name, at, v.env["ISSUER"])
			}
		}
		a := request("POST", "/api/v1/token", "grant_type=client_credentials", append(slices.Clone(evilHeaders), "Content-Type", formType, "Authorization", basicAuth(v.id, v.secret))...)
		v.want(a, 200, "")
		if c := readClaims(t, a.text("access_token")); c.Issuer != v.env["ISSUER"] || !slices.Equal(c.Audience, audience{v.env["ISSUER"]}) {
			t.Errorf("a token has iss %q and aud %q, want %q", c.Issuer, c.Audience, v.env["ISSUER"])
		}
		check("a challenge", request("GET", "/api/v1/agents", "", evilHeaders...))
		check("a token's challenge", request("POST", "/api/v1/token", "grant_type=client_credentials", append(slices.Clone(evilHeaders), "Content-Type", formType)...))
		check("a registration", v.want(request("POST", "/api/v1/agents", agentWith(nil), append(slices.Clone(evilHeaders), "Content-Type", "application/json", "Authorization", "Bearer "+v.bearer)...), 201, ""))
		check("an absolute target", v.raw("GET http://"+evil+"/.well-known/oauth-authorization-server HTTP/1.1\r\nHost: "+evil+"\r\n\r\n"))
		check("a bad path", request("GET", "//"+evil+"/%2e%2e", "", evilHeaders...))
	}},
	{"an authorization endpoint that redirects", "CVE-2020-15234 and CVE-2020-15233 (ORY Fosite)", func(t *testing.T, v *service) {
		for _, query := range []string{
			"response_type=code&client_id=" + v.id + "&redirect_uri=https://" + evil, "response_type=token&client_id=" + v.id + "&redirect_uri=//" + evil,
			"response_type=none&redirect_uri=https://" + evil + "%0d%0aX-Evil:1", "error=x&redirect_uri=javascript:alert(1)", "request_uri=https://" + evil, "",
		} {
			a := v.do("GET", "/api/v1/authorize?"+query, "")
			if a.status != 400 || a.header.Get("Location") != "" || a.header.Get("Refresh") != "" || strings.Contains(a.raw, evil) {
				t.Errorf("GET /authorize?%s = %v, to %q, want 400", query, a, a.header.Get("Location"))
			}
		}
	}},
	{"any origin is allowed", "CVE-2024-25124 (Fiber: any origin, and with credentials)", func(t *testing.T, v *service) {
		w := v.another("CORS_ORIGIN", "https://console.example.com")
		for _, origin := range []string{"https://" + evil, "null", "*", "https://console.example.com." + evil, "https://" + evil + "/https://console.example.com", "http://console.example.com",
			"https://console.example.com:8443", "https://console.example.com/", "https://Console.example.com", "https://xconsole.example.com", "https://consolexexample.com", "file://", ""} {
			for _, v := range []*service{v, w} {
				for _, method := range []string{"GET", "OPTIONS"} {
					a := v.do(method, "/api/v1/agents", "", "Origin", origin, "Access-Control-Request-Method", "GET", "Authorization", "Bearer "+v.bearer)
					for name := range a.header {
						if strings.HasPrefix(name, "Access-Control-") {
							t.Errorf("%s from %q is answered with %s: %s", method, origin, name, a.header.Get(name))
						}
					}
				}
			}
		}
		a := w.do("GET", "/health", "", "Origin", "https://console.example.com")
		if a.header.Get("Access-Control-Allow-Origin") != "https://console.example.com" || a.header.Get("Access-Control-Allow-Credentials") != "" {
			t.Errorf("the allowed origin is answered with %v", a.header)
		}
	}},
	{"a form of another site may change things", "OWASP CSRF Prevention Cheat Sheet (simple requests)", func(t *testing.T, v *service) {
		for _, mediaType := range []string{"text/plain", formType, "multipart/form-data; boundary=x", "text/json", "application/jsonp", "application/json-patch+json", ""} {
			header := []string{"Authorization", "Bearer " + v.bearer}
			if mediaType != "" {
				header = append(header, "Content-Type", mediaType)
			}
			v.want(v.do("POST", "/api/v1/agents", agentWith(nil), header...), 415, "UNSUPPORTED_MEDIA_TYPE")
		}
		body := "grant_type=client_credentials&client_id=" + v.id + "&client_secret=" + v.secret
		for _, mediaType := range []string{"text/plain", "application/json", "multipart/form-data; boundary=x"} {
			v.want(v.do("POST", "/api/v1/token", body, "Content-Type", mediaType), 400, "invalid_request")
		}
		v.want(v.do("POST", "/api/v1/agents", agentWith(nil), "Content-Type", "application/json", "Cookie", "access_token="+v.bearer+"; session="+v.bearer), 401, "UNAUTHORIZED")
	}},
	{"paths that mean another one", "CVE-2020-5902 (F5 BIG-IP: /..;/); net/http.ServeMux redirects a POST to the clean path", func(t *testing.T, v *service) {
		body := "grant_type=client_credentials&client_id=" + v.id + "&client_secret=" + v.secret
		for _, path := range []string{
			"//api/v1/token", "/api/v1//token", "/api/v1/./token", "/api/v1/x/../token", "/api/v1/token/", "/api%2fv1%2ftoken", "/api/v1/%2e/token", "/api/v1/%74oken",
			"/health/..;/api/v1/agents", "/.well-known/..;/api/v1/agents", "/.well-known/%2e%2e/api/v1/agents", "/livez/../api/v1/agents", "/livez/..%2fapi/v1/agents",
			"/livez%00/api/v1/agents", "/livez;/api/v1/agents", "/api/v1/agents;x=.jwks.json", "/api/v1/agents%3b", "/api/v1/agents%23", "/api/v1/agents%3f/health", "/api/v1/agents/.",
			"/api/v1/agents/..%5c", "/api\\v1\\agents", "/api/v1/agents%09", "/api/v1/agents%20", "/API/V1/AGENTS", "/api/v1/agents.json", "/static/../api/v1/agents", "/%2e%2e/api/v1/agents",
		} {
			for _, method := range []string{"GET", "POST"} {
				a := v.raw(method + " " + path + " HTTP/1.1\r\nHost: x\r\nContent-Type: " + formType + "\r\nAuthorization: Bearer " + v.bearer +
					"\r\nContent-Length: " + fmt.Sprint(len(body)) + "\r\n\r\n" + body)
				if a.status != 404 || a.header.Get("Location") != "" {
					t.Errorf("%s %s = %v to %q, want 404", method, path, a, a.header.Get("Location"))
				}
			}
		}
	}},
	{"a header in place of the method", "CVE-2019-10913 (Symfony: method overrides)", func(t *testing.T, v *service) {
		id := v.newAgent("resumes:read")
		for _, name := range []string{"X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "_method"} {
			for _, method := range []string{"GET", "POST"} {
				v.do(method, "/api/v1/agents/"+id+"?_method=DELETE", "_method=DELETE", name, "DELETE", "Authorization", "Bearer "+v.bearer, "Content-Type", formType)
			}
			v.want(v.do("GET", "/api/v1/token", "", name, "POST", "Authorization", basicAuth(v.id, v.secret)), 405, "invalid_request")
		}
		if a := v.api(v.bearer, "GET", "/agents/"+id, ""); a.text("status") != "active" {
			t.Errorf("the agent is now %v", a)
		}
		for _, method := range []string{"TRACE", "CONNECT", "HEAD", "PUT", "delete", "G\x00T", "PROPFIND"} {
			if a := v.raw(method + " /api/v1/agents/" + id + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); a.status < 400 || a.status >= 500 || strings.Contains(a.raw, id) {
				t.Errorf("%q is answered with %v, want 4xx", method, a)
			}
		}
	}},
	{"a header in place of the path, or of a token", "CVE-2018-14773 (Symfony: X-Original-URL), CVE-2025-29927 (Next.js: x-middleware-subrequest)", func(t *testing.T, v *service) {
		for _, name := range []string{"X-Original-URL", "X-Rewrite-URL", "X-Original-URI", "X-Forwarded-URI", "X-Forwarded-Path"} {
			if a := v.do("GET", "/livez", "", name, "/api/v1/agents"); a.text("status") != "ok" || a.body["data"] != nil {
				t.Errorf("%s: /api/v1/agents answers %v", name, a)
			}
			v.want(v.do("GET", "/api/v1/agents", "", name, "/livez"), 401, "UNAUTHORIZED")
		}
		header := []string{"X-Middleware-Subrequest", "middleware", "X-Forwarded-User", v.id, "X-Remote-User", v.id, "Remote-User", v.id, "X-Authenticated-Userid", v.id,
			"X-User-Id", v.id, "X-Client-Id", v.id, "X-Scope", agentsWrite, "X-Forwarded-Access-Token", v.bearer, "X-Access-Token", v.bearer, "X-Api-Key", v.secret,
			"Proxy-Authorization", "Bearer " + v.bearer, "X-Authorization", "Bearer " + v.bearer, "X-Internal", "true", "X-Forwarded-For", "127.0.0.1", "Cookie", "token=" + v.bearer}
		v.want(v.do("GET", "/api/v1/agents", "", header...), 401, "UNAUTHORIZED")
		v.want(v.do("POST", "/api/v1/token", "grant_type=client_credentials&client_id="+v.id, append(header, "Content-Type", formType)...), 401, "invalid_client")
	}},
	{"debugging is open", "CVE-2019-11248 (Kubernetes: /debug/pprof)", func(t *testing.T, v *service) {
		for _, path := range []string{"/debug/pprof", "/debug/pprof/", "/debug/pprof/cmdline", "/debug/pprof/heap", "/debug/vars", "/metrics", "/api/v1/metrics", "/actuator", "/actuator/env", "/env",
			"/.env", "/.git/config", "/config", "/admin", "/console", "/swagger", "/openapi.json", "/api/v1/openapi.json", "/server-status", "/schema.sql", "/main.go", "/"} {
			for _, bearer := range []string{"", v.bearer} {
				if a := v.do("GET", path, "", "Authorization", "Bearer "+bearer); a.status != 404 || a.code() != "NOT_FOUND" {
					t.Errorf("GET %s = %v, want 404", path, a)
				}
			}
		}
		if a := v.do("GET", "/health", ""); strings.Contains(a.raw, "postgres:") || strings.Contains(a.raw, "127.0.0.1") {
			t.Errorf("health tells where the stores are: %v", a)
		}
	}},
	{"a request inside a request", "CVE-2019-16276 and CVE-2022-1705 (Go: request smuggling)", func(t *testing.T, v *service) {
		inner := "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
		for name, head := range map[string]string{
			"space before the colon": "Content-Length: 5\r\nTransfer-Encoding : chunked", "two lengths": "Content-Length: 5\r\nContent-Length: 6",
			"a length with a sign": "Content-Length: +5", "two lengths in one": "Content-Length: 5, 6", "a length in hexadecimal": "Content-Length: 0x5",
			"both": "Content-Length: 5\r\nTransfer-Encoding: chunked", "an unknown coding": "Transfer-Encoding: xchunked", "identity": "Transfer-Encoding: identity, chunked", "two codings": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
			"NUL": "Transfer-Encoding: chunked\x00", "vertical tab": "Transfer-Encoding: \x0bchunked", "negative": "Content-Length: -1",
			"a bare CR": "X: y\rTransfer-Encoding: chunked", "no name": ": x", "a space in a name": "Content Length: 5",
		} {
			text := v.conversation("POST /api/v1/token/revoke HTTP/1.1\r\nHost: x\r\nContent-Type: " + formType + "\r\n" + head + "\r\n\r\n0\r\n\r\n" + inner)
			if strings.Count(text, "HTTP/1.1 ") != 1 || !strings.HasPrefix(text, "HTTP/1.1 4") && !strings.HasPrefix(text, "HTTP/1.1 501") {
				t.Errorf("%s: answered %.300q, want one refusal and the end", name, text)
			}
		}
		// Of chunks, only those that everybody reads alike.
		for name, body := range map[string]string{
			"a bare LF": "5\ntoken\r\n0\r\n\r\n", "a size with a sign": "+5\r\ntoken\r\n0\r\n\r\n", "a size that is none": "x\r\ntoken\r\n0\r\n\r\n", "a size that is huge": "fffffffffffffffff\r\ntoken\r\n",
			"a chunk that is too long": "3\r\ntoken\r\n0\r\n\r\n",
		} {
			text := v.conversation("POST /api/v1/token/introspect HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + v.bearer + "\r\nContent-Type: " + formType +
				"\r\nTransfer-Encoding: chunked\r\n\r\n" + body + inner)
			if strings.Count(text, "HTTP/1.1 ") != 1 || !strings.HasPrefix(text, "HTTP/1.1 400") {
				t.Errorf("%s in chunks: answered %.300q, want 400 and the end", name, text)
			}
		}
	}},
	{"pages without end", "OWASP API Security Top 10 2023, API4", func(t *testing.T, v *service) {
		for _, list := range []string{"/agents", "/audit", "/agents/" + v.id + "/credentials"} {
			for _, query := range []string{"limit=101", "limit=1000000000", "limit=0", "limit=-1", "limit=9223372036854775808", "limit=1e2", "limit=0x10", "limit=", "limit=%201", "limit=%2B5", "limit=005", "limit=1&limit=1000000",
				"page=0", "page=-1", "page=1000000000", "page=9223372036854775807&limit=100", "page=10001&limit=1", "per_page=100000", "pageSize=100000", "limit[]=100000", "Limit=5", "offset=0"} {
				if a := v.api(v.bearer, "GET", list+"?"+query, ""); a.status != 400 || a.code() != "VALIDATION_ERROR" {
					t.Errorf("GET %s?%s = %.100v, want 400", list, query, a)
				}
			}
		}
	}},
	{"cursors that were made up", "CWE-565 (what a client holds is believed)", func(t *testing.T, v *service) {
		for range 3 {
			v.want(v.form(v.id, v.secret, "/introspect", "token=x"), 200, "")
		}
		good := v.want(v.api(v.bearer, "GET", "/audit?limit=1", ""), 200, "").text("nextCursor")
		v.want(v.api(v.bearer, "GET", "/audit?limit=1&cursor="+good, ""), 200, "")
		part := strings.Split(good, ".")
		if len(part) != 3 || len(part[2]) < 9 {
			t.Fatalf("the cursor is %q", good)
		}
		sign := func(header string) string { // as a JWT library would, keyed with what is public
			mac := hmac.New(sha256.New, []byte(v.do("GET", "/.well-known/jwks.json", "").raw))
			mac.Write([]byte(encode(header) + "." + part[1]))
			return encode(header) + "." + part[1] + "." + encode(string(mac.Sum(nil)))
		}
		for name, cursor := range map[string]string{
			"another seq": part[0] + "." + encode(`{"seq":9,"time":1795572309194}`) + "." + part[2], "no seq": part[0] + "." + encode(`{}`) + "." + part[2],
			"no signature": part[0] + "." + part[1] + ".", "two parts": part[0] + "." + part[1], "a shorter signature": good[:len(good)-4], "a longer one": good + "AAAA",
			"zeros": part[0] + "." + part[1] + "." + encode(string(make([]byte, 256))), "alg none": encode(`{"alg":"none"}`) + "." + part[1] + ".",
			"HS256": sign(`{"alg":"HS256","typ":"audit-cursor+jwt"}`), "a token": v.bearer, "a checkpoint": v.checkpoint(),
			"a bit": flipped(good[0]) + good[1:], "SQL": url.QueryEscape("1 or 1=1 --"), "number": "5", "empty": "",
			"JSON": encode(`{"seq":5,"time":1}`), "padded": good + "%3D", "a newline": good[:5] + "%0a" + good[5:], "another's": good + "&cursor=" + good, "beside a page": good + "&page=2",
		} {
			if a := v.api(v.bearer, "GET", "/audit?limit=1&cursor="+cursor, ""); a.status != 400 || a.code() != "VALIDATION_ERROR" {
				t.Errorf("%s: %q = %v, want 400", name, cursor, a)
			}
		}
	}},
	{"JSON that takes long to read", "CVE-2020-36518 (jackson-databind: deep nesting)", func(t *testing.T, v *service) {
		begun := time.Now()
		many := &strings.Builder{}
		for i := range 1300 {
			fmt.Fprintf(many, `"k%d":0,`, i)
		}
		for name, body := range map[string]string{
			"deep": strings.Repeat("[", 14<<10), "deep and whole": strings.Repeat("[", 7<<10) + strings.Repeat("]", 7<<10), "deep objects": strings.Repeat(`{"a":`, 3<<10),
			"deep in a field": `{"capabilities":` + strings.Repeat("[", 7<<10) + strings.Repeat("]", 7<<10) + `}`, "many names": "{" + many.String() + `"k":0}`,
			"many values": `{"capabilities":[` + strings.Repeat(`"a:b",`, 2<<10) + `"a:c"]}`, "a long number": `{"version":` + strings.Repeat("9", 14<<10) + `}`, "an exponent": `{"version":1e999999999}`,
			"a long string": `{"owner":"` + strings.Repeat("x", 14<<10) + `"}`, "a long address": `{"email":"` + strings.Repeat("a", 7<<10) + "@" + strings.Repeat("a.", 3<<10) + `"}`,
			"a long version": `{"version":"1.0.0-` + strings.Repeat("0", 7<<10) + `"}`, "escapes": `{"owner":"` + strings.Repeat(`\u0041`, 2<<10) + `"}`,
		} {
			if a := v.api(v.bearer, "POST", "/agents", body); a.status != 400 || a.code() != "VALIDATION_ERROR" {
				t.Errorf("%s = %.200v, want 400", name, a)
			}
		}
		if a := v.api(v.bearer, "POST", "/agents", `{"owner":"`+strings.Repeat("x", 200<<10)+`"}`); a.status != 413 {
			t.Errorf("200 kB = %.200v, want 413", a)
		}
		if took := time.Since(begun); took > 30*time.Second {
			t.Errorf("they took %s", took)
		}
	}},
	{"errors that bring input to a browser", "CVE-2019-8400 (ORY Hydra: reflected script in an error)", func(t *testing.T, v *service) {
		const script = `<script>alert(1)</script>`
		escaped := url.QueryEscape(script)
		for name, a := range map[string]answer{
			"a repeated parameter": v.form(v.id, v.secret, "", escaped+"=1&"+escaped+"=2"),
			"a grant type":         v.form(v.id, v.secret, "", "grant_type="+escaped),
			"a scope":              v.form(v.id, v.secret, "", "grant_type=client_credentials&scope="+escaped),
			"a resource":           v.form(v.id, v.secret, "", "grant_type=client_credentials&resource="+escaped),
			"a client":             v.form("", "", "", "grant_type=client_credentials&client_id="+escaped+"&client_secret="+escaped),
			"a query":              v.api(v.bearer, "GET", "/agents?"+escaped+"=1", ""),
			"a filter":             v.api(v.bearer, "GET", "/agents?status="+escaped, ""),
			"a field":              v.api(v.bearer, "POST", "/agents", `{"`+script+`":1}`),
			"a capability":         v.api(v.bearer, "POST", "/agents", agentWith(map[string]any{"capabilities": []string{script}})),
			"authorize":            v.do("GET", "/api/v1/authorize?error="+escaped+"&error_hint="+escaped+"&state="+escaped, ""),
			"a path":               v.do("GET", "/api/v1/"+url.PathEscape(script), ""),
			"a request id":         v.do("GET", "/livez", "", "X-Request-Id", script),
			"an id":                v.api(v.bearer, "GET", "/audit/"+url.PathEscape(script), ""),
			"a method":             v.do("PUT", "/livez", script),
		} {
			if text := fmt.Sprint(a.raw, a.header); strings.Contains(text, "<script") || strings.Contains(text, "%3Cscript") {
				t.Errorf("%s comes back: %s", name, text)
			}
			if a.header.Get("Content-Type") != "application/json" || a.header.Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("%s: answered as %q, %q", name, a.header.Get("Content-Type"), a.header.Get("X-Content-Type-Options"))
			}
		}
	}},
	{"errors that repeat a secret", "CWE-209; RFC 9700, section 4.3", func(t *testing.T, v *service) {
		secret := newSecret()
		for name, a := range map[string]answer{
			"a wrong secret":       v.form(v.id, secret, "", "grant_type=client_credentials"),
			"a secret as id":       v.form(secret, "x", "", "grant_type=client_credentials"),
			"a secret as grant":    v.form(v.id, v.secret, "", "grant_type="+secret),
			"a secret as scope":    v.form(v.id, v.secret, "", "grant_type=client_credentials&scope="+secret),
			"a secret as resource": v.form(v.id, v.secret, "", "grant_type=client_credentials&resource="+secret),
			"two secrets":          v.form("", "", "", "grant_type=client_credentials&client_secret="+secret+"&client_secret="+secret),
			"a secret as token":    v.form(v.id, v.secret, "/introspect", "token="+secret),
			"a secret as bearer":   v.api(secret, "GET", "/agents", ""),
			"a secret as value":    v.api(v.bearer, "POST", "/agents", agentWith(map[string]any{"version": secret})),
			"a secret in a type":   v.do("POST", "/api/v1/token", "x", "Content-Type", secret),
			"a secret in a path":   v.api(v.bearer, "GET", "/agents/"+secret, ""),
			"a secret in a filter": v.api(v.bearer, "GET", "/audit?agentId="+secret, ""),
			"a secret as a scheme": v.do("GET", "/api/v1/agents", "", "Authorization", secret),
		} {
			if text := fmt.Sprint(a.raw, a.header); strings.Contains(text, secret[8:]) {
				t.Errorf("%s comes back: %s", name, text)
			}
		}
		if strings.Contains(testLog.String(), secret) || v.count(`select count(*) from audit_events where metadata::text like $1`, "%"+secret+"%") != 0 {
			t.Error("it is in a log")
		}
	}},
	{"tokens that a cache keeps", "RFC 6749, section 5.1", func(t *testing.T, v *service) {
		id, secret := v.quickClient("tokens:read")
		credentialID, _ := v.quickCredential(id)
		for name, a := range map[string]answer{
			"a token":           v.grant(id, secret, ""),
			"no token":          v.form(id, secret, "", "grant_type=password"),
			"a wrong secret":    v.form(id, newSecret(), "", "grant_type=client_credentials"),
			"an introspection":  v.form(id, secret, "/introspect", "token=x"),
			"a revocation":      v.form(id, secret, "/revoke", "token=x"),
			"no new secret":     v.api(v.bearer, "POST", "/agents/"+id+"/credentials/"+credentialID+"/rotate", `{"x":1}`),
			"a list of secrets": v.api(v.bearer, "GET", "/agents/"+id+"/credentials", ""),
			"the audit log":     v.api(v.bearer, "GET", "/audit?limit=1", ""),
			"a 404":             v.do("GET", "/api/v1/token/x", ""),
			"a 405":             v.do("GET", "/api/v1/token", ""),
			"health":            v.do("GET", "/health", ""),
		} {
			if got := a.header.Values("Cache-Control"); !slices.Equal(got, []string{"no-store"}) {
				t.Errorf("%s has Cache-Control %q, want no-store", name, got)
			}
		}
	}},
}

// conversation sends something that may be several requests, and returns all
// that comes back until the service hangs up or says no more.
func (v *service) conversation(text string) string {
	v.t.Helper()
	conn := v.dial()
	defer conn.Close()
	go io.WriteString(conn, text)
	reader := bufio.NewReader(conn)
	all := &strings.Builder{}
	for {
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			return all.String()
		}
		response.Write(all)
		response.Body.Close()
		if response.Close {
			return all.String()
		}
		conn.SetDeadline(time.Now().Add(time.Second)) // for one that should not come
	}
}
