import { test } from '@botfarm/playwright';

test('holds its user', async ({ bot }) => {
  console.log(`worker ${process.pid} holds ${bot.login}`);
  await new Promise((done) => setTimeout(done, 1000 * Number(process.env.TEST_SECONDS ?? 18)));
});
