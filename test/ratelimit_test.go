package test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// redisMinute is the number of the minute by Redis's clock, on which the
// limits go, and how far into it we are.
func (v *service) redisMinute() (minute int64, into time.Duration) {
	v.t.Helper()
	now, err := v.rdb.Time(context.Background()).Result()
	if err != nil {
		v.t.Fatal(err)
	}
	return now.Unix() / 60, time.Duration(now.UnixNano() % int64(time.Minute))
}

// withinAMinute does something again where it crosses from one minute to the
// next, and returns which minute it was.
func (v *service) withinAMinute(do func(minute int64, into time.Duration)) {
	v.t.Helper()
	for {
		minute, into := v.redisMinute()
		do(minute, into)
		if after, _ := v.redisMinute(); after == minute {
			return
		}
	}
}

// counted is the sum of a client's, or an address's, counters in Redis.
func (v *service) counted(owner string) (sum int) {
	v.t.Helper()
	for _, key := range v.keys("rate:" + owner + ":*") {
		n, err := v.rdb.Get(context.Background(), key).Int()
		if err != nil {
			v.t.Fatal(err)
		}
		sum += n
	}
	return sum
}

func (v *service) keys(pattern string) []string {
	v.t.Helper()
	keys, err := v.rdb.Keys(context.Background(), pattern).Result()
	if err != nil {
		v.t.Fatal(err)
	}
	return slices.DeleteFunc(keys, func(key string) bool { return strings.HasPrefix(key, "rate:keeper:") })
}

// forget lets everybody begin anew.
func (v *service) forget() {
	v.t.Helper()
	if keys := v.keys("rate:*:*"); len(keys) > 0 {
		if err := v.rdb.Del(context.Background(), keys...).Err(); err != nil {
			v.t.Fatal(err)
		}
	}
}

// atOnce does something n times at once, and counts the answers by status.
func atOnce(n int, do func(i int) answer) map[int]int {
	var group sync.WaitGroup
	var mu sync.Mutex
	statuses := map[int]int{}
	for i := range n {
		group.Go(func() {
			a := do(i)
			mu.Lock()
			defer mu.Unlock()
			statuses[a.status]++
		})
	}
	group.Wait()
	return statuses
}

// number reads a header that is a number.
func (a answer) number(t *testing.T, name string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(a.header.Get(name), 10, 64)
	if err != nil {
		t.Errorf("%s = %q in %v, want a number", name, a.header.Get(name), a)
	}
	return n
}

func TestWindowAdmitsExactlyTheLimit(t *testing.T) {
	t.Parallel()
	const limit = 20
	v := newService(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit))
	w := v.another() // two copies count as one
	id, secret := v.newClient("resumes:read")
	token := v.token(id, secret, "")
	w.token(id, secret, "") // so that none has to compare it again
	copies := []*service{v, w}
	for name, call := range map[string]func(*service) answer{
		"bearer": func(v *service) answer { return v.api(token, "GET", "/agents/"+id, "") },
		"secret": func(v *service) answer { return v.form(id, secret, "", "grant_type=client_credentials") },
		"both copies' endpoints": func(v *service) answer {
			if v == w {
				return v.api(token, "GET", "/agents/"+id, "")
			}
			return v.bearerForm(token, "/revoke", "token=x")
		},
	} {
		v.forget()
		got := atOnce(3*limit, func(i int) answer { return call(copies[i%2]) })
		if got[200] != limit || got[429] != 2*limit {
			t.Errorf("%s: of %d requests at once %v, want %d let through and the rest 429", name, 3*limit, got, limit)
		}
	}
}

// The previous minute counts for as much of it as is still in the window, so
// that the turn of a minute doesn't let two limits through.
func TestWindowSlides(t *testing.T) {
	t.Parallel()
	const limit = 60
	v := newService(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit))
	id := v.newAgent("resumes:read")
	token := v.mint(id, newID())
	call := func() answer { return v.api(token, "GET", "/agents/"+id, "") }
	for _, previous := range []int{0, limit / 2, limit, 10 * limit} {
		v.withinAMinute(func(minute int64, into time.Duration) {
			v.forget()
			key := fmt.Sprintf("rate:%s%s:%d", byToken, id, minute-1)
			if err := v.rdb.Set(t.Context(), key, previous, time.Minute).Err(); err != nil {
				t.Fatal(err)
			}
			admitted := 0
			for range limit {
				if call().status == 200 {
					admitted++
				}
			}
			_, after := v.redisMinute()
			// The window moves on meanwhile, and so lets through as many more.
			left := func(into time.Duration) int {
				return max(0, limit-int((time.Duration(previous)*(time.Minute-into)+time.Minute-1)/time.Minute))
			}
			if admitted < left(into) || admitted > left(after) && after > into {
				t.Errorf("%d in the minute before and %s into this one, %d were let through, want %d to %d",
					previous, into, admitted, left(into), left(after))
			}
		})
	}
	v.withinAMinute(func(minute int64, _ time.Duration) { // what is two minutes ago is over
		v.forget()
		v.rdb.Set(t.Context(), fmt.Sprintf("rate:%s%s:%d", byToken, id, minute-2), 100*limit, time.Minute)
		if a := call(); a.status != 200 {
			t.Errorf("a busy minute two minutes ago leads to %v, want 200", a)
		}
	})
}

func TestLimitedAnswersSayTheLimit(t *testing.T) {
	t.Parallel()
	const limit = 12
	v := newService(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit))
	id, secret := v.newClient("resumes:read")
	token := v.token(id, secret, "")
	used := map[string]int{} // of each window
	calls := []struct {
		name   string
		status int
		do     func() answer
	}{
		{"a 200", 200, func() answer { return v.api(token, "GET", "/agents/"+id, "") }},
		{"a 403", 403, func() answer { return v.api(token, "GET", "/agents", "") }},
		{"another's agent", 403, func() answer { return v.api(token, "GET", "/agents/"+v.id, "") }},
		{"a token", 200, func() answer { return v.form(id, secret, "", "grant_type=client_credentials") }},
		{"a bad scope", 400, func() answer { return v.form(id, secret, "", "grant_type=client_credentials&scope=x%22") }},
		{"another grant", 400, func() answer { return v.form(id, secret, "", "grant_type=password") }},
		{"no grant", 400, func() answer { return v.form(id, secret, "", "") }},
		{"a revocation by token", 200, func() answer { return v.bearerForm(token, "/revoke", "token=x") }},
		{"an introspection refused", 403, func() answer { return v.form(id, secret, "/introspect", "token=x") }},
	}
	v.withinAMinute(func(minute int64, _ time.Duration) {
		v.forget()
		for _, call := range calls {
			a, window := call.do(), byCredential
			if strings.Contains("a 200, a 403, another's agent, a revocation by token", call.name) {
				window = byToken
			} else if call.name == "an introspection refused" {
				window = introspect + byCredential
			}
			i := used[window]
			used[window]++
			if a.status != call.status {
				t.Errorf("%s = %v, want %d", call.name, a, call.status)
			}
			if n := a.number(t, "X-RateLimit-Limit"); n != limit {
				t.Errorf("X-RateLimit-Limit of %s = %d, want %d", call.name, n, limit)
			}
			if n := a.number(t, "X-RateLimit-Remaining"); n != int64(limit-i-1) {
				t.Errorf("X-RateLimit-Remaining of %s = %d, want %d", call.name, n, limit-i-1)
			}
			if n := a.number(t, "X-RateLimit-Reset"); n != (minute+1)*60 && n != (minute+2)*60 {
				t.Errorf("X-RateLimit-Reset of %s = %d, want the end of this minute, %d", call.name, n, (minute+1)*60)
			}
			if policy, want := a.header.Get("RateLimit-Policy"), fmt.Sprintf(`"minute";q=%d;w=60`, limit); policy != want {
				t.Errorf("RateLimit-Policy of %s = %s, want %s", call.name, policy, want)
			}
			var left, until int
			if n, err := fmt.Sscanf(a.header.Get("RateLimit"), `"minute";r=%d;t=%d`, &left, &until); n != 2 || left != limit-i-1 || until < 1 || until > 60 {
				t.Errorf("RateLimit of %s = %s (%v), want %d left until within a minute", call.name, a.header.Get("RateLimit"), err, limit-i-1)
			}
			if a.header.Get("Retry-After") != "" {
				t.Errorf("%s has Retry-After", call.name)
			}
		}
		a := answer{status: 200}
		for range limit + 1 {
			if a = calls[0].do(); a.status == 429 {
				break
			}
		}
		now, _ := v.rdb.Time(t.Context()).Result()
		retry, reset := a.number(t, "Retry-After"), a.number(t, "X-RateLimit-Reset")
		if a.status != 429 || a.code() != "RATE_LIMIT_EXCEEDED" || a.number(t, "X-RateLimit-Remaining") != 0 ||
			retry < 1 || retry > 120 || reset-now.Unix()-retry < -1 || reset-now.Unix()-retry > 1 {
			t.Errorf("one too many = %v with %v, want 429, nothing remaining, and when to come back", a, a.header)
		}
		for a.status = 200; a.status == 200; { // the other window
			a = v.form(id, secret, "", "grant_type=client_credentials")
		}
		v.want(a, 429, "temporarily_unavailable")
		v.want(v.form(id, secret, "/revoke", "token=x"), 200, "") // which has no limit
	})
	for _, path := range []string{"/health", "/.well-known/jwks.json"} {
		if a := v.do("GET", path, ""); a.status != 200 || a.header.Get("X-RateLimit-Limit") != "" {
			t.Errorf("%s = %v with %v, want it without a limit", path, a, a.header)
		}
	}
}

func TestRevokedTokenSpendsNothing(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "20")
	id := v.newAgent("resumes:read")
	token := v.mint(id, newID())
	v.want(v.bearerForm(v.bearer, "/revoke", "token="+token), 200, "")
	before := v.counted(id)
	for range 30 {
		if a := v.api(token, "GET", "/agents/"+id, ""); a.status != 401 || a.header.Get("X-RateLimit-Limit") != "" {
			t.Fatalf("a revoked token = %v with %v, want 401 without a limit", a, a.header)
		}
	}
	if after := v.counted(id); after != before {
		t.Errorf("a revoked token used 30 times counts for %d", after-before)
	}
	v.want(v.api(v.mint(id, newID()), "GET", "/agents/"+id, ""), 200, "")
}

// Whoever knows a client_id, which is no secret, can't lock that client out.
func TestFailuresCountForTheAddressOnly(t *testing.T) {
	t.Parallel()
	const limit = 6
	v := newService(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit), "TRUSTED_PROXIES", "127.0.0.0/8")
	id, secret := v.newClient("resumes:read")
	v.token(id, secret, "")
	v.forget()
	from := func(address, id, secret string) answer {
		t.Helper()
		q, err := http.NewRequest("POST", v.url+"/api/v1/token", strings.NewReader("grant_type=client_credentials"))
		if err != nil {
			t.Fatal(err)
		}
		q.Header.Set("Content-Type", formType)
		q.Header.Set("X-Forwarded-For", address)
		q.SetBasicAuth(id, secret)
		return v.send(q)
	}
	for _, row := range []struct {
		name     string
		address  func(i int) string
		id       string
		other    string // an address that isn't that one
		sameHost string // one that is
	}{
		{"IPv4", func(int) string { return "203.0.113.7" }, id, "203.0.113.8", "203.0.113.7"},
		{"IPv6, by /64", func(i int) string { return fmt.Sprintf("2001:db8:1:2::%x", i+1) }, id, "2001:db8:1:3::1", "2001:db8:1:2:ffff::9"},
		{"an unknown client", func(int) string { return "203.0.113.9" }, newID(), "203.0.113.10", "::ffff:203.0.113.9"},
		{"no client at all", func(int) string { return "203.0.113.11" }, "x", "203.0.113.12", "203.0.113.11"},
	} {
		got := atOnce(3*limit, func(i int) answer { return from(row.address(i), row.id, newSecret()) })
		if got[401] != limit || got[429] != 2*limit {
			t.Errorf("%s: of %d wrong secrets at once %v, want %d refused and the rest 429", row.name, 3*limit, got, limit)
		}
		a := from(row.sameHost, row.id, "x")
		if v.want(a, 429, "temporarily_unavailable"); a.number(t, "Retry-After") < 1 {
			t.Errorf("%s: one too many = %v, want Retry-After", row.name, a.header)
		}
		v.want(from(row.other, row.id, newSecret()), 401, "invalid_client")
	}
	if n := v.counted(id); n != 0 {
		t.Errorf("wrong secrets count for the client: %d", n)
	}
	// Its own secret, that we know, is let through from that very address.
	for range limit {
		v.want(from("203.0.113.7", id, secret), 200, "")
	}
	v.want(from("203.0.113.7", id, secret), 429, "temporarily_unavailable")
	v.want(from("203.0.113.8", id, secret), 429, "temporarily_unavailable")
	// The failures of the limit are recorded, and nothing of what came after:
	// neither the log nor bcrypt can be flooded.
	var n int
	err := v.db.QueryRow(t.Context(), `select count(*) from audit_events where action = 'auth.failed' and ip_address = '203.0.113.7'`).Scan(&n)
	if err != nil || n != limit {
		t.Errorf("%d failures are recorded of that address (%v), want %d", n, err, limit)
	}
}

// A secret that this process hasn't seen yet has to be compared first. It is
// no failure of its address in the end.
func TestRightSecretCostsItsAddressNothing(t *testing.T) {
	t.Parallel()
	const limit = 8
	v := newService(t, "RATE_LIMIT_PER_MINUTE", fmt.Sprint(limit))
	id := v.newAgent("resumes:read")
	_, first := v.newCredential(id)
	_, second := v.newCredential(id)
	v.forget()
	v.want(v.form(id, first, "", "grant_type=client_credentials"), 200, "")
	if n := v.counted("ip:127.0.0.1"); n != 0 {
		t.Errorf("a right secret that was not known leaves %d failures, want 0", n)
	}
	v.want(v.form(id, newSecret(), "", "grant_type=client_credentials"), 401, "invalid_client")
	v.want(v.form(id, second, "", "grant_type=client_credentials"), 200, "")
	if n := v.counted("ip:127.0.0.1"); n != 1 {
		t.Errorf("a wrong secret and a right one leave %d failures, want 1", n)
	}
	if n := v.counted(byCredential + id); n != 2 {
		t.Errorf("two right secrets count %d for their client, want 2", n)
	}
}

// Of a burst of requests with a secret that is new to this process, as after
// every start of one, one is compared and the others go by that.
func TestBurstWithANewSecretComparesItOnce(t *testing.T) {
	t.Parallel()
	const burst = 100
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "1000")
	id, secret := v.newClient("resumes:read")
	got := atOnce(burst, func(int) answer { return v.form(id, secret, "", "grant_type=client_credentials") })
	if got[200] != burst {
		t.Errorf("%d requests at once with a new secret = %v, want 200 each", burst, got)
	}
	if n := v.counted("ip:127.0.0.1"); n != 0 {
		t.Errorf("right secrets leave %d failures, want 0", n)
	}
}

// quotaKey is where Redis has a client's count of this month.
func quotaKey(id string) string {
	return "monthly:" + id + ":" + time.Now().UTC().Format("2006:01")
}

func TestQuotaIsExact(t *testing.T) {
	t.Parallel()
	const quota, left, calls = 40, 7, 20
	v := newService(t, "MONTHLY_TOKEN_LIMIT", fmt.Sprint(quota))
	w := v.another()
	copies := []*service{v, w}
	id, secret := v.newClient("resumes:read")
	v.token(id, secret, "")
	w.token(id, secret, "")
	if err := v.rdb.Set(t.Context(), quotaKey(id), quota-left, time.Hour).Err(); err != nil {
		t.Fatal(err)
	}
	// What issues nothing spends nothing.
	for _, form := range []string{"grant_type=password", "grant_type=client_credentials&scope=agents:write", "grant_type=client_credentials&resource=x"} {
		if a := v.form(id, secret, "", form); a.status != 400 {
			t.Errorf("%s = %v, want 400", form, a)
		}
	}
	v.want(v.form(id, secret, "/revoke", "token=x"), 200, "")
	got := atOnce(calls, func(i int) answer { return copies[i%2].form(id, secret, "", "grant_type=client_credentials") })
	if got[200] != left || got[403] != calls-left {
		t.Errorf("with %d tokens left, %d requests at once = %v, want exactly that many", left, calls, got)
	}
	a := v.want(v.form(id, secret, "", "grant_type=client_credentials"), 403, "unauthorized_client")
	now := time.Now().UTC()
	reset := time.Date(now.Year(), now.Month()+1, 1, 0, 0, 0, 0, time.UTC).Format("2006-01-02T15:04:05.000Z")
	if text := a.text("error_description"); !strings.Contains(text, "quota") || !strings.Contains(text, reset) {
		t.Errorf("a spent quota is described as %q, want what it is, and %s", text, reset)
	}
	var n int
	err := v.db.QueryRow(t.Context(), `
		select count(*) from audit_events
		where action = 'token.issued' and outcome = 'failure' and agent_id = $1
			and metadata->>'reason' = 'unauthorized_client'`, id).Scan(&n)
	if err != nil || n != calls-left+1 {
		t.Errorf("a spent quota is recorded %d times (%v), want %d", n, err, calls-left+1)
	}
	// It is the client's own, and for tokens only.
	other, otherSecret := v.newClient("resumes:read")
	v.token(other, otherSecret, "")
	v.want(v.form(id, secret, "/revoke", "token=x"), 200, "")
}

func TestQuotaIsGivenBackWhenIssuingFails(t *testing.T) {
	t.Parallel()
	const quota = 5
	v := newService(t, "MONTHLY_TOKEN_LIMIT", fmt.Sprint(quota))
	id, secret := v.newClient("resumes:read")
	v.token(id, secret, "")
	_, err := v.db.Exec(t.Context(), `
		create function refuse() returns trigger language plpgsql as $$ begin raise exception 'no'; end $$;
		create trigger refuse before insert on audit_events for each row when (new.action = 'token.issued') execute function refuse()`)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 * quota {
		a := v.want(v.form(id, secret, "", "grant_type=client_credentials"), 503, "temporarily_unavailable")
		if a.header.Get("Retry-After") == "" || strings.Contains(a.raw, "eyJ") {
			t.Errorf("a token that can't be recorded = %v, want Retry-After and no token", a)
		}
	}
	if n, err := v.rdb.Get(t.Context(), quotaKey(id)).Int(); err != nil || n != 1 {
		t.Errorf("after one token and %d failures the quota counts %d (%v), want 1", 2*quota, n, err)
	}
	v.exec(`drop trigger refuse on audit_events`)
	for range quota - 1 {
		v.token(id, secret, "")
	}
	v.want(v.form(id, secret, "", "grant_type=client_credentials"), 403, "unauthorized_client")
}

// Redis is no place to keep what has to be paid for: the audit log knows.
func TestFlushGivesNobodyAFreshQuota(t *testing.T) {
	t.Parallel()
	const quota = 5
	v := newService(t, "MONTHLY_TOKEN_LIMIT", fmt.Sprint(quota))
	id, secret := v.newClient("resumes:read")
	for range quota - 2 {
		v.token(id, secret, "")
	}
	if err := v.rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	// And the warm-up that follows may come at any moment of these.
	got := atOnce(2*quota, func(int) answer { return v.form(id, secret, "", "grant_type=client_credentials") })
	if got[200] != 2 || got[403] != 2*quota-2 {
		t.Errorf("with 2 tokens left and Redis flushed, %d requests at once = %v, want 2 tokens", 2*quota, got)
	}
	if err := v.rdb.FlushDB(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	v.want(v.form(id, secret, "", "grant_type=client_credentials"), 403, "unauthorized_client")
	// Tokens of another month don't count.
	other, otherSecret := v.newClient("resumes:read")
	_, err := v.db.Exec(t.Context(), `
		insert into audit_events (event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata, "timestamp", prev_hash, hash)
		select gen_random_uuid(), 1000000 + n, $1, null, 'token.issued', 'success', '', '', '{}',
			date_trunc('month', now() at time zone 'UTC') at time zone 'UTC' - interval '1 millisecond', hash, hash
		from audit_events, generate_series(1, 10) as n
		where seq = 1`, other)
	if err != nil {
		t.Fatal(err)
	}
	for range quota {
		v.token(other, otherSecret, "")
	}
	v.want(v.form(other, otherSecret, "", "grant_type=client_credentials"), 403, "unauthorized_client")
}

// 0.1.0 left counters below zero where it doubted them. They are counted anew.
func TestDoubtedQuotaIsCountedAnew(t *testing.T) {
	t.Parallel()
	v := newService(t, "MONTHLY_TOKEN_LIMIT", "3", "RATE_LIMIT_PER_MINUTE", "100")
	id, secret := v.newClient("resumes:read")
	v.token(id, secret, "")
	v.token(id, secret, "")
	if err := v.rdb.Set(t.Context(), quotaKey(id), -1, time.Hour).Err(); err != nil {
		t.Fatal(err)
	}
	a := v.want(v.form(id, secret, "", "grant_type=client_credentials"), 200, "")
	if used, err := v.rdb.Get(t.Context(), quotaKey(id)).Int(); err != nil || used != 3 || a.header.Get("X-RateLimit-Limit") != "100" {
		t.Errorf("then %d tokens are counted (%v), with the limit %q, want 3 and 100", used, err, a.header.Get("X-RateLimit-Limit"))
	}
	v.want(v.form(id, secret, "", "grant_type=client_credentials"), 403, "unauthorized_client")
}

// A counter without an end would lock its client out for ever.
func TestCountersExpire(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "100", "MONTHLY_TOKEN_LIMIT", "100")
	v.form(v.id, newSecret(), "", "grant_type=client_credentials")
	v.token(v.id, v.secret, "")
	month := time.Until(nextMonth(time.Now()))
	for pattern, life := range map[string][2]time.Duration{
		"rate:client:" + v.id + ":*": {time.Minute, 2 * time.Minute},
		"rate:ip:127.0.0.1:*":        {time.Minute, 2 * time.Minute},
		"monthly:" + v.id + ":*":     {month - time.Minute, month + 25*time.Hour},
	} {
		keys := v.keys(pattern)
		if len(keys) == 0 {
			t.Errorf("there are no keys %s", pattern)
		}
		for _, key := range keys {
			if left, err := v.rdb.PTTL(t.Context(), key).Result(); err != nil || left < life[0] || left > life[1] {
				t.Errorf("%s expires in %s (%v), want %s to %s", key, left, err, life[0], life[1])
			}
		}
	}
}

func TestZeroSwitchesALimitOff(t *testing.T) {
	t.Parallel()
	v := newService(t, "RATE_LIMIT_PER_MINUTE", "0", "MONTHLY_TOKEN_LIMIT", "2")
	id, secret := v.newClient("resumes:read")
	got := atOnce(10, func(int) answer { return v.form(id, newSecret(), "", "grant_type=client_credentials") })
	if got[401] != 10 {
		t.Errorf("without a limit, wrong secrets = %v, want 401 each", got)
	}
	token := v.token(id, secret, "")
	got = atOnce(150, func(int) answer { return v.api(token, "GET", "/agents/"+id, "") })
	if a := v.api(token, "GET", "/agents/"+id, ""); got[200] != 150 || a.header.Get("X-RateLimit-Limit") != "" {
		t.Errorf("without a limit, 150 requests = %v with %v, want 200 each", got, a.header)
	}
	if keys := v.keys("rate:*:*"); len(keys) > 0 {
		t.Errorf("without a limit, Redis has %q", keys)
	}
	v.token(id, secret, "")
	v.want(v.form(id, secret, "", "grant_type=client_credentials"), 403, "unauthorized_client")

	w := v.another("RATE_LIMIT_PER_MINUTE", "3", "MONTHLY_TOKEN_LIMIT", "0")
	w.token(id, secret, "") // so that none has to compare it again
	w.forget()
	got = atOnce(6, func(int) answer { return w.form(id, secret, "", "grant_type=client_credentials") })
	if got[200] != 3 || got[429] != 3 {
		t.Errorf("without a quota, 6 requests = %v, want 3 and 3", got)
	}
	if used, err := v.rdb.Get(t.Context(), quotaKey(id)).Int(); err != nil || used != 2 {
		t.Errorf("without a quota, %d (%v) are counted, want the 2 of before", used, err)
	}
}

// Introspections have windows of their own, and only who may introspect spends them.
func TestIntrospectionsSpendNothingElse(t *testing.T) {
	t.Parallel()
	unlimited := newService(t)
	v := unlimited.another("RATE_LIMIT_PER_MINUTE", "5")
	id, secret := unlimited.quickClient(tokensRead, agentsRead)
	narrow, token := unlimited.token(id, secret, agentsRead), unlimited.token(id, secret, tokensRead)
	ask := func(status int, call func() answer) {
		t.Helper()
		v.want(call(), status, map[int]string{403: "insufficient_scope", 429: "temporarily_unavailable"}[status])
	}
	byThief := func() answer { return v.bearerForm(narrow, "/introspect", "token=x") }
	byService := func() answer { return v.bearerForm(token, "/introspect", "token=x") }
	bySecret := func() answer { return v.form(id, secret, "/introspect", "token=x") }
	v.withinAMinute(func(int64, time.Duration) {
		v.forget()
		for _, row := range []struct {
			status int
			call   func() answer
		}{{403, byThief}, {200, byService}, {200, bySecret}} {
			for range 5 {
				ask(row.status, row.call)
			}
			ask(429, row.call)
		}
		ask(200, func() answer { return v.form(id, secret, "", "grant_type=client_credentials") })
		v.want(v.api(token, "GET", "/agents/"+id, ""), 429, "RATE_LIMIT_EXCEEDED") // which the thief has spent
	})
}

// No limit is in the way of who revokes its own tokens by its secret; to try another's is
// recorded, and so has one.
func TestRefusedRevocationsCount(t *testing.T) {
	t.Parallel()
	unlimited := newService(t)
	v := unlimited.another("RATE_LIMIT_PER_MINUTE", "5")
	id, secret := unlimited.quickClient("a:b")
	v.withinAMinute(func(int64, time.Duration) {
		v.forget()
		before := unlimited.audit("action=token.revoked&outcome=failure").Total
		for i := range 8 {
			status, code := 400, "invalid_request"
			if i >= 5 {
				status, code = 429, "temporarily_unavailable"
			}
			v.want(v.form(id, secret, "/revoke", "token="+unlimited.bearer), status, code)
		}
		if n := unlimited.audit("action=token.revoked&outcome=failure").Total - before; n != 5 {
			t.Errorf("%d refusals are recorded, want those 5 that were within the limit", n)
		}
		for range 8 {
			v.want(v.form(id, secret, "/revoke", "token="+unlimited.mint(id, newID())), 200, "")
		}
	})
}
