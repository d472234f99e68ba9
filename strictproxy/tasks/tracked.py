"""
Tracked tasks: the slot of a submit call is kept until its job is done.

Owns the leases of running tasks, and gives each back exactly once: when the
pod says that the task is done (by our own poll, by an answer that passes
through, or by calling back), when it has taken too long, when an operator
cancels it, or when its pod has lost it.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from strictproxy.config.model import RouteConfig, TaskConfig
from strictproxy.errors import ProxyError, TaskAway, TaskGone, UnknownTask
from strictproxy.scheduling import Address, Lease
from strictproxy.tasks.resubmission import KeptSubmit, Resubmission
from strictproxy.tasks.rules import Template, find_id, is_done
from strictproxy.tasks.store import ITaskStore, Record
from strictproxy.tasks.task import TaskState, TrackedTask
from strictproxy.tasks.unattended import Run
from strictproxy.upstream import Upstream

_log = Logger()

#: Where pods call back, below whatever the configuration says is our address.
CALLBACK_PATH = "/.strictproxy/callback/"
#: A job is submitted so often at most.
_MOST_SUBMITS = 4
#: Ended tasks that are remembered; the oldest go first.
_MOST_ENDED = 10_000


class Submission:
    """What is known of a submit call when it has been answered."""

    __slots__ = ("body", "client", "header", "identity", "number", "status")

    def __init__(
        self,
        number: int,
        client: str,
        identity: bytes,
        status: int,
        header: Callable[[bytes], bytes | None],
        body: bytes,
    ) -> None:
        self.number = number
        self.client = client
        self.identity = identity
        self.status = status
        self.header = header
        self.body = body


class TrackedTasks:
    """
    All tracked tasks: those that run, and those that have ended for as long as they are kept.

    :param random: from 0 to 1, so that pods are not polled in step.
    """

    def __init__(self, clock: IReactorTime, random: Callable[[], float]) -> None:
        self.clock = clock
        self.random = random
        #: called with each task that has ended
        self.on_end: Callable[[TrackedTask], None] = lambda _: None
        #: keeps tasks over a restart, if there is one
        self.store: ITaskStore | None = None
        #: submit calls that have not ended, with the tokens by which their pods may call back
        self._awaited: dict[int, str] = {}
        #: whose tokens they are; None as long as there is no task
        self._tokens: dict[str, TrackedTask | None] = {}
        self._templates: list[tuple[Template, RouteConfig]] = []
        self._running: dict[int, TrackedTask] = {}
        self._by_pod: dict[tuple[str, str, Address], TrackedTask] = {}
        #: the newest task of each id, by route
        self._by_id: dict[tuple[str, str], TrackedTask] = {}
        self._ended: OrderedDict[int, TrackedTask] = OrderedDict()
        #: tasks that are being submitted again, by the numbers of those exchanges
        self._again: dict[int, TrackedTask] = {}
        #: makes the exchange of a submit call that is sent again
        self.make_run: Callable[[Resubmission], Run] | None = None
        #: those that have been called before there was a task
        self._early: set[str] = set()

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[TrackedTask]:
        return iter(list(self._running.values()))

    def configure(self, routes: Iterable[RouteConfig]) -> None:
        """Know these routes from now on; tasks that run go on as they began."""
        self._templates = [
            (Template(text), route)
            for route in routes
            if route.task is not None
            for text in route.task.related
        ]

    # -- submitting

    def callback_url(self, route: RouteConfig, number: int) -> str | None:
        """Return the URL by which a pod may say that the task of a submit call is done."""
        if route.task is None or route.task.callback is None:
            return None
        token = secrets.token_urlsafe(24)
        self._awaited[number] = token
        self._tokens[token] = None
        return f"{route.task.callback.base.rstrip('/')}{CALLBACK_PATH}{token}"

    def submitted(
        self, route: RouteConfig, upstream: Upstream, lease: Lease, what: Submission
    ) -> TrackedTask | None:
        """
        Take the lease of a submit call that has been answered, if there is a task.

        :return: None if not: the lease stays the caller's.
        """
        token = self._awaited.get(what.number)
        if route.task is None:
            return None
        again = self._again.pop(what.number, None)
        task_id = find_id(route.task.id, what.status, what.header, what.body)
        if task_id is None:
            if 200 <= what.status < 300:
                _log.warn("route {route}: an answer without a task's id", route=route.name)
            return None
        if again is not None:
            self._revive(again, task_id, upstream, lease, token, what.number)
            self._ask_about(again, route.task, token, what)
            return again
        if (route.name, task_id, lease.address) in self._by_pod:
            # The service has said so again: one job, one slot.
            return None
        known = self._by_id.get((route.name, task_id))
        if known is not None and known.lease is not None:
            _log.warn("{task}: {pod} has one with the same id", task=known, pod=lease.address)
        task = TrackedTask(
            self, what.number, task_id, route, upstream, lease.address, what.client, what.identity
        )
        task.token = self._awaited.pop(what.number, None)
        self._add(task, lease)
        self._store(task, lambda store: store.add(task.record))
        self._ask_about(task, route.task, token, what)
        return task

    def _ask_about(
        self, task: TrackedTask, config: TaskConfig, token: str | None, what: Submission
    ) -> None:
        """Find out when a new task is done; perhaps it is already."""
        if token in self._early:
            self._early.discard(token)
            task.end(TaskState.DONE, "its pod called back")
        elif config.done is not None and is_done(config.done, what.status, what.body):
            task.end(TaskState.DONE, "the answer to its submit call said so")
        else:
            task.poll_later()

    # -- submitting again

    def _resubmit(self, task: TrackedTask, submit: KeptSubmit) -> None:
        """Send the submit call of a task that was lost to another pod."""
        make_run = self.make_run
        assert make_run is not None
        task.state, task.submit = TaskState.RESUBMITTED, None
        task.submits += 1

        def over(error: ProxyError | None) -> None:
            task.again = None
            self._again.pop(run.number, None)
            if task.lease is None and task.state is TaskState.RESUBMITTED:
                # Neither does another pod have it.
                reason = "the answer has no id" if error is None else str(error)
                task.state = TaskState.LOST
                task.why = f"{task.why}; submitted again, {reason}"
                _log.warn("{task} stays lost: {why}", task=task, why=task.why)

        run = task.again = make_run(Resubmission(submit, task.task_id, over))
        self._again[run.number] = task
        _log.info("{task} is submitted again", task=task)
        run.start()

    def _revive(
        self,
        task: TrackedTask,
        pod_id: str,
        upstream: Upstream,
        lease: Lease,
        token: str | None,
        number: int,
    ) -> None:
        """Let a task go on that another pod has now."""
        self._ended.pop(task.number, None)
        if task.token is not None:
            self._tokens.pop(task.token, None)
        self._awaited.pop(number, None)
        task.state, task.why, task.ended = TaskState.RUNNING, None, None
        task.pod_id, task.upstream, task.address = pod_id, upstream, lease.address
        task.number, task.token, task.since = number, token, self.clock.seconds()
        task.restart()
        self._add(task, lease)
        self._store(task, lambda store: store.add(task.record))
        _log.info("{task} goes on as {pod_id}", task=task, pod_id=pod_id)

    def _add(self, task: TrackedTask, lease: Lease) -> None:
        lease.ticket.owner = task
        task.lease = lease
        if task.token is not None:
            self._tokens[task.token] = task
        self._running[task.number] = task
        self._by_pod[task.key] = task
        self._by_id[task.route.name, task.task_id] = task

    # -- calls about tasks

    def find(self, path: str) -> TrackedTask | None:
        """
        Return the task that a path names, or None if it names none.

        :raise UnknownTask: it names one that nobody knows.
        :raise TaskGone: its pod has lost it.
        """
        unknown: UnknownTask | None = None
        for template, route in self._templates:
            task_id = template.match(path)
            if task_id is None:
                continue
            task = self._by_id.get((route.name, task_id))
            if task is None:
                unknown = UnknownTask(f"route {route.name} has no task {task_id!r}")
            elif task.state is TaskState.RESUBMITTED:
                raise TaskAway(f"task {task_id} is being submitted to another pod: {task.why}")
            elif task.state is TaskState.LOST:
                raise TaskGone(f"{task} was lost: {task.why}")
            else:
                return task
        if unknown is not None:
            raise unknown
        return None

    def called_back(self, path: str) -> bool:
        """
        Take a pod's word, given by calling the URL of `callback_url`.

        :return: False if the URL is not one of ours.
        """
        token = path.removeprefix(CALLBACK_PATH)
        if token not in self._tokens:
            return False
        task = self._tokens[token]
        if task is None:
            # It was faster than its own answer to the submit call.
            self._early.add(token)
        else:
            task.end(TaskState.DONE, "its pod called back")
        return True

    def submit_ended(self, number: int) -> None:
        """Note that a submit call is over; without a task, nobody may call back any more."""
        token = self._awaited.pop(number, None) if self._awaited else None
        if token is not None:
            self._tokens.pop(token, None)
            self._early.discard(token)

    # -- the rest

    def cancel(self, number: int, error: ProxyError) -> bool:
        """End a running task; returns False if there is no such one."""
        task = self._running.get(number)
        if task is None:
            return False
        task.forget_submit()
        task.abandon(error)
        return True

    def ended(self, task: TrackedTask) -> None:
        """Note that a task has ended; called by the task."""
        self._running.pop(task.number, None)
        self._by_pod.pop(task.key, None)
        self._ended[task.number] = task
        self._store(task, lambda store: store.remove(task.record))
        if len(self._ended) > _MOST_ENDED:
            self._forget(next(iter(self._ended.values())))
        _log.info("{task} {state}: {why}", task=task, state=task.state.value, why=task.why)
        self.on_end(task)
        submit = task.submit
        if submit is None:
            return
        if task.state is TaskState.LOST and task.submits < _MOST_SUBMITS and self.make_run:
            self._resubmit(task, submit)
        else:
            task.forget_submit()

    def sweep(self) -> None:
        """End what has taken too long, and forget what has ended long ago."""
        now = self.clock.seconds()
        for task in self:
            config = task.route.task
            if config is not None and now - task.since >= config.limit_time:
                task.end(TaskState.TIMED_OUT, f"it has taken {config.limit_time:g} s")
        for task in list(self._ended.values()):
            config = task.route.task
            if config is not None and task.ended is not None and now - task.ended >= config.keep:
                self._forget(task)

    def uses(self, upstream: Upstream) -> bool:
        """Whether a task that runs holds a slot of an upstream."""
        return any(task.upstream is upstream for task in self._running.values())

    def restore(
        self,
        records: Iterable[Record],
        routes: Iterable[RouteConfig],
        upstreams: Mapping[str, Upstream],
        next_number: Callable[[], int],
    ) -> None:
        """
        Hold the slots of tasks that ran before a restart, and ask about them.

        To be called before anything is dispatched. Those of routes that are
        gone, or are about other upstreams now, are dropped, with a warning.
        """
        by_name = {route.name: route for route in routes if route.task is not None}
        for record in records:
            route = by_name.get(record.route)
            if route is None or route.upstream != record.upstream:
                _log.warn("task {record} is of a route that is gone: dropped", record=record)
                if self.store is not None:
                    self.store.remove(record).addErrback(_log_store_failure)
                continue
            upstream = upstreams[record.upstream]
            task = TrackedTask(
                self,
                next_number(),
                record.task_id,
                route,
                upstream,
                Address(record.host, record.port),
                record.client,
                record.request_id.encode("latin-1"),
            )
            task.since, task.token = record.since, record.token
            task.pod_id = record.pod_id or record.task_id
            self._add(task, upstream.adopt(route.name, task.address, task))
            _log.info("{task} goes on", task=task)
            task.poll_later()

    def stop(self) -> None:
        """Give every slot back. Without a store, nobody knows of the jobs any more."""
        store, self.store = self.store, None
        self.make_run = None
        for task in self:
            task.end(TaskState.CANCELLED, "the proxy stopped")
        if store is not None:
            store.stop()

    def _store(self, task: TrackedTask, work: Callable[[ITaskStore], Deferred[None]]) -> None:
        if self.store is not None:
            work(self.store).addErrback(_log_store_failure)

    def _forget(self, task: TrackedTask) -> None:
        self._ended.pop(task.number, None)
        task.forget_submit()
        if task.token is not None:
            self._tokens.pop(task.token, None)
        key = (task.route.name, task.task_id)
        if self._by_id.get(key) is task:
            del self._by_id[key]


def _log_store_failure(failure: Failure) -> None:
    # The task itself goes on; only a restart would not know of it.
    _log.error("tasks cannot be stored: {reason}", reason=failure.getErrorMessage())
