package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// What we need of the stores: durable commits, our own names, one clock, the
// bytes as they are stored, and the truth about whether they do it. And what
// others put between us and PostgreSQL, or made before us.

// hostileSettings are what a role, a database or a URL may say of our sessions.
var hostileSettings = map[string]string{
	"synchronous_commit": "off", "search_path": "elsewhere", "datestyle": "German", "bytea_output": "escape",
	"timezone": "Asia/Kolkata", "client_encoding": "LATIN1", "standard_conforming_strings": "off",
	"default_transaction_isolation": "serializable", "intervalstyle": "sql_standard", "extra_float_digits": "-10",
	"idle_in_transaction_session_timeout": "1ms", "idle_session_timeout": "300ms", "lock_timeout": "1ms", "statement_timeout": "50ms",
	"array_nulls": "off", "jit": "on", "enable_seqscan": "on",
}

// ownSettings are what our sessions have all the same.
var ownSettings = map[string]string{
	"synchronous_commit": "on", "search_path": "public, pg_temp", "DateStyle": "ISO, YMD", "bytea_output": "hex", "TimeZone": "UTC",
	"default_transaction_isolation": "read committed", "transaction_isolation": "read committed", "statement_timeout": "0", "lock_timeout": "0",
	"idle_session_timeout": "0", "idle_in_transaction_session_timeout": "5s", "client_encoding": "UTF8", "standard_conforming_strings": "on",
	"array_nulls": "on", "jit": "off", "enable_seqscan": "off",
}

func TestOurSessionsAreOursWhateverRoleDatabaseAndURLSay(t *testing.T) {
	t.Parallel()
	postgres := newPostgres(t)
	postgres.query(`create role hostile superuser login`)
	for _, from := range []string{"role", "database", "URL"} {
		database, role, more := "said_by_"+strings.ToLower(from), theSuperuser, ""
		postgres.query(`create database ` + database)
		for name, value := range hostileSettings {
			switch from {
			case "role":
				role = "hostile"
				postgres.query(`alter role hostile in database ` + database + ` set ` + name + ` = '` + value + `'`)
			case "database":
				postgres.query(`alter database ` + database + ` set ` + name + ` = '` + value + `'`)
			case "URL":
				more += "&" + name + "=" + url.QueryEscape(value)
			}
		}
		base := "postgres:///" + database + "?host=" + postgres.folder + "&port=5432&user="
		t.Run(from, func(t *testing.T) {
			// The harness has a pool of its own, with settings that outrank both.
			plain := "&search_path=public&statement_timeout=0&client_encoding=UTF8&standard_conforming_strings=on&lock_timeout=0&idle_session_timeout=0&idle_in_transaction_session_timeout=0&datestyle=ISO&array_nulls=on"
			p := newProgram(t, base+theSuperuser+plain, newRedis(t), "DATABASE_URL", base+role+more)
			q := p.another()
			p.exec(`create table seen (of text, name text, setting text)`)
			p.exec(`create function look() returns trigger language plpgsql as $$ begin
				insert into public.seen select tg_table_name, s, current_setting(s) from unnest(string_to_array(tg_argv[0], '|')) s;
				return null;
			end $$`)
			for _, table := range tables {
				p.exec(`create trigger look after insert or update on ` + table + ` for each statement execute function look('` +
					strings.Join(slices.Sorted(maps.Keys(ownSettings)), "|") + `')`)
			}
			for _, v := range []*program{p, q} {
				v.bearer = p.bearer
				v.everything(t)
			}
			rows, _ := p.db.Query(t.Context(), `select distinct of, name, setting from seen`)
			var of, name, setting string
			looked := map[string]bool{}
			_, err := pgx.ForEachRow(rows, []any{&of, &name, &setting}, func() error {
				looked[of] = true
				if want := ownSettings[name]; setting != want {
					t.Errorf("said by the %s, our sessions write to %s with %s = %q, want %q", from, of, name, setting, want)
				}
				return nil
			})
			if err != nil || len(looked) != 4 {
				t.Errorf("looked into what writes to %v, %v, want all tables", looked, err)
			}
			if out := p.command("verify-audit"); !strings.HasPrefix(out, "verified: ") {
				t.Errorf("verify-audit printed %q", out)
			}
			for _, v := range []*program{p, q} {
				if log := v.log.String(); strings.Contains(log, "SQLSTATE") || strings.Contains(log, `"level":"ERROR"`) {
					t.Errorf("the log has %s", log)
				}
			}
		})
	}
}

// What was revoked and what was recorded grow with every request, so that none may read all of it: nor by a plan that was made
// while there was little, as PostgreSQL makes them in a new deployment, and for the partition of a new month.
func TestNoRequestReadsAllThatThereIs(t *testing.T) {
	t.Parallel()
	v := newService(t)
	const many = 5000
	id, _, h := v.newKeyClient("ES256", tokensRead)
	p := v.newParty("a:b")
	events := ""
	if err := v.db.QueryRow(t.Context(), `select tableoid::regclass::text from audit_events limit 1`).Scan(&events); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{events, "token_revocations"} {
		v.exec(`alter table ` + table + ` set (autovacuum_enabled = false)`) // which would have the plans made anew
	}
	v.exec(`vacuum analyze audit_events, token_revocations`)
	use := func() {
		for range 20 { // PostgreSQL keeps a plan after the fifth time
			token := v.want(v.byAssertion("", v.assertion(h, id)), 200, "").text("access_token")
			v.tokenFor(p, "")
			v.boundToken(p, h, "")
			v.introspect(token)
			v.feed("?after=" + v.feedEnd())
			v.audit("limit=1")
			v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"version":"1.2.3"}`), 200, "")
			v.want(v.byAssertion("/revoke", v.assertion(h, id), "token", token), 200, "")
		}
	}
	use()
	v.exec(`insert into token_revocations select gen_random_uuid(), now() + interval '1 hour' from generate_series(1, $1)`, many)
	use()
	v.eventually("the sessions say what they have read", func() bool { // at their end
		v.exec(`select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()`)
		return v.count(`select idx_scan from pg_stat_user_tables where relname = 'token_revocations'`) > 100
	})
	for table, sum := range map[string]string{events: "seq_tup_read", "token_revocations": "seq_tup_read + idx_tup_fetch"} {
		if read := v.count(`select `+sum+` from pg_stat_user_tables where relname = $1`, table); read > 1000 {
			t.Errorf("of %s %d rows were read", table, read)
		}
	}
}

// everything does once what a copy can do, and wants it to be right.
func (v *service) everything(t *testing.T) {
	t.Helper()
	id, secret := v.newClient("resumes:read", "credentials:write")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"owner":"öthers"}`), 200, "")
	v.want(v.api(v.bearer, "GET", "/agents?owner=%C3%B6thers&limit=1", ""), 200, "")
	credentialID, other := v.newCredential(id)
	ofOther := v.token(id, other, "")
	token, dead := v.token(id, secret, ""), v.token(id, secret, "")
	v.want(v.form(id, secret, "/revoke", "token="+dead), 200, "")
	a := v.want(v.api(v.bearer, "POST", "/agents/"+id+"/credentials/"+credentialID+"/rotate", `{"expiresAt":"2099-01-02T03:04:05.678Z"}`), 200, "")
	if got := a.text("expiresAt"); got != "2099-01-02T03:04:05.678Z" {
		t.Errorf("expiresAt = %q, want what was asked for", got)
	}
	if got := []bool{v.active(token), v.active(dead), v.active(ofOther)}; !slices.Equal(got, []bool{true, false, false}) {
		t.Errorf("a live, a revoked and a rotated token are active: %v, want true, false, false", got)
	}
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id+"/credentials/"+credentialID, ""), 204, "")
	v.want(v.api(v.bearer, "PATCH", "/agents/"+id, `{"status":"suspended"}`), 200, "")
	if v.active(token) {
		t.Error("a token of a suspended agent is active")
	}
	v.want(v.api(v.bearer, "DELETE", "/agents/"+id, ""), 204, "")
	day := time.Now().UTC().Format(time.DateOnly)
	if page := v.audit("limit=3&agentId=" + id + "&fromDate=" + day + "&action=" + agentDecommissioned); len(page.Data) != 1 {
		t.Errorf("the log of today has %d events of a decommissioning, want 1", len(page.Data))
	}
	v.checkChain()
}

func TestStartSaysWherePostgreSQLIsNotDurable(t *testing.T) {
	t.Parallel()
	const warning = "PostgreSQL may lose what it acknowledges"
	for setting, says := range map[string]string{"fsync=off": "fsync", "full_page_writes=off": "full_page_writes", "fsync=on": ""} {
		t.Run(setting, func(t *testing.T) {
			t.Parallel()
			p := newProgram(t, newPostgres(t, "fsync=on", "full_page_writes=on", setting).url(), newRedis(t))
			before, _, _ := strings.Cut(p.log.String(), `"msg":"serving"`)
			if strings.Contains(before, warning) != (says != "") || !strings.Contains(before, says) {
				t.Errorf("with %s the start logs %q, want %q", setting, before, says)
			}
			if n := strings.Count(p.log.String(), warning); n > 1 {
				t.Errorf("with %s the warning is there %d times", setting, n)
			}
		})
	}
}

func TestServiceMayNotMakeTemporaryTables(t *testing.T) {
	t.Parallel()
	es := newEstate(t)
	es.settle()
	for _, sql := range []string{
		`create temporary table audit_events (like public.audit_events)`, `create temporary view agents as select 1`,
		`create table pg_temp.credentials (x int)`, `create temporary sequence s`,
	} {
		if err := es.try("agentidp", theService, sql); !refusedFor(err, "permission denied to create temporary tables") {
			t.Errorf("%s, as the service = %v, want it refused", sql, err)
		}
	}
}

// shiftedProgram is the program on a machine whose clock is off by as many
// seconds as CLOCK_SHIFT says: each reading of it in our files is another. What
// measures durations stays as it is, as it does where a clock is set.
var shiftedProgram = sync.OnceValues(func() (string, error) {
	folder := filepath.Join(testFolder, "shifted")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return "", err
	}
	const shift = `package main

import (
	"os"
	"strconv"
	"time"
	"unsafe"
)

var shift, _ = strconv.ParseInt(os.Getenv("CLOCK_SHIFT"), 10, 64)

func shiftedNow() time.Time {
	t := time.Now()
	*(*uint64)(unsafe.Pointer(&t)) += uint64(shift) << 30 // the seconds of the wall clock, beside the monotonic one
	return t
}
`
	files := map[string]string{"shift.go": shift}
	names, err := filepath.Glob("*.go")
	if err != nil {
		return "", err
	}
	reading, readings := regexp.MustCompile(`\btime\.Now\b`), 0
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		if n := len(reading.FindAll(text, -1)); n > 0 && !strings.HasSuffix(name, "_test.go") {
			files[name] = string(reading.ReplaceAll(text, []byte("shiftedNow"))) + "\nvar _ time.Duration\n"
			readings += n
		}
	}
	replace := map[string]string{}
	here, err := os.Getwd()
	for name, text := range files {
		replace[filepath.Join(here, name)] = filepath.Join(folder, name)
		err = errors.Join(err, os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600))
	}
	overlay, _ := json.Marshal(map[string]any{"Replace": replace})
	err = errors.Join(err, os.WriteFile(filepath.Join(folder, "overlay.json"), overlay, 0o600))
	if err != nil || readings < 5 {
		return "", fmt.Errorf("%d readings of the clock: %w", readings, err)
	}
	path := filepath.Join(folder, "agentidp")
	if out, err := exec.Command("go", "build", "-overlay", filepath.Join(folder, "overlay.json"), "-o", path, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

// shifted starts a further copy, on a machine whose clock is off.
func (p *program) shifted(by time.Duration, env ...string) *program {
	p.t.Helper()
	path, err := shiftedProgram()
	if err != nil {
		p.t.Fatal(err)
	}
	v := *p.service
	v.env = maps.Clone(p.env)
	v.env["PORT"], v.env["CLOCK_SHIFT"] = "0", fmt.Sprint(int(by.Seconds()))
	for i := 0; i < len(env); i += 2 {
		v.env[env[i]] = env[i+1]
	}
	q := &program{service: &v, log: &programLog{serving: make(chan string, 1)}}
	cmd := q.build()
	cmd.Path, cmd.Stderr = path, q.log
	q.process = startProcess(p.t, cmd, syscall.SIGKILL)
	select {
	case address := <-q.log.serving:
		q.url = "http://" + address
	case <-q.exited:
		p.t.Fatalf("the program did not start: %v: %s", q.err, q.log)
	}
	return q
}

const clockLine = `"msg":"keeper","of":"clock","well":false`

func TestCopiesShareOneClock(t *testing.T) {
	t.Parallel()
	const ttl = 6 * time.Second
	p := newProgram(t, newPostgres(t).url(), newRedisServer(t).url(), "METRICS_ADDR", metricsOn)
	id, secret := p.newClient("resumes:read")
	p.token(id, secret, "")
	copies := map[time.Duration]*program{0: p.another("TOKEN_TTL", ttl.String())}
	for _, by := range []time.Duration{2 * time.Second, -2 * time.Second, 12 * time.Second, -12 * time.Second, time.Minute, -time.Minute} {
		copies[by] = p.shifted(by, "TOKEN_TTL", ttl.String())
	}
	for by, q := range copies {
		if got := q.metric("agentidp_clock_distance_seconds") + by.Seconds(); got < -1 || got > 1 {
			t.Errorf("%s ahead, agentidp_clock_distance_seconds is %.2f off", by, got)
		}
		q.isWell()
		if by.Abs() > 3*time.Second {
			q.eventually(fmt.Sprintf("the log says that the clock is %s ahead", by), func() bool { return strings.Contains(q.log.String(), clockLine) })
		} else if by == 0 && strings.Contains(q.log.String(), clockLine) {
			t.Errorf("the log finds fault with a clock that is right: %s", q.log)
		}
		q.token(id, secret, "") // once with bcrypt
	}
	// A token of one is good at all others at once, and what one revokes is dead at all others at once.
	for by, q := range copies {
		for other, w := range copies {
			if token := q.token(id, secret, ""); !w.use(token) {
				t.Errorf("a new token of the copy %s ahead is refused by the one %s ahead", by, other)
			} else if w.want(w.form(id, secret, "/revoke", "token="+token), 200, ""); q.use(token) || q.active(token) {
				t.Errorf("the copy %s ahead lets through what the one %s ahead revoked", by, other)
			}
		}
	}
	// And it dies at the same time everywhere, by the one clock: that of PostgreSQL, here the test's too.
	var group sync.WaitGroup
	for by, q := range copies {
		begun := time.Now()
		token := q.token(id, secret, "")
		c := readClaims(t, token)
		issued, end := time.Unix(c.IssuedAt, 0), time.Unix(c.Expires, 0)
		if issued.Before(begun.Add(-2*time.Second)) || issued.After(time.Now().Add(time.Second)) || c.Expires-c.IssuedAt != int64(ttl.Seconds()) {
			t.Errorf("the copy %s ahead issues a token of %s ago that lives for %d s", by, time.Since(issued), c.Expires-c.IssuedAt)
		}
		for other, w := range copies {
			group.Go(func() {
				for {
					begun := time.Now()
					good := w.use(token)
					switch now := time.Now(); {
					case good && begun.After(end.Add(time.Second)):
						t.Errorf("the token of the copy %s ahead lives on at the one %s ahead", by, other)
						return
					case !good && now.Before(end.Add(-time.Second)):
						t.Errorf("the token of the copy %s ahead is dead at the one %s ahead, %s too early", by, other, end.Sub(now))
						return
					case !good:
						return
					}
					time.Sleep(100 * time.Millisecond)
				}
			})
		}
	}
	group.Wait()
	p.checkChain()
}

// Hours apart, a copy is not ready; and whatever it acknowledges is so, also
// when the clocks are right again.
func TestClocksHoursApartLoseNoRevocation(t *testing.T) {
	t.Parallel()
	p := newProgram(t, newPostgres(t).url(), newRedisServer(t).url(), "TOKEN_TTL", "10m")
	id, secret := p.newClient("resumes:read")
	credentialID, other := p.newCredential(id)
	secretID, now := p.secretOf(id, credentialID), time.Now()
	mint := func(issued, expires time.Duration) string {
		return p.sign(claims{
			Issuer: p.env["ISSUER"], Subject: id, Audience: audience{p.env["ISSUER"]}, ClientID: id, Scope: "resumes:read", ID: newID(),
			IssuedAt: now.Add(issued).Unix(), Expires: now.Add(expires).Unix(), CredentialID: credentialID, SecretID: secretID,
		})
	}
	row := func(token string) int {
		return p.count(`select count(*) from token_revocations where jti = $1`, readClaims(t, token).ID)
	}
	var kept, gone []string
	for _, by := range []time.Duration{0, 2 * time.Hour, -2 * time.Hour} {
		q := p
		if by != 0 {
			q = p.shifted(by)
			q.eventually("its clock is not trusted", func() bool {
				a := q.do("GET", "/readyz", "")
				return a.status == 503 && strings.Contains(a.raw, "clocks") && strings.Contains(q.log.String(), clockLine)
			})
		}
		for name, token := range map[string]string{
			"good": p.token(id, secret, ""), "not valid before an hour": mint(time.Hour, 2*time.Hour),
			"that has just expired": mint(-time.Hour, -time.Second), "that expired 23 hours ago": mint(-24*time.Hour, -23*time.Hour),
		} {
			for _, credential := range []string{secret, other}[:1+len(kept)%2] { // twice is once
				if a := q.form(id, credential, "/revoke", "token="+token); a.status != 200 || a.raw != "{}\n" {
					t.Errorf("%s ahead, revoking a token %s = %v, want 200", by, name, a)
				}
			}
			if row(token) != 1 || p.active(token) || q.active(token) {
				t.Errorf("%s ahead, revoking a token %s is acknowledged and leaves %d rows", by, name, row(token))
			}
			if n := p.count(`select count(*) from audit_events where action = 'token.revoked' and metadata->>'jti' = $1`, readClaims(t, token).ID); n != 1 {
				t.Errorf("%s ahead, revoking a token %s leaves %d events, want 1", by, name, n)
			}
			kept = append(kept, token)
		}
		stale := mint(-26*time.Hour, -25*time.Hour) // of no use by any clock
		q.want(q.form(id, secret, "/revoke", "token="+stale), 200, "")
		gone = append(gone, stale)
		if by != 0 {
			q.stop(t, syscall.SIGTERM)
		}
	}
	// Only who trusts the clocks sweeps, and only what is of no use by any.
	p.stop(t, syscall.SIGTERM)
	old := newID()
	p.exec(`insert into token_revocations (jti, expires_at) values ($1, now() - interval '1 hour')`, old)
	far := p.shifted(2 * time.Hour)
	far.eventually("the keeper has looked", func() bool { return strings.Contains(far.log.String(), clockLine) })
	time.Sleep(4 * keepEvery)
	if n := p.count(`select count(*) from token_revocations where jti = $1`, old); n != 1 {
		t.Error("a copy that trusts no clock has swept a revocation")
	}
	p.start()
	p.eventually("what is of no use is swept", func() bool {
		return p.count(`select count(*) from token_revocations where jti = $1`, old) == 0 && row(gone[len(gone)-1]) == 0
	})
	for _, token := range kept {
		if row(token) != 1 || p.use(token) {
			t.Errorf("after a sweep, a token that expires at %d has %d rows", readClaims(t, token).Expires, row(token))
		}
	}
}

// Whoever wrote it, and however: a checker outside hashes what it is served.
func TestBytesOfAnEventAreServedAsTheyAreStored(t *testing.T) {
	t.Parallel()
	v := newService(t)
	chain := v.chain()
	head := len(chain)
	for _, text := range []string{
		`{"a" :  1, "b":"\u003c<é"}`, ` {"z":1,"a":2.50e+0, "z":1 }  `, `{"u":"\ud83d\ude00😀\/\u2028"}`, "{\t\"a\":null\r}",
		`{"metadata":null,"x":[{"metadata":null , "timestamp":"now"}]}`, `{"n":123456789012345678901234567890.10,"html":"<&>"}`, `null`, `"text"`, ` [ ] `,
	} {
		e := forgeEvent(chain, time.Now(), agentUpdated)
		e.Metadata, e.UserAgent = json.RawMessage(text), "of another service"
		e.Hash = e.documentedHash()
		chain = append(chain, e)
	}
	insertEvents(t, v.db, chain[head:])
	list := v.want(v.api(v.bearer, "GET", "/audit?limit=100", ""), 200, "").raw
	export, err := v.export()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range chain[head:] {
		single := v.want(v.api(v.bearer, "GET", "/audit/"+e.EventID, ""), 200, "").raw
		for where, text := range map[string]string{"list": list, "single": single, "export": strings.Join(export, "\n")} {
			_, text, _ = strings.Cut(text, `"eventId":"`+e.EventID+`"`)
			_, text, _ = strings.Cut(text, `"metadata":`)
			if at := strings.Index(text, `,"timestamp":"`+e.Timestamp+`"`); at < 0 || text[:at] != string(e.Metadata) {
				t.Errorf("%s serves the metadata %q as %.80q", where, e.Metadata, text)
				continue
			}
			served := e
			served.Metadata = json.RawMessage(text[:len(e.Metadata)])
			if got := served.documentedHash(); got != e.Hash || !strings.Contains(text, `"hash":"`+e.Hash+`"`) {
				t.Errorf("%s serves %q, whose hash is %s, want %s", where, served.Metadata, got, e.Hash)
			}
		}
	}
	if a := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, ""); a.body["verified"] != true || a.body["events"] != float64(len(chain)) {
		t.Errorf("GET /audit/verify = %v, want %d verified events", a, len(chain))
	}
	if out, err := v.verifyAudit(); err != nil || !strings.HasPrefix(out, "verified: ") {
		t.Errorf("verify-audit = %q, %v", out, err)
	}
	v.newAgent("resumes:read") // goes on behind them
	if a := v.want(v.api(v.bearer, "GET", "/audit/verify", ""), 200, ""); a.body["verified"] != true {
		t.Errorf("with one more, GET /audit/verify = %v", a)
	}
}

// A stand is what /readyz and the metrics say of a copy.
type stand struct {
	ready, postgres, redis bool
}

// stands reads both, which must agree but where one came before a change.
func (p *program) stands() (s stand) {
	p.t.Helper()
	for range 50 {
		a := p.do("GET", "/readyz", "")
		details := a.body
		if a.status == 503 {
			details, _ = a.body["details"].(map[string]any)
		}
		services, _ := details["services"].(map[string]any)
		s = stand{a.status == 200, services["postgres"] == "up", services["redis"] == "up"}
		all := p.scrape()
		up := func(store string) bool {
			name := "agentidp_" + store + "_up"
			return all[name].samples[name] == 1
		}
		if up("postgres") == s.postgres && up("redis") == s.redis {
			return s
		}
	}
	p.t.Errorf("/readyz and the metrics disagree for long: %+v", s)
	return s
}

var (
	standsWell    = stand{true, true, true}
	standsNoRedis = stand{true, true, false}
	standsNot     = stand{false, false, true}
)

// A trouble is one of a store, and how a copy stands meanwhile.
type trouble struct {
	name       string
	want       stand
	busy       bool // it takes a request to see it
	begin, end func()
}

// troubled lets troubles come and go, with traffic and without.
func troubled(t *testing.T, p *program, traffic bool, list []trouble) {
	defer func(outer testing.TB) { p.t = outer }(p.t)
	id, secret := p.newClient("resumes:read")
	p.token(id, secret, "")
	for _, tr := range list {
		if tr.busy && !traffic {
			continue
		}
		t.Run(tr.name, func(t *testing.T) {
			p.t = t
			var stopping atomic.Bool
			var clients sync.WaitGroup
			if traffic {
				for range 4 {
					clients.Go(func() {
						for !stopping.Load() {
							if a := p.form(id, secret, "", "grant_type=client_credentials"); a.status != 200 && a.status != 503 {
								t.Errorf("a token = %v, want 200 or 503", a)
							}
							time.Sleep(20 * time.Millisecond)
						}
					})
				}
			}
			stop := func() { stopping.Store(true); clients.Wait() }
			defer stop()
			p.eventually("it is well before", func() bool { return p.stands() == standsWell })
			begun := time.Now()
			tr.begin()
			var once sync.Once // which is done also where it fails the test, as sync.OnceFunc is not
			end := func() { once.Do(tr.end) }
			defer end()
			p.eventually("it is seen", func() bool { return p.stands() == tr.want })
			took := time.Since(begun)
			if took > 8*time.Second { // about a second, or the 3 s of a transaction, on a quiet machine
				t.Errorf("it is seen only after %s", took)
			}
			// What was begun before may still end well, and a full disk have a page that takes a small event: so it is ready
			// for that moment, but not for ever.
			changed := time.Now()
			p.eventually("it stays so", func() bool {
				if p.stands() != tr.want {
					changed = time.Now()
				}
				return time.Since(changed) > 1500*time.Millisecond
			})
			if stop(); traffic { // and without further requests too
				for until := time.Now().Add(1500 * time.Millisecond); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
					if got := p.stands(); got != tr.want {
						t.Fatalf("while it lasts it stands %+v, want %+v", got, tr.want)
					}
				}
			}
			begun = time.Now()
			end()
			p.eventually("it is well again", func() bool { return p.stands() == standsWell })
			t.Logf("seen after %s, well again after %s", took.Round(10*time.Millisecond), time.Since(begun).Round(10*time.Millisecond))
			p.token(id, secret, "")
		})
	}
}

func TestReadinessFollowsWhatRequestsMeet(t *testing.T) {
	t.Parallel()
	for _, traffic := range []bool{false, true} {
		t.Run(map[bool]string{false: "nobody asks", true: "many ask"}[traffic], func(t *testing.T) {
			t.Parallel()
			postgres, store := newPostgres(t), newRedisServer(t)
			p := newProgram(t, postgres.url(), store.url(), "METRICS_ADDR", metricsOn, "RATE_LIMIT_PER_MINUTE", "1000000")
			reload := func(sql string) func() {
				return func() { postgres.query(sql); postgres.query(`select pg_reload_conf()`) }
			}
			// To drop what hangs on the log and its partitions while all write to them may end in a deadlock.
			trigger := func(body string) {
				postgres.query(`create or replace function refuse() returns trigger language plpgsql as $$ begin ` + body + `; end $$`)
			}
			trigger(`return new`)
			postgres.query(`create trigger refuse before insert on audit_events for each row execute function refuse()`)
			var lock *pgx.Conn
			troubled(t, p, traffic, []trouble{
				{"Redis is killed", standsNoRedis, false, store.kill, store.start},
				{"Redis hangs", standsNoRedis, false, func() { store.hang() }, func() { store.resume() }},
				{"the synchronous standby is lost", standsNot, false, reload(`alter system set synchronous_standby_names = 'gone'`),
					reload(`alter system reset synchronous_standby_names`)},
				{"PostgreSQL is read-only", standsNot, false, reload(`alter system set default_transaction_read_only = on`),
					reload(`alter system reset default_transaction_read_only`)},
				{"the log refuses events", standsNot, true, func() { trigger(`raise exception 'refused'`) }, func() { trigger(`return new`) }},
				{"the log swallows events", standsNot, true, func() {
					postgres.query(`create rule swallow as on insert to audit_events do instead nothing`)
				}, func() { postgres.query(`drop rule swallow on audit_events`) }},
				{"somebody holds the lock of the chain", standsNot, true, func() {
					var err error
					if lock, err = pgx.Connect(context.Background(), postgres.url()); err == nil {
						_, err = lock.Exec(context.Background(), `select pg_advisory_lock($1)`, int64(chainLock))
					}
					if err != nil {
						t.Fatal(err)
					}
				}, func() { lock.Close(context.Background()) }},
				{"PostgreSQL hangs", standsNot, false, func() { freeze(postgres.process) }, func() { postgres.resume() }},
				{"PostgreSQL is killed", standsNot, false, postgres.kill, postgres.start},
			})
			p.checkChain()
		})
	}
}

// A disk of a PostgreSQL of the test's own is full. To mount one takes a right
// that not everybody has; without it, the log that refuses events stands in.
func TestFullDiskIsNotReady(t *testing.T) {
	t.Parallel()
	template, err := postgresTemplate()
	if err != nil {
		t.Fatal(err)
	}
	// PostgreSQL itself gives nothing back meanwhile: neither what a vacuum finds nor old segments of its log.
	postgres := postgresFolder(t, "autovacuum=off", "wal_keep_size=1GB", "checkpoint_timeout=1h")
	if err := os.Mkdir(postgres.data(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", postgres.data(), "tmpfs", 0, "size=200m"); err != nil {
		t.Logf("no disk can be mounted here (%v): TestReadinessFollowsWhatRequestsMeet has a log that refuses events", err)
		return
	}
	t.Cleanup(func() { syscall.Unmount(postgres.data(), 2) }) // MNT_DETACH
	out, err := exec.Command("cp", "-a", template+"/.", postgres.data()).CombinedOutput()
	if err != nil {
		t.Fatalf("copying: %v: %s", err, out)
	}
	postgres.start()
	p := newProgram(t, postgres.url(), newRedisServer(t).url(), "METRICS_ADDR", metricsOn, "RATE_LIMIT_PER_MINUTE", "1000000")
	filler, done := filepath.Join(postgres.data(), "filler"), make(chan struct{})
	var filling sync.WaitGroup
	fill := func() {
		if err := exec.Command("dd", "if=/dev/zero", "of="+filler, "bs=8k", "oflag=append", "conv=notrunc").Run(); err == nil {
			t.Error("the disk can't be filled")
		}
	}
	troubled(t, p, true, []trouble{{"the disk is full", standsNot, true, func() {
		fill()
		filling.Go(func() { // what is given back all the same is taken at once
			for {
				select {
				case <-done:
					return
				case <-time.After(20 * time.Millisecond):
					fill()
				}
			}
		})
	}, func() {
		close(done)
		filling.Wait()
		os.Remove(filler)
	}}})
	p.checkChain()
}

// newBouncer starts PgBouncer before a PostgreSQL, and returns the address that
// leads through it. It refuses root, and is on a socket of the test's own alone.
func newBouncer(t *testing.T, p *postgresServer, settings ...string) string {
	t.Helper()
	path := installed(t, "pgbouncer", "pgbouncer")
	folder := privateFolder(t)
	uid, gid, owner, err := postgresUser()
	if err != nil {
		t.Fatal(err)
	}
	text := "[databases]\n* = host=" + p.folder + " port=5432 user=agentidp\n[pgbouncer]\nlisten_port=6432\nunix_socket_dir=" + folder +
		"\nauth_type=any\nlogfile=" + folder + "/log\ndefault_pool_size=40\nmax_client_conn=200\n" + strings.Join(settings, "\n") + "\n"
	config := filepath.Join(folder, "ini")
	if err := errors.Join(os.WriteFile(config, []byte(text), 0o644), os.Chown(folder, uid, gid)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-q", config)
	sys := *owner
	cmd.Dir, cmd.SysProcAttr = "/", &sys
	bouncer := startProcess(t, cmd, syscall.SIGKILL)
	address := "postgres:///postgres?host=" + folder + "&port=6432&user=agentidp"
	(&service{t: t}).eventually("PgBouncer serves", func() bool {
		conn, err := pgx.Connect(context.Background(), address)
		if err == nil {
			conn.Close(context.Background())
		}
		select {
		case <-bouncer.exited:
			log, _ := os.ReadFile(folder + "/log")
			t.Fatalf("PgBouncer ended: %v: %s", bouncer.err, log)
		default:
		}
		return err == nil
	})
	return address
}

func TestServiceWorksBehindPgBouncerThatKeepsSessions(t *testing.T) {
	t.Parallel()
	postgres, store := newPostgres(t), newRedisServer(t)
	block := regexp.MustCompile("(?s)\n```ini\n(.*?)\n```").FindStringSubmatch(readPage(t, "database.md"))
	if block == nil || !strings.Contains(block[1], "pool_mode = session") {
		t.Fatalf("database.md has the settings %q", block)
	}
	address := newBouncer(t, postgres, block[1])
	p := newProgram(t, postgres.url(), store.url(), "DATABASE_URL", address+"&pool_max_conns=8")
	q := p.another()
	q.bearer = p.bearer
	p.everything(t)
	q.everything(t)
	id, secret := p.newClient("resumes:read")
	for _, v := range []*program{p, q} {
		v.token(id, secret, "")
	}
	var group sync.WaitGroup
	for i := range 200 {
		group.Go(func() {
			v, status, a := []*program{p, q}[i%2], 200, answer{}
			switch i / 2 % 5 {
			case 0:
				a = answered(func() answer { return v.form(id, secret, "", "grant_type=client_credentials") })
			case 1:
				a = answered(func() answer { return v.api(p.bearer, "GET", "/agents/"+id, "") })
			case 2:
				a = answered(func() answer { return v.form(p.id, p.secret, "/introspect", "token="+p.bearer) })
			case 3:
				a = answered(func() answer { return v.api(p.bearer, "POST", "/agents", agentJSON(newID()+"@example.com", "a:b")) })
				status = 201
			case 4:
				a = answered(func() answer { return v.api(p.bearer, "GET", "/audit?limit=5", "") })
			}
			if a.status != status {
				t.Errorf("request %d through PgBouncer = %v, want %d; %s", i, a, status, v.why(a))
			}
		})
	}
	group.Wait()
	for _, v := range []*program{p, q} { // a 503 may be for want of time, and for nothing else
		for _, code := range regexp.MustCompile(`SQLSTATE (\w+)`).FindAllStringSubmatch(v.log.String(), -1) {
			if code[1] != "57014" { // which is what ends with its request
				t.Errorf("through PgBouncer PostgreSQL says %s: %s", code[0], v.log)
			}
		}
	}
	p.checkChain()
}

func TestStartRefusesPgBouncerThatChangesSessions(t *testing.T) {
	t.Parallel()
	postgres, store := newPostgres(t), newRedis(t)
	for name, settings := range map[string][]string{
		"one after the other":   {"pool_mode=transaction"},
		"all in turns":          {"pool_mode=transaction", "server_round_robin=1"},
		"many sessions at hand": {"pool_mode=transaction", "min_pool_size=20"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := newBouncer(t, postgres, settings...)
			for i := range 10 {
				ctx, cancel := context.WithCancel(context.Background())
				var others sync.WaitGroup
				for range i % 5 { // who asks through it meanwhile
					others.Go(func() {
						conn, err := pgx.Connect(ctx, address+"&default_query_exec_mode=simple_protocol")
						for err == nil {
							_, err = conn.Exec(ctx, `select pg_sleep(0.002)`)
						}
						if conn != nil {
							conn.Close(context.Background())
						}
					})
				}
				p := &program{service: &service{t: t, env: programEnv(address, store)}}
				cmd := p.build()
				var log bytes.Buffer
				cmd.Stderr = &log
				late := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() }) // it must end by itself
				if err := cmd.Run(); !late.Stop() || err == nil || !strings.Contains(log.String(), "pool_mode = session") {
					t.Errorf("start %d beside %d others = %v, %.300s, want an end that names pool_mode = session", i, i%5, err, log.String())
				}
				cancel()
				others.Wait()
			}
		})
	}
}

// oldGrants are those that the README of 0.1.0 gave the service's role.
const oldGrants = `
	create role agentidp_service login;
	revoke create on schema public from public;
	grant usage on schema public to agentidp_service;
	grant select, insert, update on agents, credentials to agentidp_service;
	grant select, insert, update, delete on token_revocations to agentidp_service;
	grant usage on sequence token_revocations_revision to agentidp_service;
	grant select, insert on audit_events to agentidp_service;`

func TestDatabaseOf010IsUpgraded(t *testing.T) {
	t.Parallel()
	es := newEstate(t)
	old, err := os.ReadFile("test/testdata/schema-0.1.0.sql")
	if err != nil {
		t.Fatal(err)
	}
	es.exec("agentidp", theOwner, string(old)+fmt.Sprintf(`comment on table audit_events is 'schema.sql of SHA-256 %x'`, sha256.Sum256(old)))
	es.exec("agentidp", theSuperuser, oldGrants)
	if _, err := es.run("agentidp", theService, "bootstrap", "first@example.com"); !refusedFor(err, "run migrate") {
		t.Errorf("on the schema of 0.1.0, the service's role starts with %v, want an error that says what to do", err)
	}

	v := &service{t: t, env: programEnv(es.url("agentidp", theService), es.redis)} // only to sign, and to write
	if v.db, err = pgxpool.New(t.Context(), es.url("agentidp", theSuperuser)); err != nil {
		t.Fatal(err)
	}
	defer v.db.Close()
	newAgent := func(status string, capabilities ...string) string {
		id := newID()
		v.exec(`insert into agents (agent_id, email, agent_type, version, capabilities, owner, deployment_env, status)
			values ($1, $2, 'screener', '1.0.0', $3, 'team', 'production', $4)`, id, id+"@example.com", capabilities, status)
		return id
	}
	revoked := func(kind, id string, lifted, inRedis bool) {
		v.exec(`insert into token_revocations (id, kind, lifted, in_redis, expires_at) values ($1, $2, $3, $4, now() + interval '1 day')`,
			id, kind, lifted, inRedis)
	}
	admin := newAgent("active", agentsRead, agentsWrite, auditRead, tokensRead)
	_, adminSecret := v.quickCredential(admin)
	id := newAgent("active", "resumes:read")
	credentialID, secret := v.quickCredential(id)
	live, dead := map[string]string{}, map[string]string{}
	for i := range 4 { // known to Redis or not, lifted or not
		known, pick := i%2 == 0, fmt.Sprint(" ", i)
		live["nothing revoked"+pick], dead["a token"+pick] = v.mint(id, credentialID), v.mint(id, credentialID)
		revoked("token", readClaims(t, dead["a token"+pick]).ID, false, known)

		rotated, _ := v.quickCredential(id)
		before := v.secretOf(id, rotated)
		dead["the secret before a rotation"+pick] = v.mint(id, rotated)
		v.exec(`update credentials set secret_id = $2 where credential_id = $1`, rotated, newID())
		revoked("secret", before, false, known)
		live["the secret after it"+pick] = v.mint(id, rotated)

		ended, _ := v.quickCredential(id)
		dead["a credential"+pick] = v.mint(id, ended)
		v.exec(`update credentials set status = 'revoked', revoked_at = now() where credential_id = $1`, ended)
		revoked("credential", ended, false, known)

		for _, status := range []string{"suspended", "decommissioned"} {
			cut := newAgent(status, "resumes:read")
			of, _ := v.quickCredential(cut)
			dead["a "+status+" agent"+pick] = v.mint(cut, of)
			if status == "decommissioned" {
				v.exec(`update credentials set status = 'revoked', revoked_at = now() where credential_id = $1`, of)
			}
			revoked("agent", cut, false, known)
		}
		again := newAgent("active", "resumes:read")
		of, _ := v.quickCredential(again)
		live["a reactivated agent"+pick] = v.mint(again, of)
		revoked("agent", again, true, known)
	}
	forged := []servedEvent{forgeEvent(nil, time.Now(), agentCreated)}
	conn := es.connect("agentidp", theSuperuser)
	insertEvents(t, conn, append(forged, forgeEvent(forged, time.Now(), tokenIssued)))

	for i := range 2 { // again and again
		if out, err := es.run("agentidp", theOwner, "migrate"); err != nil || !strings.Contains(out, "the schema is of version") {
			t.Fatalf("migrate %d = %q, %v", i+1, out, err)
		}
		if got, want := es.comment(), "schema "+strconv.Itoa(schemaVersion(t)); got != want {
			t.Errorf("after migrate the comment is %q, want %q", got, want)
		}
		for range 2 {
			p := es.serve("agentidp")
			p.id, p.secret, p.db = admin, adminSecret, v.db
			p.bearer = p.token(admin, adminSecret, "")
			(&trial{p.service, dead, live}).check(fmt.Sprintf("after migrate %d", i+1), p.service)
			p.token(id, secret, "")
			more := p.token(id, secret, "")
			p.want(p.form(id, secret, "/revoke", "token="+more), 200, "")
			dead["a token revoked since "+more[len(more)-8:]] = more
			p.want(p.api(p.bearer, "PATCH", "/agents/"+newAgent("active", "a:b"), `{"status":"suspended"}`), 200, "")
			p.checkChain()
			if err := p.stop(t, syscall.SIGTERM); err != nil || strings.Contains(p.log.String(), "SQLSTATE") {
				t.Errorf("it ended with %v, and its log is %s", err, p.log)
			}
		}
	}
	rows, _ := v.db.Query(t.Context(), `select attname::text from pg_attribute
		where attrelid = 'token_revocations'::regclass and attnum > 0 and not attisdropped order by 1`)
	if got, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || !slices.Equal(got, []string{"expires_at", "jti"}) {
		t.Errorf("token_revocations has %q, %v, want jti and expires_at", got, err)
	}
}

// 0.1.0 as most ran it: the service owns its tables, and a start upgrades them.
// Several copies start at once.
func TestOwnerUpgradesADatabaseOf010ByStarting(t *testing.T) {
	t.Parallel()
	old, err := os.ReadFile("test/testdata/schema-0.1.0.sql")
	if err != nil {
		t.Fatal(err)
	}
	database := newDatabase(t)
	conn, err := pgx.Connect(t.Context(), database)
	if err == nil {
		defer conn.Close(t.Context())
		_, err = conn.Exec(t.Context(), string(old))
	}
	if err != nil {
		t.Fatal(err)
	}
	p := &program{service: &service{t: t, env: programEnv(database, newRedis(t))}}
	var starts sync.WaitGroup
	for range 3 {
		starts.Go(func() {
			if out, err := p.build("verify-audit").CombinedOutput(); err != nil {
				t.Errorf("a start on a database of 0.1.0 = %v: %s", err, out)
			}
		})
	}
	starts.Wait()
	newProgram(t, database, newRedis(t)).everything(t)
}

var tables = []string{"agents", "credentials", "token_revocations", "audit_events"}

// asVersion3 makes tables of the schema those of version 3, in what a change of them
// has to lock.
const asVersion3 = `
	alter table agents drop column proof_required, drop column delegates, drop column resources, drop column rate_limit, drop column monthly_token_limit, drop column token_ttl;
	alter table credentials drop column kind, drop column public_key, drop column key_thumbprint, drop column workload;
	drop index audit_events_agent, audit_events_issued;
	create index audit_events_agent_id on audit_events (agent_id);
	comment on table audit_events is 'schema 3';`

// newSchema is a program that isn't started, beside a database with the schema, of
// which this is then made.
func newSchema(t *testing.T, sql string) *program {
	t.Helper()
	p := &program{service: &service{t: t, env: programEnv(newDatabase(t), newRedis(t))}}
	config, err := pgxpool.ParseConfig(p.env["DATABASE_URL"])
	if err != nil {
		t.Fatal(err)
	}
	config.MaxConns = int32(len(tables)) + 1 // each may be in a transaction
	if p.db, err = pgxpool.NewWithConfig(context.Background(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.db.Close)
	p.command("migrate")
	p.exec(sql)
	return p
}

// launchCommand starts a command, and returns its log and how it ends.
func (p *program) launchCommand(name string) (log *bytes.Buffer, ended chan error) {
	p.t.Helper()
	cmd := p.build(name)
	log, ended = &bytes.Buffer{}, make(chan error, 1)
	cmd.Stderr = log
	running := startProcess(p.t, cmd, syscall.SIGKILL)
	go func() { ended <- running.wait() }()
	return log, ended
}

// waitedFor is a table that somebody waits for, or "".
func (p *program) waitedFor() (table string) {
	p.t.Helper()
	err := p.db.QueryRow(p.t.Context(), `
		select coalesce(min(substring(relation::regclass::text from 'agents|credentials|token_revocations|audit_events')), '')
		from pg_locks
		where not granted and locktype = 'relation' and database = (select oid from pg_database where datname = current_database())`).Scan(&table)
	if err != nil {
		p.t.Fatal(err)
	}
	return table
}

// No part of the schema has what requests take and waits for more of that, since they
// may have that and wait for the first. Here one request for each table has read it, or
// has changed it, until migrate waits for it, and then goes on to change all.
func TestMigrateDeadlocksWithNoRequest(t *testing.T) {
	t.Parallel()
	lastMonth := nextMonth(time.Now()).AddDate(0, 11, 0).Format("audit_events_2006_01")
	for _, row := range []struct{ what, before, begun, waits string }{
		{"an upgrade, and who has read", asVersion3, "access share", "agents audit_events credentials"},
		{"an upgrade, and who has changed", asVersion3, "row exclusive", "agents audit_events credentials"},
		{"a month, and who has read", "drop table " + lastMonth, "access share", "audit_events"},
		{"a month, and who has changed", "drop table " + lastMonth, "row exclusive", "audit_events"},
	} {
		t.Run(row.what, func(t *testing.T) {
			t.Parallel()
			p := newSchema(t, row.before)
			requests := map[string]pgx.Tx{}
			for _, table := range tables {
				requests[table] = p.begun("lock table " + table + " in " + row.begun + " mode")
			}
			log, ended := p.launchCommand("migrate")
			missing := strings.Fields(row.waits)
			for running := true; running; {
				select {
				case err := <-ended:
					running = false
					if err != nil {
						t.Errorf("migrate = %v", err)
					}
				case <-time.After(20 * time.Millisecond):
				}
				table := p.waitedFor()
				request := requests[table]
				if request == nil {
					continue
				}
				delete(requests, table)
				missing = slices.DeleteFunc(missing, func(name string) bool { return name == table })
				_, err := request.Exec(t.Context(), "lock table "+strings.Join(tables, ", ")+" in row exclusive mode")
				if err = errors.Join(err, request.Commit(t.Context())); err != nil {
					t.Errorf("a request that has %s ends with %v", table, err)
				}
			}
			if len(missing) > 0 {
				t.Errorf("migrate has not waited for %q", missing)
			}
			if strings.Contains(log.String(), "40P01") {
				t.Errorf("migrate met a deadlock: %s", log)
			}
		})
	}
}

// Who waits for a table is in front of all who want to read it. So migrate gives up
// beside a backup, which keeps what it has read, and lets them through.
func TestMigrateThatWaitsLetsRequestsThrough(t *testing.T) {
	t.Parallel()
	p := newSchema(t, asVersion3)
	backup := p.begun(`select from agents`)
	_, ended := p.launchCommand("migrate")
	p.eventually("migrate waits", func() bool { return p.waitedFor() == "agents" })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := p.db.Exec(ctx, `select from agents`); err != nil {
		t.Errorf("behind migrate a request ends with %v", err)
	}
	backup.Rollback(t.Context())
	if err := <-ended; err != nil {
		t.Errorf("migrate after the backup = %v", err)
	}
}

// An owner's start on the schema of this version makes months that are missing, and
// locks nothing else.
func TestStartOnThisVersionWaitsForNobody(t *testing.T) {
	t.Parallel()
	p := newSchema(t, "")
	p.begun("lock table " + strings.Join(tables, ", ") + " in share update exclusive mode") // as VACUUM does
	log, ended := p.launchCommand("verify-audit")
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("a start beside VACUUM = %v: %s", err, log)
		}
	case <-time.After(30 * time.Second):
		t.Errorf("a start beside VACUUM waits for %s", p.waitedFor())
	}
}

// This version starts on the schema of a later one, which only adds, and leaves
// it as it is, whoever owns it.
func TestServiceStartsOnALaterSchema(t *testing.T) {
	t.Parallel()
	es := newEstate(t)
	es.settle()
	later := "schema " + strconv.Itoa(schemaVersion(t)+1)
	es.exec("agentidp", theOwner, `
		alter table agents add more text not null default 'more';
		alter table token_revocations add more text;
		alter table audit_events add more text;
		create index of_later on agents (more);
		drop index agents_owner;
		comment on table audit_events is '`+later+`'`)
	for _, role := range []string{theService, theOwner, theSuperuser} {
		out, err := es.run("agentidp", role, "verify-audit")
		if err != nil || es.comment() != later || !ask[bool](es, `select to_regclass('of_later') is not null and to_regclass('agents_owner') is null`) {
			t.Errorf("on a later schema, a start as %s = %q, %v, and its comment is %q", role, out, err, es.comment())
		}
	}
	if _, err := es.run("agentidp", theOwner, "migrate"); err != nil || es.comment() != later {
		t.Errorf("migrate of a later schema = %v, and its comment is %q", err, es.comment())
	}
	newProgram(t, es.url("agentidp", theService), es.redis).everything(t)

	for _, earlier := range []string{"null", "'schema 1'", "'schema'", "'schema 2x'", "'ours'", "'schema.sql of SHA-256 3'"} {
		es.exec("agentidp", theOwner, `comment on table audit_events is `+earlier)
		if _, err := es.run("agentidp", theService, "verify-audit"); !refusedFor(err, "run migrate") {
			t.Errorf("where the comment is %s, a start = %v, want an error that says what to do", earlier, err)
		}
	}
}
