"""Methods that are no weight expression: what is inserted into activations, attentions and inputs.

They state maths on tensors as weight methods do; where it goes, masks, positions, folding, saving and exporting are
the compiler's. None of them can vanish: what depends on their weights alone is folded to plain tensors, and what is
left is live and costs what the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.point_sites import AttentionSite, InputSite, Point
from adaptc.methods.site import ATTENTION_POINT, INPUT

if TYPE_CHECKING:
    from torch import Tensor

Count = Annotated[int, Field(gt=0, description="number of virtual tokens")]
Submodules = Annotated[
    int, Field(ge=1, le=2, description="2: laid out as PEFT does for an encoder and its decoder")
]
Places = Annotated[
    tuple[int, ...],
    Field(
        description="their places in the longer sequence, at its end where it is shorter; in front if left out"
    ),
]
PROMPT_KEY = "prompt_embeddings"
"""The key of virtual tokens in a checkpoint; methods call them `tokens`."""
ENCODER_OPTIONS = frozenset(
    {
        *("prefix_projection", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
        *("encoder_reparameterization_type", "tokenizer_name_or_path", "tokenizer_kwargs"),
        *("prompt_tuning_init", "prompt_tuning_init_text"),
    }
)
"""PEFT's options of what makes the tokens, which it does not store."""
CLASSIFIER_HEADS = frozenset({"classifier", "score"})
"""Modules that PEFT trains along with virtual tokens where the task is to classify."""
P = TypeVar("P", bound=Point)
M = TypeVar("M")


@dataclass(frozen=True)
class PromptMethod(Method[P], Generic[P]):
    """A method that makes virtual tokens out of weights alone. What makes them is dropped when they are saved.

    Its tensors belong to no layer. `tokens` and what is stored are `(n, ...)`, n times `num_transformer_submodules`.
    """

    num_virtual_tokens: Count = 20
    num_transformer_submodules: Submodules = 1

    everywhere = True
    identity_at_init = False

    @property
    def plain(self) -> Self:
        """The method whose only tensor is `tokens`, without what makes them."""
        return self

    def params(self, site: P) -> dict[str, Param]:
        """No layer has tensors of its own."""
        return {}

    def tokens(self, *_: Any, **theta: Any) -> Tensor:
        """The virtual tokens as they are stored, from the tensors of `shared`."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionMethod(PromptMethod[AttentionSite]):
    """A method that puts keys and values in front of every attention's own: `K' = [P_k; K]`, `V' = [P_v; V]`.

    `tokens` gives `(n, Σ heads (key size + value size))`: for every attention in order its keys `(n, heads, size)`,
    then its values. They are seen from everywhere, beyond a sliding window too, and the model counts its own
    positions from n on. With `num_transformer_submodules` 2 it sits in the self-attentions of a decoder, as PEFT has
    it: number s of S reads what belongs to number 2 s mod S, so that a part may be read by none.
    """

    expressions: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokens": ()}
    sits_on = frozenset({ATTENTION_POINT})
    kinds = sits_on

    def takes(self, site: AttentionSite) -> bool:
        """PEFT puts them into the decoder of two, where it looks at itself."""
        return self.num_transformer_submodules == 1 or site.half == "decoder"

    def columns(self, sites: Sequence[AttentionSite]) -> list[int]:
        """Where the columns that belong to every attention start, and at last their number."""
        starts = [0]
        for site in sites:
            assert site.heads is not None
            starts.append(starts[-1] + site.heads.count * (site.heads.key + site.heads.value))
        return starts


@dataclass(frozen=True)
class InputMethod(PromptMethod[InputSite]):
    """A method that puts virtual tokens `(n, d)` into the embedded input `(batch, seq, d)`.

    The model runs on n more tokens, which are never masked; its outputs are those of the real tokens. PEFT stores
    n more for a decoder, which it does not use.
    """

    expressions: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokens": ()}
    sits_on = frozenset({INPUT})
    kinds = sits_on
    positions: Places = ()

    def refuses(self, site: InputSite) -> Fault | None:
        """A place for each token, or none."""
        count, rising = len(self.positions), sorted(set(self.positions)) == list(self.positions)
        if not count or (rising and count == self.num_virtual_tokens and self.positions[0] >= 0):
            return None
        wanted = f"{self.num_virtual_tokens} places from 0 on in rising order, each once"
        words = f"expected {wanted}, got {list(self.positions)}"
        return Fault(("positions",), words)

    @property
    def texts(self) -> bool:
        """Whether it starts from words, which a tokenizer must turn into numbers."""
        return False

    def tokenized(self, tokenize: Callable[[str, bool], Sequence[int]], labels: Sequence[str]) -> Self:
        """The method with its words turned into numbers: with special tokens around them, or without."""
        return self


class TokensFormat(PeftFormat[M]):
    """PEFT's configuration of a method with virtual tokens, which it stores without what made them."""

    @classmethod
    def of(cls, type: str, **options: str) -> Self:
        """The format of a `peft_type`; `options` are ours that PEFT has besides -> its keys."""
        counts = {name: name for name in ("num_virtual_tokens", "num_transformer_submodules")}
        return cls(
            type, counts | options, ignored=ENCODER_OPTIONS, hosts=False, heads=CLASSIFIER_HEADS, bare=True
        )

    def read(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options that are null are left out."""
        return {name: value for name, value in options.items() if value is not None}


class AttentionFormat(TokensFormat["AttentionMethod"]):
    """PEFT's configuration of keys and values in front of those of attentions."""

    def sizes(
        self, method: AttentionMethod, sites: Sequence[AttentionSite], every: int
    ) -> dict[str, int] | None:
        """PEFT has them in all attentions of a model, or of a decoder, whose heads are of one size."""
        heads = sites[0].heads
        of_decoder = {site.half for site in sites} == {"decoder"}
        placed = (
            of_decoder
            if method.num_transformer_submodules == 2
            else len(sites) == every and not sites[0].half
        )
        if (
            not placed
            or heads is None
            or heads.key != heads.value
            or {site.heads for site in sites} != {heads}
        ):
            return None
        return {
            "num_layers": len(sites),
            "num_attention_heads": heads.count,
            "token_dim": heads.count * heads.key,
        }


class InputFormat(TokensFormat["InputMethod"]):
    """PEFT's configuration of virtual tokens among the embedded ones."""

    def sizes(self, method: InputMethod, sites: Sequence[InputSite], every: int) -> dict[str, int] | None:
        """PEFT has them in front. Of what it asks for, it uses the size of an embedded token."""
        return (
            None
            if method.positions
            else {"token_dim": sites[0].width, "num_layers": 1, "num_attention_heads": 1}
        )
