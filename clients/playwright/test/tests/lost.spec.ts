import { test } from '@botfarm/playwright';
import type { Bot } from '@botfarm/playwright';

const force = ({ user }: Bot) => fetch(`${process.env.BOTFARM_URL}/users/${user.id}/lock`, { method: 'DELETE' });

test('loses its user', async ({ bot, page }) => {
  test.setTimeout(180_000);
  await force(bot);
  await page.getByText('never there').waitFor();
});

test('loses one of several', async ({ farm, page }) => {
  test.setTimeout(180_000);
  await force(await farm.acquire({ project_id: process.env.BOTFARM_PROJECT!, ttl: 3 }));
  await page.getByText('never there').waitFor();
});

test('loses one as it gives it back', async ({ farm }) => {
  const other = await farm.acquire({ project_id: process.env.BOTFARM_PROJECT! });
  await force(other);
  await other.release();
});

test('has another', ({ bot }) => console.log(`then ${bot.login}`));

test('ends before that is known', async ({ bot }) => {
  await force(bot);
});
