"""Detached requests: what is on the disk after a crash, and when it is full."""

from __future__ import annotations

import contextlib  # not from it: trial takes a `suppress` of the module for its own
import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, fail

from strictproxy.config.file import ConfigFile
from strictproxy.errors import Cancelled
from strictproxy.service import ProxyService
from strictproxy.tasks.store import SqliteStore, StoreError
from tests.harness import response
from tests.test_detached import ASYNC, DetachedTestCase

reactor: Any = _reactor


class CrashTests(DetachedTestCase):
    """What a crash leaves: the disk as it is at some moment, and nothing told to anybody."""

    async def crash(self) -> None:
        """Copy the disk as it is, stop the process, and begin another with the copy."""
        copy, lock = Path(self.mktemp()), shutil.ignore_patterns("lock")

        def copy_file(source: str, target: str) -> None:
            with contextlib.suppress(
                FileNotFoundError
            ):  # it is of a task that has ended, and was removed
                shutil.copyfile(source, target)

        store: Any = self.detached.store
        # In the store's own thread: the copy of a file that is being written would be torn.
        await store._run(lambda _: shutil.copytree(self.folder, copy, False, lock, copy_file))
        await self.service.stopService()
        self.path.write_text(self.path.read_text().replace(str(self.folder), str(copy)))
        self.folder = copy
        await self.begin_service()

    async def two_run_two_wait(self) -> list[str]:
        locations = [await self.submit(f"/{n}") for n in range(4)]
        for number in range(2):
            await self.arrival(b" /%d " % number)  # that a pod has it is on the disk by then
        return locations

    async def answer(self, number: int) -> None:
        wire = await self.arrival(b" /%d " % number)
        wire.take()
        wire.send(response(b"answer %d" % number))

    async def results(self, locations: list[str]) -> list[bytes]:
        found = []
        for location in locations:
            answer = await self.say("GET", location + "/result", "Prefer: wait=10")
            found.append(answer.received.rpartition(b"\r\n")[2])
        return found

    async def test_interrupted(self) -> None:
        """What ran is interrupted, what waited runs in its order, what was done is there."""
        await self.begin()
        done = await self.submit("/9")
        await self.answer(9)
        await self.until_state(done, "done")
        locations = await self.two_run_two_wait()
        (self.folder / "bodies" / "left").write_bytes(b"over")
        (self.folder / "results" / "left").write_bytes(b"over")
        await self.crash()
        for location in locations[:2]:
            document = await self.until_state(location, "failed")
            self.assertEqual(document["reason"], "interrupted")
        await self.answer(2)
        await self.answer(3)
        self.assertEqual(
            await self.results([done, *locations[2:]]), [b"answer 9", b"answer 2", b"answer 3"]
        )
        await self.until(lambda: not list((self.folder / "bodies").iterdir()))
        self.assertEqual(len(list((self.folder / "results").iterdir())), 3)

    async def test_holds_slots(self) -> None:
        """A pod may still be at work on what was interrupted: its slot stays taken for a while."""
        self.detach = "{hold_interrupted: 300ms}"
        await self.begin()
        locations = await self.two_run_two_wait()
        await self.crash()
        upstream = self.service.upstreams["u"]
        self.assertEqual((upstream.state().running, upstream.state().waiting), (2, 2))
        self.assertTrue(self.service.proxy.uses(upstream))
        self.assertEqual((await self.ask(locations[2]))[1]["state"], "queued")
        shown = (await self.call("GET", "/api/v1/upstreams/u"))[1]["requests"]
        await self.call("DELETE", f"/api/v1/requests/{shown[0]['number']}")
        self.assertEqual((upstream.state().running, upstream.state().waiting), (2, 1))
        await self.answer(2)
        await self.answer(3)
        self.assertEqual(await self.results(locations[2:]), [b"answer 2", b"answer 3"])
        await self.until(lambda: not upstream.state().running)
        self.assertEqual([self.task(each).record.held for each in locations], [[]] * 4)

    async def hold_over_several_crashes(self, repeat: str) -> None:
        self.detach = f"{{hold_interrupted: 30s, repeat: {repeat}}}"
        await self.begin()
        await self.two_run_two_wait()
        for _ in range(3):
            await self.crash()
            state = self.service.upstreams["u"].state()
            self.assertEqual((state.running, len(self.service.proxy.held)), (2, 2))

    async def test_holds_over_several_crashes(self) -> None:
        """A second crash makes no pod any faster with what the first one interrupted."""
        await self.hold_over_several_crashes("false")

    async def test_holds_over_several_crashes_what_is_repeated(self) -> None:
        """That it waits to run again changes nothing about where it may run still."""
        await self.hold_over_several_crashes("true")

    async def test_holds_every_slot(self) -> None:
        """What was interrupted at one pod, and then at another, may still run at both."""
        self.detach = "{hold_interrupted: 30s, repeat: true}"
        await self.begin()
        location = await self.submit()
        for crashes in (1, 2):
            await self.arrival(b"work")
            await self.crash()
            self.assertEqual(len(self.service.proxy.held), crashes)
        state = self.service.upstreams["u"].state()
        self.assertEqual(([pod.leases for pod in state.pods], state.waiting), ([1, 1], 1))
        self.assertEqual((await self.ask(location))[1]["state"], "queued")

    async def test_holds_after_a_stop(self) -> None:
        """An orderly stop that does not wait any longer leaves the same behind."""
        self.detach = "{hold_interrupted: 30s}"
        await self.begin()
        await self.two_run_two_wait()
        for _ in range(2):
            await self.service.stopService()
            await self.begin_service()
            self.assertEqual(len(self.service.proxy.held), 2)

    async def test_given_back(self) -> None:
        """A slot that an operator has given back is not held by the next process either."""
        self.detach = "{hold_interrupted: 30s}"
        await self.begin()
        locations = [await self.submit(f"/{n}") for n in range(2)]
        for number in range(2):
            await self.arrival(b" /%d " % number)
        await self.crash()
        for location in locations:
            await self.until_state(location, "failed")
        first, _ = sorted(self.service.proxy.held, key=lambda each: each.number)
        await self.call("DELETE", f"/api/v1/requests/{first.number}")
        held = [len(self.task(each).record.held) for each in locations]
        self.assertEqual(sorted(held), [0, 1])
        await self.detached.store.load_detached()  # after everything that is being written
        await self.crash()
        self.assertEqual([len(self.task(each).record.held) for each in locations], held)
        self.assertEqual(len(self.service.proxy.held), 1)

    async def test_given_back_while_the_end_is_written(self) -> None:
        """What is being written knows of the slot still; it is written once more."""
        self.detach = "{hold_interrupted: 30s}"
        await self.begin()
        location = await self.submit()
        await self.arrival(b"work")
        put, slow = SqliteStore.put_detached, Deferred[None]()

        def put_slowly(store: SqliteStore, document: Any, *, new: bool = False) -> Any:
            written = put(store, document, new=new)
            return slow.addCallback(lambda _: written) if document["ended"] else written

        patched = self.patch(SqliteStore, "put_detached", put_slowly)
        await self.crash()
        patched.restore()
        (held,) = self.service.proxy.held
        self.assertTrue(self.task(location).settling)
        held.abandon(Cancelled("enough"))
        slow.callback(None)
        await self.until_state(location, "failed")
        await self.detached.store.load_detached()
        await self.crash()
        self.assertEqual(len(self.service.proxy.held), 0)
        self.assertEqual((await self.ask(location))[1]["state"], "failed")

    async def test_held_is_not_forgotten(self) -> None:
        """A task whose slot is held has ended, and stays until the slot is given back."""
        self.detach = "{hold_interrupted: 30s}"
        self.tasks = ", max_count: 2"
        await self.begin()
        location = await self.submit("/0")
        done = await self.submit("/1")
        await self.answer(1)
        await self.until_state(done, "done")
        await self.arrival(b" /0 ")
        await self.crash()
        await self.until_state(location, "failed")
        self.sweep_all()
        self.assertEqual(list(self.detached), [self.task(location)])
        third = await self.submit("/2")
        await self.arrival(b" /2 ")
        wire = await self.say("POST", "/3", ASYNC)
        self.assertIn(b"HTTP/1.1 503 ", wire.received)
        await self.answer(2)
        await self.until_state(third, "done")
        await self.submit("/4")
        self.assertIsNone(self.detached.find(third.rpartition("/")[2]))
        (held,) = self.service.proxy.held
        held.abandon(Cancelled("enough"))
        self.sweep_all()
        self.assertIsNone(self.detached.find(location.rpartition("/")[2]))

    def sweep_all(self) -> None:
        """Forget what has ended as if it had been kept long enough."""
        config = self.detached.config
        self.detached.config = replace(config, keep=0.0)
        self.detached.sweep()
        self.detached.config = config

    async def test_upstream_is_gone(self) -> None:
        """Where a new configuration has no such pods, there is nothing to hold."""
        self.detach = "{hold_interrupted: 30s}"
        await self.begin()
        location = await self.submit()
        await self.arrival(b"work")
        text = self.path.read_text().replace("upstreams: {u: ", "upstreams: {other: ")
        self.path.write_text(text.replace("upstream: u", "upstream: other"))
        await self.crash()
        self.assertEqual(len(self.service.proxy.held), 0)
        self.assertEqual(self.task(location).record.held, [])
        await self.until_state(location, "failed")

    async def test_repeated(self) -> None:
        """Where the route allows it, what was interrupted runs again, before those behind it."""
        self.detach = "{repeat: true}"
        await self.begin()
        locations = await self.two_run_two_wait()
        await self.crash()
        for number in range(4):
            await self.answer(number)
        self.assertEqual(await self.results(locations), [b"answer %d" % n for n in range(4)])

    async def begin_another(self) -> ProxyService:
        """Begin one more process, as it were; return it when the folder was refused to it."""
        refused: list[Any] = []
        load = SqliteStore.load

        def watched(store: SqliteStore) -> Any:
            return load(store).addErrback(lambda failure: (refused.append(failure), failure)[1])

        self.patch(SqliteStore, "load", watched)
        file = ConfigFile(self.path)
        service = ProxyService(file.read(), reactor, file)
        self.patch(service, "_take_signals", lambda: None)
        self.failures: list[Any] = []
        self.patch(service, "_cannot_start", self.failures.append)
        service.startService()
        await self.until(lambda: refused)
        return service

    async def test_change_over(self) -> None:
        """The next process waits for the folder until this one has let go of it."""
        await self.begin()
        location = await self.submit()
        await self.answer_to(b"work")
        await self.until_state(location, "done")
        first = self.service
        self.service = await self.begin_another()
        self.assertIsNone(self.service.proxy.detached)
        await first.stopService()
        await self.service.started
        self.assertEqual(self.failures, [])
        self.traffic, self.admin = self.service.addresses()
        self.assertEqual(await self.results([location]), [b"answer"])

    async def test_stopped_before_its_turn(self) -> None:
        """A process that waits for the folder can be stopped, and leaves nothing behind."""
        await self.begin()
        second = await self.begin_another()
        await second.stopService()
        await second.started
        self.assertIn("another process has it", str(self.failures[0].value))
        await self.submit()

    async def answer_to(self, part: bytes) -> None:
        wire = await self.arrival(part)
        wire.take()
        wire.send(response(b"answer"))

    async def test_route_is_gone(self) -> None:
        """A new configuration may have no place for it: that is told like everything else."""
        await self.begin()
        locations = await self.two_run_two_wait()
        self.path.write_text(self.path.read_text().replace("prefix: /,", "prefix: /other,"))
        await self.crash()
        for location in locations[2:]:
            document = await self.until_state(location, "failed")
            self.assertEqual(document["reason"], "no_route")

    async def test_no_document(self) -> None:
        """A store with something else in it keeps the proxy from starting, and nothing is lost."""
        await self.begin()
        location = await self.submit()
        store: Any = self.detached.store
        await store.put_detached({"id": "x", "seq": 99})
        await self.service.stopService()
        file = ConfigFile(self.path)
        service = ProxyService(file.read(), reactor, file)
        assert service.config.tasks is not None
        with self.assertRaisesRegex(StoreError, "not a detached request"):
            await service.keeper.start(service.config.tasks, service.config.routes, {})
        service._parts.stop()
        name = location.rpartition("/")[2]
        self.assertEqual([p.name for p in (self.folder / "bodies").iterdir()], [name])


class DiskTests(DetachedTestCase):
    async def test_body_cannot_be_written(self) -> None:
        """Nobody is told that there is a task if its body is not on the disk."""
        await self.begin()
        self.patch(self.detached._files, "create_body", _full)
        answer = await self.say("POST", "/x", ASYNC, body=b"work")
        self.assertIn(b"HTTP/1.1 507 ", answer.received)
        self.assertIn(b"No space left on device", answer.received)
        self.assertEqual((self.detached.size, list(self.detached)), (0, []))

    async def test_task_cannot_be_written(self) -> None:
        """Nor if its record is not."""
        await self.begin()
        store: Any = self.detached.store
        self.patch(store, "put_detached", lambda _, new=False: fail(StoreError("disk is full")))
        for line in ("X: y", "Idempotency-Key: k"):
            answer = await self.say("POST", "/x", ASYNC, line, body=b"work")
            self.assertIn(b"HTTP/1.1 507 ", answer.received)
            self.assertIn(b"disk is full", answer.received)
        self.assertEqual((self.detached.size, list(self.detached)), (0, []))
        self.assertEqual(self.detached._by_key, {})
        await self.until(lambda: not list((self.folder / "bodies").iterdir()))

    async def test_run_cannot_be_written(self) -> None:
        """No pod gets a request as long as it could not be known after a crash that it did."""
        from strictproxy.tasks import detached_task

        self.patch(detached_task, "_FIRST_PAUSE", 0.01)
        await self.begin()
        store: Any = self.detached.store
        real = store.put_detached
        blocked = [await self.client(f"/{n}") for n in range(2)]
        await self.until(lambda: self.service.upstreams["u"].state().running == 2)
        location = await self.submit("/mine")
        self.patch(store, "put_detached", lambda _, new=False: fail(StoreError("disk is full")))
        for wire in blocked:
            wire.reset()
        await self.until(lambda: self.task(location).failures > 2)
        self.assertFalse(any(b"/mine" in w.received for p in self.pods for w in p.connections))
        self.assertEqual((await self.ask(location))[1]["state"], "queued")
        self.patch(store, "put_detached", real)
        wire = await self.arrival(b"/mine")
        wire.send(response(b"done"))
        await self.until_state(location, "done")

    async def test_result_cannot_be_written(self) -> None:
        """It is a failure that says so; the task itself stays."""
        await self.begin()
        self.patch(self.detached._files, "create_result", _full)
        for size in (10, 3 * 2**20):
            location = await self.submit()
            wire = await self.arrival(b"work")
            wire.take()
            wire.send(response(b"x" * size, "Connection: close"))
            document = await self.until_state(location, "failed")
            self.assertEqual(document["reason"], "task_store_failed")
            self.assertIn("No space left on device", document["detail"])
        self.assertEqual(self.detached.size, 0)
        self.assertEqual(self.service.upstreams["u"].state().running, 0)

    async def test_end_cannot_be_written(self) -> None:
        """Nobody is told of an end that a crash would take back; it is tried until it works."""
        from strictproxy.tasks import detached_task

        self.patch(detached_task, "_FIRST_PAUSE", 0.01)
        await self.begin()
        location = await self.submit()
        wire = await self.arrival(b"work")
        store: Any = self.detached.store
        real = store.put_detached
        self.patch(store, "put_detached", lambda _, new=False: fail(StoreError("disk is full")))
        wire.send(response(b"done"))
        await self.until(lambda: self.task(location).failures > 2)
        self.assertEqual((await self.ask(location))[1]["state"], "running")
        self.assertEqual(self.service.upstreams["u"].state().running, 0)
        self.patch(store, "put_detached", real)
        await self.until_state(location, "done")

    async def test_result_cannot_be_read(self) -> None:
        """A file that somebody took away is an error that says so."""
        await self.begin()
        for size in (4, 2**20):
            location = await self.submit()
            wire = await self.arrival(b"work")
            wire.take()
            wire.send(response(b"x" * size))
            await self.until_state(location, "done")
            path = self.folder / "results" / location.rpartition("/")[2]
            path.write_bytes(b"x" * (size // 2))
            answer = await self.say("GET", location + "/result")
            if size == 4:
                self.assertIn(b"HTTP/1.1 507 ", answer.received)
                self.assertIn(b"shorter than it was", answer.received)
            else:
                self.assertFalse(answer.received.endswith(b"0\r\n\r\n"))
                self.assertLess(len(answer.received), size)
            path.unlink()
            answer = await self.say("GET", location + "/result")
            self.assertIn(b"No such file", answer.received)


def _full(_task_id: str) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
