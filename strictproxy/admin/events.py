"""
The state as it changes, by server-sent events: for the dashboard and `strictproxy top`.

One snapshot a second is made for all who look, and none while nobody does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.web.http import Request
from twisted.web.server import NOT_DONE_YET

_log = Logger()

_EVERY = 1.0
#: More who look at the same time get 503.
_MOST = 100
#: Who reads more slowly than this falls out, bytes.
_MAX_BEHIND = 4 * 1024 * 1024


class Events:
    """Those who look, and what they are told."""

    def __init__(self, document: Callable[[], Any], clock: IReactorTime) -> None:
        self._document = document
        self._listeners: set[Request] = set()
        self._loop = LoopingCall(self._tell)
        self._loop.clock = clock

    def serve(self, request: Request) -> Any:
        """Send events until the client goes away."""
        if len(self._listeners) >= _MOST:
            request.setResponseCode(503)
            return b'{"error": "too many are looking"}\n'
        request.setHeader(b"content-type", b"text/event-stream")
        request.setHeader(b"cache-control", b"no-store")
        request.setHeader(b"x-accel-buffering", b"no")
        self._listeners.add(request)
        request.notifyFinish().addBoth(lambda _: self._left(request))
        if request.method == b"HEAD":
            return b""
        request.write(self._event())
        if not self._loop.running:
            self._loop.start(_EVERY, now=False).addErrback(
                lambda failure: _log.failure("events ended", failure=failure)
            )
        return NOT_DONE_YET

    def stop(self) -> None:
        """Tell nobody any more."""
        for request in list(self._listeners):
            request.finish()
        if self._loop.running:
            self._loop.stop()

    def _left(self, request: Request) -> None:
        self._listeners.discard(request)
        if not self._listeners and self._loop.running:
            self._loop.stop()

    def _event(self) -> bytes:
        return b"data: " + json.dumps(self._document(), separators=(",", ":")).encode() + b"\n\n"

    def _tell(self) -> None:
        event = self._event()
        for request in list(self._listeners):
            transport: Any = request.transport
            behind = sum(map(len, getattr(transport, "_tempDataBuffer", ())))
            if behind > _MAX_BEHIND:
                transport.abortConnection()
            else:
                request.write(event)
