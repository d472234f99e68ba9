"""
The admin API: `/api/v1/...`, as `strictproxy.admin.openapi` describes it.

Reads snapshots, and changes things through `Control` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import unquote

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from strictproxy.admin.access import Access, Refused
from strictproxy.admin.documents import (
    autoscaling_document,
    request_documents,
    upstream_document,
)
from strictproxy.admin.events import Events
from strictproxy.admin.openapi import DOCUMENT
from strictproxy.errors import ConfigError
from strictproxy.scheduling import Address
from strictproxy.upstream import Upstream

_log = Logger()

_LEVELS = ("debug", "info", "warn", "error", "critical")
_MAX_BODY = 64 * 1024
#: Of the line, so many are told one by one.
_LINE = 100


class Control(Protocol):
    """What an operator may do."""

    @property
    def upstreams(self) -> Mapping[str, Upstream]:
        """The upstreams that are in force."""

    @property
    def stopping(self) -> bool:
        """Whether the proxy is shutting down."""

    @property
    def log_level(self) -> str:
        """What is not as important as this is not logged."""

    def set_log_level(self, level: str) -> None:
        """Log so much."""

    def cancel(self, number: int) -> bool:
        """End a request; returns False if there is no such one."""

    def reload(self) -> Deferred[list[str]]:
        """Read the configuration again; fails with `ConfigError`."""


class Wrong(Exception):
    """A request that cannot be carried out."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api(Resource):
    """Everything below `/api/v1`."""

    isLeaf = True

    def __init__(self, control: Control, access: Access, events: Events) -> None:
        super().__init__()
        self._control = control
        self._access = access
        self._events = events
        handlers: dict[tuple[str, str], Callable[..., Any]] = {
            ("GET", "/state"): self._state,
            ("GET", "/upstreams/([^/]+)"): self._upstream,
            ("PATCH", "/upstreams/([^/]+)"): self._change_upstream,
            ("GET", "/upstreams/([^/]+)/autoscaling"): self._autoscaling,
            ("PATCH", "/upstreams/([^/]+)/pods/([^/]+)"): self._change_pod,
            ("DELETE", "/requests/([^/]+)"): self._cancel,
            ("POST", "/reload"): self._reload,
            ("GET", "/log"): self._get_log,
            ("PUT", "/log"): self._put_log,
            ("GET", "/openapi.json"): lambda _: DOCUMENT,
        }
        self._routes: dict[str, dict[str, Callable[..., Any]]] = {}
        for (method, path), handler in handlers.items():
            self._routes.setdefault(path, {})[method] = handler

    def render(self, request: Request) -> Any:
        """Answer a request."""
        path = "/" + "/".join(part.decode("latin-1") for part in request.postpath)  # type: ignore[attr-defined]
        method = request.method.decode("latin-1")
        try:
            if path == "/events" and method == "GET":
                self._check(request, changes=False)
                return self._events.serve(request)
            handler, arguments = self._find(request, method, path)
            self._check(request, changes=method not in ("GET", "HEAD"))
            result = handler(request, *arguments)
        except (Refused, Wrong) as error:
            return answer(request, error.status, {"error": str(error)})
        if not isinstance(result, Deferred):
            return answer(request, 200, result)
        result.addCallbacks(
            lambda value: finish(request, 200, value),
            lambda failure: self._failed(request, failure),
        )
        return NOT_DONE_YET

    def _find(
        self, request: Request, method: str, path: str
    ) -> tuple[Callable[..., Any], list[str]]:
        for pattern, methods in self._routes.items():
            found = re.fullmatch(pattern, path)
            if found is None:
                continue
            handler = methods.get("GET" if method == "HEAD" else method)
            if handler is None:
                request.setHeader(b"allow", ", ".join(sorted(methods)).encode())
                raise Wrong(405, f"{method} is not possible here")
            return handler, [unquote(each) for each in found.groups()]
        if path == "/events":
            request.setHeader(b"allow", b"GET")
            raise Wrong(405, f"{method} is not possible here")
        raise Wrong(404, "there is nothing here; see /api/v1/openapi.json")

    def _check(self, request: Request, *, changes: bool) -> None:
        try:
            self._access.check(request.getHeader("authorization"), changes=changes)
        except Refused as error:
            if error.status == 401:
                request.setHeader(b"www-authenticate", b'Bearer realm="strictproxy"')
            raise

    def _failed(self, request: Request, failure: Failure) -> None:
        if failure.check(ConfigError):
            finish(request, 422, {"error": str(failure.value)})
            return
        _log.failure("the admin API failed", failure=failure)
        finish(request, 500, {"error": "the admin API failed; the log has more"})

    # -- reading

    def _state(self, _: Request) -> Any:
        upstreams = self._control.upstreams
        documents = {name: upstream_document(each.snapshot()) for name, each in upstreams.items()}
        return {"upstreams": documents, "stopping": self._control.stopping}

    def _upstream(self, _: Request, name: str) -> Any:
        upstream = self._get(name)
        return {
            **upstream_document(upstream.snapshot()),
            "requests": request_documents(upstream.running()),
            "line": request_documents(upstream.waiting(_LINE)),
        }

    def _autoscaling(self, _: Request, name: str) -> Any:
        return autoscaling_document(self._get(name).snapshot())

    def _get_log(self, _: Request) -> Any:
        return {"level": self._control.log_level}

    # -- changing

    def _change_upstream(self, request: Request, name: str) -> Any:
        upstream = self._get(name)
        wanted = body_of(request, {"limit": int, "paused": bool})
        limit = wanted.get("limit")
        if limit is not None and not 1 <= limit <= 1_000_000:
            raise Wrong(400, f"'limit' must be from 1 to 1000000, not {limit}")
        self._note(request, f"upstream {name}: {json.dumps(wanted)}")
        if limit is not None:
            upstream.set_limit(limit)
        if "paused" in wanted:
            upstream.pause(wanted["paused"])
        return upstream_document(upstream.snapshot())

    def _change_pod(self, request: Request, name: str, pod: str) -> Any:
        upstream = self._get(name)
        found = {str(address): address for address in upstream.pods()}
        address: Address | None = found.get(pod)
        if address is None:
            raise Wrong(404, f"upstream {name} has no pod {pod}")
        wanted = body_of(request, {"drained": bool})
        if "drained" not in wanted:
            raise Wrong(400, "'drained' is missing")
        self._note(request, f"upstream {name}, pod {pod}: {json.dumps(wanted)}")
        if wanted["drained"]:
            upstream.drain(address)
        else:
            upstream.undrain(address)
        return upstream_document(upstream.snapshot())

    def _cancel(self, request: Request, number: str) -> Any:
        self._note(request, f"cancel request {number}")
        if not (re.fullmatch(r"[0-9]{1,18}", number) and self._control.cancel(int(number))):
            raise Wrong(404, f"there is no request {number}")
        return {"cancelled": int(number)}

    def _reload(self, request: Request) -> Any:
        self._note(request, "reload")
        return self._control.reload().addCallback(lambda changes: {"changes": changes})

    def _put_log(self, request: Request) -> Any:
        wanted = body_of(request, {"level": str})
        if wanted.get("level") not in _LEVELS:
            raise Wrong(400, f"'level' must be one of {', '.join(_LEVELS)}")
        self._note(request, f"log level {wanted['level']}")
        self._control.set_log_level(wanted["level"])
        return self._get_log(request)

    # -- inside

    def _get(self, name: str) -> Upstream:
        upstream = self._control.upstreams.get(name)
        if upstream is None:
            raise Wrong(404, f"there is no upstream {name}")
        return upstream

    def _note(self, request: Request, what: str) -> None:
        client: Any = request.getClientAddress()
        _log.info("admin: {host}: {what}", host=getattr(client, "host", "unix"), what=what)


def body_of(request: Request, keys: Mapping[str, type]) -> dict[str, Any]:
    """
    Return the JSON object that a request brought, with these keys or some of them.

    :raise Wrong: it is none, or says something else.
    """
    content: Any = request.content
    data = content.read(_MAX_BODY + 1)
    if len(data) > _MAX_BODY:
        raise Wrong(413, f"more than {_MAX_BODY} bytes")
    try:
        document = json.loads(data)
    except ValueError as error:
        raise Wrong(400, f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Wrong(400, "must be an object")
    for key, value in document.items():
        kind = keys.get(key)
        if kind is None:
            raise Wrong(400, f"unknown key {key!r}; there is {', '.join(keys)}")
        if kind is int and isinstance(value, float) and value.is_integer():
            document[key] = int(value)  # to JSON Schema, 3.0 is a whole number
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            name = "a whole number" if kind is int else kind.__name__
            raise Wrong(400, f"{key!r} must be {name}")
    return document


def answer(request: Request, status: int, document: Any) -> bytes:
    """Return a JSON answer's body, having set its head."""
    request.setResponseCode(status)
    request.setHeader(b"content-type", b"application/json")
    request.setHeader(b"cache-control", b"no-store")
    return json.dumps(document, indent=1).encode() + b"\n"


def finish(request: Request, status: int, document: Any) -> None:
    """Answer later."""
    if request.channel is not None:
        request.write(answer(request, status, document))
        request.finish()
