"""A whole running service for the end-to-end tests: `python -m server up` over a data directory of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from server.private import free_port
from tests.processes import MARK, marked, naming

PROJECT = Path(__file__).parent.parent
START_TIMEOUT_S = 400
STOP_TIMEOUT_S = 60


@dataclass
class Stack:
    """`output` is what `up` printed since its last start; `key` the one it made at the first. `settings` are those that
    it has besides."""

    folder: Path
    port: int = field(default_factory=free_port)
    key: str = ""
    output: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        cleared = ("API_KEY", "DATABASE_URL", "AMQP_URL", "MODELS_FILE", "HOST", "PORT", "DATA_DIR")
        return {
            **{name: value for name, value in os.environ.items() if name not in cleared},
            MARK: str(self.folder),
            # The smoke profile on every machine, also on one that reaches a hub.
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "hub"),
            "RATE_LIMIT_PER_MINUTE": "0",
            **self.settings,
        }

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        log = self.folder.parent / f"{self.folder.name}-up.log"
        with log.open("wb") as out:
            argv = [sys.executable, "-m", "server", "up", "--port", str(self.port), "--data-dir", str(self.folder)]
            self.process = subprocess.Popen(
                argv, cwd=PROJECT, env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while f"Ready on {self.url}" not in (text := log.read_text()):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the stack did not start:\n{text}")
                time.sleep(0.2)
        except BaseException:  # a test's own time limit among them
            self.stop()
            raise
        time.sleep(0.2)  # the lines after the first one
        self.output = log.read_text()
        if found := re.search(r"keep it\): (\S+)", self.output):
            self.key = found[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)

    def left_behind(self) -> list[str]:
        """What still runs of it."""
        return [str(process) for process in marked(str(self.folder)) + naming(self.folder)]

    @property
    def chat_weights(self) -> Path:
        """The folder of the chat model that is served."""
        models = yaml.safe_load((self.folder / "models.smoke.yaml").read_text())["models"]
        return Path(next(model["source"] for model in models if model["type"] == "chat"))

    def client(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key or self.key}"}, timeout=60, trust_env=False
        )

    def command(self, *arguments: str) -> str:
        """Output of `python -m server …` over this stack's data. Raises CalledProcessError."""
        done = subprocess.run(
            [sys.executable, "-m", "server", *arguments],
            cwd=PROJECT,
            env={**self.environment, "DATA_DIR": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    def new_key(self, name: str) -> str:
        return self.command("keys", "create", name).split()[0]


@contextmanager
def whole_stack(folder: Path, weights: Path | None = None, **settings: str) -> Iterator[Stack]:
    """One over `folder / "data"`; in the end it must stop well and leave nothing behind. Without `weights` (the
    stand-in's, below a folder of its recipe's name) it teaches its stand-in first."""
    running = Stack(folder / "data", settings=settings)
    running.folder.mkdir()
    if weights is not None:
        shutil.copytree(weights, running.folder / "smoke" / weights.name)
    running.start()
    yield running
    status = running.stop()
    assert status == 0
    assert running.left_behind() == []


def say(content: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat with one message."""
    return {"messages": [{"role": "user", "content": content}], **fields}


def eventually(check: Any, timeout_s: float = 10.0) -> Any:
    """What `check` returns once that is true; fails with its last answer otherwise."""
    deadline = time.monotonic() + timeout_s
    while not (answer := check()):
        assert time.monotonic() < deadline, f"still {answer!r} after {timeout_s} s"
        time.sleep(0.05)
    return answer


def addresses(stack: Stack) -> dict[str, str]:
    """The environment of another process of the service, over the same broker and database."""
    found = json.loads((stack.folder / "addresses.json").read_text())
    return {
        **stack.environment,
        "DATABASE_URL": found["database_url"],
        "AMQP_URL": found["amqp_url"],
        "MODELS_FILE": str(stack.folder / "models.smoke.yaml"),
    }


@contextmanager
def second_server(stack: Stack, *, status: int = 0, **settings: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Another API server over the same broker and database, with settings of its own: its URL, and its process, which
    is to end with this status."""
    port = free_port()
    environment = addresses(stack) | settings
    argv = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    process = subprocess.Popen(argv, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        try:
            return httpx.get(f"{url}/health").json()["status"] == "healthy"
        except httpx.TransportError:
            return False

    try:
        eventually(healthy, timeout_s=30)
        yield url, process
    finally:
        process.terminate()
        assert process.wait(30) == status
