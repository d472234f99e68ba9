"""
Writing to a TCP transport without waiting for the next turn of the reactor.

Twisted's `write` only buffers; the bytes leave in the next turn, after two
`epoll_ctl` calls. Where nothing is buffered, sending at once is the same
stream of bytes, sooner and for less. Whoever writes with `write_now` closes
with the functions here too, because an `Outbox` may hold the last bytes until
this turn ends.
"""

from __future__ import annotations

import socket
import struct

from twisted.internet.interfaces import IConsumer, IPushProducer, ITCPTransport, ITransport
from twisted.internet.tcp import Connection

from strictproxy.http.outbox import Outbox, send


class IStreamTransport(ITCPTransport, IPushProducer, IConsumer):
    """What TCP and TLS transports are: written to, paused, and pausing their producer."""


#: Of tcp_info in Linux's include/uapi/linux/tcp.h: the state, and segments not acknowledged.
_TCP_INFO = getattr(socket, "TCP_INFO", None)
_UNACKED = struct.Struct("=B23xI")
_CLOSE_WAIT = 8

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


def detect_death(transport: ITCPTransport, seconds: float) -> None:
    """
    Let the kernel end a connection whose other side does not answer it for `seconds`.

    A machine that loses its power, or its network, says no word: without this,
    what waits for it would wait for ever. See tcp(7).
    """
    # TLS has the socket's transport below it.
    under = getattr(transport, "transport", transport)
    if not isinstance(under, Connection) or not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    under.setTcpKeepAlive(True)
    probe = max(1, round(seconds / 6))
    for option, value in (
        (socket.TCP_KEEPIDLE, max(1, round(seconds / 2))),
        (socket.TCP_KEEPINTVL, probe),
        (socket.TCP_KEEPCNT, 3),
        # For when something is on its way, and not acknowledged.
        (socket.TCP_USER_TIMEOUT, round(seconds * 1000)),
    ):
        under.socket.setsockopt(socket.IPPROTO_TCP, option, value)


def was_taken(transport: ITransport) -> bool:
    """
    Whether the other side, which has ended its output, had read all that was sent to it.

    False where that cannot be told. Its FIN acknowledges what its kernel had
    received by then, and a socket that is closed with something unread sends a
    reset instead of a FIN (RFC 1122, 4.2.2.13).
    """
    flush(transport)
    if not (isinstance(transport, Connection) and _is_clear(transport) and _TCP_INFO):
        return False
    info = transport.socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _UNACKED.size)
    state, unacknowledged = _UNACKED.unpack(info)
    return bool(state == _CLOSE_WAIT and not unacknowledged)


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
