"""
The listener's side of the house: a twisted.web `Site` with channels of our own.

`Site` and `Resource` stay the seam between the wire and what answers; only
the stock channel, which reads whole bodies before it renders, is replaced.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.protocol import Protocol
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import IResource
from twisted.web.server import Site

from strictproxy.config.model import ClientConfig
from strictproxy.errors import ProxyError
from strictproxy.http.channel import ServerChannel
from strictproxy.http.hangups import Hangups
from strictproxy.http.heads import HeadLimits
from strictproxy.http.peer import trusts
from strictproxy.http.timeouts import Timeouts

_log = Logger()

#: How often time-outs are looked at, seconds; they are late by so much at most.
_SWEEP = 0.5
#: After an answer that ends the connection, the client may take so long to read it.
_LINGER = 5.0
#: Connections past the limit that are open for as long as it takes to say so.
_TURNED_AWAY = 64


class StrictSite(Site):
    """
    Makes a `ServerChannel` for each connection and keeps what channels share.

    `start` and `stop` bracket its life; `clock` is the reactor.
    """

    def __init__(self, resource: IResource, config: ClientConfig, clock: IReactorTime) -> None:
        super().__init__(resource, reactor=clock)
        self.now: Callable[[], float] = clock.seconds
        self.channels: set[ServerChannel] = set()
        #: every answer from now on ends its connection
        self.closing = False
        self.header_timeouts: Timeouts[ServerChannel] = Timeouts(None)
        self.body_timeouts: Timeouts[ServerChannel] = Timeouts(None)
        self.keepalive_timeouts: Timeouts[ServerChannel] = Timeouts(None)
        self.linger_timeouts: Timeouts[ServerChannel] = Timeouts(_LINGER)
        self.configure(config)
        self.hangups = Hangups(clock)
        self._sweeper = LoopingCall(self._sweep)
        self._sweeper.clock = clock

    def configure(self, config: ClientConfig) -> None:
        """Apply limits and time-outs, to what is under way too."""
        self.limits = HeadLimits(config.max_header_bytes, config.max_headers, config.max_target)
        self.max_body = config.max_body
        self.is_trusted = trusts(config.trusted_proxies)
        self.read_ahead = config.read_ahead
        self.max_channels = config.connections
        self.header_timeouts.seconds = config.header_timeout
        self.body_timeouts.seconds = config.body_timeout
        self.keepalive_timeouts.seconds = config.keepalive

    def start(self) -> None:
        """Begin to watch time-outs."""
        self._sweeper.start(_SWEEP, now=False).addErrback(_log_failure)

    def stop(self) -> None:
        """Close every connection and stop watching."""
        if self._sweeper.running:
            self._sweeper.stop()
        for channel in list(self.channels):
            channel.abort()
        self.hangups.stop()

    def close_idle(self) -> None:
        """End every connection that carries no request, and each other after its request."""
        self.closing = True
        for channel in self.keepalive_timeouts.take_all():
            channel.close()

    # Site's own versions keep a date string for its own access log, once a second.

    def startFactory(self) -> None:
        """Do nothing: `start` does."""

    def stopFactory(self) -> None:
        """Do nothing: `stop` does."""

    def buildProtocol(  # type: ignore[override]  # not a stock channel, on purpose
        self, addr: IAddress | None
    ) -> Protocol | None:
        """Take a connection; past the limit a few get an answer that says so, more get none."""
        surplus = len(self.channels) >= self.max_channels
        if surplus:
            _log.warn("connection refused: {count} are open", count=len(self.channels))
            if len(self.channels) >= self.max_channels + _TURNED_AWAY:
                return None
        channel = ServerChannel(self, surplus=surplus)
        channel.factory = self
        return channel

    def forget(self, channel: ServerChannel) -> None:
        """Drop what is kept about a channel that is gone."""
        self.channels.discard(channel)
        self.hangups.unwatch(channel)
        for timeouts in self._all_timeouts():
            timeouts.stop(channel)

    def refused(self, channel: ServerChannel, error: ProxyError) -> None:
        """Log bytes that were no request."""
        _log.info("{client}: {error.reason}: {error}", client=channel.peer.address, error=error)

    def _all_timeouts(self) -> tuple[Timeouts[ServerChannel], ...]:
        return (
            self.header_timeouts,
            self.body_timeouts,
            self.keepalive_timeouts,
            self.linger_timeouts,
        )

    def _sweep(self) -> None:
        now = self.now()
        for channel in self.header_timeouts.expire(now) + self.body_timeouts.expire(now):
            channel.timed_out()
        for channel in self.keepalive_timeouts.expire(now):
            channel.close()
        for channel in self.linger_timeouts.expire(now):
            channel.abort()


def _log_failure(failure: Failure) -> None:
    _log.failure("time-outs are no longer watched", failure=failure)
