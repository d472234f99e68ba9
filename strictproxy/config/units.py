"""Durations and sizes as people write them: `500ms`, `2h`, `64KiB`."""

from __future__ import annotations

import re

_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_NUMBER_AND_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_duration(text: str) -> float:
    """
    Read a duration into seconds; several parts may follow each other, as in `1h30m`.

    :raise ValueError: with a text for the person who wrote it.
    """
    return _parse(text, _DURATIONS, "a duration", "30s")


def parse_size(text: str) -> int:
    """
    Read a size into bytes.

    :raise ValueError: with a text for the person who wrote it.
    """
    return int(_parse(text, _SIZES, "a size", "64KiB"))


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    known = ", ".join(units)
    total = 0.0
    position = 0
    for match in _NUMBER_AND_UNIT.finditer(text):
        number, unit = match.groups()
        if match.start() != position:
            break
        if not unit and float(number) != 0:
            raise ValueError(f"{text!r} needs a unit ({known}), as in {example}")
        if unit and unit not in units:
            raise ValueError(f"unknown unit {unit!r} in {text!r}; units are {known}")
        total += float(number) * (units[unit] if unit else 0)
        position = match.end()
    if position == 0 or position != len(text):
        raise ValueError(f"{text!r} is not {what} such as {example}")
    return total
