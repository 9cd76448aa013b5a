package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// A client without a secret proves itself by an assertion: a JWT that it has signed
// with a key of its own, of which we have the public half (RFC 7523, section 2.2;
// OpenID Connect Core, section 9, calls it private_key_jwt).

const (
	assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	maxKeysTried  = 5  // where the assertion doesn't say which
	maxKnown      = 64 // keys of a client, those that live longest, and credentials of one workload
)

// checkAssertion returns whose key has signed it. It is good once, on all copies.
func (s *server) checkAssertion(r *request, a assertion) (o client, err error) {
	o.AgentID = a.sub // for the log
	if err = a.check(s.now(), assertionLife, []string{"JWT", "client-authentication+jwt"}, []string{s.cfg.issuer}, "iss", "sub", "jti"); err != nil {
		return o, err
	}
	if a.issuer != a.sub {
		return o, flaw("must have the client_id as both iss and sub")
	}
	if id := r.form.Get("client_id"); id != "" && id != a.sub {
		return o, flaw("must have the client_id of the form as its sub")
	}
	if !isID(a.sub) {
		return o, errBadAssertion
	}
	clients, err := s.signers.put(r.Context(), shown{clientID: a.sub, kid: a.kid, use: a.useID()}).wait()
	if err != nil {
		return o, err
	}
	i := slices.IndexFunc(clients, func(o client) bool { return o.key.verifies(a) })
	if i < 0 {
		return o, errBadAssertion
	}
	return accept(clients[i], a, true)
}

// accept is the client that showed an assertion, unless it may do nothing or used it before.
func accept(o client, a assertion, once bool) (client, error) {
	switch {
	case o.refusal() != nil:
		return o, o.refusal()
	case once && o.used:
		return o, replayed
	case once:
		o.use = use{id: a.useID(), end: a.exp}
	}
	return o, nil
}

// A shown is what is looked up of an assertion: of a client's own the key that kid
// names, by its own name or its thumbprint, or the newest where it is ""; of a workload
// its issuer and subject, and the client that was chosen or ""; and by what id it is
// remembered if it was used.
type shown struct{ clientID, kid, issuer, subject, use string }

// loadSigners returns of each who may have signed it, by the newest credential first.
func loadSigners(ctx context.Context, db querier, list []shown) ([][]client, error) {
	var ids, kids, issuers, subjects, uses []string
	for _, x := range list {
		ids, kids, issuers = append(ids, x.clientID), append(kids, x.kid), append(issuers, x.issuer)
		subjects, uses = append(subjects, x.subject), append(uses, x.use)
	}
	rows, _ := db.Query(ctx, `
		with shown as materialized (
			select *, coalesce((select true from token_revocations where jti = use), false) as used -- exists might read all of them
			from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::uuid[]) with ordinality as shown (id, kid, issuer, subject, use, i))
		select shown.i, shown.used, own.*
		from shown
		cross join lateral (
			select `+clientColumns+`, c.public_key, '{}'::json
			from agents a
			cross join lateral (
				select * from credentials
				where client_id = a.agent_id and kind = 'key' and status = case a.status when 'decommissioned' then 'revoked' else 'active' end
				order by coalesce(expires_at, 'infinity') desc, credential_id desc -- as the index has it
				limit $7) as c
			where a.agent_id = nullif(shown.id, '')::uuid and (c.status = 'revoked' or c.expires_at is null or c.expires_at > clock_timestamp())
				and shown.kid in ('', c.key_thumbprint, c.public_key ->> 'kid')
			order by c.credential_id desc
			limit $6) as own
		where shown.issuer = ''
		union all
		select shown.i, shown.used, theirs.*
		from shown
		cross join lateral (
			select `+clientColumns+`, '{}'::json, coalesce(c.workload -> 'claims', '{}')
			from credentials c
			join agents a on a.agent_id = c.client_id
			where c.workload ->> 'subject' = shown.subject and c.workload ->> 'issuer' = shown.issuer and shown.id in ('', c.client_id::text)
				and c.status = 'active' and (c.expires_at is null or c.expires_at > clock_timestamp())
			order by c.credential_id desc
			limit $7 + 1) as theirs
		where shown.issuer <> ''
		order by i, credential_id desc`,
		ids, kids, issuers, subjects, uses, maxKeysTried, maxKnown)
	var o client
	var i int
	clients := make([][]client, len(list))
	_, err := pgx.ForEachRow(rows, slices.Concat([]any{&i, &o.used}, o.columns(), []any{&o.key, &o.claims}), func() error {
		clients[i-1] = append(clients[i-1], o)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("loading who may have signed: %w", err)
	}
	return clients, nil
}
