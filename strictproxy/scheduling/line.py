"""
The line: requests waiting for a slot, in order of arrival.

Owns the order and nothing else. A `Line` holds the waiters that may go to the
same pods for the same route; the scheduler keeps one per such group and
compares their heads, so that a group that cannot move never blocks another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from twisted.internet.defer import Deferred, DeferredQueue

from strictproxy.scheduling.pods import Address

if TYPE_CHECKING:
    from strictproxy.scheduling.leases import Lease


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place: what it needs, and when it came."""

    #: name of the route it came by; route limits and order are kept per route
    route: str
    #: ordinal of arrival; kept when the request moves to another pod
    ordinal: int
    #: time of arrival, seconds
    arrived: float
    #: the only pods it may go to, or None for any (a custom router's answer)
    allowed: frozenset[Address] | None = None
    #: pods that refused it
    excluded: frozenset[Address] = frozenset()
    #: whatever the owner wants to find again in a snapshot
    owner: object = None
    #: nobody sits and waits for it: it has no bound, and takes nobody's place in the queue
    patient: bool = False

    @property
    def key(self) -> LineKey:
        """What those have in common who wait in the same line."""
        return self.route, self.allowed, self.excluded, self.patient


#: route, allowed, excluded, patient
LineKey = tuple[str, frozenset[Address] | None, frozenset[Address], bool]


class _Waiters:
    """
    The part of `list` that `DeferredQueue` uses of its `waiting`, with O(1) withdrawal.

    The stock list makes each `pop(0)` and each cancellation linear: withdrawing
    10,000 of 20,000 waiters takes a second.
    """

    def __init__(self, withdrawn: Callable[[], None]) -> None:
        self._tickets: OrderedDict[Deferred[Lease], Ticket] = OrderedDict()
        self._withdrawn = withdrawn

    def __len__(self) -> int:
        return len(self._tickets)

    def head(self) -> Ticket:
        return next(iter(self._tickets.values()))

    def tickets(self) -> Iterator[Ticket]:
        return iter(self._tickets.values())

    def append(self, waiter: Deferred[Lease]) -> None:
        # Line.join() puts the ticket in at once; the queue only knows waiters.
        self._tickets[waiter] = cast(Ticket, None)

    def place(self, waiter: Deferred[Lease], ticket: Ticket) -> None:
        """Give the waiter appended last its ticket, and its place by order of arrival."""
        behind: list[tuple[Deferred[Lease], Ticket]] = []
        del self._tickets[waiter]
        # A request that was refused by a pod joins a line whose members were
        # refused a moment before or after it: few have to step back.
        while self._tickets:
            last = next(reversed(self._tickets))
            if self._tickets[last].ordinal < ticket.ordinal:
                break
            behind.append((last, self._tickets.pop(last)))
        self._tickets[waiter] = ticket
        self._tickets.update(reversed(behind))

    def pop(self, _index: int) -> Deferred[Lease]:
        return self._tickets.popitem(last=False)[0]

    def remove(self, waiter: Deferred[Lease]) -> None:
        del self._tickets[waiter]
        self._withdrawn()


class Line(DeferredQueue["Lease"]):
    """
    A DeferredQueue whose getters are waiting requests and whose items are leases.

    `put` is called only while somebody waits (`size=0` makes anything else an
    error), so a lease can never lie in the queue unowned. Cancelling the
    Deferred returned by `join` withdraws the waiter in O(1).
    """

    def __init__(self, key: LineKey, withdrawn: Callable[[Line], None]) -> None:
        super().__init__(size=0)
        self.key = key
        self._waiters = _Waiters(lambda: withdrawn(self))
        self.waiting = cast("list[Deferred[Lease]]", self._waiters)

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def head(self) -> Ticket:
        """The ticket that is next. The line must not be empty."""
        return self._waiters.head()

    def tickets(self) -> Iterator[Ticket]:
        """Every waiting ticket, the next one first."""
        return self._waiters.tickets()

    def join(self, ticket: Ticket) -> Deferred[Lease]:
        """Wait; the result is the lease. `ticket` takes its place by order of arrival."""
        waiter = self.get()
        self._waiters.place(waiter, ticket)
        return waiter

    def turn_away(self, error: Exception) -> None:
        """Fail the waiter at the head with `error`."""
        self._waiters.pop(0).errback(error)
