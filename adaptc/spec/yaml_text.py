"""YAML read safely into plain data, with the line and column of every key and value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from adaptc.errors import Problem, SpecError

Loc = tuple[str | int, ...]
"""The location of a value: the keys and indices that lead to it, such as `("adapt", 0, "r")`."""
Position = tuple[int, int]
"""Line and column, both from 1."""
MAX_VALUES = 10_000
"""The most values a document may have, far above any spec: aliases could make a short text expand without end."""
_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + name for name in ("null", "bool", "int", "float"))
_RESERVED = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
"""Texts that some YAML readers take for a boolean or null, so `flow` quotes them."""
_TEXTS = frozenset(_TAG + name for name in ("str", "timestamp", "value"))


class _Mark(Protocol):
    """A point in a text. ruamel annotates neither its marks nor its nodes."""

    index: int
    line: int
    column: int


class _Node(Protocol):
    """A node of ruamel's; `id` is `mapping`, `sequence` or `scalar`."""

    id: str
    tag: Any
    value: Any
    anchor: str | None
    start_mark: _Mark
    end_mark: _Mark


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether a value is a mapping, with any keys and values."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is what YAML calls a list: a list, or a tuple in a spec given from Python."""
    return isinstance(value, list | tuple)


def flow(value: object) -> str:
    """Plain data as YAML on one line: `[insert, {factor: {tokens: 64}}]`."""
    if is_mapping(value):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if is_list(value):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]*", value) and value.lower() not in _RESERVED:
        return value
    return json.dumps(value)


class YamlText:
    """The text of one YAML document. Keys are always text, and only the tags of plain data are allowed.

    Args:
        file: what messages call it: its path, or `--set ...`.
        text: the document.
        most: the most values it may have; None for any number.
    """

    def __init__(self, file: str, text: str, most: int | None = MAX_VALUES) -> None:
        self._file = file
        self._text = text
        self._most = most
        self._yaml: Any = YAML(typ="safe", pure=True)
        self._values: dict[Loc, Position] = {}
        self._keys: dict[Loc, Position] = {}
        self._count = 0
        self._open: list[_Node] = []

    @classmethod
    def decode(cls, file: str, content: bytes) -> YamlText:
        """Decode the bytes of a file.

        Raises:
            SpecError: they are not UTF-8.
        """
        try:
            return cls(file, content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            before = cls(file, content[: error.start].decode("utf-8", "replace"))
            raise before._error(before._end(), f"not UTF-8: byte 0x{content[error.start]:02x}") from None

    def read(self) -> Any:
        """The document as dicts, lists, text, numbers, booleans and None.

        Raises:
            SpecError: the YAML is broken or has a second document, a duplicate key, a tag, or too many values.
        """
        try:
            node = self._yaml.compose(self._text)
            return None if node is None else self._build(node, ())
        except MarkedYAMLError as error:
            raise self._broken(error) from None
        except ReaderError as error:
            raise self._not_allowed(error) from None
        except RecursionError:
            raise self._error((1, 1), "nested too deeply") from None
        except (YAMLError, ValueError) as error:
            raise self._error((1, 1), f"broken YAML: {error}") from None

    def position(self, loc: Loc, at_key: bool = False) -> Position:
        """The position of a value, or of its key; of its nearest parent where `loc` is not written."""
        for table in (self._keys, self._values) if at_key else (self._values, self._keys):
            if loc in table:
                return table[loc]
        return self.position(loc[:-1]) if loc else (1, 1)

    def problem(self, position: Position, message: str, *notes: str, key: str = "") -> Problem:
        """A problem at a position of this text, with the line quoted."""
        line, column = position
        lines = self._text.replace("\r\n", "\n").split("\n")
        quoted = lines[line - 1].expandtabs(1) if line <= len(lines) else ""
        return Problem(message, self._file, line, column, quoted, key, notes)

    def _broken(self, error: Any) -> SpecError:
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        notes = ("indent with spaces, not with tabs",) if "'\\t'" in reason else ()
        return self._error(
            _position(error.problem_mark or error.context_mark), f"broken YAML: {reason}", *notes
        )

    def _not_allowed(self, error: Any) -> SpecError:
        position = YamlText(self._file, self._text[: error.position])._end()
        return self._error(position, f"broken YAML: character {error.character:#x} is not allowed")

    def _build(self, node: _Node, loc: Loc) -> Any:
        position = _position(node.start_mark)
        # ruamel puts an empty value after the line break: the position of its key is better.
        if node.start_mark.index < node.end_mark.index:
            self._values[loc] = position
        self._count += 1
        if self._most is not None and self._count > self._most:
            raise self._error(position, f"more than {self._most} values (are anchors expanded in anchors?)")
        if node in self._open:
            raise self._error(position, f"the anchor {node.anchor!r} contains itself")
        self._open.append(node)
        data = self._data(node, loc)
        self._open.pop()
        return data

    def _data(self, node: _Node, loc: Loc) -> Any:
        if node.id == "mapping" and node.tag == _TAG + "map":
            return self._mapping(node, loc)
        if node.id == "sequence" and node.tag == _TAG + "seq":
            return [self._build(item, (*loc, index)) for index, item in enumerate(node.value)]
        if node.id == "scalar" and node.tag in _TEXTS:
            return node.value
        if node.id == "scalar" and node.tag in _SCALARS:
            return self._scalar(node)
        tag = str(node.tag).replace(_TAG, "!!")
        raise self._error(_position(node.start_mark), f"the tag {tag} is not allowed: a spec is plain data")

    def _mapping(self, node: _Node, loc: Loc) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            position = _position(key.start_mark)
            if key.id != "scalar":
                raise self._error(position, "a key must be a plain word")
            if key.tag == _TAG + "merge":
                raise self._error(position, "merge keys (<<) are not YAML 1.2: write the keys out")
            name, here = str(key.value), (*loc, str(key.value))
            if name in data:
                raise self._error(position, f"duplicate key {name!r}", f"first at line {self._keys[here][0]}")
            self._keys[here] = position
            data[name] = self._build(value, here)
        return data

    def _scalar(self, node: _Node) -> Any:
        try:
            return self._yaml.constructor.construct_object(node)
        except ValueError:
            raise self._error(_position(node.start_mark), f"cannot read {node.value!r} as a number") from None

    def _error(self, position: Position, message: str, *notes: str) -> SpecError:
        return SpecError([self.problem(position, message, *notes)])

    def _end(self) -> Position:
        lines = self._text.split("\n")
        return len(lines), len(lines[-1]) + 1


def _position(mark: _Mark | None) -> Position:
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
