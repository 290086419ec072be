import type { Bot, Filter } from '@botfarm/client';

declare global {
  namespace WebdriverIO {
    interface Browser {
      /** The user of this session. */
      readonly bot: Bot;
    }
    interface MultiRemoteBrowser {
      readonly bot: Bot;
    }
  }
}

export default class BotService {
  constructor(filter: Filter);
}
export class launcher {}
