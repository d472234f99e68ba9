"""From EndpointSlices to pods."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from strictproxy.config.model import Family
from strictproxy.discovery.kubernetes.slices import BadObject, Slices
from tests.fake_kubernetes import make_endpoint, make_slice


def versioned(item: dict[str, Any], version: str) -> dict[str, Any]:
    return {**item, "metadata": {**item["metadata"], "resourceVersion": version}}


class SlicesTests(SynchronousTestCase):
    def shown(self, slices: Slices) -> list[str]:
        return sorted(
            f"{endpoint.address}{' terminating' * endpoint.terminating}"
            + (f" limit {endpoint.limit}" if endpoint.limit else "")
            for endpoint in slices.endpoints()
        )

    def of(
        self,
        *items: dict[str, Any],
        port: str | int | None = "http",
        family: Family = Family.AUTO,
    ) -> list[str]:
        slices = Slices(port, family)
        slices.replace(items, "1")
        return self.shown(slices)

    def test_conditions(self) -> None:
        """Ready pods count, terminating ones are marked, others are not there; unsaid is good."""
        item = make_slice(
            "a",
            [
                make_endpoint("10.0.0.1"),
                make_endpoint("10.0.0.2", ready=False),
                make_endpoint("10.0.0.3", ready=False, terminating=True),
                make_endpoint("10.0.0.4", ready=None),
                {"addresses": ["10.0.0.5"]},
            ],
        )
        self.assertEqual(
            self.of(item),
            ["10.0.0.1:8080", "10.0.0.3:8080 terminating", "10.0.0.4:8080", "10.0.0.5:8080"],
        )

    def test_merged(self) -> None:
        """Slices make one set; a pod in two of them is as good as the better one says."""
        self.assertEqual(
            self.of(
                make_slice("a", [make_endpoint("10.0.0.1"), make_endpoint("10.0.0.2")]),
                make_slice("b", [make_endpoint("10.0.0.2"), make_endpoint("10.0.0.3")]),
                make_slice("c", [make_endpoint("10.0.0.3", terminating=True)]),
                make_slice("d", [make_endpoint("10.0.0.4", terminating=True)]),
                make_slice("e", [make_endpoint("10.0.0.4")]),
            ),
            ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080", "10.0.0.4:8080"],
        )

    def test_families(self) -> None:
        """A pod with two addresses is one pod, unless it is asked for otherwise."""
        items = (
            make_slice("a", [make_endpoint("10.0.0.1", pod="x")]),
            make_slice(
                "b",
                [make_endpoint("fd00::1", pod="x"), make_endpoint("fd00::2", pod="y")],
                addressType="IPv6",
            ),
        )
        v4, v6, other = "10.0.0.1:8080", "[fd00::1]:8080", "[fd00::2]:8080"
        self.assertEqual(self.of(*items), [v4, other])
        self.assertEqual(self.of(*items, family=Family.IPV4), [v4])
        self.assertEqual(self.of(*items, family=Family.IPV6), [v6, other])
        self.assertEqual(self.of(*items, family=Family.BOTH), [v4, v6, other])

    def test_ports(self) -> None:
        """The port is found by its name, by its number, or because it is the only one."""
        one = make_slice("a", [make_endpoint("10.0.0.1")])
        several = make_slice(
            "b",
            [make_endpoint("10.0.0.2")],
            ports=[
                {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "http", "port": 80},
                {"name": "", "port": 90, "protocol": "TCP"},
            ],
        )
        self.assertEqual(self.of(one, port=None), ["10.0.0.1:8080"])
        self.assertEqual(self.of(one, port=8080), ["10.0.0.1:8080"])
        self.assertEqual(self.of(several, port="http"), ["10.0.0.2:80"])
        self.assertEqual(self.of(several, port=90), ["10.0.0.2:90"])
        for port, problem in (
            (None, "the pods have several ports, say which: 90, http"),
            ("grpc", "the pods have no port 'grpc'; they have 90, http"),
        ):
            slices = Slices(port, Family.AUTO)
            slices.replace([versioned(several, "1")], "1")
            self.assertEqual(self.shown(slices), [])
            self.assertEqual(slices.problem(), problem)
            slices.apply("MODIFIED", versioned(several, "2"))
            self.assertEqual(slices.problem(), problem)
            slices.apply("DELETED", versioned(several, "3"))
            self.assertIsNone(slices.problem())
        slices = Slices(None, Family.AUTO)
        slices.replace([versioned(several, "1"), versioned(one, "1")], "1")
        self.assertEqual(self.shown(slices), ["10.0.0.1:8080"])
        self.assertIsNone(slices.problem())

    def test_limit(self) -> None:
        """An annotation says the limit of a slice's pods; nonsense is passed over."""
        for written, limit in (("4", " limit 4"), ("0", ""), ("many", ""), ("-1", "")):
            item = make_slice("a", [make_endpoint("10.0.0.1")])
            item["metadata"]["annotations"] = {"strictproxy/limit": written}
            self.assertEqual(self.of(item), [f"10.0.0.1:8080{limit}"])
        item["metadata"]["annotations"] = None
        self.assertEqual(self.of(item), ["10.0.0.1:8080"])

    def test_events(self) -> None:
        """Events change the set; late and repeated ones do not."""
        slices = Slices("http", Family.AUTO)
        a1 = versioned(make_slice("a", [make_endpoint("10.0.0.1")]), "5")
        a2 = versioned(make_slice("a", [make_endpoint("10.0.0.2")]), "11")
        b = versioned(make_slice("b", [make_endpoint("10.0.0.9")]), "12")
        slices.replace([a1], "10")
        slices.apply("MODIFIED", a2)
        self.assertEqual(self.shown(slices), ["10.0.0.2:8080"])
        slices.apply("MODIFIED", a1)
        slices.apply("MODIFIED", a2)
        self.assertEqual(self.shown(slices), ["10.0.0.2:8080"])
        slices.apply("ADDED", b)
        slices.apply("DELETED", versioned(a2, "13"))
        slices.apply("MODIFIED", a2)
        self.assertEqual(self.shown(slices), ["10.0.0.9:8080"])
        # One that was deleted before the list was made is not in it.
        slices.apply("ADDED", versioned(make_slice("c", [make_endpoint("10.0.0.7")]), "9"))
        self.assertEqual(self.shown(slices), ["10.0.0.9:8080"])
        slices.apply("ADDED", versioned(make_slice("d", [make_endpoint("10.0.0.8")]), "opaque"))
        self.assertEqual(self.shown(slices), ["10.0.0.8:8080", "10.0.0.9:8080"])

    def test_nonsense(self) -> None:
        """What is no EndpointSlice changes nothing."""
        slices = Slices("http", Family.AUTO)
        slices.replace([make_slice("a", [make_endpoint("10.0.0.1")])], "1")
        bad: list[Any] = [
            {},
            {"metadata": None},
            make_slice("b", [{"addresses": []}]),
            make_slice("b", [{"addresses": ["nonsense"]}]),
            make_slice("b", [], ports=[{"name": "http"}]),
            make_slice("b", [], ports=[7]),
        ]
        for item in bad:
            with self.assertRaises(BadObject):
                slices.apply("ADDED", item)
            with self.assertRaises(BadObject):
                slices.replace([item], "2")
        self.assertEqual(self.shown(slices), ["10.0.0.1:8080"])
        slices.replace([{**make_slice("a", []), "endpoints": None, "ports": None}], "2")
        self.assertEqual(self.shown(slices), [])
