"""The manifest: the artifacts of a folder, what they were compiled from, what each pass did, and every proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from adaptc.weights import sha256_of_files

MANIFEST = "manifest.json"
GRAPH = "graph"
"""The key of the outline of a graph: once in a manifest, and in no product's own provenance, since it is long."""
PACKAGES = ("adaptc", "torch", "onnx", "onnxruntime", "onnxruntime-genai", "onnxscript", "transformers")


def versions() -> dict[str, str]:
    """Package -> its version, of those packages that take part in a compile and are installed."""
    installed: dict[str, str] = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def write_manifest(
    path: Path, common: dict[str, Any], artifact: dict[str, Any], files: list[Path], old: Path | None = None
) -> None:
    """Write `manifest.json` for one artifact, keeping the entries of other artifacts in the same folder.

    Each entry has the `provenance` of its own artifact. What stands beside `products` is that of `latest`.

    Args:
        path: the manifest to write.
        common: the artifact's provenance: `versions`, `spec`, `base`, `adapters`, `sites`, `passes` and `proofs`.
        artifact: what belongs to this one: its `name`, `format`, `proof` and so on.
        files: its files, whose hashes are recorded.
        old: the manifest now in that folder, if any.
    """
    artifacts = _artifacts(old) if old is not None else {}
    artifacts[artifact["name"]] = product_entry(common, artifact, files, path.parent)
    latest = {"latest": artifact["name"], **common}
    manifest = json.loads(json.dumps({**latest, "products": artifacts}, default=str))
    path.write_text(_text(manifest), encoding="utf-8")


def product_entry(
    common: Mapping[str, object],
    artifact: Mapping[str, object],
    files: Iterable[Path],
    folder: Path | None = None,
) -> dict[str, Any]:
    """What a manifest says of one artifact.

    Args:
        common: its `provenance`.
        artifact: what belongs to it alone.
        files: its files, whose hashes are recorded.
        folder: the folder that their names are relative to; without it they are names alone.
    """
    hashes = {
        _name(file, folder): {"bytes": file.stat().st_size, "sha256": sha256_of_files([file])}
        for file in files
    }
    provenance = {key: value for key, value in common.items() if key != GRAPH}
    return {**artifact, "files": hashes, "provenance": provenance}


def is_unmodified(path: Path) -> bool:
    """Whether a manifest is byte for byte as it was written."""
    text = path.read_text(encoding="utf-8")
    return text == _text(json.loads(text))


def _text(manifest: Mapping[str, object]) -> str:
    """The manifest as it is written, with the SHA-256 of its content under `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=2) + "\n"


def _name(file: Path, folder: Path | None) -> str:
    """A file's path relative to a folder; its name alone where it is elsewhere, as while it is staged."""
    return str(file.relative_to(folder)) if folder and file.is_relative_to(folder) else file.name


def _artifacts(manifest: Path) -> dict[str, Any]:
    """The artifacts that a manifest lists under `products`; none where it is missing or broken."""
    try:
        artifacts: Any = json.loads(manifest.read_text(encoding="utf-8"))["products"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return cast("dict[str, Any]", artifacts) if isinstance(artifacts, dict) else {}
