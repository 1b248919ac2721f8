"""The place of a program for a prefix: keys and values in front of every attention's own, of any number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from adaptc.inputs import InputSpec
from adaptc.ir.graph import Graph
from adaptc.methods.point_sites import AttentionSite
from adaptc.methods.virtual_tokens import AttentionMethod
from adaptc.rewriter.cache.past import add_input, new_size
from adaptc.rewriter.insert.attention import put_tokens
from adaptc.rewriter.pipeline import Pass
from adaptc.rewriter.swap.form import NoFormError
from adaptc.weights import Held

if TYPE_CHECKING:
    from torch import Tensor

VIRTUAL_TOKENS, VIRTUAL = "virtual_tokens", "virtual"
"""The name of the tensor in a program, and of the number of its tokens."""
TRACED = 3
"""The number of virtual tokens that stands for any while shapes are computed; not 1, which broadcasts."""


@dataclass(frozen=True)
class PrefixSlot:
    """Where a program takes the virtual tokens of an attention method, `(virtual, columns)` as the method stores them.

    Attributes:
        sites: the attentions.
        submodules: `num_transformer_submodules` of the method, which says the columns of an attention.
        dtype: of the tokens.
    """

    sites: tuple[AttentionSite, ...]
    submodules: int
    dtype: torch.dtype

    @property
    def method(self) -> AttentionMethod:
        """A method that lays out the columns in the same way."""
        return AttentionMethod(num_transformer_submodules=self.submodules)

    @property
    def columns(self) -> int:
        """How many numbers each virtual token has."""
        return self.method.columns(self.sites)[-1]

    @property
    def dims(self) -> dict[str, tuple[int | str, ...]]:
        """Name in the program -> its sizes, with the name of the number of tokens in place of a number."""
        return {VIRTUAL_TOKENS: (VIRTUAL, self.columns)}

    def merged(self, other: PrefixSlot | None) -> PrefixSlot:
        """A slot for what either takes.

        Raises:
            NoFormError: they are at different attentions.
        """
        if other is not None and (self.sites, self.submodules) != (other.sites, other.submodules):
            raise NoFormError("its virtual tokens are at other attentions than those of another adapter")
        return self

    def insertion(self, count: int | None) -> InsertPrefix:
        """The pass that puts in a prefix of so many tokens; None for the program, which takes any number."""
        return InsertPrefix(self, count)


@dataclass(frozen=True)
class InsertPrefix(Pass):
    """`softmax(q K^T) V` becomes `softmax(q [P_k; K]^T) [P_v; V]`, P a tensor, or an input of any number of tokens.

    Attributes:
        slot: the attentions.
        count: how many tokens; None to make P an input.
    """

    slot: PrefixSlot
    count: int | None = None

    name: ClassVar[str] = "insert-prefix-slot"
    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted", "folded"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Put P in front, let every mask show it, and count positions from behind it."""
        slot, aten = self.slot, torch.ops.aten
        if self.count is None:
            node = add_input(
                graph, VIRTUAL_TOKENS, (new_size(graph, VIRTUAL, TRACED), slot.columns), slot.dtype
            )
            dtype = str(slot.dtype).removeprefix("torch.")
            graph.inputs = (*graph.inputs, InputSpec(VIRTUAL_TOKENS, dtype, (VIRTUAL, slot.columns)))
            first = next(other for other in graph.nodes if other.op == "call_function")
            with graph.module.graph.inserting_before(first):
                count: Any = graph.call(aten.sym_size.int, node, 0, like=first)
        else:
            zeros = torch.zeros(self.count, slot.columns, dtype=slot.dtype)
            graph.attach(VIRTUAL_TOKENS, Held(zeros), trained=False)
            node, count = graph.parameter_node(VIRTUAL_TOKENS), self.count
        put_tokens(graph, slot.method, slot.sites, node, count, self)
        return True


def in_order(prefixes: Sequence[Tensor]) -> Tensor:
    """The tokens of several prefixes as one: a later one is in front."""
    return torch.cat(list(reversed(prefixes)))
