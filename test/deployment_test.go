package test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The files that operators deploy by, held to the program.

// section returns the lines of a text between two that match.
func section(t *testing.T, name, from, to string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile(`(?ms)^` + from + `$(.*?)^` + to).FindStringSubmatch(string(text))
	if match == nil {
		t.Fatalf("%s has nothing from %q to %q", name, from, to)
	}
	return match[1]
}

// wantSettings wants names to be variables of the program, in either form.
func wantSettings(t *testing.T, file string, names ...string) {
	t.Helper()
	for _, name := range names {
		i := slices.IndexFunc(variables(t), func(v variable) bool { return v.name == name || v.name+"_FILE" == name })
		if i < 0 || strings.HasSuffix(name, "_FILE") && i >= 5 {
			t.Errorf("%s sets %s, which the program does not read", file, name)
		}
	}
	for _, v := range variables(t) {
		if v.preset == "*" && !slices.Contains(names, v.name) && !slices.Contains(names, v.name+"_FILE") {
			t.Errorf("%s lacks %s", file, v.name)
		}
	}
}

// wantTimeToStop wants a service to be given longer than it takes to stop.
func wantTimeToStop(t *testing.T, file, text string) {
	t.Helper()
	given, err := time.ParseDuration(text)
	if least := 10*time.Second + 4*requestTimeout + storeTimeout; err != nil || given <= least {
		t.Errorf("%s gives %q to stop, want more than %s", file, text, least)
	}
}

func TestUnitFitsTheProgram(t *testing.T) {
	const file = "docs/devops/agentidp.service"
	text := section(t, file, `\[Service\]`, `\[Install\]`)
	settings := map[string][]string{}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
			settings[name] = append(settings[name], strings.Fields(value)...)
		}
	}
	var names []string
	for _, assignment := range settings["Environment"] {
		name, value, _ := strings.Cut(assignment, "=")
		names = append(names, name)
		// What is read again must not be a copy that systemd made at the start.
		if strings.HasPrefix(name, "JWT_") && !strings.HasPrefix(value, "/etc/") {
			t.Errorf("%s has %s, want a file that a reload finds changed", file, assignment)
		}
		if credential, ok := strings.CutPrefix(value, "%d/"); ok && !strings.Contains(text, "LoadCredential="+credential+":/") {
			t.Errorf("%s has %s, and loads no such credential", file, assignment)
		}
	}
	wantSettings(t, file, names...)
	wantTimeToStop(t, file, strings.Join(settings["TimeoutStopSec"], ""))
	// An instance has PORT and METRICS_ADDR of its own, by what is read last.
	if got, want := settings["EnvironmentFile"], []string{"-/etc/agentidp/env", "-/etc/agentidp/env%i"}; !slices.Equal(got, want) {
		t.Errorf("%s has the files %q, want %q", file, got, want)
	}
	if got := strings.Join(settings["ExecReload"], " "); got != "/bin/kill -HUP $MAINPID" {
		t.Errorf("%s reloads by %q, want a SIGHUP", file, got)
	}
}

const composeFile = "docker-compose.yml"

func TestComposeFitsTheProgram(t *testing.T) {
	services := section(t, composeFile, "services:", "networks:")
	app := section(t, composeFile, "  app:", "  # Makes")
	var names []string
	for _, match := range regexp.MustCompile(`(?m)^      ([A-Z][A-Z_]+):`).FindAllStringSubmatch(app, -1) {
		names = append(names, match[1])
	}
	wantSettings(t, composeFile, names...)
	if match := regexp.MustCompile(`(?m)^    stop_grace_period: (\S+)`).FindStringSubmatch(app); match == nil {
		t.Errorf("%s gives the service the default of 10 s to stop", composeFile)
	} else {
		wantTimeToStop(t, composeFile, match[1])
	}
	count := strings.Count(services, "    networks: ") + strings.Count(services, "    network_mode: ")
	for wanted, of := range map[string]int{
		"    deploy: {resources: {limits: {cpus: ":                 4,
		"    logging: *logging\n":                                  4,
		"    read_only: true\n":                                    4,
		"    cap_drop: [ALL]\n":                                    4,
		"    security_opt: [\"no-new-privileges:true\"]\n":         4,
		"    restart: unless-stopped\n":                            3, // but setup, which ends
		"    cap_add":                                              0,
		"    privileged":                                           0,
		"      setup: {condition: service_completed_successfully}": 2,
	} {
		if got := strings.Count(services, wanted); got != of || count != 4 {
			t.Errorf("%s has %q for %d of %d services, want %d of 4", composeFile, wanted, got, count, of)
		}
	}
	// The one port that is published is the service's, on loopback.
	if strings.Count(services, "ports:") != 1 || !strings.Contains(app, "    ports:\n      - \"127.0.0.1:${PORT:-3000}:3000\"\n    volumes") {
		t.Errorf("%s publishes other ports than 3000 of the app, on 127.0.0.1", composeFile)
	}
	for _, secret := range regexp.MustCompile(`(?m)://\w+:([^@\s]*)@|requirepass (\S+)|password '([^']*)'|PASSWORD: *(\S+)|PRIVATE KEY`).FindAllStringSubmatch(services, -1) {
		if !strings.HasPrefix(strings.Join(secret[1:], ""), "$") {
			t.Errorf("%s has a secret in %q", composeFile, secret[0])
		}
	}
}

// Who trusts the gateway trusts all that comes through the published port, so
// that is for the operator to say.
func TestComposeNetworks(t *testing.T) {
	networks := section(t, composeFile, "networks:", "volumes:")
	match := regexp.MustCompile(`subnet: "\$\{SUBNET:-(\S+)\}"`).FindStringSubmatch(networks)
	if match == nil {
		t.Fatalf("%s pins no subnet", composeFile)
	}
	gateway := netip.MustParsePrefix(match[1]).Addr().Next().String()
	if page := readPage(t, "local-development.md"); !strings.Contains(page, "TRUSTED_PROXIES="+gateway+"/32") || !strings.Contains(page, match[1]) {
		t.Errorf("local-development.md does not say that the gateway is %s, of %s", gateway, match[1])
	}
	if !regexp.MustCompile(`(?m)^      TRUSTED_PROXIES:( #.*)?$`).MatchString(section(t, composeFile, "  app:", "  # Makes")) {
		t.Errorf("%s trusts a proxy that nobody has named", composeFile)
	}
	_, stores, _ := strings.Cut(networks, "  stores:\n")
	if stores != "    internal: true\n    driver_opts: {com.docker.network.bridge.inhibit_ipv4: \"true\"}\n\n" {
		t.Errorf("%s has stores on %q, want a network that this machine and others are not in", composeFile, stores)
	}
}

// An image of before a change is run where --build is missing. A signal by
// Docker's commands makes the engine take the container for one that was
// stopped by hand, and nothing starts it again.
func TestPagesUseDockerWell(t *testing.T) {
	more, _ := filepath.Glob(pages + "/*.md")
	for _, name := range append(more, "README.md", composeFile) {
		text := readFile(t, name)
		for _, found := range regexp.MustCompile(`docker compose up.*`).FindAllString(text, -1) {
			if !strings.HasPrefix(found, "docker compose up -d --build --wait") {
				t.Errorf("%s has %q, want it to build and to wait", name, found)
			}
		}
		if found := regexp.MustCompile(`docker (compose )?kill .*-s.*`).FindString(text); found != "" {
			t.Errorf("%s has %q", name, found)
		}
	}
}

// setIn returns the variables that a manifest sets, but those of Go, of Kubernetes'
// own form: one in a line.
func setIn(text string) (names []string, values map[string]string) {
	values = map[string]string{}
	for _, match := range regexp.MustCompile(`(?m)^ +- \{name: ([A-Z_]+), value: "?([^"}]*)"?\}`).FindAllStringSubmatch(text, -1) {
		values[match[1]] = match[2]
		if match[1] != "GOMEMLIMIT" && match[1] != "DRAIN_TIME" {
			names = append(names, match[1])
		}
	}
	return names, values
}

// inManifest returns the one value that a line of a manifest has.
func inManifest(t *testing.T, file, text, pattern string) string {
	t.Helper()
	found := regexp.MustCompile(`(?m)^ *`+pattern).FindAllStringSubmatch(text, -1)
	if len(found) != 1 {
		t.Fatalf("%s has %d lines like %s, want one", file, len(found), pattern)
	}
	return found[0][1]
}

func TestManifestsFitTheProgram(t *testing.T) {
	const folder = "docs/devops/kubernetes/"
	file := folder + "deployment.yaml"
	text := readFile(t, file)
	names, values := setIn(text)
	wantSettings(t, file, names...)
	drain, err := time.ParseDuration(values["DRAIN_TIME"])
	if err != nil || drain < 10*time.Second {
		t.Errorf("%s has the DRAIN_TIME %q: nodes and proxies may take 10 s to know that a pod goes", file, values["DRAIN_TIME"])
	}
	given, err := time.ParseDuration(inManifest(t, file, text, `terminationGracePeriodSeconds: (\d+)$`) + "s")
	if least := drain + 4*requestTimeout + storeTimeout; err != nil || given <= least {
		t.Errorf("%s gives %s to stop, want more than %s", file, given, least)
	}
	ports := map[string]string{}
	for _, match := range regexp.MustCompile(`- \{name: (\w+), containerPort: (\d+)\}`).FindAllStringSubmatch(text, -1) {
		ports[match[1]] = match[2]
	}
	i := slices.IndexFunc(variables(t), func(v variable) bool { return v.name == "PORT" })
	if values["PORT"] != "" || ports["http"] != variables(t)[i].preset || ":"+ports["metrics"] != values["METRICS_ADDR"] {
		t.Errorf("%s has the ports %v, and METRICS_ADDR %q", file, ports, values["METRICS_ADDR"])
	}
	for probe, path := range map[string]string{"startup": "/livez", "readiness": "/readyz", "liveness": "/livez"} {
		got := inManifest(t, file, text, probe+`Probe:\n +httpGet: \{path: (\S+), port: http\}$`)
		if got != path || !slices.Contains(publicRoutes, "GET "+path) {
			t.Errorf("%s asks %s for %s, want %s", file, got, probe, path)
		}
	}
	// At the start the program waits for PostgreSQL for a minute, and then says why it ends.
	period, _ := strconv.Atoi(inManifest(t, file, text, `startupProbe:\n.*\n +periodSeconds: (\d+)$`))
	tries, _ := strconv.Atoi(inManifest(t, file, text, `startupProbe:\n.*\n.*\n +failureThreshold: (\d+)$`))
	if period*tries < 70 {
		t.Errorf("%s gives %d s to start, want more than a minute", file, period*tries)
	}
	// What Go keeps within, in MiB, and what the kernel allows.
	var within, allowed int
	fmt.Sscanf(values["GOMEMLIMIT"], "%dMiB", &within)
	fmt.Sscanf(inManifest(t, file, text, `limits: \{cpu: "2", memory: (\d+)Mi\}$`), "%d", &allowed)
	if within == 0 || within*10 > allowed*9 {
		t.Errorf("%s has GOMEMLIMIT %d and a limit of %d Mi, want a tenth more", file, within, allowed)
	}
	user := regexp.MustCompile(`(?m)^USER (\d+):`).FindStringSubmatch(readFile(t, "Dockerfile"))
	for _, name := range []string{"deployment.yaml", "migrate.yaml"} {
		text := readFile(t, folder+name)
		if got := inManifest(t, name, text, `runAsUser: (\d+)$`); user == nil || got != user[1] {
			t.Errorf("%s runs as %s, and the image as %v", name, got, user)
		}
		if got := inManifest(t, name, text, `image: registry.example.com/agentidp:(\S+)$`); got != release(t) {
			t.Errorf("%s has the version %s, want %s", name, got, release(t))
		}
	}
	// migrate needs the database alone, as its owner.
	job := readFile(t, folder+"migrate.yaml")
	if names, _ := setIn(job); !slices.Equal(names, []string{"DATABASE_URL_FILE"}) || !strings.Contains(job, "args: [migrate]") {
		t.Errorf("migrate.yaml sets %q", names)
	}
	// Probes and metrics are served where the policy lets them in.
	if n := strings.Count(readFile(t, folder+"network.yaml"), "ports: [{protocol: TCP, port: http}]") +
		strings.Count(readFile(t, folder+"network.yaml"), "ports: [{protocol: TCP, port: metrics}]"); n != 2 {
		t.Errorf("network.yaml lets in to %d of 2 ports", n)
	}
	// Keys of issuers are fetched where that is wanted: https, which stands there and doesn't count.
	policy := readFile(t, folder+"network.yaml")
	if port := inManifest(t, "network.yaml", policy, `# - to:\n(?:    #     - .*\n)+    #   ports: \[\{protocol: TCP, port: (\d+)\}\]$`); port != "443" {
		t.Errorf("network.yaml has a rule for the port %s of issuers, want 443", port)
	}
}

// The proxies' configurations have no path that the service hasn't.
func TestProxiesFitTheProgram(t *testing.T) {
	document := readFile(t, "openapi.yaml")
	for _, name := range []string{"haproxy.cfg", "nginx.conf"} {
		text, found := readFile(t, "docs/devops/proxies/"+name), 0
		for _, paths := range regexp.MustCompile(`(?m)(?:uri|location|path|path_beg)((?: /[a-z0-9./-]*)+)`).FindAllStringSubmatch(text, -1) {
			for _, path := range strings.Fields(paths[1]) {
				known := strings.Contains(document, "\n  "+path+":") || strings.HasSuffix(path, "/") && strings.Contains(document, "\n  "+path)
				if found++; !known {
					t.Errorf("%s has the path %s, which is none of the service", name, path)
				}
			}
		}
		if found < 2 {
			t.Errorf("%s has only %d paths", name, found)
		}
	}
}

// Engine 20.10 is that of Debian 12, and builds without BuildKit unless told.
func TestDockerfileIsForAnyBuilder(t *testing.T) {
	if found := regexp.MustCompile(`--(start-interval|mount|link|chmod|parents|exclude)\b|<<`).FindString(readFile(t, "Dockerfile")); found != "" {
		t.Errorf("Dockerfile has %s, which the builder of Engine 20.10 lacks", found)
	}
	if !slices.Contains(strings.Split(readFile(t, ".dockerignore"), "\n"), "!.git") {
		t.Error(".dockerignore keeps the commit from the program")
	}
}

// setupScript is what the service "setup" runs, as its shell gets it.
func setupScript(t *testing.T) string {
	t.Helper()
	script := section(t, composeFile, "      - \\|", "    volumes:")
	return strings.ReplaceAll(strings.ReplaceAll(script, "\n        ", "\n"), "$$", "$")
}

// The setup is run as Compose runs it, twice, beside a PostgreSQL; then as
// after a loss of its secrets. What it gives the service is no more than what
// the pages say.
func TestComposeSetup(t *testing.T) {
	t.Parallel()
	script := setupScript(t)
	for line := range strings.Lines(roleSQL(t)) {
		if !strings.HasPrefix(line, "create role") && !strings.Contains(script, "\n"+line) {
			t.Errorf("%s lacks %q of the installation", composeFile, line)
		}
	}
	es := &estate{t, newPostgres(t), newRedis(t)}
	es.exec("postgres", theSuperuser, `create database agentidp`)
	program, err := builtProgram()
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	secrets, others, bin := filepath.Join(folder, "secrets"), filepath.Join(folder, "redis"), filepath.Join(folder, "bin")
	for _, err := range []error{os.Mkdir(others, 0o700), os.Mkdir(bin, 0o700), os.Symlink(program, filepath.Join(bin, "agentidp"))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	files := []string{"postgres-password", "redis-password", "jwt.pem", "jwt.pub", "database_url", "redis_url"}
	setup := func() (made [][]byte) {
		t.Helper()
		if err := os.MkdirAll(secrets, 0o700); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "-euc", strings.ReplaceAll(script, "/redis/", others+"/"))
		cmd.Dir = secrets
		cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "PGHOST=" + es.postgres.folder, "PGPORT=5432", "PGUSER=" + theSuperuser}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("the setup fails: %v: %s", err, out)
		}
		for _, name := range files {
			info, err := os.Stat(filepath.Join(secrets, name))
			if err != nil || info.Mode() != 0o600 {
				t.Fatalf("%s is not for its user alone, %v", name, err)
			}
			made = append(made, []byte(readFile(t, filepath.Join(secrets, name))))
		}
		if got, want := readFile(t, filepath.Join(others, "redis.conf")), "requirepass "+string(made[1])+"\n"; got != want || len(made[1]) != 32 {
			t.Fatalf("redis.conf has %q, want %q with 32 digits", got, want)
		}
		return made
	}
	first := setup()
	if second := setup(); !slices.EqualFunc(first, second, bytes.Equal) {
		t.Error("a second setup makes other secrets")
	}
	if err := os.RemoveAll(secrets); err != nil {
		t.Fatal(err)
	}
	third := setup()
	for i, name := range files {
		if same := bytes.Equal(first[i], third[i]); same != (name == "jwt.pub") {
			t.Errorf("after a loss, that %s is the same is %v", name, same)
		}
	}

	// The service starts by what it was given, and owns nothing.
	var hash string
	conn := es.connect("agentidp", theSuperuser)
	err = conn.QueryRow(t.Context(), `select rolpassword from pg_authid where rolname = 'agentidp_service'`).Scan(&hash)
	if err != nil || !strings.HasPrefix(hash, "SCRAM-SHA-256$") {
		t.Errorf("the password of the service is kept as %.14q, %v", hash, err)
	}
	var foreign int
	err = conn.QueryRow(t.Context(), `
		select count(*) from pg_tables where schemaname = 'public' and tableowner <> 'agentidp_owner'`).Scan(&foreign)
	if err != nil || foreign != 0 {
		t.Errorf("%d tables are not the owner's, %v", foreign, err)
	}
	if _, err := es.run("agentidp", theService, "verify-audit"); err != nil {
		t.Errorf("the service's role can't read the log: %v", err)
	}
	for _, sql := range []string{`delete from audit_events`, `drop table agents`, `create table public.x ()`, `create temporary table x ()`, `create role x`} {
		if err := es.try("agentidp", theService, sql); err == nil || !strings.Contains(err.Error(), "42501") {
			t.Errorf("as the service, %s = %v, want that it is not permitted", sql, err)
		}
	}
}
