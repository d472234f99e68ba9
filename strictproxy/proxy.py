"""
The resource that the traffic listeners' site renders.

Owns what exchanges share: the route table, the custom routers, prepared heads
and the time-outs of whole exchanges. What happens to a single request is told
in `strictproxy.exchange`.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from strictproxy.config.model import ClientConfig, Match, RouteConfig
from strictproxy.errors import (
    ExchangeTimeout,
    NoRoute,
    ProxyError,
    RouterFailed,
)
from strictproxy.exchange import Exchange
from strictproxy.forwarding import Forwarding
from strictproxy.http.reply import Reply
from strictproxy.http.request import ClientRequest, Request
from strictproxy.http.spool import Spool
from strictproxy.http.timeouts import Timeouts
from strictproxy.interfaces import IRouter, RequestInfo
from strictproxy.logs import AccessRecord
from strictproxy.metrics import Counters
from strictproxy.routing import RouteTable
from strictproxy.scheduling import Address
from strictproxy.tasks.task import TrackedTask
from strictproxy.tasks.tracked import CALLBACK_PATH, TrackedTasks
from strictproxy.tracing import Tracing
from strictproxy.upstream import Upstream

_log = Logger()

_CALLBACK = CALLBACK_PATH.encode()

#: So many of the errors that clients got are kept, for people to see.
_ERRORS = 20


class ProxyResource(Resource):
    """
    The root of the traffic listeners' site; it handles every path.

    :param routers: custom routers by name, in the order in which they are asked.
    :param log_access: takes one record per exchange, or None to log nothing.
    """

    isLeaf = True

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        routes: Sequence[RouteConfig],
        routers: Sequence[tuple[str, IRouter]],
        clock: IReactorTime,
        log_access: Callable[[AccessRecord], None] | None,
        client: ClientConfig | None = None,
    ) -> None:
        super().__init__()
        self.now: Callable[[], float] = clock.seconds
        self.counters = Counters()
        #: makes spans, if somebody wants them
        self.tracing: Tracing | None = None
        self.tasks = TrackedTasks(clock, random.random)
        self.tasks.on_end = self._task_ended
        self.next_number = itertools.count(1).__next__
        #: the errors that clients got last: time, reason, route, pod
        self.errors: deque[tuple[float, str, str, str | None]] = deque(maxlen=_ERRORS)
        #: exchanges that have not finished
        self.running: set[Exchange] = set()
        #: exchanges of routes with a time-out for the whole of them, by route
        self._timeouts: dict[str, Timeouts[Exchange]] = {}
        self.configure(upstreams, routes, routers, log_access, client or ClientConfig())

    def configure(
        self,
        upstreams: Mapping[str, Upstream],
        routes: Sequence[RouteConfig],
        routers: Sequence[tuple[str, IRouter]],
        log_access: Callable[[AccessRecord], None] | None,
        client: ClientConfig,
    ) -> None:
        """Apply to requests that come from now on; those under way keep their routes."""
        self._client = client
        self.upstreams = upstreams
        self.routers = routers
        self.log_access = log_access
        self._table = RouteTable(routes)
        self.tasks.configure(routes)
        # A request that a custom router sends past the routes has none of its own.
        self._bare_routes = {
            name: RouteConfig(f"router:{name}", Match(), name) for name in upstreams
        }
        self.counters.configure(
            (route.name, route.upstream) for route in (*routes, *self._bare_routes.values())
        )
        self._forwarding = {
            route.name: Forwarding(route, server_timing=client.server_timing)
            for route in (*routes, *self._bare_routes.values())
        }
        seconds = {route.name: route.timeout for route in routes}
        for name, timeouts in list(self._timeouts.items()):
            if name not in seconds and not timeouts:
                del self._timeouts[name]
        for name, timeout in seconds.items():
            if timeout is not None or name in self._timeouts:
                self._timeouts.setdefault(name, Timeouts(timeout)).seconds = timeout

    def _task_ended(self, task: TrackedTask) -> None:
        counters = self.counters.of(task.route.name)
        counters.tasks[task.state.value] = counters.tasks.get(task.state.value, 0) + 1

    def forwarding_about(self, route: RouteConfig) -> Forwarding:
        """Return how calls about the tasks of a route are forwarded: as they are."""
        bare = replace(route, replace_prefix=None, match=Match())
        return Forwarding(bare, server_timing=self._client.server_timing)

    def render(self, request: ClientRequest) -> int:
        """Take a request; the answer comes when it comes."""
        if request.head.target.startswith(_CALLBACK):
            path = request.head.target.partition(b"?")[0].decode("latin-1")
            known = self.tasks.called_back(path)
            Reply(request, 204 if known else 404)
            return NOT_DONE_YET
        Exchange(self, request).start()
        return NOT_DONE_YET

    def make_spool(self, request: Request) -> Spool:
        """Return what receives a whole body."""
        client = self._client
        return Spool(
            client.spool_memory,
            request.pause,
            request.resume,
            lambda: tempfile.TemporaryFile(dir=client.spool_directory),
        )

    def cancel(self, number: int, error: ProxyError) -> bool:
        """End one exchange; returns False if it has ended or never was."""
        for exchange in self.running:
            if exchange.number == number:
                exchange.abandon(error)
                return True
        return self.tasks.cancel(number, error)

    def uses(self, upstream: Upstream) -> bool:
        """Whether an exchange that has not finished is on an upstream."""
        running = any(exchange.upstream is upstream for exchange in self.running)
        return running or self.tasks.uses(upstream)

    def begin(self, exchange: Exchange, route: RouteConfig) -> None:
        """Take note of an exchange whose route has been found."""
        self.running.add(exchange)
        if exchange.bounded:
            self.limit_time(exchange, route)

    def limit_time(self, exchange: Exchange, route: RouteConfig) -> None:
        """Count the time that a route allows from now on."""
        timeouts = self._timeouts.get(route.name)
        if timeouts is not None:
            timeouts.start(exchange, self.now())

    def ended(self, exchange: Exchange) -> None:
        """Forget an exchange."""
        self.running.discard(exchange)
        self.tasks.submit_ended(exchange.number)
        error, pod = exchange.error, exchange.pod
        if error is not None and not exchange.client_left:
            route = "" if exchange.route is None else exchange.route.name
            self.errors.append((self.now(), error.reason, route, None if pod is None else str(pod)))
        if exchange.route is not None and exchange.route.name in self._timeouts:
            self._timeouts[exchange.route.name].stop(exchange)

    def sweep(self) -> None:
        """End the exchanges that have taken too long; to be called now and then."""
        now = self.now()
        self.tasks.sweep()
        for name, timeouts in self._timeouts.items():
            for exchange in timeouts.expire(now):
                exchange.abandon(ExchangeTimeout(f"route {name} allows {timeouts.seconds:g} s"))

    def choose(self, info: RequestInfo) -> tuple[Forwarding, frozenset[Address] | None]:
        """
        Find the route for a request, and the pods that it is confined to, if any.

        :raise NoRoute: there is none.
        :raise RouterFailed: a custom router raised or named an unknown upstream.
        """
        pods: frozenset[Address] | None = None
        for name, router in self.routers:
            try:
                decision = router.route(info)
            except Exception:
                _log.failure("router {router} failed", router=name)
                raise RouterFailed(f"router {name} failed; the log has more") from None
            if decision is None:
                continue
            if decision.pods is not None:
                pods = decision.pods if pods is None else pods & decision.pods
            if decision.upstream is not None:
                if decision.upstream not in self._bare_routes:
                    raise RouterFailed(f"router {name} chose no upstream of the configuration")
                bare = self._bare_routes[decision.upstream]
                return self._forwarding[bare.name], pods
        route = self._table.find(info)
        if route is None:
            raise NoRoute(info.method, info.path)
        return self._forwarding[route.name], pods
