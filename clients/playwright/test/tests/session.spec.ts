import { expect } from '@botfarm/playwright';
import { test } from './logged-in';

test.describe.configure({ mode: 'parallel' });

for (let number = 1; number <= 20; number++) {
  test(`${number} is logged in`, async ({ bot, page }) => {
    await page.goto(process.env.SHOP_URL!);
    await expect(page.getByRole('heading')).toHaveText(`Hello, ${bot.login}`);
    if (process.env.TEST_KILLED === String(number)) process.kill(process.pid, 'SIGKILL');
  });
}
