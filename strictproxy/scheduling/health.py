"""
Which pods are trusted with requests, and with how many. Pure: events and time are passed in.

A pod that fails is put aside for a time that doubles with each failure in a
row, up to a bound. Then it is on trial: one request at a time, and the first
that succeeds brings it back. So a dead pod costs one failure a trial. At most a
share of the pods is aside at once, and never the last one: where everything
fails, the pods are not the problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import ceil

from strictproxy.scheduling.pods import Address


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """When pods are put aside, and for how long; durations in seconds."""

    #: failures in a row; a failed connection counts for all of them
    failures: int = 3
    #: first time aside
    aside: float = 5.0
    #: longest time aside
    max_aside: float = 120.0
    #: part of the pods that may be aside at once
    max_share: float = 0.5
    #: a new pod's limit grows from one to the whole in so long; 0 is at once
    slow_start: float = 0.0


class Standing(Enum):
    """How far a pod is trusted."""

    HEALTHY = "healthy"
    #: one request at a time
    TRIAL = "trial"
    #: none
    ASIDE = "aside"


@dataclass(slots=True)
class Record:
    """What is known about one pod."""

    #: when it came
    since: float
    standing: Standing = Standing.HEALTHY
    #: failures in a row
    failures: int = 0
    #: times put aside in a row
    strikes: int = 0
    #: end of its time aside
    until: float = 0.0
    #: the last thing that went wrong, and when
    error: str | None = None
    failed_at: float | None = None
    #: a connection alone proves that it is back
    unreachable: bool = False
    #: active checks say that it is down; nothing but a check brings it back
    checked_down: bool = False


class Health:
    """
    The records of an upstream's pods.

    Methods that take an event return whether anybody's standing has changed.
    """

    def __init__(self, policy: HealthPolicy) -> None:
        self.policy = policy
        self._records: dict[Address, Record] = {}
        #: pods that a success would change something for
        self._troubled: set[Address] = set()

    # -- events

    def set_pods(self, addresses: Iterable[Address], now: float, *, first: bool = False) -> None:
        """
        Replace the pods: those that left are forgotten, so that an address used again starts clean.

        :param first: they did not just start; we did, so there is no slow start.
        """
        since = float("-inf") if first else now
        self._records = {
            address: self._records.get(address) or Record(since) for address in addresses
        }
        self._troubled &= self._records.keys()
        if all(record.standing is Standing.ASIDE for record in self._records.values()):
            # Those that were healthy have left: the others are all there is.
            for record in self._records.values():
                record.standing = Standing.TRIAL

    def unreachable(self, address: Address, now: float, error: str) -> bool:
        """Note that a connection could not be made."""
        record = self._note(address, now, error)
        if record is None or record.standing is Standing.ASIDE:
            return False
        record.failures = max(record.failures + 1, self.policy.failures)
        record.unreachable = True
        return self._put_aside(record, now)

    def failed(self, address: Address, now: float, error: str) -> bool:
        """Note that a request failed on a pod that could be reached."""
        record = self._note(address, now, error)
        if record is None or record.standing is Standing.ASIDE:
            return False
        record.failures += 1
        record.unreachable = False
        if record.failures < self.policy.failures and record.standing is Standing.HEALTHY:
            return False
        return self._put_aside(record, now)

    def reached(self, address: Address) -> bool:
        """Note that a connection was made: enough for a pod that was aside for want of one."""
        if address not in self._troubled or not self._records[address].unreachable:
            return False
        return self.succeeded(address)

    def succeeded(self, address: Address) -> bool:
        """Note that a request succeeded. Cheap where nothing was wrong."""
        if address not in self._troubled:
            return False
        record = self._records[address]
        if record.checked_down or record.standing is Standing.ASIDE:
            return False  # an answer to something sent before
        return self._recover(address, record)

    def check_failed(self, address: Address, now: float, error: str) -> bool:
        """Note that active checks took a pod for down."""
        record = self._note(address, now, error)
        if record is None:
            return False
        record.checked_down = True
        if record.standing is Standing.ASIDE:
            return False
        return self._put_aside(record, now)

    def check_passed(self, address: Address) -> bool:
        """Note that active checks took a pod for up again: it need not be tried."""
        record = self._records.get(address)
        if record is None or not record.checked_down:
            return False
        return self._recover(address, record)

    def unchecked(self, now: float) -> None:
        """Note that nobody checks any more: pods that checks took for down are tried now."""
        for record in self._records.values():
            if record.checked_down:
                record.checked_down = False
                record.until = now

    def advance(self, now: float) -> bool:
        """Put on trial those whose time aside is over."""
        changed = False
        for address in self._troubled:
            record = self._records[address]
            over = record.standing is Standing.ASIDE and record.until <= now
            if over and not record.checked_down:
                record.standing = Standing.TRIAL
                changed = True
        return changed

    # -- what follows from them

    def next_change(self, now: float) -> float | None:
        """When `advance`, or a look at `limit`, may tell something new; None is never."""
        times = [
            record.until
            for record in map(self._records.__getitem__, self._troubled)
            if record.standing is Standing.ASIDE and not record.checked_down
        ]
        if self.policy.slow_start:
            starting = [r for r in self._records.values() if now < r.since + self.policy.slow_start]
            if starting:
                # A tenth at a time is smooth enough.
                times.append(now + self.policy.slow_start / 10)
        return min(times, default=None)

    def is_aside(self, address: Address) -> bool:
        """Whether a pod gets nothing."""
        record = self._records.get(address)
        return record is not None and record.standing is Standing.ASIDE

    def limit(self, address: Address, full: int, now: float) -> int:
        """Return how many requests a pod may have, of the `full` number."""
        record = self._records.get(address)
        if record is None:
            return full
        if record.standing is Standing.TRIAL:
            return 1
        age, slow_start = now - record.since, self.policy.slow_start
        if age >= slow_start:
            return full
        return max(1, min(full, ceil(full * age / slow_start)))

    def record(self, address: Address) -> Record | None:
        """Return what is known about a pod; to be read only."""
        return self._records.get(address)

    # -- inside

    def _note(self, address: Address, now: float, error: str) -> Record | None:
        record = self._records.get(address)
        if record is not None:
            record.error, record.failed_at = error, now
            self._troubled.add(address)
        return record

    def _put_aside(self, record: Record, now: float) -> bool:
        aside = sum(r.standing is Standing.ASIDE for r in self._records.values())
        most = min(int(len(self._records) * self.policy.max_share), len(self._records) - 1)
        if aside >= most:
            return False
        wait = min(self.policy.aside * 2.0 ** min(record.strikes, 30), self.policy.max_aside)
        record.strikes += 1
        record.until = now + wait
        record.standing = Standing.ASIDE
        return True

    def _recover(self, address: Address, record: Record) -> bool:
        changed = record.standing is not Standing.HEALTHY
        record.standing = Standing.HEALTHY
        record.failures = record.strikes = 0
        record.unreachable = record.checked_down = False
        self._troubled.discard(address)
        return changed
