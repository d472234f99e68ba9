"""Detached requests: accepted, stored, carried out in order, told of, kept."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import deferLater

from strictproxy.config.file import ConfigFile
from strictproxy.detaching import Submission
from strictproxy.errors import Cancelled
from strictproxy.logs import AccessRecord
from strictproxy.service import ProxyService
from strictproxy.tasks.detached import DetachedTasks
from strictproxy.tasks.detached_task import DetachedTask
from strictproxy.tasks.store import StoreError
from tests.harness import ScriptedPod, Wire, response
from tests.test_admin import AdminTestCase

reactor: Any = _reactor

ASYNC = "Prefer: respond-async"


class DetachedTestCase(AdminTestCase):
    #: of the route, besides the defaults
    detach = "true"
    #: of `tasks`, besides the directory
    tasks = ""

    async def begin(self, upstream: str = "limit: 1", more: str = "") -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        await self.start(upstream)
        text = self.path.read_text().replace("name: all", f"name: all, detach: {self.detach}")
        text += f"tasks: {{directory: {self.folder}{self.tasks}}}\n{more}"
        if "drain_timeout" not in more:
            text += "drain_timeout: 100ms\n"
        await self.service.stopService()
        self.path.write_text(text)
        await self.begin_service()

    async def stop(self) -> None:
        # Those that wait stay where they are, so nobody waits for them.
        if self.service.proxy.detached is not None:
            self.service.proxy.detached.withdraw()
        await super().stop()

    async def begin_service(self) -> None:
        file = ConfigFile(self.path)
        self.service = ProxyService(file.read(), reactor, file)
        self.patch(self.service, "_take_signals", lambda: None)
        self.service.startService()
        await self.service.started
        self.traffic, self.admin = self.service.addresses()

    @property
    def detached(self) -> DetachedTasks:
        detached = self.service.proxy.detached
        assert detached is not None
        return detached

    async def say(
        self, method: str, path: str, *lines: str, body: bytes = b"", until: bytes | None = None
    ) -> Wire:
        """Send a request; return the connection, with the whole answer or as far as `until`."""
        head = [f"{method} {path} HTTP/1.1", "Host: example.com", "Connection: close", *lines]
        if body:
            head.append(f"Content-Length: {len(body)}")
        wire = await self.connect()
        wire.send("\r\n".join([*head, "", ""]).encode() + body)
        await (wire.end() if until is None else wire.has(until))
        return wire

    async def ask(self, path: str, *lines: str, method: str = "GET") -> tuple[int, Any]:
        """Return the status of an answer and its JSON."""
        wire = await self.say(method, path, *lines)
        head, _, body = wire.received.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    async def submit(
        self, path: str = "/job", *lines: str, method: str = "POST", body: bytes = b"work"
    ) -> str:
        """Submit a request; return where its task is."""
        wire = await self.say(method, path, ASYNC, *lines, body=body)
        head, _, document = wire.received.decode().partition("\r\n\r\n")
        self.assertIn("HTTP/1.1 202 Accepted\r\nPreference-Applied: respond-async\r\n", head)
        self.assertRegex(head, r"\r\nRetry-After: \d+\r\n")
        found = re.search(r"\r\nLocation: (/\.strictproxy/tasks/[\w-]{32})\r\n", head)
        assert found is not None
        self.assertEqual(json.loads(document)["location"], found[1])
        return found[1]

    def task(self, location: str) -> DetachedTask:
        task = self.detached.find(location.rpartition("/")[2])
        assert task is not None
        return task

    async def arrival(self, part: bytes, pod: ScriptedPod | None = None) -> Wire:
        """Return the connection of a pod that brought this."""
        found: list[Wire] = []

        def look() -> bool:
            pods = self.pods if pod is None else [pod]
            wires = [wire for each in pods for wire in each.connections if not wire.closed]
            found[:] = [wire for wire in wires if part in wire.received]
            return bool(found)

        await self.until(look)
        return found[0]

    async def until_state(self, location: str, state: str) -> dict[str, Any]:
        await self.until(lambda: self.task(location).record.state.value == state)
        return (await self.ask(location))[1]


class DetachedTests(DetachedTestCase):
    async def test_one(self) -> None:
        """Accepted, run, done; the pod's very answer is the result."""
        await self.begin()
        location = await self.submit("/job?x=1", "X-Mine: yes", body=b"the work")
        wire = await self.arrival(b"the work")
        self.assertIn(b"POST /job?x=1 HTTP/1.1\r\n", wire.received)
        self.assertIn(b"\r\nX-Mine: yes\r\n", wire.received)
        self.assertIn(b"\r\nContent-Length: 8\r\n", wire.received)
        self.assertIn(b"\r\nX-Forwarded-For: 127.0.0.1\r\n", wire.received)
        self.assertNotIn(b"Prefer", wire.received)
        running = await self.until_state(location, "running")
        self.assertEqual(running["state"], "running")
        self.assertIn(running["pod"], [str(pod.address) for pod in self.pods])
        status, problem = await self.ask(location + "/result")
        self.assertEqual((status, problem["reason"]), (409, "task_not_ended"))
        wire.send(response(b"the result", "X-Theirs: too", 'ETag: "e"', status="201 Created"))
        done = await self.until_state(location, "done")
        self.assertEqual((done["status"], done["size"]), (201, 10))
        result = await self.say("GET", done["result"])
        self.assertTrue(result.received.startswith(b"HTTP/1.1 201 Created\r\n"))
        self.assertIn(b"\r\nX-Theirs: too\r\n", result.received)
        self.assertTrue(result.received.endswith(b"\r\n\r\nthe result"))
        self.assertEqual(self.service.upstreams["u"].state().running, 0)
        self.assertFalse(list((self.folder / "bodies").iterdir()))

    async def test_order(self) -> None:
        """They stand in the same line as those who wait, and know their place."""
        await self.begin()
        running = [await self.submit(f"/{n}") for n in range(2)]
        first = await self.submit("/first")
        waiting = await self.client("/second")
        upstream = self.service.upstreams["u"]
        await self.until(lambda: upstream.state().waiting == 2)
        third = await self.submit("/third")
        upstream._placed = 0.0
        for location, place in ((first, 1), (third, 3)):
            document = (await self.ask(location))[1]
            self.assertEqual((document["state"], document["position"]), ("queued", place))
        self.assertIsNone(document["starts_in"])
        for expected in (b"/0", b"/first", b"/second", b"/third"):
            wire = await self.arrival(b" %b HTTP" % expected)
            wire.take()
            wire.send(response(b"answer"))
        await waiting.has(b"answer")
        await self.until_state(third, "done")
        self.assertEqual((await self.ask(running[1]))[1]["state"], "running")

    async def test_long_poll(self) -> None:
        """A client may wait for the end: with a bound, and of the result itself."""
        await self.begin()
        location = await self.submit()
        state = await self.say("GET", location, "Prefer: wait=1")
        self.assertIn(b"\r\nPreference-Applied: wait=1\r\n", state.received)
        self.assertIn(b'"state": "running"', state.received)
        waiting = [
            await self.say("GET", path, "Prefer: wait=60", until=b"")
            for path in (location, location + "/result")
        ]
        leaves = await self.say("GET", location, "Prefer: wait=60", until=b"")
        await self.until(lambda: len(self.task(location).watchers) == 3)
        leaves.reset()
        await self.until(lambda: len(self.task(location).watchers) == 2)
        wire = await self.arrival(b"work")
        wire.send(response(b"at last"))
        await waiting[0].has(b'"state": "done"')
        await waiting[1].has(b"at last")
        self.assertFalse(self.task(location).watchers)

    async def test_events(self) -> None:
        """Each change is an event; the last one ends the stream."""
        await self.begin()
        blocking = [await self.submit(f"/{n}") for n in range(2)]
        location = await self.submit("/watched")
        wire = await self.say("GET", location, "Accept: text/event-stream", until=b"queued")
        self.assertIn(b"\r\nContent-Type: text/event-stream\r\n", wire.received)
        pod = await self.arrival(b" /0 ")
        pod.take()
        pod.send(response(b"done"))
        await wire.has(b'"state":"running"')
        pod = await self.arrival(b" /watched ")
        pod.send(response(b"done"))
        await wire.end()
        states = re.findall(rb'event: state\ndata: \{[^\n]*"state":"(\w+)"', wire.received)
        self.assertEqual(states, [b"queued", b"running", b"done"])
        again = await self.say("GET", location, "Accept: text/event-stream")
        self.assertEqual(again.received.count(b"event: state"), 1)
        await self.say("HEAD", location, "Accept: text/event-stream")
        left = await self.say("GET", blocking[1], "Accept: text/event-stream", until=b"running")
        left.reset()
        await self.until(lambda: not self.service.proxy.pages._streams)  # type: ignore[union-attr]
        self.assertFalse(self.service.proxy.pages._ticker.running)  # type: ignore[union-attr]

    async def test_ranges(self) -> None:
        """A result is sent in parts to whoever asks, as RFC 9110 says."""
        await self.begin()
        location = await self.submit()
        data = bytes(range(256)) * 4096
        wire = await self.arrival(b"work")
        wire.send(response(data, 'ETag: "abc"'))
        await self.until_state(location, "done")
        for lines, status, body, more in (
            ((), 200, data, b"Accept-Ranges: bytes"),
            (("Range: bytes=5-9",), 206, data[5:10], b"Content-Range: bytes 5-9/1048576"),
            (("Range: bytes=-3",), 206, data[-3:], b"Content-Length: 3"),
            (("Range: bytes=300000-",), 206, data[300000:], b"Content-Length: 748576"),
            (("Range: bytes=0-1,4-5",), 200, data, b"Content-Length: 1048576"),
            (("Range: bytes=5-9", 'If-Range: "abc"'), 206, data[5:10], b"206"),
            (("Range: bytes=5-9", 'If-Range: "other"'), 200, data, b"200"),
            (("Range: bytes=5-9", 'If-Range: W/"abc"'), 200, data, b"200"),
            (("Range: bytes=1048576-",), 416, None, b"Content-Range: bytes */1048576"),
        ):
            answer = await self.say("GET", location + "/result", *lines)
            head, _, found = answer.received.partition(b"\r\n\r\n")
            self.assertEqual(int(head.split()[1]), status, lines)
            self.assertIn(more, head)
            if body is not None:
                self.assertEqual(found, body)
        head = (await self.say("HEAD", location + "/result", "Range: bytes=0-1")).received
        self.assertIn(b"HTTP/1.1 200 ", head)
        self.assertIn(b"Content-Length: 1048576\r\n", head)
        self.assertTrue(head.endswith(b"\r\n\r\n"))

    async def test_reload(self) -> None:
        """Those that wait and run go on, whatever becomes of their route."""
        await self.begin()
        locations = [await self.submit(f"/{n}") for n in range(3)]
        text = self.path.read_text()
        self.path.write_text(text.replace("name: all, detach: true", "name: other"))
        await self.service.reload()
        for number, location in enumerate(locations):
            wire = await self.arrival(b" /%d " % number)
            wire.take()
            wire.send(response(b"answer"))
            await self.until_state(location, "done")
        answer = await self.say("GET", locations[2] + "/result")
        self.assertTrue(answer.received.endswith(b"answer"))

    async def test_no_content(self) -> None:
        """Answers without a body stay so; of others only a 200 is sent in parts."""
        await self.begin()
        for status, body in (
            ("204 No Content", b""),
            ("200 OK", b""),
            ("404 Not Found", b"nothing"),
        ):
            location = await self.submit()
            wire = await self.arrival(b"work")
            wire.take()
            if status[:3] == "204":
                wire.send(b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n")
            else:
                wire.send(response(body, status=status))
            await self.until_state(location, "done")
            answer = (
                await self.say("GET", location + "/result", "Range: bytes=0-0")
                if body
                else (await self.say("GET", location + "/result"))
            )
            self.assertTrue(answer.received.startswith(f"HTTP/1.1 {status}\r\n".encode()))
            self.assertTrue(answer.received.endswith(b"\r\n\r\n" + body))

    async def test_chunked_both_ways(self) -> None:
        """Bodies of unknown length go through files, whole; trailers end there."""
        await self.begin()
        data = bytes(range(256)) * 8192
        wire = await self.connect()
        wire.send(
            b"PUT /big HTTP/1.1\r\nHost: h\r\nPrefer: respond-async, handling=lenient\r\n"
            b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        )
        await wire.has(b"HTTP/1.1 100 Continue\r\n\r\n")
        for start in range(0, len(data), 100_000):
            piece = data[start : start + 100_000]
            wire.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        wire.send(b"0\r\nX-Sum: 1\r\n\r\n")
        await wire.has(b'"state"')
        found = re.search(rb"Location: (\S+)", wire.received)
        assert found is not None
        location = found[1].decode()
        pod = await self.arrival(b"PUT /big")
        await pod.until(lambda: pod.received.endswith(data))
        self.assertIn(b"\r\nPrefer: handling=lenient\r\n", pod.received)
        self.assertIn(b"\r\nContent-Length: 2097152\r\n", pod.received)
        self.assertNotIn(b"Expect", pod.received)
        pod.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(data), 100_000):
            piece = data[start : start + 100_000]
            pod.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        pod.send(b"0\r\n\r\n")
        await self.until_state(location, "done")
        answer = await self.say("GET", location + "/result")
        self.assertTrue(answer.received.endswith(b"\r\n\r\n" + data))

    async def test_not_detached(self) -> None:
        """Who waits as ever: without the preference, or where it makes no sense."""
        await self.begin()
        for method, lines in (
            ("GET", ("Prefer: return=minimal",)), ("HEAD", (ASYNC,)),
            ("GET", (ASYNC, "Upgrade: x", "Connection: upgrade")),
        ):  # fmt: skip
            client = await self.say(method, "/sync", *lines, until=b"")
            wire = await self.arrival(b"/sync")
            wire.take()
            wire.send(response(b"" if method == "HEAD" else b"now"))
            await client.has(b"200 OK")
        self.assertEqual(list(self.detached), [])
        self.path.write_text(self.path.read_text().replace("detach: true", "detach: false"))
        await self.service.reload()
        client = await self.say("GET", "/sync", ASYNC, until=b"")
        wire = await self.arrival(b"/sync")
        self.assertIn(b"Prefer: respond-async\r\n", wire.received)
        wire.send(response(b"now"))
        await client.has(b"now")

    async def test_unknown(self) -> None:
        """What is not there is 404, another method is 405."""
        await self.begin()
        location = await self.submit()
        for method, path, status in (
            ("GET", "/.strictproxy/tasks/nothing", 404),
            ("GET", location + "/other", 404),
            ("DELETE", location[:-1], 404),
            ("POST", location, 405),
            ("DELETE", location + "/result", 405),
            ("DELETE", "/.strictproxy/tasks", 405),
        ):
            answer = await self.say(method, path, body=b"x" if method == "POST" else b"")
            self.assertIn(b"HTTP/1.1 %d " % status, answer.received, path)
        self.assertIn(b"\r\nAllow: GET, HEAD\r\n", answer.received)


class EndTests(DetachedTestCase):
    async def test_cancel(self) -> None:
        """A client cancels what waits and what runs; what has ended stays as it is."""
        await self.begin()
        running, other, queued = [await self.submit(f"/{n}") for n in range(3)]
        wire = await self.arrival(b" /0 ")
        for location in (queued, running):
            status, document = await self.ask(location, method="DELETE")
            self.assertEqual((status, document["state"]), (200, "cancelled"))
            self.assertEqual((await self.ask(location + "/result"))[0], 410)
        await wire.end()
        wire = await self.arrival(b" /1 ")
        wire.send(response(b"one"))
        await self.until_state(other, "done")
        document = (await self.ask(other, method="DELETE"))[1]
        self.assertEqual(document["state"], "done")
        self.assertEqual(self.service.proxy.counters.of("all").tasks, {"cancelled": 2, "done": 1})
        self.assertEqual(self.service.upstreams["u"].state().waiting, 0)

    async def test_operator_cancels(self) -> None:
        """An operator sees it among the requests, by the beginning of its id, and cancels it."""
        await self.begin()
        location = await self.submit()
        await self.until_state(location, "running")
        (shown,) = (await self.call("GET", "/api/v1/upstreams/u"))[1]["requests"]
        self.assertEqual(shown["task"], self.task(location).record.id[:8])
        status, _ = await self.call("DELETE", f"/api/v1/requests/{shown['number']}")
        self.assertEqual(status, 200)
        document = await self.until_state(location, "cancelled")
        self.assertEqual(document["reason"], "cancelled")

    async def test_pod_fails(self) -> None:
        """No whole answer is a failure, told as a waiting client would have heard of it."""
        await self.begin()
        for answer in (
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
            b"nonsense\r\n\r\n",
        ):
            location = await self.submit()
            wire = await self.arrival(b"work")
            wire.send(answer)
            wire.close()
            document = await self.until_state(location, "failed")
            status, problem = await self.ask(location + "/result")
            self.assertEqual((status, problem["reason"]), (502, document["reason"]))
            self.assertIn(problem["reason"], ("pod_disconnected", "bad_response"))
            self.assertEqual(problem["detail"], document["detail"])
        self.assertEqual(self.detached.size, 0)

    async def test_unreachable(self) -> None:
        """Without any pod that can be reached it stays in the line, and its turn comes."""
        from strictproxy.tasks import detached_task

        self.patch(detached_task, "_FIRST_PAUSE", 0.01)
        await self.begin("limit: 1, health: {aside: 10ms, max_aside: 10ms}")
        ports = [pod.port.getHost().port for pod in self.pods]
        for pod in self.pods:
            await pod.port.stopListening()
        location = await self.submit()
        await self.until(lambda: self.task(location).failures > 1)
        self.assertEqual((await self.ask(location))[1]["state"], "queued")
        await self.until(lambda: self.task(location).run is None)
        self.assertEqual(self.task(location).record.attempts, 0)
        for pod, port in zip(self.pods, ports, strict=True):
            pod.port = reactor.listenTCP(port, pod, interface="127.0.0.1")
        wire = await self.arrival(b"work")
        wire.send(response(b"after all"))
        await self.until_state(location, "done")

    async def test_refused_and_waits(self) -> None:
        """A request that a pod refused waits for another; no crash takes it for begun."""
        await self.begin()
        blocking = await self.client("/blocks")
        await self.arrival(b"/blocks")
        busy, dead = sorted(self.pods, key=lambda pod: not pod.connections)
        await dead.port.stopListening()
        location = await self.submit("/mine")
        await self.until(lambda: self.service.upstreams["u"].state().waiting == 1)
        await self.until(lambda: self.task(location).record.attempts == 1)
        document = (await self.ask(location))[1]
        self.assertEqual((document["state"], document["position"]), ("queued", 1))
        (stored,) = await self.detached.store.load_detached()
        self.assertEqual((stored["state"], stored["pod"]), ("queued", None))
        blocking.reset()
        wire = await self.arrival(b"/mine", busy)
        wire.send(response(b"done"))
        await self.until_state(location, "done")

    async def test_unreachable_and_cancelled(self) -> None:
        """It can be cancelled between two tries, too."""
        await self.begin()
        for pod in self.pods:
            await pod.port.stopListening()
        location = await self.submit()
        await self.until(lambda: self.task(location).timer is not None)
        self.assertEqual((await self.ask(location, method="DELETE"))[1]["state"], "cancelled")

    async def test_drain(self) -> None:
        """On SIGTERM what runs is waited for; what waits stays on the disk for the next process."""
        await self.begin(more="drain_timeout: 20s\n")
        running, other, queued = [await self.submit(f"/{n}") for n in range(3)]
        await self.arrival(b" /1 ")
        wire = await self.arrival(b" /0 ")
        stopping = self.service.stopService()
        wire.send(response(b"zero"))
        (await self.arrival(b" /1 ")).send(response(b"one"))
        await stopping
        await self.begin_service()
        for location in (running, other):
            self.assertEqual((await self.ask(location))[1]["state"], "done")
        wire = await self.arrival(b" /2 ")
        wire.send(response(b"two"))
        await self.until_state(queued, "done")
        for location, body in ((running, b"zero"), (other, b"one"), (queued, b"two")):
            self.assertTrue((await self.say("GET", location + "/result")).received.endswith(body))


class ExpiryTests(DetachedTestCase):
    detach = "{limit_wait: 50ms}"
    tasks = ", keep: 300ms"

    async def test_expires(self) -> None:
        """Who has waited as long as its route allows is done with; later nobody knows of it."""
        await self.begin()
        await self.client("/0")
        await self.client("/1")
        await self.until(lambda: self.service.upstreams["u"].state().running == 2)
        location = await self.submit("/late")
        document = await self.until_state(location, "expired")
        self.assertEqual(document["reason"], "task_expired")
        self.assertEqual((await self.ask(location + "/result"))[0], 410)
        await self.until(lambda: not list(self.detached))
        self.assertEqual((await self.ask(location))[0], 404)
        self.assertEqual(await self.detached.store.load_detached(), [])


class RepeatTests(DetachedTestCase):
    detach = "{repeat: true}"

    async def test_repeats(self) -> None:
        """Where the route allows it, a request that a pod failed is given to one again."""
        from strictproxy.tasks import detached_task

        self.patch(detached_task, "_FIRST_PAUSE", 0.01)
        await self.begin()
        location = await self.submit()
        for answer in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"):
            wire = await self.arrival(b"work")
            wire.send(answer)
            wire.close()
            await wire.end()
        wire = await self.arrival(b"work")
        wire.send(response(b"whole", "Connection: close"))
        await self.until_state(location, "done")
        answer = await self.say("GET", location + "/result")
        self.assertTrue(answer.received.endswith(b"\r\n\r\nwhole"))
        location = await self.submit()
        for _ in range(5):
            wire = await self.arrival(b"work")
            wire.close()
            await wire.end()
        await self.until_state(location, "failed")


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
        self.assertEqual(self.detached.size, len(b"done"))
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
    async def test_leaves_while_sending(self) -> None:
        """A body that never comes whole is no task, and takes no room."""
        await self.begin()
        wire = await self.connect()
        wire.send(
            b"POST / HTTP/1.1\r\nHost: h\r\nPrefer: respond-async\r\nContent-Length: 9\r\n\r\nhalf"
        )
        await self.until(lambda: self.detached.size == 4)
        wire.reset()
        await self.until(lambda: not self.service.proxy.running)
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
        wire = await self.connect()
        wire.send(
            b"POST / HTTP/1.1\r\nHost: h\r\nPrefer: respond-async\r\nContent-Length: 9\r\n\r\nhalf"
        )
        await self.until(lambda: self.detached.size == 4)
        wire.reset()
        await self.until(lambda: not self.service.proxy.running)
        await deferLater(reactor, 0.05)
        go_on.set()
        bodies = self.folder / "bodies"
        removed: list[str] = []
        remove = files.remove_body
        self.patch(files, "remove_body", lambda name: (remove(name), removed.append(name)))
        await self.until(lambda: removed)
        self.assertEqual(list(bodies.iterdir()), [])

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


class CrashTests(DetachedTestCase):
    """What a crash leaves: the disk as it is at some moment, and nothing told to anybody."""

    async def crash(self) -> None:
        """Copy the disk as it is, stop the process, and begin another with the copy."""
        copy = Path(self.mktemp())
        shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns("lock"))
        await self.service.stopService()
        self.path.write_text(self.path.read_text().replace(str(self.folder), str(copy)))
        self.folder = copy
        await self.begin_service()

    async def two_run_two_wait(self) -> list[str]:
        locations = [await self.submit(f"/{n}") for n in range(4)]
        for location in locations[:2]:
            await self.until_state(location, "running")
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
        self.assertEqual([p.name for p in (self.folder / "bodies").iterdir()], [])
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
        first, _ = sorted(self.service.proxy.held, key=lambda each: each.number)
        await self.call("DELETE", f"/api/v1/requests/{first.number}")
        held = [len(self.task(each).record.held) for each in locations]
        self.assertEqual(sorted(held), [0, 1])
        await self.detached.store.load_detached()  # after everything that is being written
        await self.crash()
        self.assertEqual([len(self.task(each).record.held) for each in locations], held)
        self.assertEqual(len(self.service.proxy.held), 1)

    async def test_held_is_not_forgotten(self) -> None:
        """A task whose slot is held has ended, and stays until the slot is given back."""
        self.detach = "{hold_interrupted: 30s}"
        self.tasks = ", max_count: 2, keep: 1ms"
        await self.begin()
        location = await self.submit("/0")
        done = await self.submit("/1")
        await self.answer(1)
        await self.until_state(done, "done")
        await self.arrival(b" /0 ")
        await self.crash()
        await self.until_state(location, "failed")
        self.detached.sweep()
        self.assertEqual(
            [task.record.short for task in self.detached], [self.task(location).record.short]
        )
        third = await self.submit("/2")
        await self.arrival(b" /2 ")
        wire = await self.say("POST", "/3", ASYNC)
        self.assertIn(b"HTTP/1.1 503 ", wire.received)
        await self.answer(2)
        await self.until_state(third, "done")
        self.detached.config = replace(self.detached.config, keep=3600.0)
        await self.submit("/4")
        self.assertIsNone(self.detached.find(third.rpartition("/")[2]))
        (held,) = self.service.proxy.held
        held.abandon(Cancelled("enough"))
        self.detached.config = replace(self.detached.config, keep=0.0)
        self.detached.sweep()
        self.assertIsNone(self.detached.find(location.rpartition("/")[2]))

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

    async def test_change_over(self) -> None:
        """The next process waits for the folder until this one has let go of it."""
        await self.begin()
        location = await self.submit()
        await self.answer_to(b"work")
        await self.until_state(location, "done")
        first = self.service
        file = ConfigFile(self.path)
        self.service = ProxyService(file.read(), reactor, file)
        self.patch(self.service, "_take_signals", lambda: None)
        self.service.startService()
        await deferLater(reactor, 0.1)
        self.assertIsNone(self.service.proxy.detached)
        await first.stopService()
        await self.service.started
        self.traffic, self.admin = self.service.addresses()
        self.assertEqual(await self.results([location]), [b"answer"])

    async def test_stopped_before_its_turn(self) -> None:
        """A process that waits for the folder can be stopped, and leaves nothing behind."""
        await self.begin()
        file = ConfigFile(self.path)
        second = ProxyService(file.read(), reactor, file)
        self.patch(second, "_take_signals", lambda: None)
        failures: list[Any] = []
        self.patch(second, "_cannot_start", failures.append)
        second.startService()
        await deferLater(reactor, 0.1)
        await second.stopService()
        await second.started
        self.assertIn("another process has it", str(failures[0].value))
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
