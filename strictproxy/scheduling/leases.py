"""One held slot, and how pods and the line look at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from strictproxy.scheduling.line import Ticket
from strictproxy.scheduling.pods import Address, Hold, Pod


class Lease:
    """
    One held slot.

    Whoever got it from `Scheduler.acquire` or `move` owns it and must hand it
    to `release`, or to `move`, exactly once.
    """

    __slots__ = ("active", "granted", "in_flight", "pod", "ticket")

    def __init__(self, pod: Pod, ticket: Ticket, granted: float) -> None:
        self.pod = pod
        self.ticket = ticket
        #: when the slot was taken, seconds
        self.granted = granted
        #: leases on the pod, this one included, when it was granted
        self.in_flight = pod.leases
        self.active = True

    @property
    def address(self) -> Address:
        """The pod to send the request to."""
        return self.pod.address

    @property
    def waited(self) -> float:
        """Seconds between arrival and the grant."""
        return self.granted - self.ticket.arrived

    def __repr__(self) -> str:
        return f"<Lease on {self.pod.address} {'held' if self.active else 'released'}>"


@dataclass(frozen=True, slots=True)
class PodState:
    """A pod at one moment, for people and metrics."""

    address: Address
    leases: int
    limit: int
    #: in the set that discovery published last
    known: bool
    #: why it gets nothing new, though it is known
    hold: Hold | None = None


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """The scheduler at one moment, for people and metrics."""

    pods: tuple[PodState, ...]
    waiting: int
    running: int
    #: of the pods that take requests
    slots: int
