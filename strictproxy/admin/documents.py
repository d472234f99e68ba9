"""What is told about upstreams, as plain data for JSON. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from strictproxy.interfaces import DiscoveryState, Endpoint
from strictproxy.snapshot import PodCondition, PodSnapshot, RequestSnapshot, UpstreamSnapshot


def upstream_document(state: UpstreamSnapshot) -> dict[str, Any]:
    """Return an upstream's state."""
    return {
        "trusted": state.trusted,
        "paused": state.paused,
        "waiting": state.waiting,
        "waiting_bytes": state.waiting_bytes,
        "oldest_waiting": round(state.oldest, 3),
        "running": state.running,
        "slots": state.slots,
        "limit": state.limit,
        "utilisation": round(state.utilisation, 4),
        "desired_pods": state.desired_pods,
        "shrinks": state.shrinks,
        "pods": [_pod(pod) for pod in state.pods],
        "discovery": None if state.discovery is None else _discovery(state.discovery),
    }


def autoscaling_document(state: UpstreamSnapshot) -> dict[str, Any]:
    """Return what an autoscaler needs: KEDA's metrics-api scaler reads one number of it."""
    return {
        "running": state.running,
        "waiting": state.waiting,
        "limit": state.limit,
        "pods": sum(pod.condition is not PodCondition.REMOVED for pod in state.pods),
        "desired_pods": state.desired_pods,
    }


def request_documents(requests: Iterable[RequestSnapshot]) -> list[dict[str, Any]]:
    """Return requests; those that wait with their place in the line, from 1."""
    return [
        {
            "number": each.number,
            "route": each.route,
            "client": each.client,
            "request_id": each.request_id,
            "age": round(each.age, 3),
            **({} if each.task_id is None else {"task": each.task_id}),
            **({"position": position} if each.pod is None else {"pod": str(each.pod)}),
        }
        for position, each in enumerate(requests, 1)
    ]


def compact_document(state: UpstreamSnapshot) -> dict[str, Any]:
    """Return what the dashboard draws, with pods as short as a thousand of them want it."""
    discovery = state.discovery
    return {
        "trusted": state.trusted,
        "paused": state.paused,
        "waiting": state.waiting,
        "oldest": round(state.oldest, 3),
        "running": state.running,
        "slots": state.slots,
        "limit": state.limit,
        "requests": sum(pod.stats.requests for pod in state.pods),
        "failures": sum(pod.stats.failures for pod in state.pods),
        "pods": [
            [str(pod.address), pod.leases, pod.limit, pod.condition.value, pod.last_error]
            for pod in state.pods
        ],
        "discovery": None
        if discovery is None
        else {
            "pods": None if discovery.in_force is None else len(discovery.in_force),
            "since": discovery.since,
            "candidate": None if discovery.candidate is None else len(discovery.candidate),
            "agreed": discovery.agreed,
            "rejections": discovery.rejections,
            "last_error": discovery.last_error,
        },
    }


def _pod(pod: PodSnapshot) -> dict[str, Any]:
    return {
        "address": str(pod.address),
        "leases": pod.leases,
        "limit": pod.limit,
        "known": pod.condition is not PodCondition.REMOVED,
        "condition": pod.condition.value,
        "failures": pod.failures,
        "trial_in": pod.trial_in,
        "last_error": pod.last_error,
        "requests_total": pod.stats.requests,
        "failures_total": pod.stats.failures,
    }


def _discovery(state: DiscoveryState) -> dict[str, Any]:
    def texts(endpoints: Collection[Endpoint] | None) -> list[str] | None:
        if endpoints is None:
            return None
        return [str(endpoint.address) for endpoint in sorted(endpoints)]

    return {
        "in_force": texts(state.in_force),
        "since": state.since,
        "candidate": texts(state.candidate),
        "agreed": state.agreed,
        "rejections": state.rejections,
        "last_error": state.last_error,
        "lookups": dict(state.lookups),
    }
