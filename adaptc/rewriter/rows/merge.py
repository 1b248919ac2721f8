"""The pass that merges the graphs of alternatives into one, in which each row of a batch has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from adaptc.errors import Refusal, RefusedError
from adaptc.inputs import InputSpec, Values
from adaptc.ir.graph import Graph
from adaptc.ir.row_calls import IDS
from adaptc.rewriter.cache.past import add_input
from adaptc.rewriter.pipeline import Pass
from adaptc.rewriter.rows.builder import Builder
from adaptc.rewriter.rows.choice import Chooser
from adaptc.rewriter.rows.row_axis import Rows, batch_size, rows_of


@dataclass(frozen=True)
class MergeRows(Pass):
    """`f_0(x), f_1(x), ...` become one `f(x, ids)` that gives in row i what `f_{ids[i] + 1}` gives there.

    What the graphs compute alike on the same operands is computed once. Where they differ, each computes its own on
    all rows, and the right one is chosen row by row as soon as the shapes agree: what follows is shared again. Right
    for every method, wherever rows do not meet.

    Attributes:
        others: the graphs of the alternatives, each the base rewritten.
        names: theirs.
    """

    others: tuple[Graph, ...] = field(default=(), repr=False)
    names: tuple[str, ...] = ()

    name: ClassVar[str] = "merge-rows"
    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted", "factored", "folded"})
    leaves: ClassVar[str | None] = "factored"
    changes_results: ClassVar[bool] = True

    def requires(self, graph: Graph) -> list[Refusal]:
        """There are rows, and every alternative has the outputs that the base has."""
        rows = rows_of(graph)
        refusals = [rows] if isinstance(rows, Refusal) else []
        for other in self.others:
            if other.outputs != graph.outputs:
                name = other.adaptations[-1].adapter
                given, wanted = (", ".join(g.outputs) for g in (other, graph))
                reason = (
                    f"{name} gives {given}, and the base {wanted}: rows of one batch have the same outputs"
                )
                refusals.append(
                    Refusal(reason, notes=("name the output of a head as the base's: `output: ...`",))
                )
        return refusals

    def call(self, graph: Graph) -> bool:
        """Merge the graphs.

        Raises:
            RefusedError: an output is one value for all rows, and differs between alternatives.
        """
        rows = rows_of(graph)
        assert isinstance(rows, Rows)
        dims = next(s.dims[0] for s in graph.inputs if s.dims and isinstance(s.dims[0], str))
        for other in self.others:
            _take_tensors(graph, other)
        ids = add_input(graph, IDS, (batch_size(graph),), torch.int64)
        merge = _Merge(graph, [graph, *self.others], rows, ids)
        merge.run(self)
        count = len(self.others)
        values = Values(-1, count - 1, count / 2 - 1, count / 2, whole=True)
        graph.inputs = (*graph.inputs, InputSpec(IDS, "int64", (dims,), values=values))
        _take_by_name(graph)
        return True


def _take_tensors(graph: Graph, other: Graph) -> None:
    """Give a graph the tensors and adaptations of an alternative that it lacks."""
    present = set(graph.adaptations)
    graph.adaptations += [a for a in other.adaptations if a not in present]
    for name, weight in other.weights.items():
        if name not in graph.weights:
            graph.attach(name, weight, name not in other.buffers, name not in other.transient)
            graph.aliases[name] = other.aliases.get(name, name)


def _take_by_name(graph: Graph) -> None:
    """Let a module of the graph take the new input too."""
    codegen: Any = graph.module.graph._codegen  # pyright: ignore[reportPrivateUsage] (it has no public name)
    info = getattr(codegen, "pytree_info", None)
    if info is None:
        return
    names = [spec.name for spec in graph.inputs]
    spec = pytree.tree_structure(((), dict.fromkeys(names, 0)))
    codegen.pytree_info = info._replace(orig_args=names, in_spec=spec)


class _Merge:
    """The merge of some graphs.

    Args:
        graph: the base's, which becomes the merged one.
        graphs: the base's and those of the alternatives.
        rows: where rows are in a value.
        ids: the input that names the adapter of each row.
    """

    def __init__(self, graph: Graph, graphs: Sequence[Graph], rows: Rows, ids: fx.Node):
        self.graph, self.graphs = graph, graphs
        self.build = Builder(graph)
        self.choose = Chooser(self.build, rows, ids, len(graphs))
        self._named = [each.by_name() for each in graphs]
        self._values: list[dict[fx.Node, fx.Node]] = [{} for _ in graphs]
        self._inputs = {str(node.target): node for node in graph.placeholders}
        self._output = [next(n for n in each.nodes if n.op == "output") for each in graphs]
        self._open: set[str] = set()

    def run(self, source: Pass) -> None:
        """Merge all that the outputs are computed from.

        Raises:
            RefusedError: an output is one value for all rows, and differs between alternatives.
        """
        for node in self.build.original:
            if self._shared(node.name):
                self._merge(node.name)
        standing = set(self._values[0].values())
        results = [self._results(k) for k in range(len(self.graphs))]
        first, spec = pytree.tree_flatten(results[0])
        flat = [first, *(pytree.tree_leaves(other) for other in results[1:])]
        merged: list[Any] = []
        for name, values in zip(self.graph.outputs, zip(*flat, strict=True), strict=True):
            value = self._result(values)
            if value is None:
                reason = f"{name} is one value for all rows, and adapters differ in it"
                raise RefusedError([Refusal(reason, notes=("give each row an output of its own",))], source)
            merged.append(value[0])
        self.build.give(pytree.tree_unflatten(merged, spec))
        self.build.drop(standing)

    def _results(self, k: int) -> Any:
        """What a graph gives, as values of the merged one."""
        return map_arg(self._output[k].args[0], lambda node: self._value(k, node))  # type: ignore[arg-type,return-value]

    def _result(self, values: tuple[Any, ...]) -> tuple[Any] | None:
        """One output, chosen row by row; None if it cannot be."""
        if all(value is values[0] or value == values[0] for value in values):
            return (values[0],)
        if not all(isinstance(value, fx.Node) for value in values):
            return None
        chosen = self.choose.padded(values)
        return None if chosen is None else (chosen,)

    def _shared(self, name: str) -> bool:
        """Whether every graph has a node of this name, of the same operation on the same constants."""
        nodes = [named.get(name) for named in self._named]
        first = nodes[0]
        if first is None or first.op != "call_function":
            return False
        return all(n is not None and n.op == first.op and _constants(n) == _constants(first) for n in nodes)

    def _merge(self, name: str) -> None:
        """Merge the nodes of a name: its operands are chosen where their shapes agree."""
        nodes = [named[name] for named in self._named]
        if nodes[0] in self._values[0]:
            return
        self._open.add(name)
        operands = [
            tuple(self._value(k, operand) for operand in _operands(node)) for k, node in enumerate(nodes)
        ]
        self._open.discard(name)
        groups: dict[Any, list[int]] = {}
        for k, values in enumerate(operands):
            groups.setdefault(tuple(self.choose.kind(value) for value in values), []).append(k)
        for members in groups.values():
            node = nodes[members[0]]
            chosen = [
                self.choose.among({k: operands[k][position] for k in members})
                for position in range(len(operands[members[0]]))
            ]
            value = self.build.copied(node, dict(zip(_operands(node), chosen, strict=True)))
            for k in members:
                self._values[k][nodes[k]] = value

    def _value(self, k: int, node: fx.Node) -> fx.Node:
        """The value in the merged graph of a node of one of the graphs."""
        values = self._values[k]
        if node not in values and node.op == "placeholder":
            values[node] = self._inputs[str(node.target)]
        elif node not in values and node.op == "get_attr":
            values[node] = self.build.tensor(str(node.target))
        elif node not in values and node.name not in self._open and self._shared(node.name):
            self._merge(node.name)
        if node not in values:
            operands: Mapping[fx.Node, fx.Node] = {n: self._value(k, n) for n in _operands(node)}
            values[node] = self.build.copied(node, operands)
        return values[node]


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, in their order, each place once."""
    return [n for n in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(n, fx.Node)]


def _constants(node: fx.Node) -> Any:
    """A node's operation and arguments, without which nodes it reads."""
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    plain: list[Any] = [None if isinstance(leaf, fx.Node) else (type(leaf), leaf) for leaf in leaves]
    return node.target, plain, spec
