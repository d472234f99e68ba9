"""
One question to one name server: over UDP, and over TCP where that was not enough.

Questions leave from a random port that takes datagrams from the server alone and
is left for another after some time (RFC 5452), and say by EDNS (RFC 6891) that an
answer may be longer than 512 bytes: 75 pods instead of 28 without the way over
TCP.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.protocol import Factory
from twisted.names import dns
from twisted.names.error import DNSQueryTimeoutError
from twisted.python.failure import Failure

from strictproxy.discovery.records import LookupFailed, Outcome, Reply
from strictproxy.discovery.resolv_conf import Server

#: What passes every network without being cut into fragments (DNS flag day 2020).
_UDP_SIZE = 1232
#: Questions that leave from one port; a new one for each costs more than the answers do.
_PER_PORT = 100

_REFUSALS = {
    dns.ESERVER: (Outcome.SERVFAIL, "the server failed"),
    dns.EREFUSED: (Outcome.REFUSED, "refused"),
    dns.EFORMAT: (Outcome.ERROR, "the server does not understand the question"),
    dns.ENOTIMP: (Outcome.ERROR, "the server does not know this kind of question"),
}


class NameServers:
    """
    Asks name servers. Remembers which of them do not know EDNS. `stop` closes its ports.

    :param reactor: provides time, UDP and TCP.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._without_edns: set[Server] = set()
        self._ports: dict[tuple[Server, bool], _Datagrams] = {}

    def stop(self) -> None:
        """Close every port; questions that are open stay without an answer."""
        ports, self._ports = list(self._ports.values()), {}
        for port in ports:
            port.close()

    async def ask(
        self, server: Server, name: str, kind: int, timeout: float, *, edns: bool = True
    ) -> Reply:
        """
        Ask one server one question.

        :param name: absolute, without the dot at its end.
        :param kind: a record type of `twisted.names.dns`.
        :param timeout: seconds, for UDP and again for TCP.
        :raise LookupFailed: it does not answer, or has no answer.
        """
        query = dns.Query(name, kind, dns.IN)
        edns = edns and server not in self._without_edns
        message = await self._over_udp(server, query, timeout, edns)
        if edns and message.rCode in (dns.EFORMAT, dns.ENOTIMP):
            self._without_edns.add(server)
            message = await self._over_udp(server, query, timeout, False)
        if message.trunc:
            message = await self._over_tcp(server, query, timeout)
        return _reply(server, query, message)

    async def _over_udp(
        self, server: Server, query: dns.Query, timeout: float, edns: bool
    ) -> dns.Message:
        key = (server, edns)
        port = self._ports.get(key)
        if port is not None and port.asked >= _PER_PORT:
            self._leave(key)
            port = None
        if port is None:
            port = self._ports[key] = _Datagrams(server, edns, self._reactor)
        port.asked += 1
        asked: Deferred[dns.Message] | None = None
        try:
            asked = port.query(server, [query], timeout)
            return await asked
        except DNSQueryTimeoutError:
            # Another port may take another way.
            self._leave(key)
            raise LookupFailed(Outcome.TIMEOUT, f"{_shown(server)}: no answer") from None
        except error.ConnectionRefusedError:
            raise LookupFailed(Outcome.ERROR, f"{_shown(server)}: nobody listens") from None
        except OSError as problem:
            raise LookupFailed(Outcome.ERROR, f"{_shown(server)}: {problem}") from None
        finally:
            port.forget(asked)
            if self._ports.get(key) is not port:
                port.close_if_idle()

    def _leave(self, key: tuple[Server, bool]) -> None:
        port = self._ports.pop(key, None)
        if port is not None:
            port.close_if_idle()

    async def _over_tcp(self, server: Server, query: dns.Query, timeout: float) -> dns.Message:
        kind = TCP6ClientEndpoint if _is_v6(server) else TCP4ClientEndpoint
        protocol: _Stream | None = None
        try:
            factory = Factory.forProtocol(lambda: _Stream(_Controller(), self._reactor))
            factory.noisy = False
            protocol = await kind(self._reactor, *server, timeout).connect(factory)  # type: ignore[assignment]
            assert protocol is not None
            message: dns.Message = await protocol.query([query], timeout)
        except Exception as problem:
            reason = str(problem) or type(problem).__name__
            raise LookupFailed(
                Outcome.TRUNCATED,
                f"{_shown(server)}: truncated, and not to be had over TCP: {reason}",
            ) from None
        finally:
            if protocol is not None:
                protocol.close()
        if message.trunc:
            raise LookupFailed(Outcome.TRUNCATED, f"{_shown(server)}: truncated, even over TCP")
        return message


def _reply(server: Server, query: dns.Query, message: dns.Message) -> Reply:
    asked = [(q.name.name.lower(), q.type) for q in message.queries]
    if not message.answer or asked not in ([], [(query.name.name.lower(), query.type)]):
        raise LookupFailed(Outcome.ERROR, f"{_shown(server)}: answered something else")
    if message.rCode == dns.OK:
        return Reply(True, message.answers, message.additional)
    if message.rCode == dns.ENAME:
        return Reply(False)
    outcome, reason = _REFUSALS.get(
        message.rCode, (Outcome.ERROR, f"response code {message.rCode}")
    )
    raise LookupFailed(outcome, f"{_shown(server)}: {reason}")


class _Controller:
    """What `twisted.names` tells of connections, and of messages that nobody waits for."""

    def connectionMade(self, protocol: object) -> None:
        pass

    def connectionLost(self, protocol: object) -> None:
        pass

    def messageReceived(self, *arguments: object) -> None:
        pass


def _give_up(
    protocol: dns.DNSDatagramProtocol | dns.DNSProtocol, problem: Exception | None
) -> None:
    """End what still waits for an answer."""
    live: dict[int, tuple[Deferred[dns.Message], Any]] = protocol.liveMessages or {}
    ended = list(live.values())
    # Those who are told may close the protocol.
    live.clear()
    for waiting, timer in ended:
        timer.cancel()
        if problem is not None:
            waiting.errback(Failure(problem))


class _Datagrams(dns.DNSDatagramProtocol):
    """A UDP port for questions to one server. It opens by itself, whenever there is a question."""

    noisy = False

    def __init__(self, server: Server, edns: bool, reactor: Any) -> None:
        super().__init__(_Controller(), reactor)
        #: how many questions have left from here
        self.asked = 0
        self._server = server
        self._edns = edns

    def startListening(self) -> None:
        """Open the port."""
        interface = "::" if _is_v6(self._server) else ""
        self._reactor.listenUDP(0, self, interface=interface, maxPacketSize=65_535)
        self.transport.connect(*self._server)

    def writeMessage(self, message: dns.Message, address: Server) -> None:
        """Send the question."""
        if self._edns:
            message.additional.append(dns.RRHeader(b"", dns.OPT, _UDP_SIZE))
        super().writeMessage(message, address)

    def connectionRefused(self) -> None:
        """Fail at once: nobody listens there."""
        _give_up(self, error.ConnectionRefusedError())

    def stopProtocol(self) -> None:
        """Fail at once, if it was not us: epoll reports a refusal as the end of the port."""
        _give_up(self, error.ConnectionRefusedError())
        super().stopProtocol()

    def forget(self, asked: Deferred[dns.Message] | None) -> None:
        """Wait no longer for the answer to a question."""
        live: dict[int, tuple[Deferred[dns.Message], Any]] = self.liveMessages or {}
        for number, (waiting, timer) in list(live.items()):
            if waiting is asked:
                timer.cancel()
                del live[number]

    def close_if_idle(self) -> None:
        """Close the port, unless there are questions that wait for their answers."""
        if not self.liveMessages:
            self.close()

    def close(self) -> None:
        """Close the port."""
        transport: Any = self.transport
        if transport is not None:
            _give_up(self, None)
            transport.stopListening()


class _Stream(dns.DNSProtocol):
    """A TCP connection for one question."""

    def connectionLost(self, reason: Any = None) -> None:
        """Fail at once."""
        _give_up(self, error.ConnectionLost())

    def close(self) -> None:
        """Close the connection."""
        _give_up(self, None)
        transport: Any = self.transport
        transport.abortConnection()


def _is_v6(server: Server) -> bool:
    return ip_address(server[0]).version == 6


def _shown(server: Server) -> str:
    host, port = server
    shown = f"[{host}]" if ":" in host else host
    return shown if port == 53 else f"{shown}:{port}"
