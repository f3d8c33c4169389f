"""With a real engine: while one key floods, another key's request starts within two engine slots."""

import asyncio
import time

import httpx

from tests.stack import Stack

CHAT = "/v1/chat/completions"
FLOOD = 250
"""As many as one key may have, which is four times what the engine runs at once."""


def chat(max_tokens: int) -> dict[str, object]:
    """One that takes as many tokens as it may. Not streamed: of thousands of events a second all are seen late."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return {
        "messages": messages,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "enable_thinking": False,
        "temperature": 0,
    }


def client_of(stack: Stack, name: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {stack.new_key(name)}"}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=200, trust_env=False, limits=limits)


async def waiting(client: httpx.AsyncClient) -> int:
    """Requests that no worker has begun."""
    page = (await client.get("/metrics")).text
    return sum(int(float(line.split()[-1])) for line in page.splitlines() if line.startswith("qwen3_requests_waiting{"))


async def ask(client: httpx.AsyncClient, max_tokens: int) -> None:
    answer = await client.post(CHAT, json=chat(max_tokens))
    assert answer.status_code == 200, answer.text


async def test_another_key_starts_within_two_slots_of_the_engine(stack: Stack) -> None:
    async with client_of(stack, "flood") as flood, client_of(stack, "other") as other:
        # Given one key with hundreds of requests, of different lengths, so that slots are freed one by one
        asked = [asyncio.create_task(ask(flood, 200 + 13 * (n % 61))) for n in range(FLOOD)]
        try:
            while sum(task.done() for task in asked) < 5:
                await asyncio.sleep(0.05)
            for _ in range(4):
                # When another key asks
                before, sent_at = await waiting(other), time.monotonic()
                assert before > 50
                await ask(other, 1)
                # Then it is answered before most of the flood's have begun that waited before it. (Without turns all
                # would have. How many it should be is counted at the worker, in test_fairness.py: here requests and
                # answers take seconds to travel, on two cores that others use too.)
                between = before - await waiting(other)
                print(f"answered after {time.monotonic() - sent_at:.2f} s, {between} of {before} others begun by then")
                assert between < before / 2
            assert not any(task.done() and task.exception() for task in asked)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
