"""
Configuration: YAML to frozen records, with errors that name file, line and key.

Pure but for reading the file: nothing here opens a socket or starts anything.
"""

from strictproxy.config.model import (
    Body,
    ClientConfig,
    Config,
    DnsSource,
    HeaderEdits,
    LogConfig,
    LogFormat,
    Match,
    OnDisconnect,
    PodConnections,
    QueueConfig,
    RouteConfig,
    RouterConfig,
    StaticSource,
    UpstreamConfig,
)
from strictproxy.config.schema import InvalidConfig, load, parse

__all__ = [
    "Body",
    "ClientConfig",
    "Config",
    "DnsSource",
    "HeaderEdits",
    "InvalidConfig",
    "LogConfig",
    "LogFormat",
    "Match",
    "OnDisconnect",
    "PodConnections",
    "QueueConfig",
    "RouteConfig",
    "RouterConfig",
    "StaticSource",
    "UpstreamConfig",
    "load",
    "parse",
]
