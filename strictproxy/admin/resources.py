"""The admin listener's resources."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import Site

from strictproxy.interfaces import DiscoveryState, Endpoint
from strictproxy.snapshot import PodCondition
from strictproxy.upstream import Upstream


class _Probe(Resource):
    """Answers 200 or 503, with the reason as text."""

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


class _State(Resource):
    """The state of every upstream as JSON."""

    isLeaf = True

    def __init__(self, upstreams: Callable[[], Mapping[str, Upstream]]) -> None:
        super().__init__()
        self._upstreams = upstreams

    def render_GET(self, request: Request) -> bytes:
        request.setHeader(b"content-type", b"application/json")
        document = {name: upstream_state(each) for name, each in self._upstreams().items()}
        return json.dumps({"upstreams": document}, indent=2).encode() + b"\n"


def _discovery(state: DiscoveryState) -> dict[str, Any]:
    def texts(endpoints: Collection[Endpoint] | None) -> list[str] | None:
        if endpoints is None:
            return None
        return [str(endpoint.address) for endpoint in sorted(endpoints)]

    return {
        "in_force": texts(state.in_force),
        "since": state.since,
        "candidate": texts(state.candidate),
        "agreed": state.agreed,
        "rejections": state.rejections,
        "last_error": state.last_error,
        "lookups": dict(state.lookups),
    }


def upstream_state(upstream: Upstream) -> dict[str, Any]:
    """Return an upstream's state as plain data."""
    state = upstream.snapshot()
    return {
        "trusted": state.trusted,
        "waiting": state.waiting,
        "running": state.running,
        "slots": state.slots,
        "shrinks": state.shrinks,
        "pods": [
            {
                "address": str(pod.address),
                "leases": pod.leases,
                "limit": pod.limit,
                "known": pod.condition is not PodCondition.REMOVED,
                "condition": pod.condition.value,
                "failures": pod.failures,
                "trial_in": pod.trial_in,
                "last_error": pod.last_error,
            }
            for pod in state.pods
        ],
        "discovery": None if state.discovery is None else _discovery(state.discovery),
    }


class QuietSite(Site):
    """A site without access log: probes come every few seconds."""

    noisy = False

    def log(self, request: Request) -> None:
        """Log nothing."""


def make_admin(
    upstreams: Callable[[], Mapping[str, Upstream]], is_closing: Callable[[], bool]
) -> Resource:
    """
    Return the root of the admin site.

    `/healthz`: the process answers. `/readyz`: every upstream has had its
    first trusted address set, and the proxy is not shutting down.
    """

    def ready() -> str | None:
        if is_closing():
            return "shutting down"
        waiting = [name for name, each in upstreams().items() if not each.trusted]
        return f"no trusted address set yet for: {', '.join(waiting)}" if waiting else None

    root = Resource()
    root.putChild(b"healthz", _Probe(lambda: None))
    root.putChild(b"readyz", _Probe(ready))
    api = Resource()
    version = Resource()
    root.putChild(b"api", api)
    api.putChild(b"v1", version)
    version.putChild(b"state", _State(upstreams))
    return root
