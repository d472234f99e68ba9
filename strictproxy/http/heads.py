"""
Request and response heads: from bytes to checked records.

llhttp, through httptools, does the parsing and refuses what RFC 9112 says to
refuse (bare LF, obs-fold, Content-Length beside Transfer-Encoding, several
Content-Lengths, white space around names). What it lets through and a proxy
must not is refused here. Bodies are not llhttp's business: see
`strictproxy.http.framing`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import httptools

from strictproxy.errors import (
    BadRequest,
    BadResponse,
    ExpectationFailed,
    HeadersTooLarge,
    MethodNotSupported,
    ProxyError,
    TargetTooLong,
    VersionNotSupported,
)

#: (name in lower case, name as it came, value)
Field = tuple[bytes, bytes, bytes]

END_OF_HEAD = b"\r\n\r\n"

#: Fields that say something about the connection or the framing of the message.
_SPECIAL = frozenset(
    (
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    )
)

#: Fields that end at the next hop (RFC 9110, 7.6.1), besides those that Connection names.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    )
)

#: Fields that `Connection` may not name, or a client could strip what others rely on.
_NEVER_HOP_BY_HOP = frozenset(
    (b"host", b"content-length", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host")
)

#: Fields that mean nothing, or harm, after the body (RFC 9110, 6.5.1).
_NO_TRAILERS = HOP_BY_HOP | {
    b"authorization",
    b"content-encoding",
    b"content-length",
    b"content-range",
    b"content-type",
    b"cookie",
    b"expect",
    b"host",
    b"set-cookie",
    b"trailer",
}

_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::\d*)?")


@dataclass(frozen=True)
class HeadLimits:
    """How large a head may be: bytes in all, fields, and bytes of the target."""

    size: int = 64 * 1024
    fields: int = 100
    target: int = 16 * 1024


class _Collector:
    """httptools' callbacks for one head."""

    __slots__ = ("fields", "special", "status_text", "target")

    def __init__(self) -> None:
        self.target = b""
        self.status_text = b""
        self.fields: list[Field] = []
        self.special: dict[bytes, bytes] = {}

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_status(self, text: bytes) -> None:
        self.status_text += text

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        self.fields.append((lower, name, value))
        if lower in _SPECIAL:
            before = self.special.get(lower)
            self.special[lower] = value if before is None else before + b"," + value


class Head:
    """What request and response heads share."""

    __slots__ = (
        "chunked",
        "content_length",
        "dropped",
        "fields",
        "http_1_1",
        "keep_alive",
        "upgrade",
    )

    def __init__(self, fields: list[Field], http_1_1: bool, keep_alive: bool) -> None:
        self.fields = fields
        self.http_1_1 = http_1_1
        #: the sender is willing to use the connection again
        self.keep_alive = keep_alive
        self.chunked = False
        self.content_length: int | None = None
        #: protocol named by Upgrade, if Connection names Upgrade too
        self.upgrade: bytes | None = None
        #: fields that must not be forwarded
        self.dropped: frozenset[bytes] = HOP_BY_HOP

    def _read_connection(self, special: dict[bytes, bytes]) -> None:
        connection = special.get(b"connection")
        if connection is None:
            return
        named = {token.strip().lower() for token in connection.split(b",")}
        if b"upgrade" in named:
            self.upgrade = special.get(b"upgrade")
        named -= _NEVER_HOP_BY_HOP
        if not named <= self.dropped:
            self.dropped = self.dropped | named

    def get(self, name: bytes) -> bytes | None:
        """Return the first field of that name (lower case), or None."""
        for lower, _, value in self.fields:
            if lower == name:
                return value
        return None


class RequestHead(Head):
    """A request's head, checked."""

    __slots__ = ("expects_continue", "host", "method", "target", "wants_trailers")

    def __init__(
        self, method: bytes, target: bytes, fields: list[Field], http_1_1: bool, keep_alive: bool
    ) -> None:
        super().__init__(fields, http_1_1, keep_alive)
        self.method = method
        self.target = target
        self.host = b""
        self.expects_continue = False
        self.wants_trailers = False

    @property
    def has_body(self) -> bool:
        """Whether body bytes follow the head."""
        return self.chunked or bool(self.content_length)


class ResponseHead(Head):
    """A response's head, checked."""

    __slots__ = ("reason", "status")

    def __init__(
        self, status: int, reason: bytes, fields: list[Field], http_1_1: bool, keep_alive: bool
    ) -> None:
        super().__init__(fields, http_1_1, keep_alive)
        self.status = status
        self.reason = reason

    def has_body(self, method: bytes) -> bool:
        """Whether a body follows, as an answer to `method` (RFC 9112, 6.3)."""
        return not (method == b"HEAD" or self.status in (204, 304) or self.status < 200)


def parse_request_head(data: bytes, limits: HeadLimits) -> RequestHead:
    """
    Parse a whole request head, its final empty line included.

    :raise ClientError: it is malformed or larger than `limits` allow.
    """
    collector = _Collector()
    parser = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserInvalidMethodError:
        raise MethodNotSupported("the method is not known, or not valid") from None
    except httptools.HttpParserError as error:
        if len(data.split(b"\r\n", 1)[0]) > limits.target:
            raise TargetTooLong(f"the target is longer than {limits.target} bytes") from None
        raise BadRequest(_describe(error)) from None
    # llhttp also takes RTSP and ICE for HTTP.
    if data.lstrip(b"\r\n").partition(b"\r\n")[0][-9:-3] != b" HTTP/":
        raise BadRequest("the request line names no version of HTTP")
    if len(collector.target) > limits.target:
        raise TargetTooLong(f"the target is longer than {limits.target} bytes")
    if len(collector.fields) > limits.fields:
        raise HeadersTooLarge(f"there are more than {limits.fields} header fields")
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise VersionNotSupported(f"HTTP/{version} is not supported")
    http_1_1 = version == "1.1"
    special = collector.special
    head = RequestHead(
        parser.get_method(),
        collector.target,
        collector.fields,
        http_1_1,
        _keeps_alive(special, http_1_1),
    )
    _check_aliases(collector.fields)
    _read_framing(head, special, BadRequest)
    _read_host(head)
    head._read_connection(special)
    expect = special.get(b"expect")
    if expect is not None and http_1_1:
        if expect.lower() != b"100-continue":
            raise ExpectationFailed("the only expectation that can be met is 100-continue")
        head.expects_continue = True
    te = special.get(b"te")
    if te is not None:
        head.wants_trailers = b"trailers" in [part.strip() for part in te.lower().split(b",")]
    return head


def parse_response_head(data: bytes) -> ResponseHead:
    """
    Parse a whole response head, its final empty line included.

    :raise BadResponse: it is malformed.
    """
    collector = _Collector()
    parser = httptools.HttpResponseParser(collector)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise BadResponse(_describe(error)) from None
    version = parser.get_http_version()
    if version not in ("1.1", "1.0") or not data.startswith(b"HTTP/"):
        raise BadResponse(f"the pod speaks HTTP/{version}")
    http_1_1 = version == "1.1"
    special = collector.special
    head = ResponseHead(
        parser.get_status_code(),
        collector.status_text,
        collector.fields,
        http_1_1,
        _keeps_alive(special, http_1_1),
    )
    _read_framing(head, special, BadResponse)
    head._read_connection(special)
    return head


def parse_trailers(data: bytes) -> list[Field]:
    """
    Parse a trailer section, its final empty line included; fields not allowed there are dropped.

    :raise BadRequest: it is malformed.
    """
    if data == b"\r\n":
        return []
    collector = _Collector()
    try:
        httptools.HttpRequestParser(collector).feed_data(b"GET / HTTP/1.0\r\n" + data)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise BadRequest(f"in the trailers: {_describe(error)}") from None
    return [field for field in collector.fields if field[0] not in _NO_TRAILERS]


def check_partial_request(data: bytes) -> None:
    """
    Refuse the beginning of a request head as soon as it cannot become one.

    :raise ClientError: it is malformed already.
    """
    try:
        httptools.HttpRequestParser(_Collector()).feed_data(data)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserInvalidMethodError:
        raise MethodNotSupported("the method is not known, or not valid") from None
    except httptools.HttpParserError as error:
        raise BadRequest(_describe(error)) from None


def encode_fields(fields: list[Field], dropped: frozenset[bytes] = frozenset()) -> list[bytes]:
    """Return `name: value` lines for all fields but those in `dropped`."""
    return [b"%b: %b\r\n" % (name, value) for low, name, value in fields if low not in dropped]


def _describe(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text[0].lower() + text[1:]


def _keeps_alive(special: dict[bytes, bytes], http_1_1: bool) -> bool:
    """Apply RFC 9112, 9.3; llhttp's own answer mixes in how the message ends."""
    connection = special.get(b"connection")
    if connection is None:
        return http_1_1
    options = {token.strip() for token in connection.lower().split(b",")}
    return b"close" not in options if http_1_1 else b"keep-alive" in options


def _check_aliases(fields: list[Field]) -> None:
    """
    Refuse `X_Y` where it could be taken for `X-Y`.

    CGI and WSGI turn both into X_Y, so one could pass for the other behind us.
    """
    for lower, name, _ in fields:
        if b"_" in lower:
            plain = lower.replace(b"_", b"-")
            if (
                plain in _SPECIAL
                or plain in _NEVER_HOP_BY_HOP
                or any(plain == f[0] for f in fields)
            ):
                raise BadRequest(f"header name {name.decode('latin-1')} imitates another")


def _read_framing(head: Head, special: dict[bytes, bytes], error: type[ProxyError]) -> None:
    """RFC 9112, 6.1 to 6.3; anything that two readers could take differently is refused."""
    length = special.get(b"content-length")
    coding = special.get(b"transfer-encoding")
    if coding is not None:
        # Content-Length beside it, llhttp has refused already.
        if not head.http_1_1:
            raise error("Transfer-Encoding in an HTTP/1.0 message")
        if coding.strip().lower() != b"chunked":
            raise error("a Transfer-Encoding other than chunked")
        head.chunked = True
    elif length is not None:
        if not length.isdigit() or len(length) > 18:
            raise error("Content-Length is not a plain number")
        head.content_length = int(length)


def _read_host(head: RequestHead) -> None:
    """RFC 9112, 3.2: one Host, required in HTTP/1.1; an absolute target overrides it."""
    hosts = [value for lower, _, value in head.fields if lower == b"host"]
    if len(hosts) > 1:
        raise BadRequest("more than one Host")
    if not hosts and head.http_1_1:
        raise BadRequest("no Host")
    host = hosts[0] if hosts else b""
    if not _HOST.fullmatch(host):
        raise BadRequest("Host is not valid")
    target = head.target
    if head.method == b"CONNECT":
        raise MethodNotSupported("CONNECT is not supported: this is not a forward proxy")
    if not target.startswith(b"/"):
        if target == b"*":
            if head.method != b"OPTIONS":
                raise BadRequest("the target * is for OPTIONS alone")
        else:
            scheme, mark, rest = target.partition(b"://")
            if not mark or scheme.lower() not in (b"http", b"https"):
                raise BadRequest("the target is neither a path nor an absolute URI")
            host, slash, path = rest.partition(b"/")
            if b"?" in host:
                host, _, query = host.partition(b"?")
                slash, path = b"/?", query + (slash + path if slash else b"")
            if not host or not _HOST.fullmatch(host):
                raise BadRequest("the target's authority is not valid")
            head.target = (slash or b"/") + path
            head.fields = [field for field in head.fields if field[0] != b"host"]
            head.fields.insert(0, (b"host", b"Host", host))
    head.host = host
