import { browser } from '@wdio/globals';

it('holds its user', async () => {
  console.log(`worker ${process.pid} holds ${browser.bot.login}`);
  await new Promise((done) => setTimeout(done, 50_000));
});
