#!/usr/bin/env python3
"""The official openai client's asyncio side against a gateway: many streams at once, and streams given up.

    openai_async.py [BASE_URL [MODEL]]
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable

import httpx
import openai

from harness import TIMEOUT_S, Gateway, main

AT_ONCE = 32
TOKENS = 30


Connect = Callable[..., openai.AsyncOpenAI]


def connect(gateway: Gateway) -> Connect:
    # One for each check: its connections belong to the event loop they were made in.
    def one(**more: object) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key=gateway.key, timeout=TIMEOUT_S, max_retries=0, **more
        )

    return one


async def stream_text(client: openai.AsyncOpenAI, gateway: Gateway, prompt: str, tokens: int) -> str:
    stream = await client.chat.completions.create(
        model=gateway.model, messages=[{"role": "user", "content": prompt}], max_tokens=tokens, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


def each_text_is_right(gateway: Gateway, texts: list[str]) -> None:
    for index, text in enumerate(texts):
        gateway.same_text(text, f"Question {index}", TOKENS)
    assert len(set(texts)) == len(texts), "two questions, one answer"


async def all_at_once(one: Callable[[int], Awaitable[str]]) -> list[str]:
    return await asyncio.gather(*(one(index) for index in range(AT_ONCE)))


def check_streams_at_once(connect_one: Connect, gateway: Gateway) -> str:
    async def run() -> list[str]:
        async with connect_one() as client:
            return await all_at_once(lambda index: stream_text(client, gateway, f"Question {index}", TOKENS))

    each_text_is_right(gateway, asyncio.run(run()))
    return f"{AT_ONCE} streams, each its own text"


def check_one_connection(connect_one: Connect, gateway: Gateway) -> str:
    """The same over HTTP/2 in clear, where all of them share a connection."""

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=1)
        transport = httpx.AsyncClient(http1=False, http2=True, limits=limits, timeout=TIMEOUT_S)
        async with connect_one(http_client=transport) as client:
            versions = set()
            transport.event_hooks["response"].append(seen(versions))
            texts = await all_at_once(lambda index: stream_text(client, gateway, f"Question {index}", TOKENS))
        assert versions == {"HTTP/2"}, versions
        return texts

    def seen(versions: set[str]) -> Callable[[httpx.Response], Awaitable[None]]:
        async def note(response: httpx.Response) -> None:
            versions.add(response.http_version)

        return note

    each_text_is_right(gateway, asyncio.run(run()))
    return f"{AT_ONCE} streams, each its own text"


def check_unary_at_once(connect_one: Connect, gateway: Gateway) -> str:
    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        messages = [{"role": "user", "content": f"Question {index}"}]
        answer = await client.chat.completions.create(model=gateway.model, messages=messages, max_tokens=TOKENS)
        return answer.choices[0].message.content

    async def run() -> list[str]:
        async with connect_one() as client:
            return await all_at_once(lambda index: one(client, index))

    each_text_is_right(gateway, asyncio.run(run()))
    return f"{AT_ONCE} answers, each its own text"


def check_cancelled(connect_one: Connect, gateway: Gateway) -> str:
    """Cancelled tasks, in prefill and in decode, stop their engines; one that was not cancelled goes on."""

    async def run() -> str:
        async with connect_one() as client:
            stays = asyncio.create_task(stream_text(client, gateway, "Question 0", TOKENS))
            begun = asyncio.Event()

            async def endless() -> None:
                stream = await client.chat.completions.create(
                    model=gateway.model,
                    messages=[{"role": "user", "content": "Go on."}],
                    max_tokens=4000,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                async for _chunk in stream:
                    begun.set()

            leave = [asyncio.create_task(endless()) for _ in range(AT_ONCE)]
            await asyncio.wait_for(begun.wait(), TIMEOUT_S)
            for task in leave:
                task.cancel()
            ends = await asyncio.gather(*leave, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
            return await stays

    gateway.same_text(asyncio.run(run()), "Question 0", TOKENS)
    if gateway.engines:
        gateway.until_idle()
    return f"{AT_ONCE} streams cancelled, their neighbour whole"


CHECKS = {
    "32 streams at once": check_streams_at_once,
    "32 streams on one connection": check_one_connection,
    "32 answers at once": check_unary_at_once,
    "32 streams cancelled": check_cancelled,
}

if __name__ == "__main__":
    sys.exit(main(__doc__, connect, CHECKS))
