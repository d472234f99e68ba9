"""
The pod's side: one connection, one exchange at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer, ITransport
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure
from zope.interface import implementer

from strictproxy.errors import (
    BadRequest,
    BadResponse,
    PodDisconnected,
    PodError,
    PodTimeout,
    StaleConnection,
)
from strictproxy.http import splice
from strictproxy.http.framing import BodyReader, ChunkedReader, LengthReader, UntilCloseReader
from strictproxy.http.heads import END_OF_HEAD, Field, ResponseHead, parse_response_head
from strictproxy.http.transport import (
    IStreamTransport,
    abort,
    close,
    detect_death,
    end_output,
    is_plain,
    was_taken,
    write_now,
)
from strictproxy.scheduling import Address

if TYPE_CHECKING:
    from strictproxy.http.pool import PodPool

_MAX_HEAD = 256 * 1024
#: A kept-alive connection that ends without an answer this soon after a
#: request was sent on it, seconds, ended because it had been idle: the pod
#: closed it while the request was on its way.
_STALE_WINDOW = 1.0


class ResponseHandler(Protocol):
    """Whoever sent the request; called from the connection."""

    def pod_interim(self, head: ResponseHead) -> None:
        """Take a 1xx response other than 101."""

    def pod_head(self, head: ResponseHead, data: bytes, ended: bool) -> None:
        """Take the head, with the first of the body; `ended`: that is all of it."""

    def pod_data(self, data: bytes) -> None:
        """Take more of the body."""

    def pod_end(self, data: bytes, trailers: list[Field]) -> None:
        """Take the last of the body. The connection is not the handler's any more."""

    def pod_upgraded(self, head: ResponseHead, data: bytes) -> None:
        """
        Take a 101 response and the bytes behind it; more come by `pod_data`, without framing.

        Then `pod_half_closed` may tell that no more will, and `pod_end` that
        the connection is closed.
        """

    def pod_half_closed(self) -> None:
        """Note that the pod, after an upgrade, sends nothing more but may still read."""

    def pod_failed(self, error: PodError) -> None:
        """Note that no more will come. The connection is not the handler's any more."""

    def pod_full(self) -> None:
        """Stop sending: the pod reads more slowly than it is sent to."""

    def pod_drained(self) -> None:
        """Go on sending."""


@implementer(IPushProducer, IHalfCloseableProtocol)
class PodConnection(TwistedProtocol):
    """
    A connection to a pod. The pool owns it while it is idle, else the handler does.

    After `begin`, the handler gets exactly one of `pod_head` with `ended`,
    `pod_end` and `pod_failed`, unless it calls `abort` first.
    """

    transport: IStreamTransport

    def __init__(self, pool: PodPool, address: Address) -> None:
        self.pool = pool
        self.address = address
        self.handler: ResponseHandler | None = None
        self.lost = False
        #: it has carried an exchange before
        self.used = False
        self.idle_since = 0.0
        self._method = b""
        self._buffer = b""
        self._began = 0.0
        self._head: ResponseHead | None = None
        self._reader: BodyReader | None = None
        self._switched = False
        self._splice: splice.Splice | None = None
        self._request_ended = False
        self._answered = False
        #: the pod had read all of the request when it ended the connection
        self._taken = False

    # -- the handler's side

    def begin(self, handler: ResponseHandler, method: bytes, data: bytes, ended: bool) -> None:
        """
        Send a request: its head and what there is of its body.

        :param ended: that is all of it; else `send` and `end_request` follow.
        """
        self.handler = handler
        self._method = method
        self._request_ended = ended
        self._answered = False
        self._began = self.pool.now()
        self.pool.first_byte_timeouts.start(self, self._began)
        write_now(self.transport, data)

    def send(self, data: bytes) -> None:
        """Send more of the request's body."""
        if not self.lost:
            write_now(self.transport, data)

    def end_request(self, data: bytes = b"") -> None:
        """Send the last of the request's body."""
        self._request_ended = True
        if data:
            self.send(data)

    def pause(self) -> None:
        """Stop reading from the pod."""
        if not self.lost:
            self.pool.idle_timeouts.stop(self)
            self.transport.pauseProducing()

    def resume(self) -> None:
        """Read from the pod again."""
        if not self.lost:
            if self._answered and not self._switched:
                self.pool.idle_timeouts.start(self, self.pool.now())
            self.transport.resumeProducing()

    def splice_to(self, dest: ITransport, moved: Callable[[int], None]) -> None:
        """
        Let the kernel move the rest of the response's body to `dest`, if it can.

        `moved` is told of every piece. All that reaches the handler of the
        body is its end.
        """
        reader = self._reader
        if (
            splice.SUPPORTED
            and isinstance(reader, LengthReader)
            and reader.remaining > splice.THRESHOLD
            and is_plain(dest)
            and is_plain(self.transport)
        ):

            def note(count: int) -> None:
                reader.remaining -= count
                self.pool.idle_timeouts.start(self, self.pool.now())
                moved(count)

            def held(waits: bool) -> None:
                if waits:
                    self.pool.idle_timeouts.stop(self)
                elif not self.lost:
                    self.pool.idle_timeouts.start(self, self.pool.now())

            source = cast(Connection, self.transport)
            to = cast(Connection, dest)
            self._splice = splice.Splice(source, to, reader.remaining - 1, note, held)

    def _stop_splice(self) -> None:
        if self._splice is not None:
            self._splice.stop()
            self._splice = None

    def abort(self) -> None:
        """Close; the handler is not called any more."""
        self.handler = None
        self._stop_splice()
        if not self.lost:
            abort(self.transport)

    def end_output(self) -> None:
        """After an upgrade: send nothing more; the pod may go on."""
        if not self.lost:
            end_output(self.transport)

    def close(self) -> None:
        """Close once everything has been sent; the handler is not called any more."""
        self.handler = None
        if not self.lost:
            # A paused producer would keep the transport from closing.
            self.transport.unregisterProducer()
            close(self.transport)

    # -- the transport's side

    def connectionMade(self) -> None:
        """Get ready."""
        self.transport.setTcpNoDelay(True)
        if self.pool.dead_after is not None:
            detect_death(self.transport, self.pool.dead_after)
        self.transport.registerProducer(self, True)

    def pauseProducing(self) -> None:
        """Pass on that the pod reads too slowly."""
        if self.handler is not None:
            self.handler.pod_full()

    def resumeProducing(self) -> None:
        """Pass on that the pod has caught up."""
        if self.handler is not None:
            self.handler.pod_drained()

    def stopProducing(self) -> None:
        """Do nothing: connectionLost follows."""

    def readConnectionLost(self) -> None:
        """Take the end of the pod's bytes; after an upgrade ours may go on."""
        if self._switched and self.handler is not None:
            self.handler.pod_half_closed()
        elif self._reader is not None and self._reader.end_of_input():
            close(self.transport)
        else:
            self._taken = was_taken(self.transport)
            abort(self.transport)

    def writeConnectionLost(self) -> None:
        """Our own half-close is complete; nothing to do."""

    def connectionLost(self, reason: Failure | None = None) -> None:
        """End the exchange, well or badly."""
        self.lost = True
        self._stop_splice()
        self.pool.forget(self)
        reader, self._reader = self._reader, None
        handler, self.handler = self.handler, None
        if handler is None:
            return
        if reader is not None and reader.end_of_input():
            handler.pod_end(b"", [])
            return
        in_window = self.pool.now() - self._began < _STALE_WINDOW
        stale = self.used and not self._answered and not self._taken and in_window
        kind = StaleConnection if stale else PodDisconnected
        handler.pod_failed(kind(f"{self.address} closed the connection"))

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the pod."""
        if self.handler is None:
            # Nobody asked: whatever it is, the next request must not get it.
            abort(self.transport)
        elif self._reader is not None:
            self._read_body(self.handler, self._reader, data)
        else:
            if not self._answered:
                self._answered = True
                self.pool.first_byte_timeouts.stop(self)
            self._buffer = self._buffer + data if self._buffer else data
            try:
                self._read_heads(self.handler)
            except BadResponse as error:
                self._fail(error)

    def timed_out(self, what: str) -> None:
        """Give up on the pod."""
        self._fail(PodTimeout(f"{self.address}: {what}"))

    # -- inside

    def _fail(self, error: PodError) -> None:
        handler = self.handler
        self.abort()
        if handler is not None:
            handler.pod_failed(error)

    def _read_heads(self, handler: ResponseHandler) -> None:
        """Read 1xx heads, and then the final one."""
        while True:
            end = self._buffer.find(END_OF_HEAD)
            if end < 0:
                if len(self._buffer) > _MAX_HEAD:
                    raise BadResponse(f"the headers are longer than {_MAX_HEAD} bytes")
                self.pool.idle_timeouts.start(self, self.pool.now())
                return
            data, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
            head = parse_response_head(data)
            if head.status == 101:
                self.pool.stop_timeouts(self)
                rest, self._buffer = self._buffer, b""
                self._switched = True
                self._reader = UntilCloseReader()
                handler.pod_upgraded(head, rest)
                return
            if head.status >= 200:
                break
            handler.pod_interim(head)
            if self.handler is None:
                return
        self._head = head
        rest, self._buffer = self._buffer, b""
        if not head.has_body(self._method):
            self._complete(handler, head, b"", rest, [], first=True)
            return
        reader: BodyReader
        if head.chunked:
            reader = ChunkedReader()
        elif head.content_length is not None:
            reader = LengthReader(head.content_length)
        else:
            reader = UntilCloseReader()
        try:
            body = reader.feed(rest)
        except BadRequest as error:
            raise BadResponse(str(error)) from None
        if reader.rest is not None:
            self._complete(handler, head, body, reader.rest, reader.trailers, first=True)
        else:
            self._reader = reader
            self.pool.idle_timeouts.start(self, self.pool.now())
            handler.pod_head(head, body, False)

    def _read_body(self, handler: ResponseHandler, reader: BodyReader, data: bytes) -> None:
        try:
            body = reader.feed(data)
        except BadRequest as error:
            self._fail(BadResponse(str(error)))
            return
        if reader.rest is not None:
            assert self._head is not None
            self._complete(handler, self._head, body, reader.rest, reader.trailers, first=False)
        else:
            if not self._switched:
                self.pool.idle_timeouts.start(self, self.pool.now())
            if body:
                handler.pod_data(body)

    def _complete(
        self,
        handler: ResponseHandler,
        head: ResponseHead,
        body: bytes,
        rest: bytes,
        trailers: list[Field],
        *,
        first: bool,
    ) -> None:
        """End the exchange. The connection is back in the pool before the handler hears of it."""
        self._reader = None
        self._head = None
        self.handler = None
        self.used = True
        self.pool.stop_timeouts(self)
        if head.keep_alive and not rest and self._request_ended:
            self.pool.give(self)
        else:
            self.abort()
        if first and not trailers:
            handler.pod_head(head, body, True)
        else:
            if first:
                handler.pod_head(head, b"", False)
            handler.pod_end(body, trailers)
