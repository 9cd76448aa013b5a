// AgentIdP is an identity provider for AI agents: it registers them, gives them
// credentials, trades those for short-lived tokens (OAuth 2.0 client
// credentials), introspects and revokes the tokens, and keeps a log of it all
// that can't be altered unseen.
//
// To review it, read in this order:
//
//	main.go        configuration, start, routes, the way of a request, errors
//	jwt.go         what a token is, signed and verified
//	token.go       issuing, introspecting and revoking tokens; revocation
//	credential.go  secrets, credentials, client authentication
//	agent.go       agents, and who may change them
//	audit.go       the chain of events
//	ratelimit.go   limits, and the script that Redis runs for each request
//	store.go       PostgreSQL and Redis: connections, transactions, what watches over them
//	metrics.go     what is counted for Prometheus
//	schema.sql     the tables
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const release = "0.2.0"

const (
	drainTime = time.Second // between "not ready" and closing the port
	maxHeader = 12 << 10    // bytes, to which net/http adds 4096
)

const storeTimeout = 3 * time.Second // for one transaction beside requests

const (
	requestTimeout = 5 * time.Second // for all that a request does
	maxBody        = 16 << 10        // bytes
	maxInFlight    = 1024            // requests that may wait for a store; more are refused at once
)

//go:embed openapi.yaml
var openAPI []byte

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // what lives is little
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(400 << 20)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal stops at once
	if err := run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "agentidp:", err)
		os.Exit(1)
	}
}

const usage = `AgentIdP is an identity provider for AI agents.

  agentidp                            serve
  agentidp migrate                    apply the schema as its owner, and make partitions; needs DATABASE_URL alone
  agentidp bootstrap EMAIL            register the first agent, print its client_id and client_secret
  agentidp verify-audit [CHECKPOINT]  check the audit log, also against a checkpoint kept elsewhere
  agentidp audit-export [FROM_SEQ]    print the audit log as JSON lines while it is checked, and a checkpoint behind it
  agentidp keygen [RS256 | ES256]     print a new signing key, RSA of 2048 bits or P-256
  agentidp healthcheck                ask the server on this machine for its health
  agentidp -version | -h

Variables of the environment, with their defaults; those marked * are required. The first four
can also be given as NAME_FILE, a file that holds the value. On SIGHUP the server reads both keys
again, and nothing else; where they are not right it says so, and the old ones stay.

`

// run is the program, with the operating system passed in.
func run(ctx context.Context, args []string, getenv func(string) (string, bool), stdout, stderr io.Writer) error {
	var do func(*server) error
	command := strings.Join(args, " ")
	switch {
	case command == "-h" || command == "-help" || command == "--help":
		fmt.Fprint(stdout, usage)
		for _, v := range new(config).variables() {
			fmt.Fprintf(stdout, "  %-23s %-14s %s\n", v.name, v.preset, v.about)
		}
		return nil
	case command == "-version" || command == "--version":
		fmt.Fprintln(stdout, version())
		return nil
	case command == "keygen", command == "keygen RS256", command == "keygen ES256":
		key, err := newKeyPEM(strings.TrimPrefix(command, "keygen "))
		fmt.Fprintf(stdout, "%s", key)
		return err
	case command == "healthcheck":
		cfg, _ := loadConfig(getenv) // needs no more of it than the address
		return checkHealth(cfg.listen())
	case command == "":
		hangup := make(chan os.Signal, 1) // from here on: one that comes while it starts must not end it
		signal.Notify(hangup, syscall.SIGHUP)
		defer signal.Stop(hangup)
		do = func(s *server) error { return s.serve(ctx, hangup, getenv) }
	case command == "migrate":
		do = func(*server) error { return nil } // open has done it
	case len(args) == 2 && args[0] == "bootstrap":
		do = func(s *server) error { return s.bootstrap(ctx, args[1], stdout) }
	case len(args) <= 2 && args[0] == "verify-audit" && args[len(args)-1] != "":
		do = func(s *server) error { return s.verifyAudit(ctx, strings.Join(args[1:], ""), stdout, progress(stderr)) }
	case len(args) <= 2 && args[0] == "audit-export":
		from, err := parseWhole(1, 1<<53)(strings.Join(append(args[1:], "1")[:1], ""))
		if err != nil {
			return errors.New("FROM_SEQ must be a whole number, from 1")
		}
		do = func(s *server) error { return s.exportAudit(ctx, int64(from), stdout) }
	default:
		return fmt.Errorf("%q is no command, or not with these operands; -h lists them", args)
	}
	var needed []string // all
	if command == "migrate" {
		needed = []string{"DATABASE_URL", "LOG_LEVEL"} // the owner need not have the signing key
	}
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

// progress shows on a terminal, in one line, how much of the log is read.
func progress(stderr io.Writer) func(*event) error {
	file, _ := stderr.(*os.File)
	if info, err := file.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return nil
	}
	return func(e *event) error {
		if e.Seq%10_000 == 0 {
			fmt.Fprintf(file, "read up to seq %d\r", e.Seq) // what is printed next takes its place
		}
		return nil
	}
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

// A config is the environment, checked.
type config struct {
	database          *pgxpool.Config
	redis             *redis.Options
	keys              *keyset
	host, corsOrigin  string
	issuer            string
	tokenTTL          time.Duration
	port              int
	rateLimit         int // requests a minute; 0 is no limit
	monthlyTokenLimit int // tokens; 0 is no limit
	maxAgents         int // that are not decommissioned; 0 is no limit
	retentionDays     int
	trustedProxies    []netip.Prefix
	metrics           *net.TCPAddr // where to serve them; nil is nowhere
	logLevel          slog.Level
}

func (cfg config) listen() string { return net.JoinHostPort(cfg.host, strconv.Itoa(cfg.port)) }

// A variable of the environment. Where preset is *, a value is required.
type variable struct {
	name, preset, about string
	set                 func(value string) error
}

// variables are all that the program reads from its environment, into cfg. The
// first four can also be given as NAME_FILE.
func (cfg *config) variables() []variable {
	return []variable{
		{"DATABASE_URL", "*", "a PostgreSQL database, 14 or later, as createdb makes one: postgres://user:password@host:5432/agentidp", into(&cfg.database, pgxpool.ParseConfig)},
		{"REDIS_URL", "*", "a Redis database, 6.2 or later, for this service alone, as redis-server has 16: redis://default:password@host:6379/0", into(&cfg.redis, redis.ParseURL)},
		{"JWT_PRIVATE_KEY", "*", "the key that signs, as PEM: RSA of 2048 bits or more (RS256), or P-256 (ES256); make one with: go run . keygen", into(&cfg.keys, newKeyset)},
		{"JWT_PUBLIC_KEY", "", "further keys that verify and are published, as PEM blocks one after another", func(v string) error { return cfg.keys.publish(v) }},
		{"PORT", "3000", "port to listen on, from 0 to 65535", into(&cfg.port, parseWhole(0, 65535))},
		{"HOST", "", "address to listen on; all of them if empty", func(v string) error { cfg.host = v; return nil }},
		{"ISSUER", "", "URL of the service as clients see it, without a slash at the end; http://localhost:PORT if empty", into(&cfg.issuer, parseIssuer)},
		{"TOKEN_TTL", "1h", "lifetime of a token, like 90s, 15m or 1h, or in seconds; from 1s to 24h", into(&cfg.tokenTTL, parseTTL)},
		{"RATE_LIMIT_PER_MINUTE", "100", "requests of a client, and failed authentications of an address; 0 is no limit", into(&cfg.rateLimit, parseWhole(0, 1e6))},
		{"MONTHLY_TOKEN_LIMIT", "10000", "tokens issued to a client in a calendar month (UTC); 0 is no limit", into(&cfg.monthlyTokenLimit, parseWhole(0, 1e9))},
		{"MAX_AGENTS", "100", "agents that are not decommissioned; 0 is no limit", into(&cfg.maxAgents, parseWhole(0, 1e9))},
		{"RETENTION_DAYS", "90", "how many days of the audit log are served, from 1", into(&cfg.retentionDays, parseWhole(1, 36500))},
		{"CORS_ORIGIN", "", "origin like https://console.example.com whose pages may call the API; none if empty", into(&cfg.corsOrigin, parseOrigin)},
		{"TRUSTED_PROXIES", "", "networks whose X-Forwarded-For counts, like 10.0.0.0/8,192.0.2.7/32,::1/128", into(&cfg.trustedProxies, parseNetworks)},
		{"METRICS_ADDR", "127.0.0.1:9090", "host:port to serve /metrics on, for Prometheus; nowhere if set to nothing", into(&cfg.metrics, parseAddress)},
		{"LOG_LEVEL", "info", "debug, info, warn or error", func(v string) error { return cfg.logLevel.UnmarshalText([]byte(v)) }},
	}
}

// into sets a field to what parse makes of a value, if it is right.
func into[T any](field *T, parse func(string) (T, error)) func(string) error {
	return func(value string) error {
		v, err := parse(value)
		if err == nil {
			*field = v
		}
		return err
	}
}

// loadConfig reports every fault at once, of the variables that are needed (none:
// of all), and repeats no value.
func loadConfig(getenv func(string) (string, bool), needed ...string) (config, error) {
	var cfg config
	var wrong []error
	for i, v := range cfg.variables() {
		value, fault := v.read(getenv, i < 4)
		if fault == nil && value != "" && v.set(value) != nil {
			fault = errors.New("is not right")
		}
		if fault != nil && (needed == nil || slices.Contains(needed, v.name)) {
			wrong = append(wrong, fmt.Errorf("%s %w: %s", v.name, fault, v.about))
		}
	}
	if cfg.issuer == "" {
		cfg.issuer = fmt.Sprintf("http://localhost:%d", cfg.port)
	}
	return cfg, errors.Join(wrong...)
}

// read takes the value, or that of the file which NAME_FILE names, or what is
// preset.
func (v variable) read(getenv func(string) (string, bool), orFile bool) (value string, err error) {
	value, set := getenv(v.name)
	if file, _ := getenv(v.name + "_FILE"); orFile && file != "" {
		content, unread := os.ReadFile(file)
		if value != "" {
			return "", fmt.Errorf("and %s_FILE are both set", v.name)
		}
		if unread != nil {
			return "", errors.New("has a file that can't be read") // its name may be the secret, by mistake
		}
		value = strings.TrimSuffix(strings.TrimSuffix(string(content), "\n"), "\r")
	}
	switch {
	case value != "" || set && v.name == "METRICS_ADDR":
		return value, nil
	case v.preset == "*":
		return "", errors.New("is missing")
	}
	return v.preset, nil
}

func parseTTL(v string) (time.Duration, error) {
	if _, notSeconds := strconv.Atoi(v); notSeconds == nil {
		v += "s"
	}
	ttl, err := time.ParseDuration(v)
	if ttl < time.Second || ttl > maxTokenTTL {
		err = strconv.ErrRange
	}
	return ttl, err
}

func parseIssuer(v string) (string, error) {
	u, err := url.Parse(v)
	if err == nil && (u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil ||
		strings.ContainsAny(v, `?#"\ `) || strings.HasSuffix(v, "/")) {
		err = strconv.ErrSyntax
	}
	return v, err
}

func parseAddress(v string) (*net.TCPAddr, error) { return net.ResolveTCPAddr("tcp", v) }

func parseOrigin(v string) (string, error) {
	u, err := url.Parse(v)
	if err == nil && (u.Host == "" || u.Scheme+"://"+u.Host != v) {
		err = strconv.ErrSyntax
	}
	return v, err
}

func parseNetworks(v string) (list []netip.Prefix, err error) {
	for _, text := range strings.FieldsFunc(v, func(c rune) bool { return c == ',' || c == ' ' }) {
		network, badErr := netip.ParsePrefix(text)
		list, err = append(list, network), errors.Join(err, badErr)
	}
	return list, err
}

// A server holds nothing that another copy would need.
type server struct {
	cfg      config
	keys     atomic.Pointer[keyset]
	db       *pgxpool.Pool // for requests: each holds one connection at most, and waits for nothing with it
	inner    *pgxpool.Pool // for the recorder, the keeper and lookups, which requests must not hold up
	redis    *cache
	vault    *vault
	recorder *queue[event, struct{}]
	lookups  *queue[secretKey, secretOwner]
	lives    *queue[origin, bool]
	meter    *meter
	postgres pulse // beats with each commit of the recorder, and of the keeper where there is none
	clock    atomic.Pointer[reading]
	swept    time.Time // when expired revocations were deleted
	bodies   bodies

	draining, verifying atomic.Bool
	inFlight            atomic.Int64
}

// open connects to both stores and sees to the schema. It waits for PostgreSQL
// for a minute; without Redis the service can do. Owner demands that the schema
// is applied.
func open(ctx context.Context, cfg config, owner bool) (*server, error) {
	logging.Disable() // of go-redis: what fails is known to who asked
	meter := newMeter()
	db, inner, err := openPools(ctx, cfg.database, meter)
	if err != nil {
		return nil, err
	}
	var o redis.Options
	if cfg.redis != nil { // migrate has none
		o = *cfg.redis
	}
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = redisTimeout, redisTimeout, redisTimeout, 4*redisTimeout
	o.ContextTimeoutEnabled, o.MaxRetries, o.DialerRetries, o.DisableIdentity = true, -1, 1, true
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	s := &server{cfg: cfg, db: db, inner: inner, redis: newCache(&o, meter), meter: meter, vault: newVault()}
	s.recorder = newQueue(s.storeEvents)
	s.lookups = newQueue(func(ctx context.Context, shown []secretKey) ([]secretOwner, error) {
		return loadSecretOwners(ctx, inner, shown)
	})
	s.lives = newQueue(func(ctx context.Context, of []origin) ([]bool, error) { return areAlive(ctx, inner, of) })
	s.keys.Store(cfg.keys)
	s.clock.Store(&reading{time.Now().Round(0), time.Now()})
	end := time.Now().Add(time.Minute)
	for err = s.applySchema(ctx, owner); err != nil && ctx.Err() == nil && time.Now().Before(end); err = s.applySchema(ctx, owner) {
		refusal, ok := errors.AsType[*pgconn.PgError](err)
		if errors.Is(err, errNotMigrated) || errors.Is(err, errPooled) || ok && refusal.Code[0] != '5' && refusal.Code[:2] != "40" {
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
	s.lives.close()
	s.redis.close()
	s.inner.Close()
	s.db.Close()
}

// readKeys takes the keys as they are now. Where they are not right, the old
// ones stay.
func (s *server) readKeys(getenv func(string) (string, bool)) {
	cfg, err := loadConfig(getenv, "JWT_PRIVATE_KEY", "JWT_PUBLIC_KEY")
	if err != nil {
		slog.Error("keys not read, the old ones stay", "error", err)
		return
	}
	s.keys.Store(cfg.keys)
	slog.Info("keys read", "kids", cfg.keys.each("kid"))
}

// serve serves until ctx ends, and then finishes what has begun. A hangup has
// it read the keys again.
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
	stopKeeper := s.startKeeper()
	defer stopKeeper()
	web := s.web()
	failed := make(chan error, 1)
	go func() { failed <- web.Serve(listener) }()
	slog.Info("serving", "url", s.cfg.issuer, "address", listener.Addr().String(), "version", version())
	for ctx.Err() == nil {
		select {
		case err := <-failed:
			return fmt.Errorf("serving: %w", err)
		case <-hangup:
			s.readKeys(getenv)
		case <-ctx.Done():
		}
	}
	slog.Info("stopping")
	s.draining.Store(true)
	time.Sleep(drainTime) // who asks for our health sends no more
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
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader,

		DisableGeneralOptionsHandler: true, // it would answer OPTIONS * without JSON

		ErrorLog: slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
}

// A request is one that the front has let in.
type request struct {
	*http.Request
	id     string      // for the log, the audit log and the answer
	addr   netip.Addr  // of the client
	out    http.Header // of the answer
	route  route
	body   []byte
	form   url.Values // at the token endpoints
	caller caller
	about  inquiry // of an introspection or a revocation
}

// A route is what can be called, by whom, and how. Who identifies the caller,
// counts the request for its limit, and refuses it where it must. Handle
// returns what to answer, or an error.
type route struct {
	pattern string
	success int // status
	who     func(*request) error
	handle  func(*request) (any, error)
	form    envelope
	records string // the action that a refusal of it is recorded as; "" where it changes nothing
}

type envelope bool

const (
	rest  envelope = false // {"code", "message", "details"}
	oauth envelope = true  // {"error", "error_description"} (RFC 6749, section 5.2)
)

// routes is the whole attack surface: what can be called, by whom.
func (s *server) routes() []route {
	return []route{
		{"POST /api/v1/agents", 201, s.bearer(agentsWrite), s.createAgent, rest, agentCreated},
		{"GET /api/v1/agents", 200, s.bearer(agentsRead), s.listAgents, rest, ""},
		{"GET /api/v1/agents/{agentId}", 200, s.bearer(agentsRead, ""), s.getAgent, rest, ""},
		{"PATCH /api/v1/agents/{agentId}", 200, s.bearer(agentsWrite), s.updateAgent, rest, agentUpdated},
		{"DELETE /api/v1/agents/{agentId}", 204, s.bearer(agentsWrite), s.decommissionAgent, rest, agentDecommissioned},

		{"POST /api/v1/agents/{agentId}/credentials", 201, s.bearer(agentsWrite, credentialsWrite), s.createCredential, rest, credentialGenerated},
		{"GET /api/v1/agents/{agentId}/credentials", 200, s.bearer(agentsWrite, credentialsWrite), s.listCredentials, rest, ""},
		{"POST /api/v1/agents/{agentId}/credentials/{credentialId}/rotate", 200, s.bearer(agentsWrite, credentialsWrite), s.rotateCredential, rest, credentialRotated},
		{"DELETE /api/v1/agents/{agentId}/credentials/{credentialId}", 204, s.bearer(agentsWrite, credentialsWrite), s.revokeCredential, rest, credentialRevoked},

		{"POST /api/v1/token", 200, s.authenticateClient, s.issueToken, oauth, tokenIssued},
		{"POST /api/v1/token/introspect", 200, s.bearerOrClient(tokensRead), s.introspectToken, oauth, tokenIntrospected},
		{"POST /api/v1/token/revoke", 200, s.bearerOrClient(""), s.revokeToken, oauth, tokenRevoked},
		{"GET /api/v1/authorize", 200, public, refuse(errNoRedirect), oauth, ""},

		{"GET /api/v1/audit", 200, s.bearer(auditRead), s.listEvents, rest, ""},
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

var public func(*request) error // asks nobody

func noContent(*request) (any, error) { return nil, nil }

func refuse(p *problem) func(*request) (any, error) {
	return func(*request) (any, error) { return nil, p }
}

// bearer lets in who has a token that carries scope; and the agent of the path
// itself if its token carries one of own, where "" is always there.
func (s *server) bearer(scope string, own ...string) func(*request) error {
	return func(r *request) error {
		if err := s.identify(r); err != nil {
			return err
		}
		lacks, window := r.caller.need(scope), byToken
		if self := r.caller.AgentID == r.PathValue("agentId"); self && slices.ContainsFunc(own, r.caller.has) {
			lacks = nil
		} else if self && len(own) > 0 && lacks != nil {
			lacks = r.caller.need(own[0]) // the lesser of the two
		}
		if lacks == nil && r.route.records != "" {
			window = toChange
		}
		if _, err := s.spend(r, window, ""); err != nil {
			return err
		}
		return lacks
	}
}

// bearerOrClient lets in who has a token that carries scope, and who
// authenticates as a client that holds it; "" is always there. A client that
// proved itself can always revoke: no limit is in the way.
func (s *server) bearerOrClient(scope string) func(*request) error {
	return func(r *request) (err error) {
		s.inquire(r)
		switch {
		case !r.presents("Bearer"):
			if err = s.authenticateClient(r); err == nil && r.route.records != tokenRevoked {
				_, err = s.spend(r, byCredential, "")
			}
		case r.form.Get("client_secret") != "":
			err = errTwoMethods
		default:
			if err = s.identify(r); err == nil {
				_, err = s.spend(r, byToken, "")
			}
		}
		if err == nil {
			err = r.caller.need(scope)
		}
		if err == nil && r.form.Get("token") == "" {
			err = errForm.because("The body lacks token=TOKEN, the one that this is about.")
		}
		return err
	}
}

// need refuses a caller that lacks a scope.
func (c caller) need(scope string) error {
	if c.has(scope) {
		return nil
	}
	p := errForbidden.because("This needs the scope " + scope + "; yours are " + clip(strings.Join(c.scopes, " ")) + ".")
	p.scope = scope
	return p
}

// presents tells whether the request has credentials of an HTTP scheme.
func (r *request) presents(scheme string) bool {
	have, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(have, scheme)
}

var (
	requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	pathPattern      = regexp.MustCompile(`^[A-Za-z0-9/._-]+$`) // of every route, and of every id
)

// front stands before the mux. Only a clean path reaches that, or it would
// redirect, and a client would send its secret twice. What the mux would say
// itself is said in our form.
func (s *server) front(routes []route) http.Handler {
	mux := http.NewServeMux()
	for _, rt := range routes {
		mux.HandleFunc(rt.pattern, func(w http.ResponseWriter, r *http.Request) { s.answer(rt, w, r) })
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, refusal := r.URL.EscapedPath(), headerOnly{}
		none := route{pattern: "none", who: public, handle: refuse(errNotFound), form: envelope(strings.HasPrefix(p, "/api/v1/token"))}
		// Go reads on after a body that a proxy may have measured otherwise (RFC 9112, section 6.1), and
		// of HTTP/1.0 doesn't even say that there was a Transfer-Encoding.
		if r.TransferEncoding != nil || !r.ProtoAtLeast(1, 1) {
			w.Header().Set("Connection", "close")
		}
		if !pathPattern.MatchString(p) || path.Clean(p) != p {
			s.answer(none, w, r)
		} else if s.allowOrigin(w, r) {
			s.answer(route{pattern: "preflight", success: http.StatusNoContent, who: public, handle: noContent}, w, r)
		} else if own, pattern := mux.Handler(r); pattern != "" {
			mux.ServeHTTP(w, r)
		} else {
			if own.ServeHTTP(refusal, r); refusal["Allow"] != nil {
				w.Header()["Allow"] = refusal["Allow"]
				none.handle = refuse(errMethod.because("This path takes " + refusal["Allow"][0] + ", and not " + clip(r.Method) + "."))
			}
			s.answer(none, w, r)
		}
	})
}

// headerOnly takes of an answer what we keep of it.
type headerOnly http.Header

func (h headerOnly) Header() http.Header         { return http.Header(h) }
func (h headerOnly) WriteHeader(int)             {}
func (h headerOnly) Write(b []byte) (int, error) { return len(b), nil }

// allowOrigin tells a browser that pages of CORS_ORIGIN may call, and answers
// its preflight (fetch.spec.whatwg.org, section 3.3).
func (s *server) allowOrigin(w http.ResponseWriter, r *http.Request) (preflight bool) {
	if s.cfg.corsOrigin == "" {
		return false
	}
	h := w.Header()
	h.Add("Vary", "Origin")
	if r.Header.Get("Origin") != s.cfg.corsOrigin {
		return false
	}
	h.Set("Access-Control-Allow-Origin", s.cfg.corsOrigin)
	h.Set("Access-Control-Expose-Headers", "Retry-After, RateLimit, RateLimit-Policy, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-Request-Id")
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		return false
	}
	h.Set("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE")
	h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id")
	h.Set("Access-Control-Max-Age", "600")
	return true
}

// answer takes a request along its route.
func (s *server) answer(rt route, w http.ResponseWriter, in *http.Request) {
	begun := time.Now()
	r := &request{Request: in, id: in.Header.Get("X-Request-Id"), addr: clientAddress(in, s.cfg.trustedProxies), out: w.Header(), route: rt}
	if !requestIDPattern.MatchString(r.id) {
		r.id = s.newID()[15:] // 74 random bits
	}
	r.out.Set("X-Request-Id", r.id)
	r.out.Set("X-Content-Type-Options", "nosniff")
	r.out.Set("Cache-Control", "no-store")
	body, err := s.handle(w, r)
	status, code := rt.success, ""
	if err != nil {
		status, code, body = s.fail(r, rt, err)
	}
	if s.draining.Load() { // also where the request has begun before
		r.out.Set("Connection", "close")
	}
	respond(w, status, body)
	route := `route="` + rt.pattern + `"`
	s.meter.add(1, "agentidp_http_requests_total", route+`,status="`+strconv.Itoa(status)+`"`)
	s.meter.add(time.Since(begun).Seconds(), "agentidp_http_request_duration_seconds", route)
	if code != "" {
		s.meter.add(1, "agentidp_refusals_total", `reason="`+code+`"`)
	}
	slog.Info("request", "method", clip(in.Method), "route", rt.pattern, "status", status, "code", code,
		"ms", float64(time.Since(begun).Microseconds())/1000, "requestId", r.id,
		"clientId", r.caller.AgentID, "ip", r.addr.String())
}

// handle returns the answer of a route, or why there is none. The body is read
// whole before anybody is asked who it is: one that dribbles in takes nobody's
// place, and outlives no check. What has begun then is finished, also when the
// client has gone: it may have been acknowledged to somebody else.
func (s *server) handle(w http.ResponseWriter, r *request) (body any, err error) {
	rt := r.route
	defer func() {
		if p := recover(); p != nil {
			slog.Error("panic", "requestId", r.id, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errInternal
		}
	}()
	if len(r.Header.Values("Authorization")) > 1 {
		return nil, errTwoMethods
	}
	if rt.who == nil {
		return rt.handle(r)
	}
	if err = s.readBody(w, r); err == nil && rt.form == oauth {
		err = r.parseForm()
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), requestTimeout)
	defer cancel()
	r.Request = r.WithContext(ctx)
	defer s.inFlight.Add(-1)
	if s.inFlight.Add(1) > maxInFlight {
		return nil, errBusy
	}
	if err = rt.who(r); err == nil {
		body, err = rt.handle(r)
	}
	return body, s.recordRefusal(r, err)
}

// recordRefusal records that an authenticated caller was refused a change, as
// one also is that was cut off after it was let in.
func (s *server) recordRefusal(r *request, err error) error {
	rt := r.route
	p, ok := errors.AsType[*problem](err)
	if !ok || rt.records == "" || r.caller.AgentID == "" ||
		!slices.Contains([]int{http.StatusUnauthorized, http.StatusForbidden, http.StatusConflict}, p.status) {
		return err
	}
	concerned, f := r.PathValue("agentId"), facts{"reason": p.code}
	if rt.form == oauth {
		concerned, f["reason"] = r.caller.AgentID, p.oauth
	}
	if id := r.PathValue("credentialId"); isID(id) {
		f["credentialId"] = id
	}
	return s.refused(r, newEvent(rt.records, concerned, f), p)
}

// A problem is an error that the caller may read. This list is every one that
// we send. One without an OAuth code must not reach a token endpoint.
type problem struct {
	status  int
	code    string
	oauth   string
	message string // printable ASCII without quotes and backslashes (RFC 6749, section 5.2)
	details map[string]any
	scope   string // that was missing
}

func (p *problem) Error() string { return p.code + ": " + p.message }

func (p problem) because(message string) *problem {
	p.message = message
	return &p
}

func (p problem) with(details map[string]any) *problem {
	p.details = details
	return &p
}

var (
	errValidation = &problem{status: 400, code: "VALIDATION_ERROR", message: "The request has faults, which details names."}
	errTwoMethods = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_request", message: "This is authenticated twice. Send one Authorization header, or client_id and client_secret in the body."}
	errForm       = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_request", message: "The form has faults."}
	errGrantType  = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "unsupported_grant_type", message: "The grant_type must be client_credentials."}
	errScope      = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_scope", message: "The scope has faults."}
	errResource   = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_target", message: "A resource must be an absolute URI without a fragment."}
	errNoRedirect = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "unsupported_response_type", message: "There is no authorization endpoint here; agents use grant_type=client_credentials at POST /api/v1/token."}
	errRetention  = &problem{status: 400, code: "RETENTION_WINDOW_EXCEEDED", message: "The audit log is not served that far back; details.oldest is the limit."}

	errNoToken        = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "The header Authorization: Bearer TOKEN is needed, with a token from POST /api/v1/token; not in the URL, and by no other scheme."}
	errInvalidToken   = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_token", message: "The token is revoked, or its credential or agent is."}
	errNoClient       = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "Client authentication is needed: HTTP Basic, or client_id and client_secret in the body; not in the URL, and by no other scheme."}
	errBadClient      = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "The client_id (an agentId) is unknown, or its client_secret (sk_live_ and 64 hex digits) is wrong, revoked or expired."}
	errClientInactive = &problem{status: 403, code: "AGENT_NOT_ACTIVE", oauth: "unauthorized_client", message: "The agent is not active."}
	errQuota          = &problem{status: 403, code: "FREE_TIER_LIMIT_EXCEEDED", oauth: "unauthorized_client", message: "The monthly quota is spent."}
	errForbidden      = &problem{status: 403, code: "FORBIDDEN", oauth: "insufficient_scope", message: "The token does not allow this."}
	errNotActive      = &problem{status: 403, code: "AGENT_NOT_ACTIVE", message: "The agent is not active."}
	errAgentLimit     = &problem{status: 403, code: "FREE_TIER_LIMIT_EXCEEDED", message: "No more agents can be registered; decommission one first."}

	errNotFound     = &problem{status: 404, code: "NOT_FOUND", oauth: "invalid_request", message: "There is nothing at this path; /openapi.yaml lists those that there are."}
	errNoAgent      = &problem{status: 404, code: "AGENT_NOT_FOUND", message: "No agent has this id; ids are UUIDs in lower case."}
	errNoCredential = &problem{status: 404, code: "CREDENTIAL_NOT_FOUND", message: "The agent has no credential of this id; ids are UUIDs in lower case."}
	errNoEvent      = &problem{status: 404, code: "AUDIT_EVENT_NOT_FOUND", message: "No event has this id, a UUID in lower case, or it is older than what is served."}
	errMethod       = &problem{status: 405, code: "METHOD_NOT_ALLOWED", oauth: "invalid_request", message: "The methods of this path are in the Allow header."}

	errAgentExists       = &problem{status: 409, code: "AGENT_ALREADY_EXISTS", message: "An agent with this email is registered, if only as decommissioned: an email is never free again."}
	errDecommissioned    = &problem{status: 409, code: "AGENT_ALREADY_DECOMMISSIONED", message: "The agent is decommissioned, which is final."}
	errCredentialRevoked = &problem{status: 409, code: "CREDENTIAL_ALREADY_REVOKED", message: "The credential is revoked, which is final."}

	errTooLarge       = &problem{status: 413, code: "PAYLOAD_TOO_LARGE", oauth: "invalid_request", message: "The body is longer than 16 kB."}
	errMediaType      = &problem{status: 415, code: "UNSUPPORTED_MEDIA_TYPE", message: "The Content-Type must be application/json."}
	errRateLimited    = &problem{status: 429, code: "RATE_LIMIT_EXCEEDED", oauth: "temporarily_unavailable", message: "Too many requests of this client; Retry-After says when to come back."}
	errAddressLimited = &problem{status: 429, code: "RATE_LIMIT_EXCEEDED", oauth: "temporarily_unavailable", message: "Too many failed authentications from this address; Retry-After says when to come back."}

	errInternal    = &problem{status: 500, code: "INTERNAL_SERVER_ERROR", oauth: "server_error", message: "Something went wrong here."}
	errStopping    = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "This copy is stopping; use another."}
	errBusy        = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "Too many requests at once; try again."}
	errClock       = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "The clocks of this copy and of PostgreSQL are too far apart."}
	errUnavailable = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "A store does not answer; nothing was acknowledged. Try again."}
)

// fail returns the status, code and body for an error. What is no problem came
// from a store: nothing else can fail here. It is logged and a 503.
func (s *server) fail(r *request, rt route, err error) (status int, code string, body any) {
	p, ok := errors.AsType[*problem](err)
	if !ok {
		slog.Error("request failed", "requestId", r.id, "route", rt.pattern, "error", err)
		p = errUnavailable
	}
	r.out.Set("Cache-Control", "no-store")
	if p.status == http.StatusServiceUnavailable {
		r.out.Set("Retry-After", "1")
	}
	if p.status == http.StatusUnauthorized || p.scope != "" {
		s.challenge(r, rt.form, p)
	}
	if rt.form == oauth {
		return p.status, p.oauth, map[string]string{"error": p.oauth, "error_description": p.message}
	}
	return p.status, p.code, struct {
		Code    string         `json:"code"`
		Message string         `json:"message"`
		Details map[string]any `json:"details,omitempty"`
	}{p.code, p.message, p.details}
}

// challenge says how to authenticate: in the way that was tried (RFC 6749,
// section 5.2), with the reason beside it (RFC 6750, section 3), which isn't
// there where nothing was tried. Who needs a token is told where to read of whom
// to ask for it (RFC 9728, section 5.1). A secret in the form has no challenge.
func (s *server) challenge(r *request, form envelope, p *problem) {
	const realm = ` realm="agentidp"`
	bearer := "Bearer" + realm + `, resource_metadata="` + s.cfg.issuer + `/.well-known/oauth-protected-resource"`
	reason := `, error="` + p.oauth + `", error_description="` + p.message + `"`
	if p.scope != "" {
		reason += `, scope="` + p.scope + `"`
	}
	switch {
	case r.presents("Bearer") && p.oauth != errNoClient.oauth:
		r.out.Set("WWW-Authenticate", bearer+reason)
	case form == rest:
		r.out.Set("WWW-Authenticate", bearer)
	case r.Header.Get("Authorization") != "":
		r.out.Set("WWW-Authenticate", "Basic"+realm+reason)
	case r.form.Get("client_secret") == "":
		r.out.Set("WWW-Authenticate", "Basic"+realm)
	}
}

// respond encodes before it writes, so that an answer is whole; nil is none.
func respond(w http.ResponseWriter, status int, body any) {
	b, encoded := body.([]byte)
	if body != nil && !encoded {
		var err error
		if b, err = json.Marshal(body); err != nil {
			panic(err) // a type of ours that has no JSON
		}
		b = append(b, '\n')
	}
	if b != nil && w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/json")
	}
	if b != nil {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	}
	w.WriteHeader(status)
	w.Write(b) // an error means that the client has gone
}

// Bodies are those that have not arrived whole, the longest here first. What they
// can hold is bounded, in sum and for one address: where there is no room, the
// one that was longest here is cut off. So a body that comes at an ordinary pace
// gets through, whoever has others dribble in.
type bodies struct {
	mu   sync.Mutex
	open []*unfinished
}

type unfinished struct {
	address string
	conn    *http.ResponseController
}

const (
	maxBodies   = 1024            // of maxBody each
	maxBodiesOf = 128             // of one address
	bodyTime    = 2 * time.Second // for one to arrive, and that again for each bodyPace
	bodyPace    = 8 << 10         // bytes
)

// begin adds one and makes room for it; done takes it away.
func (b *bodies) begin(u *unfinished) {
	b.mu.Lock()
	defer b.mu.Unlock()
	same, oldest := 0, 0 // of this address; of whom there are too many
	for i, other := range slices.Backward(b.open) {
		if other.address == u.address {
			same, oldest = same+1, i
		}
	}
	if same < maxBodiesOf {
		oldest = 0
	}
	if same >= maxBodiesOf || len(b.open) >= maxBodies {
		_ = b.open[oldest].conn.SetReadDeadline(time.Unix(1, 0)) // its reading fails, and so does nothing else
		b.open = slices.Delete(b.open, oldest, oldest+1)
	}
	b.open = append(b.open, u)
}

func (b *bodies) done(u *unfinished) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open = slices.DeleteFunc(b.open, func(other *unfinished) bool { return other == u })
}

// readBody reads up to maxBody bytes, in the time that so many may take.
func (s *server) readBody(w http.ResponseWriter, r *request) (err error) {
	if r.Body == http.NoBody {
		return nil
	}
	length := r.ContentLength
	if length < 0 || length > maxBody {
		length = maxBody
	}
	u := &unfinished{addressKey(r.addr), http.NewResponseController(w)}
	_ = u.conn.SetReadDeadline(time.Now().Add(bodyTime + bodyTime*time.Duration(length)/bodyPace))
	s.bodies.begin(u)
	r.body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	s.bodies.done(u)
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return errTooLarge
	}
	if err != nil {
		return errForm.because("The body did not arrive whole, or not in time.")
	}
	return nil
}

// Inputs are named values of a JSON object or of a query string. Who takes one
// says how it must be. All that is wrong is reported at once.
type inputs struct {
	values map[string]any // text, or whatever JSON has; what was taken is gone
	known  []string       // names that were asked for
	faults map[string]any // what is wrong, by name
}

func newInputs() *inputs { return &inputs{values: map[string]any{}, faults: map[string]any{}} }

// take takes a value, which read reads, or says in its error how it must be.
// Nil is none.
func take[T any](in *inputs, name string, read func(any) (T, error)) *T {
	value, given := in.values[name]
	delete(in.values, name)
	in.known = append(in.known, name)
	if !given {
		return nil
	}
	v, err := read(value)
	if err != nil {
		got, _ := json.Marshal(value)
		in.faults[name] = err.Error() + "; it was " + clip(string(got))
		return nil
	}
	return &v
}

// parsed reads text that parse can read, or says must.
func parsed[T any](must string, parse func(string) (T, error)) func(any) (T, error) {
	return func(value any) (v T, err error) {
		text, ok := value.(string)
		if ok {
			v, err = parse(text)
		}
		if !ok || err != nil {
			err = errors.New(must)
		}
		return v, err
	}
}

func matching(must string, ok func(string) bool) func(any) (string, error) {
	return parsed(must, func(s string) (string, error) {
		if !ok(s) {
			return "", strconv.ErrSyntax
		}
		return s, nil
	})
}

func oneOf(allowed []string) func(any) (string, error) {
	return matching("must be one of "+strings.Join(allowed, ", "), func(s string) bool { return slices.Contains(allowed, s) })
}

func whole(least, most int) func(any) (int, error) {
	return parsed(fmt.Sprintf("must be a whole number from %d to %d", least, most), parseWhole(least, most))
}

func parseWhole(least, most int) func(string) (int, error) {
	return func(v string) (int, error) {
		n, err := strconv.Atoi(v)
		if n < least || n > most || strconv.Itoa(n) != v {
			err = strconv.ErrRange
		}
		return n, err
	}
}

// problem says what is wrong, and what was not asked for, which is wrong too.
func (in *inputs) problem() error {
	for name := range in.values {
		if len(in.faults) == 100 { // enough to learn from, and the answer stays small
			break
		}
		in.faults[clip(name)] = "is not known here; there are " + strings.Join(in.known, ", ")
	}
	if len(in.faults) == 0 {
		return nil
	}
	return errValidation.with(in.faults)
}

// decode reads a body: one JSON object in UTF-8 with each name once, spelled as
// read asks for it, and nothing after it. Go's decoder alone would let repeated
// and oddly cased names, null and invalid UTF-8 pass.
func decode[T any](r *request, read func(*inputs) T) (q T, err error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return q, errMediaType.because("The Content-Type must be application/json; it was '" + clip(r.Header.Get("Content-Type")) + "'.")
	}
	in, d, wrong := newInputs(), json.NewDecoder(bytes.NewReader(r.body)), ""
	if first, _ := d.Token(); first != json.Delim('{') || !utf8.Valid(r.body) {
		wrong = "doesn't begin with {, or isn't UTF-8"
	}
	for wrong == "" && d.More() {
		var value any
		token, err := d.Token()
		name, _ := token.(string)
		if _, again := in.values[name]; again {
			wrong = "has " + clip(name) + " twice"
		} else if err != nil || d.Decode(&value) != nil {
			wrong = fmt.Sprintf("isn't JSON after byte %d", d.InputOffset())
		}
		in.values[name] = value
	}
	_, openErr := d.Token() // the closing brace
	if _, end := d.Token(); wrong == "" && (openErr != nil || end != io.EOF) {
		wrong = "doesn't end with its closing }"
	}
	if wrong != "" {
		return q, errValidation.because("The body must be one JSON object, and this one " + wrong + ".")
	}
	q = read(in)
	return q, in.problem()
}

// readQuery takes what the query string has, each name once.
func readQuery(r *request) *inputs {
	in := newInputs()
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		in.faults["query"] = "must be name=value pairs, with % only before two hex digits and no ;"
	}
	for name, list := range values {
		if in.values[name] = list[0]; len(list) > 1 {
			in.values[name] = list
		}
	}
	return in
}

const countedTo = 10_000 // rows of a list; beyond, counting costs more than it tells

// A span is the part of a list that is asked for.
type span struct{ page, limit int }

func (in *inputs) span() span {
	part := span{1, 20}
	if page := take(in, "page", whole(1, countedTo)); page != nil {
		part.page = *page
	}
	if limit := take(in, "limit", whole(1, 100)); limit != nil {
		part.limit = *limit
	}
	if part.page*part.limit > countedTo {
		in.faults["page"] = "goes beyond the 10,000th row; read on by cursor where there is one, or ask for less"
	}
	return part
}

// A page of a list.
type page[T any] struct {
	Data   []T  `json:"data"`
	Total  int  `json:"total"`
	Capped bool `json:"totalCapped,omitempty"` // there are more than total
	Page   int  `json:"page"`
	Limit  int  `json:"limit"`
}

// list returns a page of the rows of a query, and whether there are more. Args
// name its arguments. It is planned for just these: a plan for any filters
// would fit none. Tail orders it and is not counted.
func list[T any](ctx context.Context, db querier, part span, args pgx.NamedArgs, columns, from, tail string) (page[T], bool, error) {
	p := page[T]{Page: part.page, Limit: part.limit}
	args["limit"], args["offset"], args["counted"] = part.limit+1, (part.page-1)*part.limit, countedTo+1
	rows, _ := db.Query(ctx, `select `+columns+from+tail+` limit @limit offset @offset`, pgx.QueryExecModeExec, args)
	var err error
	if p.Data, err = pgx.CollectRows(rows, pgx.RowToStructByName[T]); err != nil {
		return p, false, fmt.Errorf("listing: %w", err)
	}
	err = db.QueryRow(ctx, `select count(*) from (select 1 `+from+` limit @counted) as counted`, pgx.QueryExecModeExec, args).Scan(&p.Total)
	if err != nil {
		return p, false, fmt.Errorf("counting: %w", err)
	}
	p.Capped, p.Total = p.Total > countedTo, min(p.Total, countedTo)
	more := len(p.Data) > part.limit
	p.Data = p.Data[:min(len(p.Data), part.limit)]
	return p, more, nil
}

var idPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// isID tells whether s is a UUID in the one form that we write: PostgreSQL
// takes others, and a limit or a lock-out must not have several keys.
func isID(s string) bool { return idPattern.MatchString(s) }

// newID makes a UUID of version 7, which sorts by time (RFC 9562, section 5.7).
func (s *server) newID() string {
	var rest [10]byte
	rand.Read(rest[:])
	return idOf(s.now(), rest)
}

func idOf(t time.Time, rest [10]byte) string {
	b := append(binary.BigEndian.AppendUint64(nil, uint64(t.UnixMilli()))[2:], rest[:]...)
	b[6] = b[6]&0x0f | 0x70
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// A moment is a time in UTC with milliseconds, as PostgreSQL has it.
type moment struct{ time.Time }

func (m moment) String() string               { return m.UTC().Format("2006-01-02T15:04:05.000Z") }
func (m moment) MarshalJSON() ([]byte, error) { return []byte(`"` + m.String() + `"`), nil }

func (m *moment) ScanTimestamptz(v pgtype.Timestamptz) error {
	m.Time = v.Time
	return nil
}

// clip makes a piece of a request fit for an error message, which never repeats
// a secret or a token.
func clip(s string) string {
	if strings.Contains(s, "sk_live_") || strings.Contains(s, "eyJ") {
		return "[secret]"
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' || c == '\\' {
			return '?'
		}
		return c
	}, strings.ReplaceAll(s[:min(len(s), 100)], `"`, "'"))
}

// showLife says that the process runs, whatever the stores do.
func showLife(*request) (any, error) {
	return map[string]string{"status": "ok", "version": version()}, nil
}

// showHealth tells what requests and the keeper have found within the last
// second, so that asking costs nothing.
func (s *server) showHealth(r *request) (any, error) {
	word := map[bool]string{true: "up", false: "down"}
	h := map[string]any{"version": version(), "services": map[string]string{
		"postgres": word[s.postgres.well()], "redis": word[s.redis.well()],
	}}
	switch {
	case s.draining.Load():
		return nil, errStopping.with(h)
	case !s.postgres.well():
		return nil, errUnavailable.with(h)
	case s.clockDistance().Abs() > clockTrust:
		return nil, errClock.with(h)
	}
	h["status"] = map[bool]string{true: "ok", false: "degraded"}[s.redis.well()]
	return h, nil
}

// showOpenAPI describes all routes to programs, in the form of RFC 9512.
func showOpenAPI(r *request) (any, error) {
	r.out.Set("Content-Type", "application/yaml")
	r.out.Set("Cache-Control", "public, max-age=300")
	return openAPI, nil
}

// showKeys is RFC 7517. A key has to be published for as long as this answer
// may be cached before it signs.
func (s *server) showKeys(r *request) (any, error) {
	r.out.Set("Cache-Control", "public, max-age=300")
	return map[string]any{"keys": s.keys.Load().jwks()}, nil
}

// showMetadata is RFC 8414. Response types, challenge methods and the
// authorization endpoint, which refuses, are there for client libraries that
// don't accept a server without; subject types and the algorithms of ID tokens,
// of which there are none, for those that expect OpenID Connect.
func (s *server) showMetadata(r *request) (any, error) {
	r.out.Set("Cache-Control", "public, max-age=300")
	issuer, secret := s.cfg.issuer, []string{"client_secret_basic", "client_secret_post"}
	return map[string]any{
		"issuer":                                        issuer,
		"authorization_endpoint":                        issuer + "/api/v1/authorize",
		"token_endpoint":                                issuer + "/api/v1/token",
		"introspection_endpoint":                        issuer + "/api/v1/token/introspect",
		"revocation_endpoint":                           issuer + "/api/v1/token/revoke",
		"jwks_uri":                                      issuer + "/.well-known/jwks.json",
		"grant_types_supported":                         []string{"client_credentials"},
		"response_types_supported":                      []string{"none"},
		"code_challenge_methods_supported":              []string{"S256"},
		"scopes_supported":                              ourScopes,
		"subject_types_supported":                       []string{"public"},
		"id_token_signing_alg_values_supported":         s.keys.Load().each("alg"),
		"token_endpoint_auth_methods_supported":         secret,
		"introspection_endpoint_auth_methods_supported": secret,
		"revocation_endpoint_auth_methods_supported":    secret,
	}, nil
}

// showResource describes our own API as one that takes our tokens (RFC 9728,
// section 2).
func (s *server) showResource(r *request) (any, error) {
	r.out.Set("Cache-Control", "public, max-age=300")
	return map[string]any{
		"resource": s.cfg.issuer, "authorization_servers": []string{s.cfg.issuer}, "jwks_uri": s.cfg.issuer + "/.well-known/jwks.json",
		"scopes_supported": ourScopes, "bearer_methods_supported": []string{"header"},
	}, nil
}
