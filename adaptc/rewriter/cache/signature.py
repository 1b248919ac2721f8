"""What a program with a cache takes and gives, and how it is fed: the inputs of one call after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptc.inputs import InputSpec
from adaptc.rewriter.cache.past import PAST, TOTAL

Tensors = Mapping[str, torch.Tensor]
PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."
"""How the names of inputs and outputs that hold keys and values begin."""


@dataclass(frozen=True)
class CacheSignature:
    """The inputs and outputs of a program with a cache.

    Attributes:
        inputs: what it takes.
        outputs: the name of an output -> a name or a number for each of its dimensions.
        new: the name of the dimension of the new tokens.
        encoder: the name of the file, beside the program, that gives the keys and values of `cross`; None without.
        counted: whether it counts the tokens of each sequence by the mask: sequences are padded on the right, if at
            all, and behind a past it takes several tokens of one sequence, or one token of several.
    """

    inputs: tuple[InputSpec, ...]
    outputs: Mapping[str, tuple[Any, ...]]
    new: str
    encoder: str | None = None
    counted: bool = False

    @property
    def pasts(self) -> list[InputSpec]:
        """The inputs that hold keys and values of past tokens."""
        return [spec for spec in self.inputs if _is_past(spec) and not _is_cross(spec)]

    @property
    def cross(self) -> list[InputSpec]:
        """The inputs that hold keys and values which an encoder gives."""
        return [spec for spec in self.inputs if _is_cross(spec)]

    @property
    def results(self) -> list[str]:
        """The outputs of the model itself."""
        return [name for name in self.outputs if not name.startswith(PRESENT_PREFIX)]

    def count(self, tensors: Tensors) -> int:
        """How many tokens there are in inputs for all tokens."""
        spec = next(spec for spec in self.inputs if self.new in spec.dims and spec.name in tensors)
        return tensors[spec.name].shape[spec.dims.index(self.new)]

    def empty(self, batch: int, room: int = 0) -> dict[str, torch.Tensor]:
        """The keys and values of no tokens, for so many sequences.

        Args:
            batch: how many sequences.
            room: how many tokens there is room for, in a program that keeps them in one buffer.
        """
        return {
            spec.name: torch.zeros([batch, *(_size(dim, room) for dim in spec.dims[1:])], dtype=dtype(spec))
            for spec in self.pasts
        }

    def sequences(self, tensors: Tensors) -> int:
        """How many sequences there are in inputs for all tokens."""
        dim = self.pasts[0].dims[0]
        spec = next(spec for spec in self.inputs if dim in spec.dims and spec.name in tensors)
        return tensors[spec.name].shape[spec.dims.index(dim)]

    def part(self, tensors: Tensors, start: int, end: int) -> dict[str, torch.Tensor]:
        """The inputs of the tokens from `start` to `end`, without keys and values, of inputs for all tokens."""
        return {spec.name: self._part(spec, tensors[spec.name], start, end) for spec in self._others()}

    def _others(self) -> Iterator[InputSpec]:
        return (spec for spec in self.inputs if not _is_past(spec))

    def _part(self, spec: InputSpec, value: torch.Tensor, start: int, end: int) -> torch.Tensor:
        for axis, dim in enumerate(spec.dims):
            if dim == TOTAL:
                value = value.narrow(axis, 0, end)
            elif dim == self.new:
                value = value.narrow(axis, start, end - start)
        return value

    def next_past(self, outputs: Tensors) -> dict[str, torch.Tensor]:
        """The keys and values that the next call takes."""
        return {spec.name: outputs[present_of(spec.name)] for spec in self.pasts}

    def whole(self, steps: Sequence[Tensors]) -> list[torch.Tensor]:
        """The model's own outputs for all tokens, from those of calls one after the other.

        An output that is not along the tokens is that of the last call.
        """
        return [self._whole(name, [step[name] for step in steps]) for name in self.results]

    def _whole(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        dims = self.outputs[name]
        return torch.cat(list(parts), dims.index(self.new)) if self.new in dims else parts[-1]


def _is_past(spec: InputSpec) -> bool:
    return spec.name.startswith(PAST_PREFIX)


def _is_cross(spec: InputSpec) -> bool:
    return _is_past(spec) and ".cross." in spec.name


def present_of(past: str) -> str:
    """The output that the next call takes as this input: `present.0.key` of `past_key_values.0.key`."""
    return PRESENT_PREFIX + past.removeprefix(PAST_PREFIX)


def past_of(present: str) -> str:
    """The input that takes this output: `past_key_values.0.key` of `present.0.key`."""
    return PAST_PREFIX + present.removeprefix(PRESENT_PREFIX)


def dtype(spec: InputSpec) -> torch.dtype:
    """The dtype of an input."""
    return getattr(torch, spec.dtype)


def _size(dim: str | int, past: int) -> int:
    if isinstance(dim, int):
        return dim
    assert dim == PAST, f"{dim} is no dimension of keys and values"
    return past
