"""Running a graph without holding its weights: each is loaded for the operations that read it, then dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import writes_in_place
from adaptc.ir.tie_breaks import TieBreaks, makes_choice

Batch = Mapping[str, torch.Tensor]
Batches = Mapping[str, Batch]
"""Batches by what each is called, such as the sizes it has."""
NARROW = (torch.float16, torch.bfloat16)
Outcome = list[torch.Tensor] | Exception
"""What a batch gives: the outputs that are tensors, or why the model does not take it."""


@dataclass(frozen=True)
class Run:
    """What a model gave for some batches, each of which it ran once.

    Attributes:
        batches: the batches by name.
        outcomes: the outcome of every batch by its name.
        outputs: the names of the outputs that are tensors; empty where nobody named them.
        coverage: how it ran, in some phrases, where memory did not hold the model as one.
        choices: of every batch where the values stood that were chosen, operation by operation.
        flipped: how many choices would have been others without a run to follow.
    """

    batches: Batches
    outcomes: Mapping[str, Outcome]
    outputs: tuple[str, ...] = ()
    coverage: tuple[str, ...] = ()
    choices: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    flipped: int = 0

    @property
    def taken(self) -> Batches:
        """The batches that ran."""
        return {n: b for n, b in self.batches.items() if not isinstance(self.outcomes[n], Exception)}

    def only(self, outputs: Sequence[str]) -> Run:
        """The same run with only these outputs, in this order."""
        places = [self.outputs.index(name) for name in outputs]
        outcomes = {
            name: outcome if isinstance(outcome, Exception) else [outcome[place] for place in places]
            for name, outcome in self.outcomes.items()
        }
        return replace(self, outcomes=outcomes, outputs=tuple(outputs))


class Interpreter:
    """A graph that runs in evaluation mode on several batches in one sweep.

    Node by node: a weight is loaded once a sweep, when its first operation needs it, and dropped after its last;
    so is what the operations give.

    Args:
        graph: what is run.
        wide: compute in float32 what the graph computes in float16 or bfloat16, from the weights as they are stored:
            in a deep model the rounding of each operation would hide what is looked for.
    """

    def __init__(self, graph: Graph, wide: bool = False):
        self.graph = graph
        self.wide = wide and any(weight.dtype in NARROW for weight in graph.weights.values())

    def on(self, batches: Batches, follows: Run | None = None, near: float = 0.0) -> Run:
        """One sweep over these batches; a batch that fails is left out of the rest of it.

        Args:
            batches: by name.
            follows: another side's run of these batches: its choices between near equals are made here too.
            near: how near, see `Choices`.
        """
        followed = follows.choices if follows is not None else {}
        choices = [TieBreaks(followed.get(name, ()), near) for name in batches]
        outcomes = _sweep(self.graph, list(batches.values()), choices, self.wide)
        flipped = sum(choice.flipped for choice in choices)
        coverage = ["whole, one weight at a time"]
        coverage += ["in float32"] if self.wide else []
        coverage += [f"{flipped} choices between near equals as the reference's"] if flipped else []
        return Run(
            batches,
            dict(zip(batches, outcomes, strict=True)),
            tuple(self.graph.tensor_outputs),
            tuple(coverage),
            {name: choice.made for name, choice in zip(batches, choices, strict=True)},
            flipped,
        )


def numbered(rows: Sequence[Batch]) -> Batches:
    """Rows of data as batches, by their numbers."""
    return {f"row {number}": row for number, row in enumerate(rows, 1)}


def observed(
    graph: Graph, batches: Sequence[Batch], observe: Callable[[fx.Node, Any], None]
) -> list[Outcome]:
    """One sweep over these batches; told of every value as it is computed."""
    return _sweep(graph, batches, [TieBreaks((), 0.0) for _ in batches], False, observe)


def _sweep(
    graph: Graph,
    batches: Sequence[Batch],
    choices: Sequence[TieBreaks],
    wide: bool,
    observe: Callable[[fx.Node, Any], None] | None = None,
) -> list[Outcome]:
    values: list[dict[fx.Node, Any]] = [{} for _ in batches]
    outcomes: list[Any] = [None] * len(batches)
    loaded: dict[str, torch.Tensor] = {}
    last = _last_users(graph)
    copied = any(
        writes_in_place(node.target) for node in graph.nodes
    )  # it may write to weights, such as `max_norm`
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "get_attr":
                continue  # read by its users, so that it is loaded no earlier than they run
            read = [n for n in node.all_input_nodes if n.op == "get_attr"]
            weights = {n: _read(graph, n, loaded, wide, copied) for n in read}
            for number, batch in enumerate(batches):
                if outcomes[number] is None:
                    try:
                        operands = values[number] | weights
                        result = _step(node, batch, operands, wide)
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
                    for known in values:
                        known.pop(done, None)
    return outcomes


def _last_users(graph: Graph) -> dict[fx.Node, list[fx.Node | str]]:
    """Node -> the operands, and the weights by name, that nothing after it reads."""
    last: dict[fx.Node | str, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for operand in node.all_input_nodes:
            name = str(operand.target)
            last[graph.aliases.get(name, name) if operand.op == "get_attr" else operand] = node
    found: dict[fx.Node, list[fx.Node | str]] = {}
    for value, node in last.items():
        found.setdefault(node, []).append(value)
    return found


def _read(graph: Graph, node: fx.Node, loaded: dict[str, torch.Tensor], wide: bool, copied: bool) -> Any:
    name = str(node.target)
    if name == "training" and name not in graph.weights:
        return False
    first = graph.aliases.get(name, name)
    if first not in loaded:
        tensor = graph.weights[first].load()
        if wide:
            tensor = _widened(tensor)
        loaded[first] = tensor.clone() if copied or first in graph.buffers else tensor
    return loaded[first]


def _step(node: fx.Node, batch: Batch, values: Mapping[fx.Node, Any], wide: bool) -> Any:
    if node.op == "placeholder":
        return _widened(batch[str(node.target)]) if wide else batch[str(node.target)]
    args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)  # type: ignore[arg-type]
    if wide:
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
    if node.op == "output":
        return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _widened(value: Any) -> Any:
    """A narrow tensor, or the name of its dtype, as float32; anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value in NARROW else value
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in NARROW else value
