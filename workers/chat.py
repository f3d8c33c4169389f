"""The chat worker: jobs in, frames out, one engine. Owns what of an answer is remembered."""

import time
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from server.core import metrics
from server.core.messages import FrameKind, Job, Record, WorkerType
from server.core.registry import ModelSpec
from server.core.settings import Settings
from workers.base import Answer, Worker
from workers.engine import ChatEngine, start_engine
from workers.replies import Reply


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Message(msgspec.Struct):
    """A message, or a delta of one."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = []


class _Choice(msgspec.Struct):
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    """As much of a completion, or of a chunk, as history needs."""

    created: float = 0.0
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Answer)


class Transcript:
    """The assistant's message, put together from an answer or from its chunks."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self.finish_reason = ""
        self.usage = _Usage()

    def add(self, data: bytes) -> _Answer:
        """Take in an answer's or a chunk's JSON; returns what was read of it."""
        answer = _decoder.decode(data)
        self.usage = answer.usage or self.usage
        for choice in answer.choices[:1]:
            part = choice.message or choice.delta or _Message()
            self._content.append(part.content or "")
            self._reasoning.append(part.reasoning or "")
            for call in part.tool_calls:
                self._add_call(call)
            self.finish_reason = choice.finish_reason or self.finish_reason
        return answer

    def _add_call(self, call: dict[str, Any]) -> None:
        """Whole calls stand alone; a delta continues the call of its `index`."""
        index = call.get("index")
        if index is None or index >= len(self._tool_calls):
            self._tool_calls.append({k: v for k, v in call.items() if k != "index"})
            return
        arguments = (call.get("function") or {}).get("arguments") or ""
        function = self._tool_calls[index]["function"] = self._tool_calls[index].get("function") or {}
        function["arguments"] = (function.get("arguments") or "") + arguments

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content)}
        if reasoning := "".join(self._reasoning):
            message["reasoning"] = reasoning
        if self._tool_calls:
            message["tool_calls"] = self._tool_calls
        return message


class ChatWorker(Worker):
    type: WorkerType = "chat"

    def __init__(self, settings: Settings, spec: ModelSpec) -> None:
        super().__init__(settings, spec.id)
        self._spec = spec
        self._stack = AsyncExitStack()
        self._engine: ChatEngine

    async def start(self) -> int:
        self._engine = await self._stack.enter_async_context(start_engine(self._spec))
        return self._engine.max_num_seqs

    async def stop(self) -> None:
        await self._stack.aclose()

    def alive(self) -> bool:
        return self._engine.alive

    async def handle(self, job: Job, reply: Reply) -> Answer:
        transcript = Transcript()
        kind: FrameKind = "done"
        result = b""
        if job.body.get("stream"):
            async for chunk in self._engine.stream(job.body, job.id):
                answer = transcript.add(chunk)
                self.beacon.progress()
                reply.send("chunk" if answer.choices else "usage", chunk)
        else:
            kind, result = "result", await self._engine.complete(job.body, job.id)
            transcript.add(result)
            self.beacon.progress(transcript.usage.completion_tokens)
        metrics.prompt_tokens.labels(self.model).inc(transcript.usage.prompt_tokens)
        metrics.completion_tokens.labels(self.model).inc(transcript.usage.completion_tokens)
        return Answer(kind, result, self._as_record(job, transcript))

    def _as_record(self, job: Job, transcript: Transcript) -> Record:
        now = time.time()
        return Record(
            request_id=job.id,
            type="chat",
            key_id=job.key_id,
            model=self.model,
            endpoint=job.endpoint,
            prompt_tokens=transcript.usage.prompt_tokens,
            completion_tokens=transcript.usage.completion_tokens,
            created_at=job.created_at,
            finished_at=now,
            session_id=job.session_id,
            messages=[*job.body["messages"], transcript.message()],
            finish_reason=transcript.finish_reason,
        )
