import { expect } from '@botfarm/playwright';
import { test } from './logged-in';

for (const name of ['first', 'second']) {
  test(`the ${name} is logged in`, async ({ bot, context }) => {
    expect(await context.cookies('http://shop.example')).toMatchObject([{ name: 'session', value: bot.login }]);
  });
}
