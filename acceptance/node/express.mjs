import express from 'express';
import { auth, requiredScopes } from 'express-oauth2-jwt-bearer';
import { agent, base, bearer, end, equal, guards, listening, resource, tokens, works } from './check.mjs';
import { prover } from './proof.mjs';

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

	// It checks proofs too, for the host that the request names, and remembers none.
	const prove = await prover();
	const thief = await prover();
	const form = new URLSearchParams({ grant_type: 'client_credentials', scope: 'resumes:read', resource });
	const headers = { Authorization: `Basic ${btoa(`${agent.id}:${agent.secret}`)}`, DPoP: await prove('POST', `${base}/api/v1/token`) };
	const { access_token } = await (await fetch(`${base}/api/v1/token`, { method: 'POST', headers, body: form })).json();
	const show = async (proof) => (await fetch(`${url}/resumes`, { headers: { Authorization: `DPoP ${access_token}`, DPoP: await proof } })).status;
	await works(`lets a bound token in with a proof, ${name}`, async () =>
		equal('the status', await show(prove('GET', `${url}/resumes`, access_token)), 200));
	await works(`refuses one with a proof of another key, ${name}`, async () =>
		equal('the status', await show(thief('GET', `${url}/resumes`, access_token)), 401));
	await works(`refuses one with a proof for another path, ${name}`, async () =>
		equal('the status', await show(prove('GET', `${url}/scores`, access_token)), 400));
}
end();
