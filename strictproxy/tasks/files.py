"""
The files of detached requests: a folder of bodies, and one of results.

Named by the ids of their tasks. Whether a file counts is the store's business:
one that no task knows of is left over from a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from strictproxy.http.spool import StoredBody


class TaskFiles:
    """The files below a directory. Everything here blocks, and is for threads."""

    def __init__(self, directory: str) -> None:
        self._bodies = Path(directory) / "bodies"
        self._results = Path(directory) / "results"

    def prepare(self, bodies: Iterable[str], results: Iterable[str]) -> None:
        """
        Make the folders, and remove all files but those of these tasks.

        :raise OSError: that is not possible.
        """
        for folder, known in ((self._bodies, set(bodies)), (self._results, set(results))):
            folder.mkdir(mode=0o700, exist_ok=True)
            for path in folder.iterdir():
                if path.name not in known:
                    path.unlink(missing_ok=True)
            _sync(folder.parent)

    def create_body(self, task_id: str) -> IO[bytes]:
        """Open a new file for a body; it will be there after a power cut."""
        return _create(self._bodies / task_id)

    def create_result(self, task_id: str) -> IO[bytes]:
        """Open a new file for a result, instead of one that there may be."""
        return _create(self._results / task_id)

    def body(self, task_id: str, size: int) -> StoredBody:
        """Return a task's body, to be read."""
        path = self._bodies / task_id
        return StoredBody(size, lambda: path.open("rb"))

    def result(self, task_id: str, size: int) -> StoredBody:
        """Return a task's result, to be read."""
        path = self._results / task_id
        return StoredBody(size, lambda: path.open("rb"))

    def remove_body(self, task_id: str) -> None:
        """Remove a body, if there is one."""
        (self._bodies / task_id).unlink(missing_ok=True)

    def remove(self, task_id: str) -> None:
        """Remove whatever there is of a task."""
        self.remove_body(task_id)
        (self._results / task_id).unlink(missing_ok=True)


def _create(path: Path) -> IO[bytes]:
    file = path.open("w+b")
    try:
        _sync(path.parent)
    except BaseException:
        file.close()
        raise
    return file


def _sync(folder: Path) -> None:
    """Let the names in a folder be there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
