"""The commands `adaptc inspect`, what a path holds, and `adaptc verify`, whether an artifact is as it was compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptc.checkpoints import adapter as checkpoint
from adaptc.emit.manifest import MANIFEST, is_unmodified
from adaptc.errors import Problem, ProofError, SpecError
from adaptc.products.listing import from_metadata, listed
from adaptc.weights import read_safetensors, sha256_of_files

if TYPE_CHECKING:
    from adaptc.compiler.proof.runners import Runner

SHOWN = (
    *("adapters", "opset", "nodes", "class", "dtype", "inputs", "outputs", "checked"),
    *("batches", "context_length", "tokenizer", "generation", "generation_left_out"),
)
"""What is shown of a manifest's entry, besides its size and proof."""


def inspect(path: Path) -> list[dict[str, Any]]:
    """Describe an artifact, an adapter's checkpoint, or a model directory.

    Returns:
        Rows with the keys `what` and `value`.

    Raises:
        SpecError: the path holds none of these.
        WeightError: a file there is broken.
    """
    artifacts = listed(path) or from_metadata(path)
    if artifacts is not None:
        return _rows(_described(artifacts))
    together = checkpoint.saved_together(path).values()
    if together or (path.is_dir() and checkpoint.why_missing(path) is None):
        rows: list[dict[str, Any]] = []
        for folder in (folder for each in together or [path] for folder in checkpoint.directories(each)):
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
    folder = path if path.is_dir() else path.parent
    artifacts = listed(path)
    if artifacts is not None and not is_unmodified(folder / MANIFEST):
        raise ProofError(f"{folder / MANIFEST}: changed since it was written (its own SHA-256 differs)")
    artifacts = artifacts or from_metadata(path)
    if artifacts is None:
        raise _unlisted(path)
    rows: list[dict[str, Any]] = []
    for name, artifact in artifacts.items():
        for file, recorded in artifact["files"].items():
            if not (folder / file).is_file():
                raise ProofError(f"{folder / file}: missing, though {name} needs it")
            if sha256_of_files([folder / file]) != recorded["sha256"]:
                raise ProofError(f"{folder / file}: changed since it was compiled (its SHA-256 differs)")
            rows.append({"what": file, "checked": f"SHA-256 {recorded['sha256'][:12]}..."})
        if "sha256" in artifact:
            rows.append(
                {"what": name, "checked": f"SHA-256 {artifact['sha256'][:12]}..., without its provenance"}
            )
        try:
            rows.append({"what": name, "checked": _proved(folder, name, artifact)})
        except ProofError as error:
            raise ProofError(f"{folder / name}: {error}") from error
    return rows


def _proved(folder: Path, name: str, artifact: Mapping[str, Any]) -> str:
    """Compare an artifact's outputs with the recorded ones; of one that cannot run, check that its tensors are finite.

    Returns:
        What was checked, for the row.
    """
    from adaptc.compiler.proof.reference import proved_again

    if "reference" not in artifact:
        return _finite(folder, artifact)
    result = proved_again(artifact["reference"], _runner(folder, name, artifact))
    if artifact["format"] == "genai":
        from adaptc.compiler.artifacts.greedy_proof import generated_again

        result += f"; {generated_again(artifact['greedy'], folder)}"
    return result


def _runner(folder: Path, name: str, artifact: Mapping[str, Any]) -> Runner:
    from adaptc.compiler.proof.cached_runner import in_chunks
    from adaptc.compiler.proof.runners import BatchRunner, module_call
    from adaptc.emit.genai.files import PROGRAM
    from adaptc.emit.onnx.export import INLINE_LIMIT
    from adaptc.emit.onnx.partitioned import PartitionedProgram
    from adaptc.emit.onnx.runtime import onnx_runner
    from adaptc.emit.torch import load_torch

    match artifact["format"]:
        case "torch":
            return BatchRunner(module_call(load_torch(folder)))
        case "onnx" | "genai":
            file = folder / (PROGRAM if artifact["format"] == "genai" else name)
            large = sum(each["bytes"] for each in artifact["files"].values()) > INLINE_LIMIT
            runner = PartitionedProgram(file, file) if large else BatchRunner(onnx_runner(file))
            return in_chunks(file, runner)
        case _:
            from adaptc.emit.huggingface import load_checkpoint
            from adaptc.tracing.huggingface.model import read_pretrained

            base = artifact["provenance"]["spec"]["base"]
            stored = read_pretrained(str(folder), base["task"], base["trust_remote_code"], {})
            return BatchRunner(module_call(load_checkpoint(stored, folder)))


def _finite(folder: Path, artifact: Mapping[str, Any]) -> str:
    import torch

    from adaptc.emit.onnx.adapter_file import read_adapter

    for file in (folder / name for name in artifact["files"]):
        tensors: Mapping[str, torch.Tensor] = {}
        if file.suffix == ".onnx_adapter":
            tensors = read_adapter(file)
        elif file.suffix == ".safetensors":
            tensors = {key: weight.load() for key, weight in read_safetensors(file).items()}
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ProofError(f"{file}: {key} contains NaN or infinity (non-finite)")
    return "every tensor is finite"


def _unlisted(path: Path) -> SpecError:
    """The error for a path that neither a manifest nor its own metadata tells of."""
    if not path.exists():
        return _nothing(path)
    message = f"no {MANIFEST} there, so there is nothing to check against"
    if path.is_file() and (path.parent / MANIFEST).is_file():
        message = f"not among the artifacts in {MANIFEST} beside it"
    return SpecError([Problem(message, file=str(path))])


def _described(artifacts: Mapping[str, Any]) -> dict[str, Any]:
    """What artifacts are; what is true of all of them, such as their base, once."""
    shown: dict[str, Any] = {}
    for name, artifact in artifacts.items():
        size = sum(file["bytes"] for file in artifact["files"].values())
        shown[name] = f"{artifact['format']}, {size:,} bytes" if size else artifact["format"]
        for key in SHOWN:
            if key in artifact:
                shown[f"{name}: {key.replace('_', ' ')}"] = artifact[key]
        if "proof" in artifact:
            proof = artifact["proof"]
            shown[f"{name}: proof"] = (
                f"relative error {proof['relative']:.1e} of {proof['tolerance']:.1e} allowed"
            )
    origins = {name: _origin(artifact["provenance"]) for name, artifact in artifacts.items()}
    if all(origin == next(iter(origins.values())) for origin in origins.values()):
        return shown | next(iter(origins.values()))
    return shown | {
        f"{name}: {key}": value for name, origin in origins.items() for key, value in origin.items()
    }


def _origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What an artifact was compiled from, and by which versions."""
    methods = sorted({method for site in provenance["sites"] for method in site["methods"]})
    return {
        "base": provenance["base"]["model"],
        "base SHA-256": provenance["base"]["sha256"],
        "sites": f"{len(provenance['sites'])} ({', '.join(methods)})",
        "versions": ", ".join(f"{package} {version}" for package, version in provenance["versions"].items()),
    }


def _quantized(config: Mapping[str, object]) -> str:
    """The settings in a checkpoint's `quantization_config`: plain values that are set, by name."""
    settings = {key: value for key, value in config.items() if isinstance(value, (bool, int, str)) and value}
    return ", ".join(f"{key} {value}" for key, value in sorted(settings.items()) if not key.startswith("_"))


def _tensors(tensors: Mapping[str, Any]) -> str:
    return f"{len(tensors)}, {sum(weight.nbytes for weight in tensors.values()):,} bytes"


def _rows(pairs: Mapping[str, object]) -> list[dict[str, Any]]:
    return [{"what": key, "value": value} for key, value in pairs.items()]


def _nothing(path: Path) -> SpecError:
    message = (
        "no such path" if not path.exists() else "no artifact, adapter or model there that adaptc can read"
    )
    return SpecError([Problem(message, file=str(path))])
