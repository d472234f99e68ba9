"""
What is known of one detached request: what came, what became of it. Pure.

The document of a record is what is stored; its description is what its client
is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from typing import Any

#: So much of an id is told to people who only need to tell tasks apart.
_SHORT = 8


class DetachedState(Enum):
    """Where a detached request is."""

    QUEUED = "queued"
    RUNNING = "running"
    #: its pod has answered, whatever the status
    DONE = "done"
    #: no pod has answered it
    FAILED = "failed"
    #: its client, or an operator, did not want it any more
    CANCELLED = "cancelled"
    #: it has waited as long as it may
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self not in (DetachedState.QUEUED, DetachedState.RUNNING)


@dataclass(slots=True)
class Callback:
    """Whom to tell that a task has ended, and how that goes."""

    url: str
    #: pending, delivered or failed
    state: str = "pending"
    attempts: int = 0
    error: str | None = None


@dataclass(slots=True)
class HeldSlot:
    """A slot of a pod that may still be at work on what a crash interrupted."""

    host: str
    port: int
    #: seconds of the epoch
    until: float


@dataclass(slots=True)
class DetachedRecord:
    """One detached request; times are seconds of the epoch, texts of headers are Latin-1."""

    #: nobody can guess it: who knows it may see and cancel the task
    id: str
    #: place in the order of arrival
    seq: int
    route: str
    upstream: str
    created: float
    # The request.
    method: str
    target: str
    host: str
    fields: list[tuple[str, str]]
    peer: tuple[str, bool, bool]
    client: str
    request_id: str
    body_size: int
    # What its route allowed.
    repeat: bool
    max_result: int
    limit_wait: float
    hold_interrupted: float
    # What became of it.
    state: DetachedState = DetachedState.QUEUED
    started: float | None = None
    ended: float | None = None
    pod: tuple[str, int] | None = None
    #: of pods that had it when the proxy ended; they outlive another such end, and the task
    held: list[HeldSlot] = field(default_factory=list)
    #: times that it was given to a pod
    attempts: int = 0
    #: of the pod's answer, or of ours
    status: int | None = None
    #: header lines of the pod's answer
    lines: list[str] = field(default_factory=list)
    result_size: int = 0
    #: why there is no answer of a pod: for machines, and for people
    reason: str | None = None
    title: str | None = None
    detail: str | None = None
    callback: Callback | None = None
    #: the digest of its Idempotency-Key with its route and whoever came with it, and that
    #: of the request
    key: str | None = None
    fingerprint: str | None = None

    @property
    def short(self) -> str:
        """What people may call it by."""
        return self.id[:_SHORT]

    @property
    def size(self) -> int:
        """Bytes that its files take."""
        return self.body_size + self.result_size

    def interrupted(self, now: float) -> None:
        """Note that the proxy has ended while its pod had it."""
        if self.hold_interrupted and self.pod is not None:
            self.held.append(HeldSlot(*self.pod, now + self.hold_interrupted))

    def document(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the record as plain data, with these changes."""
        document = {**asdict(self), **(changes or {})}
        document["state"] = document["state"].value
        return document

    def description(self, now: float) -> dict[str, Any]:
        """Return what its client is told, place in the line apart."""
        description: dict[str, Any] = {
            "id": self.id,
            "state": self.state.value,
            "created": _moment(self.created),
            "age": round(max(0.0, now - self.created), 3),
        }
        if self.started is not None and self.state is not DetachedState.QUEUED:
            description["started"] = _moment(self.started)
        if self.pod is not None and self.state is not DetachedState.QUEUED:
            host, port = self.pod
            description["pod"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self.ended is not None:
            description["ended"] = _moment(self.ended)
        if self.state is DetachedState.DONE:
            description |= {"status": self.status, "size": self.result_size}
        if self.reason is not None and self.state.ended:
            description |= {"reason": self.reason, "detail": self.detail}
        if self.callback is not None:
            description["callback"] = {
                key: value for key, value in asdict(self.callback).items() if key != "url"
            }
        return description


def from_document(document: Mapping[str, Any]) -> DetachedRecord:
    """
    Return the record of a document.

    :raise ValueError: it is none, or one of another version.
    """
    names = {each.name for each in fields(DetachedRecord)}
    try:
        known = {name: value for name, value in document.items() if name in names}
        record = DetachedRecord(**known)
        record.state = DetachedState(document["state"])
        record.fields = [(name, value) for name, value in document["fields"]]
        address, trusted, secure = document["peer"]
        record.peer = (address, trusted, secure)
        if record.pod is not None:
            host, port = record.pod
            record.pod = (host, port)
        record.held = [HeldSlot(**each) for each in document.get("held", [])]
        if document.get("callback") is not None:
            record.callback = Callback(**document["callback"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"not a detached request: {error}") from None
    return record


def _moment(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return moment.replace("+00:00", "Z")
