"""The graphs of an ONNX program: with a cache and the form of attention that the spec asks for."""

from __future__ import annotations

from typing import Any

import torch

from adaptc.emit.onnx.attention_forms import with_attention
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.norms import NormsOfSums, RootMeanSquareNorms
from adaptc.emit.onnx.overridable import Dims
from adaptc.ir.graph import Graph
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.cross import Decoder, Encoder, crossed
from adaptc.rewriter.cache.first_past import Behind, WithoutVirtualTokens, first_past
from adaptc.rewriter.pipeline import Pass, run
from adaptc.spec.emit import OnnxEmit


def programs(graph: Graph, entry: OnnxEmit) -> tuple[list[Graph], dict[str, Any]]:
    """The graphs of an entry's programs: its own first, then that of an encoder, where a decoder with a cache has one.

    Args:
        graph: it only evaluates.
        entry: says whether there is a cache, and the form of attention.

    Returns:
        the graphs; and how many attentions of the first have which form, see `with_attention`.
    """
    if not entry.cache:
        graph, attentions = with_attention(graph, entry.attention_form, entry.opset)
        return [graph], attentions
    first = first_past(graph)
    functional = run(graph, [WithoutVirtualTokens(), Functional()])
    encoder = [run(functional, [Encoder()])] if crossed(functional) else []
    for_runtime = entry.target_runtime == "onnxruntime"
    norms: list[Pass] = [RootMeanSquareNorms(), NormsOfSums()] if for_runtime else []
    behind = [Behind(first)] if first else []
    decoder = run(functional, [Decoder(), Cache(), *behind, *norms])
    decoder, attentions = with_attention(decoder, entry.attention_form, entry.opset)
    return [decoder, *encoder], attentions


def split(whole: Graph, part: Graph, overridable: Dims) -> tuple[Dims, dict[str, tuple[int, torch.dtype]]]:
    """Of the weights that a call may replace, those that a program reads, and those that only one beside it does.

    Args:
        whole: the graph of both.
        part: the program's own.
        overridable: the sizes of all of them.
    """
    names = {str(node.target) for node in part.nodes if node.op == "get_attr"}
    names |= {spec.name for spec in part.inputs}
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in whole.inputs}
    read = {name: sizes for name, sizes in overridable.items() if name in names}
    unread = {
        name: (len(sizes), dtypes[name] if name in dtypes else whole.weights[name].dtype)
        for name, sizes in overridable.items()
        if name not in names
    }
    return read, unread
