"""
The promises of the scheduler, held against a model after every step.

The model counts for itself: it never asks the scheduler who holds what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from strictproxy.errors import LineFull, NoPods, PodsExhausted, WaitedTooLong
from strictproxy.scheduling import Address, Hold, Lease, Scheduler, Ticket

ADDRESSES = [Address(f"10.0.0.{n}", 80) for n in range(5)]
ROUTES = ["plain", "other", "limited"]
#: What an owner does inside the hand-over of its lease.
ON_GRANT = ["hold", "hold", "end", "ask", "end another", "withdraw all and ask"]
QUEUE_SIZE = 12
QUEUE_TIMEOUT = 50.0
NO_PODS_TIMEOUT = 5.0

address_sets = st.sets(st.sampled_from(ADDRESSES))
routes = st.sampled_from(ROUTES)


@dataclass(eq=False)
class Asked:
    """One request as the model knows it."""

    number: int
    route: str
    arrived: float
    allowed: frozenset[Address] | None
    on_grant: str = "hold"
    patient: bool = False
    excluded: set[Address] = field(default_factory=set)
    waiter: Deferred[Lease] | None = None
    lease: Lease | None = None
    ends: list[str] = field(default_factory=list)


@dataclass
class ModelPod:
    leases: int = 0
    changed: int = 0
    by_route: dict[str, int] = field(default_factory=dict)


class SchedulerMachine(RuleBasedStateMachine):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.limit = 2
        self.route_limit: int | None = 1
        self.known: set[Address] = set()
        self.holds: dict[Address, Hold] = {}
        self.pod_limits: dict[Address, int] = {}
        self.empty_since = 0.0
        self.pods: dict[Address, ModelPod] = {}
        self.waiting: list[Asked] = []
        self.holding: list[Asked] = []
        self.asked = 0
        self.changes = 0
        #: assertions that failed inside a Deferred's callback
        self.broken: list[Failure] = []
        self.scheduler = Scheduler(
            self.limit,
            queue_size=QUEUE_SIZE,
            queue_timeout=QUEUE_TIMEOUT,
            no_pods_timeout=NO_PODS_TIMEOUT,
            now=0.0,
        )
        self.scheduler.set_route_limit("limited", 1, 0.0)

    # -- the model

    @property
    def open(self) -> set[Address]:
        """Pods that take requests."""
        return self.known - self.holds.keys()

    def limit_of(self, address: Address) -> int:
        return self.pod_limits.get(address, self.limit)

    def usable(self, asked: Asked) -> set[Address]:
        return self.open if asked.allowed is None else self.open & asked.allowed

    def is_exhausted(self, asked: Asked) -> bool:
        return bool(asked.excluded and self.usable(asked)) and self.usable(asked) <= asked.excluded

    def fit(self, asked: Asked) -> list[Address]:
        """Pods that could take a request now."""
        fitting = []
        for address in self.open:
            pod = self.pods[address]
            if asked.allowed is not None and address not in asked.allowed:
                continue
            if address in asked.excluded or pod.leases >= self.limit_of(address):
                continue
            of_route = pod.by_route.get(asked.route, 0)
            if asked.route == "limited" and self.route_limit and of_route >= self.route_limit:
                continue
            fitting.append(address)
        return fitting

    def granted(self, lease: Lease, asked: Asked) -> None:
        """Check a grant against the model as it was just before, then count it."""
        fitting = self.fit(asked)
        assert lease.address in fitting, f"{lease.address} has no room for {asked}"
        pods = self.pods
        best = min(fitting, key=lambda a: (pods[a].leases / self.limit_of(a), pods[a].changed))
        assert lease.address == best, f"{lease.address} is not the least of {fitting}"
        for other in self.waiting:
            if other.number < asked.number:
                assert not self.fit(other), f"{asked} overtook {other}"
        if asked in self.waiting:
            self.waiting.remove(asked)
        self.count(lease.address, asked.route, +1)
        assert lease.in_flight == pods[lease.address].leases
        assert lease.granted == self.now
        asked.lease = lease
        self.holding.append(asked)

    def count(self, address: Address, route: str, change: int) -> None:
        pod = self.pods[address]
        pod.leases += change
        pod.by_route[route] = pod.by_route.get(route, 0) + change
        self.changes += 1
        pod.changed = self.changes

    def end(self, asked: Asked) -> None:
        """Release a lease, in the model first: the scheduler dispatches before it returns."""
        assert asked.lease is not None
        self.holding.remove(asked)
        asked.ends.append("released")
        self.count(asked.lease.address, asked.route, -1)
        self.scheduler.release(asked.lease, self.now)

    def submit(
        self,
        route: str,
        allowed: frozenset[Address] | None,
        on_grant: str,
        patient: bool = False,
    ) -> None:
        self.asked += 1
        asked = Asked(self.asked, route, self.now, allowed, on_grant, patient)
        impatient = [each for each in self.waiting if not each.patient]
        full = not patient and len(impatient) >= QUEUE_SIZE
        self.waiting.append(asked)
        try:
            result = self.scheduler.acquire(route, self.now, allowed, owner=asked, patient=patient)
        except LineFull:
            assert full
            self.waiting.remove(asked)
            assert not self.fit(asked) or self.scheduler._dispatching
            return
        if isinstance(result, Lease):
            self.granted(result, asked)
        else:
            assert not full
            asked.waiter = result
            result.addCallbacks(self.served, self.turned_away, (asked,), {}, (asked,), {})
            result.addErrback(self.broken.append)

    def served(self, lease: Lease, asked: Asked) -> None:
        asked.waiter = None
        self.granted(lease, asked)
        # What an owner may do inside the hand-over: end at once, or ask for more.
        if asked.on_grant == "end":
            self.end(asked)
        elif asked.on_grant == "ask":
            self.submit(asked.route, None, "hold")
        elif asked.on_grant == "end another":
            self.end(self.holding[0])
        elif asked.on_grant == "withdraw all and ask":
            for other in list(self.waiting):
                self.withdraw(other)
            self.submit(asked.route, asked.allowed, "hold")

    def turned_away(self, failure: Failure, asked: Asked) -> None:
        asked.waiter = None
        self.waiting.remove(asked)
        asked.ends.append(failure.type.__name__ if failure.type else "?")
        assert not asked.patient or failure.check(PodsExhausted, CancelledError), failure
        if failure.check(WaitedTooLong):
            assert self.now >= asked.arrived + QUEUE_TIMEOUT
            assert self.open
        elif failure.check(NoPods):
            since = max(asked.arrived, self.empty_since) + NO_PODS_TIMEOUT
            assert not self.open
            assert self.now >= min(since, asked.arrived + QUEUE_TIMEOUT)
        elif failure.check(PodsExhausted):
            assert self.is_exhausted(asked)
        else:
            assert failure.check(CancelledError), failure

    def withdraw(self, asked: Asked) -> None:
        assert asked.waiter is not None
        asked.waiter.cancel()
        assert asked not in self.waiting

    # -- what may happen

    @initialize(known=address_sets)
    def first_pods(self, known: set[Address]) -> None:
        self.set_pods(known)

    @rule(known=address_sets)
    def set_pods(self, known: set[Address]) -> None:
        was_open = bool(self.open)
        self.known = known
        if was_open and not self.open:
            self.empty_since = self.now
        ordered = sorted(known)
        for address in ordered:
            gone = self.pods.get(address)
            if gone is None or (not gone.leases and address not in self.scheduler._pods):
                self.changes += 1
                self.pods[address] = ModelPod(changed=self.changes)
        self.scheduler.set_pods(ordered, self.now)

    @rule(
        route=routes,
        allowed=st.none() | st.frozensets(st.sampled_from(ADDRESSES), min_size=1),
        on_grant=st.sampled_from(ON_GRANT),
        patient=st.booleans(),
    )
    def ask(
        self, route: str, allowed: frozenset[Address] | None, on_grant: str, patient: bool
    ) -> None:
        self.submit(route, allowed, on_grant, patient)

    @rule(count=st.integers(2, 6), route=routes)
    def ask_many(self, count: int, route: str) -> None:
        for _ in range(count):
            self.submit(route, None, "hold")

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def finish(self, data: Any) -> None:
        self.end(data.draw(st.sampled_from(self.holding)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        self.withdraw(data.draw(st.sampled_from(self.waiting)))

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def refuse(self, data: Any) -> None:
        """The pod refuses the connection, and the slot moves with the request."""
        asked = data.draw(st.sampled_from(self.holding))
        lease = asked.lease
        self.holding.remove(asked)
        asked.lease = None
        asked.excluded.add(lease.address)
        self.count(lease.address, asked.route, -1)
        left = not self.is_exhausted(asked)
        if left:
            self.waiting.append(asked)
            self.waiting.sort(key=lambda each: each.number)
        joins = self.scheduler._wait

        def watched(ticket: Ticket) -> Deferred[Lease]:
            # move() may hand out the lease before it returns; the model must hear of it then.
            del self.scheduler._wait
            asked.waiter = waiter = joins(ticket)
            waiter.addCallbacks(self.served, self.turned_away, (asked,), {}, (asked,), {})
            waiter.addErrback(self.broken.append)
            return waiter

        if left:
            self.scheduler._wait = watched  # type: ignore[method-assign]
        try:
            self.scheduler.move(lease, self.now)
            assert left
        except PodsExhausted:
            assert not left
            asked.ends.append("exhausted")

    @rule(
        limit=st.integers(1, 3),
        pod_limits=st.dictionaries(st.sampled_from(ADDRESSES), st.integers(1, 5), max_size=2),
    )
    def set_limit(self, limit: int, pod_limits: dict[Address, int]) -> None:
        self.limit = limit
        self.pod_limits = pod_limits
        self.scheduler.set_limit(limit, self.now, pod_limits)

    @rule(holds=st.dictionaries(st.sampled_from(ADDRESSES), st.sampled_from(Hold)))
    def hold_back(self, holds: dict[Address, Hold]) -> None:
        was_open = bool(self.open)
        self.holds = holds
        if was_open and not self.open:
            self.empty_since = self.now
        self.scheduler.set_holds(holds, self.now)

    @rule(limit=st.none() | st.integers(1, 2))
    def set_route_limit(self, limit: int | None) -> None:
        self.route_limit = limit
        self.scheduler.set_route_limit("limited", limit, self.now)

    @rule(seconds=st.floats(0.5, 30))
    def pass_time(self, seconds: float) -> None:
        deadline = self.scheduler.next_deadline()
        self.now += seconds
        before = len(self.waiting)
        self.scheduler.expire(self.now)
        if deadline is None or deadline > self.now:
            assert len(self.waiting) == before, "somebody was turned away before the deadline"
        else:
            assert len(self.waiting) < before, "nobody was turned away at the deadline"

    # -- what must hold after each step

    @invariant()
    def promises(self) -> None:
        SchedulerMachine.steps += 1
        for failure in self.broken:
            failure.raiseException()
        state = self.scheduler.state()
        assert state.waiting == len(self.waiting) == len(self.scheduler.tickets())
        assert self.scheduler.patient == sum(asked.patient for asked in self.waiting)
        assert state.running == len(self.holding)
        leases = {address: pod.leases for address, pod in self.pods.items() if pod.leases}
        assert {pod.address: pod.leases for pod in state.pods if pod.leases} == leases
        assert {pod.address for pod in state.pods} == self.known | set(leases)
        assert state.slots == sum(self.limit_of(address) for address in self.open)
        for pod in state.pods:
            assert pod.hold is self.holds.get(pod.address)
            held = self.scheduler.leases_on(pod.address)
            ours = [a.lease for a in self.holding if a.lease.address == pod.address]
            assert sorted(map(id, held)) == sorted(map(id, ours))
        for asked in self.waiting:
            assert not self.is_exhausted(asked), f"{asked} waits for pods that refused it"
            assert not self.fit(asked), f"{asked} waits although {self.fit(asked)} have room"
        order = [ticket.owner.number for ticket in self.scheduler.tickets()]  # type: ignore[attr-defined]
        assert order == [asked.number for asked in sorted(self.waiting, key=lambda a: a.number)]

    def teardown(self) -> None:
        for _ in range(200):
            for asked in list(self.waiting):
                if asked.waiter is not None:
                    asked.waiter.cancel()
            for asked in list(self.holding):
                self.end(asked)
        self.scheduler.set_pods([], self.now)
        for failure in self.broken:
            failure.raiseException()
        state = self.scheduler.state()
        assert state.pods == ()
        assert (state.waiting, state.running) == (0, 0)
        assert not self.scheduler._lines
        assert not self.scheduler._pinned
        assert not self.scheduler._open


class SchedulerPromises(SchedulerMachine.TestCase):  # type: ignore[misc,name-defined]
    """Strict, least, work-conserving, in order, answered once, bounded."""

    settings = settings(
        max_examples=400,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def test_promises(self) -> None:
        """No sequence of events breaks a promise."""
        self.runTest()
        steps = SchedulerMachine.steps
        print(f"\nscheduler machine: every promise checked after each of {steps} steps")
        self.assertGreater(steps, 5000)
