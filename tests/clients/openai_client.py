#!/usr/bin/env python3
"""The official openai client against a gateway, unmodified: one line per check, exit code 1 if any failed.

    openai_client.py [BASE_URL [MODEL]]
"""

import sys
import time

import openai

from harness import TIMEOUT_S, Gateway, ask, expect_raise, main, until

User = list[dict[str, str]]


def user(prompt: str) -> User:
    return [{"role": "user", "content": prompt}]


def connect(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, timeout=TIMEOUT_S, max_retries=0)


def check_models(client: openai.OpenAI, gateway: Gateway) -> str:
    listed = list(client.models.list())
    names = [entry.id for entry in listed]
    assert gateway.model in names, f"{gateway.model} is not in {names}"
    assert all(entry.object == "model" for entry in listed), "an entry's object is not 'model'"
    assert client.models.retrieve(gateway.model).id == gateway.model
    error = expect_raise(openai.NotFoundError, lambda: client.models.retrieve("no-such-model"))
    assert error.code == "model_not_found", error
    return ", ".join(names)


def check_chat(client: openai.OpenAI, gateway: Gateway) -> str:
    prompt = "Say something."
    answer = client.chat.completions.create(model=gateway.model, messages=user(prompt), max_tokens=16)
    choice = answer.choices[0]
    assert answer.object == "chat.completion", answer.object
    assert answer.model == gateway.model, answer.model
    assert choice.message.role == "assistant", choice
    assert choice.finish_reason in ("stop", "length"), choice.finish_reason
    assert answer.usage and 0 < answer.usage.completion_tokens <= 16, answer.usage
    gateway.same_text(choice.message.content, prompt, 16)
    return f"{answer.usage.completion_tokens} tokens, finish_reason {choice.finish_reason}"


def check_request_id(client: openai.OpenAI, gateway: Gateway) -> str:
    ids = set()
    for _ in range(2):
        raw = client.chat.completions.with_raw_response.create(
            model=gateway.model, messages=user("Who are you?"), max_tokens=1
        )
        assert raw.request_id, f"no x-request-id in {dict(raw.headers)}"
        assert raw.parse()._request_id == raw.request_id
        ids.add(raw.request_id)
    assert len(ids) == 2, f"two requests, one id: {ids}"
    return ids.pop()


def check_chat_stream(client: openai.OpenAI, gateway: Gateway) -> str:
    prompt = "Count to twenty."
    stream = client.chat.completions.create(
        model=gateway.model,
        messages=user(prompt),
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, chunks, usage, finish, ids = "", 0, None, None, set()
    for chunk in stream:
        chunks += 1
        ids.add(chunk.id)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert chunks > 1, f"{chunks} chunk: not a stream"
    assert len(ids) == 1, f"one stream, several ids: {ids}"
    assert finish in ("stop", "length"), finish
    assert usage and 0 < usage.completion_tokens <= 20, f"usage {usage} although stream_options asked for it"
    gateway.same_text(text, prompt, 20)
    return f"{chunks} chunks, {usage.completion_tokens} tokens"


def check_chat_stream_helper(client: openai.OpenAI, gateway: Gateway) -> str:
    with client.chat.completions.stream(model=gateway.model, messages=user("Stream."), max_tokens=12) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.current_completion_snapshot.choices[0]
    assert final.message.content == "".join(deltas), (final, deltas)
    gateway.same_text(final.message.content, "Stream.", 12)
    return f"{len(deltas)} deltas"


def check_completions(client: openai.OpenAI, gateway: Gateway) -> str:
    body = {"prompt": "Once upon a time", "max_tokens": 16}
    whole = client.completions.create(model=gateway.model, **body)
    wanted = gateway.truth("/v1/completions", body)
    assert wanted is None or wanted["choices"][0]["text"] == whole.choices[0].text, (wanted, whole)
    assert whole.choices[0].text and whole.usage.total_tokens > 0, whole
    return f"{whole.usage.completion_tokens} tokens"


def check_completions_stream(client: openai.OpenAI, gateway: Gateway) -> str:
    body = {"prompt": "Once upon a time", "max_tokens": 16}
    stream = client.completions.create(model=gateway.model, stream=True, **body)
    texts = [choice.text for chunk in stream for choice in chunk.choices]
    assert len(texts) > 1 and "".join(texts), texts
    wanted = gateway.truth("/v1/completions", body)
    assert wanted is None or wanted["choices"][0]["text"] == "".join(texts), (wanted, texts)
    return f"{len(texts)} chunks"


def check_embeddings(client: openai.OpenAI, gateway: Gateway) -> str:
    lines = ["a line", "another line"]
    answer = client.embeddings.create(model=gateway.model, input=lines)
    assert len(answer.data) == 2, f"{len(answer.data)} vectors for 2 inputs"
    assert [entry.index for entry in answer.data] == [0, 1], "the indexes are not 0, 1"
    length = len(answer.data[0].embedding)
    assert length > 1, "an empty vector"
    if wanted := gateway.truth("/v1/embeddings", {"input": lines}):
        for entry, truth in zip(answer.data, wanted["data"], strict=True):
            apart = max(abs(a - b) for a, b in zip(entry.embedding, truth["embedding"], strict=True))
            assert apart < 1e-6, f"a number is {apart} away from the engine's"
    return f"2 vectors of {length}"


def check_rerank(client: openai.OpenAI, gateway: Gateway) -> str:
    body = {"query": "rivers", "documents": ["a hill", "a stream", "a lake"]}
    answer = client.post("/rerank", body={"model": gateway.model, **body}, cast_to=object)
    scores = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    assert sorted(scores) == [0, 1, 2], scores
    if wanted := gateway.truth("/v1/rerank", body):
        assert wanted["results"] == answer["results"], (wanted, answer)
    return f"best is number {answer['results'][0]['index']}"


def check_responses(client: openai.OpenAI, gateway: Gateway) -> str:
    answer = client.responses.create(model=gateway.model, input="Say something.", max_output_tokens=16)
    assert answer.object == "response" and answer.output_text, answer
    if gateway.engines:
        gateway.same_text(answer.output_text, "Say something.", 16)
    return f"{answer.usage.output_tokens} tokens, {answer.status}"


def check_responses_stream(client: openai.OpenAI, gateway: Gateway) -> str:
    stream = client.responses.create(model=gateway.model, input="Say something.", max_output_tokens=16, stream=True)
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds and kinds[0] == "response.created", kinds[:3]
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds[-3:]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == events[-1].response.output_text, (deltas, events[-1])
    if gateway.engines:
        gateway.same_text(deltas, "Say something.", 16)
    return f"{len(kinds)} events"


def check_alias(client: openai.OpenAI, gateway: Gateway) -> str:
    """A route made while the client runs: listed, answered under its own name, gone when it is deleted."""
    path = "/api/v2/routes/assistant"
    ask(gateway.controlplane(), "PUT", path, {"targets": [{"model": gateway.model, "weight": 100}], "fallbacks": []})
    try:
        until(lambda: "assistant" in [entry.id for entry in client.models.list()])
        answer = client.chat.completions.create(model="assistant", messages=user("Alias."), max_tokens=8)
        gateway.same_text(answer.choices[0].message.content, "Alias.", 8)
    finally:
        ask(gateway.controlplane(), "DELETE", path)
    until(lambda: "assistant" not in [entry.id for entry in client.models.list()])
    return "assistant"


def check_transcription(client: openai.OpenAI, gateway: Gateway) -> str:
    """What the engine hears in a file depends on each of its bytes."""
    sound = bytes(range(256)) * 4000

    def heard(by: openai.OpenAI, **more: object) -> object:
        return by.audio.transcriptions.create(model=gateway.model, file=("sound.wav", sound, "audio/wav"), **more)

    [engine, *_] = gateway.simulators()
    truth = heard(client.with_options(base_url=f"http://{engine}/v1")).text
    assert truth, "the engine heard nothing"
    assert heard(client).text == truth
    plain = heard(client, response_format="text")
    assert plain.strip() == truth.strip(), f"{plain!r} instead of {truth!r}"
    translated = client.audio.translations.create(model=gateway.model, file=("sound.wav", sound, "audio/wav"))
    assert translated.text == truth, translated
    error = expect_raise(
        openai.NotFoundError,
        lambda: client.audio.transcriptions.create(model="no-such-model", file=("sound.wav", b"x", "audio/wav")),
    )
    assert error.code == "model_not_found", error
    return f"{len(sound)} bytes heard as {truth[:20]!r}"


def check_speech(client: openai.OpenAI, gateway: Gateway) -> str:
    [engine, *_] = gateway.simulators()

    def said(by: openai.OpenAI) -> bytes:
        return by.audio.speech.create(model=gateway.model, voice="alloy", input="Say it.").content

    sound = said(client)
    assert sound.startswith(b"RIFF") and sound == said(client.with_options(base_url=f"http://{engine}/v1")), sound[:50]
    return f"{len(sound)} bytes"


def check_bad_requests(client: openai.OpenAI, gateway: Gateway) -> str:
    chat = client.chat.completions
    unknown = expect_raise(
        openai.NotFoundError, lambda: chat.create(model="no-such-model", messages=user("x"))
    )
    assert unknown.code == "model_not_found" and "no-such-model" in unknown.message, unknown
    # The engine's own refusal, and three of the gateway.
    wrong = expect_raise(
        openai.BadRequestError, lambda: chat.create(model=gateway.model, messages="not a list", max_tokens=1)
    )
    assert "messages" in wrong.message, wrong
    nameless = expect_raise(
        openai.BadRequestError, lambda: client.post("/chat/completions", body={"messages": []}, cast_to=object)
    )
    assert nameless.param == "model", nameless
    typed = expect_raise(
        openai.BadRequestError, lambda: chat.create(model=gateway.model, messages=[], stream="yes")  # type: ignore[arg-type]
    )
    assert typed.param == "stream", typed
    nowhere = expect_raise(openai.NotFoundError, lambda: client.post("/sleep", body={}, cast_to=object))
    assert nowhere.code == "unknown_url", nowhere
    return "NotFoundError, BadRequestError"


def check_keys(client: openai.OpenAI, gateway: Gateway) -> str:
    if gateway.key == "none":
        return "the gateway is open"
    stranger = client.with_options(api_key="not-the-key")
    error = expect_raise(openai.AuthenticationError, lambda: stranger.models.list())
    assert error.status_code == 401 and error.code == "invalid_api_key", error
    return f"AuthenticationError: {error.message}"


def check_engine_errors(client: openai.OpenAI, gateway: Gateway) -> str:
    """An engine's status becomes the class that programs catch."""

    def fails(fault: dict, kind: type[openai.APIStatusError], **more: object) -> None:
        with gateway.faults(fault):
            error = expect_raise(
                kind,
                lambda: client.chat.completions.create(
                    model=gateway.model, messages=user("x"), max_tokens=4, **more
                ),
            )
        assert error.message, f"{fault}: no message"

    fails({"kind": "status", "status": 422}, openai.UnprocessableEntityError)
    fails({"kind": "status", "status": 429}, openai.RateLimitError)
    fails({"kind": "status", "status": 500}, openai.InternalServerError)
    fails({"kind": "busy"}, openai.InternalServerError, stream=True)
    return "422, 429, 500 and 503 as their classes"


def check_broken_streams(client: openai.OpenAI, gateway: Gateway) -> str:
    """A stream that breaks never looks whole: the client raises after the tokens that were right."""
    for kind in ("reset", "close", "cut", "error"):
        with gateway.faults({"kind": kind, "after_tokens": 5}):
            stream = client.chat.completions.create(
                model=gateway.model, messages=user("Break."), max_tokens=40, stream=True
            )
            text = ""
            try:
                for chunk in stream:
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            except openai.APIError as error:
                assert error.message, error
            else:
                raise AssertionError(f"{kind}: the stream ended as if it were whole: {text!r}")
        wanted = gateway.chat_text("Break.", 40)
        assert text and wanted.startswith(text) and text != wanted, f"{kind}: {text!r} is not a part of {wanted!r}"
    return "APIError after a reset, a close, a cut event, an error event"


def check_own_retry(client: openai.OpenAI, gateway: Gateway) -> str:
    """A moment in which every engine is full is over by the client's own retry."""
    with gateway.faults({"kind": "busy", "count": 1}):
        answer = client.with_options(max_retries=4).chat.completions.create(
            model=gateway.model, messages=user("Again?"), max_tokens=4
        )
    gateway.same_text(answer.choices[0].message.content, "Again?", 4)
    return "answered"


def check_leaving_early(client: openai.OpenAI, gateway: Gateway) -> str:
    """Closing a stream after its first chunk must not wait for the rest, and the engine must stop."""
    started = time.monotonic()
    stream = client.chat.completions.create(
        model=gateway.model, messages=user("Go on."), max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    answer = client.chat.completions.create(model=gateway.model, messages=user("Still there?"), max_tokens=2)
    assert answer.choices[0].message.content is not None
    took = time.monotonic() - started
    # 4,000 tokens take a simulated engine 20 s.
    assert took < 15, f"{took:.1f} s: waited for the rest"
    if gateway.engines:
        gateway.until_idle()
    return f"{took:.2f} s"


def check_timeout(client: openai.OpenAI, gateway: Gateway) -> str:
    hasty = client.with_options(timeout=0.05)
    expect_raise(
        openai.APITimeoutError,
        lambda: hasty.chat.completions.create(
            model=gateway.model, messages=user("x"), max_tokens=4000, extra_body={"ignore_eos": True}
        ),
    )
    if gateway.engines:
        gateway.until_idle()
    return "APITimeoutError"


CHECKS = {
    "models": check_models,
    "chat": check_chat,
    "request ids": check_request_id,
    "chat, streaming": check_chat_stream,
    "chat, stream helper": check_chat_stream_helper,
    "completions": check_completions,
    "completions, streaming": check_completions_stream,
    "embeddings": check_embeddings,
    "rerank": check_rerank,
    "responses": check_responses,
    "responses, streaming": check_responses_stream,
    "alias": check_alias,
    "audio, transcription": check_transcription,
    "audio, speech": check_speech,
    "bad requests": check_bad_requests,
    "keys": check_keys,
    "engine's errors": check_engine_errors,
    "broken streams": check_broken_streams,
    "client's own retry": check_own_retry,
    "client leaves early": check_leaving_early,
    "client's timeout": check_timeout,
}

if __name__ == "__main__":
    sys.exit(main(__doc__, connect, CHECKS))
