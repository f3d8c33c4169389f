"""Whose job is started next: fair turns between keys, by tokens.

Each key has an account of the tokens it was given, divided by its weight; who has had the least goes next. A key that
comes back starts level with the least of those who wait, so that nobody saves up turns, and nobody pays for having been
alone. Therefore a newcomer's job is among the next two that are started, however many jobs of other keys wait: the
virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), charged beforehand with
what is expected and put right afterwards. Knows no jobs, no lanes and no time.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MAX_IDLE_KEYS = 1024
"""Accounts kept of keys that have nothing waiting; past it they are forgiven."""

FIRST_GUESS = 256
"""Tokens of an answer, before any has been counted."""
BYTES_PER_TOKEN = 4
"""Of a request, about, for English text."""


@dataclass(slots=True)
class _Account(Generic[T]):
    """`had`: tokens by weight. `turn`: which its last one was. `waiting`: (expected tokens, item), in their order."""

    weight: int = 1
    had: float = 0.0
    turn: int = 0
    waiting: deque[tuple[int, T]] = field(default_factory=deque)


class Turns(Generic[T]):
    """Items that wait, by key."""

    def __init__(self) -> None:
        self._accounts: dict[int, _Account[T]] = {}
        self._level = 0.0
        self._turn = 0

    def __len__(self) -> int:
        return sum(len(account.waiting) for account in self._accounts.values())

    def add(self, key: int, item: T, tokens: int, weight: int = 1) -> None:
        """Let an item wait that is expected to cost so many tokens. `weight` (from 1) holds for the key from now on."""
        account = self._accounts.setdefault(key, _Account())
        if not account.waiting:
            account.had = max(account.had, self._least())
        account.weight = max(weight, 1)
        account.waiting.append((tokens, item))

    def pop(self) -> T:
        """The next item; its key is charged. Raises ValueError where nothing waits."""
        account = min((a for a in self._accounts.values() if a.waiting), key=_had)
        tokens, item = account.waiting.popleft()
        self._turn += 1
        self._level, account.turn = account.had, self._turn
        account.had += tokens / account.weight
        self._forget_idle()
        return item

    def charge(self, key: int, tokens: int) -> None:
        """An item cost so many more tokens than expected, or fewer."""
        if (account := self._accounts.get(key)) is not None:
            account.had += tokens / account.weight

    def remove(self, key: int, item: T) -> bool:
        """Whether it waited; it does no longer, and costs nothing."""
        account = self._accounts.get(key)
        for index, (_, waiting) in enumerate(account.waiting if account is not None else ()):
            if waiting is item:
                assert account is not None
                del account.waiting[index]
                return True
        return False

    def clear(self) -> list[T]:
        """All that waited, which does no longer."""
        items = [item for account in self._accounts.values() for _, item in account.waiting]
        for account in self._accounts.values():
            account.waiting.clear()
        return items

    def _least(self) -> float:
        """What the one who goes next has had; if nobody waits, what the last one had before its turn."""
        return min((account.had for account in self._accounts.values() if account.waiting), default=self._level)

    def _forget_idle(self) -> None:
        if len(self._accounts) > MAX_IDLE_KEYS:
            self._accounts = {key: account for key, account in self._accounts.items() if account.waiting}


def _had(account: _Account[Any]) -> tuple[float, int]:
    """Of two that have had as much, the one goes first that waits longer for a turn."""
    return account.had, account.turn


class Expectation:
    """What a job will cost, from its size, what it asks for at the most, and what answers have cost lately."""

    def __init__(self) -> None:
        self._answer = float(FIRST_GUESS)

    def tokens(self, api: str, body: Mapping[str, Any], size: int) -> int:
        """Prompt and answer. `size`: bytes of the request."""
        prompt = size // BYTES_PER_TOKEN
        if api in ("embeddings", "count_tokens"):
            return prompt
        most = [body.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        answer = min([self._answer, *(float(limit) for limit in most if isinstance(limit, int))])
        answers = body.get("n")
        return prompt + int(answer) * (answers if isinstance(answers, int) and answers > 0 else 1)

    def learn(self, completion_tokens: int) -> None:
        """An answer had so many."""
        self._answer += (completion_tokens - self._answer) / 16
