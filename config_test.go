package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// goodEnvironment is enough to load a configuration.
func goodEnvironment() map[string]string {
	return map[string]string{
		"DATABASE_URL": "postgres://u:canary@127.0.0.1:1/db", "REDIS_URL": "redis://default:canary@127.0.0.1:1/0",
		"JWT_PRIVATE_KEY": testKey(),
	}
}

func TestVariablesAreChecked(t *testing.T) {
	for name, values := range map[string][]string{
		"DATABASE_URL": {
			"postgres://u:canary@h:notaport/db", "postgres://%zz", "host", "postgres://u:p@canary@127.0.0.1/db", "postgres://u:p/canary@127.0.0.1/db",
			"postgres://u:12#canary@h/db", "postgres://u:12?canary@h/db", "postgres://u:canary%s@h/db", "postgres://u:can ary@h/db",
			"host=h password=a canary", "u:canary@h/db", "postgres:/u:canary@h/db", "postgres://u:p@h/canary@x",
		},
		"REDIS_URL": {
			"http://u:canary@h", "redis://h/notanumber", "h:6379", "redis://h:1\n", "redis://default:p@canary@127.0.0.1:5/0",
			"redis://default:12#canary@h", "redis://default:12?canary@h:1", "redis://default:p/canary@127.0.0.1", "redis://h/0?password=canary@y&master_name=m",
			"redis://h/0?canary=1", "redis://h:26379?master_name=m&addr=canary",
		},
		"JWT_PRIVATE_KEY":       {"canary", testKey() + testKey(), strings.Replace(testKey(), "M", "N", 1), testKey()[:100]},
		"JWT_PUBLIC_KEY":        {"canary", testKey()},
		"PORT":                  {"-1", "65536", "http", "30 00", "0x10", "3000.0"},
		"ISSUER":                {"https://h/", "h", "//h", "ftp://h", "https://h?x", "https://h#x", "https://u:canary@h", "https://", `https://h"`, "https://h/api/v1", "https://h/api/v1/x", "https://h/.well-known", "https://h//x", "https://h/%41"},
		"TOKEN_TTL":             {"0", "-1", "-1s", "25h", "86401", "1 h", "forever", "9223372036854775808", "500ms"},
		"RATE_LIMIT_PER_MINUTE": {"-1", "many", "1.5", "9223372036854775808"},
		"MONTHLY_TOKEN_LIMIT":   {"-1", "many", "9223372036854775808"},
		"MAX_AGENTS":            {"-1", "many", "9223372036854775808"},
		"RETENTION_DAYS":        {"-1", "0", "many", "36501"},
		"CORS_ORIGIN":           {"*", "null", "https://a.example/", "https://a.example https://b.example", "a.example", "https://"},
		"TRUSTED_PROXIES":       {"10.0.0.1", "10.0.0.0/33", "proxy", "10.0.0.0/8;10.0.0.0/8", "::ffff:10.0.0.0/104"},
		"METRICS_ADDR":          {"9090", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1", "http://127.0.0.1:9090", "::1:9090", "127.0.0.1:9090/metrics"},
		"DRAIN_TIME":            {"-1s", "5m1s", "301", "soon"},
		"LOG_LEVEL":             {"loud", "0x"},
	} {
		for _, value := range values {
			env := goodEnvironment()
			env[name] = value
			_, err := loadConfig(lookup(env))
			if err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("loadConfig with %s=%.60q = %v, want an error that names it", name, value, err)
			} else if found := regexp.MustCompile(`canary|BEGIN [A-Z ]*PRIVATE`).FindString(err.Error()); found != "" {
				t.Errorf("loadConfig with a bad %s says %q", name, found)
			}
		}
	}
	for name, values := range map[string][]string{
		"DATABASE_URL":          {"postgres:///db?host=/run/postgresql", "host=localhost user=u", "postgres://u:p%40ss%2Fw%23%3F%25@h/db", "postgres://u:p:w@h,h2:5433/db"},
		"REDIS_URL":             {"unix:///run/redis.sock?db=1", "rediss://h", "redis://default:p%40ss%2Fw%23%3F@h", "redis://h:26379/1?addr=h2:26379&master_name=m&password=p%40"},
		"JWT_PRIVATE_KEY":       {strings.ReplaceAll(testKey(), "\n", `\n`)},
		"PORT":                  {"0", "1", "65535"},
		"HOST":                  {"127.0.0.1", "::1"},
		"ISSUER":                {"https://id.example.com", "https://h:8443/tenant", "http://localhost:3000"},
		"TOKEN_TTL":             {"1", "90", "15m", "24h", "86400", "1h30m"},
		"RATE_LIMIT_PER_MINUTE": {"0", "1", "1000000"},
		"MONTHLY_TOKEN_LIMIT":   {"0", "1"},
		"MAX_AGENTS":            {"0", "1"},
		"RETENTION_DAYS":        {"1", "36500"},
		"CORS_ORIGIN":           {"https://a.example", "http://localhost:5173"},
		"TRUSTED_PROXIES":       {"10.0.0.0/8", "10.0.0.0/8,::1/128", " 10.0.0.0/8 , ::1/128 "},
		"METRICS_ADDR":          {"", "127.0.0.1:0", "0.0.0.0:9090", ":9090", "[::1]:9090", "localhost:9090"},
		"DRAIN_TIME":            {"0", "0s", "10", "5m"},
		"LOG_LEVEL":             {"debug", "info", "warn", "error", "ERROR"},
	} {
		for _, value := range values {
			env := goodEnvironment()
			env[name] = value
			if _, err := loadConfig(lookup(env)); err != nil {
				t.Errorf("loadConfig with %s=%.60q = %v, want nil", name, value, err)
			}
		}
	}
	for value, want := range map[string]time.Duration{"90": 90 * time.Second, "15m": 15 * time.Minute, "": time.Hour} {
		env := goodEnvironment()
		env["TOKEN_TTL"] = value
		if cfg, err := loadConfig(lookup(env)); err != nil || cfg.tokenTTL != want {
			t.Errorf("loadConfig with TOKEN_TTL=%q has %s (%v), want %s", value, cfg.tokenTTL, err, want)
		}
	}
}

func TestSecretsCanBeFiles(t *testing.T) {
	for _, row := range []struct {
		name    string
		add     string // behind the value
		reading string // in front of an error; "" where there is none
	}{
		{"as it is", "", ""},
		{"with a new line", "\n", ""},
		{"with that of Windows", "\r\n", ""},
		{"with two", "\n\n", "REDIS_URL"}, // only one is stripped, and this is no URL
	} {
		t.Run(row.name, func(t *testing.T) {
			env := map[string]string{}
			for name, value := range goodEnvironment() {
				env[name+"_FILE"] = filepath.Join(t.TempDir(), name)
				if err := os.WriteFile(env[name+"_FILE"], []byte(value+row.add), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cfg, err := loadConfig(lookup(env))
			if row.reading == "" && (err != nil || cfg.database.ConnConfig.Database != "db" || cfg.redis.Password != "canary") {
				t.Errorf("loadConfig = %v, want nil", err)
			}
			if row.reading != "" && (err == nil || !strings.Contains(err.Error(), row.reading)) {
				t.Errorf("loadConfig = %v, want an error of %s", err, row.reading)
			}
		})
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"DATABASE_URL", "REDIS_URL", "JWT_PRIVATE_KEY", "WORKLOAD_ISSUERS"} {
		for fault, set := range map[string]map[string]string{
			"both":    {name + "_FILE": empty},
			"missing": {name: "", name + "_FILE": empty + "-not-there"},
			"empty":   {name: "", name + "_FILE": empty},
		} {
			env := goodEnvironment()
			for name, value := range set {
				env[name] = value
			}
			if _, err := loadConfig(lookup(env)); err == nil || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), empty) {
				t.Errorf("loadConfig with %s and its file %s = %v, want an error that names it", name, fault, err)
			}
		}
	}
	env := goodEnvironment() // of these there may be none
	env["JWT_PUBLIC_KEY_FILE"] = empty
	if _, err := loadConfig(lookup(env)); err != nil {
		t.Errorf("loadConfig without further keys = %v", err)
	}
}

func TestMetricsCanBeSwitchedOff(t *testing.T) {
	env := goodEnvironment()
	if cfg, err := loadConfig(lookup(env)); err != nil || cfg.metrics.String() != "127.0.0.1:9090" {
		t.Errorf("without METRICS_ADDR, metrics are at %v, %v", cfg.metrics, err)
	}
	env["METRICS_ADDR"] = ""
	if cfg, err := loadConfig(lookup(env)); err != nil || cfg.metrics != nil {
		t.Errorf("with METRICS_ADDR set to nothing, metrics are at %v, %v", cfg.metrics, err)
	}
	env["PORT"] = "" // of all others, empty is as if it weren't there
	if cfg, err := loadConfig(lookup(env)); err != nil || cfg.port != 3000 {
		t.Errorf("with PORT set to nothing, it is %d, %v, want 3000", cfg.port, err)
	}
}

// What is no secret is shown, and what is off is said.
func TestFaultsOfTheEnvironmentTeach(t *testing.T) {
	for name, row := range map[string]struct{ value, want string }{
		"PORT":         {"abc", "PORT is not right, it was abc: port to listen on"},
		"ISSUER":       {"https://u:canary@h", "ISSUER is not right: "},
		"DATABASE_URL": {"postgres://u:p@canary@h/db", "in a password @ is written %40"},
		"REDIS_URL":    {"redis://:12#canary@h", "in a password @ is written %40"},
	} {
		env := goodEnvironment()
		env[name] = row.value
		if _, err := loadConfig(lookup(env)); err == nil || !strings.Contains(err.Error(), row.want) || strings.Contains(err.Error(), "canary") {
			t.Errorf("loadConfig with %s=%q = %v, want %q", name, row.value, err, row.want)
		}
	}
}
