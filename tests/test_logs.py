"""What is written to the log."""

from __future__ import annotations

import io
import json
from pathlib import Path

from twisted.logger import Logger, LogLevel, LogPublisher
from twisted.trial.unittest import SynchronousTestCase

from strictproxy import logs
from strictproxy.config.model import LogConfig, LogFormat
from strictproxy.logs import AccessRecord, LineObserver, format_json, format_text, make_observer
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
        self.publisher.addObserver(LineObserver(self.stream, format_text))
        logs.log_access(RECORD)
        (line,) = self.lines()
        time, kind, rest = line.split(" ", 2)
        self.assertRegex(time, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertEqual(kind, "access")
        self.assertEqual(
            rest,
            'client=192.0.2.1 method=GET target="/a?b=\\"c d\\"\\u001b" host=h route=r upstream=u '
            "pod=10.0.0.1:80 status=200 reason=- sent=12 waited=1.235 pod_time=- in_flight=2 "
            "tries=1",
        )

    def test_access_json(self) -> None:
        """One JSON object a line; times to the microsecond."""
        self.publisher.addObserver(LineObserver(self.stream, format_json))
        logs.log_access(RECORD)
        document = json.loads(self.stream.getvalue())
        self.assertEqual(document["event"], "access")
        self.assertEqual((document["waited"], document["pod_time"]), (1.234568, None))
        self.assertEqual((document["pod"], document["target"]), ("10.0.0.1:80", '/a?b="c d"\x1b'))

    def test_no_forged_lines(self) -> None:
        """Nothing that a client sends can begin a line of its own."""
        for format_event in (format_text, format_json):
            self.stream.truncate(0)
            self.stream.seek(0)
            observer = LineObserver(self.stream, format_event)
            self.publisher.addObserver(observer)
            self.logger.info("{text}", text="a\nb\r\x1b[31mc\u2028")
            self.publisher.removeObserver(observer)
            (line,) = self.lines()
            self.assertTrue(line.isprintable(), line)

    def test_failures(self) -> None:
        """A failure brings its traceback."""
        for format_event in (format_text, format_json):
            observer = LineObserver(self.stream, format_event)
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
        observer = make_observer(LogConfig(LogFormat.JSON, "warn", file=str(path)))
        self.publisher.addObserver(observer)
        self.logger.info("quiet")
        self.logger.emit(LogLevel.error, "loud")
        first, second = path.read_text().splitlines()
        self.assertEqual((first, json.loads(second)["message"]), ("before", "loud"))
        self.assertEqual(json.loads(second)["event"], "here")
