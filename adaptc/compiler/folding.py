"""The folded graph: the adapters' changes are in the weights, and a proof says so."""

from __future__ import annotations

from dataclasses import dataclass

from adaptc.compiler.plan.schedule import folds_into_bits, lower, lowering
from adaptc.compiler.program import Program
from adaptc.compiler.proof.proofs import check_finite
from adaptc.errors import ProofError, Refusal, RefusedError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Run
from adaptc.rewriter.pipeline import PASSES, run

RANDOM = "fold, random adapters"
"""The proof that no zero in an untrained adapter hides a mistake."""


@dataclass(frozen=True)
class FoldedGraphs:
    """The adapted graph with the adapters' changes in its weights.

    Attributes:
        folded: right after the pass that folds.
        quantized: after the spec's passes that follow `fold`; None where there are none.
        written: the graph of an artifact: `quantized` as it runs, or `folded` itself.
    """

    folded: Graph
    quantized: Graph | None
    written: Graph


def fold(program: Program, floats: bool = False) -> FoldedGraphs:
    """Fold the adapters as they stand into the weights; `prove_fold` proves the result.

    Args:
        program: the compiled program.
        floats: dequantize what is still in bits.

    Raises:
        RefusedError: a weight cannot be folded into, or the spec's own passes leave nothing to fold.
        ProofError: an adapter is not finite, or the folded graph has other operations than the base.
    """
    adapted, closing = program.graph, program.plan.closing
    check_finite(adapted)
    refusal = None if closing else folds_into_bits(adapted)
    if refusal:
        raise RefusedError([refusal])
    folded = _folded(program, adapted, record=True, floats=floats)
    if folded.adaptations and folded.stage != "folded":
        reason = (
            f"`passes` leaves a graph that is {adapted.stage}, which cannot be folded; leave `factor` out"
        )
        raise RefusedError([Refusal(reason)])
    whole = not folded.adaptations and not any(a.stays for a in adapted.adaptations)
    plain = program.spec.passes is None and not adapted.quantized
    if plain and whole and folded.operations != program.base.operations:
        raise ProofError("the folded graph has other operations than the base")
    if not closing[1:]:
        return FoldedGraphs(folded, None, folded)
    quantized = run(folded, closing[1:], program.records, program.after)
    return FoldedGraphs(folded, quantized, lower(quantized))


def fold_always_on(program: Program) -> Graph:
    """The adapted graph with what is always on folded in, as passes take it: its quantized products are not lowered.

    Raises:
        RefusedError: a weight cannot be folded into.
    """
    adapted, closing = program.graph, program.plan.closing
    if not adapted.adaptations:
        return adapted.copy()
    refusal = None if closing else folds_into_bits(adapted)
    if refusal:
        raise RefusedError([refusal])
    return run(adapted, closing or [PASSES["fold"]()])


def prove_fold(program: Program, graphs: FoldedGraphs) -> Run | None:
    """The folded graph computes what the live one does, with the adapters as they stand.

    Where these change the outputs too little to be seen, it is proved with random adapters too. Nothing is proved
    where there are no adapters and other passes follow.

    Returns:
        What the folded graph gave, where it is the graph that is written; else None.

    Raises:
        ProofError: it computes something else.
    """
    adapted, proofs = program.graph, program.proofs
    if graphs.quantized is not None and not adapted.adaptations:
        return None
    graph = program.live_graph()
    live = proofs.run(graph)
    folded = proofs.run_like(live, graphs.folded)
    proof = proofs.prove("fold", graph, live, folded)
    if adapted.adaptations and not proofs.has(RANDOM) and not proofs.shows(live, proof.tolerance):
        proofs.with_random_adapters(
            RANDOM, adapted, lambda random: (program.live_graph(random), _folded(program, random))
        )
    return folded if graphs.written is graphs.folded else None


def _folded(program: Program, graph: Graph, record: bool = False, floats: bool = False) -> Graph:
    """A graph folded as the spec's own passes do it; a graph at a stage that cannot be folded is copied as it runs."""
    closing = program.plan.closing
    fold_pass = closing[0] if closing else PASSES["fold"]()
    if graph.stage not in fold_pass.takes:
        return lower(graph) if graph.quantized else graph.copy()
    first = record and not any(done.name == fold_pass.name for done in program.records)
    records, after = (program.records, program.after) if first else (None, None)
    folded = run(graph, [fold_pass], records, after)
    if not folded.quantized or closing[1:]:
        return folded
    return run(folded, [PASSES["dequantize"]()] if floats else lowering(folded))
