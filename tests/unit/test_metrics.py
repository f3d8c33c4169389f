"""Metrics: what is exported before anything has happened, and labels that stay few."""

import pytest
from prometheus_client import REGISTRY

from server.core import metrics
from server.core.errors import QueueFull
from server.errors import error_body


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_keys_beyond_the_bound_share_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a process in which as many keys have come as have labels
    monkeypatch.setattr(metrics, "_keys", set())
    labels = {metrics.key_label(key_id) for key_id in range(metrics.MAX_KEYS)}
    assert len(labels) == metrics.MAX_KEYS
    # When others come, then they share one, and the first keep theirs
    assert {metrics.key_label(key_id) for key_id in range(1000, 2000)} == {metrics.OTHER_KEYS}
    assert metrics.key_label(7) == "7"


def test_what_has_not_happened_yet_is_exported_as_nothing() -> None:
    # When the processes of a service begin
    metrics.begin_server(["new-chat"])
    metrics.begin_worker("chat", "new-chat")
    metrics.begin_worker("embedding", "new-embedding")
    metrics.begin_archive("new-embedding")
    # Then a rate sees the first event of each kind
    assert value("qwen3_time_to_first_token_seconds_count", model="new-chat") == 0
    assert value("qwen3_errors_total", error="Forbidden", status="403") is not None  # or more, by other tests
    assert value("qwen3_jobs_total", model="new-chat", outcome="expired") == 0
    assert value("qwen3_jobs_running", model="new-embedding") == 0
    assert value("qwen3_completion_tokens_total", model="new-chat") == 0
    assert value("qwen3_completion_tokens_total", model="new-embedding") is None
    assert value("qwen3_embedding_texts_total", model="new-embedding") == 0
    assert value("qwen3_history_vectors_total", model="new-embedding") == 0
    assert value("qwen3_history_records_total", type="embedding") is not None


@pytest.mark.parametrize("dialect", ["native", "openai", "anthropic"])
def test_an_error_is_counted_when_it_is_told(dialect: str) -> None:
    before = value("qwen3_errors_total", error="QueueFull", status="429") or 0
    error_body(QueueFull("Later."), dialect)  # type: ignore[arg-type]
    assert value("qwen3_errors_total", error="QueueFull", status="429") == before + 1
