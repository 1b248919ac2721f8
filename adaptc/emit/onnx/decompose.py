"""Operations that ONNX has: others are decomposed into these."""

# pyright: reportPrivateUsage=false
# torch's functionalization and its table of kernels have no public names.

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from adaptc.emit.onnx.decompositions import COMPOSITE
from adaptc.emit.onnx.registry import OPSET, decompositions, has_form, registry_of
from adaptc.emit.onnx.wrong_forms import is_wrong
from adaptc.errors import Refusal, RefusedError
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import PROVENANCE, map_operands, provenance, size_expression
from adaptc.ir.stages import ADAPTC_LIBRARIES
from adaptc.rewriter.pipeline import Pass
from adaptc.tracing.export import ASSERTIONS, CHECKS

EXPECTED = "expected operations that ONNX has a form for; artifacts in other formats (torch, hf) need none"
"""The note of an error about an operation that has no ONNX form."""
WHOLE = "whole"
"""The key of the operation that a node is a part of, where that was decomposed."""


@dataclass(frozen=True)
class OnnxOperations(Pass):
    """f(x) becomes the operations that f is made of, wherever ONNX has no form for f itself.

    Each operation is traced alone. Tensors made on the device of the inputs are made on the CPU: a program chooses no
    device.

    Attributes:
        opset: the opset whose operations count.
    """

    opset: int = OPSET

    name: ClassVar[str] = "onnx-operations"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    leaves: ClassVar[str | None] = "onnx"

    def call(self, graph: Graph) -> bool:
        """Decompose every operation that the exporter does not know.

        Raises:
            RefusedError: one cannot be decomposed; names the first.
        """
        table, registry = decompositions(self.opset), registry_of(graph.nodes, self.opset)
        nodes, changed = graph.module.graph, False
        with graph.fake_mode, enable_python_dispatcher(), torch.no_grad():
            for node in list(nodes.nodes):
                if node.op != "call_function" or has_form(node, registry):
                    continue
                if node.target is getattr:
                    _put_on_cpu(nodes, node)
                elif node.target in table or _is_composite(node.target):
                    _decompose(nodes, node, table)
                    self._refuse_fixed(graph, node)
                else:
                    continue
                changed = True
        nodes.eliminate_dead_code()
        self._refuse_unknown(graph.nodes)
        return changed

    def _refuse_fixed(self, graph: Graph, node: fx.Node) -> None:
        """Refuse a node whose decomposition runs a loop, or chooses, by a size that is dynamic.

        Raises:
            RefusedError: there is no such size any more.
        """
        inputs = zip(graph.inputs, graph.placeholders, strict=True)
        sizes = [p for spec, value in inputs for p in zip(spec.dims, value.meta["val"].shape, strict=True)]
        fixed = [dim for dim, size in sizes if isinstance(dim, str) and size_expression(size).is_number]
        if fixed:
            reason = f"ONNX export failed: ONNX has no form of {node.target} for any size of `{fixed[0]}`"
            advice = f"write the size that it is run with as a number in place of `{fixed[0]}`"
            raise RefusedError([Refusal(reason, notes=(*provenance(node), advice))], self)

    def _refuse_unknown(self, nodes: Iterable[fx.Node]) -> None:
        """Refuse the first operation that is not known.

        Raises:
            RefusedError: there is one.
        """
        registry = registry_of(nodes, self.opset)
        for node in nodes:
            target = node.target
            if (
                isinstance(target, torch._ops.OpOverload)
                and target.namespace not in ADAPTC_LIBRARIES
                and not has_form(node, registry)
            ):
                whole = node.meta.get(WHOLE)
                by = f"{whole}, which torch computes by {target}" if whole else f"{target}"
                by += " with these arguments" if is_wrong(node) else ""
                reason = f"ONNX export failed: there is no ONNX form of {by}"
                raise RefusedError([Refusal(reason, notes=(*provenance(node), EXPECTED))], self)


def _put_on_cpu(nodes: fx.Graph, device: fx.Node) -> None:
    """Let tensors that are made on the device of another tensor be made on the CPU."""
    cpu = torch.device("cpu")
    for user in list(device.users):
        user.args = tuple(cpu if argument is device else argument for argument in user.args)
        user.kwargs = {key: cpu if value is device else value for key, value in user.kwargs.items()}
    nodes.erase_node(device)


def _is_composite(target: object) -> bool:
    """Whether torch computes an operation by others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(key)


def _decompose(nodes: fx.Graph, node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> None:
    """Replace a node by the operations that a trace of it alone gives, none of which writes to its operands."""
    operands = node.all_input_nodes
    target: Any = COMPOSITE.get(node.target, node.target)

    def call(*values: Any) -> Any:
        by_node = dict(zip(operands, values, strict=True))
        arguments: Any = map_arg((node.args, dict(node.kwargs)), by_node.__getitem__)
        args, kwargs = arguments
        with _Unchecked():
            return target(*args, **kwargs)

    functional: Any = dispatch_functionalize(call, FunctionalTensorMode())
    traced = make_fx(functional, dict(table))(*(operand.meta["val"] for operand in operands)).graph
    inputs = [n for n in traced.nodes if n.op == "placeholder"]
    origin = {key: value for key, value in node.meta.items() if key in PROVENANCE} | {WHOLE: str(node.target)}
    for part in traced.nodes:
        part.meta = {"val": part.meta.get("val"), **origin}
    with nodes.inserting_before(node):
        result: Any = nodes.graph_copy(traced, dict(zip(inputs, operands, strict=True)))
    _replace(nodes, node, result)


class _Unchecked(TorchDispatchMode):
    """Leaves out what only checks results, such as that a matrix has an inverse: a program raises no such errors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func in (*ASSERTIONS, *CHECKS) else func(*args, **(kwargs or {}))


def _replace(nodes: fx.Graph, node: fx.Node, result: object) -> None:
    """Replace a node by its result: a node, a constant, or a list of such for an operation with several outputs."""
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(result, (list, tuple)):
            _replace(nodes, user, cast(Sequence[Any], result)[cast(int, user.args[1])])
        else:
            operands: dict[fx.Node, Any] = {operand: operand for operand in user.all_input_nodes}
            operands[node] = result
            user.args, user.kwargs = map_operands(user, operands.__getitem__)
    nodes.erase_node(node)
