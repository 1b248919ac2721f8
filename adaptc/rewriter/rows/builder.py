"""Operations that are put behind those of a graph, each once: what two adapters compute alike is one node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg

from adaptc.ir.adaptation import Adaptation
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, PROVENANCE, is_operator, writes_in_place

COPIED = (*PROVENANCE, ADAPTATION, "val")
"""What a copied node keeps of the meta of its original."""


class Builder:
    """Puts operations behind those of a graph.

    Args:
        graph: changed in place.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self._output = next(node for node in graph.nodes if node.op == "output")
        self._nodes: dict[Any, fx.Node] = {}
        self.original = [node for node in graph.nodes if node.op == "call_function"]
        for node in self.original:
            self._nodes.setdefault(key_of(node.target, node.args, node.kwargs), node)
        self._tensors = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}

    def tensor(self, name: str) -> fx.Node:
        """The node of a weight, or of the module's mode."""
        if name not in self._tensors:
            self._tensors[name] = self._read(name)
        return self._tensors[name]

    def _read(self, name: str) -> fx.Node:
        graph = self.graph.module.graph
        if name in self.graph.weights:
            return self.graph.parameter_node(name)
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            return graph.create_node("get_attr", name)

    def copied(self, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A node of another graph with these operands, which have the shapes of its own.

        Args:
            node: an operation.
            values: each of its operands -> the value in this graph.
        """
        args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)  # type: ignore[arg-type]
        key = key_of(node.target, args, kwargs)
        if key not in self._nodes or not _is_pure(node):
            self._nodes[key] = self._made(node, args, kwargs)
        return self._nodes[key]

    def _made(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        with self.graph.module.graph.inserting_before(self._output):
            made = self.graph.module.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        made.meta = {k: v for k, v in node.meta.items() if k in COPIED}
        return made

    def call(
        self,
        target: Any,
        *args: Any,
        like: fx.Node,
        mark: Adaptation | None = None,
        named: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        """An operation of its own, whose value is computed.

        Args:
            target: the operation.
            args: its arguments.
            like: the node whose provenance it takes.
            mark: the adaptation that it belongs to.
            named: its arguments by keyword.
        """
        key = key_of(target, args, named or {})
        if key not in self._nodes:
            with self.graph.module.graph.inserting_before(self._output):
                self._nodes[key] = self.graph.call(target, *args, like=like, **(named or {}))
            if mark is not None:
                self._nodes[key].meta[ADAPTATION] = mark
        return self._nodes[key]

    def give(self, results: Any) -> None:
        """Let the graph give these values, and drop what nothing reads any more.

        Args:
            results: in the structure of the outputs.
        """
        self._output.args = (results,)

    def drop(self, read: set[fx.Node]) -> None:
        """Drop the original operations that others stand for now, though they may write to a tensor.

        Args:
            read: those that stay.
        """
        for node in reversed(self.original):
            if node not in read and not node.users:
                self.graph.module.graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    """Whether an operation gives the same whenever it runs on the same operands, and changes none."""
    random = is_operator(node.target) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not writes_in_place(node.target)


def key_of(target: object, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What two operations that compute the same have in common."""
    return target, _frozen(args), tuple((name, _frozen(value)) for name, value in sorted(kwargs.items()))


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in cast("list[Any]", value))
    if isinstance(value, fx.Node):
        return value
    return type(value), str(value) if type(value) is slice else value
