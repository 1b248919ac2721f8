"""What the manifests of a build say, gathered for a report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptc.emit.manifest import GRAPH, MANIFEST
from adaptc.errors import AdaptcError
from adaptc.ir.cost import shown_bytes
from adaptc.products.listing import listed

EXPECTED = "expected a folder that adaptc has written, or one above it: with a manifest.json"
DECADES = 4
"""The bar of a proof is empty where its error is so many powers of ten below what is allowed."""


def gathered(build: Path | Sequence[Path], bench: Path | None = None) -> dict[str, Any]:
    """The manifests of a build, as one.

    Args:
        build: a folder, whose manifests and those below it are taken; or products, whose own are.
        bench: what `adaptc bench --json` printed.

    Returns:
        `manifests`: their paths; `base`, `spec`, `versions`, `cost`, `sites`, `passes` and `graph` of the first;
        `products`, `proofs` and `quantization` of all; `bench`; and `bars`, the charts of sizes.

    Raises:
        AdaptcError: there is no manifest, one is broken, or the benchmark is no JSON.
    """
    folder, paths = manifests_of(build)
    entries: dict[str, Mapping[str, Any]] = {}
    for path in paths:
        place = path.parent.relative_to(folder)
        entries |= {str(place / name): entry for name, entry in (listed(path.parent) or {}).items()}
    manifests: list[Mapping[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    first = manifests[0]
    products = [_product(name, entry) for name, entry in entries.items()]
    errors = [entry["quantization"] for entry in entries.values() if entry.get("quantization")]
    told = {
        "manifests": [str(path.relative_to(folder)) for path in paths],
        "base": first["base"],
        "spec": first["spec"],
        "versions": first["versions"],
        "cost": first.get("cost"),
        "sites": first["sites"],
        "passes": first["passes"],
        "graph": next((each[GRAPH] for each in manifests if GRAPH in each), None),
        "products": products,
        "proofs": _proofs(manifests, entries),
        "quantization": _worst_first(errors[0]) if errors else None,
        "bench": _bench(bench) if bench is not None else None,
    }
    return {**told, "bars": _bars(told)}


def manifests_of(build: Path | Sequence[Path]) -> tuple[Path, list[Path]]:
    """The folder of a build, and the manifests that it has: those nearest to the folder first.

    Raises:
        AdaptcError: there is none.
    """
    if isinstance(build, Path):
        folder = build if build.is_dir() else build.parent
        if not build.exists():
            raise AdaptcError(f"{build}: no such file or folder", EXPECTED)
        candidates = [*folder.rglob(MANIFEST)] if build.is_dir() else [folder / MANIFEST]
    else:
        folders = [path if path.is_dir() else path.parent for path in build]
        folder = Path(os.path.commonpath(folders))
        candidates = [*dict.fromkeys(path / MANIFEST for path in folders)]
    paths = sorted((path for path in candidates if path.is_file()), key=lambda path: (len(path.parts), path))
    if not paths:
        raise AdaptcError(f"{build}: no {MANIFEST} there or below", EXPECTED)
    return folder, paths


def _product(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A product's name, format and size."""
    files: Mapping[str, Any] = entry.get("files", {})
    return {
        "name": name,
        "format": entry.get("format", ""),
        "adapters": entry.get("adapters", ""),
        "bytes": sum(file["bytes"] for file in files.values()),
    }


def _proofs(
    manifests: Sequence[Mapping[str, Any]], entries: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every proof once, with its share of what was allowed in hundredths."""
    all_proofs = [proof for manifest in manifests for proof in manifest["proofs"]]
    all_proofs += [entry["proof"] for entry in entries.values() if entry.get("proof")]
    once = {(proof["name"], proof["relative"]): proof for proof in all_proofs}
    return [{**proof, "share": _share(proof["relative"], proof["tolerance"])} for proof in once.values()]


def _share(error: float, allowed: float) -> int:
    """How full the bar of a proof is, in hundredths: full at what is allowed, empty `DECADES` below."""
    if not error or not allowed:
        return 0
    return round(100 * min(1.0, max(0.0, 1 + math.log10(error / allowed) / DECADES)))


def _worst_first(errors: Mapping[str, Any]) -> dict[str, Any]:
    """The errors of quantization, the layer with the largest error of its output first."""
    layers = sorted(errors["layers"], key=lambda layer: -(layer["output"] or 0.0))
    return {**errors, "layers": layers}


def _bench(path: Path) -> dict[str, Any]:
    """What `adaptc bench --json` printed.

    Raises:
        AdaptcError: the file cannot be read, or is something else.
    """
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: told[key] for key in ("against", "timings", "decodings", "accuracies")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "expected what `adaptc bench BUILD --json` prints"
        raise AdaptcError(f"{path}: no result of a benchmark ({error!r})", expected) from error


def _counted(value: float) -> str:
    return f"{value:,}"


def _bars(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bar charts: parameters, memory, operations, files."""
    charts: list[dict[str, Any]] = []
    cost: Mapping[str, Any] | None = told["cost"]

    def chart(
        title: str, unit: str, scale: float, rows: Mapping[str, float], shown: Callable[[float], str]
    ) -> None:
        values = [{"name": n, "value": v / scale, "shown": shown(v)} for n, v in rows.items()]
        charts.append({"title": title, "unit": unit, "rows": values})

    if cost is not None:
        counts = {"base": cost["parameters"], "trained": cost["trainable"]}
        chart("Parameters", "millions", 1e6, counts, _counted)
        memory = {"to run": cost["run_bytes"], "to train": cost["train_bytes"]}
        chart("Memory", "MB", 1e6, memory, shown_bytes)
        base = cost["base_flops"]
        flops = {
            "base": base,
            "live": base + cost["added_flops"],
            "folded": base + cost["folded_flops"],
        }
        chart(f"Operations for {cost['example']}", "MFLOPs", 1e6, flops, _counted)
    sizes = {product["name"]: product["bytes"] for product in told["products"]}
    chart("Files", "MB", 1e6, sizes, shown_bytes)
    return charts
