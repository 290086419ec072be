import type { BrowserContextOptions, test as base } from '@playwright/test';
import type { Bot, Farm, Filter } from '@botfarm/client';

export { expect } from '@playwright/test';
export type { Bot, Farm, Filter };

export interface BotOptions {
  /** Which user: `use: { botFilter: {…} }` in the configuration, or `test.use` at the top of a file. */
  botFilter: Filter;
}

export interface BotFixtures extends BotOptions {
  farm: Farm;
  /** The user of this worker: acquired for the first test that asks, renewed, and given back at the worker's end. */
  bot: Bot;
  /** What a context of a bot that is logged in starts with. Override it to log in once for each worker. */
  botState: BrowserContextOptions['storageState'];
}

export const test: ReturnType<typeof base.extend<{}, BotFixtures>>;
