"""The admin listener: who may do what, what it tells, and what it changes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jsonschema
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet import reactor as _reactor
from twisted.internet.defer import maybeDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.client import Agent, FileBodyProducer, readBody
from twisted.web.http_headers import Headers

from strictproxy.admin import events as events_module
from strictproxy.admin.access import Access, Refused, is_local
from strictproxy.admin.openapi import DOCUMENT
from strictproxy.config.file import ConfigFile
from strictproxy.config.model import AdminConfig
from strictproxy.metrics import Histogram
from strictproxy.service import ProxyService
from tests.harness import ScriptedPod, Wire, request, response

reactor: Any = _reactor


class AccessTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.token = Path(self.mktemp())
        self.token.write_text("secret\n")

    def status(self, config: AdminConfig, header: str | None, *, changes: bool) -> int:
        try:
            Access(config).check(header, changes=changes)
        except Refused as error:
            return error.status
        return 200

    def test_local(self) -> None:
        """Loopback addresses and sockets of the file system are local, others are not."""
        for endpoint, local in (
            ("tcp:9901:interface=127.0.0.1", True),
            ("tcp:9901:interface=127.1.2.3:backlog=5", True),
            (r"tcp6:9901:interface=\:\:1", True),
            ("tcp:9901:interface=localhost", True),
            ("unix:/run/admin.sock", True),
            ("tcp:9901", False),
            ("tcp:9901:interface=10.0.0.1", False),
            ("tcp:9901:interface=0.0.0.0", False),
            (r"tcp6:9901:interface=\:\:", False),
        ):
            self.assertEqual(is_local(endpoint), local, endpoint)

    def test_rules(self) -> None:
        """Without, with a wrong, and with the right token; local, elsewhere, and open."""
        local, other = "tcp:1:interface=127.0.0.1", "tcp:1"
        file = str(self.token)
        for config, reading, changing in (
            (AdminConfig(local), (200, 200, 200), (403, 403, 403)),
            (AdminConfig(other), (403, 403, 403), (403, 403, 403)),
            (AdminConfig(other, open=True), (200, 200, 200), (403, 403, 403)),
            (AdminConfig(local, file), (200, 200, 200), (401, 401, 200)),
            (AdminConfig(other, file), (401, 401, 200), (401, 401, 200)),
            (AdminConfig(other, file, open=True), (200, 200, 200), (401, 401, 200)),
        ):
            for changes, expected in ((False, reading), (True, changing)):
                found = tuple(
                    self.status(config, header, changes=changes)
                    for header in (None, "Bearer wrong", "bearer secret")
                )
                self.assertEqual(found, expected, (config, changes))

    def test_no_token_at_all(self) -> None:
        """An empty or missing file lets nobody in; a new token counts at once."""
        config = AdminConfig("tcp:1", str(self.token))
        self.assertEqual(self.status(config, "Basic secret", changes=True), 401)
        self.token.write_text("other")
        self.assertEqual(self.status(config, "Bearer secret", changes=True), 401)
        self.assertEqual(self.status(config, "Bearer other", changes=True), 200)
        self.token.write_text("\n")
        self.assertEqual(self.status(config, "Bearer ", changes=True), 403)
        self.token.unlink()
        self.assertEqual(self.status(config, "Bearer other", changes=True), 403)


class AdminTestCase(TestCase):
    timeout = 30

    async def start(self, upstream: str = "limit: 1", more: str = "") -> None:
        self.pods = [ScriptedPod(), ScriptedPod()]
        self.token = Path(self.mktemp())
        self.token.write_text("secret")
        self.path = Path(self.mktemp())
        static = ", ".join(f'"{pod.address}"' for pod in self.pods)
        self.path.write_text(
            "listen: tcp:0:interface=127.0.0.1\n"
            f"admin: {{endpoint: 'tcp:0:interface=127.0.0.1', token_file: {self.token}}}\n"
            f"upstreams: {{u: {{static: [{static}], {upstream}}}}}\n"
            f"routes: [{{prefix: /, name: all, upstream: u}}]\nlog: {{access: false}}\n{more}"
        )
        file = ConfigFile(self.path)
        self.service = ProxyService(file.read(), reactor, file)
        self.patch(self.service, "_take_signals", lambda: None)
        self.service.startService()
        self.addCleanup(self.stop)
        await self.service.started
        self.wires: list[Wire] = []
        self.traffic, self.admin = self.service.addresses()

    async def stop(self) -> None:
        for wire in self.wires:
            if not wire.closed:
                wire.reset()

        def ended() -> bool:
            # A pod may accept a connection only now.
            for pod in self.pods:
                for connection in pod.connections:
                    if not connection.closed and connection.transport is not None:
                        connection.reset()
            return not self.service.proxy.running

        await self.until(ended)
        await self.service.stopService()
        for pod in self.pods:
            await maybeDeferred(pod.port.stopListening)
        for wire in [*self.wires, *(c for pod in self.pods for c in pod.connections)]:
            await wire.end()
        await deferLater(reactor, 0.01)

    async def until(self, condition: Any) -> None:
        for _ in range(1000):
            if condition():
                return
            await deferLater(reactor, 0.005)
        self.fail("never happened")

    async def call(
        self, method: str, path: str, body: Any = None, token: str | None = "secret"
    ) -> tuple[int, Any]:
        headers = Headers()
        if token is not None:
            headers.addRawHeader("authorization", f"Bearer {token}")
        producer = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            producer = FileBodyProducer(io.BytesIO(data))
        url = f"http://{self.admin[0]}:{self.admin[1]}{path}".encode()
        answer: Any = await Agent(reactor).request(method.encode(), url, headers, producer)
        text = (await readBody(answer)).decode()
        is_json = answer.headers.getRawHeaders("content-type", [""])[0] == "application/json"
        return answer.code, json.loads(text) if is_json and text else text

    async def connect(self) -> Wire:
        endpoint = TCP4ClientEndpoint(reactor, *self.traffic)
        wire: Wire = await endpoint.connect(Factory.forProtocol(Wire))  # type: ignore[assignment]
        self.wires.append(wire)
        return wire

    async def client(self, path: str) -> Wire:
        wire = await self.connect()
        wire.send(request(path, "X-Request-Id: mine"))
        return wire

    async def two_run_one_waits(self) -> None:
        for number in range(3):
            await self.client(f"/{number}")
            await self.until(lambda number=number: len(self.service.proxy.running) == number + 1)
        state = self.service.upstreams["u"].state()
        self.assertEqual((state.running, state.waiting), (2, 1))


class ApiTests(AdminTestCase):
    async def test_state(self) -> None:
        """Everything about upstreams, pods, the requests that run and the line."""
        await self.start()
        await self.two_run_one_waits()
        code, document = await self.call("GET", "/api/v1/state", token=None)
        self.assertEqual(code, 200)
        schemas = DOCUMENT["paths"]
        operation = schemas["/state"]["get"]["responses"]["200"]["content"]["application/json"]
        jsonschema.validate(document, operation["schema"])
        u = document["upstreams"]["u"]
        self.assertEqual((u["running"], u["waiting"], u["utilisation"]), (2, 1, 1.0))
        self.assertEqual([pod["leases"] for pod in u["pods"]], [1, 1])
        code, document = await self.call("GET", "/api/v1/upstreams/u")
        self.assertEqual(code, 200)
        operation = schemas["/upstreams/{upstream}"]["get"]["responses"]["200"]
        jsonschema.validate(document, operation["content"]["application/json"]["schema"])
        self.assertEqual({each["pod"] for each in document["requests"]},
                         {str(pod.address) for pod in self.pods})  # fmt: skip
        (waiting,) = document["line"]
        self.assertEqual((waiting["position"], waiting["request_id"], waiting["route"]),
                         (1, "mine", "all"))  # fmt: skip

    async def test_autoscaling(self) -> None:
        """Two run, one waits, one each: three pods would do."""
        await self.start()
        await self.two_run_one_waits()
        self.assertEqual(
            await self.call("GET", "/api/v1/upstreams/u/autoscaling"),
            (200, {"running": 2, "waiting": 1, "limit": 1, "pods": 2, "desired_pods": 3}),
        )

    async def test_limit_and_pause(self) -> None:
        """A limit set by hand holds until the configuration's changes; a paused upstream waits."""
        await self.start("limit: 1, queue: {no_pods_timeout: 50ms}")
        await self.two_run_one_waits()
        code, document = await self.call("PATCH", "/api/v1/upstreams/u", {"paused": True})
        self.assertEqual((code, document["paused"], document["slots"]), (200, True, 0))
        self.assertEqual({pod["condition"] for pod in document["pods"]}, {"paused"})
        code, document = await self.call("PATCH", "/api/v1/upstreams/u", {"limit": 2})
        self.assertEqual((code, document["limit"]), (200, 2))
        await deferLater(reactor, 0.2)
        state = self.service.upstreams["u"].state()
        self.assertEqual((state.running, state.waiting), (2, 1))
        await self.call("PATCH", "/api/v1/upstreams/u", {"paused": False})
        state = self.service.upstreams["u"].state()
        self.assertEqual((state.running, state.waiting), (3, 0))
        await self.service.reload()
        self.assertEqual(self.service.upstreams["u"].limit, 2)
        self.path.write_text(self.path.read_text().replace("limit: 1", "limit: 5"))
        self.assertEqual(
            await self.call("POST", "/api/v1/reload"),
            (200, {"changes": ["upstreams.u.limit: 1 -> 5"]}),
        )
        self.assertEqual(self.service.upstreams["u"].limit, 5)

    async def test_drain(self) -> None:
        """A pod is drained and let in again."""
        await self.start()
        path = f"/api/v1/upstreams/u/pods/{self.pods[0].address}"
        for drained, condition in ((True, "drained"), (True, "drained"), (False, "ready")):
            code, document = await self.call("PATCH", path, {"drained": drained})
            self.assertEqual((code, document["pods"][0]["condition"]), (200, condition))

    async def test_cancel(self) -> None:
        """Requests that wait and that run are ended; their clients are told why."""
        await self.start()
        await self.two_run_one_waits()
        _, document = await self.call("GET", "/api/v1/upstreams/u")
        waiting, running = document["line"][0]["number"], document["requests"][0]["number"]
        for number in (waiting, running):
            self.assertEqual(
                await self.call("DELETE", f"/api/v1/requests/{number}"),
                (200, {"cancelled": number}),
            )
        await self.wires[2].has(b'"reason": "cancelled"')
        await self.wires[0].has(b'"reason": "cancelled"')
        code, _ = await self.call("DELETE", f"/api/v1/requests/{waiting}")
        self.assertEqual(code, 404)

    async def test_broken_reload(self) -> None:
        """A mistake in the file is told with its place."""
        await self.start()
        self.path.write_text("listen: [")
        code, document = await self.call("POST", "/api/v1/reload")
        self.assertEqual(code, 422)
        self.assertIn(f"{self.path}:1:", document["error"])

    async def test_log(self) -> None:
        """How much is logged is told, and changed where there is a log of ours."""
        await self.start()
        self.assertEqual(await self.call("GET", "/api/v1/log"), (200, {"level": "info"}))

        class Log:
            level = "info"

        self.service.observer = Log()  # type: ignore[assignment]
        self.assertEqual(
            await self.call("PUT", "/api/v1/log", {"level": "debug"}), (200, {"level": "debug"})
        )
        self.service.observer = None

    async def test_needs_the_token(self) -> None:
        """Nothing that changes something works without the token, or with another."""
        await self.start()
        pod = f"/api/v1/upstreams/u/pods/{self.pods[0].address}"
        before = self.service.upstreams["u"].snapshot()
        for method, path, body in (
            ("PATCH", "/api/v1/upstreams/u", {"limit": 9}),
            ("PATCH", pod, {"drained": True}),
            ("DELETE", "/api/v1/requests/1", None),
            ("POST", "/api/v1/reload", None),
            ("PUT", "/api/v1/log", {"level": "debug"}),
        ):
            for token in (None, "wrong"):
                code, document = await self.call(method, path, body, token)
                self.assertEqual(code, 401, (method, path))
                self.assertIn("token", document["error"])
        self.assertEqual(self.service.upstreams["u"].snapshot().pods, before.pods)
        self.assertEqual(self.service.reloads["success"], 0)

    async def test_mistakes(self) -> None:
        """What is wrong with a request is said."""
        await self.start()
        pod = f"/api/v1/upstreams/u/pods/{self.pods[0].address}"
        for method, path, body, status, message in (
            ("GET", "/api/v1/nothing", None, 404, "there is nothing here"),
            ("GET", "/api/v1/upstreams/x", None, 404, "there is no upstream x"),
            ("PATCH", "/api/v1/upstreams/u/pods/a:1", {"drained": True}, 404, "has no pod a:1"),
            ("POST", "/api/v1/state", None, 405, "POST is not possible here"),
            ("POST", "/api/v1/events", None, 405, "POST is not possible here"),
            ("PATCH", "/api/v1/upstreams/u", {"limit": 0}, 400, "from 1 to 1000000"),
            ("PATCH", "/api/v1/upstreams/u", {"limit": True}, 400, "must be a whole number"),
            ("PATCH", "/api/v1/upstreams/u", {"limit": 1.5}, 400, "must be a whole number"),
            ("PATCH", "/api/v1/upstreams/u", {"limitt": 1}, 400, "unknown key 'limitt'"),
            ("PATCH", "/api/v1/upstreams/u", [], 400, "must be an object"),
            ("PATCH", "/api/v1/upstreams/u", b"{", 400, "not JSON"),
            ("PATCH", "/api/v1/upstreams/u", b" " * 70_000, 413, "more than 65536 bytes"),
            ("PATCH", pod, {}, 400, "'drained' is missing"),
            ("PATCH", pod, {"drained": 1}, 400, "must be bool"),
            ("DELETE", "/api/v1/requests/x", None, 404, "there is no request x"),
            ("PUT", "/api/v1/log", {"level": "loud"}, 400, "must be one of debug"),
        ):
            code, document = await self.call(method, path, body)
            self.assertEqual(code, status, (method, path, body, document))
            self.assertIn(message, document["error"])
        code, document = await self.call("PATCH", "/api/v1/upstreams/u", {"limit": 3.0})
        self.assertEqual((code, document["limit"]), (200, 3))

    async def test_heads_and_description(self) -> None:
        """HEAD goes where GET goes; the API describes itself."""
        await self.start()
        self.assertEqual(await self.call("HEAD", "/api/v1/state"), (200, ""))
        self.assertEqual(await self.call("GET", "/api/v1/openapi.json"), (200, DOCUMENT))

    async def test_traffic_port(self) -> None:
        """Whatever the path, the traffic port leads to pods and nowhere else."""
        await self.start()
        for number, path in enumerate(
            ("/api/v1/state", "/metrics", "//api/v1/state", "/./api/v1/state", "/healthz")
        ):
            client = await self.client(path)
            await self.until(
                lambda path=path: any(
                    f"GET {path} ".encode() in wire.received
                    for each in self.pods
                    for wire in each.connections
                )
            )
            for each in self.pods:
                for wire in each.connections:
                    if f"GET {path} ".encode() in wire.received:
                        wire.take()
                        wire.send(response(b"pod%d" % number))
            await client.has(b"pod%d" % number)


class EventTests(AdminTestCase):
    async def open(self) -> Wire:
        endpoint = TCP4ClientEndpoint(reactor, *self.admin)
        wire: Wire = await endpoint.connect(Factory.forProtocol(Wire))  # type: ignore[assignment]
        self.wires.append(wire)
        wire.send(request("/api/v1/events"))
        return wire

    async def test_events(self) -> None:
        """The state now, and again and again; nothing is made while nobody looks."""
        self.patch(events_module, "_EVERY", 0.02)
        await self.start()
        wire = await self.open()
        await wire.until(lambda: wire.received.count(b"data: ") >= 3)
        self.assertIn(b"content-type: text/event-stream", wire.received.lower())
        first = wire.received.split(b"data: ")[1].split(b"\n\n")[0]
        document = json.loads(first)
        self.assertEqual(document["upstreams"]["u"]["slots"], 2)
        self.assertTrue(self.service._events._loop.running)
        wire.reset()
        await self.until(lambda: not self.service._events._loop.running)

    async def test_too_many(self) -> None:
        """More than a bound of onlookers are turned away."""
        self.patch(events_module, "_MOST", 1)
        await self.start()
        first = await self.open()
        await first.has(b"data: ")
        second = await self.open()
        await second.has(b"503")

    async def test_stopping(self) -> None:
        """Onlookers do not keep the proxy from stopping."""
        await self.start()
        wire = await self.open()
        await wire.has(b"data: ")
        await self.service.stopService()
        await wire.has(b"0\r\n\r\n")


class MetricsTests(AdminTestCase):
    async def families(self) -> dict[str, Any]:
        code, text = await self.call("GET", "/metrics", token=None)
        self.assertEqual(code, 200)
        return {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, families: dict[str, Any], name: str, **labels: str) -> float:
        for family in families.values():
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    value: float = sample.value
                    return value
        raise AssertionError(f"no {name} with {labels}")

    async def test_metrics(self) -> None:
        """Requests, times, pods, the line, discovery and the process, as Prometheus reads them."""
        await self.start()
        await self.two_run_one_waits()
        families = await self.families()
        for name, value in (
            ("waiting_requests", 1), ("leases", 2), ("slots", 2), ("utilisation_ratio", 1),
            ("desired_pods", 3), ("ready", 1), ("paused", 0),
        ):  # fmt: skip
            found = self.value(families, f"strictproxy_upstream_{name}", upstream="u")
            self.assertEqual(found, value, name)
        pod = str(self.pods[0].address)
        self.assertEqual(self.value(families, "strictproxy_pod_leases", pod=pod), 1)
        self.assertEqual(self.value(families, "strictproxy_pod_requests_total", pod=pod), 1)
        self.wires[2].reset()
        for pod_ in self.pods:
            wire = await pod_.connection()
            await wire.has(b"\r\n\r\n")
            wire.send(response(b"ok"))
        await self.wires[0].has(b"\r\n\r\nok")
        await self.wires[1].has(b"\r\n\r\nok")
        await self.until(lambda: not self.service.proxy.running)
        families = await self.families()
        all_ = {"upstream": "u", "route": "all"}
        self.assertEqual(
            self.value(families, "strictproxy_requests_total", code="2xx", reason="", **all_), 2
        )
        self.assertEqual(
            self.value(
                families, "strictproxy_requests_total", code="4xx", reason="client_gone", **all_
            ),
            1,
        )
        self.assertEqual(self.value(families, "strictproxy_requests_withdrawn_total", **all_), 1)
        self.assertEqual(self.value(families, "strictproxy_request_wait_seconds_count", **all_), 3)
        self.assertEqual(self.value(families, "strictproxy_request_pod_seconds_count", **all_), 2)
        self.assertEqual(
            self.value(families, "strictproxy_pod_first_byte_seconds_count", pod=pod), 1
        )
        self.assertIn("process_open_fds", families)
        self.assertEqual(self.value(families, "strictproxy_config_reload_failed"), 0)
        digest = self.service.file.digest if self.service.file else ""
        self.assertEqual(self.value(families, "strictproxy_config_info", digest=digest), 1)

    async def test_reloads(self) -> None:
        """Outcomes are counted; counters of routes outlive a reload, and end with the route."""
        await self.start()
        client = await self.client("/")
        await self.until(lambda: self.service.upstreams["u"].state().running == 1)
        pod = next(pod for pod in self.pods if pod.connections)
        wire = await pod.connection()
        await wire.has(b"\r\n\r\n")
        wire.send(response())
        await client.has(b"\r\n\r\n")
        text = self.path.read_text()
        self.path.write_text("listen: [")
        await self.call("POST", "/api/v1/reload")
        families = await self.families()
        self.assertEqual(self.value(families, "strictproxy_config_reload_failed"), 1)
        self.path.write_text(text + "# again\n")
        await self.call("POST", "/api/v1/reload")
        families = await self.families()
        for outcome in ("success", "failure"):
            self.assertEqual(
                self.value(families, "strictproxy_config_reloads_total", outcome=outcome), 1
            )
        self.assertEqual(
            self.value(families, "strictproxy_requests_total", route="all", code="2xx"), 1
        )
        self.path.write_text(text.replace("name: all", "name: other"))
        await self.call("POST", "/api/v1/reload")
        families = await self.families()
        routes = {sample.labels["route"] for sample in families["strictproxy_requests"].samples}
        self.assertNotIn("all", routes)

    async def test_needs_the_token_elsewhere(self) -> None:
        """Where others could read, metrics need the token like everything else."""
        await self.start()
        self.service._make_admin(AdminConfig("tcp:1"))
        text = self.path.read_text().replace(":interface=127.0.0.1', token", "', token")
        self.path.write_text(text)
        await self.service.reload()
        self.admin = ("127.0.0.1", self.service.addresses()[1][1])
        self.assertEqual((await self.call("GET", "/metrics", token=None))[0], 401)
        self.assertEqual((await self.call("GET", "/metrics"))[0], 200)
        self.assertEqual((await self.call("GET", "/api/v1/state", token=None))[0], 401)
        self.assertEqual((await self.call("GET", "/healthz", token=None))[0], 200)


class HistogramTests(SynchronousTestCase):
    def test_buckets(self) -> None:
        """A bound includes what is equal to it; each bucket includes those before."""
        histogram = Histogram((1.0, 2.0))
        for value in (0.5, 1.0, 1.5, 7.0):
            histogram.observe(value)
        self.assertEqual(histogram.buckets(), [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)])
        self.assertEqual(histogram.total, 10.0)
