"""Pods that are written in the configuration."""

from __future__ import annotations

from zope.interface import implementer

from strictproxy.config.model import StaticSource
from strictproxy.interfaces import Endpoint, IDiscovery, Publish


@implementer(IDiscovery)
class StaticDiscovery:
    """Publishes the configured pods once."""

    def __init__(self, source: StaticSource) -> None:
        self._endpoints = [Endpoint(pod) for pod in source.pods]

    def start(self, publish: Publish) -> None:
        """Publish."""
        publish(self._endpoints)

    def stop(self) -> None:
        """Do nothing."""

    def look_now(self) -> None:
        """Do nothing: there is nowhere to look."""

    def state(self) -> None:
        """Return None: what is configured is all there is."""
