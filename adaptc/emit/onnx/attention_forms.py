"""The forms that attention has in ONNX, and how many attentions of a graph have which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adaptc.emit.onnx.attention_operations import STANDARD
from adaptc.emit.onnx.grouped_attention import GroupedAttention, unlike_grouped
from adaptc.emit.onnx.standard_attention import StandardAttention, unlike_standard
from adaptc.emit.onnx.written_attention import FusedAttention, read_written
from adaptc.ir.analysis.attention import Attention, find_attentions
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import provenance
from adaptc.rewriter.pipeline import Pass, run

PLAIN, STANDARD_FORM, GROUPED = "plain", "standard", "gqa"
PASSES: dict[str, tuple[type[Pass], ...]] = {
    PLAIN: (),
    STANDARD_FORM: (StandardAttention,),
    GROUPED: (GroupedAttention, StandardAttention),
}
"""A form -> the passes that give attention that form; what the first does not take is left to the next."""
UNLIKE: dict[str, Callable[[Attention], str | None]] = {
    STANDARD_FORM: unlike_standard,
    GROUPED: unlike_grouped,
}
"""A form -> why an attention cannot have it."""
FIRST_OPSET = 23
"""The first opset that has Attention."""
OPERATIONS: dict[str, frozenset[Any]] = {
    GROUPED: frozenset([torch.ops.adaptc_onnx.grouped_attention.default]),
    STANDARD_FORM: STANDARD,
}
"""A form -> its operations."""


def with_attention(graph: Graph, form: str, opset: int | None = None) -> tuple[Graph, dict[str, Any]]:
    """A graph whose attentions have a form in ONNX, where they can, and the report on them.

    Args:
        graph: it only evaluates.
        form: `plain`, `standard` or `gqa`.
        opset: of the program, where it is asked for.

    Returns:
        the graph; and how many attentions have which form, with `why` the others do not have the one asked for.
    """
    if form == PLAIN:
        return graph, {}
    old = opset is not None and opset < FIRST_OPSET
    if not old:
        graph = run(graph, [FusedAttention()])
    reasons = [(a.mixed, _unlike(form, a)) for a in find_attentions(graph.nodes)]
    why = ["; ".join((f"%{node.name}: {reason}", *provenance(node))) for node, reason in reasons if reason]
    passes = [item() for item in PASSES[form] if not (old and item is StandardAttention)]
    written = run(graph, passes)
    counts = {
        name: sum(node.target in operations for node in written.nodes)
        for name, operations in OPERATIONS.items()
    }
    return written, {**counts, PLAIN: len(reasons) - sum(counts.values()), "why": why}


def form_of(asked: str, attention: Attention, old: bool) -> tuple[str, str | None]:
    """The form that an attention gets, and why not the one that is asked for, if it is another.

    Args:
        asked: `standard` or `gqa`.
        attention: the attention, after `FusedAttention`.
        old: whether the opset is older than Attention.
    """
    why = _unlike(asked, attention)
    if why is None:
        return asked, None
    standard = asked == GROUPED and not old and _unlike(STANDARD_FORM, attention) is None
    return (STANDARD_FORM if standard else PLAIN), why


def _unlike(form: str, attention: Attention) -> str | None:
    """Why an attention cannot have a form; None if it can."""
    written = None if attention.fused else read_written(attention)
    return written if isinstance(written, str) else UNLIKE[form](attention)
