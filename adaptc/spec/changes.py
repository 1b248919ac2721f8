"""What differs between two pieces of plain data, value by value."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.spec.yaml_text import flow, is_list, is_mapping

NAMING = frozenset({"method", "adapter", "name", "format", "path"})
"""The keys of an entry that its name is made of."""


@dataclass(frozen=True)
class ValueChange:
    """One value that differs.

    Attributes:
        key: the way to it, such as `adapt.0.r`.
        before: the value in the first; None where it has none.
        after: the value in the second; None where it has none.
    """

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            sign, value = ("+", self.after) if self.before is None else ("-", self.before)
            return f"{sign} {self.key}" if value == {} else f"{sign} {self.key}: {_shown(value)}"
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


def _shown(value: object) -> str:
    """A value in a line of text: a text as it is, anything else as YAML."""
    return value if isinstance(value, str) else flow(value)


def value_changes(before: object, after: object, key: str = "") -> list[ValueChange]:
    """The values that differ, in the order of the first; the items of lists by their number.

    Args:
        before: plain data; None stands for nothing.
        after: plain data.
        key: the way to both.
    """
    start = f"{key} " if key.endswith(":") else f"{key}." if key else ""
    if is_mapping(before) and is_mapping(after):
        return [
            change
            for name in {**before, **after}
            for change in value_changes(before.get(name), after.get(name), f"{start}{name}")
        ]
    if is_list(before) and is_list(after) and _nested(before) and _nested(after):
        sides: Sequence[Any] = [None] * max(len(before), len(after))
        ours, theirs = ([*items, *sides[len(items) :]] for items in (before, after))
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [c for index, (a, b) in pairs for c in value_changes(a, b, f"{start}{index}")]
    return [] if before == after else [ValueChange(key, before, after)]


def _nested(items: Sequence[Any]) -> bool:
    """Whether a list holds mappings; a list of plain values is one value."""
    return any(is_mapping(item) for item in items)


@dataclass(frozen=True)
class Entries:
    """A list of a spec's entries.

    Attributes:
        resolved: the entries with defaults filled in.
        written: the keys of each that the spec states.
    """

    resolved: Sequence[Mapping[str, Any]]
    written: Sequence[Mapping[str, Any]]

    def stated(self, index: int) -> dict[str, Any]:
        """What an entry states besides its name."""
        return {key: value for key, value in self.written[index].items() if key not in NAMING}


def entry_changes(
    before: Entries, after: Entries, name: Callable[[Mapping[str, Any]], str], key: str = ""
) -> list[ValueChange]:
    """What differs between two lists of entries, which are matched by their names in the order written.

    Args:
        before: the entries of the first.
        after: the entries of the second.
        name: the name of an entry.
        key: the way to both lists.
    """
    ours, theirs = ([f"{key} {name(e)}".strip() for e in each.resolved] for each in (before, after))
    changes: list[ValueChange] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind == "equal":
            for old, new in zip(range(a, b), range(c, d), strict=True):
                changes += value_changes(before.resolved[old], after.resolved[new], f"{ours[old]}:")
        else:
            changes += [ValueChange(ours[old], before.stated(old), None) for old in range(a, b)]
            changes += [ValueChange(theirs[new], None, after.stated(new)) for new in range(c, d)]
    return changes
