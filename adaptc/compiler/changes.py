"""Whether a user's pass changes results: measured against the graph before it, and refused if not declared."""

from __future__ import annotations

from math import inf

import torch

from adaptc.compiler.proof.inputs import batches
from adaptc.compiler.proof.proof import effect, prove, randomised, tolerance
from adaptc.errors import ProofError, Refusal, RefusedError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run
from adaptc.rewriter.pipeline import Compare, Pass, run


def comparison(seed: int = 0) -> Compare:
    """Make the function that runs a graph before and after a pass, and measures how far the outputs differ.

    It runs both on the inputs of a proof, with random adapters.

    Args:
        seed: the seed of random inputs and adapters.
    """

    def compare(item: Pass, before: Graph) -> str:
        """By how much the pass changes results, in words; "" where rounding explains the difference.

        Raises:
            RefusedError: it changes them without declaring `changes_results`.
        """
        change = _change(item, randomised(before, seed), seed)
        if change and not item.changes_results:
            advice = (
                f"write `changes_results: ClassVar[bool] = True` in {type(item).__name__} if it is meant to; "
                "see the graph before and after it with `--dump-graphs DIR`"
            )
            refusal = Refusal(f"{item.name} changes what the model computes: {change}", notes=(advice,))
            raise RefusedError([refusal], item)
        return change

    return compare


def _change(item: Pass, before: Graph, seed: int) -> str:
    """By how much a pass changes the outputs of a graph, in words; "" where rounding explains the difference."""
    allowed = tolerance(before)
    reference = Interpreter(before, torch.float32).on(batches(before, seed))
    rewritten = Interpreter(run(before, [item]), torch.float32)
    candidate = rewritten.on(reference.taken, follows=reference, near=allowed)
    try:
        prove(item.name, reference, candidate, allowed, before)
    except ProofError as error:
        change = effect(reference, candidate)
        if change == inf and _shapes(reference) == _shapes(candidate):
            return "outputs are not finite where they were, or of another dtype"
        if allowed < change < inf:
            return f"outputs differ by up to {change:.1e} of the largest, and rounding explains {allowed:.1e}"
        return str(error).removeprefix("the proof failed: ").removeprefix(f"{item.name}: ")
    return ""


def _shapes(run: Run) -> dict[str, list[torch.Size]]:
    """The shapes of a run's outputs, by the name of the batch."""
    return {
        name: [output.shape for output in values]
        for name, values in run.outcomes.items()
        if isinstance(values, list)
    }
