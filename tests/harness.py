"""
What the tests of the data path stand on: a proxy in this process, scripted pods, raw clients.

Sockets are real; time is a `Clock`, so that nothing here waits for a time-out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from strictproxy import forwarding
from strictproxy.config.model import (
    CheckConfig,
    ClientConfig,
    Match,
    PodConnections,
    QueueConfig,
    RouteConfig,
    StaticSource,
    UpstreamConfig,
)
from strictproxy.discovery.static import StaticDiscovery
from strictproxy.http import transport
from strictproxy.http.outbox import Outbox
from strictproxy.http.site import StrictSite
from strictproxy.interfaces import Endpoint, IRouter
from strictproxy.logs import AccessRecord
from strictproxy.proxy import ProxyResource
from strictproxy.scheduling import Address
from strictproxy.upstream import Upstream

reactor: Any = _reactor


@implementer(IHalfCloseableProtocol)
class Wire(Protocol):
    """One end of a raw connection: what came, and waiting for more."""

    #: stay open when the other side has ended its half
    keeps_half = False

    def __init__(self) -> None:
        self.received = b""
        #: only count what comes
        self.counting = False
        self.count = 0
        self.closed = False
        #: the other side will send nothing more
        self.ended = False
        self.half_closing = False
        self._waiting: list[tuple[Callable[[], bool], Deferred[bytes]]] = []

    def dataReceived(self, data: bytes) -> None:
        self.count += len(data)
        if not self.counting:
            self.received += data
        self._check()

    def readConnectionLost(self) -> None:
        self.ended = True
        if not self.keeps_half or self.half_closing:
            self.transport.loseConnection()
        self._check()

    def writeConnectionLost(self) -> None:
        pass

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.closed = self.ended = True
        self._check()

    def _check(self) -> None:
        for condition, waiting in list(self._waiting):
            if condition():
                self._waiting.remove((condition, waiting))
                waiting.callback(self.received)

    def until(self, condition: Callable[[], bool]) -> Deferred[bytes]:
        """Fire with everything received, once `condition` holds."""
        waiting: Deferred[bytes] = Deferred()
        self._waiting.append((condition, waiting))
        waiting.addTimeout(10, reactor, onTimeoutCancel=self._timed_out)
        self._check()
        return waiting

    def _timed_out(self, _value: object, _seconds: float) -> Failure:
        return Failure(AssertionError(f"still waiting; received {self.received[-300:]!r}"))

    def has(self, data: bytes) -> Deferred[bytes]:
        """Fire once `data` has come."""
        return self.until(lambda: data in self.received)

    def size(self, count: int) -> Deferred[bytes]:
        """Fire once so many bytes have come."""
        return self.until(lambda: len(self.received) >= count)

    def end(self) -> Deferred[bytes]:
        """Fire once the connection is closed."""
        return self.until(lambda: self.closed)

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.transport.write(data)

    def half_close(self) -> None:
        """Send nothing more, and go on reading."""
        self.half_closing = True
        if self.ended:
            self.transport.loseConnection()
        else:
            self.transport.loseWriteConnection()

    def close(self) -> None:
        """Close after sending what is left."""
        self.transport.loseConnection()

    def reset(self) -> None:
        """Close at once, with a reset."""
        self.transport.abortConnection()

    def take(self) -> bytes:
        """Return what came, and forget it."""
        data, self.received = self.received, b""
        return data


class ScriptedPod(Factory):
    """A pod whose connections the test talks on byte by byte."""

    noisy = False

    def __init__(self) -> None:
        self.connections: list[Wire] = []
        self._waiting: list[tuple[int, Deferred[Wire]]] = []
        self.port: Any = reactor.listenTCP(0, self, interface="127.0.0.1")
        self.address = Address("127.0.0.1", self.port.getHost().port)

    def buildProtocol(self, addr: object) -> Wire:
        wire = Wire()
        self.connections.append(wire)
        for number, waiting in list(self._waiting):
            if len(self.connections) > number:
                self._waiting.remove((number, waiting))
                # Not before it has a transport.
                reactor.callLater(0, waiting.callback, self.connections[number])
        return wire

    def connection(self, number: int = 0) -> Deferred[Wire]:
        """Fire with the connection of that ordinal, once it is there."""
        waiting: Deferred[Wire] = Deferred()
        if len(self.connections) > number:
            waiting.callback(self.connections[number])
        else:
            self._waiting.append((number, waiting))
            waiting.addTimeout(10, reactor)
        return waiting


class ProxyTestCase(TestCase):
    """A proxy with scripted pods; every count is checked to be zero in the end."""

    timeout = 30

    #: keep every write until the reactor's turn ends, as under load
    keeps_writes = False

    def setUp(self) -> None:
        self.keep_writes(self.keeps_writes)
        # A random id could contain what a test waits for.
        self.patch(forwarding, "getrandbits", lambda _: int("e" * 32, 16))
        self.clock = Clock()
        self.records: list[AccessRecord] = []
        self.pods: list[ScriptedPod] = []
        self.wires: list[Wire] = []
        self.ports: list[Any] = []
        self.addCleanup(self.shut_down)

    def keep_writes(self, keep: bool) -> None:
        """Keep every write until the reactor's turn ends, or send each at once."""
        self.patch(transport, "_outbox", Outbox(worth=0 if keep else sys.maxsize))

    def start(
        self,
        pods: int = 1,
        limit: int = 1,
        *,
        queue: QueueConfig | None = None,
        connections: PodConnections | None = None,
        client: ClientConfig | None = None,
        routes: list[RouteConfig] | None = None,
        routers: list[tuple[str, IRouter]] | None = None,
        static: list[Address] | None = None,
        limit_header: str | None = None,
        drain_timeout: float | None = None,
        check: CheckConfig | None = None,
    ) -> None:
        """Start pods, and a proxy in front of them."""
        self.pods = [ScriptedPod() for _ in range(pods)]
        self.ports += [pod.port for pod in self.pods]
        addresses = tuple(static or [pod.address for pod in self.pods])
        routes = routes or [RouteConfig("all", Match(prefix="/"), "u")]
        config = UpstreamConfig(
            "u",
            StaticSource(addresses),
            limit,
            queue or QueueConfig(),
            connections or PodConnections(),
            limit_header=limit_header,
            drain_timeout=drain_timeout,
            check=check,
        )
        self.upstream = Upstream(
            config,
            routes,
            StaticDiscovery(StaticSource(addresses)),
            lambda address, timeout: TCP4ClientEndpoint(reactor, *address, timeout),
            self.clock,
        )
        self.upstream.start()
        self.proxy = ProxyResource(
            {"u": self.upstream}, routes, routers or [], self.clock, self.records.append
        )
        self.site = StrictSite(self.proxy, client or ClientConfig(), self.clock)
        # Hang-ups are watched by the real reactor, whatever the clock.
        from strictproxy.http.hangups import Hangups

        self.site.hangups = Hangups(reactor)
        self.site.start()
        port = reactor.listenTCP(0, self.site, interface="127.0.0.1")
        self.ports.append(port)
        self.address = Address("127.0.0.1", port.getHost().port)

    async def client(self, data: bytes = b"") -> Wire:
        """Connect to the proxy, and send `data`."""
        endpoint = TCP4ClientEndpoint(reactor, *self.address)
        wire: Wire = await endpoint.connect(Factory.forProtocol(Wire))  # type: ignore[assignment]
        self.wires.append(wire)
        if data:
            wire.send(data)
        return wire

    async def settled(self, condition: Callable[[], bool], what: str = "") -> None:
        """Let the reactor turn until `condition` holds; fail if it never does."""
        for _ in range(2000):
            if condition():
                return
            await deferLater(reactor, 0.001)
        self.fail(f"never became true: {what or condition}")

    def publish(self, addresses: Collection[Address]) -> None:
        """Let discovery know other pods."""
        self.upstream._publish([Endpoint(address) for address in addresses])

    def counts(self) -> tuple[int, int]:
        """Return (running, waiting)."""
        state = self.upstream.state()
        return state.running, state.waiting

    async def shut_down(self) -> None:
        """Close everything from outside, and check that nothing is left."""
        if not hasattr(self, "site"):
            return
        for wire in self.wires:
            if not wire.closed:
                wire.reset()

        def ended() -> bool:
            # A pod may accept a connection only now.
            for pod in self.pods:
                for connection in pod.connections:
                    if not connection.closed and connection.transport is not None:
                        connection.reset()
            return not self.proxy.running

        await self.settled(ended, "every exchange has ended")
        await self.settled(lambda: not self.site.channels, "every channel is closed")
        self.assertEqual(self.counts(), (0, 0), "leases or tickets are left")
        self.upstream.stop()
        self.site.stop()
        await DeferredList([maybeDeferred(port.stopListening) for port in self.ports])
        await self.settled(lambda: not self.upstream.pool._open, "pod connections are closed")
        for wire in [*self.wires, *(c for pod in self.pods for c in pod.connections)]:
            await wire.end()
        self.assertEqual(self.clock.getDelayedCalls(), [], "a timer is left")


def request(path: str = "/", *lines: str, method: str = "GET", body: bytes = b"") -> bytes:
    """Return a request's bytes."""
    head = [f"{method} {path} HTTP/1.1", "Host: example.com", *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


def response(body: bytes = b"", *lines: str, status: str = "200 OK") -> bytes:
    """Return a response's bytes."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body
