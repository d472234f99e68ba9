"""Discovery through DNS: believed sets over time, and what twisted.names makes of real answers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from strictproxy.config.model import DnsSource
from strictproxy.demo.dns_server import DnsServer
from strictproxy.discovery.dns import DnsDiscovery
from strictproxy.discovery.names import Names, ResolvConfFile
from strictproxy.discovery.nameservers import NameServers
from strictproxy.discovery.records import LookupFailed, Outcome
from strictproxy.interfaces import Endpoint
from strictproxy.scheduling import Address

reactor: Any = _reactor

Answer = Collection[str] | Exception


class Script:
    """A name server that answers what the test tells it to."""

    def __init__(self, answer: Answer | Callable[[int], Answer]) -> None:
        self.answer = answer
        self.asked = 0
        self.hanging: list[Deferred[Collection[str]]] = []
        self.hang = False

    async def lookup(self) -> tuple[Outcome, Collection[Endpoint]]:
        self.asked += 1
        if self.hang:
            waiting: Deferred[Collection[str]] = Deferred()
            self.hanging.append(waiting)
            return found(await waiting)
        answer = self.answer(self.asked) if callable(self.answer) else self.answer
        if isinstance(answer, Exception):
            raise answer
        return found(answer)


def found(hosts: Collection[str]) -> tuple[Outcome, Collection[Endpoint]]:
    endpoints = [Endpoint(Address(host, 80)) for host in hosts]
    return Outcome.FOUND if hosts else Outcome.EMPTY, endpoints


class DnsDiscoveryTests(SynchronousTestCase):
    def begin(self, answer: Answer | Callable[[int], Answer], phase: float = 1.0) -> None:
        self.clock = Clock()
        self.script = Script(answer)
        self.published: list[tuple[float, list[str]]] = []
        self.discovery = DnsDiscovery(
            DnsSource("pods.ns", 80), self.script, self.clock, lambda: phase
        )

        def publish(endpoints: Collection[Endpoint]) -> None:
            hosts = [endpoint.address.host for endpoint in endpoints]
            self.published.append((round(self.clock.seconds(), 3), hosts))

        self.discovery.start(publish)
        self.addCleanup(self.end)

    def end(self) -> None:
        self.discovery.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def run_for(self, seconds: float) -> None:
        # An eighth of a second has no rounding error.
        self.clock.pump([0.125] * round(seconds * 8))

    def test_first_set(self) -> None:
        """The first set is believed after five lookups, half a second apart, agree with it."""
        self.begin(["10.0.0.1", "10.0.0.2"])
        self.run_for(2.375)
        self.assertEqual(self.published, [])
        self.run_for(0.125)
        self.assertEqual(self.published, [(2.5, ["10.0.0.1", "10.0.0.2"])])
        self.assertEqual(self.script.asked, 6)

    def test_looks_every_two_seconds(self) -> None:
        """While nothing changes, there is a lookup every two seconds, and nothing is published."""
        self.begin(["10.0.0.1"])
        self.run_for(4)
        asked = self.script.asked
        self.run_for(20)
        self.assertEqual(self.script.asked, asked + 10)
        self.assertEqual(len(self.published), 1)

    def test_change_takes_its_time(self) -> None:
        """Whenever it happens, a change is in force 2.5 s to 5 s later."""
        for eighth in range(16):
            self.begin(["10.0.0.1"])
            self.run_for(6 + eighth / 8)
            changed = self.clock.seconds()
            self.script.answer = ["10.0.0.2"]
            self.run_for(6)
            when, hosts = self.published[-1]
            self.assertEqual(hosts, ["10.0.0.2"])
            self.assertTrue(2.5 <= when - changed <= 5.0, when - changed)

    def test_flapping(self) -> None:
        """A server that answers another subset each time never changes the set in force."""
        self.begin(["10.0.0.1", "10.0.0.2", "10.0.0.3"])
        self.run_for(6)
        self.script.answer = lambda n: [f"10.0.0.{1 + n % 3}"]
        self.run_for(120)
        self.assertEqual(len(self.published), 1)
        # Looks begin 10 s after a round that failed; from the look that meets
        # the settled answer on, it takes the five lookups and no more.
        asked = self.script.asked
        while self.script.asked == asked:
            self.run_for(0.125)
        self.run_for(9.5)
        self.script.answer = ["10.0.0.9"]
        settled = self.clock.seconds()
        self.run_for(15)
        when, hosts = self.published[-1]
        self.assertEqual(hosts, ["10.0.0.9"])
        self.assertTrue(2.5 <= when - settled <= 5.0, when - settled)

    def test_waits_after_a_round_that_failed(self) -> None:
        """When lookups disagree the next one is ten seconds later."""
        self.begin(lambda n: ["10.0.0.1"] if n != 3 else ["10.0.0.2"])
        self.run_for(1.0)
        self.assertEqual(self.script.asked, 3)
        self.run_for(9.875)
        self.assertEqual(self.script.asked, 3)
        self.run_for(0.125)
        self.assertEqual(self.script.asked, 4)
        self.run_for(2.5)
        self.assertEqual(self.published[-1][1], ["10.0.0.1"])

    def test_empty(self) -> None:
        """No address at all is believed like any other set."""
        self.begin(["10.0.0.1"])
        self.run_for(6)
        self.script.answer = []
        self.run_for(6)
        self.assertEqual(self.published[-1][1], [])

    def test_failures_keep_the_last_good_set(self) -> None:
        """Whatever a lookup raises, the set stays and looking goes on."""
        self.begin(["10.0.0.1"])
        self.run_for(6)
        errors = (
            LookupFailed(Outcome.SERVFAIL, "failed"),
            LookupFailed(Outcome.TIMEOUT, "silent"),
            ZeroDivisionError("bug"),
        )
        for error in errors:
            asked = self.script.asked
            self.script.answer = error
            self.run_for(10)
            self.assertEqual(self.script.asked, asked + 5)
        self.assertEqual(len(self.published), 1)
        self.assertIn("bug", self.discovery.state().last_error or "")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 5)
        lookups = self.discovery.state().lookups
        counts = [lookups[outcome] for outcome in ("servfail", "timeout", "error", "refused")]
        self.assertEqual(counts, [5, 5, 5, 0])
        self.script.answer = ["10.0.0.2"]
        self.run_for(5)
        self.assertEqual(self.published[-1][1], ["10.0.0.2"])

    def test_out_of_step(self) -> None:
        """Looks after the first one are at a moment of the interval that is chance's."""
        for phase in (0.25, 0.75):
            self.begin(["10.0.0.1"], phase)
            self.run_for(5)
            times = []
            for _ in range(80):
                asked = self.script.asked
                self.run_for(0.125)
                if self.script.asked > asked:
                    times.append(self.clock.seconds() % 2)
            self.assertEqual(times, [2 * phase] * 5)
        self.begin(["10.0.0.1"], 0.5)
        self.run_for(0.5)

    def test_publisher_that_raises(self) -> None:
        """A fault in whoever is told cannot stop it either; it is logged."""
        self.begin(["10.0.0.1"])
        publish = self.discovery._publish
        self.discovery._publish = lambda _: 1 / 0  # type: ignore[assignment,return-value]
        self.run_for(4)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.discovery._publish = publish
        self.script.answer = ["10.0.0.2"]
        self.run_for(6)
        self.assertEqual(self.published[-1][1], ["10.0.0.2"])

    def test_slow_answers(self) -> None:
        """A lookup that takes its time delays the next one, and is not asked twice."""
        self.begin(["10.0.0.1"])
        self.run_for(6)
        self.script.hang = True
        self.run_for(30)
        self.assertEqual(len(self.script.hanging), 1)
        self.discovery.look_now()
        self.assertEqual(len(self.script.hanging), 1)
        self.script.hang = False
        self.script.hanging[0].callback(["10.0.0.1"])
        asked = self.script.asked
        self.run_for(4)
        self.assertEqual(self.script.asked, asked + 2)

    def test_look_now(self) -> None:
        """Whoever knows that something changed need not wait for the next look."""
        self.begin(["10.0.0.1"])
        self.run_for(6.75)
        self.script.answer = ["10.0.0.2"]
        self.discovery.look_now()
        self.run_for(2.5)
        self.assertEqual(self.published[-1], (9.25, ["10.0.0.2"]))

    def test_look_now_is_bounded(self) -> None:
        """However often it is asked for, there is no more than a look per interval."""
        self.begin(["10.0.0.1"])
        self.run_for(6.125)
        asked = self.script.asked
        for _ in range(100):
            self.discovery.look_now()
            self.clock.advance(0.01)
        self.assertLessEqual(self.script.asked - asked, 3)

    def test_stop(self) -> None:
        """Stopped in a round or in a pause, it publishes nothing and leaves no timer."""
        for seconds in (0.25, 1.0, 4.0):
            self.begin(["10.0.0.1"])
            self.run_for(seconds)
            self.discovery.stop()
            published = len(self.published)
            self.script.answer = ["10.0.0.2"]
            self.run_for(20)
            self.assertEqual(len(self.published), published)
            self.assertEqual(self.clock.getDelayedCalls(), [])
        self.begin(lambda n: [f"10.0.0.{n}"])
        self.run_for(2.0)
        self.end()
        self.discovery.look_now()


class NamesTests(TestCase):
    """Real sockets, to the demo's DNS server."""

    def setUp(self) -> None:
        self.server = DnsServer(reactor)
        self.server.start()
        self.addCleanup(self.server.stop)

    async def lookup(self, **records: list[str]) -> tuple[Outcome, Collection[Endpoint]]:
        self.server.zone.records = {key.replace("_", "."): each for key, each in records.items()}
        config = DnsSource("pods.ns", 80, servers=(("127.0.0.1", self.server.port),))
        servers = NameServers(reactor)
        names = Names(config, servers, ResolvConfFile("/nowhere"))
        try:
            return await names.lookup()
        finally:
            servers.stop()
            # Twisted's server sees the end of a TCP connection a turn later.
            await deferLater(reactor, 0.01)

    async def test_addresses(self) -> None:
        """All A records are found; AAAA without any is no error."""
        outcome, pods = await self.lookup(pods_ns=["127.0.0.1", "127.0.0.2"])
        self.assertEqual(outcome, Outcome.FOUND)
        self.assertEqual(
            [str(pod.address) for pod in sorted(pods)], ["127.0.0.1:80", "127.0.0.2:80"]
        )

    async def test_none(self) -> None:
        """A name without addresses, and one that does not exist, have none."""
        self.assertEqual(await self.lookup(pods_ns=[]), (Outcome.EMPTY, ()))
        self.assertEqual(await self.lookup(other_ns=[]), (Outcome.NXDOMAIN, ()))

    async def test_truncated(self) -> None:
        """An answer too long for UDP is asked for again over TCP."""
        many = [f"10.1.{n // 250}.{n % 250}" for n in range(1000)]
        _, pods = await self.lookup(pods_ns=many)
        self.assertEqual(sorted(pod.address.host for pod in pods), sorted(many))

    async def test_server_failure(self) -> None:
        """A server that fails is an error, not an empty answer."""
        self.server.zone._lookup = lambda *_: fail(ValueError())  # type: ignore[method-assign]
        with self.assertRaises(LookupFailed) as caught:
            await self.lookup()
        self.assertEqual(caught.exception.outcome, Outcome.SERVFAIL)
        self.flushLoggedErrors(ValueError)

    async def test_nobody_listens(self) -> None:
        """Where nobody listens, that is known at once, by IPv4 and by IPv6."""
        for host in ("127.0.0.1", "::1"):
            config = DnsSource("pods.ns", 80, servers=((host, 1),))
            servers = NameServers(reactor)
            self.addCleanup(servers.stop)
            names = Names(config, servers, ResolvConfFile("/nowhere"))
            with self.assertRaises(LookupFailed) as caught:
                await names.lookup()
            self.assertIn("nobody listens", str(caught.exception))
