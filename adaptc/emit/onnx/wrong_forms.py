"""Forms of torch's exporter that compute something else for some arguments, without an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from adaptc.ir.nodes import arguments_by_name, is_operator, list_arg

Arguments = Mapping[str, Any]


def is_wrong(node: fx.Node) -> bool:
    """Whether the exporter's form of an operation computes something else for the arguments of this node."""
    wrong = WRONG.get(node.target.name()) if is_operator(node.target) else None
    return wrong is not None and wrong(node, arguments_by_name(node))


def _shape(value: fx.Node) -> list[Any]:
    """The shape of a node's value."""
    return list(value.meta["val"].shape)


def _projects(node: fx.Node, arguments: Arguments) -> bool:
    """Whether an LSTM projects its outputs, so that they have fewer features than its cells."""
    outputs, cells = (_shape(state)[-1] for state in list_arg(node, 1))
    return outputs != cells


def _compares_distributions(node: fx.Node, arguments: Arguments) -> bool:
    """Whether the target of a cross entropy is a probability of every class, or is smoothed to one."""
    return arguments["target"].meta["val"].is_floating_point() or arguments["label_smoothing"] != 0


def _normalises_by_batch(node: fx.Node, arguments: Arguments) -> bool:
    """Whether a batch normalization that has running statistics takes those of the batch."""
    return arguments["training"] is True and arguments["running_mean"] is not None


def _broadcasts(node: fx.Node, arguments: Arguments) -> bool:
    """Whether a copy has another shape than what is copied."""
    return str(_shape(arguments["self"])) != str(_shape(arguments["src"]))


def _keeps_all_axes(node: fx.Node, arguments: Arguments) -> bool:
    """Whether a norm over all axes keeps them."""
    return arguments["dim"] is None and arguments["keepdim"]


def _squeezes_nothing(node: fx.Node, arguments: Arguments) -> bool:
    """Whether an axis that is squeezed has other sizes than 1."""
    return node.meta["val"].dim() == len(_shape(arguments["self"])) > 0


def _rolls_by_size(node: fx.Node, arguments: Arguments) -> bool:
    """Whether a shift depends on a size."""
    return any(isinstance(shift, fx.Node) for shift in arguments["shifts"])


def _divides_by_number(node: fx.Node, arguments: Arguments) -> bool:
    """Whether an average divides by another number than that of the values."""
    return arguments["divisor_override"] is not None


def _averages(node: fx.Node, arguments: Arguments) -> bool:
    """Whether what is scattered to one place is averaged."""
    return arguments["reduce"] == "mean"


WRONG: Mapping[str, Callable[[fx.Node, Arguments], bool]] = {
    "aten::lstm.input": _projects,
    "aten::cross_entropy_loss": _compares_distributions,
    "aten::batch_norm": _normalises_by_batch,
    "aten::native_batch_norm": _normalises_by_batch,
    "aten::_native_batch_norm_legit": _normalises_by_batch,
    "aten::_native_batch_norm_legit_functional": _normalises_by_batch,
    "aten::copy": _broadcasts,
    "aten::linalg_vector_norm": _keeps_all_axes,
    "aten::squeeze.dim": _squeezes_nothing,
    "aten::roll": _rolls_by_size,
    "aten::avg_pool2d": _divides_by_number,
    "aten::avg_pool3d": _divides_by_number,
    "aten::scatter_reduce.two": _averages,
}
"""Operation -> which nodes of it the exporter's form computes wrongly. They are decomposed, or refused."""
