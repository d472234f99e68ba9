"""
What a name server says over time, and which pods are believed in when.

Each scenario runs the whole of DNS discovery, from resolv.conf's text to the
published set, against scripted servers that speak real messages; time is a
`Clock`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.names import dns
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.config.model import DnsSource, Family
from strictproxy.discovery.dns import DnsDiscovery
from strictproxy.discovery.names import Names, ResolvConfFile
from strictproxy.discovery.nameservers import NameServers
from strictproxy.interfaces import Endpoint
from tests.fake_dns import FakeServer, Network, Zone, addresses

NAME = "pods.media.svc.cluster.local"
CONF = "nameserver 10.96.0.10\n"
POD_CONF = (
    "nameserver 10.96.0.10\nsearch media.svc.cluster.local svc.cluster.local cluster.local\n"
    "options ndots:5\n"
)
TWO = "nameserver 10.96.0.10\nnameserver 10.96.0.11\n"

MANY = " ".join(f"10.1.{n // 250}.{n % 250 + 1}" for n in range(1000))
SIXTY = " ".join(f"10.2.0.{n + 1}" for n in range(60))


class World:
    """Two name servers, and the files of the machine."""

    def __init__(self, folder: Path, conf: str) -> None:
        self.first, self.second = FakeServer(), FakeServer()
        self.network = Network({("10.96.0.10", 53): self.first, ("10.96.0.11", 53): self.second})
        self.resolv_conf, self.hosts = folder / "resolv.conf", folder / "hosts"
        self.resolv_conf.write_text(conf)
        self.discovery: DnsDiscovery | None = None


Action = Callable[[World], object]


def pods(text: str, name: str = NAME) -> Action:
    """Make the first server know these addresses of a name."""
    return zone({name: addresses(text)})


def zone(records: Zone | Callable[[int], Zone]) -> Action:
    """Make the first server know these records."""
    return lambda world: setattr(world.first, "zone", records)


def both(records: Zone) -> Action:
    """Make both servers know these records."""
    return lambda world: (
        setattr(world.first, "zone", records),
        setattr(world.second, "zone", records),
    )


def first(**settings: Any) -> Action:
    """Change how the first server behaves."""
    return lambda world: [setattr(world.first, key, value) for key, value in settings.items()]


def flapping(count: int) -> Zone:
    """Return another of three pods each time."""
    return {NAME: addresses(f"10.0.0.{1 + count % 3}")}


def shuffled(count: int) -> Zone:
    """Return ten pods in another order each time, some of them twice."""
    found = [f"10.0.0.{n}" for n in range(1, 11)]
    generator = random.Random(count)
    generator.shuffle(found)
    return {NAME: addresses(" ".join([*found, *found[:3]]))}


def partial(count: int) -> Zone:
    """Leave out one of four pods, another each time: a server that rotates and cuts."""
    left = [n for n in range(1, 5) if n != 1 + count % 4]
    return {NAME: addresses(" ".join(f"10.0.0.{n}" for n in left))}


def srv(*records: tuple[int, int, int, str]) -> list[Any]:
    """Return SRV records of priority, weight, port and target."""
    return [dns.Record_SRV(p, w, port, target) for p, w, port, target in records]


def other_question(message: dns.Message) -> None:
    """Answer something that was not asked."""
    message.queries[0].name = dns.Name("evil.example")


def foreign_record(message: dns.Message) -> None:
    """Slip in the address of another name."""
    message.answers.append(dns.RRHeader("evil.example", dns.A, dns.IN, 5, dns.Record_A("6.6.6.6")))


def long_as(*parts: str) -> str:
    """Return addresses in the order of discovery's sets."""
    return " ".join(sorted(" ".join(parts).split()))


ONE_TWO = "10.0.0.1 10.0.0.2"
SRV_NAME = f"_http._tcp.{NAME}"
TARGETS: Zone = {
    f"a.{NAME}": addresses("10.0.0.1"),
    f"b.{NAME}": addresses("10.0.0.2"),
}


@dataclass(frozen=True)
class Scenario:
    """What happens when, and which hosts are in force then; None before there is a set."""

    what: str
    happens: dict[float, Action | list[Action]]
    expected: dict[float, str | None]
    conf: str = CONF
    source: dict[str, Any] = field(default_factory=dict)
    #: part of the last error in the end, or None for none
    error: str | None = None
    #: outcomes that must have been counted
    outcomes: tuple[str, ...] = ("found",)


SCENARIOS = [
    Scenario("a first set", {0: pods(ONE_TWO)}, {2.4: None, 2.6: ONE_TWO}),
    Scenario(
        "a pod comes", {0: pods("10.0.0.1"), 6: pods(ONE_TWO)}, {8: "10.0.0.1", 10.6: ONE_TWO}
    ),
    Scenario("a pod goes", {0: pods(ONE_TWO), 6: pods("10.0.0.2")}, {8: ONE_TWO, 10.6: "10.0.0.2"}),
    Scenario(
        "all pods replaced at once",
        {0: pods(ONE_TWO), 6: pods("10.0.0.3 10.0.0.4")},
        {8: ONE_TWO, 10.6: "10.0.0.3 10.0.0.4"},
    ),
    Scenario(
        "flapping changes nothing",
        {0: pods(ONE_TWO), 6: zone(flapping)},
        {10: ONE_TWO, 60: ONE_TWO, 120: ONE_TWO},
    ),
    Scenario(
        "flapping that settles",
        {0: pods(ONE_TWO), 6: zone(flapping), 30: pods("10.0.0.9")},
        {30: ONE_TWO, 45: "10.0.0.9"},
    ),
    Scenario(
        "flapping from the beginning",
        {0: zone(flapping), 40: pods("10.0.0.9")},
        {40: None, 56: "10.0.0.9"},
    ),
    Scenario(
        "answers that leave out another pod each time",
        {0: zone(partial), 40: pods("10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4")},
        {40: None, 56: "10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4"},
    ),
    Scenario(
        "shuffled and repeated answers are one set",
        {0: zone(shuffled)},
        {2.6: long_as(*(f"10.0.0.{n}" for n in range(1, 11)))},
    ),
    Scenario(
        "a blink shorter than a round",
        {0: pods(ONE_TWO), 6: pods("10.0.0.1"), 7: pods(ONE_TWO)},
        {8: ONE_TWO, 20: ONE_TWO, 40: ONE_TWO},
    ),
    Scenario(
        "an address used again",
        {0: pods(ONE_TWO), 6: pods("10.0.0.2"), 20: pods(ONE_TWO)},
        {12: "10.0.0.2", 26: ONE_TWO},
    ),
    Scenario(
        "NXDOMAIN is believed after five more",
        {0: pods(ONE_TWO), 6: zone({})},
        {8.2: ONE_TWO, 10.6: ""},
        outcomes=("found", "nxdomain"),
    ),
    Scenario(
        "NXDOMAIN for a moment",
        {0: pods(ONE_TWO), 6: zone({}), 7: pods(ONE_TWO)},
        {10: ONE_TWO, 30: ONE_TWO},
        outcomes=("found", "nxdomain"),
    ),
    Scenario(
        "no data is believed after five more",
        {0: pods(ONE_TWO), 6: zone({NAME: []})},
        {8.2: ONE_TWO, 10.6: ""},
        outcomes=("found", "empty"),
    ),
    Scenario(
        "from nothing to the first pod",
        {0: zone({NAME: []}), 60: pods("10.0.0.1")},
        {2.4: None, 2.6: "", 60: "", 65: "10.0.0.1"},
        outcomes=("found", "empty"),
    ),
    Scenario(
        "SERVFAIL keeps the set",
        {0: pods(ONE_TWO), 6: first(code=dns.ESERVER)},
        {10: ONE_TWO, 300: ONE_TWO},
        error="10.96.0.10: the server failed",
        outcomes=("found", "servfail"),
    ),
    Scenario(
        "REFUSED keeps the set",
        {0: pods(ONE_TWO), 6: first(code=dns.EREFUSED)},
        {10: ONE_TWO, 300: ONE_TWO},
        error="10.96.0.10: refused",
        outcomes=("found", "refused"),
    ),
    Scenario(
        "silence keeps the set",
        {0: pods(ONE_TWO), 6: first(dead=True)},
        {10: ONE_TWO, 300: ONE_TWO},
        error="10.96.0.10: no answer",
        outcomes=("found", "timeout"),
    ),
    Scenario(
        "nobody listens, which is known at once",
        {0: pods(ONE_TWO), 6: first(refuses=True)},
        {10: ONE_TWO, 300: ONE_TWO},
        error="10.96.0.10: nobody listens",
        outcomes=("found", "error"),
    ),
    Scenario(
        "SERVFAIL in a round ends the round",
        {
            0: pods(ONE_TWO),
            6: pods("10.0.0.3"),
            7.2: first(code=dns.ESERVER),
            8.2: first(code=None),
        },
        {15: ONE_TWO, 22: "10.0.0.3"},
        outcomes=("found", "servfail"),
    ),
    Scenario(
        "a server that comes back with other pods",
        {0: pods(ONE_TWO), 6: first(dead=True), 60: [first(dead=False), pods("10.0.0.7")]},
        {60: ONE_TWO, 70: "10.0.0.7"},
        outcomes=("found", "timeout"),
    ),
    Scenario(
        "max_stale gives the set up, and it comes back",
        {0: pods(ONE_TWO), 6: first(code=dns.ESERVER), 60: first(code=None)},
        {30: ONE_TWO, 40: "", 58: "", 66: ONE_TWO},
        source={"max_stale": 30.0},
        outcomes=("found", "servfail"),
    ),
    Scenario(
        "one of two servers dead from the beginning",
        {
            0: [both({NAME: addresses(ONE_TWO)}), first(dead=True)],
            20: both({NAME: addresses("10.0.0.3")}),
        },
        {8: ONE_TWO, 26: "10.0.0.3"},
        conf=TWO,
    ),
    Scenario(
        "one of two servers dies",
        {
            0: both({NAME: addresses(ONE_TWO)}),
            6: first(dead=True),
            20: both({NAME: addresses("10.0.0.3")}),
        },
        {20: ONE_TWO, 26: "10.0.0.3"},
        conf=TWO,
    ),
    Scenario(
        "one of two servers fails",
        {0: [both({NAME: addresses(ONE_TWO)}), first(code=dns.ESERVER)]},
        {2.6: ONE_TWO},
        conf=TWO,
    ),
    Scenario(
        "both servers dead, and back",
        {
            0: both({NAME: addresses(ONE_TWO)}),
            6: [first(dead=True), lambda world: setattr(world.second, "dead", True)],
            60: [first(dead=False), both({NAME: addresses("10.0.0.3")})],
        },
        {60: ONE_TWO, 80: "10.0.0.3"},
        conf=TWO,
        outcomes=("found", "timeout"),
    ),
    Scenario("sixty pods, by EDNS", {0: pods(SIXTY)}, {2.6: long_as(SIXTY)}),
    Scenario("a thousand pods, over TCP", {0: pods(MANY)}, {2.6: long_as(MANY)}),
    Scenario(
        "truncated, and no TCP",
        {0: pods(ONE_TWO), 6: [pods(MANY), first(tcp=False)]},
        {60: ONE_TWO},
        error="truncated, and not to be had over TCP",
        outcomes=("found", "truncated"),
    ),
    Scenario(
        "truncated, and TCP that hangs",
        {0: pods(ONE_TWO), 6: [pods(MANY), first(tcp=None)]},
        {60: ONE_TWO},
        error="truncated, and not to be had over TCP",
        outcomes=("found", "truncated"),
    ),
    Scenario(
        "a server that does not understand EDNS",
        {0: [pods(SIXTY), first(edns=dns.EFORMAT)]},
        {2.6: long_as(SIXTY)},
    ),
    Scenario(
        "something on the way that drops EDNS",
        {0: [pods(ONE_TWO), first(edns=None)]},
        {12: ONE_TWO},
    ),
    Scenario("IPv6 only", {0: pods("fd00::1 fd00::2")}, {2.6: "fd00::1 fd00::2"}),
    Scenario(
        "pods with both families are not two", {0: pods("10.0.0.1 fd00::1")}, {2.6: "10.0.0.1"}
    ),
    Scenario(
        "pods with both families, by IPv6",
        {0: pods("10.0.0.1 fd00::1")},
        {2.6: "fd00::1"},
        source={"family": Family.IPV6},
    ),
    Scenario(
        "pods of either family",
        {0: pods("10.0.0.1 fd00::2")},
        {2.6: "10.0.0.1 fd00::2"},
        source={"family": Family.BOTH},
    ),
    Scenario(
        "a chain of aliases",
        {
            0: zone(
                {
                    NAME: [dns.Record_CNAME("one.example")],
                    "one.example": [dns.Record_CNAME("two.example")],
                    "two.example": addresses(ONE_TWO),
                }
            )
        },
        {2.6: ONE_TWO},
    ),
    Scenario(
        "an alias to nowhere",
        {0: zone({NAME: [dns.Record_CNAME("one.example")]})},
        {2.6: ""},
        outcomes=("nxdomain",),
    ),
    Scenario(
        "SRV with two ports",
        {
            0: zone(
                {
                    SRV_NAME: srv((0, 1, 8080, f"a.{NAME}"), (0, 1, 8081, f"a.{NAME}")),
                    **TARGETS,
                }
            )
        },
        {2.6: "10.0.0.1:8080 10.0.0.1:8081"},
        source={"name": SRV_NAME, "port": None},
    ),
    Scenario(
        "SRV without the targets' addresses",
        {
            0: [
                zone(
                    {SRV_NAME: srv((0, 50, 80, f"a.{NAME}"), (0, 50, 80, f"b.{NAME}")), **TARGETS}
                ),
                first(glue=False),
            ]
        },
        {2.6: ONE_TWO},
        source={"name": SRV_NAME, "port": None},
    ),
    Scenario(
        "SRV with weights and a reserve",
        {
            0: zone(
                {
                    SRV_NAME: srv(
                        (10, 30, 80, f"a.{NAME}"),
                        (10, 10, 80, f"b.{NAME}"),
                        (20, 5, 80, f"c.{NAME}"),
                    ),
                    **TARGETS,
                }
            )
        },
        {2.6: "10.0.0.1 10.0.0.2*0.33"},
        source={"name": SRV_NAME, "port": None},
    ),
    Scenario(
        "SRV with weights that change with the number of pods, as CoreDNS has them",
        {
            0: zone({SRV_NAME: srv((0, 100, 80, f"a.{NAME}")), **TARGETS}),
            6: zone({SRV_NAME: srv((0, 50, 80, f"a.{NAME}"), (0, 50, 80, f"b.{NAME}")), **TARGETS}),
        },
        {6: "10.0.0.1", 12: ONE_TWO},
        source={"name": SRV_NAME, "port": None},
    ),
    Scenario(
        "SRV, one target of which cannot be looked up",
        {
            0: zone({SRV_NAME: srv((0, 1, 80, f"a.{NAME}")), **TARGETS}),
            6: [
                zone(
                    {
                        SRV_NAME: srv((0, 1, 80, f"a.{NAME}"), (0, 1, 80, f"b.{NAME}")),
                        **TARGETS,
                    }
                ),
                first(
                    glue=False,
                    lies=lambda message: setattr(
                        message, "rCode", dns.ESERVER if message.queries[0].type == dns.A else 0
                    ),
                ),
            ],
        },
        {60: "10.0.0.1"},
        source={"name": SRV_NAME, "port": None},
        error="the server failed",
        outcomes=("found", "servfail"),
    ),
    Scenario(
        "SRV of no pods",
        {0: zone({SRV_NAME: []})},
        {2.6: ""},
        source={"name": SRV_NAME, "port": None},
        outcomes=("empty",),
    ),
    Scenario(
        "a short name, completed by the search list",
        {0: pods(ONE_TWO, "pods.media.svc.cluster.local")},
        {2.6: ONE_TWO},
        conf=POD_CONF,
        source={"name": "pods"},
    ),
    Scenario(
        "a name with its namespace, completed by a later domain",
        {0: pods(ONE_TWO, "pods.other.svc.cluster.local")},
        {2.6: ONE_TWO},
        conf=POD_CONF,
        source={"name": "pods.other"},
    ),
    Scenario(
        "ndots: a name with few dots is completed first",
        {
            0: zone(
                {
                    "pods.media": addresses("6.6.6.6"),
                    "pods.media.svc.cluster.local": addresses(ONE_TWO),
                }
            )
        },
        {2.6: ONE_TWO},
        conf=POD_CONF,
        source={"name": "pods.media"},
    ),
    Scenario(
        "ndots: a name with enough dots is tried as it is first",
        {0: zone({"pods.example": addresses(ONE_TWO), "pods.example.local": addresses("6.6.6.6")})},
        {2.6: ONE_TWO},
        conf=CONF + "search local\n",
        source={"name": "pods.example"},
    ),
    Scenario(
        "a name that ends with a dot is never completed",
        {0: zone({"pods.media.svc.cluster.local": addresses("6.6.6.6")})},
        {2.6: ""},
        conf=POD_CONF,
        source={"name": "pods."},
        outcomes=("nxdomain",),
    ),
    Scenario(
        "a wildcard behind the search list does not take over when the pods are gone",
        {
            0: zone(
                {"pods.media.svc.cluster.local": addresses(ONE_TWO), "pods": addresses("6.6.6.6")}
            ),
            6: zone({"pods": addresses("6.6.6.6")}),
        },
        {6: ONE_TWO, 12: "", 60: ""},
        conf=POD_CONF,
        source={"name": "pods"},
        outcomes=("found", "nxdomain"),
    ),
    Scenario(
        "a server that fails for one domain of the search list says nothing about the others",
        {
            0: [
                pods("6.6.6.6", "pods.svc.cluster.local"),
                first(
                    lies=lambda message: setattr(
                        message,
                        "rCode",
                        dns.ESERVER
                        if message.queries[0].name.name.startswith(b"pods.media.")
                        else message.rCode,
                    )
                ),
            ],
            20: [pods(ONE_TWO, "pods.media.svc.cluster.local"), first(lies=lambda message: None)],
        },
        {20: None, 26: ONE_TWO},
        conf=POD_CONF,
        source={"name": "pods"},
        outcomes=("found", "servfail"),
    ),
    Scenario(
        "resolv.conf changes",
        {
            0: [
                pods(ONE_TWO),
                lambda world: setattr(world.second, "zone", {NAME: addresses("10.0.0.3")}),
            ],
            6: lambda world: world.resolv_conf.write_text("nameserver 10.96.0.11\n"),
        },
        {6: ONE_TWO, 12: "10.0.0.3"},
    ),
    Scenario(
        "resolv.conf vanishes",
        {
            0: pods(ONE_TWO),
            6: lambda world: world.resolv_conf.unlink(),
            7: pods("10.0.0.3"),
        },
        {6: ONE_TWO, 12: "10.0.0.3"},
    ),
    Scenario(
        "servers of the configuration, which resolv.conf has no part in",
        {0: lambda world: setattr(world.second, "zone", {"pods.media": addresses(ONE_TWO)})},
        {2.6: ONE_TWO},
        conf=POD_CONF,
        source={"name": "pods.media", "servers": (("10.96.0.11", 53),)},
    ),
    Scenario(
        "/etc/hosts is not consulted",
        {0: [pods(ONE_TWO), lambda world: world.hosts.write_text(f"6.6.6.6 {NAME}\n")]},
        {2.6: ONE_TWO},
    ),
    Scenario(
        "/etc/hosts, where it is asked for",
        {0: lambda world: world.hosts.write_text(f"10.0.0.1 {NAME}\n10.0.0.2 {NAME} x\n")},
        {2.6: ONE_TWO},
        source={"hosts": True},
    ),
    Scenario(
        "hosts asked for, and nothing there",
        {0: pods(ONE_TWO)},
        {2.6: ONE_TWO},
        source={"hosts": True},
    ),
    Scenario(
        "records of another name are passed over",
        {0: [pods(ONE_TWO), first(lies=foreign_record)]},
        {2.6: ONE_TWO},
    ),
    Scenario(
        "an answer to another question is none",
        {0: [pods(ONE_TWO), first(lies=other_question)]},
        {20: None},
        error="answered something else",
        outcomes=("error",),
    ),
    Scenario(
        "a response code that means nothing",
        {0: [pods(ONE_TWO), first(code=9)]},
        {20: None},
        error="response code 9",
        outcomes=("error",),
    ),
    Scenario(
        "more than half of the pods gone at once: believed",
        {0: pods("10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5"), 6: pods("10.0.0.5")},
        {8: long_as(*(f"10.0.0.{n}" for n in range(1, 6))), 10.6: "10.0.0.5"},
    ),
    Scenario(
        "a slow server",
        {0: [pods(ONE_TWO), first(latency=0.8)]},
        {4: None, 8: ONE_TWO},
    ),
]


class ScenarioTests(SynchronousTestCase):
    def run_scenario(self, scenario: Scenario) -> None:
        folder = Path(self.mktemp())
        folder.mkdir()
        world = World(folder, scenario.conf)
        config = DnsSource(**{"name": NAME, "port": 80, **scenario.source})
        servers = NameServers(world.network)
        names = Names(
            config,
            servers,
            ResolvConfFile(world.resolv_conf),
            str(world.hosts),
        )
        discovery = DnsDiscovery(config, names, world.network, lambda: 1.0)
        in_force: list[Collection[Endpoint]] = []
        events: list[tuple[float, int, Any]] = [
            (when, 1, expected) for when, expected in scenario.expected.items()
        ]
        events += [(when, 0, action) for when, action in scenario.happens.items()]
        started = False
        for when, kind, what in sorted(events, key=lambda event: event[:2]):
            while world.network.seconds() < when - 1e-9:
                world.network.advance(min(0.05, when - world.network.seconds()))
            if kind == 0:
                for action in what if isinstance(what, list) else [what]:
                    action(world)
                if not started:
                    discovery.start(in_force.append)
                    started = True
            else:
                shown = _shown(in_force[-1], config.port) if in_force else None
                self.assertEqual(shown, what, f"at {when} s")
        state = discovery.state()
        if scenario.error is None:
            self.assertIsNone(state.last_error)
        else:
            self.assertIn(scenario.error, state.last_error or "")
        counted = {outcome for outcome, count in state.lookups.items() if count}
        self.assertEqual(counted, set(scenario.outcomes))
        discovery.stop()
        servers.stop()
        self.assertEqual(world.network.getDelayedCalls(), [])
        self.assertEqual(world.network.open, set(), "something is left open")


def _shown(endpoints: Collection[Endpoint], port: int | None) -> str:
    several = len({endpoint.address.port for endpoint in endpoints}) > 1
    parts = []
    for endpoint in endpoints:
        host, number = endpoint.address
        share = "" if endpoint.share == 1.0 else f"*{endpoint.share:.2f}"
        parts.append(f"{host}:{number}{share}" if several else f"{host}{share}")
    return " ".join(sorted(parts))


def _add(number: int, scenario: Scenario) -> None:
    def test(self: ScenarioTests) -> None:
        self.run_scenario(scenario)

    test.__doc__ = scenario.what
    setattr(ScenarioTests, f"test_{number:02}", test)


for _number, _scenario in enumerate(SCENARIOS, 1):
    _add(_number, _scenario)
