"""Mixed precision: the bits of each layer, chosen by the error that fewer bits cause, within a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import functional as F

from adaptc.compiler.proof.quantization_error import TOKENS, output_errors, relative, rows_of
from adaptc.errors import InputError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch, Interpreter, Run, numbered
from adaptc.ir.observer import LayerInputs
from adaptc.methods.site import WeightSite
from adaptc.quantization.integer import CalibratedBlocks, IntegerBlocks, plain_integers
from adaptc.quantization.quantized_weight import Quantization, bytes_of, matrix_size
from adaptc.quantization.scheme import Scheme
from adaptc.rewriter.pipeline import run
from adaptc.rewriter.quantize import Quantize
from adaptc.spec.spec import QuantizeBudget

Rows = Sequence[Batch]


@dataclass(frozen=True)
class Choice:
    """A way to store a layer.

    Attributes:
        scheme: the quantization scheme; None for floats.
        bytes: the bytes of the layer's matrix as stored.
        error: the largest relative error of the model's outputs that it causes.
    """

    scheme: Scheme | None
    bytes: int
    error: float


@dataclass
class Layer:
    """A layer and the ways to store it.

    Attributes:
        site: where its weight is read.
        entry: the number of the entry of `quantize` that names it.
        choices: the ways to store it, from the fewest bytes to the most.
        at: the index of the way that is chosen so far.
    """

    site: WeightSite
    entry: int | None
    choices: list[Choice]
    at: int = 0

    @property
    def chosen(self) -> Choice:
        """The way that is chosen so far."""
        return self.choices[self.at]

    @property
    def following(self) -> Choice:
        """The way with the next more bytes."""
        return self.choices[self.at + 1]

    @property
    def gain(self) -> float:
        """By how much the squared error falls for each byte more, if the next way is taken."""
        more = self.following.bytes - self.chosen.bytes
        return (self.chosen.error**2 - self.following.error**2) / max(1, more)


def choose(graph: Graph, items: Sequence[Quantize], budget: QuantizeBudget) -> list[Quantize]:
    """Choose bits for each layer within a budget.

    Every layer starts with the fewest bits. At each step the layer gets more bits whose squared output error falls
    most for each byte, until the size is used up, or the measured error of the model's outputs is small enough.

    Args:
        graph: the traced graph; its calibration rows are used, or random inputs if there are none.
        items: the passes that quantize, with the schemes that the spec names.
        budget: the limit of size or error.

    Returns:
        The passes to run in place of `items`: one for each entry and chosen scheme.

    Raises:
        InputError: a budget of size is too small for the fewest bits.
    """
    rows = rows_of(graph)
    reference = Interpreter(graph).on(numbered(rows))
    layers = [layer for item in items for layer in _layers(graph, reference, item, rows)]
    floats = sum(4 * matrix_size(layer.site)[0] * matrix_size(layer.site)[1] for layer in layers)
    steps = _steps(layers)
    if budget.size is not None:
        spent, allowed = sum(layer.chosen.bytes for layer in layers), budget.size * floats
        if spent > allowed:
            raise InputError(
                f"budget.size: the fewest bits take {spent / floats:.3f} of float32's bytes, more than {budget.size}"
            )
        for layer in steps:
            more = layer.following.bytes - layer.chosen.bytes
            if spent + more > allowed:
                break
            spent, layer.at = spent + more, layer.at + 1
        return _passes(layers, items)
    assert budget.error is not None
    low, high = 0, len(steps)  # the fewest steps that meet it: the error falls with every one of them
    while low < high:
        middle = (low + high) // 2
        _take(layers, steps[:middle])
        if _error(graph, reference, _passes(layers, items)) <= budget.error:
            high = middle
        else:
            low = middle + 1
    _take(layers, steps[:low])
    return _passes(layers, items)


def _layers(graph: Graph, reference: Run, item: Quantize, rows: Rows) -> list[Layer]:
    """The layers that a pass would quantize, with every way to store them and its error."""
    sites = item.selection(graph).sites
    inputs = LayerInputs(graph, sites, rows, TOKENS)
    layers: list[Layer] = []
    for site in sites:
        x, size = inputs.of(site)(), matrix_size(site)
        choices: list[Choice] = []
        for scheme in alternatives(item.scheme):
            given = (lambda x=x: x) if scheme.calibrated else None
            q = Quantization(scheme, site, graph.weights[site.parameter], given)
            W, computed = q.matrix(), q.dequantized()
            error = relative(computed, W) if x is None else relative(F.linear(x, computed), F.linear(x, W))
            choices.append(Choice(scheme, bytes_of(scheme, *size), error))
        choices.append(Choice(None, size[0] * size[1] * site.dtype.itemsize, 0.0))
        layers.append(_with_output_errors(graph, reference, Layer(site, item.entry, choices), item))
    return layers


def _with_output_errors(graph: Graph, reference: Run, layer: Layer, item: Quantize) -> Layer:
    """The layer with the error of the model's outputs in place of the layer's own, since layers matter differently.

    The model's error is measured for the fewest bits, with all other layers in floats. For more bits it is assumed to
    fall as the layer's own error does.
    """
    first = layer.choices[0].error
    effect = _error(graph, reference, _passes([layer], [item]))
    choices = [Choice(c.scheme, c.bytes, effect * c.error / max(first, 1e-30)) for c in layer.choices]
    return Layer(layer.site, layer.entry, choices)


def alternatives(scheme: Scheme) -> list[Scheme]:
    """The scheme in every number of bits that it has, from the fewest to the most.

    A scheme of one width that is no integer scheme is followed by integers of 8 bits.
    """
    if isinstance(scheme, CalibratedBlocks):
        return [dataclasses.replace(scheme, bits=bits) for bits in (2, 4, 8)]
    plain = plain_integers()
    if isinstance(scheme, IntegerBlocks) and not scheme.integer_products:
        options = {f.name: getattr(scheme, f.name) for f in dataclasses.fields(IntegerBlocks)}
        return [cls(**options) for cls in plain]
    return [scheme, *([] if isinstance(scheme, IntegerBlocks) else [plain[-1]()])]


def _steps(layers: Sequence[Layer]) -> list[Layer]:
    """The layer that gets more bits at each step, from the fewest bits until all are floats."""
    steps: list[Layer] = []
    _take(layers, [])
    while growing := [layer for layer in layers if layer.at + 1 < len(layer.choices)]:
        best = max(growing, key=lambda layer: layer.gain)
        best.at += 1
        steps.append(best)
    _take(layers, [])
    return steps


def _take(layers: Sequence[Layer], steps: Sequence[Layer]) -> None:
    """Let each layer be at the way that these steps lead to."""
    for layer in layers:
        layer.at = sum(step is layer for step in steps)


def _passes(layers: Sequence[Layer], items: Sequence[Quantize]) -> list[Quantize]:
    """A pass for each scheme that layers of an entry have."""
    passes: list[Quantize] = []
    for item in items:
        targets: dict[Scheme, list[str]] = {}
        for layer in layers:
            scheme = layer.chosen.scheme
            if layer.entry == item.entry and scheme is not None:
                targets.setdefault(scheme, []).append(layer.site.pattern)
        for scheme, target in targets.items():
            passes.append(Quantize(scheme, target=tuple(target), entry=item.entry))
    return passes


def _error(graph: Graph, reference: Run, passes: Sequence[Quantize]) -> float:
    """The largest relative error of an output, after these passes."""
    return max(output_errors(reference, run(graph, passes)).values(), default=0.0)
