"""
An upstream at work: scheduler, discovery and connections, held together by a clock.

Owns the timers that turn away those who waited too long, put pods on trial and
end what runs too long on a pod that is gone. Everything that decides is in
`strictproxy.scheduling`; everything that talks is in `strictproxy.http` and
`strictproxy.discovery`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Protocol, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from strictproxy.checks import Checker
from strictproxy.config.model import RouteConfig, UpstreamConfig
from strictproxy.errors import PodGone, ProxyError
from strictproxy.http.pool import EndpointFor, PodPool
from strictproxy.interfaces import Endpoint, IDiscovery
from strictproxy.scheduling import (
    Address,
    Health,
    Hold,
    Lease,
    PodState,
    Scheduler,
    SchedulerState,
    Standing,
    Ticket,
)
from strictproxy.snapshot import (
    PodCondition,
    PodSnapshot,
    PodStats,
    RequestSnapshot,
    UpstreamSnapshot,
)

_log = Logger()

#: More than this in a header is a mistake, not a limit.
_MOST_SAID = 100_000
#: Places in the line are told as they were so long ago at most, seconds.
_PLACES_FOR = 1.0


class LeaseOwner(Protocol):
    """Whoever acquires a lease here."""

    #: by which people may cancel it
    number: int
    client: str
    identity: bytes

    @property
    def task_id(self) -> str | None:
        """The id of the task that it is, if it is one."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that are kept while it waits."""

    def abandon(self, error: ProxyError) -> None:
        """End at once, with an error for the client."""


class Upstream:
    """
    One upstream. `start` and `stop` bracket its life.

    :param routes: those that lead here, for their limits.
    """

    def __init__(
        self,
        config: UpstreamConfig,
        routes: Iterable[RouteConfig],
        discovery: IDiscovery,
        endpoint_for: EndpointFor,
        clock: IReactorTime,
    ) -> None:
        self.name = config.name
        self.config = config
        self.discovery = discovery
        self.pool = PodPool(endpoint_for, config.connections, clock)
        self.health = Health(config.health)
        #: the response header by which pods tell their limit, lower case
        self.limit_header = config.limit_header.lower().encode() if config.limit_header else None
        self._clock = clock
        now = clock.seconds()
        self.scheduler = Scheduler(
            config.limit,
            queue_size=config.queue.size,
            queue_timeout=config.queue.timeout,
            no_pods_timeout=config.queue.no_pods_timeout,
            now=now,
        )
        self._limited_routes: set[str] = set()
        self._limit_routes(routes)
        #: discovery has published a set at least once
        self.trusted = False
        #: the pods of the set in force
        self._known: Mapping[Address, Endpoint] = {}
        self._shrinks = 0
        self._stats: dict[Address, PodStats] = {}
        #: another limit than the configuration's, until that changes
        self._set_by_hand: int | None = None
        self._drained: set[Address] = set()
        self._limits = dict(config.pod_limits)
        #: limits that pods told by `limit_header`
        self._said: dict[Address, int] = {}
        #: since when pods are gone that still run requests
        self._gone: dict[Address, float] = {}
        self._checker = self._make_checker(endpoint_for)
        #: places in the line by number, and when they were looked up
        self._places: dict[int, int] = {}
        self._placed = float("-inf")
        self._timer: IDelayedCall | None = None
        self._pod_timer: IDelayedCall | None = None

    def start(self) -> None:
        """Begin to learn pods."""
        self.discovery.start(self._publish)

    def stop(self) -> None:
        """Stop learning pods, and close the connections to them."""
        self.discovery.stop()
        if self._checker is not None:
            self._checker.stop()
        self.pool.stop()
        for timer in (self._timer, self._pod_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._pod_timer = None

    def configure(
        self,
        config: UpstreamConfig,
        routes: Iterable[RouteConfig],
        endpoint_for: EndpointFor | None,
        discovery: IDiscovery | None,
    ) -> None:
        """
        Apply another configuration. Whatever runs or waits goes on, and counts stay.

        :param endpoint_for: None if `config.tls` is what it was.
        :param discovery: None if `config.source` is what it was; else the pods
            that are known stay until this one publishes.
        """
        old, self.config, self.name = self.config, config, config.name
        if config.limit != old.limit:
            self._set_by_hand = None
        self.health.policy = config.health
        self._limits = dict(config.pod_limits)
        if config.limit_header != old.limit_header:
            self.limit_header = (
                config.limit_header.lower().encode() if config.limit_header else None
            )
            self._said = {}
        self.scheduler.queue_size = config.queue.size
        self.scheduler.queue_timeout = config.queue.timeout
        self.scheduler.no_pods_timeout = config.queue.no_pods_timeout
        if endpoint_for is not None or config.check != old.check:
            if self._checker is not None:
                self._checker.stop()
            self._checker = self._make_checker(endpoint_for or self.pool.endpoint_for)
            if self._checker is None:
                self.health.unchecked(self._clock.seconds())
            else:
                self._checker.set_pods(self._known)
        self.pool.configure(config.connections, endpoint_for or self.pool.endpoint_for)
        self._limit_routes(routes)
        if discovery is not None:
            self.discovery.stop()
            self.discovery = discovery
            discovery.start(self._publish)
        self._pods_due()

    def _limit_routes(self, routes: Iterable[RouteConfig]) -> None:
        limits = {route.name: route.limit for route in routes if route.limit is not None}
        now = self._clock.seconds()
        for name in self._limited_routes - limits.keys():
            self.scheduler.set_route_limit(name, None, now)
        for name, limit in limits.items():
            self.scheduler.set_route_limit(name, limit, now)
        self._limited_routes = set(limits)

    def _make_checker(self, endpoint_for: EndpointFor) -> Checker | None:
        if self.config.check is None:
            return None
        return Checker(
            self.config.check,
            endpoint_for,
            self._clock,
            random.random,
            self._check_passed,
            self._check_failed,
        )

    # -- leases

    def acquire(
        self,
        route: str,
        allowed: frozenset[Address] | None,
        owner: LeaseOwner,
        patient: bool = False,
    ) -> Lease | Deferred[Lease]:
        """Take a slot, or wait for one; see `Scheduler.acquire`."""
        result = self.scheduler.acquire(route, self._clock.seconds(), allowed, owner, patient)
        if self._timer is None and isinstance(result, Deferred):
            self._set_timer()
        return result

    def adopt(self, route: str, address: Address, owner: LeaseOwner) -> Lease:
        """Take a slot that is known to be in use already; see `Scheduler.adopt`."""
        return self.scheduler.adopt(route, address, self._clock.seconds(), owner)

    def move(self, lease: Lease) -> Deferred[Lease]:
        """Give up a lease for one on another pod; see `Scheduler.move`."""
        result = self.scheduler.move(lease, self._clock.seconds())
        if self._timer is None:
            self._set_timer()
        return result

    def release(self, lease: Lease) -> None:
        """End a lease; see `Scheduler.release`."""
        self.scheduler.release(lease, self._clock.seconds())

    # -- how pods do

    def sent(self, address: Address) -> None:
        """Note that a request was given to a pod."""
        self._stats_of(address).requests += 1

    def began_to_answer(self, address: Address, seconds: float) -> None:
        """Note that a pod began to answer, so long after the slot was there."""
        stats = self._stats_of(address)
        stats.answers += 1
        stats.first_byte_seconds += seconds

    def _stats_of(self, address: Address) -> PodStats:
        stats = self._stats.get(address)
        if stats is None:
            stats = self._stats[address] = PodStats()
        return stats

    def reached(self, address: Address) -> None:
        """Note that a connection to a pod was made."""
        if self.health.reached(address):
            self._standings_changed(address)

    def unreachable(self, address: Address, error: str) -> None:
        """Note that a connection to a pod could not be made; discovery may not know yet."""
        self.discovery.look_now()
        self._stats_of(address).failures += 1
        if self.health.unreachable(address, self._clock.seconds(), error):
            self._standings_changed(address)

    def answered(self, address: Address) -> None:
        """Note that a pod answered a request well."""
        if self.health.succeeded(address):
            self._standings_changed(address)

    def failed(self, address: Address, error: str) -> None:
        """Note that a pod failed a request that it had received."""
        self._stats_of(address).failures += 1
        if self.health.failed(address, self._clock.seconds(), error):
            self._standings_changed(address)

    def _check_passed(self, address: Address) -> None:
        if self.health.check_passed(address):
            self._standings_changed(address)

    def _check_failed(self, address: Address, error: str) -> None:
        if self.health.check_failed(address, self._clock.seconds(), error):
            self._standings_changed(address)

    def said_limit(self, address: Address, value: bytes) -> None:
        """Take a pod's own word for how many requests it may have; nonsense is ignored."""
        if not value.isdigit() or not 1 <= int(value) <= _MOST_SAID:
            _log.warn("{pod}: its limit is no limit: {value}", pod=address, value=value)
        elif address in self._known and self._said.get(address) != int(value):
            self._said[address] = int(value)
            _log.info("{pod}: its limit is {limit}, it says", pod=address, limit=int(value))
            self._apply()

    def drain(self, address: Address) -> bool:
        """
        Give a pod nothing new until `undrain`, or until discovery forgets it.

        :return: False if there is no such pod.
        """
        if address not in self._known:
            return False
        self._drained.add(address)
        _log.info("{upstream}: {pod} is drained", upstream=self.name, pod=address)
        self._apply()
        return True

    def undrain(self, address: Address) -> bool:
        """Let a drained pod take requests again. Returns False if it was not drained."""
        if address not in self._drained:
            return False
        self._drained.discard(address)
        _log.info("{upstream}: {pod} is drained no more", upstream=self.name, pod=address)
        self._apply()
        return True

    @property
    def limit(self) -> int:
        """Requests in flight per pod, as configured or as set by an operator."""
        return self.config.limit if self._set_by_hand is None else self._set_by_hand

    def set_limit(self, limit: int) -> None:
        """Set another limit, until the configuration's changes."""
        self._set_by_hand = limit
        _log.info("{upstream}: the limit is {limit} now", upstream=self.name, limit=limit)
        self._apply()

    @property
    def paused(self) -> bool:
        """Whether nothing new is dispatched, because an operator wants it so."""
        return self.scheduler.paused

    def pause(self, paused: bool) -> None:
        """Dispatch nothing new, or go on; who waits, waits on, within its time."""
        if paused != self.scheduler.paused:
            self.scheduler.paused = paused
            _log.info(
                "{upstream} {what}", upstream=self.name, what="is paused" if paused else "goes on"
            )
            self._apply()

    # -- looking in

    def state(self) -> SchedulerState:
        """Return the scheduler's part of `snapshot`."""
        return self.scheduler.state()

    def pods(self) -> Collection[Address]:
        """Return the pods that are known now."""
        return sorted(self._known)

    def snapshot(self) -> UpstreamSnapshot:
        """Return everything about the upstream; it shares nothing with it."""
        state = self.scheduler.state()
        return UpstreamSnapshot(
            self.name,
            self.trusted,
            tuple(map(self._pod_snapshot, state.pods)),
            state.waiting,
            state.running,
            state.slots,
            self.limit,
            self.paused,
            sum(cast("LeaseOwner", t.owner).kept_bytes for t in self.scheduler.everybody()),
            self._oldest(),
            self._shrinks,
            self.discovery.state(),
        )

    def _oldest(self) -> float:
        arrived = min((ticket.arrived for ticket in self.scheduler.heads()), default=None)
        return 0.0 if arrived is None else self._clock.seconds() - arrived

    def running(self) -> list[RequestSnapshot]:
        """Return the requests that hold a slot, the oldest first."""
        now = self._clock.seconds()
        leases = [
            lease
            for pod in self.scheduler.state().pods
            for lease in self.scheduler.leases_on(pod.address)
        ]
        leases.sort(key=lambda lease: lease.granted)
        return [_request(lease.ticket, lease.address, now - lease.granted) for lease in leases]

    def place(self, number: int) -> tuple[int, float | None] | None:
        """
        Return a waiting owner's place in the line, from 1, and likely seconds until its turn.

        Places are looked up once a second at most: many may ask. Whoever has come
        since then is taken for the last one.
        """
        now = self._clock.seconds()
        if now - self._placed >= _PLACES_FOR or now < self._placed:
            tickets = self.scheduler.tickets()
            self._places = {
                cast("LeaseOwner", ticket.owner).number: place
                for place, ticket in enumerate(tickets, 1)
            }
            self._placed = now
        place = self._places.get(number, self.scheduler.waiting)
        return (place, self.scheduler.turn_after(place)) if place else None

    def waiting(self, most: int) -> list[RequestSnapshot]:
        """Return those first in line, in order."""
        now = self._clock.seconds()
        tickets = self.scheduler.tickets()[:most]
        return [_request(ticket, None, now - ticket.arrived) for ticket in tickets]

    def _pod_snapshot(self, pod: PodState) -> PodSnapshot:
        record = self.health.record(pod.address)
        if not pod.known:
            condition = PodCondition.REMOVED
        elif pod.hold is not None:
            condition = PodCondition(pod.hold.value)
        elif record is not None and record.standing is Standing.TRIAL:
            condition = PodCondition.TRIAL
        else:
            condition = PodCondition.READY
        trial_in = None
        if record is not None and condition is PodCondition.UNHEALTHY and not record.checked_down:
            trial_in = max(0.0, record.until - self._clock.seconds())
        return PodSnapshot(
            pod.address,
            condition,
            pod.leases,
            pod.limit,
            0 if record is None else record.failures,
            trial_in,
            None if record is None else record.error,
            replace(self._stats.get(pod.address) or PodStats()),
        )

    # -- inside: pods

    def _standings_changed(self, address: Address) -> None:
        record = self.health.record(address)
        if record is not None:
            aside = record.standing is Standing.ASIDE
            _log.warn(
                "{upstream}: {pod} is {what}",
                upstream=self.name,
                pod=address,
                what=f"put aside: {record.error}" if aside else "healthy again",
            )
        self._apply()

    def _apply(self) -> None:
        """Let the scheduler know what each pod may have."""
        now = self._clock.seconds()
        health = self.health
        limits = {
            address: health.limit(address, self._full_limit(endpoint), now)
            for address, endpoint in self._known.items()
        }
        holds: dict[Address, Hold] = {}
        if self.paused:
            holds = dict.fromkeys(self._known, Hold.PAUSED)
        holds.update((each, Hold.UNHEALTHY) for each in self._known if health.is_aside(each))
        holds.update(dict.fromkeys(self._drained, Hold.DRAINED))
        holds.update(
            (address, Hold.TERMINATING)
            for address, endpoint in self._known.items()
            if endpoint.terminating
        )
        # At once: what a pod may have, and whether it may, belong together.
        self.scheduler.set_limit(self.limit, now, limits, holds)
        self._set_timer()
        self._set_pod_timer()

    def _full_limit(self, endpoint: Endpoint) -> int:
        """Return what a pod in good health may have: as it says itself, or we, or discovery."""
        address = endpoint.address
        limit = self._said.get(address, self._limits.get(address, endpoint.limit))
        return limit if limit is not None else max(1, round(endpoint.share * self.limit))

    def _set_pod_timer(self) -> None:
        if self._pod_timer is not None:
            self._pod_timer.cancel()
            self._pod_timer = None
        now = self._clock.seconds()
        times = (
            []
            if self.config.drain_timeout is None
            else [since + self.config.drain_timeout for since in self._gone.values()]
        )
        change = self.health.next_change(now)
        if change is not None:
            times.append(change)
        if times:
            self._pod_timer = self._clock.callLater(
                max(0.0, min(times) - now), self._pod_timer_fired
            )

    def _pod_timer_fired(self) -> None:
        self._pod_timer = None
        self._pods_due()

    def _pods_due(self) -> None:
        now = self._clock.seconds()
        self.health.advance(now)
        timeout = self.config.drain_timeout
        for address, since in list(self._gone.items()):
            if timeout is not None and since + timeout <= now:
                del self._gone[address]
                for lease in self.scheduler.leases_on(address):
                    owner = cast("LeaseOwner", lease.ticket.owner)
                    owner.abandon(PodGone(f"{address} has been gone for {timeout:g} s"))
        self._apply()

    def _publish(self, endpoints: Collection[Endpoint]) -> None:
        known = {endpoint.address: endpoint for endpoint in endpoints}
        before, after = self._known.keys(), known.keys()
        now = self._clock.seconds()
        if before != after or not self.trusted:
            _log.info(
                "{upstream}: {count} pods; new: {added}; gone: {removed}",
                upstream=self.name,
                count=len(after),
                added=", ".join(map(str, sorted(after - before))) or "none",
                removed=", ".join(map(str, sorted(before - after))) or "none",
            )
        if len(before) > 2 * len(after):
            self._shrinks += 1
            _log.warn(
                "{upstream}: more than half of the pods are gone: {before} before, {after} now",
                upstream=self.name,
                before=len(before),
                after=len(after),
            )
        gone = before - after
        self._known = known
        self.health.set_pods(after, now, first=not self.trusted)
        self.trusted = True
        self._drained &= after
        self._said = {pod: limit for pod, limit in self._said.items() if pod in after}
        self._stats = {
            pod: stats
            for pod, stats in self._stats.items()
            if pod in after or self.scheduler.leases_on(pod)
        }
        for address in gone:
            if self.scheduler.leases_on(address):
                self._gone[address] = now
        for address in after:
            self._gone.pop(address, None)
        # What new pods may have comes before they do.
        self._apply()
        self.scheduler.set_pods(after, now)
        self.pool.retain(after)
        if self._checker is not None:
            self._checker.set_pods(after)
        # With the last pod gone, or the first one there, deadlines are others.
        self._set_timer()

    # -- inside: the line

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.scheduler.next_deadline()
        if deadline is not None:
            delay = max(0.0, deadline - self._clock.seconds())
            self._timer = self._clock.callLater(delay, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self.scheduler.expire(self._clock.seconds())
        self._set_timer()


def _request(ticket: Ticket, pod: Address | None, age: float) -> RequestSnapshot:
    owner = cast("LeaseOwner", ticket.owner)
    identity = owner.identity.decode("ascii", "replace")
    return RequestSnapshot(
        owner.number, ticket.route, owner.client, identity, pod, age, owner.task_id
    )
