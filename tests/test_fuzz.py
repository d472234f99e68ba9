"""
Broken bytes from both sides: no crash, no hang, no leaked slot.

Mutations of the conformance cases, from clients and from pods. Each failure
names its seed; FUZZ_SEED repeats one, FUZZ_SECONDS makes the run longer.
"""

from __future__ import annotations

import os
import random
import time

from twisted.internet.task import deferLater

from tests.harness import ProxyTestCase, reactor
from tests.test_conformance import OK, PROBE, REQUESTS, RESPONSES

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
SEED = os.environ.get("FUZZ_SEED")
#: What tends to matter to parsers.
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b",", b"0\r\n\r\n", b"ffffffff\r\n",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"HTTP/1.1",
    b"Expect: 100-continue\r\n", b"Upgrade: x\r\nConnection: upgrade\r\n", b"HTTP/1.1 100 X\r\n\r\n", b"\xff",
]  # fmt: skip


def mutate(numbers: random.Random, data: bytes) -> bytes:
    """Change a few places of a message."""
    changed = bytearray(data[:20_000])
    for _ in range(numbers.randint(0, 4)):
        place = numbers.randrange(len(changed) + 1)
        kind = numbers.randrange(5)
        if kind == 0:
            changed[place:place] = numbers.choice(TOKENS)
        elif kind == 1:
            del changed[place : place + numbers.randint(1, 8)]
        elif kind == 2 and place < len(changed):
            changed[place] ^= 1 << numbers.randrange(8)
        elif kind == 3:
            changed[place:place] = changed[place : place + numbers.randint(1, 30)]
        else:
            del changed[place:]
    return bytes(changed)


class FuzzTests(ProxyTestCase):
    timeout = SECONDS + 60

    async def turn(self, count: int = 3) -> None:
        for _ in range(count):
            await deferLater(reactor, 0)

    async def play(self, seed: int) -> None:
        """Several connections, each with broken bytes from one side or both."""
        numbers = random.Random(seed)
        self.start(pods=2, limit=2)
        for _ in range(6):
            client = await self.client()
            for _ in range(numbers.randint(1, 3)):
                request = numbers.choice(REQUESTS).data if numbers.random() < 0.7 else PROBE
                if numbers.random() < 0.7:
                    request = mutate(numbers, request)
                cut = numbers.randrange(len(request) + 1)
                client.send(request[:cut])
                await self.turn()
                if not client.closed:
                    client.send(request[cut:])
                await self.turn()
            for pod in self.pods:
                for wire in pod.connections:
                    if wire.closed or not wire.received or wire.transport is None:
                        continue
                    answer = numbers.choice(RESPONSES).data if numbers.random() < 0.7 else OK
                    wire.send(mutate(numbers, answer) if numbers.random() < 0.5 else answer)
                    if numbers.random() < 0.2:
                        wire.close()
            await self.turn()
            if numbers.random() < 0.5 and not client.closed:
                client.close() if numbers.random() < 0.5 else client.reset()
        self.clock.advance(numbers.choice([0.0, 1.0, 100.0]))
        await self.turn()
        # The harness checks that every count is zero and nothing is left.
        await self.shut_down()
        self.pods, self.ports, self.wires = [], [], []

    async def test_broken_bytes(self) -> None:
        """Whatever comes, the proxy stays in order."""
        began = time.monotonic()
        seed = int(SEED) if SEED else random.SystemRandom().randrange(2**32)
        rounds = 0
        while time.monotonic() - began < SECONDS:
            try:
                await self.play(seed + rounds)
            except Exception as error:
                raise AssertionError(f"FUZZ_SEED={seed + rounds}: {error}") from error
            logged = self.flushLoggedErrors()
            self.assertEqual(logged, [], f"FUZZ_SEED={seed + rounds}")
            rounds += 1
            if SEED:
                break
        print(f"\nfuzz: {rounds} rounds of 6 connections, first seed {seed}")
