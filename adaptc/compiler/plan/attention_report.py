"""What a plan says of the form that attention gets in ONNX, as far as no weight need be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from adaptc.compiler.rewrite import Rewritten
from adaptc.emit.onnx.attention_forms import FIRST_OPSET, GROUPED, PLAIN, form_of
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.written_attention import FusedAttention
from adaptc.errors import RefusedError
from adaptc.ir.analysis.attention import find_attentions
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import provenance, writes_in_place
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.cross import Decoder
from adaptc.rewriter.cache.first_past import Behind, WithoutVirtualTokens, first_past
from adaptc.rewriter.pipeline import run
from adaptc.spec.emit import GenaiEmit, OnnxEmit
from adaptc.spec.spec import Spec

OPERATIONS = {GROUPED: "GroupQueryAttention", "standard": "Attention", PLAIN: "plain operations"}
"""A form -> what computes an attention of it."""


def attention_notes(spec: Spec, base: Graph, rewritten: Rewritten) -> list[str]:
    """For each ONNX program of a spec: how many attentions become which operation, and why the others do not.

    Args:
        spec: the spec.
        base: the traced graph.
        rewritten: the graph after its passes.
    """
    notes: list[str] = []
    for index, entry in enumerate(spec.emit):
        program = entry.program if isinstance(entry, GenaiEmit) else entry
        if isinstance(program, OnnxEmit) and (program.cache or program.attention):
            graph = base if program.adapters in ("none", "swap") else rewritten.adapted
            notes += [f"emit.{index}: {line}" for line in _lines(graph, program)]
    return notes


def _lines(graph: Graph, entry: OnnxEmit) -> Sequence[str]:
    if entry.attention is None and entry.attention_form == PLAIN:
        return [
            f"attention stays in plain operations: ONNX has Attention since opset {FIRST_OPSET}, and this entry asks "
            f"for {entry.opset}; leave `opset` out for it"
        ]
    if entry.attention_form == PLAIN:
        return []
    if any(writes_in_place(node.target) for node in graph.nodes):
        return ["how attention is computed is told when it is compiled: the model writes into its tensors"]
    try:
        written = evaluate(graph)
        if entry.cache:
            first = first_past(written)
            behind = [Behind(first)] if first else []
            written = run(written, [WithoutVirtualTokens(), Decoder(), Cache(), *behind])
    except RefusedError as error:
        return [f"it can have no cache: {refusal}" for refusal in error.refusals]
    return _told(written, entry)


def _told(graph: Graph, entry: OnnxEmit) -> list[str]:
    """How many attentions have which form, and why the others do not have the one that is asked for."""
    old = entry.opset is not None and entry.opset < FIRST_OPSET
    graph = graph if old else run(graph, [FusedAttention()])
    attentions = list(find_attentions(graph.nodes))
    forms = [form_of(entry.attention_form, attention, old) for attention in attentions]
    counts = Counter(form for form, _ in forms)
    told = ", ".join(f"{counts[form]} by {name}" for form, name in OPERATIONS.items() if counts[form])
    lines = [f"attention: {told or 'there is none'}"]
    for attention, (_, why) in zip(attentions, forms, strict=True):
        if why is not None:
            lines.append("; ".join((f"%{attention.mixed.name}: {why}", *provenance(attention.mixed))))
    return lines
