'use strict';
const { test: base, expect } = require('@playwright/test');
const { Farm } = require('@botfarm/client');

const ACQUIRING = 330_000; // ms: a bot may be waited for longer than a test may take

exports.expect = expect;
exports.test = base.extend({
  botFilter: [{}, { scope: 'worker', option: true }],

  farm: [async ({}, use) => use(new Farm()), { scope: 'worker' }],

  bot: [
    async ({ farm, botFilter }, use) => {
      const bot = await farm.acquire(botFilter);
      // What nobody catches fails the test that runs, at once, and the tests behind it get a new worker and a new bot.
      bot.signal.addEventListener('abort', () => setImmediate(() => { throw bot.signal.reason; }));
      await use(bot);
      await bot.release();
    },
    { scope: 'worker', timeout: ACQUIRING },
  ],

  botState: [undefined, { scope: 'worker' }],

  storageState: ({ botState, storageState }, use) => use(botState ?? storageState),
});
