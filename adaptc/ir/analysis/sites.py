"""Which weights of a traced graph can be adapted, read from its dataflow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from adaptc.ir.analysis.layouts import consumers
from adaptc.ir.analysis.matmul import MATRIX_PRODUCTS, bias_of
from adaptc.ir.nodes import module_of, operation, parameter_uses, source_of
from adaptc.methods.site import MATRIX_KINDS, Layout, Use, WeightSite

ADAPTATION = "adaptation"
"""The key in a node's meta of the adaptation that its expression belongs to; nodes of the base have none."""


def place_of(node: fx.Node) -> tuple[str, ...]:
    """A note for a message: `in layers.0.attention, from modeling_llama.py:214`; empty if neither is known."""
    module, source = module_of(node)[0], source_of(node)
    parts = [f"in {module}"] * bool(module) + [f"from {source}"] * bool(source)
    return (", ".join(parts),) if parts else ()


def find_sites(graph: fx.Graph, names: Mapping[str, str], parameters: set[str]) -> list[WeightSite]:
    """Every site of a traced graph, in the order of execution.

    Args:
        graph: the traced graph.
        names: every name of a parameter or buffer -> the first name of the same tensor.
        parameters: the names that are parameters, not buffers.
    """
    groups: dict[tuple[str, str], list[tuple[fx.Node, int]]] = defaultdict(list)
    types: dict[str, str] = {}
    values: dict[str, fx.Node] = {}
    same = defaultdict(list)
    for name, first in names.items():
        same[first].append(name)
    for node, user, index in parameter_uses(graph):
        target = str(node.target)
        if target not in parameters:
            continue
        module, type_name = module_of(user)
        own = next((n for n in same[names[target]] if n.rpartition(".")[0] == module), None)
        if own is None:  # used from a module that does not own it: the owner keeps the site
            own = target
            module = target.rpartition(".")[0]
        types.setdefault(module, type_name)
        values[own] = node
        groups[module, own].append((user, index))
    order = {node: position for position, node in enumerate(graph.nodes)}
    for uses in groups.values():
        uses.sort(key=lambda use: order[use[0]])
    sites = [_site(module, own, types[module], values[own], uses) for (module, own), uses in groups.items()]
    return _told_apart(sites)


def _site(
    module: str, own: str, type_name: str, node: fx.Node, uses: list[tuple[fx.Node, int]]
) -> WeightSite:
    value = node.meta["val"]
    uses, foreign = _own_and_foreign(module, node, uses)
    read = consumers(node, [user for user, _ in uses])
    layouts = {layout for _, layout in read}
    biases = {_bias_of(user) for user, _ in read}
    # One expression serves all uses, so they must read the weight the same way, beside the same bias.
    layout = layouts.pop() if len(layouts) == len(biases) == 1 and read else None
    bias = biases.pop() if layout is not None else None
    op = operation(read[0][0]) if read else ""
    return WeightSite(
        module=module,
        type=type_name,
        kind=_kind(layout, op),
        op=op,
        parameter=str(node.target),
        leaf=own.rpartition(".")[2],
        shape=tuple(value.shape),
        dtype=value.dtype,
        layout=layout,
        uses=tuple(Use(user.name, index) for user, index in uses),
        bias=bias,
        bias_uses=tuple(_bias_use(user) for user, _ in read) if bias else (),
        source=source_of(uses[0][0]),
        groups=_groups(read[0][0]) if read else 1,
        foreign=tuple(Use(user.name, index) for user, index in foreign),
        computed_bias=layout is not None
        and bias is None
        and any(bias_of(user) is not None for user, _ in read),
    )


def _own_and_foreign(
    module: str, node: fx.Node, uses: list[tuple[fx.Node, int]]
) -> tuple[list[tuple[fx.Node, int]], list[tuple[fx.Node, int]]]:
    """Set apart uses by other modules that read the weight otherwise, such as a head made of an embedding's table."""
    own = [use for use in uses if module_of(use[0])[0] == module]
    foreign = [use for use in uses if use not in own]
    if not own or not foreign:
        return uses, []
    mine, theirs = (
        {layout for _, layout in consumers(node, [u for u, _ in part])} for part in (own, foreign)
    )
    return (uses, []) if mine == theirs else (own, foreign)


def _groups(node: fx.Node) -> int:
    groups = node.args[6] if operation(node).startswith("conv") and len(node.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def _kind(layout: Layout | None, op: str) -> str:
    if layout is None:
        return "parameter"
    if layout.batch:
        return "experts"
    return "conv" if op.startswith("conv") else "embedding" if op == "embedding" else "linear"


def _bias_of(user: fx.Node) -> str | None:
    """The name of the bias beside the weight in this operation, if it is a parameter."""
    bias = bias_of(user)
    return str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _bias_use(user: fx.Node) -> Use:
    """Where a bias enters the product that has one."""
    place = MATRIX_PRODUCTS[operation(user)].bias
    assert place is not None
    return Use(user.name, place)


def _told_apart(sites: list[WeightSite]) -> list[WeightSite]:
    """Matrices of one module are told apart by their leaf, where there are several."""
    count = defaultdict(int)
    for site in sites:
        count[site.module] += site.kind in MATRIX_KINDS
    return [
        replace(site, shared=True) if site.kind in MATRIX_KINDS and count[site.module] > 1 else site
        for site in sites
    ]
