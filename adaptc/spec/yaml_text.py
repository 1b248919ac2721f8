"""YAML read safely into plain data, with the line and column of every key and value."""

from __future__ import annotations

import json
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StreamMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from adaptc.errors import Problem, SpecError

Loc = tuple[str | int, ...]
"""The way to a value: `("adapt", 0, "r")`."""
Position = tuple[int, int]
"""Line and column, both from 1."""
MAX_VALUES = 10_000
"""Aliases can make a short text grow without end; no spec is this long."""
_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + name for name in ("null", "bool", "int", "float"))
_RESERVED = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
"""Words that some readers of YAML take for something else than text."""
_WORDS = frozenset(_TAG + name for name in ("str", "timestamp", "value"))


def flow(value: Any) -> str:
    """Plain data as YAML on one line: `[insert, {factor: {tokens: 64}}]`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]*", value) is not None
    return value if plain and value.lower() not in _RESERVED else json.dumps(value)


class YamlText:
    """One YAML document. Keys are always text; of tags, only those of plain data are known."""

    def __init__(self, file: str, text: str) -> None:
        self._file = file
        self._text = text
        self._yaml = YAML(typ="safe", pure=True)
        self._values: dict[Loc, Position] = {}
        self._keys: dict[Loc, Position] = {}
        self._count = 0
        self._open: list[Node] = []

    @classmethod
    def decode(cls, file: str, content: bytes) -> YamlText:
        """The text of a file.

        Raises:
            SpecError: it is not UTF-8.
        """
        try:
            return cls(file, content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            before = cls(file, content[: error.start].decode("utf-8", "replace"))
            raise before._error(before._end(), f"not UTF-8: byte 0x{content[error.start]:02x}") from None

    def read(self) -> Any:
        """The document as dicts, lists, text, numbers, booleans and None.

        Raises:
            SpecError: broken YAML, a second document, a duplicate key, a tag, or too many values.
        """
        try:
            node = self._yaml.compose(self._text)
            return None if node is None else self._build(node, ())
        except MarkedYAMLError as error:
            words = ", ".join(part for part in (error.context, error.problem) if part)
            tip = ("indent with spaces, not with tabs",) if "'\\t'" in words else ()
            mark = error.problem_mark or error.context_mark
            raise self._error(_position(mark), f"broken YAML: {words}", *tip) from None
        except ReaderError as error:
            place = YamlText(self._file, self._text[: error.position])._end()
            raise self._error(place, f"broken YAML: character {error.character:#x} is not allowed") from None
        except RecursionError:
            raise self._error((1, 1), "nested too deeply") from None
        except (YAMLError, ValueError) as error:
            raise self._error((1, 1), f"broken YAML: {error}") from None

    def position(self, loc: Loc, at_key: bool = False) -> Position:
        """Where the value (or its key) stands; for what is not written, where its nearest parent does."""
        for table in (self._keys, self._values) if at_key else (self._values, self._keys):
            if loc in table:
                return table[loc]
        return self.position(loc[:-1]) if loc else (1, 1)

    def problem(self, position: Position, message: str, *notes: str, key: str = "") -> Problem:
        """A problem at a place of this text, which is quoted."""
        line, column = position
        lines = self._text.replace("\r\n", "\n").split("\n")
        quoted = lines[line - 1].expandtabs(1) if line <= len(lines) else ""
        return Problem(message, self._file, line, column, quoted, key, notes)

    def _build(self, node: Node, loc: Loc) -> Any:
        position = _position(node.start_mark)
        # ruamel puts an empty value behind the line break: its key is the better place.
        if node.start_mark.index < node.end_mark.index:
            self._values[loc] = position
        self._count += 1
        if self._count > MAX_VALUES:
            raise self._error(position, f"more than {MAX_VALUES} values (are anchors expanded in anchors?)")
        if node in self._open:
            raise self._error(position, f"the anchor {node.anchor!r} contains itself")
        self._open.append(node)
        data = self._data(node, loc)
        self._open.pop()
        return data

    def _data(self, node: Node, loc: Loc) -> Any:
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, loc)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self._build(item, (*loc, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and node.tag in _WORDS:
            return node.value
        if isinstance(node, ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node)
        tag = str(node.tag).replace(_TAG, "!!")
        raise self._error(_position(node.start_mark), f"the tag {tag} is not allowed: a spec is plain data")

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            place = _position(key.start_mark)
            if not isinstance(key, ScalarNode):
                raise self._error(place, "a key must be a plain word")
            if key.tag == _TAG + "merge":
                raise self._error(place, "merge keys (<<) are not YAML 1.2: write the keys out")
            name, here = key.value, (*loc, key.value)
            if name in data:
                raise self._error(place, f"duplicate key {name!r}", f"first at line {self._keys[here][0]}")
            self._keys[here] = place
            data[name] = self._build(value, here)
        return data

    def _scalar(self, node: ScalarNode) -> Any:
        try:
            return self._yaml.constructor.construct_object(node)
        except ValueError:
            raise self._error(_position(node.start_mark), f"cannot read {node.value!r} as a number") from None

    def _error(self, position: Position, message: str, *notes: str) -> SpecError:
        return SpecError([self.problem(position, message, *notes)])

    def _end(self) -> Position:
        lines = self._text.split("\n")
        return len(lines), len(lines[-1]) + 1


def _position(mark: StreamMark | None) -> Position:
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
