"""Pods that fail are put aside, tried and brought back; pods that leave finish what they have."""

from __future__ import annotations

from strictproxy.config.model import Match, RouteConfig
from strictproxy.scheduling import Address
from strictproxy.snapshot import PodCondition
from tests.harness import ProxyTestCase, request, response


class PodHealthTests(ProxyTestCase):
    def conditions(self) -> list[PodCondition]:
        return [pod.condition for pod in self.upstream.snapshot().pods]

    async def test_dead_pod_costs_one_failure_a_trial(self) -> None:
        """A pod that refuses connections is put aside, and tried by one request later on."""
        self.start(pods=2, limit=2)
        await self.pods[0].port.stopListening()
        for number in range(4):
            client = await self.client(request(f"/{number}"))
            pod = await self.pods[1].connection()
            await pod.has(b"/%d" % number)
            pod.send(response(b"ok"))
            await client.has(b"\r\n\r\nok")
        self.assertEqual([record.tries for record in self.records], [2, 1, 1, 1])
        self.assertEqual(self.conditions(), [PodCondition.UNHEALTHY, PodCondition.READY])
        self.assertEqual(self.upstream.snapshot().pods[0].trial_in, 5.0)
        self.clock.advance(5.0)
        self.assertEqual(self.conditions(), [PodCondition.TRIAL, PodCondition.READY])
        self.assertEqual(self.upstream.snapshot().slots, 3)
        client = await self.client(request("/trial"))
        await pod.has(b"/trial")
        pod.send(response(b"ok"))
        await client.has(b"\r\n\r\nok")
        self.assertEqual(self.records[-1].tries, 2)
        self.assertEqual(self.upstream.snapshot().pods[0].trial_in, 10.0)

    async def test_one_failure_a_trial_though_others_wait(self) -> None:
        """However many wait, a trial that fails costs one of them one refused connection."""
        self.start(pods=2, limit=2)
        await self.pods[0].port.stopListening()
        dead = self.pods[0].address
        tried: list[Address] = []
        connect = self.upstream.pool.connect
        self.patch(
            self.upstream.pool,
            "connect",
            lambda address: (tried.append(address), connect(address))[1],
        )
        for number in range(8):
            await self.client(request(f"/{number}"))
        await self.settled(lambda: self.counts() == (2, 6))
        before = tried.count(dead)
        self.assertLessEqual(before, 2)
        for trial, aside in enumerate((5.0, 10.0, 20.0), 1):
            self.clock.advance(aside)
            await self.settled(lambda trial=trial: tried.count(dead) >= before + trial)  # type: ignore[misc]
            await self.settled(lambda: self.counts() == (2, 6))
            self.assertEqual(tried.count(dead), before + trial)

    async def test_statuses_that_are_failures(self) -> None:
        """Answers that the route calls failures count; a good one starts over."""
        route = RouteConfig("all", Match(prefix="/"), "u", failures=frozenset({500}))
        self.start(pods=2, routes=[route])
        addresses = [pod.address for pod in self.pods]
        for status in ("500 No", "500 No", "200 OK", "500 No", "500 No", "500 No"):
            self.upstream.drain(addresses[1])
            client = await self.client(request())
            pod = await self.pods[0].connection()
            await pod.has(b"\r\n\r\n")
            pod.take()
            pod.send(response(b"ok", status=status))
            await client.has(b"\r\n\r\nok")
        self.upstream.undrain(addresses[1])
        self.assertEqual(self.conditions(), [PodCondition.UNHEALTHY, PodCondition.READY])
        self.assertEqual(self.upstream.snapshot().pods[0].last_error, "it answered with 500")

    async def test_drain(self) -> None:
        """A drained pod finishes what it has and gets nothing new, until it is drained no more."""
        self.start(pods=1)
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        self.assertTrue(self.upstream.drain(self.pods[0].address))
        self.assertFalse(self.upstream.drain(Address("10.9.9.9", 1)))
        pod.send(response(b"a"))
        await client.has(b"\r\n\r\na")
        client.send(request("/b"))
        await self.settled(lambda: self.counts() == (0, 1))
        self.assertEqual(self.conditions(), [PodCondition.DRAINED])
        self.assertTrue(self.upstream.undrain(self.pods[0].address))
        self.assertFalse(self.upstream.undrain(self.pods[0].address))
        await pod.has(b"/b")
        pod.send(response(b"b"))
        await client.has(b"\r\n\r\nb")

    async def test_gone_pod_ends_at_drain_timeout(self) -> None:
        """What runs on a pod that is gone ends by itself, or when its time is over."""
        self.start(pods=1, drain_timeout=60.0)
        client = await self.client(request("/a"))
        pod = await self.pods[0].connection()
        await pod.has(b"/a")
        self.publish([])
        self.assertEqual(self.conditions(), [PodCondition.REMOVED])
        self.clock.advance(59.0)
        self.assertEqual(self.counts(), (1, 0))
        self.clock.advance(1.0)
        await client.has(b"X-Strictproxy-Reason: pod_gone\r\n")
        self.assertEqual(self.counts(), (0, 0))

    async def test_pods_own_limit(self) -> None:
        """A pod may say how many requests it takes; nonsense is ignored."""
        self.start(pods=1, limit_header="X-Limit")
        client = await self.client(request())
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.send(response(b"ok", "X-Limit: 3"))
        await client.has(b"\r\n\r\nok")
        self.assertEqual(self.upstream.snapshot().slots, 3)
        pod.take()
        client.send(request())
        await pod.has(b"\r\n\r\n")
        pod.send(response(b"2k", "X-Limit: -1"))
        await client.has(b"\r\n\r\n2k")
        self.assertEqual(self.upstream.snapshot().slots, 3)
