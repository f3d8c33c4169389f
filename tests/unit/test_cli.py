"""The command lines: they explain themselves, and say in a line what they lack."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.__main__ import main as server_main
from server.__main__ import parser as server_parser
from server.core import logging as json_logging
from server.core.settings import Settings
from workers.__main__ import parser as workers_parser

PROJECT = Path(__file__).parents[2]
SERVER = [sys.executable, "-m", "server"]
WORKERS = [sys.executable, "-m", "workers"]
NOWHERE = "amqp://nobody:nothing@127.0.0.1:1/%2F"


def run(argv: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """What a command prints and returns, in the project's folder, without the caller's settings."""
    settings = {name.upper() for name in Settings.model_fields}
    inherited = {name: value for name, value in os.environ.items() if name.upper() not in settings}
    return subprocess.run(
        argv, cwd=PROJECT, env={**inherited, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def complaint(argv: list[str], **environment: str) -> str:
    """The one line a command fails with; checks that it is one, and nothing worse."""
    done = run(argv, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (SERVER, ["usage: python -m server", "serve", "up", "keys", "migrate"]),
        (WORKERS, ["usage: python -m workers", "chat", "embedding", "archive", "smoke"]),
        ([*WORKERS, "chat"], ["--model ID", "--metrics-port", "METRICS_PORT"]),
        (["./run"], ["Usage: ./run", "--setup-only", "--models FILE", "--port PORT", "--workers N", "--data-dir DIR"]),
        (["./test"], ["Usage: ./test", "unit", "integration", "e2e", "lint"]),
    ],
    ids=["server", "workers", "workers chat", "run", "test"],
)
def test_help_explains_the_command(argv: list[str], words: list[str]) -> None:
    done = run([*argv, "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert [word for word in words if word not in done.stdout] == []


def test_run_works_from_any_folder_and_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "start"
    link.symlink_to(PROJECT / "run")
    done = subprocess.run([link, "-h"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ./run")


@pytest.mark.parametrize("argv", [["chat", "--model", "qwen3-0.6b"], ["embedding", "--model", "x"], ["archive"]])
def test_a_worker_without_a_broker_says_so(argv: list[str]) -> None:
    # When a worker is started by hand without AMQP_URL, then it says what is missing, and what would set it
    told = complaint([*WORKERS, *argv], DATABASE_URL="postgresql://nowhere")
    assert told == "AMQP_URL is not set. A worker needs it; ./run starts everything itself."


def test_the_archivist_without_a_database_says_so() -> None:
    told = complaint([*WORKERS, "archive"], AMQP_URL=NOWHERE)
    assert told == "DATABASE_URL is not set. A worker needs it; ./run starts everything itself."


def test_a_worker_of_an_unknown_model_names_the_known_ones() -> None:
    told = complaint([*WORKERS, "chat", "--model", "gpt-9"], AMQP_URL=NOWHERE)
    assert told == "--model gpt-9: no enabled chat model of this id. Known: qwen3-0.6b"


def test_a_mistake_in_models_yaml_is_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        "models:\n  - id: a\n    nmae: b\n    name: a\n    type: chat\n    source: a/b\n    context_length: 9\n"
    )
    told = complaint([*WORKERS, "archive", "--models", str(path)], AMQP_URL=NOWHERE, DATABASE_URL="postgresql://x")
    assert told == f"{path}:3: models.0.nmae: unknown key"


def test_keys_without_a_service_says_where_it_looked(tmp_path: Path) -> None:
    told = complaint([*SERVER, "keys", "--data-dir", str(tmp_path), "list"])
    assert told == f"DATABASE_URL is not set, and no ./run has left its address in {tmp_path / 'addresses.json'}."


# What ends before anything is started is tried in this process: it saves most of the time.


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, no_settings: None) -> None:
    """This process as if it were the command's: no settings, and pytest's logging left alone."""
    monkeypatch.setattr(json_logging, "configure", lambda level, process: None)


@pytest.mark.usefixtures("here")
def test_a_server_without_addresses_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "serve"])
    assert server_main() == 1
    assert capsys.readouterr().err.startswith("error: DATABASE_URL is not set. The server needs it;")
    monkeypatch.setenv("DATABASE_URL", "postgresql://nowhere")
    assert server_main() == 1
    assert capsys.readouterr().err.startswith("error: AMQP_URL is not set. The server needs it;")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_wrong_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("PORT", "http")
    monkeypatch.setattr(sys, "argv", ["server", command])
    assert server_main() == 1
    told = capsys.readouterr().err
    assert told.startswith("error: Wrong settings: PORT: ")
    assert told.endswith("(got 'http')\n")


@pytest.mark.parametrize(
    ("parser", "argv"),
    [
        (server_parser, []),
        (server_parser, ["serve", "--port", "http"]),
        (server_parser, ["keys"]),
        (server_parser, ["keys", "create"]),
        (server_parser, ["keys", "create", "ada", "--weight", "0"]),
        (server_parser, ["keys", "weigh", "1", "heavy"]),
        (server_parser, ["keys", "revoke", "ada"]),
        (workers_parser, []),
        (workers_parser, ["nonsense"]),
        (workers_parser, ["chat"]),
        (workers_parser, ["embedding"]),
        (workers_parser, ["smoke"]),
    ],
)
def test_a_wrong_command_line_shows_the_usage(
    capsys: pytest.CaptureFixture[str], parser: Callable[[], argparse.ArgumentParser], argv: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m ")


@pytest.mark.parametrize("command", ["up", "serve"])
def test_the_server_takes_what_run_promises(command: str) -> None:
    argv = [command, "--models", "m.yaml", "--host", "::1", "--port", "81", "--workers", "3"]
    args = server_parser().parse_args(argv)
    assert (args.command, args.models, args.host, args.port) == (command, Path("m.yaml"), "::1", 81)
    assert args.workers == 3


def test_up_takes_a_data_directory() -> None:
    assert server_parser().parse_args(["up", "--data-dir", "/var/lib/q"]).data_dir == Path("/var/lib/q")
