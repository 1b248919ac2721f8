"""What is said of each output of two runs, on each batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

import torch

from adaptc.compiler.proof.differences import Difference, difference
from adaptc.compiler.proof.own_rounding import OwnRounding
from adaptc.errors import ProofError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Run
from adaptc.ir.near_ties import near_ties

ROUNDINGS = 8
"""How many times the model's own rounding two right computations may be apart. Chosen above the 5 that deep models
with strong adapters were seen to reach. What makes rounding large makes faults as large, so none passes."""
CEILING, HIGHEST = 160, 0.125
"""No rounding allows more than so many times what the dtype does, 0.01 of the largest value in float32, nor more than
this. Where a model's own rounding is larger than that, nothing can be said of the output."""


@dataclass(frozen=True)
class Verdict:
    """What is said of one output on one batch.

    Attributes:
        batch: the label of the batch.
        output: the position of the output.
        difference: how far it is from the reference.
        allowed: the relative error that is allowed.
        rounding: the model's own rounding; None where it was not measured.
        noise: the output is lost in rounding, so that nothing can be said.
        ties: how many labels differ between near ties.
    """

    batch: str
    output: int
    difference: Difference
    allowed: float
    rounding: float | None = None
    noise: bool = False
    ties: int = 0

    @property
    def judged(self) -> bool:
        """Whether the whole output was compared."""
        return not (self.noise or self.difference.undefined)

    @property
    def holds(self) -> bool:
        """Whether the output is what it must be, as far as it was compared."""
        near = self.noise or self.difference.relative <= self.allowed
        return near and self.difference.unequal == self.ties

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        return 0.0 if self.noise else self.difference.relative / self.allowed


def judge(
    name: str, reference: Run, candidate: Run, allowed: float, graph: Graph | None, measured: bool
) -> list[Verdict]:
    """Compare every output on every batch that the reference takes; the arguments are those of `prove`.

    Raises:
        ProofError: the candidate does not run, or gives other outputs.
    """
    rounding = OwnRounding(graph, reference, allowed) if graph is not None and measured else None
    verdicts: list[Verdict] = []
    for batch in reference.taken:
        for output, (a, b) in enumerate(_outputs(name, reference, candidate, batch)):
            verdict = Verdict(batch, output, difference(a, b), allowed)
            if verdict.difference.unequal and graph is not None:
                verdict = _with_ties(verdict, graph, reference, b)
            if rounding is not None and not verdict.difference.relative <= allowed:
                verdict = _beside_float64(verdict, rounding, a, b)
            verdicts.append(verdict)
    return verdicts


def _with_ties(verdict: Verdict, graph: Graph, reference: Run, got: torch.Tensor) -> Verdict:
    """A verdict that knows how many labels differ between near ties."""
    batch, output = verdict.batch, verdict.output
    outcome = reference.outcomes[batch]
    assert not isinstance(outcome, Exception)
    expected = outcome[output]
    position = graph.tensor_outputs.index(reference.outputs[output]) if reference.outputs else output
    given = (expected, got)
    tied = near_ties(graph, reference.batches[batch], position, given, verdict.allowed, torch.float32)
    return replace(verdict, ties=int((tied & (expected != got)).sum()))


def _beside_float64(
    verdict: Verdict, rounding: OwnRounding, expected: torch.Tensor, got: torch.Tensor
) -> Verdict:
    """A verdict whose reference is the model in float64, and which allows for the model's own rounding.

    The reference itself must be as near to the model in float64; else it is another model's, and stays the reference.
    """
    own_rounding = rounding.of(verdict.batch, verdict.output)
    wide = rounding.wide.outcomes[verdict.batch]
    if isinstance(wide, Exception) or own_rounding is None or not isfinite(own_rounding):
        return verdict
    ceiling = max(verdict.allowed, min(CEILING * verdict.allowed, HIGHEST))
    allowed = max(verdict.allowed, min(ROUNDINGS * own_rounding, ceiling))
    compared, same = (difference(wide[verdict.output], side) for side in (got, expected))
    furthest = max(compared.relative, same.relative)
    noise = own_rounding > ceiling and allowed < furthest <= ROUNDINGS * own_rounding
    if not noise and same.relative > allowed:
        return verdict
    return replace(verdict, difference=compared, allowed=allowed, rounding=own_rounding, noise=noise)


def _outputs(
    name: str, reference: Run, candidate: Run, batch: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The expected outputs of a batch, each with the other side's.

    Raises:
        ProofError: the other side does not run, or gives other outputs.
    """
    expected, got = reference.outcomes[batch], candidate.outcomes[batch]
    assert not isinstance(expected, Exception)
    if isinstance(got, Exception):
        raise ProofError(f"{name}: it does not run ({batch}): {got}") from got
    if len(expected) != len(got):
        raise ProofError(f"{name}: {len(expected)} outputs became {len(got)}")
    for output, (a, b) in enumerate(zip(expected, got, strict=True)):
        if a.shape != b.shape:
            raise ProofError(
                f"{name}: output {output} is {list(b.shape)}, expected {list(a.shape)} ({batch})"
            )
    return list(zip(expected, got, strict=True))
