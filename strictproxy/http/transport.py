"""
Writing to a TCP transport without waiting for the next turn of the reactor.

Twisted's `write` only buffers; the bytes leave in the next turn, after two
`epoll_ctl` calls. Where nothing is buffered, sending at once is the same
stream of bytes, sooner and for less. Whoever writes with `write_now` closes
with the functions here too, because an `Outbox` may hold the last bytes until
this turn ends.
"""

from __future__ import annotations

from twisted.internet.interfaces import IConsumer, IPushProducer, ITCPTransport, ITransport
from twisted.internet.tcp import Connection

from strictproxy.http.outbox import Outbox, send


class IStreamTransport(ITCPTransport, IPushProducer, IConsumer):
    """What TCP and TLS transports are: written to, paused, and pausing their producer."""


#: One for the process, as there is one reactor; turns are what it is about.
_outbox = Outbox()


def write_now(transport: ITransport, data: bytes) -> None:
    """
    Write `data`, at once or in this turn if nothing waits to be written before it.

    Falls back to `transport.write` for whatever the kernel does not take, and
    for any transport that is not plain TCP.
    """
    if not isinstance(transport, Connection) or not _is_clear(transport):
        transport.write(data)
    elif not _outbox.keep(transport, data):
        send(transport, data)


def _is_clear(transport: Connection) -> bool:
    return (
        not transport.dataBuffer
        and not transport._tempDataBuffer
        and bool(transport.connected)
        and not transport.disconnecting
        and not transport.TLS
    )


def flush(transport: ITransport) -> None:
    """Send what `write_now` keeps for the end of this turn."""
    if isinstance(transport, Connection):
        _outbox.flush(transport)


def is_plain(transport: ITransport) -> bool:
    """Whether a transport's socket carries the stream itself, with nothing buffered before it."""
    flush(transport)
    return isinstance(transport, Connection) and _is_clear(transport)


def close(transport: ITransport) -> None:
    """Close a connection once everything has been sent."""
    flush(transport)
    transport.loseConnection()


def abort(transport: ITCPTransport) -> None:
    """Close a connection without waiting for what the kernel does not take at once."""
    flush(transport)
    transport.abortConnection()


def end_output(transport: IStreamTransport) -> None:
    """
    End our side of a connection once everything has been sent; the other side may go on.

    TLS as Twisted has it knows no such thing: there the connection is closed.
    """
    flush(transport)
    if isinstance(transport, Connection) and not transport.TLS:
        transport.loseWriteConnection()
    else:
        transport.loseConnection()
