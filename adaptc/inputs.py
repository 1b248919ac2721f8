"""The inputs of a model, as a spec describes them: `int64[batch, seq]`.

A word is a dynamic dimension, a number a fixed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adaptc.errors import unknown

DTYPES = ("int64", "int32", "bool", "float32", "float16", "bfloat16", "float64")
"""The dtypes an input can have, by torch's names."""
LABELS = "labels"
"""The input that only a loss needs. Programs for inference leave it out."""
IGNORED = -100
"""The label of positions that torch's losses skip: `ignore_index` of `torch.nn.functional.cross_entropy`."""


EXAMPLE = "the example"
"""The label of the example inputs of a call."""
ASCENDING, DESCENDING = "ascending", "descending"


@dataclass(frozen=True)
class Values:
    """What the values of an example are like, so that random ones can be drawn like them.

    Attributes:
        low: the least finite value.
        high: the greatest.
        mean: of the finite values.
        deviation: their standard deviation.
        whole: all are whole numbers.
        order: the order of every row, along the last dimension: `ascending`, `descending` or "".
        strict: no row has a value twice.
        pair: the two values, where there are no more, as in a mask; first one that fills a whole row, if one does.
    """

    low: float
    high: float
    mean: float
    deviation: float
    whole: bool = False
    order: str = ""
    strict: bool = False
    pair: tuple[float, float] | None = None


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: the argument's name.
        dtype: torch's name of the element type.
        dims: a name for each dynamic dimension (equal names are equal sizes), a number for each fixed one.
        high: the bound that example values stay below, such as a vocabulary's size. The model gives it, never a spec.
        example: the sizes of the example that was given, or usual ones, 1 where any will do; empty where there are
            none.
        boxes: whether the last dimension holds boxes: left, top, right and bottom, right not before left and bottom not
            before top.
        values: what the values of examples are like; None where there are none.
        counted: whether the model counts `0..n-1` itself where a call leaves the input out.
        placeholders: a value, and how many places in each row have it and no others: the tokens of an image in a text.
    """

    name: str
    dtype: str
    dims: tuple[str | int, ...]
    high: int | None = None
    example: tuple[int, ...] = ()
    boxes: bool = False
    values: Values | None = None
    placeholders: tuple[int, int] | None = None
    counted: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.dims)}]"

    def to_json(self) -> dict[str, Any]:
        """The input as plain data, without what few inputs have."""
        rare = ("boxes", "values", "placeholders", "counted")
        return {key: value for key, value in asdict(self).items() if key not in rare or value}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> InputSpec:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = dict(data)
        for key in ("dims", "example", "placeholders"):
            if fields.get(key) is not None:
                fields[key] = tuple(fields[key])
        if fields.get("values") is not None:
            values: dict[str, Any] = dict(fields["values"])
            values["pair"] = tuple(values["pair"]) if values["pair"] else None
            fields["values"] = Values(**values)
        return cls(**fields)

    @classmethod
    def parse(cls, name: str, text: str) -> InputSpec:
        """Read `int64[batch, seq]`; `float32[]` is a scalar.

        Raises:
            ValueError: the name is no identifier, the dtype is unknown, or a dimension is neither a word nor above 0.
        """
        if not name.isidentifier():
            raise ValueError(f"an input is named after an argument of the model, got {name!r}")
        match = re.fullmatch(r"(\w+)\s*\[(.*)\]", text.strip())
        if match is None:
            raise ValueError(f"expected a dtype and dimensions such as 'int64[batch, seq]', got {text!r}")
        dtype, dims = match[1], match[2].strip()
        if dtype not in DTYPES:
            raise ValueError(unknown("dtype", dtype, DTYPES))
        return cls(name, dtype, tuple(_dim(part.strip(), text) for part in dims.split(",")) if dims else ())


def _dim(part: str, text: str) -> str | int:
    if part.isidentifier():
        return part
    if part.isdecimal() and int(part) > 0:
        return int(part)
    raise ValueError(f"a dimension is a word (dynamic) or a number above 0 (fixed), got {part!r} in {text!r}")
