"""Spans: where a request's time went, across processes. What is told of each stands in spans.py.

While no OTLP endpoint is set nothing of OpenTelemetry is imported, and `begin` gives NOTHING, whose methods do nothing.
From one process to the next a trace goes as W3C's `traceparent`, in the messages' own field. Parents are named, never
found: many requests share a process's tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from server.core.settings import Settings

Kind = Literal["server", "client", "producer", "consumer", "internal"]
Attributes = Mapping[str, str | bool | int | float | Sequence[str]]


class Span:
    """One that does nothing, for where nothing is traced. Used by `with`, it is `current` there, and ends with it."""

    __slots__ = ()

    @property
    def traceparent(self) -> str:
        """What names this span as a parent; empty where nothing is traced."""
        return ""

    @property
    def ids(self) -> dict[str, str]:
        """`trace_id` and `span_id`, for a log line; empty where nothing is traced, or no more."""
        return {}

    def rename(self, name: str) -> None: ...

    def tell(self, attributes: Attributes) -> None: ...

    def event(self, name: str) -> None: ...

    def fail(self, error_type: str) -> None:
        """It did not do what it was for. A name of few, never a message: those quote what was sent."""

    def end(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        return None


NOTHING = Span()


@dataclass(frozen=True, slots=True)
class Start:
    """A span that is to begin. `parent` is a traceparent, empty or wrong for none; so are `links`, to what has its
    share in it and is not its parent. `at_ns` is in Unix nanoseconds, 0 for now."""

    name: str
    kind: Kind
    parent: str
    attributes: Attributes
    at_ns: int = 0
    links: Sequence[str] = ()


_begin: Callable[[Start], Span] | None = None
_current: ContextVar[Span] = ContextVar("span", default=NOTHING)


def start(settings: Settings, process: str) -> None:
    """Trace from now on, where settings say so, as `process`."""
    if settings.traces_endpoint:
        from server.core.otel import exporting

        trace_with(exporting(settings, process))


def trace_with(begin: Callable[[Start], Span] | None) -> None:
    """Have spans begun so; None: have none."""
    global _begin
    _begin = begin


def on() -> bool:
    return _begin is not None


def begin(start: Start) -> Span:
    return NOTHING if _begin is None else _begin(start)


def current() -> Span:
    """The span that whoever asks is part of."""
    return _current.get()


def enter(span: Span) -> Token[Span]:
    return _current.set(span)


def leave(token: Token[Span]) -> None:
    _current.reset(token)
