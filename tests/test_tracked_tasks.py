"""Asynchronous services: a submit call's slot is held until the job is done."""

from __future__ import annotations

import random
from typing import Any

from strictproxy.config.model import (
    Match,
    RouteConfig,
    TaskCallback,
    TaskConfig,
    TaskDone,
    TaskId,
    TaskPoll,
)
from strictproxy.errors import Cancelled
from strictproxy.tasks.task import TaskState, TrackedTask
from tests.harness import ProxyTestCase, ScriptedPod, Wire, request, response

POLL = TaskPoll("/status/{id}", every=2.0, timeout=5.0)
DONE = TaskDone(json="/state", values=frozenset({"finished", "failed"}))
RELATED = ("/status/{id}", "/result/{id}")


class TrackedTaskTests(ProxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        # Polls come exactly after their interval.
        self.patch(random, "random", lambda: 0.5)

    def begin(self, pods: int = 1, limit: int = 1, **task: Any) -> None:
        config = TaskConfig(
            **{
                "id": TaskId(json="/task_id"),
                "poll": POLL,
                "done": DONE,
                "related": RELATED,
                **task,
            }
        )
        routes = [
            RouteConfig("submit", Match(path="/submit"), "u", task=config),
            RouteConfig("rest", Match(prefix="/"), "u"),
        ]
        self.start(pods, limit, routes=routes)
        self.tasks = self.proxy.tasks

    async def shut_down(self) -> None:
        if hasattr(self, "tasks"):
            self.tasks.stop()
        await super().shut_down()

    async def arrival(self, part: bytes, pod: ScriptedPod | None = None) -> Wire:
        """Return the connection, of a pod or any, that brought this; what it brought is taken."""
        pods = [pod] if pod is not None else self.pods
        found: list[Wire] = []

        def look() -> bool:
            for each in pods:
                for wire in each.connections:
                    if part in wire.received and b"\r\n\r\n" in wire.received:
                        found.append(wire)
                        return True
            return False

        await self.settled(look, f"{part!r} has come")
        return found[0]

    async def submit(self, task_id: str = "t1", status: str = "202 Accepted") -> Wire:
        """Submit one job; the pod answers with its id."""
        client = await self.client(request("/submit", method="POST", body=b"job"))
        wire = await self.arrival(b"POST /submit")
        wire.take()
        wire.send(response(b'{"task_id": "%b"}' % task_id.encode(), status=status))
        await client.has(b"task_id")
        return client

    async def poll(self, state: str, task_id: str = "t1", *, after: float = 2.0) -> Wire:
        """Let a poll be due, and answer it."""
        self.clock.advance(after)
        wire = await self.arrival(b"GET /status/%b " % task_id.encode())
        self.assertIn(b"strictproxy-task", wire.received)
        wire.take()
        wire.send(response(b'{"state": "%b"}' % state.encode()))
        await wire.end()
        return wire

    def running(self) -> list[str]:
        return [task.task_id for task in self.tasks]

    async def test_slot_is_held(self) -> None:
        """The answer goes through at once; the slot is free, and used, when a poll says so."""
        self.begin()
        await self.submit()
        self.assertEqual((self.counts(), self.running()), ((1, 0), ["t1"]))
        self.assertEqual([record.task for record in self.records], ["t1"])
        second = await self.client(request("/submit", method="POST", body=b"two"))
        await self.settled(lambda: self.counts() == (1, 1))
        await self.poll("running")
        self.assertEqual(self.counts(), (1, 1))
        await self.poll("finished")
        await self.settled(lambda: self.counts() == (1, 0))
        wire = await self.arrival(b"POST /submit")
        wire.send(response(b"no id"))
        await second.has(b"no id")
        await self.settled(lambda: self.counts() == (0, 0))

    async def test_no_task(self) -> None:
        """A submit call that fails, or whose answer has no id, gives its slot back at once."""
        self.begin()
        for status, body in (
            ("500 No", b'{"task_id": "t"}'), ("200 OK", b"{}"), ("200 OK", b"x" * 1_100_000),
        ):  # fmt: skip
            client = await self.client(request("/submit", method="POST", body=b"job"))
            wire = await self.arrival(b"POST /submit")
            wire.take()
            wire.send(response(body, status=status))
            await client.has(body[-20:])
            await self.settled(lambda: self.counts() == (0, 0))
            self.assertEqual(self.running(), [])

    async def test_answer_in_pieces(self) -> None:
        """The id is found however the answer comes."""
        self.begin()
        client = await self.client(request("/submit", method="POST", body=b"job"))
        wire = await self.arrival(b"POST /submit")
        wire.take()
        wire.send(b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b'{"task', b'_id": ', b'"t9"}'):
            await client.has(b"202")
            wire.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            await client.has(piece)
        wire.send(b"0\r\n\r\n")
        await client.has(b"0\r\n\r\n")
        self.assertEqual((self.counts(), self.running()), ((1, 0), ["t9"]))

    async def test_related_calls(self) -> None:
        """They go to the pod that has the task, take no slot, and wait for nobody."""
        self.begin(pods=2)
        await self.submit("t1")
        await self.submit("t2")
        self.assertEqual(self.counts(), (2, 0))
        owners = {task.task_id: task.address for task in self.tasks}
        self.assertEqual(len(set(owners.values())), 2)
        waiting = await self.client(request("/submit", method="POST", body=b"job"))
        await self.settled(lambda: self.counts() == (2, 1))
        for task_id, address in owners.items():
            pod = next(pod for pod in self.pods if pod.address == address)
            client = await self.client(request(f"/result/{task_id}?x=1"))
            wire = await self.arrival(b"GET /result/%b?x=1 " % task_id.encode(), pod)
            wire.take()
            wire.send(response(b"result of " + task_id.encode()))
            await client.has(b"result of " + task_id.encode())
        self.assertEqual(self.counts(), (2, 1))
        waiting.reset()
        await self.settled(lambda: self.counts() == (2, 0))

    async def test_answer_that_passes_through(self) -> None:
        """A client that asks for the state ends the task as a poll does; another path does not."""
        self.begin()
        await self.submit()
        for path, state, running in (
            ("/status/t1", "running", 1), ("/result/t1", "finished", 1),
            ("/status/t1", "finished", 0),
        ):  # fmt: skip
            client = await self.client(request(path))
            wire = await self.arrival(b"GET %b " % path.encode())
            wire.take()
            wire.send(response(b'{"state": "%b"}' % state.encode()))
            await client.has(state.encode())
            await self.settled(lambda running=running: self.counts() == (running, 0))  # type: ignore[misc]
        # What is done can still be fetched.
        client = await self.client(request("/result/t1"))
        wire = await self.arrival(b"GET /result/t1 ")
        wire.send(response(b"the result"))
        await client.has(b"the result")

    async def test_unknown_and_lost(self) -> None:
        """An unknown id is 404; one whose pod does not know it any more is 410, and says why."""
        self.begin()
        client = await self.client(request("/result/none"))
        await client.has(b'"reason": "unknown_task"')
        self.assertIn(b"404", client.received)
        await self.submit()
        self.clock.advance(2.0)
        wire = await self.arrival(b"GET /status/t1 ")
        wire.take()
        wire.send(response(status="404 Not Found"))
        await self.settled(lambda: self.counts() == (0, 0))
        client = await self.client(request("/result/t1"))
        await client.has(b'"reason": "task_gone"')
        self.assertIn(b"410", client.received)
        self.assertIn(b"does not know it any more (404)", client.received)

    async def test_pod_dies(self) -> None:
        """A pod that refuses three polls in a row has lost its tasks; a slow one has not."""
        self.begin()
        await self.submit()
        self.clock.advance(2.0)
        await self.arrival(b"GET /status/t1 ")
        self.clock.advance(5.0)
        await self.settled(lambda: self.task()._failures == 1)
        self.assertEqual(self.counts(), (1, 0))
        await self.pods[0].port.stopListening()
        for number in range(3):
            self.clock.advance(60.0)
            await self.settled(
                lambda number=number: not self.running() or self.task()._refused > number  # type: ignore[misc]
            )
        await self.settled(lambda: self.counts() == (0, 0))
        client = await self.client(request("/status/t1"))
        await client.has(b"its pod is gone")

    def task(self) -> TrackedTask:
        (task,) = self.tasks
        return task

    async def test_pod_leaves(self) -> None:
        """A pod that has left and does not answer has lost its tasks, at once."""
        self.begin(pods=2)
        await self.submit()
        address = self.task().address
        pod = next(pod for pod in self.pods if pod.address == address)
        self.publish([each.address for each in self.pods if each is not pod])
        self.assertEqual(self.counts(), (1, 0))
        await pod.port.stopListening()
        self.clock.advance(2.0)
        await self.settled(lambda: self.counts() == (0, 0))

    async def test_related_call_to_a_dead_pod(self) -> None:
        """What cannot be reached is 410."""
        self.begin()
        await self.submit()
        for connection in self.pods[0].connections:
            connection.reset()
        await self.pods[0].port.stopListening()
        await self.settled(lambda: not self.upstream.pool._open)
        client = await self.client(request("/result/t1"))
        await client.has(b'"reason": "task_gone"')
        self.assertEqual(self.counts(), (1, 0))

    async def test_limit_time(self) -> None:
        """After its longest time a task has no slot any more."""
        self.begin(poll=None, limit_time=60.0)
        await self.submit()
        self.clock.advance(59.0)
        self.proxy.sweep()
        self.assertEqual(self.counts(), (1, 0))
        self.clock.advance(1.0)
        self.proxy.sweep()
        self.assertEqual(self.counts(), (0, 0))

    async def test_kept_and_forgotten(self) -> None:
        """Ended tasks are remembered for a while, and no more of them than a bound."""
        self.begin(keep=100.0)
        await self.submit()
        task = self.task()
        task.end(TaskState.DONE, "the test says so")
        task.end(TaskState.LOST, "twice")
        self.assertIs(self.tasks.find("/result/t1"), task)
        self.assertIs(task.state, TaskState.DONE)
        self.clock.advance(100.0)
        self.proxy.sweep()
        client = await self.client(request("/result/t1"))
        await client.has(b"unknown_task")
        from strictproxy.tasks import tracked

        self.patch(tracked, "_MOST_ENDED", 1)
        for name in ("a", "b"):
            await self.submit(name)
            self.task().end(TaskState.DONE, "so")
        client = await self.client(request("/result/a"))
        await client.has(b"unknown_task")

    async def test_callback(self) -> None:
        """The pod gets a URL that nobody can guess, and calls it when the job is done."""
        self.begin(poll=None, done=None, callback=TaskCallback("X-Done", "http://proxy:8080/"))
        client = await self.client(
            request("/submit", "X-Done: http://evil/", method="POST", body=b"job")
        )
        wire = await self.arrival(b"POST /submit")
        head = wire.take().decode()
        (url,) = [line[8:] for line in head.split("\r\n") if line.startswith("X-Done: ")]
        self.assertTrue(url.startswith("http://proxy:8080/.strictproxy/callback/"))
        path = url.removeprefix("http://proxy:8080")
        wire.send(response(b'{"task_id": "t1"}'))
        await client.has(b"t1")
        for wrong in (path[:-1] + "!", "/.strictproxy/callback/", path + "/"):
            guess = await self.client(request(wrong, method="POST", body=b"{}"))
            await guess.has(b"404")
        self.assertEqual(self.counts(), (1, 0))
        call = await self.client(request(path, method="POST", body=b"{}"))
        await call.has(b"204")
        self.assertEqual(self.counts(), (0, 0))
        again = await self.client(request(path))
        await again.has(b"204")

    async def test_early_callback(self) -> None:
        """A pod that is done before it has answered the submit call holds its slot no longer."""
        self.begin(poll=None, done=None, callback=TaskCallback("X-Done", "http://proxy"))
        client = await self.client(request("/submit", method="POST", body=b"job"))
        wire = await self.arrival(b"POST /submit")
        head = wire.take().decode()
        path = head.split("X-Done: http://proxy")[1].split("\r\n")[0]
        call = await self.client(request(path))
        await call.has(b"204")
        self.assertEqual(self.counts(), (1, 0))
        wire.send(response(b'{"task_id": "t1"}'))
        await client.has(b"t1")
        await self.settled(lambda: self.counts() == (0, 0))
        self.assertFalse(self.tasks._early)
        client = await self.client(request("/submit", method="POST", body=b"job"))
        wire = await self.arrival(b"POST /submit")
        wire.send(response(b"{}"))
        await client.has(b"{}")
        self.assertEqual((len(self.tasks._tokens), self.tasks._awaited), (1, {}))

    async def test_done_at_once(self) -> None:
        """An answer to a submit call that says that the job is done holds nothing."""
        self.begin()
        client = await self.client(request("/submit", method="POST", body=b"job"))
        wire = await self.arrival(b"POST /submit")
        wire.send(response(b'{"task_id": "t1", "state": "finished"}'))
        await client.has(b"finished")
        await self.settled(lambda: self.counts() == (0, 0))

    async def test_same_id_again(self) -> None:
        """Said again by the same pod it is one job; by another pod it is two."""
        self.begin(pods=2, limit=2)
        await self.submit("same")
        first = self.task()
        await self.submit("same")
        self.assertEqual(len(self.tasks), 2)
        newest = self.tasks.find("/result/same")
        assert newest is not None
        self.assertNotEqual(newest.address, first.address)
        await self.submit("same")
        self.assertEqual((len(self.tasks), self.counts()), (2, (2, 0)))

    async def test_client_leaves(self) -> None:
        """A client that leaves while its job is submitted leaves a task behind, not a free slot."""
        self.begin()
        client = await self.client(request("/submit", method="POST", body=b"job"))
        wire = await self.arrival(b"POST /submit")
        client.reset()
        await self.settled(lambda: not self.site.channels)
        self.assertEqual(self.counts(), (1, 0))
        wire.send(response(b'{"task_id": "t1"}'))
        await self.settled(lambda: self.running() == ["t1"])
        self.assertEqual(self.counts(), (1, 0))

    async def test_operators(self) -> None:
        """A task is seen among what runs, is cancelled like a request, and is counted."""
        self.begin()
        await self.submit()
        (shown,) = self.upstream.running()
        self.assertEqual((shown.task_id, shown.route), ("t1", "submit"))
        self.assertTrue(self.proxy.uses(self.upstream))
        self.assertTrue(self.proxy.cancel(shown.number, Cancelled("it is enough")))
        self.assertFalse(self.proxy.cancel(shown.number, Cancelled("twice")))
        self.assertEqual(self.counts(), (0, 0))
        self.assertEqual(self.proxy.counters.of("submit").tasks, {"cancelled": 1})

    async def lose(self) -> Wire:
        """Submit a job that its pod then does not know any more; return its second submit call."""
        client = await self.client(
            b"POST /submit HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\njob\r\n0\r\n\r\n"
        )
        wire = await self.arrival(b"POST /submit")
        await wire.has(b"job")
        wire.take()
        wire.send(response(b'{"task_id": "t1"}'))
        await client.has(b"t1")
        self.clock.advance(2.0)
        wire = await self.arrival(b"GET /status/t1 ")
        wire.take()
        wire.send(response(status="404 Not Found"))
        return await self.arrival(b"POST /submit")

    async def test_resubmit(self) -> None:
        """A job whose pod lost it goes to another one; its client knows it by the same id."""
        self.begin(resubmit=True)
        wire = await self.lose()
        sent = await wire.has(b"0\r\n\r\n")
        self.assertIn(b"\r\n\r\n3\r\njob\r\n", sent)
        self.assertEqual(self.counts(), (1, 0))
        client = await self.client(request("/result/t1"))
        await client.has(b'"reason": "task_resubmitted"')
        wire.take()
        wire.send(response(b'{"task_id": "other"}'))
        await self.settled(lambda: self.running() == ["t1"])
        self.assertEqual(self.counts(), (1, 0))
        client = await self.client(request("/result/t1?x=/result/t1"))
        wire = await self.arrival(b"GET /result/other?x=/result/t1 ")
        wire.take()
        wire.send(response(b"not yet"))
        await client.has(b"not yet")
        self.assertEqual(self.task().record.pod_id, "other")
        await self.poll("running", "other")
        client = await self.client(request("/status/t1"))
        wire = await self.arrival(b"GET /status/other ")
        wire.take()
        wire.send(response(b'{"state": "finished"}'))
        await client.has(b"finished")
        await self.settled(lambda: self.counts() == (0, 0))
        self.assertEqual(self.proxy.counters.of("submit").tasks, {"lost": 1, "done": 1})
        self.assertIsNone(self.task_of("t1").submit)

    def task_of(self, task_id: str) -> TrackedTask:
        return self.tasks._by_id["submit", task_id]

    async def test_resubmit_in_vain(self) -> None:
        """What no pod takes stays lost, with why; so does a job that each loses."""
        self.begin(resubmit=True)
        for answer, reason in (
            (response(b"{}"), b"the answer has no id"), (response(status="500 No"), b"no id"),
            (b"nonsense\r\n\r\n", b"submitted again"),
        ):  # fmt: skip
            wire = await self.lose()
            await wire.has(b"0\r\n\r\n")
            wire.take()
            wire.send(answer)
            await self.settled(lambda: self.counts() == (0, 0))
            client = await self.client(request("/result/t1"))
            await client.has(b'"reason": "task_gone"')
            self.assertIn(reason, client.received)
            self.assertIsNone(self.task_of("t1").submit)
            self.assertEqual(self.tasks._again, {})
        wire = await self.lose()
        for number in range(2, 5):
            await wire.has(b"0\r\n\r\n")
            wire.take()
            wire.send(response(b'{"task_id": "n%d"}' % number))
            await self.settled(lambda: self.running() == ["t1"])
            self.clock.advance(2.0)
            wire = await self.arrival(b"GET /status/n%d " % number)
            wire.take()
            wire.send(response(status="404 Not Found"))
            if number < 4:
                wire = await self.arrival(b"POST /submit")
        await self.settled(lambda: self.counts() == (0, 0))
        client = await self.client(request("/result/t1"))
        await client.has(b'"reason": "task_gone"')

    async def test_resubmit_large(self) -> None:
        """Bodies that are kept in a file are sent again as well; who cancels ends that."""
        self.begin(resubmit=True)
        body = b"x" * 3_000_000
        client = await self.client(request("/submit", method="POST", body=body))
        wire = await self.arrival(b"POST /submit")
        await wire.until(lambda: wire.received.endswith(body))
        wire.take()
        wire.send(response(b'{"task_id": "t1"}'))
        await client.has(b"t1")
        self.task().end(TaskState.LOST, "the test says so")
        wire = await self.arrival(b"POST /submit")
        await wire.until(lambda: wire.received.endswith(body))
        wire.take()
        wire.send(response(b'{"task_id": "t2"}'))
        await self.settled(lambda: self.running() == ["t1"])
        (shown,) = self.upstream.running()
        self.assertTrue(self.proxy.cancel(shown.number, Cancelled("it is enough")))
        self.assertEqual(self.counts(), (0, 0))
        self.assertIsNone(self.task_of("t1").submit)

    async def test_reload(self) -> None:
        """Routes may vanish: tasks that run go on as they began."""
        self.begin()
        await self.submit()
        self.tasks.configure([])
        await self.poll("finished")
        await self.settled(lambda: self.counts() == (0, 0))
        self.assertIsNone(self.tasks.find("/result/t1"))
