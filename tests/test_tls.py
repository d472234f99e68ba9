"""TLS on both sides, with curl as the client and uvicorn as the pod."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import trustme

from strictproxy.config.model import CertificateFiles, ListenTls, PodTls
from strictproxy.errors import ConfigError
from strictproxy.http.tls import PodTlsOptions, ServerCertificates
from tests.test_system import APPLICATION, SystemTestCase, free_port

ROUTES = "routes:\n  - {prefix: /, upstream: pods}\nlog: {format: json}\n"


class TlsTestCase(SystemTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.authority = trustme.CA()
        self.ca = self.folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *identities: str, authority: trustme.CA | None = None) -> str:
        """Write NAME.crt and NAME.key; return NAME's path without ending."""
        certificate = (authority or self.authority).issue_cert(*identities)
        path = self.folder / name
        certificate.private_key_pem.write_to_path(f"{path}.key")
        chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
        Path(f"{path}.crt").write_bytes(chain)
        return str(path)

    def tls_pod(self, certificate: str, *more: str) -> int:
        port = free_port()
        (self.folder / "pod.py").write_text(APPLICATION)
        self.spawn(
            sys.executable, "-m", "uvicorn", "--port", str(port), "--log-level", "warning",
            "--ssl-certfile", f"{certificate}.crt", "--ssl-keyfile", f"{certificate}.key",
            *more, "pod:app", log="pod.log", cwd=self.folder,
        )  # fmt: skip
        return port

    def curl(self, host: str, *more: str) -> tuple[int, str]:
        """GET https://host/stats through the proxy; return curl's exit code and what it wrote."""
        done = subprocess.run(
            [
                "curl", "-sS", "--cacert", str(self.ca), "--max-time", "10",
                "--resolve", f"{host}:{self.tls_port}:127.0.0.1",
                "-w", "%{http_code}", *more, f"https://{host}:{self.tls_port}/stats",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


class ListenerTests(TlsTestCase):
    def start(self, tls: str) -> None:
        pod = free_port()
        self.uvicorn("127.0.0.1", pod)
        self.tls_port = free_port()
        self.twistd(
            f'upstreams: {{pods: {{static: "127.0.0.1:{pod}"}}}}\n{ROUTES}',
            listen=f'{{endpoint: "tcp:{self.tls_port}:interface=127.0.0.1", tls: {{{tls}}}}}',
        )

    def test_names_and_reload(self) -> None:
        """The certificate is the one for the name asked for; changed files are used at once."""
        first = self.issue("first", "one.test", "*.wild.test")
        second = self.issue("second", "two.test")
        self.start(
            f"certificates: [{{cert: {first}.crt, key: {first}.key}},"
            f" {{cert: {second}.crt, key: {second}.key}}]"
        )
        for host in ("one.test", "two.test", "a.wild.test"):
            code, out = self.curl(host)
            self.assertEqual((code, out[-3:]), (0, "200"), (host, out))
        code, out = self.curl("three.test")
        self.assertNotEqual(code, 0)
        self.assertIn("SSL", out)
        new = self.issue("new", "three.test")
        shutil.copy(f"{new}.crt", f"{second}.crt")
        # In between, key and certificate do not fit: the old pair stays.
        self.assertEqual(self.curl("two.test")[0], 0)
        shutil.copy(f"{new}.key", f"{second}.key")
        self.wait_for(lambda: self.curl("three.test")[0] == 0, "the new certificate is used")
        self.assertNotEqual(self.curl("two.test")[0], 0)
        self.assertEqual(self.curl("one.test")[0], 0)

    def test_client_certificates(self) -> None:
        """Where clients must have a certificate, others are not served."""
        server = self.issue("server", "one.test")
        client = self.issue("client", "client@x.test")
        stranger = self.issue("stranger", "client@x.test", authority=trustme.CA())
        self.start(
            f"certificates: [{{cert: {server}.crt, key: {server}.key}}], client_ca: {self.ca}"
        )
        pair = ("--cert", f"{client}.crt", "--key", f"{client}.key")
        code, out = self.curl("one.test", *pair)
        self.assertEqual((code, out[-3:]), (0, "200"), out)
        self.assertNotEqual(self.curl("one.test")[0], 0)
        wrong = ("--cert", f"{stranger}.crt", "--key", f"{stranger}.key")
        self.assertNotEqual(self.curl("one.test", *wrong)[0], 0)

    def test_old_versions(self) -> None:
        """What is older than min_version is refused."""
        server = self.issue("server", "one.test")
        self.start(f'certificates: [{{cert: {server}.crt, key: {server}.key}}], min_version: "1.3"')
        self.assertEqual(self.curl("one.test", "--tlsv1.3")[0], 0)
        self.assertNotEqual(self.curl("one.test", "--tls-max", "1.2")[0], 0)

    def test_large_body(self) -> None:
        """Bodies past the kernel's path go through TLS whole, both ways."""
        server = self.issue("server", "one.test")
        self.start(f"certificates: [{{cert: {server}.crt, key: {server}.key}}]")
        upload = self.folder / "upload"
        upload.write_bytes(bytes(3 * 2**20))
        code, out = self.curl("one.test", "-T", str(upload))
        self.assertEqual((code, out[-3:]), (0, "200"), out)


class PodTests(TlsTestCase):
    def status(self, tls: str, port: int) -> tuple[int, str]:
        proxy = self.twistd(
            f'upstreams: {{pods: {{static: "127.0.0.1:{port}", tls: {{{tls}}}}}}}\n{ROUTES}'
        )
        status, body = self.get(f"{self.url}/stats")
        self.stop(proxy)
        return status, "" if status == 200 else json.loads(body)["reason"]

    def test_verifies(self) -> None:
        """A pod is spoken to only if it proves to be who it should be."""
        port = self.tls_pod(self.issue("pod", "127.0.0.1", "pod.test"))
        self.wait_for(lambda: self.get(f"https://127.0.0.1:{port}/")[1] != b"", "the pod is up")
        self.assertEqual(self.status(f"ca: {self.ca}", port), (200, ""))
        self.assertEqual(self.status(f"ca: {self.ca}, server_name: pod.test", port), (200, ""))
        self.assertEqual(self.status(f"ca: {self.ca}, server_name: other.test", port)[0], 502)
        stranger = self.folder / "stranger.pem"
        trustme.CA().cert_pem.write_to_path(str(stranger))
        self.assertEqual(self.status(f"ca: {stranger}", port)[0], 502)

    def test_presents_a_certificate(self) -> None:
        """Pods that ask for a client certificate get ours."""
        port = self.tls_pod(
            self.issue("pod", "127.0.0.1"), "--ssl-ca-certs", str(self.ca), "--ssl-cert-reqs", "2"
        )
        client = self.issue("client", "proxy.test")
        tls = f"ca: {self.ca}, client: {{cert: {client}.crt, key: {client}.key}}"
        self.wait_for(lambda: self.get(f"https://127.0.0.1:{port}/")[1] != b"", "the pod is up")
        self.assertEqual(self.status(tls, port), (200, ""))
        self.assertEqual(self.status(f"ca: {self.ca}", port)[0], 502)


class FileTests(TlsTestCase):
    def test_bad_files(self) -> None:
        """Each kind of bad file is named, and what is wrong with it."""
        good = self.issue("good", "a.test")
        other = self.issue("other", "b.test")
        for files, expected in (
            (CertificateFiles("/nowhere", "/nowhere"), "/nowhere: cannot be read: No such file"),
            (CertificateFiles(f"{good}.key", f"{good}.key"), "has no certificate in PEM"),
            (CertificateFiles(f"{good}.crt", f"{other}.key"), "is not the key of"),
            (CertificateFiles(f"{good}.crt", f"{other}.crt"), "is not the key of"),
        ):
            error = self.assertRaises(ConfigError, ServerCertificates, ListenTls((files,)))
            self.assertIn(expected, str(error))
        error = self.assertRaises(ConfigError, PodTlsOptions, PodTls(ca=f"{good}.key"))
        self.assertIn("has no certificate", str(error))
