"""When a new address set is believed."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from strictproxy.discovery.stability import Stability, Verdict
from strictproxy.interfaces import Endpoint
from strictproxy.scheduling import Address

A, B = Endpoint(Address("10.0.0.1", 80)), Endpoint(Address("10.0.0.2", 80))


class StabilityTests(SynchronousTestCase):
    def settled(self, *addresses: Endpoint) -> Stability:
        stability = Stability(5)
        for _ in range(6):
            stability.answer(addresses, 1.0)
        return stability

    def test_believes_after_five_more(self) -> None:
        """A set is in force when five lookups have agreed with the one that brought it up."""
        stability = Stability(5)
        verdicts = [stability.answer([A, B], float(n)) for n in range(6)]
        self.assertEqual(verdicts, [Verdict.CANDIDATE] + [Verdict.AGREED] * 4 + [Verdict.ACCEPTED])
        state = stability.state()
        self.assertEqual((state.in_force, state.since), (frozenset({A, B}), 5.0))
        self.assertEqual(stability.answer([A, B], 9.0), Verdict.SAME)

    def test_order_does_not_matter(self) -> None:
        """Shuffled and repeated answers agree."""
        stability = self.settled(A, B)
        self.assertEqual(stability.answer([B, A, B], 2.0), Verdict.SAME)

    def test_one_that_differs_ends_the_round(self) -> None:
        """Even an answer that agrees with the set in force does not agree with the candidate."""
        stability = self.settled(A)
        self.assertEqual(stability.answer([B], 2.0), Verdict.CANDIDATE)
        self.assertEqual(stability.answer([A], 3.0), Verdict.REJECTED)
        self.assertEqual(stability.in_force, frozenset({A}))
        self.assertEqual(stability.state().rejections, 1)

    def test_empty_is_an_answer(self) -> None:
        """No pod at all is believed after the same five lookups."""
        stability = self.settled(A)
        for _ in range(5):
            stability.answer([], 2.0)
            self.assertEqual(stability.in_force, frozenset({A}))
        self.assertEqual(stability.answer([], 2.0), Verdict.ACCEPTED)
        self.assertEqual(stability.in_force, frozenset())

    def test_failure_changes_nothing(self) -> None:
        """A failed lookup ends a round, and nothing else; the error can be seen."""
        stability = self.settled(A)
        self.assertEqual(stability.no_answer("timeout"), Verdict.UNKNOWN)
        self.assertEqual(stability.state().last_error, "timeout")
        stability.answer([B], 2.0)
        self.assertEqual(stability.no_answer("SERVFAIL"), Verdict.REJECTED)
        self.assertEqual(stability.in_force, frozenset({A}))
        stability.answer([A], 2.0)
        self.assertIsNone(stability.state().last_error)

    def test_giving_up(self) -> None:
        """Given up, a set is empty, and needs five more to be believed again."""
        stability = self.settled(A)
        stability.answer([B], 2.0)
        self.assertTrue(stability.give_up(3.0))
        self.assertFalse(stability.give_up(4.0))
        state = stability.state()
        self.assertEqual((state.in_force, state.since, state.candidate), (frozenset(), 3.0, None))
        self.assertEqual(stability.answer([A], 5.0), Verdict.CANDIDATE)
        self.assertFalse(Stability(5).give_up(1.0))
