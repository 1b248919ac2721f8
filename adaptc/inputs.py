"""The inputs of a model, as a spec describes them: `int64[batch, seq]`.

A word is a dynamic dimension, a number a fixed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from adaptc.errors import unknown

DTYPES = ("int64", "int32", "bool", "float32", "float16", "bfloat16", "float64")
"""The dtypes an input can have, by torch's names."""
KINDS = {int: "int64", float: "float32", bool: "bool"}
"""The type of a constant's values -> its dtype."""
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
        constant: the values of an input that is the same in every call, such as the size of an image which the model
            reads in Python; None for an input of a call.
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
    constant: tuple[Any, ...] | None = None

    def __str__(self) -> str:
        if self.constant is not None:
            return str(self.stated)
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.dims)}]"

    @property
    def stated(self) -> Any:
        """What a spec states of the input: `int64[batch, seq]`, or the values of a constant in lists."""
        return str(self) if self.constant is None else _lists(self.constant)

    def to_json(self) -> dict[str, Any]:
        """The input as plain data, without what few inputs have."""
        rare = ("boxes", "values", "placeholders", "counted", "constant")
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
        if fields.get("constant") is not None:
            fields["constant"] = _tuples(fields["constant"])
        return cls(**fields)

    @classmethod
    def of_constant(cls, name: str, values: Sequence[Any]) -> InputSpec:
        """An input that is the same in every call.

        Args:
            name: the argument's name.
            values: whole numbers, fractions or booleans in lists: `[[1, 16, 16]]`.

        Raises:
            ValueError: the lists are empty or of different lengths, or hold something else.
        """
        leaves, shape = _leaves(values)
        kinds: set[type[object]] = {type(leaf) for leaf in leaves}
        dtype = next(
            (d for kind, d in KINDS.items() if kinds == {kind}), "float32" if kinds == {int, float} else ""
        )
        if not dtype:
            raise ValueError(f"a constant is a list of numbers or of booleans, got {values!r}")
        return cls(name, dtype, shape, constant=_tuples(values))

    @classmethod
    def parse(cls, name: str, text: object) -> InputSpec:
        """Read `int64[batch, seq]`; `float32[]` is a scalar, and a list is the value of a constant.

        Raises:
            ValueError: the name is no identifier, the dtype is unknown, or a dimension is neither a word nor above 0.
        """
        if not name.isidentifier():
            raise ValueError(f"an input is named after an argument of the model, got {name!r}")
        if isinstance(text, (list, tuple)):
            return cls.of_constant(name, cast("Sequence[Any]", text))
        text = str(text)
        match = re.fullmatch(r"(\w+)\s*\[(.*)\]", text.strip())
        if match is None:
            raise ValueError(f"expected a dtype and dimensions such as 'int64[batch, seq]', got {text!r}")
        dtype, dims = match[1], match[2].strip()
        if dtype not in DTYPES:
            raise ValueError(unknown("dtype", dtype, DTYPES))
        return cls(name, dtype, tuple(_dim(part.strip(), text) for part in dims.split(",")) if dims else ())


def _leaves(values: Any) -> tuple[list[Any], tuple[int, ...]]:
    """The values in nested lists, and the shape of these.

    Raises:
        ValueError: a list is empty, or lists differ in length.
    """
    if not isinstance(values, (list, tuple)):
        return [values], ()
    parts = [_leaves(part) for part in cast("Sequence[Any]", values)]
    if not parts or any(shape != parts[0][1] for _, shape in parts):
        raise ValueError(f"the lists of a constant are of one length, got {values!r}")
    return [leaf for leaves, _ in parts for leaf in leaves], (len(parts), *parts[0][1])


def _tuples(values: Any) -> Any:
    if not isinstance(values, (list, tuple)):
        return values
    return tuple(_tuples(value) for value in cast("Sequence[Any]", values))


def _lists(values: Any) -> Any:
    if not isinstance(values, (list, tuple)):
        return values
    return [_lists(value) for value in cast("Sequence[Any]", values)]


def _dim(part: str, text: str) -> str | int:
    if part.isidentifier():
        return part
    if part.isdecimal() and int(part) > 0:
        return int(part)
    raise ValueError(f"a dimension is a word (dynamic) or a number above 0 (fixed), got {part!r} in {text!r}")
