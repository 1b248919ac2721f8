"""The Fisher information of weights: how much each number matters for the loss, estimated from calibration rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch.utils import _pytree as pytree

from adaptc.errors import InputError
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.progress.steps import each

LOG = logging.getLogger(__name__)


class FisherInformation:
    """The empirical Fisher information of weights: the mean over rows of (∂ loss / ∂ w)², in float32.

    Args:
        graph: a traced graph that gives a loss, with rows of inputs and labels; each row counts alone.

    Raises:
        InputError: the graph gives no loss.
    """

    def __init__(self, graph: Graph):
        self.graph, self.loss = graph, _loss_index(graph)
        self._estimated: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """The information of one weight, in its shape."""
        return self.of([name])[name]

    def of(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The information of several weights, by one run over the data.

        Returns:
            The name of each weight -> its information, in its shape.
        """
        wanted = list(names)
        missing = [name for name in wanted if name not in self._estimated]
        if missing:
            self._estimated |= self._estimate(missing)
        return {name: self._estimated[name] for name in wanted}

    def _estimate(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        module = bind(self.graph, names).eval()
        parameters = {name: module.get_parameter(name) for name in names}
        sums = {name: torch.zeros(p.shape) for name, p in parameters.items()}
        rows = each(LOG, "estimating the Fisher information", self.graph.calibration_rows, "rows")
        for number, row in enumerate(rows, 1):
            module.zero_grad()
            try:
                outputs = pytree.tree_leaves(module(**row))
            except (RuntimeError, IndexError, ValueError) as error:
                raise InputError(f"calibration: the model does not take row {number}: {error}") from error
            tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
            torch.autograd.backward(tensors[self.loss])
            for name, p in parameters.items():
                if p.grad is not None:
                    sums[name] += p.grad.float().square()
        return {name: total / len(self.graph.calibration_rows) for name, total in sums.items()}


def _loss_index(graph: Graph) -> int:
    """Which of the outputs is the loss: the one named so, or else the only scalar.

    Raises:
        InputError: none is a single number, or several are and none is called loss.
    """
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    values = [node.meta["val"] for node in pytree.tree_leaves(result) if hasattr(node, "meta")]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    scalars = [i for i, value in enumerate(tensors) if value.dim() == 0 and value.dtype.is_floating_point]
    named = [i for i, name in enumerate(graph.tensor_outputs) if name == "loss"]
    losses = named or scalars
    if len(losses) != 1:
        raise InputError(
            "calibration needs a loss, and the model gives none: put its labels among `inputs`, "
            "such as labels: int64[batch]"
        )
    return losses[0]
