"""Where outputs of a model are made: the features that its heads read, and outputs that are features themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx

from adaptc.inputs import InputSpec
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.analysis.roles import weighted_products
from adaptc.ir.nodes import is_tensor, module_of, operation, source_of
from adaptc.methods.point_sites import HeadSite
from adaptc.methods.site import HEAD, Use, WeightSite


def find_heads(
    nodes: Sequence[fx.Node], inputs: Sequence[InputSpec], outputs: Sequence[str], heads: Collection[str],
    sites: Sequence[WeightSite],
) -> Iterator[HeadSite]:  # fmt: skip
    """Every place of a traced graph where a new head can be: the model's heads first, then its outputs.

    Args:
        nodes: of the graph as traced.
        inputs: what the graph takes.
        outputs: the names of its outputs.
        heads: the modules that are output heads.
        sites: its weights.
    """
    end = next(node for node in nodes if node.op == "output")
    named = dict(zip(outputs, results_of(end), strict=True))
    first: dict[str, tuple[fx.Node, WeightSite]] = {}
    for node, site in weighted_products(nodes, sites).items():
        outer = min((h for h in heads if f"{site.module}.".startswith(f"{h}.")), key=len, default=None)
        if outer is not None:
            first.setdefault(outer, (node, site))
    for head, (node, site) in first.items():
        weights = {use.node for use in site.uses if use.node != node.name}
        index, read = next(
            (i, a) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and is_activation(a, weights)
        )
        reached = set(walk([node], lambda n: list(n.users)))
        given = [name for name, value in named.items() if value in reached]
        yield from _site(
            nodes, inputs, head, read, Use(node.name, index), given[0] if len(given) == 1 else ""
        )
    for index, (name, value) in enumerate(named.items()):
        if is_tensor(value):
            yield from _site(nodes, inputs, name, value, Use(end.name, index), name)


def results_of(output: fx.Node) -> list[Any]:
    """What a graph gives, in order: nodes, or plain values."""
    results: Any = output.args[0]
    return list(cast("Sequence[Any]", results)) if isinstance(results, (list, tuple)) else [results]


def is_activation(node: fx.Node, weights: Collection[str]) -> bool:
    """Whether an operand of a matrix product is computed from the model's inputs."""
    return node.name not in weights and any(
        n.op == "placeholder" for n in walk([node], lambda n: n.all_input_nodes)
    )


def _site(
    nodes: Sequence[fx.Node], inputs: Sequence[InputSpec], name: str, value: fx.Node, use: Use, output: str
) -> Iterator[HeadSite]:
    """The place whose features are a value; none where they are no numbers on a last axis of a fixed size."""
    features: torch.Tensor = value.meta["val"]
    if not features.dtype.is_floating_point or features.dim() not in (2, 3):
        return
    width: int | torch.SymInt = cast(Any, features).shape[-1]
    if not isinstance(width, int):
        return
    tokens = features.dim() == 3
    beside = _of_tokens(nodes, inputs, features) if tokens else {}
    yield HeadSite(
        module=name,
        type=module_of(value)[1],
        kind=HEAD,
        op=operation(value),
        dtype=features.dtype,
        uses=(use,),
        source=source_of(value),
        output=output,
        width=width,
        tokens=tokens,
        mask=next((n for n, dtype in beside.items() if "mask" in n and not dtype.startswith("float")), ""),
        ids=next((n for n, dtype in beside.items() if n.endswith("input_ids") and "int" in dtype), ""),
    )


def _of_tokens(
    nodes: Sequence[fx.Node], inputs: Sequence[InputSpec], features: torch.Tensor
) -> dict[str, str]:
    """The inputs that have one number for each token: name of the node -> dtype.

    Their dimensions have the names of the features': the trace may give one dimension several symbols.
    """
    placeholders = [node for node in nodes if node.op == "placeholder"]
    names = {
        str(size): dim
        for node, spec in zip(placeholders, inputs, strict=True)
        for size, dim in zip(node.meta["val"].shape, spec.dims, strict=True)
    }
    dims = tuple(names.get(str(size)) for size in features.shape[:2])
    return {
        node.name: spec.dtype for node, spec in zip(placeholders, inputs, strict=True) if spec.dims == dims
    }
