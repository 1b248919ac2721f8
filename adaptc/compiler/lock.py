"""A lock: a file beside a spec that holds the hashes of all that a compile depends on.

It is JSON with the keys `lock` (the version of this format), `spec` (as resolved), `base` (`sha256`, and that of each
of its `files`), `adapters` and `data` (path -> SHA-256), and `versions` (package -> version).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from adaptc.compiler.program import Program
from adaptc.emit.manifest import versions
from adaptc.errors import AdaptcError, Problem, SpecError
from adaptc.spec.changes import ValueChange, value_changes
from adaptc.spec.spec import Spec, dump, resolve_path
from adaptc.weights import sha256_of_files

FORMAT, ENDING = 1, ".lock"
SECTIONS = ("spec", "base", "adapters", "data", "versions")
MOST = 40
"""The most changes that an error lists."""


def lock_path(spec: Spec) -> Path:
    """The lock of a spec: beside its file, of the same name with the ending `.lock`.

    Raises:
        SpecError: the spec is no file.
    """
    if spec.source.path is None:
        raise SpecError([Problem("a lock stands beside a spec's file, and this spec is none")])
    return spec.source.path.with_suffix(ENDING)


def lock_of(program: Program) -> dict[str, Any]:
    """What a lock holds of a compile: plain data."""
    spec, source = program.spec, program.base.source
    data = [text for text in (spec.calibration, spec.proof.inputs if spec.proof else None) if text]
    return {
        "lock": FORMAT,
        "spec": dump(spec),
        "base": {
            "sha256": program.base_sha256,
            "files": {name: sha256_of_files([file]) for name, file in _base_files(source.files)},
        },
        "adapters": dict(sorted(dict(_adapters(program)).items())),
        "data": {text: sha256_of_files([resolve_path(spec, text)]) for text in data},
        "versions": versions(),
    }


def _base_files(files: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """The weight files of a base and the configurations beside them, by their names below the folder of all."""
    if not files:
        return
    folders = dict.fromkeys(file.parent for file in files)
    configurations = [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]
    root = os.path.commonpath(folders)
    for file in sorted([*files, *configurations]):
        yield os.path.relpath(file, root), file


def _adapters(program: Program) -> Iterator[tuple[str, str]]:
    """The path of every adapter that the spec names, relative to the spec's folder, and its hash."""
    folder = program.spec.directory
    for each in (program, *program.alternatives.values()):
        for planned in each.plan.entries:
            if planned.checkpoint is not None:
                yield os.path.relpath(planned.checkpoint.path, folder), planned.checkpoint.sha256
            if planned.combined is not None:
                for origin in planned.combined.origins:
                    yield os.path.relpath(origin.path, folder), origin.sha256


def check_lock(program: Program) -> bool:
    """Whether a spec has a lock; if it has, all is as it was locked.

    Raises:
        SpecError: the spec is no file.
        AdaptcError: something differs from what is locked; lists what. Or the file is no lock.
    """
    path = lock_path(program.spec)
    if not path.is_file():
        return False
    changes = lock_changes(_read(path), json.loads(json.dumps(lock_of(program))))
    if changes:
        things = "1 thing differs" if len(changes) == 1 else f"{len(changes)} things differ"
        more = [f"and {len(changes) - MOST} more"] if len(changes) > MOST else []
        raise AdaptcError(
            f"{path}: {things} from what is locked (locked -> now)",
            *map(str, changes[:MOST]),
            *more,
            f"put back what changed; or remove {path.name}, and compile with --locked to lock what is there now",
        )
    return True


def write_lock(program: Program) -> Path:
    """Write the lock of a spec; gives its path.

    Raises:
        SpecError: the spec is no file.
        AdaptcError: the disk cannot take it.
    """
    path = lock_path(program.spec)
    staged = path.with_name(f".{path.name}.new")
    try:
        staged.write_text(json.dumps(lock_of(program), indent=2) + "\n", encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise AdaptcError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def lock_changes(locked: dict[str, Any], now: dict[str, Any]) -> list[ValueChange]:
    """What differs between two locks, section by section."""
    return [
        ValueChange(f"{section} {change.key}", change.before, change.after)
        for section in SECTIONS
        for change in value_changes(locked[section], now[section])
    ]


def _read(path: Path) -> dict[str, Any]:
    """A lock from its file.

    Raises:
        AdaptcError: it is none, or of a later version of adaptc.
    """
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdaptcError(f"{path}: cannot be read as a lock: {error}", "remove it to lock anew") from None
    complete = isinstance(content, dict) and all(
        isinstance(cast("dict[str, Any]", content).get(section), dict) for section in SECTIONS
    )
    lock = cast("dict[str, Any]", content)
    if not complete or lock.get("lock") != FORMAT:
        raise AdaptcError(
            f"{path}: no lock of format {FORMAT}, as this adaptc has it", "remove it to lock anew"
        )
    return lock
