"""The rounding of a model by itself: its graph in its own dtypes, beside the same graph in float64."""

from __future__ import annotations

from functools import cached_property

import torch

from adaptc.compiler.proof.differences import difference
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run


class OwnRounding:
    """How much of a model's outputs is rounding, measured when it is first asked for.

    Args:
        graph: the model.
        reference: a run of the model, on whose batches it is measured, with its choices between near equals.
        near: how near, see `TieBreaks`.
    """

    def __init__(self, graph: Graph, reference: Run, near: float):
        self._graph, self._reference, self._near = graph, reference, near

    @cached_property
    def wide(self) -> Run:
        """The run in float64."""
        return self._run(torch.float64)

    @cached_property
    def _narrow(self) -> Run:
        return self._run(None)

    def _run(self, least: torch.dtype | None) -> Run:
        """A run that computes in this dtype or a wider one, with the outputs that the reference has."""
        run = Interpreter(self._graph, least).on(self._reference.taken, self._reference, self._near)
        return run.only(self._reference.outputs) if self._reference.outputs else run

    def of(self, batch: str, output: int) -> float | None:
        """The relative error of an output in the model's own dtypes; None where the model does not run in float64."""
        wide, narrow = self.wide.outcomes[batch], self._narrow.outcomes[batch]
        if isinstance(wide, Exception) or isinstance(narrow, Exception):
            return None
        return difference(wide[output], narrow[output]).relative
