"""`/health`, `/models`, `/metrics`, the rate limit, and what the service says of itself."""

import re
import time

import httpx
import pytest

from tests.stack import PROJECT, Stack, eventually, say, second_server


def test_health_tells_each_part(stack: Stack) -> None:
    # No key is needed
    health = httpx.get(f"{stack.url}/health").json()
    assert health["status"] == "healthy"
    for part in ("model_loaded", "embedding_model_loaded", "rabbitmq_connected", "database_connected"):
        assert health[part] is True
    assert {(w["type"], w["model"], w["ready"]) for w in health["workers"]} == {
        ("chat", "qwen3-smoke", True),
        ("embedding", "minilm-smoke", True),
        ("archive", "", True),
    }
    assert health["timestamp"]
    # And it says that stand-ins answer, and how to have the real ones
    assert len(health["notes"]) == 2
    assert all("Stand-in for qwen3" in note and "HF_HOME" in note for note in health["notes"])
    for path in ("/health/live", "/health/ready", "/qwen3/health"):
        assert httpx.get(stack.url + path).status_code == 200


def test_models_are_the_bare_documented_list(client: httpx.Client) -> None:
    chat, embedding = client.get("/models").json()
    assert {"id", "name", "type", "context_length", "description"} <= set(chat)
    assert (chat["id"], chat["type"], chat["stand_in_for"]) == ("qwen3-smoke", "chat", ["qwen3-0.6b"])
    assert (embedding["id"], embedding["stand_in_for"]) == ("minilm-smoke", ["qwen3-embedding-0.6b"])
    assert "Stand-in" in chat["description"]
    assert "source:" in chat["description"]


def test_the_start_says_what_answers(stack: Stack) -> None:
    assert "the model hub cannot be reached" in stack.output
    assert "set `source:` in models.yaml to a local folder, or HF_HOME" in stack.output
    assert stack.key in stack.output


def exported(url: str) -> dict[str, float]:
    """Every sample, by name and labels."""
    text = httpx.get(f"{url}/metrics").text
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def worker_urls(stack: Stack) -> list[str]:
    """The workers' own ports, as their logs name them."""
    urls = []
    for log in sorted((stack.folder / "logs").glob("*.log")):
        ports = re.findall(r"running on http://[0-9.]+:(\d+)", log.read_text())
        if ports and log.stem != "server":
            urls.append(f"http://127.0.0.1:{ports[-1]}")
    return urls


def test_requests_are_counted_by_endpoint_model_and_status(stack: Stack, client: httpx.Client) -> None:
    # Given the counts before
    ok = 'qwen3_requests_total{endpoint="/chat",model="qwen3-smoke",status="200"}'
    bad = 'qwen3_requests_total{endpoint="/chat",model="",status="400"}'
    unknown = 'qwen3_requests_total{endpoint="unknown",model="",status="404"}'
    before = exported(stack.url)
    # When one chat is answered, one is refused, and paths are made up
    client.post("/qwen3/chat", json=say("Hello!"))
    client.post("/chat", json={})
    for path in ("/a", "/b"):
        client.get(path)
    after = exported(stack.url)
    # Then each is counted once, under labels that do not grow with what is asked
    assert after[ok] - before.get(ok, 0) == 1
    assert after[bad] - before.get(bad, 0) == 1
    assert after[unknown] - before.get(unknown, 0) == 2


def test_tokens_and_latencies_are_measured(stack: Stack, client: httpx.Client) -> None:
    server, workers = exported(stack.url), [exported(url) for url in worker_urls(stack)]
    # When one chat of known length is streamed
    with client.stream("POST", "/chat", json=say("What is the capital of France?", stream=True)) as response:
        response.read()
    # Then the worker counted its tokens, vLLM among its metrics, and the server its latencies
    name = 'qwen3_completion_tokens_total{model="qwen3-smoke"}'
    (chat,) = (url for url, before in zip(worker_urls(stack), workers, strict=True) if name in before)
    before = next(values for values in workers if name in values)
    eventually(lambda: exported(chat)[name] == before[name] + 8)
    assert any(sample.startswith("vllm:generation_tokens_total") for sample in exported(chat))
    for histogram in ("time_to_first_token", "inter_token_latency"):
        count = f'qwen3_{histogram}_seconds_count{{model="qwen3-smoke"}}'
        assert exported(stack.url)[count] > server.get(count, 0)
    after = exported(stack.url)
    assert after['qwen3_queue_consumers{lane="interactive",model="qwen3-smoke"}'] == 2  # of the one worker
    assert after['qwen3_queue_messages{lane="interactive",model="qwen3-smoke"}'] == 0
    assert after["qwen3_history_queue_messages"] == 0
    assert after["qwen3_dead_letters"] == 0


def test_workers_answer_probes(stack: Stack) -> None:
    urls = worker_urls(stack)
    assert len(urls) == 3
    for url in urls:
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert httpx.get(f"{url}/health/ready").json() == {"ready": True}


@pytest.mark.usefixtures("client")
def test_the_readme_lists_exactly_the_metrics_that_are_exported(stack: Stack) -> None:
    # Given what the whole stack exports after every kind of request was made
    found: set[str] = set()
    for url in (stack.url, *worker_urls(stack)):
        text = httpx.get(f"{url}/metrics").text
        found |= set(re.findall(r"^# TYPE (qwen3_\w+) ", text, re.MULTILINE))
    found = {name for name in found if not name.endswith("_created")}
    # Then the README's table has the same names
    listed = set(re.findall(r"^\| `(qwen3_\w+)` ", (PROJECT / "README.md").read_text(), re.MULTILINE))
    assert listed == found


def test_the_rate_limit_is_counted_across_servers(stack: Stack) -> None:
    key = stack.new_key("hasty")
    headers = {"Authorization": f"Bearer {key}"}
    # Given two servers that share a limit of six a minute, and a minute that has just begun
    settings = {"RATE_LIMIT_PER_MINUTE": "6"}
    with second_server(stack, **settings) as (one, _), second_server(stack, **settings) as (two, _):
        if time.time() % 60 > 45:
            time.sleep(60 - time.time() % 60)
        # When one is asked three times and the other three times
        answers = [httpx.get(f"{url}/models", headers=headers) for url in (one, one, one, two, two, two)]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert [answer.headers["x-ratelimit-limit"] for answer in answers] == ["6"] * 6
        assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["5", "4", "3", "2", "1", "0"]
        assert time.time() < int(answers[0].headers["x-ratelimit-reset"]) <= time.time() + 61
        # Then both refuse the seventh, and say when to come back
        for url in (one, two):
            refused = httpx.post(f"{url}/chat", headers=headers, json=say("Hello!"))
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.headers["x-ratelimit-remaining"] == "0"
            assert "Rate limit of 6 requests per minute exceeded" in refused.json()["error"]
        # And another key is not concerned
        with stack.client(stack.new_key("patient")) as other:
            assert other.get("/models").status_code == 200
        # Errors carry the headers too
        fresh = {"Authorization": f"Bearer {stack.new_key('clumsy')}"}
        assert httpx.post(f"{one}/chat", headers=fresh, json={}).headers["x-ratelimit-remaining"] == "5"


def test_a_key_is_stored_hashed_only(stack: Stack) -> None:
    # Given the database as it lies on the disk, and every log
    files = [*(stack.folder / "postgres" / "base").rglob("*"), *(stack.folder / "logs").rglob("*")]
    files += [*(stack.folder / "postgres" / "pg_wal").rglob("*")]
    # Then the key is in none of it
    assert len(files) > 100
    for file in files:
        if file.is_file():
            assert stack.key.encode() not in file.read_bytes(), file


def test_no_prompt_is_ever_logged(stack: Stack, client: httpx.Client) -> None:
    secret = "xyzzy-plugh-4711"
    client.post("/chat", json=say(secret, max_tokens=2))
    client.post("/chat", json=say(secret, max_tokens=100_000))
    client.post("/chat", json={"messages": [{"role": secret, "content": secret}]})
    client.post("/embeddings", json={"text": secret})
    client.post("/chat/similar", json={"query": secret})
    for log in (stack.folder / "logs").glob("*.log"):
        assert secret not in log.read_text(), log
