"""What import-linter cannot see: which parts of Twisted the pure layers may use."""

from __future__ import annotations

import ast
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

PACKAGE = Path(__file__).parent.parent / "strictproxy"
PURE = [
    *sorted((PACKAGE / "scheduling").glob("*.py")),
    PACKAGE / "routing.py",
    PACKAGE / "tasks" / "record.py",
    PACKAGE / "tasks" / "rules.py",
    PACKAGE / "discovery" / "stability.py",
    PACKAGE / "discovery" / "kubernetes" / "slices.py",
    PACKAGE / "discovery" / "resolv_conf.py",
    *(
        PACKAGE / "http" / f"{name}.py"
        for name in ("framing", "heads", "peer", "preferences", "problems", "ranges", "timeouts")
    ),
    PACKAGE / "forwarding.py",
]
#: Waiting is a Deferred; nothing else of Twisted belongs in a pure layer.
ALLOWED = {"twisted.internet.defer"}


class PureLayerTests(SynchronousTestCase):
    def test_imports(self) -> None:
        """Pure modules use Deferreds and nothing else of Twisted."""
        for path in PURE:
            used = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    used.add(node.module or "")
                elif isinstance(node, ast.Import):
                    used.update(alias.name for alias in node.names)
            twisted = {name for name in used if name.split(".")[0] == "twisted"}
            self.assertEqual(twisted - ALLOWED, set(), path)

    def test_only_one_obtains_the_reactor(self) -> None:
        """The reactor is obtained in the composition root, and passed to everybody else."""
        found = [
            path.relative_to(PACKAGE).as_posix()
            for path in sorted(PACKAGE.rglob("*.py"))
            if "from twisted.internet import reactor" in path.read_text()
        ]
        self.assertEqual(found, ["service.py"])
