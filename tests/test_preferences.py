"""The headers by which clients say how they want their answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.http.preferences import Preferences, parse_preferences
from strictproxy.http.ranges import Unsatisfiable, parse_range


class PreferenceTests(SynchronousTestCase):
    def test_known(self) -> None:
        """What we understand is found, wherever it stands; the rest is kept as it was."""
        asynchronous = Preferences(True)
        for values, expected in (
            ([], Preferences()),
            ([""], Preferences()),
            (["respond-async"], asynchronous),
            (["Respond-Async"], asynchronous),
            (["respond-async=x"], asynchronous),
            (['respond-async=""'], asynchronous),
            (["respond-async, wait=10"], Preferences(True, 10.0)),
            (["respond-async", "wait = 10"], Preferences(True, 10.0)),
            (["wait=5, wait=6"], Preferences(False, 5.0)),
            (["wait=99999"], Preferences(False, 300.0)),
            (["wait=soon, wait=-1, wait"], Preferences()),
            (["return=minimal"], Preferences(rest="return=minimal")),
            (
                ['foo; bar="a, b; c", respond-async, handling=lenient'],
                Preferences(True, rest='foo; bar="a, b; c", handling=lenient'),
            ),
            (
                ['respond-async; callback="http://a/?x=1,2;3"'],
                Preferences(True, callback="http://a/?x=1,2;3"),
            ),
            (
                [r'respond-async ; Callback="http://a/\"b" ; callback=c; =d'],
                Preferences(True, callback='http://a/"b'),
            ),
            (["respond-async; callback"], asynchronous),
            (
                ["respond-async; callback=x, respond-async; callback=y"],
                Preferences(True, None, "x"),
            ),
            (["=, {};"], Preferences(rest="=, {};")),
            ([",,;,"], Preferences(rest=";")),
        ):
            self.assertEqual(parse_preferences(values), expected, values)

    def test_hostile(self) -> None:
        """A long header takes no longer than its length."""
        for value in ("a" + " " * 60_000 + "(", '"' * 60_000, "a=" * 30_000, "\\" * 60_000):
            self.assertEqual(parse_preferences([value]).respond_async, False)

    @given(st.lists(st.text(alphabet='abc=;,"\\ wait0respond-y')))
    def test_anything(self, values: list[str]) -> None:
        """Nothing breaks it."""
        self.assertIsInstance(parse_preferences(values), Preferences)


class RangeTests(SynchronousTestCase):
    def test_ranges(self) -> None:
        """Each form of RFC 9110, 14.1.2."""
        for value, expected in (
            ("bytes=0-499", (0, 500)),
            ("bytes=0-0", (0, 1)),
            ("Bytes = 500 - 999", (500, 1000)),
            ("bytes=999-", (999, 1000)),
            ("bytes=0-", (0, 1000)),
            ("bytes=-1", (999, 1000)),
            ("bytes=-5000", (0, 1000)),
            ("bytes=900-5000", (900, 1000)),
            ("bytes=5-4", None),
            ("bytes=-", None),
            ("bytes=a-b", None),
            ("bytes=0-1,3-4", None),
            ("lines=0-1", None),
            ("", None),
        ):
            self.assertEqual(parse_range(value, 1000), expected, value)
        for value, size in (("bytes=1000-", 1000), ("bytes=-0", 1000), ("bytes=-1", 0)):
            with self.assertRaises(Unsatisfiable):
                parse_range(value, size)
