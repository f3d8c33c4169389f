"""What deploy/ has Prometheus and Grafana ask, asked of a real Prometheus that reads this stack."""

import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.private import free_port
from tests.deploy.manifests import tool
from tests.e2e.test_service import worker_urls
from tests.seeing import PROMETHEUS, RULES, Series, dashboards, expressions, plain, rules, series, targets, variables
from tests.stack import PROJECT, Stack, eventually, say

SCRAPES_S = 1


@dataclass
class Prometheus:
    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=parameters).json()
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
    argv = [tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    argv += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)
    with client, (folder / "log").open("wb") as log:
        made = Prometheus(client)
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
        if prometheus.client.get("/-/ready").status_code != 200:
            return set()
    except httpx.TransportError:
        return set()
    found = prometheus.query("up")
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


def missing(prometheus: Prometheus, named: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """By the names of expressions: series that they name and nobody exports, and labels that those do not have."""
    read = {
        name: {wanted for one in series(expression) for wanted in (one.metric, *labelled(one))}
        for name, expression in named
    }
    unknown = {wanted for wanted in set().union(*read.values()) if not prometheus.query(f"count({wanted})")}
    return {name: names & unknown for name, names in read.items() if names & unknown}


def labelled(one: Series) -> list[str]:
    return [f'{one.metric}{{{label}!=""}}' for label in one.labels]


def test_prometheus_reads_each_process(prometheus: Prometheus) -> None:
    found = {one["metric"]["job"]: one["value"][1] for one in prometheus.query("up")}
    assert found == dict.fromkeys(("qwen3-server", "qwen3-chat", "qwen3-embedding", "qwen3-archive"), "1")


def test_each_rule_reads_what_is_exported(prometheus: Prometheus) -> None:
    named = [(str(rule.get("alert") or rule["record"]), rule["expr"]) for rule in rules()]
    assert missing(prometheus, named) == {}


def test_each_rule_is_worked_out_and_none_is_alarmed(prometheus: Prometheus) -> None:
    worked_out = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(worked_out) == len(rules())
    assert {rule["health"] for rule in worked_out} == {"ok"}, worked_out
    for recorded in (rule["name"] for rule in worked_out if rule["type"] == "recording"):
        assert prometheus.query(recorded), recorded
    assert prometheus.get("alerts")["alerts"] == []


def test_each_panel_reads_what_is_exported_and_shows_something(prometheus: Prometheus) -> None:
    assert missing(prometheus, expressions()) == {}
    for where, target in targets():
        shown = prometheus.query(plain(target["expr"]))
        assert shown, where
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert any(label in one["metric"] for one in shown), f"{where}: {label}"


def test_each_variable_has_something_to_choose_from(prometheus: Prometheus) -> None:
    for name, dashboard in dashboards().items():
        for variable, query in variables(dashboard).items():
            if query.startswith("label_values("):
                selector, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
                chosen = selector.replace("$model_name", ".*")
                values = prometheus.get(f"label/{label}/values", **{"match[]": chosen})
                assert [value for value in values if value], f"{name}: {variable}"
