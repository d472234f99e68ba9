"""
The configuration as frozen records.

What a key means and its default live here; how it is written and checked is
`strictproxy.config.reader`'s and `strictproxy.config.schema`'s business.
Durations are seconds, sizes are bytes, None means "no bound" unless said
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from strictproxy.scheduling import Address, HealthPolicy

Server = tuple[str, int]


@dataclass(frozen=True)
class StaticSource:
    """Pods that never change."""

    pods: tuple[Address, ...]


class Family(Enum):
    """Which addresses of a name are pods."""

    #: IPv4 where there is any, else IPv6: a pod that has both is one pod
    AUTO = "auto"
    IPV4 = "ipv4"
    IPV6 = "ipv6"
    #: every address is a pod of its own
    BOTH = "both"


@dataclass(frozen=True)
class DnsSource:
    """Pods that are the addresses of a headless Service's name."""

    name: str
    #: None if `name` is one of SRV records, which say it
    port: int | None = None
    #: between two looks while nothing changes
    every: float = 2.0
    #: how many lookups must agree before a new set is believed
    lookups: int = 5
    #: between those lookups
    interval: float = 0.5
    #: until the next look when they did not agree
    retry_after: float = 10.0
    #: name servers to ask; those of resolv.conf if empty
    servers: tuple[Server, ...] = ()
    family: Family = Family.AUTO
    #: look into /etc/hosts first
    hosts: bool = False
    #: the last good set is given up after so long without an answer
    max_stale: float | None = None


@dataclass(frozen=True)
class KubernetesSource:
    """Pods that a Service's EndpointSlices name."""

    service: str
    #: that of the pod we run in, or of the kubeconfig, if None
    namespace: str | None = None
    #: name or number of the pods' port; None if they have only one
    port: str | int | None = None
    family: Family = Family.AUTO
    #: a file that says where the API server is and what to show it
    kubeconfig: str | None = None
    #: or its URL, with files of a token and of the authority to trust
    server: str | None = None
    token_file: str | None = None
    ca: str | None = None


Source = StaticSource | DnsSource | KubernetesSource


@dataclass(frozen=True)
class QueueConfig:
    """The line of an upstream."""

    size: int = 1000
    timeout: float | None = 3600.0
    no_pods_timeout: float = 30.0


@dataclass(frozen=True)
class PodConnections:
    """Connections to the pods of an upstream."""

    connect_timeout: float = 5.0
    #: idle connections are kept so long: less than common servers do (gunicorn: 2 s)
    keepalive: float = 1.5
    #: until the first byte of the answer
    first_byte_timeout: float | None = None
    #: between two pieces of the answer
    idle_timeout: float | None = 600.0
    #: a pod whose kernel does not answer for so long is taken for dead
    dead_after: float | None = 60.0


@dataclass(frozen=True)
class CertificateFiles:
    """A certificate with its chain, and its key, in PEM."""

    cert: str
    key: str


@dataclass(frozen=True)
class PodTls:
    """TLS towards pods."""

    #: whom to trust; None is the system's store
    ca: str | None = None
    #: what pods must prove to be; None is the address they are reached by
    server_name: str | None = None
    #: our own certificate, for pods that ask for one
    client: CertificateFiles | None = None


@dataclass(frozen=True)
class ListenTls:
    """TLS towards clients."""

    #: chosen by the name that the client asks for; the first is for all others
    certificates: tuple[CertificateFiles, ...]
    #: clients must have a certificate of these authorities
    client_ca: str | None = None
    min_version: str = "1.2"


@dataclass(frozen=True)
class ListenConfig:
    """Where clients connect."""

    #: a Twisted server endpoint
    endpoint: str
    tls: ListenTls | None = None


@dataclass(frozen=True)
class CheckConfig:
    """How pods are asked whether they are well."""

    #: of an HTTP request; None is only to connect
    path: str | None = None
    #: that a good answer may have
    statuses: frozenset[int] = frozenset(range(200, 400))
    #: that a good answer contains
    body: str | None = None
    #: None is the one that requests go to
    port: int | None = None
    every: float = 5.0
    timeout: float = 2.0
    #: so many good answers in a row bring a pod back
    rise: int = 2
    #: so many bad ones put it aside
    fall: int = 3


@dataclass(frozen=True)
class AdminConfig:
    """Where operators connect."""

    #: a Twisted server endpoint
    endpoint: str
    #: a file with the token that changes things, and reads where others could too
    token_file: str | None = None
    #: reading needs no token, wherever from
    open: bool = False


@dataclass(frozen=True)
class UpstreamConfig:
    """Pods that do the same job."""

    name: str
    source: Source
    #: requests in flight per pod
    limit: int = 1
    queue: QueueConfig = QueueConfig()
    connections: PodConnections = PodConnections()
    tls: PodTls | None = None
    #: other limits for some pods
    pod_limits: tuple[tuple[Address, int], ...] = ()
    #: response header by which a pod tells its own limit
    limit_header: str | None = None
    health: HealthPolicy = field(default_factory=HealthPolicy)
    #: requests may run so long on a pod that discovery does not know any more
    drain_timeout: float | None = None
    check: CheckConfig | None = None


@dataclass(frozen=True)
class HeaderEdits:
    """Changes to a message's headers; `set` replaces whatever was there, `add` adds to it."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


class Body(Enum):
    """How a request's body gets to the pod."""

    #: as it comes, once there is a slot
    STREAM = "stream"
    #: received whole before the request asks for a slot
    SPOOL = "spool"


class OnDisconnect(Enum):
    """What happens to a request on a pod when its client goes away."""

    CANCEL = "cancel"
    FINISH = "finish"


@dataclass(frozen=True)
class Match:
    """What a request must look like for a route; what is None or empty is not looked at."""

    #: exact path
    path: str | None = None
    #: the path, or any path below it
    prefix: str | None = None
    #: regular expression that matches the whole path
    regex: str | None = None
    #: exact host, or `*.suffix`
    host: str | None = None
    methods: frozenset[str] = frozenset()
    #: header name (lower case) and value, all of which must be present
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TaskId:
    """Where the answer to a submit call has the task's id; exactly one of these."""

    #: JSON Pointer into the body (RFC 6901)
    json: str | None = None
    header: str | None = None
    #: the last part of the Location's path
    location: bool = False


@dataclass(frozen=True)
class TaskDone:
    """What says that a task is done: a value in the body, or a status."""

    json: str | None = None
    values: frozenset[str] = frozenset()
    statuses: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TaskPoll:
    """How a pod is asked about a task."""

    #: with `{id}` in it
    path: str
    every: float = 2.0
    timeout: float = 5.0


@dataclass(frozen=True)
class TaskCallback:
    """How a pod tells by itself that a task is done."""

    #: request header that brings the pod the URL to call
    header: str
    #: how pods reach this proxy
    base: str


@dataclass(frozen=True)
class TaskConfig:
    """A route whose requests submit asynchronous jobs."""

    id: TaskId
    done: TaskDone | None = None
    poll: TaskPoll | None = None
    #: paths with `{id}` that go to the pod that owns the task, without a slot
    related: tuple[str, ...] = ()
    callback: TaskCallback | None = None
    #: a slot is held so long at most
    limit_time: float = 6 * 3600.0
    #: what is done is remembered so long, for related calls
    keep: float = 24 * 3600.0
    #: the submit call is kept, and sent to another pod if the task is lost
    resubmit: bool = False


@dataclass(frozen=True)
class DetachConfig:
    """A route whose clients need not wait for their answer (`Prefer: respond-async`)."""

    #: a request that was interrupted may be given to a pod again
    repeat: bool = False
    #: bytes of the pod's answer
    max_result: int = 2**30
    #: it waits for a slot so long at most
    limit_wait: float = 24 * 3600.0
    #: after a crash, the slots of those that ran are taken for in use so long, since
    #: pods may go on although nobody listens any more
    hold_interrupted: float = 0.0


@dataclass(frozen=True)
class RouteConfig:
    """What matches a request, and what is done with it."""

    name: str
    match: Match
    upstream: str
    #: requests of this route in flight per pod, besides the upstream's limit
    limit: int | None = None
    #: replaces the matched prefix (or exact path) before the request goes to the pod
    replace_prefix: str | None = None
    on_client_disconnect: OnDisconnect = OnDisconnect.CANCEL
    max_body: int | None = None
    body: Body = Body.STREAM
    request_headers: HeaderEdits = HeaderEdits()
    response_headers: HeaderEdits = HeaderEdits()
    #: statuses of the pod's answer that count as its failures
    failures: frozenset[int] = frozenset()
    #: methods whose requests may be sent to another pod after one failed them
    retry: frozenset[str] = frozenset()
    #: the whole exchange, waiting included
    timeout: float | None = None
    task: TaskConfig | None = None
    detach: DetachConfig | None = None


#: Networks inside which addresses are private: those of a cluster, in practice.
PRIVATE_NETWORKS = tuple(
    ip_network(text)
    for text in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "::1/128",
        "fc00::/7",
        "fe80::/10",
    )
)


@dataclass(frozen=True)
class RouterConfig:
    """A custom router: the plugin's name and the settings passed to it."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientConfig:
    """Limits on clients and their connections."""

    connections: int = 10_000
    header_timeout: float = 15.0
    body_timeout: float = 60.0
    keepalive: float = 75.0
    max_headers: int = 100
    max_header_bytes: int = 64 * 1024
    max_target: int = 16 * 1024
    max_body: int | None = 16 * 2**30
    #: read ahead of a body while its request waits for a slot
    read_ahead: int = 64 * 1024
    #: bytes of a spooled body that stay in memory
    spool_memory: int = 1024 * 1024
    #: for the rest of it; None is the system's temporary directory
    spool_directory: str | None = None
    #: proxies whose X-Forwarded-* and Forwarded are believed
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = PRIVATE_NETWORKS
    #: tell clients how long their request waited and worked
    server_timing: bool = False


class LogFormat(Enum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


class AccessFormat(Enum):
    """How the line of a request is written."""

    JSON = "json"
    LOGFMT = "logfmt"
    #: as Apache and nginx do, with the pod, both times and the reason at the end
    COMBINED = "combined"


@dataclass(frozen=True)
class LogConfig:
    """Where log lines go and what they look like."""

    format: LogFormat = LogFormat.TEXT
    level: str = "info"
    #: one line per request
    access: bool = True
    #: None is as `format`
    access_format: AccessFormat | None = None
    #: part of the requests that went well which are logged; the others are always
    access_sample: float = 1.0
    #: path, or None for standard output
    file: str | None = None


@dataclass(frozen=True)
class TracingConfig:
    """Where spans go."""

    #: URL of an OpenTelemetry collector: OTLP over HTTP
    endpoint: str
    #: part of the traces that nobody before us has decided about
    sample: float = 1.0
    #: what we are called there
    service: str = "strictproxy"


#: Addresses that nobody may have called: this machine, its link, and no address at all.
LOCAL_NETWORKS = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/3",
        "::/127",
        "fe80::/10",
        "ff00::/8",
    )
)


@dataclass(frozen=True)
class CallbacksConfig:
    """Whom clients may have told that a detached request has ended."""

    #: exact names, or `*.suffix`
    hosts: tuple[str, ...]
    #: a file with the key that signs what is sent
    secret_file: str
    #: request header that names the URL, besides the parameter of the preference
    header: str = "X-Callback-Url"
    #: addresses that are never called, whatever a name resolves to
    forbid: tuple[IPv4Network | IPv6Network, ...] = LOCAL_NETWORKS
    #: who has not answered well for so long is not called again
    give_up: float = 3600.0


@dataclass(frozen=True)
class TasksConfig:
    """Where tasks are kept over a restart, and how many."""

    directory: str
    #: detached requests that have ended, and their results, are kept so long
    keep: float = 24 * 3600.0
    #: of them, those that wait and run included
    max_count: int = 10_000
    #: bytes of all their bodies and results
    max_size: int = 10 * 2**30
    callbacks: CallbacksConfig | None = None


@dataclass(frozen=True)
class Config:
    """Everything that a configuration file says."""

    listen: tuple[ListenConfig, ...]
    upstreams: Mapping[str, UpstreamConfig]
    routes: tuple[RouteConfig, ...]
    routers: tuple[RouterConfig, ...] = ()
    admin: AdminConfig | None = None
    client: ClientConfig = ClientConfig()
    log: LogConfig = LogConfig()
    #: running and waiting requests may take so long after SIGTERM
    drain_timeout: float = 30.0
    #: after SIGTERM, endpoints have so long to notice before listeners close; 0 is at once
    shutdown_delay: float = 0.0
    #: other processes may listen on the same ports
    reuse_port: bool = False
    tracing: TracingConfig | None = None
    tasks: TasksConfig | None = None
