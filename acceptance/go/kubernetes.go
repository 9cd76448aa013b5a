package main

import (
	"context"
	"fmt"
	"os/exec"
)

// tryKubernetes has the manifests decoded by the types of Kubernetes.
func tryKubernetes(ctx context.Context, w *world, c client) {
	said, err := exec.CommandContext(ctx, w.root+"/acceptance/.build/kubernetes", w.root+"/docs/devops/kubernetes").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, said)
	}
	c.checked("has no fault", err)
}
