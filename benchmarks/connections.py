"""
Many connections: 10,000 idle and 5,000 waiting, past the limits, and back to nothing.

    python benchmarks/connections.py [--files 20000] [--idle 10000] [--waiting 5000]

Prints what they cost, and fails if anything is lost or does not recover.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BIN = Path(sys.executable).parent
REQUEST = b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--files", type=int, default=20_000, help="the proxy's descriptor limit")
    arguments.add_argument("--idle", type=int, default=10_000)
    arguments.add_argument("--waiting", type=int, default=5_000)
    arguments.add_argument("--allowed", type=int, default=16_000, help="client.connections")
    chosen = arguments.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pod = socket.create_server(("127.0.0.1", 0), backlog=128)
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(probe.getsockname()[1])
    listen, admin = ports
    folder = Path(tempfile.mkdtemp(prefix="strictproxy-connections-"))
    (folder / "c.yaml").write_text(
        f"""
listen: tcp:{listen}:interface=127.0.0.1:backlog=4096
admin: tcp:{admin}:interface=127.0.0.1
upstreams: {{u: {{static: "127.0.0.1:{pod.getsockname()[1]}", limit: 1, queue: {{size: 100000}}}}}}
routes: [{{prefix: /, upstream: u}}]
client: {{connections: {chosen.allowed}, header_timeout: 10m}}
log: {{access: false}}
"""
    )

    log = (folder / "log").open("wb")
    proxy = subprocess.Popen(
        [BIN / "twistd", "-n", "--pidfile=", "strictproxy", "-c", folder / "c.yaml"],
        stdout=log, stderr=log,
    )  # fmt: skip
    # Long before Python has come to reading it.
    resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (chosen.files, chosen.files))

    def state() -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/api/v1/state", timeout=30) as answer:
            upstream: dict[str, int] = json.load(answer)["upstreams"]["u"]
            return upstream

    def memory() -> int:
        found = re.search(r"^RssAnon:\s+(\d+)", Path(f"/proc/{proxy.pid}/status").read_text(), re.M)
        return int(found[1]) * 1024 if found else 0

    def until(what: str, condition: object, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if condition():  # type: ignore[operator]
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise SystemExit(f"never happened: {what}; {state()}")

    try:
        until("the proxy is up", lambda: state() is not None)
        before = memory()
        idle = [socket.create_connection(("127.0.0.1", listen)) for _ in range(chosen.idle)]
        time.sleep(1)
        after_idle = memory()
        print(f"{len(idle)} idle: {(after_idle - before) / len(idle):,.0f} bytes each")
        waiting = [
            socket.create_connection(("127.0.0.1", listen)) for _ in range(chosen.waiting + 1)
        ]
        for client in waiting:
            client.sendall(REQUEST)
        until("all wait", lambda: state()["waiting"] == chosen.waiting)
        print(
            f"{chosen.waiting} waiting: {(memory() - after_idle) / chosen.waiting:,.0f} bytes each"
        )
        beyond = [socket.create_connection(("127.0.0.1", listen)) for _ in range(1500)]
        time.sleep(1)
        refused = 0
        for client in beyond:
            client.settimeout(0.01)
            try:
                refused += client.recv(1) == b""
            except TimeoutError:
                pass
            except OSError:
                refused += 1
        held = len(idle) + len(waiting)
        print(
            f"{len(beyond)} more with {held} open and {chosen.allowed} allowed: {refused} refused"
        )
        until("the proxy still answers", lambda: state()["waiting"] == chosen.waiting)
        for client in [*idle, *beyond]:
            client.close()
        gone, stay = waiting[1::2], waiting[::2]
        for client in gone:
            client.close()
        until("those who left are out of the line", lambda: state()["waiting"] == len(stay) - 1)
        served = 0
        began = time.monotonic()
        wire, _ = pod.accept()
        order = []
        while served < len(stay):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                piece = wire.recv(65536)
                if not piece:
                    wire, _ = pod.accept()
                head += piece
            wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n%05d" % served)
            served += 1
        for client in stay:
            client.settimeout(10)
            order.append(int(client.recv(4096)[-5:]))
        if order != list(range(len(stay))):
            raise SystemExit("out of order, or lost")
        print(
            f"{served} served in order in {time.monotonic() - began:.1f} s after {len(gone)} left"
        )
        for client in stay:
            client.close()
        until("every count is zero", lambda: (state()["waiting"], state()["running"]) == (0, 0))
        descriptors = len(list(Path(f"/proc/{proxy.pid}/fd").iterdir()))
        print(f"at rest: {descriptors} descriptors")
    finally:
        proxy.terminate()
        proxy.wait(60)


if __name__ == "__main__":
    main()
