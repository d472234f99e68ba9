"""
Asking pods how they are, on connections of their own that take no slot.

Each pod is checked by itself, out of step with the others. Several results in a
row count, so that one lost packet takes no pod away and one lucky answer brings
none back. What follows from them is `strictproxy.scheduling.health`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure

from strictproxy.asking import ask, reason_of
from strictproxy.config.model import CheckConfig
from strictproxy.http.pool import EndpointFor
from strictproxy.scheduling import Address

#: Checks are put off or brought forward by up to this part of their interval.
_JITTER = 0.1
#: What is looked at of an answer's body.
_MAX_BODY = 64 * 1024


class CheckFailed(Exception):
    """The pod answered, but not as it should."""


class Checker:
    """
    Checks the pods of one upstream.

    :param random: from 0 to 1, so that pods are not checked in step.
    :param passed: called with a pod, once `rise` checks in a row have passed,
        and after each that follows.
    :param failed: called with a pod and why, once `fall` checks in a row have
        failed, and after each that follows.
    """

    def __init__(
        self,
        config: CheckConfig,
        endpoint_for: EndpointFor,
        clock: IReactorTime,
        random: Callable[[], float],
        passed: Callable[[Address], None],
        failed: Callable[[Address, str], None],
    ) -> None:
        self.config = config
        self.clock = clock
        self.random = random
        self.passed = passed
        self.failed = failed
        self._endpoint_for = endpoint_for
        self._checks: dict[Address, _Check] = {}

    def set_pods(self, addresses: Iterable[Address]) -> None:
        """Replace the pods that are checked."""
        wanted = set(addresses)
        for address in self._checks.keys() - wanted:
            self._checks.pop(address).stop()
        for address in wanted - self._checks.keys():
            self._checks[address] = _Check(self, address)

    def stop(self) -> None:
        """Check nothing any more."""
        self.set_pods(())

    async def check(self, address: Address) -> None:
        """
        Check one pod once.

        :raise CheckFailed: it answered, but not as it should.
        """
        config = self.config
        target = Address(address.host, config.port or address.port)
        if config.path is None:
            endpoint = self._endpoint_for(target, config.timeout)
            connection = await endpoint.connect(Factory.forProtocol(_Connection))
            transport: Any = connection.transport  # type: ignore[attr-defined]
            transport.abortConnection()
            return
        answer = await ask(
            target,
            config.path,
            lambda: self._endpoint_for(target, config.timeout),
            self.clock,
            agent="strictproxy-check",
            max_body=_MAX_BODY,
        )
        if answer.status not in config.statuses:
            raise CheckFailed(f"it answered with {answer.status}")
        if config.body is not None and config.body.encode() not in answer.body:
            raise CheckFailed(f"its answer does not contain {config.body!r}")


class _Check:
    """The checks of one pod."""

    def __init__(self, checker: Checker, address: Address) -> None:
        self._checker = checker
        self._address = address
        #: results in a row: so many passed if positive, failed if negative
        self._row = 0
        self._stopped = self._timed_out = False
        self._running: Deferred[None] | None = None
        first = checker.random() * checker.config.every
        self._timer: IDelayedCall | None = checker.clock.callLater(first, self._begin)

    def stop(self) -> None:
        """End."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        if self._running is not None:
            self._running.cancel()

    def _begin(self) -> None:
        self._timer = None
        checker = self._checker
        self._running = Deferred.fromCoroutine(checker.check(self._address))
        self._timed_out = False
        timeout = checker.clock.callLater(checker.config.timeout, self._time_out)
        self._running.addBoth(_cancel, timeout)
        self._running.addCallbacks(self._passed, self._failed)

    def _time_out(self) -> None:
        self._timed_out = True
        if self._running is not None:
            self._running.cancel()

    def _passed(self, _: object) -> None:
        self._row = max(self._row, 0) + 1
        self._next()
        if self._row >= self._checker.config.rise:
            self._checker.passed(self._address)

    def _failed(self, failure: Failure) -> None:
        if self._stopped:
            return
        self._row = min(self._row, 0) - 1
        self._next()
        if -self._row >= self._checker.config.fall:
            reason = reason_of(failure)
            if self._timed_out:
                reason = f"no answer in {self._checker.config.timeout:g} s"
            self._checker.failed(self._address, f"its check failed: {reason}")

    def _next(self) -> None:
        self._running = None
        spread = 1 + _JITTER * (2 * self._checker.random() - 1)
        delay = self._checker.config.every * spread
        self._timer = self._checker.clock.callLater(delay, self._begin)


def _cancel(result: object, timer: IDelayedCall) -> object:
    if timer.active():
        timer.cancel()
    return result


class _Connection(Protocol):
    """A connection that only has to come about."""
