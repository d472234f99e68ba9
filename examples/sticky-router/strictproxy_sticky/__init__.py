"""Requests of one tenant go to the same few pods (rendezvous hashing)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from zope.interface import implementer

from strictproxy.interfaces import Decision, IRouter, IRouterPlugin, RequestInfo
from strictproxy.scheduling import Address

_SETTINGS = {"header": str, "upstream": str, "pods": int}


@implementer(IRouter)
class StickyRouter:
    """Confines requests that carry a header to a few pods, by the header's value."""

    def __init__(self, header: str, count: int, pods: Callable[[], Collection[Address]]) -> None:
        self._header = header.lower()
        self._count = count
        self._pods = pods

    def route(self, request: RequestInfo) -> Decision | None:
        """Return the pods that rank highest for the header's value; pods that go change little."""
        value = request.headers.get(self._header)
        pods = self._pods()
        if value is None or not pods:
            return None

        def rank(pod: Address) -> bytes:
            return hashlib.blake2b(f"{value}\0{pod}".encode()).digest()

        return Decision(pods=frozenset(sorted(pods, key=rank)[: self._count]))


@implementer(IRouterPlugin)
class StickyPlugin:
    """Makes sticky routers. Settings: header, upstream, and pods (per value of the header)."""

    name = "sticky"

    def router(
        self, settings: Mapping[str, Any], pods: Callable[[str], Collection[Address]]
    ) -> IRouter:
        """Make a router; see `IRouterPlugin`."""
        for key, kind in _SETTINGS.items():
            if not isinstance(settings.get(key), kind):
                raise ValueError(f"{key!r} must be given, as {kind.__name__}")
        unknown = settings.keys() - _SETTINGS.keys()
        if unknown:
            raise ValueError(f"unknown setting {sorted(unknown)[0]!r}")
        upstream = settings["upstream"]
        try:
            pods(upstream)
        except KeyError:
            raise ValueError(f"no upstream {upstream!r}") from None
        return StickyRouter(settings["header"], settings["pods"], lambda: pods(upstream))
