"""Virtual tokens in front of a text as a first past: the graph without them, and their keys and values."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.errors import Refusal
from adaptc.inputs import InputSpec
from adaptc.ir.analysis.token_map import content_of, find_joins
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter
from adaptc.ir.nodes import REAL, operation, provenance
from adaptc.ir.verify import refresh
from adaptc.rewriter.cache.cross import STAGES, give_alone, heads_of
from adaptc.rewriter.cache.inputs import forget_unread, new_tokens, token_ids
from adaptc.rewriter.cache.past import TOTAL, as_input
from adaptc.rewriter.insert.virtual_tokens import filler_of
from adaptc.rewriter.pipeline import Pass, run
from adaptc.weights import Deferred, Weight

aten = torch.ops.aten


def virtual_tokens(graph: Graph) -> list[fx.Node]:
    """The nodes that put virtual tokens among those of the token ids; empty where there are none."""
    ids = token_ids(graph)
    marked = [node for node in graph.nodes if REAL in node.meta]
    return [node for node in marked if isinstance(ids, fx.Node) and node.meta[REAL][0] == ids.name]


@dataclass(frozen=True)
class WithoutVirtualTokens(Pass):
    """`f([P; E(ids)])` becomes `f(E(ids))`: the virtual tokens in front are taken out.

    Behind their keys and values, see `FirstPast`, it computes what the whole did.
    """

    name: ClassVar[str] = "without-virtual-tokens"
    takes: ClassVar[frozenset[str]] = STAGES
    changes_results: ClassVar[bool] = True

    def requires(self, graph: Graph) -> list[Refusal]:
        """All virtual tokens are in front."""
        among = [node for node in virtual_tokens(graph) if not node.meta[REAL][2]]
        if not among:
            return []
        reason = "virtual tokens at given positions stand behind real ones, and a cache can hold them in front alone"
        notes = (*provenance(among[0]), "leave `positions` out, or emit without a cache")
        return [Refusal(reason, (among[0].name,), notes)]

    def call(self, graph: Graph) -> bool:
        """Let what reads real and virtual tokens read the real ones alone."""
        nodes, longer = graph.by_name(), virtual_tokens(graph)
        for node in reversed(longer):  # of several, the outputs of one are cut from those of the next
            node.replace_all_uses_with(nodes[node.meta[REAL][1]])
        graph.module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        forget_unread(graph)
        refresh(graph)
        return bool(longer)


@dataclass(frozen=True)
class FirstPast(Pass):
    """The keys and values of the virtual tokens: outputs `past_key_values.{i}.key` and `.value`.

    They are `(batch, heads, virtual, size)`, the same in every row, whatever the real tokens are: no token sees a
    later one.
    """

    name: ClassVar[str] = "first-past"
    takes: ClassVar[frozenset[str]] = STAGES
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Leave out what follows them."""
        count, (ids, results) = _count(graph), (token_ids(graph), dict[str, fx.Node]())
        assert isinstance(ids, fx.Node)
        joins, _ = find_joins(graph.nodes, content_of(ids))
        end = next(node for node in graph.nodes if node.op == "output")
        with graph.module.graph.inserting_before(end):
            for join in joins:
                tokens = join.tokens
                every = as_input(graph, tokens, tokens.node, heads_of(graph, join))
                results[join.name] = graph.call(aten.slice.Tensor, every, 2, 0, count, like=tokens.node)
        give_alone(graph, results)
        return True


def _count(graph: Graph) -> int:
    """How many virtual tokens there are."""
    ids = token_ids(graph)
    assert isinstance(ids, fx.Node)
    longer = [node for node in virtual_tokens(graph) if node.meta[REAL][1] == ids.name]
    return int(max(node.meta["val"].shape[1] - ids.meta["val"].shape[1] for node in longer))


def one_token(inputs: tuple[InputSpec, ...]) -> dict[str, torch.Tensor]:
    """Inputs of one row of one token, all zeros, to compute a first past with."""
    return {
        spec.name: torch.zeros(
            [1 if isinstance(dim, str) else dim for dim in spec.dims], dtype=getattr(torch, spec.dtype)
        )
        for spec in inputs
    }


def first_past(graph: Graph) -> dict[str, Weight]:
    """The keys and values of a graph's virtual tokens, computed in float32 when they are read.

    Returns:
        The name of an input of the graph with a cache -> `(1, heads, virtual, size)`; empty without virtual tokens.
    """
    if not virtual_tokens(graph):
        return {}
    part = run(graph, [FirstPast()])

    @cache
    def computed() -> Mapping[str, torch.Tensor]:
        outcome = Interpreter(part, torch.float32).on({"": one_token(part.inputs)}).outcomes[""]
        if isinstance(outcome, Exception):
            raise outcome
        return dict(zip(part.outputs, outcome, strict=True))

    def weight(name: str, value: torch.Tensor) -> Weight:
        return Deferred((1, *map(int, value.shape[1:])), value.dtype, lambda: computed()[name])

    results: Any = next(node for node in part.nodes if node.op == "output").args[0]
    return {name: weight(name, node.meta["val"]) for name, node in zip(part.outputs, results, strict=True)}


@dataclass(frozen=True)
class Behind(Pass):
    """A graph with a cache whose every past, the empty one too, is behind a first past.

    The caller counts and masks real tokens alone: positions, masks and the keys and values that the graph gives are of
    those.

    Attributes:
        first: the name of an input with a past -> the keys or values in front of it, `(1, heads, virtual, size)`.
    """

    first: Mapping[str, Weight]

    name: ClassVar[str] = "behind-first-past"
    takes: ClassVar[frozenset[str]] = STAGES
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Put the first past in front, show it in masks, and count positions behind it."""
        ids, new = token_ids(graph), new_tokens(graph)
        assert isinstance(ids, fx.Node)
        count = next(iter(self.first.values())).shape[2]
        parts = {name: _attached(graph, name, weight) for name, weight in self.first.items()}
        start = next(node for node in graph.nodes if node.op == "call_function")
        with graph.module.graph.inserting_before(start):
            batch = graph.call(aten.sym_size.int, ids, 0, like=ids)
        for node, spec in zip(graph.placeholders, graph.inputs, strict=True):
            if spec.name in parts:
                _put_in_front(graph, node, parts[spec.name], batch, count)
            elif TOTAL in spec.dims or new in spec.dims:
                filler = filler_of(graph, node, ids)
                assert filler is not None, "an input that virtual tokens have no value for is refused before"
                with graph.module.graph.inserting_before(start):
                    _count_real(graph, node, spec, filler, count)
        refresh(graph)
        return True


def _attached(graph: Graph, name: str, weight: Weight) -> fx.Node:
    tensor = f"first.{name}"
    graph.attach(tensor, weight, trained=False)
    return graph.parameter_node(tensor)


def _put_in_front(graph: Graph, past: fx.Node, first: fx.Node, batch: fx.Node, count: int) -> None:
    """Let attention read the first past in front of what it joins; where the past is measured, measure both."""
    for user in list(past.users):
        with graph.module.graph.inserting_before(user.next):
            if operation(user) == "sym_size":
                longer = graph.call(operator.add, user, count, like=user)
            else:
                parts: Any = user.args[0]
                shown = graph.call(aten.expand.default, first, [batch, -1, -1, -1], like=user)
                longer = graph.call(aten.cat.default, [shown, *parts], 2, like=user)
        readers = [other for other in user.users if other.op != "output" and other is not longer]
        for reader in readers:
            reader.replace_input_with(user, longer)


def _count_real(graph: Graph, node: fx.Node, spec: InputSpec, filler: int | str, count: int) -> None:
    """Let what reads an input of the real tokens read one that tells of the virtual ones too."""
    readers, longer = list(node.users), node
    if filler == "position":
        longer = graph.call(aten.add.Tensor, node, count, like=node)
    if TOTAL in spec.dims:
        axis = spec.dims.index(TOTAL)
        sizes: list[Any] = [
            graph.call(aten.sym_size.int, node, at, like=node) for at in range(len(spec.dims))
        ]
        sizes[axis] = count
        if filler == "position":
            shown = graph.call(aten.arange.default, count, like=node, device=torch.device("cpu"))
            virtual = graph.call(aten.expand.default, shown, sizes, like=node)
        else:
            virtual = graph.call(aten.new_full.default, node, sizes, filler, like=node)
        longer = graph.call(aten.cat.default, [virtual, longer], axis, like=node)
    for reader in readers if longer is not node else []:
        if reader.op != "output":
            reader.replace_input_with(node, longer)
