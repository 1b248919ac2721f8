"""Adaptation methods: what one states, and the registry they stand in.

A method file holds maths only. Inserting, factoring, folding, saving and exporting are derived from
`params` and `weight` by the compiler, once for all methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field

from adaptc.author import Author
from adaptc.definitions import check_call, check_class, check_defined, check_names, check_options
from adaptc.errors import Fault
from adaptc.names import ATTENTION
from adaptc.param import Param
from adaptc.peft_format import PeftFormat
from adaptc.registry import Registry
from adaptc.rule import Rule
from adaptc.site import DROPLESS, WEIGHT_KINDS, Place, WeightSite
from adaptc.trial import try_out

if TYPE_CHECKING:
    from torch import Tensor

Rank = Annotated[int, Field(gt=0, description="rank of the low-rank product")]
Alpha = Annotated[float, Field(gt=0, description="numerator of the scale alpha / r")]
Dropout = Annotated[float, Field(ge=0, lt=1, description="dropout on the input of the trained branch")]
Patterns = Annotated[tuple[str, ...], Field(description="globs, or re: regexes, on the module's full name")]

S = TypeVar("S", bound=Place)
"""The type of site that a kind of method sits on."""


class Method(Generic[S]):
    """What every kind of method states. Subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]
    expressions: ClassVar[Mapping[str, tuple[str, ...]]]
    """What a kind of method computes: the name of each expression -> its operands, before its own tensors."""
    sits_on: ClassVar[frozenset[str]]
    """The kinds of site that a kind of method may sit on."""
    kinds: ClassVar[frozenset[str]]
    """The kinds of site it can sit on: `linear`, ... or `parameter` for any parameter of a module."""
    peft: ClassVar[PeftFormat | None] = None
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of an option, such as PEFT's own (`lora_alpha` for `alpha`)."""
    identity_at_init: ClassVar[bool] = True
    everywhere: ClassVar[bool] = False
    """Whether an entry without a target means every site."""
    small: ClassVar[Mapping[str, object]] = {}
    """Options that fit a layer of a few numbers, where the defaults do not: what every law is tested with."""
    while_training: ClassVar[frozenset[str]] = frozenset({"dropout"})
    """Options that do not change what a trained adapter computes."""
    fast: ClassVar[frozenset[str]] = frozenset()
    """The tensors that LoRA+ gives a larger learning rate: the outer factors, which start at zero."""

    @property
    def calibrated(self) -> bool:
        """Whether functions that initialise get the Fisher information of the weight in its place; see `calibrate`."""
        return False

    @property
    def makes_up(self) -> bool:
        """Whether functions that initialise get what quantization lost of the weight in its place."""
        return False

    @property
    def rounds(self) -> int:
        """How often a weight is quantized, each time without what is made up for so far."""
        return 1

    def made_up(self, lost: Tensor) -> Tensor:
        """What a method that `makes_up` starts by adding to a matrix that has lost so much."""
        raise NotImplementedError

    def at(self, site: S) -> Self:
        """The method with its per-layer options (patterns) resolved for one site."""
        return self

    def takes(self, site: S) -> bool:
        """Whether the method wants a site that the target names; the others are passed over."""
        return True

    def refuses(self, site: S) -> Fault | None:
        """The option at fault and why the method cannot compute what it should on this site; None if it can."""
        return None

    def refuses_to_train(self, site: S) -> Fault | None:
        """The same for what makes no sense to train; an adapter that is trained already is taken as it is."""
        return None

    def params(self, site: S) -> dict[str, Param]:
        """The tensors of one matrix of a site: argument name of the expression -> parameter."""
        raise NotImplementedError

    def shared(self, sites: Sequence[S]) -> dict[str, Param]:
        """The tensors that all sites of an entry use together; in a checkpoint they belong to no module."""
        return {}

    def rule(self, sites: Sequence[Mapping[str, Tensor]], steps: int | None) -> Rule | None:
        """What happens at each step of a training of so many steps; `sites` are the tensors of every site.

        Raises:
            ValueError: it needs to know the number of steps.
        """
        return None

    def calibrate(self, information: Mapping[str, Tensor]) -> Self:
        """The method with what depends on data resolved, from the Fisher information of every site's weight."""
        return self

    def compact(self, sites: Mapping[str, dict[str, Tensor]]) -> tuple[Self, Mapping[str, dict[str, Tensor]]]:
        """The same adapter without what training has pruned: its options, and the tensors of every module."""
        return self, sites

    def cut(self, r: int) -> Self | None:
        """The method at a smaller rank, where ranks are nested; None where they are not."""
        return None

    def cut_tensors(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a larger rank, cut to this method's."""
        return dict(theta)

    def stored(self, site: S) -> dict[str, Param]:
        """The tensors of a site as they are kept: where it holds several matrices, one set for each of them."""
        found = self.params(site)
        if site.batch is None:
            return found
        batch = (site.batch,)
        return {k: p if p.unpack else dataclasses.replace(p, shape=batch + p.shape) for k, p in found.items()}

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a trained adapter, without what only its start depended on."""
        return options

    @classmethod
    def read_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options as PEFT's configuration has them, in the values that the method takes."""
        return cls.trained_options(options)

    def peft_options(self) -> dict[str, Any]:
        """Options in the values that PEFT's configuration has: the inverse of `read_options`."""
        return options_of(self)

    @classmethod
    def from_peft(cls, options: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        """The options that give what PEFT computes; `targets` are regexes of the modules it names."""
        return options

    def peft_sizes(self, sites: Sequence[S], every: int) -> dict[str, int] | None:
        """What PEFT's configuration says of the sites, of `every` there are; None if PEFT cannot have these."""
        return {}

    def in_peft(self, site: S) -> bool:
        """Whether PEFT has this method on such a layer, and reads what is stored for it. It knows no slices."""
        if self.peft is None or site.kind == "parameter":
            return self.peft is not None
        if site.kind == "conv":
            sides = len({*site.inner_shape[1:]})
            if (self.peft.square and sides > 1) or (site.groups > 1 and not self.peft.grouped):
                return False
        return site.leaf == "weight" and site.type != ATTENTION and site.layer in self.peft.layers


class WeightMethod(Method[WeightSite]):
    """A method that says what a weight becomes: `W' = E(W, θ)`, W of shape `(out, in)`.

    `weight` and `bias` are written with tensor methods and operators; they are traced once per shape and
    spliced in front of the site. W is the site's weight as a matrix: a convolution's kernel with its columns
    flattened, the rows of a slice, an embedding as `(dimensions, vocabulary)`; of fused experts each in turn. A
    field named `dropout` is applied to the input of every term of the sum that holds what the method trains.
    """

    expressions: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": ("W",), "bias": ("b",)}
    sits_on = WEIGHT_KINDS
    dropout: float = 0.0

    def at(self, site: WeightSite) -> Self:
        """Without dropout where there is no input for it to go in front of."""
        if not self.dropout or site.kind not in DROPLESS:
            return self
        return dataclasses.replace(self, dropout=0.0)  # type: ignore[type-var]

    def refuses_to_train(self, site: WeightSite) -> Fault | None:
        """Indices cannot be dropped."""
        if not self.dropout or site.kind not in DROPLESS:
            return None
        return Fault(
            ("dropout",),
            f"dropout has no input to go in front of on {site.kind}: leave it out for this entry",
        )

    def weight(self, W: Tensor, **theta: Tensor) -> Tensor:
        """The adapted weight `(out, in)`."""
        raise NotImplementedError

    def bias(self, b: Tensor, **theta: Tensor) -> Tensor:
        """The adapted bias `(out,)`; the base's own unless the method says otherwise."""
        return b

    def adapts_bias(self) -> bool:
        """Whether the method, with these options, changes a bias at all."""
        return type(self).bias is not WeightMethod.bias


def _check(name: str, cls: Any, author: Author) -> None:
    base = next((c for c in getattr(cls, "__mro__", ()) if "expressions" in vars(c)), None)
    bases = "WeightMethod, ActivationMethod, AttentionMethod or InputMethod"
    definition = check_class("method", name, cls, base, bases, author)
    assert base is not None
    expressions: Mapping[str, tuple[str, ...]] = base.expressions
    check_options(definition)
    check_names(definition, "kinds", base.sits_on, "which kinds of site it sits on")
    check_defined(definition, list(expressions), "the expression that it inserts")
    check_defined(definition, ("params", "shared"), "the tensors of its expression")
    for hook in ("at", "takes", "refuses", "refuses_to_train", "params"):
        check_call(definition, hook, ("site",))
    check_call(definition, "shared", ("sites",))
    for hook, operands in expressions.items():
        check_call(definition, hook, operands, None)
    try_out(definition)


METHODS: Registry[type[Method[Any]]] = Registry("method", "adaptc.passes.insert", check=_check)
"""Every method, shipped or of an installed package, by the name a spec calls it by. Reading it imports no torch."""


M = TypeVar("M", bound=type[Method[Any]])


def method(name: str) -> Callable[[M], M]:
    """Register a method under the name a spec calls it by. A class that is defined again replaces the earlier one.

    Raises:
        DefinitionError: the name is not kebab-case or another author's, or the class is no method that adaptc can
            insert; names the line.
    """
    return METHODS.register(name)


def options_of(instance: Method) -> dict[str, Any]:
    """The options of a method as plain values, for a manifest or a checkpoint."""
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}  # type: ignore[arg-type]


def summary(cls: type) -> str:
    """The first line of the docstring of a method, a scheme: its equation."""
    return next((line.strip() for line in (cls.__doc__ or "").splitlines() if line.strip()), "")
