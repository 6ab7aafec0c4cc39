// @ts-check
// Does a gateway stay as it is? A steady rate for a long time, judged by quarters: what leaks or wears out is worse in the
// last than in the first.
//
//   make load-k6 SCRIPT=soak DURATION=8h
//
// Settings, beside those of all scripts (docs/load-tools.md): DURATION (1h), RATE (10) in chats a second, VUS (200): most at once.
import exec from 'k6/execution';
import { chat, findModel, thresholds } from './lib/chat.js';
import { count, milliseconds } from './lib/settings.js';

const QUARTERS = [1, 2, 3, 4];
const duration = milliseconds('DURATION', '1h');
const vus = count('VUS', 200);

export const options = {
  scenarios: {
    soak: {
      executor: 'constant-arrival-rate',
      rate: count('RATE', 10, { most: 100_000 }),
      timeUnit: '1s',
      duration: `${duration}ms`,
      preAllocatedVUs: Math.min(vus, 50),
      maxVUs: vus,
    },
  },
  thresholds: QUARTERS.map((quarter) => thresholds(`quarter:${quarter}`)).reduce(
    (all, those) => ({ ...all, ...those }),
    /** @type {Record<string, string[]>} */ ({ dropped_iterations: ['count==0'] }),
  ),
};

export const setup = findModel;

/** @param {{ model: string }} data */
export default function soak({ model }) {
  const past = Date.now() - exec.scenario.startTime;
  const quarter = Math.min(QUARTERS.length, 1 + Math.floor((past / duration) * QUARTERS.length));
  exec.vu.metrics.tags.quarter = String(quarter);
  chat(model);
}
