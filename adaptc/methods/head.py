"""Methods that put a new head on a model: what it gives is computed anew from the features of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from adaptc.methods.method import Method
from adaptc.methods.point_sites import HeadSite
from adaptc.methods.site import HEAD

if TYPE_CHECKING:
    from torch import Tensor

Output = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$", description="the name of what the head gives")]

GAP = "{mask}"
"""Where the mask token is in a template."""


class HeadMethod(Method[HeadSite]):
    """A method that makes a new output of the features: `y = scores(pooled(h, m))`.

    h `(batch, tokens, d)` are the features that the target's head reads, or that the target's output is: a vector in
    each row is one token. m `(batch, tokens)` is true at real tokens. The new output takes the place of the one that
    followed from these features, so that the model does not start as its base. An option named `dropout` acts on what
    `pooled` gives.
    """

    expressions: ClassVar[Mapping[str, tuple[str, ...]]] = {"pooled": ("h", "m"), "scores": ("x",)}
    sits_on = frozenset({HEAD})
    kinds = sits_on
    everywhere = True
    identity_at_init = False
    dropout: float = 0.0
    output: str = "logits"
    template: str = ""
    """The text that a row becomes, with slots in braces and the mask; "" for a method that takes texts as they are."""

    @property
    def token(self) -> int | None:
        """The number of the tokens that it reads in place of all real ones; None for these."""
        return None

    @property
    def texts(self) -> bool:
        """Whether it names words that a tokenizer must turn into numbers first."""
        return False

    def tokenized(self, number_of: Callable[[str], int], mask: int) -> Self:
        """The method with numbers in place of its words.

        Args:
            number_of: gives the number of a word that is one token.
            mask: the number of the mask token.
        """
        return self

    def pooled(self, h: Tensor, m: Tensor, *_: Any, **theta: Any) -> Tensor:
        """What the head reads, in h's dtype: `(batch, d)`, or `(batch, tokens, d)` of a head for each token."""
        raise NotImplementedError

    def scores(self, x: Tensor, *_: Any, **theta: Any) -> Tensor:
        """What the model gives, in x's dtype, from what `pooled` gives."""
        raise NotImplementedError


def mean_of_tokens(h: Tensor, m: Tensor) -> Tensor:
    """The mean `(batch, d)` of the real tokens; 0 where a row has none."""
    m = m.unsqueeze(-1)
    return h.masked_fill(~m, 0.0).sum(1) / m.sum(1).clamp(min=1).to(h.dtype)


def first_token(h: Tensor, m: Tensor) -> Tensor:
    """The first real token `(batch, d)`, wherever padding is."""
    return _token_at(h, m.long().argmax(1))


def last_token(h: Tensor, m: Tensor) -> Tensor:
    """The last real token `(batch, d)`, wherever padding is."""
    return _token_at(h, m.long().cumsum(1).argmax(1))  # argmax gives the first of equal numbers


def _token_at(h: Tensor, index: Tensor) -> Tensor:
    """The token of each row `(batch, d)` at an index `(batch,)`."""
    return h.gather(1, index[:, None, None].expand(-1, -1, h.shape[-1])).squeeze(1)
