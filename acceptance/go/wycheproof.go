package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// tryWycheproof holds the signatures that jwk.go takes to the vectors of Project
// Wycheproof. They sign no assertions, so it is asked from within: by a test that is
// laid over the source, and isn't there otherwise.
func tryWycheproof(ctx context.Context, w *world, c client) {
	here := filepath.Join(w.root, "acceptance", "wycheproof")
	download := exec.CommandContext(ctx, "go", "mod", "download", "-json", "github.com/c2sp/wycheproof")
	download.Dir = here
	out, err := download.Output()
	var module struct{ Dir string }
	if err == nil {
		err = json.Unmarshal(out, &module)
	}
	if !c.checked("is there, as its go.sum has it", err) {
		return
	}
	// in runs the test, with files in place of those of the program.
	in := func(replace map[string]string) ([]byte, error) {
		replace[filepath.Join(w.root, "wycheproof_test.go")] = filepath.Join(here, "inside_test.go")
		text, err := json.Marshal(map[string]any{"Replace": replace})
		overlay := filepath.Join(w.dir, "wycheproof.json")
		if err == nil {
			err = os.WriteFile(overlay, text, 0o600)
		}
		if err != nil {
			return nil, err
		}
		test := exec.CommandContext(ctx, "go", "test", "-count=1", "-overlay", overlay, "-run", "^TestWycheproof$", "-v", ".")
		test.Dir = w.root // no store is asked
		test.Env = append(os.Environ(), "TEST_DATABASE_URL=none", "TEST_REDIS_URL=none", "WYCHEPROOF="+filepath.Join(module.Dir, "testvectors_v1"))
		return test.CombinedOutput()
	}
	out, err = in(map[string]string{})
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	} else if n := strings.Count(string(out), "--- PASS: TestWycheproof/"); n != 10 {
		err = fmt.Errorf("%d of its files were read, want 10: %s", n, out)
	}
	c.checked("agrees on RS256, PS256, ES256 and EdDSA", err)

	source, err := os.ReadFile(filepath.Join(w.root, "jwk.go"))
	weak := strings.Replace(string(source), "return ed25519.Verify(key, []byte(a.signed), a.sig)", "return len(a.sig) == 64 && key != nil", 1)
	changed := filepath.Join(w.dir, "jwk.go.txt")
	if err == nil && weak == string(source) {
		err = errors.New("jwk.go has no such line to break")
	}
	if err == nil {
		err = os.WriteFile(changed, []byte(weak), 0o600)
	}
	if err == nil {
		out, err = in(map[string]string{filepath.Join(w.root, "jwk.go"): changed})
		if err != nil && strings.Contains(string(out), "--- FAIL: TestWycheproof/ed25519 ") {
			err = errors.New("it disagrees")
		} else if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
	}
	c.refuses("a jwk.go that takes any signature of Ed25519", err, saying("it disagrees"))
}
