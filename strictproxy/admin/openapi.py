"""The OpenAPI description of the admin API; the tests hold the API to it."""

from __future__ import annotations

from typing import Any

from strictproxy.snapshot import PodCondition

_NUMBER: dict[str, Any] = {"type": "number", "minimum": 0}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_TEXT: dict[str, Any] = {"type": "string"}
_FLAG: dict[str, Any] = {"type": "boolean"}
_LEVEL: dict[str, Any] = {"enum": ["debug", "info", "warn", "error", "critical"]}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _list(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


_POD = _object(
    {
        "address": _TEXT,
        "leases": _COUNT,
        "limit": _COUNT,
        "known": _FLAG,
        "condition": {"enum": [each.value for each in PodCondition]},
        "failures": _COUNT,
        "trial_in": _or_null(_NUMBER),
        "last_error": _or_null(_TEXT),
        "requests_total": _COUNT,
        "failures_total": _COUNT,
    }
)
_DISCOVERY = _object(
    {
        "in_force": _or_null(_list(_TEXT)),
        "since": _or_null(_NUMBER),
        "candidate": _or_null(_list(_TEXT)),
        "agreed": _COUNT,
        "rejections": _COUNT,
        "last_error": _or_null(_TEXT),
        "lookups": {"type": "object", "additionalProperties": _COUNT},
    }
)
_UPSTREAM = _object(
    {
        "trusted": _FLAG,
        "paused": _FLAG,
        "waiting": _COUNT,
        "waiting_bytes": _COUNT,
        "oldest_waiting": _NUMBER,
        "running": _COUNT,
        "slots": _COUNT,
        "limit": _COUNT,
        "utilisation": _NUMBER,
        "desired_pods": _COUNT,
        "shrinks": _COUNT,
        "pods": _list(_POD),
        "discovery": _or_null(_DISCOVERY),
    }
)
_REQUEST = _object(
    {
        "number": _COUNT,
        "route": _TEXT,
        "client": _TEXT,
        "request_id": _TEXT,
        "age": _NUMBER,
        "pod": _TEXT,
        "position": _COUNT,
        "task": _TEXT,
    },
    optional=("pod", "position", "task"),
)
_DETAIL = _object({**_UPSTREAM["properties"], "requests": _list(_REQUEST), "line": _list(_REQUEST)})
_AUTOSCALING = _object(
    {"running": _COUNT, "waiting": _COUNT, "limit": _COUNT, "pods": _COUNT, "desired_pods": _COUNT}
)
_ERROR = _object({"error": _TEXT})


def _json(schema: dict[str, Any], what: str) -> dict[str, Any]:
    return {"description": what, "content": {"application/json": {"schema": schema}}}


def _operation(
    what: str,
    schema: dict[str, Any],
    *errors: int,
    body: dict[str, Any] | None = None,
    parameters: tuple[str, ...] = (),
    operation_id: str,
) -> dict[str, Any]:
    reasons = {
        400: "The body is not what it should be.",
        401: "The token is missing, or another one.",
        403: "The configuration does not allow it.",
        404: "There is no such thing.",
        405: "Another method.",
        413: "The body is too long.",
        422: "The configuration file has mistakes; nothing has changed.",
    }
    responses = {"200": _json(schema, what)}
    for code in (401, 403, *errors):
        responses[str(code)] = _json(_ERROR, reasons[code])
    operation: dict[str, Any] = {
        "summary": what,
        "operationId": operation_id,
        "responses": responses,
    }
    if parameters:
        operation["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "schema": {"type": "string", "minLength": 1},
            }
            for name in parameters
        ]
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
    return operation


_CHANGE_UPSTREAM = _object(
    {"limit": {"type": "integer", "minimum": 1, "maximum": 1_000_000}, "paused": _FLAG},
    optional=("limit", "paused"),
)

DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "strictproxy admin API",
        "version": "1",
        "description": "Pods, slots and the line of each upstream, and what operators may change.",
    },
    "servers": [{"url": "/api/v1"}],
    "security": [{"token": []}, {}],
    "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    "paths": {
        "/state": {
            "get": _operation(
                "The state of every upstream.",
                _object(
                    {
                        "upstreams": {"type": "object", "additionalProperties": _UPSTREAM},
                        "stopping": _FLAG,
                    }
                ),
                operation_id="state",
            )
        },
        "/upstreams/{upstream}": {
            "get": _operation(
                "One upstream, with the requests that run and the first hundred that wait.",
                _DETAIL,
                404,
                parameters=("upstream",),
                operation_id="upstream",
            ),
            "patch": _operation(
                "Change an upstream's limit until the configuration's changes; pause it or go on.",
                _UPSTREAM,
                400,
                404,
                413,
                parameters=("upstream",),
                body=_CHANGE_UPSTREAM,
                operation_id="change_upstream",
            ),
        },
        "/upstreams/{upstream}/autoscaling": {
            "get": _operation(
                "How many pods would serve all that runs and waits now.",
                _AUTOSCALING,
                404,
                parameters=("upstream",),
                operation_id="autoscaling",
            )
        },
        "/upstreams/{upstream}/pods/{pod}": {
            "patch": _operation(
                "Give a pod nothing new, or let it take requests again.",
                _UPSTREAM,
                400,
                404,
                413,
                parameters=("upstream", "pod"),
                body=_object({"drained": _FLAG}),
                operation_id="change_pod",
            )
        },
        "/requests/{number}": {
            "delete": _operation(
                "End a request that waits or runs: its client gets 503, reason cancelled.",
                _object({"cancelled": _COUNT}),
                404,
                parameters=("number",),
                operation_id="cancel",
            )
        },
        "/reload": {
            "post": _operation(
                "Read the configuration file again.",
                _object({"changes": _list(_TEXT)}),
                422,
                operation_id="reload",
            )
        },
        "/log": {
            "get": _operation(
                "How much is logged.", _object({"level": _LEVEL}), operation_id="log"
            ),
            "put": _operation(
                "Log more, or less.",
                _object({"level": _LEVEL}),
                400,
                413,
                body=_object({"level": _LEVEL}),
                operation_id="set_log",
            ),
        },
    },
}
