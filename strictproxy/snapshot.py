"""Everything about an upstream at one moment, for people, pages and metrics. Plain records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from strictproxy.interfaces import DiscoveryState
from strictproxy.scheduling import Address


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
    #: times that more than half of the pods were gone at once
    shrinks: int
    discovery: DiscoveryState | None
