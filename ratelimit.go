package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// Requests by a token are counted apart from those by a credential, so that who
// stole a token can't spend what its client needs to end it; and changes by who
// may make them apart from all else, so that a token of a narrow scope can't
// either. Each is a window of the agent.
const (
	byCredential = "client:"
	byToken      = "token:"
	toChange     = "change:"
)

// admitScript answers in one round trip whether a request is one too many for
// its window and its client's quota, and counts it if it isn't; whether its token
// is known as revoked, which refuses it; and whether the token is that it asks
// about.
//
// KEYS are the monthly counter and the revocations of these two, each of which
// may be empty. ARGV are the owner of the window, its limit, the monthly quota,
// what PostgreSQL counted of it so far (-1: not asked), and when the month ends.
// A limit of 0 is none.
//
// The clock is Redis's own. Window and expiry are set in one script, so that
// no crash leaves a counter that never ends. What is refused is not counted,
// except a request that finds the quota spent.
var admitScript = redis.NewScript(`
local limit, quota, seed = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if KEYS[2] ~= '' and redis.call('EXISTS', KEYS[2]) == 1 then return {'revoked'} end
local known = KEYS[3] ~= '' and redis.call('EXISTS', KEYS[3]) or 0
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
if used < 0 then return {'uncounted'} end
if limit > 0 then
	current = redis.call('INCR', key .. window)
	redis.call('PEXPIRE', key .. window, 120000)
end
if quota > 0 then
	if used >= quota then return {'spent', previous, current, now} end
	redis.call('SET', KEYS[1], used + 1, 'PXAT', ARGV[5])
end
return {'admitted', previous, current, now, known}`)

// giveBackScript takes back one count, unless its window is over.
var giveBackScript = redis.NewScript(`
if tonumber(redis.call('GET', KEYS[1]) or 0) > 0 then redis.call('DECR', KEYS[1]) end
return {}`)

// redisTimeout is the longest that a call waits for Redis, once for each of
// connecting, writing and reading.
const redisTimeout = 250 * time.Millisecond

// A cache is Redis while it answers. After three failures in a row it isn't
// asked again until the keeper (store.go) has found it well.
type cache struct {
	*redis.Client
	pulse    // beats when the keeper finds that it can count
	asks     *queue[scriptCall, []any]
	meter    *meter
	failures atomic.Int32 // in a row
	missed   atomic.Int64 // calls that went without Redis in this outage
}

// A scriptCall is what the keys and arguments of a script are in one call.
type scriptCall struct {
	script *redis.Script
	keys   []string
	args   []any
}

func newCache(o *redis.Options, m *meter) *cache {
	c := &cache{Client: redis.NewClient(o), meter: m}
	c.asks = newQueue(c.serve)
	return c
}

func (c *cache) close() {
	c.asks.close()
	c.Close()
}

var errNoRedis = errors.New("redis is out of reach")

// ask calls a script for a request. The caller goes on without Redis where that
// fails.
func (c *cache) ask(ctx context.Context, script *redis.Script, keys []string, args ...any) ([]any, error) {
	return c.asks.put(ctx, scriptCall{script, keys, args}).wait()
}

// serve makes the calls of concurrent requests in one trip, however near its end
// one of these is: that says nothing of Redis. A failure is counted, and logged
// once an outage.
func (c *cache) serve(batch []*question[scriptCall, []any]) {
	ctx, pipe, lost := context.Background(), c.Pipeline(), c.failures.Load() >= 3
	replies := make([]*redis.Cmd, len(batch))
	for i, q := range batch {
		replies[i] = pipe.EvalSha(ctx, q.asked.script.Hash(), q.asked.keys, q.asked.args...)
	}
	if !lost {
		begun := time.Now()
		_, err := pipe.Exec(ctx) // each reply has its own
		c.meter.asked(`store="redis"`, begun, err)
	}
	var failure error
	for i, q := range batch {
		if lost {
			q.err = errNoRedis
		} else if q.answer, q.err = replies[i].Slice(); redis.HasErrorPrefix(q.err, "NOSCRIPT") {
			q.answer, q.err = c.run(ctx, q.asked.script, q.asked.keys, q.asked.args...)
			lost = errors.Is(q.err, errNoRedis)
		}
		if q.err != nil {
			c.missed.Add(1)
			failure = q.err
		}
	}
	if failure == nil {
		c.failures.Store(0)
	} else if c.failures.Load() < 3 && c.failures.Add(1) == 3 {
		slog.Error("redis lost: limits let through", "error", failure)
	}
}

// run calls a script, also while Redis seems lost. It fails with errNoRedis.
func (c *cache) run(ctx context.Context, script *redis.Script, keys []string, args ...any) ([]any, error) {
	begun := time.Now()
	reply, err := script.Run(context.WithoutCancel(ctx), c.Client, keys, args...).Slice()
	c.meter.asked(`store="redis"`, begun, err)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoRedis, err)
	}
	return reply, nil
}

// found says that Redis answers in full again.
func (c *cache) found() {
	if c.failures.Swap(0) >= 3 {
		slog.Warn("redis is back", "calls_without", c.missed.Swap(0))
	}
}

// giveBack uncounts what did not come about. Where that fails, one less is left
// until the window ends.
func (c *cache) giveBack(ctx context.Context, key string) {
	_, _ = c.ask(context.WithoutCancel(ctx), giveBackScript, []string{key})
}

func revokedKey(tokenID string) string { return "revoked:" + tokenID }

// A verdict is what Redis says of a request.
type verdict struct {
	state             string // admitted, limited, revoked, spent, uncounted; unlimited without Redis
	limit             int64  // requests a minute; 0 is none
	previous, current int64  // requests of the last minute and of this one
	now               int64  // Redis's clock, in milliseconds since 1970
	known             bool   // the token that is asked about, as revoked
}

// admit asks admitScript. Owner is a window of a client, or "ip:" and an
// address; tokens are the jti of the token and of that which it asks about, "" for
// none; month is the quota's counter, "" for none; counted is what
// PostgreSQL knows of it.
func (s *server) admit(ctx context.Context, owner string, tokens [2]string, month string, counted int64) verdict {
	limit, quota, keys := s.cfg.rateLimit, s.cfg.monthlyTokenLimit, []string{month, "", ""}
	if month == "" {
		quota = 0
	}
	for i, id := range tokens {
		if id != "" {
			keys[1+i] = revokedKey(id)
		}
	}
	v := verdict{state: "unlimited"}
	if limit == 0 && quota == 0 && tokens == [2]string{} {
		return v
	}
	reply, err := s.redis.ask(ctx, admitScript, keys,
		owner, limit, quota, counted, nextMonth(s.now()).Add(24*time.Hour).UnixMilli())
	if err == nil {
		v.limit = int64(limit)
		v.state, _ = reply[0].(string)
	}
	number := func(i int) (n int64) {
		if i < len(reply) {
			n, _ = reply[i].(int64)
		}
		return n
	}
	v.previous, v.current, v.now, v.known = number(1), number(2), number(3), number(4) == 1
	return v
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
// proxy, the last address of X-Forwarded-For that isn't.
func clientAddress(r *http.Request, trusted []netip.Prefix) netip.Addr {
	isTrusted := func(a netip.Addr) bool {
		return slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	addr := peer.Addr().Unmap()
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(hops) - 1; i >= 0 && isTrusted(addr); i-- {
		hop, err := netip.ParseAddr(strings.TrimSpace(hops[i]))
		if err != nil {
			break
		}
		addr = hop.Unmap().WithZone("")
	}
	return addr
}
