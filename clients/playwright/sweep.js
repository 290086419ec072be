'use strict';
/* The `globalSetup` of a run: one holder for all its workers, and what they left is given back once they are gone. */
const { randomUUID } = require('node:crypto');
const { hostname } = require('node:os');
const { Farm } = require('@botfarm/client');

module.exports = async () => {
  process.env.BOTFARM_HOLDER ||= `playwright/${hostname()}/${randomUUID()}`;
  const farm = new Farm();
  const tell = ({ message }) => console.error(`BotFarm: not swept, the ttl frees the users of this run: ${message}`);
  return () => farm.sweep().catch(tell);
};
