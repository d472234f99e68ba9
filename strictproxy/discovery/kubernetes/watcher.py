"""
Keeps to what the API server says, and to what it said last while it says nothing.

List, then watch from there. A watch that ends goes on where it stopped; what
the API server has no history for any more (410) is listed again. Errors are
met with growing pauses. Nothing but an answer ever changes the set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from strictproxy.config.model import KubernetesSource
from strictproxy.discovery.kubernetes.api import ApiError
from strictproxy.discovery.kubernetes.slices import Object, Slices
from strictproxy.interfaces import DiscoveryState, Endpoint, IDiscovery, Publish

_log = Logger()

#: Seconds a watch lasts. Short, because a connection to an API server that has
#: vanished looks like one on which nothing happens.
_WATCH = 60
#: Seconds past those after which the API server is taken for dead.
_GRACE = 10.0
#: Pauses after errors, in seconds: the first, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
#: A watch that lasts less than this, in seconds, and brings nothing, is no success.
_SHORT = 1.0

_OUTCOMES = ("listed", "watched", "gone", "denied", "throttled", "error")
_BY_STATUS = {401: "denied", 403: "denied", 410: "gone", 429: "throttled"}


class SliceApi(Protocol):
    """Lists and watches; see `EndpointSliceApi`."""

    async def fetch(self) -> tuple[list[Object], str]:
        """Return all slices and where to watch from."""

    async def watch(self, version: str, seconds: int, take: Callable[[list[Object]], None]) -> None:
        """Call `take` with events as they come."""


@implementer(IDiscovery)
class KubernetesDiscovery:
    """
    Publishes the pods of a Service's EndpointSlices.

    :param random: from 0 to 1, so that replicas do not ask in step.
    """

    def __init__(
        self,
        source: KubernetesSource,
        api: SliceApi,
        clock: IReactorTime,
        random: Callable[[], float],
    ) -> None:
        self._name = source.service
        self._api = api
        self._clock = clock
        self._random = random
        self._slices = Slices(source.port, source.family)
        #: where to watch from; None is from a new list
        self._version: str | None = None
        self._publish: Publish | None = None
        self._running: Deferred[None] | None = None
        self._pause: Deferred[None] | None = None
        self._failures = 0
        #: this watch has brought something
        self._heard = False
        self._outcomes: Counter[str] = Counter(dict.fromkeys(_OUTCOMES, 0))
        self._in_force: frozenset[Endpoint] | None = None
        self._since: float | None = None
        self._last_error: str | None = None

    def start(self, publish: Publish) -> None:
        """Begin to list and watch."""
        self._publish = publish
        self._running = Deferred.fromCoroutine(self._run())
        self._running.addErrback(
            lambda failure: failure.trap(CancelledError) and None  # stopped
        )

    def stop(self) -> None:
        """Stop."""
        self._publish = None
        if self._running is not None:
            self._running.cancel()

    def look_now(self) -> None:
        """Do nothing: what changes is told without being asked for."""

    def state(self) -> DiscoveryState:
        """Return a snapshot of what is known."""
        return DiscoveryState(
            self._in_force,
            self._since,
            last_error=self._last_error or self._slices.problem(),
            lookups=dict(self._outcomes),
        )

    async def _run(self) -> None:
        while self._publish is not None:
            least = 0.0
            try:
                await self._turn()
                continue
            except CancelledError:
                raise
            except ApiError as error:
                # It may be another server now, or another history.
                self._version = None
                outcome, reason, least = (
                    _BY_STATUS.get(error.status, "error"),
                    str(error),
                    error.retry_after,
                )
            except Exception as error:
                outcome, reason = "error", str(error) or type(error).__name__
            self._outcomes[outcome] += 1
            self._last_error = reason
            if outcome == "gone" and not self._failures:
                # Quite usual: listed again at once.
                self._failures = 1
                continue
            _log.warn("{name}: API server: {reason}", name=self._name, reason=reason)
            longest = min(_FIRST_PAUSE * 2.0 ** min(self._failures, 30), _LONGEST_PAUSE)
            self._failures += 1
            await deferLater(self._clock, max(least, longest * (0.5 + self._random() / 2)))

    async def _turn(self) -> None:
        """List if need be, and watch as long as it goes."""
        if self._version is None:
            items, version = await self._api.fetch()
            self._slices.replace(items, version)
            self._version = version
            self._outcomes["listed"] += 1
            self._last_error = None
            self._tell()
        began, self._heard = self._clock.seconds(), False
        seconds = _WATCH + int(self._random() * _WATCH / 4)
        watch = Deferred.fromCoroutine(self._api.watch(self._version, seconds, self._take))
        watch.addTimeout(seconds + _GRACE, self._clock)
        await watch
        if not self._heard and self._clock.seconds() - began < _SHORT:
            raise ConnectionError("the API server ended the watch at once")
        self._failures = 0
        self._last_error = None

    def _take(self, events: list[Object]) -> None:
        """Take what the API server tells, several events at once if it says them at once."""
        for event in events:
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                raise ApiError(int(item.get("code", 500)), str(item.get("message", "an error")))
            self._version = str(item["metadata"]["resourceVersion"])
            if kind != "BOOKMARK":
                self._slices.apply(kind, item)
        if not self._heard:
            self._heard = True
            self._outcomes["watched"] += 1
            self._failures = 0
            self._last_error = None
        self._tell()

    def _tell(self) -> None:
        endpoints = self._slices.endpoints()
        if endpoints != self._in_force and self._publish is not None:
            self._in_force, self._since = endpoints, self._clock.seconds()
            problem = self._slices.problem()
            if problem is not None:
                _log.warn("{name}: {problem}", name=self._name, problem=problem)
            self._publish(sorted(endpoints))
