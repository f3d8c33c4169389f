"""The benchmarks can be asked what they do, are all listed, and keep what they find."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.load import Load, Target
from tests.stack import PROJECT

FOLDER = PROJECT / "benchmarks"
SCRIPTS = ("chat_throughput", "embeddings", "fault_soak", "gateway", "scaling", "similar", "soak", "tracing")


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_says_what_it_measures(script: str) -> None:
    argv = [sys.executable, "-m", f"benchmarks.{script}", "--help"]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--out DIR" in done.stdout


def test_the_readme_lists_each() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(SCRIPTS)


def test_results_name_no_place_of_this_machine() -> None:
    for path in (FOLDER / "results").glob("*.json"):
        command = json.loads(path.read_text())["command"]
        assert not re.search(r"(^|\s)(/|\.\./)", command), path


def test_a_result_is_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Given a result of one benchmark and one of another
    args = argparse.Namespace(out=tmp_path)
    report.save(args, "one", {"rate": 1}, "1 a second")
    report.save(args, "two", {"rate": 2}, "2 a second")
    # When the first one runs again
    report.save(args, "one", {"rate": 3}, "3 | a\nsecond", lambda figure: figure.subplots().plot([1, 2], [1, 2]))
    # Then its row and its file are the new ones, and the other's are as they were
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if re.match(r"\| (one|two) ", line)]
    assert [row.split(" | ")[0] for row in rows] == ["| one", "| two"]
    assert rows[0].endswith("| 3 \\| a second |")
    assert rows[1].endswith("| 2 a second |")
    kept = json.loads((tmp_path / "one.json").read_text())
    assert kept["result"] == {"rate": 3}
    assert kept["machine"]["cores"] > 0
    assert kept["machine"]["versions"]["fastapi"]
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")
    assert "3 | a" in capsys.readouterr().out


def test_a_request_of_the_load_is_http() -> None:
    target = Target("x", "http://127.0.0.1:1/v1/chat/completions", {"stream": True}, {"Authorization": "Bearer k"})
    head, _, body = target.request().partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:1\r\n")
    assert b"Authorization: Bearer k" in head
    assert json.loads(body) == {"stream": True}
    assert f"Content-Length: {len(body)}".encode() in head


def test_a_rate_is_tokens_by_time() -> None:
    assert Load(streams=1, tokens=30, elapsed_s=2.0).tokens_per_s == 15.0
