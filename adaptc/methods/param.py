"""The tensors of a method."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from adaptc.errors import DefinitionError, nearest

if TYPE_CHECKING:
    from torch import Generator, Tensor

Init = Literal["zeros", "ones", "kaiming-uniform", "normal", "standard-normal"]
"""How a new parameter starts, when it does not depend on the base weight."""


@dataclass(frozen=True)
class Param:
    """One tensor of a method at a site.

    Attributes:
        shape: its shape, in the orientation checkpoints store it.
        init: a named initialisation, or a function of the site's weight `W (out, in)` in float32 (of what the method
            asks for by `calibrated`) and a seeded generator.
        key: what follows the module's name in a checkpoint, as PEFT spells it (`lora_A.weight`).
        unpack: from the shape checkpoints store to what the expression takes, where they differ: a convolution's
            `A (r, in, height, width)` to `(r, in height width)`.
        trained: it gets a gradient; else it is a buffer.
        stored: checkpoints hold it; else it follows from the options and the base.
        below: of a tensor of indices (int64) what all of them are below; None for one of numbers.

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
        shape: Any = self.shape
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise _mistake(f"the shape of a Param is a tuple of whole numbers, got {shape!r}")
        names = get_args(Init)
        if not callable(self.init) and self.init not in names:
            near = nearest(str(self.init), names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise _mistake(
                f"the init of a Param is one of {', '.join(names)}, or a function of the weight and a generator, "
                f"got {self.init!r}{hint}"
            )
        if not isinstance(self.key, str) or not self.key.strip(".") or " " in self.key:
            raise _mistake(f"the key of a Param is its name in checkpoints, got {self.key!r}")
        if self.unpack is not None and not callable(self.unpack):
            raise _mistake(f"the unpack of a Param is a function of its tensor, got {self.unpack!r}")


def _mistake(message: str) -> DefinitionError:
    """The error, with the line outside of this file that makes the parameter."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in (__name__, "dataclasses") and frame.f_back is not None:
        frame = frame.f_back
    return DefinitionError(message, f"{frame.f_code.co_filename}:{frame.f_lineno}")
