package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
)

// A spire is an agent of SPIFFE: the Workload API, on a socket, for one workload.
type spire struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	mint
	domain spiffeid.TrustDomain
	id     spiffeid.ID
}

// claims are those that the JWT-SVID standard wants, and iat.
func (s *spire) claims(audience any) map[string]any {
	now := time.Now().Unix()
	return map[string]any{"sub": s.id.String(), "aud": audience, "iat": now, "exp": now + 300}
}

func (s *spire) FetchJWTSVID(_ context.Context, q *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	token, err := s.sign(s.claims(q.Audience))
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: s.id.String(), Svid: token}}}, err
}

func (s *spire) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{s.public}})
	if err == nil {
		err = stream.Send(&workload.JWTBundlesResponse{Bundles: map[string][]byte{s.domain.IDString(): keys}})
	}
	if err == nil {
		<-stream.Context().Done()
	}
	return err
}

// trySPIFFE has go-spiffe fetch JWT-SVIDs and their bundle, which it verifies too.
func trySPIFFE(ctx context.Context, w *world, c client) {
	m, err := newMint(jose.ES256, "svid-1")
	other, otherErr := newMint(jose.ES256, "svid-1")
	id, idErr := spiffeid.FromString("spiffe://example.org/ns/hiring/sa/screener")
	address := filepath.Join(w.dir, "workload.sock")
	listener, listenErr := net.Listen("unix", address)
	if err := errors.Join(err, otherErr, idErr, listenErr); err != nil {
		c.checked("has a Workload API", err)
		return
	}
	s := &spire{mint: m, domain: id.TrustDomain(), id: id}
	server := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(server, s)
	go server.Serve(listener)
	defer server.Stop()
	source, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+address))
	if err != nil {
		c.checked("reaches the Workload API", err)
		return
	}
	defer source.Close()
	bundles, err := source.FetchJWTBundles(ctx)
	var keys []byte
	if err == nil {
		var bundle *jwtbundle.Bundle
		if bundle, err = bundles.GetJWTBundleForTrustDomain(s.domain); err == nil {
			keys, err = bundle.Marshal()
		}
	}
	if !c.checked("fetches the bundle of the trust domain", err) {
		return
	}
	issuer := s.domain.IDString()
	base, err := w.trusting(ctx, "spiffe", map[string]any{issuer: map[string]any{"jwks": json.RawMessage(keys)}})
	if err != nil {
		c.checked("is trusted", err)
		return
	}
	agentID, err := w.workload(ctx, base, map[string]any{"issuer": issuer, "subject": id.String()})
	if !c.checked("has an agent", err) {
		return
	}
	token := func() (string, error) {
		svid, err := source.FetchJWTSVID(ctx, jwtsvid.Params{Audience: w.base})
		if err == nil {
			svid, err = jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{w.base})
		}
		if err != nil {
			return "", err
		}
		return svid.Marshal(), nil
	}
	bad, err := m.bads(s.claims(w.base), map[string]map[string]any{
		"another workload of the trust domain: no active credential": {"sub": "spiffe://example.org/ns/hiring/sa/other"},
		"a path below: no active credential":                         {"sub": id.String() + "/worker"},
		"another trust domain with the same key":                     {"sub": "spiffe://example.org.evil/ns/hiring/sa/screener"},
		"a trust domain in other letters":                            {"sub": "spiffe://EXAMPLE.org/ns/hiring/sa/screener"},
		"the trust domain as its iss, and a foreign sub: no active":  {"iss": issuer, "sub": "spiffe://example.com/ns/hiring/sa/screener"},
		"an SVID for another service: must have":                     {"aud": resource},
		"an SVID for two: must have":                                 {"aud": []string{w.base, resource}},
		"an expired SVID: exp":                                       {"iat": time.Now().Unix() - 600, "exp": time.Now().Unix() - 300},
	})
	if err == nil {
		bad["what another key signed: is not signed by a key of its issuer"], err = other.sign(s.claims(w.base))
	}
	if err != nil {
		c.checked("has SVIDs to refuse", err)
		return
	}
	vouched{base, issuer, agentID, token, false, []string{jwtAssertion, spiffeAssertion}}.passes(ctx, w, c, bad)
}
