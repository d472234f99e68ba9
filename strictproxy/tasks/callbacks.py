"""
Telling somebody that a detached request has ended.

Only hosts that the configuration names are called, and no address that it
forbids: what a name resolves to is looked at, and what was looked at is what is
connected to, so that a name cannot be another one a moment later. What is sent
is signed as https://www.standardwebhooks.com describes it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Collection
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import treq
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IStreamClientEndpoint
from twisted.internet.ssl import optionsForClientTLS
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from strictproxy.asking import reason_of
from strictproxy.config.model import CallbacksConfig
from strictproxy.errors import CallbackForbidden, ConfigError
from strictproxy.tasks.detached_task import DetachedTask

_log = Logger()

_T = TypeVar("_T")

#: Gives the addresses of a name.
Resolve = Callable[[str], Deferred[Collection[str]]]

#: Seconds for one call, and for one connection.
_TIMEOUT = 30.0
_CONNECT_TIMEOUT = 5.0
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 300.0
_AT_ONCE = 16
_MAX_ANSWER = 64 * 1024


def sign(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the value of `webhook-signature`."""
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    digest = hmac.digest(secret, signed, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def read_secret(path: str) -> bytes:
    """
    Read the key that signs: any text, or `whsec_` and Base64.

    :raise ConfigError: there is none.
    """
    try:
        text = Path(path).read_bytes().strip()
        if text.startswith(b"whsec_"):
            text = base64.b64decode(text[6:], validate=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tasks.callbacks.secret_file: {path}: {error}") from None
    if not text:
        raise ConfigError(f"tasks.callbacks.secret_file: {path}: is empty")
    return text


class Callbacks:
    """
    Checks whom clients want told, and tells them.

    :param save: writes down how it goes with a task's callback.
    :raise ConfigError: there is no key to sign with.
    """

    def __init__(
        self,
        config: CallbacksConfig,
        reactor: Any,
        resolve: Resolve,
        save: Callable[[DetachedTask], None],
    ) -> None:
        read_secret(config.secret_file)
        self.config = config
        #: calls by outcome
        self.outcomes = {"delivered": 0, "failed": 0, "given_up": 0}
        self._reactor = reactor
        self._save = save
        self._client = _client(reactor, resolve, self._forbidden)
        self._turns = DeferredSemaphore(_AT_ONCE)
        self._timers: dict[str, IDelayedCall] = {}
        self._calls: dict[str, Deferred[None]] = {}
        self._stopped = False

    def check(self, url: str) -> None:
        """
        Check what a client has given.

        :raise CallbackForbidden: it is no URL, or one that is not allowed.
        """
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise CallbackForbidden(f"not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not host or not url.isprintable():
            raise CallbackForbidden(f"{url!r} is not an http or https URL")
        if parts.username is not None or parts.password is not None:
            raise CallbackForbidden("a callback URL must have no user name")
        if not any(_matches(pattern, host) for pattern in self.config.hosts):
            raise CallbackForbidden(f"nobody at {host} may be called")
        reason = self._forbidden(host)
        if reason is not None:
            raise CallbackForbidden(reason)

    def _forbidden(self, address: str) -> str | None:
        """Return why an address may not be called, or None; names may always."""
        try:
            parsed = ip_address(address)
        except ValueError:
            return None
        if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        for network in self.config.forbid:
            if parsed in network:
                return f"{address} may not be called: it is in {network}"
        return None

    def tell(self, task: DetachedTask) -> None:
        """Tell whoever wants to know that a task has ended; go on until that has worked."""
        callback = task.record.callback
        task_id = task.record.id
        if callback is None or callback.state != "pending" or self._stopped:
            return
        if task_id in self._calls:
            return
        self._timers.pop(task_id, None)
        call = self._turns.run(lambda: Deferred.fromCoroutine(self._call(task)))
        self._calls[task_id] = call
        call.addBoth(self._over, task_id)
        call.addCallbacks(lambda _: self._told(task), lambda why: self._not_told(task, why))
        call.addErrback(lambda failure: _log.failure("a callback failed", failure=failure))

    def stop(self) -> None:
        """Tell nobody any more; what has not been told is told after a restart."""
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for call in list(self._calls.values()):
            call.cancel()

    def _over(self, result: _T, task_id: str) -> _T:
        del self._calls[task_id]
        return result

    async def _call(self, task: DetachedTask) -> None:
        record = task.record
        callback = record.callback
        assert callback is not None
        callback.attempts += 1
        told = {k: v for k, v in task.describe().items() if k != "callback"}
        body = json.dumps(told).encode()
        now = int(self._reactor.seconds())
        secret = read_secret(self.config.secret_file)
        headers: dict[str | bytes, str | bytes] = {
            "Content-Type": "application/json",
            "User-Agent": "strictproxy-callback",
            "webhook-id": record.id,
            "webhook-timestamp": str(now),
            "webhook-signature": sign(secret, record.id, now, body),
        }
        asking = Deferred.fromCoroutine(self._post(callback.url, headers, body))
        await asking.addTimeout(_TIMEOUT, self._reactor)

    async def _post(self, url: str, headers: dict[str | bytes, str | bytes], body: bytes) -> None:
        response = await self._client.post(
            url, data=body, headers=headers, allow_redirects=False, unbuffered=True
        )
        size = 0

        def drop(data: bytes) -> None:
            nonlocal size
            size += len(data)
            if size > _MAX_ANSWER:
                raise ValueError(f"its answer is longer than {_MAX_ANSWER} bytes")

        await treq.collect(response, drop)
        if not 200 <= response.code < 300:
            raise _Refused(response.code)

    def _told(self, task: DetachedTask) -> None:
        callback = task.record.callback
        assert callback is not None
        callback.state, callback.error = "delivered", None
        self.outcomes["delivered"] += 1
        self._save(task)
        task.changed()

    def _not_told(self, task: DetachedTask, failure: Failure) -> None:
        callback = task.record.callback
        assert callback is not None
        if self._stopped or failure.check(CancelledError):
            return
        callback.error = reason_of(failure)
        now = self._reactor.seconds()
        # Nobody wants it (410), or nobody may have it: that will not change.
        final = failure.check(CallbackForbidden) or (
            isinstance(failure.value, _Refused) and failure.value.status == 410
        )
        for reason in getattr(failure.value, "reasons", ()):
            final = final or reason.check(CallbackForbidden)
        since = now - (task.record.ended or now)
        if final or since >= self.config.give_up:
            callback.state = "failed"
            self.outcomes["given_up"] += 1
            _log.warn("{task}: nobody is told: {reason}", task=task, reason=callback.error)
        else:
            pause = min(_FIRST_PAUSE * 2.0 ** min(callback.attempts - 1, 20), _LONGEST_PAUSE)
            self.outcomes["failed"] += 1
            self._timers[task.record.id] = self._reactor.callLater(pause, self.tell, task)
        self._save(task)
        task.changed()


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"it answered with {status}")
        self.status = status


def _matches(pattern: str, host: str) -> bool:
    host = host.lower().rstrip(".")
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and len(host) > len(pattern) - 1
    return host == pattern


def _client(reactor: Any, resolve: Resolve, forbidden: Callable[[str], str | None]) -> HTTPClient:
    endpoints = _CheckedEndpoints(reactor, resolve, forbidden)
    pool = HTTPConnectionPool(reactor, persistent=False)
    return HTTPClient(Agent.usingEndpointFactory(reactor, endpoints, pool))


@implementer(IAgentEndpointFactory)
class _CheckedEndpoints:
    """Makes endpoints that look at an address before they connect to it."""

    def __init__(
        self, reactor: Any, resolve: Resolve, forbidden: Callable[[str], str | None]
    ) -> None:
        self.reactor = reactor
        self.resolve = resolve
        self.forbidden = forbidden

    def endpointForURI(self, uri: Any) -> IStreamClientEndpoint:
        """Return the endpoint of a URL."""
        host = uri.host.decode("ascii")
        endpoint: IStreamClientEndpoint = _CheckedEndpoint(self, host.strip("[]"), uri.port)
        if uri.scheme == b"https":
            secured: IStreamClientEndpoint = wrapClientTLS(optionsForClientTLS(host), endpoint)
            return secured
        return endpoint


@implementer(IStreamClientEndpoint)
class _CheckedEndpoint:
    def __init__(self, endpoints: _CheckedEndpoints, host: str, port: int) -> None:
        self._endpoints = endpoints
        self._host = host
        self._port = port

    def connect(self, protocolFactory: Any) -> Deferred[Any]:
        """Resolve the name, look at what came out, and connect to that."""
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: Any) -> Any:
        addresses = await self._endpoints.resolve(self._host)
        if not addresses:
            raise ValueError(f"{self._host} has no address")
        for address in addresses:
            reason = self._endpoints.forbidden(address)
            if reason is not None:
                raise CallbackForbidden(f"{self._host}: {reason}")
        error: Exception | None = None
        for address in addresses:
            kind = TCP6ClientEndpoint if ":" in address else TCP4ClientEndpoint
            endpoint = kind(self._endpoints.reactor, address, self._port, _CONNECT_TIMEOUT)
            try:
                return await endpoint.connect(factory)
            except CancelledError:
                raise
            except Exception as failed:
                error = failed
        assert error is not None
        raise error
