"""Adaptation methods: what one states, and the registry they stand in.

A method file holds maths only. Inserting, factoring, folding, saving and exporting are derived from
`params` and `weight` by the compiler, once for all methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import DROPLESS, WEIGHT_KINDS, Place, WeightSite
from adaptc.methods.training_rule import TrainingHooks
from adaptc.methods.trial import try_out
from adaptc.registry.author import Author
from adaptc.registry.definitions import check_call, check_class, check_defined, check_names, check_options
from adaptc.registry.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Rank = Annotated[int, Field(gt=0, description="rank of the low-rank product")]
Alpha = Annotated[float, Field(gt=0, description="numerator of the scale alpha / r")]
Dropout = Annotated[float, Field(ge=0, lt=1, description="dropout on the input of the trained branch")]
Patterns = Annotated[tuple[str, ...], Field(description="globs, or re: regexes, on the module's full name")]
S = TypeVar("S", bound=Place)
"""The type of site that a kind of method sits on."""


class Method(TrainingHooks, Generic[S]):
    """What every kind of method states. Subclasses are frozen dataclasses whose fields are the options.

    A method says which tensors it has (`params`, `shared`), what it computes (the expression of its kind), and where it
    can sit (`kinds`, `takes`, `refuses`, `refuses_to_train`, `at`). How PEFT spells it is one object, `peft`; what
    happens while it is trained is in `TrainingHooks`. All but the tensors and the expression may be left out.
    """

    name: ClassVar[str]
    expressions: ClassVar[Mapping[str, tuple[str, ...]]]
    """What a kind of method computes: the name of each expression -> its operands, before its own tensors."""
    sits_on: ClassVar[frozenset[str]]
    """The kinds of site that a kind of method may sit on."""
    kinds: ClassVar[frozenset[str]]
    """The kinds of site it can sit on: `linear`, ... or `parameter` for any parameter of a module."""
    peft: ClassVar[PeftFormat[Any] | None] = None
    """How PEFT spells the method; None where PEFT does not have it."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of an option, such as PEFT's own (`lora_alpha` for `alpha`)."""
    identity_at_init: ClassVar[bool] = True
    """Whether the model computes the same as before until something is trained."""
    everywhere: ClassVar[bool] = False
    """Whether an entry without a target means every site."""
    small: ClassVar[Mapping[str, object]] = {}
    """Options that fit a layer of a few numbers, where the defaults do not: what every law is tested with."""

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

    def stored(self, site: S) -> dict[str, Param]:
        """The tensors of a site as they are kept: where it holds several matrices, one set for each of them."""
        found = self.params(site)
        if site.batch is None:
            return found
        batch = (site.batch,)
        return {k: p if p.unpack else dataclasses.replace(p, shape=batch + p.shape) for k, p in found.items()}

    def in_peft(self, site: S) -> bool:
        """Whether PEFT has this method on such a site, and reads what is stored for it."""
        return self.peft is not None and self.peft.covers(self, site)


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


def shared_name(adapter: str, key: str) -> str:
    """The full name of a tensor that all sites of an adapter share: `vera_A.default`."""
    first, dot, rest = key.partition(".")
    return f"{first}.{adapter}{dot}{rest}"
