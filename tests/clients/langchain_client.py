#!/usr/bin/env python3
"""LangChain's ChatOpenAI against a gateway, unmodified: one line per check, exit code 1 if any failed.

    langchain_client.py [BASE_URL [MODEL]]
"""

import asyncio
import os
import sys

# It would trace to a service otherwise, if the environment asked for it.
os.environ["LANGSMITH_TRACING"] = "false"

import openai
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

from harness import TIMEOUT_S, Gateway, main

TOKENS = 20


def connect(gateway: Gateway) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{gateway.url}/v1",
        api_key=gateway.key,
        model=gateway.model,
        max_tokens=TOKENS,
        timeout=TIMEOUT_S,
        max_retries=0,
        stream_usage=True,
    )


def check_invoke(model: ChatOpenAI, gateway: Gateway) -> str:
    answer = model.invoke("Say something.")
    gateway.same_text(answer.content, "Say something.", TOKENS)
    usage = answer.usage_metadata
    assert usage and 0 < usage["output_tokens"] <= TOKENS, usage
    assert answer.response_metadata["model_name"] == gateway.model, answer.response_metadata
    return f"{usage['output_tokens']} tokens"


def whole(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    assert len(chunks) > 2, f"{len(chunks)} chunks: not a stream"
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata and 0 < total.usage_metadata["output_tokens"] <= TOKENS, total.usage_metadata
    return total


def check_stream(model: ChatOpenAI, gateway: Gateway) -> str:
    chunks = list(model.stream("Count to twenty."))
    gateway.same_text(whole(chunks).content, "Count to twenty.", TOKENS)
    return f"{len(chunks)} chunks"


def check_astream(_model: ChatOpenAI, gateway: Gateway) -> str:
    async def run() -> list[AIMessageChunk]:
        return [chunk async for chunk in connect(gateway).astream("Count to twenty.")]

    chunks = asyncio.run(run())
    gateway.same_text(whole(chunks).content, "Count to twenty.", TOKENS)
    return f"{len(chunks)} chunks"


def check_batch(model: ChatOpenAI, gateway: Gateway) -> str:
    prompts = [f"Question {index}" for index in range(8)]
    answers = model.batch(prompts, config={"max_concurrency": 8})
    for prompt, answer in zip(prompts, answers, strict=True):
        gateway.same_text(answer.content, prompt, TOKENS)
    return f"{len(answers)} answers, each its own text"


def check_chain(model: ChatOpenAI, gateway: Gateway) -> str:
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")]) | model | StrOutputParser()
    pieces = list(chain.stream({"question": "Why?"}))
    direct = model.invoke([SystemMessage("Be brief."), HumanMessage("Why?")]).content
    assert len(pieces) > 2 and direct, pieces
    assert not gateway.engines or "".join(pieces) == direct, f"{pieces} instead of {direct!r}"
    return f"{len(pieces)} pieces"


def check_errors(model: ChatOpenAI, gateway: Gateway) -> str:
    """LangChain raises the openai client's errors, or a subclass of its own."""
    try:
        answer = model.model_copy(update={"model_name": "no-such-model"}).invoke("x")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found" and "no-such-model" in str(error), error
        return type(error).__name__
    raise AssertionError(f"an unknown model was answered: {answer}")


CHECKS = {
    "invoke": check_invoke,
    "stream": check_stream,
    "astream": check_astream,
    "batch": check_batch,
    "chain": check_chain,
    "unknown model": check_errors,
}

if __name__ == "__main__":
    sys.exit(main(__doc__, connect, CHECKS))
