package main

import (
	"encoding/binary"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// Wait against the plain reading of what a window is: the seconds until one
// more request fits.
func TestRetryAfterIsJustLongEnough(t *testing.T) {
	for _, limit := range []int64{1, 2, 3, 7, 100} {
		for _, previous := range []int64{0, 1, 2, 3, 7, 50, 99, 100, 300} {
			for _, current := range []int64{0, 1, 2, 6, 50, 100, 150} {
				for _, into := range []int64{0, 1, 571, 999, 1000, 29999, 30000, 59000, 59999} {
					fits := func(at int64) bool { // milliseconds since the minute began
						switch {
						case at < 60_000:
							return previous*(60_000-at)+(current+1)*60_000 <= limit*60_000
						case at < 120_000:
							return current*(120_000-at)+60_000 <= limit*60_000
						}
						return true
					}
					if fits(into) {
						continue // is let through
					}
					want := int64(1)
					for !fits(into + 1000*want) {
						want++
					}
					v := verdict{state: "limited", limit: limit, previous: previous, current: current, now: 1e9*60_000 + into}
					if got := v.wait(); got != want {
						t.Errorf("wait() = %d, want %d: limit %d, %d before, %d now, %d ms into the minute",
							got, want, limit, previous, current, into)
					}
				}
			}
		}
	}
}

func TestMonthsAreThoseOfUTC(t *testing.T) {
	ahead, behind := time.FixedZone("ahead", 14*3600), time.FixedZone("behind", -12*3600)
	for _, row := range []struct {
		at    time.Time
		month string
		next  string
	}{
		{time.Date(2026, 3, 31, 23, 59, 59, 999999999, time.UTC), "2026:03", "2026-04-01T00:00:00Z"},
		{time.Date(2026, 4, 1, 0, 0, 0, 0, time.UTC), "2026:04", "2026-05-01T00:00:00Z"},
		{time.Date(2026, 4, 1, 13, 59, 59, 0, ahead), "2026:03", "2026-04-01T00:00:00Z"},
		{time.Date(2026, 3, 31, 12, 0, 0, 0, behind), "2026:04", "2026-05-01T00:00:00Z"},
		{time.Date(2026, 12, 31, 23, 59, 59, 0, time.UTC), "2026:12", "2027-01-01T00:00:00Z"},
		{time.Date(2028, 1, 31, 12, 0, 0, 0, time.UTC), "2028:01", "2028-02-01T00:00:00Z"},
		{time.Date(2028, 2, 29, 12, 0, 0, 0, time.UTC), "2028:02", "2028-03-01T00:00:00Z"},
	} {
		if got, want := monthKey("x", row.at), "monthly:x:"+row.month; got != want {
			t.Errorf("monthKey(%s) = %q, want %q", row.at, got, want)
		}
		if got := nextMonth(row.at).Format(time.RFC3339); got != row.next {
			t.Errorf("nextMonth(%s) = %s, want %s", row.at, got, row.next)
		}
	}
}

// Whatever a client forges, its address is the one that the last trusted proxy
// saw, and its key that of its host.
func FuzzForwardedAddress(f *testing.F) {
	trusted, err := parseNetworks("10.0.0.0/8,2001:db8:ffff::/48")
	if err != nil {
		f.Fatal(err)
	}
	for _, forged := range []string{"", ",", "203.0.113.7", "10.0.0.1, 10.0.0.2", "::ffff:10.0.0.1", "fe80::1%eth0", "[::1]:1", "\x00", "010.0.0.1", "2001:db8:ffff::1%x", "1"} {
		f.Add(forged, uint64(0), uint64(1))
		f.Add(forged, uint64(0x20010db800010002), uint64(0x0000ffff0a000001))
		f.Add(forged, uint64(0), uint64(0xffff0a000001))
	}
	f.Fuzz(func(t *testing.T, forged string, network, host uint64) {
		var b [16]byte
		binary.BigEndian.PutUint64(b[:8], network)
		binary.BigEndian.PutUint64(b[8:], host)
		client := netip.AddrFrom16(b).Unmap()
		from := func(peer netip.Addr, forwarded ...string) netip.Addr {
			return clientAddress(&http.Request{RemoteAddr: netip.AddrPortFrom(peer, 1).String(), Header: http.Header{"X-Forwarded-For": forwarded}}, trusted)
		}
		isTrusted := slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(client) })
		proxy := netip.MustParseAddr("::ffff:10.1.2.3")
		for _, got := range []netip.Addr{from(client, forged), from(proxy, forged, client.String()), from(proxy, forged+","+client.String()+" , 10.9.9.9")} {
			if !isTrusted && got != client {
				t.Errorf("%s that forges %q counts as %s", client, forged, got)
			}
		}
		got := from(proxy, forged)
		if again, err := netip.ParseAddr(got.String()); err != nil || again != got || got.Zone() != "" || got.Is4In6() {
			t.Errorf("%q counts as %q, want an address in its one spelling", forged, got)
		}
		b[15]++ // another address of the same host, or of its neighbour
		next := netip.AddrFrom16(b).Unmap()
		if same := addressKey(client) == addressKey(next); same != (client.Is6() && next.Is6()) {
			t.Errorf("%s and %s are counted as one: %v", client, next, same)
		}
		if key := addressKey(got); strings.Trim(key[3:], "0123456789abcdef.:") != "" {
			t.Errorf("%q is counted under %q", forged, key)
		}
	})
}
