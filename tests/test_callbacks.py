"""Telling somebody that a detached request has ended: who may be told, and how."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.ssl import DefaultOpenSSLContextFactory
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.config.model import LOCAL_NETWORKS, CallbacksConfig
from strictproxy.errors import CallbackForbidden, ConfigError
from strictproxy.tasks import callbacks as callbacks_module
from strictproxy.tasks.callbacks import Callbacks, read_secret, sign
from tests.harness import ScriptedPod, Wire, response
from tests.test_detached import ASYNC, DetachedTestCase

reactor: Any = _reactor


class SignatureTests(SynchronousTestCase):
    def test_example(self) -> None:
        """The example of the Standard Webhooks' specification."""
        path = Path(self.mktemp())
        path.write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
        signature = sign(
            read_secret(str(path)),
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1614265330,
            b'{"test": 2432232314}',
        )
        self.assertEqual(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=")

    def test_no_secret(self) -> None:
        """What is no key is told with its file."""
        path = Path(self.mktemp())
        for content, reason in ((None, "No such file"), (b"\n", "is empty"), (b"whsec_!", "")):
            if content is not None:
                path.write_bytes(content)
            with self.assertRaisesRegex(ConfigError, f"secret_file: .*{reason}"):
                read_secret(str(path))


class CheckTests(SynchronousTestCase):
    def test_who_may_be_called(self) -> None:
        """Hosts of the configuration, by http or https; no address that is forbidden."""
        path = Path(self.mktemp())
        path.write_text("secret")
        config = CallbacksConfig(
            ("app.example", "*.svc.local", "127.0.0.1", "10.0.0.1", "::ffff:127.0.0.1"), str(path)
        )
        callbacks = Callbacks(config, reactor, lambda _: None, lambda _: None)  # type: ignore
        for url in (
            "http://app.example/done", "https://APP.example:8443/?a=b", "http://a.b.svc.local/",
            "http://10.0.0.1/", "http://app.example./",
        ):  # fmt: skip
            callbacks.check(url)
        for url, reason in (
            ("http://other.example/", "nobody at other.example may be called"),
            ("http://svc.local/", "nobody at svc.local"),
            ("http://app.example.evil/", "nobody at"),
            ("http://127.0.0.1/", "127.0.0.1 may not be called: it is in 127.0.0.0/8"),
            ("http://[::ffff:127.0.0.1]/", "may not be called"),
            ("ftp://app.example/", "is not an http or https URL"),
            ("/done", "is not an http or https URL"),
            ("http://app.example/\n", "is not an http or https URL"),
            ("http://a:b@app.example/", "no user name"),
            ("http://app.example:x/", "not a URL"),
            ("http://[/", "not a URL"),
        ):
            with self.assertRaisesRegex(CallbackForbidden, reason):
                callbacks.check(url)
        forbidden = callbacks._forbidden
        for address in ("127.9.9.9", "::1", "169.254.169.254", "fe80::1", "0.0.0.0", "224.0.0.1"):
            self.assertIsNotNone(forbidden(address), address)
        for address in ("10.1.2.3", "192.0.2.1", "fd00::1", "2001:db8::1", "a.name"):
            self.assertIsNone(forbidden(address), address)
        self.assertEqual(config.forbid, LOCAL_NETWORKS)


class CallbackTests(DetachedTestCase):
    async def begin_with(self, hosts: str = "127.0.0.1", more: str = "") -> None:
        self.patch(callbacks_module, "_FIRST_PAUSE", 0.01)
        self.secret = Path(self.mktemp())
        self.secret.write_text("of the tests")
        self.tasks = f", callbacks: {{hosts: ['{hosts}'], secret_file: {self.secret}{more}}}"
        await self.begin()
        self.receiver = ScriptedPod()
        self.pods.append(self.receiver)
        self.url = f"http://127.0.0.1:{self.receiver.address.port}/hook?a=b"

    async def told(self, url: str, *lines: str) -> str:
        """Submit a request that wants this URL told, and let it be done."""
        if not lines:
            lines = (f'{ASYNC}; callback="{url}"',)
        answer = await self.say("POST", "/job", *lines, body=b"work")
        self.assertIn(b"202 Accepted", answer.received)
        location: str = json.loads(answer.received.partition(b"\r\n\r\n")[2])["location"]
        wire = await self.arrival(b"work")
        self.assertNotIn(b"hook", wire.received)
        wire.take()
        wire.send(response(b"the result"))
        return location

    async def call_of(self) -> Wire:
        wire = await self.arrival(b"\r\n\r\n", self.receiver)
        await wire.until(lambda: wire.received.endswith(b"}"))
        return wire

    async def until_told(self, location: str, state: str = "delivered") -> dict[str, Any]:
        callback = self.task(location).record.callback
        assert callback is not None
        await self.until(lambda: callback.state == state)
        told: dict[str, Any] = (await self.ask(location))[1]["callback"]
        return told

    async def test_told(self) -> None:
        """A signed POST tells what a GET of the task would."""
        await self.begin_with(more=", forbid: []")
        location = await self.told(self.url)
        wire = await self.call_of()
        head, _, body = wire.received.partition(b"\r\n\r\n")
        lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        fields = {name.lower(): value for name, value in lines.items()}
        self.assertTrue(head.startswith(b"POST /hook?a=b HTTP/1.1\r\n"))
        signed = b".".join([fields[b"webhook-id"], fields[b"webhook-timestamp"], body])
        digest = hmac.digest(b"of the tests", signed, hashlib.sha256)
        self.assertEqual(fields[b"webhook-signature"], b"v1," + base64.b64encode(digest))
        document = json.loads(body)
        self.assertEqual((document["state"], document["location"]), ("done", location))
        self.assertEqual(fields[b"webhook-id"].decode(), document["id"])
        wire.send(response(b"thanks"))
        told = await self.until_told(location)
        self.assertEqual(told, {"state": "delivered", "attempts": 1, "error": None})
        text = (await self.call("GET", "/metrics"))[1]
        self.assertIn('strictproxy_task_callbacks_total{outcome="delivered"} 1.0', text)

    async def test_by_header(self) -> None:
        """The URL may come in a header of its own."""
        await self.begin_with(more=", forbid: [], header: X-Tell")
        location = await self.told(self.url, ASYNC, f"X-Tell: {self.url}")
        wire = await self.call_of()
        wire.send(response(b""))
        await self.until_told(location)

    async def test_again(self) -> None:
        """Whoever does not answer well is called again; a redirect is no good answer."""
        await self.begin_with(more=", forbid: []")
        location = await self.told(self.url)
        for answer in (
            response(status="500 No"), response(b"", "Location: /", status="302 Found"), b"",
            response(b"x" * 100_000),
        ):  # fmt: skip
            wire = await self.call_of()
            wire.take()
            wire.send(answer)
            wire.close()
            await wire.end()
        wire = await self.call_of()
        wire.send(response(b""))
        self.assertEqual((await self.until_told(location))["attempts"], 5)

    async def test_gone(self) -> None:
        """Who says 410 wants no more; who has not answered for long enough gets no more."""
        await self.begin_with(more=", forbid: [], give_up: 30ms")
        location = await self.told(self.url)
        wire = await self.call_of()
        wire.take()
        wire.send(response(status="410 Gone"))
        told = await self.until_told(location, "failed")
        self.assertEqual(told, {"state": "failed", "attempts": 1, "error": "it answered with 410"})
        await self.receiver.port.stopListening()
        location = await self.told(self.url)
        told = await self.until_told(location, "failed")
        self.assertIn("refused", told["error"])

    async def test_forbidden(self) -> None:
        """Nobody else is called: the request is refused before anything is done."""
        await self.begin_with()
        for line in (
            f'{ASYNC}; callback="{self.url}"', f"{ASYNC}\r\nX-Callback-Url: http://other/",
        ):  # fmt: skip
            answer = await self.say("POST", "/job", line, body=b"work")
            self.assertIn(b"HTTP/1.1 403 ", answer.received)
            self.assertIn(b"callback_forbidden", answer.received)
        self.assertEqual(list(self.detached), [])

    async def test_nobody_at_all(self) -> None:
        """Without a configuration nobody is called; a header of ours is nobody's then."""
        await self.begin()
        answer = await self.say("POST", "/job", f'{ASYNC}; callback="http://a/"', body=b"work")
        self.assertIn(b"HTTP/1.1 403 ", answer.received)
        await self.submit("/job", "X-Callback-Url: http://a/")
        wire = await self.arrival(b"X-Callback-Url: http://a/")
        wire.take()

    async def test_resolves_to_loopback(self) -> None:
        """A name that is allowed, but resolves to what is not, is not called; the task is done."""
        await self.begin_with("localhost")
        location = await self.told(self.url.replace("127.0.0.1", "localhost"))
        told = await self.until_told(location, "failed")
        self.assertRegex(told["error"], "localhost: .* may not be called: it is in ")
        self.assertEqual(self.receiver.connections, [])
        answer = await self.say("GET", location + "/result")
        self.assertTrue(answer.received.endswith(b"the result"))

    async def test_after_a_restart(self) -> None:
        """Who has not been told before a restart is told afterwards."""
        await self.begin_with(more=", forbid: []")
        location = await self.told(self.url)
        wire = await self.call_of()
        stopping = self.service.stopService()
        await wire.end()
        await stopping
        await self.begin_service()
        wire = await self.call_of()
        wire.send(response(b""))
        self.assertEqual((await self.until_told(location))["state"], "delivered")

    async def test_reload(self) -> None:
        """Other rules hold at once, for those that wait too; without a key nothing changes."""
        await self.begin_with("localhost", ", forbid: []")
        await self.receiver.port.stopListening()
        url = self.url.replace("127.0.0.1", "localhost")
        location = await self.told(url)
        await self.until(lambda: self.task(location).record.callback.attempts > 2)  # type: ignore[union-attr]
        text = self.path.read_text()
        self.path.write_text(text.replace(str(self.secret), "/nowhere"))
        with self.assertRaisesRegex(ConfigError, "secret_file: /nowhere"):
            await self.service.reload()
        self.path.write_text(text.replace(", forbid: []", ""))
        await self.service.reload()
        told = await self.until_told(location, "failed")
        self.assertIn("may not be called", told["error"])

    async def test_tls(self) -> None:
        """Whoever cannot prove to be the host is told nothing."""
        import trustme

        await self.begin_with("localhost", ", forbid: []")
        folder = Path(self.mktemp())
        folder.mkdir()
        certificate = trustme.CA().issue_cert("localhost")
        key, chain = folder / "key", folder / "chain"
        certificate.private_key_pem.write_to_path(str(key))
        certificate.cert_chain_pems[0].write_to_path(str(chain))
        secured = DefaultOpenSSLContextFactory(str(key), str(chain))
        port = reactor.listenSSL(0, self.receiver, secured, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        location = await self.told(f"https://localhost:{port.getHost().port}/")
        callback = self.task(location).record.callback
        assert callback is not None
        await self.until(lambda: callback.error is not None)
        self.assertIn("certificate verify failed", str(callback.error))
        self.assertFalse(any(wire.received for wire in self.receiver.connections))
