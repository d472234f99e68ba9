"""
Discovery against name servers that nobody here wrote, and rolling restarts behind them.

BIND is always tried; CoreDNS, which Debian has no package of, where it is installed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater
from twisted.trial.unittest import SkipTest, TestCase

from strictproxy.config.model import DnsSource, Family
from strictproxy.discovery.dns import DnsDiscovery
from strictproxy.discovery.names import Names, ResolvConfFile
from strictproxy.discovery.nameservers import NameServers
from strictproxy.discovery.records import Outcome
from strictproxy.interfaces import Endpoint
from tests.real_dns import ZONE, Bind, CoreDns, Records, answers, there
from tests.test_system import SystemTestCase, free_port, hey_report

reactor: Any = _reactor
POD = f"pods.{ZONE}"


def a_records(*hosts: str) -> Records:
    return [(POD, "AAAA" if ":" in host else "A", host) for host in hosts]


class _DiscoveryTests:
    """What every server has to show."""

    make: type[Bind] | type[CoreDns]

    async def begin(self: Any, records: Records, **source: Any) -> None:
        if not there(self.make):
            raise SkipTest(f"not installed: {', '.join(self.make.programs)}")
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.server = self.make(self.folder, free_port(), self.spawn)
        await self.until(lambda: answers(self.server.port), "the server answers")
        self.server.set(records)
        config = DnsSource(
            **{
                "name": POD,
                "port": 80,
                "servers": (("127.0.0.1", self.server.port),),
                "every": 0.1,
                "interval": 0.05,
                "retry_after": 0.2,
                **source,
            }
        )
        servers = NameServers(reactor)
        self.addCleanup(servers.stop)
        names = Names(config, servers, ResolvConfFile("/nowhere"))
        self.published: list[list[str]] = []

        def publish(endpoints: Collection[Endpoint]) -> None:
            self.published.append([str(endpoint.address) for endpoint in endpoints])

        self.discovery = DnsDiscovery(config, names, reactor, lambda: 0.0)
        self.discovery.start(publish)
        self.addCleanup(self.discovery.stop)

    def spawn(self: Any, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                arguments, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
        self.addCleanup(self.end, process)
        return process

    def end(self: Any, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    async def until(self: Any, condition: Any, what: str) -> None:
        for _ in range(1000):
            if condition():
                return
            await deferLater(reactor, 0.01)
        self.fail(f"never happened: {what}; published {self.published}")

    async def believed(self: Any, *addresses: str) -> None:
        wanted = sorted(addresses)
        await self.until(
            lambda: self.published and sorted(self.published[-1]) == wanted, f"{wanted}"
        )

    async def test_pods_come_and_go(self: Any) -> None:
        """Pods come and go; a name without records, and one that is not there, have none."""
        await self.begin(a_records("10.0.0.1"))
        await self.believed("10.0.0.1:80")
        self.server.set(a_records("10.0.0.1", "10.0.0.2"))
        await self.believed("10.0.0.1:80", "10.0.0.2:80")
        self.server.set([])
        await self.believed()
        self.server.set([(POD, "TXT", '"nothing"')])
        outcomes = self.discovery.state().lookups
        self.assertGreaterEqual(outcomes["nxdomain"], 6)
        await self.until(
            lambda: self.discovery.state().lookups["empty"] > 0, "the name exists, without records"
        )
        self.server.set(a_records("10.0.0.3"))
        await self.believed("10.0.0.3:80")

    async def test_server_dies_and_comes_back(self: Any) -> None:
        """While the server is away the last good set stays."""
        await self.begin(a_records("10.0.0.1"))
        await self.believed("10.0.0.1:80")
        self.end(self.server.process)
        await self.until(
            lambda: self.discovery.state().last_error is not None, "the server is missed"
        )
        self.assertEqual(len(self.published), 1)
        self.server.start()
        await self.until(lambda: self.discovery.state().last_error is None, "it is back")
        self.assertEqual(len(self.published), 1)

    async def test_a_thousand_pods(self: Any) -> None:
        """A thousand records come over TCP."""
        hosts = [f"10.1.{n // 250}.{n % 250 + 1}" for n in range(1000)]
        await self.begin(a_records(*hosts))
        await self.believed(*(f"{host}:80" for host in hosts))

    async def test_edns(self: Any) -> None:
        """Sixty records fit into a datagram by EDNS."""
        hosts = [f"10.1.0.{n + 1}" for n in range(60)]
        await self.begin(a_records(*hosts))
        await self.believed(*(f"{host}:80" for host in hosts))

    async def test_families(self: Any) -> None:
        """IPv6, alone and beside IPv4."""
        await self.begin(a_records("fd00::1"))
        await self.believed("[fd00::1]:80")
        self.server.set(a_records("fd00::1", "10.0.0.1"))
        await self.believed("10.0.0.1:80")

    async def test_both_families(self: Any) -> None:
        """Each address a pod, where that is wanted."""
        await self.begin(a_records("fd00::1", "10.0.0.1"), family=Family.BOTH)
        await self.believed("[fd00::1]:80", "10.0.0.1:80")

    async def test_alias(self: Any) -> None:
        """An alias leads to the pods."""
        await self.begin([(f"alias.{ZONE}", "CNAME", f"{POD}."), *a_records("10.0.0.1")],
                         name=f"alias.{ZONE}")  # fmt: skip
        await self.believed("10.0.0.1:80")

    async def test_srv(self: Any) -> None:
        """SRV records bring ports with them."""
        name = f"_http._tcp.{POD}"
        records: Records = [
            (name, "SRV", f"0 50 8080 a.{POD}."),
            (name, "SRV", f"0 50 8081 b.{POD}."),
            (f"a.{POD}", "A", "10.0.0.1"),
            (f"b.{POD}", "A", "10.0.0.2"),
        ]
        await self.begin(records, name=name, port=None)
        await self.believed("10.0.0.1:8080", "10.0.0.2:8081")

    async def test_foreign_name(self: Any) -> None:
        """What the server is not there for it refuses, which says nothing about pods."""
        await self.begin([], name="pods.example")
        await self.until(
            lambda: self.discovery.state().lookups[Outcome.REFUSED.value] > 3, "it refuses"
        )
        self.assertEqual(self.published, [])


class BindTests(_DiscoveryTests, TestCase):
    """BIND, with dynamic update."""

    make = Bind


if there(CoreDns):

    class CoreDnsTests(_DiscoveryTests, TestCase):
        """CoreDNS."""

        make = CoreDns


class _RollingRestart:
    """Eight pods replaced one by one, as a Deployment does it."""

    make: type[Bind] | type[CoreDns]

    def test_rolling_restart(self: Any) -> None:
        """No request fails, no pod is above its limit, none that stays up idles while some wait."""
        port = free_port("0.0.0.0")
        hosts = [f"127.0.1.{n + 1}" for n in range(16)]
        running = {host: self.uvicorn(host, port) for host in hosts[:8]}
        server = self.make(self.folder, free_port(), self.spawn)
        self.wait_for(lambda: answers(server.port), "the name server answers")
        server.set(a_records(*running))
        self.twistd(
            f"""\
upstreams:
  pods:
    dns:
      {{name: "{POD}", port: {port}, servers: ["127.0.0.1:{server.port}"],
       every: 500ms, interval: 100ms, retry_after: 1s}}
    limit: 2
    queue: {{no_pods_timeout: 5s}}
routes:
  - {{path: /job, upstream: pods}}
"""
        )
        load = self.spawn(
            "hey", "-z", "90s", "-c", "48", "-t", "30", f"{self.url}/job", log="hey.txt"
        )
        self.wait_for(lambda: self.state()["pods"]["waiting"] >= 24, "the pods are full")
        idle: list[Any] = []
        looks = 0
        watching = True

        def watch() -> None:
            nonlocal looks
            while watching:
                state = self.state()["pods"]
                if state["waiting"]:
                    looks += 1
                    idle.extend(
                        pod for pod in state["pods"]
                        if pod["condition"] == "ready" and pod["leases"] < pod["limit"]
                    )  # fmt: skip

        watcher = threading.Thread(target=watch)
        watcher.start()
        most: dict[str, int] = {}
        try:
            for number in range(8):
                old, new = hosts[number], hosts[8 + number]
                running[new] = self.uvicorn(new, port)
                gone = running.pop(old)
                server.set(a_records(*running))
                # preStop: as long as it may take until everybody has noticed.
                until = time.monotonic() + 2.5
                self.wait_for(lambda until=until: time.monotonic() > until, "preStop")
                most[old] = json.loads(self.get(f"http://{old}:{port}/stats")[1])["most"]
                self.stop(gone)
            self.wait_for(
                lambda: (
                    {p["address"].split(":")[0] for p in self.state()["pods"]["pods"]}
                    == set(hosts[8:])
                ),
                "only the new pods are left",
            )
        finally:
            watching = False
            watcher.join()
        for host in running:
            most[host] = json.loads(self.get(f"http://{host}:{port}/stats")[1])["most"]
        load.send_signal(signal.SIGINT)
        load.wait(60)
        text = (self.folder / "hey.txt").read_text()
        statuses, errors = hey_report(text)
        self.assertEqual((set(statuses), errors), ({200}, []), text)
        self.assertEqual(idle, [])
        self.assertGreater(looks, 50)
        self.assertEqual(set(most.values()), {2}, most)
        print(f"\nrolling restart: {statuses[200]} requests, {looks} looks, most in flight {most}")


class BindRollingRestartTests(_RollingRestart, SystemTestCase):
    """Behind BIND."""

    make = Bind

    def setUp(self) -> None:
        super().setUp()
        if not there(Bind):
            raise SkipTest(f"not installed: {', '.join(Bind.programs)}")


if there(CoreDns):

    class CoreDnsRollingRestartTests(_RollingRestart, SystemTestCase):
        """Behind CoreDNS."""

        make = CoreDns


class KilledPodsTests(SystemTestCase):
    """Pods that die without a word, under load."""

    def run_load(self, method: str, route: str) -> tuple[list[int], list[dict[str, Any]], int]:
        """
        Send 24 requests, kill two of four pods in the middle.

        :return: statuses, the access log, and how many were in flight on the two.
        """
        port = free_port("0.0.0.0")
        hosts = [f"127.0.2.{n + 1}" for n in range(4)]
        pods = self.uvicorns(hosts, port)
        self.hold_jobs()
        static = ", ".join(f'"{host}:{port}"' for host in hosts)
        self.twistd(
            f"""\
upstreams:
  pods:
    static: [{static}]
    limit: 2
    health: {{aside: 500ms, max_aside: 4s}}
routes:
  - {{path: /job, upstream: pods{route}}}
log: {{format: json}}
"""
        )
        clients = [
            self.spawn(
                "curl", "-s", "-X", method, "-o", "/dev/null", "-w", "%{http_code}\n",
                f"{self.url}/job?seconds=1.5", log="codes.txt",
            )
            for _ in range(24)
        ]  # fmt: skip
        self.wait_for(
            lambda: (lambda s: (s["running"], s["waiting"]) == (8, 16))(self.state()["pods"]),
            "eight run, the others wait",
        )
        self.wait_for(
            lambda: all(
                json.loads(self.get(f"http://{host}:{port}/stats")[1])["now"] == 2 for host in hosts
            ),
            "every pod works",
        )
        state = self.state()["pods"]["pods"]
        flying = sum(pod["leases"] for pod in state if pod["address"].split(":")[0] in hosts[:2])
        for pod in pods[:2]:
            pod.kill()
        self.release_jobs()
        for client in clients:
            client.wait(60)
        self.wait_for(
            lambda: self.state()["pods"]["running"] == self.state()["pods"]["waiting"] == 0,
            "counts are zero",
        )
        codes = [int(line) for line in (self.folder / "codes.txt").read_text().split()]
        lines = (self.folder / "strictproxy.log").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        return codes, events, flying

    def check_failures(self, events: list[dict[str, Any]]) -> None:
        """Each dead pod cost what was on its way to it when it died, then one connect a trial."""
        connects = sum(e["tries"] - 1 for e in events if e["event"] == "access")
        asides = sum("put aside" in str(e) for e in events)
        # Two slots each, before they are known to be dead.
        self.assertLessEqual(connects, asides + 2 * 2)
        self.assertGreater(asides, 0)

    def test_not_repeatable(self) -> None:
        """What was in flight gets 502; what waits goes to the others."""
        codes, events, flying = self.run_load("POST", "")
        self.assertEqual(flying, 4)
        # A dying process closes its connections before its listening socket, so
        # as many may have connected in between, and were reset.
        lost = codes.count(502)
        self.assertTrue(flying <= lost <= 2 * flying, codes)
        self.assertEqual(codes.count(200), 24 - lost)
        self.check_failures(events)

    def test_repeatable(self) -> None:
        """Where the route says so, what was in flight is done by others."""
        codes, events, flying = self.run_load("GET", ", retry: GET")
        self.assertEqual(flying, 4)
        self.assertEqual(codes, [200] * 24)
        connects = sum(e["tries"] - 1 for e in events if e["event"] == "access")
        self.assertGreaterEqual(connects, flying)
