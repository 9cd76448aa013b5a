// Acceptance drives the service with clients and resource servers that others
// wrote: each has to work against it unchanged, and to refuse what it must.
//
// It is started by ../run.sh, with the program under test as its operand and a
// PostgreSQL and a Redis in DATABASE_URL and REDIS_URL. It prints a line for
// each client and check. Operands after the first choose clients by a part of
// their name.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A report counts checks and prints them as they come.
type report struct {
	sync.Mutex
	passed, failed int
	failures       []string
}

// A client is a library, a program or a document that is tried.
type client struct {
	*report
	name string
}

// checked is one check of a client: what it is to do, and why it didn't.
func (c client) checked(what string, err error) bool {
	c.Lock()
	defer c.Unlock()
	if err == nil {
		c.passed++
		fmt.Printf("ok    %-27s %s\n", c.name, what)
		return true
	}
	c.failed++
	line := fmt.Sprintf("FAIL  %-27s %s: %s", c.name, what, strings.Join(strings.Fields(err.Error()), " "))
	c.failures = append(c.failures, line)
	fmt.Println(line)
	return false
}

// refuses wants the error by which a client refuses; good tells whether that is
// for the right reason.
func (c client) refuses(what string, err error, good func(error) bool) {
	switch {
	case err == nil:
		err = errors.New("it was accepted")
	case good(err):
		err = nil
	default:
		err = fmt.Errorf("refused for another reason: %w", err)
	}
	c.checked("refuses "+what, err)
}

// saying is a reason that is only in the text of an error.
func saying(words ...string) func(error) bool {
	return func(err error) bool {
		for _, word := range words {
			if strings.Contains(err.Error(), word) {
				return true
			}
		}
		return false
	}
}

// being is a reason that an error is, or wraps.
func being(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

// clients are all that are tried. Those after the first two have no effect on
// each other and run side by side.
var clients = []struct {
	name string
	try  func(context.Context, *world, client)
}{
	{"key rotation under load", rotateUnderLoad}, // waits most of the time
	{"revocations page", revocations},            // so does this
	{"x/oauth2", tryOAuth2},
	{"go-oidc", tryGoOIDC},
	{"keyfunc", tryKeyfunc},
	{"jwx", tryJWX},
	{"mcp go-sdk", tryMCP},
	{"zitadel oidc", tryZitadel},
	{"mcp go-sdk exchange", tryMCPExchange},
	{"zitadel oidc exchange", tryZitadelExchange},
	{"openid-client", node("openid-client.mjs")},
	{"oauth4webapi", node("oauth4webapi.mjs")},
	{"jose", node("jose.mjs")},
	{"express-oauth2-jwt-bearer", node("express.mjs")},
	{"mcp typescript-sdk", node("mcp.mjs")},
	{"nginx", tryNginx},
	{"apache mod_oauth2", tryApache},
	{"two copies behind haproxy", tryBehindHAProxy},
	{"two copies behind nginx", tryBehindNginx},
	{"kubernetes manifests", tryKubernetes},
	{"wycheproof", tryWycheproof},
	{"workload of kubernetes", tryServiceAccount},
	{"workload of github", tryGitHub},
	{"workload of go-spiffe", trySPIFFE},
	{"workload of agentidp", tryAnother},
	{"vault's hashicorp/cap", tryCap},
	{"README walk", walkReadme},
	{"README go", readmeGo},
	{"README node", readmeNode},
	{"README python", readmePython},
	{"keys page go", keysGo},
	{"keys page node", keysNode},
	{"keys page python", keysPython},
	{"delegation page", delegation},
	{"proofs page go", proofsGo},
	{"proofs page node", proofsNode},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal stops at once
	if err := run(ctx, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "acceptance:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, program string, only []string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	w, err := newWorld(ctx, program)
	defer w.close()
	if err != nil {
		return err
	}
	all := &report{}
	var running sync.WaitGroup
	slots := make(chan struct{}, 3) // more would only wait for each other
	for i, c := range clients {
		if len(only) > 0 && !saying(only...)(errors.New(c.name)) {
			continue
		}
		running.Go(func() {
			if i > 1 {
				slots <- struct{}{}
				defer func() { <-slots }()
			}
			trying := client{all, c.name}
			defer func() {
				if p := recover(); p != nil {
					trying.checked("goes on", fmt.Errorf("panic: %v %s", p, debug.Stack()))
				}
			}()
			c.try(ctx, w, trying)
		})
	}
	running.Wait()
	if len(all.failures) > 0 {
		fmt.Printf("\nWhat failed:\n%s\n", strings.Join(all.failures, "\n"))
	}
	fmt.Printf("\n%d passed, %d failed\n", all.passed, all.failed)
	if ctx.Err() != nil {
		return fmt.Errorf("stopped: %w", context.Cause(ctx))
	}
	if all.failed > 0 || all.passed == 0 {
		return errors.New("not accepted")
	}
	return nil
}
