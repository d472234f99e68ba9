"""
Who the client is: the peer of its connection, and what trusted proxies tell of it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from strictproxy.http.heads import RequestHead

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a client's connection."""

    #: IP address
    address: str
    #: a proxy whose word about the client is taken
    trusted: bool = False
    #: the connection is TLS
    secure: bool = False


def trusts(networks: Iterable[Network]) -> Callable[[str], bool]:
    """Return a predicate: whether an address is in one of `networks`."""
    listed = tuple(networks)

    def is_trusted(address: str) -> bool:
        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in listed)

    return is_trusted


def client_address(head: RequestHead, peer: Peer, is_trusted: Callable[[str], bool]) -> str:
    """
    Return the client's address: behind trusted proxies, the nearest that is none.

    X-Forwarded-For is read from the right, because everything left of an
    address that is not trusted may have been made up by it.
    """
    if not peer.trusted:
        return peer.address
    values = [value for name, _, value in head.fields if name == b"x-forwarded-for"]
    if not values:
        return peer.address
    told = b",".join(values)
    nearest = peer.address
    for hop in reversed(told.decode("latin-1").split(",")):
        address = hop.strip()
        try:
            ip_address(address)
        except ValueError:
            break
        nearest = address
        if not is_trusted(address):
            break
    return nearest
