"""Active checks: what is asked, what counts, and that it takes no slot."""

from __future__ import annotations

import random
import socket
from typing import Any

from strictproxy.config.model import CheckConfig, PodConnections
from strictproxy.snapshot import PodCondition
from tests.harness import ProxyTestCase, ScriptedPod, Wire, request, response


class CheckTests(ProxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        # Every pod is checked half an interval after it came, then exactly every interval.
        self.patch(random, "random", lambda: 0.5)

    def conditions(self) -> list[PodCondition]:
        return [pod.condition for pod in self.upstream.snapshot().pods]

    async def asked(self, pod: ScriptedPod, number: int) -> Wire:
        """Return the connection that a pod's check number so many came by."""
        await self.settled(lambda: len(pod.connections) > number, "a check has come")
        wire = pod.connections[number]
        await wire.has(b"\r\n\r\n")
        return wire

    async def round(self, number: int, *answers: bytes) -> None:
        """Let one check of each pod be asked and answered."""
        self.clock.advance(2.5 if number == 0 else 5.0)
        for pod, answer in zip(self.pods, answers, strict=True):
            wire = await self.asked(pod, number)
            self.assertTrue(wire.received.startswith(b"GET /health HTTP/1.1\r\n"))
            wire.send(answer)
            await wire.end()
        # Twisted's client says what came a turn later.
        timers = len(self.pods)
        await self.settled(
            lambda: (
                len(
                    [
                        c
                        for c in self.clock.getDelayedCalls()
                        if c.getTime() > self.clock.seconds() + 4
                    ]
                )
                >= timers
            ),
            "the next checks are due",
        )

    async def test_http(self) -> None:
        """Three bad answers in a row put a pod aside, two good ones bring it back."""
        self.start(pods=2, check=CheckConfig("/health", body="fine"))
        good, bad = response(b"all fine"), response(b"all fine", status="500 No")
        ready, unhealthy = PodCondition.READY, PodCondition.UNHEALTHY
        script = [
            (bad, ready), (bad, ready), (good, ready),
            (bad, ready), (response(b"ill"), ready), (bad, unhealthy),
            (good, unhealthy), (bad, unhealthy), (good, unhealthy), (good, ready),
        ]  # fmt: skip
        for number, (answer, expected) in enumerate(script):
            await self.round(number, answer, good)
            self.assertEqual(self.conditions(), [expected, ready], number)
        self.assertEqual(self.counts(), (0, 0))

    async def test_not_by_trial(self) -> None:
        """A pod that checks took for down is not tried by requests, however long it is."""
        self.start(pods=2, check=CheckConfig("/health", fall=1))
        bad = response(status="503 No")
        await self.round(0, bad, response())
        snapshot = self.upstream.snapshot().pods[0]
        self.assertEqual(snapshot.condition, PodCondition.UNHEALTHY)
        self.assertIsNone(snapshot.trial_in)
        self.assertEqual(snapshot.last_error, "its check failed: it answered with 503")
        for number in range(1, 8):
            await self.round(number, bad, response())
        self.assertEqual(self.conditions()[0], PodCondition.UNHEALTHY)

    async def test_never_all(self) -> None:
        """Where every check fails, pods stay: they may not be the problem."""
        self.start(pods=2, check=CheckConfig("/health", fall=1))
        bad = response(status="503 No")
        for number in range(3):
            await self.round(number, bad, bad)
        self.assertEqual(sorted(c.value for c in self.conditions()), ["ready", "unhealthy"])

    async def test_takes_no_slot(self) -> None:
        """A pod whose slots are all taken is checked all the same."""
        self.start(pods=1, check=CheckConfig("/health"))
        client = await self.client(request("/work"))
        await self.settled(lambda: self.counts() == (1, 0))
        busy = await self.pods[0].connection()
        await busy.has(b"/work")
        await self.round_of_one(1)
        busy.send(response(b"done"))
        await client.has(b"done")

    async def round_of_one(self, number: int) -> None:
        self.clock.advance(2.5)
        wire = await self.asked(self.pods[0], number)
        self.assertEqual(self.counts(), (1, 0))
        wire.send(response())
        await wire.end()

    async def test_timeout(self) -> None:
        """A pod that does not answer in time has failed its check."""
        self.start(pods=2, check=CheckConfig("/health", fall=1))
        self.clock.advance(2.5)
        good = await self.asked(self.pods[1], 0)
        good.send(response())
        await good.end()
        await self.asked(self.pods[0], 0)
        self.clock.advance(2.0)
        await self.settled(lambda: self.conditions()[0] is PodCondition.UNHEALTHY)
        error = self.upstream.snapshot().pods[0].last_error
        self.assertEqual(error, "its check failed: no answer in 2 s")

    async def test_endless_answer(self) -> None:
        """An answer that is too long is a bad one."""
        self.start(pods=2, check=CheckConfig("/health", fall=1))
        self.clock.advance(2.5)
        (await self.asked(self.pods[1], 0)).send(response())
        wire = await self.asked(self.pods[0], 0)
        wire.send(response(b"x" * 70_000))
        await self.settled(lambda: self.conditions()[0] is PodCondition.UNHEALTHY)
        self.assertIn("longer than", self.upstream.snapshot().pods[0].last_error or "")

    async def test_tcp(self) -> None:
        """To connect may be enough; where nobody listens it fails."""
        self.start(pods=2, check=CheckConfig(fall=2))
        await self.pods[0].port.stopListening()
        for _ in range(2):
            before = len(self.pods[1].connections)
            self.clock.advance(5.0)
            await self.settled(lambda before=before: len(self.pods[1].connections) > before)
            # The kernel refuses at once, Twisted says so a turn later.
            await self.settled(
                lambda: not self.upstream._checker._checks[self.pods[0].address]._running
            )  # type: ignore[union-attr]
        self.assertEqual(self.conditions(), [PodCondition.UNHEALTHY, PodCondition.READY])

    async def test_pods_that_leave(self) -> None:
        """A pod that has left is not checked any more, not even to the end."""
        self.start(pods=2, check=CheckConfig("/health"))
        self.clock.advance(2.5)
        wire = await self.asked(self.pods[0], 0)
        (await self.asked(self.pods[1], 0)).send(response())
        self.publish([self.pods[1].address])
        await wire.end()
        self.assertEqual(len(self.upstream.snapshot().pods), 1)


class DeathTests(ProxyTestCase):
    """What a dead machine does cannot be tried here; that the kernel is told to look can be."""

    async def options(self, connections: PodConnections) -> list[int]:
        self.start(connections=connections)
        client = await self.client(request())
        pod = await self.pods[0].connection()
        (connection,) = self.upstream.pool._open
        transport: Any = connection.transport
        found = [transport.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT):
            found.append(transport.socket.getsockopt(socket.IPPROTO_TCP, option))
        pod.send(response())
        await client.has(b"\r\n\r\n")
        return found

    async def test_on(self) -> None:
        """The kernel looks after half of the time, three times, and gives up after all of it."""
        self.assertEqual(await self.options(PodConnections()), [1, 30, 10, 60_000])

    async def test_off(self) -> None:
        """Nothing is set if it is not wanted."""
        found = await self.options(PodConnections(dead_after=None))
        self.assertEqual((found[0], found[3]), (0, 0))
