"""When writes are kept until the reactor's turn ends, and what they may not be overtaken by."""

from __future__ import annotations

from typing import cast

from twisted.internet.task import Clock
from twisted.internet.tcp import Connection
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.http.outbox import Outbox


class Socket:
    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.room: int | None = None
        self.broken = False

    def send(self, data: bytes) -> int:
        if self.broken:
            raise BrokenPipeError
        taken = data if self.room is None else data[: self.room]
        self.sent.append(taken)
        return len(taken)


class Transport:
    """As much of a Connection as an Outbox sees."""

    def __init__(self, clock: Clock) -> None:
        self.reactor = clock
        self.connected = True
        self.socket = Socket()
        self.left: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.left.append(data)


class OutboxTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.outbox = Outbox()
        self.transports = [Transport(self.clock) for _ in range(8)]

    def keep(self, number: int, data: bytes = b"x") -> bool:
        return self.outbox.keep(cast(Connection, self.transports[number]), data)

    def under_load(self) -> None:
        """Let a turn with many writes come by that is counted."""
        for _ in range(200):
            self.keep(0)
        self.clock.advance(0)
        self.assertEqual(self.transports[0].socket.sent, [])

    def test_writes_few_and_far_between_are_never_kept(self) -> None:
        for _ in range(1000):
            self.assertFalse(self.keep(0))
            self.clock.advance(0)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_under_load_they_are_kept_until_the_turn_ends_in_their_order(self) -> None:
        self.under_load()
        for number in (3, 1, 2):
            self.assertTrue(self.keep(number, b"a%d" % number))
        self.assertTrue(self.keep(3, b"more"))
        self.assertEqual([t.socket.sent for t in self.transports[1:4]], [[], [], []])
        self.clock.advance(0)
        self.assertEqual(
            [t.socket.sent for t in self.transports[1:4]], [[b"a1"], [b"a2"], [b"a3more"]]
        )
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_one_quiet_turn_ends_it(self) -> None:
        self.under_load()
        self.assertTrue(self.keep(1))
        self.clock.advance(0)
        self.assertFalse(self.keep(1))

    def test_long_ones_are_not_kept_but_do_not_overtake(self) -> None:
        self.under_load()
        long = bytes(100_000)
        self.assertFalse(self.keep(1, long))
        self.assertTrue(self.keep(2, b"first"))
        self.assertTrue(self.keep(2, long))
        self.clock.advance(0)
        self.assertEqual(self.transports[2].socket.sent, [b"first" + long])

    def test_flush_sends_one_transports_at_once_and_once(self) -> None:
        self.under_load()
        self.keep(1, b"one")
        self.keep(2, b"two")
        for _ in range(2):
            self.outbox.flush(cast(Connection, self.transports[1]))
        self.assertEqual(self.transports[1].socket.sent, [b"one"])
        self.assertEqual(self.transports[2].socket.sent, [])
        self.clock.advance(0)
        self.assertEqual(self.transports[1].socket.sent, [b"one"])

    def test_what_the_kernel_does_not_take_is_left_to_the_transport(self) -> None:
        self.under_load()
        self.transports[1].socket.room = 2
        self.transports[2].socket.broken = True
        for number in (1, 2, 3):
            self.keep(number, b"abc")
        self.transports[3].connected = False
        self.clock.advance(0)
        self.assertEqual(self.transports[1].left, [b"c"])
        self.assertEqual(self.transports[2].left, [b"abc"])
        self.assertEqual((self.transports[3].left, self.transports[3].socket.sent), ([], []))
