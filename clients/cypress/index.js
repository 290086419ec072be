'use strict';
/* Cypress runs a spec in the browser; users are held here, in its Node.js process, and asked for by tasks. */
const { randomUUID } = require('node:crypto');
const { hostname } = require('node:os');
const { Farm } = require('@botfarm/client');

const OUTCOMES = ['passed', 'failed', 'bad-login'];

/** For `setupNodeEvents`: `filter` is what all bots have in common. */
module.exports = function botfarm(on, filter = {}) {
  const farm = new Farm({ holder: process.env.BOTFARM_HOLDER || `cypress/${hostname()}/${randomUUID()}` });
  const held = new Map();

  const release = async (bots, outcome) => {
    for (const bot of bots) held.delete(bot.lock.id);
    await Promise.all(bots.map((bot) => bot.release({ outcome })));
  };

  on('task', {
    'botfarm:acquire': async (more) => {
      const bot = await farm.acquire({ ...filter, ...more });
      held.set(bot.lock.id, bot);
      return { login: bot.login, password: bot.password, labels: bot.labels, user: bot.user, lock: bot.lock };
    },
    /** After each test: what it asked for is given back, with how it went, and a user that was lost fails it. */
    'botfarm:end': async (state) => {
      const bots = [...held.values()];
      await release(bots, OUTCOMES.find((outcome) => outcome === state));
      for (const { signal } of bots) signal.throwIfAborted();
      return null;
    },
  });

  // What a spec left that was stopped; and at the end what a browser left that died.
  on('after:spec', () => release([...held.values()]));
  on('after:run', async () => {
    const tell = ({ message }) => console.error(`BotFarm: not swept, the ttl frees the users of this run: ${message}`);
    await farm.sweep().catch(tell);
  });
};
