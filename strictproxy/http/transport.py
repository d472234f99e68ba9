"""
Writing to a TCP transport without waiting for the next turn of the reactor.

Twisted's `write` only buffers; the bytes leave in the next turn, after two
`epoll_ctl` calls. Where nothing is buffered, sending at once is the same
stream of bytes, sooner and for less.
"""

from __future__ import annotations

from twisted.internet.interfaces import IConsumer, IPushProducer, ITCPTransport, ITransport
from twisted.internet.tcp import Connection


class IStreamTransport(ITCPTransport, IPushProducer, IConsumer):
    """What TCP and TLS transports are: written to, paused, and pausing their producer."""


def write_now(transport: ITransport, data: bytes) -> None:
    """
    Write `data`, at once if nothing waits to be written before it.

    Falls back to `transport.write` for whatever the kernel does not take, and
    for any transport that is not plain TCP. An error while sending is left for
    the transport to find, so that the connection is lost in the usual way.
    """
    if (
        isinstance(transport, Connection)
        and not transport.dataBuffer
        and not transport._tempDataBuffer
        and transport.connected
        and not transport.disconnecting
        and not transport.TLS
    ):
        try:
            sent = transport.socket.send(data)
        except OSError:
            sent = 0
        if sent == len(data):
            return
        if sent:
            data = data[sent:]
    transport.write(data)


def end_output(transport: IStreamTransport) -> None:
    """
    End our side of a connection once everything has been sent; the other side may go on.

    TLS as Twisted has it knows no such thing: there the connection is closed.
    """
    if isinstance(transport, Connection) and not transport.TLS:
        transport.loseWriteConnection()
    else:
        transport.loseConnection()
