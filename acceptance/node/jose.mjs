import { createRemoteJWKSet, errors, jwtVerify } from 'jose';
import { base, end, equal, refuses, resource, tokens, works } from './check.mjs';

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
end();
