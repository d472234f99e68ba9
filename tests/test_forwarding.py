"""What is added to, and taken from, messages on their way."""

from __future__ import annotations

from ipaddress import ip_network

from twisted.trial.unittest import SynchronousTestCase

from strictproxy.config.model import (
    PRIVATE_NETWORKS,
    ClientConfig,
    HeaderEdits,
    Match,
    PodConnections,
    RouteConfig,
)
from strictproxy.forwarding import Forwarding, request_id
from strictproxy.http.heads import HeadLimits, RequestHead, parse_request_head, parse_response_head
from strictproxy.http.peer import Peer, client_address, trusts
from tests.harness import ProxyTestCase, request, response

FAR = Peer("192.0.2.9")
NEAR = Peer("10.0.0.1", trusted=True)
is_trusted = trusts(PRIVATE_NETWORKS)


def head(*lines: str) -> RequestHead:
    return parse_request_head(request("/a?b", *lines), HeadLimits())


class RequestTests(SynchronousTestCase):
    def forward(self, peer: Peer, *lines: str, edits: HeaderEdits | None = None) -> list[str]:
        route = RouteConfig("r", Match(prefix="/"), "u", request_headers=edits or HeaderEdits())
        out = Forwarding(route).request_head(head(*lines), peer, "10.9.9.9:80", b"id")
        return b"".join(out).decode().split("\r\n")[1:-2]

    def test_told_by_a_stranger(self) -> None:
        """Whatever a client that is no trusted proxy says of itself is not passed on."""
        self.assertEqual(
            self.forward(
                FAR,
                "X-Forwarded-For: 10.0.0.5",
                "X-Forwarded-Proto: https",
                "X-Forwarded-Host: evil",
                "X-Forwarded-Port: 1",
                "X-Real-IP: 10.0.0.5",
                "Forwarded: for=10.0.0.5",
            ),
            [
                "Host: example.com",
                "X-Forwarded-For: 192.0.2.9",
                "X-Forwarded-Proto: http",
                "X-Forwarded-Host: example.com",
                "Via: 1.1 strictproxy",
                "X-Request-Id: id",
            ],
        )

    def test_told_by_a_trusted_proxy(self) -> None:
        """What a trusted proxy says is kept, and its own address added."""
        self.assertEqual(
            self.forward(
                NEAR,
                "X-Forwarded-For: 192.0.2.1",
                "X-Forwarded-For: 10.1.1.1",
                "X-Forwarded-Proto: https",
                "X-Forwarded-Host: shop",
                "X-Forwarded-Port: 443",
                "Forwarded: for=192.0.2.1",
            ),
            [
                "Host: example.com",
                "X-Forwarded-Port: 443",
                "X-Forwarded-For: 192.0.2.1, 10.1.1.1, 10.0.0.1",
                "X-Forwarded-Proto: https",
                "X-Forwarded-Host: shop",
                "Via: 1.1 strictproxy",
                "X-Request-Id: id",
                "Forwarded: for=192.0.2.1, for=10.0.0.1;proto=http",
            ],
        )

    def test_ipv6_and_tls(self) -> None:
        """An IPv6 hop is quoted in Forwarded (RFC 7239, 6); the scheme is the connection's."""
        peer = Peer("fd00::1", trusted=True, secure=True)
        lines = self.forward(peer, "Forwarded: for=a")
        self.assertIn('Forwarded: for=a, for="[fd00::1]";proto=https', lines)
        self.assertIn("X-Forwarded-Proto: https", lines)

    def test_passes_trace_context(self) -> None:
        """W3C trace context is the client's and the pod's business."""
        lines = self.forward(FAR, "traceparent: 00-a-b-01", "tracestate: x=y")
        self.assertEqual(lines[1:3], ["traceparent: 00-a-b-01", "tracestate: x=y"])

    def test_edits(self) -> None:
        """A route sets, adds and removes headers."""
        edits = HeaderEdits(set=(("X-Tier", "batch"),), add=(("X-Note", "2"),), remove=("cookie",))
        lines = self.forward(FAR, "X-Tier: a", "x-tier: b", "X-Note: 1", "Cookie: c", edits=edits)
        kept = [line for line in lines if line.lower().startswith(("x-tier", "x-note", "cookie"))]
        self.assertEqual(kept, ["X-Note: 1", "X-Tier: batch", "X-Note: 2"])

    def test_prefix(self) -> None:
        """A route's prefix is replaced in the target."""
        route = RouteConfig("r", Match(prefix="/a"), "u", replace_prefix="/z")
        out = Forwarding(route).request_head(head(), FAR, "p", b"id")
        self.assertEqual(out[0], b"GET /z?b HTTP/1.1\r\n")

    def test_request_id(self) -> None:
        """A usable id is kept; else one is made."""
        self.assertEqual(request_id(head("X-Request-Id: abc-1")), b"abc-1")
        made = [
            request_id(head(*lines)) for lines in ((), ("X-Request-Id: a b",), ("X-Request-Id:",))
        ]
        self.assertEqual(len(set(made)), 3)
        for identity in made:
            self.assertRegex(identity, rb"^[0-9a-f]{32}$")


class ClientAddressTests(SynchronousTestCase):
    def test_addresses(self) -> None:
        """The client is the nearest address that is no trusted proxy."""
        for peer, told, expected in (
            (FAR, "10.0.0.5", "192.0.2.9"),
            (NEAR, "192.0.2.1", "192.0.2.1"),
            (NEAR, "1.1.1.1, 192.0.2.1, 10.3.3.3", "192.0.2.1"),
            (NEAR, "10.3.3.3", "10.3.3.3"),
            (NEAR, "junk, 10.3.3.3", "10.3.3.3"),
            (NEAR, "junk", "10.0.0.1"),
            (NEAR, "2001:db8::1", "2001:db8::1"),
        ):
            found = client_address(head(f"X-Forwarded-For: {told}"), peer, is_trusted)
            self.assertEqual(found, expected, (peer, told))
        self.assertEqual(client_address(head(), NEAR, is_trusted), "10.0.0.1")

    def test_trust(self) -> None:
        """Networks are what is configured; what is no address is nobody's."""
        self.assertTrue(is_trusted("10.2.3.4"))
        self.assertFalse(is_trusted("8.8.8.8"))
        self.assertFalse(is_trusted(""))
        self.assertTrue(trusts([ip_network("8.0.0.0/8")])("8.8.8.8"))


class ResponseTests(SynchronousTestCase):
    def lines(self, *fields: bytes, timing: bool = False) -> list[str]:
        edits = HeaderEdits(set=(("Server", "s"),), remove=("X-Powered-By",))
        route = RouteConfig("r", Match(prefix="/"), "u", response_headers=edits)
        answer = parse_response_head(b"\r\n".join([b"HTTP/1.1 200 OK", *fields, b"", b""]))
        forwarding = Forwarding(route, server_timing=timing)
        out = b"".join(forwarding.response_lines(answer, b"id", 1.25, 0.5))
        return out.decode().split("\r\n")[:-1]

    def test_edits_and_id(self) -> None:
        """A route's edits, our Via, and the request's id unless the pod gave one."""
        self.assertEqual(
            self.lines(b"Server: nginx", b"X-Powered-By: x", b"A: b"),
            ["A: b", "Via: 1.1 strictproxy", "X-Request-Id: id", "Server: s"],
        )
        self.assertEqual(self.lines(b"X-Request-Id: pod")[0], "X-Request-Id: pod")
        self.assertNotIn("X-Request-Id: id", self.lines(b"X-Request-Id: pod"))

    def test_server_timing(self) -> None:
        """Where it is wanted, the client learns what took the time."""
        self.assertIn("Server-Timing: queue;dur=1250.0, pod;dur=500.0", self.lines(timing=True))


class RouteSettingTests(ProxyTestCase):
    async def test_whole_exchange_times_out(self) -> None:
        """A route's timeout covers waiting and working: 504."""
        route = RouteConfig("r", Match(prefix="/"), "u", timeout=10.0)
        self.start(routes=[route])
        working = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        self.clock.advance(6)
        waiting = await self.client(request("/b"))
        await self.settled(lambda: self.counts() == (1, 1))
        self.clock.advance(5)
        self.proxy.sweep()
        await working.has(b'"reason": "timeout"')
        await pod.end()
        second = await self.pods[0].connection(1)
        await second.has(b"/b")
        second.send(response(b"b"))
        await waiting.has(b"\r\n\r\nb")
        self.clock.advance(60)
        self.proxy.sweep()

    async def test_repeatable_requests_go_elsewhere(self) -> None:
        """A method that the route calls repeatable moves to another pod when one fails it."""
        route = RouteConfig("r", Match(prefix="/"), "u", retry=frozenset({"GET"}))
        self.start(pods=2, routes=[route], connections=PodConnections(first_byte_timeout=3.0))
        client = await self.client(request("/a"))
        first = await self.pods[0].connection()
        await first.has(b"/a")
        first.reset()
        second = await self.pods[1].connection()
        await second.has(b"/a")
        second.send(response(b"fine"))
        await client.has(b"fine")
        client.send(request("/b", method="POST", body=b"x"))
        again = await self.pods[0].connection(1)
        await again.has(b"/b")
        self.clock.advance(2)
        again.reset()
        await client.has(b'"reason": "pod_disconnected"')

    async def test_repeatable_until_no_pod_is_left(self) -> None:
        """When every pod has failed it, the last one's error is the answer."""
        route = RouteConfig("r", Match(prefix="/"), "u", retry=frozenset({"GET"}))
        self.start(pods=2, routes=[route])
        client = await self.client(request("/a"))
        for pod in self.pods:
            wire = await pod.connection()
            await wire.has(b"/a")
            wire.reset()
        await client.has(b'"reason": "pod_disconnected"')
        self.assertEqual(self.records[0].tries, 2)

    async def test_trusts_nobody(self) -> None:
        """With no trusted proxies, even loopback is a stranger."""
        self.start(client=ClientConfig(trusted_proxies=()))
        await self.client(request("/a", "X-Forwarded-For: 192.0.2.1"))
        sent = await (await self.pods[0].connection()).has(b"\r\n\r\n")
        self.assertIn(b"X-Forwarded-For: 127.0.0.1\r\n", sent)
