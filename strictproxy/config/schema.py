"""
What may stand in a configuration file, and what it turns into.

`load` and `parse` are the way in. The Go version's file is recognised by its
`port` and `k8s_host` keys and read by `strictproxy.config.legacy`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, cast

import yaml
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IReactorCore

from strictproxy.config import reader
from strictproxy.config.model import (
    Body,
    CertificateFiles,
    ClientConfig,
    Config,
    DnsSource,
    HeaderEdits,
    ListenConfig,
    ListenTls,
    LogConfig,
    LogFormat,
    Match,
    OnDisconnect,
    PodConnections,
    PodTls,
    QueueConfig,
    RouteConfig,
    RouterConfig,
    Server,
    Source,
    StaticSource,
    UpstreamConfig,
)
from strictproxy.config.reader import Document, Section, Wrong
from strictproxy.errors import ConfigError
from strictproxy.scheduling import Address

_LEVELS = ("debug", "info", "warn", "error", "critical")
_DEFAULT_DNS_PORT = 53


class InvalidConfig(ConfigError):
    """A configuration with mistakes; `problems` has every one of them, in order."""

    def __init__(self, problems: list[reader.Problem]) -> None:
        self.problems = sorted(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Config:
    """
    Read a configuration file.

    :param environ: what `${NAME}` refers to; this process's environment by default.
    :raise InvalidConfig: with every mistake in it.
    :raise ConfigError: the file cannot be read.
    """
    try:
        content = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text, at byte {error.start}") from error
    return parse(content, str(path), environ)


def parse(content: str, file: str, environ: Mapping[str, str] | None = None) -> Config:
    """Read a configuration from text; `file` names it in messages. Raises like `load`."""
    document = Document(file, content, os.environ if environ is None else environ)
    root = document.root()
    config: Config | None = None
    if root is not None:
        # Late, because legacy builds on this module.
        from strictproxy.config import legacy

        config = legacy.read(root) if legacy.is_legacy(root) else _config(root)
        root.close()
    if document.problems or config is None:
        raise InvalidConfig(document.problems)
    return config


def _config(top: Section) -> Config:
    listen = top.take("listen", reader.one_or_more(listener))
    admin = top.take("admin", endpoint, None)
    upstreams = top.take("upstreams", named(_upstream))
    routers: tuple[RouterConfig, ...] = top.take(
        "routers", reader.items(reader.section(_router)), ()
    )
    routes: tuple[_RouteAt, ...] = top.take("routes", reader.items(_route), ())
    config = Config(
        listen=listen,
        admin=admin,
        upstreams=upstreams if not top.failed else {},
        routes=tuple(route for _, route in routes),
        routers=routers,
        client=top.take("client", reader.section(_client), ClientConfig()),
        log=top.take("log", reader.section(_log), LogConfig()),
        drain_timeout=top.take("drain_timeout", reader.duration, Config.drain_timeout),
    )
    if not top.failed:
        check_routes(top.document, routes, config.upstreams)
        if not routes and not routers and "routes" not in top and "routers" not in top:
            top.note(None, "neither 'routes' nor 'routers': no request could go anywhere")
    return config


# -- upstreams


def _upstream(name: str, part: Section) -> UpstreamConfig:
    return UpstreamConfig(
        name=name,
        source=_source(part),
        limit=part.take("limit", reader.whole(1), UpstreamConfig.limit),
        queue=part.take("queue", reader.section(_queue), QueueConfig()),
        connections=part.take("connections", reader.section(_connections), PodConnections()),
        tls=part.take("tls", reader.section(_pod_tls), None),
    )


def _source(part: Section) -> Source:
    dns = part.take("dns", reader.section(_dns), None)
    static = part.take("static", static_pods, None)
    if "dns" in part and "static" in part:
        part.note("static", "'dns' and 'static' exclude each other")
    elif "dns" not in part and "static" not in part:
        part.note(None, "no source of pods: 'dns' or 'static' is missing")
    return dns or static or StaticSource(())


def _dns(part: Section) -> DnsSource:
    return DnsSource(
        name=part.take("name", dns_name),
        port=part.take("port", reader.port),
        every=part.take("every", reader.duration, DnsSource.every),
        lookups=part.take("lookups", reader.whole(1), DnsSource.lookups),
        interval=part.take("interval", reader.duration, DnsSource.interval),
        retry_after=part.take("retry_after", reader.duration, DnsSource.retry_after),
        servers=part.take("servers", reader.one_or_more(name_server), ()),
    )


def _queue(part: Section) -> QueueConfig:
    default = QueueConfig()
    return QueueConfig(
        size=part.take("size", reader.whole(0), default.size),
        timeout=part.take("timeout", reader.or_off(reader.duration), default.timeout),
        no_pods_timeout=part.take("no_pods_timeout", reader.duration, default.no_pods_timeout),
    )


def _connections(part: Section) -> PodConnections:
    default = PodConnections()
    off = reader.or_off(reader.duration)
    return PodConnections(
        connect_timeout=part.take("connect_timeout", reader.duration, default.connect_timeout),
        keepalive=part.take("keepalive", reader.duration, default.keepalive),
        first_byte_timeout=part.take("first_byte_timeout", off, default.first_byte_timeout),
        idle_timeout=part.take("idle_timeout", off, default.idle_timeout),
    )


def _pod_tls(part: Section) -> PodTls:
    return PodTls(
        ca=part.take("ca", reader.text, None),
        server_name=part.take("server_name", dns_name, None),
        client=part.take("client", reader.section(_certificate), None),
    )


def _certificate(part: Section) -> CertificateFiles:
    return CertificateFiles(cert=part.take("cert", reader.text), key=part.take("key", reader.text))


# -- listeners


def listener(document: Document, node: yaml.Node, path: str) -> ListenConfig:
    """An endpoint, or a mapping of one with its TLS settings."""
    if isinstance(node, yaml.MappingNode):
        return reader.section(_listener)(document, node, path)
    return ListenConfig(endpoint(document, node, path))


def _listener(part: Section) -> ListenConfig:
    return ListenConfig(
        endpoint=part.take("endpoint", endpoint),
        tls=part.take("tls", reader.section(_listen_tls), None),
    )


def _listen_tls(part: Section) -> ListenTls:
    return ListenTls(
        certificates=part.take("certificates", certificates),
        client_ca=part.take("client_ca", reader.text, None),
        min_version=part.take("min_version", tls_version, ListenTls.min_version),
    )


def certificates(document: Document, node: yaml.Node, path: str) -> tuple[CertificateFiles, ...]:
    """At least one certificate."""
    found = reader.items(reader.section(_certificate))(document, node, path)
    if not node.value:
        raise Wrong("must not be empty")
    return found


def tls_version(document: Document, node: yaml.Node, path: str) -> str:
    """A version of TLS that is still safe."""
    _, written = document.scalar(node)
    if written not in ("1.2", "1.3"):
        raise Wrong(f"must be 1.2 or 1.3, not {written}")
    return written


# -- routes

_RouteAt = tuple[Section, RouteConfig]


def _route(document: Document, node: yaml.Node, path: str) -> _RouteAt:
    """Read a route; its section stays with it, for checks across routes."""

    def read(part: Section) -> _RouteAt:
        return part, _route_config(part)

    return reader.section(read)(document, node, path)


def _route_config(part: Section) -> RouteConfig:
    match = Match(
        path=part.take("path", url_path, None),
        prefix=part.take("prefix", url_path, None),
        regex=part.take("regex", regular_expression, None),
        host=part.take("host", host_pattern, None),
        methods=frozenset(part.take("methods", reader.one_or_more(method), ())),
        headers=part.take("headers", named_headers, ()),
    )
    kinds = [kind for kind in ("path", "prefix", "regex") if kind in part]
    if len(kinds) > 1:
        part.note(kinds[1], f"{kinds[0]!r} and {kinds[1]!r} exclude each other")
    if match == Match():
        wanted = ("path", "prefix", "regex", "host", "methods", "headers")
        if not any(key in part for key in wanted):
            part.note(None, f"matches nothing in particular: give one of {', '.join(wanted)}")
    strip = part.take("strip_prefix", reader.boolean, False)
    replace = part.take("replace_prefix", url_path, None)
    for key in ("strip_prefix", "replace_prefix"):
        if key in part and match.path is None and match.prefix is None:
            part.note(key, "needs 'path' or 'prefix'")
    if strip and replace is not None:
        part.note("replace_prefix", "'strip_prefix' and 'replace_prefix' exclude each other")
    return RouteConfig(
        name=part.take("name", reader.text, None) or _name_of(match),
        match=match,
        upstream=part.take("upstream", reader.text),
        limit=part.take("limit", reader.whole(1), None),
        replace_prefix="/" if strip else replace,
        on_client_disconnect=part.take(
            "on_client_disconnect", reader.choice(OnDisconnect), OnDisconnect.CANCEL
        ),
        max_body=part.take("max_body", reader.size, None),
        body=part.take("body", reader.choice(Body), Body.STREAM),
        request_headers=part.take("request_headers", edits, HeaderEdits()),
        response_headers=part.take("response_headers", edits, HeaderEdits()),
        retry=frozenset(part.take("retry", reader.one_or_more(method), ())),
        timeout=part.take("timeout", reader.duration, None),
    )


def _name_of(match: Match) -> str:
    """Name a route after what it matches."""
    path = match.path or (match.prefix and f"{match.prefix.rstrip('/')}/*")
    path = path or (match.regex and f"~{match.regex}") or ""
    rest = [",".join(sorted(match.methods)), f"{match.host or ''}{path}"]
    rest += [f"{name}={value}" for name, value in match.headers]
    return " ".join(part for part in rest if part)


def check_routes(
    document: Document, routes: tuple[_RouteAt, ...], upstreams: Mapping[str, UpstreamConfig]
) -> None:
    """Note routes to nowhere, two that cannot be told apart, and names given twice."""
    matches: dict[Match, Section] = {}
    names: dict[str, Section] = {}
    for part, route in routes:
        if route.upstream not in upstreams:
            hint = reader.suggest(route.upstream, upstreams)
            where = part.value("upstream")
            document.note(where, part.at("upstream"), f"no upstream {route.upstream!r}{hint}")
        first = matches.setdefault(route.match, part)
        if first is not part:
            line = first.node.start_mark.line + 1
            part.note(None, f"matches the same requests as {first.path}, line {line}")
        elif names.setdefault(route.name, part) is not part:
            part.note("name", f"the name {route.name!r} is taken by {names[route.name].path}")


def _router(part: Section) -> RouterConfig:
    name = part.take("name", reader.text)
    return RouterConfig(name, part.take("settings", mapping, {}))


# -- the rest


def _client(part: Section) -> ClientConfig:
    default = ClientConfig()
    return ClientConfig(
        connections=part.take("connections", reader.whole(1), default.connections),
        header_timeout=part.take("header_timeout", reader.duration, default.header_timeout),
        body_timeout=part.take("body_timeout", reader.duration, default.body_timeout),
        keepalive=part.take("keepalive", reader.duration, default.keepalive),
        max_headers=part.take("max_headers", reader.whole(1), default.max_headers),
        max_header_bytes=part.take("max_header_bytes", reader.size, default.max_header_bytes),
        max_target=part.take("max_target", reader.size, default.max_target),
        max_body=part.take("max_body", reader.or_off(reader.size), default.max_body),
        read_ahead=part.take("read_ahead", reader.size, default.read_ahead),
        spool_memory=part.take("spool_memory", reader.size, default.spool_memory),
        spool_directory=part.take("spool_directory", reader.text, default.spool_directory),
        trusted_proxies=part.take(
            "trusted_proxies", reader.items(network), default.trusted_proxies
        ),
        server_timing=part.take("server_timing", reader.boolean, default.server_timing),
    )


def _log(part: Section) -> LogConfig:
    default = LogConfig()
    return LogConfig(
        format=part.take("format", reader.choice(LogFormat), default.format),
        level=part.take("level", log_level, default.level),
        access=part.take("access", reader.boolean, default.access),
        file=part.take("file", reader.text, default.file),
    )


# -- kinds of value that only a proxy has


def named(
    read: Callable[[str, Section], UpstreamConfig],
) -> reader.Kind[Mapping[str, UpstreamConfig]]:
    """Return the kind for a mapping from names to sections."""

    def read_all(document: Document, node: yaml.Node, path: str) -> Mapping[str, UpstreamConfig]:
        if not isinstance(node, yaml.MappingNode):
            raise Wrong(f"must be a mapping, not {reader.kind_of(node)}")
        if not node.value:
            raise Wrong("must not be empty")
        found: dict[str, UpstreamConfig] = {}
        everything = Section(document, node, path)
        for name in everything:

            def read_one(part: Section, name: str = name) -> UpstreamConfig:
                return read(name, part)

            value = everything.take(name, reader.section(read_one))
            # One with mistakes is kept, so that routes to it are not mistakes too.
            found[name] = value
        return found

    return read_all


def mapping(document: Document, node: yaml.Node, path: str) -> Mapping[str, Any]:
    """Plain data, a mapping at its top."""
    if not isinstance(node, yaml.MappingNode):
        raise Wrong(f"must be a mapping, not {reader.kind_of(node)}")
    return cast("Mapping[str, Any]", reader.anything(document, node, path))


def _edits(part: Section) -> HeaderEdits:
    return HeaderEdits(
        set=part.take("set", header_values, ()),
        add=part.take("add", header_values, ()),
        remove=part.take("remove", reader.one_or_more(header_name), ()),
    )


edits: reader.Kind[HeaderEdits] = reader.section(_edits)

#: Fields that say how a message is framed, which is not a route's to say.
_FRAMING = frozenset(("connection", "content-length", "te", "transfer-encoding", "upgrade"))


def header_name(document: Document, node: yaml.Node, path: str) -> str:
    """The name of a header field (RFC 9110, 5.1) that is not about framing."""
    written = reader.text(document, node, path)
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", written):
        raise Wrong(f"{written!r} is not a header name")
    if written.lower() in _FRAMING:
        raise Wrong(f"{written} frames the message and cannot be changed")
    return written


def header_values(document: Document, node: yaml.Node, path: str) -> tuple[tuple[str, str], ...]:
    """Header names with the value of each, as they will be sent."""
    if not isinstance(node, yaml.MappingNode):
        raise Wrong(f"must be a mapping, not {reader.kind_of(node)}")
    part = Section(document, node, path)
    pairs = []
    for key, _ in node.value:
        name = header_name(document, key, path)
        value = part.take(name, reader.text, None)
        if value is not None and not re.fullmatch(r"[\t\x20-\x7e\xa0-\xff]*", value):
            raise Wrong(f"the value of {name} has characters that no header may have")
        pairs.append((name, value or ""))
    return tuple(pairs)


def network(document: Document, node: yaml.Node, path: str) -> IPv4Network | IPv6Network:
    """An address or a network, as in 10.0.0.0/8."""
    written = reader.text(document, node, path)
    try:
        return ip_network(written)
    except ValueError as error:
        raise Wrong(f"not a network such as 10.0.0.0/8: {error}") from None


def named_headers(document: Document, node: yaml.Node, path: str) -> tuple[tuple[str, str], ...]:
    """Header names, lower case, with the value each must have."""
    if not isinstance(node, yaml.MappingNode):
        raise Wrong(f"must be a mapping, not {reader.kind_of(node)}")
    part = Section(document, node, path)
    pairs = ((name.lower(), part.take(name, reader.text)) for name in part)
    return tuple(sorted((name, value) for name, value in pairs if value is not None))


def endpoint(document: Document, node: yaml.Node, path: str) -> str:
    """Return a Twisted server endpoint description such as `tcp:8080`, checked but not opened."""
    written = reader.text(document, node, path)
    try:
        serverFromString(_NoReactor(), written)
    except Exception as error:
        # Endpoint parsers raise whatever comes their way: a TypeError tells of
        # their own parameters, which mean nothing to who wrote the file.
        why = "a part is missing or unknown" if isinstance(error, TypeError) else str(error)
        raise Wrong(f"{written!r} is not a server endpoint such as tcp:8080: {why}") from None
    return written


class _NoReactor:
    """Stands in for the reactor where an endpoint is only checked."""

    __provides__ = IReactorCore


def split_host_port(written: str, default_port: int | None = None) -> tuple[str, int]:
    """
    Split `host:port`, `[v6]:port`, or a bare host if there is a default port.

    :raise Wrong: it is none of these.
    """
    match = re.fullmatch(r"(?:\[([^\]\s]+)\]|([^:\s\[\]/]+))(?::(\d{1,5}))?", written)
    if match is None or (match[3] is None and default_port is None):
        raise Wrong(f"{written!r} is not host:port")
    if match[1] is not None:
        try:
            ip_address(match[1])
        except ValueError:
            raise Wrong(f"{match[1]!r} is not an IPv6 address") from None
    number = default_port if match[3] is None else int(match[3])
    if number is None or not 1 <= number <= 65535:
        raise Wrong(f"port must be from 1 to 65535, not {match[3]}")
    return match[1] or match[2], number


def pod_address(document: Document, node: yaml.Node, path: str) -> Address:
    """`host:port` of a pod."""
    return Address(*split_host_port(reader.text(document, node, path)))


def static_pods(document: Document, node: yaml.Node, path: str) -> StaticSource:
    """A list of pods, or a single one."""
    pods = reader.one_or_more(pod_address)(document, node, path)
    for pod in pods:
        if pods.count(pod) > 1:
            raise Wrong(f"{pod} is given more than once")
    return StaticSource(pods)


def name_server(document: Document, node: yaml.Node, path: str) -> Server:
    """`address[:port]` of a DNS server."""
    host, number = split_host_port(reader.text(document, node, path), _DEFAULT_DNS_PORT)
    try:
        ip_address(host)
    except ValueError:
        raise Wrong(f"a name server is given by its IP address, not {host!r}") from None
    return host, number


def dns_name(document: Document, node: yaml.Node, path: str) -> str:
    """A host name (RFC 1123, with the underscores that Kubernetes' own names may have)."""
    written = reader.text(document, node, path)
    labels = written.removesuffix(".").split(".")
    good = all(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", x) for x in labels)
    if not good or len(written) > 253:
        raise Wrong(f"{written!r} is not a DNS name")
    return written


def url_path(document: Document, node: yaml.Node, path: str) -> str:
    """A path that starts with a slash and has no query."""
    written = reader.text(document, node, path)
    if not written.startswith("/"):
        raise Wrong(f"must start with '/', not {written!r}")
    if "?" in written or "#" in written:
        raise Wrong("must be a path alone: the query string takes no part in routing")
    return written


def regular_expression(document: Document, node: yaml.Node, path: str) -> str:
    """A regular expression as Python's `re` has them."""
    written = reader.text(document, node, path)
    try:
        re.compile(written)
    except re.error as error:
        raise Wrong(f"not a regular expression: {error}") from None
    return written


def host_pattern(document: Document, node: yaml.Node, path: str) -> str:
    """A host name, or `*.suffix`."""
    written = reader.text(document, node, path).lower()
    name = written.removeprefix("*.")
    if "*" in name or ":" in name or "/" in name or name.startswith("."):
        raise Wrong(f"{written!r} is neither a host name nor *.suffix (and takes no port)")
    return written


def method(document: Document, node: yaml.Node, path: str) -> str:
    """A request method (RFC 9110, 9.1: case-sensitive)."""
    written = reader.text(document, node, path)
    if not re.fullmatch(r"[A-Z][A-Z-]*", written):
        raise Wrong(f"{written!r} is not a request method such as GET")
    return written


def log_level(document: Document, node: yaml.Node, path: str) -> str:
    """One of twisted.logger's levels."""
    written = reader.text(document, node, path).lower()
    if written not in _LEVELS:
        raise Wrong(f"must be one of {', '.join(_LEVELS)}, not {written!r}")
    return written
