// What every script here shares: what it is given, and how it says what it has
// checked (../go/node.go reads that).
export const given = JSON.parse(process.env.ACCEPTANCE);
export const { base, resource, agent, service, tokens, keys } = given;

const say = (word, what, err) => {
	const reason = err && `${err.name} ${err.code ?? ''} ${err.message ?? err}`.replace(/\s+/g, ' ');
	process.stdout.write([word, what, reason].filter(Boolean).join('\t') + '\n');
};

// works wants do to do what it says.
export async function works(what, run) {
	try {
		const value = await run();
		say('ok', what);
		return value;
	} catch (err) {
		say('FAIL', what, err);
	}
}

// refuses wants run to throw, and good to say that it is for the right reason.
export async function refuses(what, run, good) {
	try {
		await run();
	} catch (err) {
		if (await good(err)) return say('ok', `refuses ${what}`);
		return say('FAIL', `refuses ${what}`, new Error(`refused for another reason: ${err.name} ${err.code ?? ''} ${err.message}`));
	}
	say('FAIL', `refuses ${what}`, new Error('it was accepted'));
}

export function equal(what, got, want) {
	if (got !== want) throw new Error(`${what} is ${JSON.stringify(got)}, want ${JSON.stringify(want)}`);
}

// signs tries a library by which clients sign with keys of their own. by makes a client of it, which can get a token, ask whether
// one is active, and revoke one: its key, and the jti of its assertions if they are not to be the library's.
export async function signs(by, description) {
	const because = (reason) => async (err) => reason.test(await description(err));
	for (const who of keys) {
		const { alg } = who;
		let me;
		const token = await works(`gets a token by ${alg}`, async () => {
			me = await by(who, who.key);
			return me.token();
		});
		await works(`introspects by ${alg}`, async () => equal('active', await me.active(token), true));
		await works(`revokes by ${alg}`, async () => {
			await me.revoke(token);
			equal('active', await me.active(token), false);
		});
		await refuses(`another key, by ${alg}`, async () => (await by(who, who.other)).token(), because(/No active key of this client/));
		const jti = `${alg} ${Date.now()}`;
		await works(`gets a token with a jti of ours, by ${alg}`, async () => (await by(who, who.key, { jti })).token());
		await refuses(`a replay, by ${alg}`, async () => (await by(who, who.key, { jti })).token(), because(/was used before/));
		await refuses(
			`an assertion for the endpoint, by ${alg}`,
			async () => (await by(who, who.key, { aud: `${base}/api/v1/token` })).token(),
			because(/must have the aud .*, the issuer and nothing else/),
		);
	}
}

// guards tries a resource server: ask returns the status that it answers to a
// token. Only one that asks the service can know that a token is revoked.
export async function guards(set, ask, { asks }) {
	for (const [what, token, want] of [
		['lets a good token in', set.good, 200],
		['lets one in that only we signed, as a control', set.forged, 200],
		['refuses no token', undefined, 401],
		['refuses an expired token', set.expired, 401],
		['refuses a wrong issuer', set.wrongIssuer, 401],
		['refuses a wrong audience', set.wrongAudience, 401],
		['refuses a wrong key', set.wrongKey, 401],
		['refuses an unknown key', set.unknownKey, 401],
		['refuses a wrong type', set.wrongType, 401],
		['refuses a changed scope', set.tampered, 401],
		...(asks ? [['refuses a revoked token', set.revoked, 401]] : []),
		['refuses a token without the scope', set.unscoped, 403],
		['refuses a bound token by Bearer', set.bound, 401],
	]) {
		await works(what, async () => equal('the status', await ask(token), want));
	}
}

// bearer is the header that carries a token.
export const bearer = (token) => (token ? { Authorization: `Bearer ${token}` } : {});

export const listening = (server) =>
	new Promise((ready) => {
		const at = server.listen(0, '127.0.0.1', () => ready(`http://localhost:${at.address().port}`));
	});

export function end() {
	process.stdout.write('end\n', () => process.exit(0));
}
