"""What a manifest, or a program's own metadata, says of the products at a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaptc.emit.manifest import MANIFEST
from adaptc.errors import AdaptcError


def listed(path: Path) -> dict[str, Any] | None:
    """The manifest's entries of the artifacts at a path, by name: all of a folder's, or a file's own; None without.

    Raises:
        AdaptcError: the manifest is broken, or not written by adaptc.
    """
    file = (path if path.is_dir() else path.parent) / MANIFEST
    if not path.exists() or not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        earlier = {"provenance": manifest}  # of versions that told it once for all artifacts
        artifacts: dict[str, Any] = {name: earlier | entry for name, entry in manifest["products"].items()}
        written_by_adaptc = bool(artifacts) and "adaptc" in manifest["versions"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdaptcError(f"{file}: broken, or not written by adaptc ({error!r})") from None
    if not written_by_adaptc:
        raise AdaptcError(f"{file}: not written by adaptc")
    if path.is_dir():
        return artifacts
    return {path.name: artifacts[path.name]} if path.name in artifacts else None


def from_metadata(path: Path) -> dict[str, Any] | None:
    """The entry in the metadata of a program that no manifest lists, such as a copy, by its name; None without."""
    if path.suffix != ".onnx" or not path.is_file():
        return None
    from adaptc.emit.onnx.provenance import embedded

    record = embedded(path)
    return None if record is None else {path.name: record}
