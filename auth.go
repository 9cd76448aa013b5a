package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// bearer lets in who has a token that carries scope; and the agent of the path
// itself if its token carries one of own, where "" is always there.
func (s *server) bearer(scope string, own ...string) func(*request) error {
	return func(r *request) error {
		if err := s.identify(r); err != nil {
			return err
		}
		lacks, window, mayChange := r.caller.need(scope), byToken, toChange
		if self := r.caller.AgentID == r.PathValue("agentId"); self && slices.ContainsFunc(own, r.caller.has) {
			lacks, mayChange = nil, ofOneself
		} else if self && len(own) > 0 && lacks != nil {
			lacks = r.caller.need(own[0]) // the lesser of the two
		}
		if lacks == nil && r.route.records != "" {
			window = mayChange
		}
		if _, err := s.spend(r, r.caller, window, ""); err != nil {
			return err
		}
		return lacks
	}
}

// bearerOrClient lets in who has a token that carries scope, and who
// authenticates as a client that holds it; "" is always there. A client that
// proved itself can always revoke: no limit is in the way.
func (s *server) bearerOrClient(scope string) func(*request) error {
	return func(r *request) (err error) {
		revokes := r.route.records == tokenRevoked
		switch {
		case !r.presentsToken():
			if err = s.authenticateClient(r); err == nil && !revokes {
				_, err = s.spend(r, r.caller, introspect+byCredential, "")
			}
		case r.form.Get("client_secret") != "" || showsAssertion(r.form):
			err = errTwoMethods
		default:
			if err = s.identify(r); err != nil {
				break
			}
			window := introspect + byToken
			if revokes || r.caller.need(scope) != nil { // who may not introspect leaves those alone who may
				window = byToken
			}
			_, err = s.spend(r, r.caller, window, "")
		}
		if err == nil {
			err = r.caller.need(scope)
		}
		if err == nil && r.form.Get("token") == "" {
			err = errForm.because("The body lacks token=TOKEN, the one that this is about.")
		}
		return err
	}
}

// identify finds out who sent a token (RFC 6750, section 2.1; RFC 9449, section 7.1), that
// it is for this service, valid now, its holder's, and alive.
func (s *server) identify(r *request) error {
	_, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	token = strings.TrimLeft(token, " ")
	if !r.presentsToken() {
		return errNoToken
	}
	if secret(token).wellFormed() {
		return errInvalidToken.because("This is a client_secret, and no token; trade it for one at POST /api/v1/token.")
	}
	c, err := s.readToken(token)
	switch {
	case err != nil:
	case c.Actor != nil || c.Chain != nil:
		err = errors.New("a token of one that acts for another, and such is never for AgentIdP; come with one of your own")
	case !slices.Contains(c.Audience, s.cfg.issuer):
		err = fmt.Errorf("a token for %s; ask for one without resource, or for %s too", clip(strings.Join(c.Audience, " ")), s.cfg.issuer)
	}
	if err != nil {
		return errInvalidToken.because("This is " + err.Error() + ".")
	}
	found := caller{origin: c.origin(), scopes: strings.Fields(c.Scope), until: c.Expires}
	if found.proof, err = s.prove(r, token, c); err == nil {
		err = s.checkAlive(r.Context(), &found)
	}
	if err == nil {
		r.caller = found
	}
	return err
}

// readToken reads a token of ours that is valid now; else its error tells the holder what
// it is.
func (s *server) readToken(text string) (claims, error) {
	c, err := s.keys.Load().verify(text, s.cfg.issuer)
	if err == nil {
		err = c.validAt(s.now())
	}
	return c, err
}

// spend counts the request of an authenticated caller, or of whom it brings along, in
// the window that it belongs to, and where month isn't empty for its client's quota;
// counted says whether the latter has to be given back if nothing comes of it. A quota
// that Redis doesn't know is counted from the audit log. With that the proof that came
// along is used up.
func (s *server) spend(r *request, c caller, window, month string) (counted bool, err error) {
	owner, limit, quota, proof := window+c.AgentID, *cmp.Or(c.RateLimit, &s.cfg.rateLimit), s.quotaOf(c), r.caller.proof
	v := s.admit(r.Context(), owner, limit, month, quota, -1, proof)
	if v.state == "uncounted" {
		var n int64
		err = s.db.QueryRow(r.Context(), `
			select count(*)
			from audit_events
			where agent_id = $1 and action = 'token.issued' and outcome = 'success'
				and "timestamp" >= date_trunc('month', now(), 'UTC')`, c.AgentID).Scan(&n)
		if err != nil {
			return false, fmt.Errorf("counting this month's tokens: %w", err)
		}
		v = s.admit(r.Context(), owner, limit, month, quota, n, proof)
	}
	v.setHeaders(r.out)
	r.caller.proof.kept = v.state == "admitted" || v.state == "spent"
	if v.state == "unlimited" && proof.key() != "" {
		if v.state, err = s.storeProof(r.Context(), proof); err != nil {
			return false, err
		}
	}
	switch v.state {
	case "used":
		r.caller.proof = shownProof{}
		if r.caller.TokenID == "" { // a client, whose window nobody else spends
			_, err = s.spend(r, r.caller, window, "")
		}
		return false, cmp.Or(err, proof.again)
	case "limited":
		s.meter.add(1, "agentidp_limit_rejections_total", `limit="client"`)
		return false, errRateLimited
	case "spent":
		s.meter.add(1, "agentidp_limit_rejections_total", `limit="quota"`)
		return false, errQuota.because(fmt.Sprintf("The monthly quota of %d tokens is spent. It resets at %s.",
			quota, moment{nextMonth(s.now())}))
	}
	return v.state == "admitted" && month != "", nil
}

// inTurn has one client's requests handled one after the other: any of these may take long,
// and the connections are everyone's.
func (s *server) inTurn(handle func(*request) (any, error)) func(*request) (any, error) {
	return func(r *request) (any, error) {
		lane := s.listing.of(r.caller.AgentID)
		if err := lane.enter(r.Context()); err != nil {
			return nil, err
		}
		defer lane.leave()
		return handle(r)
	}
}

// authenticateClient is the only way from a request to the client that sent
// it: by HTTP Basic, or client_id and client_secret in the form (RFC 6749,
// section 2.3.1); or by an assertion (assertion.go).
//
// A client that is known to be right costs one query. All others are first
// counted as a failure of their address, so that no burst gets through to
// bcrypt or the audit log, and are given that back if they turn out right.
// Bcrypt isn't run for what would be refused anyway: the prefix of a secret that
// has ended is known to many.
func (s *server) authenticateClient(r *request) error {
	if showsAssertion(r.form) || s.tradesAssertion(r) {
		return s.authenticateByAssertion(r)
	}
	id, plain, err := clientSecret(r)
	if err != nil {
		return err
	}
	var o client
	if isID(id) && plain.wellFormed() {
		if o, err = s.lookups.put(r.Context(), secretKey{id, plain.prefix()}).wait(); err != nil {
			return err
		}
	}
	right := s.vault.known(o.hash, plain)
	if right && o.refusal() == nil {
		s.meter.add(1, "agentidp_secret_comparisons_total", `kind="warm"`)
		r.caller = o.caller
		return nil
	}
	address := addressKey(r.addr)
	v, err := s.admitFailure(r.Context(), address, r.out)
	if err != nil {
		return err
	}
	if !right && o.hash != "" && !o.ended {
		s.meter.add(1, "agentidp_secret_comparisons_total", `kind="cold"`)
		if right, err = s.vault.compare(r.Context(), address, o.hash, plain); err != nil {
			return err
		}
	}
	if right && o.refusal() == nil {
		if v.state == "admitted" {
			s.redis.giveBack(r.Context(), fmt.Sprintf("rate:%s:%d", address, v.now/60000))
		}
		r.caller = o.caller
		return nil
	}
	why := errBadClient
	if right {
		why = o.refusal()
	}
	return s.refused(r, newEvent(authFailed, id, facts{"reason": why.oauth}), why)
}

// showsAssertion tells whether the client means to prove itself by one.
func showsAssertion(form url.Values) bool {
	return form.Get("client_assertion") != "" || form.Get("client_assertion_type") != ""
}

// tradesAssertion tells whether it has an assertion of a workload for its grant,
// which proves who it is too (RFC 7523, section 3.1).
func (s *server) tradesAssertion(r *request) bool {
	return r.form.Get("grant_type") == jwtBearerGrant && r.route.records == tokenIssued && len(*s.issuers.Load()) > 0
}

// authenticateByAssertion takes an assertion in place of a secret. Whatever is wrong
// with it counts as a failure of its address. Of an address that is over its limit
// one at a time is looked at, few wait, and the rest is refused: so a right one still
// has its chance, and wrong ones take neither places nor cores from others.
func (s *server) authenticateByAssertion(r *request) error {
	text, kind, name := r.form.Get("client_assertion"), r.form.Get("client_assertion_type"), "client_assertion"
	asGrant, bad := s.tradesAssertion(r), errBadAssertion
	if asGrant {
		text, name, bad = r.form.Get("assertion"), "assertion", errBadGrant
	}
	switch {
	case r.form.Get("client_secret") != "" || r.Header.Get("Authorization") != "" || asGrant && showsAssertion(r.form):
		return errTwoMethods
	case asGrant && text == "":
		return errForm.because("There must be an assertion, which is what this grant_type trades.")
	case !asGrant && (text == "" || kind != assertionType && kind != spiffeAssertion):
		return errForm.because("There must be both client_assertion and client_assertion_type=" + assertionType + ".")
	}
	leave, err := s.enterLane(r)
	if err != nil {
		return err
	}
	defer leave()
	o, err := s.clientOf(r, text, asGrant || kind == spiffeAssertion)
	saying := func(f flaw) *problem { return bad.because("The " + name + " " + string(f) + ".") }
	if fault, ok := errors.AsType[flaw](err); ok {
		err = saying(fault)
	}
	why, refused := errors.AsType[*problem](err)
	switch {
	case err == nil:
		r.caller = o.caller
		r.caller.use.again, r.caller.use.over = saying(replayed), saying("was good, and is cut off since") // by what comes at the same time
		return nil
	case !refused || why.status == http.StatusServiceUnavailable: // a fault
		return err
	}
	if _, err := s.admitFailure(r.Context(), addressKey(r.addr), r.out); err != nil {
		return err
	}
	f := facts{"reason": why.oauth}
	if o.proved != nil {
		f["workload"] = o.proved
	}
	return s.refused(r, newEvent(authFailed, o.AgentID, f), why)
}

// clientOf finds whose assertion this is. Of copies that come at the same time this copy
// of the program lets one in, before it looks up whether that was used: or another would
// spend the window of its client.
func (s *server) clientOf(r *request, text string, ofWorkload bool) (o client, err error) {
	a, err := readAssertion(text)
	if err != nil {
		return o, err
	}
	issuers := *s.issuers.Load()
	trusted := issuers[a.issuer]
	if trusted == nil && (ofWorkload || len(issuers) > 0 && !isID(a.issuer)) {
		return o, flaw("must be of an issuer that is trusted here")
	}
	if trusted == nil || trusted.SingleUse {
		if _, twice := s.inUse.LoadOrStore(text, true); twice {
			return o, replayed
		}
		r.inUse = text
	}
	if trusted != nil {
		return s.checkWorkload(r, trusted, a, s.tradesAssertion(r))
	}
	return s.checkAssertion(r, a)
}

const maxInRoom = 16

// enterLane waits for an address that is over its limit, or refuses where too many do.
func (s *server) enterLane(r *request) (leave func(), err error) {
	address := addressKey(r.addr)
	last, found := s.limited.get(sha256.Sum256([]byte(address)))
	if !found || time.Now().After(last.until) {
		return func() {}, nil
	}
	room, lane := s.rooms.of(address), s.lanes.of(address)
	select {
	case room <- struct{}{}:
	default:
		last.setHeaders(r.out)
		s.meter.add(1, "agentidp_limit_rejections_total", `limit="address"`)
		return nil, errAddressLimited
	}
	if err := lane.enter(r.Context()); err != nil {
		room.leave()
		return nil, err
	}
	return func() { lane.leave(); room.leave() }, nil
}

// clientSecret finds the one client_id and secret in a request.
func clientSecret(r *request) (id string, plain secret, err error) {
	id, plain = r.form.Get("client_id"), secret(r.form.Get("client_secret"))
	header := r.Header.Get("Authorization")
	if header == "" {
		if plain == "" && strings.Contains(r.URL.RawQuery, "client_secret=") {
			return "", "", errNoClient.because("The client_secret is in the URL, which proxies log: rotate it, and send it by HTTP Basic or in the body.")
		}
		if plain == "" {
			return "", "", errNoClient
		}
		return id, plain, nil
	}
	scheme, encoded, _ := strings.Cut(header, " ")
	if plain != "" {
		return "", "", errTwoMethods
	}
	if !strings.EqualFold(scheme, "Basic") {
		return "", "", errNoClient
	}
	decoded, err := base64.StdEncoding.DecodeString(strings.TrimLeft(encoded, " "))
	user, password, _ := strings.Cut(string(decoded), ":")
	// Each half is form-encoded (RFC 6749, section 2.3.1). Ids and secrets
	// have no character that clients which forget it would send differently.
	user, userErr := url.QueryUnescape(user)
	password, passwordErr := url.QueryUnescape(password)
	if err != nil || userErr != nil || passwordErr != nil {
		return "", "", errNoClient.because("After Basic there must be base64 of client_id:client_secret, each form-encoded.")
	}
	if id != "" && id != user {
		return "", "", errTwoMethods.because("The client_id in the form is not that of the Authorization header.")
	}
	return user, secret(password), nil
}

// A secretKey is what a secret is looked up by.
type secretKey struct{ clientID, prefix string }

// loadSecretOwners looks up secrets that are shown at the same time. An owner is
// zero where there is none.
func loadSecretOwners(ctx context.Context, db querier, shown []secretKey) ([]client, error) {
	prefixes, owners, found := make([]string, len(shown)), make([]client, len(shown)), map[secretKey]client{}
	for i, key := range shown {
		prefixes[i] = key.prefix
	}
	rows, _ := db.Query(ctx, `
		select `+clientColumns+`, c.secret_prefix, c.secret_hash
		from credentials c
		join agents a on a.agent_id = c.client_id
		where c.secret_prefix = any($1) and c.kind = 'secret'`, prefixes)
	var o client
	var prefix string
	_, err := pgx.ForEachRow(rows, append(o.columns(), &prefix, &o.hash), func() error {
		found[secretKey{o.AgentID, prefix}] = o
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("loading credentials: %w", err)
	}
	for i, key := range shown {
		owners[i] = found[key]
	}
	return owners, nil
}
