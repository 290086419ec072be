import { expect, loggedIn, test as base } from '@botfarm/playwright';

const test = base.extend({
  botState: loggedIn(
    async ({ bot, page }) => {
      console.log(`${bot.login} logs in`);
      await page.context().addCookies([{ name: 'name', value: bot.login, url: 'http://shop.example' }]);
      const state = await page.context().storageState();
      const large = { name: 'large', value: 'x'.repeat(Number(process.env.TEST_LARGE ?? 0)) };
      return { ...state, origins: [{ origin: 'http://shop.example', localStorage: [large] }] };
    },
    { works: async ({ bot, page }) => (await page.context().cookies())[0].value === bot.login && !process.env.TEST_STALE },
  ),
});

for (const name of ['first', 'second']) {
  test(`the ${name} is logged in`, async ({ bot, context }) => {
    expect(await context.cookies('http://shop.example')).toMatchObject([{ name: 'name', value: bot.login }]);
  });
}
