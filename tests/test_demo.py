"""The demo: its arithmetic, and the whole of it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from strictproxy.demo.load import Job, Outcome, ideal_makespan, plan

ROOT = Path(__file__).parent.parent


class LoadTests(SynchronousTestCase):
    def test_ideal(self) -> None:
        """The ideal is one queue in order of arrival in front of all slots."""
        jobs = [Job(0, 3), Job(0, 1), Job(0, 1), Job(5, 1)]
        self.assertEqual(ideal_makespan(jobs, 2), 6)
        self.assertEqual(ideal_makespan(jobs[:3], 1), 5)

    def test_plan(self) -> None:
        """The plan is the same each time, and comes in three bursts."""
        self.assertEqual(plan(100, 1.0, 7), plan(100, 1.0, 7))
        arrivals = [job.arrival for job in plan(100, 1.0, 7)]
        self.assertEqual(arrivals, sorted(arrivals))
        gaps = [b - a for a, b in itertools.pairwise(arrivals)]
        self.assertEqual(len([gap for gap in gaps if gap > 1]), 2)

    def test_percentiles(self) -> None:
        """Waiting times by percentile; none is zero."""
        self.assertEqual(Outcome(waits=[3, 1, 2]).wait_percentile(50), 2)
        self.assertEqual(Outcome().wait_percentile(95), 0)


class DemoTests(SynchronousTestCase):
    def test_demo(self) -> None:
        """The demo ends by itself within a minute, and every promise is kept."""
        done = subprocess.run(
            [sys.executable, "-m", "strictproxy.demo"],
            capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "KEEP": "0"},
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(done.stdout.count("kept:"), 4, done.stdout)
        print("\n" + done.stdout)
