"""
Detached requests: accepted, stored, carried out when their turn comes, kept for a while.

Owns their records. Each change of state is on the disk before anybody is told:
a client that knows of a task, or of its result, knows of something that a crash
does not take away. They stand in the same line as everybody else; what waits in
it is an ordinary exchange, with a `StoredRequest` in place of a client's.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure

from strictproxy.config.model import TasksConfig
from strictproxy.errors import (
    Cancelled,
    IdempotencyKeyReused,
    Interrupted,
    PodError,
    ProxyError,
    ShuttingDown,
    TaskCancelled,
    TaskExpired,
    TaskStoreFailed,
    TaskStoreFull,
    TooManyTasks,
)
from strictproxy.http.spool import Spool, StoredBody
from strictproxy.tasks.detached_task import DetachedTask, Run
from strictproxy.tasks.files import TaskFiles
from strictproxy.tasks.record import DetachedRecord, DetachedState, HeldSlot, from_document
from strictproxy.tasks.store import ITaskStore, StoreError
from strictproxy.tasks.stored_request import StoredRequest

_log = Logger()

#: A request that may be repeated is given to pods so many times at most.
_MAX_ATTEMPTS = 5

#: How a task ends that failed with one of these.
_STATES: Mapping[type[ProxyError], DetachedState] = {
    TaskCancelled: DetachedState.CANCELLED,
    Cancelled: DetachedState.CANCELLED,
    TaskExpired: DetachedState.EXPIRED,
}


class DetachedTasks:
    """
    All detached requests that are known.

    :param make_run: makes the exchange of a request.
    :param on_end: called with each that has ended.
    """

    def __init__(
        self,
        config: TasksConfig,
        store: ITaskStore,
        files: TaskFiles,
        clock: IReactorTime,
        make_run: Callable[[StoredRequest], Run],
        on_end: Callable[[DetachedTask], None],
    ) -> None:
        self.config = config
        self.store = store
        self.clock = clock
        #: bytes of all bodies and results
        self.size = 0
        self._files = files
        self._make_run = make_run
        self._on_end = on_end
        self._seq = 0
        self._by_id: dict[str, DetachedTask] = {}
        self._by_key: dict[str, DetachedTask] = {}
        #: those that are being written for the first time, and who waits for that
        self._new: dict[str, list[Deferred[DetachedTask]]] = {}
        #: those that have ended, the oldest first
        self._ended: OrderedDict[str, DetachedTask] = OrderedDict()
        #: nothing is begun any more
        self._stopping = False

    def __iter__(self) -> Iterator[DetachedTask]:
        return iter(list(self._by_id.values()))

    def find(self, task_id: str) -> DetachedTask | None:
        """Return the task of an id."""
        return self._by_id.get(task_id)

    @property
    def running(self) -> int:
        """How many have a slot, or have had it and are being written down."""
        return sum(
            each.settling or each.record.state is DetachedState.RUNNING
            for each in self._by_id.values()
        )

    def names(self) -> tuple[list[str], list[str]]:
        """Return the names of the bodies and of the results that there should be."""
        bodies = [task.record.id for task in self if not task.ended]
        return bodies, [task.record.id for task in self if task.ended]

    def save(self, task: DetachedTask) -> None:
        """Write down how a task is now; if that fails, only a restart would not know."""
        if task.record.id in self._by_id:
            self.store.put_detached(task.record.document()).addErrback(_log_store_failure)

    # -- accepting

    def new_id(self) -> str:
        """Return an id that nobody can guess."""
        return secrets.token_urlsafe(24)

    def next_seq(self) -> int:
        """Return the next place in the order of arrival."""
        self._seq += 1
        return self._seq

    def make_spool(
        self, task_id: str, pause: Callable[[], None], resume: Callable[[], None]
    ) -> Spool:
        """Return what receives the body of a new task."""
        return Spool(0, pause, resume, lambda: self._files.create_body(task_id), durable=True)

    def make_room(self, size: int) -> None:
        """
        Take room for so many bytes of a body or a result; the oldest that have ended make it.

        :raise TaskStoreFull: there is none.
        """
        while self.size + size > self.config.max_size and self._forget_oldest():
            pass
        if self.size + size > self.config.max_size:
            raise TaskStoreFull(f"bodies and results have the {self.config.max_size} bytes allowed")
        self.size += size

    def add(self, record: DetachedRecord) -> Deferred[DetachedTask]:
        """
        Write down a task whose body is stored. It does not begin before `begin`.

        :return: the task; the one that was there before if it came with the same
            key. Fails with `TaskStoreFailed`, and there is no task then.
        :raise IdempotencyKeyReused: its key is that of another request.
        :raise TooManyTasks: no other one may be there.
        """
        known = None if record.key is None else self._by_key.get(record.key)
        if known is not None:
            if known.record.fingerprint != record.fingerprint:
                raise IdempotencyKeyReused("its Idempotency-Key came with another request before")
            self.discard(record)
            return self._when_stored(known)
        while len(self._by_id) >= self.config.max_count:
            if not self._forget_oldest():
                raise TooManyTasks(f"{self.config.max_count} of them wait, run or hold a slot")
        task = DetachedTask(self, record)
        self._register(task)
        waiting: Deferred[DetachedTask] = Deferred()
        self._new[record.id] = [waiting]
        stored = self.store.put_detached(record.document(), new=True)
        stored.addErrback(_not_stored)
        stored.addBoth(self._written, task)
        return waiting

    def _written(self, result: Any, task: DetachedTask) -> None:
        if isinstance(result, Failure):
            self._unregister(task)
            self.discard(task.record)
        for waiting in self._new.pop(task.record.id):
            if isinstance(result, Failure):
                waiting.errback(Failure(result.value))
            else:
                waiting.callback(task)

    def _when_stored(self, task: DetachedTask) -> Deferred[DetachedTask]:
        """Fire with a task once it is written, however many wait for that."""
        waiting: Deferred[DetachedTask] = Deferred()
        others = self._new.get(task.record.id)
        if others is None:
            waiting.callback(task)
        else:
            others.append(waiting)
        return waiting

    def discard(self, record: DetachedRecord) -> None:
        """Forget the body of what has not become a task."""
        self.size -= record.body_size
        self._in_thread(self._files.remove_body, record.id)

    def give_back(self, task_id: str, size: int, spool: Spool) -> None:
        """Forget so much of a body that will not be a task's, and what receives it."""
        self.size -= size
        spool.close(lambda: self._in_thread(self._files.remove_body, task_id))

    def begin(self, task: DetachedTask) -> None:
        """Let it join the line; to be called once for each new task."""
        if self._stopping:
            return
        record = task.record
        task.timer = None
        result = Spool(
            0,
            lambda: _handler_of(request).client_full(),
            lambda: _handler_of(request).client_drained(),
            lambda: self._files.create_result(record.id),
            durable=True,
        )
        body = self._files.body(record.id, record.body_size)
        request = StoredRequest(record, body, result, task)
        run = task.run = self._make_run(request)
        run.start()

    # -- ending

    def failed(self, task: DetachedTask, error: ProxyError) -> None:
        """Put a task back into the line, if that can do any good; else it has ended."""
        record = task.record
        if self._stopping and isinstance(error, ShuttingDown):
            return  # it stays on the disk as it is
        repeats = isinstance(error, PodError) and record.repeat
        if not error.retry_elsewhere and not (repeats and record.attempts < _MAX_ATTEMPTS):
            state = _STATES.get(type(error), DetachedState.FAILED)
            self.settle(
                task,
                state,
                status=error.status,
                reason=error.reason,
                title=error.title,
                detail=error.detail,
            )
            return
        record.state = DetachedState.QUEUED
        # A crash must not find that a pod has it. If this fails, that is all it finds.
        self.save(task)
        if self._stopping:
            return
        pause = task.next_pause()
        _log.warn("{task}: {error}; again in {pause:g} s", task=task, error=error, pause=pause)
        task.timer = self.clock.callLater(pause, self.begin, task)
        task.changed()

    def settle(self, task: DetachedTask, state: DetachedState, **changes: Any) -> None:
        """Write down what became of a task; when that is done, it has ended."""
        task.settling = True
        task.timer = None
        changes |= {"state": state, "ended": self.clock.seconds()}
        held = len(task.record.held)
        stored = self.store.put_detached(task.record.document(changes))
        stored.addCallbacks(
            lambda _: self._settled(task, changes, held),
            lambda failure: self._not_settled(failure, task, state, changes),
        )
        stored.addErrback(lambda failure: _log.failure("a task cannot end", failure=failure))

    def _settled(self, task: DetachedTask, changes: Mapping[str, Any], held: int) -> None:
        task.settling = False
        record = task.record
        for name, value in changes.items():
            setattr(record, name, value)
        if len(record.held) != held:
            self.save(task)  # a slot was given back while this was written
        self._ended[record.id] = task
        self.size -= record.body_size
        record.body_size = 0
        # Of an answer that could not be kept there may be a part.
        done = record.state is DetachedState.DONE
        self._in_thread(self._files.remove_body if done else self._files.remove, record.id)
        _log.info("{task} {state}", task=task, state=record.state.value)
        task.changed()
        self._on_end(task)

    def _not_settled(
        self, failure: Failure, task: DetachedTask, state: DetachedState, changes: dict[str, Any]
    ) -> None:
        failure.trap(StoreError)
        # Nobody is told what a crash would take back.
        pause = task.next_pause()
        _log.error(
            "{task}: how it ended cannot be stored: {reason}; again in {pause:g} s",
            task=task,
            reason=failure.getErrorMessage(),
            pause=pause,
        )
        if not self._stopping:
            changes = {k: v for k, v in changes.items() if k not in ("state", "ended")}
            task.timer = self.clock.callLater(pause, self.settle, task, state, **changes)

    def end(self, task: DetachedTask, error: ProxyError) -> None:
        """End a task that waits or runs; one that has ended stays as it is."""
        if task.ended or task.settling:
            return
        if task.run is not None:
            task.run.abandon(error)
        else:
            if task.timer is not None:
                task.timer.cancel()
                task.timer = None
            task.failed(error)

    # -- keeping

    def result_of(self, task: DetachedTask) -> StoredBody:
        """Return the body of a task's answer, to be read and closed."""
        return self._files.result(task.record.id, task.record.result_size)

    def forget(self, task: DetachedTask) -> None:
        """Forget a task that does not wait or run, and its files."""
        self._unregister(task)
        self.size -= task.record.size
        self._in_thread(self._files.remove, task.record.id)
        self.store.remove_detached(task.record.id).addErrback(_log_store_failure)

    def _forget_oldest(self) -> bool:
        """Forget what has ended first, if anything has."""
        for task in self._ended.values():
            # A slot that is held is known by its task's record alone.
            if not task.record.held:
                self.forget(task)
                return True
        return False

    def sweep(self) -> None:
        """End those that have waited too long, and forget those that ended long ago."""
        now = self.clock.seconds()
        for task in self:
            record = task.record
            waits = record.state is DetachedState.QUEUED and record.id not in self._new
            if waits and now - record.created >= record.limit_wait:
                self.end(task, TaskExpired(f"it has waited for {record.limit_wait:g} s"))
        for task in list(self._ended.values()):
            ended = task.record.ended
            if ended is None or now - ended < self.config.keep:
                break
            if not task.record.held:
                self.forget(task)

    # -- start and stop

    def restore(
        self,
        documents: Iterable[Mapping[str, Any]],
        hold: Callable[[DetachedTask, HeldSlot], None],
    ) -> list[DetachedTask]:
        """
        Take up what was there before a restart; to be called before anything is dispatched.

        :param hold: takes a slot that a pod may still use for a task, until the task is
            told to `let_go` of it.
        :return: those to `begin`, in order, once all slots are held.
        :raise StoreError: one cannot be read.
        """
        waiting: list[DetachedTask] = []
        now = self.clock.seconds()
        for document in documents:
            try:
                record = from_document(document)
            except ValueError as error:
                raise StoreError(str(error)) from None
            task = DetachedTask(self, record)
            self._seq = max(self._seq, record.seq)
            self._register(task)
            running = record.state is DetachedState.RUNNING
            if running:
                record.interrupted(now)
            record.held = [slot for slot in record.held if slot.until > now]
            for slot in list(record.held):
                hold(task, slot)
            if record.state.ended:
                record.body_size = 0
                self.size += record.size
                self._ended[record.id] = task
                continue
            record.result_size = 0
            self.size += record.size
            if not running:
                waiting.append(task)
            elif record.repeat and record.attempts < _MAX_ATTEMPTS:
                record.state = DetachedState.QUEUED
                waiting.append(task)
            else:
                self.failed(task, Interrupted("the proxy ended while a pod had the request"))
        self._ended = OrderedDict(
            sorted(self._ended.items(), key=lambda item: item[1].record.ended or 0.0)
        )
        return waiting

    def withdraw(self) -> None:
        """Begin nothing any more; those that wait stay on the disk."""
        self._stopping = True
        for task in self:
            if task.run is not None and task.record.state is DetachedState.QUEUED:
                run, task.run = task.run, None
                run.withdraw()
            if task.timer is not None:
                task.timer.cancel()
                task.timer = None

    def stop(self) -> None:
        """Let go of everything; what runs is interrupted."""
        self.withdraw()
        for task in self:
            if task.run is not None:
                task.run.abandon(ShuttingDown("the proxy is shutting down"))

    # -- inside

    def _register(self, task: DetachedTask) -> None:
        self._by_id[task.record.id] = task
        if task.record.key is not None:
            self._by_key[task.record.key] = task

    def _unregister(self, task: DetachedTask) -> None:
        record = task.record
        self._by_id.pop(record.id, None)
        self._ended.pop(record.id, None)
        if record.key is not None:
            self._by_key.pop(record.key, None)

    def _in_thread(self, work: Callable[[str], None], task_id: str) -> None:
        deferToThread(work, task_id).addErrback(
            lambda failure: _log.error(
                "a file of a task is left: {reason}", reason=failure.getErrorMessage()
            )
        )


def _handler_of(request: StoredRequest) -> Any:
    return request.handler


def _not_stored(failure: Failure) -> Any:
    failure.trap(StoreError)
    raise TaskStoreFailed(failure.getErrorMessage())


def _log_store_failure(failure: Failure) -> None:
    _log.error("tasks cannot be stored: {reason}", reason=failure.getErrorMessage())
