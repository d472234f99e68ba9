"""Discovery through DNS: believed sets over time, and what twisted.names makes of real answers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock, deferLater
from twisted.names.client import Resolver
from twisted.names.error import DNSServerError
from twisted.trial.unittest import SynchronousTestCase, TestCase

from strictproxy.config.model import DnsSource
from strictproxy.demo.dns_server import DnsServer
from strictproxy.discovery.dns import DnsDiscovery, NamesSource
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

    def addresses(self, name: str) -> Deferred[Collection[str]]:
        self.asked += 1
        if self.hang:
            waiting: Deferred[Collection[str]] = Deferred()
            self.hanging.append(waiting)
            return waiting
        answer = self.answer(self.asked) if callable(self.answer) else self.answer
        return fail(answer) if isinstance(answer, Exception) else succeed(answer)


class DnsDiscoveryTests(SynchronousTestCase):
    def begin(self, answer: Answer | Callable[[int], Answer]) -> None:
        self.clock = Clock()
        self.script = Script(answer)
        self.published: list[tuple[float, list[str]]] = []
        self.discovery = DnsDiscovery(DnsSource("pods.ns", 80), self.script, self.clock)

        def publish(addresses: Collection[Address]) -> None:
            hosts = [address.host for address in addresses]
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
        for error in (DNSServerError(None), TimeoutError(), ZeroDivisionError("bug")):
            asked = self.script.asked
            self.script.answer = error
            self.run_for(10)
            self.assertEqual(self.script.asked, asked + 5)
        self.assertEqual(len(self.published), 1)
        self.assertIn("bug", self.discovery.state().last_error or "")
        self.script.answer = ["10.0.0.2"]
        self.run_for(5)
        self.assertEqual(self.published[-1][1], ["10.0.0.2"])

    def test_source_that_raises(self) -> None:
        """Even one that raises instead of failing cannot stop the looking."""

        def broken(_: int) -> Answer:
            raise RuntimeError("at once")

        self.begin(broken)
        self.run_for(10)
        self.assertEqual(self.script.asked, 6)
        self.script.answer = ["10.0.0.1"]
        self.run_for(5)
        self.assertEqual(len(self.published), 1)

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


class NamesSourceTests(TestCase):
    """Against the demo's DNS server, over UDP and TCP."""

    async def ask(self, name: str, **records: list[str]) -> Collection[str]:
        server = DnsServer(reactor)
        server.zone.records = {
            "pods.ns": [],
            **{k.replace("_", "."): v for k, v in records.items()},
        }
        server.start()
        self.addCleanup(server.stop)
        resolver = Resolver(servers=[("127.0.0.1", server.port)], reactor=reactor)
        found = await NamesSource(resolver).addresses(name)
        # The resolver keeps a TCP connection for the next time; both its ends are ours.
        for connection in resolver.connections:
            connection.transport.abortConnection()
        while resolver.connections:
            await deferLater(reactor, 0)
        await deferLater(reactor, 0.01)
        return found

    async def test_addresses(self) -> None:
        """All A records are found; AAAA without any is no error."""
        found = await self.ask("pods.ns", pods_ns=["127.0.0.1", "127.0.0.2"])
        self.assertEqual(sorted(found), ["127.0.0.1", "127.0.0.2"])

    async def test_no_records(self) -> None:
        """A name without addresses has none."""
        self.assertEqual(list(await self.ask("pods.ns")), [])

    async def test_no_such_name(self) -> None:
        """A name that does not exist has no addresses: that is how no pod may look."""
        self.assertEqual(list(await self.ask("other.ns")), [])

    async def test_truncated(self) -> None:
        """An answer too long for UDP is asked for again over TCP."""
        many = [f"10.1.{n // 250}.{n % 250}" for n in range(1000)]
        self.assertEqual(sorted(await self.ask("pods.ns", pods_ns=many)), sorted(many))

    async def test_server_failure(self) -> None:
        """A server that fails is an error, not an empty answer."""
        server = DnsServer(reactor)
        server.zone._lookup = lambda *_: fail(ValueError())  # type: ignore[method-assign]
        server.start()
        self.addCleanup(server.stop)
        resolver = Resolver(servers=[("127.0.0.1", server.port)], reactor=reactor)
        with self.assertRaises(DNSServerError):
            await NamesSource(resolver).addresses("pods.ns")
        self.flushLoggedErrors(ValueError)
