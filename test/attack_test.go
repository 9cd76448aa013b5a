package test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/url"
	"os/exec"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// The service under a role that can alter neither the schema nor the log, and
// what that role, the owner of the tables and a superuser can do to the log.

// The roles of an estate. The superuser is that of newPostgres.
const (
	theService   = "agentidp_service"
	theOwner     = "agentidp_owner"
	theSuperuser = "agentidp"
)

// An estate is a PostgreSQL with a database that one role owns and that the
// service uses by another: the one that docs/devops/README.md makes.
type estate struct {
	t        testing.TB
	postgres *postgresServer
	redis    string
}

// newEstate makes the roles and the database agentidp. Roles belong to a whole
// server, so it is one of the test's own.
func newEstate(t testing.TB) *estate {
	t.Helper()
	es := &estate{t, newPostgres(t), newRedis(t)}
	es.exec("postgres", theSuperuser, `create role agentidp_owner login`)
	es.exec("postgres", theSuperuser, `create database agentidp owner agentidp_owner`)
	return es
}

// settle applies the schema as the owner, and makes the role of
// docs/devops/README.md.
func (es *estate) settle() {
	es.t.Helper()
	if out, err := es.run("agentidp", theOwner, "migrate"); err != nil {
		es.t.Fatalf("migrate = %q, %v", out, err)
	}
	es.exec("agentidp", theSuperuser, roleSQL(es.t))
}

// roleSQL is what the installation of docs/devops/README.md has psql do for the
// service's role: it is made, and gets its rights.
func roleSQL(t testing.TB) string {
	t.Helper()
	page := readPage(t, "README.md")
	role := regexp.MustCompile(`(?m)^create role agentidp_service .*\$service.*\n`).FindAllString(page, -1)
	rights := regexp.MustCompile(`(?ms)^owner migrate\npsql [^\n]*<<'END'\n(.*?)^END$`).FindAllStringSubmatch(page, -1)
	if len(role) != 1 || len(rights) != 1 || !strings.Contains(rights[0][1], "grant") {
		t.Fatalf("docs/devops/README.md makes the role by %q and %q, want each once", role, rights)
	}
	return strings.Replace(role[0], "$service", "choose one", 1) + rights[0][1]
}

func (es *estate) url(database, role string) string {
	return "postgres:///" + database + "?host=" + es.postgres.folder + "&port=5432&user=" + role
}

func (es *estate) connect(database, role string) *pgx.Conn {
	es.t.Helper()
	conn, err := pgx.Connect(context.Background(), es.url(database, role))
	if err != nil {
		es.t.Fatal(err)
	}
	es.t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// try runs statements as a role, in a connection of their own.
func (es *estate) try(database, role, sql string) error {
	conn, err := pgx.Connect(context.Background(), es.url(database, role))
	if err != nil {
		return err
	}
	defer conn.Close(context.Background())
	_, err = conn.Exec(context.Background(), sql, pgx.QueryExecModeSimpleProtocol)
	return err
}

func (es *estate) exec(database, role, sql string) {
	es.t.Helper()
	if err := es.try(database, role, sql); err != nil {
		es.t.Fatalf("%s: %s: %v", role, sql, err)
	}
}

// run runs a command of the real program, with what it prints on standard error
// as its error. Migrate gets no variable but DATABASE_URL.
func (es *estate) run(database, role string, args ...string) (stdout string, err error) {
	env := programEnv(es.url(database, role), es.redis)
	if args[0] == "migrate" {
		maps.DeleteFunc(env, func(name, _ string) bool { return name != "DATABASE_URL" })
	}
	p := &program{service: &service{t: es.t, env: env}}
	var out, log bytes.Buffer
	cmd := p.build(args...)
	cmd.Stdout, cmd.Stderr = &out, &log
	err = cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		err = errors.New(strings.TrimSpace(log.String()))
	}
	return out.String(), err
}

// serve starts the program, under the service's role.
func (es *estate) serve(database string) *program {
	es.t.Helper()
	p := &program{service: &service{t: es.t, env: programEnv(es.url(database, theService), es.redis)}}
	p.start()
	return p
}

func refusedFor(err error, why string) bool { return err != nil && strings.Contains(err.Error(), why) }

// grants are all that docs/devops/README.md gives the service.
var grants = []string{
	"agents INSERT", "agents SELECT", "agents UPDATE",
	"audit_events INSERT", "audit_events SELECT",
	"credentials INSERT", "credentials SELECT", "credentials UPDATE",
	"token_revocations DELETE", "token_revocations INSERT", "token_revocations SELECT",
}

func TestServiceRunsUnderARoleThatOwnsNothing(t *testing.T) {
	t.Parallel()
	es := newEstate(t)
	es.settle()
	p := newProgram(t, es.url("agentidp", theService), es.redis, // bootstrap, and a token
		"MAX_AGENTS", "50", "RATE_LIMIT_PER_MINUTE", "10000", "MONTHLY_TOKEN_LIMIT", "1000")

	t.Run("it owns nothing and has no more than it needs", func(t *testing.T) {
		owner := es.connect("agentidp", theSuperuser)
		rows, _ := owner.Query(t.Context(), `
			select c.relname || ' ' || p.privilege_type
			from pg_class c, aclexplode(c.relacl) p
			where p.grantee in ($1::text::regrole, 0) and c.relnamespace = 'public'::regnamespace
			union all
			select attrelid::regclass || '.' || attname || ' ' || p.privilege_type
			from pg_attribute, aclexplode(attacl) p
			where p.grantee = $1::text::regrole
			order by 1`, theService)
		got, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil || !slices.Equal(got, grants) {
			t.Errorf("the service's role may %q, %v, want %q", got, err, grants)
		}
		for what, sql := range map[string]string{
			"it owns a table":       `select exists (select from pg_class where relowner = $1::text::regrole)`,
			"it owns a function":    `select exists (select from pg_proc where proowner = $1::text::regrole)`,
			"it owns a schema":      `select exists (select from pg_namespace where nspowner = $1::text::regrole)`,
			"it is in another role": `select exists (select from pg_auth_members where member = $1::text::regrole)`,
			"it is more than a role": `select rolsuper or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls
				from pg_roles where rolname = $1`,
			"it may make tables":  `select has_schema_privilege($1, 'public', 'create')`,
			"it may make schemas": `select has_database_privilege($1, current_database(), 'create')`,
			"a function runs as another": `select exists (select from pg_proc
				where prosecdef and pronamespace = 'public'::regnamespace) and $1 <> ''`,
		} {
			var bad bool
			if err := owner.QueryRow(t.Context(), sql, theService).Scan(&bad); err != nil || bad {
				t.Errorf("%s: %v, %v, want false", what, bad, err)
			}
		}
	})

	// What a service does, from its first to its last request.
	api := func(method, path, body string, status int) answer {
		t.Helper()
		return p.want(p.api(p.bearer, method, path, body), status, "")
	}
	if out, err := es.run("agentidp", theService, "bootstrap", "second@example.com"); !refusedFor(err, "may hold agents:write already") {
		t.Errorf("a second bootstrap = %q, %v, want it refused", out, err)
	}
	id := api("POST", "/agents", agentJSON("worker@example.com", "scores:*", "credentials:write"), 201).text("agentId")
	p.want(p.api(p.bearer, "POST", "/agents", agentJSON("worker@example.com", "scores:*")), 409, "AGENT_ALREADY_EXISTS")
	api("GET", "/agents?owner=team&status=active", "", 200)
	api("GET", "/agents/"+id, "", 200)
	api("PATCH", "/agents/"+id, `{"owner": "others"}`, 200)
	created := api("POST", "/agents/"+id+"/credentials", `{}`, 201)
	credential := created.text("credentialId")
	api("GET", "/agents/"+id+"/credentials", "", 200)
	first := p.token(id, created.text("clientSecret"), "")
	if !p.active(first) {
		t.Error("a new token is not active")
	}
	rotated := api("POST", "/agents/"+id+"/credentials/"+credential+"/rotate", `{"expiresAt": "2099-01-01T00:00:00Z"}`, 200)
	if p.active(first) {
		t.Error("a token of the secret before the rotation is active")
	}
	p.want(p.form(id, created.text("clientSecret"), "", "grant_type=client_credentials"), 401, "invalid_client")
	second := p.token(id, rotated.text("clientSecret"), "scores:write")
	third := p.token(id, rotated.text("clientSecret"), "")
	for range 2 {
		p.want(p.form(id, rotated.text("clientSecret"), "/revoke", "token="+second), 200, "")
	}
	p.want(p.api(third, "GET", "/agents/"+id, ""), 200, "")
	api("PATCH", "/agents/"+id, `{"status": "suspended"}`, 200)
	p.want(p.form(id, rotated.text("clientSecret"), "", "grant_type=client_credentials"), 403, "unauthorized_client")
	if p.active(third) {
		t.Error("a token of a suspended agent is active")
	}
	api("PATCH", "/agents/"+id, `{"status": "active"}`, 200)
	if !p.active(third) || p.active(second) {
		t.Error("reactivation did not lift what the suspension revoked, and that alone")
	}
	api("DELETE", "/agents/"+id+"/credentials/"+credential, "", 204)
	if p.active(third) {
		t.Error("a token of a revoked credential is active")
	}
	api("DELETE", "/agents/"+id, "", 204)

	// The quota is counted from the log where Redis has lost it.
	other, secret := p.newClient("scores:read")
	p.token(other, secret, "")
	kept := p.token(other, secret, "")
	p.want(p.form(other, secret, "/revoke", "token="+kept), 200, "")
	if err := p.rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	p.token(other, secret, "")
	if n, err := p.rdb.Get(t.Context(), quotaKey(other)).Int(); err != nil || n != 3 {
		t.Errorf("after a flush the quota's counter is %d, %v, want 3", n, err)
	}
	if p.active(kept) {
		t.Error("after a flush a revoked token is active")
	}
	// The audit log: reading, checking, and the operator's command.
	page := p.audit("limit=2")
	if page.NextCursor == nil {
		t.Fatal("a page of the log has no cursor")
	}
	if events := p.audit("limit=2&cursor=" + url.QueryEscape(*page.NextCursor)).Data; len(events) != 2 || events[0].Seq != page.Data[1].Seq-1 {
		t.Errorf("by the cursor come %v, want the two events before", events)
	}
	api("GET", "/audit/"+page.Data[0].EventID, "", 200)
	p.checkChain()
	cp := p.checkpoint()
	p.token(other, secret, "")
	if out, err := es.run("agentidp", theService, "verify-audit", cp); err != nil || !strings.Contains(out, "extends the checkpoint") {
		t.Errorf("verify-audit = %q, %v, want that it extends the checkpoint", out, err)
	}

	// A further copy sweeps at its start what has expired.
	es.exec("agentidp", theOwner, `insert into token_revocations (jti, expires_at) values (gen_random_uuid(), now() - interval '1 hour')`)
	q := p.another()
	p.eventually("the expired revocation is gone", func() bool {
		return p.count(`select count(*) from token_revocations where expires_at < now()`) == 0
	})
	q.isWell()
	for _, copy := range []*program{p, q} {
		if err := copy.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the program ended with %v, want nil", err)
		}
		for line := range strings.Lines(copy.log.String()) {
			if strings.Contains(line, "SQLSTATE") || strings.Contains(line, `"level":"ERROR"`) {
				t.Errorf("the log has %s", line)
			}
		}
	}
}

// Where its role doesn't own the tables, the program starts on the very schema
// that it has been reviewed with, or not at all.
func TestServiceStartsOnlyOnTheSchemaThatMigrateApplied(t *testing.T) {
	t.Parallel()
	es := newEstate(t)
	start := func(role string) error {
		_, err := es.run("agentidp", role, "verify-audit")
		return err
	}
	const migrate = "let that role run migrate of this version"

	// Before there are tables: a role that may make some does, another can't.
	es.exec("postgres", theSuperuser, `create role agentidp_service login`)
	if err := start(theService); !refusedFor(err, "permission denied for schema public") {
		t.Errorf("without tables, start = %v, want it refused", err)
	}
	es.exec("postgres", theSuperuser, `drop role agentidp_service`)
	if out, err := es.run("agentidp", theOwner, "migrate"); err != nil || !strings.Contains(out, "the schema is of version") {
		t.Fatalf("migrate = %q, %v", out, err)
	}
	es.exec("agentidp", theSuperuser, roleSQL(t))
	if err := start(theService); err != nil {
		t.Errorf("after migrate, start = %v, want nil", err)
	}

	right := es.comment()
	if want := fmt.Sprintf("schema %d", schemaVersion(t)); right != want {
		t.Fatalf("the comment is %q, want %q", right, want)
	}
	wrong := fmt.Sprintf("schema %d", schemaVersion(t)-1)
	for _, row := range []struct {
		name, comment string
		why           string // "": it starts
	}{
		{"no comment, as of a version before", "null", migrate},
		{"an empty one", "''", migrate},
		{"that of another version", "'" + wrong + "'", migrate},
		{"a beginning of it", "'" + right[:len(right)-1] + "'", migrate},
		{"more than it", "'" + right + " or so'", migrate},
		{"that of a later version", "'" + right + "0'", ""},
		{"the right one", "'" + right + "'", ""},
	} {
		es.exec("agentidp", theOwner, `comment on table audit_events is `+row.comment)
		begun := time.Now()
		err := start(theService)
		if row.why == "" && err != nil || row.why != "" && !refusedFor(err, row.why) {
			t.Errorf("%s: start = %v, want %q", row.name, err, row.why)
		}
		if took := time.Since(begun); took > 30*time.Second { // it would wait for PostgreSQL for 60 s
			t.Fatalf("%s: the start ended after %s, want at once", row.name, took)
		}
	}

	// Only an owner can migrate, whatever the schema.
	for _, comment := range []string{right, wrong} {
		es.exec("agentidp", theOwner, `comment on table audit_events is '`+comment+`'`)
		if _, err := es.run("agentidp", theService, "migrate"); err == nil {
			t.Errorf("migrate as the service's role, on a schema of %q = nil, want an error", comment)
		}
		if got := es.comment(); got != comment {
			t.Errorf("migrate as the service's role made the comment %q of %q", got, comment)
		}
	}
	if _, err := es.run("agentidp", theService, "bootstrap", "first@example.com"); !refusedFor(err, migrate) {
		t.Errorf("bootstrap on another version's schema = %v, want it refused", err)
	}

	// A start that finds a migration on its way waits for it.
	tx, err := es.connect("agentidp", theOwner).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), fmt.Sprintf(`select pg_advisory_xact_lock(%d); comment on table audit_events is '%s'`, schemaLock, right))
	}
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() { started <- start(theService) }()
	select {
	case err := <-started:
		t.Errorf("start during a migration = %v, want it to wait", err)
		started <- err
	case <-time.After(500 * time.Millisecond):
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-started; err != nil {
		t.Errorf("start after the migration = %v, want nil", err)
	}

	// Owners apply it at every start, as ever; the service never does.
	month := nextMonth(time.Now()).AddDate(0, 6, 0).Format("audit_events_2006_01")
	for _, row := range []struct {
		role, command string
		applies       bool
	}{
		{theService, "verify-audit", false},
		{theOwner, "verify-audit", true},
		{theOwner, "migrate", true},
		{theSuperuser, "migrate", true},
	} {
		es.exec("agentidp", theSuperuser, `drop table if exists `+month+`; comment on table audit_events is '`+right+`'`)
		if _, err := es.run("agentidp", row.role, row.command); err != nil {
			t.Errorf("%s as %s = %v, want nil", row.command, row.role, err)
		}
		if got := ask[bool](es, `select to_regclass($1) is not null`, month); got != row.applies {
			t.Errorf("after %s as %s a month to come is there: %v, want %v", row.command, row.role, got, row.applies)
		}
		es.exec("agentidp", theOwner, `comment on table audit_events is null`)
		if _, err := es.run("agentidp", row.role, row.command); (err == nil) != row.applies || (es.comment() == right) != row.applies {
			t.Errorf("on another version's schema %s as %s = %v, and leaves the comment %q", row.command, row.role, err, es.comment())
		}
	}
	out, err := es.run("agentidp", theOwner, "-h")
	if err != nil || !strings.Contains(out, "agentidp migrate ") {
		t.Errorf("-h = %q, %v, want migrate among the commands", out, err)
	}
	if _, err := command(t.Context(), nil, testLog, "migrate"); !refusedFor(err, "DATABASE_URL is missing") {
		t.Errorf("migrate without a database = %v, want an error that names DATABASE_URL", err)
	}
	both := map[string]string{"DATABASE_URL": "postgres:///one", "DATABASE_URL_FILE": "/dev/null"}
	if _, err := command(t.Context(), both, testLog, "migrate"); err == nil || !strings.Contains(err.Error(), "both set") {
		t.Errorf("migrate with two databases = %v, want an error that says so", err)
	}
}

// ask returns the one value of a query of the superuser.
func ask[T any](es *estate, sql string, args ...any) (value T) {
	es.t.Helper()
	conn, err := pgx.Connect(context.Background(), es.url("agentidp", theSuperuser))
	if err == nil {
		defer conn.Close(context.Background())
		err = conn.QueryRow(context.Background(), sql, args...).Scan(&value)
	}
	if err != nil {
		es.t.Fatalf("%s: %v", sql, err)
	}
	return value
}

// comment is what says of which schema the tables are.
func (es *estate) comment() string {
	es.t.Helper()
	return ask[string](es, `select coalesce(obj_description('audit_events'::regclass, 'pg_class'), '')`)
}

// An outcome is what becomes of an attack.
type outcome struct {
	refused string // what PostgreSQL says to it; "": it succeeds
	bad     int64  // the seq that verify-audit names, held to the checkpoint; 0: none
	says    string // or what it says instead
	http    int    // what GET /audit/verify answers; 0: the service doesn't start
	alone   bool   // and that names the same seq, which knows of no checkpoint
	window  int64  // or this one, where it looks no further back
}

func refused(why string) outcome { return outcome{refused: why} }
func named(seq int64) outcome    { return outcome{bad: seq, http: 200, alone: true} }
func farAhead(head int64) outcome {
	return outcome{bad: 13, http: 200, alone: true, window: head - verifiedAtOnce + 1}
}
func byCheckpoint(seq int64) outcome { return outcome{bad: seq, http: 200} }
func unreadable(why string) outcome  { return outcome{says: why, http: 503} }
func neitherEnd(why string) outcome  { return outcome{says: why, http: 200} }
func startsNot(why string) outcome   { return outcome{says: why} }

// unseen is what can't be told from what the service does. review.md says so.
var unseen = outcome{http: 200}

// How PostgreSQL refuses: by the trigger, or by what a role lacks.
const (
	appendOnly = "the log is append-only"
	noTable    = "permission denied for table audit_events"
	noOwner    = "must be owner of table audit_events"
	noSchema   = "permission denied for schema public"
	notAllowed = "SQLSTATE 42501" // where each version of PostgreSQL has words of its own
)

const triggersOff = `
	do $$
	declare
		name text;
	begin
		for name in select 'audit_events' union all select inhrelid::regclass::text from pg_inherits where inhparent = 'audit_events'::regclass loop
			execute 'alter table ' || name || ' disable trigger append_only';
		end loop;
	end $$;`

// readChain reads the log as it is stored.
func readChain(ctx context.Context, db querier) ([]event, error) {
	rows, _ := db.Query(ctx, `select `+eventColumns+` from audit_events order by seq`)
	return pgx.CollectRows(rows, pgx.RowToStructByPos[event])
}

// link makes an event behind another, with the hash that it has to have.
func link(last event) event {
	e := last
	e.EventID, e.Seq, e.PrevHash, e.UserAgent = newID(), last.Seq+1, last.Hash, "forged"
	e.Timestamp.Time = last.Timestamp.Add(time.Millisecond)
	e.Hash = e.sum()
	return e
}

// fork makes a second event 5, later than all others.
func fork(chain []event) event {
	e := link(chain[3])
	e.Timestamp.Time = chain[11].Timestamp.Add(time.Millisecond)
	e.Hash = e.sum()
	return e
}

func values(e event) []any {
	return []any{e.EventID, e.Seq, e.AgentID, e.ActorID, e.Action, e.Outcome, e.IPAddress, e.UserAgent, string(e.Metadata),
		e.Timestamp.Time, []byte(e.PrevHash), []byte(e.Hash)}
}

func put(ctx context.Context, db querier, table string, e event) error {
	_, err := db.Exec(ctx, `insert into `+table+` (`+eventColumns+`) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)`, values(e)...)
	return err
}

// A forger is an attacker who can compute hashes.
type forger func(ctx context.Context, conn *pgx.Conn, chain []event, part string) error

// replacing rewrites the log, from a seq on, as change wants it. It needs the
// trigger off.
func replacing(from int64, change func(tail []event, before event) []event) forger {
	return func(ctx context.Context, conn *pgx.Conn, chain []event, part string) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, triggersOff); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, `delete from audit_events where seq >= $1`, from); err != nil {
				return err
			}
			for _, e := range change(chain[from-1:], chain[max(0, from-2)]) {
				if err := put(ctx, tx, "audit_events", e); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// rehashed is a tail with other content, whose every hash is right.
func rehashed(tail []event, before event) []event {
	var list []event
	for range tail {
		before = link(before)
		list = append(list, before)
	}
	return list
}

// An attack is by SQL in which {off} switches the trigger off, {part} is the
// partition with all events, {bounds} are its bounds, {schema} is schema.sql
// with its comment, and {comment} that; or by a forger.
type attack struct {
	name    string
	sql     string
	forge   forger
	next    int // what the service then answers to an introspection, which is event 13; 0: it isn't asked
	service outcome
	owner   outcome
	super   *outcome // nil: the owner's
}

// The attacks are on a log of twelve events, of which a checkpoint kept
// elsewhere vouches for ten.
var attacks = []attack{
	// What the trigger is there for.
	{name: "edit", sql: `update audit_events set user_agent = 'x' where seq = 4`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "edit a partition", sql: `update {part} set user_agent = 'x' where seq = 4`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "delete", sql: `delete from audit_events where seq = 4`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "delete from a partition", sql: `delete from {part} where seq = 4`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "truncate", sql: `truncate audit_events`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "truncate a partition", sql: `truncate {part}`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "truncate by cascade", sql: `truncate agents, audit_events cascade`, service: refused("permission denied for table agents"), owner: refused(appendOnly)},
	{name: "reorder", sql: `update audit_events set seq = 17 - seq where seq in (5, 12)`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "insert on conflict do update", sql: `insert into audit_events select * from audit_events where seq = 4
		on conflict (seq, "timestamp") do update set user_agent = 'x'`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "merge to edit", sql: `merge into audit_events a using (select 4 as seq) b on a.seq = b.seq
		when matched then update set user_agent = 'x'`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "merge to delete", sql: `merge into audit_events a using (select 4 as seq) b on a.seq = b.seq
		when matched then delete`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "edit through a view", sql: `create temp view v as select * from audit_events; update v set user_agent = 'x' where seq = 4`,
		service: refused(noTable), owner: refused(appendOnly)},
	{name: "edit through a function", sql: `create function pg_temp.f() returns void language sql security definer
		as $$ update audit_events set user_agent = 'x' where seq = 4 $$; select pg_temp.f()`, service: refused(noTable), owner: refused(appendOnly)},
	{name: "edit as a replica", sql: `set session_replication_role = replica; update audit_events set user_agent = 'x' where seq = 4`,
		service: refused("permission denied to set parameter"), owner: refused("permission denied to set parameter"), super: new(refused(appendOnly))},
	{name: "edit with a privilege that it gives itself", sql: `grant all on audit_events, {part} to current_user; update audit_events set user_agent = 'x' where seq = 4`,
		service: refused(noTable), owner: refused(appendOnly)},
	{name: "edit as the owner", sql: `set role agentidp_owner; update audit_events set user_agent = 'x' where seq = 4`,
		service: refused("permission denied to set role"), owner: refused(appendOnly)},
	{name: "edit as the superuser", sql: `set role agentidp; update audit_events set user_agent = 'x' where seq = 4`,
		service: refused("permission denied to set role"), owner: refused("permission denied to set role"), super: new(refused(appendOnly))},
	{name: "become a member of the owner", sql: `grant agentidp_owner to current_user; set role agentidp_owner; update audit_events set user_agent = 'x' where seq = 4`,
		service: refused(notAllowed), owner: refused(notAllowed), super: new(refused(appendOnly))},
	{name: "become the owner of the table", sql: `alter table audit_events owner to agentidp_service`, service: refused(noOwner),
		owner: refused(notAllowed), super: new(startsNot(noSchema))}, // a half of the tables is nobody's to start on

	// What only the owner can do: first rid of the trigger, in one way or another.
	{name: "edit, the trigger disabled", sql: `{off} update audit_events set user_agent = 'x' where seq = 4`, service: refused(noOwner), owner: named(4)},
	{name: "edit a partition, all its triggers disabled", sql: `alter table {part} disable trigger all; update {part} set user_agent = 'x' where seq = 4`,
		service: refused(noOwner), owner: named(4)},
	{name: "edit, the trigger dropped", sql: `drop trigger append_only on audit_events; update audit_events set user_agent = 'x' where seq = 4`,
		service: refused("must be owner of relation audit_events"), owner: named(4)},
	{name: "edit, the trigger's function replaced", sql: `create or replace function audit_events_refuse() returns trigger language plpgsql
		as $$ begin return null; end $$; update audit_events set user_agent = 'x' where seq = 4`, service: refused(noSchema), owner: named(4)},
	{name: "edit, a system table changed", sql: `set allow_system_table_mods = on; update pg_trigger set tgenabled = 'D' where tgname = 'append_only';
		alter table {part} set (fillfactor = 99); alter table audit_events alter hash set not null;
		update audit_events set user_agent = 'x' where seq = 4`,
		service: refused("permission denied to set parameter"), owner: refused("permission denied to set parameter"), super: new(named(4))},
	{name: "edit a time by what isn't shown", sql: `{off} update audit_events set "timestamp" = "timestamp" + interval '1 microsecond' where seq = 4`,
		service: refused(noOwner), owner: named(4)},
	{name: "edit a time to no time", sql: `{off} update audit_events set "timestamp" = 'infinity' where seq = 4`, service: refused(noOwner), owner: named(4)},
	{name: "delete, the trigger disabled", sql: `{off} delete from audit_events where seq = 4`, service: refused(noOwner), owner: named(4)},
	{name: "delete the first", sql: `{off} delete from audit_events where seq <= 3`, service: refused(noOwner), owner: named(3)},
	{name: "swap what two events say", sql: `{off} update audit_events a set (event_id, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata) =
		(select b.event_id, b.agent_id, b.actor_id, b.action, b.outcome, b.ip_address, b.user_agent, b.metadata from audit_events b where b.seq = 11 - a.seq)
		where seq in (5, 6)`, service: refused(noOwner), owner: named(5)},
	{name: "swap the seqs of two events", sql: `{off} update audit_events set seq = 1000 where seq = 5; update audit_events set seq = 5 where seq = 6;
		update audit_events set seq = 6 where seq = 1000`, service: refused(noOwner), owner: named(5)},
	{name: "make room, and insert in the middle", forge: replacing(5, func(tail []event, before event) []event {
		list := []event{link(before)}
		for _, e := range tail {
			e.Seq++
			list = append(list, e)
		}
		return list
	}), service: refused(noOwner), owner: named(6)},
	{name: "truncate, the trigger disabled", sql: `{off} truncate audit_events`, service: refused(noOwner), owner: byCheckpoint(1)},
	{name: "truncate a partition, the trigger disabled", sql: `{off} truncate {part}`, service: refused(noOwner), owner: byCheckpoint(1)},

	// Forks and roll-backs, with every hash right: a checkpoint shows them.
	{name: "rewrite the tail from before the checkpoint", forge: replacing(4, rehashed), service: refused(noOwner), owner: byCheckpoint(10)},
	{name: "rewrite the event of the checkpoint and what follows", forge: replacing(10, rehashed), service: refused(noOwner), owner: byCheckpoint(10)},
	{name: "begin a new log", forge: replacing(1, func(tail []event, _ event) []event {
		return rehashed(tail, event{EventID: newID(), Action: tokenIssued, Outcome: "success", Metadata: rawJSON(`{}`),
			Timestamp: tail[0].Timestamp, Hash: make(digest, 32)})
	}), service: refused(noOwner), owner: byCheckpoint(10)},
	{name: "begin a new log behind the checkpoint, as old as may be", forge: replacing(1, func(tail []event, _ event) []event {
		first := tail[10]
		first.PrevHash, first.Timestamp.Time = first.Hash, first.Timestamp.AddDate(0, 0, -100)
		first.Hash = first.sum()
		second := link(first)
		second.Timestamp = tail[11].Timestamp
		second.Hash = second.sum()
		return []event{first, second}
	}), service: refused(noOwner), owner: neitherEnd("the log begins at seq 11, after the checkpoint at 10: use a later one if what was before is dropped for its age; else the log was altered")},
	{name: "cut the tail from before the checkpoint", sql: `{off} delete from audit_events where seq > 8`, service: refused(noOwner), owner: byCheckpoint(9)},
	{name: "restore an older state, in which the service goes on", sql: `{off} delete from audit_events where seq > 9`, next: 200,
		service: refused(noOwner), owner: byCheckpoint(10)},
	{name: "cut the tail behind the checkpoint", sql: `{off} delete from audit_events where seq > 10`, service: refused(noOwner), owner: unseen},
	{name: "rewrite the tail behind the checkpoint", forge: replacing(11, rehashed), service: refused(noOwner), owner: unseen},

	// Inserts, which the service must be able to do.
	{name: "insert a second event of a seq", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		return put(ctx, conn, "audit_events", fork(chain))
	}, service: named(5), owner: named(5)},
	{name: "insert a second event of a seq, the earlier", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		e := link(chain[3])
		e.Timestamp.Time = chain[0].Timestamp.Add(-time.Millisecond)
		e.Hash = e.sum()
		return put(ctx, conn, "audit_events", e)
	}, service: named(5), owner: named(5)},
	{name: "copy in a second event of a seq", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		_, err := conn.CopyFrom(ctx, pgx.Identifier{"audit_events"}, strings.Split(strings.ReplaceAll(eventColumns, `"`, ""), ", "),
			pgx.CopyFromRows([][]any{values(fork(chain))}))
		return err
	}, service: named(5), owner: named(5)},
	{name: "merge in a second event of a seq", sql: `merge into audit_events a using (select * from audit_events where seq = 4) b on false
		when not matched then insert values (gen_random_uuid(), b.seq, b."timestamp" + interval '1 second', b.agent_id, b.actor_id, b.action,
			b.outcome, b.ip_address, b.user_agent, b.metadata, b.prev_hash, b.hash)`, service: named(4), owner: named(4)},
	{name: "insert into a partition", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, part string) error {
		return put(ctx, conn, part, fork(chain))
	}, service: refused(noTable), owner: named(5)},
	{name: "insert at the end with a wrong hash", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		e := link(chain[11])
		e.Hash = e.PrevHash
		return put(ctx, conn, "audit_events", e)
	}, next: 200, service: named(13), owner: named(13)},
	{name: "insert at the end with another one before it", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		e := link(chain[11])
		e.PrevHash = chain[10].Hash
		e.Hash = e.sum()
		return put(ctx, conn, "audit_events", e)
	}, next: 200, service: named(13), owner: named(13)},
	{name: "insert at the end with the last one's seq", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		e := link(chain[11])
		e.Seq--
		e.Hash = e.sum()
		return put(ctx, conn, "audit_events", e)
	}, service: named(12), owner: named(12)},
	{name: "insert far behind the end", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		e := link(chain[11])
		e.Seq = 1 << 40
		e.Hash = e.sum()
		return put(ctx, conn, "audit_events", e)
	}, next: 200, service: farAhead(1<<40 + 1), owner: farAhead(1<<40 + 1)},
	{name: "insert at the last seq that there is", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		e := link(chain[11])
		e.Seq = math.MaxInt64
		e.Hash = e.sum()
		return put(ctx, conn, "audit_events", e)
	}, next: 503, service: farAhead(math.MaxInt64), owner: farAhead(math.MaxInt64)},
	{name: "insert before the first", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		e := link(event{Metadata: chain[0].Metadata, Outcome: "success", Timestamp: chain[0].Timestamp, Hash: make(digest, 32)})
		e.Seq = 0
		e.Hash = e.sum()
		return put(ctx, conn, "audit_events", e)
	}, service: refused("violates check constraint"), owner: refused("violates check constraint")},
	{name: "insert at the end with a right hash", forge: func(ctx context.Context, conn *pgx.Conn, chain []event, _ string) error {
		return put(ctx, conn, "audit_events", link(chain[11]))
	}, next: 200, service: unseen, owner: unseen},

	// Changes of the tables.
	{name: "drop a partition", sql: `drop table {part}`, service: refused(noOwner), owner: byCheckpoint(1)},
	{name: "detach a partition", sql: `alter table audit_events detach partition {part}`, service: refused(noOwner), owner: byCheckpoint(1)},
	{name: "detach a partition, in which the service goes on", sql: `alter table audit_events detach partition {part}`, next: 200,
		service: refused(noOwner), owner: byCheckpoint(2)},
	{name: "put another partition in the place of one", sql: `create table other (like {part} including all); insert into other select * from {part};
		update other set user_agent = 'x' where seq = 4; alter table audit_events detach partition {part};
		alter table audit_events attach partition other {bounds}`, service: refused(noSchema), owner: named(4)},
	{name: "drop the log", sql: `drop table audit_events`, service: refused(noOwner), owner: startsNot(noSchema)},
	{name: "drop the log and make a new one", sql: `drop table audit_events; {schema}; grant select, insert on audit_events to agentidp_service`,
		service: refused(noOwner), owner: byCheckpoint(1)},
	{name: "rename the log", sql: `alter table audit_events rename to old_events`, service: refused(noOwner), owner: startsNot(noSchema)},
	{name: "move the log", sql: `create schema elsewhere; alter table audit_events set schema elsewhere`,
		service: refused("permission denied for database"), owner: startsNot(noSchema)},
	{name: "drop a column", sql: `alter table audit_events drop column user_agent`, service: refused(noOwner), owner: unreadable(`column "user_agent" does not exist`)},
	{name: "rewrite a column", sql: `alter table audit_events alter user_agent type text using 'x'`, service: refused(noOwner), owner: named(1)},
	{name: "rewrite a column without a change of what it means", sql: `alter table audit_events alter metadata type json using metadata::jsonb::json`,
		service: refused(noOwner), owner: named(1)},
	{name: "take the privilege to read away", sql: `revoke select on audit_events from agentidp_service`, service: unseen, // it isn't its own to take
		owner: unreadable(noTable)},
	{name: "hide an event by a policy", sql: `alter table audit_events enable row level security; create policy p on audit_events using (seq <> 5)`,
		service: refused(noOwner), owner: named(5)},
	{name: "hide an event by a view", sql: `alter table audit_events rename to old_events; create view audit_events as select * from old_events where seq <> 5;
		grant select, insert on audit_events to agentidp_service`, service: refused(noOwner), owner: startsNot("run migrate of this version")},
	{name: "hide an event by a view with the comment of the table", sql: `alter table audit_events rename to old_events;
		create view audit_events as select * from old_events where seq <> 5; comment on view audit_events is '{comment}';
		grant select, insert on audit_events to agentidp_service`, service: refused(noOwner), owner: named(5)},
	{name: "a rule that makes nothing of an edit", sql: `create rule r as on update to audit_events do instead nothing;
		update audit_events set user_agent = 'x' where seq = 4`, next: 200, service: refused(noOwner), owner: unseen}, // it edits nothing
	{name: "a rule that swallows what comes", sql: `create rule r as on insert to audit_events do instead nothing`, next: 503,
		service: refused(noOwner), owner: unseen}, // but acknowledged is nothing
	{name: "a rule that sends what comes elsewhere", sql: `create table elsewhere (like audit_events); grant insert on elsewhere to agentidp_owner;
		create rule r as on insert to audit_events do instead insert into elsewhere values (new.*)`, next: 503,
		service: refused(noSchema), owner: unseen}, // nor here
	{name: "a trigger that swallows what comes", sql: `create function swallow() returns trigger language plpgsql as $$ begin return null; end $$;
		create trigger swallow before insert on audit_events for each row execute function swallow()`, next: 503,
		service: refused(noSchema), owner: unseen},
	{name: "a trigger that edits what comes", sql: `create function edit() returns trigger language plpgsql as $$ begin new.user_agent = 'x'; return new; end $$;
		create trigger edit before insert on audit_events for each row execute function edit()`, next: 200,
		service: refused(noSchema), owner: named(13)},
}

// Every attack, by the service's role, the owner of the tables and a superuser,
// is refused, or named by the program's verify-audit with the first bad seq,
// given a checkpoint from before. What neither sees is in review.md.
func TestEveryAttackOnTheLogIsRefusedOrNamed(t *testing.T) {
	t.Parallel()
	if left := time.Until(nextMonth(time.Now())); left < time.Minute {
		time.Sleep(left) // or the events would be in two partitions
	}
	text := readFile(t, "docs/review.md")
	for _, claim := range []string{ // what is unseen below
		"They can add events that never happened",
		"What came after the last checkpoint can be cut off or rewritten unseen",
		"make PostgreSQL lose what is still to come",
	} {
		if !strings.Contains(strings.Join(strings.Fields(text), " "), claim) {
			t.Errorf("review.md doesn't say: %s", claim)
		}
	}
	es := newEstate(t)
	es.settle()
	p := newProgram(t, es.url("agentidp", theService), es.redis)
	for p.count(`select max(seq) from audit_events`) < 10 {
		p.active(p.bearer)
	}
	cp := p.checkpoint()
	p.active(p.bearer)
	p.active(p.bearer)
	p.kill()
	chain, err := readChain(t.Context(), p.db)
	if err != nil || len(chain) != 12 {
		t.Fatalf("the log has %d events, %v, want 12", len(chain), err)
	}
	var part, bounds string
	if err := p.db.QueryRow(t.Context(), `select oid::regclass, pg_get_expr(relpartbound, oid) from pg_class
		where oid = (select distinct tableoid from audit_events)`).Scan(&part, &bounds); err != nil {
		t.Fatal(err)
	}
	p.db.Close() // a database is copied while nobody is in it
	comment := es.comment()
	fill := strings.NewReplacer("{off}", triggersOff, "{part}", part, "{bounds}", bounds, "{comment}", comment,
		"{schema}", schema(t)+`comment on table audit_events is '`+comment+`'`)

	for i, role := range []string{theService, theOwner, theSuperuser} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			es := &estate{t, es.postgres, es.redis}
			attack := func(a attack, database string) error {
				if a.forge == nil {
					return es.try(database, role, fill.Replace(a.sql))
				}
				conn := es.connect(database, role)
				defer conn.Close(t.Context())
				return a.forge(t.Context(), conn, slices.Clone(chain), part)
			}
			copyOf := func(name string) string { // of the database as it was
				conn := es.connect("postgres", theSuperuser)
				defer conn.Close(t.Context())
				if err := copyTo(conn, name, "agentidp owner agentidp_owner"); err != nil {
					t.Fatal(err)
				}
				return name
			}
			intact := copyOf(fmt.Sprintf("intact_%d", i))
			for j, a := range attacks {
				want := a.owner
				if role == theService {
					want = a.service
				} else if role == theSuperuser && a.super != nil {
					want = *a.super
				}
				t.Run(a.name, func(t *testing.T) {
					es := &estate{t, es.postgres, es.redis}
					if want.refused != "" {
						if err := attack(a, intact); !refusedFor(err, want.refused) {
							t.Errorf("%v, want it refused because %q", err, want.refused)
						}
						return
					}
					// A superuser's and an owner's deeds are the same to who reads the log.
					if role == theSuperuser && a.super == nil && !soak {
						return
					}
					database := copyOf(fmt.Sprintf("attack_%d_%d", i, j)) // which goes with its PostgreSQL: to drop it takes as long as to copy it
					if err := attack(a, database); err != nil {
						t.Fatal(err)
					}
					es.wantVerdict(database, p.bearer, cp, want.http != 0, a.next, want)
				})
			}
			es.wantVerdict(intact, p.bearer, cp, true, 0, unseen) // of what was refused, nothing is left
			conn := es.connect(intact, theSuperuser)
			if after, err := readChain(t.Context(), conn); err != nil || !reflect.DeepEqual(after, chain) {
				t.Errorf("after what was refused the log has %v, %v, want what it had", after, err)
			}
		})
	}
}

// wantVerdict holds the program to what it must say of a log.
func (es *estate) wantVerdict(database, bearer, cp string, serves bool, next int, want outcome) {
	t := es.t
	t.Helper()
	var q *program
	if serves {
		q = es.serve(database)
		defer q.kill()
		q.bearer = bearer
	}
	if next != 0 {
		if a := q.bearerForm(bearer, "/introspect", "token="+bearer); a.status != next {
			t.Errorf("then an introspection is answered %v, want %d", a, next)
		}
	}
	out, err := es.run(database, theService, "verify-audit", cp)
	switch {
	case want.says != "":
		if !refusedFor(err, want.says) {
			t.Errorf("verify-audit = %q, %v, want %s", out, err, want.says)
		}
	case want.bad != 0:
		if why := fmt.Sprintf("the first bad seq is %d", want.bad); err == nil || !strings.HasSuffix(err.Error(), why) || out != "" {
			t.Errorf("verify-audit = %q, %v, want %s", out, err, why)
		}
	case err != nil || !strings.Contains(out, "extends the checkpoint at seq 10\n"):
		t.Errorf("verify-audit = %q, %v, want it to extend the checkpoint", out, err)
	}
	if q == nil {
		return
	}
	a := q.api(bearer, "GET", "/audit/verify", "")
	switch {
	case a.status != want.http:
		t.Errorf("GET /audit/verify = %v, want %d", a, want.http)
	case want.http != 200:
	case want.alone && (a.body["verified"] != false || a.body["firstBadSeq"] != float64(cmp.Or(want.window, want.bad)) || a.body["checkpoint"] != nil):
		t.Errorf("GET /audit/verify = %v, want %d bad and no checkpoint", a, want.bad)
	case !want.alone && a.body["verified"] != true:
		t.Errorf("GET /audit/verify = %v, want it verified, as review.md has it", a)
	}
}
