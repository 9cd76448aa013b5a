package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// A workload is an agent that has neither a secret nor a key of its own here: an issuer whom the operator trusts
// says who it is, in a token for us (RFC 7523). Its credential names that and the subject; only equality counts.
type workload struct {
	Issuer  string            `json:"issuer"`
	Subject string            `json:"subject"`
	Claims  map[string]string `json:"claims,omitempty"` // that the token must have too
}

const (
	jwtBearerGrant  = "urn:ietf:params:oauth:grant-type:jwt-bearer" // RFC 7523, section 2.1
	spiffeAssertion = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
	workloadLife    = 24 * time.Hour // that an assertion of one may live on

	keysAgain    = 30 * time.Second // from one question for an issuer's keys to the next
	keysFresh    = 10 * time.Minute // until they are asked for again
	keysLast     = time.Hour        // without an answer, and then they are dead
	maxKeySet    = 256 << 10        // bytes
	maxKeys      = 64
	fetchTimeout = 5 * time.Second
)

func (s *server) readWorkload(value any) (w workload, err error) {
	members, _ := value.(map[string]any)
	claims, hasClaims := members["claims"].(map[string]any)
	w.Issuer, _ = members["issuer"].(string)
	w.Subject, _ = members["subject"].(string)
	w.Claims = map[string]string{}
	for name, value := range claims {
		text, ok := value.(string)
		if w.Claims[name] = text; !ok || text == "" || len(claims) > 16 || strings.ContainsFunc(name+text, noText) {
			return w, errors.New("must have up to 16 claims, each a text without control characters and U+FFFD")
		}
	}
	if w.Subject == "" || len(w.Subject) > 512 || len(members) > 2 && !hasClaims || len(members) > 3 || strings.ContainsFunc(w.Subject, noText) {
		return w, errors.New("must have an issuer, a subject of at most 512 characters, and claims or none, like {\"issuer\":\"https://...\",\"subject\":\"...\"}")
	}
	if (*s.issuers.Load())[w.Issuer] == nil {
		return w, errors.New("must have an issuer that WORKLOAD_ISSUERS trusts, letter by letter")
	}
	return w, nil
}

// A trustedIssuer is one that WORKLOAD_ISSUERS names, and what is known of its keys.
type trustedIssuer struct {
	JWKS         map[string]any `json:"jwks"` // RFC 7517, section 5
	JWKSURI      string         `json:"jwksUri"`
	SingleUse    bool           `json:"singleUse"`    // each assertion is good once
	AllowPrivate bool           `json:"allowPrivate"` // that jwksUri leads into our own networks

	client   *http.Client
	mu       sync.Mutex
	keys     []jwk
	answered time.Time // when they came
	tried    time.Time // when they were asked for the last time
	fetching chan struct{}
	failed   error
}

// A workloadConfig is WORKLOAD_ISSUERS.
type workloadConfig struct {
	issuers map[string]*trustedIssuer
	text    string // tells whether they have changed
}

func parseWorkloads(text string) (cfg workloadConfig, err error) {
	cfg.text = text
	value, wrong := readJSON(json.NewDecoder(strings.NewReader(text))) // Go would take the last of two, and of names that differ in case
	if err = json.Unmarshal([]byte(text), &cfg.issuers); err != nil || wrong != "" {
		return cfg, errors.New("it is no JSON of this form, or something follows it")
	}
	for name, i := range cfg.issuers {
		members, _ := value.(map[string]any)[name].(map[string]any)
		maps.DeleteFunc(members, func(is string, _ any) bool {
			return slices.Contains([]string{"jwks", "jwksUri", "singleUse", "allowPrivate"}, is)
		})
		if i == nil || name == "" || len(name) > 512 || strings.ContainsFunc(name, noText) || (i.JWKS == nil) == (i.JWKSURI == "") || len(members) > 0 {
			return cfg, errors.New("each issuer must have a name, either jwks or jwksUri, and beside that only singleUse and allowPrivate")
		}
		if u, err := url.Parse(i.JWKSURI); i.JWKS == nil && (err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil) {
			return cfg, errors.New("a jwksUri must be an https URL")
		}
		if i.keys = usable(i.JWKS); i.JWKS != nil && i.keys == nil {
			return cfg, errors.New("a jwks has no key of RSA, P-256 or Ed25519 for signatures, or more than 64")
		}
		i.client = newFetcher(i.AllowPrivate)
	}
	return cfg, nil
}

// usable are the keys that verify here; others are passed over (RFC 7517, section 5).
func usable(set map[string]any) (keys []jwk) {
	list, _ := set["keys"].([]any)
	if len(list) > maxKeys {
		return nil
	}
	for _, members := range list {
		if k, err := readJWK(members); err == nil {
			keys = append(keys, k)
		}
	}
	return keys
}

// trust takes the place of the issuers that were trusted: at once of who isn't named any more.
// What is known of the keys of one that hasn't changed stays; others are trusted once theirs
// have come, or fetchTimeout is over.
func (s *server) trust(cfg workloadConfig) {
	before, meanwhile, asked := *s.issuers.Load(), map[string]*trustedIssuer{}, sync.WaitGroup{}
	for name, i := range cfg.issuers {
		switch old := before[name]; {
		case old != nil && old.JWKSURI == i.JWKSURI && old.SingleUse == i.SingleUse && old.AllowPrivate == i.AllowPrivate && fmt.Sprint(old.JWKS) == fmt.Sprint(i.JWKS):
			cfg.issuers[name], meanwhile[name] = old, old
		case i.JWKSURI == "":
			meanwhile[name] = i
		default:
			asked.Go(func() { <-i.ask() })
		}
	}
	s.issuers.Store(&meanwhile)
	asked.Wait()
	s.issuers.Store(&cfg.issuers)
}

// newFetcher makes a client that follows no redirect, asks no proxy, and connects to a private network only where
// it may: that is looked at behind the look-up of the name, which the issuer's owner decides.
func newFetcher(allowPrivate bool) *http.Client {
	dialer := &net.Dialer{Timeout: fetchTimeout, Control: func(_, address string, _ syscall.RawConn) error {
		if to, err := netip.ParseAddrPort(address); err != nil || !allowPrivate && !isPublic(to.Addr()) {
			return errors.New("its address is not a public one; allowPrivate lets that pass")
		}
		return nil
	}}
	return &http.Client{
		Timeout:       fetchTimeout,
		Transport:     &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// special are networks that are nobody's on the Internet, or lead to others (IANA's
// registries of special-purpose addresses), beside what netip knows.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("192.88.99.0/24"), netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("2001::/23"), netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("3fff::/20"),
}

func isPublic(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	return a.IsGlobalUnicast() && !a.IsPrivate() && (a.Is4() || a.As16()[0]>>5 == 1) && // 2000::/3
		!slices.ContainsFunc(special, func(p netip.Prefix) bool { return p.Contains(a) })
}

// find returns the keys that may have signed. Only who needs them to be asked for waits;
// an unknown kid has that done at most every keysAgain. An error is that there are none.
func (i *trustedIssuer) find(ctx context.Context, kid string) ([]jwk, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	found, now := i.named(kid), time.Now()
	if i.JWKS != nil {
		return found, nil
	}
	if (len(found) == 0 || now.Sub(i.answered) > keysFresh) && i.fetching == nil && now.Sub(i.tried) >= keysAgain {
		done := i.ask()
		if len(found) == 0 || now.Sub(i.answered) > keysLast {
			i.mu.Unlock()
			select {
			case <-done:
			case <-ctx.Done():
			}
			i.mu.Lock()
			found = i.named(kid)
		}
	}
	if time.Since(i.answered) > keysLast || len(found) == 0 && (i.fetching != nil || i.failed != nil) {
		return nil, errUnavailable.because("The keys of the assertion's issuer can't be had now; try again.")
	}
	return found, nil
}

// ask begins to fetch the keys, and returns what is closed at the end of that.
func (i *trustedIssuer) ask() chan struct{} {
	done := make(chan struct{})
	i.tried, i.fetching = time.Now(), done
	go i.fetch()
	return done
}

func (i *trustedIssuer) named(kid string) []jwk {
	return slices.DeleteFunc(slices.Clone(i.keys), func(k jwk) bool { return kid != "" && k.Kid != kid })
}

// fetch is nobody's request, so that none that is given up takes the keys from others.
func (i *trustedIssuer) fetch() {
	var set map[string]any
	answer, err := i.client.Get(i.JWKSURI)
	if err == nil {
		if answer.StatusCode == http.StatusOK {
			err = json.NewDecoder(http.MaxBytesReader(nil, answer.Body, maxKeySet)).Decode(&set)
		} else {
			err = fmt.Errorf("it answers %s", answer.Status)
		}
		answer.Body.Close()
	}
	list, isSet := set["keys"].([]any)
	if err == nil && usable(set) == nil {
		err = errors.New("it has no key that can be used here, or more than 64")
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if (err == nil) != (i.failed == nil) {
		slog.Warn("keys of a workload's issuer", "jwksUri", i.JWKSURI, "well", err == nil, "error", err)
	}
	if i.failed = err; isSet && len(list) <= maxKeys { // also where none is left: they were withdrawn
		i.keys, i.answered = usable(set), time.Now()
	}
	close(i.fetching)
	i.fetching = nil
}

// checkWorkload returns the client whose credential names who this assertion is of.
func (s *server) checkWorkload(r *request, trusted *trustedIssuer, a assertion, asGrant bool) (o client, err error) {
	audiences := []string{s.cfg.issuer}
	if asGrant { // RFC 7523, section 3
		audiences = append(audiences, s.cfg.issuer+"/api/v1/token")
	}
	types, needed := []string{"JWT", "JOSE", "client-authentication+jwt", "at+jwt"}, []string{"sub"} // at+jwt of another AgentIdP
	if trusted.SingleUse {
		needed = append(needed, "jti")
	}
	if err := a.check(s.now(), workloadLife, types, audiences, needed...); err != nil {
		return o, err
	}
	if strings.ContainsFunc(a.sub+a.id, noText) {
		return o, flaw("must have no control characters in its sub and jti, nor broken ones")
	}
	keys, err := trusted.find(r.Context(), a.kid)
	if err != nil {
		return o, err
	}
	if len(keys) > maxKeysTried {
		return o, flaw(fmt.Sprintf("must say by its kid which of the more than %d keys of its issuer has signed it", maxKeysTried))
	}
	if !slices.ContainsFunc(keys, func(k jwk) bool { return k.verifies(a) }) {
		return o, flaw("is not signed by a key of its issuer")
	}
	if o, err = s.findWorkload(r, a); err == nil {
		o, err = accept(o, a, trusted.SingleUse)
	}
	o.use.trusted = func() bool { return (*s.issuers.Load())[a.issuer] == trusted }
	o.proved = facts{"issuer": a.issuer, "subject": a.sub, "jti": a.id} // of the assertion
	return o, err
}

// findWorkload finds the one agent with a credential that names this workload; the
// client_id chooses where there are several.
func (s *server) findWorkload(r *request, a assertion) (found client, err error) {
	notBound := flaw("is of a workload that no active credential names")
	x := shown{clientID: r.form.Get("client_id"), issuer: a.issuer, subject: a.sub, use: a.useID()}
	if x.clientID != "" && !isID(x.clientID) {
		return found, notBound
	}
	clients, err := s.signers.put(r.Context(), x).wait()
	if err == nil && len(clients) > maxKnown {
		err = errForm.because(fmt.Sprintf("More than %d credentials have this issuer and subject; choose by client_id one that has fewer.", maxKnown))
	}
	if err != nil {
		return found, err
	}
	for _, o := range clients {
		for name, want := range o.claims {
			if a.claims[name] != want {
				o.AgentID = ""
			}
		}
		if o.AgentID != "" && o.agentStatus == "active" && found.agentStatus == "active" && o.AgentID != found.AgentID {
			return client{}, errForm.because("Several agents are this workload; choose one by client_id.")
		}
		if o.AgentID != "" && found.agentStatus != "active" { // one that is lets in
			found = o
		}
	}
	if found.AgentID == "" {
		return found, notBound
	}
	return found, nil
}

const maxCut = 1000 // agents in one transaction, so that nobody waits for long behind it

// revokeWorkloads ends all credentials of an issuer, and with them all tokens that came from it: it was broken
// into. Whoever may not do that to each of the agents does it to none. What was ended stays so where time runs
// out, or nobody would be left to manage agents, and the next such request goes on.
func (s *server) revokeWorkloads(r *request) (any, error) {
	in := readQuery(r)
	issuer := take(in, "workloadIssuer", matching("must be an issuer of workloads", func(s string) bool {
		return s != "" && len(s) <= 512 && !strings.ContainsFunc(s, noText)
	}))
	if issuer == nil && in.faults["workloadIssuer"] == nil {
		in.faults["workloadIssuer"] = "is missing: the issuer whose workloads' credentials are to end"
	}
	if err := in.problem(); err != nil {
		return nil, err
	}
	const theirs = `
		from credentials c
		join agents a on a.agent_id = c.client_id
		where c.workload ->> 'issuer' = $1 and c.status = 'active'`
	var held []string
	err := s.db.QueryRow(r.Context(), `select array(select distinct unnest(a.capabilities)`+theirs+`)`, *issuer).Scan(&held)
	if err == nil {
		err = r.caller.mayGrant(held)
	}
	whom := func(ctx context.Context, tx pgx.Tx) ([]string, error) { // who manages agents first, and the caller last
		rows, _ := tx.Query(ctx, `select a.agent_id::text`+theirs+`
			group by a.agent_id order by a.agent_id = $2, $3 = any(a.capabilities) desc limit $4`, *issuer, r.caller.AgentID, agentsWrite, maxCut)
		return pgx.CollectRows(rows, pgx.RowTo[string])
	}
	ended := 0
	for left := true; left && err == nil; {
		err = s.changeAll(r, whom, func(ctx context.Context, tx pgx.Tx, agents []string) (events []event, err error) {
			events, err = cut(ctx, tx, r.caller, agents, *issuer)
			ended, left = ended+len(events), len(agents) > 0 && !slices.Contains(agents, r.caller.AgentID)
			return events, err
		})
	}
	if err == nil && ended == 0 {
		err = errNoCredential.because("No active credential is of this issuer.")
	}
	return nil, err
}

// cut ends those that these agents have.
func cut(ctx context.Context, tx pgx.Tx, c caller, agents []string, issuer string) (events []event, err error) {
	rows, _ := tx.Query(ctx, `
		select `+agentColumns+`
		from agents
		where agent_id = any($1)`, agents)
	concerned, err := pgx.CollectRows(rows, pgx.RowToStructByName[agent])
	for _, a := range concerned {
		err = cmp.Or(err, c.mayGrant(a.Capabilities))
	}
	if err != nil {
		return nil, err
	}
	rows, _ = tx.Query(ctx, revokeCredentials+`client_id = any($1) and workload ->> 'issuer' = $2 and status = 'active'
		returning client_id::text, credential_id::text`, agents, issuer)
	var agentID, credentialID string
	_, err = pgx.ForEachRow(rows, []any{&agentID, &credentialID}, func() error {
		events = append(events, newEvent(credentialRevoked, agentID, facts{"credentialId": credentialID, "workloadIssuer": issuer}))
		return nil
	})
	if err == nil && slices.ContainsFunc(concerned, manages) {
		err = wantManager(ctx, tx)
	}
	return events, err
}
