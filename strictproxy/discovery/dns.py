"""
Pods that are the addresses of a headless Service's DNS name.

One LoopingCall looks every so often; when an answer differs from the set in
force, a second one asks again, a moment apart, until `Stability` has made up
its mind. Neither can be stopped by an exception: whatever goes wrong with a
lookup is an answer that could not be had, and the last good set stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from strictproxy.config.model import DnsSource
from strictproxy.discovery.records import LookupFailed, Outcome
from strictproxy.discovery.stability import Stability, Verdict
from strictproxy.interfaces import DiscoveryState, Endpoint, IDiscovery, Publish

_log = Logger()


class Source(Protocol):
    """Looks once; see `Names.lookup`."""

    async def lookup(self) -> tuple[Outcome, Collection[Endpoint]]:
        """Look."""


@implementer(IDiscovery)
class DnsDiscovery:
    """
    Publishes the stable pods of one name.

    :param random: from 0 to 1; decides when, within the interval, the looks
        after the first one are, so that replicas do not ask in step.
    """

    def __init__(
        self,
        config: DnsSource,
        source: Source,
        clock: IReactorTime,
        random: Callable[[], float],
    ) -> None:
        self._config = config
        self._source = source
        self._clock = clock
        self._random = random
        self._stability = Stability(config.lookups)
        self._publish: Publish | None = None
        self._watch = LoopingCall(lambda: Deferred.fromCoroutine(self._look()))
        self._watch.clock = clock
        self._confirm = LoopingCall(lambda: Deferred.fromCoroutine(self._look_again()))
        self._confirm.clock = clock
        self._verdict = Verdict.SAME
        self._outcomes: Counter[str] = Counter({each.value: 0 for each in Outcome})
        #: what is awaited now, and ends with us
        self._pending: Deferred[None] | Deferred[tuple[Outcome, Collection[Endpoint]]] | None = None
        #: until the looks after the first one begin
        self._phase: IDelayedCall | None = None
        self._looking = False
        #: when the last look began
        self._looked = float("-inf")
        #: when there was an answer last
        self._answered_at = clock.seconds()

    def start(self, publish: Publish) -> None:
        """Begin to look."""
        self._publish = publish
        self._answered_at = self._clock.seconds()
        Deferred.fromCoroutine(self._look()).addErrback(_log_failure)
        self._phase = self._clock.callLater(
            max(self._random(), 0.001) * self._config.every, self._begin
        )

    def _begin(self) -> None:
        self._phase = None
        self._watch.start(self._config.every).addErrback(_log_failure)

    def stop(self) -> None:
        """Stop looking."""
        self._publish = None
        if self._phase is not None:
            self._phase.cancel()
            self._phase = None
        for loop in (self._confirm, self._watch):
            if loop.running:
                loop.stop()
        if self._pending is not None:
            self._pending.cancel()

    def look_now(self) -> None:
        """Look at once, unless a look, a round or a pause is under way, or was a moment ago."""
        # A pod that refuses every request asks for a look each time.
        now = self._clock.seconds()
        if now - self._looked < self._config.interval:
            return
        if self._publish is not None and not self._looking:
            Deferred.fromCoroutine(self._look()).addErrback(_log_failure)

    def state(self) -> DiscoveryState:
        """Return a snapshot of what is believed and what is being looked into."""
        return replace(self._stability.state(), lookups=dict(self._outcomes))

    async def _look(self) -> None:
        """Look, and go on until the answer is what is in force, or cannot be had."""
        if self._looking:
            return
        self._looking = True
        self._looked = self._clock.seconds()
        try:
            while self._publish is not None:
                verdict = await self._ask()
                if verdict is Verdict.CANDIDATE:
                    verdict = await self._round()
                if verdict is not Verdict.REJECTED:
                    break
                _log.info(
                    "{name}: the answers differ; next look in {seconds:g} s",
                    name=self._config.name,
                    seconds=self._config.retry_after,
                )
                await self._wait(self._config.retry_after)
        except Exception:
            _log.failure("{name}: discovery failed", name=self._config.name)
        finally:
            self._looking = False

    async def _wait(self, seconds: float) -> None:
        """Wait; less if we are stopped."""
        if not seconds or self._publish is None:
            return
        pause: Deferred[None] = deferLater(self._clock, seconds)
        self._pending = pause
        try:
            await pause
        except CancelledError:
            pass
        finally:
            self._pending = None

    async def _round(self) -> Verdict:
        """Ask again, a moment apart, until the candidate is believed or dropped."""
        if self._publish is not None:
            await self._confirm.start(self._config.interval, now=False)
        if self._verdict is Verdict.ACCEPTED:
            self._tell()
        return self._verdict

    def _tell(self) -> None:
        if self._publish is not None:
            self._publish(sorted(self._stability.in_force or ()))

    async def _look_again(self) -> None:
        self._verdict = await self._ask()
        if self._verdict is not Verdict.AGREED and self._confirm.running:
            self._confirm.stop()

    async def _ask(self) -> Verdict:
        """Ask once, and return what became of the answer."""
        self._pending = asked = Deferred.fromCoroutine(self._source.lookup())
        try:
            outcome, endpoints = await asked
        except CancelledError:
            return Verdict.UNKNOWN  # stopped
        except LookupFailed as error:
            return self._unanswered(error.outcome, str(error))
        except Exception as error:
            _log.failure("{name}: a lookup broke", name=self._config.name)
            return self._unanswered(Outcome.ERROR, str(error) or type(error).__name__)
        finally:
            self._pending = None
        self._outcomes[outcome.value] += 1
        self._answered_at = self._clock.seconds()
        return self._stability.answer(endpoints, self._answered_at)

    def _unanswered(self, outcome: Outcome, reason: str) -> Verdict:
        self._outcomes[outcome.value] += 1
        _log.warn("{name}: lookup failed: {reason}", name=self._config.name, reason=reason)
        verdict = self._stability.no_answer(reason)
        now, most = self._clock.seconds(), self._config.max_stale
        if most is not None and now - self._answered_at >= most and self._stability.give_up(now):
            _log.error(
                "{name}: no answer for {seconds:g} s: its pods are given up",
                name=self._config.name,
                seconds=now - self._answered_at,
            )
            self._tell()
        return verdict


def _log_failure(failure: Failure) -> None:
    _log.failure("discovery failed", failure=failure)
