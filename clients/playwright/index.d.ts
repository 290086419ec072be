import type { Browser, BrowserContextOptions, Page, test as base } from '@playwright/test';
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
  /** What a context of a bot that is logged in starts with: override it with `loggedIn`. */
  botState: BrowserContextOptions['storageState'];
}

type State = Exclude<BrowserContextOptions['storageState'], string | undefined>;
type Look<Found> = (on: { bot: Bot; page: Page }) => Promise<Found>;

/**
 * A `botState`: the session that is kept with the bot, so that who has it next need not log in. Where there is none, or
 * it does not pass `works`, `login` makes one, which is kept for `ttl` seconds (a day). What `login` returns is the state;
 * the page's storage state if it returns nothing.
 */
export function loggedIn(
  login: Look<State | void>,
  options?: { ttl?: number; works?: Look<boolean> },
): [(fixtures: { bot: Bot; browser: Browser }, use: (state: State) => Promise<void>) => Promise<void>, { scope: 'worker'; timeout: number }];

export const test: ReturnType<typeof base.extend<{}, BotFixtures>>;
