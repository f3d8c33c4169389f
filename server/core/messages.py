"""The messages between server, workers and archivist, and their encodings.

What arrives is held to these types, whoever sent it: `decode` lets nothing else in.
Durable messages (jobs, history) and the small fanouts are JSON, so that `dead.v2` can be read by a person.
Frames live for milliseconds and carry text chunks and vectors as they are: those are MessagePack.
A field may be added with a default; none is renamed or removed while an older process may still run.
"""

import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+\Z")]
"""Of a request, a session, a worker. It becomes a routing key, a property or a log line, so that it holds nothing else
and fits: what is too long for the broker is found out by the connection, with all that others have on it."""

Text = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^[^\x00]*\Z")]
"""Short text that Postgres takes."""

Reference = Annotated[str, msgspec.Meta(max_length=128, pattern=r"^([\x21-\x7e]+)?\Z")]
"""A name, or nothing."""

ReplyTo = Annotated[str, msgspec.Meta(max_length=128, pattern=r"^replies\.[A-Za-z0-9._-]+\Z")]
"""Nothing but a reply queue: answers sent to another would be jobs, records or dead letters there."""

KeyId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]

Moment = Annotated[float, msgspec.Meta(ge=0, le=4102444800)]
"""Unix seconds until 2100: Postgres takes dates that nobody can read back."""

Deadline = Annotated[float, msgspec.Meta(ge=0)]
"""Unix seconds; workers bound it by what a request may take at all."""

Lane = Literal["interactive", "batch"]
WorkerType = Literal["chat", "embedding", "archive"]
FrameKind = Literal["started", "chunk", "usage", "result", "error", "done"]
Api = Literal["chat", "completions", "responses", "messages", "count_tokens", "embeddings"]


@dataclass(frozen=True, slots=True)
class Job:
    """One request on its way to a worker.

    `body` has the shape of `api`: OpenAI's chat, completions, responses or embeddings, Anthropic's messages or
    count_tokens. `context` is put before the last question when it is asked, and is no part of what was said.
    `created_at` and `deadline` are in Unix seconds: a job past its deadline is dropped, never generated.
    `recorded` is false for the service's own work (vectors of chats, queries of `/chat/similar`), which is
    neither history nor usage. `lane` is that of the queue a worker took it from. `weight` is the key's share of turns.
    `traceparent`: of the span that published it; until then, and where nothing is traced, of the request's.
    """

    id: Name
    model: Name
    endpoint: Text
    body: dict[str, Any]
    key_id: KeyId
    reply_to: ReplyTo
    created_at: Moment
    deadline: Deadline
    session_id: Reference = ""
    recorded: bool = True
    traceparent: Text = ""
    api: Api = "chat"
    context: str = ""
    lane: Lane = "interactive"
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Frame:
    """A piece of an answer. `run` names the attempt that made it and `seq` counts its frames from 0, so that
    a lost frame, or a second worker's answer to the same job, is noticed. `elapsed_s` is how long the worker has
    had the job. `data` by kind:

    started  the worker's name: it took the job from its queue
    chunk    the JSON of one streamed chunk; of `messages` and `responses` an event: its name, a line break, its JSON
    usage    the JSON of the last chunk, which counts the tokens and carries no choice
    result   the JSON of the whole answer (`embeddings` carries an `EmbeddingResult`)
    error    an `ErrorFrame`
    done     empty: the stream is complete
    """

    request_id: str
    run: str
    seq: int
    kind: FrameKind
    data: bytes = b""
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ErrorFrame:
    status: int
    message: str
    param: str | None = None
    code: str = ""


@dataclass(frozen=True, slots=True)
class EmbeddingResult:
    """`vectors`: float32 little-endian, (n_texts, dimensions), L2-normalised, row after row."""

    model: str
    dimensions: int
    prompt_tokens: int
    vectors: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """A finished request, to be kept: a chat with its messages, or an embedding request's usage.

    `created_at` and `finished_at` are in Unix seconds. `traceparent`: of the span that published it.
    """

    request_id: Name
    type: Literal["chat", "embedding"]
    key_id: KeyId
    model: Name
    endpoint: Text
    prompt_tokens: Count
    completion_tokens: Count
    created_at: Moment
    finished_at: Moment
    session_id: Reference = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: Text = ""
    texts: Count = 0
    traceparent: Text = ""


@dataclass(frozen=True, slots=True)
class Status:
    """A worker's load, sent once a second. `tokens_per_s` covers the second just past;
    `progress_at` (Unix seconds) is when the worker last made a token, a vector or a row. `problem` says why it is not
    ready, where it knows; `leaving` is its last word, after which it is not missed. It runs `slots` jobs at once at the
    most, which have taken `job_s` each of late (0: none has ended). `waiting_batch` of those `waiting` are of the batch
    lane. `begun`: its jobs of late, by reply queue, the older ones counting less."""

    worker: str
    type: WorkerType
    model: str
    ready: bool
    running: int = 0
    waiting: int = 0
    tokens_per_s: float = 0.0
    progress_at: float = 0.0
    metrics_port: int = 0
    backlog: int = 0
    lag_s: float = 0.0
    sent_at: float = field(default_factory=time.time)
    problem: str = ""
    leaving: bool = False
    slots: int = 0
    job_s: float = 0.0
    waiting_batch: int = 0
    begun: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cancel:
    """`unwanted`: the request was refused, or it is over, and what is made of it now belongs to nothing."""

    request_id: Name
    unwanted: bool = False


RequestStatus = Literal["queued", "running", "completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A server asks all servers about a request of this key; the one that has it answers with frames to `reply_to`
    that bear the ask's `id`. By `what`:

    state   one result, a `RequestState`
    cancel  the same, after the request has been stopped
    events  a chunk with the `Head` of a kept answer, a chunk for each event of it beyond `after`, and done; the server
            whose reply queue is `owner` says done at once where it does not have it
    leave   nothing: who asked for events under this `id` is gone
    """

    id: str
    request_id: str
    key_id: int
    reply_to: str
    what: Literal["state", "cancel", "events", "leave"]
    after: int = 0
    owner: str = ""


@dataclass(frozen=True, slots=True)
class RequestState:
    """Where a request stands, as the server that took it knows. Times are in Unix seconds, 0 for not yet."""

    request_id: str
    key_id: int
    status: RequestStatus
    model: str
    endpoint: str
    created_at: float
    finished_at: float = 0.0
    error: ErrorFrame | None = None
    queue_position: int | None = None
    estimated_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """How a kept answer begins: what HTTP says before its body. `keep_alive` is a stream's, empty for none."""

    status: int
    headers: dict[str, str]
    media_type: str
    keep_alive: str


def encode(message: Job | Record | Status | Cancel | ErrorFrame | Ask | RequestState | Head) -> bytes:
    return msgspec.json.encode(message)


def decode(kind: type[T], body: bytes) -> T:
    """Raises msgspec.DecodeError (msgspec.ValidationError among them) for what is not a `kind`, or nests too deep."""
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError as exc:
        raise msgspec.DecodeError("it nests too deep") from exc


_frames = msgspec.msgpack.Decoder(list[Frame])


def encode_frames(frames: list[Frame]) -> bytes:
    return msgspec.msgpack.encode(frames)


def decode_frames(body: bytes) -> list[Frame]:
    return _frames.decode(body)


def encode_embeddings(result: EmbeddingResult) -> bytes:
    return msgspec.msgpack.encode(result)


def decode_embeddings(data: bytes) -> EmbeddingResult:
    return msgspec.msgpack.decode(data, type=EmbeddingResult)


def vectors_of(result: EmbeddingResult) -> NDArray[np.float32]:
    """float32 (n_texts, dimensions), L2-normalised."""
    return np.frombuffer(result.vectors, "<f4").reshape(-1, result.dimensions)
