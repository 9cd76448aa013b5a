package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// A config is the environment, checked.
type config struct {
	database          *pgxpool.Config
	redis             *redis.Options
	sentinel          *redis.FailoverOptions // in its place, where REDIS_URL names a master
	keys              *keyset
	workloads         workloadConfig
	host, corsOrigin  string
	issuer            string
	tokenTTL          time.Duration
	drainTime         time.Duration // between "not ready" and closing the port
	port              int
	rateLimit         int // requests a minute; 0 is no limit
	monthlyTokenLimit int // tokens; 0 is no limit
	maxAgents         int // that are not decommissioned; 0 is no limit
	retentionDays     int
	trustedProxies    []netip.Prefix
	metrics           *net.TCPAddr // where to serve them; nil is nowhere
	logLevel          slog.Level
}

// wellKnown is where metadata of an issuer are, whose path goes behind (RFC 8414,
// section 3.1; RFC 9728, section 3.1).
func (cfg config) wellKnown(name string) string {
	return strings.TrimSuffix(cfg.issuer, cfg.path()) + "/.well-known/" + name + cfg.path()
}

// path is that of the issuer: "" or "/" and more.
func (cfg config) path() string {
	u, err := url.Parse(cfg.issuer)
	if err != nil {
		return ""
	}
	return u.Path
}

func (cfg config) listen() string { return net.JoinHostPort(cfg.host, strconv.Itoa(cfg.port)) }

const filed = 5 // variables that may be in a file

// A variable of the environment. Where preset is *, a value is required.
type variable struct {
	name, preset, about string
	set                 func(value string) error
}

// variables are all that the program reads from its environment, into cfg. The
// first filed can also be given as NAME_FILE.
func (cfg *config) variables() []variable {
	return []variable{
		{"DATABASE_URL", "*", "a PostgreSQL database, 14 or later, as createdb makes one: postgres://user:password@host:5432/agentidp", into(&cfg.database, parseDatabase)},
		{"REDIS_URL", "*", "a Redis database, 6.2 or later, for this service alone, as redis-server has 16: redis://default:password@host:6379/0", cfg.parseRedis},
		{"JWT_PRIVATE_KEY", "*", "the key that signs, as PEM: RSA of 2048 bits or more (RS256), or P-256 (ES256); make one with: go run . keygen", into(&cfg.keys, newKeyset)},
		{"JWT_PUBLIC_KEY", "", "further keys that verify and are published, as PEM blocks one after another", func(v string) error { return cfg.keys.publish(v) }},
		{"WORKLOAD_ISSUERS", "", `issuers that are trusted to say which workload somebody is, as JSON: {"https://issuer.example.com": {"jwksUri": "https://..."}}; or "jwks", beside it "singleUse" and "allowPrivate"`, into(&cfg.workloads, parseWorkloads)},
		{"PORT", "3000", "port to listen on, from 0 to 65535", into(&cfg.port, parseWhole(0, 65535))},
		{"HOST", "", "address to listen on; all of them if empty", func(v string) error { cfg.host = strings.Trim(v, "[]"); return nil }},
		{"ISSUER", "", "URL of the service as clients see it, without a slash at the end; http://localhost:PORT if empty", into(&cfg.issuer, parseIssuer)},
		{"TOKEN_TTL", "1h", "lifetime of a token, like 90s, 15m or 1h, or in seconds; from 1s to 24h", into(&cfg.tokenTTL, parseDuration(time.Second, maxTokenTTL))},
		{"RATE_LIMIT_PER_MINUTE", "100", "requests of a client, and failed authentications of an address; 0 is no limit", into(&cfg.rateLimit, parseWhole(0, 1e6))},
		{"MONTHLY_TOKEN_LIMIT", "10000", "tokens issued to a client in a calendar month (UTC); 0 is no limit", into(&cfg.monthlyTokenLimit, parseWhole(0, 1e9))},
		{"MAX_AGENTS", "100", "agents that are not decommissioned; 0 is no limit", into(&cfg.maxAgents, parseWhole(0, 1e9))},
		{"RETENTION_DAYS", "90", "how many days of the audit log are served, from 1", into(&cfg.retentionDays, parseWhole(1, 36500))},
		{"CORS_ORIGIN", "", "origin like https://console.example.com whose pages may call the API; none if empty", into(&cfg.corsOrigin, parseOrigin)},
		{"TRUSTED_PROXIES", "", "networks whose X-Forwarded-For counts, like 10.0.0.0/8,192.0.2.7/32,::1/128", into(&cfg.trustedProxies, parseNetworks)},
		{"METRICS_ADDR", "127.0.0.1:9090", "host:port to serve /metrics on, for Prometheus; nowhere if set to nothing", into(&cfg.metrics, parseAddress)},
		{"DRAIN_TIME", "10s", "how long a copy that stops is not ready, and still serves, so that its balancer notices; from 0s to 5m", into(&cfg.drainTime, parseDuration(0, 5*time.Minute))},
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

// shownPattern is what is shown of a value that is no secret: too short and plain
// for one that stands in the wrong variable.
var shownPattern = regexp.MustCompile(`^[A-Za-z0-9.:/, -]{1,20}$`)

// loadConfig reports every fault at once, of the variables that are needed (none:
// of all), and repeats no part of a secret. What sets one of the first filed says
// in words of ours why it can't, since those of a driver quote.
func loadConfig(getenv func(string) (string, bool), needed ...string) (config, error) {
	var cfg config
	var wrong []error
	for i, v := range cfg.variables() {
		if needed != nil && !slices.Contains(needed, v.name) {
			continue
		}
		value, fault := v.read(getenv, i < filed)
		if fault == nil && value != "" {
			if reason := v.set(value); reason != nil {
				if fault = errors.New("is not right"); i < filed {
					fault = fmt.Errorf("is not right, %w", reason)
				} else if shownPattern.MatchString(value) {
					fault = errors.New("is not right, it was " + value)
				}
			}
		}
		if fault != nil {
			wrong = append(wrong, fmt.Errorf("%s %w: %s", v.name, fault, v.about))
		}
	}
	if cfg.issuer == "" {
		cfg.issuer = fmt.Sprintf("http://localhost:%d", cfg.port)
	}
	if cfg.workloads.issuers[cfg.issuer] != nil {
		wrong = append(wrong, errors.New("WORKLOAD_ISSUERS is not right, it has ISSUER itself"))
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
		if value == "" && v.name != "JWT_PUBLIC_KEY" { // of which there may be none; else one that is half written
			return "", errors.New("has an empty file")
		}
	}
	switch {
	case value != "" || set && v.name == "METRICS_ADDR":
		return value, nil
	case v.preset == "*":
		return "", errors.New("is missing")
	}
	return v.preset, nil
}

// Drivers differ in where a password ends that has one of these in it, and would
// take the rest for a host, which they look up and log.
var (
	storePattern = regexp.MustCompile(`^[a-z]+://([^@/?#]*@)?[^@#]*$`)
	errStoreURL  = errors.New("it can't be read as a URL: in a password @ is written %40, / %2F, ? %3F, # %23, % %25 and a space %20")
)

func parseDatabase(v string) (*pgxpool.Config, error) {
	cfg, err := pgxpool.ParseConfig(v)
	if isURL := strings.Contains(v, "://"); isURL && (err != nil || !storePattern.MatchString(v)) {
		err = errStoreURL
	} else if err != nil {
		err = errors.New("it is neither a postgres:// URL nor host=... user=..., where what has a space is in single quotes")
	}
	return cfg, err
}

func (cfg *config) parseRedis(v string) (err error) {
	if cfg.sentinel, err = redis.ParseFailoverURL(v); err != nil || cfg.sentinel.MasterName == "" {
		cfg.sentinel = nil
		cfg.redis, err = redis.ParseURL(v)
	}
	if err != nil || !storePattern.MatchString(v) {
		return errStoreURL
	}
	return nil
}

// parseDuration reads a length of time, or seconds.
func parseDuration(least, most time.Duration) func(string) (time.Duration, error) {
	return func(v string) (time.Duration, error) {
		if _, notSeconds := strconv.Atoi(v); notSeconds == nil {
			v += "s"
		}
		d, err := time.ParseDuration(v)
		if d < least || d > most {
			err = strconv.ErrRange
		}
		return d, err
	}
}

func parseIssuer(v string) (string, error) {
	u, err := url.Parse(v)
	if err == nil && (u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || strings.ContainsAny(v, `?#"\ `)) {
		err = strconv.ErrSyntax
	}
	if err == nil && u.Path != "" {
		ours := strings.HasPrefix(u.Path+"/", "/api/v1/") || strings.HasPrefix(u.Path, "/.well-known")
		if ours || path.Clean(u.Path) != u.Path || !pathPattern.MatchString(u.EscapedPath()) || strings.HasSuffix(v, "/") {
			err = strconv.ErrSyntax
		}
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
		if network.Addr().Is4In6() { // addresses are compared unmapped: it would hold none
			badErr = strconv.ErrSyntax
		}
		list, err = append(list, network), errors.Join(err, badErr)
	}
	return list, err
}
