"""The artifacts of a compile: written to a staging folder, proved from their files, and put in place together."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import fx

from adaptc.checkpoints.compaction import compacted
from adaptc.checkpoints.graph_records import records_of
from adaptc.checkpoints.module_adapters import save_and_read
from adaptc.checkpoints.records import AdapterRecord
from adaptc.compiler.alternatives.swap import Swap
from adaptc.compiler.artifacts.genai import write_genai
from adaptc.compiler.artifacts.onnx import Destination
from adaptc.compiler.artifacts.output_paths import output_paths
from adaptc.compiler.artifacts.program import errors_of, losses, proved, write_program
from adaptc.compiler.artifacts.provenance import provenance, without_times
from adaptc.compiler.artifacts.rows import write_rows
from adaptc.compiler.artifacts.swap import prove_adapter, write_swap, write_swap_program
from adaptc.compiler.folding import fold, prove_fold
from adaptc.compiler.plan.schedule import bits_in_checkpoint
from adaptc.compiler.program import Program
from adaptc.compiler.proof.proof import Proof
from adaptc.compiler.proof.proofs import check_gradients
from adaptc.compiler.proof.quantization_error import QuantizationErrors
from adaptc.compiler.proof.reference import with_labels
from adaptc.compiler.proof.runners import BatchRunner, module_call
from adaptc.compiler.trainable import reset_derived
from adaptc.emit.huggingface import LOADED_SHARE, fits_in_memory, load_checkpoint, save_checkpoint
from adaptc.emit.manifest import MANIFEST, product_entry, write_manifest
from adaptc.emit.onnx.adapter_file import write_adapter
from adaptc.emit.onnx.provenance import embed
from adaptc.emit.staging import Staging
from adaptc.emit.torch import PROGRAM, ROWS, load_torch, program_of, rows_of, save_torch
from adaptc.errors import AdaptcError, RefusedError
from adaptc.ir.conversion import META
from adaptc.ir.interpreter import Run
from adaptc.ir.switched import SwitchedModule
from adaptc.progress.steps import Writing
from adaptc.spec.emit import EmitEntry, GenaiEmit, HfEmit, OnnxAdapterEmit, OnnxEmit, PeftEmit, TorchEmit
from adaptc.tracing.constants import with_constants
from adaptc.tracing.huggingface.module import pretrained

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """One artifact that was written.

    Attributes:
        path: its file or folder.
        errors: what quantization costs it; None where nothing is quantized.
        notes: what a person must know who uses it.
        warnings: what another library does not read as it was written.
    """

    path: Path
    errors: QuantizationErrors | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Observer(Protocol):
    """Called while artifacts are written and proved."""

    def writing(self, what: str) -> None:
        """Called before an artifact is made, with its format and path."""

    def measured(self, errors: QuantizationErrors) -> None:
        """Called with what quantization costs an artifact."""

    def proved(self, proof: Proof) -> None:
        """Called with each new proof that held."""

    def noted(self, note: str) -> None:
        """Called with what a person must know who uses an artifact."""


class Records:
    """An observer that makes a record of each at level INFO."""

    def writing(self, what: str) -> None:
        """Record the format and path of an artifact."""
        LOG.info("writing %s", what)

    def measured(self, errors: QuantizationErrors) -> None:
        """Record what quantization costs the outputs."""
        LOG.info("relative error of quantization: %s", dict(errors.outputs))

    def proved(self, proof: Proof) -> None:
        """Record a proof that held."""
        LOG.info("proved %s", proof)

    def noted(self, note: str) -> None:
        """Record what a person must know."""
        LOG.info("note: %s", note)


RECORDS = Records()


def emit_all(
    program: Program, entries: Sequence[EmitEntry], observe: Observer = RECORDS, into: Path | None = None
) -> list[Artifact]:
    """Write the artifacts of a spec's `emit` entries; all are in place afterwards, or none.

    Args:
        program: the compiled program.
        entries: validated entries.
        observe: called with each artifact and its proofs.
        into: a directory that replaces the spec's own folder.

    Returns:
        The artifacts, in the order of the entries.

    Raises:
        SpecError: a path would replace something that adaptc did not write.
        AdaptcError: an artifact cannot be made or written, or its proof failed.
    """
    paths = output_paths(program.spec, entries, into)
    artifacts: list[Artifact] = []
    with Staging(Writing(LOG)) as staging:
        adapters = {
            final: entry
            for entry, final in zip(entries, paths, strict=True)
            if isinstance(entry, OnnxAdapterEmit)
        }
        for entry, final in zip(entries, paths, strict=True):
            if final in adapters:
                artifacts.append(Artifact(final))
                continue
            observe.writing(f"{entry.format} {final}")
            before = list(program.proofs.held)
            artifact = WRITERS[entry.format](program, entry, staging, final)
            artifacts.append(artifact)
            if artifact.errors is not None:
                observe.measured(artifact.errors)
            for proof in program.proofs.held:
                if not any(proof is other for other in before):
                    observe.proved(proof)
            for note in (*artifact.notes, *artifact.warnings):
                observe.noted(note)
        if adapters:
            _onnx_adapters(program, adapters, staging, observe)
    return artifacts


def _torch(program: Program, entry: TorchEmit, staging: Staging, final: Path) -> Artifact:
    if program.graph.adapter_names:
        check_gradients(program.trainable_graph())
    directory = staging.path(final)
    module = program.module
    reset_derived(program.graph, module)
    save_torch(module, directory)
    manifest, common = directory / MANIFEST, provenance(program, final)
    files = [directory / PROGRAM, *(directory / program_of(name) for name in program.alternatives)]
    artifact: dict[str, Any] = {"name": PROGRAM, "format": "torch", "module": module.meta[META]}
    if isinstance(module, SwitchedModule):
        artifact["module"] = module.meta_of(None)[META]
        artifact["alternatives"] = {name: module.meta_of(name)[META] for name in module.adapters}
        rows = rows_of(module)
        if rows is not None:
            artifact["rows"] = rows.record
            files.append(directory / ROWS)
    write_manifest(manifest, common, artifact, files)  # what is loaded below needs one

    proof, reference, candidate = _prove_torch(program, module, load_torch(directory))

    errors = program.quantization_errors()
    write_manifest(
        manifest,
        common,
        artifact | proved(program, proof, with_labels(reference, candidate)) | errors_of(errors),
        files,
    )
    return Artifact(final, errors)


def _prove_torch(program: Program, module: fx.GraphModule, loaded: fx.GraphModule) -> tuple[Proof, Run, Run]:
    """Prove that a loaded module computes what the module does that it was written from, with each alternative.

    Returns:
        The proof without an alternative, and its two runs.

    Raises:
        ProofError: it computes something else.
    """
    if isinstance(module, SwitchedModule) and isinstance(loaded, SwitchedModule):
        active = module.active
        for name in module.adapters:
            module.set_adapter(name)
            loaded.set_adapter(name)
            runs = BatchRunner(module_call(module)).on(program.proofs.batches)
            graph, again = program.alternatives[name].graph, BatchRunner(module_call(loaded)).on(runs.taken)
            program.proofs.prove(f"torch artifact, {name}", graph, runs, again)
        module.set_adapter(None)
        loaded.set_adapter(None)
        if rows_of(module) is not None:
            rows = program.by_row()
            runs = BatchRunner(module_call(module)).on(rows.proofs.batches)
            again = BatchRunner(module_call(loaded)).on(runs.taken)
            program.proofs.keep(rows.proofs.prove("torch artifact, rows", rows.graph, runs, again))
    else:
        active = None
    reference = BatchRunner(module_call(module)).on(program.proofs.batches)
    candidate = BatchRunner(module_call(loaded)).on(reference.taken)
    proof = program.proofs.prove("torch artifact", program.graph, reference, candidate)
    if isinstance(module, SwitchedModule):
        module.set_adapter(active)
    return proof, reference, candidate


def _onnx(program: Program, entry: OnnxEmit, staging: Staging, final: Path) -> Artifact:
    if entry.adapters == "rows":
        return _onnx_rows(program, entry, staging, final)
    write = write_swap_program if entry.adapters == "swap" else write_program
    written = write(program, entry, Destination(staging.path(final), final, staging.wrote))
    file, artifact = written.file, {"name": final.name, "format": "onnx", **written.about}
    _record_file(program, file.path, file.staged(staging), artifact, staging, final)
    return Artifact(final, written.errors)


def _record_file(
    program: Program, path: Path, files: list[Path], artifact: dict[str, Any], staging: Staging, final: Path
) -> None:
    """Write what a manifest says of an ONNX program into the program itself, and into the manifest beside it."""
    common = provenance(program, final.parent)
    embed(path, product_entry(without_times(common), artifact, files[1:]))
    manifest = final.parent / MANIFEST
    earlier = staging.staged(manifest)
    write_manifest(staging.path(manifest), common, artifact, files, old=earlier or manifest)


def _onnx_rows(program: Program, entry: OnnxEmit, staging: Staging, final: Path) -> Artifact:
    file, about = write_rows(program, entry, Destination(staging.path(final), final, staging.wrote))
    artifact = {"name": final.name, "format": "onnx", **about}
    _record_file(program, file.path, file.staged(staging), artifact, staging, final)
    return Artifact(final)


def _onnx_adapters(
    program: Program, entries: Mapping[Path, OnnxAdapterEmit], staging: Staging, observe: Observer
) -> None:
    """Write several adapters, and prove each from its file, in one program that is written for that alone."""
    swap, paths = Swap(program), {final: staging.path(final) for final in entries}
    with tempfile.TemporaryDirectory(dir=next(iter(paths.values())).parent) as folder:
        exact = OnnxEmit.model_validate(
            {"format": "onnx", "path": "base.onnx", "adapters": "swap", "round_activations": False}
        )
        base = Path(folder) / exact.path
        file = write_swap(swap, exact, Destination(base, base))
        for final, entry in entries.items():
            observe.writing(f"{entry.format} {final}")
            tensors = swap.tensors(entry.name)
            write_adapter(paths[final], tensors, program.base_sha256)
            proof = prove_adapter(swap, file, entry.name, tensors, paths[final]).proof
            observe.proved(proof)
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            artifact = {
                "name": final.name,
                "format": "onnx-adapter",
                "adapter": entry.name,
                "tensors": shapes,
            }
            common, manifest = provenance(program, final.parent), final.parent / MANIFEST
            old = staging.staged(manifest) or manifest
            artifact |= {"proof": asdict(proof)}
            write_manifest(staging.path(manifest), common, artifact, [paths[final]], old=old)


def _genai(program: Program, entry: GenaiEmit, staging: Staging, final: Path) -> Artifact:
    directory = staging.path(final)
    served = write_genai(program, entry, directory, final, staging.wrote)
    written, common = served.written, provenance(program, final)
    artifact = {"name": "genai", "format": "genai", **written.about, **served.about}
    others = [file for file in _files_in(directory) if file != written.file.path]
    embed(written.file.path, product_entry(without_times(common), artifact, others, directory))
    write_manifest(directory / MANIFEST, common, artifact, _files_in(directory))
    return Artifact(final, written.errors, served.notes)


def _peft(program: Program, entry: PeftEmit, staging: Staging, final: Path) -> Artifact:
    """What is always on in the folder itself, and each alternative in a folder of its name below it."""
    directory, notes = staging.path(final), list[str]()
    if program.graph.adaptations or not program.alternatives:
        notes += _save_checkpoint(program, records_of(program.graph), directory)
    for name, alternative in program.alternatives.items():
        if (directory / name).exists():
            message = (
                f"{final}: {name!r} is also the folder of an adapter that is always on; rename one of them"
            )
            raise AdaptcError(message)
        added = [
            record for record in records_of(alternative.graph) if record.entry >= len(program.spec.adapt)
        ]
        notes += _save_checkpoint(alternative, added, directory / name)
    notes = list(dict.fromkeys(notes))
    artifact = {"name": "adapter", "format": "peft", **({"notes": notes} if notes else {})}
    write_manifest(directory / MANIFEST, provenance(program, final), artifact, _files_in(directory))
    return Artifact(final, warnings=tuple(notes))


def _save_checkpoint(program: Program, inserted: Sequence[AdapterRecord], directory: Path) -> list[str]:
    """Save adapters as checkpoints, and read them back.

    Returns:
        What PEFT leaves out of them.

    Raises:
        ProofError: a tensor is not read back as it was written.
    """
    records, values = compacted(inserted, program.tensors())
    heads = {name: program.base.weights[name].load() for record in records for name in record.heads}
    model = pretrained(program.base.source.model)
    return save_and_read(records, heads | values, directory, program.base_record, model)


def _huggingface(program: Program, entry: HfEmit, staging: Staging, final: Path) -> Artifact:
    refusal = bits_in_checkpoint(program.graph, program.plan.closing)
    if refusal:
        raise RefusedError([refusal])
    directory = staging.path(final)
    graphs = fold(program, floats=True)
    graph, weights = graphs.written, dict(graphs.written.weights)

    about = save_checkpoint(graph, program.base, directory, entry.max_shard_size)
    artifact = {"name": "checkpoint", "format": "hf", **about, "rounding": losses(weights)}

    folded = prove_fold(program, graphs)  # of the weights that were written
    errors = program.quantization_errors(graphs.quantized)
    artifact |= errors_of(errors)
    if fits_in_memory(graph):
        source = program.base.source
        assert source.pretrained is not None
        loaded = with_constants(load_checkpoint(source.pretrained, directory), source.constants)
        reference = program.reference(graph, folded)
        candidate = BatchRunner(module_call(loaded)).on(reference.taken)
        proof = program.proofs.prove("hf", graph, reference, candidate)
        artifact |= proved(program, proof, with_labels(reference, candidate))
    else:
        artifact["checked"] = (
            f"read back tensor by tensor; not loaded, since it is over 1/{LOADED_SHARE} of memory"
        )
    write_manifest(directory / MANIFEST, provenance(program, final), artifact, _files_in(directory))
    return Artifact(final, errors)


WRITERS: dict[str, Callable[[Program, Any, Staging, Path], Artifact]] = {
    "torch": _torch,
    "onnx": _onnx,
    "genai": _genai,
    "peft": _peft,
    "hf": _huggingface,
}
"""Format -> the function that writes an artifact of it and proves it."""


def _files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
