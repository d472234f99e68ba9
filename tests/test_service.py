"""The composition root: what is started and stopped, and the admin listener."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.task import deferLater
from twisted.python.usage import UsageError
from twisted.trial.unittest import TestCase
from twisted.web.client import Agent, readBody
from twisted.web.server import Site

from strictproxy.config import parse
from strictproxy.config.model import ClientConfig
from strictproxy.demo.dns_server import DnsServer
from strictproxy.process import descriptors, within_descriptors
from strictproxy.scheduling import Address
from strictproxy.service import Options, ProxyService, log_config, makeService
from strictproxy.snapshot import PodCondition
from tests.fake_kubernetes import SERVICE, FakeApiServer, make_endpoint, make_slice
from tests.harness import ScriptedPod, response

reactor: Any = _reactor


GOOD = "listen: tcp:0\nupstreams: {u: {static: a:1}}\nroutes: []\n"


class ServiceTests(TestCase):
    timeout = 30

    async def start(self, source: str, more: str = "") -> ProxyService:
        config = parse(
            "listen: [tcp:0:interface=127.0.0.1, tcp:0:interface=127.0.0.1]\n"
            "admin: tcp:0:interface=127.0.0.1\n"
            f"upstreams: {{u: {{{source}}}}}\nroutes: [{{prefix: /, upstream: u}}]\n"
            f"log: {{access: false}}\n{more}",
            "f",
        )
        service = ProxyService(config, reactor)
        # Signals belong to trial.
        self.patch(service, "_take_signals", lambda: None)
        service.startService()
        self.addCleanup(lambda: service.stopService() if service.running else None)
        await service.started
        return service

    async def get(self, address: tuple[str, int], path: str) -> tuple[int, str]:
        url = f"http://{address[0]}:{address[1]}{path}"
        answer: Any = await Agent(reactor).request(b"GET", url.encode())
        return answer.code, (await readBody(answer)).decode()

    async def until(self, condition: Any) -> None:
        for _ in range(1000):
            if condition():
                return
            await deferLater(reactor, 0.01)
        self.fail("never happened")

    async def test_listens_and_proxies(self) -> None:
        """Every listener leads to the pods; the admin one tells of them and proxies nothing."""
        pod = ScriptedPod()
        self.addCleanup(pod.port.stopListening)
        service = await self.start(f'static: "{pod.address}"')
        first, second, admin = service.addresses()
        for number, address in enumerate((first, second)):
            answer = Deferred.fromCoroutine(self.get(address, f"/{number}"))
            wire = await pod.connection()
            await wire.has(b"GET /%d " % number)
            running = json.loads((await self.get(admin, "/api/v1/state"))[1])
            self.assertEqual(running["upstreams"]["u"]["running"], 1)
            wire.send(response(b"hello"))
            self.assertEqual(await answer, (200, "hello"))
        self.assertEqual(await self.get(admin, "/healthz"), (200, "ok\n"))
        self.assertEqual(await self.get(admin, "/readyz"), (200, "ok\n"))
        self.assertEqual((await self.get(admin, "/0"))[0], 404)
        await service.stopService()
        await wire.end()

    async def test_ready_with_the_first_trusted_set(self) -> None:
        """Not ready until discovery has been believed once; then the name's pods are used."""
        dns = DnsServer(reactor)
        dns.zone.records = {"pods.ns": ["127.0.0.1"]}
        dns.start()
        self.addCleanup(dns.stop)
        service = await self.start(
            f'dns: {{name: pods.ns, port: 1, servers: "127.0.0.1:{dns.port}",'
            " lookups: 3, interval: 50ms, every: 200ms}"
        )
        *_, admin = service.addresses()
        self.assertEqual(
            await self.get(admin, "/readyz"), (503, "no trusted address set yet for: u\n")
        )
        await self.until(lambda: service.upstreams["u"].trusted)
        self.assertEqual((await self.get(admin, "/readyz"))[0], 200)
        self.assertEqual(service.upstreams["u"].pods(), [Address("127.0.0.1", 1)])
        await service.stopService()

    async def test_endpoint_slices(self) -> None:
        """Pods from an API server; one that terminates gets nothing new, finishes what it has."""
        pods = [ScriptedPod(), ScriptedPod()]
        api = FakeApiServer()
        port = reactor.listenTCP(0, Site(api), interface="127.0.0.1")
        for each in (*(pod.port for pod in pods), port):
            self.addCleanup(each.stopListening)

        def put(ending: ScriptedPod | None) -> None:
            for pod in pods:
                endpoint = make_endpoint("127.0.0.1", terminating=pod is ending)
                item = make_slice(f"of-{pod.address.port}", [endpoint])
                item["ports"][0]["port"] = pod.address.port
                api.put(item)

        put(None)
        token = Path(self.mktemp())
        token.write_text("secret\n")
        service = await self.start(
            f"kubernetes: {{service: {SERVICE}, namespace: media, port: http, "
            f'server: "http://127.0.0.1:{port.getHost().port}", token_file: {token}}}'
        )
        await self.until(lambda: len(service.upstreams["u"].pods()) == 2)
        first, *_ = service.addresses()
        running = Deferred.fromCoroutine(self.get(first, "/1"))
        await self.until(lambda: any(pod.connections for pod in pods))
        busy, free = sorted(pods, key=lambda pod: not pod.connections)
        put(busy)

        def ends() -> list[Address]:
            shown = service.upstreams["u"].snapshot().pods
            return [pod.address for pod in shown if pod.condition is PodCondition.TERMINATING]

        await self.until(lambda: ends() == [busy.address])
        queued = Deferred.fromCoroutine(self.get(first, "/2"))
        other = await free.connection()
        await other.has(b"GET /2 ")
        for wire in (await busy.connection(), other):
            wire.send(response(b"done"))
        self.assertEqual((await running, await queued), ((200, "done"), (200, "done")))
        await service.stopService()
        for pod in pods:
            for wire in pod.connections:
                await wire.end()
        await deferLater(reactor, 0.05)

    async def test_drains(self) -> None:
        """While it stops: not ready, what runs is finished, what does not finish gets 503."""
        pod = ScriptedPod()
        self.addCleanup(pod.port.stopListening)
        service = await self.start(f'static: "{pod.address}"', "drain_timeout: 300ms\n")
        first, *_ = service.addresses()
        running = Deferred.fromCoroutine(self.get(first, "/runs"))
        wire = await pod.connection()
        await wire.has(b"/runs")
        waiting = Deferred.fromCoroutine(self.get(first, "/waits"))
        await self.until(lambda: service.upstreams["u"].state().waiting == 1)
        stopped = service.stopService()
        wire.send(response(b"done"))
        self.assertEqual(await running, (200, "done"))
        await wire.has(b"/waits")
        code, body = await waiting
        self.assertEqual((code, json.loads(body)["reason"]), (503, "shutting_down"))
        await stopped
        self.assertEqual(service.upstreams["u"].state().running, 0)

    def test_endpoints(self) -> None:
        """Addresses are connected to directly, names through the resolver."""
        config = parse("listen: tcp:0\nupstreams: {u: {static: a:1}}\nroutes: []\n", "f")
        way = ProxyService(config, reactor)._parts.way_to_pods(None)
        for host, kind in (
            ("10.0.0.1", TCP4ClientEndpoint),
            ("::1", TCP6ClientEndpoint),
            ("pod.local", HostnameEndpoint),
        ):
            self.assertIsInstance(way(Address(host, 80), 1.0), kind)

    def test_options(self) -> None:
        """The command line names the file; its mistakes are told before anything starts."""
        path = Path(self.mktemp())
        path.write_text("listen: tcp:0\nupstreams: {u: {static: a:1}}\nrouters: [{name: none}]\n")
        options = Options()
        options.parseOptions(["--config", str(path)])
        stopped = self.assertRaises(SystemExit, makeService, options)
        self.assertIn("router 'none' is not installed", str(stopped))
        path.write_text(f"{GOOD}log: {{file: /nowhere/x.log}}\n")
        options = Options()
        options.parseOptions(["--config", str(path)])
        stopped = self.assertRaises(SystemExit, makeService, options)
        self.assertIn("log.file: /nowhere/x.log: No such file", str(stopped))
        path.write_text("listen: tcp:0\n")
        error = self.failing(Options().parseOptions, ["-c", str(path)])
        self.assertIn(f"{path}:1:1: 'upstreams' is missing", str(error))

    def test_where_the_log_goes(self) -> None:
        """The configuration's file, else --logfile, else standard output; a daemon's twistd.log."""
        path = Path(self.mktemp())
        path.write_text(GOOD)
        for outer, expected in (
            ({}, None),
            ({"nodaemon": True, "logfile": None}, None),
            ({"nodaemon": True, "logfile": "-"}, None),
            ({"nodaemon": True, "logfile": "x.log"}, "x.log"),
            ({"nodaemon": False, "logfile": None}, "twistd.log"),
        ):
            options = Options()
            options.parseOptions(["--config", str(path)])
            options.parent = outer
            self.assertEqual(
                log_config(options.configuration.log, options.parent or {}).file, expected
            )
        path.write_text(f"{GOOD}log: {{file: own.log}}\n")
        options.parseOptions(["--config", str(path)])
        self.assertEqual(
            log_config(options.configuration.log, options.parent or {}).file, "own.log"
        )

    def test_descriptors(self) -> None:
        """There are never so many clients that no descriptor is left for pods and probes."""
        client = ClientConfig(connections=10_000)
        self.assertIs(within_descriptors(client, 20_000), client)
        self.assertEqual(within_descriptors(client, 12_000).connections, 9_000)
        self.assertEqual(within_descriptors(client, 100).connections, 36)
        self.assertGreater(descriptors(), 100)

    def failing(self, function: Any, argument: Any) -> UsageError:
        error: UsageError = self.assertRaises(UsageError, function, argument)  # type: ignore[assignment]
        return error
