"""With a real engine: what is given up stops in the engine, and is billed for exactly the tokens that were made."""

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import orjson
import pytest

from tests.faults.dialects import STREAMING, body_of
from tests.stack import Stack, eventually, second_server

LONG: dict[str, Any] = {"max_tokens": 30_000, "ignore_eos": True, "temperature": 0}
QUESTION = "What is the capital of France?"
CHAT = "/v1/chat/completions"
STOPPED_S = 1.0
LOOKED_S = 1.0
"""What it may take to see that from here, on two cores that others use too."""
ENDLESS = [path for path in STREAMING if path != "/chat"]
"""That one has no way to ask for an answer without an end; test_client_leaves.py has it, with a worker that counts."""
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": LONG["max_tokens"]}
FORM = {"type": "object", "properties": {"n": NUMBERS}, "required": ["n"], "additionalProperties": False}
"""Of answers that do not end before their bound."""


def ask(**fields: Any) -> dict[str, Any]:
    no_thought = {"enable_thinking": False}
    return {"messages": [{"role": "user", "content": QUESTION}], **LONG, **no_thought, **fields}


@pytest.fixture
def client(stack: Stack, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """With a key of the test's own."""
    with stack.client(stack.new_key(request.node.name)) as made:
        yield made


def endless(path: str) -> dict[str, Any]:
    """A request of this dialect for an answer that goes on until it is stopped."""
    body = body_of(path, QUESTION, LONG["max_tokens"], model="qwen3-smoke", stream=True)
    if path == "/v1/messages":
        return body | {"output_config": {"format": {"type": "json_schema", "schema": FORM}}}
    if path == "/v1/responses":
        form = {"type": "json_schema", "name": "numbers", "schema": FORM, "strict": True}
        return body | {"text": {"format": form}, "reasoning": {"effort": "none"}}
    return body | LONG


def in_engine(stack: Stack) -> float:
    """How many requests vLLM has, running or waiting."""
    counts = told_by_engine(stack, r"num_requests_(?:running|waiting)")
    assert len(counts) >= 2
    return sum(counts)


def told_by_engine(stack: Stack, name: str) -> list[float]:
    """What vLLM's metrics of this name say."""
    workers = httpx.get(f"{stack.url}/health").json()["workers"]
    (port,) = (worker["metrics_port"] for worker in workers if worker["type"] == "chat")
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return [float(count) for count in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)]


def stops(stack: Stack) -> None:
    began = time.monotonic()
    eventually(lambda: in_engine(stack) == 0)
    assert time.monotonic() - began < STOPPED_S + LOOKED_S


def check_recorded(client: httpx.Client, seen: str = "") -> None:
    """The one chat is recorded as cancelled, with the very tokens that the engine makes of its question."""
    (entry,) = eventually(lambda: client.get("/chat/history").json())
    assert entry["finish_reason"] == "cancelled"
    made = entry["usage"]["completion_tokens"]
    assert 0 < made < LONG["max_tokens"]
    text = entry["messages"][-1]["content"]
    assert text.startswith(seen)
    again = client.post(CHAT, json=ask(max_tokens=made)).json()
    assert again["choices"][0]["message"]["content"].rstrip("\ufffd") == text.rstrip("\ufffd")
    assert again["usage"] == again["usage"] | entry["usage"]
    used = eventually(lambda: (now := client.get("/usage").json())["total_requests"] == 2 and now)
    assert used["total_tokens"] == 2 * entry["usage"]["total_tokens"]


def read_some(lines: Iterator[str], count: int = 40) -> str:
    """What the next events of a stream say. The caller holds on to `lines`: dropped, they take the connection along."""
    said = ""
    for line in lines:
        if line.startswith("data: {"):
            said += orjson.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            count -= 1
        if not count:
            break
    return said


@pytest.mark.parametrize("how", ["left", "deleted"])
def test_streams_of_all_dialects_but_one_stop(stack: Stack, client: httpx.Client, how: str) -> None:
    (before,) = told_by_engine(stack, "generation_tokens_total")
    # When streams in each dialect are stopped by their ids, or their clients leave
    states, endings = stop_streams(stack, client, how)
    # Then the engine stops, and all that it has made for them, and no more, is recorded and billed
    stops(stack)
    entries = eventually(lambda: len(found := client.get("/chat/history").json()) == len(ENDLESS) and found)
    used = client.get("/usage").json()
    made = [entry["usage"]["completion_tokens"] for entry in entries]
    assert sum(made) == told_by_engine(stack, "generation_tokens_total")[0] - before
    assert used["total_requests"] == len(ENDLESS)
    assert used["total_tokens"] == sum(entry["usage"]["total_tokens"] for entry in entries)
    assert min(made) > 0
    assert [entry["finish_reason"] for entry in entries] == ["cancelled"] * len(ENDLESS)
    if how == "deleted":
        assert states == ["cancelled"] * len(ENDLESS)
        assert all("cancelled" in ending for ending in endings)


def stop_streams(stack: Stack, client: httpx.Client, how: str) -> tuple[list[str], list[str]]:
    """Begin a stream in each dialect and stop them all. If "deleted": what is said of each, and how each ends."""
    with ExitStack() as opened:
        streams = []
        for path in ENDLESS:
            response = opened.enter_context(client.stream("POST", path, json=endless(path)))
            assert response.status_code == 200, response.read()
            streams.append((response.headers["x-request-id"], response.iter_lines()))
        for _, lines in streams:
            for _ in range(20):
                next(lines)
        if how == "left":
            return [], []
        with client_again(client) as other:
            states = [other.delete(f"/v1/requests/{id_}").json()["status"] for id_, _ in streams]
        stops(stack)
        return states, ["".join(lines) for _, lines in streams]


def test_a_client_leaves_its_stream(stack: Stack, client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json=ask(stream=True)) as response:
        lines = response.iter_lines()
        seen = read_some(lines)
        eventually(lambda: in_engine(stack) == 1)
    stops(stack)
    check_recorded(client, seen)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_clients_leave_as_their_streams_end(stack: Stack, client: httpx.Client, path: str) -> None:
    """Of a hundred that leave in this way there was one of which nothing was recorded."""
    body, count = endless(path) | {"max_tokens": 40, "min_tokens": 40}, 150
    (before,) = told_by_engine(stack, "generation_tokens_total")
    # Given how long a stream takes
    began = time.monotonic()
    with client.stream("POST", path, json=body) as response:
        list(response.iter_lines())
    whole_s = time.monotonic() - began
    # When clients leave theirs shortly before the end, so that some end in the very moment that they are stopped
    for number in range(count - 1):
        began, stay_s = time.monotonic(), whole_s * (0.3 + 0.7 * number / count)
        with client.stream("POST", path, json=body) as response:
            for _ in response.iter_lines():
                if time.monotonic() - began > stay_s:
                    break
    stops(stack)
    # Then all that the engine has made for each of them is recorded and billed
    entries = eventually(lambda: len(found := client.get("/chat/history?limit=1000").json()) == count and found)
    made = sum(entry["usage"]["completion_tokens"] for entry in entries)
    assert made == told_by_engine(stack, "generation_tokens_total")[0] - before
    used = client.get("/usage").json()
    assert used["total_requests"] == count
    assert used["total_tokens"] == sum(entry["usage"]["total_tokens"] for entry in entries)


def test_a_client_leaves_while_it_waits(stack: Stack, client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=ask(), timeout=1)
    stops(stack)
    check_recorded(client)


def test_several_answers_are_counted_together(stack: Stack, client: httpx.Client) -> None:
    fields = {"prompt": ["one", "two"], **LONG, "n": 2, "temperature": 1, "seed": 1}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=fields, timeout=1)
    stops(stack)
    (entry,) = eventually(lambda: client.get("/chat/history").json())
    assert entry["finish_reason"] == "cancelled"
    assert 4 <= entry["usage"]["completion_tokens"] < 4 * LONG["max_tokens"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_is_killed(stack: Stack, client: httpx.Client, stream: bool) -> None:
    # Given a server of the service, with an answer in the making
    with second_server(stack, status=-signal.SIGKILL) as (url, server):

        def wait() -> None:
            with suppress(httpx.TransportError):
                httpx.post(f"{url}{CHAT}", json=ask(stream=stream), headers=client.headers, timeout=60)

        asking = threading.Thread(target=wait)
        asking.start()
        eventually(lambda: in_engine(stack) == 1)
        time.sleep(0.5)
        # When it is killed
        server.kill()
    # Then the engine stops, and what was made is recorded
    stops(stack)
    asking.join()
    check_recorded(client)


def test_a_stream_is_stopped_by_its_id(stack: Stack, client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json=ask(stream=True)) as response:
        lines = response.iter_lines()
        seen = read_some(lines)
        eventually(lambda: in_engine(stack) == 1)
        request_id = response.headers["x-request-id"]
        with client_again(client) as other:
            stopped = other.delete(f"/v1/requests/{request_id}").json()
        assert stopped["status"] == "cancelled"
        stops(stack)
        assert any('"code":"cancelled"' in line for line in lines)
    check_recorded(client, seen)


@contextmanager
def client_again(client: httpx.Client) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=client.base_url, headers=client.headers, trust_env=False, timeout=20) as made:
        yield made


def test_an_answer_outlives_its_deadline(stack: Stack, client: httpx.Client) -> None:
    with second_server(stack, REQUEST_TIMEOUT_S="1.5") as (url, _):
        answer = httpx.post(f"{url}{CHAT}", json=ask(), headers=client.headers, timeout=20)
        assert answer.status_code == 504
        stops(stack)
    check_recorded(client)


def test_sdks_read_streams_with_ids(stack: Stack) -> None:
    import anthropic
    import openai

    key = stack.new_key("ids")
    question: Any = [{"role": "user", "content": QUESTION}]
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0) as client:
        for _ in range(2):
            chunks = client.chat.completions.create(
                model="qwen3-smoke",
                messages=question,
                stream=True,
                temperature=0,
                extra_body={"enable_thinking": False},
                extra_headers={"Idempotency-Key": "openai"},
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == "The capital of France is Paris."
    with anthropic.Anthropic(base_url=stack.url, api_key=key, max_retries=0) as other:
        found = []
        for _ in range(2):
            with other.messages.stream(
                model="qwen3-smoke",
                max_tokens=100,
                messages=question,
                extra_headers={"Idempotency-Key": "anthropic"},
            ) as stream:
                found.append((stream.get_final_text(), stream.get_final_message().id))
    assert found[0] == found[1]
    assert found[0][0]
