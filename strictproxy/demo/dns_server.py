"""An authoritative DNS server for one headless name, whose records can be changed at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, fail, maybeDeferred, succeed
from twisted.internet.error import CannotListenError
from twisted.names import dns
from twisted.names.common import ResolverBase
from twisted.names.error import DNSNameError
from twisted.names.server import DNSServerFactory

Sections = tuple[list[dns.RRHeader], list[dns.RRHeader], list[dns.RRHeader]]


class Zone(ResolverBase):
    """Names and their IPv4 addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, list[str]] = {}

    def _lookup(
        self,
        name: bytes | str,
        cls: int,
        type: int,  # noqa: A002  # ResolverBase calls it so
        timeout: Sequence[int] | None,
    ) -> Deferred[Sections]:
        text = name.decode() if isinstance(name, bytes) else name
        addresses = self.records.get(text.lower().removesuffix("."))
        if addresses is None:
            return fail(DNSNameError(dns.Message()))
        wanted = addresses if type in (dns.A, dns.ALL_RECORDS) else []
        answers = [
            dns.RRHeader(text, dns.A, dns.IN, 5, dns.Record_A(address, 5), auth=True)
            for address in wanted
        ]
        return succeed((answers, [], []))


class _Factory(DNSServerFactory):
    """Truncates what does not fit into 512 bytes of UDP, as Twisted's own server does not."""

    noisy = False

    def sendReply(self, protocol: Any, message: dns.Message, address: Any) -> None:
        """Send an answer; `address` is None over TCP."""
        message.maxSize = 0 if address is None else 512
        super().sendReply(protocol, message, address)


class DnsServer:
    """Serves a `Zone` over UDP and TCP on a free port of loopback."""

    def __init__(self, reactor: Any) -> None:
        self.zone = Zone()
        self.port = 0
        self._reactor = reactor
        self._ports: list[Any] = []

    def start(self) -> None:
        """Listen; `port` is known afterwards."""
        factory = _Factory(clients=[self.zone])
        for _ in range(20):
            tcp = self._reactor.listenTCP(0, factory, interface="127.0.0.1")
            number = tcp.getHost().port
            try:
                udp = self._reactor.listenUDP(
                    number, dns.DNSDatagramProtocol(factory), interface="127.0.0.1"
                )
            except CannotListenError:
                tcp.stopListening()
                continue
            self.port = number
            self._ports = [tcp, udp]
            return
        raise RuntimeError("no port is free for both UDP and TCP")

    def stop(self) -> Deferred[Any]:
        """Stop listening."""
        return DeferredList([maybeDeferred(port.stopListening) for port in self._ports])
