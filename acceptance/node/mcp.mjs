// The Model Context Protocol end to end, as in ../go/mcp.go. The server here
// verifies tokens by itself, and the client asks for one for just that server.
import express from 'express';
import { createPrivateKey } from 'node:crypto';
import { createRemoteJWKSet, importPKCS8, jwtVerify, SignJWT } from 'jose';
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { ClientCredentialsProvider, PrivateKeyJwtProvider, StaticPrivateKeyJwtProvider } from '@modelcontextprotocol/sdk/client/auth-extensions.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { InvalidTokenError } from '@modelcontextprotocol/sdk/server/auth/errors.js';
import { requireBearerAuth } from '@modelcontextprotocol/sdk/server/auth/middleware/bearerAuth.js';
import { getOAuthProtectedResourceMetadataUrl, mcpAuthMetadataRouter } from '@modelcontextprotocol/sdk/server/auth/router.js';
import { McpServer } from '@modelcontextprotocol/sdk/server/mcp.js';
import { StreamableHTTPServerTransport } from '@modelcontextprotocol/sdk/server/streamableHttp.js';
import { agent, base, bearer, end, equal, guards, keys as clients, listening, refuses, service, tokens, works } from './check.mjs';
import { checker, prover } from './proof.mjs';

const app = express();
const url = await listening(app);
const endpoint = new URL(`${url}/mcp`);
const metadata = getOAuthProtectedResourceMetadataUrl(endpoint);
const keys = createRemoteJWKSet(new URL(`${base}/.well-known/jwks.json`));
let audience = endpoint.href;
const check = checker();
async function info(token, prove) {
	const { payload } = await jwtVerify(token, keys, { issuer: base, audience, typ: 'at+jwt' });
	if (Boolean(payload.cnf) !== Boolean(prove)) throw new Error('a token that is bound to a key comes with a proof, and no other does');
	if (prove) await prove(payload.cnf.jkt);
	return { token, clientId: payload.client_id, scopes: payload.scope.split(' '), expiresAt: payload.exp };
}
const verifier = {
	verifyAccessToken: (token) => info(token).catch((err) => { throw new InvalidTokenError(err.message); }),
};
const byBearer = requireBearerAuth({ verifier, requiredScopes: ['resumes:read'], resourceMetadataUrl: metadata });
// The SDK knows no proofs (RFC 9449), so this is beside what it has for Bearer.
async function byProof(req, res, next) {
	const [scheme, token] = (req.headers.authorization ?? '').split(' ');
	if (scheme !== 'DPoP') return byBearer(req, res, next);
	try {
		req.auth = await info(token, (jkt) => check(req.headers.dpop ?? '', jkt, req.method, endpoint.href, token));
	} catch (err) {
		return res.status(401).set('WWW-Authenticate', `DPoP error="invalid_token", resource_metadata="${metadata}"`).end(err.message);
	}
	next();
}
app.use(
	mcpAuthMetadataRouter({
		oauthMetadata: await (await fetch(`${base}/.well-known/oauth-authorization-server`)).json(),
		resourceServerUrl: endpoint,
		scopesSupported: ['resumes:read'],
	}),
);
app.all(
	'/mcp',
	byProof,
	express.json(),
	async (req, res) => {
		const server = new McpServer({ name: 'resumes', version: '1' });
		server.registerTool('whoami', {}, ({ authInfo }) => ({ content: [{ type: 'text', text: authInfo.clientId }] }));
		const transport = new StreamableHTTPServerTransport({ sessionIdGenerator: undefined });
		res.on('close', () => transport.close());
		await server.connect(transport);
		await transport.handleRequest(req, res, req.body);
	},
);

async function callTool(credentials, Provider = ClientCredentialsProvider, fetch = undefined) {
	const client = new Client({ name: 'acceptance', version: '1' });
	const authProvider = new Provider({ expectedIssuer: base, ...credentials });
	await client.connect(new StreamableHTTPClientTransport(endpoint, { authProvider, fetch }));
	const result = await client.callTool({ name: 'whoami' });
	await client.close();
	equal('what the tool says', result.content[0].text, credentials.clientId);
}
await works('is sent to the service, gets a token, calls a tool', () => callTool({ clientId: agent.id, clientSecret: agent.secret }));
await refuses(
	'a wrong secret',
	() => callTool({ clientId: agent.id, clientSecret: service.secret }),
	(err) => err.errorCode === 'invalid_client' || err.constructor.name === 'InvalidClientError',
);
await refuses(
	'another issuer than its credentials are for',
	() => callTool({ clientId: agent.id, clientSecret: agent.secret, expectedIssuer: 'https://login.example.com' }),
	(err) => /login\.example\.com/.test(err.message),
);

// By keys. The SDK reads no PEM of Ed25519, but a JWK.
const refused = (err) => err.errorCode === 'invalid_client' || err.constructor.name === 'InvalidClientError';
for (const { id, alg, key, other } of clients) {
	const given = (pem) => ({
		clientId: id,
		algorithm: alg,
		privateKey: alg === 'EdDSA' ? createPrivateKey(pem).export({ format: 'jwk' }) : pem,
	});
	await works(`gets a token by ${alg}, calls a tool`, () => callTool(given(key), PrivateKeyJwtProvider));
	await refuses(`another key, by ${alg}`, () => callTool(given(other), PrivateKeyJwtProvider), refused);
	const jwtBearerAssertion = await new SignJWT({ iss: id, sub: id, aud: base, jti: crypto.randomUUID() })
		.setProtectedHeader({ alg })
		.setExpirationTime('1m')
		.sign(await importPKCS8(key, alg));
	const once = { clientId: id, jwtBearerAssertion };
	await works(`gets a token with an assertion of ours, by ${alg}`, () => callTool(once, StaticPrivateKeyJwtProvider));
	await refuses(`a replay, by ${alg}`, () => callTool(once, StaticPrivateKeyJwtProvider), (err) => refused(err) && /used before/.test(err.message));
}

// With tokens that are bound to a key: the SDK sends none but Bearer, and this fetch makes DPoP of that. asks has the key for which
// a token is asked, and shows that with which it is shown.
const proving = (asks, shows = asks) => async (url, init = {}) => {
	const headers = new Headers(init.headers);
	const [, token] = /^Bearer (.+)$/.exec(headers.get('Authorization') ?? '') ?? [];
	const { href } = new URL(url);
	if (token) {
		headers.set('Authorization', `DPoP ${token}`);
		headers.set('DPoP', await shows(init.method ?? 'GET', href, token));
	} else if (href === `${base}/api/v1/token`) {
		headers.set('DPoP', await asks(init.method, href));
	}
	return fetch(url, { ...init, headers });
};
const secret = { clientId: agent.id, clientSecret: agent.secret };
const prove = await prover();
await works('gets a bound token, calls a tool with proofs', () => callTool(secret, ClientCredentialsProvider, proving(prove)));
await refuses(
	'a proof of another key',
	async () => callTool(secret, ClientCredentialsProvider, proving(prove, await prover())),
	(err) => err.code === 401 || /401|nauthorized|the key of the proof is another/.test(err.message),
);
await refuses(
	'a bound token by Bearer',
	() =>
		callTool(secret, ClientCredentialsProvider, async (url, init = {}) => {
			const asks = new URL(url).href === `${base}/api/v1/token`;
			return asks ? proving(prove)(url, init) : fetch(url, init);
		}),
	(err) => err.code === 401 || /401|nauthorized|comes with a proof/.test(err.message),
);

// The server alone, with tokens for a resource whose name it takes.
audience = 'https://resumes.example.com';
const initialize = {
	jsonrpc: '2.0',
	id: 1,
	method: 'initialize',
	params: { protocolVersion: '2025-06-18', capabilities: {}, clientInfo: { name: 'acceptance', version: '1' } },
};
await guards(
	tokens,
	async (token) => {
		const answer = await fetch(endpoint, {
			method: 'POST',
			headers: { ...bearer(token), 'Content-Type': 'application/json', Accept: 'application/json, text/event-stream' },
			body: JSON.stringify(initialize),
		});
		await answer.text();
		if (answer.status === 401) {
			equal('the metadata named', /resource_metadata="([^"]*)"/.exec(answer.headers.get('www-authenticate'))?.[1], metadata);
		}
		return answer.status;
	},
	{ asks: false },
);
end();
