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

const app = express();
const url = await listening(app);
const endpoint = new URL(`${url}/mcp`);
const metadata = getOAuthProtectedResourceMetadataUrl(endpoint);
const keys = createRemoteJWKSet(new URL(`${base}/.well-known/jwks.json`));
let audience = endpoint.href;
const verifier = {
	async verifyAccessToken(token) {
		try {
			const { payload } = await jwtVerify(token, keys, { issuer: base, audience, typ: 'at+jwt' });
			return { token, clientId: payload.client_id, scopes: payload.scope.split(' '), expiresAt: payload.exp };
		} catch (err) {
			throw new InvalidTokenError(err.message);
		}
	},
};
app.use(
	mcpAuthMetadataRouter({
		oauthMetadata: await (await fetch(`${base}/.well-known/oauth-authorization-server`)).json(),
		resourceServerUrl: endpoint,
		scopesSupported: ['resumes:read'],
	}),
);
app.all(
	'/mcp',
	requireBearerAuth({ verifier, requiredScopes: ['resumes:read'], resourceMetadataUrl: metadata }),
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

async function callTool(credentials, Provider = ClientCredentialsProvider) {
	const client = new Client({ name: 'acceptance', version: '1' });
	const authProvider = new Provider({ expectedIssuer: base, ...credentials });
	await client.connect(new StreamableHTTPClientTransport(endpoint, { authProvider }));
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
