"""Running a graph without holding its weights: each is loaded for the operations that read it, then dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from adaptc.choices import Choices, chooses
from adaptc.graph import Graph
from adaptc.memory import writes

Batch = Mapping[str, torch.Tensor]
NARROW = (torch.float16, torch.bfloat16)
Outcome = list[torch.Tensor] | Exception
"""What a batch gives: the outputs that are tensors, or why the model does not take it."""


class Chooser(Protocol):
    """A side of a proof whose choices another can make too."""

    def chosen(self, batches: Sequence[Batch]) -> Sequence[Sequence[torch.Tensor]]:
        """What it chose in the run of every batch: where the values stood, operation by operation."""
        ...


class Streamed:
    """A graph that runs in evaluation mode on several batches in one sweep.

    Node by node: a weight is loaded once a sweep, when its first operation needs it, and dropped after its last;
    so is what the operations give. Asked again for the same batches, it gives what it found.

    Args:
        graph: what is run.
        wide: compute in float32 what the graph computes in float16 or bfloat16, from the weights as they are stored:
            in a deep model the rounding of each operation would hide what is looked for.
        follows: the side this one is held against: its choices between near equals are made here too.
        near: how near, see `Choices`.
    """

    def __init__(self, graph: Graph, wide: bool = False, follows: Chooser | None = None, near: float = 0.0):
        self.graph = graph
        self.wide = wide and any(weight.dtype in NARROW for weight in graph.weights.values())
        self.follows, self.near = follows, near
        self._known: tuple[Sequence[Batch], list[Outcome], list[Choices]] | None = None

    @property
    def coverage(self) -> Sequence[str]:
        """That it ran whole, but never at once, and how it computed."""
        wide = ["in float32"] if self.wide else []
        turned = [f"{self.turned} choices between near equals as the reference's"] if self.turned else []
        return ["whole, one weight at a time", *wide, *turned]

    @property
    def turned(self) -> int:
        """How many choices of the last sweep would have been others without a side to follow."""
        return sum(choices.turned for choices in self._known[2]) if self._known else 0

    def __call__(self, batches: Sequence[Batch]) -> list[Outcome]:
        """The outcome of every batch; a batch that fails is left out of the rest of the sweep."""
        if self._known is None or not same(self._known[0], batches):
            others = self.follows.chosen(batches) if self.follows else [()] * len(batches)
            choices = [Choices(made, self.near) for made in others]
            self._known = batches, _sweep(self.graph, batches, choices, self.wide), choices
        return self._known[1]

    def chosen(self, batches: Sequence[Batch]) -> list[list[torch.Tensor]]:
        """What was chosen in the run of every batch."""
        known, _, choices = self._known or ((), (), ())
        ran = list(zip(known, choices, strict=True))
        return [next((c.made for k, c in ran if same([k], [batch])), []) for batch in batches]


def same(known: Sequence[Batch], asked: Sequence[Batch]) -> bool:
    """Whether these are the same batches, value for value."""
    return len(known) == len(asked) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(known, asked, strict=True)
    )


def observed(
    graph: Graph, batches: Sequence[Batch], observe: Callable[[fx.Node, Any], None]
) -> list[Outcome]:
    """One sweep over these batches; told of every value as it is computed."""
    return _sweep(graph, batches, [Choices((), 0.0) for _ in batches], False, observe)


def _sweep(
    graph: Graph,
    batches: Sequence[Batch],
    choices: Sequence[Choices],
    wide: bool,
    observe: Callable[[fx.Node, Any], None] | None = None,
) -> list[Outcome]:
    values: list[dict[fx.Node, Any]] = [{} for _ in batches]
    outcomes: list[Any] = [None] * len(batches)
    loaded: dict[str, torch.Tensor] = {}
    last = _last_users(graph)
    copied = any(writes(node.target) for node in graph.nodes)  # it may write to weights, such as `max_norm`
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
                        if chooses(node):
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
