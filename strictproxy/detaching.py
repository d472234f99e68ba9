"""
Accepting a request that will be answered later (`Prefer: respond-async`, RFC 7240).

Its body is received whole, into a file; then it is written down that there is a
task; then the client is told so, by a 202. Only then does it join the line.
"""

from __future__ import annotations

import hashlib
import json
from typing import Protocol

from twisted.logger import Logger
from twisted.python.failure import Failure

from strictproxy.answering import Answering, AnsweringOwner
from strictproxy.config.model import RouteConfig
from strictproxy.errors import (
    BadRequest,
    CallbackForbidden,
    ClientGone,
    ProxyError,
    TaskStoreFailed,
)
from strictproxy.forwarding import Forwarding
from strictproxy.http.heads import Field
from strictproxy.http.preferences import Preferences, parse_preferences
from strictproxy.http.problems import reason_phrase
from strictproxy.http.request import ClientRequest
from strictproxy.http.spool import Spool
from strictproxy.tasks.callbacks import Callbacks
from strictproxy.tasks.detached import DetachedTasks
from strictproxy.tasks.detached_task import TASKS_PATH, DetachedTask
from strictproxy.tasks.record import Callback, DetachedRecord
from strictproxy.upstream import Upstream

_log = Logger()

_MAX_KEY = 255
#: Fields that are not stored: they are about this hop, or for us.
_NOT_STORED = frozenset((b"prefer", b"expect", b"content-length", b"x-request-id"))


def wants_to_detach(request: ClientRequest) -> Preferences | None:
    """Return the preferences of a request if its client does not want to wait, else None."""
    head = request.head
    values = [value.decode("latin-1") for name, _, value in head.fields if name == b"prefer"]
    preferences = parse_preferences(values)
    # An upgrade, or the length of a body that nobody sees, is of no use later.
    if not preferences.respond_async or head.upgrade is not None or head.method == b"HEAD":
        return None
    return preferences


class SubmissionOwner(AnsweringOwner, Protocol):
    """What a submission needs of the resource that began it."""

    callbacks: Callbacks | None

    def begin(self, exchange: Submission, route: RouteConfig) -> None:
        """Take note of a request whose route has been found."""

    def ended(self, exchange: Submission) -> None:
        """Forget it."""


class Submission(Answering):
    """One request on its way to being a task."""

    _proxy: SubmissionOwner

    __slots__ = (
        "_body_hash",
        "_callback",
        "_detached",
        "_handed_over",
        "_id",
        "_key",
        "_preferences",
        "_received",
        "_spool",
    )

    #: it is received, not waited for
    bounded = True
    kept_bytes = 0

    def __init__(
        self,
        proxy: SubmissionOwner,
        detached: DetachedTasks,
        request: ClientRequest,
        forwarding: Forwarding,
        upstream: Upstream,
        preferences: Preferences,
    ) -> None:
        super().__init__(proxy, request)
        self._detached = detached
        self._forwarding = forwarding
        self.upstream = upstream
        self._preferences = preferences
        self._id = detached.new_id()
        self._callback: str | None = None
        self._key: str | None = None
        self._spool: Spool | None = None
        self._received = 0
        self._body_hash = hashlib.sha256()
        #: what has been received belongs to a task
        self._handed_over = False

    def start(self) -> None:
        """Receive the body."""
        request, route = self._request, self.route
        assert route is not None
        request.handler = self
        try:
            self._callback = self._find_callback()
            self._key = self._find_key(route)
            if route.max_body is not None:
                request.limit_body(route.max_body)
            self._proxy.begin(self, route)
            spool = self._detached.make_spool(self._id, request.pause, request.resume)
            self._spool = spool
            spool.stored.addCallbacks(lambda _: self._stored(), self._not_stored)
            spool.stored.addErrback(self._broken)
            if request.head.expects_continue:
                request.send_interim(100, b"Continue", [])
            self.client_data(request.open_body())
            if request.body_ended:
                self.client_end([])
        except ProxyError as error:
            self._fail(error)
        except Exception:
            self._broken(Failure())

    def _find_callback(self) -> str | None:
        callbacks, url = self._proxy.callbacks, self._preferences.callback
        if callbacks is None:
            if url is not None:
                raise CallbackForbidden("nobody may be called: there is no tasks.callbacks")
            return None
        if url is None:
            value = self._request.head.get(callbacks.config.header.lower().encode())
            url = None if value is None else value.decode("latin-1")
        if url is not None:
            callbacks.check(url)
        return url

    def _find_key(self, route: RouteConfig) -> str | None:
        """Return the digest of the Idempotency-Key, with all that it is valid for."""
        value = self._request.head.get(b"idempotency-key")
        if value is None:
            return None
        key = value.decode("latin-1").strip()
        if len(key) >= 2 and key[0] == key[-1] == '"':
            key = key[1:-1]
        if not key or len(key) > _MAX_KEY or not key.isascii() or not key.isprintable():
            raise BadRequest(f"Idempotency-Key must be 1 to {_MAX_KEY} printable characters")
        # Somebody else's key is another key, or they could have each other's results.
        who = self._request.head.get(b"authorization") or b""
        return _digest(route.name.encode(), who, key.encode())

    # -- the body

    def client_data(self, data: bytes) -> None:
        """Write the body into its file."""
        if self._finished or self._spool is None or not data:
            return
        try:
            self._detached.make_room(len(data))
        except ProxyError as error:
            self._fail(error)
            return
        self._received += len(data)
        self._body_hash.update(data)
        self._spool.write(data)

    def client_end(self, trailers: list[Field]) -> None:
        """Wait until the file is on the disk."""
        if self._spool is not None and not self._finished:
            self._spool.finish()

    def client_failed(self, error: ProxyError) -> None:
        """Give up: the body is broken, too large or not coming."""
        self._fail(error)

    def client_gone(self) -> None:
        """Forget it; unless it is a task already, or is about to be one."""
        self.client_left = True
        self.error = self.error or ClientGone("the client closed its connection")
        if not self._handed_over:
            self._finish()

    def client_full(self) -> None:
        """Do nothing: what is sent is short."""

    def client_drained(self) -> None:
        """Do nothing."""

    def _not_stored(self, failure: Failure) -> None:
        self._fail(TaskStoreFailed(f"the body cannot be written: {failure.getErrorMessage()}"))

    # -- the task

    def _stored(self) -> None:
        record = self._record_of_task()
        self._handed_over = True
        if self._spool is not None:
            self._spool.close()
        try:
            added = self._detached.add(record)
        except ProxyError as error:
            self._detached.discard(record)
            self._fail(error)
            return
        added.addCallbacks(self._accepted, self._not_accepted)
        added.addErrback(self._broken)

    def _record_of_task(self) -> DetachedRecord:
        head, route = self._request.head, self.route
        assert route is not None
        assert route.detach is not None
        assert self.upstream is not None
        dropped = head.dropped | _NOT_STORED
        callbacks = self._proxy.callbacks
        if callbacks is not None:
            dropped |= {callbacks.config.header.lower().encode()}
        fields = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for lower, name, value in head.fields
            if lower not in dropped
        ]
        fields.append(("X-Request-Id", self.identity.decode("latin-1")))
        if self._preferences.rest is not None:
            fields.append(("Prefer", self._preferences.rest))
        if head.chunked or head.content_length is not None:
            fields.append(("Content-Length", str(self._received)))
        fingerprint = _digest(
            head.method,
            head.target,
            head.host,
            head.get(b"content-type") or b"",
            self._body_hash.digest(),
        )
        return DetachedRecord(
            id=self._id,
            seq=self._detached.next_seq(),
            route=route.name,
            upstream=self.upstream.name,
            created=self._proxy.now(),
            method=head.method.decode("latin-1"),
            target=head.target.decode("latin-1"),
            host=head.host.decode("latin-1"),
            fields=fields,
            peer=(self.peer.address, self.peer.trusted, self.peer.secure),
            client=self.client,
            request_id=self.identity.decode("latin-1"),
            body_size=self._received,
            repeat=route.detach.repeat,
            max_result=route.detach.max_result,
            limit_wait=route.detach.limit_wait,
            hold_interrupted=route.detach.hold_interrupted,
            callback=None if self._callback is None else Callback(self._callback),
            key=self._key,
            fingerprint=None if self._key is None else fingerprint,
        )

    def _accepted(self, task: DetachedTask) -> None:
        new = task.record.id == self._id
        if new and self.client_left and self._key is None and self._callback is None:
            # Nobody knows of it, and nobody will ever ask.
            self._detached.forget(task)
            self._finish()
            return
        self._id = task.record.id
        if new:
            self._detached.begin(task)
        if not self._finished:
            self._answer(task)
            self._finish()

    def _answer(self, task: DetachedTask) -> None:
        body = json.dumps(task.describe()).encode() + b"\n"
        lines = [
            b"Preference-Applied: respond-async\r\n",
            b"Location: %b/%b\r\n" % (TASKS_PATH.encode(), task.record.id.encode()),
            b"Retry-After: %d\r\n" % task.ask_again_after(),
            b"Content-Type: application/json\r\n",
            b"Content-Length: %d\r\n" % len(body),
            b"Cache-Control: no-store\r\n",
            b"X-Request-Id: %b\r\n" % self.identity,
        ]
        self._request.send_head(
            202, reason_phrase(202), lines, has_body=True, framed=True, data=body, ended=True
        )

    def _not_accepted(self, failure: Failure) -> None:
        error = failure.value
        if isinstance(error, ProxyError):
            self._fail(error)
        else:
            self._broken(failure)

    # -- the end

    @property
    def task_id(self) -> str | None:
        """What people may call the task by."""
        return self._id[:8] if self._handed_over else None

    def abandon(self, error: ProxyError) -> None:
        """End it from outside, as when the proxy stops."""
        self._fail(error)

    def _fail(self, error: ProxyError) -> None:
        if self._finished:
            return
        self.error = self.error or error
        self._request.fail(error, None, self.identity)
        self._finish()

    def _broken(self, failure: Failure) -> None:
        _log.failure("a detached request could not be accepted", failure=failure)
        self._fail(ProxyError("the proxy failed; its log has more"))

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        spool, self._spool = self._spool, None
        if spool is not None and not self._handed_over:
            self._detached.give_back(self._id, self._received, spool)
        self._proxy.ended(self)
        self._account()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:%b" % (len(part), part))
    return digest.hexdigest()
