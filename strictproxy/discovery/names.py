"""
From a name to pods: which names it may stand for, which servers to ask, which records count.

One call of `Names.lookup` is one look; what to make of several is
`strictproxy.discovery.dns`'s business.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from twisted.internet.defer import Deferred, DeferredSemaphore, FirstError, gatherResults
from twisted.logger import Logger
from twisted.names import dns
from twisted.names.hosts import searchFileForAll
from twisted.python.filepath import FilePath

from strictproxy.config.model import DnsSource, Family
from strictproxy.discovery.records import (
    LookupFailed,
    Outcome,
    Reply,
    Target,
    addresses_of,
    endpoints_of,
    targets_of,
)
from strictproxy.discovery.resolv_conf import ResolvConf, Server, parse
from strictproxy.interfaces import Endpoint
from strictproxy.scheduling import Address

_log = Logger()

#: Targets of SRV records that are looked up at the same time.
_AT_ONCE = 20


class Asker(Protocol):
    """Puts one question to one server; see `NameServers.ask`."""

    async def ask(
        self, server: Server, name: str, kind: int, timeout: float, *, edns: bool = True
    ) -> Reply:
        """Ask."""


class ResolvConfFile:
    """
    The resolv.conf of this machine, read again before each look, as it may change.

    If it cannot be read, what it said last stays.
    """

    def __init__(self, path: str | Path = "/etc/resolv.conf") -> None:
        self._path = Path(path)
        self._text: str | None = None
        self._conf = parse("")

    def __call__(self) -> ResolvConf:
        """Return what it says now."""
        try:
            text = self._path.read_text("utf-8", "replace")
        except OSError as error:
            text = self._text or ""
            if self._text is None:
                _log.warn("{path}: {reason}", path=self._path, reason=error.strerror)
        if text != self._text:
            before, self._text, self._conf = self._text, text, parse(text)
            if before is not None:
                _log.info("{path} has changed", path=self._path)
        return self._conf


class Names:
    """
    Looks up the pods of one upstream.

    :param conf: gives what resolv.conf says; not asked if the configuration
        names servers, whose names are absolute.
    :param hosts: a hosts file, for those who want it.
    """

    def __init__(
        self,
        config: DnsSource,
        asker: Asker,
        conf: ResolvConfFile,
        hosts: str = "/etc/hosts",
    ) -> None:
        self._config = config
        self._asker = asker
        self._read_conf = conf
        self._hosts = FilePath(hosts)
        self._conf = ResolvConf(config.servers)
        #: the server that answered last
        self._preferred: Server | None = None
        #: the names that may count: from the first to the one that had pods
        self._candidates: list[str] = [config.name.removesuffix(".")]

    async def lookup(self) -> tuple[Outcome, Collection[Endpoint]]:
        """
        Look once.

        :return: FOUND with pods, or EMPTY or NXDOMAIN without.
        :raise LookupFailed: nothing is known.
        """
        config = self._config
        if not config.servers and (conf := self._read_conf()) != self._conf:
            self._conf = conf
            self._candidates = conf.candidates(config.name)
        if config.hosts and (hosts := self._in_hosts_file()):
            return Outcome.FOUND, self._with_port(hosts)
        for position, name in enumerate(self._candidates):
            found = await self._pods(name)
            if found:
                # What stands behind a later name is another service. It must not
                # take over while this one has no pod.
                del self._candidates[position + 1 :]
                return Outcome.FOUND, found
            if found is not None:
                return Outcome.EMPTY, ()
        return Outcome.NXDOMAIN, ()

    # -- one name

    async def _pods(self, name: str) -> Collection[Endpoint] | None:
        """Return the pods of an absolute name, or None if it does not exist."""
        if self._config.port is not None:
            hosts = await self._addresses(name)
            return None if hosts is None else self._with_port(hosts)
        reply = await self._ask(name, dns.SRV)
        if not reply.exists:
            return None
        targets = targets_of(name, reply.answers)
        limit = DeferredSemaphore(_AT_ONCE)
        lookups = [limit.run(self._start_target, target, reply) for target in targets]
        both: Deferred[list[Collection[str]]] = gatherResults(lookups, consumeErrors=True)
        try:
            return endpoints_of(zip(targets, await both, strict=True))
        except FirstError as error:
            error.subFailure.raiseException()

    def _start_target(self, target: Target, reply: Reply) -> Deferred[Collection[str]]:
        return Deferred.fromCoroutine(self._target(target, reply))

    async def _target(self, target: Target, reply: Reply) -> Collection[str]:
        # Servers add the addresses as far as there is room.
        known = addresses_of(target.host, reply.additional)
        if not known:
            return await self._addresses(target.host) or ()
        v6 = [host for host in known if ":" in host]
        v4 = [host for host in known if ":" not in host]
        families = {Family.IPV4: v4, Family.IPV6: v6, Family.BOTH: known}
        return families.get(self._config.family, v4 or v6)

    async def _addresses(self, name: str) -> Collection[str] | None:
        """Return the addresses of an absolute name, or None if it does not exist."""
        family = self._config.family
        kinds = {Family.IPV4: (dns.A,), Family.IPV6: (dns.AAAA,)}.get(family, (dns.A, dns.AAAA))
        found: list[str] = []
        for kind in kinds:
            reply = await self._ask(name, kind)
            if not reply.exists:
                return None
            found += addresses_of(name, reply.answers)
            if found and family is Family.AUTO:
                break
        return found

    # -- servers

    async def _ask(self, name: str, kind: int) -> Reply:
        """Ask one server after the other, beginning with the one that answered last."""
        servers = sorted(self._conf.servers, key=lambda server: server != self._preferred)
        failed = LookupFailed(Outcome.ERROR, "there is no name server")
        for turn, timeout in enumerate(self._conf.timeouts):
            for server in servers:
                try:
                    # Some things on the way drop what has EDNS.
                    reply = await self._asker.ask(server, name, kind, timeout, edns=turn == 0)
                except LookupFailed as error:
                    failed = error
                else:
                    self._preferred = server
                    return reply
        raise failed

    # -- the rest

    def _in_hosts_file(self) -> list[str]:
        if not self._hosts.exists():
            return []
        name = self._config.name.removesuffix(".").encode()
        return [str(host) for host in searchFileForAll(self._hosts, name)]

    def _with_port(self, hosts: Collection[str]) -> Collection[Endpoint]:
        port = self._config.port
        assert port is not None  # it is part of what SRV records say
        return frozenset(Endpoint(Address(host, port)) for host in hosts)
