"""The manifest: what was compiled from what, what each pass did, and every proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adaptc.weights import sha256_of_files

MANIFEST = "manifest.json"
PACKAGES = ("adaptc", "torch", "onnx", "onnxruntime", "onnxscript", "transformers")


def versions() -> dict[str, str]:
    """The versions of what took part; packages that are not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(
    path: Path, common: dict[str, Any], product: dict[str, Any], files: list[Path], old: Path | None = None
) -> None:
    """Write `manifest.json` for one product, keeping the entries of other products in the same folder.

    Args:
        path: the manifest to write.
        common: what all products of the compile share.
        product: what is true of this one: `name`, its proofs.
        files: its files, whose hashes are recorded.
        old: the manifest now in that folder, if any.
    """
    hashes = {
        _name(file, path): {"bytes": file.stat().st_size, "sha256": sha256_of_files([file])} for file in files
    }
    products = _products(old) if old is not None else {}
    products[product["name"]] = {**product, "files": hashes}
    manifest = json.loads(json.dumps({**common, "products": products}, default=str))
    path.write_text(_text(manifest), encoding="utf-8")


def is_unmodified(path: Path) -> bool:
    """Whether a manifest is, byte for byte, what was written."""
    text = path.read_text(encoding="utf-8")
    return text == _text(json.loads(text))


def _text(manifest: Mapping[str, Any]) -> str:
    """The manifest as it is written, with the SHA-256 of all it says."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return json.dumps(said | {"sha256": digest}, indent=2) + "\n"


def _name(file: Path, manifest: Path) -> str:
    folder = manifest.parent
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name


def _products(manifest: Path) -> dict[str, Any]:
    """The products that a manifest names; none where it is missing or broken."""
    try:
        products = json.loads(manifest.read_text(encoding="utf-8"))["products"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return products if isinstance(products, dict) else {}
