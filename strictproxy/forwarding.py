"""
What a message looks like on the other side: heads as they are forwarded. Pure.

Hop-by-hop fields end here; who the client is and which way the message came is
added; a route's own edits come last. What can be prepared once per route is.
"""

from __future__ import annotations

import re
from random import getrandbits

from strictproxy.config.model import HeaderEdits, RouteConfig
from strictproxy.http.heads import RequestHead, ResponseHead, encode_fields
from strictproxy.http.peer import Peer
from strictproxy.routing import rewrite

VIA = b"1.1 strictproxy"

#: Fields by which proxies tell of the client; only a trusted peer's are believed.
_TOLD_BY_PROXIES = frozenset(
    (
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-forwarded-server",
        b"x-real-ip",
    )
)
_REBUILT = frozenset(
    (
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"via",
        b"x-request-id",
    )
)
_TRACEPARENT = frozenset((b"traceparent",))
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,200}")


def request_id(head: RequestHead) -> bytes:
    """Return the request's own id if it has a usable one, else a new one."""
    given = head.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return b"%032x" % getrandbits(128)


class _Edits:
    """A route's edits, as bytes."""

    def __init__(self, edits: HeaderEdits) -> None:
        names = [*edits.remove, *(name for name, _ in edits.set)]
        self.dropped = frozenset(name.lower().encode("latin-1") for name in names)
        added = (*edits.set, *edits.add)
        self.block = "".join(f"{name}: {value}\r\n" for name, value in added).encode("latin-1")


class Forwarding:
    """How the messages of one route are forwarded."""

    def __init__(self, route: RouteConfig, *, server_timing: bool = False) -> None:
        self.route = route
        self._request = _Edits(route.request_headers)
        self._response = _Edits(route.response_headers)
        self._server_timing = server_timing
        #: brings the pod the URL to call when a task is done
        self.callback_header: bytes | None = None
        if route.task is not None and route.task.callback is not None:
            self.callback_header = route.task.callback.header.encode("latin-1")
            self._request.dropped |= {self.callback_header.lower()}

    def request_head(
        self,
        head: RequestHead,
        peer: Peer,
        pod: str,
        identity: bytes,
        traceparent: bytes | None = None,
    ) -> list[bytes]:
        """
        Return the head to send to the pod, in pieces, up to and with its empty line.

        :param traceparent: instead of the client's, if there is a span of ours.
        """
        target = head.target
        if self.route.replace_prefix is not None:
            target = rewrite(self.route, target.decode("latin-1")).encode("latin-1")
        dropped = head.dropped | _REBUILT | self._request.dropped
        if not peer.trusted:
            dropped |= _TOLD_BY_PROXIES
        if traceparent:
            dropped |= _TRACEPARENT
        scheme = b"https" if peer.secure else b"http"
        address = peer.address.encode()
        out = [b"%b %b HTTP/1.1\r\n" % (head.method, target)]
        out += encode_fields(head.fields, dropped)
        told: dict[bytes, bytes] = {}
        for name, _, value in head.fields:
            if name in _REBUILT and (peer.trusted or name == b"via"):
                before = told.get(name)
                told[name] = value if before is None else b"%b, %b" % (before, value)
        out.append(
            b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Host: %b\r\n"
            b"Via: %b\r\nX-Request-Id: %b\r\n"
            % (
                _append(told.get(b"x-forwarded-for"), address),
                told.get(b"x-forwarded-proto") or scheme,
                told.get(b"x-forwarded-host") or head.host,
                _append(told.get(b"via"), VIA),
                identity,
            )
        )
        forwarded = told.get(b"forwarded")
        if forwarded is not None:
            # Whoever relies on it (RFC 7239) must not lose the last hop.
            node = b'"[%b]"' % address if b":" in address else address
            hop = b"for=%b;proto=%b" % (node, scheme)
            out.append(b"Forwarded: %b\r\n" % _append(forwarded, hop))
        if traceparent:
            out.append(b"traceparent: %b\r\n" % traceparent)
        if not head.host and head.get(b"host") is None:
            out.append(b"Host: %b\r\n" % pod.encode())
        if head.chunked:
            out.append(b"Transfer-Encoding: chunked\r\n")
        if head.upgrade is not None and head.http_1_1:
            out.append(b"Connection: Upgrade\r\nUpgrade: %b\r\n" % head.upgrade)
        elif head.wants_trailers:
            out.append(b"TE: trailers\r\nConnection: TE\r\n")
        out.append(self._request.block)
        out.append(b"\r\n")
        return out

    def response_lines(
        self, head: ResponseHead, identity: bytes, waited: float, pod_time: float
    ) -> list[bytes]:
        """Return the response's header lines, but for those about its framing."""
        edits = self._response
        lines = encode_fields(head.fields, head.dropped | edits.dropped)
        lines.append(b"Via: %b\r\n" % VIA)
        if head.get(b"x-request-id") is None:
            lines.append(b"X-Request-Id: %b\r\n" % identity)
        if self._server_timing:
            lines.append(
                b"Server-Timing: queue;dur=%.1f, pod;dur=%.1f\r\n" % (waited * 1e3, pod_time * 1e3)
            )
        lines.append(edits.block)
        return lines

    def interim_lines(self, head: ResponseHead) -> list[bytes]:
        """Return the header lines of a 1xx response."""
        return encode_fields(head.fields, head.dropped)


def _append(before: bytes | None, value: bytes) -> bytes:
    return value if before is None else b"%b, %b" % (before, value)
