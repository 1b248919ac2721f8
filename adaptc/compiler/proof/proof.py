"""A proof: two runs on the same inputs, and the largest relative error held against a tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from adaptc.compiler.proof.differences import Difference, difference
from adaptc.compiler.proof.verdict import Verdict, judge
from adaptc.errors import ProofError, WeightError
from adaptc.html_table import html_table
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Run
from adaptc.weights import Held, seeded

EPSILONS = 512
"""Tolerated error relative to the largest output, in machine epsilons of a float32 or float64 dtype: 6.1e-05 for
float32. Few models reach it by rounding alone; a wrong rewrite is off by far more."""
HALF_EPSILONS = 8
"""Tolerated error in machine epsilons of float16 or bfloat16, whose matrix products are summed in float32. Chosen as
a few roundings of the output."""
ADVICE = "name a file of inputs that the model takes: `proof: {inputs: rows.jsonl}` in the spec"


def check_weights(graph: Graph) -> None:
    """Check that every weight of a graph is finite, where a proof has failed or an output is NaN.

    Raises:
        WeightError: names the first that is not.
    """
    for name in [name for name in graph.weights if name not in graph.buffers]:
        if not torch.isfinite(graph.weights[name].load()).all():
            raise WeightError(f"{name} contains NaN or infinity (non-finite)", "load an intact checkpoint")


def tolerance(graph: Graph) -> float:
    """The tolerated relative error: `EPSILONS` or `HALF_EPSILONS` of the narrowest dtype of the parameters."""
    parameters = [w for name, w in graph.weights.items() if name not in graph.buffers]
    kinds = [w.dtype for w in parameters if w.dtype.is_floating_point] or [torch.float32]
    epsilon = max(torch.finfo(kind).eps for kind in kinds)
    return EPSILONS * epsilon if epsilon < 1e-6 else HALF_EPSILONS * epsilon


@dataclass(frozen=True)
class Proof:
    """The result of a comparison.

    Attributes:
        name: what is proved.
        absolute: the largest difference over all outputs and inputs.
        relative: the difference over the largest reference value of its output, where it is nearest to what is allowed.
        tolerance: the relative error that was allowed there.
        shapes: the labels of the batches that were compared.
        coverage: how the sides held their weights, where memory held only a part of them; else "".
        rounding: the model's own rounding, where it was measured since the dtype's tolerance was exceeded.
        notes: what else must be told, such as labels that differ between near ties.
        skipped: the label of each batch that the model does not take -> why.
        uncompared: (the label of a batch, the position of an output), for each that is NaN or lost in rounding.
        errors: output -> label of a batch -> the relative error there, where it was compared.
    """

    name: str
    absolute: float
    relative: float
    tolerance: float
    shapes: tuple[str, ...]
    coverage: str = ""
    rounding: float | None = None
    notes: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    uncompared: tuple[tuple[str, int], ...] = ()
    errors: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    def __str__(self) -> str:
        measured = "" if self.rounding is None else f" (the model's own rounding is {self.rounding:.1e})"
        held = f"{self.name}: relative error {self.relative:.1e} of {self.tolerance:.1e} allowed{measured}"
        return "; ".join([f"{held}, on {', '.join(self.shapes)}", *self.notes])

    def _repr_html_(self) -> str:
        """The proof in a notebook: the error of each output on each size of inputs."""
        rows = [
            (output, *(f"{errors[label]:.1e}" if label in errors else "" for label in self.shapes))
            for output, errors in self.errors.items()
        ]
        return html_table(str(self), ("output", *self.shapes), rows)


def prove(
    name: str,
    reference: Run,
    candidate: Run,
    allowed: float,
    graph: Graph | None = None,
    measured: bool = True,
) -> Proof:
    """Compare two runs on the batches that the reference takes.

    Args:
        name: what is proved.
        reference: the run with the expected outputs.
        candidate: the other run, of at least the batches that the reference takes.
        allowed: the relative error tolerated.
        graph: what the reference computes: labels may differ where its floats nearly tie, and where an error is larger
            than allowed, its own rounding is measured, and the reference is its run in float64. Neither without it.
        measured: False if `allowed` holds whatever the rounding is.

    Returns:
        The proof, which held.

    Raises:
        ProofError: the runs differ by more than that, or one is not finite where the other is; or an output is
            undefined or lost in rounding on all inputs; or the reference runs on none of them.
    """
    if not reference.taken:
        reason = next(iter(reference.outcomes.values()))
        raise ProofError(f"{name}: the model runs on none of the proof's inputs: {reason}")
    verdicts = judge(name, reference, candidate, allowed, graph, measured)
    names = reference.outputs or tuple(graph.tensor_outputs if graph is not None else ())
    titles = {v.output: names[v.output] if v.output < len(names) else f"output {v.output}" for v in verdicts}
    proof = _proof(name, reference, candidate, verdicts, titles)
    for output, title in titles.items():
        _check_judged(proof, title, [v for v in verdicts if v.output == output])
    for verdict in verdicts:
        if verdict.difference.unequal > verdict.ties:
            count = verdict.difference.unequal - verdict.ties
            differ = _differing(count, titles[verdict.output])
            raise ProofError(
                f"the proof failed: {name}: {differ}, and not between near ties, on {verdict.batch}"
            )
    if not all(verdict.holds for verdict in verdicts):
        raise ProofError(f"the proof failed: {proof}")
    return proof


def _proof(
    name: str,
    reference: Run,
    candidate: Run,
    verdicts: Sequence[Verdict],
    titles: Mapping[int, str],
) -> Proof:
    """The proof that some verdicts make, whether it held or not."""
    compared = [verdict for verdict in verdicts if not verdict.noise]
    worst = max(compared or verdicts, key=lambda verdict: verdict.share)
    coverage = ", ".join(dict.fromkeys(side.coverage for side in (candidate, reference) if side.coverage))
    return Proof(
        name,
        max(verdict.difference.absolute for verdict in compared or verdicts),
        worst.difference.relative,
        worst.allowed,
        tuple(reference.taken),
        coverage,
        worst.rounding,
        tuple(dict.fromkeys((*candidate.notes, *reference.notes, *_notes(verdicts, titles)))),
        {name: str(error) for name, error in reference.outcomes.items() if isinstance(error, Exception)},
        tuple((verdict.batch, verdict.output) for verdict in verdicts if not verdict.judged),
        {
            title: {v.batch: v.difference.relative for v in verdicts if v.output == output and v.judged}
            for output, title in titles.items()
        },
    )


def _notes(verdicts: Sequence[Verdict], titles: Mapping[int, str]) -> list[str]:
    """What a proof must tell beside its error: what was not compared, and why, and labels of near ties."""
    notes: list[str] = []
    for output, title in titles.items():
        of_output = [verdict for verdict in verdicts if verdict.output == output]
        undefined = ", ".join(verdict.batch for verdict in of_output if verdict.difference.undefined)
        noise = ", ".join(verdict.batch for verdict in of_output if verdict.noise)
        ties = sum(verdict.ties for verdict in of_output)
        notes += [f"{title} is NaN on {undefined}, and not compared there"] if undefined else []
        notes += [f"{title} is lost in rounding on {noise}, and not compared there"] if noise else []
        notes += [f"{_differing(ties, title)} between near ties"] if ties else []
    return notes


def _differing(count: int, title: str) -> str:
    """So many labels of an output differ, in words."""
    return f"{count} label of {title} differs" if count == 1 else f"{count} labels of {title} differ"


def _check_judged(proof: Proof, title: str, verdicts: Sequence[Verdict]) -> None:
    """Check that an output was compared on one batch.

    Raises:
        ProofError: it was not.
    """
    if any(verdict.judged or not verdict.holds for verdict in verdicts):
        return
    inputs = f"on any of the proof's inputs: {', '.join(proof.shapes)}"
    if all(verdict.difference.undefined for verdict in verdicts):
        raise ProofError(f"{proof.name}: the model gives no finite value for {title} {inputs}; {ADVICE}")
    rounding = min(verdict.rounding or 0.0 for verdict in verdicts if verdict.noise)
    reason = f"{title} is lost in the model's own rounding, {rounding:.1e} of its largest value"
    raise ProofError(f"{proof.name}: {reason}, {inputs}; {ADVICE}")


def randomised(graph: Graph, seed: int = 0, strength: float = 1.0) -> Graph:
    """A copy of the graph with noise added to every inserted parameter, so that no zero hides a mistake.

    The noise has a tenth of the parameter's spread, plus 0.02 for parameters that start at zero: chosen to change the
    outputs visibly and leave them of their usual size. `strength` multiplies it.
    """
    copied = graph.copy()
    for name in copied.adapter_names:
        value = copied.weights[name].load().float()
        noise = torch.randn(value.shape, generator=seeded(seed, name))
        spread = value.std() if value.numel() > 1 and value.std() > 0 else value.abs().mean()
        noisy = value + strength * (0.1 * spread + 0.02) * noise
        copied.weights[name] = Held(noisy.to(copied.weights[name].dtype))
    return copied


def effect(reference: Run, candidate: Run) -> float:
    """The largest relative difference of two runs, on the batches that both took; 0 where they share none."""
    return max((apart.relative for apart in _apart(reference, candidate)), default=0.0)


def labels_differ(reference: Run, candidate: Run) -> bool:
    """Whether two runs differ in a label, on the batches that both took."""
    return any(apart.unequal for apart in _apart(reference, candidate))


def _apart(reference: Run, candidate: Run) -> Iterator[Difference]:
    """The difference of each output of two runs, on the batches that both took."""
    for name in reference.taken.keys() & candidate.taken.keys():
        expected, got = reference.outcomes[name], candidate.outcomes[name]
        assert not isinstance(expected, Exception)
        assert not isinstance(got, Exception)
        yield from map(difference, expected, got)
