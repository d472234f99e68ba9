"""
Makes parts from their configuration: upstreams, discoveries, ways to pods, routers.

What can fail fails here, before anything that runs has been touched.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Iterable
from ipaddress import ip_address
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    wrapClientTLS,
)
from twisted.internet.interfaces import IResolutionReceiver, IStreamClientEndpoint
from twisted.plugin import getPlugins
from zope.interface import implementer

import strictproxy.plugins
from strictproxy.config import Config, StaticSource
from strictproxy.config.model import KubernetesSource, PodTls, RouteConfig, Source, UpstreamConfig
from strictproxy.discovery.dns import DnsDiscovery
from strictproxy.discovery.kubernetes.access import find_access
from strictproxy.discovery.kubernetes.api import EndpointSliceApi, agent_for
from strictproxy.discovery.kubernetes.watcher import KubernetesDiscovery
from strictproxy.discovery.names import Names, ResolvConfFile
from strictproxy.discovery.nameservers import NameServers
from strictproxy.discovery.static import StaticDiscovery
from strictproxy.errors import ConfigError
from strictproxy.http.pool import EndpointFor
from strictproxy.http.tls import PodTlsOptions
from strictproxy.interfaces import IDiscovery, IRouter, IRouterPlugin
from strictproxy.scheduling import Address
from strictproxy.upstream import Upstream

#: Gives the pods of an upstream that are known now; raises KeyError for an unknown one.
PodsOf = Callable[[str], Collection[Address]]


class Parts:
    """Makes what belongs to one upstream."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._name_servers = NameServers(reactor)
        self._resolv_conf = ResolvConfFile()
        # One for the process: other replicas look at other moments, but our own
        # upstreams together, which wakes the process up less often.
        phase = random.random()
        self._phase = lambda: phase

    def stop(self) -> None:
        """Close what upstreams share."""
        self._name_servers.stop()

    def upstream(self, config: UpstreamConfig, routes: Iterable[RouteConfig]) -> Upstream:
        """
        Return an upstream that has not started.

        :raise ConfigError: a file that it needs is missing or no good.
        """
        discovery = self.discovery(config.source)
        return Upstream(config, routes, discovery, self.way_to_pods(config.tls), self._reactor)

    def discovery(self, source: Source) -> IDiscovery:
        """Return what learns the pods of a source."""
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
            discovery = DnsDiscovery(source, names, self._reactor, self._phase)
        return discovery

    def resolve(self, name: str) -> Deferred[Collection[str]]:
        """Return the addresses of a name, as the system knows them."""
        receiver = _Addresses()
        self._reactor.nameResolver.resolveHostName(receiver, name)
        return receiver.found

    def way_to_pods(self, tls: PodTls | None) -> EndpointFor:
        """
        Return what makes the endpoints of pods.

        :raise ConfigError: a certificate is missing or no good.
        """
        if tls is None:
            return self._plain
        options = PodTlsOptions(tls)

        def secured(address: Address, timeout: float) -> IStreamClientEndpoint:
            plain = self._plain(address, timeout)
            endpoint: IStreamClientEndpoint = wrapClientTLS(options.for_host(address.host), plain)
            return endpoint

        return secured

    def _plain(self, address: Address, timeout: float) -> IStreamClientEndpoint:
        host, port = address
        try:
            version = ip_address(host).version
        except ValueError:
            return HostnameEndpoint(self._reactor, host, port, timeout)
        kind = TCP4ClientEndpoint if version == 4 else TCP6ClientEndpoint
        endpoint: IStreamClientEndpoint = kind(self._reactor, host, port, timeout)
        return endpoint


@implementer(IResolutionReceiver)
class _Addresses:
    """Collects what a name resolves to."""

    def __init__(self) -> None:
        self.found: Deferred[Collection[str]] = Deferred()
        self._addresses: list[str] = []

    def resolutionBegan(self, resolutionInProgress: Any) -> None:
        """Do nothing."""

    def addressResolved(self, address: Any) -> None:
        """Take one address."""
        if address.host not in self._addresses:
            self._addresses.append(address.host)

    def resolutionComplete(self) -> None:
        """Hand them over."""
        self.found.callback(self._addresses)


def make_routers(config: Config, pods: PodsOf) -> list[tuple[str, IRouter]]:
    """
    Make the custom routers that a configuration names.

    :raise ConfigError: one is not installed, or refuses its settings.
    """
    if not config.routers:
        return []
    found = {plugin.name: plugin for plugin in getPlugins(IRouterPlugin, strictproxy.plugins)}
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
