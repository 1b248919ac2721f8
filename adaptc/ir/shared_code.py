"""The code of a graph whose own tensors are arguments: graphs that differ in these alone have the same code."""

# torch has no public way to ask how a graph's code is called.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from adaptc.ir.nodes import map_operands

Key = tuple[str, tuple[tuple[str, int], ...]]
"""What graphs of one code have in common: its text, and what the names in it mean."""


@dataclass(frozen=True)
class SharedCode:
    """The code of one or more graphs.

    Attributes:
        key: what they have in common.
        source: its text.
        run: takes the module, the own tensors of one of the graphs, then its inputs by position or by name; gives the
            outputs as a flat tuple.
    """

    key: Key
    source: str
    run: Callable[..., tuple[Any, ...]]


def own_reads(graph: fx.Graph, base: Collection[str]) -> tuple[str, ...]:
    """The tensors that a graph reads beside those of the base: their names, in the order in which it reads them.

    Args:
        graph: the graph.
        base: the names of the base's tensors.
    """
    names = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
    return tuple(name for name in names if name not in base and name != "training")


def shared_code(
    module: nn.Module, graph: fx.Graph, reads: Collection[str], earlier: Mapping[Key, SharedCode]
) -> SharedCode:
    """The code of a graph.

    Args:
        module: what the graph reads the base's tensors from.
        graph: is not changed.
        reads: the names of its own tensors, in the order in which the code takes them.
        earlier: code that was made before, which is given again where it is the same.
    """
    called = _with_arguments(graph, reads)
    code = called.python_code("self")
    key = code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items()))
    if key in earlier:
        return earlier[key]
    made = fx.GraphModule(module, called)
    return SharedCode(key, code.src, cast("Any", made).forward.__func__)


def _with_arguments(graph: fx.Graph, reads: Collection[str]) -> fx.Graph:
    """A graph that takes its own tensors, then the inputs; its nodes are named by what they do and their order."""
    called = fx.Graph()
    called.set_codegen(CodeGen())
    tensors = {name: called.placeholder(f"adapter_{place}") for place, name in enumerate(reads)}
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in tensors:
            values[node] = tensors[str(node.target)]
        elif node.op == "placeholder":
            values[node] = called.placeholder(str(node.target))
        elif node.op == "output":
            results: Any = pytree.tree_map_only(fx.Node, values.__getitem__, node.args[0])
            called.output(tuple(pytree.tree_leaves(results)))
        else:
            args, kwargs = map_operands(node, values.__getitem__)
            values[node] = called.create_node(node.op, node.target, args, kwargs)
    return called
