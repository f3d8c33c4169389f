"""With a real engine: while one key floods, another key's request starts within two engine slots."""

import asyncio
import time

import httpx
import orjson

from tests.stack import Stack

CHAT = "/v1/chat/completions"
FLOOD = 250
"""As many as one key may have, which is four times what the engine runs at once."""
TO_BEGIN_S = 2.0
"""From a slot's end to the first token of the next request: that one's prompt, and a token of the other 63 streams."""


def chat(max_tokens: int, **fields: object) -> dict[str, object]:
    """One that takes as many tokens as it may."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    forced = {"max_tokens": max_tokens, "ignore_eos": True, "enable_thinking": False, "temperature": 0}
    return {"messages": messages, **forced, **fields}


def client_of(stack: Stack, name: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {stack.new_key(name)}"}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=200, trust_env=False, limits=limits)


async def waiting(client: httpx.AsyncClient) -> float:
    page = (await client.get("/metrics")).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("qwen3_requests_waiting{"))


async def test_another_key_starts_within_two_slots_of_the_engine(stack: Stack) -> None:
    ends: list[float] = []

    async def ask(client: httpx.AsyncClient, max_tokens: int) -> None:
        answer = await client.post(CHAT, json=chat(max_tokens))
        assert answer.status_code == 200, answer.text
        ends.append(time.monotonic())

    async with client_of(stack, "flood") as flood, client_of(stack, "other") as other:
        # Given one key with hundreds of requests, of different lengths, so that slots are freed one by one
        asked = [asyncio.create_task(ask(flood, 200 + 13 * (n % 61))) for n in range(FLOOD)]
        try:
            while len(ends) < 5:
                await asyncio.sleep(0.05)
                assert not any(task.done() and task.exception() for task in asked)
            for _ in range(4):
                assert await waiting(flood) > 50
                # When another key asks
                sent_at = time.monotonic()
                async with other.stream("POST", CHAT, json=chat(8, stream=True)) as response:
                    assert response.status_code == 200
                    begun_at = 0.0
                    async for line in response.aiter_lines():
                        if line.startswith("data: {") and not begun_at:
                            begun_at = time.monotonic()
                            assert orjson.loads(line[6:])["choices"]
                # Then its answer begins by the time that two of the flood's have ended
                later = [at for at in sorted(ends) if at > sent_at]
                print(f"begun after {begun_at - sent_at:.2f} s, {sum(at < begun_at for at in later)} ended meanwhile")
                assert len(later) < 2 or begun_at < later[1] + TO_BEGIN_S
                assert sum(at < begun_at for at in later) < 20
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
