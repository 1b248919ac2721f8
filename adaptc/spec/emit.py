"""The entries of `emit`: which artifacts to write, and where."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import InitErrorDetails

from adaptc.spec.diagnostics import fault, invalid
from adaptc.spec.part import Many, OneOf, Part, PathText

ATTENTION_OPSET = 23
"""The first opset that has Attention."""
OutputPath = Annotated[PathText, Field(description="where it goes, relative to the spec file")]


class TorchEmit(Part):
    """An artifact in PyTorch: the trainable module as a `torch.export` program."""

    format: Literal["torch"]
    path: OutputPath


class OnnxEmit(Part):
    """An artifact in ONNX: a program for inference."""

    format: Literal["onnx"]
    path: OutputPath
    adapters: Literal["folded", "live", "none", "swap", "rows"] = Field(
        "folded",
        description="folded into the weights, kept as operations of their own, or left out; swap: those under "
        "`adapters` are inputs of the program that can be left out; rows: the input adapter_ids names one for each "
        "row of a batch",
    )
    opset: Annotated[int, Field(ge=18, le=25)] | None = Field(
        None, description="ONNX opset; 20 if left out, or what the attention and the weights' bits need"
    )
    target_runtime: Literal["onnxruntime", "standard"] = Field(
        "onnxruntime", description="what quantized weights are multiplied by: its own operations, or ONNX's"
    )
    round_activations: bool = Field(
        True,
        description="let ONNX Runtime multiply integers by activations in 8 bits; false is slower for few tokens, and "
        "for 2 and 8 bits always",
    )
    cache: bool = Field(
        False,
        description="a decoder that takes the keys and values of past tokens, and gives those of the new ones",
    )
    attention: Literal["standard", "gqa", "plain"] | None = Field(
        None,
        description="how attention is computed: by ONNX's Attention; by ONNX Runtime's GroupQueryAttention, for a "
        "cache in one buffer and sequences padded on the right; or by plain operations. If left out, standard for a "
        "decoder with a cache unless the opset is older",
    )

    @model_validator(mode="after")
    def _has_operations(self) -> OnnxEmit:
        wrong = self._without_operation()
        if wrong is not None:
            raise invalid(fault(*wrong, loc=("attention",)))
        return self

    def _without_operation(self) -> tuple[str, str] | None:
        """Why there is no such operation for attention, and what to do; None where there is one."""
        if self.attention == "standard" and self.opset is not None and self.opset < ATTENTION_OPSET:
            message = (
                f"ONNX has Attention since opset {ATTENTION_OPSET}, and this entry asks for {self.opset}"
            )
            return message, "leave `opset` out, or write `attention: plain`"
        if self.attention == "gqa" and self.target_runtime == "standard":
            message = "GroupQueryAttention is ONNX Runtime's own, and this entry asks for ONNX's operations"
            return message, "write `attention: standard`, or `target_runtime: onnxruntime`"
        if self.attention == "gqa" and not self.cache:
            message = "GroupQueryAttention is for keys and values of the past, and this entry has no cache"
            return message, "write `cache: true`, or `attention: standard`"
        return None

    @property
    def attention_form(self) -> str:
        """How attention is computed: as `attention` says, or its default."""
        old = self.opset is not None and self.opset < ATTENTION_OPSET
        return self.attention or ("standard" if self.cache and not old else "plain")


class GenaiEmit(Part):
    """An artifact for onnxruntime-genai: a directory that it serves as it stands."""

    format: Literal["genai"]
    path: OutputPath
    adapters: Literal["folded", "live", "none", "swap"] = Field(
        "folded", description="as in an artifact in ONNX; onnxruntime-genai loads those that are swapped"
    )
    round_activations: bool = Field(
        True, description="as in an artifact in ONNX: let integers be multiplied by activations in 8 bits"
    )
    context_length: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="the most tokens of a text and its answer; the base's configuration says if left out",
    )
    eos_token_id: Annotated[int, Field(ge=0)] | None = Field(
        None, description="the token that ends an answer; the base's generation defaults say if left out"
    )

    @property
    def program(self) -> OnnxEmit:
        """The program of the directory, as an entry of its own: what onnxruntime-genai is given is chosen here."""
        return OnnxEmit(
            format="onnx",
            path=self.path,
            adapters=self.adapters,
            opset=None,
            target_runtime="onnxruntime",
            round_activations=self.round_activations,
            cache=True,
            attention="gqa",
        )


PROGRAMS = (OnnxEmit, GenaiEmit)
"""The entries that write ONNX programs."""


class PeftEmit(Part):
    """An artifact for PEFT: a checkpoint of the adapters alone."""

    format: Literal["peft"]
    path: OutputPath


class OnnxAdapterEmit(Part):
    """An artifact for ONNX Runtime: one of `adapters`, for a program with `adapters: swap`."""

    format: Literal["onnx-adapter"]
    path: OutputPath
    name: str = Field(description="which of `adapters`")


SIZE = r"^[1-9][0-9]*(\.[0-9]+)?(KB|MB|GB|TB)$"


def _size(text: str) -> str:
    if re.fullmatch(SIZE, text) is None:
        raise ValueError(f"expected a size such as '5GB' or '500MB', got {text!r}")
    return text


class HfEmit(Part):
    """An artifact for transformers: a model directory with the adapters folded into its weights."""

    format: Literal["hf"]
    path: OutputPath
    max_shard_size: Annotated[str, AfterValidator(_size)] = Field(
        "50GB", description="of one file of weights, such as 5GB", json_schema_extra={"pattern": SIZE}
    )


FORMATS: dict[str, type[Part]] = {
    "torch": TorchEmit,
    "onnx": OnnxEmit,
    "genai": GenaiEmit,
    "onnx-adapter": OnnxAdapterEmit,
    "peft": PeftEmit,
    "hf": HfEmit,
}
EmitEntry: TypeAlias = Annotated[
    TorchEmit | OnnxEmit | GenaiEmit | OnnxAdapterEmit | PeftEmit | HfEmit,
    OneOf("format", lambda: FORMATS),
]


def _separate(entries: tuple[EmitEntry, ...]) -> tuple[EmitEntry, ...]:
    first: dict[str, int] = {}
    faults: list[InitErrorDetails] = []
    for index, path in enumerate(os.path.normpath(entry.path) for entry in entries):
        if first.setdefault(path, index) != index:
            faults.append(fault(f"emit.{first[path]} writes to {path!r} too", loc=(index, "path")))
    if faults:
        raise invalid(*faults)
    return entries


EmitEntries = Annotated[Many[EmitEntry], AfterValidator(_separate)]
