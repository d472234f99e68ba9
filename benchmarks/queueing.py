"""
How close each proxy comes to one ideal central queue, and how fast a freed slot is used.

    make bench

Pods with a few slots each, jobs whose length the client decides, so that every
proxy gets the same ones. A pod runs at most as many at once as it has slots and
keeps the others waiting, as a real one would. What the ideal would have done is
computed from the same arrivals and from the time that each job really took, so
that the clocks of this machine are not held against anybody.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peers import COMMANDS, Proxy, describe_machine, free_port, launch

SPECS: dict[str, tuple[str, str]] = {
    # label: (program, balancing)
    "strictproxy": ("strictproxy", ""),
    "haproxy": ("haproxy", ""),
    "nginx random": ("nginx", "random;"),
    "nginx round robin": ("nginx", ""),
    "nginx least_conn": ("nginx", "least_conn;"),
    "envoy": ("envoy", ""),
    "caddy": ("caddy", ""),
}


def config_of(label: str, port: int, pods: Sequence[int], limit: int, folder: Path) -> str:
    program, balancing = SPECS[label]
    if program == "strictproxy":
        static = ", ".join(f'"127.0.0.1:{pod}"' for pod in pods)
        return (
            f"listen: tcp:{port}:interface=127.0.0.1\n"
            f"upstreams: {{w: {{static: [{static}], limit: {limit}, queue: {{size: 10000}}}}}}\n"
            "routes: [{prefix: /, upstream: w}]\nlog: {access: false}\n"
        )
    if program == "haproxy":
        servers = "\n".join(f"  server s{pod} 127.0.0.1:{pod} maxconn {limit}" for pod in pods)
        return (
            "global\n  nbthread 1\n  maxconn 8000\ndefaults\n  mode http\n  timeout connect 5s\n"
            "  timeout client 60s\n  timeout server 60s\n  timeout queue 60s\n"
            f"listen l\n  bind 127.0.0.1:{port}\n  balance leastconn\n{servers}\n"
        )
    if program == "nginx":
        user = "user root;" if os.geteuid() == 0 else ""
        servers = " ".join(f"server 127.0.0.1:{pod};" for pod in pods)
        return (
            f"worker_processes 1; daemon off; pid {folder}/{port}.pid; error_log stderr; {user}\n"
            "events { worker_connections 12000; }\nhttp { access_log off;\n"
            f"  upstream w {{ {balancing} {servers} keepalive 512; }}\n"
            f"  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{\n"
            '    proxy_pass http://w; proxy_http_version 1.1; proxy_set_header Connection "";\n'
            "  } }\n}\n"
        )
    if program == "caddy":
        backends = " ".join(f"127.0.0.1:{pod}" for pod in pods)
        return (
            f"{{\n  admin off\n  auto_https off\n}}\nhttp://127.0.0.1:{port} {{\n"
            f"  reverse_proxy {backends} {{\n    lb_policy least_conn\n  }}\n}}\n"
        )
    manager = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": pod}}}}
        for pod in pods
    ]
    thresholds = dict.fromkeys(("max_connections", "max_requests"), 100000)
    route = {"match": {"prefix": "/"}, "route": {"cluster": "c", "timeout": "0s"}}
    filters = {
        "@type": f"{manager}.HttpConnectionManager",
        "stat_prefix": "i",
        "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                },
            }
        ],
    }
    chain = {"name": "envoy.filters.network.http_connection_manager", "typed_config": filters}
    cluster = {
        "name": "c",
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [{**thresholds, "max_pending_requests": 100000}]},
        "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    listener = {"address": address, "filter_chains": [{"filters": [chain]}]}
    return json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}})


class Pod:
    """Runs at most `slots` jobs at once; remembers the most it was given, and its gaps."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.here = 0
        self.most = 0
        self.running = 0
        self.waiting: deque[PodProtocol] = deque()
        #: when an answer was complete, while no other request was here
        self.freed: float | None = None
        self.gaps: list[float] = []

    def came(self, connection: PodProtocol) -> None:
        if self.freed is not None:
            self.gaps.append(time.perf_counter() - self.freed)
            self.freed = None
        self.here += 1
        self.most = max(self.most, self.here)
        self.waiting.append(connection)
        self._next()

    def _next(self) -> None:
        while self.waiting and self.running < self.slots:
            self.running += 1
            connection = self.waiting.popleft()
            loop = asyncio.get_running_loop()
            loop.call_later(connection.seconds, self._done, connection, time.perf_counter())

    def _done(self, connection: PodProtocol, began: float) -> None:
        took = b"%.6f" % (time.perf_counter() - began)
        connection.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(took), took)
        )
        self.running -= 1
        self.here -= 1
        if not self.here:
            self.freed = time.perf_counter()
        self._next()


class PodProtocol(asyncio.Protocol):
    transport: asyncio.Transport
    seconds = 0.0

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._data.endswith(b"\r\n\r\n"):
            self.seconds = float(self._data.split(b" ", 2)[1].lstrip(b"/") or b"0")
            self._data = b""
            self._pod.came(self)


@dataclass
class Done:
    came: float
    took: float
    ended: float

    @property
    def latency(self) -> float:
        return self.ended - self.came

    @property
    def waited(self) -> float:
        return max(0.0, self.latency - self.took)


class Client:
    """Sends jobs through a proxy; connections are kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def job(self, seconds: float) -> Done:
        came = time.perf_counter()
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"GET /%.6f HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % seconds)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        )
        body = await reader.readexactly(length)
        ended = time.perf_counter()
        if b" 200 " not in head[:20] or not body:
            raise SystemExit(f"an answer that no pod gave: {head!r}")
        self._idle.append((reader, writer))
        return Done(came, float(body), ended)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def closed_loop(client: Client, jobs: Sequence[float], clients: int) -> list[Done]:
    left = iter(jobs)

    async def one() -> list[Done]:
        return [await client.job(seconds) for seconds in left]

    results = await asyncio.gather(*(one() for _ in range(clients)))
    return sorted((done for results_ in results for done in results_), key=lambda done: done.came)


async def open_loop(client: Client, jobs: Sequence[float], rate: float) -> list[Done]:
    arrivals = random.Random(2)
    began = time.perf_counter()
    when = 0.0
    running = []
    for seconds in jobs:
        when += arrivals.expovariate(rate)
        if (pause := began + when - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
        running.append(asyncio.create_task(client.job(seconds)))
    return list(await asyncio.gather(*running))


def ideal(done: Sequence[Done], slots: int, clients: int | None) -> list[Done]:
    """
    Return what one central queue in front of all slots would have made of the same jobs.

    With `clients`, each of so many has its next job as soon as the one before is done.
    """
    free = [0.0] * slots
    result = []
    ready = [done[0].came] * (clients or 0)
    for each in sorted(done, key=lambda done: done.came):
        came = heapq.heappop(ready) if clients else each.came
        ended = max(came, heapq.heappop(free)) + each.took
        heapq.heappush(free, ended)
        if clients:
            heapq.heappush(ready, ended)
        result.append(Done(came, each.took, ended))
    return result


def lognormal(count: int, mean: float, sigma: float) -> list[float]:
    numbers = random.Random(1)
    mu = math.log(mean) - sigma**2 / 2
    return [numbers.lognormvariate(mu, sigma) for _ in range(count)]


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def figures(done: Sequence[Done]) -> dict[str, float]:
    latencies = [each.latency for each in done]
    waits = [each.waited for each in done]
    return {
        "makespan": max(each.ended for each in done) - min(each.came for each in done),
        "mean": statistics.fmean(latencies),
        "p95": percentile(latencies, 95),
        "p99": percentile(latencies, 99),
        "mean wait": statistics.fmean(waits),
        "p99 wait": percentile(waits, 99),
    }


@dataclass(frozen=True)
class Scenario:
    name: str
    pods: int
    limit: int
    jobs: tuple[float, ...]
    clients: int | None = None
    rate: float = 0.0


def scenarios(scale: float) -> list[Scenario]:
    heavy = lognormal(int(600 * scale), 0.1, 1.0)
    varied = lognormal(int(3000 * scale), 0.02, 1.27)
    return [
        Scenario("8 x 2, closed loop at 1.5", 8, 2, tuple(heavy), clients=24),
        Scenario("8 x 2, open loop at 0.8", 8, 2, tuple(heavy), rate=0.8 * 16 / 0.1),
        Scenario("10 x 1, high variance at 0.9", 10, 1, tuple(varied), rate=0.9 * 10 / 0.02),
        Scenario("hand-over: 4 x 1, 16 clients", 4, 1, (0.005,) * int(2000 * scale), clients=16),
    ]


async def run(label: str, scenario: Scenario, folder: Path) -> dict[str, float] | None:
    pods = [Pod(scenario.limit) for _ in range(scenario.pods)]
    ports = [free_port() for _ in pods]
    loop = asyncio.get_running_loop()
    servers = []
    for pod, port in zip(pods, ports, strict=True):

        def make(pod: Pod = pod) -> PodProtocol:
            return PodProtocol(pod)

        servers.append(await loop.create_server(make, "127.0.0.1", port, backlog=1024))
    listen = free_port()
    text = config_of(label, listen, ports, scenario.limit, folder)
    proxy: Proxy | None = launch(SPECS[label][0], text, listen, folder)
    if proxy is None:
        return None
    client = Client(listen)
    try:
        await closed_loop(client, [0.001] * 50, 4)  # connections, caches
        for pod in pods:
            pod.most, pod.freed = 0, None
            pod.gaps.clear()
        load: Awaitable[list[Done]]
        if scenario.clients:
            load = closed_loop(client, scenario.jobs, scenario.clients)
        else:
            load = open_loop(client, scenario.jobs, scenario.rate)
        done = await asyncio.wait_for(load, 120)
    finally:
        client.close()
        proxy.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            proxy.process.wait(10)
        if proxy.process.poll() is None:
            proxy.process.kill()
        for server in servers:
            server.close()
    best = figures(ideal(done, scenario.pods * scenario.limit, scenario.clients))
    got = figures(done)
    result = {f"{name} x ideal": got[name] / best[name] for name in got if best[name] > 1e-4}
    result |= {f"{name}, ms": got[name] * 1e3 for name in got}
    result["most in flight at a pod"] = max(pod.most for pod in pods)
    gaps = [gap for pod in pods for gap in pod.gaps]
    if scenario.limit == 1 and scenario.clients and gaps:
        result["hand-over p50, ms"] = percentile(gaps, 50) * 1e3
        result["hand-over p99, ms"] = percentile(gaps, 99) * 1e3
    return result


SHOWN: dict[bool, tuple[str, ...]] = {
    False: (
        "makespan x ideal", "mean x ideal", "p95 x ideal", "p99 x ideal",
        "mean wait, ms", "p99 wait, ms", "p99 wait x ideal", "most in flight at a pod",
    ),
    True: ("hand-over p50, ms", "hand-over p99, ms", "makespan x ideal", "most in flight at a pod"),
}  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--scale", type=float, default=1.0, help="how many jobs, 1 is ~5 s each")
    arguments.add_argument("--only", nargs="*", default=list(SPECS), choices=list(SPECS))
    arguments.add_argument("--json", type=Path, help="write every figure there")
    chosen = arguments.parse_args()
    os.sched_setaffinity(0, {1})
    folder = Path(tempfile.mkdtemp(prefix="strictproxy-bench-"))
    print(describe_machine())
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    missing = {name for name in chosen.only if not shutil.which(COMMANDS[SPECS[name][0]]("")[0])}
    if missing:
        print(f"not installed, left out: {', '.join(sorted(missing))}")
    try:
        for number in range(chosen.rounds):
            for scenario in scenarios(chosen.scale):
                for label in chosen.only:
                    if label in missing:
                        continue
                    found = asyncio.run(run(label, scenario, folder))
                    for name, value in (found or {}).items():
                        by_proxy = results.setdefault(scenario.name, {}).setdefault(label, {})
                        by_proxy.setdefault(name, []).append(value)
            print(f"round {number + 1} of {chosen.rounds} done", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {
        scenario: {
            label: {name: statistics.median(values) for name, values in figures_.items()}
            for label, figures_ in by_proxy.items()
        }
        for scenario, by_proxy in results.items()
    }
    for scenario_name, by_label in medians.items():
        shown = SHOWN[scenario_name.startswith("hand-over")]
        print(f"\n| {scenario_name} | " + " | ".join(shown) + " |")
        print("| --- |" + " ---: |" * len(shown))
        for label, figures_ in by_label.items():
            cells = [f"{figures_[name]:.3g}" if name in figures_ else "-" for name in shown]
            print(f"| {label} | " + " | ".join(cells) + " |")
    if chosen.json:
        chosen.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
