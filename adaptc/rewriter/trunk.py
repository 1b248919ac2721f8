"""A graph cut at the first adapted place: the trunk, which no training changes, and the rest, which trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import fx
from torch.utils import _pytree as pytree

from adaptc.errors import Refusal, RefusedError
from adaptc.inputs import InputSpec
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.analysis.heads import results_of
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, is_tensor, size_expression
from adaptc.ir.verify import verify
from adaptc.rewriter.cache.cross import give_alone
from adaptc.rewriter.cache.past import add_input

FEATURES = "features"
"""The name of what the trunk gives; numbered where it gives several tensors."""


@dataclass(frozen=True)
class Cut:
    """The two parts of a graph: `rest(trunk(x), x)` is what the graph gives of x, as far as what trains reaches it.

    Attributes:
        trunk: gives the features; its outputs are named as the inputs of the rest are.
        rest: takes the features, and those of the graph's inputs that it reads itself.
    """

    trunk: Graph
    rest: Graph


def cut_trunk(graph: Graph) -> Cut:
    """Cut a graph in front of all that depends on a trained tensor.

    The rest computes again what takes no weight of the model, such as masks, and what takes weights alone. It gives the
    outputs that what trains reaches.

    Args:
        graph: a factored graph with adapters; it is not changed.

    Raises:
        RefusedError: nothing trains, or nothing that takes a weight comes before what trains.
    """
    end = next(node for node in graph.nodes if node.op == "output")
    trained = set(graph.adapter_names)
    starts = [node for node in graph.nodes if node.op == "get_attr" and node.target in trained]
    if not starts:
        raise RefusedError([Refusal("nothing trains, so that all of the model is its trunk")])
    live = set(walk(starts, lambda node: list(node.users)))
    features = {_name(number): node for number, node in enumerate(_features(graph, live))}
    if not features:
        first = next(node for node in graph.nodes if node in live and node.op == "call_function")
        reason = "what is trained comes first in the model, so that there is no trunk in front of it"
        raise RefusedError(
            [Refusal(reason, (first.name,), ("adapt later layers only, or put a head on it",))]
        )
    if len(features) == 1:
        features = {FEATURES: next(iter(features.values()))}
    outputs = {
        name: value for name, value in zip(graph.outputs, results_of(end), strict=True) if value in live
    }
    return Cut(_trunk(graph, features), _rest(graph, features, outputs))


def _name(number: int) -> str:
    return f"{FEATURES}_{number}"


def _features(graph: Graph, live: set[fx.Node]) -> Iterator[fx.Node]:
    """The values that what trains reads, of those that the model's weights and inputs were needed for; in order."""
    weights = {n for n in graph.nodes if n.op == "get_attr" and _is_of_model(graph, str(n.target))}
    of_weights = set(walk(weights, lambda node: list(node.users)))
    of_inputs = set(walk(graph.placeholders, lambda node: list(node.users)))
    frozen = (of_weights & of_inputs) - live

    def step(node: fx.Node) -> list[fx.Node]:
        measures = not is_tensor(node) and node.op == "call_function"
        return [] if node in frozen or measures else node.all_input_nodes

    reached = set(walk([node for node in live if node.op != "output"], step))
    yield from (node for node in graph.nodes if node in reached & frozen and is_tensor(node))


def _is_of_model(graph: Graph, name: str) -> bool:
    """Whether a tensor is a weight, in floats or in bits; not a constant such as the frequencies of positions."""
    bits = {tensor for leaf in graph.quantized.values() for tensor in leaf.tensors.values()}
    return name in bits or (name in graph.weights and name not in graph.buffers)


def _trunk(graph: Graph, features: Mapping[str, fx.Node]) -> Graph:
    """The part of a graph that gives the features."""
    trunk = graph.copy()
    nodes = trunk.by_name()
    give_alone(trunk, {name: nodes[node.name] for name, node in features.items()})
    _finish(trunk)
    return trunk


def _rest(graph: Graph, features: Mapping[str, fx.Node], outputs: Mapping[str, fx.Node]) -> Graph:
    """The part of a graph that takes the features."""
    rest = graph.copy()
    nodes = rest.by_name()
    dims = {
        size_expression(size): dim
        for node, spec in zip(graph.placeholders, graph.inputs, strict=True)
        for size, dim in zip(node.meta["val"].shape, spec.dims, strict=True)
        if isinstance(dim, str)
    }
    for name, node in features.items():
        value = node.meta["val"]
        taken = add_input(rest, name, value.shape, value.dtype)
        taken.meta["val"] = value
        nodes[node.name].replace_all_uses_with(taken)
        sizes = [
            size if isinstance(size, int) else dims.setdefault(size_expression(size), f"size_{len(dims)}")
            for size in value.shape
        ]
        spec = InputSpec(name, str(value.dtype).removeprefix("torch."), tuple(sizes))
        rest.inputs = (*rest.inputs, spec)
    give_alone(rest, {name: nodes[node.name] for name, node in outputs.items()})
    _take_by_name(rest)
    _finish(rest)
    return rest


def _finish(part: Graph) -> None:
    """Forget the weights and adaptations of the other part, and check this one."""
    part.clean()
    for node in part.nodes:
        if node.meta.get(ADAPTATION) not in part.adaptations:
            node.meta.pop(ADAPTATION, None)
    read = {str(node.target) for node in part.nodes if node.op == "get_attr"}
    for name in set(part.weights) - read:
        part.detach(name)
    verify(part)


def _take_by_name(graph: Graph) -> None:
    """Let a module of the graph take its inputs by name, and give its outputs by name."""
    names = [spec.name for spec in graph.inputs]
    taken = pytree.tree_structure(((), dict.fromkeys(names, 0)))
    given = pytree.tree_structure(dict.fromkeys(graph.outputs, 0))
    codegen: Any = fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(names, taken, given))  # pyright: ignore
    cast("Any", graph.module.graph).set_codegen(codegen)
