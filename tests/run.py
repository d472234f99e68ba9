"""
Runs the suite under trial with coverage, and ends with one line of counts.

The counts are trial's own, taken from its result object. Exit code: 0 only if
nothing failed and the pure layers are covered branch by branch.
"""

from __future__ import annotations

import sys
from typing import Any

import coverage

#: Layers that must be covered to the last branch.
PURE = (
    "strictproxy/scheduling/*",
    "strictproxy/config/*",
    "strictproxy/routing.py",
    "strictproxy/tasks/record.py",
    "strictproxy/tasks/rules.py",
    "strictproxy/discovery/kubernetes/slices.py",
    "strictproxy/discovery/stability.py",
    "strictproxy/discovery/records.py",
    "strictproxy/discovery/resolv_conf.py",
    "strictproxy/http/framing.py",
    "strictproxy/forwarding.py",
    "strictproxy/http/heads.py",
    "strictproxy/http/preferences.py",
    "strictproxy/http/ranges.py",
    "strictproxy/http/peer.py",
    "strictproxy/http/problems.py",
    "strictproxy/http/timeouts.py",
)


def run(names: list[str]) -> Any:
    """Run tests and return trial's result."""
    from twisted.trial.reporter import VerboseTextReporter
    from twisted.trial.runner import TestLoader, TrialRunner

    runner = TrialRunner(VerboseTextReporter, workingDirectory="_trial_temp")
    return runner.run(TestLoader().loadByNames(names, recurse=True))


def main() -> int:
    """Run everything, or the tests named on the command line."""
    measured = coverage.Coverage()
    measured.start()
    result = run(sys.argv[1:] or ["tests"])
    measured.stop()
    measured.save()
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    skipped = len(result.skips)
    whole = not sys.argv[1:]
    if whole:
        measured.combine()
        print("\nCoverage:")
        measured.report()
        print("\nCoverage of the pure layers, which must be 100 %:")
        if measured.report(include=list(PURE)) < 100:
            failed += 1
            print("the pure layers are not covered completely: counted as a failure")
    for test, reason in result.skips:
        print(f"skipped: {test.id()}: {reason}")
    print(f"{result.successes} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    # The repository, not this folder, is where tests are imported from.
    sys.path[0] = "."
    sys.exit(main())
