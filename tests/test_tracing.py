"""Spans: what they are of, what hangs below what, and that they leave."""

from __future__ import annotations

import sys
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from twisted.internet import reactor as _reactor
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from strictproxy.config.model import TracingConfig
from strictproxy.errors import ConfigError
from strictproxy.tracing import Tracing, make_provider
from tests.harness import ProxyTestCase, request, response
from tests.test_admin import AdminTestCase

reactor: Any = _reactor
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class SpanTests(ProxyTestCase):
    def trace(self) -> InMemorySpanExporter:
        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        self.proxy.tracing = Tracing(provider)
        return exporter

    async def test_spans(self) -> None:
        """Below the client's: the exchange; in it, waiting and the pod, whose spans hang below."""
        self.start()
        exporter = self.trace()
        client = await self.client(request("/a?secret=1", f"Traceparent: {PARENT}"))
        pod = await self.pods[0].connection()
        head = (await pod.has(b"\r\n\r\n")).decode()
        (told,) = [line for line in head.splitlines() if line.lower().startswith("traceparent")]
        pod.send(response(b"ok"))
        await client.has(b"\r\n\r\nok")
        wait, on_pod, whole = exporter.get_finished_spans()
        self.assertEqual([s.name for s in (wait, on_pod, whole)], ["wait", "pod", "GET"])
        trace_id, parent = PARENT.split("-")[1:3]
        assert whole.parent is not None
        self.assertEqual(f"{whole.parent.span_id:016x}", parent)
        for span in (wait, on_pod):
            assert span.parent is not None
            self.assertEqual(span.parent.span_id, whole.context.span_id)
            self.assertEqual(f"{span.context.trace_id:032x}", trace_id)
        self.assertEqual(told.split("-")[1:3], [trace_id, f"{on_pod.context.span_id:016x}"])
        attributes = dict(whole.attributes or {})
        self.assertEqual(
            attributes,
            {
                "http.request.method": "GET",
                "url.path": "/a",
                "http.route": "all",
                "strictproxy.upstream": "u",
                "http.response.status_code": 200,
                "strictproxy.tries": 1,
            },
        )

    async def test_failure(self) -> None:
        """What went wrong marks the spans."""
        self.start()
        exporter = self.trace()
        client = await self.client(request("/"))
        pod = await self.pods[0].connection()
        await pod.has(b"\r\n\r\n")
        pod.reset()
        await client.has(b"pod_disconnected")
        _, on_pod, whole = exporter.get_finished_spans()
        self.assertEqual(
            [span.status.description for span in (on_pod, whole)], ["pod_disconnected"] * 2
        )

    async def test_off(self) -> None:
        """Without it, the client's context goes on untouched."""
        self.start()
        client = await self.client(request("/", f"traceparent: {PARENT}"))
        pod = await self.pods[0].connection()
        await pod.has(PARENT.encode())
        pod.send(response())
        await client.has(b"\r\n\r\n")


class ProviderTests(SynchronousTestCase):
    def test_not_installed(self) -> None:
        """Without its packages it says which extra has them."""
        name = "opentelemetry.sdk.trace"
        self.addCleanup(sys.modules.__setitem__, name, sys.modules[name])
        sys.modules[name] = None  # type: ignore[assignment]
        with self.assertRaisesRegex(ConfigError, r"tracing needs strictproxy\[tracing\]"):
            make_provider(TracingConfig("http://127.0.0.1:1/"))


class Collector(Resource):
    """What an OpenTelemetry collector listens with."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.received = b""

    def render_POST(self, request: Any) -> bytes:
        data: bytes = request.content.read()
        encoding = request.getHeader("content-encoding")
        if encoding == "gzip":
            import gzip

            data = gzip.decompress(data)
        self.received += data
        return b""


class ExportTests(AdminTestCase):
    async def test_export(self) -> None:
        """Spans leave for the collector, at the latest when tracing is switched off."""
        collector = Collector()
        port = reactor.listenTCP(0, Site(collector), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        tracing = (
            f"tracing: {{endpoint: 'http://127.0.0.1:{port.getHost().port}/v1/traces',"
            " service: tested}\n"
        )
        await self.start(more=tracing)
        client = await self.client("/traced")
        await self.until(lambda: any(pod.connections for pod in self.pods))
        pod = next(pod for pod in self.pods if pod.connections)
        wire = await pod.connection()
        await wire.has(b"traceparent: 00-")
        wire.send(response())
        await client.has(b"\r\n\r\n")
        self.path.write_text(self.path.read_text().replace(tracing, ""))
        await self.service.reload()
        await self.until(lambda: b"/traced" in collector.received)
        self.assertIn(b"tested", collector.received)
        self.assertIsNone(self.service.proxy.tracing)
