"""Whose job is started next: fair turns between keys, by tokens.

Each key has an account of the tokens it was given, divided by its weight; who has had the least goes next. A key that
comes back starts level with the least of those who wait, so that nobody saves up turns, and nobody pays for having been
alone: the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024). What a job
costs is known at its end. Half of what the key's jobs usually cost is charged when it starts, so that nobody gets many
at once for nothing, and the rest at the end; nothing is given back. As no account ever falls, nobody is overtaken by
the same key twice: a newcomer's job is among the next two that are started, however many of another key wait.
Knows no jobs, no lanes and no time.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MAX_IDLE_KEYS = 1024
"""Accounts kept of keys that have nothing waiting; past it they are forgiven."""


@dataclass(slots=True)
class _Account(Generic[T]):
    """`had`: tokens by weight. `usual`: tokens of a job, 0 for not known. `turn`: which its last one was."""

    weight: int = 1
    had: float = 0.0
    usual: float = 0.0
    turn: int = 0
    waiting: deque[T] = field(default_factory=deque)


class Turns(Generic[T]):
    """Items that wait, by key."""

    def __init__(self) -> None:
        self._accounts: dict[int, _Account[T]] = {}
        self._level = 0.0
        self._usual = 0.0
        self._turn = 0

    def __len__(self) -> int:
        return sum(len(account.waiting) for account in self._accounts.values())

    def add(self, key: int, item: T, weight: int = 1) -> None:
        """Let an item wait. `weight` (from 1) is the key's from now on."""
        account = self._accounts.setdefault(key, _Account())
        if not account.waiting:
            account.had = max(account.had, self._least())
        account.weight = max(weight, 1)
        account.waiting.append(item)

    def pop(self) -> tuple[T, float]:
        """The next item, and the tokens that its key was charged. Raises ValueError where nothing waits."""
        account = min((a for a in self._accounts.values() if a.waiting), key=_had)
        item, charged = account.waiting.popleft(), (account.usual or self._usual) / 2
        self._turn += 1
        self._level, account.turn = account.had, self._turn
        account.had += charged / account.weight
        self._forget_idle()
        return item, charged

    def settle(self, key: int, charged: float, tokens: int) -> None:
        """An item is done with, and cost so many tokens."""
        self._usual = _learn(self._usual, tokens)
        if (account := self._accounts.get(key)) is not None:
            account.had += max(tokens - charged, 0.0) / account.weight
            account.usual = _learn(account.usual, tokens)

    def remove(self, key: int, item: T) -> bool:
        """Whether it waited; it does no longer, and costs nothing."""
        waiting = self._accounts[key].waiting if key in self._accounts else ()
        for index, other in enumerate(waiting):
            if other is item:
                del self._accounts[key].waiting[index]
                return True
        return False

    def clear(self) -> list[T]:
        """All that waited, which does no longer."""
        items = [item for account in self._accounts.values() for item in account.waiting]
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


def _learn(usual: float, tokens: int) -> float:
    return usual + (tokens - usual) / 8 if usual and tokens else usual or float(tokens)
