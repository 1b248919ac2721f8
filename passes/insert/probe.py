"""Probing: a new classifier on a frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.head import HeadMethod, Output, first_token, last_token, mean_of_tokens
from adaptc.methods.method import Dropout, method
from adaptc.methods.param import Param

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.point_sites import HeadSite

Classes = Annotated[int, Field(gt=0, description="number of classes; 1 for a regression")]
Head = Annotated[
    Literal["linear", "mlp", "attention"],
    Field(description="what the classes are computed by; attention pools by a query that is trained"),
]
Pool = Annotated[
    Literal["mean", "first", "last", "none"],
    Field(description="which real tokens it reads; none: every token gets classes of its own"),
]
Width = Annotated[int | None, Field(gt=0, description="width of an mlp; d if left out")]


@method("probe")
@dataclass(frozen=True)
class Probe(HeadMethod):
    """y = U x + c, x pooled from h        U (classes, d)   c (classes,)        Alain and Bengio 2016, section 3

    h `(tokens, d)` are the features of a frozen model. x is their mean, or the first or last real token. `mlp` is
    `y = U tanh(V x + b) + c`, V `(width, d)`. `attention` is `x = softmax(h q / √d)ᵀ h`, q `(d,)`, over real tokens.
    What is frozen is computed once for all epochs by `compiled.trunk(batches, cache=...)`.
    """

    classes: Classes = 2
    head: Head = "linear"
    pool: Pool = "mean"
    width: Width = None
    dropout: Dropout = 0.0
    output: Output = "logits"

    aliases: ClassVar[Mapping[str, str]] = {"num_labels": "classes"}
    small: ClassVar[Mapping[str, object]] = {"classes": 3}

    def refuses(self, site: HeadSite) -> Fault | None:
        """Attention pools, so that no token has classes of its own; a vector in each row has no tokens."""
        if self.pool == "none" and self.head == "attention":
            return Fault(("pool",), "attention pools all tokens: none leaves it nothing to do")
        if self.pool == "none" and not site.tokens:
            return Fault(("pool",), "none gives every token classes, and here is one vector in each row")
        return None

    def params(self, site: HeadSite) -> dict[str, Param]:
        """U and c; V and b of an mlp, q of attention."""
        d, inner = site.width, site.width
        params: dict[str, Param] = {}
        if self.head == "attention":
            params["q"] = Param((d,), "normal", "probe_query")
        if self.head == "mlp":
            inner = self.width or d
            params["V"] = Param((inner, d), "kaiming-uniform", "probe_in.weight")
            params["b"] = Param((inner,), "zeros", "probe_in.bias")
        params["U"] = Param((self.classes, inner), "kaiming-uniform", "probe_out.weight")
        return params | {"c": Param((self.classes,), "zeros", "probe_out.bias")}

    def pooled(self, h: Tensor, m: Tensor, **theta: Tensor) -> Tensor:
        """x `(batch, d)`, or h where nothing is pooled."""
        if self.head == "attention":
            scores = (h @ theta["q"]) * h.shape[-1] ** -0.5
            shares = scores.masked_fill(~m, -1e4).softmax(-1)
            return (shares.unsqueeze(1) @ h).squeeze(1)
        if self.pool == "none":
            return h
        pools = {"mean": mean_of_tokens, "first": first_token, "last": last_token}
        return pools[self.pool](h, m)

    def scores(self, x: Tensor, **theta: Tensor) -> Tensor:
        """The classes `(batch, classes)`, or `(batch, tokens, classes)`."""
        from torch.nn.functional import linear

        if self.head == "mlp":
            x = linear(x, theta["V"], theta["b"]).tanh()
        return linear(x, theta["U"], theta["c"])
