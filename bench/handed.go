package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/url"
	"time"
)

// benchHanded issues, trades, introspects and takes tokens of one that acts for another,
// and such as are bound to a key, beside plain ones.
func benchHanded(ctx context.Context) error {
	return withCopies(ctx, []int{1, 2}, benchHandedOf)
}

func benchHandedOf(ctx context.Context, s *stores, servers []*server, alg string, l limit) error {
	n, first := len(servers), servers[0]
	load := func(name string, requests ...[]byte) (result, error) {
		return s.under(ctx, fmt.Sprintf("Copies %d %s %s", n, alg, name), servers, l, 32, requests...)
	}
	plain, err := load("token", first.tokenRequest())
	if err != nil || plain.Server == 0 { // left out, by -loads
		return err
	}
	const work = "&resource=http%3A%2F%2Fwork.example"
	var id, secret string
	out, err := s.run(first.key, "recover", "worker@example.com")
	if err == nil {
		_, err = fmt.Sscanf(out, "client_id: %s\nclient_secret: %s\n", &id, &secret)
	}
	if err == nil {
		_, err = s.db.Exec(ctx, `update agents set capabilities = '{bench:run,tokens:read,agents:read}', delegates = array[$1]`, id)
	}
	if err != nil {
		return err
	}
	given, err := first.ask("POST", "/api/v1/token", basic(first.id, first.secret), grant+work, "access_token")
	if err != nil {
		return err
	}
	exchange := "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Atoken-exchange&subject_token_type=" +
		url.QueryEscape("urn:ietf:params:oauth:token-type:access_token") + "&subject_token=" + given
	traded, err := first.ask("POST", "/api/v1/token", basic(id, secret), exchange, "access_token")
	if err != nil {
		return err
	}
	introspect := func(token string) []byte {
		return request("POST", "/api/v1/token/introspect", basic(first.id, first.secret), "token="+token)
	}
	cost := func(r result) float64 { return r.Server.Seconds() / float64(r.Answers) }
	beside := func(name string, base result, requests ...[]byte) (result, error) {
		r, err := load(name, requests...)
		if err == nil && r.Server != 0 {
			report(fmt.Sprintf("Copies %d %s server CPU of %s over plain", n, alg, name), 1, value{cost(r) / cost(base), "x"})
		}
		return r, err
	}
	if _, err = beside("exchange", plain, request("POST", "/api/v1/token", basic(id, secret), exchange)); err != nil {
		return err
	}
	seen, err := load("introspection", introspect(given))
	if err == nil {
		_, err = beside("introspection of a traded one", seen, introspect(traded))
	}
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	path := "/api/v1/agents/" + first.id
	got, err := load("agent", request("GET", path, "Bearer "+first.token, ""))
	if err != nil {
		return err
	}
	token := first.tokenRequest()
	proven, err := many(plain, func() ([]byte, error) { return withProof(token, key, "POST", "/api/v1/token", "") })
	if err == nil {
		_, err = beside("token with a proof", plain, proven...)
	}
	if err != nil {
		return err
	}
	proof, err := newProof(key, "POST", "/api/v1/token", "")
	if err != nil {
		return err
	}
	bound, err := first.ask("POST", "/api/v1/token", basic(first.id, first.secret), grant, "access_token", "DPoP", proof)
	if err != nil {
		return err
	}
	get := request("GET", path, "DPoP "+bound, "")
	if proven, err = many(got, func() ([]byte, error) { return withProof(get, key, "GET", path, bound) }); err == nil {
		_, err = beside("agent with a proof", got, proven...)
	}
	return err
}

// many makes as many requests as the plain load answered, which is faster.
func many(plain result, next func() ([]byte, error)) (list [][]byte, err error) {
	list = make([][]byte, 64+int(plain.rate()**seconds*7/6))
	for i := range list {
		if list[i], err = next(); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// withProof puts a proof of its own into a request that shows this token or "".
func withProof(request []byte, key *ecdsa.PrivateKey, method, path, token string) ([]byte, error) {
	proof, err := newProof(key, method, path, token)
	return bytes.Replace(request, []byte("\r\n"), []byte("\r\nDPoP: "+proof+"\r\n"), 1), err
}

// newProof is one of RFC 9449, section 4.2.
func newProof(key *ecdsa.PrivateKey, method, path, token string) (string, error) {
	b64 := base64.RawURLEncoding.EncodeToString
	point, err := key.PublicKey.Bytes()
	if err != nil {
		return "", err
	}
	ath := sha256.Sum256([]byte(token))
	signed := b64(fmt.Appendf(nil, `{"alg":"ES256","typ":"dpop+jwt","jwk":{"kty":"EC","crv":"P-256","x":%q,"y":%q}}`, b64(point[1:33]), b64(point[33:]))) +
		"." + b64(fmt.Appendf(nil, `{"htm":%q,"htu":"http://bench.example%s","iat":%d,"jti":%q,"ath":%q}`, method, path, time.Now().Unix(), rand.Text(), b64(ath[:])))
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return "", err
	}
	return signed + "." + b64(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)), nil
}
