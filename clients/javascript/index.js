'use strict';
/*
 * Users of a BotFarm, for test code in Node.js. A `Farm` is the service, a `Bot` is a user that is held: it is renewed
 * every ttl/3 until it is released, and its `signal` is aborted once it is no longer ours.
 *
 * Times here are seconds of the machine's uptime: it runs on while the machine is suspended, and nobody sets it.
 */
const { randomUUID } = require('node:crypto');
const { hostname, uptime } = require('node:os');
const { setTimeout: sleep } = require('node:timers/promises');

const PATIENCE = 60; // seconds for which a service that is away is asked again: longer than its restart takes
const REPLY = 10; // seconds in which a call that does not wait is answered
const THERE = 20; // seconds after which a wait that is cut off had reached the service: a proxy before it allows no more
const CODE = 135; // seconds for a one-time code: the longest period, 5 s, and the reply
const WAIT = 290; // seconds that one call may wait: Node.js gives up on a reply after 300
const AWAY = [429, 502, 503, 504]; // of one that restarts or is asked too often, or of a proxy before it

/** The service says no. `status`, `slug` and `problem` tell why. */
class Refused extends Error {
  name = 'Refused';

  constructor(what, status, problem) {
    super(`${what}: ${problem.detail ?? problem.error_description ?? problem.error ?? `status ${status}`}`);
    this.status = status;
    this.problem = problem;
    this.slug = problem.type?.replace('urn:botfarm:', '') ?? problem.error;
  }
}

/** The service is not reached, or can't answer. */
class Unreached extends Error {
  name = 'Unreached';
}

/** The user is no longer ours: its lock has ended, or could not be renewed in time. */
class LockLost extends Error {
  name = 'LockLost';

  constructor(user, why) {
    super(`the lock on the user "${user.login}" was lost: ${why}`);
  }
}

class Farm {
  #url;
  #client;
  #token;

  constructor({ env = process.env, url = env.BOTFARM_URL, holder = env.BOTFARM_HOLDER, ...client } = {}) {
    if (!url) throw new Error('BOTFARM_URL is not set: it is the address of the BotFarm, as http://botfarm:8000');
    this.#url = url.trim().replace(/\/+$/, '');
    // No password in it, as the URL is told when something fails.
    if (!/^https?:\/\/[^@?#\s]+$/i.test(this.#url)) throw new Error('BOTFARM_URL is no address as http://botfarm:8000');
    this.#client = {
      id: client.clientId ?? env.BOTFARM_CLIENT_ID,
      secret: client.clientSecret ?? env.BOTFARM_CLIENT_SECRET,
      idToken: client.idToken ?? env.BOTFARM_ID_TOKEN,
    };
    this.holder = holder || `javascript/${hostname()}/${process.pid}`;
  }

  /** A free user that fits, or the one with the id `user`. Waits for one; the fields are those of `POST /locks`. */
  async acquire({ user, project_id, env, domain, labels, prefer, ...options }) {
    const filter = user ? {} : { project_id, env, domain, labels, prefer };
    const path = user ? ['PUT', `/users/${encodeURIComponent(user)}/lock`] : ['POST', '/locks'];
    return this.#grant(path, filter, options, (lock, asked) => new Bot(this, lock, asked));
  }

  /** Several users, all or none, in the order asked: the fields are those of `POST /locks/sets`. */
  async acquireSet(users, options = {}) {
    const bots = ({ locks }, asked) => locks.map((lock) => new Bot(this, lock, asked));
    return this.#grant(['POST', '/locks/sets'], { users }, options, bots);
  }

  /** Give back all that this holder has, whoever took it; how many that were. */
  async sweep() {
    const { body } = await this.call('DELETE', `/locks?holder=${encodeURIComponent(this.holder)}`);
    return body.released;
  }

  async #grant([method, path], filter, { ttl = 60, wait = 300, ...more }, bots) {
    const end = uptime() + wait;
    let key = randomUUID(); // the same in every try: where a reply was lost, the next one brings that lock
    for (let asked = uptime(); ; ) {
      const left = () => Math.min(Math.max(Math.ceil(end - uptime()), 0), WAIT);
      const body = () => ({ holder: this.holder, ttl, wait: left(), ...filter, ...more });
      try {
        const { body: granted } = await this.call(method, path, { key, body, reply: () => left() + REPLY });
        return bots(granted, asked);
      } catch (refused) {
        if (refused.slug === 'lock-ended') {
          [key, asked] = [randomUUID(), uptime()]; // it was granted, and over before a reply came through
        } else {
          if (!['pool-exhausted', 'user-locked'].includes(refused.slug) || !left()) throw refused;
          await sleep(1000);
        }
      }
    }
  }

  /**
   * One call, repeated while the service is away for up to `PATIENCE`; its answer, and when it was sent. One with a
   * `key` may wait, and be cut off as often as it takes. With a `deadline` it is repeated until then, whatever is
   * refused (a token, perhaps) but the lock itself.
   */
  async call(method, path, { key, body, reply = () => REPLY, deadline } = {}) {
    let end = deadline;
    for (let pause = 0.25; ; pause = Math.min(pause * 2, 5)) {
      const sent = uptime();
      const seconds = Math.min(reply(), (deadline ?? Infinity) - sent);
      const answer = await this.#ask(method, path, key, body, seconds).catch((error) => error);
      const fault = faultOf(`${method} ${this.#url}${path.split('?')[0]}`, answer);
      if (!fault) return { body: answer.body, sent };
      if (!end || (key && uptime() - sent > THERE)) end = uptime() + PATIENCE;
      const next = answer.after ?? pause;
      const final = deadline ? fault.slug === 'lock-not-held' : fault instanceof Refused;
      if (final || uptime() + next >= end) throw fault;
      await sleep(next * 1000);
    }
  }

  async #ask(method, path, key, body, seconds) {
    const headers = { ...(key && { 'Idempotency-Key': key }), ...(body && { 'Content-Type': 'application/json' }) };
    const send = () => {
      if (this.#token) headers.Authorization = `Bearer ${this.#token}`;
      return exchange(this.#url + path, { method, headers, body: body && JSON.stringify(body()) }, seconds);
    };
    const answer = await send();
    // A token is asked for where one is asked for: a service without authentication is never shown the secret.
    if (answer.status !== 401 || !(await this.#authenticate())) return answer;
    return send();
  }

  async #authenticate() {
    const { id, secret, idToken } = this.#client;
    if (!secret && !idToken) return false;
    const form = secret
      ? { grant_type: 'client_credentials', client_id: id ?? '', client_secret: secret }
      : {
          grant_type: 'urn:ietf:params:oauth:grant-type:token-exchange',
          subject_token: idToken,
          subject_token_type: 'urn:ietf:params:oauth:token-type:jwt',
        };
    const answer = await exchange(`${this.#url}/token`, { method: 'POST', body: new URLSearchParams(form) }, REPLY);
    const fault = faultOf(`POST ${this.#url}/token`, answer);
    if (fault) throw fault;
    this.#token = answer.body.access_token;
    return true;
  }
}

async function exchange(url, request, seconds) {
  const signal = AbortSignal.timeout(Math.max(Math.round(seconds * 1000), 1));
  const answer = await fetch(url, { ...request, signal, redirect: 'manual' }); // a secret goes nowhere else
  const text = await answer.text();
  const json = /json/.test(answer.headers.get('Content-Type') ?? '');
  if (answer.ok && text && !json) throw new Error('what answers there is not BotFarm');
  const after = Number(answer.headers.get('Retry-After')) || undefined;
  const to = answer.status >= 300 && answer.status < 400 ? answer.headers.get('Location') : null;
  const detail = to === null ? undefined : `callers are sent on to ${to}: use that address`;
  return { status: answer.status, body: json && text ? JSON.parse(text) : { detail }, after };
}

/** What is wrong with an answer, or with there being none; nothing where it is a good one. */
function faultOf(what, answer) {
  if (answer instanceof Refused || answer instanceof Unreached) return answer; // the token was refused
  if (answer instanceof Error) return new Unreached(`${what} is not reached: ${answer.cause?.code ?? answer.message}`);
  if (answer.status < 300) return undefined;
  const refused = new Refused(what, answer.status, answer.body);
  return AWAY.includes(answer.status) ? new Unreached(refused.message) : refused;
}

/** A deployment of hashes keeps no sessions: said once by each process, and without them it goes on. */
function tellUnsealed({ problem }) {
  if (!tellUnsealed.told) console.warn(`BotFarm: no session is kept. ${problem.detail}`);
  tellUnsealed.told = true;
}

class Bot {
  #farm;
  #deadline; // the service may hand the user on from here, as far as we can know
  #givenBack = false;
  #released = new AbortController();
  #lost = new AbortController();

  constructor(farm, lock, asked) {
    this.#farm = farm;
    this.#deadline = uptime() + lock.ttl;
    this.lock = lock;
    this.user = lock.user;
    this.login = lock.user.login;
    this.password = lock.user.password;
    this.labels = lock.user.labels;
    this.#beat(uptime() - asked > 1); // it has waited: only a renewal tells when the lock ends at the soonest
  }

  /** Aborted when the user is lost; its `reason` is a `LockLost`. */
  get signal() {
    return this.#lost.signal;
  }

  /** What the last one stored who was logged in as this user: any JSON; undefined where there is none. */
  async session() {
    return this.#session('GET');
  }

  /** Keep a session for the next holder: JSON of up to 256 KiB, worth something for `ttl` seconds (a day). */
  async storeSession(session, { ttl } = {}) {
    await this.#session('PUT', ttl === undefined ? '' : `?ttl=${ttl}`, () => session);
  }

  async deleteSession() {
    await this.#session('DELETE');
  }

  /** A one-time code, given to nobody else. After one it is a period until the next: 30 s with most systems. */
  async totp() {
    const { body } = await this.#farm.call('POST', `/locks/${this.lock.id}/totp`, { reply: () => CODE });
    return body.code;
  }

  /** Give the user back. `outcome`, `cooldown` and `quarantine` are those of `DELETE /locks/{id}`. */
  async release(told = {}) {
    if (this.#givenBack) return;
    this.#givenBack = true;
    this.#released.abort();
    const inTime = uptime() < this.#deadline;
    const query = new URLSearchParams(Object.entries(told).filter(([, value]) => value !== undefined));
    try {
      await this.#farm.call('DELETE', `/locks/${this.lock.id}?${query}`);
    } catch (refused) {
      this.#givenBack = refused.slug === 'lock-not-held';
      if (!this.#givenBack) throw refused;
      // What has released it is this call, where the reply to it was lost; it ran out while the service did not hear us.
      const ours = inTime ? ['released', 'expired'] : ['released'];
      if (!ours.includes(refused.problem.ended_by)) this.#lost.abort(this.#lossBy(refused));
    }
  }

  async #session(method, query = '', body = undefined) {
    try {
      const { body: session } = await this.#farm.call(method, `/locks/${this.lock.id}/session${query}`, { body });
      return session;
    } catch (refused) {
      if (refused.slug === 'not-sealed') tellUnsealed(refused);
      else if (refused.slug !== 'no-session') throw refused;
      return undefined;
    }
  }

  async #beat(atOnce) {
    const pause = { ref: false, signal: this.#released.signal };
    try {
      if (atOnce) await this.#renew();
      for (;;) {
        const due = uptime() + this.lock.ttl / 3;
        // In short steps: a timer stands still while the machine is suspended, and the lock's time does not.
        while (uptime() < due) await sleep(Math.min(Math.ceil((due - uptime()) * 1000), 1000), undefined, pause);
        await this.#renew();
      }
    } catch (error) {
      if (!this.#released.signal.aborted) this.#lost.abort(error);
    }
  }

  async #renew() {
    const [path, deadline] = [`/locks/${this.lock.id}`, this.#deadline];
    try {
      if (uptime() >= deadline) throw new Error('the process stood still');
      const { sent } = await this.#farm.call('PATCH', path, { body: () => ({}), deadline });
      this.#deadline = sent + this.lock.ttl;
    } catch (refused) {
      if (refused.slug === 'lock-not-held') throw this.#lossBy(refused);
      await sleep((deadline - uptime()) * 1000, undefined, { ref: false, signal: this.#released.signal });
      throw new LockLost(this.user, `it could not be renewed in time: ${refused.message}`);
    }
  }

  #lossBy({ problem, message }) {
    return new LockLost(this.user, problem.ended_by ? `${problem.ended_by} at ${problem.ended_at}` : message);
  }
}

module.exports = { Bot, Farm, LockLost, Refused, Unreached };
