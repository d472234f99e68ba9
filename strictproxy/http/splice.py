"""
Moving large bodies inside the kernel, from one TCP connection to the other.

`os.splice` (Linux) moves bytes from a socket into a pipe and on into another
socket without copying them into Python. A `Splice` borrows two transports: it
stands in for the source's `doRead` and, while the destination is slow, for its
`doWrite`. It leaves the last byte of the body to the ordinary path, so that
the end of a body has only one way of being noticed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.tcp import Connection

SUPPORTED = hasattr(os, "splice")

#: Bodies shorter than this are not worth two system calls and a pipe.
THRESHOLD = 256 * 1024
_PIPE_SIZE = 1024 * 1024
_SET_PIPE_SIZE = getattr(fcntl, "F_SETPIPE_SZ", 1031)
#: Bytes moved in one turn of the reactor; others want their turn too.
_PER_TURN = 2 * _PIPE_SIZE
_FLAGS = getattr(os, "SPLICE_F_MOVE", 1) | getattr(os, "SPLICE_F_NONBLOCK", 2)
_KEPT_PIPES = 16

Pipe = tuple[int, int]

#: Empty pipes for the next splice: making one costs more than moving a few bytes.
_pipes: list[Pipe] = []


class Splice:
    """
    Moves `count` bytes from one transport to the other.

    Both must be plain, as `is_plain` has it. `moved` is told of bytes taken
    from the source, and `held` when the destination makes the source wait, and
    when it no longer does. When all have arrived, or on `stop`, the transports are as
    they were. A lost connection is left to its transport to find.
    """

    __slots__ = (
        "_dest",
        "_held",
        "_holding",
        "_in_pipe",
        "_left",
        "_moved",
        "_pipe",
        "_source",
        "running",
    )

    def __init__(
        self,
        source: Connection,
        dest: Connection,
        count: int,
        moved: Callable[[int], None],
        held: Callable[[bool], None],
    ) -> None:
        self._source = source
        self._dest = dest
        self._left = count
        self._moved = moved
        self._held = held
        self._holding = False
        self._in_pipe = 0
        self._pipe = _pipes.pop() if _pipes else _make_pipe()
        self.running = True
        source.doRead = self._read  # type: ignore[method-assign]  # borrowed until stop

    def stop(self) -> None:
        """Give the transports back; bytes still in the pipe are lost with it."""
        if not self.running:
            return
        self.running = False
        for transport, name in ((self._source, "doRead"), (self._dest, "doWrite")):
            transport.__dict__.pop(name, None)
        self._let_go()
        if self._in_pipe or len(_pipes) >= _KEPT_PIPES:
            for end in self._pipe:
                os.close(end)
        else:
            _pipes.append(self._pipe)

    def _read(self) -> ConnectionDone | ConnectionLost | None:
        """Stand in for the source's doRead."""
        budget = _PER_TURN
        while self.running and self._left and budget > 0 and not self._in_pipe:
            try:
                count = os.splice(
                    self._source.fileno(),
                    self._pipe[1],
                    min(self._left, _PIPE_SIZE),
                    flags=_FLAGS,
                )
            except BlockingIOError:
                return None
            except OSError:
                self.stop()
                return Connection.doRead(self._source)
            if not count:
                self.stop()
                return CONNECTION_DONE
            self._left -= count
            self._in_pipe = count
            budget -= count
            self._moved(count)
            self._flush()
        return None

    def _flush(self) -> None:
        """Empty the pipe into the destination, or wait until that is possible."""
        while self.running and self._in_pipe:
            try:
                self._in_pipe -= os.splice(
                    self._pipe[0], self._dest.fileno(), self._in_pipe, flags=_FLAGS
                )
            except BlockingIOError:
                if not self._holding:
                    self._holding = True
                    self._source.stopReading()
                    self._dest.doWrite = self._write  # type: ignore[method-assign]  # borrowed
                    self._dest.startWriting()
                    self._held(True)
                return
            except OSError:
                self.stop()
                self._dest.abortConnection()
                return
        if self.running and not self._left:
            self.stop()

    def _write(self) -> None:
        """Stand in for the destination's doWrite."""
        self._flush()
        if not self._in_pipe:
            self._let_go()

    def _let_go(self) -> None:
        """Let the source go on, if it has been held."""
        if not self._holding:
            return
        self._holding = False
        self._dest.__dict__.pop("doWrite", None)
        if self._dest.connected and not self._dest.dataBuffer:
            self._dest.stopWriting()
        if self._source.connected and not self._source.disconnecting:
            self._source.startReading()
        self._held(False)


def _make_pipe() -> Pipe:
    pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # An unprivileged user may have a lower limit; a smaller pipe works too.
    with suppress(OSError):
        fcntl.fcntl(pipe[1], _SET_PIPE_SIZE, _PIPE_SIZE)
    return pipe
