"""Every overlay of deploy/k8s: a cluster would take it, and its parts fit each other and the code."""

import functools
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.__main__ import parser as server_parser
from server.app import create_app
from server.core.registry import ModelSpec, Registry, load_registry
from server.core.settings import SECRETS, Settings
from server.db.pool import make_pool
from tests.deploy.dockerfile import stages
from tests.deploy.manifests import (
    K8S,
    ROOT,
    Manifest,
    containers,
    name_of,
    of_kind,
    overlays,
    pods,
    problems,
    render,
    selects,
    settings_of,
)
from workers.__main__ import _spec
from workers.__main__ import parser as workers_parser
from workers.archive import STOP_TIMEOUT_S
from workers.probe import Probe

SECRETS_BY_OPERATORS = {"postgres-app": {"uri"}, "rabbitmq-default-user": {"connection_string"}}
SECRETS_BY_HAND = {
    "api-keys": {"api-keys"},
    "backup-credentials": {"ACCESS_KEY_ID", "SECRET_ACCESS_KEY"},
    **{f"broker-{user}": {"connection_string"} for user in ("server", "worker", "archive")},
    "hub-token": {"token"},
    "server-tls": {"tls.crt", "tls.key"},
}
"""What deploy/README.md says to make (tests/deploy/test_guide.py)."""

NOT_SETTINGS = {
    "MODEL",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_TOKEN_PATH",
    "OMP_NUM_THREADS",
    "VLLM_CPU_OMP_THREADS_BIND",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
}
"""Ours to expand, the hub client's, OpenMP's, vLLM's, and OpenTelemetry's."""

END_S = 15
"""What a process needs for its end once everything that ran is finished."""


@pytest.fixture(params=overlays(), ids=lambda path: path.name)
def overlay(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@functools.cache
def paths_of_server() -> frozenset[str]:
    return frozenset(getattr(route, "path", "") for route in create_app(Settings(), Registry(())).routes)


@pytest.fixture
def manifests(overlay: Path) -> list[Manifest]:
    return render(overlay)


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (m for m in of_kind(manifests, kind) if m["metadata"]["name"] == name)
    return found


def all_containers(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Of pods: the workload's name, its template, the container."""
    for name, pod in pods(manifests).items():
        for container in containers(pod):
            yield f"{name}, {container['name']}", pod, container


def models_of(pod: Manifest, manifests: list[Manifest], folder: Path) -> Registry:
    """What a pod finds in its MODELS_FILE."""
    (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "registry")
    data = one(manifests, "ConfigMap", volume["configMap"]["name"])["data"]
    file = folder / "models.yaml"
    file.write_text(data["models.yaml"])
    return load_registry(file)


def bytes_of(amount: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", amount).groups()  # type: ignore[union-attr]  # else it fails, as it should
    return float(number) * {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


def test_the_overlays_are_those_that_are_promised() -> None:
    guide = (ROOT / "deploy" / "README.md").read_text()
    assert set(re.findall(r"\(k8s/overlays/([\w-]+)/kustomization.yaml\)", guide)) == {path.name for path in overlays()}
    # What the guide has its reader make is the reader's
    assert "deploy/k8s/overlays/mine/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_cluster_would_take_it(manifests: list[Manifest], tmp_path: Path) -> None:
    assert problems(manifests, tmp_path) == []
    names = [(m["apiVersion"].partition("/")[0], name_of(m)) for m in manifests]
    assert len(names) == len(set(names))


def test_everything_is_in_the_namespace_that_is_guarded(manifests: list[Manifest]) -> None:
    namespace = one(manifests, "Namespace", "qwen3")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for manifest in manifests:
        if manifest["kind"] not in ("Namespace", "PriorityClass"):
            assert manifest["metadata"]["namespace"] == "qwen3", name_of(manifest)


def test_what_is_referred_to_is_there(manifests: list[Manifest]) -> None:
    there = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    secrets = SECRETS_BY_OPERATORS | SECRETS_BY_HAND
    assert not of_kind(manifests, "Secret"), "a secret has no place in the repository"
    for name, pod in pods(manifests).items():
        spec = pod["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in there, name
        assert ("PriorityClass", spec["priorityClassName"]) in there, name
        for volume in spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there, name
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there, name
            for source in volume.get("projected", {}).get("sources", []):
                secret = source["secret"]
                assert {item["key"] for item in secret["items"]} <= secrets[secret["name"]], name
    for autoscaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        target = autoscaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in there
        assert "replicas" not in one(manifests, "Deployment", target["name"])["spec"]
    for ingress in of_kind(manifests, "Ingress"):
        assert {tls["secretName"] for tls in ingress["spec"]["tls"]} <= set(secrets)
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            service = one(manifests, "Service", path["backend"]["service"]["name"])
            assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    for backup in of_kind(manifests, "ScheduledBackup"):
        assert ("Cluster", backup["spec"]["cluster"]["name"]) in there
    for store in of_kind(manifests, "ObjectStore"):
        credentials = store["spec"]["configuration"]["s3Credentials"]
        for reference in credentials.values():
            assert reference["key"] in secrets[reference["name"]]
    # What operators name after what they make
    (broker,), (database,) = of_kind(manifests, "RabbitmqCluster"), of_kind(manifests, "Cluster")
    assert {f"{broker['metadata']['name']}-default-user", f"{database['metadata']['name']}-app"} == {
        *SECRETS_BY_OPERATORS
    }
    assert ("PriorityClass", database["spec"]["priorityClassName"]) in there
    override = broker["spec"]["override"]["statefulSet"]["spec"]["template"]["spec"]
    assert ("PriorityClass", override["priorityClassName"]) in there
    stores = {m["metadata"]["name"] for m in of_kind(manifests, "ObjectStore")}
    assert {p["parameters"]["barmanObjectName"] for p in database["spec"].get("plugins", [])} == stores


def test_processes_start_with_what_they_are_given(manifests: list[Manifest], tmp_path: Path) -> None:
    for name, pod, container in all_containers(manifests):
        environment = settings_of(container, manifests)
        secret_names = {f"{secret}_file" for secret in SECRETS}
        # Settings are known by name, and their values hold
        for variable in {*environment, *(e["name"] for e in container.get("env", []))} - NOT_SETTINGS:
            assert variable.lower() in Settings.model_fields, f"{name}: {variable} is no setting"
        plain = {
            k.lower(): v for k, v in environment.items() if k not in NOT_SETTINGS and k.lower() not in secret_names
        }
        Settings(**plain)
        # Arguments are those of the command line, which the image's entrypoint completes (`python -m`)
        assert "command" not in container, f"{name}: goes past the image's entrypoint"
        model = pod["metadata"]["labels"].get("qwen3/model", "")
        module, *argv = [argument.replace("$(MODEL)", model) for argument in container["args"]]
        args = {"server": server_parser, "workers": workers_parser}[module]().parse_args(argv)
        # Files are where something is mounted
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        files = set()
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            for source in volume.get("projected", {}).get("sources", []):
                files |= {f"{mount['mountPath']}/{item['path']}" for item in source["secret"]["items"]}
            if "configMap" in volume:
                keys = one(manifests, "ConfigMap", volume["configMap"]["name"])["data"]
                files |= {f"{mount['mountPath']}/{key}" for key in keys}
        named = {
            v for k, v in environment.items() if k.lower() in (*secret_names, "models_file") or k == "HF_TOKEN_PATH"
        }
        assert named == files, f"{name}: what is named and what is mounted"
        # And a worker finds its model
        if getattr(args, "model", None):
            _spec(models_of(pod, manifests, tmp_path), args.model, args.type)


def test_models_have_workers_and_workers_their_models(overlay: Path, manifests: list[Manifest], tmp_path: Path) -> None:
    def content(spec: ModelSpec) -> dict[str, Any]:
        return spec.model_dump(mode="json")

    (server,) = (
        pod for pod in pods(manifests).values() if pod["metadata"]["labels"]["app.kubernetes.io/name"] == "server"
    )
    everywhere = {spec.id: content(spec) for spec in models_of(server, manifests, tmp_path).models}
    usual = {spec.id: content(spec) for spec in load_registry(ROOT / "models.yaml").models}
    for spec in usual.values():
        spec["engine"].pop("gpu_memory_utilization", None)  # here nobody else is on a worker's GPU
    assert everywhere == usual, "the overlays serve what ./run serves"
    workers = {}
    for name, pod in pods(manifests).items():
        if model := pod["metadata"]["labels"].get("qwen3/model"):
            (spec,) = models_of(pod, manifests, tmp_path).models
            assert spec.id == model, name
            assert spec.type == pod["metadata"]["labels"]["app.kubernetes.io/name"], name
            assert content(spec) == everywhere[spec.id], f"{name}: its entry is another than the servers'"
            assert model not in workers, f"{model} has two Deployments"
            workers[model] = name
    assert set(workers) == set(everywhere)
    for name, pod in pods(manifests).items():
        if any(v.get("configMap", {}).get("name", "").startswith("models-") for v in pod["spec"]["volumes"]):
            assert {m.id for m in models_of(pod, manifests, tmp_path).models} == set(everywhere), name


def test_ports_are_those_that_are_listened_on(manifests: list[Manifest], tmp_path: Path) -> None:
    routes = {"http": set(paths_of_server())}
    routes["metrics"] = {route.path for route in Probe("127.0.0.1", 0)._server.config.app.routes}  # type: ignore[union-attr]
    for name, _, container in all_containers(manifests):
        settings = Settings(
            **{
                k.lower(): v
                for k, v in settings_of(container, manifests).items()
                if k in ("PORT", "METRICS_PORT", "HOST")
            }
        )
        listened = {"http": settings.port, "metrics": settings.metrics_port}
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        for port, number in ports.items():
            assert listened[port] == number, name
            assert settings.host == "0.0.0.0", f"{name}: listens where nobody comes"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                asked = container[probe]["httpGet"]
                assert asked["port"] in ports, name
                assert asked["path"] in routes[asked["port"]], name
    for service in of_kind(manifests, "Service"):
        behind = [
            p
            for p in pods(manifests).values()
            if selects({"matchLabels": service["spec"]["selector"]}, p["metadata"]["labels"])
        ]
        (pod,) = behind
        ports = {port["name"] for container in containers(pod) for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_selectors_choose_one_workload_each(manifests: list[Manifest]) -> None:
    known = {name: pod["metadata"]["labels"] for name, pod in pods(manifests).items()}
    known["broker"] = {"app.kubernetes.io/name": of_kind(manifests, "RabbitmqCluster")[0]["metadata"]["name"]}

    def chosen(selector: Manifest) -> list[str]:
        return [name for name, labels in known.items() if selects(selector, labels)]

    for deployment in of_kind(manifests, "Deployment"):
        assert chosen(deployment["spec"]["selector"]) == [name_of(deployment)]
        for spread in deployment["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert chosen(spread["labelSelector"]) == [name_of(deployment)]
    budgets = [chosen(budget["spec"]["selector"]) for budget in of_kind(manifests, "PodDisruptionBudget")]
    assert all(len(budget) == 1 for budget in budgets), budgets
    guarded = {budget[0] for budget in budgets}
    several = {name for name in known if name.startswith("Deployment/") and name != "Deployment/archive"}
    assert guarded == {*several, "broker"}, "CloudNativePG keeps its own, and the archivist is one"
    for policy in of_kind(manifests, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        assert selector == {} or chosen(selector) or "cnpg.io/cluster" in selector["matchLabels"], name_of(policy)


def test_each_container_is_bounded_and_probed(manifests: list[Manifest]) -> None:
    for name, pod, container in all_containers(manifests):
        resources = container["resources"]
        for resource in ("cpu", "memory"):
            assert resources["requests"][resource], name
            assert resources["limits"][resource], name
        deployed = name.startswith("Deployment/")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert (probe in container) == deployed, f"{name}: {probe}"
        shm = [v["emptyDir"] for v in pod["spec"]["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
        for volume in shm:
            assert bytes_of(volume["sizeLimit"]) < bytes_of(resources["requests"]["memory"]), (
                f"{name}: it is memory too"
            )


def test_each_container_may_do_as_little_as_it_can(manifests: list[Manifest]) -> None:
    for name, pod, container in all_containers(manifests):
        spec, security = pod["spec"], container["securityContext"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 10001, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert security["readOnlyRootFilesystem"], name
        assert not security["allowPrivilegeEscalation"], name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            writable = "emptyDir" in volumes[mount["name"]] or (mount["name"] == "models" and "download" in name)
            assert mount.get("readOnly", False) != writable, f"{name}: {mount['name']}"
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, f"{name}: Python wants it"
        for volume in volumes.values():
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], f"{name}: may fill its machine"


def test_where_images_write_is_mounted(manifests: list[Manifest]) -> None:
    built = stages()
    for name, _, container in all_containers(manifests):
        image = container["image"].rpartition("/")[2].partition(":")[0]
        own = settings_of(container, manifests)
        paths = {k: own.get(k, v) for k, v in built[image].environment.items() if v.startswith("/")}
        # What lies in /opt is the image's own
        paths = {k: path for k, path in paths.items() if not path.startswith("/opt/")}
        assert "HOME" in paths, name
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        for variable, path in paths.items():
            around = [mount for at, mount in mounts.items() if path == at or path.startswith(f"{at}/")]
            assert around, f"{name}: {variable} is {path}, where nothing is mounted"
            read_only = around[0].get("readOnly", False)
            assert read_only == (variable == "HF_HUB_CACHE" and name != "Job/download, download"), f"{name}: {path}"


def test_nothing_is_cut_off_that_may_still_be_answered(manifests: list[Manifest]) -> None:
    for name, pod, container in all_containers(manifests):
        if not name.startswith("Deployment/"):
            continue
        settings = {k: float(v) for k, v in settings_of(container, manifests).items() if k.endswith("_TIMEOUT_S")}
        assert settings["DRAIN_TIMEOUT_S"] > settings["REQUEST_TIMEOUT_S"]
        before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain = STOP_TIMEOUT_S if "archive" in name else settings["DRAIN_TIMEOUT_S"]
        assert pod["spec"]["terminationGracePeriodSeconds"] >= before + drain + END_S, name
        if "server" in name:
            assert before >= 5, "proxies hear of its end later than it does"
    for deployment in of_kind(manifests, "Deployment"):
        for container in containers(deployment["spec"]["template"]):
            startup = container["startupProbe"]
            loads_s = startup["periodSeconds"] * startup["failureThreshold"]
            assert loads_s < deployment["spec"].get("progressDeadlineSeconds", 600), name_of(deployment)


def test_probes_of_engines_leave_them_time_to_load_and_none_to_hang(manifests: list[Manifest]) -> None:
    for name, _, container in all_containers(manifests):
        if container["name"] != "worker":
            continue
        startup, live, ready = (container[f"{p}Probe"] for p in ("startup", "liveness", "readiness"))
        assert [p["httpGet"]["path"] for p in (startup, live, ready)] == [
            "/health/startup",
            "/health/live",
            "/health/ready",
        ]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800, name
        assert live["periodSeconds"] * live["failureThreshold"] <= 60, name


def test_the_ingress_passes_streams_on(manifests: list[Manifest]) -> None:
    (ingress,) = of_kind(manifests, "Ingress")
    (server,) = (c for name, _, c in all_containers(manifests) if name.startswith("Deployment/server"))
    request_s = float(settings_of(server, manifests)["REQUEST_TIMEOUT_S"])
    largest = next(m.le for m in Settings.model_fields["max_body_bytes"].metadata if hasattr(m, "le"))
    told = ingress["metadata"]["annotations"]
    for prefix, off, size in (
        ("nginx.org", "False", "client-max-body-size"),
        ("nginx.ingress.kubernetes.io", "off", "proxy-body-size"),
    ):
        assert told[f"{prefix}/proxy-buffering"] == off
        for timeout in ("proxy-read-timeout", "proxy-send-timeout"):
            assert float(told[f"{prefix}/{timeout}"].rstrip("s")) > request_s
        assert int(told[f"{prefix}/{size}"].rstrip("m")) * 2**20 >= largest


def test_the_ingress_shows_the_api_and_not_what_is_the_operators(manifests: list[Manifest]) -> None:
    paths = [
        path for m in of_kind(manifests, "Ingress") for rule in m["spec"]["rules"] for path in rule["http"]["paths"]
    ]

    def shown(path: str) -> bool:
        return any(path == p["path"] or (p["pathType"] == "Prefix" and path.startswith(p["path"] + "/")) for p in paths)

    routes = paths_of_server()
    private = {path for path in routes if path.removeprefix("/qwen3").startswith(("/metrics", "/health"))}
    assert len(routes) > 40
    assert len(private) >= 8
    assert {path for path in routes if shown(path)} == routes - private
    used = {p["path"] for p in paths if any(r == p["path"] or r.startswith(p["path"] + "/") for r in routes)}
    assert used == {p["path"] for p in paths}


def test_gpus(overlay: Path, manifests: list[Manifest]) -> None:
    with_gpu = set()
    for deployment in of_kind(manifests, "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        resources = spec["containers"][0]["resources"]
        gpus = resources["limits"].get("nvidia.com/gpu", 0)
        assert gpus == resources["requests"].get("nvidia.com/gpu", 0)
        assert (spec.get("nodeSelector") == {"nvidia.com/gpu.present": "true"}) == bool(gpus)
        assert any(t["key"] == "nvidia.com/gpu" for t in spec.get("tolerations", [])) == bool(gpus)
        if gpus:
            assert gpus == 1
            assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
            with_gpu.add(deployment["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"])
    assert with_gpu == {"cpu-dev": set(), "single-gpu": {"chat"}, "multi-gpu": {"chat", "embedding"}}[overlay.name]


def test_chat_evicts_batch_work(manifests: list[Manifest]) -> None:
    classes = {m["metadata"]["name"]: m for m in of_kind(manifests, "PriorityClass")}
    by_type = {
        pod["metadata"]["labels"]["app.kubernetes.io/name"]: classes[pod["spec"]["priorityClassName"]]
        for pod in pods(manifests).values()
    }
    assert by_type["chat"]["value"] > by_type["embedding"]["value"]
    assert by_type["chat"].get("preemptionPolicy", "PreemptLowerPriority") == "PreemptLowerPriority"
    assert by_type["embedding"]["preemptionPolicy"] == "Never"
    assert not any(m.get("globalDefault") for m in classes.values())


def test_images_are_of_this_version(overlay: Path, manifests: list[Manifest]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chat = "chat-cpu" if overlay.name == "cpu-dev" else "chat-gpu"
    images = {c["image"] for _, _, c in all_containers(manifests)}
    assert images == {f"qwen3-inference/{name}:{version}" for name in ("server", chat, "embedding", "archive")}


def test_the_stores_outlive_a_machine_where_there_are_several(overlay: Path, manifests: list[Manifest]) -> None:
    (broker,), (database,) = of_kind(manifests, "RabbitmqCluster"), of_kind(manifests, "Cluster")
    (claim,) = of_kind(manifests, "PersistentVolumeClaim")
    copies = 3 if overlay.name == "multi-gpu" else 1
    assert broker["spec"]["replicas"] == database["spec"]["instances"] == copies
    assert ("synchronous" in database["spec"]["postgresql"]) == (copies > 1), "it would wait for ever for another"
    assert database["spec"].get("enablePDB", True) == (copies > 1), "of one instance it would never let go"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany" if copies > 1 else "ReadWriteOnce"]
    assert bool(of_kind(manifests, "ScheduledBackup")) == (overlay.name != "cpu-dev")


def test_postgres_has_connections_for_all_servers(manifests: list[Manifest]) -> None:
    (database,), (autoscaler,) = of_kind(manifests, "Cluster"), of_kind(manifests, "HorizontalPodAutoscaler")
    pool = inspect.signature(make_pool).parameters["max_size"].default
    # A roll-out has one server more; the archivist has three and the migration one, and CloudNativePG some of its own.
    needed = (autoscaler["spec"]["maxReplicas"] + 1) * (pool + 1) + 4 + 20
    assert int(database["spec"]["postgresql"]["parameters"]["max_connections"]) >= needed
    shared, memory = database["spec"]["postgresql"]["parameters"], database["spec"]["resources"]["limits"]["memory"]
    buffers = float(shared["shared_buffers"].removesuffix("MB").removesuffix("GB")) * (
        2**30 if "GB" in shared["shared_buffers"] else 2**20
    )
    assert buffers <= bytes_of(memory) / 4


def test_the_phases_in_which_it_is_applied(manifests: list[Manifest]) -> None:
    phases: dict[str, set[str]] = {}
    for manifest in manifests:
        if phase := manifest["metadata"].get("labels", {}).get("qwen3/phase"):
            phases.setdefault(phase, set()).add(name_of(manifest))
    assert set(phases) == {"stores", "jobs", "service"}
    assert phases["jobs"] == {"Job/migrate", "Job/download"}
    # What comes first needs nothing that comes later
    later = {name.partition("/")[2] for name in phases["service"] if name.startswith(("ConfigMap", "Persistent"))}
    for name in ("Job/migrate", "Job/download"):
        for volume in pods(manifests)[name]["spec"]["volumes"]:
            assert volume.get("configMap", {}).get("name") not in later, name
    everything = set().union(*phases.values())
    for kind in ("Namespace", "NetworkPolicy", "ServiceAccount", "PriorityClass", "ConfigMap", "Deployment", "Job"):
        assert {name_of(m) for m in of_kind(manifests, kind)} <= everything, f"a {kind} would come last"


def test_traces_may_be_added(tmp_path: Path) -> None:
    # Given an overlay on top, as deploy/README.md has one, with the component
    folder = tmp_path / "top"
    folder.mkdir()
    below = {"resources": K8S / "overlays" / "multi-gpu", "components": K8S / "components" / "tracing"}
    content = {name: [_relative(folder, path)] for name, path in below.items()}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    # Then each process that goes on is told where traces go, and may go there
    manifests = render(folder)
    assert problems(manifests, tmp_path) == []
    for name, _, container in all_containers(manifests):
        told = settings_of(container, manifests).get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
        assert told.endswith(":4318") == name.startswith("Deployment/"), name
    (rule,) = one(manifests, "NetworkPolicy", "to-collector")["spec"]["egress"]
    assert [port["port"] for port in rule["ports"]] == [4318]


def _relative(start: Path, target: Path) -> str:
    """As kustomize has it: a relative path."""
    return str(Path(*[".."] * (len(start.parts) - 1)) / target.relative_to("/"))
