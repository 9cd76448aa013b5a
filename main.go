// AgentIdP is an identity provider for AI agents: it registers them, gives them
// credentials, trades those for short-lived tokens (OAuth 2.0 client
// credentials), introspects and revokes the tokens, and keeps a log of it all
// that can't be altered unseen.
//
// To review it, read in this order:
//
//	main.go        the program: commands, routes, start and stop
//	config.go      what it reads from its environment
//	errors.go      every error that it sends
//	http.go        the way of a request
//	input.go       JSON objects and query strings, read strictly
//	jwt.go         what a token is, signed and verified
//	jwk.go         keys of clients, and what they sign
//	caller.go      who sent a request, as it has proved; whether that is alive, and what it may
//	auth.go        how that is proved: by a token, or a client's secret; and how often one may
//	assertion.go   how a client proves itself without a secret: by what it signs with a key of its own
//	workload.go    and without a key: by what an issuer that is trusted says of it
//	dpop.go        that a token is its holder's, by a proof with each request
//	token.go       issuing, introspecting and revoking tokens
//	exchange.go    a token of who hands work on, traded for one of the worker
//	feed.go        what was cut off, for who verifies tokens by itself
//	credential.go  credentials, and the secrets in them
//	agent.go       agents, and who may change them
//	chain.go       events, and the chain that shows what was done to them
//	audit.go       what is recorded, and how that is read
//	evidence.go    the log checked whole, and handed out
//	ratelimit.go   limits, and the script that Redis runs for each request
//	store.go       PostgreSQL: sessions, schema, queries, lists, ids, the clock
//	keeper.go      what watches over both stores
//	metrics.go     what is counted for Prometheus
//	discovery.go   what anybody may ask
//	schema.sql     the tables
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

const release = "0.2.0"

const (
	maxHeader = 12 << 10         // bytes, to which net/http adds 4096
	idleTime  = 15 * time.Minute // for a connection; longer than balancers keep theirs, or they send into one that is closed
	keysEvery = 2 * time.Second  // how often the files of the keys are looked at; twice the same is taken
)

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // what lives is little
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(400 << 20)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal stops at once
	stdout := &output{to: os.Stdout}
	err := run(ctx, os.Args[1:], os.LookupEnv, stdout, os.Stderr)
	if err = cmp.Or(err, stdout.err); err != nil {
		fmt.Fprintln(os.Stderr, "agentidp:", err)
		os.Exit(1)
	}
}

const usage = `AgentIdP is an identity provider for AI agents.

  agentidp                            serve
  agentidp migrate                    apply the schema as its owner, and make partitions; needs DATABASE_URL alone
  agentidp bootstrap EMAIL            register the first agent, print its client_id and client_secret
  agentidp recover EMAIL              the same though there are others, whose secrets are lost or that are locked out
  agentidp verify-audit [CHECKPOINT]  check the audit log, also against a checkpoint kept elsewhere
  agentidp verify-audit -file EXPORT -jwks FILE [CHECKPOINT]
                                      check what audit-export printed, by what /.well-known/jwks.json answers, and nothing else
  agentidp audit-export [FROM_SEQ]    print the audit log as JSON lines while it is checked, and a checkpoint behind it
  agentidp audit-export -follow [FROM_SEQ]
                                      the same without a checkpoint, and then what comes, until SIGTERM
  agentidp audit-export [-agent ID] [-from DATE] [-to DATE]
                                      check all of the log, and print the part that names this agent, or is of this time
  agentidp keygen [RS256 | ES256]     print a new signing key, RSA of 2048 bits or P-256
  agentidp keygen client              print a new key of a client, P-256, and behind it the JWK to register
  agentidp healthcheck                ask the server on this machine for its health
  agentidp -version | -h

Variables of the environment, with their defaults; those marked * are required. The first five
can also be given as NAME_FILE, a file that holds the value. The server takes the keys again when
their files have changed; where they are not right it says so, and the old ones stay.

`

// An output remembers that something could not be printed: an error of any
// command.
type output struct {
	to  io.Writer
	err error
}

func (o *output) Write(b []byte) (n int, err error) {
	n, err = o.to.Write(b)
	o.err = errors.Join(o.err, err)
	return n, err
}

// run is the program, with the operating system passed in.
func run(ctx context.Context, args []string, getenv func(string) (string, bool), stdout, stderr io.Writer) error {
	var do func(*server) error
	command := strings.Join(args, " ")
	switch {
	case len(args) > 0 && slices.Contains([]string{"-h", "-help", "--help"}, args[len(args)-1]): // of a command too
		fmt.Fprint(stdout, usage)
		for _, v := range new(config).variables() {
			fmt.Fprintf(stdout, "  %-23s %-14s %s\n", v.name, v.preset, v.about)
		}
		return nil
	case command == "-version" || command == "--version":
		fmt.Fprintln(stdout, version())
		return nil
	case command == "keygen", command == "keygen RS256", command == "keygen ES256", command == "keygen client":
		return printKey(strings.TrimPrefix(command, "keygen "), stdout)
	case command == "healthcheck":
		cfg, _ := loadConfig(getenv) // needs no more of it than the address
		return checkHealth(cfg.listen())
	case command == "":
		hangup := make(chan os.Signal, 1) // from here on: one that comes while it starts must not end it
		signal.Notify(hangup, syscall.SIGHUP)
		defer signal.Stop(hangup)
		do = func(s *server) error { return s.serve(ctx, hangup, getenv) }
	case command == "migrate":
		do = func(*server) error { // open has done it
			fmt.Fprintf(stdout, "the schema is of version %d, with partitions for a year\n", schemaVersion)
			return nil
		}
	case len(args) == 2 && (args[0] == "bootstrap" || args[0] == "recover"):
		do = func(s *server) error { return s.bootstrap(ctx, args[1], args[0] == "recover", stdout) }
	case args[0] == "verify-audit" || args[0] == "audit-export":
		q, err := readInquiry(args)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w; -h lists all", args[0], err)
		case q.file != "":
			return q.verifyFile(stdout)
		}
		do = func(s *server) error { return s.inquire(ctx, q, stdout, progress(stderr)) }
	default:
		if _, operands, ok := strings.Cut(usage, "\n  agentidp "+args[0]+" "); ok && args[0] != "" {
			return fmt.Errorf("%q is not with these operands, but: %s %s; -h lists all", args, args[0], strings.SplitN(operands, "\n", 2)[0])
		}
		return fmt.Errorf("%q is no command; -h lists them", args)
	}
	needed := map[string][]string{"migrate": {"DATABASE_URL", "LOG_LEVEL"}}[command] // the owner need not have the signing key
	cfg, err := loadConfig(getenv, needed...)
	if err != nil {
		return fmt.Errorf("the environment is not as it must be:\n%w\nto have all of it set up for development: make run", err)
	}
	slog.SetDefault(slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: cfg.logLevel})))
	s, err := open(ctx, cfg, command == "migrate")
	if err != nil {
		return err
	}
	defer s.close()
	return do(s)
}

// printKey prints a new key of RS256 or ES256 that signs; or of a client, with its
// public half behind it as it is registered.
func printKey(kind string, stdout io.Writer) error {
	private, err := newKeyPEM(strings.Replace(kind, "client", "ES256", 1))
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s", private)
	if kind == "client" {
		var k *keyset
		if k, err = newKeyset(string(private)); err == nil {
			err = json.NewEncoder(stdout).Encode(k.jwks()[0])
		}
	}
	return err
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				return release + "+" + setting.Value[:12]
			}
		}
	}
	return release
}

// checkHealth is for container images, which have no shell and no curl.
func checkHealth(address string) error {
	answer, err := (&http.Client{Timeout: storeTimeout, Transport: &http.Transport{}}).Get("http://" + address + "/health")
	if err != nil {
		return err
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("health is %s", answer.Status)
	}
	return nil
}

// A server holds nothing that another copy would need.
type server struct {
	cfg      config
	keys     atomic.Pointer[keyset]
	issuers  atomic.Pointer[map[string]*trustedIssuer] // of workloads
	db       *pgxpool.Pool                             // for requests: each holds one connection at most, and waits for nothing with it
	inner    *pgxpool.Pool                             // for the recorder, the keeper and lookups, which requests must not hold up
	redis    *cache
	vault    *vault
	limited  memo[refusal] // of addresses, the last one
	inUse    sync.Map      // assertions by which something is asked just now
	rooms    *lanes        // for assertions of those, which wait there in lanes
	lanes    *lanes
	listing  *lanes // for lists, by client: one may take long, and the connections are everyone's
	recorder *queue[entry, found]
	lookups  *queue[secretKey, client]
	signers  *queue[shown, []client]
	lives    *queue[origin, life]
	feed     *queue[place, revocations]
	waiting  *lanes       // for readers of that, by client
	behind   slots        // for those of them that have more to read
	readers  atomic.Int64 // that wait
	meter    *meter
	postgres pulse // beats with each commit of the recorder, and of the keeper where there is none
	clock    atomic.Pointer[reading]
	swept    time.Time // when expired revocations were deleted
	bodies   bodies

	draining, verifying atomic.Bool
	keysUnread          atomic.Bool // since their files changed last: they are not right
	inFlight            atomic.Int64
}

// routes is the whole attack surface: what can be called, by whom.
func (s *server) routes() []route {
	return []route{
		{"POST /api/v1/agents", 201, s.bearer(agentsWrite), s.createAgent, rest, agentCreated},
		{"GET /api/v1/agents", 200, s.bearer(agentsRead), s.inTurn(s.listAgents), rest, ""},
		{"GET /api/v1/agents/{agentId}", 200, s.bearer(agentsRead, ""), s.getAgent, rest, ""},
		{"PATCH /api/v1/agents/{agentId}", 200, s.bearer(agentsWrite), s.updateAgent, rest, agentUpdated},
		{"DELETE /api/v1/agents/{agentId}", 204, s.bearer(agentsWrite), s.decommissionAgent, rest, agentDecommissioned},

		{"POST /api/v1/agents/{agentId}/credentials", 201, s.bearer(agentsWrite, credentialsWrite), s.createCredential, rest, credentialGenerated},
		{"GET /api/v1/agents/{agentId}/credentials", 200, s.bearer(agentsWrite, credentialsWrite), s.inTurn(s.listCredentials), rest, ""},
		{"POST /api/v1/agents/{agentId}/credentials/{credentialId}/rotate", 200, s.bearer(agentsWrite, credentialsWrite), s.rotateCredential, rest, credentialRotated},
		{"DELETE /api/v1/agents/{agentId}/credentials/{credentialId}", 204, s.bearer(agentsWrite, credentialsWrite), s.revokeCredential, rest, credentialRevoked},
		{"DELETE /api/v1/credentials", 204, s.bearer(agentsWrite), s.revokeWorkloads, rest, credentialRevoked},

		{"POST /api/v1/token", 200, s.authenticateClient, s.issueToken, oauth, tokenIssued},
		{"POST /api/v1/token/introspect", 200, s.bearerOrClient(tokensRead), s.introspectToken, oauth, tokenIntrospected},
		{"POST /api/v1/token/revoke", 200, s.bearerOrClient(""), s.revokeToken, oauth, tokenRevoked},
		{"GET /api/v1/revocations", 200, s.bearer(tokensRead), s.listRevocations, rest, ""},
		{"GET /api/v1/authorize", 200, public, refuse(errNoRedirect), oauth, ""},

		{"GET /api/v1/audit", 200, s.bearer(auditRead), s.readEvents, rest, ""},
		{"GET /api/v1/audit/verify", 200, s.bearer(auditRead), s.verifyEvents, rest, ""},
		{"GET /api/v1/audit/{eventId}", 200, s.bearer(auditRead), s.getEvent, rest, ""},

		{"GET /.well-known/jwks.json", 200, public, s.showKeys, rest, ""},
		{"GET /.well-known/oauth-authorization-server", 200, public, s.showMetadata, rest, ""},
		{"GET /.well-known/openid-configuration", 200, public, s.showMetadata, rest, ""}, // where many clients look for it
		{"GET /.well-known/oauth-protected-resource", 200, public, s.showResource, rest, ""},
		{"GET /openapi.yaml", 200, public, showOpenAPI, rest, ""},
		{"GET /health", 200, public, s.showHealth, rest, ""},
		{"GET /livez", 200, public, showLife, rest, ""},
		{"GET /readyz", 200, public, s.showHealth, rest, ""},
	}
}

// open connects to both stores and sees to the schema. It waits for PostgreSQL
// for a minute; without Redis the service can do. Owner demands that the schema
// is applied.
func open(ctx context.Context, cfg config, owner bool) (*server, error) {
	meter := newMeter()
	db, inner, err := openPools(ctx, cfg.database, meter)
	if err != nil {
		return nil, err
	}
	s := &server{cfg: cfg, db: db, inner: inner, redis: newCache(cfg.redis, cfg.sentinel, meter), meter: meter, vault: newVault(), rooms: newLanes(maxInRoom), lanes: newLanes(1), listing: newLanes(1), waiting: newLanes(feedRoomOf), behind: make(slots, 1)}
	s.recorder = newQueue(s.storeEvents)
	s.lookups = newQueue(func(ctx context.Context, shown []secretKey) ([]client, error) {
		return loadSecretOwners(ctx, inner, shown)
	})
	s.signers = newQueue(func(ctx context.Context, list []shown) ([][]client, error) { return loadSigners(ctx, inner, list) })
	s.lives = newQueue(func(ctx context.Context, of []origin) ([]life, error) { return areAlive(ctx, inner, of) })
	s.feed = newQueue(func(ctx context.Context, after []place) ([]revocations, error) {
		return loadRevocations(ctx, inner, after)
	})
	s.keys.Store(cfg.keys)
	s.issuers.Store(&map[string]*trustedIssuer{}) // until somebody is served
	begun := time.Now()
	s.clock.Store(&reading{begun.Round(0), begun})
	for err = s.applySchema(ctx, owner); err != nil && ctx.Err() == nil && time.Since(begun) < time.Minute; err = s.applySchema(ctx, owner) {
		refusal, ok := errors.AsType[*pgconn.PgError](err)
		if errors.Is(err, errNotMigrated) || errors.Is(err, errPooled) || errors.Is(err, errEncoding) || ok && refusal.Code[0] != '5' && refusal.Code[:2] != "40" {
			break // classes 40, 53, 55 and 57 pass by themselves: deadlock, too busy, locked, starting
		}
		slog.Warn("waiting for PostgreSQL", "error", err)
		time.Sleep(time.Second)
	}
	if err != nil {
		err = fmt.Errorf("applying the schema: %w", err)
	} else {
		err = s.readClock(ctx)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// close stores what is recorded and lets go of both stores.
func (s *server) close() {
	s.recorder.close()
	s.lookups.close()
	s.signers.close()
	s.lives.close()
	s.feed.close()
	s.redis.close()
	s.inner.Close()
	s.db.Close()
}

// watchKeys takes the keys when their files have changed and are the same for two
// looks, since they may be half written; and at once on a hangup. Where they are
// not right, the old ones stay.
func (s *server) watchKeys(ctx context.Context, hangup <-chan os.Signal, getenv func(string) (string, bool)) {
	seenOf := func(cfg config) string { return strings.Join(cfg.keys.each("kid"), " ") + cfg.workloads.text }
	taken := seenOf(s.cfg)
	for seen := taken; ; {
		before := seen
		select {
		case <-ctx.Done():
			return
		case <-time.After(keysEvery):
		case <-hangup:
			before, taken = "", ""
		}
		cfg, err := loadConfig(getenv, "JWT_PRIVATE_KEY", "JWT_PUBLIC_KEY", "WORKLOAD_ISSUERS", "ISSUER", "PORT")
		if err != nil {
			seen = err.Error()
		} else {
			seen = seenOf(cfg)
		}
		if seen == taken || seen != before && before != "" {
			continue
		}
		s.keysUnread.Store(err != nil)
		if taken = seen; err != nil {
			slog.Error("keys not read, the old ones stay", "error", err)
			continue
		}
		s.keys.Store(cfg.keys)
		s.trust(cfg.workloads)
		slog.Info("keys read", "kids", cfg.keys.each("kid"), "workloadIssuers", len(cfg.workloads.issuers))
	}
}

// serve serves until ctx ends, and then finishes what has begun.
func (s *server) serve(ctx context.Context, hangup <-chan os.Signal, getenv func(string) (string, bool)) error {
	if s.cfg.metrics != nil {
		listener, err := net.ListenTCP("tcp", s.cfg.metrics)
		if err != nil {
			return fmt.Errorf("%w; METRICS_ADDR chooses another address for /metrics", err)
		}
		web, mux := s.web(), http.NewServeMux() // for its time-outs
		mux.HandleFunc("GET /metrics", s.showMetrics)
		web.Handler = mux
		defer web.Close()
		go web.Serve(listener)
		slog.Info("serving metrics", "address", listener.Addr().String())
	}
	listener, err := net.Listen("tcp", s.cfg.listen())
	if err != nil {
		return fmt.Errorf("%w; PORT and HOST choose another address", err)
	}
	safe := false
	if err := s.inner.QueryRow(ctx, `select bool_and(setting = 'on') from pg_settings where name in ('fsync', 'full_page_writes')`).Scan(&safe); err != nil || !safe {
		slog.Warn("PostgreSQL may lose what it acknowledges when its machine fails: fsync or full_page_writes is off", "error", err)
	}
	s.postgres.beat(nil) // until the keeper knows better
	s.redis.beat(nil)
	s.trust(s.cfg.workloads)
	stopKeeper := s.startKeeper()
	defer stopKeeper()
	web := s.web()
	failed := make(chan error, 1)
	go func() { failed <- web.Serve(listener) }()
	slog.Info("serving", "url", s.cfg.issuer, "address", listener.Addr().String(), "version", version())
	watching, stopWatching := context.WithCancel(context.Background())
	defer stopWatching()
	go s.watchKeys(watching, hangup, getenv)
	select {
	case err := <-failed:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	}
	slog.Info("stopping")
	s.draining.Store(true)
	time.Sleep(s.cfg.drainTime) // who asks for our health sends no more
	finish, cancel := context.WithTimeout(context.Background(), 4*requestTimeout)
	defer cancel()
	err = web.Shutdown(finish)
	slog.Info("stopped")
	return err
}

func (s *server) web() *http.Server {
	return &http.Server{
		Handler:           s.front(s.routes()),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      20 * time.Second,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,

		DisableGeneralOptionsHandler: true, // it would answer OPTIONS * without JSON

		ErrorLog: slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
}
