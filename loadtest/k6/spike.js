// @ts-check
// What does a burst do? A steady rate, for a while ten times of it, and the steady rate again. In the burst the gateway may
// turn chats away, as long as it says when to come back; before it and after it all must be well.
//
//   make load-k6 SCRIPT=spike RATE=10 SPIKE_RATE=200
//
// Settings, beside those of all scripts (docs/load-tools.md): RATE (5) and SPIKE_RATE (10 x RATE) in chats a second, BEFORE (30s),
// SPIKE (20s), AFTER (30s), RECOVERY (5s) between the burst's end and "after", VUS (400): most chats at once,
// MAX_SHED (0.5): share of the burst's chats that may be turned away.
import { chat, findModel, thresholds } from './lib/chat.js';
import { count, milliseconds, number, target } from './lib/settings.js';

const rate = count('RATE', 5, { most: 100_000 });
const spikeRate = count('SPIKE_RATE', 10 * rate, { least: rate, most: 100_000 });
const [before, spike, after] = [
  milliseconds('BEFORE', '30s'),
  milliseconds('SPIKE', '20s'),
  milliseconds('AFTER', '30s'),
];
const recovery = milliseconds('RECOVERY', '5s');
const vus = count('VUS', 400);

/**
 * @param {number} rate
 * @param {number} startMs
 * @param {number} lengthMs
 * @param {string} exec
 */
function arrivals(rate, startMs, lengthMs, exec) {
  return {
    executor: 'constant-arrival-rate',
    exec,
    rate,
    timeUnit: '1s',
    startTime: `${startMs}ms`,
    duration: `${lengthMs}ms`,
    gracefulStop: `${target.timeoutMs}ms`,
    preAllocatedVUs: Math.min(vus, 50),
    maxVUs: vus,
  };
}

export const options = {
  scenarios: {
    before: arrivals(rate, 0, before, 'steady'),
    spike: arrivals(spikeRate, before, spike, 'burst'),
    after: arrivals(rate, before + spike + recovery, after, 'steady'),
  },
  thresholds: {
    ...thresholds('scenario:before'),
    ...thresholds('scenario:after'),
    'http_req_failed{scenario:spike}': ['rate<=0.01'],
    'checks{scenario:spike}': ['rate>=0.99'],
    'penstock_shed{scenario:spike}': [`rate<=${number('MAX_SHED', 0.5, { most: 1 })}`],
  },
};

export const setup = findModel;

/** @param {{ model: string }} data */
export function steady({ model }) {
  chat(model);
}

/** @param {{ model: string }} data */
export function burst({ model }) {
  chat(model, { mayShed: true });
}
