"""
The admin listener's resources, put together.

    /              the dashboard
    /healthz       the process answers
    /readyz        every upstream has had its first trusted set, and we are not stopping
    /metrics       for Prometheus
    /api/v1/...    see `strictproxy.admin.api`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import Site

from strictproxy.admin.access import Access, Refused
from strictproxy.admin.api import Api, Control
from strictproxy.admin.events import Events

_PAGES: Mapping[bytes, tuple[str, bytes]] = {
    b"": ("dashboard.html", b"text/html; charset=utf-8"),
    b"dashboard.css": ("dashboard.css", b"text/css; charset=utf-8"),
    b"dashboard.js": ("dashboard.js", b"text/javascript; charset=utf-8"),
    b"icon.svg": ("icon.svg", b"image/svg+xml"),
}
#: Nothing but what comes from here, and nothing that runs but our own file.
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Probe(Resource):
    """Answers 200 or 503, with the reason; open to everybody, as the kubelet has no token."""

    isLeaf = True

    def __init__(self, check: Callable[[], str | None]) -> None:
        super().__init__()
        self._check = check

    def render_GET(self, request: Request) -> bytes:
        problem = self._check()
        request.setHeader(b"content-type", b"text/plain; charset=utf-8")
        if problem is None:
            return b"ok\n"
        request.setResponseCode(503)
        return problem.encode() + b"\n"


class _Metrics(Resource):
    """The metrics, in Prometheus' text format."""

    isLeaf = True

    def __init__(self, registry: CollectorRegistry, access: Access) -> None:
        super().__init__()
        self._registry = registry
        self._access = access

    def render_GET(self, request: Request) -> bytes:
        try:
            self._access.check(request.getHeader("authorization"), changes=False)
        except Refused as error:
            request.setResponseCode(error.status)
            return f"{error}\n".encode()
        request.setHeader(b"content-type", CONTENT_TYPE_LATEST.encode())
        return generate_latest(self._registry)


class _Page(Resource):
    """A file of the dashboard. It says nothing about the proxy, so it needs no token."""

    isLeaf = True

    def __init__(self, name: str, kind: bytes) -> None:
        super().__init__()
        self._content = (files("strictproxy.admin") / "static" / name).read_bytes()
        self._kind = kind

    def render_GET(self, request: Request) -> bytes:
        request.setHeader(b"content-type", self._kind)
        request.setHeader(b"content-security-policy", _POLICY)
        request.setHeader(b"x-content-type-options", b"nosniff")
        request.setHeader(b"referrer-policy", b"no-referrer")
        request.setHeader(b"cache-control", b"no-cache")
        return self._content


class QuietSite(Site):
    """A site without access log: probes come every few seconds."""

    noisy = False

    def log(self, request: Request) -> None:
        """Log nothing."""


def make_admin(
    control: Control, access: Access, registry: CollectorRegistry, events: Events
) -> Resource:
    """Return the root of the admin site."""

    def ready() -> str | None:
        if control.stopping:
            return "shutting down"
        waiting = [name for name, each in control.upstreams.items() if not each.trusted]
        return f"no trusted address set yet for: {', '.join(waiting)}" if waiting else None

    root = Resource()
    root.putChild(b"healthz", _Probe(lambda: None))
    root.putChild(b"readyz", _Probe(ready))
    root.putChild(b"metrics", _Metrics(registry, access))
    for path, (name, kind) in _PAGES.items():
        root.putChild(path, _Page(name, kind))
    api: Any = Resource()
    root.putChild(b"api", api)
    api.putChild(b"v1", Api(control, access, events))
    return root
