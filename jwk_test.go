package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"
)

// keyOf reads a JWK of a test.
func keyOf(t testing.TB, text string) (jwk, error) {
	t.Helper()
	var value any
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		t.Fatal(err)
	}
	return readJWK(value)
}

// goodKey reads one that must be right.
func goodKey(t testing.TB, text string) jwk {
	t.Helper()
	k, err := keyOf(t, text)
	if err != nil {
		t.Fatalf("%s %v", text, err)
	}
	return k
}

// RFC 7638, section 3.1, has the first; RFC 8037, appendix A.3, the second; that of P-256
// is from RFC 9449, section 6.1.
func TestThumbprintIsThatOfTheRFCs(t *testing.T) {
	t.Parallel()
	const (
		modulus = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
		okp     = `"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"`
		ec      = `"kty":"EC","x":"l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs","y":"9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA","crv":"P-256"`
	)
	for _, row := range []struct{ jwk, want string }{
		{`{"kty":"RSA","n":"` + modulus + `","e":"AQAB","alg":"RS256","kid":"2011-04-29"}`, "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"},
		{"{" + okp + "}", "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"},
		{"{" + ec + "}", "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"},
		// What makes a key of another kind would be another thumbprint of the same key.
		{`{"kty":"RSA","n":"` + modulus + `","e":"AQAB","x":"AAAA","y":"AAAA"}`, "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"},
		{"{" + okp + `,"y":"AAAA","n":"AAAA","e":"AQAB"}`, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"},
		{"{" + ec + `,"n":"AAAA","e":"AQAB"}`, "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"},
	} {
		if got := goodKey(t, row.jwk).thumbprint(); got != row.want {
			t.Errorf("the thumbprint of %s = %s, want %s", row.jwk, got, row.want)
		}
	}
}

// Another spelling of a key would be another thumbprint, so that two agents could have it.
func TestNumbersOfAKeyHaveOneSpelling(t *testing.T) {
	t.Parallel()
	n := newRSA(t, 2048).n.Bytes()
	for name, row := range map[string]struct {
		n, e []byte
		good bool
	}{
		"as it is":        {n, []byte{1, 0, 1}, true},
		"a zero before n": {slices.Concat([]byte{0}, n), []byte{1, 0, 1}, false},
		"a zero before e": {n, []byte{0, 1, 0, 1}, false},
		"no n":            {nil, []byte{1, 0, 1}, false},
		"no e":            {n, nil, false},
		"e of 65539":      {n, []byte{1, 0, 3}, false},
		"e of 2^31-1":     {n, []byte{0x7f, 0xff, 0xff, 0xff}, false},
		"e of 2^31+1":     {n, []byte{0x80, 0, 0, 1}, false},
		"e of 2^32+1":     {n, []byte{1, 0, 0, 0, 1}, false},
		"e of 2^64+65537": {n, []byte{1, 0, 0, 0, 0, 0, 1, 0, 1}, false},
		"e of 65535":      {n, []byte{0xff, 0xff}, false},
	} {
		_, err := keyOf(t, `{"kty":"RSA","n":"`+b64.EncodeToString(row.n)+`","e":"`+b64.EncodeToString(row.e)+`"}`)
		if (err == nil) != row.good {
			t.Errorf("%s: %v, want it taken: %v", name, err, row.good)
		}
	}
}

// What may be a key does verify what its private half signs: nobody finds out only
// later that it is too large.
func TestRSAKeysOfEverySizeVerify(t *testing.T) {
	t.Parallel()
	for _, bits := range []int{2048, 2056, 8192} {
		private := newRSA(t, bits)
		k := goodKey(t, `{"kty":"RSA","n":"`+b64.EncodeToString(private.n.Bytes())+`","e":"AQAB"}`)
		if !k.verifies(assertion{signed: "x", sig: private.sign("x"), alg: "RS256"}) {
			t.Errorf("a key of %d bits verifies nothing", bits)
		}
	}
}

// An rsaKey is of many primes, which are quick to find.
type rsaKey struct{ n, d *big.Int }

func newRSA(t testing.TB, bits int) rsaKey {
	t.Helper()
	const size = 512
	one := big.NewInt(1)
	for {
		n, phi := big.NewInt(1), big.NewInt(1)
		for left := bits; left > 0; {
			length := size
			if left < 2*size {
				length = left
			}
			left -= length
			p, err := rand.Prime(rand.Reader, length) // its two highest bits are set
			if err != nil {
				t.Fatal(err)
			}
			n.Mul(n, p)
			phi.Mul(phi, p.Sub(p, one))
		}
		if d := new(big.Int).ModInverse(big.NewInt(65537), phi); d != nil && n.BitLen() >= max(2048, bits-8) {
			return rsaKey{n, d}
		}
	}
}

// sign is PKCS #1 v1.5 with SHA-256 (RFC 8017, section 9.2).
func (k rsaKey) sign(text string) []byte {
	digest := sha256.Sum256([]byte(text))
	end := slices.Concat([]byte("\x00\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"), digest[:])
	size := (k.n.BitLen() + 7) / 8
	m := new(big.Int).SetBytes(slices.Concat([]byte{0, 1}, bytes.Repeat([]byte{0xff}, size-2-len(end)), end))
	return m.Exp(m, k.d, k.n).FillBytes(make([]byte, size))
}

// readFor reads an assertion of a client, as checkAssertion does.
func readFor(text, issuer string, now time.Time) (assertion, error) {
	a, err := readAssertion(text)
	if err == nil {
		err = a.check(now, assertionLife, []string{"JWT", "client-authentication+jwt"}, []string{issuer}, "iss", "sub", "jti")
	}
	return a, err
}

// check has the time of its caller: the ends of what is good are exact.
func TestAssertionIsGoodForItsTime(t *testing.T) {
	t.Parallel()
	const now, issuer = 1_800_000_000, "https://id.example.com"
	const life = 300
	for _, row := range []struct {
		claims string
		good   bool
	}{
		{`"exp":1800000000`, false}, {`"exp":1800000000.5`, true}, {`"exp":1800000001`, true}, {`"exp":1799999999`, false},
		{fmt.Sprintf(`"exp":%d`, now+life+clockSkew), true}, {fmt.Sprintf(`"exp":%d.001`, now+life+clockSkew), false}, {fmt.Sprintf(`"exp":%d`, now+life+clockSkew+1), false},
		{fmt.Sprintf(`"exp":%d,"iat":%d`, now+60, now+clockSkew), true}, {fmt.Sprintf(`"exp":%d,"iat":%d`, now+60, now+clockSkew+1), false},
		{fmt.Sprintf(`"exp":%d,"nbf":%d`, now+60, now+clockSkew), true}, {fmt.Sprintf(`"exp":%d,"nbf":%d`, now+60, now+clockSkew+1), false},
	} {
		text := b64.EncodeToString([]byte(`{"alg":"ES256"}`)) + "." +
			b64.EncodeToString([]byte(`{"iss":"a","sub":"a","jti":"1","aud":"`+issuer+`",`+row.claims+`}`)) + "."
		a, err := readFor(text, issuer, time.Unix(now, 999_999_999))
		if (err == nil) != row.good {
			t.Errorf("%s: %v, want it good: %v", row.claims, err, row.good)
		}
		if end := a.exp.Unix(); err == nil && (end <= now || end > now+life+clockSkew+1) { // it is remembered for as long as it is good
			t.Errorf("%s: it is remembered until %d", row.claims, end)
		}
	}
}

// Whatever is read is of the form that it says.
func FuzzReadAssertion(f *testing.F) {
	claims := `{"iss":"a","sub":"a","jti":"1","aud":"https://id.example.com","exp":1800000060}`
	for _, header := range []string{`{"alg":"ES256"}`, `{"alg":"none","typ":"JWT","kid":"a"}`, `{"crit":[]}`, `null`, ``} {
		f.Add(header, claims, "x", true)
	}
	f.Fuzz(func(t *testing.T, header, payload, sig string, encoded bool) {
		text := header + "." + payload + "." + sig
		if encoded {
			text = b64.EncodeToString([]byte(header)) + "." + b64.EncodeToString([]byte(payload)) + "." + b64.EncodeToString([]byte(sig))
		}
		a, err := readFor(text, "https://id.example.com", time.Unix(1_800_000_000, 0))
		if err != nil {
			if msg := err.Error(); strings.ContainsFunc(msg, func(c rune) bool { return c < ' ' || c > '~' }) || strings.ContainsAny(msg, `"\`) {
				t.Errorf("%q is refused by %q, which no answer may have", text, msg)
			}
			return
		}
		if a.signed+"."+b64.EncodeToString(a.sig) != text {
			t.Errorf("%q is read as %q and %q", text, a.signed, a.sig)
		}
		if a.issuer == "" || a.sub == "" || a.id == "" || a.exp.Unix() <= 1_800_000_000 || a.exp.Unix() > 1_800_000_311 {
			t.Errorf("%q is read as %+v", text, a)
		}
	})
}

// Of the numbers that x may have half are the y of a point; those of all keys are.
func TestKeyIsAPointOfItsCurve(t *testing.T) {
	t.Parallel()
	on, x := 0, make([]byte, ed25519.PublicKeySize)
	for i := range 256 {
		key, _, err := ed25519.GenerateKey(nil)
		if err != nil || !isEdwards(key) {
			t.Fatalf("the key %x is no point, %v", key, err)
		}
		if x[0] = byte(i); isEdwards(x) {
			on++
		}
	}
	if on < 64 || on > 192 {
		t.Errorf("of 256 numbers %d are points", on)
	}
	for y, want := range map[byte]bool{2: false, 3: true, 7: false, 8: false, 9: true, 11: false} {
		clear(x)
		x[0] = y
		if k, err := keyOf(t, `{"kty":"OKP","crv":"Ed25519","x":"`+b64.EncodeToString(x)+`"}`); (err == nil) != want {
			t.Errorf("y = %d: %v, %v; want it taken: %v", y, k, err, want)
		}
	}
}

// Of a point of small order a signature that nobody has made verifies, whoever holds the key.
func TestKeyThatAnybodySignsForIsRefused(t *testing.T) {
	t.Parallel()
	zeros := strings.Repeat("00", 30)
	for _, point := range []string{
		"01" + zeros + "00", "01" + zeros + "80", "00" + zeros + "00", "00" + zeros + "80",
		"ec" + strings.Repeat("ff", 30) + "7f", "ec" + strings.Repeat("ff", 30) + "ff",
		"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05", "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
		"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a", "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
		// The same, not in their shortest form.
		"ed" + strings.Repeat("ff", 30) + "7f", "ed" + strings.Repeat("ff", 30) + "ff", "ee" + strings.Repeat("ff", 30) + "7f", "ee" + strings.Repeat("ff", 30) + "ff",
	} {
		x, err := hex.DecodeString(point)
		if err != nil || len(x) != 32 {
			t.Fatal(point, err)
		}
		if k, err := keyOf(t, `{"kty":"OKP","crv":"Ed25519","x":"`+b64.EncodeToString(x)+`"}`); err == nil {
			t.Errorf("%s is taken as %v", point, k)
		}
	}
}
