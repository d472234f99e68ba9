"""
Kinds of value that only a proxy has: endpoints, addresses, paths, headers.

Each reads one YAML node, and raises `Wrong` with what it should have been. See
`strictproxy.config.reader` for the kinds that any program has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, cast

import yaml
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IReactorCore

from strictproxy.config import reader
from strictproxy.config.model import Server, StaticSource
from strictproxy.config.reader import Document, Section, Wrong
from strictproxy.scheduling import Address

_LEVELS = ("debug", "info", "warn", "error", "critical")
_DEFAULT_DNS_PORT = 53


def mapping(document: Document, node: yaml.Node, path: str) -> Mapping[str, Any]:
    """Plain data, a mapping at its top."""
    if not isinstance(node, yaml.MappingNode):
        raise Wrong(f"must be a mapping, not {reader.kind_of(node)}")
    return cast("Mapping[str, Any]", reader.anything(document, node, path))


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


def pod_limits(document: Document, node: yaml.Node, path: str) -> tuple[tuple[Address, int], ...]:
    """`host:port` of pods, with a limit for each."""
    if not isinstance(node, yaml.MappingNode):
        raise Wrong(f"must be a mapping, not {reader.kind_of(node)}")
    part = Section(document, node, path)
    return tuple(
        (Address(*split_host_port(key)), part.take(key, reader.whole(1), 1)) for key in part
    )


def share(document: Document, node: yaml.Node, path: str) -> float:
    """A part of a whole, as a percentage."""
    _, written = document.scalar(node)
    match = re.fullmatch(r"(\d{1,3})%", written)
    if match is None or int(match[1]) > 100:
        raise Wrong(f"must be a percentage such as 50%, not {written!r}")
    return int(match[1]) / 100


def status(document: Document, node: yaml.Node, path: str) -> int:
    """A response's status code (RFC 9110, 15) that may mean a failure."""
    code = reader.whole(400)(document, node, path)
    if code > 599:
        raise Wrong(f"must be from 400 to 599, not {code}")
    return code


def any_status(document: Document, node: yaml.Node, path: str) -> int:
    """A final response's status code (RFC 9110, 15)."""
    code = reader.whole(200)(document, node, path)
    if code > 599:
        raise Wrong(f"must be from 200 to 599, not {code}")
    return code


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


def service_port(document: Document, node: yaml.Node, path: str) -> str | int:
    """The name or the number of a Service's port (RFC 6335, 5.1)."""
    _, written = document.scalar(node)
    if written.isdecimal():
        return reader.port(document, node, path)
    if not re.fullmatch(r"(?=.{1,15}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?", written):
        raise Wrong(f"{written!r} is neither a port's name nor its number")
    return written


def label(document: Document, node: yaml.Node, path: str) -> str:
    """A name of Kubernetes objects such as Services (RFC 1123, 2.1)."""
    written = reader.text(document, node, path)
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", written):
        raise Wrong(f"{written!r} is not a name such as transcode-pods")
    return written


def url(document: Document, node: yaml.Node, path: str) -> str:
    """The URL of a server."""
    written = reader.text(document, node, path)
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", written):
        raise Wrong(f"{written!r} is not a URL such as https://10.96.0.1:443")
    return written


def any_text(document: Document, node: yaml.Node, path: str) -> str:
    """A single value, as it is written."""
    _, written = document.scalar(node)
    return written


def json_pointer(document: Document, node: yaml.Node, path: str) -> str:
    """A JSON Pointer (RFC 6901)."""
    written = reader.text(document, node, path)
    if not re.fullmatch(r"(/([^~/]|~[01])*)+", written):
        raise Wrong(f"{written!r} is not a JSON Pointer such as /task/id")
    return written


def task_path(document: Document, node: yaml.Node, path: str) -> str:
    """A path that names a task by `{id}`."""
    written = url_path(document, node, path)
    if written.count("{id}") != 1:
        raise Wrong("must have {id} in it, once")
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


def tls_version(document: Document, node: yaml.Node, path: str) -> str:
    """A version of TLS that is still safe."""
    _, written = document.scalar(node)
    if written not in ("1.2", "1.3"):
        raise Wrong(f"must be 1.2 or 1.3, not {written}")
    return written
