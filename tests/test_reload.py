"""Another configuration while requests run and wait: nothing is dropped, nothing counted anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trustme
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor as _reactor
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.error import ConnectionRefusedError  # noqa: A004
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from strictproxy.config import parse
from strictproxy.config.changes import changes
from strictproxy.config.file import ConfigFile
from strictproxy.config.model import Config
from strictproxy.errors import ConfigError
from strictproxy.service import ProxyService
from tests.harness import ScriptedPod, Wire, request, response

reactor: Any = _reactor


class ReloadTests(TestCase):
    timeout = 30

    def setUp(self) -> None:
        self.path = Path(self.mktemp())
        self.wires: list[Wire] = []

    async def start(self, content: str, pods: int = 1) -> None:
        self.pods = [ScriptedPod() for _ in range(pods)]
        for pod in self.pods:
            self.addCleanup(pod.port.stopListening)
        self.write(content)
        file = ConfigFile(self.path)
        self.service = ProxyService(file.read(), reactor, file)
        self.patch(self.service, "_take_signals", lambda: None)
        self.service.startService()
        self.addCleanup(self.stop)
        await self.service.started

    async def stop(self) -> None:
        for wire in self.wires:
            if not wire.closed:
                wire.reset()
        for pod in self.pods:
            for connection in pod.connections:
                if not connection.closed:
                    connection.reset()
        await self.until(lambda: not self.service.proxy.running)
        await self.service.stopService()
        for wire in [*self.wires, *(c for pod in self.pods for c in pod.connections)]:
            await wire.end()

    def write(self, content: str) -> None:
        for number, pod in enumerate(self.pods):
            content = content.replace(f"POD{number}", str(pod.address))
        self.path.write_text(
            f"listen: tcp:0:interface=127.0.0.1\nlog: {{access: false}}\n{content}"
        )

    async def reload(self, content: str) -> list[str]:
        self.write(content)
        return await self.service.reload()

    async def until(self, condition: Any) -> None:
        for _ in range(1000):
            if condition():
                return
            await deferLater(reactor, 0.005)
        self.fail("never happened")

    async def client(self, path: str, address: tuple[str, int] | None = None) -> Wire:
        endpoint = TCP4ClientEndpoint(reactor, *(address or self.service.addresses()[0]))
        wire: Wire = await endpoint.connect(Factory.forProtocol(Wire))  # type: ignore[assignment]
        self.wires.append(wire)
        wire.send(request(path))
        return wire

    def counts(self, name: str = "u") -> tuple[int, int]:
        state = self.service.upstreams[name].state()
        return state.running, state.waiting

    SMALL = "upstreams: {u: {static: POD0, limit: 1}}\nroutes: [{prefix: /, upstream: u}]\n"

    async def test_limit(self) -> None:
        """A raised limit is used at once, a lowered one reached as requests end."""
        await self.start(self.SMALL)
        clients = [await self.client(f"/{n}") for n in range(4)]
        await self.until(lambda: self.counts() == (1, 3))
        changed = await self.reload(self.SMALL.replace("limit: 1", "limit: 3"))
        self.assertEqual(changed, ["upstreams.u.limit: 1 -> 3"])
        self.assertEqual(self.counts(), (3, 1))
        await self.reload(self.SMALL.replace("limit: 1", "limit: 2"))
        self.assertEqual(self.counts(), (3, 1))
        wires = [await self.pods[0].connection(n) for n in range(3)]
        for wire in wires:
            await wire.has(b"\r\n\r\n")
        wires[0].send(response(b"a"))
        await self.until(lambda: self.counts() == (2, 1))
        wires[1].send(response(b"b"))
        await self.until(lambda: self.counts() == (2, 0))
        self.assertEqual(sum(bool(client.received) for client in clients), 2)

    async def test_route_vanishes(self) -> None:
        """Whoever waits on a route that is gone is served; whoever comes now is not."""
        await self.start(self.SMALL)
        first, second = await self.client("/1"), await self.client("/2")
        await self.until(lambda: self.counts() == (1, 1))
        await self.reload(self.SMALL.replace("prefix: /,", "prefix: /other,"))
        third = await self.client("/3")
        await third.has(b"no_route")
        for number, client in ((1, first), (2, second)):
            wire = await self.pods[0].connection()
            await wire.has(b"/%d" % number)
            wire.send(response(b"answer"))
            await client.has(b"answer")

    async def test_upstream_vanishes(self) -> None:
        """One that is gone serves whoever is on it, then ends; if it comes back, it counts on."""
        upstreams = "upstreams: {u: {static: POD0}, v: {static: POD1}}\n"
        two = upstreams + "routes: [{prefix: /, upstream: u}]\n"
        await self.start(two, 2)
        first, second = await self.client("/1"), await self.client("/2")
        await self.until(lambda: self.counts() == (1, 1))
        gone = self.service.upstreams["u"]
        only = "upstreams: {v: {static: POD1}}\nroutes: [{prefix: /, upstream: v}]\n"
        await self.reload(only)
        third = await self.client("/3")
        await (await self.pods[1].connection()).has(b"/3")
        await self.reload(two)
        self.assertIs(self.service.upstreams["u"], gone)
        self.assertEqual(self.counts(), (1, 1))
        await self.reload(only)
        for number, client in ((1, first), (2, second)):
            wire = await self.pods[0].connection()
            await wire.has(b"/%d" % number)
            wire.send(response(b"answer"))
            await client.has(b"answer")
        await self.until(lambda: not self.service._retired)
        (await self.pods[1].connection()).send(response(b"three"))
        await third.has(b"three")

    async def test_upstream_renamed(self) -> None:
        """Renamed, an upstream keeps its counts: its pods do not get twice what they may have."""
        await self.start(self.SMALL)
        await self.client("/1")
        await self.until(lambda: self.counts() == (1, 0))
        await self.reload(self.SMALL.replace("u:", "w:").replace("upstream: u", "upstream: w")
                          .replace("upstreamw:", "upstreams:"))  # fmt: skip
        await self.client("/2")
        await self.until(lambda: self.counts("w") == (1, 1))

    async def test_other_pods(self) -> None:
        """Pods that are gone finish what they have; waiting requests go to the new ones."""
        await self.start(self.SMALL, 2)
        first, second = await self.client("/1"), await self.client("/2")
        old = await self.pods[0].connection()
        await old.has(b"/1")
        await self.until(lambda: self.counts() == (1, 1))
        await self.reload(self.SMALL.replace("POD0", "POD1"))
        new = await self.pods[1].connection()
        await new.has(b"/2")
        old.send(response(b"one"))
        new.send(response(b"two"))
        await first.has(b"one")
        await second.has(b"two")

    async def test_queue_and_timeouts(self) -> None:
        """Queues and time-outs change for those who wait, too."""
        await self.start(self.SMALL)
        await self.client("/1")
        waiting = await self.client("/2")
        await self.until(lambda: self.counts() == (1, 1))
        await self.reload(
            self.SMALL.replace("limit: 1", "limit: 1, queue: {size: 1, timeout: 50ms}")
        )
        full = await self.client("/3")
        await full.has(b"queue_full")
        await waiting.has(b"queue_timeout")
        await self.reload(self.SMALL + "client: {header_timeout: 100ms}\n")
        slow = await self.client("/4")
        slow.send(b"GET / HTTP/1.1\r\n")
        self.assertEqual(self.service.site.header_timeouts.seconds, 0.1)

    async def test_exchange_timeout(self) -> None:
        """A route's time for the whole exchange may change, come and go."""
        await self.start(self.SMALL.replace("upstream: u}", "upstream: u, timeout: 1h}"))
        client = await self.client("/1")
        await self.until(lambda: self.counts() == (1, 0))
        await self.reload(self.SMALL.replace("upstream: u}", "upstream: u, timeout: 1ms}"))
        await client.has(b'"reason": "timeout"')
        await self.reload(self.SMALL)
        await self.reload(self.SMALL.replace("prefix: /,", "prefix: /x,"))

    async def test_listeners(self) -> None:
        """Ports are opened and closed; one that stays is not closed in between."""
        await self.start(self.SMALL)
        first = self.service.addresses()[0]
        old_port = self.service._listeners._open[("tcp:0:interface=127.0.0.1", False)][0].port
        content = self.SMALL + "admin: tcp:0:interface=127.0.0.1\n"
        await self.reload(content)
        self.assertEqual(self.service.addresses()[0], first)
        admin = self.service.addresses()[1]
        client = await self.client("/healthz", admin)
        await client.has(b"ok\n")
        await self.reload(self.SMALL)
        with self.assertRaises(ConnectionRefusedError):
            await self.client("/healthz", admin)
        self.assertTrue(old_port.connected)

    async def test_broken_files_change_nothing(self) -> None:
        """Mistakes of every kind leave what runs as it is, and are told."""
        await self.start(self.SMALL)
        before = self.service.config
        ports = self.service.addresses()
        taken = f"{ports[0][1]}:interface=127.0.0.1"
        for content, message in (
            ("nonsense", "not valid YAML|must be a mapping"),
            (self.SMALL + "limitt: 1\n", "unknown key"),
            (self.SMALL + "routers: [{name: none}]\n", "not installed"),
            (self.SMALL.replace("POD0", "POD0, tls: {ca: /none}"), "cannot be read"),
            (self.SMALL + f"admin: tcp:{taken}\n", "cannot listen on"),
            (self.SMALL.replace("limit: 1", "limit: 7") + "admin: tcp:1:interface=192.0.2.1\n",
             "cannot listen on"),
        ):  # fmt: skip
            with self.assertRaisesRegex(ConfigError, message):
                await self.reload(content)
            self.assertIs(self.service.config, before)
            self.assertRegex(self.service.reload_error or "", message)
        self.assertEqual(self.service.upstreams["u"].state().slots, 1)
        self.assertEqual(self.service.reloads, {"success": 0, "failure": 6})
        await self.reload(self.SMALL)
        self.assertIsNone(self.service.reload_error)
        client = await self.client("/1")
        (await self.pods[0].connection()).send(response(b"fine"))
        await client.has(b"fine")

    async def test_looks_by_itself(self) -> None:
        """A changed content is noticed, a changed time stamp alone is not, a mistake told once."""
        await self.start(self.SMALL)
        self.path.touch()
        self.assertEqual(await self.service._look(), [])
        self.assertEqual(self.service.reloads["success"], 0)
        self.write(self.SMALL.replace("limit: 1", "limit: 2"))
        self.assertEqual(await self.service._look(), ["upstreams.u.limit: 1 -> 2"])
        self.path.write_text("broken: [")
        for _ in range(3):
            self.assertEqual(await self.service._look(), [])
        self.assertEqual(self.service.reloads, {"success": 1, "failure": 1})
        self.path.unlink()
        self.assertEqual(await self.service._look(), [])
        with self.assertRaisesRegex(ConfigError, "cannot be read"):
            await self.service.reload()

    async def test_symbolic_links(self) -> None:
        """What a ConfigMap's mount does when it changes: the link goes to another folder."""
        await self.start(self.SMALL)
        folder = Path(self.mktemp())
        for number in (1, 2):
            (folder / f"v{number}").mkdir(parents=True)
            self.write(self.SMALL.replace("limit: 1", f"limit: {number}"))
            (folder / f"v{number}" / "c.yaml").write_text(self.path.read_text())
        link = folder / "data"
        link.symlink_to("v1")
        self.service.file = ConfigFile(link / "c.yaml")
        self.assertEqual(await self.service._look(), [])
        new = folder / "new"
        new.symlink_to("v2")
        new.rename(link)
        self.assertEqual(await self.service._look(), ["upstreams.u.limit: 1 -> 2"])

    async def test_health_and_checks(self) -> None:
        """Checks may be added and dropped; a pod that only they took for down is tried then."""
        await self.start(self.SMALL.replace("POD0", "[POD0, POD1]"), 2)
        upstream = self.service.upstreams["u"]
        await self.reload(
            self.SMALL.replace("POD0", "[POD0, POD1], check: {tcp: true}, health: {failures: 9}")
        )
        self.assertIsNotNone(upstream._checker)
        upstream._check_failed(self.pods[0].address, "it is down")
        self.assertEqual(upstream.snapshot().pods[0].condition.value, "unhealthy")
        await self.reload(self.SMALL.replace("POD0", "[POD0, POD1], limit_header: X-Limit"))
        self.assertIsNone(upstream._checker)
        self.assertEqual(upstream.snapshot().pods[0].condition.value, "trial")
        self.assertEqual(upstream.limit_header, b"x-limit")

    async def test_certificates(self) -> None:
        """A listener gets another certificate without being closed; a bad one changes nothing."""
        folder = Path(self.mktemp())
        folder.mkdir()
        for name in ("a", "b"):
            issued = trustme.CA().issue_cert(f"{name}.example")
            issued.private_key_and_cert_chain_pem.write_to_path(str(folder / name))
        tls = (
            "listen: {endpoint: 'tcp:0:interface=127.0.0.1', tls: {certificates: [{cert: FILE,"
            " key: FILE}]}}\n" + self.SMALL
        )
        self.pods = [ScriptedPod()]
        self.addCleanup(self.pods[0].port.stopListening)
        self.write_whole(tls.replace("FILE", str(folder / "a")))
        file = ConfigFile(self.path)
        self.service = ProxyService(file.read(), reactor, file)
        self.patch(self.service, "_take_signals", lambda: None)
        self.service.startService()
        self.addCleanup(self.stop)
        await self.service.started
        before = self.service.addresses()
        self.write_whole(tls.replace("FILE", str(folder / "b")))
        await self.service.reload()
        self.assertEqual(self.service.addresses(), before)
        self.write_whole(tls.replace("FILE", "/none"))
        with self.assertRaises(ConfigError):
            await self.service.reload()
        (certificates,) = self.service._certificates.values()
        self.assertIn("b.example", certificates._by_name)

    def write_whole(self, content: str) -> None:
        self.path.write_text(content.replace("POD0", str(self.pods[0].address)))

    async def test_not_while_stopping(self) -> None:
        """Once it stops, a proxy does not change any more."""
        await self.start(self.SMALL)
        await self.service.stopService()
        self.assertEqual(await self.reload(self.SMALL.replace("limit: 1", "limit: 2")), [])

    async def test_without_file(self) -> None:
        """A service that was made from a configuration alone has nothing to read."""
        await self.start(self.SMALL)
        self.service.file = None
        self.assertEqual(await self.service.reload(), [])


class ChangesTests(SynchronousTestCase):
    def of(self, old: str, new: str) -> list[str]:
        top = "listen: tcp:80\nupstreams:\n  u: {static: a:1}\n"
        return changes(parse(top + old, "f"), parse(top + new, "f"))

    def test_lines(self) -> None:
        """A line for each key that differs; routes by their names; secrets are not shown."""
        self.assertEqual(
            self.of(
                "routes: [{path: /a, upstream: u}, {path: /b, upstream: u}]\n",
                "admin: tcp:81\nroutes:\n"
                "  - {path: /c, upstream: u}\n"
                "  - {path: /a, upstream: u, retry: GET, timeout: 1m, body: spool,"
                " request_headers: {set: {Authorization: secret}}}\n"
                "client: {server_timing: true}\n",
            ),
            [
                "routes./b: removed",
                "routes./c: added",
                "routes./a.body: stream -> spool",
                "routes./a.request_headers: changed",
                "routes./a.retry: [] -> [GET]",
                "routes./a.timeout: off -> 60",
                "admin: off -> {endpoint: tcp:81, token_file: off, open: false}",
                "client.server_timing: false -> true",
            ],
        )

    def test_sources_and_order(self) -> None:
        """Records of other kinds are shown whole; an order that matters is said."""
        routes = ["{path: /a, upstream: u}", "{path: /b, upstream: u}"]
        self.assertEqual(
            self.of(f"routes: [{', '.join(routes)}]\n", f"routes: [{', '.join(routes[::-1])}]\n"),
            ["routes: in another order"],
        )
        old = parse("listen: tcp:80\nupstreams: {u: {static: a:1}}\nroutes: []\n", "f")
        new = parse(
            "listen: tcp:80\nupstreams: {u: {dns: {name: _a, lookups: 1}}}\nroutes: []\n", "f"
        )
        (line,) = changes(old, new)
        self.assertTrue(
            line.startswith("upstreams.u.source: {pods: [a:1]} -> {name: _a, port: off")
        )

    @given(st.sampled_from(["", "drain_timeout: 1s\n", "log: {level: warn}\n", "admin: tcp:1\n"]))
    def test_nothing(self, more: str) -> None:
        """What is equal has no differences."""
        config: Config = parse(
            f"listen: tcp:80\nupstreams: {{u: {{static: a:1}}}}\nroutes: []\n{more}", "f"
        )
        self.assertEqual(changes(config, config), [])
