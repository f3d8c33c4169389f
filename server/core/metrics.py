"""Every metric this project defines, in base units, with bounded labels. vLLM's own come beside them.

The README's table of metrics is held against what a running stack exports by a test.
"""

from prometheus_client import Counter, Gauge, Histogram

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
amqp_messages = Counter("qwen3_amqp_messages", "Messages this process sent to the broker")
history_records = Counter("qwen3_history_records", "Finished requests written to Postgres", ["type"])
history_lag = Histogram("qwen3_history_lag_seconds", "From a request's end to its row in Postgres", buckets=_LATENCY_S)
vectors_written = Counter("qwen3_history_vectors", "Chats made searchable", ["model"])
