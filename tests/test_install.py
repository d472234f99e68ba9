"""What `pip install` gives: both commands, the plugin in the wheel, and routers by plugin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).parent.parent
CONFIG = """\
listen: tcp:0:interface=127.0.0.1
upstreams:
  u: {static: ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]}
routers:
  - {name: sticky, settings: {header: X-Tenant, upstream: u, pods: 1}}
routes:
  - {prefix: /, upstream: u}
"""
#: Run in the new environment: makes the routers of a configuration, and asks the first one.
ASK = """
import sys
from twisted.internet.task import Clock
from strictproxy.config import load
from strictproxy.service import ProxyService
from strictproxy.interfaces import RequestInfo
from strictproxy.errors import ConfigError
try:
    service = ProxyService(load(sys.argv[1]), Clock())
except ConfigError as error:
    sys.exit(f"ConfigError: {error}")
for upstream in service.upstreams.values():
    upstream.start()
(_, router), = service.proxy.routers
for tenant in ("a", "b", "a"):
    print(sorted(map(str, router.route(RequestInfo("GET", "/", "h", [("X-Tenant", tenant)])).pods)))
print(router.route(RequestInfo("GET", "/")))
"""


class InstallTests(SynchronousTestCase):
    """Builds wheels and installs them into an environment of its own."""

    def run_in(self, *arguments: str | Path, fails: bool = False) -> str:
        # From elsewhere and with a clean path, so that only what was installed can be found.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [str(each) for each in arguments], capture_output=True, text=True, timeout=300,
            cwd=self.folder, env=environment, check=False,
        )  # fmt: skip
        output = done.stdout + done.stderr
        self.assertEqual(done.returncode != 0, fails, output)
        return output

    def test_install(self) -> None:
        """A clean environment gets twistd, twist and strictproxy, and finds a router's package."""
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir(parents=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        for source in (ROOT, ROOT / "examples" / "sticky-router"):
            build = self.folder / f"source-{source.name}"
            # setuptools writes beside what it builds.
            for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
                if (source / name).exists():
                    build.mkdir(exist_ok=True)
                    shutil.copy(source / name, build)
            for package in ("strictproxy", "strictproxy_sticky", "twisted"):
                if (source / package).exists():
                    shutil.copytree(source / package, build / package)
            self.run_in(*pip, "wheel", "--no-deps", "-w", self.folder / "wheels", build)
        wheel = next((self.folder / "wheels").glob("strictproxy-0*.whl"))
        names = zipfile.ZipFile(wheel).namelist()
        self.assertIn("twisted/plugins/strictproxy_plugin.py", names)
        self.assertIn("strictproxy/py.typed", names)
        self.assertNotIn("twisted/plugins/__init__.py", names)
        self.assertFalse([name for name in names if name.startswith("tests/")])

        new = self.folder / "env" / "bin"
        self.run_in(sys.executable, "-m", "venv", new.parent)
        self.run_in(new / "pip", "--quiet", "install", wheel)

        self.assertIn(
            "Strict least-connection reverse proxy", self.run_in(new / "twistd", "--help")
        )
        self.assertIn("strictproxy", self.run_in(new / "twist", "--help"))
        self.assertIn("strictproxy, version 0", self.run_in(new / "strictproxy", "--version"))
        config = self.folder / "c.yaml"
        config.write_text(CONFIG)
        self.assertIn("ok: 1 listener", self.run_in(new / "strictproxy", "check", config))
        config.write_text(CONFIG.replace("upstream: u}", "upstrem: u}"))
        told = self.run_in(new / "strictproxy", "check", config, fails=True)
        self.assertIn("routes[0].upstrem: unknown key; did you mean 'upstream'?", told)
        self.assertIn("2 mistakes", told)

        config.write_text(CONFIG)
        told = self.run_in(new / "python", "-c", ASK, config, fails=True)
        self.assertIn("ConfigError: router 'sticky' is not installed; installed: none", told)
        router = next((self.folder / "wheels").glob("strictproxy_sticky_router-*.whl"))
        self.run_in(new / "pip", "--quiet", "install", "--no-deps", router)
        *answers, without = self.run_in(new / "python", "-c", ASK, config).splitlines()
        self.assertEqual(answers[0], answers[2])
        self.assertNotEqual(answers[0], answers[1])
        self.assertEqual(without, "None")
        config.write_text(CONFIG.replace("header: X-Tenant", "header: 5"))
        told = self.run_in(new / "python", "-c", ASK, config, fails=True)
        self.assertIn("ConfigError: router 'sticky': 'header' must be given, as str", told)
