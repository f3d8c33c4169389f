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
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import httpx

from server.auth import hash_key, new_key
from server.core.registry import Registry, load_registry
from server.core.settings import SECRETS, BadSettings, Settings
from server.core.signals import stop_event
from server.db.pool import make_pool, migrate, open_pool
from server.db.store import Store
from server.private import PrivatePostgres, PrivateRabbitMQ
from server.process import Child, start
from server.processes import listening_socket
from server.sources import Sources, download_command, explain, locate_all, write_smoke_profile

READY_TIMEOUT_S = 1800.0
"""Large models take long to load; a worker that fails ends the wait at once."""
PROGRESS_EVERY_S = 10.0
RESTART_MAX_S = 30.0
STABLE_S = 300.0
FEW_CORES = 4


def say(text: str) -> None:
    print(text, flush=True)


@dataclass(slots=True)
class Plan:
    """What `up` starts, by name: `commands` are the arguments of `python -m`, `cores` where it may run."""

    commands: dict[str, list[str]]
    environment: dict[str, str]
    cores: dict[str, set[int] | None]


def off_the_engine(registry: Registry) -> set[int] | None:
    """Where all but the engine runs; None: anywhere. The engine's threads compute in step: whoever runs beside one of
    them holds up all, so that with few cores the others keep off, on the last."""
    cores = sorted(os.sched_getaffinity(0))
    crowded = 1 < len(cores) <= FEW_CORES and shutil.which("nvidia-smi") is None
    return {cores[-1]} if crowded and registry.of_type("chat") else None


class Supervisor:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.data_dir.resolve()
        self._children: dict[str, Child] = {}
        self._private: dict[str, PrivatePostgres | PrivateRabbitMQ] = {}
        self._stack = contextlib.AsyncExitStack()

    async def run(self) -> int:
        """Until SIGINT or SIGTERM; returns the exit status. Raises ServiceError when it cannot start."""
        stopping = stop_event()
        registry = load_registry(self._settings.models_file)
        self._check_port()
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        try:
            async with self._stack:
                serving = asyncio.create_task(self._serve(registry))
                stopped = asyncio.create_task(stopping.wait())
                await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
                try:
                    if serving.done():
                        return serving.result()
                    say("Stopping …")
                    serving.cancel()
                    await asyncio.gather(serving, return_exceptions=True)
                    return 0
                finally:
                    await self._stop_children()  # before the stack's end takes broker and database away
        finally:
            lock.close()

    async def _serve(self, registry: Registry) -> int:
        began = time.monotonic()
        registry, models_file = await self._weights(registry)
        database_url, amqp_url = await self._stores(off_the_engine(registry))
        applied = await asyncio.to_thread(migrate, database_url, alone=not self._settings.database_url)
        if applied:
            say(f"Database schema: applied {', '.join(applied)}")
        plan = self._plan(registry, models_file, database_url, amqp_url)
        for name in plan.commands:
            await self._start(name, plan)
        await self._until_healthy(registry)
        key = await self._first_key(database_url)
        say(self._welcome(key, time.monotonic() - began))
        await self._watch(plan)
        return 1

    def _check_port(self) -> None:
        """Now, rather than after a minute of starting."""
        listening_socket(self._settings.host, self._settings.port).close()

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
                await self._run_to_end("download", download_command(spec), None)
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
        say("Teaching the stand-in its answers (about 30 s) …")
        folder.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "workers", "smoke", "--out", str(folder)]
        await self._run_to_end("smoke", argv, self._folder / "logs" / "smoke.log")
        return folder

    async def _run_to_end(self, name: str, argv: list[str], log: Path | None) -> None:
        """Run a program that ends by itself, its output in `log` or on the terminal. Raises BadSettings if it fails.

        A program of its own, so that Ctrl-C ends it at once.
        """
        child = self._children[name] = await start(name, argv, {}, log)
        await child.process.wait()
        del self._children[name]
        if child.process.returncode:
            raise BadSettings(f"{name} failed with status {child.process.returncode}.\n{child.tail()}")

    async def _stores(self, cores: set[int] | None) -> tuple[str, str]:
        """Addresses of Postgres and RabbitMQ; private ones are started on `cores` and stop with the stack."""

        async def address(given: str, name: str, private: PrivatePostgres | PrivateRabbitMQ) -> str:
            if given:
                return given
            self._private[name] = private
            self._stack.push_async_callback(private.stop)
            return await private.start()

        say("Starting Postgres and RabbitMQ …")
        database_url, amqp_url = await asyncio.gather(
            address(self._settings.database_url, "Postgres", PrivatePostgres(self._folder / "postgres", cores)),
            address(self._settings.amqp_url, "RabbitMQ", PrivateRabbitMQ(self._folder / "rabbitmq", cores)),
        )
        addresses = self._folder / "addresses.json"
        addresses.touch(mode=0o600)
        addresses.write_text(json.dumps({"database_url": database_url, "amqp_url": amqp_url}))
        return database_url, amqp_url

    async def _first_key(self, database_url: str) -> str | None:
        """A new key, if there is none at all; only its hash is kept."""
        async with open_store(database_url) as store:
            if await store.list_keys():  # those of API_KEY are there: the server has seen to them
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
            "SERVER_WORKERS": str(self._settings.server_workers),
            "RATE_LIMIT_PER_MINUTE": str(self._settings.rate_limit_per_minute),
            "METRICS_PORT": "0",
            # What files hold was read, and goes on by its own name.
            **{f"{name}_file".upper(): "" for name in SECRETS},
        }
        others = off_the_engine(registry)
        if others is not None:
            environment["FRONT_CORES"] = ",".join(str(core) for core in others)
        return Plan(commands, environment, {name: None if name.startswith("chat") else others for name in commands})

    async def _start(self, name: str, plan: Plan) -> None:
        argv = [sys.executable, "-m", *plan.commands[name]]
        log = self._folder / "logs" / f"{name.replace(' ', '-')}.log"
        environment = dict(plan.environment)
        environment["API_KEY"] = self._settings.api_key if name == "server" else ""
        if name not in ("server", "archive"):
            environment["DATABASE_URL"] = ""
        self._children[name] = await start(name, argv, environment, log, plan.cores[name], watched=True)

    async def _until_healthy(self, registry: Registry) -> None:
        """Ask `/health` until it says healthy, and say how far things are. Raises BadSettings if one dies."""
        say(f"Starting the engine and the workers (an engine takes a minute or two). Logs: {self._folder}/logs")
        began = said = time.monotonic()
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:  # no proxy for one's own address
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
            if health["status"] == "healthy":
                return []
            ready = {(worker["type"], worker["model"]) for worker in health["workers"] if worker["ready"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return ["server"]
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
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._settings.host, self._settings.host)
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self._settings.port}"

    def _welcome(self, key: str | None, took_s: float) -> str:
        if key is not None:
            hint = f"Key (shown this once; keep it): {key}"
        elif self._settings.api_keys:
            hint = "Key: the first of API_KEY."
        else:
            hint = "Key: the one shown at the first start; `.venv/bin/python -m server keys create NAME` makes another."
        shown = key or "YOUR_API_KEY"
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
        """Start again whatever ends."""
        await asyncio.gather(
            *(self._keep(name, plan) for name in plan.commands),
            *(self._keep_private(name) for name in self._private),
        )

    async def _keep_private(self, name: str) -> None:
        """Start the private database or broker again each time it ends; everything else reconnects by itself."""
        private = self._private[name]
        while True:
            await private.ended()
            say(f"{name} ended; starting it again …")
            while True:
                try:
                    await private.start()
                except BadSettings as exc:
                    say(f"{name}: {exc.message}")
                    await asyncio.sleep(RESTART_MAX_S)
                else:
                    break

    async def _keep(self, name: str, plan: Plan) -> None:
        """Start one child again each time it ends, later each time it ends soon."""
        delay = 1.0
        while True:
            child, began = self._children[name], time.monotonic()
            status = await child.ended()
            if time.monotonic() - began > STABLE_S:
                delay = 1.0
            say(f"{name} ended with status {status}; starting it again in {delay:.0f} s. Log: {child.log}")
            await child.stop(timeout_s=1)  # what it left of its process group
            await asyncio.sleep(delay)
            delay = min(delay * 2, RESTART_MAX_S)
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
    await open_pool(pool)
    try:
        yield Store(pool)
    finally:
        await pool.close()
