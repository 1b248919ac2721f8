"""Which decoders onnxruntime-genai serves, and by which names it knows their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.emit.genai.sound import FRAMES, SoundEncoder, sound_encoder
from adaptc.errors import Refusal, RefusedError
from adaptc.inputs import InputSpec
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import node_arg, size_expression
from adaptc.rewriter.cache.cross import crossed
from adaptc.rewriter.cache.inputs import token_ids
from adaptc.rewriter.cache.past import TOTAL
from adaptc.rewriter.cache.signature import PAST_PREFIX, CacheSignature

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
"""What onnxruntime-genai calls what it feeds to a decoder."""
WAY_OUT = "emit onnx: ONNX Runtime runs it"
"""What to do about a model that is not served."""


@dataclass(frozen=True)
class Served:
    """How onnxruntime-genai sees a decoder.

    Attributes:
        inputs: what it calls an input -> the program's name.
        logits: the output of logits.
        vocabulary: how many token ids there are.
        layers: how many attentions have keys and values.
        heads: how many heads these have.
        size: of a key and of a value.
        encoder: of sound, whose keys and values the decoder reads; None where it stands alone.
    """

    inputs: Mapping[str, str]
    logits: str
    vocabulary: int
    layers: int
    heads: int
    size: int
    encoder: SoundEncoder | None = None


def unserved(graph: Graph) -> Refusal | None:
    """Why onnxruntime-genai cannot serve a traced model, with the way out; None where it can.

    It feeds a decoder token ids, a mask and positions, and takes logits of every token. Of encoders beside a decoder it
    runs those of sound.
    """
    ids = token_ids(graph)
    if isinstance(ids, Refusal):
        return Refusal(
            f"onnxruntime-genai serves decoders of tokens: {ids.reason}", notes=(*ids.notes, WAY_OUT)
        )
    first = _spec_of(graph, ids)
    others = _not_fed(graph, first)
    shown = ", ".join(f"{spec.name} {spec}" for spec in others)
    encoder = _encoder(graph, ids)
    if isinstance(encoder, Refusal):
        return Refusal(encoder.reason, notes=(*encoder.notes, WAY_OUT))
    if others and first.name.startswith("decoder_") and encoder is None:
        return Refusal(
            f"onnxruntime-genai serves decoders, alone or beside an encoder of {FRAMES} frames of sound, and this one "
            f"reads what an encoder makes of {shown}",
            notes=(WAY_OUT,),
        )
    if _logits(graph, ids) is None:
        shapes = ", ".join(f"{n} ({', '.join(map(str, s))})" for n, s in _shapes(graph).items())
        return Refusal(
            f"onnxruntime-genai needs logits (batch, tokens, vocabulary) of every token, and the model gives {shapes}",
            notes=(f"a decoder has them under `task: causal-lm`; or {WAY_OUT}",),
        )
    if others and encoder is None:
        return Refusal(
            f"onnxruntime-genai feeds token ids, a mask and positions in integers, and nothing to {shown}",
            notes=(f"write `inputs` without it, or {WAY_OUT}",),
        )
    return None


def served(graph: Graph, signature: CacheSignature) -> Served:
    """How onnxruntime-genai sees a program with a cache.

    Args:
        graph: the traced model.
        signature: of the program.

    Raises:
        RefusedError: it does not serve such a model, or one whose keys and values have several sizes.
    """
    refusal = unserved(graph)
    if refusal is not None:
        raise RefusedError([refusal])
    ids = token_ids(graph)
    assert isinstance(ids, fx.Node)
    first = _spec_of(graph, ids)
    others = [spec for spec in signature.inputs if not spec.name.startswith(PAST_PREFIX)]
    encoder = _encoder(graph, ids)
    assert not isinstance(encoder, Refusal)
    fed = {_fed_as(spec, first): spec.name for spec in others if spec.name != first.name}
    logits = _logits(graph, ids)
    assert logits is not None
    if encoder is not None and len(signature.cross) != len(signature.pasts):
        reason = (
            "onnxruntime-genai reads what an encoder gives in every layer of a decoder, and this one in some"
        )
        raise RefusedError([Refusal(reason, notes=(WAY_OUT,))])
    sizes = {spec.dims[1::2] for spec in (*signature.pasts, *signature.cross)}
    if len(sizes) > 1:
        shown = " and ".join(f"{heads} heads of {size}" for heads, size in sorted(sizes))
        reason = f"onnxruntime-genai takes keys and values of one size, and these have {shown}"
        raise RefusedError([Refusal(reason, notes=(WAY_OUT,))])
    ((heads, size),) = sizes
    return Served(
        {IDS: first.name, **{name: fed[name] for name in (MASK, POSITIONS) if name in fed}},
        logits,
        int(signature.outputs[logits][-1]),
        len(signature.pasts) // 2,
        int(heads),
        int(size),
        encoder,
    )


def _not_fed(graph: Graph, first: InputSpec) -> list[InputSpec]:
    """The inputs besides the token ids that onnxruntime-genai feeds nothing to in a decoder."""
    return [spec for spec in graph.inputs if spec is not first and _fed_as(spec, first) is None]


def _encoder(graph: Graph, ids: fx.Node) -> SoundEncoder | Refusal | None:
    """The encoder of sound of an encoder-decoder, or why it is not run; None without one."""
    first = _spec_of(graph, ids)
    others = [spec for spec in graph.inputs if spec is not first]
    return sound_encoder(graph, ids, others) if crossed(graph) else None


def _spec_of(graph: Graph, ids: fx.Node) -> InputSpec:
    return next(spec for spec, node in zip(graph.inputs, graph.placeholders, strict=True) if node is ids)


def _fed_as(spec: InputSpec, ids: InputSpec) -> str | None:
    """What onnxruntime-genai feeds to an input: a mask, or positions; None where it has nothing for it."""
    if spec.dtype not in ("int64", "int32") or len(spec.dims) != 2 or spec.dims[0] != ids.dims[0]:
        return None
    if spec.dims[1] not in (ids.dims[1], TOTAL):
        return None
    return MASK if "mask" in spec.name else POSITIONS if "position" in spec.name else None


def _shapes(graph: Graph) -> dict[str, Sequence[Any]]:
    """The shape of each output that is a tensor."""
    results: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    values = dict(zip(graph.outputs, results, strict=True))
    return {
        name: [size_expression(s) for s in values[name].meta["val"].shape] for name in graph.tensor_outputs
    }


def _logits(graph: Graph, ids: fx.Node) -> str | None:
    """The output with a value for every token of the vocabulary: it is called logits, or is the only one."""
    tokens = [size_expression(size) for size in ids.meta["val"].shape]
    lookups = [node for node in graph.nodes if node.target is torch.ops.aten.embedding.default]
    vocabularies = {size_expression(node_arg(node, 0).meta["val"].shape[0]) for node in lookups}
    shapes = _shapes(graph)
    for name, shape in shapes.items():
        whole = len(shape) == 3 and list(shape[:2]) == tokens
        if whole and (name == "logits" or (len(shapes) == 1 and shape[2] in vocabularies)):
            return name
    return None
