"""Prefix tuning: trained keys and values in front of every attention's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.virtual_tokens import PROMPT_KEY, AttentionFormat, AttentionMethod

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.point_sites import AttentionSite


class PrefixFormat(AttentionFormat):
    """PEFT's configuration of prefix tuning."""

    def read(self, options: dict[str, Any]) -> dict[str, Any]:
        """Without a projection: PEFT stores P."""
        return super().read(options) | {"projection": False}


@method("prefix")
@dataclass(frozen=True)
class Prefix(AttentionMethod):
    """K' = [P_k; K]   V' = [P_v; V]   P = W_2 tanh(W_1 E + b_1) + b_2    Li and Liang 2021, sections 4.2 and 4.3

    E `(n, width)`, W_1 `(hidden, width)`, W_2 `(total, hidden)`; total is the sum of heads times (key size + value
    size) over the attentions, width heads times (key size + value size) / 2 of the first. Without `projection`
    P `(n, total)` itself is trained. The projection is dropped after training: checkpoints and folded models hold P.
    """

    projection: Annotated[bool, Field(description="P is made by a small network while it is trained")] = False
    encoder_hidden_size: Annotated[int | None, Field(gt=0, description="width of that network")] = None
    init_weights: Annotated[
        Literal["zero"] | None, Field(description="zero: keys and values of zero; else drawn from N(0, 1)")
    ] = None

    aliases = {"prefix_projection": "projection"}
    small = {"num_virtual_tokens": 3}
    while_training = frozenset({"encoder_hidden_size", "init_weights"})
    peft = PrefixFormat.of(
        "PREFIX_TUNING", projection="prefix_projection", encoder_hidden_size="encoder_hidden_size"
    )

    @property
    def plain(self) -> Self:
        """P without a projection."""
        return replace(self, projection=False) if self.projection else self

    def shared(self, sites: Sequence[AttentionSite]) -> dict[str, Param]:
        """P, or the network that makes it."""
        n, total = self.num_virtual_tokens, self.columns(sites)[-1]
        last = "zeros" if self.init_weights == "zero" else "standard-normal"
        if not self.projection:
            return {"tokens": Param((n, total), last, PROMPT_KEY)}
        width = self.columns(sites)[1] // 2
        hidden = self.encoder_hidden_size or width
        start = "zeros" if self.init_weights == "zero" else "kaiming-uniform"
        return {
            "tokens": Param((n, width), "standard-normal", "prefix_embeddings"),
            "inner": Param((hidden, width), "kaiming-uniform", "prefix_inner.weight"),
            "inner_bias": Param((hidden,), "zeros", "prefix_inner.bias"),
            "outer": Param((total, hidden), start, "prefix_outer.weight"),
            "outer_bias": Param((total,), "zeros", "prefix_outer.bias"),
        }

    def tokens(self, **theta: Tensor) -> Tensor:
        """P `(n, total)`."""
        if not self.projection:
            return theta["tokens"]
        inner = (theta["tokens"] @ theta["inner"].T + theta["inner_bias"]).tanh()
        return inner @ theta["outer"].T + theta["outer_bias"]
