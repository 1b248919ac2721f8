"""What quantization costs: of every layer its bits, and how far its weight and output are from the float model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from adaptc.compiler.proof import batches
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run, numbered
from adaptc.ir.observer import LayerInputs
from adaptc.methods.site import WeightSite
from adaptc.quantization.quantized_weight import QuantizedLeaf, matrix_of, stored_bytes
from adaptc.rewriter.expression import extract_expression

TOKENS = 256
"""Rows of a layer's inputs that its output error is measured on."""


@dataclass(frozen=True)
class LayerError:
    """One quantized layer.

    Attributes:
        module: its name, with the slice where only that is stored so.
        scheme: as a spec writes it.
        bits: stored, a weight, scales and all.
        bytes: stored.
        weight: ‖Ŵ - W‖ / ‖W‖, W the float model's weight with its adapters, Ŵ what is computed with.
        output: ‖x (Ŵ - W)ᵀ‖ / ‖x Wᵀ‖ on the float model's own inputs of the layer; None where it multiplies none.
    """

    module: str
    scheme: str
    bits: float
    bytes: int
    weight: float
    output: float | None

    @property
    def error(self) -> float:
        """The output's error, or the weight's where there is none."""
        return self.weight if self.output is None else self.output


@dataclass(frozen=True)
class QuantizationErrors:
    """What quantization costs a model, against the float model with the same adapters.

    Attributes:
        layers: the worst first.
        outputs: of each output of the model ‖ŷ - y‖ / ‖y‖.
        rounded: the same in a program that rounds activations too; empty for one that does not.
        inputs: what was measured on.
        share: bytes of the quantized weights over what they take in float32.
    """

    layers: tuple[LayerError, ...]
    outputs: Mapping[str, float]
    inputs: str
    share: float
    rounded: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure(
    reference: Graph, candidate: Graph, seed: int = 0, rounding: Graph | None = None
) -> QuantizationErrors | None:
    """Hold a quantized model against the float one, on the calibration rows or, if there are none, on random inputs.

    None where nothing costs anything: what the base has in bits is what it is.

    Args:
        reference: the float model with its adapters in place, not factored.
        candidate: the quantized one, not factored.
        seed: of random inputs.
        rounding: the quantized one with activations rounded as a program does, if one does.
    """
    rows = rows_of(reference, seed)
    what = f"{len(rows)} calibration rows" if reference.rows else "random inputs"
    known = [q for q in candidate.quantized.values() if q.quantization.packed is None]
    if not known and rounding is None:
        return None
    inputs = LayerInputs(reference, [q.site for q in known], rows, TOKENS)
    layers = [_layer(reference, candidate, q, inputs) for q in known]
    floats = Interpreter(reference).on(numbered(rows))
    outputs = output_errors(floats, candidate)
    numbers = sum(q.quantization.size[0] * q.quantization.size[1] for q in known)
    share = stored_bytes(known) / max(1, 4 * numbers)
    worst = sorted(layers, key=lambda layer: -layer.error)
    rounded = output_errors(floats, rounding) if rounding is not None else {}
    return QuantizationErrors(tuple(worst), outputs, what, share, rounded)


def _layer(reference: Graph, candidate: Graph, q: QuantizedLeaf, inputs: LayerInputs) -> LayerError:
    W, computed = (_matrix(graph, q.site) for graph in (reference, candidate))
    x = inputs.of(q.site)()
    output = None if x is None else relative(F.linear(x, computed), F.linear(x, W))
    numbers = W.numel()
    size = stored_bytes([q])
    weight = relative(computed, W)
    return LayerError(q.site.pattern, q.scheme.text, 8 * size / numbers, size, weight, output)


def _matrix(graph: Graph, site: WeightSite) -> torch.Tensor:
    value = graph.current_value(site.parameter, site.uses, graph.by_name())
    return matrix_of(site, extract_expression(graph, value).evaluate()).float()


def rows_of(graph: Graph, seed: int = 0) -> list[Any]:
    """The calibration rows; random inputs where there are none."""
    return list(graph.calibration_rows) or list(batches(graph.inputs, seed).values())


def output_errors(reference: Run, candidate: Graph) -> dict[str, float]:
    """Of each output that a candidate has ‖ŷ - y‖ / ‖y‖, over all batches of the reference that both take."""
    error: dict[str, float] = {}
    scale: dict[str, float] = {}
    taken = {spec.name for spec in candidate.inputs}
    given = {
        name: {key: value for key, value in batch.items() if key in taken}
        for name, batch in reference.batches.items()
    }
    run = Interpreter(candidate).on(given)
    for label, want in reference.outcomes.items():
        got = run.outcomes[label]
        if isinstance(want, Exception) or isinstance(got, Exception):
            continue  # the model itself does not take this size
        wanted = dict(zip(reference.outputs, want, strict=True))
        for name, b in zip(run.outputs, got, strict=True):
            a = wanted[name].to(b.dtype)
            finite = torch.isfinite(a) & torch.isfinite(b)
            if a.is_floating_point():
                error[name] = error.get(name, 0.0) + float((a - b)[finite].double().square().sum())
                scale[name] = scale.get(name, 0.0) + float(a[finite].double().square().sum())
    return {name: (total / max(scale[name], 1e-30)) ** 0.5 for name, total in error.items()}


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """‖value - reference‖ / ‖reference‖."""
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))
