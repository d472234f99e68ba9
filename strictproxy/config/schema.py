"""
What may stand in a configuration file, and what it turns into.

`load` and `parse` are the way in. The Go version's file is recognised by its
`port` and `k8s_host` keys and read by `strictproxy.config.legacy`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from strictproxy.config import kinds, reader, routes_schema
from strictproxy.config.model import (
    AccessFormat,
    AdminConfig,
    CallbacksConfig,
    CertificateFiles,
    CheckConfig,
    ClientConfig,
    Config,
    DnsSource,
    Family,
    KubernetesSource,
    ListenConfig,
    ListenTls,
    LogConfig,
    LogFormat,
    PodConnections,
    PodTls,
    QueueConfig,
    RouterConfig,
    Source,
    StaticSource,
    TasksConfig,
    TracingConfig,
    UpstreamConfig,
)
from strictproxy.config.reader import Document, Section, Wrong
from strictproxy.errors import ConfigError
from strictproxy.scheduling import HealthPolicy


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
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(decode(content, str(path)), str(path), environ)


def decode(content: bytes, file: str) -> str:
    """
    Return a file's text.

    :raise ConfigError: it is none.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text, at byte {error.start}") from error


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
    admin = top.take("admin", _admin, None)
    upstreams = top.take("upstreams", named(_upstream))
    routers: tuple[RouterConfig, ...] = top.take(
        "routers", reader.items(reader.section(routes_schema.router)), ()
    )
    routes: tuple[routes_schema.RouteAt, ...] = top.take(
        "routes", reader.items(routes_schema.route), ()
    )
    config = Config(
        listen=listen,
        admin=admin,
        upstreams=upstreams if not top.failed else {},
        routes=tuple(route for _, route in routes),
        routers=routers,
        client=top.take("client", reader.section(_client), ClientConfig()),
        log=top.take("log", reader.section(_log), LogConfig()),
        drain_timeout=top.take("drain_timeout", reader.duration, Config.drain_timeout),
        shutdown_delay=top.take("shutdown_delay", reader.or_off(reader.duration), None) or 0.0,
        tracing=top.take("tracing", reader.section(_tracing), None),
        tasks=top.take("tasks", reader.section(_tasks), None),
        reuse_port=top.take("reuse_port", reader.boolean, Config.reuse_port),
    )
    if not top.failed:
        routes_schema.check_routes(top.document, routes, config.upstreams)
        for part, route in routes:
            if route.detach is not None and config.tasks is None:
                part.note("detach", "needs 'tasks: {directory: ...}' at the top, to keep them in")
        if not routes and not routers and "routes" not in top and "routers" not in top:
            top.note(None, "neither 'routes' nor 'routers': no request could go anywhere")
    return config


# -- upstreams


def _upstream(name: str, part: Section) -> UpstreamConfig:
    return UpstreamConfig(
        name=name,
        source=_source(part),
        limit=part.take("limit", reader.whole(1), UpstreamConfig.limit),
        pod_limits=part.take("pod_limits", kinds.pod_limits, ()),
        limit_header=part.take("limit_header", kinds.header_name, None),
        queue=part.take("queue", reader.section(_queue), QueueConfig()),
        health=part.take("health", reader.section(_health), HealthPolicy()),
        drain_timeout=part.take("drain_timeout", reader.or_off(reader.duration), None),
        check=part.take("check", reader.section(_check), None),
        connections=part.take("connections", reader.section(_connections), PodConnections()),
        tls=part.take("tls", reader.section(_pod_tls), None),
    )


def _source(part: Section) -> Source:
    found = [
        part.take("dns", reader.section(_dns), None),
        part.take("kubernetes", reader.section(_kubernetes), None),
        part.take("static", kinds.static_pods, None),
    ]
    given = [key for key in ("dns", "kubernetes", "static") if key in part]
    if len(given) > 1:
        part.note(given[-1], f"{' and '.join(map(repr, given))} exclude each other")
    elif not given:
        part.note(None, "no source of pods: 'dns', 'kubernetes' or 'static' is missing")
    return next((source for source in found if source is not None), StaticSource(()))


def _kubernetes(part: Section) -> KubernetesSource:
    if "kubeconfig" in part and "server" in part:
        part.note("server", "'kubeconfig' and 'server' exclude each other")
    for key in ("token_file", "ca"):
        if key in part and "server" not in part:
            part.note(key, f"{key!r} is for a 'server' of your own")
    return KubernetesSource(
        service=part.take("service", kinds.label),
        namespace=part.take("namespace", kinds.label, None),
        port=part.take("port", kinds.service_port, None),
        family=part.take("family", reader.choice(Family), KubernetesSource.family),
        kubeconfig=part.take("kubeconfig", reader.text, None),
        server=part.take("server", kinds.url, None),
        token_file=part.take("token_file", reader.text, None),
        ca=part.take("ca", reader.text, None),
    )


def _dns(part: Section) -> DnsSource:
    name = part.take("name", kinds.dns_name)
    port = part.take("port", reader.port, None)
    if "port" not in part and "name" in part and not str(name).startswith("_"):
        part.note(
            None,
            "'port' is missing; only SRV records, as of _http._tcp.name, say the port themselves",
        )
    return DnsSource(
        name=name,
        port=port,
        every=part.take("every", reader.duration, DnsSource.every),
        lookups=part.take("lookups", reader.whole(1), DnsSource.lookups),
        interval=part.take("interval", reader.duration, DnsSource.interval),
        retry_after=part.take("retry_after", reader.duration, DnsSource.retry_after),
        servers=part.take("servers", reader.one_or_more(kinds.name_server), ()),
        family=part.take("family", reader.choice(Family), DnsSource.family),
        hosts=part.take("hosts", reader.boolean, DnsSource.hosts),
        max_stale=part.take("max_stale", reader.or_off(reader.duration), DnsSource.max_stale),
    )


def _queue(part: Section) -> QueueConfig:
    default = QueueConfig()
    return QueueConfig(
        size=part.take("size", reader.whole(0), default.size),
        timeout=part.take("timeout", reader.or_off(reader.duration), default.timeout),
        no_pods_timeout=part.take("no_pods_timeout", reader.duration, default.no_pods_timeout),
    )


def _health(part: Section) -> HealthPolicy:
    default = HealthPolicy()
    return HealthPolicy(
        failures=part.take("failures", reader.whole(1), default.failures),
        aside=part.take("aside", reader.duration, default.aside),
        max_aside=part.take("max_aside", reader.duration, default.max_aside),
        max_share=part.take("max_share", kinds.share, default.max_share),
        slow_start=part.take("slow_start", reader.or_off(reader.duration), None) or 0.0,
    )


def _check(part: Section) -> CheckConfig:
    default = CheckConfig()
    http = part.take("http", kinds.url_path, None)
    tcp = part.take("tcp", reader.boolean, None)
    if "http" in part and "tcp" in part:
        part.note("tcp", "'http' and 'tcp' exclude each other")
    elif "http" not in part and "tcp" not in part:
        part.note(None, "needs 'http: /path' or 'tcp: true'")
    elif tcp is False:
        part.note("tcp", "must be true, or not be there")
    for key in ("status", "body"):
        if tcp and key in part:
            part.note(key, f"{key!r} is for checks by 'http'")
    statuses = part.take("status", reader.one_or_more(kinds.any_status), None)
    return CheckConfig(
        path=http,
        statuses=default.statuses if statuses is None else frozenset(statuses),
        body=part.take("body", reader.text, None),
        port=part.take("port", reader.port, None),
        every=part.take("every", reader.duration, default.every),
        timeout=part.take("timeout", reader.duration, default.timeout),
        rise=part.take("rise", reader.whole(1), default.rise),
        fall=part.take("fall", reader.whole(1), default.fall),
    )


def _connections(part: Section) -> PodConnections:
    default = PodConnections()
    off = reader.or_off(reader.duration)
    return PodConnections(
        connect_timeout=part.take("connect_timeout", reader.duration, default.connect_timeout),
        keepalive=part.take("keepalive", reader.duration, default.keepalive),
        first_byte_timeout=part.take("first_byte_timeout", off, default.first_byte_timeout),
        idle_timeout=part.take("idle_timeout", off, default.idle_timeout),
        dead_after=part.take("dead_after", off, default.dead_after),
    )


def _pod_tls(part: Section) -> PodTls:
    return PodTls(
        ca=part.take("ca", reader.text, None),
        server_name=part.take("server_name", kinds.dns_name, None),
        client=part.take("client", reader.section(_certificate), None),
    )


def _certificate(part: Section) -> CertificateFiles:
    return CertificateFiles(cert=part.take("cert", reader.text), key=part.take("key", reader.text))


# -- listeners


def _admin(document: Document, node: yaml.Node, path: str) -> AdminConfig:
    """An endpoint, alone or with who may use it."""
    if isinstance(node, yaml.MappingNode):
        return reader.section(_admin_section)(document, node, path)
    return AdminConfig(kinds.endpoint(document, node, path))


def _admin_section(part: Section) -> AdminConfig:
    return AdminConfig(
        endpoint=part.take("endpoint", kinds.endpoint),
        token_file=part.take("token_file", reader.text, None),
        open=part.take("open", reader.boolean, False),
    )


def listener(document: Document, node: yaml.Node, path: str) -> ListenConfig:
    """An endpoint, or a mapping of one with its TLS settings."""
    if isinstance(node, yaml.MappingNode):
        return reader.section(_listener)(document, node, path)
    return ListenConfig(kinds.endpoint(document, node, path))


def _listener(part: Section) -> ListenConfig:
    return ListenConfig(
        endpoint=part.take("endpoint", kinds.endpoint),
        tls=part.take("tls", reader.section(_listen_tls), None),
    )


def _listen_tls(part: Section) -> ListenTls:
    return ListenTls(
        certificates=part.take("certificates", certificates),
        client_ca=part.take("client_ca", reader.text, None),
        min_version=part.take("min_version", kinds.tls_version, ListenTls.min_version),
    )


def certificates(document: Document, node: yaml.Node, path: str) -> tuple[CertificateFiles, ...]:
    """At least one certificate."""
    found = reader.items(reader.section(_certificate))(document, node, path)
    if not node.value:
        raise Wrong("must not be empty")
    return found


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
            "trusted_proxies", reader.items(kinds.network), default.trusted_proxies
        ),
        server_timing=part.take("server_timing", reader.boolean, default.server_timing),
    )


def _log(part: Section) -> LogConfig:
    default = LogConfig()
    return LogConfig(
        format=part.take("format", reader.choice(LogFormat), default.format),
        level=part.take("level", kinds.log_level, default.level),
        access=part.take("access", reader.boolean, default.access),
        access_format=part.take(
            "access_format", reader.choice(AccessFormat), default.access_format
        ),
        access_sample=part.take("access_sample", kinds.share, default.access_sample),
        file=part.take("file", reader.text, default.file),
    )


def _tracing(part: Section) -> TracingConfig:
    return TracingConfig(
        endpoint=part.take("endpoint", kinds.url),
        sample=part.take("sample", kinds.share, TracingConfig.sample),
        service=part.take("service", reader.text, TracingConfig.service),
    )


def _tasks(part: Section) -> TasksConfig:
    default = TasksConfig("")
    return TasksConfig(
        directory=part.take("directory", reader.text),
        keep=part.take("keep", reader.duration, default.keep),
        max_count=part.take("max_count", reader.whole(1), default.max_count),
        max_size=part.take("max_size", reader.size, default.max_size),
        callbacks=part.take("callbacks", reader.section(_callbacks), None),
    )


def _callbacks(part: Section) -> CallbacksConfig:
    default = CallbacksConfig((), "")
    return CallbacksConfig(
        hosts=part.take("hosts", reader.one_or_more(kinds.host_pattern)),
        secret_file=part.take("secret_file", reader.text),
        header=part.take("header", kinds.header_name, default.header),
        forbid=part.take("forbid", reader.items(kinds.network), default.forbid),
        give_up=part.take("give_up", reader.duration, default.give_up),
    )


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
