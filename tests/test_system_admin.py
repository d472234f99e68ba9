"""The admin port under tools that nobody here wrote: schemathesis and promtool."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.test_system import ROOT, SystemTestCase, free_port

MONITORING = ROOT / "k8s" / "monitoring"


class AdminPortTests(SystemTestCase):
    def start(self) -> None:
        port = free_port()
        self.uvicorn("127.0.0.1", port)
        self.token = self.folder / "token"
        self.token.write_text("secret")
        self.twistd(
            f'upstreams:\n  u: {{static: "127.0.0.1:{port}", limit: 2}}\n'
            "routes:\n  - {prefix: /, upstream: u}\n"
        )
        path = self.folder / "strictproxy.yaml"
        admin = f"tcp:{self.admin}:interface=127.0.0.1"
        path.write_text(
            path.read_text().replace(
                f"admin: {admin}", f"admin: {{endpoint: '{admin}', token_file: {self.token}}}"
            )
        )
        self.wait_for(
            lambda: "configuration read again" in (self.folder / "strictproxy.log").read_text(),
            "the token is in force",
        )

    def test_schemathesis(self) -> None:
        """The API is as it describes itself, whatever it is asked."""
        self.start()
        for header in ("Authorization: Bearer secret", "Authorization: Bearer wrong"):
            done = subprocess.run(
                [
                    str(Path(sys.executable).parent / "schemathesis"), "run",
                    f"http://127.0.0.1:{self.admin}/api/v1/openapi.json",
                    "--url", f"http://127.0.0.1:{self.admin}/api/v1",
                    "-H", header, "--max-examples", "15", "--phases", "examples,coverage,fuzzing",
                    "--exclude-checks", "ignored_auth,positive_data_acceptance",
                    "--seed", "1", "--no-color", "--request-timeout", "10",
                ],
                cwd=self.folder, capture_output=True, text=True, timeout=240, check=False,
                env={**os.environ, "COLUMNS": "120"},
            )  # fmt: skip
            self.assertEqual(done.returncode, 0, done.stdout[-6000:] + done.stderr[-2000:])
            (generated,) = re.findall(r"(\d+) generated", done.stdout)
            self.assertGreater(int(generated), 100)
        self.assertEqual(self.get(f"http://127.0.0.1:{self.admin}/healthz")[0], 200)
        log = (self.folder / "strictproxy.log").read_text()
        self.assertNotIn("Traceback", log)

    def test_promtool_on_metrics(self) -> None:
        """Prometheus' own linter has nothing to say about the metrics."""
        if shutil.which("promtool") is None:
            raise SkipTest("promtool is not installed (Debian's package prometheus)")
        self.start()
        for _ in range(3):
            self.get(f"{self.url}/job")
        _, metrics = self.get(f"http://127.0.0.1:{self.admin}/metrics")
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=metrics, capture_output=True, check=False
        )
        self.assertEqual((done.returncode, done.stderr), (0, b""), done.stdout)


class AlertTests(SynchronousTestCase):
    def setUp(self) -> None:
        if shutil.which("promtool") is None:
            raise SkipTest("promtool is not installed (Debian's package prometheus)")

    def promtool(self, *arguments: str) -> None:
        done = subprocess.run(
            ["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_rules(self) -> None:
        """The alert rules are valid."""
        self.promtool("check", "rules", "alerts.yaml")

    def test_alerts_fire(self) -> None:
        """Each alert fires when it should, and not when it should not."""
        self.promtool("test", "rules", "alerts.test.yaml")
