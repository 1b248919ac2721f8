"""Masks and biases of attentions, made wider for tokens in front that everything sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from adaptc.attention import Attention
from adaptc.dataflow import is_weight
from adaptc.errors import Refusal, RefusedError
from adaptc.graph import Graph
from adaptc.layout import operation
from adaptc.sites import module_of, source_of

aten = torch.ops.aten
NEUTRAL: Mapping[str, float] = {
    **dict.fromkeys(("add", "add_", "sub", "sub_", "masked_fill", "masked_fill_"), 0.0),
    **dict.fromkeys(("mul", "mul_", "div", "div_", "where"), 1.0),
}
"""Operations on scores -> what their other operand is for a score that they leave as it is."""
SIZED = frozenset({"view", "reshape", "expand"})
PASSED = frozenset(
    {
        *("contiguous", "clone", "to", "type_as", "alias", "detach", "_to_copy"),
        *("full_like", "zeros_like", "ones_like"),
    }
)
"""Operations that keep the axes of their operand."""
POINTWISE = frozenset({"where", "min", "max"})
"""Operations on single numbers that torch does not mark as such."""


class Masks:
    """The operands beside the scores of attentions, `count` tokens wider in front."""

    def __init__(self, graph: Graph, count: int):
        self.graph, self.count = graph, count
        self._padded: dict[tuple[fx.Node, float], fx.Node] = {}
        self._grown: dict[tuple[fx.Node, int], fx.Node] = {}

    def widen(self, attention: Attention) -> None:
        """Let an attention see the tokens in front from everywhere; its keys are as they were."""
        if attention.fused:
            self._fused(attention.mixed)
        else:
            self._written_out(attention)

    def _fused(self, node: fx.Node) -> None:
        """`scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)`."""
        args: list[Any] = [*node.args, *(None, 0.0, False)[len(node.args) - 3 :]]
        if args[5]:
            args[3], args[5] = self._padded_to(self._causal(node), 1.0, node), False
        elif args[3] is not None:
            args[3] = self._wider(args[3], 1.0 if args[3].meta["val"].dtype == torch.bool else 0.0, node)
        node.args = tuple(args)

    def _causal(self, node: fx.Node) -> fx.Node:
        """Which keys a query sees: those up to its own place."""
        query: Any = node.args[0]
        with self.graph.module.graph.inserting_before(node):
            length = self._call(aten.sym_size.int, query, -2, like=node)  # of the keys too: they are its own
            whole = self._call(aten.new_ones.default, query, [length, length], like=node)
            return self._call(
                aten.to.dtype, self._call(aten.tril.default, whole, like=node), torch.bool, like=node
            )

    def _written_out(self, attention: Attention) -> None:
        """From the product of query and key to that with the values: all that meets the scores on the way."""
        path, queue = {attention.scores}, [attention.scores]
        while queue:
            new = [u for u in queue.pop().users if u not in path and u is not attention.mixed]
            path.update(new)
            queue += new
        scores, before = attention.scores, _all_behind(attention.mixed)
        if operation(scores) == "baddbmm" and _is_wide(scores.args[0]):  # type: ignore[arg-type]
            scores.update_arg(0, self._wider(scores.args[0], 0.0, scores))  # type: ignore[arg-type]
        length = scores.meta["val"].shape[-1]
        for node in [n for n in self.graph.nodes if n in path and n in before and n is not scores]:
            if operation(node) in SIZED:
                self._resize(node, length)
            for index, argument in enumerate(node.args):
                if isinstance(argument, fx.Node) and argument not in path and _is_wide(argument):
                    node.update_arg(index, self._beside(node, index, argument, path))

    def _beside(self, node: fx.Node, index: int, argument: fx.Node, path: set[fx.Node]) -> fx.Node:
        name = operation(node)
        if name not in NEUTRAL or (name == "where" and index != 0):
            raise self._not_understood(node, f"{name} is no operation on scores that is known")
        kept = NEUTRAL[name]
        if name == "where" and node.args[1] not in path:  # the scores are where it is false
            kept = 0.0
        return self._wider(argument, kept, node)

    def _resize(self, node: fx.Node, length: Any) -> None:
        """A view that names the number of keys names the larger one."""
        sizes = list(node.args[1])  # type: ignore[arg-type]
        last = sizes[-1]
        if isinstance(last, fx.Node):
            with self.graph.module.graph.inserting_before(node):
                sizes[-1] = self._call(aten.sym_size.int, node.args[0], -1, like=node)
        elif last not in (-1, 1) and last == length:
            sizes[-1] = last + self.count
        node.update_arg(1, sizes)

    def _wider(self, mask: fx.Node, kept: float, node: fx.Node) -> fx.Node:
        """A mask with `count` columns in front that change nothing; a bias that depends on positions grows there."""
        if not _is_wide(mask):
            return mask
        table = _table_behind(mask)
        if table is not None:
            return self._bias(mask, mask.meta["val"].dim() - 1, kept, node)
        if _counted(mask):
            raise self._not_understood(
                node, "it adds a bias that is computed from positions, and looked up in no table"
            )
        return self._padded_to(mask, kept, node)

    def _padded_to(self, mask: fx.Node, kept: float, node: fx.Node) -> fx.Node:
        if (mask, kept) not in self._padded:
            with self.graph.module.graph.inserting_after(mask):
                value = bool(kept) if mask.meta["val"].dtype == torch.bool else kept
                padded = self._call(aten.constant_pad_nd.default, mask, [self.count, 0], value, like=mask)
            self._padded[mask, kept] = padded
        return self._padded[mask, kept]

    def _bias(self, node: fx.Node, axis: int, kept: float, at: fx.Node) -> fx.Node:
        """A bias whose keys start `count` positions earlier: the same computation, from there on."""
        key = (node, axis)
        if key in self._grown:
            return self._grown[key]
        value, name, args = node.meta["val"], operation(node), list(node.args)
        if axis < 0 or not isinstance(value, torch.Tensor) or value.shape[axis] == 1:
            return node
        if name == "embedding":
            args[1] = self._bias(args[1], axis, kept, at)  # type: ignore[arg-type]
        elif name == "arange":
            args = [-self.count, args[-1]]
        elif name in POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            args = [self._term(node, i, a, axis, at) for i, a in enumerate(args)]
        elif name in ("unsqueeze", "permute", *PASSED) or (name == "slice" and _takes_all(node)):
            inner: Any = args[1][axis] if name == "permute" else axis  # type: ignore[index]
            if name == "unsqueeze":
                inner -= int(args[1] % value.dim() < axis)  # type: ignore[operator]
            args[0] = self._bias(args[0], inner, kept, at)  # type: ignore[arg-type]
        else:
            raise self._not_understood(at, f"its bias comes through {name}, which is not followed")
        target: Any = aten.arange.start if name == "arange" else node.target
        with self.graph.module.graph.inserting_after(
            _latest(self.graph, [node, *[a for a in args if isinstance(a, fx.Node)]])
        ):
            grown = self.graph.module.graph.call_function(target, tuple(args), dict(node.kwargs))
        grown.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self._evaluate(grown)
        self._grown[key] = grown
        return grown

    def _term(self, node: fx.Node, index: int, argument: Any, axis: int, at: fx.Node) -> Any:
        """An operand of a bias: what knows positions grows, a mask beside it is padded."""
        if not isinstance(argument, fx.Node) or not isinstance(argument.meta.get("val"), torch.Tensor):
            return argument
        inner = axis - (node.meta["val"].dim() - argument.meta["val"].dim())
        if inner < 0 or argument.meta["val"].shape[inner] == 1:
            return argument
        counted = _table_behind(argument) is not None or _table_behind(node) is None
        if counted or inner != argument.meta["val"].dim() - 1:
            return self._bias(argument, inner, 0.0, at)
        kept = 1.0 if operation(node) == "where" and index == 0 else NEUTRAL.get(operation(node), 0.0)
        return self._padded_to(argument, kept, at)

    def _evaluate(self, node: fx.Node) -> None:
        from adaptc.shapes import evaluated

        with self.graph.fake_mode, torch.no_grad():
            node.meta["val"] = evaluated(node)

    def _call(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        return self.graph.call(target, *args, like=like)

    def _not_understood(self, node: fx.Node, why: str) -> RefusedError:
        where = f"in {module_of(node)[0] or 'the model'}, from {source_of(node)}"
        words = (
            f"the attention at {node.name} is not understood: {why}\n  {where}\n  leave it out with `exclude`"
        )
        return RefusedError([Refusal(words, (node.name,))])


def _is_wide(node: fx.Node) -> bool:
    """Whether a value has a column for each key."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] != 1


def _takes_all(node: fx.Node) -> bool:
    before = node.args[0].meta["val"]  # type: ignore[union-attr]
    return str(before.shape) == str(node.meta["val"].shape)


def _table_behind(node: fx.Node) -> fx.Node | None:
    """The table that a bias is looked up in, if it is."""
    for found in _behind_values(node):
        if operation(found) == "embedding" and is_weight(found.args[0]):  # type: ignore[arg-type]
            return found
    return None


def _counted(node: fx.Node) -> bool:
    """Whether positions are in a value as numbers: behind a comparison they only say what is seen."""
    return any(operation(found) in ("arange", "cumsum") for found in _behind_values(node))


def _behind_values(node: fx.Node) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    queue = [node]
    while queue:
        current = queue.pop()
        value = current.meta.get("val")
        if current not in found and isinstance(value, torch.Tensor) and value.dtype != torch.bool:
            found[current] = None
            queue += current.all_input_nodes
    return list(found)


def _all_behind(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in found:
            found.add(current)
            queue += current.all_input_nodes
    return found


def _latest(graph: Graph, nodes: list[fx.Node]) -> fx.Node:
    wanted = set(nodes)
    return [node for node in graph.nodes if node in wanted][-1]
