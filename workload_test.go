package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The keys of a workload's issuer: from where they may come, and for how long they are good.

// publicKeyText is a new public key as a JWK.
func publicKeyText(t testing.TB, kid string) string {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := private.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`{"kty":"EC","crv":"P-256","x":%q,"y":%q,"kid":%q}`, b64.EncodeToString(point[1:33]), b64.EncodeToString(point[33:]), kid)
}

func setOf(keys ...string) string { return `{"keys":[` + strings.Join(keys, ",") + `]}` }

// A keyServer is what is asked for keys, in place of a network: it answers after a
// while, or fails.
type keyServer struct {
	mu    sync.Mutex
	asked int
	after time.Duration
	fails error
	code  int
	body  io.Reader
	text  string // in place of body
}

func (k *keyServer) RoundTrip(q *http.Request) (*http.Response, error) {
	k.mu.Lock()
	k.asked++
	after, err, code, body := k.after, k.fails, k.code, k.body
	if body == nil {
		body = strings.NewReader(k.text)
	}
	k.mu.Unlock()
	select {
	case <-time.After(after):
	case <-q.Context().Done():
		return nil, q.Context().Err()
	}
	if err != nil {
		return nil, err
	}
	if _, ok := body.(stuck); ok {
		body = stuck{q.Context()}
	}
	return &http.Response{StatusCode: code, Status: http.StatusText(code), Body: io.NopCloser(body), Header: http.Header{}, Request: q}, nil
}

// set makes the server answer this from now on.
func (k *keyServer) set(change func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change()
}

func (k *keyServer) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.asked
}

// stuck gives nothing until nobody waits any more.
type stuck struct{ until context.Context }

func (s stuck) Read(p []byte) (int, error) {
	<-s.until.Done()
	return 0, s.until.Err()
}

// issuerWith is an issuer whose keys this server has.
func issuerWith(k *keyServer) *trustedIssuer {
	i := &trustedIssuer{JWKSURI: "https://keys.example.com/", client: newFetcher(false)}
	i.client.Transport = k
	return i
}

// want fails the test where it doesn't find n keys, or fails with a 503 where n is -1;
// or where it takes another time than this.
func (i *trustedIssuer) want(t *testing.T, kid string, n int, takes time.Duration) {
	t.Helper()
	begun := time.Now()
	keys, err := i.find(t.Context(), kid)
	got := len(keys)
	if p, ok := errors.AsType[*problem](err); ok && p.status == http.StatusServiceUnavailable {
		got = -1
	} else if err != nil {
		t.Errorf("find(%q) fails with %v", kid, err)
	}
	if took := time.Since(begun); got != n || took != takes {
		t.Errorf("find(%q) = %d keys after %v, want %d after %v", kid, got, took, n, takes)
	}
}

func TestKeysOfAnIssuerLiveForAnHour(t *testing.T) {
	good := setOf(publicKeyText(t, "a"), publicKeyText(t, "b"))
	synctest.Test(t, func(t *testing.T) {
		k := &keyServer{after: 2 * time.Second, code: 200, text: good}
		i := issuerWith(k)
		i.want(t, "a", 1, 2*time.Second)
		i.want(t, "", 2, 0)
		time.Sleep(keysFresh)
		i.want(t, "a", 1, 0)
		if n := k.count(); n != 1 {
			t.Errorf("asked %d times within %v, want once", n, keysFresh)
		}
		time.Sleep(time.Second)
		i.want(t, "a", 1, 0) // begins to ask
		time.Sleep(3 * time.Second)
		if n := k.count(); n != 2 {
			t.Errorf("asked %d times after %v, want twice", n, keysFresh)
		}
		k.set(func() { k.fails = errors.New("down") })
		time.Sleep(59*time.Minute - 3*time.Second)
		i.want(t, "a", 1, 0)
		time.Sleep(2 * time.Minute)
		i.want(t, "a", -1, 2*time.Second)
		i.want(t, "c", -1, 0)
		time.Sleep(24 * time.Hour)
		i.want(t, "a", -1, 2*time.Second)
		k.set(func() { k.fails = nil })
		i.want(t, "a", -1, 0)
		time.Sleep(keysAgain)
		i.want(t, "a", 1, 2*time.Second)
	})
}

func TestKeysOfAnIssuerAreRotated(t *testing.T) {
	old, next := setOf(publicKeyText(t, "a")), setOf(publicKeyText(t, "b"))
	synctest.Test(t, func(t *testing.T) {
		k := &keyServer{after: time.Second, code: 200, text: old}
		i := issuerWith(k)
		i.want(t, "a", 1, time.Second)
		k.set(func() { k.text = next })
		i.want(t, "b", 0, 0) // asked for a moment ago
		time.Sleep(keysAgain)
		i.want(t, "b", 1, time.Second)
		i.want(t, "a", 0, 0)
		k.set(func() { k.fails = errors.New("down") })
		time.Sleep(keysAgain)
		i.want(t, "c", -1, time.Second) // whether there is such a key can't be known
		i.want(t, "c", -1, 0)
		i.want(t, "b", 1, 0)
	})
}

// When the list of issuers changes, of one that is as it was the keys that are known stay;
// of others they are asked for before anybody waits for them.
func TestIssuersThatDoNotChangeKeepTheirKeys(t *testing.T) {
	t.Parallel()
	s, static := &server{}, publicKeyText(t, "h")
	s.issuers.Store(&map[string]*trustedIssuer{})
	trust := func(text string) map[string]*trustedIssuer {
		t.Helper()
		cfg, err := parseWorkloads(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range cfg.issuers {
			i.client = &http.Client{Transport: &keyServer{after: 50 * time.Millisecond, code: 200, text: setOf(publicKeyText(t, "a"))}}
		}
		s.trust(cfg)
		return *s.issuers.Load()
	}
	before := trust(`{"https://a.example": {"jwksUri": "https://a.example/keys"}, "https://b.example": {"jwksUri": "https://b.example/keys"},
		"https://c.example": {"jwksUri": "https://c.example/keys"}, "https://d.example": {"jwksUri": "https://d.example/keys"},
		"https://e.example": {"jwks": ` + setOf(publicKeyText(t, "e")) + `}, "https://f.example": {"jwksUri": "https://f.example/keys"},
		"https://h.example": {"jwks": ` + setOf(static) + `}}`)
	later := trust(`{"https://a.example": {"jwksUri": "https://a.example/keys"}, "https://b.example": {"jwksUri": "https://b.example/others"},
		"https://c.example": {"jwksUri": "https://c.example/keys", "singleUse": true}, "https://d.example": {"jwksUri": "https://d.example/keys", "allowPrivate": true},
		"https://e.example": {"jwks": ` + setOf(publicKeyText(t, "f")) + `}, "https://g.example": {"jwksUri": "https://a.example/keys"},
		"https://h.example": {"jwks": ` + setOf(static) + `}}`)
	if later["https://a.example"] != before["https://a.example"] || later["https://h.example"] != before["https://h.example"] {
		t.Error("an issuer that did not change has lost its keys, or those of it who wait")
	}
	for _, name := range []string{"https://b.example", "https://c.example", "https://d.example", "https://e.example", "https://g.example"} {
		if later[name] == nil || later[name] == before[name] {
			t.Errorf("%s is as it was", name)
		}
	}
	if later["https://f.example"] != nil || len(later["https://e.example"].named("f")) != 1 || !later["https://c.example"].SingleUse {
		t.Errorf("the issuers are %v", later)
	}
	for name, i := range later {
		i.mu.Lock()
		if asked := !i.tried.IsZero(); asked != (i.JWKSURI != "") || len(i.keys) == 0 {
			t.Errorf("the keys of %s were asked for: %v, and %d are known before anybody comes", name, asked, len(i.keys))
		}
		i.mu.Unlock()
	}
}

// Kids that nobody knows are asked for once in a while, by one request, and no other
// waits for that.
func TestFloodsOfKidsAreAskedForSeldom(t *testing.T) {
	good := setOf(publicKeyText(t, "a"))
	synctest.Test(t, func(t *testing.T) {
		k := &keyServer{after: 3 * time.Second, code: 200, text: good}
		i := issuerWith(k)
		i.want(t, "a", 1, 3*time.Second)
		time.Sleep(keysAgain)
		var waited, at atomic.Int64
		var all sync.WaitGroup
		for n := range 1000 {
			all.Go(func() {
				begun := time.Now()
				i.find(t.Context(), fmt.Sprintf("none%d", n))
				if time.Since(begun) > 0 {
					waited.Add(1)
				} else {
					at.Add(1)
				}
			})
		}
		synctest.Wait()
		i.want(t, "a", 1, 0)
		all.Wait()
		if waited.Load() != 1 || at.Load() != 999 || k.count() != 2 {
			t.Errorf("of 1000, %d waited, %d did not, and %d were asked for; want 1, 999 and 2", waited.Load(), at.Load(), k.count())
		}
		for n := range 600 {
			time.Sleep(time.Second)
			go i.find(t.Context(), fmt.Sprintf("some%d", n))
			i.want(t, "a", 1, 0)
		}
		if n := k.count(); n < 10 || n > 2+600/30 {
			t.Errorf("asked %d times in 10 minutes, want every %v at most", n, keysAgain)
		}
	})
}

// Who has begun to ask and goes away takes the keys from nobody.
func TestKeysComeThoughWhoAskedHasGone(t *testing.T) {
	good := setOf(publicKeyText(t, "a"))
	synctest.Test(t, func(t *testing.T) {
		i := issuerWith(&keyServer{after: 3 * time.Second, code: 200, text: good})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if keys, err := i.find(ctx, "a"); err == nil {
			t.Errorf("find = %v before there was an answer", keys)
		}
		time.Sleep(3 * time.Second)
		i.want(t, "a", 1, 0)
	})
}

// endless is JSON without an end.
type endless struct{ n *atomic.Int64 }

func (e endless) Read(p []byte) (int, error) {
	for j := range p {
		p[j] = ' '
	}
	e.n.Add(int64(len(p)))
	return len(p), nil
}

func TestAnswersThatHoldNoKeysAreNone(t *testing.T) {
	good, key := setOf(publicKeyText(t, "a")), publicKeyText(t, "b")
	private := strings.TrimSuffix(key, "}") + `,"d":"AA"}`
	many := make([]string, maxKeys+1)
	for n := range many {
		many[n] = strings.Replace(key, `"b"`, fmt.Sprintf(`"b%d"`, n), 1)
	}
	var read atomic.Int64
	for name, row := range map[string]struct {
		code int
		body io.Reader
		ok   bool
		gone bool // the key before
	}{
		"a good one":                {200, strings.NewReader(setOf(key)), true, true},
		"64 keys":                   {200, strings.NewReader(setOf(many[1:]...)), true, true},
		"65 keys":                   {200, strings.NewReader(setOf(many...)), false, false},
		"one good of many bad":      {200, strings.NewReader(setOf(`null`, `1`, `{}`, `{"kty":"oct","k":"AA"}`, private, key)), true, true},
		"a private member":          {200, strings.NewReader(setOf(private)), false, true},
		"a symmetric key":           {200, strings.NewReader(setOf(`{"kty":"oct","k":"AA","kid":"b"}`)), false, true},
		"use enc":                   {200, strings.NewReader(setOf(strings.Replace(key, "{", `{"use":"enc",`, 1))), false, true},
		"a certificate of SPIFFE":   {200, strings.NewReader(setOf(strings.Replace(key, "{", `{"use":"x509-svid",`, 1))), false, true},
		"a key of SPIFFE":           {200, strings.NewReader(setOf(strings.Replace(key, "{", `{"use":"jwt-svid",`, 1))), true, true},
		"members beside keys":       {200, strings.NewReader(`{"spiffe_sequence":1,"keys":[` + key + `]}`), true, true},
		"no keys":                   {200, strings.NewReader(`{"keys":[]}`), false, true},
		"keys null":                 {200, strings.NewReader(`{"keys":null}`), false, false},
		"keys an object":            {200, strings.NewReader(`{"keys":{"b":` + key + `}}`), false, false},
		"a list":                    {200, strings.NewReader(`[` + key + `]`), false, false},
		"null":                      {200, strings.NewReader(`null`), false, false},
		"nothing":                   {200, strings.NewReader(``), false, false},
		"HTML":                      {200, strings.NewReader(`<html>`), false, false},
		"half":                      {200, strings.NewReader(setOf(key)[:50]), false, false},
		"500 with a good body":      {500, strings.NewReader(setOf(key)), false, false},
		"404 with a good body":      {404, strings.NewReader(setOf(key)), false, false},
		"201 with a good body":      {201, strings.NewReader(setOf(key)), false, false},
		"a redirect with a body":    {302, strings.NewReader(setOf(key)), false, false},
		"256 kB":                    {200, strings.NewReader(setOf(key + strings.Repeat(" ", maxKeySet-len(setOf(key))))), true, true},
		"a byte more":               {200, strings.NewReader(setOf(key + strings.Repeat(" ", maxKeySet+1-len(setOf(key))))), false, false},
		"no end":                    {200, endless{&read}, false, false},
		"a body that stays away":    {200, stuck{}, false, false},
		"nested deeper than can be": {200, strings.NewReader(strings.Repeat(`{"keys":[`, 20000)), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := &keyServer{code: 200, text: good}
				i := issuerWith(k)
				i.want(t, "a", 1, 0)
				k.set(func() { k.code, k.body = row.code, row.body })
				time.Sleep(keysFresh + time.Second)
				i.want(t, "a", 1, 0)
				time.Sleep(fetchTimeout) // the longest that it may take
				synctest.Wait()
				i.mu.Lock()
				defer i.mu.Unlock()
				if (i.failed == nil) != row.ok || i.fetching != nil {
					t.Errorf("it is taken: %v, and still asked for: %v; want %v and not", i.failed == nil, i.fetching != nil, row.ok)
				}
				if old := len(i.named("a")) == 1; old == row.gone {
					t.Errorf("the old key is there: %v, want %v", old, !row.gone)
				}
			})
		})
	}
	if n := read.Load(); n == 0 || n > 2*maxKeySet {
		t.Errorf("read %d bytes of an answer without an end, want at most %d or some more", n, maxKeySet)
	}
}

func TestAddressesThatAreNotPublic(t *testing.T) {
	for text, want := range map[string]bool{
		"93.184.216.34": true, "1.1.1.1": true, "172.15.0.1": true, "172.32.0.1": true, "100.63.0.1": true, "100.128.0.1": true,
		"2606:2800:220:1::1": true, "2a00:1450:4001::200e": true, "::ffff:1.1.1.1": true,

		"127.0.0.1": false, "127.255.255.254": false, "0.0.0.0": false, "0.1.2.3": false, "10.0.0.1": false, "172.16.0.1": false,
		"172.31.255.255": false, "192.168.1.1": false, "169.254.169.254": false, "100.64.0.1": false, "100.100.100.200": false, "192.0.0.192": false,
		"192.0.2.1": false, "198.18.0.1": false, "198.19.255.255": false, "198.51.100.1": false, "203.0.113.1": false, "224.0.0.1": false, "240.0.0.1": false,
		"255.255.255.255": false, "192.88.99.1": false,
		"::": false, "::1": false, "::127.0.0.1": false, "::ffff:127.0.0.1": false, "::ffff:10.0.0.1": false, "::ffff:169.254.169.254": false,
		"::ffff:0:127.0.0.1": false, "64:ff9b::127.0.0.1": false, "64:ff9b::1.1.1.1": false, "64:ff9b:1::10.0.0.1": false,
		"2002:7f00:1::": false, "2002:a00:1::1": false, "2001::1": false, "2001:db8::1": false, "3fff::1": false, "fe80::1": false, "fe80::1%lo": false,
		"fec0::1": false, "fc00::1": false, "fd00:ec2::254": false, "ff02::1": false, "100::1": false, "5f00::1": false, "4000::1": false,
	} {
		if got := isPublic(netip.MustParseAddr(text)); got != want {
			t.Errorf("isPublic(%s) = %v, want %v", text, got, want)
		}
	}
	if isPublic(netip.Addr{}) {
		t.Error("no address is a public one")
	}
}

// A nameServer answers with what it is told of a name, one list after another, and the
// last one for ever.
type nameServer struct {
	mu    sync.Mutex
	names map[string][][]string
}

// serveNames makes this the resolver of the process until the test ends.
func serveNames(t *testing.T, names map[string][][]string) {
	n, old := &nameServer{names: names}, net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = old })
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe() // no PacketConn: each message has its length before it (RFC 1035, section 4.2.2)
		go n.serve(theirs)
		return ours, nil
	}}
}

func (n *nameServer) serve(conn net.Conn) {
	defer conn.Close()
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return
	}
	question := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(conn, question); err != nil {
		return
	}
	var labels []string
	at := 12
	for question[at] != 0 {
		labels = append(labels, string(question[at+1:at+1+int(question[at])]))
		at += 1 + int(question[at])
	}
	kind, asked := question[at+2], question[12:at+5]
	answer := append([]byte{question[0], question[1], 0x85, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}, asked...)
	for _, text := range n.addresses(strings.ToLower(strings.Join(labels, ".")), kind) {
		a := netip.MustParseAddr(text)
		if a.Is4() != (kind == 1) {
			continue
		}
		answer[7]++
		data := a.AsSlice()
		answer = append(answer, 0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 0, 0, byte(len(data)))
		answer = append(answer, data...)
	}
	conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
}

// addresses steps on when IPv4 is asked for, which is once in each look-up.
func (n *nameServer) addresses(name string, kind byte) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	lists := n.names[name]
	if lists == nil {
		return nil
	}
	if kind == 1 && len(lists) > 1 {
		n.names[name] = lists[1:]
	}
	return lists[0]
}

// What counts is the address that is dialled, whatever the host looks like.
func TestKeysAreAskedForAtNoPrivateAddress(t *testing.T) {
	serveNames(t, map[string][][]string{
		"private.example.com": {{"127.0.0.1"}}, "six.example.com": {{"::1"}}, "mapped.example.com": {{"::ffff:127.0.0.1"}},
		"nat64.example.com": {{"64:ff9b::7f00:1"}}, "sixtofour.example.com": {{"2002:7f00:1::"}},
		"many.example.com": {{"127.0.0.1", "10.0.0.1", "169.254.169.254", "::1"}}, "zero.example.com": {{"0.0.0.0"}},
		"rebound.example.com": {{"93.184.216.34"}, {"127.0.0.1"}},
	})
	var connections atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, setOf(publicKeyText(t, "a"))) }))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	server.StartTLS()
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	if found, err := net.DefaultResolver.LookupHost(t.Context(), "rebound.example.com"); err != nil || found[0] != "93.184.216.34" {
		t.Fatalf("the name that is looked at is %v, %v; want a public address", found, err)
	}
	for host, resolves := range map[string]bool{
		"127.0.0.1": true, "[::1]": true, "[::ffff:127.0.0.1]": true, "[::ffff:7f00:1]": true, "0.0.0.0": true, "[::]": true, "localhost": true,
		"[64:ff9b::7f00:1]": true, "[2002:7f00:1::]": true, "10.0.0.1": true, "169.254.169.254": true,
		"private.example.com": true, "six.example.com": true, "mapped.example.com": true, "nat64.example.com": true, "sixtofour.example.com": true,
		"many.example.com": true, "zero.example.com": true, "rebound.example.com": true,
		"2130706433": false, "0x7f000001": false, "017700000001": false, "127.1": false, // of Go's resolver these are names
	} {
		i := &trustedIssuer{JWKSURI: "https://" + host + ":" + port + "/", client: newFetcher(false), fetching: make(chan struct{})}
		i.client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
		i.fetch()
		if i.failed == nil || i.keys != nil || strings.Contains(i.failed.Error(), "not a public one") != resolves {
			t.Errorf("keys of %s: %v, %v; want none for its address: %v", host, i.keys, i.failed, resolves)
		}
	}
	if n := connections.Load(); n != 0 {
		t.Errorf("%d connections have reached the server, want none", n)
	}
}

// Where an issuer may be private it is asked itself: no proxy, and nobody whom it
// names.
func TestKeysAreOfTheirServerAlone(t *testing.T) {
	serveNames(t, map[string][][]string{"example.com": {{"127.0.0.1"}}})
	var elsewhere, asked atomic.Int64
	other := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, setOf(publicKeyText(t, "a"))) }))
	defer other.Close()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { elsewhere.Add(1) }))
	defer proxy.Close()
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY"} {
		t.Setenv(name, proxy.URL)
	}
	if newFetcher(true).Transport.(*http.Transport).Proxy != nil { // Go reads the environment once, and maybe did before
		t.Error("a proxy would be asked")
	}
	to := ""
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1); r.URL.Path == "/elsewhere" {
			elsewhere.Add(1)
		}
		if to != "" {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
		io.WriteString(w, setOf(publicKeyText(t, "a")))
	}))
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	for _, to = range []string{"", "/elsewhere", other.URL, "http://169.254.169.254/", "https://example.com:" + port + "/elsewhere", "file:///etc/passwd"} {
		i := &trustedIssuer{JWKSURI: "https://example.com:" + port + "/", client: newFetcher(true), fetching: make(chan struct{})}
		i.client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
		i.fetch()
		if (i.failed == nil) != (to == "") || len(i.keys) > 0 != (to == "") {
			t.Errorf("led to %q, the keys are %v, and the fault %v", to, i.keys, i.failed)
		}
	}
	if elsewhere.Load() != 0 || asked.Load() != 6 {
		t.Errorf("others were asked %d times, and the server %d; want 0 and 6", elsewhere.Load(), asked.Load())
	}
	i := &trustedIssuer{JWKSURI: server.URL, client: newFetcher(true), fetching: make(chan struct{})}
	if i.fetch(); i.failed == nil {
		t.Error("a certificate that nobody trusts is taken")
	}
}

func TestIssuersOfWorkloadsAreChecked(t *testing.T) {
	key := publicKeyText(t, "canary")
	private := strings.TrimSuffix(key, "}") + `,"d":"canary"}`
	with := func(members string) string { return `{"https://a.example":` + members + `}` }
	many := make([]string, maxKeys+1)
	for n := range many {
		many[n] = key
	}
	for _, text := range []string{
		`canary`, `[]`, `"canary"`, `1`, with(`null`), with(`{}`), with(`[]`), with(`"canary"`), with(`{"jwksUri":"https://h/"}`) + `x`, with(`{"jwksUri":"https://h/"}`)[:30],
		with(`{"jwksUri":"https://h/"}`) + with(`{"jwksUri":"https://h/"}`),
		`{"https://a.example":{"jwksUri":"https://h/","singleUse":true},"https://a.example":{"jwksUri":"https://h/"}}`,
		`{"":{"jwksUri":"https://h/"}}`, `{"` + strings.Repeat("a", 513) + `":{"jwksUri":"https://h/"}}`,
		with(`{"jwksUri":"http://h/"}`), with(`{"jwksUri":"h"}`), with(`{"jwksUri":"//h/"}`), with(`{"jwksUri":"https:///x"}`), with(`{"jwksUri":"https://:443/"}`),
		with(`{"jwksUri":"https://canary@h/"}`), with(`{"jwksUri":"https://u:canary@h/"}`), with(`{"jwksUri":"https://%zz/"}`), with(`{"jwksUri":"ftp://h/"}`), with(`{"jwksUri":1}`),
		with(`{"jwksUri":"https://h/","canary":1}`), with(`{"jwksUri":"https://h/","singleUse":true,"singleuse":false}`), with(`{"jwks":` + setOf(key) + `,"JWKS":` + setOf(key) + `}`), with(`{"jwksUri":"https://h/","\u017fingleUse":true}`), with(`{"jwksURI":"https://h/"}`), `{"https://a.example\ufffd":{"jwksUri":"https://h/"}}`, with(`{"jwksUri":"https://h/","singleUse":"yes"}`), with(`{"jwksUri":"https://h/","allowPrivate":1}`),
		with(`{"jwksUri":"https://h/","jwks":` + setOf(key) + `}`), with(`{"singleUse":true}`),
		with(`{"jwks":{}}`), with(`{"jwks":[]}`), with(`{"jwks":` + setOf() + `}`), with(`{"jwks":` + setOf(private) + `}`), with(`{"jwks":` + setOf(many...) + `}`),
		with(`{"jwks":` + setOf(`{"kty":"oct","k":"canary"}`) + `}`), with(`{"jwks":` + key + `}`),
		`{"http://localhost:3000":{"jwks":` + setOf(key) + `}}`, // our own
	} {
		env := goodEnvironment()
		env["WORKLOAD_ISSUERS"] = text
		_, err := loadConfig(lookup(env))
		if err == nil || !strings.Contains(err.Error(), "WORKLOAD_ISSUERS ") || strings.Contains(err.Error(), "canary") {
			t.Errorf("loadConfig with WORKLOAD_ISSUERS=%.80s = %v, want an error that names it and nothing of it", text, err)
		}
	}
	for _, text := range []string{
		`{}`, with(`{"jwksUri":"https://h/"}`), with(`{"jwksUri":"https://h:8443/x?y=z","singleUse":true,"allowPrivate":true}`), with(`{"jwks":` + setOf(key, private) + `}`),
		with(`{"jwks":` + setOf(many[1:]...) + `}`), with(`{"jwks":{"spiffe_sequence":1,"keys":[` + key + `]}}`), `{"spiffe://a.example":{"jwksUri":"https://h/"}}`,
	} {
		env := goodEnvironment()
		env["WORKLOAD_ISSUERS"] = text
		if _, err := loadConfig(lookup(env)); err != nil {
			t.Errorf("loadConfig with WORKLOAD_ISSUERS=%.80s = %v", text, err)
		}
	}
}
