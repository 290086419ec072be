/* A service of WebdriverIO: a user for each session, as `browser.bot`. */
import { randomUUID } from 'node:crypto';
import { hostname } from 'node:os';
import { Farm } from '@botfarm/client';

/** In the launcher: one holder for all workers, and what they left is given back once they are gone. */
export class launcher {
  onPrepare() {
    process.env.BOTFARM_HOLDER ||= `webdriverio/${hostname()}/${randomUUID()}`;
    this.farm = new Farm();
  }

  async onComplete() {
    const tell = ({ message }) => console.error(`BotFarm: not swept, the ttl frees the users of this run: ${message}`);
    await this.farm?.sweep().catch(tell); // there is none where its URL was none
  }
}

/** In each worker. */
export default class BotService {
  constructor(filter) {
    this.filter = filter;
  }

  async beforeSession() {
    try {
      this.bot = await new Farm().acquire(this.filter);
    } catch (refused) {
      this.refused = refused; // WebdriverIO only logs what a hook throws: the tests tell instead
      return;
    }
    // What nobody catches fails the test that runs, at once.
    this.bot.signal.addEventListener('abort', () => setImmediate(() => { throw this.bot.signal.reason; }));
  }

  before(capabilities, specs, browser) {
    const get = () => {
      if (this.refused) throw this.refused;
      this.bot.signal.throwIfAborted();
      return this.bot;
    };
    Object.defineProperty(browser, 'bot', { get, configurable: true });
  }

  /** How the tests of the session went; not called where there was no browser. */
  after(failures) {
    this.outcome = failures ? 'failed' : 'passed';
  }

  async afterSession() {
    await this.bot?.release({ outcome: this.outcome });
  }
}
