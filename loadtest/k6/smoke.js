// @ts-check
// Does a gateway do what it should? A few users, each with models, a whole chat and a streamed one; nothing may fail.
//
//   make load-k6      or: k6 run -e BASE_URL=http://127.0.0.1:8081 loadtest/k6/smoke.js
//
// Settings, beside those of all scripts (docs/load-tools.md): VUS (4), ITERATIONS (40).
import { findModel, models, stream, thresholds, unary } from './lib/chat.js';
import { count } from './lib/settings.js';

export const options = {
  scenarios: {
    smoke: {
      executor: 'shared-iterations',
      vus: count('VUS', 4),
      iterations: count('ITERATIONS', 40),
      maxDuration: '2m',
    },
  },
  thresholds: { ...thresholds(), checks: ['rate==1'], http_req_failed: ['rate==0'] },
};

export const setup = findModel;

/** @param {{ model: string }} data */
export default function smoke({ model }) {
  models(model);
  unary(model);
  stream(model);
}
