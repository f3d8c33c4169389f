"""`/chat` against the real engine: what it says, how it ends, and that streaming says the same."""

import json
from typing import Any

import httpx
import pytest

from tests.stack import say

FRANCE, PARIS = "What is the capital of France?", "The capital of France is Paris."


def stream(client: httpx.Client, body: dict[str, Any]) -> tuple[list[dict[str, Any]], httpx.Response]:
    """The chunks of a streamed chat; checks the frame around them."""
    with client.stream("POST", "/chat", json={**body, "stream": True}) as response:
        response.read()
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]], response


def joined(chunks: list[dict[str, Any]], part: str) -> str:
    return "".join(c["choices"][0]["delta"].get(part) or "" for c in chunks if c["choices"])


def test_the_documented_example_gets_the_documented_answer(client: httpx.Client) -> None:
    # When the request of the API document is made, with its model whose weights are missing here
    body = say(FRANCE, model="qwen3-0.6b", max_tokens=100, temperature=0.7, top_p=0.9, stream=False)
    response = client.post("/chat", json=body)
    answer = response.json()
    # Then the documented shape comes back with the right answer
    assert response.status_code == 200
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage", "session_id"}
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": PARIS}, "finish_reason": "stop"}
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 8
    # And it says who really answered
    assert answer["model"] == response.headers["x-stand-in"] == "qwen3-smoke"


def test_nothing_but_messages_is_needed(client: httpx.Client) -> None:
    response = client.post("/chat", json=say(FRANCE))
    assert response.json()["choices"][0]["message"]["content"] == PARIS
    assert "x-stand-in" not in response.headers


def test_max_tokens_ends_the_answer_with_length(client: httpx.Client) -> None:
    answer = client.post("/chat", json=say(FRANCE, max_tokens=3)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "The capital of"
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("question", [FRANCE, "Count to fifteen.", "Write a haiku about tea."])
@pytest.mark.parametrize("thinking", [False, True])
def test_streamed_text_equals_the_unstreamed(client: httpx.Client, question: str, thinking: bool) -> None:
    # Given a greedy answer in one piece
    body = say(question, temperature=0, enable_thinking=thinking)
    whole = client.post("/chat", json=body).json()
    # When it is streamed
    chunks, response = stream(client, body)
    # Then the pieces join to the same message, and end alike
    message = whole["choices"][0]["message"]
    assert joined(chunks, "content") == message["content"]
    assert joined(chunks, "reasoning") == message.get("reasoning", "")
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == whole["choices"][0]["finish_reason"]
    assert len(chunks) > 5
    assert all(c["object"] == "chat.completion.chunk" and c["id"] == chunks[0]["id"] for c in chunks)
    assert chunks[0]["session_id"] == response.headers["x-session-id"]


def test_a_stream_tells_usage_only_when_asked(client: httpx.Client) -> None:
    chunks, _ = stream(client, say(FRANCE))
    assert all("usage" not in chunk for chunk in chunks)
    chunks, _ = stream(client, say(FRANCE, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_reasoning_is_kept_apart(client: httpx.Client) -> None:
    # When the model is let think
    message = client.post("/chat", json=say(FRANCE, enable_thinking=True)).json()["choices"][0]["message"]
    # Then the thought is not in the content
    assert "It is Paris" in message["reasoning"]
    assert message["content"].strip() == PARIS
    # And by default there is none
    message = client.post("/chat", json=say(FRANCE)).json()["choices"][0]["message"]
    assert "reasoning" not in message
    assert "think" not in message["content"]


def test_earlier_turns_are_heard(client: httpx.Client) -> None:
    turns = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": FRANCE},
        {"role": "assistant", "content": PARIS},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of Japan?"}]},
    ]
    answer = client.post("/chat", json={"messages": turns}).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of Japan is Tokyo."


def test_a_session_is_kept_or_made(client: httpx.Client) -> None:
    given = client.post("/chat", json=say(FRANCE, session_id="mine-1"))
    assert given.json()["session_id"] == given.headers["x-session-id"] == "mine-1"
    made = [client.post("/chat", json=say(FRANCE)) for _ in range(2)]
    ids = [response.json()["session_id"] for response in made]
    assert ids == [response.headers["x-session-id"] for response in made]
    assert len({*ids, "mine-1"}) == 3


def test_the_documented_base_path_works(client: httpx.Client) -> None:
    answer = client.post("/qwen3/chat", json=say(FRANCE)).json()
    assert answer["choices"][0]["message"]["content"] == PARIS


def test_fields_nobody_reads_are_named(client: httpx.Client) -> None:
    response = client.post("/chat", json=say(FRANCE, tempratur=1, user="me"))
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "tempratur, user"


def test_many_at_once_each_get_their_own_answer(stack: Any, key: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    asked = {FRANCE: PARIS, "What is the capital of Japan?": "The capital of Japan is Tokyo."}
    questions = list(asked) * 12

    def ask(question: str) -> str:
        with stack.client(key) as own:
            if len(question) % 2:
                return joined(stream(own, say(question, temperature=0))[0], "content")
            return str(own.post("/chat", json=say(question, temperature=0)).json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, questions))
    assert answers == [asked[question] for question in questions]
