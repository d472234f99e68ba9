"""
The ports that the proxy listens on: opened, swapped and closed without losing a connection.

What stands behind a port may change while it is open, so that a new
certificate, say, needs no new port.
"""

from __future__ import annotations

import ctypes
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import DeferredList, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocol
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.logger import Logger

from strictproxy.errors import ConfigError
from strictproxy.scheduling import Address

_log = Logger()

#: Seconds that connections on their way get before a port that others share is closed.
_HAND_OVER = 0.1
#: include/uapi/asm-generic/socket.h; Python has no name for it.
_SO_ATTACH_REUSEPORT_CBPF = 51


class Stand(Factory):
    """Stands behind a port, and passes connections on to what is `inner` now."""

    noisy = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def buildProtocol(self, addr: IAddress) -> IProtocol | None:  # type: ignore[override]
        """Take a connection."""
        protocol: IProtocol | None = self.inner.buildProtocol(addr)
        return protocol


@dataclass(slots=True)
class _Open:
    """One port, and what stands behind it."""

    port: Any
    stand: Stand


#: By its Twisted endpoint description, and whether others may listen there too.
_Key = tuple[str, bool]


class Listeners:
    """The ports of a process, by their endpoint descriptions."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._open: dict[_Key, list[_Open]] = {}

    async def change(self, wanted: list[tuple[str, Any]], *, shared: bool) -> None:
        """
        Have exactly these ports open: pairs of a description and a factory.

        Those that stay get their new factory; new ones are opened before old
        ones are closed.

        :param shared: other processes may listen on the same ports (SO_REUSEPORT).
        :raise ConfigError: one cannot be opened; then nothing has changed.
        """
        left = {key: list(ports) for key, ports in self._open.items()}
        kept: list[tuple[_Key, _Open, Any]] = []
        opened: list[tuple[_Key, _Open]] = []
        for description, factory in wanted:
            key = (description, shared)
            if left.get(key):
                kept.append((key, left[key].pop(0), factory))
                continue
            stand = Stand(factory)
            reactor = _SharingReactor(self._reactor) if shared else self._reactor
            try:
                port = await serverFromString(reactor, description).listen(stand)
            except Exception as error:
                await _close([each.port for _, each in opened])
                raise ConfigError(f"cannot listen on {description}: {error}") from error
            opened.append((key, _Open(port, stand)))
        for _, each, factory in kept:
            each.stand.inner = factory
        for _, each in opened:
            _log.info("listening on {address}", address=_readable(each.port.getHost()))
        now: dict[_Key, list[_Open]] = {}
        by_key = [(key, each) for key, each, _ in kept] + opened
        for key, each in by_key:
            now.setdefault(key, []).append(each)
        self._open = now
        gone = [(key, each.port) for key, ports in left.items() for each in ports]
        for _, port in gone:
            _log.info("no longer listening on {address}", address=_readable(port.getHost()))
        await self._close_gently(gone)

    async def close(self) -> None:
        """Close every port; connections that have been made are accepted first."""
        everything = [(key, each.port) for key, ports in self._open.items() for each in ports]
        self._open = {}
        await self._close_gently(everything)

    def hosts(self, descriptions: list[str]) -> list[tuple[str, int]]:
        """Return where ports are, by their descriptions; for tests and the demo."""
        seen: dict[str, int] = {}
        found = []
        for description in descriptions:
            ports = [
                each.port
                for key, all_ in self._open.items()
                if key[0] == description
                for each in all_
            ]
            host: Any = ports[seen.get(description, 0)].getHost()
            seen[description] = seen.get(description, 0) + 1
            found.append((host.host, host.port))
        return found

    async def _close_gently(self, ports: list[tuple[_Key, Any]]) -> None:
        shared = [port for (_, is_shared), port in ports if is_shared]
        if shared:
            for port in shared:
                _turn_away(port)
            await deferLater(self._reactor, _HAND_OVER)
        for _, port in ports:
            with suppress(Exception):
                port.doRead()  # whoever has connected already
        await _close([port for _, port in ports])


async def _close(ports: list[IListeningPort]) -> None:
    await DeferredList([maybeDeferred(port.stopListening) for port in ports])


class _SharingReactor:
    """A reactor whose TCP ports may be listened on by several processes (SO_REUSEPORT)."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def listenTCP(
        self, port: int, factory: Any, backlog: int = 50, interface: str = ""
    ) -> IListeningPort:
        """Listen; see `IReactorTCP.listenTCP`."""
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        with socket.socket(family) as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            opened.bind((interface, port))
            opened.listen(backlog)
            opened.setblocking(False)
            # It keeps a copy of its own.
            adopted: IListeningPort = self._reactor.adoptStreamPort(
                opened.fileno(), family, factory
            )
            return adopted


def _turn_away(port: Any) -> None:
    """
    Let new connections go to the process that listens on the same port since.

    Closing a shared port drops whoever has connected and has not been accepted,
    so before that the kernel is told to give the port's second listener, the
    newer one, everything (socket(7), SO_ATTACH_REUSEPORT_CBPF). If there is
    none, what it is told has no effect.
    """
    # One instruction: return 1.
    code = ctypes.create_string_buffer(b"\x06\0\0\0\x01\0\0\0", 8)
    program = b"\x01\0" + b"\0" * 6 + ctypes.addressof(code).to_bytes(8, "little")
    with suppress(OSError, AttributeError):
        port.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)


def _readable(host: Any) -> str:
    return str(Address(host.host, host.port)) if hasattr(host, "port") else str(host)
