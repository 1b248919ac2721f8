"""The schedule: the passes of a spec in order, and which of them each artifact has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adaptc.errors import Refusal, unknown
from adaptc.ir.graph import Graph
from adaptc.rewriter.catalog import AnyPass, PassFactory, load_passes
from adaptc.rewriter.pipeline import PASSES, Pass, check_order, run
from adaptc.rewriter.quantize import Quantize
from adaptc.spec.spec import Spec

AGAIN = "fold into the dequantized weights, then quantize again"
LIVE = {"adapters: live": "keep the quantized weights, with the adapter beside them"}
ORDERS = {
    "passes: [insert, fold, quantize]": "fold into the float weights, then quantize",
    "passes: [quantize, insert, fold, quantize]": AGAIN,
    "passes: [quantize, insert, fold]": "fold into the dequantized weights, and keep floats",
    **LIVE,
}
"""Pipeline -> its effect: the ways to fold an adapter where the spec quantizes."""
OF_BASE = {
    "passes: [insert, fold, quantize]": AGAIN,
    "passes: [insert, fold]": "fold into the dequantized weights, and keep floats",
    **LIVE,
}
"""Pipeline -> its effect: the ways to fold an adapter where the base itself is stored in few bits."""


def pipeline_of(spec: Spec, inserts: Sequence[Pass], quantizes: Sequence[Quantize]) -> list[Pass]:
    """The passes in the order that the spec states; if it states none, first quantize, then insert.

    Weights that the base stores in few bits are quantized at the start of every pipeline, and again wherever
    `quantize` is written after another pass.

    Args:
        spec: the spec.
        inserts: the passes that `insert` names, one for each entry of `adapt`.
        quantizes: the passes that `quantize` names; those whose `entry` is None are for the base's own bits.

    Raises:
        SpecError: a pass or an option is unknown, or what `adapt` or `quantize` asks for is left out.
    """
    if spec.passes is None:
        return [*quantizes, *inserts]
    registered = load_passes()
    passes: list[Pass] = [item for item in quantizes if item.entry is None]
    for index, item in enumerate(spec.passes):
        name, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        if name in ("insert", "quantize"):
            again = [item for item in quantizes if index or item.entry is not None]
            passes += inserts if name == "insert" else again
            continue
        if name not in registered:
            raise spec.error(("passes", index), unknown("pass", name, ["insert", "quantize", *registered]))
        passes.append(_pass_of(spec, index, registered[name], name, options))
    if "quantize" in spec.passes and not quantizes:
        index = spec.passes.index("quantize")
        message = "`quantize` runs the entries of `quantize:`, and there are none"
        raise spec.error(("passes", index), message, "add one: `quantize: [{method: ..., target: ...}]`")
    for word, items in (("insert", inserts), ("quantize", quantizes)):
        if items and not set(map(id, items)) <= set(map(id, passes)):
            section = "adapt" if word == "insert" else word
            raise spec.error(
                ("passes",),
                f"the pipeline leaves out `{word}`, which runs the entries of `{section}:`",
                f"add it, such as passes: [{word}, ...]",
            )
    return passes


def as_written(
    passes: Sequence[Pass], inserts: Sequence[Pass], quantizes: Sequence[Quantize]
) -> list[str | dict[str, Any]]:
    """The pipeline as a spec's `passes` would state it, from which `pipeline_of` makes the same passes again.

    Args:
        passes: the pipeline.
        inserts: those of its passes that come from `adapt`, stated together as `insert`.
        quantizes: those that come from `quantize` and the base's own bits, stated together as `quantize`.

    Returns:
        An entry for each group or pass: its name, or name -> options where some differ from their defaults.
    """
    of_base = [item for item in quantizes if item.entry is None]
    of_spec = [item for item in quantizes if item.entry is not None]
    rest = list(passes[len(of_base) :])
    entries: list[str | dict[str, Any]] = []
    while rest:
        groups = {"insert": inserts, "quantize": quantizes if entries else of_spec}
        word = next((word for word, items in groups.items() if items and _starts(rest, items)), None)
        if word is not None:
            entries.append(word)
            del rest[: len(groups[word])]
            continue
        item = rest.pop(0)
        options = item.stated()
        entries.append({item.name: options} if options else item.name)
    return entries


def _starts(passes: Sequence[Pass], items: Sequence[Pass]) -> bool:
    """Whether a pipeline starts with these passes, by identity."""
    return len(passes) >= len(items) and all(a is b for a, b in zip(passes, items, strict=False))


def _pass_of(spec: Spec, index: int, cls: AnyPass, name: str, options: Mapping[str, object]) -> Pass:
    """The pass of one entry of `passes`.

    Raises:
        SpecError: an option is unknown, or its value is wrong.
    """
    fields = list(inspect.signature(cls).parameters)
    other = next((option for option in options if option not in fields), None)
    if other is not None:
        message = f"{name}: {unknown('option', other, fields, listed=())}"
        raise spec.error(("passes", index), message, f"its options: {', '.join(fields) or 'none'}")
    try:
        return (
            cls.validated(options)
            if isinstance(cls, PassFactory)
            else TypeAdapter(cls).validate_python(options)
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = ".".join(map(str, first["loc"]))
        message = f"{name}: {option}: {first['msg'].lower()}, got {first['input']!r}"
        raise spec.error(("passes", index), message, f"its options: {', '.join(fields)}") from None


def check_artifacts(spec: Spec, adapted: Graph, closing: Sequence[Pass]) -> None:
    """Check that every `emit` entry can be written from the adapted graph and the passes that follow `fold`.

    Raises:
        SpecError: an artifact cannot hold what is inserted or quantized, or cannot be folded.
    """
    stays = adapted.staying
    bits = bool(adapted.quantized) or any(isinstance(item, Quantize) for item in closing)
    for index, entry in enumerate(spec.emit):
        if entry.format == "hf" and stays:
            message = (
                f"{stays} cannot be folded into weights, and a Hugging Face checkpoint holds nothing else"
            )
            advice = "emit onnx or torch; or emit the adapter alone, as peft"
            raise spec.error(("emit", index, "format"), message, advice)
        refusal = bits_in_checkpoint(adapted, closing) if entry.format == "hf" else None
        if refusal:
            raise spec.error(("emit", index, "format"), refusal.reason, *refusal.notes)
        folded = entry.format == "hf" or (entry.format == "onnx" and entry.adapters == "folded")
        if folded and adapted.adaptations and not closing and adapted.stage not in PASSES["fold"].takes:
            raise spec.error(
                ("passes",),
                f"the pipeline leaves a graph that is {adapted.stage}, which emit.{index} cannot fold",
                "leave `factor` out: live and trainable artifacts get it anyway",
            )
        refusal = folds_into_bits(adapted) if folded and not closing else None
        if refusal:
            raise spec.error(("emit", index, "format"), refusal.reason, *refusal.notes)
        if entry.format == "onnx" and entry.adapters == "live" and bits and not adapted.quantized:
            raise spec.error(
                ("emit", index, "adapters"),
                "the pipeline quantizes after `fold`, so an artifact with live adapters would keep floats",
                "write `passes: [quantize, insert]`, or `adapters: folded`",
            )


def bits_in_checkpoint(adapted: Graph, closing: Sequence[Pass]) -> Refusal | None:
    """Why a Hugging Face checkpoint, which holds floats, cannot be written; None if it can.

    Weights in few bits are dequantized only where the spec's passes say so.
    """
    passes = [item for item in closing if isinstance(item, Quantize)]
    if passes or (adapted.quantized and not closing):
        entries = [*(q.entry for q in adapted.quantized.values()), *(item.entry for item in passes)]
        of_spec = any(entry is not None for entry in entries)
        owner = "the base has" if None in entries else "the spec asks for"
        last = ["insert", "fold"] if adapted.adaptations else ["dequantize"]
        order = ", ".join([*(["quantize"] if of_spec else []), *last])
        return Refusal(
            f"a Hugging Face checkpoint holds floats, and {owner} weights in few bits",
            notes=(f"write `passes: [{order}]` for the dequantized floats; or emit onnx or torch",),
        )
    return None


def lowering(adapted: Graph) -> list[Pass]:
    """The passes between an adapted graph and one that is trained or run live."""
    factor = PASSES["factor"]()
    passes: list[Pass] = [factor] if adapted.stage in factor.takes else []
    return [*passes, PASSES["quantized-products"]()] if adapted.quantized else passes


def lower(graph: Graph) -> Graph:
    """A graph as it is trained and run live: factored, and quantized matrix products read the codes."""
    return run(graph, lowering(graph))


def folds_into_bits(adapted: Graph) -> Refusal | None:
    """Why an adapter cannot be folded until the spec states an order: its weight is stored in few bits.

    None where no adapted weight is.
    """
    for adaptation in adapted.adaptations:
        leaf = adapted.quantized.get(adaptation.site.parameter)
        if leaf is not None and not adaptation.stays:
            reason = f"{adaptation.site.module} is stored as {leaf.scheme.name}, and folding rounds it again: say how"
            if leaf.scheme.calibrated:
                reason += ", and name rows to quantize by: `calibration: rows.jsonl`"
            orders = OF_BASE if leaf.entry is None else ORDERS
            return Refusal(reason, notes=tuple(f"{order:42}  {effect}" for order, effect in orders.items()))
    return None


def closing_of(spec: Spec, graph: Graph, passes: Sequence[Pass]) -> list[Pass]:
    """The passes that only folded artifacts have: the one that folds, and all after it.

    Raises:
        SpecError: the order of the passes is impossible, or one needs calibration data and there is none.
    """
    wrong = check_order(passes)
    if wrong:
        raise spec.error(("passes",), wrong, "see `adaptc passes` for the stages each pass takes and leaves")
    start = next((i for i, item in enumerate(passes) if item.leaves == "folded"), len(passes))
    closing = list(passes[start:])
    again = [item for item in closing if isinstance(item, Quantize) and item.scheme.calibrated]
    if again and spec.calibration is None and not graph.calibration_rows:
        message = (
            f"{again[0].scheme.name} chooses by the layers' inputs, and there is no data to quantize again by"
        )
        raise spec.error(("passes",), message, "name some rows: `calibration: rows.jsonl`")
    return closing
