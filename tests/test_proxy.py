"""The story of one exchange, over real sockets, against pods that do what the test says."""

from __future__ import annotations

import json

from twisted.internet.defer import gatherResults

from strictproxy.config.model import (
    ClientConfig,
    Match,
    OnDisconnect,
    PodConnections,
    QueueConfig,
    RouteConfig,
)
from strictproxy.interfaces import Decision, RequestInfo
from strictproxy.scheduling import Address
from tests.harness import ProxyTestCase, Wire, request, response


class ForwardingTests(ProxyTestCase):
    async def test_request_and_response(self) -> None:
        """Method, path, query, headers and bodies pass; hop-by-hop headers do not."""
        self.start()
        client = await self.client(
            request(
                "/a%2Fb?x=%20&y",
                "X-One: 1",
                "x-one: 2",
                "Connection: close, X-Hop",
                "X-Hop: gone",
                "Keep-Alive: 5",
                "X-Forwarded-For: 192.0.2.1",
                "Via: 1.0 other",
                "X-Request-Id: abc",
                method="POST",
                body=b"hello",
            )
        )
        pod = await self.pods[0].connection()
        sent = await pod.has(b"hello")
        self.assertEqual(
            sent.decode().split("\r\n"),
            [
                "POST /a%2Fb?x=%20&y HTTP/1.1",
                "Host: example.com",
                "X-One: 1",
                "x-one: 2",
                "Content-Length: 5",
                "X-Forwarded-For: 192.0.2.1, 127.0.0.1",
                "X-Forwarded-Proto: http",
                "X-Forwarded-Host: example.com",
                "Via: 1.0 other, 1.1 strictproxy",
                "X-Request-Id: abc",
                "",
                "hello",
            ],
        )
        pod.send(
            response(
                b"world", "Set-Cookie: a=1", "Set-Cookie: b=2", "Connection: X-Gone", "X-Gone: 1"
            )
        )
        answer = await client.end()
        self.assertEqual(
            answer.decode().split("\r\n"),
            [
                "HTTP/1.1 200 OK",
                "Content-Length: 5",
                "Set-Cookie: a=1",
                "Set-Cookie: b=2",
                "Via: 1.1 strictproxy",
                "X-Request-Id: abc",
                "Connection: close",
                "",
                "world",
            ],
        )
        (record,) = self.records
        self.assertEqual(
            (record.route, record.pod, record.status, record.sent, record.in_flight, record.reason),
            ("all", self.pods[0].address, 200, 5, 1, None),
        )

    async def test_keeps_alive(self) -> None:
        """Both connections are used again."""
        self.start()
        client = await self.client()
        for number in range(3):
            client.send(request(f"/{number}"))
            pod = await self.pods[0].connection()
            await pod.has(b"GET /%d " % number)
            pod.send(response(b"answer %d" % number))
            await client.has(b"answer %d" % number)
        self.assertEqual(len(self.pods[0].connections), 1)
        self.assertEqual(self.upstream.pool.idle, 1)

    async def test_pipelining(self) -> None:
        """Pipelined requests are answered in order."""
        self.start(limit=5)
        client = await self.client(
            request("/a") + request("/b", method="POST", body=b"B") + request("/c")
        )
        pod = await self.pods[0].connection()
        for name, body in (("/a", b""), ("/b", b"B"), ("/c", b"")):
            await pod.has(name.encode() + b" HTTP/1.1")
            if body:
                await pod.has(b"\r\n\r\nB")
            pod.take()
            pod.send(response(name.encode()))
        answers = await client.has(b"/c")
        self.assertEqual(
            [part[-2:] for part in answers.split(b"HTTP/1.1 200 OK")[1:]], [b"/a", b"/b", b"/c"]
        )

    async def test_chunked_both_ways(self) -> None:
        """Bodies of unknown length stream both ways, with trailers; extensions are dropped."""
        self.start()
        client = await self.client(
            request("/", "Transfer-Encoding: chunked", "TE: trailers", method="PUT")
        )
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        client.send(b"3;ext=1\r\nabc\r\n")
        await pod.has(b"3\r\nabc\r\n")
        client.send(b"0\r\nX-Sum: 5\r\nContent-Length: 3\r\n\r\n")
        sent = await pod.has(b"0\r\nX-Sum: 5\r\n\r\n")
        self.assertIn(b"TE: trailers\r\nConnection: TE\r\n", sent)
        pod.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r\n")
        await client.has(b"2\r\nde\r\n")
        pod.send(b"0\r\nX-Sum: 7\r\n\r\n")
        await client.has(b"0\r\nX-Sum: 7\r\n\r\n")
        self.assertEqual(self.counts(), (0, 0))

    async def test_until_close(self) -> None:
        """A response that ends with the pod's connection becomes a chunked one."""
        self.start()
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(b"HTTP/1.0 200 OK\r\n\r\nabc")
        await client.has(b"3\r\nabc\r\n")
        pod.close()
        await client.has(b"0\r\n\r\n")

    async def test_http_1_0_client(self) -> None:
        """An HTTP/1.0 client gets no chunks and no interim responses; the end is the close."""
        self.start()
        client = await self.client(b"GET / HTTP/1.0\r\nX-Request-Id: a\r\n\r\n")
        pod = await self.pods[0].connection()
        sent = await pod.has(b"\r\n\r\n")
        self.assertIn(f"Host: {self.pods[0].address}".encode(), sent)
        pod.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        pod.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        answer = await client.end()
        self.assertEqual(
            answer,
            b"HTTP/1.1 200 OK\r\nVia: 1.1 strictproxy\r\nX-Request-Id: a\r\n"
            b"Connection: close\r\n\r\nabc",
        )

    async def test_http_1_0_keep_alive(self) -> None:
        """An HTTP/1.0 client may ask to keep the connection, where the length is known."""
        self.start()
        client = await self.client(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(response(b"abc"))
        answer = await client.has(b"abc")
        self.assertIn(b"Connection: keep-alive\r\n", answer)

    async def test_head(self) -> None:
        """The answer to HEAD has no body whatever its length says; the connection stays in step."""
        self.start()
        client = await self.client(request("/", "X-Request-Id: a", method="HEAD"))
        pod = await self.pods[0].connection()
        await pod.has(b"HEAD")
        pod.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        await client.has(b"Content-Length: 1000\r\nVia: 1.1 strictproxy\r\nX-Request-Id: a\r\n\r\n")
        client.send(request("/next"))
        await pod.has(b"/next")
        pod.send(response(b"next"))
        await client.has(b"next")

    async def test_no_content(self) -> None:
        """204 and 304 have no body and need no length."""
        self.start()
        client = await self.client()
        for status in (b"204 No Content", b"304 Not Modified"):
            client.send(request())
            pod = await self.pods[0].connection()
            await pod.has(b"\r\n\r\n")
            pod.take()
            pod.send(b"HTTP/1.1 %b\r\n\r\n" % status)
            answer = await client.has(status)
            self.assertNotIn(b"chunked", answer)

    async def test_expect_continue(self) -> None:
        """100-continue comes from the pod, and not before there is a slot."""
        self.start()
        busy = await self.client(request("/busy"))
        pod = await self.pods[0].connection()
        await pod.has(b"/busy")
        client = await self.client(
            request("/", "Expect: 100-continue", "Content-Length: 3", method="PUT")
        )
        await self.settled(lambda: self.counts() == (1, 1))
        # The client waits in line for as long as it takes, body or no body.
        self.clock.pump([30.0] * 10)
        self.assertEqual(client.received, b"")
        pod.send(response(b"done"))
        await busy.has(b"done")
        await pod.has(b"Expect: 100-continue")
        pod.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await client.has(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.send(b"abc")
        await pod.has(b"abc")
        pod.send(response(b"thanks"))
        await client.has(b"thanks")

    async def test_early_hints(self) -> None:
        """103 passes through, ahead of the response."""
        self.start()
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + response(b"x"))
        answer = await client.has(b"\r\n\r\nx")
        self.assertTrue(
            answer.startswith(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200")
        )

    async def test_streams(self) -> None:
        """Each piece of a streamed response reaches the client as it is produced."""
        self.start()
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(5):
            pod.send(b"data: %d\n\n" % number)
            await client.has(b"data: %d\n\n" % number)
        pod.close()

    async def test_prefix_replaced(self) -> None:
        """A route may replace the prefix; the query is left alone."""
        route = RouteConfig("r", Match(prefix="/api"), "u", replace_prefix="/")
        self.start(routes=[route])
        await self.client(request("/api/x?/api"))
        pod = await self.pods[0].connection()
        await pod.has(b"GET /x?/api HTTP/1.1\r\n")

    async def test_backpressure_from_client(self) -> None:
        """A client that does not read makes the pod wait; nothing piles up in the proxy."""
        self.start()
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        client.transport.pauseProducing()
        client.counting = True
        size = 64 * 2**20
        pod.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        sent = Pump(pod, size)
        await self.settled(lambda: sent.paused and sent.steady(), "the pod is held up")
        (channel,) = self.site.channels
        held = len(channel.transport.dataBuffer) + channel.transport._tempDataLen
        self.assertLess(held, 1024 * 1024)
        client.transport.resumeProducing()
        await client.until(lambda: client.count > size)

    async def test_backpressure_from_pod(self) -> None:
        """A pod that does not read makes the client wait."""
        self.start(client=ClientConfig(body_timeout=1))
        size = 64 * 2**20
        client = await self.client(request("/", f"Content-Length: {size}", method="PUT"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.transport.pauseProducing()
        pod.counting = True
        sent = Pump(client, size)
        await self.settled(lambda: sent.paused and sent.steady(), "the client is held up")
        # It is not the client's fault that nothing moves.
        self.clock.pump([1.0] * 5)
        pod.transport.resumeProducing()
        await pod.until(lambda: pod.count > size)
        pod.counting = False
        pod.send(response(b"ok"))
        await client.has(b"ok")


class Pump:
    """Sends zeros as fast as they are taken."""

    def __init__(self, wire: Wire, size: int) -> None:
        self._wire = wire
        self._left = size
        self.paused = False
        self._seen = -1
        self._steady = 0
        wire.transport.registerProducer(self, True)
        self.resumeProducing()

    def resumeProducing(self) -> None:
        self.paused = False
        while self._left and not self.paused:
            piece = min(self._left, 65536)
            self._left -= piece
            self._wire.send(b"\0" * piece)
        if not self._left:
            self._wire.transport.unregisterProducer()

    def pauseProducing(self) -> None:
        self.paused = True

    def stopProducing(self) -> None:
        self._left = 0

    def steady(self) -> bool:
        """Whether nothing has moved over many looks."""
        self._steady = self._steady + 1 if self._seen == self._left else 0
        self._seen = self._left
        return self._steady > 100


class SlotTests(ProxyTestCase):
    async def test_waits_for_a_slot(self) -> None:
        """A request that finds every pod full goes out in the turn in which a slot frees."""
        self.start(pods=2)
        first, second, third = [await self.client(request(f"/{n}")) for n in range(3)]
        pods = [await pod.connection() for pod in self.pods]
        await gatherResults([pod.has(b"\r\n\r\n") for pod in pods])
        await self.settled(lambda: self.counts() == (2, 1))
        self.clock.advance(7.0)
        pods[1].send(response(b"done"))
        await pods[1].has(b"GET /2 ")
        self.assertEqual(len(self.pods[1].connections), 1)
        pods[1].send(response(b"third"))
        await third.has(b"third")
        record = self.records[-1]
        self.assertEqual((record.waited, record.in_flight), (7.0, 1))
        self.assertFalse(first.received and second.received)

    async def test_full_queue(self) -> None:
        """Past the queue's size: 503 with a reason, a problem document and Retry-After."""
        self.start(queue=QueueConfig(size=0))
        await self.client(request("/a"))
        await (await self.pods[0].connection()).has(b"/a")
        client = await self.client(request("/b", "X-Request-Id: b-1"))
        answer = await client.has(b"}\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n"))
        for line in (
            b"Content-Type: application/problem+json",
            b"X-Strictproxy-Reason: queue_full",
            b"Retry-After: 1",
        ):
            self.assertIn(line, head)
        self.assertEqual(
            json.loads(body),
            {
                "type": "urn:strictproxy:problem:queue_full",
                "title": "Too many requests are waiting",
                "status": 503,
                "detail": "0 requests are waiting already",
                "reason": "queue_full",
                "instance": "urn:strictproxy:request:b-1",
            },
        )
        client.send(request("/c"))
        await client.until(lambda: client.received.count(b"}\n") == 2)

    async def test_queue_timeout(self) -> None:
        """Waited too long: 503 with its own reason, at the deadline and not before."""
        self.start(queue=QueueConfig(timeout=5.0))
        await self.client(request("/a"))
        await (await self.pods[0].connection()).has(b"/a")
        client = await self.client(request("/b"))
        await self.settled(lambda: self.counts() == (1, 1))
        self.clock.advance(4.9)
        self.assertEqual(self.counts(), (1, 1))
        self.clock.advance(0.2)
        self.assertEqual(self.counts(), (1, 0))
        await client.has(b'"reason": "queue_timeout"')

    async def test_no_pods(self) -> None:
        """Without pods a request waits for its own bound, and goes out if one appears."""
        self.start()
        self.upstream.scheduler.set_pods([], 0.0)
        self.upstream._set_timer()
        late = await self.client(request("/late"))
        await self.settled(lambda: self.counts() == (0, 1))
        self.clock.advance(20.0)
        early = await self.client(request("/early"))
        await self.settled(lambda: self.counts() == (0, 2))
        self.clock.advance(10.1)
        await late.has(b'"reason": "no_pods"')
        self.publish([self.pods[0].address])
        pod = await self.pods[0].connection()
        await pod.has(b"/early")
        pod.send(response(b"here"))
        await early.has(b"here")

    async def test_leaves_the_line(self) -> None:
        """A client that goes while it waits is out of the line at once."""
        self.start()
        await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        gone = await self.client(request("/gone"))
        await self.settled(lambda: self.counts() == (1, 1))
        stays = await self.client(request("/stays"))
        await self.settled(lambda: self.counts() == (1, 2))
        gone.close()
        await self.settled(lambda: self.counts() == (1, 1))
        pod.take()
        pod.send(response(b"a"))
        await pod.has(b"/stays")
        pod.send(response(b"stayed"))
        await stays.has(b"stayed")
        self.assertEqual([r.status for r in self.records], [499, 200, 200])
        self.assertEqual(self.records[0].reason, "client_gone")

    async def test_paused_uploader_leaves_the_line(self) -> None:
        """A client whose upload is held back while it waits is missed when it hangs up."""
        self.start()
        await self.client(request("/a"))
        await (await self.pods[0].connection()).has(b"/a")
        size = 4 * 2**20
        gone = await self.client(request("/up", f"Content-Length: {size}", method="PUT"))
        # What the kernel cannot deliver holds the FIN back too, so send no more than fits.
        gone.send(b"x" * (96 * 1024))
        await self.settled(lambda: any(c._paused for c in self.site.channels), "it is paused")
        gone.close()
        await self.settled(lambda: self.counts() == (1, 0))

    async def test_in_order_while_half_leave(self) -> None:
        """1,000 wait on a full upstream, 500 leave: exactly 500 are served, in order."""
        self.start(queue=QueueConfig(size=1000))
        await self.client(request("/first"))
        pod = await self.pods[0].connection()
        await pod.has(b"/first")
        clients = []
        for number in range(1000):
            clients.append(await self.client(request(f"/{number:04}")))
            expected = number + 1
            await self.settled(lambda expected=expected: self.counts() == (1, expected))  # type: ignore[misc]
        for number in range(0, 1000, 2):
            clients[number].reset()
        await self.settled(lambda: self.counts() == (1, 500))
        pod.take()
        served = []
        pod.send(response(b"first"))
        for _ in range(500):
            sent = await pod.has(b"\r\n\r\n")
            served.append(int(sent[5:9]))
            pod.take()
            pod.send(response(b"%04d" % served[-1]))
        self.assertEqual(served, list(range(1, 1000, 2)))
        for number in served:
            await clients[number].has(b"\r\n\r\n%04d" % number)
        await self.settled(lambda: self.counts() == (0, 0))
        answered = [client for client in clients if client.received]
        self.assertEqual(len(answered), 500)

    async def test_client_gone_cancels(self) -> None:
        """By default the pod's connection is closed when the client goes, and the slot is free."""
        self.start()
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        client.close()
        await pod.end()
        self.assertEqual(self.counts(), (0, 0))

    async def test_client_gone_finishes(self) -> None:
        """With `finish` the slot is held until the pod is done; nobody else gets it before."""
        route = RouteConfig("r", Match(prefix="/"), "u", on_client_disconnect=OnDisconnect.FINISH)
        self.start(routes=[route])
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        pod.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
        await client.has(b"abc")
        client.reset()
        await self.settled(lambda: not self.site.channels)
        waiting = await self.client(request("/b"))
        await self.settled(lambda: self.counts() == (1, 1))
        pod.take()
        pod.send(b"def")
        await pod.has(b"/b")
        pod.send(response(b"b"))
        await waiting.has(b"\r\n\r\nb")
        self.assertEqual((self.records[0].status, self.records[0].reason), (499, "client_gone"))


class PodFailureTests(ProxyTestCase):
    async def test_refused_goes_elsewhere(self) -> None:
        """A pod that refuses is tried no further; the slot and the body move to another."""
        self.start(pods=1)
        dead = await self.dead_address()
        self.publish([dead, self.pods[0].address])
        for _ in range(2):
            await self.client(request("/", method="POST", body=b"x" * 100))
        pod = await self.pods[0].connection()
        await pod.has(b"x" * 100)
        await self.settled(lambda: self.counts() == (1, 1))
        pod.take()
        pod.send(response(b"a"))
        await pod.has(b"x" * 100)
        pod.send(response(b"b"))
        await self.settled(lambda: self.counts() == (0, 0))
        self.assertEqual(sorted(r.tries for r in self.records), [1, 2])
        self.assertEqual({r.pod for r in self.records}, {self.pods[0].address})

    async def dead_address(self) -> Address:
        """Return an address where nobody listens."""
        from tests.harness import ScriptedPod

        pod = ScriptedPod()
        await pod.port.stopListening()
        return pod.address

    async def test_all_refuse(self) -> None:
        """When every pod refuses: 502, once, and no slot is lost."""
        self.start()
        self.publish([await self.dead_address(), await self.dead_address()])
        client = await self.client(request())
        answer = await client.has(b"}\n")
        self.assertIn(b"HTTP/1.1 502 Bad Gateway\r\n", answer)
        self.assertIn(b'"reason": "pods_exhausted"', answer)

    async def test_pod_dies(self) -> None:
        """A pod that closes before it answers: 502; it is not tried again."""
        self.start(pods=2)
        client = await self.client(request("/", method="POST", body=b"x"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\nx")
        pod.reset()
        await client.has(b'"reason": "pod_disconnected"')
        self.assertEqual(self.pods[1].connections, [])

    async def test_pod_dies_halfway(self) -> None:
        """A response cut off by the pod is cut off for the client: never a false end."""
        self.start()
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await client.has(b"abc")
        pod.close()
        answer = await client.end()
        self.assertFalse(answer.endswith(b"0\r\n\r\n"))

    async def test_stale_connection(self) -> None:
        """A kept-alive connection that the pod closes as it is used is no error, even for POST."""
        self.start()
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        pod.send(response(b"a"))
        await client.has(b"\r\n\r\na")
        client.send(request("/b", method="POST", body=b"body"))
        await pod.has(b"body")
        pod.reset()
        fresh = await self.pods[0].connection(1)
        await fresh.has(b"body")
        fresh.send(response(b"fine"))
        await client.has(b"fine")
        self.assertEqual(self.records[-1].tries, 2)

    async def test_early_death_is_no_stale_connection(self) -> None:
        """A pod that has read the request and dies at once had it: it is not sent again."""
        self.start(pods=2)
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        pod.send(response(b"a"))
        await client.has(b"\r\n\r\na")
        self.upstream.drain(self.pods[1].address)
        client.send(request("/b", method="POST", body=b"body"))
        await pod.has(b"body")
        self.upstream.undrain(self.pods[1].address)
        # What the kernel does for a process that is killed.
        pod.close()
        await client.has(b'"reason": "pod_disconnected"')
        self.assertEqual(self.records[-1].tries, 1)

    async def test_late_death_is_no_stale_connection(self) -> None:
        """A pod that dies a while into a job had it: the request is not sent again."""
        self.start()
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        pod.send(response(b"a"))
        await client.has(b"\r\n\r\na")
        client.send(request("/b"))
        await pod.has(b"/b")
        self.clock.advance(2.0)
        pod.reset()
        await client.has(b'"reason": "pod_disconnected"')

    async def test_closed_while_idle(self) -> None:
        """An idle connection that the pod has closed is not used."""
        self.start()
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        pod.send(response(b"a"))
        await client.has(b"\r\n\r\na")
        pod.close()
        client.send(request("/b"))
        fresh = await self.pods[0].connection(1)
        await fresh.has(b"/b")
        fresh.send(response(b"b"))
        await client.has(b"\r\n\r\nb")

    async def test_idle_connections_end(self) -> None:
        """Idle connections are closed before common servers close them."""
        self.start()
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        pod.send(response(b"a"))
        await client.has(b"\r\n\r\na")
        self.clock.advance(1.6)
        self.upstream.pool.sweep()
        await pod.end()
        self.assertEqual(self.upstream.pool.idle, 0)

    async def test_unasked_bytes(self) -> None:
        """Bytes on an idle connection poison it: the next request gets another."""
        self.start()
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        pod.send(response(b"a") + response(b"injected"))
        await client.has(b"\r\n\r\na")
        await pod.end()
        client.send(request("/b"))
        fresh = await self.pods[0].connection(1)
        await fresh.has(b"/b")
        fresh.send(response(b"b"))
        answer = await client.has(b"\r\n\r\nb")
        self.assertNotIn(b"injected", answer)

    async def test_nonsense_from_pod(self) -> None:
        """An answer that is no HTTP is 502 with its own reason."""
        for nonsense in (b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"):
            self.start()
            client = await self.client(request())
            pod = await self.pods[0].connection()
            await pod.has(b"\r\n\r\n")
            pod.send(nonsense)
            await client.has(b'"reason": "bad_response"')
            await self.shut_down()
            self.pods, self.ports, self.wires = [], [], []

    async def test_first_byte_timeout(self) -> None:
        """A pod that does not answer in time: 504."""
        self.start(connections=PodConnections(first_byte_timeout=3.0))
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        self.clock.advance(3.1)
        self.upstream.pool.sweep()
        await client.has(b'"reason": "pod_timeout"')
        await pod.end()

    async def test_idle_timeout(self) -> None:
        """A pod that stops in the middle of its answer is cut off; every byte begins anew."""
        self.start(connections=PodConnections(idle_timeout=3.0))
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na")
        await client.has(b"\r\n\r\na")
        self.clock.advance(2.0)
        pod.send(b"b")
        await client.has(b"\r\n\r\nab")
        self.clock.advance(2.0)
        self.upstream.pool.sweep()
        self.assertEqual(self.counts(), (1, 0))
        self.clock.advance(1.1)
        self.upstream.pool.sweep()
        await client.end()

    async def test_early_answer(self) -> None:
        """A pod that answers before it has read the upload reaches the client; then both close."""
        self.start()
        client = await self.client(request("/", "Content-Length: 1000000", method="PUT"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(response(b"too large", status="413 Content Too Large"))
        answer = await client.has(b"too large")
        self.assertIn(b"Connection: close\r\n", answer)
        await pod.end()
        self.assertEqual(self.counts(), (0, 0))
        client.send(b"x" * 100000)
        client.close()


class RefusalTests(ProxyTestCase):
    async def test_no_route(self) -> None:
        """404 names the path."""
        self.start(routes=[RouteConfig("r", Match(path="/a"), "u")])
        client = await self.client(request("/b?c"))
        await client.has(b'"detail": "no route matches GET /b"')
        client.send(request("/a"))
        await (await self.pods[0].connection()).has(b"GET /a ")

    async def test_body_too_large(self) -> None:
        """413 at once if the length is known, or when a chunked body grows past the limit."""
        route = RouteConfig("r", Match(prefix="/"), "u", max_body=10)
        self.start(routes=[route])
        known = await self.client(request("/", "Content-Length: 11", method="PUT"))
        await known.has(b'"reason": "body_too_large"')
        self.assertEqual(self.pods[0].connections, [])
        chunked = await self.client(request("/", "Transfer-Encoding: chunked", method="PUT"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        chunked.send(b"b\r\n01234567890\r\n")
        await chunked.has(b'"reason": "body_too_large"')
        await pod.end()

    async def test_broken_body(self) -> None:
        """Broken framing in a body: 400, and the pod's connection is closed, not completed."""
        self.start()
        client = await self.client(request("/", "Transfer-Encoding: chunked", method="PUT"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        client.send(b"xyz\r\n")
        await client.has(b'"reason": "bad_request"')
        sent = await pod.end()
        self.assertFalse(sent.endswith(b"0\r\n\r\n"))

    async def test_slow_head(self) -> None:
        """A client that sends its head byte by byte is cut off at the bound."""
        self.start(client=ClientConfig(header_timeout=10))
        client = await self.client(b"GET / HT")
        await self.settled(lambda: any(c._buffer for c in self.site.channels))
        self.clock.pump([1.0] * 8)
        client.send(b"TP/1.1\r\n")
        await self.settled(lambda: any(b"TP/" in c._buffer for c in self.site.channels))
        self.clock.pump([1.0] * 3)
        await client.has(b'"reason": "client_timeout"')

    async def test_slow_body(self) -> None:
        """A body that stops coming: 408, and the slot is free."""
        self.start(client=ClientConfig(body_timeout=10))
        client = await self.client(request("/", "Content-Length: 9", method="PUT"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        self.clock.pump([1.0] * 11)
        await client.has(b'"reason": "client_timeout"')
        await pod.end()
        self.assertEqual(self.counts(), (0, 0))

    async def test_idle_client(self) -> None:
        """Idle connections are closed without a word, new ones and used ones."""
        self.start(client=ClientConfig(header_timeout=10, keepalive=20))
        new = await self.client()
        used = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        pod.send(response(b"a"))
        await used.has(b"\r\n\r\na")
        used.take()
        self.clock.pump([1.0] * 11)
        self.assertEqual(await new.end(), b"")
        self.assertFalse(used.closed)
        self.clock.pump([1.0] * 11)
        self.assertEqual(await used.end(), b"")

    async def test_too_many_connections(self) -> None:
        """Connections past the limit are told so, or closed if they are many; others go on."""
        self.start(client=ClientConfig(connections=1))
        first = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        second = await self.client(request("/b"))
        answer = await second.end()
        self.assertTrue(answer.startswith(b"HTTP/1.1 503 "), answer)
        self.assertIn(b"X-Strictproxy-Reason: too_many_connections\r\n", answer)
        many = [await self.client() for _ in range(64)]
        third = await self.client(request("/c"))
        self.assertEqual(await third.end(), b"")
        for wire in many:
            wire.reset()
        pod.send(response(b"a"))
        await first.has(b"\r\n\r\na")
        await self.settled(lambda: len(self.site.channels) == 1, "the surplus is gone")
        first.close()
        await self.settled(lambda: not self.site.channels, "there is room again")
        await self.client(request("/d"))
        await pod.has(b"/d")


class Tenants:
    """A router for tests: X-Tenant decides."""

    def __init__(self, pods: list[Address]) -> None:
        self._pods = pods

    def route(self, info: RequestInfo) -> Decision | None:
        tenant = info.headers.get("x-tenant")
        if tenant == "crash":
            raise RuntimeError("boom")
        answers = {
            "nobody": Decision(upstream="unknown"),
            "direct": Decision(upstream="u"),
            "second": Decision(pods=frozenset({self._pods[1]})),
        }
        return answers.get(tenant or "")


class RouterTests(ProxyTestCase):
    def start_with_router(self) -> None:
        self.start(pods=2, limit=2, routes=[RouteConfig("r", Match(path="/a"), "u")])
        self.proxy.routers = [("tenants", Tenants([pod.address for pod in self.pods]))]

    async def test_confines_to_pods(self) -> None:
        """A router's set of pods is kept to, though another pod has fewer requests."""
        self.start_with_router()
        for _ in range(2):
            await self.client(request("/a", "X-Tenant: second"))
        for number in range(2):
            await (await self.pods[1].connection(number)).has(b"/a")
        self.assertEqual(self.pods[0].connections, [])

    async def test_sends_past_the_routes(self) -> None:
        """A router's upstream is taken whatever the routes say."""
        self.start_with_router()
        await self.client(request("/elsewhere", "X-Tenant: direct"))
        await self.settled(lambda: self.counts() == (1, 0))

    async def test_says_nothing(self) -> None:
        """Without an answer from the router, the routes decide."""
        self.start_with_router()
        client = await self.client(request("/b"))
        await client.has(b'"reason": "no_route"')

    async def test_fails(self) -> None:
        """A router that raises, or names an unknown upstream: 500 with its reason, and a log."""
        self.start_with_router()
        client = await self.client(request("/a", "X-Tenant: crash"))
        await client.has(b'"reason": "router_failed"')
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        client.take()
        client.send(request("/a", "X-Tenant: nobody"))
        await client.has(b'"reason": "router_failed"')
