"""Detached requests: accepted, stored, carried out in order, told of, kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor

from strictproxy.config.file import ConfigFile
from strictproxy.service import ProxyService
from strictproxy.tasks.detached import DetachedTask, DetachedTasks
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
