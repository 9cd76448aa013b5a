package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// Requests by a token are counted apart from those by a credential, so that who
// stole a token can't spend what its client needs to end it; and changes by who
// may make them apart from all else, so that a token of a narrow scope can't
// either; and what an agent's own token may do for itself apart from these, so that
// one which may change others can't. Introspections, of which a service makes as
// many as it has callers, spend none of these. Each is a window of the agent.
const (
	byCredential = "client:"
	byToken      = "token:"
	toChange     = "change:"
	ofOneself    = "own:"
	introspect   = "introspect:" // before byCredential or byToken
)

// admitScript answers in one round trip whether a request is one too many for
// its window and its client's quota, and counts it if it isn't.
//
// The key is the monthly counter, if there is one. ARGV are the owner of the window, its
// limit, the monthly quota, what PostgreSQL counted of it so far (-1: not asked),
// when the month ends; and the key of a proof or "", and how long that is remembered, in
// milliseconds. A limit of 0 is none.
//
// The clock is Redis's own. Window and expiry are set in one script, so that
// no crash leaves a counter that never ends. What is refused is not counted,
// except a request that finds the quota spent.
var admitScript = redis.NewScript(`
local limit, quota, seed, proof = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[6]
if proof ~= '' and tonumber(redis.call('GET', proof) or 0) > 0 then return {'used', 0, 0, 0} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local window, elapsed = math.floor(now / 60000), now % 60000
local key = 'rate:' .. ARGV[1] .. ':'
local current, previous = 0, 0
if limit > 0 then
	current = tonumber(redis.call('GET', key .. window) or 0)
	previous = tonumber(redis.call('GET', key .. window - 1) or 0)
	if previous * (60000 - elapsed) / 60000 + current + 1 > limit then
		return {'limited', previous, current, now}
	end
end
local used = quota > 0 and tonumber(redis.call('GET', KEYS[1]) or seed) or 0
if used < 0 then used = seed end -- 0.1.0 left such
if used < 0 then return {'uncounted', 0, 0, 0} end
if proof ~= '' then redis.call('SET', proof, 1, 'PX', ARGV[7]) end
if limit > 0 then
	current = redis.call('INCR', key .. window)
	redis.call('PEXPIRE', key .. window, 120000)
end
if quota > 0 then
	if used >= quota then return {'spent', previous, current, now} end
	redis.call('SET', KEYS[1], used + 1, 'PXAT', ARGV[5])
end
return {'admitted', previous, current, now}`)

// A shownProof says that a request comes from who holds a key (dpop.go). It is good once.
type shownProof struct {
	thumbprint string // of the key; "" where there is no proof
	jti        string
	end        time.Time
	again      error // what a second one is told
	kept       bool  // by Redis, with the count of this request
}

const proofMemory = 90 * time.Second // that a proof is known for: longer than it is good

// digest is of what tells proofs apart.
func (p shownProof) digest() [sha256.Size]byte { return sha256.Sum256([]byte(p.thumbprint + p.jti)) } // the first is of fixed length

// key is where Redis remembers it, or "" where there is none.
func (p shownProof) key() string {
	if p.thumbprint == "" {
		return ""
	}
	sum := p.digest()
	return "rate:proof:" + b64.EncodeToString(sum[:])
}

// A verdict is what Redis says of a request.
type verdict struct {
	state             string // admitted, limited, spent, uncounted, used (of a proof); unlimited without Redis
	limit             int64  // requests a minute; 0 is none
	previous, current int64  // requests of the last minute and of this one
	now               int64  // Redis's clock, in milliseconds since 1970
}

// A refusal holds for a while.
type refusal struct {
	verdict
	until time.Time
}

// admit asks admitScript. Owner is a window of a client, or "ip:" and an
// address; month is the quota's counter, "" for none; counted is what PostgreSQL
// knows of it. Limit is that of the window, and quota that of the month. A proof that is
// there is good once, and is used up only where the request is counted.
func (s *server) admit(ctx context.Context, owner string, limit int, month string, quota int, counted int64, proof shownProof) verdict {
	keys := []string{month}
	if month == "" {
		quota, keys = 0, nil
	}
	v := verdict{state: "unlimited"}
	if limit == 0 && quota == 0 && proof.key() == "" {
		return v
	}
	reply, err := s.redis.ask(ctx, admitScript, keys,
		owner, limit, quota, counted, nextMonth(s.now()).Add(24*time.Hour).UnixMilli(), proof.key(), proofMemory.Milliseconds())
	if err == nil && len(reply) == 4 {
		v.limit = int64(limit)
		v.state, _ = reply[0].(string)
		v.previous, _ = reply[1].(int64)
		v.current, _ = reply[2].(int64)
		v.now, _ = reply[3].(int64)
	}
	return v
}

// admitFailure counts a failed authentication of an address, or refuses where there
// were too many, with headers in out.
func (s *server) admitFailure(ctx context.Context, address string, out http.Header) (v verdict, err error) {
	if v = s.admit(ctx, address, s.cfg.rateLimit, "", 0, 0, shownProof{}); v.state == "limited" {
		v.setHeaders(out)
		s.limited.put(sha256.Sum256([]byte(address)), refusal{v, time.Now().Add(time.Duration(v.wait()) * time.Second)})
		s.meter.add(1, "agentidp_limit_rejections_total", `limit="address"`)
		err = errAddressLimited
	}
	return v, err
}

// wait returns the seconds until a refused client has a request left: until so
// much of the previous minute has left the window that one more fits in.
func (v verdict) wait() int64 {
	elapsed, previous, current := v.now%60000, v.previous, v.current
	if current+1 > v.limit { // nothing fits before this minute is the previous one
		elapsed, previous, current = elapsed-60000, current, 0
	}
	until := -elapsed
	if previous > 0 {
		until += max(0, (60000*(previous-(v.limit-current-1))+previous-1)/previous)
	}
	return max(1, (until+999)/1000)
}

// remaining returns how many more requests would be admitted now.
func (v verdict) remaining() int64 {
	weighted := float64(v.previous)*float64(60000-v.now%60000)/60000 + float64(v.current)
	return max(0, v.limit-int64(math.Ceil(weighted)))
}

// setHeaders tells the client its limit, in the widespread form and in that of
// draft-ietf-httpapi-ratelimit-headers. Reset is when this minute's window ends,
// or for a refused client when to try again: in seconds since 1970, and from now.
func (v verdict) setHeaders(h http.Header) {
	if v.limit == 0 || v.now == 0 {
		return
	}
	reset := (v.now/60000 + 1) * 60
	if v.state == "limited" {
		reset = v.now/1000 + v.wait()
		h.Set("Retry-After", strconv.FormatInt(v.wait(), 10))
	}
	h.Set("X-RateLimit-Limit", strconv.FormatInt(v.limit, 10))
	h.Set("X-RateLimit-Remaining", strconv.FormatInt(v.remaining(), 10))
	h.Set("X-RateLimit-Reset", strconv.FormatInt(reset, 10))
	h.Set("RateLimit-Policy", fmt.Sprintf(`"minute";q=%d;w=60`, v.limit))
	h.Set("RateLimit", fmt.Sprintf(`"minute";r=%d;t=%d`, v.remaining(), reset-v.now/1000))
}

func monthKey(clientID string, t time.Time) string {
	return "monthly:" + clientID + ":" + t.UTC().Format("2006:01")
}

func nextMonth(t time.Time) time.Time {
	y, m, _ := t.UTC().Date()
	return time.Date(y, m+1, 1, 0, 0, 0, 0, time.UTC)
}

// addressKey is what failures of an address are counted under: an IPv4 address,
// or the /64 of an IPv6 one, since that is what one host is given.
func addressKey(a netip.Addr) string {
	if a.Is6() {
		network, _ := a.Prefix(64)
		a = network.Addr()
	}
	return "ip:" + a.String()
}

// clientAddress is who sent the request: the peer, or where that is a trusted
// proxy, the last address of X-Forwarded-For that isn't; or, where there is none,
// of Forwarded (RFC 7239), which most proxies let pass as the client wrote it.
func clientAddress(r *http.Request, trusted []netip.Prefix) netip.Addr {
	addr, _ := readHop(r.RemoteAddr)
	header, read := "X-Forwarded-For", strings.TrimSpace
	if r.Header[header] == nil {
		header, read = "Forwarded", forwardedFor
	}
	hops := strings.Split(strings.Join(r.Header[header], ","), ",")
	for i := len(hops) - 1; i >= 0 && slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(addr) }); i-- {
		next, err := readHop(read(hops[i]))
		if err != nil {
			break
		}
		addr = next
	}
	return addr
}

// forwardedFor is the parameter "for" of an element of Forwarded. What else is
// quoted there may hold anything, so an element that has such is none.
func forwardedFor(element string) (hop string) {
	for pair := range strings.SplitSeq(element, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		isFor := strings.EqualFold(name, "for")
		if inner := strings.TrimSuffix(strings.TrimPrefix(value, `"`), `"`); isFor && len(inner) == len(value)-2 {
			value = inner
		}
		if strings.Contains(value, `"`) {
			return ""
		}
		if isFor {
			hop = value
		}
	}
	return hop
}

// readHop reads an address as proxies write it: with a port or without, one of
// IPv6 in brackets or not.
func readHop(text string) (netip.Addr, error) {
	if hop, err := netip.ParseAddrPort(text); err == nil {
		return hop.Addr().Unmap().WithZone(""), nil
	}
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"))
	return addr.Unmap().WithZone(""), err
}

// slots are places for as many at once. Who waits for one is served in turn.
type slots chan struct{}

func (p slots) enter(ctx context.Context) error {
	select {
	case p <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for others to be done: %w", ctx.Err())
	}
}

func (p slots) leave() { <-p }

// Lanes have so many places for each address. Some share one, nobody knows which.
type lanes struct {
	seed maphash.Seed
	all  [1 << 10]slots
}

func newLanes(places int) *lanes {
	l := &lanes{seed: maphash.MakeSeed()}
	for i := range l.all {
		l.all[i] = make(slots, places)
	}
	return l
}

func (l *lanes) of(address string) slots {
	return l.all[maphash.String(l.seed, address)%uint64(len(l.all))]
}

// redisTimeout is the longest that a call waits for Redis, once for each of
// connecting, writing and reading.
const redisTimeout = 250 * time.Millisecond

// A cache is Redis while the keeper (keeper.go) finds that it can count.
type cache struct {
	*redis.Client
	pulse // beats when it was found
	asks  *queue[scriptCall, reply]
	meter *meter
}

// A scriptCall is what the keys and arguments of a script are in one call.
type scriptCall struct {
	script *redis.Script
	keys   []string
	args   []any
}

type reply struct {
	values []any
	err    error
}

// newCache takes where Redis is, or the Sentinels are that know it, or neither
// where nothing is counted.
func newCache(where *redis.Options, sentinel *redis.FailoverOptions, m *meter) *cache {
	logging.Disable() // what fails is known to who asked
	c := &cache{meter: m}
	if sentinel != nil {
		o := *sentinel
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = redisTimeout, redisTimeout, redisTimeout, 4*redisTimeout
		o.ContextTimeoutEnabled, o.MaxRetries, o.DialerRetries, o.DisableIdentity = true, -1, 1, true
		c.Client = redis.NewFailoverClient(&o)
	} else {
		var o redis.Options
		if where != nil {
			o = *where
		}
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = redisTimeout, redisTimeout, redisTimeout, 4*redisTimeout
		o.ContextTimeoutEnabled, o.MaxRetries, o.DialerRetries, o.DisableIdentity = true, -1, 1, true
		o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
		c.Client = redis.NewClient(&o)
	}
	c.asks = newQueue(c.call)
	return c
}

func (c *cache) close() {
	c.asks.close()
	c.Close()
}

// ask calls a script for a request. The caller goes on without Redis where that
// fails.
func (c *cache) ask(ctx context.Context, script *redis.Script, keys []string, args ...any) ([]any, error) {
	r, err := c.asks.put(ctx, scriptCall{script, keys, args}).wait()
	return r.values, errors.Join(err, r.err)
}

// call makes calls in one trip, each of which may fail by itself. While Redis is
// lost nobody waits for it.
func (c *cache) call(ctx context.Context, calls []scriptCall) ([]reply, error) {
	if !c.well() {
		c.meter.add(float64(len(calls)), "agentidp_store_errors_total", `store="redis"`)
		return nil, errors.New("redis is lost")
	}
	begun, pipe, replies := time.Now(), c.Pipeline(), make([]reply, len(calls))
	made := make([]*redis.Cmd, len(calls))
	for i, call := range calls {
		made[i] = call.script.EvalSha(ctx, pipe, call.keys, call.args...)
	}
	_, err := pipe.Exec(ctx) // each reply has its own
	c.meter.asked(`store="redis"`, begun, err)
	for i, call := range calls {
		if redis.HasErrorPrefix(made[i].Err(), "NOSCRIPT") { // it has begun anew, or has forgotten it
			made[i] = call.script.Eval(ctx, c, call.keys, call.args...)
		}
		replies[i].values, replies[i].err = made[i].Slice()
	}
	return replies, nil
}

// denied names a command of the scripts that this user may not call, since what
// a script says of that doesn't.
func (c *cache) denied(ctx context.Context) error {
	const key = "monthly:keeper"
	for _, call := range [][]any{{"time"}, {"get", key}, {"set", key, 0, "px", 1000}, {"incr", key}, {"decr", key}, {"pexpire", key, 1000}} {
		err := c.Do(ctx, call...).Err()
		if redis.HasErrorPrefix(err, "NOPERM") {
			return err
		}
		if err != nil && !errors.Is(err, redis.Nil) {
			return nil // it is another trouble
		}
	}
	return nil
}

// giveBackScript takes back one count, unless its window is over.
var giveBackScript = redis.NewScript(`
if tonumber(redis.call('GET', KEYS[1]) or 0) > 0 then redis.call('DECR', KEYS[1]) end
return {}`)

// giveBack uncounts what did not come about. Where that fails, one less is left
// until the window ends.
func (c *cache) giveBack(ctx context.Context, key string) {
	_, _ = c.ask(context.WithoutCancel(ctx), giveBackScript, []string{key})
}
