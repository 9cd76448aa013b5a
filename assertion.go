package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// A client without a secret proves itself by an assertion: a JWT that it has signed
// with a key of its own, of which we have the public half (RFC 7523, section 2.2;
// OpenID Connect Core, section 9, calls it private_key_jwt).

const (
	assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	maxKeysTried  = 5 // where the assertion doesn't say which
)

// checkAssertion returns whose key has signed it. It is good once, on all copies: who
// has seen one on its way can't use it again.
func (s *server) checkAssertion(r *request, a assertion) (o client, err error) {
	err = a.check(s.now(), assertionLife, []string{"JWT", "client-authentication+jwt"}, []string{s.cfg.issuer}, "iss", "sub", "jti")
	if err != nil {
		return o, err
	}
	if a.issuer != a.sub {
		return o, flaw("must have the client_id as both iss and sub")
	}
	if id := r.form.Get("client_id"); id != "" && id != a.sub {
		return o, flaw("must have the client_id of the form as its sub")
	}
	o.AgentID = a.sub // for the log
	clients, err := loadKeys(r.Context(), s.db, a.sub, a.kid)
	if err != nil {
		return o, err
	}
	i := slices.IndexFunc(clients, func(o client) bool { return o.key.verifies(a) })
	if i < 0 {
		return o, errBadAssertion
	}
	if o = clients[i]; o.refusal() != nil {
		return o, o.refusal()
	}
	return o, s.useAssertion(r.Context(), a)
}

// useAssertion remembers it, and fails where it was used before, on any copy.
func (s *server) useAssertion(ctx context.Context, a assertion) error {
	first, err := s.used.put(ctx, use{useID(a.issuer, a.id), a.exp}).wait()
	if err == nil && !first {
		err = flaw("was used before; each needs a jti of its own")
	}
	return err
}

// loadKeys returns the client once for each key that may have signed: that
// which kid names, by its own name or its thumbprint, or the newest where it is "".
func loadKeys(ctx context.Context, db querier, clientID, kid string) (clients []client, err error) {
	if !isID(clientID) {
		return nil, nil
	}
	rows, _ := db.Query(ctx, `
		select `+clientColumns+`, c.public_key
		from credentials c
		join agents a on a.agent_id = c.client_id
		where c.client_id = $1 and c.kind = 'key' and (a.status = 'decommissioned' or
				c.status = 'active' and (c.expires_at is null or c.expires_at > clock_timestamp()))
			and ($2 = '' or c.key_thumbprint = $2 or c.public_key ->> 'kid' = $2)
		order by c.credential_id desc
		limit $3`, clientID, kid, maxKeysTried)
	var o client
	_, err = pgx.ForEachRow(rows, append(o.columns(), &o.key), func() error {
		clients = append(clients, o)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("loading keys: %w", err)
	}
	return clients, nil
}

// A use is that of an assertion, remembered until it is of no use.
type use struct {
	id  string
	end time.Time
}

// useID makes an id of what tells assertions apart: a UUID of version 8 (RFC 9562,
// section 5.8), which no jti of ours is.
func useID(issuer, jti string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d:%s%s", len(issuer), issuer, jti))
	return uuid([16]byte(sum[:16]), 8)
}

// useOnce tells of each whether it is the first of its id, on any copy; it is from
// then on no more. They lie with the ids of revoked tokens: both are good no more
// until they would have expired anyway.
func useOnce(ctx context.Context, db querier, uses []use) ([]bool, error) {
	ids, ends, at := make([]string, len(uses)), make([]time.Time, len(uses)), map[string]int{}
	for i, u := range slices.Backward(uses) { // of two that come together the first
		at[u.id] = i
	}
	for i, u := range uses {
		ids[i], ends[i] = u.id, u.end.Add(time.Minute)
	}
	rows, _ := db.Query(ctx, `
		insert into token_revocations (jti, expires_at)
		select * from unnest($1::uuid[], $2::timestamptz[])
		order by 1 -- or two copies would wait for each other
		on conflict (jti) do nothing
		returning jti::text`, ids, ends)
	stored, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("remembering assertions: %w", err)
	}
	first := make([]bool, len(uses))
	for _, id := range stored {
		first[at[id]] = true
	}
	return first, nil
}
