"""Every metric this project defines, in base units, with bounded labels. vLLM's own come beside them.

The README's table of metrics is held against what a running stack exports by a test. What has labels appears with its
first event, unless it is named before: a rate does not see the step from nothing to 1. So each process names at its
start what it knows of (`begin_…`); `endpoint`, `status` and `key` cannot be known.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import Counter, Gauge, Histogram

from server.core.errors import ServiceError
from server.core.messages import WorkerType

MAX_KEYS = 100
"""Keys with a label of their own in one process: the first that come; the rest are `other`. A label never goes away, so
that without a bound whoever makes many keys makes every scrape larger. What each key is billed stands in Postgres."""
OTHER_KEYS = "other"

OUTCOMES = ("done", "refused", "failed", "expired", "cancelled", "lost")

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

requests = Counter("qwen3_requests", "HTTP requests answered", ["endpoint", "model", "status"])
request_duration = Histogram(
    "qwen3_request_duration_seconds", "From request to last byte", ["endpoint", "model"], buckets=_LATENCY_S
)
ttft = Histogram(
    "qwen3_time_to_first_token_seconds", "From request to first streamed token", ["model"], buckets=_LATENCY_S
)
inter_token_latency = Histogram(
    "qwen3_inter_token_latency_seconds", "Between two streamed chunks", ["model"], buckets=_INTER_TOKEN_S
)
queue_oldest_age = Gauge(
    "qwen3_queue_oldest_age_seconds",
    "Age of the oldest of this process's jobs that no worker has begun",
    ["model", "lane"],
    multiprocess_mode="livemax",
)
queue_prompt_tokens = Gauge(
    "qwen3_queue_prompt_tokens",
    "Estimated prompt tokens of this process's jobs that no worker has begun",
    ["model", "lane"],
    multiprocess_mode="livesum",
)
requests_waiting = Gauge(
    "qwen3_requests_waiting", "Requests of the servers that no worker has begun", ["model"], multiprocess_mode="livesum"
)
prompt_tokens = Counter("qwen3_prompt_tokens", "Tokens of prompts and embedded texts", ["model"])
completion_tokens = Counter("qwen3_completion_tokens", "Tokens generated", ["model"])
embedding_requests = Counter("qwen3_embedding_requests", "Embedding jobs done", ["model"])
embedding_texts = Counter("qwen3_embedding_texts", "Texts embedded", ["model"])
jobs = Counter("qwen3_jobs", "Jobs a worker finished", ["model", "outcome"])
jobs_running = Gauge("qwen3_jobs_running", "Jobs a worker has in hand", ["model"])
errors = Counter("qwen3_errors", "Errors told to clients, also in streams that had begun", ["error", "status"])
key_requests = Counter("qwen3_key_requests", "HTTP requests answered, by whose they are", ["key", "status"])
key_tokens = Counter("qwen3_key_tokens", "Tokens of finished requests, by whose they are", ["key", "kind"])
amqp_messages = Counter("qwen3_amqp_messages", "Messages this process sent to the broker")
history_records = Counter("qwen3_history_records", "Finished requests written to Postgres", ["type"])
history_lag = Histogram("qwen3_history_lag_seconds", "From a request's end to its row in Postgres", buckets=_LATENCY_S)
vectors_written = Counter("qwen3_history_vectors", "Chats made searchable", ["model"])

_keys: set[int] = set()


def key_label(key_id: int) -> str:
    """The label of a key: its id, as `python -m server keys list` has it, or OTHER_KEYS."""
    if len(_keys) < MAX_KEYS:
        _keys.add(key_id)
    return str(key_id) if key_id in _keys else OTHER_KEYS


def begin_server(chat_models: Iterable[str]) -> None:
    for model in chat_models:
        ttft.labels(model)
        inter_token_latency.labels(model)
    for kind in _kinds(ServiceError):
        errors.labels(kind.__name__, str(kind.status))


def _kinds(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield kind
    for narrower in kind.__subclasses__():
        if narrower.__module__ == ServiceError.__module__:
            yield from _kinds(narrower)


def begin_worker(type_: WorkerType, model: str) -> None:
    jobs_running.labels(model).set(0)
    for outcome in OUTCOMES:
        jobs.labels(model, outcome)
    prompt_tokens.labels(model)
    if type_ == "chat":
        completion_tokens.labels(model)
    else:
        embedding_requests.labels(model)
        embedding_texts.labels(model)


def begin_archive(embedding_model: str | None) -> None:
    for kind in ("chat", "embedding"):
        history_records.labels(kind)
    if embedding_model is not None:
        vectors_written.labels(embedding_model)
