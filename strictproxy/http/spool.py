"""
Request bodies that are received whole before their request gets a slot.

So a slow uploader never holds one. Up to `memory` bytes stay in memory; from
then on all goes to an unnamed temporary file, written and read in threads, so
that a slow disk never blocks the reactor.
"""

from __future__ import annotations

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


class Spool:
    """
    One body. Its owner writes it, calls `finish`, reads it any number of times, and closes it.

    `stored` fires when all of it can be read, and fails with OSError as soon
    as it cannot be kept.

    :param memory: bytes kept in memory at most.
    :param directory: for the file; None is the system's temporary directory.
    :param pause: called when writing falls behind, and `resume` when it has caught up.
    """

    def __init__(
        self,
        memory: int,
        directory: str | None,
        pause: Callable[[], None],
        resume: Callable[[], None],
    ) -> None:
        self.size = 0
        self.stored: Deferred[None] = Deferred()
        self._memory = memory
        self._directory = directory
        self._pause = pause
        self._resume = resume
        self._pieces: list[bytes] = []
        self._pending = 0
        self._file: IO[bytes] | None = None
        self._on_disk = False
        #: a thread is at work on the file
        self._busy = False
        self._paused = False
        self._ended = False
        #: closed, or failed: nothing is kept and nobody is told any more
        self._closed = False

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
        self._settle()

    def memory(self) -> bytes:
        """Return the whole body, if it is in memory."""
        return b"".join(self._pieces)

    def read(self, position: int) -> Deferred[bytes]:
        """
        Return a piece of the body from the file; empty at its end.

        Must not be called again before it has fired.
        """
        file = self._file
        if file is None or self._closed:
            return succeed(b"")

        def seek_and_read() -> bytes:
            file.seek(position)
            return file.read(PIECE)

        self._busy = True
        return deferToThread(seek_and_read).addBoth(self._idle)

    def close(self) -> None:
        """Forget the body; `stored` does not fire any more."""
        self._closed = True
        self._pieces.clear()
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

    def _flush(self) -> None:
        """Write what has come, in one thread at a time so that it stays in order."""
        if self._busy or not self._pieces:
            return
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._pending = 0
        self._busy = True
        deferToThread(self._append, data).addBoth(self._idle).addCallbacks(
            self._written, self._failed
        )

    def _append(self, data: bytes) -> None:
        # In a thread, the only one at work on the file.
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115  # closed by close()
        self._file.write(data)
        self._file.flush()

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
