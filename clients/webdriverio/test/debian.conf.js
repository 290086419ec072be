// The configuration of the README, with Debian's browser and driver.
import { config as readme } from './wdio.conf.js';

const args = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const [[service, filter]] = readme.services;

export const config = {
  ...readme,
  capabilities: [
    {
      browserName: 'chrome',
      'goog:chromeOptions': { binary: '/usr/bin/chromium', args },
      'wdio:chromedriverOptions': { binary: '/usr/bin/chromedriver' },
    },
  ],
  logLevel: 'error',
  maxInstances: 2,
  reporters: ['spec'],
  mochaOpts: { timeout: 60_000 },
  services: [[service, { ...filter, ttl: Number(process.env.TEST_TTL ?? 60), wait: 30 }]],
};
