"""Other graphs of a compiled model: without its adapters, without its bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptc.graph import Graph
from adaptc.insert import Insert
from adaptc.orders import lowering
from adaptc.pipeline import PASSES, Pass, run
from adaptc.quantize import Quantize
from adaptc.quantized import Part

if TYPE_CHECKING:
    from adaptc.compiled import Compiled


def bare_graph(compiled: Compiled) -> Graph:
    """The model without adapters; quantized, if the spec asks for that."""
    quantizes = list(dict.fromkeys(item for item in compiled.plan.passes if isinstance(item, Quantize)))
    graph = with_bits(compiled, run(compiled.base, quantizes))
    return run(graph, lowering(graph))


def float_graph(compiled: Compiled) -> Graph:
    """The model with its adapters as they stand, but for those that make up for quantization, and floats only."""
    kept = [item for item in compiled.plan.opening if not isinstance(item, Quantize)]
    return _again(compiled, [i for i in kept if not (isinstance(i, Insert) and i.method.makes_up)])


def bits_graph(compiled: Compiled) -> Graph:
    """The model as it is, with the bits that it had before any pass made floats of them."""
    opening = compiled.plan.opening
    kept = [item for item in opening if not isinstance(item, PASSES["dequantize"])]
    return compiled.graph if len(kept) == len(opening) else _again(compiled, kept)


def _again(compiled: Compiled, passes: Sequence[Pass]) -> Graph:
    """What these passes make of the base, with the adapters as they stand."""
    graph = run(compiled.base, passes)
    names = {name for name, param in compiled.graph.inserted.items() if param.stored}
    known = compiled.graph.weights
    graph.weights.update({name: known[name] for name in names & graph.weights.keys()})
    return graph


def with_bits(compiled: Compiled, graph: Graph) -> Graph:
    """The same graph with the bits that were found already, which passes that run again would find anew."""
    known = {name: w for name, w in compiled.graph.weights.items() if isinstance(w, Part)}
    graph.weights.update({name: known[name] for name in known.keys() & graph.weights.keys()})
    return graph
