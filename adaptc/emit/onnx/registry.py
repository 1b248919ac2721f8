"""The ONNX forms of torch's operations: those of torch's exporter at an opset, and adaptc's own before them."""

# pyright: reportPrivateUsage=false
# The exporter's registry has no public name.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import fx

from adaptc.emit.onnx.decompositions import DECOMPOSITIONS
from adaptc.emit.onnx.operations import COMPLEX, FORMS, translations
from adaptc.emit.onnx.wrong_forms import WRONG, is_wrong
from adaptc.ir.nodes import is_operator
from adaptc.tracing.export import quietly

OPSET = 20
"""The default opset: every ONNX Runtime since 1.17 runs it."""


@cache
def exporter_registry(opset: int) -> Any:
    """The exporter's own registry of ONNX forms at an opset, which is not to be changed."""
    from torch.onnx._internal.exporter import _constants, _registration

    with quietly():  # it warns of every operation of packages that are not installed
        return _registration.ONNXRegistry.from_torchlib(max(opset, _constants.TORCHLIB_OPSET))


def registry_of(nodes: Iterable[fx.Node], opset: int) -> Any:
    """The exporter's registry at an opset, with adaptc's forms of the operations of these nodes."""
    from torch.onnx._internal.exporter import _registration

    registry: Any = _registration.ONNXRegistry()
    exporter = exporter_registry(opset)
    registry._opset_version = exporter.opset_version
    registry.functions = {target: list(forms) for target, forms in exporter.functions.items()}
    for target, function in translations(node.target for node in nodes).items():
        registry.register_op(target, function, is_complex=target.name() in COMPLEX)
    return registry


def has_form(node: fx.Node, registry: object) -> bool:
    """Whether the exporter finds an ONNX form for a node, on real or on complex operands as this one has.

    A form that computes something else for this node's arguments is none.
    """
    from torch.onnx._internal.exporter import _dispatching

    dispatching: Any = _dispatching
    return not is_wrong(node) and dispatching.dispatch(node, registry)[0] is not None


@cache
def decompositions(opset: int) -> Mapping[Any, Callable[..., Any]]:
    """Torch's decompositions of operations that have no ONNX form at an opset, or a wrong one, and adaptc's own.

    Returns:
        operation -> what computes it.
    """
    from torch.onnx._internal.exporter import _decomp

    decomp: Any = _decomp
    forms: list[Any] = decomp.get_onnx_implemented_overloads(exporter_registry(opset))
    right: set[Any] = {form for form in forms if not (is_operator(form) and form.name() in WRONG)}
    table: dict[Any, Any] = decomp.create_onnx_friendly_decomposition_table(right)
    theirs = {target: function for target, function in table.items() if target.name() not in FORMS}
    return {**theirs, **DECOMPOSITIONS}
