"""Adaptation methods: what the author of one writes, and the registry.

A method is a frozen dataclass under `@method("its-name")` that extends `WeightMethod`, `ActivationMethod`,
`AttentionMethod`, `InputMethod` or `HeadMethod`. Its fields are the options of a spec. It must state three things:

    kinds                     the kinds of site that it can sit on
    params(site)              its tensors on a site; `shared(sites)`: those that all sites use together
    weight(W, **theta)        what a weight becomes; `bias(b, **theta)`: what a bias becomes
                              (`branch(z)` of an activation method, `tokens()` of one with virtual tokens,
                              `pooled(h, m)` and `scores(x)` of a head)

It may state where it goes:

    at(site)                  its options on one site, where they differ by site
    takes(site)               which of the sites that the target names it wants
    refuses(site)             why it cannot compute on a site; `refuses_to_train(site)`: why it makes no sense there

Everything else has one name each: `peft` is a `PeftFormat`, how PEFT spells the method; `TrainingHooks` is what happens
before and at each step of its training. The compiler derives inserting, factoring, folding, saving and exporting.
See docs/writing-a-method.md.
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
from adaptc.methods.trial import TRIALS
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
    """What every kind of method states; the module's docstring lists it in the order of need.

    A kind of method, such as `WeightMethod`, says what is computed (`expressions`) and on which sites (`sits_on`).
    """

    name: ClassVar[str]
    """What a spec calls the method; `@method` sets it."""
    expressions: ClassVar[Mapping[str, tuple[str, ...]]]
    """What a kind of method computes: the name of each expression -> its operands, before its own tensors."""
    sits_on: ClassVar[frozenset[str]]
    """The kinds of site that a kind of method may sit on."""
    kinds: ClassVar[frozenset[str]]
    """The kinds of site that the method can sit on: some of `sits_on`; `adaptc.methods.site.KINDS` lists all."""
    identity_at_init: ClassVar[bool] = True
    """Whether the model computes the same as its base until something is trained."""
    replaces: ClassVar[bool] = False
    """Whether what it adapts does not depend on the base's value any more, which its own tensors stand in for."""
    everywhere: ClassVar[bool] = False
    """Whether an entry without a target means every site."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of an option, such as PEFT's own (`lora_alpha` for `alpha`)."""
    small: ClassVar[Mapping[str, object]] = {}
    """Options that fit a layer of a few numbers, where the defaults do not: every law is tested with these."""
    peft: ClassVar[PeftFormat[Any] | None] = None
    """How PEFT spells the method; None where PEFT does not have it."""

    def params(self, site: S) -> dict[str, Param]:
        """The tensors of one matrix of a site.

        Returns:
            name -> tensor; the expression gets each as a keyword argument of that name.
        """
        raise NotImplementedError

    def shared(self, sites: Sequence[S]) -> dict[str, Param]:
        """The tensors that all sites of an entry use together; in a checkpoint they belong to no module.

        Returns:
            name -> tensor; the expression of every site gets each as a keyword argument of that name.
        """
        return {}

    def at(self, site: S) -> Self:
        """The method with the options of one site, where options differ by site (patterns of names)."""
        return self

    def takes(self, site: S) -> bool:
        """Whether the method wants a site that the target names; the compiler skips the others without a word."""
        return True

    def refuses(self, site: S) -> Fault | None:
        """The option at fault and why the method cannot compute on a site; None where it can."""
        return None

    def refuses_to_train(self, site: S) -> Fault | None:
        """The option at fault and why training makes no sense on a site; a trained adapter is not asked."""
        return None

    def stored(self, site: S) -> dict[str, Param]:
        """The tensors of a whole site, as they are kept: one set for each matrix that the site holds.

        Returns:
            name -> tensor: those of `params`, with a first axis over the matrices where there are several.
        """
        params = self.params(site)
        if site.batch is None:
            return params
        batch = (site.batch,)
        return {
            name: param if param.unpack else dataclasses.replace(param, shape=batch + param.shape)
            for name, param in params.items()
        }

    def in_peft(self, site: S) -> bool:
        """Whether PEFT has this method on such a site, and reads what is stored for it."""
        return self.peft is not None and self.peft.covers(self, site)


class WeightMethod(Method[WeightSite]):
    """A method that says what a weight becomes: `W' = E(W, θ)`, W of shape `(out, in)`.

    Write `weight` and `bias` with tensor methods and operators. They are traced once per shape and spliced in front of
    the site. W is the site's weight as a matrix: a convolution's kernel with its columns flattened, the rows of a
    slice, an embedding as `(dimensions, vocabulary)`, each of an MoE's fused experts. An option named `dropout` acts
    on the input of every term of the sum that holds what the method trains.
    """

    expressions: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": ("W",), "bias": ("b",)}
    sits_on = WEIGHT_KINDS
    dropout: float = 0.0

    # To a type checker, `*_: Any, **theta: Any` is any further parameters: authors name their tensors.

    def weight(self, W: Tensor, *_: Any, **theta: Any) -> Tensor:
        """The adapted weight `(out, in)`, in W's dtype, from W and the tensors of `params` and `shared`."""
        raise NotImplementedError

    def bias(self, b: Tensor, *_: Any, **theta: Any) -> Tensor:
        """The adapted bias `(out,)`, in b's dtype; unless overridden the base's own."""
        return b

    def at(self, site: WeightSite) -> Self:
        """Without dropout on a kind of site whose input it cannot act on; `refuses_to_train` says so in training."""
        if not self.dropout or site.kind not in DROPLESS:
            return self
        method: Any = self  # a dataclass, as `@method` checks
        return dataclasses.replace(method, dropout=0.0)

    def refuses_to_train(self, site: WeightSite) -> Fault | None:
        """Dropout needs an input of numbers, and an embedding's are indices."""
        if not self.dropout or site.kind not in DROPLESS:
            return None
        return Fault(
            ("dropout",),
            f"dropout has no input to go in front of on {site.kind}: leave it out for this entry",
        )

    def adapts_bias(self) -> bool:
        """Whether the method, with these options, changes a bias at all."""
        return type(self).bias is not WeightMethod.bias


def _check(name: str, cls: object, author: Author) -> None:
    """Whether a class is a method that adaptc can insert.

    Raises:
        DefinitionError: it is not; names the line.
    """
    base = next((c for c in getattr(cls, "__mro__", ()) if "expressions" in vars(c)), None)
    bases = "WeightMethod, ActivationMethod, AttentionMethod, InputMethod or HeadMethod"
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
    TRIALS.try_out(definition)


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


def options_of(instance: Method[Any]) -> dict[str, Any]:
    """The options of a method, for a manifest or a checkpoint: name -> value."""
    cls: type[Any] = type(instance)
    return {option.name: getattr(instance, option.name) for option in dataclasses.fields(cls)}


def summary(cls: type) -> str:
    """The first line of the docstring of a method or a scheme: its equation."""
    return next((line.strip() for line in (cls.__doc__ or "").splitlines() if line.strip()), "")


def shared_name(adapter: str, key: str) -> str:
    """The full name of a tensor that all sites of an adapter share: `vera_A.default`."""
    first, dot, rest = key.partition(".")
    return f"{first}.{adapter}{dot}{rest}"
