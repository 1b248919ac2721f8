"""Quantization schemes: what one states, and the registry they stand in.

A scheme says how a matrix is stored in few bits and how it is dequantized. Rewriting the graph, checkpoints, reports
and ONNX are derived by the compiler, once for all schemes.
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
from adaptc.quantization.trial import TRIALS
from adaptc.registry.author import Author
from adaptc.registry.definitions import check_call, check_class, check_defined, check_names, check_options
from adaptc.registry.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Tensors = Mapping[str, "Tensor"]
"""What a scheme stores of a matrix, and its constants: argument of `dequantize` -> tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor of a matrix: its shape, and the name of its dtype in torch, such as `uint8`."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Scheme:
    """How a matrix `W (rows, columns)` is stored. Subclasses are frozen dataclasses whose fields are the options.

    Rows are the outputs of a layer, or the entries of an embedding; blocks lie along the columns.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = MATRIX_KINDS
    """The kinds of site whose weight it can store."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spelling of an option -> the option's name."""
    small: ClassVar[Mapping[str, object]] = {}
    """Options that fit a layer of a few numbers, where the defaults do not: what every law is tested with."""
    calibrated: ClassVar[bool] = False
    """Whether `quantize` needs inputs of the layer, from the spec's `calibration`."""

    def takes(self, site: WeightSite) -> bool:
        """Whether it wants a site that the target names; the others are passed over."""
        return True

    def refuses(self, rows: int, columns: int) -> Fault | None:
        """The option at fault and why a matrix of this size cannot be stored so; None if it can."""
        return None

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """What is stored of a matrix: argument of `dequantize` -> shape and dtype."""
        raise NotImplementedError

    def constants(self) -> dict[str, Tensor]:
        """Tensors that all matrices share, such as a table: argument of `dequantize` -> tensor."""
        return {}

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Quantize a matrix.

        Args:
            W: `(rows, columns)`, float32.
            inputs: of the layer, `(tokens, columns)`, float32, if the scheme is `calibrated`; else None.

        Returns:
            The tensors that `stored` states, by the same names.
        """
        raise NotImplementedError

    def without_inputs(self) -> Scheme:
        """The scheme to take where there are no inputs to calibrate with: one of the same size, or itself."""
        return self

    def dequantize(self, rows: int, columns: int, tensors: Tensors) -> Tensor:
        """The dequantized matrix `(rows, columns)`, float32; `tensors` are what is stored and the constants."""
        raise NotImplementedError

    def unpack(self, rows: int, columns: int, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix in a dtype, by a faster kernel than `dequantize` where one is installed."""
        return self.dequantize(rows, columns, tensors).to(dtype)

    def lookup(self, rows: int, columns: int, tensors: Tensors, ids: Tensor) -> Tensor:
        """The rows `ids` of the dequantized matrix: `(*ids, columns)`, float32."""
        from torch.nn.functional import embedding

        return embedding(ids, self.dequantize(rows, columns, tensors))

    @property
    def text(self) -> str:
        """The scheme and its options as text, such as `nf4 {"double": true}`; `scheme_of` reads it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options = {f.name: values[f.name] for f in dataclasses.fields(self) if values[f.name] != f.default}
        return f"{self.name} {json.dumps(options)}" if options else self.name


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
    TRIALS.try_out(definition)


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
    """The scheme whose `text` this is."""
    name, _, options = text.partition(" ")
    return _scheme_with(SCHEMES[name], options)


@cache
def _scheme_with(cls: type[Scheme], options: str) -> Scheme:
    """A scheme with options as JSON. Cached by class, not name: a scheme that is defined again is another class."""
    return cls(**json.loads(options or "{}"))
