"""The chat worker: jobs in, frames out, one engine. Knows neither vLLM nor what a dialect looks like."""

import asyncio
import time
from contextlib import AsyncExitStack

from server.core import metrics
from server.core.messages import FrameKind, Job, Record, WorkerType
from server.core.registry import ModelSpec
from server.core.settings import Settings
from workers.base import Answer, Worker
from workers.engine import ChatEngine, start_engine
from workers.heart import Heart, kill_below
from workers.placement import keep_apart
from workers.replies import Reply
from workers.transcript import Transcript, asked, put_before_question


class ChatWorker(Worker):
    type: WorkerType = "chat"
    provider = "vllm"

    def __init__(self, settings: Settings, spec: ModelSpec) -> None:
        super().__init__(settings, spec.id)
        self._spec = spec
        self._stack = AsyncExitStack()
        self._engine: ChatEngine
        self._heart: Heart
        self._beating: asyncio.Task[None] | None = None

    async def start(self) -> int:
        self._engine = await self._stack.enter_async_context(start_engine(self._spec, self.settings))
        if self.settings.front:
            keep_apart(self.settings.front)
        self._heart = Heart(self._engine.ask)
        self._beating = asyncio.create_task(self._heart.run())
        return self._engine.max_num_seqs

    async def stop(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
        await self._stack.aclose()

    def alive(self) -> bool:
        return self._engine.alive

    async def halt(self, job: Job) -> bool:
        await self._engine.serving[job.api].halt(job.id)
        return True

    def hung_s(self) -> float:
        return self._heart.hung_s

    def kill(self) -> None:
        kill_below()

    async def handle(self, job: Job, reply: Reply) -> Answer:
        transcript = Transcript()
        kind: FrameKind = "done"
        result = b""
        body = put_before_question(job.api, job.body, job.context) if job.context else job.body
        # A cache shared by all keys would tell, by its speed, what others have sent.
        body = body | {"cache_salt": f"key {job.key_id}"}
        serving = self._engine.serving[job.api]
        if body.get("stream"):
            async for piece in serving.stream(body, job.id, transcript.add):
                self.beacon.progress()
                reply.send("usage" if piece.only_counts else "chunk", piece.data)
        else:
            kind, result = "result", await serving.complete(body, job.id, transcript.add)
            self.beacon.progress(transcript.completion_tokens)
        metrics.prompt_tokens.labels(self.model).inc(transcript.prompt_tokens)
        metrics.completion_tokens.labels(self.model).inc(transcript.completion_tokens)
        return Answer(kind, result, self._as_record(job, transcript))

    def _as_record(self, job: Job, transcript: Transcript) -> Record:
        return Record(
            request_id=job.id,
            type="chat",
            key_id=job.key_id,
            model=self.model,
            endpoint=job.endpoint,
            prompt_tokens=transcript.prompt_tokens,
            completion_tokens=transcript.completion_tokens,
            created_at=job.created_at,
            finished_at=time.time(),
            session_id=job.session_id,
            messages=[*asked(job.api, job.body), transcript.message()],
            finish_reason=transcript.finish_reason,
        )
