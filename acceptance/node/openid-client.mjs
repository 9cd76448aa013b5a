import { importPKCS8 } from 'jose';
import * as client from 'openid-client';
import { agent, base, bindings, end, equal, exchanges, refusedAs, refuses, resource, service, signs, tokens, works } from './check.mjs';

const options = { execute: [client.allowInsecureRequests] }; // http
const discover = (who, authentication, more) =>
	client.discovery(new URL(base), who.id, undefined, authentication(who.secret), { ...options, ...more });

for (const [name, authentication] of [
	['Basic', client.ClientSecretBasic],
	['the form', client.ClientSecretPost],
]) {
	for (const algorithm of ['oauth2', 'oidc']) {
		await works(`discovers the service, by ${algorithm} and ${name}`, async () => {
			const config = await discover(agent, authentication, { algorithm });
			equal('the issuer', config.serverMetadata().issuer, base);
		});
	}
	await works(`gets a token, by ${name}`, async () => {
		const config = await discover(agent, authentication);
		const got = await client.clientCredentialsGrant(config, { scope: 'resumes:read resumes:write', resource });
		equal('token_type', got.token_type, 'bearer');
		equal('expires_in', got.expires_in, 3600);
		equal('expiresIn()', got.expiresIn() > 3500, true);
		equal('scope', got.scope, 'resumes:read');
	});
	await refuses(
		`a wrong secret, by ${name}`,
		async () => client.clientCredentialsGrant(await discover({ ...agent, secret: service.secret }, authentication)),
		refusedAs(401, 'invalid_client'),
	);
	await works(`introspects, by ${name}`, async () => {
		const is = await client.tokenIntrospection(await discover(service, authentication), tokens.good);
		equal('active', is.active, true);
		equal('iss', is.iss, base);
		equal('aud', is.aud, resource);
		equal('scope', is.scope, 'resumes:read');
		equal('the type of exp', typeof is.exp, 'number');
	});
	await works(`revokes, by ${name}`, async () => {
		const config = await discover(agent, authentication);
		const { access_token } = await client.clientCredentialsGrant(config);
		const asking = await discover(service, authentication);
		equal('active before', (await client.tokenIntrospection(asking, access_token)).active, true);
		await client.tokenRevocation(config, access_token);
		equal('active after', (await client.tokenIntrospection(asking, access_token)).active, false);
	});
}

const config = await discover(agent, client.ClientSecretBasic);
const asking = await discover(service, client.ClientSecretBasic);
for (const [what, token] of [
	['an expired token', tokens.expired],
	['a wrong issuer', tokens.wrongIssuer],
	['a wrong key', tokens.wrongKey],
	['a wrong type', tokens.wrongType],
	['a revoked token', tokens.revoked],
	['garbage', 'x'],
]) {
	await works(`is told that ${what} is inactive`, async () => {
		equal('the answer', JSON.stringify(await client.tokenIntrospection(asking, token)), '{"active":false}');
	});
}
await refuses('to introspect without tokens:read', () => client.tokenIntrospection(config, tokens.good), refusedAs(403, 'insufficient_scope'));
await refuses('to revoke the token of another', () => client.tokenRevocation(config, tokens.good), refusedAs(400, 'invalid_request'));
await refuses(
	'a grant that is not there',
	() => client.genericGrantRequest(config, 'urn:ietf:params:oauth:grant-type:device_code', { device_code: 'x' }),
	refusedAs(400, 'unsupported_grant_type'),
);
await refuses('a scope that it may not have', () => client.clientCredentialsGrant(config, { scope: 'payroll:read' }), refusedAs(400, 'invalid_scope'));
await refuses(
	'an issuer that is not the URL',
	() => client.discovery(new URL(base.replace('localhost', '127.0.0.1')), agent.id, agent.secret, undefined, options),
	(err) => err.code === 'OAUTH_JSON_ATTRIBUTE_COMPARISON_FAILED',
);

const party = async (who) => {
	const config = await discover(who, client.ClientSecretBasic);
	return {
		token: async (parameters, DPoP) => (await client.clientCredentialsGrant(config, parameters, { DPoP })).access_token,
		trade: (grant, parameters, DPoP) => client.genericGrantRequest(config, grant, parameters, { DPoP }),
		read: (token) => client.tokenIntrospection(config, token),
		revoke: (token) => client.tokenRevocation(config, token),
	};
};
await exchanges(party);

// By keys. The challenge of a refusal has no reason; its body does.
await signs(
	async (who, pem, claims) => {
		const key = await importPKCS8(pem, who.alg);
		const modify = { [client.modifyAssertion]: (_header, payload) => Object.assign(payload, claims) };
		const config = await discover(who, () => client.PrivateKeyJwt(key, modify));
		return {
			token: async () => (await client.clientCredentialsGrant(config, { scope: 'resumes:read', resource })).access_token,
			active: async (token) => (await client.tokenIntrospection(config, token)).active,
			revoke: (token) => client.tokenRevocation(config, token),
		};
	},
	async (err) => err.error_description ?? (await err.response.json()).error_description,
);

// Tokens that are bound to a key (RFC 9449).
const agents = new URL(`${base}/api/v1/agents`);
const list = (token, options) => client.fetchProtectedResource(config, token, agents, 'GET', undefined, undefined, options);
for (const alg of ['RS256', 'PS256', 'ES256', 'Ed25519']) {
	await works(`has a token bound to a key of ${alg}, and uses it`, async () => {
		const DPoP = client.getDPoPHandle(config, await client.randomDPoPKeyPair(alg));
		const got = await client.clientCredentialsGrant(config, { scope: 'agents:read' }, { DPoP });
		equal('token_type', got.token_type, 'dpop');
		equal('the status', (await list(got.access_token, { DPoP })).status, 200);
		equal('the status once more', (await list(got.access_token, { DPoP })).status, 200);
		const is = await client.tokenIntrospection(asking, got.access_token);
		equal('active', is.active, true);
		equal('token_type of the introspection', is.token_type, 'DPoP');
		equal('cnf.jkt', is.cnf.jkt, await DPoP.calculateThumbprint());
	});
}
const handle = async (options) => client.getDPoPHandle(config, await client.randomDPoPKeyPair('ES256'), options);
const DPoP = await handle();
const { access_token: bound } = await client.clientCredentialsGrant(config, { scope: 'agents:read' }, { DPoP });
const challenged = (...errors) => (err) => err.cause?.[0]?.scheme === 'dpop' && errors.includes(err.cause[0].parameters.error);
await refuses('a stolen token by Bearer', () => list(bound), challenged('invalid_token'));
await refuses('a stolen token with a proof of another key', async () => list(bound, { DPoP: await handle() }), challenged('invalid_token', 'invalid_dpop_proof'));
const repeating = await handle({ [client.modifyAssertion]: (_header, payload) => Object.assign(payload, { jti: 'the same' }) });
const { access_token: first } = await works('gets a token with a jti of ours', () => client.clientCredentialsGrant(config, {}, { DPoP: repeating }));
await refuses(
	'a replay at /token',
	() => client.clientCredentialsGrant(config, {}, { DPoP: repeating }),
	refusedAs(400, 'invalid_dpop_proof'),
);
await refuses('a jti at the API that was one at /token', () => list(first, { DPoP: repeating }), challenged('invalid_dpop_proof'));
for (const [what, claims] of [
	['for another URL', { htu: `${base}/api/v1/token/revoke` }],
	['for another method', { htm: 'GET' }],
	['of two minutes ago', { iat: Math.floor(Date.now() / 1000) - 120 }],
]) {
	const modified = await handle({ [client.modifyAssertion]: (_header, payload) => Object.assign(payload, claims) });
	await refuses(
		`a proof ${what}`,
		() => client.clientCredentialsGrant(config, {}, { DPoP: modified }),
		refusedAs(400, 'invalid_dpop_proof'),
	);
}
await bindings(party, handle);
end();
