"""The `strictproxy` command."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.cli import main
from strictproxy.config import Config, load
from strictproxy.config.model import (
    ClientConfig,
    DnsSource,
    KubernetesSource,
    LogConfig,
    PodConnections,
    QueueConfig,
)

ETC = Path(__file__).parent.parent / "etc"


class CheckTests(SynchronousTestCase):
    def check(self, content: str) -> tuple[int, list[str]]:
        path = Path(self.mktemp())
        path.write_text(content)
        result = CliRunner().invoke(main, ["check", str(path)])
        return result.exit_code, result.output.replace(str(path), "FILE").splitlines()

    def test_good(self) -> None:
        """A good file: exit 0, and what is in it."""
        self.assertEqual(
            self.check(
                "listen: tcp:1\nupstreams: {u: {static: a:1}}\nroutes: [{path: /, upstream: u}]\n"
            ),
            (0, ["FILE: ok: 1 listener, 1 upstream, 1 route"]),
        )

    def test_bad(self) -> None:
        """A bad file: exit 1, and every mistake on a line of its own."""
        self.assertEqual(
            self.check(
                "lisen: tcp:1\nupstreams: {u: {static: a:1}}\nroutes: [{path: /, upstream: v}]\n"
            ),
            (
                1,
                [
                    "FILE:1:1: 'listen' is missing",
                    "FILE:1:1: lisen: unknown key; did you mean 'listen'?",
                    "2 mistakes",
                ],
            ),
        )

    def test_missing(self) -> None:
        """A file that is not there is an error like any other."""
        result = CliRunner().invoke(main, ["check", "/nowhere"])
        self.assertEqual(result.exit_code, 1)
        self.assertEqual(result.output, "/nowhere: cannot be read: No such file or directory\n")

    def test_version(self) -> None:
        """The version is that of the package."""
        result = CliRunner().invoke(main, ["--version"])
        self.assertRegex(result.output, r"^strictproxy, version \d+\.\d+\.\d+\n$")


class ShippedFilesTests(SynchronousTestCase):
    def test_quickstart(self) -> None:
        """The smallest useful file is valid."""
        self.assertIsInstance(load(ETC / "quickstart.yaml"), Config)

    def test_reference(self) -> None:
        """The reference names every key, each with its default."""
        config = load(ETC / "strictproxy.yaml")
        self.assertEqual(config.client, ClientConfig())
        self.assertEqual(config.log, LogConfig())
        self.assertEqual(config.drain_timeout, Config.drain_timeout)
        upstream = config.upstreams["transcode"]
        self.assertEqual(upstream.queue, QueueConfig())
        self.assertEqual(upstream.connections, PodConnections())
        source = upstream.source
        assert isinstance(source, DnsSource)
        self.assertEqual(source, DnsSource(source.name, source.port))
        text = (ETC / "strictproxy.yaml").read_text()
        for record in (
            ClientConfig,
            LogConfig,
            QueueConfig,
            PodConnections,
            DnsSource,
            KubernetesSource,
            Config,
        ):
            for key in record.__dataclass_fields__:
                self.assertIn(f"{key}:", text)
