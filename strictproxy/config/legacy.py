"""
The Go version's configuration file, with the meaning it had.

```yaml
port: 8080
debug: false
log_file: /var/log/proxy.log
routes:
  - {uri: /VideoCodecService/VideoCodec, limit: 2, k8s_host: transcode-pods, K8s_port: 20109}
```

`uri` matched the whole path, and `limit` was the number of requests of that
URI in flight per pod. Routes to the same host and port share one upstream
here, so that they see each other's requests when the pod with the fewest is
chosen; their limits stay their own, and the upstream's is their sum, which
they can never exceed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from strictproxy.config import kinds, reader
from strictproxy.config.model import (
    Config,
    DnsSource,
    ListenConfig,
    LogConfig,
    Match,
    RouteConfig,
    UpstreamConfig,
)
from strictproxy.config.reader import Section


def is_legacy(top: Section) -> bool:
    """Whether a file is the Go version's: it has a `port`, and nothing that names our own."""
    return "port" in top and not any(key in top for key in ("listen", "upstreams"))


@dataclass(frozen=True, slots=True)
class _Route:
    uri: str
    limit: int
    host: str
    port: int

    @property
    def upstream(self) -> str:
        return f"{self.host}:{self.port}"


def read(top: Section) -> Config:
    """Read the whole file; mistakes are noted in its document."""
    port = top.take("port", reader.port)
    debug = top.take("debug", reader.boolean, False)
    log_file = top.take("log_file", _text_or_empty, "")
    parts = top.take("routes", reader.items(reader.section(_route)))
    if top.failed:
        return Config((), {}, ())
    routes: dict[str, _Route] = {}
    for part, route in parts:
        if route.uri in routes:
            part.note("uri", f"{route.uri!r} is given twice")
        routes[route.uri] = route
    return Config(
        listen=(ListenConfig(f"tcp:{port}"),),
        upstreams=_upstreams(routes),
        routes=tuple(
            RouteConfig(route.uri, Match(path=route.uri), route.upstream, limit=route.limit)
            for route in routes.values()
        ),
        log=LogConfig(level="debug" if debug else "info", file=log_file or None),
    )


def _upstreams(routes: Mapping[str, _Route]) -> Mapping[str, UpstreamConfig]:
    limits: dict[str, int] = {}
    sources: dict[str, DnsSource] = {}
    for route in routes.values():
        limits[route.upstream] = limits.get(route.upstream, 0) + route.limit
        sources[route.upstream] = DnsSource(route.host, route.port)
    return {name: UpstreamConfig(name, sources[name], limit) for name, limit in limits.items()}


def _route(part: Section) -> tuple[Section, _Route]:
    return part, _Route(
        uri=part.take("uri", kinds.url_path),
        limit=part.take("limit", reader.whole(1)),
        host=part.take("k8s_host", kinds.dns_name),
        port=part.take("K8s_port", reader.port),
    )


def _text_or_empty(document: reader.Document, node: yaml.Node, path: str) -> str:
    _, written = document.scalar(node)
    return written
