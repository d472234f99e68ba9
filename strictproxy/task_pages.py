"""
What clients may ask about their detached requests.

    GET    /.strictproxy/tasks/ID          its state: JSON, at once or (`Prefer: wait=30`)
                                           when it has ended; or as server-sent events
    GET    /.strictproxy/tasks/ID/result   the pod's answer, or a part of it
    DELETE /.strictproxy/tasks/ID          cancels it
    GET    /.strictproxy/tasks             all of them, for whoever has the admin token

Who knows an id may do all of this with it, so ids are for their clients alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from strictproxy.errors import (
    BadRequest,
    ProxyError,
    TaskCancelled,
    TaskNotEnded,
    TaskStoreFailed,
    UnknownTask,
)
from strictproxy.http.preferences import parse_preferences
from strictproxy.http.problems import reason_phrase
from strictproxy.http.ranges import Unsatisfiable, parse_range
from strictproxy.http.reply import FileReply, Reply
from strictproxy.http.request import ClientRequest
from strictproxy.tasks.detached import DetachedTasks
from strictproxy.tasks.detached_task import TASKS_PATH, DetachedTask
from strictproxy.tasks.record import DetachedState

_log = Logger()

#: Who may list tasks: None, or the status and the words to refuse with.
MayList = Callable[[str | None], tuple[int, str] | None]

_PREFIX = TASKS_PATH.encode()
_JSON = (b"Content-Type: application/json\r\n", b"Cache-Control: no-store\r\n")
#: So many watch by server-sent events at most.
_MOST_STREAMS = 1000
#: Those who watch are told of their place so often, and hear anything at all, seconds.
_TICK = 1.0
_TICKS_OF_SILENCE = 15
_MOST_LISTED = 1000
#: To write down that a task is cancelled takes so long at most, or its client asks again.
_END_TAKES = 30.0


class NotAllowed(ProxyError):
    """Another method is needed, or a token."""

    reason = "not_allowed"
    title = "This is not allowed"

    def __init__(self, status: int, message: str, *fields: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.fields = fields


class TaskPages:
    """Answers everything at and below `TASKS_PATH`."""

    def __init__(self, tasks: DetachedTasks, clock: IReactorTime, may_list: MayList) -> None:
        self._tasks = tasks
        self._clock = clock
        self._may_list = may_list
        #: those who wait for something, and what ends their waiting
        self._waiting: set[Callable[[], None]] = set()
        self._streams: set[_Stream] = set()
        self._ticker = LoopingCall(self._tick)
        self._ticker.clock = clock

    @staticmethod
    def owns(target: bytes) -> bool:
        """Whether a request's target is one of these pages."""
        path = target.partition(b"?")[0]
        return path == _PREFIX or path.startswith(_PREFIX + b"/")

    def serve(self, request: ClientRequest) -> None:
        """Answer a request."""
        Reply(request, self._answer)

    def stop(self) -> None:
        """Let nobody wait any more: each gets the state as it is."""
        for end in list(self._waiting):
            end()
        for stream in list(self._streams):
            stream.end()

    def _answer(self, reply: Reply) -> None:
        head = reply.request.head
        path, _, query = head.target[len(_PREFIX) :].decode("latin-1").partition("?")
        method = head.method.decode("latin-1")
        task_id, _, rest = path.strip("/").partition("/")
        if not task_id:
            self._check_method(method, "GET", "HEAD")
            self._list(reply, query)
            return
        task = self._tasks.find(task_id)
        if task is None or rest not in ("", "result"):
            raise UnknownTask("there is no such task, or there is none any more")
        if rest == "result":
            self._check_method(method, "GET", "HEAD")
            self._when_ended(reply, task, self._send_result)
            return
        self._check_method(method, "GET", "HEAD", "DELETE")
        if method == "DELETE":
            self._tasks.end(task, TaskCancelled("its client cancelled it"))
            self._until(reply, task, _END_TAKES, [], self._send_state)
        elif b"text/event-stream" in (head.get(b"accept") or b""):
            self._stream(reply, task)
        else:
            self._when_ended(reply, task, self._send_state)

    @staticmethod
    def _check_method(method: str, *allowed: str) -> None:
        if method not in allowed:
            raise NotAllowed(405, f"{method} is not possible here", ("Allow", ", ".join(allowed)))

    # -- waiting

    def _when_ended(
        self,
        reply: Reply,
        task: DetachedTask,
        send: Callable[[Reply, DetachedTask, list[bytes]], None],
    ) -> None:
        """Answer when a task has ended, or when the client does not want to wait any longer."""
        fields = reply.request.head.fields
        values = [value.decode("latin-1") for name, _, value in fields if name == b"prefer"]
        wait = parse_preferences(values).wait
        if wait is None:
            send(reply, task, [])
        else:
            applied = [b"Preference-Applied: wait=%d\r\n" % int(wait)]
            self._until(reply, task, wait, applied, send)

    def _until(
        self,
        reply: Reply,
        task: DetachedTask,
        wait: float,
        lines: list[bytes],
        send: Callable[[Reply, DetachedTask, list[bytes]], None],
    ) -> None:
        """Answer, with these header lines, when a task has ended, or after so many seconds."""
        if task.ended:
            send(reply, task, lines)
            return

        def stop() -> None:
            task.watchers.discard(look)
            self._waiting.discard(end)
            if timer.active():
                timer.cancel()

        def end() -> None:
            stop()
            try:
                send(reply, task, lines)
            except ProxyError as error:
                reply.fail(error)

        def look() -> None:
            if task.ended:
                end()

        timer = self._clock.callLater(wait, end)
        task.watchers.add(look)
        self._waiting.add(end)
        reply.on_gone = stop

    # -- the state

    def _send_state(self, reply: Reply, task: DetachedTask, lines: list[bytes]) -> None:
        body = json.dumps(task.describe(), indent=1).encode() + b"\n"
        if not task.ended:
            lines = [*lines, b"Retry-After: %d\r\n" % task.ask_again_after()]
        reply.send(200, [*_JSON, *lines], body)

    def _stream(self, reply: Reply, task: DetachedTask) -> None:
        if len(self._streams) >= _MOST_STREAMS:
            raise NotAllowed(503, "too many are watching")
        stream = _Stream(reply, task, self._left)
        if not stream.start():
            return
        self._streams.add(stream)
        if not self._ticker.running:
            self._ticker.start(_TICK, now=False).addErrback(
                lambda failure: _log.failure("watchers are told nothing", failure=failure)
            )

    def _left(self, stream: _Stream) -> None:
        self._streams.discard(stream)
        if not self._streams and self._ticker.running:
            self._ticker.stop()

    def _tick(self) -> None:
        for stream in list(self._streams):
            stream.tick()

    # -- the result

    def _send_result(self, reply: Reply, task: DetachedTask, lines: list[bytes]) -> None:
        record = task.record
        if not task.ended:
            reply.fail(TaskNotEnded(f"it is {record.state.value}"), task.ask_again_after())
            return
        if record.state is not DetachedState.DONE:
            reply.fail(_error_of(task))
            return
        assert record.status is not None
        head = reply.request.head
        stored = [line.encode("latin-1") for line in record.lines]
        stored = [line for line in stored if not line.lower().startswith(b"content-length:")]
        status, first, last = record.status, 0, record.result_size
        if status == 200:
            if not any(line.lower().startswith(b"accept-ranges:") for line in stored):
                stored.append(b"Accept-Ranges: bytes\r\n")
            part = self._part(reply, stored, record.result_size)
            if part is not None:
                status, (first, last) = 206, part
                stored.append(
                    b"Content-Range: bytes %d-%d/%d\r\n" % (first, last - 1, record.result_size)
                )
        if head.method == b"HEAD" or first == last or status in (204, 304):
            length = [] if status in (204, 304) else [b"Content-Length: %d\r\n" % (last - first)]
            reply.request.send_head(
                status,
                reason_phrase(status),
                [*stored, *lines, *length],
                has_body=False,
                framed=True,
                ended=True,
            )
            return
        body = self._tasks.result_of(task)
        sent = FileReply(reply, body, first, last)
        sent.start(status, reason_phrase(status), [*stored, *lines]).addErrback(
            self._unreadable, reply, task
        )

    @staticmethod
    def _part(reply: Reply, lines: list[bytes], size: int) -> tuple[int, int] | None:
        """Return the part of the result that is asked for, or None if it is all."""
        head = reply.request.head
        asked = head.get(b"range")
        if asked is None or head.method != b"GET":
            return None
        only_if = head.get(b"if-range")
        if only_if is not None:
            known = {
                value.strip()
                for name, _, value in (line.partition(b":") for line in lines)
                if name.lower() in (b"etag", b"last-modified")
            }
            # A weak validator says nothing about bytes (RFC 9110, 13.1.5).
            if only_if not in known or only_if.startswith(b"W/"):
                return None
        try:
            return parse_range(asked.decode("latin-1"), size)
        except Unsatisfiable:
            raise NotAllowed(
                416, f"the result has {size} bytes", ("Content-Range", f"bytes */{size}")
            ) from None

    @staticmethod
    def _unreadable(failure: Failure, reply: Reply, task: DetachedTask) -> None:
        _log.error(
            "{task}: its result cannot be read: {reason}",
            task=task,
            reason=failure.getErrorMessage(),
        )
        reply.fail(TaskStoreFailed(f"the result cannot be read: {failure.getErrorMessage()}"))

    # -- all of them

    def _list(self, reply: Reply, query: str) -> None:
        authorization = reply.request.head.get(b"authorization")
        refused = self._may_list(None if authorization is None else authorization.decode("latin-1"))
        if refused is not None:
            challenge = [("WWW-Authenticate", 'Bearer realm="strictproxy"')]
            raise NotAllowed(*refused, *(challenge if refused[0] == 401 else ()))
        wanted = {name: values[-1] for name, values in parse_qs(query).items()}
        unknown = wanted.keys() - {"state", "route", "upstream", "after", "limit"}
        if unknown:
            raise BadRequest(f"there is no filter {', '.join(sorted(unknown))}")
        states = {each.value for each in DetachedState}
        if wanted.get("state", "done") not in states:
            raise BadRequest(f"'state' must be one of {', '.join(sorted(states))}")
        after = _number(wanted, "after", 0)
        limit = min(_number(wanted, "limit", 100), _MOST_LISTED)
        found: list[dict[str, Any]] = []
        last: int | None = None
        for task in sorted(self._tasks, key=lambda each: each.record.seq):
            record = task.record
            if record.seq <= after or not _fits(task, wanted):
                continue
            if len(found) == limit:
                last = found[-1]["seq"] if found else after
                break
            about = {"seq": record.seq, "route": record.route, "upstream": record.upstream}
            found.append({**about, "client": record.client, **task.describe()})
        body = json.dumps({"tasks": found, "next": last}, indent=1).encode() + b"\n"
        reply.send(200, _JSON, body)


class _Stream:
    """One client that watches one task by server-sent events."""

    def __init__(self, reply: Reply, task: DetachedTask, left: Callable[[_Stream], None]) -> None:
        self._reply = reply
        self._task = task
        self._left = left
        self._told: dict[str, Any] | None = None
        self._silence = 0

    def start(self) -> bool:
        """Begin; returns False if that is the end, too."""
        request = self._reply.request
        has_body = request.head.method != b"HEAD"
        request.send_head(
            200,
            reason_phrase(200),
            [b"Content-Type: text/event-stream\r\n", *_JSON[1:], b"X-Accel-Buffering: no\r\n"],
            has_body=has_body,
            framed=False,
            ended=not has_body,
        )
        if not has_body:
            return False
        self._reply.on_gone = self._gone
        self._task.watchers.add(self._changed)
        self._changed()
        return not self._task.ended and not self._reply.gone

    def tick(self) -> None:
        """Tell what has changed, or that we are there."""
        self._silence += 1
        self._changed()
        if self._silence >= _TICKS_OF_SILENCE:
            self._send(b": still here\n\n")

    def end(self) -> None:
        """Tell nothing any more."""
        self._gone()
        if not self._reply.gone:
            self._reply.request.end()

    def _gone(self) -> None:
        self._task.watchers.discard(self._changed)
        self._left(self)

    def _changed(self) -> None:
        if self._reply.full:
            return  # the next one will do
        description = self._task.describe()
        told = {name: value for name, value in description.items() if name not in _PASSING}
        if told != self._told:
            self._told = told
            data = json.dumps(description, separators=(",", ":")).encode()
            self._send(b"event: state\ndata: " + data + b"\n\n")
        if self._task.ended:
            self.end()

    def _send(self, data: bytes) -> None:
        self._silence = 0
        self._reply.request.send(data)


#: What changes all the time, so that nobody is told of it alone.
_PASSING = ("age", "starts_in")


def _error_of(task: DetachedTask) -> ProxyError:
    """Return the error that a task ended with, as whoever waits for an answer would have got it."""
    record = task.record
    error = ProxyError(record.detail or "")
    error.status = record.status or 500
    error.reason = record.reason or ProxyError.reason
    error.title = record.title or ProxyError.title
    return error


def _fits(task: DetachedTask, wanted: dict[str, str]) -> bool:
    record = task.record
    return (
        wanted.get("state", record.state.value) == record.state.value
        and wanted.get("route", record.route) == record.route
        and wanted.get("upstream", record.upstream) == record.upstream
    )


def _number(wanted: dict[str, str], name: str, default: int) -> int:
    value = wanted.get(name, str(default))
    if not (value.isdecimal() and len(value) <= 18):
        raise BadRequest(f"{name!r} must be a whole number")
    return int(value)
