"""What a plan refuses of programs with a cache, before a weight is read."""

from __future__ import annotations

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import writes_in_place
from adaptc.rewriter.cache.cache import tokens_meet
from adaptc.rewriter.cache.first_past import WithoutVirtualTokens
from adaptc.spec.emit import PROGRAMS, GenaiEmit, OnnxEmit
from adaptc.spec.spec import Spec


def check_cached(spec: Spec, base: Graph) -> None:
    """Check that a model can have a cache, where the spec asks for one, as far as no weight need be read.

    Of a model that writes into its tensors nothing is said yet.

    Raises:
        SpecError: it cannot; names the operation.
    """
    if any(writes_in_place(node.target) for node in base.nodes):
        return
    for index, entry in enumerate(spec.emit):
        refusals = tokens_meet(base) if isinstance(entry, OnnxEmit) and entry.cache else []
        if refusals:
            notes = [note for refused in refusals for note in (refused.reason, *refused.notes)]
            raise spec.error(("emit", index, "cache"), "this model can have no cache", *notes)


def check_virtual_tokens(spec: Spec, adapted: Graph) -> None:
    """Check that a cache can hold the virtual tokens of an adapted model, where the spec asks for a program with both.

    Raises:
        SpecError: they stand among the real ones.
    """
    for index, entry in enumerate(spec.emit):
        if not isinstance(entry, PROGRAMS) or entry.adapters == "none":
            continue
        cached = isinstance(entry, GenaiEmit) or entry.cache
        refusals = WithoutVirtualTokens().requires(adapted) if cached else []
        if refusals:
            key = "format" if isinstance(entry, GenaiEmit) else "cache"
            raise spec.error(("emit", index, key), refusals[0].reason, *refusals[0].notes)
