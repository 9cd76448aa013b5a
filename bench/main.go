// The bench measures the service: the real program, with a real PostgreSQL and
// a real Redis, under a load that comes from a process of its own. Each figure
// stands beside a limit measured in the same run, since machines differ and
// what else they do differs too.
//
// It prints lines that benchstat reads as it goes, and then one table. It needs
// TEST_DATABASE_URL and TEST_REDIS_URL: make bench.
package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/bcrypt"
)

var (
	seconds = flag.Float64("time", 3, "seconds of load for each figure")
	only    = flag.String("only", ".", "a regular expression of the parts to run")
	loads   = flag.String("loads", ".", "a regular expression of the loads to run in them")
	agents  = flag.Int("agents", 1_000_000, "agents and credentials of the part Growth")
	events  = flag.Int("events", 10_000_000, "audit events of the part Growth")
	tokens  = flag.Int("tokens", 1_000_000, "tokens after which memory is measured")
	kills   = flag.Int("kills", 300, "agents that the part Cuts suspends")
	profile = flag.String("profile", "", "a folder for the CPU profiles of the servers, for go tool pprof")
)

// profiling is a file that is compiled into the service where its CPU profile
// is wanted, and only here.
const profiling = `package main

import (
	"os"
	"os/signal"
	"runtime/pprof"
	"strconv"
	"syscall"
)

func init() {
	if f, err := os.Create(os.Getenv("BENCH_PROFILE") + "/" + strconv.Itoa(os.Getpid()) + ".prof"); err == nil && len(os.Args) == 1 {
		pprof.StartCPUProfile(f)
		stopped := make(chan os.Signal, 1)
		signal.Notify(stopped, syscall.SIGUSR1)
		go func() {
			<-stopped
			pprof.StopCPUProfile() // writes it, before anything ends
			syscall.Kill(os.Getpid(), syscall.SIGTERM)
		}()
	}
}
`

// A part measures something and prints it.
type part struct {
	name string
	run  func(context.Context) error
}

var parts = []part{
	{"Token", benchTokens},
	{"Keys", benchKeys},
	{"Handed", benchHanded},
	{"Cuts", benchCuts},
	{"Read", benchReads},
	{"Cold", benchCold},
	{"Memory", benchMemory},
	{"Copies", benchCopies},
	{"Growth", benchGrowth},
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "load" {
		exit(runLoad(os.Stdin, os.Stdout))
	}
	if len(os.Args) > 1 && os.Args[1] == "bare" {
		exit(runBare())
	}
	flag.Parse()
	exit(bench())
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func bench() error {
	ctx := context.Background()
	folder, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	program = filepath.Join(folder, "agentidp")
	build := exec.Command("go", "build", "-o", program, ".")
	if *profile != "" {
		file, overlay := filepath.Join(folder, "profiling.go"), filepath.Join(folder, "overlay.json")
		target, err := filepath.Abs("profiling.go")
		err = errors.Join(err, os.MkdirAll(*profile, 0o700), os.WriteFile(file, []byte(profiling), 0o600),
			os.WriteFile(overlay, fmt.Appendf(nil, `{"Replace": {%q: %q}}`, target, file), 0o600))
		if err != nil {
			return err
		}
		os.Setenv("BENCH_PROFILE", *profile)
		build.Args = slices.Insert(build.Args, 2, "-overlay", overlay)
	}
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return err
	}
	wanted, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	fmt.Printf("goos: %s\ngoarch: %s\npkg: agentidp\ncpu: %d of %s\n", runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), cpuModel())
	for _, p := range parts {
		if !wanted.MatchString(p.name) {
			continue
		}
		if err := p.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	printTable()
	return nil
}

func cpuModel() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	if m := regexp.MustCompile(`model name\s*: (.*)`).FindSubmatch(text); m != nil {
		return string(m[1])
	}
	return "unknown"
}

// A figure is a row of the table: name, and values with their units.
type figure struct {
	name   string
	values []value
}

type value struct {
	number float64
	unit   string
}

var figures []figure

// report prints a line for benchstat and keeps it for the table.
func report(name string, iterations int, values ...value) {
	fmt.Printf("Benchmark%s-%d %d", strings.ReplaceAll(name, " ", "/"), runtime.NumCPU(), max(1, iterations))
	for _, v := range values {
		fmt.Printf(" %.4g %s", v.number, v.unit)
	}
	fmt.Println()
	figures = append(figures, figure{name, values})
}

// printTable has the units above the figures, anew where they change.
func printTable() {
	above := ""
	for _, f := range figures {
		units, numbers := "", ""
		for _, v := range f.values {
			width := max(len(v.unit), 7)
			units += fmt.Sprintf(" %*s |", width, v.unit)
			numbers += fmt.Sprintf(" %*s |", width, strconv.FormatFloat(rounded(v.number), 'f', -1, 64))
		}
		if units != above {
			fmt.Printf("\n| %-46s |%s\n|%s|%s\n", "", units, strings.Repeat("-", 48), strings.Repeat("---|", len(f.values)))
			above = units
		}
		fmt.Printf("| %-46s |%s\n", f.name, numbers)
	}
}

// rounded keeps three digits, and all before the point.
func rounded(v float64) float64 {
	if v == 0 {
		return 0
	}
	unit := math.Pow(10, max(0, 2-math.Floor(math.Log10(math.Abs(v)))))
	return math.Round(v*unit) / unit
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

// A limit is what the machine can do at best: how often a second with all of
// its cores, and the CPU time of each.
type limit struct {
	rate float64
	cpu  time.Duration
}

func ownCPU() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// measure does something on all cores, for a second.
func measure(do func()) limit {
	var done atomic.Int64
	var group sync.WaitGroup
	begun, before := time.Now(), ownCPU()
	for range runtime.NumCPU() {
		group.Go(func() {
			for time.Since(begun) < time.Second {
				do()
				done.Add(1)
			}
		})
	}
	group.Wait()
	n := done.Load()
	return limit{float64(n) / time.Since(begun).Seconds(), (ownCPU() - before) / time.Duration(n)}
}

// newKey makes a signing key, in PEM, and measures its signatures.
func newKey(alg string) (text string, l limit, err error) {
	digest := sha256.Sum256([]byte("what is signed"))
	var key crypto.Signer
	if alg == "ES256" {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	} else {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		return "", l, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	l = measure(func() { key.Sign(nil, digest[:], crypto.SHA256) })
	report("Limit signature "+alg, int(l.rate), value{l.rate, "signatures/s"}, value{micros(l.cpu), "µs-CPU/op"})
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), l, err
}

// runBare is the least that a server in Go can do: net/http, and a handler that
// reads a form and writes an answer.
func runBare() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "address=%s\n", listener.Addr())
	return http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"active":false}`))
	}))
}

func bareLimit(request []byte) (limit, error) {
	self, err := os.Executable()
	if err != nil {
		return limit{}, err
	}
	sv, err := start(exec.Command(self, "bare"), regexp.MustCompile(`address=(\S+)\n`))
	if err != nil {
		return limit{}, err
	}
	defer sv.stop()
	before := sv.cpu()
	r, err := load(job{Network: "tcp", Address: sv.address, Connections: 16, Seconds: *seconds, Requests: [][]byte{request}})
	if err != nil {
		return limit{}, err
	}
	l := limit{r.rate(), (sv.cpu() - before) / time.Duration(r.Answers)}
	report("Limit bare net/http", r.Answers, value{l.rate, "requests/s"}, value{micros(l.cpu), "µs-CPU/op"}, value{micros(r.P99), "p99-µs"})
	return l, nil
}

// under puts a load on servers, which share it, and reports what came of it
// beside a limit. Of several requests each is sent once, as an assertion must be.
func (s *stores) under(ctx context.Context, name string, servers []*server, l limit, connections int, requests ...[]byte) (result, error) {
	if !regexp.MustCompile(*loads).MatchString(name) {
		return result{Elapsed: 1, Answers: 1, P99: 1}, nil
	}
	warm := job{Network: "tcp", Address: servers[0].address, Connections: connections, Seconds: *seconds / 6, Requests: requests, Once: len(requests) > 1}
	rest := requests
	if warm.Once {
		warm.Requests, rest = requests[:len(requests)/7], requests[len(requests)/7:]
	}
	if _, err := load(warm); err != nil {
		return result{}, fmt.Errorf("%s: %w", name, err)
	}
	before, postgres, cache := time.Duration(0), s.postgresCPU(), s.redisCPU(ctx)
	for _, sv := range servers {
		before += sv.cpu()
	}
	results := make([]result, len(servers))
	errs := make([]error, len(servers))
	var group sync.WaitGroup
	for i, sv := range servers {
		j := warm
		j.Address, j.Connections, j.Seconds, j.Requests = sv.address, max(1, connections/len(servers)), *seconds, rest
		if j.Once {
			n := len(rest) / len(servers)
			j.Requests = rest[i*n : (i+1)*n]
		}
		group.Go(func() { results[i], errs[i] = load(j) })
	}
	group.Wait()
	sum := result{}
	for i, r := range results {
		if errs[i] != nil {
			return result{}, fmt.Errorf("%s: %w", name, errs[i])
		}
		sum.Answers += r.Answers
		sum.CPU += r.CPU
		sum.Elapsed, sum.P50, sum.P99 = max(sum.Elapsed, r.Elapsed), max(sum.P50, r.P50), max(sum.P99, r.P99)
	}
	after := time.Duration(0)
	for _, sv := range servers {
		after += sv.cpu()
	}
	sum.Server = after - before
	each := func(d time.Duration) float64 { return micros(d) / float64(sum.Answers) }
	report(name, sum.Answers,
		value{sum.rate(), "req/s"}, value{sum.rate() / l.rate, "of-limit"},
		value{micros(sum.P50), "p50-µs"}, value{micros(sum.P99), "p99-µs"},
		value{each(sum.Server), "server-µs/op"}, value{each(sum.Server) / micros(l.cpu), "of-limit-CPU"},
		value{each(s.postgresCPU() - postgres), "postgres-µs/op"}, value{each(s.redisCPU(ctx) - cache), "redis-µs/op"},
		value{100 * sum.CPU.Seconds() / sum.Elapsed.Seconds() / float64(runtime.NumCPU()), "%-machine-load"})
	return sum, nil
}

// benchTokens issues tokens to a client whose secret is known.
func benchTokens(ctx context.Context) error {
	rates := map[string]float64{}
	for _, alg := range []string{"RS256", "ES256"} {
		s, err := newStores(ctx)
		if err != nil {
			return err
		}
		defer s.close(ctx)
		key, l, err := newKey(alg)
		if err != nil {
			return err
		}
		sv, err := s.newServer(key, nil)
		if err != nil {
			return err
		}
		defer sv.stop()
		for _, connections := range []int{1, 16, 64} {
			r, err := s.under(ctx, fmt.Sprintf("Token %s conns=%d", alg, connections), []*server{sv}, l, connections, sv.tokenRequest())
			if err != nil {
				return err
			}
			if connections == 16 {
				rates[alg] = r.rate()
			}
		}
	}
	report("Token ES256 over RS256", 1, value{rates["ES256"] / rates["RS256"], "x"})
	return nil
}

// benchKeys issues tokens to a client that signs with a key of its own, beside
// those to a client whose secret is known.
func benchKeys(ctx context.Context) error {
	return withCopies(ctx, []int{1, 2}, benchKeysOf)
}

func benchKeysOf(ctx context.Context, s *stores, servers []*server, alg string, l limit) error {
	n, first := len(servers), servers[0]
	client, err := s.newClientKey(ctx, first.id)
	if err != nil {
		return err
	}
	secret, err := s.under(ctx, fmt.Sprintf("Copies %d token %s by secret", n, alg), servers, l, 32, first.tokenRequest())
	if err != nil || secret.Server == 0 { // left out, by -loads
		return err
	}
	requests := make([][]byte, 64+int(secret.rate()**seconds*7/6)) // as many as by secret, which is faster
	for i := range requests {
		if requests[i], err = assertionRequest(client, first.id); err != nil {
			return err
		}
	}
	signed, err := s.under(ctx, fmt.Sprintf("Copies %d token %s by key", n, alg), servers, l, 32, requests...)
	if err != nil || signed.Server == 0 {
		return err
	}
	cost := func(r result) float64 { return r.Server.Seconds() / float64(r.Answers) }
	report(fmt.Sprintf("Copies %d server CPU %s by key over secret", n, alg), 1, value{cost(signed) / cost(secret), "x"})
	return nil
}

// newClientKey gives an agent a key, straight in the database.
func (s *stores) newClientKey(ctx context.Context, agentID string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		return nil, err
	}
	number := base64.RawURLEncoding.EncodeToString
	_, err = s.db.Exec(ctx, `
		insert into credentials (credential_id, client_id, kind, secret_prefix, secret_hash, secret_id, public_key, key_thumbprint)
		values (gen_random_uuid(), $1, 'key', $2, '', gen_random_uuid(), $3, $2)`, agentID, newSecret()[8:24],
		fmt.Sprintf(`{"kty":"EC","crv":"P-256","x":%q,"y":%q,"alg":"ES256"}`, number(point[1:33]), number(point[33:])))
	return key, err
}

// assertionRequest asks for a token with an assertion that is good once.
func assertionRequest(key *ecdsa.PrivateKey, clientID string) ([]byte, error) {
	b64, now := base64.RawURLEncoding.EncodeToString, time.Now().Unix()
	signed := b64([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + b64(fmt.Appendf(nil,
		`{"iss":%q,"sub":%q,"aud":"http://bench.example","jti":%q,"iat":%d,"exp":%d}`, clientID, clientID, rand.Text(), now, now+300))
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return nil, err
	}
	sig := b64(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...))
	return request("POST", "/api/v1/token", "", grant+"&client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer&client_assertion="+
		signed+"."+sig), nil
}

// benchReads asks for what is not signed.
func benchReads(ctx context.Context) error {
	s, err := newStores(ctx)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	key, _, err := newKey("RS256")
	if err != nil {
		return err
	}
	sv, err := s.newServer(key, nil)
	if err != nil {
		return err
	}
	defer sv.stop()
	form := "token=" + sv.token
	introspection := request("POST", "/api/v1/token/introspect", basic(sv.id, sv.secret), form)
	bare, err := bareLimit(introspection)
	if err != nil {
		return err
	}
	for name, request := range map[string][]byte{
		"Introspection by secret": introspection,
		"Introspection by bearer": request("POST", "/api/v1/token/introspect", sv.bearer(), form),
		"Agent":                   request("GET", "/api/v1/agents/"+sv.id, sv.bearer(), ""),
		"JWKS":                    request("GET", "/.well-known/jwks.json", "", ""),
	} {
		if _, err := s.under(ctx, name, []*server{sv}, bare, 16, request); err != nil {
			return err
		}
	}
	return nil
}

// benchCold shows secrets that the server has not seen, each once, and then
// asks for tokens with a known one meanwhile.
func benchCold(ctx context.Context) error {
	s, err := newStores(ctx)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	key, l, err := newKey("RS256")
	if err != nil {
		return err
	}
	sv, err := s.newServer(key, nil)
	if err != nil {
		return err
	}
	defer func() { sv.stop() }()
	hash := measure(func() { bcrypt.GenerateFromPassword(make([]byte, 72), bcrypt.DefaultCost) })
	report("Limit bcrypt", int(hash.rate), value{hash.rate, "hashes/s"}, value{micros(hash.cpu), "µs-CPU/op"})
	secrets, err := s.manySecrets(ctx, sv.id, int(hash.rate**seconds)+16)
	if err != nil {
		return err
	}
	var requests [][]byte
	for _, secret := range secrets {
		requests = append(requests, request("POST", "/api/v1/token", basic(sv.id, secret), grant))
	}
	cold := job{Network: "tcp", Address: sv.address, Connections: 16, Requests: requests, Count: len(requests)}
	r, err := load(cold)
	if err != nil {
		return err
	}
	report("Cold secrets", r.Answers, value{r.rate(), "req/s"}, value{r.rate() / hash.rate, "of-limit"}, value{micros(r.P99), "p99-µs"})
	sv.stop() // which forgets them
	if sv, err = s.newServer(key, sv); err != nil {
		return err
	}
	warm := []*server{sv}
	calm, err := s.under(ctx, "Token beside no cold secrets", warm, l, 4, sv.tokenRequest())
	if err != nil {
		return err
	}
	cold.Address = sv.address
	done := make(chan error)
	go func() { _, err := load(cold); done <- err }()
	time.Sleep(200 * time.Millisecond)
	storm, err := s.under(ctx, "Token beside 16 connections of cold secrets", warm, l, 4, sv.tokenRequest())
	if err != nil {
		return err
	}
	report("Token p99 beside cold secrets", 1, value{storm.P99.Seconds() / calm.P99.Seconds(), "x"})
	return <-done
}

// manySecrets gives an agent credentials, straight in the database.
func (s *stores) manySecrets(ctx context.Context, agentID string, n int) (secrets []string, err error) {
	secrets = make([]string, n)
	hashes := make([][]byte, n)
	var next atomic.Int64
	var group sync.WaitGroup
	for range runtime.NumCPU() {
		group.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				secrets[i] = newSecret()
				hashes[i], _ = bcrypt.GenerateFromPassword([]byte(secrets[i]), bcrypt.DefaultCost)
			}
		})
	}
	group.Wait()
	for i, secret := range secrets {
		_, err := s.db.Exec(ctx, `
			insert into credentials (credential_id, client_id, secret_prefix, secret_hash, secret_id)
			values (gen_random_uuid(), $1, $2, $3, gen_random_uuid())`, agentID, secret[8:24], string(hashes[i]))
		if err != nil {
			return nil, err
		}
	}
	return secrets, nil
}

func newSecret() string {
	var b [32]byte
	rand.Read(b[:])
	return fmt.Sprintf("sk_live_%x", b)
}

// benchMemory is about start, memory, and what a token leaves on disk.
func benchMemory(ctx context.Context) error {
	s, err := newStores(ctx)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	key, _, err := newKey("ES256") // which issues more in the time
	if err != nil {
		return err
	}
	first, err := s.newServer(key, nil)
	if err != nil {
		return err
	}
	first.stop()
	sv, err := s.newServer(key, first)
	if err != nil {
		return err
	}
	defer sv.stop()
	time.Sleep(time.Second)
	idle := sv.memory()
	report("Start", 1, value{float64(sv.ready.Microseconds()) / 1000, "ms"})
	report("Memory idle", 1, value{idle / 1e6, "MB"})
	const open = 1000
	conns := make([]net.Conn, open)
	for i := range conns {
		if conns[i], err = net.Dial("tcp", sv.address); err != nil {
			return err
		}
		if _, err := conns[i].Write(request("GET", "/livez", "", "")); err != nil {
			return err
		}
		if _, err := conns[i].Read(make([]byte, 4096)); err != nil {
			return err
		}
	}
	report("Memory of 1,000 open connections", open, value{(sv.memory() - idle) / 1e6, "MB"})
	for _, conn := range conns {
		conn.Close()
	}
	twoScopes := request("POST", "/api/v1/token", basic(sv.id, sv.secret), grant+"&scope=agents:read+audit:read") // as many agents have
	before, err := s.logSize(ctx)
	if err != nil {
		return err
	}
	r := result{}
	for r.Answers < *tokens { // in pieces, so that the load keeps few times
		n := min(*tokens-r.Answers, 100_000)
		piece, err := load(job{Network: "tcp", Address: sv.address, Connections: 16, Requests: [][]byte{twoScopes}, Count: n})
		if err != nil {
			return err
		}
		r.Answers += piece.Answers
		r.Elapsed += piece.Elapsed
	}
	report("Memory after tokens", r.Answers, value{sv.memory() / 1e6, "MB"}, value{r.rate(), "req/s"})
	after, err := s.logSize(ctx)
	if err != nil {
		return err
	}
	report("Disk of a token", r.Answers, value{float64(after-before) / float64(r.Answers), "B"})
	return nil
}

// logSize is the audit log's size in bytes, with its indexes.
func (s *stores) logSize(ctx context.Context) (size int64, err error) {
	err = s.db.QueryRow(ctx, `
		select sum(pg_total_relation_size(inhrelid))::bigint
		from pg_inherits where inhparent = 'audit_events'::regclass`).Scan(&size)
	return size, err
}

// withCopies measures by each algorithm with so many copies, on stores of their own.
func withCopies(ctx context.Context, numbers []int, measure func(context.Context, *stores, []*server, string, limit) error) error {
	for _, alg := range []string{"RS256", "ES256"} {
		key, l, err := newKey(alg)
		if err != nil {
			return err
		}
		for _, n := range numbers {
			if err := measureCopies(ctx, n, alg, key, l, measure); err != nil {
				return err
			}
		}
	}
	return nil
}

func measureCopies(ctx context.Context, n int, alg, key string, l limit, measure func(context.Context, *stores, []*server, string, limit) error) error {
	s, err := newStores(ctx)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	var servers []*server
	var first *server
	for range n {
		sv, err := s.newServer(key, first)
		if err != nil {
			return err
		}
		defer sv.stop()
		servers = append(servers, sv)
		first = servers[0]
	}
	return measure(ctx, s, servers, alg, l)
}

// benchCopies lets several copies share the stores, and appends to the log with
// nothing else to do: the chain's lock is the next limit.
func benchCopies(ctx context.Context) error {
	return withCopies(ctx, []int{1, 2, 4}, benchCopiesOf)
}

func benchCopiesOf(ctx context.Context, s *stores, servers []*server, alg string, l limit) error {
	n, first := len(servers), servers[0]
	if _, err := s.under(ctx, fmt.Sprintf("Copies %d token %s", n, alg), servers, l, 64, first.tokenRequest()); err != nil {
		return err
	}
	var batches, count int64
	err := s.db.QueryRow(ctx, `
		select count(*), coalesce(sum(n), 0)::bigint
		from (select count(*) as n from audit_events group by xmin::text) as transactions`).Scan(&batches, &count)
	report(fmt.Sprintf("Copies %d events of a batch %s", n, alg), int(batches), value{float64(count) / float64(max(1, batches)), "events/batch"})
	return err
}
