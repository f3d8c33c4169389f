"""The arithmetic of deploy/SIZING.md: each of its tables, made anew from the figures it is counted with."""

import inspect
import json
import math
from typing import Any

from benchmarks import scaling
from benchmarks.autoscaler import read
from server.core.settings import Settings
from server.db.pool import make_pool
from tests.deploy.manifests import ROOT

ASSUMED = scaling.parser().parse_args([])
"""What no machine here could measure, and the mix of chats."""
POLICY = read(scaling.SCALED)
SPARE = next(trigger.threshold for trigger in POLICY.triggers if trigger.name == "busy-workers")
SETTINGS = Settings()
RESULTS = ROOT / "benchmarks" / "results"

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 28, 1024, 16, 8, 128, 3072, 151936
"""Qwen3-0.6B's config.json; its embedding is its output layer as well."""
NUMBER_BYTES = 2
GPU_SHARE = 0.92
"""vLLM's gpu_memory_utilization, unless told otherwise."""
OTHER_GIB = 2.0
"""Assumed: activations, CUDA graphs and context."""
TEXT_BYTES = 4
"""Of a token, as in server/core/prompt_tokens.py."""
ROW_BYTES = 500
"""Assumed: a chat's row without its text, and its entries in indexes."""
PAGE_BYTES, VECTORS_A_PAGE = 8192, 3
"""Of 1,024 dimensions (server/db/migrations/0002)."""
VECTORS_AT_ONCE = 32
"""Chats in the one job of vectors that is on its way (workers/vectors.py)."""
LOADS = (100, 10_000, 1_000_000)
LEAST_SERVERS = (1, 2, 2)
"""`minReplicas` of the overlays that they are for: single-gpu, then multi-gpu."""
CONNECTIONS = inspect.signature(make_pool).parameters["max_size"].default + 1
"""To Postgres, of a server process: its pool, and the one that listens."""


def result(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text())["result"])


GPU_S = ASSUMED.prompt / ASSUMED.prompt_rate + ASSUMED.answer / ASSUMED.answer_rate
TOKENS = ASSUMED.prompt + ASSUMED.answer
STEPS_PER_S = ASSUMED.answer_rate / ASSUMED.slots
FEW = result("chat_throughput")["streams"]["4"]["service"]
"""Four streams share a message there, as they do where many workers answer many servers."""
SERVER_MS = FEW["cpu_s_per_1000_tokens"]["server"]
"""CPU ms of a token."""
BROKER_MS = FEW["cpu_s_per_1000_tokens"]["rabbitmq"] / FEW["amqp_messages_per_token"]
"""CPU ms of a message of frames."""
JOB_MS = next(row for row in result("gateway")["loads"] if row["parallel"] == 64 and not row["stream"])["this service"][
    "cpu_s_per_1000_requests"
]["broker"]
"""CPU ms in the broker of a job, its record and one answer."""
ROWS_PER_S = result("similar")["ingest"]["live_chats_per_s"]
CHAT_BYTES = TEXT_BYTES * TOKENS + ROW_BYTES + PAGE_BYTES / VECTORS_A_PAGE
VECTORS_PER_S = VECTORS_AT_ONCE / (VECTORS_AT_ONCE * TOKENS / ASSUMED.prompt_rate)


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _short(value: float) -> str:
    """Two digits, or all of a whole number."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def model() -> list[str]:
    attention = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 2 * HEAD_DIM
    layer = attention + 3 * HIDDEN * INNER + 2 * HIDDEN
    parameters = VOCABULARY * HIDDEN + LAYERS * layer + HIDDEN
    kv = kv_bytes()
    weights = parameters * NUMBER_BYTES
    return [
        row(
            "parameters of a layer",
            "2 × 1024 × 2048 + 2 × 1024 × 1024 + 3 × 1024 × 3072 + 2 × 1024 + 2 × 128",
            f"{layer:,}",
        ),
        row("parameters", f"151,936 × 1024 + 28 × {layer:,} + 1024", f"{parameters:,}"),
        row("weights", f"{parameters:,} × 2", f"{weights:,} bytes, {weights / 2**30:.2f} GiB"),
        row("KV cache of a token", "2 × 28 × 8 × 128 × 2", f"{kv:,} bytes, {kv // 1024} KiB"),
    ]


def kv_bytes() -> int:
    """Of a token: a key and a value for each KV head of each layer."""
    return 2 * LAYERS * KV_HEADS * HEAD_DIM * NUMBER_BYTES


def streams() -> list[str]:
    contexts = (int(TOKENS), 2048, 4096, 8192)
    told = [row("memory", "left for the KV cache", "tokens", *(f"streams of {context:,}" for context in contexts))]
    told.append(row(*["---"] * (3 + len(contexts))))
    for gib in (16, 24, 48, 80):
        room = GPU_SHARE * gib - 1192099840 / 2**30 - OTHER_GIB
        tokens = int(room * 2**30 / kv_bytes())
        told.append(row(f"{gib} GiB", f"{room:.1f} GiB", f"{tokens:,}", *(f"{tokens // each:,}" for each in contexts)))
    return told


def servers(chats_per_s: float, least: int = 2) -> int:
    by_cpu = chats_per_s * ASSUMED.answer * SERVER_MS / 1000 / SPARE
    by_streams = in_hand(chats_per_s) / (SPARE * SETTINGS.max_connections)
    return max(least, math.ceil(by_cpu), math.ceil(by_streams))


def workers(chats_per_s: float) -> int:
    return max(1, math.ceil(chats_per_s * GPU_S / SPARE))


def in_hand(chats_per_s: float) -> float:
    """Chats that are made at a time (Little's law)."""
    return chats_per_s * GPU_S * ASSUMED.slots


def frames(chats_per_s: float) -> float:
    """Messages of frames, at the most: one a step of each worker for each server, and none without a token."""
    return min(chats_per_s * ASSUMED.answer, workers(chats_per_s) * servers(chats_per_s) * STEPS_PER_S)


def broker_cores(chats_per_s: float) -> float:
    return (chats_per_s * JOB_MS + frames(chats_per_s) * BROKER_MS) / 1000


def loads() -> list[str]:
    rates = [load / 3600 for load in LOADS]

    def of(name: str, how: str, values: list[str]) -> str:
        return row(name, how, *values)

    gib_a_day = [load * 24 * CHAT_BYTES / 2**30 for load in LOADS]
    return [
        of("chats/s", "λ = N / 3600", [_short(rate) for rate in rates]),
        of("tokens made/s", "λ × o", [f"{rate * ASSUMED.answer:,.0f}" for rate in rates]),
        of("GPUs at work", "λ × g", [_short(rate * GPU_S) for rate in rates]),
        of("**chat workers**, a GPU each", "λ × g / u, up", [str(workers(rate)) for rate in rates]),
        of("chats in hand", "λ × g × s", [f"{in_hand(rate):,.0f}" for rate in rates]),
        of("GPUs for vectors", "λ × (p + o) / P", [_short(rate * TOKENS / ASSUMED.prompt_rate) for rate in rates]),
        of(
            "**server processes**",
            "as below",
            [str(servers(rate, least)) for rate, least in zip(rates, LEAST_SERVERS, strict=True)],
        ),
        of("jobs and records through the broker/s", "2 × λ", [_short(2 * rate) for rate in rates]),
        of("messages of frames/s, at the most", "as below", [f"{frames(rate):,.0f}" for rate in rates]),
        of("**broker**, cores at work", "as below", [_short(broker_cores(rate)) for rate in rates]),
        of(
            "Postgres: share of the rows/s it wrote here",
            "λ / w",
            [f"{100 * rate / ROWS_PER_S:.2g} %" for rate in rates],
        ),
        of(
            "**Postgres**, disk a day",
            "24 × N × d",
            [f"{_short(gib)} GiB" for gib in gib_a_day],
        ),
        of(
            "keys, at the least",
            "N / (60 × 50)",
            [str(math.ceil(load / 60 / SETTINGS.rate_limit_per_minute)) for load in LOADS],
        ),
    ]


def figures() -> list[str]:
    """What the loads are counted with."""
    return [
        row("p, o", "tokens of a prompt and of an answer", f"{ASSUMED.prompt:g}, {ASSUMED.answer:g}", "assumed"),
        row("P", "prompt tokens/s a GPU reads", f"{ASSUMED.prompt_rate:,.0f}", "**assumed: measure it**"),
        row("R", "tokens/s a GPU makes with all slots taken", f"{ASSUMED.answer_rate:,.0f}", "**assumed: measure it**"),
        row(
            "s",
            "slots: `max_num_seqs` among the model's `engine` options",
            ASSUMED.slots,
            f"chosen: R / s is what each reader gets, {STEPS_PER_S:.0f} tokens/s",
        ),
        row(
            "b", "seconds from the order of a worker until it is ready", f"{ASSUMED.start:g}", "**assumed: measure it**"
        ),
        row("g", "seconds of a GPU a chat takes", f"{GPU_S:.2f}", "p / P + o / R"),
        row("u", "how busy workers are to be", SPARE, "`busy-workers` of the ScaledObject"),
        row("c", "CPU ms of a server for a token", f"{SERVER_MS:.4f}", "`chat_throughput`, 4 streams a message"),
        row(
            "m",
            "CPU ms of the broker for a message of frames",
            f"{BROKER_MS:.2f}",
            "the same: its CPU a token by messages a token",
        ),
        row("j", "CPU ms of the broker for a job and its record", f"{JOB_MS:.2f}", "`gateway`, 64 in parallel"),
        row("w", "chats/s into Postgres", f"{ROWS_PER_S:,.0f}", "`similar`, live"),
        row(
            "d",
            "bytes of a chat in Postgres",
            f"{CHAT_BYTES:,.0f}",
            "4 × (p + o) + 500 + 8192 / 3: text (4 bytes a token), rest of "
            "the row with indexes (assumed), vector (three to a page)",
        ),
        row("v", "chats/s that get a vector", f"{VECTORS_PER_S:.1f}", "P / (p + o): one job of 32 chats at a time"),
    ]


def policies() -> list[str]:
    found = result("scaling")["policies"]
    return [
        row(
            name,
            f"{each['gpu_hours']:,.0f}",
            f"{100 * each['late']:.1f} %",
            f"{each['wait_p50_s']:.0f} s",
            f"{each['wait_p99_s']:.0f} s",
            f"{each['sent_home_at_work']:,}",
        )
        for name, each in found.items()
    ]


def sweep() -> list[str]:
    told = []
    for name, rows in result("scaling")["sweep"].items():
        told += [
            row(
                name,
                each["value"],
                *(f"{each[load]['gpu_hours']:.0f} h, {100 * each[load]['late']:.1f} %" for load in ("day", "waves")),
            )
            for each in rows
        ]
    return told


TABLES = {"model": model, "streams": streams, "figures": figures, "loads": loads, "policies": policies, "sweep": sweep}
