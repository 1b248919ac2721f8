"""What an artifact must compute: a few of its values, kept in the manifest, so that it can be proved again."""

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
"""How many values of each output are kept, evenly spaced."""


def recorded(reference: Run, inputs: Sequence[InputSpec], seed: int, tolerance: float) -> dict[str, Any]:
    """The values that a graph gave for random inputs of every proof's shape that it takes.

    Args:
        reference: the run of the graph that the artifact was proved against, on `batches(inputs, seed)`.
        inputs: the graph's inputs.
        seed: of the random inputs, which a later check draws again.
        tolerance: the relative error allowed to whoever must give the same.
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


def proved_again(known: Mapping[str, Any], candidate: Runner) -> str:
    """Hold an artifact against the values that were kept of its graph; gives what was found, in words.

    Raises:
        ProofError: it gives something else, or does not run.
    """
    inputs = [InputSpec.from_json(spec) for spec in known["inputs"]]
    drawn = batches(inputs, known["seed"])
    run = candidate.on({label: batch for label, batch in drawn.items() if label in known["values"]})
    worst = 0.0
    for label, outcome in run.outcomes.items():
        if isinstance(outcome, Exception):
            raise ProofError(f"it does not run ({label}): {outcome}") from outcome
        expected = known["values"][label]
        if len(outcome) != len(expected):
            raise ProofError(f"it gives {len(outcome)} outputs, its graph gave {len(expected)} ({label})")
        for index, (output, kept) in enumerate(zip(outcome, expected, strict=True)):
            worst = max(worst, _error(output, kept, f"output {index}, {label}"))
    if not worst <= known["tolerance"]:
        raise ProofError(
            f"it no longer computes what its graph did: largest error {worst:.1e} of {known['tolerance']:.1e} allowed"
        )
    how = f" ({', '.join(run.coverage)})" if run.coverage else ""
    held = f"largest error {worst:.1e} of {known['tolerance']:.1e} allowed"
    return f"computes what its graph did: {held}, on {', '.join(run.batches)}{how}"


def _sample(output: torch.Tensor) -> dict[str, Any]:
    flat = output.detach().double().flatten()
    return {
        "shape": list(output.shape),
        "largest": scale(flat),
        "values": [str(value) for value in flat[_places(len(flat))].tolist()],
    }


def _places(count: int) -> torch.Tensor:
    kept = min(count, SAMPLES)
    return torch.arange(kept) * (count - 1) // max(kept - 1, 1)


def _error(output: torch.Tensor, kept: Mapping[str, Any], where: str) -> float:
    """The largest error over the largest value of that output."""
    if list(output.shape) != kept["shape"]:
        raise ProofError(f"it gives {list(output.shape)}, its graph gave {kept['shape']} ({where})")
    got = output.detach().double().flatten()[_places(output.numel())]
    want = torch.tensor([float(value) for value in kept["values"]], dtype=torch.float64)
    odd = ~torch.isfinite(want)
    if not torch.allclose(got[odd], want[odd], equal_nan=True) or not torch.isfinite(got[~odd]).all():
        return float("inf")
    difference = (got - want)[~odd].abs()
    return float(difference.max()) / max(kept["largest"], 1e-12) if difference.numel() else 0.0
