"""Quantize: the weight that a site reads becomes what few bits stand for. One pass for every scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from adaptc.errors import Fault, Refusal
from adaptc.ir.aliases import alias_names
from adaptc.ir.graph import Graph
from adaptc.ir.observer import LayerInputs
from adaptc.ir.selection import Selection, Target, select
from adaptc.methods.site import WeightSite
from adaptc.quantization.operators import DEQUANTIZE
from adaptc.quantization.quantized_weight import (
    Quantization,
    QuantizedLeaf,
    matrix_size,
    part,
    stored_as_matrix,
    weight_of,
)
from adaptc.quantization.scheme import Scheme
from adaptc.quantization.trial import try_pending
from adaptc.rewriter.expression import splice, trace_expression
from adaptc.rewriter.pipeline import Pass, changed_options
from adaptc.weights import Deferred, Held

TOKENS = 4096
"""Rows of a layer's inputs that schemes choose by."""


@dataclass(frozen=True)
class Quantize(Pass):
    """`linear(x, W)` becomes `linear(x, dequantize(codes, …))` at every site the target names.

    `Quantize(scheme, target="*.query")`. Whoever else uses the same tensor reads the same bits: a tied head its
    embedding's. `entry` is the number of the entry of the spec that it comes from, None for what the base has in bits.
    """

    scheme: Scheme
    target: Target = ()
    exclude: tuple[str, ...] = ()
    entry: int | None = 0

    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted", "folded"})
    changes_results: ClassVar[bool] = True

    def __post_init__(self) -> None:
        try_pending(type(self.scheme))

    @property
    def name(self) -> str:  # type: ignore[override]
        """What a spec calls the pass, such as `quantize-` and the scheme's name."""
        return f"quantize-{self.scheme.name}"

    def stated(self) -> dict[str, Any]:
        """The options of the pass and of the scheme that differ from their defaults, as a spec states them."""
        options = {name: value for name, value in changed_options(self).items() if name != "scheme"}
        return options | changed_options(self.scheme)

    def selection(self, graph: Graph) -> Selection[WeightSite]:
        """What the target matches, each tensor once: as a whole, or all slices of it that are named."""
        found = select(graph, self.target, self.exclude, self.scheme)
        of: dict[str, list[WeightSite]] = {}
        for site in found.sites:
            of.setdefault(graph.aliases[site.parameter], []).append(site)
        return dataclasses.replace(found, sites=tuple(_joined(sites) for sites in of.values()))

    def left(self, graph: Graph) -> list[WeightSite]:
        """The sites that are not quantized by this entry already: after a fold, those that were folded into."""
        known = {name for name, q in graph.quantized.items() if q.entry == self.entry}
        return [site for site in self.selection(graph).sites if site.parameter not in known]

    def refused(self, graph: Graph, site: WeightSite) -> Fault | None:
        """The option at fault and why this cannot be stored so; None if it can."""
        known = graph.quantized.get(site.parameter)
        if known is not None:
            who = "the base" if known.entry is None else f"quantize.{known.entry}"
            words = f"{who} stores it as {known.scheme.name} already"
            return Fault(("target",), f"{words}; leave it out of one of them with `exclude`")
        if not site.dtype.is_floating_point:
            return Fault(("target",), f"its weight is {site.dtype}, not a number to be rounded")
        return self.scheme.refuses(*matrix_size(site))

    def requires(self, graph: Graph) -> list[Refusal]:
        """The target matches, and the scheme can store every matrix."""
        selection = self.selection(graph)
        if not selection.sites:
            near = f"; near: {', '.join(selection.near)}" if selection.near else ""
            return [Refusal(f"{self.name}: the target {self.target!r} matches no site{near}")]
        refusals = []
        for site in self.left(graph):
            reason = self.refused(graph, site)
            if reason:
                message = f"{self.scheme.name}: {reason.reason}"
                refusals.append(Refusal(message, (site.node,), (f"site {site}",)))
        return refusals

    def call(self, graph: Graph) -> bool:
        """Store every matrix, and let what read it read what the bits stand for."""
        scheme, sites = self.scheme, self.left(graph)
        made = [Quantization(scheme, site, graph.weights[site.parameter]) for site in sites]
        if scheme.calibrated:
            chosen = [quantization for quantization in made if quantization.kept is None]
            inputs = (
                LayerInputs(graph.copy(), [q.site for q in chosen], graph.calibration_rows, TOKENS)
                if chosen
                else None
            )
            for quantization in chosen:
                quantization.inputs = inputs.of(quantization.site) if inputs else None
        traced: dict[Any, fx.Graph] = {}
        for quantization in made:
            self._quantize(graph, quantization, traced)
        return bool(sites)

    def ensures(self, graph: Graph) -> str | None:
        """No planned site reads its weight as it was."""
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        left = sorted({s.module for s in self.selection(graph).sites if s.parameter in read})
        return f"{self.name} planned {', '.join(left)}, but did not rewrite it" if left else None

    def _quantize(self, graph: Graph, quantization: Quantization, traced: dict[Any, fx.Graph]) -> None:
        scheme, site = quantization.scheme, quantization.site
        parameter, (rows, columns) = site.parameter, quantization.size
        prefix = f"{parameter}_{site.part}" if site.part else parameter
        held: dict[str, str] = {}
        for key, kept in scheme.stored(rows, columns).items():
            held[key] = f"{prefix}_{key}"
            graph.attach(held[key], part(quantization, key, kept), trained=False)
        for key, value in scheme.constants().items():
            held[key] = f"{scheme.name.replace('-', '_')}_{key}"
            if held[key] not in graph.weights:
                graph.attach(held[key], Held(value), trained=False)
        same = alias_names(graph, parameter)
        reads = [n for n in graph.nodes if n.op == "get_attr" and n.target in same]
        first = next(node for node in graph.nodes if any(read in node.all_input_nodes for read in reads))
        with graph.module.graph.inserting_before(first):
            tensors = [graph.parameter_node(name) for name in held.values()]
            found = graph.call(DEQUANTIZE, tensors, scheme.text, rows, columns, site.dtype, like=first)
        found.meta["quantized"] = parameter
        rest, operands = "", [found]
        if site.rows:
            rest = f"{prefix}_rest"
            shape = (reads[0].meta["val"].numel() // columns - rows, columns)
            graph.attach(rest, Deferred(shape, site.dtype, quantization.rest), trained=False)
            operands.append(graph.parameter_node(rest))
        value = found
        if site.rows or not stored_as_matrix(site):
            key = (site.kind, site.layout, site.shape, site.rows, site.dtype)
            if key not in traced:
                with graph.fake_mode:
                    traced[key] = trace_expression(
                        lambda *made: weight_of(site, *made), [o.meta["val"] for o in operands], {}
                    )
            value = splice(graph, traced[key], operands, first, {"quantized": parameter})
        if value.meta["val"].stride() == reads[0].meta["val"].stride():
            value.meta["val"] = reads[0].meta["val"]
        for read in reads:
            read.replace_all_uses_with(value)
            graph.module.graph.erase_node(read)
        for name in same:
            del graph.weights[name]
        graph.quantized[parameter] = QuantizedLeaf(
            quantization, self.entry, held, found.name, value.name, rest
        )


def _joined(sites: Sequence[WeightSite]) -> WeightSite:
    """One site of a tensor: the whole if that is among them, else all rows of its slices."""
    whole = next((site for site in sites if not site.rows), None)
    if whole is not None or len(sites) == 1:
        return whole or sites[0]
    rows: list[tuple[int, int]] = []
    for start, stop in sorted(rows for site in sites for rows in site.rows):
        if rows and start <= rows[-1][1]:
            rows[-1] = (rows[-1][0], max(stop, rows[-1][1]))
        else:
            rows.append((start, stop))
    return dataclasses.replace(sites[0], rows=tuple(rows), piece=",".join(site.piece for site in sites))


def drop_unread_quantized(graph: Graph, parameters: Iterable[str]) -> None:
    """Drop the bits that stood for these parameters, which are read as floats now; what else reads them keeps them."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in [name for name in parameters if name in graph.quantized]:
        quantized = graph.quantized.pop(name)
        for tensor in (*quantized.tensors.values(), quantized.rest):
            if tensor not in read and tensor in graph.weights:
                graph.detach(tensor)
