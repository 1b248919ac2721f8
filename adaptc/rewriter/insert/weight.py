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
class InsertWeight(Insert[WeightMethod], inserts=WeightMethod):
    """`linear(x, W, b)` becomes `linear(x, E(W, θ), E(b, θ))` at every site the target names."""

    def refused(self, site: WeightSite) -> Fault | None:
        """The option at fault and why this cannot be inserted at a site; None if it can."""
        if site.computed_bias and self.method.at(site).adapts_bias():
            return Fault(
                (), "the bias here is computed from other parameters, so it cannot be adapted with the weight"
            )
        return super().refused(site)

    def selection(self, graph: Graph) -> Selection[WeightSite]:
        """What the target matches; of sites that share a tensor and change together, the first."""
        found = super().selection(graph)
        if self.on_alias != "share":
            return found
        first = {(graph.aliases[site.parameter], site.rows): site for site in reversed(found.sites)}
        return replace(found, sites=tuple(site for site in found.sites if site in first.values()))

    def requires(self, graph: Graph) -> list[Refusal]:
        """Besides: what makes up for quantization finds some, and no bits are untied."""
        refusals = super().requires(graph)
        for site in self.selection(graph).sites:
            quantized = graph.quantized.get(site.parameter)
            reason = self._not_compensated(graph, site, quantized) if self.method.compensates else None
            if self.on_alias == "untie" and quantized is not None and used_elsewhere(graph, site):
                words = f"the bits of {site.name} are read elsewhere too, and cannot be untied"
                reason = (words, "untie it before it is quantized: `passes: [insert, quantize]`")
            if reason is not None:
                refusals.append(Refusal(reason[0], (site.node,), reason[1:]))
        return refusals

    def _not_compensated(
        self, graph: Graph, site: WeightSite, quantized: QuantizedLeaf | None
    ) -> tuple[str, str] | None:
        """Why the method cannot make up for what quantization loses, and what to do; None if it can."""
        what, otherwise = f"{self.method.name} makes up for quantization", "or start the adapter otherwise"
        if quantized is None:
            way = f"write `passes: [quantize, insert]`, name it in `quantize`, {otherwise}"
            return f"{what}, and no bits stand for {site.name} here", way
        if quantized.quantization.kept is not None:
            way = f"start from the float checkpoint and `quantize` it, {otherwise}"
            return f"{what}, and the base holds {site.name} in bits only", way
        if any(a.method.compensates and a.site.parameter == site.parameter for a in graph.adaptations):
            return f"{what} of {site.name}, which an earlier entry does already", f"take one, {otherwise}"
        if self.method.compensation_rounds > 1 and (site.rows or quantized.site.rows):
            return f"{what} of slices of {site.name} once only", "leave `loftq_iter` out"
        return None

    def call(self, graph: Graph) -> bool:
        """Splice the expression at every site."""
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
        named: dict[str, tuple[str, Param]],
        traced: dict[Any, fx.Graph],
        nodes: dict[str, fx.Node],
    ) -> None:
        if self.on_alias == "untie":
            site = untie(graph, site, nodes, bias=method.adapts_bias())
        if self.on_alias == "share":
            site = with_all_uses(graph, site)
        own = method.stored(site)
        derived = any(not param.stored for _, param in named.values())
        # What is computed again on loading starts from the base, whatever earlier entries will have learned.
        value = (
            graph.base_value(site.parameter)
            if derived
            else graph.current_value(site.parameter, site.uses, nodes)
        )
        theta = self.attached(graph, site, named, value)
        params = {argument: param for argument, (_, param) in named.items()}
        mark = self.recorded(graph, site, named)
        if method.compensates:
            _quantize_without(graph.quantized[site.parameter].quantization, method)
        targets = [(site.uses, _weight_of(method, site, params, own), site.parameter)]
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
                words = f"{method.name} replaces what an earlier entry does to {site.module}; write it first"
                raise RefusedError([Refusal(words, (uses[0].node,))], self)
            if got.stride() == want.stride():  # then what reads it needs no other check than before
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
    method: WeightMethod, site: WeightSite, params: Mapping[str, Param], own: Collection[str]
) -> Callable[..., torch.Tensor]:
    """The method's expression on the stored weight: each of its matrices in turn, or the rows of a slice."""

    def one(W: torch.Tensor, theta: dict[str, torch.Tensor]) -> torch.Tensor:
        return method.weight(W, **theta)

    each = (0, {argument: 0 if argument in own else None for argument in params})
    expression = torch.vmap(one, each) if site.batch is not None else one

    def weight(W: torch.Tensor, **values: torch.Tensor) -> torch.Tensor:
        return site.restored(expression(site.matrix(W), _unpacked(params, values)), W)

    return weight


def _bias_of(
    method: WeightMethod, site: WeightSite, params: Mapping[str, Param]
) -> Callable[..., torch.Tensor]:
    def bias(b: torch.Tensor, **values: torch.Tensor) -> torch.Tensor:
        return site.bias_restored(method.bias(site.bias_of(b), **_unpacked(params, values)), b)

    return bias


def _quantize_without(quantization: Quantization, method: WeightMethod) -> None:
    """Let a weight be quantized without what an adapter on all of it makes up for."""
    flipped = quantization.site.kind == "embedding"

    def compensation(lost: torch.Tensor) -> torch.Tensor:
        return method.compensation(lost.t()).t() if flipped else method.compensation(lost)

    quantization.compensation_rounds, quantization.compensation = method.compensation_rounds, compensation
