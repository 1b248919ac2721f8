"""How a model that puts images into a text takes them: the shapes of its pixels, and what it reads of their sizes.

No model by its name: what forward takes, and the attributes of the configuration, say which layouts there can be. The
first with which the model runs is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from adaptc.inputs import InputSpec

IMAGES = "pixel_values"
USUAL_SIDE = 224
"""The side in pixels of an image where a model takes any size."""
USUAL_PATCHES = 16
"""The side in patches of an image where a model takes any number of them."""
GRIDS = ("image_grid_thw", "image_grid_hw")
"""The inputs with the number of patches of each image: frames, rows and columns."""


@dataclass(frozen=True)
class Layout:
    """How images are given.

    Attributes:
        pixels: the shape of `pixel_values`; `batch` is the number of texts, with an image each.
        constants: what a model reads in Python of an image of that shape.
    """

    pixels: tuple[str | int, ...]
    constants: tuple[InputSpec, ...] = ()


def layouts(config: Any, parameters: Container[str], reads_sizes: bool) -> Iterator[Layout]:
    """The layouts that a model can have, those first that say least.

    Args:
        config: its configuration.
        parameters: the names of what forward takes.
        reads_sizes: whether the part that sees images reads their sizes, which then are no number of tiles.
    """
    vision: Any = getattr(config, "vision_config", config)
    channels = _first(vision, "num_channels", "in_channels", "in_chans") or 3
    sides, patch = image_sides(vision), _pair(_first(vision, "patch_size"))
    if sides is not None and not reads_sizes:
        yield Layout(("batch", channels, *sides))
    if patch is not None:
        yield from _in_patches(vision, channels, sides, patch, parameters)
    if "image_sizes" in parameters:
        yield from _sized(config, channels, sides or (USUAL_SIDE, USUAL_SIDE))
    if sides is not None:
        yield Layout((1, 1, channels, *sides))


def _in_patches(
    vision: Any,
    channels: int,
    sides: tuple[int, int] | None,
    patch: tuple[int, int],
    parameters: Container[str],
) -> Iterator[Layout]:
    """Patches of images of any size in one row, and the number of rows and columns of each image."""
    merge = _merge(vision)
    rows, columns = (
        max(min(side // size, USUAL_PATCHES) // merge, 1) * merge
        for side, size in zip(sides or (sys.maxsize, sys.maxsize), patch, strict=True)
    )
    frames = _pair(_first(vision, "temporal_patch_size")) or (1, 1)
    count, numbers = rows * columns, patch[0] * patch[1] * channels
    grid = next((name for name in GRIDS if name in parameters), "")
    if grid:
        size = [1, rows, columns][-2 if grid.endswith("_hw") else 0 :]
        constants = [InputSpec.of_constant(grid, [size])]
        if "image_merge_sizes" in parameters:
            constants.append(InputSpec.of_constant("image_merge_sizes", [1]))
        if frames[0] > 1:
            yield Layout((count, frames[0] * numbers), tuple(constants))
        yield Layout((count, numbers), tuple(constants))
        yield Layout((count, channels, *patch), tuple(constants))
    if "spatial_shapes" in parameters:
        mask = InputSpec.of_constant("pixel_attention_mask", [[1] * count])
        yield Layout((1, count, numbers), (InputSpec.of_constant("spatial_shapes", [[rows, columns]]), mask))


def _sized(config: Any, channels: int, sides: tuple[int, int]) -> Iterator[Layout]:
    """An image of one size, or its tiles: the whole one made small, and the parts of it."""
    points: Sequence[Sequence[int]] = getattr(config, "image_grid_pinpoints", None) or ()
    if points:
        height, width = points[0]
        tiles = 1 + (height // sides[0]) * (width // sides[1])
        size = InputSpec.of_constant("image_sizes", [[height, width]])
        yield Layout((1, tiles, channels, *sides), (size,))
    small = tuple(min(side, USUAL_SIDE) for side in sides)
    yield Layout((1, channels, *small), (InputSpec.of_constant("image_sizes", [list(small)]),))


def image_sides(vision: Any) -> tuple[int, int] | None:
    """The height and width of an image in pixels; None where the configuration fixes none."""
    return _pair(_first(vision, "image_size", "input_size"))


def _merge(vision: Any) -> int:
    """How many patches along a side become one token."""
    size = _pair(_first(vision, "spatial_merge_size", "merge_kernel_size", "merge_size"))
    return size[0] if size else 2


def _first(config: Any, *names: str) -> Any:
    """The first of these attributes that a configuration has; None if it has none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _pair(size: Any) -> tuple[int, int] | None:
    """A size along both sides, which may be given as one number."""
    if isinstance(size, (list, tuple)):
        return cast("tuple[int, int]", tuple(cast("Sequence[int]", size))[-2:])
    return (size, size) if isinstance(size, int) else None
