"""Bodies that are received whole before their request asks for a slot."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from pathlib import Path

from twisted.internet.task import deferLater

from strictproxy.config.model import Body, ClientConfig, Match, RouteConfig
from tests.harness import ProxyTestCase, reactor, request, response

BODY = random.Random(2).randbytes(5 * 2**20 + 77)
ROUTES = [
    RouteConfig("spooled", Match(prefix="/s"), "u", body=Body.SPOOL),
    RouteConfig("rest", Match(prefix="/"), "u"),
]


class SpoolTests(ProxyTestCase):
    async def test_slow_uploader_holds_no_slot(self) -> None:
        """The slot is asked for when the last byte is there; others go first meanwhile."""
        self.start(routes=ROUTES)
        slow = await self.client(request("/s", "Content-Length: 6", method="PUT"))
        slow.send(b"abc")
        quick = await self.client(request("/quick"))
        pod = await self.pods[0].connection()
        await pod.has(b"/quick")
        self.assertEqual(self.counts(), (1, 0))
        pod.take()
        pod.send(response(b"quick"))
        await quick.has(b"quick")
        slow.send(b"def")
        sent = await pod.has(b"abcdef")
        self.assertIn(b"Content-Length: 6\r\n", sent)
        pod.send(response(b"slow"))
        await slow.has(b"slow")

    async def test_large(self) -> None:
        """What does not fit into memory goes through a file, whole, past a slow pod; then on."""
        self.start(routes=ROUTES)
        for framing in ("length", "chunked"):
            line = (
                f"Content-Length: {len(BODY)}"
                if framing == "length"
                else "Transfer-Encoding: chunked"
            )
            client = await self.client(request("/s", line, method="PUT"))
            if framing == "length":
                client.send(BODY)
            else:
                for start in range(0, len(BODY), 100_000):
                    piece = BODY[start : start + 100_000]
                    client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
                client.send(b"0\r\nX-Sum: 1\r\n\r\n")
            pod = await self.pods[0].connection()
            await pod.has(b"\r\n\r\n")
            pod.transport.pauseProducing()
            await deferLater(reactor, 0.02)
            pod.transport.resumeProducing()
            if framing == "length":
                received = await pod.size(len(BODY) + 200)
                body = received.partition(b"\r\n\r\n")[2]
                self.assertEqual(len(body), len(BODY))
            else:
                received = await pod.has(b"0\r\nX-Sum: 1\r\n\r\n")
                body = unchunk(received.partition(b"\r\n\r\n")[2])
            self.assertEqual(hashlib.sha256(body).digest(), hashlib.sha256(BODY).digest())
            pod.take()
            pod.count = 0
            pod.send(response(b"thanks"))
            await client.has(b"thanks")
        self.assertEqual(len(self.pods[0].connections), 1)

    async def test_sent_again(self) -> None:
        """A spooled body can be sent again whole, from memory and from the file."""
        for size in (1000, len(BODY)):
            put = frozenset({"PUT"})
            route = RouteConfig("s", Match(prefix="/"), "u", body=Body.SPOOL, retry=put)
            self.start(pods=2, routes=[route])
            client = await self.client(request("/", method="PUT", body=BODY[:size]))
            first = await self.pods[0].connection()
            await first.size(size)
            first.reset()
            second = await self.pods[1].connection()
            received = await second.until(
                lambda second=second, size=size: second.count > size + 200
            )  # type: ignore[misc]
            self.assertEqual(received.partition(b"\r\n\r\n")[2], BODY[:size])
            second.send(response(b"fine"))
            await client.has(b"fine")
            await self.shut_down()
            self.pods, self.ports, self.wires = [], [], []

    async def test_expect_continue(self) -> None:
        """Here the proxy itself asks for the body, and the pod is not asked again."""
        self.start(routes=ROUTES)
        client = await self.client(
            request("/s", "Expect: 100-continue", "Content-Length: 3", method="PUT")
        )
        await client.has(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.assertEqual(self.pods[0].connections, [])
        client.send(b"abc")
        sent = await (await self.pods[0].connection()).has(b"abc")
        self.assertNotIn(b"Expect", sent)

    async def test_client_leaves(self) -> None:
        """A client that leaves while its body is received leaves nothing behind."""
        self.start(routes=ROUTES)
        client = await self.client(request("/s", f"Content-Length: {len(BODY)}", method="PUT"))
        client.send(BODY[: 3 * 2**20])
        await self.settled(lambda: len(self.proxy.running) == 1)
        await self.settled(lambda: bool(unnamed_files()), "the body is in a file")
        client.reset()
        await self.settled(lambda: not self.proxy.running)
        await self.settled(lambda: not unnamed_files())
        self.assertEqual(self.pods[0].connections, [])

    async def test_stopped_while_receiving(self) -> None:
        """An exchange that is ended from outside answers once."""
        self.start(routes=ROUTES)
        client = await self.client(request("/s", "Content-Length: 3", method="PUT"))
        await self.settled(lambda: len(self.proxy.running) == 1)
        from strictproxy.errors import ShuttingDown

        for exchange in list(self.proxy.running):
            exchange.abandon(ShuttingDown("stopping"))
        await client.has(b'"reason": "shutting_down"')
        self.assertEqual(len(self.records), 1)

    async def test_nowhere_to_put_it(self) -> None:
        """A disk that cannot be written to: 507 with its reason, and no slot was taken."""
        nowhere = str(Path(self.mktemp()).absolute() / "missing")
        self.start(routes=ROUTES, client=ClientConfig(spool_directory=nowhere))
        self.proxy._client = ClientConfig(spool_directory=nowhere)
        client = await self.client(request("/s", f"Content-Length: {len(BODY)}", method="PUT"))
        client.send(BODY)
        answer = await client.has(b'"reason": "spool_failed"')
        self.assertIn(b"HTTP/1.1 507 Insufficient Storage", answer)
        self.assertEqual(self.pods[0].connections, [])


def unnamed_files() -> list[str]:
    """Return the files that are open here and have no name."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in links if link.endswith("(deleted)")]


def unchunk(data: bytes) -> bytes:
    """Return the body of a chunked message."""
    from strictproxy.http.framing import ChunkedReader

    return ChunkedReader().feed(data)
