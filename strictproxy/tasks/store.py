"""
Tasks on disk, so that a restart knows of them.

SQLite in a thread of its own; whoever asks gets Deferreds. A record is written
when its task is known and taken out when the task has ended, so what is found at
the start is what was running.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

T = TypeVar("T")

#: Of the file's layout.
_VERSION = 1


class StoreError(Exception):
    """The store cannot be used; the text says which file, and why."""


@dataclass(frozen=True, slots=True)
class Record:
    """A tracked task that runs."""

    route: str
    upstream: str
    task_id: str
    host: str
    port: int
    client: str
    request_id: str
    #: seconds of the epoch
    since: float
    #: by which its pod may call back
    token: str | None = None


class ITaskStore(Protocol):
    """Where tasks are kept. In a file is one way; in Redis, for several replicas, another."""

    def load(self) -> Deferred[list[Record]]:
        """Return what was running, the oldest first. Fails with `StoreError`."""

    def add(self, record: Record) -> Deferred[None]:
        """Remember a task. Fails with `StoreError`."""

    def remove(self, record: Record) -> Deferred[None]:
        """Forget a task; it need not be there. Fails with `StoreError`."""

    def stop(self) -> None:
        """Finish what has been asked for, and close."""


class SqliteStore:
    """
    Tasks in a SQLite file.

    :param reactor: runs the callbacks of what the thread has done.
    """

    def __init__(self, directory: str, reactor: Any) -> None:
        self._path = Path(directory) / "tasks.sqlite"
        self._reactor = reactor
        # One thread: what is asked for first is done first.
        self._pool = ThreadPool(1, 1, "tasks")
        self._connection: sqlite3.Connection | None = None
        self._stopped = False
        self._pool.start()

    def load(self) -> Deferred[list[Record]]:
        """Return what was running; see `ITaskStore`."""
        return self._run(self._load)

    def add(self, record: Record) -> Deferred[None]:
        """Remember a task; see `ITaskStore`."""
        marks = ", ".join("?" for _ in fields(Record))
        statement = f"INSERT OR REPLACE INTO tracked VALUES ({marks})"
        return self._run(lambda connection: self._execute(connection, statement, astuple(record)))

    def remove(self, record: Record) -> Deferred[None]:
        """Forget a task; see `ITaskStore`."""
        statement = "DELETE FROM tracked WHERE route = ? AND task_id = ? AND host = ? AND port = ?"
        key = (record.route, record.task_id, record.host, record.port)
        return self._run(lambda connection: self._execute(connection, statement, key))

    def stop(self) -> None:
        """Finish what has been asked for, and close."""
        if self._stopped:
            return
        self._stopped = True
        self._pool.callInThread(self._close)
        self._pool.stop()

    # -- in the thread

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> Deferred[T]:
        def in_thread() -> T:
            try:
                if self._connection is None:
                    self._connection = self._open()
                return work(self._connection)
            except (sqlite3.Error, OSError) as error:
                raise StoreError(f"{self._path}: {error}") from error

        done: Deferred[T] = deferToThreadPool(self._reactor, self._pool, in_thread)
        return done

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, check_same_thread=False, timeout=1.0)
        try:
            # What has been written is there after a power cut.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise sqlite3.DatabaseError(f"its layout is {version}, of another strictproxy")
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS tracked (route TEXT, upstream TEXT, task_id TEXT,"
                    " host TEXT, port INTEGER, client TEXT, request_id TEXT, since REAL,"
                    " token TEXT, PRIMARY KEY (route, task_id, host, port))"
                )
                connection.execute(f"PRAGMA user_version = {_VERSION}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _load(self, connection: sqlite3.Connection) -> list[Record]:
        names = ", ".join(field.name for field in fields(Record))
        rows = connection.execute(f"SELECT {names} FROM tracked ORDER BY since")
        return [Record(*row) for row in rows]

    def _execute(
        self, connection: sqlite3.Connection, statement: str, values: tuple[Any, ...]
    ) -> None:
        with connection:
            connection.execute(statement, values)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
