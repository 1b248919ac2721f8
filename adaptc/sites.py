"""Sites: the places of a graph that can be adapted, read from its dataflow."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from adaptc.layout import Layout, consumers
from adaptc.matrix_products import MATRIX_PRODUCTS, bias_of
from adaptc.method import MATRIX_KINDS
from adaptc.names import PACKED
from adaptc.nodes import operation

KINDS = ("linear", "conv", "embedding", "experts", "parameter", "sub-layer", "attention", "input")
"""The kinds of site, as messages list them."""


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
        kind: `linear`, `conv`, `embedding`, `experts` (several matrices in one weight), `parameter` for any
            parameter at all, or that of a point, which is no weight: `sub-layer`, `attention`, `input`.
        op: the operation that reads the weight, such as `conv2d`.
        parameter: the weight's name in the graph.
        leaf: the weight's name inside its module, such as `weight`.
        shape: the stored shape.
        dtype: the stored dtype.
        layout: how the stored weight reads as matrices; None for a `parameter`.
        uses: where the weight enters this module's operations; of a point what is adapted.
        bias: the name of the bias beside it, if any.
        bias_uses: where the bias enters.
        source: file and line of the model that runs this operation.
        shared: the module has several matrices, so that the leaf tells them apart.
        piece: of a slice its name, such as `q` or `0:512`; empty for the whole.
        rows: the ranges of rows of the matrix that a slice is made of.
        groups: of a grouped convolution.
        computed_bias: the bias beside it is no parameter, but computed from some.
        foreign: where another module reads the weight in another way.
        role: of a sub-layer what it is the output of; of an attention which half of two it is in.
        reads: of a sub-layer the node of its input; of an input the placeholder.
    """

    module: str
    type: str
    kind: str
    op: str
    parameter: str
    leaf: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout | None
    uses: tuple[Use, ...]
    bias: str | None
    bias_uses: tuple[Use, ...]
    source: str
    shared: bool = False
    piece: str = ""
    rows: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    computed_bias: bool = False
    foreign: tuple[Use, ...] = ()
    role: str = ""
    reads: str = ""

    @classmethod
    def point(cls, **what: Any) -> Site:
        """A site that is no weight."""
        return cls(**{"parameter": "", "leaf": "", "layout": None, "bias": None, "bias_uses": (), **what})

    def as_point(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype, source: str) -> Site:
        """A point that is named after the weight of this site."""
        what = {"module": self.module, "type": self.type, "op": self.op, "uses": self.uses}
        kept = {"parameter": self.parameter, "leaf": self.leaf} if kind == "input" else {}
        return Site.point(kind=kind, shape=shape, dtype=dtype, source=source, **what, **kept)

    @property
    def out_features(self) -> int:
        """Rows of a matrix `(out, in)`."""
        if self.rows:
            return sum(stop - start for start, stop in self.rows)
        return self._size(self.layout.out) if self.layout else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of a matrix `(out, in)`."""
        return self._size(self.layout.inner) if self.layout else self.shape[-1]

    @property
    def batch(self) -> int | None:
        """How many matrices the weight holds, such as one an expert; None where it is one matrix."""
        return self._size(self.layout.batch) if self.layout and self.layout.batch else None

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """The stored axes that columns are made of: `(in, height, width)` of a convolution."""
        assert self.layout is not None
        return tuple(self.shape[axis] for axis in self.layout.inner)

    @property
    def transposed(self) -> bool:
        """Whether a linear weight is stored `(in, out)`, as GPT-2's Conv1D does."""
        return self.kind == "linear" and self.layout is not None and self.layout.out == (1,)

    @property
    def layer(self) -> str:
        """The class of torch's or transformers' layer that does this: `Linear`, `Conv2d`; "" where there is none."""
        if self.kind == "linear":
            return "Conv1D" if self.transposed else "Linear"
        if self.kind == "conv":
            return "Conv" + self.op.removeprefix("conv").replace("_transpose", "Transpose")
        return {"embedding": "Embedding"}.get(self.kind, "")

    def as_parameter(self) -> Site:
        """The same weight as a parameter, wherever it is used."""
        bare = {
            "kind": "parameter",
            "layout": None,
            "bias": None,
            "bias_uses": (),
            "shared": False,
            "foreign": (),
        }
        return replace(self, uses=(*self.uses, *self.foreign), **bare)

    @property
    def by_parameter(self) -> bool:
        """Whether the weight is targeted by its own name: PEFT's `target_parameters`."""
        return self.kind in MATRIX_KINDS and self.leaf not in ("weight", PACKED)

    @property
    def rows_repeat(self) -> bool:
        """Whether a row makes several channels, as in every group of a grouped transposed convolution."""
        return self.groups > 1 and "transpose" in self.op

    @property
    def name(self) -> str:
        """The weight's full name in its own module."""
        return ".".join(part for part in (self.module, self.leaf) if part)

    def _size(self, axes: Sequence[int]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def part(self) -> str:
        """What tells this site's tensors from those of others in the same module."""
        words = (self.leaf if self.shared else "", re.sub("[:,]", "_", self.piece))
        return "_".join(word for word in words if word)

    @property
    def pattern(self) -> str:
        """The target that means this site alone."""
        name = ".".join(p for p in (self.module, self.leaf if self.shared else "") if p)
        return name + (f"[{self.piece}]" if self.piece else "")

    def key(self, key: str) -> str:
        """What a checkpoint of our own calls a tensor of this site: the module's name, if it has one, and the key."""
        first, dot, rest = key.partition(".")
        named = f"{first}_{self.part}{dot}{rest}" if self.part else key
        return f"{self.module}.{named}" if self.module else named

    def matrix(self, W: torch.Tensor) -> torch.Tensor:
        """The weight as the method sees it: `(out, in)`, or `(batch, out, in)`; a slice has its own rows only."""
        M = self.layout.matrix(W) if self.layout else W
        return self._take(M, -2) if self.rows else M

    def restored(self, M: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        """The stored weight with `M` in place of what `matrix` gave."""
        if self.layout is None:
            return M
        if self.rows:
            M = self._put(M, self.layout.matrix(W), -2)
        return self.layout.tensor(M, self.shape)

    def bias_of(self, b: torch.Tensor) -> torch.Tensor:
        """The bias as the method sees it: `(out,)` of this site's rows."""
        return self._take(b, -1) if self.rows else b

    def bias_restored(self, new: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The whole bias with `new` in place of what `bias_of` gave."""
        return self._put(new, b, -1) if self.rows else new

    def _take(self, whole: torch.Tensor, axis: int) -> torch.Tensor:
        pieces = [whole.narrow(axis, start, stop - start) for start, stop in self.rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def _put(self, new: torch.Tensor, whole: torch.Tensor, axis: int) -> torch.Tensor:
        pieces, at, taken = [], 0, 0
        for start, stop in self.rows:
            if start > at:
                pieces.append(whole.narrow(axis, at, start - at))
            pieces.append(new.narrow(axis, taken, stop - start) if len(self.rows) > 1 else new)
            at, taken = stop, taken + stop - start
        if at < whole.shape[axis]:
            pieces.append(whole.narrow(axis, at, whole.shape[axis] - at))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def __str__(self) -> str:
        sides = str(list(self.shape))
        if self.kind in MATRIX_KINDS:
            sides = f"{self.in_features} -> {self.out_features}" + (f" x {self.batch}" if self.batch else "")
        return f"{self.pattern} ({self.kind} {sides})" + (f", from {self.source}" if self.source else "")


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


def place_of(node: fx.Node) -> str:
    """A line for the end of a message: `in layers.0.attention, from modeling_llama.py:214`; "" if neither is known."""
    module, source = module_of(node)[0], source_of(node)
    parts = [f"in {module}"] * bool(module) + [f"from {source}"] * bool(source)
    return "\n  " + ", ".join(parts) if parts else ""


def parameter_uses(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """Every (get_attr node, user, argument index) of a graph; -1 for an argument inside a list or by keyword."""
    for node in graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                yield node, user, next((i for i, a in enumerate(user.args) if a is node), -1)


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
    return _told_apart(sites)


def _site(module: str, own: str, type_name: str, node: fx.Node, uses: list[tuple[fx.Node, int]]) -> Site:
    value = node.meta["val"]
    uses, foreign = _own_and_foreign(module, node, uses)
    read = consumers(node, [user for user, _ in uses])
    layouts = {layout for _, layout in read}
    biases = {_bias_of(user) for user, _ in read}
    # One expression serves all uses, so they must read the weight the same way, beside the same bias.
    layout = layouts.pop() if len(layouts) == len(biases) == 1 and read else None
    bias = biases.pop() if layout is not None else None
    op = operation(read[0][0]) if read else ""
    return Site(
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


def _told_apart(sites: list[Site]) -> list[Site]:
    """Matrices of one module are told apart by their leaf, where there are several."""
    count = defaultdict(int)
    for site in sites:
        count[site.module] += site.kind in MATRIX_KINDS
    return [
        replace(site, shared=True) if site.kind in MATRIX_KINDS and count[site.module] > 1 else site
        for site in sites
    ]
