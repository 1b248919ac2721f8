"""The graph: ATen operations on named weights that are loaded when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from adaptc.inputs import InputSpec
from adaptc.ir.adaptation import Adaptation
from adaptc.ir.analysis.heads import find_heads
from adaptc.ir.analysis.points import find_points
from adaptc.ir.analysis.roles import HEAD, Roles, find_roles
from adaptc.ir.base import Base
from adaptc.ir.nodes import (
    ADAPTATION,
    PROVENANCE,
    VERIFIED,
    copy_nodes,
    is_tensor,
    map_operands,
    set_tensor,
    signature,
)
from adaptc.ir.text import line_of
from adaptc.methods.param import Param
from adaptc.methods.point_sites import AnyPoint
from adaptc.methods.site import MATRIX_KINDS, Use, WeightSite
from adaptc.quantization.quantized_weight import QuantizedLeaf
from adaptc.weights import Weight, sha256_of_files, sha256_of_tensors


class FisherInformation(Protocol):
    """How much the loss depends on each entry of a weight, estimated from data: see `calibration.Information`."""

    def __call__(self, name: str) -> torch.Tensor:
        """The information of one weight, in the weight's shape."""
        ...

    def of(self, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """The information of several weights: name -> tensor in the weight's shape."""
        ...


def _matrix_product(target: Any, values: Sequence[Any]) -> torch.Tensor | None:
    """The value of `matmul` or `linear` with a matrix, from the shapes alone: running torch's on fake tensors is slow.

    Returns:
        an empty tensor of the result's shape; None for any other operation, or operands that do not fit.
    """
    if target not in (torch.ops.aten.matmul.default, torch.ops.aten.linear.default) or values[1].dim() != 2:
        return None
    x, matrix = values[0], values[1]
    inner, outer = matrix.shape if target is torch.ops.aten.matmul.default else matrix.shape[::-1]
    if x.dim() < 2 or x.dtype != matrix.dtype or x.shape[-1] != inner:
        return None
    return x.new_empty((*x.shape[:-1], outer))


class Uncompiled(fx.GraphModule):
    """The nodes and tensors of a graph that is rewritten again and again, and run from a module that `bind` makes."""

    def recompile(self) -> Any:
        """Generate no code, which takes as long as a pass does."""


@dataclass(repr=False)
class Graph:
    """A model as a `torch.fx` graph of ATen operations. Passes rewrite it; weights are read when they are asked for.

    Attributes:
        module: the nodes, in a module whose parameters and buffers are fake tensors: shapes and dtypes only.
        weights: name -> weight, for every parameter and buffer.
        aliases: every such name -> the first name of the same tensor.
        buffers: the names that are buffers.
        transient: the buffers that a state dict leaves out.
        inputs: the model's inputs.
        outputs: the names of its outputs.
        sites: the weights that can be adapted.
        heads: modules that are output heads, as the model's library says; None where it does not.
        source: where the model comes from.
        adaptations: what was inserted, in order.
        adapted_weights: (name of a weight, name of the first node that uses it) -> the name of the node that holds its
            adapted value.
        adapted_activations: name of a node that a target names -> the name of the node that holds its adapted value.
        quantized: name of a quantized weight -> its tensors in few bits, and the node of its dequantized value.
        stage: what is legal in the graph, see `stages.STAGE_TABLE`.
        as_traced: the graph that this one was copied from, as it was traced; None for that graph itself.
        fisher_information: of each weight, where there is data to estimate it from.
        calibration_rows: that data: batches of one row each, by the names of the inputs.
        examples: a label -> inputs that a person has given, which proofs run on.
        proof_shapes: the sizes of named dimensions that random inputs of proofs have; chosen where there are none.
    """

    module: fx.GraphModule
    weights: dict[str, Weight]
    aliases: dict[str, str]
    buffers: frozenset[str]
    transient: frozenset[str]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    sites: tuple[WeightSite, ...]
    heads: frozenset[str] | None
    source: Base
    adaptations: list[Adaptation] = field(default_factory=list[Adaptation])
    adapted_weights: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    adapted_activations: dict[str, str] = field(default_factory=dict[str, str])
    quantized: dict[str, QuantizedLeaf] = field(default_factory=dict[str, QuantizedLeaf])
    stage: str = "traced"
    as_traced: Graph | None = None
    fisher_information: FisherInformation | None = None
    calibration_rows: Sequence[Mapping[str, torch.Tensor]] = ()
    examples: Mapping[str, Mapping[str, torch.Tensor]] = field(
        default_factory=dict[str, Mapping[str, torch.Tensor]]
    )
    proof_shapes: Sequence[Mapping[str, int]] = ()

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """The nodes, in the order of execution."""
        return self.module.graph.nodes

    @property
    def operations(self) -> list[str]:
        """The names of the operations, such as `aten.linear.default`, in the order of execution."""
        return [str(node.target) for node in self.nodes if node.op == "call_function"]

    @property
    def tensor_outputs(self) -> list[str]:
        """The names of the outputs that are tensors, not None or a plain number."""
        results: Any = next(node for node in self.nodes if node.op == "output").args[0]
        values = cast(Sequence[Any], results) if isinstance(results, (list, tuple)) else [results]
        return [name for name, value in zip(self.outputs, values, strict=True) if is_tensor(value)]

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes."""
        return [node for node in self.nodes if node.op == "placeholder"]

    @property
    def fake_mode(self) -> Any:
        """torch's fake-tensor mode that the recorded values of the nodes belong to."""
        return next(node.meta["val"].fake_mode for node in self.placeholders)

    @property
    def output_heads(self) -> frozenset[str]:
        """The modules that are output heads, which `all-linear` leaves out.

        Where nobody says, they are the layers whose result becomes an output without another layer after it, unless
        the model has no other layers.
        """
        return (self.as_traced or self)._output_heads if self.heads is None else self.heads

    @cached_property
    def _output_heads(self) -> frozenset[str]:
        layers = {site.module for site in self.sites if site.kind in MATRIX_KINDS}
        last = {site.module for site in self.sites if HEAD in self.roles.of.get(site.uses[0], ())}
        return frozenset(last if last < layers else ())

    @property
    def roles(self) -> Roles:
        """What each site does in the model, such as `attention.query`, read from the graph as traced."""
        return (self.as_traced or self)._roles

    @cached_property
    def _roles(self) -> Roles:
        return find_roles(self.nodes, self.sites)

    @property
    def points(self) -> tuple[AnyPoint, ...]:
        """The sites that are no weight: sub-layers, attentions, inputs and heads of the graph as traced.

        A head is one that somebody says is one: of a module of one's own new heads read the outputs.
        """
        return (self.as_traced or self)._points

    @cached_property
    def _points(self) -> tuple[AnyPoint, ...]:
        heads = find_heads(list(self.nodes), self.inputs, self.outputs, self.heads or (), self.sites)
        return (*find_points(self.nodes, self.sites), *heads)

    @property
    def base_sha256(self) -> str:
        """SHA-256 of the base: of its weight files, or of its tensors where there are none."""
        return (self.as_traced or self)._base_sha256

    @cached_property
    def _base_sha256(self) -> str:
        if self.source.files:
            return sha256_of_files(self.source.files)
        names = [name for name, first in self.aliases.items() if name == first]
        return sha256_of_tensors((name, self.weights[name]) for name in names)

    def by_name(self) -> dict[str, fx.Node]:
        """Name -> node, for all nodes."""
        return {node.name: node for node in self.nodes}

    @property
    def parameter_sites(self) -> list[WeightSite]:
        """Every parameter as a site of its own, biases too: what methods of the kind `parameter` choose from."""
        return [site.as_parameter() for site in self.sites]

    def call(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """Insert an operation at the current insertion point, with its value recorded.

        Args:
            target: the operation.
            args: its arguments.
            like: the node whose provenance the new one takes.
            kwargs: its arguments by keyword.
        """
        node = self.module.graph.call_function(target, args, kwargs)
        values, named = map_operands(node, lambda operand: operand.meta.get("val", False))
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            product = _matrix_product(target, values)
            node.meta["val"] = target(*values, **named) if product is None else product
        node.meta |= {k: v for k, v in like.meta.items() if k in PROVENANCE}
        node.meta[VERIFIED] = signature(node)
        return node

    def attach(self, name: str, weight: Weight, trained: bool = True, stored: bool = True) -> None:
        """Add a tensor of an adapter.

        Args:
            name: its full name.
            weight: its value.
            trained: it is a parameter; else a buffer.
            stored: a buffer is part of the state dict.
        """
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
        """Give a quantized tensor of the base a weight in floating point again, under all its names."""
        with self.fake_mode:
            value = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False)
        first = self.aliases.get(name, name)
        for alias in [other for other, of in self.aliases.items() if of == first]:
            self.weights[alias] = weight
            set_tensor(self.module, alias, value)

    def detach(self, name: str) -> None:
        """Remove a tensor that `attach` added, or a weight of the base that no node reads any more."""
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

    def current_value(self, parameter: str, uses: Sequence[Use], nodes: Mapping[str, fx.Node]) -> fx.Node:
        """The node of a weight's value as it is now: adapted, if an adapter is inserted at these uses, else the base's.

        Args:
            parameter: the name of the weight.
            uses: where it is used; the first one decides.
            nodes: all nodes by name.
        """
        name = self.adapted_weights.get((parameter, uses[0].node))
        return nodes[name] if name else self.base_value(parameter)

    def base_value(self, parameter: str) -> fx.Node:
        """The node of a weight's value without any adapter: the weight, or its dequantized value."""
        leaf = self.quantized.get(parameter)
        if leaf is None:
            return self.parameter_node(parameter)
        return next(node for node in self.nodes if node.name == leaf.value)

    def copy(self) -> Graph:
        """A copy that can be rewritten without touching this graph; the weights are shared."""
        module = Uncompiled(self.module, copy_nodes(self.module.graph))
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
            adapted_weights=dict(self.adapted_weights),
            adapted_activations=dict(self.adapted_activations),
            quantized=dict(self.quantized),
            as_traced=self.as_traced or self,
        )

    def revise(self, change: Callable[[Adaptation], Adaptation]) -> None:
        """Replace every adaptation by what `change` gives for it, also as the mark of its nodes."""
        revised = {adaptation: change(adaptation) for adaptation in self.adaptations}
        self.adaptations[:] = revised.values()
        for node in self.nodes:
            if node.meta.get(ADAPTATION) in revised:
                node.meta[ADAPTATION] = revised[node.meta[ADAPTATION]]

    def clean(self) -> None:
        """Drop dead nodes, and check the graph's structure."""
        self.module.graph.eliminate_dead_code()
        self.module.graph.lint()

    @property
    def inserted(self) -> dict[str, Param]:
        """Name -> declaration, for every inserted tensor, trained or not."""
        return {name: param for a in self.adaptations for name, param in a.params.values()}

    @property
    def adapter_names(self) -> list[str]:
        """The names of the inserted tensors that are trained."""
        return [name for name, param in self.inserted.items() if param.trained]

    @property
    def staying(self) -> str:
        """The names of the inserted methods that folding leaves in the graph, as a list in text; "" if none does."""
        return ", ".join(dict.fromkeys(a.method.name for a in self.adaptations if a.stays))

    @property
    def state(self) -> str:
        """The stage as text, with `quantized` if weights are: `adapted, quantized`."""
        return f"{self.stage}, quantized" if self.quantized else self.stage

    def __repr__(self) -> str:
        counts = (
            f"{len(self.operations)} operations, {len(self.sites)} sites, {len(self.adaptations)} adapted"
        )
        return f"<Graph of {self.source.describe}, {self.state}: {counts}; see text() and adaptc.bind(graph)>"

    def text(self) -> str:
        """The graph as text, one line for each node: result, operation, operands, shape, module."""
        return "\n".join(line_of(node) for node in self.nodes)

    def excerpt(self, name: str, lines: int = 5) -> str:
        """The part of the text around a node, whose line is marked with `>`.

        Args:
            name: the node's.
            lines: how many lines are shown before it, and after it.

        Returns:
            the lines; "" if there is no such node.
        """
        nodes = list(self.nodes)
        at = next((index for index, node in enumerate(nodes) if node.name == name), None)
        if at is None:
            return ""
        shown = range(max(0, at - lines), min(len(nodes), at + lines + 1))
        return "\n".join(f"{'>' if index == at else ' '} {line_of(nodes[index])}" for index in shown)
