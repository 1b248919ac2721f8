"""The commands `adaptc inspect`, what a path holds, and `adaptc verify`, whether an artifact is as it was compiled."""

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
    """Describe an artifact, an adapter's checkpoint, or a model directory.

    Returns:
        Rows with the keys `what` and `value`.

    Raises:
        SpecError: the path holds none of these.
        WeightError: a file there is broken.
    """
    manifest = _manifest(path)
    if manifest is not None:
        return _rows(_described(manifest, path))
    if path.is_dir() and checkpoint.why_missing(path) is None:
        rows: list[dict[str, Any]] = []
        for folder in checkpoint.directories(path):
            adapter = checkpoint.read(folder)
            kind = adapter.config.get("peft_type") or adapter.config.get("adaptc_method")
            base = adapter.config.get("base_model_name_or_path")
            rows += _rows(
                {"adapter": folder, "type": kind, "base": base, "tensors": _tensors(adapter.tensors)}
            )
        return rows
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        files = sorted(path.glob("*.safetensors"))
        tensors = {name: weight for file in files for name, weight in read_safetensors(file).items()}
        shown = {"model": path, "class": config.get("architectures"), "tensors": _tensors(tensors)}
        if isinstance(config.get("quantization_config"), dict):
            shown["quantized"] = _quantized(config["quantization_config"])
        return _rows(shown)
    raise _nothing(path)


def verify(path: Path) -> list[dict[str, Any]]:
    """Prove an artifact again: the hashes of its files, and that it computes what its graph did when it was compiled.

    Returns:
        Rows with the keys `what` (a file or an artifact) and `checked` (how, and the result).

    Raises:
        SpecError: the path holds no artifact of adaptc.
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
    rows: list[dict[str, Any]] = []
    for name, artifact in _artifacts(manifest, path).items():
        for file, recorded in artifact["files"].items():
            if not (folder / file).is_file():
                raise ProofError(f"{folder / file}: missing, though {MANIFEST} names it")
            if sha256_of_files([folder / file]) != recorded["sha256"]:
                raise ProofError(f"{folder / file}: changed since it was compiled (its SHA-256 differs)")
            rows.append({"what": file, "checked": f"SHA-256 {recorded['sha256'][:12]}..."})
        try:
            rows.append({"what": name, "checked": _proved(folder, name, artifact, manifest)})
        except ProofError as error:
            raise ProofError(f"{folder / name}: {error}") from error
    return rows


def _proved(folder: Path, name: str, artifact: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Compare an artifact's outputs with the recorded ones; of one that cannot run, check that its tensors are finite.

    Returns:
        What was checked, for the row.
    """
    from adaptc.compiler.reference import proved_again

    if "reference" not in artifact:
        return _finite(folder, artifact)
    return proved_again(artifact["reference"], _runner(folder, name, artifact, manifest))


def _runner(folder: Path, name: str, artifact: Mapping[str, Any], manifest: Mapping[str, Any]) -> Runner:
    from adaptc.compiler.proof import BatchRunner, module_call
    from adaptc.emit.onnx.partitioned import PartitionedProgram
    from adaptc.emit.onnx.runtime import onnx_runner
    from adaptc.emit.torch import load_torch

    match artifact["format"]:
        case "torch":
            return BatchRunner(module_call(load_torch(folder)))
        case "onnx" if (folder / f"{name}.data").exists():
            return PartitionedProgram(folder / name, folder / name)
        case "onnx":
            return BatchRunner(onnx_runner(folder / name))
        case _:
            from adaptc.emit.huggingface import load_checkpoint
            from adaptc.tracing.huggingface import read_pretrained

            base = manifest["spec"]["base"]
            stored = read_pretrained(str(folder), base["task"], base["trust_remote_code"], {})
            return BatchRunner(module_call(load_checkpoint(stored, folder)))


def _finite(folder: Path, artifact: Mapping[str, Any]) -> str:
    import torch

    for file in (folder / name for name in artifact["files"] if name.endswith(".safetensors")):
        for key, weight in read_safetensors(file).items():
            if not torch.isfinite(weight.load()).all():
                raise ProofError(f"{file}: {key} contains NaN or infinity (non-finite)")
    return "every tensor is finite"


def _manifest(path: Path) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / MANIFEST
    if not path.exists() or not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        written_by_adaptc = bool(manifest["products"]) and "adaptc" in manifest["versions"]
    except (ValueError, KeyError, TypeError) as error:
        raise AdaptcError(f"{file}: broken, or not written by adaptc ({error!r})") from None
    if not written_by_adaptc:
        raise AdaptcError(f"{file}: not written by adaptc")
    return manifest


def _artifacts(manifest: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The manifest's entries of the artifacts at a path, by name: all of a folder's, or a file's own."""
    artifacts = manifest["products"]
    if path.is_dir():
        return artifacts
    if path.name not in artifacts:
        message = f"not among the artifacts in {MANIFEST} beside it: {', '.join(artifacts)}"
        raise SpecError([Problem(message, file=str(path))])
    return {path.name: artifacts[path.name]}


def _described(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    shown: dict[str, Any] = {"base": manifest["base"]["model"], "base SHA-256": manifest["base"]["sha256"]}
    for name, artifact in _artifacts(manifest, path).items():
        shown[name] = f"{artifact['format']}, {sum(f['bytes'] for f in artifact['files'].values()):,} bytes"
        for key in ("adapters", "opset", "nodes", "class", "dtype", "inputs", "outputs", "checked"):
            if key in artifact:
                shown[f"{name}: {key}"] = artifact[key]
        if "proof" in artifact:
            proof = artifact["proof"]
            shown[f"{name}: proof"] = (
                f"largest error {proof['relative']:.1e} of {proof['tolerance']:.1e} allowed"
            )
    methods = sorted({method for site in manifest["sites"] for method in site["methods"]})
    shown["sites"] = f"{len(manifest['sites'])} ({', '.join(methods)})"
    return shown | {"versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())}


def _quantized(config: Mapping[str, Any]) -> str:
    """The settings in a checkpoint's `quantization_config`: plain values that are set, by name."""
    settings = {key: value for key, value in config.items() if isinstance(value, (bool, int, str)) and value}
    return ", ".join(f"{key} {value}" for key, value in sorted(settings.items()) if not key.startswith("_"))


def _tensors(tensors: Mapping[str, Any]) -> str:
    return f"{len(tensors)}, {sum(weight.nbytes for weight in tensors.values()):,} bytes"


def _rows(pairs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"what": key, "value": value} for key, value in pairs.items()]


def _nothing(path: Path) -> SpecError:
    message = (
        "no such path" if not path.exists() else "no artifact, adapter or model there that adaptc can read"
    )
    return SpecError([Problem(message, file=str(path))])
