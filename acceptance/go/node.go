package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// node tries a client with a script of ../node. It is given what it needs as
// JSON, prints "ok" or "FAIL" with the check and the reason behind tabs for
// each check, and "end" at the end, so that one that stops early is not taken
// for one that passed.
func node(script string) func(context.Context, *world, client) {
	return func(ctx context.Context, w *world, c client) {
		given, err := w.forNode(ctx)
		if err != nil {
			c.checked("has an agent and tokens", err)
			return
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		command := exec.CommandContext(ctx, "node", script)
		command.Dir = w.root + "/acceptance/node"
		command.Env = append(os.Environ(), "ACCEPTANCE="+given)
		var problems bytes.Buffer
		command.Stderr = &problems
		output, err := command.Output()
		ended := false
		for lines := bufio.NewScanner(bytes.NewReader(output)); lines.Scan(); {
			word, rest, _ := strings.Cut(lines.Text(), "\t")
			what, reason, _ := strings.Cut(rest, "\t")
			switch word {
			case "ok":
				c.checked(what, nil)
			case "FAIL":
				c.checked(what, errors.New(reason))
			case "end":
				ended = true
			}
		}
		if err != nil || !ended {
			c.checked("runs to its end", fmt.Errorf("%v %s", err, problems.String()))
		}
	}
}

// forNode makes what a script gets: clients, and tokens for the resource.
func (w *world) forNode(ctx context.Context) (string, error) {
	agent, err := w.agent(ctx, "resumes:read", "agents:read")
	if err != nil {
		return "", err
	}
	service, err := w.agent(ctx, "tokens:read")
	if err != nil {
		return "", err
	}
	t, err := w.tokensFor(ctx, resource)
	if err != nil {
		return "", err
	}
	var keys []keyed
	for _, alg := range []string{"RS256", "PS256", "ES256", "EdDSA"} {
		k, err := w.keyAgent(ctx, alg, "resumes:read", "tokens:read")
		if err != nil {
			return "", err
		}
		keys = append(keys, k)
	}
	p, err := w.parties(ctx)
	if err != nil {
		return "", err
	}
	key := w.keyFile
	given, err := json.Marshal(map[string]any{
		"base": w.base, "resource": resource, "agent": agent, "service": service, "tokens": t, "key": key, "keys": keys, "parties": p,
	})
	return string(given), err
}
