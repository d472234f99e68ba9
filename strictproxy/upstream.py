"""
An upstream at work: scheduler, discovery and connections, held together by a clock.

Owns the one timer that turns away those who waited too long. Everything that
decides is in `strictproxy.scheduling`; everything that talks is in
`strictproxy.http` and `strictproxy.discovery`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from strictproxy.config.model import RouteConfig, UpstreamConfig
from strictproxy.http.pool import EndpointFor, PodPool
from strictproxy.interfaces import IDiscovery
from strictproxy.scheduling import Address, Lease, Scheduler, SchedulerState

_log = Logger()


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
        self._clock = clock
        now = clock.seconds()
        self.scheduler = Scheduler(
            config.limit,
            queue_size=config.queue.size,
            queue_timeout=config.queue.timeout,
            no_pods_timeout=config.queue.no_pods_timeout,
            now=now,
        )
        for route in routes:
            if route.limit is not None:
                self.scheduler.set_route_limit(route.name, route.limit, now)
        #: discovery has published a set at least once
        self.trusted = False
        self._timer: IDelayedCall | None = None

    def start(self) -> None:
        """Begin to learn pods."""
        self.discovery.start(self._publish)

    def stop(self) -> None:
        """Stop learning pods, and close the connections to them."""
        self.discovery.stop()
        self.pool.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def acquire(
        self, route: str, allowed: frozenset[Address] | None, owner: object
    ) -> Lease | Deferred[Lease]:
        """Take a slot, or wait for one; see `Scheduler.acquire`."""
        result = self.scheduler.acquire(route, self._clock.seconds(), allowed, owner)
        if self._timer is None and isinstance(result, Deferred):
            self._set_timer()
        return result

    def move(self, lease: Lease) -> Deferred[Lease]:
        """Give up a lease for one on another pod; see `Scheduler.move`."""
        # Whoever cannot connect may know before discovery does.
        self.discovery.look_now()
        result = self.scheduler.move(lease, self._clock.seconds())
        if self._timer is None:
            self._set_timer()
        return result

    def release(self, lease: Lease) -> None:
        """End a lease; see `Scheduler.release`."""
        self.scheduler.release(lease, self._clock.seconds())

    def state(self) -> SchedulerState:
        """Return a snapshot."""
        return self.scheduler.state()

    def pods(self) -> Collection[Address]:
        """Return the pods that are known now."""
        return [pod.address for pod in self.scheduler.state().pods if pod.known]

    def _publish(self, addresses: Collection[Address]) -> None:
        before = set(self.pods())
        after = set(addresses)
        if before != after or not self.trusted:
            _log.info(
                "{upstream}: {count} pods; new: {added}; gone: {removed}",
                upstream=self.name,
                count=len(after),
                added=", ".join(map(str, sorted(after - before))) or "none",
                removed=", ".join(map(str, sorted(before - after))) or "none",
            )
        self.trusted = True
        self.scheduler.set_pods(addresses, self._clock.seconds())
        self.pool.retain(after)
        # With the last pod gone, or the first one there, deadlines are others.
        self._set_timer()

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
