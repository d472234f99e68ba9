"""Everything about an upstream at one moment, for people, pages and metrics. Plain records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import ceil

from strictproxy.interfaces import DiscoveryState
from strictproxy.scheduling import Address


@dataclass(slots=True)
class PodStats:
    """What has been counted about a pod, as long as it is known."""

    requests: int = 0
    #: connections that could not be made, and requests that failed
    failures: int = 0
    #: answers that have begun, and how long that took since the slot was there, in all
    answers: int = 0
    first_byte_seconds: float = 0.0


class PodCondition(Enum):
    """What a pod may get. Only the first two get anything new; all finish what they have."""

    READY = "ready"
    #: one request at a time, after failures
    TRIAL = "trial"
    #: put aside, after failures
    UNHEALTHY = "unhealthy"
    #: an operator said so
    DRAINED = "drained"
    #: it is shutting down, says discovery
    TERMINATING = "terminating"
    #: discovery does not know it any more
    REMOVED = "removed"
    #: an operator has paused the whole upstream
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class PodSnapshot:
    """One pod."""

    address: Address
    condition: PodCondition
    leases: int
    limit: int
    #: failures in a row
    failures: int
    #: seconds until its trial, if it is unhealthy and not for its checks
    trial_in: float | None
    last_error: str | None
    stats: PodStats


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """One request that waits or runs."""

    #: by which it can be cancelled
    number: int
    route: str
    client: str
    #: its X-Request-Id
    request_id: str
    #: None while it waits
    pod: Address | None
    #: seconds since it came, or since it has its slot
    age: float
    #: if it is a task
    task_id: str | None = None


@dataclass(frozen=True, slots=True)
class UpstreamSnapshot:
    """One upstream."""

    name: str
    #: discovery has published a set at least once
    trusted: bool
    pods: tuple[PodSnapshot, ...]
    waiting: int
    running: int
    #: of the pods that take requests
    slots: int
    #: requests in flight per pod, as configured or as set by an operator
    limit: int
    paused: bool
    #: bytes of waiting requests' bodies that are kept
    waiting_bytes: int
    #: seconds that the first in line has waited
    oldest: float
    #: times that more than half of the pods were gone at once
    shrinks: int
    discovery: DiscoveryState | None

    @property
    def utilisation(self) -> float:
        """The part of the slots that is taken."""
        return self.running / self.slots if self.slots else 0.0

    @property
    def desired_pods(self) -> int:
        """How many pods would serve all that runs and waits now."""
        return ceil((self.running + self.waiting) / self.limit)
