"""Answers of our own to requests that no pod is needed for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from strictproxy.errors import ProxyError
from strictproxy.http.heads import Field
from strictproxy.http.problems import reason_phrase
from strictproxy.http.request import ClientRequest
from strictproxy.http.spool import PIECE, StoredBody

_log = Logger()


class Reply:
    """
    Answers one request. Its body, if there is one, is dropped.

    :param act: called once the whole request has come; it answers, at once or later.
    """

    def __init__(self, request: ClientRequest, act: Callable[[Reply], None]) -> None:
        self.request = request
        #: the client has left
        self.gone = False
        #: the client reads more slowly than it is sent to
        self.full = False
        #: called when the client leaves, and when it has caught up
        self.on_gone: Callable[[], None] | None = None
        self.on_drained: Callable[[], None] | None = None
        self._act = act
        request.handler = self
        if request.body_ended:
            self._begin()
            return
        if request.head.expects_continue:
            request.send_interim(100, b"Continue", [])
        request.open_body()

    def _begin(self) -> None:
        try:
            self._act(self)
        except ProxyError as error:
            self.fail(error)

    def send(self, status: int, lines: Iterable[bytes] = (), body: bytes = b"") -> None:
        """Answer with a body that is there."""
        has_body = status not in (204, 304)
        length = [b"Content-Length: %d\r\n" % len(body)] if has_body else []
        self.request.send_head(
            status,
            reason_phrase(status),
            [*lines, *length],
            has_body=has_body and self.request.head.method != b"HEAD",
            framed=True,
            data=body,
            ended=True,
        )

    def fail(self, error: ProxyError, retry_after: float | None = None) -> None:
        """Answer with an error."""
        self.request.fail(error, retry_after)

    # -- see `RequestHandler`

    def client_data(self, data: bytes) -> None:
        """Drop it."""

    def client_end(self, trailers: list[Field]) -> None:
        """Answer."""
        self._begin()

    def client_failed(self, error: ProxyError) -> None:
        """Say what is wrong with the request."""
        self.fail(error)

    def client_full(self) -> None:
        """Send no more for now."""
        self.full = True

    def client_drained(self) -> None:
        """Send on."""
        self.full = False
        if self.on_drained is not None:
            self.on_drained()

    def client_gone(self) -> None:
        """Stop."""
        self.gone = True
        if self.on_gone is not None:
            self.on_gone()


class FileReply:
    """
    Answers with a part of a body that is in a file.

    :param body: closed here, in any case.
    :param first: position of the first byte to send; `last` that behind the last one.
    """

    def __init__(self, reply: Reply, body: StoredBody, first: int, last: int) -> None:
        self._reply = reply
        self._body = body
        self._position = first
        self._last = last
        self._waiting = False

    def start(self, status: int, reason: bytes, lines: list[bytes]) -> Deferred[None]:
        """
        Send the head, and go on by itself.

        :param lines: all header lines but Content-Length.
        :return: fires when the head has been sent; fails with OSError, with nothing
            sent, if the file cannot be read.
        """

        def begin(data: bytes) -> None:
            if len(data) < min(PIECE, self._last - self._position):
                raise OSError("the file is shorter than it was")
            reply = self._reply
            self._position += len(data)
            ended = self._position >= self._last
            reply.request.send_head(
                status,
                reason,
                [*lines, b"Content-Length: %d\r\n" % size],
                has_body=True,
                framed=True,
                data=data,
                ended=ended,
            )
            if ended or reply.gone:
                self._body.close()
            else:
                reply.on_gone = self._body.close
                reply.on_drained = self._drained
                self._next()

        def failed(failure: Failure) -> Failure:
            self._body.close()
            return failure

        size = self._last - self._position
        return (
            self._body.read(self._position, min(PIECE, size)).addCallback(begin).addErrback(failed)
        )

    def _next(self) -> None:
        if self._reply.full:
            self._waiting = True
            return
        piece = self._body.read(self._position, min(PIECE, self._last - self._position))
        piece.addCallback(self._send).addErrback(self._failed)

    def _drained(self) -> None:
        if self._waiting:
            self._waiting = False
            self._next()

    def _send(self, data: bytes) -> None:
        if self._reply.gone:
            return
        if not data:
            raise OSError("the file is shorter than it was")
        self._position += len(data)
        if self._position >= self._last:
            self._body.close()
            self._reply.request.end(data)
        else:
            self._reply.request.send(data)
            self._next()

    def _failed(self, failure: Failure) -> None:
        _log.error("a result cannot be read: {reason}", reason=failure.getErrorMessage())
        self._body.close()
        self._reply.request.abort()
