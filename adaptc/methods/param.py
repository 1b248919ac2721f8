"""What a method says of each of its tensors: shape, start, and name in checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from adaptc.errors import DefinitionError, did_you_mean

if TYPE_CHECKING:
    from torch import Generator, Tensor

Init = Literal["zeros", "ones", "kaiming-uniform", "normal", "standard-normal"]
"""How a new parameter starts, when it does not depend on the base weight."""


@dataclass(frozen=True)
class Param:
    """One tensor of a method at a site.

    Attributes:
        shape: its shape, in the orientation checkpoints store it.
        init: a named initialisation, or a function of the site's weight `W (out, in)` in float32 and a seeded
            generator. A method that is `calibrated` or `compensates` gets another matrix in place of W.
        key: what follows the module's name in a checkpoint, as PEFT spells it (`lora_A.weight`).
        unpack: from the shape in checkpoints to the shape in the expression, where they differ: a convolution's
            `A (r, in, height, width)` to `(r, in height width)`.
        trained: whether it gets a gradient; else it is a buffer.
        stored: whether checkpoints hold it; else it follows from the options and the base.
        below: for a tensor of indices (int64) a bound that all of them are below; None for a tensor of numbers.

    Raises:
        DefinitionError: one of these is something else; names the line that makes the parameter.
    """

    shape: tuple[int, ...]
    init: Init | Callable[[Tensor, Generator], Tensor]
    key: str
    unpack: Callable[[Tensor], Tensor] | None = None
    trained: bool = True
    stored: bool = True
    below: int | None = None

    def __post_init__(self) -> None:
        shape, key = cast("object", self.shape), cast("object", self.key)
        if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in self.shape):
            raise _mistake(f"the shape of a Param is a tuple of whole numbers, got {self.shape!r}")
        names = get_args(Init)
        if not callable(self.init) and self.init not in names:
            hint = did_you_mean(str(self.init), names)
            raise _mistake(
                f"the init of a Param is one of {', '.join(names)}, or a function of the weight and a generator, "
                f"got {self.init!r}{hint}"
            )
        if not isinstance(key, str) or not key.strip(".") or " " in key:
            raise _mistake(f"the key of a Param is its name in checkpoints, got {key!r}")
        if self.unpack is not None and not callable(self.unpack):
            raise _mistake(f"the unpack of a Param is a function of its tensor, got {self.unpack!r}")


def _mistake(message: str) -> DefinitionError:
    """The error, with the line outside of this file that makes the parameter."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "dataclasses"):
        frame = frame.f_back
    assert frame is not None
    return DefinitionError(message, f"{frame.f_code.co_filename}:{frame.f_lineno}")
