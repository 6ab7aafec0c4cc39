// k6 against a gateway: models, a unary chat, a streamed chat read to its end.
//
//   k6 run -e BASE_URL=http://127.0.0.1:8081 -e MODEL=sim-model [-e API_KEY=...] [-e VUS=4] [-e ITERATIONS=40] loadtest/k6/smoke.js
//
// k6 hands over a body when it is complete, so this checks what a stream says and how long it takes, not when each
// event came; token timing is the business of `penstock`'s own load generator.
import http from 'k6/http';
import { check } from 'k6';
import { Counter, Trend } from 'k6/metrics';

const base = (__ENV.BASE_URL || 'http://127.0.0.1:8081').replace(/\/+$/, '');
const apiKey = __ENV.API_KEY || '';
const maxTokens = Number(__ENV.MAX_TOKENS || 24);

const streamedEvents = new Counter('penstock_streamed_events');
const firstByte = new Trend('penstock_stream_first_byte', true);

export const options = {
  scenarios: {
    smoke: {
      executor: 'shared-iterations',
      vus: Number(__ENV.VUS || 4),
      iterations: Number(__ENV.ITERATIONS || 40),
      maxDuration: '2m',
    },
  },
  thresholds: {
    checks: ['rate==1'],
    http_req_failed: ['rate==0'],
    penstock_stream_first_byte: ['p(95)<5000'],
  },
};

function params(name) {
  const headers = { 'Content-Type': 'application/json' };
  if (apiKey) {
    headers.Authorization = `Bearer ${apiKey}`;
  }
  return { headers, tags: { name }, timeout: '60s' };
}

// What the `data:` lines of a server-sent event stream carry, in order.
function eventsOf(body) {
  return body
    .split(/\r?\n\r?\n/)
    .map((event) => event.trim())
    .filter((event) => event.startsWith('data:'))
    .map((event) => event.slice('data:'.length).trim());
}

export function setup() {
  const answer = http.get(`${base}/v1/models`, params('models'));
  if (answer.status !== 200) {
    throw new Error(`GET ${base}/v1/models answered ${answer.status}: ${answer.body || answer.error}`);
  }
  const names = answer.json('data').map((entry) => entry.id);
  const model = __ENV.MODEL || names[0];
  if (!names.includes(model)) {
    throw new Error(`the gateway serves ${JSON.stringify(names)}, not ${JSON.stringify(model)}`);
  }
  return { model };
}

export default function smoke({ model }) {
  const messages = [{ role: 'user', content: `Virtual user ${__VU}, turn ${__ITER}: tell me something.` }];

  const models = http.get(`${base}/v1/models`, params('models'));
  check(models, {
    'models: 200': (r) => r.status === 200,
    'models: lists the model': (r) => r.json('data').some((entry) => entry.id === model),
  });

  const unary = http.post(
    `${base}/v1/chat/completions`,
    JSON.stringify({ model, messages, max_tokens: maxTokens }),
    params('chat'),
  );
  check(unary, {
    'chat: 200': (r) => r.status === 200,
    'chat: JSON': (r) => (r.headers['Content-Type'] || '').startsWith('application/json'),
    'chat: has text': (r) => r.json('choices.0.message.content').length > 0,
    'chat: counts tokens': (r) => r.json('usage.completion_tokens') > 0,
  });

  const stream = http.post(
    `${base}/v1/chat/completions`,
    JSON.stringify({ model, messages, max_tokens: maxTokens, stream: true, stream_options: { include_usage: true } }),
    params('chat stream'),
  );
  const events = eventsOf(stream.body || '');
  const chunks = events.slice(0, -1).map((event) => JSON.parse(event));
  check(stream, {
    'stream: 200': (r) => r.status === 200,
    'stream: event-stream': (r) => (r.headers['Content-Type'] || '').startsWith('text/event-stream'),
    'stream: several events': () => events.length > 2,
    'stream: ends with [DONE]': () => events[events.length - 1] === '[DONE]',
    'stream: no error event': () => chunks.every((chunk) => chunk.error === undefined),
    'stream: has text': () => chunks.some((c) => c.choices.length > 0 && c.choices[0].delta.content),
    'stream: usage last': () => chunks.length > 0 && chunks[chunks.length - 1].usage.completion_tokens > 0,
  });
  streamedEvents.add(events.length);
  firstByte.add(stream.timings.waiting);
}
