"""
Draws what `peers.py --json` and `queueing.py --json` measured, as SVG.

    python benchmarks/plots.py peers.json queueing.json docs/images

Two pictures: what a request, a GiB and a waiting request cost beside the
peers, and how far each is from one ideal queue.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402: the backend is chosen first

#: strictproxy stands out, the others are a quiet grey-blue; both are seen on white and on black.
_OURS, _THEIRS = "#e4572e", "#7a8fa6"

_COSTS = {
    "small, 32 connections: CPU us per request": "CPU per small request,\n32 connections, µs",
    "256 MiB down: CPU s/GiB": "CPU per GiB down, s",
    "256 MiB up: CPU s/GiB": "CPU per GiB up, s",
    "5000 waiting: resident bytes each": "memory per\nwaiting request, bytes",
}
_DISTANCES = ("mean x ideal", "p99 x ideal", "p99 wait x ideal")


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", type=Path)
    parser.add_argument("queueing", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    # The same figures give the same bytes.
    matplotlib.rcParams["svg.hashsalt"] = "strictproxy"
    matplotlib.rcParams["svg.fonttype"] = "none"
    costs(json.loads(options.peers.read_text()), options.folder / "peers.svg")
    distances(json.loads(options.queueing.read_text()), options.folder / "queueing.svg")


def costs(measured: dict[str, dict[str, float]], file: Path) -> None:
    """Draw what each peer needs for the same work."""
    figure, axes = pyplot.subplots(1, len(_COSTS), figsize=(12, 2.8))
    for axis, (key, title) in zip(axes, _COSTS.items(), strict=True):
        _bars(axis, {peer: values[key] for peer, values in measured.items() if key in values})
        axis.set_title(title, fontsize=9)
    _save(figure, file)


def distances(measured: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Draw how many times the ideal queue's figures each peer's are."""
    cases = {name: case for name, case in measured.items() if "hand-over" not in name}
    figure, rows = pyplot.subplots(len(cases), len(_DISTANCES), figsize=(12, 2.6 * len(cases)))
    for row, (name, case) in zip(rows, cases.items(), strict=True):
        for axis, key in zip(row, _DISTANCES, strict=True):
            _bars(axis, {peer: values[key] for peer, values in case.items() if key in values})
            axis.set_xscale("log")
            axis.set_xticks([1, 10], ["1", "10"])
            axis.minorticks_off()
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_title(f"{name}\n{key}", fontsize=9)
    _save(figure, file)


def _bars(axis: Any, values: dict[str, float]) -> None:
    names = list(reversed(values))
    colors = [_OURS if name == "strictproxy" else _THEIRS for name in names]
    drawn = axis.barh(names, [values[name] for name in names], color=colors)
    axis.bar_label(drawn, [_short(values[name]) for name in names], fontsize=7, padding=2)
    axis.margins(x=0.2)
    axis.tick_params(labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
