"""A base: a model to be traced, apart from its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from adaptc.inputs import InputSpec
from adaptc.quantization.packed import PackedWeight
from adaptc.weights import Weight


@dataclass(frozen=True)
class Pretrained:
    """A Hugging Face checkpoint: what is needed to load it, or to write one like it.

    Attributes:
        name: its directory, or its id on the hub.
        auto: the Auto class of its task, such as `AutoModelForCausalLM`.
        config: its configuration as stored, with the dtype and the overrides of the spec.
        trust_remote_code: whether code that comes with it may be run.
        folders: the name of a part of the model -> the folder with its files in the directory; the empty name is the
            model itself. A SentenceTransformer has more parts than that.
    """

    name: str
    auto: Any
    config: Any
    trust_remote_code: bool
    folders: Mapping[str, str] = field(default_factory=lambda: {"": ""})

    @property
    def transformer(self) -> str:
        """The directory, or hub id, of the Hugging Face model itself: its configuration, weights and tokenizer."""
        return str(Path(self.name) / self.folders[""]) if self.folders[""] else self.name


@dataclass(frozen=True)
class Bound:
    """The weights of a base. Names, shapes and dtypes have been compared with the model; no tensor is loaded yet.

    Attributes:
        weights: name -> weight, for every persistent parameter and buffer.
        notes: what the checkpoint lacks and how it is initialised instead, for the user.
    """

    weights: dict[str, Weight]
    notes: tuple[str, ...] = ()


@dataclass
class Base:
    """What is traced: a model, or a program that was traced before, and where its weights are.

    Attributes:
        describe: where the model comes from, in one line for the user.
        model: the module; the parameters of a Hugging Face base are fake. None for a saved program.
        inputs: the model's inputs.
        find: finds the weights; `bound` calls it once.
        program: the traced program, for a base that has no module.
        heads: the names of the modules that are output heads; None where only the dataflow tells.
        real: the model holds its weights, so that it can be run.
        files: the base's weight files; empty for a base in memory.
        packed: name -> weight, for those that the base stores quantized.
        flatten: from the arguments of the author's own call to the inputs by name; None where they are the same.
        examples: name of an input -> the tensor that the caller gave for it; empty where none was given.
        notes: what the loader chose or changed before it looked for weights, for the user.
        pretrained: the checkpoint of a Hugging Face base; None for any other.
        beside: the names of the parts of the model that come from checkpoints of their own.
        left_out: what the model could take beside its inputs -> what stands for it, such as `zeros`.
        constants: what it takes beside its inputs, the same in every call.
    """

    describe: str
    model: nn.Module | None
    inputs: tuple[InputSpec, ...]
    find: Callable[[], Bound]
    program: fx.GraphModule | None = None
    heads: frozenset[str] | None = None
    real: bool = False
    files: tuple[Path, ...] = ()
    packed: Mapping[str, PackedWeight] = field(default_factory=dict[str, PackedWeight])
    flatten: Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, torch.Tensor]] | None = None
    examples: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    notes: list[str] = field(default_factory=list[str])
    pretrained: Pretrained | None = None
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    beside: tuple[str, ...] = ()
    constants: tuple[InputSpec, ...] = ()

    @cached_property
    def bound(self) -> Bound:
        """The weights, found when they are first asked for.

        Raises:
            WeightError: they are missing, damaged, or not this model's.
        """
        return self.find()
