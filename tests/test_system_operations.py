"""Reloads, shutdown and taking over, under load, with real processes."""

from __future__ import annotations

import json
import random
import signal
import time
from typing import Any

from tests.test_system import SystemTestCase, free_port, hey_report


class ReloadUnderLoadTests(SystemTestCase):
    def test_a_hundred_reloads(self) -> None:
        """Limits, routes, pods, broken files: no request fails, no pod is above its limit."""
        port = free_port("0.0.0.0")
        hosts = [f"127.0.3.{n + 1}" for n in range(3)]
        self.uvicorns(hosts, port)
        chance = random.Random(5)

        def content() -> str:
            count = chance.randrange(1, 4)
            static = ", ".join(f'"{host}:{port}"' for host in chance.sample(hosts, count))
            more = chance.choice(["", "  other: {static: a:1}\n"])
            route = chance.choice(["{prefix: /, upstream: pods}", "{path: /job, upstream: pods}"])
            return (
                f"upstreams:\n  pods:\n    static: [{static}]\n"
                f"    limit: {chance.randrange(1, 4)}\n"
                f"    queue: {{size: {chance.randrange(500, 900)}, timeout: 1h}}\n{more}"
                f"routes:\n  - {route}\n{chance.choice(['', '  - {path: /x, upstream: pods}'])}\n"
                f"client: {{keepalive: {chance.randrange(60, 90)}s}}\n"
            )

        proxy = self.twistd(content())
        path = self.folder / "strictproxy.yaml"
        head = "".join(path.read_text().splitlines(keepends=True)[:2])
        load = self.spawn(
            "hey", "-z", "90s", "-c", "20", "-t", "30", f"{self.url}/job", log="hey.txt"
        )
        self.wait_for(lambda: self.state()["pods"]["running"], "the load runs")
        broken = set(chance.sample(range(100), 20))
        log = self.folder / "strictproxy.log"

        def done() -> tuple[int, int]:
            text = log.read_text()
            return text.count("configuration read again"), text.count("stays as it was")

        for number in range(100):
            text = chance.choice(["listen: [", content().replace("limit", "limitt")])
            path.write_text(text if number in broken else head + content() + f"# {number}\n")
            before = sum(done())
            proxy.send_signal(signal.SIGHUP)
            self.wait_for(lambda before=before: sum(done()) > before, f"reload {number}")
        self.assertEqual(done(), (80, 20))
        load.send_signal(signal.SIGINT)
        load.wait(60)
        report = (self.folder / "hey.txt").read_text()
        statuses, errors = hey_report(report)
        self.assertEqual((set(statuses), errors), ({200}, []), report)
        self.assertGreater(statuses[200], 100)
        most = [json.loads(self.get(f"http://{h}:{port}/stats")[1])["most"] for h in hosts]
        self.assertLessEqual(max(most), 3, most)
        print(f"\n100 reloads: {statuses[200]} requests, most in flight {most}")

    def test_notices_a_changed_file(self) -> None:
        """Without any signal, a changed file is in force within some seconds."""
        proxy = self.twistd("upstreams: {pods: {static: a:1, limit: 1}}\nroutes: []\n")
        path = self.folder / "strictproxy.yaml"
        path.write_text(path.read_text().replace("limit: 1", "limit: 4"))
        self.wait_for(lambda: self.state()["pods"]["slots"] == 4, "the new limit is in force")
        self.assertIsNone(proxy.poll())


class ShutdownTests(SystemTestCase):
    def start_150(self, drain: str) -> tuple[Any, list[Any]]:
        """Let 50 requests run, until jobs are released, and 100 wait."""
        port = free_port("0.0.0.0")
        hosts = [f"127.0.4.{n + 1}" for n in range(5)]
        self.uvicorns(hosts, port)
        self.hold_jobs()
        static = ", ".join(f'"{host}:{port}"' for host in hosts)
        proxy = self.twistd(
            f"upstreams:\n  pods: {{static: [{static}], limit: 10}}\n"
            f"routes:\n  - {{prefix: /, upstream: pods}}\n{drain}"
        )
        load = [
            self.spawn(
                "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}\n", f"{self.url}/job",
                log="codes.txt",
            )
            for _ in range(150)
        ]  # fmt: skip
        self.wait_for(
            lambda: (lambda s: s["running"] == 50 and s["waiting"] == 100)(self.state()["pods"]),
            "50 run and 100 wait",
        )
        return proxy, load

    def codes(self, load: list[Any]) -> list[int]:
        for client in load:
            client.wait(60)
        return sorted(int(line) for line in (self.folder / "codes.txt").read_text().split())

    def test_everything_is_answered(self) -> None:
        """50 run and 100 wait: all 150 are answered, and the exit code is 0."""
        proxy, load = self.start_150("drain_timeout: 30s\nshutdown_delay: 500ms\n")
        proxy.send_signal(signal.SIGTERM)
        self.wait_for(
            lambda: self.get(f"http://127.0.0.1:{self.admin}/readyz")[0] == 503, "it is not ready"
        )
        self.release_jobs()
        self.assertEqual(self.codes(load), [200] * 150)
        self.assertEqual(proxy.wait(30), 0)

    def test_too_short_a_drain(self) -> None:
        """What is not done in time gets 503; nothing hangs, and the exit code is 0."""
        proxy, load = self.start_150("drain_timeout: 500ms\n")
        proxy.send_signal(signal.SIGTERM)
        codes = self.codes(load)
        self.assertEqual(len(codes), 150)
        self.assertEqual(set(codes), {503})
        self.assertEqual(proxy.wait(30), 0)

    def test_second_signal(self) -> None:
        """A second SIGTERM ends it now."""
        port = free_port()
        self.uvicorn("127.0.0.1", port)
        self.hold_jobs()
        proxy = self.twistd(
            f'upstreams:\n  pods: {{static: "127.0.0.1:{port}"}}\n'
            "routes:\n  - {prefix: /, upstream: pods}\ndrain_timeout: 1h\n"
        )
        client = self.spawn("curl", "-s", f"{self.url}/job", log="c.txt")
        self.wait_for(lambda: self.state()["pods"]["running"] == 1, "it runs")
        proxy.send_signal(signal.SIGTERM)
        self.wait_for(
            lambda: self.get(f"http://127.0.0.1:{self.admin}/readyz")[0] == 503, "it drains"
        )
        proxy.send_signal(signal.SIGTERM)
        self.assertEqual(proxy.wait(10), -signal.SIGTERM)
        client.wait(10)


class TakeOverTests(SystemTestCase):
    def test_new_process_takes_over(self) -> None:
        """A new process on the same port takes over under load; no connection is lost."""
        port = free_port()
        self.uvicorn("127.0.0.1", port)
        config = (
            f'reuse_port: true\nupstreams:\n  pods: {{static: "127.0.0.1:{port}", limit: 30}}\n'
            "routes:\n  - {prefix: /, upstream: pods}\nclient: {connections: 500}\n"
        )
        old = self.twistd(config)
        listen = self.listen
        load = self.spawn(
            "hey", "-z", "60s", "-c", "20", "-t", "20", "-disable-keepalive", f"{self.url}/stats",
            log="hey.txt",
        )  # fmt: skip
        self.wait_for(
            lambda: (self.folder / "strictproxy.log").read_text().count("/stats") > 50, ""
        )
        for _ in range(3):
            new = self.take_over(config, listen)
            old.send_signal(signal.SIGTERM)
            self.assertEqual(old.wait(30), 0)
            old = new
        until = time.monotonic() + 0.5
        self.wait_for(lambda: time.monotonic() > until, "half a second more of load")
        load.send_signal(signal.SIGINT)
        load.wait(60)
        report = (self.folder / "hey.txt").read_text()
        statuses, errors = hey_report(report)
        self.assertEqual((set(statuses), errors), ({200}, []), report)
        self.assertGreater(statuses[200], 300)
        print(f"\ntake-over, three times: {statuses[200]} connections")

    def take_over(self, config: str, listen: int) -> Any:
        return self.twistd(config, listen=f"tcp:{listen}:interface=127.0.0.1")
