// @ts-check
// Chats with a gateway: what is sent, what must come back, and what is measured.
//
// k6 hands over a body when it is complete, a stream's too. So it can check what a stream says, when its first byte came
// and how long it took, but not when each event came: for that there is `penstock load`. A gateway answers a stream when it has
// the first event, so the first byte is the first token.
import http from 'k6/http';
import { check } from 'k6';
import { Counter, Rate, Trend } from 'k6/metrics';
import { limits, target } from './settings.js';

const SENTENCE = 'The sluice opens, and the water of the mill race turns the wheel. ';
const PROMPT = SENTENCE.repeat(Math.ceil(target.promptBytes / SENTENCE.length)).slice(0, target.promptBytes);

/** Tokens that came, by the answers' own count; k6 shows their rate over the run. */
const tokens = new Counter('penstock_tokens');
/** Events of streams. */
const events = new Counter('penstock_streamed_events');
/** Time to the first token of streams. */
const ttft = new Trend('penstock_ttft', true);
/** Tokens a second of each stream, from its first token to its last. */
const tokensPerS = new Trend('penstock_tokens_per_s');
/** Requests that the gateway had no room for and said so: 429 or 503 with Retry-After. */
const shed = new Rate('penstock_shed');

/**
 * Thresholds that every script has; `tag` makes them those of the requests that are tagged so.
 *
 * @param {string} [tag] such as `part:1`
 * @returns {Record<string, string[]>}
 */
export function thresholds(tag) {
  const of = (/** @type {string[]} */ ...tags) => {
    const all = tag ? [...tags, tag] : tags;
    return all.length > 0 ? `{${all.join(',')}}` : '';
  };
  return {
    [`checks${of()}`]: [`rate>=${1 - limits.failed}`],
    [`http_req_failed${of()}`]: [`rate<=${limits.failed}`],
    [`http_req_waiting${of('kind:stream')}`]: [`p(95)<${limits.ttftMs}`],
    [`http_req_duration${of('kind:unary')}`]: [`p(95)<${limits.durationMs}`],
    [`http_req_duration${of('kind:stream')}`]: [`p(95)<${limits.durationMs}`],
    [`penstock_tokens_per_s${of()}`]: [`p(5)>=${limits.tokensPerS}`],
  };
}

/** @param {string} kind */
function params(kind) {
  /** @type {Record<string, string>} */
  const headers = { 'Content-Type': 'application/json' };
  if (target.apiKey) {
    headers.Authorization = `Bearer ${target.apiKey}`;
  }
  return { headers, tags: { kind, name: kind }, timeout: target.timeoutMs };
}

/**
 * What the `data:` lines of a server-sent event stream carry, in order.
 *
 * @param {string} body
 */
function eventsOf(body) {
  return body
    .split(/\r?\n\r?\n/)
    .map((event) => event.trim())
    .filter((event) => event.startsWith('data:'))
    .map((event) => event.slice('data:'.length).trim());
}

/**
 * JSON, or nothing if it is none: a check then fails instead of the script.
 *
 * @param {string} text
 * @returns {any}
 */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** @param {import('k6/http').RefinedResponse<'text'>} response */
const isShed = (response) =>
  (response.status === 429 || response.status === 503) && response.headers['Retry-After'] !== undefined;

/**
 * The model that is asked for: MODEL, or the first that the gateway lists. For `setup`, so that a gateway that is not there, or a
 * model that is not served, ends the run before it begins.
 *
 * @returns {{ model: string }}
 */
export function findModel() {
  const answer = http.get(`${target.base}/v1/models`, { ...params('models'), responseType: 'text' });
  if (answer.status !== 200) {
    throw new Error(`GET ${target.base}/v1/models answered ${answer.status}: ${answer.body || answer.error}`);
  }
  const listed = parsed(answer.body);
  const names = ((listed && listed.data) || []).map((/** @type {{ id: string }} */ entry) => entry.id);
  const model = target.model || names[0];
  if (!model || !names.includes(model)) {
    throw new Error(`the gateway serves ${JSON.stringify(names)}, not ${JSON.stringify(model || 'any model')}`);
  }
  return { model };
}

/** @param {string} model */
export function models(model) {
  const answer = http.get(`${target.base}/v1/models`, { ...params('models'), responseType: 'text' });
  const listed = parsed(answer.body);
  check(answer, {
    'models: 200': (r) => r.status === 200,
    'models: lists the model': () =>
      Array.isArray(listed?.data) && listed.data.some((/** @type {{ id: string }} */ entry) => entry.id === model),
  });
}

/**
 * Sends a chat; nothing comes back if the gateway had no room for it, which only `mayShed` lets pass.
 *
 * @param {string} model
 * @param {string} kind
 * @param {object} more members of the request
 * @param {boolean} mayShed
 */
function send(model, kind, more, mayShed) {
  const content = `Virtual user ${__VU}, turn ${__ITER}: ${PROMPT}`;
  const body = { model, messages: [{ role: 'user', content }], max_tokens: target.maxTokens, ...more };
  const answer = http.post(`${target.base}/v1/chat/completions`, JSON.stringify(body), {
    ...params(kind),
    responseType: 'text',
    responseCallback: mayShed ? http.expectedStatuses(200, 429, 503) : http.expectedStatuses(200),
  });
  const full = isShed(answer);
  shed.add(full);
  return mayShed && full ? undefined : answer;
}

/**
 * A chat whose answer comes whole.
 *
 * @param {string} model
 * @param {{ mayShed?: boolean }} [how]
 */
export function unary(model, { mayShed = false } = {}) {
  const answer = send(model, 'unary', {}, mayShed);
  if (answer === undefined) {
    return;
  }
  const said = parsed(answer.body);
  const completion = said?.usage?.completion_tokens;
  check(answer, {
    'chat: 200': (r) => r.status === 200,
    'chat: JSON': (r) => (r.headers['Content-Type'] || '').startsWith('application/json'),
    'chat: has text': () => (said?.choices?.[0]?.message?.content ?? '').length > 0,
    'chat: counts tokens': () => completion > 0,
  });
  tokens.add(completion > 0 ? completion : 0);
}

/**
 * A chat whose answer is streamed, read to its end.
 *
 * @param {string} model
 * @param {{ mayShed?: boolean }} [how]
 */
export function stream(model, { mayShed = false } = {}) {
  const answer = send(model, 'stream', { stream: true, stream_options: { include_usage: true } }, mayShed);
  if (answer === undefined) {
    return;
  }
  const said = eventsOf(answer.body || '');
  const chunks = said.slice(0, -1).map(parsed);
  const completion = chunks[chunks.length - 1]?.usage?.completion_tokens;
  const whole = check(answer, {
    'stream: 200': (r) => r.status === 200,
    'stream: event-stream': (r) => (r.headers['Content-Type'] || '').startsWith('text/event-stream'),
    'stream: several events': () => said.length > 2,
    'stream: ends with [DONE]': () => said[said.length - 1] === '[DONE]',
    'stream: no error event': () => chunks.every((chunk) => chunk !== undefined && chunk.error === undefined),
    'stream: has text': () => chunks.some((chunk) => chunk?.choices?.[0]?.delta?.content),
    'stream: usage last': () => completion > 0,
  });
  events.add(said.length);
  if (whole) {
    tokens.add(completion);
    ttft.add(answer.timings.waiting);
    // The first token's time is the wait's; a stream that came at once says nothing of the engine's pace.
    if (completion > 1 && answer.timings.receiving > 0) {
      tokensPerS.add(((completion - 1) * 1_000) / answer.timings.receiving);
    }
  }
}

/**
 * A chat of either kind, by STREAM_SHARE.
 *
 * @param {string} model
 * @param {{ mayShed?: boolean }} [how]
 */
export function chat(model, how) {
  if (Math.random() < target.streamShare) {
    stream(model, how);
  } else {
    unary(model, how);
  }
}
