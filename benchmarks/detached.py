"""
What it costs not to wait: the same requests, waited for and detached.

    python benchmarks/detached.py [--requests 3000] [--folder /var/tmp]

One pod (nginx) that answers at once, 32 clients (hey). A detached request is accepted, carried out
and kept; what is counted is the time until the last one has ended, and the proxy's CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import peers


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--requests", type=int, default=3000)
    arguments.add_argument("--folder", help="where the tasks are kept: a disk, not memory")
    chosen = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="strictproxy-detached-"))
    folder.chmod(0o755)
    tasks = tempfile.mkdtemp(dir=chosen.folder)
    listen, admin, a, b, sink = (peers.free_port() for _ in range(5))
    (folder / "pods.conf").write_text(
        peers.PODS.format(folder=folder, a=a, b=b, sink=sink, user="user root;")
    )
    (folder / "c.yaml").write_text(
        f"""
listen: tcp:{listen}:interface=127.0.0.1
admin: tcp:{admin}:interface=127.0.0.1
upstreams: {{u: {{static: "127.0.0.1:{a}", limit: 32, queue: {{size: 100000}}}}}}
routes: [{{prefix: /, upstream: u, detach: true}}]
tasks: {{directory: {tasks}, max_count: 1000000}}
log: {{access: false, level: warn}}
"""
    )
    pods = subprocess.Popen(["nginx", "-c", folder / "pods.conf"])
    process = subprocess.Popen(
        [peers.BIN / "twistd", "-n", "--pidfile=", "strictproxy", "-c", folder / "c.yaml"]
    )
    proxy = peers.Proxy("strictproxy", listen, process)
    try:
        peers.wait_for_port(a)
        peers.wait_for_port(listen)
        print(peers.describe_machine())
        for size in (100, 100_000):
            (folder / "body").write_bytes(os.urandom(size))
            for name, headers in (
                ("waited for", []),
                ("detached", ["-H", "Prefer: respond-async"]),
            ):
                cpu, began = proxy.cpu(), time.monotonic()
                command = ["hey", "-n", str(chosen.requests), "-c", "32", "-m", "POST", *headers]
                command += ["-D", str(folder / "body"), f"http://127.0.0.1:{listen}/small"]
                report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                accepted = time.monotonic() - began
                while active(admin):
                    time.sleep(0.01)
                took = time.monotonic() - began
                count = chosen.requests // 32 * 32
                statuses = [line.strip() for line in report.splitlines() if "responses" in line]
                print(
                    f"{size} bytes, {name}: {count / accepted:.0f}/s answered,"
                    f" {count / took:.0f}/s ended,"
                    f" {(proxy.cpu() - cpu) / count * 1e6:.0f} us of CPU each; {statuses}"
                )
    finally:
        for each in (process, pods):
            each.terminate()
            each.wait()


def active(admin: int) -> int:
    """How many wait or run."""
    with urllib.request.urlopen(f"http://127.0.0.1:{admin}/api/v1/state") as answer:
        state = json.load(answer)["upstreams"]["u"]
    return int(state["waiting"] + state["running"])


if __name__ == "__main__":
    main()
