"""Evaluate: a graph is prepared for ONNX by leaving out what only training or a loss needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx
from torch.fx.graph import CodeGen

from adaptc.inputs import LABELS
from adaptc.ir.graph import Graph
from adaptc.ir.laws import DROPOUTS
from adaptc.ir.nodes import is_tensor, node_arg
from adaptc.ir.state import written_weights
from adaptc.rewriter.pipeline import PASSES, Pass, run
from adaptc.tracing.export import CHECKS

aten = torch.ops.aten


@dataclass(frozen=True)
class Evaluate(Pass):
    """dropout(x, p, training) = x; every other use of `training` is False; a tied weight is read under one name.

    A loss and its labels are left out where other outputs remain and need no labels. Operations that the exporter
    translates wrongly are replaced by equal ones: `view` by `reshape`, `conv3d` by `convolution`. What the model writes
    to a weight or buffer goes to a copy. What only checks values is left out: a program raises no such errors.
    """

    name: ClassVar[str] = "evaluate"
    leaves: ClassVar[str | None] = "evaluated"

    def call(self, graph: Graph) -> bool:
        """Rewrite outputs, operations, names of weights and inputs."""
        nodes, before = graph.module.graph, graph.text()
        _leave_training(nodes)
        _keep_outputs(graph, _outputs_without_losses(graph))
        for node in list(nodes.nodes):
            if node.op == "get_attr":
                node.target = graph.aliases.get(str(node.target), node.target)
            elif node.target is aten.view.default:
                node.target = aten.reshape.default  # the decompositions may lay a tensor out in another order
            elif node.target is aten.conv3d.default:
                _spell_out(node)
            elif node.target in CHECKS:
                nodes.erase_node(node)
            elif node.target in DROPOUTS and node.args[1] == 0:
                node.replace_all_uses_with(node_arg(node, 0))
                nodes.erase_node(node)  # drawing random numbers, it is not taken for unused
        _write_to_copies(graph)
        nodes.eliminate_dead_code()
        for node in [n for n in nodes.nodes if n.op == "placeholder" and not n.users]:
            nodes.erase_node(node)
        names = {n.target for n in nodes.nodes if n.op == "placeholder"}
        graph.inputs = tuple(spec for spec in graph.inputs if spec.name in names)
        return graph.text() != before


def _write_to_copies(graph: Graph) -> None:
    """Let operations write to copies of weights: those of a program are constants, and each call starts from them."""
    for name, writer in written_weights(graph.nodes).items():
        readers = graph.module.graph.find_nodes(op="get_attr", target=name)
        first, *others = readers
        with graph.module.graph.inserting_after(first):
            copied = graph.call(aten.clone.default, first, like=writer)
        for reader in others:
            reader.replace_all_uses_with(copied)
        first.replace_all_uses_with(copied)
        copied.args = (first,)


def _spell_out(node: fx.Node) -> None:
    """Make a `conv3d` a convolution with all its options: onnxscript 0.7 gives one without bias a wrong shape."""
    defaults: tuple[Any, ...] = (None, [1] * 3, [0] * 3, [1] * 3, 1)
    bias, stride, padding, dilation, groups = (*node.args[2:], *defaults[len(node.args) - 2 :])
    node.target = aten.convolution.default
    node.args = (*node.args[:2], bias, stride, padding, dilation, False, [0] * 3, groups)


def _leave_training(nodes: fx.Graph) -> None:
    """Remove dropouts, and let every other use of `training` be False."""
    for flag in [n for n in nodes.nodes if n.op == "get_attr" and n.target == "training"]:
        for user in list(flag.users):
            if user.target is aten.dropout.default:
                x: Any = user.args[0]
                user.replace_all_uses_with(x)
                nodes.erase_node(user)
            else:
                user.args = tuple(False if a is flag else a for a in user.args)
        nodes.erase_node(flag)


def _keep_outputs(graph: Graph, indices: Sequence[int]) -> None:
    """Let the graph give only these of its outputs, as a plain tuple."""
    output = next(n for n in graph.nodes if n.op == "output")
    results = _results(output)
    output.args = (tuple(results[i] for i in indices),)
    graph.outputs = tuple(graph.outputs[i] for i in indices)
    graph.module.graph.set_codegen(CodeGen())


def _outputs_without_losses(graph: Graph) -> list[int]:
    """The indices of the tensor outputs but losses, which are scalars that need labels; of all if all are losses."""
    tainted: set[fx.Node] = {n for n in graph.placeholders if n.target == LABELS}
    for node in graph.nodes:
        if any(operand in tainted for operand in node.all_input_nodes) and node.op != "output":
            tainted.add(node)
    results = _results(next(n for n in graph.nodes if n.op == "output"))
    tensors = [i for i, value in enumerate(results) if is_tensor(value)]
    losses = [i for i in tensors if results[i] in tainted and results[i].meta["val"].dim() == 0]
    return [i for i in tensors if i not in losses] or tensors


def _results(output: fx.Node) -> list[Any]:
    """The operands of an output node."""
    results: Any = output.args[0]
    return list(cast("Sequence[Any]", results)) if isinstance(results, (list, tuple)) else [results]


def evaluate(graph: Graph) -> Graph:
    """A copy of a graph ready to be written as ONNX: integers are plain, and what only training needs is left out."""
    return run(graph, [PASSES["plain-integers"](), Evaluate()])
