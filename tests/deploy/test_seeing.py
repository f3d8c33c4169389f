"""Rules, alerts, dashboards and what the Prometheus operator gets: what can be checked without a running stack.

tests/e2e/test_seeing.py has a real Prometheus read a real stack with them.
"""

import re
import shutil
import subprocess
import sys
import textwrap
from itertools import combinations
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.core import topology
from server.core.registry import load_registry
from tests.deploy.manifests import K8S, TOOLS, Manifest, name_of, of_kind, overlays, render, schemas, selects, tool
from tests.deploy.stores import FOREIGN, PORTS
from tests.seeing import (
    GRAFANA,
    PROMETHEUS,
    ROOT,
    RULES,
    Series,
    alerts,
    dashboards,
    expressions,
    panels,
    plain,
    rules,
    series,
    variables,
)

TESTS = [ROOT / "tests" / "deploy" / name for name in ("alerts.yml", "alerts_slow.yml", "alerts_stores.yml")]
RUNBOOK = (PROMETHEUS / "RUNBOOK.md").read_text()
MONITORING = K8S / "components" / "monitoring"
STORES = yaml.safe_load((MONITORING / "stores-rule.yaml").read_text())["spec"]
ALERTS = [*alerts(), *(rule for group in STORES["groups"] for rule in group["rules"])]
SCRAPED = [job["job_name"] for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]]
KNOWN = set(re.findall(r"^\| `(qwen3_\w+)` ", (ROOT / "README.md").read_text(), re.MULTILINE))
BOARDS = dashboards()

each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)


def promtool(*arguments: object) -> str:
    done = subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert f"{len(rules())} rules found" in promtool("check", "rules", RULES)


def test_each_container_is_read_at_its_port() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    ports = {"server": compose["server"]["environment"]["PORT"]}
    (of_workers,) = re.findall(r"\bMETRICS_PORT=(\d+)", dockerfile)
    read = set()
    for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]:
        (found,) = job["dns_sd_configs"]
        for name in found["names"]:
            assert str(found["port"]) == ports.get(name, of_workers), name
            assert "stores" in compose[name]["networks"], name
            read.add(name)
    built = {name for name, service in compose.items() if "build" in service}
    assert read == built - {"migrate"}


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_alerts_fire_when_they_should_and_only_then(file: Path, tmp_path: Path) -> None:
    if file.name == "alerts_stores.yml":  # whose rules stand in a manifest, which Prometheus itself does not read
        (tmp_path / "stores.yml").write_text(yaml.safe_dump(STORES))
        file = shutil.copy(file, tmp_path)
    promtool("test", "rules", file)


def test_each_alert_is_seen_to_fire_and_not_to() -> None:
    fires, silent = set(), set()
    for file in TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                (fires if case["exp_alerts"] else silent).add(case["alertname"])
    assert fires == silent == {alert["alert"] for alert in ALERTS}


def test_each_alert_says_what_it_is_and_has_its_paragraph() -> None:
    headings = re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)
    assert headings == list(dict.fromkeys(alert["alert"] for alert in ALERTS))
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]
        assert alert["annotations"]["runbook_url"] == f"deploy/prometheus/RUNBOOK.md#{alert['alert'].lower()}"


def test_the_runbook_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", RUNBOOK):
        name, _, heading = target.partition("#")
        path = PROMETHEUS / name if name else PROMETHEUS / "RUNBOOK.md"
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, target


def test_queues_are_called_what_they_are_called() -> None:
    models = [model.id for model in load_registry(ROOT / "models.yaml").models]
    known = {*topology.ARGUMENTS, *(name for model in models for name in topology.jobs_queues(model, 1))}
    texts = [RUNBOOK, *(path.read_text() for path in (RULES, ROOT / "deploy" / "README.md", *GRAFANA.glob("*.json")))]
    named = [name for text in texts for name in re.findall(r"queue `([^`]+)`|purge_queue ([\w.]+)", text)]
    named += re.findall(r'basic_get\("([^"]+)"()\)', RUNBOOK)
    assert len(named) > 6
    assert {first or second for first, second in named} <= known


def test_the_runbook_shows_the_dead_and_takes_none(tmp_path: Path) -> None:
    # Given a broker with one message in that queue
    fake = """
        class URLParameters(str): pass
        class BlockingConnection:
            def __init__(self, url): print(url); self.left = ["body"]
            def channel(self): self.connection = self; return self
            def close(self): print("closed")
            def basic_get(self, queue):
                if not self.left: return None, None, None
                return 1, type("Properties", (), {"headers": {"x-death": 1}}), self.left.pop().encode()
    """
    (tmp_path / "pika.py").write_text(textwrap.dedent(fake))
    (tmp_path / "url").write_text("amqp://somewhere\n")
    # When the program is run as it is in a server's container
    (program,) = re.findall(r"dead\.py <<'EOF'\n(.*?)^EOF$", RUNBOOK, re.MULTILINE | re.DOTALL)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "AMQP_URL_FILE": str(tmp_path / "url")}
    done = subprocess.run([sys.executable, "-"], input=program, env=environment, capture_output=True, text=True)
    # Then it shows what there is, and acknowledges nothing
    assert done.stdout.splitlines() == ["amqp://somewhere", "{'x-death': 1} body", "closed"], done.stderr


def test_each_expression_of_a_dashboard_is_one(tmp_path: Path) -> None:
    # promtool parses expressions in rules, and names each that it cannot
    records = [{"record": f"expression_{index}", "expr": expr} for index, (_, expr) in enumerate(expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": records}]}))
    assert f"{len(records)} rules found" in promtool("check", "rules", file)


def test_our_own_metrics_are_those_of_the_readme() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    named = [*expressions(), *((str(rule.get("alert") or rule["record"]), rule["expr"]) for rule in rules())]
    for where, expression in named:
        assert series(expression), where
        for metric in (found.metric for found in series(expression)):
            if metric.startswith("qwen3_"):
                assert KNOWN & {metric, re.sub("_(bucket|sum|count)$", "", metric)}, f"{where}: {metric}"
            elif not metric.startswith(("vllm:", "process_")):
                assert metric in recorded | {"up"}, f"{where}: {metric}"


def test_what_the_stores_rules_read_was_looked_up() -> None:
    read = {alert["alert"]: series(alert["expr"]) for alert in ALERTS[len(alerts()) :]}
    for name, found in read.items():
        for one in found - {Series("up", frozenset({"job"}))}:
            assert one.metric in FOREIGN, f"{name}: {one.metric} is not in tests/deploy/stores.py"
            assert one.labels <= FOREIGN[one.metric].labels | {"job"}, f"{name}: {one}"
    assert {one.metric for found in read.values() for one in found} - {"up"} == set(FOREIGN), "one that nothing reads"


def test_there_is_a_dashboard_of_each_kind() -> None:
    assert set(BOARDS) == {f"{name}.json" for name in ("service", "engine", "queue", "history", "usage")}
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)


def test_grafana_knows_each_field() -> None:
    script = Path(__file__).parent / "grafana_fields.py"
    python = TOOLS / "python"
    assert python.exists(), "Run `./test deploy` once, which installs what checks deploy/."
    files = [str(GRAFANA / name) for name in BOARDS]
    done = subprocess.run([str(python), str(script), *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@each_board
def test_a_dashboard_keeps_to_vllms_conventions(board: dict[str, Any]) -> None:
    assert next(iter(variables(board))) == "datasource"
    assert board["templating"]["list"][0]["query"] == "prometheus"
    assert board["tags"] == ["qwen3"]
    assert board["links"][0]["includeVars"]
    for variable in board["templating"]["list"][1:]:
        assert variable["datasource"]["uid"] == "${datasource}"
        assert variable["includeAll"]
        assert variable["allValue"] == ".*", "what has no such label is to be seen as well"
    for panel in panels(board):
        assert panel["type"] in ("timeseries", "stat", "heatmap", "table")
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        options = panel["fieldConfig"]["defaults"].get("unit") or panel["options"]["yAxis"]["unit"]
        assert options
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH"[: len(panel["targets"])])
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert target["legendFormat"]
            # A fixed window is wrong for all but one zoom; recorded ones have theirs in their name.
            windows = set(re.findall(r"\[([^\]]+)\]", target["expr"]))
            assert windows <= {"$__rate_interval", "$__range"}, panel["title"]
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval", "__range"}
            assert used <= set(variables(board)), panel["title"]
        if "histogram_quantile" in panel["targets"][0]["expr"] and panel["type"] == "timeseries":
            assert [target["legendFormat"] for target in panel["targets"]] == ["P99", "P90", "P50", "Average"]


@each_board
def test_panels_lie_side_by_side(board: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [panel["gridPos"] for panel in board["panels"]]
    for place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, two in combinations(places, 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"], (one, two)


def test_the_operator_takes_what_it_gets() -> None:
    manifests = render(MONITORING)
    for manifest in of_kind(manifests, "PodMonitor", "PrometheusRule"):
        jsonschema.validate(manifest, schemas()[manifest["apiVersion"], manifest["kind"]])
    assert all(manifest["metadata"]["labels"]["qwen3/phase"] == "service" for manifest in manifests)
    assert [name_of(manifest) for manifest in manifests] == [
        "ConfigMap/qwen3-dashboards",
        "PodMonitor/broker",
        "PodMonitor/database",
        "PodMonitor/server",
        "PodMonitor/workers",
        "PrometheusRule/qwen3",
        "PrometheusRule/qwen3-stores",
    ]


def test_the_operator_gets_the_same_rules() -> None:
    (rule,) = (each for each in of_kind(render(MONITORING), "PrometheusRule") if each["metadata"]["name"] == "qwen3")
    assert rule["spec"] == yaml.safe_load(RULES.read_text()), "make it anew: its head says how"


def test_grafana_gets_each_dashboard() -> None:
    (shown,) = of_kind(render(MONITORING), "ConfigMap")
    assert shown["data"] == {path.name: path.read_text() for path in GRAFANA.glob("*.json")}
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"
    size = sum(len(text.encode()) for text in shown["data"].values())
    assert size < 200 * 1024, "kubectl apply keeps a copy in an annotation, which has room for 256 KiB"


def monitors() -> dict[str, Manifest]:
    return {monitor["metadata"]["name"]: monitor["spec"] for monitor in of_kind(render(MONITORING), "PodMonitor")}


def jobs(monitor: Manifest, labels: dict[str, str]) -> list[str]:
    """What a pod with these labels is called, once for each of its ports and paths that are read."""
    found = []
    for endpoint in monitor["podMetricsEndpoints"]:
        (relabeling,) = endpoint["relabelings"]
        assert relabeling["targetLabel"] == "job"
        found.append(relabeling["replacement"].replace("$1", labels.get("app.kubernetes.io/name", "")))
    return found


@pytest.mark.parametrize("overlay", overlays(), ids=lambda path: path.name)
def test_each_pod_is_read_once_and_called_as_its_container_is(overlay: Path) -> None:
    named = []
    for deployment in of_kind(render(overlay), "Deployment"):
        pod = deployment["spec"]["template"]
        labels = pod["metadata"]["labels"]
        ports = {port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", ())}
        (monitor,) = (each for each in monitors().values() if selects(each["selector"], labels))
        assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports, name_of(deployment)
        named += jobs(monitor, labels)
    assert sorted(set(named)) == sorted(SCRAPED)


@pytest.mark.parametrize("overlay", overlays(), ids=lambda path: path.name)
@pytest.mark.parametrize("store", PORTS)
def test_prometheus_is_let_at_the_port_of_each_store(overlay: Path, store: str) -> None:
    monitor, (name, port) = monitors()[store], PORTS[store]
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} == {name}
    # Each of its jobs is read by some alert, and named so that Qwen3TargetDown is about it
    for job in jobs(monitor, {}):
        assert job.startswith("qwen3-")
        assert any(f'job="{job}"' in alert["expr"] for alert in ALERTS), job
    # The policy chooses the same pods
    (policy,) = (p["spec"] for p in of_kind(render(overlay), "NetworkPolicy") if p["metadata"]["name"] == store)
    assert policy["podSelector"] == monitor["selector"]
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert {"from": [prometheus], "ports": [{"port": port, "protocol": "TCP"}]} in policy["ingress"]


def test_what_an_expression_reads_is_found() -> None:
    # The other tests, and that of the running stack, rely on it
    expression = plain(
        'sum by (le, model) (rate(a_bucket{x="b{", y!~"$model|c"}[$__rate_interval])) / on (z) group_left (q) vllm:d '
        "or vector(0) and min_over_time(e[5m]) > 1e3 * 0.5 unless absent(up{job=~'j'} == 1)"
    )
    found = {(one.metric, *sorted(one.labels)) for one in series(expression.replace("'", '"').replace("b{", "b"))}
    assert found == {("a_bucket", "x", "y"), ("vllm:d",), ("e",), ("up", "job")}
