// The official openai client for JavaScript against a gateway, unmodified: one line per check, exit code 1 if any failed.
//
//     node openai_client.mjs       BASE_URL (without /v1), MODEL, API_KEY and PENSTOCK_UP come from the environment
//
// What needs simulated engines (the exact text, faults) is left out, in words, when PENSTOCK_UP does not name them.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";

import OpenAI from "openai";

const SETTLE_MS = 20_000;
const { BASE_URL: url = "", API_KEY: apiKey = "none", PENSTOCK_UP: up = "{}" } = process.env;
if (!url) {
    console.error("BASE_URL is not set");
    process.exit(2);
}
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, timeout: 60_000, maxRetries: 0 });
const engines = (JSON.parse(up).engines ?? []).map((engine) => engine.address);
const model = process.env.MODEL || (await client.models.list()).data[0].id;

class NeedsSimulator extends Error {}

const user = (content) => [{ role: "user", content }];
const chat = (content, more = {}, options = {}) =>
    client.chat.completions.create({ model, messages: user(content), max_tokens: 20, ...more }, options);

/** One request straight to an engine. */
async function ask(address, method, path, body) {
    const headers = { "content-type": "application/json" };
    const answer = await fetch(`http://${address}${path}`, { method, headers, body: body && JSON.stringify(body) });
    assert.equal(answer.status, 200, `${path} of an engine`);
    return answer.json();
}

/** What an engine answers when it is asked directly: simulated tokens follow from the request alone. */
async function sameText(got, content) {
    assert.ok(got, "no text");
    if (engines.length === 0) return;
    const body = { model, messages: user(content), max_tokens: 20 };
    const truth = await ask(engines[0], "POST", "/v1/chat/completions", body);
    assert.equal(got, truth.choices[0].message.content);
}

async function withFault(fault, action) {
    if (engines.length === 0) throw new NeedsSimulator();
    try {
        for (const engine of engines) await ask(engine, "POST", "/sim/faults", fault);
        return await action();
    } finally {
        for (const engine of engines) await ask(engine, "DELETE", "/sim/faults");
    }
}

async function untilIdle() {
    const deadline = performance.now() + SETTLE_MS;
    for (;;) {
        const states = await Promise.all(engines.map((engine) => ask(engine, "GET", "/sim/state")));
        const busy = states.reduce((sum, state) => sum + state.in_flight + state.running + state.waiting, 0);
        if (busy === 0) return;
        assert.ok(performance.now() < deadline, `${busy} requests still run long after their client left`);
        await sleep(10);
    }
}

/** The error of exactly this class that `action` ends with. */
async function raises(kind, action) {
    let answer;
    try {
        answer = await action();
    } catch (error) {
        assert.equal(error.constructor.name, kind.name, `${error}`);
        return error;
    }
    assert.fail(`answered instead of ${kind.name}: ${JSON.stringify(answer)}`);
}

const checks = {
    async models() {
        const names = [];
        for await (const entry of client.models.list()) names.push(entry.id);
        assert.ok(names.includes(model), `${model} is not in ${names}`);
        assert.equal((await client.models.retrieve(model)).id, model);
        return names.join(", ");
    },
    async chat() {
        const { data, request_id: id } = await chat("Say something.").withResponse();
        assert.ok(id, "no x-request-id");
        assert.ok(data.usage.completion_tokens > 0 && data.usage.completion_tokens <= 20, data.usage);
        await sameText(data.choices[0].message.content, "Say something.");
        return `${data.usage.completion_tokens} tokens`;
    },
    async "chat, streaming"() {
        const stream = await chat("Count to twenty.", { stream: true, stream_options: { include_usage: true } });
        let text = "";
        let chunks = 0;
        let usage;
        for await (const chunk of stream) {
            chunks += 1;
            text += chunk.choices[0]?.delta.content ?? "";
            usage = chunk.usage ?? usage;
        }
        assert.ok(chunks > 2, `${chunks} chunks: not a stream`);
        assert.ok(usage?.completion_tokens > 0, "no usage although stream_options asked for it");
        await sameText(text, "Count to twenty.");
        return `${chunks} chunks`;
    },
    async "chat, stream helper"() {
        const runner = client.chat.completions.stream({ model, messages: user("Stream."), max_tokens: 20 });
        let text = "";
        runner.on("content", (delta) => (text += delta));
        const message = await runner.finalMessage();
        assert.equal(message.content, text);
        await sameText(text, "Stream.");
        return `${text.length} characters`;
    },
    async "completions, streaming"() {
        const body = { model, prompt: "Once upon a time", max_tokens: 16 };
        let text = "";
        for await (const chunk of await client.completions.create({ ...body, stream: true })) {
            text += chunk.choices[0]?.text ?? "";
        }
        assert.ok(text, "no text");
        if (engines.length > 0) {
            assert.equal(text, (await ask(engines[0], "POST", "/v1/completions", body)).choices[0].text);
        }
        return `${text.length} characters`;
    },
    async "responses, streaming"() {
        const body = { model, input: "Say something.", max_output_tokens: 20, stream: true };
        let text = "";
        let last;
        for await (const event of await client.responses.create(body)) {
            if (event.type === "response.output_text.delta") text += event.delta;
            last = event.type;
        }
        assert.ok(["response.completed", "response.incomplete"].includes(last), last);
        if (engines.length > 0) await sameText(text, "Say something.");
        return last;
    },
    async embeddings() {
        const { data } = await client.embeddings.create({ model, input: ["a line", "another line"] });
        assert.deepEqual(data.map((entry) => entry.index), [0, 1]);
        assert.ok(data[0].embedding.length > 1 && data[0].embedding.every(Number.isFinite), "no vector");
        assert.notDeepEqual(data[0].embedding, data[1].embedding);
        return `2 vectors of ${data[0].embedding.length}`;
    },
    async "audio, transcription"() {
        if (engines.length === 0) throw new NeedsSimulator();
        const sound = Buffer.alloc(1_000_000, "sound");
        const heard = async (by) => {
            const file = await OpenAI.toFile(sound, "sound.wav", { type: "audio/wav" });
            return (await by.audio.transcriptions.create({ model, file })).text;
        };
        const text = await heard(client);
        assert.ok(text, "nothing was heard");
        assert.equal(text, await heard(client.withOptions({ baseURL: `http://${engines[0]}/v1` })));
        return `${sound.length} bytes`;
    },
    async "bad requests"() {
        const unknown = await raises(OpenAI.NotFoundError, () => chat("x", { model: "no-such-model" }));
        assert.equal(unknown.code, "model_not_found");
        const wrong = await raises(OpenAI.BadRequestError, () => chat("x", { messages: "not a list" }));
        assert.match(wrong.message, /messages/);
        const nameless = await raises(OpenAI.BadRequestError, () => chat("x", { model: undefined }));
        assert.equal(nameless.param, "model");
        return "NotFoundError, BadRequestError";
    },
    async keys() {
        if (apiKey === "none") return "the gateway is open";
        const stranger = client.withOptions({ apiKey: "not-the-key" });
        const error = await raises(OpenAI.AuthenticationError, () => stranger.models.list());
        assert.equal(error.code, "invalid_api_key");
        return "AuthenticationError";
    },
    async "engine's errors"() {
        const failsWith = (kind, fault, more) => withFault(fault, () => raises(kind, () => chat("x", more)));
        await failsWith(OpenAI.RateLimitError, { kind: "status", status: 429 });
        await failsWith(OpenAI.InternalServerError, { kind: "status", status: 500 });
        await failsWith(OpenAI.InternalServerError, { kind: "busy" }, { stream: true });
        return "429, 500 and 503 as their classes";
    },
    async "broken streams"() {
        for (const kind of ["reset", "error"]) {
            await withFault({ kind, after_tokens: 5 }, async () => {
                let text = "";
                const read = async () => {
                    for await (const chunk of await chat("Break.", { stream: true })) {
                        text += chunk.choices[0]?.delta.content ?? "";
                    }
                };
                await raises(OpenAI.APIError, read);
                assert.ok(text, `${kind}: nothing came before the break`);
            });
        }
        return "APIError after a reset and after an error event";
    },
    async "32 streams at once"() {
        const one = async (index) => {
            let text = "";
            for await (const chunk of await chat(`Question ${index}`, { stream: true })) {
                text += chunk.choices[0]?.delta.content ?? "";
            }
            return sameText(text, `Question ${index}`);
        };
        await Promise.all(Array.from({ length: 32 }, (_, index) => one(index)));
        return "each its own text";
    },
    async "client leaves early"() {
        const endless = { stream: true, max_tokens: 4000, ignore_eos: true };
        // By leaving the loop, and by the stream's own controller.
        for await (const _chunk of await chat("Go on.", endless)) break;
        const stream = await chat("Go on.", endless);
        for await (const _chunk of stream) stream.controller.abort();
        await untilIdle();
        return "the engines stopped";
    },
    async "client's timeout"() {
        const more = { max_tokens: 4000, ignore_eos: true };
        await raises(OpenAI.APIConnectionTimeoutError, () => chat("x", more, { timeout: 50 }));
        await untilIdle();
        return "APIConnectionTimeoutError";
    },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
    try {
        console.log(`ok      ${name}: ${await check()}`);
    } catch (error) {
        if (error instanceof NeedsSimulator) {
            console.log(`skipped ${name}: needs simulated engines`);
            continue;
        }
        failed += 1;
        console.log(`FAILED  ${name}: ${error.stack}`);
    }
}
// Not process.exit(): what is still open would keep node alive, and should.
process.exitCode = failed > 0 ? 1 : 0;
