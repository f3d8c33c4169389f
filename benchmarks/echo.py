"""A chat worker without an engine: it answers every request at once with a fixed number of words.

Everything else about it is real: broker, frames, records. What a benchmark measures with it is the way there and
back. `python -m benchmarks.echo --model ID`; addresses come from the environment, as for any worker.
"""

import argparse
import asyncio
import sys
import time
from typing import Any

import msgspec

from server.core import logging as json_logging
from server.core import tracing
from server.core.messages import Job, Record, WorkerType
from server.core.settings import Settings, load_settings
from workers.base import Answer, Worker
from workers.replies import Reply

SLOTS = 256
"""Jobs at once, unless told otherwise."""
WORD = "abc"
"""Three letters: as much as LiteLLM's mock puts into one chunk."""


class EchoWorker(Worker):
    """Answers with `words` words, each after `pause_s`; a stream has one a chunk."""

    type: WorkerType = "chat"
    provider = "echo"

    def __init__(self, settings: Settings, model: str, words: int, pause_s: float = 0.0, slots: int = SLOTS) -> None:
        super().__init__(settings, model)
        self._words = words
        self._pause_s = pause_s
        self._job_slots = slots

    async def start(self) -> int:
        return self._job_slots

    async def stop(self) -> None:
        """There is nothing to free."""

    async def handle(self, job: Job, reply: Reply) -> Answer:
        text = WORD * self._words
        usage = {"prompt_tokens": 1, "completion_tokens": self._words, "total_tokens": 1 + self._words}
        now = time.time()
        head = {"id": f"chatcmpl-{job.id}", "created": int(now), "model": self.model}
        record = Record(
            request_id=job.id,
            type="chat",
            key_id=job.key_id,
            model=self.model,
            endpoint=job.endpoint,
            prompt_tokens=1,
            completion_tokens=self._words,
            created_at=job.created_at,
            finished_at=now + self._words * self._pause_s,
            session_id=job.session_id,
            messages=[*job.body["messages"], {"role": "assistant", "content": text}],
            finish_reason="stop",
        )
        if not job.body.get("stream"):
            await asyncio.sleep(self._words * self._pause_s)
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            return Answer("result", msgspec.json.encode(whole), record)
        head["object"] = "chat.completion.chunk"
        reply.send("chunk", _chunk(head, {"role": "assistant", "content": ""}))
        for _ in range(self._words):
            reply.send("chunk", _chunk(head, {"content": WORD}))
            await asyncio.sleep(self._pause_s)  # also without one, as an engine gives every stream its turn
        reply.send("chunk", _chunk(head, {}, "stop"))
        reply.send("usage", msgspec.json.encode({**head, "choices": [], "usage": usage}))
        return Answer("done", b"", record)


def _chunk(head: dict[str, Any], delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return msgspec.json.encode({**head, "choices": [choice]})


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--model", default="echo", metavar="ID", help="an id of the server's models.yaml (echo)")
    top.add_argument("--words", type=int, default=32, metavar="N", help="words of every answer (32)")
    top.add_argument("--pause", type=float, default=0.0, metavar="SECONDS", help="what each word takes (0)")
    top.add_argument("--slots", type=int, default=SLOTS, metavar="N", help=f"requests answered at once ({SLOTS})")
    args = top.parse_args()
    settings = load_settings()
    json_logging.configure(settings.log_level, "echo")
    tracing.start(settings, "echo")
    return asyncio.run(EchoWorker(settings, args.model, args.words, args.pause, args.slots).run())


if __name__ == "__main__":
    sys.exit(main())
