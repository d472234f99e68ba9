"""
Asynchronous services behind the proxy, written as anybody would: Starlette with background tasks.

Each pod counts by itself how many jobs it works on at once.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest

from tests.test_system import ROOT, SystemTestCase, free_port

#: Knows nothing of any proxy, but calls a URL when it is done if it is told one.
APPLICATION = """
import asyncio, urllib.request, uuid
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse
from starlette.routing import Route

jobs, now, most = {}, 0, 0

async def work(job, seconds, url):
    global now, most
    now += 1
    most = max(most, now)
    await asyncio.sleep(seconds)
    now -= 1
    jobs[job] = "finished"
    if url:
        call = urllib.request.Request(url, method="POST")
        await asyncio.to_thread(lambda: urllib.request.urlopen(call, timeout=10).close())

async def submit(request):
    seconds = (await request.json())["seconds"]
    job = uuid.uuid4().hex
    jobs[job] = "running"
    task = BackgroundTask(work, job, seconds, request.headers.get("x-done-url"))
    return JSONResponse({"task_id": job}, status_code=202, background=task)

async def status(request):
    state = jobs.get(request.path_params["job"])
    if state is None:
        return JSONResponse({"error": "unknown"}, status_code=404)
    return JSONResponse({"state": state})

async def stats(request):
    return JSONResponse({"most": most, "now": now, "jobs": len(jobs)})

app = Starlette(routes=[
    Route("/submit", submit, methods=["POST"]),
    Route("/status/{job}", status),
    Route("/stats", stats),
])
"""


class AsynchronousServiceTests(SystemTestCase):
    JOBS, PODS, LIMIT = 500, 8, 2

    def start(self, task: str) -> list[str]:
        port = free_port("0.0.0.0")
        hosts = [f"127.0.6.{n + 1}" for n in range(self.PODS)]
        self.uvicorns(hosts, port, APPLICATION)
        static = ", ".join(f'"{host}:{port}"' for host in hosts)
        self.twistd(
            f"upstreams:\n  jobs:\n    static: [{static}]\n    limit: {self.LIMIT}\n"
            "    queue: {size: 1000}\n"
            "routes:\n  - path: /submit\n    upstream: jobs\n    task:\n"
            "      id: {json: /task_id}\n"
            "      done: {json: /state, in: [finished, failed]}\n"
            "      related: ['/status/{id}']\n"
            f"{task}"
        )
        return [f"http://{host}:{port}/stats" for host in hosts]

    def submit(self, seconds: float) -> str:
        data = json.dumps({"seconds": seconds}).encode()
        call = urllib.request.Request(f"{self.url}/submit", data, method="POST")
        with urllib.request.urlopen(call, timeout=120) as answer:
            task_id: str = json.load(answer)["task_id"]
            return task_id

    def run_jobs(self, pods: list[str], scale: float = 1.0) -> float:
        """
        Submit all jobs; return the makespan over the ideal one.

        :param scale: how much longer jobs are than a quarter of a second.
        """
        chance = random.Random(7)
        jobs = [scale * min(chance.lognormvariate(-1.6, 0.6), 1.5) for _ in range(self.JOBS)]
        slots = [0.0] * (self.PODS * self.LIMIT)
        for seconds in jobs:
            slots[slots.index(min(slots))] += seconds
        began = time.monotonic()
        with ThreadPoolExecutor(64) as pool:
            ids = list(pool.map(self.submit, jobs))
        self.wait_for(lambda: self.state()["jobs"]["running"] == 0, "every job is done", 60)
        took = time.monotonic() - began
        self.assertEqual(len(set(ids)), self.JOBS)
        stats = [json.loads(self.get(url)[1]) for url in pods]
        self.assertEqual(sum(each["jobs"] for each in stats), self.JOBS)
        self.assertEqual([each["now"] for each in stats], [0] * self.PODS)
        self.assertLessEqual(max(each["most"] for each in stats), self.LIMIT, stats)
        # Whoever asks about a job reaches the pod that had it.
        for task_id in ids[:: self.JOBS // 20]:
            code, body = self.get(f"{self.url}/status/{task_id}")
            self.assertEqual((code, json.loads(body)), (200, {"state": "finished"}))
        code, body = self.get(f"{self.url}/status/nobody")
        self.assertEqual((code, json.loads(body)["reason"]), (404, "unknown_task"))
        return took / max(slots)

    def test_polls(self) -> None:
        """By polls every 200 ms: never more than two jobs at once on a pod, none lost."""
        pods = self.start("      poll: {path: '/status/{id}', every: 200ms, timeout: 5s}\n")
        # A poll comes half an interval late, on average: 0.1 s of a job of a second.
        ratio = self.run_jobs(pods, scale=4.0)
        print(f"\n500 jobs, polls every 200 ms: makespan {ratio:.2f} x ideal")

    def test_callbacks(self) -> None:
        """By callbacks: the same."""
        base = "http://127.0.0.1:LISTEN"
        original = self.twistd

        def twistd(config: str) -> Any:
            # The port is known only now, so the configuration names one that is free.
            port = free_port()
            config = config.replace("LISTEN", str(port))
            process = original(config, listen=f"tcp:{port}:interface=127.0.0.1")
            self.url = f"http://127.0.0.1:{port}"
            return process

        self.twistd = twistd  # type: ignore[method-assign,assignment]
        pods = self.start(f"      callback: {{header: X-Done-Url, base: '{base}'}}\n")
        ratio = self.run_jobs(pods)
        print(f"\n500 jobs, callbacks: makespan {ratio:.2f} x ideal")


class TranscodingTests(SystemTestCase):
    """The example, with real clips."""

    EXAMPLE = ROOT / "examples" / "transcoding"

    def setUp(self) -> None:
        super().setUp()
        missing = [name for name in ("ffmpeg", "ffprobe") if not shutil.which(name)]
        if missing:
            raise SkipTest(f"not installed (Debian's package ffmpeg): {', '.join(missing)}")

    def probe(self, clip: Path) -> dict[str, Any]:
        done = subprocess.run(
            ["ffprobe", "-v", "error", "-show_streams", "-of", "json", str(clip)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (stream,) = json.loads(done.stdout)["streams"]
        return {key: stream[key] for key in ("codec_name", "width", "height", "nb_frames")}

    def test_all_ways(self) -> None:
        """Real clips in, real clips out, in all three ways at once; never two on one pod."""
        port = free_port("0.0.0.0")
        hosts = ["127.0.7.1", "127.0.7.2"]
        for host in hosts:
            self.spawn(
                sys.executable, "-m", "uvicorn", "--host", host, "--port", str(port),
                "--log-level", "warning", "service:app", log=f"{host}.log", cwd=self.EXAMPLE,
            )  # fmt: skip
        for host in hosts:
            self.wait_for(
                lambda host=host: self.get(f"http://{host}:{port}/stats")[0] == 200, f"{host}"
            )
        static = ", ".join(f'"{host}:{port}"' for host in hosts)
        text = (self.EXAMPLE / "strictproxy.yaml").read_text()
        text = re.sub(r"    dns: .*", f"    static: [{static}]", text)
        (self.folder / "tasks").mkdir()
        text = text.replace("${TASKS:-/var/lib/strictproxy}", str(self.folder / "tasks"))
        self.twistd(
            re.sub(r"(?m)^(listen|admin): .*\n", "", text).replace("every: 1s", "every: 100ms")
        )
        original = self.folder / "clip.mp4"
        subprocess.run(
            ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i",
             "testsrc=duration=2:size=320x240:rate=25", "-pix_fmt", "yuv420p", str(original)],
            check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        clients = []
        ways: list[list[str]] = [[], ["-a"], ["-d"]]
        for number in range(9):
            clip = self.folder / f"clip{number}.mp4"
            # The same clip with the same key would be the same task.
            clip.write_bytes(original.read_bytes() + b"\0" * number)
            kind = ways[number % 3]
            clients.append(
                self.spawn(
                    str(self.EXAMPLE / "client.sh"), *kind, self.url, str(clip), log="client.log"
                )
            )
        for client in clients:
            self.assertEqual(client.wait(60), 0, (self.folder / "client.log").read_text())
        expected = {"codec_name": "h264", "width": 160, "height": 120, "nb_frames": "50"}
        for number in range(9):
            self.assertEqual(self.probe(self.folder / f"clip{number}.small.mp4"), expected)
        for host in hosts:
            stats = json.loads(self.get(f"http://{host}:{port}/stats")[1])
            self.assertEqual(stats, {"most": 1, "working": 0})
        # What is no clip fails in each way, and holds no slot.
        broken = self.folder / "broken.mp4"
        broken.write_bytes(b"no clip")
        for kind in ways:
            failing = self.spawn(
                str(self.EXAMPLE / "client.sh"), *kind, self.url, str(broken), log="broken.log"
            )
            self.assertNotEqual(failing.wait(30), 0)
        self.wait_for(lambda: self.state()["transcode"]["running"] == 0, "every slot is free")
