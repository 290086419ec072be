import { sleep } from 'k6';
import { acquire, bot, release } from './botfarm.js';

export const options = { vus: 2, duration: '60s', gracefulStop: '0s', setupTimeout: '120s' };

export function setup() {
  const [count, wait] = [Number(__ENV.TEST_COUNT || 2), Number(__ENV.TEST_WAIT || 1)];
  return acquire({ project_id: __ENV.BOTFARM_PROJECT, count, ttl: 3, wait });
}

export default function (data) {
  console.log(`holds ${bot(data).login}`);
  sleep(10);
}

export function teardown(data) {
  release(data);
}
