"""
What a service's answers say about its tasks: which id, and whether it is done. Pure.

JSON is looked into by JSON Pointer (RFC 6901).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from strictproxy.config.model import TaskDone, TaskId

_MAX_ID = 200
_MISSING = object()


def look_up(document: Any, pointer: str) -> Any:
    """
    Return what a JSON Pointer refers to.

    :raise KeyError: there is nothing.
    """
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(document, dict) and name in document:
            document = document[name]
        elif isinstance(document, list) and name.isdecimal() and int(name) < len(document):
            document = document[int(name)]
        else:
            raise KeyError(pointer)
    return document


def _value(body: bytes, pointer: str) -> Any:
    try:
        return look_up(json.loads(body), pointer)
    except (ValueError, KeyError, RecursionError):
        return _MISSING


def find_id(
    rule: TaskId, status: int, header: Callable[[bytes], bytes | None], body: bytes
) -> str | None:
    """
    Return the id that the answer to a submit call gives, or None if there is no task.

    :param header: gives a header field's value by its name in lower case.
    """
    if not 200 <= status < 300:
        return None
    found: Any = _MISSING
    if rule.json is not None:
        found = _value(body, rule.json)
    else:
        name = "location" if rule.header is None else rule.header.lower()
        value = header(name.encode())
        if value is not None:
            found = value.decode("latin-1")
            if rule.header is None:
                found = unquote(urlsplit(found).path.rstrip("/").rpartition("/")[2])
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    # Whatever it is, it must fit into a path and a log line.
    if isinstance(found, str) and 0 < len(found) <= _MAX_ID and found.isprintable():
        return found
    return None


def is_done(rule: TaskDone, status: int, body: bytes) -> bool:
    """Return whether an answer about a task says that it is done."""
    if rule.json is None:
        return status in rule.statuses
    if not 200 <= status < 300:
        return False
    found = _value(body, rule.json)
    if isinstance(found, bool):
        found = "true" if found else "false"
    return found is not _MISSING and str(found) in rule.values


class Template:
    """A path with `{id}` in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        before, _, after = text.partition("{id}")
        self._pattern = re.compile(f"{re.escape(before)}([^/]+){re.escape(after)}")

    def match(self, path: str) -> str | None:
        """Return the id that a path names, or None if it is another path."""
        found = self._pattern.fullmatch(path)
        return None if found is None else unquote(found[1])

    def fill(self, task_id: str) -> str:
        """Return the path for an id."""
        return self.text.replace("{id}", quote(task_id, safe=""))
