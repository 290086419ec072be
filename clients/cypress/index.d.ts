import type { Bot, Filter } from '@botfarm/client';

declare global {
  namespace Cypress {
    interface Chainable {
      /** A user for this test. */
      bot(filter?: Filter): Chainable<Pick<Bot, 'login' | 'password' | 'labels' | 'user' | 'lock'>>;
    }
  }
}

declare function botfarm(on: (event: any, action: any) => void, filter?: Filter): void;
export = botfarm;
