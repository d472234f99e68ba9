"""One detached request: its record, and what happens with it now."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure

from strictproxy.errors import ProxyError, ResultTooLarge, TaskNotRecorded
from strictproxy.scheduling import Address
from strictproxy.tasks import unattended
from strictproxy.tasks.record import DetachedRecord, DetachedState, HeldSlot
from strictproxy.tasks.store import ITaskStore, StoreError
from strictproxy.upstream import Upstream

#: Where clients ask about their tasks, on the listeners for traffic.
TASKS_PATH = "/.strictproxy/tasks"
#: After something that may pass by, the first pause and the longest one, seconds.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
#: Clients are told to look again after so many seconds.
_SOONEST_LOOK, _LATEST_LOOK = 1, 60


class TaskOwner(Protocol):
    """Whoever keeps the tasks."""

    clock: IReactorTime
    store: ITaskStore
    #: bytes of all bodies and results
    size: int

    def save(self, task: DetachedTask) -> None:
        """Write down how a task is now; that may fail."""

    def make_room(self, size: int) -> None:
        """Take room for so many bytes. Raises `TaskStoreFull`."""

    def settle(self, task: DetachedTask, state: DetachedState, **changes: Any) -> None:
        """Write down what became of a task."""

    def failed(self, task: DetachedTask, error: ProxyError) -> None:
        """Put a task back into the line, or end it."""


class Run(unattended.Run, Protocol):
    """One try to have a request answered: an exchange."""

    upstream: Upstream | None


class DetachedTask:
    """One detached request: its record, and what happens with it now."""

    __slots__ = (
        "_counted",
        "_owner",
        "failures",
        "record",
        "run",
        "settling",
        "timer",
        "watchers",
    )

    def __init__(self, owner: TaskOwner, record: DetachedRecord) -> None:
        self._owner = owner
        self.record = record
        #: this run is among its attempts
        self._counted = False
        #: None while there is none, as between two tries
        self.run: Run | None = None
        self.timer: IDelayedCall | None = None
        #: what became of it is being written
        self.settling = False
        #: things that went wrong in a row, of the kind that passes by
        self.failures = 0
        #: called at each change, with nothing
        self.watchers: set[Callable[[], None]] = set()

    def __str__(self) -> str:
        return f"detached request {self.record.short} of route {self.record.route}"

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.record.state.ended

    def place(self) -> tuple[int, float | None] | None:
        """Return its place in the line, and likely seconds until its turn, if it waits."""
        run = self.run
        if run is None or run.upstream is None or self.record.state is not DetachedState.QUEUED:
            return None
        return run.upstream.place(run.number)

    def describe(self) -> dict[str, Any]:
        """Return what is told about it."""
        record = self.record
        description = record.description(self._owner.clock.seconds())
        description["location"] = f"{TASKS_PATH}/{record.id}"
        if record.state is DetachedState.DONE:
            description["result"] = f"{TASKS_PATH}/{record.id}/result"
        place = self.place()
        if place is not None:
            description["position"], seconds = place
            description["starts_in"] = None if seconds is None else round(seconds, 1)
        return description

    def ask_again_after(self) -> int:
        """Return in how many seconds a look may be worth it."""
        place = self.place()
        seconds = None if place is None else place[1]
        return max(_SOONEST_LOOK, min(ceil(seconds or 0), _LATEST_LOOK))

    # -- see `AnswerTaker`

    def before_pod(self, address: Address) -> Deferred[None]:
        """Write down that a pod will have it."""
        record = self.record
        record.state = DetachedState.RUNNING
        record.pod = (address.host, address.port)
        record.started = self._owner.clock.seconds()
        if not self._counted:
            # However many pods refuse it, or it moves to: it is one attempt.
            self._counted = True
            record.attempts += 1
        stored = self._owner.store.put_detached(record.document())
        return stored.addCallbacks(lambda _: self.changed(), _not_recorded)

    def not_reached(self) -> None:
        """Write down that the pod has not seen it; it waits for another one."""
        self.record.state, self.record.pod = DetachedState.QUEUED, None
        self._owner.save(self)
        self.changed()

    def takes(self, size: int) -> None:
        """Allow so many more bytes of the answer."""
        record = self.record
        if record.result_size + size > record.max_result:
            raise ResultTooLarge(f"it is longer than the {record.max_result} bytes allowed")
        self._owner.make_room(size)
        record.result_size += size

    def answered(self, status: int, lines: list[bytes]) -> None:
        """Write down that there is an answer."""
        self.run = None
        self._owner.settle(
            self,
            DetachedState.DONE,
            status=status,
            lines=[line.decode("latin-1") for line in lines],
        )

    def failed(self, error: ProxyError) -> None:
        """Try again, or write down that there is no answer."""
        self.run = None
        self.drop_result()
        if self._counted and error.retry_elsewhere:
            self.record.attempts -= 1
        self._counted = False
        self._owner.failed(self, error)

    def let_go(self, slot: HeldSlot) -> None:
        """Note that the slot of a pod is not held any more."""
        self.record.held.remove(slot)
        # The record does not say yet what is being written of its end; it is saved after that.
        if not self.settling:
            self._owner.save(self)

    # -- inside

    def next_pause(self) -> float:
        """Return how long to wait after one more thing that may pass by, seconds."""
        self.failures += 1
        return min(_FIRST_PAUSE * 2.0 ** min(self.failures - 1, 10), _LONGEST_PAUSE)

    def drop_result(self) -> None:
        """Forget what there is of an answer."""
        self._owner.size -= self.record.result_size
        self.record.result_size = 0

    def changed(self) -> None:
        """Tell whoever looks."""
        for watcher in list(self.watchers):
            watcher()


def _not_recorded(failure: Failure) -> Any:
    failure.trap(StoreError)
    raise TaskNotRecorded(failure.getErrorMessage())
