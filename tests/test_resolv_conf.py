"""What resolv.conf says, and what the records of an answer mean."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.names import dns
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.discovery.records import addresses_of, aliases_of, endpoints_of, targets_of
from strictproxy.discovery.resolv_conf import ResolvConf, parse


class ParseTests(SynchronousTestCase):
    def test_of_a_pod(self) -> None:
        """What kubelet writes."""
        conf = parse(
            "search media.svc.cluster.local svc.cluster.local cluster.local\n"
            "nameserver 10.96.0.10\n"
            "options ndots:5\n"
        )
        self.assertEqual(
            conf,
            ResolvConf(
                (("10.96.0.10", 53),),
                ("media.svc.cluster.local", "svc.cluster.local", "cluster.local"),
                5,
            ),
        )
        self.assertEqual(
            conf.candidates("transcode"),
            [
                "transcode.media.svc.cluster.local",
                "transcode.svc.cluster.local",
                "transcode.cluster.local",
                "transcode",
            ],
        )
        self.assertEqual(conf.candidates("a.b.c.d.e.f")[0], "a.b.c.d.e.f")
        self.assertEqual(conf.candidates("transcode."), ["transcode"])

    def test_oddities(self) -> None:
        """Comments, repeated and senseless lines, IPv6, more servers than count."""
        conf = parse(
            "# comment\n; another\n\nnameserver\nnameserver nonsense\n"
            "nameserver fd00::53 # primary\n"
            "nameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n"
            "domain first.example\nsearch second.example.\nsortlist 1.2.3.4\n"
            "options rotate ndots:99 timeout:3 attempts:x attempts:1\n"
        )
        self.assertEqual(conf.servers, (("fd00::53", 53), ("10.0.0.1", 53), ("10.0.0.2", 53)))
        self.assertEqual(conf.search, ("second.example",))
        self.assertEqual((conf.ndots, conf.timeouts), (15, (3.0,)))

    def test_defaults(self) -> None:
        """Nothing at all means this machine's own server; a root domain completes nothing."""
        conf = parse("")
        self.assertEqual((conf.servers, conf.ndots), ((("127.0.0.1", 53),), 1))
        self.assertEqual(parse("search .").candidates("a"), ["a"])
        self.assertEqual(parse("options timeout:0 attempts:0").timeouts, (1.0,))
        self.assertEqual(parse("options attempts:9").timeouts, (1.0,) * 5)

    @given(st.text(max_size=200))
    def test_any_text(self, text: str) -> None:
        """There is always a server and a name to ask for."""
        conf = parse(text)
        self.assertTrue(conf.servers)
        self.assertIn("pods", conf.candidates("pods"))


class RecordsTests(SynchronousTestCase):
    def test_aliases_in_a_circle(self) -> None:
        """A chain that bites its tail ends."""
        records = [
            dns.RRHeader("a", dns.CNAME, payload=dns.Record_CNAME("b")),
            dns.RRHeader("b", dns.CNAME, payload=dns.Record_CNAME("A")),
        ]
        self.assertEqual(aliases_of("A", records), {"a", "b"})
        self.assertEqual(addresses_of("a", records), [])

    def test_no_target(self) -> None:
        """A target of "." says that there is no such service (RFC 2782)."""
        records = [dns.RRHeader("s", dns.SRV, payload=dns.Record_SRV(0, 0, 0, b"."))]
        records.append(dns.RRHeader("x", dns.SRV, payload=dns.Record_SRV(0, 0, 80, b"a")))
        self.assertEqual(targets_of("s", records), [])

    def test_weights(self) -> None:
        """Only weights that differ make a difference; an address given twice is one pod."""
        for weights, shares in (((0, 0), [1.0, 1.0]), ((7, 7), [1.0, 1.0]), ((0, 9), [0.0, 1.0])):
            records = [
                dns.RRHeader("s", dns.SRV, payload=dns.Record_SRV(0, weight, 80, name))
                for weight, name in zip(weights, ("a", "b"), strict=True)
            ]
            targets = targets_of("s", records)
            pods = endpoints_of((target, [target.host]) for target in [*targets, *targets])
            self.assertEqual([pod.share for pod in sorted(pods)], shares)
