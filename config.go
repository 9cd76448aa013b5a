package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
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
