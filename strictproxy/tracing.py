"""
Spans for OpenTelemetry: one for the exchange, and in it one for waiting and one for the pod.

Optional: `pip install strictproxy[tracing]`, and `tracing:` in the configuration.
The context goes on to the pod by `traceparent` (W3C Trace Context), so that its
own spans hang below ours. Spans are exported by a thread of the SDK's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from strictproxy.config.model import TracingConfig
from strictproxy.errors import ConfigError
from strictproxy.http.heads import RequestHead

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


def make_provider(config: TracingConfig) -> TracerProvider:
    """
    Return what exports spans as configured.

    :raise ConfigError: the packages that it needs are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise ConfigError(f"tracing needs strictproxy[tracing]: {error}") from None
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(config.sample),
        resource=Resource.create({"service.name": config.service}),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.endpoint)))
    return provider


class Tracing:
    """Begins traces; owns their provider."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api: Any = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("strictproxy")

    def begin(self, head: RequestHead) -> Trace:
        """Begin the trace of an exchange, below the client's if it told of one."""
        told = {}
        for name in ("traceparent", "tracestate"):
            value = head.get(name.encode())
            if value is not None:
                told[name] = value.decode("latin-1")
        context = self._propagator.extract(told)
        method = head.method.decode("latin-1")
        span = self._tracer.start_span(
            method,
            context=context,
            kind=self._api.SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                # Without the query: it may have secrets.
                "url.path": head.target.partition(b"?")[0].decode("latin-1"),
            },
        )
        return Trace(self, span)

    def child(self, parent: Span, name: str, **attributes: str) -> Span:
        """Begin a span below another."""
        kind = self._api.SpanKind.CLIENT if name == "pod" else self._api.SpanKind.INTERNAL
        context = self._api.set_span_in_context(parent)
        span: Span = self._tracer.start_span(
            name, context=context, kind=kind, attributes=attributes
        )
        return span

    def header(self, span: Span) -> bytes:
        """Return the `traceparent` that makes a span the parent of the pod's."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=self._api.set_span_in_context(span))
        return carrier.get("traceparent", "").encode()

    def failed(self, span: Span, reason: str) -> None:
        """Mark a span as failed."""
        span.set_status(self._api.Status(self._api.StatusCode.ERROR, reason))

    def stop(self) -> None:
        """Export what is left. Blocks; for a thread."""
        self._provider.shutdown()


class Trace:
    """The spans of one exchange."""

    __slots__ = ("_child", "_span", "_tracing")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span
        self._child: Span | None = None

    def waits(self, route: str, upstream: str) -> None:
        """Note that the route is known, and a slot asked for."""
        self._span.set_attributes({"http.route": route, "strictproxy.upstream": upstream})
        self._next("wait")

    def sent(self, pod: str) -> bytes:
        """Note that the request goes to a pod; returns its `traceparent`."""
        child = self._next("pod", **{"server.address": pod})
        return self._tracing.header(child)

    def ended(self, status: int, reason: str | None, tries: int) -> None:
        """End."""
        self._span.set_attributes({"http.response.status_code": status, "strictproxy.tries": tries})
        if reason is not None:
            self._tracing.failed(self._span, reason)
            if self._child is not None:
                self._tracing.failed(self._child, reason)
        if self._child is not None:
            self._child.end()
        self._span.end()

    def _next(self, name: str, **attributes: str) -> Span:
        if self._child is not None:
            self._child.end()
        self._child = self._tracing.child(self._span, name, **attributes)
        return self._child
