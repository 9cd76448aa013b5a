// What every script here shares: what it is given, and how it says what it has
// checked (../go/node.go reads that).
export const given = JSON.parse(process.env.ACCEPTANCE);
export const { base, resource, agent, service, tokens, keys, parties } = given;

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

// refusedAs wants an error of the token endpoint, from its body or its challenge.
export const refusedAs = (status, code) => (err) =>
	err.status === status && (err.error === code || err.cause?.[0]?.parameters?.error === code);

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

// exchanges tries a library by which agents hand work on. by makes a client of it, which can get a token, trade one by a grant,
// read one by introspection, and revoke one. offline are ways to read one without asking. It returns a chain whose first token
// was revoked: that of the orchestrator, and what three workers made of it, one behind the other.
export async function exchanges(by, offline = {}) {
	const accessToken = 'urn:ietf:params:oauth:token-type:access_token';
	const orchestrator = await by(parties.orchestrator);
	const workers = await Promise.all(parties.workers.map(by));
	const { read } = await by(service);
	const active = async (list) => JSON.stringify(await Promise.all(list.map(async (token) => (await read(token)).active)));
	const trade = async (who, subject_token, more) => {
		const form = { subject_token, subject_token_type: accessToken, ...more };
		const got = await who.trade('urn:ietf:params:oauth:grant-type:token-exchange', form);
		equal('issued_token_type', got.issued_token_type, accessToken);
		equal('token_type', got.token_type.toLowerCase(), 'bearer');
		equal('that it lives an hour at most', got.expires_in > 0 && got.expires_in <= 3600, true);
		return got.access_token;
	};
	const chain = async () => {
		const list = [await orchestrator.token({ resource })];
		for (const who of workers.slice(0, 3)) list.push(await trade(who, list.at(-1)));
		return list;
	};
	const sees = async (read, token, want) => {
		const is = await read(token);
		for (const [name, value] of Object.entries({ sub: parties.orchestrator.id, aud: resource, ...want })) {
			equal(name, JSON.stringify(is[name]), JSON.stringify(value));
		}
	};

	const one = await works('trades a token, and that, and that', chain);
	const other = await works('and another', chain);
	for (const [how, read_] of Object.entries({ introspection: read, ...offline })) {
		await works(`sees who acts for whom, by ${how}`, async () => {
			await sees(read_, one[0], { client_id: parties.orchestrator.id, act: undefined });
			let act;
			for (const [i, scope] of ['resumes:read resumes:write', 'resumes:read', 'resumes:read'].entries()) {
				const client_id = parties.workers[i].id;
				act = { sub: client_id, act };
				await sees(read_, one[i + 1], { client_id, act, scope });
			}
		});
	}
	await works('trades by actor_token', async () => {
		const actor_token = await workers[0].token({ scope: 'resumes:read' });
		const token = await trade(orchestrator, one[0], { actor_token, actor_token_type: accessToken, scope: 'resumes:read' });
		const client_id = parties.workers[0].id;
		await sees(read, token, { client_id, act: { sub: client_id }, scope: 'resumes:read' });
		await workers[0].revoke(actor_token);
		equal('active, without the actor_token', await active([token, one[0]]), '[false,true]');
	});
	for (const [what, who, token, more, status, code] of [
		['who is no delegate', await by(parties.stranger), one[0], {}, 403, 'unauthorized_client'],
		['a fourth', workers[3], one[3], {}, 400, 'invalid_request'],
		['who has handed on', workers[0], one[2], {}, 400, 'invalid_request'],
		['a scope that the worker lacks', workers[0], one[0], { scope: 'resumes:read scores:write' }, 400, 'invalid_scope'],
		['a scope that was narrowed away', workers[2], one[2], { scope: 'resumes:write' }, 400, 'invalid_scope'],
		['another service', workers[0], one[0], { resource: 'https://payroll.example.com' }, 400, 'invalid_target'],
		['our own API', workers[0], await orchestrator.token(), { resource: base }, 400, 'invalid_target'],
		['a forged token', workers[0], tokens.wrongKey, {}, 400, 'invalid_request'],
		['another type', workers[0], one[0], { subject_token_type: 'urn:ietf:params:oauth:token-type:jwt' }, 400, 'invalid_request'],
		['a wrong secret', await by({ ...parties.workers[0], secret: service.secret }), one[0], {}, 401, 'invalid_client'],
	]) {
		await refuses(`${what}, by an exchange`, () => trade(who, token, more), refusedAs(status, code));
	}
	await works('is told that all has ended with the first token, and nothing else', async () => {
		await orchestrator.revoke(one[0]);
		equal('active', await active([...one, ...other]), '[false,false,false,false,true,true,true,true]');
	});
	await refuses('a token that has ended, by an exchange', () => trade(workers[3], one[0]), refusedAs(400, 'invalid_request'));
	await works('is told that what came later has ended with the second', async () => {
		await workers[0].revoke(other[1]);
		equal('active', await active(other), '[true,false,false,false]');
	});
	return one;
}

// bindings tries that an exchange drops no binding to a key. by makes a client of a library as exchanges has it, whose token and trade
// take a handle of the library that makes proofs, or none.
export async function bindings(by, handle) {
	const accessToken = 'urn:ietf:params:oauth:token-type:access_token';
	const orchestrator = await by(parties.orchestrator);
	const worker = await by(parties.workers[0]);
	const { read } = await by(service);
	const first = await handle();
	const second = await handle();
	const trade = async (who, subject_token, DPoP, actor_token) => {
		const form = { subject_token, subject_token_type: accessToken, ...(actor_token && { actor_token, actor_token_type: accessToken }) };
		return (await who.trade('urn:ietf:params:oauth:grant-type:token-exchange', form, DPoP)).access_token;
	};
	const bound = await orchestrator.token({ resource }, first);
	const plain = await orchestrator.token({ resource });
	const actor = await worker.token({ scope: 'resumes:read' }, second);
	const loose = await worker.token({ scope: 'resumes:read' });
	for (const [what, who, subject, DPoP, actorToken, key] of [
		['a bound token', worker, bound, second, undefined, second],
		['one that is not bound, with a proof', worker, plain, second, undefined, second],
		['one that is not bound, without', worker, plain, undefined, undefined, undefined],
		['a bound token, by a bound actor_token', orchestrator, bound, first, actor, second],
		['one that is not bound, by a bound actor_token', orchestrator, plain, undefined, actor, second],
	]) {
		await works(`trades ${what}`, async () => {
			const { cnf } = await read(await trade(who, subject, DPoP, actorToken));
			equal('cnf', JSON.stringify(cnf), JSON.stringify(key && { jkt: await key.calculateThumbprint() }));
		});
	}
	for (const [what, who, subject, DPoP, actorToken] of [
		['a bound token without a proof', worker, bound, undefined, undefined],
		['a bound token by actor_token, without a proof', orchestrator, bound, undefined, actor],
		['a bound token by actor_token, with a proof of that', orchestrator, bound, second, actor],
		['a bound token by an actor_token that is not', orchestrator, bound, first, loose],
		['one that is not bound, with a proof, by an actor_token that is not', orchestrator, plain, first, loose],
	]) {
		await refuses(`to trade ${what}`, () => trade(who, subject, DPoP, actorToken), refusedAs(400, 'invalid_dpop_proof'));
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
