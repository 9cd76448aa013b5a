import express from 'express';
import { auth, requiredScopes } from 'express-oauth2-jwt-bearer';
import { base, bearer, end, equal, guards, listening, resource, tokens, works } from './check.mjs';

// One that discovers the service, and one that is told where its keys are;
// strict wants a token of RFC 9068.
for (const [name, options] of [
	['by discovery', { issuerBaseURL: base }],
	['by keys', { issuer: base, jwksUri: `${base}/.well-known/jwks.json` }],
]) {
	const app = express();
	app.use(auth({ ...options, audience: resource, strict: true, tokenSigningAlg: 'RS256' }));
	app.get('/resumes', requiredScopes('resumes:read'), (req, res) => res.json({ agent: req.auth.payload.client_id }));
	app.use((err, req, res, next) => res.status(err.status ?? 500).set(err.headers ?? {}).json({ error: err.code }));
	const url = await listening(app);
	const get = (token) => fetch(`${url}/resumes`, { headers: bearer(token) });
	await works(`knows who calls, ${name}`, async () => {
		const { agent } = await (await get(tokens.good)).json();
		equal('the length of the id', agent?.length, 36);
	});
	await guards(tokens, async (token) => (await get(token)).status, { asks: false });
}
end();
