"""
The client vanishes at each step of an exchange, and the pod likewise.

An exchange is a script of steps. For each step, the exchange is played up to
it and then somebody goes, by a close or by a reset. The harness checks after
each that every count is zero, every connection closed and no timer left.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from strictproxy.config.model import Body, Match, OnDisconnect, RouteConfig
from strictproxy.http import splice
from tests.harness import ProxyTestCase, Wire, request

Step = Callable[["SweepTests"], Awaitable[None]]

BIG = 1024 * 1024
UPGRADE = ("Connection: Upgrade", "Upgrade: x")


def send(data: bytes) -> Step:
    async def step(test: SweepTests) -> None:
        test.client_wire.send(data)
        await test.turn()

    return step


def answer(data: bytes, expect: bytes = b"") -> Step:
    async def step(test: SweepTests) -> None:
        if test.pod_wire is None:
            test.pod_wire = await test.pods[0].connection()
        await test.pod_wire.has(expect or b"\r\n\r\n")
        test.pod_wire.send(data)
        await test.turn()

    return step


SCRIPTS: dict[str, list[Step]] = {
    "plain": [
        send(b"GET /a HT"),
        send(b"TP/1.1\r\nHost: a\r\n\r\n"),
        answer(b"HTTP/1.1 200"),
        answer(b" OK\r\nContent-Length: 4\r\n\r\n"),
        answer(b"ab"),
        answer(b"cd"),
    ],
    "upload": [
        send(b"PUT /a HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\n"),
        send(b"abc"),
        send(b"def"),
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ],
    "chunked": [
        send(request("/a", "Transfer-Encoding: chunked", method="PUT")),
        send(b"3\r\nab"),
        send(b"c\r\n0\r\n"),
        send(b"\r\n"),
        answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        answer(b"3\r\nab"),
        answer(b"c\r\n0\r\n"),
        answer(b"\r\n"),
    ],
    "spooled": [
        send(request("/s", "Content-Length: 6", method="PUT")),
        send(b"abc"),
        send(b"def"),
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"abcdef"),
        answer(b"ok"),
    ],
    "expecting": [
        send(request("/a", "Expect: 100-continue", "Content-Length: 3", method="PUT")),
        answer(b"HTTP/1.1 100 Continue\r\n\r\n"),
        send(b"abc"),
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"abc"),
    ],
    "early answer": [
        send(request("/a", "Content-Length: 9", method="PUT")),
        answer(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\n"),
        answer(b"no"),
    ],
    "upgraded": [
        send(request("/a", *UPGRADE)),
        answer(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"),
        send(b"ping"),
        answer(b"pong", b"ping"),
    ],
    "streamed": [
        send(request("/a")),
        answer(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"),
        answer(b"data: 1\n\n"),
        answer(b"data: 2\n\n"),
    ],
    "spliced": [
        send(request("/a", f"Content-Length: {BIG}", method="PUT")),
        send(b"x" * (BIG // 2)),
        send(b"x" * (BIG - BIG // 2)),
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BIG),
        answer(b"y" * (BIG // 2)),
        answer(b"y" * (BIG // 4)),
    ],
    "waiting": [
        send(request("/first") + request("/second")),
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"),
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n2", b"/second"),
    ],
}


class SweepTests(ProxyTestCase):
    client_wire: Wire
    pod_wire: Wire | None

    async def turn(self) -> None:
        from twisted.internet.task import deferLater

        from tests.harness import reactor

        for _ in range(4):
            await deferLater(reactor, 0)

    async def play(
        self, steps: list[Step], who: str, how: str, on_disconnect: OnDisconnect
    ) -> None:
        """Play some steps of an exchange, let somebody go, and check that nothing is left."""
        self.start(
            routes=[
                RouteConfig("s", Match(prefix="/s"), "u", body=Body.SPOOL),
                RouteConfig("r", Match(prefix="/"), "u", on_client_disconnect=on_disconnect),
            ]
        )
        self.client_wire = await self.client()
        self.pod_wire = None
        for step in steps:
            await step(self)
        wire = self.client_wire if who == "client" else self.pod_wire
        if wire is not None and not wire.closed:
            wire.close() if how == "close" else wire.reset()
        await self.turn()
        if who == "pod" and wire is not None and self.proxy.running:
            # The client hears of it: by an answer, or by the end of its connection.
            client = self.client_wire
            await client.until(
                lambda: client.closed or client.ended or b"HTTP/1.1" in client.received
            )
        if on_disconnect is OnDisconnect.FINISH and who == "client" and self.pod_wire is not None:
            # The pod is allowed to finish; here it ends by closing.
            self.pod_wire.close()
        await self.shut_down()
        self.pods, self.ports, self.wires = [], [], []


def _add(name: str, script: list[Step]) -> None:
    for who in ("client", "pod"):
        for how in ("close", "reset"):

            async def test(self: SweepTests, who: str = who, how: str = how) -> None:
                # The reactor opens some of its own when it is first used.
                await self.play([], who, how, OnDisconnect.CANCEL)
                open_before = len(os.listdir("/proc/self/fd"))
                for count in range(len(script) + 1):
                    for on_disconnect in OnDisconnect:
                        for keep in (False, True):
                            self.keep_writes(keep)
                            await self.play(script[:count], who, how, on_disconnect)
                del self.site
                # Pipes and the hang-up watch are kept for the next time.
                kept = 2 * len(splice._pipes) + 2
                await self.settled(
                    lambda: len(os.listdir("/proc/self/fd")) <= open_before + kept,
                    "no descriptor is left",
                )

            test.__doc__ = f"{name}: the {who} goes by {how} after each step"
            setattr(SweepTests, f"test_{name.replace(' ', '_')}_{who}_{how}", test)


for _name, _script in SCRIPTS.items():
    _add(_name, _script)
