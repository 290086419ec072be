import { browser, expect } from '@wdio/globals';

it('fails', () => expect(browser.bot.login).toBe('nobody'));
