"""Methods with virtual tokens: keys and values of attentions, and vectors among the embedded input.

They state how weights become tokens. The compiler inserts the tokens and extends masks and positions. Folding
evaluates the tokens to constants, which stay in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import STARTS, PeftFormat
from adaptc.methods.point_sites import AttentionSite, InputSite, Point
from adaptc.methods.site import ATTENTION_POINT, INPUT

if TYPE_CHECKING:
    from torch import Tensor

Count = Annotated[int, Field(gt=0, description="number of virtual tokens")]
Submodules = Annotated[
    int, Field(ge=1, le=2, description="2: laid out as PEFT does for an encoder and its decoder")
]
Positions = Annotated[
    tuple[int, ...],
    Field(
        description="their positions in the longer sequence, at its end where it is shorter; first if left out"
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
"""PEFT's options of the network that makes the tokens, which PEFT does not store."""
LAYER_SIZES = ("num_layers", "num_attention_heads")
"""PEFT's keys that say how large attentions are."""
CLASSIFIER_HEADS = frozenset({"classifier", "score"})
"""Modules that PEFT trains with virtual tokens where the task is to classify."""
P = TypeVar("P", bound=Point)
M = TypeVar("M")


@dataclass(frozen=True)
class PromptMethod(Method[P], Generic[P]):
    """A method that makes virtual tokens of weights alone. Checkpoints hold the tokens, without what makes them.

    Its tensors belong to no layer. `tokens` is `(n s, ...)`, n `num_virtual_tokens`, s `num_transformer_submodules`.
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
        """Nothing: `shared` has all tensors."""
        return {}

    def tokens(self, *_: Any, **theta: Any) -> Tensor:
        """The virtual tokens as they are stored, from the tensors of `shared`."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionMethod(PromptMethod[AttentionSite]):
    """A method that puts keys and values before those of every attention: `K' = [P_k; K]`, `V' = [P_v; V]`.

    `tokens` is `(n, Σ heads (key size + value size))`: for every attention in order its keys `(n, heads, size)`, then
    its values. Every query sees them, beyond a sliding window too, and the positions of the model's own tokens start
    at n. With `num_transformer_submodules` 2 the method sits in the self-attentions of a decoder, as in PEFT:
    attention number s of S reads the columns of number 2 s mod S, so that some columns have no reader.
    """

    expressions: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokens": ()}
    sits_on = frozenset({ATTENTION_POINT})
    kinds = sits_on

    def takes(self, site: AttentionSite) -> bool:
        """With two submodules, the self-attentions of the decoder alone, as in PEFT."""
        return self.num_transformer_submodules == 1 or site.half == "decoder"

    def columns(self, sites: Sequence[AttentionSite]) -> list[int]:
        """The first column of `tokens` for every attention, then the number of all columns."""
        starts = [0]
        for site in sites:
            assert site.heads is not None
            starts.append(starts[-1] + site.heads.count * (site.heads.key + site.heads.value))
        return starts


@dataclass(frozen=True)
class InputMethod(PromptMethod[InputSite]):
    """A method that puts virtual tokens `(n, d)` into the embedded input `(batch, seq, d)`.

    The model runs on n more tokens, which are never masked. Its outputs are those of the real tokens. For a decoder,
    PEFT stores n more tokens that nothing reads.
    """

    expressions: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokens": ()}
    sits_on = frozenset({INPUT})
    kinds = sits_on
    positions: Positions = ()

    def refuses(self, site: InputSite) -> Fault | None:
        """`positions` is empty, or has a position for each token, in rising order from 0 on."""
        count, rising = len(self.positions), sorted(set(self.positions)) == list(self.positions)
        if not count or (rising and count == self.num_virtual_tokens and self.positions[0] >= 0):
            return None
        expected = f"{self.num_virtual_tokens} positions from 0 on in rising order, each once"
        return Fault(("positions",), f"expected {expected}, got {list(self.positions)}")

    @property
    def texts(self) -> bool:
        """Whether the tokens start from words that a tokenizer must turn into numbers first."""
        return False

    def tokenized(self, tokenize: Callable[[str, bool], Sequence[int]], labels: Sequence[str]) -> Self:
        """The method with numbers in place of its words.

        Args:
            tokenize: gives the numbers of a text; with special tokens around them where its second argument is True.
            labels: the names of the classes.
        """
        return self


class TokensFormat(PeftFormat[M]):
    """PEFT's configuration of a method with virtual tokens, of which PEFT stores the tokens alone."""

    @classmethod
    def of(cls, type: str, unused: Sequence[str] = (), **options: str) -> Self:
        """The format that methods with virtual tokens share.

        Args:
            type: PEFT's `peft_type`.
            unused: keys that PEFT asks for and does not use.
            options: options of this method alone: our name -> PEFT's key.
        """
        counts = {name: name for name in ("num_virtual_tokens", "num_transformer_submodules")}
        return cls(
            type,
            counts | options,
            unused=dict.fromkeys(unused, 1),
            ignored=ENCODER_OPTIONS,
            neutral={"init_weights": (*STARTS, "zero")},
            hosts=frozenset(),
            heads=CLASSIFIER_HEADS,
            bare=True,
        )

    def read(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that are not null."""
        return {name: value for name, value in options.items() if value is not None}


class AttentionFormat(TokensFormat["AttentionMethod"]):
    """PEFT's configuration of keys and values before those of attentions."""

    def sizes(
        self, method: AttentionMethod, sites: Sequence[AttentionSite], every: int
    ) -> dict[str, int] | None:
        """Layers, heads and width; None unless the sites are all attentions, or a decoder's, with heads of one size."""
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
        """The width of an embedded token; None unless the virtual ones are first."""
        return None if method.positions else {"token_dim": sites[0].width}
