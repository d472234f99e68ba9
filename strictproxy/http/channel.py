"""
The client's side: one connection, its requests one after another.

`ServerChannel` parses and streams; each request on it is a `ClientRequest`,
which is what a resource's `render` gets. Bodies are never held whole: until
the handler opens the body, up to `read_ahead` bytes are kept and then the
client is paused; after that the bytes flow as they arrive. Requests that are
pipelined wait as bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IPushProducer,
    ITransport,
)
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.tcp import Connection
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from strictproxy.errors import (
    ClientTimeout,
    HeadersTooLarge,
    ProxyError,
    TargetTooLong,
    TooManyConnections,
)
from strictproxy.http import splice
from strictproxy.http.framing import (
    BodyReader,
    ChunkedReader,
    LengthReader,
)
from strictproxy.http.heads import (
    END_OF_HEAD,
    check_partial_request,
    parse_request_head,
)
from strictproxy.http.peer import Peer
from strictproxy.http.problems import problem_body, problem_fields, reason_phrase
from strictproxy.http.request import ClientRequest
from strictproxy.http.tls import is_secure
from strictproxy.http.transport import (
    IStreamTransport,
    abort,
    close,
    end_output,
    is_plain,
    write_now,
)

if TYPE_CHECKING:
    from strictproxy.http.site import StrictSite

_log = Logger()

#: Pipelined bytes held while a request is being answered; then the client is paused.
_MAX_PIPELINED = 64 * 1024


@implementer(IPushProducer, IHalfCloseableProtocol)
class ServerChannel(TwistedProtocol):
    """
    One client connection.

    :param surplus: there are too many: its first request is refused.
    """

    transport: IStreamTransport

    def __init__(self, site: StrictSite, *, surplus: bool = False) -> None:
        self.site = site
        self._surplus = surplus
        self.keep_alive = True
        self._peer: Peer | None = None
        self._buffer = b""
        self._request: ClientRequest | None = None
        self._reader: BodyReader | None = None
        #: an upgrade has taken place: bytes have no framing any more
        self._switched = False
        self._parsing = False
        self._paused = False
        self._lingering = False
        self._splice: splice.Splice | None = None
        self._lost = False

    @property
    def peer(self) -> Peer:
        """Who is at the other end; not known before the first bytes behind a PROXY protocol."""
        if self._peer is None:
            address = getattr(self.transport.getPeer(), "host", "")
            secure = is_secure(self.transport)
            self._peer = Peer(address, self.site.is_trusted(address), secure)
        return self._peer

    # -- the connection

    def connectionMade(self) -> None:
        """Begin to wait for a request."""
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self, True)
        self.site.channels.add(self)
        self.site.header_timeouts.start(self, self.site.now())

    def connectionLost(self, reason: Failure | None = None) -> None:
        """Tell the handler that its client is gone."""
        self._lost = True
        self._stop_splice()
        self.site.forget(self)
        self._buffer = b""
        self._reader = None
        request, self._request = self._request, None
        if request is not None:
            request.channel = None
            if request.handler is not None:
                request.handler.client_gone()

    def readConnectionLost(self) -> None:
        """Take a half-closed connection for a closed one, but after an upgrade."""
        request = self._request
        if self._switched and request is not None and request.handler is not None:
            request.handler.client_end([])
        else:
            # Some clients half-close and still read. But most that close for
            # good look just the same, and a slot is worth more.
            self.abort()

    def writeConnectionLost(self) -> None:
        """Our own half-close is complete; nothing to do."""

    def abort(self) -> None:
        """Close without waiting for what is still to be written."""
        abort(self.transport)

    def close(self) -> None:
        """Close once everything written has been sent."""
        # A paused producer would keep the transport from closing.
        self.transport.unregisterProducer()
        close(self.transport)

    # -- writing

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""
        if not self._lost:
            write_now(self.transport, data)

    def pauseProducing(self) -> None:
        """Pass on that the client reads too slowly."""
        if self._request is not None and self._request.handler is not None:
            self._request.handler.client_full()

    def resumeProducing(self) -> None:
        """Pass on that the client has caught up."""
        if self._request is not None and self._request.handler is not None:
            self._request.handler.client_drained()

    def stopProducing(self) -> None:
        """Do nothing: connectionLost follows."""

    # -- reading

    def pause_reading(self) -> None:
        """Read nothing for a while; hang-ups are noticed all the same."""
        if not self._paused and not self._lost:
            self._paused = True
            self.site.body_timeouts.stop(self)
            self.transport.pauseProducing()
            self.site.hangups.watch(self)

    def resume_reading(self) -> None:
        """Read again."""
        if self._paused and not self._lost:
            self._paused = False
            self.site.hangups.unwatch(self)
            self.expect_body()
            self.transport.resumeProducing()

    def splice_to(self, dest: ITransport) -> None:
        """See `ClientRequest.splice_to`."""
        reader = self._reader
        if (
            splice.SUPPORTED
            and isinstance(reader, LengthReader)
            and reader.remaining > splice.THRESHOLD
            and is_plain(dest)
            and isinstance(self.transport, Connection)
            and not self.transport.TLS
        ):

            def note(count: int) -> None:
                reader.remaining -= count
                self.expect_body()

            def held(waits: bool) -> None:
                if waits:
                    self.site.body_timeouts.stop(self)
                elif not self._lost:
                    self.expect_body()

            to = cast(Connection, dest)
            self._splice = splice.Splice(self.transport, to, reader.remaining - 1, note, held)

    def _stop_splice(self) -> None:
        if self._splice is not None:
            self._splice.stop()
            self._splice = None

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the client."""
        if self._lingering:
            pass
        elif self._switched:
            if self._request is not None and self._request.handler is not None:
                self._request.handler.client_data(data)
        elif self._reader is not None:
            self._read_body(self._reader, data)
        elif self._request is not None:
            self._buffer += data
            if len(self._buffer) > _MAX_PIPELINED:
                self.pause_reading()
        else:
            if self._buffer:
                data = self._buffer + data
            else:
                self.site.keepalive_timeouts.stop(self)
                self.site.header_timeouts.start(self, self.site.now())
            self._buffer = data
            if self._surplus:
                self.refuse(TooManyConnections("no more connections are taken at the moment"))
            else:
                self._read_requests()

    def _read_requests(self) -> None:
        """Start every request whose head is in the buffer, one after another."""
        if self._parsing:
            return
        self._parsing = True
        try:
            while self._buffer and self._request is None and self._takes_requests():
                # RFC 9112, 2.2: empty lines before a request are ignored.
                while self._buffer.startswith(b"\r\n"):
                    self._buffer = self._buffer[2:]
                end = self._buffer.find(END_OF_HEAD)
                if end < 0:
                    self._check_partial()
                    break
                head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
                self._start(head)
        except ProxyError as error:
            self.refuse(error)
        finally:
            self._parsing = False

    def _takes_requests(self) -> bool:
        return not (self._lost or self._lingering or self._switched)

    def _check_partial(self) -> None:
        limits = self.site.limits
        if len(self._buffer) > limits.target and b"\r\n" not in self._buffer[: limits.target + 32]:
            raise TargetTooLong(f"the target is longer than {limits.target} bytes")
        if len(self._buffer) > limits.size:
            raise HeadersTooLarge(f"the headers are longer than {limits.size} bytes")
        if self._buffer:
            check_partial_request(self._buffer)

    def _start(self, data: bytes) -> None:
        site = self.site
        if len(data) > site.limits.size:
            raise HeadersTooLarge(f"the headers are longer than {site.limits.size} bytes")
        head = parse_request_head(data, site.limits)
        site.header_timeouts.stop(self)
        self.keep_alive = head.keep_alive and not site.closing
        request = self._request = ClientRequest(self, head, site.max_body)
        if head.chunked:
            self._reader = ChunkedReader()
        elif head.content_length:
            self._reader = LengthReader(head.content_length)
        if not head.expects_continue:
            # Else the client waits for the pod's 100, and it waits for a slot.
            self.expect_body()
        try:
            request.limit_body(site.max_body)
            # It is a leaf and does its own routing: nothing to walk through.
            site.resource.render(request)
        except ProxyError as error:
            request.fail(error)
        except Exception:
            _log.failure("a resource failed")
            request.fail(ProxyError("the proxy failed; its log has more"))
        if self._reader is not None and self._buffer:
            data, self._buffer = self._buffer, b""
            self._read_body(self._reader, data)

    def expect_body(self) -> None:
        """Begin to watch that the body keeps coming."""
        if self._reader is not None and not self._paused:
            self.site.body_timeouts.start(self, self.site.now())

    def _read_body(self, reader: BodyReader, data: bytes) -> None:
        request = self._request
        assert request is not None
        try:
            body = reader.feed(data)
            if body:
                request.body_received(body, self.site.read_ahead)
        except ProxyError as error:
            self._body_failed(request, error)
            return
        if reader is not self._reader:
            return  # the handler ended the exchange meanwhile
        if reader.rest is None:
            self.expect_body()
            return
        self._reader = None
        self.site.body_timeouts.stop(self)
        self._buffer = reader.rest
        request.body_complete(reader.trailers)

    def _body_failed(self, request: ClientRequest, error: ProxyError) -> None:
        """Nothing behind a broken body can be trusted: answer, then close."""
        self.keep_alive = False
        handler = request.handler
        if handler is not None:
            handler.client_failed(error)
        else:
            request.fail(error)

    # -- the end of a request

    def request_done(self, request: ClientRequest) -> None:
        """Go on to the next request, or close."""
        self._request = None
        self._stop_splice()
        if self._reader is not None:
            # The answer came before the body did. RFC 9112, 9.6: to close at
            # once could make the kernel drop the answer, so read on for a while.
            self._reader = None
            self._linger()
        elif not self.keep_alive:
            self._linger() if self._buffer else self.close()
        else:
            if self._paused:
                self.resume_reading()
            if self._buffer:
                self.site.header_timeouts.start(self, self.site.now())
                self._read_requests()
            else:
                self.site.keepalive_timeouts.start(self, self.site.now())

    def refuse(self, error: ProxyError) -> None:
        """Answer something that is no request, and close."""
        self.keep_alive = False
        self._buffer = b""
        body = problem_body(error)
        lines = problem_fields(error, body)
        start = b"HTTP/1.1 %d %b\r\n" % (error.status, reason_phrase(error.status))
        self.write(b"".join([start, *lines, b"Connection: close\r\n\r\n", body]))
        self._linger()
        self.site.refused(self, error)

    def _linger(self) -> None:
        """Send the rest, then wait for the client to close, for a moment."""
        if self._lost:
            return
        self._lingering = True
        self._buffer = b""
        self.site.body_timeouts.stop(self)
        self.site.header_timeouts.stop(self)
        self.site.linger_timeouts.start(self, self.site.now())
        self.resume_reading()
        self.transport.unregisterProducer()
        end_output(self.transport)

    def timed_out(self) -> None:
        """Give up waiting for the rest of a head or body."""
        if self._request is not None:
            self._body_failed(self._request, ClientTimeout("the body stopped coming"))
        elif self._buffer:
            self.refuse(ClientTimeout("the request's head did not arrive in time"))
        else:
            self.close()

    def switch(self) -> None:
        """Take bytes without framing from now on; those that have come already are the first."""
        self._switched = True
        self._reader = None
        self.site.body_timeouts.stop(self)
        data, self._buffer = self._buffer, b""
        request = self._request
        if data and request is not None and request.handler is not None:
            request.handler.client_data(data)
