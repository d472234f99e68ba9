"""Heads and framing, byte by byte. The conformance suite repeats much of it over sockets."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.errors import (
    BadRequest,
    BadResponse,
    ExpectationFailed,
    HeadersTooLarge,
    LineFull,
    MethodNotSupported,
    ProxyError,
    TargetTooLong,
    VersionNotSupported,
)
from strictproxy.http.framing import (
    ChunkedReader,
    LengthReader,
    UntilCloseReader,
    encode_chunk,
    encode_last_chunk,
)
from strictproxy.http.heads import (
    HeadLimits,
    RequestHead,
    ResponseHead,
    check_partial_request,
    parse_request_head,
    parse_response_head,
    parse_trailers,
)
from strictproxy.http.problems import problem_body, problem_fields, reason_phrase
from strictproxy.http.timeouts import Timeouts

LIMITS = HeadLimits(size=4096, fields=5, target=100)


def request(line: bytes, *fields: bytes) -> RequestHead:
    return parse_request_head(b"\r\n".join([line, *fields, b"", b""]), LIMITS)


def get(*fields: bytes) -> RequestHead:
    return request(b"GET / HTTP/1.1", b"Host: h", *fields)


def answer(line: bytes, *fields: bytes) -> ResponseHead:
    return parse_response_head(b"\r\n".join([line, *fields, b"", b""]))


class RequestHeadTests(SynchronousTestCase):
    def test_fields(self) -> None:
        """Fields keep their order, their spelling and their repetitions."""
        head = get(b"X-A: 1", b"x-a:2", b"X-Empty:")
        self.assertEqual(
            head.fields,
            [
                (b"host", b"Host", b"h"),
                (b"x-a", b"X-A", b"1"),
                (b"x-a", b"x-a", b"2"),
                (b"x-empty", b"X-Empty", b""),
            ],
        )
        self.assertEqual((head.get(b"x-a"), head.get(b"x-b")), (b"1", None))
        self.assertEqual((head.method, head.target, head.host), (b"GET", b"/", b"h"))
        self.assertFalse(head.has_body)

    def test_keep_alive(self) -> None:
        """RFC 9112, 9.3: HTTP/1.1 keeps the connection unless told, HTTP/1.0 the other way."""
        self.assertTrue(get().keep_alive)
        self.assertFalse(get(b"Connection: x, Close").keep_alive)
        self.assertFalse(request(b"GET / HTTP/1.0").keep_alive)
        self.assertTrue(request(b"GET / HTTP/1.0", b"Connection: Keep-Alive").keep_alive)

    def test_framing(self) -> None:
        """RFC 9112, 6: the length, or chunked."""
        self.assertEqual(get(b"Content-Length: 5").content_length, 5)
        self.assertFalse(get(b"Content-Length: 0").has_body)
        self.assertTrue(get(b"Transfer-Encoding: Chunked").chunked)

    def test_connection_names_fields(self) -> None:
        """RFC 9110, 7.6.1: what Connection names is dropped, but not what others rely on."""
        head = get(b"Connection: X-Hop, Host, Content-Length, X-Forwarded-For")
        self.assertIn(b"x-hop", head.dropped)
        for name in (b"host", b"content-length", b"x-forwarded-for"):
            self.assertNotIn(name, head.dropped)

    def test_upgrade(self) -> None:
        """An upgrade counts only if Connection says so."""
        self.assertEqual(get(b"Upgrade: websocket", b"Connection: Upgrade").upgrade, b"websocket")
        self.assertIsNone(get(b"Upgrade: websocket").upgrade)

    def test_te_and_expect(self) -> None:
        """TE: trailers and Expect: 100-continue are understood."""
        self.assertTrue(get(b"TE: gzip, Trailers").wants_trailers)
        self.assertFalse(get(b"TE: gzip").wants_trailers)
        self.assertTrue(get(b"Expect: 100-Continue").expects_continue)
        old = request(b"GET / HTTP/1.0", b"Expect: 100-continue")
        self.assertFalse(old.expects_continue)

    def test_targets(self) -> None:
        """RFC 9112, 3.2: absolute targets become paths and override Host; * is for OPTIONS."""
        for target, path, host in (
            (b"http://a.b:81/x?y", b"/x?y", b"a.b:81"),
            (b"HTTPS://a.b", b"/", b"a.b"),
            (b"http://a.b?q=/", b"/?q=/", b"a.b"),
            (b"http://a.b?q", b"/?q", b"a.b"),
            (b"/x", b"/x", b"h"),
        ):
            head = request(b"GET %b HTTP/1.1" % target, b"Host: h")
            self.assertEqual((head.target, head.host, head.get(b"host")), (path, host, host))
        self.assertEqual(request(b"OPTIONS * HTTP/1.1", b"Host: h").target, b"*")

    def test_refused(self) -> None:
        """What is malformed, ambiguous or too large is refused with its own error."""
        cases: list[tuple[type[ProxyError], bytes, tuple[bytes, ...]]] = [
            (BadRequest, b"GET / HTTP/1.1", ()),
            (BadRequest, b"GET / HTTP/1.1", (b"Host: a", b"Host: a")),
            (BadRequest, b"GET / HTTP/1.1", (b"Host: a b",)),
            (BadRequest, b"GET / HTTP/1.1", (b"Host: a@b",)),
            (BadRequest, b"GET * HTTP/1.1", (b"Host: a",)),
            (BadRequest, b"GET http:///x HTTP/1.1", (b"Host: a",)),
            (BadRequest, b"GET ftp://a/ HTTP/1.1", (b"Host: a",)),
            (BadRequest, b"OPTIONS http://a@b/ HTTP/1.1", (b"Host: a",)),
            (BadRequest, b"GET / HTTP/1.1", (b"Host: a", b"X Y: 1")),
            (BadRequest, b"GET / HTTP/1.1", (b"Host: a", b"Content_Length: 1")),
            (BadRequest, b"GET / HTTP/1.1", (b"Host: a", b"X-Y: 1", b"X_Y: 1")),
            (BadRequest, b"GET / HTTP/1.1", (b"Host: a", b"Transfer-Encoding: gzip, chunked")),
            (BadRequest, b"GET / HTTP/1.0", (b"Transfer-Encoding: chunked",)),
            (BadRequest, b"GET / HTTP/1.1", (b"Host: a", b"Content-Length: " + b"9" * 19)),
            (MethodNotSupported, b"CONNECT a:80 HTTP/1.1", (b"Host: a",)),
            (MethodNotSupported, b"BREW / HTTP/1.1", (b"Host: a",)),
            (VersionNotSupported, b"GET / HTTP/2.0", (b"Host: a",)),
            (ExpectationFailed, b"GET / HTTP/1.1", (b"Host: a", b"Expect: tea")),
            (TargetTooLong, b"GET /" + b"x" * 100 + b" HTTP/1.1", (b"Host: a",)),
            (TargetTooLong, b"GET /" + b"\xff" * 200 + b" HTTP/1.1", (b"Host: a",)),
            (HeadersTooLarge, b"GET / HTTP/1.1", (b"Host: a", *[b"A: 1"] * 5)),
        ]
        for error, line, fields in cases:
            with self.assertRaises(error, msg=(line, fields)):
                request(line, *fields)

    def test_underscores_may_stand_alone(self) -> None:
        """A name with an underscore that imitates nothing is let through."""
        self.assertEqual(get(b"X_Y: 1").get(b"x_y"), b"1")

    def test_two_framings(self) -> None:
        """Both framings at once are refused by whoever sees them first."""
        for fields in (
            (b"Content-Length: 1", b"Transfer-Encoding: chunked"),
            (b"Transfer-Encoding: chunked", b"Content-Length: 1"),
            (b"Content-Length: 1", b"Content-Length: 1"),
        ):
            self.assertRaises(BadRequest, get, *fields)

    def test_partial(self) -> None:
        """The beginning of a head is refused as soon as it cannot become one."""
        for good in (
            b"",
            b"G",
            b"GET / HT",
            b"GET / HTTP/1.1\r\nHost",
            b"GET / HTTP/1.1\r\nUpgrade: x\r\n",
        ):
            check_partial_request(good)
        self.assertRaises(BadRequest, check_partial_request, b"GET / HTTP/1.1\nHost: a\n")
        self.assertRaises(MethodNotSupported, check_partial_request, b"SSH-2.0")
        check_partial_request(b"CONNECT a:1 HTTP/1.1\r\n\r\n")


class ResponseHeadTests(SynchronousTestCase):
    def test_reads(self) -> None:
        """Status, reason and framing."""
        head = answer(b"HTTP/1.1 404 No Such Thing", b"Content-Length: 3")
        self.assertEqual(
            (head.status, head.reason, head.content_length), (404, b"No Such Thing", 3)
        )
        self.assertTrue(head.keep_alive)
        self.assertFalse(answer(b"HTTP/1.0 200 OK").keep_alive)

    def test_which_have_a_body(self) -> None:
        """RFC 9112, 6.3."""
        self.assertTrue(answer(b"HTTP/1.1 200 OK").has_body(b"GET"))
        for line, method in (
            (b"HTTP/1.1 200 OK", b"HEAD"),
            (b"HTTP/1.1 204 No Content", b"GET"),
            (b"HTTP/1.1 304 Not Modified", b"GET"),
            (b"HTTP/1.1 103 Early Hints", b"GET"),
        ):
            self.assertFalse(answer(line).has_body(method))

    def test_upgrade(self) -> None:
        """A 101 names the protocol."""
        head = answer(b"HTTP/1.1 101 X", b"Connection: upgrade", b"Upgrade: websocket")
        self.assertEqual(head.upgrade, b"websocket")

    def test_refused(self) -> None:
        """What is malformed or ambiguous is refused."""
        for line, *fields in (
            (b"HTTP/1.1 abc OK",),
            (b"HTTP/2.0 200 OK",),
            (b"HTTP/1.1 200 OK", b"Content-Length: 1", b"Transfer-Encoding: chunked"),
            (b"HTTP/1.1 200 OK", b"Transfer-Encoding: gzip"),
            (b"HTTP/1.0 200 OK", b"Transfer-Encoding: chunked"),
            (b"HTTP/1.1 200 OK", b"Content-Length: 1", b"Content-Length: 2"),
        ):
            self.assertRaises(BadResponse, answer, line, *fields)


class FramingTests(SynchronousTestCase):
    def test_length(self) -> None:
        """A body of known length ends exactly there, however it is cut."""
        reader = LengthReader(5)
        self.assertEqual(
            (reader.feed(b"ab"), reader.rest, reader.end_of_input()), (b"ab", None, False)
        )
        self.assertEqual((reader.feed(b"cdeXY"), reader.rest), (b"cde", b"XY"))
        self.assertTrue(reader.end_of_input())
        whole = LengthReader(2)
        self.assertEqual((whole.feed(b"ab"), whole.rest), (b"ab", b""))

    def test_until_close(self) -> None:
        """A body without length ends with the connection."""
        reader = UntilCloseReader()
        self.assertEqual((reader.feed(b"ab"), reader.rest), (b"ab", None))
        self.assertTrue(reader.end_of_input())
        self.assertEqual(reader.rest, b"")

    @given(
        pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
        trailers=st.booleans(),
        rest=st.binary(max_size=5),
        cuts=st.lists(st.integers(0, 300), max_size=12),
    )
    def test_chunked_however_cut(
        self, pieces: list[bytes], trailers: bool, rest: bytes, cuts: list[int]
    ) -> None:
        """The same bytes, cut anywhere, give the same body, trailers and rest."""
        fields = [(b"x-sum", b"X-Sum", b"5")] if trailers else []
        data = b"".join(map(encode_chunk, pieces)) + encode_last_chunk(fields) + rest
        reader = ChunkedReader()
        body = b""
        after = b""
        bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
        for start, end in itertools.pairwise(bounds):
            if reader.rest is not None:
                after += data[start:end]
            else:
                self.assertFalse(reader.end_of_input())
                body += reader.feed(data[start:end])
        self.assertTrue(reader.end_of_input())
        self.assertEqual((body, reader.trailers), (b"".join(pieces), fields))
        self.assertEqual((reader.rest or b"") + after, rest)

    def test_extensions(self) -> None:
        """Chunk extensions are dropped."""
        reader = ChunkedReader()
        self.assertEqual(reader.feed(b'3;a=b;c="d e"\r\nabc\r\n0;x\r\n\r\n'), b"abc")
        self.assertEqual(reader.rest, b"")

    def test_broken_chunks(self) -> None:
        """RFC 9112, 7.1: whatever is not exactly chunked is refused, as soon as it shows."""
        for data in (
            b"x\r\n",
            b"3\nabc\r\n",
            b"3 \r\nabc\r\n",
            b" 3\r\nabc\r\n",
            b"+3\r\nabc\r\n",
            b"0x3\r\nabc\r\n",
            b"\r\n3\r\n",
            b"-1\r\n",
            b"3\r\nabcd\r\n",
            b"3\r\nabc\n",
            b"3\r\nabc\rX",
            b"1" * 16 + b"\r\n",
            b"1;" + b"x" * 5000,
            b"1;a\x00\r\nx\r\n",
            b"0\r\nbad trailer\r\n\r\n",
            b"0\r\nA: 1\nB: 2\r\n",
            b"0\r\nA: 1\n",
            b"0\r\n A: 1\r\nB",
            b"0\r\nA: " + b"x" * 17000,
        ):
            for cut in (1, 2, 3, len(data)):
                reader = ChunkedReader()
                with self.assertRaises(BadRequest, msg=(data[:40], cut)):
                    reader.feed(data[:cut])
                    reader.feed(data[cut:])

    def test_trailers(self) -> None:
        """Trailers that mean something else in a head are dropped (RFC 9110, 6.5.1)."""
        fields = parse_trailers(b"X-Sum: 1\r\nContent-Length: 5\r\nHost: x\r\n\r\n")
        self.assertEqual(fields, [(b"x-sum", b"X-Sum", b"1")])
        self.assertEqual(parse_trailers(b"\r\n"), [])
        self.assertEqual(parse_trailers(b"Connection: upgrade\r\nUpgrade: a\r\n\r\n"), [])


class ProblemTests(SynchronousTestCase):
    def test_document(self) -> None:
        """RFC 9457: a stable type, a reason, and what happened this time."""
        body = json.loads(problem_body(LineFull(5), "abc"))
        self.assertEqual(body["type"], "urn:strictproxy:problem:queue_full")
        self.assertEqual((body["status"], body["reason"]), (503, "queue_full"))
        self.assertEqual(body["instance"], "urn:strictproxy:request:abc")
        self.assertNotIn("instance", json.loads(problem_body(LineFull(5))))

    def test_fields(self) -> None:
        """Retry-After is whole seconds, rounded up, and only where it is known."""
        self.assertIn(b"Retry-After: 3\r\n", problem_fields(LineFull(5), b"", 2.1))
        self.assertFalse([f for f in problem_fields(LineFull(5), b"") if b"Retry" in f])

    def test_reason_phrases(self) -> None:
        """Unknown codes have none."""
        self.assertEqual((reason_phrase(404), reason_phrase(499)), (b"Not Found", b""))


class TimeoutsTests(SynchronousTestCase):
    def test_expires_in_order(self) -> None:
        """Members expire so long after they were last started, and not if they were stopped."""
        timeouts: Timeouts[str] = Timeouts(10.0)
        for when, name in enumerate("abcd"):
            timeouts.start(name, float(when))
        timeouts.start("a", 5.0)
        timeouts.stop("b")
        timeouts.stop("never started")
        self.assertEqual(timeouts.expire(11.9), [])
        self.assertEqual(timeouts.expire(13.0), ["c", "d"])
        self.assertEqual(len(timeouts), 1)
        self.assertEqual(timeouts.take_all(), ["a"])
        self.assertEqual(timeouts.expire(99.0), [])

    def test_never(self) -> None:
        """None means never, and keeps nothing."""
        timeouts: Timeouts[str] = Timeouts(None)
        timeouts.start("a", 0.0)
        self.assertEqual((len(timeouts), timeouts.expire(1e9)), (0, []))
