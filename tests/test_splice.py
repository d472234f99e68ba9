"""Large bodies moved by the kernel: every byte in its place, whatever is slow or dies."""

from __future__ import annotations

import hashlib
import os
import random

from twisted.internet.task import deferLater
from twisted.trial.unittest import SkipTest

from strictproxy.config.model import ClientConfig, PodConnections
from strictproxy.http import splice
from tests.harness import ProxyTestCase, Wire, reactor, request, response

SIZE = 8 * 2**20 + 12345


class SpliceTests(ProxyTestCase):
    def setUp(self) -> None:
        if not splice.SUPPORTED:
            raise SkipTest("os.splice is Linux's")
        super().setUp()
        self.body = random.Random(1).randbytes(SIZE)
        self.splices = 0
        original = splice.Splice

        def counting(*arguments: object) -> splice.Splice:
            self.splices += 1
            return original(*arguments)  # type: ignore[arg-type]

        self.patch(splice, "Splice", counting)

    async def download(self, client_slow: bool = False) -> tuple[Wire, Wire]:
        self.start(connections=PodConnections(idle_timeout=5.0))
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        if client_slow:
            client.transport.pauseProducing()
        pod.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        pod.send(self.body)
        return client, pod

    def assert_body(self, received: bytes) -> None:
        body = received.partition(b"\r\n\r\n")[2]
        self.assertEqual(len(body), SIZE)
        self.assertEqual(hashlib.sha256(body).digest(), hashlib.sha256(self.body).digest())

    async def test_download(self) -> None:
        """A large response arrives whole, is counted, and leaves both connections usable."""
        client, pod = await self.download()
        self.assert_body(await client.until(lambda: client.count > SIZE + 50 and self.done()))
        self.assertEqual(self.records[0].sent, SIZE)
        self.assertGreater(self.splices, 0)
        client.take()
        client.send(request("/next"))
        await pod.has(b"/next")
        pod.send(response(b"next"))
        await client.has(b"next")

    def done(self) -> bool:
        return bool(self.records)

    async def test_slow_client(self) -> None:
        """A client that reads in fits and starts gets every byte; the pod is not to blame."""
        client, _ = await self.download(client_slow=True)
        for _ in range(20):
            await deferLater(reactor, 0.005)
            self.clock.advance(2.0)
            self.upstream.pool.sweep()
            client.transport.resumeProducing()
            await deferLater(reactor, 0.001)
            client.transport.pauseProducing()
        client.transport.resumeProducing()
        self.assert_body(await client.until(lambda: client.count > SIZE + 50 and self.done()))
        self.assertGreater(self.splices, 0)

    async def test_upload(self) -> None:
        """A large request arrives whole at a pod that reads slowly."""
        self.start(client=ClientConfig(body_timeout=5.0))
        client = await self.client(request("/", f"Content-Length: {SIZE}", method="PUT"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.transport.pauseProducing()
        client.send(self.body)
        for _ in range(20):
            await deferLater(reactor, 0.005)
            self.clock.advance(2.0)
            pod.transport.resumeProducing()
            await deferLater(reactor, 0.001)
            pod.transport.pauseProducing()
        pod.transport.resumeProducing()
        self.assert_body(await pod.until(lambda: pod.count > SIZE + 50 and self.got(pod)))
        self.assertGreater(self.splices, 0)
        pod.send(response(b"thanks"))
        await client.has(b"thanks")
        pod.take()
        client.send(request("/next"))
        await pod.has(b"/next")

    def got(self, wire: Wire) -> bool:
        return len(wire.received.partition(b"\r\n\r\n")[2]) == SIZE

    async def test_someone_dies(self) -> None:
        """Whoever dies in the middle, the other side hears of it, and nothing is left open."""
        for who in ("client", "pod"):
            before = len(os.listdir("/proc/self/fd"))
            client, pod = await self.download(client_slow=True)
            await self.settled(lambda: self.splices > 0)
            dies, other = (client, pod) if who == "client" else (pod, client)
            client.transport.resumeProducing()
            await client.until(lambda client=client: client.count > 500_000)  # type: ignore[misc]
            dies.reset()
            await other.end()
            await self.settled(lambda: self.counts() == (0, 0))
            await self.shut_down()
            self.pods, self.ports, self.wires = [], [], []
            kept = 2 * len(splice._pipes)
            self.assertLessEqual(len(os.listdir("/proc/self/fd")), before + kept + 1)
            self.splices = 0

    async def test_pod_ends_early(self) -> None:
        """A body cut short by the pod is cut short for the client: no false end."""
        self.start()
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (SIZE + 1))
        pod.send(self.body)
        pod.close()
        await client.end()
        self.assertEqual(self.records[0].reason, "pod_disconnected")
