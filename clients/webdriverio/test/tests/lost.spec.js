import { $, browser } from '@wdio/globals';

it('loses its user', async () => {
  await fetch(`${process.env.BOTFARM_URL}/users/${browser.bot.user.id}/lock`, { method: 'DELETE' });
  await $('#never').waitForExist({ timeout: 50_000 });
});
