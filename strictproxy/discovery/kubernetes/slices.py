"""
From EndpointSlices to pods. Pure: objects are passed in as the API server sends them.

After https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/
and the API reference of discovery.k8s.io/v1: a Service has several slices, one
pod may be in more than one of them for a while, and a pod with two addresses
is in slices of both families. Topology hints are passed over: every pod is as
good as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any, NamedTuple

from strictproxy.config.model import Family
from strictproxy.interfaces import Endpoint
from strictproxy.scheduling import Address

#: A slice's own limit for its pods.
LIMIT_ANNOTATION = "strictproxy/limit"

Object = Mapping[str, Any]


class BadObject(ValueError):
    """The API server sent something that is no EndpointSlice."""


class _Entry(NamedTuple):
    """One endpoint of one slice."""

    #: the same for all addresses of one pod
    pod: str
    endpoint: Endpoint


class Slices:
    """
    The slices of one Service, as far as they are known.

    :param port: name or number of the pods' port; None if they have only one.
    """

    def __init__(self, port: str | int | None, family: Family) -> None:
        self._port = port
        self._family = family
        self._entries: dict[str, list[_Entry]] = {}
        self._versions: dict[str, str] = {}
        #: of the list that this began with
        self._floor = ""
        #: ports that pods have instead of the one that was asked for, by slice
        self._other_ports: dict[str, list[str]] = {}

    def replace(self, items: Iterable[Object], version: str) -> None:
        """
        Start over from a list.

        :param version: the list's `resourceVersion`.
        :raise BadObject: nothing has changed.
        """
        read = [(_name(item), _version(item), *self._read(item)) for item in items]
        self._floor = version
        self._entries = {name: entries for name, _, entries, _ in read}
        self._versions = {name: version for name, version, _, _ in read}
        self._other_ports = {name: ports for name, _, _, ports in read if ports}

    def apply(self, kind: str, item: Object) -> None:
        """
        Take an event: ADDED, MODIFIED or DELETED.

        One that tells less than is known, being late or said twice, is passed over.

        :raise BadObject: nothing has changed.
        """
        name, version = _name(item), _version(item)
        if not _is_newer(version, self._versions.get(name, self._floor)):
            return
        if kind == "DELETED":
            self._entries.pop(name, None)
            self._other_ports.pop(name, None)
        else:
            self._entries[name], ports = self._read(item)
            self._other_ports.pop(name, None)
            if ports:
                self._other_ports[name] = ports
        self._versions[name] = version

    def endpoints(self) -> frozenset[Endpoint]:
        """Return the pods: those that are ready, and those that are terminating."""
        chosen: dict[Address, Endpoint] = {}
        for entry in self._of_family():
            endpoint = entry.endpoint
            other = chosen.get(endpoint.address)
            # In two slices at once: it is as good as the better one says.
            if other is None or (other.terminating and not endpoint.terminating):
                chosen[endpoint.address] = endpoint
        return frozenset(chosen.values())

    def problem(self) -> str | None:
        """Return why there may be no pods although there are slices, or None."""
        if not self._other_ports or any(self._entries.values()):
            return None
        there = sorted({port for ports in self._other_ports.values() for port in ports})
        if self._port is None:
            return f"the pods have several ports, say which: {', '.join(there)}"
        return f"the pods have no port {self._port!r}; they have {', '.join(there)}"

    def _of_family(self) -> Iterator[_Entry]:
        everything = [entry for entries in self._entries.values() for entry in entries]
        is_v6 = {entry: ":" in entry.endpoint.address.host for entry in everything}
        if self._family is Family.BOTH:
            return iter(everything)
        if self._family is not Family.AUTO:
            wanted = self._family is Family.IPV6
            return (entry for entry in everything if is_v6[entry] is wanted)
        have_v4 = {entry.pod for entry in everything if not is_v6[entry]}
        return (entry for entry in everything if not is_v6[entry] or entry.pod not in have_v4)

    # -- reading

    def _read(self, item: Object) -> tuple[list[_Entry], list[str]]:
        """Return a slice's entries; or none, and the ports that there are."""
        try:
            ports = [port for port in item.get("ports") or () if port.get("protocol") != "UDP"]
            number, others = self._number(ports)
            if number is None:
                return [], others
            limit = _limit(item)
            entries = [
                entry
                for each in item.get("endpoints") or ()
                if (entry := _entry(each, number, limit)) is not None
            ]
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise BadObject(f"not an EndpointSlice: {error!r}") from None
        return entries, []

    def _number(self, ports: list[Object]) -> tuple[int | None, list[str]]:
        wanted = self._port
        if wanted is None and len(ports) == 1:
            return int(ports[0]["port"]), []
        for port in ports:
            if wanted is not None and wanted in (port.get("name"), port["port"]):
                return int(port["port"]), []
        return None, [str(port.get("name") or port["port"]) for port in ports]


def _entry(item: Object, port: int, limit: int | None) -> _Entry | None:
    """Return what one endpoint says; None for one that is not ready, and does not end either."""
    conditions = item.get("conditions") or {}
    # What is not said is taken for the best (API reference, EndpointConditions).
    terminating = conditions.get("terminating") is True
    if not terminating and conditions.get("ready") is False:
        return None
    # Only the first address means anything (API reference, Endpoint).
    host = str(ip_address(item["addresses"][0]))
    pod = (item.get("targetRef") or {}).get("uid") or host
    return _Entry(pod, Endpoint(Address(host, port), terminating, limit))


def _limit(item: Object) -> int | None:
    written = (item["metadata"].get("annotations") or {}).get(LIMIT_ANNOTATION, "")
    return int(written) if written.isdecimal() and int(written) > 0 else None


def _name(item: Object) -> str:
    try:
        return str(item["metadata"]["name"])
    except (KeyError, TypeError) as error:
        raise BadObject(f"an object without a name: {error!r}") from None


def _version(item: Object) -> str:
    return str(item["metadata"].get("resourceVersion", ""))


def _is_newer(version: str, known: str) -> bool:
    """
    Whether one `resourceVersion` is later than another.

    They are decimal numbers that grow (KEP-5504); where they are not, nobody
    can tell and the event is taken.
    """
    if not (version.isdecimal() and known.isdecimal()):
        return True
    return int(version) > int(known)
