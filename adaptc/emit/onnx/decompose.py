"""Operations that ONNX has: what the exporter has no word for is written in others."""

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

EXPECTED = (
    "expected operations that ONNX has a form for; products in other formats (torch, hf) do not need one"
)
"""What a message says to who meets one that has none."""


@cache
def vocabulary() -> tuple[Mapping[Any, Any], Mapping[Any, Callable[..., Any]]]:
    """The exporter's functions by the operation they stand for, and decompositions of those it has none for."""
    from onnxscript.function_libs.torch_lib import ops, registration
    from torch.onnx._internal.exporter import _decomp, _registration
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry

    quiet = logging.getLogger("torch.onnx._internal.exporter._registration")
    quiet.setLevel(logging.ERROR)  # it warns of every operation of packages that are not installed
    assert ops is not None  # they are registered when they are imported
    found: dict[Any, Any] = {
        _registration._get_overload(name): functions
        for name, functions in registration.default_registry.items()
        if not name.startswith("internal::")
    }
    for meta in _torchlib_registry.get_torchlib_ops():
        found.setdefault(meta.fx_target, registration.OverloadedFunction(""))
    found.pop(None, None)
    return found, _decomp.create_onnx_friendly_decomposition_table(set(found))


@dataclass(frozen=True)
class OnnxOperations(Pass):
    """f(x) becomes the operations that it is made of, wherever ONNX has no form for f itself; each is traced by itself.

    The device of the inputs, which a program does not choose, is the CPU.
    """

    name: ClassVar[str] = "onnx-operations"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    leaves: ClassVar[str | None] = "onnx"

    def call(self, graph: Graph) -> bool:
        """Take apart what the exporter does not know.

        Raises:
            RefusedError: something is left that it does not know; names the first.
        """
        functions, table = vocabulary()
        known = {*functions, *translations(node.target for node in graph.nodes)}
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
        self._refuse_unknown(graph.nodes, {*functions, *translations(node.target for node in graph.nodes)})
        return changed

    def _refuse_unknown(self, nodes: Iterable[fx.Node], known: set[Any]) -> None:
        for node in nodes:
            target = node.target
            if (
                isinstance(target, torch._ops.OpOverload)
                and target.namespace not in ADAPTC_LIBRARIES
                and target not in known
            ):
                reason = f"ONNX export failed: there is no ONNX form of {target}"
                raise RefusedError([Refusal(reason, notes=(*provenance(node), EXPECTED))], self)


def _put_on_cpu(nodes: fx.Graph, device: fx.Node) -> None:
    """Let what is made on a device of the graph's own be made on the CPU."""
    cpu = torch.device("cpu")
    for user in list(device.users):
        user.args = tuple(cpu if argument is device else argument for argument in user.args)
        user.kwargs = {key: cpu if value is device else value for key, value in user.kwargs.items()}
    nodes.erase_node(device)


def _is_composite(target: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(key)


def _decompose(nodes: fx.Graph, node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> None:
    operands = node.all_input_nodes
    target: Any = node.target

    def call(*values: Any) -> Any:
        found = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, dict(node.kwargs)), found.__getitem__)  # type: ignore[arg-type]
        return target(*args, **kwargs)

    traced = make_fx(call, dict(table))(*(operand.meta["val"] for operand in operands)).graph
    inputs = [n for n in traced.nodes if n.op == "placeholder"]
    for made in traced.nodes:
        made.meta = {"val": made.meta.get("val"), **{k: v for k, v in node.meta.items() if k in PROVENANCE}}
    with nodes.inserting_before(node):
        result = nodes.graph_copy(traced, dict(zip(inputs, operands, strict=True)))
    node.replace_all_uses_with(result)  # type: ignore[arg-type]
    nodes.erase_node(node)
