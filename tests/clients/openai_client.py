#!/usr/bin/env python3
"""The official openai client against a gateway, unmodified: one line per check, exit code 1 if any failed.

    openai_client.py [BASE_URL [MODEL]]        else from the environment: BASE_URL, MODEL, API_KEY

BASE_URL is without /v1. Without MODEL the first model listed is used.
"""

import os
import sys
import time

import openai

TIMEOUT_S = 60


def check_models(client: openai.OpenAI, model: str) -> str:
    listed = list(client.models.list())
    names = [entry.id for entry in listed]
    assert model in names, f"{model} is not in {names}"
    assert all(entry.object == "model" for entry in listed), "an entry's object is not 'model'"
    return ", ".join(names)


def check_chat(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Say something."}], max_tokens=16
    )
    choice = answer.choices[0]
    assert answer.object == "chat.completion", answer.object
    assert choice.message.role == "assistant" and choice.message.content, choice
    assert choice.finish_reason in ("stop", "length"), choice.finish_reason
    assert answer.usage and answer.usage.completion_tokens > 0, answer.usage
    return f"{answer.usage.completion_tokens} tokens, finish_reason {choice.finish_reason}"


def check_chat_stream(client: openai.OpenAI, model: str) -> str:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Count to twenty."}],
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
    assert text, "no text"
    assert finish in ("stop", "length"), finish
    assert usage and usage.completion_tokens > 0, "no usage although stream_options asked for it"
    return f"{chunks} chunks, {usage.completion_tokens} tokens"


def check_completions_stream(client: openai.OpenAI, model: str) -> str:
    stream = client.completions.create(model=model, prompt="Once upon a time", max_tokens=16, stream=True)
    texts = [choice.text for chunk in stream for choice in chunk.choices]
    assert len(texts) > 1 and "".join(texts), texts
    return f"{len(texts)} chunks"


def check_embeddings(client: openai.OpenAI, model: str) -> str:
    answer = client.embeddings.create(model=model, input=["a line", "another line"])
    assert len(answer.data) == 2, f"{len(answer.data)} vectors for 2 inputs"
    assert [entry.index for entry in answer.data] == [0, 1], "the indexes are not 0, 1"
    assert len(answer.data[0].embedding) > 1, "an empty vector"
    return f"2 vectors of {len(answer.data[0].embedding)}"


def check_responses_stream(client: openai.OpenAI, model: str) -> str:
    stream = client.responses.create(model=model, input="Say something.", max_output_tokens=16, stream=True)
    kinds = [event.type for event in stream]
    assert kinds and kinds[0] == "response.created", kinds[:3]
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds[-3:]
    assert "response.output_text.delta" in kinds, sorted(set(kinds))
    return f"{len(kinds)} events"


def check_unknown_model(client: openai.OpenAI, _model: str) -> str:
    try:
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "x"}])
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", f"code {error.code!r}"
        assert "no-such-model" in error.message, error.message
        return f"NotFoundError, code {error.code}"
    raise AssertionError("answered")


def check_bad_request(client: openai.OpenAI, model: str) -> str:
    try:
        client.chat.completions.create(model=model, messages="not a list", max_tokens=1)  # type: ignore[arg-type]
    except openai.BadRequestError as error:
        assert error.message, "no message"
        return f"BadRequestError: {error.message[:60]}"
    raise AssertionError("answered")


def check_missing_model(client: openai.OpenAI, _model: str) -> str:
    try:
        client.post("/chat/completions", body={"messages": []}, cast_to=object)
    except openai.BadRequestError as error:
        assert "model" in error.message, error.message
        return f"BadRequestError: {error.message[:60]}"
    raise AssertionError("answered")


def check_leaving_early(client: openai.OpenAI, model: str) -> str:
    """Closing a stream after its first chunk must not wait for the rest, and the next request must work."""
    started = time.monotonic()
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Go on."}], max_tokens=512, stream=True
    )
    next(iter(stream))
    stream.close()
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Still there?"}], max_tokens=2
    )
    assert answer.choices[0].message.content is not None
    return f"{time.monotonic() - started:.1f} s"


def check_timeout(client: openai.OpenAI, model: str) -> str:
    hasty = client.with_options(timeout=0.001, max_retries=0)
    try:
        hasty.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], max_tokens=64)
    except openai.APITimeoutError:
        return "APITimeoutError"
    raise AssertionError("answered within a millisecond")


CHECKS = {
    "models.list": check_models,
    "chat": check_chat,
    "chat, streaming": check_chat_stream,
    "completions, streaming": check_completions_stream,
    "embeddings": check_embeddings,
    "responses, streaming": check_responses_stream,
    "unknown model": check_unknown_model,
    "bad request": check_bad_request,
    "no model": check_missing_model,
    "client leaves early": check_leaving_early,
    "client's timeout": check_timeout,
}


def main() -> int:
    arguments = sys.argv[1:]
    base_url = arguments[0] if arguments else os.environ.get("BASE_URL", "")
    model = arguments[1] if len(arguments) > 1 else os.environ.get("MODEL", "")
    # Real engines serve no embeddings from a chat model: SKIP="embeddings" leaves a check out, and says so.
    skipped = [name for name in os.environ.get("SKIP", "").split(";") if name]
    if not base_url:
        print(__doc__, file=sys.stderr)
        return 2
    client = openai.OpenAI(
        base_url=f"{base_url.rstrip('/')}/v1",
        api_key=os.environ.get("API_KEY") or "none",
        timeout=TIMEOUT_S,
        max_retries=0,
    )
    if not model:
        model = next(iter(client.models.list())).id
    failed = 0
    for name, check in CHECKS.items():
        if name in skipped:
            print(f"skipped {name}")
            continue
        try:
            print(f"ok      {name}: {check(client, model)}")
        except (AssertionError, openai.OpenAIError) as error:
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
