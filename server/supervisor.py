"""`up`: the whole service on one machine, started, watched and stopped in order.

Owns what runs where; the processes are the same as in a cluster. It prints for a person: what is being
done, how far it is, and at the end one line that says the service is ready.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import httpx

from server.auth import ensure_keys, hash_key, new_key
from server.core.registry import Registry, load_registry
from server.core.settings import BadSettings, Settings
from server.db.pool import make_pool, migrate
from server.db.store import Store
from server.private import PrivatePostgres, PrivateRabbitMQ
from server.process import Child, start
from server.sources import Sources, download, explain, locate_all, write_smoke_profile

READY_TIMEOUT_S = 1800.0
"""Large models take long to load; a worker that fails ends the wait at once."""
PROGRESS_EVERY_S = 10.0
RESTART_MAX_S = 30.0
FEW_CORES = 4


def say(text: str) -> None:
    print(text, flush=True)


@dataclass(slots=True)
class Plan:
    """What `up` starts: `arguments` of `python -m`, by name."""

    commands: dict[str, list[str]]
    environment: dict[str, str]
    cores: dict[str, set[int] | None]


class Supervisor:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.data_dir.resolve()
        self._children: dict[str, Child] = {}
        self._stopping = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def run(self) -> int:
        """Until SIGINT or SIGTERM; returns the exit status. Raises ServiceError when it cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        registry = load_registry(self._settings.models_file)
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        try:
            async with self._stack:
                serving = asyncio.create_task(self._serve(registry))
                stopped = asyncio.create_task(self._stopping.wait())
                await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not serving.done():
                    say("Stopping …")
                    serving.cancel()
                    await asyncio.gather(serving, return_exceptions=True)
                    await self._stop_children()
                    return 0
                return serving.result()
        finally:
            await self._stop_children()
            lock.close()

    async def _serve(self, registry: Registry) -> int:
        began = time.monotonic()
        registry, models_file = await self._weights(registry)
        database_url, amqp_url = await self._stores()
        applied = await asyncio.to_thread(migrate, database_url)
        if applied:
            say(f"Database schema: applied {', '.join(applied)}")
        key = await self._first_key(database_url)
        plan = self._plan(registry, models_file, database_url, amqp_url)
        for name in plan.commands:
            await self._start(name, plan)
        await self._until_healthy(registry)
        say(self._welcome(key, time.monotonic() - began))
        await self._watch(plan)
        return 1

    def _lock(self) -> TextIO:
        file = (self._folder / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            file.close()
            raise BadSettings(
                f"Another ./run uses {self._folder}. Stop it, or give this one its own --data-dir and --port."
            ) from exc
        return file

    async def _weights(self, registry: Registry) -> tuple[Registry, Path]:
        """Make sure that each model has weights, or a stand-in where the hub cannot be reached."""
        say("Models: " + ", ".join(f"{spec.id} ({spec.source})" for spec in registry.models))
        sources: Sources = await asyncio.to_thread(locate_all, registry)
        for spec in registry.models:
            if sources.where[spec.id] == "hub":
                say(f"Downloading {spec.source} …")
                await asyncio.to_thread(download, spec)
        if not sources.missing:
            return registry, self._settings.models_file.resolve()
        say(explain(sources.missing))
        smoke_chat = await self._smoke_chat(registry, sources.missing)
        profile = self._folder / "models.smoke.yaml"
        return write_smoke_profile(registry, sources.missing, smoke_chat, profile), profile

    async def _smoke_chat(self, registry: Registry, missing: list[str]) -> Path:
        """Build the tiny Qwen3 if it is needed and not there; returns its folder."""
        recipe = Path(__file__).parent.parent / "workers" / "smoke.py"
        folder = self._folder / "smoke" / hashlib.sha256(recipe.read_bytes()).hexdigest()[:12]
        if (folder / "config.json").exists() or not any(s.id in missing for s in registry.of_type("chat")):
            return folder
        say("Teaching the stand-in its ten answers (about 20 s) …")
        folder.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "workers", "smoke", "--out", str(folder)]
        child = await start("smoke", argv, {}, self._folder / "logs" / "smoke.log")
        self._children["smoke"] = child
        await child.process.wait()
        del self._children["smoke"]
        if child.process.returncode:
            raise BadSettings(f"The stand-in could not be made:\n{child.tail()}")
        return folder

    async def _stores(self) -> tuple[str, str]:
        """Addresses of Postgres and RabbitMQ; private ones are started and stop with the stack."""

        async def postgres() -> str:
            if self._settings.database_url:
                return self._settings.database_url
            private = PrivatePostgres(self._folder / "postgres")
            self._stack.push_async_callback(private.stop)
            return await private.start()

        async def rabbitmq() -> str:
            if self._settings.amqp_url:
                return self._settings.amqp_url
            private = PrivateRabbitMQ(self._folder / "rabbitmq")
            self._stack.push_async_callback(private.stop)
            return await private.start()

        say("Starting Postgres and RabbitMQ …")
        database_url, amqp_url = await asyncio.gather(postgres(), rabbitmq())
        addresses = self._folder / "addresses.json"
        addresses.touch(mode=0o600)
        addresses.write_text(json.dumps({"database_url": database_url, "amqp_url": amqp_url}))
        return database_url, amqp_url

    async def _first_key(self, database_url: str) -> str | None:
        """A new key, if there is none at all; only its hash is kept."""
        async with open_store(database_url) as store:
            await ensure_keys(store, self._settings)
            if await store.list_keys():
                return None
            key = new_key()
            await store.create_key("admin", hash_key(key), is_admin=True)
            return key

    def _plan(self, registry: Registry, models_file: Path, database_url: str, amqp_url: str) -> Plan:
        commands = {f"chat {s.id}": ["workers", "chat", "--model", s.id] for s in registry.of_type("chat")}
        commands["server"] = ["server", "serve"]
        commands |= {
            f"embedding {s.id}": ["workers", "embedding", "--model", s.id] for s in registry.of_type("embedding")
        }
        commands["archive"] = ["workers", "archive"]
        environment = {
            "MODELS_FILE": str(models_file),
            "DATABASE_URL": database_url,
            "AMQP_URL": amqp_url,
            "HOST": self._settings.host,
            "PORT": str(self._settings.port),
            "API_KEY": self._settings.api_key,
            "RATE_LIMIT_PER_MINUTE": str(self._settings.rate_limit_per_minute),
            "METRICS_PORT": "0",
        }
        # vLLM's CPU build spins on the cores it takes; with few of them the others keep off, on the last.
        cores = sorted(os.sched_getaffinity(0))
        crowded = 1 < len(cores) <= FEW_CORES and shutil.which("nvidia-smi") is None
        others = {cores[-1]} if crowded else None
        return Plan(commands, environment, {name: None if name.startswith("chat") else others for name in commands})

    async def _start(self, name: str, plan: Plan) -> None:
        argv = [sys.executable, "-m", *plan.commands[name]]
        log = self._folder / "logs" / f"{name.replace(' ', '-')}.log"
        self._children[name] = await start(name, argv, plan.environment, log, plan.cores[name])

    async def _until_healthy(self, registry: Registry) -> None:
        """Ask `/health` until it says healthy, and say how far things are. Raises BadSettings if one dies."""
        say(f"Starting the engine and the workers (an engine takes a minute or two). Logs: {self._folder}/logs")
        began = said = time.monotonic()
        async with httpx.AsyncClient(timeout=5) as client:
            while time.monotonic() - began < READY_TIMEOUT_S:
                for child in self._children.values():
                    if child.exited:
                        raise BadSettings(
                            f"{child.name} stopped while starting. The end of {child.log}:\n{child.tail()}"
                        )
                waiting = await self._waiting_for(client, registry)
                if not waiting:
                    return
                if time.monotonic() - said >= PROGRESS_EVERY_S:
                    said = time.monotonic()
                    say(f"  {said - began:4.0f} s  waiting for {', '.join(waiting)}{self._stage(waiting)}")
                await asyncio.sleep(0.5)
        raise BadSettings(f"Not ready after {READY_TIMEOUT_S:.0f} s. The logs are in {self._folder}/logs")

    async def _waiting_for(self, client: httpx.AsyncClient, registry: Registry) -> list[str]:
        """What is not ready yet."""
        try:
            health = (await client.get(f"{self._url}/health")).json()
        except (httpx.HTTPError, ValueError):
            return ["server"]
        if health["status"] == "healthy":
            return []
        ready = {(worker["type"], worker["model"]) for worker in health["workers"] if worker["ready"]}
        wanted = [(spec.type, spec.id) for spec in registry.models] + [("archive", "")]
        return [f"{type_} {model}".strip() for type_, model in wanted if (type_, model) not in ready] or ["health"]

    def _stage(self, waiting: list[str]) -> str:
        """The last thing the first of them logged, shortened."""
        child = self._children.get(waiting[0])
        for line in reversed(child.tail().splitlines() if child else []):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                message = str(json.loads(line)["message"]).splitlines()[0]
                return f"  ({message[:70]})"
        return ""

    @property
    def _url(self) -> str:
        host = "127.0.0.1" if self._settings.host in ("0.0.0.0", "::") else self._settings.host
        return f"http://{host}:{self._settings.port}"

    def _welcome(self, key: str | None, took_s: float) -> str:
        given = self._settings.api_keys
        if key is not None:
            hint = f"Key (shown this once; keep it): {key}"
        elif given:
            hint = "Key: the first of API_KEY."
        else:
            hint = "Key: the one shown at the first start; `.venv/bin/python -m server keys create NAME` makes another."
        shown = key or (given[0] if given else "YOUR_API_KEY")
        return (
            f"Ready on {self._url}\n"
            f"  in {took_s:.0f} s. {hint}\n"
            f"  Try:\n"
            f"    curl {self._url}/chat -H 'Authorization: Bearer {shown}' \\\n"
            f"      -H 'Content-Type: application/json' \\\n"
            f'      -d \'{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}\'\n'
            f"  Ctrl-C stops everything."
        )

    async def _watch(self, plan: Plan) -> None:
        """Start again whatever ends, later each time it ends soon."""
        delays: dict[str, float] = {}
        while True:
            waits = {asyncio.create_task(child.process.wait()): name for name, child in self._children.items()}
            try:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            for name in (waits[wait] for wait in done):
                delay = delays.get(name, 1.0)
                delays[name] = min(delay * 2, RESTART_MAX_S)
                child = self._children[name]
                status = child.process.returncode
                say(f"{name} ended with status {status}; starting it again in {delay:.0f} s. Log: {child.log}")
                await child.stop(timeout_s=1)  # what it left of its process group
                await asyncio.sleep(delay)
                await self._start(name, plan)

    async def _stop_children(self) -> None:
        """The server first, so that nothing new comes in; then those that work; the archivist last."""
        timeout_s = self._settings.drain_timeout_s + 10
        children, self._children = self._children, {}
        order = sorted(children, key=lambda name: (name != "server", name == "archive"))
        for phase in (
            [n for n in order if n == "server"],
            [n for n in order if n not in ("server", "archive")],
            ["archive"],
        ):
            await asyncio.gather(*(children[name].stop(timeout_s) for name in phase if name in children))


@contextlib.asynccontextmanager
async def open_store(database_url: str) -> AsyncIterator[Store]:
    """A store for a command's few questions."""
    pool = make_pool(database_url, max_size=1)
    await pool.open(wait=True)
    try:
        yield Store(pool)
    finally:
        await pool.close()
