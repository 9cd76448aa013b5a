// Proofs of DPoP (RFC 9449), made and checked by jose.
import { createHash } from 'node:crypto';
import { calculateJwkThumbprint, EmbeddedJWK, exportJWK, generateKeyPair, jwtVerify, SignJWT } from 'jose';

const ath = (token) => createHash('sha256').update(token).digest('base64url');

// prover makes a key, and returns what makes proofs of it: of a method and a URL, of a token if there is one, and with changes of the
// header and of the claims.
export async function prover(alg = 'ES256') {
	const { privateKey, publicKey } = await generateKeyPair(alg, { extractable: true });
	const jwk = await exportJWK(publicKey);
	const prove = (htm, htu, token, { header = {}, claims = {} } = {}) =>
		new SignJWT({ htm, htu, jti: crypto.randomUUID(), iat: Math.floor(Date.now() / 1000), ...(token && { ath: ath(token) }), ...claims })
			.setProtectedHeader({ alg, typ: 'dpop+jwt', jwk, ...header })
			.sign(privateKey);
	prove.jkt = await calculateJwkThumbprint(jwk);
	prove.private = await exportJWK(privateKey);
	return prove;
}

// checker returns what checks that a proof is of this key, and for this request with this token, and came for the first time.
export function checker() {
	const seen = new Set();
	return async (proof, jkt, htm, htu, token) => {
		const { payload, protectedHeader } = await jwtVerify(proof, EmbeddedJWK, {
			typ: 'dpop+jwt', algorithms: ['ES256', 'EdDSA', 'Ed25519', 'RS256', 'PS256'], requiredClaims: ['jti'], maxTokenAge: 50, clockTolerance: 10,
		});
		for (const [what, is, want] of [
			['the key', await calculateJwkThumbprint(protectedHeader.jwk), jkt],
			['ath', payload.ath, ath(token)],
			['htm', payload.htm, htm],
			['htu', payload.htu, htu],
		]) {
			if (is !== want) throw new Error(`${what} of the proof is another`);
		}
		if (seen.has(payload.jti)) throw new Error('the proof was used before');
		seen.add(payload.jti);
	};
}
