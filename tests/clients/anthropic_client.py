#!/usr/bin/env python3
"""The official anthropic client against a gateway, unmodified: one line per check, exit code 1 if any failed.

    anthropic_client.py [BASE_URL [MODEL]]
"""

import sys

import anthropic

from harness import TIMEOUT_S, Gateway, expect_raise, main


def connect(gateway: Gateway) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, api_key=gateway.key, timeout=TIMEOUT_S, max_retries=0)


def asked(gateway: Gateway, prompt: str, tokens: int) -> dict:
    return {"model": gateway.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}


def check_message(client: anthropic.Anthropic, gateway: Gateway) -> str:
    answer = client.messages.create(**asked(gateway, "Say something.", 16))
    assert (answer.type, answer.role) == ("message", "assistant"), answer
    assert answer.stop_reason in ("end_turn", "max_tokens"), answer.stop_reason
    assert 0 < answer.usage.output_tokens <= 16 and answer.usage.input_tokens > 0, answer.usage
    gateway.same_text(answer.content[0].text, "Say something.", 16)
    return f"{answer.usage.output_tokens} tokens, {answer.stop_reason}"


def check_stream(client: anthropic.Anthropic, gateway: Gateway) -> str:
    with client.messages.stream(**asked(gateway, "Count to twenty.", 20)) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1, f"{len(pieces)} piece: not a stream"
    assert final.content[0].text == "".join(pieces), final
    assert 0 < final.usage.output_tokens <= 20, final.usage
    gateway.same_text("".join(pieces), "Count to twenty.", 20)
    return f"{len(pieces)} pieces, {final.usage.output_tokens} tokens"


def check_events(client: anthropic.Anthropic, gateway: Gateway) -> str:
    events = [event.type for event in client.messages.create(stream=True, **asked(gateway, "Events.", 8))]
    assert events[0] == "message_start" and events[-2:] == ["message_delta", "message_stop"], events
    assert events.count("message_start") == events.count("message_stop") == 1, events
    assert "content_block_delta" in events, events
    return f"{len(events)} events"


def check_count_tokens(client: anthropic.Anthropic, gateway: Gateway) -> str:
    body = asked(gateway, "How many?", 1)
    del body["max_tokens"]
    counted = client.messages.count_tokens(**body).input_tokens
    used = client.messages.create(**asked(gateway, "How many?", 1)).usage.input_tokens
    assert counted == used, f"{counted} counted, {used} used"
    return f"{counted} tokens"


def check_errors(client: anthropic.Anthropic, gateway: Gateway) -> str:
    def kind(error: anthropic.APIStatusError) -> str:
        assert error.body["type"] == "error" and error.body["error"]["message"], error.body
        return error.body["error"]["type"]

    unknown = {**asked(gateway, "x", 1), "model": "no-such-model"}
    error = expect_raise(anthropic.NotFoundError, lambda: client.messages.create(**unknown))
    assert kind(error) == "not_found_error" and "no-such-model" in error.message, error
    error = expect_raise(
        anthropic.BadRequestError, lambda: client.post("/v1/messages", body={"messages": []}, cast_to=object)
    )
    assert kind(error) == "invalid_request_error", error
    empty = {**asked(gateway, "x", 1), "messages": []}
    error = expect_raise(anthropic.BadRequestError, lambda: client.messages.create(**empty))
    assert "messages" in error.message, error
    return "NotFoundError, BadRequestError"


def check_keys(client: anthropic.Anthropic, gateway: Gateway) -> str:
    if gateway.key == "none":
        return "the gateway is open"
    stranger = client.with_options(api_key="not-the-key")
    error = expect_raise(anthropic.AuthenticationError, lambda: stranger.messages.create(**asked(gateway, "x", 1)))
    assert error.body["error"]["type"] == "authentication_error", error.body
    return "AuthenticationError"


def check_engine_errors(client: anthropic.Anthropic, gateway: Gateway) -> str:
    for fault, kind in [
        ({"kind": "status", "status": 429}, anthropic.RateLimitError),
        ({"kind": "status", "status": 500}, anthropic.InternalServerError),
        ({"kind": "busy"}, anthropic.ServiceUnavailableError),
    ]:
        with gateway.faults(fault):
            error = expect_raise(kind, lambda: client.messages.create(**asked(gateway, "x", 1)))
        assert isinstance(error, anthropic.APIStatusError) and error.message, error
    return "429, 500 and 503 as their classes"


def check_broken_stream(client: anthropic.Anthropic, gateway: Gateway) -> str:
    for kind in ("reset", "error"):
        text = ""
        with gateway.faults({"kind": kind, "after_tokens": 5}):
            try:
                with client.messages.stream(**asked(gateway, "Break.", 40)) as stream:
                    for piece in stream.text_stream:
                        text += piece
            except anthropic.APIError as error:
                assert error.message, error
            else:
                raise AssertionError(f"{kind}: the stream ended as if it were whole: {text!r}")
        wanted = gateway.chat_text("Break.", 40)
        assert text and wanted.startswith(text) and text != wanted, f"{kind}: {text!r} is not a part of {wanted!r}"
    return "APIError after a reset and after an error event"


def check_leaving_early(client: anthropic.Anthropic, gateway: Gateway) -> str:
    with client.messages.stream(extra_body={"ignore_eos": True}, **asked(gateway, "Go on.", 4000)) as stream:
        next(iter(stream.text_stream))
    if gateway.engines:
        gateway.until_idle()
    return "the engine stopped" if gateway.engines else "left"


CHECKS = {
    "messages": check_message,
    "messages, streaming": check_stream,
    "messages, events": check_events,
    "count_tokens": check_count_tokens,
    "bad requests": check_errors,
    "keys": check_keys,
    "engine's errors": check_engine_errors,
    "broken streams": check_broken_stream,
    "client leaves early": check_leaving_early,
}

if __name__ == "__main__":
    sys.exit(main(__doc__, connect, CHECKS))
