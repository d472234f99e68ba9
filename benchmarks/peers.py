"""
strictproxy beside HAProxy, nginx, Envoy and Caddy: small requests, large bodies, waiting requests.

    make bench

Every peer and strictproxy in turn, several rounds, the proxy pinned to one core and
load and pods to the other; medians, and ratios to strictproxy. Peers that are
not installed are left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
BIG = 256 * 2**20
BIN = Path(sys.executable).parent

PODS = """
worker_processes 1; daemon off; pid {folder}/pods.pid; error_log {folder}/pods.err;
{user}
events {{ worker_connections 12000; }}
http {{
  access_log off; keepalive_requests 100000000; keepalive_timeout 600s; client_max_body_size 0;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{a} backlog=4096; listen 127.0.0.1:{b} backlog=4096; root {folder};
    location / {{ return 200 "hello\\n"; }}
    location /big {{ }}
    location /sink {{ proxy_pass http://127.0.0.1:{sink}; proxy_request_buffering off; proxy_http_version 1.1; }}
  }}
}}
"""

CONFIGS = {
    "strictproxy": """
listen: tcp:{port}:interface=127.0.0.1
upstreams: {{w: {{static: ["127.0.0.1:{a}", "127.0.0.1:{b}"], limit: 512, queue: {{size: 10000}}}}}}
routes: [{{prefix: /, upstream: w}}]
client: {{connections: 12000}}
log: {{access: false}}
""",
    "haproxy": """
global
  nbthread 1
  maxconn 8000
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout queue 600s
listen l
  bind 127.0.0.1:{port}
  balance leastconn
  server a 127.0.0.1:{a} maxconn 512
  server b 127.0.0.1:{b} maxconn 512
""",
    "nginx": """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
{user}
events {{ worker_connections 12000; }}
http {{
  access_log off; client_max_body_size 0; keepalive_requests 100000000;
  client_body_temp_path {folder}/b2; proxy_temp_path {folder}/p2; fastcgi_temp_path {folder}/f2;
  uwsgi_temp_path {folder}/u2; scgi_temp_path {folder}/s2;
  upstream w {{ least_conn; server 127.0.0.1:{a}; server 127.0.0.1:{b}; keepalive 512; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://w; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_max_temp_file_size 0; proxy_request_buffering off;
    }}
  }}
}}
""",
    "envoy": """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: i
          route_config: {{virtual_hosts: [{{name: v, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: c, timeout: 0s}}}}]}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: c
    type: STATIC
    lb_policy: LEAST_REQUEST
    circuit_breakers: {{thresholds: [{{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}}]}}
    load_assignment:
      cluster_name: c
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {a}}}}}}}
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {b}}}}}}}
""",
    "caddy": """
{{
  admin off
  auto_https off
}}
http://127.0.0.1:{port} {{
  reverse_proxy 127.0.0.1:{a} 127.0.0.1:{b} {{
    lb_policy least_conn
  }}
}}
""",
}

COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "strictproxy": lambda c: [str(BIN / "twistd"), "-n", "--pidfile=", "strictproxy", "-c", c],
    "haproxy": lambda c: ["haproxy", "-db", "-f", c],
    "nginx": lambda c: ["nginx", "-c", c],
    "envoy": lambda c: [
        "envoy",
        "-c",
        c,
        "--concurrency",
        "1",
        "-l",
        "error",
        "--use-dynamic-base-id",
    ],
    "caddy": lambda c: ["caddy", "run", "--adapter", "caddyfile", "--config", c],
}


@dataclass
class Proxy:
    name: str
    port: int
    process: subprocess.Popen[bytes]
    results: dict[str, list[float]] = field(default_factory=dict)

    def pids(self) -> list[int]:
        """The process and its children: nginx works in one."""
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        return [self.process.pid, *map(int, children.split())]

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        total = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICK

    def resident(self) -> int:
        """Bytes of memory of its own."""
        total = 0
        for pid in self.pids():
            found = re.search(r"^RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
            total += int(found[1]) * 1024 if found else 0
        return total

    def note(self, what: str, value: float) -> None:
        self.results.setdefault(what, []).append(value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def wait_for_port(port: int) -> bool:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.05)
    return False


def sink(port: int) -> subprocess.Popen[bytes]:
    """A pod that reads uploads and answers; nginx alone would keep them."""
    code = f"""
import asyncio
async def serve(reader, writer):
    while True:
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        left = int([l for l in head.lower().split(b"\\r\\n") if l.startswith(b"content-length")][0].split(b":")[1])
        while left:
            left -= len(await reader.read(min(left, 1 << 20)))
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", {port}, limit=1 << 20)
    await server.serve_forever()
asyncio.run(main())
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def small(proxy: Proxy, connections: int, seconds: int) -> None:
    before = proxy.cpu()
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--latency", f"http://127.0.0.1:{proxy.port}/"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    spent = proxy.cpu() - before
    found = re.search(r"(\d+) requests in ([\d.]+)s", done)
    assert found is not None, done
    count, took = int(found[1]), float(found[2])
    proxy.note(f"small, {connections} connections: CPU us per request", spent / count * 1e6)
    proxy.note(f"small, {connections} connections: requests/s", count / took)
    for percent in ("50", "99"):
        latency = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", done)
        assert latency is not None, done
        scale = {"us": 1, "ms": 1e3, "s": 1e6}[latency[2]]
        proxy.note(f"small, {connections} connections: p{percent} us", float(latency[1]) * scale)
    if "Non-2xx" in done or "Socket errors" in done:
        print(f"{proxy.name}: {done}")


def down(proxy: Proxy) -> None:
    before, began = proxy.cpu(), time.monotonic()
    subprocess.run(
        ["curl", "-sf", "-o", "/dev/null", f"http://127.0.0.1:{proxy.port}/big"], check=True
    )
    proxy.note("256 MiB down: CPU s/GiB", (proxy.cpu() - before) * 2**30 / BIG)
    proxy.note("256 MiB down: GiB/s", BIG / 2**30 / (time.monotonic() - began))


def up(proxy: Proxy, file: Path) -> None:
    before, began = proxy.cpu(), time.monotonic()
    url = f"http://127.0.0.1:{proxy.port}/"
    subprocess.run(
        ["curl", "-sf", "-o", "/dev/null", "-H", "Expect:", "-T", str(file), url], check=True
    )
    proxy.note("256 MiB up: CPU s/GiB", (proxy.cpu() - before) * 2**30 / BIG)
    proxy.note("256 MiB up: GiB/s", BIG / 2**30 / (time.monotonic() - began))


def waiting(proxy: Proxy, count: int) -> None:
    """Fill every slot of a pod that never answers, then let `count` more wait."""
    request = b"GET /wait HTTP/1.1\r\nHost: example.com\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
    sockets = []

    def connect(number: int) -> None:
        for _ in range(number):
            client = socket.create_connection(("127.0.0.1", proxy.port))
            client.sendall(request)
            sockets.append(client)
        time.sleep(1.5)

    connect(1024)
    before = proxy.resident()
    connect(count)
    proxy.note(f"{count} waiting: resident bytes each", (proxy.resident() - before) / count)
    for client in sockets:
        client.close()


def describe_machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def start(name: str, folder: Path, a: int, b: int) -> Proxy | None:
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    text = CONFIGS[name].format(port=port, a=a, b=b, folder=folder, user=user)
    return launch(name, text, port, folder)


def launch(name: str, text: str, port: int, folder: Path) -> Proxy | None:
    """Start a proxy, on the first core, with a configuration that makes it listen on `port`."""
    command = COMMANDS[name]
    config = folder / f"{name}-{port}.yaml"  # Envoy goes by the ending
    config.write_text(text)
    if shutil.which(command("")[0]) is None:
        print(f"{name} is not installed: left out")
        return None
    with (folder / f"{name}.log").open("ab") as log:
        pinned = ["taskset", "-c", "0", *command(str(config))]
        process = subprocess.Popen(pinned, stdout=log, stderr=log)
    if not wait_for_port(port):
        print(f"{name} did not start: left out\n{(folder / f'{name}.log').read_text()[-500:]}")
        process.kill()
        return None
    return Proxy(name, port, process)


def table(proxies: list[Proxy]) -> None:
    ours = proxies[0]
    names = [proxy.name for proxy in proxies]
    print("\n| median | " + " | ".join(names) + " |")
    print("| --- |" + " ---: |" * len(names))
    for what in ours.results:
        cells = []
        for proxy in proxies:
            if what not in proxy.results:
                cells.append("-")
                continue
            value = statistics.median(proxy.results[what])
            base = statistics.median(ours.results[what])
            ratio = "" if proxy is ours or not base else f" ({value / base:.2f})"
            cells.append(f"{value:,.2f}{ratio}" if value < 100 else f"{value:,.0f}{ratio}")
        print(f"| {what} | " + " | ".join(cells) + " |")
    print("\nIn brackets: the ratio to strictproxy.")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=int, default=4)
    arguments.add_argument("--waiting", type=int, default=5000)
    arguments.add_argument("--json", type=Path, help="write every median there")
    chosen = arguments.parse_args()
    os.sched_setaffinity(0, {1})
    folder = Path(tempfile.mkdtemp(prefix="strictproxy-bench-"))
    folder.chmod(0o755)
    big = folder / "big"
    big.write_bytes(bytes(BIG))
    a, b, upload, upload_too = (free_port() for _ in range(4))
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "pods.conf").write_text(PODS.format(folder=folder, a=a, b=b, sink=upload, user=user))
    children = [
        subprocess.Popen(["nginx", "-c", str(folder / "pods.conf")]),
        sink(upload),
        sink(upload_too),
    ]
    wait_for_port(a)
    wait_for_port(upload)
    wait_for_port(upload_too)
    print(describe_machine())
    proxies: list[Proxy] = []
    try:
        proxies = [each for name in CONFIGS if (each := start(name, folder, a, b)) is not None]
        for number in range(chosen.rounds):
            for proxy in proxies:
                for connections in (1, 32, 256):
                    small(proxy, connections, chosen.seconds)
                down(proxy)
            print(
                f"round {number + 1} of {chosen.rounds}: small requests and downloads done",
                flush=True,
            )
        for proxy in proxies:
            proxy.process.send_signal(signal.SIGTERM)
        uploads = [
            each
            for name in CONFIGS
            if (each := start(name, folder, upload, upload_too)) is not None
        ]
        children += [proxy.process for proxy in uploads]
        for _ in range(chosen.rounds):
            for proxy in uploads:
                up(proxy, big)
        # A pod that takes connections and never answers.
        with socket.socket() as first, socket.socket() as second:
            for silent in (first, second):
                silent.bind(("127.0.0.1", 0))
                silent.listen(4096)
            for name in ("strictproxy", "haproxy"):
                queue = start(name, folder, first.getsockname()[1], second.getsockname()[1])
                if queue is not None:
                    children.append(queue.process)
                    waiting(queue, chosen.waiting)
                    uploads.append(queue)
        for measured in uploads:
            for proxy in proxies:
                if proxy.name == measured.name:
                    proxy.results.update(measured.results)
        table(proxies)
        if chosen.json:
            medians = {
                proxy.name: {what: statistics.median(v) for what, v in proxy.results.items()}
                for proxy in proxies
            }
            chosen.json.write_text(json.dumps(medians, indent=1))
    finally:
        for child in [*children, *(proxy.process for proxy in proxies)]:
            if child.poll() is None:
                child.terminate()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
