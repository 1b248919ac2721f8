"""The ONNX artifact: a graph written as an ONNX file, and that file proved against the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adaptc.compiler.cached_runner import SCHEDULES, CachedRunner, EncoderRunner, padded_left, where_seen
from adaptc.compiler.program import Program
from adaptc.compiler.proof import Proof, effect
from adaptc.compiler.provenance import describe_base
from adaptc.compiler.reference import with_labels
from adaptc.compiler.runners import BatchRunner, Runner
from adaptc.emit.manifest import versions
from adaptc.emit.onnx.adapter_file import read_adapter
from adaptc.emit.onnx.cached import ENCODER, NEW_TOKENS, encoder_beside, read_outputs, read_signature
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import Wrote, export_onnx
from adaptc.emit.onnx.functional import Functional
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
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.cross import Decoder, Encoder, crossed
from adaptc.rewriter.cache.inputs import new_tokens
from adaptc.rewriter.cache.signature import CacheSignature
from adaptc.rewriter.pipeline import run
from adaptc.spec.emit import OnnxEmit
from adaptc.weights import Weight

ROUNDED = "against torch that rounds activations to 8 bits too"
"""The title of a proof of a file that rounds activations."""


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written to a staging folder.

    Attributes:
        entry: the spec's entry that asks for it.
        path: where the file is.
        final: where it will be put.
        outputs: the names of its outputs.
        weights: the weights in the data file, to be read back; empty where the program holds them itself.
        large: whether the weights are too many to be in memory at once for a proof.
        unrounded: the graph, where ONNX Runtime rounds activations of its matrix products; else None.
        signature: what the program takes and gives, where it has a cache; else None.
        encoder: the file of an encoder whose keys and values the program takes; None where there is none.
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
    large: bool
    unrounded: Graph | None
    signature: CacheSignature | None
    encoder: Path | None
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

    @property
    def runner(self) -> Runner:
        """A runner of the file: in pieces where the weights are many."""
        return (
            self.partitioned if self.large else BatchRunner(session_call(self.session.opened, self.adapter))
        )

    @property
    def unrounded_runner(self) -> Runner:
        """A runner of a file of the same graph that does not round activations."""
        assert self.exact is not None
        return BatchRunner(session_call(self.exact.opened, self._tensors))

    @property
    def encoder_runner(self) -> EncoderRunner | None:
        """A runner of the encoder's file."""
        if self.encoder is None:
            return None
        large = PartitionedProgram(self.encoder, self.encoder, self._tensors)
        small = Session(self.encoder, self.encoder, not self.entry.round_activations)
        runner = large if self.large else BatchRunner(session_call(small.opened, self.adapter))
        return EncoderRunner(runner, read_outputs(self.encoder))

    @property
    def unrounded_encoder(self) -> EncoderRunner | None:
        """A runner of a file of the encoder that does not round activations."""
        if self.encoder is None:
            return None
        assert self.exact is not None
        runner = BatchRunner(session_call(self.exact.encoder, self._tensors))
        return EncoderRunner(runner, read_outputs(self.encoder))

    def on(self, batches: Batches) -> Run:
        """One run of every batch, in chunks where there is a cache."""
        if self.signature is None:
            return self.runner.on(batches)
        chunks = SCHEDULES["in chunks"]
        return CachedRunner(self.runner, self.signature, chunks, self.encoder_runner).on(batches)

    def staged(self, staging: Staging) -> list[Path]:
        """The program; its data file, its encoder and that one's data file are moved to staged paths of their own."""
        beside = [_data_file(self.path)]
        if self.encoder is not None:
            beside += [self.encoder, _data_file(self.encoder)]
        moved = [
            file.replace(staging.path(self.final.with_name(file.name))) for file in beside if file.exists()
        ]
        return [self.path, *moved]


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
        return self._written(0)

    @cached_property
    def encoder(self) -> Any:
        """The session of the encoder."""
        return self._written(1)

    def _written(self, number: int) -> Any:
        """A session of one of the entry's programs."""
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            exact, graph = Path(folder) / self.path.name, programs(self.graph.copy(), self.entry)[number]
            overridable = _read_by(graph, self.overridable)
            options: Any = {"runtime": self.entry.target_runtime, "overridable": overridable}
            export_onnx(graph, exact, self.entry.opset, exact=True, **options)
            return open_session(exact, shown=self.path, exact=True)


def write_onnx(
    program: Program,
    graph: Graph,
    entry: OnnxEmit,
    path: Path,
    final: Path,
    wrote: Wrote | None = None,
    beside: bool = False,
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
        beside: write the weights in a data file whatever their size is.
        overridable: the sizes of the weights that a call may replace.
        told: metadata beside what every file has.

    Raises:
        RefusedError: an operation has no ONNX form.
        AdaptcError: the exporter fails, or the file cannot be written.
    """
    evaluated = evaluate(graph)
    unrounded = evaluated.copy() if entry.round_activations and rounds_activations(evaluated) else None
    parts = programs(evaluated, entry)
    metadata = {
        "adaptc.version": versions().get("adaptc", ""),
        "adaptc.base": describe_base(program, final.parent),
        "adaptc.base_sha256": program.base_sha256,
        "adaptc.adapters": entry.adapters,
        "adaptc.methods": ", ".join(p.insert.method.name for p in program.plan.entries),
    }
    encoder = encoder_beside(path) if len(parts) > 1 else None
    if encoder is not None:
        metadata[ENCODER] = encoder.name
    if entry.cache:
        metadata[NEW_TOKENS] = new_tokens(parts[0])
    metadata |= told or {}
    exact, runtime = not entry.round_activations, entry.target_runtime
    files = [path] if encoder is None else [path, encoder]
    written, *others = [
        export_onnx(
            part, file, entry.opset, metadata, wrote, runtime, exact, beside, _read_by(part, overridable)
        )
        for part, file in zip(parts, files, strict=True)
    ]
    weights = {name: weight for each in (*others, written) for name, weight in each.weights.items()}
    about = {
        "nodes": written.nodes,
        "opset": written.opset,
        "inputs": {spec.name: str(spec).replace("bfloat16", "float32") for spec in parts[0].inputs},
        "outputs": list(parts[0].outputs),
    }
    signature = read_signature(path)
    outputs = evaluated.outputs if signature is None else tuple(signature.results)
    return OnnxFile(
        entry,
        path,
        final,
        outputs,
        weights,
        written.large,
        unrounded,
        signature,
        encoder,
        about,
        Session(path, final, exact),
        None if unrounded is None else ExactSession(unrounded.copy(), entry, path, overridable or {}),
        f"onnx, {entry.adapters}",
    )


def _read_by(graph: Graph, overridable: Dims | None) -> Dims:
    """Of the weights that a call may replace, those that a graph reads."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {name: dims for name, dims in (overridable or {}).items() if name in read}


def programs(graph: Graph, entry: OnnxEmit) -> list[Graph]:
    """The graphs of an entry's programs: its own first, then that of an encoder, where a decoder with a cache has one.

    Args:
        graph: it only evaluates.
        entry: says whether there is a cache.
    """
    if not entry.cache:
        return [graph]
    functional = run(graph, [Functional()])
    encoder = [run(functional, [Encoder()])] if crossed(functional) else []
    return [run(functional, [Decoder(), Cache()]), *encoder]


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
    if file.signature is not None:
        return prove_cached(program, graph, file)
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
    program.proofs.prove(name, graph, reference, file.unrounded_runner.on(reference.taken))
    rounding, rounded, allowed = _rounded(program, graph, reference, file.unrounded)
    proof = program.proofs.prove(f"{name}, {ROUNDED}", rounding, rounded, candidate, allowed)
    return proof, with_labels(rounded, candidate), rounding


def _rounded(program: Program, graph: Graph, reference: Run, unrounded: Graph) -> tuple[Graph, Run, float]:
    """The graph that rounds activations as its file does, its run, and the relative error that the file may have."""
    rounding = run(unrounded, [RoundActivations()])
    rounded = Interpreter(rounding, torch.float32).on(reference.taken)
    behind = [floats_behind_labels(side, reference.taken, torch.float32) for side in (graph, rounding)]
    cost = max(effect(reference, rounded), effect(*behind))
    return rounding, rounded, max(2 * cost, program.proofs.tolerance(graph))


def prove_cached(program: Program, graph: Graph, file: OnnxFile) -> tuple[Proof, Run, Graph | None]:
    """Prove that an ONNX file with a cache computes what the graph does, whatever part of a text each call gets.

    The file is fed the proof's inputs in several ways, see `SCHEDULES`, and rows padded on the left as well. It is
    proved as in `prove_onnx`; positions that a mask hides are not compared.

    Returns:
        As `prove_onnx` does.

    Raises:
        ProofError: it computes something else.
    """
    signature, name = file.signature, f"{file.name}, with a cache"
    assert signature is not None
    padded = {label: padded_left(signature, batch) for label, batch in program.proofs.batches.items()}
    left = {f"{label} padded on the left": batch for label, batch in padded.items() if batch is not None}
    run_of_graph = Interpreter(graph, torch.float32).on({**program.proofs.batches, **left})
    reference = run_of_graph.only(file.outputs)

    def proved(
        about: str,
        runners: tuple[Runner, EncoderRunner | None],
        side: Graph,
        expected: Run,
        allowed: float | None,
    ) -> tuple[Proof, Run]:
        proofs: list[tuple[Proof, Run]] = []
        for way, schedule in SCHEDULES.items():
            got = CachedRunner(runners[0], signature, schedule, runners[1]).on(expected.taken)
            got = where_seen(signature, expected, got)
            title = ", ".join(part for part in (name, way, about) if part)
            proofs.append((program.proofs.prove(title, side, expected, got, allowed), got))
        return max(proofs, key=lambda pair: pair[0].relative)

    written = file.runner, file.encoder_runner
    if file.unrounded is None:
        proof, got = proved("", written, graph, reference, None)
        return proof, with_labels(reference, got), None
    proved("", (file.unrounded_runner, file.unrounded_encoder), graph, reference, None)
    rounding, rounded, allowed = _rounded(program, graph, reference, file.unrounded)
    proof, got = proved(ROUNDED, written, rounding, rounded, allowed)
    return proof, with_labels(rounded, got), rounding


def _side_by_side(program: Program, graph: Graph, earlier: Run | None, file: OnnxFile) -> tuple[Run, Run]:
    """A run of a graph, with the outputs that its file has, and a run of the file.

    Where a graph of float16 or bfloat16 chooses, as a router among experts, it takes the choices of the file, which
    computes in float32.
    """
    if Interpreter(graph, torch.float32).widens and _chooses_alike(graph, file):
        return _with_choices(program, graph, file)
    reference = program.reference(graph, earlier, wide=True).only(file.outputs)
    return reference, file.runner.on(reference.taken)


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
