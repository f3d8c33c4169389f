"""Manifests as a cluster would get them, and whether it would take them: rendered by kubectl, held against schemas.

Kubernetes' own kinds are validated by kubernetes-validate, those of operators by `schemas/*.json`, each of which names
its `apiVersion` and `kind` as constants. A kind that neither knows is a problem.
"""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "deploy" / "k8s"
TOOLS = ROOT / ".cache" / "deploy-tools" / "bin"
SCHEMAS = Path(__file__).parent / "schemas"

KUSTOMIZE = 5
"""Major version of what `kubectl kustomize` is to have built in: that of kubectl 1.27 and newer."""
KUBERNETES = ("1.34", "1.37")
"""The oldest version that deploy/README.md names, and the newest one whose schemas there are."""

Manifest = dict[str, Any]


class Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it: a date is text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str) -> list[Manifest]:
    return [document for document in yaml.load_all(text, Loader) if document]


def tool(name: str) -> str:
    """The path of a program that `./test` installs. Fails where it is missing."""
    found = TOOLS / name if (TOOLS / name).exists() else shutil.which(name)
    assert found, f"{name} is not installed. Run `./test deploy` once, which installs what checks deploy/."
    return str(found)


@functools.cache
def kubectl() -> str:
    """Fails where its Kustomize is too old for what deploy/k8s uses."""
    path = tool("kubectl")
    told = subprocess.run([path, "version", "--client"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Kustomize Version: v(\d+)", told)
    version = int(found[1]) if found else 0
    assert version >= KUSTOMIZE, (
        f"{path} has no Kustomize {KUSTOMIZE} built in: install kubectl 1.27 or newer. Debian 12's kubernetes-client "
        f"is 1.20. It says: {told.strip()}"
    )
    return path


@functools.cache
def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k FOLDER` would send. To be read only: whoever asks again gets the same."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    assert not done.stderr, f"{folder} renders with a warning: {done.stderr}"
    return parse(done.stdout)


@functools.cache
def schemas() -> dict[tuple[str, str], Manifest]:
    """Those of operators' kinds, by apiVersion and kind."""
    found = {}
    for path in sorted(SCHEMAS.glob("*.json")):
        schema = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        kind = schema["properties"]["apiVersion"]["const"], schema["properties"]["kind"]["const"]
        assert kind not in found, f"{path}: there is another schema of {kind}"
        found[kind] = schema
    return found


def problems(manifests: list[Manifest], scratch: Path) -> list[str]:
    """Why a cluster with the operators of deploy/README.md would refuse them; empty when it would not."""
    told, plain = [], []
    for manifest in manifests:
        schema = schemas().get((manifest["apiVersion"], manifest["kind"]))
        if schema is None:
            plain.append(manifest)
            continue
        for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
            told.append(f"{name_of(manifest)}: {error.json_path}: {error.message}")
    file = scratch / "manifests.yaml"
    file.write_text(yaml.dump_all(plain, Dumper=yaml.CSafeDumper))
    for version in KUBERNETES:
        command = [tool("kubernetes-validate"), "--strict", "--quiet", "-k", version, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # It ends well with a kind that it does not know; but then it says so, and it says nothing when all is well.
        told += (done.stdout + done.stderr).splitlines()
        if done.returncode and not told:
            told.append(f"kubernetes-validate: status {done.returncode}")
    return told


def overlays() -> list[Path]:
    """The folders of the overlays that are delivered: there may be others beside them, whose owners check them."""
    return [K8S / "overlays" / name for name in ("cpu-dev", "multi-gpu", "single-gpu")]


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod templates of workloads, by `Kind/name`."""
    return {name_of(m): m["spec"]["template"] for m in of_kind(manifests, "Deployment", "Job")}


def containers(pod: Manifest) -> list[Manifest]:
    """A pod template's containers, those that only prepare included."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector matches."""
    for name, value in selector.get("matchLabels", {}).items():
        if labels.get(name) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", "only this operator is understood here"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def settings_of(container: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """A container's environment, but for what comes from the pod itself."""
    maps = {m["metadata"]["name"]: m["data"] for m in of_kind(manifests, "ConfigMap")}
    environment: dict[str, str] = {}
    for source in container.get("envFrom", []):
        environment |= maps[source["configMapRef"]["name"]]
    return environment | {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}
