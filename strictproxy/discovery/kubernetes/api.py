"""
The two calls that are made to the API server: list and watch.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import quote

from cryptography.x509 import load_pem_x509_certificates
from OpenSSL.crypto import X509
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.ssl import (
    Certificate,
    PrivateCertificate,
    optionsForClientTLS,
    trustRootFromCertificates,
)
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool, ResponseDone
from twisted.web.iweb import IAgent, IPolicyForHTTPS
from zope.interface import implementer

from strictproxy.discovery.kubernetes.access import Access, NoAccess
from strictproxy.discovery.kubernetes.slices import Object

#: Seconds until a call is answered.
_TIMEOUT = 15.0
#: Objects in one page of a list.
_PAGE = 500
#: One event is smaller than this; a slice has at most 1,000 endpoints.
_MAX_EVENT = 16 * 1024 * 1024

#: Makes what sends requests to an API server.
AgentFor = Callable[[Access], IAgent]


class ApiError(Exception):
    """
    The API server said no.

    :param status: its status code; 410 means that what was asked for is history.
    :param retry_after: seconds, if it said.
    """

    def __init__(self, status: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        self.retry_after = retry_after


class EndpointSliceApi:
    """
    Lists and watches the EndpointSlices of one Service.

    :param access: gives where the API server is and what to show it; called
        before each request.
    """

    def __init__(
        self, service: str, access: Callable[[], Access], agent_for: AgentFor, clock: Any
    ) -> None:
        self._service = service
        self._access = access
        self._agent_for = agent_for
        self._clock = clock
        self._agent: tuple[tuple[object, ...], IAgent] | None = None

    async def fetch(self) -> tuple[list[Object], str]:
        """
        Return all slices, and the `resourceVersion` to watch from.

        :raise ApiError: the API server said no.
        :raise NoAccess: there is nothing to ask with.
        """
        items: list[Object] = []
        version, more = "", ""
        while True:
            parameters = {"limit": str(_PAGE)} | ({"continue": more} if more else {})
            response = await self._get(parameters)
            document = await _json(response, self._clock)
            items += document.get("items") or []
            version = version or str(document["metadata"]["resourceVersion"])
            more = document["metadata"].get("continue", "")
            if not more:
                return items, version

    async def watch(self, version: str, seconds: int, take: Callable[[list[Object]], None]) -> None:
        """
        Call `take` with the events after `version`, until the API server ends that.

        :param seconds: after which it is asked to.
        :raise ApiError: the API server said no.
        """
        response = await self._get(
            {
                "watch": "1",
                "allowWatchBookmarks": "true",
                "resourceVersion": version,
                "timeoutSeconds": str(seconds),
            }
        )
        events = _Events(take)
        response.deliverBody(events)
        try:
            await events.ended
        finally:
            events.stop()

    async def _get(self, parameters: Mapping[str, str]) -> Any:
        access = self._access()
        identity = (access.server, access.ca, access.client_cert, access.client_key)
        if self._agent is None or self._agent[0] != identity:
            self._agent = (identity, self._agent_for(access))
        url = (
            f"{access.server}/apis/discovery.k8s.io/v1/namespaces/{quote(access.namespace)}"
            "/endpointslices"
        )
        selector = {"labelSelector": f"kubernetes.io/service-name={self._service}"}
        headers: dict[bytes | str, bytes | str] = {
            "Accept": "application/json",
            "User-Agent": "strictproxy",
        }
        if access.token:
            headers["Authorization"] = f"Bearer {access.token}"
        response = await HTTPClient(self._agent[1]).get(
            url,
            params={**selector, **parameters},
            headers=headers,
            timeout=_TIMEOUT,
            reactor=self._clock,
            allow_redirects=False,
            unbuffered=True,
        )
        if response.code != 200:
            said = response.headers.getRawHeaders("retry-after", ["0"])[0]
            status = await _json(response, self._clock, lenient=True)
            message = str(status.get("message") or response.phrase.decode("ascii", "replace"))
            raise ApiError(response.code, message[:200], float(said) if said.isdecimal() else 0.0)
        return response


async def _json(response: Any, clock: Any, *, lenient: bool = False) -> Mapping[str, Any]:
    collected = _Collected()
    response.deliverBody(collected)
    collected.ended.addTimeout(_TIMEOUT, clock)
    try:
        document = json.loads(await collected.ended)
    except Exception:
        if lenient:
            return {}
        raise
    finally:
        collected.stop()
    return cast("Mapping[str, Any]", document) if isinstance(document, dict) else {}


class _Body(Protocol):
    """Receives a body; `stop` may be called at any time."""

    def __init__(self) -> None:
        self._done = False

    def stop(self) -> None:
        """Let the connection go."""
        if not self._done and self.transport is not None:
            self._done = True
            self.transport.loseConnection()


class _Collected(_Body):
    """All of a body."""

    def __init__(self) -> None:
        super().__init__()
        self._data = bytearray()
        self.ended: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        """Keep it."""
        self._data += data

    def connectionLost(self, reason: Failure | None = None) -> None:
        """Hand it over."""
        self._done = True
        if not self.ended.called:
            if reason is not None and not reason.check(ResponseDone):
                self.ended.errback(reason)
            else:
                self.ended.callback(bytes(self._data))


class _Events(_Body):
    """A watch's body: a JSON object on each line; one that was cut off does not count."""

    def __init__(self, take: Callable[[list[Object]], None]) -> None:
        super().__init__()
        self._take = take
        self._rest = b""
        self.ended: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        """Take the lines that are complete."""
        if self.ended.called:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            if len(self._rest) > _MAX_EVENT:
                raise ValueError("an event is too long")
            events = [json.loads(line) for line in lines if line.strip()]
            if events:
                self._take(events)
        except Exception:
            self.ended.errback(Failure())

    def connectionLost(self, reason: Failure | None = None) -> None:
        """End."""
        self._done = True
        if not self.ended.called:
            self.ended.callback(None)


def agent_for(access: Access, reactor: Any) -> IAgent:
    """
    Return what sends requests to a real API server.

    :raise NoAccess: a certificate or key cannot be used.
    """
    try:
        policy = _Policy(access)
    except Exception as error:
        raise NoAccess(f"{access.server}: a certificate or key cannot be used: {error}") from None
    pool = HTTPConnectionPool(reactor, persistent=False)
    agent: IAgent = Agent(reactor, policy, connectTimeout=_TIMEOUT, pool=pool)
    return agent


@implementer(IPolicyForHTTPS)
class _Policy:
    """Trusts the cluster's authority, and shows our certificate if there is one."""

    def __init__(self, access: Access) -> None:
        self._name = access.server_name
        self._trust = None
        self._client = None
        if access.ca is not None:
            found = load_pem_x509_certificates(access.ca)
            self._trust = trustRootFromCertificates(
                [Certificate(X509.from_cryptography(each)) for each in found]
            )
        if access.client_cert is not None and access.client_key is not None:
            self._client = PrivateCertificate.loadPEM(
                access.client_key + b"\n" + access.client_cert
            )

    def creatorForNetloc(self, hostname: bytes, port: int) -> Any:
        """Return the TLS settings for a server."""
        name = self._name or hostname.decode("ascii").strip("[]")
        return optionsForClientTLS(name, self._trust, self._client)
