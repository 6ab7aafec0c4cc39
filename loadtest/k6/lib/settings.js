// @ts-check
// Settings from the environment. What cannot be used is refused in words, before anything is sent.

/**
 * @param {string} name
 * @param {string} wanted what it must be
 * @returns {never}
 */
function refuse(name, wanted) {
  throw new Error(`${name} is ${JSON.stringify(__ENV[name])}; it must be ${wanted}`);
}

/**
 * A number from `least` to `most`; whole, if `whole`.
 *
 * @param {string} name
 * @param {number} fallback
 * @param {{ least?: number, most?: number, whole?: boolean }} [range]
 */
export function number(name, fallback, { least = 0, most = 1e9, whole = false } = {}) {
  const text = __ENV[name];
  if (text === undefined || text === '') {
    return fallback;
  }
  const value = Number(text);
  if (!(value >= least && value <= most) || (whole && !Number.isInteger(value))) {
    refuse(name, `a ${whole ? 'whole ' : ''}number from ${least} to ${most}`);
  }
  return value;
}

/**
 * A whole number.
 *
 * @param {string} name
 * @param {number} fallback
 * @param {{ least?: number, most?: number }} [range]
 */
export function count(name, fallback, range = {}) {
  return number(name, fallback, { least: 1, ...range, whole: true });
}

const UNITS = { ms: 1, s: 1_000, m: 60_000, h: 3_600_000 };

/**
 * A time such as `90s`, `1m30s` or `500ms`, in milliseconds.
 *
 * @param {string} name
 * @param {string} fallback
 */
export function milliseconds(name, fallback) {
  const text = __ENV[name] || fallback;
  if (!/^(\d+(\.\d+)?(ms|s|m|h))+$/.test(text)) {
    refuse(name, 'a time such as 500ms, 30s or 1m30s');
  }
  let sum = 0;
  for (const [, value, unit] of text.matchAll(/(\d+(?:\.\d+)?)(ms|s|m|h)/g)) {
    sum += Number(value) * UNITS[/** @type {keyof typeof UNITS} */ (unit)];
  }
  if (sum < 1) {
    refuse(name, 'longer than 0');
  }
  return Math.round(sum);
}

function baseUrl() {
  const text = __ENV.BASE_URL || 'http://127.0.0.1:8081';
  if (!/^https?:\/\/[^/\s]+(\/\S*)?$/.test(text)) {
    refuse('BASE_URL', 'http://HOST:PORT or https://HOST:PORT');
  }
  return text.replace(/\/+$/, '').replace(/\/v1$/, '');
}

// Where requests go, and what they are.
export const target = {
  base: baseUrl(),
  /** Empty: the first that the gateway lists. */
  model: __ENV.MODEL || '',
  apiKey: __ENV.API_KEY || '',
  maxTokens: count('MAX_TOKENS', 24, { most: 1_000_000 }),
  promptBytes: count('PROMPT_BYTES', 200, { most: 32 << 20 }),
  /** Of all chats, those that are streams. */
  streamShare: number('STREAM_SHARE', 0.5, { most: 1 }),
  timeoutMs: milliseconds('TIMEOUT', '60s'),
};

// What makes a run fail.
export const limits = {
  /** Share of requests that fail. */
  failed: number('MAX_FAILED', 0.001, { most: 1 }),
  /** Time to the first token of a stream, p95. */
  ttftMs: milliseconds('MAX_TTFT', '2s'),
  /** Time to the end of a chat, p95. */
  durationMs: milliseconds('MAX_DURATION', '10s'),
  /** Tokens a second of one stream, p5: all but the slowest get as many. */
  tokensPerS: number('MIN_TOKENS_PER_S', 5, { most: 1e6 }),
};
