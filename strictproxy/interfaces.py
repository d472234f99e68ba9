"""
The seams: what parts of strictproxy, and plugins, promise each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from twisted.plugin import IPlugin
from zope.interface import Attribute, Interface

from strictproxy.scheduling import Address


class Endpoint(NamedTuple):
    """A pod as discovery knows it."""

    address: Address
    #: it is shutting down: nothing new, but it finishes what it has
    terminating: bool = False
    #: its own limit, if discovery says one
    limit: int | None = None
    #: how much of the upstream's limit it gets otherwise
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class DiscoveryState:
    """What is believed at one moment, and why; for people and metrics."""

    #: the set in force, or None before there is one
    in_force: frozenset[Endpoint] | None = None
    #: when it came into force, in seconds of the clock
    since: float | None = None
    #: a set that may come into force
    candidate: frozenset[Endpoint] | None = None
    #: how many lookups have agreed with the candidate
    agreed: int = 0
    #: candidates dropped because lookups did not agree
    rejections: int = 0
    #: what went wrong last; None once all is well
    last_error: str | None = None
    #: how many lookups ended how
    lookups: Mapping[str, int] = field(default_factory=dict)


#: Publishes a complete set of pods: called with the new one whenever it changes.
Publish = Callable[[Collection[Endpoint]], None]


class RequestInfo:
    """What routing may look at: the request line, the headers, and who sent them."""

    __slots__ = ("_fields", "_headers", "client", "host", "method", "path")

    def __init__(
        self,
        method: str,
        path: str,
        host: str = "",
        fields: Iterable[tuple[str, str]] = (),
        client: str = "",
    ) -> None:
        self.method = method
        #: the path as it came, percent-encoded, without the query string
        self.path = path
        #: lower case, without port; empty if there is none
        self.host = host
        #: IP address of the client
        self.client = client
        self._fields = fields
        self._headers: Mapping[str, str] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case; repeated fields are joined by ", " (RFC 9110, 5.3)."""
        if self._headers is None:
            headers: dict[str, str] = {}
            for name, value in self._fields:
                lower = name.lower()
                headers[lower] = f"{headers[lower]}, {value}" if lower in headers else value
            self._headers = headers
        return self._headers


@dataclass(frozen=True, slots=True)
class Decision:
    """
    A custom router's answer.

    With `upstream` alone the request goes there, past the routes. With `pods`
    alone the routes decide on the upstream, and the request goes to one of
    these pods; with both, both hold. The scheduler still picks the pod with
    the fewest in flight among them, and never exceeds a limit.
    """

    upstream: str | None = None
    pods: frozenset[Address] | None = None


class IRouter(Interface):
    """Decides where requests go, before the routes of the configuration do."""

    def route(request: RequestInfo) -> Decision | None:
        """
        Decide about one request.

        Called once per request in the reactor's thread, so it must not block.
        An exception is logged and answered with 500 and reason `router_failed`.

        :return: a `Decision`, or None to leave the request to the next router
            and then to the routes.
        """


class IRouterPlugin(IPlugin):
    """
    Makes routers; provided by objects that `twisted.plugin` finds in `strictproxy.plugins`.
    """

    name = Attribute("The name by which a configuration asks for it, a str.")

    def router(settings: Mapping[str, Any], pods: Callable[[str], Collection[Address]]) -> IRouter:
        """
        Make a router. Called when a configuration that names it is put in force.

        :param settings: plain data from the configuration's `settings`.
        :param pods: gives the pods of an upstream, by its name, that are known
            at the moment of the call; raises KeyError for an unknown upstream.
        :raise ValueError: the settings are wrong; the text tells a person how.
        """


class IDiscovery(Interface):
    """
    Where an upstream's pods come from.

    It publishes sets of pods and knows nothing of who uses them. While it
    cannot tell, it publishes nothing: the last good set stays in force.
    """

    def start(publish: Publish) -> None:
        """Begin; call `publish` with each new set. Must not fail for want of an answer."""

    def stop() -> None:
        """End; `publish` is not called again."""

    def look_now() -> None:
        """Look at once: somebody has reason to believe that the set has changed."""

    def state() -> DiscoveryState | None:
        """Return what is believed and why; or None if there is nothing to tell."""
