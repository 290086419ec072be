// The configuration of the README, with Debian's browser.
import readme from './playwright.config';

const args = ['--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync'];

export default {
  ...readme,
  testDir: 'tests',
  reporter: 'line',
  timeout: 1000 * Number(process.env.TEST_TIMEOUT ?? 20),
  use: {
    ...readme.use,
    botFilter: { ...readme.use?.botFilter, ttl: Number(process.env.TEST_TTL ?? 60), wait: 30 },
    launchOptions: { executablePath: '/usr/bin/chromium', args: ['--no-sandbox', ...args] },
  },
};
