"""The ONNX artifact: a graph written as an ONNX file, and that file proved against the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.compiler.cached_runner import SCHEDULES, CachedRunner, shown, takes, where_seen
from adaptc.compiler.program import Program
from adaptc.compiler.proof import Proof, effect
from adaptc.compiler.provenance import describe_base
from adaptc.compiler.reference import with_labels
from adaptc.compiler.runners import BatchRunner, Runner
from adaptc.emit.manifest import versions
from adaptc.emit.onnx.attention_forms import with_attention
from adaptc.emit.onnx.cached import COUNTED, NEW_TOKENS, read_signature
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import export_onnx
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.norms import NormsOfSums, RootMeanSquareNorms
from adaptc.emit.onnx.partitioned import PartitionedProgram
from adaptc.emit.onnx.rounding import RoundActivations, rounds_activations
from adaptc.emit.onnx.runtime import buffer_runner, onnx_runner
from adaptc.emit.staging import Staging
from adaptc.errors import ProofError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batches, Interpreter, Run
from adaptc.ir.near_ties import floats_behind_labels
from adaptc.ir.tie_breaks import makes_choice
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.signature import CacheSignature, new_tokens
from adaptc.rewriter.pipeline import Pass, run
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
        unrounded: the graph, where ONNX Runtime rounds activations of its matrix products; else None.
        signature: what the program takes and gives, where it has a cache; else None.
        about: what a manifest says of it: `nodes`, `opset`, `inputs`, `outputs`.
    """

    entry: OnnxEmit
    path: Path
    final: Path
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    unrounded: Graph | None
    signature: CacheSignature | None
    about: Mapping[str, Any]

    @property
    def has_data_file(self) -> bool:
        """Whether the weights are in a data file beside the program."""
        return _data_file(self.path).exists()

    @property
    def partitioned(self) -> PartitionedProgram:
        """A runner of the file that holds the weights of a few operations at a time."""
        return PartitionedProgram(self.path, self.final)

    @property
    def runner(self) -> Runner:
        """A runner of the file: in pieces where there is a data file."""
        exact = not self.entry.round_activations
        return (
            self.partitioned if self.has_data_file else BatchRunner(onnx_runner(self.path, self.final, exact))
        )

    @property
    def keeps_buffers(self) -> bool:
        """Whether it can keep all keys and values in one buffer, and the program is one file."""
        counts = dict(self.about.get("attention", {}))
        others = [counts.get(form) for form in ("standard", "plain")]
        return bool(counts.get("gqa")) and not any(others) and not self.has_data_file

    @contextmanager
    def unrounded_runner(self) -> Generator[Runner]:
        """A runner of a file of the same graph that does not round activations."""
        assert self.unrounded is not None
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            exact = Path(folder) / self.path.name
            graph, runtime = lowered(self.unrounded.copy(), self.entry), self.entry.target_runtime
            export_onnx(graph, exact, self.entry.opset, runtime=runtime, exact=True)
            yield BatchRunner(onnx_runner(exact, self.path, exact=True))

    def staged(self, staging: Staging) -> list[Path]:
        """The program, and its data file if it has one, which is moved to a staged path of its own."""
        if not self.has_data_file:
            return [self.path]
        return [self.path, _data_file(self.path).replace(staging.path(_data_file(self.final)))]


def write_onnx(program: Program, graph: Graph, entry: OnnxEmit, staging: Staging, final: Path) -> OnnxFile:
    """Write a graph of a program as an ONNX file, whose metadata says what it was made of.

    Raises:
        RefusedError: an operation has no ONNX form.
        AdaptcError: the exporter fails, or the file cannot be written.
    """
    path = staging.path(final)
    evaluated = evaluate(graph)
    unrounded = evaluated.copy() if entry.round_activations and rounds_activations(evaluated) else None
    outputs = evaluated.outputs
    evaluated, attentions = with_attention(_cached(evaluated, entry), entry.attention_form, entry.opset)
    metadata = {
        "adaptc.version": versions().get("adaptc", ""),
        "adaptc.base": describe_base(program, final.parent),
        "adaptc.base_sha256": program.base_sha256,
        "adaptc.adapters": entry.adapters,
        "adaptc.methods": ", ".join(p.insert.method.name for p in program.plan.entries),
    }
    if entry.cache:
        metadata[NEW_TOKENS] = new_tokens(evaluated)
    if attentions.get("gqa"):
        metadata[COUNTED] = "right"
    exact = not entry.round_activations
    written = export_onnx(evaluated, path, entry.opset, metadata, staging.wrote, entry.target_runtime, exact)
    about: dict[str, Any] = {
        "nodes": written.nodes,
        "opset": written.opset,
        "inputs": {spec.name: str(spec).replace("bfloat16", "float32") for spec in evaluated.inputs},
        "outputs": list(evaluated.outputs),
    }
    if attentions:
        about["attention"] = attentions
    return OnnxFile(entry, path, final, outputs, written.weights, unrounded, read_signature(path), about)


def lowered(graph: Graph, entry: OnnxEmit) -> Graph:
    """A graph that only evaluates, as an entry asks for it: with a cache or without, and its attention's form."""
    return with_attention(_cached(graph, entry), entry.attention_form, entry.opset)[0]


def _cached(graph: Graph, entry: OnnxEmit) -> Graph:
    if not entry.cache:
        return graph
    for_runtime = entry.target_runtime == "onnxruntime"
    norms: list[Pass] = [RootMeanSquareNorms(), NormsOfSums()] if for_runtime else []
    return run(graph, [Functional(), Cache(), *norms])


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
    name = f"onnx, {file.entry.adapters}"
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
    with file.unrounded_runner() as unrounded:
        program.proofs.prove(name, graph, reference, unrounded.on(reference.taken))
    rounding, rounded, allowed = _rounded(program, graph, reference, file.unrounded)
    proof = program.proofs.prove(f"{name}, {ROUNDED}", rounding, rounded, candidate, allowed)
    return proof, with_labels(rounded, candidate), rounding


def _rounded(program: Program, graph: Graph, reference: Run, unrounded: Graph) -> tuple[Graph, Run, float]:
    """The graph that rounds activations as its file does, its run, and the relative error that is allowed to the file."""
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
    signature, name = file.signature, f"onnx, {file.entry.adapters}, with a cache"
    assert signature is not None
    run_of_graph = Interpreter(graph, torch.float32).on(shown(signature, program.proofs.batches))
    reference = run_of_graph.only(file.outputs)

    def proved(
        about: str, runner: Runner, side: Graph, expected: Run, allowed: float | None
    ) -> tuple[Proof, Run]:
        ways = {way: CachedRunner(runner, signature, schedule) for way, schedule in SCHEDULES.items()}
        if file.keeps_buffers and (file.unrounded is None or about):  # it is the file itself that is run
            in_buffers = BatchRunner(buffer_runner(file.path, file.final))
            ways["in one buffer"] = CachedRunner(in_buffers, signature, SCHEDULES["token by token"], True)
        worst: list[tuple[Proof, Run]] = []
        for way, fed in ways.items():
            fits = {label for label, batch in expected.taken.items() if takes(signature, fed.schedule, batch)}
            part = expected.among(fits)
            got = where_seen(signature, part, fed.on(part.taken))
            title = ", ".join(word for word in (name, way, about) if word)
            worst.append((program.proofs.prove(title, side, part, got, allowed), got))
        return max(worst, key=lambda pair: pair[0].relative)

    if file.unrounded is None:
        proof, got = proved("", file.runner, graph, reference, None)
        return proof, with_labels(reference.among(got.outcomes), got), None
    with file.unrounded_runner() as unrounded:
        proved("", unrounded, graph, reference, None)
    rounding, rounded, allowed = _rounded(program, graph, reference, file.unrounded)
    proof, got = proved(ROUNDED, file.runner, rounding, rounded, allowed)
    return proof, with_labels(rounded.among(got.outcomes), got), rounding


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
