"""The ONNX artifact: a graph written as an ONNX file, and that file proved against the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adaptc.compiler.program import Program
from adaptc.compiler.proof import Proof, effect
from adaptc.compiler.provenance import describe_base
from adaptc.compiler.reference import with_labels
from adaptc.compiler.runners import BatchRunner
from adaptc.emit.manifest import versions
from adaptc.emit.onnx.adapter_file import read_adapter
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import Wrote, export_onnx
from adaptc.emit.onnx.overridable import Dims
from adaptc.emit.onnx.partitioned import PartitionedProgram
from adaptc.emit.onnx.rounding import RoundActivations, rounds_activations
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.emit.staging import Staging
from adaptc.errors import ProofError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batches, Interpreter, Run
from adaptc.ir.near_ties import floats_behind_labels
from adaptc.ir.tie_breaks import makes_choice
from adaptc.rewriter.pipeline import run
from adaptc.spec.emit import OnnxEmit
from adaptc.weights import Weight


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written to a staging folder.

    Attributes:
        entry: the spec's entry that asks for it.
        path: where the file is.
        final: where it will be put.
        outputs: the names of its outputs.
        weights: the weights in the data file, to be read back; empty where the program holds them itself.
        unrounded: the graph that was written, where ONNX Runtime rounds activations of its matrix products; else None.
        about: what a manifest says of it: `nodes`, `opset`, `inputs`, `outputs`.
        session: of the file, where it holds its weights itself.
        exact: of a file of the same graph that does not round; None where this one does not.
        adapter: what replaces them in the runs of this object: tensors by name, or an `.onnx_adapter` file.
        name: what proofs call the file.
    """

    entry: OnnxEmit
    path: Path
    final: Path
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    unrounded: Graph | None
    about: Mapping[str, Any]
    session: Session
    exact: ExactSession | None
    name: str
    adapter: Mapping[str, torch.Tensor] | Path = field(default_factory=dict[str, torch.Tensor])

    @property
    def has_data_file(self) -> bool:
        """Whether the weights are in a data file beside the program."""
        return _data_file(self.path).exists()

    @property
    def partitioned(self) -> PartitionedProgram:
        """A runner of the file that holds the weights of a few operations at a time."""
        return PartitionedProgram(self.path, self.final, self._tensors)

    @property
    def _tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors that replace weights."""
        return read_adapter(self.adapter) if isinstance(self.adapter, Path) else self.adapter

    def on(self, batches: Batches) -> Run:
        """One run of every batch: in pieces where there is a data file."""
        if self.has_data_file:
            return self.partitioned.on(batches)
        return BatchRunner(session_call(self.session.opened, self.adapter)).on(batches)

    def unrounded_on(self, batches: Batches) -> Run:
        """One run of every batch, by a file of the same graph that does not round activations."""
        assert self.exact is not None
        return BatchRunner(session_call(self.exact.opened, self._tensors)).on(batches)

    def staged(self, staging: Staging) -> list[Path]:
        """The program, and its data file if it has one, which is moved to a staged path of its own."""
        if not self.has_data_file:
            return [self.path]
        return [self.path, _data_file(self.path).replace(staging.path(_data_file(self.final)))]


@dataclass
class Session:
    """A session of an ONNX file that is opened when it is first needed, and then again used.

    Attributes:
        path: the file.
        shown: the path that an error names.
        exact: do not round activations.
    """

    path: Path
    shown: Path
    exact: bool

    @cached_property
    def opened(self) -> Any:
        """The session."""
        return open_session(self.path, shown=self.shown, exact=self.exact)


@dataclass
class ExactSession:
    """A session of a file that is written when it is first needed: of the same graph, and it does not round.

    Attributes:
        graph: the graph.
        entry: the spec's entry that asks for the file that rounds.
        path: that file.
        overridable: the sizes of the weights that a call may replace.
    """

    graph: Graph
    entry: OnnxEmit
    path: Path
    overridable: Dims

    @cached_property
    def opened(self) -> Any:
        """The session."""
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            exact = Path(folder) / self.path.name
            options: Any = {"runtime": self.entry.target_runtime, "overridable": self.overridable}
            export_onnx(self.graph, exact, self.entry.opset, exact=True, **options)
            return open_session(exact, shown=self.path, exact=True)


def write_onnx(
    program: Program,
    graph: Graph,
    entry: OnnxEmit,
    path: Path,
    final: Path,
    wrote: Wrote | None = None,
    overridable: Dims | None = None,
    told: Mapping[str, str] | None = None,
) -> OnnxFile:
    """Write a graph of a program as an ONNX file, whose metadata says what it was made of.

    Args:
        program: the program.
        graph: the graph.
        entry: the spec's entry that asks for the file.
        path: where it is written.
        final: where it will be put.
        wrote: called while a data file is written.
        overridable: the sizes of the weights that a call may replace.
        told: metadata beside what every file has.

    Raises:
        RefusedError: an operation has no ONNX form.
        AdaptcError: the exporter fails, or the file cannot be written.
    """
    evaluated = evaluate(graph)
    unrounded = evaluated.copy() if entry.round_activations and rounds_activations(evaluated) else None
    metadata = {
        "adaptc.version": versions().get("adaptc", ""),
        "adaptc.base": describe_base(program, final.parent),
        "adaptc.base_sha256": program.base_sha256,
        "adaptc.adapters": entry.adapters,
        "adaptc.methods": ", ".join(p.insert.method.name for p in program.plan.entries),
    }
    metadata |= told or {}
    exact, runtime = not entry.round_activations, entry.target_runtime
    written = export_onnx(evaluated, path, entry.opset, metadata, wrote, runtime, exact, overridable)
    about = {
        "nodes": written.nodes,
        "opset": written.opset,
        "inputs": {spec.name: str(spec).replace("bfloat16", "float32") for spec in evaluated.inputs},
        "outputs": list(evaluated.outputs),
    }
    return OnnxFile(
        entry,
        path,
        final,
        evaluated.outputs,
        written.weights,
        unrounded,
        about,
        Session(path, final, exact),
        None if unrounded is None else ExactSession(unrounded.copy(), entry, path, overridable or {}),
        f"onnx, {entry.adapters}",
    )


def prove_onnx(
    program: Program, graph: Graph, earlier: Run | None, file: OnnxFile
) -> tuple[Proof, Run, Graph | None]:
    """Prove that an ONNX file computes what the graph does that it was written from.

    A file that rounds activations is proved in two steps. A second file of the same graph that does not round must
    meet the float tolerance. The file itself is compared with torch that rounds in the same way, and may differ by
    twice the error that rounding causes: a value halfway between two codes takes either, and downstream layers then
    round other values.

    Args:
        program: the program that the graph belongs to.
        graph: the graph.
        earlier: a run of the graph in float32, if there is one.
        file: the file.

    Returns:
        The proof; the run that the file was compared with, with the file's own labels; the graph that rounds
        activations as the file does, or None where the file rounds none.

    Raises:
        ProofError: it computes something else.
    """
    name = file.name
    reference, candidate = _side_by_side(program, graph, earlier, file)
    if file.unrounded is None:
        try:
            proof = program.proofs.prove(name, graph, reference, candidate)
        except ProofError:
            if reference.flipped or not _chooses_alike(graph, file):
                raise
            reference, candidate = _with_choices(program, graph, file)
            proof = program.proofs.prove(name, graph, reference, candidate)
        return proof, with_labels(reference, candidate), None
    program.proofs.prove(name, graph, reference, file.unrounded_on(reference.taken))
    rounding = run(file.unrounded, [RoundActivations()])
    rounded = Interpreter(rounding, torch.float32).on(reference.taken)
    behind = [floats_behind_labels(side, reference.taken, torch.float32) for side in (graph, rounding)]
    cost = max(effect(reference, rounded), effect(*behind))
    allowed = max(2 * cost, program.proofs.tolerance(graph))
    message = f"{name}, against torch that rounds activations to 8 bits too"
    proof = program.proofs.prove(message, rounding, rounded, candidate, allowed)
    return proof, with_labels(rounded, candidate), rounding


def _side_by_side(program: Program, graph: Graph, earlier: Run | None, file: OnnxFile) -> tuple[Run, Run]:
    """A run of a graph, with the outputs that its file has, and a run of the file.

    Where a graph of float16 or bfloat16 chooses, as a router among experts, it takes the choices of the file, which
    computes in float32.
    """
    if Interpreter(graph, torch.float32).widens and _chooses_alike(graph, file):
        return _with_choices(program, graph, file)
    reference = program.reference(graph, earlier, wide=True).only(file.outputs)
    return reference, file.on(reference.taken)


def _chooses_alike(graph: Graph, file: OnnxFile) -> bool:
    """Whether a graph chooses, as a router among experts, and its file has the same choices."""
    choices = sum(makes_choice(node) for node in graph.nodes)
    return choices > 0 and len(file.partitioned.choices) == choices


def _with_choices(program: Program, graph: Graph, file: OnnxFile) -> tuple[Run, Run]:
    """A run of a graph that takes the choices of its file between near equals, and the run of the file."""
    candidate = file.partitioned.on(program.proofs.batches)
    return program.proofs.run_like(candidate, graph).only(file.outputs), candidate


def _data_file(path: Path) -> Path:
    """The data file beside an ONNX program, which holds the weights where they are too many for one file."""
    return path.with_name(path.name + ".data")
