"""A worker without an engine that counts from 0, a number a token, until it is stopped, and that can be halted.

It speaks every dialect, and says after "say " what it was told to, as one token.
`python -m tests.faults.counting --model ID --slots N`. The file named by BEGUN gets a line for each job it begins: what
was asked; the one named by STOPPED, for each that was halted, the time; the one named by TOLD, for each that begins or
ends, as JSON: when, and by when it should have. Asked with a temperature and without a seed, it
counts from its own process id: what is sampled differs from one run to the next as well.
"""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

import msgspec

from server.core import logging as json_logging
from server.core.messages import Job, Record, WorkerType
from server.core.settings import Settings, load_settings
from tests.faults.dialects import Speaker, asked, most
from workers.base import Answer, Worker
from workers.replies import Reply


class CountingWorker(Worker):
    type: WorkerType = "chat"

    def __init__(self, settings: Settings, model: str, slots: int) -> None:
        super().__init__(settings, model)
        self._how_many = slots
        self._halted: set[str] = set()

    async def start(self) -> int:
        return self._how_many

    async def stop(self) -> None:
        """There is nothing to free."""

    async def halt(self, job: Job) -> bool:
        self._halted.add(job.id)
        return True

    async def handle(self, job: Job, reply: Reply) -> Answer:
        question = asked(job)
        _write_down("BEGUN", question.partition("\n")[0])
        _tell("begun", job)
        try:
            return await self._say(job, question, reply)
        finally:
            _tell("ended", job)

    async def _say(self, job: Job, question: str, reply: Reply) -> Answer:
        head = {"id": f"chatcmpl-{job.id}", "created": int(time.time()), "model": self.model}
        first = os.getpid() if job.body.get("temperature") == 1 and job.body.get("seed") is None else 0
        speaker, stream = Speaker(job.api, head), job.body.get("stream")
        said: list[str] = [question[4:]] if question.startswith("say ") else []
        bound = len(said) or most(job)
        if stream:
            for data in [*speaker.begin(), *map(speaker.say, said)]:
                reply.send("chunk", data)
        while len(said) < bound and job.id not in self._halted:
            said.append(f" {first + len(said)}")
            if stream:
                reply.send("chunk", speaker.say(said[-1]))
            await asyncio.sleep(0.02)
        reason = "stop" if len(said) == bound else "abort"
        if reason == "abort":
            _write_down("STOPPED", str(time.time()))
        usage = {"prompt_tokens": 1, "completion_tokens": len(said), "total_tokens": 1 + len(said)}
        record = Record(
            request_id=job.id,
            type="chat",
            key_id=job.key_id,
            model=self.model,
            endpoint=job.endpoint,
            prompt_tokens=1,
            completion_tokens=len(said),
            created_at=job.created_at,
            finished_at=time.time(),
            session_id=job.session_id,
            messages=[{"role": "user", "content": question}, {"role": "assistant", "content": "".join(said)}],
            finish_reason=reason,
        )
        if not stream:
            return Answer("result", speaker.whole("".join(said), reason, usage), record)
        for kind, data in speaker.end(usage):
            reply.send(kind, data)
        return Answer("done", b"", record)


def _write_down(name: str, line: str) -> None:
    if path := os.environ.get(name):
        with Path(path).open("a") as written:
            written.write(f"{line}\n")


def _tell(event: str, job: Job) -> None:
    told = {"event": event, "at": time.time(), "asked_at": job.created_at, "deadline": job.deadline}
    _write_down("TOLD", msgspec.json.encode(told | {"asked": asked(job)}).decode())


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--model", required=True, metavar="ID")
    top.add_argument("--slots", type=int, default=8, metavar="N")
    args = top.parse_args()
    json_logging.configure("INFO", "counting")
    return asyncio.run(CountingWorker(load_settings(), args.model, args.slots).run())


if __name__ == "__main__":
    sys.exit(main())
