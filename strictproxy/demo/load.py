"""The demo's load: a plan of jobs, what an ideal queue would make of it, and clients."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from math import exp, sqrt
from typing import Any

from treq.client import HTTPClient
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.web.client import Agent

#: Seconds between two requests of a burst.
_APART = 0.005


@dataclass(frozen=True)
class Job:
    """A request: when it is sent, seconds from the start, and how long it takes."""

    arrival: float
    seconds: float


def plan(count: int, mean: float, seed: int) -> list[Job]:
    """
    Make jobs in three bursts, their lengths lognormal: most are short, a few are long.
    """
    numbers = random.Random(seed)
    sigma = sqrt(0.6)
    lengths = [mean * exp(numbers.gauss(-(sigma**2) / 2, sigma)) for _ in range(count)]
    # The last ones are of average length, so that the end of the run is not one long job.
    lengths = [min(length, 4 * mean) for length in lengths[: count - 16]] + [mean / 2] * 16
    bursts = [0.0] * (count // 2) + [2.0] * (count // 4)
    bursts += [4.0] * (count - len(bursts))
    # A few milliseconds apart, so that they arrive in the order of the plan.
    return [
        Job(burst + _APART * number, seconds)
        for number, (burst, seconds) in enumerate(zip(bursts, lengths, strict=True))
    ]


def ideal_makespan(jobs: list[Job], slots: int) -> float:
    """Return when the last job would end with one queue in front of `slots`, and no overhead."""
    free = [0.0] * slots
    heapify(free)
    last = 0.0
    for job in jobs:
        end = max(free[0], job.arrival) + job.seconds
        heapreplace(free, end)
        last = max(last, end)
    return last


@dataclass
class Outcome:
    """What became of a run."""

    makespan: float = 0.0
    waits: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    sent: int = 0
    done: int = 0

    def wait_percentile(self, percent: float) -> float:
        """Return a percentile of the waiting times, seconds."""
        ordered = sorted(self.waits) or [0.0]
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def run_load(
    reactor: Any, jobs: list[Job], choose: Callable[[], str], outcome: Outcome
) -> Deferred[Outcome]:
    """
    Send `jobs`, each on a connection of its own, to whatever `choose` gives as host:port.

    :return: fires with `outcome`, which is filled in as the run goes on.
    """
    # No pool: a new connection for each request, which is what kube-proxy spreads.
    client = HTTPClient(Agent(reactor, connectTimeout=10))
    began = reactor.seconds()

    async def send(job: Job) -> None:
        await deferLater(reactor, job.arrival)
        outcome.sent += 1
        sent = reactor.seconds()
        url = f"http://{choose()}/job?seconds={job.seconds:.4f}"
        try:
            response = await client.get(url)
            body = await response.text()
            if response.code != 200:
                outcome.errors.append(f"{response.code} {body[:200]!r}")
        except Exception as error:
            outcome.errors.append(repr(error))
        else:
            outcome.waits.append(max(0.0, reactor.seconds() - sent - job.seconds))
        outcome.done += 1
        outcome.makespan = reactor.seconds() - began

    def everything() -> Iterator[Deferred[None]]:
        for job in jobs:
            yield Deferred.fromCoroutine(send(job))

    return gatherResults(list(everything())).addCallback(lambda _: outcome)
