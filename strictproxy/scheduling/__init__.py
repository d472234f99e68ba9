"""
Who is served next, and by which pod.

Pure: no sockets, no clock of its own, no logging. Time is passed in as
seconds on any monotonic scale; waiting is a Deferred, and nothing else of
Twisted is used.
"""

from strictproxy.scheduling.health import Health, HealthPolicy, Standing
from strictproxy.scheduling.leases import Lease, PodState, SchedulerState
from strictproxy.scheduling.line import Line, Ticket
from strictproxy.scheduling.pods import Address, Hold, LeastHeap, Pod
from strictproxy.scheduling.scheduler import Scheduler

__all__ = [
    "Address",
    "Health",
    "HealthPolicy",
    "Hold",
    "Lease",
    "LeastHeap",
    "Line",
    "Pod",
    "PodState",
    "Scheduler",
    "SchedulerState",
    "Standing",
    "Ticket",
]
