"""Trainable tokens: training of a few rows of an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

Tokens = Annotated[tuple[int, ...], Field(description="the words whose rows are trained")]


@method("trainable-tokens")
@dataclass(frozen=True)
class TrainableTokens(WeightMethod):
    """W'[t_i] = V[i]        V (n, dimensions), the new rows of the words t

    PEFT's trainable tokens: such as words that were added to the vocabulary. V starts as the rows of W.
    """

    token_indices: Tokens = ()

    kinds: ClassVar[frozenset[str]] = frozenset({"embedding"})
    small: ClassVar[Mapping[str, object]] = {"token_indices": (*range(4, 24),)}
    peft: ClassVar[PeftFormat[Any] | None] = PeftFormat(
        "TRAINABLE_TOKENS",
        options={"token_indices": "token_indices"},
        layers=frozenset({"Embedding"}),
        tied=True,
        hosts=False,
    )

    def refuses(self, site: WeightSite) -> Fault | None:
        """Words that there are, each once."""
        words, known = self.token_indices, site.in_features
        if not words:
            return Fault(
                ("token_indices",), "required: the indices of the words to train, such as [30522, 30523]"
            )
        wrong = next((word for word in words if not 0 <= word < known), None)
        if wrong is not None:
            return Fault(("token_indices",), f"the vocabulary has {known} words, so there is no word {wrong}")
        if len({*words}) < len(words):
            return Fault(("token_indices",), "a word is named twice")
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """V (n, dimensions), the rows of W, and t (n,)."""
        n, words = len(self.token_indices), list(self.token_indices)

        def places(_: Tensor, __: Generator) -> Tensor:
            import torch

            return torch.tensor(words)

        shape = (n, site.out_features)
        return {
            "V": Param(shape, lambda W, _: W[:, words].T, "trainable_tokens_delta"),
            "at": Param(
                (n,), places, "trainable_tokens_at", trained=False, stored=False, below=site.in_features
            ),
        }

    def weight(self, W: Tensor, *, V: Tensor, at: Tensor) -> Tensor:
        """W (dimensions, vocabulary) with the columns of these words replaced."""
        return W.scatter(1, at.expand(W.shape[0], -1), V.T)
