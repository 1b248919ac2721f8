"""Reference values of an artifact: a few of its outputs, kept in the manifest, which prove it again later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from adaptc.compiler.proof import Runner, batches, scale
from adaptc.errors import ProofError
from adaptc.inputs import InputSpec
from adaptc.ir.interpreter import Run

SAMPLES = 64
"""How many values of each output the manifest keeps, evenly spaced."""


def recorded(reference: Run, inputs: Sequence[InputSpec], seed: int, tolerance: float) -> dict[str, Any]:
    """The reference values of a run, as plain data for the manifest.

    Args:
        reference: the run that the artifact was proved against, on `batches(inputs, seed)`.
        inputs: the graph's inputs.
        seed: the seed of the random inputs, which a later check draws again.
        tolerance: the relative error that a later check allows.

    Returns:
        `inputs`, `seed`, `tolerance`, and `values`: the label of each batch -> for each output its `shape`, its
        `largest` value and a sample of its `values`.
    """
    return {
        "inputs": [asdict(spec) for spec in inputs],
        "seed": seed,
        "tolerance": tolerance,
        "values": {
            label: [_sample(output) for output in outcome]
            for label, outcome in reference.outcomes.items()
            if not isinstance(outcome, Exception)
        },
    }


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
    inputs = [InputSpec.from_json(spec) for spec in reference["inputs"]]
    drawn = batches(inputs, reference["seed"])
    run = candidate.on({label: batch for label, batch in drawn.items() if label in reference["values"]})
    worst = 0.0
    for label, outcome in run.outcomes.items():
        if isinstance(outcome, Exception):
            raise ProofError(f"it does not run ({label}): {outcome}") from outcome
        expected = reference["values"][label]
        if len(outcome) != len(expected):
            raise ProofError(f"it gives {len(outcome)} outputs, its graph gave {len(expected)} ({label})")
        for index, (output, sample) in enumerate(zip(outcome, expected, strict=True)):
            worst = max(worst, _error(output, sample, f"output {index}, {label}"))
    error = f"largest error {worst:.1e} of {reference['tolerance']:.1e} allowed"
    if not worst <= reference["tolerance"]:
        raise ProofError(f"it no longer computes what its graph did: {error}")
    how = f" ({', '.join(run.coverage)})" if run.coverage else ""
    return f"computes what its graph did: {error}, on {', '.join(run.batches)}{how}"


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
    return float(difference.max()) / max(sample["largest"], 1e-12) if difference.numel() else 0.0
