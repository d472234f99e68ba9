"""Detached requests: what clients may do: send again, list, wait, ask for parts, leave."""

from __future__ import annotations

import re
import threading
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from strictproxy.detaching import Submission
from strictproxy.logs import AccessRecord
from tests.harness import response
from tests.test_detached import ASYNC, DetachedTestCase

reactor: Any = _reactor


class IdempotencyTests(DetachedTestCase):
    async def test_same_key(self) -> None:
        """The same request is the same task, whenever it comes; another one is 422."""
        await self.begin()
        key = 'Idempotency-Key: "order-7"'
        location = await self.submit("/job", key)
        self.assertEqual(await self.submit("/job", key), location)
        self.assertEqual(await self.submit("/job", "Idempotency-Key: order-7"), location)
        self.assertNotEqual(await self.submit("/job", key, "Authorization: other"), location)
        for path, body in (("/job", b"other"), ("/other", b"work")):
            answer = await self.say("POST", path, ASYNC, key, body=body)
            self.assertIn(b"HTTP/1.1 422 ", answer.received)
            self.assertIn(b"idempotency_key_reused", answer.received)
        wire = await self.arrival(b"work")
        wire.send(response(b"done"))
        await self.until_state(location, "done")
        await self.service.stopService()
        await self.begin_service()
        self.assertEqual(await self.submit("/job", key), location)
        # The other one was interrupted, which has to be written down before its body goes.
        await self.until(lambda: self.detached.size == len(b"done"))
        for bad in ("", '""', "x" * 256, "\xff"):
            answer = await self.say("POST", "/job", ASYNC, f"Idempotency-Key: {bad}", body=b"work")
            self.assertIn(b"HTTP/1.1 400 ", answer.received)

    async def test_at_the_same_time(self) -> None:
        """Of many at once there is one task, and all are told of it."""
        await self.begin()
        wires = [
            await self.say("POST", "/job", ASYNC, "Idempotency-Key: k", body=b"work", until=b"")
            for _ in range(10)
        ]
        for wire in wires:
            await wire.end()
        found = {re.search(rb"Location: (\S+)", wire.received)[1] for wire in wires}  # type: ignore[index]
        self.assertEqual(len(found), 1)
        self.assertEqual(len(list(self.detached)), 1)


class BoundTests(DetachedTestCase):
    detach = "{max_result: 1000B}"
    tasks = ", max_count: 3, max_size: 2000B"

    async def done(self, path: str, size: int) -> str:
        location = await self.submit(path)
        wire = await self.arrival(b" %b " % path.encode())
        wire.take()
        wire.send(response(b"x" * size))
        await self.until_state(location, "done" if size <= 1000 else "failed")
        return location

    async def test_result_too_large(self) -> None:
        """An answer that is too long is a failure that says so; nothing of it stays."""
        await self.begin()
        location = await self.done("/large", 1001)
        status, problem = await self.ask(location + "/result")
        self.assertEqual((status, problem["reason"]), (502, "result_too_large"))
        self.assertIn("the 1000 bytes allowed", problem["detail"])
        self.assertEqual(self.detached.size, 0)
        await self.say("POST", "/part", ASYNC, body=b"work")
        pod = await self.arrival(b" /part ")
        pod.send(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 500)
        results = self.folder / "results"
        await self.until(lambda: list(results.iterdir()))
        pod.send(b"x" * 501)
        await self.until(lambda: not list(results.iterdir()))
        await self.done("/fits", 1000)

    async def test_room(self) -> None:
        """The oldest that have ended go first; without any, there is no room."""
        await self.begin()
        first = await self.done("/1", 900)
        second = await self.done("/2", 900)
        third = await self.done("/3", 900)
        self.assertEqual((await self.ask(first))[0], 404)
        for location in (second, third):
            answer = await self.say("GET", location + "/result")
            self.assertTrue(answer.received.endswith(b"x" * 900))
        answer = await self.say("POST", "/4", ASYNC, body=b"x" * 2001)
        self.assertIn(b"HTTP/1.1 507 ", answer.received)
        self.assertIn(b"task_store_full", answer.received)
        await self.until(lambda: not self.service.proxy.running)
        self.assertEqual(self.detached.size, 0)

    async def test_count(self) -> None:
        """Of those that wait or run there are as many as may be; more get 503."""
        await self.begin()
        await self.done("/0", 1)
        locations = [await self.submit(f"/{n}") for n in range(3)]
        answer = await self.say("POST", "/more", ASYNC, body=b"work")
        self.assertIn(b"HTTP/1.1 503 ", answer.received)
        self.assertIn(b"too_many_tasks", answer.received)
        self.assertEqual(self.detached.size, 3 * len(b"work"))
        await self.ask(locations[2], method="DELETE")
        await self.submit("/more")


class ListTests(DetachedTestCase):
    async def test_list(self) -> None:
        """Who has the admin token sees all of them, or those that fit."""
        await self.begin()
        token = "Authorization: Bearer secret"
        locations = [await self.submit(f"/{n}") for n in range(4)]
        wire = await self.arrival(b" /0 ")
        wire.send(response(b"zero"))
        await self.until_state(locations[0], "done")
        for query, expected in (
            ("", [0, 1, 2, 3]),
            ("?state=done", [0]),
            ("?state=queued&route=all&upstream=u", [3]),
            ("?route=none", []),
            ("?limit=2", [0, 1]),
            ("?after=2&limit=1", [2]),
            ("?limit=0", []),
        ):
            status, found = await self.ask(f"/.strictproxy/tasks{query}", token)
            self.assertEqual(status, 200)
            numbers = [locations.index(each["location"]) for each in found["tasks"]]
            self.assertEqual(numbers, expected, query)
        self.assertEqual((await self.ask("/.strictproxy/tasks?limit=2", token))[1]["next"], 2)
        for query in ("?x=1", "?state=x", "?after=-1", "?limit=x"):
            self.assertEqual((await self.ask(f"/.strictproxy/tasks{query}", token))[0], 400)
        for line in ("X: y", "Authorization: Bearer wrong"):
            answer = await self.say("GET", "/.strictproxy/tasks", line)
            self.assertIn(b"HTTP/1.1 401 ", answer.received)
            self.assertIn(b"\r\nWWW-Authenticate: Bearer", answer.received)
            self.assertIn(b"listing tasks takes the admin token", answer.received)

    async def test_no_admin(self) -> None:
        """Without an admin listener nobody sees them."""
        await self.begin()
        text = re.sub(r"(?m)^admin: .*\n", "", self.path.read_text())
        self.path.write_text(text)
        await self.service.reload()
        status, _ = await self.ask("/.strictproxy/tasks", "Authorization: Bearer secret")
        self.assertEqual(status, 403)
        self.admin = self.traffic


class ClientTests(DetachedTestCase):
    async def leave_while_sending(self) -> None:
        """Send a half of a request, and be gone."""
        wire = await self.connect()
        wire.send(
            b"POST / HTTP/1.1\r\nHost: h\r\nPrefer: respond-async\r\nContent-Length: 9\r\n\r\nhalf"
        )
        await self.until(lambda: self.detached.size == 4)
        wire.reset()
        await self.until(lambda: not self.service.proxy.running)

    async def test_leaves_while_sending(self) -> None:
        """A body that never comes whole is no task, and takes no room."""
        await self.begin()
        await self.leave_while_sending()
        self.assertEqual(self.detached.size, 0)
        self.assertEqual(list(self.detached), [])

    async def test_leaves_while_it_is_written(self) -> None:
        """Whatever a thread is about to write, nothing is left in the end."""
        await self.begin()
        files = self.detached._files
        real, go_on = files.create_body, threading.Event()

        def create(task_id: str) -> Any:
            go_on.wait(10)
            return real(task_id)

        self.patch(files, "create_body", create)
        removed: list[str] = []
        remove = files.remove_body
        self.patch(files, "remove_body", lambda name: (remove(name), removed.append(name)))
        await self.leave_while_sending()
        # Long enough for another thread to remove what is not there yet, as it must not.
        await deferLater(reactor, 0.05)
        self.assertEqual(removed, [])
        go_on.set()
        await self.until(lambda: removed)
        self.assertEqual(list((self.folder / "bodies").iterdir()), [])

    async def test_leaves_before_it_knows(self) -> None:
        """Without a key nobody could ask for the task that was about to be; with one it runs."""
        await self.begin()
        store: Any = self.detached.store
        real = store.put_detached
        held: list[Deferred[None]] = []

        def put(document: Any, new: bool = False) -> Deferred[None]:
            held.append(Deferred())
            return held[-1].addCallback(lambda _: real(document, new=new))

        for lines, tasks in (((), 0), (("Idempotency-Key: k",), 1)):
            self.patch(store, "put_detached", put)
            wire = await self.say("POST", "/x", ASYNC, *lines, body=b"work", until=b"")
            await self.until(lambda: held)
            wire.reset()
            await self.until(lambda: not self.service.site.channels)
            self.patch(store, "put_detached", real)
            held.pop().callback(None)
            await self.until(lambda tasks=tasks: len(list(self.detached)) == tasks)
            await self.until(
                lambda: not any(isinstance(e, Submission) for e in self.service.proxy.running)
            )
        await self.arrival(b"Idempotency-Key: k")

    async def test_too_long(self) -> None:
        """A body longer than the route allows is refused as ever."""
        await self.begin()
        self.path.write_text(self.path.read_text().replace("detach:", "max_body: 3B, detach:"))
        await self.service.reload()
        answer = await self.say("POST", "/x", ASYNC, body=b"work")
        self.assertIn(b"HTTP/1.1 413 ", answer.received)
        wire = await self.connect()
        wire.send(
            b"POST / HTTP/1.1\r\nHost: h\r\nPrefer: respond-async\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n4\r\nwork\r\n0\r\n\r\n"
        )
        await wire.has(b"HTTP/1.1 413 ")
        await self.until(lambda: not self.service.proxy.running)
        self.assertEqual(self.detached.size, 0)

    async def test_slow_reader(self) -> None:
        """A result is read from the disk only as fast as its client reads."""
        await self.begin()
        location = await self.submit()
        data = bytes(range(256)) * 2**16
        wire = await self.arrival(b"work")
        wire.send(response(data))
        await self.until_state(location, "done")
        slow = await self.connect()
        slow.transport.pauseProducing()
        slow.send(f"GET {location}/result HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        await self.until(
            lambda: any(
                getattr(each._request.handler, "full", False)
                for each in self.service.site.channels
                if each._request is not None
            )
        )
        slow.transport.resumeProducing()
        await slow.until(lambda: slow.received.endswith(data))
        leaves = await self.connect()
        leaves.transport.pauseProducing()
        leaves.send(f"GET {location}/result HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        await self.until(lambda: len(self.service.site.channels) == 2)
        leaves.reset()
        await self.until(lambda: len(self.service.site.channels) == 1)

    async def test_log_and_metrics(self) -> None:
        """Access log and metrics know of both: the submission, and the run."""
        await self.begin()
        records: list[AccessRecord] = []
        self.service.proxy.log_access = records.append
        location = await self.submit()
        wire = await self.arrival(b"work")
        wire.send(response(b"done"))
        await self.until_state(location, "done")
        short = self.task(location).record.id[:8]
        self.assertEqual(
            [(each.status, each.task, each.sent > 0) for each in records],
            [(202, short, True), (200, short, True)],
        )
        self.assertEqual((records[1].pod is None, records[0].pod), (False, None))
        text = (await self.call("GET", "/metrics"))[1]
        for line in (
            'strictproxy_tasks_ended_total{outcome="done",route="all",upstream="u"} 1.0',
            "strictproxy_task_store_bytes 4.0",
        ):
            self.assertIn(line, text)
        await self.submit()
        await self.until(lambda: self.service.upstreams["u"].state().running == 1)
        text = (await self.call("GET", "/metrics"))[1]
        self.assertIn('strictproxy_tasks{route="all",state="running",upstream="u"} 1.0', text)
