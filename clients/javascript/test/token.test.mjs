import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Farm } from '@botfarm/client';

const project_id = process.env.BOTFARM_PROJECT;

test('a token is had when one is asked for', async () => {
  const bot = await new Farm().acquire({ project_id });
  await bot.release();
});

test('a wrong secret is refused, and told', async () => {
  const farm = new Farm({ clientSecret: 'wrong' });
  await assert.rejects(farm.acquire({ project_id }), { slug: 'invalid_client', message: /POST .*\/token: / });
});

test('without one the service says what it wants', async () => {
  await assert.rejects(new Farm({ env: { BOTFARM_URL: process.env.BOTFARM_URL } }).acquire({ project_id }), { status: 401 });
});
