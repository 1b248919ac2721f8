"""Insert a weight method: its expression goes in front of every chosen site."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from adaptc.errors import DefinitionError, Fault, Refusal, RefusedError
from adaptc.ir.aliases import untie, used_elsewhere, with_all_uses
from adaptc.ir.analysis.dataflow import ancestors
from adaptc.ir.graph import Graph
from adaptc.ir.selection import Selection
from adaptc.methods.method import WeightMethod
from adaptc.methods.param import Param
from adaptc.methods.site import WeightSite
from adaptc.quantization.quantized_weight import Quantization, QuantizedLeaf
from adaptc.registry.author import place_of_function
from adaptc.rewriter.expression import splice
from adaptc.rewriter.insert.base import Insert


@dataclass(frozen=True)
class InsertWeight(Insert[WeightMethod, WeightSite], inserts=WeightMethod):
    """`linear(x, W, b)` becomes `linear(x, E(W, θ), E(b, θ))` at every site the target names."""

    def refused(self, site: WeightSite) -> Fault | None:
        """The option at fault and why the method cannot be inserted at a site; None if it can."""
        if site.computed_bias and self.method.at(site).adapts_bias():
            return Fault(
                (), "the bias here is computed from other parameters, so it cannot be adapted with the weight"
            )
        return super().refused(site)

    def selection(self, graph: Graph) -> Selection[WeightSite]:
        """The sites that the target matches; with `on_alias: share`, of those with the same tensor the first."""
        selection = super().selection(graph)
        if self.on_alias != "share":
            return selection
        first = {(graph.aliases[site.parameter], site.rows): site for site in reversed(selection.sites)}
        return replace(selection, sites=tuple(site for site in selection.sites if site in first.values()))

    def requires(self, graph: Graph) -> list[Refusal]:
        """The target matches, names are free, a compensating method has a residual, no quantized weight is untied."""
        refusals = super().requires(graph)
        for site in self.selection(graph).sites:
            quantized = graph.quantized.get(site.parameter)
            if self.method.compensates:
                refusals += self._not_compensated(graph, site, quantized)
            if self.on_alias == "untie" and quantized is not None and used_elsewhere(graph, site):
                reason = f"the codes of {site.name} are read elsewhere too, so it cannot be untied"
                advice = "untie it before it is quantized: `passes: [insert, quantize]`"
                refusals.append(Refusal(reason, (site.node,), (advice,)))
        return refusals

    def _not_compensated(
        self, graph: Graph, site: WeightSite, quantized: QuantizedLeaf | None
    ) -> list[Refusal]:
        """Why the method cannot compensate quantization at a site; empty if it can."""
        start = f"{self.method.name} compensates quantization"
        otherwise = "or start the adapter otherwise"
        if quantized is None:
            reason = f"{start}, and {site.name} is not quantized here"
            advice = f"write `passes: [quantize, insert]`, name it in `quantize`, {otherwise}"
        elif quantized.quantization.packed is not None:
            reason = f"{start}, and the base stores {site.name} quantized, without the floats"
            advice = f"start from the float checkpoint and `quantize` it, {otherwise}"
        elif any(a.method.compensates and a.site.parameter == site.parameter for a in graph.adaptations):
            reason = f"{start} of {site.name}, which an earlier entry compensates already"
            advice = f"take one, {otherwise}"
        elif self.method.compensation_rounds > 1 and (site.rows or quantized.site.rows):
            reason, advice = f"{start} of slices of {site.name} once only", "leave `loftq_iter` out"
        else:
            return []
        return [Refusal(reason, (site.node,), (advice,))]

    def call(self, graph: Graph) -> bool:
        """Splice the expression in at every site."""
        method, sites = self.method, self.selection(graph).sites
        traced: dict[Any, fx.Graph] = {}
        nodes = graph.by_name()
        for site in sites:
            self._insert(graph, site, method.at(site), self.tensors(site, sites), traced, nodes)
        return True

    def _insert(
        self,
        graph: Graph,
        site: WeightSite,
        method: WeightMethod,
        tensors: dict[str, tuple[str, Param]],
        traced: dict[Any, fx.Graph],
        nodes: dict[str, fx.Node],
    ) -> None:
        if self.on_alias == "untie":
            site = untie(graph, site, nodes, bias=method.adapts_bias())
        if self.on_alias == "share":
            site = with_all_uses(graph, site)
        derived = any(not param.stored for _, param in tensors.values())
        # What is computed again on loading starts from the base, whatever earlier entries have learned by then.
        value = (
            graph.base_value(site.parameter)
            if derived
            else graph.current_value(site.parameter, site.uses, nodes)
        )
        theta = self.attached(graph, site, tensors, value)
        params = {argument: param for argument, (_, param) in tensors.items()}
        mark = self.recorded(graph, site, tensors)
        if method.compensates:
            _compensate(graph.quantized[site.parameter].quantization, method)
        targets = [(site.uses, _weight_of(method, site, params, method.stored(site)), site.parameter)]
        if site.bias is not None and method.adapts_bias():
            targets.append((site.bias_uses, _bias_of(method, site, params), site.bias))
        for uses, function, parameter in targets:
            before = graph.current_value(parameter, uses, nodes)
            values = {argument: node.meta["val"] for argument, node in theta.items()}
            shapes = tuple(tuple(value.shape) for value in (before.meta["val"], *values.values()))
            key = (repr(method), function.__name__, site.layout, site.rows, shapes, str(site.dtype))
            if key not in traced:
                with graph.fake_mode:
                    traced[key] = self.traced(
                        method, function.__name__, site, function, [before.meta["val"]], values
                    )
            result = splice(graph, traced[key], [before, *theta.values()], nodes[uses[0].node], mark)
            got, want = result.meta["val"], before.meta["val"]
            if got.shape != want.shape or got.dtype != want.dtype:
                raise DefinitionError(
                    f"method {method.name!r}: {function.__name__} gives {_described(got)} of {_described(want)} "
                    f"on {site}",
                    place_of_function(getattr(method, function.__name__)),
                )
            if (parameter, uses[0].node) in graph.adapted_weights and before not in ancestors(result):
                reason = f"{method.name} replaces what an earlier entry does to {site.module}; write it first"
                raise RefusedError([Refusal(reason, (uses[0].node,))], self)
            if got.stride() == want.stride():  # the same value, so that its users need not be verified again
                result.meta["val"] = want
            for use in uses:
                nodes[use.node].replace_input_with(before, result)
                graph.adapted_weights[parameter, use.node] = result.name
            nodes[result.name] = result


def _described(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _unpacked(params: Mapping[str, Param], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    unpack = {argument: param.unpack for argument, param in params.items()}
    return {a: call(v) if (call := unpack[a]) is not None else v for a, v in values.items()}


def _weight_of(
    method: WeightMethod, site: WeightSite, params: Mapping[str, Param], unshared: Collection[str]
) -> Callable[..., torch.Tensor]:
    """The method's expression on the stored weight: on each of its matrices, or the rows of a slice.

    `unshared` are the arguments that a site has for itself; where it holds several matrices, one for each.
    """

    def one(W: torch.Tensor, theta: dict[str, torch.Tensor]) -> torch.Tensor:
        return method.weight(W, **theta)

    each = (0, {argument: 0 if argument in unshared else None for argument in params})
    expression = torch.vmap(one, each) if site.batch is not None else one

    def weight(W: torch.Tensor, **values: torch.Tensor) -> torch.Tensor:
        return site.restored(expression(site.matrix(W), _unpacked(params, values)), W)

    return weight


def _bias_of(
    method: WeightMethod, site: WeightSite, params: Mapping[str, Param]
) -> Callable[..., torch.Tensor]:
    """The method's expression on the stored bias, or on the numbers of a slice."""

    def bias(b: torch.Tensor, **values: torch.Tensor) -> torch.Tensor:
        return site.bias_restored(method.bias(site.bias_of(b), **_unpacked(params, values)), b)

    return bias


def _compensate(quantization: Quantization, method: WeightMethod) -> None:
    """Let a weight be quantized in as many rounds as the method asks for, less what its adapter compensates."""
    flipped = quantization.site.kind == "embedding"

    def compensation(residual: torch.Tensor) -> torch.Tensor:
        return method.compensation(residual.t()).t() if flipped else method.compensation(residual)

    quantization.compensation_rounds, quantization.compensation = method.compensation_rounds, compensation
