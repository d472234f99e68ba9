"""
Who is served next, and by which pod.

Pure: no sockets, no clock of its own, no logging. Time is passed in as
seconds on any monotonic scale; waiting is a Deferred, and nothing else of
Twisted is used.
"""

from strictproxy.scheduling.line import Line, Ticket
from strictproxy.scheduling.pods import Address, LeastHeap, Pod
from strictproxy.scheduling.scheduler import Lease, PodState, Scheduler, SchedulerState

__all__ = [
    "Address",
    "Lease",
    "LeastHeap",
    "Line",
    "Pod",
    "PodState",
    "Scheduler",
    "SchedulerState",
    "Ticket",
]
