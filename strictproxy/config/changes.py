"""What differs between two configurations, for people. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from strictproxy.config.model import Config, HeaderEdits, RouteConfig, RouterConfig
from strictproxy.scheduling import Address


def changes(old: Config, new: Config) -> list[str]:
    """
    Return what a change from `old` to `new` means, a line for each key.

    Header values and routers' settings are not shown: they may be secrets.
    """
    return list(_differences("", old, new))


def _differences(path: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, (HeaderEdits, RouterConfig)) and type(old) is type(new):
        yield f"{path}: changed"
    elif is_dataclass(old) and type(old) is type(new):
        for field in fields(old):
            inner = f"{path}.{field.name}" if path else field.name
            yield from _differences(inner, getattr(old, field.name), getattr(new, field.name))
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        yield from _by_name(path, old, new)
    elif _are_routes(old) and _are_routes(new):
        before, after = ({route.name: route for route in routes} for routes in (old, new))
        yield from _by_name(path, before, after)
        if list(before) != list(after) and set(before) == set(after):
            yield f"{path}: in another order"
    else:
        yield f"{path}: {_shown(old)} -> {_shown(new)}"


def _by_name(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in old:
        if name not in new:
            yield f"{path}.{name}: removed"
    for name in new:
        if name not in old:
            yield f"{path}.{name}: added"
        else:
            yield from _differences(f"{path}.{name}", old[name], new[name])


def _are_routes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, RouteConfig) for each in value)


def _shown(value: Any) -> str:
    if value is None:
        return "off"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Address):
        return str(value)
    if isinstance(value, (tuple, frozenset)):
        items = [_shown(each) for each in value]
        return f"[{', '.join(sorted(items) if isinstance(value, frozenset) else items)}]"
    if is_dataclass(value):
        inner = ", ".join(f"{f.name}: {_shown(getattr(value, f.name))}" for f in fields(value))
        return f"{{{inner}}}"
    return str(value)
