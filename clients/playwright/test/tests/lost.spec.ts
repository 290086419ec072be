import { test } from '@botfarm/playwright';

test('loses its user', async ({ bot, page }) => {
  test.setTimeout(180_000);
  await fetch(`${process.env.BOTFARM_URL}/users/${bot.user.id}/lock`, { method: 'DELETE' });
  await page.getByText('never there').waitFor();
});

test('has another', ({ bot }) => console.log(`then ${bot.login}`));
