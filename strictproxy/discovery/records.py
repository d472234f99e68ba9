"""
What the records of an answer mean. Pure: messages are passed in.

An answer is believed only as far as it is about the question: records of other
names are passed over, aliases (CNAME) are followed within the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address

from twisted.names import dns

from strictproxy.interfaces import Endpoint
from strictproxy.scheduling import Address


class Outcome(Enum):
    """What became of a lookup."""

    #: there are addresses
    FOUND = "found"
    #: the name exists and has none
    EMPTY = "empty"
    #: no such name: for a headless Service, how "no pod is ready" may look
    NXDOMAIN = "nxdomain"
    #: from here on, nothing is known: the server failed,
    SERVFAIL = "servfail"
    #: does not want to answer,
    REFUSED = "refused"
    #: did not answer,
    TIMEOUT = "timeout"
    #: could say only a part, and TCP did not bring the rest,
    TRUNCATED = "truncated"
    #: or something else went wrong
    ERROR = "error"


class LookupFailed(Exception):
    """Nothing is known: every server failed to answer. `outcome` says how the last one did."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer that may be believed: NXDOMAIN, or records, perhaps none."""

    exists: bool
    answers: Sequence[dns.RRHeader] = ()
    additional: Sequence[dns.RRHeader] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """What one SRV record says (RFC 2782)."""

    host: str
    port: int
    priority: int
    weight: int


def addresses_of(name: str, records: Iterable[dns.RRHeader]) -> list[str]:
    """Return the IP addresses of `name`, or of what it is an alias for; each once."""
    records = list(records)
    names = aliases_of(name, records)
    found: dict[str, None] = {}
    for record in records:
        payload: object = record.payload
        if _name(record.name) not in names:
            continue
        if isinstance(payload, dns.Record_A):
            found[str(IPv4Address(payload.address))] = None
        elif isinstance(payload, dns.Record_AAAA):
            found[str(IPv6Address(payload.address))] = None
    return list(found)


def targets_of(name: str, records: Iterable[dns.RRHeader]) -> list[Target]:
    """
    Return the SRV records of `name` that have the best priority.

    The others are for when these cannot be reached (RFC 2782), which is not
    how pods that share their work are published. A target of "." says that
    there is none.
    """
    records = list(records)
    names = aliases_of(name, records)
    found = []
    for record in records:
        payload: object = record.payload
        if isinstance(payload, dns.Record_SRV) and _name(record.name) in names:
            host = _name(payload.target)
            if host:
                found.append(Target(host, payload.port, payload.priority, payload.weight))
    best = min((target.priority for target in found), default=0)
    return [target for target in found if target.priority == best]


def aliases_of(name: str, records: Iterable[dns.RRHeader]) -> set[str]:
    """Return `name` and every name that it is an alias for, in lower case."""
    targets = {}
    for record in records:
        payload: object = record.payload
        if isinstance(payload, dns.Record_CNAME):
            targets[_name(record.name)] = _name(payload.name or dns.Name())
    names: set[str] = set()
    current: str | None = name.lower()
    # A chain that bites its tail ends where it began.
    while current is not None and current not in names:
        names.add(current)
        current = targets.get(current)
    return names


def endpoints_of(targets: Iterable[tuple[Target, Iterable[str]]]) -> frozenset[Endpoint]:
    """
    Return the pods that SRV targets and their addresses make.

    The heaviest have the whole limit, the others their share of it; a weight
    of 0 is the smallest there is. Servers give pods that are alike the same
    weight, whatever it is.
    """
    weights: dict[Address, int] = {}
    for target, hosts in targets:
        for host in hosts:
            address = Address(host, target.port)
            weights[address] = max(target.weight, weights.get(address, 0))
    heaviest = max(weights.values(), default=0) or 1
    if not any(weights.values()):
        return frozenset(map(Endpoint, weights))
    return frozenset(
        Endpoint(address, share=weight / heaviest) for address, weight in weights.items()
    )


def _name(name: dns.Name) -> str:
    return name.name.decode("ascii", "replace").lower().removesuffix(".")
