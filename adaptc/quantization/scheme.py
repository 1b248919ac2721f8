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

from adaptc.errors import Fault
from adaptc.methods.site import MATRIX_KINDS
from adaptc.quantization.trial import try_out
from adaptc.registry.author import Author
from adaptc.registry.definitions import check_call, check_class, check_defined, check_names, check_options
from adaptc.registry.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class StoredTensor:
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

    def takes(self, site: WeightSite) -> bool:
        """Whether it wants a site that the target names."""
        return True

    def refuses(self, rows: int, columns: int) -> Fault | None:
        """The option at fault and why a matrix of this size cannot be stored so; None if it can."""
        return None

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
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


def _check(name: str, cls: Any, author: Author) -> None:
    base = Scheme if isinstance(cls, type) and issubclass(cls, Scheme) else None
    definition = check_class("scheme", name, cls, base, "Scheme", author)
    check_options(definition)
    check_names(definition, "kinds", MATRIX_KINDS, "which kinds of site it stores")
    for hook in ("stored", "quantize", "dequantize"):
        check_defined(definition, (hook,), "which every scheme has")
    check_call(definition, "takes", ("site",))
    check_call(definition, "refuses", ("rows", "columns"))
    check_call(definition, "stored", ("rows", "columns"))
    check_call(definition, "quantize", ("W", "inputs"))
    check_call(definition, "dequantize", ("rows", "columns", "tensors"))
    check_call(definition, "unpack", ("rows", "columns", "tensors", "dtype"))
    check_call(definition, "lookup", ("rows", "columns", "tensors", "ids"))
    try_out(definition)


SCHEMES: Registry[type[Scheme]] = Registry("scheme", "adaptc.passes.quantize", check=_check)
"""Every scheme, shipped or of an installed package, by the name a spec calls it by. Reading it imports no torch."""
S = TypeVar("S", bound=type[Scheme])


def scheme(name: str) -> Callable[[S], S]:
    """Register a scheme under the name a spec calls it by.

    Raises:
        DefinitionError: the name is not kebab-case or another author's, or the class is no scheme that adaptc can
            use; names the line.
    """
    return SCHEMES.register(name)


def scheme_of(text: str) -> Scheme:
    """The scheme that a text stands for."""
    name, _, given = text.partition(" ")
    return _scheme_with(SCHEMES[name], given)


@cache
def _scheme_with(cls: type[Scheme], options: str) -> Scheme:
    """A scheme with options as JSON. A scheme that is defined again is another class."""
    return cls(**json.loads(options or "{}"))
