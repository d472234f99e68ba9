"""
Pods as the scheduler sees them: counts, and who has the fewest.

Owns how many leases each pod holds and in which order pods are preferred.
Never opens a socket, reads a clock or writes a log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from strictproxy.scheduling.leases import Lease


class Address(NamedTuple):
    """Where a pod listens: an IP literal or a host name, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Hold(Enum):
    """Why a pod that discovery knows gets nothing new."""

    #: it is shutting down, says discovery
    TERMINATING = "terminating"
    #: an operator said so
    DRAINED = "drained"
    #: it failed requests, or checks
    UNHEALTHY = "unhealthy"
    #: an operator has paused the whole upstream
    PAUSED = "paused"


class Pod:
    """
    One address and the leases held on it.

    A pod outlives its place in discovery: while `leases` is not zero the
    scheduler keeps it, so an address that goes and comes back comes back with
    its count.
    """

    __slots__ = (
        "address",
        "held",
        "hold",
        "known",
        "leases",
        "limit",
        "open",
        "route_leases",
        "since",
    )

    def __init__(self, address: Address, limit: int, since: int) -> None:
        self.address = address
        self.limit = limit
        #: in the set that discovery published last; others get nothing new
        self.known = True
        self.hold: Hold | None = None
        #: known, and not held back
        self.open = True
        self.leases = 0
        #: the leases themselves, the oldest first
        self.held: dict[Lease, None] = {}
        #: leases per route, kept for the routes that have a limit of their own
        self.route_leases: dict[str, int] = {}
        #: ordinal of the last change of `leases`; the smallest has been idle longest
        self.since = since

    @property
    def has_room(self) -> bool:
        """Whether the pod may take one more request, as far as its own limit goes."""
        return self.open and self.leases < self.limit

    @property
    def preference(self) -> tuple[float, int]:
        """Sorts before another's if this pod is to be chosen: least in use, then longest idle."""
        return (self.leases / self.limit, self.since)

    def __repr__(self) -> str:
        mark = f" {self.hold.value}" if self.hold else ""
        mark = mark if self.known else " gone"
        return f"<Pod {self.address} {self.leases}/{self.limit}{mark}>"


_Entry = tuple[tuple[float, int], Pod]


class LeastHeap:
    """
    Pods that have room, the preferred one first; every operation is O(log n), amortised.

    A heap with lazy correction. Each pod has at most one *live* entry. Taking
    a lease makes that entry too optimistic, which is put right when it
    surfaces; releasing one makes it too pessimistic, so `offer` pushes a new
    live entry and the old one is dropped when it surfaces, or at the next
    compaction.
    """

    def __init__(self, has_room: Callable[[Pod], bool]) -> None:
        self._has_room = has_room
        self._heap: list[_Entry] = []
        self._live: dict[Pod, _Entry] = {}

    def offer(self, pod: Pod) -> None:
        """Note that `pod` may have become more attractive: fewer leases, or newly known."""
        if not self._has_room(pod):
            return
        entry = (pod.preference, pod)
        if self._live.get(pod) == entry:
            return
        self._live[pod] = entry
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = list(self._live.values())
            heapify(self._heap)

    def least(self, excluded: frozenset[Address] = frozenset()) -> Pod | None:
        """Return the pod to choose, without taking anything from it, or None if all are full."""
        aside: list[_Entry] = []
        found: Pod | None = None
        heap, live = self._heap, self._live
        while heap:
            entry = heap[0]
            pod = entry[1]
            if live.get(pod) is not entry:
                heappop(heap)
            elif not self._has_room(pod):
                heappop(heap)
                del live[pod]
            elif entry[0] != pod.preference:
                heappop(heap)
                live[pod] = entry = (pod.preference, pod)
                heappush(heap, entry)
            elif pod.address in excluded:
                aside.append(heappop(heap))
            else:
                found = pod
                break
        for entry in aside:
            heappush(heap, entry)
        return found

    def rebuild(self, pods: Iterable[Pod]) -> None:
        """Start over from `pods`: after limits or the set of pods changed. O(n)."""
        self._live = {pod: (pod.preference, pod) for pod in pods if self._has_room(pod)}
        self._heap = list(self._live.values())
        heapify(self._heap)
