"""The private database and broker: killed, they come back at the same address with their data."""

import asyncio
import os
import signal
from pathlib import Path

import psycopg

from server.core.amqp import AmqpLink, Delivery
from server.private import PrivatePostgres, PrivateRabbitMQ, memory_limit, postgres_conf
from tests.integration.test_amqp import until
from tests.processes import naming


async def test_a_killed_postgres_comes_back(folder: Path) -> None:
    # Given a row that is committed
    postgres = PrivatePostgres(folder / "postgres")
    url = await postgres.start()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
    # When Postgres is killed
    ended = asyncio.create_task(postgres.ended())
    await asyncio.sleep(0.1)
    os.kill(int((folder / "postgres" / "postmaster.pid").read_text().splitlines()[0]), signal.SIGKILL)
    await asyncio.wait_for(ended, 20)
    # Then it is started again where it was, and the row is there
    assert await postgres.start() == url
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT one FROM kept").fetchall() == [(1,)]
    await postgres.stop()
    await until(lambda: naming(folder) == [])


async def test_postgres_is_set_for_its_machine(folder: Path) -> None:
    # Given a Postgres that was started before
    postgres = PrivatePostgres(folder / "postgres")
    url = await postgres.start()
    wanted = [line.split(" = ")[0] for line in postgres_conf(memory_limit()).splitlines()]
    with psycopg.connect(url, autocommit=True) as connection:
        # Then all that is set for the machine is in force
        query = "SELECT name FROM pg_file_settings WHERE sourcefile LIKE '%/machine.conf' AND applied"
        assert [row[0] for row in connection.execute(query)] == wanted
        # When a person sets something else
        connection.execute("ALTER SYSTEM SET shared_buffers = '64MB'")
    await postgres.stop()
    # Then that stays so at the next start
    postgres = PrivatePostgres(folder / "postgres")
    with psycopg.connect(await postgres.start()) as connection:
        assert connection.execute("SHOW shared_buffers").fetchall() == [("64MB",)]
        assert connection.execute("SHOW jit").fetchall() == [("off",)]
    assert (folder / "postgres" / "postgresql.conf").read_text().count("machine.conf") == 1
    await postgres.stop()


async def test_a_killed_rabbitmq_comes_back(folder: Path) -> None:
    # Given a message in a durable queue, delivered and not acked
    rabbitmq = PrivateRabbitMQ(folder / "rabbitmq")
    url = await rabbitmq.start()
    got: list[Delivery] = []

    async def setup(link: AmqpLink) -> None:
        await link.declare_queue("kept")
        await link.consume("kept", got.append, prefetch=1)

    link = AmqpLink(url, "test", setup)
    await link.start()
    await link.publish("kept", b"message")
    await until(lambda: got)
    # When the broker is killed
    (beam,) = [process for process in naming(folder) if "beam" in process.name()]
    beam.kill()
    await asyncio.wait_for(rabbitmq.ended(), 20)
    # Then it comes back where it was, the link by itself, and the message is delivered again
    assert await rabbitmq.start() == url
    await until(lambda: len(got) > 1, timeout_s=90)
    assert {delivery.body for delivery in got} == {b"message"}
    await link.close()
    await rabbitmq.stop()
    assert naming(folder) == []
