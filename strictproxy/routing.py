"""
Which route a request takes. Pure.

Of the routes that match, the most specific wins: by host (exact, then the
longest `*.suffix`, then any), then by path (exact, then regex in the order of
the file, then the longest prefix, then any), then by method, then by the
number of headers, then by the order of the file.

Paths are compared after undoing needless percent-encoding (RFC 3986, 6.2.2),
and forwarded as they came.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import quote

from strictproxy.config.model import RouteConfig
from strictproxy.interfaces import RequestInfo

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_TRIPLET = re.compile(r"%([0-9A-Fa-f]{2})")
#: Characters of a path that `quote` leaves alone (RFC 3986, 3.3).
_PATH_CHARACTERS = "/%:@!$&'()*+,;=~-._"


def normalise_path(path: str) -> str:
    """Return the form in which paths are compared; `/` stays apart from `%2F`."""
    if "%" not in path:
        return path
    return _TRIPLET.sub(_normalise_triplet, path)


def _normalise_triplet(match: re.Match[str]) -> str:
    code = int(match[1], 16)
    return chr(code) if code in _UNRESERVED else match[0].upper()


def _configured_path(path: str) -> str:
    """Encode a path as a person writes it (`/café`) in the way that it arrives."""
    return normalise_path(quote(path, safe=_PATH_CHARACTERS))


@dataclass(slots=True)
class _Paths:
    """The routes of one host, by the kind of path they ask for."""

    exact: dict[str, list[RouteConfig]] = field(default_factory=dict)
    regex: list[tuple[re.Pattern[str], RouteConfig]] = field(default_factory=list)
    prefix: dict[str, list[RouteConfig]] = field(default_factory=dict)
    any_path: list[RouteConfig] = field(default_factory=list)

    def add(self, route: RouteConfig) -> None:
        match = route.match
        if match.path is not None:
            self.exact.setdefault(_configured_path(match.path), []).append(route)
        elif match.regex is not None:
            self.regex.append((re.compile(match.regex), route))
        elif match.prefix is not None:
            prefix = _configured_path(match.prefix).rstrip("/") or "/"
            if match.prefix.endswith("/"):
                prefix = prefix.rstrip("/") + "/"
            self.prefix.setdefault(prefix, []).append(route)
        else:
            self.any_path.append(route)

    def sort(self) -> None:
        for routes in (*self.exact.values(), *self.prefix.values(), self.any_path):
            routes.sort(key=_by_detail)

    def find(self, path: str, fits: Callable[[RouteConfig], bool]) -> RouteConfig | None:
        for route in self.exact.get(path, ()):
            if fits(route):
                return route
        for pattern, route in self.regex:
            if pattern.fullmatch(path) and fits(route):
                return route
        if self.prefix:
            for prefix in _prefixes(path):
                for route in self.prefix.get(prefix, ()):
                    if fits(route):
                        return route
        for route in self.any_path:
            if fits(route):
                return route
        return None


def _by_detail(route: RouteConfig) -> tuple[bool, int]:
    return (not route.match.methods, -len(route.match.headers))


def _prefixes(path: str) -> Iterable[str]:
    """Every configured prefix that could cover `path`, the longest first."""
    yield path
    end = len(path)
    while (end := path.rfind("/", 0, end)) >= 0:
        if end + 1 < len(path):
            yield path[: end + 1]
        if end:
            yield path[:end]


class RouteTable:
    """The routes of a configuration, ready for look-up."""

    def __init__(self, routes: Iterable[RouteConfig]) -> None:
        self._exact_hosts: dict[str, _Paths] = {}
        self._suffixes: dict[str, _Paths] = {}
        self._any_host = _Paths()
        for route in routes:
            self._paths_of(route.match.host).add(route)
        for paths in (*self._exact_hosts.values(), *self._suffixes.values(), self._any_host):
            paths.sort()

    def _paths_of(self, host: str | None) -> _Paths:
        if host is None:
            return self._any_host
        if host.startswith("*."):
            return self._suffixes.setdefault(host[1:], _Paths())
        return self._exact_hosts.setdefault(host, _Paths())

    def find(self, request: RequestInfo) -> RouteConfig | None:
        """Return the route that `request` takes, or None."""
        path = normalise_path(request.path)

        def fits(route: RouteConfig) -> bool:
            match = route.match
            if match.methods and request.method not in match.methods:
                return False
            return all(request.headers.get(name) == value for name, value in match.headers)

        for paths in self._for_host(request.host):
            route = paths.find(path, fits)
            if route is not None:
                return route
        return None

    def _for_host(self, host: str) -> Iterable[_Paths]:
        if self._exact_hosts and (exact := self._exact_hosts.get(host)):
            yield exact
        if self._suffixes:
            start = -1
            # Longest suffix first; *.example.com does not match example.com.
            while (start := host.find(".", start + 1)) >= 0:
                if start and (suffix := self._suffixes.get(host[start:])):
                    yield suffix
        yield self._any_host


def rewrite(route: RouteConfig, target: str) -> str:
    """
    Return the target to send to the pod: `target` with the route's prefix replaced.

    The query string, and whatever follows the prefix, stay as they came.
    """
    replacement = route.replace_prefix
    if replacement is None:
        return target
    path, mark, query = target.partition("?")
    matched = route.match.path or route.match.prefix or ""
    rest = path[_matched_length(path, _configured_path(matched).rstrip("/")) :]
    new = (replacement.rstrip("/") + "/" + rest.lstrip("/")) if rest else replacement
    return f"{new}{mark}{query}"


def _matched_length(path: str, prefix: str) -> int:
    """How many characters of `path`, as it came, make up the normalised `prefix`."""
    if path.startswith(prefix):
        return len(prefix)
    position = 0
    for character in re.findall(r"%[0-9A-F]{2}|.", prefix):
        width = 3 if path[position] == "%" else 1
        assert normalise_path(path[position : position + width]) == character
        position += width
    return position
