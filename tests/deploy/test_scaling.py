"""Scaling: KEDA would take the ScaledObjects, what they ask for exists, and their numbers fit the service."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.core.registry import load_registry
from server.core.settings import Settings
from tests.deploy.manifests import K8S, ROOT, Manifest, name_of, of_kind, overlays, render, schemas, tool
from tests.deploy.manifests import problems as invalid
from tests.seeing import exported

COMPONENT = K8S / "components" / "scaling"
SCALED = [yaml.safe_load(path.read_text()) for path in sorted(COMPONENT.glob("*-*.yaml"))]
TRIGGERS = [(scaled, trigger) for scaled in SCALED for trigger in scaled["spec"]["triggers"]]
READY_MESSAGES = "qwen3_queue_messages"
MODELS = load_registry(ROOT / "models.yaml").models


def names(scaled: Manifest) -> str:
    return str(scaled["metadata"]["name"])


def problems(scaled: Manifest) -> list[str]:
    schema = schemas()[scaled["apiVersion"], scaled["kind"]]
    return [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(schema).iter_errors(scaled)
    ]


@pytest.fixture(params=overlays(), ids=lambda path: path.name, scope="module")
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """An overlay of one's own with the component, as deploy/README.md has one made."""
    folder = tmp_path_factory.mktemp("mine")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "qwen3",
        "resources": [os.path.relpath(request.param, folder)],
        "components": [os.path.relpath(COMPONENT, folder)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(folder)


@pytest.mark.parametrize("scaled", SCALED, ids=names)
def test_keda_takes_it(scaled: Manifest) -> None:
    assert problems(scaled) == []
    # And what its schema does not say
    spec = scaled["spec"]
    assert spec["minReplicaCount"] <= spec["maxReplicaCount"]
    assert len({trigger["name"] for trigger in spec["triggers"]}) == len(spec["triggers"])


def wrong(**changes: Any) -> Manifest:
    return {**SCALED[0], "spec": {**SCALED[0]["spec"], **changes}}


TRIGGER = SCALED[0]["spec"]["triggers"][0]


@pytest.mark.parametrize(
    "broken",
    [
        wrong(cooldown=600),
        wrong(pollingInterval="15s"),
        wrong(fallback={"replicas": 2}),
        wrong(fallback={"failureThreshold": 4, "replicas": 2, "behavior": "current"}),
        wrong(advanced={"horizontalPodAutoscalerConfig": {"behaviour": {}}}),
        wrong(triggers=[]),
        wrong(triggers=[{**TRIGGER, "type": "rabbitmq"}]),
        wrong(triggers=[{**TRIGGER, "metricType": "Utilization"}]),
        wrong(triggers=[{**TRIGGER, "metadata": {**TRIGGER["metadata"], "threshold": 32000}}]),
        wrong(triggers=[{**TRIGGER, "metadata": {**TRIGGER["metadata"], "treshold": "32000"}}]),
        {**SCALED[0], "metadata": {}},
    ],
)
def test_what_keda_would_not_take_is_found(broken: Manifest) -> None:
    assert problems(broken)


def test_every_model_that_is_served_is_scaled_and_no_other() -> None:
    targets = [scaled["spec"]["scaleTargetRef"]["name"] for scaled in SCALED]
    assert sorted(targets) == sorted(f"{model.type}-{model.id.replace('.', '-')}" for model in MODELS)
    assert targets == [names(scaled) for scaled in SCALED]


def test_interactive_models_keep_a_worker_and_batch_models_need_none() -> None:
    least = {names(scaled).partition("-")[0]: scaled["spec"]["minReplicaCount"] for scaled in SCALED}
    assert least["chat"] >= 1
    assert least["embedding"] == 0


@pytest.mark.parametrize("scaled", SCALED, ids=names)
def test_nobody_is_sent_home_before_the_longest_answer_could_have_ended(scaled: Manifest) -> None:
    longest_s = Settings().request_timeout_s
    behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert scaled["spec"]["cooldownPeriod"] > longest_s
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] > longest_s
    # And without Prometheus nobody is
    assert scaled["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"
    assert scaled["spec"]["fallback"]["replicas"] >= 1


@pytest.mark.parametrize("scaled", SCALED, ids=names)
def test_what_waits_its_age_and_who_works_are_asked_for(scaled: Manifest) -> None:
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    asked = {name for query in queries for name in re.findall(r"qwen3_\w+", query)}
    assert asked == {"qwen3_queue_prompt_tokens", "qwen3_queue_oldest_age_seconds", "qwen3_workers_busy"}
    assert READY_MESSAGES not in asked
    # Nothing must not be told from zero: a Prometheus without the servers' metrics would send all workers home
    assert {trigger["metadata"]["ignoreNullValues"] for trigger in scaled["spec"]["triggers"]} == {"false"}


def test_prometheus_is_asked_where_the_guide_has_it_installed() -> None:
    guide = (ROOT / "deploy" / "README.md").read_text()
    (namespace,) = re.findall(r"charts/kube-prometheus-stack --namespace (\S+)", guide)
    # The operator's own service for every Prometheus that it runs
    address = f"http://prometheus-operated.{namespace}.svc:9090"
    assert {trigger["metadata"]["serverAddress"] for _, trigger in TRIGGERS} == {address}


@pytest.mark.parametrize(("scaled", "trigger"), TRIGGERS)
def test_each_query_names_metrics_and_labels_that_there_are(scaled: Manifest, trigger: Manifest) -> None:
    (metric, selector) = re.findall(r"(qwen3_\w+)\{(.*?)\}", trigger["metadata"]["query"])[0]
    labels = dict(re.findall(r'(\w+)="([^"]*)"', selector))
    assert set(labels) <= exported()[metric], trigger["name"]
    assert labels["model"] in {model.id for model in MODELS}
    assert names(scaled).endswith(labels["model"].replace(".", "-"))


PODS = ("server-1", "server-2", "archive-1")
TOLD = {
    # By pod: tokens, age of the oldest, and what every server knows of all workers
    "qwen3_queue_prompt_tokens": ((1000, 500, 64), 1564),
    "qwen3_queue_oldest_age_seconds": ((7, 30, 2), 30),
    "qwen3_workers_busy": ((1.5, 1.4, None), 1.5),
}


def test_queries_add_up_what_is_each_pods_own_and_nothing_twice(tmp_path: Path) -> None:
    # Given two servers, and for the batch lane an archivist
    series, tests = [], []
    for model in MODELS:
        for metric, (values, _) in TOLD.items():
            for pod, value in zip(PODS, values, strict=True):
                lane = ',lane="batch"' if pod.startswith("archive") else ',lane="interactive"'
                lane = "" if metric == "qwen3_workers_busy" else lane
                if value is not None:
                    series.append({"series": f'{metric}{{model="{model.id}",pod="{pod}"{lane}}}', "values": f"{value}"})
    # When Prometheus itself is asked, then it says one number, and the right one
    for _, trigger in TRIGGERS:
        query = trigger["metadata"]["query"]
        expected = next(expected for metric, (_, expected) in TOLD.items() if metric in query)
        tests.append({"expr": query, "eval_time": "0m", "exp_samples": [{"labels": "{}", "value": expected}]})
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"tests": [{"input_series": series, "promql_expr_test": tests}]}))
    done = subprocess.run([tool("promtool"), "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_overlay_takes_the_component(rendered: list[Manifest]) -> None:
    deployments = {each["metadata"]["name"]: each for each in of_kind(rendered, "Deployment")}
    scaled_objects = of_kind(rendered, "ScaledObject")
    assert len(scaled_objects) == len(SCALED)
    for scaled in scaled_objects:
        # Each has its Deployment, whose number of workers is left to it, and is applied together with that
        target = deployments[scaled["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in target["spec"], name_of(scaled)
        assert scaled["metadata"]["namespace"] == target["metadata"]["namespace"]
        assert scaled["metadata"]["labels"]["qwen3/phase"] == target["metadata"]["labels"]["qwen3/phase"]
        # And a worker that is sent home has the time to finish the longest answer
        assert target["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > Settings().request_timeout_s


def test_a_cluster_takes_what_the_component_changes(rendered: list[Manifest], tmp_path: Path) -> None:
    changed = {"server", *(scaled["spec"]["scaleTargetRef"]["name"] for scaled in SCALED)}
    assert invalid([m for m in of_kind(rendered, "Deployment") if m["metadata"]["name"] in changed], tmp_path) == []


def test_who_may_have_no_worker_is_waited_for(rendered: list[Manifest]) -> None:
    (server,) = (each for each in of_kind(rendered, "Deployment") if each["metadata"]["name"] == "server")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    waited_for = Settings(start_on_demand=environment["START_ON_DEMAND"]).on_demand
    to_zero = {names(scaled) for scaled in SCALED if scaled["spec"]["minReplicaCount"] == 0}
    assert {f"embedding-{id_.replace('.', '-')}" for id_ in waited_for} == to_zero
    assert waited_for <= {model.id for model in MODELS}
    # And what else it was given is still there
    assert "AMQP_URL_FILE" in environment
