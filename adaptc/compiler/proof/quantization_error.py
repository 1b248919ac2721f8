"""The errors of quantization: of each layer's weight and output, and of the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from adaptc.compiler.proof.inputs import batches
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run, numbered
from adaptc.ir.observer import LayerInputs
from adaptc.methods.site import WeightSite
from adaptc.quantization.quantized_weight import QuantizedLeaf, matrix_of, stored_bytes
from adaptc.rewriter.expression import extract_expression

TOKENS = 256
"""How many rows of a layer's inputs its output error is measured on."""


@dataclass(frozen=True)
class LayerError:
    """One quantized layer.

    Attributes:
        module: its name, with the slice where only a slice is quantized.
        scheme: the scheme as a spec writes it.
        bits: bits for each weight as stored, scales included.
        bytes: the bytes of the layer's weight as stored.
        weight: ‖Ŵ - W‖ / ‖W‖, with W the float model's weight with its adapters, Ŵ the dequantized one.
        output: ‖x (Ŵ - W)ᵀ‖ / ‖x Wᵀ‖ on the float model's inputs x of the layer; None where it takes none.
    """

    module: str
    scheme: str
    bits: float
    bytes: int
    weight: float
    output: float | None

    @property
    def error(self) -> float:
        """The output's error, or the weight's where the output has none."""
        return self.weight if self.output is None else self.output


@dataclass(frozen=True)
class QuantizationErrors:
    """The errors of a quantized model against the float model with the same adapters.

    Attributes:
        layers: its quantized layers, the worst first.
        outputs: each output of the model -> ‖ŷ - y‖ / ‖y‖.
        inputs: which inputs the errors were measured on.
        share: bytes of the quantized weights over their bytes in float32.
        rounded: each output -> its error in a program that rounds activations too; empty for one that does not.
    """

    layers: tuple[LayerError, ...]
    outputs: Mapping[str, float]
    inputs: str
    share: float
    rounded: Mapping[str, float] = field(default_factory=dict[str, float])

    def to_json(self) -> dict[str, Any]:
        """The errors as plain data, under the names of the attributes."""
        return asdict(self)


def measure(
    reference: Graph, candidate: Graph, seed: int = 0, rounding: Graph | None = None
) -> QuantizationErrors | None:
    """Compare a quantized model with the float one, on the calibration rows or, if there are none, on random inputs.

    Args:
        reference: the float model with its adapters in place, not factored.
        candidate: the quantized model, not factored.
        seed: the seed of random inputs.
        rounding: the quantized model with activations rounded as the artifact does, if the artifact does.

    Returns:
        The errors; None where there are none, since all codes are the base's own and no activation is rounded.
    """
    rows = rows_of(reference, seed)
    random = "random inputs, and the person's own" if reference.examples else "random inputs"
    description = f"{len(rows)} calibration rows" if reference.calibration_rows else random
    leaves = [q for q in candidate.quantized.values() if q.quantization.packed is None]
    if not leaves and rounding is None:
        return None
    inputs = LayerInputs(reference, [q.site for q in leaves], rows, TOKENS)
    layers = [_layer(reference, candidate, q, inputs) for q in leaves]
    floats = Interpreter(reference).on(numbered(rows))
    outputs = output_errors(floats, candidate)
    numbers = sum(q.quantization.size[0] * q.quantization.size[1] for q in leaves)
    share = stored_bytes(leaves) / max(1, 4 * numbers)
    worst = sorted(layers, key=lambda layer: -layer.error)
    rounded = output_errors(floats, rounding) if rounding is not None else {}
    return QuantizationErrors(tuple(worst), outputs, description, share, rounded)


def _layer(reference: Graph, candidate: Graph, q: QuantizedLeaf, inputs: LayerInputs) -> LayerError:
    """The errors of one layer: of its weight, and of its output where it is a matrix product."""
    W, computed = (_matrix(graph, q.site) for graph in (reference, candidate))
    x = inputs.of(q.site)()
    output = None if x is None else relative(F.linear(x, computed), F.linear(x, W))
    numbers = W.numel()
    size = stored_bytes([q])
    weight = relative(computed, W)
    return LayerError(q.site.pattern, q.scheme.text, 8 * size / numbers, size, weight, output)


def _matrix(graph: Graph, site: WeightSite) -> torch.Tensor:
    """The matrix (out, in) that a graph computes with at a site, in float32."""
    value = graph.current_value(site.parameter, site.uses, graph.by_name())
    return matrix_of(site, extract_expression(graph, value).evaluate()).float()


def rows_of(graph: Graph, seed: int = 0) -> list[Any]:
    """The calibration rows; random inputs where there are none."""
    return list(graph.calibration_rows) or list(batches(graph, seed).values())


def output_errors(reference: Run, candidate: Graph) -> dict[str, float]:
    """Each output that a candidate has -> ‖ŷ - y‖ / ‖y‖, over all batches of the reference that both take."""
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
    linalg: Any = torch.linalg
    size = linalg.vector_norm(reference).clamp(min=1e-30)
    return float(linalg.vector_norm(value - reference) / size)
