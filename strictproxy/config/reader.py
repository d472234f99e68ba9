"""
Reading YAML strictly, and collecting every mistake with its place.

Works on PyYAML's node tree, because only nodes know line and column. A
`Section` is a mapping being read: each key is taken with the kind of value it
must have, and whatever is left over in the end is an unknown key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, Final, TypeVar, cast, overload

import yaml

from strictproxy.config.units import parse_duration, parse_size

T = TypeVar("T")
D = TypeVar("D")
E = TypeVar("E", bound=Enum)

_TAG = "tag:yaml.org,2002:"
_WORDS = {
    f"{_TAG}str": "text",
    f"{_TAG}int": "a whole number",
    f"{_TAG}float": "a number",
    f"{_TAG}bool": "true or false",
    f"{_TAG}null": "nothing",
    f"{_TAG}map": "a mapping",
    f"{_TAG}seq": "a list",
}
_VARIABLE = re.compile(r"\$(\$|\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})")


class _Required(Enum):
    REQUIRED = 0


REQUIRED: Final = _Required.REQUIRED


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake: where it is, and what a person should know to mend it."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{self.file}:{self.line}:{self.column}: {where}{self.message}"


class Wrong(Exception):
    """A value is not what its key needs; the text says what it should be."""


class Document:
    """A YAML file being read; owns the problems found so far and the environment."""

    def __init__(self, file: str, text: str, environ: Mapping[str, str]) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._text = text
        self._environ = environ

    def root(self) -> Section | None:
        """Return the top mapping, or None after noting why there is none."""
        try:
            node = yaml.compose(self._text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            self._note(line, column, "", f"not valid YAML: {error.problem or error.context}")
            return None
        except yaml.YAMLError as error:
            self._note(1, 1, "", f"not valid YAML: {' '.join(str(error).split())}")
            return None
        if node is None:
            self._note(1, 1, "", "the file is empty")
            return None
        if not isinstance(node, yaml.MappingNode):
            self.note(node, "", f"must be a mapping, not {kind_of(node)}")
            return None
        return Section(self, node, "")

    def note(self, node: yaml.Node, path: str, message: str) -> None:
        """Record a mistake at `node`."""
        self._note(node.start_mark.line + 1, node.start_mark.column + 1, path, message)

    def _note(self, line: int, column: int, path: str, message: str) -> None:
        self.problems.append(Problem(self.file, line, column, path, message))

    def scalar(self, node: yaml.Node) -> tuple[str, str]:
        """
        Return the tag and text of a scalar, with `${NAME}` and `${NAME:-default}` filled in.

        :raise Wrong: it is no scalar, or a variable is not set.
        """
        if not isinstance(node, yaml.ScalarNode):
            raise Wrong(f"must be a single value, not {kind_of(node)}")
        text: str = node.value
        if "$" not in text:
            return node.tag, text
        filled = _VARIABLE.sub(self._variable, text)
        if not _VARIABLE.fullmatch(text):
            return f"{_TAG}str", filled
        # A variable alone has the type of what it holds, quoted or not, because
        # in {limit: "${LIMIT}"} YAML itself asks for the quotes.
        tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, filled, (True, False))
        return cast(str, tag), filled

    def _variable(self, match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        value = self._environ.get(match[2], match[3])
        if value is None:
            raise Wrong(f"environment variable {match[2]} is not set")
        return value


Kind = Callable[[Document, yaml.Node, str], T]


class Section:
    """A mapping being read. `take` each key, then call `close`."""

    def __init__(self, document: Document, node: yaml.MappingNode, path: str) -> None:
        self.document = document
        self.node = node
        self.path = path
        self._values: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        self._known: list[str] = []
        self.failed = False
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                document.note(key, path, f"a key must be text, not {kind_of(key)}")
            elif key.value in self._values:
                first = self._values[key.value][0].start_mark.line + 1
                document.note(key, self.at(key.value), f"given twice, first on line {first}")
            else:
                self._values[key.value] = (key, value)

    def at(self, key: str) -> str:
        """Return the key path of `key` in this section."""
        return f"{self.path}.{key}" if self.path else key

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def value(self, key: str) -> yaml.Node:
        """Return the node of a key that is there."""
        return self._values[key][1]

    @overload
    def take(self, key: str, kind: Kind[T]) -> T: ...

    @overload
    def take(self, key: str, kind: Kind[T], default: D) -> T | D: ...

    def take(self, key: str, kind: Kind[T], default: D | _Required = REQUIRED) -> T | D:
        """
        Read a key; after a mistake, which is noted, the default stands in for it.

        Where there is no default either, the section fails as a whole once it
        has been read to its end, so that its other mistakes are found too.
        """
        self._known.append(key)
        if key in self._values:
            node = self._values[key][1]
            try:
                return kind(self.document, node, self.at(key))
            except Wrong as wrong:
                self.document.note(node, self.at(key), str(wrong))
            except Missing:
                pass
        elif default is REQUIRED:
            self.document.note(self.node, self.path, f"{key!r} is missing")
        if default is not REQUIRED:
            return default
        self.failed = True
        return cast(T, None)

    def note(self, key: str | None, message: str) -> None:
        """Record a mistake at a key's name, or at the section itself."""
        if key is not None and key in self._values:
            self.document.note(self._values[key][0], self.at(key), message)
        else:
            self.document.note(self.node, self.path, message)

    def close(self) -> None:
        """Note each key that nobody took, with the nearest one that exists."""
        for key in self._values:
            if key not in self._known:
                self.note(key, f"unknown key{suggest(key, self._known)}")


class Missing(Exception):
    """A section lacks a value that it cannot do without; that has been noted."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or what there is to choose from."""
    names = sorted(known)
    near = get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is {', '.join(names)}" if names else ""


def kind_of(node: yaml.Node) -> str:
    """Name the type of `node` as a person would."""
    return _WORDS.get(node.tag, node.tag)


# -- kinds of value


def _scalar(document: Document, node: yaml.Node, tag: str) -> str:
    found, text = document.scalar(node)
    if found != _TAG + tag and not (tag == "str" and node.value != text):
        raise Wrong(f"must be {_WORDS[_TAG + tag]}, not {_WORDS.get(found, found)}")
    return text


def text(document: Document, node: yaml.Node, path: str) -> str:
    """Text, not empty."""
    value = _scalar(document, node, "str")
    if not value.strip():
        raise Wrong("must not be empty")
    return value


def boolean(document: Document, node: yaml.Node, path: str) -> bool:
    """True or false."""
    return _scalar(document, node, "bool").lower() in ("true", "yes", "on")


def whole(minimum: int, maximum: int | None = None) -> Kind[int]:
    """Return the kind for a whole number within bounds."""

    def read(document: Document, node: yaml.Node, path: str) -> int:
        written = _scalar(document, node, "int")
        try:
            value = int(written)
        except ValueError:
            raise Wrong(f"must be a plain decimal number, not {written}") from None
        if value < minimum:
            raise Wrong(f"must be at least {minimum}, not {value}")
        if maximum is not None and value > maximum:
            raise Wrong(f"must be at most {maximum}, not {value}")
        return value

    return read


port: Kind[int] = whole(1, 65535)


def duration(document: Document, node: yaml.Node, path: str) -> float:
    """Seconds, more than none."""
    value = _measure(document, node, parse_duration)
    if value <= 0:
        raise Wrong("must be more than 0")
    return value


def size(document: Document, node: yaml.Node, path: str) -> int:
    """Bytes."""
    return _measure(document, node, parse_size)


def _measure(document: Document, node: yaml.Node, parse: Callable[[str], T]) -> T:
    _, written = document.scalar(node)
    try:
        return parse(written)
    except ValueError as error:
        raise Wrong(str(error)) from None


def or_off(kind: Kind[T]) -> Kind[T | None]:
    """Return a kind that also takes `off`, for no bound at all."""

    def read(document: Document, node: yaml.Node, path: str) -> T | None:
        if isinstance(node, yaml.ScalarNode) and document.scalar(node)[1].lower() == "off":
            return None
        return kind(document, node, path)

    return read


def choice(kinds: type[E]) -> Kind[E]:
    """Return the kind for one of an enumeration's values."""

    def read(document: Document, node: yaml.Node, path: str) -> E:
        names = [str(member.value) for member in kinds]
        _, written = document.scalar(node)
        if written not in names:
            raise Wrong(f"must be one of {', '.join(names)}, not {written!r}")
        return kinds(written)

    return read


def items(kind: Kind[T]) -> Kind[tuple[T, ...]]:
    """Return the kind for a list."""

    def read(document: Document, node: yaml.Node, path: str) -> tuple[T, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise Wrong(f"must be a list, not {kind_of(node)}")
        values: list[T] = []
        for index, item in enumerate(node.value):
            where = f"{path}[{index}]"
            try:
                values.append(kind(document, item, where))
            except Wrong as wrong:
                document.note(item, where, str(wrong))
            except Missing:
                pass
        return tuple(values)

    return read


def one_or_more(kind: Kind[T]) -> Kind[tuple[T, ...]]:
    """Return the kind for a value, or a list of at least one."""

    def read(document: Document, node: yaml.Node, path: str) -> tuple[T, ...]:
        if not isinstance(node, yaml.SequenceNode):
            return (kind(document, node, path),)
        if not node.value:
            raise Wrong("must not be empty")
        return items(kind)(document, node, path)

    return read


def section(read: Callable[[Section], T]) -> Kind[T]:
    """Return the kind for a mapping that `read` takes apart; it is closed afterwards."""

    def read_section(document: Document, node: yaml.Node, path: str) -> T:
        if not isinstance(node, yaml.MappingNode):
            raise Wrong(f"must be a mapping, not {kind_of(node)}")
        inner = Section(document, node, path)
        value = read(inner)
        inner.close()
        if inner.failed:
            raise Missing
        return value

    return read_section


def anything(document: Document, node: yaml.Node, path: str) -> Any:
    """Plain data of any shape, for somebody else's settings."""
    if isinstance(node, yaml.MappingNode):
        return {
            str(key.value): anything(document, value, f"{path}.{key.value}")
            for key, value in node.value
        }
    if isinstance(node, yaml.SequenceNode):
        return [
            anything(document, item, f"{path}[{index}]") for index, item in enumerate(node.value)
        ]
    tag, written = document.scalar(node)
    loader = yaml.SafeLoader("")
    return loader.construct_object(yaml.ScalarNode(tag, written))
