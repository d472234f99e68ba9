"""Detached requests with real processes that are killed at any moment."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.test_system import SystemTestCase, free_port

#: Goes on with a job although whoever sent it is gone, as most services do.
APPLICATION = """
import asyncio, hashlib, random
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

runs, now, most = {}, 0, 0

async def job(request):
    global now, most
    number = request.path_params["number"]
    body = await request.body()
    now += 1
    most = max(most, now)
    runs[number] = runs.get(number, 0) + 1
    await asyncio.sleep(float(request.query_params["seconds"]))
    now -= 1
    data = random.Random(number).randbytes(number * 2000)
    return Response(hashlib.sha256(body).digest() + data, headers={"X-Number": str(number)})

async def stats(request):
    return JSONResponse({"most": most, "now": now, "runs": runs})

app = Starlette(routes=[
    Route("/{kind}/{number:int}", job, methods=["POST"]),
    Route("/stats", stats),
])
"""


class KilledTests(SystemTestCase):
    JOBS, PODS, LIMIT, KILLS = 200, 4, 3, 5

    def test_killed_five_times(self) -> None:
        """
        Each job ends exactly once: done with its own whole result, or interrupted.

        Interrupted ones are those that may not be repeated and that a pod had
        when the proxy was killed. No pod ever has more than it may.
        """
        port = free_port("0.0.0.0")
        hosts = [f"127.0.8.{n + 1}" for n in range(self.PODS)]
        self.uvicorns(hosts, port, APPLICATION)
        self.stats_urls = [f"http://{host}:{port}/stats" for host in hosts]
        tasks = self.folder / "tasks"
        tasks.mkdir()
        static = ", ".join(f'"{host}:{port}"' for host in hosts)
        chance = random.Random(11)
        jobs = [
            (number, chance.choice(["once", "often"]), chance.uniform(0.05, 2.0))
            for number in range(1, self.JOBS + 1)
        ]
        self.proxy = self.twistd(
            f"upstreams:\n  pods: {{static: [{static}], limit: {self.LIMIT}}}\n"
            "routes:\n"
            "  - {prefix: /once, upstream: pods, detach: {hold_interrupted: 3s}}\n"
            "  - {prefix: /often, upstream: pods,"
            " detach: {hold_interrupted: 3s, repeat: true}}\n"
            f"tasks: {{directory: {tasks}}}\n"
        )
        ended = threading.Event()
        with ThreadPoolExecutor(16) as pool:
            killer = pool.submit(self.kill_now_and_then, ended, chance.random())
            locations = list(pool.map(self.submit, jobs))
            self.assertEqual(killer.result(120), self.KILLS)
            ended.set()
            states = list(pool.map(self.end_of, locations))
            results = list(pool.map(self.result_of, locations))
        self.check(jobs, states, results)

    def kill_now_and_then(self, ended: threading.Event, seed: float) -> int:
        chance = random.Random(seed)
        for number in range(self.KILLS):
            # Every other one comes while pods are at work still on what the one before interrupted.
            ended.wait(chance.uniform(0.5, 3.0) if number % 2 == 0 else 0.1)
            self.proxy.kill()
            self.proxy.wait()
            self.proxy = self.run_proxy()
        return self.KILLS

    def keep_asking(self, call: urllib.request.Request) -> tuple[int, Any, bytes]:
        """Ask until there is a whole answer: the proxy is not always there."""
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(call, timeout=60) as answer:
                    return answer.status, answer.headers, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.headers, error.read()
            except (OSError, http.client.HTTPException):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def body_of(self, number: int) -> bytes:
        return random.Random(-number).randbytes(number * 500)

    def submit(self, job: tuple[int, str, float]) -> str:
        number, kind, seconds = job
        headers = {"Prefer": "respond-async", "Idempotency-Key": f"job-{number}"}
        call = urllib.request.Request(
            f"{self.url}/{kind}/{number}?seconds={seconds:.3f}",
            self.body_of(number), headers, method="POST",
        )  # fmt: skip
        status, found, body = self.keep_asking(call)
        self.assertEqual(status, 202, body)
        location: str = found["Location"]
        return location

    def end_of(self, location: str) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            call = urllib.request.Request(self.url + location, headers={"Prefer": "wait=10"})
            status, _, body = self.keep_asking(call)
            self.assertEqual(status, 200, body)
            state: dict[str, Any] = json.loads(body)
            if state["state"] not in ("queued", "running"):
                return state
        raise AssertionError(f"it does not end: {location}")

    def result_of(self, location: str) -> tuple[int, Any, bytes]:
        return self.keep_asking(urllib.request.Request(f"{self.url}{location}/result"))

    def stats(self) -> list[dict[str, Any]]:
        return [json.loads(self.get(url)[1]) for url in self.stats_urls]

    def check(self, jobs: list[Any], states: list[Any], results: list[Any]) -> None:
        # Pods go on with what was interrupted.
        self.wait_for(lambda: not any(each["now"] for each in self.stats()), "pods have ended")
        stats = self.stats()
        runs: Counter[int] = Counter()
        for each in stats:
            runs.update({int(number): count for number, count in each["runs"].items()})
        self.assertEqual(len({state["id"] for state in states}), self.JOBS)
        for (number, kind, _), state, (status, headers, body) in zip(
            jobs, states, results, strict=True
        ):
            if state["state"] == "done":
                self.assertEqual((status, headers["X-Number"]), (200, str(number)))
                expected = hashlib.sha256(self.body_of(number)).digest()
                expected += random.Random(number).randbytes(number * 2000)
                self.assertEqual(body, expected, f"job {number} has another result")
                self.assertGreaterEqual(runs[number], 1)
            else:
                self.assertEqual((state["state"], state["reason"]), ("failed", "interrupted"))
                self.assertEqual((kind, status), ("once", 503))
            if kind == "once":
                self.assertLessEqual(runs[number], 1, f"job {number} ran again")
        self.assertLessEqual(max(each["most"] for each in stats), self.LIMIT, stats)
        outcomes = Counter(state["state"] for state in states)
        again = sum(runs.values()) - len(runs)
        print(
            f"\n{self.JOBS} detached jobs, {self.KILLS} x SIGKILL: {outcomes['done']} done,"
            f" {outcomes['failed']} interrupted, {again} runs were repeated; most at once on a pod:"
            f" {max(each['most'] for each in stats)} of {self.LIMIT}"
        )
        self.assertGreater(outcomes["failed"] + again, 0, "no kill met a running job")
