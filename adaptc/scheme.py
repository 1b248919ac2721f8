"""Quantization schemes: what one states, and the registry they stand in.

A scheme says how a matrix is stored in few bits and what the stored numbers stand for. Where it stands in the graph,
what is multiplied by it, checkpoints, reports and ONNX are the compiler's, once for all schemes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from adaptc.method import MATRIX_KINDS
from adaptc.registered import register, require_frozen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adaptc.sites import Site

Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Kept:
    """One stored tensor of a matrix: its shape, and its dtype by torch's name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Scheme:
    """How a matrix `W (rows, columns)` is stored. Subclasses are frozen dataclasses whose fields are the options.

    Rows are the outputs of a layer, or the entries of an embedding; blocks lie along the columns.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = MATRIX_KINDS
    """The kinds of site it can stand for."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of an option."""
    small: ClassVar[Mapping[str, object]] = {}
    """Options that fit a layer of a few numbers: what every law is tested with."""
    calibrated: ClassVar[bool] = False
    """Whether it chooses by the inputs of the layer."""

    def takes(self, site: Site) -> bool:
        """Whether it wants a site that the target names."""
        return True

    def refuses(self, rows: int, columns: int) -> tuple[tuple[str, ...], str] | None:
        """The option at fault and why a matrix of this size cannot be stored so; None if it can."""
        return None

    def stored(self, rows: int, columns: int) -> dict[str, Kept]:
        """What is kept of a matrix: argument of `dequantize` -> tensor."""
        raise NotImplementedError

    def constants(self) -> dict[str, Tensor]:
        """What all matrices share, such as a table: argument of `dequantize` -> tensor."""
        return {}

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """What is kept of W (rows, columns), float32; `inputs` (tokens, columns) where it is `calibrated`."""
        raise NotImplementedError

    def without_inputs(self) -> Scheme:
        """The scheme that stores alike and chooses by the weights alone."""
        return self

    def dequantize(self, rows: int, columns: int, tensors: Tensors) -> Tensor:
        """What the stored numbers stand for: `(rows, columns)`, float32."""
        raise NotImplementedError

    def unpack(self, rows: int, columns: int, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The same in another dtype, by a faster kernel where one is installed."""
        return self.dequantize(rows, columns, tensors).to(dtype)

    def lookup(self, rows: int, columns: int, tensors: Tensors, ids: Tensor) -> Tensor:
        """Some rows of what the stored numbers stand for: `(*ids, columns)`, float32."""
        from torch.nn.functional import embedding

        return embedding(ids, self.dequantize(rows, columns, tensors))

    @property
    def text(self) -> str:
        """The scheme and its options as text, such as `nf4 {"double": true}`; `scheme_of` reads it."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {f.name: held[f.name] for f in dataclasses.fields(self) if held[f.name] != f.default}
        return f"{self.name} {json.dumps(given)}" if given else self.name


SCHEMES: dict[str, type[Scheme]] = {}
"""Every scheme known, by the name it has in a spec. Filled by the decorator; see `registry.load_schemes`."""

S = TypeVar("S", bound=type[Scheme])


def scheme(name: str) -> Callable[[S], S]:
    """Register a scheme under the name a spec calls it by.

    Raises:
        ValueError: the name is not kebab-case, is taken by another class, or the class is no frozen dataclass.
    """

    def decorate(cls: S) -> S:
        require_frozen("scheme", name, cls)
        register(SCHEMES, "scheme", name, cls)
        return cls

    return decorate


@cache
def scheme_of(text: str) -> Scheme:
    """The scheme that a text stands for."""
    from adaptc.registry import load_schemes

    name, _, given = text.partition(" ")
    options: dict[str, Any] = json.loads(given or "{}")
    return load_schemes()[name](**options)
