"""Parts of a body that a client asks for: the Range header (RFC 9110, 14). Pure."""

from __future__ import annotations

import re


class Unsatisfiable(Exception):
    """The range lies outside of the body."""


def parse_range(value: str, size: int) -> tuple[int, int] | None:
    """
    Return the first byte that is asked for and the one behind the last.

    :return: None if the header is to be ignored: it is malformed, of another
        unit, or asks for several parts, which nobody has to send (RFC 9110, 14.2).
    :raise Unsatisfiable: there is nothing at that place.
    """
    found = re.fullmatch(r"\s*bytes\s*=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})\s*", value, re.I)
    if found is None:
        return None
    first, last = found.groups()
    if not first:
        if not last:
            return None
        # The last so many bytes.
        count = min(int(last), size)
        if not count:
            raise Unsatisfiable
        return size - count, size
    start = int(first)
    if last and int(last) < start:
        return None
    if start >= size:
        raise Unsatisfiable
    return start, min(int(last) + 1, size) if last else size
