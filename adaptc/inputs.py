"""What a model takes: `int64[batch, seq]`. A word is a dynamic dimension, a number a fixed one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptc.errors import unknown

DTYPES = ("int64", "int32", "bool", "float32", "float16", "bfloat16", "float64")
"""The dtypes an input can have, by torch's names."""
IGNORED = -100
"""The label that torch's losses leave out."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: the argument's name.
        dtype: torch's name of the element type.
        dims: a name for each dynamic dimension (equal names are equal sizes), a number for each fixed one.
        high: example values stay below it (a vocabulary's size); known from the model, never from a spec.
    """

    name: str
    dtype: str
    dims: tuple[str | int, ...]
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.dims)}]"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        """Read what `dataclasses.asdict` wrote."""
        return cls(**{**data, "dims": tuple(data["dims"])})

    @classmethod
    def parse(cls, name: str, text: str) -> InputSpec:
        """Read `int64[batch, seq]`; `float32[]` is a scalar.

        Raises:
            ValueError: the name, the dtype or a dimension is not one.
        """
        if not name.isidentifier():
            raise ValueError(f"an input has the name of an argument, got {name!r}")
        found = re.fullmatch(r"(\w+)\s*\[(.*)\]", text.strip())
        if found is None:
            raise ValueError(f"expected a dtype and dimensions such as 'int64[batch, seq]', got {text!r}")
        dtype, dims = found[1], found[2].strip()
        if dtype not in DTYPES:
            raise ValueError(unknown("dtype", dtype, DTYPES))
        return cls(name, dtype, tuple(_dim(part.strip(), text) for part in dims.split(",")) if dims else ())


def _dim(part: str, text: str) -> str | int:
    if part.isidentifier():
        return part
    if part.isdecimal() and int(part) > 0:
        return int(part)
    raise ValueError(f"a dimension is a word (dynamic) or a number above 0 (fixed), got {part!r} in {text!r}")


LABELS = "labels"
"""The input that only a loss needs; programs for inference leave it out."""
