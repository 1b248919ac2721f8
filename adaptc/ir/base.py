"""A base: a model ready to be traced, its weights apart from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx, nn

from adaptc.inputs import InputSpec
from adaptc.quantization.packed import PackedWeight
from adaptc.weights import Weight


@dataclass(frozen=True)
class Pretrained:
    """A Hugging Face checkpoint: what it takes to load it, or to write one like it.

    Attributes:
        name: its directory, or its hub id.
        auto: the Auto class of its task.
        config: its configuration as stored, with the dtype and the overrides of the spec.
        trust_remote_code: code that comes with it may be run.
    """

    name: str
    auto: Any
    config: Any
    trust_remote_code: bool


@dataclass(frozen=True)
class Bound:
    """The weights of a base as they were found: headers are read and held against the model, tensors are not loaded.

    Attributes:
        weights: name -> weight, for every persistent parameter and buffer.
        notes: what was not there and is made instead, for the person.
    """

    weights: dict[str, Weight]
    notes: tuple[str, ...] = ()


@dataclass
class Base:
    """What is traced.

    Attributes:
        describe: one line for people: where the model comes from.
        model: the module; the parameters of a Hugging Face base are fake. None for a saved program.
        program: the traced program, for a base that has no module.
        inputs: the model's inputs.
        find: finds the weights; `bound` asks it once.
        heads: modules that are output heads.
        real: the model holds its weights, so that it can be run.
        files: the base's weight files; empty for a base in memory.
        packed: of the weights those that the base holds in bits.
        notes: what the loader chose or changed before it looked for weights, for the person.
        pretrained: the checkpoint of a Hugging Face base.
    """

    describe: str
    model: nn.Module | None
    inputs: tuple[InputSpec, ...]
    find: Callable[[], Bound]
    program: fx.GraphModule | None = None
    heads: frozenset[str] = frozenset()
    real: bool = False
    files: tuple[Path, ...] = ()
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pretrained: Pretrained | None = None

    @cached_property
    def bound(self) -> Bound:
        """The weights, found once.

        Raises:
            WeightError: they are missing, broken, or not this model's.
        """
        return self.find()
