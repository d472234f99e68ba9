"""
What choosing a pod, waiting, withdrawing and handing over cost, and how it grows.

    python benchmarks/scheduling.py

Each cell is the median of five runs, in microseconds per operation. What is
O(log n) grows by a constant from one column to the next, what is O(1) not at
all; caches make both grow a little more.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable

from twisted.internet.defer import Deferred

from strictproxy.scheduling import Address, Lease, Scheduler

RUNS = 5
OPERATIONS = 20_000


def scheduler(
    pods: int, limit: int, waiters: int = 0
) -> tuple[Scheduler, list[Lease], list[Deferred[Lease]]]:
    """Make a scheduler whose pods are full if anybody is to wait."""
    made = Scheduler(limit, queue_size=10**7, queue_timeout=None, no_pods_timeout=30, now=0.0)
    made.set_pods([Address(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 80) for n in range(pods)], 0.0)
    leases: list[Lease] = []
    waiting: list[Deferred[Lease]] = []
    if waiters:
        for _ in range(pods * limit):
            lease = made.acquire("r", 0.0)
            assert isinstance(lease, Lease)
            leases.append(lease)
        for _ in range(waiters):
            waiter = made.acquire("r", 0.0)
            assert isinstance(waiter, Deferred)
            waiting.append(waiter.addErrback(lambda _: None))
    return made, leases, waiting


def grant_and_release(pods: int) -> float:
    """Take a slot and give it back, with the pods half busy."""
    made, *_ = scheduler(pods, 4)
    held = [made.acquire("r", 0.0) for _ in range(pods * 2)]
    random.Random(1).shuffle(held)
    began = time.perf_counter()
    for number in range(OPERATIONS):
        index = number % len(held)
        made.release(held[index], 0.0)
        held[index] = made.acquire("r", 0.0)
    return (time.perf_counter() - began) / OPERATIONS


def hand_over(pods: int, waiters: int) -> float:
    """Release a slot for which somebody waits."""
    made, leases, waiting = scheduler(pods, 2, waiters)
    for waiter in waiting:
        waiter.addCallback(leases.append)
    count = min(OPERATIONS, waiters)
    began = time.perf_counter()
    for number in range(count):
        made.release(leases[number], 0.0)
    return (time.perf_counter() - began) / count


def join(waiters: int) -> float:
    """Get into the line."""
    made, *_ = scheduler(8, 2, waiters)
    count = 5000
    began = time.perf_counter()
    for _ in range(count):
        made.acquire("r", 0.0)
    return (time.perf_counter() - began) / count


def withdraw(waiters: int) -> float:
    """Leave the line, from anywhere in it."""
    _, _, waiting = scheduler(8, 2, waiters)
    chosen = random.Random(1).sample(waiting, min(5000, waiters))
    began = time.perf_counter()
    for waiter in chosen:
        waiter.cancel()
    return (time.perf_counter() - began) / len(chosen)


def measure(function: Callable[..., float], *arguments: int) -> str:
    """Return the median as microseconds."""
    results = []
    for _ in range(RUNS):
        gc.collect()
        gc.disable()
        results.append(function(*arguments))
        gc.enable()
    return f"{statistics.median(results) * 1e6:8.2f}"


def main() -> None:
    """Print the tables."""
    pods = (10, 100, 1000, 10_000)
    print("pods                          ", *(f"{n:>8}" for n in pods))
    print("take a slot and give it back  ", *(measure(grant_and_release, n) for n in pods))
    print("hand over, 10,000 waiting     ", *(measure(hand_over, n, 10_000) for n in pods))
    print()
    waiters = (100, 1000, 10_000, 100_000)
    print("waiters                       ", *(f"{n:>8}" for n in waiters))
    print("get into the line             ", *(measure(join, n) for n in waiters))
    print("leave the line from anywhere  ", *(measure(withdraw, n) for n in waiters))
    print("hand over, 8 pods x 2         ", *(measure(hand_over, 8, n) for n in waiters))


if __name__ == "__main__":
    main()
