"""Orders: the passes of a spec, and what of them each artifact has."""

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

AGAIN = "fold into what the bits stand for, quantize again"
LEFT = {"adapters: live": "leave the bits as they are, the adapter beside them"}
ORDERS = {
    "passes: [insert, fold, quantize]": "fold into the float weights, then quantize",
    "passes: [quantize, insert, fold, quantize]": AGAIN,
    "passes: [quantize, insert, fold]": "the same, and leave it in floats",
    **LEFT,
}
"""How an adapter and bits go together."""
OF_BASE = {
    "passes: [insert, fold, quantize]": AGAIN,
    "passes: [insert, fold]": "the same, and leave it in floats",
    **LEFT,
}
"""The same where the base itself is stored in bits."""


def pipeline_of(spec: Spec, inserts: Sequence[Pass], quantizes: Sequence[Quantize]) -> list[Pass]:
    """The passes in the order that the spec states; if it states none, what is quantized is, then adapters go in.

    What the base has in bits has them from the start; the word `quantize` stands for that too.

    Raises:
        SpecError: a pass or an option is unknown, or what `adapt` or `quantize` asks for is left out.
    """
    if spec.passes is None:
        return [*quantizes, *inserts]
    known = load_passes()
    passes: list[Pass] = [item for item in quantizes if item.entry is None]
    for index, item in enumerate(spec.passes):
        name, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        if name in ("insert", "quantize"):
            again = [item for item in quantizes if index or item.entry is not None]
            passes += inserts if name == "insert" else again
            continue
        if name not in known:
            raise spec.error(("passes", index), unknown("pass", name, ["insert", "quantize", *known]))
        passes.append(_made(spec, index, known[name], name, options))
    if "quantize" in spec.passes and not quantizes:
        at = spec.passes.index("quantize")
        words = "`quantize` stands for what is stored in few bits, and nothing is"
        raise spec.error(("passes", at), words, "name it: `quantize: [{method: ..., target: ...}]`")
    for word, items in (("insert", inserts), ("quantize", quantizes)):
        if items and not set(map(id, items)) <= set(map(id, passes)):
            section = "adapt" if word == "insert" else word
            raise spec.error(
                ("passes",),
                f"the pipeline leaves out `{word}`, which puts in what `{section}` asks for",
                f"such as passes: [{word}, ...]",
            )
    return passes


def as_written(
    passes: Sequence[Pass], inserts: Sequence[Pass], quantizes: Sequence[Quantize]
) -> list[str | dict[str, Any]]:
    """The pipeline as `passes` of a spec: what `pipeline_of` makes of these very passes again.

    What `adapt` and `quantize` ask for goes by the words `insert` and `quantize`; the rest by its name, with the
    options that differ from their defaults.
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
    """Whether a pipeline starts with these very passes."""
    return len(passes) >= len(items) and all(a is b for a, b in zip(passes, items, strict=False))


def _made(spec: Spec, index: int, cls: AnyPass, name: str, options: Mapping[str, Any]) -> Pass:
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
        words = f"{name}: {option}: {first['msg'].lower()}, got {first['input']!r}"
        raise spec.error(("passes", index), words, f"its options: {', '.join(fields)}") from None


def check_artifacts(spec: Spec, adapted: Graph, closing: Sequence[Pass]) -> None:
    """Every `emit` entry has what it needs: a place for what is inserted, and a graph that can be folded into it.

    Raises:
        SpecError: one has not.
    """
    stays = adapted.staying
    bits = bool(adapted.quantized) or any(isinstance(item, Quantize) for item in closing)
    for index, entry in enumerate(spec.emit):
        if entry.format == "hf" and stays:
            words = f"{stays} cannot be folded into weights, and a Hugging Face checkpoint holds nothing else"
            raise spec.error(
                ("emit", index, "format"), words, "emit onnx or torch; the adapter by itself as peft"
            )
        held = bits_in_checkpoint(adapted, closing) if entry.format == "hf" else None
        if held:
            raise spec.error(("emit", index, "format"), held.reason, *held.notes)
        folded = entry.format == "hf" or (entry.format == "onnx" and entry.adapters == "folded")
        if folded and adapted.adaptations and not closing and adapted.stage not in PASSES["fold"].takes:
            raise spec.error(
                ("passes",),
                f"the pipeline leaves a graph that is {adapted.stage}, which emit.{index} cannot fold",
                "leave `factor` out: live and trainable products get it anyway",
            )
        refusal = folds_into_bits(adapted) if folded and not closing else None
        if refusal:
            raise spec.error(("emit", index, "format"), refusal.reason, *refusal.notes)
        if entry.format == "onnx" and entry.adapters == "live" and bits and not adapted.quantized:
            raise spec.error(
                ("emit", index, "adapters"),
                "the pipeline quantizes behind `fold`, so what is live would keep its floats",
                "write `passes: [quantize, insert]`, or `adapters: folded`",
            )


def bits_in_checkpoint(adapted: Graph, closing: Sequence[Pass]) -> Refusal | None:
    """Why a checkpoint in floats cannot be written: there are bits, and the spec does not say that they are left."""
    passes = [item for item in closing if isinstance(item, Quantize)]
    if passes or (adapted.quantized and not closing):
        entries = [*(q.entry for q in adapted.quantized.values()), *(item.entry for item in passes)]
        named = any(entry is not None for entry in entries)
        who = "the base has" if None in entries else "the spec asks for"
        last = ["insert", "fold"] if adapted.adaptations else ["dequantize"]
        order = ", ".join([*(["quantize"] if named else []), *last])
        return Refusal(
            f"a Hugging Face checkpoint holds floats, and {who} bits",
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
    """Why an adapter cannot be folded unless the spec says in which order: its weight is stored in few bits."""
    for adaptation in adapted.adaptations:
        known = adapted.quantized.get(adaptation.site.parameter)
        if known is not None and not adaptation.stays:
            words = f"{adaptation.site.module} is stored as {known.scheme.name}, and folding rounds it again: say how"
            if known.scheme.calibrated:
                words += ", and name rows to quantize by: `calibration: rows.jsonl`"
            orders = OF_BASE if known.entry is None else ORDERS
            return Refusal(words, notes=tuple(f"{order:42}  {what}" for order, what in orders.items()))
    return None


def closing_of(spec: Spec, graph: Graph, passes: Sequence[Pass]) -> list[Pass]:
    """The passes that only folded artifacts have: from the one on that folds.

    Raises:
        SpecError: the passes stand in an impossible order, or one needs data that is not there.
    """
    wrong = check_order(passes)
    if wrong:
        raise spec.error(("passes",), wrong, "see `adaptc passes` for the stages each pass takes and leaves")
    start = next((i for i, item in enumerate(passes) if item.leaves == "folded"), len(passes))
    closing = list(passes[start:])
    again = [item for item in closing if isinstance(item, Quantize) and item.scheme.calibrated]
    if again and spec.calibration is None and not graph.rows:
        message = (
            f"{again[0].scheme.name} chooses by the layers' inputs, and there are none to quantize again by"
        )
        raise spec.error(("passes",), message, "name some rows: `calibration: rows.jsonl`")
    return closing
