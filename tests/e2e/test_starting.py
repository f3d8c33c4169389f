"""What a start that does not come to its end leaves behind: nothing, and a reason."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import naming
from tests.stack import PROJECT, Stack


@pytest.fixture
def second(stack: Stack, tmp_path: Path) -> Stack:
    """A stack that is not started, with the first one's stand-in, so that it need not be taught again."""
    made = Stack(tmp_path / "data")
    shutil.copytree(stack.folder / "smoke", made.folder / "smoke")
    return made


def begin(second: Stack, *options: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = second.folder.parent / "up.log"
    argv = [sys.executable, "-m", "server", "up", "--port", str(second.port), "--data-dir", str(second.folder)]
    process = subprocess.Popen(
        [*argv, *options], cwd=PROJECT, env=second.environment, stdout=log.open("wb"), stderr=subprocess.STDOUT
    )
    return process, log


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["Starting Postgres", "Starting the engine"])
def test_a_start_that_is_stopped_leaves_nothing_behind(second: Stack, stage: str, number: int) -> None:
    # Given a service that has come as far as this
    process, log = begin(second)
    deadline = time.monotonic() + 60
    while stage not in log.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(0.1 if "Postgres" in stage else 5)
    # When it is stopped there
    process.send_signal(number)
    # Then it ends in order, and nothing of it is left
    assert process.wait(60) == 0, log.read_text()
    assert second.left_behind() == []
    assert "Traceback" not in log.read_text()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_cannot_start_ends_the_start_with_its_reason(second: Stack, tmp_path: Path) -> None:
    # Given a model with an option that the engine does not have
    models = tmp_path / "models.yaml"
    (source,) = (second.folder / "smoke").iterdir()
    models.write_text(
        "models:\n"
        "  - id: mistaken\n"
        "    name: Mistaken\n"
        "    type: chat\n"
        f"    source: {source}\n"
        "    context_length: 2048\n"
        "    engine:\n"
        "      max_num_sequences: 8\n"
    )
    # When the service is started with it
    process, log = begin(second, "--models", str(models))
    # Then it stops, says file, line and option, and leaves nothing behind
    assert process.wait(120) == 1
    assert f"{models}:8: model 'mistaken': engine: 'max_num_sequences' is not an option" in log.read_text()
    assert naming(second.folder) == []
    assert second.left_behind() == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_taken_port_is_told_before_anything_is_started(second: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", second.port))
        taken.listen()
        process, log = begin(second)
        assert process.wait(30) == 1
    assert f"127.0.0.1:{second.port} cannot be listened on" in log.read_text()
    assert "--port" in log.read_text()
    assert not (second.folder / "postgres").exists()
