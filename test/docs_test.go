package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/token"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// The operator's pages, docs/devops, are held to the source, and what they have
// to paste is pasted.

const pages = "docs/devops"

func readPage(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(pages, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A block of commands of a page that is marked to be run: where the service is,
// or on one of PostgreSQL's machines.
type block struct {
	page string
	line int
	text string
}

var markedBlock = regexp.MustCompile("(?m)^<!-- run(?: on (db1|db2|both))? -->\n```sh\n((?s).*?)^```$")

func runBlocks(t testing.TB, page string) (list []block) {
	t.Helper()
	text := readPage(t, page)
	for _, at := range markedBlock.FindAllStringSubmatchIndex(text, -1) {
		b := block{page, 2 + strings.Count(text[:at[4]], "\n"), text[at[4]:at[5]]}
		if at[2] >= 0 {
			machine := text[at[2]:at[3]]
			b.text = on(strings.ReplaceAll(machine, "both", "db1 db2"), b.text)
		}
		list = append(list, b)
	}
	if marks := strings.Count(text, "<!-- run"); marks != len(list)+strings.Count(text, "`<!-- run -->`") {
		t.Errorf("%s has %d marks to run, and %d blocks of sh below one", page, marks, len(list))
	}
	return list
}

// on runs commands in a shell of their own, on each of PostgreSQL's machines.
func on(machines, commands string) (text string) {
	for _, machine := range strings.Fields(machines) {
		text += "(\n. ./on-" + machine + "\n" + commands + ")\n"
	}
	return text
}

// A rig is what an operator has: a PostgreSQL and a Redis that listen on
// loopback, a machine for a standby, the copies of the program, of which one is
// on another machine, and what starts and stops them, which here is the test:
// its systemctl asks it to.
type rig struct {
	t        *testing.T
	folder   string // where the operator works
	program  string
	postgres *postgresServer // db1
	standby  *postgresServer // db2, whose data is not there yet
	redis    *process
	copies   map[string]*process // agentidp, agentidp@2, other: agentidp
	log      *programLog
	ports    map[string]string
	env      []string
	asked    chan order
}

// An order is what systemctl was told, or the line of a page that is reached.
type order struct {
	words string
	done  chan error
}

func newRig(t *testing.T) *rig {
	t.Helper()
	program, err := builtProgram()
	template, templateErr := postgresTemplate()
	if err := errors.Join(err, templateErr); err != nil {
		t.Fatal(err)
	}
	g := &rig{t: t, program: program, ports: map[string]string{}, asked: make(chan order), copies: map[string]*process{}, log: &programLog{serving: make(chan string, 100)}}
	for _, name := range []string{"postgres", "redis", "idp", "metrics", "idp2", "metrics2", "metrics of another machine"} {
		g.ports[name] = steadyPort(t)
	}
	g.postgres = postgresFolder(t, "listen_addresses=127.0.0.1", "port="+g.ports["postgres"], "full_page_writes=on") // which pg_rewind wants
	g.standby = postgresFolder(t, "listen_addresses=127.0.0.2", "port="+g.ports["postgres"], "full_page_writes=on")
	if out, err := exec.Command("cp", "-a", template, g.postgres.data()).CombinedOutput(); err != nil {
		t.Fatalf("copying: %v: %s", err, out)
	}
	// The test's own superuser is let in. The others are Debian's rules: by the socket one is who one is, else it is the
	// password that counts.
	rules := "host all agentidp 127.0.0.1/32 trust\nlocal all,replication all peer\nhost all,replication all 127.0.0.1/32 scram-sha-256\n"
	if err := os.WriteFile(filepath.Join(g.postgres.data(), "pg_hba.conf"), []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	g.folder = filepath.Join(g.postgres.folder, "etc")
	bin := filepath.Join(g.postgres.folder, "bin")
	systemctl := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o := order{r.URL.Query().Get("words"), make(chan error, 1)}
		select {
		case g.asked <- o:
		case <-t.Context().Done(): // the test has failed
			return
		}
		select {
		case err := <-o.done:
			if err != nil {
				http.Error(w, err.Error(), 500)
			}
		case <-t.Context().Done():
		}
	}))
	t.Cleanup(systemctl.Close)
	// A machine that root reaches by ssh has another /etc/agentidp, and is 127.0.0.3.
	ssh := "#!/bin/sh\nshift\nMACHINE=other exec sh -c \"$(echo \"$*\" | sed 's|/etc/agentidp|" + g.other() + "|g')\"\n"
	script := "#!/bin/sh\nexec curl -sS --fail-with-body -G --data-urlencode words=\"${MACHINE:+$MACHINE: }$*\" " + systemctl.URL + "\n"
	uid, gid, _, err := postgresUser()
	err = errors.Join(err, os.Mkdir(g.folder, 0o700), os.Mkdir(bin, 0o755), os.Mkdir(filepath.Join(g.folder, "keys"), 0o750),
		os.Chown(g.folder, uid, gid), os.Chown(filepath.Join(g.folder, "keys"), uid, gid),
		os.Symlink(program, filepath.Join(bin, "agentidp")),
		os.Mkdir(g.other(), 0o700), os.Chown(g.other(), uid, gid), os.Mkdir(g.other()+"/keys", 0o750), os.Chown(g.other()+"/keys", uid, gid),
		os.WriteFile(filepath.Join(bin, "systemctl"), []byte(script), 0o755), os.WriteFile(filepath.Join(bin, "ssh"), []byte(ssh), 0o755),
		os.WriteFile(filepath.Join(bin, "runuser"), []byte("#!/bin/sh\nshift 3\nexec \"$@\"\n"), 0o755)) // who is postgres already
	if err != nil {
		t.Fatal(err)
	}
	self, err := user.LookupId(strconv.Itoa(uid))
	if err != nil {
		t.Fatal(err)
	}
	g.env = []string{
		"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + g.folder, "TZ=UTC",
		"PGHOST=" + g.postgres.folder, "PGPORT=" + g.ports["postgres"], "PGUSER=" + self.Username, "PGDATABASE=postgres", "PGDATA=" + g.postgres.data(),
		"POSTGRES=127.0.0.1:" + g.ports["postgres"],
		"REDIS_URL=redis://default:rehearsal@127.0.0.1:" + g.ports["redis"] + "/0",
		"BASE=http://127.0.0.1:" + g.ports["idp"], "PORT=" + g.ports["idp"], "METRICS_ADDR=127.0.0.1:" + g.ports["metrics"], "DRAIN_TIME=1s", "BACKUP=" + filepath.Join(g.folder, "elsewhere"), "ARCHIVE=" + filepath.Join(g.folder, "wal"),
		"PORT2=" + g.ports["idp2"], "METRICS2=127.0.0.1:" + g.ports["metrics2"], "OTHER=other", "ADDRESS=127.0.0.3",
		"HOSTS=127.0.0.1:" + g.ports["postgres"] + ",127.0.0.2:" + g.ports["postgres"],
	}
	for i, p := range []*postgresServer{g.postgres, g.standby} {
		text := fmt.Sprintf("export MACHINE=db%[1]d NAME=db%[1]d HOME=%[2]s PGHOST=%[2]s PGDATA=%[3]s CONFIG=%[3]s/postgresql.conf PEER=db%[4]d PEER_HOST=127.0.0.%[4]d PASSFILE=%[5]s\n",
			i+1, p.folder, p.data(), 2-i, filepath.Join(g.folder, "replicator"))
		if err := os.WriteFile(fmt.Sprintf("%s/on-db%d", g.folder, i+1), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"postgresql", "redis-server"} {
		if err := g.obey("start " + name); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := g.connect("postgres")
	if err == nil {
		defer conn.Close(context.Background())
		_, err = conn.Exec(context.Background(), "create role "+pgx.Identifier{self.Username}.Sanitize()+" superuser login")
	}
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// command is run by the user who also runs PostgreSQL, which refuses root.
func (g *rig) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	owner := *g.postgres.owner
	cmd.Dir, cmd.Env, cmd.SysProcAttr = g.folder, g.env, &owner
	return cmd
}

// other is /etc/agentidp of another machine.
func (g *rig) other() string { return filepath.Join(g.postgres.folder, "other") }

var unitOrder = regexp.MustCompile(`^(start|enable --now|stop|restart|reload) (agentidp(?:@(.+))?)$`)

// obeyCopy does what systemctl does with a copy, here or on the other machine.
func (g *rig) obeyCopy(machine, action, unit, instance string) error {
	p := g.copies[machine+unit]
	switch action {
	case "reload":
		return p.cmd.Process.Signal(syscall.SIGHUP)
	case "stop", "restart":
		if err := p.stop(g.t, syscall.SIGTERM); err != nil || action == "stop" {
			return err
		}
	}
	cmd := g.command(g.program)
	cmd.Stderr = g.log
	cmd.Env = g.unit(g.folder, instance)
	if machine != "" { // which has its own 127.0.0.1
		cmd.Env = append(g.unit(g.other(), instance), "METRICS_ADDR=127.0.0.1:"+g.ports["metrics of another machine"])
	}
	cmd.Env = append(cmd.Env, g.env[0], "DRAIN_TIME=1s") // no balancer has to see that a copy stops
	g.copies[machine+unit] = startProcess(g.t, cmd, syscall.SIGTERM)
	return nil // as a simple unit, whose start says nothing
}

// obey does what systemctl does.
func (g *rig) obey(words string) error {
	if action, found := strings.CutSuffix(strings.TrimPrefix(words, "db1: "), " postgresql"); found {
		p := g.postgres
		if action, found = strings.CutPrefix(action, "db2: "); found {
			p = g.standby
		}
		switch action {
		case "restart":
			return errors.Join(g.obey("stop postgresql"), g.obey("start postgresql"))
		case "stop", "disable --now":
			if p.process == nil {
				return nil
			}
			return p.stop(g.t, syscall.SIGINT)
		case "start", "enable --now":
			p.launch()
			if p == g.standby {
				return nil // the page waits for it
			}
			return g.listening("postgres")
		}
	}
	there := strings.TrimPrefix(words, "other: ")
	if m := unitOrder.FindStringSubmatch(there); m != nil {
		return g.obeyCopy(words[:len(words)-len(there)], m[1], m[2], m[3])
	}
	switch words {
	case "start redis-server":
		program, err := exec.LookPath("redis-server")
		if err != nil {
			program = "valkey-server"
		}
		g.redis = startProcess(g.t, g.command(program, "--bind", "127.0.0.1", "--port", g.ports["redis"],
			"--requirepass", "rehearsal", "--maxmemory-policy", "noeviction", "--save", ""), syscall.SIGKILL)
		return g.listening("redis")
	}
	return fmt.Errorf("%q is nothing that systemctl does here", words)
}

// unit returns the variables that the systemd unit gives the service, or one
// of its instances, of which folder is /etc/agentidp.
func (g *rig) unit(folder, instance string) (env []string) {
	g.t.Helper()
	text := section(g.t, pages+"/agentidp.service", `\[Service\]`, `\[Install\]`)
	for _, match := range regexp.MustCompile(`(?m)^(Environment=|EnvironmentFile=-)(.*)$`).FindAllStringSubmatch(text, -1) {
		// Credentials are copies of files that are named alike.
		value := strings.NewReplacer("%d", folder, "/etc/agentidp", folder, "%i", instance).Replace(match[2])
		if match[1] == "Environment=" {
			env = append(env, strings.Fields(value)...)
			continue
		}
		file, err := os.ReadFile(value)
		if err != nil {
			g.t.Fatal(err)
		}
		env = append(env, strings.Fields(string(file))...)
	}
	return env
}

// listening waits until a store lets somebody in.
func (g *rig) listening(name string) error {
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if name == "postgres" {
			var conn *pgx.Conn
			if conn, err = g.connect("postgres"); err == nil {
				return conn.Close(context.Background())
			}
		} else {
			var conn net.Conn
			if conn, err = net.Dial("tcp", "127.0.0.1:"+g.ports[name]); err == nil {
				return conn.Close()
			}
		}
	}
	return fmt.Errorf("%s does not start: %w", name, err)
}

// connect is a superuser's way to a database.
func (g *rig) connect(database string) (*pgx.Conn, error) {
	return pgx.Connect(context.Background(), "postgres://agentidp@127.0.0.1:"+g.ports["postgres"]+"/"+database)
}

// rehearse pastes blocks into one shell, which stops where a command fails.
// Before is called with each block before it is run, and may be nil.
func (g *rig) rehearse(blocks []block, before func(block)) {
	g.t.Helper()
	var script bytes.Buffer
	for i, b := range blocks {
		fmt.Fprintf(&script, "systemctl reached %d\n%s\n", i, b.text)
	}
	cmd := g.command("sh", "-eu", "-c", script.String())
	var out logBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	shell := startProcess(g.t, cmd, syscall.SIGKILL)
	at := block{page: "nothing"}
	limit := time.After(15 * time.Minute)
	for {
		select {
		case o := <-g.asked:
			var i int
			if _, err := fmt.Sscanf(o.words, "reached %d", &i); err != nil {
				o.done <- g.obey(o.words)
				continue
			}
			at = blocks[i]
			fmt.Fprintf(&out, "== %s, line %d\n", at.page, at.line)
			if before != nil {
				before(at)
			}
			o.done <- nil
		case <-shell.exited:
			if shell.err != nil {
				g.t.Fatalf("the block at line %d of %s fails: %v\n%s\nthe service: %s", at.line, at.page, shell.err, &out, g.log)
			}
			g.t.Logf("%s\nthe service: %s", &out, g.log)
			return
		case <-limit:
			g.t.Fatalf("the block at line %d of %s doesn't end:\n%s\nthe service: %s", at.line, at.page, &out, g.log)
		}
	}
}

// extra are commands of the test's own among those of a page: before the block
// that has these words.
type extra struct{ before, commands string }

func insert(t testing.TB, blocks []block, extras ...extra) []block {
	t.Helper()
	for _, e := range extras {
		i := slices.IndexFunc(blocks, func(b block) bool { return strings.Contains(b.text, e.before) })
		if i < 0 {
			t.Fatalf("no block has %q", e.before)
		}
		blocks = slices.Insert(blocks, i, block{"the test, before " + blocks[i].page, blocks[i].line, e.commands})
	}
	return blocks
}

// anotherDay is how a later session begins: with nothing that the installation
// has left in the shell. Cron has been at work, and has sent a mail, which is
// what a command prints, where it failed and only there. (That fsync is off is
// the test's.)
func anotherDay(t testing.TB) []block {
	t.Helper()
	cron := regexp.MustCompile(`(?m)^    0 \* \* \* \* root cd /etc/agentidp && (.*)$`).FindStringSubmatch(readPage(t, "README.md"))
	if cron == nil {
		t.Fatal("README.md has no line for cron")
	}
	return []block{{"the test, after the installation", 0, `
mail() { env -i sh -c '` + cron[1] + `' 2>&1 | grep -v 'fsync or full_page_writes is off'; }
before=$(newest)
if mail; then exit 1; fi
[ "$(newest)" != "$before" ]
mv database_url elsewhere.url
mail | grep DATABASE_URL
mv elsewhere.url database_url
unset AGENT TOKEN ADMIN BASE BACKUP
. ./session
ADMIN=$(token first-agent)
`}}
}

func TestInstallCanBePasted(t *testing.T) {
	t.Parallel()
	g := newRig(t)
	g.rehearse(runBlocks(t, "README.md"), nil)
	g.wantMode(0o640, "keys/jwt.pem")
	g.wantMode(0o600, "database_url", "redis_url", "owner_url", "first-agent", "try-agent", "session")
}

// wantMode wants files that nobody can read who need not.
func (g *rig) wantMode(mode os.FileMode, names ...string) {
	g.t.Helper()
	for _, name := range names {
		info, err := os.Stat(filepath.Join(g.folder, name))
		if err != nil {
			g.t.Error(err)
		} else if info.Mode() != mode {
			g.t.Errorf("%s has the mode %o, want %o", name, info.Mode(), mode)
		}
	}
}

func TestDatabasePageCanBePasted(t *testing.T) {
	t.Parallel()
	g := newRig(t)
	g.rehearse(slices.Concat(runBlocks(t, "README.md"), anotherDay(t), runBlocks(t, "database.md")), nil)
}

func TestSecurityPageCanBePasted(t *testing.T) {
	t.Parallel()
	g := newRig(t)
	page := runBlocks(t, "security.md")
	secrets := page[slices.IndexFunc(page, func(b block) bool { return strings.Contains(b.text, "expiresAt") })].text
	g.rehearse(slices.Concat(runBlocks(t, "README.md"), anotherDay(t), insert(t, page,
		extra{"key next.pem", `
agentidp keygen | ssh other 'cat >/etc/agentidp/keys/jwt.pem' # who pastes it there too makes another key
copies reload
differ() { ! each published 1; }
await differ
spread
copies reload
await each published 1
`},
		extra{"OLD=$(token try-agent)\ncheckpoint", "ADMIN=expired # as it may have while one waited\n"},
		extra{": | key jwt.pub\nspread\ncopies reload", `alive "$OLD"` + "\n"},
		extra{"KEYS=keys/all.pub", `dead "$OLD" # TOKEN_TTL was not waited for` + "\n"},
		extra{"awk '/BEGIN/", `
rm keys/jwt.pem
copies reload
health ok
if idp verify-audit; then exit 1; fi
LOST=$(token try-agent)
lost=$(newest)
`},
		extra{"expiresAt", `
alive "$LOST"
idp verify-audit "$(signed "$lost")" | grep '^extends'
`},
		extra{"for action in credential.generated", secrets + `
psql -At -v agent="$AGENT" <<'END' | grep -x '1 of 3'
select count(*) filter (where status = 'active') || ' of ' || count(*) from credentials where client_id = :'agent'
END
`})), nil)
	g.wantMode(0o640, "keys/jwt.pem", "../other/keys/jwt.pem", "../other/keys/jwt.pub")
	g.wantMode(0o600, "database_url", "first-agent", "try-agent", "../other/database_url")
	if readFile(t, g.folder+"/keys/jwt.pem") != readFile(t, g.other()+"/keys/jwt.pem") {
		t.Error("the copies have different keys")
	}
}

// What can be restored from, and words of its block alone.
var restores = map[string]string{"a dump": "agentidp_before", "a moment": "recovery_target_time"}

// Between the backup and the restore an agent is suspended, which the restore
// loses. The checkpoint from after that names the first event that is lost.
func TestOperationsPageCanBePasted(t *testing.T) {
	t.Parallel()
	for from := range restores {
		t.Run(from, func(t *testing.T) {
			t.Parallel()
			page := runBlocks(t, "operations.md")
			for other, words := range restores {
				all := len(page)
				page = slices.DeleteFunc(page, func(b block) bool { return other != from && strings.Contains(b.text, words) })
				if other != from && len(page) != all-1 {
					t.Fatalf("%d blocks of operations.md are for %s, want one", all-len(page), other)
				}
			}
			page = insert(t, page, nights...)
			if from == "a moment" { // what is behind the restore is tried with the other one
				page = page[:slices.IndexFunc(page, func(b block) bool { return strings.Contains(b.text, "RETENTION_DAYS=30") })]
			}
			g := newRig(t)
			g.rehearse(slices.Concat(runBlocks(t, "README.md"), anotherDay(t), page), func(b block) {
				if strings.Contains(b.text, "idp bootstrap") {
					g.age(30)
				}
			})
		})
	}
}

// A standby is built and lost, the primary is lost, and comes back. What was
// revoked in between stays so.
func TestPostgreSQLPageCanBePasted(t *testing.T) {
	t.Parallel()
	g := newRig(t)
	page := runBlocks(t, "postgresql.md")
	synchronous := page[slices.IndexFunc(page, func(b block) bool { return strings.Contains(b.text, "sync_state = 'sync'") })].text
	page = append(insert(t, page,
		extra{"wait_event = 'SyncRep'", on("db2", "systemctl stop postgresql\n") + "health down\n"},
		extra{"disable --now", "health ok\n" + on("db2", "systemctl start postgresql\n") + synchronous + `
REVOKED=$(token try-agent)
ADMIN=$(token first-agent)
about revoke "$REVOKED"
checkpoint
` + on("db2", `# a standby that was built while commits waited for one
echo "synchronous_standby_names = 'db2'" >>"$PGDATA/postgresql.auto.conf"
psql -d postgres -At -c 'select pg_reload_conf()'
`)},
		extra{"psql -c checkpoint", `
dead "$REVOKED"
idp verify-audit "$(signed "$(newest)")" | grep '^extends'
`}), block{"the test, after postgresql.md", 0, `
` + on("db1", "systemctl stop postgresql\n") + `
health down # commits wait for the old primary now
` + on("db1", "systemctl start postgresql\n") + `
health ok
dead "$REVOKED"
checkpoint
`})
	g.rehearse(slices.Concat(runBlocks(t, "README.md"), anotherDay(t), page), nil)
}

// nights are what happens between the commands of operations.md, and what must
// be seen there.
var nights = []extra{
	{"pg_dump -Fc", `
AGENT=$(sed -n 's/^client_id: //p' try-agent)
TOKEN=$(token try-agent)
`},
	{"pg_basebackup -D", `
psql -c "alter system set synchronous_standby_names = 'db2'" # which is in the backup then, and not waited for here
`},
	{"oldest=", `
psql -c 'alter system reset synchronous_standby_names'
start=$(sed -n 's/^START WAL.*file \(.*\))$/\1/p' "$BACKUP"/base-*/backup_label)
[ "$(ls "$ARCHIVE" | head -n 1)" != "$start" ]
`},
	{"_before", `
[ "$(ls "$ARCHIVE" | head -n 1)" = "$start" ]
kept=$(last "$(newest)")
base=$(ls -d "$BACKUP"/base-* | tail -n 1) UNTIL=$(psql -At -c 'select clock_timestamp()')
api GET "/agents/$AGENT" | grep '"status":"active"'
(ADMIN=$TOKEN && api GET "/agents/$AGENT")
api PATCH "/agents/$AGENT" '{"status": "suspended"}'
(ADMIN=$TOKEN && api GET "/agents/$AGENT" || true) | grep UNAUTHORIZED
checkpoint
`},
	{"head=", `
for file in "$BACKUP"/log/*.jsonl; do
	if [ "$(last "$file")" -le "$kept" ]; then
		idp verify-audit "$(signed "$file")" | grep -x "extends the checkpoint at seq $(last "$file")"
	else
		idp verify-audit "$(signed "$file")" 2>&1 | grep -x "agentidp: the audit log was altered: the first bad seq is $((kept + 1))"
		lost=$file
	fi
done
`},
	{"copies start\nhealth ok\nADMIN", `
[ "$(wc -l <lost-events)" = 1 ]
grep "\"seq\":$((kept + 1)),\"agentId\":\"$AGENT\".*agent.suspended" lost-events
[ ! -e "$lost" ]
psql -At -c "select has_database_privilege('agentidp_service', 'agentidp', 'temporary')" | grep -x f
`},
	{"-v days=", `
echo RETENTION_DAYS=30 >>env
api GET "/agents/$AGENT" | grep '"status":"active"' # the suspension was lost
psql -At -c "select count(*) from pg_inherits where inhparent = 'audit_events'::regclass" >months
`},
	{"shutdown nosave", `
cmp expired old-month # the month that is old enough, and not the next
psql -At -c "select count(*) + 1 from pg_inherits where inhparent = 'audit_events'::regclass" | cmp - months
REVOKED=$(token try-agent)
about revoke "$REVOKED"
dead "$REVOKED"
`},
	{"owner migrate\ncopies restart", `
dead "$REVOKED"
`},
}

// age makes a log that began long ago: a month with events that are old enough
// to be dropped, and one behind it in which the first is as old.
func (g *rig) age(days int) {
	g.t.Helper()
	conn, err := g.connect("agentidp")
	if err != nil {
		g.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	y, m, _ := time.Now().UTC().AddDate(0, 0, -days).Date()
	last := event{PrevHash: make(digest, 32), Hash: make(digest, 32)}
	for _, back := range []int{2, 0} {
		month := time.Date(y, m-time.Month(back), 1, 0, 0, 0, 0, time.UTC)
		name := "audit_events_" + month.Format("2006_01")
		sql := fmt.Sprintf(`create table %s partition of audit_events for values from ('%s') to ('%s')`,
			name, month.Format(time.RFC3339), month.AddDate(0, 1, 0).Format(time.RFC3339))
		if _, err := conn.Exec(context.Background(), `set role agentidp_owner; `+sql); err != nil {
			g.t.Fatal(err)
		}
		if back > 0 {
			if err := os.WriteFile(filepath.Join(g.folder, "old-month"), []byte(name+"\n"), 0o644); err != nil {
				g.t.Fatal(err)
			}
		}
		for range 3 {
			e := event{EventID: newID(), Seq: last.Seq + 1, Action: authFailed, Outcome: "failure", Metadata: rawJSON(`{}`),
				Timestamp: moment{month}, PrevHash: last.Hash}
			e.Hash = e.sum()
			if _, err := conn.Exec(context.Background(), `
				insert into audit_events (`+eventColumns+`)
				values ($1, $2, null, null, $3, $4, '', '', $5, $6, $7, $8)`,
				e.EventID, e.Seq, e.Action, e.Outcome, string(e.Metadata), month, e.PrevHash, e.Hash); err != nil {
				g.t.Fatal(err)
			}
			last = e
		}
	}
}

// pageTables returns the rows of the tables of a page below a heading, up to
// the next heading, as readmeTable does. Names are in backticks.
func pageTables(t *testing.T, page, heading string) map[string]map[string]string {
	t.Helper()
	_, section, found := strings.Cut("\n"+readPage(t, page), "\n"+heading+"\n")
	if !found {
		t.Fatalf("%s has no heading %q", page, heading)
	}
	if i := regexp.MustCompile(`(?m)^#`).FindStringIndex(section); i != nil {
		section = section[:i[0]]
	}
	table := map[string]map[string]string{}
	var head []string
	for line := range strings.Lines(section) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			head = nil
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if head == nil {
			head = cells
			continue
		}
		if len(cells) != len(head) {
			t.Errorf("%s has a row of %d cells under a head of %d: %s", page, len(cells), len(head), line)
			continue
		}
		row := map[string]string{"table": head[0], "all": line}
		for i, cell := range cells {
			row[head[i]] = cell
		}
		for _, name := range inBackticks(cells[0]) {
			key := head[0] + " " + name
			if table[key] != nil {
				t.Errorf("%s has the %s twice below %q", page, key, heading)
			}
			table[key] = row
		}
	}
	return table
}

// wantSame wants a page to have these names and no others.
func wantSame(t *testing.T, page, what string, have map[string]map[string]string, want []string) {
	t.Helper()
	for _, name := range want {
		if have[what+" "+name] == nil {
			t.Errorf("%s lacks the %s %s", page, what, name)
		}
	}
	for key, row := range have {
		if name := strings.TrimPrefix(key, what+" "); row["table"] == what && !slices.Contains(want, name) {
			t.Errorf("%s has the %s %s, which there isn't", page, what, name)
		}
	}
}

// A developer pastes into a shell that has BASE and a client, as the page says.
func TestDevelopersPagesCanBePasted(t *testing.T) {
	t.Parallel()
	if today := time.Now().UTC().Truncate(24 * time.Hour); time.Since(today) > 24*time.Hour-time.Minute {
		time.Sleep(time.Until(today.Add(24 * time.Hour))) // or the events would be of two days
	}
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "1000")
	id, secret := v.newClient("resumes:read", tokensRead)
	for range 120 { // more than a page of events
		v.token(v.id, v.secret, "")
	}
	for page, want := range map[string]string{
		"README.md":    `^\{"access_token":"eyJ.*\}\n\{"keys":\[.*\]\}\n\{"active":true,.*\}\n\{\}\n\{"active":false\}\n$`,
		"audit-log.md": `^\{"data":\[\{.*"action":"token.issued".*\],"total":.*\}\n\{"verified":true,.*"checkpoint":"eyJ\S+"\}\n$`,
	} {
		var script strings.Builder
		blocks := runBlocks(t, "../developers/"+page)
		for _, b := range blocks {
			script.WriteString(b.text)
		}
		cmd := exec.Command("sh", "-eu", "-c", script.String())
		cmd.Dir = t.TempDir()
		cmd.Env = append(os.Environ(), "BASE="+v.url, "CLIENT_ID="+id, "CLIENT_SECRET="+secret, "SERVICE=https://resumes.example.com", "TOKEN="+v.bearer)
		out, err := cmd.CombinedOutput()
		if err != nil || len(blocks) != map[string]int{"README.md": 3, "audit-log.md": 4}[page] || !regexp.MustCompile(want).Match(out) {
			t.Errorf("%s has %d blocks, which print %s, %v, want %s", page, len(blocks), out, err, want)
		}
		if page != "audit-log.md" {
			continue
		}
		for file, how := range map[string]string{"pages": "by the cursor of", "log": "behind a place, as in"} {
			read, err := os.ReadFile(filepath.Join(cmd.Dir, file))
			if err != nil {
				t.Fatal(err)
			}
			if n, all := strings.Count(string(read), `"eventId"`), v.count(`select count(*) from audit_events`); n != all || n <= 100 {
				t.Errorf("%s %s %d events were read, want all %d, and more than a page", how, page, n, all)
			}
		}
	}
}

// A developer pastes what makes, registers and changes a key; the program in Go then signs with it.
func TestKeysPageCanBePasted(t *testing.T) {
	t.Parallel()
	v := newService(t)
	program, err := builtProgram()
	if err != nil {
		t.Fatal(err)
	}
	folder, id := t.TempDir(), v.newAgent("resumes:read")
	var script strings.Builder
	blocks := runBlocks(t, "../developers/keys.md")
	for _, b := range blocks {
		script.WriteString(b.text)
	}
	page := readFile(t, "docs/developers/keys.md")
	for _, name := range []string{"assertion.go", "token.go"} {
		source := regexp.MustCompile("(?s)\n```go\n(// " + regexp.QuoteMeta(name) + "\n.*?)\n```\n").FindStringSubmatch(page)
		if source == nil {
			t.Fatalf("keys.md has no %s", name)
		}
		err = errors.Join(err, os.WriteFile(filepath.Join(folder, name), []byte(source[1]), 0o600))
	}
	if err = errors.Join(err, os.Mkdir(folder+"/bin", 0o700), os.Symlink(program, folder+"/bin/agentidp")); err != nil {
		t.Fatal(err)
	}
	run := func(command string, env ...string) (string, error) {
		cmd := exec.Command("sh", "-euc", command)
		cmd.Dir = folder
		cmd.Env = append(os.Environ(), "PATH="+folder+"/bin:"+os.Getenv("PATH"), "BASE="+v.url, "CLIENT_ID="+id, "TOKEN="+v.bearer,
			"SERVICE=https://resumes.example.com", "GOFLAGS=", "GOWORK=off")
		cmd.Env = append(cmd.Env, env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	want := regexp.MustCompile(`^(\{"kty":"EC",.*\})\n(\{"credentialId":.*"kind":"key",.*\}\n){2}$`)
	out, err := run(script.String())
	printed := want.FindStringSubmatch(out)
	if err != nil || len(blocks) != 5 || printed == nil {
		t.Fatalf("keys.md has %d blocks, which print %s, %v, want %s", len(blocks), out, err, want)
	}
	path, openssl := "/agents/"+id+"/credentials", `{"publicKey": `+printed[1]+`}`
	credentialID := v.want(v.api(v.bearer, "POST", path, openssl), 201, "").text("credentialId")
	v.want(v.api(v.bearer, "POST", path, openssl), 409, "KEY_ALREADY_REGISTERED")
	v.want(v.api(v.bearer, "POST", path+"/"+credentialID+"/rotate", openssl), 409, "KEY_ALREADY_REGISTERED")
	if out, err := run("go build -o token token.go assertion.go"); err != nil {
		t.Fatalf("building the program in Go of keys.md: %v: %s", err, out)
	}
	for key, refusal := range map[string]string{"next.pem": "", "openssl.pem": "", "client.pem": "401 Unauthorized: No active key of this client"} { // the last one was revoked
		out, err := run("./token", "KEY="+key)
		if refusal == "" && (err != nil || !v.active(strings.TrimSpace(out))) || refusal != "" && (err == nil || !strings.Contains(out, refusal)) {
			t.Errorf("with %s the program in Go of keys.md prints %s, %v, want a refusal %q", key, out, err, refusal)
		}
	}
}

// An operator makes a worker a delegate; the orchestrator gives it a token, which the worker trades, and ends it.
func TestDelegationPageCanBePasted(t *testing.T) {
	t.Parallel()
	v := newService(t)
	orchestrator, given := v.newClient("resumes:read", "scores:*")
	worker, secret := v.newClient("resumes:*")
	var script strings.Builder
	blocks := runBlocks(t, "../developers/delegation.md")
	for _, b := range blocks {
		script.WriteString(b.text)
	}
	cmd := exec.Command("sh", "-euc", script.String())
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "BASE="+v.url, "SERVICE=https://resumes.example.com", "ADMIN="+v.bearer,
		"ORCHESTRATOR="+orchestrator+":"+given, "WORKER="+worker+":"+secret, "CHECKER="+v.id+":"+v.secret)
	const answered = `\{"access_token":"eyJ[^"]*","issued_token_type":"urn:ietf:params:oauth:token-type:access_token",.*"scope":"resumes:read"\}`
	want := regexp.MustCompile(`^\{"agentId":"` + orchestrator + `",.*"delegates":\["` + worker + `"\].*\}\n` + answered + `\n` +
		`\{"active":true,.*"sub":"` + orchestrator + `",.*"client_id":"` + worker + `",.*"act":\{"sub":"` + worker + `"\},"chain":\[\{"cred":".*\}\]\}\n` +
		`\{\}\n\{"active":false\}\n` + answered + `\n$`)
	if out, err := cmd.CombinedOutput(); err != nil || len(blocks) != 6 || !want.Match(out) {
		t.Fatalf("delegation.md has %d blocks, which print %s, %v, want %s", len(blocks), out, err, want)
	}
}

// What is said of an exchange that is refused stands in delegation.md, and nothing else does.
func TestDelegationPageHasEveryRefusal(t *testing.T) {
	_, table, _ := strings.Cut(readFile(t, "docs/developers/delegation.md"), "\n## What is refused\n")
	table, _, _ = strings.Cut(table, "\n## ")
	var said []string
	for _, row := range regexp.MustCompile("(?m)^\\| \\w+(?: \\(403\\))? \\| (`.*) \\| .* \\|$").FindAllStringSubmatch(table, -1) {
		for _, text := range inBackticks(row[1]) {
			if strings.Contains(text, " ") { // and no name
				said = append(said, strings.TrimSuffix(text, "."))
			}
		}
	}
	var like func(e ast.Expr) string // what the source says, where anything may stand for a variable
	like = func(e ast.Expr) string {
		if sum, ok := e.(*ast.BinaryExpr); ok {
			return like(sum.X) + like(sum.Y)
		}
		if text := literal(e); text != "" {
			return regexp.QuoteMeta(text)
		}
		return ".+"
	}
	var source []*regexp.Regexp
	for _, file := range goFiles(t, false) {
		ast.Inspect(file.File, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if of, ok := call.Fun.(*ast.SelectorExpr); ok && of.Sel.Name == "because" {
				text := like(call.Args[0])
				if file.name == "exchange.go" || strings.Contains(text, "subject_token") {
					source = append(source, regexp.MustCompile("^"+strings.TrimSuffix(text, `\.`)+"$"))
				}
			}
			return true
		})
	}
	wantRefusals(t, "delegation.md", source, said)
}

// wantRefusals wants a page to have each refusal of the source, and no other.
func wantRefusals(t testing.TB, page string, source []*regexp.Regexp, said []string) {
	t.Helper()
	for _, r := range source {
		if !slices.ContainsFunc(said, r.MatchString) {
			t.Errorf("%s lacks the refusal %s", page, r)
		}
	}
	for _, text := range said {
		if !slices.ContainsFunc(source, func(r *regexp.Regexp) bool { return r.MatchString(text) }) {
			t.Errorf("%s has the refusal %q, which is not in the source", page, text)
		}
	}
	if len(source) < 15 || len(said) < 15 {
		t.Errorf("the source has the refusals %s, and %s %q", source, page, said)
	}
}

// What is said of an assertion that isn't right stands in keys.md, and nothing else does.
func TestKeysPageHasEveryRefusal(t *testing.T) {
	page := readFile(t, "docs/developers/keys.md")
	_, table, _ := strings.Cut(page, "\n## What a refusal means\n")
	table, _, _ = strings.Cut(table, "\n## ")
	var source []string
	for _, file := range goFiles(t, false) {
		for _, declared := range file.Decls {
			f, isFunc := declared.(*ast.FuncDecl)
			if !isFunc && file.name != "jwk.go" || isFunc && !slices.Contains([]string{"readAssertion", "check", "checkAssertion"}, f.Name.Name) {
				continue
			}
			ast.Inspect(declared, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok && len(call.Args) > 0 {
					first := call.Args[0]
					for sum, ok := first.(*ast.BinaryExpr); ok; sum, ok = first.(*ast.BinaryExpr) {
						first = sum.X
					}
					text := strings.TrimSuffix(verb.ReplaceAllString(literal(first), "…"), " ")
					if (strings.HasPrefix(text, "must ") || strings.HasPrefix(text, "was used ")) && !slices.Contains(source, text) {
						source = append(source, strings.Replace(text, "was used", "The client_assertion was used", 1))
					}
				}
				return true
			})
		}
	}
	found := regexp.MustCompile("(?m)^\\| `(?:… )?(.*)` \\|").FindAllStringSubmatch(table, -1)
	for _, text := range source {
		if !strings.Contains(table, "`… "+text) && !strings.Contains(table, "`"+text) {
			t.Errorf("keys.md lacks the refusal %q", text)
		}
	}
	if len(source) < 10 || len(found) != len(source)+2 { // and those of errors.go and auth.go
		t.Errorf("the source has the refusals %q, and keys.md %d of them", source, len(found))
	}
}

func TestPagesHaveEveryVariable(t *testing.T) {
	table := pageTables(t, "environment-variables.md", "# Environment variables")
	text := readPage(t, "environment-variables.md")
	var names []string
	for i, v := range variables(t) {
		names = append(names, v.name)
		row := table["variable "+v.name]
		preset := strings.Trim(row["default"], "`")
		if row["required"] == "yes" {
			preset = "*"
		}
		if row != nil && preset != v.preset {
			t.Errorf("environment-variables.md says that the default of %s is %q, want %q (*: required)", v.name, preset, v.preset)
		}
		if file := strings.Contains(text, "`"+v.name+"_FILE`"); file != (i < 5) {
			t.Errorf("that environment-variables.md has %s_FILE is %v", v.name, file)
		}
	}
	wantSame(t, "environment-variables.md", "variable", table, names)
}

func TestPagesHaveEverySettingOfOurSessions(t *testing.T) {
	names := []string{"statement_timeout"} // which is sent by itself
	_, text, _ := strings.Cut(readFile(t, "store.go"), "const settings = `")
	text, _, _ = strings.Cut(text, "`")
	for _, m := range regexp.MustCompile(`(?m)^\tset (\w+) = .*;`).FindAllStringSubmatch(text+"\n", -1) {
		names = append(names, m[1])
	}
	if len(names) < 10 {
		t.Errorf("the source has only the settings %q", names)
	}
	wantSame(t, "environment-variables.md", "setting", pageTables(t, "environment-variables.md", "## Settings of PostgreSQL"), names)
}

// The example is read as systemd and Docker do, and by a shell.
func TestExampleEnvironmentIsAccepted(t *testing.T) {
	t.Parallel()
	_, example, _ := strings.Cut(readPage(t, "environment-variables.md"), "\n```env\n")
	example, _, found := strings.Cut(example, "```")
	if !found {
		t.Fatal("environment-variables.md has no example")
	}
	folder := t.TempDir()
	example = strings.ReplaceAll(example, "/etc/agentidp", folder)
	err := errors.Join(os.Mkdir(filepath.Join(folder, "keys"), 0o700), os.WriteFile(filepath.Join(folder, "keys", "jwt.pem"), []byte(testKey()), 0o600),
		os.WriteFile(filepath.Join(folder, "keys", "jwt.pub"), []byte(publicPEM(t, makeKey("ES256")())), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	for line := range strings.Lines(example) {
		if line = strings.TrimSuffix(line, "\n"); line != "" && line[0] != '#' {
			name, value, found := strings.Cut(line, "=")
			if !found || strings.TrimSpace(value) != value {
				t.Errorf("the example has %q", line)
			}
			env[name] = value
		}
	}
	// A program that is given all of it asks for nothing more than PostgreSQL.
	given := maps.Clone(env)
	given["DATABASE_URL_FILE"], given["DATABASE_URL"] = "", "postgres://127.0.0.1:1/nobody"
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var log bytes.Buffer
	if _, err := command(ctx, given, &log); !strings.Contains(log.String(), "waiting for PostgreSQL") {
		t.Fatalf("the example is refused: %v: %s", err, &log)
	}
	for _, v := range variables(t) { // it shows them all
		if env[v.name]+env[v.name+"_FILE"] == "" {
			t.Errorf("the example lacks %s", v.name)
		}
		delete(env, v.name)
		delete(env, v.name+"_FILE")
	}
	if len(env) > 0 {
		t.Errorf("the example has %v, which is not read", env)
	}
}

// plainSQL takes out what PostgreSQL adds to an expression when it shows it.
func plainSQL(s string) string {
	s = regexp.MustCompile(`::(text|regclass)\b`).ReplaceAllString(s, "")
	return strings.ToLower(regexp.MustCompile("[()`]").ReplaceAllString(s, ""))
}

func TestDatabasePageEqualsTheSchema(t *testing.T) {
	t.Parallel()
	v := newService(t)
	query := func(sql string, args ...any) (rows [][]string) {
		t.Helper()
		found, _ := v.db.Query(t.Context(), sql, args...)
		rows, err := pgx.CollectRows(found, func(row pgx.CollectableRow) ([]string, error) {
			values := make([]string, len(row.FieldDescriptions()))
			at := make([]any, len(values))
			for i := range values {
				at[i] = &values[i]
			}
			return values, row.Scan(at...)
		})
		if err != nil {
			t.Fatal(err)
		}
		return rows
	}
	const page = "database.md"
	var tables []string
	for _, row := range query(`
		select relname::text from pg_class
		where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition`) {
		tables = append(tables, row[0])
	}
	if len(tables) != 4 || !strings.Contains(readPage(t, page), "Four tables") {
		t.Errorf("there are the tables %q", tables)
	}
	for _, name := range tables {
		have, names := pageTables(t, page, "## "+name), map[string][]string{}
		for _, row := range query(`
			select attname::text, replace(format_type(atttypid, atttypmod), 'timestamp with time zone', 'timestamptz'),
				case when attnotnull then 'no' else 'yes' end, coalesce(pg_get_expr(adbin, adrelid), '')
			from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
			where attrelid = $1::text::regclass and attnum > 0 and not attisdropped`, name) {
			names["column"] = append(names["column"], row[0])
			said := have["column "+row[0]]
			if said["type"] != row[1] || said["null"] != row[2] || plainSQL(said["default"]) != plainSQL(row[3]) {
				t.Errorf("%s says %q of %s.%s, want %q", page, said["all"], name, row[0], row[1:])
			}
		}
		for _, row := range query(`
			select c.relname::text, case when indisunique then 'yes' else 'no' end, regexp_replace(pg_get_indexdef(indexrelid), '^.* USING btree ', '')
			from pg_index join pg_class c on c.oid = indexrelid
			where indrelid = $1::text::regclass`, name) {
			names["index"] = append(names["index"], row[0])
			said := have["index "+row[0]]
			if said["unique"] != row[1] || plainSQL(said["on"]) != plainSQL(row[2]) {
				t.Errorf("%s says %q of the index %s, want %q", page, said["all"], row[0], row[1:])
			}
		}
		for _, row := range query(`
			select conname::text, pg_get_constraintdef(oid)
			from pg_constraint
			where conrelid = $1::text::regclass and contype <> 'n'`, name) {
			names["constraint"] = append(names["constraint"], row[0])
			demands := have["constraint "+row[0]]["demands"]
			for _, literal := range regexp.MustCompile(`'[^']*'|\b\d+\b|(?:KEY|REFERENCES) \w*`).FindAllString(row[1], -1) {
				literal = strings.Trim(strings.TrimPrefix(literal, "REFERENCES "), "'")
				if strings.HasPrefix(literal, "KEY") {
					continue
				}
				if !strings.Contains(demands, strings.TrimSuffix(literal, "s")) {
					t.Errorf("%s says that %s demands %q, want %s there: %s", page, row[0], demands, literal, row[1])
				}
			}
		}
		for _, what := range []string{"column", "index", "constraint"} {
			wantSame(t, page, what, have, names[what])
		}
	}
	var others []string
	have := pageTables(t, page, "## Other objects")
	for _, row := range query(`
		select relname::text, 'sequence' from pg_class where relnamespace = 'public'::regnamespace and relkind = 'S'
		union select proname::text, 'function' from pg_proc where pronamespace = 'public'::regnamespace
		union select tgname::text, 'trigger' from pg_trigger where not tgisinternal
		union select relname::text, relkind::text from pg_class where relnamespace = 'public'::regnamespace and relkind not in ('r', 'p', 'i', 'I', 'S')`) {
		others = append(others, row[0])
		if kind := have["object "+row[0]]["kind"]; kind != row[1] {
			t.Errorf("%s says that %s is a %q, want a %s", page, row[0], kind, row[1])
		}
	}
	wantSame(t, page, "object", have, others)
	partition := regexp.MustCompile(`^audit_events_(\d{4}_\d\d|default)$`)
	parts := query(`select inhrelid::regclass::text from pg_inherits where inhparent = 'audit_events'::regclass`)
	for _, row := range parts {
		if !partition.MatchString(row[0]) {
			t.Errorf("there is the partition %s, of which %s doesn't tell", row[0], page)
		}
	}
	if len(parts) != 14 {
		t.Errorf("there are %d partitions, want this month's, the next twelve and the default one", len(parts))
	}
	var rights []string
	for key, row := range pageTables(t, page, "## Roles") {
		for _, right := range strings.Split(row["rights of the service"], ", ") {
			rights = append(rights, strings.TrimPrefix(key, "object ")+" "+strings.ToUpper(right))
		}
	}
	if slices.Sort(rights); !slices.Equal(rights, grants) {
		t.Errorf("%s gives the service %q, want %q", page, rights, grants)
	}
}

// The installation alone makes the service's role, by what roleSQL finds there
// and the tests of attacks run.
func TestInstallAloneGrants(t *testing.T) {
	names, _ := filepath.Glob(pages + "/*.*")
	below, _ := filepath.Glob(pages + "/*/*")
	others, _ := filepath.Glob("docs/*.md")
	more, _ := filepath.Glob("docs/developers/*.md")
	elsewhere := map[string][]string{
		pages + "/operations.md": {"revoke temporary on database agentidp from public"},                                                  // which a dump hasn't
		pages + "/siem.md":       {"grant usage on schema public to agentidp_reader", "grant select on audit_events to agentidp_reader"}, // TestFollowedFileIsOfThisLog
	}
	granting := regexp.MustCompile(`(?i)\b(create role agentidp_service|(grant|revoke) (select|insert|update|delete|truncate|usage|create|temp|all)[^\n]* (to|from) \w+)`)
	for _, name := range slices.Concat(names, below, others, more, []string{"README.md", "docker-compose.yml", "schema.sql"}) {
		text := readFile(t, name)
		if name == composeFile { // TestComposeSetup runs it
			text = strings.ReplaceAll(text, "$$", "$")
			text = strings.Replace(text, "'create role agentidp_service login'", "", 1)
		}
		if name == pages+"/README.md" || name == composeFile {
			for line := range strings.Lines(roleSQL(t)) {
				text = strings.Replace(text, strings.Replace(line, "choose one", "$service", 1), "", 1)
			}
		}
		for _, found := range granting.FindAllString(text, -1) {
			if !slices.Contains(elsewhere[name], found) {
				t.Errorf("%s has %q, which the tests of attacks don't run", name, found)
			}
		}
	}
}

func TestPagesHaveEveryPort(t *testing.T) {
	var ports []string
	add := func(text, pattern string) {
		t.Helper()
		found := regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1)
		if found == nil {
			t.Errorf("found no port like %s", pattern)
		}
		for _, match := range found {
			ports = append(ports, match[1:]...)
		}
	}
	for _, name := range []string{"docker-compose.yml", "Dockerfile"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if name == "Dockerfile" {
			add(string(text), `EXPOSE (\d+)`)
		} else {
			add(string(text), `"127\.0\.0\.1:\$\{PORT:-(\d+)\}:(\d+)"`)
			add(string(text), `@postgres:(\d+)/`)
			add(string(text), `redis:(\d+)/`)
		}
	}
	for _, v := range variables(t) {
		switch v.name {
		case "PORT":
			ports = append(ports, v.preset)
		case "METRICS_ADDR":
			add(v.preset, `:(\d+)$`)
		case "DATABASE_URL", "REDIS_URL":
			add(v.about, `host:(\d+)/`)
		}
	}
	slices.Sort(ports)
	_, section, _ := strings.Cut(readPage(t, "architecture.md"), "\n## Ports\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var said []string
	for _, match := range regexp.MustCompile(`(?m)^\| (\d+) \|`).FindAllStringSubmatch(section, -1) {
		said = append(said, match[1])
	}
	slices.Sort(said)
	if ports = slices.Compact(ports); !slices.Equal(said, ports) {
		t.Errorf("architecture.md has the ports %q, want %q", said, ports)
	}
}

func TestPagesHaveEveryMetricAndAlert(t *testing.T) {
	names := map[string]bool{}
	for _, file := range goFiles(t, false) {
		for _, match := range regexp.MustCompile(`["\x60\n]((?:agentidp|process|go)_[a-z_]+)`).FindAllStringSubmatch(file.text, -1) {
			names[match[1]] = true
		}
	}
	table := pageTables(t, "operations.md", "## Metrics and alerts")
	wantSame(t, "operations.md", "metric", table, slices.Sorted(maps.Keys(names)))
	var alerts []string
	for _, match := range regexp.MustCompile(`(?s)- alert: (\w+)\n(.*?severity: (\w+))`).FindAllStringSubmatch(readPage(t, "alerts.yml"), -1) {
		alerts = append(alerts, match[1])
		row, wait := table["alert "+match[1]], ""
		if at := regexp.MustCompile(`(?m)^\s*for: (\S+)`).FindStringSubmatch(match[2]); at != nil {
			wait = at[1]
		}
		if row["severity"] != match[3] || row["for"] != wait {
			t.Errorf("operations.md says %q of the alert %s, want %s and %s", row["all"], match[1], match[3], wait)
		}
	}
	wantSame(t, "operations.md", "alert", table, alerts)
	for _, name := range alerts { // by promtool
		if !strings.Contains(readPage(t, "alerts_test.yml"), `- {labels: '{alertname="`+name+`"}', value: `) {
			t.Errorf("alerts_test.yml never has %s fire", name)
		}
	}
}

// levels are the functions of slog that log.
var levels = map[string]string{"Debug": "DEBUG", "Info": "INFO", "Warn": "WARN", "Error": "ERROR"}

func literal(e ast.Expr) string {
	text := ""
	if l, ok := e.(*ast.BasicLit); ok && l.Kind == token.STRING {
		text, _ = strconv.Unquote(l.Value)
	}
	return text
}

func TestPagesHaveEveryLogLine(t *testing.T) {
	table := pageTables(t, "operations.md", "## Log lines")
	var messages []string
	for _, file := range goFiles(t, false) {
		ast.Inspect(file.File, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			f, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if from, ok := f.X.(*ast.Ident); !ok || from.Name != "slog" {
				return true
			}
			level := levels[f.Sel.Name]
			if level == "" {
				if strings.HasSuffix(f.Sel.Name, "Context") || f.Sel.Name == "Log" || f.Sel.Name == "LogAttrs" {
					t.Errorf("%s logs by slog.%s, which this test doesn't see through", file.name, f.Sel.Name)
				}
				return true
			}
			message := literal(call.Args[0])
			if message == "" {
				t.Errorf("%s logs a message that is no literal", file.name)
			}
			messages = append(messages, message)
			if said := table["msg "+message]["level"]; table["msg "+message] != nil && said != level {
				t.Errorf("operations.md says that %q is of level %s, want %s", message, said, level)
			}
			return true
		})
	}
	if len(messages) < 10 {
		t.Fatalf("found only the messages %q", messages)
	}
	wantSame(t, "operations.md", "msg", table, messages)
	for key, row := range table {
		if row["do"] == "" || row["it means"] == "" {
			t.Errorf("operations.md says nothing of %s", key)
		}
	}
}

// commands are the functions whose errors are what the program gives up with.
var commands = []string{"run", "checkHealth", "loadConfig", "read", "open", "serve", "bootstrap", "verifyAudit", "exportAudit", "followAudit", "printEvent", "readInquiry", "verifyFile", "readExport"}

var verb = regexp.MustCompile(`%[a-z]`)

// Every error with which the program gives up is there, and what the page has
// of errors is in the source.
func TestPagesHaveEveryErrorOfTheStart(t *testing.T) {
	start := pageTables(t, "operations.md", "## When it does not start")
	logged := pageTables(t, "operations.md", "### What error says")
	said := ""
	for key := range start {
		said += strings.TrimPrefix(key, "it says ") + "\n"
	}
	var source strings.Builder
	found, constants := 0, map[string]ast.Expr{}
	for _, file := range goFiles(t, false) {
		ast.Inspect(file.File, func(n ast.Node) bool {
			if e, ok := n.(ast.Expr); ok {
				source.WriteString(literal(e) + "\n")
			}
			if spec, ok := n.(*ast.ValueSpec); ok && len(spec.Names) == len(spec.Values) {
				for i, name := range spec.Names {
					constants[name.Name] = spec.Values[i]
				}
			}
			return true
		})
	}
	for _, file := range goFiles(t, false) {
		for _, declared := range file.Decls {
			name := ""
			if f, ok := declared.(*ast.FuncDecl); ok {
				name = f.Name.Name
			} else if v, ok := declared.(*ast.GenDecl); ok && len(v.Specs) == 1 {
				if spec, ok := v.Specs[0].(*ast.ValueSpec); ok && slices.Contains([]string{"errNotMigrated", "errPooled", "errEncoding"}, spec.Names[0].Name) {
					name = commands[0]
				}
			}
			if !slices.Contains(commands, name) {
				continue
			}
			ast.Inspect(declared, func(n ast.Node) bool {
				var texts []ast.Expr
				switch n := n.(type) {
				case *ast.CallExpr:
					if f, ok := n.Fun.(*ast.SelectorExpr); ok && (f.Sel.Name == "Errorf" || f.Sel.Name == "New" && len(n.Args) == 1) {
						texts = n.Args[:1]
					}
				}
				for _, e := range texts {
					if name, ok := e.(*ast.Ident); ok && constants[name.Name] != nil {
						e = constants[name.Name]
					}
					for _, piece := range strings.FieldsFunc(verb.ReplaceAllString(literal(e), "\n"), func(c rune) bool { return c == '\n' }) {
						if piece = strings.Trim(piece, " :"); len(piece) < 5 {
							continue
						}
						if found++; !strings.Contains(said, piece) {
							t.Errorf("operations.md lacks %q, with which the program may give up (%s)", piece, name)
						}
					}
				}
				return true
			})
		}
	}
	if found < 15 {
		t.Errorf("found only %d errors in the source", found)
	}
	for _, doing := range doings(t) {
		if start["it says "+doing] == nil && logged["in `error` "+doing] == nil && !strings.Contains(said, doing+":") {
			t.Errorf("operations.md lacks %q, which an error may begin with", doing)
		}
	}
	for _, table := range []map[string]map[string]string{start, logged} {
		for key := range table {
			_, name, _ := strings.Cut(strings.TrimPrefix(key, "in "), " ")
			for _, piece := range strings.Split(strings.TrimPrefix(name, "says "), "…") {
				if piece = strings.Trim(piece, " "); piece != "context deadline exceeded" && !strings.Contains(source.String(), strings.TrimSuffix(piece, ":")) {
					t.Errorf("operations.md has the error %q, which is not in the source", piece)
				}
			}
		}
	}
}

// doings are what errors begin with: what the program was about.
func doings(t *testing.T) (list []string) {
	for _, file := range goFiles(t, false) {
		ast.Inspect(file.File, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			f := call.Fun
			if generic, ok := f.(*ast.IndexExpr); ok {
				f = generic.X
			}
			name, at := "", 0
			switch f := f.(type) {
			case *ast.Ident:
				name = f.Name
			case *ast.SelectorExpr:
				name = f.Sel.Name
			}
			switch name {
			case "execSQL":
				at = 2
			case "one":
				at = 3
			case "Errorf":
			default:
				return true
			}
			text := literal(call.Args[at])
			if doing, found := strings.CutSuffix(text, ": %w"); (found || at > 0) && !strings.Contains(text, "%s") && !strings.Contains(doing, "\n") {
				list = append(list, doing)
			}
			return true
		})
	}
	if len(list) < 30 {
		t.Fatalf("found only %q", list)
	}
	return list
}

// PostgreSQL knows the codes by these names.
func TestPagesHaveTheCodesOfPostgreSQL(t *testing.T) {
	t.Parallel()
	v := newService(t)
	table := pageTables(t, "operations.md", "### What PostgreSQL says")
	if len(table) < 10 {
		t.Fatalf("operations.md has %d codes", len(table))
	}
	for key, row := range table {
		_, err := v.db.Exec(t.Context(), "do $$ begin raise "+strings.Trim(row["name"], "`")+"; end $$")
		var refused *pgconn.PgError
		if !errors.As(err, &refused) || "SQLSTATE "+refused.Code != key {
			t.Errorf("operations.md has %s for %s, and PostgreSQL says %v", key, row["name"], err)
		}
	}
}

// Every key that the service makes in Redis is of one of the patterns of
// architecture.md, and of each pattern there is one. None lives longer than is
// said there, and of those whose life is fixed none is much shorter.
func TestPagesHaveEveryRedisKey(t *testing.T) {
	t.Parallel()
	table := pageTables(t, "architecture.md", "## Keys in Redis")
	wildcards := strings.NewReplacer("<jti>", `[0-9a-f-]{36}`, "<client_id>", `[0-9a-f-]{36}`, "<minute>", `\d{8}`, "<window>", `\d{8}`, "<digest>", `[A-Za-z0-9_-]{43}`,
		"<address>", `[0-9a-f.:]+`, "<year>", `\d{4}`, "<month>", `\d\d`)
	type pattern struct {
		name    string
		matches *regexp.Regexp
		most    time.Duration // as the page has it
		longest time.Duration // that was seen
	}
	var patterns []*pattern
	for key, row := range table {
		name := strings.TrimPrefix(key, "key ")
		most, err := time.ParseDuration(inBackticks(row["lifetime"])[0])
		if err != nil {
			t.Fatalf("architecture.md has the lifetime %q", row["lifetime"])
		}
		patterns = append(patterns, &pattern{name, regexp.MustCompile("^" + wildcards.Replace(name) + "$"), most, -1})
	}
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "1000", "MONTHLY_TOKEN_LIMIT", "1000")
	look := func() {
		t.Helper()
		keys, err := v.rdb.Keys(t.Context(), "*").Result()
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range keys {
			life, err := v.rdb.PTTL(t.Context(), key).Result()
			if err != nil {
				t.Fatal(err)
			}
			if life == -2 { // it has ended since
				continue
			}
			i := slices.IndexFunc(patterns, func(p *pattern) bool { return p.matches.MatchString(key) })
			if i < 0 {
				t.Fatalf("there is the key %s, which architecture.md lacks", key)
			}
			end := nextMonth(time.Now()).AddDate(0, 0, 1) // of what counts a month
			if off := time.Until(end) - life; strings.HasPrefix(key, "monthly:") && key != "monthly:keeper" && off.Abs() > time.Minute {
				t.Errorf("%s ends in %v, want it to end at %v", key, life, end)
			}
			if patterns[i].longest = max(patterns[i].longest, life); life < 0 || life > patterns[i].most {
				t.Fatalf("%s ends in %v, want %v or less", key, life, patterns[i].most)
			}
		}
	}
	id, secret := v.newClient("a:b", credentialsWrite)
	token := v.token(id, secret, "")
	v.want(v.api(token, "POST", "/agents/"+id+"/credentials", "{}"), 201, "")
	v.want(v.form("", "", "/introspect", "client_id="+id+"&client_secret=sk_live_"+strings.Repeat("0", 64)+"&token=x"), 401, "invalid_client")
	v.want(v.form(v.id, v.secret, "/introspect", "token="+token), 200, "")
	v.want(v.do("POST", "/api/v1/token/introspect", "token=x", "Content-Type", formType, "Authorization", "Bearer "+v.bearer), 200, "")
	v.want(v.form(id, secret, "/revoke", "token="+token), 200, "")
	h := newHolder(t, "ES256")
	proof := h.sign(members{"typ": "dpop+jwt", "alg": "ES256", "jwk": h.jwk},
		members{"htm": "POST", "htu": v.env["ISSUER"] + "/api/v1/token", "iat": time.Now().Unix(), "jti": "1"})
	v.want(v.do("POST", "/api/v1/token", "grant_type=client_credentials&client_id="+id+"&client_secret="+secret, "Content-Type", formType, "DPoP", proof), 200, "")
	credential := v.want(v.api(v.bearer, "GET", "/agents/"+id+"/credentials", ""), 200, "").body["data"].([]any)[0].(map[string]any)["credentialId"].(string)
	v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials/"+credential+"/rotate", "{}"), 200, "")
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+credential, ""), 204, "")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status": "suspended"}`), 200, "")
	look()
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status": "active"}`), 200, "")
	for range 20 {
		look()
		time.Sleep(50 * time.Millisecond)
	}
	for _, p := range patterns {
		if p.longest < 0 {
			t.Errorf("of %s in architecture.md no key was seen", p.name)
		} else if p.longest < p.most/2 && !strings.HasPrefix(p.name, "monthly:") { // which ends with the month
			t.Errorf("keys like %s were seen to live for %v, and architecture.md says %v", p.name, p.longest, p.most)
		}
	}
}

var (
	fenced  = regexp.MustCompile("(?ms)^```.*?^```$")
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	linked  = regexp.MustCompile(`\]\(([^)\s]+)\)`)
)

// anchors are those that GitHub makes of the headings of a page.
func anchors(text string) (list []string) {
	for _, match := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		name := strings.ReplaceAll(strings.ToLower(match[1]), " ", "-")
		list = append(list, regexp.MustCompile(`[^\p{L}\p{N}_-]`).ReplaceAllString(name, ""))
	}
	return list
}

func TestLinksLeadSomewhere(t *testing.T) {
	names, err := filepath.Glob(pages + "/*.md")
	if err != nil || len(names) < 7 {
		t.Fatalf("there are the pages %q, %v", names, err)
	}
	others, _ := filepath.Glob("docs/*.md")
	more, _ := filepath.Glob("docs/developers/*.md")
	found, headings := 0, map[string][]string{}
	for _, name := range slices.Concat(names, others, more, []string{"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range linked.FindAllStringSubmatch(fenced.ReplaceAllString(string(text), ""), -1) {
			file, anchor, _ := strings.Cut(match[1], "#")
			if strings.Contains(file, "://") {
				continue
			}
			found++
			target := name
			if file != "" {
				target = filepath.Join(filepath.Dir(name), file)
			}
			there, err := os.ReadFile(target)
			if headings[target] == nil && anchor != "" {
				headings[target] = anchors(string(there))
			}
			if err != nil {
				t.Errorf("%s links to %s: %v", name, match[1], err)
			} else if anchor != "" && !slices.Contains(headings[target], anchor) {
				t.Errorf("%s links to %s, and there is no such heading", name, match[1])
			}
		}
		folder, page := filepath.Split(name)
		if slices.Contains([]string{pages + "/", "docs/developers/"}, folder) && page != "README.md" &&
			!strings.Contains(readFile(t, folder+"README.md"), "]("+page+")") {
			t.Errorf("%s is not in the index of its folder", name)
		}
	}
	if found < 40 {
		t.Errorf("found only %d links", found)
	}
	for _, page := range []string{pages + "/README.md", "docs/developers/README.md", "docs/review.md", "CONTRIBUTING.md"} {
		if !strings.Contains(readFile(t, "README.md"), "("+page+")") {
			t.Errorf("README.md doesn't link to %s", page)
		}
	}
	for page, most := range map[string]int{"README.md": 299, "CONTRIBUTING.md": 59} {
		if n := strings.Count(readFile(t, page), "\n"); n > most {
			t.Errorf("%s has %d lines, want at most %d: it is for one sitting", page, n, most)
		}
	}
}

// The reviewers' page has each file, in the order of the package comment, with
// the minutes that its lines take, and each test that it names is there.
func TestReviewPageHasEveryRoomAndItsTests(t *testing.T) {
	page := readFile(t, "docs/review.md")
	rooms := regexp.MustCompile(`(?m)^//\t(\S+) +(.*)$`).FindAllStringSubmatch(readFile(t, "main.go"), -1)
	rows := regexp.MustCompile(`(?m)^\| (\S+\.(?:go|sql)) \| (.*) \| ([0-9]+) \|$`).FindAllStringSubmatch(page, -1)
	if len(rooms) < 15 || len(rows) != len(rooms) {
		t.Fatalf("the package comment has %d files, review.md %d", len(rooms), len(rows))
	}
	for i, room := range rooms {
		if rows[i][1] != room[1] || rows[i][2] != room[2] {
			t.Errorf("review.md has %q where main.go has %q", rows[i][1:], room[1:])
		}
		minutes, _ := strconv.Atoi(rows[i][3])
		if want := strings.Count(readFile(t, room[1]), "\n") * 60 / 400; minutes < want-5 || minutes > want+5 {
			t.Errorf("review.md has %d minutes for %s, want about %d", minutes, room[1], want)
		}
	}
	if n := len(goFiles(t, false)) + 1; n != len(rooms) {
		t.Errorf("there are %d files, with schema.sql, and %d are listed", n, len(rooms))
	}
	var tests strings.Builder
	for _, pattern := range []string{"*_test.go", "test/*_test.go"} {
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			tests.WriteString(readFile(t, name))
		}
	}
	named := regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)`").FindAllStringSubmatch(page, -1)
	for _, name := range named {
		if !strings.Contains(tests.String(), "\nfunc "+name[1]+"(") {
			t.Errorf("review.md names %s, which there isn't", name[1])
		}
	}
	promises, of := 0, false
	for line := range strings.Lines(page) {
		switch {
		case !strings.HasPrefix(line, "|"):
			of = false
		case strings.HasSuffix(line, " tests |\n"):
			of = true
		case of && !strings.HasPrefix(line, "|---"):
			cells := strings.Split(line, "|")
			if promises++; !strings.HasPrefix(cells[len(cells)-2], " `Test") {
				t.Errorf("review.md promises what no test holds: %s", line)
			}
		}
	}
	if promises < 35 {
		t.Errorf("review.md has only %d promises", promises)
	}
}

// sourceCopy is a folder with what 'make run' takes.
func sourceCopy(t *testing.T) string {
	t.Helper()
	folder := privateFolder(t)
	var sources []string
	for _, pattern := range []string{"*.go", "go.*", "*.sql", "*.yaml", "dev", "Makefile"} {
		found, err := filepath.Glob(pattern)
		if err != nil || found == nil {
			t.Fatalf("there is no %s: %v", pattern, err)
		}
		sources = append(sources, found...)
	}
	if out, err := exec.Command("cp", append(append([]string{"-r"}, sources...), folder)...).CombinedOutput(); err != nil {
		t.Fatalf("copying: %v: %s", err, out)
	}
	return folder
}

// outsideEnv is the environment of who runs no tests, and this.
func outsideEnv(more ...string) (env []string) {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); !strings.HasSuffix(name, "_URL") && !strings.HasPrefix(name, "MAKE") && name != "MFLAGS" {
			env = append(env, variable)
		}
	}
	return append(env, more...)
}

// 'make run' is run as pasted, in a copy of the source.
func TestLocalDevelopmentPageCanBePasted(t *testing.T) {
	t.Parallel()
	folder, script := sourceCopy(t), "PORT="+steadyPort(t)+"\nexport PORT METRICS_ADDR=\n"
	blocks := runBlocks(t, "local-development.md")
	if len(blocks) != 2 {
		t.Fatalf("local-development.md has %d blocks to run, want 2", len(blocks))
	}
	for _, b := range blocks {
		script += b.text
	}
	// Should the test end early, the shell is killed, and make with it.
	tied := folder + "/bin/make"
	real, err := exec.LookPath("make")
	if err == nil {
		err = errors.Join(os.Mkdir(folder+"/bin", 0o700),
			os.WriteFile(tied, []byte("#!/bin/sh\nexec setpriv --pdeathsig TERM -- "+real+" \"$@\"\n"), 0o700))
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-eu", "-c", script)
	var out logBuffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = folder, &out, &out
	cmd.Env = outsideEnv("PATH=" + folder + "/bin:" + os.Getenv("PATH"))
	shell := startProcess(t, cmd, syscall.SIGKILL)
	select {
	case <-shell.exited:
	case <-time.After(15 * time.Minute):
		t.Fatalf("local-development.md doesn't end: %s", &out)
	}
	log, _ := os.ReadFile(folder + "/run.log")
	if shell.err != nil || !strings.Contains(out.String(), `"access_token"`) || !strings.Contains(out.String(), "verified: ") {
		t.Errorf("local-development.md fails: %v: %s\n%s", shell.err, &out, log)
	}
}
