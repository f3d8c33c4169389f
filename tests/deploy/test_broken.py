"""What is broken on purpose is found: something wrong in each kind of file, shown to what the right one passes."""

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.dockerfile import DOCKERFILE
from tests.deploy.manifests import K8S, ROOT, Manifest, name_of, problems, render, tool
from tests.seeing import GRAFANA, PROMETHEUS, RULES

COMPOSE = ROOT / "deploy" / "compose.yaml"
CONTAINER = "spec.template.spec.containers.0"

MANIFESTS = [
    ("Deployment/server", f"{CONTAINER}.livenessProbe.httpGet.pth", "/health/live"),
    ("Deployment/server", f"{CONTAINER}.ports.0.containerPort", "eight"),
    ("Deployment/chat-qwen3-0-6b", "spec.template.spec.terminationGracePeriod", 370),
    ("Deployment/embedding-qwen3-embedding-0-6b", f"{CONTAINER}.securityContext.readOnlyRootFileSystem", True),
    ("Deployment/archive", f"{CONTAINER}.resources.request", {}),
    ("Job/download", "spec.activeDeadline", 1),
    ("Service/server", "spec.ports.0.port", "http"),
    ("Ingress/server", "spec.rules.0.http.paths.0.pathTyp", "Prefix"),
    ("HorizontalPodAutoscaler/server", "spec.minReplica", 1),
    ("PodDisruptionBudget/server", "spec.maxUnavail", 1),
    ("NetworkPolicy/database", "spec.egress.0.too", []),
    ("PersistentVolumeClaim/models", "spec.accessModes", "ReadWriteOnce"),
    ("PriorityClass/qwen3-batch", "value", "low"),
    ("RabbitmqCluster/rabbitmq", "spec.replica", 3),
    ("RabbitmqCluster/rabbitmq", "spec.persistence.storage", 20),
    ("Cluster/postgres", "spec.instances", 0),
    ("Cluster/postgres", "spec.enablePdb", False),
    ("ObjectStore/backups", "spec.configuration.destinationpath", "s3://x/"),
    ("ScheduledBackup/nightly", "spec.schedule", "0 3 * * *"),
    ("PodMonitor/server", "spec.podMetricsEndpoints.0.prot", "http"),
    ("PrometheusRule/qwen3", "spec.groups.0.rules.0.fro", "5m"),
]
"""Of the overlay `multi-gpu` and of what watches it: where (made, where it is not there), and what is put there."""

LINES = [
    (DOCKERFILE, "hadolint", "USER 10001:10001", "USR 10001:10001"),
    (DOCKERFILE, "hadolint", "WORKDIR /app", "WORKDIR app"),
    (DOCKERFILE, "hadolint", "COPY server server", "ADD server server"),
    (COMPOSE, "compose", "    stop_grace_period: 60s", "    stop_grace_perod: 60s"),
    (COMPOSE, "compose", "condition: service_healthy", "condition: service_health"),
    (COMPOSE, "compose", "networks: [stores]", "networks: [store]"),
    (RULES, "rules", "        expr: |", "        exp: |"),
    (RULES, "rules", "max(qwen3_dead_letters) > 0", "max(qwen3_dead_letters > 0"),
    (PROMETHEUS / "prometheus.yml", "config", "scrape_configs:", "scrape_config:"),
    (GRAFANA / "queue.json", "grafana", '"legendFormat"', '"legendFromat"'),
    (GRAFANA / "service.json", "grafana", '"gridPos"', '"gridPosition"'),
]
"""Files, what checks each, and a line of theirs made wrong."""


def command(check: str, file: Path) -> list[str]:
    compose = [tool("docker-compose"), "-f", str(file), "--project-directory", str(COMPOSE.parent)]
    return {
        "hadolint": [tool("hadolint"), str(file)],
        "compose": [*compose, "--profile", "gpu", "--profile", "cpu", "config", "--quiet"],
        "rules": [tool("promtool"), "check", "rules", str(file)],
        "config": [tool("promtool"), "check", "config", "--syntax-only", str(file)],
        "grafana": [tool("python"), str(Path(__file__).parent / "grafana_fields.py"), str(file)],
    }[check]


def put(manifest: Manifest, path: str, value: object) -> None:
    *way, last = path.split(".")
    inside: Any = manifest
    for step in way:
        inside = inside[int(step)] if step.isdigit() else inside[step]
    inside[last] = value


@pytest.mark.parametrize(("name", "path", "value"), MANIFESTS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_wrong_field_of_a_manifest_is_found(name: str, path: str, value: object, tmp_path: Path) -> None:
    # Given one that a cluster would take
    everything = [*render(K8S / "overlays" / "multi-gpu"), *render(K8S / "components" / "monitoring")]
    (right,) = (manifest for manifest in everything if name_of(manifest) == name)
    wrong = copy.deepcopy(right)
    # When one field is wrong, then it is refused
    put(wrong, path, value)
    told = problems([wrong], tmp_path)
    assert told
    assert "Traceback" not in "".join(told)


@pytest.mark.parametrize(
    ("file", "check", "right", "wrong"), LINES, ids=lambda part: part.name if isinstance(part, Path) else ""
)
def test_a_wrong_line_of_a_file_is_found(file: Path, check: str, right: str, wrong: str, tmp_path: Path) -> None:
    text = file.read_text()
    assert right in text
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    states = []
    for name, content in (("right", text), ("wrong", text.replace(right, wrong, 1))):
        copied = tmp_path / name / file.name
        copied.parent.mkdir()
        copied.write_text(content)
        done = subprocess.run(command(check, copied), capture_output=True, text=True, env=environment, check=False)
        states.append((done.returncode == 0, done.stdout + done.stderr))
    assert states[0][0], states[0][1]
    assert not states[1][0], f"{check} does not mind {wrong!r}"


@pytest.mark.parametrize(
    "wrong",
    [
        "resource: [BASE]",
        "resources: [BASE, nowhere]",
        "resources: [BASE]\ncomponents: [BASE]",
        "resources: [BASE]\npatches: [{target: {kind: Deployment}, patch: '[{op: remove, path: /spec/no}]'}]",
        "resources: [BASE]\nimages: [{nam: a, newName: b}]",
        "resources: [BASE]\nconfigMapGenerator: [{name: models, behavior: replace, files: [no.yaml]}]",
    ],
)
def test_a_wrong_overlay_is_not_rendered(wrong: str, tmp_path: Path) -> None:
    below = K8S / "overlays" / "single-gpu"
    for name, text in (("right", "resources: [BASE]"), ("wrong", wrong)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(text.replace("BASE", os.path.relpath(below, folder)))
    assert render(tmp_path / "right") == render(below)
    with pytest.raises(AssertionError, match=re.escape(str(tmp_path / "wrong"))):
        render(tmp_path / "wrong")


def test_each_kind_is_broken_once() -> None:
    kinds = {manifest["kind"] for manifest in render(K8S / "overlays" / "multi-gpu")}
    # A Namespace, a ServiceAccount and a ConfigMap have hardly a field
    assert kinds - {name.partition("/")[0] for name, _, _ in MANIFESTS} <= {"Namespace", "ServiceAccount", "ConfigMap"}
