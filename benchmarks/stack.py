"""The whole service on a port of its own, for as long as a benchmark runs."""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from server.core.registry import Registry, load_registry
from server.private import free_port

PROJECT = Path(__file__).parent.parent
KEY = "benchmark-key"


class DidNotStart(RuntimeError):
    """`up` ended or said nothing; the message is the end of what it said."""


@dataclass(frozen=True, slots=True)
class Service:
    """A running service. `addresses` are those of its database and broker, `registry` the models it serves."""

    url: str
    key: str
    data_dir: Path
    addresses: dict[str, str]
    registry: Registry
    process: psutil.Process

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Every live process, by what it is: server, chat, engine, embedding, archive, rabbitmq, postgres, up."""
        found: dict[str, list[psutil.Process]] = {"up": [self.process], "postgres": self._postgres()}
        for child in self.process.children(recursive=True):
            try:
                found.setdefault(_kind(child), []).append(child)
            except psutil.Error:
                continue  # it has ended meanwhile
        return found

    def _postgres(self) -> list[psutil.Process]:
        """A daemon, and so no child of anybody's."""
        try:
            pid = int((self.data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])
            postmaster = psutil.Process(pid)
            return [postmaster, *postmaster.children()]
        except (OSError, psutil.Error):
            return []


def _kind(process: psutil.Process) -> str:
    """What a process of the service is; of a process that some other started, what that one is."""
    words = process.cmdline()
    if "beam" in process.name() or "rabbitmq" in " ".join(words) or process.name() in ("epmd", "erl_child_setup"):
        return "rabbitmq"
    if words and words[0].startswith("VLLM::"):
        return "engine"
    for module, names in (("workers", ("chat", "embedding", "archive")), ("server", ("serve",))):
        if module in words and (name := next((name for name in names if name in words), None)):
            return "server" if name == "serve" else name
    parent = process.parent()
    return _kind(parent) if parent is not None and parent.pid > 1 else "up"


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """What they have used so far."""
    used = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
            used += times.user + times.system
        except psutil.Error:
            continue
    return used


@asynccontextmanager
async def service(models_file: Path | None = None, **environment: str) -> AsyncIterator[Service]:
    """`python -m server up` in a folder that is thrown away, without a rate limit. Raises DidNotStart."""
    with tempfile.TemporaryDirectory(prefix="qwen3-") as folder:
        port = free_port()
        argv = [sys.executable, "-m", "server", "up", "--port", str(port), "--data-dir", folder]
        if models_file is not None:
            argv += ["--models", str(models_file)]
        log = Path(folder) / "up.log"
        with log.open("wb") as out:
            up = await asyncio.create_subprocess_exec(
                *argv,
                cwd=PROJECT,
                env={**os.environ, "API_KEY": KEY, "RATE_LIMIT_PER_MINUTE": "0", **environment},
                stdout=out,
                stderr=out,
            )
        try:
            while f"Ready on http://127.0.0.1:{port}" not in (said := log.read_text()):
                if up.returncode is not None:
                    raise DidNotStart(said)
                await asyncio.sleep(0.3)
            addresses = json.loads((Path(folder) / "addresses.json").read_text())
            stand_ins = Path(folder) / "models.smoke.yaml"
            registry = load_registry(stand_ins if stand_ins.exists() else models_file or PROJECT / "models.yaml")
            process = psutil.Process(up.pid)
            yield Service(f"http://127.0.0.1:{port}", KEY, Path(folder), addresses, registry, process)
        finally:
            if up.returncode is None:
                up.terminate()
            await up.wait()


@asynccontextmanager
async def other_server(argv: list[str], health_url: str, **environment: str) -> AsyncIterator[psutil.Process]:
    """Another server, from when `health_url` answers until the context ends. Raises DidNotStart."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=PROJECT, env={**os.environ, **environment}, stdout=log, stderr=log
        )
        try:
            async with aiohttp.ClientSession() as client:
                while not await _answers(client, health_url):
                    if process.returncode is not None:
                        log.seek(0)
                        raise DidNotStart(log.read().decode(errors="replace")[-4000:])
                    await asyncio.sleep(0.5)
            yield psutil.Process(process.pid)
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _answers(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
