"""Cloze prompting: a class is the word that a masked language model puts into a gap of the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, Strict

from adaptc.errors import Fault
from adaptc.methods.head import GAP, HeadMethod, Output, mean_of_tokens
from adaptc.methods.method import Dropout, method
from adaptc.methods.param import Param

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.point_sites import HeadSite

Template = Annotated[
    str, Field(description="the text that a row becomes: slots in braces, and {mask} where the word is")
]
Verbalizer = Annotated[
    Mapping[str, Annotated[tuple[str, ...], Strict(False)]],
    Field(description="class -> the words that mean it"),
]
Numbers = Annotated[
    tuple[Annotated[tuple[int, ...], Strict(False)], ...],
    Field(description="numbers of the tokens of each class, in place of the verbalizer"),
]
Mask = Annotated[int | None, Field(ge=0, description="number of the mask token; the tokenizer's if left out")]


@method("cloze")
@dataclass(frozen=True)
class Cloze(HeadMethod):
    """y_c = 1 / |V_c| Σ_w z_w + b_c, w in V_c    z (vocabulary,)   b (classes,)    Schick and Schütze 2021, section 3.1

    z are the logits that a masked language model has at the mask of the template, and V_c the words of class c, each
    one token. b, which they do not have, starts at zero; it makes up for words that are frequent anyway. Beside it
    train the entries that adapt the model. `compiled.filled(rows)` puts texts into the template.
    """

    template: Template = "{text} It was {mask}."
    verbalizer: Verbalizer = field(default_factory=dict[str, tuple[str, ...]])
    label_tokens: Numbers = ()
    mask_token: Mask = None
    dropout: Dropout = 0.0
    output: Output = "logits"

    small: ClassVar[Mapping[str, object]] = {"label_tokens": ((3,), (4, 5)), "mask_token": 7}
    while_training = frozenset({"dropout", "template", "verbalizer"})

    @property
    def token(self) -> int | None:
        """The number of the mask token."""
        return self.mask_token

    @property
    def texts(self) -> bool:
        """Whether words must become numbers first."""
        return bool(self.verbalizer) and (not self.label_tokens or self.mask_token is None)

    def tokenized(self, number_of: Callable[[str], int], mask: int) -> Self:
        """The method with the numbers of its words."""
        numbers = tuple(tuple(map(number_of, named)) for named in self.verbalizer.values())
        return replace(self, label_tokens=numbers, mask_token=mask)

    def takes(self, site: HeadSite) -> bool:
        """An output of the model with the logits of each token."""
        return site.tokens and site.module == site.output

    def refuses(self, site: HeadSite) -> Fault | None:
        """The template has one mask, and every class has words that the model knows."""
        if self.template.count(GAP) != 1:
            return Fault(("template",), f"a template has one {GAP}, got {self.template!r}")
        if not self.label_tokens or not all(self.label_tokens):
            return Fault(
                ("verbalizer",), "it names the words of each class: {negative: [bad], positive: [good]}"
            )
        unknown = next(
            (token for tokens in self.label_tokens for token in tokens if token >= site.width), None
        )
        if unknown is not None:
            return Fault(
                ("label_tokens",), f"the model has {site.width} words, and none with the number {unknown}"
            )
        if self.mask_token is None:
            return Fault(("mask_token",), "tokens by their numbers need the number of the mask token too")
        return None

    def params(self, site: HeadSite) -> dict[str, Param]:
        """b."""
        return {"b": Param((len(self.label_tokens),), "zeros", "cloze_bias")}

    def pooled(self, h: Tensor, m: Tensor, **theta: Tensor) -> Tensor:
        """z `(batch, vocabulary)`; 0 where a row has no mask."""
        return mean_of_tokens(h, m)

    def scores(self, x: Tensor, *, b: Tensor) -> Tensor:
        """The classes `(batch, classes)`."""
        from torch import stack

        classes = [stack([x[:, number] for number in numbers]).mean(0) for numbers in self.label_tokens]
        return stack(classes, -1) + b
