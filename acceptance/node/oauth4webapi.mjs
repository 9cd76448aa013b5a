import { importPKCS8 } from 'jose';
import * as oauth from 'oauth4webapi';
import { agent, base, bearer, bindings, end, equal, exchanges, given, refuses, resource, service, signs, tokens, works } from './check.mjs';

const http = { [oauth.allowInsecureRequests]: true };
const issuer = new URL(base);
const discover = async (algorithm) =>
	oauth.processDiscoveryResponse(issuer, await oauth.discoveryRequest(issuer, { algorithm, ...http }));

for (const algorithm of ['oauth2', 'oidc']) {
	await works(`discovers the service, by ${algorithm}`, async () => {
		const as = await discover(algorithm);
		equal('token_endpoint', as.token_endpoint, `${base}/api/v1/token`);
	});
}
await refuses(
	'an issuer with a slash at the end',
	async () =>
		oauth.processDiscoveryResponse(new URL(`${base}/x`), await oauth.discoveryRequest(issuer, { algorithm: 'oauth2', ...http })),
	(err) => err.code === oauth.JSON_ATTRIBUTE_COMPARISON,
);

const as = await discover('oauth2');
const me = { client_id: agent.id };
const grant = async (secret, parameters = {}) =>
	oauth.processClientCredentialsResponse(
		as,
		me,
		await oauth.clientCredentialsGrantRequest(as, me, oauth.ClientSecretBasic(secret), parameters, http),
	);
const token = await works('gets a token', async () => {
	const got = await grant(agent.secret, { scope: 'resumes:read', resource });
	equal('token_type', got.token_type, 'bearer');
	equal('expires_in', got.expires_in, 3600);
	return got.access_token;
});
await works('sees the types of RFC 6749, which it would convert', async () => {
	const answer = await oauth.clientCredentialsGrantRequest(as, me, oauth.ClientSecretBasic(agent.secret), {}, http);
	const body = await answer.json();
	for (const [name, type] of Object.entries({ access_token: 'string', token_type: 'string', expires_in: 'number', scope: 'string' })) {
		equal(`the type of ${name}`, typeof body[name], type);
	}
});
await refuses(
	'a wrong secret, with a challenge',
	() => grant(service.secret),
	(err) =>
		err instanceof oauth.WWWAuthenticateChallengeError &&
		err.status === 401 &&
		err.cause[0].scheme === 'basic' &&
		err.cause[0].parameters.error === 'invalid_client',
);

const asked = { client_id: service.id };
const introspect = async (token) =>
	oauth.processIntrospectionResponse(
		as,
		asked,
		await oauth.introspectionRequest(as, asked, oauth.ClientSecretBasic(service.secret), token, http),
	);
await works('introspects', async () => equal('active', (await introspect(token)).active, true));
await works('is told that a revoked token is inactive', async () => equal('active', (await introspect(tokens.revoked)).active, false));
await works('revokes', async () => {
	await oauth.processRevocationResponse(await oauth.revocationRequest(as, me, oauth.ClientSecretPost(agent.secret), token, http));
	equal('active', (await introspect(token)).active, false);
});

// As a resource server, by RFC 9068.
const validate = (token) =>
	oauth.validateJwtAccessToken(as, new Request(resource, { headers: bearer(token) }), resource, { ...http });
await works('validates a good token', () => validate(tokens.good));
await works('validates one that only we signed, as a control', () => validate(tokens.forged));
for (const [what, bad, code] of [
	['an expired token', tokens.expired, oauth.JWT_TIMESTAMP_CHECK],
	['a wrong issuer', tokens.wrongIssuer, oauth.JWT_CLAIM_COMPARISON],
	['a wrong audience', tokens.wrongAudience, oauth.JWT_CLAIM_COMPARISON],
	['a wrong key', tokens.wrongKey, oauth.INVALID_RESPONSE],
	['an unknown key', tokens.unknownKey, oauth.KEY_SELECTION],
	['a wrong type', tokens.wrongType, oauth.INVALID_RESPONSE],
	['a changed scope', tokens.tampered, oauth.INVALID_RESPONSE],
]) {
	await refuses(
		what,
		() => validate(bad),
		(err) => err.code === code || err.cause?.[0]?.parameters?.error === 'invalid_token',
	);
}

// As a client of the service's own API, which is a protected resource too.
await works('finds the metadata of the API, by RFC 9728', async () => {
	const found = await oauth.processResourceDiscoveryResponse(issuer, await oauth.resourceDiscoveryRequest(issuer, http));
	equal('authorization_servers', found.authorization_servers[0], base);
});
await works('calls the API', async () => {
	const { access_token } = await grant(agent.secret);
	const answer = await oauth.protectedResourceRequest(access_token, 'GET', new URL(`${base}/api/v1/agents`), undefined, undefined, http);
	equal('the status', answer.status, 200);
});
await refuses(
	'a revoked token at the API, with a challenge',
	() => oauth.protectedResourceRequest(token, 'GET', new URL(`${base}/api/v1/agents`), undefined, undefined, http),
	(err) =>
		err instanceof oauth.WWWAuthenticateChallengeError &&
		err.cause[0].scheme === 'bearer' &&
		err.cause[0].parameters.error === 'invalid_token' &&
		err.cause[0].parameters.resource_metadata === `${given.base}/.well-known/oauth-protected-resource`,
);

const party = (who) => {
	const me = { client_id: who.id };
	const auth = oauth.ClientSecretPost(who.secret);
	return {
		token: async (parameters, DPoP) => {
			const answer = await oauth.clientCredentialsGrantRequest(as, me, auth, parameters, { DPoP, ...http });
			return (await oauth.processClientCredentialsResponse(as, me, answer)).access_token;
		},
		trade: async (grant, parameters, DPoP) => {
			const answer = await oauth.genericTokenEndpointRequest(as, me, auth, grant, parameters, { DPoP, ...http });
			return oauth.processGenericTokenEndpointResponse(as, me, answer);
		},
		read: async (token) =>
			oauth.processIntrospectionResponse(as, me, await oauth.introspectionRequest(as, me, auth, token, http)),
		revoke: async (token) => oauth.processRevocationResponse(await oauth.revocationRequest(as, me, auth, token, http)),
	};
};
await exchanges(party, { 'RFC 9068': validate });

// By keys, whose assertions have no typ here.
await signs(
	async (who, pem, claims) => {
		const me = { client_id: who.id };
		const modify = { [oauth.modifyAssertion]: (_header, payload) => Object.assign(payload, claims) };
		const auth = oauth.PrivateKeyJwt(await importPKCS8(pem, who.alg), modify);
		return {
			token: async () => {
				const answer = await oauth.clientCredentialsGrantRequest(as, me, auth, { scope: 'resumes:read', resource }, http);
				return (await oauth.processClientCredentialsResponse(as, me, answer)).access_token;
			},
			active: async (token) =>
				(await oauth.processIntrospectionResponse(as, me, await oauth.introspectionRequest(as, me, auth, token, http))).active,
			revoke: async (token) => oauth.processRevocationResponse(await oauth.revocationRequest(as, me, auth, token, http)),
		};
	},
	async (err) => (await err.response.json()).error_description,
);

// Tokens that are bound to a key (RFC 9449), as a client and as a resource server.
const handle = async (alg) => oauth.DPoP(me, await oauth.generateKeyPair(alg, { extractable: true }));
const bind = async (DPoP, parameters) =>
	oauth.processClientCredentialsResponse(
		as,
		me,
		await oauth.clientCredentialsGrantRequest(as, me, oauth.ClientSecretBasic(agent.secret), parameters, { DPoP, ...http }),
	);
const agents = new URL(`${base}/api/v1/agents`);
const list = (token, options) => oauth.protectedResourceRequest(token, 'GET', agents, undefined, undefined, { ...options, ...http });
// sent makes a request, and keeps what was sent.
const sent = async (token, url, DPoP) => {
	let request;
	const capture = async (url, options) => {
		request = new Request(url, { headers: options.headers, method: options.method });
		return new Response('{}');
	};
	await oauth.protectedResourceRequest(token, 'GET', url, undefined, undefined, { DPoP, [oauth.customFetch]: capture, ...http });
	return request;
};
const challenged = (error) => (err) =>
	err instanceof oauth.WWWAuthenticateChallengeError && err.status === 401 && err.cause[0].scheme === 'dpop' && err.cause[0].parameters.error === error;
await works('finds that proofs are taken', async () => {
	const found = await oauth.processResourceDiscoveryResponse(issuer, await oauth.resourceDiscoveryRequest(issuer, http));
	for (const alg of ['RS256', 'PS256', 'ES256', 'EdDSA', 'Ed25519']) {
		equal(`that ${alg} is taken at /token`, as.dpop_signing_alg_values_supported?.includes(alg), true);
		equal(`that ${alg} is taken at the API`, found.dpop_signing_alg_values_supported?.includes(alg), true);
	}
});
for (const alg of ['RS256', 'PS256', 'ES256', 'Ed25519']) {
	await works(`has a token bound to a key of ${alg}, and uses it`, async () => {
		const DPoP = await handle(alg);
		const got = await bind(DPoP, { scope: 'agents:read' });
		equal('token_type', got.token_type, 'dpop');
		equal('the status', (await list(got.access_token, { DPoP })).status, 200);
		equal('the status once more', (await list(got.access_token, { DPoP })).status, 200);
		const is = await introspect(got.access_token);
		equal('cnf.jkt', is.cnf.jkt, await DPoP.calculateThumbprint());
	});
}
const DPoP = await handle('ES256');
const { access_token: bound } = await bind(DPoP, { scope: 'agents:read' });
await refuses('a stolen token by Bearer', () => list(bound), challenged('invalid_token'));
await refuses('a stolen token with a proof of another key', async () => list(bound, { DPoP: await handle('ES256') }), (err) =>
	challenged('invalid_token')(err) || challenged('invalid_dpop_proof')(err));
await refuses('a token that is not bound, by DPoP', async () => list((await grant(agent.secret)).access_token, { DPoP }), (err) =>
	err instanceof oauth.WWWAuthenticateChallengeError && err.cause[0].parameters.error === 'invalid_token');
await works('is answered once for a proof', async () => {
	const { headers } = await sent(bound, agents, DPoP);
	equal('the status', (await fetch(agents, { headers })).status, 200);
	const again = await fetch(agents, { headers });
	equal('the status of a replay', again.status, 401);
	equal('that the challenge says it', /^DPoP .*error="invalid_dpop_proof".*was used before/.test(again.headers.get('www-authenticate')), true);
});
const there = new URL(`${resource}/resumes`);
const { access_token: shown } = await bind(DPoP, { scope: 'resumes:read', resource });
const judge = (request) => oauth.validateJwtAccessToken(as, request, resource, { ...http });
await works('validates a bound token with its proof', async () => {
	const claims = await judge(await sent(shown, there, DPoP));
	equal('cnf.jkt', claims.cnf.jkt, await DPoP.calculateThumbprint());
});
for (const [what, request] of [
	['a bound token by Bearer', new Request(there, { headers: bearer(shown) })],
	['a bound token with a proof of another key', await sent(shown, there, await handle('ES256'))],
	['a bound token with a proof for another URL', new Request(there, { headers: (await sent(shown, new URL(`${resource}/scores`), DPoP)).headers })],
]) {
	await refuses(`${what}, as a resource server`, () => judge(request), (err) =>
		[oauth.INVALID_RESPONSE, oauth.JWT_CLAIM_COMPARISON, oauth.INVALID_REQUEST].includes(err.code));
}
await bindings(party, () => handle('ES256'));
end();
