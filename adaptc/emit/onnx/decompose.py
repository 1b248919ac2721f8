"""Operations that ONNX has: others are decomposed into these."""

# pyright: reportPrivateUsage=false, reportMissingTypeStubs=false
# The exporter's table of operations has no public name, and onnxscript's has no types.

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from adaptc.emit.onnx.operations import translations
from adaptc.errors import Refusal, RefusedError
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import PROVENANCE, provenance
from adaptc.ir.stages import ADAPTC_LIBRARIES
from adaptc.rewriter.pipeline import Pass

EXPECTED = "expected operations that ONNX has a form for; artifacts in other formats (torch, hf) need none"
"""The note of an error about an operation that has no ONNX form."""


@cache
def vocabulary() -> tuple[Mapping[Any, Any], Mapping[Any, Callable[..., Any]]]:
    """The operations that the exporter knows.

    Returns:
        Operation -> the exporter's function for it, and operation -> a decomposition, of those it has none for.
    """
    from onnxscript.function_libs.torch_lib import ops, registration
    from torch.onnx._internal.exporter import _decomp, _registration
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry

    quiet = logging.getLogger("torch.onnx._internal.exporter._registration")
    quiet.setLevel(logging.ERROR)  # it warns of every operation of packages that are not installed
    assert ops is not None  # they are registered when they are imported
    functions: dict[Any, Any] = {
        _registration._get_overload(name): overloads
        for name, overloads in registration.default_registry.items()
        if not name.startswith("internal::")
    }
    torchlib: list[Any] = list(_torchlib_registry.get_torchlib_ops())
    for meta in torchlib:
        functions.setdefault(meta.fx_target, registration.OverloadedFunction(""))
    functions.pop(None, None)
    decompositions: Any = _decomp
    return functions, decompositions.create_onnx_friendly_decomposition_table(set(functions))


@dataclass(frozen=True)
class OnnxOperations(Pass):
    """f(x) becomes the operations that f is made of, wherever ONNX has no form for f itself.

    Each operation is traced alone. Tensors made on the device of the inputs are made on the CPU: a program chooses no
    device.
    """

    name: ClassVar[str] = "onnx-operations"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    leaves: ClassVar[str | None] = "onnx"

    def call(self, graph: Graph) -> bool:
        """Decompose every operation that the exporter does not know.

        Raises:
            RefusedError: one cannot be decomposed; names the first.
        """
        functions, table = vocabulary()
        known = _known(functions, graph)
        nodes, changed = graph.module.graph, False
        with graph.fake_mode:  # of operations that make a constant too
            for node in list(nodes.nodes):
                if node.op != "call_function" or node.target in known:
                    continue
                if node.target is getattr:
                    _put_on_cpu(nodes, node)
                elif node.target in table or _is_composite(node.target):
                    _decompose(nodes, node, table)
                else:
                    continue
                changed = True
        nodes.eliminate_dead_code()
        self._refuse_unknown(graph.nodes, _known(functions, graph))
        return changed

    def _refuse_unknown(self, nodes: Iterable[fx.Node], known: set[Any]) -> None:
        """Refuse the first operation that is not known.

        Raises:
            RefusedError: there is one.
        """
        for node in nodes:
            target = node.target
            if (
                isinstance(target, torch._ops.OpOverload)
                and target.namespace not in ADAPTC_LIBRARIES
                and target not in known
            ):
                reason = f"ONNX export failed: there is no ONNX form of {target}"
                raise RefusedError([Refusal(reason, notes=(*provenance(node), EXPECTED))], self)


def _known(functions: Mapping[Any, Any], graph: Graph) -> set[Any]:
    """The operations that have an ONNX form, by the exporter or by ours, among others."""
    return {*functions, *translations(node.target for node in graph.nodes)}


def _put_on_cpu(nodes: fx.Graph, device: fx.Node) -> None:
    """Let tensors that are made on the device of another tensor be made on the CPU."""
    cpu = torch.device("cpu")
    for user in list(device.users):
        user.args = tuple(cpu if argument is device else argument for argument in user.args)
        user.kwargs = {key: cpu if value is device else value for key, value in user.kwargs.items()}
    nodes.erase_node(device)


def _is_composite(target: Any) -> bool:
    """Whether torch computes an operation by others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(key)


def _decompose(nodes: fx.Graph, node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> None:
    """Replace a node by the operations that a trace of it alone gives."""
    operands = node.all_input_nodes
    target: Any = node.target

    def call(*values: Any) -> Any:
        by_node = dict(zip(operands, values, strict=True))
        arguments: Any = map_arg((node.args, dict(node.kwargs)), by_node.__getitem__)
        args, kwargs = arguments
        return target(*args, **kwargs)

    traced = make_fx(call, dict(table))(*(operand.meta["val"] for operand in operands)).graph
    inputs = [n for n in traced.nodes if n.op == "placeholder"]
    provenance = {key: value for key, value in node.meta.items() if key in PROVENANCE}
    for part in traced.nodes:
        part.meta = {"val": part.meta.get("val"), **provenance}
    with nodes.inserting_before(node):
        result: Any = nodes.graph_copy(traced, dict(zip(inputs, operands, strict=True)))
    node.replace_all_uses_with(result)
    nodes.erase_node(node)
