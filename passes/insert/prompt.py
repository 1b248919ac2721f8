"""Prompt tuning: trained vectors among the embedded tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, Strict

from adaptc.errors import Fault
from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.virtual_tokens import LAYER_SIZES, PROMPT_KEY, InputFormat, InputMethod

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.point_sites import InputSite

Start = Annotated[
    Literal["RANDOM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS"],
    Field(description="N(0, 1); drawn from the vocabulary; the words of init_text; the names of the classes"),
]
Words = Annotated[str | None, Field(min_length=1, description="the words that TEXT starts from")]
Tokens = Annotated[
    tuple[Annotated[tuple[int, ...], Strict(False)], ...],
    Field(
        description="numbers of the tokens to start from, in place of words: each virtual token the mean of some"
    ),
]


@method("prompt")
@dataclass(frozen=True)
class Prompt(InputMethod):
    """X' = [P; X]    P (n, d)   X (seq, d)    Lester et al. 2021, sections 2 and 2.1

    P starts as random numbers (`RANDOM`), as the embeddings of random words (`SAMPLE_VOCAB`), of the words of
    `init_text`, repeated where there are fewer than n (`TEXT`), or of the names of the classes, then of random words
    (`CLASS_LABELS`).
    """

    init: Start = "RANDOM"
    init_text: Words = None
    init_tokens: Tokens = ()

    aliases = {
        "prompt_tuning_init": "init",
        "prompt_tuning_init_text": "init_text",
    }
    small = {"num_virtual_tokens": 3}
    while_training = frozenset({"init", "init_text", "init_tokens"})
    peft = InputFormat.of("PROMPT_TUNING", unused=LAYER_SIZES)

    @property
    def texts(self) -> bool:
        """Whether P starts from words that a tokenizer must turn into numbers first."""
        given = self.init_text is not None if self.init == "TEXT" else self.init == "CLASS_LABELS"
        return given and not self.init_tokens

    def tokenized(self, tokenize: Callable[[str, bool], Sequence[int]], labels: Sequence[str]) -> Self:
        """The method with `init_tokens`: the numbers of its words, or of the names of the classes."""
        if self.init == "TEXT":
            return replace(
                self, init_tokens=tuple((number,) for number in tokenize(str(self.init_text), True))
            )
        return replace(self, init_tokens=tuple(tuple(tokenize(label, False)) for label in labels))

    def refuses_to_train(self, site: InputSite) -> Fault | None:
        """`TEXT` needs a text."""
        if self.init == "TEXT" and not self.init_text and not self.init_tokens:
            return Fault(("init",), "TEXT starts from init_text, which is not given")
        return None

    def shared(self, sites: Sequence[InputSite]) -> dict[str, Param]:
        """P (n, d)."""
        n = self.num_virtual_tokens * self.num_transformer_submodules
        start = "standard-normal" if self.init == "RANDOM" else self._embedded
        return {"tokens": Param((n, sites[0].width), start, PROMPT_KEY)}

    def _embedded(self, table: Tensor, generator: Generator) -> Tensor:
        """P (n, d) of rows of the table `(words, d)`: for each token the mean of its given rows, then random rows."""
        from torch import randint, stack, tensor

        n = self.num_virtual_tokens * self.num_transformer_submodules
        given = [table[tensor(numbers)].mean(0) for numbers in self.init_tokens]
        if self.init == "TEXT":
            given *= -(-n // len(given))
        drawn = table[randint(len(table), (n,), generator=generator)]
        return stack([*given, *drawn][:n])

    def tokens(self, **theta: Tensor) -> Tensor:
        """P `(n, d)`."""
        return theta["tokens"]
