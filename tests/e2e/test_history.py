"""What is remembered, of whom, and what is counted."""

from typing import Any

import httpx
import pytest

from tests.stack import Stack, eventually, say

FRANCE, PARIS = "What is the capital of France?", "The capital of France is Paris."


@pytest.fixture(scope="module")
def answers(stack: Stack, key: str) -> list[dict[str, Any]]:
    """Four chats of this module's key, in two sessions, one of them streamed; and one embedding request."""
    with stack.client(key) as client:
        made = [
            client.post("/chat", json=say(FRANCE, session_id="geography")).json(),
            client.post("/chat", json=say("How do I bake bread?", session_id="kitchen")).json(),
            client.post("/chat", json=say("Write a haiku about tea.", session_id="kitchen")).json(),
        ]
        with client.stream("POST", "/chat", json=say("Hello!", session_id="kitchen", stream=True)) as response:
            response.read()
        client.post("/embeddings", json={"input": ["one", "two"]})
        eventually(lambda: client.get("/usage").json()["total_requests"] == 5)
    return made


def test_every_chat_is_in_history_newest_first(client: httpx.Client, answers: list[dict[str, Any]]) -> None:
    entries = client.get("/chat/history").json()
    assert [entry["messages"][0]["content"] for entry in entries] == [
        "Hello!",
        "Write a haiku about tea.",
        "How do I bake bread?",
        FRANCE,
    ]
    oldest = entries[-1]
    assert oldest["messages"] == [{"role": "user", "content": FRANCE}, {"role": "assistant", "content": PARIS}]
    assert set(oldest["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert oldest["usage"].items() <= answers[0]["usage"].items()
    assert oldest["model"] == "qwen3-smoke"
    assert oldest["session_id"] == "geography"
    assert oldest["created_at"]
    # And the streamed one is there like the others
    assert entries[0]["messages"][1]["content"] == "Hello! How can I help you today?"
    assert entries[0]["finish_reason"] == "stop"


@pytest.mark.usefixtures("answers")
def test_history_is_filtered_and_paged(client: httpx.Client) -> None:
    def asked(query: str) -> list[str]:
        return [entry["messages"][0]["content"] for entry in client.get(f"/chat/history?{query}").json()]

    assert asked("session_id=geography") == [FRANCE]
    assert asked("limit=1&offset=3") == [FRANCE]
    assert asked("limit=2") == ["Hello!", "Write a haiku about tea."]
    assert asked("model=qwen3-smoke&session_id=kitchen&limit=1") == ["Hello!"]
    assert asked("model=another") == []
    assert asked("session_id=unknown") == []


@pytest.mark.usefixtures("answers")
def test_sessions_the_last_used_first(client: httpx.Client) -> None:
    kitchen, geography = client.get("/chat/sessions").json()
    assert (kitchen["session_id"], kitchen["chats"]) == ("kitchen", 3)
    assert (geography["session_id"], geography["chats"]) == ("geography", 1)
    assert kitchen["created_at"] < kitchen["updated_at"]
    assert client.get("/chat/sessions?limit=1&offset=1").json() == [geography]


def test_usage_and_stats_equal_what_the_engine_counted(client: httpx.Client, answers: list[dict[str, Any]]) -> None:
    # Given what each answer said it cost, and what history says of the streamed one
    streamed = client.get("/chat/history?limit=1").json()[0]["usage"]
    chats = [answer["usage"] for answer in answers] + [streamed]
    embedded = client.post("/embeddings", json={"input": ["one", "two"]}).json()["usage"]["total_tokens"]
    eventually(lambda: client.get("/usage").json()["total_requests"] == 6)
    # Then the sums are the same
    tokens = sum(usage["total_tokens"] for usage in chats)
    usage = client.get("/usage").json()
    assert usage == {
        "total_requests": 6,
        "requests_today": 6,
        "requests_this_month": 6,
        "models_used": {"qwen3-smoke": 4, "minilm-smoke": 2},
        "total_tokens": tokens + 2 * embedded,
        "average_tokens_per_request": round((tokens + 2 * embedded) / 6, 2),
    }
    assert client.get("/chat/stats").json() == {
        "total_chats": 4,
        "total_sessions": 2,
        "chats_today": 4,
        "chats_this_month": 4,
        "models_used": {"qwen3-smoke": 4},
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in chats),
        "completion_tokens": sum(usage["completion_tokens"] for usage in chats),
        "total_tokens": tokens,
        "average_tokens_per_chat": round(tokens / 4, 2),
    }


@pytest.mark.usefixtures("answers")
def test_similar_finds_by_meaning(client: httpx.Client) -> None:
    def similar(query: str, **fields: Any) -> list[dict[str, Any]]:
        return client.post("/chat/similar", json={"query": query, **fields}).json()

    # Given that the vectors are there
    eventually(lambda: len(similar("x", threshold=0)) == 4)
    # When the same is asked in words that share nothing but the meaning
    found = similar("Which city is the seat of the French government?", threshold=0)
    # Then that chat comes first, well before the others
    assert found[0]["messages"][0]["content"] == FRANCE
    assert found[0]["session_id"] == "geography"
    assert [entry["similarity"] for entry in found] == sorted((e["similarity"] for e in found), reverse=True)
    assert found[0]["similarity"] > 0.5 > found[1]["similarity"]
    assert all(0 <= entry["similarity"] <= 1 for entry in found)
    # And the documented defaults hold: at least 0.7, the exact question included
    assert [entry["messages"][1]["content"] for entry in similar(FRANCE)] == [PARIS]
    assert similar("recipe for a loaf", threshold=0, limit=1)[0]["messages"][0]["content"] == "How do I bake bread?"
    assert similar("nothing that was ever said, about submarines", threshold=0.9) == []


def test_a_chat_is_in_history_and_found_within_a_second(client: httpx.Client) -> None:
    # When a chat has ended
    session = client.post("/chat", json=say("Who are you?", session_id="soon")).json()["session_id"]
    # Then both are there; generous, because no test asserts a time on a shared machine
    eventually(lambda: client.get(f"/chat/history?session_id={session}").json())
    query = {"query": "Who are you?", "threshold": 0, "limit": 100}
    eventually(lambda: [e for e in client.post("/chat/similar", json=query).json() if e["session_id"] == session])


@pytest.mark.usefixtures("answers")
def test_another_key_sees_nothing_of_it(stack: Stack) -> None:
    # Given another key that has said one thing, in a session of the same name
    with stack.client(stack.new_key("neighbour")) as other:
        other.post("/chat", json=say("Hello!", session_id="kitchen"))
        eventually(lambda: other.get("/usage").json()["total_requests"] == 1)
        # Then it sees that and no more
        assert [e["messages"][0]["content"] for e in other.get("/chat/history").json()] == ["Hello!"]
        assert [e["messages"][0]["content"] for e in other.get("/chat/history?session_id=kitchen").json()] == ["Hello!"]
        assert [(s["session_id"], s["chats"]) for s in other.get("/chat/sessions").json()] == [("kitchen", 1)]
        assert other.get("/chat/stats").json()["total_chats"] == 1
        found = eventually(lambda: other.post("/chat/similar", json={"query": FRANCE, "threshold": 0}).json())
        assert [entry["messages"][0]["content"] for entry in found] == ["Hello!"]
        assert other.get("/chat/history?session_id=geography").json() == []
