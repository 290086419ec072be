import { sleep } from 'k6';
import { acquire, bot, release } from './botfarm.js';

export const options = { vus: 2, duration: '60s', gracefulStop: '0s' };

export function setup() {
  return acquire({ project_id: __ENV.BOTFARM_PROJECT, count: Number(__ENV.TEST_COUNT || 2), ttl: 3, wait: 1 });
}

export default function (data) {
  console.log(`holds ${bot(data).login}`);
  sleep(10);
}

export function teardown(data) {
  release(data);
}
