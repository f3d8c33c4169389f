"""A worker without an engine that does what its question says: `python -m tests.faults.worker --model ID`.

die        it ends itself by SIGKILL, each time
die once   only while the file named by DIED_ONCE is not there
wait S     it answers after S seconds
"""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from benchmarks.echo import SLOTS, EchoWorker
from server.core import logging as json_logging
from server.core.messages import Job
from server.core.settings import load_settings
from workers.base import Answer
from workers.replies import Reply


class ObedientWorker(EchoWorker):
    async def handle(self, job: Job, reply: Reply) -> Answer:
        said = str(job.body["messages"][-1]["content"])
        order, _, argument = said.partition(" ")
        if order == "die":
            await self._die(once=argument == "once")
        if order == "wait":
            await asyncio.sleep(float(argument))
        return await super().handle(job, reply)

    async def _die(self, *, once: bool) -> None:
        if once:
            mark = Path(os.environ["DIED_ONCE"])
            if mark.exists():
                return
            mark.touch()
        await asyncio.sleep(0.3)  # what it had to say is out, and others are in hand
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--model", required=True, metavar="ID")
    top.add_argument("--slots", type=int, default=SLOTS, metavar="N")
    args = top.parse_args()
    json_logging.configure("INFO", "obedient")
    return asyncio.run(ObedientWorker(load_settings(), args.model, words=8, slots=args.slots).run())


if __name__ == "__main__":
    sys.exit(main())
