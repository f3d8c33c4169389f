"""What listens where, and what it asks of whom it lets in: the real sockets of the running service."""

import ipaddress
import os
import stat
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest

from server.core.amqp import AmqpLink
from server.core.errors import BrokerUnavailable
from tests.faults.rig import Rig
from tests.processes import naming


def listening(processes: list[psutil.Process]) -> dict[str, set[tuple[str, int]]]:
    """Addresses and ports on which these processes, and what they started, can be reached, by process name."""
    found: dict[str, set[tuple[str, int]]] = {}
    every = {process.pid: process for process in processes}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            every |= {child.pid: child for child in process.children(recursive=True)}
    for process in every.values():
        with suppress(psutil.NoSuchProcess):  # one that has done its work meanwhile
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN or (not connection.raddr and connection.type == 2):
                    found.setdefault(process.name(), set()).add((connection.laddr.ip, connection.laddr.port))
    return found


def beyond(found: dict[str, set[tuple[str, int]]]) -> list[tuple[str, str, int]]:
    """Those that another machine could reach."""
    return [
        (name, ip, port)
        for name, addresses in found.items()
        for ip, port in addresses
        if not ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback
    ]


async def test_nothing_listens_beyond_this_machine(parts: Rig) -> None:
    # Given the broker, the database, and what uses them
    await parts.server()
    await parts.echo()
    await parts.archive()
    # When their sockets are looked at
    found = listening([*psutil.Process().children(recursive=True), *naming(parts.rabbitmq.folder)])
    # Then the broker, its node's own port and its name daemon are there, all on loopback
    assert parts.rabbitmq._ports is not None
    amqp, distribution, epmd = parts.rabbitmq._ports
    ports = {name: {port for _, port in addresses} for name, addresses in found.items()}
    assert {amqp, distribution} <= ports["beam.smp"]
    assert epmd in ports["epmd"]
    assert beyond(found) == []
    # And Postgres has no port at all
    assert "postgres" not in found


async def test_the_private_services_ask_for_a_password(parts: Rig) -> None:
    # Given addresses with the right passwords; when somebody comes without one, or with RabbitMQ's well-known one
    with psycopg.connect(parts.database_url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        wanted = connection.info.get_parameters()
    for password in ("", "wrong"):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(host=wanted["host"], user="postgres", password=password)

    async def nothing(link: AmqpLink) -> None:
        """Nothing to declare."""

    port = parts.amqp_url.rpartition(":")[2].partition("/")[0]
    with pytest.raises(BrokerUnavailable):
        await AmqpLink(f"amqp://guest:guest@127.0.0.1:{port}/%2F", "test", nothing).start(timeout_s=3)
    # Then nobody is let in; and the passwords are for their owner's eyes
    folder, postgres = parts.rabbitmq.folder, Path(wanted["host"])
    secrets = [folder / "password", folder / "rabbitmq.conf", folder / ".erlang.cookie", postgres / "password"]
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert path.stat().st_uid == os.geteuid(), path
    assert stat.S_IMODE(postgres.stat().st_mode) & 0o077 == 0
