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

from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, formatEvent
from twisted.python.failure import Failure
from zope.interface import implementer

from strictproxy.config.model import AccessFormat, LogConfig, LogFormat
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
    #: the beginning of the id, if it is a task; the whole of it would let its reader have it
    task: str | None = None

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


def access_combined(record: AccessRecord, event: LogEvent) -> str:
    """Return a record in the format of Apache's and nginx's logs, with what is ours at its end."""
    moment = datetime.fromtimestamp(event["log_time"], UTC).strftime("%d/%b/%Y:%H:%M:%S +0000")
    line = f"{record.method.decode('latin-1')} {record.target.decode('latin-1')} HTTP/1.1"
    quoted = line.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f'{record.client} - - [{moment}] "{quoted}" {record.status} {record.sent} "-" "-" '
        f"{record.pod or '-'} {record.waited:.3f} {record.pod_time or 0:.3f} {record.reason or '-'}"
    )


def _access_document(record: AccessRecord, event: LogEvent) -> dict[str, Any]:
    level = event["log_level"].name
    return {"time": _timestamp(event), "level": level, "event": "access", **access_fields(record)}


def format_json(event: LogEvent) -> str:
    """Return an event as one line of JSON."""
    record = event.get("access")
    if record is not None:
        document = _access_document(record, event)
    else:
        document = {"time": _timestamp(event), "level": event["log_level"].name}
        document |= {"event": event.get("log_namespace", "-"), "message": formatEvent(event)}
        failure = event.get("log_failure")
        if isinstance(failure, Failure):
            document["traceback"] = failure.getTraceback()
    return json.dumps(document) + "\n"


#: Ways to write an access record as one line; "combined" is what Apache and nginx write.
ACCESS_FORMATS: dict[AccessFormat, Callable[[AccessRecord, LogEvent], str]] = {
    AccessFormat.LOGFMT: lambda record, event: f"time={_timestamp(event)} {access_text(record)}",
    AccessFormat.JSON: lambda record, event: json.dumps(_access_document(record, event)),
    AccessFormat.COMBINED: access_combined,
}


class AccessLog:
    """
    Decides which exchanges are logged.

    :param share: of those that went well; the others are logged always.
    :param random: from 0 to 1.
    """

    def __init__(self, share: float, random: Callable[[], float]) -> None:
        self._share = share
        self._random = random

    def __call__(self, record: AccessRecord) -> None:
        """Log one exchange, perhaps."""
        if record.status < 400 and record.reason is None and self._random() >= self._share:
            return
        log_access(record)


@implementer(ILogObserver)
class LogWriter:
    """
    Writes events as lines, as configured.

    :raise ConfigError: the log file cannot be opened.
    """

    def __init__(self, config: LogConfig, stdout: IO[str] | None = None) -> None:
        self._stdout = self._stream = stdout or sys.stdout
        self._config: LogConfig | None = None
        self.configure(config)

    @property
    def level(self) -> str:
        """What is not as important as this is not written."""
        return str(self._level.name)

    @level.setter
    def level(self, name: str) -> None:
        self._level = LogLevel.levelWithName(name)

    def configure(self, config: LogConfig) -> None:
        """
        Write as configured from now on. A file is opened anew, for whoever has moved it away.

        :raise ConfigError: it cannot be opened; nothing has changed.
        """
        stream = self._stdout
        if config.file is not None:
            try:
                stream = open(config.file, "a", encoding="utf-8")  # noqa: SIM115  # kept open
            except OSError as error:
                raise ConfigError(f"log.file: {config.file}: {error.strerror}") from error
        old, self._stream = self._stream, stream
        if old is not self._stdout:
            old.close()
        if self._config is None or config.level != self._config.level:
            # Not if somebody has changed it in between, and the configuration has not.
            self.level = config.level
        self._config = config
        self._format = format_json if config.format is LogFormat.JSON else format_text
        self._access = None
        if config.access_format is not None:
            self._access = ACCESS_FORMATS[config.access_format]

    def __call__(self, event: LogEvent) -> None:
        """Write one event."""
        level = event.get("log_level")
        if event.get("log_namespace") == "log_legacy" and level is LogLevel.info:
            # What Twisted says about each port that it opens interests only its developers.
            level = LogLevel.debug
        if level is not None and level < self._level:
            return
        record = event.get("access")
        if record is not None and self._access is not None:
            line = escape(self._access(record, event)) + "\n"
        else:
            line = self._format(event)
        self._stream.write(line)
        self._stream.flush()
