import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { createServer, request } from 'node:http';
import os from 'node:os';
import { after, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

const uptime = os.uptime;
let skipped = 0; // seconds
os.uptime = () => uptime() + skipped; // before the client is loaded, which takes it from there
const { Farm, LockLost, Unreached } = await import('@botfarm/client');

const URL = process.env.BOTFARM_URL;
const project_id = process.env.BOTFARM_PROJECT;
const direct = new Farm({ holder: 'client.test' });

/** The service behind a proxy: each request goes through, or to the next of `faults`. */
async function behind(faults) {
  const server = createServer((incoming, reply) => {
    const fault = faults.shift();
    const forward = (then) => {
      const options = { method: incoming.method, headers: incoming.headers };
      incoming.pipe(request(URL + incoming.url, options, then));
    };
    return (fault ?? through)(reply, forward);
  });
  await new Promise((listening) => server.listen(0, '127.0.0.1', listening));
  after(() => server.close());
  return new Farm({ url: `http://127.0.0.1:${server.address().port}`, holder: 'client.test' });
}

const pass = (reply) => (answer) => {
  reply.writeHead(answer.statusCode, answer.headers);
  answer.pipe(reply);
};
const through = (reply, forward) => forward(pass(reply));
const late = (reply, forward) => forward((answer) => setTimeout(pass(reply), 1500, answer));
const hang = () => {};
const cut = (reply) => reply.destroy();
const cutWait = (reply) => cut(reply, (skipped += 30));
const loseReply = (reply, forward) => forward((answer) => cut(reply, answer.resume()));
const busy = (reply) => reply.writeHead(429, { 'Retry-After': '1' }).end();
const strange = (reply) => reply.writeHead(200, { 'Content-Type': 'text/html' }).end('<html>');
const elsewhere = (reply) => reply.writeHead(307, { Location: `${URL}/locks` }).end();
const away = (reply) => reply.writeHead(503, { 'Retry-After': '1' }).end();
const held = async () => (await (await fetch(`${URL}/users?project_id=${project_id}&state=locked`)).json()).items.length;
const force = ({ user }) => fetch(`${URL}/users/${user.id}/lock`, { method: 'DELETE' });

/** Why the bot is lost. The timer keeps Node.js running: a heartbeat doesn't. */
const lost = ({ signal }) =>
  Promise.race([new Promise((told) => signal.addEventListener('abort', () => told(signal.reason))), sleep(10_000)]);

test('a bot is renewed beyond its ttl, and given back', async () => {
  const bot = await direct.acquire({ project_id, env: 'stage', ttl: 1 });
  assert.equal(bot.password, bot.login.replace('bot', 'pw'));
  await sleep(2500);
  assert.equal(await held(), 1);
  await bot.release();
  assert.equal(await held(), 0);
  await bot.release();
});

test('a lock that runs out while the service does not hear of its release was not lost', async () => {
  const farm = await behind([through, away, away, away]);
  const bot = await farm.acquire({ project_id, ttl: 2 });
  await bot.release();
  assert.equal(await held(), 0);
  assert.equal(bot.signal.aborted, false);
});

test('a release that is refused can be said again', async () => {
  const bot = await direct.acquire({ project_id });
  await assert.rejects(bot.release({ outcome: 'bad_login' }), { slug: 'invalid' });
  assert.equal(await held(), 1);
  await bot.release({ outcome: 'bad-login' });
  assert.equal(await held(), 0);
});

test('this very user is had by its id', async () => {
  const { items } = await (await fetch(`${URL}/users?project_id=${project_id}`)).json();
  const bot = await direct.acquire({ user: items[1].id });
  assert.equal(bot.login, items[1].login);
  await bot.release();
});

test('a lost reply costs no user', async () => {
  const farm = await behind([loseReply, cut, null, loseReply]);
  const bot = await farm.acquire({ project_id });
  assert.equal(await held(), 1);
  await bot.release();
  assert.equal(await held(), 0);
});

for (const [ttl, fence] of Object.entries({ 3: 1, 1: 2 })) {
  test(`a lock whose reply was lost is renewed at once, or asked for anew where it has ended: ttl ${ttl}`, async () => {
    const user = { login: 'bot-0', password: 'pw-0', project_id: randomUUID(), env: 'stage' };
    const json = { 'Content-Type': 'application/json' };
    assert.ok((await fetch(`${URL}/users`, { method: 'POST', headers: json, body: JSON.stringify(user) })).ok);
    const farm = await behind([loseReply, away, away]);
    const bot = await farm.acquire({ project_id: user.project_id, ttl: Number(ttl) });
    assert.equal(bot.lock.fence, fence);
    await sleep(2500);
    assert.equal(bot.signal.aborted, false);
    await bot.release();
  });
}

test('who waits behind a proxy that cuts calls off goes on, however often it does', async () => {
  const farm = await behind(Array(4).fill(cutWait));
  const bot = await farm.acquire({ project_id, wait: 300 });
  await bot.release();
});

test('a service that is away for less than the ttl loses no lock', async () => {
  const farm = await behind([away, null, away, cut, away]);
  const bot = await farm.acquire({ project_id, ttl: 6 });
  await sleep(8000);
  assert.equal(bot.signal.aborted, false);
  assert.equal(await held(), 1);
  await bot.release();
});

test('who is asked too often, or is not the service, is asked again', async () => {
  const farm = await behind([busy, strange]);
  const bot = await farm.acquire({ project_id });
  await bot.release();
});

test('who sends callers on is not followed, and told', async () => {
  const farm = await behind([elsewhere]);
  await assert.rejects(farm.acquire({ project_id }), { status: 307, message: /sent on to http.*\/locks: use that/ });
});

test('a lock that somebody ended is told of, with the user and who ended it', async () => {
  const bot = await direct.acquire({ project_id, ttl: 3 });
  const reason = lost(bot);
  await force(bot);
  assert.ok((await reason) instanceof LockLost);
  assert.match(bot.signal.reason.message, new RegExp(`^the lock on the user "${bot.login}" was lost: forced at 20`));
  await bot.release();
});

for (const [how, fault] of Object.entries({ cut, hang })) {
  test(`a lock that cannot be renewed in time is lost when the service may hand its user on: ${how}`, async () => {
    const farm = await behind([null, ...Array(99).fill(fault)]);
    const bot = await farm.acquire({ project_id, ttl: 2 });
    const begun = performance.now();
    assert.match((await lost(bot)).message, /in time: PATCH .* is not reached: /);
    assert.ok(performance.now() - begun < 2500);
  });
}

test('who waits has the whole ttl', async () => {
  const all = await direct.acquireSet([{ project_id, count: 2 }]);
  setTimeout(() => all[0].release(), 2500);
  const bot = await direct.acquire({ project_id, ttl: 2 });
  await sleep(1500);
  assert.equal(bot.signal.aborted, false);
  await Promise.all([bot, all[1]].map((one) => one.release()));
});

test('a lock whose reply was late is renewed at once', async () => {
  const farm = await behind([late]);
  const bot = await farm.acquire({ project_id, ttl: 2 });
  await sleep(1500);
  assert.equal(bot.signal.aborted, false);
  await bot.release();
});

test('a session is kept for the next holder, who is preferred for it', async () => {
  const first = await direct.acquire({ project_id });
  assert.equal(await first.session(), undefined);
  await first.storeSession({ cookies: ['ü'] }, { ttl: 3600 });
  await first.release({ outcome: 'passed' });
  await assert.rejects(first.storeSession('of a former holder'), { slug: 'lock-not-held' });
  const bot = await direct.acquire({ project_id, prefer: 'session' });
  assert.deepEqual([bot.login, await bot.session()], [first.login, { cookies: ['ü'] }]);
  await bot.deleteSession();
  assert.equal(await bot.session(), undefined);
  await bot.release({ outcome: 'bad-login' });
  const { items } = await (await fetch(`${URL}/users/${bot.user.id}/history?limit=2`)).json();
  assert.deepEqual(items.map(({ outcome }) => outcome), ['bad-login', 'passed']);
});

test('a one-time code is asked for', async () => {
  const bot = await direct.acquire({ project_id });
  await assert.rejects(bot.totp(), { slug: 'no-totp' });
  const headers = { 'Content-Type': 'application/json' };
  const body = JSON.stringify({ totp: 'otpauth://totp/x?secret=JBSWY3DPEHPK3PXPJBSWY3DP&digits=8&period=15' });
  await fetch(`${URL}/users/${bot.user.id}`, { method: 'PATCH', headers, body });
  assert.match(await bot.totp(), /^\d{8}$/);
  await bot.release();
});

test('a refusal tells why', async () => {
  await assert.rejects(direct.acquire({ project_id, labels: { role: 'nobody' } }), { slug: 'no-matching-user', status: 404 });
  await assert.rejects(direct.acquireSet([{ project_id, count: 2 }, { project_id }]), { slug: 'no-matching-user' });
  const all = await direct.acquireSet([{ project_id, count: 2 }]);
  await assert.rejects(direct.acquire({ project_id, wait: 0 }), { slug: 'pool-exhausted', status: 409 });
  assert.equal(await direct.sweep(), 2);
  await Promise.all(all.map((one) => one.release()));
});

test('without an address, or with none there, it says so', async () => {
  assert.throws(() => new Farm({ env: {} }), /BOTFARM_URL is not set/);
  for (const url of ['botfarm:8000', 'http://me:secret@botfarm']) {
    assert.throws(() => new Farm({ url }), (error) => /is no address/.test(error) && !/secret/.test(error));
  }
  const nobody = new Farm({ url: 'http://127.0.0.1:1' });
  await assert.rejects(nobody.call('GET', '/locks', { deadline: os.uptime() + 1 }), (error) => error instanceof Unreached);
});
