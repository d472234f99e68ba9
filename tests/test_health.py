"""Which pods are trusted with requests: examples, and what must hold whatever happens."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.scheduling import Address
from strictproxy.scheduling.health import Health, HealthPolicy, Standing

A, B, C, D = (Address(f"10.0.0.{number}", 80) for number in range(1, 5))
ALL = (A, B, C, D)


class HealthTests(SynchronousTestCase):
    def make(self, policy: HealthPolicy | None = None) -> Health:
        health = Health(policy or HealthPolicy())
        health.set_pods(ALL, 0.0, first=True)
        return health

    def standing(self, health: Health, address: Address) -> Standing:
        record = health.record(address)
        assert record is not None
        return record.standing

    def test_unreachable(self) -> None:
        """One failed connection puts a pod aside; a connection alone brings it back from trial."""
        health = self.make()
        self.assertTrue(health.unreachable(A, 10.0, "refused"))
        self.assertTrue(health.is_aside(A))
        self.assertFalse(health.unreachable(A, 10.1, "refused"))
        self.assertEqual(health.next_change(11.0), 15.0)
        self.assertFalse(health.advance(14.9))
        self.assertTrue(health.advance(15.0))
        self.assertEqual((health.is_aside(A), health.limit(A, 8, 15.0)), (False, 1))
        self.assertTrue(health.reached(A))
        self.assertEqual(health.limit(A, 8, 15.0), 8)
        self.assertIsNone(health.next_change(15.0))
        record = health.record(A)
        assert record is not None
        self.assertEqual((record.error, record.failed_at), ("refused", 10.0 + 0.1))

    def test_failures_in_a_row(self) -> None:
        """Other failures need to be several in a row; a success in between starts over."""
        health = self.make()
        for _ in range(2):
            self.assertFalse(health.failed(A, 0.0, "cut off"))
        self.assertFalse(health.succeeded(A))
        for _ in range(2):
            self.assertFalse(health.failed(A, 0.0, "cut off"))
        self.assertTrue(health.failed(A, 0.0, "cut off"))
        health.advance(5.0)
        self.assertFalse(health.reached(A), "a connection proves nothing about answers")
        self.assertTrue(health.succeeded(A))

    def test_longer_each_time(self) -> None:
        """The time aside doubles up to its bound, and starts over after a success."""
        health = self.make(HealthPolicy(aside=5.0, max_aside=30.0))
        now, times = 0.0, []
        for _ in range(5):
            health.unreachable(A, now, "refused")
            until = health.next_change(now)
            assert until is not None
            times.append(until - now)
            now = until
            health.advance(now)
        self.assertEqual(times, [5.0, 10.0, 20.0, 30.0, 30.0])
        health.reached(A)
        health.unreachable(A, now, "refused")
        self.assertEqual(health.next_change(now), now + 5.0)

    def test_a_late_success_means_nothing(self) -> None:
        """An answer to what was sent before a pod was put aside does not bring it back."""
        health = self.make()
        health.unreachable(A, 0.0, "refused")
        self.assertFalse(health.succeeded(A))
        self.assertFalse(health.failed(A, 0.0, "cut off"))
        self.assertTrue(health.is_aside(A))

    def test_never_too_many_nor_the_last(self) -> None:
        """A share of the pods at most, and never the last one."""
        health = self.make()
        self.assertEqual(
            [health.unreachable(address, 0.0, "refused") for address in ALL],
            [True, True, False, False],
        )
        health = self.make(HealthPolicy(max_share=1.0))
        self.assertEqual(
            [health.unreachable(address, 0.0, "refused") for address in ALL],
            [True, True, True, False],
        )
        health.set_pods([D], 1.0)
        self.assertFalse(health.unreachable(D, 0.0, "refused"))

    def test_address_used_again(self) -> None:
        """A pod that left is forgotten; the next one at its address starts clean."""
        health = self.make()
        health.unreachable(A, 0.0, "refused")
        health.set_pods([B, C], 1.0)
        self.assertFalse(health.unreachable(A, 1.0, "refused"))
        self.assertEqual(health.limit(A, 3, 1.0), 3)
        health.set_pods(ALL, 2.0)
        self.assertEqual(self.standing(health, A), Standing.HEALTHY)

    def test_checks(self) -> None:
        """What active checks have put aside only they bring back, and without a trial."""
        health = self.make()
        self.assertTrue(health.check_failed(A, 0.0, "status 500"))
        self.assertFalse(health.check_failed(A, 1.0, "status 500"))
        self.assertIsNone(health.next_change(0.0))
        self.assertFalse(health.advance(1000.0))
        self.assertFalse(health.succeeded(A))
        self.assertTrue(health.check_passed(A))
        self.assertFalse(health.check_passed(A))
        self.assertFalse(health.check_failed(Address("elsewhere", 1), 0.0, "status 500"))

    def test_all_that_is_left(self) -> None:
        """Where only pods that are aside remain, they are tried at once."""
        health = self.make()
        health.unreachable(A, 0.0, "refused")
        health.check_failed(B, 0.0, "status 500")
        health.set_pods([A, B], 1.0)
        self.assertEqual(self.standing(health, A), Standing.TRIAL)
        self.assertEqual(self.standing(health, B), Standing.TRIAL)

    def test_slow_start(self) -> None:
        """A new pod's limit grows; those that were there when we started have all of theirs."""
        health = Health(HealthPolicy(slow_start=10.0))
        health.set_pods([A], 100.0, first=True)
        health.set_pods([A, B], 200.0)
        self.assertEqual(health.limit(A, 4, 200.0), 4)
        self.assertEqual(
            [health.limit(B, 4, 200.0 + age) for age in (0, 2.5, 2.6, 5.1, 9, 10)],
            [1, 1, 2, 3, 4, 4],
        )
        self.assertEqual(health.next_change(205.0), 206.0)
        self.assertIsNone(health.next_change(210.0))


class HealthMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.policy = HealthPolicy(failures=2, aside=1.0, max_aside=8.0)
        self.health = Health(self.policy)
        self.pods: set[Address] = set()

    @rule(pods=st.sets(st.sampled_from(ALL)))
    def set_pods(self, pods: set[Address]) -> None:
        self.pods = pods
        self.health.set_pods(sorted(pods), self.now)

    @rule(address=st.sampled_from(ALL), event=st.sampled_from(("unreachable", "failed", "check")))
    def something_fails(self, address: Address, event: str) -> None:
        before = self.aside()
        call = {"unreachable": self.health.unreachable, "failed": self.health.failed}
        changed = call.get(event, self.health.check_failed)(address, self.now, "x")
        assert changed == (self.aside() != before)

    @rule(address=st.sampled_from(ALL), event=st.sampled_from(("reached", "succeeded", "check")))
    def something_works(self, address: Address, event: str) -> None:
        call = {"reached": self.health.reached, "succeeded": self.health.succeeded}
        call.get(event, self.health.check_passed)(address)

    @rule(seconds=st.floats(0.1, 10))
    def pass_time(self, seconds: float) -> None:
        due = self.health.next_change(self.now)
        self.now += seconds
        changed = self.health.advance(self.now)
        assert changed == (due is not None and due <= self.now)

    def aside(self) -> set[Address]:
        return {address for address in ALL if self.health.is_aside(address)}

    @invariant()
    def promises(self) -> None:
        aside = self.aside()
        assert aside <= self.pods
        assert not self.pods or aside != self.pods, "the last pod is aside"
        for address in self.pods - aside:
            assert 1 <= self.health.limit(address, 3, self.now) <= 3
        for address in aside:
            record = self.health.record(address)
            assert record is not None
            assert record.until <= self.now + self.policy.max_aside


class HealthPromises(HealthMachine.TestCase):  # type: ignore[misc,name-defined]
    """Whatever happens, the last pod stays, and nobody is aside for longer than the bound."""

    settings = settings(max_examples=200, stateful_step_count=40, deadline=None)

    def test_promises(self) -> None:
        """No sequence of events breaks a promise."""
        self.runTest()
