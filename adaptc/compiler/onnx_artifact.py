"""The ONNX artifact: a graph written as an ONNX file, and that file proved against the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptc.compiler.program import Program
from adaptc.compiler.proof import BatchRunner, Proof, prove, tolerance
from adaptc.emit.manifest import versions
from adaptc.emit.onnx.evaluate import inference_graph
from adaptc.emit.onnx.export import export_onnx
from adaptc.emit.onnx.partitioned import PartitionedProgram
from adaptc.emit.onnx.rounding import rounds_activations, with_rounding
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.emit.staging import Staging
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batches, Interpreter, Run
from adaptc.ir.tie_breaks import makes_choice
from adaptc.spec.emit import OnnxEmit
from adaptc.weights import Weight


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written to a staging folder.

    Attributes:
        entry: what the spec asks for.
        path: where the file is.
        final: where it will be put.
        outputs: the names of its outputs.
        weights: the weights in the file beside it, to be read back; none where it holds them itself.
        unrounded: the graph that was written, where ONNX Runtime rounds the activations of its products; else None.
        about: what a manifest says of it: `nodes`, `opset`, `inputs`, `outputs`.
    """

    entry: OnnxEmit
    path: Path
    final: Path
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    unrounded: Graph | None
    about: Mapping[str, Any]

    @property
    def is_in_two(self) -> bool:
        """Whether the weights stand in a file beside it."""
        return _beside(self.path).exists()

    @property
    def pieces(self) -> PartitionedProgram:
        """The file as a runner that holds the weights of a few operations at a time."""
        return PartitionedProgram(self.path, self.final)

    def on(self, batches: Batches) -> Run:
        """One run of every batch: in pieces, where the weights stand beside it."""
        if self.is_in_two:
            return self.pieces.on(batches)
        exact = not self.entry.round_activations
        return BatchRunner(onnx_runner(self.path, self.final, exact)).on(batches)

    def unrounded_on(self, batches: Batches) -> Run:
        """What a file of the same graph gives that rounds no activations."""
        assert self.unrounded is not None
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            exact = Path(folder) / self.path.name
            runtime = self.entry.target_runtime
            export_onnx(self.unrounded.copy(), exact, self.entry.opset, runtime=runtime, exact=True)
            return BatchRunner(onnx_runner(exact, self.path, exact=True)).on(batches)

    def staged(self, staging: Staging) -> list[Path]:
        """All its files, each where it is put in its place from."""
        if not self.is_in_two:
            return [self.path]
        return [self.path, _beside(self.path).replace(staging.path(_beside(self.final)))]


def write_onnx(program: Program, graph: Graph, entry: OnnxEmit, staging: Staging, final: Path) -> OnnxFile:
    """Write a graph of a program as an ONNX file that says what it was made of."""
    path = staging.path(final)
    evaluated = inference_graph(graph)
    unrounded = evaluated.copy() if entry.round_activations and rounds_activations(evaluated) else None
    metadata = {
        "adaptc.version": versions().get("adaptc", ""),
        "adaptc.base": program.base.source.describe,
        "adaptc.base_sha256": program.base_sha256,
        "adaptc.adapters": entry.adapters,
        "adaptc.methods": ", ".join(p.insert.method.name for p in program.plan.entries),
    }
    options = {"runtime": entry.target_runtime, "exact": not entry.round_activations}
    written = export_onnx(evaluated, path, entry.opset, metadata, staging.wrote, **options)
    about = {
        "nodes": written.nodes,
        "opset": written.opset,
        "inputs": {spec.name: str(spec).replace("bfloat16", "float32") for spec in evaluated.inputs},
        "outputs": list(evaluated.outputs),
    }
    return OnnxFile(entry, path, final, evaluated.outputs, written.weights, unrounded, about)


def prove_onnx(
    program: Program, graph: Graph, merged: Run | None, file: OnnxFile
) -> tuple[Proof, Run, Graph | None]:
    """An ONNX file computes what the graph does that it was written of.

    Where it rounds activations, a file that does not is held to the arithmetic of floats, and this one against torch
    that rounds as it should. It may be off by twice what rounding costs: a value at the edge of two codes takes
    either, and layers behind it round other values.

    Args:
        program: what the graph belongs to.
        graph: the graph.
        merged: what the graph gave already, if it has run.
        file: the file.

    Returns:
        The proof, what the file was held against, and the graph that rounds activations as it does, if it does.

    Raises:
        ProofError: it computes something else.
    """
    name = f"onnx, {file.entry.adapters}"
    reference, candidate = _side_by_side(program, graph, merged, file)
    if file.unrounded is None:
        return program.proofs.prove(name, graph, reference, candidate), reference, None
    program.proofs.prove(name, graph, reference, file.unrounded_on(reference.taken))
    rounding = with_rounding(file.unrounded)
    rounded = Interpreter(rounding, wide=True).on(reference.taken)
    cost = prove("", reference, rounded, float("inf")).relative
    allowed = max(2 * cost, tolerance(graph))
    message = f"{name}, against torch that rounds activations to 8 bits too"
    return program.proofs.prove(message, graph, rounded, candidate, allowed), rounded, rounding


def _side_by_side(program: Program, graph: Graph, merged: Run | None, file: OnnxFile) -> tuple[Run, Run]:
    """What a graph gives of the outputs that its file has, and what the file gives.

    Where a graph of float16 or bfloat16 chooses, as a router among experts, it makes the choices of the file, which
    computes in float32.
    """
    choices = sum(makes_choice(node) for node in graph.nodes)
    if choices and Interpreter(graph, wide=True).wide and len(file.pieces.choices) == choices:
        candidate = file.pieces.on(program.proofs.batches)
        return program.proofs.run_like(candidate, graph).only(file.outputs), candidate
    reference = program.reference(graph, merged, wide=True).only(file.outputs)
    return reference, file.on(reference.taken)


def _beside(path: Path) -> Path:
    """The file beside an ONNX program that holds its weights, where they are too many for one file."""
    return path.with_name(path.name + ".data")
