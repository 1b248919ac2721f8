"""What a path holds, and whether an artifact is still what its manifest says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptc.checkpoints import adapter as checkpoint
from adaptc.emit.manifest import MANIFEST, is_unmodified
from adaptc.errors import AdaptcError, Problem, ProofError, SpecError
from adaptc.weights import read_safetensors, sha256_of_files

if TYPE_CHECKING:
    from adaptc.compiler.proof import Runner


def inspect(path: Path) -> list[dict[str, Any]]:
    """Rows of key and value for an artifact, an adapter's checkpoint, or a model directory.

    Raises:
        SpecError: nothing that adaptc knows is there.
        WeightError: what is there is broken.
    """
    manifest = _manifest(path)
    if manifest is not None:
        return _rows(_product(manifest, path))
    if path.is_dir() and checkpoint.why_missing(path) is None:
        rows = []
        for folder in checkpoint.directories(path):
            found = checkpoint.read(folder)
            kind = found.config.get("peft_type") or found.config.get("adaptc_method")
            base = found.config.get("base_model_name_or_path")
            rows += _rows({"adapter": folder, "type": kind, "base": base, "tensors": _tensors(found.tensors)})
        return rows
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        files = sorted(path.glob("*.safetensors"))
        tensors = {name: weight for file in files for name, weight in read_safetensors(file).items()}
        about = config.get("quantization_config")
        bits = {"quantized": _quantized(about)} if isinstance(about, dict) else {}
        return _rows(
            {"model": path, "class": config.get("architectures"), "tensors": _tensors(tensors), **bits}
        )
    raise _nothing(path)


def verify(path: Path) -> list[dict[str, Any]]:
    """Prove an artifact again: the hashes of its files, and that it computes what its graph did when it was compiled.

    Raises:
        SpecError: there is no artifact of adaptc.
        ProofError: a file was changed, or the artifact computes something else.
    """
    manifest = _manifest(path)
    folder = path if path.is_dir() else path.parent
    if manifest is None:
        raise SpecError(
            [Problem(f"no {MANIFEST} there, so there is nothing to check against", file=str(path))]
        )
    if not is_unmodified(folder / MANIFEST):
        raise ProofError(f"{folder / MANIFEST}: changed since it was written (its own SHA-256 differs)")
    rows = []
    for name, product in _products(manifest, path).items():
        for file, known in product["files"].items():
            if not (folder / file).is_file():
                raise ProofError(f"{folder / file}: missing, though {MANIFEST} names it")
            if sha256_of_files([folder / file]) != known["sha256"]:
                raise ProofError(f"{folder / file}: changed since it was compiled (its SHA-256 differs)")
            rows.append({"what": file, "checked": f"SHA-256 {known['sha256'][:12]}..."})
        try:
            rows.append({"what": name, "checked": _proved(folder, name, product, manifest)})
        except ProofError as error:
            raise ProofError(f"{folder / name}: {error}") from error
    return rows


def _proved(folder: Path, name: str, product: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Run a product against what its graph gave; of one that does not run, the tensors are looked at."""
    from adaptc.compiler.reference import proved_again

    if "reference" not in product:
        return _finite(folder, product)
    return proved_again(product["reference"], _runner(folder, name, product, manifest))


def _runner(folder: Path, name: str, product: Mapping[str, Any], manifest: Mapping[str, Any]) -> Runner:
    from adaptc.compiler.proof import BatchRunner, module_call
    from adaptc.emit.onnx.partitioned import PartitionedProgram
    from adaptc.emit.onnx.runtime import onnx_runner
    from adaptc.emit.torch import load_torch

    match product["format"]:
        case "torch":
            return BatchRunner(module_call(load_torch(folder)))
        case "onnx" if (folder / f"{name}.data").exists():
            return PartitionedProgram(folder / name, folder / name)
        case "onnx":
            return BatchRunner(onnx_runner(folder / name))
        case _:
            import transformers

            from adaptc.emit.huggingface import load_checkpoint
            from adaptc.tracing.huggingface_tasks import tasks

            base = manifest["spec"]["base"]
            auto = getattr(transformers, tasks()[base["task"]])
            return BatchRunner(module_call(load_checkpoint(auto, base["trust_remote_code"], folder)))


def _finite(folder: Path, product: Mapping[str, Any]) -> str:
    import torch

    for file in (folder / name for name in product["files"] if name.endswith(".safetensors")):
        for key, weight in read_safetensors(file).items():
            if not torch.isfinite(weight.load()).all():
                raise ProofError(f"{file}: {key} holds values that are not finite")
    return "every tensor is finite"


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


def _quantized(about: Mapping[str, Any]) -> str:
    """What a configuration says of the library that quantized its checkpoint, and how."""
    said = {key: value for key, value in about.items() if isinstance(value, (bool, int, str)) and value}
    return ", ".join(f"{key} {value}" for key, value in sorted(said.items()) if not key.startswith("_"))


def _tensors(tensors: Mapping[str, Any]) -> str:
    return f"{len(tensors)}, {sum(weight.nbytes for weight in tensors.values()):,} bytes"


def _rows(pairs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"what": key, "value": value} for key, value in pairs.items()]


def _nothing(path: Path) -> SpecError:
    words = "no such path" if not path.exists() else "no artifact, adapter or model there that adaptc knows"
    return SpecError([Problem(words, file=str(path))])
