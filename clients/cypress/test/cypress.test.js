// What Cypress does with the configuration of the README, without a browser: its events, its tasks, its commands.
const assert = require('node:assert/strict');
const { readFileSync } = require('node:fs');
const { test } = require('node:test');
const { setTimeout: sleep } = require('node:timers/promises');
const { e2e } = require('./cypress.config.js');

const URL = process.env.BOTFARM_URL;
const events = {};
e2e.setupNodeEvents((name, action) => (events[name] = action));

/** The support file in a browser: what it registers, and tasks that go to Node.js as JSON. */
function browser() {
  const commands = {};
  const hooks = [];
  let last;
  const run = async (name, arg) => JSON.parse(JSON.stringify(await events.task[name](arg)));
  const cy = { task: (name, arg) => (last = run(name, arg)) };
  const support = new Function('Cypress', 'afterEach', 'cy', readFileSync(require.resolve('@botfarm/cypress/support'), 'utf8'));
  support({ Commands: { add: (name, command) => (commands[name] = command) } }, (hook) => hooks.push(hook), cy);
  const end = (state) => {
    hooks.forEach((hook) => hook.call({ currentTest: { state } }));
    return last;
  };
  return { ...commands, ...cy, end };
}

const held = async () => (await (await fetch(`${URL}/users?project_id=${process.env.BOTFARM_PROJECT}&state=locked`)).json()).items;

test('a test has users, and they are given back after it', async () => {
  const cy = browser();
  const [one, two] = [await cy.bot(), await cy.bot({ labels: { role: 'buyer' }, ttl: 1 })];
  assert.deepEqual([two.login, two.password, two.labels], ['bot-1', 'pw-1', { role: 'buyer' }]);
  await sleep(1500);
  assert.deepEqual((await held()).map((user) => user.login).sort(), [one.login, two.login].sort());
  assert.equal(await cy.end('passed'), null);
  assert.deepEqual(await held(), []);
});

test('of a test that went no way nothing is told, and of an account what it is', async () => {
  const cy = browser();
  await cy.bot();
  await cy.end('pending');
  await cy.bot();
  await cy.task('botfarm:end', 'bad-login');
  await cy.end('failed');
});

test('a user that was lost fails the test, and the others are given back', async () => {
  const cy = browser();
  const bot = await cy.bot();
  await cy.bot();
  await fetch(`${URL}/users/${bot.user.id}/lock`, { method: 'DELETE' });
  await assert.rejects(cy.end('failed'), new RegExp(`the lock on the user "${bot.login}" was lost: forced at 20`));
  assert.deepEqual(await held(), []);
  assert.equal(await cy.end('passed'), null);
});

test('what a browser left is given back after the spec, and after the run', async () => {
  await browser().bot();
  await events['after:spec']();
  assert.deepEqual(await held(), []);
  await browser().bot();
  await events['after:run']();
  assert.deepEqual(await held(), []);
});
