"""Upgrades: after a 101 the connection is a tunnel that holds its slot."""

from __future__ import annotations

from tests.harness import ProxyTestCase, Wire, request

WEBSOCKET = ("Connection: keep-alive, Upgrade", "Upgrade: websocket")
SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: x\r\n\r\n"
)


class UpgradeTests(ProxyTestCase):
    async def tunnel(self, early: bytes = b"") -> tuple[Wire, Wire]:
        """Return (client, pod) with an upgrade between them."""
        self.start()
        client = await self.client(request("/chat", *WEBSOCKET) + early)
        pod = await self.pods[0].connection()
        sent = await pod.has(b"\r\n\r\n")
        self.assertIn(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", sent)
        pod.take()
        pod.send(SWITCHING + b"hello")
        answer = await client.has(b"hello")
        self.assertTrue(answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n"))
        self.assertIn(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", answer)
        self.assertIn(b"Sec-WebSocket-Accept: x\r\n", answer)
        client.take()
        return client, pod

    async def test_carries_bytes(self) -> None:
        """Bytes pass both ways as they come, and the slot is held while they do."""
        client, pod = await self.tunnel()
        for number in range(3):
            client.send(b"ping %d" % number)
            await pod.has(b"ping %d" % number)
            pod.send(b"pong %d" % number)
            await client.has(b"pong %d" % number)
        self.assertEqual(self.counts(), (1, 0))
        # A quiet tunnel is no idle connection.
        self.clock.pump([60.0] * 60)
        self.upstream.pool.sweep()
        client.send(b"still here")
        await pod.has(b"still here")
        pod.close()
        await client.end()
        await self.settled(lambda: self.counts() == (0, 0))
        self.assertEqual(self.records[0].status, 101)

    async def test_bytes_sent_early(self) -> None:
        """What a client sends before it has the 101 reaches the pod after it."""
        _, pod = await self.tunnel(b"early")
        await pod.has(b"early")

    async def test_half_close(self) -> None:
        """Either side may end its half and still hear the other; the second half ends it all."""
        for first in ("client", "pod"):
            client, pod = await self.tunnel()
            ends, stays = (client, pod) if first == "client" else (pod, client)
            stays.keeps_half = True
            ends.half_close()
            await stays.until(lambda stays=stays: stays.ended)  # type: ignore[misc]
            self.assertEqual(self.counts(), (1, 0))
            stays.send(b"last words")
            await ends.has(b"last words")
            stays.half_close()
            await ends.end()
            await stays.end()
            self.assertEqual(self.counts(), (0, 0))
            await self.shut_down()
            self.pods, self.ports, self.wires = [], [], []

    async def test_either_dies(self) -> None:
        """When one side is reset, so is the other, and the slot is free."""
        for first in ("client", "pod"):
            client, pod = await self.tunnel()
            dies, other = (client, pod) if first == "client" else (pod, client)
            dies.reset()
            await other.end()
            await self.settled(lambda: self.counts() == (0, 0))
            await self.shut_down()
            self.pods, self.ports, self.wires = [], [], []

    async def test_backpressure(self) -> None:
        """A side that does not read makes the other wait."""
        client, pod = await self.tunnel()
        from tests.test_proxy import Pump

        size = 32 * 2**20
        client.transport.pauseProducing()
        client.counting = True
        sent = Pump(pod, size)
        await self.settled(lambda: sent.paused and sent.steady(), "the pod is held up")
        client.transport.resumeProducing()
        await client.until(lambda: client.count >= size)

    async def test_declined(self) -> None:
        """A pod that answers an upgrade with an ordinary response is just that."""
        self.start()
        client = await self.client(request("/chat", *WEBSOCKET))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
        await client.has(b"no")
        client.send(request("/next"))
        await pod.has(b"/next")

    async def test_unasked(self) -> None:
        """A 101 that nobody asked for is a bad answer."""
        self.start()
        client = await self.client(request("/"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(SWITCHING)
        await client.has(b'"reason": "bad_response"')
        await pod.end()
