"""EndpointSlices through a fake API server: real HTTP, in memory and over TLS, by a `Clock`."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import trustme
import yaml
from treq.testing import RequestTraversalAgent
from twisted.internet import reactor as _reactor
from twisted.internet import ssl
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase
from twisted.web.server import Site

from strictproxy.config.model import KubernetesSource
from strictproxy.discovery.kubernetes.access import Access, NoAccess, find_access
from strictproxy.discovery.kubernetes.api import ApiError, EndpointSliceApi, agent_for
from strictproxy.discovery.kubernetes.watcher import KubernetesDiscovery
from strictproxy.interfaces import Endpoint
from tests.fake_kubernetes import SERVICE, FakeApiServer, make_endpoint, make_slice

reactor: Any = _reactor


class ApiServerTests(SynchronousTestCase):
    """The whole client against the fake API server, in memory."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.server = FakeApiServer()
        self.agent = RequestTraversalAgent(self.server)
        self.token = "secret"
        self.published: list[list[str]] = []
        source = KubernetesSource(SERVICE, "media", "http")
        self.api = EndpointSliceApi(
            SERVICE,
            lambda: Access("http://10.96.0.1", "media", self.token),
            lambda access: self.agent,
            self.clock,
        )
        self.discovery = KubernetesDiscovery(source, self.api, self.clock, lambda: 0.0)
        self.addCleanup(self.end)

    def end(self) -> None:
        self.discovery.stop()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def start(self) -> None:
        def publish(endpoints: Collection[Endpoint]) -> None:
            self.published.append([f"{e.address.host}{'!' * e.terminating}" for e in endpoints])

        self.discovery.start(publish)
        self.flush()

    def flush(self) -> None:
        for _ in range(4):
            self.agent.flush()

    def after(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.clock.advance(0.25)
            self.flush()

    def put(self, name: str, *hosts: str) -> None:
        self.server.put(make_slice(name, [make_endpoint(host) for host in hosts]))
        self.flush()

    def test_list_and_watch(self) -> None:
        """The first set is that of the list; each change is known at once."""
        self.put("a", "10.0.0.1", "10.0.0.2")
        self.start()
        self.assertEqual(self.published, [["10.0.0.1", "10.0.0.2"]])
        self.put("b", "10.0.0.3")
        self.put("a", "10.0.0.2")
        self.server.delete("b")
        self.flush()
        self.assertEqual(
            self.published[1:],
            [["10.0.0.1", "10.0.0.2", "10.0.0.3"], ["10.0.0.2", "10.0.0.3"], ["10.0.0.2"]],
        )
        self.assertEqual(self.server.requests, ["list", "watch"])
        state = self.discovery.state()
        self.assertEqual((len(state.in_force or ()), state.last_error), (1, None))

    def test_terminating(self) -> None:
        """A pod that terminates is published as such, then not at all."""
        self.put("a", "10.0.0.1", "10.0.0.2")
        self.start()
        ends = make_endpoint("10.0.0.2", ready=False, terminating=True)
        self.server.put(make_slice("a", [make_endpoint("10.0.0.1"), ends]))
        self.flush()
        self.put("a", "10.0.0.1")
        self.assertEqual(self.published[1:], [["10.0.0.1", "10.0.0.2!"], ["10.0.0.1"]])

    def test_nothing_new_is_not_published(self) -> None:
        """An event that changes nothing about the pods is not passed on."""
        self.put("a", "10.0.0.1")
        self.start()
        self.put("a", "10.0.0.1")
        self.server.bookmark()
        self.flush()
        self.assertEqual(len(self.published), 1)

    def test_no_slices(self) -> None:
        """A Service without slices has no pods, which is an answer too; then the first comes."""
        self.start()
        self.put("a", "10.0.0.1")
        self.assertEqual(self.published, [[], ["10.0.0.1"]])

    def test_pages(self) -> None:
        """A list in pages is one list."""
        self.server.page = 2
        for number in range(5):
            self.put(f"s{number}", f"10.0.0.{number}")
        self.start()
        self.assertEqual(len(self.published[0]), 5)
        self.assertEqual(self.server.requests, ["list"] * 3 + ["watch"])

    def test_watch_ends(self) -> None:
        """A watch that ends after its time goes on where it stopped, from the last bookmark."""
        self.put("a", "10.0.0.1")
        self.start()
        self.server.bookmark()
        self.flush()
        bookmark = self.server.version
        self.after(60)
        self.server.end_watches()
        self.server.compacted = bookmark
        self.put("a", "10.0.0.2")
        self.flush()
        self.assertEqual(self.server.requests, ["list", "watch", "watch"])
        self.assertEqual(self.published[-1], ["10.0.0.2"])

    def test_watch_that_ends_at_once(self) -> None:
        """An API server that ends each watch at once is asked less and less often."""
        self.put("a", "10.0.0.1")
        self.start()
        for _ in range(240):
            self.server.end_watches()
            self.after(0.25)
        self.assertLess(len(self.server.requests), 15)
        self.assertIn("at once", self.discovery.state().last_error or "")

    def test_silence(self) -> None:
        """A connection on which nothing comes, not even the end, is given up."""
        self.put("a", "10.0.0.1")
        self.start()
        self.after(72)
        self.assertEqual(self.server.requests, ["list", "watch", "watch"])

    def test_gone(self) -> None:
        """What there is no history for any more (410) is listed again, at once."""
        self.put("a", "10.0.0.1")
        self.start()
        self.server.cut()
        self.put("a", "10.0.0.2")
        self.server.compact()
        self.flush()
        self.after(2)
        self.assertEqual(self.published[-1], ["10.0.0.2"])
        self.assertEqual(self.server.requests, ["list", "watch", "watch", "list", "watch"])
        self.assertEqual(self.discovery.state().lookups["gone"], 1)
        # As a status, too, as older servers do.
        self.server.cut()
        self.server.errors = [410]
        self.put("a", "10.0.0.3")
        self.after(2)
        self.assertEqual(self.published[-1], ["10.0.0.3"])
        self.assertEqual(len(self.published), 3)

    def test_errors_keep_the_last_good_set(self) -> None:
        """Refusals and failures change nothing, and are met with pauses that grow."""
        self.put("a", "10.0.0.1")
        self.start()
        for status, outcome in ((401, "denied"), (403, "denied"), (500, "error"), (503, "error")):
            before = self.discovery.state().lookups[outcome]
            self.server.errors = [status] * 4
            self.server.cut()
            self.put("a", f"10.0.0.{status % 250}")
            published = len(self.published)
            self.after(1.5)
            self.assertEqual(len(self.published), published)
            self.assertIn(str(status), self.discovery.state().last_error or "")
            self.after(10)
            self.assertEqual(self.published[-1], [f"10.0.0.{status % 250}"])
            self.assertIsNone(self.discovery.state().last_error)
            self.assertEqual(self.discovery.state().lookups[outcome] - before, 4)

    def test_down_for_long(self) -> None:
        """An API server that is away for an hour is asked every half a minute at most."""
        self.put("a", "10.0.0.1")
        self.start()
        self.server.errors = [503] * 10_000
        self.server.cut()
        asked = len(self.server.requests)
        self.after(3600)
        self.assertLess(len(self.server.requests) - asked, 250)
        self.assertEqual(len(self.published), 1)
        self.server.errors = []
        self.put("a", "10.0.0.2")
        self.after(31)
        self.assertEqual(self.published[-1], ["10.0.0.2"])

    def test_throttled(self) -> None:
        """What Retry-After says is kept to."""
        self.server.errors = [429]
        self.server.retry_after = b"20"
        self.put("a", "10.0.0.1")
        self.start()
        self.after(19)
        self.assertEqual(self.server.requests, ["list"])
        self.after(1)
        self.assertEqual(self.published, [["10.0.0.1"]])
        self.assertEqual(self.discovery.state().lookups["throttled"], 1)

    def test_token_rotation(self) -> None:
        """A new token is used from the next request on."""
        self.put("a", "10.0.0.1")
        self.start()
        self.server.token = "rotated"
        self.server.end_watches()
        self.put("a", "10.0.0.2")
        self.after(2)
        self.assertEqual(self.published[-1], ["10.0.0.1"])
        self.token = "rotated"
        self.after(5)
        self.assertEqual(self.published[-1], ["10.0.0.2"])

    def test_no_access(self) -> None:
        """Nothing to ask with is an error like others, until there is."""
        access: list[Access] = []

        def get() -> Access:
            if not access:
                raise NoAccess("no token yet")
            return access[0]

        self.api._access = get
        self.put("a", "10.0.0.1")
        self.start()
        self.assertEqual(self.discovery.state().last_error, "no token yet")
        access.append(Access("http://10.96.0.1", "media", "secret"))
        self.after(2)
        self.assertEqual(self.published, [["10.0.0.1"]])

    def test_restart_with_an_older_history(self) -> None:
        """After a restore from a backup, versions are smaller; what is listed then counts."""
        self.put("a", "10.0.0.1")
        self.start()
        self.server.version = 10
        self.server.history = []
        self.server.errors = [504]  # "Too large resource version"
        self.server.cut()
        self.put("a", "10.0.0.2")
        self.after(3)
        self.assertEqual(self.published[-1], ["10.0.0.2"])
        self.put("a", "10.0.0.3")
        self.assertEqual(self.published[-1], ["10.0.0.3"])

    def test_nonsense(self) -> None:
        """Bytes that are no events, and events that are no slices, are errors, not changes."""
        self.put("a", "10.0.0.1")
        self.start()
        for nonsense in (b"{}\n", b"[]\n", b"garbage\n", b'{"type": "ADDED", "object": {}}\n'):
            self.server.wire = lambda _, nonsense=nonsense: nonsense
            self.put("b", "10.0.0.2")
            self.assertEqual(self.published[-1], ["10.0.0.1"])
            self.server.wire = lambda data: data
            self.server.delete("b")
            self.after(4)
            self.assertEqual(self.published[-1], ["10.0.0.1"])

    def test_duplicates_and_disorder(self) -> None:
        """Events that come twice, or late, do not bring back what is gone."""
        self.put("a", "10.0.0.1")
        self.start()
        old = self.server.history[-1]
        self.put("a", "10.0.0.2")
        for watch in self.server.watches:
            watch.write(self.server.encode(old))
            watch.write(self.server.encode(self.server.history[-1]))
        self.flush()
        self.server.delete("a")
        for watch in self.server.watches:
            watch.write(self.server.encode({**old, "type": "MODIFIED"}))
        self.flush()
        self.assertEqual(self.published, [["10.0.0.1"], ["10.0.0.2"], []])

    def test_cut_at_each_byte(self) -> None:
        """A connection that ends within an event leaves no half of it; it is told again."""
        self.put("a", "10.0.0.1")
        self.start()
        size = len(self.server.encode(self.server.history[-1]))
        for at in range(size + 4):
            host = f"10.1.{at // 250}.{at % 250}"
            self.server.wire = lambda data, at=at: data[:at]
            self.server.put(make_slice("a", [make_endpoint(host)]))
            self.flush()
            self.server.wire = lambda data: data
            whole = self.published[-1] == [host]
            self.server.cut()
            self.flush()
            self.assertEqual(len(self.published[-1]), 1)
            self.after(1.25)
            self.assertEqual(self.published[-1], [host], f"cut at {at}, whole: {whole}")
            self.server.history = self.server.history[-3:]

    def test_stop(self) -> None:
        """Stopped while it lists, watches or pauses, it publishes nothing more."""
        self.start()
        self.discovery.stop()
        self.put("a", "10.0.0.1")
        self.after(5)
        self.assertEqual(self.published, [[]])
        self.server.errors = [500]
        self.discovery.start(lambda _: self.fail("published"))
        self.flush()
        self.discovery.stop()
        self.after(5)

    def test_an_hour_of_churn(self) -> None:
        """
        500 pods come, go, end and move between slices for an hour, over an API server that fails.

        Whenever a watch is open the published set is the true one; while there
        is none it is one that was true when there was.
        """
        chance = random.Random(20261124)
        pods: dict[str, str] = {}
        slices: dict[str, list[str]] = {f"s{n}": [] for n in range(8)}
        truth: set[str] = set()
        numbers = iter(range(1, 1_000_000))

        def change(name: str) -> None:
            members = [
                make_endpoint(
                    pod, ready=pods[pod] == "ready", terminating=pods[pod] == "ending", pod=pod
                )
                for pod in slices[name]
            ]
            self.server.put(make_slice(name, members))

        def shown() -> set[str]:
            return {
                pod + "!" * (state == "ending")
                for pod, state in pods.items()
                if state != "starting"
            }

        def step() -> None:
            kind = chance.random()
            name = chance.choice(list(slices))
            if len(pods) < 500 and kind < 0.5:
                number = next(numbers)
                pod = f"10.{number // 62500}.{number // 250 % 250}.{number % 250}"
                pods[pod] = "starting"
                slices[name].append(pod)
            elif slices[name] and kind < 0.8:
                pod = chance.choice(slices[name])
                following = {"starting": "ready", "ready": "ending", "ending": ""}[pods[pod]]
                holders = [each for each in slices if pod in slices[each]]
                if following:
                    pods[pod] = following
                else:
                    del pods[pod]
                    for holder in holders:
                        slices[holder].remove(pod)
                for holder in holders:
                    change(holder)
                return
            elif slices[name]:
                # It moves: for a while it is in both.
                pod = chance.choice(slices[name])
                other = chance.choice(list(slices))
                if pod not in slices[other]:
                    slices[other].append(pod)
                    change(other)
                    slices[name].remove(pod)
            change(name)

        def disturb() -> None:
            chance.choice(
                [
                    self.server.end_watches,
                    self.server.cut,
                    self.server.compact,
                    self.server.bookmark,
                    lambda: self.server.errors.extend([chance.choice([401, 410, 429, 500])]),
                    lambda: self.server.errors.extend([503] * chance.randrange(5)),
                ]
            )()

        for name in slices:
            change(name)
        self.start()
        right = 0
        for second in range(3600):
            for _ in range(chance.randrange(4)):
                step()
            if chance.random() < 0.1:
                disturb()
            self.clock.advance(1)
            self.flush()
            # A pod that moves is never away, and what ends is marked.
            if self.server.watches:
                truth = shown()
                right += 1
                self.assertEqual(set(self.published[-1]), truth, f"after {second} s")
            if len(self.server.history) > 200:
                del self.server.history[:100]
                first = self.server.history[0]["object"]["metadata"]["resourceVersion"]
                self.server.compacted = max(self.server.compacted, int(first) - 1)
        self.assertGreater(right, 3000)
        self.assertGreater(len(pods), 100)


class AccessTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()

    def write(self, name: str, content: str) -> str:
        path = self.folder / name
        path.write_text(content)
        return str(path)

    def test_in_a_pod(self) -> None:
        """Where the kubelet puts it, read each time."""
        source = KubernetesSource(SERVICE)
        environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
        with self.assertRaisesRegex(NoAccess, "namespace: No such file"):
            find_access(source, environ, self.folder)
        for name, content in (("namespace", "media"), ("token", "one\n"), ("ca.crt", "CA")):
            self.write(name, content)
        self.assertEqual(
            find_access(source, environ, self.folder),
            Access("https://[fd00::1]:443", "media", "one", b"CA"),
        )
        self.write("token", "two\n")
        environ["KUBERNETES_SERVICE_HOST"] = "10.96.0.1"
        found = find_access(KubernetesSource(SERVICE, "other"), environ, self.folder)
        self.assertEqual(found, Access("https://10.96.0.1:443", "other", "two", b"CA"))

    def test_nowhere(self) -> None:
        """Outside of a pod, one has to say where."""
        with self.assertRaisesRegex(NoAccess, "not in a pod"):
            find_access(KubernetesSource(SERVICE), {})

    def test_server(self) -> None:
        """An address and a token."""
        source = KubernetesSource(
            SERVICE,
            server="https://127.0.0.1:6443/",
            token_file=self.write("t", "abc"),
            ca=self.write("ca", "CA"),
        )
        self.assertEqual(
            find_access(source, {}), Access("https://127.0.0.1:6443", "default", "abc", b"CA")
        )
        self.assertEqual(
            find_access(KubernetesSource(SERVICE, "n", server="http://localhost:8001"), {}),
            Access("http://localhost:8001", "n"),
        )

    def kubeconfig(self, cluster: dict[str, Any], user: dict[str, Any] | None) -> KubernetesSource:
        document = {
            "current-context": "c",
            "contexts": [
                {"name": "other", "context": {}},
                {"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "media"}},
            ],
            "clusters": [{"name": "k", "cluster": {"server": "https://k8s:6443/", **cluster}}],
            "users": [{"name": "u", "user": user}],
        }
        return KubernetesSource(SERVICE, kubeconfig=self.write("config", yaml.safe_dump(document)))

    def test_kubeconfig(self) -> None:
        """Certificates in place and in files, tokens in place and in files."""
        encoded = base64.b64encode(b"PEM").decode()
        self.write("ca.crt", "CA")
        source = self.kubeconfig(
            {"certificate-authority": "ca.crt", "tls-server-name": "kubernetes"},
            {"client-certificate-data": encoded, "client-key-data": encoded},
        )
        self.assertEqual(
            find_access(source, {}),
            Access("https://k8s:6443", "media", None, b"CA", b"PEM", b"PEM", "kubernetes"),
        )
        self.write("token", "abc\n")
        source = self.kubeconfig({"certificate-authority-data": encoded}, {"tokenFile": "token"})
        self.assertEqual(
            find_access(source, {}), Access("https://k8s:6443", "media", "abc", b"PEM")
        )
        source = self.kubeconfig({}, None)
        self.assertEqual(find_access(source, {}), Access("https://k8s:6443", "media"))

    def test_kubeconfig_that_cannot_be_used(self) -> None:
        """Each fault is named."""
        for cluster, user, message in (
            ({}, {"exec": {}}, "'exec' is not supported"),
            ({"insecure-skip-tls-verify": True}, {}, "'insecure-skip-tls-verify' is not supported"),
            ({"certificate-authority-data": "%"}, {}, "certificate-authority-data"),
            ({"certificate-authority": "gone"}, {}, "gone: No such file"),
        ):
            with self.assertRaisesRegex(NoAccess, message):
                find_access(self.kubeconfig(cluster, user), {})
        for text in ("", "[", "current-context: x\ncontexts: []\n"):
            source = KubernetesSource(SERVICE, kubeconfig=self.write("broken", text))
            with self.assertRaisesRegex(NoAccess, "broken"):
                find_access(source, {})


class TlsTests(TestCase):
    """Over a real socket, with certificates."""

    def setUp(self) -> None:
        authority = trustme.CA()
        self.ca = authority.cert_pem.bytes()
        self.client = authority.issue_cert("strictproxy@example.com")
        issued = authority.issue_cert("127.0.0.1")
        certificate = ssl.PrivateCertificate.loadPEM(
            issued.private_key_pem.bytes() + issued.cert_chain_pems[0].bytes()
        )
        options = certificate.options(ssl.Certificate.loadPEM(self.ca))
        self.server = FakeApiServer()
        self.server.put(make_slice("a", [make_endpoint("10.0.0.1")]))
        self.port = reactor.listenSSL(0, Site(self.server), options, interface="127.0.0.1")
        self.addCleanup(self.port.stopListening)
        self.url = f"https://127.0.0.1:{self.port.getHost().port}"

    def api(self, access: Callable[[], Access]) -> EndpointSliceApi:
        return EndpointSliceApi(SERVICE, access, lambda a: agent_for(a, reactor), reactor)

    async def test_client_certificate(self) -> None:
        """The server is verified by its address, and sees our certificate."""
        key = self.client.private_key_pem.bytes()
        chain = self.client.cert_chain_pems[0].bytes()
        access = Access(self.url, "media", "secret", self.ca, chain, key)
        items, version = await self.api(lambda: access).fetch()
        self.assertEqual((len(items), version), (1, "1001"))
        await deferLater(reactor, 0.05)

    async def test_wrong_authority(self) -> None:
        """A server of another authority gets no token."""
        access = Access(self.url, "media", "secret", trustme.CA().cert_pem.bytes())
        with self.assertRaises(Exception) as caught:
            await self.api(lambda: access).fetch()
        self.assertNotIsInstance(caught.exception, ApiError)
        self.assertEqual(self.server.requests, [])
        await deferLater(reactor, 0.05)

    async def test_certificate_that_is_none(self) -> None:
        """A certificate that cannot be read is named."""
        with self.assertRaisesRegex(NoAccess, "cannot be used"):
            await self.api(lambda: Access(self.url, "media", None, b"nonsense")).fetch()

    async def test_watch(self) -> None:
        """Events come as they happen, over TLS too; giving up closes the connection."""
        key = self.client.private_key_pem.bytes()
        chain = self.client.cert_chain_pems[0].bytes()
        api = self.api(lambda: Access(self.url, "media", "secret", self.ca, chain, key))
        came: Deferred[list[Any]] = Deferred()
        watch = Deferred.fromCoroutine(api.watch("1001", 60, came.callback))
        while not self.server.watches:
            await deferLater(reactor, 0.01)
        self.server.put(make_slice("b", []))
        (event,) = await came
        self.assertEqual(json.dumps(event["object"]["metadata"]["name"]), '"b"')
        watch.cancel()
        await watch.addErrback(lambda _: None)
        while self.server.watches:
            await deferLater(reactor, 0.01)
