import { expect, test } from '@botfarm/playwright';

test.describe.configure({ mode: 'parallel' });

for (const name of ['one', 'two', 'three', 'four']) {
  test(name, async ({ bot, farm }) => {
    expect(bot.password).toBe(bot.login.replace('bot', 'pw'));
    const other = await farm.acquire({ project_id: process.env.BOTFARM_PROJECT, ttl: 5 });
    expect(other.login).not.toBe(bot.login);
    await other.release();
  });
}

test.skip('types', ({ bot }) => {
  // @ts-expect-error: it is no `any`
  bot.nothing();
  bot.lock.note.trim();
  // @ts-expect-error: there is none where only hashes are stored
  bot.password.length;
});
