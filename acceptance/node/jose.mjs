import { createRemoteJWKSet, errors, importPKCS8, jwtVerify, SignJWT } from 'jose';
import { base, end, equal, exchanges, keys as clients, refuses, resource, signs, tokens, works } from './check.mjs';

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
end();
