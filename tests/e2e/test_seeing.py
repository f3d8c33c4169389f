"""What deploy/ has Prometheus and Grafana ask, asked of a real Prometheus that reads this stack."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.private import free_port
from tests.deploy.manifests import tool
from tests.e2e.test_service import worker_urls
from tests.seeing import PROMETHEUS, RULES, dashboards, expressions, rules, series, variables
from tests.stack import PROJECT, Stack, eventually, say

SCRAPES_S = 1


@dataclass
class Prometheus:
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, trust_env=False, timeout=30).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found


def process_of(url: str) -> str:
    """Whose port this is, by what it alone counts."""
    text = httpx.get(f"{url}/metrics").text
    told = {"chat": "qwen3_completion_tokens_total{", "embedding": "qwen3_embedding_texts_total{"}
    return next((name for name, sample in told.items() if f"\n{sample}" in text), "archive")


def configuration(stack: Stack) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml, with this stack's addresses in place of the containers' names."""
    made: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    urls = {f"qwen3-{process_of(url)}": url for url in worker_urls(stack)} | {"qwen3-server": stack.url}
    for job in made["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [urls.pop(job["job_name"]).removeprefix("http://")]}]
    assert not urls, "processes that nobody reads"
    made["rule_files"] = [str(RULES)]
    made["global"] = {"scrape_interval": f"{SCRAPES_S}s", "evaluation_interval": f"{SCRAPES_S}s"}
    return made


@pytest.fixture(scope="module")
def prometheus(stack: Stack, key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has read the stack before and after every kind of request was made."""
    folder: Path = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(stack)))
    port = free_port()
    made = Prometheus(f"http://127.0.0.1:{port}")
    argv = [tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    argv += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT)
        try:
            eventually(lambda: up(made) == {"1"}, timeout_s=30)
            use(stack, key)
            time.sleep(2 * SCRAPES_S + 1)  # a rate takes two reads, a rule the one after
            yield made
        finally:
            process.terminate()
            process.wait(30)


def up(prometheus: Prometheus) -> set[str]:
    """What `up` says of all processes; nothing, before all have been read."""
    try:
        found = prometheus.query("up")
    except httpx.TransportError:
        return set()
    return {one["value"][1] for one in found} if len(found) == 4 else set()


def use(stack: Stack, key: str) -> None:
    with stack.client(key) as client:
        for path, body in (
            ("/chat", say("What is the capital of France?")),
            ("/chat", say("What is the capital of Japan?", stream=True)),
            ("/embeddings", {"text": "Paris"}),
            ("/chat/similar", {"query": "Paris"}),
            ("/chat", {}),
        ):
            client.post(path, json=body)
        eventually(lambda: client.get("/chat/history").json())


def missing(prometheus: Prometheus, expression: str) -> list[str]:
    """Series that an expression names and nobody exports; labels that they do not have."""
    told = []
    for one in series(expression):
        for wanted in [one.metric, *(f'{one.metric}{{{label}!=""}}' for label in one.labels)]:
            if not prometheus.query(f"count(last_over_time({wanted}[5m]))"):
                told.append(wanted)
    return told


def test_prometheus_reads_each_process(prometheus: Prometheus) -> None:
    found = {one["metric"]["job"]: one["value"][1] for one in prometheus.query("up")}
    assert found == dict.fromkeys(("qwen3-server", "qwen3-chat", "qwen3-embedding", "qwen3-archive"), "1")


def test_each_rule_reads_what_is_exported(prometheus: Prometheus) -> None:
    problems = {str(rule.get("alert") or rule["record"]): missing(prometheus, rule["expr"]) for rule in rules()}
    assert {name: names for name, names in problems.items() if names} == {}


def test_each_rule_is_worked_out_and_none_is_alarmed(prometheus: Prometheus) -> None:
    worked_out = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(worked_out) == len(rules())
    assert {rule["health"] for rule in worked_out} == {"ok"}, worked_out
    for recorded in (rule["name"] for rule in worked_out if rule["type"] == "recording"):
        assert prometheus.query(recorded), recorded
    assert prometheus.get("alerts")["alerts"] == []


def test_each_panel_reads_what_is_exported_and_shows_something(prometheus: Prometheus) -> None:
    problems = {where: missing(prometheus, expression) for where, expression in expressions()}
    assert {where: names for where, names in problems.items() if names} == {}
    empty = [where for where, expression in expressions() if not prometheus.query(expression)]
    assert empty == []


def test_each_variable_has_something_to_choose_from(prometheus: Prometheus) -> None:
    for name, dashboard in dashboards().items():
        for variable, query in variables(dashboard).items():
            if query.startswith("label_values("):
                selector, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
                plain = selector.replace("$model_name", ".*")
                values = prometheus.get(f"label/{label}/values", **{"match[]": plain})
                assert [value for value in values if value], f"{name}: {variable}"
