"""
Tasks on disk, so that a restart knows of them.

SQLite in a thread of its own; whoever asks gets Deferreds. What is written at
the same time is committed at once, since it is the disk that takes its time.

On a full disk, tasks that are there must still be able to end, or they would
never make room. So the file always has free pages, and its journal its size
(PERSIST); a new detached request is turned away rather than given the last of them.

A tracked task's record is written when it is known and taken out when it has
ended, so what is found at the start is what was running. A detached request's
is written before its client hears of it, and at each change of its state.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

T = TypeVar("T")

#: Statements with their values, to be carried out together.
Work = tuple[str, tuple[Any, ...]]

#: Of the file's layout; each one has all that those before had.
_VERSION = 2
#: Pages of the file that are kept free, and a little less than what one holds, bytes.
_FREE_PAGES = 128
_PAGE = 4000
_LAYOUT = (
    "CREATE TABLE IF NOT EXISTS tracked (route TEXT, upstream TEXT, task_id TEXT,"
    " host TEXT, port INTEGER, client TEXT, request_id TEXT, since REAL,"
    " token TEXT, pod_id TEXT, PRIMARY KEY (route, task_id, host, port))",
    "CREATE TABLE IF NOT EXISTS detached (id TEXT PRIMARY KEY, seq INTEGER, document TEXT)",
)


class StoreError(Exception):
    """The store cannot be used; the text says which file, and why."""


class StoreInUse(StoreError):
    """Another process uses it."""


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
    #: its id at its pod, if that is another one
    pod_id: str | None = None


class ITaskStore(Protocol):
    """Where tasks are kept. In a file is one way; in Redis, for several replicas, another."""

    def load(self) -> Deferred[list[Record]]:
        """
        Return what was running, the oldest first.

        Fails with `StoreError`: with `StoreInUse` if it may go well a while later.
        """

    def add(self, record: Record) -> Deferred[None]:
        """Remember a task. Fails with `StoreError`."""

    def remove(self, record: Record) -> Deferred[None]:
        """Forget a task; it need not be there. Fails with `StoreError`."""

    def load_detached(self) -> Deferred[list[Mapping[str, Any]]]:
        """Return the documents of all detached requests, in order. Fails with `StoreError`."""

    def put_detached(self, document: Mapping[str, Any], *, new: bool = False) -> Deferred[None]:
        """
        Remember a detached request as it is now, by its `id`; `seq` is its place in the order.

        When this fires it is there after a power cut. Fails with `StoreError`.

        :param new: it has not been there before, and need not be if there is little room.
        """

    def remove_detached(self, task_id: str) -> Deferred[None]:
        """Forget one; it need not be there. Fails with `StoreError`."""

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
        #: what is to be written, and who waits for it
        self._work: list[tuple[Work, Deferred[None]]] = []
        #: the same, of what may not be written unless there is room for more
        self._new: list[tuple[Work, Deferred[None]]] = []
        #: commits under way
        self._commits = 0
        self._timer: IDelayedCall | None = None
        #: held for as long as the file is open: two processes would run everything twice
        self._lock: IO[bytes] | None = None
        self._pool.start()

    def load(self) -> Deferred[list[Record]]:
        """Return what was running; see `ITaskStore`."""
        return self._read(self._load)

    def add(self, record: Record) -> Deferred[None]:
        """Remember a task; see `ITaskStore`."""
        marks = ", ".join("?" for _ in fields(Record))
        statement = f"INSERT OR REPLACE INTO tracked VALUES ({marks})"
        return self._write(statement, astuple(record))

    def remove(self, record: Record) -> Deferred[None]:
        """Forget a task; see `ITaskStore`."""
        statement = "DELETE FROM tracked WHERE route = ? AND task_id = ? AND host = ? AND port = ?"
        return self._write(statement, (record.route, record.task_id, record.host, record.port))

    def load_detached(self) -> Deferred[list[Mapping[str, Any]]]:
        """Return the documents of all detached requests; see `ITaskStore`."""
        return self._read(self._load_detached)

    def put_detached(self, document: Mapping[str, Any], *, new: bool = False) -> Deferred[None]:
        """Remember a detached request; see `ITaskStore`."""
        text = json.dumps(document, separators=(",", ":"))
        return self._write(
            "INSERT OR REPLACE INTO detached VALUES (?, ?, ?)",
            (document["id"], document["seq"], text),
            new=new,
        )

    def remove_detached(self, task_id: str) -> Deferred[None]:
        """Forget one; see `ITaskStore`."""
        return self._write("DELETE FROM detached WHERE id = ?", (task_id,))

    def stop(self) -> None:
        """Finish what has been asked for, and close."""
        if self._stopped:
            return
        self._stopped = True
        self._hurry()
        self._pool.callInThread(self._close)
        self._pool.stop()

    # -- writing

    def _write(
        self, statement: str, values: tuple[Any, ...], *, new: bool = False
    ) -> Deferred[None]:
        done: Deferred[None] = Deferred()
        (self._new if new else self._work).append(((statement, values), done))
        if not self._commits and self._timer is None:
            # What else is written in this turn of the reactor comes along.
            self._timer = self._reactor.callLater(0, self._flush)
        return done

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> Deferred[T]:
        # What has been asked for first is done first.
        self._hurry()
        return self._run(work)

    def _hurry(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._flush()

    def _flush(self) -> None:
        self._timer = None
        work, self._work = self._work, []
        new, self._new = self._new, []
        self._commit(work, self._execute)
        self._commit(new, self._execute_new)

    def _commit(
        self,
        work: list[tuple[Work, Deferred[None]]],
        execute: Callable[[sqlite3.Connection, list[Work]], None],
    ) -> None:
        if not work:
            return

        def committed(result: Any) -> None:
            self._commits -= 1
            for _, done in work:
                if isinstance(result, Failure):
                    done.errback(Failure(StoreError(str(result.value))))
                else:
                    done.callback(None)
            if not self._commits and self._timer is None:
                self._flush()

        self._commits += 1
        statements = [each for each, _ in work]
        self._run(lambda connection: execute(connection, statements)).addBoth(committed)

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

    def _take_lock(self) -> None:
        if self._lock is None:
            path = self._path.with_name("lock")
            lock = path.open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise StoreInUse(f"{path}: another process has it") from None
            self._lock = lock

    def _open(self) -> sqlite3.Connection:
        self._take_lock()
        # Ids are secrets of their clients.
        os.close(os.open(self._path, os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, check_same_thread=False, timeout=1.0)
        try:
            # What has been written is there after a power cut.
            connection.execute("PRAGMA journal_mode = PERSIST")
            connection.execute("PRAGMA synchronous = FULL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise sqlite3.DatabaseError(f"its layout is {version}, of another strictproxy")
            with connection:
                if version == 1:
                    connection.execute("ALTER TABLE tracked ADD COLUMN pod_id TEXT")
                for statement in _LAYOUT:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            # A disk that is full already keeps nobody from working off what there is.
            with suppress(sqlite3.OperationalError):
                self._keep_room(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _load(self, connection: sqlite3.Connection) -> list[Record]:
        names = ", ".join(field.name for field in fields(Record))
        rows = connection.execute(f"SELECT {names} FROM tracked ORDER BY since")
        return [Record(*row) for row in rows]

    def _load_detached(self, connection: sqlite3.Connection) -> list[Mapping[str, Any]]:
        rows = connection.execute("SELECT document FROM detached ORDER BY seq").fetchall()
        try:
            return [json.loads(document) for (document,) in rows]
        except ValueError as error:
            raise sqlite3.DatabaseError(f"a detached request cannot be read: {error}") from error

    def _execute(self, connection: sqlite3.Connection, work: list[Work]) -> None:
        with connection:
            for statement, values in work:
                connection.execute(statement, values)

    def _execute_new(self, connection: sqlite3.Connection, work: list[Work]) -> None:
        self._keep_room(connection)
        self._execute(connection, work)

    def _keep_room(self, connection: sqlite3.Connection) -> None:
        """
        See to it that there are free pages in the file, and that the journal has its size.

        :raise sqlite3.OperationalError: the disk is full.
        """
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        if free >= _FREE_PAGES:
            return
        rows = [(_PAGE,)] * (2 * _FREE_PAGES)
        with connection:
            connection.execute("CREATE TABLE IF NOT EXISTS room (page BLOB)")
            connection.executemany("INSERT INTO room VALUES (zeroblob(?))", rows)
        journal = self._path.with_name(self._path.name + "-journal")
        if journal.stat().st_size < len(rows) * _PAGE:
            # What is changed goes through the journal.
            with connection:
                connection.execute("UPDATE room SET page = randomblob(?)", (_PAGE,))
        with connection:
            connection.execute("DELETE FROM room")

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
