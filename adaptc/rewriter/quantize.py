"""Quantize: the weight that a site reads is stored quantized, and dequantized. One pass for every scheme."""

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
from adaptc.quantization.trial import TRIALS
from adaptc.rewriter.expression import splice, trace_expression
from adaptc.rewriter.pipeline import Pass, changed_options
from adaptc.weights import Deferred, Held

TOKENS = 4096
"""How many rows of a layer's inputs a calibrated scheme gets."""


@dataclass(frozen=True)
class Quantize(Pass):
    """`linear(x, W)` becomes `linear(x, dequantize(codes, …))` at every site the target names.

    `Quantize(scheme, target="*.query")`. All that uses the same tensor reads the same codes, as a tied head those of
    its embedding. `entry` is the number of the spec's entry that it comes from, None for what the base itself stores
    quantized.
    """

    scheme: Scheme
    target: Target = ()
    exclude: tuple[str, ...] = ()
    entry: int | None = 0

    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted", "folded"})
    changes_results: ClassVar[bool] = True

    def __post_init__(self) -> None:
        TRIALS.try_pending(type(self.scheme))

    @property
    def name(self) -> str:  # type: ignore[override]
        """What a spec calls the pass, such as `quantize-` and the scheme's name."""
        return f"quantize-{self.scheme.name}"

    def stated(self) -> dict[str, Any]:
        """The options of the pass and of the scheme that differ from their defaults, as a spec states them."""
        options = {name: value for name, value in changed_options(self).items() if name != "scheme"}
        return options | changed_options(self.scheme)

    def selection(self, graph: Graph) -> Selection[WeightSite]:
        """The sites that the target matches, one for each tensor: as a whole, or all slices of it that are named."""
        selection = select(graph, self.target, self.exclude, self.scheme)
        by_tensor: dict[str, list[WeightSite]] = {}
        for site in selection.sites:
            by_tensor.setdefault(graph.aliases[site.parameter], []).append(site)
        return dataclasses.replace(selection, sites=tuple(_joined(sites) for sites in by_tensor.values()))

    def unquantized(self, graph: Graph) -> list[WeightSite]:
        """The sites that this entry has not quantized yet: after a fold, those that were folded into."""
        quantized = {name for name, leaf in graph.quantized.items() if leaf.entry == self.entry}
        return [site for site in self.selection(graph).sites if site.parameter not in quantized]

    def refused(self, graph: Graph, site: WeightSite) -> Fault | None:
        """The option at fault and why the scheme cannot store a site's weight; None if it can."""
        leaf = graph.quantized.get(site.parameter)
        if leaf is not None:
            owner = "the base" if leaf.entry is None else f"quantize.{leaf.entry}"
            reason = (
                f"{owner} stores it as {leaf.scheme.name} already; leave it out of one of them with `exclude`"
            )
            return Fault(("target",), reason)
        if not site.dtype.is_floating_point:
            return Fault(("target",), f"its weight is {site.dtype}, and only floats can be quantized")
        return self.scheme.refuses(*matrix_size(site))

    def requires(self, graph: Graph) -> list[Refusal]:
        """The target matches, and the scheme can store every matrix."""
        selection = self.selection(graph)
        if not selection.sites:
            near = f"; near: {', '.join(selection.near)}" if selection.near else ""
            return [Refusal(f"{self.name}: the target {self.target!r} matches no site{near}")]
        refusals: list[Refusal] = []
        for site in self.unquantized(graph):
            fault = self.refused(graph, site)
            if fault:
                reason = f"{self.scheme.name}: {fault.reason}"
                refusals.append(Refusal(reason, (site.node,), (f"site {site}",)))
        return refusals

    def call(self, graph: Graph) -> bool:
        """Quantize every matrix, and let what reads the weight read the dequantized one."""
        scheme, sites = self.scheme, self.unquantized(graph)
        quantizations = [Quantization(scheme, site, graph.weights[site.parameter]) for site in sites]
        if scheme.calibrated:
            floats = [quantization for quantization in quantizations if quantization.packed is None]
            inputs = (
                LayerInputs(graph.copy(), [q.site for q in floats], graph.calibration_rows, TOKENS)
                if floats
                else None
            )
            for quantization in floats:
                quantization.inputs = inputs.of(quantization.site) if inputs else None
        traced: dict[Any, fx.Graph] = {}
        for quantization in quantizations:
            self._quantize(graph, quantization, traced)
        return bool(sites)

    def ensures(self, graph: Graph) -> str | None:
        """No planned site reads its weight in floats."""
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        remaining = sorted({s.module for s in self.selection(graph).sites if s.parameter in read})
        return f"{self.name} planned {', '.join(remaining)}, but did not rewrite it" if remaining else None

    def _quantize(self, graph: Graph, quantization: Quantization, traced: dict[Any, fx.Graph]) -> None:
        """Attach the tensors of one matrix, and let all that reads the weight read the dequantized one."""
        scheme, site = quantization.scheme, quantization.site
        parameter, (rows, columns) = site.parameter, quantization.size
        prefix = f"{parameter}_{site.part}" if site.part else parameter
        names: dict[str, str] = {}
        for key, stored in scheme.stored(rows, columns).items():
            names[key] = f"{prefix}_{key}"
            graph.attach(names[key], part(quantization, key, stored), trained=False)
        for key, value in scheme.constants().items():
            names[key] = f"{scheme.name.replace('-', '_')}_{key}"
            if names[key] not in graph.weights:
                graph.attach(names[key], Held(value), trained=False)
        aliases = alias_names(graph, parameter)
        reads = [n for n in graph.nodes if n.op == "get_attr" and n.target in aliases]
        first = next(node for node in graph.nodes if any(read in node.all_input_nodes for read in reads))
        with graph.module.graph.inserting_before(first):
            tensors = [graph.parameter_node(name) for name in names.values()]
            matrix = graph.call(DEQUANTIZE, tensors, scheme.text, rows, columns, site.dtype, like=first)
        matrix.meta["quantized"] = parameter
        rest, operands = "", [matrix]
        if site.rows:
            rest = f"{prefix}_rest"
            shape = (reads[0].meta["val"].numel() // columns - rows, columns)
            graph.attach(rest, Deferred(shape, site.dtype, quantization.rest), trained=False)
            operands.append(graph.parameter_node(rest))
        value = matrix
        if site.rows or not stored_as_matrix(site):
            key = (site.kind, site.layout, site.shape, site.rows, site.dtype)
            if key not in traced:
                with graph.fake_mode:
                    traced[key] = trace_expression(
                        lambda *matrices: weight_of(site, *matrices), [o.meta["val"] for o in operands], {}
                    )
            value = splice(graph, traced[key], operands, first, {"quantized": parameter})
        if value.meta["val"].stride() == reads[0].meta["val"].stride():
            value.meta["val"] = reads[0].meta["val"]
        for read in reads:
            read.replace_all_uses_with(value)
            graph.module.graph.erase_node(read)
        for name in aliases:
            del graph.weights[name]
        graph.quantized[parameter] = QuantizedLeaf(
            quantization, self.entry, names, matrix.name, value.name, rest
        )


def _joined(sites: Sequence[WeightSite]) -> WeightSite:
    """One site for the sites of a tensor: the whole tensor's if it is among them, else all rows of the slices."""
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
    """Forget that parameters are quantized, and drop the tensors they were stored in that nothing reads any more."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in [name for name in parameters if name in graph.quantized]:
        quantized = graph.quantized.pop(name)
        for tensor in (*quantized.tensors.values(), quantized.rest):
            if tensor not in read and tensor in graph.weights:
                graph.detach(tensor)
