// What every script here shares: what it is given, and how it says what it has
// checked (../go/node.go reads that).
export const given = JSON.parse(process.env.ACCEPTANCE);
export const { base, resource, agent, service, tokens } = given;

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
		if (good(err)) return say('ok', `refuses ${what}`);
		return say('FAIL', `refuses ${what}`, new Error(`refused for another reason: ${err.name} ${err.code ?? ''} ${err.message}`));
	}
	say('FAIL', `refuses ${what}`, new Error('it was accepted'));
}

export function equal(what, got, want) {
	if (got !== want) throw new Error(`${what} is ${JSON.stringify(got)}, want ${JSON.stringify(want)}`);
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
