"""
What resolv.conf says, and what follows for a name. Pure: the file's text is passed in.

After resolv.conf(5) as glibc has it, which is what a pod's programs go by. See
https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/ for
what kubelet writes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

#: Seconds to wait for each server, first and second time round, unless the file says otherwise.
_TIMEOUTS = (1.0, 2.0)
_MOST_SERVERS = 3
_DNS_PORT = 53
_MOST_NDOTS, _MOST_TIMEOUT, _MOST_ATTEMPTS = 15, 30, 5

Server = tuple[str, int]


@dataclass(frozen=True, slots=True)
class ResolvConf:
    """How to look up names."""

    #: address and port of name servers, the preferred one first
    servers: tuple[Server, ...]
    #: domains that complete a name which is short
    search: tuple[str, ...] = ()
    #: a name with so many dots is first tried as it is
    ndots: int = 1
    #: seconds to wait for each server, time after time
    timeouts: tuple[float, ...] = _TIMEOUTS

    def candidates(self, name: str) -> list[str]:
        """
        Return the absolute names that `name` may stand for, in order of preference.

        A name that ends with a dot is absolute already.
        """
        if name.endswith("."):
            return [name[:-1]]
        completed = [f"{name}.{domain}" if domain else name for domain in self.search]
        tried_first = name.count(".") >= self.ndots
        names = [name, *completed] if tried_first else [*completed, name]
        return list(dict.fromkeys(names))


def parse(text: str) -> ResolvConf:
    """
    Read the text of a resolv.conf; lines that make no sense are passed over, as glibc does.

    Without any name server it is this machine's, as resolv.conf(5) has it.
    """
    servers: list[Server] = []
    search: tuple[str, ...] = ()
    options: dict[str, int] = {}
    for line in text.splitlines():
        # Comments have a line of their own, or follow a blank.
        words = line.split("#", 1)[0].split(";", 1)[0].split()
        if not words:
            continue
        keyword, values = words[0], words[1:]
        if keyword == "nameserver" and values and _is_address(values[0]):
            servers.append((values[0], _DNS_PORT))
        elif keyword in ("search", "domain"):
            # The last one counts.
            search = tuple(value.removesuffix(".") for value in values)
        elif keyword == "options":
            options.update(_options(values))
    timeouts: tuple[float, ...] = _TIMEOUTS
    if "timeout" in options or "attempts" in options:
        timeout = float(min(max(options.get("timeout", 1), 1), _MOST_TIMEOUT))
        timeouts = (timeout,) * min(max(options.get("attempts", 2), 1), _MOST_ATTEMPTS)
    return ResolvConf(
        tuple(servers[:_MOST_SERVERS]) or (("127.0.0.1", _DNS_PORT),),
        search,
        min(options.get("ndots", 1), _MOST_NDOTS),
        timeouts,
    )


def _options(words: list[str]) -> dict[str, int]:
    pairs = (word.partition(":") for word in words)
    return {name: int(value) for name, _, value in pairs if value.isdecimal()}


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
