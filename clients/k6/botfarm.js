// Users of a BotFarm for all virtual users of a k6 run: acquired in setup(), given back in teardown().
import http from 'k6/http';
import exec from 'k6/execution';
import { sleep } from 'k6';

const SET = 100; // users that one call of the service lends at most
const PATIENCE = 40; // seconds for which a service that is away is asked again; k6 gives setup() 60
const THERE = 20; // seconds after which a wait that is cut off, as by a proxy, had reached the service
const NOBODY = [1050, 1211]; // k6's own error codes: nobody had answered, or was there to be called
const AWAY = [0, 429, 502, 503, 504];
const FORM = 'application/x-www-form-urlencoded';

let token = '';

/** For setup(): `count` users that fit the filter, held for `ttl` seconds, which must be longer than the run. */
export function acquire({ count, ttl, wait = 30, ...filter }) {
  const holder = __ENV.BOTFARM_HOLDER || `k6/${crypto.randomUUID()}`;
  const bots = [];
  const end = Date.now() + wait * 1000;
  try {
    while (bots.length < count) {
      const users = [{ ...filter, count: Math.min(count - bots.length, SET) }];
      const left = Math.max(Math.ceil((end - Date.now()) / 1000), 0);
      const { locks } = call('POST', '/locks/sets', { users, ttl, holder }, left);
      bots.push(...locks.map(({ user }) => user));
    }
  } catch (refused) {
    try {
      giveBack(holder, 0); // that this fails as well is no news, and setup() has no time to try for long
    } finally {
      throw refused;
    }
  }
  return { holder, bots };
}

/** The user of this virtual user, out of what setup() returned. */
export function bot({ bots }) {
  const number = exec.vu.idInTest - 1;
  if (number >= bots.length) exec.test.abort(`BotFarm: ${bots.length} users were acquired, and this is virtual user ${number + 1}`);
  return bots[number];
}

/** For teardown(): gives all of the holder back. */
export function release({ holder, bots }) {
  const { released, tries } = giveBack(holder);
  if (tries > 1) return; // what the first one has given back, none counts again
  if (released < bots.length) console.warn(`BotFarm: ${bots.length - released} users had been lost before the end`);
}

function giveBack(holder, patience) {
  return call('DELETE', `/locks?holder=${encodeURIComponent(holder)}`, undefined, 0, patience);
}

function call(method, path, body, wait = 0, patience = PATIENCE) {
  const key = crypto.randomUUID(); // the same in every try: a lost reply's locks come with the next one
  const begun = Date.now();
  let end = begun + patience * 1000;
  for (let tries = 1; ; tries++) {
    const sent = Date.now();
    const left = Math.max(Math.ceil(wait - (sent - begun) / 1000), 0);
    let answer = ask(method, path, body, key, left);
    const granted = answer.status === 401 && authenticate();
    if (granted) answer = granted.status === 200 ? ask(method, path, body, key, left) : granted;
    if (answer.status >= 200 && answer.status < 300) return { ...answer.json(), tries };
    if (!NOBODY.includes(answer.error_code) && Date.now() - sent > THERE * 1000) end = Date.now() + PATIENCE * 1000;
    if (!AWAY.includes(answer.status) || Date.now() > end) throw new Error(`BotFarm: ${method} ${path}: ${told(answer)}`);
    sleep(Number(answer.headers['Retry-After']) || 1);
  }
}

function ask(method, path, body, key, wait) {
  const headers = { 'Content-Type': 'application/json', 'Idempotency-Key': key };
  if (token) headers.Authorization = `Bearer ${token}`;
  return send(method, path, body && JSON.stringify({ ...body, wait }), { headers, timeout: `${wait + 10}s` });
}

function send(method, path, body, params) {
  if (!__ENV.BOTFARM_URL) throw new Error('BOTFARM_URL is not set: it is the address of the BotFarm, as http://botfarm:8000');
  // Not among the requests of the run that may fail, whatever its options say; and a secret is sent nowhere else.
  const apart = { responseCallback: null, responseType: 'text', throw: false, redirects: 0, tags: { name: 'botfarm' } };
  return http.request(method, __ENV.BOTFARM_URL.replace(/\/+$/, '') + path, body, { ...params, ...apart });
}

/** A token is asked for where one is asked for: a service without authentication is never shown the secret. */
function authenticate() {
  const { BOTFARM_CLIENT_ID: client_id, BOTFARM_CLIENT_SECRET: client_secret, BOTFARM_ID_TOKEN: subject_token } = __ENV;
  if (!client_secret && !subject_token) return false;
  const form = client_secret
    ? { grant_type: 'client_credentials', client_id, client_secret }
    : {
        grant_type: 'urn:ietf:params:oauth:grant-type:token-exchange',
        subject_token,
        subject_token_type: 'urn:ietf:params:oauth:token-type:jwt',
      };
  const answer = send('POST', '/token', form, { headers: { 'Content-Type': FORM }, timeout: '10s' });
  if (answer.status === 200) token = answer.json('access_token');
  else if (!AWAY.includes(answer.status)) throw new Error(`BotFarm: POST /token: ${told(answer)}`);
  return answer;
}

function told(answer) {
  if (!answer.status) return `not reached: ${answer.error}`;
  const problem = /json/.test(answer.headers['Content-Type']) ? answer.json() : {};
  return problem.detail || problem.error_description || `status ${answer.status}`;
}
