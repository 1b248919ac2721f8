"""Merge a trace in training mode into the trace in evaluation mode: one graph for both modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeGuard, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from adaptc.errors import TraceError
from adaptc.ir.nodes import get_tensor, source_of, writes_in_place
from adaptc.ir.training_mode import scaled_by_training, training_node
from adaptc.tracing.training_noise import IDENTITIES, Noise, is_size

aten = torch.ops.aten


def follow_training(module: fx.GraphModule, training: fx.GraphModule) -> None:
    """Merge a trace in training mode into the trace in evaluation mode, in place.

    Both traces are walked side by side. Where they differ in a literal, it becomes a node: `False`/`True` the
    module's `training`, `0`/`p` the product `p * training`. Dropout, other noise and the counter of batch norm,
    which only run in training, are inserted. Sizes are compared by value, wherever a trace computes them.

    Args:
        module: the trace in evaluation mode.
        training: the trace of the same model in training mode.

    Raises:
        TraceError: the model computes differently in training, beyond dropout, other noise and batch norm.
    """
    _Merge(module, training).run()


class _Merge:
    """The walk through both traces: `ours` is a node in evaluation mode, `theirs` one in training mode."""

    def __init__(self, module: fx.GraphModule, training: fx.GraphModule):
        self.module, self.graph, self.training = module, module.graph, training
        mode = next(n.meta["val"].fake_mode for n in self.graph.nodes if n.op == "placeholder")
        self.noise = Noise(self.graph, mode)
        self.buffers = {name for name, _ in module.named_buffers()}
        self.pairs = _Pairs()
        self.updated: set[fx.Node] = set()
        self.copies = {
            node: [user for user in node.users if user.target in IDENTITIES]
            for node in self.graph.find_nodes(op="get_attr")
        }
        self.unexplained: list[fx.Node] = []
        """Operations of training only whose value has not replaced one of ours yet."""

    def run(self) -> None:
        evaluation = [
            node
            for node in self.graph.nodes
            if not (
                node.op == "get_attr" or node.target in IDENTITIES or is_size(node) or self._detaches(node)
            )
        ]
        position = 0
        for theirs in self.training.graph.nodes:
            ours = evaluation[position] if position < len(evaluation) else None
            if theirs.op == "get_attr":
                self.pairs[theirs] = self._same_weight(theirs)
            elif theirs.target in IDENTITIES or self._passes_buffer(theirs):
                self.pairs[theirs] = self.pairs[theirs.args[0]]
                self._copy_after_update(theirs, ours)
            elif ours is None:
                self._differs(theirs)
            elif not is_size(theirs) and self._corresponds(ours, theirs):
                self.pairs[theirs] = ours
                position += 1
                self._merge(theirs, ours)
            elif _counter(theirs) is not None:
                self._insert_count(theirs, ours)
            else:
                self._insert(theirs, ours)
        if position < len(evaluation):
            self._differs(evaluation[position])
        self.noise.clean()
        self.graph.lint()

    def _same_weight(self, theirs: fx.Node) -> fx.Node | None:
        """Our node that reads the same weight, or a constant of the same value; None if there is none."""
        for ours in self.graph.find_nodes(op="get_attr", target=str(theirs.target)):
            constant = ours.meta.get("constant")  # the value, where it is a constant of the graph itself
            if constant is None or torch.equal(constant, get_tensor(self.training, str(theirs.target))):
                return ours
        weights = {*dict(self.module.named_parameters()), *self.buffers}
        return self._read(str(theirs.target)) if theirs.target in weights else None

    def _read(self, name: str) -> fx.Node:
        """A node that reads a weight, before all operations."""
        node = training_node(self.graph)
        with self.graph.inserting_before(node):
            read = self.graph.get_attr(name)
        read.meta["val"] = get_tensor(self.module, name)
        return read

    def _corresponds(self, ours: fx.Node, theirs: fx.Node) -> bool:
        """Whether both are the same operation on the same values; literals may differ."""
        if (ours.op, ours.target) != (theirs.op, theirs.target):
            return False
        if ours.op == "placeholder":
            return True
        a, b = (
            [leaf for leaf in pytree.tree_leaves((n.args, dict(n.kwargs))) if isinstance(leaf, fx.Node)]
            for n in (ours, theirs)
        )
        return len(a) == len(b) and all(
            self._same(x, self.pairs[y]) or self._becomes(x, y) for x, y in zip(a, b, strict=True)
        )

    def _becomes(self, ours: fx.Node, theirs: fx.Node) -> bool:
        """Whether a value of the training trace is what a buffer holds from then on: it is assigned at the end."""
        return ours.op == "get_attr" and any(
            user.target is aten.copy_.default
            and user.args[1] is theirs
            and cast(fx.Node, user.args[0]).target == ours.target
            for user in theirs.users
        )

    def _same(self, ours: fx.Node, mapped: fx.Node | None) -> bool:
        if mapped is None:
            return False
        if mapped in self.noise:
            return self.noise.stands_for(mapped, ours)
        if is_size(ours) and is_size(mapped):
            return str(ours.meta["val"]) == str(mapped.meta["val"]) or self._same_number(ours, mapped)
        return self._bare(mapped) is self._bare(ours)

    def _bare(self, node: fx.Node) -> fx.Node:
        """The node upstream whose value this one only passes on, be it a buffer that is detached."""
        while node.target in IDENTITIES or self._detaches(node):
            node = cast(fx.Node, node.args[0])
        return node

    def _detaches(self, node: fx.Node) -> bool:
        """Whether a node of ours detaches a buffer, which has no gradient."""
        if node.target is not aten.detach.default:
            return False
        source = cast(fx.Node, node.args[0])
        return source.op == "get_attr" and source.target in self.buffers

    def _same_number(self, ours: fx.Node, mapped: fx.Node) -> bool:
        """Whether two numbers are taken out of the same tensor, each under a symbol of its own trace."""
        operands = zip(ours.all_input_nodes, mapped.all_input_nodes, strict=False)
        return ours.target == mapped.target and all(self._same(a, b) for a, b in operands)

    def _merge(self, theirs: fx.Node, ours: fx.Node) -> None:
        if ours.op not in ("call_function", "output"):
            return
        width = max(len(theirs.args), len(ours.args))
        ours.args = tuple(
            self._merged(ours, _argument(ours, index), _argument(theirs, index)) for index in range(width)
        )
        ours.kwargs = {
            key: self._merged(ours, ours.kwargs.get(key), theirs.kwargs.get(key))
            for key in {**ours.kwargs, **theirs.kwargs}
        }

    def _merged(self, node: fx.Node, ours: object, theirs: object) -> Any:
        """The argument of a node for both modes."""
        if isinstance(ours, fx.Node) and isinstance(theirs, fx.Node):
            mapped = self.pairs[theirs]
            if mapped is None or mapped not in self.noise:
                return ours
            self.unexplained.clear()
            return self.noise.select(mapped, ours, before=node)
        if _is_sequence(ours) and _is_sequence(theirs) and len(ours) == len(theirs):
            merged = [self._merged(node, a, b) for a, b in zip(ours, theirs, strict=True)]
            return merged if isinstance(ours, list) else tuple(merged)
        if type(ours) is type(theirs) and ours == theirs:
            return ours
        if ours is False and theirs is True:
            return training_node(self.graph)
        if ours == 0 and isinstance(theirs, float):
            return scaled_by_training(self.graph, node, theirs)
        return self._differs(node)

    def _insert(self, theirs: fx.Node, before: fx.Node) -> None:
        def operand(node: fx.Node) -> fx.Node:
            ours = self.pairs[node]
            return self._differs(theirs) if ours is None else ours

        if theirs.op != "call_function":
            self._differs(theirs)
        if writes_in_place(theirs.target) and self._is_buffer(theirs.args[0]):
            self._update(theirs, operand, before)
            return
        if _writes_to_a_view(theirs):
            self._differs(theirs)
        node = self.noise.insert(theirs, operand, before)
        self.pairs[theirs] = node
        if writes_in_place(theirs.target):
            self.pairs[theirs.args[0]] = node
        if not is_size(node):
            self.unexplained.append(theirs)

    def _is_buffer(self, theirs: object) -> bool:
        """Whether a value of the training trace is a buffer, or what operations that wrote to one returned."""
        ours = self.pairs[theirs]
        return ours is not None and ours.op == "get_attr" and ours.target in self.buffers

    def _passes_buffer(self, theirs: fx.Node) -> bool:
        """Whether an operation gives a buffer as it is: detached, or copied to itself after it was written to."""
        if theirs.target is aten.copy_.default:
            return (
                self._is_buffer(theirs.args[0]) and self.pairs[theirs.args[0]] is self.pairs[theirs.args[1]]
            )
        return theirs.target is aten.detach.default and self._is_buffer(theirs.args[0])

    def _copy_after_update(self, theirs: fx.Node, before: fx.Node | None) -> None:
        """Let our copy of a buffer be made where theirs is: after what training has written to the buffer."""
        buffer = self.pairs[theirs]
        if buffer is None or theirs.target not in IDENTITIES or not self.copies.get(buffer):
            return
        copied = self.copies[buffer].pop(0)
        if buffer in self.updated and before is not None:
            before.prepend(copied)

    def _update(self, theirs: fx.Node, operand: Callable[[fx.Node], fx.Node], before: fx.Node) -> None:
        """Let a buffer that is written in training only keep its value in evaluation."""
        buffer = operand(cast(fx.Node, theirs.args[0]))
        updated = self.noise.insert(theirs, operand, before)
        value = self.noise.select(updated, buffer, before)
        with self.graph.inserting_before(before):
            written = self.graph.call_function(aten.copy_.default, (buffer, value))
        written.meta = dict(updated.meta)
        self.pairs[theirs] = buffer
        self.updated.add(buffer)
        self.unexplained.clear()

    def _insert_count(self, theirs: fx.Node, before: fx.Node) -> None:
        buffer = _counter(theirs)
        assert buffer is not None
        flag = training_node(self.graph)
        with self.graph.inserting_before(before):
            ours = self.graph.get_attr(str(buffer.target))
            ours.meta["val"] = get_tensor(self.module, str(buffer.target))
            count = self.graph.call_function(aten.add_.Tensor, (ours, flag))
        count.meta["val"] = ours.meta["val"]
        self.pairs[theirs] = ours

    def _differs(self, node: fx.Node) -> NoReturn:
        first = next(iter(self.unexplained), node)
        raise TraceError(
            "the model computes differently in training, beyond dropout, other noise and batch norm: "
            f"{first.format_node()}",
            f"at {source_of(first) or 'an unknown source line'}",
            "adaptc makes one graph for both modes; move that difference out of forward, or fix it by an argument",
        )


class _Pairs(dict[object, fx.Node | None]):
    """A node of the training trace -> our node of the same value; None where nothing here computes it."""

    def __missing__(self, key: object) -> NoReturn:
        raise TraceError(f"the model reads {key} in training only, which adaptc cannot follow")


def _is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """Whether an argument is a list or a tuple of arguments."""
    return isinstance(value, (list, tuple))


def _argument(node: fx.Node, index: int) -> Any:
    """An argument of an operation by its position; its default where it is left out."""
    if index < len(node.args):
        return node.args[index]
    return cast(Any, node.target)._schema.arguments[index].default_value


def _writes_to_a_view(node: fx.Node) -> bool:
    """Whether an in-place operation such as `mul_` changes more values than its operand, through a view."""
    if not writes_in_place(node.target):
        return False
    written = node.args[0]
    assert isinstance(written, fx.Node)
    return any(getattr(other.target, "is_view", False) for other in (written, *written.users))


def _counter(node: fx.Node) -> fx.Node | None:
    """The counter that a node increments, such as `num_batches_tracked.add_(1)` of a batch norm, once or repeatedly.

    Returns:
        The node that reads the counter; None for any other node.
    """
    while node.target is aten.add_.Tensor and not node.kwargs and node.args[1] == 1:
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        if operand.op == "get_attr":
            return operand
        node = operand
    return None
