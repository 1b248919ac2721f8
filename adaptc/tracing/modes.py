"""Training mode as a node: one graph that follows `module.training`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from adaptc.errors import TraceError
from adaptc.graph import attribute
from adaptc.sites import source_of

aten = torch.ops.aten
DROPPED = "dropped"
"""Under this key, inserted dropout keeps the node whose value it drops from."""
IDENTITIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
"""Operations that a trace drops or keeps by memory layout, without a change of value."""


def training_node(graph: fx.Graph) -> fx.Node:
    """The node that reads `module.training`; made if there is none."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == "training":
            return node
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return graph.create_node("get_attr", "training")


def mark_training_arguments(graph: fx.Graph) -> None:
    """Make what a trace in training mode fixed follow the module: `train=True`, `training=True`, `dropout_p=p`."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for index, argument in enumerate(node.target._schema.arguments):
            keyword = argument.name in node.kwargs
            value = (
                node.kwargs.get(argument.name)
                if keyword
                else node.args[index]
                if index < len(node.args)
                else None
            )
            follows = _following(graph, node, argument.name, value)
            if follows is not None and keyword:
                node.update_kwarg(argument.name, follows)
            elif follows is not None:
                node.update_arg(index, follows)


def _following(graph: fx.Graph, node: fx.Node, argument: str, value: Any) -> fx.Node | None:
    if argument in ("train", "training") and value is True:
        own_statistics = (
            node.target is aten.batch_norm.default and node.args[3] is None
        )  # the same in both modes
        return None if own_statistics else training_node(graph)
    if node.target is aten.add_.Tensor and argument == "other" and value is True:  # batch norm's counter
        return training_node(graph)
    if argument == "dropout_p" and isinstance(value, float) and value > 0:
        return _scaled_by_training(graph, node, value)
    return None


def _scaled_by_training(graph: fx.Graph, node: fx.Node, p: float) -> fx.Node:
    flag = training_node(graph)
    with graph.inserting_before(node):
        return graph.call_function(operator.mul, (p, flag))


def follow_training(module: fx.GraphModule, other: fx.GraphModule) -> None:
    """Merge a trace in training mode into the trace in evaluation mode, in place.

    Where both differ in a literal, the literal becomes a node: `False`/`True` the module's `training`, `0`/`p`
    the product `p * training`. Dropout that only runs in training is inserted.

    Raises:
        TraceError: the model computes something else in training, beyond dropout and batch norm.
    """
    graph, pairs = module.graph, _Pairs()
    here = [n for n in graph.nodes if not _is_noise(n)]
    position = 0
    for theirs in other.graph.nodes:
        if theirs.op == "get_attr":
            pairs[theirs] = _same_weight(graph, theirs, other)
            continue
        if _is_noise(theirs):
            pairs[theirs] = pairs[theirs.args[0]]
            continue
        ours = here[position] if position < len(here) else None
        if ours is not None and (theirs.op, theirs.target) == (ours.op, ours.target):
            pairs[theirs] = ours
            position += 1
            _merge(graph, theirs, ours, pairs)
        elif theirs.target is aten.dropout.default and ours is not None:
            pairs[theirs] = _insert_dropout(graph, theirs, pairs, ours)
        elif _counts_batches(theirs) and ours is not None:
            _insert_count(graph, theirs, ours)
        else:
            _differs(theirs)
    if position < len(here):
        _differs(here[position])
    graph.lint()


class _Pairs(dict[Any, Any]):
    """A node of the training trace -> what stands for it here."""

    def __missing__(self, key: Any) -> Any:
        raise TraceError(f"the model reads {key} in training only, which adaptc cannot follow")


def _is_noise(node: fx.Node) -> bool:
    return node.op == "get_attr" or node.target in IDENTITIES


def _bare(node: fx.Node) -> fx.Node:
    """The node whose value this one passes on."""
    while node.target in IDENTITIES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _same_weight(graph: fx.Graph, theirs: fx.Node, other: fx.GraphModule) -> fx.Node | None:
    """The node here that reads the same weight, or constant of the same value; None if nothing does."""
    for node in graph.find_nodes(op="get_attr"):
        if node.target == theirs.target:
            return None if _constants_differ(node, theirs, other) else node
    return None


def _constants_differ(node: fx.Node, theirs: fx.Node, other: fx.GraphModule) -> bool:
    """Whether a constant of the graph itself, which carries its value, has another one in training."""
    ours = node.meta.get("constant")
    return ours is not None and not torch.equal(ours, attribute(other, str(theirs.target)))


def _merge(graph: fx.Graph, theirs: fx.Node, ours: fx.Node, pairs: _Pairs) -> None:
    if ours.op not in ("call_function", "output"):
        return
    width = max(len(theirs.args), len(ours.args))
    ours.args = tuple(
        _merge_value(graph, ours, _argument(ours, index), _argument(theirs, index), pairs)
        for index in range(width)
    )
    ours.kwargs = {
        key: _merge_value(graph, ours, ours.kwargs.get(key), theirs.kwargs.get(key), pairs)
        for key in {**ours.kwargs, **theirs.kwargs}
    }


def _argument(node: fx.Node, index: int) -> Any:
    if index < len(node.args):
        return node.args[index]
    return node.target._schema.arguments[index].default_value  # type: ignore[union-attr]


def _merge_value(graph: fx.Graph, node: fx.Node, ours: Any, theirs: Any, pairs: _Pairs) -> Any:
    if isinstance(ours, fx.Node) and isinstance(theirs, fx.Node):
        mapped = pairs[theirs]
        if mapped is None:
            return _differs(node)
        if _bare(ours) is mapped.meta.get(DROPPED):
            return mapped
        return ours if _bare(mapped) is _bare(ours) else _differs(node)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return type(ours)([_merge_value(graph, node, a, b, pairs) for a, b in zip(ours, theirs, strict=True)])
    if type(ours) is type(theirs) and ours == theirs:
        return ours
    if ours is False and theirs is True:
        return training_node(graph)
    if ours == 0 and isinstance(theirs, float):
        return _scaled_by_training(graph, node, theirs)
    return _differs(node)


def _insert_dropout(graph: fx.Graph, theirs: fx.Node, pairs: _Pairs, before: fx.Node) -> fx.Node:
    source = pairs[theirs.args[0]]
    if source is None:
        return _differs(theirs)
    flag = training_node(graph)
    with graph.inserting_before(before):
        node = graph.call_function(aten.dropout.default, (source, theirs.args[1], flag))
    node.meta = {k: v for k, v in theirs.meta.items() if k in ("nn_module_stack", "stack_trace")}
    node.meta |= {"val": source.meta["val"], DROPPED: _bare(source)}
    return node


def _counts_batches(node: fx.Node) -> bool:
    """Batch norm's counter: `num_batches_tracked.add_(1)`."""
    if node.target is not aten.add_.Tensor or node.kwargs or node.args[1] != 1:
        return False
    return isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"


def _insert_count(graph: fx.Graph, theirs: fx.Node, before: fx.Node) -> None:
    buffer = theirs.args[0]
    assert isinstance(buffer, fx.Node)
    flag = training_node(graph)
    with graph.inserting_before(before):
        ours = graph.get_attr(str(buffer.target))
        ours.meta["val"] = buffer.meta["val"]
        graph.call_function(aten.add_.Tensor, (ours, flag))


def _differs(node: fx.Node) -> Any:
    raise TraceError(
        f"the model computes differently in training, beyond dropout and batch norm: {node.format_node()}\n"
        f"  at {source_of(node) or 'an unknown source line'}\n"
        "  adaptc makes one graph for both modes; move that difference out of forward, or fix it by an argument"
    )
