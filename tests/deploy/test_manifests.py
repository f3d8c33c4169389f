"""What the checks of deploy/ say when they lack something themselves."""

from pathlib import Path

import pytest

from tests.deploy.manifests import kubectl, parse, problems, schemas, tool

OLD = 'Client Version: version.Info{Major:"1", Minor:"20", GitVersion:"v1.20.2"}'  # as Debian 12's says it


def test_an_old_kubectl_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "kubectl"
    program.write_text(f"#!/bin/sh\necho '{OLD}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(AssertionError, match=r"install kubectl 1\.27 or newer"):
        kubectl.__wrapped__()


def test_a_missing_tool_is_named() -> None:
    with pytest.raises(AssertionError, match=r"Run `\./test deploy` once"):
        tool("no-such-tool")


def test_a_kind_that_nobody_knows_is_a_problem(tmp_path: Path) -> None:
    (manifest,) = parse("{apiVersion: example.com/v1, kind: Unknown, metadata: {name: x}}")
    assert problems([manifest], tmp_path)


def test_a_date_is_text() -> None:
    assert parse("at: 2026-11-22 12:00:00+00") == [{"at": "2026-11-22 12:00:00+00"}]


def test_schemas_are_closed() -> None:
    """Whatever is misspelt is noticed, at every depth."""

    def open_objects(schema: object, path: str) -> list[str]:
        if not isinstance(schema, dict):
            return []
        inside = [
            p for name, part in schema.get("properties", {}).items() for p in open_objects(part, f"{path}.{name}")
        ]
        inside += open_objects(schema.get("items"), f"{path}[]")
        is_open = "properties" in schema and schema.get("additionalProperties") is not False
        return [*([path] if is_open else []), *inside]

    for (_, kind), schema in schemas().items():
        assert open_objects(schema, kind) == []
