"""What a path holds, and whether an artifact is still what its manifest says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptc import checkpoint
from adaptc.emit.manifest import MANIFEST
from adaptc.errors import AdaptcError, Problem, ProofError, SpecError
from adaptc.inputs import InputSpec
from adaptc.proof import SIZES
from adaptc.weights import read_safetensors, sha256_of_files


def inspect(path: Path) -> list[dict[str, Any]]:
    """Rows of key and value for an artifact, an adapter's checkpoint, or a model directory.

    Raises:
        SpecError: nothing that adaptc knows is there.
        WeightError: what is there is broken.
    """
    manifest = _manifest(path)
    if manifest is not None:
        return _rows(_product(manifest, path))
    if path.is_dir() and checkpoint.missing(path) is None:
        rows = []
        for folder in checkpoint.directories(path):
            found = checkpoint.read(folder)
            rows += _rows({"adapter": folder, "type": found.config.get("peft_type"), "base": found.config.get(
                "base_model_name_or_path"), "tensors": _tensors(found.tensors)})  # fmt: skip
        return rows
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        files = sorted(path.glob("*.safetensors"))
        tensors = {name: weight for file in files for name, weight in read_safetensors(file).items()}
        return _rows({"model": path, "class": config.get("architectures"), "tensors": _tensors(tensors)})
    raise _nothing(path)


def verify(path: Path) -> list[dict[str, Any]]:
    """Check an artifact: the hashes of its files, and that it runs on fresh inputs of several shapes.

    Raises:
        SpecError: there is no artifact of adaptc.
        ProofError: a file was changed, or the program gives values that are not finite.
    """
    manifest = _manifest(path)
    if manifest is None:
        raise SpecError(
            [Problem(f"no {MANIFEST} there, so there is nothing to check against", file=str(path))]
        )
    folder = path if path.is_dir() else path.parent
    rows = []
    for name, product in _products(manifest, path).items():
        for file, known in product["files"].items():
            if not (folder / file).is_file():
                raise ProofError(f"{folder / file}: missing, though {MANIFEST} names it")
            if sha256_of_files([folder / file]) != known["sha256"]:
                raise ProofError(f"{folder / file}: changed since it was compiled (its SHA-256 differs)")
            rows.append({"what": file, "checked": f"SHA-256 {known['sha256'][:12]}..."})
        rows.append({"what": name, "checked": _runs(folder, name, product)})
    return rows


def _runs(folder: Path, name: str, product: Mapping[str, Any]) -> str:
    import torch

    from adaptc.emit.onnx import onnx_runner
    from adaptc.emit.torch import load_torch
    from adaptc.proof import runner
    from adaptc.tracing.export import example_sizes, example_tensors

    if product["format"] == "hf":
        for name in (name for name in product["files"] if name.endswith(".safetensors")):
            for key, weight in read_safetensors(folder / name).items():
                if not torch.isfinite(weight.load()).all():
                    raise ProofError(f"{folder / name}: {key} holds values that are not finite")
        return "every tensor is finite"
    if product["format"] == "peft":
        for directory in checkpoint.directories(folder):
            found = checkpoint.read(directory)
            checkpoint.load(found, found.tensors)
        return "every tensor is finite"
    if product["format"] == "onnx":
        run = onnx_runner(folder / name)
        inputs = [InputSpec.parse(key, text) for key, text in product["inputs"].items()]
    else:
        run = runner(load_torch(folder))
        about = product["module"]
        inputs = [InputSpec.from_json(spec) for spec in about["inputs"]]
    for number, among in enumerate(SIZES[:2]):
        outputs = run(example_tensors(inputs, example_sizes(inputs, among), seed=number))
        if not all(torch.isfinite(output).all() for output in outputs):
            raise ProofError(f"{folder / name}: gives values that are not finite")
    return "runs on two shapes, every value finite"


def _manifest(path: Path) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / MANIFEST
    if not path.exists() or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known = bool(found["products"]) and "adaptc" in found["versions"]
    except (ValueError, KeyError, TypeError) as error:
        raise AdaptcError(f"{file}: broken, or not written by adaptc ({error!r})") from None
    if not known:
        raise AdaptcError(f"{file}: not written by adaptc")
    return found


def _products(manifest: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    products = manifest["products"]
    if path.is_dir():
        return products
    if path.name not in products:
        raise SpecError([Problem(f"{MANIFEST} beside it names {', '.join(products)}", file=str(path))])
    return {path.name: products[path.name]}


def _product(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    shown: dict[str, Any] = {"base": manifest["base"]["model"], "base SHA-256": manifest["base"]["sha256"]}
    for name, product in _products(manifest, path).items():
        shown[name] = f"{product['format']}, {sum(f['bytes'] for f in product['files'].values()):,} bytes"
        for key in ("adapters", "opset", "nodes", "class", "dtype", "inputs", "outputs", "checked"):
            if key in product:
                shown[f"{name}: {key}"] = product[key]
        if "proof" in product:
            proof = product["proof"]
            shown[f"{name}: proof"] = (
                f"largest error {proof['relative']:.1e} of {proof['tolerance']:.1e} allowed"
            )
    methods = sorted({method for site in manifest["sites"] for method in site["methods"]})
    shown["sites"] = f"{len(manifest['sites'])} ({', '.join(methods)})"
    return shown | {"versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())}


def _tensors(tensors: Mapping[str, Any]) -> str:
    return f"{len(tensors)}, {sum(weight.nbytes for weight in tensors.values()):,} bytes"


def _rows(pairs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"what": key, "value": value} for key, value in pairs.items()]


def _nothing(path: Path) -> SpecError:
    words = "no such path" if not path.exists() else "no artifact, adapter or model there that adaptc knows"
    return SpecError([Problem(words, file=str(path))])
