"""
What all requests have in common, however they are answered: who asks, what is told in the end.

Owns the accounting: an answer is counted, traced and logged once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from strictproxy.config.model import RouteConfig
from strictproxy.errors import ProxyError
from strictproxy.forwarding import Forwarding, request_id
from strictproxy.http.heads import RequestHead
from strictproxy.http.request import Request
from strictproxy.interfaces import RequestInfo
from strictproxy.logs import AccessRecord
from strictproxy.metrics import Counters
from strictproxy.scheduling import Address
from strictproxy.tracing import Tracing
from strictproxy.upstream import Upstream


class AnsweringOwner(Protocol):
    """Where answers are accounted for."""

    now: Callable[[], float]
    log_access: Callable[[AccessRecord], None] | None
    counters: Counters
    tracing: Tracing | None

    def next_number(self) -> int:
        """Return a number that nobody has had."""


def request_info(head: RequestHead, client: str) -> RequestInfo:
    """Return what routing may see of a request."""
    host = head.host.decode("latin-1").lower()
    host = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    # OPTIONS * is about the server as a whole (RFC 9110, 9.3.7): whoever serves /.
    path = "/" if head.target == b"*" else head.target.partition(b"?")[0].decode("latin-1")
    fields = ((name.decode("latin-1"), value.decode("latin-1")) for name, _, value in head.fields)
    return RequestInfo(head.method.decode("latin-1"), path, host, fields, client)


class Answering:
    """One request on its way to its answer."""

    __slots__ = (
        "_finished",
        "_forwarding",
        "_proxy",
        "_request",
        "_started",
        "_trace",
        "client",
        "client_left",
        "error",
        "granted",
        "identity",
        "in_flight",
        "number",
        "peer",
        "pod",
        "tries",
        "upstream",
    )

    def __init__(self, proxy: AnsweringOwner, request: Request) -> None:
        self._proxy = proxy
        self._request = request
        self._started = proxy.now()
        self.number = proxy.next_number()
        self.peer, self.client = request.origin()
        self.identity = request_id(request.head)
        self._trace = None if proxy.tracing is None else proxy.tracing.begin(request.head)
        self._forwarding: Forwarding | None = None
        self.upstream: Upstream | None = None
        self._finished = False
        self.client_left = False
        self.error: ProxyError | None = None
        self.granted: float | None = None
        self.in_flight = 0
        self.pod: Address | None = None
        #: pods, or connections, that the request was given to
        self.tries = 0

    @property
    def route(self) -> RouteConfig | None:
        """The route, once it has been found."""
        return None if self._forwarding is None else self._forwarding.route

    @property
    def task_id(self) -> str | None:
        """What people may call it by, if it is a task."""
        return self._request.task_id

    def abandon(self, error: ProxyError) -> None:
        """End from outside, as when the proxy stops."""
        raise NotImplementedError

    def _account(self) -> None:
        """Count, trace and log the answer."""
        owner = self._proxy
        now, granted, forwarding = owner.now(), self.granted, self._forwarding
        counters, error = owner.counters, self.error
        (counters.unrouted if forwarding is None else counters.of(forwarding.route.name)).ended(
            499 if self.client_left else self._request.status,
            None if error is None else error.reason,
            (now if granted is None else granted) - self._started,
            None if granted is None else now - granted,
            self.tries,
        )
        if self._trace is not None:
            reason = None if error is None else error.reason
            self._trace.ended(self._request.status, reason, self.tries)
        if owner.log_access is not None:
            owner.log_access(self._record(now))

    def _record(self, now: float) -> AccessRecord:
        granted = self.granted
        head = self._request.head
        return AccessRecord(
            client=self.client,
            method=head.method,
            target=head.target,
            host=head.host,
            route=self.route.name if self.route is not None else None,
            upstream=self.upstream.name if self.upstream is not None else None,
            pod=self.pod,
            status=499 if self.client_left else self._request.status,
            reason=self.error.reason if self.error is not None else None,
            sent=self._request.bytes_sent,
            waited=(now if granted is None else granted) - self._started,
            pod_time=None if granted is None else now - granted,
            in_flight=self.in_flight,
            tries=self.tries,
            task=self.task_id,
        )
