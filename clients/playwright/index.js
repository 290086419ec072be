'use strict';
const { test: base, expect } = require('@playwright/test');
const { Farm } = require('@botfarm/client');

const ACQUIRING = 330_000; // ms: a bot may be waited for longer than a test may take
const LOGGING_IN = 60_000; // ms: it takes no time of the first test

/** What nobody catches fails the test that runs, at once, and the tests behind it get a new worker and a new bot. */
function watch(bot) {
  const tell = () => setImmediate(() => { throw bot.signal.reason; });
  bot.signal.addEventListener('abort', tell);
  const release = bot.release.bind(bot);
  bot.release = async (told) => {
    const known = bot.signal.aborted; // and a test has failed of it
    bot.signal.removeEventListener('abort', tell); // it would come when the next test runs: who gives it back is told
    await release(told);
    if (!known) bot.signal.throwIfAborted();
  };
  return bot;
}

class Watched extends Farm {
  acquire = async (...asked) => watch(await super.acquire(...asked));
  acquireSet = async (...asked) => (await super.acquireSet(...asked)).map(watch);
}

exports.expect = expect;
exports.test = base.extend({
  botFilter: [{}, { scope: 'worker', option: true }],

  farm: [async ({}, use) => use(new Watched()), { scope: 'worker' }],

  bot: [
    async ({ farm, botFilter }, use) => {
      const bot = await farm.acquire({ prefer: 'session', ...botFilter });
      await use(bot);
      if (!bot.signal.aborted) await bot.release(); // else a test has failed of it
    },
    { scope: 'worker', timeout: ACQUIRING },
  ],

  botState: [undefined, { scope: 'worker' }],

  storageState: ({ botState, storageState }, use) => use(botState ?? storageState),
});

/** A `botState`: the session that is kept with the bot; where there is none that works, what `login` gives, kept. */
exports.loggedIn = (login, { ttl, works = () => true } = {}) => [
  async ({ bot, browser }, use) => {
    const visit = async (storageState, look) => {
      const page = await browser.newPage({ storageState });
      try {
        return await look({ bot, page });
      } finally {
        await page.close();
      }
    };
    let state = await bot.session();
    if (!state || !(await visit(state, works))) {
      state = await visit(undefined, async (on) => (await login(on)) ?? on.page.context().storageState());
      // A session spares a login, and that is all: a test does not fail because one can't be kept.
      const tell = ({ message }) => console.warn(`BotFarm: the session of ${bot.login} is not kept: ${message}`);
      await bot.storeSession(state, { ttl }).catch(tell);
    }
    await use(state);
  },
  { scope: 'worker', timeout: LOGGING_IN },
];
