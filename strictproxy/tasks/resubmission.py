"""
Submitting a job again whose pod is gone: its client knows it by the same id all the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from strictproxy.errors import ProxyError
from strictproxy.http.heads import Field, RequestHead
from strictproxy.http.peer import Peer
from strictproxy.http.spool import StoredBody
from strictproxy.tasks.unattended import UnattendedRequest


@dataclass(slots=True)
class KeptSubmit:
    """A submit call as it came. Whoever has it closes its body."""

    head: RequestHead
    body: StoredBody
    trailers: list[Field]
    peer: Peer
    client: str


class Resubmission(UnattendedRequest):
    """
    The submit call of a task that was lost, once more.

    :param over: called when it has been answered, or with what went wrong. There is
        a task by then, if the answer says that there is.
    """

    def __init__(
        self, submit: KeptSubmit, task_id: str, over: Callable[[ProxyError | None], None]
    ) -> None:
        super().__init__(submit.head, submit.body, submit.peer, submit.client)
        self.trailers = submit.trailers
        self.task_id = task_id
        self._over = over

    def send(self, data: bytes) -> None:
        """Do nothing: the client has had its answer."""

    def end(self, data: bytes = b"", trailers: list[Field] | None = None) -> None:
        """Note that there is an answer."""
        self._over(None)

    def fail(
        self, error: ProxyError, retry_after: float | None = None, identity: bytes = b""
    ) -> None:
        """Note that there is none."""
        self.status = error.status
        self._over(error)
