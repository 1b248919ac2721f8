"""Every product of a compile: staged, proved from its files, and put in place together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from adaptc import adapters, checkpoint
from adaptc.choices import chooses
from adaptc.compiled import Compiled, tensors_of
from adaptc.emit.huggingface import LOADED_SHARE, fits, load_checkpoint, save_checkpoint
from adaptc.emit.inference import inference_graph
from adaptc.emit.manifest import MANIFEST, versions, write_manifest
from adaptc.emit.onnx import export_onnx, onnx_runner
from adaptc.emit.peft import save
from adaptc.emit.pieces import Pieces
from adaptc.emit.places import places
from adaptc.emit.reference import recorded
from adaptc.emit.rounding import rounds, with_rounding
from adaptc.emit.staging import Staging
from adaptc.emit.torch import META, PROGRAM, load_torch, save_torch
from adaptc.errors import ProofError, RefusedError
from adaptc.graph import Graph
from adaptc.layer_errors import QuantizationErrors
from adaptc.orders import bits_in_checkpoint
from adaptc.plan import site_json
from adaptc.proof import Each, Proof, Runner, prove, runner, tolerance
from adaptc.spec import dump, load
from adaptc.streaming import Batch, Outcome, Streamed
from adaptc.variants import bare_graph


class Observer(Protocol):
    """Told of what happens while products are written."""

    def writing(self, what: str) -> None:
        """A product is being made."""

    def wrote(self, done: int, total: int) -> None:
        """So many bytes of a product are written, of so many."""

    def measured(self, errors: QuantizationErrors) -> None:
        """What quantization costs a product."""

    def proved(self, proof: Proof) -> None:
        """A proof held."""


def emit_all(
    compiled: Compiled, entries: Sequence[Any], observe: Observer | None = None, into: Path | None = None
) -> list[Path]:
    """Write the products of a spec's `emit` entries; all are in place afterwards, or none.

    Args:
        compiled: the compiled model.
        entries: validated entries.
        observe: told of each product, its bytes and proofs.
        into: a directory that replaces the spec's own folder.
    """
    paths = places(compiled.spec, entries, into)
    with Staging(observe.wrote if observe else None) as staging:
        for entry, final in zip(entries, paths, strict=True):
            if observe:
                observe.writing(f"{entry.format} {final}")
            known, before = list(compiled.proofs), compiled.errors
            WRITERS[entry.format](compiled, entry, staging, final)
            if observe and compiled.errors is not None and compiled.errors is not before:
                observe.measured(compiled.errors)
            for proof in compiled.proofs:
                if observe and not any(proof is other for other in known):
                    observe.proved(proof)
    return paths


def emit_one(compiled: Compiled, entry: Mapping[str, Any]) -> None:
    """Write one product, from an entry as a spec would hold it."""
    path = Path(entry["path"]).absolute()
    checked = load({"emit": [{**entry, "path": str(path)}]})
    places(checked, checked.emit)
    emit_all(compiled, checked.emit)


def _torch(compiled: Compiled, entry: Any, staging: Staging, final: Path) -> None:
    if compiled.graph.adapter_names:
        compiled.check_gradients()
    directory = staging.path(final)
    module = compiled.module
    compiled.reset()
    save_torch(module, directory)
    about = module.meta[META]
    common = _common(compiled)
    manifest = directory / MANIFEST
    write_manifest(
        manifest, common, {"name": PROGRAM, "format": "torch", "module": about}, [directory / PROGRAM]
    )
    reference = Each(runner(module))
    proof = compiled.prove("torch artifact", compiled.graph, reference, Each(runner(load_torch(directory))))
    product = {"name": PROGRAM, "format": "torch", "module": about, **_proved(compiled, proof, reference)}
    product |= _errors(compiled, "live")
    write_manifest(manifest, common, product, [directory / PROGRAM])


def _onnx(compiled: Compiled, entry: Any, staging: Staging, final: Path) -> None:
    path = staging.path(final)
    product: dict[str, Any] = {
        "name": final.name,
        "format": "onnx",
        "adapters": entry.adapters,
    }
    metadata = {
        "adaptc.version": versions().get("adaptc", ""),
        "adaptc.base": compiled.base.base.describe,
        "adaptc.base_sha256": compiled.base_sha256,
        "adaptc.adapters": entry.adapters,
        "adaptc.methods": ", ".join(p.insert.method.name for p in compiled.plan.entries),
    }

    def write(graph: Graph) -> None:
        evaluated = inference_graph(graph)
        if entry.round_activations and rounds(evaluated):
            twin.append(evaluated.copy())
        options = {"runtime": entry.target_runtime, "exact": not entry.round_activations}
        written = export_onnx(evaluated, path, entry.opset, metadata, staging.wrote, **options)
        product.update(
            nodes=written.nodes,
            opset=written.opset,
            inputs={spec.name: str(spec).replace("bfloat16", "float32") for spec in evaluated.inputs},
            outputs=list(evaluated.outputs),
        )
        if entry.adapters == "folded":
            product["rounding"] = compiled.rounding(graph.weights)
            product["operations"] = {"base": len(compiled.base.operations), "folded": len(graph.operations)}
        graph.weights.update({n: w for n, w in written.weights.items() if n in graph.weights})

    twin: list[Graph] = []
    if entry.adapters == "folded":
        graph = compiled.folded_graph(keep=write)
    else:
        compiled.check_finite()
        graph = compiled.compact_graph() if entry.adapters == "live" else bare_graph(compiled)
        write(graph)
    beside = path.with_name(path.name + ".data")
    pieces = Pieces(path, final)
    exact = not entry.round_activations
    program: Runner = pieces if beside.exists() else Each(onnx_runner(path, final, exact))
    run = compiled.streamed(graph, wide=True)
    choices = sum(chooses(node) for node in graph.nodes)
    if run.wide and choices and len(pieces.choices) == choices:
        program, run = pieces, compiled.held_against(pieces, graph)
    reference, name = Kept(run, product["outputs"]), f"onnx, {entry.adapters}"
    rounding = with_rounding(twin[0]) if twin else None
    if rounding is not None:
        proof, reference = _prove_rounded(compiled, name, twin[0], rounding, path, entry, reference, program)
    else:
        proof = compiled.prove(name, graph, reference, program)
    product |= _proved(compiled, proof, reference) | _errors(compiled, entry.adapters, rounding)
    files = [path]
    if beside.exists():
        files.append(beside.replace(staging.path(final.with_name(beside.name))))
    _manifest_beside(compiled, staging, final, product, files)


def _prove_rounded(
    compiled: Compiled,
    name: str,
    evaluated: Graph,
    rounded: Graph,
    path: Path,
    entry: Any,
    reference: Runner,
    program: Runner,
) -> tuple[Proof, Runner]:
    """Prove a program that rounds activations: by one that does not, and against torch that rounds as it should.

    The first is held to the arithmetic of floats. The second may be off by twice what rounding costs: a value at the
    edge of two codes takes either, and layers behind it round other values.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        exact = Path(folder) / path.name
        export_onnx(evaluated.copy(), exact, entry.opset, runtime=entry.target_runtime, exact=True)
        compiled.prove(name, evaluated, reference, Each(onnx_runner(exact, path, exact=True)))
    rounding = Streamed(rounded, wide=True)
    cost = prove("", evaluated.inputs, reference, rounding, float("inf"), compiled.spec.seed).relative
    allowed = max(2 * cost, tolerance(evaluated))
    words = f"{name}, against torch that rounds activations to 8 bits too"
    return compiled.prove(words, evaluated, rounding, program, allowed), rounding


@dataclass(frozen=True)
class Kept:
    """A graph's runner that gives only the outputs that the program has."""

    run: Streamed
    outputs: Sequence[str]

    @property
    def coverage(self) -> Sequence[str]:
        """As the graph's."""
        return self.run.coverage

    def __call__(self, batches: Sequence[Batch]) -> list[Outcome]:
        """The outcome of every batch."""
        kept = [self.run.graph.tensors.index(name) for name in self.outputs]
        return [o if isinstance(o, Exception) else [o[index] for index in kept] for o in self.run(batches)]


def _peft(compiled: Compiled, entry: Any, staging: Staging, final: Path) -> None:
    directory = staging.path(final)
    records, values = adapters.compacted(adapters.records_of(compiled.graph), tensors_of(compiled))
    heads = {name: compiled.base.weights[name].load() for record in records for name in record.heads}
    save(records, heads | values, directory, compiled.origin)
    for path, members in zip(checkpoint.directories(directory), adapters.group(records), strict=True):
        for name, value in adapters.assign(checkpoint.read(path), members).items():
            if not torch.equal(value, values[name].to("cpu", value.dtype)):
                raise ProofError(f"{name} was not read back as it was written")
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    write_manifest(directory / MANIFEST, _common(compiled), {"name": "adapter", "format": "peft"}, files)


def _huggingface(compiled: Compiled, entry: Any, staging: Staging, final: Path) -> None:
    directory = staging.path(final)
    product: dict[str, Any] = {"name": "checkpoint", "format": "hf"}

    def write(graph: Graph) -> None:
        weights = dict(graph.weights)
        product.update(save_checkpoint(graph, compiled.base, directory, entry.max_shard_size))
        product["rounding"] = compiled.rounding(weights)

    bits = bits_in_checkpoint(compiled.graph, compiled.plan.closing)
    if bits:
        raise RefusedError([bits])
    graph = compiled.folded_graph(keep=write, floats=True)
    product |= _errors(compiled, "folded")
    if fits(graph):
        origin = compiled.base.base.pretrained
        assert origin is not None
        loaded = load_checkpoint(origin.auto, origin.trust_remote_code, directory)
        reference = compiled.streamed(graph)
        proof = compiled.prove("hf", graph, reference, Each(runner(loaded)))
        product |= _proved(compiled, proof, reference)
    else:
        product["checked"] = (
            f"read back tensor by tensor; not loaded, since it is over 1/{LOADED_SHARE} of memory"
        )
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    write_manifest(directory / MANIFEST, _common(compiled), product, files)


def _proved(compiled: Compiled, proof: Proof, reference: Runner) -> dict[str, Any]:
    """A product's proof, and what it takes to prove it again."""
    kept = recorded(reference, compiled.base.inputs, compiled.spec.seed, proof.tolerance)
    return {"proof": asdict(proof), "reference": kept}


def _errors(compiled: Compiled, adapters: str, rounding: Graph | None = None) -> dict[str, Any]:
    """What quantization costs a product, where anything is quantized."""
    errors = compiled.quantization_errors(adapters, rounding)
    return {"quantization": errors.to_json()} if errors else {}


WRITERS: dict[str, Callable[[Compiled, Any, Staging, Path], None]] = {
    "torch": _torch,
    "onnx": _onnx,
    "peft": _peft,
    "hf": _huggingface,
}


def _manifest_beside(
    compiled: Compiled, staging: Staging, final: Path, product: dict[str, Any], files: list[Path]
) -> None:
    place = final.parent / MANIFEST
    earlier = staging.staged(place)
    write_manifest(staging.path(place), _common(compiled), product, files, old=earlier or place)


def _common(compiled: Compiled) -> dict[str, Any]:
    base = compiled.base.base
    what = {}
    for planned in compiled.plan.entries:
        for site in planned.selection.sites:
            what.setdefault(site.parameter or str(site), site_json(site) | {"methods": []})["methods"].append(
                planned.insert.method.name
            )
    return {
        "versions": versions(),
        "spec": dump(compiled.spec),
        "base": {"model": base.describe, "sha256": compiled.base_sha256, "notes": base.notes},
        "adapters": [
            {"path": str(path), "sha256": found.sha256}
            for path, found in {
                p.checkpoint.path: p.checkpoint for p in compiled.plan.entries if p.checkpoint
            }.items()
        ],
        "sites": list(what.values()),
        "passes": [asdict(record) for record in compiled.records],
        "proofs": [asdict(proof) for proof in compiled.proofs],
    }
