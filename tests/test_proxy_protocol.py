"""The PROXY protocol in front of us: `listen: haproxy:tcp:...`."""

from __future__ import annotations

import socket
import struct

from tests.test_system import SystemTestCase, free_port

REQUEST = b"GET /stats HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


class ProxyProtocolTests(SystemTestCase):
    def ask(self, preamble: bytes) -> str:
        with socket.create_connection(("127.0.0.1", self.listen), timeout=10) as client:
            client.sendall(
                preamble + b"GET /stats HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            )
            answer = b""
            while piece := client.recv(65536):
                answer += piece
            return answer.decode()

    def test_versions(self) -> None:
        """The client is the one that the PROXY header tells of, in both versions."""
        pod = free_port()
        self.uvicorn("127.0.0.1", pod)
        port = free_port()
        self.twistd(
            f'upstreams: {{pods: {{static: "127.0.0.1:{pod}"}}}}\n'
            "routes: [{path: /stats, upstream: pods}]\nlog: {format: json}\n",
            listen=f"haproxy:tcp:{port}:interface=127.0.0.1",
        )
        self.listen = port
        v1 = b"PROXY TCP4 192.0.2.7 127.0.0.1 5555 80\r\n"
        v2 = b"\r\n\r\n\x00\r\nQUIT\n" + struct.pack(
            "!BBH4s4sHH",
            0x21,
            0x11,
            12,
            socket.inet_aton("192.0.2.8"),
            socket.inet_aton("127.0.0.1"),
            5555,
            80,
        )
        log = self.folder / "strictproxy.log"
        for preamble, client in ((v1, "192.0.2.7"), (v2, "192.0.2.8")):
            self.assertIn("200 OK", self.ask(preamble))
            line = f'"client": "{client}"'
            self.wait_for(lambda line=line: line in log.read_text(), f"{client} is logged")  # type: ignore[misc]
