"""
A faithful fake of the API server, as far as EndpointSlices go.

It keeps objects, versions and a history that can be compacted; serves list
(in pages), watch, bookmarks, time-outs and errors, in the shapes that real API
servers send. A `twisted.web` resource, so it can stand behind a real port or
be reached in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

SERVICE = "transcode-pods"


def make_slice(name: str, endpoints: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return an EndpointSlice as kube-controller-manager makes them."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "generateName": f"{SERVICE}-",
            "namespace": "media",
            "uid": f"uid-of-{name}",
            "generation": 1,
            "creationTimestamp": "2026-11-24T00:00:00Z",
            "labels": {
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": SERVICE,
                "service.kubernetes.io/headless": "",
            },
            "annotations": {
                "endpoints.kubernetes.io/last-change-trigger-time": "2026-11-24T00:00:00Z"
            },
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": SERVICE}],
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        **more,
    }


def make_endpoint(
    host: str, *, ready: bool | None = True, terminating: bool = False, pod: str | None = None
) -> dict[str, Any]:
    """Return one endpoint of a slice."""
    pod = pod or f"pod-{host}"
    return {
        "addresses": [host],
        "conditions": {"ready": ready, "serving": ready, "terminating": terminating},
        "nodeName": "node-1",
        "targetRef": {"kind": "Pod", "name": pod, "namespace": "media", "uid": f"uid-{pod}"},
        "zone": "zone-a",
        "hints": {"forZones": [{"name": "zone-a"}]},
    }


class FakeApiServer(Resource):
    """The resource at `/apis/discovery.k8s.io/v1/namespaces/media/endpointslices`."""

    isLeaf = True
    path = b"/apis/discovery.k8s.io/v1/namespaces/media/endpointslices"

    def __init__(self) -> None:
        super().__init__()
        self.version = 1000
        self.objects: dict[str, dict[str, Any]] = {}
        self.history: list[dict[str, Any]] = []
        #: what is older than this is history that is gone
        self.compacted = 0
        self.watches: list[Request] = []
        self.token = "secret"
        #: status codes that the next requests are answered with
        self.errors: list[int] = []
        self.retry_after = b"1"
        self.page = 500
        self.requests: list[str] = []
        #: changes the bytes of events before they leave
        self.wire: Callable[[bytes], bytes] = lambda data: data

    # -- what happens in the cluster

    def put(self, item: dict[str, Any]) -> None:
        """Create or change an object."""
        name = item["metadata"]["name"]
        kind = "MODIFIED" if name in self.objects else "ADDED"
        self.objects[name] = self._stamp(item)
        self._happened(kind, self.objects[name])

    def delete(self, name: str) -> None:
        """Delete an object."""
        # As real servers do, the last state with the version of the deletion.
        self._happened("DELETED", self._stamp(self.objects.pop(name)))

    def bookmark(self) -> None:
        """Tell watches where they are."""
        self.version += 1
        event = {
            "type": "BOOKMARK",
            "object": {
                "kind": "EndpointSlice",
                "apiVersion": "discovery.k8s.io/v1",
                "metadata": {"resourceVersion": str(self.version), "creationTimestamp": None},
                "endpoints": None,
                "ports": None,
            },
        }
        for watch in self.watches:
            watch.write(self.encode(event))

    def compact(self) -> None:
        """Forget the history."""
        self.compacted = self.version
        self.history = []

    def _stamp(self, item: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        metadata = {**item["metadata"], "resourceVersion": str(self.version)}
        return {**item, "metadata": metadata}

    def _happened(self, kind: str, item: dict[str, Any]) -> None:
        event = {"type": kind, "object": item}
        self.history.append(event)
        for watch in self.watches:
            watch.write(self.encode(event))

    def encode(self, event: dict[str, Any]) -> bytes:
        """Return an event's bytes."""
        return self.wire(json.dumps(event).encode() + b"\n")

    # -- what happens to connections

    def end_watches(self) -> None:
        """End every watch, as after `timeoutSeconds`."""
        watches, self.watches = self.watches, []
        for watch in watches:
            watch.finish()

    def cut(self) -> None:
        """Cut every watch's connection."""
        watches, self.watches = self.watches, []
        for watch in watches:
            transport: Any = watch.transport
            transport.loseConnection()

    # -- requests

    def render_GET(self, request: Request) -> bytes | int:
        """Answer."""
        arguments = {key.decode(): values[0].decode() for key, values in request.args.items()}
        self.requests.append("watch" if "watch" in arguments else "list")
        request.setHeader(b"content-type", b"application/json")
        if self.errors:
            return self._status(request, self.errors.pop(0), "as you wish")
        if request.getHeader("authorization") != f"Bearer {self.token}":
            return self._status(request, 401, "Unauthorized")
        if request.path != self.path or arguments.get("labelSelector") != (
            f"kubernetes.io/service-name={SERVICE}"
        ):
            return self._status(request, 403, f"forbidden: {request.uri!r}")
        return self._watch(request, arguments) if "watch" in arguments else self._list(arguments)

    def _list(self, arguments: dict[str, str]) -> bytes:
        begin = int(arguments.get("continue", "0"))
        end = begin + min(self.page, int(arguments["limit"]))
        names = sorted(self.objects)
        metadata = {"resourceVersion": str(self.version)}
        if end < len(names):
            metadata["continue"] = str(end)
        document = {
            "kind": "EndpointSliceList",
            "apiVersion": "discovery.k8s.io/v1",
            "metadata": metadata,
            "items": [self.objects[name] for name in names[begin:end]],
        }
        return json.dumps(document).encode()

    def _watch(self, request: Request, arguments: dict[str, str]) -> bytes | int:
        begin = int(arguments["resourceVersion"])
        assert arguments["allowWatchBookmarks"] == "1" or arguments["allowWatchBookmarks"] == "true"
        assert int(arguments["timeoutSeconds"]) > 0
        # Headers leave at once, as with chunked answers of real servers.
        request.write(b"")
        if begin < self.compacted:
            status = self._failure(410, "Expired", f"too old resource version: {begin}")
            request.write(self.encode({"type": "ERROR", "object": status}))
            request.finish()
            return NOT_DONE_YET
        for event in self.history:
            if int(event["object"]["metadata"]["resourceVersion"]) > begin:
                request.write(self.encode(event))
        self.watches.append(request)
        request.notifyFinish().addErrback(lambda _: self._left(request))
        return NOT_DONE_YET

    def _left(self, request: Request) -> None:
        if request in self.watches:
            self.watches.remove(request)

    def _failure(self, code: int, reason: str, message: str) -> dict[str, Any]:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }

    def _status(self, request: Request, code: int, message: str) -> bytes:
        request.setResponseCode(code)
        if code == 429:
            request.setHeader(b"retry-after", self.retry_after)
        return json.dumps(self._failure(code, "SomeReason", message)).encode()
