"""What may stand in a configuration file's routes and routers, and what it turns into."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from strictproxy.config import kinds, reader
from strictproxy.config.model import (
    Body,
    DetachConfig,
    HeaderEdits,
    Match,
    OnDisconnect,
    RouteConfig,
    RouterConfig,
    TaskCallback,
    TaskConfig,
    TaskDone,
    TaskId,
    TaskPoll,
    UpstreamConfig,
)
from strictproxy.config.reader import Document, Section

#: A route, and where it stands.
RouteAt = tuple[Section, RouteConfig]


def route(document: Document, node: yaml.Node, path: str) -> RouteAt:
    """Read a route; its section stays with it, for checks across routes."""

    def read(part: Section) -> RouteAt:
        return part, _route_config(part)

    return reader.section(read)(document, node, path)


def _route_config(part: Section) -> RouteConfig:
    match = Match(
        path=part.take("path", kinds.url_path, None),
        prefix=part.take("prefix", kinds.url_path, None),
        regex=part.take("regex", kinds.regular_expression, None),
        host=part.take("host", kinds.host_pattern, None),
        methods=frozenset(part.take("methods", reader.one_or_more(kinds.method), ())),
        headers=part.take("headers", kinds.named_headers, ()),
    )
    given = [key for key in ("path", "prefix", "regex") if key in part]
    if len(given) > 1:
        part.note(given[1], f"{given[0]!r} and {given[1]!r} exclude each other")
    if match == Match():
        wanted = ("path", "prefix", "regex", "host", "methods", "headers")
        if not any(key in part for key in wanted):
            part.note(None, f"matches nothing in particular: give one of {', '.join(wanted)}")
    strip = part.take("strip_prefix", reader.boolean, False)
    replace = part.take("replace_prefix", kinds.url_path, None)
    for key in ("strip_prefix", "replace_prefix"):
        if key in part and match.path is None and match.prefix is None:
            part.note(key, "needs 'path' or 'prefix'")
    if strip and replace is not None:
        part.note("replace_prefix", "'strip_prefix' and 'replace_prefix' exclude each other")
    return RouteConfig(
        name=part.take("name", reader.text, None) or _name_of(match),
        match=match,
        upstream=part.take("upstream", reader.text),
        limit=part.take("limit", reader.whole(1), None),
        replace_prefix="/" if strip else replace,
        on_client_disconnect=part.take(
            "on_client_disconnect", reader.choice(OnDisconnect), OnDisconnect.CANCEL
        ),
        max_body=part.take("max_body", reader.size, None),
        body=part.take("body", reader.choice(Body), Body.STREAM),
        request_headers=part.take("request_headers", reader.section(_edits), HeaderEdits()),
        response_headers=part.take("response_headers", reader.section(_edits), HeaderEdits()),
        failures=frozenset(part.take("failures", reader.one_or_more(kinds.status), ())),
        retry=frozenset(part.take("retry", reader.one_or_more(kinds.method), ())),
        timeout=part.take("timeout", reader.duration, None),
        task=part.take("task", reader.section(_task), None),
        detach=_detach_of(part),
    )


def _detach_of(part: Section) -> DetachConfig | None:
    detach: DetachConfig | None = part.take("detach", _detach, None)
    if detach is not None and "task" in part:
        part.note("detach", "'task' and 'detach' exclude each other")
    return detach


def _detach(document: Document, node: yaml.Node, path: str) -> DetachConfig | None:
    """`true`, or a mapping of what is different from the defaults."""
    if isinstance(node, yaml.MappingNode):
        return reader.section(_detach_section)(document, node, path)
    return DetachConfig() if reader.boolean(document, node, path) else None


def _detach_section(part: Section) -> DetachConfig:
    default = DetachConfig()
    hold = part.take("hold_interrupted", reader.or_off(reader.duration), None)
    return DetachConfig(
        repeat=part.take("repeat", reader.boolean, default.repeat),
        max_result=part.take("max_result", reader.size, default.max_result),
        limit_wait=part.take("limit_wait", reader.duration, default.limit_wait),
        hold_interrupted=hold or 0.0,
    )


def _task(part: Section) -> TaskConfig:
    default = TaskConfig(TaskId())
    done = part.take("done", reader.section(_task_done), None)
    poll = part.take("poll", reader.section(_task_poll), None)
    callback = part.take("callback", reader.section(_task_callback), None)
    if "poll" in part and "done" not in part:
        part.note("poll", "needs 'done', to know what the answer means")
    if not any(key in part for key in ("poll", "callback", "done")):
        part.note(None, "nothing says when a task is done: 'poll', 'callback' or 'done'")
    return TaskConfig(
        id=part.take("id", reader.section(_task_id)),
        done=done,
        poll=poll,
        related=part.take("related", reader.one_or_more(kinds.task_path), default.related),
        callback=callback,
        limit_time=part.take("limit_time", reader.duration, default.limit_time),
        keep=part.take("keep", reader.duration, default.keep),
        resubmit=part.take("resubmit", reader.boolean, default.resubmit),
    )


def _task_id(part: Section) -> TaskId:
    given = [key for key in ("json", "header", "location") if key in part]
    if len(given) != 1:
        part.note(None, "needs one of 'json', 'header' and 'location'")
    return TaskId(
        json=part.take("json", kinds.json_pointer, None),
        header=part.take("header", kinds.header_name, None),
        location=part.take("location", reader.boolean, False),
    )


def _task_done(part: Section) -> TaskDone:
    if ("json" in part) == ("status" in part):
        part.note(None, "needs either 'json' with 'in', or 'status'")
    if ("json" in part) != ("in" in part):
        part.note(None, "'json' and 'in' go together")
    return TaskDone(
        json=part.take("json", kinds.json_pointer, None),
        values=frozenset(part.take("in", reader.one_or_more(kinds.any_text), ())),
        statuses=frozenset(part.take("status", reader.one_or_more(kinds.any_status), ())),
    )


def _task_poll(part: Section) -> TaskPoll:
    return TaskPoll(
        path=part.take("path", kinds.task_path),
        every=part.take("every", reader.duration, TaskPoll.every),
        timeout=part.take("timeout", reader.duration, TaskPoll.timeout),
    )


def _task_callback(part: Section) -> TaskCallback:
    return TaskCallback(
        header=part.take("header", kinds.header_name), base=part.take("base", kinds.url)
    )


def _name_of(match: Match) -> str:
    """Name a route after what it matches."""
    path = match.path or (match.prefix and f"{match.prefix.rstrip('/')}/*")
    path = path or (match.regex and f"~{match.regex}") or ""
    rest = [",".join(sorted(match.methods)), f"{match.host or ''}{path}"]
    rest += [f"{name}={value}" for name, value in match.headers]
    return " ".join(part for part in rest if part)


def check_routes(
    document: Document, routes: tuple[RouteAt, ...], upstreams: Mapping[str, UpstreamConfig]
) -> None:
    """Note routes to nowhere, two that cannot be told apart, and names given twice."""
    matches: dict[Match, Section] = {}
    names: dict[str, Section] = {}
    for part, route in routes:
        if route.upstream not in upstreams:
            hint = reader.suggest(route.upstream, upstreams)
            where = part.value("upstream")
            document.note(where, part.at("upstream"), f"no upstream {route.upstream!r}{hint}")
        first = matches.setdefault(route.match, part)
        if first is not part:
            line = first.node.start_mark.line + 1
            part.note(None, f"matches the same requests as {first.path}, line {line}")
        elif names.setdefault(route.name, part) is not part:
            part.note("name", f"the name {route.name!r} is taken by {names[route.name].path}")


def router(part: Section) -> RouterConfig:
    """A custom router, and what it is to be told."""
    name = part.take("name", reader.text)
    return RouterConfig(name, part.take("settings", kinds.mapping, {}))


def _edits(part: Section) -> HeaderEdits:
    return HeaderEdits(
        set=part.take("set", kinds.header_values, ()),
        add=part.take("add", kinds.header_values, ()),
        remove=part.take("remove", reader.one_or_more(kinds.header_name), ()),
    )
