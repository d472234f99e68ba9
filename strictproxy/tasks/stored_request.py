"""A request whose body is in a file and whose answer goes into one: a detached one, at its turn."""

from __future__ import annotations

from typing import Protocol

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from strictproxy.errors import ProxyError, TaskStoreFailed
from strictproxy.http.heads import Field, RequestHead
from strictproxy.http.peer import Peer
from strictproxy.http.spool import Spool, StoredBody
from strictproxy.scheduling import Address
from strictproxy.tasks.record import DetachedRecord
from strictproxy.tasks.unattended import UnattendedRequest


class AnswerTaker(Protocol):
    """Whoever gave the request, and takes the answer."""

    def before_pod(self, address: Address) -> Deferred[None]:
        """Do what has to be done before a pod may see the request."""

    def not_reached(self) -> None:
        """Note that the pod has not seen it; it waits for another one."""

    def takes(self, size: int) -> None:
        """Allow so many more bytes of the answer. Raises `ProxyError`."""

    def answered(self, status: int, lines: list[bytes]) -> None:
        """Take the whole answer; its body is in the file."""

    def failed(self, error: ProxyError) -> None:
        """Note that there is no answer, or none that could be kept."""


def head_of(record: DetachedRecord) -> RequestHead:
    """Return the head of a detached request, as it came but for what ends at the first hop."""
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in record.fields]
    fields = [(name.lower(), name, value) for name, value in encoded]
    head = RequestHead(
        record.method.encode("latin-1"), record.target.encode("latin-1"), fields, True, True
    )
    head.host = record.host.encode("latin-1")
    head.content_length = record.body_size
    return head


class StoredRequest(UnattendedRequest):
    """
    A detached request while it waits for its turn and while a pod has it.

    :param stored: its body; closed by whoever reads it.
    :param result: takes the body of the answer; closed here.
    """

    def __init__(
        self, record: DetachedRecord, stored: StoredBody, result: Spool, taker: AnswerTaker
    ) -> None:
        super().__init__(head_of(record), stored, Peer(*record.peer), record.client)
        self.task_id = record.short
        self.before_pod = taker.before_pod
        self.not_reached = taker.not_reached
        self._taker = taker
        self._result = result
        self._ended = False
        self._closed = False
        result.stored.addCallbacks(self._kept, self._not_kept)

    def send(self, data: bytes) -> None:
        """Take more of the body."""
        if self._closed or not data:
            return
        try:
            self._taker.takes(len(data))
        except ProxyError as error:
            self._give_up(error)
            return
        self.bytes_sent += len(data)
        self._result.write(data)

    def end(self, data: bytes = b"", trailers: list[Field] | None = None) -> None:
        """Take the last of the body; once it is on the disk there is an answer."""
        self.send(data)
        if not self._closed:
            self._ended = True
            self._result.finish()

    def fail(
        self, error: ProxyError, retry_after: float | None = None, identity: bytes = b""
    ) -> None:
        """Note that there will be no answer, or not the rest of it."""
        self.status = error.status
        self._drop(error)

    def _drop(self, error: ProxyError) -> None:
        self._closed = True
        # Not before it is certain that nothing will be written any more.
        self._result.close(lambda: self._taker.failed(error))

    def close(self) -> None:
        """Let go of the file."""
        self._closed = True
        self._result.close()

    def _give_up(self, error: ProxyError) -> None:
        if self._ended or self.handler is None:
            # The exchange is over: the slot is somebody else's already.
            self._drop(error)
        else:
            self.handler.client_failed(error)

    def _kept(self, _: None) -> None:
        self.close()
        self._taker.answered(self.status, self.lines)

    def _not_kept(self, failure: Failure) -> None:
        self._give_up(TaskStoreFailed(f"the result cannot be written: {failure.getErrorMessage()}"))
