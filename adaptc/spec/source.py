"""The source of a spec: its data, the line and column of each key and value, and what `--set` changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptc.errors import Problem, SpecError
from adaptc.spec.yaml_text import Loc, YamlText, is_list, is_mapping


@dataclass(frozen=True)
class Source:
    """A spec's plain data, and what is needed to say where in it an error is.

    Attributes:
        path: the file, or None for a spec given as a Python mapping (which has no lines).
        data: the data, overrides applied.
        text: the YAML with the positions in it, if there is a file.
        overrides: for each `--set`, in the order applied, the location it changed and its text.
    """

    path: Path | None
    data: dict[str, Any]
    text: YamlText | None = None
    overrides: tuple[tuple[Loc, str], ...] = ()

    @classmethod
    def read(cls, path: Path) -> Source:
        """Read a spec file.

        Raises:
            SpecError: the file cannot be read, is not one YAML document of plain data, or holds no mapping.
        """
        return cls.of(path, _bytes_of(path))

    @classmethod
    def of(cls, path: Path, content: bytes) -> Source:
        """A spec that is, or will be, the content of a file.

        Raises:
            SpecError: it is not one YAML document of plain data, or holds no mapping.
        """
        text = YamlText.decode(str(path), content)
        data = text.read()
        if not is_mapping(data):
            raise SpecError([text.problem((1, 1), "a spec is a mapping that starts with 'version: 1'")])
        return cls(path, dict(data), text)

    def override(self, setting: str) -> Source:
        """Apply one `--set`: `base.dtype=float16`, `adapt.0.r=16`; the value is YAML.

        Raises:
            SpecError: the setting is malformed, or its path goes through a value that has no keys.
        """
        origin = f"--set {setting}"
        dotted, equals, value = setting.partition("=")
        parts = dotted.split(".")
        if not equals or not all(parts):
            message = "expected a key path, '=' and a value, such as base.dtype=float16"
            raise SpecError([Problem(message, file=origin)])
        try:
            data, loc = _with_value(self.data, parts, YamlText(origin, value).read())
        except SpecError as error:
            raise SpecError(replace(problem, line=None, key=dotted) for problem in error.problems) from None
        except LookupError as error:
            raise SpecError([Problem(str(error.args[0]), file=origin, key=dotted)]) from None
        return replace(self, data=data, overrides=(*self.overrides, (loc, origin)))

    def problem(self, loc: Loc, message: str, *notes: str, at_key: bool = False) -> Problem:
        """A problem with the value at `loc`, or with its key; where `loc` is not written, at its nearest parent."""
        key = ".".join(str(part) for part in loc)
        settings = [text for changed, text in self.overrides if loc[: len(changed)] == changed]
        if settings or self.text is None:
            return Problem(message, file=settings[-1] if settings else "<dict>", key=key, notes=notes)
        return self.text.problem(self.text.position(loc, at_key), message, *notes, key=key)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise SpecError([Problem(message, file=str(path))]) from None


def _with_value(data: object, parts: Sequence[str], value: object) -> tuple[Any, Loc]:
    """Set one value of plain data.

    Returns:
        A copy of `data` with `value` at the path, and the location of the topmost value that is new.
    """
    if not parts:
        return value, ()
    head, *rest = parts
    if is_list(data):
        index = int(head) if head.isdecimal() else len(data)
        if index >= len(data):
            raise LookupError(f"no entry {head!r} in a list of {len(data)} (they count from 0)")
        new, below = _with_value(data[index], rest, value)
        return [*data[:index], new, *data[index + 1 :]], (index, *below)
    if data is not None and not is_mapping(data):
        raise LookupError(f"cannot set {head!r} inside of {data!r}, which is not a mapping")
    mapping: Mapping[str, Any] = data or {}
    if head in mapping:
        new, below = _with_value(mapping[head], rest, value)
        return {**mapping, head: new}, (head, *below)
    for part in reversed(rest):
        value = {part: value}
    return {**mapping, head: value}, (head,)
