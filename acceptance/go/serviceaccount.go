package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"time"

	jose "github.com/go-jose/go-jose/v4"
)

var podOfPage = regexp.MustCompile("(?s)```yaml\n(apiVersion: v1\nkind: Pod\n.*?)```")

// A requested is what the kubelet asks of the API server for a pod: a TokenRequest.
type requested struct {
	Namespace, ServiceAccount, Pod string
	Request                        struct {
		Spec struct {
			Audiences         []string
			ExpirationSeconds int64
		}
	}
}

// tryServiceAccount has the pod of docs/devops/workloads.md decoded by the types of
// Kubernetes, and a token of the claims that the API server gives it.
func tryServiceAccount(ctx context.Context, w *world, c client) {
	page, err := os.ReadFile(w.root + "/docs/devops/workloads.md")
	if err != nil {
		c.checked("has a page", err)
		return
	}
	pod := podOfPage.FindSubmatch(page)
	if pod == nil {
		c.checked("has a pod on its page", errors.New("there is none"))
		return
	}
	decode := exec.CommandContext(ctx, w.root+"/acceptance/.build/kubernetes", "-token-request")
	decode.Stdin = bytes.NewReader(pod[1])
	said, err := decode.Output()
	var q requested
	if err == nil {
		err = json.Unmarshal(said, &q)
	}
	if err == nil && (len(q.Request.Spec.Audiences) != 1 || q.Request.Spec.ExpirationSeconds < 600) {
		err = fmt.Errorf("it asks for %+v, want one audience and 10 minutes or more", q.Request.Spec)
	}
	if !c.checked("decodes the pod of the page", err) {
		return
	}
	const issuer = "https://kubernetes.default.svc.cluster.local"
	m, err := newMint(jose.ES256, "cluster-1")
	other, otherErr := newMint(jose.ES256, "cluster-1")
	if err = errors.Join(err, otherErr); err != nil {
		c.checked("has keys", err)
		return
	}
	m.public.Algorithm, m.public.Use = "ES256", "sig" // as the API server lists them
	base, err := w.trusting(ctx, "kubernetes", map[string]any{issuer: map[string]any{"jwks": jose.JSONWebKeySet{Keys: []jose.JSONWebKey{m.public}}}})
	if err != nil {
		c.checked("is trusted", err)
		return
	}
	subject := "system:serviceaccount:" + q.Namespace + ":" + q.ServiceAccount
	id, err := w.workload(ctx, base, map[string]any{"issuer": issuer, "subject": subject})
	if !c.checked("has an agent", err) {
		return
	}
	claims := func() map[string]any { // of k8s.io/kubernetes/pkg/serviceaccount
		now := time.Now().Unix()
		return map[string]any{
			"iss": issuer, "sub": subject, "aud": []string{w.base}, "iat": now, "nbf": now, "exp": now + q.Request.Spec.ExpirationSeconds,
			"jti": "6f0d7d9c-4a53-4c2e-8f7a-2e0a3a2f9b11",
			"kubernetes.io": map[string]any{
				"namespace": q.Namespace, "serviceaccount": map[string]any{"name": q.ServiceAccount, "uid": "0c3a2c3e-6a11-4e43-9b3c-0a4f2b1f3d55"},
				"pod":  map[string]any{"name": q.Pod, "uid": "b2f6a5c4-91a9-4b8e-8a58-8f3a8f3b7a21"},
				"node": map[string]any{"name": "node-1", "uid": "d1e0c4a2-53b7-4a60-8ff1-9f1b1b1c2d33"},
			},
		}
	}
	bad, err := m.bads(claims(), map[string]map[string]any{
		"another service account: no active credential":               {"sub": "system:serviceaccount:" + q.Namespace + ":default"},
		"the same name in another namespace: no active credential":    {"sub": "system:serviceaccount:elsewhere:" + q.ServiceAccount},
		"the token that every pod has, for the API server: must have": {"aud": []string{issuer}},
		"a token for the API server and this service: must have":      {"aud": []string{issuer, w.base}},
		"a token of an earlier hour: exp":                             {"iat": time.Now().Unix() - 7200, "nbf": time.Now().Unix() - 7200, "exp": time.Now().Unix() - 3600},
		"a token that is good for a year: exp":                        {"exp": time.Now().Unix() + 365*86400},
		"another cluster that calls itself so with a slash":           {"iss": issuer + "/"},
	})
	if err == nil {
		bad["what another cluster of that name signed: is not signed by a key of its issuer"], err = other.sign(claims())
	}
	if err != nil {
		c.checked("has tokens to refuse", err)
		return
	}
	token := func() (string, error) { return m.sign(claims()) }
	vouched{base, issuer, id, token, false, []string{jwtAssertion}}.passes(ctx, w, c, bad)
}
