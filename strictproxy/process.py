"""What the process is allowed by its system, and how it makes the most of it."""

from __future__ import annotations

import gc
import resource
import sys
from contextlib import suppress
from dataclasses import replace

from twisted.logger import Logger

from strictproxy.config.model import ClientConfig

_log = Logger()


def spare_the_collector() -> None:
    """
    Make garbage collection rarer, and leave out of it what has been imported.

    Exchanges leave no cycles behind, but with thousands of connections each
    full collection stops everything for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def descriptors() -> int:
    """
    Return how many files this process may have open, after asking for as many as it may.

    The soft limit is for programs that use select(2); Go's run time raises it
    likewise.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def within_descriptors(client: ClientConfig, limit: int) -> ClientConfig:
    """
    Return the client limits with no more connections than there are descriptors for.

    A quarter stays for pods, probes and files: a proxy that has none left can
    neither reach a pod nor answer the kubelet.
    """
    allowed = limit - max(limit // 4, 64)
    if client.connections <= allowed:
        return client
    _log.warn(
        "client.connections is {wanted}, but with {limit} descriptors it can be {allowed} at most",
        wanted=client.connections,
        limit=limit,
        allowed=allowed,
    )
    return replace(client, connections=allowed)
