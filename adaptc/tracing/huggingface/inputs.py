"""The inputs of a Hugging Face model: what it was trained with, from its tokenizer or its configuration.

One table, no model's name. What forward could take beside them is named, with what stands for it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any, cast

from torch import nn

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.tracing.constants import constant_note
from adaptc.tracing.image_layouts import IMAGES, image_sides
from adaptc.tracing.image_tokens import (
    MARKS,
    WithImages,
    image_token,
    in_first_layout,
    takes_images,
    with_image_tokens,
)


class UnknownInputsError(TraceError):
    """No rule says what the inputs of a model are."""


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


@dataclass(frozen=True)
class DerivedInputs:
    """The inputs of a model.

    Attributes:
        inputs: the inputs, in the order of the table.
        left_out: what its forward could take beside them -> what stands for it.
        constants: what it takes beside them, the same in every call.
        notes: what it computes otherwise than by itself, and constants, for the person.
    """

    inputs: tuple[InputSpec, ...]
    left_out: Mapping[str, str]
    constants: tuple[InputSpec, ...] = ()
    notes: tuple[str, ...] = ()


TOKENS = "int64[batch, seq]"
PICTURE = "{dtype}[batch, {channels}, {height}, {width}]"
TEXT_INPUTS = {
    "input_ids": TOKENS,
    "attention_mask": TOKENS,
    "token_type_ids": TOKENS,
    "position_ids": TOKENS,
    "bbox": "{boxes}[batch, seq, 4]",
    IMAGES: PICTURE,
}
"""The inputs that a text or an image can have; `_takes` says which of them a model was trained with."""
INPUT_RULES = (
    InputRule("input_ids", (), TEXT_INPUTS),
    InputRule(IMAGES, (), TEXT_INPUTS),
    InputRule(
        "input_features",
        ("num_mel_bins", "max_source_positions"),
        {"input_features": "{dtype}[batch, {num_mel_bins}, {frames}]"},
    ),
    InputRule(
        "input_features",
        ("input_feat_per_channel",),
        {"input_features": "{dtype}[batch, frames, {input_feat_per_channel}]"},
    ),
    InputRule(
        "input_features",
        ("feature_projection_input_dim",),
        {"input_features": "{dtype}[batch, frames, {feature_projection_input_dim}]"},
    ),
    InputRule("input_values", ("conv_stride",), {"input_values": "{dtype}[batch, samples]"}),
    InputRule("input_values", ("encoder_num_hidden_layers",), {"input_values": "{dtype}[batch, samples]"}),
    InputRule(
        "input_values",
        ("max_length", "num_mel_bins"),
        {"input_values": "{dtype}[batch, {max_length}, {num_mel_bins}]"},
    ),
)
"""Texts, images, log-mel frames for an encoder that halves their number, frames of features, waveforms, spectrograms
of a fixed length."""
DECODER_INPUTS = {"decoder_input_ids": "int64[batch, decoder_seq]"}
"""The inputs that an encoder-decoder takes in addition."""
SIZES: Mapping[str, Callable[[Any], object]] = {
    "dtype": lambda config: str(config.dtype).removeprefix("torch."),
    "boxes": lambda config: "int64" if _box_limit(config) else str(config.dtype).removeprefix("torch."),
    "channels": lambda config: getattr(_vision(config), "num_channels", 3),
    "height": lambda config: _image_side(config, 0) or "height",
    "width": lambda config: _image_side(config, 1) or "width",
    "frames": lambda config: 2 * config.max_source_positions,
}
"""Name in braces -> its value, where that is no plain attribute of the configuration.

The height and width of an image are dynamic where the configuration fixes none.
"""
STAND_INS = {
    "attention_mask": "ones",
    "decoder_attention_mask": "ones",
    "pixel_mask": "ones",
    "pixel_attention_mask": "ones",
    "token_type_ids": "zeros",
    "position_ids": "0..n-1, as the model counts them",
    "decoder_position_ids": "0..n-1, as the model counts them",
    "bbox": "zeros",
    IMAGES: "none, text only",
    "pixel_values_videos": "none, no video",
    "input_features": "none, no sound",
}
"""A tensor that forward can do without -> what the model then computes with; `none` for any other."""
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
COMPUTED = re.compile(
    r"past_key_values|(\w+_)?(inputs_embeds|embeds|outputs|states|labels?|lengths|hidden_states)|labels\w*"
    r"|(start|end)_positions|logits_to_keep|encoder_attention_mask|cache|mems|bool_masked_pos|mask_time_indices|next_sentence_label"
)
"""The names of tensors that a loss takes, or that another part of the model has computed: no input of a person's."""
IMAGE_SIZES = (1, 1, 160, 128)
"""The sizes at which images are traced where they are open: height and width differ, and can be halved six times."""
FRAMES, STRIDE = 40, 320
"""How many frames a waveform is traced with, and the samples of one where the configuration does not say: 20 ms."""
BOXES = 1000
"""The largest coordinate of a box on a page: LayoutLM and its kind scale a page to it."""


def derive_inputs(
    model: nn.Module | type[nn.Module],
    config: object,
    given: frozenset[str] | None = None,
    others: Sequence[InputSpec] = (),
) -> DerivedInputs:
    """Derive the inputs of a model from what its tokenizer gives, its main input and its configuration.

    Args:
        model: the model, or its class.
        config: its configuration.
        given: the names of what the tokenizer or processor gives; where it is None the configuration decides.
        others: inputs that are certain already, of modules around the model.

    Returns:
        The inputs that it was trained with and that its `forward` takes, the others behind, and what else that could
        take.

    Raises:
        UnknownInputsError: no rule of the table fits.
    """
    main: str = getattr(model, "main_input_name", "input_ids")
    fitting = (
        rule for rule in INPUT_RULES if rule.main == main and all(hasattr(config, a) for a in rule.attributes)
    )
    rule = next(fitting, None)
    parameters = inspect.signature(model.forward).parameters
    if rule is None:
        raise _unknown(model, main)
    texts = {**rule.inputs, **(DECODER_INPUTS if getattr(config, "is_encoder_decoder", False) else {})}
    without_text = set[str]() if "input_ids" in parameters else set(TEXT_INPUTS) - {IMAGES}
    usable = [name for name in texts if name in parameters and name not in without_text]
    decodes = _decodes(model, config)
    names = [name for name in usable if name == main or _takes(name, config, given, decodes)]
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in VARIABLE]
    certain = {"self", *names, *(spec.name for spec in others)}
    without = [name for name in needed if name not in certain]
    if without or not names:
        raise _unknown(model, *without)
    inputs = [limited(InputSpec.parse(name, _filled(texts[name], config)), config) for name in names]
    return DerivedInputs((*inputs, *others), left_out(model, [spec.name for spec in (*inputs, *others)]))


def _unknown(model: nn.Module | type[nn.Module], *names: str) -> UnknownInputsError:
    """The error for inputs that no rule knows."""
    title = model.__name__ if isinstance(model, type) else type(model).__name__
    lines = [f"  {name}: float32[batch, 80, 3000]" for name in names or ("input_ids",)]
    return UnknownInputsError(
        f"the inputs of {title} cannot be derived; write them in the spec, such as", "inputs:", *lines
    )


def chosen_inputs(
    model: nn.Module,
    config: object,
    inputs: Sequence[InputSpec],
    given: frozenset[str] | None,
    others: Sequence[InputSpec] = (),
) -> DerivedInputs:
    """The inputs that a spec states, with what the configuration says of their values; derived where it states none.

    Derived inputs are without images where a model runs with them in no layout that is known. `others` are those of
    `derive_inputs`.

    Raises:
        UnknownInputsError: there are none, and they cannot be derived.
        TraceError: images are among those stated, and the model cannot be traced with them.
    """
    if inputs:
        return _stated(model, config, inputs)
    derived = derive_inputs(model, config, given, others)
    if not takes_images(model, config):
        return derived
    try:
        made = in_first_layout(model, config, derived.inputs, cast(str, SIZES["dtype"](config)))
    except TraceError as error:
        return _without_images(
            derived, config, f"{type(model).__name__} cannot be traced with it: {error.message}"
        )
    inputs = tuple(limited(spec, config) for spec in made.inputs)
    names = [spec.name for spec in (*inputs, *made.constants)]
    return DerivedInputs(inputs, left_out(model, names), made.constants, _notes(made))


def _stated(model: nn.Module, config: object, inputs: Sequence[InputSpec]) -> DerivedInputs:
    """The inputs that a spec states.

    Raises:
        TraceError: images are among them, and the model cannot be traced with them.
    """
    constants = tuple(spec for spec in inputs if spec.constant is not None)
    stated = tuple(limited(spec, config) for spec in inputs if spec.constant is None)
    others = left_out(model, [spec.name for spec in inputs])
    try:
        made = with_image_tokens(model, config, WithImages(stated, constants))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TraceError(
            f"{IMAGES} is no input that {type(model).__name__} can be traced with: {reason}",
            *(error.notes if isinstance(error, TraceError) else ()),
            "take it out of `inputs` to compile the model for texts alone",
        ) from error
    return DerivedInputs(made.inputs, others, constants, _notes(made))


def _notes(made: WithImages) -> tuple[str, ...]:
    return (*map(constant_note, made.constants), *made.notes)


def _without_images(derived: DerivedInputs, config: object, reason: str) -> DerivedInputs:
    """The inputs without images, and without the marks of their tokens."""
    dropped = {IMAGES} if _token_types(config) is not None else {IMAGES, *MARKS}
    inputs = tuple(spec for spec in derived.inputs if spec.name not in dropped)
    stand_ins = {spec.name: STAND_INS[spec.name] for spec in derived.inputs if spec.name in dropped}
    stand_ins |= {**derived.left_out, IMAGES: f"{STAND_INS[IMAGES]} ({reason})"}
    return DerivedInputs(inputs, stand_ins)


def left_out(model: nn.Module | type[nn.Module], names: Sequence[str]) -> dict[str, str]:
    """The tensors that a model's forward could take beside its inputs -> what stands for each."""
    parameters = inspect.signature(model.forward).parameters.values()
    optional = [p.name for p in parameters if "Tensor" in str(p.annotation) and p.default is None]
    others = [name for name in optional if name not in names and not COMPUTED.fullmatch(name)]
    return {name: STAND_INS.get(name, "none") for name in others}


def limited(spec: InputSpec, config: object) -> InputSpec:
    """An input with what is known of its values and sizes: the number of token types, the corners of a box.

    An image, or a waveform, is traced at a usual size: models halve them many times, and one that is halved to nothing
    is another branch, or none.
    """
    if spec.name == "token_type_ids":
        return replace(spec, high=_token_types(config))
    if spec.name == "position_ids":
        return replace(spec, high=getattr(_text(config), "max_position_embeddings", None), counted=True)
    if spec.name == "bbox":
        return replace(spec, high=_box_limit(config), boxes=True)
    if spec.name == IMAGES and len(spec.dims) == len(IMAGE_SIZES):
        return replace(spec, example=IMAGE_SIZES)
    if spec.name == "input_values" and len(spec.dims) == 2:
        stride = math.prod(getattr(config, "conv_stride", (STRIDE,)))
        return replace(spec, example=(1, FRAMES * stride))
    return spec


def _decodes(model: nn.Module | type[nn.Module], config: object) -> bool:
    """Whether a model writes texts, token by token; what could be an encoder too has `is_decoder` to tell."""
    generates: Any = getattr(model, "can_generate", None)
    encodes = hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", True) is False
    return generates is not None and bool(generates()) and not encodes and _vision(config) is config


def _takes(name: str, config: object, given: frozenset[str] | None, decodes: bool) -> bool:
    """Whether a model was trained with an input that its forward takes.

    The tokenizer says so. Without one, the configuration: one of several token types was learned for each token.
    Positions are an input of decoders, since those of texts that are padded on the left start behind the padding; any
    other model counts them itself unless the tokenizer gives them. A model of boxes has no other place for them
    than `bbox`, whatever tokenizer its texts go through, and one of images none but `pixel_values`.
    """
    if name == "token_type_ids":
        types = _token_types(config)
        if types is None and image_token(config) is not None:
            return True  # they mark the tokens of images
        return (types or 0) > 1 if given is None else name in given and (types is None or types > 1)
    if name == "position_ids":
        return decodes or (given is not None and name in given)
    if name == "attention_mask":
        return given is None or name in given
    if name == IMAGES:
        return _image_side(config, 0) is not None
    return True


def _vision(config: object) -> Any:
    """The configuration of a model's image part; the whole one where it has no parts."""
    return getattr(config, "vision_config", config)


def _text(config: Any) -> Any:
    """The configuration of a model's text part; the whole one where it has no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _token_types(config: object) -> int | None:
    """The number of token types; None where the configuration has no table of them."""
    return getattr(_text(config), "type_vocab_size", None)


def _box_limit(config: object) -> int | None:
    """The number that coordinates of boxes stay below; None where they are fractions of the page."""
    rows: int | None = getattr(_text(config), "max_2d_position_embeddings", None)
    return min(rows, BOXES + 1) if rows else None


def _filled(text: str, config: object) -> str:
    names = [name for _, name, _, _ in Formatter().parse(text) if name]
    return text.format(**{n: SIZES[n](config) if n in SIZES else getattr(config, n) for n in names})


def _image_side(config: object, index: int) -> int | None:
    """The height (0) or width (1) of an image in pixels; None where the configuration fixes none."""
    sides = image_sides(_vision(config))
    return sides[index] if sides else None
