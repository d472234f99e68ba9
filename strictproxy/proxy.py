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

from strictproxy.answering import Answering, request_info
from strictproxy.config.model import ClientConfig, Match, RouteConfig
from strictproxy.detaching import Submission, wants_to_detach
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
from strictproxy.task_pages import TaskPages
from strictproxy.tasks.aftermath import Aftermath
from strictproxy.tasks.callbacks import Callbacks
from strictproxy.tasks.detached import DetachedTasks
from strictproxy.tasks.detached_task import DetachedTask
from strictproxy.tasks.record import HeldSlot
from strictproxy.tasks.task import TrackedTask
from strictproxy.tasks.tracked import CALLBACK_PATH, TrackedTasks
from strictproxy.tracing import Tracing
from strictproxy.upstream import Upstream

_log = Logger()

#: What begins like this may be for us.
_OUR_PATHS = b"/.strictproxy/"
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
        self.tasks.make_run = self.make_run
        #: detached requests, the pages about them, and who is told of them, if there are any
        self.detached: DetachedTasks | None = None
        self.pages: TaskPages | None = None
        self.callbacks: Callbacks | None = None
        #: slots that a crash left in use
        self.held: set[Aftermath] = set()
        self._clock = clock
        self.next_number = itertools.count(1).__next__
        #: the errors that clients got last: time, reason, route, pod
        self.errors: deque[tuple[float, str, str, str | None]] = deque(maxlen=_ERRORS)
        #: exchanges that have not finished
        self.running: set[Exchange | Submission] = set()
        #: exchanges of routes with a time-out for the whole of them, by route
        self._timeouts: dict[str, Timeouts[Answering]] = {}
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
        self._count_task(task.route.name, task.state.value)

    def detached_ended(self, task: DetachedTask) -> None:
        """Take note of a detached request that has ended."""
        self._count_task(task.record.route, task.record.state.value)
        if self.callbacks is not None:
            self.callbacks.tell(task)

    def _count_task(self, route: str, outcome: str) -> None:
        tasks = self.counters.of(route).tasks
        tasks[outcome] = tasks.get(outcome, 0) + 1

    def forwarding_about(self, route: RouteConfig) -> Forwarding:
        """Return how calls about the tasks of a route are forwarded: as they are."""
        bare = replace(route, replace_prefix=None, match=Match())
        return Forwarding(bare, server_timing=self._client.server_timing)

    def render(self, request: ClientRequest) -> int:
        """Take a request; the answer comes when it comes."""
        head = request.head
        if head.target.startswith(_OUR_PATHS) and self._is_ours(request):
            return NOT_DONE_YET
        if self.detached is not None and head.get(b"prefer") is not None and self._detach(request):
            return NOT_DONE_YET
        Exchange(self, request).start()
        return NOT_DONE_YET

    def _is_ours(self, request: ClientRequest) -> bool:
        """Answer what is about tasks."""
        target = request.head.target
        if target.startswith(_CALLBACK):
            known = self.tasks.called_back(target.partition(b"?")[0].decode("latin-1"))
            Reply(request, lambda reply: reply.send(204 if known else 404))
            return True
        if self.pages is not None and self.pages.owns(target):
            self.pages.serve(request)
            return True
        return False

    def _detach(self, request: ClientRequest) -> bool:
        """Accept a request that is to be answered later, if its client and its route want that."""
        preferences = wants_to_detach(request)
        if preferences is None or self.detached is None:
            return False
        try:
            forwarding, _ = self.choose(request_info(request.head, request.origin()[1]))
        except ProxyError:
            return False  # an exchange will say so
        if forwarding.route.detach is None:
            return False
        upstream = self.upstreams[forwarding.route.upstream]
        Submission(self, self.detached, request, forwarding, upstream, preferences).start()
        return True

    def make_run(self, request: Request) -> Exchange:
        """Return the exchange of a request that nobody waits for."""
        return Exchange(self, request)

    def hold(self, task: DetachedTask, slot: HeldSlot) -> None:
        """Hold the slot of a detached request that a crash interrupted."""
        upstream = self.upstreams.get(task.record.upstream)
        if upstream is None:
            task.let_go(slot)
        else:
            number = self.next_number()
            left = self.held.discard
            self.held.add(Aftermath(task, slot, upstream, number, self._clock, left))

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
        for each in (*self.running, *self.held):
            if each.number == number:
                each.abandon(error)
                return True
        return self.tasks.cancel(number, error)

    def uses(self, upstream: Upstream) -> bool:
        """Whether an exchange that has not finished is on an upstream."""
        running = any(each.upstream is upstream for each in (*self.running, *self.held))
        return running or self.tasks.uses(upstream)

    def begin(self, exchange: Exchange | Submission, route: RouteConfig) -> None:
        """Take note of an exchange whose route has been found."""
        self.running.add(exchange)
        if self._timeouts and exchange.bounded:
            self.limit_time(exchange, route)

    def limit_time(self, exchange: Answering, route: RouteConfig) -> None:
        """Count the time that a route allows from now on."""
        timeouts = self._timeouts.get(route.name)
        if timeouts is not None:
            timeouts.start(exchange, self.now())

    def ended(self, exchange: Exchange | Submission) -> None:
        """Forget an exchange."""
        self.running.discard(exchange)
        self.tasks.submit_ended(exchange.number)
        error, pod = exchange.error, exchange.pod
        if error is not None and not exchange.client_left:
            route = "" if exchange.route is None else exchange.route.name
            self.errors.append((self.now(), error.reason, route, None if pod is None else str(pod)))
        if self._timeouts and exchange.route is not None:
            timeouts = self._timeouts.get(exchange.route.name)
            if timeouts is not None:
                timeouts.stop(exchange)

    def sweep(self) -> None:
        """End the exchanges that have taken too long; to be called now and then."""
        now = self.now()
        self.tasks.sweep()
        if self.detached is not None:
            self.detached.sweep()
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
