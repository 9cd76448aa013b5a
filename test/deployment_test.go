package test

import (
	"os"
	"regexp"
	"slices"
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
		if i < 0 || strings.HasSuffix(name, "_FILE") && i >= 4 {
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

func TestComposeFitsTheProgram(t *testing.T) {
	const file = "docker-compose.yml"
	services := section(t, file, "services:", "networks:")
	app := section(t, file, "  app:", "  # Makes")
	var names []string
	for _, match := range regexp.MustCompile(`(?m)^      ([A-Z][A-Z_]+):`).FindAllStringSubmatch(app, -1) {
		names = append(names, match[1])
	}
	wantSettings(t, file, names...)
	if match := regexp.MustCompile(`(?m)^    stop_grace_period: (\S+)`).FindStringSubmatch(app); match == nil {
		t.Errorf("%s gives the service the default of 10 s to stop", file)
	} else {
		wantTimeToStop(t, file, match[1])
	}
	count := strings.Count(services, "    networks: ") + strings.Count(services, "    network_mode: ")
	for _, wanted := range []string{"    deploy: {resources: {limits: {cpus: ", "    logging: *logging"} {
		if got := strings.Count(services, wanted); got != count || count != 4 {
			t.Errorf("%s has %q for %d of %d services", file, wanted, got, count)
		}
	}
	// The one port that is published is the service's, on loopback.
	if strings.Count(services, "ports:") != 1 || !strings.Contains(app, "    ports:\n      - \"127.0.0.1:3000:3000\"\n    volumes") {
		t.Errorf("%s publishes other ports than 127.0.0.1:3000 of the app", file)
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
