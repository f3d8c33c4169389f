"""deploy/SIZING.md says what its own arithmetic gives, with today's results and policy."""

import re

import pytest
import yaml

from benchmarks.autoscaler import read
from server.core.prompt_tokens import BYTES_A_TOKEN
from server.core.registry import load_registry
from tests.deploy import sizing
from tests.deploy.manifests import K8S, ROOT, of_kind, pods, render
from workers.vectors import BATCH

TEXT = (ROOT / "deploy" / "SIZING.md").read_text()


@pytest.mark.parametrize("table", sizing.TABLES)
def test_each_table_is_what_its_formulas_give(table: str) -> None:
    rows = "\n".join(sizing.TABLES[table]())
    # A table of its own begins after its head, or with the head where that is counted as well
    assert rows in TEXT, f"deploy/SIZING.md is to have this:\n{rows}"


def test_the_constants_are_the_services() -> None:
    assert sizing.TEXT_BYTES == BYTES_A_TOKEN
    assert sizing.VECTORS_AT_ONCE == BATCH
    (vectors,) = load_registry(ROOT / "models.yaml").of_type("embedding")
    assert vectors.dimensions == 1024
    assert sizing.PAGE_BYTES // (vectors.dimensions * 2 + 40) == sizing.VECTORS_A_PAGE


def test_models_answer_as_many_at_once_as_is_counted_with() -> None:
    entries = yaml.safe_load((ROOT / "models.yaml").read_text())["models"]
    # Those that are not enabled too: vLLM's own number depends on the GPU
    slots = {each["id"]: each["engine"].get("max_num_seqs") for each in entries if each["type"] == "chat"}
    assert len(slots) > 1
    assert set(slots.values()) == {sizing.ASSUMED.slots}


def test_what_is_said_beside_the_tables_is_counted_as_well() -> None:
    said = re.sub(r"\s+", " ", TEXT)
    rates = [load / 3600 for load in sizing.LOADS]
    most = sizing.POLICY.max_replicas
    servers = [sizing.servers(rate, least) for rate, least in zip(rates, sizing.LEAST_SERVERS, strict=True)]
    for sentence in (
        f"112 for chat, {round(rates[2] * sizing.TOKENS / sizing.ASSUMED.prompt_rate)} for vectors",
        f"{sizing.workers(rates[2])} for chat",
        f"`maxReplicaCount` ({most}, which is {most * sizing.SPARE / sizing.GPU_S * 3600:,.0f} chats an hour at `u`)",
        f"At about {sizing.VECTORS_PER_S * 3600:,.0f} an hour, **vectors**",
        f"{sizing.loads()[-2].split('|')[-2].strip()} a day fill any",
        f"{sizing.workers(rates[2])} workers to {sizing.servers(rates[2])} servers: {sizing.frames(rates[2]):,.0f} mes",
        f"{sizing.LOADS[1] * 24 * 30 * sizing.CHAT_BYTES / 2**30:,.0f} GiB of disk for a month",
        f"{sizing.LOADS[2] * 24 * 30 * sizing.CHAT_BYTES / 2**40:.1f} TiB for a month",
        f"connections to Postgres: {sizing.CONNECTIONS} a server process",
        f"| servers | {' | '.join(f'{count} of a core' for count in servers)} |",
        f"3 nodes of {-(-sizing.broker_cores(rates[2]) // (3 * sizing.SPARE)):.0f} cores",
    ):
        assert sentence in said, sentence


@pytest.mark.parametrize(("overlay", "least"), [("single-gpu", 0), ("multi-gpu", 1), ("multi-gpu", 2)])
def test_servers_are_as_many_and_as_large_as_is_counted_with(overlay: str, least: int) -> None:
    manifests = render(K8S / "overlays" / overlay)
    (autoscaler,) = of_kind(manifests, "HorizontalPodAutoscaler")
    assert autoscaler["spec"]["minReplicas"] == sizing.LEAST_SERVERS[least]
    assert autoscaler["spec"]["maxReplicas"] >= sizing.servers(sizing.LOADS[least] / 3600, sizing.LEAST_SERVERS[least])
    # A core each, more of which is to be used than is counted with
    (server,) = (pod for name, pod in pods(manifests).items() if name == "Deployment/server")
    assert server["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "1"
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["resource"]["target"]["averageUtilization"] / 100 >= sizing.SPARE


def test_the_embedding_models_policy_can_be_read_too() -> None:
    assert read(K8S / "components" / "scaling" / "embedding-qwen3-embedding-0-6b.yaml").min_replicas == 0
