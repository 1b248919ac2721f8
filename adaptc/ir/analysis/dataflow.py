"""Walks through a graph: what lies between two matrix products, and where the features of a product's result go."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.matrix_products import MATRIX_PRODUCTS, feature_axes, operands_of
from adaptc.ir.nodes import (
    RESHAPES,
    map_operands,
    memory_owner,
    node_arg,
    operation,
    same_memory,
    traced_size,
    written_operands,
)

VIEWS = frozenset(
    {
        *RESHAPES,
        *("transpose", "permute", "t", "numpy_T", "mT"),
        *("unflatten", "flatten", "unsqueeze", "squeeze", "expand"),
        *("split", "split_with_sizes", "chunk", "unbind", "slice", "select", "narrow", "getitem"),
        *("contiguous", "clone", "to"),
    }
)
"""Operations that move features without changing them."""


def walk(
    starts: Iterable[fx.Node],
    step: Callable[[fx.Node], Iterable[fx.Node]],
    stop: Callable[[fx.Node], bool] = lambda node: False,
) -> Iterator[fx.Node]:
    """Every node that can be reached from the starts, each once, the nearest first.

    Args:
        starts: where to begin; they are given too.
        step: gives the neighbours of a node.
        stop: whether to go no further from a node.
    """
    reached = dict.fromkeys(starts)
    queue = deque(reached)
    while queue:
        node = queue.popleft()
        yield node
        following = [] if stop(node) else [n for n in step(node) if n not in reached]
        reached.update(dict.fromkeys(following))
        queue.extend(dict.fromkeys(following))


def upstream(starts: Iterable[fx.Node], residual: bool = True) -> dict[fx.Node, None]:
    """These nodes and all that they are computed from, up to and including the nearest matrix products.

    Args:
        starts: where to begin.
        residual: pass sums of two activations.

    Returns:
        the nodes as keys, the nearest first.
    """

    def stop(node: fx.Node) -> bool:
        return operation(node) in MATRIX_PRODUCTS or (not residual and is_residual(node))

    return dict.fromkeys(walk(starts, lambda node: node.all_input_nodes, stop))


def downstream(node: fx.Node, residual: bool = True) -> dict[fx.Node, None]:
    """All that is computed from a node, up to and including the nearest matrix products.

    Args:
        node: where to begin; it is not among the results.
        residual: enter sums with another activation.

    Returns:
        the nodes as keys, the nearest first.
    """

    def users(node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if residual or not is_residual(user)]

    return dict.fromkeys(walk(users(node), users, lambda user: operation(user) in MATRIX_PRODUCTS))


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, or the memory that an operation writes to, through any view, after it is written."""
    reading = list(node.users)
    for operand in written_operands(node):
        same = walk([memory_owner(operand)], same_memory)
        reading += [user for value in same for user in value.users if node < user]
    return reading


def ancestors(node: fx.Node, within: Collection[fx.Node] | None = None) -> set[fx.Node]:
    """A node and all that it is computed from, through matrix products too; only nodes that are `within`, if given."""

    def inside(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return [n for n in nodes if within is None or n in within]

    return set(walk(inside([node]), lambda n: inside(n.all_input_nodes)))


def is_residual(node: fx.Node) -> bool:
    """Whether a node sums two activations."""
    return operation(node) in ("add", "add_") and sum(not is_weight(n) for n in node.all_input_nodes) > 1


def is_weight(node: fx.Node) -> bool:
    """Whether a node is a weight, a view of one, or matrices gathered from one."""
    source = unviewed(node, VIEWS | {"index"})
    return source.op == "get_attr" or "quantized" in source.meta


def unviewed(node: fx.Node, passed: Collection[str] = VIEWS) -> fx.Node:
    """The node that this one is a view of, through the operations whose names are passed."""
    while node.op == "call_function" and operation(node) in passed and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def activations_multiplied(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two activations that a node multiplies as matrices; empty if it does not."""
    if operation(node) not in ("matmul", "bmm", "baddbmm", "einsum"):
        return ()
    pair = operands_of(node)
    return pair if len(pair) == 2 and not any(is_weight(n) for n in pair) else ()


def features_reaching(product: fx.Node, region: Mapping[fx.Node, None]) -> tuple[tuple[int, int], ...]:
    """The output features of a matrix product that enter a region. Their numbers are followed through the views.

    Args:
        product: a matrix product with a weight.
        region: an operand of some node, and the nodes upstream of it.

    Returns:
        the ranges (first, last + 1) of the features, in ascending order.
    """
    shape = [traced_size(size) for size in product.meta["val"].shape]
    operands = operands_of(product)
    weight = next((operand for operand in reversed(operands) if is_weight(operand)), operands[-1])
    axes = feature_axes(product, weight, len(shape))
    rows = torch.arange(math.prod(shape[axis] for axis in axes)).view([shape[axis] for axis in axes])
    rows = rows.permute(sorted(range(len(axes)), key=axes.__getitem__))  # in the order of the result's axes
    labels: dict[fx.Node, Any] = {
        product: rows.reshape([size if i in axes else 1 for i, size in enumerate(shape)]).expand(shape)
    }
    reached: set[int] = set()

    def views(node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if operation(u) in VIEWS and u.args[0] is node and u in region]

    for node in walk([product], views):
        if node is not product:
            labels[node] = _moved(node, labels)
        moved = views(node)
        others = [u for u in node.users if u in region and u not in moved]
        if isinstance(labels[node], torch.Tensor) and node in region and (others or not moved):
            reached |= set(labels[node].unique().tolist())
    return _ranges(sorted(reached))


def _moved(node: fx.Node, labels: Mapping[fx.Node, object]) -> Any:
    """What a view gives of the labels of its operand."""
    if operation(node) == "to":
        return labels[node_arg(node, 0)]
    args, kwargs = map_operands(node, lambda n: labels[n] if n in labels else traced_size(n.meta["val"]))
    call: Any = torch.reshape if operation(node) in RESHAPES else node.target  # labels have other strides
    return call(*args, **kwargs)


def _ranges(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as ranges (first, last + 1)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)
