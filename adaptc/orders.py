"""Orders: the passes of a spec, and what of them each product has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adaptc.errors import Refusal, unknown
from adaptc.graph import Graph
from adaptc.pipeline import Pass
from adaptc.quantize import Quantize
from adaptc.registry import load_passes
from adaptc.spec import Spec

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
            passes += inserts if name == "insert" else quantizes
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


def _made(spec: Spec, index: int, cls: Any, name: str, options: Mapping[str, Any]) -> Pass:
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    other = next((option for option in options if option not in fields), None)
    if other is not None:
        message = f"{name}: {unknown('option', other, fields, listed=())}"
        raise spec.error(("passes", index), message, f"its options: {', '.join(fields) or 'none'}")
    try:
        return TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = ".".join(map(str, first["loc"]))
        words = f"{name}: {option}: {first['msg'].lower()}, got {first['input']!r}"
        raise spec.error(("passes", index), words, f"its options: {', '.join(fields)}") from None


def check_products(spec: Spec, adapted: Graph, closing: Sequence[Pass]) -> None:
    """What is inserted has a place in every product, and the spec's own pipeline leaves what they need."""
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
            raise spec.error(("emit", index, "format"), *str(held.reason).split("\n  "))
        folded = entry.format == "hf" or (entry.format == "onnx" and entry.adapters == "folded")
        if (
            folded
            and adapted.adaptations
            and not closing
            and adapted.stage not in load_passes()["fold"].takes
        ):
            raise spec.error(
                ("passes",),
                f"the pipeline leaves a graph that is {adapted.stage}, which emit.{index} cannot fold",
                "leave `factor` out: live and trainable products get it anyway",
            )
        refusal = folds_into_bits(adapted) if folded and not closing else None
        if refusal:
            raise spec.error(("emit", index, "format"), *str(refusal.reason).splitlines())
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
            f"a Hugging Face checkpoint holds floats, and {who} bits\n"
            f"  write `passes: [{order}]` for floats of what the bits stand for; or emit onnx or torch"
        )
    return None


def lowering(adapted: Graph) -> list[Pass]:
    """What the live and trainable products have besides."""
    factor = load_passes()["factor"]()
    factors = [factor] if adapted.stage in factor.takes else []
    return factors + ([load_passes()["quantized-products"]()] if adapted.quantized else [])


def folds_into_bits(adapted: Graph) -> Refusal | None:
    """Why an adapter cannot be folded unless the spec says in which order: its weight is stored in few bits."""
    for adaptation in adapted.adaptations:
        known = adapted.quantized.get(adaptation.site.parameter)
        if known is not None and not adaptation.stays:
            words = f"{adaptation.site.module} is stored as {known.scheme.name}, and folding rounds it again: say how"
            if known.scheme.calibrated:
                words += ", and name rows to quantize by: `calibration: rows.jsonl`"
            orders = OF_BASE if known.entry is None else ORDERS
            return Refusal("\n".join([words, *(f"  {order:42}  {what}" for order, what in orders.items())]))
    return None


def split(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """The passes that every product starts with, and what folded ones have besides: from the pass on that folds."""
    at = next((i for i, item in enumerate(passes) if item.leaves == "folded"), len(passes))
    return list(passes[:at]), list(passes[at:])
