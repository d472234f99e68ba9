"""
What a client would like: the Prefer header (RFC 7240). Pure.

Only what this proxy can do something about is understood; the rest is for the pod.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
#: A name, and perhaps a value.
_PAIR = re.compile(rf"({_TOKEN})(?:\s*=\s*({_TOKEN}|{_QUOTED})?)?")
#: What there is between commas, and between semicolons, outside of quotes.
_PREFERENCE = re.compile(rf"(?:{_QUOTED}|[^,\"])+")
_PARAMETER = re.compile(rf"(?:{_QUOTED}|[^;\"])+")

#: A longer wait helps nobody: whoever waits asks again.
MAX_WAIT = 300.0


@dataclass(frozen=True, slots=True)
class Preferences:
    """The preferences of one request."""

    #: the answer may be that it will be answered later
    respond_async: bool = False
    #: for as long as this, seconds, the client would rather wait
    wait: float | None = None
    #: whom to tell when it is done
    callback: str | None = None
    #: what else there is, as a header value, or None
    rest: str | None = None


def parse_preferences(values: Iterable[str]) -> Preferences:
    """
    Return what the values of all Prefer headers say.

    What cannot be understood is left to the pod; of one that is there twice the
    first counts (RFC 7240, 2).
    """
    respond_async = False
    wait: float | None = None
    callback: str | None = None
    rest: list[str] = []
    for preference in _PREFERENCE.findall(",".join(values)):
        parts = [_PAIR.fullmatch(part.strip()) for part in _PARAMETER.findall(preference)]
        first = parts[0] if parts else None
        name = "" if first is None else first[1].lower()
        value = "" if first is None else _unquoted(first[2])
        if name == "respond-async" and not respond_async:
            respond_async = True
            for part in parts[1:]:
                if part is not None and part[1].lower() == "callback" and callback is None:
                    callback = _unquoted(part[2])
        elif name == "wait" and wait is None and re.fullmatch(r"[0-9]{1,9}", value):
            wait = min(float(value), MAX_WAIT)
        elif preference.strip() and name not in ("respond-async", "wait"):
            rest.append(preference.strip())
    return Preferences(respond_async, wait, callback or None, ", ".join(rest) or None)


def _unquoted(value: str | None) -> str:
    if value is None:
        return ""
    if value.startswith('"'):
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value
