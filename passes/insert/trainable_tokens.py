"""Trainable tokens: training of a few rows of an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

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
    """W'[t_i] = V[i]        V (n, dimensions), the new rows of the tokens t

    PEFT's trainable tokens, such as words that were added to the vocabulary. V starts as the rows of W.
    """

    token_indices: Tokens = ()

    kinds = frozenset({"embedding"})
    small = {"token_indices": (*range(4, 24),)}
    peft = PeftFormat(
        "TRAINABLE_TOKENS",
        options={"token_indices": "token_indices"},
        layers=frozenset({"Embedding"}),
        tied=True,
        hosts=False,
    )

    def refuses(self, site: WeightSite) -> Fault | None:
        """Indices of the vocabulary, each once."""
        tokens, size = self.token_indices, site.in_features
        if not tokens:
            return Fault(
                ("token_indices",), "required: the indices of the words to train, such as [30522, 30523]"
            )
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            return Fault(("token_indices",), f"the vocabulary has {size} words, so there is no word {wrong}")
        if len({*tokens}) < len(tokens):
            return Fault(("token_indices",), "a word is named twice")
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """V (n, dimensions), the rows of W, and t (n,)."""
        n, tokens = len(self.token_indices), list(self.token_indices)

        def indices(_: Tensor, __: Generator) -> Tensor:
            import torch

            return torch.tensor(tokens)

        shape = (n, site.out_features)
        return {
            "V": Param(shape, lambda W, _: W[:, tokens].T, "trainable_tokens_delta"),
            "at": Param(
                (n,), indices, "trainable_tokens_at", trained=False, stored=False, below=site.in_features
            ),
        }

    def weight(self, W: Tensor, *, V: Tensor, at: Tensor) -> Tensor:
        """W (dimensions, vocabulary) with the columns of these tokens replaced."""
        return W.scatter(1, at.expand(W.shape[0], -1), V.T)
