package main

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Wycheproof's vectors, for what jwk.go verifies. What is signed there is no assertion,
// so that only from within can it be told whether a signature was right: ../go/wycheproof.go
// lays this file over the program's own, and says in WYCHEPROOF where the vectors are.

type vectors struct {
	TestGroups []struct {
		Public                          any // of JSON Web Signatures
		KeyJWK, PublicKeyJWK, PublicKey any
		Tests                           []struct {
			TcID                           int
			Comment, JWS, Msg, Sig, Result string
		}
	}
}

func TestWycheproof(t *testing.T) {
	for _, file := range []struct {
		name, alg  string // "" where the header says it
		right      int    // signatures that must be found right, at least
		refusedFor string // why keys may be refused
	}{
		{"json_web_signature", "", 15, "its use is another | must have one of | must be of RSA, P-256 or Ed25519 | its key_ops lack that"},
		{"ecdsa_secp256r1_sha256_p1363", "ES256", 150, ""},
		{"ed25519", "EdDSA", 80, ""},
		{"rsa_signature_2048_sha256", "RS256", 5, "AQAB as its e"},
		{"rsa_signature_3072_sha256", "RS256", 5, "AQAB as its e"},
		{"rsa_signature_4096_sha256", "RS256", 5, "AQAB as its e"},
		{"rsa_signature_8192_sha256", "RS256", 5, ""},
		{"rsa_pss_2048_sha256_mgf1_32", "PS256", 50, ""},
		{"rsa_pss_3072_sha256_mgf1_32", "PS256", 50, ""},
		{"rsa_pss_4096_sha256_mgf1_32", "PS256", 50, ""},
	} {
		t.Run(file.name, func(t *testing.T) {
			b, err := os.ReadFile(filepath.Join(os.Getenv("WYCHEPROOF"), file.name+"_test.json"))
			if err != nil {
				t.Fatal(err)
			}
			var v vectors
			if err := json.Unmarshal(b, &v); err != nil {
				t.Fatal(err)
			}
			right, wrong, unused := 0, 0, 0
			for _, g := range v.TestGroups {
				value := g.Public
				for _, key := range []any{g.KeyJWK, g.PublicKeyJWK, keyFromHex(g.PublicKey)} {
					if value == nil {
						value = key
					}
				}
				key, _ := value.(map[string]any)
				if key == nil {
					unused += len(g.Tests) // a secret of HMAC
					continue
				}
				if file.alg != "" {
					key["alg"] = file.alg
				}
				k, err := readJWK(value)
				if err != nil {
					unused += len(g.Tests)
					if !refusedAsKnown(err.Error(), file.refusedFor) {
						t.Errorf("the key of test %d %v", g.Tests[0].TcID, err)
					}
					continue
				}
				for _, test := range g.Tests {
					msg, _ := hex.DecodeString(test.Msg)
					sig, _ := hex.DecodeString(test.Sig)
					a, ok := assertion{signed: string(msg), sig: sig, alg: file.alg}, true
					if file.alg == "" {
						a, ok = compact(test.JWS)
					}
					ok = ok && k.verifies(a)
					fits := a.alg == k.Alg // two vectors of PS384 are said to be valid by a key for PS256
					if ok && test.Result == "invalid" || !ok && fits && test.Result == "valid" {
						t.Errorf("test %d, %s, which is %s: found right: %v", test.TcID, test.Comment, test.Result, ok)
					}
					if ok {
						right++
					} else {
						wrong++
					}
				}
			}
			t.Logf("%d right, %d wrong, %d of other keys", right, wrong, unused)
			if right < file.right || wrong == 0 {
				t.Errorf("%d were found right and %d wrong, want %d right at least", right, wrong, file.right)
			}
		})
	}
}

func refusedAsKnown(fault, known string) bool {
	for _, why := range strings.Split(known, " | ") {
		if why != "" && strings.Contains(fault, why) {
			return true
		}
	}
	return false
}

// compact takes a signature apart as readAssertion does, but for the claims.
func compact(text string) (a assertion, ok bool) {
	header64, rest, _ := strings.Cut(text, ".")
	payload64, sig64, _ := strings.Cut(rest, ".")
	header, headerErr := decodeObject(header64)
	_, payloadErr := decodeSegment(payload64)
	sig, sigErr := decodeSegment(sig64)
	alg, _ := header["alg"].(string)
	_, crit := header["crit"]
	return assertion{signed: header64 + "." + payload64, sig: sig, alg: alg}, headerErr == nil && payloadErr == nil && sigErr == nil && !crit
}

// keyFromHex makes a JWK of numbers where there is none.
func keyFromHex(of any) any {
	numbers, _ := of.(map[string]any)
	number := func(name string) string {
		text, _ := numbers[name].(string)
		b, _ := hex.DecodeString(text)
		for len(b) > 0 && b[0] == 0 {
			b = b[1:]
		}
		return b64.EncodeToString(b)
	}
	if numbers["modulus"] != nil {
		return map[string]any{"kty": "RSA", "n": number("modulus"), "e": number("publicExponent")}
	}
	if point, _ := numbers["uncompressed"].(string); len(point) == 130 {
		x, _ := hex.DecodeString(point[2:66])
		y, _ := hex.DecodeString(point[66:])
		return map[string]any{"kty": "EC", "crv": "P-256", "x": b64.EncodeToString(x), "y": b64.EncodeToString(y)}
	}
	return nil
}
