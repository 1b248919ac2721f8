"""What a Hugging Face model takes and how it is set for a trace: two tables, no model by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from torch import nn

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec


@dataclass(frozen=True)
class Row:
    """The inputs of every model with this main input, whose configuration has these attributes.

    `inputs` is spelled as in a spec; a name in braces is a size of `SIZES`, or an attribute of the configuration.
    """

    main: str
    attributes: tuple[str, ...]
    inputs: Mapping[str, str]


INPUTS = (
    Row("input_ids", (), {"input_ids": "int64[batch, seq]", "attention_mask": "int64[batch, seq]"}),
    Row("pixel_values", (), {"pixel_values": "{dtype}[batch, {channels}, {height}, {width}]"}),
    Row(
        "input_features",
        ("num_mel_bins", "max_source_positions"),
        {"input_features": "{dtype}[batch, {num_mel_bins}, {frames}]"},
    ),
    Row("input_values", ("conv_stride",), {"input_values": "{dtype}[batch, samples]"}),
    Row(
        "input_values",
        ("max_length", "num_mel_bins"),
        {"input_values": "{dtype}[batch, {max_length}, {num_mel_bins}]"},
    ),
)
"""Texts, images, log-mel frames before an encoder of two strides, waveforms, and spectrograms of a fixed length."""
DECODER = {"decoder_input_ids": "int64[batch, decoder_seq]"}
"""What a model with a decoder of its own takes besides."""
SIZES: Mapping[str, Callable[[Any], object]] = {
    "dtype": lambda config: str(config.dtype).removeprefix("torch."),
    "channels": lambda config: getattr(config, "num_channels", 3),
    "height": lambda config: _side(config, 0) or "height",
    "width": lambda config: _side(config, 1) or "width",
    "frames": lambda config: 2 * config.max_source_positions,
}
"""Sizes that are not an attribute as it stands. An image's sides are dynamic where the configuration fixes none."""


@dataclass(frozen=True)
class Setting:
    """An attribute of a configuration that a graph cannot follow: `replaced` values become `value`, and why."""

    attribute: str
    replaced: Callable[[Any], bool]
    value: object
    why: str


SETTINGS = (
    Setting(r"\w*layer_?drop", bool, 0.0, "a graph has a fixed number of layers"),
    Setting(r"apply_spec_augment", bool, False, "its masks are drawn in Python, outside of the graph"),
    Setting(
        r"_experts_implementation",
        lambda value: value == "eager",
        "grouped_mm",
        "the eager loop runs over the experts that were hit, which only the data tells",
    ),
)
"""What is set before a model is built; each change is a note of the base."""


def derive_inputs(model: nn.Module, config: Any) -> tuple[InputSpec, ...]:
    """The inputs of a model, from its main input's name and its configuration.

    Raises:
        TraceError: they cannot be derived.
    """
    main = getattr(model, "main_input_name", "input_ids")
    rows = (row for row in INPUTS if row.main == main and all(hasattr(config, a) for a in row.attributes))
    row = next(rows, None)
    if row is None:
        raise TraceError(
            f"the inputs of {type(model).__name__} cannot be derived; write them in the spec, such as",
            "inputs:",
            f"  {main}: float32[batch, 80, 3000]",
        )
    taken = inspect.signature(model.forward).parameters
    texts = {**row.inputs, **(DECODER if getattr(config, "is_encoder_decoder", False) else {})}
    return tuple(
        InputSpec.parse(name, _filled(text, config)) for name, text in texts.items() if name in taken
    )


def set_for_tracing(config: Any) -> list[str]:
    """Apply `SETTINGS` to a configuration and its parts, in place; gives a note for each change."""
    notes = []
    for part in parts_of(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False  # a graph has no cache yet; nothing that a trace computes depends on it
        for key, value in list(vars(part).items()):
            attribute = key.removesuffix("_internal")
            for setting in SETTINGS:
                if re.fullmatch(setting.attribute, attribute) and setting.replaced(value):
                    setattr(part, attribute, setting.value)
                    notes.append(f"{attribute.lstrip('_')} is set to {setting.value}: {setting.why}")
    return list(dict.fromkeys(notes))


def choices(model: Any) -> list[str]:
    """What a built model has settled on, where there is another way that a graph can follow."""
    can = getattr(model, "_can_set_experts_implementation", None)
    if can is None or not can():
        return []
    chosen = model.config._experts_implementation
    return [
        f"experts_implementation is {chosen}; grouped_mm sorts tokens by their expert, batched_mm copies an expert's "
        "weights for each token (set it in base.config)"
    ]


def parts_of(config: Any) -> list[Any]:
    """A configuration and those inside it, such as a text model's and an image model's."""
    return [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]


def _filled(text: str, config: Any) -> str:
    names = [name for _, name, _, _ in Formatter().parse(text) if name]
    return text.format(**{n: SIZES[n](config) if n in SIZES else getattr(config, n) for n in names})


def _side(config: Any, index: int) -> int | None:
    size = getattr(config, "image_size", None)
    return size[index] if isinstance(size, (list, tuple)) else size
