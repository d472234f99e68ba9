"""`strictproxy top`, against a running proxy and without one."""

from __future__ import annotations

import io
from typing import Any

from click.testing import CliRunner
from rich.console import Console
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.cli import main
from strictproxy.top import draw
from tests.test_admin import AdminTestCase


def state(**upstream: Any) -> dict[str, Any]:
    """Return a snapshot as the admin API sends it."""
    u = {
        "trusted": True, "paused": False, "waiting": 3, "oldest": 1.25, "running": 3, "slots": 4,
        "limit": 2, "requests": 10, "failures": 1, "discovery": None,
        "pods": [
            ["10.0.0.1:80", 2, 2, "ready", None],
            ["10.0.0.2:80", 1, 2, "unhealthy", "it refused"],
        ],
    } | upstream  # fmt: skip
    return {
        "time": 100.0,
        "stopping": False,
        "reload_error": None,
        "outcomes": {"2xx": 7},
        "upstreams": {"transcode": u},
    }


class DrawTests(SynchronousTestCase):
    def text(self, *arguments: Any) -> str:
        console = Console(file=io.StringIO(), width=110, height=30, force_terminal=False)
        console.print(draw(*arguments, console.height))
        stream: Any = console.file
        text: str = stream.getvalue()
        return text

    def test_pods_and_line(self) -> None:
        """Pods with their slots, the line, the rate since the snapshot before."""
        text = self.text(state(requests=30) | {"time": 110.0}, state())
        for part in ("transcode", "3/4", "waiting 3", "oldest 1.2", "per second 2.0", "██", "█·",
                     "unhealthy", "it refused", "2xx 7"):  # fmt: skip
            self.assertIn(part, text)

    def test_states(self) -> None:
        """What is not as usual is said."""
        discovery = {"last_error": "10.96.0.10: no answer"}
        odd = state(paused=True, trusted=False, waiting=0, discovery=discovery)
        text = self.text(odd | {"stopping": True, "reload_error": "f:1:1: oh"}, None)
        for part in ("paused", "no set of pods", "no answer", "shutting down", "f:1:1: oh",
                     "per second -"):  # fmt: skip
            self.assertIn(part, text)

    def test_many_pods(self) -> None:
        """No more pods than fit."""
        pods = [[f"10.0.0.{n}:80", 0, 100, "ready", None] for n in range(200)]
        text = self.text(state(pods=pods), None)
        self.assertIn("more pods", text)
        self.assertLess(len(text.splitlines()), 31)


class CommandTests(AdminTestCase):
    async def top(self, *arguments: str) -> tuple[int, str]:
        def run() -> tuple[int, str]:
            result = CliRunner().invoke(main, ["top", "--once", *arguments])
            return result.exit_code, result.output

        return await deferToThread(run)

    async def test_against_a_proxy(self) -> None:
        """One picture of a running proxy."""
        await self.start()
        code, text = await self.top("--url", f"http://127.0.0.1:{self.admin[1]}")
        self.assertEqual(code, 0, text)
        self.assertIn(str(self.pods[0].address), text)
        self.assertTrue(text.endswith("\n"))

    async def test_token(self) -> None:
        """Where a token is needed, it is shown; a wrong one is told."""
        await self.start()
        text = self.path.read_text().replace(":interface=127.0.0.1', token", "', token")
        self.path.write_text(text)
        await self.service.reload()
        url = f"http://127.0.0.1:{self.service.addresses()[1][1]}"
        self.assertEqual((await self.top("--url", url, "--token-file", str(self.token)))[0], 0)
        code, text = await self.top("--url", url)
        self.assertEqual(code, 1)
        self.assertIn("401: reading from other machines needs a bearer token", text)
        code, text = await self.top("--url", url, "--token-file", "/none")
        self.assertIn("/none: No such file", text)

    async def test_nobody_there(self) -> None:
        """Without a proxy it says so."""
        await self.start()
        code, text = await self.top("--url", "http://127.0.0.1:1")
        self.assertEqual(code, 1)
        self.assertIn("Connection refused", text)
