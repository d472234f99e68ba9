"""
Noticing that a client hung up while nothing is being read from it.

A paused transport is not watched for input, and a FIN shows only as input. On
Linux, epoll can be asked for the hang-up alone (EPOLLRDHUP); the epoll
descriptor is itself readable when it has something to tell, so it becomes one
more reader of the reactor. Elsewhere hang-ups of paused clients are noticed
when reading goes on.
"""

from __future__ import annotations

import select
from contextlib import suppress
from typing import TYPE_CHECKING

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from zope.interface import implementer

if TYPE_CHECKING:
    from strictproxy.http.channel import ServerChannel

SUPPORTED = hasattr(select, "EPOLLRDHUP")


@implementer(IReadDescriptor)
class Hangups:
    """Watches paused channels, and aborts those whose client has gone."""

    def __init__(self, reactor: object) -> None:
        self._reactor = reactor if SUPPORTED and IReactorFDSet.providedBy(reactor) else None
        self._epoll: select.epoll | None = None
        self._channels: dict[int, ServerChannel] = {}
        self._numbers: dict[ServerChannel, int] = {}

    def watch(self, channel: ServerChannel) -> None:
        """Watch a channel that has just been paused."""
        handle = getattr(channel.transport, "fileno", None)
        if self._reactor is None or handle is None:
            return
        if self._epoll is None:
            self._epoll = select.epoll()
            self._reactor.addReader(self)
        number = handle()
        if number >= 0:
            self._channels[number] = channel
            self._numbers[channel] = number
            self._epoll.register(number, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def unwatch(self, channel: ServerChannel) -> None:
        """Stop watching; the channel need not have been watched."""
        number = self._numbers.pop(channel, None)
        if number is not None and self._epoll is not None:
            del self._channels[number]
            # A descriptor that has been closed has left the epoll set by itself.
            with suppress(OSError):
                self._epoll.unregister(number)

    def stop(self) -> None:
        """Give the descriptor back."""
        if self._epoll is not None and self._reactor is not None:
            self._reactor.removeReader(self)
            self._epoll.close()
            self._epoll = None
            self._channels.clear()
            self._numbers.clear()

    # -- for the reactor

    def fileno(self) -> int:
        """Return the epoll descriptor."""
        return -1 if self._epoll is None else self._epoll.fileno()

    def doRead(self) -> None:
        """Abort the channels whose clients have hung up."""
        if self._epoll is None:
            return
        for number, _ in self._epoll.poll(0):
            channel = self._channels.get(number)
            if channel is not None:
                self.unwatch(channel)
                channel.abort()

    def connectionLost(self, reason: object) -> None:
        """Do nothing: the reactor is stopping."""

    def logPrefix(self) -> str:
        """Name this in the reactor's messages."""
        return "hangups"
