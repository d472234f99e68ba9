"""
What is counted while requests pass, and how it is told to Prometheus.

Counting is a few additions on plain objects that each route owns; names and
labels come into it only when somebody asks. Names follow
https://prometheus.io/docs/practices/naming/; how many series there are is
bounded by the configuration and the number of pods.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from strictproxy.snapshot import PodCondition, UpstreamSnapshot

#: Upper bounds in seconds, from a quick answer to a job of hours.
BOUNDS = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0,
)  # fmt: skip
_LATENCY_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """Counts of observations by their size."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = BOUNDS) -> None:
        self._bounds = bounds
        #: observations up to each bound and above the one before; the last has no bound
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return the counts as Prometheus has them: each includes those before."""
        found, count = [], 0
        for bound, each in zip((*map(str, self._bounds), "+Inf"), self.counts, strict=True):
            count += each
            found.append((bound, float(count)))
        return found


class RouteCounters:
    """What is counted about the requests of one route."""

    __slots__ = (
        "outcomes",
        "pod_time",
        "retried",
        "route",
        "tasks",
        "upstream",
        "waited",
        "withdrawn",
    )

    def __init__(self, route: str, upstream: str) -> None:
        self.route = route
        self.upstream = upstream
        #: by status, and by the reason if the proxy itself answered
        self.outcomes: dict[tuple[int, str | None], int] = {}
        #: tasks that have ended, by how
        self.tasks: dict[str, int] = {}
        self.waited = Histogram()
        self.pod_time = Histogram()
        #: times that a request was given to another pod, or connection
        self.retried = 0
        #: requests whose client left before their turn came
        self.withdrawn = 0

    def ended(
        self,
        status: int,
        reason: str | None,
        waited: float,
        pod_time: float | None,
        tries: int,
    ) -> None:
        """Count one exchange; times in seconds, None if no pod has had it."""
        key = (status, reason)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        self.waited.observe(waited)
        if pod_time is not None:
            self.pod_time.observe(pod_time)
        elif reason == "client_gone":
            self.withdrawn += 1
        if tries > 1:
            self.retried += tries - 1


class Counters:
    """The counters of all routes. Those of a route that is gone are dropped when they are idle."""

    def __init__(self) -> None:
        #: requests that no route matched
        self.unrouted = RouteCounters("", "")
        self._by_route: dict[str, RouteCounters] = {}

    def __iter__(self) -> Iterator[RouteCounters]:
        yield self.unrouted
        yield from self._by_route.values()

    def configure(self, routes: Iterable[tuple[str, str]]) -> None:
        """Have counters for these routes, given by name and upstream, and for no others."""
        self._by_route = {name: self._of(name, upstream) for name, upstream in routes}

    def of(self, route: str) -> RouteCounters:
        """Return the counters of a route; one that is gone shares those of no route."""
        return self._by_route.get(route, self.unrouted)

    def _of(self, name: str, upstream: str) -> RouteCounters:
        known = self._by_route.get(name)
        if known is not None and known.upstream == upstream:
            return known
        return RouteCounters(name, upstream)


@dataclass(slots=True)
class ProcessFigures:
    """What the process as a whole tells."""

    client_connections: int = 0
    max_client_connections: int = 0
    config_digest: str = ""
    reloads: Mapping[str, int] = field(default_factory=dict)
    reload_failed: bool = False
    #: when the configuration in force was read, seconds of the epoch
    configured_at: float = 0.0
    #: tasks that wait or run, by upstream, route and state
    tasks: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    #: bytes of the bodies and results of detached requests
    task_bytes: int = 0
    #: calls about ended tasks, by outcome
    callbacks: Mapping[str, int] = field(default_factory=dict)


class ProxyCollector(Collector):
    """
    Tells Prometheus everything, from snapshots.

    :param latency: how late the reactor was, as observed by whoever owns this.
    """

    def __init__(
        self,
        counters: Counters,
        upstreams: Callable[[], Iterable[UpstreamSnapshot]],
        process: Callable[[], ProcessFigures],
        latency: Histogram,
    ) -> None:
        self._counters = counters
        self._upstreams = upstreams
        self._process = process
        self._latency = latency

    def collect(self) -> Iterator[Metric]:
        """Return every metric."""
        snapshots = list(self._upstreams())
        yield from self._requests()
        yield from self._tasks()
        yield from _line(snapshots)
        yield from _pods(snapshots)
        yield from _discovery(snapshots)
        yield from self._of_process()

    def _requests(self) -> Iterator[Metric]:
        labels = ["upstream", "route"]
        requests = CounterMetricFamily(
            "strictproxy_requests",
            "Requests by class of status, and by the reason if the proxy itself answered.",
            labels=[*labels, "code", "reason"],
        )
        waited = HistogramMetricFamily(
            "strictproxy_request_wait_seconds", "Time until a request had its slot.", labels=labels
        )
        pod_time = HistogramMetricFamily(
            "strictproxy_request_pod_seconds", "Time that a request held its slot.", labels=labels
        )
        retried = CounterMetricFamily(
            "strictproxy_request_retries",
            "Times that a request was given to another pod or connection.",
            labels=labels,
        )
        withdrawn = CounterMetricFamily(
            "strictproxy_requests_withdrawn",
            "Requests whose client left before their turn came.",
            labels=labels,
        )
        for each in self._counters:
            names = [each.upstream, each.route]
            classes: Counter[tuple[str, str]] = Counter()
            for (status, reason), count in each.outcomes.items():
                classes[f"{status // 100}xx", reason or ""] += count
            for (code, why), count in classes.items():
                requests.add_metric([*names, code, why], count)
            waited.add_metric(names, each.waited.buckets(), each.waited.total)
            pod_time.add_metric(names, each.pod_time.buckets(), each.pod_time.total)
            retried.add_metric(names, each.retried)
            withdrawn.add_metric(names, each.withdrawn)
        tasks = CounterMetricFamily(
            "strictproxy_tasks_ended", "Tasks by how they ended.", labels=[*labels, "outcome"]
        )
        for each in self._counters:
            for outcome, count in each.tasks.items():
                tasks.add_metric([each.upstream, each.route, outcome], count)
        yield from (requests, waited, pod_time, retried, withdrawn, tasks)

    def _tasks(self) -> Iterator[Metric]:
        figures = self._process()
        active = GaugeMetricFamily(
            "strictproxy_tasks",
            "Tasks that wait or run now.",
            labels=["upstream", "route", "state"],
        )
        for names, count in figures.tasks.items():
            active.add_metric(names, count)
        callbacks = CounterMetricFamily(
            "strictproxy_task_callbacks",
            "Calls that told somebody of an ended task, by outcome.",
            labels=["outcome"],
        )
        for outcome, count in figures.callbacks.items():
            callbacks.add_metric([outcome], count)
        size = _gauge("strictproxy_task_store_bytes",
                      "Bytes of the bodies and results of detached requests.",
                      figures.task_bytes)  # fmt: skip
        yield from (active, callbacks, size)

    def _of_process(self) -> Iterator[Metric]:
        figures = self._process()
        yield _gauge("strictproxy_client_connections", "Open connections of clients.",
                     figures.client_connections)  # fmt: skip
        yield _gauge("strictproxy_client_connections_limit", "How many of them there may be.",
                     figures.max_client_connections)  # fmt: skip
        info = GaugeMetricFamily(
            "strictproxy_config_info",
            "The configuration in force, by a hash of its file.",
            labels=["digest"],
        )
        info.add_metric([figures.config_digest], 1)
        yield info
        yield _gauge("strictproxy_config_timestamp_seconds", "When it was read.",
                     figures.configured_at)  # fmt: skip
        yield _gauge("strictproxy_config_reload_failed", "Whether the file has mistakes now.",
                     figures.reload_failed)  # fmt: skip
        reloads = CounterMetricFamily(
            "strictproxy_config_reloads", "Reloads by their outcome.", labels=["outcome"]
        )
        for outcome, count in figures.reloads.items():
            reloads.add_metric([outcome], count)
        yield reloads
        latency = HistogramMetricFamily(
            "strictproxy_reactor_latency_seconds",
            "How late the reactor was for what was due.",
        )
        latency.add_metric([], self._latency.buckets(), self._latency.total)
        yield latency
        build = GaugeMetricFamily("strictproxy_build_info", "The version.", labels=["version"])
        build.add_metric([version("strictproxy")], 1)
        yield build


def new_latency() -> Histogram:
    """Return the histogram for the reactor's latency."""
    return Histogram(_LATENCY_BOUNDS)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=float(value))


def _per_upstream(
    snapshots: list[UpstreamSnapshot],
    name: str,
    what: str,
    value: Callable[[UpstreamSnapshot], float | None],
) -> Metric:
    family = GaugeMetricFamily(name, what, labels=["upstream"])
    for each in snapshots:
        figure = value(each)
        if figure is not None:
            family.add_metric([each.name], figure)
    return family


def _line(snapshots: list[UpstreamSnapshot]) -> Iterator[Metric]:
    for name, what, value in (
        ("waiting_requests", "Requests that wait for a slot now.", lambda u: u.waiting),
        ("waiting_bytes", "Bytes of their bodies that are kept.", lambda u: u.waiting_bytes),
        ("oldest_waiting_seconds", "How long the first in line has waited.", lambda u: u.oldest),
        ("leases", "Slots that are taken now.", lambda u: u.running),
        ("slots", "Slots in all, of pods that take requests.", lambda u: u.slots),
        ("utilisation_ratio", "Part of the slots that is taken.", lambda u: u.utilisation),
        (
            "desired_pods",
            "Pods that would serve all that runs and waits now: ceil((running + waiting) / limit).",
            lambda u: u.desired_pods,
        ),
        ("paused", "Whether an operator has paused the upstream.", lambda u: float(u.paused)),
        ("ready", "Whether a set of pods has been trusted yet.", lambda u: float(u.trusted)),
    ):
        yield _per_upstream(snapshots, f"strictproxy_upstream_{name}", what, value)


def _pods(snapshots: list[UpstreamSnapshot]) -> Iterator[Metric]:
    labels = ["upstream", "pod"]
    leases = GaugeMetricFamily("strictproxy_pod_leases", "Requests on a pod now.", labels=labels)
    limit = GaugeMetricFamily("strictproxy_pod_limit", "How many it may have.", labels=labels)
    state = GaugeMetricFamily(
        "strictproxy_pod_state", "1 for the state that a pod is in.", labels=[*labels, "state"]
    )
    requests = CounterMetricFamily(
        "strictproxy_pod_requests", "Requests given to a pod.", labels=labels
    )
    failures = CounterMetricFamily(
        "strictproxy_pod_failures", "Connections and requests that a pod failed.", labels=labels
    )
    first_byte = SummaryMetricFamily(
        "strictproxy_pod_first_byte_seconds",
        "Time from the slot to the head of a pod's answer.",
        labels=labels,
    )
    counts = GaugeMetricFamily(
        "strictproxy_upstream_pods", "Pods by their state.", labels=["upstream", "state"]
    )
    for upstream in snapshots:
        by_state = Counter(pod.condition for pod in upstream.pods)
        for condition in PodCondition:
            counts.add_metric([upstream.name, condition.value], by_state[condition])
        for pod in upstream.pods:
            names = [upstream.name, str(pod.address)]
            leases.add_metric(names, pod.leases)
            limit.add_metric(names, pod.limit)
            state.add_metric([*names, pod.condition.value], 1)
            requests.add_metric(names, pod.stats.requests)
            failures.add_metric(names, pod.stats.failures)
            first_byte.add_metric(names, pod.stats.answers, pod.stats.first_byte_seconds)
    yield from (leases, limit, state, requests, failures, first_byte, counts)


def _discovery(snapshots: list[UpstreamSnapshot]) -> Iterator[Metric]:
    found = [each for each in snapshots if each.discovery is not None]
    yield _per_upstream(
        found,
        "strictproxy_discovery_pods",
        "Pods in the set in force.",
        lambda u: None if u.discovery is None else float(len(u.discovery.in_force or ())),
    )
    yield _per_upstream(
        found,
        "strictproxy_discovery_last_change_timestamp_seconds",
        "When the set in force came into force.",
        lambda u: None if u.discovery is None else u.discovery.since,
    )
    lookups = CounterMetricFamily(
        "strictproxy_discovery_lookups", "Lookups by outcome.", labels=["upstream", "outcome"]
    )
    rejections = CounterMetricFamily(
        "strictproxy_discovery_rejections",
        "Sets that were dropped because lookups did not agree.",
        labels=["upstream"],
    )
    shrinks = CounterMetricFamily(
        "strictproxy_discovery_shrinks",
        "Times that more than half of the pods were gone at once.",
        labels=["upstream"],
    )
    for each in found:
        if each.discovery is not None:
            for outcome, count in each.discovery.lookups.items():
                lookups.add_metric([each.name, outcome], count)
            rejections.add_metric([each.name], each.discovery.rejections)
        shrinks.add_metric([each.name], each.shrinks)
    yield from (lookups, rejections, shrinks)
