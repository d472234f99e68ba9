"""
Slots that may be in use still after a crash.

Many services go on with a request although whoever sent it is gone. So the slot
of a detached request that was running can be held for a while after a restart.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from strictproxy.errors import ProxyError
from strictproxy.scheduling import Address
from strictproxy.tasks.record import DetachedRecord
from strictproxy.upstream import Upstream

_log = Logger()


class Aftermath:
    """
    The slot of one request that a crash interrupted; it is given back by itself.

    :param left: called when it has been.
    """

    kept_bytes = 0

    def __init__(
        self,
        record: DetachedRecord,
        upstream: Upstream,
        number: int,
        clock: IReactorTime,
        left: Callable[[Aftermath], None],
    ) -> None:
        assert record.pod is not None
        self.number = number
        self.client = record.client
        self.identity = record.request_id.encode("latin-1")
        self.task_id: str | None = record.short
        self.upstream = upstream
        self._left = left
        address = Address(*record.pod)
        self._lease = upstream.adopt(record.route, address, self)
        self._timer = clock.callLater(record.hold_interrupted, self._end)
        _log.info(
            "{pod} may still be at work on {task}: its slot is held for {seconds:g} s",
            pod=address,
            task=record.short,
            seconds=record.hold_interrupted,
        )

    def abandon(self, error: ProxyError) -> None:
        """Give the slot back now."""
        if self._timer.active():
            self._timer.cancel()
            self._end()

    def _end(self) -> None:
        self._left(self)
        self.upstream.release(self._lease)
