"""
A request as its handler sees it: reading its body, and answering.

Owns what is read ahead of a body and how the answer is framed. The connection
is the channel's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import ITransport

from strictproxy.errors import BodyTooLarge, ProxyError
from strictproxy.http.framing import encode_chunk, encode_last_chunk
from strictproxy.http.heads import Field, RequestHead
from strictproxy.http.peer import Peer, client_address
from strictproxy.http.problems import problem_body, problem_fields, reason_phrase
from strictproxy.http.spool import StoredBody
from strictproxy.http.transport import IStreamTransport, end_output
from strictproxy.scheduling import Address

if TYPE_CHECKING:
    from strictproxy.http.channel import ServerChannel


class RequestHandler(Protocol):
    """Whoever answers a `ClientRequest`; called from the channel."""

    def client_data(self, data: bytes) -> None:
        """Take body bytes; only after `open_body`."""

    def client_end(self, trailers: list[Field]) -> None:
        """Note the end of the body; only after `open_body`."""

    def client_failed(self, error: ProxyError) -> None:
        """Note that the rest of the body will not come; the client can still be answered."""

    def client_gone(self) -> None:
        """Note that the client has closed the connection; nothing can be sent any more."""

    def client_full(self) -> None:
        """Stop sending: the client reads more slowly than it is sent to."""

    def client_drained(self) -> None:
        """Go on sending."""


class Request(Protocol):
    """
    What an exchange needs of a request: to read its body, and to answer it.

    Whether somebody waits for the answer at the other end of a connection is
    not its business.
    """

    head: RequestHead
    handler: RequestHandler | None
    #: status and body bytes sent, for the access log
    status: int
    bytes_sent: int
    body_ended: bool
    trailers: list[Field]

    @property
    def stored(self) -> StoredBody | None:
        """The body, if it is there already, whole."""

    @property
    def before_pod(self) -> Callable[[Address], Deferred[None]] | None:
        """
        What has to be done before a pod may see the request.

        There is something if nobody sits and waits for the answer; then it is
        patient in the line, too.
        """

    @property
    def not_reached(self) -> Callable[[], None] | None:
        """What has to be done when the pod could not be reached after all; see `before_pod`."""

    @property
    def task_id(self) -> str | None:
        """What people may call it by, if it is a task."""

    def origin(self) -> tuple[Peer, str]:
        """Return who is, or was, at the other end of the connection, and the client's address."""

    @property
    def keep(self) -> int:
        """Bytes of a streamed body to keep, to send them again."""

    @property
    def read_ahead(self) -> int:
        """Bytes of the body that have been read and not been asked for."""

    @property
    def transport(self) -> IStreamTransport | None:
        """The client's connection, while it is there."""

    def limit_body(self, max_body: int | None) -> None:
        """Refuse a longer body. Raises `BodyTooLarge`."""

    def open_body(self) -> bytes:
        """Return what was read ahead; from now on the handler gets the body as it arrives."""

    def splice_to(self, dest: ITransport) -> None:
        """Let the kernel move the rest of the body, if it can."""

    def pause(self) -> None:
        """Read no more of the body for now."""

    def resume(self) -> None:
        """Read on."""

    def send_interim(self, status: int, reason: bytes, lines: list[bytes]) -> None:
        """Send a 1xx response."""

    def send_head(
        self,
        status: int,
        reason: bytes,
        lines: list[bytes],
        *,
        has_body: bool,
        framed: bool,
        data: bytes = b"",
        ended: bool = False,
    ) -> None:
        """Send the response's head; see `ClientRequest.send_head`."""

    def send(self, data: bytes) -> None:
        """Send body bytes."""

    def end(self, data: bytes = b"", trailers: list[Field] | None = None) -> None:
        """End the response."""

    def fail(
        self, error: ProxyError, retry_after: float | None = None, identity: bytes = b""
    ) -> None:
        """Answer with an error."""

    def last_on_connection(self) -> None:
        """Let the connection end with this answer: the rest of the body is not read."""

    def switch(self, lines: list[bytes], data: bytes) -> None:
        """Send a 101 response."""

    def end_output(self) -> None:
        """Send nothing more."""

    def close(self) -> None:
        """Close once everything has been sent."""


class ClientRequest:
    """
    A request being read and answered.

    The handler sets `handler`, answers with `send_head`, `send` and `end` (or
    `fail`), and reads the body after `open_body`. Calls after the client has
    gone do nothing.
    """

    __slots__ = (
        "_ahead",
        "_ahead_size",
        "_body_open",
        "_chunked",
        "_received",
        "body_ended",
        "bytes_sent",
        "channel",
        "handler",
        "head",
        "head_sent",
        "max_body",
        "status",
        "trailers",
    )

    # See `Request`: somebody waits for the answer.
    stored: ClassVar[None] = None
    before_pod: ClassVar[None] = None
    not_reached: ClassVar[None] = None
    task_id: ClassVar[None] = None

    def __init__(self, channel: ServerChannel, head: RequestHead, max_body: int | None) -> None:
        self.channel: ServerChannel | None = channel
        self.head = head
        self.handler: RequestHandler | None = None
        self.max_body = max_body
        self.body_ended = not head.has_body
        self.trailers: list[Field] = []
        #: status and body bytes sent, for the access log
        self.status = 0
        self.bytes_sent = 0
        self.head_sent = False
        self._chunked = False
        self._body_open = False
        self._ahead: list[bytes] = []
        self._ahead_size = 0
        self._received = 0

    def origin(self) -> tuple[Peer, str]:
        """Return who is at the other end, and the client's address; while it is there."""
        channel = self.channel
        assert channel is not None
        peer = channel.peer
        return peer, client_address(self.head, peer, channel.site.is_trusted)

    @property
    def keep(self) -> int:
        """Bytes of a streamed body to keep, to send them again; while the client is there."""
        assert self.channel is not None
        return self.channel.site.read_ahead

    # -- reading

    def limit_body(self, max_body: int | None) -> None:
        """
        Refuse a body longer than `max_body`.

        :raise BodyTooLarge: at once, if the length is known.
        """
        self.max_body = max_body
        length = self.head.content_length
        if max_body is not None and length is not None and length > max_body:
            raise BodyTooLarge(f"the body has {length} bytes; at most {max_body} are allowed")

    @property
    def read_ahead(self) -> int:
        """Bytes of the body that have been read and not been asked for."""
        return self._ahead_size

    def open_body(self) -> bytes:
        """Return what was read ahead; from now on the handler gets the body as it arrives."""
        self._body_open = True
        data = b"".join(self._ahead)
        self._ahead.clear()
        self._ahead_size = 0
        self.resume()
        return data

    @property
    def transport(self) -> IStreamTransport | None:
        """The client's connection, while it is there."""
        return None if self.channel is None else self.channel.transport

    def splice_to(self, dest: ITransport) -> None:
        """Let the kernel move the rest of the body to `dest`, if it can; its end comes as ever."""
        if self.channel is not None:
            self.channel.splice_to(dest)

    def pause(self) -> None:
        """Stop reading from the client."""
        if self.channel is not None:
            self.channel.pause_reading()

    def resume(self) -> None:
        """Read from the client again."""
        if self.channel is not None:
            self.channel.resume_reading()

    def body_received(self, data: bytes, limit: int) -> None:
        """Take body bytes from the channel; `limit` is the read-ahead."""
        self._received += len(data)
        if self.max_body is not None and self._received > self.max_body:
            raise BodyTooLarge(f"the body is longer than {self.max_body} bytes")
        if self._body_open and self.handler is not None:
            self.handler.client_data(data)
            return
        self._ahead.append(data)
        self._ahead_size += len(data)
        if self._ahead_size >= limit:
            self.pause()

    def body_complete(self, trailers: list[Field]) -> None:
        """Take the end of the body from the channel."""
        self.body_ended = True
        self.trailers = trailers
        if self._body_open and self.handler is not None:
            self.handler.client_end(trailers)

    # -- answering

    def send_interim(self, status: int, reason: bytes, lines: list[bytes]) -> None:
        """Send a 1xx response; HTTP/1.0 clients do not get it (RFC 9110, 15.2)."""
        if self.channel is not None and self.head.http_1_1:
            start = b"HTTP/1.1 %d %b\r\n" % (status, reason)
            self.channel.write(b"".join([start, *lines, b"\r\n"]))
            if status == 100:
                self.channel.expect_body()

    def send_head(
        self,
        status: int,
        reason: bytes,
        lines: list[bytes],
        *,
        has_body: bool,
        framed: bool,
        data: bytes = b"",
        ended: bool = False,
    ) -> None:
        """
        Send the response's head, and the first of its body in the same write.

        :param lines: header lines; those about framing and the connection are
            added here, but for Content-Length, which is among `lines` if known.
        :param framed: a Content-Length is among `lines`.
        :param ended: `data` is all of the body.
        """
        self.head_sent = True
        self.status = status
        channel = self.channel
        if channel is None:
            return
        http_1_1 = self.head.http_1_1
        out = [b"HTTP/1.1 %d %b\r\n" % (status, reason), *lines]
        if has_body and not framed:
            if http_1_1:
                self._chunked = True
                out.append(b"Transfer-Encoding: chunked\r\n")
            else:
                channel.keep_alive = False
        if not channel.keep_alive:
            out.append(b"Connection: close\r\n")
        elif not http_1_1:
            out.append(b"Connection: keep-alive\r\n")
        out.append(b"\r\n")
        if has_body and data:
            self.bytes_sent = len(data)
            out.append(encode_chunk(data) if self._chunked else data)
        if ended and self._chunked:
            out.append(encode_last_chunk([]))
        channel.write(b"".join(out))
        if ended:
            self._finish()

    def send(self, data: bytes) -> None:
        """Send body bytes."""
        self.bytes_sent += len(data)
        if self.channel is not None and data:
            self.channel.write(encode_chunk(data) if self._chunked else data)

    def end(self, data: bytes = b"", trailers: list[Field] | None = None) -> None:
        """End the response, with the last of its body and the trailers, where framing has them."""
        self.bytes_sent += len(data)
        channel = self.channel
        if channel is None:
            return
        if self._chunked:
            last = encode_last_chunk(trailers or [])
            channel.write(encode_chunk(data) + last if data else last)
        elif data:
            channel.write(data)
        self._finish()

    def fail(
        self, error: ProxyError, retry_after: float | None = None, identity: bytes = b""
    ) -> None:
        """Answer with a problem document or, if the answer has begun, cut it off visibly."""
        if self.channel is None:
            return
        if self.head_sent:
            self.channel.abort()
            return
        if not self.body_ended:
            self.channel.keep_alive = False
        body = problem_body(error, identity.decode())
        self.send_head(
            error.status,
            reason_phrase(error.status),
            problem_fields(error, body, retry_after),
            has_body=self.head.method != b"HEAD",
            framed=True,
            data=body,
            ended=True,
        )

    def last_on_connection(self) -> None:
        """Let the connection end with this answer: the rest of the body is not read."""
        if self.channel is not None:
            self.channel.keep_alive = False

    def abort(self) -> None:
        """Close the client's connection without ending the response."""
        if self.channel is not None:
            self.channel.abort()

    def switch(self, lines: list[bytes], data: bytes) -> None:
        """
        Send a 101 response; from now on the connection carries bytes without framing.

        The handler gets the client's by `client_data` and their end by
        `client_end`; `send` sends, `end_output` ends our side alone, and
        `close` everything.
        """
        self.status = 101
        self.head_sent = True
        self._body_open = True
        if self.channel is not None:
            self.channel.write(
                b"".join([b"HTTP/1.1 101 Switching Protocols\r\n", *lines, b"\r\n", data])
            )
            self.channel.switch()

    def end_output(self) -> None:
        """Send nothing more; the client may go on."""
        if self.channel is not None:
            end_output(self.channel.transport)

    def close(self) -> None:
        """Close the client's connection once everything has been sent."""
        channel, self.channel = self.channel, None
        self.handler = None
        if channel is not None:
            channel.close()

    def _finish(self) -> None:
        channel, self.channel = self.channel, None
        self.handler = None
        self._ahead.clear()
        if channel is not None:
            channel.request_done(self)
