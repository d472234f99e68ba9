"""Configuration: what is read, and what a person sees who made a mistake."""

from __future__ import annotations

import os
from ipaddress import ip_network
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from strictproxy.config import (
    Body,
    Config,
    DnsSource,
    HeaderEdits,
    InvalidConfig,
    LogFormat,
    OnDisconnect,
    PodConnections,
    StaticSource,
    load,
    parse,
)
from strictproxy.config.model import (
    AdminConfig,
    CallbacksConfig,
    CertificateFiles,
    CheckConfig,
    DetachConfig,
    Family,
    KubernetesSource,
    ListenConfig,
    ListenTls,
    PodTls,
    TaskCallback,
    TaskConfig,
    TaskDone,
    TaskId,
    TaskPoll,
    TasksConfig,
    TracingConfig,
)
from strictproxy.config.units import parse_duration, parse_size
from strictproxy.errors import ConfigError
from strictproxy.scheduling import Address, HealthPolicy

TOP = """\
listen: tcp:8080
upstreams:
  u: {static: ["10.0.0.1:80"]}
"""
ROUTE = "routes:\n  - {path: /a, upstream: u}\n"


def upstream(body: str) -> str:
    return f"listen: tcp:8080\nupstreams:\n  u: {body}\nroutes:\n  - {{path: /a, upstream: u}}\n"


def routes(*lines: str) -> str:
    return TOP + "routes:\n" + "".join(f"  - {line}\n" for line in lines)


def task(body: str) -> str:
    return TOP + f"routes:\n  - {{path: /a, upstream: u, task: {body}}}\n"


#: (name, file, exactly what is printed)
BROKEN: list[tuple[str, str, str]] = [
    ("empty file", "", "f:1:1: the file is empty"),
    ("a list", "- a\n", "f:1:1: must be a mapping, not a list"),
    (
        "not YAML",
        "listen: [tcp:80\n",
        "f:2:1: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ),
    (
        "a tab",
        "listen:\n\ttcp: 1\n",
        "f:2:1: not valid YAML: found character '\\t' that cannot start any token",
    ),
    (
        "a control character",
        "listen: \x07\n",
        "f:1:1: not valid YAML: unacceptable character #x0007: special characters are not allowed"
        ' in "<unicode string>", position 8',
    ),
    (
        "two documents",
        TOP + ROUTE + "---\na: 1\n",
        "f:6:1: not valid YAML: but found another document",
    ),
    ("no listen", TOP.replace("listen: tcp:8080\n", "") + ROUTE, "f:1:1: 'listen' is missing"),
    ("no upstreams", "listen: tcp:80\n", "f:1:1: 'upstreams' is missing"),
    (
        "empty upstreams",
        "listen: tcp:80\nupstreams: {}\n" + "routes: []\n",
        "f:2:12: upstreams: must not be empty",
    ),
    (
        "upstreams a list",
        "listen: tcp:80\nupstreams: []\nroutes: []\n",
        "f:2:12: upstreams: must be a mapping, not a list",
    ),
    ("no routes", TOP, "f:1:1: neither 'routes' nor 'routers': no request could go anywhere"),
    (
        "unknown key",
        TOP + ROUTE + "lisen: tcp:80\n",
        "f:6:1: lisen: unknown key; did you mean 'listen'?",
    ),
    (
        "unknown key, none near",
        upstream("{static: a:1, queue: {zzz: 1}}"),
        "f:3:28: upstreams.u.queue.zzz: unknown key; there is no_pods_timeout, size, timeout",
    ),
    (
        "a key twice",
        TOP + "listen: tcp:81\n" + ROUTE,
        "f:4:1: listen: given twice, first on line 1",
    ),
    ("a key that is a list", TOP + "? [a]\n: 1\n" + ROUTE, "f:4:3: a key must be text, not a list"),
    (
        "bad endpoint",
        (TOP + ROUTE).replace("tcp:8080", "tpc:8080"),
        "f:1:9: listen: 'tpc:8080' is not a server endpoint such as tcp:8080: Unknown endpoint type: 'tpc'",
    ),
    (
        "endpoint without port",
        (TOP + ROUTE).replace("tcp:8080", "tcp"),
        "f:1:9: listen: 'tcp' is not a server endpoint such as tcp:8080: a part is missing or unknown",
    ),
    (
        "listen a number",
        (TOP + ROUTE).replace("tcp:8080", "8080"),
        "f:1:9: listen: must be text, not a whole number",
    ),
    (
        "listen an empty list",
        (TOP + ROUTE).replace("tcp:8080", "[]"),
        "f:1:9: listen: must not be empty",
    ),
    (
        "listen a mapping",
        (TOP + ROUTE).replace("tcp:8080", "{a: b}"),
        "f:1:9: listen: 'endpoint' is missing\nf:1:10: listen.a: unknown key; there is endpoint, tls",
    ),
    (
        "bad admin",
        "admin: nowhere\n" + TOP + ROUTE,
        "f:1:8: admin: 'nowhere' is not a server endpoint such as tcp:8080: Unknown endpoint type: 'nowhere'",
    ),
    (
        "no source",
        upstream("{limit: 1}"),
        "f:3:6: upstreams.u: no source of pods: 'dns', 'kubernetes' or 'static' is missing",
    ),
    (
        "two sources",
        upstream("{static: a:1, dns: {name: a, port: 1}}"),
        "f:3:7: upstreams.u.static: 'dns' and 'static' exclude each other",
    ),
    (
        "upstream not a mapping",
        upstream("7"),
        "f:3:6: upstreams.u: must be a mapping, not a whole number",
    ),
    (
        "negative limit",
        upstream("{static: a:1, limit: -2}"),
        "f:3:27: upstreams.u.limit: must be at least 1, not -2",
    ),
    (
        "zero limit",
        upstream("{static: a:1, limit: 0}"),
        "f:3:27: upstreams.u.limit: must be at least 1, not 0",
    ),
    (
        "limit a word",
        upstream("{static: a:1, limit: two}"),
        "f:3:27: upstreams.u.limit: must be a whole number, not text",
    ),
    (
        "limit a fraction",
        upstream("{static: a:1, limit: 1.5}"),
        "f:3:27: upstreams.u.limit: must be a whole number, not a number",
    ),
    (
        "limit yes",
        upstream("{static: a:1, limit: yes}"),
        "f:3:27: upstreams.u.limit: must be a whole number, not true or false",
    ),
    (
        "limit nothing",
        upstream("{static: a:1, limit: }"),
        "f:3:26: upstreams.u.limit: must be a whole number, not nothing",
    ),
    (
        "limit a list",
        upstream("{static: a:1, limit: [1]}"),
        "f:3:27: upstreams.u.limit: must be a single value, not a list",
    ),
    (
        "limit in base 60",
        upstream("{static: a:1, limit: 1:30}"),
        "f:3:27: upstreams.u.limit: must be a plain decimal number, not 1:30",
    ),
    (
        "dns without name",
        upstream("{dns: {port: 1}}"),
        "f:3:12: upstreams.u.dns: 'name' is missing",
    ),
    (
        "dns without port",
        upstream("{dns: {name: a}}"),
        "f:3:12: upstreams.u.dns: 'port' is missing; only SRV records, as of _http._tcp.name, say the port themselves",
    ),
    (
        "dns name with a slash",
        upstream("{dns: {name: a/b, port: 1}}"),
        "f:3:19: upstreams.u.dns.name: 'a/b' is not a DNS name",
    ),
    (
        "dns port too large",
        upstream("{dns: {name: a, port: 65536}}"),
        "f:3:28: upstreams.u.dns.port: must be at most 65535, not 65536",
    ),
    (
        "kubernetes without service",
        upstream("{kubernetes: {port: http}}"),
        "f:3:19: upstreams.u.kubernetes: 'service' is missing",
    ),
    (
        "service that is no name",
        upstream("{kubernetes: {service: a.b}}"),
        "f:3:29: upstreams.u.kubernetes.service: 'a.b' is not a name such as transcode-pods",
    ),
    (
        "service port that is none",
        upstream("{kubernetes: {service: a, port: HTTP}}"),
        "f:3:38: upstreams.u.kubernetes.port: 'HTTP' is neither a port's name nor its number",
    ),
    (
        "service port too large",
        upstream("{kubernetes: {service: a, port: 99999}}"),
        "f:3:38: upstreams.u.kubernetes.port: must be at most 65535, not 99999",
    ),
    (
        "server that is no URL",
        upstream('{kubernetes: {service: a, server: "10.96.0.1:443"}}'),
        "f:3:40: upstreams.u.kubernetes.server: '10.96.0.1:443' is not a URL such as https://10.96.0.1:443",
    ),
    (
        "kubeconfig and server, and a token for neither",
        upstream("{kubernetes: {service: a, kubeconfig: b, server: 'http://c'}}"),
        "f:3:47: upstreams.u.kubernetes.server: 'kubeconfig' and 'server' exclude each other",
    ),
    (
        "token without server",
        upstream("{kubernetes: {service: a, token_file: b}}"),
        "f:3:32: upstreams.u.kubernetes.token_file: 'token_file' is for a 'server' of your own",
    ),
    (
        "three sources",
        upstream("{static: a:1, kubernetes: {service: a}, dns: {name: a, port: 1}}"),
        "f:3:7: upstreams.u.static: 'dns' and 'kubernetes' and 'static' exclude each other",
    ),
    (
        "check of nothing",
        upstream("{static: a:1, check: {every: 1s}}"),
        "f:3:27: upstreams.u.check: needs 'http: /path' or 'tcp: true'",
    ),
    (
        "check of two kinds",
        upstream("{static: a:1, check: {http: /, tcp: true}}"),
        "f:3:37: upstreams.u.check.tcp: 'http' and 'tcp' exclude each other",
    ),
    (
        "check that is none",
        upstream("{static: a:1, check: {tcp: false}}"),
        "f:3:28: upstreams.u.check.tcp: must be true, or not be there",
    ),
    (
        "check of a connection's status",
        upstream("{static: a:1, check: {tcp: true, status: 200}}"),
        "f:3:39: upstreams.u.check.status: 'status' is for checks by 'http'",
    ),
    (
        "check with a status that is none",
        upstream("{static: a:1, check: {http: /, status: 600}}"),
        "f:3:45: upstreams.u.check.status: must be from 200 to 599, not 600",
    ),
    (
        "task without id",
        task("{poll: {path: '/s/{id}'}, done: {status: 200}}"),
        "f:5:35: routes[0].task: 'id' is missing",
    ),
    (
        "task with two ids",
        task("{id: {json: /a, location: true}, done: {status: 200}}"),
        "f:5:40: routes[0].task.id: needs one of 'json', 'header' and 'location'",
    ),
    (
        "task that nobody knows to be done",
        task("{id: {json: /a}}"),
        "f:5:35: routes[0].task: nothing says when a task is done: 'poll', 'callback' or 'done'",
    ),
    (
        "detach without a place for it",
        routes("{path: /a, upstream: u, detach: true}"),
        "f:5:29: routes[0].detach: needs 'tasks: {directory: ...}' at the top, to keep them in",
    ),
    (
        "detach and task",
        routes("{path: /a, upstream: u, detach: {}, task: {id: {json: /a}, done: {status: 200}}}")
        + "tasks: {directory: /d}\n",
        "f:5:29: routes[0].detach: 'task' and 'detach' exclude each other",
    ),
    (
        "callbacks that nobody signs",
        TOP + ROUTE + "tasks: {directory: /d, callbacks: {hosts: [a]}}\n",
        "f:6:35: tasks.callbacks: 'secret_file' is missing",
    ),
    (
        "callbacks to what is no host",
        TOP + ROUTE + "tasks: {directory: /d, callbacks: {secret_file: s, hosts: [a/b]}}\n",
        "f:6:60: tasks.callbacks.hosts[0]: 'a/b' is neither a host name nor *.suffix (and takes no port)",
    ),
    (
        "poll without done",
        task("{id: {json: /a}, poll: {path: '/s/{id}'}}"),
        "f:5:52: routes[0].task.poll: needs 'done', to know what the answer means",
    ),
    (
        "done by two rules, one of them by halves",
        task("{id: {json: /a}, done: {json: /s, status: 200}}"),
        "f:5:58: routes[0].task.done: 'json' and 'in' go together\n"
        "f:5:58: routes[0].task.done: needs either 'json' with 'in', or 'status'",
    ),
    (
        "pointer that is none",
        task("{id: {json: task}, done: {status: 200}}"),
        "f:5:47: routes[0].task.id.json: 'task' is not a JSON Pointer such as /task/id",
    ),
    (
        "task path without id",
        task("{id: {json: /a}, done: {status: 200}, related: [/status]}"),
        "f:5:83: routes[0].task.related[0]: must have {id} in it, once",
    ),
    (
        "name server by name",
        upstream("{dns: {name: a, port: 1, servers: [ns.example]}}"),
        "f:3:41: upstreams.u.dns.servers[0]: a name server is given by its IP address, not 'ns.example'",
    ),
    (
        "name server with a bad port",
        upstream('{dns: {name: a, port: 1, servers: "1.1.1.1:0"}}'),
        "f:3:40: upstreams.u.dns.servers: port must be from 1 to 65535, not 0",
    ),
    (
        "pod without port",
        upstream("{static: [a]}"),
        "f:3:16: upstreams.u.static[0]: 'a' is not host:port",
    ),
    (
        "pod twice",
        upstream("{static: [a:1, a:1]}"),
        "f:3:15: upstreams.u.static: a:1 is given more than once",
    ),
    (
        "pod with bad IPv6",
        upstream('{static: "[::g]:1"}'),
        "f:3:15: upstreams.u.static: '::g' is not an IPv6 address",
    ),
    ("empty static", upstream("{static: []}"), "f:3:15: upstreams.u.static: must not be empty"),
    (
        "duration without unit",
        upstream("{static: a:1, queue: {timeout: 30}}"),
        "f:3:37: upstreams.u.queue.timeout: '30' needs a unit (ms, s, m, h, d), as in 30s",
    ),
    (
        "duration of an unknown unit",
        upstream("{static: a:1, queue: {timeout: 3w}}"),
        "f:3:37: upstreams.u.queue.timeout: unknown unit 'w' in '3w'; units are ms, s, m, h, d",
    ),
    (
        "duration of nothing",
        upstream("{static: a:1, queue: {timeout: 0s}}"),
        "f:3:37: upstreams.u.queue.timeout: must be more than 0",
    ),
    (
        "negative duration",
        upstream("{static: a:1, queue: {timeout: -3s}}"),
        "f:3:37: upstreams.u.queue.timeout: '-3s' is not a duration such as 30s",
    ),
    (
        "duration a word",
        upstream("{static: a:1, queue: {timeout: soon}}"),
        "f:3:37: upstreams.u.queue.timeout: 'soon' is not a duration such as 30s",
    ),
    (
        "negative queue",
        upstream("{static: a:1, queue: {size: -1}}"),
        "f:3:34: upstreams.u.queue.size: must be at least 0, not -1",
    ),
    (
        "queue a number",
        upstream("{static: a:1, queue: 5}"),
        "f:3:27: upstreams.u.queue: must be a mapping, not a whole number",
    ),
    (
        "bad size",
        "client: {max_body: 5 parsecs}\n" + TOP + ROUTE,
        "f:1:20: client.max_body: unknown unit 'parsecs' in '5 parsecs'; units are B, KB, MB, GB, KiB, MiB, GiB",
    ),
    (
        "bad level",
        "log: {level: loud}\n" + TOP + ROUTE,
        "f:1:14: log.level: must be one of debug, info, warn, error, critical, not 'loud'",
    ),
    (
        "bad format",
        "log: {format: xml}\n" + TOP + ROUTE,
        "f:1:15: log.format: must be one of text, json, not 'xml'",
    ),
    (
        "access not a boolean",
        "log: {access: 1}\n" + TOP + ROUTE,
        "f:1:15: log.access: must be true or false, not a whole number",
    ),
    ("empty text", "log: {file: ' '}\n" + TOP + ROUTE, "f:1:13: log.file: must not be empty"),
    (
        "unknown upstream",
        routes("{path: /a, upstream: v}"),
        "f:5:26: routes[0].upstream: no upstream 'v'; there is u",
    ),
    (
        "mistyped upstream",
        (TOP + ROUTE).replace("  u:", "  transcode:").replace("upstream: u", "upstream: transcod"),
        "f:5:26: routes[0].upstream: no upstream 'transcod'; did you mean 'transcode'?",
    ),
    ("route without upstream", routes("{path: /a}"), "f:5:5: routes[0]: 'upstream' is missing"),
    (
        "route that matches nothing in particular",
        routes("{upstream: u}"),
        "f:5:5: routes[0]: matches nothing in particular: give one of path, prefix, regex, host, methods, headers",
    ),
    (
        "two kinds of path",
        routes("{path: /a, prefix: /b, upstream: u}"),
        "f:5:16: routes[0].prefix: 'path' and 'prefix' exclude each other",
    ),
    (
        "same route twice",
        routes("{path: /a, upstream: u}", "{path: /a, upstream: u, limit: 1}"),
        "f:6:5: routes[1]: matches the same requests as routes[0], line 5",
    ),
    (
        "same route, otherwise written",
        routes(
            "{host: A, methods: [GET, PUT], upstream: u}",
            "{host: a, methods: [PUT, GET], upstream: u}",
        ),
        "f:6:5: routes[1]: matches the same requests as routes[0], line 5",
    ),
    (
        "route name twice",
        routes("{name: x, path: /a, upstream: u}", "{name: x, path: /b, upstream: u}"),
        "f:6:6: routes[1].name: the name 'x' is taken by routes[0]",
    ),
    (
        "relative path",
        routes("{path: a, upstream: u}"),
        "f:5:12: routes[0].path: must start with '/', not 'a'",
    ),
    (
        "path with a query",
        routes("{path: '/a?b', upstream: u}"),
        "f:5:12: routes[0].path: must be a path alone: the query string takes no part in routing",
    ),
    (
        "bad regex",
        routes("{regex: '/a(', upstream: u}"),
        "f:5:13: routes[0].regex: not a regular expression: missing ), unterminated subpattern at position 2",
    ),
    (
        "host with a star inside",
        routes("{host: a.*.b, upstream: u}"),
        "f:5:12: routes[0].host: 'a.*.b' is neither a host name nor *.suffix (and takes no port)",
    ),
    (
        "lower-case method",
        routes("{methods: get, upstream: u}"),
        "f:5:15: routes[0].methods: 'get' is not a request method such as GET",
    ),
    (
        "headers a list",
        routes("{headers: [a], upstream: u}"),
        "f:5:15: routes[0].headers: must be a mapping, not a list",
    ),
    (
        "header value a number",
        routes("{headers: {a: 1}, upstream: u}"),
        "f:5:19: routes[0].headers.a: must be text, not a whole number",
    ),
    (
        "strip without a path",
        routes("{host: a, strip_prefix: true, upstream: u}"),
        "f:5:15: routes[0].strip_prefix: needs 'path' or 'prefix'",
    ),
    (
        "strip and replace",
        routes("{path: /a, strip_prefix: true, replace_prefix: /b, upstream: u}"),
        "f:5:36: routes[0].replace_prefix: 'strip_prefix' and 'replace_prefix' exclude each other",
    ),
    (
        "bad on_client_disconnect",
        routes("{path: /a, upstream: u, on_client_disconnect: stop}"),
        "f:5:51: routes[0].on_client_disconnect: must be one of cancel, finish, not 'stop'",
    ),
    ("route a word", routes("a"), "f:5:5: routes[0]: must be a mapping, not text"),
    (
        "routes a mapping",
        TOP + "routes: {path: /a}\n",
        "f:4:9: routes: must be a list, not a mapping",
    ),
    (
        "unset variable",
        upstream('{static: a:1, limit: "${NOT_SET}"}'),
        "f:3:27: upstreams.u.limit: environment variable NOT_SET is not set",
    ),
    (
        "variable of a wrong type",
        upstream('{static: a:1, limit: "${WORD}"}'),
        "f:3:27: upstreams.u.limit: must be a whole number, not text",
    ),
    (
        "header that frames",
        routes("{path: /a, upstream: u, request_headers: {set: {Connection: x}}}"),
        "f:5:52: routes[0].request_headers.set: Connection frames the message and cannot be changed",
    ),
    (
        "header name with a space",
        routes("{path: /a, upstream: u, request_headers: {remove: a b}}"),
        "f:5:55: routes[0].request_headers.remove: 'a b' is not a header name",
    ),
    (
        "header value with a line",
        routes('{path: /a, upstream: u, response_headers: {add: {A: "b\\nC: d"}}}'),
        "f:5:53: routes[0].response_headers.add: the value of A has characters that no header may have",
    ),
    (
        "header edits a list",
        routes("{path: /a, upstream: u, request_headers: {set: [a]}}"),
        "f:5:52: routes[0].request_headers.set: must be a mapping, not a list",
    ),
    (
        "bad network",
        "client: {trusted_proxies: [10.0.0.1/8]}\n" + TOP + ROUTE,
        "f:1:28: client.trusted_proxies[0]: not a network such as 10.0.0.0/8: 10.0.0.1/8 has host bits set",
    ),
    (
        "TLS without certificates",
        "listen: {endpoint: tcp:1, tls: {certificates: []}}\n"
        + (TOP + ROUTE).replace("listen: tcp:8080\n", ""),
        "f:1:47: listen.tls.certificates: must not be empty",
    ),
    (
        "TLS too old",
        "listen: {endpoint: tcp:1, tls: {min_version: 1.1, certificates: [{cert: a, key: b}]}}\n"
        + (TOP + ROUTE).replace("listen: tcp:8080\n", ""),
        "f:1:46: listen.tls.min_version: must be 1.2 or 1.3, not 1.1",
    ),
    (
        "router without name",
        TOP + "routers: [{settings: {}}]\n",
        "f:4:11: routers[0]: 'name' is missing",
    ),
    (
        "router settings a list",
        TOP + "routers: [{name: a, settings: []}]\n",
        "f:4:31: routers[0].settings: must be a mapping, not a list",
    ),
    (
        "old file without host",
        "port: 80\nroutes: [{uri: /a, limit: 1, K8s_port: 1}]\n",
        "f:2:10: routes[0]: 'k8s_host' is missing",
    ),
    ("old file with a bad port", "port: 0\nroutes: []\n", "f:1:7: port: must be at least 1, not 0"),
    (
        "old file, same uri twice",
        "port: 80\nroutes:\n  - &r {uri: /a, limit: 1, k8s_host: a, K8s_port: 1}\n  - *r\n",
        "f:3:9: routes[1].uri: '/a' is given twice",
    ),
    (
        "old file, K8s_port misspelt",
        "port: 80\nroutes: [{uri: /a, limit: 1, k8s_host: a, k8s_port: 1}]\n",
        "f:2:10: routes[0]: 'K8s_port' is missing\nf:2:43: routes[0].k8s_port: unknown key; did you mean 'K8s_port'?",
    ),
]


class BrokenConfigTests(SynchronousTestCase):
    """Each mistake is told with file, line, column and key."""


def _add(number: int, name: str, content: str, expected: str) -> None:
    def test(self: SynchronousTestCase) -> None:
        error = self.assertRaises(InvalidConfig, parse, content, "f", {"WORD": "two"})
        self.assertEqual(str(error), expected)

    test.__doc__ = name
    setattr(BrokenConfigTests, f"test_{number:02}_{name.replace(' ', '_').replace(',', '')}", test)


for _number, _case in enumerate(BROKEN):
    _add(_number, *_case)


class ConfigTests(SynchronousTestCase):
    def test_design_example(self) -> None:
        """The example of the design is read as it is meant."""
        config = parse(
            """\
listen: tcp:8080                 # Twisted endpoint strings; a list is fine
admin: tcp:9901:interface=127.0.0.1
upstreams:
  transcode:
    dns: {name: transcode-pods.media.svc.cluster.local, port: 20109}
    limit: 2                     # requests in flight per pod
    queue: {size: 200, timeout: 2h}
routes:
  - path: /VideoCodecService/VideoCodec
    upstream: transcode
""",
            "f",
        )
        transcode = config.upstreams["transcode"]
        self.assertEqual(
            transcode.source, DnsSource("transcode-pods.media.svc.cluster.local", 20109)
        )
        self.assertEqual(
            (transcode.limit, transcode.queue.size, transcode.queue.timeout), (2, 200, 7200)
        )
        self.assertEqual(config.routes[0].name, "/VideoCodecService/VideoCodec")
        self.assertEqual(config.admin, AdminConfig("tcp:9901:interface=127.0.0.1"))

    def test_old_file(self) -> None:
        """The Go version's file keeps its meaning: exact URI, limit per pod for that URI."""
        config = parse(
            """\
port: 8080
debug: true
log_file: /var/log/proxy.log
routes:
  - {uri: /a, limit: 2, k8s_host: pods.ns, K8s_port: 20109}
  - {uri: /b, limit: 1, k8s_host: pods.ns, K8s_port: 20109}
  - {uri: /c, limit: 3, k8s_host: others.ns, K8s_port: 1}
""",
            "f",
        )
        self.assertEqual(config.listen, (ListenConfig("tcp:8080"),))
        self.assertEqual((config.log.level, config.log.file), ("debug", "/var/log/proxy.log"))
        self.assertEqual(
            [(r.match.path, r.limit, r.upstream) for r in config.routes],
            [("/a", 2, "pods.ns:20109"), ("/b", 1, "pods.ns:20109"), ("/c", 3, "others.ns:1")],
        )
        self.assertEqual(
            {n: u.limit for n, u in config.upstreams.items()},
            {"pods.ns:20109": 3, "others.ns:1": 3},
        )

    def test_old_file_defaults(self) -> None:
        """An empty log_file means standard output, as it did."""
        config = parse("port: 80\nlog_file: ''\nroutes: []\n", "f")
        self.assertEqual((config.log.level, config.log.file), ("info", None))

    def test_every_mistake_is_told(self) -> None:
        """Mistakes do not hide each other, and come in the order of the file."""
        error = self.assertRaises(
            InvalidConfig,
            parse,
            "listen: tcpp:1\nupstreams:\n  u: {static: a, limit: x}\n  v: {}\nroutes:\n  - {upstream: w}\n",
            "f",
        )
        self.assertEqual(
            [(p.line, p.path) for p in error.problems],
            [
                (1, "listen"),
                (3, "upstreams.u.static"),
                (3, "upstreams.u.limit"),
                (4, "upstreams.v"),
                (6, "routes[0]"),
            ],
        )

    def test_variables(self) -> None:
        """${NAME} is filled in; alone it has the type of what it holds; $$ is a dollar."""
        config = parse(
            """\
listen: tcp:${PORT}
upstreams:
  u:
    static: ${POD}
    limit: ${LIMIT:-3}
    queue: {size: "${SIZE}", timeout: "${T}"}
routes:
  - {path: "/$${x}", name: "${NUMBER}", upstream: u}
""",
            "f",
            {"PORT": "8080", "POD": "a:1", "SIZE": "7", "T": "off", "NUMBER": "5"},
        )
        u = config.upstreams["u"]
        self.assertEqual(config.listen, (ListenConfig("tcp:8080"),))
        self.assertEqual(u.source, StaticSource((Address("a", 1),)))
        self.assertEqual((u.limit, u.queue.size), (3, 7))
        self.assertEqual((config.routes[0].match.path, config.routes[0].name), ("/${x}", "5"))
        self.assertIsNone(u.queue.timeout)

    def test_sources(self) -> None:
        """Everything that a source of pods can say."""
        for written, source in (
            (
                "dns: {name: _http._tcp.a, family: ipv6, hosts: true, max_stale: 1h}",
                DnsSource("_http._tcp.a", None, family=Family.IPV6, hosts=True, max_stale=3600.0),
            ),
            (
                "kubernetes: {service: a, namespace: b, port: http, kubeconfig: c, family: both}",
                KubernetesSource("a", "b", "http", Family.BOTH, "c"),
            ),
            (
                "kubernetes: {service: a, port: 80, server: 'https://h:1/x', token_file: t, ca: c}",
                KubernetesSource("a", None, 80, server="https://h:1/x", token_file="t", ca="c"),
            ),
        ):
            config = parse(upstream(f"{{{written}}}"), "f")
            self.assertEqual(config.upstreams["u"].source, source)

    def test_admin(self) -> None:
        """An endpoint, or one with who may use it."""
        config = parse(TOP + ROUTE + "admin: {endpoint: tcp:1, token_file: /t, open: true}\n", "f")
        self.assertEqual(config.admin, AdminConfig("tcp:1", "/t", True))

    def test_tracing(self) -> None:
        """Where spans go, how many, and by which name."""
        more = "tracing: {endpoint: 'http://c:4318/v1/traces', sample: 5%, service: s}\n"
        tracing = parse(TOP + ROUTE + more, "f").tracing
        self.assertEqual(tracing, TracingConfig("http://c:4318/v1/traces", 0.05, "s"))

    def test_task(self) -> None:
        """Everything that a task can say."""
        for written, expected in (
            (
                "{id: {json: /task_id}, poll: {path: '/s/{id}', every: 200ms, timeout: 1s},"
                " done: {json: /state, in: [finished, 3, true]}, related: ['/s/{id}', '/r/{id}'],"
                " callback: {header: X-Done, base: 'http://proxy'}, limit_time: 1h, keep: 1d,"
                " resubmit: true}",
                TaskConfig(
                    TaskId(json="/task_id"),
                    TaskDone("/state", frozenset({"finished", "3", "true"})),
                    TaskPoll("/s/{id}", 0.2, 1.0),
                    ("/s/{id}", "/r/{id}"),
                    TaskCallback("X-Done", "http://proxy"),
                    3600.0,
                    86400.0,
                    True,
                ),
            ),
            (
                "{id: {location: true}, done: {status: [200, 410]}}",
                TaskConfig(TaskId(location=True), TaskDone(statuses=frozenset({200, 410}))),
            ),
        ):
            (route,) = parse(task(written), "f").routes
            self.assertEqual(route.task, expected)

    def test_detach(self) -> None:
        """Everything that is said about detached requests."""
        tasks = (
            "tasks: {directory: /d, keep: 2h, max_count: 5, max_size: 1MiB, callbacks:"
            " {hosts: [a, '*.b'], secret_file: /s, header: X-Tell, forbid: [10.0.0.0/8],"
            " give_up: 1m}}\n"
        )
        for written, expected in (
            ("true", DetachConfig()),
            ("false", None),
            ("{}", DetachConfig()),
            (
                "{repeat: true, max_result: 1KiB, limit_wait: 1h, hold_interrupted: 5s}",
                DetachConfig(True, 1024, 3600.0, 5.0),
            ),
        ):
            config = parse(routes(f"{{path: /a, upstream: u, detach: {written}}}") + tasks, "f")
            self.assertEqual(config.routes[0].detach, expected)
        networks = (ip_network("10.0.0.0/8"),)
        self.assertEqual(
            config.tasks,
            TasksConfig(
                "/d",
                7200.0,
                5,
                2**20,
                CallbacksConfig(("a", "*.b"), "/s", "X-Tell", networks, 60.0),
            ),
        )
        config = parse(TOP + ROUTE + "tasks: {directory: /d}\n", "f")
        self.assertEqual(config.tasks, TasksConfig("/d"))

    def test_check(self) -> None:
        """Everything that a check can say."""
        for written, check in (
            (
                "{http: /h, status: [200, 204], body: ok, port: 9, every: 1s, timeout: 3s, rise: 4,"
                " fall: 5}",
                CheckConfig("/h", frozenset({200, 204}), "ok", 9, 1.0, 3.0, 4, 5),
            ),
            ("{tcp: true}", CheckConfig()),
            ("{http: /}", CheckConfig("/")),
        ):
            config = parse(upstream(f"{{static: a:1, check: {written}}}"), "f")
            self.assertEqual(config.upstreams["u"].check, check)

    def test_routes(self) -> None:
        """Everything that a route can say."""
        config = parse(
            TOP
            + """\
routers:
  - {name: by-tenant, settings: {header: x, nested: [1, 2.5, true, null, ~]}}
routes:
  - {prefix: /a, strip_prefix: true, limit: 2, upstream: u, on_client_disconnect: finish}
  - prefix: /b
    replace_prefix: /c
    max_body: 1MiB
    upstream: u
    timeout: 1m
    retry: GET
    body: spool
    request_headers: {set: {X-A: "1"}, add: {X-B: b c}, remove: [Cookie]}
  - {regex: "/x/[0-9]+", host: "*.Example.com", methods: [GET, HEAD], upstream: u}
  - {headers: {X-B: "2", x-a: one}, methods: POST, upstream: u}
log: {format: json, file: /tmp/x, access: false, level: WARN}
client: {max_body: off, keepalive: 1m30s, trusted_proxies: [10.0.0.0/8, 192.0.2.1]}
drain_timeout: 5s
""",
            "f",
        )
        a, b, x, headers = config.routes
        self.assertEqual(
            (a.replace_prefix, a.limit, a.on_client_disconnect), ("/", 2, OnDisconnect.FINISH)
        )
        self.assertEqual((b.replace_prefix, b.max_body, b.name), ("/c", 2**20, "/b/*"))
        self.assertEqual(
            (x.match.host, x.name), ("*.example.com", "GET,HEAD *.example.com~/x/[0-9]+")
        )
        self.assertEqual((b.timeout, b.retry, b.body), (60.0, {"GET"}, Body.SPOOL))
        self.assertEqual(
            b.request_headers, HeaderEdits((("X-A", "1"),), (("X-B", "b c"),), ("Cookie",))
        )
        self.assertEqual(headers.match.headers, (("x-a", "one"), ("x-b", "2")))
        self.assertEqual(headers.name, "POST  x-a=one x-b=2".replace("  ", " "))
        self.assertEqual(
            config.routers[0].settings, {"header": "x", "nested": [1, 2.5, True, None, None]}
        )
        self.assertIs(config.log.format, LogFormat.JSON)
        self.assertEqual(config.log.level, "warn")
        self.assertEqual((config.client.max_body, config.client.keepalive), (None, 90.0))
        self.assertEqual(config.drain_timeout, 5.0)
        self.assertEqual(
            config.client.trusted_proxies, (ip_network("10.0.0.0/8"), ip_network("192.0.2.1"))
        )

    def test_connections(self) -> None:
        """Time-outs towards the pods; some may be off."""
        config = parse(
            upstream(
                "{static: a:1, connections: {connect_timeout: 1s, keepalive: 2s,"
                " first_byte_timeout: 3s, idle_timeout: off}}"
            ),
            "f",
        )
        self.assertEqual(config.upstreams["u"].connections, PodConnections(1.0, 2.0, 3.0, None))

    def test_tls(self) -> None:
        """TLS towards clients and towards pods."""
        config = parse(
            """\
listen:
  - tcp:8080
  - endpoint: tcp:8443
    tls:
      certificates: [{cert: a.crt, key: a.key}, {cert: b.crt, key: b.key}]
      client_ca: ca.crt
      min_version: 1.3
upstreams:
  u: {static: a:1, tls: {ca: ca.crt, server_name: pod.x, client: {cert: c.crt, key: c.key}}}
routes: [{path: /, upstream: u}]
""",
            "f",
        )
        a, b, c = (CertificateFiles(f"{n}.crt", f"{n}.key") for n in "abc")
        self.assertEqual(
            config.listen,
            (
                ListenConfig("tcp:8080"),
                ListenConfig("tcp:8443", ListenTls((a, b), "ca.crt", "1.3")),
            ),
        )
        self.assertEqual(config.upstreams["u"].tls, PodTls("ca.crt", "pod.x", c))

    def test_only_routers(self) -> None:
        """Custom routers alone are enough."""
        config = parse(TOP + "routers: [{name: a}]\n", "f")
        self.assertEqual((config.routers[0].name, config.routes), ("a", ()))

    def test_addresses(self) -> None:
        """IPv6 pods and name servers are bracketed; a name server's port may be left out."""
        config = parse(
            upstream("{dns: {name: _a.b., port: 1, servers: [127.0.0.1, '[::1]:5353']}}"), "f"
        )
        source = config.upstreams["u"].source
        assert isinstance(source, DnsSource)
        self.assertEqual(source.servers, (("127.0.0.1", 53), ("::1", 5353)))

    def test_environment_is_the_process(self) -> None:
        """Without another one given, variables come from the process."""
        self.patch(os, "environ", {"PODS": "a:1"})
        config = parse(upstream("{static: '${PODS}'}"), "f")
        self.assertEqual(config.upstreams["u"].source, StaticSource((Address("a", 1),)))

    def test_unreadable(self) -> None:
        """A file that is not there, or no text, is named."""
        folder = Path(self.mktemp())
        folder.mkdir()
        missing, binary, good = folder / "no.yaml", folder / "b.yaml", folder / "good.yaml"
        self.assertEqual(
            str(self.assertRaises(ConfigError, load, missing)),
            f"{missing}: cannot be read: No such file or directory",
        )
        binary.write_bytes(b"a: \xff")
        self.assertEqual(
            str(self.assertRaises(ConfigError, load, binary)),
            f"{binary}: is not UTF-8 text, at byte 3",
        )
        good.write_text(TOP + ROUTE)
        self.assertIsInstance(load(good), Config)


class UnitTests(SynchronousTestCase):
    def test_durations(self) -> None:
        """Durations in every unit, and several parts in a row."""
        for text, seconds in {
            "500ms": 0.5, "10s": 10, "2h": 7200, "1h30m": 5400, "1.5m": 90, "2d": 172800, "0": 0,
        }.items():  # fmt: skip
            self.assertEqual(parse_duration(text), seconds)

    def test_sizes(self) -> None:
        """Sizes in both kinds of unit."""
        for text, size in {"64KiB": 65536, "1 MB": 10**6, "3B": 3, "1.5GiB": 3 * 2**29}.items():
            self.assertEqual(parse_size(text), size)


class HealthKeysTests(SynchronousTestCase):
    """The keys about pods that fail, and about pods' own limits."""

    def read(self, *lines: str, route: str = "") -> Config:
        upstream = "".join(f"    {line}\n" for line in ("static: [a:1]", *lines))
        text = f"listen: tcp:1\nupstreams:\n  u:\n{upstream}routes: [{{prefix: /, upstream: u{route}}}]\n"
        return parse(text, "f", {})

    def test_read(self) -> None:
        config = self.read(
            "pod_limits: {'a:1': 3}",
            "limit_header: X-Limit",
            "drain_timeout: 1m",
            "health: {failures: 1, aside: 1s, max_aside: 10s, max_share: 25%, slow_start: 30s}",
            route=", failures: [500]",
        )
        upstream = config.upstreams["u"]
        self.assertEqual(upstream.pod_limits, ((Address("a", 1), 3),))
        self.assertEqual((upstream.limit_header, upstream.drain_timeout), ("X-Limit", 60.0))
        self.assertEqual(upstream.health, HealthPolicy(1, 1.0, 10.0, 0.25, 30.0))
        self.assertEqual(config.routes[0].failures, {500})

    def test_mistakes(self) -> None:
        for line, route, text in (
            ("pod_limits: [1]", "", "must be a mapping, not a list"),
            ("pod_limits: {'a': 1}", "", "'a' is not host:port"),
            ("health: {max_share: 0.5}", "", "must be a percentage such as 50%, not '0.5'"),
            ("health: {max_share: 200%}", "", "must be a percentage such as 50%, not '200%'"),
            ("limit: 1", ", failures: 600", "must be from 400 to 599, not 600"),
        ):
            error = self.assertRaises(InvalidConfig, self.read, line, route=route)
            self.assertIn(text, str(error))
