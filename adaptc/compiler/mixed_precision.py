"""Mixed precision: how many bits each layer gets, by what its output loses, within a budget of size or error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import functional as F

from adaptc.compiler.quantization_error import TOKENS, output_errors, relative, rows_of
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
    """A way to store a layer: None for floats."""

    scheme: Scheme | None
    bytes: int
    error: float


@dataclass
class Layer:
    """A layer and its ways, from the fewest bytes on; `at` is the one in force."""

    site: WeightSite
    entry: int | None
    ways: list[Choice]
    at: int = 0

    @property
    def gain(self) -> float:
        """How much of the squared error the next way takes away, a byte."""
        now, then = self.ways[self.at], self.ways[self.at + 1]
        return (now.error**2 - then.error**2) / max(1, then.bytes - now.bytes)


def choose(graph: Graph, items: Sequence[Quantize], budget: QuantizeBudget) -> list[Quantize]:
    """The passes that quantize within a budget, in place of these.

    Every layer starts with the fewest bits; as long as the budget lets it, the layer gets more whose part of the
    outputs' squared error falls most a byte. A budget of error is held against the model's outputs as they are.

    Raises:
        InputError: a budget of size is too small for the fewest bits.
    """
    rows = rows_of(graph)
    reference = Interpreter(graph).on(numbered(rows))
    layers = [layer for item in items for layer in _layers(graph, reference, item, rows)]
    floats = sum(4 * matrix_size(layer.site)[0] * matrix_size(layer.site)[1] for layer in layers)
    steps = _steps(layers)
    if budget.size is not None:
        spent, allowed = sum(layer.ways[0].bytes for layer in layers), budget.size * floats
        if spent > allowed:
            raise InputError(
                f"budget.size: the fewest bits take {spent / floats:.3f} of float32's bytes, more than {budget.size}"
            )
        for layer in steps:
            more = layer.ways[layer.at + 1].bytes - layer.ways[layer.at].bytes
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
    sites = item.selection(graph).sites
    inputs = LayerInputs(graph, sites, rows, TOKENS)
    found = []
    for site in sites:
        x, size = inputs.of(site)(), matrix_size(site)
        ways = []
        for scheme in alternatives(item.scheme):
            given = (lambda x=x: x) if scheme.calibrated else None
            q = Quantization(scheme, site, graph.weights[site.parameter], given)
            W, computed = q.matrix(), q.dequantized()
            error = relative(computed, W) if x is None else relative(F.linear(x, computed), F.linear(x, W))
            ways.append(Choice(scheme, bytes_of(scheme, *size), error))
        ways.append(Choice(None, size[0] * size[1] * site.dtype.itemsize, 0.0))
        found.append(_weighed(graph, reference, Layer(site, item.entry, ways), item))
    return found


def _weighed(graph: Graph, reference: Run, layer: Layer, item: Quantize) -> Layer:
    """The layer with errors of the model's outputs in place of its own: a layer's output may matter little, or all.

    Measured for the fewest bits, with all other layers in floats; those of more bits go by the layer's own.
    """
    first = layer.ways[0].error
    effect = _error(graph, reference, _passes([layer], [item]))
    ways = [Choice(w.scheme, w.bytes, effect * w.error / max(first, 1e-30)) for w in layer.ways]
    return Layer(layer.site, layer.entry, ways)


def alternatives(scheme: Scheme) -> list[Scheme]:
    """The same scheme in other bits, from the fewest on; what has one width only, and 8 bits."""
    if isinstance(scheme, CalibratedBlocks):
        return [dataclasses.replace(scheme, bits=bits) for bits in (2, 4, 8)]
    plain = plain_integers()
    if isinstance(scheme, IntegerBlocks) and not scheme.integer_products:
        options = {f.name: getattr(scheme, f.name) for f in dataclasses.fields(IntegerBlocks)}
        return [cls(**options) for cls in plain]
    return [scheme, *([] if isinstance(scheme, IntegerBlocks) else [plain[-1]()])]


def _steps(layers: Sequence[Layer]) -> list[Layer]:
    """Which layer gets more at each step, until all are floats."""
    found = []
    for layer in layers:
        layer.at = 0
    while left := [layer for layer in layers if layer.at + 1 < len(layer.ways)]:
        best = max(left, key=lambda layer: layer.gain)
        best.at += 1
        found.append(best)
    _take(layers, [])
    return found


def _take(layers: Sequence[Layer], steps: Sequence[Layer]) -> None:
    for layer in layers:
        layer.at = sum(step is layer for step in steps)


def _passes(layers: Sequence[Layer], items: Sequence[Quantize]) -> list[Quantize]:
    """A pass for every scheme that some layers of an entry have."""
    found = []
    for item in items:
        of: dict[Scheme, list[str]] = {}
        for layer in layers:
            scheme = layer.ways[layer.at].scheme
            if layer.entry == item.entry and scheme is not None:
                of.setdefault(scheme, []).append(layer.site.pattern)
        for scheme, target in of.items():
            found.append(Quantize(scheme, target=tuple(target), entry=item.entry))
    return found


def _error(graph: Graph, reference: Run, passes: Sequence[Quantize]) -> float:
    return max(output_errors(reference, run(graph, passes)).values(), default=0.0)
