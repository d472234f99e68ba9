"""The scheduler's behaviour in single examples; the machine has the combinations."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.errors import (
    LeaseReleasedTwice,
    LineFull,
    NoPods,
    PodsExhausted,
    WaitedTooLong,
)
from strictproxy.scheduling import Address, Hold, Lease, LeastHeap, Line, Pod, Scheduler, Ticket

A, B, C = (Address(name, 80) for name in "abc")


def make(limit: int = 1, pods: tuple[Address, ...] = (A, B), **settings: float) -> Scheduler:
    scheduler = Scheduler(
        limit,
        queue_size=int(settings.get("size", 100)),
        queue_timeout=settings.get("timeout", 10.0),
        no_pods_timeout=settings.get("no_pods", 3.0),
        now=0.0,
    )
    scheduler.set_pods(pods, 0.0)
    return scheduler


class SchedulerTests(SynchronousTestCase):
    def take(self, scheduler: Scheduler, route: str = "r", now: float = 0.0) -> Lease:
        lease = scheduler.acquire(route, now)
        assert isinstance(lease, Lease)
        return lease

    def wait(self, scheduler: Scheduler, route: str = "r", now: float = 0.0) -> Deferred[Lease]:
        waiting = scheduler.acquire(route, now)
        assert isinstance(waiting, Deferred)
        return waiting

    def test_spreads_over_the_least_used(self) -> None:
        """Requests go to the pod with the fewest leases."""
        scheduler = make(limit=2)
        self.assertEqual([self.take(scheduler).address for _ in range(4)], [A, B, A, B])

    def test_prefers_the_longest_idle(self) -> None:
        """Of idle pods, the one whose last lease ended first is next."""
        scheduler = make(pods=(A, B, C))
        leases = {lease.address: lease for lease in (self.take(scheduler) for _ in range(3))}
        for address in (B, C, A):
            scheduler.release(leases[address], 1.0)
        self.assertEqual([self.take(scheduler).address for _ in range(3)], [B, C, A])

    def test_hands_over_within_release(self) -> None:
        """When release() returns, whoever was next has the slot."""
        scheduler = make(pods=(A,))
        lease = self.take(scheduler)
        waiting = self.wait(scheduler, now=1.0)
        scheduler.release(lease, 5.0)
        granted = self.successResultOf(waiting)
        self.assertEqual((granted.address, granted.waited, granted.in_flight), (A, 4.0, 1))

    def test_a_lease_ends_once(self) -> None:
        """Releasing twice is a bug in the owner and says so."""
        scheduler = make()
        lease = self.take(scheduler)
        self.assertIn("held", repr(lease))
        scheduler.release(lease, 0.0)
        self.assertIn("released", repr(lease))
        self.assertRaises(LeaseReleasedTwice, scheduler.release, lease, 0.0)
        self.assertEqual(scheduler.state().running, 0)

    def test_full_line(self) -> None:
        """The line takes `queue_size` and no more; size 0 lets nobody wait."""
        scheduler = make(pods=(A,), size=1)
        self.take(scheduler)
        self.wait(scheduler)
        error = self.assertRaises(LineFull, scheduler.acquire, "r", 0.0)
        self.assertEqual(str(error), "1 requests are waiting already")

    def test_withdrawal(self) -> None:
        """Cancelling takes a request out of the line; the others keep their order."""
        scheduler = make(pods=(A,))
        lease = self.take(scheduler)
        first, second, third = (self.wait(scheduler) for _ in range(3))
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.assertEqual(scheduler.waiting, 2)
        scheduler.release(lease, 0.0)
        scheduler.release(self.successResultOf(first), 0.0)
        self.successResultOf(third)

    def test_route_at_its_limit_is_passed(self) -> None:
        """Others pass a route at its own limit; within it, first come is first served."""
        scheduler = make(limit=2, pods=(A,))
        scheduler.set_route_limit("slow", 1, 0.0)
        slow = self.take(scheduler, "slow")
        second_slow = self.wait(scheduler, "slow")
        other = self.take(scheduler, "fast")
        waiting_fast = self.wait(scheduler, "fast")
        scheduler.release(other, 0.0)
        self.assertNoResult(second_slow)
        self.successResultOf(waiting_fast)
        scheduler.release(slow, 0.0)
        self.successResultOf(second_slow)

    def test_removed_pod_keeps_its_count(self) -> None:
        """A pod that leaves gets nothing new; if it comes back, its leases still count."""
        scheduler = make(pods=(A,))
        lease = self.take(scheduler)
        scheduler.set_pods([], 1.0)
        waiting = self.wait(scheduler, now=1.0)
        scheduler.set_pods([A], 2.0)
        self.assertNoResult(waiting)
        scheduler.release(lease, 3.0)
        self.successResultOf(waiting)

    def test_removed_pod_is_forgotten_when_done(self) -> None:
        """Once its last lease has ended, nothing of a removed pod is left."""
        scheduler = make(pods=(A,))
        lease = self.take(scheduler)
        scheduler.set_pods([B], 0.0)
        self.assertEqual([pod.address for pod in scheduler.state().pods], [A, B])
        scheduler.release(lease, 0.0)
        self.assertEqual([pod.address for pod in scheduler.state().pods], [B])

    def test_move(self) -> None:
        """A refused request goes to another pod ahead of those who came later."""
        scheduler = make()
        first, second = self.take(scheduler), self.take(scheduler)
        later = self.wait(scheduler)
        moved = scheduler.move(first, 0.0)
        # The slot that it gave up is of no use to it, but to the next in line.
        self.assertEqual(self.successResultOf(later).address, first.address)
        self.assertNoResult(moved)
        scheduler.release(second, 0.0)
        self.assertEqual(self.successResultOf(moved).address, second.address)

    def test_moves_in_any_order(self) -> None:
        """Requests that are refused in the wrong order still go out in the right one."""
        scheduler = make(limit=2, pods=(A, B))
        on_a = [lease for lease in (self.take(scheduler) for _ in range(4)) if lease.address == A]
        scheduler.set_pods([A, B], 0.0)
        second = scheduler.move(on_a[1], 0.0)
        first = scheduler.move(on_a[0], 0.0)
        tickets = [ticket.ordinal for ticket in scheduler.tickets()]
        self.assertEqual(tickets, sorted(tickets))
        self.assertEqual(tickets[0], on_a[0].ticket.ordinal)
        self.assertNoResult(first)
        self.assertNoResult(second)

    def test_move_runs_out_of_pods(self) -> None:
        """When every pod has refused it, the request fails and its slot is free."""
        scheduler = make()
        moved = self.successResultOf(scheduler.move(self.take(scheduler), 0.0))
        error = self.assertRaises(PodsExhausted, scheduler.move, moved, 0.0)
        self.assertIn("2 pod(s)", str(error))
        self.assertEqual(scheduler.state().running, 0)

    def test_confined_to_pods(self) -> None:
        """A request confined to some pods waits for one of them, and for no other."""
        scheduler = make(pods=(A, B, C))
        scheduler.set_route_limit("r", 1, 0.0)
        only = frozenset({A})
        lease = scheduler.acquire("r", 0.0, only)
        assert isinstance(lease, Lease)
        waiting = scheduler.acquire("r", 0.0, only)
        assert isinstance(waiting, Deferred)
        scheduler.release(self.take(scheduler), 0.0)
        self.assertNoResult(waiting)
        scheduler.release(lease, 0.0)
        self.assertEqual(self.successResultOf(waiting).address, A)

    def test_confined_requests_share_a_pod(self) -> None:
        """Several sets of pods may overlap; each keeps its own place."""
        scheduler = make(pods=(A, B))
        leases = [self.take(scheduler) for _ in range(2)]
        waiting = []
        for only in (frozenset({A}), frozenset({A, B})):
            waiter = scheduler.acquire("r", 0.0, only)
            assert isinstance(waiter, Deferred)
            waiting.append(waiter.addErrback(lambda _: None))
        waiting[1].cancel()
        for lease in leases:
            scheduler.release(lease, 0.0)
        self.assertEqual(self.successResultOf(waiting[0]).address, A)

    def test_asking_inside_a_hand_over(self) -> None:
        """Whoever asks while leases are handed out waits its turn, and has it at once."""
        scheduler = make(limit=2, pods=(A,))
        scheduler.set_route_limit("slow", 1, 0.0)
        held = [self.take(scheduler) for _ in range(2)]
        order: list[str] = []

        def ask_again(_: Lease) -> None:
            order.append("first")
            again = scheduler.acquire("r", 0.0)
            assert isinstance(again, Deferred)
            again.addCallback(lambda _: order.append("asked inside"))

        self.wait(scheduler).addCallback(ask_again)
        self.wait(scheduler).addCallback(lambda _: order.append("second"))
        scheduler.set_limit(5, 0.0)
        self.assertEqual(order, ["first", "second", "asked inside"])
        scheduler.set_pods([A, B], 0.0)
        for lease in held:
            scheduler.release(lease, 0.0)

    def test_raised_limit_lets_go(self) -> None:
        """A raised limit is used at once; a lowered one is reached as leases end."""
        scheduler = make(pods=(A,))
        first = self.take(scheduler)
        waiting = self.wait(scheduler)
        scheduler.set_limit(2, 0.0)
        second = self.successResultOf(waiting)
        scheduler.set_limit(1, 0.0)
        third = self.wait(scheduler)
        scheduler.release(first, 0.0)
        self.assertNoResult(third)
        scheduler.release(second, 0.0)
        self.successResultOf(third)

    def test_limits_by_pod(self) -> None:
        """A big pod takes more than a small one: what counts is the share in use."""
        scheduler = make(pods=(A, B))
        scheduler.set_limit(1, 0.0, {A: 4})
        counts = [self.take(scheduler).address for _ in range(5)]
        self.assertEqual((counts.count(A), counts.count(B)), (4, 1))

    def test_lifted_route_limit(self) -> None:
        """Lifting a route's limit lets its waiting requests go."""
        scheduler = make(limit=2, pods=(A,))
        scheduler.set_route_limit("r", 1, 0.0)
        self.take(scheduler)
        waiting = self.wait(scheduler)
        scheduler.set_route_limit("r", None, 0.0)
        self.successResultOf(waiting)

    def test_waits_too_long(self) -> None:
        """The timeout runs from arrival; nobody is turned away before it."""
        scheduler = make(pods=(A,))
        self.take(scheduler)
        first, second = self.wait(scheduler, now=1.0), self.wait(scheduler, now=2.0)
        self.assertEqual(scheduler.next_deadline(), 11.0)
        scheduler.expire(10.9)
        self.assertNoResult(first)
        scheduler.expire(11.0)
        error = self.failureResultOf(first, WaitedTooLong).value
        self.assertEqual(str(error), "waited 10.0 s for a free slot")
        self.assertNoResult(second)
        self.assertEqual((scheduler.waiting, scheduler.next_deadline()), (1, 12.0))

    def test_waits_for_ever(self) -> None:
        """Without a timeout there is no deadline, unless there is no pod."""
        scheduler = Scheduler(1, queue_size=9, queue_timeout=None, no_pods_timeout=3, now=0.0)
        waiting = self.wait(scheduler, now=1.0)
        self.assertEqual(scheduler.next_deadline(), 4.0)
        scheduler.set_pods([A], 2.0)
        self.wait(scheduler, now=2.5)
        self.assertIsNone(scheduler.next_deadline())
        scheduler.expire(1e9)
        self.successResultOf(waiting)
        self.assertEqual(scheduler.waiting, 1)

    def test_no_pods(self) -> None:
        """Without pods, the bound runs from arrival or from the last pod's leaving."""
        scheduler = make(pods=(A,))
        self.take(scheduler)
        early = self.wait(scheduler, now=0.0)
        scheduler.set_pods([], 5.0)
        late = self.wait(scheduler, now=6.0)
        self.assertEqual(scheduler.next_deadline(), 8.0)
        scheduler.expire(8.0)
        self.failureResultOf(early, NoPods)
        self.assertNoResult(late)
        scheduler.expire(9.0)
        self.failureResultOf(late, NoPods)
        self.assertIsNone(scheduler.next_deadline())

    def test_retry_after(self) -> None:
        """Retry-After comes from the measured service time and the queue."""
        scheduler = make(limit=1)
        self.assertEqual(scheduler.retry_after(), 1.0)
        leases = [self.take(scheduler) for _ in range(2)]
        self.wait(scheduler)
        scheduler.release(leases[0], 40.0)
        # One mean lease of 40 s, nobody else waits, two slots.
        self.assertEqual(scheduler.retry_after(), 20.0)
        scheduler.release(leases[1], 50.0)
        self.assertEqual(scheduler.mean_service, 41.0)
        scheduler.set_pods([], 0.0)
        self.assertEqual(scheduler.retry_after(), 1.0)

    def test_answers_no_longer_than_needed(self) -> None:
        """10,000 requests that end inside their hand-over do not grow the stack."""
        scheduler = make(pods=(A,), size=20_000)
        lease = self.take(scheduler)
        served: list[int] = []
        for number in range(10_000):

            def end(granted: Lease, number: int = number) -> None:
                served.append(number)
                scheduler.release(granted, 0.0)

            self.wait(scheduler).addCallback(end)
        scheduler.release(lease, 0.0)
        self.assertEqual(served, list(range(10_000)))


class PartsTests(SynchronousTestCase):
    def test_address_text(self) -> None:
        """An IPv6 address is bracketed."""
        self.assertEqual(str(Address("::1", 80)), "[::1]:80")
        self.assertEqual(str(Address("10.0.0.1", 80)), "10.0.0.1:80")

    def test_pod_text(self) -> None:
        """A pod tells its count, its limit and whether it is gone."""
        pod = Pod(A, 2, 0)
        self.assertEqual(repr(pod), "<Pod a:80 0/2>")
        pod.known = False
        self.assertEqual(repr(pod), "<Pod a:80 0/2 gone>")
        pod.known, pod.hold = True, Hold.DRAINED
        self.assertEqual(repr(pod), "<Pod a:80 0/2 drained>")

    def test_heap_stays_small(self) -> None:
        """Stale entries do not pile up, however often counts change."""
        pods = [Pod(Address("p", port), 5, port) for port in range(10)]
        heap = LeastHeap(lambda pod: pod.has_room)
        for pod in pods:
            heap.offer(pod)
            heap.offer(pod)
        ordinal = 100
        for turn in range(1000):
            pod = pods[turn % 10]
            ordinal += 1
            pod.leases, pod.since = (pod.leases + 1) % 5, ordinal
            heap.offer(pod)
        self.assertLess(len(heap._heap), 50)
        best = min(pods, key=lambda pod: pod.preference)
        self.assertIs(heap.least(), best)

    def test_heap_skips_excluded(self) -> None:
        """Excluded pods are passed over and stay in the heap."""
        pods = [Pod(address, 1, number) for number, address in enumerate((A, B))]
        heap = LeastHeap(lambda pod: pod.has_room)
        heap.rebuild(pods)
        self.assertIs(heap.least(frozenset({A})), pods[1])
        self.assertIsNone(heap.least(frozenset({A, B})))
        self.assertIs(heap.least(), pods[0])

    def test_line_takes_no_lease_that_nobody_waits_for(self) -> None:
        """A lease put into an empty line is an error, not a lost slot."""
        line = Line(("r", None, frozenset()), lambda _: None)
        pod = Pod(A, 1, 0)
        with self.assertRaises(Exception) as caught:
            line.put(Lease(pod, Ticket("r", 1, 0.0), 0.0))
        self.assertEqual(type(caught.exception).__name__, "QueueOverflow")
