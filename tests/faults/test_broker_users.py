"""The users that deploy/README.md makes in the broker may do what their processes do, and not read the rest."""

import re
from pathlib import Path

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from server.core import topology
from tests.faults.broker import ctl
from tests.faults.chats import NATIVE, ask
from tests.faults.rig import MODEL, Rig, history, until

GUIDE = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
USERS = re.findall(r"^broker set_permissions (\w+) '(.*)' '(.*)' '(.*)'$", GUIDE, re.MULTILINE)


async def test_each_process_has_a_user_that_may_do_its_work(fragile: Rig) -> None:
    # Given users with the permissions of the guide
    urls = {}
    for name, *permissions in USERS:
        await ctl(fragile.rabbitmq, "add_user", name, "secret")
        await ctl(fragile.rabbitmq, "set_permissions", "--vhost", fragile.vhost, name, *permissions)
        urls[name] = re.sub("//.*@", f"//{name}:secret@", fragile.amqp_url)
    # When each process has its own, on a broker where nothing was declared before, then a chat is answered and kept
    fragile.serve(**{MODEL: {}, "vectors": {"type": "embedding"}})
    await fragile.archive(AMQP_URL=urls["archive"])
    await fragile.echo(AMQP_URL=urls["worker"])
    url, _ = await fragile.server(AMQP_URL=urls["server"])
    async with fragile.client(url) as client:

        async def answered() -> bool:
            return (await ask(client, NATIVE)).status_code == 200

        await until(answered)
        await until(lambda: history(client, 1))
        assert (await client.get("/v1/requests/none")).status_code == 404  # asked of all servers
        metrics = (await client.get("/metrics")).text
    assert "\nqwen3_dead_letters 0.0\n" in metrics
    assert f'\nqwen3_workers_busy{{model="{MODEL}"}} ' in metrics
    for log in fragile.folder.glob("*.log"):
        assert "ACCESS_REFUSED" not in log.read_text(), log.name
    # And a worker, which runs what others wrote, can read nobody's finished chats, nor those that were given up on
    for queue in (topology.HISTORY, topology.DEAD):
        connection = pika.BlockingConnection(pika.URLParameters(urls["worker"]))
        with pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
            connection.channel().basic_get(queue)
        connection.close()
