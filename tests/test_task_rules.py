"""What answers say about tasks."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.config.model import TaskDone, TaskId
from strictproxy.tasks.rules import Template, find_id, is_done, look_up


class RulesTests(SynchronousTestCase):
    def test_pointer(self) -> None:
        """RFC 6901: members, elements, escaped names."""
        document = {"a": {"b": [1, {"c": 2}]}, "x/y": 3, "m~n": 4, "": 5}
        for pointer, value in (
            ("/a/b/0", 1), ("/a/b/1/c", 2), ("/x~1y", 3), ("/m~0n", 4), ("/", 5), ("", document),
        ):  # fmt: skip
            self.assertEqual(look_up(document, pointer), value)
        for pointer in ("/none", "/a/b/2", "/a/b/x", "/a/b/0/c", "/a/b/-1"):
            with self.assertRaises(KeyError):
                look_up(document, pointer)

    def of(
        self, rule: TaskId, status: int = 202, body: object = None, **headers: str
    ) -> str | None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        found = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
        return find_id(rule, status, found.get, data)

    def test_ids(self) -> None:
        """By JSON, by a header, by the Location; text or numbers that fit into a path."""
        by_json = TaskId(json="/task/id")
        self.assertEqual(self.of(by_json, body={"task": {"id": "a-1"}}), "a-1")
        self.assertEqual(self.of(by_json, body={"task": {"id": 17}}), "17")
        for body in (
            {}, {"task": {"id": None}}, {"task": {"id": True}}, {"task": {"id": ""}},
            {"task": {"id": "a\nb"}}, {"task": {"id": "x" * 201}}, b"no json", [1],
            b"[" * 100_000,
        ):  # fmt: skip
            self.assertIsNone(self.of(by_json, body=body))
        self.assertIsNone(self.of(by_json, 500, body={"task": {"id": "a"}}))
        self.assertEqual(self.of(TaskId(header="X-Task-Id"), x_task_id="b2"), "b2")
        self.assertIsNone(self.of(TaskId(header="X-Task-Id")))
        for location in ("/tasks/c%203", "http://pod:80/tasks/c%203/?x=/y#z"):
            self.assertEqual(self.of(TaskId(location=True), location=location), "c 3")
        self.assertIsNone(self.of(TaskId(location=True), location="/"))

    def test_done(self) -> None:
        """By a value in the body, or by the status."""
        by_json = TaskDone(json="/state", values=frozenset({"finished", "failed", "3", "true"}))
        for value, done in (
            ("finished", True), ("failed", True), ("running", False), (3, True), (True, True),
            (False, False), (None, False),
        ):  # fmt: skip
            body = json.dumps({"state": value}).encode()
            self.assertEqual(is_done(by_json, 200, body), done, value)
        self.assertFalse(is_done(by_json, 500, b'{"state": "finished"}'))
        self.assertFalse(is_done(by_json, 200, b"oops"))
        by_status = TaskDone(statuses=frozenset({200, 410}))
        self.assertTrue(is_done(by_status, 410, b""))
        self.assertFalse(is_done(by_status, 202, b""))

    @given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=50))
    def test_template(self, task_id: str) -> None:
        """Whatever the id, the path that it makes names it again."""
        template = Template("/status/{id}/log")
        self.assertEqual(template.match(template.fill(task_id)), task_id)

    def test_template_of_other_paths(self) -> None:
        """An id is one part of a path, and the rest is as it is written."""
        template = Template("/a.b/{id}")
        for path in ("/a.b/", "/a.b/x/y", "/axb/x", "/a.b", "/q/a.b/x"):
            self.assertIsNone(template.match(path))
        self.assertEqual(template.match("/a.b/x%2Fy"), "x/y")
