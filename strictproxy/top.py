"""
`strictproxy top`: the upstreams, their pods and the line in a terminal, as they change.

For `kubectl exec`: reads the admin API's events, a snapshot a second.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

#: Wider bars than this say no more.
_BAR = 24
_COLOURS = {"ready": "green", "trial": "yellow", "unhealthy": "red", "removed": "bright_black"}


class CannotLook(Exception):
    """The admin API does not answer, or does not want to."""


def events(url: str, token_file: Path | None) -> Iterator[dict[str, Any]]:
    """
    Yield snapshots as they come.

    :raise CannotLook: there are none, or no more.
    """
    request = urllib.request.Request(f"{url.rstrip('/')}/api/v1/events")
    if token_file is not None:
        try:
            request.add_header("Authorization", f"Bearer {token_file.read_text().strip()}")
        except OSError as error:
            raise CannotLook(f"{token_file}: {error.strerror}") from None
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            yield from _parse(answer)
    except urllib.error.HTTPError as error:
        with error:
            try:
                reason = json.load(error)["error"]
            except (ValueError, KeyError, TypeError):
                reason = error.reason
        raise CannotLook(f"{url}: {error.code}: {reason}") from None
    except OSError as error:
        raise CannotLook(f"{url}: {getattr(error, 'reason', error)}") from None
    raise CannotLook(f"{url}: the proxy has ended the connection")


def _parse(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def run(url: str, token_file: Path | None, console: Console, *, once: bool) -> None:
    """
    Draw until interrupted, or once.

    :raise CannotLook: there is nothing to draw, or no more.
    """
    before: dict[str, Any] | None = None
    snapshots = events(url, token_file)
    if once:
        console.print(draw(next(snapshots), None, console.height))
        return
    with Live(console=console, auto_refresh=False, screen=True) as live:
        for state in snapshots:
            live.update(draw(state, before, console.height), refresh=True)
            before = state


def draw(state: Mapping[str, Any], before: Mapping[str, Any] | None, height: int) -> RenderableType:
    """Return a picture of a snapshot; `before` is the one before it, for rates."""
    upstreams = state["upstreams"]
    rows = max(3, (height - 2) // max(len(upstreams), 1) - 6)
    parts: list[RenderableType] = [
        _upstream(name, each, _rate(name, state, before), rows) for name, each in upstreams.items()
    ]
    if state["reload_error"]:
        parts.append(Text(f"the configuration file has mistakes: {state['reload_error']}", "red"))
    if state["stopping"]:
        parts.append(Text("shutting down", "red"))
    counts = ", ".join(f"{name} {count}" for name, count in sorted(state["outcomes"].items()))
    parts.append(Text(f"answers so far: {counts or 'none'}", "bright_black"))
    return Group(*parts)


def _rate(name: str, state: Mapping[str, Any], before: Mapping[str, Any] | None) -> float | None:
    if before is None or name not in before["upstreams"] or state["time"] <= before["time"]:
        return None
    done: float = state["upstreams"][name]["requests"] - before["upstreams"][name]["requests"]
    seconds: float = state["time"] - before["time"]
    return max(0.0, done / seconds)


def _upstream(name: str, state: Mapping[str, Any], rate: float | None, rows: int) -> RenderableType:
    head = Text.assemble(
        ("running ", "bright_black"), f"{state['running']}/{state['slots']}  ",
        ("waiting ", "bright_black"), (str(state["waiting"]), "yellow" if state["waiting"] else ""),
        ("  oldest ", "bright_black"), f"{state['oldest']:.1f} s" if state["waiting"] else "-",
        ("  per second ", "bright_black"), "-" if rate is None else f"{rate:.1f}",
        ("  failures ", "bright_black"), str(state["failures"]),
    )  # fmt: skip
    if state["paused"]:
        head.append("  paused", "yellow")
    if not state["trusted"]:
        head.append("  no set of pods is trusted yet", "yellow")
    discovery = state["discovery"]
    if discovery is not None and discovery["last_error"]:
        head.append(f"\n{discovery['last_error']}", "red")
    table = Table.grid(padding=(0, 2))
    pods = state["pods"]
    for address, leases, limit, condition, error in pods[:rows]:
        table.add_row(
            Text(address),
            _bar(leases, limit),
            f"{leases}/{limit}",
            Text(condition, _COLOURS.get(condition, "yellow")),
            Text(error or "", "bright_black", overflow="ellipsis", no_wrap=True),
        )
    if len(pods) > rows:
        table.add_row(Text(f"and {len(pods) - rows} more pods", "bright_black"))
    return Panel(Group(head, table), title=name, title_align="left")


def _bar(leases: int, limit: int) -> Text:
    most = max(limit, leases, 1)
    width = min(most, _BAR)
    busy = round(leases / most * width)
    return Text.assemble(("█" * busy, "blue"), ("·" * (width - busy), "bright_black"))
