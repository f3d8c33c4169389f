"""With a real engine: while one key floods, another key's request starts within two engine slots."""

import asyncio
import time
from dataclasses import dataclass, field

import httpx

from tests.stack import Stack

CHAT = "/v1/chat/completions"
FLOOD = 250
"""As many as one key may have, which is four times what the engine runs at once."""

UNSEEN = 6
"""How many may have begun when the other key asks, without a token here yet: this process reads hundreds of streams."""
ON_ITS_WAY = 12
"""What may begin until the other key's request has come to the worker: from here both ways are seen, on two cores that
others use too. More than fifty wait; tests/faults/test_fairness.py counts at the worker."""


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


@dataclass
class Streams:
    """When each of them began, by its first token; how many have ended."""

    begun: list[float] = field(default_factory=list)
    ended: int = 0

    async def ask(self, client: httpx.AsyncClient, max_tokens: int) -> None:
        # Looked at no closer than that: hundreds of streams in one process.
        async with client.stream("POST", CHAT, json=chat(max_tokens, stream=True)) as response:
            assert response.status_code == 200
            begun = False
            async for piece in response.aiter_raw():
                if not begun and b'data: {"' in piece:
                    begun = True
                    self.begun.append(time.monotonic())
        self.ended += 1


async def test_another_key_starts_within_two_slots_of_the_engine(stack: Stack) -> None:
    flooding, others = Streams(), Streams()
    async with client_of(stack, "flood") as flood, client_of(stack, "other") as other:
        # Given one key with hundreds of requests, of different lengths, so that slots are freed one by one
        asked = [asyncio.create_task(flooding.ask(flood, 200 + 13 * (n % 61))) for n in range(FLOOD)]
        try:
            while flooding.ended < 5:
                await asyncio.sleep(0.05)
                assert not any(task.done() and task.exception() for task in asked)
            for turn in range(1, 5):
                # When another key asks
                unseen = FLOOD
                async with asyncio.timeout(60):
                    while unseen > UNSEEN:
                        waited, sent_at = await waiting(flood), time.monotonic()
                        unseen = FLOOD - waited - len(flooding.begun)
                assert waited > 50
                await others.ask(other, 8)
                # Then its answer begins when few of the flood's have begun that waited before it
                between = sum(sent_at < at < others.begun[-1] for at in flooding.begun)
                print(f"begun after {others.begun[-1] - sent_at:.2f} s and {between} others, {unseen} of them before")
                assert len(others.begun) == turn
                assert between <= 2 + ON_ITS_WAY + UNSEEN
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
