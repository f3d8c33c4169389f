"""What was refused while the broker took nothing is not made later, when the broker gets it all the same."""

import asyncio

from tests.faults.broker import without_memory
from tests.faults.chats import is_refused
from tests.faults.life import CHAT, life, say
from tests.faults.rig import Rig, until


async def test_what_the_memory_alarm_refused_is_neither_made_nor_kept_nor_billed(fragile: Rig) -> None:
    async with life(fragile, slots=4) as running:
        # Given a broker without memory, of which the server has not heard yet, so that it sends what it is asked
        async with without_memory(fragile.rabbitmq):
            refused = [running.client.post(CHAT, json=say(f"refused {n}", max_tokens=50)) for n in range(4)]
            assert all(is_refused(answer) for answer in await asyncio.gather(*refused))
            await asyncio.sleep(1)
        # When there is memory again, and the broker reads what it was sent

        async def answered() -> bool:
            return (await running.client.post(CHAT, json=say("taken", max_tokens=1))).status_code == 200

        # Then what is asked from now on is made, and nothing else
        await until(answered)
        await asyncio.sleep(2)
        assert (await running.queued(), await running.running()) == (0, 0)
        assert await running.jobs("cancelled") > 0  # the worker was sent some of them
        assert set(running.begun()) == {"taken"}
        made = len(running.begun())
        assert (await running.usage())[0] == len(await running.history()) == made
