"""For inference: the graph as an exporter wants it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adaptc.graph import Graph, is_tensor
from adaptc.pipeline import PASSES
from adaptc.tracing.export import LABELS

aten = torch.ops.aten


def inference_graph(graph: Graph) -> Graph:
    """A copy that only evaluates: dropout is gone, tied weights have one name, integers are plain, and a loss and its
    labels are left out where other outputs remain and need no labels.
    """
    graph = graph.copy()
    nodes = graph.module.graph
    _evaluate(nodes)
    kept = _kept_outputs(graph)
    output = next(n for n in nodes.nodes if n.op == "output")
    flat = _results(output)
    output.args = (tuple(flat[i] for i in kept),)
    nodes.set_codegen(CodeGen())
    for node in list(nodes.nodes):
        if node.op == "get_attr" and graph.aliases.get(str(node.target), node.target) != node.target:
            node.target = graph.aliases[str(node.target)]
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # the decompositions may lay a tensor out in another order
        elif node.target is aten.conv3d.default:
            _spell_out(node)
    nodes.eliminate_dead_code()
    for node in [n for n in nodes.nodes if n.op == "placeholder" and not n.users]:
        nodes.erase_node(node)
    names = {n.target for n in nodes.nodes if n.op == "placeholder"}
    graph.inputs = tuple(spec for spec in graph.inputs if spec.name in names)
    graph.outputs = tuple(graph.outputs[i] for i in kept)
    PASSES["plain-integers"]().call(graph)
    graph.module.recompile()
    return graph


def _spell_out(node: fx.Node) -> None:
    """A convolution with all its options: of `conv3d` without a bias onnxscript (0.7) makes one of a wrong shape."""
    defaults: tuple[Any, ...] = (None, [1] * 3, [0] * 3, [1] * 3, 1)
    bias, stride, padding, dilation, groups = (*node.args[2:], *defaults[len(node.args) - 2 :])
    node.target = aten.convolution.default
    node.args = (*node.args[:2], bias, stride, padding, dilation, False, [0] * 3, groups)


def _evaluate(nodes: fx.Graph) -> None:
    for flag in [n for n in nodes.nodes if n.op == "get_attr" and n.target == "training"]:
        for user in list(flag.users):
            if user.target is aten.dropout.default:
                user.replace_all_uses_with(user.args[0])  # type: ignore[arg-type]
                nodes.erase_node(user)
            else:
                user.args = tuple(False if a is flag else a for a in user.args)
        nodes.erase_node(flag)


def _kept_outputs(graph: Graph) -> list[int]:
    """The outputs but for losses, which are scalars that need labels; all of them where there is nothing else."""
    tainted: set[fx.Node] = {n for n in graph.placeholders if n.target == LABELS}
    for node in graph.nodes:
        if any(operand in tainted for operand in node.all_input_nodes) and node.op != "output":
            tainted.add(node)
    flat = _results(next(n for n in graph.nodes if n.op == "output"))
    tensors = [i for i, value in enumerate(flat) if is_tensor(value)]
    losses = [i for i in tensors if flat[i] in tainted and flat[i].meta["val"].dim() == 0]
    return [i for i in tensors if i not in losses] or tensors


def _results(output: fx.Node) -> list[Any]:
    results = output.args[0]
    return list(results) if isinstance(results, (list, tuple)) else [results]
