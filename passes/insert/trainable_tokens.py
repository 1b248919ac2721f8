"""Trainable tokens: training of a few rows of an embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from adaptc.errors import Fault, InputError
from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

Tokens = Annotated[tuple[int, ...], Field(description="the words whose rows are trained")]


class TokensFormat(PeftFormat["TrainableTokens"]):
    """PEFT's configuration of trainable tokens, alone or beside LoRA."""

    def joined(self, value: object) -> tuple[dict[str, Any], Sequence[str]]:
        """The tokens of the input's embedding, or those of the modules that are named: the same for all."""
        if not isinstance(value, dict):
            return {"token_indices": value}, ()
        by_module = cast(dict[str, object], value)
        tokens = list(by_module.values())
        first = tokens[0] if tokens else ()
        if any(other != first for other in tokens):
            raise InputError("adaptc trains the same tokens in all modules, and these differ")
        return {"token_indices": first}, list(by_module)

    def join(self, value: Any, modules: Sequence[str], options: Mapping[str, Any]) -> Any:
        """The tokens by module."""
        before = cast(dict[str, object], value or {})
        return {**before, **{module: list(options["token_indices"]) for module in modules}}


@method("trainable-tokens")
@dataclass(frozen=True)
class TrainableTokens(WeightMethod):
    """W'[t_i] = V[i]        V (n, dimensions), the new rows of the tokens t

    PEFT's trainable tokens, such as words that were added to the vocabulary. V starts as the rows of W.
    """

    token_indices: Tokens = ()

    kinds = frozenset({"embedding"})
    small = {"token_indices": (*range(4, 24),)}
    peft = TokensFormat(
        "TRAINABLE_TOKENS",
        options={"token_indices": "token_indices"},
        layers=frozenset({"Embedding"}),
        tied=True,
        hosts=frozenset(),
        joins="trainable_token_indices",
        joined_as="token_adapter.",
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
