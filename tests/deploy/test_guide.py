"""deploy/README.md: its commands are run from the first to the last, by a shell, over a copy of deploy/k8s.

tests/deploy/guide.py says what that checks.
"""

import os
import re
import shlex
from pathlib import Path

from server.core.settings import Settings
from tests.deploy.guide import GUIDE, Walk, parsed
from tests.deploy.manifests import K8S, ROOT, Manifest, name_of, of_kind, pods, problems, render, settings_of
from tests.deploy.sizing import ASSUMED
from tests.deploy.test_k8s import SECRETS_BY_HAND, SECRETS_BY_OPERATORS, models_of


def test_what_is_applied_would_be_taken(walk: Walk, tmp_path: Path) -> None:
    states = walk.applied("mine")
    assert len(states) == 3, "the first one, that with another model, that with a restored database"
    distinct: list[Manifest] = []
    for manifest in (m for state in states for m in state):
        if manifest not in distinct:
            distinct.append(manifest)
    assert problems(distinct, tmp_path) == []
    assert walk.applied("cpu-dev") == [render(K8S / "overlays" / "cpu-dev")]
    piped = [manifest for call in walk.of("kubectl", "apply", "-f", "-") for manifest in call.stdin]
    assert [name_of(manifest) for manifest in piped] == ["Backup/before-a-change"]
    assert problems(piped, tmp_path) == []


def test_the_first_overlay_is_ones_own(walk: Walk) -> None:
    first = walk.applied("mine")[0]
    for _, pod in pods(first).items():
        assert pod["spec"]["containers"][0]["image"].startswith("registry.example.com/qwen3-inference/")
    assert of_kind(first, "ObjectStore")[0]["spec"]["configuration"]["destinationPath"] == "s3://my-bucket/"
    assert of_kind(first, "PersistentVolumeClaim")[0]["spec"]["storageClassName"] == "shared"


def with_patch(begin: str, folder: Path) -> list[Manifest]:
    """An overlay on top of another, with a patch of three lines that stands in the guide as a comment."""
    lines = [line[2:] for line in GUIDE.read_text().partition(begin)[2].splitlines()[1:3]]
    below = os.path.relpath(K8S / "overlays" / "single-gpu", folder)
    first = f"- {begin.removeprefix('# - ')}}}"
    head = ["namespace: qwen3", "resources:", f"  - {below}", "patches:"]
    (folder / "kustomization.yaml").write_text("\n".join([*head, first, *lines]))
    manifests = render(folder)
    assert problems(manifests, folder) == []
    return manifests


def test_a_store_at_another_port_may_be_reached(tmp_path: Path) -> None:
    manifests = with_patch("# - target: {kind: NetworkPolicy, name: database", tmp_path)
    (policy,) = (m for m in of_kind(manifests, "NetworkPolicy") if m["metadata"]["name"] == "database")
    *_, out = policy["spec"]["egress"]
    assert "to" not in out
    assert [port["port"] for port in out["ports"]] == [443, 6443, 9000]


def test_a_setting_may_be_ones_own(tmp_path: Path) -> None:
    # Given a setting that is not there otherwise
    manifests = with_patch("# - target: {kind: ConfigMap, name: settings", tmp_path)
    # Then each process that reads settings has it, under a name that rolls it out
    before = {name: pod["spec"] for name, pod in pods(render(K8S / "overlays" / "single-gpu")).items()}
    for name, pod in pods(manifests).items():
        (container,) = pod["spec"]["containers"]
        told = settings_of(container, manifests).get("RATE_LIMIT_PER_MINUTE")
        assert (told == "100") == name.startswith("Deployment/"), name
        assert (pod["spec"] != before[name]) == name.startswith("Deployment/"), name
    assert "rate_limit_per_minute" in Settings.model_fields


def test_another_model_is_served_and_restarts_no_engine(walk: Walk, tmp_path: Path) -> None:
    before, after, _ = walk.applied("mine")
    assert {*pods(after)} - {*pods(before)} == {"Deployment/chat-qwen3-1-5b"}
    for name, pod in pods(before).items():
        same = pods(after)[name] == pod
        assert same == name.startswith(("Deployment/chat", "Deployment/embedding", "Job/migrate")), name
    made = pods(after)["Deployment/chat-qwen3-1-5b"]
    assert made["spec"]["priorityClassName"] == "qwen3-batch"
    (spec,) = models_of(made, after, tmp_path).models
    assert spec.engine["max_num_seqs"] == ASSUMED.slots, "as scaling and sizing count"
    assert spec in models_of(pods(after)["Deployment/server"], after, tmp_path).models
    assert spec in models_of(pods(after)["Job/download"], after, tmp_path).models


def test_a_restored_database_goes_on_beside_the_old_one(walk: Walk) -> None:
    *_, last = walk.applied("mine")
    (cluster,) = of_kind(last, "Cluster")
    source = cluster["spec"]["bootstrap"]["recovery"]["source"]
    (before,) = cluster["spec"]["externalClusters"]
    (writes,) = cluster["spec"]["plugins"]
    assert before["name"] == source
    assert before["plugin"]["parameters"]["serverName"] == cluster["metadata"]["name"], "as its archive is named"
    assert writes["parameters"]["serverName"] not in ("", before["plugin"]["parameters"]["serverName"])
    assert before["plugin"]["parameters"]["barmanObjectName"] == of_kind(last, "ObjectStore")[0]["metadata"]["name"]
    initial = of_kind(walk.applied("mine")[0], "Cluster")[0]["spec"]["bootstrap"]["initdb"]
    recovered = cluster["spec"]["bootstrap"]["recovery"]
    assert (recovered["database"], recovered["owner"]) == (initial["database"], initial["owner"])


def test_traces_go_to_the_collector_that_is_made(walk: Walk, tmp_path: Path) -> None:
    # Given the component in one's overlay
    below, component = (os.path.relpath(K8S / path, tmp_path) for path in ("overlays/multi-gpu", "components/tracing"))
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{below}]\ncomponents: [{component}]\n")
    manifests = render(tmp_path)
    (settings,) = (m for m in of_kind(manifests, "ConfigMap") if "OTEL_EXPORTER_OTLP_ENDPOINT" in m["data"])
    (policy,) = (m for m in manifests if name_of(m) == "NetworkPolicy/to-collector")
    # Then its Service, port and namespace are those that the guide makes
    (exposed,) = walk.of("kubectl", "expose")
    name, port = exposed.argv[exposed.argv.index("deployment") + 1], int(exposed.argv[-1].removeprefix("--port="))
    space = exposed.option("-n")
    assert settings["data"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://{name}.{space}.svc:{port}"
    (egress,) = policy["spec"]["egress"]
    assert egress["ports"] == [{"port": port, "protocol": "TCP"}]
    assert egress["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": space}}}]
    (created,) = walk.of("kubectl", "create", "deployment")
    # And it is what the README runs on one machine
    assert created.argv[-1].removeprefix("--image=") in (ROOT / "README.md").read_text()


def test_a_cache_that_is_kept_fits(tmp_path: Path) -> None:
    (patch,) = re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    below = os.path.relpath(K8S / "overlays" / "multi-gpu", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{below}]\npatches:\n{patch}")
    (deployment,) = (m for m in render(tmp_path) if name_of(m) == "Deployment/chat-qwen3-0-6b")
    assert problems([deployment], tmp_path) == []
    pod = deployment["spec"]["template"]["spec"]
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "cache")
    assert volume == {"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}}
    assert {"name": "cache", "mountPath": "/cache"} in pod["containers"][0]["volumeMounts"]


def test_each_deployment_is_waited_for(walk: Walk) -> None:
    waited = {word for call in walk.of("kubectl", "rollout", "status") for word in call.argv}
    undone = {word for call in walk.of("kubectl", "rollout", "undo") for word in call.argv}
    deployments = {f"deployment/{m['metadata']['name']}" for m in of_kind(walk.applied("mine")[0], "Deployment")}
    assert deployments <= waited
    assert deployments <= undone
    assert waited & {f"deployment/{m['metadata']['name']}" for m in of_kind(walk.applied("mine")[1], "Deployment")}


def test_a_laptop_is_told_everything(walk: Walk) -> None:
    calls = walk.calls[walk.calls.index(walk.of("kind", "create")[0]) :]
    texts = [shlex.join(call.argv) for call in calls]

    def first(*words: str) -> int:
        return next(index for index, text in enumerate(texts) if all(word in text for word in words))

    order = [
        *(first("apply", operator) for operator in ("cluster-operator", "cnpg-1")),
        *(first(f"-n {space} wait") for space in ("rabbitmq-system", "cnpg-system")),
        first("apply", "qwen3/phase=stores"),
        first("create secret generic api-keys"),
        *(first("wait", store) for store in ("rabbitmqcluster/rabbitmq", "cluster.postgresql.cnpg.io/postgres")),
        first("apply", "qwen3/phase=jobs"),
        *(first("wait", job) for job in ("job/migrate", "job/download")),
        next(i for i, text in enumerate(texts) if text.endswith("apply -k deploy/k8s/overlays/cpu-dev")),
        first("rollout status", "deployment/server"),
        first("rollout status", "deployment/archive"),
    ]
    assert order == sorted(order)
    for deployment in of_kind(render(K8S / "overlays" / "cpu-dev"), "Deployment"):
        assert any(f"rollout status deployment/{deployment['metadata']['name']}" in text for text in texts)
    # And the key that is asked with is the one that was made
    (made,) = re.findall(r"api-keys=(qk-\w{64})", texts[order[5]])
    assert f"Authorization: Bearer {made}" in texts[first("curl", "/chat")]


def test_each_secret_is_made(walk: Walk) -> None:
    made: dict[str, set[str]] = {}
    for call in walk.of("kubectl", "create", "secret"):
        kind, name = call.argv[call.argv.index("secret") + 1 :][:2]
        literals = re.findall(r"--from-literal=([^=]+)=", "\n".join(call.argv))
        made[name] = {"tls.crt", "tls.key"} if kind == "tls" else set(literals)
    assert made == SECRETS_BY_HAND
    for name in SECRETS_BY_OPERATORS:
        assert f"`{name}`" in GUIDE.read_text()


def test_jobs_go_before_they_are_changed(walk: Walk) -> None:
    """A Job cannot be changed: each apply of all of one that changed would fail."""
    jobs: dict[str, Manifest] = {}
    for call in walk.of("kubectl"):
        if "delete" in call.argv:
            for word in call.argv:
                jobs.pop(word.removeprefix("job/"), None)
        if "apply" in call.argv and call.option("-k").endswith("/mine") and call.option("-l") != "qwen3/phase=stores":
            for job in of_kind(call.rendered, "Job"):
                name = job["metadata"]["name"]
                assert jobs.get(name, job) == job, f"{name} would be changed by {shlex.join(call.argv)}"
                jobs[name] = job


def test_images_are_built_that_are_used(walk: Walk) -> None:
    built = {call.option("--target"): call.option("-t") for call in walk.of("docker", "build")}
    used = {
        c["image"]
        for overlay in ("mine", "cpu-dev")
        for pod in pods(walk.applied(overlay)[0]).values()
        for c in pod["spec"]["containers"]
    }
    assert {image.rpartition("/")[2].partition(":")[0] for image in used} == set(built)
    assert {image.rpartition(":")[2] for image in used} == {image.rpartition(":")[2] for image in built.values()}


def test_operators_are_those_that_the_schemas_and_policies_are_of(walk: Walk) -> None:
    schemas = (K8S.parent.parent / "tests" / "deploy" / "schemas" / "README.md").read_text()
    urls = " ".join(call.option("-f") for call in walk.of("kubectl", "apply"))
    for operator, url in (
        ("RabbitMQ cluster operator", r"cluster-operator/releases/download/v([\d.]+)/"),
        ("CloudNativePG", r"/cnpg-([\d.]+)\.yaml"),
        ("Barman Cloud plugin", r"plugin-barman-cloud/releases/download/v([\d.]+)/"),
    ):
        (version,) = set(re.findall(url, urls))
        assert f"{operator} {version} " in schemas
    named = {call.option("--namespace", "-n") for call in walk.calls}
    for policy in of_kind(walk.applied("mine")[0], "NetworkPolicy"):
        for name in re.findall(r"'kubernetes.io/metadata.name': '([^']+)'", str(policy)):
            assert name in {*named, "kube-system"}, f"{name_of(policy)}: nothing is installed into {name}"


def test_what_has_no_version_is_said_to_have_none(walk: Walk) -> None:
    sentence = re.sub(r"\s+", " ", GUIDE.read_text()).partition("Not pinned")[2].partition(";")[0]
    charts = [call.argv[3].rpartition("/")[2] for call in walk.of("helm", "install") if not call.option("--version")]
    charts += [url.split("/")[4] for call in walk.of("kubectl") if "/latest/" in (url := call.option("-f"))]
    assert charts
    assert set(re.findall(r"`([^`]+)`", sentence)) == set(charts)


def test_what_happens_without_prometheus_is_said_as_it_is() -> None:
    files = sorted((K8S / "components" / "scaling").glob("*-*.yaml"))
    (chat, _), (embedding, least) = (
        (scaled["spec"]["fallback"]["replicas"], scaled["spec"]["minReplicaCount"])
        for file in files
        for scaled in parsed(file.read_text())
    )
    assert f"`fallback.replicas` ({chat} of chat, {embedding} of embedding)" in GUIDE.read_text()
    assert least == 0, "else it need not be woken by hand"


def test_each_component_that_one_may_add_is_named() -> None:
    offered = {path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml")} - {"gpu", "one-node"}
    for name in offered:
        assert f"# - ../../components/{name} " in GUIDE.read_text()
    # And renders where it is put
    assert "tracing" in offered


def test_what_was_never_done_is_said() -> None:
    text = GUIDE.read_text().replace("\n", " ")
    assert "Nothing here has run on a real cluster or on a GPU" in text


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", GUIDE.read_text()):
        assert (GUIDE.parent / target).exists(), target
