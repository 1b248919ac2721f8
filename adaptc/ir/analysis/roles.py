"""Roles: what each layer does, read from the dataflow around it and not from names, so that it holds for any model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from adaptc.ir.analysis.attention import find_attentions
from adaptc.ir.analysis.dataflow import downstream, features_reaching, upstream
from adaptc.ir.nodes import operation
from adaptc.methods.site import MATRIX_KINDS, Use, WeightSite
from adaptc.patterns import ROLES, SLICE_NAMES

QUERY, KEY, VALUE, OUTPUT, IN, GATE, OUT, EMBEDDING, HEAD = ROLES
SLICES: Mapping[str, str] = dict(
    zip(SLICE_NAMES, (QUERY, QUERY, KEY, KEY, VALUE, VALUE, GATE, IN, IN), strict=True)
)
"""Name of a slice of a fused weight -> the role of its rows."""
PIECES: Mapping[str, str] = {role: name for name, role in reversed(SLICES.items())}
"""Role -> the shortest name of the slice of a fused weight that plays it."""
ACTIVATIONS = frozenset(
    {
        *("gelu", "silu", "relu", "relu_", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "mish"),
        *("hardswish", "relu6", "softplus", "hardtanh", "prelu"),
    }
)
"""Operations that are the activation of a feed-forward."""
Rows = tuple[tuple[int, int], ...]
"""Ranges of rows: (first, last + 1) of each."""


@dataclass
class Roles:
    """What each site does.

    Attributes:
        of: first use of a site -> its roles; a fused weight has several.
        rows: (first use of a site, role) -> the rows that play it, where these are not all rows.
    """

    of: dict[Use, set[str]] = field(default_factory=dict[Use, set[str]])
    rows: dict[tuple[Use, str], Rows] = field(default_factory=dict[tuple[Use, str], Rows])


def find_roles(nodes: Iterable[fx.Node], sites: Iterable[WeightSite]) -> Roles:
    """Read the roles of every site that is a matrix.

    The matrix product that gives an attention's query, key or value has that role; the next one after an attention is
    its output. The next product after an activation is a feed-forward's out. The one before the activation is its in;
    but if the activation is multiplied by another product's result, it is the gate, and the other product is the in. A
    product is a head if its result becomes an output of the model without entering a residual sum.
    """
    ordered = list(nodes)
    sites = [site for site in sites if site.kind in MATRIX_KINDS]
    weighted = weighted_products(ordered, sites)
    roles = Roles({site.uses[0]: set() for site in sites})
    for node, site in weighted.items():
        if site.kind == "embedding":
            roles.of[site.uses[0]].add(EMBEDDING)
        elif any(user.op == "output" for user in downstream(node, residual=False)):
            roles.of[site.uses[0]].add(HEAD)
    for attention in find_attentions(ordered):
        for role in (QUERY, KEY, VALUE):
            _give(roles, role, getattr(attention, role.rpartition(".")[2]), weighted)
        for node in downstream(attention.mixed, residual=False):
            if node in weighted and not roles.of[weighted[node].uses[0]]:
                roles.of[weighted[node].uses[0]].add(OUTPUT)
    for node, site in weighted.items():
        if not roles.of[site.uses[0]] & {HEAD, EMBEDDING, QUERY, KEY, VALUE, OUTPUT}:
            _feed_forward(node, site, roles, weighted)
    return roles


def weighted_products(nodes: Iterable[fx.Node], sites: Iterable[WeightSite]) -> dict[fx.Node, WeightSite]:
    """The matrix products with the weights of sites: node -> site."""
    by_name = {node.name: node for node in nodes}
    products = {site: _product(by_name, site) for site in sites if site.kind in MATRIX_KINDS}
    return {node: site for site, node in products.items() if node is not None}


def _product(by_name: Mapping[str, fx.Node], site: WeightSite) -> fx.Node | None:
    """The matrix product with a site's weight, downstream of views of the weight; None if there is none."""
    node: fx.Node | None = by_name[site.node]
    while node is not None and operation(node) != site.op:
        node = next(iter(node.users), None)
    return node


def _feed_forward(
    out: fx.Node, site: WeightSite, roles: Roles, weighted: Mapping[fx.Node, WeightSite]
) -> None:
    """Give out, in and gate to a matrix product whose input comes from an activation, and to those before it."""
    # no residual sum is passed: an activation upstream of one belongs to another layer
    branch = upstream(out.all_input_nodes, residual=False)
    active = [node for node in branch if operation(node) in ACTIVATIONS]
    fed = {node for node in upstream(active) if node in weighted}
    if not fed:
        return
    roles.of[site.uses[0]].add(OUT)
    gates = [node for node in branch if operation(node) in ("mul", "mul_") and len(node.all_input_nodes) == 2]
    others: list[fx.Node] = []
    for first, second in ((a, b) for node in gates for a, b in itertools.permutations(node.all_input_nodes)):
        sources = {node for node in upstream([first]) if node in weighted}
        if sources and first not in active and (second in active or not sources & fed):
            others.append(first)
    for node in active:
        _give(roles, GATE if others else IN, node, weighted)
    for factor in others:
        _give(roles, IN, factor, weighted)
    for node in fed:  # x * sigmoid(x) has no gate
        use = weighted[node].uses[0]
        if {GATE, IN} <= roles.of[use] and (use, GATE) not in roles.rows:
            roles.of[use].discard(GATE)


def _give(roles: Roles, role: str, operand: fx.Node, weighted: Mapping[fx.Node, WeightSite]) -> None:
    """Give a role to the matrix products that an operand is computed from, and record which of their rows it takes."""
    region = upstream([operand])
    for node in region:
        site = weighted.get(node)
        if site is None or site.kind == "embedding":
            continue
        rows = features_reaching(node, region)
        if rows:
            roles.of[site.uses[0]].add(role)
        if rows and rows != ((0, site.out_features),):
            roles.rows[site.uses[0], role] = rows
