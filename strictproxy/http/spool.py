"""
Bodies that are kept, in memory or in a file, and read piece by piece.

A spool receives a body whole before its request gets a slot, so that a slow
uploader never holds one. Files are written and read in threads, so that a slow
disk never blocks the reactor.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import IO, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

_T = TypeVar("_T")

#: Bytes waiting to be written to the file at which the client is paused.
_MAX_PENDING = 1024 * 1024
#: Bytes read from the file at once.
PIECE = 256 * 1024


class StoredBody:
    """
    A body that is there, whole. Its owner reads it any number of times, and closes it.

    :param size: in bytes; nothing is opened for an empty one.
    :param open_file: opens its file, in a thread, when it is read; raises OSError.
    """

    def __init__(self, size: int, open_file: Callable[[], IO[bytes]]) -> None:
        self.size = size
        self._open_file = open_file
        self._file: IO[bytes] | None = None
        #: a thread is at work on the file
        self._busy = False
        #: closed, or failed: nothing is kept and nobody is told any more
        self._closed = False
        self._then: Callable[[], None] | None = None

    @property
    def in_memory(self) -> bool:
        """Whether no file is needed."""
        return not self.size

    def memory(self) -> bytes:
        """Return the whole body, if it is in memory."""
        return b""

    def read(self, position: int, size: int = PIECE) -> Deferred[bytes]:
        """
        Return a piece of the body from the file; empty at its end.

        Must not be called again before it has fired. Fails with OSError.
        """
        if self._closed or self.in_memory:
            return succeed(b"")

        def seek_and_read() -> bytes:
            if self._file is None:
                self._file = self._open_file()
            self._file.seek(position)
            return self._file.read(size)

        self._busy = True
        return deferToThread(seek_and_read).addBoth(self._idle)

    def close(self, then: Callable[[], None] | None = None) -> None:
        """
        Forget the body.

        :param then: called when no thread is at work on the file any more.
        """
        self._closed = True
        self._then = then
        if not self._busy:
            self._close_file()

    def _idle(self, result: _T) -> _T:
        """Note that the thread is done with the file."""
        self._busy = False
        if self._closed:
            self._close_file()
        return result

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
        then, self._then = self._then, None
        if then is not None:
            then()


class Spool(StoredBody):
    """
    A body that is being received. Its owner writes it, calls `finish`, and closes it.

    `stored` fires when all of it can be read, and fails with OSError as soon
    as it cannot be kept.

    :param memory: bytes kept in memory at most.
    :param pause: called when writing falls behind, and `resume` when it has caught up.
    :param open_file: opens the file for the rest; an unnamed temporary one if not given.
    :param durable: once it is stored, it is there after a power cut.
    """

    def __init__(
        self,
        memory: int,
        pause: Callable[[], None],
        resume: Callable[[], None],
        open_file: Callable[[], IO[bytes]] = tempfile.TemporaryFile,
        *,
        durable: bool = False,
    ) -> None:
        super().__init__(0, open_file)
        self.stored: Deferred[None] = Deferred()
        self._memory = memory
        self._pause = pause
        self._resume = resume
        self._durable = durable
        self._pieces: list[bytes] = []
        self._pending = 0
        self._on_disk = False
        self._paused = False
        self._ended = False

    @property
    def in_memory(self) -> bool:
        """Whether no file was needed."""
        return not self._on_disk

    def write(self, data: bytes) -> None:
        """Take more of the body."""
        if self._closed:
            return
        self.size += len(data)
        self._pieces.append(data)
        self._pending += len(data)
        if self.size > self._memory:
            self._on_disk = True
            if self._pending > _MAX_PENDING and not self._paused:
                self._paused = True
                self._pause()
            self._flush()

    def finish(self) -> None:
        """Note the end of the body; `stored` fires when it has been written."""
        self._ended = True
        self._flush()
        self._settle()

    def memory(self) -> bytes:
        """Return the whole body, if it is in memory."""
        return b"".join(self._pieces)

    def close(self, then: Callable[[], None] | None = None) -> None:
        """Forget the body; `stored` does not fire any more."""
        self._pieces.clear()
        super().close(then)

    def _flush(self) -> None:
        """Write what has come, in one thread at a time so that it stays in order."""
        if self._busy or not self._on_disk:
            return
        last = self._ended and self._durable
        if not self._pieces and not last:
            return
        if last:
            self._durable = False  # will be
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._pending = 0
        self._busy = True
        deferToThread(self._append, data, last).addBoth(self._idle).addCallbacks(
            self._written, self._failed
        )

    def _append(self, data: bytes, sync: bool) -> None:
        # In a thread, the only one at work on the file.
        if self._file is None:
            self._file = self._open_file()
        self._file.write(data)
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def _failed(self, failure: Failure) -> None:
        if not self._closed:
            self.close()
            self.stored.errback(failure)

    def _written(self, _result: None) -> None:
        if self._closed:
            return
        self._flush()
        if self._paused and self._pending <= _MAX_PENDING:
            self._paused = False
            self._resume()
        self._settle()

    def _settle(self) -> None:
        """Tell the owner if everything has been written."""
        if self._ended and not self._busy and not self._closed and not self.stored.called:
            self.stored.callback(None)
