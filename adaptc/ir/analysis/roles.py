"""Roles: what a layer does, read from the dataflow around it, so that it holds on models nobody has named."""

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
"""The names of slices of a fused weight -> the role of their rows."""
PIECES: Mapping[str, str] = {role: name for name, role in reversed(SLICES.items())}
"""The role of rows -> the shortest name of that slice."""
ACTIVATIONS = frozenset(
    {
        *(
            "gelu",
            "silu",
            "relu",
            "relu_",
            "sigmoid",
            "tanh",
            "leaky_relu",
            "elu",
            "selu",
            "mish",
            "hardswish",
        ),
        *("relu6", "softplus", "hardtanh", "prelu"),
    }
)
Rows = tuple[tuple[int, int], ...]


@dataclass
class Roles:
    """What each site does.

    Attributes:
        of: first use of a site -> its roles; a fused weight has several.
        rows: (first use, role) -> the ranges of rows that play it.
    """

    of: dict[Use, set[str]] = field(default_factory=dict)
    rows: dict[tuple[Use, str], Rows] = field(default_factory=dict)


def find_roles(nodes: Iterable[fx.Node], sites: Iterable[WeightSite]) -> Roles:
    """Read the roles of every site that is a matrix.

    What makes an attention's query, key or value, with no other product in between, has that role; what an attention
    feeds first is its output. What an activation feeds is a feed-forward's out; what goes into the activation is its
    in, or its gate where the activation is multiplied with another product's result, which is then in. What reaches
    an output of the model beside no residual sum is a head.
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
    """Every node that multiplies by the weight of one of these sites."""
    by_name = {node.name: node for node in nodes}
    products = {site: _product(by_name, site) for site in sites if site.kind in MATRIX_KINDS}
    return {node: site for site, node in products.items() if node is not None}


def _product(by_name: Mapping[str, fx.Node], site: WeightSite) -> fx.Node | None:
    """The node that multiplies by a site's weight, behind the weight's own views."""
    node: fx.Node | None = by_name[site.node]
    while node is not None and operation(node) != site.op:
        node = next(iter(node.users), None)
    return node


def _feed_forward(
    out: fx.Node, site: WeightSite, roles: Roles, weighted: Mapping[fx.Node, WeightSite]
) -> None:
    """Give the roles around a product whose input comes from an activation."""
    branch = upstream(
        out.all_input_nodes, residual=False
    )  # an activation in the residual stream is another's
    active = [node for node in branch if operation(node) in ACTIVATIONS]
    fed = {node for node in upstream(active) if node in weighted}
    if not fed:
        return
    roles.of[site.uses[0]].add(OUT)
    gates = [node for node in branch if operation(node) in ("mul", "mul_") and len(node.all_input_nodes) == 2]
    others = []
    for first, second in ((a, b) for node in gates for a, b in itertools.permutations(node.all_input_nodes)):
        made_from = {node for node in upstream([first]) if node in weighted}
        if made_from and first not in active and (second in active or not made_from & fed):
            others.append(first)
    for node in active:
        _give(roles, GATE if others else IN, node, weighted)
    for factor in others:
        _give(roles, IN, factor, weighted)
    for node in fed:  # x * sigmoid(x) has no gate
        if {GATE, IN} <= roles.of[weighted[node].uses[0]] and (
            weighted[node].uses[0],
            GATE,
        ) not in roles.rows:
            roles.of[weighted[node].uses[0]].discard(GATE)


def _give(roles: Roles, role: str, operand: fx.Node, weighted: Mapping[fx.Node, WeightSite]) -> None:
    """Give a role to the products that an operand is made from, and note which of their rows it takes."""
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
