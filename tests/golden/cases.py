"""A small graph for each pass, and the passes that lead to its text. A case starts with the name of its last pass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

import adaptc
from adaptc import passes
from adaptc.compiler.follow_training import FollowTraining
from adaptc.emit.onnx.casts import Casts
from adaptc.emit.onnx.decompose import OnnxOperations
from adaptc.emit.onnx.evaluate import Evaluate
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.grouped_attention import GroupedAttention
from adaptc.emit.onnx.lower_quantized import OnnxProducts
from adaptc.emit.onnx.norms import NormsOfSums, RootMeanSquareNorms
from adaptc.emit.onnx.packed_products import PackedQueries
from adaptc.emit.onnx.rounding import RoundActivations
from adaptc.emit.onnx.standard_attention import StandardAttention
from adaptc.emit.onnx.written_attention import FusedAttention
from adaptc.ir.graph import Graph
from adaptc.methods.method import METHODS
from adaptc.methods.point_sites import AttentionSite
from adaptc.quantization.scheme import SCHEMES
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.cross import Decoder, Encoder
from adaptc.rewriter.cache.first_past import Behind, FirstPast, WithoutVirtualTokens
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.pipeline import Pass
from adaptc.rewriter.rows.merge import MergeRows
from adaptc.rewriter.swap.prefix import PrefixSlot
from adaptc.tracing.export import export
from adaptc.weights import Held, Weight
from tests.golden import models
from tests.golden.models import traced

Case = tuple[Graph, Sequence[Pass]]
SHORT = {
    "hra": {"r": 2},
    "trainable-tokens": {"token_indices": (1, 5)},
    "cloze": {"label_tokens": ((0,), (1, 2)), "mask_token": 7},
}
"""Options other than a rank of 1 and the method's own small ones."""


def shipped(registry: Any) -> list[str]:
    """The names that are adaptc's own."""
    return [name for name, cls in registry.items() if cls.__module__.startswith("adaptc.")]


def inserted(name: str) -> Case:
    """A method on the first model where it has a site."""
    factory, method = load_passes()[f"insert-{name}"], METHODS[name]
    given = {"target": "*", "r": 1, **method.small, **SHORT.get(name, {})}
    item: Any = factory(**{key: given[key] for key in given if key in inspect.signature(factory).parameters})
    if method.kinds == {"head"}:
        return traced(models.Words), [item]
    candidates = (models.Layer, models.Normed, models.FeedForward, models.Attention, models.Words)
    return next((traced(model), [item]) for model in candidates if item.selection(traced(model)).sites)


def lora(target: str = "*", **options: Any) -> Any:
    return passes.InsertLora(**{"target": target, "r": 1, **options})


def calibrated() -> Graph:
    """With inputs, for schemes that look at them."""
    return dataclasses.replace(traced(models.Layer), calibration_rows=[{"x": torch.randn(9, 8)}])


def prompt() -> Any:
    return passes.InsertPrompt("*", num_virtual_tokens=2)


def two_tokens() -> dict[str, Weight]:
    """Keys and values of two virtual tokens."""
    return {f"past_key_values.0.{kind}": Held(torch.zeros(1, 1, 2, 16)) for kind in ("key", "value")}


def prefix_slot() -> PrefixSlot:
    sites = tuple(site for site in traced(models.Attention).points if isinstance(site, AttentionSite))
    return PrefixSlot(sites, 1, torch.float32)


def rows() -> Case:
    """A LoRA and a scale by (IA)³ beside the base, one of them for each row."""
    graph = traced(models.Layer)
    alice, bob = adaptc.run(graph, [lora()]), adaptc.run(graph, [passes.InsertIa3(target="*")])
    return graph, [MergeRows((alice, bob), ("alice", "bob"))]


def follows_training() -> Pass:
    source = traced(models.TwoLayers).source
    return FollowTraining(export(source.model, source.inputs, training=True))


def cases() -> dict[str, Callable[[], Case]]:
    """Each makes its graph and passes when it is called."""
    two, layer = traced(models.TwoLayers), traced(models.Layer)
    int4 = [passes.QuantizeInt4(target="*", block_size=16), passes.QuantizedProducts()]
    nf4 = passes.QuantizeNf4(target="*", block_size=16)
    awq = [passes.QuantizeAwq(target="*", block_size=16), passes.QuantizedProducts()]
    int8 = [passes.QuantizeInt8(target="*"), passes.QuantizedProducts()]
    both = [lora(alpha=4), passes.Factor()]
    return {
        "traced": lambda: (two, []),
        **{f"insert-{name}": lambda name=name: inserted(name) for name in shipped(METHODS)},
        "insert-lora of two layers": lambda: (two, [lora(alpha=4)]),
        "insert-lora of a convolution": lambda: (traced(models.Image), [lora()]),
        "insert-lora of an embedding": lambda: (traced(models.Words), [lora("embed")]),
        "insert-lora of experts": lambda: (traced(models.Experts), [lora()]),
        "insert-lora of a slice": lambda: (traced(models.Fused), [lora("both[0:8]")]),
        "insert-lora on bits": lambda: (layer, [nf4, lora()]),
        **{
            f"quantize-{name}": lambda name=name: (
                calibrated(),
                [load_passes()[f"quantize-{name}"](**{"target": "*", **SCHEMES[name].small})],
            )
            for name in shipped(SCHEMES)
        },
        "factor": lambda: (two, both),
        "factor with dropout": lambda: (two, [lora(alpha=4, dropout=0.5), passes.Factor()]),
        "factor where it is not worth it": lambda: (two, [lora(alpha=4, r=8), passes.Factor()]),
        "factor of ia3": lambda: (two, [passes.InsertIa3("*", feedforward=("second",)), passes.Factor()]),
        "factor on bits": lambda: (layer, [nf4, lora(), passes.Factor()]),
        "fold": lambda: (two, [lora(), passes.Fold()]),
        "dequantize": lambda: (layer, [nf4, passes.Dequantize()]),
        "quantized-products": lambda: (layer, int4),
        "plain-integers": lambda: (calibrated(), [*awq, passes.PlainIntegers()]),
        "gradient-checkpointing": lambda: (
            traced(models.Row),
            [lora("layers.1"), passes.GradientCheckpointing(segments=2)],
        ),
        "torch-kernels": lambda: (traced(models.Layer, torch.bfloat16), [*int8, passes.TorchKernels()]),
        "follow-training": lambda: (two, [follows_training()]),
        "evaluate": lambda: (two, [follows_training(), Evaluate()]),
        "functional": lambda: (traced(models.InPlace), [Evaluate(), Functional()]),
        "merge-rows": rows,
        "cache": lambda: (traced(models.Writer), [Cache()]),
        "cache in buffers": lambda: (traced(models.Writer), [Cache(buffers=True)]),
        "encoder": lambda: (models.translating(), [Encoder()]),
        "decoder": lambda: (models.translating(), [Decoder()]),
        "without-virtual-tokens": lambda: (traced(models.Writer), [prompt(), WithoutVirtualTokens()]),
        "first-past": lambda: (traced(models.Writer), [prompt(), FirstPast()]),
        "behind-first-past": lambda: (traced(models.Writer), [Cache(), Behind(two_tokens())]),
        "insert-prefix-slot": lambda: (traced(models.Attention), [prefix_slot().insertion(None)]),
        "root-mean-square-norms": lambda: (traced(models.Writer), [Evaluate(), RootMeanSquareNorms()]),
        "norms-of-sums": lambda: (traced(models.Writer), [Evaluate(), RootMeanSquareNorms(), NormsOfSums()]),
        "fused-attention": lambda: (traced(models.ByHand), [Evaluate(), Cache(), FusedAttention()]),
        "standard-attention": lambda: (traced(models.Writer), [Evaluate(), Cache(), StandardAttention()]),
        "grouped-attention": lambda: (traced(models.Writer), [Evaluate(), Cache(), GroupedAttention()]),
        "packed-queries": lambda: (
            traced(models.Writer),
            [Evaluate(), Cache(), GroupedAttention(), PackedQueries()],
        ),
        "onnx-operations": lambda: (traced(models.Rare), [Evaluate(), OnnxOperations()]),
        "onnx-casts": lambda: (
            traced(models.InPlace),
            [Evaluate(), Functional(), OnnxOperations(), Casts()],
        ),
        "onnx-products": lambda: (layer, [*int4, Evaluate(), OnnxProducts()]),
        "onnx-products in operations of ONNX": lambda: (layer, [*int4, Evaluate(), OnnxProducts("standard")]),
        "round-activations": lambda: (layer, [*int4, Evaluate(), RoundActivations()]),
    }
