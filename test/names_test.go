package test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// What the pages, openapi.yaml and schema.sql say of the service, written again
// as somebody would who has nothing else. What drives the program from outside
// knows no other name of it.

const (
	agentsRead       = "agents:read"
	agentsWrite      = "agents:write"
	tokensRead       = "tokens:read"
	auditRead        = "audit:read"
	credentialsWrite = "credentials:write"
)

var ourScopes = []string{agentsRead, agentsWrite, tokensRead, auditRead, credentialsWrite}

const (
	agentCreated        = "agent.created"
	agentUpdated        = "agent.updated"
	agentSuspended      = "agent.suspended"
	agentReactivated    = "agent.reactivated"
	agentDecommissioned = "agent.decommissioned"
	credentialGenerated = "credential.generated"
	credentialRotated   = "credential.rotated"
	credentialRevoked   = "credential.revoked"
	tokenIssued         = "token.issued"
	tokenRevoked        = "token.revoked"
	tokenIntrospected   = "token.introspected"
	authFailed          = "auth.failed"
	revocationsRead     = "revocations.read"
)

var actions = []string{
	agentCreated, agentUpdated, agentSuspended, agentReactivated, agentDecommissioned, credentialGenerated,
	credentialRotated, credentialRevoked, tokenIssued, tokenRevoked, tokenIntrospected, authFailed, revocationsRead,
}

// Times and sizes, as architecture.md has them.
const (
	requestTimeout = 5 * time.Second
	storeTimeout   = 3 * time.Second
	redisTimeout   = 250 * time.Millisecond
	keysEvery      = 2 * time.Second
	keepEvery      = 250 * time.Millisecond
	bodyTime       = 2 * time.Second
	bodyPace       = 8 << 10
	maxBody        = 16 << 10
	maxHeader      = 12 << 10
	maxBodies      = 1024
	maxBodiesOf    = 128
	maxInFlight    = 1024
	queueSize      = 1024

	verifiedAtOnce = 100_000 // events of one GET /api/v1/audit/verify
)

func TestTimesAndSizesAreThoseOfThePage(t *testing.T) {
	table := pageTables(t, "architecture.md", "## Times and sizes")
	for name, here := range map[string]any{
		"requestTimeout": requestTimeout, "storeTimeout": storeTimeout, "redisTimeout": redisTimeout, "keysEvery": keysEvery,
		"keepEvery": keepEvery, "bodyTime": bodyTime, "bodyPace": bodyPace, "maxBody": maxBody, "maxHeader": maxHeader,
		"maxBodies": maxBodies, "maxBodiesOf": maxBodiesOf, "maxInFlight": maxInFlight, "queueSize": queueSize,
	} {
		said := table["in the source "+name]["is"]
		if length, err := time.ParseDuration(said); err == nil {
			if length != here {
				t.Errorf("architecture.md says that %s is %s; here it is %v", name, said, here)
			}
		} else if said != fmt.Sprint(here) {
			t.Errorf("architecture.md says that %s is %q; here it is %v", name, said, here)
		}
	}
}

// A variable of the environment, as -h prints it.
type variable struct{ name, preset, about string }

func variables(t testing.TB) (list []variable) {
	t.Helper()
	out, err := command(t.Context(), nil, os.Stderr, "-h")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^  ([A-Z_]+) +(\S*) {1,14}(\S.*)$`).FindAllStringSubmatch(out, -1) {
		line := m[0]
		list = append(list, variable{m[1], strings.TrimSpace(line[26:40]), line[41:]})
	}
	if len(list) < 10 {
		t.Fatalf("-h lists only %d variables", len(list))
	}
	return list
}

// A route, as openapi.yaml has it.
type route struct {
	pattern string
	public  bool
	oauth   bool // its errors are those of RFC 6749
}

func routes(t testing.TB) (list []route) {
	t.Helper()
	ops, err := operations(openAPI(t))
	if err != nil {
		t.Fatal(err)
	}
	for pattern, op := range ops {
		_, path, _ := strings.Cut(pattern, " ")
		list = append(list, route{pattern, op.public, strings.HasPrefix(path, "/api/v1/token") || path == "/api/v1/authorize"})
	}
	slices.SortFunc(list, func(a, b route) int { return strings.Compare(a.pattern, b.pattern) })
	return list
}

func openAPI(t testing.TB) string { return readFile(t, "openapi.yaml") }
func schema(t testing.TB) string  { return readFile(t, "schema.sql") }

func readFile(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Advisory locks of PostgreSQL (store.go).
const (
	schemaLock = 0x4167_656e_7401
	chainLock  = 0x4167_656e_7402
)

var (
	pathPattern   = regexp.MustCompile(`^[A-Za-z0-9/._-]+$`)
	idPattern     = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	secretPattern = regexp.MustCompile(`^sk_live_[0-9a-f]{64}$`)
)

func isID(s string) bool { return idPattern.MatchString(s) }

// idOf is a UUID of version 7 (RFC 9562, section 5.7).
func idOf(at time.Time, rest [10]byte) string {
	b := append(binary.BigEndian.AppendUint64(nil, uint64(at.UnixMilli()))[2:], rest[:]...)
	b[6] = b[6]&0x0f | 0x70
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// newID makes an id that nobody has.
func newID() string { return idOf(time.Now(), [10]byte([]byte(rand.Text()))) }

// eventID is that of an event: its time, and its seq in place of random bits.
func eventID(seq int64, at time.Time) string {
	return idOf(at, [10]byte(binary.BigEndian.AppendUint64([]byte{0, 0}, uint64(seq))))
}

// newSecret makes a secret that nobody has.
func newSecret() string {
	var b [32]byte
	rand.Read(b[:])
	return "sk_live_" + hex.EncodeToString(b[:])
}

func nextMonth(t time.Time) time.Time {
	y, m, _ := t.UTC().Date()
	return time.Date(y, m+1, 1, 0, 0, 0, 0, time.UTC)
}

// What a token is for is in the typ of its header.
const (
	accessToken     = "at+jwt"
	auditCheckpoint = "audit-checkpoint+jwt"
)

// claims are those of an access token, in the order on the wire.
type claims struct {
	Issuer       string   `json:"iss"`
	Subject      string   `json:"sub"`
	Audience     audience `json:"aud"`
	ClientID     string   `json:"client_id"`
	Scope        string   `json:"scope"`
	ID           string   `json:"jti"`
	IssuedAt     int64    `json:"iat"`
	Expires      int64    `json:"exp"`
	CredentialID string   `json:"credential_id"`
	SecretID     string   `json:"secret_id"`
}

type checkpoint struct {
	Issuer string `json:"iss"`
	Seq    int64  `json:"seq"`
	Hash   string `json:"hash"`
	Time   int64  `json:"iat"`
}

// An audience of one is a string on the wire, of several an array.
type audience []string

func (a audience) MarshalJSON() ([]byte, error) {
	if len(a) == 1 {
		return json.Marshal(a[0])
	}
	return json.Marshal([]string(a))
}

func (a *audience) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		*a = audience{""}
		return json.Unmarshal(b, &(*a)[0])
	}
	return json.Unmarshal(b, (*[]string)(a))
}

// sign makes a token as the service does that has this key.
func sign(t testing.TB, key, typ string, of any) string {
	t.Helper()
	signer := privateKey(t, key)
	alg, thumbprint := "RS256", ""
	switch public := signer.Public().(type) {
	case *rsa.PublicKey:
		thumbprint = `{"e":"AQAB","kty":"RSA","n":"` + encode(string(public.N.Bytes())) + `"}`
	case *ecdsa.PublicKey:
		point, err := public.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		alg, thumbprint = "ES256", `{"crv":"P-256","kty":"EC","x":"`+encode(string(point[1:33]))+`","y":"`+encode(string(point[33:]))+`"}`
	}
	sum := sha256.Sum256([]byte(thumbprint))
	payload, err := json.Marshal(of)
	if err != nil {
		t.Fatal(err)
	}
	return forge(t, signer, `{"alg":"`+alg+`","typ":"`+typ+`","kid":"`+encode(string(sum[:]))+`"}`, string(payload))
}

// sign makes a token as this service does.
func (v *service) sign(c claims) string {
	v.t.Helper()
	return sign(v.t, v.env["JWT_PRIVATE_KEY"], accessToken, c)
}

// A querier is what a connection and a transaction share.
type querier interface {
	Exec(context.Context, string, ...any) (pgconn.CommandTag, error)
	Query(context.Context, string, ...any) (pgx.Rows, error)
	QueryRow(context.Context, string, ...any) pgx.Row
}

// An event as it is stored.
type event struct {
	EventID          string
	Seq              int64
	AgentID, ActorID *string
	Action, Outcome  string
	IPAddress        string
	UserAgent        string
	Metadata         rawJSON
	Timestamp        moment
	PrevHash, Hash   digest
}

const eventColumns = `event_id, seq, agent_id, actor_id, action, outcome, ip_address, user_agent, metadata, "timestamp", prev_hash, hash`

type digest []byte

// rawJSON is what a json column holds, byte for byte.
type rawJSON []byte

func (j *rawJSON) ScanBytes(b []byte) error {
	*j = slices.Clone(b)
	return nil
}

// A moment is a time of PostgreSQL's.
type moment struct{ time.Time }

func (m moment) String() string { return m.UTC().Format(millis) }

func (m *moment) ScanTimestamptz(v pgtype.Timestamptz) error {
	m.Time = v.Time
	return nil
}

// sum is the hash of an event, as the pages have it.
func (e event) sum() digest {
	hash, _ := hex.DecodeString(servedEvent{
		EventID: e.EventID, Seq: e.Seq, AgentID: e.AgentID, ActorID: e.ActorID, Action: e.Action, Outcome: e.Outcome, IPAddress: e.IPAddress,
		UserAgent: e.UserAgent, Metadata: json.RawMessage(e.Metadata), Timestamp: e.Timestamp.String(), PrevHash: hex.EncodeToString(e.PrevHash),
	}.documentedHash())
	return hash
}

// schemaVersion is what "migrate" leaves as a comment.
func schemaVersion(t testing.TB) int {
	t.Helper()
	source := readFile(t, "store.go")
	_, after, _ := strings.Cut(source, "const schemaVersion = ")
	text, _, _ := strings.Cut(after, "\n")
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("store.go has the schema version %q", text)
	}
	return n
}

// What windows of requests are called (architecture.md).
const (
	byCredential = "client:"
	byToken      = "token:"
	toChange     = "change:"
	ofOneself    = "own:"
	introspect   = "introspect:"
)

const (
	busyMessage        = "Too many requests at once; try again."
	unavailableMessage = "A store does not answer; nothing was acknowledged. Try again."
)

// release is what -version begins with.
func release(t testing.TB) string {
	t.Helper()
	out, err := command(t.Context(), nil, os.Stderr, "-version")
	if err != nil {
		t.Fatal(err)
	}
	release, _, _ := strings.Cut(strings.TrimSpace(out), "+")
	return release
}

func inBackticks(cell string) (names []string) {
	for i, piece := range strings.Split(cell, "`") {
		if i%2 == 1 {
			names = append(names, piece)
		}
	}
	return names
}
