// A service that verifies each token of a line of standard input, for
// ../go/rotation.go: node verifier.mjs ISSUER AUDIENCE
import { createInterface } from 'node:readline';
import { createRemoteJWKSet, jwtVerify } from 'jose';

const [issuer, audience] = process.argv.slice(2);
const keys = createRemoteJWKSet(new URL(`${issuer}/.well-known/jwks.json`));
for await (const token of createInterface({ input: process.stdin })) {
	try {
		await jwtVerify(token, keys, { issuer, audience, typ: 'at+jwt' });
		console.log('ok');
	} catch (err) {
		console.log(`${err.code} ${err.message}`);
	}
}
