"""deploy/README.md as calls: what a shell makes of its commands, from the first to the last, over a copy of deploy/k8s.

There is no cluster here: `kubectl`, `helm` and the like only note how they were called, and what `apply -k` would have
sent then is rendered. So this checks the shell's part, the files that the guide makes and every name in its commands;
not what a cluster answers.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.manifests import ROOT, Manifest, kubectl, parse

GUIDE = ROOT / "deploy" / "README.md"

NOTE = """#!/usr/bin/env bash
# One in the background may be called together with the next
number=$(ls "$CALLS" | wc -l)
until call=$(printf '%s/%03d' "$CALLS" "$number") && mkdir "$call" 2>/dev/null; do number=$((number + 1)); done
printf '%s\\n' "$(basename "$0")" "$@" >"$call/argv"
for argument; do
  if [ "${before:-}" = -k ] || [ "${before:-}" = kustomize ]; then
    # The same files are rendered once
    files=$(cd "${argument%%overlays*}" && find . -type f | LC_ALL=C sort | xargs cksum | cksum | tr ' ' -)
    made=$RENDERED/$files-${argument##*/}
    [ -e "$made" ] || "$REAL_KUBECTL" kustomize "$argument" >"$made" || exit 1
    cp "$made" "$call/rendered.yaml"
    if [ "$before" = kustomize ]; then cat "$call/rendered.yaml"; fi
  fi
  if [ "$argument" = - ] && [ "${before:-}" = -f ]; then cat >"$call/stdin.yaml"; fi
  before=$argument
done
"""


@dataclass
class Call:
    argv: list[str]
    rendered: list[Manifest] = field(default_factory=list)
    """What `-k` stands for."""
    stdin: list[Manifest] = field(default_factory=list)

    def option(self, *names: str) -> str:
        return next((value for name, value in zip(self.argv, self.argv[1:], strict=False) if name in names), "")


@dataclass
class Walk:
    """The guide, walked through: its calls in order."""

    calls: list[Call]

    def of(self, program: str, *words: str) -> list[Call]:
        return [c for c in self.calls if c.argv[0] == program and set(words) <= set(c.argv)]

    def applied(self, overlay: str) -> list[list[Manifest]]:
        """Each different state in which an overlay was applied."""
        states: list[list[Manifest]] = []
        for call in self.of("kubectl", "apply"):
            if call.option("-k").endswith(f"/{overlay}") and call.rendered not in states:
                states.append(call.rendered)
        return states


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@functools.cache
def parsed(text: str) -> list[Manifest]:
    return parse(text)


def walk_through(folder: Path) -> Walk:
    """Everything of the guide that is for a shell, run in a folder that is made for it."""
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("mine"))
    programs, calls, rendered = folder / "bin", folder / "calls", folder / "rendered"
    for made in (programs, calls, rendered):
        made.mkdir()
    for name in ("kubectl", "helm", "docker", "git", "kind", "curl"):
        (programs / name).write_text(NOTE)
        (programs / name).chmod(0o755)
    (programs / "less").write_text("#!/bin/sh\ncat >/dev/null\n")
    (programs / "less").chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "RENDERED": str(rendered)}
    environment["REAL_KUBECTL"] = kubectl()
    # A laptop is a cluster of its own: what it takes stands in one block, for a shell that has seen none of the others
    (laptop,) = (block for block in blocks() if block.startswith("kind create cluster"))
    for part in ([block for block in blocks() if block != laptop], [laptop]):
        script = "set -euo pipefail\n" + "\nwait\n".join(part)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    noted = []
    for call in sorted(calls.iterdir()):
        made = Call((call / "argv").read_text().splitlines())
        for name in ("rendered", "stdin"):
            if (call / f"{name}.yaml").exists():
                setattr(made, name, parsed((call / f"{name}.yaml").read_text()))
        noted.append(made)
    return Walk(noted)


def kubectls(walk: Walk) -> list[list[str]]:
    """Every call of kubectl, those in the text between blocks included."""
    text = re.sub(r"^```.*?^```$", "", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    inline = [shlex.split(command) for command in re.findall(r"`(kubectl [^`]+)`", text)]
    return [call.argv for call in walk.of("kubectl")] + inline
