"""
The composition root: puts the parts together, starts and stops them in order.

The only place that obtains the reactor. Start: routers, upstreams, then the
listeners, so that nothing is accepted that could not be routed. Stop: the
listeners first, then running and waiting requests within `drain_timeout`,
then whatever is left.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, ClassVar

from twisted.application.service import IServiceCollection, Service
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    serverFromString,
    wrapClientTLS,
)
from twisted.internet.interfaces import IListeningPort, IStreamClientEndpoint
from twisted.internet.task import LoopingCall
from twisted.logger import ILogObserver, Logger
from twisted.plugin import getPlugins
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.components import Componentized
from twisted.python.failure import Failure
from twisted.python.usage import Options as TwistedOptions
from twisted.python.usage import UsageError

import strictproxy.plugins
from strictproxy.admin.resources import QuietSite, make_admin
from strictproxy.config import Config, StaticSource, load
from strictproxy.config.model import (
    ClientConfig,
    KubernetesSource,
    ListenConfig,
    LogConfig,
    Source,
)
from strictproxy.discovery.dns import DnsDiscovery
from strictproxy.discovery.kubernetes.access import find_access
from strictproxy.discovery.kubernetes.api import EndpointSliceApi, agent_for
from strictproxy.discovery.kubernetes.watcher import KubernetesDiscovery
from strictproxy.discovery.names import Names, ResolvConfFile
from strictproxy.discovery.nameservers import NameServers
from strictproxy.discovery.static import StaticDiscovery
from strictproxy.errors import ConfigError, ShuttingDown
from strictproxy.http.pool import EndpointFor
from strictproxy.http.site import StrictSite
from strictproxy.http.tls import PodTlsOptions, ServerCertificates
from strictproxy.interfaces import IDiscovery, IRouter, IRouterPlugin
from strictproxy.logs import log_access, make_observer
from strictproxy.proxy import ProxyResource
from strictproxy.scheduling import Address
from strictproxy.upstream import Upstream

_log = Logger()

_POOL_SWEEP = 0.5
#: How often certificate files are looked at, seconds.
_CERTIFICATES_EVERY = 5.0


class Options(TwistedOptions):
    """Command line of `twistd strictproxy`."""

    synopsis = "[--config FILE]"
    longdesc = "A strict least-connection reverse proxy for heavy services on Kubernetes."
    optParameters: ClassVar = [
        ["config", "c", "/etc/strictproxy/strictproxy.yaml", "Configuration file"],
    ]

    def postOptions(self) -> None:
        """Read the configuration, so that mistakes show before anything starts."""
        try:
            self.configuration = load(self["config"])
        except ConfigError as error:
            raise UsageError(f"invalid configuration\n{error}") from None


def makeService(options: Options) -> ProxyService:
    """Return the service for `twistd` to run."""
    from twisted.internet import reactor

    spare_the_collector()
    try:
        service = ProxyService(options.configuration, reactor)
        service.observer = make_observer(log_config(options))
    except ConfigError as error:
        raise SystemExit(f"strictproxy: {error}") from None
    return service


def spare_the_collector() -> None:
    """
    Make garbage collection rarer, and leave out of it what has been imported.

    Exchanges leave no cycles behind, but with thousands of connections each
    full collection stops everything for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def descriptors() -> int:
    """
    Return how many files this process may have open, after asking for as many as it may.

    The soft limit is for programs that use select(2); Go's run time raises it
    likewise.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def within_descriptors(client: ClientConfig, limit: int) -> ClientConfig:
    """
    Return the client limits with no more connections than there are descriptors for.

    A quarter stays for pods, probes and files: a proxy that has none left can
    neither reach a pod nor answer the kubelet.
    """
    allowed = limit - max(limit // 4, 64)
    if client.connections <= allowed:
        return client
    _log.warn(
        "client.connections is {wanted}, but with {limit} descriptors it can be {allowed} at most",
        wanted=client.connections,
        limit=limit,
        allowed=allowed,
    )
    return replace(client, connections=allowed)


def log_config(options: Options) -> LogConfig:
    """
    Return the log's configuration, with its file where twistd's own would be.

    What the configuration says goes first, then `--logfile`; a twistd that
    turns into a daemon has no standard output and writes twistd.log.
    """
    config = options.configuration.log
    outer: Any = options.parent or {}
    if config.file is None and "nodaemon" in outer:
        given = outer.get("logfile")
        file = given or (None if outer["nodaemon"] else "twistd.log")
        return replace(config, file=None if file == "-" else file)
    return config


class ProxyService(Service):
    """
    The whole proxy.

    :raise ConfigError: a router cannot be found or refuses its settings.
    """

    def __init__(self, config: Config, reactor: Any) -> None:
        self.setName("strictproxy")
        #: writes the log of the application that this service joins
        self.observer: ILogObserver | None = None
        self.config = config
        self._reactor = reactor
        self._name_servers = NameServers(reactor)
        self._resolv_conf = ResolvConfFile()
        self._ports: list[IListeningPort] = []
        self._closing = False
        self.upstreams: dict[str, Upstream] = {
            name: self._make_upstream(name) for name in config.upstreams
        }
        self.proxy = ProxyResource(
            self.upstreams,
            config.routes,
            make_routers(config, self.upstreams),
            self._reactor,
            log_access if config.log.access else None,
            config.client,
        )
        client = within_descriptors(config.client, descriptors())
        self.site = StrictSite(self.proxy, client, self._reactor)
        admin = make_admin(self.upstreams, lambda: self._closing)
        self.admin = QuietSite(admin, reactor=self._reactor)
        self.site.noisy = False
        #: certificates of the listeners that have some, read again when their files change
        self._certificates: list[ServerCertificates] = []
        self._factories = [self._factory(listener) for listener in config.listen]
        self._refresher = LoopingCall(self._refresh)
        self._refresher.clock = self._reactor
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
        self._reactor.callWhenRunning(self._take_sigterm)
        self.started = Deferred.fromCoroutine(self._start())
        self.started.addErrback(self._cannot_start)

    def _take_sigterm(self) -> None:
        """
        Stop on SIGTERM with exit code 0, and on a second one at once.

        Twisted's own handler ends the process by the signal in the end, which
        Kubernetes would show as a failure.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        self._reactor.callFromThread(self._reactor.stop)

    async def _start(self) -> None:
        self.site.start()
        self._sweeper.start(_POOL_SWEEP, now=False).addErrback(_log_failure)
        if self._certificates:
            self._refresher.start(_CERTIFICATES_EVERY, now=False).addErrback(_log_failure)
        for upstream in self.upstreams.values():
            upstream.start()
        for listener, factory in zip(self.config.listen, self._factories, strict=True):
            await self._listen(listener.endpoint, factory, "listening")
        if self.config.admin is not None:
            await self._listen(self.config.admin, self.admin, "admin")

    async def _listen(self, description: str, factory: Any, what: str) -> None:
        port = await serverFromString(self._reactor, description).listen(factory)
        self._ports.append(port)
        _log.info("{what} on {address}", what=what, address=_readable(port.getHost()))

    def _cannot_start(self, failure: Failure) -> None:
        # A proxy that cannot listen must not run deaf.
        _log.critical("cannot start: {reason}", reason=failure.getErrorMessage())
        # twistd itself would report success.
        self._reactor.addSystemEventTrigger("after", "shutdown", os._exit, 1)
        self._reactor.callWhenRunning(self._reactor.stop)

    def addresses(self) -> list[tuple[str, int]]:
        """Return where the listeners are, the admin's last; for tests and the demo."""
        hosts: list[Any] = [port.getHost() for port in self._ports]
        return [(host.host, host.port) for host in hosts]

    # -- stop

    def stopService(self) -> Deferred[None]:
        """Drain, then stop everything."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._closing = True
        self.site.closing = True
        ports, self._ports = self._ports, []
        await DeferredList([maybeDeferred(port.stopListening) for port in ports])
        self.site.close_idle()
        await self._drained()
        for exchange in list(self.proxy.running):
            exchange.abandon(ShuttingDown("the proxy is shutting down"))
        for upstream in self.upstreams.values():
            upstream.stop()
        self.site.stop()
        for loop in (self._sweeper, self._refresher):
            if loop.running:
                loop.stop()

    async def _drained(self) -> None:
        """Wait until nothing runs or waits, at most `drain_timeout`."""
        deadline = self._reactor.seconds() + self.config.drain_timeout
        if self.proxy.running:
            _log.info("draining {count} requests", count=len(self.proxy.running))
        while self.proxy.running and self._reactor.seconds() < deadline:
            pause: Deferred[None] = Deferred()
            self._reactor.callLater(0.05, pause.callback, None)
            await pause

    # -- parts

    def _factory(self, listener: ListenConfig) -> Any:
        """Return what serves a listener: the site, behind TLS if the listener has that."""
        if listener.tls is None:
            return self.site
        certificates = ServerCertificates(listener.tls)
        self._certificates.append(certificates)
        return TLSMemoryBIOFactory(certificates, False, self.site, clock=self._reactor)

    def _refresh(self) -> None:
        for certificates in self._certificates:
            try:
                certificates.refresh()
            except Exception as error:
                _log.error("certificates stay as they were: {error}", error=error)

    def _make_upstream(self, name: str) -> Upstream:
        config = self.config.upstreams[name]
        routes = [route for route in self.config.routes if route.upstream == name]
        discovery = self._make_discovery(config.source)
        endpoint_for: EndpointFor = self._endpoint_for
        if config.tls is not None:
            endpoint_for = _secured(endpoint_for, PodTlsOptions(config.tls))
        return Upstream(config, routes, discovery, endpoint_for, self._reactor)

    def _make_discovery(self, source: Source) -> IDiscovery:
        discovery: IDiscovery
        if isinstance(source, StaticSource):
            discovery = StaticDiscovery(source)
        elif isinstance(source, KubernetesSource):
            api = EndpointSliceApi(
                source.service,
                lambda: find_access(source, os.environ),
                lambda access: agent_for(access, self._reactor),
                self._reactor,
            )
            discovery = KubernetesDiscovery(source, api, self._reactor, random.random)
        else:
            names = Names(source, self._name_servers, self._resolv_conf)
            discovery = DnsDiscovery(source, names, self._reactor, random.random)
        return discovery

    def _endpoint_for(self, address: Address, timeout: float) -> IStreamClientEndpoint:
        host, port = address
        try:
            version = ip_address(host).version
        except ValueError:
            return HostnameEndpoint(self._reactor, host, port, timeout)
        kind = TCP4ClientEndpoint if version == 4 else TCP6ClientEndpoint
        endpoint: IStreamClientEndpoint = kind(self._reactor, host, port, timeout)
        return endpoint

    def _sweep(self) -> None:
        self.proxy.sweep()
        for upstream in self.upstreams.values():
            upstream.pool.sweep()


def make_routers(config: Config, upstreams: Mapping[str, Upstream]) -> list[tuple[str, IRouter]]:
    """
    Make the custom routers that a configuration names.

    :raise ConfigError: one is not installed, or refuses its settings.
    """
    if not config.routers:
        return []
    found = {plugin.name: plugin for plugin in getPlugins(IRouterPlugin, strictproxy.plugins)}

    def pods(upstream: str) -> Collection[Address]:
        return upstreams[upstream].pods()

    routers: list[tuple[str, IRouter]] = []
    for wanted in config.routers:
        plugin = found.get(wanted.name)
        if plugin is None:
            there = ", ".join(sorted(found)) or "none"
            raise ConfigError(f"router {wanted.name!r} is not installed; installed: {there}")
        try:
            routers.append((wanted.name, plugin.router(wanted.settings, pods)))
        except ValueError as error:
            raise ConfigError(f"router {wanted.name!r}: {error}") from error
    return routers


def _secured(endpoint_for: EndpointFor, options: PodTlsOptions) -> EndpointFor:
    """Return endpoints that speak TLS."""

    def secured(address: Address, timeout: float) -> IStreamClientEndpoint:
        plain = endpoint_for(address, timeout)
        endpoint: IStreamClientEndpoint = wrapClientTLS(options.for_host(address.host), plain)
        return endpoint

    return secured


def _readable(host: Any) -> str:
    return str(Address(host.host, host.port)) if hasattr(host, "port") else str(host)


def _log_failure(failure: Failure) -> None:
    _log.failure("a periodic task failed", failure=failure)
