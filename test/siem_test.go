package test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	dn "crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The way of the audit log into a SIEM, by what docs/devops/siem.md has: its role, its script, the body of its
// unit and its configuration of rsyslog, with other paths and ports.

// fence is the text of the one block of a page that has these words.
func fence(t testing.TB, page, words string) (text string) {
	t.Helper()
	for _, b := range fenced.FindAllString(readPage(t, page), -1) {
		if _, inner, _ := strings.Cut(strings.TrimSuffix(b, "```"), "\n"); strings.Contains(inner, words) {
			if text != "" {
				t.Fatalf("%s has %q in several blocks", page, words)
			}
			text = inner
		}
	}
	if text == "" {
		t.Fatalf("%s has no block with %q", page, words)
	}
	return text
}

// A siem takes what is sent by TLS, and keeps each line as it came first.
type siem struct {
	t        *testing.T
	port     string
	config   *tls.Config
	listener net.Listener

	mu           sync.Mutex
	lines        map[int64]string // by seq
	twice, wrong int
	firstWrong   string
}

// newSIEM has the certificate of siem.example.com, which it stores in a file.
func newSIEM(t *testing.T, certificate string) *siem {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: dn.Name{CommonName: "siem.example.com"}, DNSNames: []string{"siem.example.com"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)
	if err == nil {
		err = os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	m := &siem{t: t, port: steadyPort(t), lines: map[int64]string{},
		config: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}}
	m.open()
	t.Cleanup(m.close)
	return m
}

func (m *siem) open() {
	m.t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:"+m.port)
	if err != nil {
		m.t.Fatal(err)
	}
	m.listener = listener
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go m.read(tls.Server(conn, m.config))
		}
	}()
}

// close refuses whoever comes from now on; what is connected goes on.
func (m *siem) close() { m.listener.Close() }

var (
	syslogLine = regexp.MustCompile(`^<110>1 \d{4}-\d\d-\d\dT\S+ \S+ agentidp - - - (\{.*\}\n)$`)
	eventSeq   = regexp.MustCompile(`^\{"eventId":"[^"]*","seq":(\d+),`)
)

func (m *siem) read(conn net.Conn) {
	defer conn.Close()
	for r := bufio.NewReader(conn); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return // what is not whole is sent again
		}
		m.mu.Lock()
		var seq int64
		body := syslogLine.FindStringSubmatch(line)
		if body != nil {
			if found := eventSeq.FindStringSubmatch(body[1]); found != nil {
				seq, _ = strconv.ParseInt(found[1], 10, 64)
			}
		}
		switch had := m.lines[seq]; {
		case seq == 0 || had != "" && had != body[1]:
			if m.wrong++; m.firstWrong == "" {
				m.firstWrong = line
			}
		case had != "":
			m.twice++
		default:
			m.lines[seq] = body[1]
		}
		m.mu.Unlock()
	}
}

func (m *siem) has() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.lines)
}

// A relay is a machine that has the page's files in a folder of its own, and does what systemd does with them.
type relay struct {
	t                 *testing.T
	es                *estate
	siem              *siem
	folder            string
	paths             *strings.Replacer // those of the page by ours
	follower, shipper *process
	log               logBuffer
	days              int
}

func newRelay(t *testing.T, es *estate) *relay {
	t.Helper()
	rsyslogd := installed(t, "rsyslogd", "rsyslog", "rsyslog-openssl")
	y := &relay{t: t, es: es, folder: privateFolder(t)}
	y.siem = newSIEM(t, y.folder+"/ca.pem")
	program, err := builtProgram()
	for _, name := range []string{"bin", "etc", "log", "spool"} {
		err = errors.Join(err, os.Mkdir(filepath.Join(y.folder, name), 0o755))
	}
	y.paths = strings.NewReplacer("/usr/local/bin", y.folder+"/bin", "/etc/agentidp-audit", y.folder+"/etc", "/var/log/agentidp", y.folder+"/log",
		"/var/lib/agentidp-siem", y.folder+"/spool", "/usr/sbin/rsyslogd", rsyslogd, `target="siem.example.com"`, `target="127.0.0.1"`,
		`port="6514"`, `port="`+y.siem.port+`"`, "/etc/ssl/certs/ca-certificates.crt", y.folder+"/ca.pem")
	err = errors.Join(err, os.Symlink(program, y.folder+"/bin/agentidp"),
		os.WriteFile(y.folder+"/bin/follow-audit", []byte(fence(t, "siem.md", "# follow-audit FOLDER")), 0o755),
		os.WriteFile(y.folder+"/bin/date", []byte("#!/bin/sh\n[ \"$*\" = '-u +%F' ] && cat "+y.folder+"/day\n"), 0o755),
		os.WriteFile(y.folder+"/etc/rsyslog.conf", []byte(y.paths.Replace(fence(t, "siem.md", `module(load="imfile")`))), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	y.nextDay()
	cmd := exec.Command("sh", "-eu", "-c", y.paths.Replace(fence(t, "siem.md", "create role agentidp_reader")))
	cmd.Env = []string{"PATH=" + y.folder + "/bin:" + os.Getenv("PATH"), "PGHOST=" + es.postgres.folder, "PGPORT=5432", "PGUSER=" + theSuperuser,
		"PGDATABASE=agentidp", "POSTGRES=127.0.0.1:5432"}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("making the role: %v: %s", err, out)
	}
	if url := readFile(t, y.folder+"/etc/database_url"); !regexp.MustCompile(`^postgres://agentidp_reader:[0-9a-f]{32}@127\.0\.0\.1:5432/agentidp\n$`).MatchString(url) {
		t.Errorf("database_url is %q", url)
	}
	if err := os.WriteFile(y.folder+"/etc/database_url", []byte(es.url("agentidp", "agentidp_reader")), 0o600); err != nil { // by the socket
		t.Fatal(err)
	}
	return y
}

// installed is where a program of Debian is, after its packages were installed where need be.
func installed(t testing.TB, program string, packages ...string) string {
	t.Helper()
	find := func() (string, error) {
		if path, err := exec.LookPath(program); err == nil {
			return path, nil
		}
		return exec.LookPath("/usr/sbin/" + program)
	}
	path, err := find()
	for _, name := range packages[1:] { // the first is that of the program
		if err == nil {
			_, err = os.Stat("/var/lib/dpkg/info/" + name + ".list")
		}
	}
	if err != nil {
		if out, err := exec.Command("./dev/with-services.sh", append([]string{"--install"}, packages...)...).CombinedOutput(); err != nil {
			t.Fatalf("%s is needed: %v: %s", program, err, out)
		}
		path, err = find()
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func (y *relay) nextDay() {
	y.t.Helper()
	day := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).AddDate(0, 0, y.days).Format(time.DateOnly)
	if err := os.WriteFile(y.folder+"/day", []byte(day+"\n"), 0o644); err != nil {
		y.t.Fatal(err)
	}
	y.days++
}

// unit starts what the unit with these words starts.
func (y *relay) unit(words string) *process {
	y.t.Helper()
	unit := y.paths.Replace(fence(y.t, "siem.md", words))
	start := strings.Fields(regexp.MustCompile(`(?m)^ExecStart=(.*)$`).FindStringSubmatch(unit)[1])
	cmd := exec.Command(start[0], start[1:]...)
	cmd.Env = []string{"PATH=" + y.folder + "/bin:" + os.Getenv("PATH")}
	for _, line := range regexp.MustCompile(`(?m)^Environment=(.*)$`).FindAllStringSubmatch(unit, -1) {
		cmd.Env = append(cmd.Env, strings.Fields(line[1])...)
	}
	cmd.Stdout, cmd.Stderr = &y.log, &y.log
	return startProcess(y.t, cmd, syscall.SIGKILL)
}

func (y *relay) follow() *process { return y.unit("ExecStart=/usr/local/bin/follow-audit") }

const shipping = "ExecStart=/usr/sbin/rsyslogd"

// stopShipper stops it as its unit does, which has to be the same as what happens to it otherwise.
func (y *relay) stopShipper() {
	y.t.Helper()
	if strings.Contains(fence(y.t, "siem.md", shipping), "\nKillSignal=SIGKILL\n") {
		y.shipper.kill()
	} else {
		y.shipper.stop(y.t, syscall.SIGTERM)
	}
}

// keep starts whatever of the two has ended, as Restart=always does.
func (y *relay) keep() {
	y.t.Helper()
	gone := func(p *process) bool {
		if p == nil {
			return true
		}
		select {
		case <-p.exited:
			return true
		default:
			return false
		}
	}
	if gone(y.follower) {
		y.follower = y.follow()
	}
	if gone(y.shipper) {
		y.shipper = y.unit(shipping)
	}
}

// files are those of all days, whole.
func (y *relay) files() (names []string) {
	y.t.Helper()
	names, err := filepath.Glob(y.folder + "/log/audit-*.jsonl")
	if err != nil || len(names) == 0 {
		y.t.Fatalf("there are the files %q, %v", names, err)
	}
	return names
}

// busy makes events until stop is called, by one client after the other.
func busy(p *program, clients int) (stop func()) {
	id, secret := p.newClient("data:read")
	base, done, group := p.url+"/api/v1/token", atomic.Bool{}, sync.WaitGroup{}
	agents := []string{"", "a \"quoted\" \\ one", "Ünï\u2028 <&>", strings.Repeat("x", 256), "\xff\xfe"}
	for n := range clients {
		group.Go(func() {
			for i := n; !done.Load(); i++ {
				path, form := "/introspect", "token=x"
				switch i % 5 {
				case 0:
					path, form = "", "grant_type=client_credentials"
				case 1:
					path, form = "", "grant_type=client_credentials&scope=data:write" // which it may not have
				}
				q, _ := http.NewRequest("POST", base+path, strings.NewReader(form))
				q.Header.Set("Content-Type", formType)
				q.Header.Set("User-Agent", agents[i%len(agents)])
				q.SetBasicAuth(id, secret)
				response, err := testClient.Do(q)
				if err != nil {
					time.Sleep(20 * time.Millisecond)
					continue
				}
				response.Body.Close()
			}
		})
	}
	return func() {
		done.Store(true)
		group.Wait()
	}
}

// Whatever is killed between the log and a SIEM, and on whichever day, each event comes there, as audit-export prints it.
func TestEachEventReachesASIEMWhateverIsKilled(t *testing.T) {
	t.Parallel()
	es := newEstate(t)
	es.settle()
	out, err := es.run("agentidp", theService, "bootstrap", "first@example.com")
	p := es.serve("agentidp")
	if _, wrong := fmt.Sscanf(out, "client_id: %s\nclient_secret: %s\n", &p.id, &p.secret); err != nil || wrong != nil {
		t.Fatalf("bootstrap = %q, %v", out, errors.Join(err, wrong))
	}
	p.bearer = p.token(p.id, p.secret, "")
	y := newRelay(t, es)
	y.keep()
	p.eventually("what is there has come", func() bool { y.keep(); return y.siem.has() >= 2 }) // of the first file nothing is written twice
	stop := busy(p, 3)
	defer stop()
	kills := map[string]int{}
	for i := range rounds(30, 300) {
		time.Sleep(time.Duration(rand.IntN(600)) * time.Millisecond)
		switch what := []string{"follower", "shipper", "follower", "shipper", "service", "PostgreSQL"}[rand.IntN(6)]; what {
		case "follower":
			if i%3 == 0 {
				y.nextDay()
			}
			if i%6 == 0 { // as the unit does each day
				y.follower.stop(t, syscall.SIGTERM)
			} else {
				y.follower.kill()
			}
			kills[what]++
		case "shipper":
			if i%2 == 0 { // the SIEM is away until it has been killed again
				y.siem.close()
				y.shipper.kill()
				y.keep()
				time.Sleep(time.Duration(rand.IntN(600)) * time.Millisecond)
				y.stopShipper()
				y.siem.open()
			} else {
				y.stopShipper()
			}
			kills[what]++
		case "service":
			p.kill()
			p.start()
			kills[what]++
		case "PostgreSQL":
			es.postgres.kill()
			time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
			es.postgres.start()
			kills[what]++
		}
		y.keep()
	}
	p.eventually("the service is well", func() bool { return p.service.ready() == 200 })
	// With which a line is longer than what rsyslogd takes without being told.
	long := `{"resources":["https://long.example.com/?` + strings.Repeat("&", 2000) + `"]}`
	p.want(p.api(p.bearer, "PATCH", "/agents/"+p.newAgent("data:read"), long), 200, "")
	stop()

	exported, err := es.run("agentidp", theService, "audit-export")
	if err != nil {
		t.Fatal(err)
	}
	want := strings.SplitAfter(exported, "\n")
	want = want[:len(want)-2] // behind them are the checkpoint and its end
	longest := 0
	for _, line := range want {
		longest = max(longest, len(line))
	}
	if longest < 8<<10 {
		t.Errorf("the longest line has %d bytes", longest)
	}
	end := time.Now().Add(2 * time.Minute)
	for y.siem.has() < len(want) && time.Now().Before(end) {
		y.keep()
		time.Sleep(20 * time.Millisecond)
	}
	y.siem.mu.Lock()
	defer y.siem.mu.Unlock()
	var missing []int
	for i, line := range want {
		switch got := y.siem.lines[int64(i+1)]; got {
		case line:
		case "":
			missing = append(missing, i+1)
		default:
			t.Errorf("seq %d came as %q, and audit-export prints %q", i+1, got, line)
		}
	}
	if len(missing) > 0 || len(y.siem.lines) != len(want) || y.siem.wrong > 0 {
		t.Errorf("of %d events %d are missing, as %v; %d lines are none of an event, as %q: %s", len(want), len(missing), missing, y.siem.wrong, y.siem.firstWrong, y.log.String())
	}
	t.Logf("%d events in %d files, %d of them came again; killed: %v", len(want), len(y.files()), y.siem.twice, kills)
}

// It goes on only behind an event that is in the log, as it has it; and cuts off what a crash has left.
func TestFollowedFileIsOfThisLog(t *testing.T) {
	t.Parallel()
	es := newEstate(t)
	es.settle()
	if out, err := es.run("agentidp", theService, "bootstrap", "first@example.com"); err != nil {
		t.Fatalf("bootstrap = %q, %v", out, err)
	}
	for i := range 3 {
		if out, err := es.run("agentidp", theService, "recover", fmt.Sprintf("again%d@example.com", i)); err != nil {
			t.Fatalf("recover = %q, %v", out, err)
		}
	}
	exported, err := es.run("agentidp", theService, "audit-export")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(exported, "\n")[:4]
	y := newRelay(t, es)
	first, second := y.folder+"/log/audit-2026-01-01.jsonl", y.folder+"/log/audit-2026-01-02.jsonl"
	for _, row := range []struct {
		name, first, second string // "-" is no file
		day                 int
		want                string // in the last file; "" is that it is left alone
		says                string
	}{
		{"no file", "-", "-", 1, strings.Join(lines, ""), ""},
		{"an empty file", "", "-", 1, strings.Join(lines, ""), ""},
		{"half a line", lines[0][:100], "-", 1, strings.Join(lines, ""), ""},
		{"one and a half", lines[0] + lines[1][:1], "-", 1, strings.Join(lines, ""), ""},
		{"one and zeros, as after a loss of power", lines[0] + "\x00\x00\x00", "-", 1, strings.Join(lines, ""), ""},
		{"all but one", lines[0] + lines[1] + lines[2], "-", 1, strings.Join(lines, ""), ""},
		{"all but one of yesterday", lines[0] + lines[1] + lines[2], "-", 2, strings.Join(lines[1:], ""), ""},
		{"one of yesterday, and half a line", lines[0] + lines[1][:200], "-", 2, strings.Join(lines, ""), ""},
		{"two of yesterday, and half a line of today", lines[0] + lines[1], lines[0][:50], 2, strings.Join(lines, ""), ""},
		{"two of yesterday, and one of today", lines[0] + lines[1], lines[0], 2, strings.Join(lines, ""), ""},
		{"another log", strings.Replace(lines[0], `"hash":"`, `"hash":"0`, 1), "-", 1, "", "the event 1 is not what it was"},
		{"a longer log", strings.Replace(lines[3], `"seq":4`, `"seq":5`, 1), "-", 1, "", "seq 5 is beyond the end of the log"},
		{"no event", "{}\n", "-", 1, "", "FROM_SEQ must be a whole number"},
	} {
		t.Run(row.name, func(t *testing.T) {
			files := map[string]string{first: row.first, second: row.second}
			for name, text := range files {
				os.Remove(name)
				if text != "-" {
					if err := os.WriteFile(name, []byte(text), 0o640); err != nil {
						t.Fatal(err)
					}
				}
			}
			last := first
			if y.days = row.day - 1; row.day == 2 {
				last = second
			}
			y.nextDay()
			before := len(y.log.String())
			f := y.follow()
			if row.says != "" {
				f.wait()
				if says := y.log.String()[before:]; f.err == nil || !strings.Contains(says, row.says) || readFile(t, last) != files[last] {
					t.Errorf("it ends with %v, says %q, and has made %q of the file", f.err, says, readFile(t, last))
				}
				return
			}
			(&service{t: t}).eventually("the file has all", func() bool {
				text, _ := os.ReadFile(last)
				return strings.HasSuffix(string(text), lines[3])
			})
			if err := f.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("it ends with %v", err)
			}
			if got := readFile(t, last); got != row.want {
				t.Errorf("the file has %q, want %q", got, row.want)
			}
			if info, err := os.Stat(last); err != nil || row.first == "-" && info.Mode().Perm() != 0o640 {
				t.Errorf("the file has the mode %v, %v", info.Mode(), err)
			}
		})
	}
	// Old files go, but never the one that has the place.
	old := time.Now().Add(-40 * 24 * time.Hour)
	err = errors.Join(os.WriteFile(first, []byte(lines[0]), 0o640), os.WriteFile(second, []byte(lines[0]+lines[1]), 0o640),
		os.Chtimes(first, old, old), os.Chtimes(second, old, old))
	if err != nil {
		t.Fatal(err)
	}
	y.days = 2
	y.nextDay()
	f := y.follow()
	third := y.folder + "/log/audit-2026-01-03.jsonl"
	(&service{t: t}).eventually("the file has all", func() bool {
		text, _ := os.ReadFile(third)
		return string(text) == strings.Join(lines, "")
	})
	f.stop(t, syscall.SIGTERM)
	if names := y.files(); len(names) != 2 || names[0] != second {
		t.Errorf("what is left is %q", names)
	}
	for _, sql := range []string{"select from agents", "select from credentials", "select from token_revocations", "insert into audit_events (seq) values (1)",
		"delete from audit_events", "create table x ()", "create temporary table x ()"} {
		if err := es.try("agentidp", "agentidp_reader", sql); !refusedFor(err, "permission denied") {
			t.Errorf("%s, as the reader = %v, want it refused", sql, err)
		}
	}
}

// Each action has a row of OCSF, whose numbers fit each other.
func TestOCSFTable(t *testing.T) {
	table := pageTables(t, "siem.md", "## OCSF")
	wantSame(t, "siem.md", "action", table, actions)
	number := regexp.MustCompile(`^(\d+) [A-Z]`)
	for _, action := range actions {
		row := table["action "+action]
		class, activity := number.FindStringSubmatch(row["class_uid"]), number.FindStringSubmatch(row["activity_id"])
		if class == nil || activity == nil {
			t.Errorf("siem.md maps %s to %q", action, row["all"])
			continue
		}
		n, _ := strconv.Atoi(activity[1])
		if want, got := fmt.Sprintf("%s%02d", class[1], n), strings.Split(row["type_uid"], ",")[0]; got != want {
			t.Errorf("siem.md has the type_uid %s of %s, want %s", got, action, want)
		}
	}
}
