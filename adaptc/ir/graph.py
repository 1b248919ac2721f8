"""The graph: ATen operations on named weights that are not there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

from adaptc.inputs import InputSpec
from adaptc.ir.analysis.points import find_points
from adaptc.ir.analysis.roles import Roles, find_roles
from adaptc.ir.analysis.sites import ADAPTATION
from adaptc.ir.base import Base
from adaptc.ir.nodes import PROVENANCE, VERIFIED, _line, copy_nodes, is_tensor, set_tensor, signature
from adaptc.methods.method import Method, WeightMethod
from adaptc.methods.param import Param
from adaptc.methods.point_sites import AnyPoint, Site
from adaptc.methods.site import Use, WeightSite
from adaptc.weights import Weight

if TYPE_CHECKING:
    from adaptc.quantization.quantized_weight import QuantizedLeaf


class Importance(Protocol):
    """How much each entry of a weight matters for the loss, estimated from data; see `fisher.FisherInformation`."""

    def __call__(self, name: str) -> torch.Tensor:
        """Of one weight, in its shape."""
        ...

    def of(self, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Of several weights by name, each in its shape."""
        ...


def _product(target: Any, values: Sequence[Any]) -> torch.Tensor | None:
    """The value of a product with a matrix, whose shape is plain; torch's own way to it takes long, through views."""
    if target not in (torch.ops.aten.matmul.default, torch.ops.aten.linear.default) or values[1].dim() != 2:
        return None
    x, matrix = values[0], values[1]
    inner, outer = matrix.shape if target is torch.ops.aten.matmul.default else matrix.shape[::-1]
    if x.dim() < 2 or x.dtype != matrix.dtype or x.shape[-1] != inner:
        return None
    return x.new_empty((*x.shape[:-1], outer))


OnAlias = Literal["refuse", "untie", "live", "share"]
"""What an adapted tensor that is used elsewhere too becomes: not folded into, its own tensor, a live expression, or
adapted everywhere."""


@dataclass(frozen=True, eq=False)
class Adaptation:
    """One method on one site, as inserted: `method` has the options of this site, `declared` those of the entry.

    Two adaptations are the same only where they are one object, whatever they hold.
    """

    site: Site
    method: Method
    declared: Method
    adapter: str
    entry: int
    params: Mapping[str, tuple[str, Param]]
    """Argument of the method's expression -> (name in the graph, parameter)."""
    on_alias: OnAlias = "refuse"

    @property
    def stays(self) -> bool:
        """Whether it is no weight expression, so that it is live in a folded graph too."""
        return not isinstance(self.method, WeightMethod)

    def shares(self, argument: str) -> bool:
        """Whether a tensor is that of all sites of the entry."""
        return argument not in self.method.stored(self.site)


@dataclass(repr=False)
class Graph:
    """A model as a `torch.fx` graph of ATen operations.

    Attributes:
        module: the graph module; its parameters are fake tensors (shapes and dtypes only).
        weights: every parameter and buffer by name, loaded on request.
        aliases: every such name -> the first name of the same tensor.
        buffers: the names that are buffers; `transient` those that a state dict leaves out.
        inputs: the model's inputs; outputs: the names of its outputs.
        sites: the places that can be adapted.
        heads: modules that are output heads, which `all-linear` leaves out.
        source: where the model comes from.
        adaptations: what was inserted so far, in order.
        adapted: (weight, first node that uses it) -> the node that holds its adapted value.
        adapted_values: node that a target names -> the node that holds its adapted value.
        quantized: weight -> what stands for it in few bits.
        stage: which legality table holds, see `stages.TABLE`.
        origin: the graph as traced, which a rewritten one came from.
        information: the Fisher information of a weight by its name, where there is data to estimate it from.
        rows: that data, a batch of one each.
    """

    module: fx.GraphModule
    weights: dict[str, Weight]
    aliases: dict[str, str]
    buffers: frozenset[str]
    transient: frozenset[str]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    sites: tuple[WeightSite, ...]
    heads: frozenset[str]
    source: Base
    adaptations: list[Adaptation] = field(default_factory=list)
    adapted: dict[tuple[str, str], str] = field(default_factory=dict)
    adapted_values: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, QuantizedLeaf] = field(default_factory=dict)
    stage: str = "traced"
    as_traced: Graph | None = None
    information: Importance | None = None
    rows: Sequence[Mapping[str, torch.Tensor]] = ()

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """The nodes, in the order of execution."""
        return self.module.graph.nodes

    @property
    def operations(self) -> list[str]:
        """The operations by name, in order: what the folded graph must share with the base, one for one."""
        return [str(node.target) for node in self.nodes if node.op == "call_function"]

    @property
    def tensors(self) -> list[str]:
        """The names of the outputs that are tensors, not None or a plain number."""
        results = next(node for node in self.nodes if node.op == "output").args[0]
        flat = results if isinstance(results, (list, tuple)) else [results]
        return [name for name, value in zip(self.outputs, flat, strict=True) if is_tensor(value)]

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes."""
        return [node for node in self.nodes if node.op == "placeholder"]

    @property
    def fake_mode(self) -> Any:
        """The fake-tensor mode that the graph's values live in."""
        return next(node.meta["val"].fake_mode for node in self.placeholders)

    @property
    def roles(self) -> Roles:
        """What each site does, read from the dataflow of the graph as traced."""
        return (self.as_traced or self)._roles

    @cached_property
    def _roles(self) -> Roles:
        return find_roles(self.nodes, self.sites)

    @property
    def points(self) -> tuple[AnyPoint, ...]:
        """The places that are no weight: sub-layers, attentions and inputs of the graph as traced."""
        return (self.as_traced or self)._points

    @cached_property
    def _points(self) -> tuple[AnyPoint, ...]:
        return find_points(self.nodes, self.sites)

    def by_name(self) -> dict[str, fx.Node]:
        """All nodes by name."""
        return {node.name: node for node in self.nodes}

    @property
    def parameter_sites(self) -> list[WeightSite]:
        """Every parameter as a site of its own, biases too: what whole-module methods choose from."""
        return [site.as_parameter() for site in self.sites]

    def call(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        """Insert an operation at the current insertion point, its value and origin recorded."""
        node = self.module.graph.call_function(target, args)
        values = map_arg(args, lambda operand: operand.meta.get("val", False))
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            product = _product(target, values)
            node.meta["val"] = target(*values) if product is None else product
        node.meta |= {k: v for k, v in like.meta.items() if k in PROVENANCE}
        node.meta[VERIFIED] = signature(node)
        return node

    def attach(self, name: str, weight: Weight, trained: bool = True, stored: bool = True) -> None:
        """Add a tensor under a full name: a parameter, or a buffer where it is not trained."""
        self.weights[name] = weight
        self.aliases[name] = name
        with self.fake_mode:
            value = torch.empty(weight.shape, dtype=weight.dtype)
        if trained:
            set_tensor(self.module, name, nn.Parameter(value, requires_grad=False))
            return
        set_tensor(self.module, name, value, persistent=stored)
        self.buffers |= {name}
        if not stored:
            self.transient |= {name}

    def restore(self, name: str, weight: Weight) -> None:
        """Let a tensor of the base have a weight again under all its names, in place of what bits stood for it."""
        with self.fake_mode:
            value = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False)
        first = self.aliases.get(name, name)
        for alias in [alias for alias, of in self.aliases.items() if of == first]:
            self.weights[alias] = weight
            set_tensor(self.module, alias, value)

    def detach(self, name: str) -> None:
        """Forget a tensor that was attached."""
        del self.weights[name], self.aliases[name]
        self.buffers -= {name}
        self.transient -= {name}

    def parameter_node(self, name: str) -> fx.Node:
        """The node that reads a weight; made at the top of the graph if there is none yet."""
        for node in self.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
        graph = self.module.graph
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            node = graph.get_attr(name)
        with self.fake_mode:
            node.meta["val"] = torch.empty(self.weights[name].shape, dtype=self.weights[name].dtype)
        return node

    def value_of(self, parameter: str, uses: Sequence[Use], nodes: Mapping[str, fx.Node]) -> fx.Node:
        """The node that these uses read a weight from: its expression where it is adapted, else the weight."""
        name = self.adapted.get((parameter, uses[0].node))
        return nodes[name] if name else self.leaf(parameter)

    def leaf(self, parameter: str) -> fx.Node:
        """The node that gives a weight of the base: what is read, or what its few bits stand for."""
        found = self.quantized.get(parameter)
        if found is None:
            return self.parameter_node(parameter)
        return next(node for node in self.nodes if node.name == found.value)

    def copy(self) -> Graph:
        """A graph that can be rewritten without touching this one; weights are shared."""
        module = fx.GraphModule(self.module, copy_nodes(self.module.graph))
        for name, value in list(self.module.named_parameters(remove_duplicate=False)):
            set_tensor(module, name, value)
        for name, value in list(self.module.named_buffers(remove_duplicate=False)):
            set_tensor(module, name, value)
        return replace(
            self,
            module=module,
            weights=dict(self.weights),
            aliases=dict(self.aliases),
            adaptations=list(self.adaptations),
            adapted=dict(self.adapted),
            adapted_values=dict(self.adapted_values),
            quantized=dict(self.quantized),
            as_traced=self.as_traced or self,
        )

    def revise(self, change: Callable[[Adaptation], Adaptation]) -> None:
        """Put another adaptation in the place of each, in the nodes of its expression too."""
        revised = {adaptation: change(adaptation) for adaptation in self.adaptations}
        self.adaptations[:] = revised.values()
        for node in self.nodes:
            if node.meta.get(ADAPTATION) in revised:
                node.meta[ADAPTATION] = revised[node.meta[ADAPTATION]]

    def clean(self) -> None:
        """Drop dead nodes, check the graph's structure and regenerate its code."""
        self.module.graph.eliminate_dead_code()
        self.module.graph.lint()
        self.module.recompile()

    @property
    def inserted(self) -> dict[str, Param]:
        """Every inserted tensor by its name, trained or not."""
        return {name: param for a in self.adaptations for name, param in a.params.values()}

    @property
    def adapter_names(self) -> list[str]:
        """The names of the inserted parameters: what is trained."""
        return [name for name, param in self.inserted.items() if param.trained]

    @property
    def staying(self) -> str:
        """The inserted methods that a folded graph has too, in words; "" if there are none."""
        return ", ".join(dict.fromkeys(a.method.name for a in self.adaptations if a.stays))

    @property
    def state(self) -> str:
        """The stage, and that weights are quantized where they are: `adapted, quantized`."""
        return f"{self.stage}, quantized" if self.quantized else self.stage

    def __repr__(self) -> str:
        counts = (
            f"{len(self.operations)} operations, {len(self.sites)} sites, {len(self.adaptations)} adapted"
        )
        return f"<Graph of {self.source.describe}, {self.state}: {counts}; see text() and adaptc.bind(graph)>"

    def text(self) -> str:
        """The graph as text, a line a node: result, operation, operands, shape, module."""
        return "\n".join(_line(node) for node in self.nodes)

    def excerpt(self, name: str, lines: int = 5) -> str:
        """The lines of the text around a node, whose own is marked; "" if there is no such node."""
        nodes = list(self.nodes)
        at = next((index for index, node in enumerate(nodes) if node.name == name), None)
        if at is None:
            return ""
        shown = range(max(0, at - lines), min(len(nodes), at + lines + 1))
        return "\n".join(f"{'>' if index == at else ' '} {_line(nodes[index])}" for index in shown)
