"""RabbitMQ as its operator is told to make it, and who may use it."""

import os
from pathlib import Path

import pytest

from tests.deploy.manifests import K8S, Manifest, name_of, of_kind, overlays, pods, problems, render
from tests.deploy.stores import RABBITMQ_SETTINGS
from tests.deploy.test_k8s import SECRETS_BY_HAND

each_overlay = pytest.mark.parametrize("overlay", overlays(), ids=lambda path: path.name)


def rabbitmq(overlay: Path) -> Manifest:
    (cluster,) = of_kind(render(overlay), "RabbitmqCluster")
    spec: Manifest = cluster["spec"]
    return spec


def settings(overlay: Path) -> dict[str, str]:
    lines = rabbitmq(overlay)["rabbitmq"]["additionalConfig"].splitlines()
    return dict(line.split(" = ") for line in lines)


@each_overlay
def test_rabbitmq_knows_its_settings(overlay: Path) -> None:
    for name, value in settings(overlay).items():
        assert value in RABBITMQ_SETTINGS[name], name


@each_overlay
def test_queues_get_a_copy_on_each_node(overlay: Path) -> None:
    prefix = "quorum_queue.continuous_membership_reconciliation"
    made = settings(overlay)
    assert made[f"{prefix}.enabled"] == "true"
    # With fewer nodes than that there are as many; with more, the alert on missing copies asks for three as well
    assert int(made[f"{prefix}.target_group_size"]) == 3 >= rabbitmq(overlay)["replicas"]


@each_overlay
def test_each_process_may_have_a_user_of_its_own(overlay: Path, tmp_path: Path) -> None:
    # Given the component in one's overlay
    below, component = (os.path.relpath(path, tmp_path) for path in (overlay, K8S / "components" / "broker-users"))
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{below}]\ncomponents: [{component}]\n")
    # Then nobody is given the default user, and each the one of its kind
    manifests = render(tmp_path)
    for name, pod in pods(manifests).items():
        used = secrets(pod) & {"rabbitmq-default-user", *SECRETS_BY_HAND} - {"api-keys", "hub-token"}
        kind = pod["metadata"]["labels"]["app.kubernetes.io/name"]
        users = {"server": "server", "chat": "worker", "embedding": "worker", "archive": "archive"}
        assert used == ({f"broker-{users[kind]}"} if kind in users else set()), name
    deployments = of_kind(manifests, "Deployment")
    assert len(deployments) == 4, [name_of(each) for each in deployments]
    assert problems(deployments, tmp_path) == []


def secrets(pod: Manifest) -> set[str]:
    volumes = pod["spec"].get("volumes", [])
    sources = [source for volume in volumes for source in volume.get("projected", {}).get("sources", [])]
    return {source["secret"]["name"] for source in sources if "secret" in source}
