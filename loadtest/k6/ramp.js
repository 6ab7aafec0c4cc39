// @ts-check
// Up to which rate does a gateway keep its promises? The rate of new chats grows, stays, and falls; arrivals do not wait for answers
// (open loop), so a gateway that falls behind shows it.
//
//   make load-k6 SCRIPT=ramp RATE=50
//
// Settings, beside those of all scripts (docs/load-tools.md): START_RATE (1) and RATE (20) in chats a second, RAMP (1m) for the way
// up, HOLD (1m), VUS (200): most chats at once.
import { chat, findModel, thresholds } from './lib/chat.js';
import { count, milliseconds, number } from './lib/settings.js';

const rate = count('RATE', 20, { most: 100_000 });
const ramp = milliseconds('RAMP', '1m');

export const options = {
  scenarios: {
    ramp: {
      executor: 'ramping-arrival-rate',
      startRate: number('START_RATE', 1, { most: rate, whole: true }),
      timeUnit: '1s',
      preAllocatedVUs: Math.min(count('VUS', 200), 50),
      maxVUs: count('VUS', 200),
      stages: [
        { target: rate, duration: `${ramp}ms` },
        { target: rate, duration: `${milliseconds('HOLD', '1m')}ms` },
        { target: 0, duration: `${Math.max(1, Math.round(ramp / 4))}ms` },
      ],
    },
  },
  // A chat that could not even begin, for want of users, is one the gateway was too slow for.
  thresholds: { ...thresholds(), dropped_iterations: ['count==0'] },
};

export const setup = findModel;

/** @param {{ model: string }} data */
export default function rising({ model }) {
  chat(model);
}
