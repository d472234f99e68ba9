"""
The least-connection scheduler of one upstream.

Invariants, true whenever code outside this module runs:

- strict: `pod.leases <= pod.limit` for every lease granted since the limit was
  last changed, and likewise per route;
- work-conserving: while nothing is being dispatched, no ticket waits for which
  a pod that it may use has room;
- in order: of the tickets that could go, the one that arrived first goes first;
- a pod that is held back, for whatever reason, gets nothing new;
- a lease is released exactly once, and a pod is forgotten only when it is
  neither known to discovery nor holds a lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from heapq import heapify, heappop, heapreplace

from twisted.internet.defer import Deferred

from strictproxy.errors import (
    LeaseReleasedTwice,
    LineFull,
    NoPods,
    PodsExhausted,
    WaitedTooLong,
)
from strictproxy.scheduling.leases import Lease, PodState, SchedulerState
from strictproxy.scheduling.line import Line, LineKey, Ticket
from strictproxy.scheduling.pods import Address, Hold, LeastHeap, Pod

#: Pods that refused a request which has just come.
_NOBODY: frozenset[Address] = frozenset()
#: Weight of the newest observation in the mean time a lease is held.
_SMOOTHING = 0.1


class Scheduler:
    """
    Grants leases on the pods of one upstream; see the module's invariants.

    :param limit: leases per pod at most; at least 1.
    :param queue_size: tickets waiting at most; 0 means that nobody may wait.
    :param queue_timeout: seconds a ticket waits at most, or None for ever.
    :param no_pods_timeout: seconds a ticket waits at most while no pod takes requests.
        All three are not about patient tickets, whose owners bound them.
    :param now: the current time.
    """

    def __init__(
        self,
        limit: int,
        *,
        queue_size: int,
        queue_timeout: float | None,
        no_pods_timeout: float,
        now: float,
        pod_limits: Mapping[Address, int] | None = None,
    ) -> None:
        self.queue_size = queue_size
        self.queue_timeout = queue_timeout
        self.no_pods_timeout = no_pods_timeout
        #: that no pod takes requests is somebody's wish; nobody is turned away for it
        self.paused = False
        self.waiting = 0
        #: those of them that are patient
        self.patient = 0
        self.running = 0
        #: mean seconds that a lease is held, or None before the first release
        self.mean_service: float | None = None
        self._limit = limit
        self._pod_limits = dict(pod_limits or {})
        self._pods: dict[Address, Pod] = {}
        self._holds: dict[Address, Hold] = {}
        #: how many pods take requests
        self._open_pods = 0
        self._no_pods_since = now
        self._ordinal = 0
        self._route_limits: dict[str, int] = {}
        self._least = LeastHeap(lambda pod: pod.open and pod.leases < pod.limit)
        self._route_least: dict[str, LeastHeap] = {}
        self._lines: dict[LineKey, Line] = {}
        #: lines whose tickets may go to a few pods only, by pod
        self._pinned: dict[Address, dict[LineKey, Line]] = {}
        #: the other lines
        self._open: dict[LineKey, Line] = {}
        self._dispatching = False
        self._restart = False

    # -- taking and giving back

    def acquire(
        self,
        route: str,
        now: float,
        allowed: frozenset[Address] | None = None,
        owner: object = None,
        patient: bool = False,
    ) -> Lease | Deferred[Lease]:
        """
        Take a slot on the pod with the fewest leases, or wait for one.

        :return: the lease if a pod has room, else a Deferred of it. Cancelling
            the Deferred withdraws the request from the line. It fails with
            `WaitedTooLong` or `NoPods`, from `expire`.
        :raise LineFull: nobody else may wait.
        """
        self._ordinal += 1
        ticket = Ticket(route, self._ordinal, now, allowed, _NOBODY, owner, patient)
        # While leases are being handed out, those who wait come first.
        if not self._dispatching:
            pod = self._least_for(route, allowed, ticket.excluded)
            if pod is not None:
                return self._take(pod, ticket, now)
        if not patient and self.waiting - self.patient >= self.queue_size:
            raise LineFull(self.queue_size)
        self._restart = self._dispatching
        return self._wait(ticket)

    def move(self, lease: Lease, now: float) -> Deferred[Lease]:
        """
        Give up `lease`, whose pod refused the request, for one on another pod.

        The request keeps its place by arrival, so it is first to get the next
        free slot; it is never sent to a pod that refused it before.

        :return: fails with `PodsExhausted` too, if every pod left has refused it.
        :raise PodsExhausted: every pod it may use has refused it. The lease is
            released all the same.
        """
        ticket = lease.ticket
        excluded = ticket.excluded | {lease.address}
        moved = replace(ticket, excluded=excluded)
        try:
            if self._is_exhausted(moved.allowed, excluded):
                raise PodsExhausted(len(excluded))
            waiting = self._wait(moved)
        finally:
            # It stands in the line before its slot is free, so whoever waits
            # for that slot and whoever is first for another are both served.
            self._give(lease)
            self._dispatch(list(self._lines.values()), now)
        return waiting

    def release(self, lease: Lease, now: float) -> None:
        """
        End `lease`; if somebody waits for its slot, they have it when this returns.

        :raise LeaseReleasedTwice: it has ended before.
        """
        self._give(lease)
        held = now - lease.granted
        mean = self.mean_service
        self.mean_service = held if mean is None else mean + _SMOOTHING * (held - mean)
        if self.waiting:
            self._dispatch(self._lines_for(lease.pod.address), now)

    def adopt(self, route: str, address: Address, now: float, owner: object) -> Lease:
        """
        Take a slot that is known to be in use already, as by a task before a restart.

        The pod need not be known, and may have more leases than its limit then.
        """
        pod = self._pods.get(address)
        if pod is None:
            pod = self._pods[address] = Pod(address, self._limit_of(address), self._tick())
            pod.known = pod.open = False
        return self._take(pod, Ticket(route, self._tick(), now, owner=owner), now)

    # -- what may change while requests run

    def set_pods(self, addresses: Iterable[Address], now: float) -> None:
        """Replace the set of pods. Those that left keep their count until it is zero."""
        wanted = dict.fromkeys(addresses)
        for address in wanted:
            pod = self._pods.get(address)
            if pod is None:
                self._pods[address] = Pod(address, self._limit_of(address), self._tick())
            else:
                pod.known = True
        for pod in list(self._pods.values()):
            if pod.address not in wanted:
                pod.known = False
                self._forget_if_done(pod)
        self._reopen(now)

    def set_holds(self, holds: Mapping[Address, Hold], now: float) -> None:
        """
        Replace what holds pods back: those named get nothing new, and finish what they have.

        Pods that discovery does not know yet may be named; they will be held back at once.
        """
        self._holds = dict(holds)
        self._reopen(now)

    def set_limit(
        self,
        limit: int,
        now: float,
        pod_limits: Mapping[Address, int] | None = None,
        holds: Mapping[Address, Hold] | None = None,
    ) -> None:
        """
        Change the limit; a lowered one is reached as leases end.

        :param holds: what holds pods back from now on, if that changes too: in
            between, nothing is given to a pod that has the one and not the other.
        """
        self._limit = limit
        self._pod_limits = dict(pod_limits or {})
        for pod in self._pods.values():
            pod.limit = self._limit_of(pod.address)
        if holds is not None:
            self._holds = dict(holds)
        self._reopen(now)

    def set_route_limit(self, route: str, limit: int | None, now: float) -> None:
        """Limit `route` to so many leases per pod, besides the pod's own limit; None lifts it."""
        if limit is None:
            self._route_limits.pop(route, None)
            self._route_least.pop(route, None)
        else:
            self._route_limits[route] = limit
            heap = self._route_least[route] = LeastHeap(self._room_on_route(route))
            heap.rebuild(self._pods.values())
        self._dispatch(list(self._lines.values()), now)

    # -- time

    def expire(self, now: float) -> None:
        """Turn away every ticket whose deadline is at or before `now`."""

        def is_due(ticket: Ticket) -> bool:
            deadline = self._deadline(ticket)
            return deadline is not None and deadline <= now

        def error(ticket: Ticket) -> Exception:
            too_long = self._open_pods or self.paused
            return WaitedTooLong(now - ticket.arrived) if too_long else NoPods()

        for line in list(self._lines.values()):
            self._turn_away(line, error, is_due)

    def next_deadline(self) -> float | None:
        """When `expire` has to be called next, or None if nothing waits with a bound."""
        deadlines = (self._deadline(line.head) for line in self._lines.values())
        return min((when for when in deadlines if when is not None), default=None)

    def retry_after(self) -> float:
        """Seconds after which a slot will likely be free for one who comes now."""
        seconds = self.turn_after(self.waiting + 1)
        return 1.0 if seconds is None else max(1.0, seconds)

    def turn_after(self, place: int) -> float | None:
        """Seconds after which it will likely be the turn of that place; None if nobody knows."""
        slots = sum(pod.limit for pod in self._pods.values() if pod.open)
        if not slots or self.mean_service is None:
            return None
        return self.mean_service * place / slots

    # -- looking in

    def state(self) -> SchedulerState:
        """Return a snapshot; it shares nothing with the scheduler."""
        pods = tuple(
            PodState(pod.address, pod.leases, pod.limit, pod.known, pod.hold)
            for pod in self._pods.values()
        )
        slots = sum(pod.limit for pod in self._pods.values() if pod.open)
        return SchedulerState(pods, self.waiting, self.running, slots)

    def heads(self) -> Iterator[Ticket]:
        """The first of each group of requests that may use the same pods."""
        return (line.head for line in self._lines.values())

    def everybody(self) -> Iterator[Ticket]:
        """Everybody who waits, in no order."""
        for line in self._lines.values():
            yield from line.tickets()

    def tickets(self) -> list[Ticket]:
        """Everybody who waits, in order of arrival. O(n log n): for people, not per request."""
        return sorted(self.everybody(), key=lambda ticket: ticket.ordinal)

    def leases_on(self, address: Address) -> list[Lease]:
        """Return the leases held on a pod, the oldest first."""
        pod = self._pods.get(address)
        return [] if pod is None else list(pod.held)

    # -- inside: counting

    def _tick(self) -> int:
        self._ordinal += 1
        return self._ordinal

    def _limit_of(self, address: Address) -> int:
        return self._pod_limits.get(address, self._limit)

    def _take(self, pod: Pod, ticket: Ticket, now: float) -> Lease:
        pod.leases += 1
        pod.since = self._tick()
        route = ticket.route
        pod.route_leases[route] = pod.route_leases.get(route, 0) + 1
        self.running += 1
        lease = Lease(pod, ticket, now)
        pod.held[lease] = None
        return lease

    def _give(self, lease: Lease) -> None:
        if not lease.active:
            raise LeaseReleasedTwice(str(lease.address))
        lease.active = False
        pod = lease.pod
        pod.leases -= 1
        del pod.held[lease]
        pod.since = self._tick()
        pod.route_leases[lease.ticket.route] -= 1
        self.running -= 1
        self._forget_if_done(pod)
        self._least.offer(pod)
        for heap in self._route_least.values():
            heap.offer(pod)

    def _forget_if_done(self, pod: Pod) -> None:
        if not pod.known and not pod.leases:
            self._pods.pop(pod.address, None)

    def _room_on_route(self, route: str) -> Callable[[Pod], bool]:
        def has_room(pod: Pod) -> bool:
            return pod.has_room and pod.route_leases.get(route, 0) < self._route_limits[route]

        return has_room

    def _reopen(self, now: float) -> None:
        """Find out anew which pods take requests, and use them."""
        before, self._open_pods = self._open_pods, 0
        for pod in self._pods.values():
            pod.hold = self._holds.get(pod.address)
            pod.open = pod.known and pod.hold is None
            self._open_pods += pod.open
        if before and not self._open_pods:
            self._no_pods_since = now
        self._rebuild()
        self._dispatch(list(self._lines.values()), now)
        # Nobody waits for pods that are gone or have refused it.
        for line in list(self._lines.values()):
            _, allowed, excluded, _ = line.key
            if line and self._is_exhausted(allowed, excluded):
                self._turn_away(line, lambda ticket: PodsExhausted(len(ticket.excluded)))

    def _is_exhausted(
        self, allowed: frozenset[Address] | None, excluded: frozenset[Address]
    ) -> bool:
        """Whether every pod that takes requests, and may be used, has refused this one."""
        if not excluded:
            return False
        usable = [
            address
            for address, pod in self._pods.items()
            if pod.open and (allowed is None or address in allowed)
        ]
        return bool(usable) and excluded.issuperset(usable)

    def _turn_away(
        self,
        line: Line,
        error: Callable[[Ticket], Exception],
        until: Callable[[Ticket], bool] = lambda _: True,
    ) -> None:
        """Fail those at the head of a line as long as `until` holds for them."""
        while line and until(line.head):
            ticket = line.head
            self._count(ticket.key, -1)
            line.turn_away(error(ticket))
        self._drop_if_empty(line)

    def _rebuild(self) -> None:
        pods = self._pods.values()
        self._least.rebuild(pods)
        for heap in self._route_least.values():
            heap.rebuild(pods)

    # -- inside: choosing

    def _least_for(
        self, route: str, allowed: frozenset[Address] | None, excluded: frozenset[Address]
    ) -> Pod | None:
        if allowed is not None:
            limit = self._route_limits.get(route)
            candidates = (self._pods.get(address) for address in allowed - excluded)
            fit = (
                pod
                for pod in candidates
                if pod is not None
                and pod.has_room
                and (limit is None or pod.route_leases.get(route, 0) < limit)
            )
            return min(fit, key=lambda pod: pod.preference, default=None)
        return self._route_least.get(route, self._least).least(excluded)

    # -- inside: waiting

    def _wait(self, ticket: Ticket) -> Deferred[Lease]:
        key = ticket.key
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(key, self._withdrawn)
            for index in self._indexes(key):
                index[key] = line
        self._count(key, +1)
        return line.join(ticket)

    def _count(self, key: LineKey, change: int) -> None:
        self.waiting += change
        if key[3]:
            self.patient += change

    def _withdrawn(self, line: Line) -> None:
        self._count(line.key, -1)
        self._drop_if_empty(line)

    def _drop_if_empty(self, line: Line) -> None:
        # Another line may have been opened under the same key since.
        if not line and self._lines.get(line.key) is line:
            del self._lines[line.key]
            for index in self._indexes(line.key):
                del index[line.key]
            for address in line.key[1] or ():
                if not self._pinned[address]:
                    del self._pinned[address]

    def _indexes(self, key: LineKey) -> Iterator[dict[LineKey, Line]]:
        allowed = key[1]
        if allowed is None:
            yield self._open
        else:
            for address in allowed:
                yield self._pinned.setdefault(address, {})

    def _lines_for(self, address: Address) -> list[Line]:
        """Return the lines that a slot freed at `address` could serve."""
        return [*self._open.values(), *self._pinned.get(address, {}).values()]

    def _deadline(self, ticket: Ticket) -> float | None:
        if ticket.patient:
            return None
        when = None if self.queue_timeout is None else ticket.arrived + self.queue_timeout
        if not self._open_pods and not self.paused:
            no_pods = max(ticket.arrived, self._no_pods_since) + self.no_pods_timeout
            when = no_pods if when is None else min(when, no_pods)
        return when

    def _dispatch(self, lines: list[Line], now: float) -> None:
        """
        Hand free slots to those who wait in `lines`, the earliest arrival first.

        Handing out a lease runs its owner's code, which may release, withdraw
        or acquire; such calls are not nested but make the loop start over with
        every line, so that the order holds and the stack stays flat.
        """
        if self._dispatching:
            self._restart = True
            return
        self._dispatching = True
        try:
            heads = _by_arrival(lines)
            while heads:
                ordinal, line = heads[0]
                if not line:
                    heappop(heads)
                    continue
                ticket = line.head
                if ticket.ordinal != ordinal:
                    heapreplace(heads, (ticket.ordinal, line))
                    continue
                pod = self._least_for(*line.key[:3])
                if pod is None:
                    heappop(heads)
                    continue
                self._count(line.key, -1)
                line.put(self._take(pod, ticket, now))
                self._drop_if_empty(line)
                if self._restart:
                    self._restart = False
                    heads = _by_arrival(list(self._lines.values()))
        finally:
            self._dispatching = False
            self._restart = False


def _by_arrival(lines: list[Line]) -> list[tuple[int, Line]]:
    heads = [(line.head.ordinal, line) for line in lines if line]
    heapify(heads)
    return heads
