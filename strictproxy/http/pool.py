"""
Connections to the pods of one upstream.

Owns idle connections and every connection's time-outs. Does not know limits:
whoever asks for a connection holds a lease on its pod.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection
from typing import cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.tcp import Connection

from strictproxy.config.model import PodConnections
from strictproxy.http.pod_connection import PodConnection
from strictproxy.http.timeouts import Timeouts
from strictproxy.http.transport import abort
from strictproxy.scheduling import Address

#: Makes the endpoint that connects to a pod within so many seconds.
EndpointFor = Callable[[Address, float], IStreamClientEndpoint]


#: Seconds of idleness up to which a connection is taken to be open still.
_FRESH = 0.01


class _PodFactory(Factory):
    noisy = False

    def __init__(self, pool: PodPool, address: Address) -> None:
        self._pool = pool
        self._address = address

    def buildProtocol(self, addr: object) -> PodConnection:
        return PodConnection(self._pool, self._address)


class PodPool:
    """
    Idle connections by pod, the one used last first.

    `sweep` has to be called now and then for its time-outs to come true.
    """

    def __init__(
        self, endpoint_for: EndpointFor, config: PodConnections, clock: IReactorTime
    ) -> None:
        self.endpoint_for = endpoint_for
        self._idle: dict[Address, list[PodConnection]] = {}
        self._open: set[PodConnection] = set()
        self.now: Callable[[], float] = clock.seconds
        self.keepalive_timeouts: Timeouts[PodConnection] = Timeouts(None)
        self.first_byte_timeouts: Timeouts[PodConnection] = Timeouts(None)
        self.idle_timeouts: Timeouts[PodConnection] = Timeouts(None)
        self.configure(config, endpoint_for)

    def configure(self, config: PodConnections, endpoint_for: EndpointFor) -> None:
        """Apply settings, to what is under way too; idle connections made otherwise are closed."""
        self._config = config
        if endpoint_for != self.endpoint_for:
            self.endpoint_for = endpoint_for
            self.retain(())
        #: see `strictproxy.http.transport.detect_death`
        self.dead_after = config.dead_after
        self.keepalive_timeouts.seconds = config.keepalive
        self.first_byte_timeouts.seconds = config.first_byte_timeout
        self.idle_timeouts.seconds = config.idle_timeout

    def take(self, address: Address) -> PodConnection | None:
        """Return an idle connection to a pod that is still open, or None."""
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            self.keepalive_timeouts.stop(connection)
            # One that carried an exchange a moment ago has been under the
            # reactor's eyes; a system call would tell nothing new.
            fresh = self.now() - connection.idle_since < _FRESH
            if not connection.lost and (fresh or _is_quiet(connection)):
                return connection
            connection.abort()
        return None

    def connect(self, address: Address) -> Deferred[PodConnection]:
        """
        Open a connection to a pod.

        Cancelling the Deferred gives up the attempt. It fails with whatever
        the endpoint fails with.
        """
        endpoint = self.endpoint_for(address, self._config.connect_timeout)
        opened = endpoint.connect(_PodFactory(self, address))
        return cast("Deferred[PodConnection]", opened).addCallback(self._opened)

    def _opened(self, connection: PodConnection) -> PodConnection:
        self._open.add(connection)
        return connection

    def give(self, connection: PodConnection) -> None:
        """Keep a connection for the next exchange with its pod."""
        now = connection.idle_since = self.now()
        self._idle.setdefault(connection.address, []).append(connection)
        self.keepalive_timeouts.start(connection, now)

    def stop_timeouts(self, connection: PodConnection) -> None:
        """Forget what a connection was waiting for."""
        self.first_byte_timeouts.stop(connection)
        self.idle_timeouts.stop(connection)

    def forget(self, connection: PodConnection) -> None:
        """Drop what is kept about a connection that is gone."""
        self._open.discard(connection)
        self.stop_timeouts(connection)
        self.keepalive_timeouts.stop(connection)
        idle = self._idle.get(connection.address)
        if idle is not None:
            if connection in idle:
                idle.remove(connection)
            if not idle:
                del self._idle[connection.address]

    def retain(self, addresses: Collection[Address]) -> None:
        """Close idle connections to all other pods."""
        for address in [gone for gone in self._idle if gone not in addresses]:
            for connection in self._idle.pop(address):
                connection.abort()

    def sweep(self) -> None:
        """Act on what has timed out."""
        now = self.now()
        for connection in self.keepalive_timeouts.expire(now):
            self._idle.get(connection.address, []).remove(connection)
            connection.abort()
        for connection in self.first_byte_timeouts.expire(now):
            connection.timed_out("no answer within first_byte_timeout")
        for connection in self.idle_timeouts.expire(now):
            connection.timed_out("the answer stopped coming for idle_timeout")

    def stop(self) -> None:
        """Close every connection, busy ones too."""
        for connection in list(self._open):
            abort(connection.transport)

    @property
    def idle(self) -> int:
        """How many connections are idle."""
        return sum(map(len, self._idle.values()))


def _is_quiet(connection: PodConnection) -> bool:
    """
    Whether an idle connection is still open and has nothing to read.

    The pod may have closed it in this very turn of the reactor, before the
    reactor could see it; asking the kernel closes most of that gap.
    """
    transport = connection.transport
    if not isinstance(transport, Connection):
        return True
    try:
        transport.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
