"""What is written to the log."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

from twisted.logger import Logger, LogLevel, LogPublisher
from twisted.trial.unittest import SynchronousTestCase

from strictproxy import logs
from strictproxy.config.model import AccessFormat, LogConfig, LogFormat
from strictproxy.errors import ConfigError
from strictproxy.logs import AccessLog, AccessRecord, LogWriter
from strictproxy.scheduling import Address

RECORD = AccessRecord(
    client="192.0.2.1",
    method=b"GET",
    target=b'/a?b="c d"\x1b',
    host=b"h",
    route="r",
    upstream="u",
    pod=Address("10.0.0.1", 80),
    status=200,
    reason=None,
    sent=12,
    waited=1.23456789,
    pod_time=None,
    in_flight=2,
    tries=1,
)


class FormatTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.stream = io.StringIO()
        self.publisher = LogPublisher()
        self.logger = Logger(namespace="here", observer=self.publisher)
        self.patch(logs, "access_logger", Logger(namespace="access", observer=self.publisher))

    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def test_access_text(self) -> None:
        """One line of key=value; values that need it are quoted, control characters escaped."""
        self.publisher.addObserver(LogWriter(LogConfig(), self.stream))
        logs.log_access(RECORD)
        (line,) = self.lines()
        time, kind, rest = line.split(" ", 2)
        self.assertRegex(time, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertEqual(kind, "access")
        self.assertEqual(
            rest,
            'client=192.0.2.1 method=GET target="/a?b=\\"c d\\"\\u001b" host=h route=r upstream=u '
            "pod=10.0.0.1:80 status=200 reason=- sent=12 waited=1.235 pod_time=- in_flight=2 "
            "tries=1 task=-",
        )

    def test_access_json(self) -> None:
        """One JSON object a line; times to the microsecond."""
        self.publisher.addObserver(LogWriter(LogConfig(LogFormat.JSON), self.stream))
        logs.log_access(RECORD)
        document = json.loads(self.stream.getvalue())
        self.assertEqual(document["event"], "access")
        self.assertEqual((document["waited"], document["pod_time"]), (1.234568, None))
        self.assertEqual((document["pod"], document["target"]), ("10.0.0.1:80", '/a?b="c d"\x1b'))

    def test_no_forged_lines(self) -> None:
        """Nothing that a client sends can begin a line of its own."""
        for log_format in LogFormat:
            self.stream.truncate(0)
            self.stream.seek(0)
            observer = LogWriter(LogConfig(log_format), self.stream)
            self.publisher.addObserver(observer)
            self.logger.info("{text}", text="a\nb\r\x1b[31mc\u2028")
            self.publisher.removeObserver(observer)
            (line,) = self.lines()
            self.assertTrue(line.isprintable(), line)

    def test_failures(self) -> None:
        """A failure brings its traceback."""
        for log_format in LogFormat:
            observer = LogWriter(LogConfig(log_format), self.stream)
            self.publisher.addObserver(observer)
            try:
                1 / 0  # noqa: B018
            except ZeroDivisionError:
                self.logger.failure("oh")
            self.publisher.removeObserver(observer)
            self.assertIn("ZeroDivisionError", self.stream.getvalue())

    def test_levels_and_file(self) -> None:
        """The level and the file are the configured ones; files are appended to."""
        path = Path(self.mktemp())
        path.write_text("before\n")
        observer = LogWriter(LogConfig(LogFormat.JSON, "warn", file=str(path)))
        self.publisher.addObserver(observer)
        self.logger.info("quiet")
        self.logger.emit(LogLevel.error, "loud")
        first, second = path.read_text().splitlines()
        self.assertEqual((first, json.loads(second)["message"]), ("before", "loud"))
        self.assertEqual(json.loads(second)["event"], "here")
        # Moved away, it is written anew; the level may be changed in between.
        path.rename(path.with_suffix(".1"))
        observer.level = "info"
        observer.configure(LogConfig(LogFormat.TEXT, "warn", file=str(path)))
        self.logger.info("now heard")
        self.assertEqual((observer.level, len(path.read_text().splitlines())), ("info", 1))
        observer.configure(LogConfig(LogFormat.TEXT, "error"))
        self.assertEqual(observer.level, "error")
        with self.assertRaisesRegex(ConfigError, "log.file: /nowhere/x: No such file"):
            observer.configure(LogConfig(file="/nowhere/x"))

    def test_access_formats(self) -> None:
        """The lines of requests may have a format of their own."""
        bad = replace(RECORD, reason="queue_full", status=503, pod_time=0.5)
        for access_format, expected in (
            (AccessFormat.JSON, r'^\{"time": ".*Z", "level": "info", "event": "access", .*\}$'),
            (
                AccessFormat.LOGFMT,
                r'^time=\S+Z client=192.0.2.1 method=GET target="/a.* tries=1 task=-$',
            ),
            (
                AccessFormat.COMBINED,
                r"^192\.0\.2\.1 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d \+0000\] "
                r'"GET /a\?b=\\"c d\\"\\x1b HTTP/1.1" 503 12 "-" "-" 10.0.0.1:80 1.235 0.500 '
                r"queue_full$",
            ),
        ):
            stream = io.StringIO()
            observer = LogWriter(LogConfig(access_format=access_format), stream)
            self.publisher.addObserver(observer)
            logs.log_access(bad)
            self.publisher.removeObserver(observer)
            self.assertRegex(stream.getvalue(), expected)
            self.assertEqual(len(stream.getvalue().splitlines()), 1)

    def test_twisted_talks_to_itself(self) -> None:
        """What Twisted tells in its old way is for its developers, errors apart."""
        self.publisher.addObserver(LogWriter(LogConfig(), self.stream))
        legacy = Logger(namespace="log_legacy", observer=self.publisher)
        legacy.info("Port starting on 1")
        legacy.emit(LogLevel.critical, "broken")
        (line,) = self.lines()
        self.assertIn("broken", line)

    def test_sampling(self) -> None:
        """Of what went well a share is logged, of what did not everything."""
        self.publisher.addObserver(LogWriter(LogConfig(), self.stream))
        numbers = itertools.cycle((0.05, 0.5, 0.95))
        log = AccessLog(0.1, lambda: next(numbers))
        for _ in range(9):
            log(RECORD)
        self.assertEqual(len(self.lines()), 3)
        for _ in range(9):
            log(replace(RECORD, status=500))
            log(replace(RECORD, reason="pod_gone"))
        self.assertEqual(len(self.lines()), 21)
