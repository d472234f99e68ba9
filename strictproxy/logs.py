"""
What is logged, and how it is written.

Events go through twisted.logger. An access record is one event with its
fields; this module turns events into lines of text or JSON. Control characters
are escaped, so that no client can forge a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import IO, Any

from twisted.logger import (
    FilteringLogObserver,
    ILogFilterPredicate,
    ILogObserver,
    LogEvent,
    Logger,
    LogLevel,
    LogLevelFilterPredicate,
    formatEvent,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from strictproxy.config.model import LogConfig, LogFormat
from strictproxy.errors import ConfigError
from strictproxy.scheduling import Address

access_logger = Logger(namespace="strictproxy.access")


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """What is told about one exchange; times are seconds."""

    client: str
    method: bytes
    target: bytes
    host: bytes
    route: str | None
    upstream: str | None
    pod: Address | None
    #: as sent; 499 if the client left before the end
    status: int
    #: why the proxy itself answered, or ended the exchange; see `strictproxy.errors`
    reason: str | None
    #: body bytes sent to the client
    sent: int
    waited: float
    #: from dispatch to the end, or None if there was no dispatch
    pod_time: float | None
    #: leases on the pod at dispatch, this one included
    in_flight: int
    tries: int

    def __str__(self) -> str:
        return access_text(self)


def log_access(record: AccessRecord) -> None:
    """Log one exchange."""
    # Formatted only where somebody else's observer writes it, as under twist.
    access_logger.info("{access}", access=record)


def access_fields(record: AccessRecord) -> dict[str, Any]:
    """Return a record as plain data."""
    fields = asdict(record)
    for name in ("method", "target", "host"):
        fields[name] = fields[name].decode("latin-1")
    fields["pod"] = None if record.pod is None else str(record.pod)
    fields["waited"] = round(record.waited, 6)
    fields["pod_time"] = None if record.pod_time is None else round(record.pod_time, 6)
    return fields


def access_text(record: AccessRecord) -> str:
    """Return a record as `key=value` pairs; `-` is nothing."""
    pairs = []
    for name, value in access_fields(record).items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if value is None or value == "":
            text = "-"
        quoted = json.dumps(text) if any(c in text for c in ' "=\\') else text
        pairs.append(f"{name}={quoted}")
    return " ".join(pairs)


def escape(text: str) -> str:
    """Make control characters visible."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _timestamp(event: LogEvent) -> str:
    moment = datetime.fromtimestamp(event["log_time"], UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_text(event: LogEvent) -> str:
    """Return an event as one line of text, a traceback's lines following it."""
    record = event.get("access")
    level = event["log_level"].name
    if record is not None:
        return f"{_timestamp(event)} access {escape(access_text(record))}\n"
    line = f"{_timestamp(event)} {level} {escape(formatEvent(event))}\n"
    failure = event.get("log_failure")
    return line + failure.getTraceback() if isinstance(failure, Failure) else line


def format_json(event: LogEvent) -> str:
    """Return an event as one line of JSON."""
    record = event.get("access")
    document: dict[str, Any] = {"time": _timestamp(event), "level": event["log_level"].name}
    if record is not None:
        document |= {"event": "access", **access_fields(record)}
    else:
        document |= {"event": event.get("log_namespace", "-"), "message": formatEvent(event)}
        failure = event.get("log_failure")
        if isinstance(failure, Failure):
            document["traceback"] = failure.getTraceback()
    return json.dumps(document) + "\n"


@implementer(ILogObserver)
class LineObserver:
    """Writes events as lines."""

    def __init__(self, stream: IO[str], format_event: Callable[[LogEvent], str]) -> None:
        self._stream = stream
        self._format = format_event

    def __call__(self, event: LogEvent) -> None:
        """Write one event."""
        self._stream.write(self._format(event))
        self._stream.flush()


def make_observer(config: LogConfig) -> ILogObserver:
    """
    Return what writes the log as configured.

    :raise ConfigError: the log file cannot be opened.
    """
    stream: IO[str] = sys.stdout
    if config.file is not None:
        try:
            stream = open(config.file, "a", encoding="utf-8")  # noqa: SIM115  # open as long as we run
        except OSError as error:
            raise ConfigError(f"log.file: {config.file}: {error.strerror}") from error
    format_event = format_json if config.format is LogFormat.JSON else format_text
    level = LogLevel.levelWithName(config.level)
    predicate: ILogFilterPredicate = LogLevelFilterPredicate(defaultLogLevel=level)
    observer: ILogObserver = FilteringLogObserver(LineObserver(stream, format_event), [predicate])
    return observer
