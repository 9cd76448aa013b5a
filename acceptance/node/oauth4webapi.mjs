import { importPKCS8 } from 'jose';
import * as oauth from 'oauth4webapi';
import { agent, base, bearer, end, equal, exchanges, given, refuses, resource, service, signs, tokens, works } from './check.mjs';

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

await exchanges(
	(who) => {
		const me = { client_id: who.id };
		const auth = oauth.ClientSecretPost(who.secret);
		return {
			token: async (parameters) =>
				(await oauth.processClientCredentialsResponse(as, me, await oauth.clientCredentialsGrantRequest(as, me, auth, parameters, http)))
					.access_token,
			trade: async (grant, parameters) =>
				oauth.processGenericTokenEndpointResponse(
					as,
					me,
					await oauth.genericTokenEndpointRequest(as, me, auth, grant, parameters, http),
				),
			read: async (token) =>
				oauth.processIntrospectionResponse(as, me, await oauth.introspectionRequest(as, me, auth, token, http)),
			revoke: async (token) => oauth.processRevocationResponse(await oauth.revocationRequest(as, me, auth, token, http)),
		};
	},
	{ 'RFC 9068': validate },
);

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
end();
