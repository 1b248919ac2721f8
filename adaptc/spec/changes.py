"""What differs between two pieces of plain data, value by value."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from adaptc.spec.yaml_text import flow, is_list, is_mapping


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
        if self.before is None:
            return f"+ {self.key}: {flow(self.after)}"
        if self.after is None:
            return f"- {self.key}: {flow(self.before)}"
        return f"{self.key}: {flow(self.before)} -> {flow(self.after)}"


def value_changes(before: object, after: object, key: str = "") -> list[ValueChange]:
    """The values that differ, in the order of the first; the items of lists by their number.

    Args:
        before: plain data; None stands for nothing.
        after: plain data.
        key: the way to both.
    """
    start = f"{key}." if key else ""
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


def entry_changes(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    name: Callable[[Mapping[str, Any]], str],
    key: str,
) -> list[ValueChange]:
    """What differs between two lists of entries, which are matched by their names in the order written.

    Args:
        before: the entries of the first.
        after: the entries of the second.
        name: the name of an entry.
        key: the way to both lists.
    """
    names = [[name(entry) for entry in entries] for entries in (before, after)]
    changes: list[ValueChange] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if kind == "equal":
            for old, new in zip(before[a:b], after[c:d], strict=True):
                changes += value_changes(old, new, f"{key} {name(old)}")
        else:
            changes += [ValueChange(f"{key} {name(old)}", _set(old), None) for old in before[a:b]]
            changes += [ValueChange(f"{key} {name(new)}", None, _set(new)) for new in after[c:d]]
    return changes


def _set(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an entry whose values say something."""
    return {key: value for key, value in entry.items() if cast(object, value) not in (None, [], {}, "")}
