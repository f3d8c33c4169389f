"""A worker without an engine that counts from 0, a number a token, until it is stopped, and that can be halted.

`python -m tests.faults.counting --model ID --slots N`. The file named by BEGUN gets a line for each job it begins: what
was asked; that with `.jsonl` behind its name, one for each that begins or ends: when, and by when it should have.
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
        _write_down(job.body["messages"][-1]["content"])
        _tell("begun", job)
        try:
            return await self._say(job, reply)
        finally:
            _tell("ended", job)

    async def _say(self, job: Job, reply: Reply) -> Answer:
        head = {"id": f"chatcmpl-{job.id}", "created": int(time.time()), "model": self.model}
        stream, most = job.body.get("stream"), job.body.get("max_tokens", 10_000)
        said: list[str] = []
        while len(said) < most and job.id not in self._halted:
            said.append(f" {len(said)}")
            if stream:
                choice = {"index": 0, "delta": {"content": said[-1]}, "finish_reason": None}
                chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
                reply.send("chunk", msgspec.json.encode(chunk))
            await asyncio.sleep(0.02)
        reason = "stop" if len(said) == most else "abort"
        usage = {"prompt_tokens": 1, "completion_tokens": len(said), "total_tokens": 1 + len(said)}
        message = {"role": "assistant", "content": "".join(said)}
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
            messages=[*job.body["messages"], message],
            finish_reason=reason,
        )
        if stream:
            reply.send("usage", msgspec.json.encode({**head, "choices": [], "usage": usage}))
            return Answer("done", b"", record)
        choice = {"index": 0, "message": message, "finish_reason": reason}
        whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        return Answer("result", msgspec.json.encode(whole), record)


def _write_down(question: str) -> None:
    with Path(os.environ["BEGUN"]).open("a") as begun:
        begun.write(f"{question}\n")


def _tell(event: str, job: Job) -> None:
    question = job.body["messages"][-1]["content"]
    told = {"event": event, "at": time.time(), "asked_at": job.created_at, "deadline": job.deadline, "asked": question}
    with Path(f"{os.environ['BEGUN']}.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(told) + b"\n")


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--model", required=True, metavar="ID")
    top.add_argument("--slots", type=int, default=8, metavar="N")
    args = top.parse_args()
    json_logging.configure("INFO", "counting")
    return asyncio.run(CountingWorker(load_settings(), args.model, args.slots).run())


if __name__ == "__main__":
    sys.exit(main())
