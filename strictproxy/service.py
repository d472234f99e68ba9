"""
The composition root: puts the parts together, starts, changes and stops them in order.

The only place that obtains the reactor. Start: routers, upstreams, then the
listeners, so that nothing is accepted that could not be routed. Reload: what
can fail first, then the change, which cannot. Stop: the listeners first, then
running and waiting requests within `drain_timeout`, then whatever is left.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, ClassVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from twisted.application.service import IServiceCollection, Service
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import LoopingCall, deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.logger import ILogObserver, Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from twisted.python.usage import Options as TwistedOptions
from twisted.python.usage import UsageError

from strictproxy.admin.access import Access, Refused
from strictproxy.admin.documents import compact_document
from strictproxy.admin.events import Events
from strictproxy.admin.resources import QuietSite, make_admin
from strictproxy.config import Config
from strictproxy.config.changes import changes
from strictproxy.config.file import ConfigFile
from strictproxy.config.model import AdminConfig, ListenConfig, LogConfig
from strictproxy.errors import Cancelled, ConfigError, ShuttingDown
from strictproxy.http.site import StrictSite
from strictproxy.http.tls import ServerCertificates
from strictproxy.keeping import TaskKeeper
from strictproxy.listeners import Listeners
from strictproxy.logs import AccessLog, LogWriter
from strictproxy.metrics import ProcessFigures, ProxyCollector, new_latency
from strictproxy.parts import Parts, make_routers
from strictproxy.process import descriptors, spare_the_collector, within_descriptors
from strictproxy.proxy import ProxyResource
from strictproxy.scheduling import Address
from strictproxy.tracing import Tracing, make_provider
from strictproxy.upstream import Upstream

_log = Logger()

_POOL_SWEEP = 0.5
#: How often the configuration and certificate files are looked at, seconds.
_LOOK_EVERY = 5.0
#: Seconds that the last spans get to be exported.
_EXPORT = 5.0


class Options(TwistedOptions):
    """Command line of `twistd strictproxy`."""

    synopsis = "[--config FILE]"
    longdesc = "A strict least-connection reverse proxy for heavy services on Kubernetes."
    optParameters: ClassVar = [
        ["config", "c", "/etc/strictproxy/strictproxy.yaml", "Configuration file"],
    ]

    def postOptions(self) -> None:
        """Read the configuration, so that mistakes show before anything starts."""
        self.file = ConfigFile(self["config"])
        try:
            self.configuration = self.file.read()
        except ConfigError as error:
            raise UsageError(f"invalid configuration\n{error}") from None


def makeService(options: Options) -> ProxyService:
    """Return the service for `twistd` to run."""
    from twisted.internet import reactor

    spare_the_collector()
    try:
        service = ProxyService(options.configuration, reactor, options.file)
        # Where twistd wants the log is for as long as it runs.
        service.log_config = lambda config: log_config(config, options.parent or {})
        service.observer = LogWriter(service.log_config(options.configuration.log))
    except ConfigError as error:
        raise SystemExit(f"strictproxy: {error}") from None
    return service


def log_config(config: LogConfig, outer: Any) -> LogConfig:
    """
    Return the log's configuration, with its file where twistd's own would be.

    What the configuration says goes first, then `--logfile`; a twistd that
    turns into a daemon has no standard output and writes twistd.log.

    :param outer: twistd's own options.
    """
    if config.file is None and "nodaemon" in outer:
        given = outer.get("logfile")
        file = given or (None if outer["nodaemon"] else "twistd.log")
        return replace(config, file=None if file == "-" else file)
    return config


class ProxyService(Service):
    """
    The whole proxy.

    :param file: where the configuration is from; None if it cannot change.
    :raise ConfigError: a router cannot be found or refuses its settings.
    """

    def __init__(self, config: Config, reactor: Any, file: ConfigFile | None = None) -> None:
        self.setName("strictproxy")
        #: writes the log of the application that this service joins
        self.observer: LogWriter | None = None
        #: completes the log's configuration with what twistd was told
        self.log_config: Callable[[LogConfig], LogConfig] = lambda config: config
        self.config = config
        self.file = file
        self._reactor = reactor
        self._parts = Parts(reactor)
        self._listeners = Listeners(reactor)
        self._closing = False
        self.upstreams: dict[str, Upstream] = {
            name: self._parts.upstream(each, _routes_to(config, name))
            for name, each in config.upstreams.items()
        }
        #: those that a configuration has dropped, as long as they have something to do
        self._retired: list[Upstream] = []
        self.proxy = ProxyResource(
            self.upstreams,
            config.routes,
            make_routers(config, self._pods_of),
            self._reactor,
            _access_log(config.log),
            config.client,
        )
        self.proxy.tracing = _tracing(config)
        self.keeper = TaskKeeper(self.proxy, self._parts.resolve, self._may_list, self._reactor)
        client = within_descriptors(config.client, descriptors())
        self.site = StrictSite(self.proxy, client, self._reactor)
        self.site.noisy = False
        self._latency = new_latency()
        self._swept = 0.0
        self._configured_at = self._reactor.seconds()
        self._registry = CollectorRegistry()
        # Only what this process is about; and the usual about every process.
        snapshots = lambda: [each.snapshot() for each in self.upstreams.values()]  # noqa: E731
        self._registry.register(
            ProxyCollector(self.proxy.counters, snapshots, self._figures, self._latency)
        )
        for usual in (ProcessCollector, PlatformCollector, GCCollector):
            usual(registry=self._registry)
        self._events = Events(self._event, self._reactor)
        self.admin = self._make_admin(config.admin)
        #: certificates of the listeners that have some, read again when their files change
        self._certificates: dict[ListenConfig, ServerCertificates] = _certificates(config, {})
        #: the last reload failed, so what runs is not what the file says
        self.reload_error: str | None = None
        self.reloads = {"success": 0, "failure": 0}
        self._reloading = DeferredLock()
        self._looker = LoopingCall(self._look)
        self._looker.clock = self._reactor
        self._sweeper = LoopingCall(self._sweep)
        self._sweeper.clock = self._reactor

    def setServiceParent(self, parent: IServiceCollection) -> None:
        """Join an application; its log is written as the configuration says."""
        super().setServiceParent(parent)
        if isinstance(parent, Componentized) and self.observer is not None:
            parent.setComponent(ILogObserver, self.observer)

    # -- start

    def startService(self) -> None:
        """Start everything; if a listener cannot be opened the reactor is stopped."""
        super().startService()
        self._reactor.callWhenRunning(self._take_signals)
        self.started = Deferred.fromCoroutine(self._start())
        self.started.addErrback(self._cannot_start)

    def _take_signals(self) -> None:
        """
        Stop on SIGTERM with exit code 0, and on a second one at once; reload on SIGHUP.

        Twisted's own handler ends the process by the signal in the end, which
        Kubernetes would show as a failure.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)
            signal.signal(signal.SIGHUP, self._hang_up)

    def _terminate(self, number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        self._reactor.callFromThread(self._reactor.stop)

    def _hang_up(self, _number: int, _frame: object) -> None:
        self._reactor.callFromThread(self.reload)

    async def _start(self) -> None:
        self.site.start()
        self._sweeper.start(_POOL_SWEEP, now=False).addErrback(_log_failure)
        self._looker.start(_LOOK_EVERY, now=False).addErrback(_log_failure)
        if self.config.tasks is not None:
            await self.keeper.start(self.config.tasks, self.config.routes, self.upstreams)
        for upstream in self.upstreams.values():
            upstream.start()
        await self._listen(self.config, self._certificates, self.admin)

    def _may_list(self, authorization: str | None) -> tuple[int, str] | None:
        """Return why somebody may not see the tasks of all clients, or None."""
        if self.config.admin is None:
            return 403, "listing tasks needs admin.token_file in the configuration"
        try:
            # Where clients are, being near is no reason for trust.
            Access(self.config.admin).check(authorization, changes=True)
        except Refused as error:
            return error.status, f"listing tasks takes the admin token: {error}"
        return None

    def _make_admin(self, config: AdminConfig | None) -> QuietSite | None:
        if config is None:
            return None
        root = make_admin(self, Access(config), self._registry, self._events)
        return QuietSite(root, reactor=self._reactor)

    async def _listen(
        self,
        config: Config,
        certificates: dict[ListenConfig, ServerCertificates],
        admin: QuietSite | None,
    ) -> None:
        wanted: list[tuple[str, Any]] = []
        for listener in config.listen:
            factory: Any = self.site
            if listener.tls is not None:
                creator = certificates[listener]
                factory = TLSMemoryBIOFactory(creator, False, self.site, clock=self._reactor)
            wanted.append((listener.endpoint, factory))
        if config.admin is not None:
            wanted.append((config.admin.endpoint, admin))
        await self._listeners.change(wanted, shared=config.reuse_port)

    def _cannot_start(self, failure: Failure) -> None:
        # A proxy that cannot listen must not run deaf.
        _log.critical("cannot start: {reason}", reason=failure.getErrorMessage())
        # twistd itself would report success.
        self._reactor.addSystemEventTrigger("after", "shutdown", os._exit, 1)
        self._reactor.callWhenRunning(self._reactor.stop)

    def addresses(self) -> list[tuple[str, int]]:
        """Return where the listeners are, the admin's last; for tests and the demo."""
        admin = [] if self.config.admin is None else [self.config.admin.endpoint]
        return self._listeners.hosts([each.endpoint for each in self.config.listen] + admin)

    # -- reload

    def reload(self) -> Deferred[list[str]]:
        """
        Read the file again and apply it; a broken one changes nothing.

        :return: what has changed, a line for each key. Fails with `ConfigError`
            if nothing has, because the file is no good; that has been logged.
        """
        return self._reloading.run(self._reload, lambda file: file.read())

    def _look(self) -> Deferred[list[str]]:
        """Look for changed files."""
        for certificates in self._certificates.values():
            try:
                certificates.refresh()
            except Exception as error:
                _log.error("certificates stay as they were: {error}", error=error)
        looked: Deferred[list[str]] = self._reloading.run(
            self._reload, lambda file: file.read_if_changed()
        )
        return looked.addErrback(lambda failure: failure.trap(ConfigError) and [])

    def _reload(self, read: Callable[[ConfigFile], Config | None]) -> Deferred[list[str]]:
        return Deferred.fromCoroutine(self._reload_from(read))

    async def _reload_from(self, read: Callable[[ConfigFile], Config | None]) -> list[str]:
        if self.file is None or self._closing:
            return []
        try:
            config = read(self.file)
            if config is None:
                return []
            changed = await self.apply(config)
        except ConfigError as error:
            self.reloads["failure"] += 1
            self.reload_error = str(error)
            _log.error("the configuration stays as it was: {error}", error=error)
            raise
        self.reloads["success"] += 1
        self.reload_error = None
        for line in changed:
            _log.info("configuration: {line}", line=line)
        _log.info("configuration read again: {count} changes", count=len(changed))
        return changed

    async def apply(self, config: Config) -> list[str]:
        """
        Change to another configuration; what runs or waits goes on.

        :return: what has changed, a line for each key.
        :raise ConfigError: something cannot be had; nothing has changed.
        """
        old = self.config
        # What can fail, first: nothing that is used now is touched.
        change_tasks = self.keeper.change(config.tasks)
        routers = make_routers(config, self._pods_of)
        kept = self._find_kept(config)
        ways = {
            name: self._parts.way_to_pods(config.upstreams[name].tls)
            for name, upstream in kept.items()
            if config.upstreams[name].tls != upstream.config.tls
        }
        new = {
            name: self._parts.upstream(each, _routes_to(config, name))
            for name, each in config.upstreams.items()
            if name not in kept
        }
        certificates = _certificates(config, self._certificates)
        old_tracing = tracing = self.proxy.tracing
        if config.tracing != old.tracing:
            tracing = _tracing(config)
        if self.observer is not None:
            self.observer.configure(self.log_config(config.log))
        try:
            admin = self.admin
            if config.admin != old.admin:
                admin = self._make_admin(config.admin)
            await self._listen(config, certificates, admin)
        except ConfigError:
            if self.observer is not None:
                self.observer.configure(self.log_config(old.log))
            raise
        # From here on nothing can fail, and all is in one turn of the reactor.
        for name, upstream in kept.items():
            wanted = config.upstreams[name]
            source = None
            if wanted.source != upstream.config.source:
                source = self._parts.discovery(wanted.source)
            upstream.configure(wanted, _routes_to(config, name), ways.get(name), source)
        for upstream in new.values():
            upstream.start()
        both = kept | new
        gone = [each for each in self.upstreams.values() if each not in both.values()]
        self._retired = [each for each in self._retired if each not in both.values()] + gone
        self.upstreams = {name: both[name] for name in config.upstreams}
        self.proxy.configure(
            self.upstreams, config.routes, routers, _access_log(config.log), config.client
        )
        self.proxy.tracing = tracing
        change_tasks()
        if old_tracing is not None and old_tracing is not tracing:
            self._stop_tracing(old_tracing)
        self.site.configure(within_descriptors(config.client, descriptors()))
        self._certificates, self.admin = certificates, admin
        self._configured_at = self._reactor.seconds()
        self.config = config
        return changes(old, config)

    def _find_kept(self, config: Config) -> dict[str, Upstream]:
        """
        Return what goes on under each name.

        One that has only been renamed keeps its counts, or its pods would get
        twice what they may have; so does one that was dropped and comes back.
        """
        kept = {name: self.upstreams[name] for name in config.upstreams if name in self.upstreams}
        left = [each for name, each in self.upstreams.items() if name not in kept]
        for name, wanted in config.upstreams.items():
            if name in kept:
                continue
            for each in (*left, *self._retired):
                if each.config.source == wanted.source and each not in kept.values():
                    kept[name] = each
                    break
        return kept

    def _pods_of(self, upstream: str) -> Collection[Address]:
        return self.upstreams[upstream].pods()

    # -- stop

    def stopService(self) -> Deferred[None]:
        """Drain, then stop everything."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        # Not ready any more: who asks /readyz can know.
        self._closing = True
        if self.config.shutdown_delay:
            _log.info("stopping in {seconds:g} s", seconds=self.config.shutdown_delay)
            await deferLater(self._reactor, self.config.shutdown_delay)
        self.site.closing = True
        admin = [] if self.config.admin is None else [(self.config.admin.endpoint, self.admin)]
        # Whoever looks, and whoever drains, still can.
        await self._listeners.change(admin, shared=self.config.reuse_port)
        self.site.close_idle()
        self.keeper.withdraw()
        await self._drained()
        self.keeper.interrupt()
        for exchange in (*self.proxy.running, *self.proxy.held):
            exchange.abandon(ShuttingDown("the proxy is shutting down"))
        self.keeper.stop()
        self._events.stop()
        await self._listeners.close()
        for upstream in (*self.upstreams.values(), *self._retired):
            upstream.stop()
        self._parts.stop()
        self.site.stop()
        for loop in (self._sweeper, self._looker):
            if loop.running:
                loop.stop()
        if self.proxy.tracing is not None:
            await self._stop_tracing(self.proxy.tracing)

    def _stop_tracing(self, tracing: Tracing) -> Deferred[None]:
        """Export what is left, or what can be in a moment."""
        stopped = deferToThreadPool(self._reactor, self._reactor.getThreadPool(), tracing.stop)
        return stopped.addTimeout(_EXPORT, self._reactor).addErrback(
            lambda failure: _log.warn("spans are lost: {reason}", reason=failure.value)
        )

    async def _drained(self) -> None:
        """Wait until nothing runs or waits, at most `drain_timeout`."""
        deadline = self._reactor.seconds() + self.config.drain_timeout
        proxy, keeper = self.proxy, self.keeper
        if proxy.running or keeper.busy:
            _log.info(
                "draining {count} requests and {tasks} tasks",
                count=len(proxy.running),
                tasks=len(proxy.tasks),
            )
        while (proxy.running or keeper.busy) and self._reactor.seconds() < deadline:
            await deferLater(self._reactor, 0.05)

    # -- what operators may do; see `strictproxy.admin.api.Control`

    @property
    def stopping(self) -> bool:
        """Whether the proxy is shutting down."""
        return self._closing

    @property
    def log_level(self) -> str:
        """What is not as important as this is not logged."""
        return self.config.log.level if self.observer is None else self.observer.level

    def set_log_level(self, level: str) -> None:
        """Log so much, until the configuration's level changes."""
        if self.observer is not None:
            self.observer.level = level

    def cancel(self, number: int) -> bool:
        """End a request; returns False if there is no such one."""
        return self.proxy.cancel(number, Cancelled("an operator has cancelled it"))

    def _event(self) -> dict[str, Any]:
        """Return what the dashboard draws."""
        outcomes: dict[str, int] = {}
        for each in self.proxy.counters:
            for (status, reason), count in each.outcomes.items():
                name = reason or f"{status // 100}xx"
                outcomes[name] = outcomes.get(name, 0) + count
        return {
            "time": self._reactor.seconds(),
            "stopping": self._closing,
            "reload_error": self.reload_error,
            "outcomes": outcomes,
            "errors": list(reversed(self.proxy.errors)),
            "upstreams": {
                name: compact_document(each.snapshot()) for name, each in self.upstreams.items()
            },
        }

    def _figures(self) -> ProcessFigures:
        return ProcessFigures(
            client_connections=len(self.site.channels),
            max_client_connections=self.site.max_channels,
            config_digest="" if self.file is None else self.file.digest,
            reloads=self.reloads,
            reload_failed=self.reload_error is not None,
            configured_at=self._configured_at,
            tasks=self.keeper.active(),
            task_bytes=0 if self.proxy.detached is None else self.proxy.detached.size,
            callbacks={} if self.proxy.callbacks is None else self.proxy.callbacks.outcomes,
        )

    # -- now and then

    def _sweep(self) -> None:
        now = self._reactor.seconds()
        if self._swept:
            self._latency.observe(max(0.0, now - self._swept - _POOL_SWEEP))
        self._swept = now
        self.proxy.sweep()
        for upstream in (*self.upstreams.values(), *self._retired):
            upstream.pool.sweep()
        # A reload may be about to bring one back.
        for upstream in [] if self._reloading.locked else list(self._retired):
            if not self.proxy.uses(upstream):
                self._retired.remove(upstream)
                upstream.stop()


def _routes_to(config: Config, upstream: str) -> list[Any]:
    return [route for route in config.routes if route.upstream == upstream]


def _access_log(config: LogConfig) -> AccessLog | None:
    return AccessLog(config.access_sample, random.random) if config.access else None


def _tracing(config: Config) -> Tracing | None:
    return None if config.tracing is None else Tracing(make_provider(config.tracing))


def _certificates(
    config: Config, known: dict[ListenConfig, ServerCertificates]
) -> dict[ListenConfig, ServerCertificates]:
    """
    Return what TLS listeners present.

    :raise ConfigError: a file is missing or no good.
    """
    return {
        listener: known.get(listener) or ServerCertificates(listener.tls)
        for listener in config.listen
        if listener.tls is not None
    }


def _log_failure(failure: Failure) -> None:
    _log.failure("a periodic task failed", failure=failure)
