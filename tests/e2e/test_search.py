"""`-search`: answers from the caller's own past chats, in every chat dialect, whole and streamed."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.dialogue import MODEL, user
from tests.e2e.test_tools import events
from tests.stack import Stack, eventually, say

NAME, ADA = "What is my name?", "Your name is Ada."
SEARCH = f"{MODEL}-search"


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    """With a key of the test's own: each question is a past chat of the next."""
    with stack.client(stack.new_key("searcher")) as made:
        yield made


@pytest.fixture
def past(client: httpx.Client) -> dict[str, Any]:
    """A chat that this key had before, once it can be found."""
    client.post("/chat", json=say("My name is Ada.", session_id="introductions", temperature=0))
    client.post("/chat", json=say("How do I bake bread?", session_id="baking", temperature=0))
    found = eventually(lambda: client.post("/chat/similar", json={"query": NAME, "threshold": 0.4}).json())
    return {"id": found[0]["id"], "session_id": "introductions", "similarity": found[0]["similarity"]}


def native(client: httpx.Client, streamed: bool) -> tuple[str, Any]:
    response = client.post("/chat", json=say(NAME, model=SEARCH, temperature=0, stream=streamed))
    if streamed:
        chunks = events(response)
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks), chunks[0].get("sources")
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer.get("sources")


def openai_chat(client: httpx.Client, streamed: bool) -> tuple[str, Any]:
    body = say(NAME, model=SEARCH, temperature=0, stream=streamed, enable_thinking=False)
    response = client.post("/v1/chat/completions", json=body)
    if streamed:
        chunks = events(response)
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks), chunks[0].get("sources")
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer.get("sources")


def gateway(client: httpx.Client, streamed: bool) -> tuple[str, Any]:
    body = say(NAME, model=SEARCH, temperature=0, stream=streamed, enable_thinking=False)
    response = client.post("/ai/v1/chat/completions", json=body)
    if streamed:
        chunks = events(response)
        return "".join(chunk["content"] for chunk in chunks), chunks[0].get("sources")
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer.get("sources")


def responses(client: httpx.Client, streamed: bool) -> tuple[str, Any]:
    body = {"input": NAME, "model": SEARCH, "temperature": 0, "reasoning": {"effort": "none"}, "stream": streamed}
    response = client.post("/v1/responses", json=body)
    if streamed:
        told = events(response)
        text = "".join(e["delta"] for e in told if e["type"] == "response.output_text.delta")
        assert told[-1]["response"]["sources"] == told[0]["response"]["sources"]
        return text, told[0]["response"].get("sources")
    answer = response.json()
    return answer["output"][0]["content"][0]["text"], answer.get("sources")


def anthropic(client: httpx.Client, streamed: bool) -> tuple[str, Any]:
    blocks = [{"role": "user", "content": [{"type": "text", "text": NAME}]}]
    body = {"messages": blocks, "model": SEARCH, "temperature": 0, "max_tokens": 50, "stream": streamed}
    response = client.post("/v1/messages", json=body)
    if streamed:
        told = events(response)
        text = "".join(e["delta"].get("text", "") for e in told if e["type"] == "content_block_delta")
        return text, told[0]["message"].get("sources")
    answer = response.json()
    return answer["content"][0]["text"], answer.get("sources")


@pytest.mark.parametrize("ask", [native, openai_chat, gateway, responses, anthropic])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_it_answers_from_a_past_chat_and_names_it(
    client: httpx.Client, past: dict[str, Any], ask: Any, streamed: bool
) -> None:
    text, sources = ask(client, streamed)
    assert text == ADA
    assert [(source["id"], source["session_id"]) for source in sources] == [(past["id"], "introductions")]
    assert sources[0]["similarity"] == pytest.approx(past["similarity"], abs=0.05)


def test_without_the_suffix_it_does_not_know(client: httpx.Client, past: dict[str, Any]) -> None:
    answer = client.post("/chat", json=say(NAME, temperature=0)).json()
    assert answer["choices"][0]["message"]["content"] == "You have not told me."
    assert "sources" not in answer


def test_another_key_s_chats_are_never_shown(stack: Stack, past: dict[str, Any]) -> None:
    with stack.client(stack.new_key("stranger")) as stranger:
        body = say(NAME, model=SEARCH, temperature=0, return_prompt=True)
        answer = stranger.post("/chat", json=body).json()
    assert "Ada" not in answer["prompt"]
    assert "sources" not in answer
    assert answer["choices"][0]["message"]["content"] == "You have not told me."


def test_it_can_think_as_well(client: httpx.Client, past: dict[str, Any]) -> None:
    answer = client.post("/chat", json=say(NAME, model=f"{MODEL}-thinking-search", temperature=0)).json()
    message = answer["choices"][0]["message"]
    assert "Ada" in message["reasoning"]
    assert answer["sources"]


def test_a_question_that_leaves_no_room_is_answered_without(client: httpx.Client, past: dict[str, Any]) -> None:
    # Given a long conversation that just fits, and past chats that would not
    turns = [user("Tea, tea. " * 330), {"role": "assistant", "content": "Yes."}, user(NAME)]
    body = {"messages": turns, "temperature": 0, "max_tokens": 20, "return_prompt": True}
    room = 2048 - 20 - client.post("/chat", json=body).json()["usage"]["prompt_tokens"]
    assert 0 <= room < 60
    # When it is asked to search, then it answers, from what it was sent alone
    answer = client.post("/chat", json=body | {"model": SEARCH})
    assert answer.status_code == 200, answer.text
    assert "sources" not in answer.json()
    assert "Ada" not in answer.json()["prompt"]


def test_what_was_shown_is_within_its_bound_and_is_not_remembered(client: httpx.Client, past: dict[str, Any]) -> None:
    # Given long chats that are all alike
    for index in range(6):
        client.post("/chat", json=say(f"A long talk about tea, part {index}. " + "Tea, tea. " * 20, max_tokens=60))
    question = "A long talk about tea. Tea, tea."
    eventually(lambda: len(client.post("/chat/similar", json={"query": question, "threshold": 0.5}).json()) >= 4)
    # When a question is answered from them
    body = say(question, model=SEARCH, return_prompt=True, session_id="tea", max_tokens=5)
    answer = client.post("/chat", json=body).json()
    # Then a quarter of the context is the most they get
    shown = answer["prompt"].split(question)[0]
    assert 0 < len(shown.encode()) <= 2048 // 4 + 40
    assert answer["sources"]
    # And history holds the question as it was asked
    entry = eventually(lambda: client.get("/chat/history", params={"session_id": "tea"}).json())[0]
    assert json.dumps(entry["messages"][0]) == json.dumps(user(question))
