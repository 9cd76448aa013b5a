import { createRemoteJWKSet, errors, importPKCS8, jwtVerify, SignJWT } from 'jose';
import { agent, base, bearer, end, equal, exchanges, keys as clients, refuses, resource, service, signs, tokens, works } from './check.mjs';
import { checker, prover } from './proof.mjs';

const keys = createRemoteJWKSet(new URL(`${base}/.well-known/jwks.json`));
const verify = (token) =>
	jwtVerify(token, keys, {
		issuer: base,
		audience: resource,
		typ: 'at+jwt',
		algorithms: ['RS256'],
		requiredClaims: ['exp', 'iat', 'sub', 'jti', 'client_id', 'scope'],
	});
const because = (type, claim) => (err) => err instanceof type && (!claim || err.claim === claim);

await works('accepts a good token', async () => {
	const { payload, protectedHeader } = await verify(tokens.good);
	equal('scope', payload.scope, 'resumes:read');
	equal('client_id', payload.client_id, payload.sub);
	equal('typ', protectedHeader.typ, 'at+jwt');
});
await works('accepts one that only we signed, as a control', () => verify(tokens.forged));
await refuses('an expired token', () => verify(tokens.expired), because(errors.JWTExpired));
await refuses('a wrong issuer', () => verify(tokens.wrongIssuer), because(errors.JWTClaimValidationFailed, 'iss'));
await refuses('a wrong audience', () => verify(tokens.wrongAudience), because(errors.JWTClaimValidationFailed, 'aud'));
await refuses('a wrong type', () => verify(tokens.wrongType), because(errors.JWTClaimValidationFailed, 'typ'));
await refuses('a wrong key', () => verify(tokens.wrongKey), because(errors.JWSSignatureVerificationFailed));
await refuses('an unknown key', () => verify(tokens.unknownKey), because(errors.JWKSNoMatchingKey));
await refuses('a changed scope', () => verify(tokens.tampered), because(errors.JWSSignatureVerificationFailed));

// As a client, with assertions made by hand.
const post = async (path, form) => {
	const answer = await fetch(`${base}/api/v1/token${path}`, { method: 'POST', body: new URLSearchParams(form) });
	const body = await answer.json();
	if (!answer.ok) throw Object.assign(new Error(body.error_description), { status: answer.status, error: body.error });
	return body;
};
const sign = async (who, pem, claims = {}, header = {}) =>
	new SignJWT({ iss: who.id, sub: who.id, aud: base, jti: crypto.randomUUID(), ...claims })
		.setProtectedHeader({ alg: who.alg, ...header })
		.setIssuedAt()
		.setExpirationTime('1m')
		.sign(await importPKCS8(pem, who.alg));
const by = async (who, pem, claims, header) => {
	const proof = async () => ({
		client_assertion_type: 'urn:ietf:params:oauth:client-assertion-type:jwt-bearer',
		client_assertion: await sign(who, pem, claims, header),
	});
	return {
		token: async () => (await post('', { grant_type: 'client_credentials', ...(await proof()) })).access_token,
		active: async (token) => (await post('/introspect', { token, ...(await proof()) })).active,
		revoke: async (token) => post('/revoke', { token, ...(await proof()) }),
	};
};
await signs(by, (err) => err.message);
const [who] = clients;
for (const typ of ['JWT', 'client-authentication+jwt']) {
	await works(`gets a token with the typ ${typ}`, async () => (await by(who, who.key, {}, { typ })).token());
}
await works('gets a token with the issuer and a slash as aud', async () => (await by(who, who.key, { aud: `${base}/` })).token());
await works('gets a token with a list of one as aud', async () => (await by(who, who.key, { aud: [base] })).token());
for (const [what, claims, header, reason] of [
	['a list of two as aud', { aud: [base, resource] }, {}, /must have the aud/],
	['another issuer as aud', { aud: resource }, {}, /must have the aud/],
	['the typ of an access token', {}, { typ: 'at+jwt' }, /must have the typ/],
	['another sub than iss', { sub: clients[1].id }, {}, /both iss and sub/],
	['the id of another client', { iss: clients[1].id, sub: clients[1].id }, {}, /No active key/],
	['a kid that is not of the client', {}, { kid: 'x' }, /No active key/],
	['no jti', { jti: undefined }, {}, /must have jti/],
]) {
	await refuses(
		what,
		async () => (await by(who, who.key, claims, header)).token(),
		(err) => err.error === 'invalid_client' && reason.test(err.message),
	);
}

// As what verifies tokens that came by exchange, which are asked for by hand.
const chain = await exchanges(
	({ id: client_id, secret: client_secret }) => {
		const ask = (path, form) => post(path, { ...form, client_id, client_secret });
		return {
			token: async (form) => (await ask('', { grant_type: 'client_credentials', ...form })).access_token,
			trade: (grant_type, form) => ask('', { grant_type, ...form }),
			read: (token) => ask('/introspect', { token }),
			revoke: (token) => ask('/revoke', { token }),
		};
	},
	{ jose: async (token) => (await verify(token)).payload },
);
const third = chain[3];
await works('accepts what has ended with its first token, as it does not ask', () => verify(third));
await refuses(
	'a token that came by exchange at another service',
	() => jwtVerify(third, keys, { issuer: base, audience: 'https://payroll.example.com' }),
	because(errors.JWTClaimValidationFailed, 'aud'),
);
await refuses(
	'another act under the signature',
	() => {
		const [header, body, signature] = third.split('.');
		const { act, ...claims } = JSON.parse(Buffer.from(body, 'base64url'));
		return verify([header, Buffer.from(JSON.stringify({ ...claims, act: act.act })).toString('base64url'), signature].join('.'));
	},
	because(errors.JWSSignatureVerificationFailed),
);

// As a holder of tokens that are bound to a key, with proofs made by hand, and as a service that checks them.
const at = { token: `${base}/api/v1/token`, agents: `${base}/api/v1/agents` };
const basic = (who) => ({ Authorization: `Basic ${btoa(`${who.id}:${who.secret}`)}` });
const bind = async (proof, parameters = {}) => {
	const body = new URLSearchParams({ grant_type: 'client_credentials', ...parameters });
	const answer = await fetch(at.token, { method: 'POST', headers: { ...basic(agent), DPoP: proof }, body });
	const got = await answer.json();
	if (!answer.ok) throw Object.assign(new Error(got.error_description), { code: got.error });
	equal('token_type', got.token_type, 'DPoP');
	return got.access_token;
};
const list = async (headers) => {
	const answer = await fetch(at.agents, { headers });
	await answer.text();
	if (!answer.ok) throw Object.assign(new Error(answer.headers.get('www-authenticate')), { code: answer.status });
};
const show = (token, ...proofs) => {
	const headers = new Headers({ Authorization: `DPoP ${token}` });
	for (const proof of proofs) headers.append('DPoP', proof);
	return headers;
};
for (const alg of ['RS256', 'PS256', 'ES256', 'EdDSA', 'Ed25519']) {
	await works(`has a token bound to a key of ${alg}, and uses it`, async () => {
		const prove = await prover(alg);
		const token = await bind(await prove('POST', at.token), { scope: 'agents:read' });
		await list(show(token, await prove('GET', at.agents, token)));
		await list(show(token, await prove('GET', at.agents, token)));
	});
	await works(`checks a token, and a proof of a key of ${alg}`, async () => {
		const prove = await prover(alg);
		const token = await bind(await prove('POST', at.token), { resource });
		const { payload } = await verify(token);
		equal('cnf', JSON.stringify(payload.cnf), JSON.stringify({ jkt: prove.jkt }));
		await checker()(await prove('GET', `${resource}/resumes`, token), payload.cnf.jkt, 'GET', `${resource}/resumes`, token);
	});
}
const prove = await prover();
const thief = await prover();
const bound = await bind(await prove('POST', at.token), { scope: 'agents:read' });
const another = await bind(await prove('POST', at.token), { scope: 'agents:read' });
await works('is told by introspection to what key a token is bound', async () => {
	const answer = await fetch(`${at.token}/introspect`, { method: 'POST', headers: basic(service), body: new URLSearchParams({ token: bound }) });
	const is = await answer.json();
	equal('token_type', is.token_type, 'DPoP');
	equal('cnf', JSON.stringify(is.cnf), JSON.stringify({ jkt: prove.jkt }));
});
const now = Math.floor(Date.now() / 1000);
for (const [what, changes, htm = 'POST', htu = at.token] of [
	['another method', {}, 'GET'],
	['another URL', {}, 'POST', `${at.token}/introspect`],
	['another host', {}, 'POST', 'https://evil.example.com/api/v1/token'],
	['the typ JWT', { header: { typ: 'JWT' } }],
	['the private key', { header: { jwk: prove.private } }],
	['an iat of two minutes ago', { claims: { iat: now - 120 } }],
	['an iat of two minutes ahead', { claims: { iat: now + 120 } }],
	['no jti', { claims: { jti: undefined } }],
]) {
	await refuses(
		`a proof with ${what}, at /token`,
		async () => bind(await prove(htm, htu, undefined, changes)),
		(err) => err.code === 'invalid_dpop_proof' && /^The DPoP proof must /.test(err.message),
	);
}
const twice = await prove('POST', at.token);
await works('gets a token with a proof', () => bind(twice));
await refuses('a replay at /token', () => bind(twice), (err) => err.code === 'invalid_dpop_proof' && /was used before/.test(err.message));
const used = await prove('GET', at.agents, bound);
await works('uses a proof at the API', () => list(show(bound, used)));
for (const [what, headers, reason] of [
	['a replay at the API', show(bound, used), /error="invalid_dpop_proof".*was used before/],
	['a stolen token by Bearer', bearer(bound), /^DPoP .*error="invalid_token"/],
	['a stolen token with a proof of another key', show(bound, await thief('GET', at.agents, bound)), /^DPoP .*error="invalid_/],
	['a stolen token without a proof', show(bound), /^DPoP .*error="invalid_/],
	['a proof for another token', show(bound, await prove('GET', at.agents, another)), /error="invalid_dpop_proof"/],
	['a proof for another path', show(bound, await prove('GET', `${at.agents}/${agent.id}`, bound)), /error="invalid_dpop_proof"/],
	['two proofs', show(bound, await prove('GET', at.agents, bound), await prove('GET', at.agents, bound)), /error="invalid_dpop_proof"/],
]) {
	await refuses(what, () => list(headers), (err) => err.code === 401 && reason.test(err.message));
}
end();
