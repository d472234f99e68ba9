"""Tasks on disk: what runs is known after a restart, and its slots are held before all else."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import TestCase

from strictproxy.config.file import ConfigFile
from strictproxy.scheduling import Address, Lease, Scheduler
from strictproxy.service import ProxyService
from strictproxy.tasks.store import Record, SqliteStore, StoreError, StoreInUse
from tests.harness import Wire, response
from tests.test_admin import AdminTestCase

reactor: Any = _reactor

ONE = Record("submit", "u", "t1", "10.0.0.1", 80, "192.0.2.1", "r1", 1.5, "token")
TWO = Record("submit", "u", "t2", "fd00::1", 80, "192.0.2.1", "r2", 1.0, None)


class SqliteStoreTests(TestCase):
    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()

    def store(self) -> SqliteStore:
        store = SqliteStore(str(self.folder), reactor)
        self.addCleanup(store.stop)
        return store

    async def test_keeps(self) -> None:
        """What was added and not removed is there the next time, the oldest first."""
        store = self.store()
        self.assertEqual(await store.load(), [])
        await store.add(ONE)
        await store.add(TWO)
        await store.add(ONE)
        store.stop()
        store = self.store()
        self.assertEqual(await store.load(), [TWO, ONE])
        await store.remove(TWO)
        await store.remove(TWO)
        self.assertEqual(await store.load(), [ONE])

    async def test_no_store(self) -> None:
        """Folders that are missing and files that are none are told, with their names."""
        store = SqliteStore(str(self.folder / "none"), reactor)
        self.addCleanup(store.stop)
        with self.assertRaisesRegex(StoreError, "none/tasks.sqlite: .*No such file"):
            await store.load()
        store.stop()
        (self.folder / "tasks.sqlite").write_bytes(b"no database" * 1000)
        with self.assertRaisesRegex(StoreError, "file is not a database"):
            await self.store().load()

    async def test_detached(self) -> None:
        """Documents are there as they were put last, in the order of their numbers."""
        store = self.store()
        for number, task_id in ((2, "b"), (1, "a"), (3, "c")):
            await store.put_detached({"id": task_id, "seq": number, "x": "\xff\u20ac"})
        both = [
            store.put_detached({"id": "a", "seq": 1, "state": "done"}), store.remove_detached("b"),
        ]  # fmt: skip
        for done in both:
            await done
        await store.remove_detached("nobody")
        store.stop()
        self.assertEqual((self.folder / "tasks.sqlite").stat().st_mode & 0o777, 0o600)
        store = self.store()
        self.assertEqual(
            await store.load_detached(),
            [{"id": "a", "seq": 1, "state": "done"}, {"id": "c", "seq": 3, "x": "\xff\u20ac"}],
        )

    async def test_stop_writes(self) -> None:
        """What was asked for before it stops is done."""
        store = self.store()
        await store.load()
        done = [store.put_detached({"id": f"{n}", "seq": n}) for n in range(5)]
        store.stop()
        for each in done:
            await each
        self.assertEqual(len(await self.store().load_detached()), 5)

    async def test_in_use(self) -> None:
        """A second process cannot have it, until the first ends."""
        first, second = self.store(), self.store()
        await first.load()
        with self.assertRaisesRegex(StoreInUse, "lock: another process has it"):
            await second.load()
        first.stop()
        self.assertEqual(await second.load(), [])

    async def test_unreadable_document(self) -> None:
        """A document that is none is told."""
        store = self.store()
        await store.load()
        await store._write("INSERT INTO detached VALUES ('a', 1, '{')", ())
        with self.assertRaisesRegex(StoreError, "detached request cannot be read"):
            await store.load_detached()

    async def test_of_another_version(self) -> None:
        """A layout that is not ours is left alone."""
        connection = sqlite3.connect(self.folder / "tasks.sqlite")
        connection.execute("PRAGMA user_version = 99")
        connection.close()
        with self.assertRaisesRegex(StoreError, "its layout is 99"):
            await self.store().load()

    async def fill_the_disk(self, store: SqliteStore) -> None:
        def limit(connection: sqlite3.Connection) -> None:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")

        await store._run(limit)

    async def test_disk_full(self) -> None:
        """What cannot be written fails, and what was there stays."""
        store = self.store()
        await store.add(ONE)
        await self.fill_the_disk(store)
        with self.assertRaisesRegex(StoreError, "disk is full"):
            for number in range(1000):
                await store.add(
                    Record("r", "u", f"{number}" * 50, "h", 1, "c" * 9000, "r", float(number), None)
                )
        self.assertIn(ONE, await store.load())

    async def test_disk_full_for_new_ones(self) -> None:
        """New requests are turned away while those that are there can still change, and end."""
        store = self.store()
        documents = [{"id": f"{n}", "seq": n, "state": "queued", "x": "x" * 500} for n in range(50)]
        for document in documents:
            await store.put_detached(document, new=True)
        await self.fill_the_disk(store)
        turned_away = 0
        for number in range(50, 1000):
            try:
                await store.put_detached(
                    {"id": f"{number}", "seq": number, "x": "x" * 3000}, new=True
                )
            except StoreError:
                turned_away += 1
        self.assertGreater(turned_away, 500)
        store.stop()
        store = self.store()
        await self.fill_the_disk(store)
        for state in ("running", "done"):
            for document in documents:
                await store.put_detached({**document, "state": state, "lines": "y" * 1500})
        found = await store.load_detached()
        self.assertEqual([each["state"] for each in found[:50]], ["done"] * 50)
        journal = self.folder / "tasks.sqlite-journal"
        self.assertGreater(journal.stat().st_size, 500_000)


class AdoptTests(TestCase):
    def test_adopt(self) -> None:
        """A slot in use counts before its pod is known, afterwards, and above the limit."""
        pod = Address("10.0.0.1", 80)
        scheduler = Scheduler(1, queue_size=9, queue_timeout=None, no_pods_timeout=30, now=0.0)
        leases = [scheduler.adopt("r", pod, 0.0, None) for _ in range(2)]
        self.assertEqual(scheduler.state().running, 2)
        scheduler.set_pods([pod], 1.0)
        waiting = scheduler.acquire("r", 2.0)
        assert isinstance(waiting, Deferred)
        scheduler.release(leases[0], 3.0)
        self.assertNoResult(waiting)
        scheduler.release(leases[1], 4.0)
        self.assertIsInstance(self.successResultOf(waiting), Lease)
        scheduler.adopt("r", Address("10.0.0.9", 80), 5.0, None)
        self.assertEqual(len(scheduler.state().pods), 2)


class RestartTests(AdminTestCase):
    def config(self, folder: Path) -> str:
        return f"tasks: {{directory: {folder}}}\n"

    async def begin(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        await self.start(more=self.config(self.folder))
        self.path.write_text(
            self.path.read_text().replace(
                "{prefix: /, name: all, upstream: u}",
                "{path: /submit, name: submit, upstream: u, task: {id: {json: /id},"
                " poll: {path: '/status/{id}', every: 50ms}, done: {json: /s, in: [ok]},"
                " related: ['/result/{id}']}}, {prefix: /, name: all, upstream: u}",
            )
        )
        await self.service.reload()

    async def arrival(self, part: bytes) -> Wire:
        found: list[Wire] = []

        def look() -> bool:
            wires = [wire for pod in self.pods for wire in pod.connections if not wire.closed]
            found[:] = [wire for wire in wires if part in wire.received]
            return bool(found)

        await self.until(look)
        return found[0]

    async def submit(self, task_id: str) -> Address:
        client = await self.client("/submit")
        wire = await self.arrival(b"GET /submit")
        wire.take()
        wire.send(response(b'{"id": "%b"}' % task_id.encode()))
        await client.has(b"id")
        (address,) = [t.address for t in self.service.proxy.tasks if t.task_id == task_id]
        return address

    async def restart(self) -> None:
        """What a crash leaves: nothing is told to anybody, a new process begins."""
        old = self.service
        store: Any = old.proxy.tasks.store
        self.assertEqual(len(await store.load()), len(old.proxy.tasks))
        await old.stopService()
        file = ConfigFile(self.path)
        self.service = ProxyService(file.read(), reactor, file)
        self.patch(self.service, "_take_signals", lambda: None)
        self.service.startService()
        await self.service.started
        self.traffic, self.admin = self.service.addresses()

    async def test_restart(self) -> None:
        """Tasks hold their slots again, are asked about, and end; calls about them find them."""
        await self.begin()
        self.path.write_text(self.path.read_text() + "drain_timeout: 1ms\n")
        await self.service.reload()
        first, second = await self.submit("t1"), await self.submit("t2")
        self.assertNotEqual(first, second)
        await self.restart()
        upstream = self.service.upstreams["u"]
        self.assertEqual(upstream.state().running, 2)
        waiting = await self.client("/work")
        await self.until(lambda: upstream.state().waiting == 1)
        client = await self.client("/result/t2")
        wire = await self.arrival(b"GET /result/t2 ")
        self.assertIn(wire, next(p for p in self.pods if p.address == second).connections)
        wire.take()
        wire.send(response(b"not yet"))
        await client.has(b"not yet")
        wire = await self.arrival(b"GET /status/t1 ")
        wire.take()
        wire.send(response(b'{"s": "ok"}'))
        wire = await self.arrival(b"GET /work ")
        self.assertIn(wire, next(p for p in self.pods if p.address == first).connections)
        wire.send(response(b"done"))
        await waiting.has(b"done")
        store: Any = self.service.proxy.tasks.store
        self.assertEqual([each.task_id for each in await store.load()], ["t2"])

    async def test_route_is_gone(self) -> None:
        """Tasks of a route that a new configuration does not have are dropped."""
        await self.begin()
        self.path.write_text(self.path.read_text() + "drain_timeout: 1ms\n")
        await self.service.reload()
        await self.submit("t1")
        self.path.write_text(self.path.read_text().replace("name: submit", "name: other"))
        await self.restart()
        self.assertEqual(self.service.upstreams["u"].state().running, 0)
        store: Any = self.service.proxy.tasks.store
        self.assertEqual(await store.load(), [])

    async def test_broken_store(self) -> None:
        """A store that cannot be read keeps the proxy from starting, and says so."""
        folder = Path(self.mktemp())
        folder.mkdir()
        (folder / "tasks.sqlite").write_bytes(b"no database" * 1000)
        await self.start()
        self.path.write_text(self.path.read_text() + self.config(folder))
        with self.assertRaisesRegex(Exception, "cannot change while the proxy runs"):
            await self.service.reload()
        file = ConfigFile(self.path)
        service = ProxyService(file.read(), reactor, file)
        with self.assertRaisesRegex(StoreError, "not a database"):
            assert service.config.tasks is not None
            await service.keeper.start(service.config.tasks, service.config.routes, {})
        service._parts.stop()

    async def test_failing_store(self) -> None:
        """A disk that is full later on stops no task; the log tells."""
        await self.begin()
        store: Any = self.service.proxy.tasks.store
        self.patch(store, "add", lambda record: fail(StoreError("disk is full")))
        self.patch(store, "remove", lambda record: succeed(None))
        await self.submit("t1")
        wire = await self.arrival(b"GET /status/t1 ")
        wire.send(response(b'{"s": "ok"}'))
        await self.until(lambda: not len(self.service.proxy.tasks))
