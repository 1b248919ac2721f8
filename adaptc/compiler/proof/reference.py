"""Reference values of an artifact: a few of its outputs, kept in the manifest, which prove it again later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import torch

from adaptc.compiler.proof.differences import LEAST, is_label, scale
from adaptc.compiler.proof.inputs import Draw, draws
from adaptc.compiler.proof.proof import Proof
from adaptc.compiler.proof.proofs import Proofs
from adaptc.compiler.proof.runners import Runner
from adaptc.errors import ProofError
from adaptc.inputs import InputSpec
from adaptc.ir.interpreter import Batch, Batches, Run

SAMPLES = 64
"""How many values of each output the manifest keeps, evenly spaced."""
KEPT = 4096
"""How many numbers of a person's own inputs a manifest keeps at most, where a model takes no random ones."""


def with_labels(reference: Run, candidate: Run) -> Run:
    """A run with the numbers of the reference and the labels of the candidate, which may differ between near ties."""
    outcomes = dict(reference.outcomes)
    for name in reference.taken:
        expected, got = reference.outcomes[name], candidate.outcomes[name]
        if not isinstance(expected, Exception) and not isinstance(got, Exception):
            outcomes[name] = [b if is_label(a) else a for a, b in zip(expected, got, strict=True)]
    return replace(reference, outcomes=outcomes)


def recorded(reference: Run, proofs: Proofs, proof: Proof) -> dict[str, Any]:
    """The reference values of a run, as plain data for the manifest.

    They are of random inputs, which can be drawn again. A person's own inputs are kept only where a model takes no
    random ones, and where they are at most `KEPT` numbers.

    Args:
        reference: the run that the artifact was proved against.
        proofs: have the inputs.
        proof: the proof, whose tolerance a later check allows.

    Returns:
        `inputs`, `draws`, `own`, `tolerance`, and `values`: the label of each batch -> for each output its `shape`, its
        `largest` value and a sample of its `values`, or None where it was not compared.
    """
    taken = reference.taken
    random = {label: asdict(draw) for label, draw in proofs.drawn.items() if label in taken}
    examples = (
        {} if random else _written({label: taken[label] for label in proofs.base.examples if label in taken})
    )
    return {
        "inputs": [spec.to_json() for spec in proofs.base.inputs],
        "draws": random,
        "own": examples,
        "tolerance": proof.tolerance,
        "values": {
            label: [
                None if (label, index) in proof.uncompared else _sample(output)
                for index, output in enumerate(outcome)
            ]
            for label, outcome in reference.outcomes.items()
            if not isinstance(outcome, Exception) and label in {*random, *examples}
        },
    }


def _written(examples: Batches) -> dict[str, dict[str, Any]]:
    """A person's own inputs as plain data, as many whole batches as may be kept."""
    written: dict[str, dict[str, Any]] = {}
    left = KEPT
    for label, batch in examples.items():
        left -= sum(tensor.numel() for tensor in batch.values())
        if left >= 0:
            written[label] = {name: cast(Any, tensor).tolist() for name, tensor in batch.items()}
    return written


def proved_again(reference: Mapping[str, Any], candidate: Runner) -> str:
    """Compare an artifact with its reference values.

    Args:
        reference: what `recorded` gave when the artifact was written.
        candidate: runs the artifact.

    Returns:
        The result in words.

    Raises:
        ProofError: it gives other values, or does not run.
    """
    inputs = _inputs_again(reference)
    if not inputs:
        return "not run: it was proved on a person's own inputs alone, of which the manifest keeps none"
    run = candidate.on(inputs)
    worst = 0.0
    for label, outcome in run.outcomes.items():
        if isinstance(outcome, Exception):
            raise ProofError(f"it does not run ({label}): {outcome}") from outcome
        expected = reference["values"][label]
        if len(outcome) != len(expected):
            raise ProofError(f"it gives {len(outcome)} outputs, its graph gave {len(expected)} ({label})")
        for index, (output, sample) in enumerate(zip(outcome, expected, strict=True)):
            if sample is not None:
                worst = max(worst, _error(output, sample, f"output {index}, {label}"))
    error = f"relative error {worst:.1e} of {reference['tolerance']:.1e} allowed"
    if not worst <= reference["tolerance"]:
        raise ProofError(f"it no longer computes what its graph did: {error}")
    return f"computes what its graph did: {error}, on {', '.join(run.batches)}"


def _inputs_again(reference: Mapping[str, Any]) -> dict[str, Batch]:
    """The inputs of the values that a manifest keeps, by label."""
    inputs = [InputSpec.from_json(spec) for spec in reference["inputs"]]
    if "draws" in reference:
        drawn = {label: Draw(**draw) for label, draw in reference["draws"].items()}
    else:  # of versions that kept only the seed
        drawn = draws(inputs, reference["seed"])
    again = {label: draw.batch(inputs) for label, draw in drawn.items() if label in reference["values"]}
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in inputs}
    for label, batch in reference.get("own", {}).items():
        again[label] = {name: torch.tensor(value).to(dtypes[name]) for name, value in batch.items()}
    return again


def _sample(output: torch.Tensor) -> dict[str, Any]:
    """An output's `shape`, `largest` value and some of its `values`, as text that keeps every digit."""
    flat = output.detach().double().flatten()
    return {
        "shape": list(output.shape),
        "largest": scale(flat),
        "values": [str(float(value)) for value in flat[_sampled(len(flat))]],
    }


def _sampled(count: int) -> torch.Tensor:
    """The indices of at most `SAMPLES` of so many values, evenly spaced from the first to the last."""
    samples = min(count, SAMPLES)
    return torch.arange(samples) * (count - 1) // max(samples - 1, 1)


def _error(output: torch.Tensor, sample: Mapping[str, Any], place: str) -> float:
    """The largest difference from a sample over the largest value of that output; infinite where one is not finite.

    Labels are equal or infinitely far apart.

    Raises:
        ProofError: the output has another shape.
    """
    if list(output.shape) != sample["shape"]:
        raise ProofError(f"it gives {list(output.shape)}, its graph gave {sample['shape']} ({place})")
    got = output.detach().double().flatten()[_sampled(output.numel())]
    want = torch.tensor([float(value) for value in sample["values"]], dtype=torch.float64)
    nonfinite = ~torch.isfinite(want)
    same = torch.allclose(got[nonfinite], want[nonfinite], equal_nan=True)
    if not same or not torch.isfinite(got[~nonfinite]).all():
        return float("inf")
    difference = (got - want)[~nonfinite].abs()
    if not difference.numel():
        return 0.0
    if is_label(output):
        return float("inf") if difference.any() else 0.0
    return float(difference.max()) / max(sample["largest"], LEAST)
