"""
Slots that may be in use still after a crash.

Many services go on with a request although whoever sent it is gone. So the slot
of a detached request that was running can be held for a while after a restart.
That it is held is in the task's record, so that it still is after one more crash.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from strictproxy.errors import ProxyError, ShuttingDown
from strictproxy.scheduling import Address
from strictproxy.tasks.detached_task import DetachedTask
from strictproxy.tasks.record import HeldSlot
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
        task: DetachedTask,
        slot: HeldSlot,
        upstream: Upstream,
        number: int,
        clock: IReactorTime,
        left: Callable[[Aftermath], None],
    ) -> None:
        record = task.record
        self.number = number
        self.client = record.client
        self.identity = record.request_id.encode("latin-1")
        self.task_id: str | None = record.short
        self.upstream = upstream
        self._left = left
        self._task = task
        self._slot = slot
        address = Address(slot.host, slot.port)
        self._lease = upstream.adopt(record.route, address, self)
        # However the clock of the machine was set meanwhile.
        seconds = min(slot.until - clock.seconds(), record.hold_interrupted)
        self._timer = clock.callLater(seconds, self._over)
        _log.info(
            "{pod} may still be at work on {task}: its slot is held for {seconds:g} s",
            pod=address,
            task=record.short,
            seconds=seconds,
        )

    def abandon(self, error: ProxyError) -> None:
        """Give the slot back now; if the proxy is going to end, the next one holds it again."""
        if not self._timer.active():
            return
        self._timer.cancel()
        if isinstance(error, ShuttingDown):
            self._end()
        else:
            self._over()

    def _over(self) -> None:
        self._task.let_go(self._slot)
        self._end()

    def _end(self) -> None:
        self._left(self)
        self.upstream.release(self._lease)
