"""
HTTP/1.1 as the RFCs have it: a table of wire cases over real sockets.

Each case names its section. A request case says what the client sends and what
must come of it: an error status, or what must and must not reach the pod. A
response case says what the pod sends and what must and must not reach the
client. Every case is run twice, whole and cut into pieces at random.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from strictproxy.http.framing import ChunkedReader
from tests.harness import ProxyTestCase, Wire

HOST = b"Host: example.com\r\n"
#: A request that tells whether the connection is still in step.
PROBE = b"GET /probe HTTP/1.1\r\n" + HOST + b"\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass(frozen=True)
class Sent:
    """A request case."""

    section: str
    name: str
    data: bytes
    #: the status of the proxy's own answer, or 0 if the request reaches the pod
    status: int = 0
    #: what the pod must get
    has: tuple[bytes, ...] = ()
    #: what it must not
    lacks: tuple[bytes, ...] = ()
    #: the connection can be used again
    keeps: bool = True


@dataclass(frozen=True)
class Answered:
    """A response case."""

    section: str
    name: str
    data: bytes
    has: tuple[bytes, ...] = ()
    lacks: tuple[bytes, ...] = ()
    method: bytes = b"GET"
    #: the pod closes after sending
    closes: bool = False
    #: the client's connection can be used again
    keeps: bool = True


def get(*lines: bytes, target: bytes = b"/a", version: bytes = b"HTTP/1.1") -> bytes:
    return b"\r\n".join([b"GET " + target + b" " + version, *lines, b"", b""])


def post(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"POST /a HTTP/1.1", HOST[:-2], *lines, b"", b""]) + body


def chunked(body: bytes, *lines: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", *lines, body=body)


H = HOST[:-2]

REQUESTS = [
    # -- methods
    *[
        Sent("9110 9", f"method {m.decode()}", m + b" /a HTTP/1.1\r\n" + HOST + b"\r\n", has=(m + b" /a HTTP/1.1",))
        for m in (b"GET", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH", b"PROPFIND", b"REPORT", b"PURGE", b"MKCOL", b"LOCK", b"SEARCH", b"SUBSCRIBE")
    ],
    Sent("9110 9.1", "unknown method", b"BREW /a HTTP/1.1\r\n" + HOST + b"\r\n", 501, keeps=False),
    Sent("9110 9.1", "lower-case method", b"get /a HTTP/1.1\r\n" + HOST + b"\r\n", 501, keeps=False),
    Sent("9110 9.3.6", "CONNECT", b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n", 501, keeps=False),
    Sent("9112 3", "no method", b" /a HTTP/1.1\r\n" + HOST + b"\r\n", 501, keeps=False),
    # -- targets
    Sent("9112 3.2.1", "query untouched", get(H, target=b"/a?b=%20&c=/d?e"), has=(b"GET /a?b=%20&c=/d?e HTTP/1.1",)),
    Sent("9112 3.2.1", "encoding untouched", get(H, target=b"/%41%2f%2E%2e"), has=(b"GET /%41%2f%2E%2e HTTP/1.1",)),
    Sent("9112 3.2.1", "dots untouched", get(H, target=b"/a/../b/./c"), has=(b"GET /a/../b/./c HTTP/1.1",)),
    Sent("9112 3.2.1", "empty segments untouched", get(H, target=b"//a//b"), has=(b"GET //a//b HTTP/1.1",)),
    Sent("9112 3.2.1", "semicolons", get(H, target=b"/a;b=c;d"), has=(b"GET /a;b=c;d HTTP/1.1",)),
    Sent("9112 3.2.2", "absolute form", get(H, target=b"http://other/x?y"), has=(b"GET /x?y HTTP/1.1", b"Host: other\r\n"), lacks=(b"Host: example.com",)),
    Sent("9112 3.2.2", "absolute form without path", get(H, target=b"http://other"), has=(b"GET / HTTP/1.1", b"Host: other\r\n")),
    Sent("9112 3.2.2", "absolute form, query alone", get(H, target=b"http://other?q"), has=(b"GET /?q HTTP/1.1",)),
    Sent("9112 3.2.2", "absolute form with user", get(H, target=b"http://a@b/"), 400, keeps=False),
    Sent("9112 3.2.2", "absolute form, other scheme", get(H, target=b"ftp://a/"), 400, keeps=False),
    Sent("9112 3.2.3", "authority form", get(H, target=b"a:80"), 400, keeps=False),
    Sent("9112 3.2.4", "asterisk form", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", has=(b"OPTIONS * HTTP/1.1",)),
    Sent("9112 3.2.4", "asterisk with GET", get(H, target=b"*"), 400, keeps=False),
    Sent("9112 3.2", "space in target", get(H, target=b"/a b"), 400, keeps=False),
    Sent("9112 3.2", "control in target", get(H, target=b"/a\x01"), 400, keeps=False),
    Sent("9112 3.2", "NUL in target", get(H, target=b"/a\x00"), 400, keeps=False),
    Sent("3986 2", "bytes beyond ASCII", get(H, target=b"/caf\xc3\xa9"), 400, keeps=False),
    Sent("9112 3.2", "no target", b"GET HTTP/1.1\r\n" + HOST + b"\r\n", 400, keeps=False),
    Sent("9110 15.5.15", "long target", get(H, target=b"/" + b"a" * 17000), 414, keeps=False),
    Sent("9112 3.2", "fragment", get(H, target=b"/a#b"), has=(b"GET /a#b",)),
    # -- versions
    Sent("9112 2.3", "HTTP/1.0", get(version=b"HTTP/1.0"), has=(b"GET /a HTTP/1.1\r\n",), keeps=False),
    Sent("9112 2.3", "HTTP/1.0 with Host", get(H, version=b"HTTP/1.0"), has=(b"Host: example.com",), keeps=False),
    Sent("9112 2.3", "HTTP/2.0", get(H, version=b"HTTP/2.0"), 505, keeps=False),
    Sent("9112 2.3", "HTTP/1.2", get(H, version=b"HTTP/1.2"), 400, keeps=False),
    Sent("9112 2.3", "HTTP/0.9", b"GET /a\r\n\r\n", 400, keeps=False),
    Sent("9112 2.3", "lower-case version", get(H, version=b"http/1.1"), 400, keeps=False),
    Sent("9112 2.3", "version with more digits", get(H, version=b"HTTP/1.10"), 400, keeps=False),
    Sent("9112 2.3", "another protocol", get(H, version=b"RTSP/1.0"), 400, keeps=False),
    # -- Host
    Sent("9112 3.2", "no Host", get(), 400, keeps=False),
    Sent("9112 3.2", "two Hosts", get(H, b"Host: other"), 400, keeps=False),
    Sent("9112 3.2", "same Host twice", get(H, H), 400, keeps=False),
    Sent("9112 3.2", "empty Host", get(b"Host:"), has=(b"Host: \r\n",)),
    Sent("9110 7.2", "Host with port", get(b"Host: a:81"), has=(b"Host: a:81\r\n",)),
    Sent("9110 7.2", "Host IPv6", get(b"Host: [::1]:81"), has=(b"Host: [::1]:81\r\n",)),
    Sent("9110 7.2", "Host with a path", get(b"Host: a/b"), 400, keeps=False),
    Sent("9110 7.2", "Host with a space", get(b"Host: a b"), 400, keeps=False),
    Sent("9110 7.2", "Host with a comma", get(b"Host: a,b"), has=(b"Host: a,b",)),
    Sent("9110 7.2", "Host with user", get(b"Host: u@a"), 400, keeps=False),
    # -- line ends and white space
    Sent("9112 2.2", "empty lines before", b"\r\n\r\n" + get(H), has=(b"GET /a",)),
    Sent("9112 2.2", "bare LF after request line", b"GET /a HTTP/1.1\nHost: a\n\n", 400, keeps=False),
    Sent("9112 2.2", "bare LF after a field", b"GET /a HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400, keeps=False),
    Sent("9112 2.2", "bare CR in a field", get(H, b"X: a\rb"), 400, keeps=False),
    Sent("9112 2.2", "bare CR before the end", b"GET /a HTTP/1.1\r\nHost: a\r\r\n\r\n", 400, keeps=False),
    Sent("9112 2.2", "space before first field", b"GET /a HTTP/1.1\r\n Host: a\r\n\r\n", 400, keeps=False),
    Sent("9112 3", "two spaces in request line", b"GET  /a HTTP/1.1\r\n" + HOST + b"\r\n", has=(b"GET /a HTTP/1.1",)),
    Sent("9112 3", "tab in request line", b"GET\t/a HTTP/1.1\r\n" + HOST + b"\r\n", 501, keeps=False),
    Sent("9112 3", "space after version", b"GET /a HTTP/1.1 \r\n" + HOST + b"\r\n", 400, keeps=False),
    Sent("9112 5.1", "space before colon", get(H, b"X : a"), 400, keeps=False),
    Sent("9112 5.1", "tab before colon", get(H, b"X\t: a"), 400, keeps=False),
    Sent("9112 5.1", "no colon", get(H, b"nonsense"), 400, keeps=False),
    Sent("9112 5.1", "empty name", get(H, b": a"), 400, keeps=False),
    Sent("9112 5.1", "space in name", get(H, b"X Y: a"), 400, keeps=False),
    Sent("9112 5.2", "obs-fold", get(H, b"X: a", b" b"), 400, keeps=False),
    Sent("9112 5.2", "obs-fold with tab", get(H, b"X: a", b"\tb"), 400, keeps=False),
    Sent("9112 5.1", "white space around value", get(H, b"X:  \ta b\t "), has=(b"X: a b",)),
    Sent("9112 5.1", "no white space", get(H, b"X:a"), has=(b"X: a\r\n",)),
    Sent("9110 5.5", "empty value", get(H, b"X:"), has=(b"X: \r\n",)),
    Sent("9110 5.5", "bytes beyond ASCII in value", get(H, b"X: caf\xc3\xa9"), has=(b"X: caf\xc3\xa9",)),
    Sent("9110 5.5", "NUL in value", get(H, b"X: a\x00b"), 400, keeps=False),
    Sent("9110 5.5", "control in value", get(H, b"X: a\x01b"), 400, keeps=False),
    Sent("9110 5.5", "DEL in value", get(H, b"X: a\x7fb"), 400, keeps=False),
    Sent("9110 5.6.2", "odd but valid name", get(H, b"!#$%&'*+-.^`|~9: a"), has=(b"!#$%&'*+-.^`|~9: a",)),
    Sent("9110 5.6.2", "bracket in name", get(H, b"X(Y): a"), 400, keeps=False),
    Sent("9110 5.6.2", "bytes beyond ASCII in name", get(H, b"X\xe9: a"), 400, keeps=False),
    Sent("9110 5.3", "repeated fields keep their order", get(H, b"X: 1", b"Y: 2", b"X: 3"), has=(b"X: 1\r\nY: 2\r\nX: 3\r\n",)),
    Sent("9110 5.1", "spelling of names", get(H, b"x-MiXeD: 1"), has=(b"x-MiXeD: 1",)),
    Sent("9110 5.4", "too many fields", get(H, *[b"X: 1"] * 100), 431, keeps=False),
    Sent("9110 5.4", "long field", get(H, b"X: " + b"a" * 70000), 431, keeps=False),
    Sent("6585 5", "many long fields", get(H, *[b"X: " + b"a" * 9000] * 9), 431, keeps=False),
    # -- connection
    Sent("9112 9.6", "close", get(H, b"Connection: close"), has=(b"GET /a",), lacks=(b"Connection",), keeps=False),
    Sent("9112 9.6", "close among others", get(H, b"Connection: x, CLOSE"), has=(b"GET /a",), keeps=False),
    Sent("9112 9.3", "keep-alive", get(H, b"Connection: keep-alive"), lacks=(b"Connection", b"keep-alive")),
    Sent("9110 7.6.1", "named fields go", get(H, b"Connection: X-A, x-b", b"X-A: 1", b"X-B: 2", b"X-C: 3"), has=(b"X-C: 3",), lacks=(b"X-A", b"X-B")),
    Sent("9110 7.6.1", "several Connection fields", get(H, b"Connection: X-A", b"Connection: X-B", b"X-A: 1", b"X-B: 2"), lacks=(b"X-A", b"X-B")),
    Sent("9110 7.6.1", "naming Host strips nothing", get(H, b"Connection: Host"), has=(b"Host: example.com",)),
    Sent("9110 7.6.1", "naming X-Forwarded-For strips nothing", get(H, b"Connection: X-Forwarded-For"), has=(b"X-Forwarded-For: 127.0.0.1",)),
    Sent("9110 7.6.1", "naming Content-Length strips nothing", post(b"Connection: Content-Length", b"Content-Length: 1", body=b"x"), has=(b"Content-Length: 1", b"\r\n\r\nx")),
    Sent("9110 7.6.1", "Keep-Alive goes", get(H, b"Keep-Alive: timeout=5"), lacks=(b"Keep-Alive",)),
    Sent("9110 7.6.1", "Proxy-Connection goes", get(H, b"Proxy-Connection: keep-alive"), lacks=(b"Proxy-Connection",)),
    Sent("9110 7.6.1", "TE goes", get(H, b"TE: gzip"), lacks=(b"TE:",)),
    Sent("9110 10.1.4", "TE: trailers is said anew", get(H, b"TE: trailers, deflate", b"Connection: TE"), has=(b"TE: trailers\r\nConnection: TE\r\n",), lacks=(b"deflate",)),
    Sent("9110 11.7.2", "Proxy-Authorization goes", get(H, b"Proxy-Authorization: x"), lacks=(b"Proxy-Authorization",)),
    Sent("9110 11.6.2", "Authorization stays", get(H, b"Authorization: Basic x"), has=(b"Authorization: Basic x",)),
    Sent("9110 7.8", "Upgrade without Connection goes", get(H, b"Upgrade: websocket"), lacks=(b"Upgrade",)),
    Sent("9110 7.8", "Upgrade", get(H, b"Connection: upgrade", b"Upgrade: websocket"), has=(b"Connection: Upgrade\r\nUpgrade: websocket\r\n",)),
    Sent("9110 7.6.3", "Via", get(H, b"Via: 1.0 a"), has=(b"Via: 1.0 a, 1.1 strictproxy\r\n",)),
    Sent("9110 12.5.3", "Accept-Encoding untouched", get(H, b"Accept-Encoding: br;q=1.0, gzip"), has=(b"Accept-Encoding: br;q=1.0, gzip",)),
    Sent("6265 5.4", "Cookie untouched", get(H, b"Cookie: a=b; c=d"), has=(b"Cookie: a=b; c=d",)),
    Sent("9110 14.2", "Range untouched", get(H, b"Range: bytes=0-4"), has=(b"Range: bytes=0-4",)),
    # -- lengths
    Sent("9112 6.2", "body of known length", post(b"Content-Length: 5", body=b"hello"), has=(b"Content-Length: 5", b"\r\n\r\nhello")),
    Sent("9112 6.2", "length zero", post(b"Content-Length: 0"), has=(b"Content-Length: 0",)),
    Sent("9112 6.2", "length with leading zeros", post(b"Content-Length: 005", body=b"hello"), has=(b"hello",)),
    Sent("9112 6.3", "GET with a body", get(H, b"Content-Length: 2") + b"hi", has=(b"\r\n\r\nhi",)),
    Sent("9112 6.3", "POST without length has no body", post(), has=(b"POST /a",)),
    Sent("9112 6.3", "negative length", post(b"Content-Length: -1"), 400, keeps=False),
    Sent("9112 6.3", "signed length", post(b"Content-Length: +1", body=b"x"), 400, keeps=False),
    Sent("9112 6.3", "length in hex", post(b"Content-Length: 0x1", body=b"x"), 400, keeps=False),
    Sent("9112 6.3", "length with a fraction", post(b"Content-Length: 1.0", body=b"x"), 400, keeps=False),
    Sent("9112 6.3", "empty length", post(b"Content-Length:"), 400, keeps=False),
    Sent("9112 6.3", "length a list", post(b"Content-Length: 1, 1", body=b"x"), 400, keeps=False),
    Sent("9112 6.3", "length of different values", post(b"Content-Length: 1", b"Content-Length: 2", body=b"xx"), 400, keeps=False),
    Sent("9112 6.3", "length twice", post(b"Content-Length: 1", b"Content-Length: 1", body=b"x"), 400, keeps=False),
    Sent("9112 6.3", "length past counting", post(b"Content-Length: 99999999999999999999"), 400, keeps=False),
    Sent("9112 6.3", "length with a space inside", post(b"Content-Length: 1 2", body=b"x"), 400, keeps=False),
    Sent("9112 6.3", "imitated length", post(b"Content_Length: 5", body=b""), 400, keeps=False),
    Sent("9110 15.5.14", "length past the limit", post(b"Content-Length: 99999999999999999"), 413, keeps=False),
    # -- chunked
    Sent("9112 7.1", "one chunk", chunked(b"5\r\nhello\r\n0\r\n\r\n"), has=(b"Transfer-Encoding: chunked", b"5\r\nhello\r\n"), lacks=(b"Content-Length",)),
    Sent("9112 7.1", "empty", chunked(b"0\r\n\r\n"), has=(b"\r\n\r\n0\r\n\r\n",)),
    Sent("9112 7.1", "size in capitals", chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), has=(b"0123456789",)),
    Sent("9112 7.1", "size with leading zeros", chunked(b"0005\r\nhello\r\n000\r\n\r\n"), has=(b"hello",)),
    Sent("9112 7.1.1", "extensions are dropped", chunked(b'5;a=b;c="d"\r\nhello\r\n0;x\r\n\r\n'), has=(b"hello",), lacks=(b";a", b";x")),
    Sent("9112 7.1.2", "trailers", chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"), has=(b"0\r\nX-Sum: 1\r\n\r\n",)),
    Sent("9110 6.5.1", "framing among trailers", chunked(b"0\r\nContent-Length: 5\r\nX: 1\r\n\r\n"), has=(b"0\r\nX: 1\r\n\r\n",), lacks=(b"Content-Length",)),
    Sent("9110 6.5.1", "credentials among trailers", chunked(b"0\r\nAuthorization: x\r\nCookie: y\r\n\r\n"), lacks=(b"Authorization", b"Cookie")),
    Sent("9112 7.1", "size not hex", chunked(b"xyz\r\n"), 400, keeps=False),
    Sent("9112 7.1", "size empty", chunked(b"\r\nhello"), 400, keeps=False),
    Sent("9112 7.1", "size negative", chunked(b"-5\r\nhello"), 400, keeps=False),
    Sent("9112 7.1", "size prefixed", chunked(b"0x5\r\nhello\r\n"), 400, keeps=False),
    Sent("9112 7.1", "size past counting", chunked(b"fffffffffffffffff\r\n"), 400, keeps=False),
    Sent("9112 7.1", "space before size", chunked(b" 5\r\nhello\r\n"), 400, keeps=False),
    Sent("9112 7.1", "space after size", chunked(b"5 \r\nhello\r\n"), 400, keeps=False),
    Sent("9112 7.1", "LF alone after size", chunked(b"5\nhello\r\n"), 400, keeps=False),
    Sent("9112 7.1", "LF alone after data", chunked(b"5\r\nhello\n0\r\n\r\n"), 400, keeps=False),
    Sent("9112 7.1", "more data than the size says", chunked(b"5\r\nhello!\r\n0\r\n\r\n"), 400, keeps=False),
    Sent("9112 7.1", "less data than the size says", chunked(b"6\r\nhello\r\n0\r\n\r\n"), 400, keeps=False),
    Sent("9112 7.1.1", "control in an extension", chunked(b"5;a\x00\r\nhello\r\n"), 400, keeps=False),
    Sent("9112 7.1.1", "endless extension", chunked(b"5;" + b"a" * 9000), 400, keeps=False),
    Sent("9112 7.1.2", "obs-fold in trailers", chunked(b"0\r\nX: 1\r\n 2\r\n\r\n"), 400, keeps=False),
    Sent("9112 7.1.2", "no colon in trailers", chunked(b"0\r\nnonsense\r\n\r\n"), 400, keeps=False),
    Sent("9112 7.1.2", "endless trailers", chunked(b"0\r\n" + b"X: 1\r\n" * 4000), 400, keeps=False),
    # -- smuggling
    Sent("9112 6.3", "CL.TE", post(b"Content-Length: 6", b"Transfer-Encoding: chunked", body=b"0\r\n\r\nX"), 400, keeps=False),
    Sent("9112 6.3", "TE.CL", post(b"Transfer-Encoding: chunked", b"Content-Length: 4", body=b"0\r\n\r\n"), 400, keeps=False),
    Sent("9112 6.1", "identity", post(b"Transfer-Encoding: identity"), 400, keeps=False),
    Sent("9112 6.1", "gzip, chunked", post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 400, keeps=False),
    Sent("9112 6.1", "chunked, gzip", post(b"Transfer-Encoding: chunked, gzip"), 400, keeps=False),
    Sent("9112 6.1", "chunked twice", post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), 400, keeps=False),
    Sent("9112 6.1", "two Transfer-Encodings", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=b"0\r\n\r\n"), 400, keeps=False),
    Sent("9112 6.1", "xchunked", post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"), 400, keeps=False),
    Sent("9112 6.1", "quoted chunked", post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"), 400, keeps=False),
    Sent("9112 6.1", "space before the colon", post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"), 400, keeps=False),
    Sent("9112 6.1", "vertical tab", post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), 400, keeps=False),
    Sent("9112 6.1", "imitated", post(b"Transfer_Encoding: chunked", body=b""), 400, keeps=False),
    Sent("9112 6.1", "in HTTP/1.0", b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, keeps=False),
    Sent("9112 6.1", "capitals", post(b"tRANSFER-eNCODING: CHUNKED", body=b"1\r\nx\r\n0\r\n\r\n"), has=(b"1\r\nx\r\n",)),
    Sent("9110 5.1", "imitated X-Forwarded-For", get(H, b"X_Forwarded_For: 1"), 400, keeps=False),
    Sent("9110 5.1", "name twice, once with an underscore", get(H, b"X-A: 1", b"X_A: 2"), 400, keeps=False),
    Sent("9110 5.1", "underscore alone", get(H, b"X_A: 2"), has=(b"X_A: 2",)),
    # -- expectations
    Sent("9110 10.1.1", "unknown expectation", get(H, b"Expect: tea"), 417, keeps=False),
    Sent("9110 10.1.1", "100-continue without body", get(H, b"Expect: 100-continue"), has=(b"Expect: 100-continue",)),
    Sent("9110 10.1.1", "100-continue in HTTP/1.0", get(H, b"Expect: 100-continue", version=b"HTTP/1.0"), has=(b"GET /a",), keeps=False),
]  # fmt: skip

RESPONSES = [
    Answered("9112 6.2", "known length", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", has=(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 2", b"\r\n\r\nok"), lacks=(b"chunked",)),
    Answered("9112 4", "reason phrase", b"HTTP/1.1 299 Fine by me\r\nContent-Length: 0\r\n\r\n", has=(b"HTTP/1.1 299 Fine by me\r\n",)),
    Answered("9112 4", "no reason phrase", b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n", has=(b"HTTP/1.1 404 Not Found\r\n",)),
    Answered("9112 7.1", "chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\nok\r\n0\r\n\r\n", has=(b"Transfer-Encoding: chunked", b"2\r\nok\r\n0\r\n\r\n"), lacks=(b";x",)),
    Answered("9112 7.1.2", "trailers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n0\r\nX: 1\r\n\r\n", has=(b"Trailer: X", b"0\r\nX: 1\r\n\r\n")),
    Answered("9112 6.3", "until close", b"HTTP/1.1 200 OK\r\n\r\nok", has=(b"Transfer-Encoding: chunked", b"2\r\nok\r\n0\r\n\r\n"), closes=True),
    Answered("9112 6.3", "HTTP/1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", has=(b"HTTP/1.1 200 OK", b"ok"), closes=True),
    Answered("9112 6.3", "HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", has=(b"Content-Length: 99",), method=b"HEAD"),
    Answered("9112 6.3", "HEAD, chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", has=(b"200 OK",), lacks=(b"0\r\n\r\n",), method=b"HEAD"),
    Answered("9112 6.3", "204", b"HTTP/1.1 204 No Content\r\n\r\n", has=(b"204",), lacks=(b"chunked", b"Content-Length")),
    Answered("9112 6.3", "304", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", has=(b"304", b"ETag: x"), lacks=(b"chunked",)),
    Answered("9112 6.3", "304 with a length", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", has=(b"Content-Length: 9",)),
    Answered("9110 15.2", "100", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, has=(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200",)),
    Answered("8297 2", "103", b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK, has=(b"103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200",)),
    Answered("9110 15.2", "several interim responses", b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + OK, has=(b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + b"HTTP/1.1 200",)),
    Answered("9110 7.6.1", "hop-by-hop goes", b"HTTP/1.1 200 OK\r\nConnection: X-A\r\nX-A: 1\r\nKeep-Alive: 5\r\nContent-Length: 0\r\n\r\n", lacks=(b"X-A", b"Keep-Alive")),
    Answered("9112 9.6", "pod closes, client stays", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", has=(b"ok",), lacks=(b"Connection: close",), closes=True),
    Answered("9110 5.3", "repeated fields", b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 0\r\n\r\n", has=(b"Set-Cookie: a\r\nSet-Cookie: b\r\n",)),
    Answered("9110 8.4", "encodings untouched", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x00", has=(b"Content-Encoding: gzip", b"\x1f\x8b\x00")),
    Answered("9110 14.4", "206", b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-1/9\r\nContent-Length: 2\r\n\r\nok", has=(b"206 Partial", b"Content-Range: bytes 0-1/9")),
    Answered("9110 15.4", "redirects are the client's", b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n", has=(b"302 Found", b"Location: http://x/")),
    Answered("9110 15.6", "a pod's own 503", b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: 7\r\n\r\n", has=(b"503 Busy", b"Retry-After: 7"), lacks=(b"X-Strictproxy-Reason",)),
    Answered("9112 6.3", "bytes behind the body", OK + b"HTTP/1.1 200 OK\r\nX: injected\r\n\r\n", has=(b"ok",), lacks=(b"injected",)),
    Answered("9112 6.3", "cut short", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", has=(b"ok",), closes=True, keeps=False),
    Answered("9112 7.1", "chunks cut short", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", has=(b"ok",), lacks=(b"0\r\n\r\n",), closes=True, keeps=False),
    *[
        Answered(section, name, data, has=(b"HTTP/1.1 502 Bad Gateway", b'"reason": "bad_response"'))
        for section, name, data in (
            ("9112 4", "no HTTP", b"hello\r\n\r\n"),
            ("9112 4", "status not a number", b"HTTP/1.1 abc OK\r\n\r\n"),
            ("9112 4", "status of two digits", b"HTTP/1.1 20 OK\r\n\r\n"),
            ("9112 2.3", "HTTP/2.0", b"HTTP/2.0 200 OK\r\n\r\n"),
            ("9112 6.3", "both framings", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"),
            ("9112 6.3", "two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"),
            ("9112 6.3", "bad length", b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n"),
            ("9112 6.1", "unknown coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"),
            ("9112 6.1", "chunked in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
            ("9112 5.2", "obs-fold", b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n"),
            ("9112 2.2", "bare LF", b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n"),
            ("9112 5.1", "space before colon", b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n"),
            ("9110 5.5", "NUL", b"HTTP/1.1 200 OK\r\nX: a\x00\r\n\r\n"),
            ("9110 15.2.2", "unasked upgrade", b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"),
            ("9112 4", "endless head", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000),
        )
    ],
    Answered("9112 8", "closed without an answer", b"", has=(b"502", b'"reason": "pod_disconnected"'), closes=True),
    Answered("9112 8", "closed in the head", b"HTTP/1.1 200 OK\r\nX:", has=(b"502", b'"reason": "pod_disconnected"'), closes=True),
]  # fmt: skip


class ConformanceTests(ProxyTestCase):
    """One test per case; see the tables."""

    async def write(self, wire: Wire, data: bytes, cut: bool) -> None:
        """Send bytes, whole or in pieces that arrive one by one."""
        if not cut:
            wire.send(data)
            return
        numbers = random.Random(data)
        count = min(12, len(data))
        cuts = sorted(numbers.sample(range(len(data)), count)) if data else []
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if wire.closed:
                return
            wire.send(data[start:end])
            await self.turn()

    async def turn(self) -> None:
        from twisted.internet.task import deferLater

        from tests.harness import reactor

        for _ in range(3):
            await deferLater(reactor, 0)

    async def run_request(self, case: Sent, cut: bool) -> None:
        self.start()
        client = await self.client()
        await self.write(client, case.data, cut)
        if case.status:
            answer = await client.until(lambda: client.closed or client.ended)
            self.assertRegex(answer, rb"^HTTP/1\.1 %d " % case.status)
            self.assertIn(b"Connection: close", answer)
            for connection in self.pods[0].connections:
                # A body may turn out to be broken on its way; then it must not look complete.
                sent = await connection.end()
                self.assertFalse(sent.endswith(b"0\r\n\r\n"))
            return
        pod = await self.pods[0].connection()
        complete = re.compile(
            rb"^.*?\r\n\r\n.*" + (rb"\r\n\r\n$" if b"hunked" in case.data else rb"$"), re.S
        )
        sent = await pod.until(lambda: bool(complete.match(pod.received)))
        for piece in case.has:
            await pod.until(lambda piece=piece: piece in joined(pod.received))  # type: ignore[misc]
        for piece in case.lacks:
            self.assertNotIn(piece, sent)
        pod.take()
        pod.send(OK)
        await client.has(b"\r\n\r\nok") if not case.data.startswith(b"HEAD") else None
        if case.keeps:
            client.send(PROBE)
            await pod.has(b"GET /probe HTTP/1.1")
        else:
            await client.end()

    async def run_response(self, case: Answered, cut: bool) -> None:
        self.start()
        client = await self.client(case.method + b" /a HTTP/1.1\r\n" + HOST + b"\r\n")
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        await self.write(pod, case.data, cut)
        if case.closes:
            pod.close()
        answer = client.received
        for piece in case.has:
            answer = await client.has(piece)
        if not case.keeps:
            answer = await client.end()
        for piece in case.lacks:
            self.assertNotIn(piece, answer)
        await self.settled(lambda: self.counts() == (0, 0))
        if case.keeps:
            client.take()
            client.send(PROBE)
            used = len(self.pods[0].connections)
            await self.settled(
                lambda: any(b"/probe" in c.received for c in self.pods[0].connections[used - 1 :])
            )


def joined(message: bytes) -> bytes:
    """Return a message as it came and, if it is chunked, again with its chunks put together."""
    head, _, body = message.partition(b"\r\n\r\n")
    if b"Transfer-Encoding: chunked" not in head:
        return message
    return message + b"\r\n" + head + b"\r\n\r\n" + ChunkedReader().feed(body)


def _add(number: int, case: Sent | Answered) -> None:
    kind = "request" if isinstance(case, Sent) else "response"
    name = re.sub(r"\W+", "_", case.name)
    for how, cut in (("whole", False), ("cut", True)):

        async def test(self: ConformanceTests, cut: bool = cut) -> None:
            self.keep_writes(cut)
            if isinstance(case, Sent):
                await self.run_request(case, cut)
            else:
                await self.run_response(case, cut)

        test.__doc__ = f"RFC {case.section}: {case.name}, {how}"
        setattr(ConformanceTests, f"test_{kind}_{number:03}_{name}_{how}", test)


for _number, _case in enumerate([*REQUESTS, *RESPONSES]):
    _add(_number, _case)
