"""
The story of one exchange: route, lease, forward, release.

Reads top to bottom in the order in which things happen. Uses plain calls, and
a Deferred only where something has to be waited for. Both sides call in: the
client's channel (`client_...`) and the pod's connection (`pod_...`).

An exchange ends in `_finish`, once, whatever happens; that is where its lease
is released and its line logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from strictproxy.answering import Answering, AnsweringOwner, request_info
from strictproxy.config.model import Body, OnDisconnect, RouteConfig
from strictproxy.errors import (
    BadResponse,
    ClientGone,
    PodError,
    PodsExhausted,
    ProxyError,
    SpoolFailed,
    TaskGone,
)
from strictproxy.forwarding import Forwarding
from strictproxy.http.heads import Field, ResponseHead
from strictproxy.http.pod_connection import PodConnection
from strictproxy.http.problems import reason_phrase
from strictproxy.http.request import Request
from strictproxy.http.spool import Spool
from strictproxy.interfaces import RequestInfo
from strictproxy.scheduling import Address, Lease
from strictproxy.tasks.resubmission import KeptSubmit
from strictproxy.tasks.task import MAX_ANSWER, TrackedTask
from strictproxy.tasks.tracked import Submission, TrackedTasks
from strictproxy.upload import Upload
from strictproxy.upstream import Upstream

_log = Logger()

#: A request is given to so many pods at most, however many fail it.
_MAX_TRIES = 5


class ExchangeOwner(AnsweringOwner, Protocol):
    """What an exchange needs of the resource that began it."""

    upstreams: Mapping[str, Upstream]
    tasks: TrackedTasks

    def forwarding_about(self, route: RouteConfig) -> Forwarding:
        """Return how calls about the tasks of a route are forwarded."""

    def choose(self, info: RequestInfo) -> tuple[Forwarding, frozenset[Address] | None]:
        """Find the route, and the pods that the request is confined to, if any."""

    def make_spool(self, request: Request) -> Spool:
        """Return what receives a whole body."""

    def begin(self, exchange: Exchange, route: RouteConfig) -> None:
        """Take note of an exchange whose route has been found."""

    def limit_time(self, exchange: Exchange, route: RouteConfig) -> None:
        """Count the time that a route allows from now on."""

    def ended(self, exchange: Exchange) -> None:
        """Forget an exchange."""


class Exchange(Answering):
    """One request and its response passing through."""

    _proxy: ExchangeOwner

    __slots__ = (
        "_allowed",
        "_answer",
        "_collected",
        "_connecting",
        "_connection",
        "_ended_half",
        "_keep",
        "_lease",
        "_task",
        "_tunnel",
        "_upload",
        "_waiting",
    )

    def __init__(self, proxy: ExchangeOwner, request: Request) -> None:
        super().__init__(proxy, request)
        self._keep = request.keep
        #: the only pods it may go to, or None for any
        self._allowed: frozenset[Address] | None = None
        #: for a slot, or for what has to be done before a pod may see the request
        self._waiting: Deferred[Any] | None = None
        self._upload: Upload | None = None
        self._connecting: Deferred[PodConnection] | None = None
        self._connection: PodConnection | None = None
        self._lease: Lease | None = None
        #: the head of the pod's answer, and its body, where a task is to be looked for
        self._answer: ResponseHead | None = None
        self._collected: bytearray | None = None
        #: the task that the request is about, or has submitted
        self._task: TrackedTask | None = None
        #: an upgrade has taken place; which side has closed its half
        self._tunnel = False
        self._ended_half: str | None = None

    @property
    def task_id(self) -> str | None:
        """What people may call the task by that it is, or is about."""
        return self._request.task_id if self._task is None else self._task.task_id

    @property
    def kept_bytes(self) -> int:
        """Bytes of the body that are kept while it waits."""
        return self._request.read_ahead

    @property
    def bounded(self) -> bool:
        """Whether the time that it waits counts: somebody sits there."""
        return self._request.before_pod is None

    # -- route

    def start(self) -> None:
        """Find the route, and ask for a lease."""
        request = self._request
        request.handler = self
        try:
            info = request_info(request.head, self.client)
            task = self._proxy.tasks.find(info.path)
            if task is not None:
                self._start_related(task)
                return
            self._forwarding, pods = self._proxy.choose(info)
            route = self._forwarding.route
            if route.max_body is not None:
                request.limit_body(route.max_body)
            self._proxy.begin(self, route)
            self.upstream = self._proxy.upstreams[route.upstream]
            self._allowed = pods
            spools = route.body is Body.SPOOL or route.task is not None
            if spools and self._is_spooled(route):
                self._receive(self._proxy.make_spool(request))
            else:
                self._upload = Upload(request, request.stored, self._keep, self._broken)
                self._acquire()
        except ProxyError as error:
            self._fail(error)
        except Exception:
            self._broken(Failure())

    def _is_spooled(self, route: RouteConfig) -> bool:
        """Whether the body has to be received whole, before all else."""
        if self._request.stored is not None:
            return False
        if route.task is not None and route.task.resubmit:
            return True  # it has to be kept, even if it has come already
        return route.body is Body.SPOOL and not self._request.body_ended

    def _receive(self, spool: Spool) -> None:
        """Receive the body whole before all else: its sender's slowness holds no slot."""
        self._upload = upload = Upload(self._request, spool, self._keep, self._broken)
        stored = upload.receive(spool)
        stored.addCallbacks(lambda _: self._acquire(), self._not_stored)
        stored.addErrback(self._not_leased)

    def _start_related(self, task: TrackedTask) -> None:
        """Go to the pod that owns a task; that takes no slot, and waits for nobody."""
        self._task = task
        self._forwarding = self._proxy.forwarding_about(task.route)
        self._proxy.begin(self, task.route)
        self.upstream, self.pod = task.upstream, task.address
        self._request.head.target = task.target_at_pod(self._request.head.target)
        self._upload = Upload(self._request, None, self._keep, self._broken)
        self.granted = self._proxy.now()
        self._reach(task.upstream, task.address)

    def _not_stored(self, failure: Failure) -> None:
        # What else the client sends is of no use to anybody.
        self._fail(SpoolFailed(failure.getErrorMessage()))

    # -- lease

    def _acquire(self) -> None:
        forwarding, upstream = self._forwarding, self.upstream
        assert forwarding is not None
        assert upstream is not None
        route = forwarding.route
        self._waiting = None
        if self._trace is not None:
            self._trace.waits(route.name, upstream.name)
        patient = self._request.before_pod is not None
        lease = upstream.acquire(route.name, self._allowed, self, patient)
        if isinstance(lease, Lease):
            self._leased(lease)
        else:
            self._wait(lease)

    def _wait(self, lease: Deferred[Lease]) -> None:
        self._waiting = lease
        lease.addCallbacks(self._leased, self._not_leased)
        lease.addErrback(self._broken)

    def _not_leased(self, failure: Failure) -> None:
        self._waiting = None
        if failure.check(CancelledError):
            return
        error = failure.value
        self._fail(error if isinstance(error, ProxyError) else _unexpected(failure))

    def _leased(self, lease: Lease) -> None:
        """Use the slot: take an idle connection to its pod, or open one."""
        self._waiting = None
        self._lease = lease
        self.granted = lease.granted
        self.in_flight = lease.in_flight
        self.pod = lease.address
        upstream = self.upstream
        assert upstream is not None
        before_pod = self._request.before_pod
        if before_pod is None:
            self._reach(upstream, lease.address)
            return
        assert self.route is not None
        self._proxy.limit_time(self, self.route)
        waiting = self._waiting = before_pod(lease.address)
        waiting.addCallbacks(lambda _: self._go_on(upstream, lease), self._not_leased)
        waiting.addErrback(self._broken)

    def _go_on(self, upstream: Upstream, lease: Lease) -> None:
        """Reach for the pod, now that whatever had to be done before is done."""
        self._waiting = None
        self._reach(upstream, lease.address)

    def _reach(self, upstream: Upstream, address: Address) -> None:
        connection = upstream.pool.take(address)
        if connection is not None:
            self._forward(connection)
        else:
            self._connect(upstream, address)

    def _connect(self, upstream: Upstream, address: Address) -> None:
        connecting = self._connecting = upstream.pool.connect(address)
        connecting.addCallbacks(self._connected, self._not_connected)
        connecting.addErrback(self._broken)

    def _connected(self, connection: PodConnection) -> None:
        self._connecting = None
        if self._finished:
            connection.abort()
            return
        if self.upstream is not None:
            self.upstream.reached(connection.address)
        self._forward(connection)

    def _not_connected(self, failure: Failure) -> None:
        """Move to another pod: this one has not seen the request."""
        self._connecting = None
        lease, upstream = self._lease, self.upstream
        if self._task is not None and not self._finished:
            self.tries += 1
            self._fail(TaskGone(f"{self._task}: {failure.getErrorMessage()}"))
            return
        if self._finished or lease is None or upstream is None:
            return
        self.tries += 1
        _log.info(
            "{upstream}: {pod} refused a connection: {reason}",
            upstream=upstream.name,
            pod=lease.address,
            reason=failure.getErrorMessage(),
        )
        self._lease = None
        if self._request.not_reached is not None:
            self._request.not_reached()
        upstream.unreachable(lease.address, failure.getErrorMessage())
        try:
            self._wait(upstream.move(lease))
        except PodsExhausted as error:
            self._fail(error)

    # -- forward: the request

    def _forward(self, connection: PodConnection) -> None:
        """Send the head, and what there is of the body, to the pod."""
        forwarding, upload = self._forwarding, self._upload
        assert forwarding is not None
        assert upload is not None
        self.tries += 1
        if self.upstream is not None:
            self.upstream.sent(connection.address)
        self._connection = connection
        head = self._request.head
        body, ended = upload.attach(connection)
        pod = str(self.pod)
        traceparent = None if self._trace is None else self._trace.sent(pod)
        out = forwarding.request_head(head, self.peer, pod, self.identity, traceparent)
        if self._task is None and forwarding.callback_header is not None:
            url = self._proxy.tasks.callback_url(forwarding.route, self.number)
            out.insert(-1, b"%b: %b\r\n" % (forwarding.callback_header, (url or "").encode()))
        out.append(body)
        connection.begin(self, head.method, b"".join(out), ended)
        if not ended:
            upload.go_on()

    def client_data(self, data: bytes) -> None:
        """Pass body bytes on to the pod."""
        if self._tunnel:
            if self._connection is not None:
                self._connection.send(data)
        elif self._upload is not None:
            self._upload.data(data)

    def client_end(self, trailers: list[Field]) -> None:
        """Pass the end of the body on to the pod."""
        if self._tunnel:
            if self._connection is not None:
                self._half_closed("client", self._connection.end_output)
        elif self._upload is not None:
            self._upload.end(trailers)

    def client_failed(self, error: ProxyError) -> None:
        """Give up: the body is broken, too large or not coming."""
        self._fail(error)

    def client_full(self) -> None:
        """Let the pod wait for the client."""
        if self._connection is not None:
            self._connection.pause()

    def client_drained(self) -> None:
        """Let the pod go on."""
        if self._connection is not None:
            self._connection.resume()

    def client_gone(self) -> None:
        """Leave the line, or the pod, or let the pod finish: as the route says."""
        self.client_left = True
        self.error = self.error or ClientGone("the client closed its connection")
        route = self.route
        finish = route is not None and route.on_client_disconnect is OnDisconnect.FINISH
        if route is not None and route.task is not None and self._task is None:
            finish = True  # the pod may have taken the job: its slot is not free
        if self._connection is None or self._tunnel or not self._request.body_ended:
            finish = False  # there is nothing that the pod could finish
        if finish and self._connection is not None:
            self._connection.resume()
            return
        self._finish()

    # -- forward: the response

    def pod_interim(self, head: ResponseHead) -> None:
        """Pass a 1xx response on."""
        if self._forwarding is not None:
            lines = self._forwarding.interim_lines(head)
            self._request.send_interim(head.status, _reason(head), lines)

    def pod_head(self, head: ResponseHead, data: bytes, ended: bool) -> None:
        """Pass the head on, with the first of the body."""
        if self._upload is not None:
            self._upload.answered()
        forwarding = self._forwarding
        if forwarding is not None and forwarding.route.task is not None:
            self._answer = head
            self._collected = bytearray(data)
        if ended:
            self._connection = None
            self._release_lease()
        now = self._proxy.now()
        self._judge(head, now)
        request = self._request
        early = not request.body_ended and (ended or head.status >= 400)
        if early:
            # A 413, say: the rest of the body will not be read by anybody.
            request.last_on_connection()
        lines = self._response_lines(head, now)
        request.send_head(
            head.status,
            _reason(head),
            lines,
            has_body=head.has_body(request.head.method),
            framed=head.content_length is not None,
            data=data,
            ended=ended,
        )
        if ended:
            self._finish()
        else:
            self._splice_response()

    def _judge(self, head: ResponseHead, now: float) -> None:
        """Tell the upstream how its pod did."""
        upstream, forwarding, pod = self.upstream, self._forwarding, self.pod
        if upstream is None or forwarding is None or pod is None:
            return
        if self.granted is not None:
            upstream.began_to_answer(pod, now - self.granted)
        if head.status in forwarding.route.failures:
            upstream.failed(pod, f"it answered with {head.status}")
        else:
            upstream.answered(pod)
        if upstream.limit_header is not None:
            said = head.get(upstream.limit_header)
            if said is not None:
                upstream.said_limit(pod, said)

    def _splice_response(self) -> None:
        """Take large bodies out of Python's hands, where that is possible."""
        if self._collected is not None:
            return
        dest = self._request.transport
        if dest is not None and self._connection is not None:
            self._connection.splice_to(dest, self._count)

    def _count(self, sent: int) -> None:
        self._request.bytes_sent += sent

    def _response_lines(self, head: ResponseHead, now: float) -> list[bytes]:
        assert self._forwarding is not None
        assert self.granted is not None
        waited, pod_time = self.granted - self._started, now - self.granted
        return self._forwarding.response_lines(head, self.identity, waited, pod_time)

    def pod_data(self, data: bytes) -> None:
        """Pass body bytes on to the client."""
        self._collect(data)
        self._request.send(data)
        if not self._tunnel:
            self._splice_response()

    def pod_end(self, data: bytes, trailers: list[Field]) -> None:
        """Pass the last of the body on; whoever waits for the slot has it before that."""
        self._connection = None
        self._collect(data)
        self._release_lease()
        if self._tunnel:
            self._request.close()
        else:
            self._request.end(data, trailers)
        self._finish()

    def _collect(self, data: bytes) -> None:
        if self._collected is not None:
            self._collected += data
            if len(self._collected) > MAX_ANSWER:
                self._collected = None

    def _found_task(self, lease: Lease) -> bool:
        """Let a task keep the lease, if the pod's answer says that there is one."""
        head, route, upstream = self._answer, self.route, self.upstream
        if head is None or self._collected is None or self._connection is not None:
            return False
        assert route is not None
        assert upstream is not None
        what = Submission(
            self.number, self.client, self.identity, head.status, head.get, bytes(self._collected)
        )
        task = self._task = self._proxy.tasks.submitted(route, upstream, lease, what)
        if task is not None and task.resubmits:
            task.keep(self._kept_submit())
        return task is not None

    def _kept_submit(self) -> KeptSubmit | None:
        """Return the submit call, to be sent once more if the task is lost."""
        request = self._request
        stored = None if self._upload is None else self._upload.take_stored()
        if stored is None:
            return None
        return KeptSubmit(request.head, stored, request.trailers, self.peer, self.client)

    def pod_upgraded(self, head: ResponseHead, data: bytes) -> None:
        """Carry bytes both ways from now on, if that is what the client asked for."""
        request, connection = self._request, self._connection
        if head.upgrade is None or request.head.upgrade is None or not request.body_ended:
            if connection is not None:
                connection.abort()
            self.pod_failed(BadResponse("the pod upgraded a request that did not ask for it"))
            return
        self._tunnel = True
        lines = self._response_lines(head, self._proxy.now())
        lines.append(b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade)
        request.switch(lines, data)

    def pod_half_closed(self) -> None:
        """Pass the pod's half-close on; with both halves closed the exchange is over."""
        self._half_closed("pod", self._request.end_output)

    def _half_closed(self, side: str, pass_on: Callable[[], None]) -> None:
        if self._ended_half in (None, side):
            self._ended_half = side
            pass_on()
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._request.close()
        self._finish()

    def pod_failed(self, error: PodError) -> None:
        """Try again if the pod certainly did not see the request, else answer with the error."""
        self._connection = None
        lease, upstream, route, upload = self._lease, self.upstream, self.route, self._upload
        if upstream is not None and self.pod is not None and not error.retry_elsewhere:
            upstream.failed(self.pod, str(error))
        if upload is None or not upload.repeatable or lease is None or self._tunnel:
            self._fail(error)
            return
        assert upstream is not None
        assert route is not None
        upload.detach()
        method = self._request.head.method.decode("latin-1")
        if error.retry_elsewhere:
            self._connect(upstream, lease.address)
        elif method in route.retry and self.tries < _MAX_TRIES and not self.client_left:
            self._lease = None
            try:
                self._wait(upstream.move(lease))
            except PodsExhausted:
                self._fail(error)
        else:
            self._fail(error)

    def pod_full(self) -> None:
        """Let the client wait for the pod."""
        if self._tunnel:
            self._request.pause()
        elif self._upload is not None:
            self._upload.full()

    def pod_drained(self) -> None:
        """Let the client go on."""
        if self._tunnel:
            self._request.resume()
        elif self._upload is not None:
            self._upload.drained()

    # -- release

    def _fail(self, error: ProxyError) -> None:
        """Answer with an error, unless an answer has begun."""
        if self._finished:
            return
        self.error = self.error or error
        retry_after = None
        if error.status == 503 and self.upstream is not None:
            retry_after = self.upstream.scheduler.retry_after()
        # The slot first: the connection to the pod may still be in use.
        self._release()
        self._request.fail(error, retry_after, self.identity)
        self._finish()

    def _broken(self, failure: Failure) -> None:
        self._fail(_unexpected(failure))

    def withdraw(self) -> None:
        """Leave the line without an answer, and without a trace: it will come again."""
        if not self._finished:
            self._finished = True
            self._release()
            self._proxy.ended(self)

    def abandon(self, error: ProxyError) -> None:
        """End the exchange from outside, as when the proxy stops."""
        self._fail(error)

    def _release(self) -> None:
        """Hand back whatever is held or waited for."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.cancel()
        connecting, self._connecting = self._connecting, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        self._release_lease()
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.close()
        if connecting is not None:
            connecting.cancel()

    def _release_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is None or self.upstream is None:
            return
        if self._answer is None or not self._found_task(lease):
            self.upstream.release(lease)

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        self._release()
        self._proxy.ended(self)
        if self._task is not None and self._answer is not None and self._collected is not None:
            path = self._request.head.target.partition(b"?")[0].decode("latin-1")
            self._task.heard(path, self._answer.status, bytes(self._collected))
        self._account()


def _reason(head: ResponseHead) -> bytes:
    return head.reason or reason_phrase(head.status)


def _unexpected(failure: Failure) -> ProxyError:
    _log.failure("an exchange failed", failure=failure)
    return ProxyError("the proxy failed; its log has more")
