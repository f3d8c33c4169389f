"""checkov on what the overlays render to: it finds what is waived, with a reason, and nothing else."""

import json
import re
import subprocess
from pathlib import Path

import yaml

from tests.deploy.manifests import K8S, overlays, render, tool

WAIVERS = K8S / "checkov.yaml"


def test_what_checkov_finds_is_waived_and_what_is_waived_is_found(tmp_path: Path) -> None:
    for overlay in overlays():
        (tmp_path / f"{overlay.name}.yaml").write_text(yaml.safe_dump_all(render(overlay)))
    options = ["--framework", "kubernetes", "--compact", "--quiet", "--skip-download", "--output", "json"]
    command = [tool("checkov"), "--directory", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 500
    assert report["summary"]["parsing_errors"] == 0
    found: dict[str, set[str]] = {}
    for check in report["results"]["failed_checks"]:
        found.setdefault(check["check_id"], set()).add(f"{check['check_name']}: {check['resource']}")
    waived = yaml.safe_load(WAIVERS.read_text())["skip-check"]
    assert set(found) == set(waived), {rule: where for rule, where in found.items() if rule not in waived}


def test_each_waiver_has_its_reason() -> None:
    lines = WAIVERS.read_text().splitlines()
    for index, line in enumerate(lines):
        if re.match(r"\s+- CKV", line):
            assert lines[index - 1].strip().startswith("#"), f"{line}: why?"
