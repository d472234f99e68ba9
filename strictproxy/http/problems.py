"""
Error answers: RFC 9457 problem documents.

Each has a stable `type` (`urn:strictproxy:problem:<reason>`), so that a client
can tell the proxy's own 503s from each other and from a pod's.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from math import ceil

from strictproxy.errors import ProxyError

TYPE_PREFIX = "urn:strictproxy:problem:"


def problem_body(error: ProxyError, request_id: str | None = None) -> bytes:
    """Return the problem document for `error` as JSON."""
    document = {
        "type": TYPE_PREFIX + error.reason,
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "reason": error.reason,
    }
    if request_id:
        document["instance"] = f"urn:strictproxy:request:{request_id}"
    return json.dumps(document).encode() + b"\n"


def problem_fields(error: ProxyError, body: bytes, retry_after: float | None = None) -> list[bytes]:
    """Return the header lines that go with `problem_body`."""
    lines = [
        b"Content-Type: application/problem+json\r\n",
        b"Content-Length: %d\r\n" % len(body),
        b"Cache-Control: no-store\r\n",
        b"X-Strictproxy-Reason: %b\r\n" % error.reason.encode(),
    ]
    lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in error.fields]
    if retry_after is not None:
        lines.append(b"Retry-After: %d\r\n" % ceil(retry_after))
    return lines


def reason_phrase(status: int) -> bytes:
    """Return the standard phrase for a status code, empty if there is none."""
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
