"""
A request's body on its way from the client to the pod.

It streams as it comes, once there is a connection; or it is received whole
first (a spool). As long as what was sent could be sent again, it is kept, so
that another connection can begin from the start.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from strictproxy.http.framing import encode_chunk, encode_last_chunk
from strictproxy.http.heads import Field
from strictproxy.http.pod_connection import PodConnection
from strictproxy.http.request import Request
from strictproxy.http.spool import Spool, StoredBody


class Upload:
    """
    The body of one request; its exchange owns it and closes it.

    :param stored: the whole body, if it is there, or a spool that will `receive` it;
        None to stream it.
    :param keep: bytes kept for sending again, of a streamed body.
    :param broken: called when what is stored cannot be read.
    """

    __slots__ = (
        "_broken",
        "_connection",
        "_full",
        "_keep",
        "_kept",
        "_kept_size",
        "_request",
        "_resume_at",
        "_spool",
        "_stored",
    )

    def __init__(
        self,
        request: Request,
        stored: StoredBody | None,
        keep: int,
        broken: Callable[[Failure], None],
    ) -> None:
        self._request = request
        self._stored = stored
        #: what receives it, as long as it comes
        self._spool: Spool | None = None
        self._keep = keep
        self._broken = broken
        self._connection: PodConnection | None = None
        #: what has been sent; None when it could not be sent again
        self._kept: list[bytes] | None = []
        self._kept_size = 0
        self._full = False
        #: where to go on in the spool's file once the pod has caught up
        self._resume_at: int | None = None

    @property
    def repeatable(self) -> bool:
        """Whether the whole of it, as far as it has come, can be sent once more."""
        return self._kept is not None

    # -- from the client

    def receive(self, spool: Spool) -> Deferred[None]:
        """
        Receive the body whole.

        :return: fires when there is all of it; fails with OSError if it
            cannot be kept.
        """
        request = self._request
        self._spool = spool
        if request.head.expects_continue:
            # There is nobody else who could say it, and the pod need not be asked.
            request.send_interim(100, b"Continue", [])
            request.head.fields = [f for f in request.head.fields if f[0] != b"expect"]
        spool.write(request.open_body())
        if request.body_ended:
            spool.finish()
        return spool.stored

    def data(self, data: bytes) -> None:
        """Take more of the body."""
        if self._spool is not None:
            self._spool.write(data)
            return
        connection = self._connection
        if self._kept is not None:
            self._kept.append(data)
            self._kept_size += len(data)
        if connection is None:
            return  # between two tries; the next one begins with what is kept
        if self._kept_size > self._keep:
            self._kept = None
        connection.send(self._frame(data))
        self._splice()

    def end(self, trailers: list[Field]) -> None:
        """Take the end of the body."""
        if self._spool is not None:
            self._spool.finish()
        elif self._connection is not None:
            self._connection.end_request(self._last(trailers))

    # -- to the pod

    def attach(self, connection: PodConnection) -> tuple[bytes, bool]:
        """
        Begin, from the start, on a connection.

        :return: what is to follow the head at once, and whether that is all.
            Call `go_on` when it has been sent.
        """
        request, stored = self._request, self._stored
        self._connection = connection
        self._full = False
        if stored is None:
            body = b"".join(self._kept or ()) + request.open_body()
            if self._kept is not None:
                self._kept, self._kept_size = [body], len(body)
            ended = request.body_ended
        else:
            body = stored.memory() if stored.in_memory else b""
            ended = stored.in_memory
        first = self._frame(body) if body else b""
        return (first + self._last(request.trailers) if ended else first), ended

    def go_on(self) -> None:
        """Send what there is besides what `attach` returned."""
        if self._stored is not None and not self._stored.in_memory:
            self._send_from_file(0)
        else:
            self._splice()

    def detach(self) -> None:
        """Note that the connection is gone; what comes meanwhile is kept."""
        self._connection = None
        self._request.pause()

    def answered(self) -> None:
        """Note that the pod has answered, so that nothing will be sent again."""
        self._kept = None

    def full(self) -> None:
        """Wait: the pod does not read as fast as it is sent to."""
        self._full = True
        self._request.pause()

    def drained(self) -> None:
        """Go on."""
        self._full = False
        self._request.resume()
        position, self._resume_at = self._resume_at, None
        if position is not None:
            self._send_from_file(position)

    def take_stored(self) -> StoredBody | None:
        """Return what is stored, which is the caller's to close from now on."""
        stored, self._stored, self._spool = self._stored, None, None
        return stored

    def close(self) -> None:
        """Let go of everything; nothing is called any more."""
        self._connection = None
        self._kept = None
        if self._stored is not None:
            self._stored.close()

    def _send_from_file(self, position: int) -> None:
        stored, connection = self._stored, self._connection
        if stored is None or connection is None:
            return
        if self._full:
            self._resume_at = position
            return

        def read(data: bytes) -> None:
            if self._connection is not connection:
                return
            if data:
                connection.send(self._frame(data))
                self._send_from_file(position + len(data))
            else:
                connection.end_request(self._last(self._request.trailers))

        stored.read(position).addCallback(read).addErrback(self._broken)

    def _splice(self) -> None:
        # Not while what is sent has to be kept: spliced bytes are never seen.
        if self._kept is None and self._connection is not None and self._stored is None:
            self._request.splice_to(self._connection.transport)

    def _frame(self, data: bytes) -> bytes:
        return encode_chunk(data) if self._request.head.chunked else data

    def _last(self, trailers: list[Field]) -> bytes:
        return encode_last_chunk(trailers) if self._request.head.chunked else b""
