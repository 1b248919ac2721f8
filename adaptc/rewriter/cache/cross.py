"""An encoder-decoder as two programs: the keys and values that a decoder reads of an encoder are computed once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx
from torch.fx.graph import CodeGen

from adaptc.errors import Refusal
from adaptc.inputs import InputSpec
from adaptc.ir.analysis.attention import find_attentions, keys_of, replace_operand, values_of
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.analysis.token_map import Join, content_of
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import operation, size_expression
from adaptc.ir.verify import refresh
from adaptc.rewriter.cache.inputs import drop_unread, forget_unread, token_ids
from adaptc.rewriter.cache.past import add_input, as_input, as_operand
from adaptc.rewriter.pipeline import Pass

STAGES = frozenset({"traced", "adapted", "factored", "folded", "evaluated"})
SOURCE = "source"
"""The name of the dimension of what an encoder gives, where no input has it."""


def crossed(graph: Graph) -> list[Join]:
    """Where the decoder reads keys and values that are computed from other inputs than the token ids."""
    ids = token_ids(graph)
    if isinstance(ids, Refusal):
        return []
    content, joins = content_of(ids), list[Join]()
    given = set(walk([n for n in graph.placeholders if n is not ids], lambda node: list(node.users)))
    attentions = [a for a in find_attentions(graph.nodes) if a.mixed in content and a.key not in content]
    for number, attention in enumerate(a for a in attentions if a.key in given):
        sides = {"cross.key": keys_of(attention), "cross.value": values_of(attention)}
        joins += [Join(number, kind, tokens) for kind, tokens in sides.items() if tokens is not None]
    return joins


@dataclass(frozen=True)
class Encoder(Pass):
    """The part of an encoder-decoder that is run once for each text.

    Its outputs are `present.{i}.cross.key` and `.value`, `(batch, heads, source, size)`, for each attention of the
    decoder to the encoder, and those of the model's outputs that no token id is needed for.
    """

    name: ClassVar[str] = "encoder"
    takes: ClassVar[frozenset[str]] = STAGES
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Leave the decoder out."""
        results = _without_ids(graph)
        end = next(node for node in graph.nodes if node.op == "output")
        with graph.module.graph.inserting_before(end):
            for join in crossed(graph):
                results[join.present] = as_input(graph, join.tokens, join.tokens.node, heads_of(graph, join))
        give_alone(graph, results)
        return True


@dataclass(frozen=True)
class Decoder(Pass):
    """The part of an encoder-decoder that is run for each token.

    The keys and values that the encoder gives are its inputs `past_key_values.{i}.cross.key` and `.value`.
    """

    name: ClassVar[str] = "decoder"
    takes: ClassVar[frozenset[str]] = STAGES
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Leave the encoder out, if there is one."""
        if not crossed(graph):
            return False
        encoder = _without_ids(graph)
        inputs = [(join, _insert(graph, join)) for join in crossed(graph)]
        graph.inputs = (*graph.inputs, *(_spec(graph, join, node) for join, node in inputs))
        for join, node in inputs:
            with graph.module.graph.inserting_before(join.tokens.user):
                whole = as_operand(graph, join.tokens, node)
            replace_operand(join.tokens.user, join.tokens.argument, whole)
        give_alone(graph, {name: node for name, node in _results(graph).items() if name not in encoder})
        return True


def _results(graph: Graph) -> dict[str, fx.Node]:
    """The outputs of a graph by name."""
    nodes: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    return dict(zip(graph.outputs, cast(Iterable[fx.Node], nodes), strict=True))


def _without_ids(graph: Graph) -> dict[str, fx.Node]:
    """The outputs that no token id is needed for."""
    ids = token_ids(graph)
    assert isinstance(ids, fx.Node)
    content = content_of(ids)
    return {name: node for name, node in _results(graph).items() if node not in content}


def heads_of(graph: Graph, join: Join) -> int:
    """How many heads an attention's keys or values have."""
    batches = [node.meta["val"].shape[0] for node in graph.placeholders if node.meta["val"].dim()]
    heads = join.tokens.count(batches)
    assert heads is not None
    return heads


def _insert(graph: Graph, join: Join) -> fx.Node:
    """Insert the input of keys or values that the encoder gives."""
    tokens, heads = join.tokens, heads_of(graph, join)
    value = tokens.node.meta["val"]
    batch = value.shape[0] if tokens.heads is not None else value.shape[0] // heads
    sizes = (batch, heads, value.shape[tokens.sequence], tokens.size)
    return add_input(graph, join.name.replace(".", "_"), sizes, value.dtype)


def _spec(graph: Graph, join: Join, node: fx.Node) -> InputSpec:
    """An input of keys or values, whose dimensions have the names that the other inputs give them."""
    value = node.meta["val"]
    names: dict[Any, Any] = {}
    for other, spec in zip(graph.placeholders, graph.inputs, strict=False):
        sizes = zip(other.meta["val"].shape, spec.dims, strict=True)
        names |= {size_expression(size): dim for size, dim in sizes if isinstance(dim, str)}
    dims = tuple(
        size if isinstance(size, int) else names.get(size_expression(size), SOURCE) for size in value.shape
    )
    return InputSpec(join.name, str(value.dtype).removeprefix("torch."), dims)


def give_alone(graph: Graph, results: dict[str, fx.Node]) -> None:
    """Let a graph give these outputs, and take only the inputs that they need."""
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(results.values()),)
    graph.outputs = tuple(results)
    graph.module.graph.set_codegen(CodeGen())
    nodes = graph.module.graph
    nodes.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    _measure_elsewhere(graph)
    drop_unread(graph)
    forget_unread(graph)
    refresh(graph)


def _measure_elsewhere(graph: Graph) -> None:
    """Read sizes and devices from inputs that are needed, where only those are read of another value."""
    output = next(node for node in graph.nodes if node.op == "output")
    by_value = set(walk([output], lambda node: [] if _measures(node) else node.all_input_nodes))
    needed = [node for node in graph.placeholders if node in by_value]
    places = {
        size_expression(size): (node, axis)
        for node in reversed(needed)
        for axis, size in enumerate(node.meta["val"].shape)
    }
    for user in [node for node in graph.nodes if _measures(node) and node.args[0] not in by_value]:
        if user.target is getattr:
            user.args = (needed[0], *user.args[1:])
        elif (place := places.get(size_expression(user.meta["val"]))) is not None:
            user.args = place
    graph.module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    _in_order(graph)


def _measures(user: fx.Node) -> bool:
    """Whether a node reads the size or the device of a tensor alone."""
    return user.target is getattr or operation(user) == "sym_size"


def _in_order(graph: Graph) -> None:
    """Put the inputs in front of all operations, in their order."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in graph.placeholders:
        first.prepend(node)
