"""Asking a pod something ourselves: on a connection of its own, which takes no slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import treq
from treq.client import HTTPClient
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from strictproxy.scheduling import Address


class TooLong(Exception):
    """The answer is longer than it may be."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a pod answered."""

    status: int
    body: bytes


async def ask(
    address: Address,
    path: str,
    connect: Callable[[], IStreamClientEndpoint],
    clock: IReactorTime,
    *,
    agent: str,
    max_body: int,
) -> Answer:
    """
    GET `path` from a pod.

    :param connect: makes the endpoint to connect to, TLS included.
    :param agent: what we call ourselves.
    :raise TooLong: there is more than `max_body` bytes of it.
    """
    pool = HTTPConnectionPool(clock, persistent=False)
    client = HTTPClient(Agent.usingEndpointFactory(clock, _Endpoints(connect), pool))
    headers: dict[bytes | str, bytes | str] = {"User-Agent": agent}
    # The scheme is the endpoint's business.
    response = await client.get(
        f"http://{address}{path}", headers=headers, allow_redirects=False, unbuffered=True
    )
    body = bytearray()

    def collect(data: bytes) -> None:
        body.extend(data)
        if len(body) > max_body:
            raise TooLong(f"its answer is longer than {max_body} bytes")

    await treq.collect(response, collect)
    return Answer(response.code, bytes(body))


def reason_of(failure: Failure) -> str:
    """Return why nothing came of it."""
    # What Twisted's client wraps into a list is one failure here.
    reasons = getattr(failure.value, "reasons", None)
    failure = reasons[0] if reasons else failure
    return failure.getErrorMessage() or type(failure.value).__name__


@implementer(IAgentEndpointFactory)
class _Endpoints:
    """Connects to one pod, whatever the URL."""

    def __init__(self, make: Callable[[], IStreamClientEndpoint]) -> None:
        self._make = make

    def endpointForURI(self, uri: Any) -> IStreamClientEndpoint:
        """Return the pod's endpoint."""
        return self._make()
