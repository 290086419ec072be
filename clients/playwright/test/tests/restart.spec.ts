import { expect, test } from '@botfarm/playwright';

test('fails', ({ bot }) => expect(bot.login).toBe('nobody'));

test('gets a worker and a user again', ({ bot }) => expect(bot.login).toMatch(/^bot-/));
