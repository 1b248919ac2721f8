"""The ONNX forms of torch's operations: those of torch's exporter at an opset, and adaptc's own before them."""

# pyright: reportPrivateUsage=false
# The exporter's registry has no public name.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import fx
from torch._ops import OpOverload

from adaptc.emit.onnx.operations import COMPLEX, FORMS, translations
from adaptc.ir.nodes import arguments_by_name, list_arg
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


def has_form(node: fx.Node, registry: Any) -> bool:
    """Whether the exporter finds an ONNX form for a node, on real or on complex operands as this one has.

    A form that computes something else for this node's arguments is none.
    """
    from torch.onnx._internal.exporter import _dispatching

    if isinstance(node.target, OpOverload) and any(
        wrong(node) for name, wrong in WRONG.items() if name == node.target.name()
    ):
        return False
    return _dispatching.dispatch(node, registry)[0] is not None


def _projects(node: fx.Node) -> bool:
    """Whether an LSTM projects its outputs, so that they have fewer features than its cells."""
    outputs, cells = (state.meta["val"].shape[-1] for state in list_arg(node, 1))
    return outputs != cells


def _compares_distributions(node: fx.Node) -> bool:
    """Whether the target of a cross entropy is a probability of every class, or is smoothed to one."""
    arguments = arguments_by_name(node)
    return arguments["target"].meta["val"].is_floating_point() or arguments["label_smoothing"] != 0


def _normalises_by_batch(node: fx.Node) -> bool:
    """Whether a batch normalization that has running statistics takes those of the batch."""
    arguments = arguments_by_name(node)
    return arguments["training"] is True and arguments["running_mean"] is not None


WRONG: Mapping[str, Callable[[fx.Node], bool]] = {
    "aten::lstm.input": _projects,
    "aten::cross_entropy_loss": _compares_distributions,
    **dict.fromkeys(
        [
            "aten::batch_norm",
            "aten::native_batch_norm",
            "aten::_native_batch_norm_legit",
            "aten::_native_batch_norm_legit_functional",
        ],
        _normalises_by_batch,
    ),
}
"""Operation -> which nodes of it the exporter's form computes wrongly; torch's decomposition is right."""


@cache
def decompositions(opset: int) -> Mapping[Any, Callable[..., Any]]:
    """Torch's decompositions of operations that have no ONNX form at an opset, or a wrong one.

    Returns:
        operation -> what computes it.
    """
    from torch.onnx._internal.exporter import _decomp

    forms = _decomp.get_onnx_implemented_overloads(exporter_registry(opset))
    right = {form for form in forms if not isinstance(form, OpOverload) or form.name() not in WRONG}
    table: Any = _decomp.create_onnx_friendly_decomposition_table(right)
    return {target: function for target, function in table.items() if target.name() not in FORMS}
