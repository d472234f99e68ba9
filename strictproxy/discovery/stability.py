"""
When a new address set is believed. Pure: answers and time are passed in.

While pods restart, DNS answers flap. So a set that differs from the one in
force is a *candidate* until a number of further lookups, a moment apart, have
all agreed with it. One that does not ends the round, and the next look is
some time later. An answer that could not be had agrees with nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from strictproxy.interfaces import DiscoveryState, Endpoint

Endpoints = frozenset[Endpoint]


class Verdict(Enum):
    """What an answer led to."""

    #: it is what is in force
    SAME = "same"
    #: it differs; a round has begun
    CANDIDATE = "candidate"
    #: it agrees with the candidate, and more must follow
    AGREED = "agreed"
    #: the candidate is in force now
    ACCEPTED = "accepted"
    #: the round is over without result
    REJECTED = "rejected"
    #: there was no answer, and no round to end
    UNKNOWN = "unknown"


class Stability:
    """
    Decides which of the answers to believe.

    :param lookups: how many must agree with a candidate, after the one that
        brought it up.
    """

    def __init__(self, lookups: int) -> None:
        self._lookups = lookups
        self._in_force: Endpoints | None = None
        self._since: float | None = None
        self._candidate: Endpoints | None = None
        self._agreed = 0
        self._rejections = 0
        self._last_error: str | None = None

    @property
    def in_force(self) -> Endpoints | None:
        """The set that is believed, or None before there is one."""
        return self._in_force

    def answer(self, endpoints: Iterable[Endpoint], now: float) -> Verdict:
        """Take an answer; its order and repetitions do not matter."""
        found = frozenset(endpoints)
        if self._candidate is None:
            if found == self._in_force:
                self._last_error = None
                return Verdict.SAME
            self._candidate = found
            self._agreed = 0
            return Verdict.CANDIDATE
        if found != self._candidate:
            return self._reject()
        self._agreed += 1
        if self._agreed < self._lookups:
            return Verdict.AGREED
        self._in_force, self._candidate = found, None
        self._since = now
        self._last_error = None
        return Verdict.ACCEPTED

    def no_answer(self, error: str) -> Verdict:
        """Take note that a lookup failed, so that nothing is known."""
        self._last_error = error
        return Verdict.UNKNOWN if self._candidate is None else self._reject()

    def give_up(self, now: float) -> bool:
        """
        Believe in no pod any more, for want of answers. Returns whether that changes anything.

        The next answer has to be agreed with like any other.
        """
        self._candidate, self._agreed = None, 0
        if not self._in_force:
            return False
        self._in_force, self._since = frozenset(), now
        return True

    def state(self) -> DiscoveryState:
        """Return a snapshot."""
        return DiscoveryState(
            self._in_force,
            self._since,
            self._candidate,
            self._agreed,
            self._rejections,
            self._last_error,
        )

    def _reject(self) -> Verdict:
        self._candidate = None
        self._agreed = 0
        self._rejections += 1
        return Verdict.REJECTED
