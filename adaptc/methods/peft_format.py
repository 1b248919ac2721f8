"""How PEFT's configuration spells a method, and where PEFT has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator

from adaptc.methods.site import ATTENTION, Place, WeightSite

M = TypeVar("M")
"""The class of the method that a format spells."""
LINEAR = frozenset({"Linear", "Conv1D"})
"""Layers that multiply by a matrix, as PEFT knows them; `Conv1D` is GPT-2's, stored (in, out)."""

STARTS = (True, False, None)
"""PEFT's initialisations that have no name: as the method says, or at random."""
TIES = "ensure_weight_tying"
"""PEFT's key: what changes an embedding changes the head that is tied to it, too."""


@dataclass(frozen=True)
class PeftFormat(Generic[M]):
    """How PEFT's `adapter_config.json` spells a method, and where PEFT has it.

    Where the attributes do not say enough, a subclass overrides `read`, `write`, `computed`, `sizes` or `covers`.

    Attributes:
        type: PEFT's `peft_type`; None for a method that `joins` another's checkpoint.
        options: our option's name -> PEFT's key.
        fixed: keys that must have, and are written with, this value (`use_dora: true`).
        unused: keys that PEFT asks for and does not use -> what is written for them.
        ignored: keys that do not change what the adapted model computes, whatever their value.
        neutral: keys that may change it -> the values with which adaptc computes what PEFT does.
        changes_base: beginnings of names of initialisations that change the base too, which no checkpoint holds.
        modules: options that are patterns here and lists of module names in PEFT.
        joins: the key of another method's configuration that says where this method sits, for a method that can
            be in another's checkpoint (`modules_to_save`).
        joined_as: what PEFT puts in front of the method's keys there.
        by_parameter: it can sit on a parameter that is no module's `weight` (`target_parameters`).
        layers: the classes of layers that PEFT has the method for.
        square: whether PEFT has convolutions with square kernels only.
        grouped: whether PEFT has grouped convolutions.
        tied: whether PEFT changes a tied output head with its embedding.
        ties: whether PEFT's key `ensure_weight_tying` is read there.
        hosts: the keys by which other methods can join this configuration.
        heads: where `hosts` is empty, modules that PEFT adds itself.
        any_module: whether PEFT trains every module that it is told to with it, whatever the module is.
        bare: whether keys have no `model.` in front, and keys of tensors of no module nothing at all.
    """

    type: str | None
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    fixed: Mapping[str, object] = field(default_factory=dict[str, object])
    unused: Mapping[str, int] = field(default_factory=dict[str, int])
    ignored: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    changes_base: tuple[str, ...] = ()
    modules: frozenset[str] = frozenset()
    joins: str | None = None
    joined_as: str = ""
    by_parameter: bool = False
    layers: frozenset[str] = LINEAR
    square: bool = False
    grouped: bool = False
    tied: bool = False
    ties: bool = False
    hosts: frozenset[str] = frozenset({"modules_to_save"})
    heads: frozenset[str] = frozenset()
    any_module: bool = False
    bare: bool = False

    @property
    def keys(self) -> frozenset[str]:
        """The keys of PEFT's configuration that are read for this method."""
        return frozenset({*self.options.values(), *self.fixed, *self.hosts, *({TIES} if self.ties else ())})

    @property
    def neutral_values(self) -> dict[str, tuple[object, ...]]:
        """`neutral`, and that of every method which does not read these keys: it trains no biases and ties nothing."""
        common: dict[str, tuple[object, ...]] = {
            "init_weights": STARTS,
            "bias": ("none", None),
            TIES: (False, None),
        }
        return {key: values for key, values in common.items() if key not in self.keys} | dict(self.neutral)

    def read(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of PEFT's configuration, by our names, in the values that the method takes.

        Args:
            options: our name -> PEFT's value.
        """
        return options

    def write(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of the method, by our names, in the values that PEFT's configuration has: the inverse of `read`.

        Args:
            options: our name -> our value.
        """
        return options

    def stored(self, options: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Options of PEFT's configuration, by our names, where the tensors say otherwise what was trained.

        Args:
            options: our name -> PEFT's value.
            shapes: key of each tensor -> its shape.
        """
        return options

    def joined(self, value: Any) -> tuple[dict[str, Any], Sequence[str]]:
        """What the key `joins` of another's configuration says.

        Args:
            value: its value.

        Returns:
            our options, and endings of the names of modules.

        Raises:
            InputError: it says what adaptc does not compute.
        """
        return {}, value

    def join(self, value: Any, modules: Sequence[str], options: Mapping[str, Any]) -> Any:
        """The value of the key `joins` with more modules: the inverse of `joined`.

        Args:
            value: its value without them; None where there is none.
            modules: their names.
            options: our options.
        """
        return [*(value or ()), *modules]

    def computed(self, options: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        """The options with which adaptc computes what PEFT does where PEFT adapts an attention module whole.

        Args:
            options: what `read` gives.
            targets: regexes of the modules that the configuration names.
        """
        return options

    def sizes(self, method: M, sites: Sequence[Any], every: int) -> dict[str, int] | None:
        """Keys of PEFT's configuration that follow from the sites; None if PEFT cannot have these.

        Args:
            method: the method with the options of its entry.
            sites: where it sits.
            every: how many sites of their kind the model has.
        """
        return {}

    def covers(self, method: M, site: Place) -> bool:
        """Whether PEFT has this method on such a site, and reads its tensors. PEFT has no slices of weights."""
        if not isinstance(site, WeightSite) or site.kind == "parameter":
            return True
        if site.kind == "conv":
            sides = len({*site.inner_shape[1:]})
            if (self.square and sides > 1) or (site.groups > 1 and not self.grouped):
                return False
        return site.leaf == "weight" and site.type != ATTENTION and site.layer in self.layers


def _regex(key: str) -> str:
    try:
        re.compile(_whole(key))
    except re.error as error:
        raise ValueError(f"{key!r} is not a regular expression: {error.msg}") from None
    return key


def _whole(key: str) -> str:
    return rf"(.*\.)?({key})$"


LayerKey = Annotated[str, AfterValidator(_regex)]
"""A key of PEFT's `rank_pattern` and its like: a regular expression on the end of a layer's name."""


def matches_peft_key(key: str, name: str) -> bool:
    r"""Whether a key of PEFT's `rank_pattern` or `alpha_pattern` covers this module: `(.*\.)?(key)$`."""
    return re.match(_whole(key), name) is not None


def of_pattern(patterns: Mapping[str, object], site: WeightSite, otherwise: object) -> Any:
    """The value of the first of PEFT's patterns that names a site; `otherwise` where none does."""
    name = peft_name(site)
    return next((value for key, value in patterns.items() if matches_peft_key(key, name)), otherwise)


def peft_name(site: WeightSite) -> str:
    """The name that PEFT matches its patterns with: the module's, or that of a parameter that is itself the target."""
    return f"{site.module}.{site.leaf}" if site.by_parameter else site.module
