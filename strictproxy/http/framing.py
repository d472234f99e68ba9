"""
Where a body begins and ends (RFC 9112, 6 and 7).

Readers take bytes as they arrive and give body bytes back, and in the end what
lies behind the body. They hold at most one unfinished line. Counting here
rather than in the head's parser gives exact offsets, so that pipelined bytes,
tunnels and connections handed to the kernel start where they should.
"""

from __future__ import annotations

import re
from typing import Protocol

from strictproxy.errors import BadRequest
from strictproxy.http.heads import Field, encode_fields, parse_trailers

_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?")
_MAX_CHUNK_LINE = 4096
_MAX_TRAILERS = 16 * 1024

LAST_CHUNK = b"0\r\n\r\n"


class BodyReader(Protocol):
    """A body being read."""

    #: bytes behind the body; None until it is complete
    rest: bytes | None
    trailers: list[Field]

    def feed(self, data: bytes) -> bytes:
        """
        Take what arrived, and return the body bytes in it.

        :raise BadRequest: the framing is broken. (For a response, too; its
            reader turns it into what it is there.)
        """

    def end_of_input(self) -> bool:
        """Note that nothing more will come, and return whether the body is complete."""


class LengthReader:
    """A body of known length."""

    __slots__ = ("remaining", "rest", "trailers")

    def __init__(self, length: int) -> None:
        self.remaining = length
        self.rest: bytes | None = None
        self.trailers: list[Field] = []

    def feed(self, data: bytes) -> bytes:
        """Take what arrived; see `BodyReader`."""
        size = len(data)
        if size < self.remaining:
            self.remaining -= size
            return data
        body = data if size == self.remaining else data[: self.remaining]
        self.rest = data[self.remaining :]
        self.remaining = 0
        return body

    def end_of_input(self) -> bool:
        """Report whether all of it has come."""
        return self.rest is not None


class UntilCloseReader:
    """A response body that ends with the connection."""

    __slots__ = ("rest", "trailers")

    def __init__(self) -> None:
        self.rest: bytes | None = None
        self.trailers: list[Field] = []

    def feed(self, data: bytes) -> bytes:
        """Take what arrived; all of it is body."""
        return data

    def end_of_input(self) -> bool:
        """Take the end of input for the end of the body."""
        self.rest = b""
        return True


class ChunkedReader:
    """A chunked body (RFC 9112, 7.1); extensions are dropped, trailers kept."""

    __slots__ = ("_buffer", "_in_trailers", "_remaining", "rest", "trailers")

    def __init__(self) -> None:
        self._buffer = b""
        #: bytes left of the current chunk and its CRLF; 0 where a size is due
        self._remaining = 0
        self._in_trailers = False
        self.rest: bytes | None = None
        self.trailers: list[Field] = []

    def feed(self, data: bytes) -> bytes:
        """Take what arrived; see `BodyReader`."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        pieces: list[bytes] = []
        position = 0
        while True:
            if self._in_trailers:
                self._read_trailers(data[position:])
                break
            if self._remaining:
                position = self._read_chunk(data, position, pieces)
                if self._remaining:
                    break
            end = data.find(b"\r\n", position)
            if end < 0:
                self._keep_line(data[position:])
                break
            position = self._read_size(data, position, end)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_size(self, data: bytes, start: int, end: int) -> int:
        match = _CHUNK_LINE.fullmatch(data, start, end)
        if match is None or end - start > _MAX_CHUNK_LINE:
            raise BadRequest("a chunk's size line is not valid")
        size = int(match[1], 16)
        if size:
            self._remaining = size + 2
        else:
            self._in_trailers = True
        return end + 2

    def _read_chunk(self, data: bytes, start: int, pieces: list[bytes]) -> int:
        """Take what there is of the current chunk; return the position behind it."""
        available = len(data) - start
        body = min(available, self._remaining - 2)
        if body > 0:
            pieces.append(data[start : start + body])
            self._remaining -= body
            start += body
        if self._remaining > 2 or start == len(data):
            return start
        tail = data[start : start + self._remaining]
        if not b"\r\n"[2 - self._remaining :].startswith(tail):
            raise BadRequest("a chunk is longer than its size says")
        self._remaining -= len(tail)
        return start + len(tail)

    def _keep_line(self, line: bytes) -> None:
        # A bare LF would never end the line; refuse it now rather than by time-out.
        if len(line) > _MAX_CHUNK_LINE or b"\n" in line:
            raise BadRequest("a chunk's size line is not valid")
        if line and not _CHUNK_LINE.fullmatch(line.removesuffix(b"\r")):
            raise BadRequest("a chunk's size line is not valid")
        self._buffer = line

    def _read_trailers(self, data: bytes) -> None:
        if data.startswith(b"\r\n"):
            self.rest = data[2:]
            return
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > _MAX_TRAILERS:
                raise BadRequest("the trailers are too large")
            if data not in (b"", b"\r"):
                # Malformed lines are refused as soon as they can be seen.
                lines = data.rpartition(b"\r\n")[0]
                parse_trailers(lines + b"\r\n\r\n" if lines else b"\r\n")
                if b"\n" in data.rpartition(b"\r\n")[2]:
                    raise BadRequest("in the trailers: a bare LF")
            self._buffer = data
            return
        self.trailers = parse_trailers(data[: end + 4])
        self.rest = data[end + 4 :]

    def end_of_input(self) -> bool:
        """Report whether all of it has come."""
        return self.rest is not None


def encode_chunk(data: bytes) -> bytes:
    """Return `data`, which must not be empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_last_chunk(trailers: list[Field]) -> bytes:
    """Return what ends a chunked body."""
    if not trailers:
        return LAST_CHUNK
    return b"0\r\n" + b"".join(encode_fields(trailers)) + b"\r\n"
