"""QA-LoRA: low-rank adaptation of groups of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.low_rank import NOT_AGAIN, CompensatesQuantization, Rounds, Split, singular
from adaptc.methods.method import Dropout, method
from adaptc.methods.param import Param
from adaptc.methods.rank import Scaled
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

GroupSize = Annotated[
    int, Field(ge=2, description="inputs that share a column of A, such as the block of a quantized weight")
]
Initial = Annotated[
    Literal[True, "loftq"],
    Field(description="true is Kaiming-uniform and zero; loftq compensates what quantization lost of W"),
]


@method("qalora")
@dataclass(frozen=True)
class Qalora(CompensatesQuantization, Scaled):
    """W' = W + (alpha / r) B (A ⊗ 1)        A (r, in / g)   B (out, r)   1 (1, g)

    Xu et al. 2024, section 3.3 and algorithm 1: inputs are summed over groups of g, so that the change shifts all
    columns of a group alike, as another zero point of a quantized block does. A starts Kaiming-uniform, B at zero; with
    `init_weights` "loftq" B A starts as the best of rank r for the means, over every group, of what quantization lost,
    and W minus it is quantized again, `loftq_iter` - 1 times.
    """

    group_size: GroupSize = 32
    dropout: Dropout = 0.0
    init_weights: Initial = True
    loftq_iter: Rounds = 1

    kinds = frozenset({"linear", "experts"})
    small = {"r": 2, "group_size": 2}
    fast = frozenset({"B"})

    def refuses(self, site: WeightSite) -> Fault | None:
        """Groups must divide the inputs, and there must be at least r of them."""
        inner, g = site.in_features, self.group_size
        if inner % g:
            return Fault(("group_size",), f"must divide {inner} here, got {g}")
        if self.at(site).r > inner // g:
            return Fault(
                ("r",),
                f"rank r must be at most {inner // g} here, the number of groups, got {self.at(site).r}",
            )
        if self.loftq_iter > 1 and not self.compensates:
            return NOT_AGAIN
        if self.compensates and site.batch is not None:
            return Fault(("init_weights",), "several matrices in one weight start as true says: leave it out")
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in / g) Kaiming-uniform, B (out, r) zero; or what compensates quantization."""
        shapes = (self.r, site.in_features // self.group_size), (site.out_features, self.r)
        if not self.compensates:
            return {
                "A": Param(shapes[0], "kaiming-uniform", "qalora_A"),
                "B": Param(shapes[1], "zeros", "qalora_B"),
            }
        split = Split(lambda lost, r, scale: singular(self._means(lost), r, scale), self.r, self.scale)
        return {"A": Param(shapes[0], split.A, "qalora_A"), "B": Param(shapes[1], split.B, "qalora_B")}

    def compensation(self, lost: Tensor) -> Tensor:
        """The best approximation of rank r of the groups' means of what a matrix lost, spread over the groups."""
        A, B = singular(self._means(lost), self.r, self.scale)
        return self.scale * (B @ self._spread(A))

    def weight(self, W: Tensor, *, A: Tensor, B: Tensor) -> Tensor:
        """W + scale B (A ⊗ 1), of shape (out, in)."""
        return W + self.scale * (B @ self._spread(A))

    def _means(self, W: Tensor) -> Tensor:
        """The mean of every group of columns: (out, in) to (out, in / g)."""
        return unflatten(W, 1, (-1, self.group_size)).mean(-1)

    def _spread(self, A: Tensor) -> Tensor:
        """Every column g times: A (r, in / g) to (r, in). It copies few numbers, and x meets r rows as in LoRA."""
        return A.unsqueeze(-1).expand(-1, -1, self.group_size).reshape(A.shape[0], -1)
