"""The output paths of artifacts: never over something that adaptc did not write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptc.emit.manifest import MANIFEST
from adaptc.errors import Problem, SpecError
from adaptc.spec.spec import Spec, resolve_path

FOLDERS = frozenset({"torch", "genai", "peft", "hf"})
"""The formats whose artifact is a folder; the others write files."""


def output_paths(spec: Spec, entries: Sequence[Any], into: Path | None = None) -> list[Path]:
    """The final path of every artifact.

    Args:
        spec: the spec, whose folder paths are relative to.
        entries: validated `emit` entries.
        into: a directory that replaces the spec's own folder.

    Raises:
        SpecError: a path is the spec's own folder or above it, lies inside another artifact or inside the base it
            is a copy of, or would replace something adaptc did not write. All problems at once.
    """
    paths = [(into / entry.path if into else resolve_path(spec, entry.path)).resolve() for entry in entries]
    problems: list[Problem] = []
    for index, (entry, path) in enumerate(zip(entries, paths, strict=True)):
        inside = next(
            (i for i, p in enumerate(paths) if entries[i].format in FOLDERS and p in path.parents), None
        )
        wrong = (
            f"lies inside the folder that emit.{inside} writes; choose a path beside it"
            if inside is not None
            else _within_base(spec, path, entry.format)
            or _occupied(path, entry.format, spec.directory.resolve())
        )
        if wrong:
            problems.append(spec.source.problem(("emit", index, "path"), wrong))
    if problems:
        raise SpecError(problems)
    return paths


def _within_base(spec: Spec, path: Path, kind: str) -> str | None:
    """Why a Hugging Face checkpoint cannot be written inside the base's directory; None if it is not there."""
    if kind != "hf" or spec.base is None or spec.base.model is None:
        return None
    base = resolve_path(spec, spec.base.model).resolve()
    if base.is_dir() and (path == base or base in path.parents):
        return f"{path} is within the base's own directory, which is copied; choose a path beside it"
    return None


def _occupied(path: Path, kind: str, home: Path) -> str | None:
    """Why a path cannot be written to; None if adaptc wrote all that is there, or nothing is."""
    if path == home or path in home.parents:
        return f"{path} holds the spec itself; choose a folder of its own, such as build/{kind}"
    if kind not in FOLDERS:
        return _occupied_file(path)
    if path.is_file():
        return f"{path} is a file; expected the name of a folder"
    if path.is_dir():
        foreign = sorted(_files(path) - _written(path))
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            return f"{path} holds files adaptc did not write ({', '.join(foreign[:3])}{more}): choose another path"
    return None


def _occupied_file(path: Path) -> str | None:
    """Why the path of a file cannot be written to; None if it can."""
    if path.name == MANIFEST:
        return f"{MANIFEST} is the name of the manifest beside it; choose another name, such as model.onnx"
    if path.is_dir():
        return f"{path} is a folder; expected the name of a file"
    manifest = path.parent / MANIFEST
    if manifest.is_file() and not _written(path.parent):
        return f"{manifest} was not written by adaptc, and would be replaced; choose another folder"
    if path.is_file() and path.suffix != ".onnx" and path.name not in _written(path.parent):
        return f"{path} is a file adaptc did not write; choose another name, such as model.onnx"
    return None


def _files(folder: Path) -> set[str]:
    """All files in a folder and below, relative to it."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}


def _written(folder: Path) -> set[str]:
    """The files that the folder's manifest lists, if adaptc wrote it."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        artifacts: dict[str, Any] = manifest["products"] if "adaptc" in manifest["versions"] else {}
        return {MANIFEST, *(name for artifact in artifacts.values() for name in artifact["files"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
