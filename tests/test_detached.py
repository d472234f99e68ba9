"""Detached requests: accepted, stored, carried out in order, told of, kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor

from strictproxy.config.file import ConfigFile
from strictproxy.service import ProxyService
from strictproxy.tasks.detached import DetachedTasks
from strictproxy.tasks.detached_task import DetachedTask
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
        await self.until(lambda: not list((self.folder / "bodies").iterdir()))

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
