"""
Many time-outs of the same length, without a timer each.

Things that all wait equally long expire in the order in which they began to
wait; so a list in that order is enough, and only its front is ever looked at.
Pure: time is passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class Timeouts(Generic[T]):
    """
    Members that expire `seconds` after they were last started; None means never.

    Starting and stopping are O(1).
    """

    __slots__ = ("_started", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._started: OrderedDict[T, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._started)

    def start(self, member: T, now: float) -> None:
        """Let `member` expire `seconds` from now, whenever it was started before."""
        if self.seconds is not None:
            self._started[member] = now
            self._started.move_to_end(member)

    def stop(self, member: T) -> None:
        """Let `member` not expire; it need not have been started."""
        self._started.pop(member, None)

    def expire(self, now: float) -> list[T]:
        """Remove and return the members whose time is over."""
        expired: list[T] = []
        if self.seconds is None:
            return expired
        limit = now - self.seconds
        while self._started:
            member, started = next(iter(self._started.items()))
            if started > limit:
                break
            self._started.popitem(last=False)
            expired.append(member)
        return expired

    def take_all(self) -> list[T]:
        """Remove and return every member, the one nearest to its end first."""
        members = list(self._started)
        self._started.clear()
        return members
