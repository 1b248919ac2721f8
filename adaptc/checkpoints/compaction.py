"""Compact adapters before they are saved: drop what training has pruned, and what only computes virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from adaptc.checkpoints.graph_records import plain_options
from adaptc.checkpoints.key_parts import ROOT
from adaptc.checkpoints.records import AdapterRecord, AdapterTensor
from adaptc.methods.method import shared_name
from adaptc.methods.virtual_tokens import PROMPT_KEY, PromptMethod


def compacted(
    records: Sequence[AdapterRecord], values: Mapping[str, torch.Tensor]
) -> tuple[list[AdapterRecord], dict[str, torch.Tensor]]:
    """Compact adapters: what they compute stays the same.

    Args:
        records: the adapters.
        values: their tensors by name in the graph, and any others, which stay.

    Returns:
        The records of the compact adapters, and `values` with their tensors.
    """
    compact: list[AdapterRecord] = []
    tensors = dict(values)
    for record in records:
        method = record.instance
        if isinstance(method, PromptMethod):
            plain, tokens = _plain_tokens(record, method, values)
            compact.append(plain)
            tensors |= tokens
            continue
        smaller, sites = method.compact(record.sites(values))
        if smaller is method:
            compact.append(record)
            continue
        changed = record.by_name(sites)
        shapes = {name: tuple(value.shape) for name, value in changed.items()}
        compact.append(replace(record.with_shapes(shapes), options=plain_options(smaller)))
        tensors |= changed
    return compact, tensors


def _plain_tokens(
    record: AdapterRecord, method: PromptMethod[Any], values: Mapping[str, torch.Tensor]
) -> tuple[AdapterRecord, dict[str, torch.Tensor]]:
    """Virtual tokens as they are saved: their values, without what computes them.

    Returns:
        The record of the method whose only tensor is the tokens, and that tensor by name; the record as it is and
        nothing where it is such a method already.
    """
    plain: PromptMethod[Any] = method.plain
    if plain == method:
        return record, {}
    with torch.no_grad():
        tokens = method.tokens(**{t.argument: values[t.name] for t in record.tensors})
    name = shared_name(record.adapter, PROMPT_KEY)
    tensor = AdapterTensor(name, ROOT + PROMPT_KEY, tuple(tokens.shape), "tokens", "", True, True, None)
    return replace(record, options=plain_options(plain), tensors=(tensor,)), {name: tokens}
