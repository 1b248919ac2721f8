"""VB-LoRA: low-rank adaptation from a bank of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Dropout, Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Count = Annotated[int, Field(gt=0)]


@method("vblora")
@dataclass(frozen=True)
class Vblora(WeightMethod):
    """W' = W + B A,  each piece of B and A = Σ_k softmax(top k of a) v_k        a (…, …, n)   V (n, v)

    Li et al. 2024, equations 3 and 4: rows of A and columns of B are cut into pieces of `vector_length`, each a
    mixture of the `topk` vectors of the bank V that its logits choose; all layers share V and train it. Logits start
    normal, V uniform, so that the model does not start as its base.
    """

    r: Rank = 4
    num_vectors: Annotated[Count, Field(description="vectors in the bank")] = 256
    vector_length: Annotated[
        Count, Field(description="length of a vector; it divides both sides of each weight")
    ] = 256
    topk: Annotated[Count, Field(description="how many vectors a part is mixed of")] = 2
    dropout: Dropout = 0.0
    init_vector_bank_bound: Annotated[float, Field(description="vectors start in plus or minus this")] = 0.02
    init_logits_std: Annotated[float, Field(description="spread of the logits at the start")] = 0.1

    kinds = MATRIX_KINDS
    small = {"vector_length": 2, "num_vectors": 12}
    aliases = {"vblora_dropout": "dropout"}
    identity_at_init = False
    peft = PeftFormat(
        "VBLORA",
        options={
            "dropout": "vblora_dropout",
            **{name: name for name in ("r", "num_vectors", "vector_length", "topk")},
            **{name: name for name in ("init_vector_bank_bound", "init_logits_std")},
        },
        neutral={"save_only_topk_weights": (False, None)},
    )

    def refuses(self, site: WeightSite) -> Fault | None:
        """`vector_length` must divide both sides, and the bank must hold `topk` vectors."""
        if site.in_features % self.vector_length or site.out_features % self.vector_length:
            sides = f"{site.in_features} and {site.out_features}"
            return Fault(("vector_length",), f"vector_length must divide {sides}, got {self.vector_length}")
        if self.topk > self.num_vectors:
            return Fault(("topk",), f"topk must be at most num_vectors ({self.num_vectors}), got {self.topk}")
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """Logits of A (r, in / v, n) and of B (out / v, r, n)."""
        pieces = {
            "A": (self.r, site.in_features // self.vector_length, self.num_vectors),
            "B": (site.out_features // self.vector_length, self.r, self.num_vectors),
        }
        return {
            f"logits_{name}": Param(
                shape,
                lambda W, g, s=shape: W.new_empty(s).normal_(std=self.init_logits_std, generator=g),
                f"vblora_logits_{name}",
            )
            for name, shape in pieces.items()
        }

    def shared(self, sites: Sequence[WeightSite]) -> dict[str, Param]:
        """The bank V (n, v)."""
        shape, bound = (self.num_vectors, self.vector_length), self.init_vector_bank_bound
        return {
            "bank": Param(
                shape,
                lambda W, g: W.new_empty(shape).uniform_(-bound, bound, generator=g),
                "vblora_vector_bank",
            )
        }

    def weight(self, W: Tensor, *, logits_A: Tensor, logits_B: Tensor, bank: Tensor) -> Tensor:
        """W + B A, of shape (out, in)."""
        A = self._mixed(logits_A, bank).flatten(1)
        B = self._mixed(logits_B, bank).transpose(1, 2).flatten(0, 1)
        return W + B @ A

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """The mixtures (…, …, v) that logits (…, …, n) choose from the bank."""
        top, at = logits.topk(self.topk, dim=-1)
        chosen = unflatten(bank.index_select(0, at.flatten()), 0, at.shape)
        return (top.softmax(-1).unsqueeze(-1) * chosen).sum(-2)
