"""
Pods that are the addresses of a headless Service's DNS name.

One LoopingCall looks every so often; when an answer differs from the set in
force, a second one asks again, a moment apart, until `Stability` has made up
its mind. Neither can be stopped by an exception: whatever goes wrong with a
lookup is an answer that could not be had, and the last good set stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from socket import AF_INET6, inet_ntop
from typing import Protocol

from twisted.internet.defer import CancelledError, Deferred, FirstError, gatherResults, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.names import dns
from twisted.names.client import Resolver
from twisted.names.error import DNSNameError
from twisted.python.failure import Failure
from zope.interface import implementer

from strictproxy.config.model import DnsSource
from strictproxy.discovery.stability import Stability, StabilityState, Verdict
from strictproxy.interfaces import IDiscovery, Publish
from strictproxy.scheduling import Address

_log = Logger()

#: Seconds to wait for one name server, first and second try.
TIMEOUTS = (1, 2)


class AddressSource(Protocol):
    """Looks a name up once."""

    def addresses(self, name: str) -> Deferred[Collection[str]]:
        """
        Return the IP addresses of `name`; none if the name has none or does not exist.

        Fails if it could not be found out.
        """


class NamesSource:
    """
    Looks names up through twisted.names, A and AAAA, over TCP where UDP was truncated.
    """

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    def addresses(self, name: str) -> Deferred[Collection[str]]:
        """Return the addresses of `name`; see `AddressSource`."""
        lookups = [
            self._resolver.lookupAddress(name, timeout=TIMEOUTS),
            self._resolver.lookupIPV6Address(name, timeout=TIMEOUTS),
        ]
        for lookup in lookups:
            lookup.addCallbacks(_addresses_in, _no_such_name)
        both: Deferred[list[list[str]]] = gatherResults(lookups, consumeErrors=True)
        return both.addCallbacks(_flatten, _first_failure)


def _addresses_in(sections: tuple[Iterable[dns.RRHeader], ...]) -> list[str]:
    answers, _, _ = sections
    found = []
    for record in answers:
        payload: object = record.payload
        if isinstance(payload, dns.Record_A):
            found.append(payload.dottedQuad())
        elif isinstance(payload, dns.Record_AAAA):
            found.append(inet_ntop(AF_INET6, payload.address))
    return found


def _no_such_name(failure: Failure) -> list[str]:
    # For a headless Service, NXDOMAIN is how "no pod is ready" may look.
    failure.trap(DNSNameError)
    return []


def _flatten(lists: list[list[str]]) -> Collection[str]:
    return [address for addresses in lists for address in addresses]


def _first_failure(failure: Failure) -> Failure:
    error = failure.value
    return error.subFailure if isinstance(error, FirstError) else failure


@implementer(IDiscovery)
class DnsDiscovery:
    """Publishes the stable addresses of one name."""

    def __init__(self, config: DnsSource, source: AddressSource, clock: IReactorTime) -> None:
        self._config = config
        self._source = source
        self._clock = clock
        self._stability = Stability(config.lookups)
        self._publish: Publish | None = None
        self._watch = LoopingCall(lambda: Deferred.fromCoroutine(self._look()))
        self._watch.clock = clock
        self._confirm = LoopingCall(lambda: Deferred.fromCoroutine(self._look_again()))
        self._confirm.clock = clock
        self._verdict = Verdict.SAME
        self._pause: Deferred[None] | None = None
        self._looking = False
        #: when the last look began
        self._looked = float("-inf")

    def start(self, publish: Publish) -> None:
        """Begin to look."""
        self._publish = publish
        self._watch.start(self._config.every).addErrback(_log_failure)

    def stop(self) -> None:
        """Stop looking."""
        self._publish = None
        for loop in (self._confirm, self._watch):
            if loop.running:
                loop.stop()
        if self._pause is not None:
            self._pause.cancel()

    def look_now(self) -> None:
        """Look at once, unless a look, a round or a pause is under way, or was a moment ago."""
        # A pod that refuses every request asks for a look each time.
        now = self._clock.seconds()
        if now - self._looked < self._config.interval:
            return
        if self._publish is not None and not self._looking:
            Deferred.fromCoroutine(self._look()).addErrback(_log_failure)

    def state(self) -> StabilityState:
        """Return a snapshot of what is believed and what is being looked into."""
        return self._stability.state()

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
                self._pause = deferLater(self._clock, self._config.retry_after)
                await self._pause
        except CancelledError:
            pass  # stopped during the pause
        except Exception:
            _log.failure("{name}: discovery failed", name=self._config.name)
        finally:
            self._looking = False

    async def _round(self) -> Verdict:
        """Ask again, a moment apart, until the candidate is believed or dropped."""
        if self._publish is not None:
            await self._confirm.start(self._config.interval, now=False)
        if self._verdict is Verdict.ACCEPTED and self._publish is not None:
            self._publish(sorted(self._stability.in_force or ()))
        return self._verdict

    async def _look_again(self) -> None:
        self._verdict = await self._ask()
        if self._verdict is not Verdict.AGREED and self._confirm.running:
            self._confirm.stop()

    def _ask(self) -> Deferred[Verdict]:
        """Ask once; the result is what became of the answer. Never fails."""
        try:
            asked = self._source.addresses(self._config.name)
        except Exception:
            return succeed(self._unanswered(Failure()))
        return asked.addCallbacks(self._answered, self._unanswered)

    def _answered(self, hosts: Collection[str]) -> Verdict:
        addresses = [Address(host, self._config.port) for host in hosts]
        return self._stability.answer(addresses, self._clock.seconds())

    def _unanswered(self, failure: Failure) -> Verdict:
        reason = failure.getErrorMessage() or type(failure.value).__name__
        _log.warn("{name}: lookup failed: {reason}", name=self._config.name, reason=reason)
        return self._stability.no_answer(reason)


def _log_failure(failure: Failure) -> None:
    _log.failure("discovery failed", failure=failure)
