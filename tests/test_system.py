"""
The whole thing, with parts that nobody here wrote: nginx, uvicorn, dnsmasq, hey, twistd.

Real processes on loopback, each stopped by its own handle. Waiting is always
for something observable, and bounded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, SynchronousTestCase

ROOT = Path(__file__).parent.parent
NEEDED = ("nginx", "dnsmasq", "hey", "curl")

#: An application that counts, by itself, how many requests it works on at once.
#: A job takes ?seconds= (0.1 s if left out), and then as long as there is a file "hold".
APPLICATION = """
import asyncio, json, os
from urllib.parse import parse_qs
now = most = served = 0

async def app(scope, receive, send):
    global now, most, served
    if scope["type"] != "http":
        return
    start = {"type": "http.response.start", "status": 200, "headers": []}
    if scope["path"] == "/stats":
        await send(start)
        body = json.dumps({"now": now, "most": most, "served": served}).encode()
        await send({"type": "http.response.body", "body": body})
        return
    now += 1
    most = max(most, now)
    query = parse_qs(scope["query_string"].decode())
    await asyncio.sleep(float(query.get("seconds", ["0.1"])[0]))
    while os.path.exists("hold"):
        await asyncio.sleep(0.02)
    await send(start)
    now -= 1
    served += 1
    await send({"type": "http.response.body", "body": b"done"})
"""

#: A web server that refuses the third connection at once: the limit, enforced at the pod.
NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log notice;
events {{ worker_connections 512; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  limit_conn_zone $server_name zone=pods:1m;
  limit_conn_status 429;
  server {{
    listen {host}:{port};
    server_name pod;
    root {folder};
    location / {{ limit_conn pods 2; limit_rate 100k; }}
  }}
}}
"""


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        number: int = probe.getsockname()[1]
        return number


class SystemTestCase(SynchronousTestCase):
    """Starts processes, and stops them by their handles."""

    def setUp(self) -> None:
        missing = [name for name in NEEDED if not shutil.which(name)]
        if missing:
            raise SkipTest(f"not installed (Debian's packages): {', '.join(missing)}")
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir(parents=True)

    def spawn(self, *arguments: str, log: str, **kwargs: Any) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                arguments,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                **kwargs,
            )
        self.addCleanup(self.stop, process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            result = condition()
            if result:
                return result
            time.sleep(0.02)
        logs = "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in self.folder.glob("*.log")
        )
        raise AssertionError(f"never happened: {what}\n{logs}")

    def get(self, url: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError as error:
            return 0, str(error).encode()

    def twistd(
        self,
        config: str,
        command: tuple[str, ...] = ("twistd", "-n", "--pidfile="),
        listen: str = "",
    ) -> Any:
        """Run the proxy as its users do, and wait until it is ready."""
        path = self.folder / "strictproxy.yaml"
        self.listen, self.admin = free_port(), free_port()
        path.write_text(
            f"listen: {listen or f'tcp:{self.listen}:interface=127.0.0.1'}\n"
            f"admin: tcp:{self.admin}:interface=127.0.0.1\n{config}"
        )
        return self.run_proxy(command)

    def run_proxy(self, command: tuple[str, ...] = ("twistd", "-n", "--pidfile=")) -> Any:
        """Run the proxy, perhaps once more, with the configuration that there is."""
        path = self.folder / "strictproxy.yaml"
        script = Path(sys.executable).parent / command[0]
        process = self.spawn(
            str(script), *command[1:], "strictproxy", "--config", str(path),
            log="strictproxy.log", cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.listen}"
        ready = f"http://127.0.0.1:{self.admin}/readyz"
        self.wait_for(lambda: self.get(ready)[0] == 200, "the proxy is ready")
        return process

    def state(self) -> dict[str, Any]:
        _, body = self.get(f"http://127.0.0.1:{self.admin}/api/v1/state")
        upstreams: dict[str, Any] = json.loads(body)["upstreams"]
        return upstreams

    # -- pods

    def uvicorn(self, host: str, port: int) -> subprocess.Popen[bytes]:
        return self.uvicorns([host], port)[0]

    def uvicorns(
        self, hosts: list[str], port: int, application: str = APPLICATION
    ) -> list[subprocess.Popen[bytes]]:
        """Run an application, which has to know /stats, at each of these hosts."""
        (self.folder / "pod.py").write_text(application)
        processes = [
            self.spawn(
                sys.executable, "-m", "uvicorn", "--host", host, "--port", str(port),
                "--log-level", "warning", "pod:app", log=f"{host}.log", cwd=self.folder,
            )
            for host in hosts
        ]  # fmt: skip
        for host in hosts:
            url = f"http://{host}:{port}/stats"
            self.wait_for(lambda url=url: self.get(url)[0] == 200, f"{host} answers")
        return processes

    def hold_jobs(self) -> None:
        """No job of pods that run by now ends before release_jobs(), or the test's end."""
        (self.folder / "hold").touch()
        self.addCleanup(self.release_jobs)

    def release_jobs(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)

    def nginx(self, host: str, port: int) -> subprocess.Popen[bytes]:
        folder = self.folder / host
        folder.mkdir()
        (folder / "job").write_bytes(b"x" * 112_000)  # 100 kB at once, the rest in 0.1 s
        config = folder / "nginx.conf"
        # Its workers would change to a user who may not read a temporary folder.
        user = "user root;\n" if os.geteuid() == 0 else ""
        config.write_text(user + NGINX.format(folder=folder, host=host, port=port))
        process = self.spawn("nginx", "-c", str(config), "-e", str(folder / "e"), log=f"{host}.log")
        self.wait_for(lambda: self.get(f"http://{host}:{port}/none")[0] == 404, f"{host} answers")
        return process

    # -- names

    def dnsmasq(self, hosts: list[str]) -> None:
        self.dns_port = free_port()
        self.hosts = self.folder / "hosts"
        self.hosts.write_text("".join(f"{host} pods.test\n" for host in hosts))
        self.dns = self.spawn(
            "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null",
            f"--addn-hosts={self.hosts}", f"--port={self.dns_port}", "--user=root", "--pid-file=",
            "--listen-address=127.0.0.1", "--bind-interfaces", "--local=/test/", log="dns.log",
        )  # fmt: skip

    def publish(self, hosts: list[str]) -> None:
        self.hosts.write_text("".join(f"{host} pods.test\n" for host in hosts))
        self.dns.send_signal(signal.SIGHUP)


def hey_report(text: str) -> tuple[dict[int, int], list[str]]:
    """Return responses by status, and what went wrong without one."""
    statuses = {int(s): int(n) for s, n in re.findall(r"\[(\d{3})\]\s+(\d+) responses", text)}
    _, _, errors = text.partition("Error distribution:")
    return statuses, [line.strip() for line in errors.splitlines() if line.strip()]


class RollingChangeTests(SystemTestCase):
    def test_every_pod_is_replaced_under_load(self) -> None:
        """Across a rolling change of all pods no request fails, and none is above its limit."""
        port = free_port("0.0.0.0")
        kinds = [self.uvicorn, self.nginx]
        running = {f"127.0.0.{40 + n}": kinds[n % 2](f"127.0.0.{40 + n}", port) for n in range(4)}
        self.dnsmasq(list(running))
        self.twistd(
            f"""\
upstreams:
  pods:
    dns:
      {{name: pods.test, port: {port}, servers: ["127.0.0.1:{self.dns_port}"],
       every: 500ms, interval: 100ms, retry_after: 1s}}
    limit: 2
routes:
  - {{path: /job, upstream: pods}}
"""
        )

        def known() -> set[str]:
            pods = self.state()["pods"]["pods"]
            return {pod["address"].split(":")[0] for pod in pods if pod["known"]}

        report = self.folder / "hey.txt"
        load = self.spawn(
            "hey", "-z", "60s", "-c", "24", "-t", "30", f"{self.url}/job", log="hey.txt"
        )
        most: dict[str, int] = {}
        served: dict[str, int] = {}

        def remember(host: str) -> None:
            if int(host.rsplit(".", 1)[1]) % 2 == 0:
                stats = json.loads(self.get(f"http://{host}:{port}/stats")[1])
                most[host], served[host] = stats["most"], stats["served"]
            else:
                log = (self.folder / host / "access.log").read_text()
                served[host] = log.count('"GET /job HTTP/1.1" 200')
                self.assertNotIn('" 429 ', log, f"{host} had more than two at once")

        self.wait_for(lambda: self.state()["pods"]["waiting"] >= 12, "the pods are full")
        for number in range(4):
            old, new = f"127.0.0.{40 + number}", f"127.0.0.{44 + number}"
            running[new] = kinds[number % 2](new, port)
            left = [host for host in running if host != old]
            self.publish(left)
            self.wait_for(lambda left=left: known() == set(left), f"{new} replaces {old}")

            def drained(old: str = old) -> bool:
                pods = self.state()["pods"]["pods"]
                return not any(pod["address"].startswith(f"{old}:") for pod in pods)

            self.wait_for(drained, f"{old} has finished")
            remember(old)
            self.stop(running.pop(old))
        self.wait_for(lambda: self.state()["pods"]["running"] == 8, "the new pods are all in use")
        time_to_stop = time.monotonic() + 1.0
        self.wait_for(lambda: time.monotonic() > time_to_stop, "a second more of load")
        for host in running:
            remember(host)
        load.send_signal(signal.SIGINT)
        load.wait(60)
        statuses, errors = hey_report(report.read_text())
        self.assertEqual(set(statuses), {200}, report.read_text())
        self.assertEqual(errors, [])
        self.assertGreater(statuses[200], 100)
        self.assertTrue(all(2 >= count > 0 for count in most.values()), most)
        self.assertEqual(len(served), 8)
        self.assertTrue(all(served.values()), served)
        print(f"\nrolling change: {statuses[200]} requests, most in flight {most}, served {served}")


class ProcessTests(SystemTestCase):
    STATIC = """\
upstreams:
  pods: {{static: "127.0.0.1:{port}", limit: 1}}
routes:
  - {{path: /job, upstream: pods}}
log: {{format: json}}
"""

    def access_log(self) -> list[dict[str, Any]]:
        lines = (self.folder / "strictproxy.log").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if event["event"] == "access"]

    def test_terminates_cleanly(self) -> None:
        """SIGTERM: what runs and what waits is answered, nothing new is taken, exit 0."""
        port = free_port()
        self.uvicorn("127.0.0.1", port)
        proxy = self.twistd(self.STATIC.format(port=port))
        clients = [
            self.spawn(
                "curl",
                "-s",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}\n",
                f"{self.url}/job",
                log="c.txt",
            )
            for _ in range(10)
        ]
        self.wait_for(lambda: self.state()["pods"]["waiting"] == 9, "nine wait")
        proxy.send_signal(signal.SIGTERM)
        for client in clients:
            client.wait(20)
        self.assertEqual(proxy.wait(20), 0)
        self.assertEqual((self.folder / "c.txt").read_text().split(), ["200"] * 10)
        self.assertEqual(self.get(f"{self.url}/job")[0], 0)

    def test_access_log(self) -> None:
        """One JSON object per request tells where it went, how long it waited and why it failed."""
        port = free_port()
        self.uvicorn("127.0.0.1", port)
        self.twistd(self.STATIC.format(port=port))
        self.assertEqual(self.get(f"{self.url}/job?x=1"), (200, b"done"))
        status, body = self.get(f"{self.url}/nowhere")
        self.assertEqual((status, json.loads(body)["reason"]), (404, "no_route"))
        first, second = self.wait_for(
            lambda: (lambda log: log if len(log) == 2 else None)(self.access_log()),
            "both are logged",
        )
        self.assertEqual(
            {
                name: first[name]
                for name in ("method", "target", "route", "pod", "status", "in_flight")
            },
            {
                "method": "GET",
                "target": "/job?x=1",
                "route": "/job",
                "pod": f"127.0.0.1:{port}",
                "status": 200,
                "in_flight": 1,
            },
        )
        self.assertGreaterEqual(first["pod_time"], 0.1)
        self.assertEqual(
            (second["status"], second["reason"], second["pod"]), (404, "no_route", None)
        )

    def test_twist(self) -> None:
        """`twist strictproxy` runs it too."""
        port = free_port()
        self.uvicorn("127.0.0.1", port)
        self.twistd(self.STATIC.format(port=port), ("twist",))
        self.assertEqual(self.get(f"{self.url}/job"), (200, b"done"))

    def test_cannot_listen(self) -> None:
        """A port that is taken ends the program with an error; it never runs deaf."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            config = self.folder / "c.yaml"
            config.write_text(
                f"listen: tcp:{taken.getsockname()[1]}:interface=127.0.0.1\n"
                + self.STATIC.format(port=1)
            )
            done = self.twistd_until_end(config)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("cannot start", done.stdout)

    def test_broken_configuration(self) -> None:
        """It refuses to start with a broken file, and says where it is broken."""
        config = self.folder / "c.yaml"
        config.write_text("listen: tcp:1\nupstreams: {}\nroutes: []\n")
        done = self.twistd_until_end(config)
        self.assertEqual(done.returncode, 1)
        self.assertIn(f"{config}:2:12: upstreams: must not be empty", done.stdout + done.stderr)

    def twistd_until_end(self, config: Path) -> subprocess.CompletedProcess[str]:
        script = Path(sys.executable).parent / "twistd"
        return subprocess.run(
            [script, "-n", "--pidfile=", "strictproxy", "--config", config],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
