"""The sites of a traced graph: which weights can be adapted, read from how its operations use them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import fx

from adaptc.ir.analysis.layouts import consumers
from adaptc.ir.analysis.matrix_products import MATRIX_PRODUCTS, bias_of
from adaptc.ir.nodes import module_of, operation, source_of
from adaptc.methods.site import MATRIX_KINDS, Layout, Use, WeightSite

Readers = list[tuple[fx.Node, int]]
"""Where a weight is read: (operation, index of the argument), -1 for one inside a list or by keyword."""


def find_sites(graph: fx.Graph, names: Mapping[str, str], parameters: set[str]) -> list[WeightSite]:
    """Every site of a traced graph, in the order of execution.

    Args:
        graph: the traced graph.
        names: every name of a parameter or buffer -> the first name of the same tensor.
        parameters: the names that are parameters, not buffers.
    """
    groups: dict[tuple[str, str], Readers] = defaultdict(list)
    types: dict[str, str] = {}
    values: dict[str, fx.Node] = {}
    aliases: dict[str, list[str]] = defaultdict(list)
    for name, first in names.items():
        aliases[first].append(name)
    for node, user, index in _reads(graph):
        target = str(node.target)
        if target not in parameters:
            continue
        module, type_name = module_of(user)
        name = next((n for n in aliases[names[target]] if n.rpartition(".")[0] == module), None)
        if name is None:  # used from a module that does not own it: the owner keeps the site
            name = target
            module = target.rpartition(".")[0]
        types.setdefault(module, type_name)
        values[name] = node
        groups[module, name].append((user, index))
    order = {node: position for position, node in enumerate(graph.nodes)}
    for readers in groups.values():
        readers.sort(key=lambda reader: order[reader[0]])
    return _disambiguated(
        [
            _site(module, name, types[module], values[name], readers)
            for (module, name), readers in groups.items()
        ]
    )


def _reads(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """Every (weight, operation that reads it, index of the argument) of a graph."""
    for node in graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                yield node, user, next((i for i, a in enumerate(user.args) if a is node), -1)


def _site(module: str, name: str, type_name: str, node: fx.Node, readers: Readers) -> WeightSite:
    """The site of a weight: `name` is its name in the module, `node` reads it."""
    value = node.meta["val"]
    readers, foreign = _without_foreign(module, node, readers)
    products = consumers(node, [user for user, _ in readers])
    layouts = {layout for _, layout in products}
    biases = {_bias_of(user) for user, _ in products}
    # One expression serves all uses, so they must read the weight the same way, beside the same bias.
    layout = layouts.pop() if len(layouts) == len(biases) == 1 and products else None
    bias = biases.pop() if layout is not None else None
    op = operation(products[0][0]) if products else ""
    return WeightSite(
        module=module,
        type=type_name,
        kind=_kind(layout, op),
        op=op,
        parameter=str(node.target),
        leaf=name.rpartition(".")[2],
        shape=tuple(value.shape),
        dtype=value.dtype,
        layout=layout,
        uses=tuple(Use(user.name, index) for user, index in readers),
        bias=bias,
        bias_uses=tuple(_bias_use(user) for user, _ in products) if bias else (),
        source=source_of(readers[0][0]),
        groups=_groups(products[0][0]) if products else 1,
        foreign=tuple(Use(user.name, index) for user, index in foreign),
        computed_bias=layout is not None
        and bias is None
        and any(bias_of(user) is not None for user, _ in products),
    )


def _without_foreign(module: str, node: fx.Node, readers: Readers) -> tuple[Readers, Readers]:
    """Separate the reads by other modules that read the weight otherwise, such as a head tied to an embedding.

    Returns:
        the reads of the site, and the foreign ones; none are foreign where all read the weight alike.
    """
    inside = [reader for reader in readers if module_of(reader[0])[0] == module]
    foreign = [reader for reader in readers if reader not in inside]
    if not inside or not foreign:
        return readers, []
    inside_layouts, foreign_layouts = (
        {layout for _, layout in consumers(node, [user for user, _ in part])} for part in (inside, foreign)
    )
    return (readers, []) if inside_layouts == foreign_layouts else (inside, foreign)


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
    """Where a bias enters the matrix product that adds it."""
    argument = MATRIX_PRODUCTS[operation(user)].bias
    assert argument is not None
    return Use(user.name, argument)


def _disambiguated(sites: list[WeightSite]) -> list[WeightSite]:
    """The sites, those `shared` whose module has several matrices: their leaf is then part of their name."""
    matrices = Counter(site.module for site in sites if site.kind in MATRIX_KINDS)
    return [
        replace(site, shared=True) if site.kind in MATRIX_KINDS and matrices[site.module] > 1 else site
        for site in sites
    ]
