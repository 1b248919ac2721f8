"""An ONNX file proved against the graph that it was written from."""

from __future__ import annotations

import torch

from adaptc.compiler.artifacts.onnx_file import OnnxFile
from adaptc.compiler.program import Program
from adaptc.compiler.proof.cached_runner import (
    SCHEDULES,
    CachedRunner,
    EncoderRunner,
    shown,
    takes,
    where_seen,
    without_hidden,
)
from adaptc.compiler.proof.proof import Proof, effect
from adaptc.compiler.proof.reference import with_labels
from adaptc.compiler.proof.runners import BatchRunner, Runner
from adaptc.emit.onnx.rounding import RoundActivations
from adaptc.emit.onnx.runtime import buffer_runner
from adaptc.errors import ProofError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run
from adaptc.ir.near_ties import floats_behind_labels
from adaptc.ir.tie_breaks import makes_choice
from adaptc.rewriter.pipeline import run

ROUNDED = "against torch that rounds activations to 8 bits too"
"""The title of a proof of a file that rounds activations."""
Runners = tuple[Runner, EncoderRunner | None]
"""What runs a program, and its encoder."""


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
    run_of_graph = Interpreter(graph, torch.float32).on(shown(signature, program.proofs.batches))
    reference = run_of_graph.only(file.outputs)

    def proved(
        about: str, runners: Runners, side: Graph, expected: Run, allowed: float | None
    ) -> tuple[Proof, Run]:
        ways = {
            way: CachedRunner(runners[0], signature, schedule, runners[1])
            for way, schedule in SCHEDULES.items()
        }
        if file.keeps_buffers and (file.unrounded is None or about):  # it is the file itself that is run
            in_buffers = BatchRunner(buffer_runner(file.path, file.final))
            one_by_one = SCHEDULES["token by token"]
            ways["in one buffer"] = CachedRunner(in_buffers, signature, one_by_one, buffers=True)
        proofs: list[tuple[Proof, Run]] = []
        for way, fed in ways.items():
            fits = {label for label, batch in expected.taken.items() if takes(signature, fed.schedule, batch)}
            part = expected.among(fits)
            got = where_seen(signature, part, fed.on(part.taken))
            title = ", ".join(word for word in (name, way, about) if word)
            proofs.append((program.proofs.prove(title, side, part, got, allowed), got))
        return max(proofs, key=lambda pair: pair[0].relative)

    written = file.runner, file.encoder_runner
    if file.unrounded is None:
        proof, got = proved("", written, graph, reference, None)
        return proof, without_hidden(signature, with_labels(reference.among(got.outcomes), got)), None
    proved("", (file.unrounded_runner, file.unrounded_encoder), graph, reference, None)
    rounding, rounded, allowed = _rounded(program, graph, reference, file.unrounded)
    rounded = rounded.only(file.outputs)
    proof, got = proved(ROUNDED, written, rounding, rounded, allowed)
    return proof, without_hidden(signature, with_labels(rounded.among(got.outcomes), got)), rounding


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
