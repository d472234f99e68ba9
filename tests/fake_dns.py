"""
Name servers that answer what a test tells them to, and a network to reach them by.

Real messages in real bytes, over UDP and TCP; only sockets and time are not real.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twisted.internet import error
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.names import dns
from twisted.python.failure import Failure

Record = dns.Record_A | dns.Record_AAAA | dns.Record_CNAME | dns.Record_SRV
Zone = Mapping[str, Sequence[Record]]


def addresses(text: str) -> list[Record]:
    """Return address records: `10.0.0.1 fd00::1`."""
    return [dns.Record_AAAA(a) if ":" in a else dns.Record_A(a) for a in text.split()]


class FakeServer:
    """
    One name server.

    `zone` maps names to records, or is a function of how many questions came before.
    """

    def __init__(self, zone: Zone | Callable[[int], Zone] | None = None) -> None:
        self.zone: Zone | Callable[[int], Zone] = zone or {}
        #: answers every question with this response code instead
        self.code: int | None = None
        #: answers nothing
        self.dead = False
        #: nobody listens there
        self.refuses = False
        #: answers what carries EDNS with this code, or None for not at all
        self.edns: int | bool | None = True
        #: what of TCP works: True, False (refused), or None (accepted, never answered)
        self.tcp: bool | None = True
        #: adds the addresses of SRV targets
        self.glue = True
        #: changes each answer before it leaves
        self.lies: Callable[[dns.Message], None] = lambda message: None
        self.latency = 0.0
        self.asked: list[tuple[str, int, str]] = []

    def reply(self, data: bytes, way: str) -> bytes | None:
        """Return the answer to a question, or None for none."""
        message = dns.Message()
        message.fromStr(data)
        query = message.queries[0]
        name = query.name.name.decode().lower()
        count = len(self.asked)
        self.asked.append((name, query.type, way))
        if self.dead:
            return None
        sizes = [r.cls for r in message.additional if r.type == dns.OPT]
        size = sizes[0] if sizes else 512
        message.additional = []
        message.answer = 1
        if sizes and self.edns is None:
            return None
        if sizes and self.edns is not True:
            message.rCode = self.edns
        elif self.code is not None:
            message.rCode = self.code
        else:
            self._fill(
                message, name, query.type, self.zone(count) if callable(self.zone) else self.zone
            )
        self.lies(message)
        message.maxSize = 0 if way == "tcp" else size
        return message.toStr()

    def _fill(self, message: dns.Message, name: str, kind: int, zone: Zone) -> None:
        while True:
            if name not in zone:
                message.rCode = 0 if message.answers and self.glue is None else dns.ENAME
                return
            found = [record for record in zone[name] if kind == record.TYPE]
            aliases = [record for record in zone[name] if isinstance(record, dns.Record_CNAME)]
            if found or not aliases:
                break
            message.answers.append(_header(name, aliases[0]))
            name = aliases[0].name.name.decode()
        message.answers += [_header(name, record) for record in found]
        if self.glue:
            for record in found:
                if isinstance(record, dns.Record_SRV):
                    target = record.target.name.decode()
                    glue = [r for r in zone.get(target, ()) if r.TYPE in (dns.A, dns.AAAA)]
                    message.additional += [_header(target, each) for each in glue]


def _header(name: str, record: Record) -> dns.RRHeader:
    return dns.RRHeader(name, record.TYPE, dns.IN, 5, record)


class Network(Clock):
    """A reactor: time, and ways to servers by their address and port."""

    def __init__(self, servers: Mapping[tuple[str, int], FakeServer]) -> None:
        super().__init__()
        self.servers = dict(servers)
        self.open: set[Any] = set()

    def listenUDP(
        self, port: int, protocol: Any, interface: str = "", maxPacketSize: int = 8192
    ) -> _Datagrams:
        transport = _Datagrams(self, protocol)
        self.open.add(transport)
        protocol.makeConnection(transport)
        return transport

    def connectTCP(
        self, host: str, port: int, factory: Any, timeout: float = 30, bindAddress: Any = None
    ) -> _Stream:
        stream = _Stream(self, self.servers.get((host, port)), factory)
        self.callLater(0, stream.connect)
        return stream


class _Datagrams:
    def __init__(self, network: Network, protocol: Any) -> None:
        self.network, self.protocol = network, protocol
        self.peer: tuple[str, int] | None = None

    def connect(self, host: str, port: int) -> None:
        self.peer = (host, port)

    def write(self, data: bytes, address: tuple[str, int]) -> None:
        assert address == self.peer
        server = self.network.servers.get(address)
        if server is None:
            return
        if server.refuses:
            self.network.callLater(0, self._refused)
            return
        reply = server.reply(data, "udp")
        if reply is not None:
            self.network.callLater(server.latency, self._deliver, reply, address)

    def _deliver(self, data: bytes, address: tuple[str, int]) -> None:
        if self in self.network.open:
            self.protocol.datagramReceived(data, address)

    def _refused(self) -> None:
        if self in self.network.open:
            self.protocol.connectionRefused()

    def stopListening(self) -> None:
        self.network.open.discard(self)
        self.protocol.doStop()


class _Stream:
    """Both the connector and the transport of a TCP connection."""

    disconnecting = False

    def __init__(self, network: Network, server: FakeServer | None, factory: Any) -> None:
        self.network, self.server, self.factory = network, server, factory
        self.protocol: Any = None
        self.received = b""

    def connect(self) -> None:
        if self.server is None or self.server.tcp is False:
            reason = Failure(error.ConnectionRefusedError())
            self.factory.clientConnectionFailed(self, reason)
            return
        self.network.open.add(self)
        self.protocol = self.factory.buildProtocol(IPv4Address("TCP", "127.0.0.1", 53))
        self.protocol.makeConnection(self)

    def stopConnecting(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        self.received += data
        if len(self.received) < 2:
            return
        (length,) = struct.unpack("!H", self.received[:2])
        assert self.server is not None
        if len(self.received) >= 2 + length and self.server.tcp:
            reply = self.server.reply(self.received[2:], "tcp")
            if reply is not None:
                data = struct.pack("!H", len(reply)) + reply
                self.network.callLater(self.server.latency, self._deliver, data)

    def _deliver(self, data: bytes) -> None:
        # In pieces, as TCP may bring them.
        for at in range(0, len(data), 1000):
            if self in self.network.open:
                self.protocol.dataReceived(data[at : at + 1000])

    def abortConnection(self) -> None:
        self.network.open.discard(self)
        self.protocol.connectionLost(Failure(error.ConnectionAborted()))

    loseConnection = abortConnection
