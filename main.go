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
//	schema.sql     the tables
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
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
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const release = "0.1.0"

const (
	requestTimeout = 5 * time.Second // for all that a request does
	storeTimeout   = 3 * time.Second // for one transaction beside requests
	drainTime      = time.Second     // between "not ready" and closing the port
	maxBody        = 64 << 10        // bytes
	maxHeader      = 12 << 10        // bytes, to which net/http adds 4096
)

// Advisory locks of PostgreSQL, each for one purpose.
const (
	schemaLock = 0x4167_656e_7401 + iota
	chainLock
	agentLock
)

//go:embed schema.sql
var schema string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal stops at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "agentidp:", err)
		os.Exit(1)
	}
}

const usage = `AgentIdP is an identity provider for AI agents.

usage:
  agentidp                          serve
  agentidp bootstrap EMAIL          register the first agent, print its client_id and client_secret
  agentidp verify-audit [CHECKPOINT]  check the audit log, also against a checkpoint kept elsewhere
  agentidp keygen                   print a new signing key
  agentidp healthcheck              ask the server on this machine for its health
  agentidp -version
  agentidp -h

environment (* is required; the first four also as NAME_FILE, a file that holds the value):
`

// run is the program, with the operating system passed in.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	command, rest := "", args
	if len(args) > 0 {
		command, rest = args[0], args[1:]
	}
	switch {
	case command == "-h" || command == "-help" || command == "--help":
		fmt.Fprint(stdout, usage)
		for _, v := range variables {
			fmt.Fprintf(stdout, "  %-24s%s\n", v.name+map[bool]string{true: " *"}[v.required], v.about)
		}
		return nil
	case command == "-version" || command == "--version":
		fmt.Fprintln(stdout, version())
		return nil
	case command == "keygen" && len(rest) == 0:
		key, err := newKeyPEM()
		fmt.Fprintf(stdout, "%s", key)
		return err
	case command == "healthcheck" && len(rest) == 0:
		return checkHealth(ctx, getenv)
	case command == "", command == "bootstrap" && len(rest) == 1, command == "verify-audit" && len(rest) <= 1:
	default:
		return fmt.Errorf("what is %q? -h tells what there is", strings.Join(args, " "))
	}
	cfg, err := loadConfig(getenv)
	if err != nil {
		return err
	}
	slog.SetDefault(slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: cfg.logLevel})))
	if command == "" {
		return serve(ctx, cfg)
	}
	s, err := open(ctx, cfg)
	if err != nil {
		return err
	}
	defer s.close()
	if command == "bootstrap" {
		return s.bootstrap(ctx, rest[0], stdout)
	}
	return s.verifyAudit(ctx, strings.Join(rest, ""), stdout)
}

func version() string {
	v := release
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				v += "+" + setting.Value[:min(12, len(setting.Value))]
			}
		}
	}
	return v
}

// checkHealth is for container images, which have no shell and no curl.
func checkHealth(ctx context.Context, getenv func(string) string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	host, port := getenv("HOST"), getenv("PORT")
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	if port == "" {
		port = "3000"
	}
	q, err := http.NewRequestWithContext(ctx, "GET", "http://"+net.JoinHostPort(host, port)+"/health", nil)
	if err != nil {
		return fmt.Errorf("checking health: %w", err)
	}
	answer, err := http.DefaultClient.Do(q)
	if err != nil {
		return fmt.Errorf("checking health: %w", err)
	}
	defer answer.Body.Close()
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
	listen            string // host:port
	corsOrigin        string // empty: none
	issuer            string
	tokenTTL          time.Duration
	rateLimit         int // requests a minute; 0 is none
	monthlyTokenLimit int // tokens; 0 is none
	maxAgents         int // that are not decommissioned; 0 is no limit
	retentionDays     int
	trustedProxies    []netip.Prefix
	logLevel          slog.Level
}

type variable struct {
	name     string
	required bool
	fallback string
	about    string
}

// variables are all that the program reads from its environment.
var variables = []variable{
	{"DATABASE_URL", true, "", "PostgreSQL, 14 or later: postgres://user:password@host:5432/agentidp"},
	{"REDIS_URL", true, "", "Redis, 6.2 or later, one database of it for this service alone: redis://default:password@host:6379/0"},
	{"JWT_PRIVATE_KEY", true, "", "RSA key that signs, as PEM; make one with: go run . keygen"},
	{"JWT_PUBLIC_KEY", false, "", "further RSA keys that verify and are published, as PEM blocks one after another"},
	{"PORT", false, "3000", "port to listen on"},
	{"HOST", false, "", "address to listen on; empty is all of them"},
	{"ISSUER", false, "", "base URL of the service as clients see it, without a slash at the end; empty is http://localhost:PORT"},
	{"TOKEN_TTL", false, "1h", "lifetime of a token, like 15m or in seconds, at most 24h"},
	{"RATE_LIMIT_PER_MINUTE", false, "100", "requests of a client, and failed authentications of an address; 0 is no limit"},
	{"MONTHLY_TOKEN_LIMIT", false, "10000", "tokens issued to a client in a calendar month (UTC); 0 is no limit"},
	{"MAX_AGENTS", false, "100", "agents that are not decommissioned; 0 is no limit"},
	{"RETENTION_DAYS", false, "90", "how far back the audit log is served"},
	{"CORS_ORIGIN", false, "", "origin whose pages may call the API; empty is none"},
	{"TRUSTED_PROXIES", false, "", "networks whose X-Forwarded-For counts, like 10.0.0.0/8,::1/128"},
	{"LOG_LEVEL", false, "info", "debug, info, warn or error"},
}

// An environment collects what is wrong with it.
type environment struct {
	getenv func(string) string
	wrong  []error
}

func (env *environment) complain(format string, args ...any) {
	env.wrong = append(env.wrong, fmt.Errorf(format, args...))
}

// value is that of a variable, or of the file that NAME_FILE names.
func (env *environment) value(name string) string {
	v := variables[slices.IndexFunc(variables, func(v variable) bool { return v.name == name })]
	value, file := env.getenv(name), ""
	if i := slices.IndexFunc(variables, func(v variable) bool { return v.name == name }); i < 4 {
		file = env.getenv(name + "_FILE")
	}
	switch {
	case value != "" && file != "":
		env.complain("%s and %s_FILE are both set", name, name)
	case file != "":
		content, err := os.ReadFile(file)
		if err != nil {
			env.complain("%s_FILE: %w", name, err)
			return ""
		}
		value = strings.TrimSuffix(strings.TrimSuffix(string(content), "\n"), "\r")
	}
	if value == "" && file == "" && v.required {
		env.complain("%s is missing: %s", name, v.about)
	}
	if value == "" {
		value = v.fallback
	}
	return value
}

func (env *environment) number(name string, least, most int) int {
	n, err := strconv.Atoi(env.value(name))
	if err != nil || n < least || n > most {
		env.complain("%s must be a whole number from %d to %d", name, least, most)
	}
	return n
}

// loadConfig reports every fault at once, and repeats no value of a secret.
func loadConfig(getenv func(string) string) (config, error) {
	env := &environment{getenv: getenv}
	var cfg config
	var err error
	if value := env.value("DATABASE_URL"); value != "" {
		if cfg.database, err = pgxpool.ParseConfig(value); err != nil {
			env.complain("DATABASE_URL is no URL of a PostgreSQL database")
		}
	}
	if value := env.value("REDIS_URL"); value != "" {
		if cfg.redis, err = redis.ParseURL(value); err != nil {
			env.complain("REDIS_URL is no URL of a Redis database")
		}
	}
	private, public := env.value("JWT_PRIVATE_KEY"), env.value("JWT_PUBLIC_KEY")
	if private != "" {
		if cfg.keys, err = parseKeys(private, public); err != nil {
			env.complain("JWT_PRIVATE_KEY, JWT_PUBLIC_KEY: %w", err)
		}
	}
	port := env.number("PORT", 0, 65535)
	cfg.listen = net.JoinHostPort(env.value("HOST"), strconv.Itoa(port))
	if cfg.issuer = env.value("ISSUER"); cfg.issuer == "" {
		cfg.issuer = "http://localhost:" + strconv.Itoa(port)
	}
	if u, err := url.Parse(cfg.issuer); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" ||
		u.User != nil || strings.ContainsAny(cfg.issuer, "?#\"\\ ") || strings.HasSuffix(cfg.issuer, "/") {
		env.complain("ISSUER must be an https or http URL without a query, a fragment and a slash at the end")
	}
	cfg.tokenTTL = env.duration("TOKEN_TTL", time.Second, maxTokenTTL)
	cfg.rateLimit = env.number("RATE_LIMIT_PER_MINUTE", 0, 1_000_000)
	cfg.monthlyTokenLimit = env.number("MONTHLY_TOKEN_LIMIT", 0, 1_000_000_000)
	cfg.maxAgents = env.number("MAX_AGENTS", 0, 1_000_000_000)
	cfg.retentionDays = env.number("RETENTION_DAYS", 1, 36500)
	cfg.corsOrigin = env.value("CORS_ORIGIN")
	if u, err := url.Parse(cfg.corsOrigin); cfg.corsOrigin != "" && (err != nil || u.Host == "" || u.Scheme+"://"+u.Host != cfg.corsOrigin) {
		env.complain("CORS_ORIGIN must be one origin like https://console.example.com")
	}
	for _, text := range strings.FieldsFunc(env.value("TRUSTED_PROXIES"), func(c rune) bool { return c == ',' || c == ' ' }) {
		network, err := netip.ParsePrefix(text)
		if err != nil {
			env.complain("TRUSTED_PROXIES must be networks like 10.0.0.0/8, separated by commas")
		}
		cfg.trustedProxies = append(cfg.trustedProxies, network)
	}
	if cfg.logLevel.UnmarshalText([]byte(env.value("LOG_LEVEL"))) != nil {
		env.complain("LOG_LEVEL must be debug, info, warn or error")
	}
	if len(env.wrong) > 0 {
		env.complain("to have all of it set up for development: make run")
		return cfg, fmt.Errorf("the environment is not complete:\n%w", errors.Join(env.wrong...))
	}
	return cfg, nil
}

func (env *environment) duration(name string, least, most time.Duration) time.Duration {
	value := env.value(name)
	d, err := time.ParseDuration(value)
	if seconds, secondsErr := strconv.Atoi(value); secondsErr == nil && seconds < 1<<31 {
		d, err = time.Duration(seconds)*time.Second, nil
	}
	if err != nil || d < least || d > most {
		env.complain("%s must be from %s to %s", name, least, most)
	}
	return d
}

// A querier is what a pool and a transaction share.
type querier interface {
	Exec(context.Context, string, ...any) (pgconn.CommandTag, error)
	Query(context.Context, string, ...any) (pgx.Rows, error)
	QueryRow(context.Context, string, ...any) pgx.Row
}

// A server holds nothing that another copy would need.
type server struct {
	cfg      config
	keys     *keyset
	db       *pgxpool.Pool // for requests, which hold one connection at most and wait for nothing with it
	inner    *pgxpool.Pool // for the recorder and the keeper, which requests must not hold up
	redis    *cache
	vault    *vault
	recorder *recorder

	postgresUp, redisUp, draining atomic.Bool
}

// open connects to both stores and applies the schema. It waits for PostgreSQL
// for a minute. Redis may be out of reach: the service does without.
func open(ctx context.Context, cfg config) (*server, error) {
	cfg.database.ConnConfig.ConnectTimeout = storeTimeout
	db, err := pgxpool.NewWithConfig(ctx, cfg.database)
	if err != nil {
		return nil, fmt.Errorf("opening the database: %w", err)
	}
	own := cfg.database.Copy()
	own.MaxConns = 2
	inner, err := pgxpool.NewWithConfig(ctx, own)
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("opening the database: %w", err)
	}
	options := *cfg.redis
	options.DialTimeout, options.ReadTimeout, options.WriteTimeout = redisTimeout, redisTimeout, redisTimeout
	options.PoolTimeout, options.ContextTimeoutEnabled, options.MaxRetries = redisTimeout, true, -1
	options.DisableIdentity = true
	options.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	s := &server{
		cfg: cfg, keys: cfg.keys, db: db, inner: inner, redis: &cache{Client: redis.NewClient(&options)},
		vault: newVault(), recorder: newRecorder(inner),
	}
	if err := s.prepare(ctx); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// prepare waits for PostgreSQL and applies the schema, one copy at a time.
func (s *server) prepare(ctx context.Context) error {
	for begun := time.Now(); ; {
		ping, cancel := context.WithTimeout(ctx, storeTimeout)
		err := s.inner.Ping(ping)
		cancel()
		if err == nil {
			break
		}
		if time.Since(begun) > time.Minute || ctx.Err() != nil {
			return fmt.Errorf("waiting for PostgreSQL: %w", err)
		}
		slog.Warn("waiting for PostgreSQL", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err := pgx.BeginFunc(ctx, s.inner, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `select pg_advisory_xact_lock($1)`, schemaLock); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, schema)
		return err
	})
	if err != nil {
		return fmt.Errorf("applying the schema: %w", err)
	}
	return nil
}

// close stores what is recorded and lets go of both stores.
func (s *server) close() {
	s.recorder.close()
	s.redis.Close()
	s.inner.Close()
	s.db.Close()
}

// serve serves until ctx ends, and then finishes what has begun.
func serve(ctx context.Context, cfg config) error {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.listen)
	if err != nil {
		return fmt.Errorf("%w; PORT and HOST choose another address", err)
	}
	defer listener.Close()
	s, err := open(ctx, cfg)
	if err != nil {
		return err
	}
	defer s.close()
	keeping, stopKeeping := context.WithCancel(context.WithoutCancel(ctx))
	kept := make(chan struct{})
	go func() { defer close(kept); s.keep(keeping) }()
	defer func() { stopKeeping(); <-kept }()
	s.postgresUp.Store(true)

	web := s.web()
	failed := make(chan error, 1)
	go func() { failed <- web.Serve(listener) }()
	slog.Info("serving", "url", cfg.issuer, "address", listener.Addr().String(), "version", version())
	select {
	case err := <-failed:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	}
	slog.Info("stopping")
	s.draining.Store(true)
	time.Sleep(drainTime) // who asks for our health sends no more
	finish, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*requestTimeout)
	defer cancel()
	if err := web.Shutdown(finish); err != nil {
		web.Close()
		return fmt.Errorf("stopping: %w", err)
	}
	slog.Info("stopped")
	return nil
}

func (s *server) web() *http.Server {
	return &http.Server{
		Handler:           s.front(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      20 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
}

// A request is one that the front has let in.
type request struct {
	*http.Request
	id     string     // for the log, the audit log and the answer
	addr   netip.Addr // of the client
	form   url.Values // at the token endpoints
	caller caller
}

// A handler has written an answer or returns an error, never both.
type handler func(http.ResponseWriter, *request) error

// A route is what can be called, by whom, and how. Who identifies the caller,
// counts it for its limit, and refuses it where it must.
type route struct {
	pattern string
	who     handler
	handle  handler
	form    envelope
	records action // that a refusal of it is recorded as; "" where it changes nothing
}

type envelope bool

const (
	rest  envelope = false // {"code", "message", "details"}
	oauth envelope = true  // {"error", "error_description"} (RFC 6749, section 5.2)
)

// routes is the whole attack surface: what can be called, by whom.
func (s *server) routes() []route {
	return []route{
		{"POST /api/v1/agents", s.bearer(agentsWrite), s.createAgent, rest, agentCreated},
		{"GET /api/v1/agents", s.bearer(agentsRead), s.listAgents, rest, ""},
		{"GET /api/v1/agents/{agentId}", s.bearerOrSelf(agentsRead, ""), s.getAgent, rest, ""},
		{"PATCH /api/v1/agents/{agentId}", s.bearer(agentsWrite), s.updateAgent, rest, agentUpdated},
		{"DELETE /api/v1/agents/{agentId}", s.bearer(agentsWrite), s.decommissionAgent, rest, agentDecommissioned},

		{"POST /api/v1/agents/{agentId}/credentials", s.bearerOrSelf(agentsWrite, credentialsWrite), s.createCredential, rest, credentialGenerated},
		{"GET /api/v1/agents/{agentId}/credentials", s.bearerOrSelf(agentsWrite, credentialsWrite), s.listCredentials, rest, ""},
		{"POST /api/v1/agents/{agentId}/credentials/{credentialId}/rotate", s.bearerOrSelf(agentsWrite, credentialsWrite), s.rotateCredential, rest, credentialRotated},
		{"DELETE /api/v1/agents/{agentId}/credentials/{credentialId}", s.bearerOrSelf(agentsWrite, credentialsWrite), s.revokeCredential, rest, credentialRevoked},

		{"POST /api/v1/token", s.client, s.issueToken, oauth, tokenIssued},
		{"POST /api/v1/token/introspect", s.bearerOrClient(tokensRead), s.introspectToken, oauth, tokenIntrospected},
		{"POST /api/v1/token/revoke", s.bearerOrClient(""), s.revokeToken, oauth, tokenRevoked},
		{"GET /api/v1/authorize", public, refuseAuthorization, oauth, ""},

		{"GET /api/v1/audit", s.bearer(auditRead), s.listEvents, rest, ""},
		{"GET /api/v1/audit/verify", s.bearer(auditRead), s.verifyEvents, rest, ""},
		{"GET /api/v1/audit/{eventId}", s.bearer(auditRead), s.getEvent, rest, ""},

		{"GET /.well-known/jwks.json", public, s.showKeys, rest, ""},
		{"GET /.well-known/oauth-authorization-server", public, s.showMetadata, rest, ""},
		{"GET /health", public, s.showHealth, rest, ""},
		{"GET /livez", public, s.showLife, rest, ""},
		{"GET /readyz", public, s.showHealth, rest, ""},
	}
}

func public(http.ResponseWriter, *request) error { return nil }

// bearer lets in who has a token that carries scope.
func (s *server) bearer(scope string) handler {
	return func(w http.ResponseWriter, r *request) error {
		if err := s.identify(w, r); err != nil {
			return err
		}
		return r.caller.need(scope)
	}
}

// bearerOrSelf lets in who has a token that carries scope, and the agent of
// the path, whose token must carry own where that isn't empty.
func (s *server) bearerOrSelf(scope, own string) handler {
	return func(w http.ResponseWriter, r *request) error {
		if err := s.identify(w, r); err != nil {
			return err
		}
		if r.caller.agentID == r.PathValue("agentId") && (own == "" || r.caller.has(own)) {
			return nil
		}
		return r.caller.need(scope)
	}
}

// client lets in who authenticates as a client, within the limit that the
// handler counts together with the quota.
func (s *server) client(w http.ResponseWriter, r *request) error {
	if err := r.parseForm(); err != nil {
		return err
	}
	if err := r.oneAuthorization(); err != nil {
		return err
	}
	return s.authenticateClient(w, r)
}

// bearerOrClient lets in who has a token, or authenticates as a client. A
// scope that isn't empty must be carried by the token, or held by the agent.
func (s *server) bearerOrClient(scope string) handler {
	return func(w http.ResponseWriter, r *request) error {
		if err := r.parseForm(); err != nil {
			return err
		}
		if !r.presents("Bearer") {
			if err := s.client(w, r); err != nil {
				return err
			}
			if _, err := s.spend(w, r, ""); err != nil {
				return err
			}
		} else if r.form.Get("client_secret") != "" {
			return errTwoMethods
		} else if err := s.identify(w, r); err != nil {
			return err
		}
		return r.caller.need(scope)
	}
}

// need refuses a caller that lacks a scope.
func (c caller) need(scope string) error {
	if scope == "" || c.has(scope) {
		return nil
	}
	p := errForbidden.because("This needs the scope " + scope + ".")
	p.scope = scope
	return p
}

// presents tells whether the request has credentials of an HTTP scheme.
func (r *request) presents(scheme string) bool {
	have, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(have, scheme)
}

func (r *request) oneAuthorization() error {
	if len(r.Header.Values("Authorization")) > 1 {
		return errTwoMethods
	}
	return nil
}

var (
	requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	pathPattern      = regexp.MustCompile(`^[A-Za-z0-9/._-]+$`) // of every route, and of every id
)

// front stands before the mux. Only a clean path reaches that, or it would
// redirect, and a client would send its secret twice.
func (s *server) front() http.Handler {
	mux := http.NewServeMux()
	for _, rt := range s.routes() {
		mux.HandleFunc(rt.pattern, func(w http.ResponseWriter, r *http.Request) { s.answer(rt, w, r) })
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := r.URL.EscapedPath()
		missing := route{pattern: "none", who: public, form: envelope(strings.HasPrefix(p, "/api/v1/token"))}
		missing.handle = func(http.ResponseWriter, *request) error { return errNotFound }
		if !pathPattern.MatchString(p) || path.Clean(p) != p {
			s.answer(missing, w, r)
			return
		}
		if s.allowOrigin(w, r) {
			return
		}
		found, pattern := mux.Handler(r)
		if pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		refusal := &headerOnly{header: http.Header{}}
		found.ServeHTTP(refusal, r)
		if refusal.status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", refusal.header.Get("Allow"))
			missing.handle = func(http.ResponseWriter, *request) error { return errMethod }
		}
		s.answer(missing, w, r)
	})
}

// allowOrigin tells a browser that pages of CORS_ORIGIN may call, and answers
// its preflight (fetch.spec.whatwg.org, section 3.3).
func (s *server) allowOrigin(w http.ResponseWriter, r *http.Request) (answered bool) {
	if s.cfg.corsOrigin == "" {
		return false
	}
	h := w.Header()
	h.Add("Vary", "Origin")
	if r.Header.Get("Origin") != s.cfg.corsOrigin {
		return false
	}
	h.Set("Access-Control-Allow-Origin", s.cfg.corsOrigin)
	h.Set("Access-Control-Expose-Headers", "Retry-After, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, X-Request-Id")
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		return false
	}
	h.Set("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE")
	h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id")
	h.Set("Access-Control-Max-Age", "600")
	w.WriteHeader(http.StatusNoContent)
	return true
}

// headerOnly takes from an answer of the mux what we say in our own form.
type headerOnly struct {
	header http.Header
	status int
}

func (h *headerOnly) Header() http.Header         { return h.header }
func (h *headerOnly) WriteHeader(status int)      { h.status = status }
func (h *headerOnly) Write(b []byte) (int, error) { return len(b), nil }

// statusWriter remembers the status for the log.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// answer takes a request along its route. What has begun is finished, also
// when the client has gone: it may have been acknowledged to somebody else.
func (s *server) answer(rt route, out http.ResponseWriter, in *http.Request) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(in.Context()), requestTimeout)
	defer cancel()
	r := &request{Request: in.WithContext(ctx), id: in.Header.Get("X-Request-Id"), addr: clientAddress(in, s.cfg.trustedProxies)}
	if !requestIDPattern.MatchString(r.id) {
		r.id = newID()
	}
	r.Body = http.MaxBytesReader(out, in.Body, maxBody)
	w := &statusWriter{out, http.StatusOK}
	h := w.Header()
	h.Set("X-Request-Id", r.id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	if s.draining.Load() {
		h.Set("Connection", "close")
	}
	code := ""
	defer func() {
		if p := recover(); p != nil {
			slog.Error("panic", "requestId", r.id, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			code = s.fail(w, r, rt, errInternal)
		}
		slog.Info("request", "method", in.Method, "route", rt.pattern, "status", w.status, "code", code,
			"ms", float64(time.Since(begun).Microseconds())/1000, "requestId", r.id,
			"clientId", r.caller.agentID, "ip", r.addr.String())
	}()
	err := rt.who(w, r)
	if err == nil {
		err = rt.handle(w, r)
	}
	if err != nil {
		code = s.fail(w, r, rt, s.recordRefusal(rt, r, err))
	}
}

// recordRefusal records that an authenticated caller was refused a change.
func (s *server) recordRefusal(rt route, r *request, err error) error {
	p, ok := errors.AsType[*problem](err)
	if !ok || p.status != http.StatusForbidden && p.status != http.StatusConflict || rt.records == "" || r.caller.agentID == "" {
		return err
	}
	concerned, f := r.PathValue("agentId"), facts{"reason": p.code}
	if rt.form == oauth {
		concerned, f["reason"] = r.caller.agentID, p.oauth
	}
	if id := r.PathValue("credentialId"); isID(id) {
		f["credentialId"] = id
	}
	if !isID(concerned) {
		concerned = ""
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
	errValidation = &problem{status: 400, code: "VALIDATION_ERROR", message: "The request has faults."}
	errTwoMethods = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_request", message: "Authenticate in one way: one Authorization header, or a secret in the form."}
	errTwoClients = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_request", message: "The client_id in the form is not that of the Authorization header."}
	errForm       = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_request", message: "The form has faults."}
	errGrantType  = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "unsupported_grant_type", message: "The only grant_type here is client_credentials."}
	errScope      = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_scope", message: "The scope has faults."}
	errResource   = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "invalid_target", message: "A resource must be an absolute URI without a fragment."}
	errNoRedirect = &problem{status: 400, code: "VALIDATION_ERROR", oauth: "unsupported_response_type", message: "There is no authorization endpoint here; agents use the client_credentials grant at the token endpoint."}
	errRetention  = &problem{status: 400, code: "RETENTION_WINDOW_EXCEEDED", message: "The audit log is not served that far back."}

	errNoToken        = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "A bearer token is needed in the Authorization header."}
	errInvalidToken   = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_token", message: "The token is expired, revoked, for another service, or no token."}
	errNoClient       = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "Client authentication is needed: HTTP Basic, or client_id and client_secret in the form."}
	errBadClient      = &problem{status: 401, code: "UNAUTHORIZED", oauth: "invalid_client", message: "Client authentication failed."}
	errClientInactive = &problem{status: 403, code: "AGENT_NOT_ACTIVE", oauth: "unauthorized_client", message: "The agent is not active."}
	errQuota          = &problem{status: 403, code: "FREE_TIER_LIMIT_EXCEEDED", oauth: "unauthorized_client", message: "The monthly quota is spent."}
	errForbidden      = &problem{status: 403, code: "FORBIDDEN", oauth: "insufficient_scope", message: "The token does not allow this."}
	errNotActive      = &problem{status: 403, code: "AGENT_NOT_ACTIVE", message: "The agent is not active."}
	errAgentLimit     = &problem{status: 403, code: "FREE_TIER_LIMIT_EXCEEDED", message: "No more agents can be registered; decommission one first."}

	errNotFound     = &problem{status: 404, code: "NOT_FOUND", oauth: "invalid_request", message: "There is nothing at this path."}
	errNoAgent      = &problem{status: 404, code: "AGENT_NOT_FOUND", message: "No agent has this id."}
	errNoCredential = &problem{status: 404, code: "CREDENTIAL_NOT_FOUND", message: "The agent has no credential of this id."}
	errNoEvent      = &problem{status: 404, code: "AUDIT_EVENT_NOT_FOUND", message: "No event that is served has this id."}
	errMethod       = &problem{status: 405, code: "METHOD_NOT_ALLOWED", oauth: "invalid_request", message: "The methods of this path are in the Allow header."}

	errAgentExists       = &problem{status: 409, code: "AGENT_ALREADY_EXISTS", message: "An agent with this email is registered."}
	errDecommissioned    = &problem{status: 409, code: "AGENT_ALREADY_DECOMMISSIONED", message: "The agent is decommissioned, which is final."}
	errCredentialRevoked = &problem{status: 409, code: "CREDENTIAL_ALREADY_REVOKED", message: "The credential is revoked, which is final."}

	errTooLarge       = &problem{status: 413, code: "PAYLOAD_TOO_LARGE", oauth: "invalid_request", message: "The body may have 64 kB."}
	errMediaType      = &problem{status: 415, code: "UNSUPPORTED_MEDIA_TYPE", message: "The Content-Type must be application/json."}
	errRateLimited    = &problem{status: 429, code: "RATE_LIMIT_EXCEEDED", oauth: "temporarily_unavailable", message: "Too many requests of this client; Retry-After says when to come back."}
	errAddressLimited = &problem{status: 429, code: "RATE_LIMIT_EXCEEDED", oauth: "temporarily_unavailable", message: "Too many failed authentications from this address; Retry-After says when to come back."}

	errInternal    = &problem{status: 500, code: "INTERNAL_SERVER_ERROR", oauth: "server_error", message: "Something went wrong here."}
	errUnavailable = &problem{status: 503, code: "SERVICE_UNAVAILABLE", oauth: "temporarily_unavailable", message: "A store does not answer; nothing was acknowledged. Try again."}
)

// fail answers with a problem and returns its code. What is no problem came
// from a store: nothing else can fail here. It is logged and a 503.
func (s *server) fail(w http.ResponseWriter, r *request, rt route, err error) string {
	p, ok := errors.AsType[*problem](err)
	if !ok {
		slog.Error("request failed", "requestId", r.id, "route", rt.pattern, "error", err)
		p = errUnavailable
	}
	h := w.Header()
	if p.status == http.StatusServiceUnavailable {
		h.Set("Retry-After", "1")
	}
	if p.status == http.StatusUnauthorized || p.scope != "" {
		challenge(h, r, rt.form, p)
	}
	code, body := p.code, any(struct {
		Code    string         `json:"code"`
		Message string         `json:"message"`
		Details map[string]any `json:"details,omitempty"`
	}{p.code, p.message, p.details})
	if rt.form == oauth {
		code, body = p.oauth, struct {
			Error       string `json:"error"`
			Description string `json:"error_description"`
		}{p.oauth, p.message}
	}
	if err := respond(w, p.status, body); err != nil {
		slog.Error("encoding an error", "requestId", r.id, "error", err)
	}
	return code
}

// challenge says how to authenticate: in the way that was tried (RFC 6749,
// section 5.2), with the reason beside it (RFC 6750, section 3), which isn't
// there where nothing was tried. A secret in the form has no challenge.
func challenge(h http.Header, r *request, form envelope, p *problem) {
	const realm = ` realm="agentidp"`
	reason := `, error="` + p.oauth + `", error_description="` + p.message + `"`
	if p.scope != "" {
		reason += `, scope="` + p.scope + `"`
	}
	switch {
	case r.presents("Bearer"):
		h.Set("WWW-Authenticate", "Bearer"+realm+reason)
	case form == rest:
		h.Set("WWW-Authenticate", "Bearer"+realm)
	case r.Header.Get("Authorization") != "":
		h.Set("WWW-Authenticate", "Basic"+realm+reason)
	case r.form.Get("client_secret") == "":
		h.Set("WWW-Authenticate", "Basic"+realm)
	}
}

// respond encodes to a buffer first, so that an answer is whole or an error.
func respond(w http.ResponseWriter, status int, v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encoding an answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(b.Len()))
	w.WriteHeader(status)
	w.Write(b.Bytes()) // an error means that the client has gone
	return nil
}

// faults say for each field what is wrong with it.
type faults map[string]any

func (bad faults) problem() error {
	if len(bad) == 0 {
		return nil
	}
	return errValidation.with(bad)
}

func (bad faults) checkOneOf(name string, value *string, allowed []string) {
	if value != nil && !slices.Contains(allowed, *value) {
		bad[name] = "must be one of " + strings.Join(allowed, ", ")
	}
}

func bodyProblem(err error) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return errTooLarge
	}
	return errForm.because("The body could not be read.")
}

// decode reads a body: one JSON object with the names of T, each once and
// spelled as T spells it, none null, in valid UTF-8 without NUL, and nothing
// after it. It reports every fault at once.
func decode[T interface{ check(faults) }](r *request) (T, error) {
	var q T
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return q, errMediaType
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return q, bodyProblem(err)
	}
	allowed := map[string]json.RawMessage{}
	if names, err := json.Marshal(q); err != nil || json.Unmarshal(names, &allowed) != nil {
		return q, fmt.Errorf("listing the names of a request: %w", err)
	}
	fields, ok := splitObject(body)
	if !ok {
		return q, errValidation.because("The body must be one JSON object in UTF-8, without repeated names, and nothing after it.")
	}
	bad := faults{}
	for name, value := range fields {
		switch _, known := allowed[name]; {
		case !known:
			bad[clip(name)] = "is not a field of this request"
		case string(value) == "null":
			bad[name] = "must not be null"
		case bytes.Contains(value, []byte(`\u0000`)):
			bad[name] = "must not contain NUL"
		default:
			if err := json.Unmarshal([]byte(`{"`+name+`":`+string(value)+`}`), &q); err != nil {
				bad[name] = "is of the wrong type"
			}
		}
	}
	checked := faults{}
	q.check(checked)
	for name, fault := range checked { // the first fault of a field says more
		if _, have := bad[name]; !have && (name != "body" || len(fields) == 0) {
			bad[name] = fault
		}
	}
	return q, bad.problem()
}

// splitObject takes one JSON object apart. Go's decoder alone would let
// repeated names and invalid UTF-8 pass.
func splitObject(body []byte) (map[string]json.RawMessage, bool) {
	d := json.NewDecoder(bytes.NewReader(body))
	if t, err := d.Token(); err != nil || t != json.Delim('{') || !utf8.Valid(body) {
		return nil, false
	}
	fields := map[string]json.RawMessage{}
	for d.More() {
		t, err := d.Token()
		name, _ := t.(string)
		var value json.RawMessage
		if err != nil || d.Decode(&value) != nil {
			return nil, false
		}
		if _, again := fields[name]; again {
			return nil, false
		}
		fields[name] = value
	}
	if _, err := d.Token(); err != nil { // the closing brace
		return nil, false
	}
	_, err := d.Token()
	return fields, err == io.EOF
}

const countedTo = 10_000 // rows of a list; beyond, counting costs more than it tells

// A query is that of a list, checked.
type query struct {
	values      map[string]*string // nil where it is not asked for
	page, limit int
}

func (q query) offset() int { return (q.page - 1) * q.limit }

// parseQuery reads the parameters of these names, each at most once.
func parseQuery(r *request, names ...string) (query, error) {
	q := query{values: map[string]*string{}, page: 1, limit: 20}
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return q, errValidation.because("The query has a bad escape, or a ';'.")
	}
	bad := faults{}
	for name, list := range values {
		switch {
		case !slices.Contains(names, name):
			sort.Strings(names)
			bad[clip(name)] = "is not a parameter here; there are " + strings.Join(names, ", ")
		case len(list) > 1:
			bad[name] = "must be there once"
		case !utf8.ValidString(list[0]) || strings.Contains(list[0], "\x00"):
			bad[name] = "must be UTF-8 without NUL"
		default:
			q.values[name] = &list[0]
		}
	}
	bad.number("page", q.values["page"], countedTo, &q.page)
	bad.number("limit", q.values["limit"], 100, &q.limit)
	if len(bad) == 0 && q.page*q.limit > countedTo {
		bad["page"] = "goes beyond the 10,000th row; read on by cursor where there is one, or ask for less"
	}
	return q, bad.problem()
}

func (bad faults) number(name string, value *string, most int, n *int) {
	if value == nil {
		return
	}
	v, err := strconv.Atoi(*value)
	if err != nil || v < 1 || v > most || strconv.Itoa(v) != *value {
		bad[name] = "must be a whole number from 1 to " + strconv.Itoa(most)
		return
	}
	*n = v
}

// A page of a list.
type page[T any] struct {
	Data   []T  `json:"data"`
	Total  int  `json:"total"`
	Capped bool `json:"totalCapped,omitempty"` // there are more than total
	Page   int  `json:"page"`
	Limit  int  `json:"limit"`
}

func newPage[T any](q query, data []T, total int) page[T] {
	if data == nil {
		data = []T{}
	}
	return page[T]{data, min(total, countedTo), total > countedTo, q.page, q.limit}
}

// count counts the rows of a query that begins with its from, to one more than
// countedTo.
func (s *server) count(ctx context.Context, from string, args ...any) (n int, err error) {
	err = s.db.QueryRow(ctx, `select count(*) from (select 1 `+from+` limit 10001) as counted`, plannedOnce(args)...).Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("counting: %w", err)
	}
	return n, nil
}

// plannedOnce has a query planned for just these arguments: a plan that fits
// all filters fits none.
func plannedOnce(args []any, more ...any) []any {
	return slices.Concat([]any{pgx.QueryExecModeExec}, args, more)
}

// A change is a transaction that changes something.
type change struct {
	pgx.Tx
	revocations []revocation // to be told to Redis once they are committed
}

// change does something and records it in one transaction, and returns when
// what it revoked is refused by every copy. An event without an action is none.
func (s *server) change(r *request, do func(context.Context, *change) (event, error)) error {
	ctx, tx := r.Context(), &change{}
	err := pgx.BeginFunc(ctx, s.db, func(begun pgx.Tx) error {
		tx.Tx = begun
		e, err := do(ctx, tx)
		if err != nil || e.Action == "" {
			return err
		}
		if e, err = e.by(r); err != nil {
			return err
		}
		return appendEvents(ctx, tx, []event{e})
	})
	if err != nil {
		return err
	}
	s.publish(ctx, tx.revocations)
	return nil
}

var idPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// isID tells whether s is a UUID in the one form that we write: PostgreSQL
// takes others, and a limit or a lock-out must not have several keys.
func isID(s string) bool { return idPattern.MatchString(s) }

// newID makes a UUID of version 7, which sorts by time (RFC 9562, section 5.7).
func newID() string {
	var b [16]byte
	rand.Read(b[6:])
	ms := time.Now().UnixMilli()
	for i := range 6 {
		b[i] = byte(ms >> (40 - 8*i))
	}
	b[6] = b[6]&0x0f | 0x70
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b[:])
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

// clip makes a piece of a request fit for an error message.
func clip(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			return '?'
		}
		return c
	}, s[:min(len(s), 100)])
}

func (s *server) showLife(w http.ResponseWriter, _ *request) error {
	return respond(w, http.StatusOK, health{Status: "ok", Version: version()})
}

type health struct {
	Status   string            `json:"status"`
	Version  string            `json:"version"`
	Services map[string]string `json:"services,omitempty"`
}

// showHealth tells what the keeper has found within the last seconds, so that
// asking costs nothing.
func (s *server) showHealth(w http.ResponseWriter, _ *request) error {
	word := map[bool]string{true: "up", false: "down"}
	postgres, redis := s.postgresUp.Load(), s.redisUp.Load()
	h := health{"ok", version(), map[string]string{"postgres": word[postgres], "redis": word[redis]}}
	status := http.StatusOK
	switch {
	case s.draining.Load():
		h.Status, status = "stopping", http.StatusServiceUnavailable
	case !postgres:
		h.Status, status = "unavailable", http.StatusServiceUnavailable
	case !redis:
		h.Status = "degraded"
	}
	return respond(w, status, h)
}

// showKeys is RFC 7517. A key has to be published for as long as this answer
// may be cached before it signs.
func (s *server) showKeys(w http.ResponseWriter, _ *request) error {
	w.Header().Set("Cache-Control", "public, max-age=300")
	return respond(w, http.StatusOK, map[string]any{"keys": s.keys.jwks()})
}

// showMetadata is RFC 8414. Response types, challenge methods and the
// authorization endpoint, which refuses, are there for client libraries that
// don't accept a server without.
func (s *server) showMetadata(w http.ResponseWriter, _ *request) error {
	w.Header().Set("Cache-Control", "public, max-age=300")
	secret := []string{"client_secret_basic", "client_secret_post"}
	return respond(w, http.StatusOK, map[string]any{
		"issuer":                                        s.cfg.issuer,
		"authorization_endpoint":                        s.cfg.issuer + "/api/v1/authorize",
		"token_endpoint":                                s.cfg.issuer + "/api/v1/token",
		"introspection_endpoint":                        s.cfg.issuer + "/api/v1/token/introspect",
		"revocation_endpoint":                           s.cfg.issuer + "/api/v1/token/revoke",
		"jwks_uri":                                      s.cfg.issuer + "/.well-known/jwks.json",
		"grant_types_supported":                         []string{"client_credentials"},
		"response_types_supported":                      []string{"none"},
		"code_challenge_methods_supported":              []string{"S256"},
		"scopes_supported":                              ourScopes,
		"token_endpoint_auth_methods_supported":         secret,
		"introspection_endpoint_auth_methods_supported": secret,
		"revocation_endpoint_auth_methods_supported":    secret,
	})
}

func refuseAuthorization(http.ResponseWriter, *request) error { return errNoRedirect }
