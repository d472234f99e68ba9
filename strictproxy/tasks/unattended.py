"""
Requests that nobody waits for at the other end of a connection.

To an exchange they are requests like any other (`strictproxy.http.request.Request`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import ITransport

from strictproxy.errors import ProxyError
from strictproxy.http.heads import Field, RequestHead
from strictproxy.http.peer import Peer
from strictproxy.http.request import RequestHandler
from strictproxy.http.spool import StoredBody
from strictproxy.http.transport import IStreamTransport
from strictproxy.scheduling import Address


class UnattendedRequest:
    """
    A request whose body is there already; subclasses take the answer.

    :param stored: its body; closed by whoever reads it.
    """

    body_ended = True
    keep = 0
    read_ahead = 0
    transport: IStreamTransport | None = None

    def __init__(self, head: RequestHead, stored: StoredBody, peer: Peer, client: str) -> None:
        self.head = head
        self.handler: RequestHandler | None = None
        self.stored: StoredBody | None = stored
        self.task_id: str | None = None
        self._origin = peer, client
        self.before_pod: Callable[[Address], Deferred[None]] = lambda _: succeed(None)
        self.not_reached: Callable[[], None] | None = None
        self.trailers: list[Field] = []
        self.status = 0
        self.bytes_sent = 0
        #: header lines of the answer
        self.lines: list[bytes] = []

    def origin(self) -> tuple[Peer, str]:
        """Return who sent it, and the client's address."""
        return self._origin

    def limit_body(self, max_body: int | None) -> None:
        """Do nothing: the body has been accepted."""

    def open_body(self) -> bytes:
        """Return nothing: the body is stored."""
        return b""

    def splice_to(self, dest: ITransport) -> None:
        """Do nothing."""

    def pause(self) -> None:
        """Do nothing: nothing comes."""

    def resume(self) -> None:
        """Do nothing."""

    def send_interim(self, status: int, reason: bytes, lines: list[bytes]) -> None:
        """Do nothing: nobody waits."""

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
        """Take the head of the answer, and the first of its body."""
        self.status, self.lines = status, lines
        self.send(data)
        if ended:
            self.end()

    def send(self, data: bytes) -> None:
        """Take more of the answer's body; subclasses say where to."""
        raise NotImplementedError

    def end(self, data: bytes = b"", trailers: list[Field] | None = None) -> None:
        """Take the end of the answer."""
        raise NotImplementedError

    def last_on_connection(self) -> None:
        """Do nothing: there is none."""

    def switch(self, lines: list[bytes], data: bytes) -> None:
        """Refuse: it has asked for no upgrade, so that cannot be."""
        raise AssertionError("a request that nobody waits for cannot be upgraded")

    def end_output(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Run(Protocol):
    """One try to have a request answered: an exchange."""

    number: int

    def start(self) -> None:
        """Ask for a slot."""

    def abandon(self, error: ProxyError) -> None:
        """End it."""

    def withdraw(self) -> None:
        """Leave the line; it will come again."""
