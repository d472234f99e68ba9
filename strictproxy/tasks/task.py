"""
One tracked task: a lease that outlives its exchange, and how its pod is asked about it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from strictproxy.asking import Answer, ask, reason_of
from strictproxy.config.model import RouteConfig
from strictproxy.errors import ProxyError
from strictproxy.scheduling import Address, Lease
from strictproxy.tasks.resubmission import KeptSubmit
from strictproxy.tasks.rules import Template, is_done
from strictproxy.tasks.store import Record
from strictproxy.tasks.unattended import Run
from strictproxy.upstream import Upstream

_log = Logger()

#: What is read of an answer to look for an id, or whether a task is done, bytes.
MAX_ANSWER = 1024 * 1024
#: Polls are put off or brought forward by up to this part of their interval.
_JITTER = 0.1
_LONGEST_PAUSE = 60.0
#: Polls in a row that nobody accepts, until a pod is taken for dead.
_REFUSED = 3


class Tasks(Protocol):
    """Whoever keeps the tasks."""

    clock: IReactorTime
    random: Callable[[], float]

    def ended(self, task: TrackedTask) -> None:
        """Note that a task has ended."""


class TaskState(Enum):
    """What became of a task."""

    RUNNING = "running"
    DONE = "done"
    #: it has held its slot for `limit_time`
    TIMED_OUT = "timed_out"
    #: an operator ended it
    CANCELLED = "cancelled"
    #: its pod is gone, or does not know it any more
    LOST = "lost"
    #: it was lost, and waits for another pod
    RESUBMITTED = "resubmitted"


class TrackedTask:
    """One task, and the lease that it holds while it runs."""

    __slots__ = (
        "_failures",
        "_polling",
        "_refused",
        "_tasks",
        "_timer",
        "address",
        "again",
        "client",
        "ended",
        "identity",
        "lease",
        "number",
        "pod_id",
        "route",
        "since",
        "state",
        "submit",
        "submits",
        "task_id",
        "token",
        "upstream",
        "why",
    )

    #: nothing of a request is kept any more
    kept_bytes = 0

    def __init__(
        self,
        tasks: Tasks,
        number: int,
        task_id: str,
        route: RouteConfig,
        upstream: Upstream,
        address: Address,
        client: str,
        identity: bytes,
    ) -> None:
        self._tasks = tasks
        self.number = number
        #: as its client knows it, and as its pod does: they differ once it has been resubmitted
        self.task_id = self.pod_id = task_id
        self.route = route
        self.upstream = upstream
        self.address = address
        #: by which its pod may call back
        self.token: str | None = None
        #: None once it has ended
        self.lease: Lease | None = None
        self.client = client
        self.identity = identity
        self.since = tasks.clock.seconds()
        self.state = TaskState.RUNNING
        self.ended: float | None = None
        #: in words, for people
        self.why: str | None = None
        #: the submit call, if it can be sent again
        self.submit: KeptSubmit | None = None
        #: how often it has been sent
        self.submits = 1
        #: that, while it is being sent again
        self.again: Run | None = None
        self._timer: IDelayedCall | None = None
        self._polling: Deferred[Answer] | None = None
        self._failures = 0
        self._refused = 0

    @property
    def record(self) -> Record:
        """What has to be known of it after a restart."""
        return Record(
            self.route.name,
            self.upstream.name,
            self.task_id,
            self.address.host,
            self.address.port,
            self.client,
            self.identity.decode("latin-1"),
            self.since,
            self.token,
            self.pod_id,
        )

    @property
    def key(self) -> tuple[str, str, Address]:
        """What makes it this task: its route, and its id at its pod."""
        return (self.route.name, self.pod_id, self.address)

    @property
    def resubmits(self) -> bool:
        """Whether its submit call is to be kept."""
        return self.route.task is not None and self.route.task.resubmit and self.lease is not None

    def keep(self, submit: KeptSubmit | None) -> None:
        """Keep the submit call as long as it may be needed."""
        self.forget_submit()
        self.submit = submit

    def forget_submit(self) -> None:
        """Let go of the submit call."""
        submit, self.submit = self.submit, None
        if submit is not None:
            submit.body.close()

    def target_at_pod(self, target: bytes) -> bytes:
        """Return the target of a call about the task as its pod understands it."""
        if self.pod_id == self.task_id or self.route.task is None:
            return target
        path, mark, query = target.decode("latin-1").partition("?")
        for text in self.route.task.related:
            template = Template(text)
            if template.match(path) == self.task_id:
                return f"{template.fill(self.pod_id)}{mark}{query}".encode("latin-1")
        return target

    def __str__(self) -> str:
        return f"task {self.task_id} of route {self.route.name} on {self.address}"

    def abandon(self, error: ProxyError) -> None:
        """End it from outside; the job itself may go on, but holds no slot any more."""
        state = TaskState.LOST if error.reason == "pod_gone" else TaskState.CANCELLED
        self.end(state, str(error))

    def end(self, state: TaskState, why: str) -> None:
        """Give the slot back, once."""
        if self.lease is None:
            return
        lease, self.lease = self.lease, None
        self.state, self.why = state, why
        self.ended = self._tasks.clock.seconds()
        self.stop()
        self._tasks.ended(self)
        self.upstream.release(lease)

    def restart(self) -> None:
        """Forget how the pod before did."""
        self._failures = self._refused = 0

    def stop(self) -> None:
        """Ask no more."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        polling, self._polling = self._polling, None
        if polling is not None:
            polling.cancel()

    def heard(self, path: str, status: int, body: bytes) -> None:
        """Look at an answer about this task that has passed through."""
        config = self.route.task
        if config is None or config.done is None or self.lease is None:
            return
        # Only the path that is polled is known to mean what `done` looks at.
        said_by = config.poll.path if config.poll is not None else None
        if said_by is not None and Template(said_by).match(path) != self.pod_id:
            return
        if is_done(config.done, status, body):
            self.end(TaskState.DONE, "an answer that passed through said so")

    # -- asking

    def poll_later(self) -> None:
        """Ask the pod, after some time."""
        config = self.route.task
        if config is None or config.poll is None or self.lease is None:
            return
        delay = min(config.poll.every * 2.0 ** min(self._failures, 10), _LONGEST_PAUSE)
        delay = max(delay, config.poll.every)
        spread = 1 + _JITTER * (2 * self._tasks.random() - 1)
        self._timer = self._tasks.clock.callLater(delay * spread, self._poll)

    def _poll(self) -> None:
        self._timer = None
        config = self.route.task
        assert config is not None
        assert config.poll is not None
        poll, clock = config.poll, self._tasks.clock
        asking = Deferred.fromCoroutine(
            ask(
                self.address,
                Template(poll.path).fill(self.pod_id),
                lambda: self.upstream.pool.endpoint_for(self.address, poll.timeout),
                clock,
                agent="strictproxy-task",
                max_body=MAX_ANSWER,
            )
        )
        asking.addTimeout(poll.timeout, clock)
        self._polling = asking
        asking.addCallbacks(self._answered, self._unanswered)
        asking.addErrback(lambda failure: _log.failure("a poll failed", failure=failure))

    def _answered(self, answer: Answer) -> None:
        if self.lease is None:
            return
        self._polling = None
        self._failures = self._refused = 0
        config = self.route.task
        assert config is not None
        assert config.done is not None
        if is_done(config.done, answer.status, answer.body):
            self.end(TaskState.DONE, "its pod said so")
        elif answer.status in (404, 410):
            self.end(TaskState.LOST, f"its pod does not know it any more ({answer.status})")
        else:
            if answer.status >= 500:
                self._failures += 1
            self.poll_later()

    def _unanswered(self, failure: Failure) -> None:
        if self.lease is None:
            return
        self._polling = None
        self._failures += 1
        reason = reason_of(failure)
        reasons = getattr(failure.value, "reasons", None)
        error = (reasons[0] if reasons else failure).value
        # A pod that is busy may be slow to accept; one that refuses is not there.
        refused = isinstance(error, ConnectError) and not isinstance(error, ConnectTimeout)
        self._refused = self._refused + 1 if refused else 0
        gone = self.address not in self.upstream.pods()
        if self._refused >= _REFUSED or (gone and isinstance(error, ConnectError)):
            self.end(TaskState.LOST, f"its pod is gone: {reason}")
            return
        _log.info("{task}: no answer: {reason}", task=self, reason=reason)
        self.poll_later()
