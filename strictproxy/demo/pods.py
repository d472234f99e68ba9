"""Pods for the demo: a web service that works on a few jobs at a time, each for a given time."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site


class _QuietSite(Site):
    """A site without access log."""

    def log(self, request: Request) -> None:
        """Log nothing."""


class Pod(Resource):
    """
    `GET /job?seconds=S`: works for S seconds, on at most `limit` jobs at once.

    What comes beyond that waits inside the pod, as in any real service.
    """

    isLeaf = True

    def __init__(self, reactor: Any, host: str, limit: int) -> None:
        super().__init__()
        self.host = host
        self.limit = limit
        self.forget()
        self._reactor = reactor
        self._waiting: deque[tuple[Request, float]] = deque()
        self._port: Any = None

    def forget(self) -> None:
        """Begin to count anew."""
        self.running = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.served = 0

    def start(self, port: int) -> int:
        """Listen on `port`, or on a free one if it is 0; return it."""
        site = _QuietSite(self, reactor=self._reactor)
        site.noisy = False
        self._port = self._reactor.listenTCP(port, site, backlog=512, interface=self.host)
        number: int = self._port.getHost().port
        return number

    def stop(self) -> Deferred[Any]:
        """Stop listening."""
        return maybeDeferred(self._port.stopListening)

    def render_GET(self, request: Request) -> int:
        """Take a job."""
        seconds = float(request.args[b"seconds"][0])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        request.notifyFinish().addErrback(lambda _: None)
        self._waiting.append((request, seconds))
        self._work()
        return NOT_DONE_YET

    def _work(self) -> None:
        while self._waiting and self.running < self.limit:
            request, seconds = self._waiting.popleft()
            self.running += 1
            self._reactor.callLater(seconds, self._done, request)

    def _done(self, request: Request) -> None:
        self.running -= 1
        self.in_flight -= 1
        self.served += 1
        request.setHeader(b"content-type", b"text/plain")
        if not request._disconnected:
            request.write(f"done by {self.host}\n".encode())
            request.finish()
        self._work()
