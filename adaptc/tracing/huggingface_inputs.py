"""The inputs of a Hugging Face model, derived from its main input and its configuration: one table, no model's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, cast

from torch import nn

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec


@dataclass(frozen=True)
class InputRule:
    """The inputs of every model that has this main input, and whose configuration has these attributes.

    Attributes:
        main: the model's `main_input_name`.
        attributes: attributes that the configuration must have.
        inputs: name -> dtype and dimensions, spelled as in a spec. A name in braces is a key of `SIZES`, or an
            attribute of the configuration.
    """

    main: str
    attributes: tuple[str, ...]
    inputs: Mapping[str, str]


INPUT_RULES = (
    InputRule("input_ids", (), {"input_ids": "int64[batch, seq]", "attention_mask": "int64[batch, seq]"}),
    InputRule("pixel_values", (), {"pixel_values": "{dtype}[batch, {channels}, {height}, {width}]"}),
    InputRule(
        "input_features",
        ("num_mel_bins", "max_source_positions"),
        {"input_features": "{dtype}[batch, {num_mel_bins}, {frames}]"},
    ),
    InputRule("input_values", ("conv_stride",), {"input_values": "{dtype}[batch, samples]"}),
    InputRule(
        "input_values",
        ("max_length", "num_mel_bins"),
        {"input_values": "{dtype}[batch, {max_length}, {num_mel_bins}]"},
    ),
)
"""Texts, images, log-mel frames for an encoder that halves their number, waveforms, spectrograms of a fixed length."""
DECODER_INPUTS = {"decoder_input_ids": "int64[batch, decoder_seq]"}
"""The inputs that an encoder-decoder takes in addition."""
SIZES: Mapping[str, Callable[[Any], object]] = {
    "dtype": lambda config: str(config.dtype).removeprefix("torch."),
    "channels": lambda config: getattr(config, "num_channels", 3),
    "height": lambda config: _image_side(config, 0) or "height",
    "width": lambda config: _image_side(config, 1) or "width",
    "frames": lambda config: 2 * config.max_source_positions,
}
"""Name in braces -> its value, where that is no plain attribute of the configuration.

The height and width of an image are dynamic where the configuration fixes none.
"""


def derive_inputs(model: nn.Module, config: Any) -> tuple[InputSpec, ...]:
    """Derive the inputs of a model from the name of its main input and its configuration.

    Returns:
        The inputs that its `forward` takes, in the order of the table.

    Raises:
        TraceError: no rule of the table fits.
    """
    main: str = getattr(model, "main_input_name", "input_ids")
    fitting = (
        rule for rule in INPUT_RULES if rule.main == main and all(hasattr(config, a) for a in rule.attributes)
    )
    rule = next(fitting, None)
    if rule is None:
        raise TraceError(
            f"the inputs of {type(model).__name__} cannot be derived; write them in the spec, such as",
            "inputs:",
            f"  {main}: float32[batch, 80, 3000]",
        )
    parameters = inspect.signature(model.forward).parameters
    texts = {**rule.inputs, **(DECODER_INPUTS if getattr(config, "is_encoder_decoder", False) else {})}
    return tuple(
        InputSpec.parse(name, _filled(text, config)) for name, text in texts.items() if name in parameters
    )


def _filled(text: str, config: Any) -> str:
    names = [name for _, name, _, _ in Formatter().parse(text) if name]
    return text.format(**{n: SIZES[n](config) if n in SIZES else getattr(config, n) for n in names})


def _image_side(config: Any, index: int) -> int | None:
    """The height (0) or width (1) of an image in pixels; None where the configuration fixes none."""
    size: Any = getattr(config, "image_size", None)
    return cast(Sequence[int], size)[index] if isinstance(size, (list, tuple)) else size
