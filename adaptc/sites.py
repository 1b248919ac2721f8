"""Sites: the places of a graph that can be adapted, read from its dataflow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Use:
    """One argument of one node: where a weight enters an operation."""

    node: str
    argument: int


@dataclass(frozen=True)
class Site:
    """One place that can be adapted.

    Attributes:
        module: the full name of the module that uses the weight.
        type: that module's class, such as `Linear`.
        kind: `linear`, or `parameter` for any parameter at all.
        parameter: the weight's name in the graph.
        leaf: the weight's name inside its module, such as `weight`.
        shape: the stored shape.
        dtype: the stored dtype.
        transposed: the weight is stored `(in, out)`, as GPT-2's Conv1D does.
        uses: where the weight enters this module's operations.
        bias: the name of the bias beside it, if any.
        bias_uses: where the bias enters.
        source: file and line of the model that runs this operation.
    """

    module: str
    type: str
    kind: str
    parameter: str
    leaf: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    uses: tuple[Use, ...]
    bias: str | None
    bias_uses: tuple[Use, ...]
    source: str

    @property
    def out_features(self) -> int:
        """Rows of the weight as `(out, in)`."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight as `(out, in)`."""
        return self.shape[0] if self.transposed else self.shape[1]

    def key(self, key: str) -> str:
        """What a checkpoint calls a tensor of this site: the module's name, if it has one, and the key."""
        return f"{self.module}.{key}" if self.module else key

    def view(self, W: torch.Tensor) -> torch.Tensor:
        """The stored weight as `(out, in)`, and back: its own inverse."""
        return W.t() if self.transposed else W

    def __str__(self) -> str:
        sides = (
            f"{self.in_features} -> {self.out_features}" if self.kind == "linear" else str(list(self.shape))
        )
        return f"{self.module} ({self.kind} {sides})" + (f", from {self.source}" if self.source else "")


@dataclass(frozen=True)
class LinearForm:
    """Where the input, weight and bias of a matrix-product node stand, and how the weight is stored."""

    input: int
    weight: int
    bias: int | None
    transposed: bool


LINEAR_FORMS: Mapping[object, LinearForm] = {
    aten.linear.default: LinearForm(input=0, weight=1, bias=2, transposed=False),
    aten.addmm.default: LinearForm(input=1, weight=2, bias=0, transposed=True),
    aten.mm.default: LinearForm(input=0, weight=1, bias=None, transposed=True),
    aten.matmul.default: LinearForm(input=0, weight=1, bias=None, transposed=True),
}
"""The operations that compute `x W^T + b`; a new spelling of a linear layer is one row."""


def module_of(node: fx.Node) -> tuple[str, str]:
    """The full name and class of the module a node came from; ("", "") at the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    name, cls = stack[-1]
    cls = cls if isinstance(cls, str) else cls.__name__
    return re.sub(r"@\d+", "", name), cls.rsplit(".", 1)[-1]


def source_of(node: fx.Node) -> str:
    """File and line, outside torch, that ran this node: `modeling_llama.py:214`."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [(path, line) for path, line in frames if "/torch/" not in path] or frames
    return f"{outside[-1][0].rsplit('/', 1)[-1]}:{outside[-1][1]}" if outside else ""


def parameter_uses(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """Every (get_attr node, user, argument index) of a graph; -1 for an argument inside a list or by keyword."""
    for node in graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                yield node, user, next((i for i, a in enumerate(user.args) if a is node), -1)


def _is_weight(user: fx.Node, index: int, rank: int) -> bool:
    form = LINEAR_FORMS.get(user.target)
    return form is not None and index == form.weight and rank == 2 and not user.kwargs


def find_sites(graph: fx.Graph, names: Mapping[str, str], parameters: set[str]) -> list[Site]:
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
    return sites


def _site(module: str, own: str, type_name: str, node: fx.Node, uses: list[tuple[fx.Node, int]]) -> Site:
    value = node.meta["val"]
    forms = {LINEAR_FORMS[user.target].transposed for user, _ in uses if user.target in LINEAR_FORMS}
    biases = {_bias_of(user) for user, _ in uses}
    # One expression serves all uses, so they must read the weight the same way, beside the same bias.
    linear = (
        all(_is_weight(user, index, value.dim()) for user, index in uses) and len(forms) == len(biases) == 1
    )
    bias: str | None = None
    bias_uses: list[Use] = []
    if linear:
        bias = biases.pop()
        if bias is not None:
            bias_uses = [Use(user.name, LINEAR_FORMS[user.target].bias or 0) for user, _ in uses]
    return Site(
        module=module,
        type=type_name,
        kind="linear" if linear else "parameter",
        parameter=str(node.target),
        leaf=own.rpartition(".")[2],
        shape=tuple(value.shape),
        dtype=value.dtype,
        transposed=linear and forms.pop(),
        uses=tuple(Use(user.name, index) for user, index in uses),
        bias=bias,
        bias_uses=tuple(bias_uses),
        source=source_of(uses[0][0]),
    )


def _bias_of(user: fx.Node) -> str | None:
    """The name of the bias beside the weight in this operation, if it is a parameter."""
    form = LINEAR_FORMS.get(user.target)
    if form is None or form.bias is None or len(user.args) <= form.bias:
        return None
    at = user.args[form.bias]
    return str(at.target) if isinstance(at, fx.Node) and at.op == "get_attr" else None
