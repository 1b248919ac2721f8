"""Records on disk: named texts, each whole or as what differs from an earlier one.

A file starts a text with `=== NAME`, or with `=== NAME, against OTHER` where a diff follows. OTHER is an earlier text
of the file, or `FILE: NAME` of another file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

HEAD = re.compile(r"=== (?P<name>[^,\n]+)(?:, against (?P<other>.+))?")
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")

Sections = dict[str, str]
"""The name of a text -> the text."""


def write(path: Path, sections: Mapping[str, str], base: Path | None = None) -> None:
    """Write texts; each as a diff against the one before it, or of `base`, that it differs least from."""
    known = {f"{base.stem}: {name}": text for name, text in read(base).items()} if base else {}
    lines: list[str] = []
    for name, text in sections.items():
        body, head = text.splitlines(), f"=== {name}"
        for other, earlier in known.items():
            changes = _changes(earlier, text)
            if sum(map(len, changes)) < sum(map(len, body)):
                body, head = changes, f"=== {name}, against {other}"
        lines += [head, *body, ""]
        known[name] = text
    path.write_text("\n".join(lines))


def read(path: Path) -> Sections:
    """Every text of a file, whole."""
    known: Sections = {}
    sections: Sections = {}
    for block in re.split(r"^(?==== )", path.read_text(), flags=re.MULTILINE)[1:]:
        first, _, body = block.partition("\n")
        head = HEAD.fullmatch(first)
        assert head is not None, f"{path.name}: {first!r} starts no text"
        text = body.removesuffix("\n").removesuffix("\n")
        if other := head["other"]:
            file, _, name = other.rpartition(": ")
            earlier = read(path.with_name(f"{file}.txt"))[name] if file else known[other]
            text = _changed(earlier, text)
        known[head["name"]] = sections[head["name"]] = text
    return sections


def difference(recorded: Mapping[str, str], current: Mapping[str, str], names: Sequence[str]) -> str:
    """How the texts of these names differ, as unified diffs; "" if they do not."""
    lines: list[str] = []
    for name in names:
        if name not in recorded or name not in current:
            lines.append(f"{name} is {'only' if name in recorded else 'not'} in the record")
        where = (f"{name}, recorded", f"{name}, now")
        before, after = recorded.get(name, ""), current.get(name, "")
        lines += difflib.unified_diff(before.splitlines(), after.splitlines(), *where, n=2, lineterm="")
    return "\n".join(lines)


def _changes(before: str, after: str) -> list[str]:
    """A unified diff without context, in which a line that is gone is told by its first word only."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    return [re.sub(r"^-((?:weight )?\S*).*", r"-\1", line) for line in lines]


def _changed(before: str, changes: str) -> str:
    """Apply such a diff.

    Raises:
        ValueError: it was made against another text.
    """
    old, new, place = before.splitlines(), [], 0
    for line in changes.splitlines():
        if hunk := HUNK.fullmatch(line):
            start = int(hunk[1]) - (hunk[2] != "0")
            new += old[place:start]
            place = start
        elif line[0] == "+":
            new.append(line[1:])
        else:
            found = old[place] if place < len(old) else "nothing more"
            if not found.startswith(line[1:]):
                raise ValueError(f"the diff expects {line[1:]!r} where the text has {found!r}")
            place += 1
    return "\n".join(new + old[place:])
