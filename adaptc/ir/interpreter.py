"""Running a graph without its weights in memory: each is loaded for the operations that read it, then dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import map_operands
from adaptc.ir.state import written_weights
from adaptc.ir.tie_breaks import TieBreaks, makes_choice
from adaptc.progress.steps import each

LOG = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]
Batches = Mapping[str, Batch]
"""Name -> batch; a name is such as `row 1`, or the sizes of the batch."""
Outcome = list[torch.Tensor] | Exception
"""What a run on a batch gives: the outputs that are tensors, or the error that the model raised."""


@dataclass(frozen=True)
class Run:
    """What a model gave for some batches.

    Attributes:
        batches: the batches.
        outcomes: name of a batch -> its outcome.
        outputs: the names of the outputs that are tensors; empty if they have none.
        coverage: how the weights were held, in words; "" where all were at once.
        notes: what else a report must tell of the run, such as `in float32`.
        choices: name of a batch -> the indices that operations chose in it, in the order of execution.
        flipped: how many choices were taken from the run that this one follows, and would have been others without it.
    """

    batches: Batches
    outcomes: Mapping[str, Outcome]
    outputs: tuple[str, ...] = ()
    coverage: str = ""
    notes: tuple[str, ...] = ()
    choices: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict[str, Sequence[torch.Tensor]])
    flipped: int = 0

    @property
    def taken(self) -> Batches:
        """The batches that the model ran without an error."""
        return {n: b for n, b in self.batches.items() if not isinstance(self.outcomes[n], Exception)}

    def only(self, outputs: Sequence[str]) -> Run:
        """This run with only some of its outputs, in the order of these names."""
        positions = [self.outputs.index(name) for name in outputs]
        outcomes = {
            name: outcome if isinstance(outcome, Exception) else [outcome[position] for position in positions]
            for name, outcome in self.outcomes.items()
        }
        return replace(self, outcomes=outcomes, outputs=tuple(outputs))

    def among(self, labels: Container[str]) -> Run:
        """This run of only some of its batches."""
        return replace(
            self,
            batches={name: batch for name, batch in self.batches.items() if name in labels},
            outcomes={name: outcome for name, outcome in self.outcomes.items() if name in labels},
            choices={name: choices for name, choices in self.choices.items() if name in labels},
        )


class Interpreter:
    """A graph that runs in evaluation mode on several batches in one sweep.

    It runs node by node. A weight is loaded once a sweep, before the first operation that reads it, and dropped after
    the last one; so are the results of operations.

    Args:
        graph: what is run.
        least: compute in this dtype what the graph computes in a narrower one, from the weights as they are stored.
            In a deep model the rounding of every operation would hide the differences that a proof looks for.

    Attributes:
        widens: whether a weight of the graph is narrower than that.
    """

    def __init__(self, graph: Graph, least: torch.dtype | None = None):
        self.graph, self._least = graph, least
        self.widens = any(_wider(weight.dtype, least) != weight.dtype for weight in graph.weights.values())

    def on(self, batches: Batches, follows: Run | None = None, near: float = 0.0) -> Run:
        """One sweep over these batches. A batch that fails is left out of the rest of it.

        Args:
            batches: the batches.
            follows: another model's run on these batches, whose choices between near equals are made here too.
            near: how near, see `TieBreaks`.
        """
        followed: Mapping[str, Sequence[torch.Tensor]] = follows.choices if follows is not None else {}
        choices = [TieBreaks(followed.get(name, ()), near) for name in batches]
        least = self._least if self.widens else None
        outcomes = _sweep(self.graph, list(batches.values()), choices, least)
        flipped = sum(choice.flipped for choice in choices)
        notes = [f"in {str(least).removeprefix('torch.')}"] if least else []
        notes += [f"{flipped} choices between near equals as the reference's"] if flipped else []
        return Run(
            batches,
            dict(zip(batches, outcomes, strict=True)),
            tuple(self.graph.tensor_outputs),
            "whole, one weight at a time",
            tuple(notes),
            {name: choice.indices for name, choice in zip(batches, choices, strict=True)},
            flipped,
        )


def numbered(rows: Sequence[Batch]) -> Batches:
    """Rows of data as batches, named by their numbers from 1."""
    return {f"row {number}": row for number, row in enumerate(rows, 1)}


def observed(
    graph: Graph,
    batches: Sequence[Batch],
    observe: Callable[[fx.Node, Any], None],
    least: torch.dtype | None = None,
) -> list[Outcome]:
    """One sweep over these batches that shows every value to a function.

    Args:
        graph: what is run.
        batches: the batches.
        observe: called with each node and its value, for every batch.
        least: the dtype that it computes in at least.

    Returns:
        the outcome of every batch, in their order.
    """
    return _sweep(graph, batches, [TieBreaks((), 0.0) for _ in batches], least, observe)


def _sweep(
    graph: Graph,
    batches: Sequence[Batch],
    choices: Sequence[TieBreaks],
    least: torch.dtype | None,
    observe: Callable[[fx.Node, object], None] | None = None,
) -> list[Outcome]:
    """Run every node on every batch before the next node; see `Interpreter`."""
    values: list[dict[fx.Node, Any]] = [{} for _ in batches]
    outcomes: list[Any] = [None] * len(batches)
    loaded: dict[str, torch.Tensor] = {}
    last = _last_users(graph)
    written = {graph.aliases.get(name, name) for name in written_weights(graph.nodes)}
    states: list[dict[str, torch.Tensor]] = [{} for _ in batches]
    inputs = {node: spec.name for node, spec in zip(graph.placeholders, graph.inputs, strict=True)}
    with torch.no_grad():
        for node in each(LOG, "running the graph", list(graph.nodes), "operations", logging.DEBUG):
            if node.op == "get_attr":
                continue  # read by its users, so that it is loaded no earlier than they run
            read = [n for n in node.all_input_nodes if n.op == "get_attr"]
            weights = {n: _read(graph, n, loaded, least) for n in read}
            for number, batch in enumerate(batches):
                if outcomes[number] is None:
                    try:
                        operands = values[number] | _with_state(graph, weights, written, states[number])
                        given = batch[inputs[node]] if node in inputs else None
                        result = _step(node, given, operands, least)
                        if makes_choice(node):
                            result = choices[number].make(node, operands[node.all_input_nodes[0]], result)
                    except Exception as error:
                        outcomes[number] = error
                        values[number].clear()
                        continue
                    if node.op == "output":
                        outcomes[number] = result
                    else:
                        values[number][node] = result
                        if observe is not None:
                            observe(node, result)
            for done in last.get(node, ()):
                if isinstance(done, str):
                    loaded.pop(done, None)
                else:
                    for results in values:
                        results.pop(done, None)
    return outcomes


def _last_users(graph: Graph) -> dict[fx.Node, list[fx.Node | str]]:
    """Node -> the results of nodes, and the names of weights, that no later node reads."""
    last: dict[fx.Node | str, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for operand in node.all_input_nodes:
            name = str(operand.target)
            last[graph.aliases.get(name, name) if operand.op == "get_attr" else operand] = node
    read_last: dict[fx.Node, list[fx.Node | str]] = {}
    for value, node in last.items():
        read_last.setdefault(node, []).append(value)
    return read_last


def _read(graph: Graph, node: fx.Node, loaded: dict[str, torch.Tensor], least: torch.dtype | None) -> Any:
    """The tensor that a node reads, loaded if it is not yet; False for the training mode."""
    name = str(node.target)
    if name == "training" and name not in graph.weights:
        return False
    first = graph.aliases.get(name, name)
    if first not in loaded:
        tensor = graph.weights[first].load()
        loaded[first] = _widened(tensor, least)
    return loaded[first]


def _with_state(
    graph: Graph, weights: Mapping[fx.Node, Any], written: Container[str], state: dict[str, torch.Tensor]
) -> dict[fx.Node, Any]:
    """The weights that an operation reads; those that the graph writes to are a batch's own, in its state."""
    names = {node: graph.aliases.get(str(node.target), str(node.target)) for node in weights}
    for node, name in names.items():
        if name in written and name not in state:
            state[name] = weights[node].clone()
    return {node: state.get(name, weights[node]) for node, name in names.items()}


def _step(node: fx.Node, given: object, values: Mapping[fx.Node, object], least: torch.dtype | None) -> Any:
    """The result of one node: of an input what is given, of the output node the list of tensors."""
    if node.op == "placeholder":
        return _widened(given, least)
    args, kwargs = map_operands(node, values.__getitem__)
    if least is not None:
        args, kwargs = pytree.tree_map(partial(_widened, least=least), (args, kwargs))
    if node.op == "output":
        return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def _widened(value: object, least: torch.dtype | None) -> Any:
    """A tensor of a narrower dtype, or such a dtype, in the `least` one; anything else as it is."""
    if isinstance(value, torch.dtype):
        return _wider(value, least)
    return value.to(_wider(value.dtype, least)) if isinstance(value, torch.Tensor) else value


def _wider(dtype: torch.dtype, least: torch.dtype | None) -> torch.dtype:
    """The dtype with at least the precision of another; that of integers and of 8 bits as it is."""
    if least is None or dtype.itemsize == 1 or not (dtype.is_floating_point or dtype.is_complex):
        return dtype
    return torch.promote_types(dtype, least)
