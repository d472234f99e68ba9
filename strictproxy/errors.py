"""
The one exception hierarchy.

Two families meet here. `ConfigError` stops the program before it starts.
`ProxyError` ends one exchange: each kind knows the status it is answered with,
its machine-readable reason, whose fault it is, and whether the request may
safely go to another pod. `strictproxy.http.problems` turns it into the answer.
"""

from __future__ import annotations

from enum import Enum


class StrictProxyError(Exception):
    """Base of everything strictproxy raises on purpose."""


class LeaseReleasedTwice(StrictProxyError):
    """A lease was released, or moved, after it had ended: a bug in its owner."""


class ConfigError(StrictProxyError):
    """A configuration cannot be used; the text is complete and meant for a person."""


class Source(Enum):
    """Where a failed exchange went wrong."""

    CLIENT = "client"
    POD = "pod"
    PROXY = "proxy"


class ProxyError(StrictProxyError):
    """
    An exchange that ends with an answer of our own.

    :cvar status: HTTP status code of the answer.
    :cvar reason: stable word for machines; also the end of the problem's `type`.
    :cvar title: the same for people, the same for every occurrence (RFC 9457, 3.1.3).
    :cvar source: whose fault it is.
    :cvar retry_elsewhere: the request certainly was not processed by the pod.
    """

    status: int = 500
    reason: str = "internal"
    title: str = "The proxy failed"
    source: Source = Source.PROXY
    retry_elsewhere: bool = False
    #: header fields that the answer needs besides the usual ones
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def detail(self) -> str:
        """What happened this time, for people."""
        return str(self)


# -- routing


class NoRoute(ProxyError):
    """No route matches the request."""

    status = 404
    reason = "no_route"
    title = "No route matches this request"
    source = Source.CLIENT

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"no route matches {method} {path}")


class RouterFailed(ProxyError):
    """A custom router raised, or named an upstream that does not exist."""

    status = 500
    reason = "router_failed"
    title = "A custom router failed"


# -- waiting for a slot


class LineFull(ProxyError):
    """As many requests wait as may."""

    status = 503
    reason = "queue_full"
    title = "Too many requests are waiting"

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} requests are waiting already")


class WaitedTooLong(ProxyError):
    """No slot became free within the upstream's queue timeout."""

    status = 503
    reason = "queue_timeout"
    title = "No slot became free in time"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"waited {seconds:.1f} s for a free slot")


class NoPods(ProxyError):
    """No pod is known, and none appeared in time."""

    status = 503
    reason = "no_pods"
    title = "No pod is available"

    def __init__(self) -> None:
        super().__init__("discovery knows no pod for this upstream")


class SpoolFailed(ProxyError):
    """A body that was to be received whole could not be kept."""

    status = 507
    reason = "spool_failed"
    title = "The request's body could not be stored"


class TooManyConnections(ProxyError):
    """As many clients are connected as may be."""

    status = 503
    reason = "too_many_connections"
    title = "Too many clients are connected"


class ShuttingDown(ProxyError):
    """The proxy is stopping and takes nothing new."""

    status = 503
    reason = "shutting_down"
    title = "The proxy is shutting down"


class UnknownTask(ProxyError):
    """The path names a task that nobody knows."""

    status = 404
    reason = "unknown_task"
    title = "There is no such task"


class TaskGone(ProxyError):
    """The pod that had the task is gone, or does not know it any more."""

    status = 410
    reason = "task_gone"
    title = "The task is lost"


class TaskAway(ProxyError):
    """The pod that had the task is gone; it is being submitted to another one."""

    status = 503
    reason = "task_resubmitted"
    title = "The task is being submitted again"


class TaskNotEnded(ProxyError):
    """The result of a detached request was asked for before there was one."""

    status = 409
    reason = "task_not_ended"
    title = "The task has not ended yet"
    source = Source.CLIENT


class TaskCancelled(ProxyError):
    """The client cancelled its detached request."""

    status = 410
    reason = "task_cancelled"
    title = "The task was cancelled"
    source = Source.CLIENT


class TaskExpired(ProxyError):
    """A detached request waited for a slot as long as its route allows."""

    status = 410
    reason = "task_expired"
    title = "The task waited too long"


class Interrupted(ProxyError):
    """The proxy ended while a detached request ran, which may not be given to a pod again."""

    status = 503
    reason = "interrupted"
    title = "The proxy ended while the request ran"


class TooManyTasks(ProxyError):
    """As many detached requests are known as may be, and none of them has ended."""

    status = 503
    reason = "too_many_tasks"
    title = "Too many tasks"


class TaskStoreFull(ProxyError):
    """The bodies and results of detached requests take all the room that they may."""

    status = 507
    reason = "task_store_full"
    title = "There is no room for the task"


class TaskStoreFailed(ProxyError):
    """A detached request, or its result, could not be written."""

    status = 507
    reason = "task_store_failed"
    title = "The task could not be stored"


class TaskNotRecorded(TaskStoreFailed):
    """That a pod has it now could not be written, so none has been given it."""

    retry_elsewhere = True


class ResultTooLarge(ProxyError):
    """The pod's answer to a detached request is longer than its route allows."""

    status = 502
    reason = "result_too_large"
    title = "The result is too large"


class Cancelled(ProxyError):
    """An operator ended the request."""

    status = 503
    reason = "cancelled"
    title = "An operator has cancelled the request"


# -- the pod


class PodError(ProxyError):
    """Something is wrong with the pod, or with the way to it."""

    status = 502
    source = Source.POD


class ConnectFailed(PodError):
    """The pod could not be connected to, so the request never reached it."""

    reason = "connect_failed"
    title = "The pod could not be reached"
    retry_elsewhere = True


class PodsExhausted(PodError):
    """Every pod refused the request."""

    reason = "pods_exhausted"
    title = "Every pod refused the connection"
    retry_elsewhere = True

    def __init__(self, tried: int) -> None:
        super().__init__(f"{tried} pod(s) refused the connection, and no other is known")


class PodDisconnected(PodError):
    """The pod closed the connection before its answer was complete."""

    reason = "pod_disconnected"
    title = "The pod closed the connection"


class StaleConnection(PodDisconnected):
    """A kept-alive connection turned out to be closed before the pod answered anything."""

    retry_elsewhere = True


class PodGone(PodError):
    """The pod left discovery, and the request took longer than its `drain_timeout` since."""

    reason = "pod_gone"
    title = "The pod is gone"


class BadResponse(PodError):
    """The pod's answer is not valid HTTP/1.1."""

    reason = "bad_response"
    title = "The pod's answer was not valid"


class PodTimeout(PodError):
    """The pod kept the proxy waiting longer than a timeout allows."""

    status = 504
    reason = "pod_timeout"
    title = "The pod took too long"


class ExchangeTimeout(ProxyError):
    """The exchange, waiting included, took longer than its route allows."""

    status = 504
    reason = "timeout"
    title = "The request took too long"


# -- the client


class ClientError(ProxyError):
    """The request cannot be served as it is."""

    status = 400
    source = Source.CLIENT


class BadRequest(ClientError):
    """The request is not valid HTTP/1.1."""

    reason = "bad_request"
    title = "The request was not valid"


class HeadersTooLarge(ClientError):
    """The header section is longer, or has more fields, than allowed."""

    status = 431
    reason = "headers_too_large"
    title = "The request's headers are too large"


class TargetTooLong(ClientError):
    """The request target is longer than allowed."""

    status = 414
    reason = "uri_too_long"
    title = "The request's target is too long"


class BodyTooLarge(ClientError):
    """The body is longer than allowed."""

    status = 413
    reason = "body_too_large"
    title = "The request's body is too large"


class IdempotencyKeyReused(ClientError):
    """Another request has come with the same Idempotency-Key."""

    status = 422
    reason = "idempotency_key_reused"
    title = "The idempotency key belongs to another request"


class CallbackForbidden(ClientError):
    """The client wants somebody told whom the configuration does not allow."""

    status = 403
    reason = "callback_forbidden"
    title = "The callback is not allowed"


class MethodNotSupported(ClientError):
    """A method that this proxy does not forward."""

    status = 501
    reason = "method_not_supported"
    title = "The method is not supported"


class VersionNotSupported(ClientError):
    """A version of HTTP other than 1.0 and 1.1."""

    status = 505
    reason = "version_not_supported"
    title = "The HTTP version is not supported"


class ExpectationFailed(ClientError):
    """An `Expect` other than `100-continue` (RFC 9110, 10.1.1)."""

    status = 417
    reason = "expectation_failed"
    title = "The expectation cannot be met"


class ClientTimeout(ClientError):
    """The client took too long to send its request."""

    status = 408
    reason = "client_timeout"
    title = "The client took too long"


class ClientGone(ClientError):
    """The client closed its connection; nobody reads the answer. Logged as 499."""

    status = 499
    reason = "client_gone"
    title = "The client went away"
