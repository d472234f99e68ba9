"""Which route a request takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.config.model import Match, RouteConfig
from strictproxy.interfaces import RequestInfo
from strictproxy.routing import RouteTable, normalise_path, rewrite


def route(name: str, replace_prefix: str | None = None, **match: object) -> RouteConfig:
    return RouteConfig(name, Match(**match), "u", replace_prefix=replace_prefix)  # type: ignore[arg-type]


def info(path: str, host: str = "h", method: str = "GET", **headers: str) -> RequestInfo:
    return RequestInfo(method, path, host, [(k.replace("_", "-"), v) for k, v in headers.items()])


class RouteTableTests(SynchronousTestCase):
    def assert_takes(
        self, routes: list[RouteConfig], request: RequestInfo, name: str | None
    ) -> None:
        """Whatever the order of the file."""
        for order in (routes, routes[::-1]):
            found = RouteTable(order).find(request)
            self.assertEqual(found and found.name, name)

    def test_exact(self) -> None:
        """An exact path matches itself alone."""
        routes = [route("a", path="/a")]
        self.assert_takes(routes, info("/a"), "a")
        for other in ("/", "/A", "/a/", "/ab", "/a/b"):
            self.assert_takes(routes, info(other), None)

    def test_prefix(self) -> None:
        """A prefix covers whole path segments; one that ends in a slash, only what is below."""
        routes = [route("a", prefix="/a"), route("b", prefix="/b/")]
        for path, name in {
            "/a": "a",
            "/a/": "a",
            "/a/b/c": "a",
            "/ab": None,
            "/b": None,
            "/b/": "b",
            "/b/c": "b",
            "/": None,
        }.items():
            self.assert_takes(routes, info(path), name)

    def test_longest_prefix_wins(self) -> None:
        """Of several prefixes the longest wins; `/` takes the rest."""
        routes = [route("root", prefix="/"), route("a", prefix="/a"), route("ab", prefix="/a/b")]
        for path, name in {"/": "root", "/x/y": "root", "/a/c": "a", "/a/b/c": "ab"}.items():
            self.assert_takes(routes, info(path), name)

    def test_kinds_of_path(self) -> None:
        """Exact goes before regex, regex before prefix, any path last."""
        routes = [
            route("exact", path="/a/1"),
            route("regex", regex="/a/[0-9]+"),
            route("prefix", prefix="/a"),
            route("any", methods=frozenset({"GET"})),
        ]
        for path, name in {"/a/1": "exact", "/a/2": "regex", "/a/x": "prefix", "/b": "any"}.items():
            self.assert_takes(routes, info(path), name)
        self.assert_takes(routes, info("/a/2x"), "prefix")

    def test_regex_order(self) -> None:
        """Of several expressions the first in the file wins."""
        table = RouteTable([route("first", regex="/a.*"), route("second", regex="/ab.*")])
        found = table.find(info("/abc"))
        self.assertEqual(found and found.name, "first")

    def test_hosts(self) -> None:
        """An exact host goes before a suffix, the longer suffix before the shorter, then any."""
        routes = [
            route("exact", host="a.b.example.com", prefix="/"),
            route("long", host="*.b.example.com", prefix="/"),
            route("short", host="*.example.com", prefix="/"),
            route("any", prefix="/"),
        ]
        for host, name in {
            "a.b.example.com": "exact",
            "x.b.example.com": "long",
            "x.y.b.example.com": "long",
            "x.example.com": "short",
            "example.com": "any",
            "notexample.com": "any",
            "": "any",
        }.items():
            self.assert_takes(routes, info("/x", host=host), name)

    def test_falls_back_to_other_hosts(self) -> None:
        """A host whose routes do not match leaves the request to less specific ones."""
        routes = [route("there", host="h", path="/a"), route("any", path="/b")]
        self.assert_takes(routes, info("/b", host="h"), "any")

    def test_method(self) -> None:
        """A route with methods goes before one without, and never takes others."""
        routes = [
            route("post", path="/a", methods=frozenset({"POST", "PUT"})),
            route("a", path="/a"),
        ]
        self.assert_takes(routes, info("/a", method="POST"), "post")
        self.assert_takes(routes, info("/a"), "a")
        self.assert_takes(routes[:1], info("/a"), None)

    def test_falls_through(self) -> None:
        """A path that fits is not enough: the method must fit too, or the next kind is tried."""
        put = frozenset({"PUT"})
        routes = [
            route("regex", regex="/a.*", methods=put),
            route("long", prefix="/a/b", methods=put),
            route("short", prefix="/a", methods=put),
            route("any", headers=(("x", "y"),)),
        ]
        self.assert_takes(routes, info("/a/b", x="y"), "any")
        self.assert_takes(routes, info("/a/b"), None)
        self.assert_takes(routes[1:], info("/a/b", method="PUT"), "long")

    def test_headers(self) -> None:
        """All headers must be there; more of them are more specific; repeated ones are joined."""
        routes = [
            route("none", path="/a"),
            route("one", path="/a", headers=(("x-a", "1"),)),
            route("two", path="/a", headers=(("x-a", "1"), ("x-b", "2"))),
        ]
        self.assert_takes(routes, info("/a", x_a="1", x_b="2"), "two")
        self.assert_takes(routes, info("/a", X_A="1"), "one")
        self.assert_takes(routes, info("/a", x_a="2"), "none")
        joined = RequestInfo("GET", "/a", "h", [("X-A", "1"), ("x-a", "2")])
        self.assertEqual(joined.headers["x-a"], "1, 2")

    def test_needless_encoding(self) -> None:
        """Percent-encoding that changes nothing does not hinder a match; %2F is no slash."""
        routes = [route("a", path="/caf\u00e9/a b"), route("s", path="/x/y")]
        self.assert_takes(routes, info("/caf%c3%A9/%61%20b"), "a")
        self.assert_takes(routes, info("/x%2fy"), None)
        self.assert_takes(routes, info("/%78/y"), "s")

    @given(st.text(st.sampled_from("/ab%2F4c1"), max_size=12))
    def test_normalising_is_idempotent(self, path: str) -> None:
        """The compared form of a compared form is itself, where triplets are whole."""
        once = normalise_path(path)
        if "%" not in once.replace("%2F", "").replace("%2C", ""):
            self.assertEqual(normalise_path(once), once)


class RewriteTests(SynchronousTestCase):
    def test_rewrites(self) -> None:
        """The prefix is replaced; what follows it, and the query, stay as they came."""
        table: list[tuple[RouteConfig, str, str]] = [
            (route("r", prefix="/a"), "/a/b?q", "/a/b?q"),
            (route("r", "/", prefix="/a"), "/a/b?q=%20", "/b?q=%20"),
            (route("r", "/", prefix="/a"), "/a", "/"),
            (route("r", "/", prefix="/a"), "/a?x", "/?x"),
            (route("r", "/v2", prefix="/a"), "/a/b", "/v2/b"),
            (route("r", "/v2/", prefix="/a/"), "/a/b", "/v2/b"),
            (route("r", "/v2", path="/a"), "/a?x=/a", "/v2?x=/a"),
            (route("r", "/v2", prefix="/"), "/a/b", "/v2/a/b"),
            (route("r", "/", prefix="/a b"), "/%61%20b/%63", "/%63"),
        ]
        for config, target, expected in table:
            self.assertEqual(rewrite(config, target), expected, (config, target))
