"""Name servers that nobody here wrote, with records that change at run time."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

ZONE = "media.svc.cluster.local"
Records = list[tuple[str, str, str]]

#: Starts a process: its arguments, and the name of its log.
Spawn = Callable[..., "subprocess.Popen[bytes]"]


class Bind:
    """BIND 9 (Debian: bind9, bind9-dnsutils), changed by dynamic update (RFC 2136)."""

    programs = ("named", "nsupdate")

    def __init__(self, folder: Path, port: int, spawn: Spawn) -> None:
        self.folder, self.port, self._spawn = folder, port, spawn
        self._names: set[str] = set()
        (folder / "zone").write_text(zone_text([], 1))
        (folder / "named.conf").write_text(
            f'options {{ directory "{folder}"; listen-on port {port} {{ 127.0.0.1; }};\n'
            "listen-on-v6 { none; }; pid-file none; session-keyfile none; recursion no;\n"
            "dnssec-validation no; max-records-per-type 0; };\ncontrols { };\n"
            f'zone "{ZONE}" {{ type primary; file "zone"; allow-update {{ 127.0.0.1; }}; }};\n'
        )
        self.start()

    def start(self) -> None:
        """Start, or start again."""
        self.process: Any = self._spawn(
            "named", "-g", "-n", "1", "-c", str(self.folder / "named.conf"), log="named.log"
        )

    def set(self, records: Records) -> None:
        """Replace all records."""
        names = {name for name, _, _ in records}
        lines = [f"server 127.0.0.1 {self.port}", f"zone {ZONE}"]
        lines += [f"update delete {name}" for name in sorted(self._names | names)]
        lines += [f"update add {name} 1 {kind} {data}" for name, kind, data in records]
        self._names = names
        # By TCP, as a thousand records do not fit into a datagram.
        subprocess.run(
            ["nsupdate", "-v"], input="\n".join([*lines, "send", ""]), text=True, check=True
        )


class CoreDns:
    """CoreDNS (`go install github.com/coredns/coredns@latest`), changed by a new zone file."""

    programs = ("coredns",)

    def __init__(self, folder: Path, port: int, spawn: Spawn) -> None:
        self.folder, self.port, self._spawn = folder, port, spawn
        self._serial = 0
        self.set([])
        (folder / "Corefile").write_text(
            f"{ZONE}:{port} {{\n  bind 127.0.0.1\n"
            f"  file {folder / 'db'} {{\n    reload 100ms\n  }}\n  bufsize 1232\n}}\n"
        )
        self.start()

    def start(self) -> None:
        """Start, or start again."""
        self.process: Any = self._spawn(
            "coredns", "-conf", str(self.folder / "Corefile"), log="coredns.log"
        )

    def set(self, records: Records) -> None:
        """Replace all records."""
        self._serial += 1
        # In one step: CoreDNS may read at any moment.
        new = self.folder / "db.new"
        new.write_text(zone_text(records, self._serial))
        new.rename(self.folder / "db")


def zone_text(records: Records, serial: int) -> str:
    """Return a zone file."""
    head = f"$ORIGIN {ZONE}.\n$TTL 1\n@ IN SOA ns.{ZONE}. root.{ZONE}. {serial} 60 60 60 1\n"
    head += f"@ IN NS ns.{ZONE}.\nns IN A 127.0.0.1\n"
    return head + "".join(f"{name}. 1 IN {kind} {data}\n" for name, kind, data in records)


def there(server: type[Bind] | type[CoreDns]) -> bool:
    """Whether a server's programs are installed."""
    return all(shutil.which(name) for name in server.programs)


def answers(port: int) -> bool:
    """Whether something listens on TCP already."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
